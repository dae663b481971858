"""Proves that a running service sells every unit exactly once, or shows where it doesn't.

    python proof_of_correctness.py              starts a server of its own where none answers
    python proof_of_correctness.py --url URL    judges a server started by hand (with ALLOW_RESET=1)

How: crowds of buyers stand at a barrier, are let go at once, and write down a history: who asked when, what
was answered when. A checker, a pure function, decides whether one counter that sells one unit at a time could
have given these answers within these intervals (linearizability), and whether the database's records agree.
First of all, a seller without a lock has to fail that very check.

What it proves: that these histories, on this machine, were correct: nothing sold twice, nothing kept back,
nothing lost when workers were killed. What it doesn't: that no other history goes wrong; that a 200 survives
a power cut (after kill -9 the kernel still writes); that /audit tells the truth; anything about more hosts.

Exit status: 0 proven, 1 a violation was found, 2 it could not be judged.
"""

import argparse
import html
import http.client
import http.server
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate, count
from math import inf, log10
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

REQUEST_TIMEOUT_S = 30  # longer than the service's own lock timeout
BARRIER_TIMEOUT_S = 60
SALE_TIMEOUT_S = 40  # afterwards no buyer asks again
START_TIMEOUT_S, STOP_TIMEOUT_S = 30, 10
RETRY_SLEEP_S = 0.02
READERS, READING_PAUSE_S, FINAL_READINGS = 2, 0.003, 8
BUYERS_MAX, PROCESSES_MAX = 5_000, 32
IN_FLIGHT_SHARE = 0.1  # a tenth of the buyers have to be in flight at once: 100 of 1,000
KEYED_THREADS = 32
CONTROL_BUYERS, CONTROL_STOCK, CONTROL_SALES_MAX = 50, 10, 20
RETRY_SALES = 10  # many small sales: a race for the last unit happens once in each
CRASH_BUYERS, CRASH_STOCK, CRASH_SALES_MAX = 900, 800, 60
KILLS_NEEDED, KILL_PAUSE_MIN_S, KILL_PAUSE_MAX_S = 10, 0.03, 0.15
VIOLATIONS_SHOWN = 5
LOCAL = ("127.0.0.1", 0)  # any free port
RULE = "=" * 60

SOLD, SOLD_OUT, BUSY, LOST = 200, 410, 503, 0  # LOST: no answer came, the outcome is unknown


# ---- The history: what buyers wrote down -------------------------------------------------------------------


class Attempt(NamedTuple):
    """One request to buy. Times in seconds on time.monotonic(), one clock for all processes of a host."""

    process: int
    thread: int
    customer: str
    key: str | None
    start: float
    end: float
    status: int
    remaining_stock: int | None = None
    purchase_id: int | None = None

    @property
    def understood(self) -> bool:
        if self.status == SOLD:
            return self.remaining_stock is not None and self.purchase_id is not None
        return self.status in (BUSY, LOST) or (self.status, self.remaining_stock) == (SOLD_OUT, 0)


class Reading(NamedTuple):
    start: float
    end: float
    stock: int


class Audit(NamedTuple):
    """Taken when all is over: the stock, and the purchase records counted."""

    start: float
    end: float
    stock: int
    records: int


@dataclass
class History:
    initial_stock: int
    attempts: list[Attempt]
    readings: list[Reading]
    audit: Audit | None  # None: the server didn't answer any more
    client_load: float  # of the busiest client process; 1.0 is one core
    kills: list[float] = field(default_factory=list)


# ---- The checker: a pure function of the history -----------------------------------------------------------


class Kind(StrEnum):
    OVERSOLD = "oversold"
    UNDERSOLD = "undersold"
    DUPLICATE_LEVEL = "duplicate level"
    LOST_PURCHASE = "lost purchase"
    PHANTOM_PURCHASE = "phantom purchase"
    CHANGED_ANSWER = "one key, different answers"
    NOT_LINEARIZABLE = "not linearizable"
    UNACCOUNTED_ANSWER = "unaccounted answer"


class Violation(NamedTuple):
    kind: Kind
    message: str


class Purchase(NamedTuple):
    """All attempts with one key, or one attempt without, by what they were told."""

    customer: str
    sold: list[Attempt]
    sold_out: list[Attempt]
    unclear: list[Attempt]  # no answer, or none that is understood

    @property
    def may_be_sold(self) -> bool:
        """Nobody knows. (After a 410 it is known: the key wasn't sold before, and stock never rises.)"""
        return bool(self.unclear) and not self.sold and not self.sold_out


class Event(NamedTuple):
    """Something that happened at one moment from start to end."""

    start: float
    end: float
    name: str


def check(
    initial_stock: int,
    attempts: Sequence[Attempt],
    readings: Sequence[Reading],
    audit: Audit | None,
) -> list[Violation]:
    """All that is wrong with this history; nothing if and only if it is linearizable. O(n log n)."""
    purchases = by_purchase(attempts)
    last = [Reading(audit.start, audit.end, audit.stock)] if audit else []
    return [
        *check_answers(attempts, purchases),
        *check_totals(initial_stock, purchases, audit),
        *check_order(initial_stock, purchases, [*readings, *last]),
    ]


def by_purchase(attempts: Iterable[Attempt]) -> list[Purchase]:
    groups = defaultdict[str | int, list[Attempt]](list)
    for number, attempt in enumerate(attempts):
        groups[attempt.key or number].append(attempt)
    return [
        Purchase(
            group[0].customer,
            [a for a in group if a.status == SOLD and a.understood],
            [a for a in group if a.status == SOLD_OUT],
            [a for a in group if a.status == LOST or not a.understood],
        )
        for group in groups.values()
    ]


