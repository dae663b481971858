"""Clients as they are really used: each habit that follows the contract buys exactly once.

Bodies with a byte order mark or in UTF-16 are in test_bad_input.py.
"""

import asyncio
import http.client
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
from requests.adapters import HTTPAdapter
from service import Service, need, run_to_end, wait_until
from test_sqlite_store import write_lock
from urllib3.util.retry import Retry

BODY = {"customer_id": "alice"}
JSON = {"Content-Type": "application/json"}
LIMIT_S = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Service]:
    with Service(folder, WEB_CONCURRENCY="2", LOCK_TIMEOUT="0.1") as service:
        yield service


@pytest.fixture
def service(running: Service) -> Service:
    running.reset(5)
    return running


def records(service: Service) -> int:
    return int(service.get("/audit")["purchase_records"])


def buy_with_requests(url: str, key: str) -> int:
    headers = {"Idempotency-Key": key}
    return requests.post(url, json=BODY, headers=headers, timeout=LIMIT_S).status_code


def buy_with_httpx(url: str, key: str) -> int:
    headers = {"Idempotency-Key": key}
    return httpx.post(url, json=BODY, headers=headers, timeout=LIMIT_S).status_code


def buy_with_aiohttp(url: str, key: str) -> int:
    async def buy() -> int:
        headers = {"Idempotency-Key": key}
        async with (
            aiohttp.ClientSession() as client,
            client.post(url, json=BODY, headers=headers) as answer,
        ):
            return answer.status

    return asyncio.run(buy())


def buy_with_curl(url: str, key: str, *options: str) -> int:
    need(shutil.which("curl"), "curl is not installed (apt-get install curl)")
    headers = ["-H", "Content-Type: application/json", "-H", f"Idempotency-Key: {key}"]
    status_only = ["-sS", "-w", "%{http_code}", "-o", os.devnull, "-d", json.dumps(BODY)]
    done = run_to_end(["curl", *status_only, *headers, *options, url])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


HABITS: dict[str, Callable[..., int]] = {
    "requests": buy_with_requests,
    "httpx": buy_with_httpx,
    "aiohttp": buy_with_aiohttp,
    "curl": buy_with_curl,
    "HTTP/1.0": lambda url, key: buy_with_curl(url, key, "--http1.0"),
    "Expect": lambda url, key: buy_with_curl(url, key, "-H", "Expect: 100-continue"),
}


@pytest.mark.parametrize("buy", HABITS.values(), ids=HABITS)
def test_every_client_buys_once_however_it_writes_its_key(
    service: Service, buy: Callable[[str, str], int]
) -> None:
    url = f"{service.url}/buy_ticket"
    assert [buy(url, '"order-1"'), buy(url, "order-1")] == [200, 200]
    assert records(service) == 1


def buy_on(connection: http.client.HTTPConnection) -> int:
    headers = JSON | {"Connection": "keep-alive"}
    connection.request("POST", "/buy_ticket", json.dumps(BODY), headers)
    with connection.getresponse() as answer:
        answer.read()
    return answer.status


def test_a_client_that_keeps_its_connection_is_served_each_time(service: Service) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", service.port, LIMIT_S)) as connection:
        assert [buy_on(connection) for _ in range(3)] == [200, 200, 200]
    with requests.Session() as session:
        url = f"{service.url}/buy_ticket"
        answers = [session.post(url, json=BODY, timeout=LIMIT_S) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 410]
    assert records(service) == 5


def test_urllib3_retries_a_503_after_the_seconds_it_is_told(service: Service, folder: Path) -> None:
    retry = Retry(3, allowed_methods={"POST"}, status_forcelist=[503])
    answers: list[requests.Response] = []
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=retry))
        buy = partial(session.post, f"{service.url}/buy_ticket", json=BODY, timeout=LIMIT_S)
        headers = {"Idempotency-Key": "retried"}
        buyer = threading.Thread(target=lambda: answers.append(buy(headers=headers)))
        with write_lock(folder / "inventory.db"):
            buyer.start()
            wait_until(lambda: "Busy" in service.log, LIMIT_S, "nobody was refused")
        buyer.join()
    (answer,) = answers
    assert answer.status_code == 200
    assert [attempt.status for attempt in answer.raw.retries.history] == [503]  # type: ignore[union-attr]
    assert records(service) == 1


GENERATED_CLIENT_BUYS = """
import sys
from shop import Client
from shop.api.sale import buy_ticket
from shop.models import PurchaseRequest
client = Client(sys.argv[1])
for name in ("alice", "bob"):
    body = PurchaseRequest(customer_id=name)
    answer = buy_ticket.sync_detailed(client=client, body=body, idempotency_key="generated")
    print(int(answer.status_code), type(answer.parsed).__name__, answer.parsed.message)
"""


def test_a_client_generated_from_the_description_buys(service: Service, tmp_path: Path) -> None:
    description = tmp_path / "openapi.json"
    description.write_text(requests.get(f"{service.url}/openapi.json", timeout=LIMIT_S).text)
    programs = Path(sys.executable).parent  # it runs ruff
    generate = [str(programs / "openapi-python-client"), "generate", "--meta=none"]
    generate += [f"--path={description}", f"--output-path={tmp_path / 'shop'}", "--fail-on-warning"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = run_to_end(generate, cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_to_end([sys.executable, "-c", GENERATED_CLIENT_BUYS, service.url], cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "200 Purchase Purchase successful",
        "422 Refusal This Idempotency-Key belongs to another customer's purchase - send a new key",
    ]
    assert records(service) == 1


def test_one_per_customer_is_a_key_that_the_shop_sets_to_the_customer(service: Service) -> None:
    """The shop's own server knows who has signed in; the service needs no rule of its own."""

    def buy(customer_id: str) -> requests.Response:
        return service.buy(customer_id, f"customer-{customer_id}")

    with ThreadPoolExecutor(8) as crowd:
        answers = list(crowd.map(buy, ["alice"] * 8))
    assert {answer.status_code for answer in answers} <= {200, 503}
    tickets = {answer.json()["purchase_id"] for answer in answers if answer.status_code == 200}
    assert len(tickets) == 1
    assert buy("bob").json()["purchase_id"] not in tickets
    for name in ("carol", "dan", "eve"):
        assert buy(name).status_code == 200
    assert (buy("frank").status_code, buy("alice").json()["purchase_id"]) == (410, *tickets)
    assert records(service) == 5
