"""A proxy between an app host and its database delays, stalls, cuts and disappears."""

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK_BYTES = 65536


class Proxy:
    """Connections are forwarded to a port; each fault holds until it is lifted.

    `with` opens and closes the proxy.
    """

    def __init__(
        self,
        target_port: int,
        target_host: str = "127.0.0.1",
        delay_s: float = 0.0,
        silent_from: bytes = b"\0none",
    ) -> None:
        """`delay_s` is added to everything that is sent in either direction.

        A message that holds `silent_from` is swallowed; `is_silent` is set then.
        """
        self.target = (target_host, target_port)
        self.delay_s = delay_s
        self.silent_from = silent_from
        self.is_silent = threading.Event()
        self.port = 0
        self._listener: socket.socket | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, port: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse new connections and cut the old ones."""
        if self._listener:
            _hang_up(self._listener)
            self._listener = None
        self.resume()
        self.cut()

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _hang_up(end)

    def stall(self) -> None:
        """Forward nothing, say nothing: as a network that swallows packets."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)  # an idle connection stays
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(CHUNK_BYTES):
                if self.delay_s:
                    time.sleep(self.delay_s)
                self._flowing.wait()
                if self.silent_from in data:
                    self.is_silent.set()
                else:
                    sink.sendall(data)
        except OSError:
            pass
        _hang_up(source)
        _hang_up(sink)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
