"""What gunicorn says by itself, in this service's words; it has no settings for that."""

import logging
import socket
from http import HTTPStatus
from typing import Any

import gunicorn.config
import gunicorn.util

from serving import watch
from serving.headers import SECURITY_HEADERS
from serving.json_bodies import encode, unreadable
from serving.starting import cannot_start

INTERRUPTED = (
    "The service failed or was ended meanwhile, a purchase may have been stored - with an"
    " Idempotency-Key send the same request until 200, 410 or 422"
)
# gunicorn's status for an unknown Transfer-Encoding, and for a path that isn't below SCRIPT_NAME.
CLIENTS_FAULTS = {501: 400, 500: 404}
QUOTE_MAX = 300  # characters of the request, in the answer and in the log


def install() -> None:
    gunicorn.util.write_error = write_json_error
    gunicorn.config.WorkerClass.validator = staticmethod(require_sync)
    gunicorn.config.WorkerThreads.validator = staticmethod(require_one_thread)
    logging.getLogger("gunicorn.error").addFilter(shorten)
    logging.getLogger("gunicorn.error").addFilter(watch.stderr_takes_a_line)
    logging.getLogger("gunicorn.access").addFilter(watch.stdout_takes_a_line)
    logging.raiseExceptions = False  # a log on a full disk would get a traceback for each line


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    if message:
        status = CLIENTS_FAULTS.get(status, status)
    if status == 500:  # the worker was ended, or failed
        body = encode({"success": False, "message": INTERRUPTED}).encode()
    else:
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
    """gunicorn logs each line that it can't parse, however long: nobody may fill the log so."""
    if not record.args:
        record.msg = str(record.msg)[:QUOTE_MAX]
    return not str(record.msg).startswith("Invalid request") or watch.is_due(watch.UNREADABLE)


def require_sync(worker_class: Any) -> Any:
    if worker_class != "sync":
        cannot_start(f"worker class {worker_class} would lose buyers at a stop - leave it at sync")
    return worker_class


def require_one_thread(threads: Any) -> int:
    if int(threads) != 1:
        cannot_start(f"{threads} threads would lose buyers at a stop - take more --workers instead")
    return 1