def check_answers(
    attempts: Iterable[Attempt], purchases: Iterable[Purchase]
) -> Iterator[Violation]:
    for a in attempts:
        if not a.understood:
            answer = f"{a.status}, remaining_stock {a.remaining_stock}, purchase_id {a.purchase_id}"
            yield Violation(Kind.UNACCOUNTED_ANSWER, f"{a.customer} was answered {answer}")
    owners: dict[int | None, str] = {}
    for p in purchases:
        told = {f"purchase {a.purchase_id} left {a.remaining_stock}" for a in p.sold}
        told |= {"SOLD OUT" for _ in p.sold_out}
        if len(told) > 1:
            yield Violation(
                Kind.CHANGED_ANSWER, f"{p.customer} was told: {', '.join(sorted(told))}"
            )
        for number in {a.purchase_id for a in p.sold}:
            if owners.setdefault(number, p.customer) != p.customer:
                message = f"purchase {number} was told to {owners[number]} and to {p.customer}"
                yield Violation(Kind.LOST_PURCHASE, message)


def check_totals(
    initial: int, purchases: Sequence[Purchase], audit: Audit | None
) -> Iterator[Violation]:
    sold = sum(bool(p.sold) for p in purchases)
    perhaps = sum(p.may_be_sold for p in purchases)
    if sold > initial:
        yield Violation(Kind.OVERSOLD, f"{sold} purchases of {initial} units were acknowledged")
    if audit is None:
        return
    facts = f"{sold} purchases acknowledged, {perhaps} unclear, {audit.records} in the database"
    if audit.records < sold:
        yield Violation(Kind.LOST_PURCHASE, facts)
    if audit.records > sold + perhaps:
        yield Violation(Kind.PHANTOM_PURCHASE, facts)
    if audit.stock + audit.records != initial:
        kind = Kind.OVERSOLD if audit.stock + audit.records > initial else Kind.UNDERSOLD
        yield Violation(kind, f"{audit.stock} left + {audit.records} sold is not {initial}")
    if audit.stock > 0 and any(p.sold_out for p in purchases):
        yield Violation(
            Kind.UNDERSOLD, f"buyers were told SOLD OUT, and {audit.stock} units are left"
        )


def check_order(
    initial: int, purchases: Iterable[Purchase], readings: Iterable[Reading]
) -> Iterator[Violation]:
    """Whether the answers fit one counter that goes down by one with each sale."""
    sales: dict[int, Event] = {}  # by the level that they left
    seen = defaultdict[int, list[Event]](list)
    unclear: list[Event] = []
    for p in purchases:
        start = min(
            (a.start for a in p.sold + p.unclear), default=inf
        )  # any of these can have been the sale
        seen[0] += [Event(a.start, a.end, f"the SOLD OUT of {p.customer}") for a in p.sold_out]
        for level in {a.remaining_stock for a in p.sold if a.remaining_stock is not None}:
            sale = Event(
                start, min(a.end for a in p.sold), f"the sale to {p.customer} that left {level}"
            )
            if level in sales:
                yield Violation(Kind.DUPLICATE_LEVEL, f"{sales[level].name}, and {sale.name}")
            elif not 0 <= level < initial:
                yield Violation(Kind.OVERSOLD, f"{sale.name}, of {initial} units")
            else:
                sales[level] = sale
        if p.may_be_sold:
            unclear.append(Event(start, inf, f"the unanswered purchase of {p.customer}"))
    for start, end, stock in readings:
        if 0 <= stock <= initial:
            seen[stock].append(Event(start, end, f"the reading of stock {stock}"))
        else:
            yield Violation(Kind.OVERSOLD, f"a reading of stock {stock}, of {initial} units")
    yield from walk_down(initial, sales, seen, sorted(unclear))


def walk_down(
    initial: int, sales: dict[int, Event], seen: dict[int, list[Event]], unclear: Iterable[Event]
) -> Iterator[Violation]:
    """Every level from the initial stock down, each left as early as it can be.

    The moment when the counter leaves a level is bounded from below by the moment before and by the starts
    of the sale and of the readings of that level; from above by ends. So the earliest choice is the best for
    all that follow, and the history is linearizable if and only if it breaks no end. A level that no answer
    tells of was left by the unclear purchase that started first: having no end, any two can change places.
    """
    spare = deque(unclear)
    lowest = min([*sales, *(level for level in seen if seen[level])], default=initial)
    since = Event(
        -inf, inf, "the beginning"
    )  # what keeps the counter from having had this level earlier

    def too_early(event: Event) -> Violation:
        message = f"{event.name} ended {since.start - event.end:.6f} s before {since.name} began"
        return Violation(Kind.NOT_LINEARIZABLE, message)

    for level in range(initial, lowest - 1, -1):
        here = seen.get(level, [])
        yield from (too_early(event) for event in here if event.end < since.start)
        if level == lowest:
            return
        sale = sales.get(level - 1) or (spare.popleft() if spare else None)
        if sale is None:
            message = (
                f"nobody was told {level - 1}, and yet the stock fell from {level} to {lowest}"
            )
            yield Violation(Kind.NOT_LINEARIZABLE, message)
            return
        since = max([since, *here, sale], key=lambda event: event.start)
        if sale.end < since.start:
            yield too_early(sale)
            since = sale


# ---- The buyers: they make the history ---------------------------------------------------------------------

Order = tuple[str, str | None]  # customer, idempotency key


class Crowd(NamedTuple):
    """The buyers of one process: a thread for each row of orders, which it sends one after the other."""

    url: str
    process: int
    rows: Sequence[Sequence[Order]]
    retry: bool = False  # until the answer is 200 or 410
    progress_every: int = 0


