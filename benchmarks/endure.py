"""Everything that goes wrong in a day, at random, while buyers buy: is each unit sold once?

    python benchmarks/endure.py [--seconds 60] [--seed 1] [--postgresql URL]

Sale after sale, workers and masters are killed, stopped, restarted and upgraded. Others hold the
lock, checkpoint and copy the database, buyers hang up. Between the sales the stock is refilled. The
proof's checker judges what every buyer of a sale was told. The exit status is 1 after a violation,
whose history is then in a file. A seed gives the same faults, not the same moments.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # launcher
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import requests
from service import PROJECT, Service, free_port, parse_answer, purchase_request

from proof.checker import check
from proof.history import BUSY, KEY_REUSED, LOST, SOLD, SOLD_OUT, Attempt, Audit, Reading

WORKERS, BUYERS = 3, 10
STOCK = 1_200  # units of each sale: thousands of sales in a minute or two
ANSWER_LIMIT_S = 20.0
SALE_LIMIT_S = 120.0
LOCK_TIMEOUT_S = 1.0
HANGS_UP, HAS_KEY = 0.02, 0.5  # shares of the buyers
FAULT_PAUSE_S = (0.05, 0.8)
LOG_LINES = 60  # shown where the service didn't do as it was told

# Run by another process: one must not open a file with two copies of SQLite.
HOLD_LOCK = """
import sys, time; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
c.execute("BEGIN IMMEDIATE"); time.sleep(float(sys.argv[2])); c.execute("ROLLBACK"); c.close()
"""
COPY = """
import sys; from sqlite.engine import sqlite3
c = sqlite3.connect(sys.argv[1], timeout=5); c.execute("VACUUM INTO ?", (sys.argv[2],)); c.close()
c = sqlite3.connect(sys.argv[2])
assert c.execute("PRAGMA integrity_check").fetchone() == ("ok",)
query = "SELECT initial_stock - stock, (SELECT count(*) FROM purchases) FROM inventory"
sold, records = c.execute(query).fetchone(); assert sold == records, (sold, records); c.close()
"""
HOLD_ROW = """
import sys, time, psycopg
with psycopg.connect(sys.argv[1]) as c:
    c.execute("SELECT * FROM inventory FOR UPDATE"); time.sleep(float(sys.argv[2]))
"""
CUT_CONNECTIONS = """
import sys, psycopg
with psycopg.connect(sys.argv[1]) as c:
    c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
              " WHERE datname = current_database() AND pid <> pg_backend_pid() LIMIT 2")
"""


class Shop:
    """The service, through all that is done to it: always on the same port and database."""

    def __init__(self, folder: Path, postgresql: str) -> None:
        self.folder, self.port = folder, free_port()
        self.database = str(folder / "inventory.db")
        self.variables = {
            "PORT": str(self.port),
            "DATABASE_URL": postgresql or f"sqlite:///{self.database}",
            "WEB_CONCURRENCY": str(WORKERS),
            "INITIAL_STOCK": str(STOCK),
            "LOCK_TIMEOUT": str(LOCK_TIMEOUT_S),
        }
        self.started: list[Service] = []
        self.master = 0

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


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def name_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


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


def others(script: str, *arguments: str) -> None:
    """By a program beside the service."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    if done.returncode and "locked" not in done.stderr:
        raise RuntimeError(done.stderr[-500:])


def kill_worker(shop: Shop, chance: random.Random) -> None:
    if workers := shop.workers():
        with suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)


def stop_worker(shop: Shop, chance: random.Random) -> None:
    """It may hold the lock meanwhile."""
    if workers := shop.workers():
        worker = chance.choice(workers)
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 2 * LOCK_TIMEOUT_S))
            os.kill(worker, signal.SIGCONT)


def kill_master(shop: Shop, chance: random.Random) -> None:
    shop.end_master(signal.SIGKILL)
    shop.start()


def restart(shop: Shop, chance: random.Random) -> None:
    shop.end_master(signal.SIGTERM)
    shop.start()


def reload(shop: Shop, chance: random.Random) -> None:
    os.kill(shop.master, signal.SIGHUP)


def upgrade(shop: Shop, chance: random.Random) -> None:
    shop.upgrade()


def check_health(shop: Shop, chance: random.Random) -> None:
    """It writes, and checkpoints."""
    with suppress(requests.RequestException):
        shop.get("/health")


def hold_lock(shop: Shop, chance: random.Random) -> None:
    others(HOLD_LOCK, shop.database, str(chance.uniform(0.1, 1.5 * LOCK_TIMEOUT_S)))


def copy(shop: Shop, chance: random.Random) -> None:
    target = shop.folder / f"copy-{time.monotonic_ns()}.db"
    others(COPY, shop.database, str(target))
    target.unlink()


def hold_row(shop: Shop, chance: random.Random) -> None:
    url = shop.variables["DATABASE_URL"]
    others(HOLD_ROW, url, str(chance.uniform(0.1, 1.5 * LOCK_TIMEOUT_S)))


