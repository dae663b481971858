"""Every status of every route, and what stayed unchanged."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from flask import Flask

import db
from app import HINTS
from sqlite.engine import sqlite3

Client = Any  # flask.testing.FlaskClient, whose answers' `json` may be None to a type checker
Rows = Callable[[], tuple[int, list[tuple[Any, ...]]]]
MakeApp = Callable[..., Flask]
SOLD_OUT = {
    "success": False,
    "message": "SOLD OUT - No more inventory available",
    "remaining_stock": 0,
}


def buy(client: Client, customer_id: str = "alice", key: str | None = None) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return client.post("/buy_ticket", json={"customer_id": customer_id}, headers=headers)


def test_the_index_names_the_service_and_its_endpoints(client: Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert set(answer.json) == {
        "service",
        "version",
        "endpoints",
        "concurrency_model",
        "guarantees",
    }
    assert answer.json["endpoints"]["POST /buy_ticket"] == "Purchase a ticket"
    assert {"GET /inventory", "POST /reset", "GET /health", "GET /audit", "GET /metrics"} <= set(
        answer.json["endpoints"]
    )
    assert isinstance(answer.json["guarantees"], list)


def test_a_purchase_is_answered_200_and_stored(client: Client, rows: Rows) -> None:
    answer = buy(client)
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert answer.json == {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": 4,
        "purchase_id": 1,
    }
    assert rows() == (4, [("alice", None, 4)])


def test_sold_out_is_answered_410_and_stores_nothing(make_app: MakeApp, rows: Rows) -> None:
    client = make_app(INITIAL_STOCK=1).test_client()
    buy(client)
    answer = buy(client, "bob")
    assert (answer.status_code, answer.json) == (410, SOLD_OUT)
    assert answer.content_type == "application/json"
    assert rows() == (0, [("alice", None, 0)])


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (db.Busy(5.0), 503, "1"),
        (db.Unavailable("no such folder"), 503, "1"),
        (db.OutcomeUnknown("flush failed"), 500, None),
        (db.BuyerGone(), 503, "1"),
    ],
)
def test_a_store_that_cannot_sell_is_answered_and_logged_with_its_cause(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: db.StoreError,
    status: int,
    retry_after: str | None,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(db.SQLiteStore, "buy", fail)
    answer = buy(client)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)
    assert answer.json == {"success": False, "message": type(error).message}
    assert [record.getMessage() for record in caplog.records] == [
        f"POST /buy_ticket: {type(error).__name__}: {error}"
    ]


def test_busy_is_answered_with_the_words_of_the_contract(client: Client) -> None:
    assert db.Busy.message == "Server busy - please retry"


@pytest.mark.parametrize("message", [db.Unavailable.message, db.OutcomeUnknown.message, HINTS[500]])
def test_who_may_have_bought_before_is_told_to_ask_until_it_is_settled(message: str) -> None:
    """503 speaks of one attempt: an earlier one with the same key may sell after it."""
    assert "send the same request until 200, 410 or 422" in message
    assert "nothing was sold" not in message


def test_a_bug_is_answered_500_in_json_and_logged_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rows: Rows
) -> None:
    monkeypatch.setattr(db, "TAKE_UNIT", "UPDATE inventory SET stock = -1")
    answer = buy(client)
    assert answer.status_code == 500
    assert answer.json["success"] is False
    assert "CHECK" not in answer.text
    assert len(caplog.records) == 1
    assert "CHECK constraint failed" in caplog.text
    assert rows() == (5, [])


def test_a_replay_has_the_same_body_and_a_header(client: Client, rows: Rows) -> None:
    first, second = buy(client, key="key-1"), buy(client, key="key-1")
    assert second.data == first.data
    assert (first.status_code, second.status_code) == (200, 200)
    assert "Idempotent-Replayed" not in first.headers
    assert second.headers["Idempotent-Replayed"] == "true"
    assert rows() == (4, [("alice", "key-1", 4)])


def test_a_replay_works_after_the_sell_out_and_a_new_start(make_app: MakeApp, rows: Rows) -> None:
    client = make_app(INITIAL_STOCK=1).test_client()
    first = buy(client, key="key-1")
    assert buy(client, "bob", key="key-2").status_code == 410
    restarted = make_app(INITIAL_STOCK=1).test_client()
    again = buy(restarted, key="key-1")
    assert (again.status_code, again.data) == (200, first.data)
    assert rows() == (0, [("alice", "key-1", 0)])


def test_a_key_of_another_customer_is_answered_422(client: Client, rows: Rows) -> None:
    buy(client, key="key-1")
    answer = buy(client, "bob", key="key-1")
    assert answer.status_code == 422
    assert "send a new key" in answer.json["message"]
    assert rows() == (4, [("alice", "key-1", 4)])


def test_a_refused_purchase_may_be_tried_again_with_its_key(make_app: MakeApp, rows: Rows) -> None:
    client = make_app(INITIAL_STOCK=0).test_client()
    assert buy(client, key="key-1").status_code == 410
    client.post("/reset", json={"stock": 1})
    answer = buy(client, key="key-1")
    assert (answer.status_code, "Idempotent-Replayed" in answer.headers) == (200, False)
    assert rows() == (0, [("alice", "key-1", 0)])


def test_the_inventory_is_told_in_full(client: Client) -> None:
    buy(client)
    now = client.get("/inventory").json
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", now.pop("last_updated"))
    assert now == {
        "item_id": 1,
        "item_name": "Item A - Concert Ticket",
        "current_stock": 4,
        "initial_stock": 5,
        "total_purchases": 1,
    }


def test_the_audit_counts_and_compares(client: Client) -> None:
    buy(client)
    expected = {"initial_stock": 5, "current_stock": 4, "purchase_records": 1, "consistent": True}
    assert client.get("/audit").json == expected


def test_the_audit_sees_a_purchase_that_is_missing(client: Client, database: Any) -> None:
    buy(client)
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM purchases")
    answer = client.get("/audit").json
    assert (answer["purchase_records"], answer["consistent"]) == (0, False)


def test_health_is_ok_while_a_purchase_could_be_made(client: Client) -> None:
    answer = client.get("/health")
    assert (answer.status_code, answer.json["status"]) == (200, "ok")


@pytest.mark.parametrize("path", ["/health", "/inventory", "/audit"])
def test_without_its_database_the_service_answers_503(
    client: Client, database: Any, path: str
) -> None:
    client.application.extensions["store"].close()
    database.rename(f"{database}.hidden")
    answer = client.get(path)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert answer.json["success"] is False


@pytest.mark.parametrize(
    ("body", "stock"),
    [(None, 5), ({}, 5), ({"stock": 0}, 0), ({"stock": 1_000_000_000}, 1_000_000_000)],
)
def test_a_reset_refills_the_stock(client: Client, rows: Rows, body: Any, stock: int) -> None:
    buy(client, key="key-1")
    answer = client.post("/reset", json=body) if body is not None else client.post("/reset")
    assert answer.status_code == 200
    assert (answer.json["success"], answer.json["current_stock"]) == (True, stock)
    assert "message" in answer.json
    assert rows() == (stock, [])


@pytest.mark.parametrize("stock", [-1, 1_000_000_001, 1.5, -3.0, 1e300, True, None, "7", [], {}])
def test_a_reset_to_no_possible_stock_changes_nothing(
    client: Client, rows: Rows, stock: Any
) -> None:
    buy(client)
    answer = client.post("/reset", json={"stock": stock})
    assert answer.status_code == 400
    assert "0 to 1000000000" in answer.json["message"]
    assert rows() == (4, [("alice", None, 4)])


def test_a_stock_written_with_a_fraction_of_zero_is_a_whole_number(
    client: Client, rows: Rows
) -> None:
    """JSON Schema, and the generators that go by it, take 1128948.0 for an integer."""
    body = {"data": b'{"stock": 1128948.0}', "content_type": "application/json"}
    answer = client.post("/reset", **body)
    assert (answer.status_code, answer.json["current_stock"]) == (200, 1128948)
    assert b"1128948.0" not in answer.data
    assert rows() == (1128948, [])
    assert client.post("/reset", **body | {"data": b'{"stock": 1e999}'}).status_code == 400


@pytest.mark.parametrize("config", [{"ALLOW_RESET": 0}, {"ALLOW_RESET": "0"}, {"ALLOW_RESET": ""}])
def test_a_reset_is_forbidden_unless_switched_on(
    make_app: MakeApp, rows: Rows, config: Any
) -> None:
    client: Client = make_app(**config).test_client()
    buy(client)
    answer = client.post("/reset", json={"stock": 9})
    assert answer.status_code == 403
    assert "ALLOW_RESET=1" in answer.json["message"]
    assert rows() == (4, [("alice", None, 4)])


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/buy_ticket", {"POST"}),
        ("PUT", "/buy_ticket", {"POST"}),
        ("DELETE", "/buy_ticket", {"POST"}),
        ("OPTIONS", "/buy_ticket", {"POST"}),
        ("GET", "/reset", {"POST"}),
        ("POST", "/", {"GET", "HEAD"}),
        ("POST", "/inventory", {"GET", "HEAD"}),
        ("TRACE", "/audit", {"GET", "HEAD"}),
        ("BREW", "/buy_ticket", {"POST"}),
    ],
)
def test_a_wrong_method_is_answered_405_with_allow(
    client: Client, rows: Rows, method: str, path: str, allowed: set[str]
) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert answer.json["success"] is False
    assert rows() == (5, [])


@pytest.mark.parametrize("path", ["/buy", "/buy_ticket/", "/static/app.py", "/%ff", "/../db.py"])
def test_an_unknown_path_is_answered_404(client: Client, rows: Rows, path: str) -> None:
    answer = client.post(path, json={"customer_id": "alice"})
    assert answer.status_code == 404
    assert answer.json["success"] is False
    assert "GET /" in answer.json["message"]
    assert rows() == (5, [])


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", path) for path in ("/inventory//", "/docs//swagger-ui.css", "/docs//", "//inventory")]
    + [("POST", path) for path in ("//buy_ticket", "///reset", "/buy_ticket//")],
)
def test_a_path_with_empty_segments_leads_nowhere(
    client: Client, rows: Rows, method: str, path: str
) -> None:
    """A proxy that keeps `/reset` inside may not see it in `//reset`."""
    answer = client.open("/", method=method, environ_overrides={"PATH_INFO": path})
    assert (answer.status_code, answer.content_type) == (404, "application/json")
    assert rows() == (5, [])


OWN = "http://shop.test:8080"
OF_ANOTHER_SITE = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another port, or another name of the same domain
    {"Sec-Fetch-Site": ""},
    {"Sec-Fetch-Site": "same-origin, cross-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": OWN},
    {"Origin": "http://evil.test"},
    {"Origin": "http://shop.test"},
    {"Origin": "http://shop.test:8081"},
    {"Origin": "http://evil.test/shop.test:8080"},
    {"Origin": "null"},  # a sandboxed page, a file
    {"Origin": ""},
]
OF_THIS_SITE = [
    {},  # curl, a shop's own server
    {"Sec-Fetch-Site": "same-origin", "Origin": OWN},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "https://where.tls.ends.test"},
    {"Origin": OWN},
    {"Origin": OWN.replace("http", "https")},
]


@pytest.mark.parametrize("path", ["/buy_ticket", "/reset"])
@pytest.mark.parametrize("headers", OF_ANOTHER_SITE)
def test_a_page_of_another_site_neither_buys_nor_resets(
    client: Client, rows: Rows, path: str, headers: dict[str, str]
) -> None:
    buy(client)
    answer = client.post(path, base_url=OWN, headers=headers)
    assert (answer.status_code, answer.json["success"]) == (403, False)
    assert "another site" in answer.json["message"]
    assert rows() == (4, [("alice", None, 4)])


@pytest.mark.parametrize("headers", OF_THIS_SITE)
def test_its_own_pages_and_what_is_no_browser_buy_and_reset(
    client: Client, rows: Rows, headers: dict[str, str]
) -> None:
    assert client.post("/buy_ticket", base_url=OWN, headers=headers).status_code == 200
    assert rows() == (4, [("guest", None, 4)])
    assert client.post("/reset", base_url=OWN, headers=headers).status_code == 200
    assert rows() == (5, [])


def test_a_page_of_another_site_may_read(client: Client) -> None:
    """The browser doesn't let it see the answer: no header allows that."""
    answer = client.get("/inventory", headers={"Sec-Fetch-Site": "cross-site"})
    assert (answer.status_code, "Access-Control-Allow-Origin" in answer.headers) == (200, False)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:8000"])
