"""Flash sale inventory service: many buyers, little stock, one moment; each unit is sold exactly once.

HTTP only: the routes, what a request may be, which status an outcome gets. Each sale is decided by
the database, in db.py. `python app.py` serves a local demo, `gunicorn app:app` a real sale.
"""

import json
import logging
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, cast

import click
from flask import Flask, Request, Response, abort, current_app, request
from flask.typing import ResponseReturnValue
from flask_swagger_ui import get_swaggerui_blueprint  # type: ignore[import-untyped]
from werkzeug.exceptions import HTTPException

import db
from serving import local
from serving.config import MAX_STOCK, ConfigError, read_config
from serving.headers import with_security_headers

VERSION = "1.0.0"
OPENAPI = Path(__file__).with_name("serving") / "openapi.json"

MAX_BODY_BYTES = 16 * 1024
MAX_DISCARD_BYTES = (
    8 * 1024 * 1024
)  # of a refused body, read so that its sender gets to see the answer
MAX_NESTING = 100
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?'), re.compile(r"[][{}]")
CUSTOMER_ID = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

log = logging.getLogger(__name__)
Store = Any


# ---- Routes


def describe(store: Store, http: Request) -> ResponseReturnValue:
    return {
        "service": "Flash Sale Inventory Service",
        "version": VERSION,
        "endpoints": {endpoint: summary for endpoint, (_, summary) in ROUTES.items()},
        "concurrency_model": store.concurrency_model,
        "guarantees": [
            "each unit is sold exactly once: no overselling, no underselling",
            "200 means sold and on disk",
            "410 and 503 mean not sold, and leave nothing behind",
            "the same Idempotency-Key never buys twice",
        ],
    }


def buy_ticket(store: Store, http: Request) -> ResponseReturnValue:
    purchase = store.buy(customer_id_of(http), idempotency_key_of(http))
    body = {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": purchase.remaining_stock,
        "purchase_id": purchase.purchase_id,
    }
    return json_response(body, 200, {"Idempotent-Replayed": "true"} if purchase.replayed else None)


def inventory(store: Store, http: Request) -> ResponseReturnValue:
    return cast(ResponseReturnValue, store.inventory()._asdict())


def reset(store: Store, http: Request) -> ResponseReturnValue:
    if not current_app.config["ALLOW_RESET"]:
        abort(403, "Reset is switched off - start the service with ALLOW_RESET=1 to allow it.")
    stock = json_object_of(http).get("stock", current_app.config["INITIAL_STOCK"])
    if type(stock) is not int or not 0 <= stock <= MAX_STOCK:
        abort(
            400,
            f'stock has to be a whole number, 0 to {MAX_STOCK} - send {{"stock": 100}} or no body.',
        )
    store.reset(stock)
    return {"success": True, "message": f"Inventory reset to {stock} units", "current_stock": stock}


def health(store: Store, http: Request) -> ResponseReturnValue:
    store.check()
    return {"status": "ok"}


def audit(store: Store, http: Request) -> ResponseReturnValue:
    counted = store.audit()
    return counted._asdict() | {"consistent": counted.consistent}  # type: ignore[no-any-return]


def metrics(store: Store, http: Request) -> ResponseReturnValue:
    now = store.inventory()
    gauges = {
        "stock": ("Units left to sell.", now.current_stock),
        "sold": ("Units sold.", now.total_purchases),
        "initial_stock": ("Units at the start of the sale.", now.initial_stock),
    }
    lines = [
        f"# HELP flash_sale_{name} {text}\n# TYPE flash_sale_{name} gauge\nflash_sale_{name} {value}\n"
        for name, (text, value) in gauges.items()
    ]
    return Response("".join(lines), content_type="text/plain; version=0.0.4; charset=utf-8")


def openapi(store: Store, http: Request) -> ResponseReturnValue:
    return Response(OPENAPI.read_bytes(), content_type="application/json")


def docs(store: Store, http: Request) -> ResponseReturnValue:
    return cast(ResponseReturnValue, current_app.view_functions["swagger_ui.show"]())


