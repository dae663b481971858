"""A PostgreSQL cluster that fails over by itself: two members under Debian's Patroni, and etcd."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from string import Template
from types import TracebackType
from typing import Any, Self

import requests
from postgres_cluster import (
    PASSWORD,
    ROLE,
    as_unprivileged_user,
    binaries,
    psql,
    unprivileged_user,
)
from service import PROJECT, free_port, need, wait_until

START_LIMIT_S = 60.0
CHANGE_LIMIT_S = 60.0
LEASE_S = 5  # a leader that can't renew it is none
TEMPLATE = Template((PROJECT / "postgres" / "patroni.yml").read_text(encoding="utf-8"))


class Member:
    """Patroni and the PostgreSQL that it starts."""

    def __init__(self, name: str, folder: Path, etcd: str) -> None:
        self.name = name
        self.folder = folder / name
        self.port, self.api_port = free_port(), free_port()
        self.config = self.folder / "patroni.yml"
        self.log = self.folder / "log"
        self.folder.mkdir(mode=0o700)
        self.config.write_text(
            TEMPLATE.substitute(
                NAME=name,
                HOST="127.0.0.1",
                NETWORK="127.0.0.1/32",
                PORT=self.port,
                API_PORT=self.api_port,
                ETCD=etcd,
                FOLDER=self.folder,
                BIN=binaries(),
                USER=ROLE,
                PASSWORD=PASSWORD,
                TTL=LEASE_S,
                LOOP_WAIT=1,
                RETRY_TIMEOUT=2,
                WATCHDOG="off",
            )
        )
        own(self.folder, self.config)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*as_unprivileged_user(), "patroni", str(self.config)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )

    def pids(self) -> list[int]:
        """Patroni and its children, the postmaster and its backends."""
        with suppress(FileNotFoundError, IndexError):
            postmaster = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
            return [*tree(self.process.pid if self.process else 0), *tree(postmaster)]
        return tree(self.process.pid) if self.process else []

    def signal_all(self, number: signal.Signals) -> None:
        """As to the whole machine: nothing of it runs any more, or all of it again."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        self.signal_all(signal.SIGSTOP)  # nobody starts another in between
        self.signal_all(signal.SIGKILL)
        if self.process:
            self.process.wait(CHANGE_LIMIT_S)

    def role(self) -> str:
        """Leader, sync_standby, replica, or nothing."""
        with suppress(requests.RequestException):
            answer = requests.get(f"http://127.0.0.1:{self.api_port}/patroni", timeout=2).json()
            if answer.get("state") != "running":
                return ""
            if answer.get("role") in ("master", "primary"):
                return "leader"
            return "sync_standby" if answer.get("sync_standby") else "replica"
        return ""

    def sql(self, statement: str, database: str = "postgres") -> str:
        return psql(self.folder, self.port, statement, database)


class PatroniCluster:
    """Two members and one etcd. `with` starts them and ends them."""

    def __init__(self) -> None:
        for program in ("patroni", "patronictl", "etcd"):
            need(
                shutil.which(program), f"no {program} (Debian: apt-get install patroni etcd-server)"
            )
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            folder = Path(tempfile.mkdtemp(prefix="pt-", dir="/tmp"))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            own(folder)
            etcd = undo.enter_context(start_etcd(folder))
            self.members = [Member(name, folder, etcd) for name in ("one", "two")]
            for member in self.members:
                undo.callback(member.kill)
                member.start()
            wait_until(self.is_complete, START_LIMIT_S, f"no cluster: {self.logs()[-3000:]}")
            self.leader.sql("CREATE DATABASE sale TEMPLATE template0")
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{member.port}" for member in self.members)
        return f"postgresql://{ROLE}:{PASSWORD}@{hosts}/sale?target_session_attrs=read-write"

    def is_complete(self) -> bool:
        """A leader whose sales wait for the other member."""
        roles = sorted(member.role() for member in self.members)
        return roles == ["leader", "sync_standby"] and "sync" in self.leader.sql(
            "SELECT sync_state FROM pg_stat_replication"
        )

    @property
    def leader(self) -> Member:
        return next(member for member in self.members if member.role() == "leader")

    def logs(self) -> str:
        return "\n".join(m.log.read_text(errors="replace") for m in self.members if m.log.exists())

    def patronictl(self, *arguments: str) -> str:
        command = ["patronictl", "-c", str(self.members[0].config), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def start_etcd(folder: Path) -> Iterator[str]:
    client, peer = (f"127.0.0.1:{free_port()}" for _ in range(2))
    urls: dict[str, Any] = {
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
    }
    options = [f"--{name}=http://{place}" for name, place in urls.items()]
    options += [f"--initial-cluster=default=http://{peer}", f"--data-dir={folder}/etcd"]
    with (folder / "etcd.log").open("wb") as log:
        process = subprocess.Popen(["etcd", *options], stdout=log, stderr=log)
    try:
        yield client
    finally:
        process.kill()
        process.wait()


def own(*paths: Path) -> None:
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, pwd.getpwnam(unprivileged_user()).pw_uid, -1)


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid] if pid else []
    for one in found:
        with suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
    return found
