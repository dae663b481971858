"""What is measured. A new subject is one more entry in the lists below.

A subject that isn't the service names a Flask file in this folder, as `bare:app` does. On
PostgreSQL such a seller uses the tables of the service that runs beside it, which audits them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service import PROJECT

SERVICE = "app:app"
CUSTOMER = "customer_12345"
PLENTY = 1_000_000_000  # units: more than any run sells
FEW, MANY = 100, 1_000_000  # purchases stored before a run


@dataclass(frozen=True)
class Subject:
    name: str
    target: str = SERVICE
    call: str = "POST /buy_ticket"
    status: int = 200  # of every answer that counts
    stock: int = PLENTY  # units at the start of each run
    stored: int = 0  # purchases in an SQLite file before the first run
    database_url: str = ""  # of a PostgreSQL server that subjects share; none: an SQLite file
    checkout: Path = PROJECT  # the folder in which gunicorn is started


BARE = Subject("bare Flask route", target="bare:app")
SELLING = Subject("selling")
SOLD_OUT = Subject("sold out", stock=0, status=410)
INVENTORY = Subject("GET /inventory", call="GET /inventory")
SELECT_FOR_UPDATE = Subject("SELECT FOR UPDATE", target="select_for_update:app")

SUBJECTS = {"bare": BARE, "selling": SELLING, "sold-out": SOLD_OUT, "inventory": INVENTORY}
POSTGRESQL = [SELLING, SOLD_OUT, SELECT_FOR_UPDATE]  # the service first: it audits the others
COMPARED = [SELLING, SOLD_OUT]  # of two checkouts


def on_postgresql(subjects: Sequence[Subject], url: str) -> list[Subject]:
    return [replace(one, name=f"{one.name}, PostgreSQL", database_url=url) for one in subjects]


def with_stored(subject: Subject, purchases: int) -> Subject:
    return replace(subject, name=f"{subject.name}, {purchases:,} stored", stored=purchases)


def before(subject: Subject, checkout: Path, url: str) -> Subject:
    """The same subject under another checkout, whose PostgreSQL database may be another one."""
    name, url = f"{subject.name}, before", url if subject.database_url else ""
    return replace(subject, name=name, checkout=checkout, database_url=url)
