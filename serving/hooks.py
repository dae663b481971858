"""What gunicorn calls, in the order of a process's life. gunicorn.conf.py hands it on."""

from typing import Any

from serving import draining, exporter, metrics, watch
from serving.starting import acting_as, cannot_start


def on_starting(server: Any) -> None:
    from app import app, one_line_for_a_failure

    with one_line_for_a_failure(), acting_as(server.cfg.uid, server.cfg.gid):
        app.extensions["store"].create()  # again, with the workers' rights


def when_ready(server: Any) -> None:
    """The master listens, and has no worker yet."""
    from app import app

    server.log.info("Selling %s, from %s", watch.OFFER[0], app.extensions["store"])
    draining.install(server)
    exporter.install(
        server, app.extensions["store"], app.config["HOST"], app.config["METRICS_PORT"]
    )


def pre_exec(server: Any) -> None:
    """An upgrade: in the process that becomes the second master."""
    from app import app

    if stopped := getattr(app.extensions["store"], "stopped", ""):  # a new master wouldn't know
        cannot_start(stopped)
    draining.before_upgrade(server)


def post_fork(server: Any, worker: Any) -> None:
    draining.enter_worker(server, worker)


def post_worker_init(worker: Any) -> None:
    draining.begin_work(worker)


def worker_exit(server: Any, worker: Any) -> None:
    draining.answer_backlog(worker)
    if worker.is_orphan:  # the master can't do it any more
        metrics.remove_folder()


def on_exit(server: Any) -> None:
    """The master, after its workers."""
    metrics.remove_folder()
