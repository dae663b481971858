"""Connections to PostgreSQL: made after the fork, checked before use, each step with a deadline.

psycopg opens a connection and cancels on it. A sale speaks to libpq through `psycopg.pq`: that
costs half of what a cursor does, and its waits can be bounded.
"""

import os
import re
import selectors
import time
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from queue import Empty, LifoQueue
from threading import Lock
from typing import Any

import psycopg
from psycopg import conninfo, errors
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGresult

import db
from serving.config import ConfigError

SET_UP = Path(__file__).with_name("session.sql").read_text("utf-8")
DEFAULTS = {  # unless the URL says otherwise
    "connect_timeout": "2",
    "tcp_user_timeout": "3000",
    "keepalives_idle": "10",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "fallback_application_name": "flash-sale",
}
SET_UP_TIMEOUT_S = 2.0
CONNECT_PAUSE_S = 0.25  # on average, after as many connects at once as the pool is large
GRACE_S = 0.1  # the server's own lock_timeout comes first
CANCEL_TIMEOUT_S = 1.0
STATEMENT_RESERVE_S = 2.0  # then the server gives up by itself what nobody waits for any more

Row = tuple[Any, ...]
Outcome = Row | psycopg.Error
Statement = tuple[str, Sequence[str | None]]
INTEGER_TYPES = (20, 23)  # the oids of bigint and integer
KEEP_CONNECTION = (  # after these it is as good as before
    errors.LockNotAvailable,
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.IntegrityError,
)
Selector: type[selectors.BaseSelector] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)


class Connections:
    """The connections of each process that uses this object; none crosses a fork.

    `lock_timeout_s` bounds every wait for a lock, `pool_timeout_s` that for one of `pool_size`
    connections. Raises ConfigError for a URL that makes no sense.
    """

    schema: str | None = None  # as SQL writes it; None: the tables are where search_path finds them

    def __init__(
        self, url: str, lock_timeout_s: float, pool_size: int, pool_timeout_s: float
    ) -> None:
        lock_timeout_ms = max(1, round(lock_timeout_s * 1000))  # 0 would be no limit
        statement_timeout_ms = lock_timeout_ms + round(STATEMENT_RESERVE_S * 1000)
        self._timeouts = (str(lock_timeout_ms), str(statement_timeout_ms))
        self._pool_timeout_s = pool_timeout_s
        self._pool_size = pool_size
        self._pools: dict[int, Pool] = {}  # by process id
        given = _parse(url)
        places = [f"{name} {given[name]}" for name in ("host", "port", "dbname") if name in given]
        self.place = " ".join(places)  # without user and password
        self._hosts = deque(_one_for_each_host(given))  # the one that answered last comes first

    def ask(
        self, deadline: float, *transactions: Sequence[Statement], patience_s: float = 0
    ) -> list[Outcome]:
        """As `Connection.ask`, on a standing connection. Raises Busy and Unavailable, too.

        `patience_s`: for which an answer may come after `deadline`, as the server ends the wait
        for a lock by itself.
        """
        pool = self._pool()
        connection = pool.take(min(deadline, time.monotonic() + self._pool_timeout_s))
        is_as_before = False
        try:
            if connection and not connection.is_alive():
                connection.close()
            if connection is None or connection.closed:
                connection = self.open(deadline)
            outcomes = connection.ask(deadline + GRACE_S + patience_s, *transactions)
            is_as_before = connection.is_as_before(outcomes)
            return outcomes
        finally:
            if connection and not is_as_before:
                connection.close()
            pool.slots.put(connection if is_as_before else None)

    def open(self, deadline: float) -> "Connection":
        """A new one to the first host that is ready in time. Raises Unavailable."""
        failures = []
        for _ in range(len(self._hosts)):
            self._pool().wait_to_connect(deadline)
            try:
                return self._open(self._hosts[0])
            except psycopg.Error as error:
                failures.append(one_line(error))
                self._hosts.rotate(-1)
        raise db.Unavailable(f"can't connect to PostgreSQL: {'; '.join(failures)}")

    def _open(self, host: str) -> "Connection":
        connection = Connection.connect(host, autocommit=True)
        connection.add_notice_handler(connection.take_notice)
        connection.pgconn.enter_pipeline_mode()
        set_up = [(SET_UP, (*self._timeouts, self.schema))]
        try:
            deadline = time.monotonic() + SET_UP_TIMEOUT_S
            row_of(*connection.ask(deadline, set_up, prepare=False))
        except BaseException:
            connection.close()
            raise
        connection.cancelled = False
        return connection

    def _pool(self) -> "Pool":
        """This process's."""
        pid = os.getpid()
        return self._pools.get(pid) or self._pools.setdefault(pid, Pool(self._pool_size))

    def close(self) -> None:
        """Close this process's connections."""
        slots = self._pools.pop(os.getpid(), Pool(0)).slots
        while not slots.empty():
            if connection := slots.get():
                connection.close()


