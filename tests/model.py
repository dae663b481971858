"""A small exhaustive model of a sale: flush after the lock, early lock release, crashes.

    python tests/model.py                          every interleaving, with all rules
    python tests/model.py --without "a 410 is flushed"     the shortest way to a broken promise

The promise: nothing that anybody was told is ever taken back, and the books balance. Each rule is
named in NOTES, or in postgres/README. Without it some interleaving breaks the promise, and the
model finds it. A story in which a flush fails is told only where there is none without.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple, TypeVar

Rules = frozenset[str]
S = TypeVar("S", "Sqlite", "Postgres")
SALES = ("A", "B", "C")
REFUSALS = ("D", "E")  # buyers who come when there may be nothing left
RETRY = "A again"  # the same key
CHECKPOINT = "checkpoint"

SQLITE_RULES = {
    "one sale at a time": "BEGIN IMMEDIATE, not BEGIN",
    "look again under the lock": "what was true before the lock needn't be true now",
    "a 200 is flushed": "flush, then answer",
    "a replayed 200 is flushed": "the first one's worker may have died between COMMIT and flush",
    "a 410 is flushed": "it may rest on a sale that is not on disk yet",
    "checkpoints hold the write lock": "SQLite before 3.51.3 loses a WAL that restarts meanwhile",
    "the database is flushed before the WAL restarts": "SQLite's own",
    "a failed flush stops all answers": "Linux tells of it once, and takes the pages for clean",
    "a failed flush stops checkpoints": "they copy frames without checking them",
    "a checkpoint flushes first as a sale does": "SQLite's own descriptor may be opened too late",
}
POSTGRES_RULES = {
    "a 200 waits for the barrier": "the sale itself commits asynchronously",
    "a 410 waits for the barrier": "it may rest on a sale that is not on disk yet",
    "the barrier writes": "a transaction that writes nothing waits for nothing",
    "the barrier waits for the standby": "a failover forgets what only the primary has",
    "a wait that was cut short is no 200": "PostgreSQL only warns, and reports the commit",
}


class Event(NamedTuple):
    who: str
    what: str  # "write", "flush", "copy", "flush database" and "tell ..." are seen from outside


class Broken(NamedTuple):
    """How a promise was broken: the events, and what came of them."""

    path: list[Event]
    promise: str


# ---- SQLite


class Sqlite(NamedTuple):
    """One database. Sales are counted from the first: `sold[:3]` are the first three."""

    stock: int  # at the start
    at: tuple[str, ...]  # where each actor is
    told: frozenset[str] = frozenset()
    sold: tuple[str, ...] = ()  # written to the WAL, in this order
    visible: int = 0  # of them, committed
    start: int = 0  # those before were in an earlier WAL
    flushed: int = 0  # those before are on disk, in this WAL or an earlier one
    lost_from: int = sys.maxsize  # the kernel lost the pages from here on
    copied: int = 0  # those before are in the database file, as programs see it
    safe: int = 0  # those before are in it on disk
    backfill: int = 0  # how many of this WAL are said to be copied
    mark: tuple[int, int] = (0, 0)  # what a checkpoint goes by: the end and the start of the WAL
    lock: str = ""
    stopped: bool = False
    confirmed: int = -1  # what a 410 rested on whose worker has flushed it; it needn't again
    garbage: bool = False  # a checkpoint copied pages that were lost

    @property
    def left(self) -> int:
        return self.stock - self.visible


ACTORS = (*SALES, *REFUSALS, RETRY, CHECKPOINT)
Step = tuple[Event, Sqlite]


def sqlite_start(stock: int, checkpoints: int, actors: Iterable[str] = ACTORS) -> Sqlite:
    at = tuple("" if who in actors else "done" for who in ACTORS[:-1])
    return Sqlite(stock, (*at, f"idle {checkpoints}"))


def sqlite_steps(now: Sqlite, rules: Rules) -> Iterator[Step]:
    for number, (who, place) in enumerate(zip(ACTORS, now.at, strict=True)):
        if who == "C" and not now.at[1]:  # B and C are alike: let B be the first of them
            continue
        program = checkpoint if who == CHECKPOINT else buy
        for what, then, changes in program(now, who, place, rules):
            at = (*now.at[:number], then, *now.at[number + 1 :])
            if who in REFUSALS:  # and so are D and E
                at = (*at[:3], *sorted(at[3:5]), *at[5:])
            yield Event(who, what), now._replace(at=at, **changes)


Change = tuple[str, str, dict[str, Any]]  # what happens, where the actor is then, what changes


def buy(now: Sqlite, who: str, place: str, rules: Rules) -> Iterator[Change]:
    """A purchase. `RETRY` only asks for what A has bought; refusals come when nothing is left."""
    if place == "":
        yield from look(now, who, rules)
    elif place == "waits" and (not now.lock or "one sale at a time" not in rules):
        then = "reads" if "look again under the lock" in rules else "sells"
        yield "lock", then, {"lock": who}
    elif place == "reads":
        if now.left:
            yield "read", "sells", {}
        else:
            yield "unlock", "sees 0", {"lock": ""}
    elif place == "sells":
        yield "write", "commits", write(now, who)
    elif place == "commits":
        yield "unlock", "has sold", {"lock": "", "visible": len(now.sold)}
    elif place in ("has sold", "sees 0", "finds"):
        yield from confirm(now, place, rules)
    elif place == "failed":  # a moment later: others are under way meanwhile
        yield "stop", "done", {"stopped": True}
    elif place.startswith("may tell ") and not (
        now.stopped and "a failed flush stops all answers" in rules
    ):
        answer = place.removeprefix("may tell ")
        told = {"410": "410", "200": who[0]}[answer]
        yield f"tell {answer}", "done", {"told": now.told | {told}}


def look(now: Sqlite, who: str, rules: Rules) -> Iterator[Change]:
    """Without the lock."""
    if who == RETRY:
        if "A" in now.sold[: now.visible]:
            yield "look", "finds", {}
    elif not now.left:
        yield "look", "sees 0", {}
    elif who in SALES:
        yield "look", "waits", {}


def write(now: Sqlite, who: str) -> dict[str, Any]:
    """Append to the WAL, or to the start of a new one if all of it is said to be copied."""
    end = len(now.sold)
    changes: dict[str, Any] = {"sold": (*now.sold, who)}
    if end > now.start and now.backfill >= end - now.start:
        changes |= {"start": end, "flushed": max(now.flushed, end), "backfill": 0}
    return changes


FLUSH_OF = {
    "has sold": ("200", "a 200 is flushed"),
    "finds": ("200", "a replayed 200 is flushed"),
    "sees 0": ("410", "a 410 is flushed"),
}


def confirm(now: Sqlite, place: str, rules: Rules) -> Iterator[Change]:
    answer, rule = FLUSH_OF[place]
    if rule not in rules:
        yield "no flush", f"may tell {answer}", {}
        return
    confirmed = {"confirmed": now.visible} if answer == "410" else {}
    if answer == "410" and now.confirmed == now.visible:
        yield "remember", "may tell 410", {}
    if is_told(now):
        yield "a flush fails", "failed", {}
        return
    yield "flush", f"may tell {answer}", flush(now) | confirmed
    if now.lost_from == sys.maxsize and now.flushed < len(now.sold):
        yield "a flush fails", "failed", {"lost_from": now.flushed}


def is_told(now: Sqlite) -> bool:
    """Whether a flush fails since pages were lost.

    Each descriptor that was open then is told once. After the stop all may have been told, or are
    opened later: to those the pages are clean, and their flush succeeds.
    """
    return now.lost_from < sys.maxsize and not now.stopped


def flush(now: Sqlite) -> dict[str, Any]:
    return {"flushed": len(now.sold)}


def checkpoint(now: Sqlite, who: str, place: str, rules: Rules) -> Iterator[Change]:
    """`place` is a step, and how many checkpoints come after this one."""
    step, more = place.split()
    locks = "checkpoints hold the write lock" in rules
    forbidden = now.stopped and "a failed flush stops checkpoints" in rules
    freed = {"lock": ""} if locks else {}
    end, start = now.mark
    if step == "idle":
        if more != "0" and not forbidden and not (locks and now.lock):
            then = f"begin {int(more) - 1}"
            yield "lock" if locks else "begin", then, {"lock": who} if locks else {}
    elif step == "begin":
        if "a checkpoint flushes first as a sale does" not in rules:
            yield "no flush", f"read {more}", {}
        elif forbidden or is_told(now):
            yield "a flush fails", "idle 0", {"stopped": True, **freed}
        else:
            yield "flush", f"read {more}", flush(now)
    elif step == "read":
        copies = now.visible - now.start > now.backfill
        # SQLite opens a descriptor of its own here, which is told of nothing that came before.
        then = ("flush" if now.lost_from == sys.maxsize else "late") if copies else "publish"
        yield "read", f"{then} {more}", {"mark": (now.visible, now.start)}
    elif step in ("flush", "late"):
        if forbidden or (step == "flush" and is_told(now)):
            yield "a flush fails", "idle 0", {"stopped": True, **freed}
            return
        yield "flush", f"copy {more}", flush(now)
    elif step == "copy":
        copied = {"copied": max(now.copied, end)}
        yield "copy", f"safe {more}", copied
        if end > now.lost_from:
            yield "copy", f"safe {more}", copied | {"garbage": True}
    elif step == "safe":
        flushes = "the database is flushed before the WAL restarts" in rules
        safe = {"safe": now.copied} if flushes else {}
        yield "flush database" if flushes else "no flush", f"publish {more}", safe
    elif step == "publish":
        yield "unlock" if locks else "end", f"idle {more}", {"backfill": end - start, **freed}


def sqlite_promises(now: Sqlite) -> list[str]:
    """What is broken: as everybody sees it now, or after a power cut at this moment."""
    return broken_on_disk(
        now._replace(at=(), lock="", mark=(0, 0), backfill=0, visible=0, confirmed=0)
    )


@cache
def broken_on_disk(now: Sqlite) -> list[str]:
    return list(find_broken(now))


def find_broken(now: Sqlite) -> Iterator[str]:
    if len(now.sold) > now.stock:
        yield f"{len(now.sold)} of {now.stock} units are sold"
    if now.garbage:
        yield "the file is malformed"
    seen = {*now.sold[: now.copied], *now.sold[now.start :]}
    yield from taken_back(now.told, seen, now.stock, "is gone")
    low = max(now.start, min(now.flushed, now.lost_from))
    high = max(low, min(len(now.sold), now.lost_from))
    in_file = range(now.safe, now.copied + 1)  # each page by itself, whatever the disk has written
    for end, level, rows in product(range(low, high + 1), in_file, in_file):
        found = {*now.sold[:rows], *now.sold[now.start : end]}
        level = end if end > now.start else level
        if len(found) != level:
            yield f"after a power cut {len(found)} purchases, and {level} units sold"
        yield from taken_back(now.told, found, now.stock, "is gone after a power cut")


def taken_back(told: Iterable[str], found: set[str], stock: int, how: str) -> Iterator[str]:
    for one in told:
        if one == "410" and len(found) < stock:
            yield f"SOLD OUT was told, which {how}"
        elif one != "410" and one not in found:
            yield f"{one} was told 200, which {how}"


# ---- PostgreSQL


class Postgres(NamedTuple):
    """A primary and its standby. Positions count the sales in the log; a barrier sells nothing."""

    stock: int
    at: tuple[str, ...]
    told: frozenset[str] = frozenset()
    log: tuple[str, ...] = ()
    flushed: int = 0
    replicated: int = 0
    waits: tuple[int, ...] = (0,) * 5  # for which position each actor waits

    @property
    def left(self) -> int:
        return self.stock - len(self.log)


BUYERS = (*SALES, *REFUSALS)


def postgres_start(stock: int) -> Postgres:
    return Postgres(stock, ("",) * len(BUYERS))


def postgres_steps(now: Postgres, rules: Rules) -> Iterator[tuple[Event, Postgres]]:
    if now.flushed < len(now.log):
        yield Event("primary", "flush"), now._replace(flushed=len(now.log))
    if now.replicated < now.flushed:
        yield Event("standby", "flush"), now._replace(replicated=now.flushed)
    for number, (who, place) in enumerate(zip(BUYERS, now.at, strict=True)):
        if who not in ("A", "D") and not now.at[number - 1]:  # they are alike: let them come so
            continue
        for what, then, changes in buy_by_barrier(now, number, place, rules):
            at = (*now.at[:number], then, *now.at[number + 1 :])
            yield Event(who, what), now._replace(at=at, **changes)


def buy_by_barrier(now: Postgres, number: int, place: str, rules: Rules) -> Iterator[Change]:
    who = BUYERS[number]
    if place == "":
        if now.left and who in SALES:  # in one statement: the row lock is free at its end
            yield "sell", "200", {"log": (*now.log, who)}
        elif not now.left:
            yield "look", "410", {}
    elif place in ("200", "410"):
        if f"a {place} waits for the barrier" not in rules:
            yield "no barrier", f"may tell {place}", {}
            return
        end = len(now.log) if "the barrier writes" in rules else 0
        waits = (*now.waits[:number], end, *now.waits[number + 1 :])
        yield "barrier", f"{place} waits", {"waits": waits}
    elif place.endswith(" waits"):
        reached = now.flushed
        if "the barrier waits for the standby" in rules:
            reached = now.replicated
        if reached >= now.waits[number]:
            yield "barrier ends", f"may tell {place[:3]}", {}
        elif now.flushed >= now.waits[number]:
            cut_short = "done" if "a wait that was cut short is no 200" in rules else "may tell "
            then = cut_short if cut_short == "done" else cut_short + place[:3]
            yield "the wait is cut short", then, {}
    elif place.startswith("may tell "):
        told = "410" if place.endswith("410") else who
        yield place.removeprefix("may "), "done", {"told": now.told | {told}}


def postgres_promises(now: Postgres) -> Iterator[str]:
    """After a crash of the primary, or a failover: any end of the log that isn't safe is gone."""
    for safe, how in ((now.flushed, "a crash"), (now.replicated, "a failover")):
        for end in range(safe, len(now.log) + 1):
            yield from taken_back(now.told, set(now.log[:end]), now.stock, f"is gone after {how}")


