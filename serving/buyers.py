"""Whether a buyer still waits for an answer, as far as this process can tell."""

import socket
from typing import Any


def is_there(environ: dict[str, Any]) -> bool:
    """False once the client has closed or reset its connection; True where that can't be told.

    gunicorn hands on its socket: a peek that returns nothing means closed. A connection that the
    client half-closed looks the same. TLS in gunicorn, and other servers, can't be asked.
    """
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return True
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except ConnectionError:
        return False
    except (OSError, ValueError):  # nothing to read, as it should be; or TLS, which can't peek
        return True
