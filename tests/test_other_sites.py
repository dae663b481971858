"""A page of another site, in a real browser: its form neither resets the sale nor buys from it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import PAGE_LIMIT_S
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from service import Service

PAGE = '<form method="post" action="%s"><button>Win a prize</button></form>'


class OtherSite(BaseHTTPRequestHandler):
    """Every path is a page with a form that is sent to what the query names."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write((PAGE % self.path.partition("?")[2]).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def other_site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherSite) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("shop"), WEB_CONCURRENCY="8") as running:
        yield running


@pytest.mark.parametrize("site", ["same", "cross"])
def test_the_form_of_another_site_changes_nothing(
    browser: Chrome, service: Service, other_site: str, site: str
) -> None:
    """By its port alone it is another origin of the same site; by its name another site."""
    service.reset(5)
    service.buy("alice")
    page = other_site if site == "same" else other_site.replace("127.0.0.1", "localhost")
    for path in ("/reset", "/buy_ticket"):
        browser.get(f"{page}/?{service.url}{path}")
        browser.find_element(By.TAG_NAME, "button").click()
        refused = WebDriverWait(browser, PAGE_LIMIT_S)
        refused.until(lambda _: "another site" in browser.page_source)
    assert service.get("/audit")["purchase_records"] == 1
