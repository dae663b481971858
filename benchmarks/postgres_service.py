"""Sales through the whole service on PostgreSQL, with and without a synchronous standby.

    python benchmarks/postgres_service.py [--against FOLDER] [--workers 4] [--rounds 5]

Two servers run at once, one of them with a standby 1 ms away. All subjects take turns.
"""

import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import click

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "tests", HERE.parent):
    sys.path.insert(0, str(folder))

from benchmarks.measures import Run, load  # noqa: E402
from benchmarks.postgres_server import servers  # noqa: E402
from benchmarks.servers import Running, started  # noqa: E402
from benchmarks.subjects import SELLING, SOLD_OUT, Subject  # noqa: E402


@click.command(help="Sales through the service on PostgreSQL, without and with a standby.")
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--workers", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--connections", type=click.IntRange(1, 1000), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 30), default=5, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 30), default=3, show_default=True)
@click.option("--sold-out", is_flag=True, help="Refusals instead of sales.")
@click.option("--standby/--no-standby", default=True, help="By default without and with one.")
def main(
    against: Path | None,
    workers: int,
    connections: int,
    rounds: int,
    seconds: int,
    sold_out: bool,
    standby: bool,
) -> None:
    subject = SOLD_OUT if sold_out else SELLING
    with ExitStack() as stack:
        running: list[Running] = []
        for distant in (False, True)[: 1 + standby]:
            urls = stack.enter_context(servers(distant))
            for one in subjects(subject, distant, urls, against):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                running.append(stack.enter_context(started(one, folder, workers)))
        runs: defaultdict[str, list[Run]] = defaultdict(list)
        for _ in range(rounds):
            for server in running:
                runs[server.subject.name].append(load(server, seconds, connections))
            running.reverse()  # so that a machine that slows down favours nobody
        report(runs, subject.name)


def subjects(
    subject: Subject, distant: bool, urls: dict[str, str], against: Path | None
) -> list[Subject]:
    where = ", standby 1 ms away" if distant else ""
    found = [replace(subject, name=f"{subject.name}{where}", database_url=urls["URL1"])]
    if against:
        name = f"{subject.name}{where}, before"
        older = replace(subject, name=name, database_url=urls["URL2"], checkout=against.resolve())
        found.append(older)
    return found


def report(runs: dict[str, list[Run]], first: str) -> None:
    """Medians; ratios are medians of the ratios within a round, to the first subject."""
    for name, own in runs.items():
        ratio = median(
            a.requests_per_s / b.requests_per_s for a, b in zip(own, runs[first], strict=True)
        )
        rate, p99 = median(r.requests_per_s for r in own), median(r.p99_ms for r in own)
        void = "" if all(run.valid and not run.errors for run in own) else "  VOID"
        print(f"{name:40} {rate:7.0f}/s  {ratio:5.2f} of {first}  p99 {p99:7.1f} ms{void}")


if __name__ == "__main__":
    main()
