"""A sale on SQLite: one item, its stock, and every purchase on record.

The database alone keeps the promise that each unit is sold exactly once. Its write lock puts the
sales one after another, and its constraints (schema.sql) refuse what must never be. Nothing in this
process decides a sale, so any number of threads and processes may use the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sqlite import setup
from sqlite.engine import ORIGIN, primary_code, sqlite3
from sqlite.locks import LockTimeoutError
from sqlite.wal import FlushError, StoppedError, WalDatabase, WalReader

CREATE_PATIENCE_S = 5.0  # at the first start, however short the lock timeout
CHECKPOINT_EVERY = 500  # sales; about 6 MB of WAL

BuyerIsThere = Callable[[], bool] | None  # whether the buyer still waits; None: nobody can tell


class SQLiteStore:
    """Every verb raises Unavailable, with its cause, when SQLite can't use the file."""

    concurrency_model = "SQLite in WAL mode, one connection and one BEGIN IMMEDIATE per purchase"

    def __init__(
        self, path: Path, item_name: str, initial_stock: int, lock_timeout_s: float
    ) -> None:
        self.file = WalDatabase(path)
        self.errors = StoreErrors(path)
        self.item_name = item_name
        self.initial_stock = initial_stock
        self.lock_timeout_s = lock_timeout_s

    def buy(
        self,
        customer_id: str,
        idempotency_key: str | None = None,
        buyer_is_there: BuyerIsThere = None,
    ) -> Purchase:
        """Sell one unit; when this returns, the purchase is on disk.

        The same key again returns the same purchase, `replayed`. Raises SoldOut, KeyReused, Busy,
        BuyerGone and Unavailable (nothing was sold), or OutcomeUnknown (the disk failed while
        committing). `buyer_is_there` is called only without a key: a buyer with one can ask again.
        """
        with (
            self.errors,
            self.file.running_reader() as reader,
            DurableRefusals(self.file, reader, idempotency_key),
        ):
            # Without the lock: replays end here, and a SOLD OUT that isn't remembered.
            purchase = _find(reader, customer_id, idempotency_key)
            if purchase is None:
                purchase = self._sell(reader, customer_id, idempotency_key, buyer_is_there)
            self.file.flush(reader)  # a replay too: its seller may have died before the flush
        if purchase.purchase_id % CHECKPOINT_EVERY == 0 and not purchase.replayed:
            self.file.checkpoint()
        return purchase

    def _sell(
        self,
        reader: WalReader,
        customer_id: str,
        idempotency_key: str | None,
        buyer_is_there: BuyerIsThere,
    ) -> Purchase:
        def require_buyer_and_files() -> None:
            if idempotency_key is None and buyer_is_there is not None and not buyer_is_there():
                raise BuyerGone
            reader.require_same_files()

        with self.file.begin_immediate(self.lock_timeout_s, require_buyer_and_files) as connection:
            return _sell_one(connection, customer_id, idempotency_key)

    def find(self, customer_id: str, idempotency_key: str) -> Purchase | None:
        """What the key has bought already, as `buy` replays it. Raises KeyReused."""
        with (
            suppress(SoldOut),  # it has bought nothing
            self.errors,
            self.file.running_reader() as reader,
            DurableRefusals(self.file, reader, idempotency_key),
        ):
            purchase = _find(reader, customer_id, idempotency_key)
            if purchase is not None:
                self.file.flush(reader)
            return purchase
        return None

    def inventory(self) -> Inventory:
        with self.errors, self.file.reader() as reader:
            return Inventory(*_row(reader.connection, FIND_INVENTORY))

    def audit(self) -> Audit:
        with self.errors, self.file.reader() as reader:
            return Audit(*_row(reader.connection, COUNT_PURCHASES))

    def reset(self, stock: int) -> None:
        """For testing: forget all purchases and put `stock` units on sale. Raises Busy."""
        with self.errors, self.file.running_reader() as reader:
            lock = self.file.begin_immediate(self.lock_timeout_s, reader.require_same_files)
            with lock as connection:
                _row(connection, FIND_STOCK)
                connection.execute("DELETE FROM purchases")
                connection.execute(SET_STOCK, (stock, stock))
            self.file.flush(reader)
        self.file.checkpoint()

    def check(self) -> None:
        """Go the whole way of a sale without selling. A full disk can still be read.

        Raises Unavailable or Busy if no purchase could be made.
        """
        try:
            with self.errors, self.file.running_reader() as reader:
                lock = self.file.begin_immediate(self.lock_timeout_s, reader.require_same_files)
                with lock as connection:
                    setup.examine(connection)
                    _row(connection, FIND_STOCK)
                    # As it is, but written: SQLite skips an UPDATE that changes nothing.
                    connection.execute(f"PRAGMA user_version = {setup.SCHEMA_VERSION}")
                self.file.flush(reader)
        except OutcomeUnknown as error:  # no purchase, nothing to be in doubt about
            raise Unavailable(str(error)) from error
        self.file.checkpoint()

    def create(self) -> None:
        """Make tables and first stock, if they aren't there; safe from many processes at once."""
        patience_s = max(self.lock_timeout_s, CREATE_PATIENCE_S)
        with self.errors:
            setup.create(self.file, patience_s, self.item_name, self.initial_stock)
            with closing(self.file.connect()) as connection:
                _row(connection, FIND_STOCK)
            self.file.checkpoint_if_alone()

    @property
    def stopped(self) -> str:
        """Why this service sells nothing until a restart; "" while it sells."""
        return self.file.stopped

    def measure(
        self, on_lock_wait: Callable[[float], object], on_checkpoint: Callable[[], object]
    ) -> None:
        """Tell of each wait for the write lock, in seconds, and of each checkpoint."""
        self.file.on_lock_wait, self.file.on_checkpoint = on_lock_wait, on_checkpoint

    def gauges(self) -> dict[str, float]:
        return self.file.gauges()

    def close(self) -> None:
        """Close this process's standing connections."""
        self.file.close()

    def __str__(self) -> str:
        return f"{self.file.path}, by {ORIGIN} SQLite {sqlite3.sqlite_version}"


