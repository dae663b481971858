"""Sales on PostgreSQL without HTTP: sellers in processes of their own, alternated round by round.

    python benchmarks/postgres_sellers.py [--clients 8] [--standby] [--against FOLDER]

It starts a PostgreSQL with durability on, a Redis, and with --standby a synchronous standby that
is 1 ms away in each direction. All share this machine's cores with the sellers.
"""

import importlib
import json
import multiprocessing
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import click

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "tests", HERE.parent):
    sys.path.insert(0, str(folder))

from postgres_cluster import PASSWORD  # noqa: E402

from benchmarks.postgres_server import servers  # noqa: E402

STOCK = 1_000_000_000
WARM_UP_S = 0.5
LIMIT_S = 60.0
SELLERS = ("ours", "for-update", "redis-lock")


@click.command(help="Sales on PostgreSQL without HTTP, with several ways to sell.")
@click.option("--clients", type=click.IntRange(1, 200), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 30), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5, 30), default=3.0, show_default=True)
@click.option("--standby", is_flag=True, help="With a synchronous standby 1 ms away.")
@click.option("--against", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--only", default=",".join(SELLERS), show_default=True)
def main(
    clients: int, rounds: int, seconds: float, standby: bool, against: Path | None, only: str
) -> None:
    checkouts = [(name, HERE.parent) for name in only.split(",")]
    if against:
        checkouts.append(("ours", against.resolve()))
    with servers(standby) as urls:
        rates: defaultdict[str, list[float]] = defaultdict(list)
        p99s: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for name, checkout in checkouts:
                label = name if checkout == HERE.parent else f"{name}, before"
                rate, p99_ms = run(name, checkout, urls, clients, seconds)
                rates[label].append(rate)
                p99s[label].append(p99_ms)
                print(f"{label:14} {rate:8.0f} sales/s  p99 {p99_ms:7.1f} ms", flush=True)
    print(f"\n{clients} clients, {'a standby 1 ms away' if standby else 'no standby'}, medians:")
    first = rates[next(iter(rates))]
    for label, values in rates.items():
        ratio = median(mine / other for mine, other in zip(first, values, strict=True))
        print(
            f"{label:14} {median(values):8.0f} sales/s  p99 {median(p99s[label]):7.1f} ms"
            f"  the first is {ratio:.2f} times that"
        )


def run(
    name: str, checkout: Path, urls: dict[str, str], clients: int, seconds: float
) -> tuple[float, float]:
    """Sales per second and p99 in milliseconds of one crowd of processes."""
    command = [sys.executable, __file__, "--crowd", name, str(checkout), json.dumps(urls)]
    done = subprocess.run(
        [*command, str(clients), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.replace(PASSWORD, "***"))
    rate, p99_ms = json.loads(done.stdout)
    return rate, p99_ms


def crowd(name: str, checkout: str, urls: str, clients: str, seconds: str) -> None:
    """In a process of its own, as two checkouts can't be imported into one."""
    sys.path[:] = [checkout, *(path for path in sys.path if path != str(HERE.parent))]
    seller, begin = seller_of(name, json.loads(urls)), time.monotonic() + 1 + int(clients) / 8
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    job = (seller, begin, float(seconds), results)
    children = [fork.Process(target=sell, args=job) for _ in range(int(clients))]
    for child in children:
        child.start()
    results_of_children = [results.get() for _ in children]
    for child in children:
        child.join(LIMIT_S)
    if None in results_of_children:
        sys.exit("a seller failed")
    times = sorted(chain.from_iterable(results_of_children))
    print(json.dumps((len(times) / float(seconds), 1000 * times[len(times) * 99 // 100])))


def seller_of(name: str, urls: dict[str, str]) -> Callable[[], Callable[[str], Any]]:
    """What makes a seller in each process: a function that sells to a customer."""
    store = store_of(urls["URL1"])
    store.create()
    store.reset(STOCK)
    store.close()
    if name == "ours":
        return lambda: store.buy
    if name == "for-update":
        from benchmarks.select_for_update import Shop

        return lambda: Shop(urls["URL1"]).buy
    from benchmarks.redis_lock import LockedShop

    return lambda: LockedShop(urls["URL1"], urls["REDIS"]).buy


def store_of(url: str) -> Any:
    try:
        module = importlib.import_module("postgres.store")
    except ImportError:  # an older checkout
        module = importlib.import_module("backends.postgres")
    return module.PostgresStore(url, "Concert", STOCK, 5.0)


def connected(make: Callable[[], Callable[[str], Any]], begin: float) -> Callable[[str], Any]:
    """A seller that has sold once: so many can't connect to two cores within its time limit."""
    while True:
        try:
            buy = make()
            buy("customer_12345")
            return buy
        except Exception:
            if time.monotonic() > begin:
                raise


def sell(make: Callable[[], Callable[[str], Any]], begin: float, seconds: float, to: Any) -> None:
    """The seconds that each sale took, but for those of the warm-up."""
    try:
        buy, times = connected(make, begin), []
        time.sleep(max(0, begin - time.monotonic()))
        while (started := time.monotonic()) < begin + WARM_UP_S + seconds:
            buy("customer_12345")
            if started > begin + WARM_UP_S:
                times.append(time.monotonic() - started)
        to.put(times)
    except BaseException:
        to.put(None)
        raise


if __name__ == "__main__":
    if sys.argv[1:2] == ["--crowd"]:
        crowd(*sys.argv[2:])
    else:
        main()
