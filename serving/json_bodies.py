"""JSON as it comes and goes: bodies that are whole and bounded, as RFC 8259 has them."""

import io
import json
import re
from typing import Any, NoReturn

from flask import Request, Response, abort

from serving.config import MAX_STOCK, NAME

MAX_BODY_BYTES = 16 * 1024
MAX_BRACKETS = 100  # Python's own limit of nesting differs by version, and can end the stack
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?'), re.compile(r"[\[{]")
JSON_TYPE = "application/json"
EXAMPLES = {"customer_id": '{"customer_id": "c1"}', "stock": '{"stock": 100}'}


def customer_id_of(request: Request) -> str:
    customer_id = member_of(request, "customer_id", "guest")
    if not isinstance(customer_id, str) or not NAME.fullmatch(customer_id):
        abort(
            400,
            "customer_id has to be a string of 1 to 128 characters, no control characters, no lone"
            " surrogates.",
        )
    return customer_id


def stock_of(request: Request, default: int) -> int:
    stock = member_of(request, "stock", default)
    if isinstance(stock, float) and stock.is_integer():  # 7.0 is an integer to JSON Schema
        stock = int(stock)
    if type(stock) is not int or not 0 <= stock <= MAX_STOCK:
        abort(
            400,
            f"stock has to be a whole number, 0 to {MAX_STOCK}"
            ' - send {"stock": 100}, or no body for the configured stock.',
        )
    return stock


def member_of(request: Request, name: str, default: Any) -> Any:
    """What the request's body says of `name`, the one member it may have. Refusals are 4xx."""
    body, example = read_body(request), EXAMPLES[name]
    if not body:
        return default
    if request.environ.get("CONTENT_TYPE") != JSON_TYPE and request.mimetype != JSON_TYPE:
        abort(415, "The body has to be JSON - send the header Content-Type: application/json.")
    try:
        value = decode(body)
    except ValueError:
        abort(400, f"The body is not valid JSON in UTF-8 - send for example {example}.")
    if not isinstance(value, dict):
        abort(400, f"The body has to be a JSON object - send for example {example}.")
    unknown = next((member for member in value if member != name), None)
    if unknown is not None:
        also = " and the header Idempotency-Key" if name == "customer_id" else ""
        abort(400, f"The member {unknown[:40]!r} means nothing here - send only {example}{also}.")
    return value.get(name, default)


def read_body(request: Request) -> bytes:
    """The whole body, from WSGI's environment: Werkzeug's way costs as much as three SELECTs."""
    if "HTTP_TRANSFER_ENCODING" in request.environ:
        abort(411, "A chunked body is not accepted - send the body with a Content-Length.")
    try:
        announced = int(request.environ.get("CONTENT_LENGTH") or 0)  # bytes
    except ValueError:
        announced = -1
    if announced < 0:
        abort(400, "Content-Length has to be a whole number of bytes.")
    if announced > MAX_BODY_BYTES:
        abort(413, f"The body is too large - send at most {MAX_BODY_BYTES} bytes.")
    if not announced:
        return b""
    try:
        body: bytes = request.environ["wsgi.input"].read(announced)
    except OSError:  # the client is gone
        body = b""
    request.environ["wsgi.input"] = io.BytesIO()  # nobody waits for what has been read
    if len(body) < announced:  # gunicorn hands on whatever came (RFC 9112, 8)
        abort(400, "The body ended before its Content-Length - send all of it.")
    return body


def decode(body: bytes) -> Any:
    """Raises ValueError for what isn't JSON, a number of 5,000 digits, or too many brackets."""
    text = body.decode()
    brackets = text.count("{") + text.count("[")
    if brackets > MAX_BRACKETS and len(BRACKET.findall(STRING.sub("", text))) > MAX_BRACKETS:
        raise ValueError("too many brackets, outside strings")
    return DECODER.decode(text)


def unreadable(message: str) -> bytes:
    """The body for a request that the server itself couldn't parse, and never handed to the app."""
    text = f"{message} - send a valid HTTP/1.1 request"
    return encode({"success": False, "message": text}).encode()


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
encode = json.JSONEncoder(separators=(",", ":")).encode


def json_response(
    body: dict[str, Any], status: int, headers: dict[str, str] | None = None
) -> Response:
    """As Flask answers with a dict, for less."""
    return Response(encode(body) + "\n", status, headers, content_type=JSON_TYPE)