def _find(reader: WalReader, customer_id: str, idempotency_key: str | None) -> Purchase | None:
    purchase, _ = _look_up(reader.connection, customer_id, idempotency_key)
    if purchase is not None:  # a refusal checks them in confirm(), a sale before the lock
        reader.require_same_files()
    return purchase


def _look_up(
    connection: sqlite3.Connection, customer_id: str, idempotency_key: str | None
) -> tuple[Purchase | None, int]:
    """What the key has bought already, and the stock. Raises KeyReused and SoldOut.

    In one statement: between two the last unit may be sold to this key, or a reset may come.
    """
    if idempotency_key is None:
        (stock,) = _row(connection, FIND_STOCK)
    else:
        row = _row(connection, FIND_STOCK_AND_KEY, idempotency_key)
        stock, purchase_id, remaining_stock, owner = row
        if purchase_id is not None:
            if owner != customer_id:
                raise KeyReused
            return Purchase(purchase_id, remaining_stock, replayed=True), stock
    if stock == 0:
        raise SoldOut
    return None, stock


def _sell_one(
    connection: sqlite3.Connection, customer_id: str, idempotency_key: str | None
) -> Purchase:
    """Under the lock: look again, take a unit, record who has it."""
    purchase, stock = _look_up(connection, customer_id, idempotency_key)
    if purchase is not None:
        return purchase
    connection.execute(TAKE_UNIT)
    recorded = connection.execute(RECORD_PURCHASE, (customer_id, idempotency_key, stock - 1))
    return Purchase(recorded.lastrowid or 0, stock - 1, replayed=False)


def _row(connection: sqlite3.Connection, statement: str, *parameters: object) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(statement, parameters).fetchone()
    if row is None:
        raise OSError("the inventory table is empty")
    return row


FIND_STOCK = "SELECT stock FROM inventory WHERE item_id = 1"
FIND_STOCK_AND_KEY = """
    SELECT stock, purchase_id, remaining_stock, customer_id
    FROM inventory LEFT JOIN purchases ON idempotency_key = ? WHERE inventory.item_id = 1"""
