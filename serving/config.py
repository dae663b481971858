"""The service's variables: defaults, and which values make sense. See .env.example."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import load_dotenv

ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
MAX_STOCK = 1_000_000_000
TEXTS = {
    "DATABASE_URL": "sqlite:///inventory.db",
    "ITEM_NAME": "Item A - Concert Ticket",
    "HOST": "127.0.0.1",
}
CHOICES = {"ALLOW_RESET": ("0", "1", "loopback")}  # the first is the default
NUMBERS = {  # default, lowest, highest; None: see the text of .env.example
    "INITIAL_STOCK": (100, 0, MAX_STOCK),
    "LOCK_TIMEOUT": (5.0, 0, 3600),
    "PORT": (8000, 1, 65535),
    "WEB_CONCURRENCY": (min(max(2, os.cpu_count() or 1), 8), 1, 256),
    "DB_POOL_SIZE": (4, 1, 100),
    "DB_POOL_TIMEOUT": (None, 0, 3600),
}


class ConfigError(ValueError):
    """A variable has a value that makes no sense."""


def read_config(**overrides: Any) -> dict[str, Any]:
    """`overrides`, else the environment, else .env, else the defaults. Raises ConfigError.

    An empty value counts as unset.
    """
    try:
        load_dotenv(ENV_FILE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f".env can't be read: {error}") from error
    values = {**os.environ, **overrides}
    given = {name: value for name, value in values.items() if value not in (None, "")}
    config = {name: _text(name, given.get(name, default)) for name, default in TEXTS.items()}
    config |= {name: _choice(name, given.get(name), values) for name, values in CHOICES.items()}
    config |= {name: _number(name, given.get(name), *limits) for name, limits in NUMBERS.items()}
    if config["DB_POOL_TIMEOUT"] is None:
        config["DB_POOL_TIMEOUT"] = config["LOCK_TIMEOUT"]
    return config


def address(config: Mapping[str, Any]) -> str:
    host, port = config["HOST"], config["PORT"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(name: str, value: Any) -> str:
    if re.search("[\ud800-\udfff]", str(value)):
        raise ConfigError(f"{name} has to be text in UTF-8, not {value!a}")
    return str(value)


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    text = choices[0] if value is None else str(value).strip()
    if text not in choices:
        raise ConfigError(f"{name} has to be one of {', '.join(choices)}, not {value!r}")
    return text


def _number(name: str, value: Any, default: float | None, lowest: float, highest: float) -> Any:
    if value is None:
        return default
    kind, kind_name = (int, "a whole number") if type(default) is int else (float, "a number")
    try:
        number = kind(value)
        if lowest <= number <= highest:
            return number
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{name} has to be {kind_name} from {lowest} to {highest}, not {value!r}")
