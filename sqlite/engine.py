"""The one import of SQLite: the newer one of pysqlite3's wheel where there is one, else Python's.

Both are the same module by origin. Two copies in one process must never open the same file: each
would drop the other's locks.
"""

import sqlite3
from typing import Any

CONNECT_OPTIONS: dict[str, Any] = {}
ORIGIN = "Python's own"
try:
    from pysqlite3 import dbapi2
except ImportError:  # no wheel for this platform: see requirements.txt
    pass
else:
    sqlite3, ORIGIN = dbapi2, "pysqlite3"
    # Python's module asks for the detailed error codes by itself (sqlite.org/c3ref/open.html).
    # Of a connection's threads only one at a time uses it, so SQLite needs no mutex for it.
    READ_WRITE, NO_MUTEX, URI, DETAILED_CODES = 0x2, 0x8000, 0x40, 0x0200_0000
    CONNECT_OPTIONS = {"flags": READ_WRITE | NO_MUTEX | URI | DETAILED_CODES}


def primary_code(error: BaseException) -> int:
    """SQLite's own code without its details, 0 where it isn't SQLite's error.

    The classes can't be relied on: the wheel raises DatabaseError for every detailed code.
    """
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


__all__ = ["CONNECT_OPTIONS", "ORIGIN", "primary_code", "sqlite3"]
