"""Move a sale from SQLite to PostgreSQL, into a database where nothing was sold yet.

Stock, purchases, ids and keys stay what they were. The source is marked first, by a trigger that
stops every sale, reset and restock of a service which still runs on it. A failure takes the mark
off; in doubt it stays, and nobody sells.
"""

import sys
from contextlib import closing
from pathlib import Path

import click
import psycopg
from psycopg import conninfo

import db
from postgres.connections import DEFAULTS
from postgres.store import PostgresStore
from sqlite.engine import sqlite3
from sqlite.setup import MOVED, examine
from sqlite.wal import WalDatabase

LOCK_TIMEOUT_S = 5.0  # for either database
MARK = f"""CREATE TRIGGER {MOVED} BEFORE UPDATE ON inventory BEGIN
    SELECT RAISE(ABORT, 'this sale was moved: %s'); END"""
READ = "SELECT item_name, initial_stock, stock, last_updated || '+00' FROM inventory"
WRITE = "UPDATE inventory SET item_name = %s, initial_stock = %s, stock = %s, last_updated = %s"
COLUMNS = "purchase_id, item_id, customer_id, idempotency_key, remaining_stock, purchase_time"
READ_PURCHASES = f"SELECT {COLUMNS} || '+00' FROM purchases"  # noqa: S608
WRITE_PURCHASES = f"COPY purchases ({COLUMNS}) FROM STDIN"
READ_LAST_ID = "SELECT seq FROM sqlite_sequence WHERE name = 'purchases'"
GO_ON_COUNTING = "SELECT setval(pg_get_serial_sequence('purchases', 'purchase_id'), %s)"


def move(path: Path, url: str) -> db.Audit:
    """What was moved, as PostgreSQL counts it. After OutcomeUnknown the source stays marked."""
    with closing(WalDatabase(path.resolve()).connect(patience_s=LOCK_TIMEOUT_S)) as source:
        source.execute("PRAGMA synchronous = FULL")
        source.execute("BEGIN IMMEDIATE")
        sale = source.execute(READ).fetchone() if examine(source) else None
        if sale is None:
            raise ValueError("there is no sale in this file")
        item_name, initial_stock, *_ = sale
        store = PostgresStore(url, item_name, initial_stock, LOCK_TIMEOUT_S)
        in_doubt = False
        try:
            source.execute(MARK % str(store).replace("'", "''"))
            source.execute("COMMIT")
            with closing(store):
                store.create()
                with closing(psycopg.connect(_with_defaults(url))) as target:  # one transaction
                    _copy(source, target)
                    in_doubt = True
                    target.commit()
                store.check()  # when this is on every disk, so is what went before it
                return store.audit()
        except BaseException as error:  # Ctrl-C, too
            if in_doubt:
                raise db.OutcomeUnknown(str(error) or "interrupted") from error
            _take_mark_off(source, error)
            raise


def _take_mark_off(source: sqlite3.Connection, cause: BaseException) -> None:
    try:
        if source.in_transaction:
            source.execute("ROLLBACK")
        source.execute(f"DROP TRIGGER IF EXISTS {MOVED}")
    except sqlite3.Error as error:
        by_hand = f"the file sells no more until you take its mark off: DROP TRIGGER {MOVED}"
        raise OSError(f"{cause or 'interrupted'} - and {error}: {by_hand}") from cause


def _with_defaults(url: str) -> str:
    """Give up on a server that has gone, as the service does."""
    given = conninfo.conninfo_to_dict(url, client_encoding="utf8")
    return conninfo.make_conninfo("", **DEFAULTS | given)


def _copy(source: sqlite3.Connection, target: psycopg.Connection) -> None:
    target.execute("SELECT FROM inventory FOR UPDATE")
    if target.execute("SELECT FROM purchases LIMIT 1").fetchone() is not None:
        raise ValueError("there are purchases in the target already")
    target.execute(WRITE, source.execute(READ).fetchone())
    with target.cursor().copy(WRITE_PURCHASES.encode()) as copy:
        for row in source.execute(READ_PURCHASES):
            copy.write_row(row)
    for row in source.execute(READ_LAST_ID):
        target.execute(GO_ON_COUNTING, row)


@click.command(help="Move the sale in the SQLite FILE to the PostgreSQL at URL, complete.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("url")
def main(file: Path, url: str) -> None:
    try:
        initial_stock, left, purchases = move(file, url)
    except (ValueError, OSError, db.StoreError, sqlite3.Error, psycopg.Error) as error:
        in_doubt = isinstance(error, db.OutcomeUnknown)
        result = f"Perhaps moved, {file} sells no more" if in_doubt else "Nothing was moved"
        sys.exit(f"{result}: {' '.join(str(error).split())}")
    click.echo(f"Moved: {purchases} purchases, {left} of {initial_stock} units left")


if __name__ == "__main__":
    main()
