"""The one import of SQLite: the newer one of pysqlite3's wheel where there is one, else Python's.

Both are the same module by origin. Two copies in one process must never open the same file: each
would drop the other's locks.
"""

import sqlite3

try:
    from pysqlite3 import dbapi2
except ImportError:  # no wheel for this platform: see requirements.txt
    ORIGIN = "Python's own"
else:
    sqlite3, ORIGIN = dbapi2, "pysqlite3"

__all__ = ["ORIGIN", "sqlite3"]
