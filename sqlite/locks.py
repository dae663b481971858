"""Waiting for SQLite's write lock, fairly and not for ever."""

import random
import time

from sqlite.engine import primary_code, sqlite3

RETRY_SLEEP_MIN_S = 0.0005
RETRY_SLEEP_MAX_S = 0.005


class LockTimeoutError(Exception):
    """Another connection held the lock for all of `waited_s` seconds."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(f"no write lock after {waited_s:.3f} s")
        self.waited_s = waited_s


def retry_while_locked(
    connection: sqlite3.Connection, statement: str, lock_timeout_s: float, waiting_since: float = 0
) -> sqlite3.Cursor:
    """Execute a statement that takes a lock; again while it is held. Raises LockTimeoutError.

    SQLite's own waiting lets newcomers overtake. These sleeps are random and short, so no waiter
    has an advantage and the lock isn't free for long. `waiting_since`, of time.monotonic(), is when
    an earlier statement began to wait within the same timeout.
    """
    waiting_since = waiting_since or time.monotonic()
    sleep_max_s = RETRY_SLEEP_MIN_S
    while True:
        try:
            return connection.execute(statement)
        except sqlite3.DatabaseError as error:
            if primary_code(error) != sqlite3.SQLITE_BUSY:
                raise
        waited_s = time.monotonic() - waiting_since
        if waited_s >= lock_timeout_s:
            raise LockTimeoutError(waited_s)
        time.sleep(min(random.uniform(0, sleep_max_s), lock_timeout_s - waited_s))  # noqa: S311
        sleep_max_s = min(sleep_max_s * 1.5, RETRY_SLEEP_MAX_S)
