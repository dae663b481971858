"""JSON as it comes and goes: bodies that are whole and bounded, as RFC 8259 has them."""

import json
import re
from itertools import accumulate
from typing import Any, NoReturn

from flask import Request, abort

MAX_BODY_BYTES = 16 * 1024
MAX_NESTING = 100  # Python's own limit differs by version, and in some it is the end of the stack
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?'), re.compile(r"[][{}]")


def json_object_of(request: Request) -> dict[str, Any]:
    """The request's body, {} if there is none. Anything else is answered with 4xx."""
    body = read_body(request)
    if not body:
        return {}
    json_type = "application/json"
    if request.environ.get("CONTENT_TYPE") != json_type and request.mimetype != json_type:
        abort(415, "The body has to be JSON - send the header Content-Type: application/json.")
    try:
        value = decode(body)
    except ValueError:
        abort(400, 'The body is not valid JSON in UTF-8 - send for example {"customer_id": "c1"}.')
    if not isinstance(value, dict):
        abort(400, 'The body has to be a JSON object - send for example {"customer_id": "c1"}.')
    return value


def read_body(request: Request) -> bytes:
    """All of it. The environment is asked, as Werkzeug's properties cost more than a SELECT."""
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
    try:
        body = request.get_data()
    except OSError:  # the client is gone
        body = b""
    if len(body) < announced:  # gunicorn hands on whatever came (RFC 9112, 8)
        abort(400, "The body ended before its Content-Length - send all of it.")
    return body


def decode(body: bytes) -> Any:
    """Raises ValueError for what isn't JSON, a number of 5,000 digits, or too deep nesting."""
    text = body.decode()
    if text.count("{") + text.count("[") > MAX_NESTING:  # brackets within strings don't nest
        steps = (1 if bracket in "{[" else -1 for bracket in BRACKET.findall(STRING.sub("", text)))
        if max(accumulate(steps), default=0) > MAX_NESTING:
            raise ValueError("nested too deep")
    return DECODER.decode(text)


def unreadable(message: str) -> bytes:
    """The body for a request that the server itself couldn't parse, and never handed to the app."""
    text = f"{message} - send a valid HTTP/1.1 request"
    return encode({"success": False, "message": text}).encode()


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)
encode = json.JSONEncoder(separators=(",", ":")).encode
