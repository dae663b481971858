"""The checker decides whether one counter, lowered by one with each sale, explains a history.

It is a pure function of the history. Each violation that it finds has a kind and a message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from heapq import heappop, heappush
from itertools import accumulate
from math import inf
from typing import NamedTuple

from proof.history import SOLD_OUT, Attempt, Audit, History, Purchase, Reading, by_purchase, earlier


def check(
    initial_stock: int,
    attempts: Sequence[Attempt],
    readings: Sequence[Reading],
    audit: Audit | None,
    cache_age_s: float = 0,
) -> list[Violation]:
    """All that is wrong with this history; nothing if and only if one counter explains it.

    A cache may have answered readings and 410s without a key: these were true up to `cache_age_s`
    seconds before they were asked for. Costs O(n log n).
    """
    fresh = [a if a.key or a.status != SOLD_OUT else earlier(a, cache_age_s) for a in attempts]
    purchases = by_purchase(fresh)
    last = [Reading(audit.start, audit.end, audit.stock)] if audit else []
    seen = [*(earlier(reading, cache_age_s) for reading in readings), *last]
    return [
        *check_answers(attempts, purchases),
        *check_figures(initial_stock, readings, audit),
        *check_totals(initial_stock, purchases, audit),
        *check_order(initial_stock, purchases, seen),
    ]


def find_violations(histories: Iterable[History]) -> list[Violation]:
    return [
        violation
        for h in histories
        for violation in check(h.initial_stock, h.attempts, h.readings, h.audit, h.cache_age_s)
    ]


def check_answers(
    attempts: Iterable[Attempt], purchases: Iterable[Purchase]
) -> Iterator[Violation]:
    """Each answer is one that the API knows, and each purchase got one answer and its own id."""
    for a in attempts:
        if not a.understood:
            answer = f"{a.status}, remaining_stock {a.remaining_stock}, purchase_id {a.purchase_id}"
            message = f"{a.customer} was answered {answer} {a.note}".rstrip()
            yield Violation(Kind.UNACCOUNTED_ANSWER, message)
    told_before: dict[int | None, Purchase] = {}
    for p in purchases:
        answers = {f"purchase {a.purchase_id} left {a.remaining_stock}" for a in p.sold}
        answers |= {"SOLD OUT" for _ in p.sold_out}
        if len(answers) > 1:
            message = f"{p.customer} was told: {', '.join(sorted(answers))}"
            yield Violation(Kind.CHANGED_ANSWER, message)
        for customer in {a.customer for a in p.sold} - {p.customer}:
            message = f"{p.customer} and {customer} were both told 200"
            yield Violation(Kind.SHARED_KEY, message)
        for a in p.orphaned:
            message = (
                f"{a.customer} was told 422, and no other customer can have bought with that key"
            )
            yield Violation(Kind.UNACCOUNTED_ANSWER, message)
        for number in {a.purchase_id for a in p.sold}:
            other = told_before.setdefault(number, p)
            if other is not p:
                message = f"purchase {number} was told to {other.customer} and to {p.customer}"
                yield Violation(Kind.LOST_PURCHASE, f"{message}, for two purchases")


def check_figures(
    initial: int, readings: Iterable[Reading], audit: Audit | None
) -> Iterator[Violation]:
    """What /inventory and /audit say beside the stock. None: they don't say it."""
    for r in readings:
        if r.initial not in (None, initial) or r.sold not in (None, initial - r.stock):
            message = f"stock {r.stock}, initial_stock {r.initial}, total_purchases {r.sold}"
            yield Violation(
                Kind.WRONG_FIGURES, f"of {initial} units GET /inventory says: {message}"
            )
    if audit and audit.initial not in (None, initial):
        message = f"of {initial} units GET /audit says: initial_stock {audit.initial}"
        yield Violation(Kind.WRONG_FIGURES, message)
    if audit and audit.consistent not in (None, audit.stock + audit.records == initial):
        message = f"GET /audit says: consistent {audit.consistent}, which its figures aren't"
        yield Violation(Kind.WRONG_FIGURES, message)


def check_totals(
    initial: int, purchases: Sequence[Purchase], audit: Audit | None
) -> Iterator[Violation]:
    sold = sum(p.is_sold for p in purchases)
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
        message = f"buyers were told SOLD OUT, and {audit.stock} units are left"
        yield Violation(Kind.UNDERSOLD, message)


