"""The PostgreSQL store: the same verbs and promises as db.SQLiteStore, for any number of hosts.

A sale is one statement and one round trip. The row's lock is held neither across the network nor
through the disk's flush: the same trip carries a second transaction that waits for the disks.
`_refusal` decides which failures mean "certainly not sold".
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from psycopg import errors

import db
from postgres import setup
from postgres.connections import Connections, Row, Statement, one_line, row_of

RETRY_SLEEP_MAX_S = 0.01
PATIENCE_MAX_S = 20.0  # gunicorn ends a worker 30 s after the lock timeout


class PostgresStore:
    """Every verb raises Unavailable, with its cause, when the server can't be reached or used."""

    stopped = ""  # here every fault ends without a restart
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
        self._on_lock_wait: Callable[[float], object] = lambda seconds: None
        self._durable_zero = ""  # the version of the row that is sold out on every disk
        self._careful = True  # until a commit was confirmed in time
        self._patience_s = 0.0  # of a careful sale for its commit, after one that failed

    def buy(
        self,
        customer_id: str,
        idempotency_key: str | None = None,
        buyer_is_there: Callable[[], bool] | None = None,
    ) -> db.Purchase:
        """Sell one unit; when this returns, the purchase is on the server's disk.

        The same key again returns the same purchase, `replayed`. Raises SoldOut, KeyReused, Busy,
        BuyerGone and Unavailable (nothing was sold), or OutcomeUnknown (the connection was lost in
        between). `buyer_is_there` is called only without a key, before each statement that sells.
        """
        deadline = time.monotonic() + self.lock_timeout_s
        if self._durable_zero:
            purchase_id, stock, version = self._read((LOOK, (idempotency_key,)))[0]
            if purchase_id is None and stock == 0 and version == self._durable_zero:
                raise db.SoldOut
            self._durable_zero = ""
        while True:  # again where SELL waited in vain and saw an old stock (sell.sql)
            if idempotency_key is None and buyer_is_there is not None and not buyer_is_there():
                raise db.BuyerGone
            row = self._sell(deadline, customer_id, idempotency_key)
            purchase_id, remaining_stock, owner, stock, version = row
            if owner not in (None, customer_id):
                raise db.KeyReused
            if purchase_id is not None:
                return db.Purchase(purchase_id, remaining_stock, replayed=owner is not None)
            if stock == 0:
                self._durable_zero = version
                raise db.SoldOut

    def _sell(self, deadline: float, customer_id: str, idempotency_key: str | None) -> Row:
        """What SELL says, once that is on every disk: a replay and a sold-out, too.

        WAL is written in order: with CONFIRM all is there that went before it. While nobody knows
        whether it comes through, the sale holds the row's lock until it is there itself, for one
        more lock timeout if need be. So those who come next are refused meanwhile, and not the
        whole stock is sold without a word.
        """
        early = None if self._careful else "off"
        repeatable = idempotency_key is not None
        sale: Statement = (SELL, (idempotency_key, customer_id, early))
        asked = time.monotonic()
        try:
            if early:
                row, _ = self._ask(deadline, [sale], [(CONFIRM, ())], repeatable=repeatable)
            else:
                (row,) = self._ask(
                    deadline, [sale], repeatable=repeatable, patience_s=self._patience_s
                )
                if row[0] is None or row[2] is not None:  # nothing was sold that waited itself
                    self._ask(deadline, [(CONFIRM, ())], repeatable=True)
        except db.OutcomeUnknown:
            self._careful, self._patience_s = True, min(self.lock_timeout_s, PATIENCE_MAX_S)
            raise
        self._careful, self._patience_s = False, 0.0
        self._on_lock_wait(time.monotonic() - asked)
        return row

    def find(self, customer_id: str, idempotency_key: str) -> db.Purchase | None:
        """What the key has bought already, as `buy` replays it. Raises KeyReused."""
        purchase_id, remaining_stock, owner = self._read((FIND, (idempotency_key,)))[0]
        if owner is None:
            return None
        self._ask(time.monotonic() + self.lock_timeout_s, [(CONFIRM, ())], repeatable=True)
        if owner != customer_id:
            raise db.KeyReused
        return db.Purchase(purchase_id, remaining_stock, replayed=True)

    def inventory(self) -> db.Inventory:
        return db.Inventory(*self._read((FIND_INVENTORY, ()))[0])

    def audit(self) -> db.Audit:
        return db.Audit(*self._read((COUNT_PURCHASES, ()))[0])

    def reset(self, stock: int) -> None:
        """For testing: forget all purchases and put `stock` units on sale. Raises Busy."""
        deadline = time.monotonic() + self.lock_timeout_s
        self._ask(deadline, [(TRUNCATE, ()), (SET_STOCK, (str(stock),))], repeatable=False)

    def check(self) -> None:
        """Go the whole way of a sale without selling: a standby can still be read. Raises Busy."""
        steps = (TOUCH, CONFIRM, setup.EXAMINE, setup.COMPARE_IDS)
        for row in self._read(*((step, ()) for step in steps))[2:]:
            setup.require(row)

    def create(self) -> None:
        """Make the tables and the first stock, if they aren't there.

        Safe from many processes at once. Existing tables are only read. No connection is left open.
        """
        deadline = time.monotonic() + max(self.lock_timeout_s, db.CREATE_PATIENCE_S)
        try:
            setup.create(self._connections, self.item_name, self.initial_stock, deadline)
        except psycopg.Error as error:
            raise db.Unavailable(one_line(error)) from error

    def measure(
        self, on_lock_wait: Callable[[float], object], on_checkpoint: Callable[[], object]
    ) -> None:
        """Tell the seconds of each statement that sells, with its wait for the row's lock."""
        self._on_lock_wait = on_lock_wait

    def gauges(self) -> dict[str, float]:
        """For a monitor: seconds for which the oldest snapshot has kept dead rows.

        Without the right pg_read_all_stats only this role's own are seen.
        """
        return {"oldest_snapshot_seconds": float(self._read((OLDEST_SNAPSHOT, ()))[0][0])}

    def close(self) -> None:
        """Close this process's connections."""
        self._connections.close()

    def __str__(self) -> str:
        return f"PostgreSQL, {self._connections.place}"

    def _read(self, *statements: Statement) -> list[Row]:
        """A row of each, which sells nothing."""
        deadline = time.monotonic() + self.lock_timeout_s
        try:
            return self._ask(deadline, *([one] for one in statements), repeatable=True)
        except db.OutcomeUnknown as error:
            raise db.Unavailable(str(error)) from error

    def _ask(
        self,
        deadline: float,
        *transactions: list[Statement],
        repeatable: bool,
        patience_s: float = 0,
    ) -> list[Row]:
        """A row of each transaction; asked for again where that can't sell a second unit.

        `deadline`, of time.monotonic(), is that for the pool, the lock and all attempts together.
        `repeatable` allows another attempt even where the first may have sold.
        """
        started = time.monotonic()
        earlier: db.StoreError | None = None  # of the attempts before; an unknown outcome stays
        while True:
            try:
                outcomes = self._connections.ask(deadline, *transactions, patience_s=patience_s)
            except db.StoreError as error:  # no connection: what went before says more
                raise earlier or error from error
            except psycopg.Error as error:  # before anything was sent
                outcomes = [error]
            failure = next((o for o in outcomes if isinstance(o, psycopg.Error)), None)
            if failure is None:
                if not all(outcomes):
                    raise db.Unavailable("the inventory table is empty")
                return [row_of(outcome) for outcome in outcomes]
            if failure is outcomes[0]:
                refusal = _refusal(failure, time.monotonic() - started)
            else:  # the first, a sale perhaps, is there, on some disk
                refusal = db.OutcomeUnknown(one_line(failure))
            if not isinstance(earlier, db.OutcomeUnknown):
                earlier = refusal
            is_unknown = isinstance(refusal, db.OutcomeUnknown)
            again = repeatable if is_unknown else isinstance(failure, UNDONE)
            if not again or time.monotonic() > deadline:
                raise earlier from failure
            time.sleep(random.uniform(0, RETRY_SLEEP_MAX_S))  # noqa: S311


