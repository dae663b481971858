"""Connections to PostgreSQL: opened after the fork, seen to be dead before use, never waited for too long."""

import logging
import math
import os
import selectors
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult
from psycopg_pool import ConnectionPool, PoolTimeout

import db
from serving.config import ConfigError

# Not left to the server's configuration. The sale counts on READ COMMITTED; a plan that was made while
# the tables were empty is kept for the whole sale, so it must not be one that is good for empty tables.
# A 200 means on disk: synchronous_commit may be stricter than on, or local, but not off.
SETTINGS = """
    SELECT set_config('lock_timeout', %s, false), set_config('statement_timeout', %s, false),
        set_config('default_transaction_isolation', 'read committed', false),
        set_config('plan_cache_mode', 'force_generic_plan', false),
        set_config('enable_seqscan', 'off', false), set_config('jit', 'off', false),
        set_config('synchronous_commit',
            replace(current_setting('synchronous_commit'), 'off', 'on'), false)"""
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

INTEGER_TYPES = (20, 23)  # the oids of bigint and integer
Row = tuple[Any, ...]
Selector: type[selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)

KEEP_CONNECTION = (  # after these it is as good as before
    errors.LockNotAvailable,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.IntegrityError,
)

logging.getLogger("psycopg.pool").setLevel(logging.WARNING)  # at INFO it tells every single use


class Connections:
    """The connections of each process that uses this object; none crosses a fork.

    `lock_timeout_s` bounds every wait for a lock, `pool_timeout_s` that for one of `pool_size`
    connections. Raises ConfigError for a URL that makes no sense.
    """

    def __init__(
        self, url: str, lock_timeout_s: float, pool_size: int, pool_timeout_s: float
    ) -> None:
        self.lock_timeout_s = lock_timeout_s
        self.pool_size = pool_size
        self.pool_timeout_s = pool_timeout_s
        self._pools: dict[int, ConnectionPool[Connection]] = {}
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError:  # its message may show the password
            raise ConfigError(
                "DATABASE_URL has to be postgresql://user:password@host/database, %-encoded"
            ) from None
        self._conninfo = conninfo.make_conninfo("", **{**CONNECTION, **given})

    def open(self) -> "Connection":
        """One outside the pool, for `with`. Raises psycopg.Error."""
        connection = Connection.connect(self._conninfo, autocommit=True)
        self._configure(connection)
        return connection

    def __str__(self) -> str:
        """Where to, without user and password."""
        place = conninfo.conninfo_to_dict(self._conninfo)
        return " ".join(
            f"{name} {place[name]}" for name in ("host", "port", "dbname") if place.get(name)
        )

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
                    raise db.Unavailable(
                        "can't connect to PostgreSQL, see the log of psycopg.pool"
                    ) from None
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


class Connection(psycopg.Connection[Row]):
    """One that waits no longer than `deadline`, for whatever reason there is no answer."""

    deadline = math.inf  # of time.monotonic()
    cancelled = False
    warning = ""

    @cached_property
    def _names(self) -> dict[str, bytes]:
        """Of the statements that are prepared on this connection."""
        return {}

    @cached_property
    def _selector(self) -> selectors.BaseSelector:
        selector = Selector()
        selector.register(self.pgconn.socket, selectors.EVENT_READ)
        return selector

    def ask(self, statement: str, parameters: Sequence[str | None] | None) -> Row | None:
        """The first row, numbers and texts. Prepared, unless `parameters` is None. Raises psycopg.Error.

        Straight to libpq: half the cost of a cursor on this side, and a wait that can be bounded.
        """
        if parameters is None:
            self.pgconn.send_query(statement.encode())
            return self._answer()
        name = self._names.get(statement)
        if name is None:
            name = self._names[statement] = b"%d" % len(self._names)
            self.pgconn.send_prepare(name, statement.encode())
            self._answer()
        texts = [text if text is None else text.encode() for text in parameters]
        self.pgconn.send_query_prepared(name, texts)
        return self._answer()

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

    def _answer(self) -> Row | None:
        row: Row | None = None
        failure: psycopg.Error | None = None
        try:
            while result := self._next_result():
                if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
                    failure = failure or errors.error_from_result(result)
                elif result.ntuples:
                    row = tuple(_value(result, column) for column in range(result.nfields))
        except psycopg.OperationalError as error:  # after a FATAL error the connection ends
            raise failure or error from None
        if failure:
            raise failure
        return row

    def _next_result(self) -> PGresult | None:
        while self.pgconn.flush() or self.pgconn.is_busy():
            self._wait()
            self.pgconn.consume_input()
        return self.pgconn.get_result()

    def _wait(self) -> None:
        """Until the server has something to say; cancel at the deadline, give up soon after."""
        left_s = self.deadline - time.monotonic()
        if self._selector.select(max(left_s, 0)):
            return
        if self.cancelled:
            raise psycopg.OperationalError("the server doesn't answer")
        self.cancelled = True
        self.deadline = time.monotonic() + CANCEL_TIMEOUT_S
        self.cancel_safe(timeout=CANCEL_TIMEOUT_S)


def _value(result: PGresult, column: int) -> int | str | None:
    value = result.get_value(0, column)
    if value is None:
        return None
    return int(value) if result.ftype(column) in INTEGER_TYPES else value.decode()
