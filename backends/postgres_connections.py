"""Connections to PostgreSQL: opened after the fork, seen to be dead before use, never waited for too long."""

import logging
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg_pool import ConnectionPool, PoolTimeout

import db

# Not left to the server's configuration. The sale counts on READ COMMITTED; a plan that was made while
# the tables were empty is kept for the whole sale, so it must not be one that is good for empty tables.
SETTINGS = """
    SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false),
        set_config('default_transaction_isolation', 'read committed', false),
        set_config('plan_cache_mode', 'force_generic_plan', false),
        set_config('enable_seqscan', 'off', false), set_config('jit', 'off', false)"""
CONNECTION = {  # unless the URL says otherwise
    "connect_timeout": "2",
    "keepalives_idle": "10",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "client_encoding": "utf8",
    "fallback_application_name": "flash-sale",
}
POOL_SIZE = 4  # a sync worker never uses more than one, and the others are not opened then

CONNECT_POLL_S = 0.1  # how soon a refused connection is noticed
GRACE_S = 0.1  # the server's own lock_timeout comes first
CANCEL_TIMEOUT_S = 1.0
STATEMENT_RESERVE_S = 2.0  # then the server gives up by itself what nobody waits for any more

KEEP_CONNECTION = (  # after these it is as good as before
    errors.LockNotAvailable,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.IntegrityError,
)

logging.getLogger("psycopg.pool").setLevel(logging.WARNING)  # at INFO it tells every single use


class Connections:
    """The connections of each process that uses this object; none crosses a fork.

    `lock_timeout_s` bounds every wait for a lock. DB_POOL_SIZE connections at most, DB_POOL_TIMEOUT
    seconds to get one. Raises ValueError for a URL or a number that makes no sense.
    """

    def __init__(self, url: str, lock_timeout_s: float) -> None:
        self.lock_timeout_s = lock_timeout_s
        self.pool_size = int(_number("DB_POOL_SIZE", int, POOL_SIZE, 1, 100))
        self.pool_timeout_s = _number("DB_POOL_TIMEOUT", float, lock_timeout_s, 0, 3600)
        self._pools: dict[int, ConnectionPool[Connection]] = {}
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError:  # its message may show the password
            raise ValueError("must be postgresql://user:password@host/database, %-encoded") from None
        self._conninfo = conninfo.make_conninfo("", **{**CONNECTION, **given})

    def open(self) -> "Connection":
        """One outside the pool, for `with`. Raises psycopg.Error."""
        connection = Connection.connect(self._conninfo, autocommit=True)
        self._configure(connection)
        return connection

    def __str__(self) -> str:
        """Where to, without user and password."""
        place = conninfo.conninfo_to_dict(self._conninfo)
        return " ".join(f"{name} {place[name]}" for name in ("host", "port", "dbname") if place.get(name))

    @contextmanager
    def until(self, deadline: float) -> Iterator["Connection"]:
        """A live connection of the pool, which gives the statement up at the deadline."""
        pool = self._pools.get(os.getpid()) or self._pools.setdefault(os.getpid(), self._new_pool())
        pool.open()
        connection = self._lease(pool, min(deadline, time.monotonic() + self.pool_timeout_s))
        connection.deadline = deadline + GRACE_S
        try:
            yield connection
        except psycopg.Error as error:
            if not isinstance(error, KEEP_CONNECTION):
                connection.close()
            raise
        finally:
            if connection.warning or connection.cancelled:
                connection.close()
            pool.putconn(connection)

    def _lease(self, pool: "ConnectionPool[Connection]", until: float) -> "Connection":
        started = time.monotonic()
        failures = pool.get_stats().get("connections_errors")
        while True:
            try:
                connection = pool.getconn(CONNECT_POLL_S)
            except PoolTimeout:
                if pool.get_stats().get("connections_errors") != failures:
                    raise db.Unavailable("can't connect to PostgreSQL, see the log of psycopg.pool") from None
                if time.monotonic() >= until:
                    raise db.Busy(time.monotonic() - started) from None
            else:
                if connection.is_alive():
                    return connection
                connection.close()
                pool.putconn(connection)

    def _new_pool(self) -> "ConnectionPool[Connection]":
        """Not opened yet. It doesn't retry by itself: each request that needs a connection makes it try."""
        return ConnectionPool(
            self._conninfo,
            connection_class=Connection,
            kwargs={"autocommit": True},
            configure=self._configure,
            min_size=0,
            max_size=self.pool_size,
            num_workers=1,
            reconnect_timeout=0,
            open=False,
        )

    def _configure(self, connection: "Connection") -> None:
        connection.add_notice_handler(connection.take_notice)
        lock_timeout_ms = max(1, round(self.lock_timeout_s * 1000))  # 0 would be no limit
        statement_timeout_ms = lock_timeout_ms + round(STATEMENT_RESERVE_S * 1000)
        connection.execute(SETTINGS, (str(lock_timeout_ms), str(statement_timeout_ms)))

    def close(self) -> None:
        """Close this process's connections."""
        if pool := self._pools.pop(os.getpid(), None):
            pool.close()


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """Cancels a statement that runs past `deadline`, and gives up when not even that is answered."""

    deadline = math.inf  # of time.monotonic()
    cancelled = False
    warning = ""

    def is_alive(self) -> bool:
        """Whether the server hasn't hung up, as far as this host knows: without a round trip."""
        try:
            for _ in range(2):  # its last words, and the end after them
                self.pgconn.consume_input()
        except psycopg.OperationalError:
            return False
        return not self.closed

    def take_notice(self, notice: errors.Diagnostic) -> None:
        """A WARNING at a sale: committed here, but the wait for the synchronous standby was cut short."""
        if notice.severity_nonlocalized == "WARNING":
            self.warning = notice.message_primary or "warning"

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        try:
            wish = next(gen)
            while True:
                ready = yield wish
                if not ready and time.monotonic() > self.deadline:
                    self._cancel_or_give_up()
                wish = gen.send(ready)
        except StopIteration as stop:
            return stop.value

    def _cancel_or_give_up(self) -> None:
        if self.cancelled:
            raise psycopg.OperationalError("the server doesn't answer")
        self.cancelled = True
        self.deadline = time.monotonic() + CANCEL_TIMEOUT_S
        self.cancel_safe(timeout=CANCEL_TIMEOUT_S)


def _number(name: str, kind: type[int] | type[float], default: float, lowest: float, highest: float) -> float:
    """A number from the environment; raises ValueError in words that go after "DATABASE_URL"."""
    text = os.environ.get(name) or default
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not lowest <= value <= highest:
        raise ValueError(f"needs {name} to be {kind.__name__} from {lowest} to {highest}, not {text!r}")
    return value
