"""deploy/nginx.conf as it stands, on free ports and in a test's folder; clients, and upstreams."""

import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service import PROJECT, Answer, free_port, need, parse_answer, wait_until

CONF = PROJECT / "deploy" / "nginx.conf"
PATIENCE_S = 20.0
Edits = dict[str, str]
BALANCER: Edits = {  # the comment's two lines: whoever asks is named by a header
    "#   set_real_ip_from 192.0.2.0/24;": "set_real_ip_from 127.0.0.1;",
    "#   real_ip_header": "real_ip_header",
}


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def render(folder: Path, ports: dict[int, int], upstream: int, edits: Edits) -> Path:
    """Write deploy/nginx.conf with other ports and other places; all else in it is tested."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    places = {
        "server 127.0.0.1:8000 ": f"server 127.0.0.1:{upstream} ",
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "/var/log/nginx/": f"{folder}/",
        "/var/cache/flash-sale ": f"{folder}/cache ",
        "http {\n": f"http {{\n{temporary}",
    }
    text = CONF.read_text(encoding="utf-8")
    for old, new in (edits | places).items():
        assert old in text, old
        text = text.replace(old, new)
    for public, port in ports.items():
        text = text.replace(f"listen {public}", f"listen 127.0.0.1:{port}")
        text = text.replace(f"listen [::]:{public}", f"listen [::1]:{port}" if has_ipv6() else "#")
    if os.geteuid() == 0:
        text = "user root root;  # a test's folder is closed to others\n" + text
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    return folder / "nginx.conf"


def nginx_command(folder: Path, conf: Path) -> list[str]:
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    need(program, "nginx is not installed (apt-get install nginx-light)")
    return [str(program), "-p", str(folder), "-c", str(conf)]


@contextmanager
def running(folder: Path, conf: Path, port: int) -> Iterator[None]:
    command = nginx_command(folder, conf)
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = subprocess.Popen([*command, "-g", "daemon off;"], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port), 10, "nginx did not start")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


@contextmanager
def nginx(
    folder: Path, upstream: int, edits: Edits | None = None, tls_port: int = 0
) -> Iterator[int]:
    """A real nginx before the upstream, its file changed by `edits`: its port."""
    port = free_port()
    with running(folder, render(folder, {80: port, 443: tls_port}, upstream, edits or {}), port):
        yield port


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# ---- Clients


def address(number: int) -> str:
    """One of many addresses of this machine, as nginx limits each by itself."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


def ask(port: int, raw_request: bytes, source: str = "127.0.0.1") -> Answer:
    with connect(port, source) as client:
        client.sendall(raw_request)
        return parse_answer(read_all(client))


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    place = ("::1" if ":" in source else "127.0.0.1", port)
    return socket.create_connection(place, timeout=PATIENCE_S, source_address=(source, 0))


def read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def get(path: str, headers: str = "", method: str = "GET") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    return f"{head}{headers}\r\n".encode()


def post(path: str, body: bytes = b"", headers: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
        "Content-Type: application/json\r\n"
    )
    return f"{head}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def buy(key: str = "", headers: str = "") -> bytes:
    if key:
        headers += f"Idempotency-Key: {key}\r\n"
    return post("/buy_ticket", b'{"customer_id": "alice"}', headers)


def ask_at_once(port: int, raw_requests: list[bytes], source: str = "127.0.0.1") -> list[Answer]:
    """All are sent before the first answer is read."""
    clients = [connect(port, source) for _ in raw_requests]
    for client, raw_request in zip(clients, raw_requests, strict=True):
        client.sendall(raw_request)
    answers = []
    for client in clients:
        with client:
            answers.append(parse_answer(read_all(client)))
    return answers


# ---- In the service's place


def reply(status: int, body: str = '{"success": false}', *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", "Connection: close", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", *headers, "Cache-Control: no-store"]
    return "\r\n".join([*lines, "", body]).encode()


def for_a_second(status: int, body: str = '{"success": false}') -> bytes:
    return reply(status, body, "X-Accel-Expires: 1")


class Upstream(socketserver.ThreadingTCPServer):
    """In the service's place: notes each request, and answers as `answer` says.

    An empty answer closes the connection without one.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, answer: Callable[[str], bytes] = lambda _: b"") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.port = int(self.server_address[1])
        self.requests: list[str] = []
        self.gone = threading.Event()  # a client hung up before its answer
        self.thread = threading.Thread(target=self.serve_forever, args=[0.02])

    def __enter__(self) -> "Upstream":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def wait_for(self, number: int, limit_s: float = PATIENCE_S) -> None:
        failure = f"{number} requests were expected"
        wait_until(lambda: len(self.requests) >= number, limit_s, failure)


class Handler(socketserver.BaseRequestHandler):
    server: Upstream

    def handle(self) -> None:
        received = b""
        while not is_whole(received):
            data = self.request.recv(65536)
            if not data:
                return
            received += data
        text = received.decode("latin-1")
        self.server.requests.append(text)
        answer = self.server.answer(text)
        with suppress(BlockingIOError):
            if not self.request.recv(1, socket.MSG_DONTWAIT):
                self.server.gone.set()
        self.request.sendall(answer)


def is_whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return bool(end) and len(body) >= (int(length[1]) if length else 0)
