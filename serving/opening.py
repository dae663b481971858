"""SALE_STARTS_AT: nothing is sold before. The clock is that of the app's host, asked each time."""

import math
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from flask import Request, Response

from serving.json_bodies import json_response

View = Callable[[Any, Request], Any]


def buy_from(opens_at: datetime, sell: View, replay: View) -> View:
    """Until then a purchase gets what `replay` knows of its key, or 403."""

    def buy_or_wait(store: Any, request: Request) -> Any:
        left_s = opens_at.timestamp() - time.time()
        if left_s <= 0:
            return sell(store, request)
        return replay(store, request) or not_open(opens_at, left_s)

    return buy_or_wait


def not_open(opens_at: datetime, left_s: float) -> Response:
    message = f"The sale opens at {opens_at.isoformat()}, nothing was sold - come back then."
    retry_after = str(math.ceil(left_s))
    return json_response({"success": False, "message": message}, 403, {"Retry-After": retry_after})


def inventory_until(opens_at: datetime) -> View:
    """The inventory, with the opening."""

    def inventory_and_opening(store: Any, request: Request) -> Any:
        is_open = time.time() >= opens_at.timestamp()
        told = store.inventory()._asdict()
        return json_response({**told, "opens_at": opens_at.isoformat(), "open": is_open}, 200)

    return inventory_and_opening
