"""GET /docs in a real browser sells a ticket by "Try it out", and asks no other host."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask.testing import FlaskClient
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import WebDriverWait
from service import Service

PAGE_LIMIT_S = 30.0
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NO_BROWSER = not (BROWSER and DRIVER)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1600",
]
BUY = "#operations-sale-buyTicket"
REBUILT = [StaleElementReferenceException, ElementClickInterceptedException]
ANSWER = f"{BUY} .live-responses-table .response"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(
        tmp_path_factory.mktemp("docs"), WEB_CONCURRENCY="8", INITIAL_STOCK="5"
    ) as running:
        yield running


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    if NO_BROWSER and os.environ.get("CI") != "true":
        pytest.skip("chromium and chromedriver are not installed")
    assert not NO_BROWSER, "CI has to install chromium and chromedriver"
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options, ChromeService(str(DRIVER)))
    try:
        yield chrome
    finally:
        chrome.quit()


def find(browser: Chrome, selector: str) -> WebElement:
    """The element, once it can be clicked."""
    locator = (By.CSS_SELECTOR, selector)
    return WebDriverWait(browser, PAGE_LIMIT_S).until(expected.element_to_be_clickable(locator))


def click(browser: Chrome, selector: str) -> None:
    """Click it, again if the page was rebuilt in that moment."""

    def try_to(_: Chrome) -> bool:
        element = find(browser, selector)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        return True

    WebDriverWait(browser, PAGE_LIMIT_S, ignored_exceptions=REBUILT).until(try_to)


def read(browser: Chrome, selector: str) -> str:
    """The element's text, once it is there."""
    locator = (By.CSS_SELECTOR, selector)
    return (
        WebDriverWait(browser, PAGE_LIMIT_S)
        .until(expected.visibility_of_element_located(locator))
        .text
    )


def shown_paths(browser: Chrome) -> set[str]:
    elements = browser.find_elements(By.CLASS_NAME, "opblock-summary-path")
    return {element.text.replace("\u200b", "") for element in elements}


def requested_hosts(browser: Chrome) -> set[str]:
    """Hosts of all requests that left the browser since it started."""
    log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]  # type: ignore[no-untyped-call]
    sent = [
        entry["params"]["request"]["url"]
        for entry in log
        if entry["method"] == "Network.requestWillBeSent"
    ]
    return {urlsplit(url).netloc for url in sent if urlsplit(url).scheme not in ("data", "chrome")}


def complaints(browser: Chrome) -> list[Any]:
    log: list[Any] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry for entry in log if entry["level"] in ("WARNING", "SEVERE")]


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


def test_the_page_names_no_other_host_not_even_the_one_it_was_asked_for(
    client: FlaskClient,
) -> None:
    page = client.get("/docs", headers={"Host": 'evil.test"</script>'})
    assert (page.status_code, page.content_type) == (200, "text/html; charset=utf-8")
    assert "evil" not in page.text
    assert "://" not in page.text


@pytest.mark.parametrize(
    "name", ["index.css", "swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png"]
)
def test_the_page_is_made_of_files_of_this_service(client: FlaskClient, name: str) -> None:
    assert f'"/docs/{name}"' in client.get("/docs").text
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
    ],
)
def test_no_other_file_can_be_had_below_docs(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (404, "application/json")
