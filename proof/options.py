"""The options of the command line. What makes no sense is refused before any sale is wiped."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from proof.buyers import BUYERS_MAX, PROCESSES_MAX

CACHE_AGE_MAX_S = 60
FILE = click.Path(path_type=Path)


class Options(NamedTuple):
    url: str | None
    stock: int
    buyers: int
    processes: int
    tests: list[int]
    own_server: bool
    delete_purchases: bool
    cache_age: float  # seconds
    seed: int
    json: Path | None
    report: Path | None


def with_options(command: Callable[[Options], int]) -> Callable[..., int]:
    def run(**given: Any) -> int:
        options = Options(**given)
        if 2 in options.tests and options.buyers <= options.stock:
            raise click.UsageError(
                f"test 2 needs more buyers than tickets: {options.buyers} buyers and"
                f" {options.stock} tickets were given - set --buyers or --stock"
            )
        return command(options)

    for option in reversed(OPTIONS):
        run = option(run)
    return run


def base_url(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Public systems name the address of POST /buy_ticket itself."""
    if value is None:
        return None
    url = value.strip().rstrip("/").removesuffix("/buy_ticket").rstrip("/")
    if not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", url):
        example = "http://127.0.0.1:8000"
        raise click.BadParameter(f"{value!r} has to be the address of a service, like {example}")
    return url


def numbers_of_tests(_: click.Context, __: click.Parameter, value: str) -> list[int]:
    numbers: set[int] = set()
    for part in value.split(","):
        if not re.fullmatch(r"\s*[0-5]\s*(-\s*[0-5]\s*)?", part):
            raise click.BadParameter(f"{value!r} has to be like 1-3 or 2,4; test 0 always runs")
        first, _dash, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers - {0}:
        raise click.BadParameter(f"{value!r} names none of the tests 1 to 5")
    return sorted(numbers - {0})


def new_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    if value is None:
        return None
    if value.is_dir():
        raise click.BadParameter(f"{value} is a folder: name a file")
    if not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {value.parent}")
    if not os.access(value if value.exists() else value.parent, os.W_OK):
        raise click.BadParameter(f"this user may not write {value}")
    return value


def up_to(limit: int) -> click.IntRange:
    return click.IntRange(1, limit)


OPTIONS = [
    click.option(
        "--url",
        envvar="API_URL",
        callback=base_url,
        help="The server to judge; its purchases are deleted. By default http://127.0.0.1:8000,"
        " or a server of the proof's own where nobody answers there.",
    ),
    click.option(
        "--stock", type=up_to(BUYERS_MAX), default=100, show_default=True, help="In tests 1 to 3."
    ),
    click.option(
        "--buyers",
        envvar="TOTAL_REQUESTS",
        type=up_to(BUYERS_MAX),
        default=1000,
        show_default=True,
        help="In tests 2 to 4.",
    ),
    click.option(
        "--processes",
        envvar="CONCURRENT_PROCESSES",
        type=up_to(PROCESSES_MAX),
        default=4,
        show_default=True,
        help="In test 3.",
    ),
    click.option(
        "--tests",
        default="1-5",
        show_default=True,
        callback=numbers_of_tests,
        help="Such as 1-3, for a service without keys. Test 0 always runs.",
    ),
    click.option("--own-server", is_flag=True, help="Start one, whatever --url and API_URL say."),
    click.option(
        "--delete-purchases",
        is_flag=True,
        help="Of the PostgreSQL database that DATABASE_URL names, when the own server sells there.",
    ),
    click.option(
        "--cache-age",
        type=click.FloatRange(0, CACHE_AGE_MAX_S),
        default=0,
        metavar="S",
        help="Seconds that a cache in front may keep readings and 410s without a key.",
    ),
    click.option(
        "--seed",
        type=int,
        default=lambda: time.time_ns() % 1_000_000,
        help="The same seed gives the same orders and pauses.",
    ),
    click.option("--json", type=FILE, callback=new_file, metavar="FILE", help="All figures."),
    click.option(
        "--report", type=FILE, callback=new_file, metavar="FILE", help="A page with pictures."
    ),
]
