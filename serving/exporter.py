"""METRICS_PORT: a process beside the workers serves the metrics, so no scrape waits for buyers.

It reads the workers' files (see metrics.py) and the database. It is no worker of gunicorn's, is
called `sale-metrics`, and ends with the master, whatever ends that. While two masters run, during
an upgrade, the old one's keeps the port; the new one's takes it as soon as that is gone.
"""

import functools
import logging
import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving import metrics

DATABASE_PATIENCE_S = 1.0  # a scrape that waits longer for it tells that it can't be read
PORT_RETRY_S = 0.2
RESTART_PAUSE_S = 1.0  # as the next one may fail like this
NAME = "sale-metrics"

log = logging.getLogger("gunicorn.error")


def install(server: Any, store: Any, host: str, port: int | None) -> None:
    """In the master, once it listens: count the workers that die, and serve, if there is a port."""
    if folder := metrics.instruments().folder:  # the workers write there, with their own rights
        os.chown(folder, server.cfg.uid, server.cfg.gid)
    start = functools.partial(fork, server, store, host, port)
    server.exporter = start() if port else 0
    server.reap_workers = functools.partial(reap, server, server.reap_workers, start)


def reap(server: Any, reap_workers: Callable[[], None], start: Callable[[], int]) -> None:
    """Reap as gunicorn does, count the dead, and start the metrics process again if it ended."""
    dead = sum(map(died, list(server.WORKERS)))
    if dead:
        metrics.instruments().worker_deaths.inc(dead)
    reap_workers()
    if server.exporter and not exists(server.exporter):
        log.error("The metrics process ended, another one starts")
        with suppress(OSError):  # no room for a process now: at the next look
            server.exporter = start()


def died(worker: int) -> bool:
    """Whether this child was killed or failed, and is still to be reaped."""
    if not hasattr(os, "waitid"):  # macOS
        return False
    with suppress(ChildProcessError):
        end = os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return end is not None and (end.si_code != os.CLD_EXITED or end.si_status != 0)
    return False


def exists(process: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        return True
    return False


def fork(server: Any, store: Any, host: str, port: int | None) -> int:
    """The new process's id."""
    process = os.fork()
    if process:
        return process
    try:
        leave_the_master(server)
        store.lock_timeout_s = DATABASE_PATIENCE_S  # of this process's copy
        serve(metrics.registry(store), host, port or 0, server.lifeline[0])
        metrics.remove_folder()  # a master that was killed couldn't
        os._exit(0)
    except BaseException as error:
        log.error("The metrics process failed: %r", error)
        select.select([server.lifeline[0]], [], [], RESTART_PAUSE_S)
    finally:
        os._exit(1)


def leave_the_master(server: Any) -> None:
    """Neither listen for buyers, nor hold what only the master may hold, nor act on its signals."""
    os.close(server.lifeline[1])
    for listener in server.LISTENERS:
        listener.sock.close()
    signal.set_wakeup_fd(-1)
    for number in server.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal; the master's to handle
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    from gunicorn.util import set_owner_process

    set_owner_process(server.cfg.uid, server.cfg.gid, initgroups=server.cfg.initgroups)


def serve(registry: Any, host: str, port: int, lifeline: int) -> None:
    """Until `lifeline` is closed on its other side."""
    from prometheus_client import start_http_server

    told = False
    while not select.select([lifeline], [], [], PORT_RETRY_S if told else 0)[0]:
        try:
            start_http_server(port, host, registry)
            log.info("Metrics at: http://%s:%s/metrics", host, port)
            os.read(lifeline, 1)
            return
        except OSError as error:
            if not told:
                log.warning("METRICS_PORT %s: %s - the metrics wait until it is free", port, error)
            told = True
