"""A real browser: headless Chromium, driven by selenium."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    StaleElementReferenceException,
)
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as expected
from selenium.webdriver.support.ui import WebDriverWait
from service import need

PAGE_LIMIT_S = 30.0
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP shop.test 127.0.0.1",  # a name that isn't this machine's own
    "--window-size=1200,1600",
]
REBUILT = [StaleElementReferenceException, ElementClickInterceptedException]


@contextmanager
def chromium(folder: Path) -> Iterator[Chrome]:
    """One with a profile of its own in `folder`."""
    need(BROWSER and DRIVER, "chromium and chromedriver are not installed")
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS, f"--user-data-dir={folder / 'profile'}"]:
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
