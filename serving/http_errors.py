"""What gunicorn says by itself, in this service's words; it has no settings for that."""

import logging
import socket
from http import HTTPStatus
from typing import Any

import gunicorn.config
import gunicorn.util

from serving.headers import SECURITY_HEADERS
from serving.json_bodies import unreadable
from serving.starting import cannot_start
from serving.watch import stderr_takes_a_line

QUOTE_MAX = 300  # characters of the request, in the answer and in the log


def install() -> None:
    gunicorn.util.write_error = write_json_error
    gunicorn.config.WorkerClass.validator = staticmethod(require_sync)
    gunicorn.config.WorkerThreads.validator = staticmethod(require_one_thread)
    logging.getLogger("gunicorn.error").addFilter(shorten)
    for name in ("gunicorn.error", "gunicorn.access"):
        logging.getLogger(name).addFilter(stderr_takes_a_line)


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    body = unreadable((message or reason)[:QUOTE_MAX])
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **dict(SECURITY_HEADERS),
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *map(": ".join, headers.items())]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def shorten(record: logging.LogRecord) -> bool:
    """gunicorn logs a line that it can't parse, however long: nobody may fill the log that way."""
    if not record.args:
        record.msg = str(record.msg)[:QUOTE_MAX]
    return True


def require_sync(worker_class: Any) -> Any:
    if worker_class != "sync":
        cannot_start(f"worker class {worker_class} would lose buyers at a stop - leave it at sync")
    return worker_class


def require_one_thread(threads: Any) -> int:
    if int(threads) != 1:
        cannot_start(f"{threads} threads would lose buyers at a stop - take more --workers instead")
    return 1
