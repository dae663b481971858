"""The operator's Friday: every command of deploy/README.md, in its order, on a folder as the root.

systemd itself is played by the test: it reads the units, listens, and starts what they say. What
changes the machine (packages, users, the kernel's limits) is not done.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
from edge import ask, buy, get, nginx, post, render, running
from service import PROJECT, Service, environment, free_port, need, wait_until
from test_signals import Rush

README = (PROJECT / "deploy" / "README.md").read_text(encoding="utf-8")
COMMAND_LIMIT_S = 240
NOT_DONE = ("apt-get", "useradd", "sysctl", "systemctl daemon-reload")
UNITS = ("flash-sale.service", "flash-sale.socket")


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

    def __init__(self, root: Path) -> None:
        self.root = root
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
        self.background: list[subprocess.Popen[bytes]] = []
        self.listener: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.nginx = ExitStack()

    def here(self, text: str) -> str:
        """The same with this machine's places."""
        text = re.sub(r"sudo (-u flash-sale )?", "", text)
        text = re.sub(r"(?<![\w.])/(opt|etc|var)/", rf"{self.root}/\1/", text)
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        text = re.sub(r"(:|METRICS_PORT=)9100\b", rf"\g<1>{self.metrics_port}", text)
        text = re.sub(r"http://127\.0\.0\.1( |$)", rf"http://127.0.0.1:{self.nginx_port}\1", text)
        text = text.replace("install -d -o flash-sale", "install -d")
        return text.replace("2026-12-01T20:00:00", "2020-12-01T20:00:00")  # it is open

    def run(self, command: str) -> str:
        plain = re.sub(r"sudo (-u flash-sale )?", "", command)
        if plain.startswith("systemctl ") and plain != NOT_DONE[-1]:
            self.systemctl(*plain.split()[1:])
            return ""
        if plain.startswith(NOT_DONE):
            return ""
        if plain == "nginx -t":  # `running` does it on the file that is installed
            return ""
        if plain.endswith(" &"):
            self.background.append(subprocess.Popen(shlex.split(self.here(plain[:-2]))))
            return ""
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {self.here(command)}"],
            cwd=PROJECT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def systemctl(self, verb: str, *names: str) -> None:
        names = tuple(name.removesuffix(".service") for name in names if name != "--now")
        if "prometheus" in names:  # test_prometheus.py starts it
            return
        if "nginx" in names:
            self.nginx.close()
            if verb == "restart":
                conf = self.root / "etc/nginx/nginx.conf"
                assert conf.read_text() == (PROJECT / "deploy/nginx.conf").read_text()
                render(self.root, {80: self.nginx_port}, self.port, {})
                self.nginx.enter_context(
                    running(self.root, self.root / "nginx.conf", self.nginx_port)
                )
            return
        if verb in ("stop", "disable", "restart"):
            self.stop()
        if "flash-sale.socket" in names and self.listener:
            self.listener.close()
            self.listener = None
        if verb in ("start", "enable", "restart"):
            self.start()

    def unit(self, kind: str) -> configparser.ConfigParser:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read_string(
            self.here((self.root / f"etc/systemd/system/flash-sale.{kind}").read_text())
        )
        return parser

    def start(self) -> None:
        """As systemd does with a socket unit: the listening socket is descriptor 3."""
        service, place = self.unit("service")["Service"], self.unit("socket")["Socket"]
        if self.listener is None:
            host, _, port = place["ListenStream"].rpartition(":")
            self.listener = socket.create_server((host, int(port)), backlog=int(place["Backlog"]))
        lines = Path(service["EnvironmentFile"]).read_text().splitlines()
        variables = dict(line.split("=", 1) for line in lines)
        number, ready = self.listener.fileno(), f"flash-sale-{self.port}"
        assert service["Type"] == "notify"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
            (self.root / "service.log").open("ab") as log,
        ):
            notified.bind(f"\0{ready}")
            notified.settimeout(30)
            self.process = subprocess.Popen(
                ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *service["ExecStart"].split()],
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
                preexec_fn=lambda: os.dup2(number, 3) and None,
            )
            assert b"READY=1" in notified.recv(4096)

    def stop(self) -> None:
        assert self.process
        seconds = int(self.unit("service")["Service"]["TimeoutStopSec"])
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(seconds) == 0
        self.process = None

    def close(self) -> None:
        self.nginx.close()
        for process in [*self.background, *filter(None, [self.process])]:
            process.terminate()
            process.wait(30)
        if self.listener:
            self.listener.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


def test_the_operators_friday_from_an_empty_machine_to_the_end(machine: Machine) -> None:
    for tool, package in {"sqlite3": "sqlite3", "promtool": "prometheus", "curl": "curl"}.items():
        need(shutil.which(tool), f"{tool} is not installed (apt-get install {package})")
    need((PROJECT / ".git").exists(), "this is no checkout")
    printed: dict[str, str] = {}
    sold_before_backup, ids = 0, []
    for command in commands():
        if "VACUUM INTO" in command:
            ids = [ask(machine.port, buy(f"k{n}")).json["purchase_id"] for n in range(5)]
            sold_before_backup = len(ids)
        if "litestream restore" in command:
            ids = [ask(machine.port, buy(f"later-{n}")).json["purchase_id"] for n in range(20)]
            wait_until(partial(restores, machine, command, 25), 30, "not restored")
            continue
        printed[command] = machine.run(command)
    told = ("crowd.py", "/inventory", "/health", "/metrics", "-csv", "/audit")
    output = {
        name: next(printed[command] for command in printed if name in command) for name in told
    }
    assert "proven: True" in output["crowd.py"]
    opened = json.loads(output["/inventory"])
    assert (opened["item_name"], opened["current_stock"]) == ("Concert Ticket", 5000)
    assert json.loads(output["/health"])["status"] == "ok"
    assert "flash_sale" in output["/metrics"]
    assert len(output["-csv"].splitlines()) == sold_before_backup + len(ids) == 25
    audit = json.loads(output["/audit"])
    assert (audit["initial_stock"], audit["purchase_records"]) == (5001, 25)
    assert audit["consistent"] is True
    final = machine.root / "var/backups/flash-sale/final.db"
    assert count(final) == 25
    assert machine.process is None


def restores(machine: Machine, command: str, wanted: int) -> bool:
    database = machine.root / "var/backups/flash-sale/restored.db"
    database.unlink(missing_ok=True)
    done = subprocess.run(
        shlex.split(machine.here(command)), capture_output=True, timeout=60, check=False
    )
    return done.returncode == 0 and count(database) == wanted


def count(database: Path) -> int:
    query = "SELECT count(*) FROM purchases"
    done = subprocess.run(
        ["sqlite3", str(database), query], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


# ---- Units


@contextmanager
def installed(tmp_path: Path) -> Iterator[Path]:
    """The units, with the places of this checkout."""
    for name in UNITS:
        text = (PROJECT / "deploy" / name).read_text()
        text = text.replace("/opt/flash-sale/.venv/bin/gunicorn", f"{sys.executable} -m gunicorn")
        (tmp_path / name).write_text(text.replace("/opt/flash-sale", str(PROJECT)))
    yield tmp_path


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    need(shutil.which("systemd-analyze"), "systemd is not installed (apt-get install systemd)")
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_units_are_valid_and_closed(tmp_path: Path) -> None:
    with installed(tmp_path) as folder:
        units = [str(folder / name) for name in UNITS]
        verified = analyze("verify", *units)
        assert (verified.returncode, verified.stderr) == (0, "")
        secure = analyze("security", "--offline=true", "--threshold=25", units[0])
    assert secure.returncode == 0, secure.stdout


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
