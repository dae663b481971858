"""A stop that loses nobody: whoever waits in the backlog is answered, whoever comes later is refused.

gunicorn alone closes the listening socket at SIGTERM, and the kernel resets everybody who waits in it.
"""

import ctypes
import functools
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

DRAIN_LIMIT_S = 20  # for those who wait in the backlog
LAST_COMER_S = 0.2  # for the last packet of handshakes that were begun
SO_ATTACH_FILTER = 26  # Linux; Python has no name for it

# A BPF program for a listening socket: drop who asks to connect, let begun handshakes finish.
# Rows of code, jump if true, jump if false, operand.
DROP_SYN = [
    (0x30, 0, 0, 13),  # load the byte of the TCP flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop it
    (0x06, 0, 0, 0xFFFF),  # let all else pass
]


def install(server: Any) -> None:
    """In the master: SIGTERM and Ctrl-C drain. The flag is shared with the workers."""
    server.stopping = mmap.mmap(-1, 1)
    server.handle_int = server.handle_term = functools.partial(stop, server)


def stop(server: Any) -> NoReturn:
    """Let nobody else queue, unless another master goes on listening."""
    # gunicorn itself notices only within a second that the old master is gone.
    is_second = server.master_pid and server.master_pid == os.getppid()
    if not (server.reexec_pid or is_second or server.systemd):
        server.stopping[0] = True
        rows = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in DROP_SYN))
        program = struct.pack("HP", len(DROP_SYN), ctypes.addressof(rows))
        for listener in server.LISTENERS if sys.platform == "linux" else ():
            listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    raise StopIteration  # as gunicorn's own handle_term does


def ignore_terminal(worker: Any) -> None:
    """A terminal's Ctrl-C reaches the workers too: they leave it to the master."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if worker.stopping[0]:  # the SIGTERM may have come before gunicorn listened for it
        worker.alive = False


def answer_backlog(server: Any, worker: Any) -> None:
    """In a worker that ends: answer those who wait."""
    deadline = time.monotonic() + DRAIN_LIMIT_S
    for listener in worker.sockets if server.stopping[0] else ():
        while time.monotonic() < deadline and select.select([listener], [], [], LAST_COMER_S)[0]:
            with suppress(BlockingIOError):  # another worker was faster
                worker.accept(listener)
        listener.close()  # at once: nobody may come to wait while this process ends
