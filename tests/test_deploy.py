"""The operator's Friday: every command of deploy/README.md, in its order, on a folder as the root.

systemd itself is played by the test: it reads the units, listens, and starts what they say. What
changes the machine (packages, users, the kernel's limits) is not done. As root the test is both
root and, as `nobody`, the user flash-sale: whoever lacks a right fails.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from edge import ask, buy, get, nginx, post, render, running
from service import (
    PROJECT,
    Service,
    environment,
    free_port,
    need,
    purchase_request,
    run_to_end,
    send_at_once,
    wait_until,
)
from test_signals import Rush

README = (PROJECT / "deploy" / "README.md").read_text(encoding="utf-8")
COMMAND_LIMIT_S = 240
NOT_DONE = ("apt-get", "useradd", "sysctl")
UNITS = ("flash-sale.service", "flash-sale.socket")
SUDOS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PAGE_BYTES, AUTOCHECKPOINT_PAGES = 4096, 1000  # of SQLite, unless it is told otherwise


def block(section: str, language: str) -> str:
    """The one block of a section."""
    text = re.split(rf"^#+ {re.escape(section)}\n", README, flags=re.MULTILINE)[1]
    text = re.split(r"^#+ ", text, flags=re.MULTILINE)[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return str(found)


def commands() -> list[str]:
    """Every command, a here-document with it."""
    found: list[str] = []
    for text in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
        for line in text.splitlines():
            if found and "<<'EOF'" in found[-1] and not found[-1].endswith("\nEOF"):
                found[-1] += f"\n{line}"
            else:
                found.append(line)
    return found


class Machine:
    """A folder that is `/` to the commands, and systemd on it."""

    def __init__(self, root: Path, seller: str = "") -> None:
        self.root = root
        self.seller = seller  # the user flash-sale; "": this one
        become = f"setpriv --reuid={seller} --regid=nogroup --clear-groups "
        self.as_seller = become if seller else ""
        self.port, self.nginx_port, self.metrics_port = free_port(), free_port(), free_port()
        for name in (
            "opt",
            "etc/systemd/system",
            "etc/nginx",
            "etc/sysctl.d",
            "var/lib/flash-sale",
        ):
            (root / name).mkdir(parents=True)
        (root / "var/log").mkdir()
        (root / "var/log/nginx").symlink_to(root)  # where `render` puts them
        if seller:  # as StateDirectory= says
            shutil.chown(root / "var/lib/flash-sale", seller)
            (root / "var/lib/flash-sale").chmod(0o700)
        self.litestream: subprocess.Popen[bytes] | None = None
        self.listener: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.nginx = ExitStack()

    def here(self, text: str) -> str:
        """The same with this machine's places."""
        text = text.replace("sudo -u flash-sale ", self.as_seller).replace("sudo ", "")
        text = re.sub(r"(?<![\w.])/(opt|etc|var)/", rf"{self.root}/\1/", text)
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = re.sub(r"(:|METRICS_PORT=)8100\b", rf"\g<1>{self.metrics_port}", text)
        text = re.sub(r"http://127\.0\.0\.1( |$)", rf"http://127.0.0.1:{self.nginx_port}\1", text)
        owner = f" -o {self.seller}" if self.seller else ""
        text = text.replace("install -d -o flash-sale", f"install -d{owner}")
        return text.replace("2026-12-01T20:00:00", "2020-12-01T20:00:00")  # it is open

    def run(self, command: str) -> str:
        plain = re.sub(r"sudo (-u flash-sale )?", "", command)
        if plain.startswith("systemctl "):
            self.systemctl(*plain.split()[1:])
            return ""
        if plain.startswith(NOT_DONE) or plain == "nginx -t":  # which `running` does
            return ""
        done = self.shell(command)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": SUDOS_PATH} if self.seller else {}  # the same as under sudo
        return subprocess.run(
            ["bash", "-c", f"set -o pipefail; {self.here(command)}"],
            cwd=PROJECT,
            env=environment(**path),
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )

    def systemctl(self, verb: str, *names: str) -> None:
        units = [name.removesuffix(".service") for name in names if name != "--now"]
        stops = verb in ("stop", "disable", "restart")
        starts = verb in ("start", "enable", "restart")
        if "nginx" in units:
            self.nginx.close()
            if starts:
                self.start_nginx()
        if "litestream" in units:
            if stops:
                self.stop_litestream()
            if starts:
                self.start_litestream()
        if "flash-sale" in units and stops:
            self.stop()
        if "flash-sale.socket" in units and self.listener:
            self.listener.close()
            self.listener = None
        if "flash-sale" in units and starts:
            self.start()

    def start_nginx(self) -> None:
        conf = self.root / "etc/nginx/nginx.conf"
        assert conf.read_text() == (PROJECT / "deploy/nginx.conf").read_text()
        render(self.root, {80: self.nginx_port}, self.port, {})
        self.nginx.enter_context(running(self.root, self.root / "nginx.conf", self.nginx_port))

    def start_litestream(self) -> None:
        command = self.as_seller + self.unit("litestream.service")["Service"]["ExecStart"]
        with (self.root / "litestream.log").open("ab") as log:
            self.litestream = subprocess.Popen(shlex.split(command), stdout=log, stderr=log)

    def stop_litestream(self) -> None:
        assert self.litestream
        self.litestream.terminate()
        assert self.litestream.wait(30) == 0
        self.litestream = None

    def unit(self, name: str) -> configparser.ConfigParser:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(self.here((self.root / "etc/systemd/system" / name).read_text()))
        return parser

    def start(self) -> None:
        """As systemd does with a socket unit: the listening socket is descriptor 3."""
        service = self.unit("flash-sale.service")["Service"]
        place = self.unit("flash-sale.socket")["Socket"]
        if self.listener is None:
            host, _, port = place["ListenStream"].rpartition(":")
            self.listener = socket.create_server((host, int(port)), backlog=int(place["Backlog"]))
        lines = Path(service["EnvironmentFile"]).read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines)
        number, ready = self.listener.fileno(), f"flash-sale-{self.port}"
        listen = [*self.as_seller.split(), "sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh"]
        assert service["Type"] == "notify"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
            (self.root / "service.log").open("ab") as log,
        ):
            notified.bind(f"\0{ready}")
            notified.settimeout(30)
            self.process = subprocess.Popen(
                [*listen, *service["ExecStart"].split()],
                cwd=service["WorkingDirectory"],
                env={
                    "PATH": os.environ["PATH"],
                    "LISTEN_FDS": "1",
                    "NOTIFY_SOCKET": f"@{ready}",
                    **variables,
                },
                stdout=log,
                stderr=log,
                pass_fds=(3,),
                umask=int(service["UMask"], 8),
                preexec_fn=lambda: os.dup2(number, 3) and None,
            )
            assert b"READY=1" in notified.recv(4096)

    def stop(self) -> None:
        assert self.process
        seconds = int(self.unit("flash-sale.service")["Service"]["TimeoutStopSec"])
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(seconds) == 0
        self.process = None

    def close(self) -> None:
        self.nginx.close()
        for process in filter(None, [self.litestream, self.process]):
            process.terminate()
            process.wait(30)
        if self.listener:
            self.listener.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with TemporaryDirectory() as folder:  # pytest's own is closed to other users
        Path(folder).chmod(0o755)
        machine = Machine(Path(folder), "nobody" if os.geteuid() == 0 else "")
        yield machine
        machine.close()


