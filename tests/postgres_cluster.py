"""A scratch PostgreSQL server of the tests' own: a temporary folder, a free port, durability on.

    with Cluster() as cluster:
        cluster.create_database("sale")
        cluster.url("sale")

The server is a child of this process, so every signal goes to a process that was started here.
`standby()` makes a synchronous standby of it; `prefix` and `host` put it into a network namespace.
"""

import getpass
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PASSWORD = "correct-horse"  # of the one role; it must never turn up in an answer or a log
ROLE = "sale"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.02

SETTINGS = """
fsync = on
synchronous_commit = on
full_page_writes = on
listen_addresses = '{host}'
unix_socket_directories = '{folder}'
port = {port}
max_connections = 200
shared_buffers = 128MB
timezone = 'Asia/Kathmandu'
log_line_prefix = '%m [%p] '
"""


def binaries() -> Path | None:
    """The folder of the newest PostgreSQL server on this machine; None if there is none."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"),
        key=lambda path: int(path.parts[-3]),
        reverse=True,
    )
    on_path = [Path(path) for path in [shutil.which("postgres")] if path]
    return next(
        (path.parent for path in [*found, *on_path] if (path.parent / "initdb").exists()), None
    )


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Cluster:
    """One server runs with bounded waits; a failure shows the end of the server's log."""

    def __init__(
        self, settings: str = "", host: str = "127.0.0.1", port: int = 0, prefix: Sequence[str] = ()
    ) -> None:
        """`settings` are lines of postgresql.conf; `prefix` goes before the server's command."""
        self.host = host
        self.port = port or free_port()
        self.settings = settings
        self.prefix = list(prefix)
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = Path(
            tempfile.mkdtemp(prefix="pg-", dir="/tmp")
        )  # a socket's path has to be short
        self.data = self.folder / "data"
        self.log = self.folder / "log"
        if os.geteuid() == 0:
            os.chown(self.folder, pwd.getpwnam(unprivileged_user()).pw_uid, -1)

    def __enter__(self) -> Self:
        try:
            self.initialise()
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def initialise(self) -> None:
        """initdb: passwords over TCP, trust over the unix socket."""
        password_file = self.folder / "password"
        password_file.write_text(PASSWORD, encoding="ascii")
        password_file.chmod(0o644)
        auth = ["--auth-host=scram-sha-256", "--auth-local=trust", f"--pwfile={password_file}"]
        self.run(
            "initdb", "-D", self.data, "-U", ROLE, "--locale=C", "-E", "UTF8", "--no-sync", *auth
        )
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all,replication all 0.0.0.0/0 scram-sha-256\n")
        self._configure()

    def standby(self, name: str = "standby", **place: Any) -> "Cluster":
        """A copy of this server that streams from it as `name`; not started yet."""
        copy = Cluster(self.settings, **place)
        source = (
            f"host={self.host} port={self.port} user={ROLE} password={PASSWORD}"
            f" application_name={name}"
        )
        self.run(
            "pg_basebackup", "-D", copy.data, "-d", source, "-R", "-X", "stream", "-c", "fast", "-N"
        )
        copy._configure()
        return copy

    def start(self) -> None:
        """Start the server and wait until it takes connections."""
        with self.log.open("ab") as log:
            command = [
                *self.prefix,
                *as_unprivileged_user(),
                str(_binary("postgres")),
                "-D",
                str(self.data),
            ]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self._wait_until_ready()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT stops fast and aborts what runs; SIGQUIT stops at once.

        After SIGQUIT the next start recovers from the WAL.
        """
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(STOP_TIMEOUT_S)

    def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        self.stop(how)
        self.start()

    def kill(self) -> None:
        """SIGKILL for the server and all of its processes at once, as when the machine is gone."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGSTOP)  # no new backend in between
        backends = self.backends()
        self.signal_all(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(map(_is_alive, backends)) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def signal_all(self, number: signal.Signals) -> None:
        """To the server and all of its processes, as to a whole machine."""
        assert self.process
        for pid in [self.process.pid, *self.backends()]:
            os.kill(pid, number)

    def backends(self) -> list[int]:
        assert self.process
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def promote(self) -> None:
        """Make a standby the primary, and wait until it takes writes."""
        self.run("pg_ctl", "promote", "-D", self.data, "-w", "-t", int(START_TIMEOUT_S))

    def reload(self) -> None:
        self.run("pg_ctl", "reload", "-D", self.data)

    def remove(self) -> None:
        """Stop the server, whatever state it is in, and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres", **parameters: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://{ROLE}:{PASSWORD}@{self.host}:{self.port}/{database}" + (
            query and f"?{query}"
        )

    def create_database(self, name: str) -> str:
        """Its URL."""
        self.sql(f'CREATE DATABASE "{name}" TEMPLATE template0')
        return self.url(name)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """What psql prints for a statement, over the unix socket; bounded, and without psycopg."""
        return psql(self.folder, self.port, statement, database, self.prefix)

    def run(self, program: str, *arguments: object) -> str:
        """A program of PostgreSQL's, as the server's user; its output."""
        return run_program(self.folder, program, *arguments, prefix=self.prefix)

    def _configure(self) -> None:
        settings = (
            SETTINGS.format(host=self.host, port=self.port, folder=self.folder) + self.settings
        )
        with (self.data / "postgresql.conf").open("a") as conf:
            conf.write(settings)

    def _wait_until_ready(self) -> None:
        """As pg_ctl does: the last line of postmaster.pid tells the state."""
        assert self.process
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                lines = (self.data / "postmaster.pid").read_text().splitlines()
            except FileNotFoundError:
                lines = []
            if lines[:1] == [str(self.process.pid)] and re.match(
                "ready|standby", " ".join(lines[7:])
            ):
                return
            time.sleep(POLL_S)
        raise RuntimeError(f"PostgreSQL doesn't start: {self.log.read_text()[-2000:]}")


def psql(folder: Path, port: int, statement: str, database: str, prefix: Sequence[str] = ()) -> str:
    """What it prints for a statement, over the unix socket in `folder`."""
    options = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
    place = ["-h", folder, "-p", port, "-U", ROLE, "-d", database]
    return run_program(folder, "psql", *options, *place, "-c", statement, prefix=prefix)


def run_program(folder: Path, program: str, *arguments: object, prefix: Sequence[str] = ()) -> str:
    command = [*prefix, *as_unprivileged_user(), str(_binary(program)), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def _binary(program: str) -> Path:
    folder = binaries()
    if folder is None:
        raise RuntimeError("no PostgreSQL server on this machine")
    return folder / program


def unprivileged_user() -> str:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return getpass.getuser()
    names = {user.pw_name for user in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def as_unprivileged_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(unprivileged_user())
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reason_to_skip() -> str:
    """Return why the PostgreSQL tests can't run here, or "" if they can.

    In CI a reason is a failure: it raises RuntimeError.
    """
    if not (Path(__file__).parent.parent / "postgres").exists():
        return "postgres/ was deleted: SQLite only"
    reason = (
        ""
        if binaries()
        else "no PostgreSQL server on this machine (Debian: apt-get install postgresql)"
    )
    if not importlib.util.find_spec("psycopg"):
        reason = "psycopg is not installed (pip install -r postgres/requirements.txt)"
    if reason and os.environ.get("CI"):
        raise RuntimeError(reason)
    return reason
