"""Move a sale from SQLite to PostgreSQL, stock and purchases complete: stop the service, then

    python -m postgres.move_from_sqlite inventory.db postgresql://user:password@host/database

All or nothing, into a database where nothing was sold yet. Purchase ids and keys stay what they were.
"""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import psycopg

import db
from postgres.store import PostgresStore

TAKE_OVER = "UPDATE inventory SET item_name = %s, stock = %s, initial_stock = %s, last_updated = %s"
COLUMNS = "purchase_id, item_id, customer_id, idempotency_key, remaining_stock, purchase_time"
GO_ON_COUNTING = "SELECT setval(pg_get_serial_sequence('purchases', 'purchase_id'), %s)"


def move(path: Path, url: str) -> db.Audit:
    """What was moved, as PostgreSQL counts it. Whatever it raises, nothing was moved."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as source:
        source.isolation_level = None
        source.execute("BEGIN IMMEDIATE")  # nobody sells there meanwhile
        item_name, initial_stock = source.execute(
            "SELECT item_name, initial_stock FROM inventory"
        ).fetchone()
        store = PostgresStore(url, item_name, initial_stock, lock_timeout_s=5.0)
        store.create()
        with psycopg.connect(url) as target:  # one transaction
            _copy(source, target)
        source.execute("ROLLBACK")
    audit = store.audit()
    store.close()
    return audit


def _copy(source: sqlite3.Connection, target: psycopg.Connection[tuple[object, ...]]) -> None:
    target.execute("SELECT FROM inventory FOR UPDATE")
    if target.execute("SELECT FROM purchases LIMIT 1").fetchone() is not None:
        raise ValueError("there are purchases in the target already")
    *numbers, last_updated = source.execute(
        "SELECT item_name, stock, initial_stock, last_updated FROM inventory"
    ).fetchone()
    target.execute(TAKE_OVER, (*numbers, last_updated + "+00"))
    with target.cursor().copy(f"COPY purchases ({COLUMNS}) FROM STDIN".encode()) as copy:
        for *columns, purchase_time in source.execute(f"SELECT {COLUMNS} FROM purchases"):
            copy.write_row((*columns, purchase_time + "+00"))
    for (last_id,) in source.execute("SELECT seq FROM sqlite_sequence WHERE name = 'purchases'"):
        target.execute(GO_ON_COUNTING, (last_id,))


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        initial_stock, left, purchases = move(Path(sys.argv[1]), sys.argv[2])
        print(f"Moved: {purchases} purchases, {left} of {initial_stock} units left")
    except (ValueError, db.StoreError, sqlite3.Error, psycopg.Error) as error:
        sys.exit(f"Nothing was moved: {error}")


if __name__ == "__main__":
    main()
