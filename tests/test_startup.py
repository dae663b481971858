"""Starting and stopping, with real processes and signals."""

import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from conftest import OpenStore
from service import (
    PROJECT,
    Service,
    free_port,
    need,
    need_root,
    parse_answer,
    patched,
    purchase_request,
    run_to_end,
    wait_until,
)
from test_sqlite_store import write_lock

import db
from sqlite import setup

LOCAL_DEMO = (sys.executable, "app.py")
GUNICORN = (sys.executable, "-m", "gunicorn", "app:app")
JSON = {"Content-Type": "application/json"}
FLASK = (sys.executable, "-m", "flask", "--app", "app", "run", "--port")
WITHOUT_GUNICORN = (
    sys.executable,
    "-c",
    "import runpy, sys; sys.modules['gunicorn'] = None;"
    "sys.path.insert(0, ''); runpy.run_path('app.py', run_name='__main__')",
)


def test_the_local_demo_prints_a_banner_and_allows_reset(tmp_path: Path) -> None:
    with Service(
        tmp_path, *LOCAL_DEMO, ALLOW_RESET="", ITEM_NAME="Zoë's show", INITIAL_STOCK="7"
    ) as service:
        banner = service.log.split("Starting gunicorn")[0]
        for part in ("Zoë's show", "7 units, 7 left", "BEGIN IMMEDIATE", "5 s", service.url):
            assert part in banner
        deadline = time.monotonic() + 10
        while len(service.workers()) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(service.workers()) == 4
        service.reset(3)
        assert service.get("/inventory")["current_stock"] == 3


def test_the_local_demo_leaves_reset_off_where_the_variable_says_so(tmp_path: Path) -> None:
    with Service(tmp_path, *LOCAL_DEMO, ALLOW_RESET="0") as service:
        assert requests.post(f"{service.url}/reset", timeout=10).status_code == 403


def test_the_local_demo_leaves_reset_off_on_an_address_that_others_may_reach(
    tmp_path: Path,
) -> None:
    with Service(tmp_path, *LOCAL_DEMO, ALLOW_RESET="", HOST="127.0.0.2") as service:
        assert requests.post(f"{service.url}/reset", timeout=10).status_code == 403


def test_under_gunicorn_reset_is_off_by_default(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, ALLOW_RESET="") as service:
        assert requests.post(f"{service.url}/reset", timeout=10).status_code == 403


def test_the_local_demo_runs_from_another_folder_and_keeps_its_database_there(
    tmp_path: Path,
) -> None:
    demo = (sys.executable, str(PROJECT / "app.py"))
    with Service(tmp_path, *demo, cwd=tmp_path, DATABASE_URL="") as service:
        assert service.buy().status_code == 200
        assert (tmp_path / "inventory.db").exists()


@pytest.mark.parametrize("command", [LOCAL_DEMO, GUNICORN])  # waitress promises less
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_the_request_in_flight_and_exits_0(
    tmp_path: Path, command: tuple[str, ...], number: int
) -> None:
    with Service(tmp_path, *command) as service:
        answers = []
        with (
            write_lock(tmp_path / "inventory.db") as holder,
            socket.create_connection(("127.0.0.1", service.port), timeout=20) as buyer,
        ):
            buyer.sendall(purchase_request("alice"))
            wait_until_it_is_read(service.port)
            if number == signal.SIGINT:  # a terminal sends it to the workers too
                os.killpg(service.process.pid, number)
            else:
                service.process.send_signal(number)
            stopping = threading.Thread(target=lambda: answers.append(service.process.wait(20)))
            stopping.start()
            holder.execute("ROLLBACK")
            raw = b"".join(iter(lambda: buyer.recv(65536), b""))
        stopping.join()
        assert parse_answer(raw).json["purchase_id"] == 1
        assert answers == [0]


