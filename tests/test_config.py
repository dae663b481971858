"""The configuration: defaults, order of precedence, and values that make no sense."""

import math
import os
import runpy
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from flask import Flask
from service import PROJECT, Service, run_to_end

from serving.config import NUMBERS, VARIABLES, ConfigError, read_config, unknown_variables


@pytest.fixture
def without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor a developer's .env sets a variable of the service."""
    monkeypatch.setattr("serving.config.ENV_FILE", Path("/nowhere/.env"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("without_variables")
def test_without_variables_the_defaults_hold() -> None:
    config = read_config()
    workers = config.pop("WEB_CONCURRENCY")
    assert workers == min(2 * (os.cpu_count() or 1), 16)
    assert config == {
        "DATABASE_URL": "sqlite:///inventory.db",
        "ITEM_NAME": "Item A - Concert Ticket",
        "INITIAL_STOCK": 100,
        "LOCK_TIMEOUT": 5.0,
        "ALLOW_RESET": "0",
        "DB_POOL_SIZE": 4,
        "DB_POOL_TIMEOUT": 5.0,
        "HOST": "127.0.0.1",
        "PORT": 8000,
        "METRICS_PORT": None,
        "SALE_STARTS_AT": None,
    }


@pytest.mark.usefixtures("without_variables")
def test_an_empty_variable_counts_as_unset() -> None:
    assert read_config(**dict.fromkeys(NUMBERS, "")) == read_config()


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("INITIAL_STOCK", "0", 0),
        ("INITIAL_STOCK", "1000000000", 1_000_000_000),
        ("LOCK_TIMEOUT", "0.25", 0.25),
        ("LOCK_TIMEOUT", "0", 0.0),
        ("PORT", " 8080 ", 8080),
        ("ALLOW_RESET", "1", "1"),
        ("DB_POOL_SIZE", "2", 2),
        ("DB_POOL_TIMEOUT", "0.5", 0.5),
        ("ITEM_NAME", "Zoë's show", "Zoë's show"),
        ("ITEM_NAME", "x" * 128, "x" * 128),
        ("ITEM_NAME", " Zoë's show \r\n", "Zoë's show"),
        ("DATABASE_URL", "\tsqlite:///sale.db\n", "sqlite:///sale.db"),
        ("HOST", "::1\r", "::1"),
        ("ALLOW_RESET", "1\n", "1"),
        ("INITIAL_STOCK", " \n", 100),
        ("METRICS_PORT", "9100", 9100),
        ("SALE_STARTS_AT", "2026-12-01T20:00:00+01:00", datetime(2026, 12, 1, 19, tzinfo=UTC)),
        ("SALE_STARTS_AT", "2026-12-01T19:00Z ", datetime(2026, 12, 1, 19, tzinfo=UTC)),
    ],
)
def test_a_variable_is_read(name: str, value: str, read: Any) -> None:
    assert read_config(**{name: value})[name] == read


