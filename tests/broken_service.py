"""A small service with one fault at a time, to see whether the proof can say no.

    python tests/broken_service.py --fault no_lock     (or BROKEN_FAULT=no_lock in the environment)

It reads DATABASE_URL (sqlite:////absolute/path), HOST, PORT and WEB_CONCURRENCY like the service
itself. So a copy of it called app.py, beside a copy of the proof, is started and killed as that is.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from flask import Flask, request
from gunicorn.app.base import BaseApplication

FAULTS = {
    "none": "an honest seller",
    "no_lock": "reads, checks and writes without a lock",
    "no_recheck": "checks before it takes the lock and not again under it",
    "refill": "fills the stock whenever a worker starts",
    "unstored": "acknowledges one sale in 200 and doesn't store it",
    "unacknowledged": "stores one sale in 200 and answers 410",
    "same_level": "tells one buyer in 200 the remaining_stock of another",
    "after_sell_out": "answers one in 200 with 200 after the sell-out",
    "stale": "answers GET /inventory from a cache",
    "sells_again": "sells again when a key is repeated",
    "forgets_keys": "forgets all keys whenever a worker starts",
    "refill_at_start": "fills the stock when the service starts",
    "two_children": "honest; a child that isn't a worker writes its process id, and ends with it",
}
ONE_IN = 200
CACHE_S = 0.25
LOCK_TIMEOUT_S = 20
SOLD_OUT = {"success": False, "message": "SOLD OUT", "remaining_stock": 0}, 410
SCHEMA = """
CREATE TABLE IF NOT EXISTS item (initial INTEGER NOT NULL, stock INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS purchase (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE, remaining INTEGER, customer TEXT
);
"""

Answer = tuple[dict[str, Any], int]
dice = (
    random.SystemRandom()
)  # workers are forked: a seeded generator would roll alike in all of them


def connect() -> sqlite3.Connection:
    path = os.environ["DATABASE_URL"].removeprefix("sqlite:///")
    return sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)


def create() -> None:
    with closing(connect()) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA)
        db.execute("INSERT INTO item SELECT 100, 100 WHERE NOT EXISTS (SELECT * FROM item)")


def stock_of(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT stock FROM item").fetchone()[0])


def store(db: sqlite3.Connection, stock: int, customer: str, key: str | None) -> Answer:
    db.execute("UPDATE item SET stock = ?", (stock - 1,))
    insert = "INSERT INTO purchase (key, remaining, customer) VALUES (?, ?, ?)"
    number = db.execute(insert, (key, stock - 1, customer)).lastrowid
    return {"success": True, "remaining_stock": stock - 1, "purchase_id": number}, 200


def buy_without_lock(db: sqlite3.Connection) -> Answer:
    stock = stock_of(db)
    return store(db, stock, "", None) if stock > 0 else SOLD_OUT


def buy(db: sqlite3.Connection, customer: str, key: str | None, fault: str) -> Answer:
    if fault == "no_lock":
        return buy_without_lock(db)
    asked = "SELECT id, remaining, customer FROM purchase WHERE key = ?"
    if fault == "no_recheck" and stock_of(db) <= 0 and not db.execute(asked, (key,)).fetchone():
        return SOLD_OUT
    unlucky = dice.randrange(ONE_IN) == 0
    db.execute("BEGIN IMMEDIATE")
    known = db.execute(asked, (key,)).fetchone()
    stock = stock_of(db)
    if known and known[2] != customer:
        answer: Answer = {"success": False, "message": "another customer's key"}, 422
    elif known and fault != "sells_again":
        answer = {"success": True, "remaining_stock": known[1], "purchase_id": known[0]}, 200
    elif stock <= 0 and fault != "no_recheck":
        answer = SOLD_OUT
        if unlucky and fault == "after_sell_out":
            answer = {"success": True, "remaining_stock": 0, "purchase_id": 1_000_000}, 200
    else:
        answer = store(db, stock, customer, None if known else key)
        if unlucky and fault == "same_level":
            answer[0]["remaining_stock"] += 1
    stored = answer[1] == 200 and not known
    db.execute("ROLLBACK" if stored and unlucky and fault == "unstored" else "COMMIT")
    return SOLD_OUT if stored and unlucky and fault == "unacknowledged" else answer


def start(fault: str) -> None:
    """What some sellers do each time they start."""
    if fault in ("refill", "forgets_keys"):
        with closing(connect()) as db:
            refill = "UPDATE item SET stock = initial"
            db.execute(refill if fault == "refill" else "UPDATE purchase SET key = NULL")


def create_app(fault: str) -> Flask:
    app = Flask(__name__)
    cache: dict[str, Any] = {"until": 0.0}
    create()
    start(fault)

    @app.get("/health")
    def health() -> Answer:
        return {"status": "ok"}, 200

    @app.post("/reset")
    def reset() -> Answer:
        stock = request.get_json()["stock"]
        with closing(connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM purchase")
            db.execute("UPDATE item SET initial = ?, stock = ?", (stock, stock))
            db.execute("COMMIT")
        return {"success": True, "current_stock": stock}, 200

    @app.post("/buy_ticket")
    def buy_ticket() -> Answer:
        with closing(connect()) as db:
            customer = request.get_json()["customer_id"]
            return buy(db, customer, request.headers.get("Idempotency-Key"), fault)

    @app.get("/inventory")
    def inventory() -> Answer:
        if fault != "stale" or time.monotonic() > cache["until"]:
            with closing(connect()) as db:
                cache.update(stock=stock_of(db), until=time.monotonic() + CACHE_S)
        return {"current_stock": cache["stock"]}, 200

    @app.get("/audit")
    def audit() -> Answer:
        query = "SELECT initial, stock, (SELECT COUNT(*) FROM purchase) FROM item"
        with closing(connect()) as db:
            initial, stock, records = db.execute(query).fetchone()
        return {"initial_stock": initial, "current_stock": stock, "purchase_records": records}, 200

    return app


class Server(BaseApplication):  # type: ignore[misc]
    def __init__(self, fault: str) -> None:
        self.fault = fault
        super().__init__()

    def load_config(self) -> None:
        self.cfg.set(
            "bind", f"{os.environ.get('HOST', '127.0.0.1')}:{os.environ.get('PORT', '8000')}"
        )
        self.cfg.set("workers", int(os.environ.get("WEB_CONCURRENCY", "4")))
        self.cfg.set("control_socket_disable", True)
        self.cfg.set("when_ready", when_ready)

    def load(self) -> Flask:
        return create_app(self.fault)  # in each worker, when it starts


def when_ready(arbiter: Any) -> None:
    """A child as a metrics process would be: the listening socket is open in it, too."""
    if arbiter.app.fault == "two_children":
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pause()
        with Path(os.environ["CHILD_FILE"]).open("a") as file:
            file.write(f"{child}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(epilog="; ".join(f"{k}: {v}" for k, v in FAULTS.items()))
    parser.add_argument("--fault", choices=FAULTS, default=os.environ.get("BROKEN_FAULT", "none"))
    chosen = parser.parse_args().fault
    if chosen == "refill_at_start":
        create()
        with closing(connect()) as db:
            db.execute("UPDATE item SET stock = initial")
    Server(chosen).run()