def wait_until_it_is_read(port: int) -> None:
    """Wait until the server has received all bytes of every established connection to the port."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        waiting = 0
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            local_port, state = int(fields[1].split(":")[1], 16), fields[3]
            if local_port == port and state == "01":
                waiting += int(fields[4].split(":")[1], 16)
            if local_port == port and state == "0A":  # listening: the length of the backlog
                waiting += int(fields[4].split(":")[1], 16)
        if not waiting:
            return
        time.sleep(0.01)
    raise AssertionError("the request was never read")


def test_a_port_that_is_taken_is_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_to_end(
            LOCAL_DEMO, DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db", PORT=str(port)
        )
    assert done.returncode == 1
    assert re.fullmatch(
        rf"Cannot start: .*Address already in use .*'127\.0\.0\.1', {port}.* - set HOST or PORT\n",
        done.stderr,
    )
    assert done.stdout == ""


@pytest.mark.parametrize("command", [LOCAL_DEMO, GUNICORN])
def test_a_database_that_is_not_ours_is_told_in_one_line(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "inventory.db"
    path.write_text("shopping list\n" * 100)
    done = run_to_end(command, DATABASE_URL=f"sqlite:///{path}", PORT=str(free_port()))
    assert done.returncode not in (0, None)
    assert done.stderr == f"Cannot start: {path}: file is not a database\n"


def in_a_read_only_folder(folder: Path) -> tuple[str, ...]:
    """Return the demo's command, and take from it the right to write to the folder.

    A mode keeps everybody out but root; root gets a read-only mount.
    """
    if os.geteuid() != 0:
        folder.chmod(0o500)
        return LOCAL_DEMO
    mount = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    return ("unshare", "--mount", "sh", "-c", f"{mount} && exec {shlex.join(LOCAL_DEMO)}")


def test_a_read_only_folder_is_told_in_one_line(tmp_path: Path) -> None:
    done = run_to_end(
        in_a_read_only_folder(tmp_path),
        DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db",
        PORT=str(free_port()),
    )
    tmp_path.chmod(0o700)
    assert done.returncode == 4
    assert re.fullmatch(
        r"Cannot start: .*(Read-only file system|Permission denied).*\n", done.stderr
    )


def test_a_host_that_can_be_none_is_told_in_one_line(tmp_path: Path) -> None:
    done = run_to_end(LOCAL_DEMO, DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db", HOST="é" * 70)
    assert done.returncode == 1
    assert re.fullmatch(r"Cannot start: .* - set HOST or PORT\n", done.stderr)


def test_eight_services_on_an_empty_folder_sell_one_stock(tmp_path: Path) -> None:
    services = [
        Service(tmp_path, *GUNICORN, INITIAL_STOCK="10", WEB_CONCURRENCY="1") for _ in range(8)
    ]
    try:
        for service in services:
            service.__enter__()
        statuses = [service.buy().status_code for service in services * 2]
        assert sorted(statuses) == [200] * 10 + [410] * 6
        assert services[0].get("/audit")["purchase_records"] == 10
    finally:
        for service in services:
            service.__exit__(None, None, None)


@pytest.mark.parametrize("command", [GUNICORN, LOCAL_DEMO], ids=["gunicorn", "the demo"])
def test_no_connection_to_the_database_crosses_the_fork(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """It would keep the workers from locks of their own: the file is free when the master ends."""
    need(sys.platform == "linux", "/proc/locks is Linux's")
    with Service(tmp_path, *command, WEB_CONCURRENCY="2") as service:
        shm = tmp_path / "inventory.db-shm"
        wait_until(lambda: len(service.workers()) == 2, 20, "not two workers")
        wait_until(lambda: holders(shm) == set(service.workers()), 20, "a worker has no lock")
        opened = Path(f"/proc/{service.process.pid}/fd").iterdir()
        assert not [file for file in map(os.readlink, opened) if "inventory.db" in file]


def holders(file: Path) -> set[int]:
    """The processes that have a lock on it."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return {int(line[4]) for line in lines if line[-3].endswith(f":{file.stat().st_ino}")}


def test_a_second_start_neither_refills_nor_empties(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, INITIAL_STOCK="10") as service:
        service.buy()
    with Service(tmp_path, *GUNICORN, INITIAL_STOCK="500") as service:
        assert service.get("/audit") == {
            "initial_stock": 10,
            "current_stock": 9,
            "purchase_records": 1,
            "consistent": True,
        }


def test_a_worker_that_is_killed_is_replaced_while_the_write_lock_is_held(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="1") as service:
        with write_lock(tmp_path / "inventory.db"):
            os.kill(service.workers()[0], signal.SIGKILL)
            started = time.monotonic()
            while time.monotonic() < started + 10:
                try:
                    assert service.get("/inventory")["current_stock"] == 100
                    break
                except requests.ConnectionError:
                    time.sleep(0.02)
            assert time.monotonic() - started < 4
        assert service.buy().status_code == 200


