"""Crowds of buyers: they make the history of a sale."""

from __future__ import annotations

import http.client
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import count
from math import inf
from typing import Any

from proof.api import (
    TOO_LATE,
    Api,
    CannotJudge,
    Prepared,
    complete,
    connection_to,
    prepare_purchase,
    whole_number,
)
from proof.checker import find_violations
from proof.history import BUSY, LOST, Attempt, History, Reading
from proof.limits import Job
from proof.orders import Crowd, Order
from proof.result import crowd_of, unserved

SALE_TIMEOUT_S = 40  # afterwards no buyer asks again
BARRIER_TIMEOUT_S, ALL_ASKED_TIMEOUT_S = 60, 5
HEAD_START_S = 0.2  # from the barrier to the moment at which all buy: its threads have woken
RETRY_JITTER = 0.5  # of the time to wait, or those refused together come together again
READERS, READING_PAUSE_S, FINAL_READINGS = 2, 0.003, 8
BUYERS_MAX, PROCESSES_MAX = 5_000, 32


def hold_crowded_sale(api: Api, stock: int, crowds: Sequence[Crowd]) -> History:
    """Held again where too few were in flight at once: the server is fast, or the machine busy.

    Then nobody reads an answer before all have asked, which makes the crowd, and longer times.
    """
    history = hold_sale(api, stock, crowds)
    flying, needed = crowd_of(history)
    if flying >= needed or history.unjudged or find_violations([history]):
        return history
    print(f"Only {flying} were in flight at once, and {needed:.0f} are needed: once more")
    return hold_sale(api, stock, [crowd._replace(all_ask_first=True) for crowd in crowds])


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
    if any(crowd.all_ask_first for crowds in waves for crowd in crowds):
        print("Nobody reads an answer before all have asked")
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
    return Rush(crowd).run()


class Rush:
    """All connect, wait for one another, and buy at one common moment."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.moment = inf  # on time.monotonic()
        self.gate = threading.Barrier(len(crowd.rows), self.name_moment)
        self.all_asked = threading.Barrier(len(crowd.rows))
        self.served = count(1)
        self.given_up = threading.Event()

    def run(self) -> list[Attempt]:
        try:
            jobs = [Job(self.buy_row, thread) for thread in range(len(self.crowd.rows))]
        except RuntimeError:  # a thread too many
            self.gate.abort()
            raise
        try:
            return [attempt for job in jobs for attempt in job.result()]
        finally:  # nobody asks again, or writes a line, after an interruption
            self.given_up.set()

    def name_moment(self) -> None:
        if barrier_of_processes:
            barrier_of_processes.wait(BARRIER_TIMEOUT_S)
        self.moment = time.monotonic() + HEAD_START_S

    def buy_row(self, thread: int) -> list[Attempt]:
        attempts: list[Attempt] = []
        row = self.crowd.rows[thread]
        with closing(connection_to(self.crowd.url)) as connection:
            with suppress(OSError):  # then it connects when it buys
                connection.connect()
            request: Prepared | None = prepare_purchase(connection, self.crowd.url, *row[0])
            if self.crowd.all_ask_first and request:
                request = request._replace(sent=self.wait_for_all)
            self.gate.wait(BARRIER_TIMEOUT_S)
            time.sleep(max(0, self.moment - time.monotonic()))
            deadline = self.moment + SALE_TIMEOUT_S
            for order in row:
                attempts += insist(self.crowd, thread, order, connection, deadline, request)
                request = None
                if self.given_up.is_set():
                    break
                self.show_progress()
        return attempts

    def wait_for_all(self) -> None:
        with suppress(threading.BrokenBarrierError):  # somebody could not ask
            self.all_asked.wait(ALL_ASKED_TIMEOUT_S)

    def show_progress(self) -> None:
        every, done = self.crowd.progress_every, next(self.served)
        if every and done % every == 0:
            print(f"Progress: {done}/{len(self.crowd.rows)}\n", end="", flush=True)


def insist(
    crowd: Crowd,
    thread: int,
    order: Order,
    connection: http.client.HTTPConnection,
    deadline: float,
    request: Prepared | None,
) -> list[Attempt]:
    """Sends an order; again after a 503, and with a key also after a connection was lost.

    Not after silence: what is still on its way there may be sold in the next sale.
    """
    attempts: list[Attempt] = []
    while time.monotonic() < deadline:
        attempt, wait_s = buy(crowd, thread, order, connection, request)
        request = None
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
    request: Prepared | None = None,
) -> tuple[Attempt, float]:
    """One attempt, and the seconds to wait before another."""
    customer, key = order
    request = request or prepare_purchase(connection, crowd.url, customer, key)
    answer = complete(connection, request)
    left = whole_number(answer.body.get("remaining_stock"))
    number = whole_number(answer.body.get("purchase_id"))
    when = answer.start, answer.end
    attempt = Attempt(crowd.process, thread, customer, key, *when, answer.status, left, number)
    if attempt.status == LOST or not attempt.understood:
        attempt = attempt._replace(note=" ".join(answer.text[:100].split()))
    return attempt, answer.retry_after_s