class CannotJudge(Exception):
    """Why, in one line."""


class NoAnswer(CannotJudge):
    """Nobody answers there."""


everyone: Any = None  # the barrier of all processes; the threads of each have one of their own


def join_everyone(barrier: Any) -> None:
    global everyone
    everyone = barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    allow_many_connections()


def allow_many_connections() -> None:
    with suppress(ImportError, ValueError, OSError):  # Windows knows no such limit
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * BUYERS_MAX), hard))


def connection_to(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=REQUEST_TIMEOUT_S)


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    url: str,
    body: str | None,
    headers: dict[str, str],
) -> tuple[float, float, int, dict[str, Any]]:
    """One request and the JSON object that answered it: start, end, status, answer."""
    start = time.monotonic()
    try:
        connection.request(method, urlsplit(url).path, body, headers)
        response = connection.getresponse()
        text, status = response.read(), response.status
    except (OSError, http.client.HTTPException):
        text, status = b"", LOST
    end = time.monotonic()
    connection.close()  # the next request opens it again
    with suppress(ValueError):
        if isinstance(answer := json.loads(text), dict):
            return start, end, status, answer
    return start, end, status, {}


def whole_number(value: object) -> int | None:
    return value if type(value) is int else None


def buy(crowd: Crowd, thread: int, order: Order, connection: http.client.HTTPConnection) -> Attempt:
    customer, key = order
    headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
    body = json.dumps({"customer_id": customer})
    start, end, status, answer = exchange(
        connection, "POST", crowd.url + "/buy_ticket", body, headers
    )
    left, number = (
        whole_number(answer.get("remaining_stock")),
        whole_number(answer.get("purchase_id")),
    )
    return Attempt(crowd.process, thread, customer, key, start, end, status, left, number)


def run_crowd(crowd: Crowd) -> tuple[list[Attempt], float]:
    """All connect, wait for one another, and buy. The second figure is how busy this process was."""
    began: list[float] = []
    answered = count(1)

    def open_gate() -> None:
        if everyone:
            everyone.wait(BARRIER_TIMEOUT_S)
        began.extend((time.monotonic(), time.process_time()))

    def buy_row(thread: int) -> list[Attempt]:
        attempts: list[Attempt] = []
        connection = connection_to(crowd.url)
        with suppress(OSError):  # then it connects behind the barrier
            connection.connect()
        gate.wait(BARRIER_TIMEOUT_S)
        for order in crowd.rows[thread]:
            while time.monotonic() < began[0] + SALE_TIMEOUT_S:
                attempts.append(buy(crowd, thread, order, connection))
                if not crowd.retry or attempts[-1].status not in (LOST, BUSY):
                    break
                time.sleep(RETRY_SLEEP_S)
            if crowd.progress_every and (done := next(answered)) % crowd.progress_every == 0:
                sys.stdout.write(f"Progress: {done}/{len(crowd.rows)}\n")
        return attempts

    gate = threading.Barrier(len(crowd.rows), open_gate)
    with ThreadPoolExecutor(len(crowd.rows)) as pool:
        history = [attempt for row in pool.map(buy_row, range(len(crowd.rows))) for attempt in row]
    return history, (time.process_time() - began[1]) / max(time.monotonic() - began[0], 1e-9)


def run_crowds(crowds: Sequence[Crowd]) -> tuple[list[Attempt], float]:
    """One crowd in this process, several in a process each, started in the one way that Windows knows."""
    try:
        if len(crowds) == 1:
            return run_crowd(crowds[0])
        spawn = multiprocessing.get_context("spawn")
        together = spawn.Barrier(len(crowds))
        with ProcessPoolExecutor(len(crowds), spawn, join_everyone, (together,)) as pool:
            results = list(pool.map(run_crowd, crowds))
    except (RuntimeError, OSError) as error:  # a broken barrier, a thread too many
        raise CannotJudge(f"the buyers did not get together: {error!r}") from error
    return [attempt for history, _ in results for attempt in history], max(
        load for _, load in results
    )


class Api(NamedTuple):
    """The calls around a sale."""

    url: str

    def call(self, method: str, path: str, body: dict[str, int] | None = None) -> dict[str, Any]:
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy between buyer and seller
                response = session.request(
                    method, self.url + path, json=body, timeout=REQUEST_TIMEOUT_S
                )
        except requests.RequestException as error:
            kind = NoAnswer if isinstance(error, requests.ConnectionError) else CannotJudge
            raise kind(f"{method} {self.url}{path}: no answer ({type(error).__name__})") from error
        if response.status_code == 403:
            raise CannotJudge(
                f"{method} {path} is switched off there: start that server with ALLOW_RESET=1"
            )
        with suppress(ValueError):
            if response.status_code == 200 and isinstance(answer := response.json(), dict):
                return answer
        answered = f"{method} {path} was answered {response.status_code} {response.text[:60]!r}"
        raise CannotJudge(f"what is at {self.url} is not this API, or not well: {answered}")

    def check_health(self) -> None:
        if self.call("GET", "/health").get("status") != "ok":
            raise CannotJudge(f"what is at {self.url} is not this API")

    def reset(self, stock: int) -> None:
        if self.call("POST", "/reset", {"stock": stock}).get("current_stock") != stock:
            raise CannotJudge(f"POST /reset did not set the stock to {stock}")

    def read_stock(self) -> list[Reading]:
        """One reading, or none if the connection was lost."""
        start, end, _, answer = exchange(
            connection_to(self.url), "GET", self.url + "/inventory", None, {}
        )
        stock = whole_number(answer.get("current_stock"))
        return [] if stock is None else [Reading(start, end, stock)]

    def audit(self) -> Audit | None:
        start = time.monotonic()
        with suppress(CannotJudge, KeyError, TypeError, ValueError):
            figures = self.call("GET", "/audit")
            return Audit(
                start, time.monotonic(), figures["current_stock"], int(figures["purchase_records"])
            )
        return None