class Pool:
    """A slot for each connection of one process; newcomers can't overtake those who wait."""

    def __init__(self, size: int) -> None:
        self.slots: LifoQueue[Connection | None] = LifoQueue()
        for _ in range(size):
            self.slots.put(None)
        self._door = Lock()
        self._lock = Lock()
        self._early_s = (size - 1) * CONNECT_PAUSE_S
        self._next_connect = 0.0  # of time.monotonic(), or up to `_early_s` before

    def take(self, until: float) -> "Connection | None":
        started = time.monotonic()
        if self._door.acquire(timeout=max(until - started, 0)):
            try:
                return self.slots.get(timeout=max(until - time.monotonic(), 0))
            except Empty:
                pass
            finally:
                self._door.release()
        raise db.Busy(time.monotonic() - started, "connection of the pool")

    def wait_to_connect(self, deadline: float) -> None:
        """No fault makes this process knock on every server without a pause."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next_connect, now)
            if turn - self._early_s > deadline:
                raise db.Unavailable("PostgreSQL was asked for connections too often just now")
            self._next_connect = turn + CONNECT_PAUSE_S
        time.sleep(max(turn - self._early_s - now, 0))


class Connection(psycopg.Connection[Row]):
    """One that waits no longer than it is told, for whatever reason there is no answer."""

    cancelled = True  # while it is set up, there is nothing to cancel
    _warning = ""
    _deadline = 0.0

    @cached_property
    def _names(self) -> dict[str, bytes]:
        """Of the statements that are prepared on this connection."""
        return {}

    @cached_property
    def _selector(self) -> selectors.BaseSelector:
        selector = Selector()
        selector.register(self.pgconn.socket, selectors.EVENT_READ)
        return selector

    def ask(
        self, deadline: float, *transactions: Sequence[Statement], prepare: bool = True
    ) -> list[Outcome]:
        """What came of each transaction: its last row, or the error. All are sent in one trip.

        Without an answer that is an OperationalError: after `deadline`, of time.monotonic(), and
        another CANCEL_TIMEOUT_S in which the server may cancel. Raises only before they are sent.
        """
        self._deadline = deadline
        for statement, _ in chain(*transactions) if prepare else ():
            if statement not in self._names:
                self._prepare(statement)
        for transaction in transactions:
            for statement, parameters in transaction:
                texts = [text if text is None else text.encode() for text in parameters]
                if prepare:
                    self.pgconn.send_query_prepared(self._names[statement], texts)
                else:
                    self.pgconn.send_query_params(statement.encode(), texts)
            self.pgconn.pipeline_sync()
        return [self._outcome() for _ in transactions]

    def is_as_before(self, outcomes: list[Outcome]) -> bool:
        """Whether another purchase may use it."""
        failures = [outcome for outcome in outcomes if isinstance(outcome, psycopg.Error)]
        return not self.cancelled and all(isinstance(error, KEEP_CONNECTION) for error in failures)

    def is_alive(self) -> bool:
        """Whether the server hasn't hung up, as far as this host knows: without a round trip."""
        try:
            for _ in range(2):  # its last words, and the end after them
                self.pgconn.consume_input()
        except psycopg.OperationalError:
            return False
        return not self.closed

    def take_notice(self, notice: errors.Diagnostic) -> None:
        """A WARNING: committed here, but the wait for the synchronous standby was cut short."""
        if notice.severity_nonlocalized == "WARNING":
            self._warning = notice.message_primary or "warning"

    def _prepare(self, statement: str) -> None:
        name = b"%d" % len(self._names)
        self.pgconn.send_prepare(name, statement.encode())
        self.pgconn.pipeline_sync()
        row_of(self._outcome())
        self._names[statement] = name

    def _outcome(self) -> Outcome:
        outcome: Outcome = ()
        self._warning = ""
        try:
            while True:
                result = self._next_result()
                if result is None and self.pgconn.status != ConnStatus.OK:
                    raise psycopg.OperationalError("the connection was lost")
                if result is None:  # the end of a statement
                    continue
                if result.status == ExecStatus.PIPELINE_SYNC:
                    return psycopg.OperationalError(self._warning) if self._warning else outcome
                if result.status == ExecStatus.FATAL_ERROR:
                    outcome = errors.error_from_result(result)
                elif result.ntuples:
                    outcome = tuple(_value(result, column) for column in range(result.nfields))
        except psycopg.OperationalError as error:
            return outcome if isinstance(outcome, psycopg.Error) else error  # its last words

    def _next_result(self) -> PGresult | None:
        while self.pgconn.flush() or self.pgconn.is_busy():
            self._wait()
            self.pgconn.consume_input()
        return self.pgconn.get_result()

    def _wait(self) -> None:
        """Until the server has something to say; cancel at the deadline, give up soon after."""
        if self._selector.select(max(self._deadline - time.monotonic(), 0)):
            return
        if self.cancelled:
            raise psycopg.OperationalError("the server doesn't answer")
        self.cancelled = True
        self._deadline = time.monotonic() + CANCEL_TIMEOUT_S
        self.cancel_safe(timeout=CANCEL_TIMEOUT_S)


