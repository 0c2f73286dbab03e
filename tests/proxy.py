"""A TCP proxy between a site and the gateway, with the faults of a hospital's network."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHUNK = 16 * 1024


class Proxy:
    """Forwards every connection to ``(host, port)``; listens on a free port of its own.

    ``cut`` and its like hold for connections that are open and for new ones, until ``heal``.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._flow = threading.Event()
        self._flow.set()
        self._refuses = False
        self._bytes_per_second: float | None = None
        self._bytes_left: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Closes everything."""
        self._refuses = True
        self._server.close()
        self._close_all()

    def cut(self) -> None:
        """Closes all connections and every new one."""
        self._refuses = True
        self._close_all()

    def stall(self) -> None:
        """Lets nothing through, and closes nothing."""
        self._flow.clear()

    def slow(self, bytes_per_second: float) -> None:
        """Lets through so much in each direction of each connection."""
        self._bytes_per_second = bytes_per_second

    def truncate(self, num_bytes: int) -> None:
        """Closes the connection that sends the byte after so many."""
        self._bytes_left = num_bytes

    def heal(self) -> None:
        """Ends every fault."""
        self._refuses, self._bytes_per_second, self._bytes_left = False, None, None
        self._flow.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if self._refuses:
                    client.close()
                    continue
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._open |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self._flow.wait()
                if self._bytes_per_second is not None:
                    time.sleep(len(data) / self._bytes_per_second)
                if self._bytes_left is not None:
                    data = data[: self._bytes_left]
                    self._bytes_left -= len(data)
                    if not data:
                        self._bytes_left = None
                        break
                sink.sendall(data)
        for end in (source, sink):
            self._end(end)

    def _close_all(self) -> None:
        with self._lock:
            ends = list(self._open)
        for end in ends:
            self._end(end)

    def _end(self, end: socket.socket) -> None:
        with self._lock:
            self._open.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
