"""The files that were asked for: all figures as JSON, and one HTML page with pictures."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import log10
from pathlib import Path
from typing import NamedTuple

import jinja2

from proof.history import Attempt, History, by_purchase
from proof.options import Options
from proof.result import Result, as_json, figures_of, outcome, statistics_line, violation_lines

TEMPLATE = Path(__file__).with_name("report.html")
COLUMNS = ("attempts", "sold", "sold_out", "throughput_per_s", "p50_ms", "p99_ms", "in_flight_max")


def write_files(options: Options, results: Sequence[Result], conclusion: str, judged: int) -> None:
    line = statistics_line(judged)
    if options.json:
        tests = [as_json(result) for result in results]
        told = {"conclusion": conclusion, "seed": options.seed, "sales": judged, "tests": tests}
        options.json.write_text(json.dumps(told | {"statistics": line}, indent=2))
    if options.report:
        options.report.write_text(page(results, f"{conclusion}\n{line}"), encoding="utf-8")


def page(results: Sequence[Result], conclusion: str) -> str:
    """One file that needs no network and no script: every mark is a line segment in SVG."""
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    tests = [
        {
            "result": result,
            "figures": figures_of(result),
            "violations": violation_lines(result),
            "charts": charts_of(result),
        }
        for result in results
    ]
    return template.render(tests=tests, columns=COLUMNS, conclusion=conclusion)


def charts_of(result: Result) -> list[Chart]:
    attempts = sorted((a for h in result.histories for a in h.attempts), key=lambda a: a.end)
    if not attempts:
        return []
    epoch = min(a.start for a in attempts)
    stock = [s for h in result.histories if h.attempts for s in stock_segments(h, epoch)]
    waits = [
        Segment(outcome(a), a.start - epoch, n, a.end - epoch, n) for n, a in enumerate(attempts)
    ]
    thickness = max(0.5, 235 / len(waits))
    times = list(time_segments(attempts))
    return [
        chart("Stock over time", "seconds", "units", 1.5, stock),
        chart("Every attempt from start to end", "seconds", "attempts", thickness, waits),
        chart("Response times", "milliseconds", "attempts", 13, times),
    ]


def chart(
    title: str, x_name: str, y_name: str, thickness: float, segments: Sequence[Segment]
) -> Chart:
    x_max = max((max(s.x, s.to_x) for s in segments), default=1) or 1
    y_max = max((max(s.y, s.to_y) for s in segments), default=1) or 1

    def at(x: float, y: float) -> tuple[float, float]:
        return round(60 + x / x_max * 880, 1), round(260 - y / y_max * 235, 1)

    paths = defaultdict[str, str](str)
    for s in segments:
        (x, y), (to_x, to_y) = at(s.x, s.y), at(s.to_x, s.to_y)
        paths[s.style] += f"M{x} {y}L{to_x} {to_y}"
    x_ticks = [(at(value, 0)[0], value) for value in ticks(x_max)]
    y_ticks = [(at(0, value)[1], value) for value in ticks(y_max)]
    return Chart(title, x_name, y_name, thickness, paths, x_ticks, y_ticks)


def ticks(top: float) -> list[float]:
    step = 10.0 ** (log10(top) // 1)
    step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if top / (step * part) <= 8)
    return [round(number * step, 9) for number in range(int(top / step + 1e-9) + 1)]


def stock_segments(history: History, epoch: float) -> Iterator[Segment]:
    """What the first answer of each sale told, what readings saw, and when workers were killed."""
    purchases = by_purchase(history.attempts)
    firsts = sorted(min((a.end, a) for a in p.sold) for p in purchases if p.sold)
    now, stock = min(a.start for a in history.attempts) - epoch, history.initial_stock
    for _, a in firsts:
        end, left = a.end - epoch, a.remaining_stock or 0
        yield Segment("stock", now, stock, end, stock)
        yield Segment("stock", end, stock, end, left)
        now, stock = end, left
    last = max(a.end for a in history.attempts)
    for r in history.readings:
        if epoch < r.start and r.end < last:
            yield Segment("reading", r.start - epoch, r.stock, r.end - epoch, r.stock)
    for kill in history.kills:
        yield Segment("kill", kill - epoch, 0, kill - epoch, history.initial_stock)


def time_segments(attempts: Sequence[Attempt]) -> Iterator[Segment]:
    """A column for each sixtieth of the longest time, its outcomes on top of each other."""
    width = (max(1000 * (a.end - a.start) for a in attempts) or 1) / 60
    columns = Counter((int(1000 * (a.end - a.start) / width), outcome(a)) for a in attempts)
    base = Counter[int]()
    for (column, name), number in sorted(columns.items()):
        x, y = (column + 0.5) * width, base[column]
        yield Segment(name, x, y, x, y + number)
        base[column] += number


class Segment(NamedTuple):
    style: str  # its CSS class
    x: float
    y: float
    to_x: float
    to_y: float


class Chart(NamedTuple):
    """Segments in a frame with axes from 0: one path for each class, and the ticks."""

    title: str
    x_name: str
    y_name: str
    thickness: float
    paths: dict[str, str]
    x_ticks: list[tuple[float, float]]  # place, value
    y_ticks: list[tuple[float, float]]
