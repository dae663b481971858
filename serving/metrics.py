"""What Prometheus reads: figures of all workers together, and the sale as the database knows it.

prometheus_client keeps each process's figures in files, so that they outlive it and any process can
add them up. The files of a master and its workers are in a folder that no other master uses.
"""

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# In memory: on a disk their pages would be written between the flushes of sales, and a full disk
# would kill the workers that write to them.
FOLDER_PARENT = Path("/dev/shm")  # noqa: S108  (mkdtemp makes the folder in it)
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own
FILES = ("counter", "histogram")
FILE_BYTES = 128 * 1024  # room for the pairs of route and status of a day
ROOM_BYTES = 32 * 1024 * 1024
DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LOCK_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
SALE = {  # members of an inventory record
    "stock": ("current_stock", "Units left to sell."),
    "sold": ("total_purchases", "Units sold."),
    "initial_stock": ("initial_stock", "Units at the start of the sale."),
}
DATABASE = {  # what a store's gauges() may tell
    "wal_bytes": "Size of SQLite's write-ahead log.",
    "flush_failed": "1 if a flush failed: nothing more is sold until a restart.",
    "oldest_snapshot_seconds": "Age of the oldest snapshot on the PostgreSQL server.",
}


WORKERS_EXPECTED: list[bool] = []  # by who will start gunicorn in this process
FAILURES: list[bool] = []  # whether this process had one, and counts no more
SLOT = [0]  # which files are this process's: 0 are the master's, each worker has its own number

log = logging.getLogger(__name__)


class Instruments:
    """What this process counts. Under gunicorn it has to be made in the master, before the fork."""

    def __init__(self) -> None:
        several = WORKERS_EXPECTED or "gunicorn.arbiter" in sys.modules
        self.folder = own_folder() if several else None
        import prometheus_client as client  # which looks at once whether there is a folder

        client.disable_created_metrics()  # type: ignore[no-untyped-call]
        if self.folder is not None:
            by_slot = client.values.MultiProcessValue(lambda: SLOT[0])  # type: ignore[no-untyped-call]
            client.values.ValueClass = by_slot
        self.durations = client.Histogram(
            "flash_sale_request_duration_seconds",
            "Seconds from the parsed request to its answer.",
            ["route", "status"],
            buckets=DURATION_BUCKETS_S,
            registry=None,
        )
        self.lock_waits = client.Histogram(
            "flash_sale_lock_wait_seconds",
            "Seconds until a transaction had SQLite's write lock; on PostgreSQL those of the"
            " statement that sells.",
            buckets=LOCK_BUCKETS_S,
            registry=None,
        )
        self.outcomes = client.Counter(
            "flash_sale_outcomes",
            "What the store did: sold, replayed, or its trouble. Requests tell of 410 and 422.",
            ["outcome"],
            registry=None,
        )
        self.checkpoints = client.Counter(
            "flash_sale_checkpoints", "Checkpoints of SQLite's write-ahead log.", registry=None
        )
        self.worker_deaths = client.Counter(
            "flash_sale_worker_deaths", "Workers that were killed or crashed.", registry=None
        )

    def all(self) -> list[Any]:
        counters = [self.outcomes, self.checkpoints, self.worker_deaths]
        return [self.durations, self.lock_waits, *counters]


@functools.cache
def instruments() -> Instruments:
    return Instruments()


def own_folder() -> Path:
    """A new one. An environment that an older master left names that master's, which stays."""
    has_room = os.access(FOLDER_PARENT, os.W_OK) and (
        shutil.disk_usage(FOLDER_PARENT).free > ROOM_BYTES
    )
    parent = FOLDER_PARENT if has_room else None
    folder = Path(tempfile.mkdtemp(prefix=f"flash-sale-metrics-{os.getpid()}-", dir=parent))
    atexit.register(remove_if_mine, folder, os.getpid())  # a start that fails leaves none
    os.environ[FOLDER_VARIABLE] = str(folder)
    reserve(folder)
    return folder


def reserve(folder: Path) -> None:
    """Have this process's files before they are written to.

    A page that the kernel can't give then would end the process, by SIGBUS.
    """
    folder.mkdir(mode=0o700, exist_ok=True)  # somebody may have tidied up
    for kind in FILES if hasattr(os, "posix_fallocate") else ():
        path = folder / f"{kind}_{SLOT[0]}.db"
        new = path.with_suffix(".new")  # which no scrape reads
        if not path.exists():
            try:
                with new.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
                new.rename(path)
            finally:
                new.unlink(missing_ok=True)


def take_slot(slot: int) -> None:
    """In a worker, after the fork: go on in the files of one that has ended."""
    SLOT[0] = slot
    folder = instruments().folder
    if folder is not None:
        harmless(reserve)(folder)


def remove_if_mine(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def remove_folder() -> None:
    if (folder := instruments().folder) is not None:
        shutil.rmtree(folder, ignore_errors=True)


@functools.lru_cache(maxsize=1000)
def duration_of(route: str, status: str) -> Any:
    return instruments().durations.labels(route, status)


def harmless(count: Callable[..., object]) -> Callable[..., None]:
    """The same, but for its errors: figures that can't be written must not stop a sale.

    A process logs the first of them, and counts no more.
    """

    def call(*arguments: object) -> None:
        try:
            if not FAILURES:
                count(*arguments)
        except Exception:
            FAILURES.append(True)
            log.exception("The metrics of this process can't be written")

    return call


@functools.cache
def outcome_of(kind: str) -> Any:
    """The counter of an outcome, named like the class of the store's error: SoldOut is sold_out."""
    words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind)
    return instruments().outcomes.labels(words.lstrip("_"))


def observer(paths: set[str]) -> Callable[[str, str, float], None]:
    """What with_security_headers calls for each answer. Every path but `paths` counts as other."""

    def observe(path: str, status: str, seconds: float) -> None:
        duration_of(path if path in paths else "other", status[:3]).observe(seconds)

    return harmless(observe)


@harmless
def count(kind: str) -> None:
    outcome_of(kind).inc()


class Sale:
    """The database's part, read at each scrape. While it can't be read, only `up` is told."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import GaugeMetricFamily as Gauge

        try:
            told = list(self.told())
        except Exception:  # whatever it is: the figures of the workers are told all the same
            told = []
        yield Gauge("flash_sale_database_up", "1 if the database can be read.", len(told) > 0)
        for name, text, value in told:
            yield Gauge(f"flash_sale_{name}", text, value)

    def told(self) -> Iterator[tuple[str, str, float]]:
        now = self.store.inventory()
        for name, (member, text) in SALE.items():
            yield name, text, getattr(now, member)
        gauges: dict[str, float] = self.store.gauges()
        yield from ((name, DATABASE[name], value) for name, value in gauges.items())


def registry(store: Any) -> Any:
    """Everything that is told, for whoever serves it."""
    from prometheus_client import CollectorRegistry, multiprocess

    collected = CollectorRegistry()
    collected.register(Sale(store))
    if (folder := instruments().folder) is not None:
        folder.mkdir(mode=0o700, exist_ok=True)  # as in reserve()
        multiprocess.MultiProcessCollector(collected)  # type: ignore[no-untyped-call]
    else:
        for instrument in instruments().all():
            collected.register(instrument)
    return collected


def exposition(store: Any) -> tuple[bytes, str]:
    """The text and its content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return generate_latest(registry(store)), CONTENT_TYPE_LATEST
