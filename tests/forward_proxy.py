"""A hospital's forward proxy: tunnels by CONNECT, and has the faults that such proxies have."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import threading
from dataclasses import dataclass, field
from typing import Self

CHUNK = 16 * 1024
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass(kw_only=True)
class ForwardProxy:
    """Listens on a free port of 127.0.0.1 until the end of a ``with`` block.

    Attributes:
        login: the ``user:password`` that it wants; "" lets everybody.
        status: what it answers instead of tunnelling; 0 tunnels.
        stalls: takes connections, and answers nothing.
        inspects: breaks TLS open, as a server with this context; what it could read then is in ``read``.
        tls: it is itself reached over TLS, with this context.
        instead: sends these bytes where the other end's would come.
        targets: what it was asked to connect to, in order.
    """

    login: str = ""
    status: int = 0
    stalls: bool = False
    inspects: ssl.SSLContext | None = None
    tls: ssl.SSLContext | None = None
    instead: bytes = b""
    targets: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    read: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._open: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Ends all tunnels."""
        for end in list(self._open):
            self._end(end)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        try:
            if self.tls is not None:
                raw, client = client, self.tls.wrap_socket(client, server_side=True)
                self._open.discard(raw)
                self._open.add(client)
            self._answer(client)
        except OSError:
            pass
        finally:
            self._end(client)

    def _answer(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(CHUNK)):
                return
            head += data
        self.heads.append(head)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self.targets.append(target)
        if self.stalls:
            client.recv(CHUNK)  # until the other end has enough of it
        elif method != "CONNECT":
            client.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
        elif self.status:
            client.sendall(f"HTTP/1.1 {self.status} No\r\nContent-Length: 0\r\n\r\n".encode())
        elif self.login and self._credentials() not in head:
            client.sendall(
                b"HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n"
            )
        else:
            client.sendall(ESTABLISHED)
            self._tunnel(client, target)

    def _credentials(self) -> bytes:
        return b"Proxy-Authorization: Basic " + base64.b64encode(self.login.encode()) + b"\r\n"

    def _tunnel(self, client: socket.socket, target: str) -> None:
        if self.instead:
            client.sendall(self.instead)
        elif self.inspects is not None:
            with self.inspects.wrap_socket(client, server_side=True) as opened:
                while data := opened.recv(CHUNK):
                    self.read += data
        else:
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                self._open.add(server)
                back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
                back.start()
                self._pump(client, server)
                back.join()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                sink.sendall(data)
        self._end(source)
        self._end(sink)

    def _end(self, end: socket.socket) -> None:
        self._open.discard(end)
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
