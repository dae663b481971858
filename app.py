"""Flash sale inventory service: many buyers, little stock, one moment; each unit is sold exactly once.

HTTP only: the routes, what a request may be, which status an outcome gets. Each sale is decided by
the database, in db.py. `python app.py` serves a local demo, `gunicorn app:app` a real sale.
"""

import importlib.util
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, cast

import click
from flask import Flask, Request, Response, abort, current_app, request
from flask.typing import ResponseReturnValue
from flask_swagger_ui import get_swaggerui_blueprint  # type: ignore[import-untyped]
from werkzeug.exceptions import HTTPException
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler, make_server

import db

VERSION = "1.0.0"
FOLDER = Path(__file__).parent

MAX_BODY_BYTES = 16 * 1024
MAX_DISCARD_BYTES = 8 * 1024 * 1024  # of a refused body, read so that its sender gets to see the answer
MAX_STOCK = 1_000_000_000
MAX_NESTING = 100
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?'), re.compile(r"[][{}]")
CUSTOMER_ID = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}")
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

log = logging.getLogger(__name__)


def describe() -> ResponseReturnValue:
    """What this service is and offers"""
    return {
        "service": "Flash Sale Inventory Service",
        "version": VERSION,
        "endpoints": {endpoint: view.__doc__ for endpoint, view in ROUTES.items()},
        "concurrency_model": _store().concurrency_model,
        "guarantees": [
            "each unit is sold exactly once: no overselling, no underselling",
            "200 means sold and on disk",
            "410 and 503 mean not sold, and leave nothing behind",
            "the same Idempotency-Key never buys twice",
        ],
    }


def buy_ticket() -> ResponseReturnValue:
    """Purchase a ticket"""
    http = _request()
    purchase = _store().buy(_customer_id(http), _idempotency_key(http))
    body = {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": purchase.remaining_stock,
        "purchase_id": purchase.purchase_id,
    }
    return _json(body, 200, {"Idempotent-Replayed": "true"} if purchase.replayed else None)


def inventory() -> ResponseReturnValue:
    """Current stock and number of purchases"""
    return _store().inventory()._asdict()


def reset() -> ResponseReturnValue:
    """For testing only: forget all purchases, refill the stock"""
    if not current_app.config["ALLOW_RESET"]:
        abort(403, "Reset is switched off - start the service with ALLOW_RESET=1 to allow it.")
    stock = _json_object(_request()).get("stock", current_app.config["INITIAL_STOCK"])
    if type(stock) is not int or not 0 <= stock <= MAX_STOCK:
        abort(400, f'stock has to be a whole number, 0 to {MAX_STOCK} - send {{"stock": 100}} or no body.')
    _store().reset(stock)
    return {"success": True, "message": f"Inventory reset to {stock} units", "current_stock": stock}


def health() -> ResponseReturnValue:
    """Whether a purchase could be made now"""
    _store().check()
    return {"status": "ok"}


def audit() -> ResponseReturnValue:
    """Purchase records counted row by row, against the stock"""
    counted = _store().audit()
    return counted._asdict() | {"consistent": counted.consistent}


def metrics() -> ResponseReturnValue:
    """Stock, sold and initial stock for Prometheus"""
    now = _store().inventory()
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


def openapi() -> ResponseReturnValue:
    """The description of this service as OpenAPI 3.1"""
    return Response((FOLDER / "static" / "openapi.json").read_bytes(), content_type="application/json")


def docs() -> ResponseReturnValue:
    """A page to try this service, made from its description"""
    return cast(ResponseReturnValue, current_app.view_functions["swagger_ui.show"]())


def _store() -> "db.Store":
    return current_app._get_current_object().extensions["store"]  # type: ignore[attr-defined, no-any-return]


def _request() -> Request:
    """Without Flask's proxy: each attribute through one costs as much as a SELECT of the stock (NOTES)."""
    return request._get_current_object()  # type: ignore[attr-defined, no-any-return]


def _customer_id(http: Request) -> str:
    customer_id = _json_object(http).get("customer_id", "guest")
    if not isinstance(customer_id, str) or not CUSTOMER_ID.fullmatch(customer_id):
        abort(400, "customer_id has to be a string of 1 to 128 characters without control characters.")
    return customer_id


def _idempotency_key(http: Request) -> str | None:
    key = http.environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is not None and not IDEMPOTENCY_KEY.fullmatch(key):
        abort(400, "Idempotency-Key has to be 1 to 255 visible ASCII characters, without spaces.")
    return key


