"""How gunicorn serves app:app; it reads this file by itself."""

import json
import logging
import math
import signal
import socket
from http import HTTPStatus
from typing import Any

import gunicorn.util

from app import PROTECTION, app  # loaded here, once, before the fork; also reads .env

bind = "{HOST}:{PORT}".format_map(app.config)
workers = app.config["WEB_CONCURRENCY"]
worker_class = "sync"  # calmer than threads, which fight over the interpreter while one holds the write lock
preload_app = True
backlog = 2048  # the buyers of the first moment wait here; the kernel caps it at net.core.somaxconn
timeout = 30 + math.ceil(app.config["LOCK_TIMEOUT"])  # a worker that waits for the write lock does not hang
control_socket_disable = True
forwarder_headers = ""  # a client's header SCRIPT_NAME or PATH_INFO must not change where a request goes
access_log_format = '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # off unless asked for; no query, no body

QUOTE_MAX = 300  # characters; of a request that is no HTTP, in the answer and in the log


def when_ready(server: Any) -> None:
    """Say what is on sale from where; let Ctrl-C stop as SIGTERM does: requests in flight are answered."""
    server.log.info("Selling from %s", app.extensions["store"])
    server.handle_int = server.handle_term


def post_worker_init(worker: Any) -> None:
    """A terminal's Ctrl-C reaches the workers too: they leave it to the master."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers by itself (a request it can't parse), as JSON; it has no setting for that."""
    body = json.dumps({"success": False, "message": (message or reason)[:QUOTE_MAX]}).encode()
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **dict(PROTECTION),
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *map(": ".join, headers.items())]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def shorten(record: logging.LogRecord) -> bool:
    """gunicorn logs the line that it can't parse, however long: nobody may fill the log that way."""
    if not record.args:
        record.msg = str(record.msg)[:QUOTE_MAX]
    return True


gunicorn.util.write_error = write_json_error
logging.getLogger("gunicorn.error").addFilter(shorten)
