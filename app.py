"""Flash sale inventory service: many buyers, little stock, one moment; each unit is sold once.

This file is the edge: the routes, which status an outcome gets, two commands. The database decides
each sale (db.py). `python app.py` serves a demo, `gunicorn app:app` a real sale.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import click
from flask import Flask, Request, Response, abort, current_app
from flask import request as request_proxy
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

import db
from serving import buyers, json_bodies, metrics, opening, pages, watch
from serving.config import ConfigError, read_config, sqlite_file, unknown_variables
from serving.headers import (
    idempotency_key_of,
    may_reset,
    require_plain_request,
    with_security_headers,
)
from serving.json_bodies import customer_id_of, json_response, stock_of
from serving.starting import cannot_start, require_own_settings

VERSION = "1.0.0"
OPENAPI = Path(__file__).resolve().with_name("serving") / "openapi.json"

MAX_DISCARDED_BYTES = 8 * 1024 * 1024  # of a refused body; see answer_http_error

log = logging.getLogger(__name__)
Store = Any  # db.SQLiteStore or postgres.store.PostgresStore: the same verbs
View = Callable[["Store", Request], ResponseReturnValue]


# ---- Routes


def buy_ticket(store: Store, request: Request) -> ResponseReturnValue:
    purchase = store.buy(
        customer_id_of(request),
        idempotency_key_of(request.environ),
        functools.partial(buyers.is_there, request.environ),
    )
    return purchase_response(purchase)


def purchase_response(purchase: db.Purchase) -> Response:
    watch.sold(purchase.remaining_stock, purchase.replayed)
    body = {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": purchase.remaining_stock,
        "purchase_id": purchase.purchase_id,
    }
    headers = {"Idempotent-Replayed": "true"} if purchase.replayed else None
    return json_response(body, 200, headers)


def replay(store: Store, request: Request) -> Response | None:
    """What buy_ticket answers to a key that has bought; None to all others."""
    customer_id, key = customer_id_of(request), idempotency_key_of(request.environ)
    purchase = None if key is None else store.find(customer_id, key)
    return None if purchase is None else purchase_response(purchase)


def inventory(store: Store, request: Request) -> ResponseReturnValue:
    return json_response(store.inventory()._asdict(), 200)


def reset(store: Store, request: Request) -> ResponseReturnValue:
    config = current_app.config
    if not may_reset(config["ALLOW_RESET"], request.environ):
        abort(403, "Reset is switched off - start the service with ALLOW_RESET=1 to allow it.")
    stock = stock_of(request, config["INITIAL_STOCK"])
    store.reset(stock)
    watch.restocked(stock)
    message = f"Inventory reset to {stock} units"
    return {"success": True, "message": message, "current_stock": stock}


def health(store: Store, request: Request) -> ResponseReturnValue:
    store.check()
    return {"status": "ok"}


def audit(store: Store, request: Request) -> ResponseReturnValue:
    return audit_as_dict(store)


def show_metrics(store: Store, request: Request) -> ResponseReturnValue:
    if current_app.config["METRICS_PORT"] and metrics.instruments().folder:
        abort(404)  # a process of its own serves them
    text, content_type = metrics.exposition(store)
    return Response(text, content_type=content_type)


def openapi(store: Store, request: Request) -> ResponseReturnValue:
    return Response(OPENAPI.read_bytes(), content_type="application/json")


def docs(store: Store, request: Request) -> ResponseReturnValue:
    return pages.answer("docs.html")


def sale(store: Store, request: Request) -> ResponseReturnValue:
    return pages.answer("sale.html")


def describe(store: Store, request: Request) -> ResponseReturnValue:
    return {
        "service": "Flash Sale Inventory Service",
        "version": VERSION,
        "endpoints": {endpoint: summary for endpoint, (_, summary) in ROUTES.items()},
        "concurrency_model": store.concurrency_model,
        "guarantees": [
            "each unit is sold exactly once: no overselling, no underselling",
            "200 means sold and on disk",
            "410 and 503 mean that this attempt sold nothing, and leave nothing behind",
            "the same Idempotency-Key never buys twice",
        ],
    }


ROUTES: dict[str, tuple[View, str]] = {
    "GET /": (describe, "What this service is and offers"),
    "POST /buy_ticket": (buy_ticket, "Purchase a ticket"),
    "GET /inventory": (inventory, "Current stock and number of purchases"),
    "GET /sale": (sale, "A page to buy on, and to watch the stock"),
    "POST /reset": (reset, "For testing only: forget all purchases, refill the stock"),
    "GET /health": (health, "Whether a purchase could be made now"),
    "GET /audit": (audit, "Purchase records counted row by row, against the stock"),
    "GET /metrics": (show_metrics, "Figures for Prometheus; on METRICS_PORT, where that is set"),
    "GET /openapi.json": (openapi, "The description of this service as OpenAPI 3.1"),
    "GET /docs": (docs, "A page to try this service, made from its description"),
}


# ---- What is answered

HINTS = {
    404: "There is nothing at this path - GET / lists the endpoints.",
    405: "This path takes other methods - the header Allow lists them, GET / what they do.",
    500: f"Something failed here, a purchase may have been stored - {db.WITH_A_KEY}",
}
# 410 and 503: RFC 9110, 15.5.11 and 15.6.4. 422: the IETF draft on the Idempotency-Key header, 2.7.
STATUS_BY_ERROR = {
    db.SoldOut: 410,
    db.KeyReused: 422,
    db.OutcomeUnknown: 500,
    db.Busy: 503,
    db.BuyerGone: 503,
    db.Unavailable: 503,
    db.RestartNeeded: 503,
}


def store_error_response(error: type[db.StoreError]) -> Response:
    status = STATUS_BY_ERROR[error]
    body: dict[str, Any] = {"success": False, "message": error.message}
    if status == 410:
        body["remaining_stock"] = 0
    return json_response(body, status, {"Retry-After": "1"} if status == 503 else None)


# Each is always the same, so it is made once.
STORE_ERROR_RESPONSES = {error: store_error_response(error) for error in STATUS_BY_ERROR}


def answer_http_error(error: HTTPException) -> ResponseReturnValue:
    """Werkzeug's answer with its status and headers, as JSON.

    The rest of the body is read first. Closing a connection on unread bytes resets it, and the
    client would lose the answer.
    """
    with suppress(Exception):  # a bad chunk, or the client is gone: there is nothing more to read
        for _ in range(MAX_DISCARDED_BYTES // 65536):
            if not request_proxy.stream.read(65536):
                break
    response = cast(Response, error.get_response())
    message = HINTS.get(response.status_code, error.description)
    if response.status_code == 500 and request_proxy.method != "POST":
        message = "Something failed here - the log of the service has the cause."
    response.set_data(json_bodies.encode({"success": False, "message": message}) + "\n")
    response.content_type = "application/json"
    return response


# ---- The app


def open_store(url: str, *sale: Any, pool: Sequence[Any] = ()) -> Store:
    """The store that `url` names, which opens nothing yet; only PostgreSQL's has a pool.

    `sale` is the item's name, the initial stock, the lock timeout in seconds. Raises ConfigError.
    """
    if url.startswith(("postgresql://", "postgres://")):
        try:
            from postgres.store import PostgresStore
        except ImportError as error:
            needs = "needs pip install -r postgres/requirements.txt"
            raise ConfigError(f"DATABASE_URL {needs} ({error})") from error
        return PostgresStore(url, *sale, *pool)
    return db.SQLiteStore(sqlite_file(url), *sale)


def create_app(**config: Any) -> Flask:
    """The Flask app on its store; `config` goes before the environment.

    Raises ConfigError for a value that makes no sense, db.StoreError if the database can't be used.
    """
    app = Flask(__name__, static_folder=None)
    app.config.from_mapping(config, **read_config(**config))
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # its 200 isn't JSON
    app.url_map.merge_slashes = False  # /docs//x is a 404 in JSON, not a redirect in HTML
    app.json.sort_keys = False  # type: ignore[attr-defined]
    sale = [app.config[name] for name in ("ITEM_NAME", "INITIAL_STOCK", "LOCK_TIMEOUT")]
    pool = [app.config[name] for name in ("DB_POOL_SIZE", "DB_POOL_TIMEOUT")]
    app.extensions["store"] = store = open_store(app.config["DATABASE_URL"], *sale, pool=pool)
    routes = {endpoint: view for endpoint, (view, _) in ROUTES.items()}
    if opens_at := app.config["SALE_STARTS_AT"]:
        routes["POST /buy_ticket"] = opening.buy_from(opens_at, buy_ticket, replay)
        routes["GET /inventory"] = opening.inventory_until(opens_at)
    for endpoint, view in routes.items():
        method, path = endpoint.split()
        app.add_url_rule(path, endpoint, on_store(view, store), methods=[method])
    app.add_url_rule("/docs/<name>", view_func=pages.swagger_file)
    app.register_error_handler(HTTPException, answer_http_error)
    observe = metrics.observer({endpoint.split()[1] for endpoint in ROUTES})
    app.wsgi_app = with_security_headers(app.wsgi_app, observe)  # type: ignore[method-assign]
    add_commands(app, store)
    if not flask_looks_for_a_command():  # init-db creates it itself, audit never does
        store.create()
        watch.begin(store, [error.__name__ for error in STATUS_BY_ERROR])
    return app


def flask_looks_for_a_command() -> bool:
    """Whether flask's command line loads the app to find a command; `flask run` is one itself."""
    context = click.get_current_context(silent=True)
    return context is not None and isinstance(context.command, click.Group)