def _refusal(error: psycopg.Error, waited_s: float) -> db.StoreError:
    """What a failed statement means. An error that the server reports undid it.

    Without a report nobody knows. Nor does a pooler or a distributed engine that says so (class 08,
    40003), and a PANIC may come after the commit record was written.
    """
    code, severity = error.sqlstate or "08", error.diag.severity_nonlocalized
    if code.startswith("08") or code == "40003" or severity == "PANIC":
        return db.OutcomeUnknown(one_line(error))
    if isinstance(error, WAITED + CONFLICTS):
        return db.Busy(waited_s)
    if isinstance(error, errors.IntegrityError) and not isinstance(error, UNDONE):
        raise error  # a bug, refused by a constraint
    return db.Unavailable(one_line(error))


SELL = Path(__file__).with_name("sell.sql").read_text("utf-8")
# A commit waits for the disks only if it has an id and wrote WAL: hence a transactional message.
CONFIRM = "SELECT pg_logical_emit_message(true, 'flash sale', '')"
# LOOK costs half as much as SELL. It is tried first after a SoldOut, and knows only that one zero:
# another may not be on every disk yet, and a failover would take the refusal back.
LOOK = """
    SELECT purchase_id, stock, inventory.xmin
    FROM inventory LEFT JOIN purchases ON idempotency_key = $1 WHERE inventory.item_id = 1"""
FIND = """
    SELECT purchase_id, remaining_stock, customer_id
    FROM inventory LEFT JOIN purchases ON idempotency_key = $1 WHERE inventory.item_id = 1"""
FIND_INVENTORY = """
    SELECT item_id, item_name, stock, initial_stock, initial_stock - stock,
        to_char(last_updated AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') FROM inventory"""
COUNT_PURCHASES = "SELECT initial_stock, stock, (SELECT count(*) FROM purchases) FROM inventory"
OLDEST_SNAPSHOT = """
    SELECT ceil(coalesce(extract(epoch FROM max(clock_timestamp() - xact_start)), 0))::bigint
    FROM pg_stat_activity WHERE backend_xmin IS NOT NULL"""
TOUCH = """
    UPDATE inventory SET stock = stock
    WHERE (SELECT set_config('synchronous_commit', 'off', true)) IS NOT NULL RETURNING item_id"""
# One transaction. purchases comes first: a sale holds on to it while it waits for the row.
TRUNCATE = "TRUNCATE purchases"
SET_STOCK = """
    UPDATE inventory SET stock = $1::integer, initial_stock = $1::integer,
        last_updated = clock_timestamp()
    RETURNING item_id"""

WAITED = (errors.LockNotAvailable, errors.QueryCanceled)
CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
MOVED = (errors.AdminShutdown, errors.ReadOnlySqlTransaction)  # stopping, or no longer the primary
# Another attempt may succeed where this one certainly sold nothing.
UNDONE = (*CONFLICTS, *MOVED, errors.UniqueViolation)