def test_gunicorn_does_not_start_a_worker_again_and_again_that_cannot_start(tmp_path: Path) -> None:
    done = run_to_end(
        (*GUNICORN, "--config", os.devnull),
        DATABASE_URL=f"sqlite:///{tmp_path}/missing/inventory.db",
    )
    assert done.returncode == 4
    assert "Cannot start:" in done.stderr


def test_the_flask_commands_work(tmp_path: Path) -> None:
    database = {"DATABASE_URL": f"sqlite:///{tmp_path}/inventory.db"}
    for name, told in (("init-db", ""), ("audit", f"In {tmp_path}/inventory.db, by ")):
        done = run_to_end([sys.executable, "-m", "flask", "--app", "app", name], **database)
        assert done.returncode == 0
        assert done.stderr.startswith(told) if told else done.stderr == ""
        assert "100" in done.stdout


def test_flask_run_serves_the_same_app(tmp_path: Path) -> None:
    port = str(free_port())
    with Service(tmp_path, *FLASK, port, PORT=port) as service:
        assert service.buy().json()["remaining_stock"] == 99
        # Its input has no end: who waits for more than the body's length waits for ever.
        for body in ("{x}", '{"customer": "bob"}'):
            refused = requests.post(f"{service.url}/buy_ticket", body, headers=JSON, timeout=10)
            assert refused.status_code == 400
        assert service.process.poll() is None


def test_without_gunicorn_the_demo_serves_by_waitress(tmp_path: Path) -> None:
    with Service(tmp_path, *WITHOUT_GUNICORN, ALLOW_RESET="") as service:
        answers = [requests.post(f"{service.url}/buy_ticket", timeout=10) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert answers[0].headers["Server"] == "flash-sale"
        service.reset(7)
        for lines in (b"NONSENSE", b"POST /buy_ticket HTTP/1.1\r\nContent-Length: many"):
            with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
                client.sendall(lines + b"\r\n\r\n")
                answer = b"".join(iter(lambda: client.recv(65536), b""))
            assert b"Content-Type: application/json" in answer
            assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["success"] is False
        assert service.get("/audit")["purchase_records"] == 0
        assert service.stop(signal.SIGTERM) == 0


def test_importing_the_module_opens_nothing_and_says_nothing(tmp_path: Path) -> None:
    statements = "import app; app.create_app; app.VERSION"
    done = run_to_end((sys.executable, "-c", statements), DATABASE_URL=f"sqlite:///{tmp_path}/a.db")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [("--threads", "4"), ("-k", "gthread"), ("-k", "gevent")])
