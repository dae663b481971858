"""`python app.py`: a banner, then gunicorn, or Flask's own threaded server where that doesn't run."""

import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from typing import cast

from flask import Flask
from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler, make_server

from serving.config import TEXTS, address

ROOT = Path(__file__).parent.parent
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BANNER = """\
============================================================
FLASH SALE INVENTORY SERVICE
============================================================
Item:                {now.item_name}
Initial stock:       {now.initial_stock} units, {now.current_stock} left
Concurrency control: {store.concurrency_model}
Lock timeout:        {LOCK_TIMEOUT:g} s
URL:                 http://{address}
============================================================"""


def allow_reset_on_loopback() -> None:
    if (os.environ.get("HOST") or TEXTS["HOST"]) in LOOPBACK:
        os.environ["ALLOW_RESET"] = os.environ.get("ALLOW_RESET") or "1"


def serve(app: Flask) -> None:
    host, port, store = app.config["HOST"], app.config["PORT"], app.extensions["store"]
    _require_free_port(host, port)
    print(
        BANNER.format(
            **app.config, address=address(app.config), store=store, now=store.inventory()
        ),
        flush=True,
    )
    if os.name == "posix" and importlib.util.find_spec("gunicorn"):
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        )
        conf = str(ROOT / "gunicorn.conf.py")
        os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "--config", conf, "app:app"])
    server = cast(
        ThreadedWSGIServer, make_server(host, port, app, threaded=True, request_handler=JsonHandler)
    )
    server.daemon_threads = False  # requests in flight are answered before the process ends
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server.serve_forever()


class JsonHandler(WSGIRequestHandler):
    error_content_type = "application/json"  # of what it can't parse
    error_message_format = (
        '{"success":false,"message":"Status %(code)d - send a valid HTTP/1.1 request"}\n'
    )

    def version_string(self) -> str:
        return "flash-sale"  # not the versions of Werkzeug and Python


def _require_free_port(host: str, port: int) -> None:
    try:
        socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ).close()
    except (OSError, TypeError, ValueError) as error:  # the latter for what can't be a host's name
        sys.exit(f"Cannot start: {error} - set HOST or PORT")
