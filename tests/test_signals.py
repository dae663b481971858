"""SIGTERM and SIGHUP in the middle of a rush: who has sent a request gets its answer."""

import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from service import Service, parse_answer, patched, purchase_request, send_at_once, wait_until
from test_sqlite_store import write_lock

from sqlite.engine import sqlite3

WAITING = 400


def backlog(port: int) -> int:
    """How many connections no worker has accepted yet."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
            return int(fields[4].split(":")[1], 16)
    return 0


def purchases(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "inventory.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM purchases").fetchone()[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_everybody_who_waits_in_the_backlog(tmp_path: Path, number: int) -> None:
    with Service(tmp_path, INITIAL_STOCK="1000", WEB_CONCURRENCY="2", LOCK_TIMEOUT="20") as service:
        answers = []
        crowd = [purchase_request("alice", f"key-{n}") for n in range(WAITING)]
        rush = threading.Thread(target=lambda: answers.extend(send_at_once(service.port, crowd)))
        with write_lock(tmp_path / "inventory.db"):
            rush.start()
            wait_until(lambda: backlog(service.port) == WAITING - 2, 10, "they don't wait")
            service.process.send_signal(number)
            wait_until(lambda: "Handling signal" in service.log, 10, "the signal wasn't handled")
        assert service.process.wait(30) == 0
        rush.join()
    assert Counter(
        (answer.status, answer.text if answer.status == 0 else "") for answer in answers
    ) == {(200, ""): WAITING}
    assert purchases(tmp_path) == WAITING


class Rush:
    """Buyers come one after another, each on a new connection, until nobody listens any more."""

    def __init__(self, port: int, number: int = 12) -> None:
        self.port = port
        self.over = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self.counting = threading.Lock()
        self.threads = [threading.Thread(target=self.buy) for _ in range(number)]

    def buy(self) -> None:
        while not self.over.is_set():
            outcome = self.buy_once()
            with self.counting:
                self.outcomes[outcome] += 1
            if outcome == "refused":
                return

    def buy_once(self) -> str:
        try:
            buyer = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        except ConnectionError:  # nothing was sent
            return "refused"
        with buyer:
            try:
                buyer.sendall(purchase_request("alice"))
                answer = parse_answer(b"".join(iter(lambda: buyer.recv(65536), b"")))
            except OSError as error:
                return f"lost: {error}"
            return f"{answer.status} {answer.text if answer.status == 0 else ''}".strip()

    def __enter__(self) -> "Rush":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)

    def wait_for(self, number: int) -> None:
        wait_until(
            lambda: self.outcomes["200"] >= number, 20, f"not {number} sales: {self.outcomes}"
        )


def test_sigterm_under_load_loses_no_request_that_was_sent(tmp_path: Path) -> None:
    with Service(tmp_path, INITIAL_STOCK="1000000") as service, Rush(service.port) as rush:
        rush.wait_for(100)
        assert service.stop(signal.SIGTERM) == 0
        wait_until(
            lambda: rush.outcomes["refused"] == len(rush.threads), 20, "somebody is still answered"
        )
    assert set(rush.outcomes) == {"200", "refused"}
    assert rush.outcomes["200"] == purchases(tmp_path)


def test_a_worker_stops_that_was_told_so_before_it_handled_signals(tmp_path: Path) -> None:
    deaf_at_first = (
        "import signal, time, gunicorn.workers.base as base\n"
        "init_signals = base.Worker.init_signals\n"
        "def late(worker):\n"
        "    if worker.age == 2:\n"
        "        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "        while signal.SIGTERM not in signal.sigpending():\n"
        "            time.sleep(0.01)\n"
        "        signal.sigwait([signal.SIGTERM])\n"
        "        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\n"
        "    init_signals(worker)\n"
        "base.Worker.init_signals = late"
    )
    with Service(tmp_path, *patched(deaf_at_first), WEB_CONCURRENCY="2") as service:
        wait_until(lambda: any(map(is_deaf, service.workers())), 20, "no worker is deaf")
        assert service.stop(signal.SIGTERM) == 0


def is_deaf(pid: int) -> bool:
    blocked = re.search(r"SigBlk:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert blocked is not None
    return bool(int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_sighup_under_load_replaces_the_workers_and_loses_no_request(tmp_path: Path) -> None:
    with Service(tmp_path, INITIAL_STOCK="1000000", WEB_CONCURRENCY="2") as service:
        with Rush(service.port) as rush:
            for _ in range(3):
                rush.wait_for(rush.outcomes["200"] + 50)
                replace_workers(service)
            rush.wait_for(rush.outcomes["200"] + 50)
        assert service.get("/audit")["purchase_records"] == rush.outcomes["200"]
        assert service.stop(signal.SIGTERM) == 0
    assert set(rush.outcomes) == {"200"}


def replace_workers(service: Service) -> None:
    wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
    old = set(service.workers())
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(set(service.workers()) - old) == 2, 20, "no new workers")
    wait_until(lambda: not old & set(service.workers()), 20, "the old workers stay")


# `python -m gunicorn` can't start itself again.
UPGRADABLE = (str(Path(sys.executable).with_name("gunicorn")), "app:app")


def start_upgrade(service: Service) -> int:
    """A second master beside the first, both with two workers: its process id."""
    wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
    old = set(service.workers())
    service.process.send_signal(signal.SIGUSR2)
    wait_until(
        lambda: service.log.count("Booting worker") == 4, 20, "the new master has no workers"
    )
    (new_master,) = set(service.workers()) - old
    return new_master


def test_an_upgrade_that_is_taken_back_leaves_the_old_master_selling(tmp_path: Path) -> None:
    with Service(tmp_path, *UPGRADABLE, INITIAL_STOCK="10", WEB_CONCURRENCY="2") as service:
        new_master = start_upgrade(service)
        os.kill(new_master, signal.SIGTERM)
        wait_until(lambda: new_master not in service.workers(), 40, "the new master stays")
        assert service.buy().status_code == 200
        assert service.stop(signal.SIGTERM) == 0


def test_a_stop_right_after_an_upgrade_answers_everybody_too(tmp_path: Path) -> None:
    with (
        Service(tmp_path, *UPGRADABLE, INITIAL_STOCK="1000000", WEB_CONCURRENCY="2") as service,
        Rush(service.port, number=40) as rush,
    ):
        rush.wait_for(100)
        new_master = start_upgrade(service)
        assert service.stop(signal.SIGTERM) == 0
        os.kill(new_master, signal.SIGTERM)  # before it knows that it is the only one
        wait_until(lambda: rush.outcomes["refused"] == 40, 30, "somebody is still answered")
    assert set(rush.outcomes) == {"200", "refused"}
    assert rush.outcomes["200"] == purchases(tmp_path)


def test_a_stop_ends_while_newcomers_keep_coming(tmp_path: Path) -> None:
    with Service(tmp_path, INITIAL_STOCK="1000000", WEB_CONCURRENCY="2") as service:
        with Rush(service.port, number=40) as rush:
            rush.wait_for(100)
            started = time.monotonic()
            assert service.stop(signal.SIGTERM) == 0
            assert time.monotonic() - started < 10
        assert set(rush.outcomes) == {"200", "refused"}