def check_order(
    initial: int, purchases: Iterable[Purchase], readings: Iterable[Reading]
) -> Iterator[Violation]:
    """Whether the answers fit one counter that goes down by one with each sale."""
    sales: dict[int, Event] = {}  # by the level that they left
    seen = defaultdict[int, list[Event]](list)
    untold: list[Event] = []  # sales whose level nobody was told
    for p in purchases:
        seen[0] += [Event(a.start, a.end, f"the SOLD OUT of {a.customer}") for a in p.sold_out]
        for level in {a.remaining_stock for a in p.sold if a.remaining_stock is not None}:
            sale = Event(*p.window, f"the sale to {p.customer} that left {level}")
            if level in sales:
                yield Violation(Kind.DUPLICATE_LEVEL, f"{sales[level].name}, and {sale.name}")
            elif not 0 <= level < initial:
                yield Violation(Kind.OVERSOLD, f"{sale.name}, of {initial} units")
            else:
                sales[level] = sale
        if not p.sold and (p.is_sold or p.may_be_sold):
            untold.append(Event(*p.window, f"the unanswered purchase of {p.customer}"))
    for r in readings:
        if 0 <= r.stock <= initial:
            seen[r.stock].append(Event(r.start, r.end, f"the reading of stock {r.stock}"))
        else:
            yield Violation(Kind.OVERSOLD, f"a reading of stock {r.stock}, of {initial} units")
    yield from walk_down(initial, sales, seen, sorted(untold, reverse=True))


def walk_down(
    initial: int, sales: dict[int, Event], seen: dict[int, list[Event]], untold: list[Event]
) -> Iterator[Violation]:
    """Every level from the initial stock down, each left as early as it can be.

    The moment when the counter leaves a level is bounded from below by the moment before and by
    the starts of the sale and of the readings of that level. It is bounded from above by ends.
    So the earliest choice is the best for all that follow, and the history is linearizable if
    and only if it breaks no end. A level that no answer tells of was left by an untold sale. Of
    those that began in time for all that lies below, the one whose end comes first is the best
    choice: at every later level more of them have begun, and more of them have ended.
    """
    lowest = min([*sales, *(level for level in seen if seen[level])], default=initial)
    latest = latest_moments(initial, lowest, sales, seen)
    bound = Event(-inf, inf, "the beginning")  # the counter can't have been here before it began
    ready: list[tuple[float, Event]] = []  # untold sales that can be next, by their ends

    for level in range(initial, lowest - 1, -1):
        here = seen.get(level, [])
        yield from (too_early(event, bound) for event in here if event.end < bound.start)
        bound = max([bound, *here], key=lambda event: event.start)
        if level == lowest:
            break
        while untold and untold[-1].start <= latest[level - 1 - lowest]:
            heappush(ready, (untold[-1].end, untold.pop()))
        sale = sales.get(level - 1) or (heappop(ready)[1] if ready else None)
        if sale is None:
            message = f"nobody can have left {level - 1}, and yet the stock fell to {lowest}"
            yield Violation(Kind.NOT_LINEARIZABLE, message)
            return
        bound = max(bound, sale, key=lambda event: event.start)
        if sale.end < bound.start:
            yield too_early(sale, bound)
            bound = sale
    rest = [*untold, *(sale for _, sale in ready)]  # sold below the lowest level that anybody saw
    made = [sale for sale in rest if sale.end < inf]
    yield from (too_early(sale, bound) for sale in made if sale.end < bound.start)
    if len(made) > lowest:
        message = f"{len(made)} more were sold when {lowest} units were left"
        yield Violation(Kind.OVERSOLD, message)


def too_early(event: Event, bound: Event) -> Violation:
    message = f"{event.name} ended {bound.start - event.end:.6f} s before {bound.name} began"
    return Violation(Kind.NOT_LINEARIZABLE, message)


def latest_moments(
    initial: int, lowest: int, sales: dict[int, Event], seen: dict[int, list[Event]]
) -> list[float]:
    """For each level from the lowest up: the first end among all that happens from there down."""
    ends = (
        min(
            (e.end for e in [*seen.get(level, []), sales.get(level - 1)] if e is not None),
            default=inf,
        )
        for level in range(lowest, initial + 1)
    )
    return list(accumulate(ends, min))


class Event(NamedTuple):
    """Something that happened at one moment from start to end."""

    start: float
    end: float
    name: str


class Kind(StrEnum):
    OVERSOLD = "oversold"
    UNDERSOLD = "undersold"
    DUPLICATE_LEVEL = "duplicate level"
    LOST_PURCHASE = "lost purchase"
    PHANTOM_PURCHASE = "phantom purchase"
    CHANGED_ANSWER = "one key, different answers"
    SHARED_KEY = "one key, two customers"
    WRONG_FIGURES = "wrong figures"
    NOT_LINEARIZABLE = "not linearizable"
    UNACCOUNTED_ANSWER = "unaccounted answer"


class Violation(NamedTuple):
    kind: Kind
    message: str
