"""Signals in the middle of a rush: every request that waits in the kernel's queue is answered.

A handshake in the very moment of a stop may be reset, and then sold nothing: that one is allowed.
"""

import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from service import (
    Answer,
    Service,
    need,
    need_root,
    parse_answer,
    patched,
    purchase_request,
    send_at_once,
    wait_until,
)
from test_sqlite_store import write_lock

from sqlite.engine import sqlite3

WAITING = 400
ESTABLISHED, LISTEN = "01", "0A"  # of /proc/net/tcp


def backlog(port: int) -> int:
    """How many connections no worker has accepted yet."""
    listening = tcp_rows(port, LISTEN)
    return int(listening[0][4].split(":")[1], 16) if listening else 0


def tcp_rows(port: int, state: str) -> list[list[str]]:
    """Linux's own view of the sockets at this port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row for row in rows if row[1].endswith(f":{port:04X}") and row[3] == state]


def purchases(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "inventory.db")) as connection:
        return int(connection.execute("SELECT count(*) FROM purchases").fetchone()[0])


# Newer kernels let a process without capabilities do less than an ordinary user's tests would show.
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
USERS = {"as whoever runs this": (), "without capabilities": WITHOUT_RIGHTS}


def as_user(prefix: tuple[str, ...]) -> tuple[str, ...]:
    """The service's command; root only can give up rights, others have none to begin with."""
    if prefix:
        need_root("giving up capabilities")
        need(shutil.which("setpriv"), "setpriv is not installed (apt-get install util-linux)")
    return (*prefix, sys.executable, "-m", "gunicorn", "app:app")


def message_of(length: int) -> bytes:
    """The head of a purchase that announces so long a body."""
    return b"POST /buy_ticket HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % length


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_everybody_who_waits_in_the_backlog(
    tmp_path: Path, number: int, user: tuple[str, ...]
) -> None:
    variables = {"INITIAL_STOCK": "1000", "WEB_CONCURRENCY": "2", "LOCK_TIMEOUT": "20"}
    with Service(tmp_path, *as_user(user), **variables) as service:
        answers = []
        crowd = [purchase_request("alice", f"key-{n}") for n in range(WAITING)]
        rush = threading.Thread(target=lambda: answers.extend(send_at_once(service.port, crowd)))
        with write_lock(tmp_path / "inventory.db"):
            rush.start()
            wait_until(lambda: backlog(service.port) == WAITING - 2, 10, "they don't wait")
            service.process.send_signal(number)
            wait_until(lambda: "Handling signal" in service.log, 10, "the signal wasn't handled")
            os.killpg(service.process.pid, signal.SIGQUIT)  # an impatient Ctrl-\\
            os.killpg(service.process.pid, signal.SIGINT)
        rush.join()
        assert service.process.wait(2) == 0
    assert Counter(
        (answer.status, answer.text if answer.status == 0 else "") for answer in answers
    ) == {(200, ""): WAITING}
    assert purchases(tmp_path) == WAITING
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    "step", ["serving.draining.begin_work", "gunicorn.workers.base.Worker.load_wsgi"]
)
def test_a_worker_that_is_ended_while_it_starts_answers_as_the_others_do(
    tmp_path: Path, step: str
) -> None:
    impatient = (
        "import os, signal, gunicorn.workers.base, serving.draining\n"
        f"do = {step}\n"
        "def step(worker):\n"
        "    if worker.state[0] == serving.draining.STOPPING:\n"
        "        os.kill(os.getpid(), signal.SIGQUIT)\n"
        "    do(worker)\n"
        f"{step} = step"
    )
    with Service(tmp_path, *patched(impatient), WEB_CONCURRENCY="1") as service:
        answers: list[Answer] = []
        crowd = [purchase_request("alice", f"key-{n}") for n in range(20)]
        rush = threading.Thread(target=lambda: answers.extend(send_at_once(service.port, crowd)))
        with write_lock(tmp_path / "inventory.db"):
            rush.start()
            wait_until(lambda: backlog(service.port) == 19, 10, "they don't wait")
            service.process.send_signal(signal.SIGTERM)
            wait_until(lambda: backlog(service.port) == 18, 10, "no second worker answers")
        rush.join()
        assert service.process.wait(20) == 0
    assert [answer.status for answer in answers] == [200] * 20
    assert "Traceback" not in service.log