@pytest.mark.parametrize(("bound", "status"), [("127.0.0.1", 200), ("0.0.0.0", 403)])
def test_a_reset_that_allowed_itself_needs_a_loopback_host(
    make_app: MakeApp, host: str, bound: str, status: int
) -> None:
    client: Client = make_app(ALLOW_RESET="loopback").test_client()
    environ = {"SERVER_NAME": bound, "HTTP_HOST": host}
    assert client.post("/reset", environ_overrides=environ).status_code == status
    environ["HTTP_HOST"] = "pointed-here.test"
    answer = client.post("/reset", environ_overrides=environ)
    assert (answer.status_code, answer.json["success"]) == (403, False)


@pytest.mark.parametrize(
    "sign",
    [
        {"HTTP_X_FORWARDED_FOR": "203.0.113.7"},
        {"HTTP_VIA": "1.1 proxy"},
        {"HTTP_FORWARDED": "for=203.0.113.7"},
        {"HTTP_X_REAL_IP": "203.0.113.7"},
        {"SERVER_PROTOCOL": "HTTP/1.0"},  # nginx, which names the service's own host
        {"REMOTE_ADDR": "203.0.113.7"},
        {"REMOTE_ADDR": ""},  # over a Unix socket
    ],
)
def test_a_reset_that_allowed_itself_needs_a_caller_without_a_proxy(
    make_app: MakeApp, sign: dict[str, str]
) -> None:
    client: Client = make_app(ALLOW_RESET="loopback").test_client()
    assert client.post("/reset").status_code == 200
    client.post("/buy_ticket")
    answer = client.post("/reset", environ_overrides=sign)
    assert answer.status_code == 403
    assert client.get("/inventory").json["total_purchases"] == 1


