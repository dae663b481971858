"""`python app.py`, the local demo: a banner, then gunicorn, or waitress where that doesn't run."""

import importlib.util
import os
import signal
import socket
import sys
from typing import Any

from flask import Flask

from serving import metrics
from serving.config import CHOICES, address
from serving.headers import SECURITY_HEADERS
from serving.json_bodies import unreadable
from serving.starting import GUNICORN_CONF, cannot_start, say

BANNER = """\
============================================================
FLASH SALE INVENTORY SERVICE
============================================================
Item:                {now.item_name}
Initial stock:       {now.initial_stock} units, {now.current_stock} left
Concurrency control: {store.concurrency_model}
Lock timeout:        {LOCK_TIMEOUT:g} s
URL:                 {url}
Page for buyers:     {page}
============================================================"""
THREADS = 8  # waitress's; more would fight over the interpreter while one holds the write lock


def prepare() -> None:
    """Before the app is made: who may reset, and that several processes will be measured."""
    CHOICES["ALLOW_RESET"] = ("loopback", "0", "1")
    if not os.environ.get("WEB_CONCURRENCY", "").strip():  # empty it would stop gunicorn's import
        os.environ.pop("WEB_CONCURRENCY", None)
    if importlib.util.find_spec("gunicorn"):
        metrics.WORKERS_EXPECTED.append(True)


def serve(app: Flask) -> None:
    try:
        from gunicorn.app.wsgiapp import WSGIApplication
    except ImportError:  # on Windows for one
        serve_by_waitress(app)
        return
    sys.argv[1:] = ["--config", str(GUNICORN_CONF), "app:app"]
    server = WSGIApplication()
    # But under nohup: whoever closed the terminal could hardly stop it any more.
    server.ends_with_its_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    if "GUNICORN_FD" not in os.environ and "LISTEN_FDS" not in os.environ:
        require_free(server.cfg.address)
    print_banner(app, server.cfg.bind)
    server.run()


def serve_by_waitress(app: Flask) -> None:
    import waitress
    import waitress.utilities

    waitress.utilities.Error.to_response = json_error  # type: ignore[method-assign,assignment]
    host, port = app.config["HOST"], app.config["PORT"]
    require_free([(host, port)])
    print_banner(app, [address(app.config)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # SERVER_NAME is what may_reset goes by; gunicorn sets it to the bound address too.
    waitress.serve(app, host=host, port=port, threads=THREADS, ident="flash-sale", server_name=host)


def json_error(error: Any, ident: str | None = None) -> tuple[str, list[tuple[str, str]], bytes]:
    headers = [("Content-Type", "application/json"), *SECURITY_HEADERS]
    return f"{error.code} {error.reason}", headers, unreadable(str(error.body))


def print_banner(app: Flask, addresses: list[str]) -> None:
    store = app.extensions["store"]
    urls = [f"http://{address}" for address in addresses]
    page = f"{urls[0]}{os.environ.get('SCRIPT_NAME', '')}/sale"
    say(
        BANNER.format(
            **app.config, store=store, now=store.inventory(), url=", ".join(urls), page=page
        )
    )


def require_free(addresses: list[Any]) -> None:
    """One line now, where gunicorn would try for five seconds and log each attempt."""
    for place in addresses:
        try:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            if isinstance(place, tuple):  # not the path of a Unix socket
                socket.create_server(place, family=family).close()
        except (OSError, TypeError, ValueError) as error:  # the latter: no host can have this name
            cannot_start(f"{error} - set HOST or PORT", 1)  # as gunicorn exits then