def test_a_stop_that_the_workers_heard_of_first_answers_everybody_too(tmp_path: Path) -> None:
    """As where a whole process group is told: they end before their master knows of a stop."""
    with Service(tmp_path, INITIAL_STOCK="1000", WEB_CONCURRENCY="2") as service:
        answers = []
        crowd = [purchase_request("alice", f"key-{n}") for n in range(WAITING)]
        rush = threading.Thread(target=lambda: answers.extend(send_at_once(service.port, crowd)))
        workers = service.workers()
        with write_lock(tmp_path / "inventory.db"):
            rush.start()
            wait_until(lambda: backlog(service.port) == WAITING - 2, 10, "they don't wait")
            service.process.send_signal(signal.SIGSTOP)
            for worker in workers:
                os.kill(worker, signal.SIGTERM)
        wait_until(lambda: not any(map(is_running, workers)), 10, "they don't end")
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGCONT)
        rush.join()
        assert service.process.wait(5) == 0
    assert Counter(answer.status for answer in answers) == {200: WAITING}


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_of_an_idle_service_takes_no_two_seconds(
    tmp_path: Path, number: int, user: tuple[str, ...]
) -> None:
    with Service(tmp_path, *as_user(user)) as service:
        started = time.monotonic()
        assert service.stop(number) == 0
        assert time.monotonic() - started < 2
    assert "Traceback" not in service.log


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

    @property
    def lost(self) -> list[str]:
        return [outcome for outcome in self.outcomes.elements() if outcome.startswith("lost")]

    def check_that_nobody_was_lost(self, folder: Path) -> None:
        """But for one whose handshake the stop met. He was sold nothing."""
        wait_until(
            lambda: self.outcomes["refused"] == len(self.threads), 20, "somebody is still answered"
        )
        assert len(self.lost) <= 1
        assert set(self.outcomes) - set(self.lost) == {"200", "refused"}
        assert self.outcomes["200"] == purchases(folder)

    def wait_for(self, number: int) -> None:
        wait_until(
            lambda: self.outcomes["200"] >= number, 20, f"not {number} sales: {self.outcomes}"
        )


@pytest.mark.parametrize("user", USERS.values(), ids=USERS)
def test_sigterm_under_load_loses_no_request_that_was_sent(
    tmp_path: Path, user: tuple[str, ...]
) -> None:
    with (
        Service(tmp_path, *as_user(user), INITIAL_STOCK="1000000") as service,
        Rush(service.port) as rush,
    ):
        rush.wait_for(100)
        started = time.monotonic()
        assert service.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 5
        rush.check_that_nobody_was_lost(tmp_path)
    assert "Traceback" not in service.log


def test_connections_without_a_request_hold_up_no_stop(tmp_path: Path) -> None:
    """As a browser opens them; one worker waits for such a one, one for the rest of a body."""
    with Service(tmp_path, WEB_CONCURRENCY="2") as service, ExitStack() as clients:
        silent, half, buyer = (
            clients.enter_context(socket.create_connection(("127.0.0.1", service.port), 20))
            for _ in range(3)
        )
        half.sendall(message_of(9) + b"{")
        buyer.sendall(purchase_request("alice"))
        wait_until(lambda: backlog(service.port) == 1, 20, "the buyer doesn't wait")
        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert buyer.recv(65536).startswith(b"HTTP/1.1 200 ")
        refused = b"".join(iter(lambda: half.recv(65536), b""))
        assert b"The body ended before its Content-Length" in refused
        assert silent.recv(65536) == b""
        buyer.close()
        assert service.process.wait(20) == 0
        assert time.monotonic() - started < 10  # it was 50
    assert purchases(tmp_path) == 1


