"""The service's tables in an SQLite file, and one connection that sells from it without HTTP."""

import time
from contextlib import closing
from pathlib import Path

import db
from benchmarks.subjects import CUSTOMER, PLENTY
from sqlite.engine import sqlite3

SCHEMA = Path(__file__).parent.parent / "schema.sql"
FILL = """
    WITH RECURSIVE sale (number) AS
        (SELECT 1 UNION ALL SELECT number + 1 FROM sale WHERE number < ?)
    INSERT INTO purchases (item_id, customer_id, remaining_stock)
    SELECT 1, 'customer_' || number, ? - number FROM sale"""
NEW_STOCK = "INSERT INTO inventory (item_id, item_name, stock, initial_stock) VALUES (1, ?, ?, ?)"


def create_filled(database: Path, purchases: int = 0) -> sqlite3.Connection:
    """A new file with `purchases` on record, as if they had been sold one by one."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SCHEMA.read_text(encoding="utf-8"))
    connection.execute(NEW_STOCK, ("Item A", PLENTY - purchases, PLENTY))
    if purchases:
        connection.execute(FILL, (purchases, PLENTY))
    return connection


def sell(database: Path, seconds: float) -> tuple[list[float], bool]:
    """The milliseconds of each sale, and whether the audit was consistent.

    The transaction is the service's, with its checkpoints, but COMMIT flushes the disk.
    """
    times_ms: list[float] = []
    with closing(create_filled(database)) as connection:
        for pragma in ("foreign_keys = ON", "wal_autocheckpoint = 0", "synchronous = FULL"):
            connection.execute(f"PRAGMA {pragma}")
        begin = now = time.perf_counter()
        while now < begin + seconds:
            sell_one(connection)
            if len(times_ms) % db.CHECKPOINT_EVERY == 0:
                connection.execute("PRAGMA wal_checkpoint(RESTART)")
            before, now = now, time.perf_counter()
            times_ms.append(1000 * (now - before))
        initial, left, records = connection.execute(db.COUNT_PURCHASES).fetchone()
    return times_ms, left + records == initial


def sell_one(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    (stock,) = connection.execute(db.FIND_STOCK).fetchone()
    connection.execute(db.TAKE_UNIT)
    connection.execute(db.RECORD_PURCHASE, (CUSTOMER, None, stock - 1))
    connection.execute("COMMIT")