def _json_object(http: Request) -> dict[str, Any]:
    """The body. Its headers are read from the environment: Werkzeug's properties cost more than a SELECT."""
    environ = http.environ
    if "HTTP_TRANSFER_ENCODING" in environ:
        abort(411, "A chunked body is not accepted - send the body with a Content-Length.")
    try:
        announced = int(environ.get("CONTENT_LENGTH") or 0)  # bytes
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
    if not body:
        return {}
    if environ.get("CONTENT_TYPE") != "application/json" and http.mimetype != "application/json":
        abort(415, "The body has to be JSON - send the header Content-Type: application/json.")
    try:
        text = body.decode()
        _refuse_deep_nesting(text)
        value = DECODER.decode(text)
    except ValueError:  # not UTF-8, not JSON, NaN, a 5,000-digit number, nested too deep
        abort(400, 'The body is not valid JSON in UTF-8 - send an object such as {"customer_id": "c1"}.')
    if not isinstance(value, dict):
        abort(400, 'The body has to be a JSON object - send for example {"customer_id": "c1"}.')
    return value


def _refuse_deep_nesting(text: str) -> None:
    """Python's own limit is another in each version, and in some it is the end of the stack."""
    if text.count("{") + text.count("[") > MAX_NESTING:
        depths = accumulate(1 if bracket in "{[" else -1 for bracket in BRACKET.findall(STRING.sub("", text)))
        if max(depths, default=0) > MAX_NESTING:
            raise ValueError("nested too deep")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)

ENCODER = json.JSONEncoder(separators=(",", ":"))

# No answer may be stored (a 410 is cacheable by default: RFC 9110, 15.5.11) or taken for another type.
PROTECTION = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
HINTS = {
    404: "There is nothing at this path - GET / lists the endpoints.",
    405: "This path takes other methods - the header Allow lists them, GET / what they do.",
    500: "Something failed here - if it was a purchase, repeat it with the same Idempotency-Key.",
}


