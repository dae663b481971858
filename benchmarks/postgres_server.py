"""A PostgreSQL to measure on: durability on, with a synchronous standby 1 ms away if wanted.

    python benchmarks/postgres_server.py [--standby] COMMAND ...

The command is run while they are there. In it URL1 and URL2 stand for two empty databases, and
REDIS for a Redis.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from postgres_cluster import Cluster, free_port
from postgres_proxy import Proxy

DISTANCE_S = 0.001  # to the standby, and back
LIMIT_S = 60.0


@contextmanager
def servers(standby: bool) -> Iterator[dict[str, str]]:
    with ExitStack() as running:
        cluster = running.enter_context(Cluster())
        urls = {f"URL{number}": cluster.create_database(f"sale{number}") for number in (1, 2)}
        if standby:
            add_standby(running, cluster)
        port, folder = free_port(), running.enter_context(tempfile.TemporaryDirectory())
        server = shutil.which("redis-server") or "redis-server"
        command = [
            server,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            folder,
        ]
        redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        running.callback(redis.wait, LIMIT_S)
        running.callback(redis.terminate)
        yield urls | {"REDIS": f"redis://127.0.0.1:{port}/0"}


def add_standby(running: ExitStack, cluster: Cluster) -> None:
    way = running.enter_context(Proxy(cluster.port, delay_s=DISTANCE_S))
    copy = cluster.standby()
    running.callback(copy.remove)
    copy.start()
    source = copy.sql("SHOW primary_conninfo").replace(f"port={cluster.port}", f"port={way.port}")
    copy.sql(f"ALTER SYSTEM SET primary_conninfo = $${source}$$")
    copy.reload()
    cluster.sql("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
    cluster.reload()
    deadline = time.monotonic() + LIMIT_S
    streams = "SELECT status || sender_port FROM pg_stat_wal_receiver"
    while (
        cluster.sql("SELECT sync_state FROM pg_stat_replication") != "sync"
        or copy.sql(streams) != f"streaming{way.port}"
    ):
        if time.monotonic() > deadline:
            raise RuntimeError("the standby is not synchronous")
        time.sleep(0.05)


def main() -> int:
    standby, command = sys.argv[1:2] == ["--standby"], sys.argv[1:]
    with servers(standby) as urls:
        words = [urls.get(word, word) for word in command[standby:]]
        return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
