"""An SQLite file in WAL mode: its connections, and what puts commits on disk. It knows no sale.

A COMMIT here does not flush (synchronous = NORMAL). `flush` does, after the write lock is free, so
the flushes of several workers overlap. NOTES, "Durable before the answer", says why that is sound.
Where the platform has no fdatasync, COMMIT flushes under the lock and `flush` does nothing.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlite.engine import CONNECT_OPTIONS, sqlite3
from sqlite.locks import LockTimeoutError, retry_while_locked

FLUSH_AFTER_LOCK = hasattr(os, "fdatasync")
SET_SYNCHRONOUS = f"PRAGMA synchronous = {'NORMAL' if FLUSH_AFTER_LOCK else 'FULL'}"
CHECKPOINT_PATIENCE_S = 0.1  # for the write lock, which the sale before it had an instant ago
READ_PATIENCE_S = 5.0  # for a SELECT while another process recovers the WAL
LONG_WAIT_S = 0.01  # what was asked before such a wait is asked again
REPLACED_CHECK_S = 1.0  # each look at the file costs as much as a SELECT of the stock

# Extended codes that pysqlite3 has no names for (sqlite.org/rescode.html).
IOERR_WRITE, IOERR_FSYNC, IOERR_DIR_FSYNC = 778, 1034, 1290

# Why a service writes no more: the number is what its processes share.
RUNNING, FLUSH_FAILED, FILES_REMOVED = 0, 1, 2
TO_DO = "stop the service, then start it (no reload, no upgrade)"
CAUSES = {
    RUNNING: "",
    FLUSH_FAILED: f"a flush failed, so the disk may lack what memory holds - {TO_DO}",
    FILES_REMOVED: f"the -wal or -shm was removed or replaced, with what only it held - {TO_DO}",
}

log = logging.getLogger(__name__)


class FlushError(Exception):
    """A commit may or may not be on disk."""


class StoppedError(Exception):
    """Nothing is written or confirmed any more until the service was stopped and started."""


class WalReader:
    """A standing connection: read-only, opened after the fork, each read on it finished at once.

    While one is open SQLite keeps the WAL; the last close deletes it, and the next sale pays for a
    new one. The WAL's descriptor is opened before any COMMIT that is flushed through it: Linux
    reports a failed write only to descriptors that were open then.
    """

    def __init__(
        self, database: WalDatabase, connection: sqlite3.Connection, idle: deque[WalReader]
    ) -> None:
        self.database = database
        self.connection = connection
        self.idle = idle
        self.file_id = file_id(database.path)
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        self.flushed_version: object = None
        self.note: object = None  # the caller's own
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # opens WAL and shm
        self.wal_path, self.shm_path = f"{database.path}-wal", f"{database.path}-shm"
        self.wal = os.open(self.wal_path, os.O_RDONLY)
        self.side_ids = file_id(self.wal_path), file_id(self.shm_path)

    def __enter__(self) -> WalReader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, sqlite3.Error | OSError):
            self._stop_if_files_were_removed()  # the next reader would take the new ones for ours
            self.close()  # it may be what is broken: the next call opens another
        else:
            self.idle.append(self)

    def version(self) -> object:
        """Differs once anybody has changed the database since it was read last."""
        return self.connection.execute("PRAGMA data_version").fetchone()

    def is_current(self) -> bool:
        """False if the database file was replaced; looked at once in REPLACED_CHECK_S."""
        if time.monotonic() < self.next_check:
            return True
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        self._stop_if_files_were_removed()
        return self._is_same_database()

    def require_same_files(self) -> None:
        """Stop the service where the WAL is another than the one that is flushed, or the shm.

        The processes that have the old ones would sell beside those that have the new ones. Raises
        OSError where the database itself is another: the next call opens that one.
        """
        try:
            if (file_id(self.wal_path), file_id(self.shm_path)) == self.side_ids:
                return
        except FileNotFoundError:
            pass
        if self._is_same_database():
            self.database.stop(FILES_REMOVED)
        self.database.require_running()
        raise OSError("the database was moved or replaced")

    def _stop_if_files_were_removed(self) -> None:
        with suppress(OSError, StoppedError):
            self.require_same_files()

    def _is_same_database(self) -> bool:
        try:
            return file_id(self.database.path) == self.file_id
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.wal)
        self.connection.close()


class WalDatabase:
    """The connections of this process to one file. Raises sqlite3.Error and OSError.

    It has to be made before the fork: the processes share whether they must stop. A flush that
    failed stops them all, as Linux tells of it only descriptors that were open before, and takes
    the lost pages for clean. Only recovery, at a start, checks what the WAL still holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = path.as_uri()  # quoted once: each purchase opens it
        self._idle: defaultdict[int, deque[WalReader]] = defaultdict(deque)  # by process id
        self._cause = mmap.mmap(-1, 1)  # anonymous: of all processes that are forked from this one
        self.on_lock_wait: Callable[[float], object] = lambda seconds: None
        self.on_checkpoint: Callable[[], object] = lambda: None

    def stop(self, cause: int) -> None:
        self._cause[0] = self._cause[0] or cause

    @property
    def stopped(self) -> str:
        """Why this service may not write, and what to do; "" while it may."""
        return CAUSES[self._cause[0]]

    def require_running(self) -> None:
        """Raise StoppedError once a process of this service had to stop it."""
        if self._cause[0]:
            raise StoppedError(self.stopped)

    def connect(self, mode: str = "rw", patience_s: float = READ_PATIENCE_S) -> sqlite3.Connection:
        """A new connection. A statement that meets a lock waits `patience_s`."""
        connection: sqlite3.Connection = sqlite3.connect(
            f"{self.uri}?mode={mode}",
            uri=True,
            timeout=patience_s,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time has it
            **CONNECT_OPTIONS,
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint()
        if not FLUSH_AFTER_LOCK:
            connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync stops at the disk's cache
        return connection

    def running_reader(self) -> WalReader:
        """For what writes or confirms: the reader, or StoppedError after a stop."""
        self.require_running()
        return self.reader()

    def reader(self) -> WalReader:
        """This process's standing connection, or one more while another thread uses it."""
        idle = self._idle[os.getpid()]  # a fork must not share them
        while True:
            try:
                reader = idle.pop()  # atomic, so there is no lock between threads
            except IndexError:
                return self._open_reader(idle)
            if reader.is_current():
                return reader
            reader.close()

    @contextmanager
    def begin_immediate(
        self, lock_timeout_s: float, require: Callable[[], object] = lambda: None
    ) -> Iterator[sqlite3.Connection]:
        """The one place that begins, commits and rolls back, on a connection of its own.

        `require` refuses by an exception. It is asked before the lock is taken, because it is slow,
        and again under the lock only where the wait was longer than LONG_WAIT_S. Raises
        LockTimeoutError, StoppedError, and FlushError where nobody knows the outcome.
        """
        waited_s = None
        connection = self.connect(patience_s=0)
        try:
            started = time.monotonic()
            retry_while_locked(connection, SET_SYNCHRONOUS, lock_timeout_s)  # opens -wal and -shm
            require()
            retry_while_locked(connection, "BEGIN IMMEDIATE", lock_timeout_s, started)
            waited_s = time.monotonic() - started
            if waited_s > LONG_WAIT_S:
                require()
            self.require_running()
            yield connection
            self._commit(connection)
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            connection.close()
            if waited_s is not None:
                self.on_lock_wait(waited_s)

    def _commit(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # The kernel took no page (no room, a limit): without it there is no transaction.
            if error.sqlite_errorcode in (sqlite3.SQLITE_FULL, IOERR_WRITE):
                raise
            self._stop_if_flush_failed(error)
            raise FlushError(f"COMMIT failed: {error}") from error

    def flush(self, reader: WalReader) -> None:
        """Put every COMMIT so far on disk. Raises FlushError."""
        try:
            if FLUSH_AFTER_LOCK:
                os.fdatasync(reader.wal)
        except OSError as error:
            self.stop(FLUSH_FAILED)
            raise FlushError(f"{reader.wal_path}: {self.stopped}: {error}") from error
        if self._cause[0]:  # another process was told of what this one wasn't
            raise FlushError(f"{reader.wal_path}: {self.stopped}")

    def confirm(self, reader: WalReader) -> None:
        """Put on disk what `reader` has read, once after each change. Raises OSError."""
        version = reader.version()
        if version == reader.flushed_version:
            return
        reader.require_same_files()
        try:
            self.flush(reader)
        except FlushError as error:  # nothing was written, so nothing is in doubt
            raise OSError(str(error)) from error
        reader.flushed_version = version

    def checkpoint(self) -> None:
        """Copy the WAL into the database file, so that it starts over; logs why it couldn't.

        Only under the write lock: a checkpoint beside a commit can corrupt the database in SQLite
        before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug"). Hence wal_autocheckpoint = 0, and
        PASSIVE, which waits for no reader.
        """
        try:
            with self.running_reader() as reader, self.begin_immediate(CHECKPOINT_PATIENCE_S):
                frames, copied = self._copy_wal(reader)
        except (LockTimeoutError, StoppedError, FlushError, sqlite3.Error, OSError) as error:
            # What was committed is safe in the WAL.
            log.error("checkpoint of %s failed: %s", self.path, error)
            return
        self.on_checkpoint()
        if copied < frames:
            log.warning("checkpoint incomplete, the WAL grows: a reader stays in %s", self.path)

    def _copy_wal(self, reader: WalReader) -> tuple[int, int]:
        """The frames in the WAL, and how many of them are in the database file now.

        SQLite flushes the WAL too, but through a descriptor that it opens now. That one is not told
        what failed before, perhaps in a process that has not yet stopped the others.
        """
        self.flush(reader)
        with closing(self.connect(patience_s=0)) as connection:
            connection.execute(SET_SYNCHRONOUS)
            try:
                _, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                self._stop_if_flush_failed(error)
                raise
        return frames, copied

    def checkpoint_if_alone(self) -> None:
        """Put what an earlier service left in the WAL into the database file.

        Nobody else may have the file open: a service whose flush failed may still live, and only a
        recovery checks the frames, which the first connection makes.
        """
        with closing(self.connect(patience_s=0)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            try:
                retry_while_locked(connection, "BEGIN IMMEDIATE", 0)
            except LockTimeoutError:
                return
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def gauges(self) -> dict[str, float]:
        """For a monitor: the bytes of the WAL, and 1 if a flush failed."""
        try:
            size = os.stat(f"{self.path}-wal").st_size
        except FileNotFoundError:  # nobody has the file open
            size = 0
        return {"wal_bytes": size, "flush_failed": float(self._cause[0] == FLUSH_FAILED)}

    def close(self) -> None:
        """Close this process's standing connections."""
        for reader in self._idle.pop(os.getpid(), ()):
            reader.close()

    def _open_reader(self, idle: deque[WalReader]) -> WalReader:
        connection = self.connect("ro")
        try:
            return WalReader(self, connection, idle)
        except BaseException:
            connection.close()
            raise

    def _stop_if_flush_failed(self, error: sqlite3.Error) -> None:
        if error.sqlite_errorcode in (IOERR_FSYNC, IOERR_DIR_FSYNC):
            self.stop(FLUSH_FAILED)


def file_id(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
