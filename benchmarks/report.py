"""What the measurements say: medians, ratios, a Markdown table, JSON."""

import json
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measures import Run
from sqlite.engine import sqlite3

HEADER = (
    "| subject | compared with | requests/s | ratio | p50 ms | p99 ms | ratio | worst ms | ratio"
    " | errors |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Result:
    name: str
    runs: list[Run]
    compared_with: str
    reference: list[Run]  # of the same rounds; its own runs: compared with nothing

    @property
    def valid(self) -> bool:
        return all(run.valid for run in self.runs)

    def ratios(self, figure: str = "requests_per_s") -> list[float]:
        """Of each round, this run's figure to the reference's."""
        pairs = zip(self.runs, self.reference, strict=True)
        return [getattr(run, figure) / getattr(other, figure) for run, other in pairs]

    def figures(self) -> dict[str, Any]:
        """The median of the rounds, the worst of all; a ratio is the median of each round's own."""
        return {
            "compared_with": self.compared_with,
            "requests_per_s": median(run.requests_per_s for run in self.runs),
            "ratio": median(self.ratios()),
            "p50_ms": median(run.p50_ms for run in self.runs),
            "p99_ms": median(run.p99_ms for run in self.runs),
            "p99_ratio": median(self.ratios("p99_ms")),
            "worst_ms": max(run.worst_ms for run in self.runs),
            "worst_ratio": median(self.ratios("worst_ms")),
            "errors": sum(run.errors for run in self.runs),
            "valid": self.valid,
            "rounds": [run._asdict() for run in self.runs],
        }

    def row(self) -> str:
        now = self.figures()
        cells = [
            f"{now['requests_per_s']:,.0f}",
            f"{now['ratio']:.2f}",
            f"{now['p50_ms']:.1f}",
            f"{now['p99_ms']:.1f}",
            f"{now['p99_ratio']:.2f}",
            f"{now['worst_ms']:.0f}",
            f"{now['worst_ratio']:.2f}",
            f"{now['errors']}",
        ]
        cells = cells if self.valid else ["void"] * len(cells)
        return f"| {self.name} | {self.compared_with} | {' | '.join(cells)} |"


@dataclass
class Report:
    folder: Path  # for the databases
    facts: dict[str, str]
    results: list[Result] = field(default_factory=list)

    def add(self, runs: dict[str, list[Run]]) -> None:
        """Each subject compared with the first of them."""
        first = next(iter(runs))
        for name, own in runs.items():
            self.results.append(Result(name, own, "-" if name == first else first, runs[first]))

    def table(self) -> str:
        facts = [f"- {name}: {fact}" for name, fact in self.facts.items()]
        return "\n".join([HEADER, *(one.row() for one in self.results), "", *facts])

    def json(self) -> str:
        figures = {one.name: one.figures() for one in self.results}
        return json.dumps({"facts": self.facts, "figures": figures}, indent=2) + "\n"


def machine(folder: Path, workers: int, connections: int) -> dict[str, str]:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    disk = max((point, kind) for point, kind in mounts if folder.is_relative_to(point))[1]
    versions = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    versions += [f"{name} {version(name)}" for name in ("flask", "gunicorn")]
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, {disk}",
        "software": ", ".join(versions),
        "load": f"{workers} sync workers, {connections} connections",
    }
