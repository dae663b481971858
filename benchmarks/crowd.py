"""A rehearsal: a crowd presses BUY at one moment, each buyer on a connection of his own.

    python benchmarks/crowd.py --url http://127.0.0.1 --buyers 50000 --addresses 1000

Run it on nginx's own machine (Linux): the buyers come from many addresses of the loopback network,
so that the limits for an address count as on the day. All connect first; then all send at once.
Whoever is told to retry does so, as the Retry-After says and a random second later. Afterwards the
proof's checker judges what everybody was told. It sells units: rehearse on a database of its own.
"""

import argparse
import heapq
import json
import math
import multiprocessing
import random
import re
import resource
import select
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from proof.checker import check
from proof.history import BUSY, LIMITED, LOST, SOLD, SOLD_OUT, Attempt

BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)  # Linux; named since 3.12
BUYERS_PER_PROCESS = 15_000
CONNECTS_AT_ONCE = 200  # between two looks at what has happened
CONNECT_LIMIT_S = 20.0
RETRY = (BUSY, LIMITED)
LENGTH = re.compile(rb"\r\nContent-Length: (\d+)", re.IGNORECASE)


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--url", default="http://127.0.0.1", help="nginx, on this machine (%(default)s)")
    add("--buyers", type=int, default=10_000, help="how many press BUY (%(default)s)")
    add("--addresses", type=int, default=1_000, help="how many they come from (%(default)s)")
    add("--keys", action="store_true", help="each buyer sends an Idempotency-Key")
    add("--limit", type=float, default=60.0, help="seconds until it ends (%(default)s)")
    add("--seed", type=int, default=1, help="of the waits before a retry (%(default)s)")
    return parser.parse_args(arguments)


class Buyer:
    """One who insists until he has a ticket, or is told that there are no more."""

    def __init__(self, number: int, options: argparse.Namespace) -> None:
        self.customer = f"c{number}"
        self.key = f"key-{number}-{time.time_ns()}" if options.keys else None
        place = number % options.addresses
        self.address = f"127.{64 + place // 62_500}.{place // 250 % 250}.{place % 250 + 1}"
        body = json.dumps({"customer_id": self.customer})
        head = "POST /buy_ticket HTTP/1.1\r\nHost: rehearsal\r\nContent-Type: application/json\r\n"
        head += f"Idempotency-Key: {self.key}\r\n" if self.key else ""
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.request = (head + body).encode()
        self.socket: socket.socket
        self.received = b""
        self.start = 0.0

    def connect(self, place: tuple[str, int]) -> int:
        self.socket, self.received = socket.socket(), b""
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((self.address, 0))
        self.socket.connect_ex(place)
        return self.socket.fileno()

    def attempt(self, process: int, status: int, body: dict[str, Any], note: str = "") -> Attempt:
        level, number = body.get("remaining_stock"), body.get("purchase_id")
        return Attempt(
            process, 0, self.customer, self.key, self.start, time.monotonic(), status, level,
            number, note,
        )  # fmt: skip


class Crowd:
    """The buyers of one process."""

    def __init__(self, process: int, options: argparse.Namespace, numbers: range) -> None:
        self.process, self.options = process, options
        parts = urlsplit(options.url)
        self.place = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.chance = random.Random(options.seed * 1_000 + process)  # noqa: S311
        self.attempts: list[Attempt] = []
        self.sent: dict[int, Buyer] = {}  # by descriptor
        self.waiting: list[tuple[float, int, Buyer]] = []  # for their retry
        self.poll = select.epoll()
        self.buyers = [Buyer(number, options) for number in numbers]

    def gather(self) -> int:
        """Connect all: how many are."""
        for first in range(0, len(self.buyers), CONNECTS_AT_ONCE):
            for buyer in self.buyers[first : first + CONNECTS_AT_ONCE]:
                self.poll.register(buyer.connect(self.place), select.EPOLLOUT | select.EPOLLET)
            self.poll.poll(0)
        deadline = time.monotonic() + CONNECT_LIMIT_S
        while time.monotonic() < deadline and not all(map(is_connected, self.buyers)):
            self.poll.poll(0.1)
        connected = [buyer for buyer in self.buyers if is_connected(buyer)]
        for buyer in connected:
            self.poll.modify(buyer.socket.fileno(), select.EPOLLIN)
        return len(connected)

    def buy(self, deadline: float) -> None:
        for buyer in self.buyers:
            self.send(buyer)
        while (self.sent or self.waiting) and time.monotonic() < deadline:
            next_retry_s = self.waiting[0][0] - time.monotonic() if self.waiting else 1.0
            for descriptor, _ in self.poll.poll(min(max(next_retry_s, 0), 1)):
                if descriptor in self.sent:
                    self.read(descriptor)
            while self.waiting and self.waiting[0][0] <= time.monotonic():
                buyer = heapq.heappop(self.waiting)[2]
                self.poll.register(buyer.connect(self.place), select.EPOLLOUT | select.EPOLLET)
                self.send(buyer, again=True)
        for buyer in list(self.sent.values()):
            self.told(buyer, LOST, {}, "no answer in time")

    def send(self, buyer: Buyer, again: bool = False) -> None:
        """As soon as the connection is there; of a retry EPOLLOUT tells when it is."""
        buyer.start = time.monotonic()
        self.sent[buyer.socket.fileno()] = buyer
        try:
            buyer.socket.sendall(buyer.request)
            if again:
                self.poll.modify(buyer.socket.fileno(), select.EPOLLIN)
        except BlockingIOError:
            return
        except OSError as error:
            self.told(buyer, LOST, {}, repr(error))

    def read(self, descriptor: int) -> None:
        buyer = self.sent[descriptor]
        try:
            data = buyer.socket.recv(65536)
        except BlockingIOError:
            self.send(buyer, again=True)
            return
        except OSError as error:
            self.told(buyer, LOST, {}, repr(error))
            return
        buyer.received += data
        if not data or is_whole(buyer.received):
            self.understand(buyer)

    def understand(self, buyer: Buyer) -> None:
        status, text = buyer.received[9:12], buyer.received.partition(b"\r\n\r\n")[2]
        if not status.isdigit():
            self.told(buyer, LOST, {}, "closed without an answer")
            return
        body: dict[str, Any] = {}
        with suppress(ValueError):
            body = json.loads(text)
        self.told(buyer, int(status), body, "" if body else text[:100].decode("latin-1"))

    def told(self, buyer: Buyer, status: int, body: dict[str, Any], note: str) -> None:
        self.attempts.append(buyer.attempt(self.process, status, body, note))
        self.sent.pop(buyer.socket.fileno(), None)
        buyer.socket.close()
        unclear = status not in (SOLD, SOLD_OUT, *RETRY)
        if status in RETRY or (unclear and buyer.key and note != "no answer in time"):
            moment = time.monotonic() + 1 + self.chance.random()  # Retry-After, and jitter
            heapq.heappush(self.waiting, (moment, id(buyer), buyer))


