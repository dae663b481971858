"""How gunicorn serves app:app; it reads this file by itself."""

import math
from typing import Any

from serving import draining, http_errors
from serving.config import address, read_config

variables = read_config()

bind = address(variables)
workers = variables["WEB_CONCURRENCY"]
worker_class = (
    "sync"  # calmer than threads, which fight over the interpreter while one holds the write lock
)
preload_app = True
backlog = 2048  # the buyers of the first moment wait here; the kernel caps it at net.core.somaxconn
timeout = 30 + math.ceil(variables["LOCK_TIMEOUT"])  # who waits for the write lock doesn't hang
graceful_timeout = draining.DRAIN_LIMIT_S + timeout  # the last of the backlog may wait for the lock
control_socket_disable = True
forwarder_headers = (
    ""  # a client's header SCRIPT_NAME or PATH_INFO must not change where a request goes
)
access_log_format = (
    '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # off unless asked for; no query, no body
)


def when_ready(server: Any) -> None:
    from app import app

    server.log.info("Selling from %s", app.extensions["store"])
    draining.install(server)


def post_fork(server: Any, worker: Any) -> None:
    worker.stopping = server.stopping


def post_worker_init(worker: Any) -> None:
    draining.ignore_terminal(worker)


def worker_exit(server: Any, worker: Any) -> None:
    draining.answer_backlog(server, worker)


http_errors.install()