ROUTES: dict[str, tuple[Callable[[Store, Request], ResponseReturnValue], str]] = {
    "GET /": (describe, "What this service is and offers"),
    "POST /buy_ticket": (buy_ticket, "Purchase a ticket"),
    "GET /inventory": (inventory, "Current stock and number of purchases"),
    "POST /reset": (reset, "For testing only: forget all purchases, refill the stock"),
    "GET /health": (health, "Whether a purchase could be made now"),
    "GET /audit": (audit, "Purchase records counted row by row, against the stock"),
    "GET /metrics": (metrics, "Stock, sold and initial stock for Prometheus"),
    "GET /openapi.json": (openapi, "The description of this service as OpenAPI 3.1"),
    "GET /docs": (docs, "A page to try this service, made from its description"),
}


# ---- What a request may be


def customer_id_of(http: Request) -> str:
    customer_id = json_object_of(http).get("customer_id", "guest")
    if not isinstance(customer_id, str) or not CUSTOMER_ID.fullmatch(customer_id):
        abort(
            400, "customer_id has to be a string of 1 to 128 characters without control characters."
        )
    return customer_id


def idempotency_key_of(http: Request) -> str | None:
    key = http.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        abort(400, "Idempotency-Key has to be 1 to 255 visible ASCII characters, without spaces.")
    return key


def json_object_of(http: Request) -> dict[str, Any]:
    """The body; {} if there is none."""
    body = read_body(http)
    if not body:
        return {}
    if (
        http.environ.get("CONTENT_TYPE") != "application/json"
        and http.mimetype != "application/json"
    ):
        abort(415, "The body has to be JSON - send the header Content-Type: application/json.")
    try:
        value = parse_json(body)
    except ValueError:  # not UTF-8, not JSON, NaN, a 5,000-digit number, nested too deep
        abort(
            400,
            'The body is not valid JSON in UTF-8 - send an object such as {"customer_id": "c1"}.',
        )
    if not isinstance(value, dict):
        abort(400, 'The body has to be a JSON object - send for example {"customer_id": "c1"}.')
    return value


def read_body(http: Request) -> bytes:
    """Headers are read from the environment: Werkzeug's properties cost more than a SELECT (NOTES)."""
    if "HTTP_TRANSFER_ENCODING" in http.environ:
        abort(411, "A chunked body is not accepted - send the body with a Content-Length.")
    try:
        announced = int(http.environ.get("CONTENT_LENGTH") or 0)  # bytes
    except ValueError:
        announced = -1
    if announced < 0:
        abort(400, "Content-Length has to be a whole number of bytes.")
    if announced > MAX_BODY_BYTES:
        abort(413, f"The body is too large - send at most {MAX_BODY_BYTES} bytes.")
    try:
        body = http.get_data()
    except OSError:  # the client is gone
        body = b""
    if len(body) < announced:  # gunicorn hands on whatever came (RFC 9112, 8)
        abort(400, "The body ended before its Content-Length - send all of it.")
    return body


def parse_json(body: bytes) -> Any:
    """Raises ValueError. Python's own limit of nesting differs by version; in some it is the stack's end."""
    text = body.decode()
    if text.count("{") + text.count("[") > MAX_NESTING:
        steps = (1 if bracket in "{[" else -1 for bracket in BRACKET.findall(STRING.sub("", text)))
        if max(accumulate(steps), default=0) > MAX_NESTING:
            raise ValueError("nested too deep")
    return JSON_DECODER.decode(text)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


JSON_DECODER = json.JSONDecoder(parse_constant=refuse_constant)
JSON_ENCODER = json.JSONEncoder(separators=(",", ":"))


# ---- What is answered

HINTS = {
    404: "There is nothing at this path - GET / lists the endpoints.",
    405: "This path takes other methods - the header Allow lists them, GET / what they do.",
    500: "Something failed here - if it was a purchase, repeat it with the same Idempotency-Key.",
}
# 410 and 503: RFC 9110, 15.5.11 and 15.6.4; 422: the IETF draft on the Idempotency-Key header, 2.7.
STATUS_BY_ERROR = {
    db.SoldOut: 410,
    db.Busy: 503,
    db.KeyReused: 422,
    db.Unavailable: 503,
    db.OutcomeUnknown: 500,
}


def json_response(
    body: dict[str, Any], status: int, headers: dict[str, str] | None = None
) -> Response:
    """As Flask answers with a dict, for less."""
    return Response(
        JSON_ENCODER.encode(body) + "\n", status, headers, content_type="application/json"
    )


def store_error_response(error: type[db.StoreError]) -> Response:
    status = STATUS_BY_ERROR[error]
    body = {"success": False, "message": error.message} | (
        {"remaining_stock": 0} if status == 410 else {}
    )
    return json_response(body, status, {"Retry-After": "1"} if status == 503 else None)


