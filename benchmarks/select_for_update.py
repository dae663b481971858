"""The usual sale on PostgreSQL, to compare: SELECT ... FOR UPDATE, UPDATE, INSERT, COMMIT.

It takes four round trips, three of them while it holds the row lock. BEGIN is sent together with
SELECT. Tables, prepared statements and answers are the service's. Start it as
`gunicorn --pythonpath benchmarks select_for_update:app` on a database that the service has created.
"""

import os
from functools import cache
from typing import Any

import psycopg
from flask import Flask, request
from flask.typing import ResponseReturnValue
from psycopg_pool import ConnectionPool

# As the service sets them: plans that were made while the tables were empty have to stay good.
SETTINGS = (
    "-c lock_timeout=5s -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c jit=off"
)
LOCK_ROW = "BEGIN; SELECT stock FROM inventory WHERE item_id = 1 FOR UPDATE"  # one round trip
TAKE_UNIT = """
    UPDATE inventory SET stock = stock - 1, last_updated = clock_timestamp() WHERE item_id = 1"""
RECORD_PURCHASE = """
    INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (1, %s, %s)
    RETURNING purchase_id"""

app = Flask(__name__)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = (request.get_json(silent=True) or {}).get("customer_id", "guest")
    with pool().connection() as connection:  # which commits, or rolls back after an exception
        stock, purchase_id = sell(connection, customer_id)
    if purchase_id is None:
        return {"success": False, "message": "SOLD OUT", "remaining_stock": 0}, 410
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": stock,
        "purchase_id": purchase_id,
    }


@cache
def pool() -> ConnectionPool[psycopg.Connection[Any]]:
    """Opened at the first request, so that no connection crosses gunicorn's fork."""
    kwargs = {"autocommit": True, "options": SETTINGS}
    return ConnectionPool(os.environ["DATABASE_URL"], kwargs=kwargs, min_size=1, open=True)


def sell(connection: psycopg.Connection[Any], customer_id: str) -> tuple[int, int | None]:
    """The stock after the sale and the purchase's id; no id where there is nothing left."""
    cursor = connection.execute(LOCK_ROW)
    cursor.nextset()
    stock = int((cursor.fetchone() or (0,))[0])
    if stock == 0:
        return 0, None
    connection.execute(TAKE_UNIT, prepare=True)
    row = connection.execute(RECORD_PURCHASE, (customer_id, stock - 1), prepare=True).fetchone()
    return stock - 1, row[0] if row else None
