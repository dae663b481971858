"""The README's commands run as a newcomer runs them: in a fresh copy, in a new environment."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import PROJECT, Service, environment, free_port

from serving.config import VARIABLES

README = (PROJECT / "README.md").read_text(encoding="utf-8")
INDENTED = [line.strip() for line in README.splitlines() if re.match(r" {4}\S", line)]
CONSOLE = re.findall(r"^\$ (.*)\n((?:(?!\$ |```).*\n)*)", README, re.MULTILINE)
SETUP_LIMIT_S = 300


@pytest.fixture(scope="module")
def fresh_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks, as they are now."""
    copy = tmp_path_factory.mktemp("copy")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, copy / name)
    return copy


def run(command: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=SETUP_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def started(fresh_copy: Path) -> Iterator[Service]:
    """What the first command starts; only the port is another."""
    assert INDENTED[0].endswith(".venv/bin/python app.py")
    setup, _, start = INDENTED[0].rpartition(" && ")
    run(setup, fresh_copy)
    port = str(free_port())
    variables = {"PORT": port, "DATABASE_URL": "", "ALLOW_RESET": ""}
    with Service(fresh_copy, *start.split(), cwd=fresh_copy, **variables) as service:
        yield service


def without_times(text: str) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>", text)
    return re.sub(r"Date: .* GMT", "Date: <time>", text).replace("\r", "").strip()


def test_the_first_command_sets_up_and_starts_and_curl_buys_as_shown(started: Service) -> None:
    assert len(CONSOLE) >= 6
    for command, shown in CONSOLE:
        assert command.startswith("curl ")
        printed = run(
            command.replace("curl ", "curl -sS ").replace(":8000", f":{started.port}"), PROJECT
        )
        assert without_times(printed) == without_times(shown)


def test_the_second_command_sets_up_and_runs_the_tests(fresh_copy: Path) -> None:
    assert INDENTED[1].endswith(".venv/bin/python -m pytest")
    collected = run(INDENTED[1], fresh_copy, PYTEST_ADDOPTS="--collect-only -q", CI="")
    assert int(re.findall(r"(\d+) tests collected", collected)[0]) > 200


def test_the_gate_runs_the_readmes_test_and_proof_commands() -> None:
    gate = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert INDENTED[1] in gate
    assert f"{INDENTED[2]} --own-server" in gate


def test_the_command_for_a_real_sale_serves(
    started: Service, fresh_copy: Path, tmp_path: Path
) -> None:
    assert "`.venv/bin/gunicorn app:app`" in README
    with Service(
        tmp_path, str(fresh_copy / ".venv/bin/gunicorn"), "app:app", cwd=fresh_copy
    ) as service:
        assert service.buy().status_code == 200


def test_every_file_that_the_readme_names_exists() -> None:
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(linked) >= 3
    for name in linked + re.findall(r"`([\w/-]+\.(?:py|conf|sql|md))`", README):
        assert (PROJECT / name).exists(), name


def test_every_variable_of_the_readme_is_one_of_the_configuration() -> None:
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)`", README)) <= {*VARIABLES, "API_URL"}
