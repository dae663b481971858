"""200 means on disk: the order of system calls, flushes that fail, and a power cut at every answer.

kill -9 can't show that, as the kernel still writes what a killed process has handed to it. So
strace records what the real service asks of the kernel, and the disk is rebuilt from what was
flushed by then.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import OpenStore
from service import Service, need, patched, purchase_request, send_at_once, wait_until

import db
from sqlite.engine import sqlite3

TRACED = "pwrite64,ftruncate,fdatasync,fsync,sendto,fcntl,openat,unlink"
TRACE_LIMIT_S = 30.0
CALL = re.compile(r"(\w+)\((.*)")
RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
HEX = re.compile(r"(?:\\x[0-9a-f]{2})+")
OF_FILE = re.compile(r"\d+<([^>]*)>")
WRITE = re.compile(r'"([^"]*)", (\d+), (\d+) ?\) += \d+')
TOLD = re.compile(r'"purchase_id":(\d+)|SOLD OUT')
WRITE_LOCK = "l_start=120,"  # SQLite's WAL_WRITE_LOCK, a byte of the -shm


class Call(NamedTuple):
    """One system call at one moment: at its begin, or at its end with its result."""

    pid: str
    name: str
    text: str  # the arguments, then " = result" at the end; file names and data in hexadecimal
    ended: bool

    @property
    def path(self) -> str:
        found = OF_FILE.match(self.text)
        return _plain(found[1]) if found else ""

    @property
    def plain(self) -> str:
        return HEX.sub(lambda found: _plain(found[0]), self.text)

    @property
    def succeeded(self) -> bool:
        return self.ended and " = -1 " not in self.text


def _plain(hexadecimal: str) -> str:
    return bytes.fromhex(hexadecimal.replace("\\x", "")).decode("latin-1")


@contextmanager
def traced(folder: Path, *command: str, stock: int, workers: int) -> Iterator[tuple[Service, Path]]:
    """The service with all its processes under strace; its trace is complete after the `with`."""
    need(shutil.which("strace"), "strace is not installed (apt-get install strace)")
    trace = folder / "trace"
    options = (
        "-D",
        "-f",
        "--seccomp-bpf",
        "-y",
        "-xx",
        "-s",
        "65536",
        "-e",
        f"trace={TRACED}",
        "-o",
        str(trace),
    )
    with Service(
        folder, "strace", *options, *command, INITIAL_STOCK=str(stock), WEB_CONCURRENCY=str(workers)
    ) as service:
        yield service, trace
    end = re.compile(rf"^{service.process.pid} +\+\+\+ exited", re.MULTILINE)
    wait_until(
        lambda: end.search(trace.read_text()[-2000:]), TRACE_LIMIT_S, "the trace is not complete"
    )


def calls(trace: Path) -> Iterator[Call]:
    """Yield the begin and end of each call, in the order in which strace saw them.

    strace stops the caller at both.
    """
    begun: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            pid, _, text = line.rstrip("\n").partition(" ")
            text = text.strip()
            if resumed := RESUMED.match(text):
                yield from _call(pid, begun.pop(pid) + text[resumed.end() :], ended=True)
            elif text.endswith("<unfinished ...>"):
                begun[pid] = text.removesuffix("<unfinished ...>")
                yield from _call(pid, begun[pid], ended=False)
            else:
                yield from _call(pid, text, ended=False)
                yield from _call(pid, text, ended=True)


def _call(pid: str, text: str, ended: bool) -> Iterator[Call]:
    if found := CALL.match(text):
        yield Call(pid, found[1], found[2], ended)


def steps(trace: Path) -> Iterator[str]:
    """What a purchase is made of, in the words of its promise."""
    for call in calls(trace):
        if call.name == "pwrite64" and call.path.endswith("-wal") and call.ended:
            yield "write"
        elif (
            call.name == "fcntl"
            and call.path.endswith("-shm")
            and call.ended
            and WRITE_LOCK in call.text
        ):
            yield "unlock" if "F_UNLCK" in call.text else "lock"
        elif call.name in ("fdatasync", "fsync") and call.path.endswith("-wal") and call.succeeded:
            yield "flush"
        elif call.name == "sendto" and not call.ended and '"HTTP/1.1 ' in call.plain:
            yield "answer"


def steps_by_answer(trace: Path) -> list[list[str]]:
    """Return the steps up to each answer; a step that is repeated at once is told once.

    A write for each page is such a step.
    """
    answers: list[list[str]] = [[]]
    for step in steps(trace):
        if step not in answers[-1][-1:]:
            answers[-1].append(step)
        if step == "answer":
            answers.append([])
    return answers[:-1]


def test_a_sale_is_written_then_unlocked_then_flushed_then_answered(tmp_path: Path) -> None:
    with traced(tmp_path, *patched(""), stock=2, workers=1) as (service, trace):
        service.buy("alice", "key-1")  # opens what stays open
        assert service.buy("alice", "key-2").status_code == 200
        assert service.buy("alice", "key-2").headers["Idempotent-Replayed"] == "true"
        assert [service.buy("bob").status_code for _ in range(2)] == [410, 410]
    sale, replay, first_sold_out, sold_out = steps_by_answer(trace)[-4:]
    assert sale == ["lock", "write", "unlock", "flush", "answer"]
    assert replay == ["flush", "answer"]
    assert first_sold_out == ["flush", "answer"]
    assert sold_out == ["answer"]


class File:
    """What programs see, and what would be there after a power cut."""

    def __init__(self) -> None:
        self.changes: list[
            tuple[int, bytes | None]
        ] = []  # not flushed yet: (offset, data) or (size, None)
        self.forgotten = 0  # changes that were flushed
        self.flushed = bytearray()

    @property
    def version(self) -> int:
        return self.forgotten + len(self.changes)

    def flush(self, version: int) -> None:
        """Everything up to `version`; a flush that began earlier and ends later undoes nothing."""
        done, self.changes = (
            self.changes[: version - self.forgotten],
            self.changes[version - self.forgotten :],
        )
        self.forgotten += len(done)
        for change in done:
            _apply(self.flushed, *change)

    def after_power_cut(self, luck: random.Random) -> bytes:
        """Return the flushed content, and of the rest what the disk happened to have written."""
        content = bytearray(self.flushed)
        for change in self.changes:
            if luck.random() < 0.5:
                _apply(content, *change)
        return bytes(content)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
    else:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


class Disk:
    """The database and its WAL are rebuilt from a trace: their content and their names."""

    def __init__(self, database: Path) -> None:
        self.folder = str(database.parent)
        self.names = (str(database), f"{database}-wal")
        self.files: dict[str, File] = {}
        self.flushed_files: dict[str, File] = {}  # those whose name would be found again
        self.flushes: dict[str, tuple[File, int]] = {}

    def see(self, call: Call) -> None:
        if call.name in ("fdatasync", "fsync"):
            self._see_flush(call)
        elif call.succeeded and call.name in ("openat", "unlink"):
            self._see_name(call)
        elif call.succeeded and call.path in self.files:
            self._see_change(self.files[call.path], call)

    def _see_flush(self, call: Call) -> None:
        if call.path == self.folder and call.succeeded:
            self.flushed_files = dict(self.files)
        if call.path not in self.files:
            return
        if not call.ended:
            self.flushes[call.pid] = self.files[call.path], self.files[call.path].version
        elif call.succeeded:
            file, version = self.flushes[call.pid]
            file.flush(version)

    def _see_name(self, call: Call) -> None:
        name = next((name for name in self.names if f'"{name}"' in call.plain), None)
        if name and call.name == "unlink":
            self.files.pop(name, None)
        elif name and "O_CREAT" in call.text:
            self.files.setdefault(name, File())

    def _see_change(self, file: File, call: Call) -> None:
        if call.name == "pwrite64":
            found = WRITE.search(call.text)
            assert found, call.text[-100:]
            data = bytes.fromhex(found[1].replace("\\x", ""))
            assert len(data) == int(found[2]), "the trace cut the data off"
            file.changes.append((int(found[3]), data))
        elif call.name == "ftruncate":
            file.changes.append((int(call.text.split(", ")[1].split(")")[0]), None))

    def save_after_power_cut(self, folder: Path, luck: random.Random) -> Path:
        for path in folder.iterdir():
            path.unlink()
        for name, file in self.flushed_files.items():
            (folder / Path(name).name).write_bytes(file.after_power_cut(luck))
        return folder / Path(self.names[0]).name


# The last sale comes when all others are flushed, and is flushed when many had their 410.
SLOW_LAST_SALE = """
import time
sell_one, sell = db._sell_one, db.SQLiteStore._sell
def sell_slowly(connection, *arguments):
    time.sleep(0.3 if connection.execute(db.FIND_STOCK).fetchone() == (1,) else 0)
    return sell_one(connection, *arguments)
