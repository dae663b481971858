"""The SQLite store: one item, its stock, and every purchase on record.

The database alone keeps the promise that each unit is sold exactly once: its write lock puts the
sales one after another, its constraints (schema.sql) refuse what must never be. Nothing in this
process decides a sale, so any number of threads and processes may use the same file.
"""

import logging
import math
import os
import random
import sqlite3
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from backends.postgres import PostgresStore

    Store: TypeAlias = "SQLiteStore | PostgresStore"

SCHEMA = Path(__file__).with_name("schema.sql")
APPLICATION_ID = 0x464C5348  # as in schema.sql, like the version
SCHEMA_VERSION = 1

RETRY_SLEEP_MIN_S = 0.0005
RETRY_SLEEP_MAX_S = 0.005
CHECKPOINT_EVERY = 500  # sales; about 6 MB of WAL
CHECKPOINT_PATIENCE_S = 0.1  # a checkpoint may hold the write lock while it waits for a reader
WAL_RESET_FIXES = {(3, 44): 6, (3, 50): 7, (3, 51): 3}  # see _checkpoint: the first patch release that has it
SETUP_PATIENCE_S = 5.0  # at the first start, and for a SELECT while another process recovers the WAL
REPLACED_CHECK_S = 1.0  # each look at the file costs as much as a SELECT of the stock

# Where the platform has fdatasync, COMMIT doesn't flush: _flush does, after the lock is free.
FLUSH_AFTER_LOCK = hasattr(os, "fdatasync")
SET_SYNCHRONOUS = f"PRAGMA synchronous = {'NORMAL' if FLUSH_AFTER_LOCK else 'FULL'}"

FIND_STOCK = "SELECT stock FROM inventory WHERE item_id = 1"
FIND_STOCK_AND_KEY = """
    SELECT stock, purchase_id, remaining_stock, customer_id
    FROM inventory LEFT JOIN purchases ON idempotency_key = ? WHERE inventory.item_id = 1"""
TAKE_UNIT = "UPDATE inventory SET stock = stock - 1, last_updated = CURRENT_TIMESTAMP WHERE item_id = 1"
RECORD_PURCHASE = (
    "INSERT INTO purchases (item_id, customer_id, idempotency_key, remaining_stock) VALUES (1, ?, ?, ?)"
)
FIND_INVENTORY = """
    SELECT item_id, item_name, stock, initial_stock, initial_stock - coalesce(
        (SELECT remaining_stock FROM purchases ORDER BY purchase_id DESC LIMIT 1), initial_stock),
        last_updated FROM inventory"""
COUNT_PURCHASES = "SELECT initial_stock, stock, (SELECT count(*) FROM purchases) FROM inventory"

log = logging.getLogger(__name__)


class StoreError(Exception):
    """The store refused. The docstring of each error is what a buyer is told."""


class SoldOut(StoreError):
    """SOLD OUT - No more inventory available"""


class Busy(StoreError):
    """Server busy - please retry"""

    def __init__(self, waited_s: float) -> None:
        super().__init__(f"no write lock after {waited_s:.3f} s")
        self.waited_s = waited_s


class KeyReused(StoreError):
    """This Idempotency-Key belongs to another customer's purchase - send a new key"""

    def __init__(self, idempotency_key: str) -> None:
        super().__init__("idempotency key used by another customer")
        self.idempotency_key = idempotency_key


class Unavailable(StoreError):
    """Purchases are not possible at the moment, nothing was sold - please retry later"""


class OutcomeUnknown(StoreError):
    """The purchase may or may not have been stored - repeat it with the same Idempotency-Key"""


class Purchase(NamedTuple):
    purchase_id: int
    remaining_stock: int
    replayed: bool


class Inventory(NamedTuple):
    item_id: int
    item_name: str
    current_stock: int
    initial_stock: int
    total_purchases: int  # as the last purchase tells it, so it costs the same at any number
    last_updated: str  # "YYYY-MM-DD HH:MM:SS", UTC


class Audit(NamedTuple):
    initial_stock: int
    current_stock: int
    purchase_records: int  # counted row by row

    @property
    def consistent(self) -> bool:
        return self.current_stock + self.purchase_records == self.initial_stock


