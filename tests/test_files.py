"""Files that must not be sold from: two names, a removed WAL, a row that is gone."""

import os
import shlex
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
from conftest import OpenStore
from service import Service, need, run_to_end, send_at_once, wait_until
from test_faults import GUNICORN, errors, mounting, stored
from test_sqlite_store import execute

import db
from sqlite import wal
from sqlite.engine import sqlite3

MANY = 1_000


def test_a_file_with_two_names_is_refused(open_store: OpenStore, database: Path) -> None:
    """Each name has a WAL of its own: sold from both, every unit would be sold twice."""
    open_store().close()
    other = database.with_name("other.db")
    os.link(database, other)
    with pytest.raises(db.Unavailable, match=r"has 2 names \(hard links\)"):
        open_store()
    other.unlink()
    assert open_store().buy("alice").remaining_stock == 4


@pytest.mark.parametrize("name", ["inventory.db", "with blank and \\.db"])
def test_a_file_that_is_a_mount_point_is_refused(tmp_path: Path, name: str) -> None:
    """As a container's -v ./inventory.db:/app/inventory.db makes it: two names again."""
    need(mounting(), "no right to mount (root with CAP_SYS_ADMIN is needed)")
    outside, inside = tmp_path / "outside.db", tmp_path / name
    database = {"DATABASE_URL": f"sqlite:///{outside}"}
    init = [sys.executable, "-m", "flask", "--app", "app", "init-db"]
    assert run_to_end(init, **database).returncode == 0
    inside.touch()
    mount = shlex.join(["mount", "--bind", str(outside), str(inside)])
    command = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {shlex.join(init)}"]
    done = run_to_end(command, DATABASE_URL=f"sqlite:///{inside}")
    assert done.returncode == 4
    assert "the file itself is a mount point - mount the folder" in done.stderr


def assert_stopped(service: Service, known: str) -> None:
    """Neither the old workers nor new ones sell or confirm anything."""
    for _ in range(2):
        for key in (None, known, "key-new"):
            assert service.buy("alice", key).status_code == 503
        assert requests.get(f"{service.url}/health", timeout=10).status_code == 503
        assert "the -wal or -shm was removed or replaced" in errors(service)[-1]
        for worker in service.workers():
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: len(service.workers()) == 2, 20, "no new workers")


def all_have_read(service: Service) -> bool:
    """An idle worker opens nothing, and would take the new files for the right ones."""
    send_at_once(service.port, [b"GET /inventory HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 8)
    return all(
        any(os.readlink(file).endswith("-wal") for file in Path(f"/proc/{worker}/fd").iterdir())
        for worker in service.workers()
    )


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_sale_whose_wal_or_shm_is_touched_stops_until_a_restart(
    tmp_path: Path, suffix: str, how: str
) -> None:
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="2", INITIAL_STOCK=str(MANY)) as service:
        wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
        told = [service.buy("alice", f"key-{n}").json()["purchase_id"] for n in range(40)]
        wait_until(lambda: all_have_read(service), 20, "one worker has served nobody")
        touched = Path(f"{tmp_path}/inventory.db{suffix}")
        content = touched.read_bytes() if suffix == "-wal" else b""
        touched.unlink()
        if how == "replaced":
            touched.write_bytes(content)
        os.kill(service.workers()[0], signal.SIGKILL)
        answers = [service.buy("alice", f"later-{n}") for n in range(40)]
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 503}
        assert 200 not in statuses[statuses.index(503) :]
        told += [answer.json()["purchase_id"] for answer in answers if answer.status_code == 200]
        assert len(set(told)) == len(told)
        assert_stopped(service, "key-1")
    if suffix == "-shm":  # what the WAL held is still there
        with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="2") as service:
            assert service.buy("alice", "key-new").status_code == 200
            assert service.buy("alice", "key-1").headers["Idempotent-Replayed"] == "true"
        assert stored(tmp_path / "inventory.db", MANY) == {*told, max(told) + 1}


@pytest.mark.parametrize("removed", [["-wal", "-shm"], ["-wal"]], ids=["both", "the -wal"])
def test_no_error_makes_it_forget_the_files_that_were_removed(
    open_store: OpenStore, database: Path, removed: list[str]
) -> None:
    store = open_store(stock=20)
    store.buy("alice", "key-1")
    for end in removed:
        os.remove(f"{database}{end}")
    with pytest.raises((db.Unavailable, db.RestartNeeded)):
        store.check()
    for key in ("key-1", "key-2", None):
        with pytest.raises(db.RestartNeeded):
            store.buy("alice", key)


