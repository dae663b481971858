"""The service's variables: defaults, and the lowest and highest value that make sense. See .env.example."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dotenv import load_dotenv

MAX_STOCK = 1_000_000_000
TEXTS = {
    "DATABASE_URL": "sqlite:///inventory.db",
    "ITEM_NAME": "Item A - Concert Ticket",
    "HOST": "127.0.0.1",
}
NUMBERS = {
    "INITIAL_STOCK": (100, 0, MAX_STOCK),
    "LOCK_TIMEOUT": (5.0, 0, 3600),
    "ALLOW_RESET": (0, 0, 1),
    "PORT": (8000, 1, 65535),
    "WEB_CONCURRENCY": (min(max(2, os.cpu_count() or 1), 8), 1, 256),
}


class ConfigError(ValueError):
    """A variable has a value that makes no sense."""


def read_config(**overrides: Any) -> dict[str, Any]:
    """`overrides`, else the environment, else .env, else defaults; an empty value counts as unset."""
    load_dotenv(Path(__file__).parent.parent / ".env")
    given = {
        name: value
        for name, value in {**os.environ, **overrides}.items()
        if value not in (None, "")
    }
    config = {name: _text(name, given.get(name, default)) for name, default in TEXTS.items()}
    return config | {
        name: _number(name, given.get(name, limits[0]), *limits) for name, limits in NUMBERS.items()
    }


def address(config: Mapping[str, Any]) -> str:
    host, port = config["HOST"], config["PORT"]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(name: str, value: Any) -> str:
    if any("\ud800" <= character <= "\udfff" for character in str(value)):
        raise ConfigError(f"{name} has to be text in UTF-8, not {value!a}")
    return str(value)


def _number(name: str, value: Any, default: float, lowest: float, highest: float) -> float:
    try:
        number = type(default)(value)
        if lowest <= number <= highest:
            return number
    except (TypeError, ValueError):
        pass
    kind = "a whole number" if isinstance(default, int) else "a number"
    raise ConfigError(f"{name} has to be {kind} from {lowest} to {highest}, not {value!r}")