def hold_sale(
    api: Api,
    stock: int,
    crowds: Sequence[Crowd],
    trouble: Callable[[threading.Event], None] | None = None,
) -> History:
    """Reset, let everyone buy, read the stock meanwhile, and count when all is over."""
    orders = [order for crowd in crowds for row in crowd.rows for order in row]
    readings: list[Reading] = []
    over = threading.Event()

    def watch(over: threading.Event) -> None:
        while not over.wait(READING_PAUSE_S):
            readings.extend(api.read_stock())

    api.reset(stock)
    print(f"Inventory reset to {stock} units")
    print(f"Launching {len(orders)} concurrent purchase attempts...", flush=True)
    with ThreadPoolExecutor() as helpers:
        for job in [*[watch] * READERS, *([trouble] if trouble else [])]:
            helpers.submit(job, over)
        try:
            attempts, load = run_crowds(crowds)
        finally:
            over.set()
    if len(by_purchase(attempts)) < len(set(orders)):
        raise CannotJudge(f"after {SALE_TIMEOUT_S} s some buyers were still waiting")
    readings += [reading for _ in range(FINAL_READINGS) for reading in api.read_stock()]
    return History(stock, attempts, readings, api.audit(), load)


# ---- The tests ---------------------------------------------------------------------------------------------


PASSED, FAILED, INCONCLUSIVE, SKIPPED = "PASSED", "FAILED", "INCONCLUSIVE", "SKIPPED"


@dataclass
class Result:
    number: int
    title: str
    verdict: str
    checks: list[tuple[bool, str]]
    violations: list[Violation] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)