TAKE_UNIT = """
    UPDATE inventory SET stock = stock - 1, last_updated = CURRENT_TIMESTAMP WHERE item_id = 1"""
RECORD_PURCHASE = """
    INSERT INTO purchases (item_id, customer_id, idempotency_key, remaining_stock)
    VALUES (1, ?, ?, ?)"""
FIND_INVENTORY = """
    SELECT item_id, item_name, stock, initial_stock, initial_stock - stock, last_updated
    FROM inventory"""
COUNT_PURCHASES = "SELECT initial_stock, stock, (SELECT count(*) FROM purchases) FROM inventory"
SET_STOCK = "UPDATE inventory SET stock = ?, initial_stock = ?, last_updated = CURRENT_TIMESTAMP"


class Purchase(NamedTuple):
    purchase_id: int
    remaining_stock: int
    replayed: bool


class Inventory(NamedTuple):
    item_id: int
    item_name: str
    current_stock: int
    initial_stock: int
    total_purchases: int  # initial - current; `Audit` counts the records
    last_updated: str  # "YYYY-MM-DD HH:MM:SS", UTC


class Audit(NamedTuple):
    initial_stock: int
    current_stock: int
    purchase_records: int  # counted row by row

    @property
    def consistent(self) -> bool:
        return self.current_stock + self.purchase_records == self.initial_stock


class DurableRefusals:
    """Puts on disk what a refusal rests on, before it is told. Entering may refuse at once.

    The reader notes its last refusal and the database's version. A SOLD OUT at the same version is
    told without a look at the stock. The version is read before the stock, so a change in between
    costs one more look. Sales read none. This is a class: a generator costs a refusal 1 µs more.
    """

    def __init__(self, file: WalDatabase, reader: WalReader, idempotency_key: str | None) -> None:
        self.file = file
        self.reader = reader
        self.idempotency_key = idempotency_key
        self.version: object = None

    def __enter__(self) -> None:
        remembered = self.reader.note
        self.version = self.reader.version() if remembered else None
        if self.idempotency_key is None and remembered == (SoldOut, self.version):
            raise SoldOut

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, SoldOut | KeyReused):
            self.file.confirm(self.reader)
            self.reader.note = type(error), self.version


class StoreErrors:
    """The one place that gives the errors of SQLite and of the disk their meaning for a sale.

    A refused constraint is a bug in this program, and goes up as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or isinstance(error, StoreError):
            return
        if isinstance(error, LockTimeoutError):
            raise Busy(error.waited_s) from error
        if isinstance(error, StoppedError):
            raise RestartNeeded(f"{self.path}: {error}") from error
        if isinstance(error, FlushError):
            raise OutcomeUnknown(str(error)) from error
        if primary_code(error) == sqlite3.SQLITE_CONSTRAINT and not setup.is_moved(error):
            return
        if isinstance(error, sqlite3.DatabaseError | OSError):
            raise Unavailable(f"{self.path}: {error}") from error


class StoreError(Exception):
    """The store refused. `message` is for the buyer, the exception's text for the log."""

    message = ""


class SoldOut(StoreError):
    message = "SOLD OUT - No more inventory available"


class Busy(StoreError):
    message = "Server busy - please retry"

    def __init__(self, waited_s: float, wanted: str = "write lock") -> None:
        super().__init__(f"no {wanted} after {waited_s:.3f} s")
        self.waited_s = waited_s


class KeyReused(StoreError):
    message = "This Idempotency-Key belongs to another customer's purchase - send a new key"


WITH_A_KEY = "with an Idempotency-Key send the same request until 200, 410 or 422"


class BuyerGone(StoreError):
    message = "The connection was closed before the purchase, nothing was sold"

    def __init__(self) -> None:
        super().__init__("the buyer hung up, nothing was sold")


class Unavailable(StoreError):
    message = f"Purchases are not possible at the moment, this attempt sold nothing - {WITH_A_KEY}"


class RestartNeeded(Unavailable):
    message = f"Until a restart no purchase is possible, this attempt sold nothing - {WITH_A_KEY}"


class OutcomeUnknown(StoreError):
    message = f"The purchase may or may not have been stored - {WITH_A_KEY}"
