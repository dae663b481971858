"""How long a worker waits for a client who sends no request, half of one, or doesn't hang up.

A sync worker serves nobody else meanwhile. A browser opens connections that it may need later: each
would hold a worker until gunicorn kills that, and hold up a stop as long. nginx keeps them away.
"""

import functools
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

REQUEST_LIMIT_S = 10.0  # for all of a request; below every timeout of a worker
LAST_REQUEST_LIMIT_S = 1.0  # for what is missing of it in a worker that is to end


def enter_worker(worker: Any) -> None:
    """Right after the fork: it may have to serve before it begins its work."""
    from gunicorn.http.unreader import SocketUnreader

    worker.client = None
    worker.waits_until = 0.0  # of time.monotonic()
    worker.handle = functools.partial(handle, worker, worker.handle)
    SocketUnreader.chunk = reading_in_time(worker, SocketUnreader.chunk)


def begin_work(worker: Any) -> None:
    """As soon as the worker handles signals."""
    for number in (signal.SIGTERM, signal.SIGQUIT):  # gunicorn's QUIT would end it amid a sale
        signal.signal(number, functools.partial(end, worker))
        signal.siginterrupt(number, False)  # as gunicorn has it


def handle(
    worker: Any, serve: Callable[..., None], listener: Any, client: socket.socket, address: Any
) -> None:
    worker.client = client
    worker.waits_until = time.monotonic() + REQUEST_LIMIT_S
    if not worker.alive:  # asked last: a signal in between finds the client
        worker.waits_until = time.monotonic() + LAST_REQUEST_LIMIT_S
    serve(listener, client, address)


def reading_in_time(worker: Any, chunk: Callable[..., bytes]) -> Callable[..., bytes]:
    """Reads as before, but who has not sent all in time counts as one who has hung up."""

    def read(unreader: Any, size_hint: int | None = None) -> bytes:
        try:
            limit = None
            while limit != worker.waits_until:  # a signal may change it meanwhile
                limit = worker.waits_until
                wait_at_most(unreader.sock, limit - time.monotonic())
            return chunk(unreader, size_hint)
        except BlockingIOError:
            with suppress(OSError):  # he is gone
                unreader.sock.shutdown(socket.SHUT_RD)  # or the close would wait for him, too
            return b""

    return read


def end(worker: Any, number: int, frame: Any) -> None:
    """What the worker waits for at this moment has to come soon, too.

    A read with a limit begins again after a signal, with the limit that holds then.
    """
    worker.handle_exit(number, frame)
    worker.waits_until = min(worker.waits_until, time.monotonic() + LAST_REQUEST_LIMIT_S)
    if worker.client is not None:
        with suppress(OSError):  # it is closed by now
            wait_at_most(worker.client, LAST_REQUEST_LIMIT_S)


def wait_at_most(client: socket.socket, seconds: float) -> None:
    """Not by settimeout(), which would also make a look at the connection wait (buyers.py)."""
    microseconds = int(seconds * 1e6)
    if microseconds <= 0:  # 0 would be no limit
        raise BlockingIOError
    limit = struct.pack("ll", *divmod(microseconds, 1_000_000))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def let_go(request: Any, environ: dict[str, Any], response: Any) -> None:
    """Close on a client who has sent everything and was told everything.

    gunicorn lets each client close first, for up to 2 s, as a close on unread bytes is a reset.
    Here nothing is unread, and the worker would wait for a round trip after each purchase.
    """
    if response is None or not response.headers_sent:
        return
    body = request.body.reader  # one with a length to read, or of chunks until none is left
    if getattr(body, "length", None) == 0 or getattr(body, "parser", body) is None:
        client = environ["gunicorn.socket"]
        with suppress(OSError, ValueError):  # nothing more came; or TLS, which can't peek
            if client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        client.close()