# ---- All interleavings


def explore(
    start: S,
    steps: Callable[[S], Iterator[tuple[Event, S]]],
    promises: Callable[[S], Iterable[str]],
) -> tuple[int, Broken | None]:
    """Breadth first, so that the first broken promise has the shortest path; how many states."""
    came_from: dict[S, tuple[S, Event] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        now = waiting.popleft()
        for promise in promises(now):
            return len(came_from), Broken(path_to(now, came_from), promise)
        for event, then in steps(now):
            if then not in came_from:
                came_from[then] = now, event
                waiting.append(then)
    return len(came_from), None


def path_to(now: S, came_from: dict[S, tuple[S, Event] | None]) -> list[Event]:
    path = []
    while (step := came_from[now]) is not None:
        now, event = step
        path.append(event)
    return path[::-1]


def while_flushes_succeed(now: Sqlite, rules: Rules) -> Iterator[Step]:
    return (step for step in sqlite_steps(now, rules) if step[0].what != "a flush fails")


SMALL = sqlite_start(2, 0), sqlite_start(3, 2, SALES)
ALL = [(sqlite_steps, start) for start in (*SMALL, sqlite_start(2, 1))]
PLAIN_FIRST = [*((while_flushes_succeed, start) for start in SMALL), *ALL]


def search(without: str = "") -> tuple[int, Broken | None]:
    """All interleavings, with every rule but one: how many states, and the broken promise."""
    states, broken = 0, None
    if without not in POSTGRES_RULES:
        rules = frozenset(SQLITE_RULES) - {without}
        for steps, start in PLAIN_FIRST if without else ALL:
            if broken is None:
                seen, broken = explore(start, partial(steps, rules=rules), sqlite_promises)
                states += seen
    if without not in SQLITE_RULES:
        barrier = partial(postgres_steps, rules=frozenset(POSTGRES_RULES) - {without})
        seen, broken = explore(postgres_start(2), barrier, postgres_promises)
        states += seen
    return states, broken


# ---- The real order of events

SEEN = ("write", "unlock", "flush", "copy", "flush database", "tell 200", "tell 410")


def accepts(events: Iterable[str], start: Sqlite) -> bool:
    """Whether one worker that takes one request after another may do just this: a path."""
    places = unseen(start)
    for event in events:
        places = {then for now in places for what, then in by_one_worker(now) if what == event}
        places = {then for now in places for then in unseen(now)}
    return bool(places)


def by_one_worker(now: Sqlite) -> Iterator[tuple[str, Sqlite]]:
    """A checkpoint comes between the flush of a sale and its answer."""
    places = dict(zip(ACTORS, now.at, strict=True))
    begun = [who for who in ACTORS[:-1] if places[who] not in ("", "done")]
    for (who, what), then in sqlite_steps(now, frozenset(SQLITE_RULES)):
        if not places[CHECKPOINT].startswith("idle"):
            may = who == CHECKPOINT
        elif who == CHECKPOINT:
            may = any(places[sale] == "may tell 200" for sale in SALES)
        else:
            may = who in begun if begun else True
        if may:
            yield what, then


def unseen(start: Sqlite) -> set[Sqlite]:
    """All that is reached by events that nobody sees from outside, and `start`."""
    found, waiting = {start}, [start]
    while waiting:
        for what, then in by_one_worker(waiting.pop()):
            if what not in SEEN and then not in found:
                found.add(then)
                waiting.append(then)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    known = [*SQLITE_RULES, *POSTGRES_RULES]
    parser.add_argument("--without", choices=known, default="", help="one rule less")
    without = parser.parse_args(arguments).without
    states, broken = search(without)
    if broken is None:
        print(f"{states:,} states, and nothing that was told is taken back")
        return 0
    for event in broken.path:
        print(f"{event.who}: {event.what}")
    print(f"=> {broken.promise}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
