"""JSON as RFC 8259 has it: UTF-8, no NaN, and nesting that is bounded in every Python version."""

import json
import re
from itertools import accumulate
from typing import Any, NoReturn

MAX_NESTING = 100  # Python's own limit differs by version, and in some it is the end of the stack
STRING, BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?'), re.compile(r"[][{}]")


def decode(body: bytes) -> Any:
    """The value. Raises ValueError for what is no JSON, a 5,000-digit number, or nested too deep."""
    text = body.decode()
    if text.count("{") + text.count("[") > MAX_NESTING:  # brackets within strings don't nest
        steps = (1 if bracket in "{[" else -1 for bracket in BRACKET.findall(STRING.sub("", text)))
        if max(accumulate(steps), default=0) > MAX_NESTING:
            raise ValueError("nested too deep")
    return DECODER.decode(text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
encode = json.JSONEncoder(separators=(",", ":")).encode