def cut_connections(shop: Shop, chance: random.Random) -> None:
    others(CUT_CONNECTIONS, shop.variables["DATABASE_URL"])


Fault = Callable[[Shop, random.Random], None]
ANYWHERE: list[Fault] = [
    *(kill_worker, kill_worker, stop_worker, kill_master),
    *(restart, reload, upgrade, check_health),
]
ON_SQLITE: list[Fault] = [*ANYWHERE, hold_lock, copy]
ON_POSTGRESQL: list[Fault] = [*ANYWHERE, hold_row, cut_connections]


# ---- A sale


class Sale:
    """Buyers and a reader write down what they were told, until all is sold."""

    def __init__(self, shop: Shop, number: int, seed: int) -> None:
        self.shop, self.name, self.seed = shop, f"s{number}", seed * 10_000 + number
        self.numbers = itertools.count(1)
        self.attempts: list[Attempt] = []
        self.readings: list[Reading] = []
        self.over = threading.Event()

    def run(self, faults: list[Fault]) -> tuple[Counter[str], list[str]]:
        """What was done to it, and the violations."""
        done = Counter[str]()
        chance = random.Random(self.seed)  # noqa: S311
        deadline = time.monotonic() + SALE_LIMIT_S
        with ThreadPoolExecutor(BUYERS + 1) as pool:
            buyers = [pool.submit(self.buy, place, deadline) for place in range(BUYERS)]
            reader = pool.submit(self.read)
            try:
                while not all(buyer.done() for buyer in buyers):
                    time.sleep(chance.uniform(*FAULT_PAUSE_S))
                    fault = chance.choice(faults)
                    fault(self.shop, chance)
                    done[fault.__name__] += 1
            finally:
                self.over.set()
        for job in (*buyers, reader):
            job.result()
        return done, self.judge()

    def buy(self, place: int, deadline: float) -> None:
        chance = random.Random(self.seed + place + 1)  # noqa: S311
        while time.monotonic() < deadline:
            customer = f"{self.name}-{next(self.numbers)}"
            key = f"key-{customer}" if chance.random() < HAS_KEY else None
            while time.monotonic() < deadline:
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
        self.attempts.append(Attempt(place, 0, customer, key, start, end, status, *told))
        return status

    def read(self) -> None:
        while not self.over.wait(0.1):
            start = time.monotonic()
            with suppress(requests.RequestException):
                answer = self.shop.get("/inventory")
                if answer.status_code == 200:
                    now = answer.json()
                    figures = (now["current_stock"], now["initial_stock"], now["total_purchases"])
                    self.readings.append(Reading(start, time.monotonic(), *figures))

    def judge(self) -> list[str]:
        time.sleep(ORPHANS_S)  # a buyer's request may be under way whose answer nobody waits for
        start = time.monotonic()
        now = self.shop.get("/audit").json()
        figures = ("current_stock", "purchase_records", "initial_stock", "consistent")
        audit = Audit(start, time.monotonic(), *(now[name] for name in figures))
        return [str(one) for one in check(STOCK, self.attempts, self.readings, audit)]


ORPHANS_S = 0.5


def endure(options: argparse.Namespace, folder: Path) -> int:
    shop = Shop(folder, options.postgresql)
    chosen = ON_POSTGRESQL if options.postgresql else ON_SQLITE
    total, sold, unclear, number = Counter[str](), 0, 0, 0
    end = time.monotonic() + options.seconds
    try:
        shop.start()
        while time.monotonic() < end or not number:
            number += 1
            reset = f"http://127.0.0.1:{shop.port}/reset"
            requests.post(reset, json={"stock": STOCK}, timeout=60).raise_for_status()
            sale = Sale(shop, number, options.seed)
            faults, violations = sale.run(chosen)
            total += faults
            sold += sum(a.status == SOLD for a in sale.attempts)
            unclear += sum(a.status == LOST for a in sale.attempts)
            if violations:
                return tell_violations(sale, violations, options.seed)
    except Exception:
        print(f"seed {options.seed}, sale {number}, the end of the service's log:")
        print("".join(shop.started[-1].log.splitlines(keepends=True)[-LOG_LINES:]))
        raise
    finally:
        shop.close()
    print(f"{number} sales of {STOCK} units: {sold:,} times 200, {unclear} unanswered")
    print(", ".join(f"{name} {times}" for name, times in sorted(total.items())))
    print("no violation")
    return 0


def tell_violations(sale: Sale, violations: list[str], seed: int) -> int:
    history = Path(tempfile.gettempdir()) / f"endure-{seed}-{sale.name}.json"
    history.write_text(json.dumps([sale.attempts, sale.readings]))
    print(f"seed {seed}, sale {sale.name}, history in {history}")
    print("\n".join(violations[:20]))
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=60.0, help="the last sale is finished (%(default)s)")
    add("--seed", type=int, default=1, help="of the faults and the buyers (%(default)s)")
    add("--postgresql", metavar="URL", default="", help="there instead; it is emptied")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        return endure(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
