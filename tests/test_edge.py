"""What passes through deploy/nginx.conf, how often, for whom, and what nginx answers by itself."""

import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge import (
    BALANCER,
    CONF,
    Upstream,
    address,
    ask,
    ask_at_once,
    buy,
    connect,
    get,
    has_ipv6,
    nginx,
    post,
    read_all,
    reply,
)
from service import (
    PROJECT,
    Answer,
    Service,
    free_port,
    need,
    parse_answer,
    run_to_end,
    wait_until,
)
from test_edge_cache import OLDEST_S
from test_sqlite_store import write_lock

SALE = '{"success": true}'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), INITIAL_STOCK="100000") as running:
        yield running


@pytest.fixture
def port(service: Service, tmp_path: Path) -> Iterator[int]:
    with nginx(tmp_path, service.port) as running:
        yield running


# ---- The service's answers


def test_the_services_own_answers_pass_unchanged(port: int) -> None:
    first, again = (ask(port, buy("key-1"), address(n)) for n in (1, 2))
    assert (first.status, again.status, again.text) == (200, 200, first.text)
    assert again.headers["idempotent-replayed"] == "true"
    missing = ask(port, get("/nowhere"))
    assert (missing.status, missing.json["message"][:30]) == (404, "There is nothing at this path ")
    body = ask(port, post("/buy_ticket", b"[]"))
    assert (body.status, body.json["message"][:19]) == (400, "The body has to be ")


def test_a_sale_that_is_refilled_sells_again_within_two_seconds(
    port: int, service: Service
) -> None:
    """As long as nginx keeps what it may keep for one, as it counts whole seconds."""
    owner = ask(port, buy("owner"))
    service.reset(1)
    assert ask(port, buy("owner")).status == 200  # the reset forgot the key, too
    assert ask(port, buy(), address(1)).status == 410
    service.reset(100_000)
    refilled = time.monotonic()
    statuses: list[int] = []
    while (status := ask(port, buy(), address(len(statuses))).status) == 410:
        statuses.append(status)
        assert time.monotonic() - refilled < OLDEST_S
    assert (owner.status, status) == (200, 200)


def test_the_owner_of_the_last_ticket_is_told_so_while_everybody_else_is_told_sold_out(
    port: int, service: Service
) -> None:
    service.reset(1)
    try:
        answers = [ask(port, raw) for raw in (buy("last"), buy(), buy("last"), buy())]
    finally:
        service.reset(100_000)
    assert [answer.status for answer in answers] == [200, 410, 200, 410]
    assert answers[2].text == answers[0].text


def test_the_service_is_told_who_asks_whatever_the_client_claims(tmp_path: Path) -> None:
    forged = (
        "X-Forwarded-For: 1.2.3.4\r\nX-Real-IP: 1.2.3.4\r\nX-Forwarded-Proto: https\r\n"
        "X-Forwarded-Ssl: on\r\nX-Forwarded-Protocol: ssl\r\n"
    )
    with Upstream(lambda _: reply(200)) as upstream, nginx(tmp_path, upstream.port) as port:
        assert ask(port, post("/buy_ticket", headers=forged), "127.1.2.3").status == 200
        plain = b"POST /buy_ticket HTTP/1.0\r\n\r\n"  # without Host
        assert ask(port, plain).status == 200
        own_page = post("/buy_ticket").replace(b"Host: test", b"Host: shop.example:8080")
        assert ask(port, own_page).status == 200
    told, without_host, on_a_port = upstream.requests
    for header in ("X-Forwarded-For: 127.1.2.3", "X-Real-IP: 127.1.2.3", "Connection: close"):
        assert f"{header}\r\n" in told
    assert "X-Forwarded-Proto: http\r\n" in told
    for word in ("1.2.3.4", "https", "Ssl", "X-Forwarded-Protocol"):
        assert word not in told
    assert re.search(r"Host: \S+\r\n", without_host)
    assert "Host: shop.example:8080\r\n" in on_a_port


def test_an_outer_proxys_headers_stop_no_sale(port: int) -> None:
    """gunicorn refuses a request whose headers disagree about the scheme."""
    for number, outer in enumerate(["X-Forwarded-Ssl: on", "X-Forwarded-Protocol: ssl"]):
        headers = f"X-Forwarded-Proto: http\r\n{outer}\r\n"
        assert ask(port, buy(headers=headers), address(number)).status == 200


def test_a_balancer_lets_go_of_an_idle_connection_before_nginx_does() -> None:
    (seconds,) = re.findall(r"^ *keepalive_timeout (\d+)s;", CONF.read_text(), re.MULTILINE)
    assert int(seconds) > 60  # what balancers have by default


