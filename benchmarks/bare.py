"""The yardstick: a Flask route that only parses the same body and returns as much JSON."""

from types import SimpleNamespace

from flask import Flask, request
from flask.typing import ResponseReturnValue


def make_subject(name: str) -> Flask:
    """An app with what gunicorn.conf.py asks of one: a store to create, no port for metrics."""
    app = Flask(name)
    store = SimpleNamespace(create=lambda: None, close=lambda: None, stopped="")
    app.extensions["store"] = store
    app.config.update(HOST="127.0.0.1", METRICS_PORT=None, SALE_STARTS_AT=None)
    return app


app = make_subject(__name__)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = request.get_json()["customer_id"]
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": 999_999_999,
        "purchase_id": len(customer_id),
    }
