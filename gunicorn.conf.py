"""How gunicorn serves app:app; it reads this file by itself."""

import ctypes
import functools
import json
import logging
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NoReturn

import gunicorn.util

from app import PROTECTION, address, app  # loaded here, once, before the fork; also reads .env

bind = address(app)
workers = app.config["WEB_CONCURRENCY"]
worker_class = "sync"  # calmer than threads, which fight over the interpreter while one holds the write lock
preload_app = True
backlog = 2048  # the buyers of the first moment wait here; the kernel caps it at net.core.somaxconn
timeout = 30 + math.ceil(app.config["LOCK_TIMEOUT"])  # who waits for the write lock doesn't hang
DRAIN_LIMIT_S = 20  # at a stop, for those who wait in the backlog
graceful_timeout = DRAIN_LIMIT_S + timeout  # the last of them may have to wait for the write lock
control_socket_disable = True
forwarder_headers = ""  # a client's header SCRIPT_NAME or PATH_INFO must not change where a request goes
access_log_format = '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # off unless asked for; no query, no body

# A BPF program for a listening socket: drop who asks to connect, let begun handshakes finish.
# Rows of code, jump if true, jump if false, operand.
DROP_SYN = [
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFF),  # let all else pass
]
SO_ATTACH_FILTER = 26  # Linux; Python has no name for it
LAST_COMER_S = 0.2  # for the last packet of handshakes that were begun
QUOTE_MAX = 300  # characters; of a request that is no HTTP, in the answer and in the log


def when_ready(server: Any) -> None:
    """Say what is on sale from where; let Ctrl-C stop as SIGTERM does: requests in flight are answered."""
    server.log.info("Selling from %s", app.extensions["store"])
    server.stopping = mmap.mmap(-1, 1)  # shared with the workers
    server.handle_int = server.handle_term = functools.partial(stop, server)


def post_fork(server: Any, worker: Any) -> None:
    worker.stopping = server.stopping


def post_worker_init(worker: Any) -> None:
    """A terminal's Ctrl-C reaches the workers too: they leave it to the master."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if worker.stopping[0]:  # the SIGTERM may have come before gunicorn listened for it
        worker.alive = False


def stop(server: Any) -> NoReturn:
    """Let nobody else queue, unless another master goes on listening; who queues already is answered."""
    # gunicorn itself notices only within a second that the old master is gone.
    is_second = server.master_pid and server.master_pid == os.getppid()
    if not (server.reexec_pid or is_second or server.systemd):
        server.stopping[0] = True
        rows = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in DROP_SYN))
        program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(rows))
        for listener in server.LISTENERS if sys.platform == "linux" else ():
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    raise StopIteration  # as gunicorn's own handle_term does


def worker_exit(server: Any, worker: Any) -> None:
    """Answer those who wait in the backlog: the kernel resets them when the last worker closes it."""
    deadline = time.monotonic() + DRAIN_LIMIT_S
    for listener in worker.sockets if server.stopping[0] else ():
        while time.monotonic() < deadline and select.select([listener], [], [], LAST_COMER_S)[0]:
            with suppress(BlockingIOError):  # another worker was faster
                worker.accept(listener)
        listener.close()  # at once: nobody may come to wait while this process ends


def write_json_error(client: socket.socket, status: int, reason: str, message: str) -> None:
    """What gunicorn answers by itself (a request it can't parse), as JSON; it has no setting for that."""
    text = f"{(message or reason)[:QUOTE_MAX]} - send a valid HTTP/1.1 request"
    body = json.dumps({"success": False, "message": text}, separators=(",", ":")).encode()
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
