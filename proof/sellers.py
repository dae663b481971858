"""The server to judge, maybe the proof's own, and the naive seller of the negative control."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from proof import workers
from proof.api import REQUEST_TIMEOUT_S, RETRY_SLEEP_S, Api, CannotJudge, NoAnswer
from proof.history import SOLD, SOLD_OUT
from proof.options import Options

DEFAULT_URL = "http://127.0.0.1:8000"
APP = Path(__file__).parents[1] / "app.py"
START_TIMEOUT_S, STOP_TIMEOUT_S = 30, 15
CONTROL_BUYERS = 50
LOCAL = ("127.0.0.1", 0)  # any free port
# A variable that is set, even to nothing, isn't read from .env.
OURS = ("ITEM_NAME", "INITIAL_STOCK", "LOCK_TIMEOUT", "DB_POOL_SIZE", "DB_POOL_TIMEOUT")
UNSET = ("SALE_STARTS_AT", "METRICS_PORT", "GUNICORN_CMD_ARGS")


def choose_server(options: Options, undo: ExitStack) -> tuple[Api, OwnServer | None]:
    # Caches count whole seconds (RFC 9111, 1.2.2): what is kept for one may be nearly two old.
    age_s = options.cache_age + 1 if options.cache_age else 0
    api, why = Api(options.url or DEFAULT_URL, age_s), "--own-server"
    if not options.own_server:
        try:
            api.require_healthy()
            print(f"Judging the server at {api.url}: its purchases will be deleted")
            undo.callback(leave_as_configured, api)
            return api, None
        except NoAnswer:
            if options.url:
                raise
        why = f"Nobody answers at {api.url}"
    server = undo.enter_context(own_server())
    api = Api(server.url, age_s)
    print(f"{why}: judging a server of our own at {api.url}")
    if is_postgresql():
        name = "the PostgreSQL database that DATABASE_URL names"
        if not options.delete_purchases and (held := api.audit().records):
            raise CannotJudge(f"{name} holds {held} purchases: --delete-purchases deletes them")
        print(f"on {name}: its purchases will be deleted")
        undo.callback(leave_as_configured, api)
    return api, server


def leave_as_configured(api: Api) -> None:
    with suppress(CannotJudge):  # a server that died, or that forbids it
        print(f"\nThe stock there is as configured again: {api.reset()} units")


class OwnServer:
    """`python app.py` on a free port; `with` ends it whatever happens.

    Its database is in a temporary folder, unless DATABASE_URL names a PostgreSQL server.
    """

    def __init__(self, folder: Path) -> None:
        with socket.create_server(LOCAL) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.environment = os.environ | settings(folder, self.port)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 (our own program)
                [sys.executable, str(APP)],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(NoAnswer):
                return Api(self.url).require_healthy()
            time.sleep(RETRY_SLEEP_S)
        raise CannotJudge(f"app.py did not start: {self.last_words()}")

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is not None:
            print(f"The server ended by itself: {self.last_words()}")
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        with suppress(AttributeError, ProcessLookupError):  # Windows has no sessions
            os.killpg(self.process.pid, signal.SIGKILL)  # processes that outlived it
        self.process.wait(STOP_TIMEOUT_S)

    def restart(self) -> None:
        self.stop()
        self.start()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def has_workers(self) -> bool:
        return self.process is not None and bool(workers.descendants(self.process.pid))

    def busy_workers(self) -> list[int]:
        return [] if self.process is None else workers.busy_workers(self.process.pid, self.port)


def settings(folder: Path, port: int) -> dict[str, str]:
    own = {name: os.environ.get(name, "") for name in OURS} | dict.fromkeys(UNSET, "")
    own |= {"HOST": LOCAL[0], "PORT": str(port), "WEB_CONCURRENCY": "4"}
    if is_postgresql():
        return own | {"ALLOW_RESET": os.environ.get("ALLOW_RESET") or "1"}
    database = f"sqlite:///{(folder / 'inventory.db').as_posix()}"
    return own | {"ALLOW_RESET": "1", "DATABASE_URL": database}


def is_postgresql() -> bool:
    return os.environ.get("DATABASE_URL", "").strip().startswith(("postgresql:", "postgres:"))


@contextmanager
def own_server() -> Iterator[OwnServer]:
    with tempfile.TemporaryDirectory(prefix="flash-sale-proof-") as folder:
        server = OwnServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.stop()


class NaiveSeller(http.server.BaseHTTPRequestHandler):
    """The negative control: it reads, checks and writes, without a lock. Never sell like this."""

    database = ""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        connection = sqlite3.connect(self.database, timeout=REQUEST_TIMEOUT_S, isolation_level=None)
        with closing(connection) as db:
            selling = self.path == "/buy_ticket"
            status, answer = self.sell(db) if selling else (SOLD, self.count(db, body))
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def sell(self, db: sqlite3.Connection) -> tuple[int, dict[str, int | None]]:
        (stock,) = db.execute("SELECT stock FROM item").fetchone()
        if stock <= 0:
            return SOLD_OUT, {"remaining_stock": 0}
        # Others have read the same stock meanwhile.
        db.execute("UPDATE item SET stock = ?", (stock - 1,))
        number = db.execute("INSERT INTO purchase DEFAULT VALUES").lastrowid
        return SOLD, {"remaining_stock": stock - 1, "purchase_id": number}

    def count(self, db: sqlite3.Connection, body: dict[str, int]) -> dict[str, int]:
        if "stock" in body:  # POST /reset
            db.execute("UPDATE item SET stock = ?", (body["stock"],))
            db.execute("DELETE FROM purchase")
        query = "SELECT stock, (SELECT count(*) FROM purchase) FROM item"
        stock, records = db.execute(query).fetchone()
        return {"current_stock": stock, "purchase_records": records}

    def log_message(self, *_: object) -> None:
        pass


class NaiveShop(http.server.ThreadingHTTPServer):
    request_queue_size = 2 * CONTROL_BUYERS


@contextmanager
def naive_shop() -> Iterator[Api]:
    with tempfile.TemporaryDirectory(prefix="flash-sale-control-") as folder:
        NaiveSeller.database = str(Path(folder, "scratch.db"))
        connection = sqlite3.connect(NaiveSeller.database)
        with closing(connection) as db, NaiveShop(LOCAL, NaiveSeller) as shop:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript("CREATE TABLE item (stock); INSERT INTO item VALUES (0)")
            db.executescript("CREATE TABLE purchase (id INTEGER PRIMARY KEY)")
            threading.Thread(target=shop.serve_forever).start()
            try:
                yield Api(f"http://127.0.0.1:{shop.server_port}")
            finally:
                shop.shutdown()
