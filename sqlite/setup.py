"""What an SQLite file has to be before anything is sold from it. OSError says what to change."""

import os
import re
from contextlib import closing, suppress
from pathlib import Path

from sqlite.engine import sqlite3
from sqlite.locks import retry_while_locked
from sqlite.wal import WalDatabase

SCHEMA = Path(__file__).parent.parent / "schema.sql"
APPLICATION_ID = 0x464C5348  # as in schema.sql, like the version
SCHEMA_VERSION = 1
CONSTRAINT_TRIGGER = 1811  # an extended code that pysqlite3 has no name for
MOVED = "moved"  # the trigger that stops the sale where it was moved to another database


def require_usable(path: Path) -> None:
    """Put an empty file there, for its owner only, or say why no database can be there."""
    if sqlite3.sqlite_version_info < (3, 37):
        raise OSError(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    if not path.is_file():
        raise OSError("it is a folder or a device - name a file")
    beside = (Path(f"{path}-wal"), Path(f"{path}-shm"))
    for place in (path, path.parent, *filter(Path.exists, beside)):
        if not may_write(place):
            raise OSError(why_not(place))
    require_one_name(path)


def require_one_name(path: Path) -> None:
    """SQLite puts a WAL beside each name of a file: two of them would sell every unit twice."""
    names = path.stat().st_nlink
    if names > 1:
        raise OSError(f"the file has {names} names (hard links) - keep one and remove the others")
    with suppress(FileNotFoundError):  # Linux has it
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        if str(path) in {unescaped(line.split()[4]) for line in mounts.splitlines()}:
            raise OSError("the file itself is a mount point - mount the folder that holds it")


def unescaped(mount_point: str) -> str:
    """Blanks and backslashes stand there as three octal digits (man 5 proc)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), mount_point)


def may_write(place: Path) -> bool:
    """With the rights that count when a file is opened, where the platform can tell."""
    return os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def why_not(place: Path) -> str:
    if os.name == "posix" and place.stat().st_uid != os.geteuid():
        owner, user = name_of(place.stat().st_uid), name_of(os.geteuid())
        return f"{place} belongs to {owner}, this process is {user}, who may not write there"
    return f"{place} is read-only"


def name_of(user: int) -> str:
    import pwd  # POSIX only

    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # as in a container
        return f"user {user}"


def create(file: WalDatabase, patience_s: float, item_name: str, stock: int) -> None:
    """The tables and the first stock, unless they are there. Waits `patience_s` for each lock."""
    require_usable(file.path)
    with closing(file.connect()) as connection:
        is_ours = examine(connection)
        mode = retry_while_locked(connection, "PRAGMA journal_mode = WAL", patience_s).fetchone()
    if mode != ("wal",):
        raise OSError("this file system can't hold a WAL database")
    if not is_ours:
        with file.begin_immediate(patience_s) as connection:
            if not examine(connection):  # else another process was first
                create_tables(connection, item_name, stock)


def examine(connection: sqlite3.Connection) -> bool:
    """False for a blank file. Raises OSError for another program's file, or another version's."""
    application_id, version, tables = connection.execute(
        "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
        " FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if (application_id, version, tables) == (0, 0, 0):
        return False
    if application_id != APPLICATION_ID:
        raise OSError("this is another program's database")
    if version != SCHEMA_VERSION:
        raise OSError(f"its schema has version {version}, this program needs {SCHEMA_VERSION}")
    if connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (MOVED,)).fetchone():
        raise OSError("this sale was moved to PostgreSQL, nothing is sold from this file")
    return True


def is_moved(error: BaseException) -> bool:
    """Whether the trigger MOVED stopped a sale: the schema has no other."""
    return getattr(error, "sqlite_errorcode", 0) == CONSTRAINT_TRIGGER


def create_tables(connection: sqlite3.Connection, item_name: str, stock: int) -> None:
    """In the caller's transaction; statement by statement, as executescript() would commit it."""
    for statement in SCHEMA.read_text(encoding="utf-8").split(";\n"):
        connection.execute(statement)
    connection.execute(
        "INSERT INTO inventory (item_id, item_name, stock, initial_stock) VALUES (1, ?, ?, ?)",
        (item_name, stock, stock),
    )
