"""What a PostgreSQL database has to be before anything is sold from it, and how it becomes that."""

from contextlib import closing
from pathlib import Path

import db
from postgres.connections import Connection, Connections, Row, row_of

FOLDER = Path(__file__).parent
SCHEMA = (FOLDER / "schema.sql").read_text("utf-8")
EXAMINE = (FOLDER / "examine.sql").read_text("utf-8")
COMPARE_IDS = (FOLDER / "compare_ids.sql").read_text("utf-8")
LOCK = "SELECT pg_advisory_xact_lock(1179407176)"
FIRST_STOCK = """
    INSERT INTO inventory (item_id, item_name, stock, initial_stock)
    VALUES (1, $1, $2::integer, $2::integer)"""
PID = "SELECT pg_backend_pid()"


def create(connections: Connections, item_name: str, stock: int, deadline: float) -> None:
    """Make the tables and the first stock, if they aren't there. Existing tables are only read."""
    with closing(connections.open(deadline)) as connection:
        _require_own_session(connections, connection, deadline)
        if not has_our_tables(_ask(connection, deadline, EXAMINE)):
            _create_tables(connection, deadline, item_name, stock)
        examined = _ask(connection, deadline, EXAMINE)
        require(examined)
        connections.schema = examined[1]  # wherever a later search_path leads
        require(_ask(connection, deadline, COMPARE_IDS))


def has_our_tables(examined: Row) -> bool:
    """False where neither is. Raises Unavailable where nothing can be sold."""
    require(examined)
    return bool(examined[0])


def require(examined: Row) -> None:
    if examined[-1] is not None:
        raise db.Unavailable(examined[-1])


def _ask(connection: Connection, deadline: float, statement: str, *parameters: str) -> Row:
    return row_of(*connection.ask(deadline, [(statement, parameters)], prepare=False))


def _create_tables(connection: Connection, deadline: float, item_name: str, stock: int) -> None:
    for statement in ("BEGIN", LOCK):
        _ask(connection, deadline, statement)
    if not has_our_tables(_ask(connection, deadline, EXAMINE)):  # else another process was first
        for statement in SCHEMA.split(";\n"):
            _ask(connection, deadline, statement)
        _ask(connection, deadline, FIRST_STOCK, item_name, str(stock))
    _ask(connection, deadline, "COMMIT")


def _require_own_session(connections: Connections, first: Connection, deadline: float) -> None:
    """No pooler in transaction mode: prepared statements and settings would be other people's."""
    if _ask(first, deadline, PID)[0] == first.pgconn.backend_pid:
        return  # no pooler
    try:
        another = connections.open(deadline)
    except db.Unavailable:  # it waits for a server: the first one has its own
        return
    with closing(another) as second:
        pids = [_ask(one, deadline, PID)[0] for one in (first, second) * 3]
    if pids[0] == pids[1] or pids != pids[:2] * 3:
        raise db.Unavailable("this pooler shares sessions: PgBouncer needs pool_mode = session")
