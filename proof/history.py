"""The history of a sale: what buyers and readers wrote down. It imports nothing of this project."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple, TypeVar

SOLD, SOLD_OUT, KEY_REUSED, LIMITED, BUSY = 200, 410, 422, 429, 503
LOST = 0  # no answer came: the outcome is unknown


@dataclass
class History:
    initial_stock: int
    attempts: list[Attempt]
    readings: list[Reading] = field(default_factory=list)
    audit: Audit | None = None
    unjudged: str = ""  # why this sale can't be proven, whatever the checker says
    buyers: int = 0  # at once
    cache_age_s: float = 0
    kills: list[float] = field(default_factory=list)

    def is_selling_at(self, moment: float) -> bool:
        """Some units were sold before and some after, and some attempt was in flight."""
        sold = [min(p.sold, key=lambda a: a.end) for p in by_purchase(self.attempts) if p.sold]
        before, after = any(a.end < moment for a in sold), any(a.start > moment for a in sold)
        return before and after and any(a.start < moment < a.end for a in self.attempts)


class Attempt(NamedTuple):
    """One request to buy. Times are in seconds on time.monotonic(), one clock for all processes."""

    process: int
    thread: int
    customer: str
    key: str | None
    start: float
    end: float
    status: int
    remaining_stock: int | None = None
    purchase_id: int | None = None
    note: str = ""  # why no answer came, or how one that isn't understood begins

    @property
    def understood(self) -> bool:
        if self.status == SOLD:
            return self.remaining_stock is not None and self.purchase_id is not None
        if self.status == SOLD_OUT:
            return self.remaining_stock == 0
        return self.status in (BUSY, LOST, LIMITED, KEY_REUSED)


class Reading(NamedTuple):
    """What GET /inventory said."""

    start: float
    end: float
    stock: int
    initial: int | None = None
    sold: int | None = None


class Audit(NamedTuple):
    """What GET /audit said when all was over: the stock, and the purchase records counted."""

    start: float
    end: float
    stock: int
    records: int
    initial: int | None = None
    consistent: bool | None = None


def by_purchase(attempts: Iterable[Attempt]) -> list[Purchase]:
    """One for each key, and one for each attempt without a key."""
    groups = defaultdict[str | int, list[Attempt]](list)
    for number, attempt in enumerate(attempts):
        groups[attempt.key or number].append(attempt)
    return [Purchase(group) for group in groups.values()]


class Purchase:
    """All attempts with one key, or one attempt without, by what they were told."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        self.sold = [a for a in attempts if a.status == SOLD and a.understood]
        self.sold_out = [a for a in attempts if a.status == SOLD_OUT]
        self.reused = [a for a in attempts if a.status == KEY_REUSED]
        unclear = [a for a in attempts if a.status == LOST or not a.understood]
        strangers = {a.customer for a in self.reused}
        first_end = min((a.end for a in self.sold + self.reused), default=inf)
        if self.sold:
            self.customer = self.sold[0].customer
            self.buying = self.sold + [a for a in unclear if a.customer == self.customer]
        else:  # any unanswered attempt can have bought, but for one of a customer who was told 422
            self.buying = [a for a in unclear if a.customer not in strangers]
            self.buying = [a for a in self.buying if a.start <= first_end and not self.sold_out]
            self.customer = (self.buying or attempts)[0].customer
        self.window = min((a.start for a in self.buying), default=inf), first_end
        owners = self.sold or self.buying
        self.orphaned = [a for a in self.reused if not owners or a.customer == self.customer]

    @property
    def is_served(self) -> bool:
        """Not only told to ask again."""
        return bool(self.sold or self.sold_out or self.reused or self.buying)

    @property
    def is_sold(self) -> bool:
        """A 200 says so, or a 422 says that another customer's unanswered attempt has bought."""
        return bool(self.sold or (self.reused and self.buying))

    @property
    def may_be_sold(self) -> bool:
        """Nobody knows. (After a 410 it is known: stock never rises.)"""
        return bool(self.buying) and not self.is_sold


Timed = TypeVar("Timed", Attempt, Reading)


def earlier(what: Timed, by_s: float) -> Timed:
    return what._replace(start=what.start - by_s)
