"""The row's lock is free before the disks are, and nothing is told before they are."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from postgres_cluster import Cluster, reason_to_skip
from service import wait_until

import app as service_app
import db

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

import psycopg

import postgres.store

LIMIT_S = 10.0
LOCK_TIMEOUT_S = 0.5
RESTOCK = "UPDATE inventory SET stock = stock + 1, initial_stock = initial_stock + 1"
WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def url(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    return cluster.create_database(f"sale_{abs(hash(request.node.name))}")


@pytest.fixture
def open_store(url: str) -> Iterator[Callable[..., Any]]:
    """One more of a stock of two, as another process would."""
    opened = []

    def open_another(lock_timeout_s: float = LOCK_TIMEOUT_S) -> Any:
        opened.append(service_app.open_store(url, "Concert", 2, lock_timeout_s))
        opened[-1].create()
        return opened[-1]

    yield open_another
    for store in opened:
        store.close()


@contextmanager
def standby_away(cluster: Cluster) -> Iterator[None]:
    def name(how: str, wanted: str) -> None:
        cluster.sql(f"ALTER SYSTEM {how}")
        cluster.reload()
        show = "SHOW synchronous_standby_names"
        wait_until(lambda: cluster.sql(show) == wanted, LIMIT_S, "no reload")

    name("SET synchronous_standby_names = 'nobody'", "nobody")
    try:
        yield
    finally:
        name("RESET synchronous_standby_names", "")


def outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except db.StoreError as error:
        return type(error)


def test_a_sale_holds_the_row_no_longer_than_its_statement(
    cluster: Cluster, open_store: Callable[..., Any], url: str
) -> None:
    store = open_store(LIMIT_S)
    assert store.buy("alice").remaining_stock == 1  # so it knows that commits come through
    with ThreadPoolExecutor() as crowd, standby_away(cluster):
        buyer = crowd.submit(outcome, lambda: store.buy("bob"))
        wait_until(lambda: cluster.sql(WAITING), LIMIT_S, "nobody waits for the standby")
        with psycopg.connect(url) as other:
            stock = other.execute("SELECT stock FROM inventory FOR UPDATE NOWAIT").fetchone()
            other.rollback()  # a commit would wait, too
        assert stock == (0,)  # sold here, and the lock is free
        time.sleep(0.2)
        assert not buyer.done()  # but not told
    assert buyer.result(LIMIT_S).remaining_stock == 0


def test_while_commits_do_not_come_through_a_sale_holds_the_row_until_they_do(
    cluster: Cluster, open_store: Callable[..., Any]
) -> None:
    stores = [open_store() for _ in range(3)]
    for store in stores:
        store.reset(100)
        store.buy("alice")  # each process sells early now
    with ThreadPoolExecutor() as crowd, standby_away(cluster):
        for store in stores:
            assert outcome(partial(store.buy, "bob")) is db.OutcomeUnknown
        begin, before = time.monotonic(), stores[0].audit().purchase_records
        attempts = [crowd.submit(outcome, partial(s.buy, "carol")) for s in stores * 4]
        outcomes = [attempt.result(LIMIT_S) for attempt in attempts]
        assert set(outcomes) == {db.OutcomeUnknown, db.Busy}
        sold = stores[0].audit().purchase_records - before
        assert sold == outcomes.count(db.OutcomeUnknown)
        assert sold <= 1 + (time.monotonic() - begin) / LOCK_TIMEOUT_S
    for store in stores:
        assert store.buy("dora").remaining_stock < 100
    assert stores[0].audit().consistent


def test_a_process_that_starts_while_the_standby_is_away_sells_the_careful_way(
    cluster: Cluster, open_store: Callable[..., Any], url: str
) -> None:
    store = open_store(LIMIT_S)
    with ThreadPoolExecutor() as crowd, standby_away(cluster):
        buyer = crowd.submit(outcome, lambda: store.buy("alice"))
        wait_until(lambda: cluster.sql(WAITING), LIMIT_S, "nobody waits for the standby")
        with psycopg.connect(url) as other, pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SELECT FROM inventory FOR UPDATE NOWAIT")
    assert buyer.result(LIMIT_S).remaining_stock == 1


def test_no_refusal_rests_on_a_sale_that_is_not_on_every_disk(
    cluster: Cluster, open_store: Callable[..., Any], url: str
) -> None:
    """A failover would take it back: the unit would be on sale again."""
    seller, refuser, newcomer = open_store(), open_store(), open_store()
    for store in (seller, refuser):
        store.buy("alice")
    assert outcome(lambda: refuser.buy("bob")) is db.SoldOut
    cluster.sql(RESTOCK, url.rpartition("/")[2])
    assert outcome(lambda: refuser.buy("bob", "key-0")).remaining_stock == 0
    assert outcome(lambda: refuser.buy("bob")) is db.SoldOut
    cluster.sql(RESTOCK, url.rpartition("/")[2])
    with standby_away(cluster):
        assert outcome(partial(seller.buy, "carol", "key-1")) is db.OutcomeUnknown
        assert seller.inventory().current_stock == 0  # a reading may tell
        for store in (refuser, newcomer):
            assert outcome(partial(store.buy, "dora")) is db.OutcomeUnknown
            assert outcome(partial(store.buy, "dora", "key-1")) is db.OutcomeUnknown
            assert outcome(partial(store.buy, "carol", "key-1")) is db.OutcomeUnknown
    for store in (refuser, newcomer):
        assert outcome(partial(store.buy, "dora")) is db.SoldOut
        assert outcome(partial(store.buy, "dora", "key-1")) is db.KeyReused
        assert store.buy("carol", "key-1").replayed
    assert seller.audit() == (4, 0, 4)


def test_only_the_first_refusal_waits_for_the_disks(
    cluster: Cluster, open_store: Callable[..., Any]
) -> None:
    store = open_store()
    store.reset(1)
    store.buy("alice", "key-1")
    assert outcome(partial(store.buy, "bob")) is db.SoldOut
    with standby_away(cluster):
        for key in (None, "key-2"):
            assert outcome(partial(store.buy, "bob", key)) is db.SoldOut
        assert outcome(partial(store.buy, "alice", "key-1")) is db.OutcomeUnknown
    assert store.buy("alice", "key-1").replayed


@pytest.mark.parametrize("key", [None, "key-1"])
def test_a_connection_that_is_lost_between_sale_and_confirmation_is_unknown(
    cluster: Cluster, open_store: Callable[..., Any], key: str | None
) -> None:
    store = open_store(3.0)
    store.reset(5)
    store.buy("alice")
    with ThreadPoolExecutor() as crowd, standby_away(cluster):
        buyer = crowd.submit(outcome, lambda: store.buy("bob", key))
        pid = wait_until(lambda: cluster.sql(WAITING), LIMIT_S, "nobody waits for the standby")
        cluster.sql(f"SELECT pg_terminate_backend({pid})")
        assert buyer.result(LIMIT_S) is db.OutcomeUnknown
        assert store.inventory().current_stock == 3
    if key:
        assert store.buy("bob", key).replayed
    assert store.audit() == (5, 3, 2)


def test_an_error_of_the_confirmation_does_not_undo_the_sale_and_makes_it_unknown(
    open_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    store.buy("alice")
    monkeypatch.setattr(postgres.store, "CONFIRM", "SELECT pg_advisory_xact_lock(1 / 0)")
    assert outcome(partial(store.buy, "bob")) is db.OutcomeUnknown
    assert store.audit() == (2, 0, 2)


def test_an_error_of_the_sale_is_certain_whatever_comes_of_the_confirmation(
    cluster: Cluster, open_store: Callable[..., Any], url: str
) -> None:
    store = open_store()
    store.buy("alice")
    with psycopg.connect(url) as holder:
        holder.execute("SELECT FROM inventory FOR UPDATE")
        assert outcome(partial(store.buy, "bob")) is db.Busy
    assert store.audit() == (2, 1, 1)
