"""The contract of a store: what app.py relies on. Every store passes these same tests."""

import multiprocessing
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from service import PROJECT

import app as service_app
import db
from serving import metrics

OpenStore = Callable[..., Any]
DEPLOY = PROJECT / "deploy" / "README.md"


def sell_out(store: Any) -> None:
    while store.inventory().current_stock:
        store.buy("somebody")


def buy_in_threads(store: Any, buyers: list[tuple[str, str | None]]) -> list[Any]:
    """All purchases at once; each result is the Purchase or the StoreError."""
    results: list[Any] = [None] * len(buyers)
    barrier = threading.Barrier(len(buyers))

    def purchase(number: int) -> None:
        barrier.wait(timeout=30)
        try:
            results[number] = store.buy(*buyers[number])
        except db.StoreError as error:
            results[number] = error

    threads = [threading.Thread(target=purchase, args=(number,)) for number in range(len(buyers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_new_store_has_its_stock_and_no_purchases(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    now = store.inventory()
    assert now[:5] == (1, "Concert", 5, 5, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", now.last_updated)
    assert store.audit() == (5, 5, 0)


def test_a_purchase_takes_one_unit_and_is_recorded(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    purchase = store.buy("alice")
    assert (purchase.remaining_stock, purchase.replayed) == (4, False)
    assert purchase.purchase_id > 0
    assert store.inventory()[2:5] == (4, 5, 1)
    assert store.audit() == (5, 4, 1)


def test_purchases_count_the_stock_down_and_their_ids_up(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    purchases = [store.buy("alice") for _ in range(5)]
    assert [purchase.remaining_stock for purchase in purchases] == [4, 3, 2, 1, 0]
    ids = [purchase.purchase_id for purchase in purchases]
    assert ids == sorted(set(ids))


def test_the_last_unit_is_followed_by_sold_out_and_nothing_is_stored(open_store: OpenStore) -> None:
    store = open_store(stock=1)
    store.buy("alice")
    with pytest.raises(db.SoldOut):
        store.buy("bob")
    assert store.audit() == (1, 0, 1)


def test_a_store_without_stock_sells_nothing(open_store: OpenStore) -> None:
    store = open_store(stock=0)
    with pytest.raises(db.SoldOut):
        store.buy("alice")
    assert store.audit() == (0, 0, 0)
    assert store.inventory().total_purchases == 0


def test_the_same_key_replays_the_same_purchase(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    first = store.buy("alice", "key-1")
    second = store.buy("alice", "key-1")
    assert second == first._replace(replayed=True)
    assert store.audit() == (5, 4, 1)


def test_a_key_is_replayed_after_the_stock_is_gone(open_store: OpenStore) -> None:
    store = open_store(stock=3)
    first = store.buy("alice", "key-1")
    sell_out(store)
    assert store.buy("alice", "key-1") == first._replace(replayed=True)
    assert store.audit() == (3, 0, 3)


def test_a_key_is_replayed_by_another_process(open_store: OpenStore) -> None:
    first = open_store(stock=3).buy("alice", "key-1")
    assert open_store(stock=3).buy("alice", "key-1") == first._replace(replayed=True)


def test_a_key_of_another_customer_is_refused_and_nothing_is_stored(open_store: OpenStore) -> None:
    store = open_store(stock=3)
    store.buy("alice", "key-1")
    with pytest.raises(db.KeyReused):
        store.buy("bob", "key-1")
    assert store.audit() == (3, 2, 1)
    sell_out(store)
    with pytest.raises(db.KeyReused):
        store.buy("bob", "key-1")


def test_a_refusal_does_not_use_up_the_key(open_store: OpenStore) -> None:
    store = open_store(stock=1)
    store.buy("alice")
    with pytest.raises(db.SoldOut):
        store.buy("bob", "key-1")
    store.reset(1)
    assert not store.buy("bob", "key-1").replayed


def test_a_buyer_who_hung_up_is_not_sold_to_and_one_who_waits_is(open_store: OpenStore) -> None:
    store = open_store(stock=2)
    with pytest.raises(db.BuyerGone, match="hung up"):
        store.buy("alice", None, lambda: False)
    assert store.audit() == (2, 2, 0)
    assert store.buy("bob", None, lambda: True).remaining_stock == 1
    assert store.buy("carol", None, None).remaining_stock == 0


def test_a_buyer_with_a_key_is_sold_to_and_finds_it_later(open_store: OpenStore) -> None:
    store = open_store(stock=1)
    purchase = store.buy("alice", "key-1", lambda: False)
    assert store.buy("alice", "key-1") == purchase._replace(replayed=True)


def test_one_customer_may_buy_several_units_under_several_keys(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    ids = {store.buy("alice", key).purchase_id for key in ("key-1", "key-2", None, None)}
    assert len(ids) == 4
    assert store.audit() == (5, 1, 4)


@pytest.mark.parametrize(
    "customer_id", ["x" * 128, "Zoë 東京 🎫", "'; DROP TABLE purchases; --", "%s {0} ?"]
)
def test_any_customer_id_is_data(open_store: OpenStore, customer_id: str) -> None:
    store = open_store(stock=2)
    first = store.buy(customer_id, "key-1")
    assert store.buy(customer_id, "key-1") == first._replace(replayed=True)
    assert store.audit() == (2, 1, 1)


def test_keys_are_told_apart_by_every_character(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    keys = ["key", "KEY", "key!", "k" * 255, "k" * 254]
    assert len({store.buy("alice", key).purchase_id for key in keys}) == 5


@pytest.mark.parametrize("stock", [0, 7, 1_000_000_000])
def test_reset_forgets_the_purchases_and_sets_the_stock(open_store: OpenStore, stock: int) -> None:
    store = open_store(stock=5)
    store.buy("alice", "key-1")
    store.reset(stock)
    assert store.inventory()[2:5] == (stock, stock, 0)
    assert store.audit() == (stock, stock, 0)


def test_ids_are_not_used_again_after_a_reset(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    before = store.buy("alice").purchase_id
    store.reset(5)
    assert store.buy("alice").purchase_id > before


def test_create_changes_nothing_where_a_sale_is_under_way(open_store: OpenStore) -> None:
    open_store(stock=5).buy("alice")
    again = open_store(stock=500)
    assert again.inventory()[2:5] == (4, 5, 1)


def test_check_passes_and_changes_no_number(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    store.buy("alice")
    store.check()
    assert store.audit() == (5, 4, 1)
    sell_out(store)
    store.check()


def test_forty_buyers_at_once_get_ten_units_once_each(open_store: OpenStore) -> None:
    store = open_store(stock=10)
    results = buy_in_threads(store, [(f"c{number}", None) for number in range(40)])
    sold = [result for result in results if isinstance(result, db.Purchase)]
    refused = [result for result in results if isinstance(result, db.SoldOut)]
    assert (len(sold), len(refused)) == (10, 30)
    assert sorted(purchase.remaining_stock for purchase in sold) == list(range(10))
    assert store.audit() == (10, 0, 10)


def test_requests_with_one_key_at_once_sell_one_unit_and_get_one_answer(
    open_store: OpenStore,
) -> None:
    store = open_store(stock=10)
    results = buy_in_threads(store, [("alice", "key-1")] * 20)
    assert len({(result.purchase_id, result.remaining_stock) for result in results}) == 1
    assert sorted(result.replayed for result in results) == [False] + [True] * 19
    assert store.audit() == (10, 9, 1)


def test_requests_with_one_key_for_the_last_unit_all_get_it(open_store: OpenStore) -> None:
    store = open_store(stock=1)
    for attempt in range(20):
        store.reset(1)
        results = buy_in_threads(store, [("alice", f"key-{attempt}")] * 8)
        assert {type(result) for result in results} == {db.Purchase}
        assert store.audit() == (1, 0, 1)


def create_and_report(url: str, barrier: Any, results: Any) -> None:
    store = service_app.open_store(url, "Concert", 5, 5.0)
    barrier.wait(60)
    try:
        store.create()
        results.put(store.inventory()[2:5])
    except BaseException as error:
        results.put(repr(error))
        raise
    finally:
        store.close()


def test_eight_processes_create_one_stock(store_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [
        context.Process(target=create_and_report, args=(store_url, barrier, results))
        for _ in range(8)
    ]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [(5, 5, 0)] * 8
    for process in processes:
        process.join()


def test_what_a_key_has_bought_is_found_and_nothing_is_sold(open_store: OpenStore) -> None:
    store = open_store(stock=5)
    assert store.find("alice", "key-1") is None
    bought = store.buy("alice", "key-1")
    assert store.find("alice", "key-1") == bought._replace(replayed=True)
    with pytest.raises(db.KeyReused):
        store.find("bob", "key-1")
    assert store.audit() == (5, 4, 1)
    store.reset(0)
    assert store.find("alice", "key-1") is None  # nor is it refused: it has bought nothing


def test_each_wait_for_the_lock_is_told(open_store: OpenStore) -> None:
    waits: list[float] = []
    store = open_store(stock=2)
    store.measure(waits.append, lambda: None)
    store.buy("alice")
    store.buy("bob", "key-1")
    assert len(waits) == 2
    assert all(0 < wait_s < 5 for wait_s in waits)


def test_a_monitor_is_told_of_the_database_by_names_that_it_knows(open_store: OpenStore) -> None:
    told = open_store().gauges()
    assert told
    assert told.keys() <= metrics.DATABASE.keys()
    assert all(isinstance(value, int | float) and value >= 0 for value in told.values())


def restock(units: int) -> str:
    """What deploy/README.md tells an operator to run; a refund is a restock of one unit."""
    told = re.search(r"UPDATE inventory SET stock = stock \+ 1,[^\"]*", DEPLOY.read_text())
    assert told is not None
    return told[0].replace("+ 1", f"+ {units}")


def test_a_restock_during_a_sale_is_sold_too_and_everything_adds_up(
    open_store: OpenStore, run_sql: Callable[[str], None]
) -> None:
    store = open_store(stock=10)
    results: list[Any] = []
    crowd: list[tuple[str, str | None]] = [(f"c{number}", None) for number in range(30)]
    selling = threading.Thread(target=lambda: results.extend(buy_in_threads(store, crowd)))
    selling.start()
    run_sql(restock(3))
    selling.join()
    sold = sum(isinstance(result, db.Purchase) for result in results)
    assert 10 <= sold <= 13
    assert store.inventory()[2:5] == (13 - sold, 13, sold)
    sell_out(store)
    assert store.audit() == (13, 0, 13)


def test_a_sold_out_sale_sells_again_after_a_restock(
    open_store: OpenStore, run_sql: Callable[[str], None]
) -> None:
    store = open_store(stock=1)
    store.buy("alice", "key-1")
    for _ in range(3):  # so that whatever a store remembers of it is remembered
        with pytest.raises(db.SoldOut):
            store.buy("bob")
    run_sql(restock(2))
    assert store.inventory()[2:5] == (2, 3, 1)
    assert [store.buy("bob").remaining_stock for _ in range(2)] == [1, 0]
    with pytest.raises(db.SoldOut):
        store.buy("bob")
    assert store.audit() == (3, 0, 3)


def test_a_refund_is_a_restock_of_one_and_its_key_buys_nothing_more(
    open_store: OpenStore, run_sql: Callable[[str], None]
) -> None:
    store = open_store(stock=1)
    first = store.buy("alice", "key-1")
    run_sql(restock(1))
    assert store.buy("alice", "key-1") == first._replace(replayed=True)
    assert store.inventory()[2:5] == (1, 2, 1)
    assert store.buy("bob").remaining_stock == 0
    assert store.audit() == (2, 0, 2)
