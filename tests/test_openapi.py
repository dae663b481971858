"""serving/openapi.json tells the same routes, statuses and answers as the service itself."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
from edge import Upstream, nginx
from edge import buy as buy_raw
from flask import Flask
from flask.testing import FlaskClient
from openapi_schema_validator import OAS31Validator
from service import PROJECT, Service, send_at_once
from test_raw_sockets import exchange

import app as service_app
import db
from serving import config, headers
from serving.config import MAX_STOCK
from serving.json_bodies import MAX_BODY_BYTES
from sqlite.wal import WalDatabase

SCHEMATHESIS_EXAMPLES = 200
SCHEMATHESIS_LIMIT_S = 240
# Sold out, a key that another generated purchase used, and busy are outcomes, not faults.
SCHEMATHESIS_CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 410, 422, 503]
"""
BY_THE_PROXY = {429, 502, 504}
PAGES = ("GET /docs", "GET /sale")
MakeApp = Callable[..., Flask]


def resolve(node: Any, document: Any) -> Any:
    """`node` with every $ref replaced by what it refers to."""
    if isinstance(node, list):
        return [resolve(item, document) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = document
        for name in node["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        return resolve(target, document)
    return {name: resolve(value, document) for name, value in node.items()}


RAW_DOCUMENT = json.loads((PROJECT / "serving" / "openapi.json").read_text(encoding="utf-8"))
DOCUMENT = resolve(RAW_DOCUMENT, RAW_DOCUMENT)
OPERATIONS = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}
COMPONENTS = DOCUMENT["components"]


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from nodes(child)


def complaints(value: Any, schema: Any) -> list[str]:
    return [error.message for error in OAS31Validator(schema).iter_errors(value)]


def assert_described(answer: Any, response: Any) -> None:
    """Content type, body and headers of a real answer are as the description's `response` says."""
    content_type = answer.headers["Content-Type"].partition(";")[0]
    body = json.loads(answer.text) if content_type == "application/json" else answer.text
    assert complaints(body, response["content"][content_type]["schema"]) == []
    for name, header in response["headers"].items():
        assert not header["required"] or name in answer.headers
        assert complaints(answer.headers.get(name, header["example"]), header["schema"]) == []


def fail_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def buy(client: FlaskClient, **request: Any) -> Any:
    return client.post("/buy_ticket", **request)


def buy_for_two(client: FlaskClient) -> Any:
    buy(client, json={"customer_id": "alice"}, headers={"Idempotency-Key": "k"})
    return buy(client, json={"customer_id": "bob"}, headers={"Idempotency-Key": "k"})


def buy_from(stock: int) -> Callable[[FlaskClient], Any]:
    def attempt(client: FlaskClient) -> Any:
        client.post("/reset", json={"stock": stock})
        return buy(client)

    return attempt


def post(path: str, **request: Any) -> Callable[[FlaskClient], Any]:
    return lambda client: client.post(path, **request)


def get(path: str) -> Callable[[FlaskClient], Any]:
    return lambda client: client.get(path)


def reset_switched_off(client: FlaskClient) -> Any:
    client.application.config["ALLOW_RESET"] = 0
    return client.post("/reset")


def without_store(operation: str) -> Callable[[FlaskClient], Any]:
    """The database's folder is gone, as far as this app can tell."""
    method, path = operation.split()

    def attempt(client: FlaskClient) -> Any:
        store = client.application.extensions["store"]
        store.file.close()
        store.file = WalDatabase(Path("/nowhere/x.db"))
        return client.open(path, method=method)

    return attempt


def with_failing_disk(path: str) -> Callable[[FlaskClient], Any]:
    def attempt(client: FlaskClient) -> Any:
        store = client.application.extensions["store"]
        store.buy = store.reset = fail_with(db.OutcomeUnknown("the flush failed"))
        return client.post(path)

    return attempt


LARGE: dict[str, Any] = {
    "data": b"{}".ljust(MAX_BODY_BYTES + 1),
    "content_type": "application/json",
}
CHUNKED: dict[str, Any] = {"headers": {"Transfer-Encoding": "chunked"}}
TEXT: dict[str, Any] = {"data": b"{}", "content_type": "text/plain"}
PROVOKED: dict[tuple[str, int], Callable[[FlaskClient], Any]] = {
    ("POST /buy_ticket", 200): post("/buy_ticket", json={"customer_id": "alice"}),
    ("POST /buy_ticket", 400): post("/buy_ticket", json={"customer_id": 7}),
    ("POST /buy_ticket", 403): post("/buy_ticket", headers={"Sec-Fetch-Site": "cross-site"}),
    ("POST /buy_ticket", 410): buy_from(0),
    ("POST /buy_ticket", 411): post("/buy_ticket", **CHUNKED),
    ("POST /buy_ticket", 413): post("/buy_ticket", **LARGE),
    ("POST /buy_ticket", 415): post("/buy_ticket", **TEXT),
    ("POST /buy_ticket", 422): buy_for_two,
    ("POST /buy_ticket", 500): with_failing_disk("/buy_ticket"),
    ("POST /buy_ticket", 503): without_store("POST /buy_ticket"),
    ("GET /inventory", 200): get("/inventory"),
    ("GET /inventory", 503): without_store("GET /inventory"),
    ("POST /reset", 200): post("/reset", json={"stock": 7}),
    ("POST /reset", 400): post("/reset", json={"stock": -7}),
    ("POST /reset", 403): reset_switched_off,
    ("POST /reset", 411): post("/reset", **CHUNKED),
    ("POST /reset", 413): post("/reset", **LARGE),
    ("POST /reset", 415): post("/reset", **TEXT),
    ("POST /reset", 500): with_failing_disk("/reset"),
    ("POST /reset", 503): without_store("POST /reset"),
    ("GET /audit", 200): get("/audit"),
    ("GET /audit", 503): without_store("GET /audit"),
    ("GET /health", 200): get("/health"),
    ("GET /health", 503): without_store("GET /health"),
    ("GET /metrics", 200): get("/metrics"),
    ("GET /", 200): get("/"),
    ("GET /openapi.json", 200): get("/openapi.json"),
    ("GET /docs", 200): get("/docs"),
    ("GET /sale", 200): get("/sale"),
}


def endpoints(client: FlaskClient) -> dict[str, str]:
    return dict(json.loads(client.get("/").text)["endpoints"])


def test_the_description_is_valid_openapi_3_1() -> None:
    assert RAW_DOCUMENT["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(RAW_DOCUMENT)


def test_the_service_hands_out_its_description(client: FlaskClient) -> None:
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert answer.json == RAW_DOCUMENT


def test_every_route_is_described_and_every_description_has_its_route(client: FlaskClient) -> None:
    served = {
        f"{method} {rule.rule}"
        for rule in client.application.url_map.iter_rules()
        if not rule.rule.startswith("/docs/")  # what /docs is made of
        for method in rule.methods or ()
        if method != "HEAD"  # as GET (RFC 9110, 9.3.2)
    }
    assert set(OPERATIONS) == served == set(endpoints(client))


def test_the_index_and_the_description_use_the_same_words(client: FlaskClient) -> None:
    described = {name: operation["summary"] for name, operation in OPERATIONS.items()}
    assert endpoints(client) == described


def test_every_status_is_described_and_every_described_status_can_be_provoked() -> None:
    described = {
        (name, int(code))
        for name, operation in OPERATIONS.items()
        for code in operation["responses"]
    }
    own = {(name, code) for name, code in described if code not in BY_THE_PROXY}
    assert set(PROVOKED) == own
    passed_on = {"POST /buy_ticket", "GET /inventory", "GET /health", "GET /", "GET /openapi.json"}
    passed_on |= {"GET /docs", "GET /sale"}
    assert described - own == {(name, code) for name in passed_on for code in BY_THE_PROXY}


@pytest.mark.parametrize("status", BY_THE_PROXY)
def test_what_the_proxy_answers_by_itself_is_as_described(tmp_path: Path, status: int) -> None:
    """A generated client that doesn't know of these answers returns None instead of a refusal."""
    gave_up = threading.Event()

    def answer(_: str) -> bytes:
        if status == 504:
            gave_up.wait(20)
        return b""  # hangs up

    impatient = {"proxy_read_timeout 60s": "proxy_read_timeout 100ms"}
    with Upstream(answer) as upstream, nginx(tmp_path, upstream.port, impatient) as port:
        crowd = [buy_raw()] * (80 if status == 429 else 1)
        found = next(a for a in send_at_once(port, crowd) if a.status == status)
        gave_up.set()
    response = OPERATIONS["POST /buy_ticket"]["responses"][str(status)]
    assert complaints(found.json, response["content"]["application/json"]["schema"]) == []
    for name, header in response["headers"].items():
        assert complaints(found.headers[name.lower()], header["schema"]) == []
    (example,) = response["content"]["application/json"]["examples"].values()
    assert found.json["message"] == example["value"]["message"]


@pytest.mark.parametrize(("operation", "status"), PROVOKED)
def test_a_real_answer_is_as_described(client: FlaskClient, operation: str, status: int) -> None:
    answer = PROVOKED[operation, status](client)
    assert answer.status_code == status
    assert_described(answer, OPERATIONS[operation]["responses"][str(status)])


def test_a_sale_that_is_not_open_yet_is_as_described(make_app: MakeApp) -> None:
    client = make_app(SALE_STARTS_AT="2999-12-31T20:00:00+01:00").test_client()
    answer = buy(client)
    assert answer.status_code == 403
    assert int(answer.headers["Retry-After"]) > 0
    assert_described(answer, OPERATIONS["POST /buy_ticket"]["responses"]["403"])
    told = client.get("/inventory")
    assert told.json is not None
    assert (told.json["opens_at"], told.json["open"]) == ("2999-12-31T20:00:00+01:00", False)
    assert_described(told, OPERATIONS["GET /inventory"]["responses"]["200"])


def test_a_replay_is_as_described(client: FlaskClient) -> None:
    for replayed in (None, "true"):
        answer = buy(client, headers={"Idempotency-Key": "k"})
        assert answer.headers.get("Idempotent-Replayed") == replayed
        assert_described(answer, OPERATIONS["POST /buy_ticket"]["responses"]["200"])


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [("POST", "/nowhere", "NotFound"), ("GET", "/docs/nowhere.js", "NotFound")]
    + [("DELETE", path, "MethodNotAllowed") for path in DOCUMENT["paths"]],
)
def test_what_leads_nowhere_is_answered_as_described(
    client: FlaskClient, method: str, path: str, name: str
) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == {"NotFound": 404, "MethodNotAllowed": 405}[name]
    assert_described(answer, COMPONENTS["responses"][name])


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_every_get_is_answered_as_head_too(client: FlaskClient, path: str) -> None:
    allowed = client.delete(path).headers["Allow"]
    methods = {method.upper() for method in DOCUMENT["paths"][path]}
    assert set(allowed.split(", ")) == methods | ({"HEAD"} if "GET" in methods else set())


def examples() -> Iterator[tuple[Any, Any]]:
    """Every example with the schema that it has to fit."""
    for node in nodes([DOCUMENT["paths"], COMPONENTS["responses"], COMPONENTS["parameters"]]):
        if isinstance(node, dict) and isinstance(node.get("examples"), dict):
            yield from ((example["value"], node["schema"]) for example in node["examples"].values())
        elif isinstance(node, dict) and "example" in node:
            yield node["example"], node["schema"]


def test_every_example_fits_its_schema() -> None:
    found = list(examples())
    assert len(found) >= 40
    for example, schema in found:
        assert complaints(example, schema) == []


def test_every_json_answer_and_body_has_an_example() -> None:
    content = [node for node in nodes(DOCUMENT) if isinstance(node, dict) and "schema" in node]
    media = [node for node in content if "in" not in node and "required" not in node]
    without = [node for node in media if not node.get("examples")]
    assert [list(node["schema"]) for node in without] == [
        ["type", "pattern"],  # a page
        ["type", "required", "properties"],  # this document
        ["type", "pattern"],  # a page
    ]


@pytest.mark.parametrize(
    ("operation", "status"), [(name, status) for name, status in PROVOKED if name not in PAGES]
)
def test_a_drifting_answer_would_be_noticed(
    client: FlaskClient, operation: str, status: int
) -> None:
    """A negative control: without a member, or with the wrong type of one, no answer fits."""
    response = OPERATIONS[operation]["responses"][str(status)]
    answer = PROVOKED[operation, status](client)
    if answer.content_type != "application/json":
        assert complaints("", response["content"]["text/plain"]["schema"])
        return
    schema = response["content"]["application/json"]["schema"]
    for member in schema["required"]:
        assert complaints(
            {name: value for name, value in answer.json.items() if name != member}, schema
        )
        assert complaints(answer.json | {member: None}, schema)
    if not operation.startswith(("GET /openapi", "GET /health")):
        assert complaints(answer.json | {"new": 1}, schema)


def test_the_description_names_the_same_limits_and_version() -> None:
    key = COMPONENTS["parameters"]["IdempotencyKey"]["schema"]
    assert key["pattern"] == f"^({headers.IDEMPOTENCY_KEY.pattern.replace('?:', '')})$"
    assert key["not"]["pattern"] == f'^("?)({"|".join(headers.NO_KEYS)})\\1$'
    customer_id = COMPONENTS["schemas"]["PurchaseRequest"]["properties"]["customer_id"]
    assert DOCUMENT["info"]["version"] == service_app.VERSION
    assert COMPONENTS["schemas"]["Stock"]["maximum"] == MAX_STOCK
    assert config.NAME.pattern.endswith(
        f"{{{customer_id['minLength']},{customer_id['maxLength']}}}"
    )


@pytest.mark.parametrize("code", [0, 0x1F, 0x20, 0x7E, 0x7F, 0x80, 0x9F, 0xA0, 0x2028, 0x1F3AB])
def test_the_description_and_the_service_allow_the_same_characters(
    client: FlaskClient, code: int
) -> None:
    schema = COMPONENTS["schemas"]["PurchaseRequest"]
    for customer_id in (f"a{chr(code)}b", f"{chr(code)}", f"a{chr(code)}"):
        body = {"customer_id": customer_id}
        assert (buy(client, json=body).status_code == 400) == bool(complaints(body, schema))
        client.post("/reset")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("openapi")
    with Service(folder, WEB_CONCURRENCY="2", INITIAL_STOCK="1000") as running:
        yield running


@pytest.mark.parametrize(
    "raw",
    [
        b"no HTTP\r\n\r\n",
        b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nExpect: wonders\r\n\r\n",
        b"GET / HTTP/1.1\r\nLong: " + b"a" * 9_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nTransfer-Encoding: none\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_as_described(service: Service, raw: bytes) -> None:
    head, _, body = exchange(service.port, raw).decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    response = COMPONENTS["responses"]["NotHTTP"]
    assert status.split()[1] in response["description"]
    sent = dict(line.split(": ", 1) for line in lines)
    schema = response["content"][sent["Content-Type"]]["schema"]
    assert complaints(json.loads(body), schema) == []
    for name, header in response["headers"].items():
        assert complaints(sent[name], header["schema"]) == []


def test_schemathesis_finds_nothing_over_every_route_check_and_link(
    service: Service, tmp_path: Path
) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(SCHEMATHESIS_CONFIG, encoding="utf-8")
    program = str(Path(sys.executable).with_name("schemathesis"))
    options = [
        "--checks=all",
        f"--max-examples={SCHEMATHESIS_EXAMPLES}",
        "--generation-deterministic",
    ]
    finished = subprocess.run(
        [
            program,
            f"--config-file={config}",
            "run",
            f"{service.url}/openapi.json",
            "--no-color",
            *options,
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=SCHEMATHESIS_LIMIT_S,
    )
    assert finished.returncode == 0, finished.stdout
    links = sum(
        len(r.get("links", {})) for op in OPERATIONS.values() for r in op["responses"].values()
    )
    assert f"{links} covered / {links} selected / {links} total" in finished.stdout, finished.stdout
    assert service.get("/audit")["consistent"]
    assert "Traceback" not in service.log
