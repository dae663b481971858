"""The service as a client knows it: one request over HTTP, and the calls around a sale.

Purchases go by http.client, as `requests` can't make one ready up to its last byte.
"""

import http.client
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

from proof.history import BUSY, LIMITED, LOST, SOLD, SOLD_OUT, Audit, Reading

REQUEST_TIMEOUT_S = 30  # longer than the service's own lock timeout
RETRY_SLEEP_S = 0.02  # where the answer names no other
RETRY_AFTER_MAX_S = 10
CALL_TIMEOUT_S = 20  # then a call around a sale that was answered 503 isn't asked again
SHOWN = 100  # characters of an answer that wasn't expected
TOO_LATE = f"no answer within {REQUEST_TIMEOUT_S} s"
PROXIES = ("nginx", "openresty", "envoy", "caddy", "haproxy", "varnish", "cloudflare", "apache")

Body = dict[str, Any]


class CannotJudge(Exception):
    """Why, in one line."""


class NoAnswer(CannotJudge):
    """Nobody answers there."""


class Answer(NamedTuple):
    start: float
    end: float
    status: int
    body: Body  # empty if it was no JSON object
    text: str  # where there is no answer: why
    retry_after_s: float


def connection_to(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=REQUEST_TIMEOUT_S)


class Prepared(NamedTuple):
    """A request of which all is made that can be made before its moment."""

    body: bytes = b""
    sent: Callable[[], object] = bool  # called before the answer is read


def exchange(connection: http.client.HTTPConnection, method: str, url: str) -> Answer:
    connection.putrequest(method, urlsplit(url).path)
    return complete(connection, Prepared())


def prepare_purchase(
    connection: http.client.HTTPConnection, url: str, customer: str, key: str | None
) -> Prepared:
    body = json.dumps({"customer_id": customer}).encode()
    connection.putrequest("POST", urlsplit(url).path + "/buy_ticket")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    if key:
        connection.putheader("Idempotency-Key", key)
    return Prepared(body)


def complete(connection: http.client.HTTPConnection, request: Prepared) -> Answer:
    """Sends a request and reads its answer. The connection stays open, if the server keeps it."""
    status, text, wait = LOST, "", ""
    start = time.monotonic()
    try:
        connection.endheaders(request.body)
        request.sent()
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
        status, wait = response.status, response.getheader("Retry-After", "")
    except TimeoutError:
        text = TOO_LATE
    except (OSError, http.client.HTTPException) as error:
        text = type(error).__name__
    end = time.monotonic()
    if status == LOST:
        connection.close()
    retry_after_s = min(float(wait), RETRY_AFTER_MAX_S) if wait.isdigit() else RETRY_SLEEP_S
    return Answer(start, end, status, json_object(text), text, retry_after_s)


def json_object(text: str) -> Body:
    with suppress(ValueError, RecursionError):
        if isinstance(value := json.loads(text), dict):
            return value
    return {}


def whole_number(value: object) -> int | None:
    return value if type(value) is int else None