def on_store(view: View, store: Store) -> Callable[[], ResponseReturnValue]:
    """The view with the request itself, and what the store's refusals are answered with.

    Flask's proxy costs as much as a SELECT, and so does its search for an error handler.
    """

    def answer() -> ResponseReturnValue:
        request = request_proxy._get_current_object()  # type: ignore[attr-defined]
        require_plain_request(request.environ)
        try:
            return view(store, request)
        except db.StoreError as error:
            watch.trouble(error, request)
            return STORE_ERROR_RESPONSES[type(error)]

    return answer


def add_commands(app: Flask, store: Store) -> None:
    @app.cli.command("init-db", help="Create the database, if it isn't there.")
    def init_db() -> None:
        with one_line_for_a_failure():
            store.create()
            offer = watch.offer(store)
        click.echo(offer)

    @app.cli.command("audit", help="Count the purchases; exit status 1 if they don't add up.")
    def audit_command() -> None:
        with one_line_for_a_failure():
            counted = audit_as_dict(store)
        click.echo(f"In {store}", err=True)
        click.echo(json.dumps(counted))
        sys.exit(not counted["consistent"])


def audit_as_dict(store: Store) -> dict[str, Any]:
    counted = store.audit()
    return {**counted._asdict(), "consistent": counted.consistent}


@contextmanager
def one_line_for_a_failure() -> Iterator[None]:
    try:
        yield
    except (ConfigError, db.StoreError) as error:
        cannot_start(error)


def app_or_exit() -> Flask:
    """The app that this process serves."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s"
    )
    for handler in logging.root.handlers:
        handler.addFilter(watch.stderr_takes_a_line)
    require_own_settings()
    with one_line_for_a_failure():
        for line in unknown_variables():
            log.warning(line)
        return create_app()


def __getattr__(name: str) -> Flask:
    """`app`, made when gunicorn or flask asks for it: a mere `import app` opens nothing."""
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = app_or_exit()
    return app


if __name__ == "__main__":
    from serving import local

    sys.modules["app"] = sys.modules["__main__"]  # what gunicorn imports, whatever lies elsewhere
    local.prepare()
    local.serve(__getattr__("app"))
