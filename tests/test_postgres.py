"""The PostgreSQL store: the contract of every store, and what only this one has to answer for."""

import datetime
import functools
import logging
import multiprocessing
import re
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from postgres_cluster import PASSWORD, ROLE, Cluster, reason_to_skip
from postgres_proxy import Proxy
from service import PROJECT, environment
from test_store import *  # noqa: F403
from test_store import OpenStore, buy_in_threads

import app as service_app
import db
from serving.config import ConfigError

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

import psycopg

import postgres.connections
import postgres.store

WAITING = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
SELL = (
    postgres.store.SELL.replace("$1", "%(key)s")
    .replace("$2", "%(customer_id)s")
    .replace("$3", "NULL")
    .encode()
)
OTHERS = """FROM pg_stat_activity
    WHERE application_name = current_setting('application_name') AND pid <> pg_backend_pid()"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def name() -> str:
    return f"sale_{uuid.uuid4().hex}"


@pytest.fixture
def store_url(cluster: Cluster, name: str) -> str:
    """A schema of the test's own, which is cheaper than a database."""
    cluster.sql(f"CREATE SCHEMA {name}")
    return cluster.url(options=f"-csearch_path%3D{name}", application_name=name)


@pytest.fixture
def admin(store_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(store_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def crowd() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


@contextmanager
def server_default(cluster: Cluster, assignment: str) -> Iterator[None]:
    """A default of the server's for all new sessions."""
    cluster.sql(f"ALTER ROLE {ROLE} SET {assignment}")
    try:
        yield
    finally:
        cluster.sql(f"BEGIN READ WRITE; ALTER ROLE {ROLE} RESET ALL; COMMIT")


@contextmanager
def row_lock(store_url: str) -> Iterator[None]:
    """Another program holds the inventory row."""
    with psycopg.connect(store_url) as holder:
        holder.execute("SELECT FROM inventory FOR UPDATE")
        yield


def value(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def wait_for(
    admin: psycopg.Connection[Any], query: str, wanted: Any, limit_s: float = 10.0
) -> None:
    deadline = time.monotonic() + limit_s
    while (seen := value(admin, query)) != wanted:
        assert time.monotonic() < deadline, f"{query} is {seen}, not {wanted}"
        time.sleep(0.01)


def outcome(future: "Future[Any]") -> Any:
    """The Purchase, or the type of the error."""
    error = future.exception(timeout=30)
    return type(error) if error else future.result()


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.monotonic()
    try:
        result = action()
    except db.StoreError as error:
        result = error
    return result, time.monotonic() - started


# The lock


def test_a_held_row_lock_makes_every_buyer_busy_in_time(
    open_store: OpenStore, store_url: str, crowd: ThreadPoolExecutor
) -> None:
    store = open_store(lock_timeout_s=3.0)
    store.check()
    with row_lock(store_url):
        buyers = [crowd.submit(timed, lambda: store.buy("alice")) for _ in range(4)]
        results = [buyer.result(timeout=30) for buyer in buyers]
    for busy, waited_s in results:
        assert isinstance(busy, db.Busy)
        assert 2.9 < busy.waited_s < waited_s + 0.01
        assert waited_s < 5
    assert store.audit() == (5, 5, 0)


def test_a_wait_in_the_pool_shortens_the_wait_for_the_lock(
    open_store: OpenStore,
    store_url: str,
    admin: psycopg.Connection[Any],
    crowd: ThreadPoolExecutor,
) -> None:
    open_store()
    store = service_app.open_store(store_url, "Concert", 5, 4.0, 1, 4.0)
    with row_lock(store_url):
        first = crowd.submit(timed, lambda: store.buy("alice"))
        wait_for(admin, WAITING, 1)
        time.sleep(2)  # so that half of the second buyer's time is left when the first gives up
        second, waited_s = timed(lambda: store.buy("bob"))
    assert isinstance(first.result()[0], db.Busy)
    assert isinstance(second, db.Busy)
    assert 3.9 < waited_s < 5  # without its two seconds in the pool: 6
    assert store.audit() == (5, 5, 0)
    store.close()


def test_a_pool_that_gives_no_connection_in_time_is_busy(
    open_store: OpenStore,
    store_url: str,
    admin: psycopg.Connection[Any],
    crowd: ThreadPoolExecutor,
) -> None:
    open_store()
    store = service_app.open_store(store_url, "Concert", 5, 5.0, 1, 0.2)
    with row_lock(store_url):
        first = crowd.submit(store.buy, "alice")
        wait_for(admin, WAITING, 1)
        busy, waited_s = timed(lambda: store.buy("bob"))
    assert isinstance(busy, db.Busy)
    assert re.fullmatch(r"no connection of the pool after 0\.\d+ s", str(busy))  # not the lock
    assert 0.2 <= waited_s < 3
    assert outcome(first).remaining_stock == 4
    assert store.audit() == (5, 4, 1)
    store.close()


def test_refusals_and_replays_wait_for_no_lock_and_take_none(
    open_store: OpenStore, store_url: str, admin: psycopg.Connection[Any]
) -> None:
    store = open_store(stock=1, lock_timeout_s=5.0)
    first = store.buy("alice", "key-1")
    with row_lock(store_url):
        for key in (None, "key-2"):
            refused, waited_s = timed(functools.partial(store.buy, "bob", key))
            assert isinstance(refused, db.SoldOut)
            assert waited_s < 3
        assert store.buy("alice", "key-1") == first._replace(replayed=True)
        with pytest.raises(db.KeyReused):
            store.buy("bob", "key-1")
    for key in (None, "key-2"):  # who takes a row lock gets a transaction id
        with admin.transaction():
            admin.execute(SELL, {"customer_id": "alice", "key": key})
            assert value(admin, "SELECT pg_current_xact_id_if_assigned()") is None


def test_a_sale_is_one_round_trip_and_so_is_a_refusal(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(stock=2)
    asked: list[str] = []
    ask = postgres.connections.Connection.ask

    names = {postgres.store.SELL: "sell", postgres.store.LOOK: "look"}

    def remember(connection: Any, deadline: float, *transactions: Any, **how: Any) -> Any:
        asked.append(" ".join(names.get(text, "other") for text, _ in transactions[0]))
        return ask(connection, deadline, *transactions, **how)

    monkeypatch.setattr(postgres.connections.Connection, "ask", remember)
    for _ in range(5):
        timed(lambda: store.buy("alice"))
    assert asked.pop(0) == "other"  # the session's settings
    assert asked == ["sell", "sell", "sell", "look", "look"]
    store.reset(5)
    asked.clear()
    for _ in range(3):
        store.buy("alice", str(uuid.uuid4()))
    assert asked == ["look", "sell", "sell", "sell"]


def test_who_waited_for_the_last_unit_in_vain_is_told_so(
    open_store: OpenStore, store_url: str, admin: psycopg.Connection[Any], crowd: ThreadPoolExecutor
) -> None:
    store = open_store(stock=1)
    with row_lock(store_url):
        buyers = [crowd.submit(store.buy, f"c{number}") for number in range(4)]
        wait_for(admin, WAITING, 4)
    assert Counter(map(str, map(outcome, buyers))).most_common(1)[0] == (str(db.SoldOut), 3)
    assert store.audit() == (1, 0, 1)


@pytest.mark.parametrize("stock", [1, 2])
def test_duplicates_that_wait_for_one_lock_sell_one_unit(
    open_store: OpenStore,
    store_url: str,
    admin: psycopg.Connection[Any],
    crowd: ThreadPoolExecutor,
    stock: int,
) -> None:
    store = open_store(stock=stock)
    with row_lock(store_url):
        buyers = [crowd.submit(store.buy, "alice", "key-1") for _ in range(4)]
        wait_for(admin, WAITING, 4)
    results = [outcome(buyer) for buyer in buyers]
    assert Counter(result.replayed for result in results) == {False: 1, True: 3}
    assert len({result.purchase_id for result in results}) == 1
    assert store.audit() == (stock, stock - 1, 1)


def test_a_duplicate_of_a_sale_that_failed_is_a_sale(
    open_store: OpenStore, admin: psycopg.Connection[Any], crowd: ThreadPoolExecutor
) -> None:
    store = open_store()
    admin.execute("BEGIN")
    admin.execute(SELL, {"customer_id": "alice", "key": "key-1"})
    duplicate = crowd.submit(store.buy, "alice", "key-1")
    time.sleep(0.2)
    assert not duplicate.done()
    admin.execute("ROLLBACK")
    assert outcome(duplicate).replayed is False
    assert store.audit() == (5, 4, 1)


def test_ids_are_drawn_in_the_order_of_the_sales(
    open_store: OpenStore,
    admin: psycopg.Connection[Any],
    crowd: ThreadPoolExecutor,
    store_url: str,
) -> None:
    open_store(stock=400)
    store = service_app.open_store(store_url, "Concert", 400, 5.0, 16, 5.0)
    list(crowd.map(lambda number: store.buy("alice"), range(400)))
    query = "SELECT array_agg(remaining_stock ORDER BY purchase_id) FROM purchases"
    assert value(admin, query) == list(range(399, -1, -1))
    store.close()


def test_a_reset_in_mid_sale_waits_for_sales_and_keeps_the_books(
    open_store: OpenStore, crowd: ThreadPoolExecutor
) -> None:
    store = open_store(stock=1000)
    ended = threading.Event()

    def shop() -> Any:
        while not ended.is_set():
            store.buy("alice")

    buyers = [crowd.submit(shop) for _ in range(4)]
    sold = 0
    while sold < 50:
        store.reset(1000)
        now = store.audit()
        assert now.consistent
        sold += now.purchase_records
    ended.set()
    assert [outcome(buyer) for buyer in buyers] == [None] * 4
    assert store.audit().consistent


# The server's configuration, and errors that undo a sale


@pytest.mark.parametrize("kept", [False, True])
def test_a_server_set_to_serializable_sells_each_unit_once(
    open_store: OpenStore, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    if kept:  # as on an engine that knows nothing else
        ours = postgres.connections.SET_UP.replace("'read committed'", "'serializable'")
        monkeypatch.setattr(postgres.connections, "SET_UP", ours)
    with server_default(cluster, "default_transaction_isolation = 'serializable'"):
        store = open_store(stock=10)
        results = buy_in_threads(store, [(f"c{number}", None) for number in range(40)])
    assert Counter(type(result) for result in results) == {db.Purchase: 10, db.SoldOut: 30}
    assert store.audit() == (10, 0, 10)


@pytest.mark.parametrize(("configured", "used"), [("off", "on"), ("remote_apply", "remote_apply")])
def test_a_sale_is_flushed_before_its_answer_whatever_the_server_is_set_to(
    open_store: OpenStore,
    cluster: Cluster,
    admin: psycopg.Connection[Any],
    configured: str,
    used: str,
) -> None:
    store = open_store()
    setting = "customer_id = current_setting('synchronous_commit')"
    admin.execute(f"ALTER TABLE purchases ADD CONSTRAINT setting CHECK ({setting}) NOT VALID")
    with server_default(cluster, f"synchronous_commit = {configured}"):
        assert store.buy(used).remaining_stock == 4


def fail_purchases(admin: psycopg.Connection[Any], code: str, times: int) -> None:
    """The first purchases fail with an SQLSTATE, as a trigger raises it."""
    admin.execute(
        f"""
        CREATE SEQUENCE attempts;
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('attempts') <= {times} THEN
                RAISE EXCEPTION 'made up' USING ERRCODE = '{code}';
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER fail BEFORE INSERT ON purchases FOR EACH ROW EXECUTE FUNCTION fail();
        """.encode()
    )


@pytest.mark.parametrize("code", ["40001", "40P01", "57P01", "25006"])
def test_a_sale_that_was_undone_is_tried_again(
    open_store: OpenStore, admin: psycopg.Connection[Any], code: str
) -> None:
    store = open_store()
    fail_purchases(admin, code, times=3)
    assert store.buy("alice").remaining_stock == 4
    assert value(admin, "SELECT last_value FROM attempts") == 4
    assert store.audit() == (5, 4, 1)


@pytest.mark.parametrize(
    ("code", "refusal"),
    [
        ("40001", db.Busy),
        ("40P01", db.Busy),
        ("25006", db.Unavailable),
        ("57014", db.Busy),
        ("53100", db.Unavailable),
    ],
)
def test_a_sale_that_is_undone_again_and_again_is_refused_in_time(
    open_store: OpenStore, admin: psycopg.Connection[Any], code: str, refusal: type[db.StoreError]
) -> None:
    store = open_store(lock_timeout_s=2.0)
    fail_purchases(admin, code, times=1_000_000)
    result, waited_s = timed(lambda: store.buy("alice"))
    assert type(result) is refusal
    assert waited_s < 3.5
    assert store.audit() == (5, 5, 0)


@pytest.mark.parametrize("code", ["40003", "08007", "08P01"])
def test_an_engine_that_does_not_know_makes_the_outcome_unknown(
    open_store: OpenStore, admin: psycopg.Connection[Any], code: str
) -> None:
    store = open_store(lock_timeout_s=0.5)
    fail_purchases(admin, code, times=2)
    with pytest.raises(db.OutcomeUnknown):
        store.buy("alice")
    assert store.buy("alice", "key-1").remaining_stock == 4  # its second attempt
    assert store.audit() == (5, 4, 1)


def test_a_bug_that_a_constraint_refuses_is_no_refusal(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    store = open_store()
    fail_purchases(admin, "23514", times=1)
    with pytest.raises(psycopg.errors.CheckViolation):
        store.buy("alice")
    assert store.audit() == (5, 5, 0)


def test_the_plan_of_a_sale_does_not_count_on_empty_tables(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    open_store()
    admin.execute("VACUUM ANALYZE")
    psycopg.RawCursor(admin).execute(postgres.connections.SET_UP, ("1000", "1000", None))
    admin.execute(
        f"PREPARE sell AS {postgres.store.SELL}; PREPARE look AS {postgres.store.LOOK}".encode()
    )
    for statement in (b"EXPLAIN EXECUTE sell ('k', 'c', 'off')", b"EXPLAIN EXECUTE look ('k')"):
        plan = "\n".join(row[0] for row in admin.execute(statement))
        assert "Index Scan using purchases_by_idempotency_key" in plan
        assert "Seq Scan" not in plan


def test_times_are_told_in_utc_wherever_the_server_is(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    assert value(admin, "SHOW timezone") == "Asia/Kathmandu"
    told = datetime.datetime.strptime(open_store().inventory().last_updated, "%Y-%m-%d %H:%M:%S")
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    assert abs((now - told).total_seconds()) < 10


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE inventory SET stock = -1", "inventory_stock_check"),
        ("UPDATE inventory SET stock = 6", "inventory_check"),
        ("UPDATE inventory SET stock = NULL", None),
        ("UPDATE inventory SET item_id = 2", "inventory_item_id_check"),
        ("INSERT INTO inventory VALUES (1, 'x', 1, 1)", "inventory_pkey"),
        (
            "UPDATE purchases SET item_id = 2",
            "purchases_item_id_fkey",
        ),
        (
            "UPDATE purchases SET customer_id = ''",
            "purchases_customer_id_check",
        ),
        ("UPDATE purchases SET remaining_stock = -1", "purchases_remaining_stock_check"),
        ("UPDATE purchases SET idempotency_key = 'key-1'", "purchases_by_idempotency_key"),
    ],
)
def test_the_schema_refuses_what_must_never_be(
    open_store: OpenStore, admin: psycopg.Connection[Any], statement: str, constraint: str | None
) -> None:
    store = open_store()
    store.buy("alice", "key-1")
    store.buy("bob")
    with pytest.raises(psycopg.IntegrityError) as refused:
        admin.execute(statement.encode())
    assert refused.value.diag.constraint_name == constraint
    assert store.audit() == (5, 3, 2)


# Connections


def test_connections_that_were_cut_while_idle_are_replaced(
    open_store: OpenStore, admin: psycopg.Connection[Any], crowd: ThreadPoolExecutor
) -> None:
    store = open_store(stock=100)
    list(crowd.map(lambda number: store.buy("alice"), range(50)))
    admin.execute(f"SELECT pg_terminate_backend(pid, 5000) {OTHERS}".encode())
    assert store.buy("alice").remaining_stock == 49
    store.check()
    assert store.audit() == (100, 49, 51)


def test_a_connection_that_ended_without_a_word_while_idle_is_not_sold_over(
    open_store: OpenStore, cluster: Cluster, store_url: str
) -> None:
    open_store()
    with Proxy(cluster.port) as proxy:
        store = service_app.open_store(
            store_url.replace(f":{cluster.port}/", f":{proxy.port}/"), "Concert", 5, 5.0
        )
        for remaining_stock in (4, 3, 2):
            assert store.buy("alice").remaining_stock == remaining_stock
            proxy.cut()
        store.close()


def test_a_sale_whose_connection_the_server_ended_is_tried_again(
    open_store: OpenStore, store_url: str, admin: psycopg.Connection[Any], crowd: ThreadPoolExecutor
) -> None:
    store = open_store()
    with row_lock(store_url):
        buyer = crowd.submit(store.buy, "alice")
        wait_for(admin, WAITING, 1)
        admin.execute(
            f"SELECT pg_terminate_backend(pid, 5000) {OTHERS} AND wait_event_type = 'Lock'".encode()
        )
        wait_for(admin, WAITING, 1)
    assert outcome(buyer).remaining_stock == 4
    assert store.audit() == (5, 4, 1)


@pytest.mark.parametrize("key", [None, "key-1"])
def test_a_connection_lost_in_mid_sale_is_settled_by_the_key(
    open_store: OpenStore,
    cluster: Cluster,
    store_url: str,
    admin: psycopg.Connection[Any],
    crowd: ThreadPoolExecutor,
    key: str | None,
) -> None:
    open_store()
    with Proxy(cluster.port) as proxy:
        store = service_app.open_store(
            store_url.replace(f":{cluster.port}/", f":{proxy.port}/"), "Concert", 5, 5.0
        )
        with row_lock(store_url):
            buyer = crowd.submit(store.buy, "alice", key)
            wait_for(admin, WAITING, 1)
            proxy.cut()
            if key is None:
                assert outcome(buyer) is db.OutcomeUnknown
        if key is not None:
            assert outcome(buyer).remaining_stock == 4
        wait_for(admin, "SELECT count(*) FROM purchases", 1)
        assert store.audit() == (5, 4, 1)
        store.close()


def test_a_server_that_does_not_answer_any_more_holds_nobody_for_long(
    open_store: OpenStore, cluster: Cluster, store_url: str
) -> None:
    open_store()
    with Proxy(cluster.port) as proxy:
        store = service_app.open_store(
            store_url.replace(f":{cluster.port}/", f":{proxy.port}/"), "Concert", 5, 0.5
        )
        assert store.buy("alice").remaining_stock == 4
        proxy.stall()
        unknown, waited_s = timed(lambda: store.buy("bob"))
        assert isinstance(unknown, db.OutcomeUnknown)
        assert 0.5 < waited_s < 3
        with pytest.raises((db.Busy, db.Unavailable)):
            store.check()
        proxy.resume()
        assert store.buy("carol").remaining_stock in (2, 3)
        store.close()


def test_a_server_that_is_not_there_is_unavailable_at_once(
    open_store: OpenStore, cluster: Cluster, store_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    open_store()
    with Proxy(cluster.port) as proxy:
        store = service_app.open_store(
            store_url.replace(f":{cluster.port}/", f":{proxy.port}/"), "Concert", 5, 5.0
        )
        store.buy("alice")
        proxy.close()
        for action in (
            store.check,
            store.inventory,
            lambda: store.buy("alice"),
            lambda: store.buy("alice", "k"),
        ):
            refused, waited_s = timed(action)
            assert isinstance(refused, db.Unavailable)
            assert waited_s < 3
            assert PASSWORD not in str(refused)
        with pytest.raises(db.Unavailable, match="refused"):
            store.create()
        proxy.open(proxy.port)
        assert store.buy("alice").remaining_stock == 3
        store.close()
    assert PASSWORD not in caplog.text


def test_a_url_of_several_hosts_finds_the_one_that_sells(cluster: Cluster, store_url: str) -> None:
    hosts = store_url.replace("@", "@127.0.0.1:1,") + "&target_session_attrs=read-write"
    store = service_app.open_store(hosts, "Concert", 5, 5.0)
    store.create()
    assert store.buy("alice").remaining_stock == 4
    assert PASSWORD not in str(store)
    assert f"1,{cluster.port}" in str(store)
    store.close()


def test_a_connection_to_a_server_that_turned_read_only_is_not_kept(
    open_store: OpenStore, cluster: Cluster
) -> None:
    store = open_store(lock_timeout_s=0.5)
    with server_default(cluster, "default_transaction_read_only = on"):
        for refused in (store.check, lambda: store.buy("alice")):
            with pytest.raises(db.Unavailable, match="read-only"):
                refused()
        with pytest.raises(db.Unavailable, match="read-only"):
            open_store()
    assert store.buy("alice").remaining_stock == 4


def buy_once(store: Any, results: Any) -> None:
    results.put(store.buy("child").remaining_stock)
    store.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_connection_never_crosses_a_fork(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    store = open_store()
    assert store.buy("parent").remaining_stock == 4
    wait_for(admin, f"SELECT count(*) {OTHERS}", 1)
    parent = value(admin, f"SELECT array_agg(pid) {OTHERS}")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=buy_once, args=(store, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert sorted(results.get(timeout=30) for _ in children) == [2, 3]
    for child in children:
        child.join(30)
    assert store.buy("parent").remaining_stock == 1
    wait_for(admin, f"SELECT array_agg(pid) {OTHERS}", parent)
    assert store.audit() == (5, 1, 4)


def test_the_pool_does_not_log_every_use(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        open_store().buy("alice")
    assert caplog.text == ""


def test_create_leaves_no_connection_open(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    open_store()
    wait_for(admin, f"SELECT count(*) {OTHERS} AND backend_type = 'client backend'", 0)


# Somebody's database


def test_create_needs_no_lock_where_a_sale_is_under_way(
    open_store: OpenStore, store_url: str, admin: psycopg.Connection[Any]
) -> None:
    open_store().buy("alice")
    with row_lock(store_url), admin.transaction():
        admin.execute("LOCK purchases, inventory IN SHARE ROW EXCLUSIVE MODE")
        store, waited_s = timed(lambda: open_store(lock_timeout_s=30.0))
        assert waited_s < 10
    assert store.audit() == (5, 4, 1)


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("CREATE TABLE inventory (id integer)", "not ours"),
        ("CREATE TABLE purchases (id integer)", "not ours"),
        (
            "CREATE TABLE inventory ();"
            " COMMENT ON TABLE inventory IS 'flash sale inventory, schema 9'",
            "schema 9",
        ),
    ],
)
def test_tables_that_are_not_ours_are_left_alone(
    open_store: OpenStore, admin: psycopg.Connection[Any], statement: str, reason: str
) -> None:
    admin.execute(statement.encode())
    tables = "SELECT array_agg(relname::text) FROM pg_class WHERE relkind = 'r' AND oid > 16384"
    before = value(admin, tables)
    with pytest.raises(db.Unavailable, match=reason) as refused:
        open_store()
    assert "\n" not in str(refused.value)
    assert value(admin, tables) == before


def test_an_empty_inventory_is_unavailable(
    open_store: OpenStore, admin: psycopg.Connection[Any]
) -> None:
    store = open_store()
    admin.execute("DELETE FROM inventory")
    for refused in (open_store, store.inventory, lambda: store.buy("alice"), store.check):
        with pytest.raises(db.Unavailable, match="empty"):
            refused()


def test_a_database_that_can_not_hold_every_name_is_refused(cluster: Cluster) -> None:
    cluster.sql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0")
    with pytest.raises(db.Unavailable, match="LATIN1"):
        service_app.open_store(cluster.url("latin"), "Concert", 5, 5.0).create()


def test_a_wrong_password_is_told_in_one_line_without_it(cluster: Cluster) -> None:
    with pytest.raises(db.Unavailable, match="authentication failed") as refused:
        service_app.open_store(
            cluster.url().replace(PASSWORD, "wrong-horse"), "Concert", 5, 5.0
        ).create()
    assert not re.search("wrong-horse|\n", str(refused.value))


# Configuration: no server is needed


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:secret%zz@h/db",
        "postgresql://u:secret@h/db?no_such=1",
        "postgresql://u:pa@secret@127.0.0.1:1/db",
        "postgresql://u:pa/secret@127.0.0.1:1/db",
        "postgresql://u:12/secret@127.0.0.1:1/db",
        "postgresql://u:12?secret@127.0.0.1:1/db",
        "postgresql://u:12#secret@127.0.0.1:1/db",
        "postgresql://u@secret:pa@127.0.0.1:1/db",
        "postgresql://u:secret/db",
        "postgresql://u:secret@a,b:1,c:2,secret:x/db",
    ],
)
def test_a_url_that_makes_no_sense_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL has to be postgresql://") as refused:
        service_app.open_store(url, "Concert", 5, 5.0).create()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://",
        "postgres://sale:a%40b:c@db.example,other:5433/sale?connect_timeout=3",
        "postgresql://%2Frun%2Fpostgresql/sale",
        "postgresql:///sale?host=/run/postgresql&options=-csearch_path%3Dshop",
        "postgresql://sale@[::1]:5432,[fe80::1%25eth0]/sale",
    ],
)
def test_a_url_as_libpq_documents_it_is_taken(url: str) -> None:
    assert "a%40b" not in str(service_app.open_store(url, "Concert", 5, 5.0))


def test_without_psycopg_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['psycopg'] = None; from app import app"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=environment(DATABASE_URL="postgresql://localhost/sale"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert "pip install -r postgres/requirements.txt" in done.stderr


def test_the_command_line_works_on_postgresql(store_url: str) -> None:
    expected = {"init-db": "Concert: 7 of 7 units left", "audit": '"current_stock": 7'}
    for command, told in expected.items():  # in this order: an audit creates nothing
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "app", command],
            cwd=PROJECT,
            env=environment(DATABASE_URL=store_url, INITIAL_STOCK="7", ITEM_NAME="Concert"),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0
        assert told in done.stdout
        assert PASSWORD not in done.stdout + done.stderr
