"""A PostgreSQL that is set up in another way: the promises hold, or the start says why."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from postgres_cluster import PASSWORD, ROLE, Cluster, reason_to_skip
from postgres_proxy import Proxy
from service import wait_until
from test_store import buy_in_threads

import app as service_app
import db

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

import psycopg

LIMIT_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def url(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    return cluster.create_database(f"sale_{abs(hash(request.node.name))}")


@pytest.fixture
def open_store() -> Iterator[Callable[..., Any]]:
    opened = []

    def open_and_create(url: str, lock_timeout_s: float = 5.0, stock: int = 5) -> Any:
        opened.append(service_app.open_store(url, "Concert", stock, lock_timeout_s))
        opened[-1].create()
        return opened[-1]

    yield open_and_create
    for store in opened:
        store.close()


@contextmanager
def reloaded(cluster: Cluster, name: str, value: str) -> Iterator[None]:
    """A setting of the server's, until the end."""
    before = cluster.sql(f"SHOW {name}")
    change(cluster, f"SET {name} = '{value}'", name, value)
    try:
        yield
    finally:
        change(cluster, f"RESET {name}", name, before)


def change(cluster: Cluster, how: str, name: str, wanted: str) -> None:
    cluster.sql(f"ALTER SYSTEM {how}")
    cluster.reload()
    wait_until(lambda: cluster.sql(f"SHOW {name}") == wanted, LIMIT_S, f"{name} isn't {wanted!r}")


@contextmanager
def role_default(cluster: Cluster, assignment: str) -> Iterator[None]:
    cluster.sql(f"ALTER ROLE {ROLE} SET {assignment}")
    try:
        yield
    finally:
        cluster.sql(f"BEGIN READ WRITE; ALTER ROLE {ROLE} RESET ALL; COMMIT")


def refused(action: Callable[[], Any]) -> db.StoreError:
    with pytest.raises(db.StoreError) as error:
        action()
    return error.value


