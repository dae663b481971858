"""The usual sale on PostgreSQL, to compare: SELECT ... FOR UPDATE, UPDATE, INSERT, COMMIT.

It takes four round trips, three of them while it holds the row lock. Tables, pool, server settings,
prepared statements and answers are the service's; BEGIN is sent together with SELECT. Start it as
`gunicorn --pythonpath benchmarks select_for_update:app` on a database that the service has created.
"""

import os
import time

from flask import Flask, request
from flask.typing import ResponseReturnValue

from postgres.connections import Connection, Connections

LOCK_TIMEOUT_S = 5.0
LOCK_ROW = "BEGIN; SELECT stock FROM inventory WHERE item_id = 1 FOR UPDATE"  # one round trip
TAKE_UNIT = """
    UPDATE inventory SET stock = stock - 1, last_updated = clock_timestamp() WHERE item_id = 1"""
RECORD_PURCHASE = """
    INSERT INTO purchases (item_id, customer_id, remaining_stock) VALUES (1, %s, %s)
    RETURNING purchase_id"""

app = Flask(__name__)
connections = Connections(os.environ["DATABASE_URL"], LOCK_TIMEOUT_S, 4, LOCK_TIMEOUT_S)


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = (request.get_json(silent=True) or {}).get("customer_id", "guest")
    with connections.until(time.monotonic() + LOCK_TIMEOUT_S, 4, LOCK_TIMEOUT_S) as connection:
        try:
            stock, purchase_id = sell(connection, customer_id)
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
    if purchase_id is None:
        return {"success": False, "message": "SOLD OUT", "remaining_stock": 0}, 410
    return {
        "success": True,
        "message": "Purchase successful",
        "remaining_stock": stock,
        "purchase_id": purchase_id,
    }


def sell(connection: Connection, customer_id: str) -> tuple[int, int | None]:
    """The stock after the sale and the purchase's id; no id where there is nothing left."""
    cursor = connection.execute(LOCK_ROW)
    cursor.nextset()
    stock = int((cursor.fetchone() or (0,))[0])
    if stock == 0:
        return 0, None
    connection.execute(TAKE_UNIT, prepare=True)
    row = connection.execute(RECORD_PURCHASE, (customer_id, stock - 1), prepare=True).fetchone()
    return stock - 1, row[0] if row else None