def test_the_operators_friday_from_an_empty_machine_to_the_end(machine: Machine) -> None:
    for tool, package in {"sqlite3": "sqlite3", "promtool": "prometheus", "curl": "curl"}.items():
        need(shutil.which(tool), f"{tool} is not installed (apt-get install {package})")
    need((PROJECT / ".git").exists(), "this is no checkout")
    database = machine.root / "var/lib/flash-sale/sale.db"
    printed: dict[str, str] = {}
    at_the_end = ExitStack()
    for command in commands():
        if "VACUUM INTO" in command and "sale-$(date" in command:
            sell(machine, 5)
        if "litestream restore" in command:
            sell(machine, 20)
            wait_until(partial(restores, machine, command, 25), 30, "not restored")
            continue
        if "UPDATE inventory" in command:
            with reader(database):
                sell(machine, 400)
            before = database.read_bytes()
        if "disable --now flash-sale" in command:
            at_the_end.enter_context(reader(database))
            sell(machine, 300)
        printed[command] = machine.run(command)
        if "UPDATE inventory" in command:
            wal = database.with_name("sale.db-wal")
            assert wal.stat().st_size > AUTOCHECKPOINT_PAGES * PAGE_BYTES
            is_changed = database.read_bytes() != before
            assert not is_changed, "a checkpoint without the service's lock"
    at_the_end.close()
    check_what_was_printed(printed)
    assert count(machine.root / "var/backups/flash-sale/final.db") == 725
    assert len(list(database.parent.glob("broken-*/sale.db"))) == 1
    assert machine.process is machine.litestream is None