def elapsed_s(action: Callable[[], Any]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def sessions(cluster: Cluster, url: str) -> int:
    """How many the database has seen."""
    name = url.rpartition("/")[2]
    return int(cluster.sql(f"SELECT sessions FROM pg_stat_database WHERE datname = '{name}'"))


# What a sale leans on is set by each session


@pytest.mark.parametrize("place", ["role", "database", "server", "url", "PGOPTIONS"])
def test_a_sale_without_its_standby_is_unknown_though_warnings_are_switched_off(
    cluster: Cluster,
    url: str,
    open_store: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    open_store(url).buy("alice")
    database = url.rpartition("/")[2]
    with ExitStack() as settings:
        if place == "role":
            settings.enter_context(role_default(cluster, "client_min_messages = error"))
        elif place == "database":
            cluster.sql(f"ALTER DATABASE {database} SET client_min_messages = error")
        elif place == "server":
            settings.enter_context(reloaded(cluster, "client_min_messages", "error"))
        elif place == "url":
            url += "?options=-cclient_min_messages%3Derror"
        else:
            monkeypatch.setenv("PGOPTIONS", "-c client_min_messages=error")
        settings.enter_context(reloaded(cluster, "synchronous_standby_names", "nobody"))
        store = service_app.open_store(url, "Concert", 5, 0.5)
        assert type(refused(lambda: store.buy("bob"))) is db.OutcomeUnknown
        with pytest.raises(db.Unavailable, match="synchronous replication"):
            store.check()
    assert store.audit() == (5, 3, 2)
    store.close()


@pytest.mark.parametrize("level", ["off", "local", "remote_write"])
def test_a_weaker_commit_is_none_where_a_standby_is_named(
    cluster: Cluster, url: str, open_store: Callable[..., Any], level: str
) -> None:
    open_store(url)
    with role_default(cluster, f"synchronous_commit = {level}"):
        store = service_app.open_store(url, "Concert", 5, 0.5)
        with reloaded(cluster, "synchronous_standby_names", "nobody"):
            assert type(refused(lambda: store.buy("alice"))) is db.OutcomeUnknown
        store.close()


def test_every_name_is_stored_whatever_encoding_the_client_is_set_to(
    cluster: Cluster, url: str, open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with role_default(cluster, "client_encoding = 'LATIN1'"):
        store = open_store(url)
        for customer in ("é" * 100, "東京"):
            purchase = store.buy(customer, customer[:1].encode().hex())
            replay = store.buy(customer, customer[:1].encode().hex())
            assert replay == purchase._replace(replayed=True)
    assert store.audit() == (5, 3, 2)


@pytest.mark.parametrize(
    "assignment",
    ["statement_timeout = 50", "lock_timeout = 50", "idle_session_timeout = 50"],
)
def test_a_hurry_of_the_administrators_refuses_no_buyer(
    cluster: Cluster, url: str, open_store: Callable[..., Any], assignment: str
) -> None:
    open_store(url)
    with role_default(cluster, assignment):
        store = service_app.open_store(url, "Concert", 5, 5.0)
        assert store.buy("alice").remaining_stock == 4
        pid = "SELECT pid FROM pg_stat_activity WHERE application_name = 'flash-sale'"
        before = cluster.sql(pid)
        with psycopg.connect(url) as holder, ThreadPoolExecutor() as crowd:
            holder.execute("SET lock_timeout = 0; SET statement_timeout = 0")
            holder.execute("SELECT FROM inventory FOR UPDATE")
            buyer = crowd.submit(store.buy, "bob")
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            wait_until(lambda: cluster.sql(waiting) == "1", LIMIT_S, "nobody waits")
            time.sleep(0.2)  # longer than every hurry
            holder.rollback()
            assert buyer.result(LIMIT_S).remaining_stock == 3
        time.sleep(0.2)
        assert store.buy("carol").remaining_stock == 2
        assert before
        assert cluster.sql(pid) == before  # the session is the same
        store.close()


def test_new_sessions_sell_from_the_same_tables_wherever_search_path_leads(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    store = open_store(url)
    database = url.rpartition("/")[2]
    cluster.sql("CREATE SCHEMA other", database)
    other = open_store(url + "?options=-csearch_path%3Dother", stock=7)
    with role_default(cluster, "search_path = other, pg_catalog"):
        for _ in range(2):
            assert store.buy("alice").remaining_stock in (4, 3)
            store.close()  # the next sale opens a session
    assert store.audit() == (5, 3, 2)
    assert other.audit() == (7, 7, 0)


# What no session can set is refused at the start, and told by /health


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_a_server_that_would_lose_sales_in_a_crash_is_refused(
    cluster: Cluster, url: str, open_store: Callable[..., Any], name: str
) -> None:
    store = open_store(url)
    store.check()
    with reloaded(cluster, name, "off"):
        for action in (lambda: open_store(url), store.check):
            with pytest.raises(db.Unavailable, match=name):
                action()
    store.check()


@pytest.mark.parametrize(
    ("granted", "sells"),
    [
        ("SELECT ON inventory, purchases", False),
        ("SELECT, UPDATE ON inventory, purchases", False),
        ("SELECT, INSERT ON inventory, purchases", False),
        ("SELECT, UPDATE ON inventory; GRANT SELECT, INSERT ON purchases", True),
    ],
)
def test_a_role_that_may_not_sell_is_refused_at_the_start(
    cluster: Cluster, url: str, open_store: Callable[..., Any], granted: str, sells: bool
) -> None:
    open_store(url)
    database, role = url.rpartition("/")[2], f"r{abs(hash(granted))}"
    grants = "; ".join(f"GRANT {grant} TO {role}" for grant in granted.split("; GRANT "))
    cluster.sql(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'; {grants}", database)
    limited = url.replace(f"//{ROLE}:", f"//{role}:")
    try:
        if not sells:
            with pytest.raises(db.Unavailable, match=r"may not sell.*GRANT SELECT, UPDATE"):
                open_store(limited)
            return
        store = open_store(limited)
        assert store.buy("alice", "key-1").remaining_stock == 4
        assert store.buy("alice", "key-1").replayed
        store.check()
        with pytest.raises(db.Unavailable, match="permission denied"):
            store.reset(5)
    finally:
        cluster.sql(f"DROP OWNED BY {role}; DROP ROLE {role}", database)


def test_a_sequence_that_lags_behind_the_ids_is_told_and_sells_no_unit(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    """As on a logical replica that was promoted."""
    store = open_store(url, 0.3, 50_000)
    database = url.rpartition("/")[2]
    cluster.sql(
        "INSERT INTO purchases (purchase_id, item_id, customer_id, remaining_stock)"
        " OVERRIDING SYSTEM VALUE SELECT n, 1, 'old', 50000 - n FROM generate_series(1, 20000) n;"
        " UPDATE inventory SET stock = 30000",
        database,
    )
    for action in (store.check, lambda: open_store(url)):
        with pytest.raises(db.Unavailable, match=r"ids up to 20000 .* is 1: run SELECT setval"):
            action()
    assert type(refused(lambda: store.buy("alice"))) is db.Unavailable
    assert type(refused(lambda: store.buy("alice", "key-1"))) is db.Unavailable
    assert store.audit() == (50_000, 30_000, 20_000)
    statement = str(refused(store.check)).partition("run ")[2]
    cluster.sql(statement, database)
    store.check()
    assert store.buy("alice", "key-1").purchase_id == 20_001


# Faults while it runs


def test_a_database_that_turned_read_only_is_not_stormed(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    store = open_store(url, 3.0)
    assert store.buy("alice").remaining_stock == 4
    before = sessions(cluster, url)
    database = url.rpartition("/")[2]
    cluster.sql(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    store.close()
    with pytest.raises(db.Unavailable, match="read-only"):
        store.buy("bob")
    cluster.sql(f"BEGIN READ WRITE; ALTER DATABASE {database} RESET ALL; COMMIT")
    wait_until(lambda: sessions(cluster, url) > before + 3, LIMIT_S, "it didn't look again")
    assert sessions(cluster, url) <= before + 4 + 3 / 0.25 + 1
    assert store.buy("bob").remaining_stock == 3


def test_a_host_that_falls_silent_after_the_log_in_is_left_for_the_next(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    open_store(url, 5.0, 50)
    with Proxy(cluster.port, silent_from=b"set_config") as silent:
        both = url.replace("@127.0.0.1:", f"@127.0.0.1:{silent.port},127.0.0.1:")
        store = service_app.open_store(both + "?target_session_attrs=read-write", "", 0, 2.0)
        assert elapsed_s(lambda: store.buy("alice")) < 4
        for number in range(13):
            assert store.buy("alice").remaining_stock == 48 - number
        store.close()
        assert elapsed_s(lambda: store.buy("alice")) < 1  # the one that answered comes first
        store.close()


def test_a_way_that_falls_silent_in_any_step_of_a_start_holds_it_for_a_few_seconds(
    cluster: Cluster, url: str
) -> None:
    def start(last_words: bytes) -> float:
        with Proxy(cluster.port, silent_from=last_words) as silent:
            way = url.replace(f":{cluster.port}/", f":{silent.port}/")
            store = service_app.open_store(way, "Concert", 5, 0.5)
            return elapsed_s(lambda: refused(store.create))

    steps = (b"user", b"set_config", b"pg_backend_pid", b"pg_class", b"CREATE TABLE")
    with ThreadPoolExecutor() as starts:
        assert max(starts.map(start, steps)) < 9


def test_a_reindex_makes_no_duplicate_a_bug(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    """While it runs, the violation names another index."""
    store = open_store(url)
    cluster.sql(
        "ALTER INDEX purchases_by_idempotency_key RENAME TO purchases_by_idempotency_key_ccold",
        url.rpartition("/")[2],
    )
    for number in range(5):
        results = buy_in_threads(store, [("alice", f"key-{number}")] * 8)
        assert Counter(result.replayed for result in results) == {False: 1, True: 7}
    assert store.audit() == (5, 0, 5)


def test_a_lock_at_the_first_statement_refuses_only_that_purchase(
    url: str, open_store: Callable[..., Any]
) -> None:
    store = open_store(url, 0.3)
    with psycopg.connect(url) as holder:
        holder.execute("LOCK inventory IN ACCESS EXCLUSIVE MODE")
        assert type(refused(lambda: store.buy("alice"))) is db.Busy
        holder.rollback()
    assert store.buy("bob").remaining_stock == 4


def test_a_sold_out_sale_sells_again_when_stock_is_added(
    cluster: Cluster, url: str, open_store: Callable[..., Any]
) -> None:
    store = open_store(url, stock=1)
    store.buy("alice")
    for _ in range(2):
        assert type(refused(lambda: store.buy("bob"))) is db.SoldOut
    restock = "UPDATE inventory SET stock = stock + 2, initial_stock = initial_stock + 2"
    cluster.sql(restock, url.rpartition("/")[2])
    assert store.inventory()[2:5] == (2, 3, 1)
    assert [store.buy("bob").remaining_stock for _ in range(2)] == [1, 0]
    assert store.audit() == (3, 0, 3)


def test_threads_that_wait_for_a_connection_are_not_overtaken(
    url: str, open_store: Callable[..., Any]
) -> None:
    open_store(url, 5.0, 1_000_000)
    store = service_app.open_store(url, "Concert", 5, 5.0, 1, 5.0)
    ended = time.monotonic() + 2

    def shop(customer: str) -> int:
        bought = 0
        while time.monotonic() < ended:
            store.buy(customer)
            bought += 1
        return bought

    with ThreadPoolExecutor(9) as crowd:
        buyers = [crowd.submit(shop, f"c{number}") for number in range(8)]
        waits = [elapsed_s(store.inventory) for _ in range(10)]
        counts = [buyer.result(LIMIT_S) for buyer in buyers]
    store.close()
    assert max(waits) < 0.5
    assert min(counts) > sum(counts) / 8 / 3