def test_a_connection_carries_many_requests(port: int) -> None:
    raw = get("/inventory").replace(b"Connection: close\r\n", b"")
    with connect(port) as client:
        for _ in range(3):
            client.sendall(raw)
            answer = b""
            while b"last_updated" not in answer:
                answer += client.recv(65536)
        client.sendall(get("/inventory"))
        assert parse_answer(read_all(client)).status == 200


# ---- Once, or certainly not


def test_a_purchase_is_never_sent_a_second_time(tmp_path: Path) -> None:
    with Upstream() as first, Upstream() as second:
        both = "".join(f"server 127.0.0.1:{one.port} max_fails=0; " for one in (first, second))
        line = "server 127.0.0.1:8000 max_conns=1000 max_fails=0;"
        with nginx(tmp_path, free_port(), {line: both}) as port:
            answer = ask(port, buy("key-1"))
        assert (answer.status, answer.headers["retry-after"]) == (502, "1")
        assert "with an Idempotency-Key send the same request" in answer.json["message"]
        assert len(first.requests + second.requests) == 1
    (line,) = (tmp_path / "unanswered.log").read_text().splitlines()
    assert re.search(
        r'127\.0\.0\.1 "POST /buy_ticket HTTP/1\.1" 502 key="key-1" sent=0 : [1-9]', line
    )


def test_what_nobody_answers_in_time_may_have_sold(tmp_path: Path) -> None:
    def never(_: str) -> bytes:
        time.sleep(1.5)
        return b""

    edits = {"proxy_read_timeout 60s": "proxy_read_timeout 1s"}
    with Upstream(never) as upstream, nginx(tmp_path, upstream.port, edits) as port:
        answer = ask(port, buy("key-1"))
    assert (answer.status, answer.headers["retry-after"]) == (504, "1")
    assert "with an Idempotency-Key send the same request" in answer.json["message"]
    assert '504 key="key-1"' in (tmp_path / "unanswered.log").read_text()


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "the queue is full"])
def test_what_was_not_passed_on_was_certainly_not_sold(tmp_path: Path, listens: bool) -> None:
    edits = {"proxy_connect_timeout 5s": "proxy_connect_timeout 1s"}
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        upstream = listener.getsockname()[1]
        waiting = [connect(upstream)]
        if not listens:
            listener.close()
        with nginx(tmp_path, upstream, edits) as port:
            answers = [ask(port, raw, address(n)) for n, raw in enumerate((buy(), buy("k")))]
            answers.append(ask(port, get("/inventory")))
        waiting[0].close()
    for answer in answers:
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json == {"success": False, "message": "Server busy - please retry"}
    assert not (tmp_path / "unanswered.log").read_text()


def test_a_buyer_without_a_key_who_hung_up_is_sold_nothing(tmp_path: Path) -> None:
    """All had sent their purchase, and waited for the write lock or for a worker."""
    (tmp_path / "nginx").mkdir()
    with (
        Service(tmp_path, LOCK_TIMEOUT="20", WEB_CONCURRENCY="2") as service,
        nginx(tmp_path / "nginx", service.port) as port,
    ):
        with write_lock(tmp_path / "inventory.db"):
            buyers = [connect(port) for _ in range(20)]
            for buyer in buyers:
                buyer.sendall(buy())
            wait_until(lambda: established(service.port) == 20, 10, "they don't wait")
            for buyer in buyers:
                buyer.close()
            wait_until(lambda: established(service.port) == 0, 10, "nginx does not hang up")
        assert ask(port, buy("k")).json["remaining_stock"] == 99