def run_tests(api: Api, options: argparse.Namespace, server_pid: int | None) -> Iterator[Result]:
    """The same seed gives the same orders, repeats and pauses between kills."""
    stock, buyers, processes = options.stock, options.buyers, options.processes
    chance = random.Random(options.seed)

    with naive_shop() as shop:
        title = f"NEGATIVE CONTROL ({CONTROL_BUYERS} buyers, {CONTROL_STOCK} tickets, no lock)"
        yield judge(0, title, until_caught(shop))

    few = min(stock, buyers)
    crowds = [Crowd(api.url, 0, single_orders(few), progress_every=100)]
    yield judge(1, f"BASIC CONCURRENCY ({few} buyers, {stock} tickets)", sales(api, stock, crowds))

    crowds = [Crowd(api.url, 0, single_orders(buyers), progress_every=100)]
    yield judge(
        2, f"OVERSELLING PREVENTION ({buyers} buyers, {stock} tickets)", sales(api, stock, crowds)
    )

    each = max(1, buyers // processes)
    crowds = [Crowd(api.url, n, single_orders(each, f"_of_process_{n}")) for n in range(processes)]
    title = f"MULTIPLE PROCESSES ({processes} processes, {each} attempts each, {stock} tickets)"
    yield judge(3, title, sales(api, stock, crowds))

    each = max(1, buyers // RETRY_SALES)
    few = max(1, each * 4 // 5)
    rows = [repeating_rows(f"retry-{sale}", each, chance) for sale in range(RETRY_SALES)]
    plans = [[Crowd(api.url, 0, row, retry=True)] for row in rows]
    title = f"RETRIES WITH A KEY ({RETRY_SALES} sales, {each} buyers and {few} tickets each)"
    yield judge(4, title, sales(api, few, *plans))

    title = f"CRASH (sales with {CRASH_BUYERS} buyers and {CRASH_STOCK} tickets, workers killed)"
    if server_pid is not None and workers_of(server_pid):
        yield judge(5, title, crash_sales(api, server_pid, chance))
    else:
        yield Result(5, title, SKIPPED, [(False, "no server of its own, or no workers to kill")])


def single_orders(buyers: int, suffix: str = "") -> list[list[Order]]:
    return [[(f"customer_{number}{suffix}", None)] for number in range(buyers)]


def keyed_orders(name: str, buyers: int, threads: int) -> list[list[Order]]:
    orders: list[Order] = [(f"customer_{number}", f"{name}-{number}") for number in range(buyers)]
    return [orders[thread::threads] for thread in range(min(threads, buyers))]


def repeating_rows(name: str, buyers: int, chance: random.Random) -> list[list[Order]]:
    """Two threads send each row at once; now and then an order is followed by one that was sent before."""
    rows = keyed_orders(name, buyers, KEYED_THREADS // 2)
    for row in rows:
        for place in range(len(row), 0, -1):
            row[place:place] = chance.choices(row[:place], k=chance.randrange(2))
    return rows + rows


def sales(api: Api, stock: int, *plans: Sequence[Crowd]) -> Iterator[History]:
    for crowds in plans:
        yield hold_sale(api, stock, crowds)


def until_caught(shop: Api) -> Iterator[History]:
    for _ in range(CONTROL_SALES_MAX):
        history = hold_sale(
            shop, CONTROL_STOCK, [Crowd(shop.url, 0, single_orders(CONTROL_BUYERS))]
        )
        yield history
        if find_violations([history]):
            return


def crash_sales(api: Api, server_pid: int, chance: random.Random) -> Iterator[History]:
    """Workers are killed at random moments, sale after sale, until enough kills have hit one in progress."""
    landed = 0
    kills: list[float] = []

    def kill_workers(over: threading.Event) -> None:
        kills.clear()
        while len(kills) < KILLS_NEEDED and not over.wait(
            chance.uniform(KILL_PAUSE_MIN_S, KILL_PAUSE_MAX_S)
        ):
            with suppress(IndexError, ProcessLookupError):  # none is left, or just ended
                os.kill(chance.choice(workers_of(server_pid)), signal.SIGKILL)
                kills.append(time.monotonic())

    for number in range(CRASH_SALES_MAX):
        rows = keyed_orders(f"crash-{number}", CRASH_BUYERS, KEYED_THREADS)
        history = hold_sale(api, CRASH_STOCK, [Crowd(api.url, 0, rows, retry=True)], kill_workers)
        history.kills = [kill for kill in kills if in_mid_sale(history, kill)]
        landed += len(history.kills)
        yield history
        if landed >= KILLS_NEEDED:
            return


def in_mid_sale(history: History, moment: float) -> bool:
    """Some tickets were sold before and some after, and some attempt was in flight."""
    sold = [a for a in history.attempts if a.status == SOLD]
    before, after = any(a.end < moment for a in sold), any(a.start > moment for a in sold)
    return before and after and any(a.start < moment < a.end for a in history.attempts)


def find_violations(histories: Iterable[History]) -> list[Violation]:
    return [v for h in histories for v in check(h.initial_stock, h.attempts, h.readings, h.audit)]


def judge(number: int, title: str, sales_of_test: Iterator[History]) -> Result:
    """Hold the sales of one test and say what came of it. The negative control passes by being caught."""
    print(f"\n{RULE}\nTEST {number}: {title}\n{RULE}")
    histories: list[History] = []
    try:
        histories.extend(sales_of_test)
    except CannotJudge:
        if not find_violations(histories):  # what was found before the server died is found
            raise
    violations = find_violations(histories)
    if number == 0:
        kinds = ", ".join(sorted({v.kind for v in violations})) or "it did not"
        checks = [(bool(violations), f"The checker catches a seller without a lock: {kinds}")]
    else:
        checks = verify(histories, violations)
    if number == 5:
        kills = sum(len(h.kills) for h in histories)
        checks.append(
            (kills >= KILLS_NEEDED, f"{kills} workers killed in mid-sale ({KILLS_NEEDED} needed)")
        )
    proven, unmet = all(ok for ok, _ in checks), FAILED if violations else INCONCLUSIVE
    return Result(number, title, PASSED if proven else unmet, checks, violations, histories)


def verify(histories: Sequence[History], violations: Sequence[Violation]) -> list[tuple[bool, str]]:
    """The equalities, as lines to read. One that isn't met, and yet no violation: nobody can tell."""
    attempts = [a for h in histories for a in h.attempts]
    purchases = [(h, by_purchase(h.attempts)) for h in histories]
    sold = sum(bool(p.sold) for _, group in purchases for p in group)
    wanted = sum(min(h.initial_stock, len(group)) for h, group in purchases)
    unclear = sum(p.may_be_sold for _, group in purchases for p in group)
    left = sum(h.initial_stock for h in histories) - wanted
    stock = sum(h.readings[-1].stock for h in histories if h.readings)
    records = sum(h.audit.records for h in histories if h.audit)
    flying, needed = (
        in_flight_max(attempts),
        IN_FLIGHT_SHARE * len({(a.process, a.thread) for a in attempts}),
    )
    checks = [
        (sold == wanted, f"Exactly {wanted} purchases succeeded", f"it was {sold}"),
        (unclear == 0, f"All {len(attempts)} requests accounted for", f"{unclear} got no answer"),
        (stock == left, f"Final inventory is {left} (not negative!)", f"it is {stock}"),
        (records == wanted, f"Database has exactly {wanted} purchase records", f"it has {records}"),
        (not violations, "History is linearizable", f"{len(violations)} violations"),
    ]
    if not all(h.audit and h.readings for h in histories):
        checks.append((False, "GET /audit and GET /inventory gave figures", "not each time"))
    if flying < needed:
        checks.append(
            (False, f"{needed:.0f} attempts were in flight at once", f"only {flying} were")
        )
    return [(ok, text if ok else f"{text}: {but}") for ok, text, but in checks]


# ---- The sellers: a server of our own, and the negative control --------------------------------------------


def is_postgresql() -> bool:
    return os.environ.get("DATABASE_URL", "").startswith(("postgresql:", "postgres:"))


@contextmanager
def own_server() -> Iterator[tuple[str, int]]:
    """`python app.py` on a free port, ended whatever happens. Its URL and process id.

    Its database is in a temporary folder, unless DATABASE_URL names a PostgreSQL server.
    """
    with tempfile.TemporaryDirectory(prefix="flash-sale-proof-") as folder:
        with socket.create_server(LOCAL) as probe:
            port = str(probe.getsockname()[1])
        settings = {"HOST": "127.0.0.1", "PORT": port, "WEB_CONCURRENCY": "4"}
        if not is_postgresql():
            settings["ALLOW_RESET"] = "1"
            settings["DATABASE_URL"] = f"sqlite:///{Path(folder, 'inventory.db').as_posix()}"
        log = Path(folder, "server.log")
        command = [sys.executable, str(Path(__file__).with_name("app.py"))]
        with log.open("wb") as file:
            server = subprocess.Popen(
                command, env=os.environ | settings, stdout=file, stderr=file, start_new_session=True
            )
        try:
            wait_until_healthy(Api(f"http://127.0.0.1:{port}"), server)
            yield f"http://127.0.0.1:{port}", server.pid
        finally:
            if server.poll() is not None:
                lines = log.read_text(errors="replace").splitlines()[-9:]
                print("The server ended by itself:", *lines, sep="\n  ")
            stop(server)


def wait_until_healthy(api: Api, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        with suppress(NoAnswer):
            return api.check_health()
        time.sleep(RETRY_SLEEP_S)
    raise CannotJudge("the server did not start")


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOP_TIMEOUT_S)
    with suppress(AttributeError, ProcessLookupError):  # Windows has no sessions
        os.killpg(server.pid, signal.SIGKILL)  # whoever outlived it
    server.wait(STOP_TIMEOUT_S)


def workers_of(pid: int) -> list[int]:
    """The processes below this one that have no children themselves; none where that can't be told."""
    words: list[str] = []
    with suppress(OSError):
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        pgrep = ["pgrep", "-P", str(pid)]  # where there is no /proc
        words = (
            " ".join(lists) or subprocess.run(pgrep, capture_output=True, text=True).stdout
        ).split()
    return [worker for child in map(int, words) for worker in workers_of(child) or [child]]


class NaiveSeller(http.server.BaseHTTPRequestHandler):
    """The negative control: it reads, checks and writes, without a lock. Never sell like this."""

    database = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        with closing(
            sqlite3.connect(self.database, timeout=REQUEST_TIMEOUT_S, isolation_level=None)
        ) as db:
            status, answer = (
                self.sell(db) if self.path == "/buy_ticket" else (200, self.count(db, body))
            )
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def sell(self, db: sqlite3.Connection) -> tuple[int, dict[str, int | None]]:
        (stock,) = db.execute("SELECT stock FROM item").fetchone()
        if stock <= 0:
            return SOLD_OUT, {"remaining_stock": 0}
        db.execute(
            "UPDATE item SET stock = ?", (stock - 1,)
        )  # others have read the same stock meanwhile
        number = db.execute("INSERT INTO purchase DEFAULT VALUES").lastrowid
        return SOLD, {"remaining_stock": stock - 1, "purchase_id": number}

    def count(self, db: sqlite3.Connection, body: dict[str, int]) -> dict[str, int]:
        if "stock" in body:  # POST /reset
            db.execute("UPDATE item SET stock = ?", (body["stock"],))
            db.execute("DELETE FROM purchase")
        stock, records = db.execute(
            "SELECT stock, (SELECT count(*) FROM purchase) FROM item"
        ).fetchone()
        return {"current_stock": stock, "purchase_records": records}

    def log_message(self, *_: object) -> None:
        pass


class NaiveShop(http.server.ThreadingHTTPServer):
    request_queue_size = 2 * CONTROL_BUYERS


@contextmanager
def naive_shop() -> Iterator[Api]:
    with tempfile.TemporaryDirectory(prefix="flash-sale-control-") as folder:
        NaiveSeller.database = str(Path(folder, "scratch.db"))
        with (
            closing(sqlite3.connect(NaiveSeller.database)) as db,
            NaiveShop(LOCAL, NaiveSeller) as shop,
        ):
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                "CREATE TABLE item (stock); CREATE TABLE purchase (id INTEGER PRIMARY KEY)"
            )
            db.executescript("INSERT INTO item VALUES (0)")
            threading.Thread(target=shop.serve_forever).start()
            try:
                yield Api(f"http://127.0.0.1:{shop.server_port}")
            finally:
                shop.shutdown()


# ---- The report --------------------------------------------------------------------------------------------

OUTCOMES = {SOLD: "sold", SOLD_OUT: "sold-out", BUSY: "busy", LOST: "lost"}
COLUMNS = ("attempts", "sold", "sold_out", "throughput_per_s", "p50_ms", "p99_ms", "in_flight_max")
Segment = tuple[
    str, float, float, float, float
]  # CSS class, x and y of one end, x and y of the other


def outcome(attempt: Attempt) -> str:
    return OUTCOMES[attempt.status] if attempt.understood else "odd"


def in_flight_max(attempts: Iterable[Attempt]) -> int:
    steps = sorted([(a.start, 1) for a in attempts] + [(a.end, -1) for a in attempts])
    return max(accumulate(step for _, step in steps), default=0)


def figures_of(result: Result) -> dict[str, Any]:
    attempts = [a for h in result.histories for a in h.attempts]
    if not attempts:
        return {}
    outcomes = Counter(map(outcome, attempts))
    total_s = sum(
        max(a.end for a in h.attempts) - min(a.start for a in h.attempts) for h in result.histories
    )
    total_s = max(total_s, 1e-9)  # a clock may be coarse
    times_ms = sorted(1000 * (a.end - a.start) for a in attempts)
    load = max(h.client_load for h in result.histories)
    return {
        "attempts": len(attempts),
        "total_s": total_s,
        "throughput_per_s": len(attempts) / total_s,
        "sold": outcomes["sold"],
        "sold_out": outcomes["sold-out"],
        "busy": outcomes["busy"],
        "errors": outcomes["lost"] + outcomes["odd"],
        "average_ms": sum(times_ms) / len(times_ms),
        "min_ms": times_ms[0],
        "p50_ms": times_ms[len(times_ms) // 2],
        "p99_ms": times_ms[len(times_ms) * 99 // 100],
        "max_ms": times_ms[-1],
        "in_flight_max": max(in_flight_max(h.attempts) for h in result.histories),
        "readings": sum(len(h.readings) for h in result.histories),
        "rounds": len(result.histories),
        "kills_in_mid_sale": sum(len(h.kills) for h in result.histories),
        "client_load": load,
        "limited_by": "the client"
        if load > 0.9
        else "the server"
        if load < 0.6
        else "can't be told",
    }


RESULTS = """\
RESULTS:
  Total time: {total_s:.2f}s
  Throughput: {throughput_per_s:.2f} requests/second
  Successful purchases: {sold}
  Sold out responses: {sold_out}
  Server busy responses: {busy}
  Errors: {errors}{note}
  Response times: average {average_ms:.1f}ms  min {min_ms:.1f}ms  \
p50 {p50_ms:.1f}ms  p99 {p99_ms:.1f}ms  max {max_ms:.1f}ms
  In flight at once: {in_flight_max}
  Limited by: {limited_by} (the client kept {client_load:.0%} of a core busy)

VERIFICATION:"""


def print_result(result: Result) -> None:
    if result.verdict == SKIPPED:
        print(f"\nTEST {result.number} SKIPPED: {result.checks[0][1]}")
        return
    note = (
        " (lost with a killed worker, asked again)"
        if any(h.kills for h in result.histories)
        else ""
    )
    print(RESULTS.format(**figures_of(result), note=note))
    for ok, text in result.checks:
        print(f"  {'✓' if ok else '✗'} {text}")
    for violation in result.violations[:VIOLATIONS_SHOWN]:
        print(f"    {violation.kind}: {violation.message}")
    if len(result.violations) > VIOLATIONS_SHOWN:
        print(f"    ... and {len(result.violations) - VIOLATIONS_SHOWN} more")
    praise = "! No race conditions detected!" if result.verdict == PASSED and result.number else ""
    print(f"TEST {result.number} {result.verdict}{praise}", flush=True)


def chart(
    title: str, x_name: str, y_name: str, thickness: float, segments: Sequence[Segment]
) -> str:
    """Segments in a frame with axes from 0, one path for each class."""
    x_max = max((max(x, to_x) for _, x, _, to_x, _ in segments), default=1) or 1
    y_max = max((max(y, to_y) for _, _, y, _, to_y in segments), default=1) or 1

    def at(x: float, y: float) -> str:
        return f"{60 + x / x_max * 880:.1f} {260 - y / y_max * 235:.1f}"

    paths = defaultdict[str, list[str]](list)
    for name, x, y, to_x, to_y in segments:
        paths[name].append(f"M{at(x, y)}L{at(to_x, to_y)}")
    marks = []
    for v in ticks(y_max):
        place = at(0, v).split()[1]
        marks.append(
            f'<path class="grid" d="M60 {place}H940"/><text x="52" y="{place}" dy="4">{v:g}</text>'
        )
    marks += [
        f'<text class="x" x="{at(v, 0).split()[0]}" y="278">{v:g}</text>' for v in ticks(x_max)
    ]
    for name, d in paths.items():
        marks.append(f'<path class="{name}" stroke-width="{thickness:.2f}" d="{"".join(d)}"/>')
    names = f'<text x="940" y="296">{x_name}</text><text x="60" y="14" class="y">{y_name}</text>'
    key = '<b><svg viewBox="0 0 20 8"><path class="{0}" stroke-width="4" d="M0 4H20"/></svg>{0}</b>'
    legend = "".join(key.format(name) for name in paths)
    return f'<h3>{title}{legend}</h3><svg viewBox="0 0 960 300" role="img">{"".join(marks)}{names}</svg>'


def ticks(top: float) -> list[float]:
    step = 10.0 ** (log10(top) // 1)
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if top / (step * part) <= 8)
    return [round(number * step, 9) for number in range(int(top / step + 1e-9) + 1)]


def stock_segments(history: History, epoch: float) -> Iterator[Segment]:
    """What the first answer of each sale told, what readings saw, and when workers were killed."""
    firsts = sorted(
        min((a.end, a) for a in p.sold) for p in by_purchase(history.attempts) if p.sold
    )
    now, stock = min(a.start for a in history.attempts) - epoch, history.initial_stock
    for _, a in firsts:
        end, left = a.end - epoch, a.remaining_stock or 0
        yield from (("stock", now, stock, end, stock), ("stock", end, stock, end, left))
        now, stock = end, left
    last = max(a.end for a in history.attempts)
    for start, end, stock in history.readings:
        if epoch < start and end < last:
            yield "reading", start - epoch, stock, end - epoch, stock
    for kill in history.kills:
        yield "kill", kill - epoch, 0, kill - epoch, history.initial_stock


def time_segments(attempts: Sequence[Attempt]) -> Iterator[Segment]:
    """A column for each sixtieth of the longest time, its outcomes on top of each other."""
    width = (max(1000 * (a.end - a.start) for a in attempts) or 1) / 60
    columns = Counter((int(1000 * (a.end - a.start) / width), outcome(a)) for a in attempts)
    base = Counter[int]()
    for (column, name), number in sorted(columns.items()):
        x, y = (column + 0.5) * width, base[column]
        yield name, x, y, x, y + number
        base[column] += number


def draw(result: Result) -> str:
    attempts = sorted((a for h in result.histories for a in h.attempts), key=lambda a: a.end)
    if not attempts:
        return ""
    epoch = min(a.start for a in attempts)
    stock = [segment for h in result.histories for segment in stock_segments(h, epoch)]
    waits = [(outcome(a), a.start - epoch, n, a.end - epoch, n) for n, a in enumerate(attempts)]
    row = max(0.5, 235 / len(waits))
    return (
        chart("Stock over time", "seconds", "units", 1.5, stock)
        + chart("Every attempt from start to end", "seconds", "attempts", row, waits)
        + chart("Response times", "milliseconds", "attempts", 13, list(time_segments(attempts)))
    )


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 14px } tr { border-bottom: 1px solid #8884 }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
h2 { margin: 3rem 0 .5rem; border-top: 1px solid #8888; padding-top: 1rem; font-size: 20px }
h3 { font-size: 15px; margin: 1.2rem 0 0 } h3 b { font-weight: 400; margin-left: 1.2em; font-size: 13px }
h3 svg { width: 22px; margin-right: .3em } ul { list-style: none; padding: 0; margin: .3rem 0 }
svg { width: 100%; font-size: 12px } text { fill: currentColor; text-anchor: end }
text.x { text-anchor: middle } text.y { text-anchor: start }
path { fill: none; stroke: #a855f7 } .grid { stroke: #8884 }
.stock { stroke: #3b82f6 } .reading { stroke: #f59e0b } .kill { stroke: #ef4444; stroke-dasharray: 4 4 }
.sold { stroke: #16a34a } .sold-out { stroke: #94a3b8 } .busy { stroke: #f59e0b } .lost { stroke: #ef4444 }
"""


CAPTION = """The stock is what each answer told, at the moment it arrived: answers overtake each other, so the
line may step up. A reading lasts from its question to its answer; it was true at some moment in between."""


def page(results: Sequence[Result], conclusion: str) -> str:
    """One HTML file that needs no network and no script. The SVG is our own: every mark is a line segment."""
    rows, sections = [], []
    for result in results:
        name, f = f"{result.number} {html.escape(result.title)}", figures_of(result)
        figures = [f"{f[column]:,.0f}" if f else "" for column in COLUMNS]
        rows.append("".join(f"<td>{cell}</td>" for cell in (name, result.verdict, *figures)))
        lines = [f"{'✓' if ok else '✗'} {text}" for ok, text in result.checks]
        lines += [f"{v.kind}: {v.message}" for v in result.violations[:VIOLATIONS_SHOWN]]
        facts = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        sections.append(f"<h2>Test {name}: {result.verdict}</h2><ul>{facts}</ul>{draw(result)}")
    head = "".join(
        f"<th>{column.replace('_', ' ')}</th>" for column in ("test", "verdict", *COLUMNS)
    )
    table = f"<table><tr>{head}</tr><tr>{'</tr><tr>'.join(rows)}</tr></table>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Proof of correctness</title>'
        f"<style>{STYLE}</style><h1>Proof of correctness</h1><p>{html.escape(conclusion)}</p>"
        f"<p>{CAPTION}</p>{table}{''.join(sections)}</html>"
    )


# ---- The command -------------------------------------------------------------------------------------------


def up_to(limit: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not 1 <= int(text) <= limit:
            raise argparse.ArgumentTypeError(f"a whole number from 1 to {limit}, not {text}")
        return int(text)

    return whole


def new_file(text: str) -> Path:
    if not Path(text).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}")
    return Path(text)


def parse_options() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--url", default=env("API_URL", "http://127.0.0.1:8000"), help="the server to judge"
    )
    parser.add_argument(
        "--stock", type=up_to(BUYERS_MAX), default=100, help="tickets in tests 1 to 3"
    )
    buyers, processes = env("TOTAL_REQUESTS", "1000"), env("CONCURRENT_PROCESSES", "4")
    parser.add_argument("--buyers", type=up_to(BUYERS_MAX), default=buyers, help="in tests 2 to 4")
    parser.add_argument(
        "--processes", type=up_to(PROCESSES_MAX), default=processes, help="in test 3"
    )
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 1_000_000, help="same seed, same plan"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--report", type=new_file, metavar="FILE", help="write an HTML page with pictures"
    )
    return parser.parse_args()


def prove(options: argparse.Namespace, results: list[Result]) -> None:
    with ExitStack() as undo:
        api, server_pid = Api(options.url.rstrip("/")), None
        try:
            api.check_health()
            print(f"Judging the server at {api.url}: its purchases will be deleted")
        except NoAnswer:
            url, server_pid = undo.enter_context(own_server())
            print(f"Nobody answers at {api.url}: judging a server of our own at {url}")
            if is_postgresql():
                print(
                    "on the PostgreSQL database that DATABASE_URL names: its purchases will be deleted"
                )
            api = Api(url)
        for result in run_tests(api, options, server_pid):
            results.append(result)
            print_result(result)


def conclude(results: Sequence[Result], reason: str) -> tuple[int, str]:
    failed, unsure = (
        ", ".join(f"test {r.number}" for r in results if r.verdict == verdict)
        for verdict in (FAILED, INCONCLUSIVE)
    )
    if failed:
        return 1, f"NOT CORRECT: violations in {failed}"
    if reason or unsure:
        return 2, f"NOT JUDGED: {reason or unsure + ' inconclusive'}"
    skipped = "".join(f" (test {r.number} skipped)" for r in results if r.verdict == SKIPPED)
    return 0, f"PROVEN: every unit was sold exactly once{skipped}"


def as_json(result: Result) -> dict[str, Any]:
    violations = [violation._asdict() for violation in result.violations]
    told = {"number": result.number, "title": result.title, "verdict": result.verdict}
    return told | {"figures": figures_of(result), "checks": result.checks, "violations": violations}


def main() -> int:
    options = parse_options()
    results: list[Result] = []
    reason = ""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every console can show a check mark
    allow_many_connections()
    try:
        prove(options, results)
    except CannotJudge as error:
        reason = str(error)
    except KeyboardInterrupt:
        reason = "interrupted"
    status, conclusion = conclude(results, reason)
    print(f"\n{RULE}\n{conclusion} (seed {options.seed})")
    if options.json:
        told = {
            "conclusion": conclusion,
            "seed": options.seed,
            "tests": [as_json(r) for r in results],
        }
        options.json.write_text(json.dumps(told, indent=2))
    if options.report:
        options.report.write_text(
            page(results, f"{conclusion} (seed {options.seed})"), encoding="utf-8"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
