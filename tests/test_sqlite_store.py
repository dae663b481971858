"""What only the SQLite store has: its file, its write lock, its WAL, its constraints."""

import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

import app as service_app
import db
from serving.config import ConfigError
from sqlite.engine import ORIGIN, sqlite3

OpenStore = Callable[..., Any]


@contextmanager
def write_lock(database: Path) -> Iterator[sqlite3.Connection]:
    """Another program in the middle of a write."""
    with closing(
        sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def execute(database: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        return connection.execute(statement).fetchall()


def test_where_there_is_a_wheel_the_sqlite_in_use_has_no_wal_reset_bug(
    open_store: OpenStore, database: Path
) -> None:
    """And whichever it is, a start says so."""
    without = "without_pysqlite3" in os.environ.get("PYTHONPATH", "")
    place = (sys.platform, platform.machine(), sys.version_info < (3, 15))
    if without:
        assert ORIGIN == "Python's own"
    elif place == ("linux", "x86_64", True):
        assert (ORIGIN, sqlite3.sqlite_version_info >= (3, 51, 3)) == ("pysqlite3", True)
    assert str(open_store()) == f"{database}, by {ORIGIN} SQLite {sqlite3.sqlite_version}"


def test_the_database_belongs_to_its_owner_alone(open_store: OpenStore, database: Path) -> None:
    open_store().buy("alice")
    for file in (database, Path(f"{database}-wal"), Path(f"{database}-shm")):
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE inventory SET stock = -1", "CHECK constraint failed: stock >= 0"),
        ("UPDATE inventory SET stock = 6", "CHECK constraint failed: stock <= initial_stock"),
        ("UPDATE inventory SET stock = NULL", "NOT NULL constraint failed: inventory.stock"),
        (
            "UPDATE inventory SET stock = 'many'",
            "cannot store TEXT value in INTEGER column inventory.stock",
        ),
        (
            "UPDATE inventory SET initial_stock = 3",
            "CHECK constraint failed: stock <= initial_stock",
        ),
        (
            "INSERT INTO inventory (item_id, item_name, stock, initial_stock)"
            " VALUES (2, 'x', 1, 1)",
            "CHECK constraint failed: item_id = 1",
        ),
        (
            "INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (2, 'x', 1)",
            "FOREIGN KEY constraint failed",
        ),
        (
            "INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (1, 'x', -1)",
            "CHECK constraint failed: remaining_stock >= 0",
        ),
        (
            "INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (1, '', 1)",
            "CHECK constraint failed: length(customer_id) BETWEEN 1 AND 128",
        ),
        (
            "INSERT INTO purchases (item_id, customer_id, idempotency_key, remaining_stock)"
            " VALUES (1, 'bob', 'key-1', 1)",
            "UNIQUE constraint failed: purchases.idempotency_key",
        ),
        ("DELETE FROM inventory", "FOREIGN KEY constraint failed"),
    ],
)
def test_the_schema_refuses_what_must_never_be(
    open_store: OpenStore, database: Path, statement: str, constraint: str
) -> None:
    store = open_store(stock=5)
    store.buy("alice", "key-1")
    store.reset(5)
    store.buy("alice", "key-1")
    execute(database, "UPDATE inventory SET stock = 5")
    with pytest.raises(
        sqlite3.DatabaseError, match=constraint.replace("(", r"\(").replace(")", r"\)")
    ):
        execute(database, statement)
    assert store.audit() == (5, 5, 1)


