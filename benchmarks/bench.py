"""Measure the service against a bare Flask route, or against another checkout of itself.

    python benchmarks/bench.py [--all] [--against FOLDER] [--postgresql URL]

Every subject runs under gunicorn with the service's own configuration file and as many workers. The
subjects take turns, round by round: a figure is the median of its rounds, a ratio the median of the
ratios within a round. A store has to pass its audit after each run, or its figure is void.
"""

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # launcher and crowd
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest

from benchmarks.measures import Run, burst, load, memory, sell_raw, start_up
from benchmarks.report import Report, machine
from benchmarks.servers import Running, started
from benchmarks.subjects import (
    BARE,
    COMPARED,
    FEW,
    INVENTORY,
    MANY,
    POSTGRESQL,
    SELLING,
    SUBJECTS,
    Subject,
    before,
    on_postgresql,
    with_stored,
)

RAW = "raw"  # measured without a server
LONG_SALE_CONNECTIONS = 64
LONG_SALE_SLICES_MIN, LONG_SALE_SLICES_MAX = 3, 30


# ---- The groups


def measure_load(report: Report, options: argparse.Namespace) -> None:
    """Connections that ask again as soon as they are answered."""
    subjects = [SUBJECTS[name] for name in options.subjects if name != RAW]
    if options.postgresql:
        subjects += on_postgresql(POSTGRESQL, options.postgresql[0])
    raw = partial(sell_raw, report.folder, options.seconds)
    more = {"raw SQLite, no HTTP": raw} if RAW in options.subjects else {}
    report.add(_under_load(report, options, subjects, more))


def measure_burst(report: Report, options: argparse.Namespace) -> None:
    """Many buyers at once for few units, each on a connection of its own."""
    for buyers in options.bursts:
        with ExitStack() as stack:
            measures = {
                f"burst of {buyers:,}, {one.subject.name}": partial(burst, one, buyers)
                for one in _start_all(stack, report, options, [BARE, SELLING])
            }
            report.add(take_turns(measures, options.rounds))


def measure_growth(report: Report, options: argparse.Namespace) -> None:
    """Whether a sale or a reading costs more when many purchases are on record."""
    for subject, few in ((SELLING, 0), (INVENTORY, FEW)):
        pair = [with_stored(subject, few), with_stored(subject, MANY)]
        report.add(_under_load(report, options, pair))


def measure_start(report: Report, options: argparse.Namespace) -> None:
    name = "python app.py to the first purchase"
    report.add(take_turns({name: partial(start_up, report.folder)}, options.rounds))


def measure_long(report: Report, options: argparse.Namespace) -> None:
    """Sell for a minute and 100,000 purchases: the slowest request, memory, the size of the WAL."""
    runs: list[Run] = []
    with ExitStack() as stack:
        (running,) = _start_all(stack, report, options, [SELLING])
        running.still_answers()
        report.facts["largest worker at the start"] = memory(running.server)
        sold = 0
        while len(runs) < LONG_SALE_SLICES_MIN or (
            sold < options.purchases and len(runs) < LONG_SALE_SLICES_MAX
        ):
            runs.append(load(running, options.slice, LONG_SALE_CONNECTIONS))
            sold = running.server.get("/audit")["purchase_records"]
        wal_mib = (running.folder / "bench.db-wal").stat().st_size / 2**20
        report.facts |= {
            f"largest worker after {sold:,} purchases": memory(running.server),
            "WAL, which never shrinks while one serves": f"{wal_mib:.1f} MiB",
            "slowest request meanwhile": f"{max(run.worst_ms for run in runs):.0f} ms",
        }
    report.add({f"long sale, {LONG_SALE_CONNECTIONS} connections": runs})


