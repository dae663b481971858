"""Which processes of a server answer its clients. Linux tells; elsewhere none are found."""

import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

# The kernel's names and numbers; see man 7 sock_diag and linux/inet_diag.h.
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, REQUEST_DUMP = 4, 20, 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_ESTABLISHED = 1
HEADER, MESSAGE, SOCKET_ID_BYTES, INODE_AT = "=IHHII", "=BBBBI", 48, 16 + 4 + 48 + 16


def busy_workers(server: int, port: int) -> list[int]:
    """The processes below `server` that are answering somebody at this port now.

    Each of them holds a connection that it accepted there. A metrics process, or another child,
    may have inherited the listening socket, but holds no such connection.
    """
    wanted = connections_to(port)
    return [pid for pid in descendants(server) if wanted & open_sockets(pid)]


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    lists: list[str] = []
    with suppress(OSError):  # it ended just now
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(word) for word in " ".join(lists).split()]
    return children + [below for child in children for below in descendants(child)]


def open_sockets(pid: int) -> set[str]:
    found: set[str] = set()
    with suppress(OSError):  # it ended just now
        for link in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/fd/{link}"))
    return found


def connections_to(port: int) -> set[str]:
    """The established connections to this local port, as /proc/<pid>/fd names them.

    /proc/net/tcp would list thousands of closed ones, and be out of date when it has been read.
    """
    if sys.platform != "linux":
        return set()
    socket_id = struct.pack(">H", port).ljust(SOCKET_ID_BYTES, b"\0")
    states = 1 << TCP_ESTABLISHED
    message = struct.pack(MESSAGE, socket.AF_INET, socket.IPPROTO_TCP, 0, 0, states) + socket_id
    length = struct.calcsize(HEADER) + len(message)
    header = struct.pack(HEADER, length, SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
        kernel.send(header + message)
        return inodes_told_by(kernel)


def inodes_told_by(kernel: socket.socket) -> set[str]:
    found: set[str] = set()
    while True:
        answer = kernel.recv(1 << 16)
        while answer:
            length, kind = struct.unpack_from("=IH", answer)
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return found
            (inode,) = struct.unpack_from("=I", answer, INODE_AT)
            found.add(f"socket:[{inode}]")
            answer = answer[(length + 3) // 4 * 4 :]
