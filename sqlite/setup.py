"""What an SQLite file has to be before anything is sold from it. OSError says what to change."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

SCHEMA = Path(__file__).parent.parent / "schema.sql"
APPLICATION_ID = 0x464C5348  # as in schema.sql, like the version
SCHEMA_VERSION = 1
MOVED = "moved"  # the trigger that stops the sale where it was moved to another database


def require_usable(path: Path) -> None:
    """Put an empty file there, for its owner only, or say why no database can be there."""
    if sqlite3.sqlite_version_info < (3, 37):
        raise OSError(f"SQLite 3.37 or newer is needed, this is {sqlite3.sqlite_version}")
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    for place in (path, path.parent):
        if not may_write(place):
            raise OSError(why_not(place))


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


def has_our_tables(connection: sqlite3.Connection) -> bool:
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


def is_moved(error: sqlite3.Error) -> bool:
    """Whether the trigger MOVED stopped a sale: the schema has no other."""
    return error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER


def create_tables(connection: sqlite3.Connection, item_name: str, stock: int) -> None:
    """In the caller's transaction; statement by statement, as executescript() would commit it."""
    for statement in SCHEMA.read_text(encoding="utf-8").split(";\n"):
        connection.execute(statement)
    connection.execute(
        "INSERT INTO inventory (item_id, item_name, stock, initial_stock) VALUES (1, ?, ?, ?)",
        (item_name, stock, stock),
    )
