"""What gunicorn calls, in the order of a process's life. gunicorn.conf.py hands it on."""

import itertools
from contextlib import suppress
from typing import Any

from serving import draining, exporter, metrics, patience, watch
from serving.starting import acting_as, cannot_start, short_queue


def store_of(server: Any) -> Any:
    return server.app.wsgi().extensions["store"]  # gunicorn has loaded the app before the fork


def on_starting(server: Any) -> None:
    """The app is loaded, nothing is bound yet."""
    try:
        with acting_as(server.cfg.uid, server.cfg.gid):
            store_of(server).create()  # again, with the workers' rights
    except Exception as error:
        cannot_start(error)


def when_ready(server: Any) -> None:
    """The master listens, and has no worker yet."""
    store_of(server).close()  # what was read for the banner: no connection crosses a fork
    watch.log_by("gunicorn.error")
    config = server.app.wsgi().config
    server.log.info("Selling %s, from %s", watch.OFFER[0], store_of(server))
    if opens_at := config["SALE_STARTS_AT"]:
        server.log.info("The sale opens at %s", opens_at.isoformat())
    if short := short_queue():
        server.log.warning(short)
    draining.install(server)
    exporter.install(server, store_of(server), config["HOST"], config["METRICS_PORT"])


def pre_exec(server: Any) -> None:
    """An upgrade: in the process that becomes the second master."""
    if stopped := store_of(server).stopped:  # a new master wouldn't know
        cannot_start(stopped)
    draining.before_upgrade(server)


def pre_fork(server: Any, worker: Any) -> None:
    taken = {other.slot for other in server.WORKERS.values()}
    worker.slot = next(slot for slot in itertools.count(1) if slot not in taken)


def post_fork(server: Any, worker: Any) -> None:
    draining.enter_worker(server, worker)
    patience.enter_worker(worker)


def post_worker_init(worker: Any) -> None:
    draining.begin_work(worker)
    patience.begin_work(worker)
    metrics.take_slot(worker.slot)
    with suppress(Exception):  # the first buyer is told, and the log
        worker.wsgi.extensions["store"].inventory()  # opens what stays open: see NOTES


def post_request(worker: Any, request: Any, environ: dict[str, Any], response: Any) -> None:
    patience.let_go(request, environ, response)


def worker_exit(server: Any, worker: Any) -> None:
    draining.answer_backlog(worker)
    if worker.is_orphan:  # the master can't do it any more
        metrics.remove_folder()
