"""What every answer carries, and who may ask for a reset."""

from typing import Any

# No answer may be stored (a 410 is cacheable: RFC 9110, 15.5.11) or taken for another type.
SECURITY_HEADERS = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def with_security_headers(wsgi_app: Any) -> Any:
    """Around Flask this is cheaper than after_request, and nothing gets past it."""

    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        environ["PATH_INFO"] = environ.get("PATH_INFO") or "/"  # of http://host: RFC 9110, 4.2.3

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, headers + SECURITY_HEADERS, *error)

        return wsgi_app(environ, start)

    return serve


def may_reset(allowed: str, environ: dict[str, Any]) -> bool:
    """With ALLOW_RESET=loopback only for who asks this machine by its own name.

    SERVER_NAME is the address that was really bound, wherever it was configured. The Host header
    keeps out what came through a proxy, or from a page whose name was pointed at this machine.
    """
    if allowed != "loopback":
        return allowed == "1"
    host = environ.get("HTTP_HOST", "").rpartition(":")[0] or environ.get("HTTP_HOST", "")
    return environ["SERVER_NAME"] in LOOPBACK and host.strip("[]") in LOOPBACK
