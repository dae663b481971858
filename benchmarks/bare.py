"""The yardstick: a Flask route that only parses the same body and returns as much JSON."""

from flask import Flask, request
from flask.typing import ResponseReturnValue

app = Flask(__name__)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = request.get_json()["customer_id"]
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": 999_999_999,
        "purchase_id": len(customer_id),
    }
