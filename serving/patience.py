"""How long a worker waits for a client who sends no request, half of one, or doesn't hang up.

A sync worker serves nobody else meanwhile. A browser opens connections that it may need later: each
would hold a worker until gunicorn kills that, and hold up a stop as long. nginx keeps them away.
"""

import functools
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

REQUEST_LIMIT_S = 10  # for the next bytes; below every timeout of a worker
LAST_REQUEST_LIMIT_S = 1  # the same in a worker that is to end


@functools.cache  # a reload reads gunicorn.conf.py again
def install() -> None:
    from gunicorn.http.unreader import SocketUnreader

    SocketUnreader.chunk = ending_when_silent(SocketUnreader.chunk)


def ending_when_silent(chunk: Callable[..., bytes]) -> Callable[..., bytes]:
    """Reads as before, but whoever sends nothing for too long counts as one who has hung up."""

    def read(unreader: Any, size_hint: int | None = None) -> bytes:
        try:
            return chunk(unreader, size_hint)
        except BlockingIOError:
            with suppress(OSError):  # he is gone
                unreader.sock.shutdown(socket.SHUT_RD)  # or the close would wait for him, too
            return b""

    return read


def enter_worker(worker: Any) -> None:
    """Before anything can end it: it may have to serve then."""
    worker.client = None
    worker.handle = functools.partial(handle, worker, worker.handle)


def begin_work(worker: Any) -> None:
    """As soon as the worker handles signals."""
    for number in (signal.SIGTERM, signal.SIGQUIT):  # gunicorn's QUIT would end it amid a sale
        signal.signal(number, functools.partial(end, worker))
        signal.siginterrupt(number, False)  # as gunicorn has it: no call is disturbed


def handle(
    worker: Any, serve: Callable[..., None], listener: Any, client: socket.socket, address: Any
) -> None:
    wait_at_most(client, REQUEST_LIMIT_S)
    worker.client = client
    if not worker.alive:  # asked last: a signal in between finds the client
        wait_at_most(client, LAST_REQUEST_LIMIT_S)
    serve(listener, client, address)


def let_go(worker: Any, request: Any, response: Any) -> None:
    """Close on a client who has sent everything and was told everything.

    gunicorn lets each client close first, for up to 2 s, as a close on unread bytes is a reset.
    Here nothing is unread, and the worker would wait for a round trip after each purchase.
    """
    is_answered = response is not None and response.headers_sent
    if is_answered and getattr(request.body.reader, "length", 1) == 0:
        with suppress(OSError):  # nothing more came, as it should be
            if worker.client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return
        worker.client.close()


def end(worker: Any, number: int, frame: Any) -> None:
    """What the worker waits for at this moment has to come soon, too."""
    worker.handle_exit(number, frame)
    if worker.client is not None:
        with suppress(OSError):  # it is closed by now
            wait_at_most(worker.client, LAST_REQUEST_LIMIT_S)


def wait_at_most(client: socket.socket, seconds: int) -> None:
    """Not by settimeout(), which would also make a look at the connection wait (buyers.py)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