def test_an_offer_to_change_the_protocol_is_overlooked(client: Client) -> None:
    offer = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert client.get("/inventory", headers=offer).status_code == 200


def test_head_is_answered_like_get(client: Client) -> None:
    answer = client.head("/inventory")
    assert (answer.status_code, answer.data) == (200, b"")


@pytest.mark.parametrize("path", ["/", "/inventory", "/health", "/audit", "/metrics", "/nowhere"])
def test_no_answer_may_be_stored_or_sniffed(client: Client, path: str) -> None:
    headers = client.get(path).headers
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    purchase = buy(client).headers
    assert (purchase["Cache-Control"], purchase["X-Content-Type-Options"]) == (
        "no-store",
        "nosniff",
    )


def test_a_proxy_may_keep_for_a_second_only_what_everybody_may_be_told(client: Client) -> None:
    kept = [client.get("/inventory"), client.get("/inventory?1")]
    passed_on = [client.get(path) for path in ("/", "/health", "/audit", "/metrics", "/nowhere")]
    passed_on += [buy(client), buy(client, key="k"), client.post("/inventory")]
    client.post("/reset", json={"stock": 0})
    kept.append(buy(client))
    passed_on.append(buy(client, key="k"))
    assert (kept[-1].status_code, passed_on[-1].status_code) == (410, 410)
    assert not [answer for answer in passed_on if "X-Accel-Expires" in answer.headers]
    for answer in kept:
        assert answer.headers["X-Accel-Expires"] == "1"  # second
        names = [name for name, _ in answer.headers]  # nginx before 1.23 reads them in this order
        assert names.index("X-Accel-Expires") < names.index("Cache-Control")


def test_a_reading_that_failed_is_not_kept(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: object) -> None:
        raise db.Unavailable("gone")

    monkeypatch.setattr(db.SQLiteStore, "inventory", fail)
    answer = client.get("/inventory")
    assert (answer.status_code, "X-Accel-Expires" in answer.headers) == (503, False)


def test_answers_are_json_objects_in_one_line(client: Client) -> None:
    for answer in (client.get("/"), buy(client), client.get("/nowhere"), client.get("/buy_ticket")):
        assert isinstance(json.loads(answer.data), dict)
        assert answer.content_type == "application/json"


def test_the_command_line_creates_and_audits(make_app: MakeApp, database: Any) -> None:
    app = make_app()
    runner = app.test_cli_runner()
    created = runner.invoke(args=["init-db"])
    assert (created.exit_code, created.output) == (
        0,
        "Item A - Concert Ticket: 5 of 5 units left\n",
    )
    buy(app.test_client())
    audited = runner.invoke(args=["audit"])
    assert audited.exit_code == 0
    assert json.loads(audited.stdout)["purchase_records"] == 1
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("DELETE FROM purchases")
    assert runner.invoke(args=["audit"]).exit_code == 1
