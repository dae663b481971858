"""What gunicorn answers by itself (a request it can't parse), as JSON; it has no setting for that."""

import json
import logging
import socket
from http import HTTPStatus

import gunicorn.util

from serving.headers import SECURITY_HEADERS

QUOTE_MAX = 300  # characters of the request, in the answer and in the log


def install() -> None:
    gunicorn.util.write_error = write_json_error
    logging.getLogger("gunicorn.error").addFilter(shorten)


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    text = f"{(message or reason)[:QUOTE_MAX]} - send a valid HTTP/1.1 request"
    body = json.dumps({"success": False, "message": text}, separators=(",", ":")).encode()
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **dict(SECURITY_HEADERS),
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *map(": ".join, headers.items())]
    client.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def shorten(record: logging.LogRecord) -> bool:
    """gunicorn logs the line that it can't parse, however long: nobody may fill the log that way."""
    if not record.args:
        record.msg = str(record.msg)[:QUOTE_MAX]
    return True
