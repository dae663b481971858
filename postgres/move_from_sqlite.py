"""Move a sale from SQLite to PostgreSQL, into a database where nothing was sold yet.

Stock, purchases, ids and keys stay what they were. The source is marked first, by a trigger that
stops a service which still runs on it. A failure takes the mark off; in doubt it stays, and nobody
sells.
"""

import sys
from contextlib import closing
from pathlib import Path

import click
import psycopg

import db
from postgres.connections import place
from postgres.store import PostgresStore
from sqlite.engine import sqlite3
from sqlite.setup import MOVED, has_our_tables
from sqlite.wal import WalDatabase

LOCK_TIMEOUT_S = 5.0  # for either database

MARK = f"""CREATE TRIGGER {MOVED} BEFORE INSERT ON purchases BEGIN
    SELECT RAISE(ABORT, 'this sale was moved to PostgreSQL, %s'); END"""
UNMARK = f"DROP TRIGGER {MOVED}"
READ = "SELECT item_name, stock, initial_stock, last_updated || '+00' FROM inventory"
READ_PURCHASES = """
    SELECT purchase_id, item_id, customer_id, idempotency_key, remaining_stock,
        purchase_time || '+00' FROM purchases"""
WRITE = "UPDATE inventory SET item_name = %s, stock = %s, initial_stock = %s, last_updated = %s"
WRITE_PURCHASES = """
    COPY purchases (purchase_id, item_id, customer_id, idempotency_key, remaining_stock,
        purchase_time) FROM STDIN"""
GO_ON_COUNTING = "SELECT setval(pg_get_serial_sequence('purchases', 'purchase_id'), %s)"


def move(path: Path, url: str) -> db.Audit:
    """What was moved, as PostgreSQL counts it. After OutcomeUnknown the source stays marked."""
    with closing(WalDatabase(path.resolve()).connect(patience_s=LOCK_TIMEOUT_S)) as source:
        source.execute("PRAGMA synchronous = FULL")
        source.execute("BEGIN IMMEDIATE")
        has_our_tables(source)
        source.execute(MARK % place(url).replace("'", "''"))
        source.execute("COMMIT")
        try:
            return _copy(source, url)
        except db.OutcomeUnknown:
            raise
        except BaseException:
            source.execute(UNMARK)
            raise


def _copy(source: sqlite3.Connection, url: str) -> db.Audit:
    item_name, stock, initial_stock, last_updated = source.execute(READ).fetchone()
    store = PostgresStore(url, item_name, initial_stock, LOCK_TIMEOUT_S)
    store.create()
    with closing(psycopg.connect(url, client_encoding="utf8")) as target:  # one transaction
        target.execute("SELECT FROM inventory FOR UPDATE")
        if target.execute("SELECT FROM purchases LIMIT 1").fetchone() is not None:
            raise ValueError("there are purchases in the target already")
        target.execute(WRITE, (item_name, stock, initial_stock, last_updated))
        with target.cursor().copy(WRITE_PURCHASES) as copy:
            for row in source.execute(READ_PURCHASES):
                copy.write_row(row)
        for row in source.execute("SELECT seq FROM sqlite_sequence WHERE name = 'purchases'"):
            target.execute(GO_ON_COUNTING, row)
        try:
            target.commit()
            store.check()  # when this is on every disk, so is what went before it
        except (psycopg.Error, db.StoreError) as error:
            raise db.OutcomeUnknown(f"{error}: look into the target before you go on") from error
    audit = store.audit()
    store.close()
    return audit


@click.command(help="Move the sale in the SQLite FILE to the PostgreSQL at URL, complete.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("url")
def main(file: Path, url: str) -> None:
    try:
        initial_stock, left, purchases = move(file, url)
    except db.OutcomeUnknown as error:
        sys.exit(f"Perhaps moved, {file} sells no more: {' '.join(str(error).split())}")
    except (ValueError, OSError, db.StoreError, sqlite3.Error, psycopg.Error) as error:
        sys.exit(f"Nothing was moved: {' '.join(str(error).split())}")
    click.echo(f"Moved: {purchases} purchases, {left} of {initial_stock} units left")


if __name__ == "__main__":
    main()
