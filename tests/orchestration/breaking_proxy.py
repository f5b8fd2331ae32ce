"""A TCP proxy before a real server that breaks after so many bytes from the client: by silence or by hanging up."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit


class BreakingProxy:
    """Forward to `target` until `limit_bytes` came from clients, then break for good and set `is_broken`."""

    def __init__(self, target: str, *, limit_bytes: int, way: Literal["silence", "hang up"]) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._left = limit_bytes
        self._way = way
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.is_broken = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self._hang_up()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_broken.is_set() and self._way == "hang up":
                near.close()
                continue
            far = socket.create_connection(self._target)
            with self._lock:
                self._sockets += [near, far]
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_from_client: bool) -> None:
        try:
            while data := source.recv(65536):
                if is_from_client and not self._may_pass(len(data)):
                    return
                sink.sendall(data)
        except OSError:
            return
        if not self.is_broken.is_set():
            for end in (source, sink):
                end.close()

    def _may_pass(self, count: int) -> bool:
        with self._lock:
            self._left -= count
            if self._left >= 0:
                return True
        self.is_broken.set()
        if self._way == "hang up":
            self._hang_up()
        return False

    def _hang_up(self) -> None:
        with self._lock:
            for end in self._sockets:
                with contextlib.suppress(OSError):  # closed already
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._sockets.clear()
