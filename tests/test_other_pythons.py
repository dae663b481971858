"""The store, the routes and the proof on every newer Python that is installed beside this one."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from service import PROJECT, run_to_end

NEWEST = 20  # of 3.x
TESTED = ("test_store.py", "test_sqlite_store.py", "test_http.py", "test_proof_checker.py")
PROOF = ("proof_of_correctness.py", "--own-server", "--buyers", "200", "--tests", "1-4")


def newer_pythons() -> dict[str, str]:
    """By version: the interpreters on the PATH, and pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found: dict[str, str] = {}
    for minor in range(sys.version_info.minor + 1, NEWEST):
        places = [shutil.which(f"python3.{minor}") or ""]
        places += sorted(map(str, versions.glob(f"3.{minor}.*/bin/python3")))
        for place in filter(None, places):
            if run_to_end([place, "-c", "import venv, ensurepip"]).returncode == 0:
                found[f"3.{minor}"] = place
    return found


PYTHONS = newer_pythons()


@pytest.mark.skipif(not PYTHONS, reason="no newer Python is installed")
@pytest.mark.parametrize("version", PYTHONS)
def test_the_service_sells_and_is_proven_on_a_newer_python(version: str, tmp_path: Path) -> None:
    """Warnings are errors there, too."""
    environment = tmp_path / "venv"
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "-r", "requirements.txt", "pytest>=9,<10"]
    for command in ([PYTHONS[version], "-m", "venv", str(environment)], pip):
        done = run_to_end(command)
        assert done.returncode == 0, done.stderr
    tests = [str(PROJECT / "tests" / name) for name in TESTED]
    tested = run_to_end([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests])
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", tested.stdout)[0]) > 100
    proven = run_to_end([python, "-W", "error", *PROOF])
    assert proven.returncode == 0, proven.stdout[-2000:] + proven.stderr[-2000:]
    assert f"Python {version}." in run_to_end([python, "--version"]).stdout
