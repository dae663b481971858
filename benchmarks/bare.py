"""The yardstick: a Flask route that only parses the same body and returns as much JSON."""

from types import SimpleNamespace

from flask import Flask, request
from flask.typing import ResponseReturnValue

app = Flask(__name__)
# What gunicorn.conf.py asks of an app: a store to create, and whether to serve metrics elsewhere.
app.extensions["store"] = SimpleNamespace(create=lambda: None)
app.config.update(HOST="127.0.0.1", METRICS_PORT=None)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = request.get_json()["customer_id"]
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": 999_999_999,
        "purchase_id": len(customer_id),
    }
