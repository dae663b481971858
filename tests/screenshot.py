"""Draws serving/sale.png, the picture in the README: `python tests/screenshot.py [folder]`.

With a folder, pictures in light, in dark, on a phone and of each outcome are drawn there instead.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

from browser import PAGE_LIMIT_S, chromium, click, find
from selenium.webdriver import Chrome
from selenium.webdriver.support.ui import WebDriverWait
from service import PROJECT, Service

PICTURE = PROJECT / "serving" / "sale.png"
SECONDS, STOCK = 8, 500
SIZES = {"light": (760, 480, "light"), "dark": (760, 480, "dark"), "phone": (390, 760, "light")}


def sell(service: Service, units: int, seconds: float) -> None:
    for _ in range(units):
        service.buy("somebody")
        time.sleep(seconds / units)


def look(browser: Chrome, width: int, height: int, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def draw(folder: Path, name: str) -> None:
    with (
        tempfile.TemporaryDirectory() as work,
        Service(Path(work), INITIAL_STOCK=str(STOCK), WEB_CONCURRENCY="8") as service,
        chromium(Path(work)) as browser,
    ):
        look(browser, *SIZES["light"])
        browser.get(f"{service.url}/sale")
        crowd = threading.Thread(target=sell, args=[service, STOCK * 3 // 4, SECONDS])
        crowd.start()
        crowd.join()
        click(browser, "#buy")
        bought = WebDriverWait(browser, PAGE_LIMIT_S)
        bought.until(lambda _: "ticket" in find(browser, "#outcome").text)
        browser.save_screenshot(str(folder / name))
        if folder == PICTURE.parent:
            return
        for size in ("dark", "phone"):
            look(browser, *SIZES[size])
            browser.save_screenshot(str(folder / f"{size}.png"))
        sell(service, STOCK // 4, 2)
        look(browser, *SIZES["dark"])
        bought.until(lambda _: find(browser, "#state").text == "Sold out.")
        browser.save_screenshot(str(folder / "sold-out.png"))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    draw(given[0] if given else PICTURE.parent, "light.png" if given else PICTURE.name)
