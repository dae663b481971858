"""Each test gets its own database, the stores that keep the contract, and a test client."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from service import PROJECT

from sqlite.engine import sqlite3

OpenStore = Callable[..., Any]

# A run under nohup or in the background ignores these, and what it starts would too. A handler that
# does nothing isn't inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "inventory.db"


@pytest.fixture
def store_url(database: Path) -> str:
    """The empty database that the contract's tests use; overridden for other stores."""
    return f"sqlite:///{database}"


@pytest.fixture
def open_store(store_url: str) -> Iterator[OpenStore]:
    """Opens (again) the test's database, created with 5 units unless `stock` says otherwise."""
    opened = []

    def open_again(stock: int = 5, lock_timeout_s: float = 5.0) -> Any:
        from app import open_store

        store = open_store(store_url, "Concert", stock, lock_timeout_s)
        opened.append(store)
        store.create()
        return store

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def run_sql(store_url: str) -> Callable[[str], None]:
    """Runs a statement in the test's database, as an operator does by the shell of either store."""

    def run(statement: str) -> None:
        if store_url.startswith("sqlite"):
            with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"))) as connection:
                connection.execute("PRAGMA busy_timeout = 5000")
                with connection:
                    connection.execute(statement)
            return
        import psycopg

        with psycopg.connect(store_url) as connection:
            connection.execute(statement)

    return run


@pytest.fixture
def make_app(database: Path) -> Iterator[Callable[..., Flask]]:
    from app import create_app

    made = []

    def make(**config: Any) -> Flask:
        defaults = {"DATABASE_URL": f"sqlite:///{database}", "INITIAL_STOCK": 5, "ALLOW_RESET": 1}
        made.append(create_app(**(defaults | config)))
        return made[-1]

    yield make
    for app in made:
        app.extensions["store"].close()


@pytest.fixture
def client(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app().test_client()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A selenium driver of headless Chromium."""
    from browser import chromium

    with chromium(tmp_path) as chrome:
        yield chrome


@pytest.fixture
def rows(database: Path) -> Callable[[], tuple[int, list[tuple[Any, ...]]]]:
    """Read what is stored: the stock, and the purchases.

    A purchase is (customer_id, idempotency_key, remaining_stock).
    """

    def read() -> tuple[int, list[tuple[Any, ...]]]:
        connection = sqlite3.connect(database)
        try:
            stock = connection.execute("SELECT stock FROM inventory").fetchone()[0]
            query = (
                "SELECT customer_id, idempotency_key, remaining_stock"
                " FROM purchases ORDER BY purchase_id"
            )
            return stock, connection.execute(query).fetchall()
        finally:
            connection.close()

    return read


@pytest.fixture
def copy_of_the_program(tmp_path: Path) -> Path:
    """A folder of its own for a .env file, with what a start needs."""
    folder = tmp_path / "copy"
    rooms = ("app.py", "db.py", "schema.sql", "gunicorn.conf.py", "serving", "sqlite")
    for name in rooms:
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(PROJECT / name, folder / name)
    return folder
