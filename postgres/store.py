"""The PostgreSQL store: the same verbs and promises as db.SQLiteStore, for any number of hosts.

A sale is one statement in autocommit mode: one round trip, and the row lock is never held across the
network. Which failures mean "certainly not sold" is decided in `_refusal`.
"""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psycopg
from psycopg import errors

import db
from postgres.connections import Connection, Connections, Row

# All parts see the database as it was when the statement began; only UPDATE waits for the row and then
# looks at its newest version. So a key's second sale at the same time gets as far as INSERT, where the
# unique index refuses it and takes the unit back; and who waited in vain sees an old stock, and asks again.
# A purchase that is found gets locked: that goes to the WAL, so a replay too waits for the standby's disk.
SELL = """
    WITH bought AS (
        SELECT purchase_id, remaining_stock, customer_id FROM purchases WHERE idempotency_key = $1 FOR UPDATE
    ), taken AS (
        UPDATE inventory SET stock = stock - 1, last_updated = clock_timestamp()
        WHERE item_id = 1 AND stock > 0 AND NOT EXISTS (SELECT FROM bought)
        RETURNING stock
    ), sold AS (
        INSERT INTO purchases (item_id, customer_id, idempotency_key, remaining_stock)
        SELECT 1, $2, $1, stock FROM taken
        RETURNING purchase_id, remaining_stock
    )
    SELECT coalesce(sold.purchase_id, bought.purchase_id),
        coalesce(sold.remaining_stock, bought.remaining_stock), bought.customer_id, stock
    FROM inventory LEFT JOIN sold ON true LEFT JOIN bought ON true WHERE item_id = 1"""
# Who certainly buys nothing learns it at half the cost: asked first where the last buyer came too late.
LOOK = """
    SELECT purchase_id, remaining_stock, customer_id, stock
    FROM inventory LEFT JOIN purchases ON idempotency_key = $1 WHERE inventory.item_id = 1"""
FIND_INVENTORY = """
    SELECT item_id, item_name, stock, initial_stock, initial_stock - coalesce(
        (SELECT remaining_stock FROM purchases ORDER BY purchase_id DESC LIMIT 1), initial_stock),
        to_char(last_updated AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM inventory"""
COUNT_PURCHASES = "SELECT initial_stock, stock, (SELECT count(*) FROM purchases) FROM inventory"
TOUCH = "UPDATE inventory SET stock = stock RETURNING item_id"
# One transaction, as it is sent at once. purchases first: a sale holds on to it while it waits for the row.
RESET = """
    TRUNCATE purchases;
    UPDATE inventory SET stock = {0}, initial_stock = {0}, last_updated = clock_timestamp()"""
# From pg_class itself: to_regclass() may answer from before the wait for another process that creates them.
EXAMINE = """
    SELECT count(*) = 0, max(obj_description(oid, 'pg_class')),
        current_setting('server_encoding'), current_setting('transaction_read_only')
    FROM pg_class WHERE relname IN ('inventory', 'purchases') AND pg_table_is_visible(oid)"""
FIRST_STOCK = (
    "INSERT INTO inventory (item_id, item_name, stock, initial_stock) VALUES (1, %s, %s, %s)"
)

SCHEMA = Path(__file__).with_name("schema.sql")
SCHEMA_MARK = "flash sale inventory, schema 1"  # the comment on the table inventory
KEY_INDEX = "purchases_by_idempotency_key"
CREATE_LOCK = 0x464C5348

RETRY_SLEEP_MAX_S = 0.01

CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
WAITED = (errors.LockNotAvailable, errors.QueryCanceled)
MOVED = (errors.AdminShutdown, errors.ReadOnlySqlTransaction)  # stopping, or no longer the primary


