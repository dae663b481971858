"""Crowds of buyers: they make the history of a sale."""

from __future__ import annotations

import http.client
import multiprocessing
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import count
from typing import Any, NamedTuple

from proof.api import (
    TOO_LATE,
    Api,
    CannotJudge,
    complete,
    connection_to,
    prepare_purchase,
    whole_number,
)
from proof.checker import find_violations
from proof.history import BUSY, LIMITED, LOST, Attempt, History, Reading
from proof.limits import Job
from proof.orders import Order
from proof.result import crowd_of

SALE_TIMEOUT_S = 40  # afterwards no buyer asks again
BARRIER_TIMEOUT_S = 60
HEAD_START_S = 0.2  # from the barrier to the moment at which all buy: its threads have woken
RETRY_JITTER = 0.5  # of the time to wait, or those refused together come together again
READERS, READING_PAUSE_S, FINAL_READINGS = 2, 0.003, 8
CROWD_TRIES = 3
BUYERS_MAX, PROCESSES_MAX = 5_000, 32


class Crowd(NamedTuple):
    """The buyers of one process: a thread for each row of orders, sent one after the other."""

    url: str
    process: int
    rows: Sequence[Sequence[Order]]
    progress_every: int = 0


def hold_crowded_sale(api: Api, stock: int, crowds: Sequence[Crowd]) -> History:
    """Held again where too few were in flight at once: the server is fast, or the machine busy."""
    for _ in range(CROWD_TRIES - 1):
        history = hold_sale(api, stock, crowds)
        flying, needed = crowd_of(history)
        if flying >= needed or history.unjudged or find_violations([history]):
            return history
        print(f"Only {flying} were in flight at once, and {needed:.0f} are needed: once more")
    return hold_sale(api, stock, crowds)


def hold_sale(
    api: Api,
    stock: int,
    *waves: Sequence[Crowd],
    meanwhile: Callable[[threading.Event, Sequence[Reading]], None] | None = None,
    between: Callable[[], None] | None = None,
) -> History:
    """Reset, let wave after wave of crowds buy, read the stock meanwhile, count when all is over.

    `meanwhile` goes on beside the first wave, until its event is set; `between` comes after it.
    """
    orders = [order for crowds in waves for crowd in crowds for row in crowd.rows for order in row]
    buyers = max(sum(len(crowd.rows) for crowd in crowds) for crowds in waves)
    history = History(stock, [], buyers=buyers, cache_age_s=api.cache_age_s)
    api.reset(stock)
    print(f"Inventory reset to {stock} units")
    time.sleep(api.cache_age_s)
    print(f"Launching {len(orders)} concurrent purchase attempts...", flush=True)
    over, first_over = threading.Event(), threading.Event()
    readers = [Job(read_until, over, api, history.readings) for _ in range(READERS)]
    beside = [Job(meanwhile, first_over, history.readings)] if meanwhile else []
    try:
        for number, crowds in enumerate(waves):
            if number and between:
                between()
            history.attempts += run_crowds(crowds)
            first_over.set()
            for job in beside:
                job.result()
    finally:
        over.set()
        first_over.set()
    uncounted = count_up(api, history, readers)
    history.unjudged = unserved(len(orders), history.attempts) or uncounted
    return history


def count_up(api: Api, history: History, readers: Sequence[Job]) -> str:
    """The last readings and the audit. Returns why they can't be had, or nothing."""
    try:
        for reader in readers:
            reader.result()
        time.sleep(api.cache_age_s)
        history.readings += [r for _ in range(FINAL_READINGS) for r in api.read_stock()]
        history.audit = api.audit()
    except CannotJudge as error:
        return str(error)
    return ""


def read_until(over: threading.Event, api: Api, readings: list[Reading]) -> None:
    with closing(connection_to(api.url)) as connection:
        while not over.wait(READING_PAUSE_S):
            readings.extend(api.read_stock(connection))


def unserved(orders: int, attempts: Sequence[Attempt]) -> str:
    """Why a sale can't be proven: buyers who were never told 200, 410 or 422."""
    limited = sum(a.status == LIMITED for a in attempts)
    if limited:
        told = f"{limited} of {len(attempts)} purchases were answered 429"
        return f"{told}: lift the rate limit for this address"
    missing = orders - sum(a.status not in (BUSY, LOST) for a in attempts)
    if missing <= 0:
        return ""
    notes = Counter(
        "503 to the last" if a.status == BUSY else a.note
        for a in attempts
        if a.status in (BUSY, LOST)
    )
    causes = ", ".join(note for note, _ in notes.most_common(3))
    return f"{missing} of {orders} orders were not served ({causes})"


