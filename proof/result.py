"""What came of a test: its verdict, its figures, and the lines on the terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import inf
from typing import Any

from proof.api import CannotJudge
from proof.checker import Violation
from proof.history import (
    BUSY,
    KEY_REUSED,
    LIMITED,
    LOST,
    SOLD,
    SOLD_OUT,
    Attempt,
    History,
    by_purchase,
)

PASSED, FAILED, INCONCLUSIVE, SKIPPED = "PASSED", "FAILED", "INCONCLUSIVE", "SKIPPED"
VIOLATIONS_SHOWN = 5
CONFIDENCE = 0.95
IN_FLIGHT_SHARE = 0.1  # a tenth of the buyers has to be in flight at once: 100 of 1,000
OUTCOMES = {
    SOLD: "sold",
    SOLD_OUT: "sold-out",
    BUSY: "busy",
    LOST: "lost",
    KEY_REUSED: "key-reused",
    LIMITED: "rate-limited",
}


@dataclass
class Result:
    number: int
    title: str
    verdict: str
    checks: list[tuple[bool, str]]
    violations: list[Violation] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)
    unjudged: str = ""  # why the test, and all that would follow, can't be judged


# ---- On the terminal

RESULTS = """\
RESULTS:
  Total time: {total_s:.2f}s
  Throughput: {throughput_per_s:.2f} requests/second
  Successful purchases: {purchases}
  Sold out responses: {sold_out}
  Server busy responses: {busy}
  Errors: {errors}{note}
  Response times: average {average_ms:.1f}ms  min {min_ms:.1f}ms  \
p50 {p50_ms:.1f}ms  p99 {p99_ms:.1f}ms  max {max_ms:.1f}ms
  In flight at once: {in_flight_max}

VERIFICATION:"""


def print_result(result: Result) -> None:
    if result.verdict == SKIPPED:
        print(f"\nTEST {result.number} SKIPPED: {result.checks[0][1]}")
        return
    if figures := figures_of(result):
        killed = any(h.kills for h in result.histories)
        note = " (lost with a killed worker, asked again)" if killed else ""
        print(RESULTS.format(**figures, purchases=purchases_line(figures), note=note))
    for ok, text in result.checks:
        print(f"  {'✓' if ok else '✗'} {text}")
    for line in violation_lines(result):
        print(f"    {line}")
    print(f"TEST {result.number} {result.verdict}{ending(result)}", flush=True)


def purchases_line(figures: dict[str, Any]) -> str:
    sold, replayed, reused = figures["sold"], figures["replayed"], figures["key_reused"]
    if not replayed and not reused:
        return f"{sold}"
    refused = f", {reused:,} refused with another customer's key" if reused else ""
    return f"{sold:,} sold, {replayed:,} replayed{refused}"


def violation_lines(result: Result) -> list[str]:
    shown = [f"{v.kind}: {v.message}" for v in result.violations[:VIOLATIONS_SHOWN]]
    more = len(result.violations) - VIOLATIONS_SHOWN
    return shown + ([f"... and {more} more"] if more > 0 else [])


def ending(result: Result) -> str:
    if result.verdict != PASSED:
        return f": {result.unjudged}" if result.unjudged else ""
    if result.number == 0:
        return ": caught, as it must be"
    return "! No race conditions detected!"


# ---- Equalities and figures


def equalities(
    histories: Sequence[History], violations: Sequence[Violation]
) -> list[tuple[bool, str]]:
    """As lines to read. One that isn't met, and yet no violation: nobody can tell."""
    attempts = [a for h in histories for a in h.attempts]
    served = [(h, [p for p in by_purchase(h.attempts) if p.is_served]) for h in histories]
    sold = sum(p.is_sold for _, group in served for p in group)
    wanted = sum(min(h.initial_stock, len(group)) for h, group in served)
    unclear = sum(p.may_be_sold for _, group in served for p in group)
    left = sum(h.initial_stock for h in histories) - wanted
    stock = sum(h.readings[-1].stock for h in histories if h.readings)
    records = sum(h.audit.records for h in histories if h.audit)
    flying, needed = max(map(crowd_of, histories))
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
        message = f"{needed:.0f} attempts were in flight at once"
        checks.append((False, message, f"only {flying} were"))
    return [(ok, text if ok else f"{text}: {but}") for ok, text, but in checks]