def check_what_was_printed(printed: dict[str, str]) -> None:
    told = ("crowd.py", "/inventory", "/health", "/metrics", "-csv", "/audit")
    output = {
        name: next(printed[command] for command in printed if name in command) for name in told
    }
    assert "proven: True" in output["crowd.py"]
    opened = json.loads(output["/inventory"])
    assert (opened["item_name"], opened["current_stock"]) == ("Concert Ticket", 5000)
    assert json.loads(output["/health"])["status"] == "ok"
    assert "flash_sale" in output["/metrics"]
    assert len(output["-csv"].splitlines()) == 25
    audit = json.loads(output["/audit"])
    assert (audit["initial_stock"], audit["purchase_records"]) == (5001, 425)
    assert audit["consistent"] is True


def sell(machine: Machine, units: int) -> None:
    answers = send_at_once(machine.port, [purchase_request("alice")] * units)
    assert [answer.status for answer in answers] == [200] * units


@contextmanager
def reader(database: Path) -> Iterator[None]:
    """As Litestream or an analyst does: what is written meanwhile can't be checkpointed."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM purchases").fetchone()
        yield


def restores(machine: Machine, command: str, wanted: int) -> bool:
    """It is the newest backup then, which the next section restores."""
    if machine.shell(command).returncode != 0:
        return False
    backups = (machine.root / "var/backups/flash-sale").glob("sale-*.db")
    newest = max(backups, key=lambda backup: backup.stat().st_mtime)
    if count(newest) != wanted:
        newest.unlink()
        return False
    return True


def count(database: Path) -> int:
    query = "SELECT count(*) FROM purchases"
    done = subprocess.run(
        ["sqlite3", str(database), query], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_a_restock_checkpoints_nothing_where_nobody_else_has_the_file_open(tmp_path: Path) -> None:
    """So it is after a failed flush, when no worker may hold a connection any more."""
    need(shutil.which("sqlite3"), "sqlite3 is not installed (apt-get install sqlite3)")
    database = tmp_path / "sale.db"
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE inventory AS SELECT 5 AS stock, 5 AS initial_stock")
    before = database.read_bytes()
    update, _ = block("Restock and refund", "sh").splitlines()
    update = update.replace("sudo -u flash-sale ", "").replace("/var/lib/flash-sale", str(tmp_path))
    done = run_to_end(["bash", "-c", update])
    assert (done.returncode, done.stderr) == (0, "")
    assert database.read_bytes() == before
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT * FROM inventory").fetchall() == [(6, 6)]


# ---- Units


@contextmanager
def installed(tmp_path: Path) -> Iterator[Path]:
    """The units, with the places of this checkout."""
    for name in (*UNITS, "litestream.service"):
        text = (PROJECT / "deploy" / name).read_text()
        text = text.replace("/opt/flash-sale/.venv/bin/gunicorn", f"{sys.executable} -m gunicorn")
        text = text.replace("/opt/flash-sale/.venv/bin/litestream", sys.executable)
        (tmp_path / name).write_text(text.replace("/opt/flash-sale", str(PROJECT)))
    yield tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    need(shutil.which("systemd-analyze"), "systemd is not installed (apt-get install systemd)")
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_units_are_valid_and_closed(tmp_path: Path) -> None:
    with installed(tmp_path) as folder:
        units = [str(folder / name) for name in (*UNITS, "litestream.service")]
        verified = analyze("verify", *units)
        assert (verified.returncode, verified.stderr) == (0, "")
        for service in folder.glob("*.service"):
            secure = analyze("security", "--offline=true", "--threshold=25", str(service))
            assert secure.returncode == 0, secure.stdout
            assert "\nStartLimitIntervalSec=0\n" in service.read_text()  # it never gives up


def test_the_service_asks_for_no_call_that_its_unit_forbids(tmp_path: Path) -> None:
    need(shutil.which("strace"), "strace is not installed (apt-get install strace)")
    unit = (PROJECT / "deploy" / "flash-sale.service").read_text()
    (group,) = re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE)
    trace = tmp_path / "trace"
    strace = ("strace", "-D", "-f", "-qq", "-o", str(trace), sys.executable, "-m", "gunicorn")
    with Service(tmp_path, *strace, "app:app", WEB_CONCURRENCY="2") as service:
        assert service.buy("alice", "key-1").status_code == 200
        service.reset(5)
        service.process.send_signal(signal.SIGHUP)
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    assert {"fdatasync", "accept4", "openat"} <= used
    assert not used - allowed_calls(group)


def allowed_calls(group: str) -> set[str]:
    names: set[str] = set()
    for line in analyze("syscall-filter", group).stdout.splitlines():
        name = line.partition("#")[0].strip()
        if name.startswith("@") and name != group:
            names |= allowed_calls(name)
        elif name and not name.startswith("@"):
            names.add(name)
    return names


def test_systemd_can_hand_the_service_its_socket(tmp_path: Path) -> None:
    """`systemd-socket-activate` listens, and starts it for the first buyer."""
    need(shutil.which("systemd-socket-activate"), "systemd is not installed")
    port = free_port()
    activate = ("systemd-socket-activate", "--listen", f"127.0.0.1:{port}")
    variables = {"PORT": str(port), "INITIAL_STOCK": "1000000"}
    passed = [f"--setenv={name}" for name in ("DATABASE_URL", "INITIAL_STOCK", "WEB_CONCURRENCY")]
    command = (*activate, *passed, sys.executable, "-m", "gunicorn", "app:app")
    with Service(tmp_path, *command, **variables) as service:
        assert "Listening at" in service.log
        with Rush(port) as rush:
            rush.wait_for(50)
            assert service.stop(signal.SIGTERM) == 0
            rush.over.set()
    assert set(rush.outcomes) <= {"200", "refused", "lost: [Errno 104] Connection reset by peer"}
    assert rush.outcomes["200"] >= 50


def test_a_restart_under_load_loses_nobody_and_refuses_nobody(tmp_path: Path) -> None:
    """systemd goes on listening: who comes meanwhile waits for the next one."""
    machine = Machine(tmp_path)
    try:
        for name in UNITS:
            text = (PROJECT / "deploy" / name).read_text()
            text = text.replace("/opt/flash-sale/.venv/bin/gunicorn", "PYTHON -m gunicorn")
            text = text.replace("/opt/flash-sale", "CHECKOUT")
            (tmp_path / "etc/systemd/system" / name).write_text(text)
        machine.here = places(machine)  # type: ignore[method-assign]
        settings = f"DATABASE_URL=sqlite:///{tmp_path}/sale.db\nINITIAL_STOCK=1000000\n"
        (tmp_path / "etc/flash-sale.env").write_text(settings)
        machine.systemctl("enable", "--now", *UNITS)
        with Rush(machine.port) as rush:
            for _ in range(3):
                rush.wait_for(rush.outcomes["200"] + 50)
                machine.systemctl("restart", "flash-sale")
            rush.wait_for(rush.outcomes["200"] + 50)
        assert set(rush.outcomes) == {"200"}
        sold = ask(machine.port, get("/audit")).json["purchase_records"]
        assert sold == rush.outcomes["200"]
        machine.systemctl("stop", "flash-sale")
    finally:
        machine.close()


def places(machine: Machine):  # type: ignore[no-untyped-def]
    usual = machine.here
    return lambda text: (
        usual(text).replace("PYTHON", sys.executable).replace("CHECKOUT", str(PROJECT))
    )


# ---- nginx


def test_what_nginx_answers_by_itself_can_be_counted(tmp_path: Path) -> None:
    lines = block("What nginx answers by itself", "nginx").replace("1% 1;", "100% 1;")
    place = "    # A client has this long"
    with nginx(tmp_path, free_port(), {place: lines + place}) as port:  # nobody listens there
        assert [ask(port, buy()).status for _ in range(3)] == [503, 503, 503]
    command = block("What nginx answers by itself", "bash").replace("/var/log/nginx", str(tmp_path))
    command = command.removeprefix("sudo ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "503 0 300\n"


def test_a_shops_page_on_another_origin_buys_through_its_own_nginx(tmp_path: Path) -> None:
    lines = block("A shop's page on another origin", "nginx")
    (tmp_path / "front").mkdir()
    (tmp_path / "shop").mkdir()
    with Service(tmp_path) as service, nginx(tmp_path / "front", service.port) as front:
        lines = lines.replace("127.0.0.1:80/", f"127.0.0.1:{front}/")
        with nginx(
            tmp_path / "shop", 9, {"        location / {\n": f"{lines}        location / {{\n"}
        ) as shop:
            page = f"Host: 127.0.0.1:{shop}\r\nOrigin: http://127.0.0.1:{shop}\r\n"
            raw = post("/tickets/buy_ticket", b"{}", page).replace(b"Host: test\r\n", b"")
            assert ask(shop, raw).status == 200
            foreign = raw.replace(b"Origin: http://", b"Origin: http://evil.")
            assert ask(shop, foreign).status == 403
