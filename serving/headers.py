"""What every answer carries, which headers a request may have, and who may ask for a reset."""

import re
import time
from collections.abc import Callable
from typing import Any

from flask import abort

# No answer may be stored (a 410 is cacheable: RFC 9110, 15.5.11) or taken for another type.
SECURITY_HEADERS = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
# nginx keeps such an answer for one second and strips the header. Before nginx 1.23 it has to come
# ahead of Cache-Control, or nginx overlooks it.
MAY_BE_CACHED = [("X-Accel-Expires", "1"), *SECURITY_HEADERS]
# What a proxy adds; nginx by itself adds nothing, but speaks HTTP/1.0.
PROXY_HEADERS = {"HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP", "HTTP_X_FORWARDED_FOR"}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# A key as it is, or as the IETF draft has it: a string in quotes (RFC 8941, 3.3.3).
IDEMPOTENCY_KEY = re.compile(r'[!#-~][!-~]{0,254}|"(?:[!#-\[\]-~]|\\["\\]){1,255}"')
NO_KEYS = ("undefined", "null")  # what a script sends that has forgotten its key


def with_security_headers(wsgi_app: Any, observe: Callable[[str, str, float], None]) -> Any:
    """Around Flask this is cheaper than after_request, and nothing gets past it.

    `observe` is told path, status and seconds of each answer.
    """

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        started = time.perf_counter()
        environ["PATH_INFO"] = environ.get("PATH_INFO") or "/"  # of http://host: RFC 9110, 4.2.3
        environ.pop("HTTP_UPGRADE", None)  # may be ignored (7.8); Werkzeug would refuse it

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            observe(environ["PATH_INFO"], status, time.perf_counter() - started)
            own = MAY_BE_CACHED if may_be_cached(status, environ) else SECURITY_HEADERS
            return start_response(status, headers + own, *error)

        return wsgi_app(environ, start)

    return serve


def may_be_cached(status: str, environ: dict[str, Any]) -> bool:
    """Only what everybody may be told: the stock, and SOLD OUT. A buyer with a key may own one."""
    if status.startswith("410"):
        return "HTTP_IDEMPOTENCY_KEY" not in environ
    return environ["PATH_INFO"] == "/inventory" and status.startswith("200")


def require_plain_request(environ: dict[str, Any]) -> None:
    """Refuse what would be overlooked, or was sent by a page of another site. Nothing is read yet.

    A browser tells by Sec-Fetch-Site (Fetch Metadata, 2.4) where a page is from, on plain HTTP
    only by Origin (RFC 6454, 7). What is no browser sends neither.
    """
    if environ["PATH_INFO"].startswith("//"):  # a proxy's rule for /reset would not see it
        abort(404)
    host = environ.get("HTTP_HOST")
    if host is None and environ["SERVER_PROTOCOL"] == "HTTP/1.1":
        abort(400, "HTTP/1.1 needs a Host (RFC 9112, 3.2) - send the header Host, or HTTP/1.0.")
    if environ["REQUEST_METHOD"] != "POST":
        return
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    if site is None:  # a browser on plain HTTP, or no browser
        is_foreign = origin is not None and origin.partition("://")[2] != host
    else:
        is_foreign = site not in ("same-origin", "none")
    if is_foreign:
        abort(
            403,
            "A page of another site sent this - send it from a page of this address. A proxy in"
            " front has to pass on the header Host.",
        )
    if query := environ["QUERY_STRING"]:
        abort(400, f"The query string {query[:40]!r} means nothing here - send a JSON body.")
    if "HTTP_X_IDEMPOTENCY_KEY" in environ:
        abort(400, "X-Idempotency-Key is not looked at - send the header Idempotency-Key.")


def idempotency_key_of(environ: dict[str, Any]) -> str | None:
    """`"k5"` and `k5` are one key."""
    key: str | None = environ.get("HTTP_IDEMPOTENCY_KEY")
    if key is None:
        return None
    fits = IDEMPOTENCY_KEY.fullmatch(key)
    if fits and key[0] == '"':
        key = re.sub(r"\\(.)", r"\1", key[1:-1])
    if not fits or key in NO_KEYS:
        abort(
            400,
            "Idempotency-Key has to be 1 to 255 visible ASCII characters without spaces, plain or"
            " as a string in quotes, and not the word undefined or null - send a new UUID.",
        )
    return key


def may_reset(allowed: str, environ: dict[str, Any]) -> bool:
    """With ALLOW_RESET=loopback only for who asks this machine by its own name, and no proxy.

    SERVER_NAME is the address that was really bound, wherever it was configured. The Host header
    keeps out a page whose name was pointed at this machine.
    """
    if allowed != "loopback":
        return allowed == "1"
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0" or not PROXY_HEADERS.isdisjoint(environ):
        return False
    if not environ.get("REMOTE_ADDR", "").startswith(("127.", "::1")):  # a Unix socket has none
        return False
    host = re.sub(r":\d*$", "", environ.get("HTTP_HOST", "")).lower().removesuffix(".")
    return environ["SERVER_NAME"] in LOOPBACK and host.strip("[]") in LOOPBACK
