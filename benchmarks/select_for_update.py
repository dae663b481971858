"""The usual sale on PostgreSQL, to compare: SELECT ... FOR UPDATE, UPDATE, INSERT, COMMIT.

It takes four round trips, three of them while it holds the row lock. Tables and answers are the
service's; BEGIN is sent together with SELECT, and every statement is prepared. Start it as
`gunicorn --pythonpath benchmarks select_for_update:app` on a database that the service has created.
"""

import os
from functools import cache

import psycopg
from flask import request
from flask.typing import ResponseReturnValue

from benchmarks.bare import make_subject

SETTINGS = "-c lock_timeout=5000 -c statement_timeout=7000 -c jit=off"
FIND_STOCK = "SELECT stock FROM inventory WHERE item_id = 1"
TAKE_UNIT = """
    UPDATE inventory SET stock = %s, last_updated = clock_timestamp() WHERE item_id = 1"""
RECORD_PURCHASE = """
    INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (1, %s, %s)
    RETURNING purchase_id"""


class Shop:
    """One seller: a standing connection."""

    def __init__(self, url: str, row_lock: bool = True) -> None:
        self.connection = psycopg.connect(url, options=SETTINGS, prepare_threshold=0)
        self.find_stock = FIND_STOCK + (" FOR UPDATE" if row_lock else "")

    def buy(self, customer_id: str) -> tuple[int, int | None]:
        """The stock after the sale and the purchase's id; no id where there is nothing left."""
        with self.connection.transaction():
            (stock,) = self.connection.execute(self.find_stock).fetchone() or (0,)
            if stock <= 0:
                return 0, None
            self.connection.execute(TAKE_UNIT, (stock - 1,))
            row = self.connection.execute(RECORD_PURCHASE, (customer_id, stock - 1)).fetchone()
            return stock - 1, row[0] if row else None


@cache
def shop() -> Shop:
    """Of this worker: made after the fork."""
    return Shop(os.environ["DATABASE_URL"])


def answer(stock: int, purchase_id: int | None) -> ResponseReturnValue:
    if purchase_id is None:
        message = "SOLD OUT - No more inventory available"
        return {"success": False, "message": message, "remaining_stock": 0}, 410
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": stock,
        "purchase_id": purchase_id,
    }


app = make_subject(__name__)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = (request.get_json(silent=True) or {}).get("customer_id", "guest")
    return answer(*shop().buy(customer_id))
