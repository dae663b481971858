"""Debian's PgBouncer between the service and its PostgreSQL: session mode sells."""

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgres_cluster import PASSWORD, ROLE, Cluster, as_unprivileged_user, reason_to_skip
from service import PROJECT, Service, free_port, need, run_to_end, wait_until

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

import sys

import psycopg

from postgres.store import PostgresStore

LIMIT_S = 10.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need(shutil.which("pgbouncer"), "no PgBouncer here (Debian: apt-get install pgbouncer)")
    with Cluster() as running:
        yield running


@contextmanager
def pgbouncer(cluster: Cluster, mode: str, pool_size: int = 20) -> Iterator[str]:
    """The URL of a database behind it."""
    port, name = free_port(), f"sale_{mode}_{pool_size}"
    direct = cluster.create_database(name)
    folder = cluster.folder / name
    folder.mkdir(mode=0o755)
    (folder / "users").write_text(f'"{ROLE}" "{PASSWORD}"\n')
    (folder / "ini").write_text(
        f"[databases]\n* = host={cluster.host} port={cluster.port}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {folder}/users\n"
        f"pool_mode = {mode}\ndefault_pool_size = {pool_size}\n"
    )
    with (folder.parent / f"{name}.log").open("wb") as log:
        command = [*as_unprivileged_user(), "pgbouncer", str(folder / "ini")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = direct.replace(f":{cluster.port}/", f":{port}/")
        wait_until(lambda: answers(url), LIMIT_S, "PgBouncer doesn't start")
        yield url
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def answers(url: str) -> bool:
    try:
        with psycopg.connect(url, connect_timeout=2):
            return True
    except psycopg.OperationalError:
        return False


def test_behind_pgbouncer_in_session_mode_every_unit_is_sold_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    with pgbouncer(cluster, "session") as url, Service(tmp_path, DATABASE_URL=url) as service:
        service.reset(20)
        statuses = Counter(service.buy(f"c{n}", f"key-{n}").status_code for n in range(30))
        assert statuses == {200: 20, 410: 10}
        assert service.buy("c3", "key-3").headers["Idempotent-Replayed"] == "true"
        assert service.get("/audit")["consistent"]
        assert service.get("/health") == {"status": "ok"}


def test_a_session_mode_that_has_but_one_server_left_is_no_reason_to_refuse(
    cluster: Cluster,
) -> None:
    with pgbouncer(cluster, "session", pool_size=1) as url:
        store = PostgresStore(url, "Concert", 5, 5.0)
        store.create()
        assert store.buy("alice").remaining_stock == 4
        store.close()


@pytest.mark.parametrize("mode", ["transaction", "statement"])
def test_a_pgbouncer_that_shares_sessions_is_refused_at_the_start(
    cluster: Cluster, mode: str
) -> None:
    with pgbouncer(cluster, mode) as url:
        command = (sys.executable, "-m", "gunicorn", "app:app")
        start = run_to_end(command, PROJECT, DATABASE_URL=url, PORT=str(free_port()))
        assert start.returncode == 4, start.stderr
        (line,) = [line for line in start.stderr.splitlines() if "Cannot start" in line]
        assert "PgBouncer needs pool_mode = session" in line
        assert PASSWORD not in start.stderr
        assert cluster.sql("SELECT count(*) FROM pg_class WHERE relname = 'purchases'") == "0"
