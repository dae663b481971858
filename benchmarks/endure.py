"""Everything that goes wrong in a day, at random, while buyers buy: is each unit sold once?

    python benchmarks/endure.py [--seconds 60] [--seed 1] [--postgresql URL]

Sale after sale, workers and masters are killed, stopped, restarted and upgraded. Others hold the
lock, checkpoint and copy the database, buyers hang up. Between the sales the stock is refilled, by
a reset or beside the service. The proof's checker judges what every buyer of a sale was told.

The exit status is 1 after a violation, and 2 where the sale could not be judged. In both cases the
history is then in a file. A seed gives the same faults in the same order, not the same moments.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # launcher
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import requests
from service import PROJECT, Service, free_port, parse_answer, purchase_request

from proof.checker import check
from proof.history import BUSY, KEY_REUSED, LOST, SOLD, SOLD_OUT, Attempt, Audit, Reading

WORKERS, BUYERS = 3, 10
STOCK = 1_200  # units of each sale: thousands of sales in a minute or two
ANSWER_LIMIT_S = 20.0
ASK_LIMIT_S = 60.0  # for what is asked between the sales, again where it isn't answered
SALE_LIMIT_S = 120.0
EFFECT_LIMIT_S = 60.0  # after the time is up, until each fault has had an effect
CATCH_LIMIT_S = 2.0  # for stopping a worker that holds the lock
LOCK_TIMEOUT_S = 1.0
HUNG_UP = "hung up"
ORPHANS_S = 0.5  # for requests whose buyers have gone
HANGS_UP, HAS_KEY = 0.02, 0.5  # shares of the buyers
RESTOCKED = 0.5  # share of the sales that go on where the last one ended, without a reset
FAULT_PAUSE_S = (0.05, 0.8)
WRITE_LOCK = "120"  # its byte in the -shm file (sqlite.org/walformat.html, "WAL locks")
LOG_LINES = 200  # kept with the history
VIOLATIONS = 20  # shown

# Run by another process: one must not open a file with two copies of SQLite.
HOLD_LOCK = """
import sys, time; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
c.execute("BEGIN IMMEDIATE"); time.sleep(float(sys.argv[2])); c.execute("ROLLBACK"); c.close()
print("held")
"""
CHECKPOINT = """
import sys; from sqlite.engine import sqlite3
lock, c = (sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5) for _ in range(2))
lock.execute("BEGIN IMMEDIATE")
busy, frames, copied = c.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
lock.execute("ROLLBACK"); lock.close(); c.close()
print(copied if not busy else "")
"""
COPY = """
import json, sys; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], timeout=5); c.execute("VACUUM INTO ?", (sys.argv[2],)); c.close()
c = sqlite3.connect(sys.argv[2])
state, = c.execute("PRAGMA integrity_check").fetchone()
query = "SELECT initial_stock - stock, (SELECT count(*) FROM purchases) FROM inventory"
print(json.dumps([state, *c.execute(query).fetchone()])); c.close()
"""
RESTOCK = "UPDATE inventory SET stock = stock + {0}, initial_stock = initial_stock + {0}"
RESTOCK_SQLITE = """
import sys; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
print(c.execute(sys.argv[2]).rowcount); c.close()
"""
RESTOCK_POSTGRESQL = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as c:
    print(c.execute(sys.argv[2]).rowcount)
"""
HOLD_ROW = """
import sys, time, psycopg
with psycopg.connect(sys.argv[1]) as c:
    c.execute("SELECT * FROM inventory FOR UPDATE"); time.sleep(float(sys.argv[2]))
print("held")
"""
CUT_CONNECTIONS = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as c:
    cut = c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
              " WHERE datname = current_database() AND pid <> pg_backend_pid() LIMIT 2")
    print("cut" if (True,) in cut.fetchall() else "")
"""
SNAPSHOT = """
import json, sys, psycopg
with psycopg.connect(sys.argv[1]) as c:
    c.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    sold, = c.execute("SELECT initial_stock - stock FROM inventory").fetchone()
    records, = c.execute("SELECT count(*) FROM purchases").fetchone()
