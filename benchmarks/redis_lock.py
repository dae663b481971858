"""How many public systems sell: a Redis lock that expires, around SELECT, UPDATE, INSERT, COMMIT.

Start it as `gunicorn --pythonpath benchmarks redis_lock:app` on a database that the service has
created, with REDIS_URL. It answers what the proof asks. ROW_LOCK=0 leaves the Redis lock alone:
without SELECT ... FOR UPDATE a holder that stands still for longer than LOCK_EXPIRY_S sells a unit
that somebody else has sold meanwhile.
"""

import os
from contextlib import suppress
from functools import cache
from typing import Any

import psycopg
import redis
from flask import request
from flask.typing import ResponseReturnValue
from redis.exceptions import LockError

from benchmarks.bare import make_subject
from benchmarks.select_for_update import Shop, answer

EXPIRY_S = float(os.environ.get("LOCK_EXPIRY_S") or 20)
PATIENCE_S = 5.0
POLL_S = 0.005  # of those who wait; redis-py's own 0.1 s leaves the lock idle
HOLDER = "holder"  # a key that tells which process has the lock
BUSY = {"success": False, "message": "Server busy - please retry"}, 503, {"Retry-After": "1"}

app = make_subject(__name__)


class LockedShop:
    """One seller, with the waiting line of redis-py's Lock."""

    def __init__(self, url: str, redis_url: str, row_lock: bool = True) -> None:
        self.shop = Shop(url, row_lock)
        self.redis = redis.Redis.from_url(redis_url)

    def buy(self, customer_id: str) -> tuple[int, int | None] | None:
        """As `Shop.buy`; None where the lock wasn't had in time."""
        lock = self.redis.lock("sale", EXPIRY_S, POLL_S, blocking_timeout=PATIENCE_S)
        if not lock.acquire():
            return None
        self.redis.set(HOLDER, os.getpid())
        try:
            return self.shop.buy(customer_id)
        finally:
            with suppress(LockError):  # it has expired: somebody else may have it
                lock.release()


@cache
def shop() -> LockedShop:
    """Of this worker: made after the fork."""
    row_lock = os.environ.get("ROW_LOCK") != "0"
    return LockedShop(os.environ["DATABASE_URL"], os.environ["REDIS_URL"], row_lock)


def row(query: str) -> tuple[Any, ...]:
    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:
        return connection.execute(query.encode()).fetchone() or ()


@app.post("/buy_ticket")
def buy_ticket() -> ResponseReturnValue:
    customer_id = (request.get_json(silent=True) or {}).get("customer_id", "guest")
    sale = shop().buy(customer_id)
    return answer(*sale) if sale else BUSY


@app.get("/health")
def health() -> ResponseReturnValue:
    row("SELECT stock FROM inventory")
    return {"status": "ok"}


@app.get("/inventory")
def inventory() -> ResponseReturnValue:
    stock, initial = row("SELECT stock, initial_stock FROM inventory")
    return {"current_stock": stock, "initial_stock": initial, "total_purchases": initial - stock}


@app.get("/audit")
def audit() -> ResponseReturnValue:
    query = "SELECT initial_stock, stock, (SELECT count(*) FROM purchases) FROM inventory"
    initial, stock, records = row(query)
    return {
        "initial_stock": initial,
        "current_stock": stock,
        "purchase_records": records,
        "consistent": stock + records == initial,
    }


@app.post("/reset")
def reset() -> ResponseReturnValue:
    stock = (request.get_json(silent=True) or {}).get("stock", 100)
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        connection.execute("TRUNCATE purchases")
        connection.execute("UPDATE inventory SET stock = %s, initial_stock = %s", (stock, stock))
    return {"success": True, "message": f"Inventory reset to {stock} units", "current_stock": stock}
