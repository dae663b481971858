"""What the measurements say: medians, ratios, a Markdown table, a picture."""

import os
import platform
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple


class Run(NamedTuple):
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    errors: int
    valid: bool  # the audit was consistent, and the answer the one that was to be measured


@dataclass(frozen=True)
class Result:
    name: str
    runs: list[Run]
    reference: list[Run]  # of the same rounds; its own runs: compared with nothing

    @property
    def valid(self) -> bool:
        return all(run.valid for run in self.runs)

    def figures(self) -> dict[str, Any]:
        """The median of the rounds, the worst of all; the ratio is the median of each round's own."""
        pairs = list(zip(self.runs, self.reference, strict=True))
        return {
            "requests_per_s": median(run.requests_per_s for run in self.runs),
            "ratio": median(run.requests_per_s / bare.requests_per_s for run, bare in pairs),
            "p50_ms": median(run.p50_ms for run in self.runs),
            "p99_ms": median(run.p99_ms for run in self.runs),
            "p99_ratio": median(run.p99_ms / bare.p99_ms for run, bare in pairs),
            "worst_ms": max(run.worst_ms for run in self.runs),
            "worst_ratio": median(run.worst_ms / bare.worst_ms for run, bare in pairs),
            "errors": sum(run.errors for run in self.runs),
            "valid": self.valid,
            "rounds": [run._asdict() for run in self.runs],
        }


def summary(times_ms: Sequence[float], wall_s: float, errors: int, valid: bool) -> Run:
    times_ms = sorted(times_ms)
    p99_ms = times_ms[len(times_ms) * 99 // 100]
    return Run(len(times_ms) / wall_s, median(times_ms), p99_ms, times_ms[-1], errors, valid)


def machine(folder: Path, workers: int, connections: int) -> dict[str, str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("flask", "gunicorn"))
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, {file_system(folder)}",
        "software": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {packages}",
        "load": f"{workers} sync workers, {connections} connections",
    }


def file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((point, kind) for point, kind in mounts if folder.is_relative_to(point))[1]


def table(results: Sequence[Result], facts: dict[str, str]) -> str:
    lines = [
        "| subject | requests/s | ratio | p50 ms | p99 ms | ratio | worst ms | ratio | errors |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in results:
        now = one.figures()
        cells = [f"{now['requests_per_s']:,.0f}", f"{now['ratio']:.2f}", f"{now['p50_ms']:.1f}",
                 f"{now['p99_ms']:.1f}", f"{now['p99_ratio']:.2f}",
                 f"{now['worst_ms']:.0f}", f"{now['worst_ratio']:.2f}", str(now["errors"])]  # fmt: skip
        lines.append(
            f"| {one.name} | {' | '.join(cells if one.valid else ['void'] * len(cells))} |"
        )
    return "\n".join([*lines, "", *(f"- {name}: {fact}" for name, fact in facts.items())])


def picture(results: Sequence[Result]) -> str:
    """Requests per second as bars."""
    valid = [one for one in results if one.valid]
    longest = max((one.figures()["requests_per_s"] for one in valid), default=1)
    bars = []
    for row, one in enumerate(valid):
        now, y = one.figures(), 30 * row + 40
        text = f"{now['requests_per_s']:,.0f} ({now['ratio']:.2f})"
        width = 380 * now["requests_per_s"] / longest
        bars.append(f'<text x="270" y="{y + 15}" text-anchor="end">{escape(one.name)}</text>')
        bars.append(f'<rect x="280" y="{y}" width="{width:.1f}" height="20" fill="#2b6cb0"/>')
        bars.append(f'<text x="{286 + width:.1f}" y="{y + 15}">{text}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{30 * len(valid) + 50}"'
        ' font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>\n'
        '<text x="280" y="24">requests per second (ratio to the first of its group)</text>\n'
        + "\n".join(bars)
        + "\n</svg>\n"
    )
