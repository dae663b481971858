"""The seller with a Redis lock that the benchmarks compare with: when it holds, and when not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from postgres_cluster import Cluster, reason_to_skip
from service import PROJECT, Service, free_port, need, run_to_end, wait_until

if SKIPPED := reason_to_skip():
    pytest.skip(SKIPPED, allow_module_level=True)

import redis

from postgres.store import PostgresStore

LIMIT_S = 10.0
EXPIRY_S = 0.5


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    need(shutil.which("redis-server"), "no Redis here (Debian: apt-get install redis-server)")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        wait_until(lambda: answers(url), LIMIT_S, "Redis doesn't start")
        yield url
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def answers(url: str) -> bool:
    with suppress(redis.ConnectionError), redis.Redis.from_url(url) as client:
        return bool(client.ping())
    return False


@pytest.fixture
def variables(redis_url: str) -> Iterator[dict[str, str]]:
    with Cluster() as cluster:
        url = cluster.create_database("sale")
        store = PostgresStore(url, "Concert", 100, 5.0)
        store.create()
        store.close()
        yield {"DATABASE_URL": url, "REDIS_URL": redis_url}


def serve(tmp_path: Path, variables: dict[str, str]) -> Service:
    command = ("-m", "gunicorn", "-t", "30", "--pythonpath", "benchmarks", "redis_lock:app")
    return Service(tmp_path, sys.executable, *command, cwd=PROJECT, **variables)


def prove(service: Service, folder: Path) -> "subprocess.CompletedProcess[str]":
    report = ("--report", str(folder / "report.html"), "--json", str(folder / "figures.json"))
    options = ("--url", service.url, "--tests", "1", "--stock", "100", *report)
    return run_to_end((sys.executable, "proof_of_correctness.py", *options))


def test_the_redis_lock_holds_where_the_database_locks_the_row_too(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    with serve(tmp_path, variables) as service:
        proven = prove(service, tmp_path)
    assert proven.returncode == 0, proven.stdout


def test_the_proof_catches_a_redis_lock_that_expires_under_a_holder_who_stands_still(
    tmp_path: Path, variables: dict[str, str]
) -> None:
    alone = {"ROW_LOCK": "0", "LOCK_EXPIRY_S": str(EXPIRY_S)}
    over = threading.Event()
    with serve(tmp_path, variables | alone) as service:
        stopping = threading.Thread(target=stop_holders, args=(variables["REDIS_URL"], over))
        stopping.start()
        try:
            caught = prove(service, tmp_path)
            if caught.returncode == 0:  # on a busy machine: stopped where it does no harm
                caught = prove(service, tmp_path)
        finally:
            over.set()
            stopping.join()
    assert caught.returncode == 1, caught.stdout
    assert "VIOLATION" in caught.stdout.upper()
    assert "violation" in (tmp_path / "report.html").read_text(encoding="utf-8").lower()
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))


def stop_holders(redis_url: str, over: threading.Event) -> None:
    """As a machine that pauses: stop whoever has the lock, until it has expired."""
    with redis.Redis.from_url(redis_url) as client:
        while not over.wait(0.005):
            holder = client.get("holder")
            if holder is None or not client.exists("sale"):
                continue
            with suppress(ProcessLookupError):
                os.kill(int(holder), signal.SIGSTOP)
                if client.get("holder") == holder and client.exists("sale"):
                    time.sleep(2 * EXPIRY_S)
                os.kill(int(holder), signal.SIGCONT)
