"""How a daemon is, for the computer that it runs on: health, readiness and counters over HTTP on loopback.

``/health`` answers 200 while the process lives, ``/ready`` 200 while it can do its work and 503 else,
``/metrics`` the counters in the text form of Prometheus. Nothing of it may be private: docs/operation.md
lists all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

LOOPBACK = "127.0.0.1"
Start = Callable[[str, list[tuple[str, str]]], object]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing: a probe comes every few seconds."""


def serve(port: int, registry: CollectorRegistry, *, is_ready: Callable[[], bool]) -> Callable[[], None]:
    """Answers on a port of loopback from a thread of its own; returns what ends it.

    Raises:
        OSError: the port is taken.
    """
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, object], start: Start) -> Iterable[bytes]:
        match environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"):
            case "GET", "/metrics":
                answer: Iterable[bytes] = metrics(environ, start)
                return answer
            case "GET", "/health":
                return _say(start, "200 OK", b"ok\n")
            case "GET", "/ready":
                return _say(start, "200 OK", b"ok\n") if is_ready() else _say(start, "503 Not Ready", b"no\n")
        return _say(start, "404 Not Found", b"")

    server = make_server(LOOPBACK, port, app, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, name="monitor", daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    return end


def _say(start: Start, status: str, text: bytes) -> list[bytes]:
    start(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
    return [text]