IMPOSSIBLE = [
    ("INITIAL_STOCK", "-5"),
    ("INITIAL_STOCK", "1000000001"),
    ("INITIAL_STOCK", "many"),
    ("INITIAL_STOCK", "1.5"),
    ("INITIAL_STOCK", "1_0"),
    ("INITIAL_STOCK", "１００"),
    ("INITIAL_STOCK", "١٠"),
    ("INITIAL_STOCK", "1\n0"),
    ("LOCK_TIMEOUT", "1_0"),
    ("LOCK_TIMEOUT", "٥"),
    ("METRICS_PORT", "0"),
    ("METRICS_PORT", "8000"),  # PORT's own
    ("SALE_STARTS_AT", "soon"),
    ("SALE_STARTS_AT", "2026-12-01T20:00:00"),  # whose clock?
    ("SALE_STARTS_AT", "2026-12-01"),
    ("SALE_STARTS_AT", "1790000000"),
    ("ITEM_NAME", "x" * 129),
    ("ITEM_NAME", "a\x00b"),
    ("ITEM_NAME", "a\nb"),
    ("ITEM_NAME", "\x1b[31mred"),
    ("HOST", "127.0.0.1\t::1"),
    ("DATABASE_URL", "sqlite:///a\nb.db"),
    ("LOCK_TIMEOUT", "soon"),
    ("LOCK_TIMEOUT", "-1"),
    ("LOCK_TIMEOUT", "nan"),
    ("LOCK_TIMEOUT", "inf"),
    ("ALLOW_RESET", "maybe"),
    ("ALLOW_RESET", "2"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("PORT", "http"),
    ("WEB_CONCURRENCY", "0"),
    ("DB_POOL_SIZE", "0"),
    ("DB_POOL_TIMEOUT", "-1"),
    ("ITEM_NAME", "Zo\udceb's show"),
    ("HOST", "\udcff"),
    ("DATABASE_URL", "mysql://localhost/shop"),
    ("DATABASE_URL", "inventory.db"),
    ("DATABASE_URL", "sqlite:///:memory:"),
]


def test_a_misspelt_variable_is_found_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ("HOSTNAME", "TEST_DATABASE_URL", "PGPORT", "GUNICORN_CMD_ARGS", "ITEM", "PATH")
    misspelt = {"INITAL_STOCK": "INITIAL_STOCK", "SALES_START_AT": "SALE_STARTS_AT"}
    misspelt |= {"database_url": "DATABASE_URL", "LOCK-TIMEOUT": "LOCK_TIMEOUT"}
    monkeypatch.setattr("os.environ", dict.fromkeys([*others, *VARIABLES, *misspelt], "1"))
    assert set(unknown_variables()) == {
        f"The variable {name} means nothing here - is it {likely}?"
        for name, likely in misspelt.items()
    }


def test_a_misspelt_variable_is_told_at_the_start(tmp_path: Path) -> None:
    with Service(tmp_path, INITAL_STOCK="7") as service:
        assert service.get("/inventory")["initial_stock"] == 100
    warning = "The variable INITAL_STOCK means nothing here - is it INITIAL_STOCK?"
    assert service.log.count(warning) == 1


def test_a_misspelt_variable_in_the_env_file_is_told_too(copy_of_the_program: Path) -> None:
    (copy_of_the_program / ".env").write_text("INITAL_STOCK=7\nPGUSER=x\n")
    command = (sys.executable, str(copy_of_the_program / "app.py"))
    with Service(copy_of_the_program, *command, cwd=copy_of_the_program) as service:
        pass
    warning = "The variable INITAL_STOCK means nothing here - is it INITIAL_STOCK?"
    assert service.log.count(warning) == 1
    assert "The variable PGUSER in .env means nothing here\n" in service.log


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_value_that_makes_no_sense_is_named(
    make_app: Callable[..., Flask], database: Path, name: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{name} .*"):
        make_app(**{name: value})
    assert not database.exists()


@pytest.mark.parametrize(
    "command", [["app.py"], ["-m", "gunicorn", "app:app"], ["-m", "flask", "--app", "app", "audit"]]
)
@pytest.mark.parametrize(
    ("name", "value"), [("INITIAL_STOCK", "-5"), ("DATABASE_URL", "mysql://u:secret@h/d")]
)
def test_a_start_with_such_a_value_ends_with_one_clear_line(
    tmp_path: Path, command: list[str], name: str, value: str
) -> None:
    variables = {"DATABASE_URL": f"sqlite:///{tmp_path}/inventory.db"} | {name: value}
    done = run_to_end([sys.executable, *command], **variables)
    assert done.returncode not in (0, None)
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Cannot start: {name} ")
    assert "secret" not in done.stderr + done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("timeout", ["0", "5", "29.5", "600"])
def test_gunicorn_gives_a_worker_more_time_than_the_lock_timeout(
    monkeypatch: pytest.MonkeyPatch, timeout: str
) -> None:
    for name, value in {"LOCK_TIMEOUT": timeout, "HOST": "127.0.0.2", "PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    conf = runpy.run_path(str(PROJECT / "gunicorn.conf.py"))
    assert conf["timeout"] >= math.ceil(float(timeout)) + 20
    assert isinstance(conf["timeout"], int)
    assert (conf["bind"], conf["backlog"]) == ("127.0.0.2:1234", 65535)
    assert conf["control_socket_disable"] is True
    assert "%(r)s" not in conf["access_log_format"]
    assert "%(q)s" not in conf["access_log_format"]


STARTS = [["-m", "flask", "--app", "app", "audit"], ["-m", "gunicorn", "app:app"], ["app.py"]]


@pytest.mark.parametrize("command", STARTS)
def test_the_env_file_beside_the_program_is_read(
    copy_of_the_program: Path, command: list[str]
) -> None:
    (copy_of_the_program / ".env").write_text("INITIAL_STOCK=-5\n")
    done = run_to_end([sys.executable, *command], copy_of_the_program)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert done.stderr.startswith("Cannot start: INITIAL_STOCK has to be a whole number from 0")


def test_the_environment_goes_before_the_env_file(copy_of_the_program: Path) -> None:
    (copy_of_the_program / ".env").write_text("INITIAL_STOCK=7\nITEM_NAME=Zoë\n")
    command = [sys.executable, "-m", "flask", "--app", "app", "init-db"]
    variables = {"DATABASE_URL": "sqlite:///sale.db", "INITIAL_STOCK": "3"}
    done = run_to_end(command, copy_of_the_program, **variables)
    assert done.stdout.endswith(": 3 of 3 units left\n")


def test_the_demo_takes_the_env_file_and_an_empty_variable_hides_its_line(
    copy_of_the_program: Path,
) -> None:
    (copy_of_the_program / ".env").write_text("INITIAL_STOCK=7\nALLOW_RESET=0\nITEM_NAME=Zoë\n")
    variables = {"INITIAL_STOCK": "", "WEB_CONCURRENCY": " "}
    demo = ("env", "-u", "ALLOW_RESET", sys.executable, "app.py")
    with Service(copy_of_the_program, *demo, cwd=copy_of_the_program, **variables) as service:
        now = service.get("/inventory")
        assert (now["initial_stock"], now["item_name"]) == (100, "Zoë")
        assert requests.post(f"{service.url}/reset", timeout=10).status_code == 403


@pytest.mark.parametrize("line", ["DATABASE_URL: sqlite:///x.db", "set PORT=7"])
def test_an_env_file_with_a_line_that_is_none_is_refused(
    copy_of_the_program: Path, line: str
) -> None:
    """It would sell the default stock from the default database."""
    (copy_of_the_program / ".env").write_text(f"ITEM_NAME=x\n{line}\n")
    done = run_to_end([sys.executable, "app.py"], copy_of_the_program)
    assert (done.returncode, done.stderr) == (4, "Cannot start: .env, line 2: write NAME=value\n")


@pytest.mark.parametrize("command", STARTS[1:])  # flask reads a .env itself, before the app
def test_an_env_file_that_cannot_be_read_is_told(
    copy_of_the_program: Path, command: list[str]
) -> None:
    (copy_of_the_program / ".env").write_bytes(b"ITEM_NAME=\xff\n")
    done = run_to_end([sys.executable, *command], copy_of_the_program)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert done.stderr.startswith("Cannot start: .env can't be read: ")


def test_every_variable_is_in_the_example_file() -> None:
    example = (PROJECT / ".env.example").read_text(encoding="utf-8")
    for name in VARIABLES:
        assert f"\n{name}=" in example or f"\n# {name}=" in example
