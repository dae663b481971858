"""Disks, files and processes fail under the running service: answers stay true, sales stay kept."""

import ast
import itertools
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
import requests
from service import (
    PROJECT,
    Answer,
    Service,
    free_port,
    need,
    parse_answer,
    patched,
    purchase_request,
    send_at_once,
    wait_until,
)
from test_sqlite_store import write_lock

import db
from sqlite.engine import sqlite3

KILLS, KILLS_PER_START, KILLING_LIMIT_S = 300, 40, 60.0
# The service, but for the pause between two lines about the same kind of trouble.
GUNICORN = patched("import serving.watch; serving.watch.TROUBLE_PAUSE_S = -1")
REFUSED = {"success": False, "message": db.Unavailable.message}


def errors(service: Service) -> list[str]:
    return [line for line in service.log.splitlines() if "[ERROR]" in line or "Traceback" in line]


def assert_refuses(service: Service, cause: str, provoke: Callable[[], object] = bool) -> None:
    """503 for a purchase and for /health, and one line with the cause for each."""
    before = len(errors(service))
    provoke()
    answer = service.buy("alice", "key-refused")
    provoke()
    health = requests.get(f"{service.url}/health", timeout=10)
    assert (answer.status_code, answer.json(), answer.headers["Retry-After"]) == (503, REFUSED, "1")
    assert (health.status_code, health.json()["success"]) == (503, False)
    lines = errors(service)[before:]
    assert [bool(re.search(cause, line)) for line in lines] == [True, True], lines
    assert ("POST /buy_ticket: " in lines[0], "GET /health: " in lines[1]) == (True, True), lines


def assert_sells_again(service: Service, sold_before: int) -> None:
    """With the key that was refused, so that it is seen to have left nothing behind."""
    answer = service.buy("alice", "key-refused")
    assert (answer.status_code, answer.headers.get("Idempotent-Replayed")) == (200, None)
    audit = service.get("/audit")
    assert (audit["purchase_records"], audit["consistent"]) == (sold_before + 1, True)
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 200


def mounting() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0