def _json(body: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> Response:
    """As Flask answers with a dict, for less: where the time counts."""
    return Response(ENCODER.encode(body) + "\n", status, headers, content_type="application/json")


def _refusal(error: type[db.StoreError], status: int) -> Response:
    body = {"success": False, "message": error.__doc__} | ({"remaining_stock": 0} if status == 410 else {})
    return _json(body, status, {"Retry-After": "1"} if status == 503 else None)


# What a refusal of the store means in HTTP.
# 410 and 503: RFC 9110, 15.5.11 and 15.6.4; 422: the IETF draft on the Idempotency-Key header, 2.7.
STATUSES = {db.SoldOut: 410, db.Busy: 503, db.KeyReused: 422, db.Unavailable: 503, db.OutcomeUnknown: 500}
# Made once, as each is always the same: sending doesn't change it.
REFUSALS = {error: _refusal(error, status) for error, status in STATUSES.items()}


def refuse(error: db.StoreError) -> Response:
    if not isinstance(error, db.SoldOut | db.KeyReused):
        log.error("%s %s: %s: %s", request.method, request.path, type(error).__name__, error)
    return REFUSALS[type(error)]


def refuse_request(error: HTTPException) -> ResponseReturnValue:
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
    response.set_data(ENCODER.encode({"success": False, "message": message}) + "\n")
    response.content_type = "application/json"
    return cast(Response, response)


def protect(wsgi_app: Any) -> Any:
    """Add PROTECTION to every answer, around Flask: cheaper than after_request, and nothing gets past it."""

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        environ["PATH_INFO"] = environ.get("PATH_INFO") or "/"  # of http://host: RFC 9110, 4.2.3
        return wsgi_app(
            environ, lambda status, headers, *error: start_response(status, headers + PROTECTION, *error)
        )

    return serve


ROUTES: dict[str, Callable[[], ResponseReturnValue]] = {
    "GET /": describe,
    "POST /buy_ticket": buy_ticket,
    "GET /inventory": inventory,
    "POST /reset": reset,
    "GET /health": health,
    "GET /audit": audit,
    "GET /metrics": metrics,
    "GET /openapi.json": openapi,
    "GET /docs": docs,
}
# Without the last two the page would hold the request's Host, and ask another host to validate.
DOCS_CONFIG = {"app_name": "Flash Sale", "oauth2RedirectUrl": "", "validatorUrl": None}


# The configuration: defaults, and the lowest and highest value that make sense. See .env.example.
TEXTS = {
    "DATABASE_URL": "sqlite:///inventory.db",
    "ITEM_NAME": "Item A - Concert Ticket",
    "HOST": "127.0.0.1",
}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
NUMBERS = {
    "INITIAL_STOCK": (100, 0, MAX_STOCK),
    "LOCK_TIMEOUT": (5.0, 0, 3600),
    "ALLOW_RESET": (0, 0, 1),
    "PORT": (8000, 1, 65535),
    "WEB_CONCURRENCY": (min(max(2, os.cpu_count() or 1), 8), 1, 256),
}


class ConfigError(ValueError):
    """A variable of the configuration has a value that makes no sense."""


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration from environment variables; an empty one counts as unset. Raises ConfigError."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    config: dict[str, Any] = {}
    for name, text in TEXTS.items():
        config[name] = str(given.get(name, text))
        if any("\ud800" <= character <= "\udfff" for character in config[name]):
            raise ConfigError(f"{name} has to be text in UTF-8, not {config[name]!a}")
    for name, (default, lowest, highest) in NUMBERS.items():
        value = given.get(name, default)
        try:
            config[name] = type(default)(value)
        except (TypeError, ValueError):
            config[name] = None
        if config[name] is None or not lowest <= config[name] <= highest:
            kind = "a whole number" if type(default) is int else "a number"
            raise ConfigError(f"{name} has to be {kind} from {lowest} to {highest}, not {value!r}")
    return config


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """The Flask app on its store; `config` goes before the environment.

    Raises ConfigError for a value that makes no sense, db.StoreError if the database can't be used.
    """
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(config or {}, **read_config({**os.environ, **(config or {})}))
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # its 200 isn't JSON
    app.url_map.merge_slashes = False  # /docs//x is a 404 in JSON, not a redirect in HTML
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for endpoint, view in ROUTES.items():
        method, path = endpoint.split()
        app.add_url_rule(path, view_func=view, methods=[method])
    app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.json", DOCS_CONFIG))
    app.wsgi_app = protect(app.wsgi_app)  # type: ignore[method-assign]
    app.register_error_handler(db.StoreError, refuse)
    app.register_error_handler(HTTPException, refuse_request)
    app.cli.command("init-db")(init_db_command)
    app.cli.command("audit")(audit_command)
    names = ("DATABASE_URL", "ITEM_NAME", "INITIAL_STOCK", "LOCK_TIMEOUT")
    try:
        app.extensions["store"] = store = db.open_store(*(app.config[name] for name in names))
    except ValueError as error:
        raise ConfigError(f"DATABASE_URL {error}") from error
    store.create()
    return app


def start() -> Flask:
    """The app that this process serves; what keeps it from starting is one line and no traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s")
    try:
        return create_app()
    except (ConfigError, db.StoreError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        sys.exit(4)  # gunicorn's "the app can't be loaded": it doesn't try again


def init_db_command() -> None:
    """Create the database, if it isn't there."""
    now = _store().inventory()
    click.echo(f"{now.item_name}: {now.current_stock} of {now.initial_stock} units left")


def audit_command() -> None:
    """Count the purchases; exit status 1 if they don't add up."""
    counted = _store().audit()
    click.echo(json.dumps(counted._asdict() | {"consistent": counted.consistent}))
    sys.exit(not counted.consistent)


BANNER = """\
============================================================
FLASH SALE INVENTORY SERVICE
============================================================
Item:                {now.item_name}
Initial stock:       {now.initial_stock} units, {now.current_stock} left
Concurrency control: {store.concurrency_model}
Lock timeout:        {LOCK_TIMEOUT:g} s
URL:                 http://{address}
============================================================"""


def serve_locally() -> None:
    """`python app.py`: a banner, then gunicorn, or Flask's own threaded server where that doesn't run."""
    if (os.environ.get("HOST") or TEXTS["HOST"]) in LOOPBACK:
        os.environ["ALLOW_RESET"] = os.environ.get("ALLOW_RESET") or "1"
    app = start()
    host, port = app.config["HOST"], app.config["PORT"]
    _require_free_port(host, port)
    store = app.extensions["store"]
    print(BANNER.format(**app.config, address=address(app), store=store, now=store.inventory()), flush=True)
    if os.name == "posix" and importlib.util.find_spec("gunicorn"):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
        conf = str(FOLDER / "gunicorn.conf.py")
        os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "--config", conf, "app:app"])  # noqa: S606
    server = cast(
        ThreadedWSGIServer, make_server(host, port, app, threaded=True, request_handler=RequestHandler)
    )
    server.daemon_threads = False  # requests in flight are answered before the process ends
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.serve_forever()


def address(app: Flask) -> str:
    host, port = app.config["HOST"], app.config["PORT"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class RequestHandler(WSGIRequestHandler):
    error_content_type = "application/json"  # of what it can't parse
    error_message_format = '{"success":false,"message":"Status %(code)d - send a valid HTTP/1.1 request"}\n'

    def version_string(self) -> str:
        return "flash-sale"  # not the versions of Werkzeug and Python


def _require_free_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, TypeError, ValueError) as error:  # the latter for what can't be a host's name
        print(f"Cannot start: {error} - set HOST or PORT", file=sys.stderr)
        sys.exit(1)


if (FOLDER / ".env").exists():
    try:
        importlib.import_module("dotenv").load_dotenv(FOLDER / ".env")
    except ImportError:
        print(".env is not read - pip install python-dotenv, or set the variables", file=sys.stderr)

if __name__ == "__main__":
    serve_locally()
else:
    app = start()
