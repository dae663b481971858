"""GET /sale in a real browser: one click is one ticket, whatever happens in between."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from browser import PAGE_LIMIT_S, click, complaints, read, requested_hosts
from edge import nginx
from flask.testing import FlaskClient
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from service import Service, patched
from test_sqlite_store import write_lock

from sqlite.engine import sqlite3

WORKERS = "8"  # a browser opens connections in advance, and each waits for one
OPENS_IN_S = 3
# After the first sale is stored all processes die, before anybody is answered.
DIES_BEFORE_ITS_ANSWER = """
import os, db
real = db.SQLiteStore.buy
def buy(*arguments):
    real(*arguments)
    os.killpg(0, 9)
db.SQLiteStore.buy = buy
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sale")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Service]:
    with Service(folder, WEB_CONCURRENCY=WORKERS, LOCK_TIMEOUT="0.1") as service:
        yield service


@pytest.fixture
def service(running: Service) -> Service:
    running.reset(5)
    return running


def shown(browser: Chrome, selector: str, text: str) -> None:
    """Wait until the page says so."""

    def says(_: Chrome) -> bool:
        return text in browser.find_element(By.CSS_SELECTOR, selector).text

    last = f"{selector} never said {text!r}"
    WebDriverWait(browser, PAGE_LIMIT_S).until(says, last)


def purchases(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / "inventory.db")) as connection:
        return list(connection.execute("SELECT customer_id, idempotency_key FROM purchases"))