def run_crowds(crowds: Sequence[Crowd]) -> list[Attempt]:
    """One crowd in this process; several in a process each, started as Windows can, too."""
    try:
        if len(crowds) == 1:
            return run_crowd(crowds[0])
        spawn = multiprocessing.get_context("spawn")
        limit_s = 2 * BARRIER_TIMEOUT_S + 2 * SALE_TIMEOUT_S
        with spawn.Pool(len(crowds), join_barrier, (spawn.Barrier(len(crowds)),)) as pool:
            parts = pool.map_async(run_crowd, crowds, chunksize=1).get(limit_s)
    except (RuntimeError, multiprocessing.TimeoutError) as error:  # such as a broken barrier
        raise CannotJudge(f"the buyers did not get together: {error!r}") from error
    return [attempt for part in parts for attempt in part]


barrier_of_processes: Any = None  # the threads of each process have one of their own


def join_barrier(barrier: Any) -> None:
    global barrier_of_processes
    barrier_of_processes = barrier
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent


def run_crowd(crowd: Crowd) -> list[Attempt]:
    """All connect, wait for one another, and buy at one common moment."""
    moment: list[float] = []
    served = count(1)
    given_up = threading.Event()

    def name_moment() -> None:
        if barrier_of_processes:
            barrier_of_processes.wait(BARRIER_TIMEOUT_S)
        moment.append(time.monotonic() + HEAD_START_S)

    def buy_row(thread: int) -> list[Attempt]:
        attempts: list[Attempt] = []
        with closing(connection_to(crowd.url)) as connection:
            with suppress(OSError):  # then it connects when it buys
                connection.connect()
            body = prepare_purchase(connection, crowd.url, *crowd.rows[thread][0])
            gate.wait(BARRIER_TIMEOUT_S)
            time.sleep(max(0, moment[0] - time.monotonic()))
            for order in crowd.rows[thread]:
                deadline = moment[0] + SALE_TIMEOUT_S
                attempts += insist(crowd, thread, order, connection, deadline, body)
                body = b""
                if given_up.is_set():
                    break
                if crowd.progress_every and (done := next(served)) % crowd.progress_every == 0:
                    print(f"Progress: {done}/{len(crowd.rows)}\n", end="", flush=True)
        return attempts

    gate = threading.Barrier(len(crowd.rows), name_moment)
    jobs: list[Job] = []
    try:
        jobs.extend(Job(buy_row, thread) for thread in range(len(crowd.rows)))
    except RuntimeError:  # a thread too many
        gate.abort()
        raise
    try:
        return [attempt for job in jobs for attempt in job.result()]
    finally:  # nobody asks again, or writes a line, after an interruption
        given_up.set()


def insist(
    crowd: Crowd,
    thread: int,
    order: Order,
    connection: http.client.HTTPConnection,
    deadline: float,
    body: bytes,
) -> list[Attempt]:
    """Sends an order; again after a 503, and with a key also after a connection was lost.

    Not after silence: what is still on its way there may be sold in the next sale.
    """
    attempts: list[Attempt] = []
    while time.monotonic() < deadline:
        attempt, wait_s = buy(crowd, thread, order, connection, body)
        body = b""
        attempts.append(attempt)
        lost = attempt.status == LOST and order[1] is not None and attempt.note != TOO_LATE
        if not lost and attempt.status != BUSY:
            break
        if not order[1]:  # while it waits the server may close an open connection
            connection.close()
        wait_s *= 1 + random.uniform(0, RETRY_JITTER)  # noqa: S311 (no secret)
        time.sleep(min(wait_s, max(0, deadline - time.monotonic())))
    return attempts


def buy(
    crowd: Crowd,
    thread: int,
    order: Order,
    connection: http.client.HTTPConnection,
    body: bytes = b"",
) -> tuple[Attempt, float]:
    """One attempt, and the seconds to wait before another. A body: the request is prepared."""
    customer, key = order
    body = body or prepare_purchase(connection, crowd.url, customer, key)
    answer = complete(connection, body)
    left = whole_number(answer.body.get("remaining_stock"))
    number = whole_number(answer.body.get("purchase_id"))
    when = answer.start, answer.end
    attempt = Attempt(crowd.process, thread, customer, key, *when, answer.status, left, number)
    if attempt.status == LOST or not attempt.understood:
        attempt = attempt._replace(note=" ".join(answer.text[:100].split()))
    return attempt, answer.retry_after_s
