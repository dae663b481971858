"""What a start says and what it refuses: each in one line. Nothing that is printed may stop it."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

GUNICORN_CONF = Path(__file__).resolve().parent.parent / "gunicorn.conf.py"
BACKLOG = 65535  # buyers who may wait for a worker; the kernel's own limit caps it
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
SHORT_QUEUE = 4096  # Linux's default; below it many a SYN is dropped, and sent again seconds later
CANNOT_LOAD_APP = 4  # gunicorn's exit status for it: its master doesn't start such a worker again


def cannot_start(reason: object, status: int = CANNOT_LOAD_APP) -> NoReturn:
    """End the process with one line on standard error."""
    say(f"Cannot start: {reason}", sys.stderr)
    sys.exit(status)


def say(text: str, stream: Any = None) -> None:
    """Print, also where the terminal lacks a character, the disk is full or the pipe is closed."""
    stream = stream or sys.stdout
    with suppress(OSError, ValueError, AttributeError):  # the last: this process has no stream
        encoding = stream.encoding
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()


def short_queue() -> str:
    """How to let more buyers wait, where the kernel lets only few; "" where it lets enough."""
    try:
        limit = int(SOMAXCONN.read_text())
    except (OSError, ValueError):  # not Linux
        return ""
    if limit >= SHORT_QUEUE:
        return ""
    raise_it = f"sysctl -w net.core.somaxconn={SHORT_QUEUE}"
    return f"The kernel lets only {limit} buyers wait for a worker - raise it: {raise_it}"


def require_own_settings() -> None:
    """Don't serve by gunicorn's defaults because it was started in a folder without our file.

    Whoever names a file of his own with `--config` has decided otherwise.
    """
    if "gunicorn.arbiter" not in sys.modules:
        return
    loaded = getattr(sys.modules.get("__config__"), "__file__", None)  # gunicorn's name for it
    words = sys.argv[1:] + shlex.split(os.environ.get("GUNICORN_CMD_ARGS", ""))
    named = any(word.startswith(("-c", "--conf")) for word in words)
    if not named and (loaded is None or Path(loaded).resolve() != GUNICORN_CONF):
        by_module = Path(sys.argv[0]).name == "__main__.py"
        gunicorn = [sys.executable, "-m", "gunicorn"] if by_module else sys.argv[:1]
        command = shlex.join([*gunicorn, "--config", str(GUNICORN_CONF), "app:app"])
        cannot_start(f"gunicorn has not read {GUNICORN_CONF.name} - run {command}")


@contextmanager
def acting_as(user: int, group: int) -> Iterator[None]:
    """With the rights that `gunicorn --user` leaves to the workers, where root starts them."""
    started_by = os.geteuid(), os.getegid()
    if started_by[0] == 0:
        os.setegid(group)
        os.seteuid(user)
    try:
        yield
    finally:
        if started_by[0] == 0:
            os.seteuid(started_by[0])
            os.setegid(started_by[1])
