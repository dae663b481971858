"""An SQLite file in WAL mode: its connections, and what puts commits on disk. It knows no sale.

A COMMIT here does not flush (synchronous = NORMAL). `flush` does, after the write lock is free, so
the flushes of several workers overlap. NOTES, "Durable before the 200", says why that is sound.
Where the platform has no fdatasync, COMMIT flushes under the lock and `flush` does nothing.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections import defaultdict, deque
from contextlib import closing
from pathlib import Path

FLUSH_AFTER_LOCK = hasattr(os, "fdatasync")
SET_SYNCHRONOUS = f"PRAGMA synchronous = {'NORMAL' if FLUSH_AFTER_LOCK else 'FULL'}"
READ_PATIENCE_S = 5.0  # for a SELECT while another process recovers the WAL
CHECKPOINT_PATIENCE_S = 0.1  # a checkpoint may hold the write lock while it waits for a reader
REPLACED_CHECK_S = 1.0  # each look at the file costs as much as a SELECT of the stock

log = logging.getLogger(__name__)


class FlushError(Exception):
    """A commit may or may not be on disk."""


class WalReader:
    """A standing connection: read-only, opened after the fork, each read on it finished at once.

    While one is open SQLite keeps the WAL; the last close deletes it, and the next sale pays for a
    new one. The WAL's descriptor is opened before any COMMIT that is flushed through it: Linux
    reports a failed write only to descriptors that were open then.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, idle: deque[WalReader]) -> None:
        self.path = path
        self.connection = connection
        self.idle = idle
        self.file_id = file_id(path)
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # opens the WAL
        self.wal_path = f"{path}-wal"
        self.wal = os.open(self.wal_path, os.O_RDONLY)
        self.wal_id = file_id(self.wal_path)

    def __enter__(self) -> WalReader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, sqlite3.Error | OSError):
            self.close()  # it may be what is broken: the next call opens another
        else:
            self.idle.append(self)

    def is_current(self) -> bool:
        """False if the database file was replaced; looked at once in REPLACED_CHECK_S."""
        if time.monotonic() < self.next_check:
            return True
        self.next_check = time.monotonic() + REPLACED_CHECK_S
        try:
            return file_id(self.path) == self.file_id
        except OSError:
            return False

    def require_same_wal(self) -> None:
        """Raise OSError if a sale would go to another file than the one that is flushed for it."""
        if file_id(self.wal_path) != self.wal_id:
            raise OSError("the database was replaced")

    def close(self) -> None:
        os.close(self.wal)
        self.connection.close()


class WalDatabase:
    """The connections of this process to one file. Raises sqlite3.Error and OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = path.as_uri()  # quoted once: each purchase opens it
        self._idle: defaultdict[int, deque[WalReader]] = defaultdict(deque)  # by process id
        self._wal_is_whole = True  # False after a failed flush, until a whole checkpoint

    def connect(self, mode: str = "rw", patience_s: float = READ_PATIENCE_S) -> sqlite3.Connection:
        """A new connection. A statement that meets a lock waits `patience_s`."""
        uri = f"{self.uri}?mode={mode}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=patience_s, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # see checkpoint()
        if not FLUSH_AFTER_LOCK:
            connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync stops at the disk's cache
        return connection

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

    def flush(self, reader: WalReader) -> None:
        """Put every COMMIT so far on disk. Raises FlushError."""
        if not FLUSH_AFTER_LOCK:
            return
        try:
            os.fdatasync(reader.wal)
        except OSError as error:
            # Linux marks the lost pages clean: acknowledge nothing until they are written anew.
            self._wal_is_whole = self.checkpoint()
            raise FlushError(f"{reader.wal_path}: flush failed: {error}") from error
        if not self._wal_is_whole:
            self._wal_is_whole = self.checkpoint()
            if not self._wal_is_whole:
                raise FlushError(f"{reader.wal_path}: an earlier flush failed")

    def checkpoint(self) -> bool:
        """Copy the WAL into the database file, so that it starts over; whether all was copied.

        RESTART holds the write lock. A checkpoint beside a commit can corrupt the database in
        SQLite before 3.51.3 (sqlite.org/wal.html, "the WAL-reset bug"): hence
        wal_autocheckpoint=0, and this.
        """
        try:
            with closing(self.connect(patience_s=CHECKPOINT_PATIENCE_S)) as connection:
                connection.execute(SET_SYNCHRONOUS)
                _, frames, copied = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        except sqlite3.Error as error:  # the sales before it are safe in the WAL
            log.error("checkpoint of %s failed: %s", self.path, error)
            return False
        if copied < frames:
            log.warning("checkpoint incomplete, the WAL grows: a reader stays in %s", self.path)
        return bool(0 <= frames == copied)  # -1: another process is at it

    def close(self) -> None:
        """Close this process's standing connections."""
        for reader in self._idle.pop(os.getpid(), ()):
            reader.close()

    def _open_reader(self, idle: deque[WalReader]) -> WalReader:
        connection = self.connect("ro")
        try:
            return WalReader(self.path, connection, idle)
        except BaseException:
            connection.close()
            raise


def file_id(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
