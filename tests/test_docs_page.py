"""GET /docs in a real browser sells a ticket by "Try it out", and asks no other host."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PAGE_LIMIT_S, REBUILT, click, complaints, read, requested_hosts
from flask.testing import FlaskClient
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from service import Service

BUY = "#operations-sale-buyTicket"
ANSWER = f"{BUY} .live-responses-table .response"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(
        tmp_path_factory.mktemp("docs"), WEB_CONCURRENCY="8", INITIAL_STOCK="5"
    ) as running:
        yield running


def shown_paths(browser: Chrome) -> set[str]:
    elements = browser.find_elements(By.CLASS_NAME, "opblock-summary-path")
    return {element.text.replace("\u200b", "") for element in elements}


def try_out(browser: Chrome, service: Service) -> int:
    """Expand POST /buy_ticket, try it out, execute: the status that the page shows."""
    browser.get(f"{service.url}/docs")
    click(browser, f"{BUY} .opblock-summary-control")
    click(browser, f"{BUY} .try-out__btn")
    click(browser, f"{BUY} .execute")
    return int(read(browser, f"{ANSWER} .response-col_status").split()[0])


def test_a_ticket_can_be_bought_on_the_page(
    browser: Chrome, service: Service, tmp_path: Path
) -> None:
    service.reset(5)
    assert try_out(browser, service) == 200
    browser.save_screenshot(str(tmp_path / "bought.png"))
    assert "Purchase successful" in read(browser, f"{ANSWER} .response-col_description")
    assert service.get("/audit")["purchase_records"] == 1
    assert complaints(browser) == []
    assert requested_hosts(browser) == {f"127.0.0.1:{service.port}"}


def test_the_page_shows_every_operation(browser: Chrome, service: Service) -> None:
    browser.get(f"{service.url}/docs")
    wanted = set(service.get("/openapi.json")["paths"])
    wait = WebDriverWait(browser, PAGE_LIMIT_S, ignored_exceptions=REBUILT)
    assert wait.until(lambda _: shown_paths(browser) == wanted)
    assert complaints(browser) == []


def test_the_page_shows_a_sold_out_sale_as_410(browser: Chrome, service: Service) -> None:
    service.reset(0)
    assert try_out(browser, service) == 410
    assert "SOLD OUT" in read(browser, f"{ANSWER} .response-col_description")


@pytest.mark.parametrize("name", ["swagger-ui.css", "swagger-ui-bundle.js"])
def test_the_page_is_made_of_files_of_this_service(client: FlaskClient, name: str) -> None:
    assert f'"docs/{name}"' in client.get("/docs").text
    with client.get(f"/docs/{name}") as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/docs/../app.py",
        "/docs/%2e%2e/%2e%2e/app.py",
        "/docs//etc/passwd",
        "/docs/..%5capp.py",
        "/docs/%00",
        "/docs/index.html",
        "/docs/swagger-ui.js",
    ],
)
def test_no_other_file_can_be_had_below_docs(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/json")
