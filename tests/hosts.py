"""Several hosts share one machine, each in a network namespace, and buyers use all of them.

The buyers keep one history of everything that the hosts answered.
"""

import ctypes
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from postgres_cluster import PASSWORD
from service import PROJECT, Service, need, need_root, wait_until

from proof.api import RETRY_SLEEP_S, Api, CannotJudge, connection_to
from proof.buyers import buy
from proof.checker import check
from proof.history import BUSY, LOST, SOLD, SOLD_OUT, Attempt, Audit, Reading
from proof.orders import Crowd

SUBNET = "10.213.7"  # inside the namespaces only: there is no way out of them
SWITCH = "switch"
CLONE_NEWNET = 0x40000000
UNKNOWN = 500  # the connection to the database was lost in between: as good as no answer

BUYERS = 12
REQUEST_TIMEOUT_S = 3
PATIENCE_S = 25.0
READING_PAUSE_S = 0.02


class HasSql(Protocol):
    def sql(self, statement: str, database: str = "postgres") -> str: ...


class Network:
    """Each name is a host, and all hosts are on one switch.

    `with` removes all of it, and the machine's own network is not touched.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def __enter__(self) -> Self:
        need_root("making network namespaces")
        need(shutil.which("ip"), "no ip command on this machine (Debian: apt-get install iproute2)")
        with ExitStack() as undo:
            undo.callback(self.remove)
            try:
                self._build()
            except subprocess.CalledProcessError as error:
                need(False, f"no network namespaces here: {error.stderr.decode().strip()}")
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _build(self) -> None:
        _ip("netns", "add", self._path(SWITCH).name)
        self._switch("link", "add", "bridge", "up", "type", "bridge")
        for name in self.names:
            host = self._path(name).name
            _ip("netns", "add", host)
            self._switch("link", "add", name, "up", "type", "veth", "peer", "eth0", "netns", host)
            self._switch("link", "set", name, "master", "bridge")
            _ip("-n", host, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host, "link", "set", device, "up")

    def remove(self) -> None:
        for name in (*self.names, SWITCH):
            if self._path(name).exists():
                _ip("netns", "delete", self._path(name).name)

    def address(self, name: str) -> str:
        return f"{SUBNET}.{1 + self.names.index(name)}"

    def prefix(self, name: str) -> tuple[str, ...]:
        """What goes before the command line of a program that is to run on that host."""
        return ("ip", "netns", "exec", self._path(name).name)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This thread, and all that it starts, on that host."""
        with open("/proc/thread-self/ns/net") as home, self._path(name).open() as there:
            _enter(there)
            try:
                yield
            finally:
                _enter(home)

    def cut_off(self, name: str) -> None:
        self._switch("link", "set", name, "down")

    def join(self, name: str) -> None:
        self._switch("link", "set", name, "up")

    def _switch(self, *command: str) -> None:
        _ip("-n", self._path(SWITCH).name, *command)

    def _path(self, name: str) -> Path:
        return Path(f"/run/netns/sale-{os.getpid()}-{name}")


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True, timeout=10)