def open_store(url: str, item_name: str, initial_stock: int, lock_timeout_s: float) -> "Store":
    """The store that `url` names; nothing is opened yet.

    `item_name` and `initial_stock` (units) are used when the database is created, `lock_timeout_s`
    bounds the wait for the write lock. Raises ValueError for a URL that names no store.
    """
    if url.startswith(("postgresql://", "postgres://")):
        try:
            from backends.postgres import PostgresStore
        except ImportError as error:
            raise ValueError(f"needs pip install -r backends/requirements.txt ({error})") from error
        return PostgresStore(url, item_name, initial_stock, lock_timeout_s)
    scheme, _, path = url.partition(":///")
    if scheme != "sqlite" or path in ("", ":memory:"):
        raise ValueError("must be sqlite:///relative/path or sqlite:////absolute/path")
    # Resolved, as SQLite puts the WAL beside the file that a link leads to.
    return SQLiteStore(Path(path).resolve(), item_name, initial_stock, lock_timeout_s)


class SQLiteStore:
    """Every method raises Unavailable, with its cause, when SQLite can't use the file."""

    concurrency_model = "SQLite in WAL mode, one connection and one BEGIN IMMEDIATE per purchase"

    def __init__(self, path: Path, item_name: str, initial_stock: int, lock_timeout_s: float) -> None:
        self.path = path
        self.uri = path.as_uri()  # quoted once: each purchase opens it
        self.item_name = item_name
        self.initial_stock = initial_stock
        self.lock_timeout_s = lock_timeout_s
        # By process: a fork must not share them.
        self._idle: defaultdict[int, deque[_Reader]] = defaultdict(deque)
        self._wal_is_whole = True

    def buy(self, customer_id: str, idempotency_key: str | None = None) -> Purchase:
        """Sell one unit; when this returns, the purchase is on disk.

        The same key again returns the same purchase, `replayed`. Raises SoldOut, KeyReused, Busy and
        Unavailable (nothing was sold), or OutcomeUnknown (the disk failed while committing).
        """
        with self._reader() as reader:
            # Without the lock first: stock rises only by reset, so a committed 0 is the truth now.
            purchase, _ = _look_up(reader.connection, customer_id, idempotency_key)
            if purchase is None:
                with self._transaction() as connection:
                    reader.require_same_wal()
                    purchase = _sell(connection, customer_id, idempotency_key)
            self._flush(reader)  # for a replay too: its first answer may have died before the flush
        if purchase.purchase_id % CHECKPOINT_EVERY == 0 and not purchase.replayed:
            self._checkpoint()
        return purchase

    def inventory(self) -> Inventory:
        with self._reader() as reader:
            return Inventory(*reader.connection.execute(FIND_INVENTORY).fetchone())

    def audit(self) -> Audit:
        with self._reader() as reader:
            return Audit(*reader.connection.execute(COUNT_PURCHASES).fetchone())

    def reset(self, stock: int) -> None:
        """For testing: forget all purchases and put `stock` units on sale. Raises Busy."""
        with self._reader() as reader:
            with self._transaction() as connection:
                connection.execute("DELETE FROM purchases")
                connection.execute(
                    "UPDATE inventory SET stock = ?, initial_stock = ?, last_updated = CURRENT_TIMESTAMP",
                    (stock, stock),
                )
            self._flush(reader)
        self._checkpoint()

    def check(self) -> None:
        """Go the whole way of a sale without selling: a full disk can still be read. Raises Busy."""
        try:
            with self._reader() as reader:
                with self._transaction() as connection:
                    connection.execute(FIND_INVENTORY).fetchone()
                    # As it is, but written: an UPDATE that changes nothing isn't.
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                self._flush(reader)
        except OutcomeUnknown as error:  # no purchase, nothing to be in doubt about
            raise Unavailable(str(error)) from error
        self._checkpoint()

    def create(self) -> None:
        """Make the tables and the first stock, if they aren't there.

        Safe from many processes at once. An existing database is only read, without the write lock.
        """
        with _faults(self.path):
            self._require_writable()
            with closing(self._connect()) as connection:
                is_ours = _is_ours(connection)
                timeout_s = max(self.lock_timeout_s, SETUP_PATIENCE_S)
                mode = _when_free(connection, timeout_s, "PRAGMA journal_mode = WAL")
                if mode.fetchone() != ("wal",):
                    raise Unavailable(f"{self.path}: this file system can't hold a WAL database")
                if not is_ours:
                    self._create_tables()
                if connection.execute(FIND_STOCK).fetchone() is None:
                    raise Unavailable(f"{self.path}: the inventory table is empty")

    def close(self) -> None:
        """Close this process's standing connections."""
        for reader in self._idle.pop(os.getpid(), ()):
            reader.close()

    def __str__(self) -> str:
        version = sqlite3.sqlite_version_info
        fixed = version >= (3, 52) or version[2] >= WAL_RESET_FIXES.get(version[:2], math.inf)
        fix = "with" if fixed else "without"
        return f"SQLite {sqlite3.sqlite_version} ({fix} the WAL-reset fix), {self.path}"

    def _create_tables(self) -> None:
        with self._transaction(SETUP_PATIENCE_S) as connection:
            if not _is_ours(connection):  # else another process was first
                for statement in SCHEMA.read_text(encoding="utf-8").split(";\n"):
                    connection.execute(statement)  # one by one: executescript() would commit before the first
                connection.execute(
                    "INSERT INTO inventory (item_id, item_name, stock, initial_stock) VALUES (1, ?, ?, ?)",
                    (self.item_name, self.initial_stock, self.initial_stock),
                )

    def _require_writable(self) -> None:
        """Put an empty file there, for its owner only, or say why no database can be there."""
        if sqlite3.sqlite_version_info < (3, 37):
            raise Unavailable(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL, 0o600))
        for place in (self.path, self.path.parent):
            if not os.access(place, os.W_OK):
                raise Unavailable(f"{place} is read-only")

    def _connect(self, mode: str = "rw", patience_s: float = SETUP_PATIENCE_S) -> sqlite3.Connection:
        """A connection that has read nothing yet. Where a statement meets a lock it waits `patience_s`."""
        connection = sqlite3.connect(
            f"{self.uri}?mode={mode}",
            uri=True,
            timeout=patience_s,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # see _checkpoint
        if not FLUSH_AFTER_LOCK:
            connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync stops at the disk's cache
        return connection

    @contextmanager
    def _transaction(self, patience_s: float = 0) -> Iterator[sqlite3.Connection]:
        """The one place that begins, commits and rolls back, on a connection of its own."""
        timeout_s = max(self.lock_timeout_s, patience_s)
        connection = self._connect(patience_s=0)  # SQLite's own waiting lets newcomers overtake
        try:
            _when_free(connection, timeout_s, SET_SYNCHRONOUS, "BEGIN IMMEDIATE")
            yield connection
            _commit(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            connection.close()

    def _reader(self) -> "_Reader":
        """This process's standing connection, or one more while another thread uses it."""
        idle = self._idle[os.getpid()]
        while True:
            try:
                reader = idle.pop()
            except IndexError:
                break
            if reader.is_current():
                return reader
            reader.close()
        with _faults(self.path), ExitStack() as undo:
            connection = undo.enter_context(closing(self._connect("ro")))
            reader = _Reader(connection, self.path, idle)
            undo.pop_all()  # it stays open
            return reader

    def _flush(self, reader: "_Reader") -> None:
        """Put every COMMIT so far on disk. No lock is held, so the flushes of several workers overlap."""
        if not FLUSH_AFTER_LOCK:
            return
        try:
            os.fdatasync(reader.wal)
        except OSError as error:
            # The kernel now takes the pages it couldn't write for clean: no later sale may build on them.
            self._wal_is_whole = self._checkpoint()
            raise OutcomeUnknown(f"{self.path}-wal: flush failed: {error}") from error
        if not self._wal_is_whole:
            self._wal_is_whole = self._checkpoint()
            if not self._wal_is_whole:
                raise OutcomeUnknown(f"{self.path}-wal: an earlier flush failed")

    def _checkpoint(self) -> bool:
        """Fold the WAL into the database file, so that it starts over; whether all of it was folded.

        RESTART holds the write lock. A checkpoint beside a commit can corrupt the database in SQLite
        before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug"), hence wal_autocheckpoint=0 and this.
        """
        try:
            with closing(self._connect(patience_s=CHECKPOINT_PATIENCE_S)) as connection:
                connection.execute(SET_SYNCHRONOUS)
                _, frames, copied = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        except sqlite3.Error as error:  # the sales before it are safe in the WAL
            log.error("checkpoint of %s failed: %s", self.path, error)
            return False
        if copied < frames:
            log.warning("checkpoint incomplete, the WAL grows: somebody reads on and on from %s", self.path)
        return bool(0 <= frames == copied)  # -1: another process is at it


class _Reader:
    """A standing connection: read-only, opened after the fork, each read on it finished at once.

    While one is open SQLite keeps the WAL; the last close deletes it, and the next sale pays for a new
    one. `wal` is open since before any COMMIT that is flushed through it, so that a write error in
    between is reported to it.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, idle: deque["_Reader"]) -> None:
        self.path = path
        self.idle = idle
        self.file_id = _file_id(path)
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        self.connection = connection
        self.connection.execute(FIND_STOCK).fetchone()  # opens the WAL
        self.wal_path = f"{path}-wal"
        self.wal = os.open(self.wal_path, os.O_RDONLY)
        self.wal_id = _file_id(self.wal_path)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (sqlite3.Error, OSError)):
            self.close()  # it may be what is broken: the next call opens another
            with _faults(self.path):
                raise error
        self.idle.append(self)

    def is_current(self) -> bool:
        """False if the database file was replaced; looked at once in REPLACED_CHECK_S."""
        if time.monotonic() < self.next_check:
            return True
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        with suppress(OSError):
            return _file_id(self.path) == self.file_id
        return False

    def require_same_wal(self) -> None:
        """Raise OSError if a sale would go to another file than the one that is flushed for it."""
        if _file_id(self.wal_path) != self.wal_id:
            raise OSError("the database was replaced")

    def close(self) -> None:
        os.close(self.wal)
        self.connection.close()


def _look_up(
    connection: sqlite3.Connection, customer_id: str, idempotency_key: str | None
) -> tuple[Purchase | None, int]:
    """What the key has bought already, and the stock. Raises KeyReused and SoldOut.

    In one statement: between two the last unit may be sold to this key, or a reset may come.
    """
    if idempotency_key is None:
        stock = connection.execute(FIND_STOCK).fetchone()[0]
    else:
        row = connection.execute(FIND_STOCK_AND_KEY, (idempotency_key,)).fetchone()
        stock, purchase_id, remaining_stock, owner = row
        if purchase_id is not None:
            if owner != customer_id:
                raise KeyReused(idempotency_key)
            return Purchase(purchase_id, remaining_stock, replayed=True), stock
    if stock == 0:
        raise SoldOut
    return None, stock


def _sell(connection: sqlite3.Connection, customer_id: str, idempotency_key: str | None) -> Purchase:
    """Under the lock: look again, take a unit, record who has it."""
    purchase, stock = _look_up(connection, customer_id, idempotency_key)
    if purchase is not None:
        return purchase
    connection.execute(TAKE_UNIT)
    row = connection.execute(RECORD_PURCHASE, (customer_id, idempotency_key, stock - 1))
    return Purchase(row.lastrowid or 0, stock - 1, replayed=False)


def _when_free(connection: sqlite3.Connection, lock_timeout_s: float, *statements: str) -> sqlite3.Cursor:
    """Execute statements, the last of which takes a lock, and again while another has it, or raise Busy.

    The sleeps are short, random and bounded: newcomers have no advantage, and nobody sleeps while the lock
    is free for long.
    """
    started = time.monotonic()
    sleep_max_s = RETRY_SLEEP_MIN_S
    while True:
        try:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # the low byte: without SQLite's details
                raise
        waited_s = time.monotonic() - started
        if waited_s >= lock_timeout_s:
            raise Busy(waited_s)
        time.sleep(min(random.uniform(0, sleep_max_s), lock_timeout_s - waited_s))  # noqa: S311
        sleep_max_s = min(sleep_max_s * 1.5, RETRY_SLEEP_MAX_S)


def _commit(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        # A page couldn't be handed to the kernel (no room, a limit): without it there is no transaction.
        if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
            raise
        raise OutcomeUnknown(f"COMMIT failed: {error}") from error


def _is_ours(connection: sqlite3.Connection) -> bool:
    """False for a blank file; raises Unavailable for anybody else's, or another version's."""
    application_id, version, tables = connection.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
        " FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if (application_id, version, tables) == (0, 0, 0):
        return False
    if application_id != APPLICATION_ID:
        raise Unavailable("this is another program's database")
    if version != SCHEMA_VERSION:
        raise Unavailable(f"its schema has version {version}, this program needs {SCHEMA_VERSION}")
    return True


def _file_id(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Whatever keeps SQLite from using the file becomes Unavailable, but for a refused constraint: a bug."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except (sqlite3.DatabaseError, OSError) as error:
        raise Unavailable(f"{path}: {error}") from error