def measure_against(report: Report, options: argparse.Namespace) -> None:
    """This checkout beside another one, in pairs that change their order from round to round.

    The bare route runs under each one's gunicorn: how far its ratio is from 1 is the run's noise.
    """
    urls = options.postgresql
    here = [*COMPARED, BARE, *(on_postgresql(COMPARED, urls[0]) if urls else ())]
    pairs = [(before(one, options.against, urls and urls[-1]), one) for one in here]
    runs = _under_load(report, options, chain.from_iterable(pairs))
    for pair in pairs:
        report.add({one.name: runs[one.name] for one in pair})
        ratios = ", ".join(f"{ratio:.3f}" for ratio in sorted(report.results[-1].ratios()))
        report.facts[f"{pair[1].name}, ratios of the rounds"] = ratios


GROUPS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "load": measure_load,
    "burst": measure_burst,
    "start": measure_start,
    "growth": measure_growth,
    "long": measure_long,
}
DEFAULT_GROUPS = ["load", "burst", "start"]


# ---- Taking turns


def take_turns(measures: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """One run of each in every round, in the opposite order in every second one."""
    runs: dict[str, list[Run]] = {name: [] for name in measures}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}: {'; '.join(measures)}", file=sys.stderr)
        for name in list(measures)[:: -1 if number % 2 else 1]:
            runs[name].append(measures[name]())
    return runs


def _under_load(
    report: Report,
    options: argparse.Namespace,
    subjects: Iterable[Subject],
    more: Mapping[str, Callable[[], Run]] | None = None,
) -> dict[str, list[Run]]:
    with ExitStack() as stack:
        measures: dict[str, Callable[[], Run]] = {
            one.subject.name: partial(load, one, options.seconds, options.connections)
            for one in _start_all(stack, report, options, subjects)
        }
        measures.update(more or {})
        return take_turns(measures, options.rounds)


def _start_all(
    stack: ExitStack, report: Report, options: argparse.Namespace, subjects: Iterable[Subject]
) -> list[Running]:
    running: list[Running] = []
    for subject in subjects:
        own = Path(tempfile.mkdtemp(dir=report.folder))
        running.append(stack.enter_context(started(subject, own, options.workers, running)))
    return running


# ---- The command line


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a whole number above 0 is needed, not {text!r}")
    return int(text)


def folder_with(text: str, file: str = "") -> Path:
    if not (Path(text) / file).exists():
        raise argparse.ArgumentTypeError(f"there is no {Path(text) / file}")
    return Path(text).resolve()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    one, number = parser.add_argument, partial(parser.add_argument, type=positive)
    several, what = partial(one, nargs="+"), parser.add_mutually_exclusive_group().add_argument
    what("--groups", nargs="+", choices=GROUPS, default=DEFAULT_GROUPS)
    what("--all", dest="groups", action="store_const", const=GROUPS, help="about ten minutes")
    checkout = partial(folder_with, file="app.py")
    what("--against", type=checkout, metavar="FOLDER", help="compare with the service in it")
    several("--subjects", choices=[*SUBJECTS, RAW], default=[*SUBJECTS, RAW], help="of load")
    several("--postgresql", metavar="URL", help="there too, it is emptied; a second for --against")
    number("--rounds", default=3)
    number("--seconds", default=4, help="of each run under load")
    number("--connections", default=32)
    number("--workers", default=4)
    number("--bursts", nargs="+", default=[1_000, 10_000], help="connections at once")
    number("--purchases", default=100_000, help="of the group long, at least")
    number("--slice", default=20, help="seconds between audits of the group long")
    one("--folder", type=folder_with, help="for the databases; default: the temporary folder")
    one("--json", type=Path, metavar="FILE", help="all figures, of each round")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: measured, 1: a figure is void, 2: it can't be measured here."""
    options = parse(arguments)
    if shutil.which("wrk") is None:
        print("wrk is missing - get it with: apt-get install wrk", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        facts = machine(Path(folder), options.workers, options.connections)
        report = Report(Path(folder), facts)
        try:
            if options.against:
                measure_against(report, options)
            for name in () if options.against else options.groups:
                GROUPS[name](report, options)
        except (AssertionError, pytest.skip.Exception) as error:  # no start; too few open files
            print(f"Cannot measure: {error}", file=sys.stderr)
            return 2
    print(report.table())
    if options.json:
        options.json.write_text(report.json())
    return 0 if all(one.valid for one in report.results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