def _enter(namespace: IO[Any]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class AppHost(Service):
    """gunicorn on one host of the network."""

    def __init__(
        self, folder: Path, network: Network, name: str, port: int, **variables: str
    ) -> None:
        command = (*network.prefix(name), sys.executable, "-m", "gunicorn", "app:app")
        address = network.address(name)
        super().__init__(folder, *command, cwd=PROJECT, HOST=address, PORT=str(port), **variables)
        self.url = f"http://{address}:{port}"
        self.name = name
        self.start_another = functools.partial(AppHost, folder, network, name, port, **variables)

    def kill(self) -> None:
        """SIGKILL for the master and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def all_workers(service: Service, wanted: int) -> list[int]:
    """Their process ids, once so many are there."""
    wait_until(lambda: len(service.workers()) == wanted, PATIENCE_S, "workers are missing")
    return service.workers()


class Buyers:
    """A crowd that buys at all of these URLs, one customer after the other, and its history.

    A buyer whose outcome is unknown asks again with the same key, anywhere. A buyer who is told 503
    believes that nothing was sold, and comes back with a new key. If something was sold after all,
    this buyer has two tickets. Leaving `with` waits until every purchase that was begun is settled.
    """

    def __init__(self, urls: Sequence[str], stock: int, patience_s: float = PATIENCE_S) -> None:
        self.urls = urls
        self.stock = stock
        self.patience_s = patience_s
        self.attempts: list[Attempt] = []
        self.readings: list[Reading] = []
        self._customers = count()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(BUYERS + 1)
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> Self:
        wait_until(self._is_reset, PATIENCE_S, "POST /reset is not answered with 200")
        self._jobs = [self._pool.submit(self._shop, number) for number in range(BUYERS)]
        self._jobs.append(self._pool.submit(self._watch))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._pool.shutdown()
        for job in self._jobs if error is None else ():
            job.result()

    def _is_reset(self) -> bool:
        with suppress(CannotJudge):  # a cold pool on a slow way: 503
            Api(self.urls[0]).reset(self.stock)
            return True
        return False

    def wait_for_sales(self, wanted: int, url: str = "") -> None:
        """Wait until buyers who ask from now on have got that many sales, at `url` if given."""
        now = time.monotonic()

        def sold() -> int:
            recent = list(takewhile(lambda a: a.end > now, reversed(self.attempts)))
            places = [a.process for a in recent if a.status == SOLD and a.start > now]
            return places.count(self.urls.index(url)) if url else len(places)

        wait_until(
            lambda: sold() >= wanted, self.patience_s, f"no {wanted} sales at {url or 'all hosts'}"
        )

    def wait_until_sold_out(self) -> None:
        wait_until(
            lambda: all(job.done() for job in self._jobs[:-1]), self.patience_s, "not sold out"
        )

    def _shop(self, thread: int) -> None:
        while not self._over.is_set():
            if self._insist(thread, f"c{next(self._customers)}") == SOLD_OUT:
                return

    def _insist(self, thread: int, customer: str) -> int:
        deadline = time.monotonic() + self.patience_s
        number, unclear = 1, False
        while time.monotonic() < deadline:
            status = self._ask(thread, customer, f"{customer}-{number}")
            if status in (SOLD, SOLD_OUT):
                return status
            unclear = unclear or status != BUSY
            number += not unclear
            time.sleep(RETRY_SLEEP_S)
        raise AssertionError(
            f"{customer} was neither sold a ticket nor told SOLD OUT in {self.patience_s} s"
        )

    def _ask(self, thread: int, customer: str, key: str) -> int:
        place = random.randrange(len(self.urls))
        crowd = Crowd(self.urls[place], place, [])
        with closing(connection_to(crowd.url)) as connection:
            attempt, _ = buy(crowd, thread, (customer, key), connection)
        if attempt.status == UNKNOWN:
            attempt = attempt._replace(status=LOST)
        self.attempts.append(attempt)
        return attempt.status

    def _watch(self) -> None:
        while not self._over.wait(READING_PAUSE_S):
            self.readings += Api(random.choice(self.urls)).read_stock()

    def _audit(self) -> Audit | None:
        with suppress(CannotJudge):
            return Api(self.urls[0]).audit()
        return None

    def judge(self, cluster: HasSql, database: str) -> None:
        """The history is linearizable, and exactly what was acknowledged is stored, each once."""
        sold = {a[2:4] + a[7:9] for a in self.attempts if a.status == SOLD}
        query = "SELECT customer_id, idempotency_key, remaining_stock, purchase_id FROM purchases"
        stored = cluster.sql(query, database).splitlines()
        acknowledged = {"|".join(map(str, purchase)) for purchase in sold}
        assert not acknowledged - set(stored), f"lost: {acknowledged - set(stored)}"
        assert not set(stored) - acknowledged, (
            f"stored, and no buyer knows: {set(stored) - acknowledged}"
        )
        assert len({customer for customer, *_ in sold}) == len(sold) == len(stored)
        audit = wait_until(self._audit, PATIENCE_S, "GET /audit gives no figures")
        assert audit is not None
        assert (audit.stock, audit.records) == (self.stock - len(sold), len(sold))
        violations = check(self.stock, self.attempts, self.readings, audit)
        assert not violations, violations

    def unclear(self) -> int:
        """How many attempts told their buyer nothing for sure."""
        return sum(a.status == LOST for a in self.attempts)


@contextmanager
def serving(hosts: list[AppHost]) -> Iterator[list[AppHost]]:
    """All of them, ready, until the end; one that was replaced in the list is ended too."""
    try:
        for host in hosts:
            host.__enter__()
        yield hosts
    finally:
        for host in hosts:
            host.__exit__(None, None, None)
    for host in hosts:
        assert PASSWORD not in host.log
        assert "Traceback" not in host.log
