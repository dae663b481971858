"""After a failed flush nothing is sold or confirmed until a restart, whose recovery checks the log.

Linux tells of lost pages only descriptors that were open before, once each, and takes the pages for
clean: neither a second flush nor a checkpoint can heal it.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import requests
from conftest import OpenStore
from service import PROJECT, Service, need, purchase_request, send_at_once, wait_until
from test_durability import failing
from test_faults import errors, fill, mounting, stored
from test_signals import UPGRADABLE, replace_workers

import db
from sqlite.engine import sqlite3

STOCK = 1000
FIRST = "key-first"
RESTART = {"success": False, "message": db.RestartNeeded.message}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, *UPGRADABLE, WEB_CONCURRENCY="2", INITIAL_STOCK=str(STOCK)) as running:
        wait_until(lambda: len(running.workers()) == 2, 20, "not two workers")
        # Its COMMIT flushes the WAL's new header itself. From here on only our flush can fail.
        assert running.buy("alice", FIRST).status_code == 200
        yield running


def sell_until_a_flush_fails(service: Service) -> tuple[list[str], str]:
    """The keys that were told 200, and the one that was told 500.

    An idle worker that isn't traced is the faster one, and could take every purchase: after a few
    it is stopped until the other one's flush has failed.
    """
    told = [FIRST]
    untraced = service.workers()[1:]
    try:
        for number in range(20):
            if number == 10:
                for worker in untraced:
                    os.kill(worker, signal.SIGSTOP)
            answer = service.buy("alice", f"key-{number}")
            if answer.status_code == 500:
                assert answer.json() == {"success": False, "message": db.OutcomeUnknown.message}
                return told, f"key-{number}"
            assert answer.status_code == 200
            told.append(f"key-{number}")
    finally:
        for worker in untraced:
            os.kill(worker, signal.SIGCONT)
    raise AssertionError("no flush failed")


def assert_sells_nothing(service: Service, told: list[str], purchases: int) -> None:
    """Whichever worker is asked; and whoever operates it reads what to do."""
    for _ in range(4):
        for key in (None, "key-new", *told[:1]):
            answer = service.buy("alice", key)
            assert (answer.status_code, answer.json()) == (503, RESTART)
        reset = requests.post(f"{service.url}/reset", timeout=10)
        health = requests.get(f"{service.url}/health", timeout=10)
        assert [(one.status_code, one.json()) for one in (reset, health)] == [(503, RESTART)] * 2
        assert service.get("/audit")["purchase_records"] == purchases
        assert service.get("/inventory")["current_stock"] == STOCK - purchases
    assert "stop the service, then start it" in errors(service)[-1]


def assert_keeps(folder: Path, told: list[str], unknown: str) -> None:
    """After the restart each key that was told 200 is replayed, and the unknown one settled."""
    with Service(folder, WEB_CONCURRENCY="2", INITIAL_STOCK=str(STOCK)) as service:
        assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
        for key in told:
            answer = service.buy("alice", key)
            assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (200, "true")
        assert service.buy("alice", unknown).status_code == 200
        assert service.get("/audit")["purchase_records"] == len(told) + 1
    assert len(stored(folder / "inventory.db", STOCK)) == len(told) + 1


@pytest.mark.parametrize("times", ["1", "1+"], ids=["once", "for as long as the disk is broken"])
def test_a_flush_that_failed_in_one_worker_stops_them_all_until_a_restart(
    service: Service, tmp_path: Path, times: str
) -> None:
    with failing(service, tmp_path / "inventory.db-wal", f"fdatasync:error=EIO:when={times}"):
        told, unknown = sell_until_a_flush_fails(service)
        assert_sells_nothing(service, told, len(told) + 1)
    assert "Input/output error" in service.log
    assert_sells_nothing(service, told, len(told) + 1)
    assert service.stop(signal.SIGTERM) == 0
    assert_keeps(tmp_path, told, unknown)


def test_neither_a_new_worker_nor_a_reload_nor_an_upgrade_takes_it_for_healed(
    service: Service, tmp_path: Path
) -> None:
    with failing(service, tmp_path / "inventory.db-wal", "fdatasync:error=EIO:when=1"):
        told, unknown = sell_until_a_flush_fails(service)
    for worker in service.workers():
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: service.log.count("Booting worker") == 4, 20, "no new workers")
    assert_sells_nothing(service, told, len(told) + 1)
    replace_workers(service)
    assert_sells_nothing(service, told, len(told) + 1)
    service.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "Cannot start: " in service.log, 20, "the upgrade wasn't refused")
    assert_sells_nothing(service, told, len(told) + 1)
    assert service.stop(signal.SIGTERM) == 0
    assert_keeps(tmp_path, told, unknown)


@pytest.fixture
def failed_store(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two purchases, of which the second one's flush failed."""

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    store = open_store(stock=5)
    store.buy("alice", "key-1")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        with pytest.raises(db.OutcomeUnknown, match="a flush failed"):
            store.buy("alice", "key-2")
    return store


