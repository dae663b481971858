"""A start that can't sell the wrong stock: which file, how many units, and what only looks."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from service import PROJECT, Service, run_to_end, wait_until

AUDIT, INIT_DB = (
    [sys.executable, "-m", "flask", "--app", "app", name] for name in ("audit", "init-db")
)


def test_audit_creates_nothing_and_names_the_file_it_read(tmp_path: Path) -> None:
    database = {"DATABASE_URL": f"sqlite:///{tmp_path}/sale.db"}
    missing = run_to_end(AUDIT, **database)
    assert missing.returncode == 4
    assert f"{tmp_path}/sale.db: unable to open database file" in missing.stderr
    assert list(tmp_path.iterdir()) == []
    made = run_to_end(INIT_DB, **database)
    assert made.stdout == "Item A - Concert Ticket: 100 of 100 units left\n"
    read = run_to_end(AUDIT, **database)
    assert (read.returncode, '"consistent": true' in read.stdout) == (0, True)
    assert re.fullmatch(rf"In {tmp_path}/sale\.db, by .* SQLite 3\.\d+\.\d+\n", read.stderr)


def test_audit_beside_a_sale_reads_it(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        service.buy()
        done = run_to_end(AUDIT, DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db")
        assert '"purchase_records": 1, "consistent": true' in done.stdout
        assert service.buy().status_code == 200


def test_a_relative_path_starts_where_the_service_does_and_the_start_tells_the_whole(
    tmp_path: Path,
) -> None:
    conf = ("--config", str(PROJECT / "gunicorn.conf.py"), "--chdir", str(tmp_path))
    command = (sys.executable, "-m", "gunicorn", *conf, "app:app")
    url = {"DATABASE_URL": "sqlite:///sale.db\r", "PYTHONPATH": str(PROJECT)}
    with Service(tmp_path, *command, cwd=tmp_path, **url) as service:
        told = "Selling Item A - Concert Ticket: 100 of 100 units left, from "
        wait_until(lambda: told in service.log, 10, "the start doesn't say what is sold")
        assert f"{told}{tmp_path}/sale.db, by " in service.log
    assert (tmp_path / "sale.db").exists()


@pytest.mark.parametrize("blank", [" ", "\r", "\n", "\t"])
def test_blanks_and_line_ends_around_a_url_are_no_part_of_it(
    tmp_path: Path, make_app: Any, blank: str
) -> None:
    url = f"{blank}sqlite:///{tmp_path}/sale.db{blank}"
    make_app(DATABASE_URL=url)
    assert {path.name for path in tmp_path.iterdir()} <= {"sale.db", "sale.db-wal", "sale.db-shm"}


def test_other_settings_than_the_databases_are_told_not_used(tmp_path: Path) -> None:
    database = {"DATABASE_URL": f"sqlite:///{tmp_path}/inventory.db"}
    run_to_end(INIT_DB, **database, INITIAL_STOCK="5000")
    told = (
        "Selling Item A - Concert Ticket: 5,000 of 5,000 units left;"
        " INITIAL_STOCK (9,000) is used for a new database only;"
        " ITEM_NAME (Item B) is used for a new database only, from "
    )
    with Service(tmp_path, INITIAL_STOCK="9000", ITEM_NAME="Item B") as service:
        wait_until(lambda: told in service.log, 10, "the start doesn't say what is sold")
        assert service.get("/inventory")["current_stock"] == 5000


@pytest.mark.parametrize(("limit", "told"), [("128\n", True), ("4096\n", False), (None, False)])
def test_a_kernel_that_lets_few_buyers_wait_is_told_how_to_let_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, told: bool
) -> None:
    from serving import starting

    monkeypatch.setattr(starting, "SOMAXCONN", tmp_path / "somaxconn")
    if limit:
        (tmp_path / "somaxconn").write_text(limit)
    line = "only 128 buyers wait for a worker - raise it: sysctl -w net.core.somaxconn=4096"
    assert (line in starting.short_queue()) == told