def test_nor_does_it_where_another_process_sells_in_new_files_already(
    open_store: OpenStore, database: Path
) -> None:
    """Then SQLite itself fails, before anything is looked at: the new WAL is the shorter one."""
    store = open_store(stock=50)
    for number in range(20):
        store.buy("alice", f"key-{number}")
    for end in ("-wal", "-shm"):
        os.remove(f"{database}{end}")
    sell = f"db.SQLiteStore(pathlib.Path({str(database)!r}), '', 0, 5).buy('bob')"
    assert run_to_end([sys.executable, "-c", f"import db, pathlib; {sell}"]).returncode == 0
    with pytest.raises(db.Unavailable):
        store.buy("alice")
    for key in ("key-1", None):
        with pytest.raises(db.RestartNeeded):
            store.buy("alice", key)


def test_under_load_removed_files_stop_all_workers_and_no_id_is_given_twice(tmp_path: Path) -> None:
    ids: list[int] = []
    over = threading.Event()

    def shop(service: Service) -> None:
        while not over.is_set():
            answer = service.buy()
            if answer.status_code == 200:
                ids.append(answer.json()["purchase_id"])

    with Service(tmp_path, INITIAL_STOCK="100000") as service, ThreadPoolExecutor(4) as crowd:
        buyers = [crowd.submit(shop, service) for _ in range(4)]
        try:
            wait_until(lambda: len(ids) > 1200, 60, "too few are sold")
            for end in ("-wal", "-shm"):
                os.remove(f"{tmp_path}/inventory.db{end}")
            told = "the -wal or -shm was removed"
            wait_until(lambda: told in service.log, 20, "the sale went on")
        finally:
            over.set()
        for buyer in buyers:
            buyer.result()
        assert {service.buy().status_code for _ in range(8)} == {503}
    assert len(set(ids)) == len(ids)


def test_a_sold_out_that_is_remembered_notices_removed_files_within_a_second(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wal, "REPLACED_CHECK_S", 0)
    store = open_store(stock=0)
    for _ in range(3):
        with pytest.raises(db.SoldOut):
            store.buy("alice")
    os.remove(f"{database}-wal")
    with pytest.raises((db.SoldOut, db.RestartNeeded)):
        store.buy("alice")
    with pytest.raises(db.RestartNeeded):
        store.buy("alice")


def test_nothing_is_replayed_on_a_wal_that_was_removed(
    open_store: OpenStore, database: Path
) -> None:
    store = open_store(stock=5)
    store.buy("alice", "key-1")
    os.unlink(f"{database}-wal")
    for _ in range(3):
        with pytest.raises(db.RestartNeeded, match="the -wal or -shm was removed"):
            store.buy("alice", "key-1")
    with pytest.raises(db.RestartNeeded):
        store.check()
    with pytest.raises(db.RestartNeeded):
        store.reset(5)


def test_an_idle_service_stays_in_wal_mode_whatever_others_ask_for(tmp_path: Path) -> None:
    """Each worker has the file open from its start on."""
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="1") as service:
        wait_until(lambda: Path(f"{tmp_path}/inventory.db-wal").exists(), 20, "no worker")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            execute(tmp_path / "inventory.db", "PRAGMA journal_mode = DELETE")
        assert service.buy().status_code == 200


def test_the_inventory_row_gone_is_503_everywhere_and_back_sells(tmp_path: Path) -> None:
    database = tmp_path / "inventory.db"
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="1") as service:
        execute_without_foreign_keys(database, "DELETE FROM inventory")
        for method, path in (
            ("POST", "/buy_ticket"),
            ("GET", "/inventory"),
            ("GET", "/audit"),
            ("GET", "/health"),
            ("POST", "/reset"),
        ):
            answer = requests.request(method, service.url + path, timeout=10)
            assert (answer.status_code, answer.json()["success"]) == (503, False), path
            assert "the inventory table is empty" in errors(service)[-1]
        assert (
            "flash_sale_database_up 0.0" in requests.get(f"{service.url}/metrics", timeout=10).text
        )
        columns = "item_id, item_name, stock, initial_stock"
        execute(database, f"INSERT INTO inventory ({columns}) VALUES (1, 'Concert', 5, 5)")
        assert service.buy().json()["remaining_stock"] == 4


def execute_without_foreign_keys(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(statement)
