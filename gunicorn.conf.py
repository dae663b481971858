"""How gunicorn serves app:app; it reads this file by itself."""

import json
import math
import signal
import socket
from typing import Any

import gunicorn.util

from app import app  # loaded here, once, before the fork; also reads .env

bind = "{HOST}:{PORT}".format_map(app.config)
workers = app.config["WEB_CONCURRENCY"]
worker_class = "sync"  # calmer than threads, which fight over the interpreter while one holds the write lock
preload_app = True
backlog = 2048  # the buyers of the first moment wait here; the kernel caps it at net.core.somaxconn
timeout = 30 + math.ceil(app.config["LOCK_TIMEOUT"])  # a worker that waits for the write lock does not hang
control_socket_disable = True
access_log_format = '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # off unless asked for; no query, no body


def when_ready(server: Any) -> None:
    """Say what is on sale from where; let Ctrl-C stop as SIGTERM does: requests in flight are answered."""
    server.log.info("Selling from %s", app.extensions["store"])
    server.handle_int = server.handle_term


def post_worker_init(worker: Any) -> None:
    """A terminal's Ctrl-C reaches the workers too: they leave it to the master."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers by itself (a request it can't parse), as JSON; it has no setting for that."""
    body = json.dumps({"success": False, "message": message or reason}).encode()
    head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


gunicorn.util.write_error = write_json_error
