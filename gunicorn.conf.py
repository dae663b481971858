"""How gunicorn serves app:app; it reads this file by itself where it is started in this folder."""

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a start in another folder

from serving import draining, exporter, http_errors, metrics, starting, watch
from serving.config import ConfigError, address, read_config
from serving.starting import acting_as, cannot_start

try:
    variables = read_config()
except ConfigError as error:
    cannot_start(error)

bind = address(variables)
workers = variables["WEB_CONCURRENCY"]
worker_class = "sync"  # threads would fight over the interpreter while one holds the write lock
preload_app = True
backlog = starting.BACKLOG  # the buyers of the first moment wait here
timeout = 30 + math.ceil(variables["LOCK_TIMEOUT"])  # above every wait for the write lock
graceful_timeout = draining.DRAIN_LIMIT_S + timeout  # the last of the backlog may wait for the lock
control_socket_disable = True
secure_scheme_headers: dict[str, str] = {}  # what an outer proxy says of TLS may stop no sale
forwarder_headers = ""  # a client's header SCRIPT_NAME must not change where a request goes
access_log_format = '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # no query string, no body


def store() -> Any:
    from app import app

    return app.extensions["store"]


def on_starting(server: Any) -> None:
    from app import one_line_for_a_failure

    with one_line_for_a_failure(), acting_as(server.cfg.uid, server.cfg.gid):
        store().create()  # again, with the workers' rights


def when_ready(server: Any) -> None:
    server.log.info("Selling %s, from %s", watch.OFFER[0], store())
    if short := starting.short_queue():
        server.log.warning(short)
    draining.install(server)
    exporter.install(server, store(), variables["HOST"], variables["METRICS_PORT"])


def pre_exec(server: Any) -> None:
    if stopped := getattr(store(), "stopped", ""):  # a new master wouldn't know
        cannot_start(stopped)
    draining.before_upgrade(server)


def post_fork(server: Any, worker: Any) -> None:
    draining.enter_worker(server, worker)


def post_worker_init(worker: Any) -> None:
    draining.begin_work(worker)


def worker_exit(server: Any, worker: Any) -> None:
    draining.answer_backlog(worker)
    if worker.is_orphan:  # the master can't any more
        metrics.remove_folder()


def on_exit(server: Any) -> None:
    metrics.remove_folder()


http_errors.install()
