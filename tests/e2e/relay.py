"""A TCP relay that counts the bytes on a node's wire."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass
class Wire:
    """A relay's address and the bytes that went through it so far; up is towards the server."""

    address: str
    up: int = 0
    down: int = 0

    def read(self) -> dict[str, int]:
        return {"up": self.up, "down": self.down}


@contextmanager
def relay(target: str) -> Iterator[Wire]:
    """Pass connections on to HOST:PORT, untouched, and count both directions."""
    host, port = target.rsplit(":", 1)
    listener = socket.create_server(("127.0.0.1", 0))
    wire, lock = Wire(f"127.0.0.1:{listener.getsockname()[1]}"), threading.Lock()
    opened: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket, direction: str) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with lock:
                    setattr(wire, direction, getattr(wire, direction) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                opened.extend((near, far))
                for ends in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield wire
    finally:
        listener.close()
        for end in opened:
            end.close()
