"""Every bad request gets a 4xx that says what to send, and nothing is stored."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

Client = Any  # flask.testing.FlaskClient, whose answers' `json` may be None to a type checker
Rows = Callable[[], tuple[int, list[tuple[Any, ...]]]]
JSON = "application/json"


@pytest.mark.parametrize(
    ("data", "content_type"),
    [
        (None, None),
        (b"", None),
        (b"", JSON),
        (b"", "text/plain"),
        (b"{}", JSON),
        (b' {"customer_id": "guest"} \n', "application/json; charset=utf-8"),
        (b"{ }", "Application/JSON"),
    ],
)
def test_without_a_customer_the_guest_buys(
    client: Client, rows: Rows, data: bytes | None, content_type: str | None
) -> None:
    answer = client.post("/buy_ticket", data=data, content_type=content_type)
    assert answer.status_code == 200
    assert rows() == (4, [("guest", None, 4)])


@pytest.mark.parametrize(
    "customer_id",
    ["x", "x" * 128, "customer_12345", " ", "Zoë", "東京", "🎫" * 128, "\u2028", "{}", "null"],
)
def test_a_customer_id_of_1_to_128_characters_buys(
    client: Client, rows: Rows, customer_id: str
) -> None:
    assert client.post("/buy_ticket", json={"customer_id": customer_id}).status_code == 200
    body = json.dumps({"customer_id": customer_id}, ensure_ascii=False).encode()
    assert client.post("/buy_ticket", data=body, content_type=JSON).status_code == 200
    assert rows() == (3, [(customer_id, None, 4), (customer_id, None, 3)])


def test_brackets_within_a_string_do_not_nest(client: Client, rows: Rows) -> None:
    assert client.post("/buy_ticket", json={"customer_id": '"[{' * 42}).status_code == 200
    assert rows() == (4, [('"[{' * 42, None, 4)])


@pytest.mark.parametrize(
    "member",
    [
        *('"customer": "bob"', '"quantity": 2', '"idempotency_key": "k"', '"idempotencyKey": "k"'),
        *('"Customer_id": "bob"', '"": null', '"\\ud800": 1', f'"{"x" * 9_000}": 1'),
        *(f'"deep": {"[" * 99 + "]" * 99}', f'"long": "{"[" * 9_000}"', '"a": ["\\"[{", "]"]'),
    ],
)
@pytest.mark.parametrize(
    "known", ["", '"customer_id": "a", ', '"customer_id": null, '], ids=["alone", "second", "bad"]
)
def test_an_unknown_member_is_named_and_nothing_is_sold(
    client: Client, rows: Rows, known: str, member: str
) -> None:
    answer = client.post("/buy_ticket", data=f"{{{known}{member}}}", content_type=JSON)
    assert (answer.status_code, answer.json["success"]) == (400, False)
    name = ascii(json.loads(f"{{{member}}}").popitem()[0][:40])
    assert f"The member {name} means nothing here" in answer.json["message"]
    sendable = '{"customer_id": "c1"} and the header Idempotency-Key.'
    assert answer.json["message"].endswith(sendable)
    assert rows() == (5, [])


def test_an_unknown_member_of_a_reset_is_named_and_changes_nothing(
    client: Client, rows: Rows
) -> None:
    client.post("/buy_ticket")
    answer = client.post("/reset", json={"stock": 7, "customer_id": "alice"})
    assert (answer.status_code, answer.json["success"]) == (400, False)
    expected = "The member 'customer_id' means nothing here - send only {\"stock\": 100}."
    assert answer.json["message"] == expected
    assert rows() == (4, [("guest", None, 4)])


@pytest.mark.parametrize("path", ["/buy_ticket", "/reset"])
@pytest.mark.parametrize(
    ("query", "headers", "sendable"),
    [
        ("?customer_id=bob", {}, "send a JSON body"),
        ("?stock=7&", {"Idempotency-Key": "k"}, "send a JSON body"),
        ("", {"X-Idempotency-Key": "k"}, "send the header Idempotency-Key"),
        ("", {"x-idempotency-key": "", "Idempotency-Key": "k"}, "send the header Idempotency-Key"),
    ],
)
def test_what_would_be_overlooked_is_answered_400(
    client: Client, rows: Rows, path: str, query: str, headers: dict[str, str], sendable: str
) -> None:
    client.post("/buy_ticket")
    answer = client.post(path + query, headers=headers)
    assert (answer.status_code, answer.json["success"]) == (400, False)
    assert sendable in answer.json["message"]
    assert rows() == (4, [("guest", None, 4)])


def test_a_query_on_a_reading_is_read_over(client: Client) -> None:
    assert client.get("/inventory?_=1700000000").json["current_stock"] == 5
    assert client.post("/buy_ticket?").status_code == 200


def test_no_body_keeps_a_worker_busy(client: Client, rows: Rows) -> None:
    """A string that never ends: looked for from each of its quotes, it took a second."""
    started = time.process_time()
    answer = client.post("/buy_ticket", data="[" * 101 + '\\"' * 8_000, content_type=JSON)
    assert answer.status_code == 400
    assert time.process_time() - started < 0.2
    assert rows() == (5, [])


def test_of_duplicate_members_the_last_one_counts(client: Client, rows: Rows) -> None:
    body = b'{"customer_id": 7, "customer_id": "first", "customer_id": "last"}'
    assert client.post("/buy_ticket", data=body, content_type=JSON).status_code == 200
    assert rows() == (4, [("last", None, 4)])


@pytest.mark.parametrize(
    "customer_id",
    [
        *(7, 7.5, True, False, None, [], ["alice"], {}, {"id": "alice"}),
        *("", "x" * 129, "a\x00b", "\n", "tab\t", "\x7f", "\x85", "\x1b[31m"),
    ],
)
def test_a_customer_id_that_is_none_is_answered_400(
    client: Client, rows: Rows, customer_id: Any
) -> None:
    answer = client.post("/buy_ticket", json={"customer_id": customer_id})
    assert (answer.status_code, answer.json["success"]) == (400, False)
    assert "string of 1 to 128 characters" in answer.json["message"]
    assert rows() == (5, [])


@pytest.mark.parametrize(
    "body",
    [
        b'{"customer_id": "\\ud800"}',
        b'{"customer_id": "\\udfff\\ud800"}',
        b'{"customer_id": NaN}',
        b'{"customer_id": "alice", "customer_id": NaN}',
        b'{"customer_id": "alice", "price": -Infinity}',
        b"[" * 10_000,
        b"[" * 8_000 + b"]" * 8_000,
        b'{"a":' * 2_500 + b"1" + b"}" * 2_500,
        b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"customer_id": ' + b"1" * 5_000 + b"}",
        b'{"customer_id": "\xff\xfe"}',
        b'{"customer_id": "\xed\xa0\x80"}',
        '{"customer_id": "alice"}'.encode("utf-16"),
        '{"customer_id": "alice"}'.encode("utf-16-le"),
        '{"customer_id": "alice"}'.encode("utf-32"),
        b'\xef\xbb\xbf{"customer_id": "alice"}',
        b'{"customer_id": "a',
        b"{'customer_id': 'alice'}",
        b'{"customer_id": "alice"} trailing',
        b'{"customer_id": "alice",}',
        b'{"customer_id": "a\nb"}',
        b" ",
        b"\x00",
        b"null",
        b"true",
        b"7",
        b'"alice"',
        b"[]",
        b'[{"customer_id": "alice"}]',
        b"customer_id=alice",
    ],
)
def test_a_body_that_is_no_json_object_is_answered_400(
    client: Client, rows: Rows, body: bytes
) -> None:
    answer = client.post("/buy_ticket", data=body, content_type=JSON)
    assert (answer.status_code, answer.content_type) == (400, JSON)
    assert answer.json["success"] is False
    assert "send" in answer.json["message"] or "string of" in answer.json["message"]
    assert rows() == (5, [])


@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b"\xff", b'{"stock": NaN}', b"[" * 8_000])
def test_a_reset_with_such_a_body_changes_nothing(client: Client, rows: Rows, body: bytes) -> None:
    client.post("/buy_ticket")
    answer = client.post("/reset", data=body, content_type=JSON)
    assert (answer.status_code, answer.json["success"]) == (400, False)
    assert rows() == (4, [("guest", None, 4)])


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "application/jsonx",
        "application/json2; application/json",
        "application/vnd.api+json",
        ";;",
        "é",
    ],
)
def test_a_body_of_another_type_is_answered_415(
    client: Client, rows: Rows, content_type: str | None
) -> None:
    answer = client.post("/buy_ticket", data=b'{"customer_id": "alice"}', content_type=content_type)
    assert (answer.status_code, answer.json["success"]) == (415, False)
    assert "Content-Type: application/json" in answer.json["message"]
    assert rows() == (5, [])


@pytest.mark.parametrize("size", [16 * 1024 + 1, 1_000_000])
@pytest.mark.parametrize("path", ["/buy_ticket", "/reset"])
def test_a_body_that_is_too_large_is_answered_413(
    client: Client, rows: Rows, path: str, size: int
) -> None:
    body = b'{"customer_id": "alice"}'.ljust(size)
    answer = client.post(path, data=body, content_type=JSON)
    assert (answer.status_code, answer.json["success"]) == (413, False)
    assert "16384 bytes" in answer.json["message"]
    assert rows() == (5, [])


def test_a_body_of_exactly_16_kib_buys(client: Client, rows: Rows) -> None:
    body = b'{"customer_id": "alice"}'.ljust(16 * 1024)
    assert client.post("/buy_ticket", data=body, content_type=JSON).status_code == 200
    assert rows()[0] == 4


def test_a_chunked_body_is_answered_411(client: Client, rows: Rows) -> None:
    answer = client.post(
        "/buy_ticket",
        input_stream=None,
        content_type=JSON,
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert (answer.status_code, answer.json["success"]) == (411, False)
    assert "Content-Length" in answer.json["message"]
    assert rows() == (5, [])


@pytest.mark.parametrize(
    "key",
    [
        "a",
        "k" * 255,
        "!~",
        "8e03978e-40d5-43e8-bc93-6894a57f9324",
        'a"b',
        "'a'",
        "a\\b",
        "nullable",
    ],
)
def test_a_key_of_1_to_255_visible_characters_is_accepted(
    client: Client, rows: Rows, key: str
) -> None:
    assert client.post("/buy_ticket", headers={"Idempotency-Key": key}).status_code == 200
    assert rows() == (4, [("guest", key, 4)])


@pytest.mark.parametrize(
    ("quoted", "plain"),
    [
        *(('"k5"', "k5"), ('"' + "k" * 255 + '"', "k" * 255), (r'"a\"b\\c"', r'a"b\c')),
        ('"' + r"\\" * 255 + '"', "\\" * 255),
    ],
)
def test_a_key_in_quotes_is_the_same_key(
    client: Client, rows: Rows, quoted: str, plain: str
) -> None:
    """The IETF draft has it as a structured string; RFC 8941, 3.3.3."""
    first = client.post("/buy_ticket", headers={"Idempotency-Key": quoted})
    again = client.post("/buy_ticket", headers={"Idempotency-Key": plain})
    assert (first.status_code, again.data) == (200, first.data)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert rows() == (4, [("guest", plain, 4)])


@pytest.mark.parametrize(
    "key",
    [
        *("", " ", "k" * 256, "two words", "tab\there", "\x7f", "schlüssel", "\x01"),
        *("undefined", "null", '"undefined"', '"null"', r'"nul\l"'),
        *('""', '"', '"k5', '"k"5"', '"two words"', '"k5";a=1', '"k5", "k6"', r'"\"', r'"\k"'),
        *('"' + "k" * 256 + '"', '"schlüssel"'),
    ],
)
def test_any_other_key_is_answered_400(client: Client, rows: Rows, key: str) -> None:
    answer = client.post("/buy_ticket", headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json["success"]) == (400, False)
    assert "1 to 255 visible ASCII characters" in answer.json["message"]
    assert "send a new UUID" in answer.json["message"]
    assert rows() == (5, [])


def test_bad_input_is_told_so_after_the_sell_out_too(client: Client, rows: Rows) -> None:
    client.post("/reset", json={"stock": 0})
    assert client.post("/buy_ticket", data=b"{", content_type=JSON).status_code == 400
    assert rows() == (0, [])


@pytest.mark.parametrize("length", ["abc", "1.5", "0x2", "-1", "9" * 5_000])
def test_a_content_length_that_is_no_number_is_refused(
    client: Client, rows: Rows, length: str
) -> None:
    answer = client.post("/buy_ticket", environ_overrides={"CONTENT_LENGTH": length})
    assert answer.status_code == 400
    assert answer.json["message"] == "Content-Length has to be a whole number of bytes."
    assert rows() == (5, [])
