"""Crowds meet real gunicorn workers: each unit is sold once, whatever is held or killed."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests
from service import Answer, Service, purchase_request, send_at_once, wait_until
from test_sqlite_store import write_lock

from sqlite.engine import sqlite3


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as running:
        yield running


@pytest.mark.parametrize("buyers", [1_000, 10_000])
def test_a_crowd_buys_each_of_100_tickets_once(service: Service, buyers: int) -> None:
    answers = send_at_once(
        service.port, [purchase_request(f"c{number}") for number in range(buyers)]
    )
    assert Counter(answer.text for answer in answers if answer.status == 0) == {}
    assert Counter(answer.status for answer in answers) == {200: 100, 410: buyers - 100}
    sold = [answer.json for answer in answers if answer.status == 200]
    assert sorted(purchase["remaining_stock"] for purchase in sold) == list(range(100))
    assert len({purchase["purchase_id"] for purchase in sold}) == 100
    assert service.get("/audit")["purchase_records"] == 100
    assert service.get("/inventory")["current_stock"] == 0


def test_one_key_at_once_on_all_workers_sells_one_unit(service: Service) -> None:
    answers = send_at_once(service.port, [purchase_request("alice", "key-1")] * 64)
    assert {answer.status for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    replayed = [answer for answer in answers if answer.headers.get("idempotent-replayed") == "true"]
    assert len(replayed) == 63
    assert service.get("/audit")["purchase_records"] == 1


def test_one_key_of_two_customers_at_once_sells_to_one_of_them(service: Service) -> None:
    requests_ = [purchase_request(f"c{number % 2}", "key-1") for number in range(64)]
    answers = send_at_once(service.port, requests_)
    assert Counter(answer.status for answer in answers) == {200: 32, 422: 32}
    assert service.get("/audit")["purchase_records"] == 1


def test_while_another_program_holds_the_lock_purchases_are_busy_and_the_rest_answers(
    tmp_path: Path,
) -> None:
    with Service(tmp_path, LOCK_TIMEOUT="3", WEB_CONCURRENCY="4") as service:
        with write_lock(tmp_path / "inventory.db"):
            busy: list[requests.Response] = []
            started = time.monotonic()
            buyers = [threading.Thread(target=lambda: busy.append(service.buy())) for _ in range(2)]
            for buyer in buyers:
                buyer.start()
            answered_meanwhile = 0
            while any(buyer.is_alive() for buyer in buyers):
                assert service.get("/")["service"]
                assert service.get("/inventory")["current_stock"] == 100
                answered_meanwhile += all(buyer.is_alive() for buyer in buyers)
            assert answered_meanwhile >= 3
            assert 3.0 <= time.monotonic() - started < 5.5
            assert service.get("/audit")["purchase_records"] == 0
        assert len(busy) == 2
        for answer in busy:
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert answer.json() == {"success": False, "message": "Server busy - please retry"}
        assert service.buy().json()["remaining_stock"] == 99


def test_a_lock_timeout_longer_than_gunicorns_own_does_not_cost_the_worker(tmp_path: Path) -> None:
    with Service(tmp_path, LOCK_TIMEOUT="33", WEB_CONCURRENCY="2") as service:
        wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
        workers = service.workers()
        with write_lock(tmp_path / "inventory.db"):
            started = time.monotonic()
            assert requests.post(f"{service.url}/buy_ticket", timeout=60).status_code == 503
            assert 33 <= time.monotonic() - started < 36
        assert service.workers() == workers


def test_workers_killed_in_mid_sale_lose_and_repeat_nothing(tmp_path: Path) -> None:
    with Service(tmp_path, INITIAL_STOCK="2000") as service:
        answers: list[Answer] = []
        selling = threading.Thread(
            target=lambda: answers.extend(
                send_at_once(
                    service.port, [purchase_request("alice", f"key-{n}") for n in range(1_500)]
                )
            )
        )
        selling.start()
        kills, sold_before = 0, 0
        with closing(sqlite3.connect(tmp_path / "inventory.db")) as reader:
            while selling.is_alive():
                sold = reader.execute("SELECT count(*) FROM purchases").fetchone()[0]
                if sold >= sold_before + 100 and (workers := service.workers()):
                    os.kill(workers[kills % len(workers)], signal.SIGKILL)
                    kills, sold_before = kills + 1, sold
        selling.join()
        assert kills >= 10
        acknowledged = {answer.json["purchase_id"] for answer in answers if answer.status == 200}
        lost = [number for number, answer in enumerate(answers) if answer.status == 0]
        assert {answer.status for answer in answers} <= {200, 0}
        for number in lost:
            acknowledged.add(service.buy("alice", f"key-{number}").json()["purchase_id"])
        assert len(acknowledged) == 1_500
        audit = service.get("/audit")
        assert (audit["purchase_records"], audit["current_stock"], audit["initial_stock"]) == (
            1_500,
            500,
            2_000,
        )
