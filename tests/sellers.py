"""Sellers in memory, each with one deviation, to see whether the proof has the right word for each.

    python tests/sellers.py --seller Fast --port 8000

One event loop answers all connections, and keeps them open.
"""

import argparse
import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, ClassVar, NamedTuple

JSON = dict[str, Any]
STOCK = 100  # as configured
IN_FLIGHT = 150


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: JSON
    connection: int

    @property
    def key(self) -> str | None:
        return self.headers.get("idempotency-key")


class Answer(NamedTuple):
    status: int
    body: JSON
    headers: tuple[str, ...] = ()


class Seller:
    """Right, and as fast as this interpreter is."""

    word: ClassVar[int] = 0  # the exit status that the proof owes it
    says: ClassVar[str]  # a part of the proof's output
    arguments: ClassVar[tuple[str, ...]] = ()
    tests: ClassVar[str] = "1-5"  # the ones in which it shows, to save the others

    def __init__(self) -> None:
        self.in_flight = 0
        self.refill(STOCK)

    def refill(self, stock: int) -> None:
        self.initial = self.stock = stock
        self.purchases: dict[str | int, tuple[str, JSON]] = {}  # by key: customer, answer

    def wait_s(self) -> float:
        """Until the turn of a request that arrives now."""
        return 0

    def answer(self, request: Request) -> Answer:
        call = {
            "GET /health": self.health,
            "POST /reset": self.reset,
            "POST /buy_ticket": self.buy_ticket,
            "GET /inventory": self.inventory,
            "GET /audit": self.audit,
        }.get(f"{request.method} {request.path}")
        return call(request) if call else Answer(404, {"message": "nothing here"})

    def health(self, request: Request) -> Answer:
        return Answer(200, {"status": "ok"})

    def reset(self, request: Request) -> Answer:
        self.refill(request.body.get("stock", STOCK))
        return Answer(200, {"success": True, "current_stock": self.stock})

    def inventory(self, request: Request) -> Answer:
        sold = self.initial - self.stock
        figures = {"current_stock": self.stock, "initial_stock": self.initial}
        return Answer(200, figures | {"total_purchases": sold})

    def audit(self, request: Request) -> Answer:
        records = len(self.purchases)
        figures: JSON = {"current_stock": self.stock, "purchase_records": records}
        consistent = self.stock + records == self.initial
        return Answer(200, figures | {"initial_stock": self.initial, "consistent": consistent})

    def buy_ticket(self, request: Request) -> Answer:
        customer, key = request.body.get("customer_id", "guest"), request.key
        if key in self.purchases:
            owner, told = self.purchases[key]
            return self.replay(told) if owner == customer else self.refuse_stranger(told)
        return self.sell(customer, key) if self.stock > 0 else self.sold_out()

    def replay(self, told: JSON) -> Answer:
        return Answer(200, told)

    def refuse_stranger(self, told: JSON) -> Answer:
        return Answer(422, {"success": False, "message": "another customer's key"})

    def sold_out(self) -> Answer:
        return Answer(410, {"success": False, "remaining_stock": 0})

    def sell(self, customer: str, key: str | None) -> Answer:
        self.stock -= 1
        number = len(self.purchases) + 1
        told = {"success": True, "remaining_stock": self.stock, "purchase_id": number}
        self.purchases[number if key is None else key] = customer, told
        return Answer(200, told)


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as much of it as the proof speaks."""

    numbers = count()

    def __init__(self, seller: Seller, transports: set[asyncio.Transport]) -> None:
        self.seller = seller
        self.transports = transports  # of all that are open
        self.number = next(self.numbers)
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.transports.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        if not end or len(body) < length:
            return
        self.received = body[length:]
        method, path, _ = lines[0].split()
        request = Request(method, path, headers, json.loads(body[:length] or "{}"), self.number)
        self.seller.in_flight += 1
        asyncio.get_running_loop().call_later(self.seller.wait_s(), self.send, request)

    def send(self, request: Request) -> None:
        answer = self.seller.answer(request)
        self.seller.in_flight -= 1
        body = json.dumps(answer.body)
        lines = [f"HTTP/1.1 {answer.status} X", *answer.headers, f"Content-Length: {len(body)}"]
        self.transport.write("\r\n".join([*lines, "", body]).encode())


# ---- Right sellers; the proof can't judge all of them


class Fast(Seller):
    says = "PROVEN"


class SometimesBusy(Seller):
    """One answer in twenty is 503 with Retry-After."""

    says, tests = "PROVEN", "2-3"

    def answer(self, request: Request) -> Answer:
        busy = Answer(503, {"message": "busy"}, ("Retry-After: 1",))
        return busy if random.random() < 0.05 else super().answer(request)


class Cached(Seller):
    """Behind a cache of a second for readings and 410s without a key; it counts whole ones."""

    says, tests = "PROVEN", "1-3"
    arguments = ("--cache-age", "1")

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, tuple[int, Answer]] = {}

    def answer(self, request: Request) -> Answer:
        until, cached = self.cache.get(request.path, (0, None))
        if cached and not request.key and int(time.monotonic()) <= until:
            return cached
        answer = super().answer(request)
        if request.path == "/inventory" or (answer.status == 410 and not request.key):
            self.cache[request.path] = int(time.monotonic()) + 1, answer
        return answer


class Queueing(Seller):
    """Serves one after the other: those who come together wait."""

    service_s = 0.001

    def __init__(self) -> None:
        super().__init__()
        self.free_at = 0.0

    def wait_s(self) -> float:
        now = time.monotonic()
        self.free_at = max(now, self.free_at) + self.service_s
        return self.free_at - now


class Slow(Queueing):
    """20 requests a second."""

    word, says = 2, "1000 orders were not served"
    service_s = 0.05


class Pausing(Seller):
    word, says = 2, "100 orders were not served"

    def sell(self, customer: str, key: str | None) -> Answer:
        if self.stock == 50 and len(self.purchases) == 50:
            time.sleep(35)
        return super().sell(customer, key)


class RateLimited(Seller):
    """As many as deploy/nginx.conf allows an address: 10 a second, 20 more at once."""

    word, says = 2, "purchases were answered 429: lift the rate limit for this address"
    rate, burst = 10, 20

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.at = float(self.burst), time.monotonic()

    def answer(self, request: Request) -> Answer:
        now = time.monotonic()
        self.tokens = min(self.burst, self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens < 1:
            return Answer(429, {"message": "Too many requests from this address"})
        self.tokens -= 1
        return super().answer(request)


class BehindProxy(Seller):
    word, says = 2, "was answered 403 by nginx, which stands in front (This is not open)"

    def reset(self, request: Request) -> Answer:
        return Answer(403, {"message": "This is not open"}, ("Server: nginx",))


class WithoutReset(Seller):
    word, says = 2, "start that server with ALLOW_RESET=1"

    def reset(self, request: Request) -> Answer:
        message = "Reset is switched off - start the service with ALLOW_RESET=1 to allow it."
        return Answer(403, {"message": message})


class AuditInText(Seller):
    word, says = 2, "GET /audit: expected a whole number current_stock; came 200"

    def audit(self, request: Request) -> Answer:
        return Answer(200, super().audit(request).body | {"current_stock": "0"})


class AuditOfNull(Seller):
    word, says = 2, "GET /audit: expected a whole number purchase_records; came 200"

    def audit(self, request: Request) -> Answer:
        return Answer(200, super().audit(request).body | {"purchase_records": None})


class AnotherDialect(Seller):
    """As many public systems: 409 when it is sold out."""

    word, says = 2, 'POST /buy_ticket: expected 410 with "remaining_stock": 0; came 409'

    def sold_out(self) -> Answer:
        return Answer(409, {"error": "no stock"})


class NotOpenYet(Seller):
    word, says = 2, 'came 403 {"message": "The sale opens at noon"}'

    def buy_ticket(self, request: Request) -> Answer:
        return Answer(403, {"message": "The sale opens at noon"}, ("Retry-After: 3600",))


# ---- Wrong sellers


class KeysWithoutCase(Seller):
    word, says, tests = 1, "unaccounted answer", "4"

    def buy_ticket(self, request: Request) -> Answer:
        return super().buy_ticket(with_key(request, (request.key or "").lower()))


class KeysCut(Seller):
    """At 64 characters."""

    word, says, tests = 1, "unaccounted answer", "4"

    def buy_ticket(self, request: Request) -> Answer:
        return super().buy_ticket(with_key(request, (request.key or "")[:64]))


def with_key(request: Request, key: str) -> Request:
    return request._replace(headers=request.headers | {"idempotency-key": key}) if key else request


class StockOfConnection(Seller):
    """What a connection saw first is its stock."""

    word, says, tests = 1, "duplicate level", "4"

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def buy_ticket(self, request: Request) -> Answer:
        truth = self.stock
        self.stock = self.seen.setdefault(request.connection, truth)
        answer = super().buy_ticket(request)
        self.seen[request.connection] = self.stock
        self.stock = min(truth, self.stock)
        return answer


class StrangersReplayed(Seller):
    word, says, tests = 1, "one key, two customers", "4"

    def refuse_stranger(self, told: JSON) -> Answer:
        return self.replay(told)


class OnePurchaseOfCustomer(Seller):
    """A second purchase without a key is answered like the first, and not made."""

    word, says, tests = 1, "duplicate level", "1"

    def sell(self, customer: str, key: str | None) -> Answer:
        for owner, told in self.purchases.values():
            if owner == customer and key is None:
                return Answer(200, told)
        return super().sell(customer, key)


class WrongInitialStock(Seller):
    word, says, tests = 1, "wrong figures", "1"

    def inventory(self, request: Request) -> Answer:
        return Answer(200, super().inventory(request).body | {"initial_stock": self.stock})


class WrongTotalPurchases(Seller):
    word, says, tests = 1, "wrong figures", "1"

    def inventory(self, request: Request) -> Answer:
        return Answer(200, super().inventory(request).body | {"total_purchases": 0})


class WrongInitialStockInAudit(Seller):
    word, says, tests = 1, "wrong figures", "1"

    def audit(self, request: Request) -> Answer:
        return Answer(200, super().audit(request).body | {"initial_stock": STOCK + 1})


class ConsistentWhateverHappens(Seller):
    """Nothing is wrong but that one word."""

    word, says, tests = 1, "wrong figures", "1"

    def audit(self, request: Request) -> Answer:
        return Answer(200, super().audit(request).body | {"consistent": False})


class WrongInACrowd(Queueing):
    """When more than 150 wait it sells without a look at the stock."""

    word, says, tests = 1, "oversold", "2-3"
    service_s = 0.003

    def sold_out(self) -> Answer:
        return self.sell("anybody", None) if self.in_flight > IN_FLIGHT else super().sold_out()


QUICK = (
    Fast,
    SometimesBusy,
    Cached,
    RateLimited,
    BehindProxy,
    WithoutReset,
    AuditInText,
    AuditOfNull,
    AnotherDialect,
    NotOpenYet,
    KeysWithoutCase,
    KeysCut,
    StockOfConnection,
    StrangersReplayed,
    OnePurchaseOfCustomer,
    WrongInitialStock,
    WrongTotalPurchases,
    WrongInitialStockInAudit,
    ConsistentWhateverHappens,
    WrongInACrowd,
)
LONG = (Slow, Pausing)  # half a minute each
SELLERS = {seller.__name__: seller for seller in QUICK + LONG}


@contextmanager
def selling(seller: Seller, port: int = 0) -> Iterator[str]:
    """Its URL. It sells in a thread of this process until the block ends."""
    loop = asyncio.new_event_loop()
    transports: set[asyncio.Transport] = set()
    server = loop.run_until_complete(
        loop.create_server(lambda: Connection(seller, transports), "127.0.0.1", port, backlog=4096)
    )

    def stop() -> None:
        server.close()
        for transport in transports:
            transport.abort()
        loop.call_soon(loop.stop)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stop)
        thread.join()
        loop.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seller", choices=SELLERS, default="Fast")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with selling(SELLERS[given.seller](), given.port) as url:
        print(f"{given.seller} sells at {url}")
        threading.Event().wait()
