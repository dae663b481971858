"""What an operator is told of the sale: counted for /metrics, and the few lines of its log."""

import logging
import mmap
import select
import struct
import sys
import time
from typing import Any

from serving import metrics

TROUBLE_PAUSE_S = 1.0  # between two lines about the same kind of trouble, of all workers together
EXPECTED = ("SoldOut", "KeyReused")  # no trouble: the counts of 410 and 422 tell of it

log = logging.getLogger("flash_sale")

# Anonymous memory of all workers, as they are forked. It sells nothing: units at the start of the
# sale; time.monotonic() at the first sale since; each kind's last line in the log.
SHARED = mmap.mmap(-1, 4096)
SALE = struct.Struct("qd")
TIME = struct.Struct("d")
KINDS: dict[str, int] = {}  # kind of trouble: place in SHARED
OFFER = [""]  # what is on sale at the start


def begin(store: Any, kinds: list[str]) -> None:
    """Before the fork: what is on sale, and what a store may raise. No connection stays open."""
    for number, kind in enumerate(kinds):
        KINDS[kind] = SALE.size + number * TIME.size
    for kind in ("Sold", "Replayed", *kinds):
        if kind not in EXPECTED:
            metrics.outcome_of(kind)  # told as 0 from the beginning
    OFFER[0] = offer(store)
    restocked(store.inventory().initial_stock)
    store.close()
    tools = metrics.instruments()
    store.measure(
        metrics.harmless(tools.lock_waits.observe), metrics.harmless(tools.checkpoints.inc)
    )


def offer(store: Any) -> str:
    """What is on sale, and which settings say something else, as it is an earlier one."""
    now = store.inventory()
    left = f"{now.item_name}: {now.current_stock:,} of {now.initial_stock:,} units left"
    unused = {
        f"INITIAL_STOCK ({store.initial_stock:,})": store.initial_stock != now.initial_stock,
        f"ITEM_NAME ({store.item_name})": store.item_name != now.item_name,
    }
    for setting in (text for text, differs in unused.items() if differs):
        left += f"; {setting} is used for a new database only"
    return left


def restocked(initial_stock: int) -> None:
    SALE.pack_into(SHARED, 0, initial_stock, 0.0)


def sold(remaining_stock: int, replayed: bool) -> None:
    """Log the first sale, each tenth of the stock, and the last. Each level is sold once."""
    if replayed:
        metrics.count("Replayed")
        return
    metrics.count("Sold")
    initial, first_s = SALE.unpack_from(SHARED)
    if not first_s:
        first_s = time.monotonic()
        SALE.pack_into(SHARED, 0, initial, first_s)
    if remaining_stock == 0:
        log.info(f"Sold out, {time.monotonic() - first_s:.1f} s after the first sale")
    elif remaining_stock == initial - 1:
        log.info(f"First sale, {remaining_stock:,} of {initial:,} units left")
    elif tenths(remaining_stock, initial) != tenths(remaining_stock + 1, initial):
        log.info(f"{remaining_stock:,} of {initial:,} units left")


def tenths(stock: int, initial: int) -> int:
    """How many tenths of `initial` are in `stock`, rounded up."""
    return -(-stock * 10 // max(initial, 1))


def trouble(error: Exception, request: Any) -> None:
    """Count trouble. Log it with its cause, each kind at most once in TROUBLE_PAUSE_S."""
    kind = type(error).__name__
    if kind in EXPECTED:  # nearly every request of a flash sale
        return
    metrics.count(kind)
    now, place = time.monotonic(), KINDS.get(kind, 0)
    if place:
        (last,) = TIME.unpack_from(SHARED, place)
        if last and now - last < TROUBLE_PAUSE_S:
            return
        TIME.pack_into(SHARED, place, now)
    log.error("%s %s: %s: %s", request.method, request.path, kind, error)


def stderr_takes_a_line(record: logging.LogRecord) -> bool:
    """Whether standard error takes a line now. A reader that stopped must not stop a sale.

    As a filter it drops the line: a pipe that is full says so before a write would wait.
    """
    try:
        return bool(select.select([], [sys.stderr], [], 0)[1])
    except (OSError, ValueError, AttributeError):  # a platform, or a stream, that can't be asked
        return True