def test_a_connection_without_a_request_gives_its_worker_back(tmp_path: Path) -> None:
    soon = "import serving.patience; serving.patience.REQUEST_LIMIT_S = 1"
    with (
        Service(tmp_path, *patched(soon), WEB_CONCURRENCY="1") as service,
        socket.create_connection(("127.0.0.1", service.port), 20) as silent,
    ):
        (worker,) = service.workers()
        wait_until(lambda: backlog(service.port) == 0, 20, "nobody accepts")
        assert service.buy().status_code == 200
        assert silent.recv(1) == b""
        assert service.workers() == [worker]  # gunicorn didn't have to kill it
    assert "Traceback" not in service.log


@pytest.mark.parametrize(
    "head",
    [b"POST /buy_ticket HTTP/1.1\r\nX-Header: ", message_of(9), message_of(50_000)],
    ids=["of a header", "of a body", "of a refused body"],
)
def test_a_client_that_sends_byte_by_byte_gives_its_worker_back(
    tmp_path: Path, head: bytes
) -> None:
    soon = "import serving.patience; serving.patience.REQUEST_LIMIT_S = 1"
    with (
        Service(tmp_path, *patched(soon), WEB_CONCURRENCY="1") as service,
        socket.create_connection(("127.0.0.1", service.port), 20) as dripping,
        ThreadPoolExecutor() as clients,
    ):
        (worker,) = service.workers()
        dripping.sendall(head)
        wait_until(lambda: backlog(service.port) == 0, 20, "nobody accepts")
        served = clients.submit(service.buy)
        while not served.done():
            with suppress(OSError):  # it was hung up on
                dripping.send(b" ")
            wait([served], timeout=0.1)
        assert served.result().status_code == 200
        assert service.workers() == [worker]  # gunicorn didn't have to kill it
    assert "Traceback" not in service.log


def test_a_buyer_who_leaves_his_connection_open_after_the_answer_holds_no_worker(
    tmp_path: Path,
) -> None:
    with Service(tmp_path, WEB_CONCURRENCY="1") as service, ExitStack() as buyers:
        started = time.monotonic()
        for number in range(20):
            buyer = buyers.enter_context(socket.create_connection(("127.0.0.1", service.port), 20))
            buyer.sendall(purchase_request("alice", f"key-{number}"))
            assert buyer.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - started < 10  # gunicorn alone waits for 2 s each
    assert service.log.count("[ERROR]") == 0


def test_an_exception_in_the_hook_does_not_end_a_stop(tmp_path: Path) -> None:
    broken = "import socket\ndef listen(self, backlog=0):\n    raise PermissionError('no right')\n"
    only_at_the_stop = (
        f"{broken}"
        "import serving.draining as draining\n"
        "class Refusing:\n    def __init__(self): self.sock = self\n    listen = listen\n"
        "close = draining.close_queue\n"
        "draining.close_queue = lambda listeners: close([Refusing()])"
    )
    with Service(tmp_path, *patched(only_at_the_stop)) as service:
        assert service.buy().status_code == 200
        assert service.stop(signal.SIGTERM) == 0
    assert service.log.count("PermissionError: no right") == 1  # newer Pythons show its line, too


def test_orphans_end_with_their_master_and_a_new_start_serves(tmp_path: Path) -> None:
    with Service(tmp_path, WEB_CONCURRENCY="2", LOCK_TIMEOUT="60") as service:
        wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
        orphans = service.workers()
        answers = []
        crowd = [purchase_request("alice", f"key-{n}") for n in range(20)]
        rush = threading.Thread(target=lambda: answers.extend(send_at_once(service.port, crowd)))
        with write_lock(tmp_path / "inventory.db"):
            rush.start()
            wait_until(lambda: backlog(service.port) == 18, 10, "they don't wait")
            service.process.kill()
            service.process.wait()
        rush.join()
        wait_until(lambda: not any(map(is_running, orphans)), 2, "an orphan stays")
    assert [answer.status for answer in answers] == [200] * 20
    with Service(tmp_path, PORT=str(service.port)) as again:
        assert again.get("/audit")["purchase_records"] == 20


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
    return is_in("SigBlk", signal.SIGTERM, pid)


