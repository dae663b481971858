"""What an operator is told of the sale: counted for /metrics, and the few lines of its log."""

import logging
import mmap
import select
import struct
import sys
import time
from contextlib import suppress
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
UNSEEN = -1.0  # in place of the first sale's time: it was before this start
KINDS: dict[str, int] = {}  # kind of trouble: place in SHARED
UNREADABLE = "UnreadableRequest"
OFFER = [""]  # what is on sale at the start
STORE: list[Any] = []


def begin(store: Any, kinds: list[str]) -> None:
    """Before the fork: what is on sale, and what a store may raise. No connection stays open."""
    for number, kind in enumerate([*kinds, UNREADABLE]):
        KINDS[kind] = SALE.size + number * TIME.size
    for kind in ("Sold", "Replayed", *kinds):
        if kind not in EXPECTED:
            metrics.outcome_of(kind)  # told as 0 from the beginning
    OFFER[0], STORE[:] = offer(store), [store]
    now = store.inventory()
    restocked(now.initial_stock, is_new=now.current_stock == now.initial_stock)
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


def restocked(initial_stock: int, is_new: bool = True) -> None:
    SALE.pack_into(SHARED, 0, initial_stock, 0.0 if is_new else UNSEEN)


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
    before = remaining_stock + 1
    if before == initial or tenths(remaining_stock, initial) != tenths(before, initial):
        with suppress(Exception):  # it is sold, whatever the log can tell
            tell(remaining_stock, first_s)


def tell(remaining_stock: int, first_s: float) -> None:
    """A line of the log; there are a dozen in a sale, so each may ask the database."""
    initial = STORE[0].inventory().initial_stock  # an operator may have restocked
    _, seen_s = SALE.unpack_from(SHARED)
    SALE.pack_into(SHARED, 0, initial, seen_s)
    if remaining_stock == 0:
        after = f", {time.monotonic() - first_s:.1f} s after the first sale"
        log.info("Sold out%s", after if first_s != UNSEEN else "")
    elif remaining_stock == initial - 1:
        log.info(f"First sale, {remaining_stock:,} of {initial:,} units left")
    else:
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
    if is_due(kind):
        log.error("%s %s: %s: %s", request.method, request.path, kind, error)


def is_due(kind: str) -> bool:
    """Whether a line may be logged: of each kind at most one in TROUBLE_PAUSE_S."""
    now, place = time.monotonic(), KINDS.get(kind, 0)
    if place:
        (last,) = TIME.unpack_from(SHARED, place)
        if last and now - last < TROUBLE_PAUSE_S:
            return False
        TIME.pack_into(SHARED, place, now)
    return True


def log_by(name: str) -> None:
    """Let gunicorn's log take our lines too, wherever it writes and whenever it is reopened."""
    handler = logging.Handler()
    handler.emit = logging.getLogger(name).handle  # type: ignore[method-assign]
    logging.root.handlers = [handler]


def stderr_takes_a_line(record: logging.LogRecord) -> bool:
    return takes_a_line(sys.stderr)


def stdout_takes_a_line(record: logging.LogRecord) -> bool:
    return takes_a_line(sys.stdout)


def takes_a_line(stream: Any) -> bool:
    """Whether it takes one now. A reader that stopped must not stop a sale.

    As a filter this drops the line: a pipe that is full says so before a write would wait.
    """
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except (OSError, ValueError, AttributeError, TypeError):
        return True  # a platform, or a stream, that can't be asked; the last: there is none
