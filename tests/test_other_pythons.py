"""The store, the routes and the proof on every newer Python that is installed beside this one."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from service import PROJECT, run_to_end

NEWEST = 20  # of 3.x
TESTED = ("test_store.py", "test_sqlite_store.py", "test_http.py", "test_proof_checker.py")
# Half a minute of processor time, and nothing that differs from one Python to the next.
LEFT_OUT = "not 64_threads and not uncertain_history"
PROOF = ("proof_of_correctness.py", "--own-server", "--buyers", "200", "--tests", "1-5")


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


def failure_on(version: str, folder: Path) -> str:
    """The first command that fails there, or "". Warnings are errors there, too."""
    python = str(folder / version / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "-r", "requirements.txt", "pytest>=9,<10"]
    tests = [str(PROJECT / "tests" / name) for name in TESTED]
    commands = {
        "venv": [PYTHONS[version], "-m", "venv", str(folder / version)],
        "pip": pip,
        "version": [python, "--version"],
        "tests": [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, *tests],
        "proof": [python, "-W", "error", *PROOF],
    }
    ended = {}
    for name, command in commands.items():
        done = ended[name] = run_to_end(command)
        if done.returncode:
            return f"{name}: {done.stdout[-3000:]}{done.stderr[-2000:]}"
    assert f"Python {version}." in ended["version"].stdout
    assert int(re.findall(r"(\d+) passed", ended["tests"].stdout)[0]) > 100
    return ""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """By version: all of them run at the same time."""
    folder = tmp_path_factory.mktemp("pythons")
    with ThreadPoolExecutor(len(PYTHONS)) as pool:
        yield {version: pool.submit(failure_on, version, folder) for version in PYTHONS}


@pytest.mark.skipif(not PYTHONS, reason="no newer Python is installed")
@pytest.mark.parametrize("version", PYTHONS)
def test_the_service_sells_and_is_proven_on_a_newer_python(
    version: str, failures: dict[str, Future[str]]
) -> None:
    assert failures[version].result() == ""
