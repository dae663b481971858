"""Bytes that no HTTP library sends: refused in JSON or hung up on, and never a sale too many.

One worker serves one connection after another: each request sees what the last one did.
"""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from service import Answer, Service

from serving import http_errors

ANSWER_LIMIT_S = 10.0
LOG_PER_REQUEST_MAX = 400  # characters
STOCK = 100_000
BODY = b'{"customer_id": "alice"}'
BUY = b"POST /buy_ticket HTTP/1.1"
RESET = b"POST /reset HTTP/1.1"
CHUNKED = b"Transfer-Encoding: chunked"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("raw")
    with Service(folder, WEB_CONCURRENCY="1", INITIAL_STOCK=str(STOCK)) as running:
        yield running


def message(line: bytes, *headers: bytes, body: bytes = BODY, length: bytes | None = None) -> bytes:
    """A request; `length` replaces its Content-Length, b"" leaves it out."""
    framing = str(len(body)).encode() if length is None else length
    lines = [line, b"Host: test", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, *([b"Content-Length: " + framing] if framing else []), b"", body])


def exchange(port: int, raw: bytes, half_close: bool = False) -> bytes:
    """Send all of it, then read until the service hangs up.

    When half-closed, the service sees that nothing more comes.
    """
    received = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_LIMIT_S) as client:
        client.sendall(raw)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        while data := client.recv(65536):
            received += data
    return bytes(received)


def abort(port: int, raw: bytes) -> None:
    """Send, and reset the connection at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_LIMIT_S) as client:
        client.sendall(raw)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def parse(raw: bytes) -> Answer:
    """The one answer in `raw`: complete, JSON, protected; anything after it is an error."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
    }
    assert len(body) == int(headers["content-length"]), raw
    assert headers["content-type"] == "application/json", raw
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert isinstance(json.loads(body), dict)
    return Answer(int(lines[0].split()[1]), headers, body.decode())


def books(service: Service) -> Any:
    return service.get("/audit")


def assert_still_sells(service: Service, before: Any) -> None:
    """Nothing has changed since `before`, and the next buyer is served."""
    assert books(service) == before
    assert service.buy("bob").status_code == 200
    assert books(service)["current_stock"] == before["current_stock"] - 1
    assert books(service)["consistent"]


def assert_log_is_short(service: Service, before: int) -> None:
    assert "Traceback" not in service.log[before:]
    assert len(service.log) - before <= LOG_PER_REQUEST_MAX


