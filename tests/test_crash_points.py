"""A fault at each write and flush of a sale in turn: a fresh start finds what buyers were told.

The sale runs without HTTP: three keyed sales with a checkpoint between, refusals, a health check.
kill -9 leaves what the kernel has; what a power cut leaves is test_durability's.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from service import PROJECT, need

import db
from sqlite.engine import sqlite3

SYSCALLS = ("pwrite64", "ftruncate", "fdatasync", "fsync")
FAULTS = ("signal=SIGKILL", "error=EIO", "error=ENOSPC")
SALES, REFUSALS = 3, 2  # of each worker
RUN_LIMIT_S = 60
AT_ONCE = 2
SALE = f"""
import os, sys
from pathlib import Path
import db
db.CHECKPOINT_EVERY = 2
store = db.SQLiteStore(Path(sys.argv[1]), "Concert", 0, 5.0)
workers = int(sys.argv[2])
number = next((n for n in range(workers - 1) if os.fork() == 0), workers - 1)
for step in range({SALES + REFUSALS}):
    key = f"key-{{number}}-{{step}}"
    try:
        told = store.buy("alice", key).purchase_id
    except db.StoreError as error:
        told = type(error).__name__
    os.write(1, f"{{key}} {{told}}\\n".encode())
try:
    store.check()
except db.StoreError:
    pass
if number == workers - 1:
    while workers > 1:
        try:
            os.wait()
        except ChildProcessError:
            break
os._exit(0)
"""


class Fault(NamedTuple):
    syscall: str
    number: int  # the how-manieth such call of each process
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.syscall} {self.number}"


def prepared(folder: Path, workers: int) -> Path:
    """A database of its own, with as many units as the workers mean to sell."""
    folder.mkdir()
    store = db.SQLiteStore(folder / "inventory.db", "Concert", SALES * workers, 5.0)
    store.create()
    store.close()
    return folder / "inventory.db"


def run(database: Path, workers: int, *options: str) -> dict[str, str]:
    """What each key was told, under strace."""
    strace = ["strace", "-f", "--seccomp-bpf", "-o", str(database.with_name("trace")), "-e"]
    command = [*strace, f"trace={','.join(SYSCALLS)}", *options, sys.executable, "-c", SALE]
    done = subprocess.run(
        [*command, str(database), str(workers)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    return dict(line.split() for line in done.stdout.splitlines())


def calls_of_a_run(folder: Path, workers: int) -> Counter[str]:
    """How often the busiest process makes each call when nothing fails."""
    database = prepared(folder, workers)
    told = run(database, workers)
    assert Counter(told.values())["SoldOut"] == REFUSALS * workers
    assert list(damage(database, told, workers)) == []
    made: Counter[tuple[str, str]] = Counter()
    for line in database.with_name("trace").read_text().splitlines():
        if found := re.match(r"(\d+) +(\w+)\(", line):
            made[found[1], found[2]] += 1
    counted = {
        name: max((n for (_, call), n in made.items() if call == name), default=0)
        for name in SYSCALLS
    }
    assert counted["pwrite64"] > 10
    assert counted["fdatasync"] > 3
    return Counter(counted)


def damage(database: Path, told: dict[str, str], workers: int) -> Iterator[str]:
    """What a fresh process finds otherwise than it was told; empty as promised."""
    store = db.SQLiteStore(database, "Concert", 0, 5.0)
    store.create()
    with closing(sqlite3.connect(database)) as connection:
        (integrity,) = connection.execute("PRAGMA integrity_check").fetchone()
        found = dict(connection.execute("SELECT idempotency_key, purchase_id FROM purchases"))
    audit = store.audit()
    if integrity != "ok" or not audit.consistent or audit.purchase_records != len(found):
        yield f"{integrity}, {audit}"
    for key, answer in told.items():
        if answer.isdigit() and found.get(key) != int(answer):
            yield f"{key} was told {answer}, found is {found.get(key)}"
        elif answer in ("Unavailable", "RestartNeeded", "Busy", "SoldOut") and key in found:
            yield f"{key} was told {answer}, and has bought"
    if "SoldOut" in told.values() and audit.current_stock:
        yield f"somebody was told SoldOut, {audit.current_stock} are left"
    for number in range(audit.current_stock):
        store.buy("bob", f"late-{number}")
    if store.audit() != (SALES * workers, 0, SALES * workers):
        yield f"the rest could not be sold: {store.audit()}"
    store.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_at_any_write_or_flush_takes_back_nothing(tmp_path: Path, workers: int) -> None:
    need(shutil.which("strace"), "strace is not installed (apt-get install strace)")

    def damage_by(fault: Fault) -> tuple[Fault, set[str], list[str]]:
        database = prepared(tmp_path / str(fault), workers)
        injection = f"inject={fault.syscall}:{fault.kind}:when={fault.number}"
        told = run(database, workers, "-e", injection)
        return fault, set(told.values()), list(damage(database, told, workers))

    calls = calls_of_a_run(tmp_path / "as usual", workers)
    faults = [
        Fault(name, number, kind)
        for name, times in calls.items()
        for number in range(1, times + 1)
        for kind in FAULTS
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(damage_by, faults))
    assert [(str(fault), damages) for fault, _, damages in outcomes if damages] == []
    told = {answer for _, answers, _ in outcomes for answer in answers}
    assert {"OutcomeUnknown", "RestartNeeded", "Unavailable", "SoldOut"} <= told