STORE_ERROR_RESPONSES = {
    error: store_error_response(error) for error in STATUS_BY_ERROR
}  # each always the same


def answer_store_error(error: db.StoreError) -> Response:
    if not isinstance(error, db.SoldOut | db.KeyReused):
        log.error("%s %s: %s: %s", request.method, request.path, type(error).__name__, error)
    return STORE_ERROR_RESPONSES[type(error)]


def answer_http_error(error: HTTPException) -> ResponseReturnValue:
    """Werkzeug's answer with its status and headers, as JSON.

    What is left of the body is read first: closing a connection on unread bytes resets it, and the
    client would lose the answer.
    """
    with suppress(Exception):  # a bad chunk, or the client is gone: there is nothing more to read
        for _ in range(MAX_DISCARD_BYTES // 65536):
            if not request.stream.read(65536):
                break
    response = error.get_response()
    message = HINTS.get(response.status_code, error.description)
    response.set_data(JSON_ENCODER.encode({"success": False, "message": message}) + "\n")
    response.content_type = "application/json"
    return cast(Response, response)


# ---- The app


def open_store(url: str, *settings: Any) -> Store:
    """The store that `url` names; nothing is opened yet. Raises ConfigError."""
    if url.startswith(("postgresql://", "postgres://")):
        try:
            from postgres.store import PostgresStore
        except ImportError as error:
            raise ConfigError(f"DATABASE_URL needs postgres/requirements.txt ({error})") from error
        return PostgresStore(url, *settings)
    scheme, _, path = url.partition(":///")
    if scheme != "sqlite" or path in ("", ":memory:"):
        raise ConfigError(
            "DATABASE_URL must be sqlite:///relative/path or sqlite:////absolute/path"
        )
    return db.SQLiteStore(Path(path).resolve(), *settings)  # SQLite puts the WAL where a link leads


def create_app(**config: Any) -> Flask:
    """The Flask app on its store; `config` goes before the environment. Raises ConfigError, db.StoreError."""
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(config, **read_config(**config))
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # its 200 isn't JSON
    app.url_map.merge_slashes = False  # /docs//x is a 404 in JSON, not a redirect in HTML
    app.json.sort_keys = False  # type: ignore[attr-defined]
    names = ("DATABASE_URL", "ITEM_NAME", "INITIAL_STOCK", "LOCK_TIMEOUT")
    app.extensions["store"] = store = open_store(*(app.config[name] for name in names))
    for endpoint, (view, _) in ROUTES.items():
        method, path = endpoint.split()
        # The request without Flask's proxy: each look through it costs as much as a SELECT of the stock.
        handler = lambda view=view: view(store, request._get_current_object())
        app.add_url_rule(path, endpoint, handler, methods=[method])
    ui = {
        "app_name": "Flash Sale",
        "oauth2RedirectUrl": "",
        "validatorUrl": None,
    }  # else it asks other hosts
    app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.json", ui))
    app.register_error_handler(db.StoreError, answer_store_error)
    app.register_error_handler(HTTPException, answer_http_error)
    app.wsgi_app = with_security_headers(app.wsgi_app)  # type: ignore[method-assign]
    app.cli.command("init-db", help="Create the database, if it isn't there.")(
        partial(print_inventory, store)
    )
    app.cli.command("audit", help="Count the purchases; exit status 1 if they don't add up.")(
        partial(print_audit, store)
    )
    store.create()
    return app


def print_inventory(store: Store) -> None:
    now = store.inventory()
    click.echo(f"{now.item_name}: {now.current_stock} of {now.initial_stock} units left")


def print_audit(store: Store) -> None:
    counted = store.audit()
    click.echo(json.dumps(counted._asdict() | {"consistent": counted.consistent}))
    sys.exit(not counted.consistent)


def start() -> Flask:
    """The app that this process serves; what keeps it from starting is one line and no traceback."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s"
    )
    try:
        return create_app()
    except (ConfigError, db.StoreError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        sys.exit(4)  # gunicorn's "the app can't be loaded": it doesn't try again


def __getattr__(name: str) -> Flask:
    """`app`, made when gunicorn or flask asks for it: a mere `import app` opens nothing."""
    if name != "app":
        raise AttributeError(name)
    globals()[name] = start()
    return cast(Flask, globals()[name])


if __name__ == "__main__":
    local.allow_reset_on_loopback()
    local.serve(start())