def test_a_refused_constraint_sells_nothing_and_is_not_called_busy(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(stock=1)
    monkeypatch.setattr(db, "TAKE_UNIT", "UPDATE inventory SET stock = stock - 2")
    with pytest.raises(sqlite3.DatabaseError, match="stock >= 0"):
        store.buy("alice")
    assert store.audit() == (1, 1, 0)
    monkeypatch.undo()
    assert store.buy("alice").remaining_stock == 0


def test_a_purchase_that_fails_half_way_leaves_nothing(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(stock=5)
    monkeypatch.setattr(db, "RECORD_PURCHASE", "INSERT INTO no_such_table VALUES (?, ?, ?)")
    with pytest.raises(db.Unavailable, match="no such table"):
        store.buy("alice")
    assert store.audit() == (5, 5, 0)
    monkeypatch.undo()
    assert store.buy("alice").remaining_stock == 4


def test_a_lock_held_too_long_is_busy_after_the_lock_timeout(
    open_store: OpenStore, database: Path
) -> None:
    store = open_store(stock=5, lock_timeout_s=2)
    with write_lock(database):
        started = time.monotonic()
        with pytest.raises(db.Busy) as busy:
            store.buy("alice")
        assert 2 <= busy.value.waited_s <= time.monotonic() - started < 3.5
    assert store.audit() == (5, 5, 0)
    assert store.buy("alice").remaining_stock == 4


def test_a_lock_timeout_of_zero_tries_once(open_store: OpenStore, database: Path) -> None:
    store = open_store(stock=5, lock_timeout_s=0)
    with write_lock(database), pytest.raises(db.Busy):
        store.buy("alice")
    assert store.buy("alice").remaining_stock == 4


def test_a_purchase_waits_for_a_lock_that_is_freed_in_time(
    open_store: OpenStore, database: Path
) -> None:
    store = open_store(stock=5)
    with write_lock(database) as holder:
        sold: list[Any] = []
        buyer = threading.Thread(target=lambda: sold.append(store.buy("alice")))
        buyer.start()
        buyer.join(0.3)
        assert not sold
        holder.execute("ROLLBACK")
        buyer.join(5)
    assert sold[0].remaining_stock == 4


def test_a_restock_in_the_middle_of_a_refusal_is_not_forgotten(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal was true when it was looked up; what came since must not count as looked at."""
    store = open_store(stock=1)
    store.buy("alice")
    with pytest.raises(db.SoldOut):
        store.buy("bob")
    find = db._find

    def find_and_restock(*arguments: Any) -> Any:
        try:
            return find(*arguments)
        finally:
            execute(database, "UPDATE inventory SET stock = stock + 1, initial_stock = 2")

    with monkeypatch.context() as during:
        during.setattr(db, "_find", find_and_restock)
        with pytest.raises(db.SoldOut):
            store.buy("bob")
    assert store.buy("bob").remaining_stock == 0


def test_nothing_but_busy_is_tried_again(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Connection(sqlite3.Connection):
        def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
            if statement == "BEGIN IMMEDIATE":
                begun.append(statement)
                statement = "BEGIN NONSENSE"
            return super().execute(statement, *parameters)

    store = open_store(stock=5)
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **kw: connect(*args, factory=Connection, **kw)
    )
    with pytest.raises(db.Unavailable, match="syntax error"):
        store.buy("alice")
    assert begun == ["BEGIN IMMEDIATE"]


def test_refusals_and_readings_take_no_lock(open_store: OpenStore, database: Path) -> None:
    store = open_store(stock=1, lock_timeout_s=60)
    first = store.buy("alice", "key-1")
    with write_lock(database):
        started = time.monotonic()
        with pytest.raises(db.SoldOut):
            store.buy("bob")
        assert store.buy("alice", "key-1") == first._replace(replayed=True)
        with pytest.raises(db.KeyReused):
            store.buy("bob", "key-1")
        assert store.inventory().current_stock == 0
        assert store.audit() == (1, 0, 1)
        assert time.monotonic() - started < 10


def test_create_comes_up_at_once_while_somebody_holds_the_write_lock(
    open_store: OpenStore, database: Path
) -> None:
    open_store(stock=5)
    with write_lock(database):
        started = time.monotonic()
        open_store(stock=5, lock_timeout_s=60)
        assert time.monotonic() - started < 10


def test_the_check_waits_for_the_lock_as_a_purchase_does(
    open_store: OpenStore, database: Path
) -> None:
    patient, impatient = open_store(lock_timeout_s=60), open_store(lock_timeout_s=0.2)
    with write_lock(database) as holder:
        with pytest.raises(db.Busy):
            impatient.check()
        release = threading.Timer(0.3, holder.execute, ["ROLLBACK"])
        release.start()
        patient.check()
        release.join()


def test_the_standing_connection_keeps_the_wal_between_sales(
    open_store: OpenStore, database: Path
) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    wal = Path(f"{database}-wal")
    before = wal.stat()
    store.buy("alice")
    after = wal.stat()
    assert (after.st_ino, after.st_size > before.st_size) == (before.st_ino, True)


def test_no_reading_pins_an_old_snapshot(open_store: OpenStore, database: Path) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    store.inventory()
    store.audit()
    assert execute(database, "PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0


def test_checkpoints_keep_the_wal_small(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "CHECKPOINT_EVERY", 20)
    store = open_store(stock=200)
    sizes = []
    for _ in range(200):
        store.buy("alice")
        sizes.append(Path(f"{database}-wal").stat().st_size)
    one_sale = sizes[1] - sizes[0]
    assert max(sizes) < 25 * one_sale
    assert store.audit() == (200, 0, 200)


def test_a_reader_that_never_ends_delays_no_purchase_for_long(
    open_store: OpenStore,
    database: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(db, "CHECKPOINT_EVERY", 2)
    store = open_store(stock=10)
    store.buy("alice")
    with closing(sqlite3.connect(database, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT stock FROM inventory").fetchone()
        waits = []
        for _ in range(7):
            started = time.monotonic()
            store.buy("alice")
            waits.append(time.monotonic() - started)
    # The ones with a checkpoint: RESTART would hold the lock for as long as it is patient.
    assert min(waits[0::2]) < 0.05
    assert "checkpoint incomplete" in caplog.text
    assert store.audit() == (10, 2, 8)


def test_without_the_write_lock_nothing_is_checkpointed(
    open_store: OpenStore, database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copied beside a writer, older SQLites could corrupt the file: the WAL-reset bug."""
    store = open_store(stock=5)
    store.buy("alice")
    before = database.read_bytes()
    with write_lock(database):
        store.file.checkpoint()
        assert "failed: no write lock after 0.1" in caplog.text
        assert database.read_bytes() == before
    store.file.checkpoint()
    assert database.read_bytes() != before


def test_a_file_that_is_no_database_is_refused_and_left_alone(
    open_store: OpenStore, database: Path
) -> None:
    database.write_text("shopping list\n" * 100)
    with pytest.raises(db.Unavailable, match=r"inventory\.db: file is not a database"):
        open_store()
    assert database.read_text() == "shopping list\n" * 100


@pytest.mark.parametrize(
    ("preparation", "reason"),
    [
        ("CREATE TABLE notes (text)", "another program's database"),
        ("PRAGMA user_version = 1", "another program's database"),
        ("PRAGMA application_id = 7", "another program's database"),
    ],
)
def test_another_programs_database_is_refused_and_left_alone(
    open_store: OpenStore, database: Path, preparation: str, reason: str
) -> None:
    execute(database, preparation)
    before = database.read_bytes()
    with pytest.raises(db.Unavailable, match=reason):
        open_store()
    assert database.read_bytes() == before


def test_another_version_of_the_schema_is_refused(open_store: OpenStore, database: Path) -> None:
    open_store().close()
    execute(database, "PRAGMA user_version = 2")
    with pytest.raises(db.Unavailable, match="version 2, this program needs 1"):
        open_store()


def test_a_missing_folder_is_named(open_store: OpenStore, tmp_path: Path) -> None:
    store = service_app.open_store(f"sqlite:///{tmp_path}/missing/inventory.db", "Concert", 5, 5.0)
    with pytest.raises(db.Unavailable, match=r"missing/inventory\.db"):
        store.create()


def test_a_half_created_database_is_completed(open_store: OpenStore, database: Path) -> None:
    database.touch()
    assert open_store(stock=7).inventory()[2:5] == (7, 7, 0)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_the_database_and_its_wal(
    open_store: OpenStore, tmp_path: Path, exists: bool
) -> None:
    database, link = tmp_path / "inventory.db", tmp_path / "other" / "link.db"
    if exists:
        open_store(stock=5)
    link.parent.mkdir()
    link.symlink_to(database)
    store = service_app.open_store(f"sqlite:///{link}", "Concert", 5, 5.0)
    store.create()
    assert store.buy("alice").remaining_stock == 4
    assert execute(database, "SELECT stock FROM inventory") == [(4,)]
    store.close()


def test_what_is_looked_up_together_is_read_in_one_statement(open_store: OpenStore) -> None:
    """Between two a reset may turn "stock 0, key known" into "stock 1, key unknown".

    There is no 410 either way.
    """
    store = open_store(stock=1)
    store.buy("alice", "key-1")
    told: list[str] = []
    with store.file.reader() as reader:
        reader.connection.set_trace_callback(told.append)
    assert store.buy("alice", "key-1").replayed
    with pytest.raises(db.SoldOut):
        store.buy("bob", "key-2")
    assert [statement for statement in told if "FROM" in statement] == [ANY, ANY]


def test_a_first_start_waits_a_little_whatever_the_lock_timeout(
    open_store: OpenStore, database: Path
) -> None:
    database.touch()
    with write_lock(database) as holder:
        release = threading.Timer(0.3, holder.execute, ["ROLLBACK"])
        release.start()
        assert open_store(stock=5, lock_timeout_s=0).inventory().current_stock == 5
        release.join()


def test_a_copy_that_lost_its_wal_mode_gets_it_again(
    open_store: OpenStore, database: Path, tmp_path: Path
) -> None:
    open_store(stock=5).buy("alice")
    execute(database, f"VACUUM INTO '{tmp_path}/copy.db'")
    store = service_app.open_store(f"sqlite:///{tmp_path}/copy.db", "Concert", 5, 5.0)
    store.create()
    assert store.buy("bob").remaining_stock == 3
    store.close()


def test_a_reading_waits_a_little_for_a_lock_whatever_the_lock_timeout(
    open_store: OpenStore, database: Path
) -> None:
    store = open_store(stock=5, lock_timeout_s=0)
    with closing(
        sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    ) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")  # as a recovery does for a moment
        holder.execute("UPDATE inventory SET stock = 4")
        with (
            closing(sqlite3.connect(database, timeout=0)) as impatient,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            impatient.execute("SELECT stock FROM inventory")
        release = threading.Timer(0.3, holder.close)
        release.start()
        assert store.inventory().current_stock == 4
        release.join()


def test_a_path_may_hold_blanks_and_what_looks_like_options(tmp_path: Path) -> None:
    path = tmp_path / "a sale &mode=memory;+é.db"
    store = service_app.open_store(f"sqlite:///{path}", "Concert", 5, 5.0)
    store.create()
    assert store.buy("alice").remaining_stock == 4
    store.close()
    assert path.exists()


@pytest.mark.parametrize("rest", ["?timeout=30", "#x", "%20and", "?"])
def test_a_url_with_more_than_a_path_is_refused_and_says_what_to_write(
    tmp_path: Path, rest: str
) -> None:
    """It would name a new file, with the whole stock on sale once more."""
    with pytest.raises(ValueError, match=rf"no \?, # or % .* write sqlite:///{tmp_path}/sale\.db$"):
        service_app.open_store(f"sqlite:///{tmp_path}/sale.db{rest}", "Concert", 5, 5.0)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "inventory.db",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "mysql://a/b",
        "sqlite:/x.db",
        "sqlit:///x.db",
        "postgre://user@host/sale",
    ],
)
def test_a_url_that_names_no_store_is_refused_and_told_all_that_do(url: str) -> None:
    with pytest.raises(ValueError, match=r"sqlite:///rel.*sqlite:////abs.*postgresql://user"):
        service_app.open_store(url, "Concert", 5, 5.0)


def test_a_folder_or_a_circle_of_links_is_named(tmp_path: Path) -> None:
    with pytest.raises(db.Unavailable, match="it is a folder or a device - name a file"):
        service_app.open_store(f"sqlite:///{tmp_path}", "Concert", 5, 5.0).create()
    circle = tmp_path / "circle.db"
    circle.symlink_to(circle)
    with pytest.raises((ConfigError, db.Unavailable), match=r"links|loop|a folder or a device"):
        service_app.open_store(f"sqlite:///{circle}", "Concert", 5, 5.0).create()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_standing_connection_is_never_used_by_a_forked_process(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    standing = store.file.reader()
    with standing:
        pass
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        with store.file.reader() as reader:
            sender.send((reader is standing, store.buy("bob").remaining_stock))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert receiver.poll(20)
    assert receiver.recv() == (False, 3)
    process.join()
    assert store.audit() == (5, 3, 2)


def test_a_restored_database_is_noticed(
    open_store: OpenStore, database: Path, tmp_path: Path
) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    for suffix in ("", "-wal", "-shm"):
        os.rename(f"{database}{suffix}", tmp_path / f"old{suffix}")
    other = service_app.open_store(f"sqlite:///{database}", "Concert", 3, 5.0)
    other.create()
    deadline = time.monotonic() + __import__("sqlite.wal").wal.REPLACED_CHECK_S + 1
    while store.inventory().initial_stock != 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.inventory()[2:5] == (3, 3, 0)
    assert store.buy("bob").remaining_stock == 2
    other.close()


def test_a_database_that_comes_back_is_used_again(open_store: OpenStore, database: Path) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    store.close()
    hidden = database.with_suffix(".hidden")
    os.rename(database, hidden)
    for call in (
        store.inventory,
        store.audit,
        store.check,
        lambda: store.buy("bob"),
        lambda: store.reset(1),
    ):
        with pytest.raises(db.Unavailable, match="unable to open database file"):
            call()
    os.rename(hidden, database)
    assert store.buy("bob").remaining_stock == 3


def hammer(url: str, threads: int, seconds: float, counts: Any) -> None:
    store = service_app.open_store(url, "Concert", 0, 5.0)
    deadline = time.monotonic() + seconds
    sold, failed = [0] * threads, []

    def buyer(number: int) -> None:
        while time.monotonic() < deadline:
            try:
                store.buy("alice")
                sold[number] += 1
            except db.StoreError as error:
                failed.append(repr(error))

    workers = [threading.Thread(target=buyer, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    store.close()
    counts.put((sum(sold), failed))


def test_64_threads_in_4_processes_are_never_told_busy(
    open_store: OpenStore, store_url: str
) -> None:
    store = open_store(stock=1_000_000)
    seconds = float(os.environ.get("STRESS_SECONDS", "15"))
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    processes = [
        context.Process(target=hammer, args=(store_url, 16, seconds, counts)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    results = [counts.get(timeout=seconds + 60) for _ in processes]
    for process in processes:
        process.join()
    assert [failed for _, failed in results] == [[]] * 4
    sold = sum(sold for sold, _ in results)
    assert sold > 100 * seconds
    assert store.audit() == (1_000_000, 1_000_000 - sold, sold)