def is_whole(answer: bytes) -> bool:
    """Whether all of its body is there. The service and nginx tell its length."""
    head, end, body = answer.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    return bool(end and length and len(body) >= int(length[1]))


def is_connected(buyer: Buyer) -> bool:
    try:
        return bool(buyer.socket.getpeername())
    except OSError:
        return False


def allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(number + 100, hard)), hard))


def require_open_files(number: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < number + 100:
        raise ValueError(f"a process may open {hard} files, {number + 100} are needed (ulimit -Hn)")


def press_buy(
    process: int, numbers: range, options: argparse.Namespace, moment: Any, results: Any
) -> None:
    """In a process of its own. A barrier lets all of them send at once."""
    allow_open_files(len(numbers))
    crowd = Crowd(process, options, numbers)
    moment.wait(CONNECT_LIMIT_S * 2)
    started = time.monotonic()
    connected = crowd.gather()
    gathered_s = time.monotonic() - started
    moment.wait(CONNECT_LIMIT_S * 2)
    crowd.buy(time.monotonic() + options.limit)
    results.put((connected, gathered_s, crowd.attempts))


def rush(options: argparse.Namespace) -> tuple[int, float, list[Attempt]]:
    """All buyers: how many were connected at once, after how many seconds, and their attempts."""
    number = math.ceil(options.buyers / BUYERS_PER_PROCESS)
    context = multiprocessing.get_context("spawn")
    moment, results = context.Barrier(number), context.Queue()
    jobs = [
        context.Process(
            target=press_buy,
            args=(n, range(n, options.buyers, number), options, moment, results),
            daemon=True,
        )
        for n in range(number)
    ]
    for job in jobs:
        job.start()
    told = [results.get(timeout=options.limit + 3 * CONNECT_LIMIT_S) for _ in jobs]
    for job in jobs:
        job.join()
    attempts = [attempt for _, _, own in told for attempt in own]
    return sum(one[0] for one in told), max(one[1] for one in told), attempts


def stock_at(url: str) -> int:
    """The units that are left. Raises ValueError, which says why no rehearsal is possible."""
    import requests

    try:
        answer = requests.get(f"{url}/inventory", timeout=10)
        told = answer.json()
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ValueError(f"no stock at {url}/inventory: {error}") from error
    if answer.status_code != 200:
        raise ValueError(f"{url}/inventory answered {answer.status_code}: {told}")
    if not told.get("open", True):
        raise ValueError(f"the sale opens at {told['opens_at']}")
    if not told["current_stock"]:
        raise ValueError("sold out - name a new file in DATABASE_URL and restart, or restock")
    return int(told["current_stock"])


def report(stock: int, buyers: int, attempts: list[Attempt]) -> dict[str, Any]:
    """What came of it. Times are in seconds since the first request."""
    first = min(a.start for a in attempts)
    last: dict[str, Attempt] = {}
    for a in sorted(attempts, key=lambda a: a.end):
        last[a.customer] = a
    sold = [a for a in attempts if a.status == SOLD]
    waits = sorted(a.end - first for a in last.values())
    violations = [str(violation) for violation in check(stock, attempts, [], None)]
    figures: dict[str, Any] = {
        "buyers": buyers,
        "units": stock,
        "sold": len(sold),
        "answers": dict(sorted(Counter(a.status for a in attempts).items())),
        "without a final answer": sum(a.status not in (SOLD, SOLD_OUT) for a in last.values()),
        "resets and lost connections": dict(Counter(a.note for a in attempts if a.status == LOST)),
        "first sold after s": round(min((a.end for a in sold), default=first) - first, 2),
        "all sold after s": round(max((a.end for a in sold), default=first) - first, 2),
        "median answered after s": round(waits[len(waits) // 2], 2),
        "99% answered after s": round(waits[int(len(waits) * 0.99)], 2),
        "all answered after s": round(waits[-1], 2),
        "violations": violations[:5],
    }
    proven = not violations and len(sold) == min(stock, buyers) and len(last) == buyers
    return figures | {"proven": proven and not figures["without a final answer"]}


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        stock = stock_at(options.url)
        require_open_files(min(options.buyers, BUYERS_PER_PROCESS))
    except ValueError as error:
        print(f"Cannot rehearse: {error}", file=sys.stderr)
        return 2
    connected, gathered_s, attempts = rush(options)
    figures = {"connected at once": connected, "connected after s": round(gathered_s, 2)}
    figures |= report(stock, options.buyers, attempts)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    return 0 if figures["proven"] else 1


if __name__ == "__main__":
    sys.exit(main())
