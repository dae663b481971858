"""SALE_STARTS_AT: nothing is sold before, and everybody is sold to from that moment on."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import requests
from flask import Flask
from service import Service

MakeApp = Callable[..., Flask]
Rows = Callable[[], tuple[int, list[tuple[Any, ...]]]]
OPENS_AT = datetime(2999, 12, 1, 20, tzinfo=UTC)
ACCURACY_S = 0.1
OPENS_IN_S = 2.0


def at(moment: datetime) -> str:
    return moment.isoformat()


def test_before_the_opening_nothing_is_sold(make_app: MakeApp, rows: Rows) -> None:
    client: Any = make_app(SALE_STARTS_AT=at(OPENS_AT)).test_client()
    left_s = OPENS_AT.timestamp() - time.time()
    for headers in ({}, {"Idempotency-Key": "new"}):
        answer = client.post("/buy_ticket", headers=headers)
        assert (answer.status_code, answer.content_type) == (403, "application/json")
        assert abs(int(answer.headers["Retry-After"]) - left_s) < 5
        assert at(OPENS_AT) in answer.json["message"]
    assert rows() == (5, [])
    now = client.get("/inventory").json
    assert (now["opens_at"], now["open"], now["current_stock"]) == (at(OPENS_AT), False, 5)
    assert client.get("/health").json == {"status": "ok"}


def test_before_the_opening_a_stored_key_is_replayed(make_app: MakeApp, rows: Rows) -> None:
    body = {"json": {"customer_id": "alice"}, "headers": {"Idempotency-Key": "key-1"}}
    first = make_app().test_client().post("/buy_ticket", **body)
    client = make_app(SALE_STARTS_AT=at(OPENS_AT)).test_client()
    again = client.post("/buy_ticket", **body)
    assert (again.status_code, again.data) == (200, first.data)
    assert again.headers["Idempotent-Replayed"] == "true"
    body["json"] = {"customer_id": "bob"}
    assert client.post("/buy_ticket", **body).status_code == 422
    assert rows() == (4, [("alice", "key-1", 4)])


def test_before_the_opening_bad_input_is_told_so(make_app: MakeApp, rows: Rows) -> None:
    client = make_app(SALE_STARTS_AT=at(OPENS_AT)).test_client()
    assert client.post("/buy_ticket", json={"customer_id": 7}).status_code == 400
    assert client.post("/buy_ticket", headers={"Idempotency-Key": "null"}).status_code == 400
    assert rows() == (5, [])


def test_after_the_opening_it_is_told_that_it_was(make_app: MakeApp, rows: Rows) -> None:
    opened = datetime(2020, 1, 1, tzinfo=UTC)
    client: Any = make_app(SALE_STARTS_AT=at(opened)).test_client()
    assert client.post("/buy_ticket").status_code == 200
    now = client.get("/inventory").json
    assert (now["opens_at"], now["open"], now["current_stock"]) == (at(opened), True, 4)


def test_without_an_opening_nothing_is_told_of_one(client: Any) -> None:
    assert not {"opens_at", "open"} & client.get("/inventory").json.keys()


def test_all_workers_open_at_the_same_moment(tmp_path: Path) -> None:
    opens_at = datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)
    opens_s = opens_at.timestamp()
    with Service(tmp_path, SALE_STARTS_AT=at(opens_at), INITIAL_STOCK="100000") as service:
        asked: list[tuple[float, float, int]] = []
        while not asked or asked[-1][1] < opens_s + 0.5:
            sent = time.time()
            status = requests.post(f"{service.url}/buy_ticket", timeout=9).status_code
            asked.append((sent, time.time(), status))
        sold = service.get("/audit")["purchase_records"]
    early = {status for _, ended, status in asked if ended < opens_s - ACCURACY_S}
    late = {status for sent, _, status in asked if sent > opens_s + ACCURACY_S}
    assert (early, late) == ({403}, {200})
    assert sold == [status for _, _, status in asked].count(200)