class PostgresStore:
    """Every method raises Unavailable, with its cause, when the server can't be reached or used."""

    concurrency_model = (
        "PostgreSQL, one statement and one row lock per purchase: UPDATE ... WHERE stock > 0"
    )

    def __init__(
        self,
        url: str,
        item_name: str,
        initial_stock: int,
        lock_timeout_s: float,
        pool_size: int = 4,
        pool_timeout_s: float = 5.0,
    ) -> None:
        self.item_name = item_name
        self.initial_stock = initial_stock
        self.lock_timeout_s = lock_timeout_s
        self._connections = Connections(url, lock_timeout_s, pool_size, pool_timeout_s)
        self._first_statement = (
            SELL  # a guess what is cheaper; what is true the database says each time
        )

    def buy(
        self,
        customer_id: str,
        idempotency_key: str | None = None,
        buyer_is_there: Callable[[], bool] | None = None,
    ) -> db.Purchase:
        """Sell one unit; when this returns, the purchase is on the server's disk.

        The same key again returns the same purchase, `replayed`. Raises SoldOut, KeyReused, Busy and
        Unavailable (nothing was sold), or OutcomeUnknown (the connection was lost in between).
        """
        sale = {LOOK: (idempotency_key,), SELL: (idempotency_key, customer_id)}
        deadline = time.monotonic() + self.lock_timeout_s
        statement = self._first_statement
        while True:
            row = self._ask(
                statement, sale[statement], deadline, repeatable=idempotency_key is not None
            )
            purchase_id, remaining_stock, earlier_buyer, stock = row
            if earlier_buyer not in (None, customer_id):
                raise db.KeyReused(idempotency_key or "")
            if purchase_id is not None and statement is SELL:
                return db.Purchase(purchase_id, remaining_stock, replayed=earlier_buyer is not None)
            if purchase_id is None and stock == 0:
                self._first_statement = LOOK
                raise db.SoldOut
            self._first_statement = statement = SELL

    def inventory(self) -> db.Inventory:
        return db.Inventory(*self._read(FIND_INVENTORY))

    def audit(self) -> db.Audit:
        return db.Audit(*self._read(COUNT_PURCHASES))

    def reset(self, stock: int) -> None:
        """For testing: forget all purchases and put `stock` units on sale. Raises Busy."""
        self._ask(RESET.format(int(stock)), None, time.monotonic() + self.lock_timeout_s)

    def check(self) -> None:
        """Go the whole way of a sale without selling: a standby can still be read. Raises Busy."""
        self._read(TOUCH)

    def create(self) -> None:
        """Make the tables and the first stock, if they aren't there.

        Safe from many processes at once. Existing tables are only read. No connection is left open.
        """
        try:
            with self._connections.open() as connection:
                if not _is_ours(connection):
                    self._create_tables(connection)
                if connection.execute("SELECT FROM inventory").fetchone() is None:
                    raise db.Unavailable("the inventory table is empty")
        except psycopg.Error as error:
            raise db.Unavailable(_one_line(error)) from error

    def close(self) -> None:
        """Close this process's connections."""
        self._connections.close()

    def __str__(self) -> str:
        return f"PostgreSQL, {self._connections}"

    def _create_tables(self, connection: Connection) -> None:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (CREATE_LOCK,))
            if not _is_ours(connection):  # else another process was first
                connection.execute(SCHEMA.read_bytes())
                connection.execute(
                    FIRST_STOCK, (self.item_name, self.initial_stock, self.initial_stock)
                )

    def _read(self, statement: str) -> Row:
        """As `_ask`, for a statement that sells nothing."""
        try:
            return self._ask(statement, (), time.monotonic() + self.lock_timeout_s, repeatable=True)
        except db.OutcomeUnknown as error:
            raise db.Unavailable(str(error)) from error

    def _ask(
        self,
        statement: str,
        parameters: Sequence[str | None] | None,  # None: not prepared, so that it may be several
        deadline: float,  # of time.monotonic(): for the pool, the lock and all attempts together
        repeatable: bool = False,  # though nobody knows whether the first attempt has sold
    ) -> Row:
        """The statement's row; asked for again where that can't sell a second unit."""
        started = time.monotonic()
        unknown: db.OutcomeUnknown | None = None
        while True:
            try:
                with self._connections.until(deadline) as connection:
                    return _row(connection, statement, parameters)
            except psycopg.Error as error:
                refusal = _refusal(error, time.monotonic() - started)
                again = _is_undone(error)
                if isinstance(refusal, db.OutcomeUnknown):
                    unknown, again = refusal, repeatable
            except db.StoreError as error:
                refusal, again = error, False
            if not again or time.monotonic() > deadline:
                raise unknown or refusal
            time.sleep(random.uniform(0, RETRY_SLEEP_MAX_S))


def _row(connection: Connection, statement: str, parameters: Sequence[str | None] | None) -> Row:
    row = connection.ask(statement, parameters)
    if connection.warning:
        raise db.OutcomeUnknown(connection.warning)
    if row is None and parameters is not None:
        raise db.Unavailable("the inventory table is empty")
    return row or ()


def _refusal(error: psycopg.Error, waited_s: float) -> db.StoreError:
    """What a failed statement means. An error the server reports undid it; without one nobody knows.

    Exceptions: a pooler or a distributed engine that doesn't know either says so (class 08, 40003), and
    a PANIC may come after the commit record was written.
    """
    code, severity = error.sqlstate or "08", error.diag.severity_nonlocalized
    if isinstance(error, WAITED + CONFLICTS) or _is_duplicate(error):
        return db.Busy(waited_s)
    if code.startswith("08") or code == "40003" or severity == "PANIC":
        return db.OutcomeUnknown(_one_line(error))
    if isinstance(error, errors.IntegrityError):
        raise error  # a bug, refused by a constraint
    return db.Unavailable(_one_line(error))


def _is_undone(error: psycopg.Error) -> bool:
    """Whether another attempt may succeed where this one certainly sold nothing."""
    return isinstance(error, CONFLICTS + MOVED) or _is_duplicate(error)


def _is_duplicate(error: psycopg.Error) -> bool:
    """The same key was sold in the same moment: asked again, it is found."""
    return isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == KEY_INDEX


def _is_ours(connection: Connection) -> bool:
    """False where neither table is; raises Unavailable for anybody else's, or another version's."""
    blank, mark, encoding, read_only = connection.execute(EXAMINE).fetchone() or ()
    if encoding != "UTF8":
        raise db.Unavailable(f"the database's encoding is {encoding}, this program needs UTF8")
    if read_only == "on":
        raise db.Unavailable("this server is read-only: a standby?")
    if not blank and mark != SCHEMA_MARK:
        raise db.Unavailable(
            f"its tables are not ours: {mark or 'no mark'!r}, needed is {SCHEMA_MARK!r}"
        )
    return not blank


def _one_line(error: psycopg.Error) -> str:
    return " ".join((error.diag.message_primary or str(error)).split())
