"""The whole service on PostgreSQL: crowds, restarts of the server, moving a sale over."""

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from postgres_cluster import PASSWORD, Cluster, reason_to_skip
from postgres_proxy import Proxy
from service import (
    PROJECT,
    Service,
    free_port,
    purchase_request,
    run_to_end,
    send_at_once,
)
from service import wait_until as wait_for
from test_metrics import is_served, outcome_counter, scrape

import app as service_app
import db
from sqlite.engine import sqlite3

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

BUYER_PATIENCE_S = 40.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture
def url(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    return cluster.create_database(f"sale_{abs(hash(request.node.name))}")


@pytest.fixture
def service(tmp_path: Path, url: str) -> Iterator[Service]:
    with Service(tmp_path, DATABASE_URL=url) as running:
        yield running
        assert PASSWORD not in running.log


def insist(service: Service, key: str) -> int:
    """Send one purchase with its key until it is sold or sold out, as a buyer would: the status."""
    deadline = time.monotonic() + BUYER_PATIENCE_S
    while time.monotonic() < deadline:
        try:
            status = service.buy(key, key).status_code
        except requests.ConnectionError:
            status = 0
        if status in (200, 410):
            return status
        assert status in (0, 500, 503)
        time.sleep(0.05)
    raise AssertionError(f"no answer for {key} in {BUYER_PATIENCE_S} s")


def test_a_thousand_buyers_buy_each_of_100_tickets_once(service: Service) -> None:
    answers = send_at_once(service.port, [purchase_request(f"c{number}") for number in range(1000)])
    assert Counter(answer.status for answer in answers) == {200: 100, 410: 900}
    sold = [answer.json for answer in answers if answer.status == 200]
    assert sorted(purchase["remaining_stock"] for purchase in sold) == list(range(100))
    assert len({purchase["purchase_id"] for purchase in sold}) == 100
    assert service.get("/audit") == {
        "initial_stock": 100,
        "current_stock": 0,
        "purchase_records": 100,
        "consistent": True,
    }


PROOF = (sys.executable, "proof_of_correctness.py", "--own-server")


def test_the_proof_holds_and_says_whose_purchases_it_deletes(url: str) -> None:
    store = store_with_a_purchase(url)
    done = run_to_end((*PROOF, "--delete-purchases"), DATABASE_URL=url, INITIAL_STOCK="7")
    assert done.returncode == 0, done.stdout
    no_test_was_skipped = "PROVEN: every unit was sold exactly once (seed"
    assert no_test_was_skipped in done.stdout
    assert "DATABASE_URL names: its purchases will be deleted" in done.stdout
    assert PASSWORD not in done.stdout + done.stderr
    assert store.audit() == (7, 7, 0)  # as configured
    store.close()


@pytest.mark.parametrize(
    ("option", "allow_reset", "reason"),
    [
        ((), "1", "holds 1 purchases: --delete-purchases deletes them"),
        ((), "", "holds 1 purchases: --delete-purchases deletes them"),
        (("--delete-purchases",), "0", "start that server with ALLOW_RESET=1"),
    ],
)
def test_the_proof_deletes_no_purchase_unless_it_is_told_to(
    url: str, option: tuple[str, ...], allow_reset: str, reason: str
) -> None:
    store = store_with_a_purchase(url)
    done = run_to_end((*PROOF, *option), DATABASE_URL=url, ALLOW_RESET=allow_reset)
    assert done.returncode == 2, done.stdout
    assert reason in done.stdout
    assert PASSWORD not in done.stdout + done.stderr
    assert store.audit() == (5, 4, 1)
    store.close()


def store_with_a_purchase(url: str, key: str | None = None) -> Any:
    store = service_app.open_store(url, "Concert", 5, 5.0)
    store.create()
    store.buy("alice", key)
    return store


def test_every_route_answers_as_on_sqlite_and_tells_no_secret(service: Service) -> None:
    assert service.buy("alice", "key-1").json()["remaining_stock"] == 99
    replay = service.buy("alice", "key-1")
    assert (replay.json()["remaining_stock"], replay.headers["Idempotent-Replayed"]) == (99, "true")
    assert service.buy("bob", "key-1").status_code == 422
    assert service.get("/health")["status"] == "ok"
    assert service.get("/inventory")["total_purchases"] == 1
    assert "flash_sale_stock 99" in requests.get(f"{service.url}/metrics", timeout=10).text
    service.reset(7)
    assert service.get("/inventory")["current_stock"] == 7
    description = requests.get(service.url, timeout=10).text
    assert "PostgreSQL" in description
    assert PASSWORD not in description


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_a_restart_of_the_server_in_mid_sale_loses_nothing(
    service: Service, cluster: Cluster, how: signal.Signals
) -> None:
    service.reset(200)
    workers = all_workers(service)
    with ThreadPoolExecutor(16) as crowd:
        buyers = [crowd.submit(insist, service, f"c{number}") for number in range(300)]
        wait_for_sales(buyers, 40)
        cluster.restart(how)
        statuses = Counter(buyer.result(BUYER_PATIENCE_S) for buyer in buyers)
    assert statuses == {200: 200, 410: 100}
    assert service.get("/audit")["consistent"]
    assert service.get("/audit")["purchase_records"] == 200
    assert service.workers() == workers


def all_workers(service: Service) -> list[int]:
    deadline = time.monotonic() + 20
    while len(workers := service.workers()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return workers


def wait_for_sales(buyers: "list[Future[int]]", wanted: int) -> None:
    deadline = time.monotonic() + 20
    while sum(buyer.done() for buyer in buyers) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
def test_idle_workers_find_a_restarted_server_with_no_sale_lost(
    service: Service, cluster: Cluster, how: signal.Signals
) -> None:
    for number in range(20):
        assert service.buy(f"c{number}").status_code == 200
    if how == signal.SIGKILL:
        cluster.kill()
    else:
        cluster.stop(how)
    refused = service.buy("nobody")
    assert (refused.status_code, refused.headers.get("Retry-After")) == (503, "1")
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 503
    cluster.start()
    for number in range(20):
        assert service.buy(f"d{number}").status_code == 200
    assert service.get("/audit")["purchase_records"] == 40


def test_a_lost_standby_makes_sales_unknown_and_holds_no_worker(
    service: Service, cluster: Cluster, url: str
) -> None:
    store = service_app.open_store(url, "", 0, 0.5)
    cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    cluster.reload()
    try:
        wait_until(cluster, "SHOW synchronous_standby_names", "nobody")
        for key in (None, "key-1"):
            started = time.monotonic()
            with pytest.raises(db.OutcomeUnknown):
                store.buy("alice", key)
            assert time.monotonic() - started < 2.5
    finally:
        cluster.sql("ALTER SYSTEM RESET synchronous_standby_names")
        cluster.reload()
    wait_until(cluster, "SHOW synchronous_standby_names", "")
    assert store.buy("alice", "key-1").replayed
    assert store.buy("alice").remaining_stock == 97
    assert store.audit() == (100, 97, 3)
    store.close()


def wait_until(cluster: Cluster, query: str, wanted: str) -> None:
    deadline = time.monotonic() + 10
    while cluster.sql(query) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sale_moves_from_sqlite_with_everything(tmp_path: Path, url: str) -> None:
    file = tmp_path / "inventory.db"
    before = service_app.open_store(f"sqlite:///{file}", "Zoë's show", 10, 5.0)
    before.create()
    first = before.buy("alice", "key-1")
    before.buy("tab\tquote'back\\slash", None)
    before.reset(10)
    kept = [
        before.buy("alice", "key-1"),
        before.buy("tab\tquote'back\\slash", None),
        before.buy("東京", "key-2"),
    ]
    numbers, last_updated = before.audit(), before.inventory().last_updated
    before.close()

    moved = run_move(file, url)
    assert (moved.stdout, moved.stderr) == ("Moved: 3 purchases, 7 of 10 units left\n", "")
    after = service_app.open_store(url, "", 0, 5.0)
    after.create()
    assert after.audit() == numbers == (10, 7, 3)
    assert after.inventory()[:5] == (1, "Zoë's show", 7, 10, 3)
    assert after.inventory().last_updated == last_updated
    assert after.buy("alice", "key-1") == kept[0]._replace(replayed=True)
    assert after.buy("東京", "key-2") == kept[2]._replace(replayed=True)
    assert (
        after.buy("bob").purchase_id
        > max(purchase.purchase_id for purchase in kept)
        > first.purchase_id
    )

    assert after.audit() == (10, 6, 4)
    after.close()


def test_a_sale_does_not_move_while_a_purchase_is_under_way(tmp_path: Path, url: str) -> None:
    file = tmp_path / "inventory.db"
    store = service_app.open_store(f"sqlite:///{file}", "Concert", 10, 5.0)
    store.create()
    held = sqlite3.connect(file, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    refused = run_move(file, url)
    held.close()
    assert refused.returncode == 1
    assert refused.stderr == "Nothing was moved: database is locked\n"
    assert store.buy("alice").remaining_stock == 9
    store.close()


def test_a_forgotten_service_sells_nothing_once_its_sale_has_moved(
    tmp_path: Path, url: str, cluster: Cluster
) -> None:
    file = tmp_path / "inventory.db"
    with Service(tmp_path) as service:  # on that file
        service.buy("alice", "key-1")
        moved = run_move(file, url)
        assert moved.stdout == "Moved: 1 purchases, 99 of 100 units left\n", moved.stderr
        for number in range(8):
            refused = service.buy(f"c{number}")
            assert (refused.status_code, refused.headers.get("Retry-After")) == (503, "1")
        assert "this sale was moved: PostgreSQL, host 127.0.0.1 port" in service.log
        assert PASSWORD not in service.log
        assert requests.get(f"{service.url}/health", timeout=10).status_code == 503
        assert service.buy("alice", "key-1").headers["Idempotent-Replayed"] == "true"
        assert service.get("/audit")["purchase_records"] == 1
    again = run_to_end(
        (sys.executable, "-m", "gunicorn", "app:app"), DATABASE_URL=f"sqlite:///{file}"
    )
    assert again.returncode == 4
    assert "this sale was moved to PostgreSQL" in again.stderr
    elsewhere = run_move(file, cluster.create_database("elsewhere"))
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "")
    assert "this sale was moved" in elsewhere.stderr
    assert cluster.sql("SELECT count(*) FROM purchases", url.rpartition("/")[2]) == "1"


@pytest.mark.parametrize("fault", ["not there", "not empty", "lost on the way"])
def test_a_move_that_failed_takes_the_mark_off(
    tmp_path: Path, url: str, cluster: Cluster, fault: str
) -> None:
    file = tmp_path / "inventory.db"
    store = service_app.open_store(f"sqlite:///{file}", "Concert", 10, 5.0)
    store.create()
    store.buy("alice")
    with Proxy(cluster.port, silent_from=b"COPY" if fault == "lost on the way" else b"\0") as way:
        target = url.replace(f":{cluster.port}/", f":{way.port}/")
        if fault == "not there":
            way.close()
        if fault == "not empty":
            other = service_app.open_store(url, "Other", 10, 5.0)
            other.create()
            other.buy("bob")
            other.close()
        with ThreadPoolExecutor() as moving:
            move = moving.submit(run_move, file, target)
            if fault == "lost on the way":
                assert way.is_silent.wait(30)
                way.cut()
            moved = move.result(60)
    assert moved.returncode == 1
    assert moved.stderr.startswith("Nothing was moved: "), moved.stderr
    assert len(moved.stderr.splitlines()) == 1
    assert PASSWORD not in moved.stderr
    assert store.buy("bob").remaining_stock == 8
    store.check()
    store.close()


def test_a_move_in_doubt_leaves_nobody_who_sells(
    tmp_path: Path, url: str, cluster: Cluster
) -> None:
    file = tmp_path / "inventory.db"
    store = service_app.open_store(f"sqlite:///{file}", "Concert", 10, 5.0)
    store.create()
    store.buy("alice")
    with Proxy(cluster.port, silent_from=b"COMMIT\0") as way, ThreadPoolExecutor() as moving:
        service_app.open_store(url, "Concert", 10, 5.0).create()
        move = moving.submit(run_move, file, url.replace(f":{cluster.port}/", f":{way.port}/"))
        assert way.is_silent.wait(30)
        way.cut()
        moved = move.result(60)
    assert moved.returncode == 1
    assert moved.stderr.startswith("Perhaps moved, ")
    with pytest.raises(db.Unavailable, match="this sale was moved: PostgreSQL"):
        store.buy("bob")
    with pytest.raises(db.Unavailable, match="this sale was moved: PostgreSQL"):
        store.reset(5)
    assert store.audit() == (10, 9, 1)
    store.close()


def test_a_mark_that_cannot_be_taken_off_is_told_with_both_causes(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postgres import move_from_sqlite
    from postgres.store import PostgresStore

    file = tmp_path / "inventory.db"
    store = service_app.open_store(f"sqlite:///{file}", "Concert", 10, 5.0)
    store.create()
    held = sqlite3.connect(file, isolation_level=None)

    def create(target: Any) -> None:
        held.execute("BEGIN IMMEDIATE")
        raise db.Unavailable("no server there")

    monkeypatch.setattr(PostgresStore, "create", create)
    monkeypatch.setattr(move_from_sqlite, "LOCK_TIMEOUT_S", 0.2)
    with pytest.raises(OSError, match=r"no server there - and database is locked: .*DROP"):
        move_from_sqlite.move(file, url)
    held.execute("ROLLBACK")
    held.execute("DROP TRIGGER moved")
    assert store.buy("alice").remaining_stock == 9
    held.close()
    store.close()


def test_a_file_without_a_sale_is_not_moved(tmp_path: Path, url: str) -> None:
    (tmp_path / "inventory.db").touch()
    moved = run_move(tmp_path / "inventory.db", url)
    assert (moved.returncode, moved.stdout) == (1, "")
    assert moved.stderr == "Nothing was moved: there is no sale in this file\n"


def test_a_move_that_is_interrupted_while_it_commits_is_in_doubt_too(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C where the commit waits for a standby: it is done, but nobody says so."""
    import psycopg

    from postgres.move_from_sqlite import move

    def commit(connection: Any) -> None:
        committed(connection)
        raise SystemExit  # which pytest survives, unlike KeyboardInterrupt

    committed = psycopg.Connection.commit
    monkeypatch.setattr(psycopg.Connection, "commit", commit)
    file = tmp_path / "inventory.db"
    store = service_app.open_store(f"sqlite:///{file}", "Concert", 10, 5.0)
    store.create()
    with pytest.raises(db.OutcomeUnknown, match="interrupted"):
        move(file, url)
    with pytest.raises(db.Unavailable, match="this sale was moved: PostgreSQL"):
        store.buy("bob")
    store.close()


def run_move(file: Path, url: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "postgres.move_from_sqlite", str(file), url]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_the_metrics_tell_when_the_server_is_away_and_when_it_is_back(
    cluster: Cluster, url: str, tmp_path: Path
) -> None:
    name = url.rpartition("/")[2].partition("?")[0]
    port = free_port()
    with Service(tmp_path, DATABASE_URL=url, METRICS_PORT=str(port)) as service:
        wait_for(lambda: is_served(port), 10, "no metrics")
        service.buy()
        now = scrape(port)
        assert (now["flash_sale_database_up"], now["flash_sale_sold"]) == (1, 1)
        assert now["flash_sale_lock_wait_seconds_count"] == 1
        assert now["flash_sale_oldest_snapshot_seconds"] >= 0
        cluster.sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        cluster.sql(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname='{name}'"
        )
        started = time.monotonic()
        now = scrape(port)
        assert time.monotonic() - started < 5
        assert (now["flash_sale_database_up"], "flash_sale_sold" in now) == (0, False)
        assert now[outcome_counter("sold")] == 1
        cluster.sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        wait_for(lambda: scrape(port)["flash_sale_database_up"], 10, "it never came back")


def test_before_the_opening_only_a_stored_key_is_answered(url: str, tmp_path: Path) -> None:
    store = store_with_a_purchase(url, "key-1")
    store.close()
    opens_at = "2999-12-01T20:00:00+01:00"
    with Service(tmp_path, DATABASE_URL=url, SALE_STARTS_AT=opens_at) as service:
        assert [service.buy("alice", key).status_code for key in ("key-1", "new")] == [200, 403]
        assert service.get("/inventory")["opens_at"] == opens_at
        assert service.get("/health")["status"] == "ok"
        assert service.get("/audit")["purchase_records"] == 1