def established(port: int) -> int:
    """How many connections to this port nobody has closed."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    places = (line.split()[1:4] for line in lines)
    return sum(state == "01" and int(own.split(":")[1], 16) == port for own, _, state in places)


# ---- Limits


SLOWLY = {"rate=5r/s": "rate=1r/m"}  # so that nothing is refilled while a test runs


def test_fifty_people_behind_one_address_buy_at_once_and_a_script_gets_little_more(
    tmp_path: Path, service: Service
) -> None:
    with nginx(tmp_path, service.port, SLOWLY) as port:
        office = ask_at_once(port, [buy()] * 50, address(1))
        script = ask_at_once(port, [buy()] * 200, address(2))
        told = ask(port, buy(), address(2))
        assert ask(port, buy(), address(3)).status == 200
    assert Counter(answer.status for answer in office) == {200: 50}
    assert Counter(answer.status for answer in script) == {200: 60, 429: 140}
    assert (told.status, told.headers["retry-after"]) == (429, "1")
    assert told.json["message"] == "Too many requests from this address - please retry later."


def test_readings_do_not_count(port: int) -> None:
    answers = [ask(port, get("/inventory", method=method)) for method in ["GET"] * 300]
    assert {answer.status for answer in answers} == {200}
    assert ask(port, buy()).status == 200
    others = Counter(ask(port, post("/inventory")).status for _ in range(70))
    assert set(others) == {405, 429}  # they would all go to the service


def test_a_network_of_an_ipv6_subscriber_is_one_address(tmp_path: Path, service: Service) -> None:
    edits = BALANCER | SLOWLY
    with nginx(tmp_path, service.port, edits) as port:

        def sold(addresses: list[str]) -> int:
            headers = [f"X-Forwarded-For: {one}\r\n" for one in addresses]
            answers = [ask(port, buy(headers=header)) for header in headers]
            return Counter(answer.status for answer in answers)[200]

        assert sold([f"2001:db8:0:1::{host:x}:0:{host:x}" for host in range(1, 121)]) == 60
        assert sold([f"2001:db8:0:{net:x}:a::1" for net in range(2, 122)]) == 120
        assert sold([f"192.0.2.{host}" for host in range(1, 121)]) == 120


def test_nginx_listens_on_ipv6(port: int) -> None:
    need(has_ipv6(), "this machine has no IPv6 loopback address")
    assert ask(port, buy(), "::1").status == 200


# ---- For operators

FOR_OPERATORS = ["/metrics", "/audit", "/health", "/docs", "/openapi.json", "/docs/index.css"]
DISGUISED = ["//reset", "/%72eset", "/./audit", "/x/../metrics", "/reset?a=b", "/reset/"]


@pytest.mark.parametrize("path", ["/reset", *FOR_OPERATORS, *DISGUISED])
def test_what_is_for_operators_is_closed_to_the_public(
    port: int, service: Service, path: str
) -> None:
    before = service.get("/audit")["purchase_records"]
    for raw_request in (get(path), post(path)):
        answer = ask(port, raw_request)
        assert (answer.status, answer.json["success"]) == (403, False)
    assert service.get("/audit")["purchase_records"] == before


def test_operators_see_it_from_the_addresses_that_they_name(
    tmp_path: Path, service: Service
) -> None:
    edits = {"# allow 192.0.2.0/24;": "allow 127.3.0.0/16;"}
    with nginx(tmp_path, service.port, edits) as port:
        for path in ("/metrics", "/audit", "/health", "/openapi.json"):
            assert ask(port, get(path), "127.3.0.1").status == 200
            assert ask(port, get(path)).status == 403
        assert ask(port, post("/reset"), "127.3.0.1").status == 403


# ---- What nginx answers by itself, over HTTP/1.1 and HTTP/2

SECTION = (PROJECT / "deploy" / "README.md").read_text().partition("### TLS\n")[2].partition("\n##")
TLS_LISTEN, TLS_REDIRECT = re.findall(r"```nginx\n(.*?)```", SECTION[0], re.DOTALL)
PLAIN_LISTEN = (
    "listen 80 backlog=65535 reuseport;\n        listen [::]:80 backlog=65535 reuseport;\n"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need(shutil.which("openssl"), "openssl is not installed (apt-get install openssl)")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    places = f"-keyout {folder}/flash-sale.key -out {folder}/flash-sale.pem"
    made = run_to_end(f"{command} {places}".split())
    assert made.returncode == 0, made.stderr
    return folder


def tls_edits(certificate: Path) -> dict[str, str]:
    """The README's recipe, on a certificate of the test's own."""
    listen = re.sub(r"/etc/ssl/\w+/", f"{certificate}/", TLS_LISTEN)
    return {
        PLAIN_LISTEN: listen,
        "    map $status $unanswered {": TLS_REDIRECT + "    map $status $unanswered {",
    }


def curl(url: str, *options: str, body: str = "") -> Answer:
    """Over TLS; `options` choose the version of HTTP."""
    need(shutil.which("curl"), "curl is not installed (apt-get install curl)")
    command = ["curl", "--silent", "--show-error", "--insecure", "--include", *options, url]
    done = subprocess.run(
        command, input=body, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    head, _, text = done.stdout.replace("\r", "").rpartition("\n\n")
    first, *lines = head.rpartition("\n\n")[2].splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    return Answer(int(first.split()[1]), {name.lower(): headers[name] for name in headers}, text)


REFUSED = {
    "a large body": (413, "/buy_ticket", ["--data", "x" * 20_000]),
    "a large body of unknown length": (
        413,
        "/buy_ticket",
        ["--header", "Content-Length:", "--header", "Expect:", "--upload-file", "-", "-XPOST"],
    ),
    "a bad host": (400, "/", ["--header", "Host: a b"]),
    "what is closed": (403, "/reset", ["-XPOST"]),
    "what is for operators": (403, "/metrics", []),
    "another method": (405, "/", ["-XTRACE"]),
    "a broken connection": (502, "/buy_ticket", ["--data", "die"]),
    "no answer in time": (504, "/buy_ticket", ["--data", "wait"]),
    "a condition": (412, "/inventory", ["--header", 'If-Match: "x"']),
}


@pytest.fixture(scope="module")
def tls_port(
    tmp_path_factory: pytest.TempPathFactory, certificate: Path
) -> Iterator[tuple[int, int]]:
    def answer(request: str) -> bytes:
        time.sleep(1.5 if request.endswith("wait") else 0)
        return b"" if request.startswith("POST") else reply(200, SALE, "X-Accel-Expires: 1")

    port, folder = free_port(), tmp_path_factory.mktemp("nginx")
    edits = tls_edits(certificate) | SLOWLY | {"read_timeout 60s": "read_timeout 1s"}
    with Upstream(answer) as upstream, nginx(folder, upstream.port, edits, port) as plain_port:
        yield port, plain_port


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
@pytest.mark.parametrize("refused", REFUSED)
def test_what_nginx_refuses_it_refuses_in_json(
    tls_port: tuple[int, int], version: str, refused: str
) -> None:
    status, path, options = REFUSED[refused]
    url = f"https://localhost:{tls_port[0]}{path}"
    body = "x" * 20_000 if "unknown length" in refused else ""
    assert_refused_in_json(curl(url, version, *options, body=body), status)


def assert_refused_in_json(answer: Answer, status: int) -> None:
    assert (answer.status, answer.json["success"]) == (status, False)
    assert answer.json["message"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["server"] == "nginx"  # and no version


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_too_many_requests_are_refused_in_json(tls_port: tuple[int, int], version: str) -> None:
    url = f"https://127.0.0.1:{tls_port[0]}/x"
    own = [version, "--interface", "127.4.1.1" if version == "--http2" else "127.4.1.2"]
    asked = ["--output", "/dev/null", "--write-out", "%{http_code}\\n"]
    assert set(curl_text(f"{url}[1-200]", *own, *asked).split()) == {"200", "429"}
    assert_refused_in_json(curl(url, *own), 429)


@pytest.mark.parametrize("part", ["URL", "header"])
def test_a_header_too_large_ends_a_connection_of_http2_without_an_answer(
    tls_port: tuple[int, int], part: str
) -> None:
    url = f"https://localhost:{tls_port[0]}/" + ("~" * 20_000 if part == "URL" else "")
    header = ["--header", f"Large: {'~' * 20_000 if part == 'header' else ''}"]
    command = ["curl", "--silent", "--insecure", "--http2", *header, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode != 0, done.stdout) == (True, "")


def curl_text(url: str, *options: str) -> str:
    command = ["curl", "--silent", "--insecure", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize(
    ("raw_request", "status"),
    [
        (b"BUY\r\n\r\n", 400),
        (b"GET /inventory HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (get("/" + "a" * 9_000), 414),
        (post("/buy_ticket", headers=f"Idempotency-Key: {'k' * 9_000}\r\n"), 400),
    ],
    ids=["no HTTP", "bad host", "another version", "another coding", "long URL", "large header"],
)
def test_what_is_no_http_is_refused_in_json(port: int, raw_request: bytes, status: int) -> None:
    assert_refused_in_json(ask(port, raw_request), status)


def test_whoever_comes_without_tls_is_sent_there(tls_port: tuple[int, int]) -> None:
    with_tls, without = tls_port
    answer = ask(without, get("/inventory?a=b"))
    assert (answer.status, answer.headers["location"]) == (308, "https://test/inventory?a=b")
    assert answer.json["success"] is False
    assert_refused_in_json(ask(with_tls, get("/")), 400)  # no TLS on that port either
    for raw in (b"BUY\r\n\r\n", post("/buy_ticket", b"x" * 2_000_000)):
        assert ask(without, raw).json["success"] is False


def test_a_cached_reading_is_whole(tls_port: tuple[int, int]) -> None:
    url = f"https://localhost:{tls_port[0]}/inventory"
    for version in ("--http1.1", "--http2"):
        ranged = curl(url, version, "--header", "Range: bytes=0-3")
        assert (ranged.status, ranged.text) == (200, SALE)


def test_what_nginx_has_no_descriptors_left_for_is_503(tmp_path: Path) -> None:
    def answer(_: str) -> bytes:
        time.sleep(0.3)
        return reply(200, SALE)

    edits = {"worker_processes auto": "worker_processes 1", "nofile 70000": "nofile 40"}
    with Upstream(answer) as upstream, nginx(tmp_path, upstream.port, edits) as port:
        answers = ask_at_once(port, [buy()] * 30)
    assert {answer.status for answer in answers} == {200, 503}  # certainly not sold
    for refused in answers:
        assert refused.headers["content-type"] == "application/json"
        assert refused.json["success"] is (refused.status == 200)
