"""Whatever comes, in any order, the service does as a model of ten lines or refuses in JSON."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from service import Service
from test_raw_sockets import BUY, exchange, message, parse

import db
from app import create_app
from serving.headers import NO_KEYS

Rows = Callable[[], tuple[int, list[tuple[Any, ...]]]]
# derandomize: the same cases in every run; a new idea about them is a new strategy, not luck
BOUNDED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
STOCK = 1_000_000
KEYS = st.sampled_from(["key-1", "key-2", "key-3"]) | st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255
).filter(lambda key: not key.startswith('"') and key not in NO_KEYS)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
# The borders of what a customer_id may be: control characters, lone surrogates, the length.
ODD_TEXT = st.text(
    st.sampled_from("a\x1f\x7f\x9f\xa0\ud800\udfff\U0001f3ab"), max_size=3
) | st.sampled_from(["a" * 128, "a" * 129])
REQUEST_BODIES = JSON_VALUES | st.fixed_dictionaries(
    {}, optional={"customer_id": ODD_TEXT | JSON_VALUES, "stock": st.booleans() | JSON_VALUES}
)
# What a header line may hold on its way to the parser: all but the bytes that end it.
LINE_BYTES = st.binary(max_size=300).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))
TOKENS = st.from_regex(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,40}", fullmatch=True)


class Model:
    """What the service is: a stock, and who bought with which key."""

    def __init__(self, stock: int) -> None:
        self.initial, self.sales, self.keys = stock, 0, dict[str, tuple[str, Any]]()

    def buy(self, customer_id: str, key: str | None) -> int:
        """The status that the purchase gets."""
        if key in self.keys:
            return 200 if self.keys[key][0] == customer_id else 422
        if self.sales == self.initial:
            return 410
        self.sales += 1
        return 200


class Sale(RuleBasedStateMachine):
    """Buy, replay, reset, look and audit in any order, over HTTP, against Model."""

    keys: Bundle[str] = Bundle("keys")

    @initialize(stock=st.integers(0, 4))
    def open(self, stock: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.config = {
            "DATABASE_URL": f"sqlite:///{self.folder}/x.db",
            "INITIAL_STOCK": stock,
            "ALLOW_RESET": 1,
        }
        self.app = create_app(**self.config)
        self.client = self.app.test_client()
        self.model, self.last_id = Model(stock), 0

    def teardown(self) -> None:
        self.app.extensions["store"].close()
        shutil.rmtree(self.folder)

    def post(self, customer_id: str, key: str | None) -> Any:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.client.post("/buy_ticket", json={"customer_id": customer_id}, headers=headers)

    def get(self, path: str) -> Any:
        return self.client.get(path).json

    def sell(self, customer_id: str, key: str | None) -> None:
        """Buy here and in the model: the same status, the next number, one unit less."""
        expected, answer = self.model.buy(customer_id, key), self.post(customer_id, key)
        assert answer.status_code == expected
        if expected != 200:
            assert answer.json["success"] is False
            return
        assert answer.json["remaining_stock"] == self.model.initial - self.model.sales
        assert answer.json["purchase_id"] > self.last_id
        self.last_id = answer.json["purchase_id"]
        if key is not None:
            self.model.keys[key] = customer_id, answer.json

    @rule(customer_id=st.sampled_from("ab"))
    def buy(self, customer_id: str) -> None:
        self.sell(customer_id, None)

    @rule(target=keys, customer_id=st.sampled_from("ab"), key=KEYS)
    def buy_with_a_key(self, customer_id: str, key: str) -> str:
        if key not in self.model.keys:
            self.sell(customer_id, key)
        return key

    @rule(key=keys, customer_id=st.sampled_from("ab"))
    def repeat(self, key: str, customer_id: str) -> None:
        if key not in self.model.keys:  # sold out or reset since
            self.sell(customer_id, key)
            return
        owner, first = self.model.keys[key]
        answer = self.post(customer_id, key)
        assert answer.status_code == (200 if owner == customer_id else 422)
        if owner == customer_id:
            assert (answer.json, answer.headers["Idempotent-Replayed"]) == (first, "true")

    @rule(stock=st.integers(0, 4))
    def reset(self, stock: int) -> None:
        assert self.client.post("/reset", json={"stock": stock}).status_code == 200
        self.model = Model(stock)

    @rule(
        key=consumes(keys),
        body=st.sampled_from([b"{", b"[]", b'{"customer_id": 7}', b'{"customer_id": ""}']),
    )
    def send_nonsense(self, key: str, body: bytes) -> None:
        answer = self.client.post(
            "/buy_ticket",
            data=body,
            content_type="application/json",
            headers={"Idempotency-Key": key},
        )
        assert answer.status_code == 400

    @rule()
    def restart(self) -> None:
        self.app.extensions["store"].close()
        self.app = create_app(**self.config)
        self.client = self.app.test_client()

    @invariant()
    def inventory_audit_and_metrics_agree_with_the_model(self) -> None:
        stock, sales = self.model.initial - self.model.sales, self.model.sales
        inventory, audit = self.get("/inventory"), self.get("/audit")
        assert (inventory["current_stock"], inventory["total_purchases"]) == (stock, sales)
        assert (audit["current_stock"], audit["purchase_records"], audit["consistent"]) == (
            stock,
            sales,
            True,
        )
        assert f"\nflash_sale_sold {sales}.0\n" in self.client.get("/metrics").text


Sale.TestCase.settings = settings(BOUNDED, max_examples=60, stateful_step_count=25)


class TestAnyOrderOfRequestsEndsAsTheModelSays(Sale.TestCase):  # type: ignore[misc, valid-type]
    pass


def assert_refused_without_a_trace(answer: Any, before: Any, after: Any) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.content_type == "application/json"
    assert (answer.json["success"], bool(answer.json["message"])) == (False, True)
    assert after == before


def assert_sold_or_refused(client: FlaskClient, rows: Rows, **request: Any) -> Any:
    """Sold and stored, once; or a 4xx in JSON, and nothing has changed."""
    before = rows()
    answer: Any = client.post("/buy_ticket", **request)
    after = rows()
    note(f"{answer.status_code} {answer.text}")
    if answer.status_code != 200:
        assert_refused_without_a_trace(answer, before, after)
    elif "Idempotent-Replayed" in answer.headers:
        assert after == before
    else:
        assert after[0] == before[0] - 1 == answer.json["remaining_stock"]
        assert after[1][:-1] == before[1]
    return answer


@pytest.fixture
def seller(make_app: Any) -> Any:
    return make_app(INITIAL_STOCK=STOCK).test_client()


@settings(BOUNDED, max_examples=150)
@given(
    body=st.binary(max_size=200),
    content_type=st.sampled_from(["application/json", "text/plain", "", None]),
)
def test_any_bytes_as_a_body_are_sold_to_or_refused(
    seller: FlaskClient, rows: Rows, body: bytes, content_type: str | None
) -> None:
    answer = assert_sold_or_refused(seller, rows, data=body, content_type=content_type)
    seller.post("/reset")
    if body and content_type != "application/json":
        assert answer.status_code == 415


@settings(BOUNDED, max_examples=200)
@given(value=REQUEST_BODIES)
def test_any_json_as_a_body_is_sold_to_or_refused(
    seller: FlaskClient, rows: Rows, value: Any
) -> None:
    body = json.dumps(value)
    answer = assert_sold_or_refused(seller, rows, data=body, content_type="application/json")
    stored = [customer_id for customer_id, _, _ in rows()[1]]
    seller.post("/reset")
    if answer.status_code == 200:
        sent = json.loads(body)  # parsed again: two escaped surrogates are one character
        assert stored == [sent.get("customer_id", "guest")]
        assert sent.keys() <= {"customer_id"}


@settings(BOUNDED, max_examples=150)
@given(value=REQUEST_BODIES)
def test_any_json_as_a_reset_is_done_or_refused(
    seller: FlaskClient, rows: Rows, value: Any
) -> None:
    seller.post("/reset", json={"stock": 7})
    seller.post("/buy_ticket")
    before = rows()
    answer = seller.post("/reset", data=json.dumps(value), content_type="application/json")
    if answer.status_code != 200:
        assert_refused_without_a_trace(answer, before, rows())
        return
    stock = value.get("stock", STOCK)
    assert type(stock) is int or (type(stock) is float and stock == int(stock))
    assert rows() == (stock, [])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    with Service(folder, WEB_CONCURRENCY="1", INITIAL_STOCK=str(STOCK)) as running:
        yield running


def assert_raw_is_sold_or_refused(service: Service, raw: bytes) -> int:
    """It is sold and stored once; or it gets a 4xx in JSON, or no answer, and nothing has changed.

    Returns the status, or 0 without an answer.
    """
    before = service.get("/audit")["purchase_records"]
    received = exchange(service.port, raw, half_close=True).removeprefix(
        b"HTTP/1.1 100 Continue\r\n\r\n"
    )
    sold = service.get("/audit")["purchase_records"] - before
    note(f"{received!r}")
    if not received:
        assert sold == 0
        return 0
    answer = parse(received)
    if answer.status == 200:
        assert answer.json["success"] is True
        assert sold == ("idempotent-replayed" not in answer.headers)
    else:
        hung_up = answer.status == 503 and answer.json["message"] == db.BuyerGone.message
        assert 400 <= answer.status < 500 or hung_up  # half-closed, and without a key
        assert (answer.json["success"], bool(answer.json["message"]), sold) == (False, True, 0)
    return answer.status


def keyed(*lines: bytes) -> bytes:
    """A purchase with a key of its own: it is sold to a half-closed connection too."""
    return message(BUY, f"Idempotency-Key: fuzz-{next(NUMBERS)}".encode(), *lines)


NUMBERS = itertools.count()


def unquoted(key: bytes) -> bytes | None:
    """The content of a string of RFC 8941, byte by byte; None if it is none."""
    content, rest = bytearray(), bytearray(key[1:])
    while rest:
        byte = rest.pop(0)
        if byte == ord('"'):
            return None if rest else bytes(content)
        if byte == ord("\\") and (not rest or (byte := rest.pop(0)) not in b'"\\'):
            return None
        content.append(byte)
    return None


QUOTED = st.text('ab" \\é', max_size=6).map(lambda text: f'"{text}"'.encode())


@settings(BOUNDED, max_examples=250)
@given(key=LINE_BYTES | QUOTED)
def test_any_bytes_as_an_idempotency_key_are_a_key_or_refused(service: Service, key: bytes) -> None:
    status = assert_raw_is_sold_or_refused(service, message(BUY, b"Idempotency-Key: " + key))
    stripped = key.strip(b" \t")
    meant = unquoted(stripped) if stripped.startswith(b'"') else stripped
    fits = meant and len(meant) <= 255 and all(0x21 <= byte <= 0x7E for byte in meant)
    assert status == (200 if fits else 400)


@settings(BOUNDED, max_examples=250)
@given(content_type=LINE_BYTES)
def test_any_bytes_as_a_content_type_are_refused(service: Service, content_type: bytes) -> None:
    raw = message(BUY).replace(b"application/json", content_type)
    assert assert_raw_is_sold_or_refused(service, raw) in (400, 415)


@settings(BOUNDED, max_examples=250)
@given(name=TOKENS, value=LINE_BYTES)
def test_a_header_of_any_name_changes_nothing(service: Service, name: bytes, value: bytes) -> None:
    status = assert_raw_is_sold_or_refused(service, keyed(name + b": " + value))
    assert status == (
        400 if any((byte < 32 and byte != 9) or byte == 127 for byte in value) else 200
    )


@settings(BOUNDED, max_examples=250)
@given(line=st.binary(max_size=300))
def test_any_bytes_among_the_headers_are_sold_to_or_refused(service: Service, line: bytes) -> None:
    assert_raw_is_sold_or_refused(service, keyed(line))


@settings(BOUNDED, max_examples=250)
@given(raw=st.binary(max_size=400))
def test_any_bytes_at_all_are_refused_or_hung_up_on(service: Service, raw: bytes) -> None:
    assert assert_raw_is_sold_or_refused(service, raw) != 200


@settings(BOUNDED, max_examples=400)
@given(start=st.integers(0, 200), removed=st.integers(0, 20), added=st.binary(max_size=20))
def test_a_damaged_request_is_sold_to_or_refused(
    service: Service, start: int, removed: int, added: bytes
) -> None:
    raw = message(BUY, b"Idempotency-Key: damaged", b"Expect: 100-continue")
    assert_raw_is_sold_or_refused(service, raw[:start] + added + raw[start + removed :])


def test_no_fuzzing_left_a_traceback_in_the_log(service: Service) -> None:
    assert "Traceback" not in service.log
    assert service.get("/audit")["consistent"]