REFUSED = {
    "nothing but empty lines": (b"\r\n\r\n", 400),
    "no HTTP at all": (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /inventory\r\n\r\n", 400),
    "HTTP/0.9 by name": (message(b"POST /buy_ticket HTTP/0.9"), 400),
    "HTTP/2 without asking": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/3": (message(b"POST /buy_ticket HTTP/3.0"), 400),
    "version without digits": (message(b"POST /buy_ticket HTTP/x.y"), 400),
    "another protocol": (message(b"POST /buy_ticket HTTQ/1.1"), 400),
    "no version": (message(b"POST /buy_ticket"), 400),
    "two spaces": (message(b"POST  /buy_ticket HTTP/1.1"), 400),
    "tabs for spaces": (message(b"POST\t/buy_ticket\tHTTP/1.1"), 400),
    "bare line feeds": (message(BUY).replace(b"\r\n", b"\n"), 400),
    "method in lower case": (message(b"post /buy_ticket HTTP/1.1"), 400),
    "method in mixed case": (message(b"Post /buy_ticket HTTP/1.1"), 400),
    "method with a NUL": (message(b"PO\x00ST /buy_ticket HTTP/1.1"), 400),
    "method nobody knows": (message(b"SELL /buy_ticket HTTP/1.1"), 405),
    "target with a NUL": (message(b"POST /buy_ticket\x00 HTTP/1.1"), 400),
    "target in UTF-8": (message("POST /buy_ticket/é HTTP/1.1".encode()), 400),
    "target that is half an address": (message(b"POST http://[/buy_ticket HTTP/1.1"), 400),
    "target of a proxy": (message(b"POST test:80 HTTP/1.1"), 400),
    "target * for POST": (message(b"POST * HTTP/1.1"), 400),
    "target * for OPTIONS": (message(b"OPTIONS * HTTP/1.1"), 404),
    "CONNECT": (message(b"CONNECT test:80 HTTP/1.1"), 404),
    "absolute target without a path": (message(b"POST http://test HTTP/1.1"), 405),
    "encoded NUL in the path": (message(b"POST /buy_ticket%00 HTTP/1.1"), 404),
    "encoded slash in the path": (message(b"POST %2fbuy_ticket HTTP/1.1"), 400),
    "path of 4,000 bytes": (message(b"POST /" + b"a" * 4_000 + b" HTTP/1.1"), 404),
    "path of 9,000 bytes": (message(b"POST /" + b"a" * 9_000 + b" HTTP/1.1"), 414),
    "path of 1 MB": (message(b"POST /" + b"a" * 1_000_000 + b" HTTP/1.1"), 414),
    "Content-Length negative": (message(BUY, length=b"-1"), 400),
    "Content-Length with a sign": (message(BUY, length=b"+5"), 400),
    "Content-Length in words": (message(BUY, length=b"all"), 400),
    "Content-Length in hexadecimal": (message(BUY, length=b"0x18"), 400),
    "Content-Length with an underscore": (message(BUY, length=b"2_4"), 400),
    "Content-Length with a superscript": (message(BUY, length=b"\xb2"), 400),
    "Content-Length as a list": (message(BUY, length=b"24, 24"), 400),
    "Content-Length empty": (message(BUY, b"Content-Length:", length=b""), 400),
    "Content-Length of 5,000 digits": (message(BUY, length=b"1" * 5_000), 400),
    "two different Content-Lengths": (message(BUY, b"Content-Length: 5"), 400),
    "the same Content-Length twice": (message(BUY, b"Content-Length: 24"), 400),
    "two Content-Types": (message(BUY, b"Content-Type: text/plain"), 400),
    "two Hosts": (message(BUY, b"Host: other"), 400),
    "200 headers": (message(BUY, *(b"X-%d: a" % number for number in range(200))), 431),
    "50,000 headers": (message(BUY, *(b"X-%d: a" % number for number in range(50_000))), 431),
    "a header of 9,000 bytes": (message(BUY, b"X-Long: " + b"a" * 9_000), 431),
    "a header of 2 MB": (message(BUY, b"X-Long: " + b"a" * 2_000_000), 431),
    "a header line of 500 KB without a colon": (message(BUY, b"a" * 500_000), 400),
    "a folded header": (message(BUY, b"X-Folded: one\r\n two"), 400),
    "a folded Content-Length": (message(BUY, length=b"\r\n 24"), 400),
    "a NUL in a value": (message(BUY, b"X-Nul: a\x00b"), 400),
    "a NUL in the Idempotency-Key": (message(BUY, b"Idempotency-Key: a\x00b"), 400),
    "a NUL in a name": (message(BUY, b"X-\x00: a"), 400),
    "a bare CR in a value": (message(BUY, b"X-Cr: a\rb"), 400),
    "a space before the colon": (message(BUY, b"X-Spaced : a"), 400),
    "Content-Length, space, colon": (message(BUY, b"Content-Length : 24", length=b""), 400),
    "a header without a name": (message(BUY, b": a"), 400),
    "a header without a colon": (message(BUY, b"X-Alone"), 400),
    "a header in UTF-8": (message(BUY, "Idempotency-Key: schlüssel".encode()), 400),
    "HTTP/1.1 without a Host": (message(BUY).replace(b"Host: test\r\n", b""), 400),
    "a query": (message(b"POST /buy_ticket?customer_id=bob HTTP/1.1"), 400),
    "an empty segment first": (message(b"POST //buy_ticket HTTP/1.1"), 404),
    "X-Idempotency-Key": (message(BUY, b"X-Idempotency-Key: k"), 400),
    "another site's Origin": (message(BUY, b"Origin: http://evil.test"), 403),
    "Expect: something": (message(BUY, b"Expect: 200-ok"), 417),
    "Transfer-Encoding after Content-Length": (message(BUY, CHUNKED, body=b"0\r\n\r\n"), 400),
    "Transfer-Encoding before Content-Length": (
        message(BUY, CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n", length=b""),
        400,
    ),
    "Transfer-Encoding twice": (message(BUY, CHUNKED, CHUNKED, body=b"0\r\n\r\n", length=b""), 400),
    "Transfer-Encoding: gzip": (message(BUY, b"Transfer-Encoding: gzip"), 400),
    "Transfer-Encoding: chunked, gzip": (message(BUY, b"Transfer-Encoding: chunked, gzip"), 400),
    "Transfer-Encoding: identity": (message(BUY, b"Transfer-Encoding: identity"), 400),
    "Transfer-Encoding: xchunked": (message(BUY, b"Transfer-Encoding: xchunked"), 400),
    "Transfer-Encoding in HTTP/1.0": (
        message(b"POST /buy_ticket HTTP/1.0", CHUNKED, body=b"0\r\n\r\n", length=b""),
        400,
    ),
    "gzip, chunked": (
        message(BUY, b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n", length=b""),
        411,
    ),
    "good chunks": (message(BUY, CHUNKED, body=b"2\r\n{}\r\n0\r\n\r\n", length=b""), 411),
    "a body of 1 MB": (message(BUY, body=b"x" * 1_000_000), 413),
    "a body of 7 MB": (message(BUY, body=b"x" * 7_000_000), 413),
    "a body of 1 MB for nobody": (message(b"POST /nowhere HTTP/1.1", body=b"x" * 1_000_000), 404),
    "a body of 1 MB after a bad header": (message(BUY, b"X Y: a", body=b"x" * 1_000_000), 400),
    "a body of 1 MB that was announced": (
        message(BUY, b"Expect: 100-continue", body=b"x" * 1_000_000),
        413,
    ),
}


@pytest.mark.parametrize(("raw", "status"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_acceptable_is_refused_in_json(
    service: Service, raw: bytes, status: int
) -> None:
    before, log = books(service), len(service.log)
    answer = parse(exchange(service.port, raw).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))
    assert answer.status == status
    assert set(answer.json) == {"success", "message"}
    assert answer.json["success"] is False
    assert answer.json["message"]
    assert_log_is_short(service, log)
    assert_still_sells(service, before)


def test_an_absolute_target_without_a_path_is_the_root(service: Service) -> None:
    answer = parse(
        exchange(service.port, message(b"GET http://test HTTP/1.1", body=b"", length=b""))
    )
    assert (answer.status, answer.json["service"]) == (200, "Flash Sale Inventory Service")


def test_what_gunicorn_refuses_is_given_the_reason_of_its_status(service: Service) -> None:
    unknown = exchange(service.port, message(BUY, b"Transfer-Encoding: xchunked"))
    assert unknown.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    long = exchange(service.port, b"GET /" + b"x" * 9_000 + b" HTTP/1.1\r\n\r\n")
    assert long.startswith(b"HTTP/1.1 414 ")


@pytest.mark.parametrize(
    ("status", "said", "wanted", "text"),
    [
        (500, "", b"HTTP/1.1 500 ", b"a purchase may have been stored - with an Idempotency-Key"),
        (500, "not below SCRIPT_NAME", b"HTTP/1.1 404 ", b"not below SCRIPT_NAME"),
    ],
)
def test_a_worker_that_was_ended_is_told_from_a_path_that_is_none(
    status: int, said: str, wanted: bytes, text: bytes
) -> None:
    ours, clients = socket.socketpair()
    with ours, clients:
        http_errors.write_json_error(ours, status, "Internal Server Error", said)
        answer = clients.recv(65536)
    assert answer.startswith(wanted)
    assert text in answer


BAD_CHUNKS = {
    "no number": b"zz\r\n{}\r\n0\r\n\r\n",
    "negative": b"-2\r\n{}\r\n0\r\n\r\n",
    "without an end": b"2\r\n{}xx0\r\n\r\n",
    "followed by nonsense": b"0\r\nnonsense\r\n\r\n",
    "with a bad extension": b"2;\r;\r\n{}\r\n0\r\n\r\n",
    "larger than any memory": b"f" * 4_000 + b"\r\n{}",
    "cut off": b"5\r\n{}",
    "never sent": b"",
}


@pytest.mark.parametrize("path", [b"/buy_ticket", b"/reset", b"/nowhere"])
@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_bad_chunks_are_refused_without_a_traceback(
    service: Service, path: bytes, body: bytes
) -> None:
    before, log = books(service), len(service.log)
    raw = message(b"POST %s HTTP/1.1" % path, CHUNKED, body=body, length=b"")
    answer = parse(exchange(service.port, raw, half_close=True))
    assert (answer.status, answer.json["success"]) == (404 if path == b"/nowhere" else 411, False)
    assert_log_is_short(service, log)
    assert_still_sells(service, before)


TOO_SHORT = {
    "nothing came": (b"", b"24"),
    "a whole object came": (BODY, b"100"),
    "an empty object came": (b"{}", b"16384"),
    "less than the zeroes say": (b"", b"0000000000000000001"),
}


@pytest.mark.parametrize("line", [BUY, RESET])
@pytest.mark.parametrize(("body", "length"), TOO_SHORT.values(), ids=TOO_SHORT)
def test_a_body_shorter_than_its_content_length_changes_nothing(
    service: Service, line: bytes, body: bytes, length: bytes
) -> None:
    """RFC 9112, 8: such a message is incomplete; what came of it means nothing."""
    before, log = books(service), len(service.log)
    answer = parse(exchange(service.port, message(line, body=body, length=length), half_close=True))
    assert (answer.status, answer.json["success"]) == (400, False)
    assert_log_is_short(service, log)
    assert_still_sells(service, before)


@pytest.mark.parametrize("body", [b"", BODY])
def test_a_buyer_who_hangs_up_within_the_body_buys_nothing(service: Service, body: bytes) -> None:
    before = books(service)
    abort(service.port, message(BUY, body=body, length=b"100"))
    exchange(service.port, message(BUY, body=body, length=b"100"), half_close=True)
    assert_still_sells(service, before)


@pytest.mark.parametrize("length", [b"20000", b"8388609", b"1000000000000000000", b"9" * 4_000])
def test_a_body_that_claims_too_much_is_refused_by_its_claim(
    service: Service, length: bytes
) -> None:
    before, log = books(service), len(service.log)
    answer = parse(exchange(service.port, message(BUY, length=length), half_close=True))
    assert (answer.status, answer.json["success"]) == (413, False)
    assert_log_is_short(service, log)
    assert_still_sells(service, before)


@pytest.mark.parametrize(
    "raw", [b"", b"\r", b"POST /buy", BUY + b"\r\n", message(BUY)[:-40], b"a" * 3_000]
)
def test_a_request_that_stops_before_its_body_is_hung_up_on(service: Service, raw: bytes) -> None:
    before, log = books(service), len(service.log)
    assert exchange(service.port, raw, half_close=True) == b""
    abort(service.port, raw)
    assert_log_is_short(service, log)
    assert_still_sells(service, before)


SMUGGLED = message(BUY, body=b'{"customer_id": "smuggled"}')
SOLD_ONCE = {
    "a body that was announced": message(BUY, b"Expect: 100-continue"),
    "an absolute target": message(b"POST http://elsewhere.test/buy_ticket HTTP/1.1"),
    "an empty query": message(b"POST /buy_ticket? HTTP/1.1"),
    "HTTP/1.0": message(b"POST /buy_ticket HTTP/1.0"),
    "HTTP/1.0 without a Host": message(b"POST /buy_ticket HTTP/1.0").replace(b"Host", b"No-Host"),
    "a Host of another name": message(BUY).replace(b"Host: test", b"Host: 10.1.2.3:99"),
    "a key with an underscore": message(BUY, b"Idempotency_Key: dropped"),
    "schemes that contradict": message(BUY, b"X-Forwarded-Proto: http", b"X-Forwarded-Ssl: on"),
    "all that proxies add": message(
        BUY,
        b"X-Forwarded-Proto: https, http",
        b"X-Forwarded-Protocol: ssl",
        b"X-Forwarded-Ssl: off",
        b"Front-End-Https: on",
        b"X-Forwarded-For: unknown, 10.0.0.1, ,",
        b"X-Forwarded-Host: evil.test",
        b"X-Forwarded-Port: http",
        b"X-Forwarded-Prefix: /x",
        b"Forwarded: for=_hidden;proto=ftp",
        b"Via: 1.1 a, 1.0 b",
        b"X-Real-IP: nobody",
        b"CF-Visitor: {}",
    ),
    "HTTP/1.0 that asks to stay": message(b"POST /buy_ticket HTTP/1.0", b"Connection: keep-alive"),
    "an empty line first": b"\r\n" + message(BUY),
    "a wish for HTTP/2": message(BUY, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"),
    "bytes after the body": message(BUY) + b'{"customer_id": "bob"}' * 10,
    "a bad request after the body": message(BUY) + b"\x00\r\n\r\n",
    "a second request": message(BUY) + SMUGGLED,
    "a second request that wants to stay": message(BUY, b"Connection: keep-alive") + SMUGGLED,
    "20 more requests": message(BUY) + SMUGGLED * 20,
    "more requests than are read at once": message(BUY) + SMUGGLED * 1_000,
    "a second request within the length": message(BUY, body=BODY.ljust(200)) + SMUGGLED,
    "SCRIPT_NAME that fits": message(BUY, b"SCRIPT_NAME: /buy"),
    "SCRIPT_NAME that doesn't": message(BUY, b"SCRIPT_NAME: /x"),
    "PATH_INFO": message(BUY, b"PATH_INFO: /reset"),
    "Content_Length": message(BUY, b"Content_Length: 5"),
    "Transfer_Encoding": message(BUY, b"Transfer_Encoding: chunked"),
    "an override of the method": message(BUY, b"X-HTTP-Method-Override: GET"),
    "an override of the path": message(BUY, b"X-Original-URL: /reset", b"X-Rewrite-URL: /reset"),
}


@pytest.mark.parametrize("raw", SOLD_ONCE.values(), ids=SOLD_ONCE)
def test_one_request_on_a_connection_is_answered_and_sold_once(
    service: Service, raw: bytes
) -> None:
    before = books(service)
    received = exchange(service.port, raw).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    answer = parse(received)
    assert (answer.status, answer.json["remaining_stock"]) == (200, before["current_stock"] - 1)
    after = books(service)
    assert after["purchase_records"] == before["purchase_records"] + 1
    assert after["consistent"]


@pytest.mark.parametrize("line", [BUY, b"GET /audit HTTP/1.1"])
def test_a_request_inside_a_body_is_no_request(service: Service, line: bytes) -> None:
    before = books(service)
    answer = parse(exchange(service.port, message(line, body=SMUGGLED)))
    assert answer.status == (400 if line == BUY else 200)
    assert_still_sells(service, before)


def test_a_body_that_is_announced_is_asked_for(service: Service) -> None:
    before = books(service)
    head, _, body = message(BUY, b"Expect: 100-continue").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", service.port), timeout=ANSWER_LIMIT_S) as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert books(service)["purchase_records"] == before["purchase_records"] + 1


def test_a_request_in_many_pieces_is_one_request(service: Service) -> None:
    before = books(service)
    with socket.create_connection(("127.0.0.1", service.port), timeout=ANSWER_LIMIT_S) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in message(BUY):
            client.send(bytes([byte]))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert books(service)["purchase_records"] == before["purchase_records"] + 1


def test_a_sale_survives_a_buyer_who_hangs_up_before_the_answer(service: Service) -> None:
    before = books(service)
    raw = message(BUY, b"Idempotency-Key: hung-up")
    abort(service.port, raw)
    answer = parse(exchange(service.port, raw))
    assert answer.status == 200
    assert books(service)["purchase_records"] == before["purchase_records"] + 1


@pytest.mark.parametrize("line", [BUY, RESET])
def test_a_client_that_resets_the_connection_leaves_no_traceback(
    service: Service, line: bytes
) -> None:
    before, log = books(service), len(service.log)
    for _ in range(10):
        abort(service.port, message(line, body=BODY, length=b"100"))
    assert_still_sells(service, before)
    assert "Traceback" not in service.log[log:]
