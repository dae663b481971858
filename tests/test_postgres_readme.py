"""Every command in postgres/README.md is run, in its order, as an administrator would."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_cluster import PASSWORD, ROLE, Cluster, binaries, reason_to_skip
from service import PROJECT, environment

import app as service_app

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

BLOCKS = re.findall(
    r"^```(sh|sql)\n(.*?)^```",
    (PROJECT / "postgres" / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


def test_every_command_of_the_readme_does_what_it_says(cluster: Cluster, tmp_path: Path) -> None:
    sqlite = f"sqlite:///{tmp_path / 'inventory.db'}"
    moved = service_app.open_store(sqlite, "Moved", 9, 5.0)
    moved.create()
    moved.buy("mover", "key-1")
    moved.close()
    url = cluster.url("shop")
    for language, block in BLOCKS:
        script = block.replace("127.0.0.1:5432", f"127.0.0.1:{cluster.port}")
        command = ["psql", "-X", "-v", "ON_ERROR_STOP=1"] if language == "sql" else ["bash", "-e"]
        if "move_from_sqlite" in block:
            cluster.sql("TRUNCATE purchases", "shop")
        after(block, run(command, cluster, tmp_path, script, url), cluster, tmp_path)
    assert len(BLOCKS) == 10


def run(command: list[str], cluster: Cluster, folder: Path, script: str, url: str) -> str:
    variables = {
        "PATH": f"{binaries()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "DATABASE_URL": url,
        "PGHOST": "127.0.0.1",
        "PGPORT": str(cluster.port),
        "PGUSER": ROLE,
        "PGPASSWORD": PASSWORD,
        "PGDATABASE": database_of(script),
    }
    done = subprocess.run(
        command,
        input=script,
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def database_of(script: str) -> str:
    return "postgres" if "CREATE DATABASE" in script or "createdb" in script else "shop"


def after(block: str, out: str, cluster: Cluster, folder: Path) -> None:
    """What has to be so after a block, where that isn't its exit status alone."""
    if "init-db" in block:
        assert "100 of 100 units left" in out
        url = f"postgresql://shop:choose-another@127.0.0.1:{cluster.port}/shop"
        store = service_app.open_store(url, "", 0, 5.0)
        store.create()
        store.buy("alice")
        store.close()
    elif "CREATE ROLE seller" in block:
        url = f"postgresql://seller:choose-a-third@127.0.0.1:{cluster.port}/shop"
        store = service_app.open_store(url, "", 0, 5.0)
        store.create()
        assert store.buy("bob").remaining_stock == 98
        store.close()
    elif "copy" in block:
        lines = (folder / "purchases.csv").read_text().splitlines()
        assert [line.split(",")[1] for line in lines] == ["customer_id", "alice", "bob"]
    elif "stock + 50" in block:
        assert cluster.sql("SELECT stock, initial_stock FROM inventory", "shop") == "148|150"
    elif "TRUNCATE" in block:
        assert cluster.sql("SELECT stock, item_name FROM inventory", "shop") == "200|Item B"
    elif "pg_restore" in block:
        store = service_app.open_store(cluster.url("restored"), "", 0, 5.0)
        store.create()
        assert store.audit() == (200, 200, 0)
        store.close()
    elif "Moved" in out:
        assert cluster.sql("SELECT customer_id, idempotency_key FROM purchases", "shop") == (
            "mover|key-1"
        )