def test_workers_that_would_lose_buyers_at_a_stop_are_refused_in_one_line(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    url = f"sqlite:///{tmp_path}/inventory.db"
    done = run_to_end((*GUNICORN, *options), DATABASE_URL=url, PORT=str(free_port()))
    assert done.returncode == 4
    assert re.fullmatch(r"Cannot start: .*(gthread|gevent|4 threads) would lose .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


ODD_OUTPUTS = {
    **{"without UTF-8": "", "a full disk": ">/dev/full", "closed": ">&-"},
    "closed errors": "2>&-",
}


@pytest.mark.parametrize("output", ODD_OUTPUTS.values(), ids=ODD_OUTPUTS)
def test_nothing_that_is_printed_stops_a_start(tmp_path: Path, output: str) -> None:
    terminal = ("sh", "-c", f'exec "$0" "$@" {output}')
    variables = {"ITEM_NAME": "Zoë's show \N{TICKET}", "PYTHONIOENCODING": "ascii"}
    with Service(tmp_path, *terminal, *LOCAL_DEMO, **variables) as service:
        assert service.get("/inventory")["item_name"] == variables["ITEM_NAME"]
        in_the_banner = "Item:                Zo\\xeb's show \\U0001f3ab\n" in service.log
        assert in_the_banner == (output in ("", "2>&-"))


def test_the_demo_starts_through_a_link_beside_another_app(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("raise SystemExit('the wrong app')")
    (tmp_path / "demo.py").symlink_to(PROJECT / "app.py")
    demo = (sys.executable, "demo.py")
    with Service(tmp_path, *demo, cwd=tmp_path, DATABASE_URL="sqlite:///link.db") as service:
        assert service.buy().status_code == 200
        assert requests.get(f"{service.url}/openapi.json", timeout=10).json()["openapi"]
    assert (tmp_path / "link.db").exists()


def test_the_demo_starts_in_a_folder_with_a_colon(copy_of_the_program: Path) -> None:
    folder = copy_of_the_program.rename(copy_of_the_program.with_name("a:b, c d"))
    with Service(folder, *LOCAL_DEMO, cwd=folder, DATABASE_URL="sqlite:///sale.db") as service:
        assert service.buy().status_code == 200


def test_gunicorn_in_another_folder_says_the_whole_command_and_that_works(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/inventory.db"
    silent = run_to_end(GUNICORN, cwd=tmp_path, DATABASE_URL=url, PYTHONPATH=str(PROJECT))
    assert silent.returncode == 4
    (command,) = re.findall(
        "Cannot start: gunicorn has not read gunicorn.conf.py - run (.*)", silent.stderr
    )
    with Service(tmp_path, *shlex.split(command), cwd=tmp_path) as service:
        assert service.buy().status_code == 200


def test_reset_is_closed_on_an_address_that_gunicorns_own_variable_opens(tmp_path: Path) -> None:
    port = free_port()
    variables = {"ALLOW_RESET": "", "PORT": str(port), "HOST": "127.0.0.2"}
    elsewhere = f"--bind 127.0.0.2:{port}"
    with Service(tmp_path, *LOCAL_DEMO, **variables | {"GUNICORN_CMD_ARGS": elsewhere}) as service:
        assert f"URL:                 http://127.0.0.2:{port}\n" in service.log
        assert requests.post(f"{service.url}/reset", timeout=10).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1", 200), ("localhost", 200), ("[::1]", 200), ("shop.example", 403)],
)
def test_the_demo_resets_for_whoever_calls_this_machine_by_its_own_name(
    tmp_path: Path, host: str, status: int
) -> None:
    with Service(tmp_path, *LOCAL_DEMO, ALLOW_RESET="") as service:
        headers = {"Host": f"{host}:{service.port}"}
        assert (
            requests.post(f"{service.url}/reset", headers=headers, timeout=10).status_code == status
        )


@pytest.mark.parametrize("command", ["init-db", "audit"])
def test_a_command_whose_database_fails_meanwhile_ends_in_one_line(
    tmp_path: Path, command: str
) -> None:
    fails_later = (
        "import db, sys; from flask.cli import main\n"
        "def fail(store): raise db.Unavailable('disk I/O error')\n"
        "db.SQLiteStore.inventory = db.SQLiteStore.audit = fail\n"
        f"sys.argv = ['flask', '--app', 'app', '{command}']; main()"
    )
    done = run_to_end(
        (sys.executable, "-c", fails_later), DATABASE_URL=f"sqlite:///{tmp_path}/inventory.db"
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "Cannot start: disk I/O error\n"


NOBODY = 65534


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """The test's folder for everybody: pytest keeps it for its own user."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o777 == 0o700:
            folder.chmod(0o755)
    return tmp_path


def test_a_file_that_the_workers_user_cannot_write_is_refused_by_its_owner(
    open_folder: Path,
) -> None:
    need_root("gunicorn --user")
    path = open_folder / "inventory.db"
    done = run_to_end(
        (*GUNICORN, "--user", "nobody"), DATABASE_URL=f"sqlite:///{path}", PORT=str(free_port())
    )
    assert done.returncode == 4
    refusal = f"{path} belongs to root, this process is nobody, who may not write there"
    assert f"Cannot start: {path}: {refusal}\n" in done.stderr
    assert "Selling" not in done.stderr
    assert path.stat().st_uid == 0


@pytest.mark.parametrize("beside", ["-wal", "-shm"])
def test_a_file_beside_it_that_cannot_be_written_is_named(
    open_store: OpenStore, database: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    open_store().buy("alice")  # its reader stays open, so both are there
    monkeypatch.setattr(setup, "may_write", lambda place: not place.name.endswith(beside))
    with pytest.raises(db.Unavailable, match=f"inventory.db{beside} is read-only"):
        open_store()


def test_the_workers_user_sells_from_a_file_of_its_own(open_folder: Path) -> None:
    need_root("gunicorn --user")
    folder = open_folder / "sale"
    folder.mkdir()
    os.chown(folder, NOBODY, -1)
    (folder / "inventory.db").touch(0o600)
    os.chown(folder / "inventory.db", NOBODY, -1)
    command = patched("import encodings.idna")  # nobody may not read an interpreter of root's
    with Service(folder, *command, GUNICORN_CMD_ARGS="--user nobody") as service:
        assert service.buy().status_code == 200
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in service.workers()} == {NOBODY}