def as_json(result: Result) -> dict[str, Any]:
    violations = [violation._asdict() for violation in result.violations]
    told = {"number": result.number, "title": result.title, "verdict": result.verdict}
    told |= {"figures": figures_of(result), "checks": result.checks, "violations": violations}
    return told | {"unjudged": result.unjudged}


def figures_of(result: Result) -> dict[str, Any]:
    attempts = [a for h in result.histories for a in h.attempts]
    if not attempts:
        return {}
    outcomes = Counter(map(outcome, attempts))
    sold = sum(sales_in(h) for h in result.histories)
    return {
        "attempts": len(attempts),
        "sold": sold,
        "replayed": outcomes["sold"] - sold,
        "sold_out": outcomes["sold-out"],
        "key_reused": outcomes["key-reused"],
        "busy": outcomes["busy"],
        "errors": outcomes["lost"] + outcomes["odd"] + outcomes["rate-limited"],
        **times_of(attempts),
        "in_flight_max": max(in_flight_max(h.attempts) for h in result.histories),
        "readings": sum(len(h.readings) for h in result.histories),
        "rounds": len(result.histories),
        "kills_in_mid_sale": sum(len(h.kills) for h in result.histories),
    }


def times_of(attempts: Sequence[Attempt]) -> dict[str, float]:
    total_s = max(busy_s(attempts), 1e-9)  # a clock may be coarse
    times_ms = sorted(1000 * (a.end - a.start) for a in attempts)
    return {
        "total_s": total_s,
        "throughput_per_s": len(attempts) / total_s,
        "average_ms": sum(times_ms) / len(times_ms),
        "min_ms": times_ms[0],
        "p50_ms": times_ms[len(times_ms) // 2],
        "p99_ms": times_ms[len(times_ms) * 99 // 100],
        "max_ms": times_ms[-1],
    }


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


def crowd_of(history: History) -> tuple[int, float]:
    """How many were in flight at once, and how many have to be."""
    return in_flight_max(history.attempts), IN_FLIGHT_SHARE * history.buyers


def busy_s(attempts: Iterable[Attempt]) -> float:
    """Seconds in which something was in flight: not between sales, nor during a restart."""
    total_s, until = 0.0, -inf
    for a in sorted(attempts, key=lambda a: a.start):
        total_s += max(0.0, a.end - max(a.start, until))
        until = max(until, a.end)
    return total_s


def outcome(attempt: Attempt) -> str:
    return OUTCOMES[attempt.status] if attempt.understood else "odd"


def sales_in(history: History) -> int:
    """Purchases that were acknowledged; a replay is none."""
    return sum(bool(p.sold) for p in by_purchase(history.attempts))


def in_flight_max(attempts: Iterable[Attempt]) -> int:
    steps = sorted([(a.start, 1) for a in attempts] + [(a.end, -1) for a in attempts])
    return max(accumulate(step for _, step in steps), default=0)


def statistics_line(sales: int) -> str:
    """A fault that hits one sale in n misses so many with the probability (1 - 1/n) ** sales."""
    if not sales:
        return "No sale was judged."
    one_in = 1 / (1 - (1 - CONFIDENCE) ** (1 / sales))
    return (
        f"{sales:,} sales were judged. With {CONFIDENCE:.0%} confidence this excludes a fault"
        f" that hits one sale in {one_in:,.0f} or more often; a rarer one may have passed."
    )


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, CannotJudge) else f"{type(error).__name__}: {text}"
