"""How gunicorn serves app:app; it reads this file by itself where it is started in this folder."""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for a start in another folder

from serving import http_errors
from serving.config import ConfigError, address, read_config
from serving.draining import DRAIN_LIMIT_S
from serving.hooks import (  # noqa: F401  (gunicorn calls them)
    on_starting,
    post_fork,
    post_request,
    post_worker_init,
    pre_exec,
    pre_fork,
    when_ready,
    worker_exit,
)
from serving.starting import BACKLOG, cannot_start

try:
    variables = read_config()
except ConfigError as error:
    cannot_start(error)

bind = address(variables)
workers = variables["WEB_CONCURRENCY"]
worker_class = "sync"  # threads would fight over the interpreter while one holds the write lock
preload_app = True
backlog = BACKLOG  # the buyers of the first moment wait here
timeout = 30 + math.ceil(variables["LOCK_TIMEOUT"])  # above every wait for the write lock
graceful_timeout = DRAIN_LIMIT_S + timeout  # the last of the backlog may wait for the lock
control_socket_disable = True
secure_scheme_headers: dict[str, str] = {}  # what an outer proxy says of TLS may stop no sale
forwarder_headers = ""  # a client's header SCRIPT_NAME must not change where a request goes
access_log_format = '%(h)s %(t)s "%(m)s %(U)s" %(s)s %(B)s %(M)sms'  # no query string, no body

http_errors.install()
