"""A stop that loses nobody: whoever waits in the backlog is answered, later buyers are refused.

gunicorn alone closes the listening socket at SIGTERM, and the kernel resets everybody who waits in
it. Here the master first closes the queue with `listen(0)`, and the workers then accept until it is
empty. That needs no privilege. A handshake in that very moment may be reset, and then sold nothing.
"""

import functools
import logging
import mmap
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from serving.config import ConfigError, read_config

DRAIN_LIMIT_S = 20  # for the buyers who wait in the backlog
ORPHAN_DRAIN_LIMIT_S = 1  # the same when the master was killed, as the next one wants the port
RUNNING, SHARED, STOPPING = range(3)  # SHARED: somebody else goes on listening on our sockets

log = logging.getLogger("gunicorn.error")


def install(server: Any) -> None:
    """In the master: SIGTERM and Ctrl-C drain, and so does the end of the demo's terminal."""
    server.state = mmap.mmap(-1, 1)  # of all processes, as they share this memory
    server.state[0] = SHARED if server.systemd or server.master_pid else RUNNING
    server.lifeline = os.pipe()  # only the master keeps the end that writes: it closes as he dies
    server.handle_int = server.handle_quit = server.handle_term = functools.partial(stop, server)
    if getattr(server.app, "ends_with_its_terminal", False):  # else SIGHUP is a reload
        server.handle_hup = server.handle_term
    else:
        server.handle_hup = functools.partial(reload, server, server.handle_hup)


def reload(server: Any, handle_hup: Callable[[], object]) -> None:
    """Where a variable makes no sense, or gunicorn.conf.py fails, gunicorn would end the master."""
    settings = server.app.cfg
    try:
        read_config()
        server.app.reload()
    except (Exception, SystemExit) as error:
        server.app.cfg = settings
        cause = error if isinstance(error, ConfigError) else "gunicorn.conf.py failed, see above"
        log.error("Not reloaded, the old settings stay: %s", cause)
    else:
        handle_hup()


def before_upgrade(server: Any) -> None:
    """In the child that becomes the second master, which shares this memory with the first."""
    server.state[0] = SHARED


def stop(server: Any) -> NoReturn:
    """Close the queue, unless another master or systemd goes on listening.

    A second Ctrl-C would have gunicorn interrupt sales: it is ignored, as the stop is bounded.
    Where the whole process group was told, workers may have ended before they knew of a stop. One
    that is born now knows, and answers whoever still waits.
    """
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    server.SIG_QUEUE = queue.SimpleQueue()  # one may have come already
    # gunicorn itself notices only within a second that the old master is gone.
    is_second = server.master_pid and server.master_pid == os.getppid()
    if not (server.reexec_pid or is_second or server.systemd):
        server.state[0] = STOPPING
        close_queue(server.LISTENERS)
        with suppress(OSError):  # no room for another process: the others answer
            server.spawn_worker()
    raise StopIteration  # as gunicorn's own handle_term does


def close_queue(listeners: list[Any]) -> None:
    for listener in listeners:
        try:
            listener.sock.listen(0)
        except OSError:  # whatever it is, the stop goes on
            log.exception("The queue of %s stays open", listener)


def enter_worker(server: Any, worker: Any) -> None:
    """Right after the fork. The worker may have to answer before it has loaded the app itself."""
    worker.wsgi = server.app.wsgi()
    worker.state = server.state
    worker.lifeline = server.lifeline[0]
    worker.is_orphan = False
    os.close(server.lifeline[1])


def begin_work(worker: Any) -> None:
    """As soon as the worker handles signals."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal; the master's to handle
        signal.signal(number, signal.SIG_IGN)
    if worker.state[0] == STOPPING:  # the SIGTERM may have come before gunicorn listened for it
        worker.alive = False
    threading.Thread(target=end_with_the_master, args=[worker], daemon=True).start()


def end_with_the_master(worker: Any) -> None:
    """As after SIGTERM. gunicorn looks for its master only once in half of `timeout`."""
    os.read(worker.lifeline, 1)  # returns when the master has ended, however it did
    worker.is_orphan = True
    if worker.state[0] == RUNNING:
        close_queue(worker.sockets)
    os.kill(os.getpid(), signal.SIGTERM)


def answer_backlog(worker: Any) -> None:
    """In a worker that ends: answer the buyers who wait, if nobody else will."""
    if not worker.is_orphan and worker.state[0] != STOPPING:
        return
    limit_s = ORPHAN_DRAIN_LIMIT_S if worker.is_orphan else DRAIN_LIMIT_S
    deadline = time.monotonic() + limit_s
    for listener in worker.sockets:
        listener.setblocking(False)
        with suppress(BlockingIOError):  # nobody waits
            while time.monotonic() < deadline:
                with suppress(ConnectionAbortedError):
                    worker.accept(listener)
        listener.close()  # at once: nobody may come to wait while this process ends