def flush_late(*arguments):
    purchase = sell(*arguments)
    time.sleep(0.5 if purchase.remaining_stock == 0 else 0)
    return purchase
db._sell_one, db.SQLiteStore._sell = sell_slowly, flush_late"""


def sell_under_trace(folder: Path, change: str, sales: int = 150, refusals: int = 30) -> Path:
    """Three workers sell out concurrently, a checkpoint every 20 sales, and refuse the rest."""
    # strace slows everything down: a checkpoint gets the time it needs to happen.
    command = patched(
        "import db, sqlite.wal; db.CHECKPOINT_EVERY = 20; sqlite.wal.CHECKPOINT_PATIENCE_S = 10\n"
        f"{SLOW_LAST_SALE}\n{change}"
    )
    with traced(folder, *command, stock=sales, workers=3) as (service, trace):
        crowd = [purchase_request("alice", f"key-{n}") for n in range(sales + refusals)]
        answers = send_at_once(service.port, crowd)
        assert Counter(answer.status for answer in answers) == {200: sales, 410: refusals}
    return trace


def damage_by_power_cut(trace: Path, database: Path, sales: int = 150) -> list[str]:
    """What a power cut at any one of the answers would have cost; empty as promised."""
    disk, luck, acknowledged, sold_out = Disk(database), random.Random(1), set(), False
    crashed = database.parent / "after-power-cut"
    crashed.mkdir()
    damage: list[str] = []
    for call in calls(trace):
        disk.see(call)
        told = TOLD.search(call.plain) if call.name == "sendto" and not call.ended else None
        if not told:
            continue
        if told[1]:
            acknowledged.add(int(told[1]))
        sold_out = sold_out or not told[1]
        after = disk.save_after_power_cut(crashed, luck)
        damage += damage_in(after, acknowledged, sales, sold_out)
    assert (len(acknowledged), sold_out) == (sales, True)
    return damage


def damage_in(
    database: Path, acknowledged: set[int], initial_stock: int, sold_out: bool
) -> Iterator[str]:
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            stored = {row[0] for row in connection.execute("SELECT purchase_id FROM purchases")}
            stock = connection.execute("SELECT stock FROM inventory").fetchone()[0]
            integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.Error as error:
        yield f"unusable: {error}"
        return
    if acknowledged - stored:
        yield f"lost: {acknowledged - stored}"
    if sold_out and stock:
        yield f"a 410 was told, and {stock} units are left"
    if stock + len(stored) != initial_stock or integrity != "ok":
        yield f"inconsistent: stock {stock}, {len(stored)} purchases, {integrity}"


def test_no_power_cut_takes_back_what_a_buyer_was_told(tmp_path: Path) -> None:
    trace = sell_under_trace(tmp_path, "")
    writes = [
        WRITE.search(call.text)
        for call in calls(trace)
        if call.ended and call.name == "pwrite64" and call.path.endswith("-wal")
    ]
    headers = [write for write in writes if write and write.group(2, 3) == ("32", "0")]
    assert len(headers) > 4  # two of create()'s WAL and the workers'; the others follow checkpoints
    assert damage_by_power_cut(trace, tmp_path / "inventory.db") == []


@pytest.mark.parametrize(
    "sabotage",
    [
        "import sqlite.wal; sqlite.wal.WalDatabase.flush = lambda self, reader: None",
        "sqlite.wal.WalDatabase.confirm = lambda self, reader: None",
        "db.SET_SYNCHRONOUS = sqlite.wal.SET_SYNCHRONOUS = 'PRAGMA synchronous = OFF'",
    ],
    ids=["before the 200", "before the 410", "by a checkpoint"],
)
def test_the_simulated_power_cut_notices_a_missing_flush(tmp_path: Path, sabotage: str) -> None:
    trace = sell_under_trace(tmp_path, sabotage)
    assert damage_by_power_cut(trace, tmp_path / "inventory.db")


@contextmanager
def failing(service: Service, path: Path, inject: str) -> Iterator[None]:
    """The one worker's calls on `path` fail, in the kernel's name, as `inject` says."""
    need(shutil.which("strace"), "strace is not installed (apt-get install strace)")
    command = (
        "strace",
        "-f",
        "-p",
        str(service.workers()[0]),
        "-P",
        str(path),
        "-e",
        f"inject={inject}",
    )
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as strace:
        assert strace.stderr is not None
        assert "attached" in strace.stderr.readline()
        rest = threading.Thread(target=strace.stderr.read)
        rest.start()
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            rest.join(TRACE_LIMIT_S)


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, WEB_CONCURRENCY="1", INITIAL_STOCK="10") as service:
        service.buy("alice", "key-1")
        yield service


def test_a_commit_that_cannot_be_written_sells_nothing(one_worker: Service, tmp_path: Path) -> None:
    with failing(one_worker, tmp_path / "inventory.db-wal", "pwrite64:error=EIO:when=1+"):
        answer = one_worker.buy("alice", "key-2")
        assert (answer.status_code, "this attempt sold nothing" in answer.text) == (503, True)
    assert "disk I/O error" in one_worker.log
    assert one_worker.get("/audit")["purchase_records"] == 1
    assert one_worker.buy("alice", "key-2").headers.get("Idempotent-Replayed") is None
    assert one_worker.get("/audit")["purchase_records"] == 2


def test_a_sale_whose_flush_would_miss_a_replaced_database_is_refused(
    open_store: OpenStore, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlite.wal.REPLACED_CHECK_S", 3600)
    store = open_store(stock=5)
    store.buy("alice")
    for suffix in ("", "-wal", "-shm"):
        os.rename(f"{database}{suffix}", tmp_path / f"old{suffix}")
    open_store(stock=3).buy("carol")
    with pytest.raises(db.Unavailable, match="the database was moved or replaced"):
        store.buy("bob")
    flushed = []
    monkeypatch.setattr(
        os, "fdatasync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    assert store.buy("bob").remaining_stock == 1
    assert flushed == [f"{database}-wal"]


def test_checkpoints_keep_the_wal_small_and_hold_nobody_up(tmp_path: Path) -> None:
    """A checkpoint comes every 20 sales instead of 500, so 64 MB become 2.56.

    Two of three rounds may be disturbed by others.
    """
    command = patched("import db; db.CHECKPOINT_EVERY = 20")
    wal, slowest, sizes = tmp_path / "inventory.db-wal", [], []
    with Service(tmp_path, *command, INITIAL_STOCK="3000") as service:
        service.buy()
        for _ in range(3):
            waits: list[float] = []
            buyers = [threading.Thread(target=buy_often, args=(service, waits)) for _ in range(4)]
            for buyer in buyers:
                buyer.start()
            while any(buyer.is_alive() for buyer in buyers):
                sizes.append(wal.stat().st_size)
                buyers[0].join(0.02)
            assert len(waits) == 400
            slowest.append(max(waits))
        assert service.get("/audit")["purchase_records"] == 1201
    assert max(sizes) < 64_000_000 * 20 / 500
    assert min(slowest) < 0.25


def buy_often(service: Service, waits: list[float]) -> None:
    for _ in range(100):
        started = time.monotonic()
        assert service.buy().status_code == 200
        waits.append(time.monotonic() - started)