def ignores_sighup(pid: int) -> bool:
    return is_in("SigIgn", signal.SIGHUP, pid)


def is_in(mask: str, number: int, pid: int) -> bool:
    found = re.search(rf"{mask}:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


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


@pytest.mark.parametrize("nohup", [[], ["nohup"]], ids=["by itself", "under nohup"])
def test_the_demo_ends_with_its_terminal_but_under_nohup(tmp_path: Path, nohup: list[str]) -> None:
    """A closed terminal hangs up on master and workers; nobody could press Ctrl-C any more."""
    with Service(tmp_path, *nohup, sys.executable, "app.py", WEB_CONCURRENCY="2") as service:
        wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
        workers = set(service.workers())
        wait_until(lambda: all(map(ignores_sighup, workers)), 20, "they don't work yet")
        os.killpg(service.process.pid, signal.SIGHUP)
        if nohup:
            wait_until(lambda: not workers & set(service.workers()), 20, "no reload")
            assert service.buy("alice").status_code == 200
        else:
            assert service.process.wait(10) == 0
    assert "was sent SIGHUP" not in service.log


def test_a_reload_with_settings_that_make_no_sense_is_refused(copy_of_the_program: Path) -> None:
    command = (sys.executable, "-m", "gunicorn", "app:app")
    with Service(copy_of_the_program, *command, cwd=copy_of_the_program) as service:
        (copy_of_the_program / ".env").write_text("LOCK_TIMEOUT=5s\n")
        service.process.send_signal(signal.SIGHUP)
        told = "Not reloaded, the old settings stay: LOCK_TIMEOUT has to be a number"
        wait_until(lambda: told in service.log, 20, "the reload wasn't refused")
        assert service.buy().status_code == 200


def test_a_reload_that_cannot_run_gunicorns_file_is_refused(copy_of_the_program: Path) -> None:
    """A newer release of it, for one, wants what the loaded modules don't have."""
    command = (sys.executable, "-m", "gunicorn", "app:app")
    with Service(copy_of_the_program, *command, cwd=copy_of_the_program) as service:
        with (copy_of_the_program / "gunicorn.conf.py").open("a") as file:
            file.write("from serving.hooks import a_newer_one\n")
        service.process.send_signal(signal.SIGHUP)
        told = "Not reloaded, the old settings stay: gunicorn.conf.py failed, see above"
        wait_until(lambda: told in service.log, 20, "the reload wasn't refused")
        assert service.buy().status_code == 200
        assert "a_newer_one" in service.log


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


def test_orphans_of_an_upgraded_master_leave_the_queue_open(tmp_path: Path) -> None:
    with Service(tmp_path, *UPGRADABLE, WEB_CONCURRENCY="2") as service:
        new_master = start_upgrade(service)
        orphans = [pid for pid in service.workers() if pid != new_master]
        service.process.kill()
        wait_until(lambda: not any(map(is_running, orphans)), 2, "an orphan stays")
        answers = send_at_once(service.port, [purchase_request("alice")] * 90)
        assert [answer.status for answer in answers] == [200] * 90
        os.kill(new_master, signal.SIGTERM)
        wait_until(lambda: not is_running(new_master), 10, "the new master stays")


def test_the_local_demo_can_be_upgraded_too(tmp_path: Path) -> None:
    with Service(tmp_path, sys.executable, "app.py", WEB_CONCURRENCY="2") as service:
        new_master = start_upgrade(service)
        assert service.stop(signal.SIGTERM) == 0
        assert service.buy().status_code == 200
        os.kill(new_master, signal.SIGTERM)
        wait_until(lambda: not is_running(new_master), 10, "the new master stays")


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
        rush.check_that_nobody_was_lost(tmp_path)


def test_a_stop_ends_while_newcomers_keep_coming(tmp_path: Path) -> None:
    with (
        Service(tmp_path, INITIAL_STOCK="1000000", WEB_CONCURRENCY="2") as service,
        Rush(service.port, number=40) as rush,
    ):
        rush.wait_for(100)
        started = time.monotonic()
        assert service.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 5
        rush.check_that_nobody_was_lost(tmp_path)