print(json.dumps(["ok", sold, records]))
"""


class ViolationError(Exception):
    """A promise was broken: one line for each."""


class Shop:
    """The service, through all that is done to it: always on the same port and database."""

    def __init__(self, folder: Path, postgresql: str) -> None:
        self.folder, self.port = folder, free_port()
        self.database, self.postgresql = str(folder / "inventory.db"), postgresql
        self.variables = {
            "PORT": str(self.port),
            "DATABASE_URL": postgresql or f"sqlite:///{self.database}",
            "WEB_CONCURRENCY": str(WORKERS),
            "INITIAL_STOCK": str(STOCK),
            "LOCK_TIMEOUT": str(LOCK_TIMEOUT_S),
        }
        self.started: list[Service] = []
        self.master = 0
        self.records = 0  # purchases of earlier sales that are still there

    def start(self) -> None:
        gunicorn = str(Path(sys.executable).with_name("gunicorn"))
        service = Service(self.folder, gunicorn, "app:app", **self.variables)
        self.started.append(service)
        service.__enter__()  # perhaps it is a killed master's last worker that answers
        self.master = service.process.pid
        wait_for(self.workers, 60)  # a master that is still loading ends by any signal

    def workers(self) -> list[int]:
        """The master's children but for the process that serves the metrics."""
        return [pid for pid in children_of(self.master) if name_of(pid) == name_of(self.master)]

    def end_master(self, number: int) -> None:
        """With SIGKILL its workers end by themselves."""
        with suppress(ProcessLookupError):
            os.kill(self.master, number)
        for service in self.started:  # an upgrade's master is nobody's child here
            if service.process.pid == self.master:
                service.process.wait(60)
        wait_for(lambda: not Path(f"/proc/{self.master}").exists(), 60)

    def upgrade(self) -> None:
        """A second master, and then the first one's end."""
        deadline = time.monotonic() + 60
        while not self.successors() and time.monotonic() < deadline:
            os.kill(self.master, signal.SIGUSR2)  # ignored for a second after the last upgrade
            with suppress(TimeoutError):
                wait_for(self.successors, 3)
        if not (found := self.successors()):
            raise TimeoutError("no second master came up")
        (successor,) = found
        wait_for(lambda: len(children_of(successor)) >= WORKERS, 30)
        self.end_master(signal.SIGTERM)
        self.master = successor

    def successors(self) -> list[int]:
        return [pid for pid in children_of(self.master) if is_master(pid)]

    def close(self) -> None:
        for service in self.started:
            with suppress(ProcessLookupError):
                os.killpg(service.process.pid, signal.SIGKILL)
            service.process.wait(10)

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}{path}", timeout=ANSWER_LIMIT_S)

    def insist(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """A killed master's queue is reset, and a connection to PostgreSQL was perhaps cut."""
        url, deadline = f"http://127.0.0.1:{self.port}{path}", time.monotonic() + ASK_LIMIT_S
        told: object = "nothing"
        while time.monotonic() < deadline:
            try:
                answer = requests.request(method, url, timeout=ANSWER_LIMIT_S, **options)
                if answer.status_code == 200:
                    return dict(answer.json())
                told = answer.status_code
            except requests.RequestException as error:
                told = type(error).__name__
            time.sleep(0.05)
        raise TimeoutError(f"{method} {path} was answered by {told} for {ASK_LIMIT_S:.0f} s")

    def restock(self) -> None:
        """By a program beside the service: what was sold stays on record."""
        place = self.postgresql or self.database
        script = RESTOCK_POSTGRESQL if self.postgresql else RESTOCK_SQLITE
        if others(script, place, RESTOCK.format(STOCK)) != "1":
            raise RuntimeError("the stock could not be refilled beside the service")

    def reset(self) -> None:
        self.insist("POST", "/reset", json={"stock": STOCK})
        self.records = 0


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def state_of(pid: int) -> str:
    """As in proc(5): "T" is stopped; "Z", too, where there is no such process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def is_master(pid: int) -> bool:
    """An upgrade's master has been started anew; a worker is a mere fork."""
    with suppress(OSError):
        return b"GUNICORN_PID=" in Path(f"/proc/{pid}/environ").read_bytes() and bool(
            children_of(pid)
        )
    return False


def wait_for(condition: Callable[[], object], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the service did not do as it was told")
        time.sleep(0.02)


# ---- What goes wrong


def others(script: str, *arguments: str) -> str:
    """By a program beside the service: what it prints; nothing where the lock was not to be had."""
    return beside([sys.executable, "-c", script, *arguments])


def beside(command: list[str]) -> str:
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    if "malformed" in done.stderr:
        raise ViolationError(done.stderr.strip().splitlines()[-1])
    if done.returncode and "locked" not in done.stderr:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def kill_worker(shop: Shop, chance: random.Random) -> bool:
    if workers := shop.workers():
        with suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)
            return True
    return False


@contextmanager
def stopped(pid: int) -> Iterator[bool]:
    """Whether it stands still: it may have ended before."""
    try:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        with suppress(TimeoutError):
            wait_for(lambda: state_of(pid) in "TZ", 1)
        yield state_of(pid) == "T"
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def stop_worker(shop: Shop, chance: random.Random) -> bool:
    """At any moment: mostly it waits for a buyer, or for the lock."""
    if workers := shop.workers():
        with stopped(chance.choice(workers)) as stands:
            time.sleep(chance.uniform(0.1, 2 * LOCK_TIMEOUT_S) if stands else 0)
            return stands
    return False


def stop_with_lock(shop: Shop, chance: random.Random) -> bool:
    """Only SQLite's lock is the worker's own: PostgreSQL frees the row without it."""
    deadline = time.monotonic() + CATCH_LIMIT_S
    while time.monotonic() < deadline:
        for worker in shop.workers():
            with stopped(worker) as stands:
                if stands and holds_lock(worker, shop.database):
                    time.sleep(chance.uniform(0.1, 2 * LOCK_TIMEOUT_S))
                    return True
            time.sleep(chance.uniform(0, 0.005))
    return False


def holds_lock(pid: int, database: str) -> bool:
    """Whether that process has SQLite's write lock: one line of /proc/locks for each lock."""
    inode = os.stat(f"{database}-shm").st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        *_, kind, holder, file, first, _ = line.split()
        if (kind, holder, first) == ("WRITE", str(pid), WRITE_LOCK) and file.endswith(f":{inode}"):
            return True
    return False


def kill_master(shop: Shop, chance: random.Random) -> bool:
    shop.end_master(signal.SIGKILL)
    shop.start()
    return True


def restart(shop: Shop, chance: random.Random) -> bool:
    shop.end_master(signal.SIGTERM)
    shop.start()
    return True


def reload(shop: Shop, chance: random.Random) -> bool:
    before = set(shop.workers())
    os.kill(shop.master, signal.SIGHUP)
    wait_for(lambda: set(shop.workers()) - before, 30)
    return True


def upgrade(shop: Shop, chance: random.Random) -> bool:
    shop.upgrade()
    return True


def check_health(shop: Shop, chance: random.Random) -> bool:
    """It writes, and checkpoints."""
    with suppress(requests.RequestException):
        return shop.get("/health").status_code == 200
    return False


def hold_lock(shop: Shop, chance: random.Random) -> bool:
    return bool(others(HOLD_LOCK, shop.database, str(chance.uniform(0.1, 1.5 * LOCK_TIMEOUT_S))))


def checkpoint(shop: Shop, chance: random.Random) -> bool:
    """As the service does it: under the write lock, by a second connection."""
    return int(others(CHECKPOINT, shop.database) or 0) > 0


def copy(shop: Shop, chance: random.Random) -> bool:
    target = shop.folder / f"copy-{time.monotonic_ns()}.db"
    told = others(COPY, shop.database, str(target))
    target.unlink(missing_ok=True)
    return bool(told) and is_consistent("a copy", *json.loads(told))


def is_consistent(backup: str, state: str, sold: int, records: int) -> bool:
    if state != "ok" or sold != records:
        raise ViolationError(f"{backup} is {state}, with {sold} units sold and {records} records")
    return True


def hold_row(shop: Shop, chance: random.Random) -> bool:
    url = shop.variables["DATABASE_URL"]
    return bool(others(HOLD_ROW, url, str(chance.uniform(0.1, 1.5 * LOCK_TIMEOUT_S))))


def cut_connections(shop: Shop, chance: random.Random) -> bool:
    return bool(others(CUT_CONNECTIONS, shop.variables["DATABASE_URL"]))


def snapshot(shop: Shop, chance: random.Random) -> bool:
    told = others(SNAPSHOT, shop.variables["DATABASE_URL"])
    return is_consistent("a snapshot", *json.loads(told))


def dump(shop: Shop, chance: random.Random) -> bool:
    lines = beside(["pg_dump", shop.variables["DATABASE_URL"]])
    names, row = re.findall(r"^COPY \S+\.inventory \((.*)\) FROM stdin;\n(.*)$", lines, re.M)[0]
    inventory = dict(zip(names.split(", "), row.split("\t"), strict=True))
    sold = int(inventory["initial_stock"]) - int(inventory["stock"])
    (records,) = re.findall(r"^COPY \S+\.purchases .*;\n((?:.*\n)*?)\\\.$", lines, re.M)
    return is_consistent("a dump", "ok", sold, records.count("\n"))


Fault = Callable[[Shop, random.Random], bool]  # whether it had an effect
ANYWHERE: list[Fault] = [
    *(kill_worker, kill_worker, stop_worker, kill_master),
    *(restart, reload, upgrade, check_health),
]
ON_SQLITE: list[Fault] = [*ANYWHERE, stop_with_lock, hold_lock, checkpoint, copy]
ON_POSTGRESQL: list[Fault] = [*ANYWHERE, hold_row, cut_connections, snapshot]
if shutil.which("pg_dump"):
    ON_POSTGRESQL.append(dump)


def in_rounds(faults: list[Fault], seed: int) -> Iterator[Fault]:
    """Each once, in a random order, again and again."""
    chance = random.Random(seed)  # noqa: S311
    while True:
        yield from chance.sample(faults, len(faults))


# ---- A sale


class Sale:
    """Buyers and a reader write down what they were told, until all is sold."""

    def __init__(self, shop: Shop, number: int, seed: int) -> None:
        self.shop, self.name, self.seed = shop, f"s{number}", seed * 10_000 + number
        self.before = shop.records
        self.numbers = itertools.count(1)
        self.attempts: list[Attempt] = []
        self.readings: list[Reading] = []
        self.effects = Counter[str]()
        self.over = threading.Event()
        self.deadline = time.monotonic() + SALE_LIMIT_S

    def run(self, faults: Iterator[Fault]) -> None:
        """Raises ViolationError."""
        with ThreadPoolExecutor(BUYERS + 1) as pool:
            buyers = [pool.submit(self.buy, place) for place in range(BUYERS)]
            reader = pool.submit(self.read)
            chance = random.Random(self.seed)  # noqa: S311
            try:
                while wait(buyers, chance.uniform(*FAULT_PAUSE_S)).not_done:
                    fault = next(faults)
                    self.effects[fault.__name__] += fault(self.shop, chance)
            finally:
                self.over.set()
        for job in (*buyers, reader):
            job.result()
        self.judge()

    def goes_on(self) -> bool:
        return not self.over.is_set() and time.monotonic() < self.deadline

    def buy(self, place: int) -> None:
        chance = random.Random(self.seed + place + 1)  # noqa: S311
        while self.goes_on():
            customer = f"{self.name}-{next(self.numbers)}"
            key = f"key-{customer}" if chance.random() < HAS_KEY else None
            while self.goes_on():
                status = self.attempt(place, customer, key, chance.random() < HANGS_UP)
                if status == SOLD_OUT:
                    return
                if not key or status in (SOLD, KEY_REUSED):
                    break
        raise TimeoutError(f"not sold out within {SALE_LIMIT_S:.0f} s")

    def attempt(self, place: int, customer: str, key: str | None, hangs_up: bool) -> int:
        try:
            client = socket.create_connection(("127.0.0.1", self.shop.port), ANSWER_LIMIT_S)
        except OSError:  # nothing was sent
            time.sleep(0.05)
            return BUSY
        start, answer = time.monotonic(), parse_answer(b"")
        with client, suppress(OSError):
            client.sendall(purchase_request(customer, key))
            if not hangs_up:
                answer = parse_answer(b"".join(iter(lambda: client.recv(65536), b"")))
        status, end = answer.status if answer.status != 500 else LOST, time.monotonic()
        body = answer.json if answer.status else {}
        told = (body.get("remaining_stock"), body.get("purchase_id"))
        note = HUNG_UP if hangs_up else ""
        self.attempts.append(Attempt(place, 0, customer, key, start, end, status, *told, note))
        return status

    def read(self) -> None:
        while not self.over.wait(0.1):
            start = time.monotonic()
            with suppress(requests.RequestException):
                answer = self.shop.get("/inventory")
                if answer.status_code == 200:
                    now = answer.json()
                    initial, sold = (now[name] for name in ("initial_stock", "total_purchases"))
                    figures = (now["current_stock"], initial - self.before, sold - self.before)
                    self.readings.append(Reading(start, time.monotonic(), *figures))

    def judge(self) -> None:
        """This sale alone: what earlier ones left on record is taken off all figures."""
        time.sleep(ORPHANS_S)  # a buyer's request may be under way whose answer nobody waits for
        start = time.monotonic()
        now = self.shop.insist("GET", "/audit")
        self.shop.records = now["purchase_records"]
        figures = now["current_stock"], self.shop.records - self.before
        told = now["initial_stock"] - self.before, now["consistent"]
        audit = Audit(start, time.monotonic(), *figures, *told)
        if violations := check(STOCK, self.attempts, self.readings, audit):
            lines = [f"{one.kind.value}: {one.message}" for one in violations]
            raise ViolationError("\n".join(lines[:VIOLATIONS]))


class Endurance:
    """One sale after another, until the time is up and each fault has had an effect."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.shop, self.seed = Shop(folder, options.postgresql), options.seed
        self.faults = ON_POSTGRESQL if options.postgresql else ON_SQLITE
        self.rounds = in_rounds(self.faults, self.seed)
        self.chance = random.Random(self.seed)  # noqa: S311
        self.end = time.monotonic() + options.seconds
        self.sales = self.restocked = 0
        self.current: Sale | None = None
        self.answers, self.effects = Counter[int](), Counter[str]()

    def run(self) -> None:
        """Raises ViolationError, and others where a sale can't be judged."""
        self.shop.start()
        while not self.sales or self.goes_on():
            self.refill()
            self.sales += 1
            self.current = Sale(self.shop, self.sales, self.seed)
            self.current.run(self.rounds)
            self.answers += Counter(attempt.status for attempt in self.current.attempts)
            self.effects += self.current.effects
            self.effects["hang_up"] += sum(a.note == HUNG_UP for a in self.current.attempts)

    def goes_on(self) -> bool:
        late_s = time.monotonic() - self.end
        return late_s < 0 or (bool(self.without_effect()) and late_s < EFFECT_LIMIT_S)

    def without_effect(self) -> set[str]:
        return {fault.__name__ for fault in self.faults} - {*+self.effects}

    def refill(self) -> None:
        """The first sale begins with a reset, in a database that may have seen another."""
        if self.sales and self.chance.random() < RESTOCKED:
            self.shop.restock()
            self.restocked += 1
        else:
            self.shop.reset()

    def tell(self) -> None:
        kinds = f"{self.restocked} of them restocked beside the service"
        print(f"{self.sales} sales of {STOCK} units, {kinds}")
        print(f"{self.answers[SOLD]:,} times 200, {self.answers[LOST]} unanswered")
        print(", ".join(f"{name} {times}" for name, times in sorted(self.effects.items())))
        if missing := self.without_effect():
            print(f"without effect: {', '.join(sorted(missing))}")
        print("no violation")

    def keep_history(self) -> Path:
        """Of the last sale, with what the service logged."""
        history = Path(tempfile.gettempdir()) / f"endure-{self.seed}-s{self.sales}.json"
        sale, logs = self.current, [service.log for service in self.shop.started[-1:]]
        lines = [line for log in logs for line in log.splitlines()[-LOG_LINES:]]
        told = [sale.attempts, sale.readings] if sale else []
        history.write_text(json.dumps([*told, lines]))
        return history


def endure(options: argparse.Namespace, folder: Path) -> int:
    run = Endurance(options, folder)
    try:
        run.run()
    except ViolationError as error:
        print(f"seed {run.seed}, sale {run.sales}, history in {run.keep_history()}\n{error}")
        return 1
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        print(f"could not be judged: {why} (seed {run.seed}, history in {run.keep_history()})")
        return 2
    finally:
        run.shop.close()
    run.tell()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="at least (%(default)s)")
    add("--seed", type=int, default=1, help="of the faults and the buyers (%(default)s)")
    add("--postgresql", metavar="URL", default="", help="there instead; it is emptied")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return endure(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