@contextmanager
def mounted(
    folder: Path, mount: str, workers: int = 4, stock: int = 100
) -> Iterator[tuple[Service, Path]]:
    """Run the service with its database on a mount that only it and its children see.

    The mount ends with them.
    """
    need(mounting(), "no right to mount (root with CAP_SYS_ADMIN is needed)")
    disk = folder / "disk"
    disk.mkdir()
    command = f"{mount} {shlex.quote(str(disk))} && exec {shlex.join(GUNICORN)}"
    variables = {
        "DATABASE_URL": f"sqlite:///{disk}/inventory.db",
        "WEB_CONCURRENCY": str(workers),
        "INITIAL_STOCK": str(stock),
    }
    with Service(
        folder, "unshare", "--mount", "sh", "-c", command, cwd=PROJECT, **variables
    ) as service:
        yield service, Path(f"/proc/{service.process.pid}/root{disk}")


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("ab", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


def test_on_a_full_disk_nothing_is_sold_and_with_room_again_it_is(tmp_path: Path) -> None:
    with mounted(tmp_path, "mount -t tmpfs -o size=1m tmpfs", workers=2) as (service, disk):
        assert service.buy().status_code == 200
        for _ in range(4):
            # each time anew: the last connection that closes gives the WAL's room back
            assert_refuses(service, "database or disk is full", lambda: fill(disk))
        assert service.get("/inventory")["current_stock"] == 99
        (disk / "filler").unlink()
        assert_sells_again(service, sold_before=1)


def test_a_disk_that_fills_up_in_mid_sale_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    with mounted(tmp_path, "mount -t tmpfs -o size=1m tmpfs", stock=1000) as (service, disk):
        answers = send_at_once(
            service.port, [purchase_request("alice", f"key-{n}") for n in range(400)]
        )
        assert {answer.status for answer in answers} == {200, 503}
        for name in ("inventory.db", "inventory.db-wal"):
            shutil.copy(disk / name, tmp_path / name)
        refused = [answer for answer in answers if answer.status == 503]
        assert len(errors(service)) == len(refused)
    sold = {answer.json["purchase_id"] for answer in answers if answer.status == 200}
    assert stored(tmp_path / "inventory.db", 1000) == sold


def stored(database: Path, initial_stock: int) -> set[int]:
    """The ids of the purchases in a database that is sound."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ids = {row[0] for row in connection.execute("SELECT purchase_id FROM purchases")}
        assert (
            connection.execute("SELECT stock FROM inventory").fetchone()[0] + len(ids)
            == initial_stock
        )
    return ids


def test_at_the_file_size_limit_nothing_is_sold_and_above_it_is(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="1") as service:
        assert service.buy().status_code == 200
        (worker,) = service.workers()
        unlimited = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        size = (tmp_path / "inventory.db-wal").stat().st_size
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (size + 5000, unlimited[1]))
        for _ in range(3):
            assert_refuses(service, "disk I/O error")
        resource.prlimit(worker, resource.RLIMIT_FSIZE, unlimited)
        assert_sells_again(service, sold_before=1)


def test_a_mount_turned_read_only_is_told_and_turned_back_sells(tmp_path: Path) -> None:
    with mounted(tmp_path, f"mount --bind {tmp_path}/disk", workers=1) as (service, _):
        enter = ("nsenter", "--mount", "--target", str(service.process.pid))
        folder = str(tmp_path / "disk")
        # A second mount on the first, as the kernel turns none read-only in which files are open.
        subprocess.run([*enter, "mount", "-o", "bind,ro", folder, folder], check=True)
        assert_refuses(service, "attempt to write a readonly database")
        subprocess.run([*enter, "umount", folder], check=True)
        assert_sells_again(service, sold_before=0)


def test_a_database_file_turned_read_only_is_told_and_turned_back_sells(tmp_path: Path) -> None:
    without_rights = (
        "setpriv",
        "--bounding-set=-all",
        "--inh-caps=-all",
    )  # root's writes ignore the mode
    need(
        os.geteuid() != 0 or shutil.which("setpriv"),
        "setpriv is not installed (apt-get install util-linux)",
    )
    command = GUNICORN if os.geteuid() != 0 else (*without_rights, *GUNICORN)
    with Service(tmp_path, *command) as service:
        assert service.buy().status_code == 200
        files = list(tmp_path.glob("inventory.db*"))
        for file in files:
            file.chmod(0o400)
        assert_refuses(service, "attempt to write a readonly database")
        for file in files:
            file.chmod(0o600)
        assert_sells_again(service, sold_before=1)


def test_a_folder_that_is_moved_away_is_told_and_moved_back_sells(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    with Service(tmp_path, *GUNICORN, DATABASE_URL=f"sqlite:///{folder}/inventory.db") as service:
        assert service.buy().status_code == 200
        folder.rename(elsewhere)
        for _ in range(8):  # workers with and without a standing connection
            assert_refuses(service, "unable to open database file")
        elsewhere.rename(folder)
        assert_sells_again(service, sold_before=1)


@pytest.mark.parametrize("start", [0, 4096], ids=["all of it", "all but the first page"])
def test_a_database_overwritten_with_garbage_is_told_and_restored_sells(
    tmp_path: Path, start: int
) -> None:
    database = tmp_path / "inventory.db"
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="1") as service:
        assert service.buy().status_code == 200
        for _ in range(
            2
        ):  # the first folds the sale into the database, the second starts the WAL over
            assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
        saved = database.read_bytes()
        overwrite(database, start, random.Random(1).randbytes(len(saved) - start))
        assert requests.get(f"{service.url}/health", timeout=10).status_code == 503
        for _ in range(4):
            assert_refuses(service, r"file is not a database|database disk image is malformed")
        overwrite(database, 0, saved)
        assert_sells_again(service, sold_before=1)


def overwrite(file: Path, start: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(data)


def test_a_wal_truncated_by_somebody_is_told_and_after_a_restart_the_rest_sells(
    tmp_path: Path,
) -> None:
    """What only the WAL held is destroyed with it; nothing may be sold on top of the ruins."""
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="2") as service:
        service.reset(100)  # as all of a reset is in the database file
        for _ in range(20):
            assert service.buy().status_code == 200
        os.truncate(tmp_path / "inventory.db-wal", 0)
        answers = send_at_once(service.port, [purchase_request("alice")] * 50)
        sold = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 503]
        assert (len(refused) > 0, len(sold) + len(refused)) == (True, len(answers))
        assert ["disk I/O error" in line for line in errors(service)] == [True] * len(refused)
    with Service(tmp_path, *GUNICORN) as service:
        assert_sells_again(service, sold_before=len(sold))
    assert len(stored(tmp_path / "inventory.db", 100)) == len(sold) + 1


def test_a_database_replaced_by_another_is_noticed_and_sold_from(tmp_path: Path) -> None:
    """As a restore does it: the database and its WAL moved away, another one moved in."""
    database, backup = tmp_path / "inventory.db", tmp_path / "backup.db"
    with Service(tmp_path, *GUNICORN, WEB_CONCURRENCY="2", INITIAL_STOCK="1000") as service:
        for _ in range(20):
            assert service.buy().status_code == 200
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(backup)) as copy:
            source.backup(copy)
        for _ in range(20):
            assert service.buy().status_code == 200
        for file in tmp_path.glob("inventory.db*"):
            file.rename(tmp_path / f"old-{file.name}")
        backup.rename(database)
        answers = [service.buy() for _ in range(40)]
        assert {answer.status_code for answer in answers} <= {200, 503}
        sold = {answer.json()["purchase_id"] for answer in answers if answer.status_code == 200}
        assert service.buy().status_code == 200
    assert stored(database, 1000) == set(range(1, 21)) | sold | {max(sold, default=20) + 1}


def ask(port: int, raw_request: bytes) -> Answer:
    """One request on one connection; status 0 if no answer came."""
    raw = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as buyer:
        buyer.sendall(raw_request)
        while data := buyer.recv(65536):
            raw += data
    return parse_answer(raw) if raw else Answer(0, {}, "")


class Buyers:
    """They repeat each purchase with its key until it is answered, whoever is killed meanwhile."""

    def __init__(self, port: int, number: int) -> None:
        self.port = port
        self.over = threading.Event()
        self.acknowledged: dict[str, int] = {}
        self.threads = [
            threading.Thread(target=self.buy, args=(f"key-{n}",)) for n in range(number)
        ]

    def buy(self, prefix: str) -> None:
        for number in itertools.count():
            key = f"{prefix}-{number}"
            while (answer := ask(self.port, purchase_request("alice", key))).status != 200:
                assert answer.status in (0, 503), answer
                if self.over.wait(0.01):
                    return
            self.acknowledged[key] = answer.json["purchase_id"]

    def wait_for_a_sale(self) -> None:
        before = len(self.acknowledged)
        wait_until(lambda: len(self.acknowledged) > before, 10, "the sale does not go on")

    def __enter__(self) -> "Buyers":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(30)


def test_hundreds_of_kills_in_mid_sale_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """SIGKILL hits workers, now and then all processes; the service is started again as it was."""
    luck, port, kills = random.Random(1), free_port(), 0
    deadline = time.monotonic() + KILLING_LIMIT_S
    with Buyers(port, 4) as buyers:
        while time.monotonic() < deadline and kills < KILLS:
            with Service(tmp_path, *GUNICORN, PORT=str(port), INITIAL_STOCK="1000000") as service:
                for _ in range(KILLS_PER_START):
                    buyers.wait_for_a_sale()
                    kills += kill(luck.choice(service.workers() or [0]))
                os.killpg(service.process.pid, signal.SIGKILL)
                service.process.wait()
    assert kills >= KILLS / 2
    assert_stored(tmp_path / "inventory.db", buyers.acknowledged)


def kill(pid: int) -> int:
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return 1
    return 0


def assert_stored(database: Path, acknowledged: dict[str, int]) -> None:
    ids = stored(database, 1_000_000)
    with closing(sqlite3.connect(database)) as connection:
        keys = dict(connection.execute("SELECT idempotency_key, purchase_id FROM purchases"))
    assert len(keys) == len(ids)
    assert acknowledged.items() <= keys.items()
    assert len(keys) <= len(acknowledged) + 4  # each buyer's last try


@pytest.mark.parametrize("module", ["app.py", "db.py", "gunicorn.conf.py"])
def test_no_program_looks_at_the_wall_clock(module: str) -> None:
    used = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse((PROJECT / module).read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert {name for name in used if name.startswith(("time.", "datetime."))} <= {
        "time.monotonic",
        "time.sleep",
    }


def test_a_clock_that_runs_backwards_changes_no_timeout(tmp_path: Path) -> None:
    command = patched(
        "import time; started = time.time(); time.time = lambda: started - 60 * time.monotonic()"
    )
    with Service(tmp_path, *command, LOCK_TIMEOUT="1") as service:
        assert service.buy().status_code == 200
        with write_lock(tmp_path / "inventory.db"):
            started = time.monotonic()
            assert service.buy().status_code == 503
            assert 1.0 <= time.monotonic() - started < 2.0
        assert service.buy().json()["remaining_stock"] == 98


def wait_until_started(service: Service) -> None:
    wait_until(lambda: service.log.count("Booting worker") == 4, 10, "the workers did not start")


def test_refusals_leave_no_line_in_the_log(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, INITIAL_STOCK="1") as service:
        assert service.buy().status_code == 200
        wait_until_started(service)
        before = service.log
        for _ in range(20):
            answers = send_at_once(service.port, [purchase_request("alice")] * 1_000)
            assert {answer.status for answer in answers} == {410}
        assert service.log == before


def test_a_busy_purchase_is_one_line_in_the_log(tmp_path: Path) -> None:
    with Service(tmp_path, *GUNICORN, LOCK_TIMEOUT="0") as service:
        wait_until_started(service)
        before = service.log
        with write_lock(tmp_path / "inventory.db"):
            assert service.buy().status_code == 503
        (line,) = service.log.removeprefix(before).splitlines()
        assert "POST /buy_ticket: Busy: no write lock after " in line


def test_no_customer_and_no_key_is_in_the_log(tmp_path: Path) -> None:
    database = tmp_path / "inventory.db"
    with Service(tmp_path, *GUNICORN, LOCK_TIMEOUT="0", WEB_CONCURRENCY="1") as service:
        for customer in ("secret-1", "secret-1", "secret-2"):  # sold, replayed, refused
            service.buy(customer, "secret-key")
        with write_lock(database):
            assert service.buy("secret-1", "secret-key-2").status_code == 503
        (worker,) = service.workers()
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        assert service.buy("secret-1", "secret-key-3").status_code == 503
        requests.post(f"{service.url}/buy_ticket", data=b"secret-body", timeout=10)
        requests.post(
            f"{service.url}/buy_ticket?secret-query",
            headers={"Idempotency-Key": "secret " * 50},
            timeout=10,
        )
        assert len(errors(service)) == 2
        assert "secret" not in service.log
