"""The service's variables: defaults, and which values make sense. See .env.example."""

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from dotenv.parser import parse_stream

ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
MAX_STOCK = 1_000_000_000
# A customer's or an item's name.
NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}")
TEXTS = {
    "DATABASE_URL": "sqlite:///inventory.db",
    "ITEM_NAME": "Item A - Concert Ticket",
    "HOST": "127.0.0.1",
}
CHOICES = {"ALLOW_RESET": ("0", "1", "loopback")}  # the first is the default
WORKERS_PER_CORE, WORKERS_MAX = 2, 16  # measured: benchmarks/README.md
NUMBERS: dict[str, tuple[type, Any, float, float]] = {  # default, lowest, highest
    "INITIAL_STOCK": (int, 100, 0, MAX_STOCK),
    "LOCK_TIMEOUT": (float, 5.0, 0, 3600),
    "PORT": (int, 8000, 1, 65535),
    "METRICS_PORT": (int, None, 1, 65535),
    "WEB_CONCURRENCY": (int, min(WORKERS_PER_CORE * (os.cpu_count() or 1), WORKERS_MAX), 1, 256),
    "DB_POOL_SIZE": (int, 4, 1, 100),
    "DB_POOL_TIMEOUT": (float, None, 0, 3600),  # None: LOCK_TIMEOUT
}
VARIABLES = (*TEXTS, *CHOICES, *NUMBERS, "SALE_STARTS_AT")
LIKENESS_MIN = 0.85  # of a misspelt name; TEST_DATABASE_URL and HOSTNAME are others


class ConfigError(ValueError):
    """A variable has a value that makes no sense."""


def read_config(**overrides: Any) -> dict[str, Any]:
    """`overrides`, else the environment, else .env, else the defaults. Raises ConfigError.

    Blanks and line ends around a value don't count, and an empty value counts as unset.
    """
    values = {**env_file(), **os.environ, **overrides}
    given = {name: _cleaned(name, values[name]) for name in VARIABLES if name in values}
    given = {name: text for name, text in given.items() if text}
    config: dict[str, Any] = {name: given.get(name, default) for name, default in TEXTS.items()}
    config |= {name: _choice(name, given.get(name), choices) for name, choices in CHOICES.items()}
    config |= {name: _number(name, given.get(name), *limits) for name, limits in NUMBERS.items()}
    config["SALE_STARTS_AT"] = _moment("SALE_STARTS_AT", given.get("SALE_STARTS_AT"))
    if not NAME.fullmatch(config["ITEM_NAME"]):
        raise ConfigError("ITEM_NAME has to be 1 to 128 characters long")
    config["HOST"] = config["HOST"].strip("[]")  # of an IPv6 address, as in a URL
    if config["METRICS_PORT"] == config["PORT"]:
        raise ConfigError(f"METRICS_PORT has to be another one than PORT, {config['PORT']}")
    if config["DB_POOL_TIMEOUT"] is None:
        config["DB_POOL_TIMEOUT"] = config["LOCK_TIMEOUT"]
    return config


def env_file() -> dict[str, str | None]:
    """What .env says now. It is read anew by each start, reload and upgrade."""
    try:
        text = ENV_FILE.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f".env can't be read: {error}") from error
    wrong = next((line for line in parse_stream(io.StringIO(text)) if line.error), None)
    if wrong is not None:
        raise ConfigError(f".env, line {wrong.original.line}: write NAME=value")
    return dotenv_values(stream=io.StringIO(text))


def unknown_variables() -> Iterator[str]:
    """A line about each variable that means nothing here.

    In .env these are all others, in the environment only those that are nearly called like one.
    """
    in_file = env_file()
    for name in sorted({*os.environ, *in_file} - {*VARIABLES}):
        likely = difflib.get_close_matches(name.upper(), VARIABLES, 1, LIKENESS_MIN)
        if likely:
            yield f"The variable {name} means nothing here - is it {likely[0]}?"
        elif name in in_file:
            yield f"The variable {name} in .env means nothing here"


def sqlite_file(url: str) -> Path:
    """The absolute path that a sqlite URL names: a relative one starts where the service does."""
    scheme, _, path = url.partition(":///")
    if scheme != "sqlite" or path in ("", ":memory:"):
        raise ConfigError(
            "DATABASE_URL has to be sqlite:///relative/path, sqlite:////absolute/path"
            " or postgresql://user:password@host/database"
        )
    if odd := re.search("[?#%]", path):
        plain = path[: odd.start()]
        raise ConfigError(
            "DATABASE_URL may have no ?, # or % after sqlite:///, as no options follow the file"
            f" and nothing in its name is escaped - write sqlite:///{plain}"
        )
    try:
        return Path(path).resolve()  # SQLite puts the WAL where a link leads
    except RuntimeError as error:  # links that lead to each other, before Python 3.13
        raise ConfigError(f"DATABASE_URL: {error}") from error


def address(config: Mapping[str, Any]) -> str:
    host, port = config["HOST"], config["PORT"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cleaned(name: str, value: Any) -> str:
    text = "" if value is None else str(value).strip()
    if re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text):
        raise ConfigError(f"{name} has to be text in UTF-8 in one line, not {text!a}")
    return text


def _choice(name: str, text: str | None, choices: tuple[str, ...]) -> str:
    if text is None:
        return choices[0]
    if text not in choices:
        raise ConfigError(f"{name} has to be one of {', '.join(choices)}, not {text!r}")
    return text


def _number(
    name: str, text: str | None, kind: type, default: Any, lowest: float, highest: float
) -> Any:
    if text is None:
        return default
    try:
        number = kind(text) if text.isascii() and "_" not in text else None
        if number is not None and lowest <= number <= highest:
            return number
    except ValueError:
        pass
    kind_name = "a whole number" if kind is int else "a number"
    raise ConfigError(f"{name} has to be {kind_name} from {lowest} to {highest}, not {text!r}")


def _moment(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment
    except ValueError:
        pass
    example = "2026-12-01T20:00:00+01:00"
    raise ConfigError(f"{name} has to be a time with its zone like {example}, not {text!r}")