def test_the_failure_of_a_check_stops_the_sale_too_and_is_unavailable(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    store = open_store(stock=5)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(db.Unavailable, match="a flush failed"):
        store.check()
    monkeypatch.undo()
    with pytest.raises(db.RestartNeeded):
        store.buy("alice")
    assert store.audit() == (5, 5, 0)


def test_no_checkpoint_runs_after_the_failure_not_even_by_another_start(
    failed_store: Any, open_store: OpenStore, database: Path
) -> None:
    """The database file keeps every byte until nobody has it open any more."""
    before = database.read_bytes()
    for call in (failed_store.check, lambda: failed_store.reset(3), lambda: failed_store.buy("x")):
        with pytest.raises(db.RestartNeeded):
            call()
    failed_store.file.checkpoint()
    beside = open_store()
    assert beside.audit() == (5, 3, 2)
    beside.close()
    assert database.read_bytes() == before
    failed_store.close()
    assert database.read_bytes() == before
    open_store().close()
    alone = shutil.copy(database, database.with_name("alone.db"))
    with closing(sqlite3.connect(alone)) as connection:
        assert connection.execute("SELECT count(*) FROM purchases").fetchone() == (2,)


def test_a_checkpoint_hears_of_a_failure_that_no_process_has_told_of_yet(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would flush through a descriptor opened later, and copy what the disk has lost."""
    store = open_store(stock=5)
    store.buy("alice")
    before = database.read_bytes()
    with store.file.reader() as standing:
        open_before = standing.wal

    def fail_where_it_was_open(descriptor: int) -> None:
        if descriptor == open_before:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail_where_it_was_open)
        store.file.checkpoint()
    assert database.read_bytes() == before
    with pytest.raises(db.RestartNeeded):
        store.buy("alice")


@pytest.mark.parametrize(
    ("statement", "code"), [("COMMIT", 1034), ("PRAGMA wal_checkpoint(PASSIVE)", 1034)]
)
def test_a_flush_of_sqlite_itself_that_failed_stops_the_sale_too(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch, statement: str, code: int
) -> None:
    """SQLITE_IOERR_FSYNC: of the WAL's new header, or within a checkpoint."""
    store = open_store(stock=5)
    store.buy("alice")
    connect = store.file.connect

    class Failing:
        def __init__(self, connection: sqlite3.Connection) -> None:
            self.connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def execute(self, text: str, *parameters: Any) -> Any:
            if text == statement:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = code
                raise error
            return self.connection.execute(text, *parameters)

    with monkeypatch.context() as broken:
        broken.setattr(store.file, "connect", lambda *args, **kw: Failing(connect(*args, **kw)))
        if statement == "COMMIT":
            with pytest.raises(db.OutcomeUnknown):
                store.buy("bob")
        else:
            store.check()  # the check itself was fine
    with pytest.raises(db.RestartNeeded):
        store.buy("carol")


@contextmanager
def disk_that_can_lose_pages(folder: Path) -> Iterator[tuple[Path, Path, Sequence[str]]]:
    """An ext4 on a sparse file on a tmpfs: where that is full, ext4 can't write its pages back.

    Yields the tmpfs and the disk as seen from outside, and Python within. The mounts end with
    their namespace, and that with the process that holds it.
    """
    need(mounting(), "no right to mount (root with CAP_SYS_ADMIN is needed)")
    need(shutil.which("mkfs.ext4"), "mkfs.ext4 is not installed (apt-get install e2fsprogs)")
    below, disk = folder / "below", folder / "disk"
    below.mkdir()
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=24m tmpfs {below} && truncate -s 64m {below}/image"
        f" && mkfs.ext4 -q -F -b 4096 {below}/image && loop=$(losetup -f --show {below}/image)"
        # A request of several pages that is written in part would count as written: Linux's bug.
        " && echo 4 > /sys/block/${loop#/dev/}/queue/max_sectors_kb"
        f" && mount $loop {disk} && losetup -d $loop && echo mounted && exec sleep 600"
    )
    command = ["unshare", "--mount", "sh", "-c", script]
    with Popen(command, stdout=PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout is not None
            need(holder.stdout.readline() == "mounted\n", "no loop device can be had")
            enter = ("nsenter", "--mount", f"--wd={PROJECT}", "--target", str(holder.pid))
            root = Path(f"/proc/{holder.pid}/root")
            yield (
                root / below.relative_to("/"),
                root / disk.relative_to("/"),
                (*enter, sys.executable),
            )
        finally:
            holder.kill()


def drop_pages_that_count_as_clean() -> None:
    """Those that couldn't be written too: the kernel may do it at any time."""
    Path("/proc/sys/vm/drop_caches").write_text("1")


def test_on_a_disk_that_loses_pages_nothing_is_lost_that_was_told(tmp_path: Path) -> None:
    with disk_that_can_lose_pages(tmp_path) as (below, disk, python):
        command = (*python, "-m", "gunicorn", "app:app")
        url = f"sqlite:///{tmp_path}/disk/inventory.db"
        variables = {"DATABASE_URL": url, "WEB_CONCURRENCY": "2", "INITIAL_STOCK": str(STOCK)}
        keys = [f"key-{number}" for number in range(400)]
        with Service(tmp_path, *command, **variables) as service:
            answers = send_at_once(service.port, [purchase_request("alice", key) for key in keys])
            assert {answer.status for answer in answers} == {200}
            fill(below)
            statuses = [service.buy("alice", f"late-{n}").status_code for n in range(40)]
            assert statuses == sorted(statuses)  # 200s, then one 500, then 503s
            assert statuses.count(500) == 1
            (below / "filler").unlink()
            drop_pages_that_count_as_clean()
            assert {service.buy("alice", key).status_code for key in keys[:40]} == {503}
            assert {service.buy("alice").status_code for _ in range(40)} == {503}
        with Service(tmp_path, *command, **variables) as service:
            told = keys + [f"late-{n}" for n, status in enumerate(statuses) if status == 200]
            for key in told:
                answer = service.buy("alice", key)
                assert answer.headers.get("Idempotent-Replayed") == "true", (key, answer.text)
        for file in disk.glob("inventory.db*"):
            shutil.copy(file, tmp_path)
    assert len(stored(tmp_path / "inventory.db", STOCK)) - len(told) in (0, 1)
