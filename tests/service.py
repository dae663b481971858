"""The real service is a process of its own; crowds of buyers come at once over real sockets."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import pytest
import requests

from serving.config import VARIABLES

PROJECT = Path(__file__).parent.parent
START_LIMIT_S = 20.0
STOP_LIMIT_S = 20.0
RUN_LIMIT_S = 240.0
GIVEN_OUT: set[int] = set()
T = TypeVar("T")


class Answer(NamedTuple):
    status: int  # 0: no answer; `text` says why
    headers: dict[str, str]  # names in lower case
    text: str
    ended_s: float = 0.0  # of time.perf_counter(): when a crowd's connection ended, or was given up

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.text))


def need(condition: object, reason: str) -> None:
    """Skip where a tool or a right is missing; under CI=true, where everything is tested, fail."""
    if not condition and os.environ.get("CI"):
        pytest.fail(reason)
    if not condition:
        pytest.skip(reason)


def need_root(what: str) -> None:
    """Skip what only root may do: the one skip that CI=true allows."""
    if os.geteuid() != 0:
        pytest.skip(f"{what} needs root")


def patched(statements: str) -> tuple[str, ...]:
    """The command that starts gunicorn after `statements` have changed the program."""
    run = (
        "import sys; from gunicorn.app.wsgiapp import run;"
        " sys.argv = ['gunicorn', 'app:app']; run()"
    )
    return (sys.executable, "-c", f"{statements}\n{run}")


def wait_until(condition: Callable[[], T], limit_s: float, failure: str) -> T:
    deadline = time.monotonic() + limit_s
    while not (result := condition()):
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)
    return result


def free_port() -> int:
    """A port that nobody listens on; each is given out once."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in GIVEN_OUT:
            GIVEN_OUT.add(port)
            return port


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without the service's own variables, then `variables`."""
    own = {*VARIABLES, "GUNICORN_CMD_ARGS", "PROMETHEUS_MULTIPROC_DIR", "SCRIPT_NAME"}
    return {name: value for name, value in os.environ.items() if name not in own} | variables


def run_to_end(
    command: Sequence[str], cwd: str | Path = PROJECT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command that is expected to end by itself, in the project's folder."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )


class Service:
    """`gunicorn app:app` (or another command) on a free port; `with` stops it as SIGTERM does."""

    def __init__(
        self, folder: Path, *command: str, cwd: str | Path = PROJECT, **variables: str
    ) -> None:
        self.port = int(variables.get("PORT", 0)) or free_port()
        self.url = f"http://{variables.get('HOST', '127.0.0.1')}:{self.port}"
        self.log_file = folder / f"service-{self.port}.log"
        defaults = {
            "DATABASE_URL": f"sqlite:///{folder / 'inventory.db'}",
            "PORT": str(self.port),
            "ALLOW_RESET": "1",
            "WEB_CONCURRENCY": "4",
        }
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command or (sys.executable, "-m", "gunicorn", "app:app"),
                cwd=cwd,
                env=environment(**defaults | variables),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Service":
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(self.url, timeout=5)
                return self
            except requests.RequestException:
                time.sleep(0.02)
        self.__exit__(None, None, None)
        raise AssertionError(f"the service did not start:\n{self.log}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGTERM)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: int) -> int:
        """Signal the master and wait: its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def get(self, path: str) -> Any:
        return requests.get(self.url + path, timeout=30).json()

    def buy(self, customer_id: str = "c1", key: str | None = None) -> requests.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        body = {"customer_id": customer_id}
        return requests.post(f"{self.url}/buy_ticket", json=body, headers=headers, timeout=30)

    def reset(self, stock: int) -> None:
        requests.post(f"{self.url}/reset", json={"stock": stock}, timeout=30).raise_for_status()


def purchase_request(customer_id: str, key: str | None = None) -> bytes:
    body = json.dumps({"customer_id": customer_id}).encode()
    extra = "" if key is None else f"Idempotency-Key: {key}\r\n"
    head = f"POST /buy_ticket HTTP/1.1\r\nHost: test\r\n{extra}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def parse_answer(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/1.1 "):
        return Answer(0, {}, raw.decode("utf-8", "replace"))
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
    }
    if len(body) != int(headers["content-length"]):
        return Answer(0, {}, f"incomplete: {raw!r}")
    return Answer(int(lines[0].split()[1]), headers, body.decode("utf-8"))


def allow_open_files(wanted: int) -> None:
    import resource  # POSIX only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reason = f"the limit of open files is {hard}, {wanted} are needed (ulimit -n)"
    need(hard == resource.RLIM_INFINITY or hard >= wanted, reason)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def send_at_once(port: int, raw_requests: Sequence[bytes], limit_s: float = 60.0) -> list[Answer]:
    """One connection for each request, all opened before the first waits for an answer."""
    allow_open_files(len(raw_requests) + 500)
    crowd = selectors.DefaultSelector()
    received = [bytearray() for _ in raw_requests]
    ended_s: dict[int, float] = {}
    for number in range(len(raw_requests)):
        buyer = socket.socket()
        buyer.setblocking(False)
        buyer.connect_ex(("127.0.0.1", port))
        crowd.register(buyer, selectors.EVENT_WRITE, number)
    deadline = time.monotonic() + limit_s
    while crowd.get_map() and time.monotonic() < deadline:
        for key, events in crowd.select(timeout=1):
            if _advance(crowd, key, events, raw_requests, received):
                ended_s[key.data] = time.perf_counter()
    given_up_s = time.perf_counter()
    for key in list(crowd.get_map().values()):
        _socket(key).close()
    crowd.close()
    return [
        parse_answer(bytes(raw))._replace(ended_s=ended_s.get(number, given_up_s))
        for number, raw in enumerate(received)
    ]


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _advance(
    crowd: selectors.BaseSelector,
    key: selectors.SelectorKey,
    events: int,
    raw_requests: Sequence[bytes],
    received: list[bytearray],
) -> bool:
    """Send or read what is possible now; True once the connection has ended."""
    buyer = _socket(key)
    try:
        if events & selectors.EVENT_WRITE:
            buyer.sendall(raw_requests[key.data])
            crowd.modify(buyer, selectors.EVENT_READ, key.data)
            return False
        data = buyer.recv(65536)
        received[key.data] += data
    except BlockingIOError:
        return False
    except OSError as error:  # refused or reset: what came until then is the answer
        received[key.data] = received[key.data] or bytearray(repr(error).encode())
        data = b""
    if not data:
        crowd.unregister(buyer)
        buyer.close()
    return not data
