"""What every answer carries, around Flask: cheaper than after_request, and nothing gets past it."""

from typing import Any

# No answer may be stored (a 410 is cacheable by default: RFC 9110, 15.5.11) or taken for another type.
SECURITY_HEADERS = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]


def with_security_headers(wsgi_app: Any) -> Any:
    def serve(environ: dict[str, Any], start_response: Any) -> Any:
        environ["PATH_INFO"] = environ.get("PATH_INFO") or "/"  # of http://host: RFC 9110, 4.2.3

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, headers + SECURITY_HEADERS, *error)

        return wsgi_app(environ, start)

    return serve
