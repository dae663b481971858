"""What every answer carries, and who may ask for a reset."""

from typing import Any

# No answer may be stored (a 410 is cacheable: RFC 9110, 15.5.11) or taken for another type.
SECURITY_HEADERS = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
# nginx keeps such an answer for one second and strips the header. Before nginx 1.23 it has to come
# ahead of Cache-Control, or nginx overlooks it.
MAY_BE_CACHED = [("X-Accel-Expires", "1"), *SECURITY_HEADERS]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def with_security_headers(wsgi_app: Any) -> Any:
    """Around Flask this is cheaper than after_request, and nothing gets past it."""

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        environ["PATH_INFO"] = environ.get("PATH_INFO") or "/"  # of http://host: RFC 9110, 4.2.3

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            own = MAY_BE_CACHED if may_be_cached(status, environ) else SECURITY_HEADERS
            return start_response(status, headers + own, *error)

        return wsgi_app(environ, start)

    return serve


def may_be_cached(status: str, environ: dict[str, Any]) -> bool:
    """Only what everybody may be told: the stock, and SOLD OUT. A buyer with a key may own one."""
    if status.startswith("410"):
        return "HTTP_IDEMPOTENCY_KEY" not in environ
    return environ["PATH_INFO"] == "/inventory" and status.startswith("200")


def may_reset(allowed: str, environ: dict[str, Any]) -> bool:
    """With ALLOW_RESET=loopback only for who asks this machine by its own name.

    SERVER_NAME is the address that was really bound, wherever it was configured. The Host header
    keeps out what came through a proxy, or from a page whose name was pointed at this machine.
    """
    if allowed != "loopback":
        return allowed == "1"
    host = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
    return environ["SERVER_NAME"] in LOOPBACK and host.strip("[]") in LOOPBACK