def row_of(outcome: Outcome) -> Row:
    """The row; raises the error."""
    if isinstance(outcome, psycopg.Error):
        raise outcome
    return outcome


def one_line(error: psycopg.Error) -> str:
    return " ".join((error.diag.message_primary or str(error)).split())


def _value(result: PGresult, column: int) -> int | str | None:
    value = result.get_value(0, column)
    if value is None:
        return None
    return int(value) if result.ftype(column) in INTEGER_TYPES else value.decode()


def _one_for_each_host(given: dict[str, str]) -> list[str]:
    """libpq tries several hosts by itself, but no other if one falls silent after the log-in."""
    lists = {name: given[name].split(",") for name in ("host", "hostaddr", "port") if name in given}
    count = max(map(len, lists.values()), default=1)
    if any(len(values) not in (1, count) for values in lists.values()):
        raise ConfigError("DATABASE_URL has to name one port, or one for each of its hosts")
    places = [{name: lists[name][n % len(lists[name])] for name in lists} for n in range(count)]
    return [conninfo.make_conninfo("", **DEFAULTS | given | place) for place in places]


def _parse(url: str) -> dict[str, str]:
    wrong = "DATABASE_URL has to be postgresql://user:password@host/database, %-encoded"
    if not URL.fullmatch(url):
        raise ConfigError(f"{wrong} (@ is %40, : is %3A, / is %2F)")
    try:
        return {name: str(value) for name, value in conninfo.conninfo_to_dict(url).items() if value}
    except psycopg.ProgrammingError:  # its message may show the password
        raise ConfigError(wrong) from None


# Stricter than libpq, which takes a part of a password with an unencoded @, / or : for a host or a
# port, and shows it in its messages.
HOST = r"(?:[^@/?#:\[\],\s]*|\[[^\]@/\s]+\])(?::\d*)?"
URL = re.compile(rf"postgres(?:ql)?://(?:[^@/?#\s]*@)?{HOST}(?:,{HOST})*(?:/[^@?#]*)?(?:\?[^@#]*)?")