class Api(NamedTuple):
    """The calls around a sale. Each raises CannotJudge where the answer isn't this API's."""

    url: str
    cache_age_s: float = 0  # readings and 410s without a key may be that old

    def require_healthy(self) -> None:
        if self.call("GET", "/health").get("status") != "ok":
            raise CannotJudge(
                f'what is at {self.url} is not this API: no "status": "ok" in /health'
            )

    def require_this_api(self) -> None:
        """Sells one unit. A service of another kind is told from a wrong seller by its answers."""
        self.reset(1)
        time.sleep(self.cache_age_s)
        self.read_stock()
        self.require_purchase("200 with whole numbers remaining_stock and purchase_id", SOLD)
        self.require_purchase('410 with "remaining_stock": 0', SOLD_OUT)
        self.audit()

    def require_purchase(self, expected: str, wanted: int) -> None:
        answer = self.buy_one()
        body, status = answer.body, answer.status
        known = {
            SOLD: None
            not in (whole_number(body.get(n)) for n in ("remaining_stock", "purchase_id")),
            SOLD_OUT: body.get("remaining_stock") == 0,
        }
        if status == LIMITED:
            raise rate_limited("POST /buy_ticket")
        if status in (BUSY, LOST):
            raise CannotJudge(f"POST /buy_ticket was not served: {status} {answer.text[:SHOWN]}")
        if status < 500 and not known.get(status, False):  # a 5xx is a violation in every sale
            raise unexpected("POST /buy_ticket", expected, status, answer.text)

    def buy_one(self) -> Answer:
        deadline = time.monotonic() + CALL_TIMEOUT_S
        with closing(connection_to(self.url)) as connection:
            while True:
                request = prepare_purchase(connection, self.url, "customer_0", None)
                answer = complete(connection, request)
                if answer.status != BUSY or time.monotonic() > deadline:
                    return answer
                connection.close()
                time.sleep(answer.retry_after_s)

    def reset(self, stock: int | None = None) -> object:
        """To so many units, which are returned; None: to the configured stock."""
        body = None if stock is None else {"stock": stock}
        answer = self.call("POST", "/reset", body)
        if stock is not None and answer.get("current_stock") != stock:
            expected = f'"current_stock": {stock}'
            raise unexpected("POST /reset", expected, SOLD, json.dumps(answer))
        return answer.get("current_stock")

    def read_stock(self, connection: http.client.HTTPConnection | None = None) -> list[Reading]:
        """One reading, or none if it wasn't answered 200."""
        call = "GET /inventory"
        with ExitStack() as undo:
            way = connection or undo.enter_context(closing(connection_to(self.url)))
            answer = exchange(way, "GET", self.url + "/inventory")
        if answer.status != SOLD:
            return []
        names = ("current_stock", "initial_stock", "total_purchases")
        stock, initial, sold = (number_in(answer.body, call, name) for name in names)
        if stock is None:
            raise unexpected(call, "a whole number current_stock", answer.status, answer.text)
        return [Reading(answer.start, answer.end, stock, initial, sold)]

    def audit(self) -> Audit:
        start = time.monotonic()
        body = self.call("GET", "/audit")
        end = time.monotonic()
        names = ("current_stock", "purchase_records", "initial_stock")
        stock, records, initial = (number_in(body, "GET /audit", name) for name in names)
        if stock is None or records is None:
            expected = "whole numbers current_stock and purchase_records"
            raise unexpected("GET /audit", expected, SOLD, json.dumps(body))
        return Audit(start, end, stock, records, initial, body.get("consistent"))

    def call(self, method: str, path: str, body: dict[str, int] | None = None) -> Body:
        """The JSON object of a 200. A 503 is asked again, for a while."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            response = self.send(method, path, body)
            if response.status_code != BUSY or time.monotonic() > deadline:
                break
            wait = response.headers.get("Retry-After", "")
            time.sleep(min(float(wait), RETRY_AFTER_MAX_S) if wait.isdigit() else RETRY_SLEEP_S)
        answer = json_object(response.text)
        if response.status_code == SOLD and answer:
            return answer
        if response.status_code == LIMITED:
            raise rate_limited(f"{method} {path}")
        if response.status_code == 403:
            raise forbidden(f"{method} {path}", response)
        reason = unexpected(
            f"{method} {path}", "200 and a JSON object", response.status_code, response.text
        )
        raise CannotJudge(f"what is at {self.url} is not this API, or not well: {reason}")

    def send(self, method: str, path: str, body: dict[str, int] | None) -> requests.Response:
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxy between buyer and seller
                return session.request(
                    method, self.url + path, json=body, timeout=REQUEST_TIMEOUT_S
                )
        except requests.RequestException as error:
            kind = NoAnswer if isinstance(error, requests.ConnectionError) else CannotJudge
            raise kind(f"{method} {self.url}{path}: no answer ({type(error).__name__})") from error


def number_in(body: Body, call: str, name: str) -> int | None:
    """None if it isn't there. Raises CannotJudge if something else stands in its place."""
    if name in body and whole_number(body[name]) is None:
        raise unexpected(call, f"a whole number {name}", SOLD, json.dumps(body))
    return whole_number(body.get(name))


def unexpected(call: str, expected: str, status: int, text: str) -> CannotJudge:
    came = " ".join(text[:SHOWN].split())
    return CannotJudge(f"{call}: expected {expected}; came {status} {came}")


def rate_limited(call: str) -> CannotJudge:
    return CannotJudge(f"{call} was answered 429: lift the rate limit for this address")


def forbidden(call: str, response: requests.Response) -> CannotJudge:
    """A proxy in front may have said it: the service's own 403 names the variable ALLOW_RESET."""
    said = json_object(response.text).get("message", response.text[:SHOWN])
    via = response.headers.get("Via") or response.headers.get("Server", "")
    if "ALLOW_RESET" in response.text or not any(name in via.lower() for name in PROXIES):
        return CannotJudge(
            f"{call} is switched off there ({said}): start that server with ALLOW_RESET=1"
        )
    advice = "open that path for this address, or name the service's own port"
    return CannotJudge(
        f"{call} was answered 403 by {via}, which stands in front ({said}): {advice}"
    )