def counted(service: Service, sample: str) -> float:
    text = requests.get(f"{service.url}/metrics", timeout=10).text
    found = re.search(rf"^{re.escape(sample)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def remembers(browser: Chrome, name: str) -> Any:
    return browser.execute_script(f"return localStorage.getItem('flash-sale-{name}')")


def test_a_click_buys_one_ticket_and_the_console_stays_empty(
    browser: Chrome, service: Service, folder: Path
) -> None:
    browser.get(f"{service.url}/sale")
    shown(browser, "#item", "Item A - Concert Ticket")
    shown(browser, "#stock", "5")
    click(browser, "#buy")
    shown(browser, "#outcome", "You have ticket ")
    shown(browser, "#stock", "4")
    ((customer_id, key),) = purchases(folder)
    assert re.fullmatch("web-[0-9a-f]{32}", customer_id)
    assert re.fullmatch("[0-9a-f]{32}", key)
    assert remembers(browser, "pending") is None
    click(browser, "#buy")  # a new click is a new key
    shown(browser, "#stock", "3")
    assert len({key for _, key in purchases(folder)}) == 2
    assert complaints(browser) == []
    assert requested_hosts(browser) == {f"127.0.0.1:{service.port}"}


def test_the_sell_out_is_seen_and_then_nothing_more_is_asked(
    browser: Chrome, service: Service
) -> None:
    browser.get(f"{service.url}/sale")
    shown(browser, "#stock", "5")
    for _ in range(5):
        service.buy()
    shown(browser, "#state", "Sold out.")
    assert not browser.find_element(By.ID, "buy").is_enabled()
    label = browser.find_element(By.ID, "picture").get_attribute("aria-label")
    assert label == "The stock since this page was opened: from 5 to 0"
    stopped = WebDriverWait(browser, PAGE_LIMIT_S)
    stopped.until(lambda _: browser.execute_script("return watching") is False)
    assert complaints(browser) == []


def test_a_503_is_repeated_with_the_same_key_until_it_is_settled(
    browser: Chrome, service: Service, folder: Path
) -> None:
    browser.get(f"{service.url}/sale")
    with write_lock(folder / "inventory.db"):
        click(browser, "#buy")
        shown(browser, "#outcome", "Still trying")
        key = remembers(browser, "pending")
    shown(browser, "#outcome", "You have ticket ")
    assert [stored for _, stored in purchases(folder)] == [key]


def test_a_lost_answer_and_a_reload_are_one_ticket(browser: Chrome, tmp_path: Path) -> None:
    with Service(tmp_path, *patched(DIES_BEFORE_ITS_ANSWER), WEB_CONCURRENCY=WORKERS) as dying:
        browser.get(f"{dying.url}/sale")
        click(browser, "#buy")
        assert dying.process.wait(PAGE_LIMIT_S) == -signal.SIGKILL
        key = remembers(browser, "pending")
    assert [stored for _, stored in purchases(tmp_path)] == [key]
    with Service(tmp_path, PORT=str(dying.port), WEB_CONCURRENCY=WORKERS) as service:
        browser.refresh()
        shown(browser, "#outcome", "You have ticket 1.")
        shown(browser, "#stock", "99")
        assert remembers(browser, "pending") is None
        assert service.get("/audit")["purchase_records"] == 1


def test_at_0_only_what_is_unsettled_is_asked(browser: Chrome, service: Service) -> None:
    asked = 'flash_sale_request_duration_seconds_count{route="/buy_ticket",status="410"}'
    service.reset(1)
    browser.get(f"{service.url}/sale")
    click(browser, "#buy")
    shown(browser, "#outcome", "You have ticket ")
    ticket, before = read(browser, "#outcome"), counted(service, asked)
    ((_, key),) = purchases(service.log_file.parent)
    browser.refresh()
    shown(browser, "#state", "Sold out.")
    assert not browser.find_element(By.ID, "buy").is_enabled()
    assert (browser.find_element(By.ID, "outcome").text, counted(service, asked)) == ("", before)
    browser.execute_script(f"localStorage.setItem('flash-sale-pending', '{key}')")
    browser.refresh()
    shown(browser, "#outcome", ticket)
    assert counted(service, asked) == before


def test_it_counts_down_and_sells_from_the_opening_on(browser: Chrome, tmp_path: Path) -> None:
    opens_at = (datetime.now(UTC) + timedelta(seconds=OPENS_IN_S)).isoformat()
    with Service(tmp_path, WEB_CONCURRENCY=WORKERS, SALE_STARTS_AT=opens_at) as service:
        browser.get(f"{service.url}/sale")
        shown(browser, "#state", "Opens in 00:0")
        assert not browser.find_element(By.ID, "buy").is_enabled()
        click(browser, "#buy")  # as soon as it can be
        shown(browser, "#outcome", "You have ticket 1.")
        assert datetime.now(UTC).isoformat() > opens_at
        browser.get("about:blank")


def test_it_sells_below_another_path_and_so_does_the_page_of_docs(
    browser: Chrome, tmp_path: Path
) -> None:
    with Service(tmp_path, WEB_CONCURRENCY=WORKERS, SCRIPT_NAME="/shop") as service:
        browser.get(f"{service.url}/shop/sale")
        click(browser, "#buy")
        shown(browser, "#outcome", "You have ticket 1.")
        browser.get(f"{service.url}/shop/docs")
        click(browser, "#operations-sale-buyTicket .opblock-summary-control")
        click(browser, "#operations-sale-buyTicket .try-out__btn")
        click(browser, "#operations-sale-buyTicket .execute")
        shown(browser, ".live-responses-table .response", "Purchase successful")
        assert requests.get(f"{service.url}/shop/audit", timeout=9).json()["purchase_records"] == 2
        assert complaints(browser) == []
        browser.get("about:blank")


def test_it_passes_through_nginx_on_a_port_of_its_own(
    browser: Chrome, service: Service, tmp_path: Path
) -> None:
    """On plain HTTP, away from loopback, a browser tells its origin but not the site's relation."""
    with nginx(tmp_path, service.port) as port:
        browser.get(f"http://shop.test:{port}/sale")
        click(browser, "#buy")
        shown(browser, "#outcome", "You have ticket ")
        browser.get("about:blank")
    assert service.get("/audit")["purchase_records"] == 1
    assert complaints(browser) == []


@pytest.mark.parametrize("path", ["/sale", "/docs"])
def test_a_page_lets_in_nothing_but_its_own(client: FlaskClient, path: str) -> None:
    answer = client.get(path, headers={"Host": 'evil.test"</script>'})
    assert (answer.status_code, answer.content_type) == (200, "text/html; charset=utf-8")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for directive in ("script-src", "style-src"):
        assert re.fullmatch(r"('self'|'sha256-[\w+/=]+')( 'sha256-[\w+/=]+')?", policy[directive])
    assert "evil" not in answer.text
    assert "://" not in answer.text
    assert '<link rel="icon" href="data:,">' in answer.text  # or the browser asks for /favicon.ico


def test_the_start_page_stays_json_for_browsers_and_names_the_page(client: FlaskClient) -> None:
    answer = client.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert answer.content_type == "application/json"
    assert "GET /sale" in json.loads(answer.text)["endpoints"]
