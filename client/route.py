"""The way from a site to the gateway, straight or through a proxy; and where it is barred, what to do.

The other end has to show a certificate of the coordinator's authority; there is no way around that.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any, Final

import httpx
from cryptography import x509

from client.proxy import Proxy
from common import certificates
from common.certificates import Certificate

LOOK_SECONDS: Final = 10.0
MAX_NAME: Final = 200
IT: Final = "ask the hospital's IT"
STRAIGHT: Final = {
    "connection.connect_tcp.started": "connect",
    "connection.start_tls.started": "tls",
    "connection.start_tls.complete": "open",
}
THROUGH: Final = {
    "connection.connect_tcp.started": "connect",
    "connection.connect_tcp.complete": "ask",
    "connection.start_tls.started": "proxy_tls",
    "connection.start_tls.complete": "ask",
    "proxy.start_tls.started": "tls",
    "proxy.start_tls.complete": "open",
}
"""What httpcore tells of a connection, and how far on its way the request is then."""


class Barred(httpx.ConnectError):
    """A request that did not reach the gateway; nothing was sent. The text says why, and whom to ask."""


class Route(httpx.BaseTransport):
    """Carries requests to the gateway, and nowhere else.

    Its errors are ``Barred`` where the connection could not be made.

    Args:
        address: ``host:port`` of the gateway.
        authority: the certificate (PEM) of the coordinator's authority.
        tls: trusts that authority and nothing else.
        proxy: what to go through; None is straight.
    """

    def __init__(self, address: str, *, authority: str, tls: ssl.SSLContext, proxy: Proxy | None) -> None:
        self.address = address
        self.proxy = proxy
        self._authority = certificates.from_pem(authority)
        self._inner = self._transport(tls)
        self._stages = STRAIGHT if proxy is None else THROUGH

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Sends a request and returns the answer."""
        stage = "open"  # where a connection is used again

        def note(event: str, info: dict[str, Any]) -> None:
            nonlocal stage
            stage = self._stages.get(event, stage)

        request.extensions = {**request.extensions, "trace": note}
        try:
            return self._inner.handle_request(request)
        except httpx.TransportError as error:
            if stage == "open":
                raise
            raise Barred(self._why(stage, error), request=request) from error

    def close(self) -> None:
        """Closes the connections."""
        self._inner.close()

    def _transport(self, tls: ssl.SSLContext) -> httpx.HTTPTransport:
        proxy = None if self.proxy is None else self.proxy.client
        return httpx.HTTPTransport(verify=tls, proxy=proxy, trust_env=False)

    def _why(self, stage: str, error: httpx.TransportError) -> str:
        if stage == "tls":
            return self._not_the_gateway(error)
        if self.proxy is None:
            told = f"{self.address} is not reached ({words(error)}); is the address right?"
            return f"{told} If this network needs a proxy, name it in site.yaml (proxy)"
        if stage == "connect":
            told = f"the proxy {self.proxy} is not reached ({words(error)})"
            return f"{told}; {IT} for its address and port"
        if stage == "proxy_tls":
            told = f"the certificate of the proxy {self.proxy} itself is not trusted ({words(error)})"
            return f"{told}; name its authority in site.yaml (proxy.ca_certificate)"
        return self._refused(self.proxy, error)

    def _refused(self, proxy: Proxy, error: httpx.TransportError) -> str:
        """Explains what a proxy said to CONNECT."""
        status = str(error)[:3] if isinstance(error, httpx.ProxyError) else ""
        match status:
            case "407" if proxy.login is None:
                return f"the proxy {proxy} wants a user and a password (407); {IT} for them"
            case "407":
                return f"the proxy {proxy} does not take its user and password (407); {IT} for the right ones"
            case "403":
                return f"the proxy {proxy} forbids {self.address} (403); {IT} to allow CONNECT to it"
            case "502" | "503" | "504":
                return (
                    f"the proxy {proxy} does not reach {self.address} ({status}); {IT}, and the coordinator"
                )
            case "":
                told = f"the proxy {proxy} gives no answer to CONNECT ({words(error)})"
                return f"{told}; {IT} whether it is one, and allows {self.address}"
        return f"the proxy {proxy} refuses CONNECT to {self.address} ({status}); {IT} to allow it"

    def _not_the_gateway(self, error: httpx.TransportError) -> str:
        """Explains why TLS with the gateway failed, by the certificate that is shown instead of its own."""
        place = self.address if self.proxy is None else f"{self.address} through the proxy {self.proxy}"
        shown = self._shown()
        if shown is None:
            return f"{place} speaks no TLS with us ({words(error)}); {IT}, and the coordinator"
        if certificates.is_issued_by(shown, self._authority):
            told = f"{place} shows a certificate of the coordinator that does not hold ({words(error)})"
            return f"{told}; is this clock right? Else the coordinator has to run feverfew-server renew"
        return (
            f"TLS to {place} is broken open, or the address is wrong: the certificate shown is not by the "
            f"coordinator's authority, but issued by {_name(shown.issuer)} for {_name(shown.subject)}; "
            f"nothing was sent. Ask the hospital's IT to except {self.address} from inspection"
        )

    def _shown(self) -> Certificate | None:
        """Returns the certificate that is shown for the gateway, whoever vouches for it; None without TLS.

        The connection is ended as soon as its handshake is done: nothing is sent over it, and the site's own
        certificate is not shown.
        """
        anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        done = next(event for event, stage in self._stages.items() if stage == "open")

        def look(event: str, info: dict[str, Any]) -> None:
            if event == done:
                stream = info["return_value"]
                found = stream.get_extra_info("ssl_object").getpeercert(True)
                stream.close()
                raise _Seen(found)

        seconds = dict.fromkeys(("connect", "read", "write", "pool"), LOOK_SECONDS)
        request = httpx.Request(
            "GET", f"https://{self.address}/", extensions={"trace": look, "timeout": seconds}
        )
        with self._transport(anybody) as transport:
            try:
                transport.handle_request(request)
            except _Seen as seen:
                return seen.certificate
            except httpx.TransportError:
                return None
        return None


class _Seen(Exception):
    """Carries a certificate out of a connection, and ends it."""

    def __init__(self, content: bytes | None) -> None:
        super().__init__()
        self.certificate: Certificate | None = None
        with contextlib.suppress(ValueError):
            self.certificate = None if content is None else certificates.from_der(content)


def words(error: BaseException) -> str:
    """Returns why a connection failed, in the words of the system or of TLS."""
    if isinstance(error, httpx.TimeoutException):
        return "time-out"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return str(cause.verify_message)
        if isinstance(cause, ssl.SSLError):
            return str(cause.reason or "no TLS").lower().replace("_", " ")
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return (
        "closed without an answer" if isinstance(error, httpx.RemoteProtocolError) else type(error).__name__
    )


def _name(name: x509.Name) -> str:
    """Returns a name of a certificate, in printable letters: whoever made it may have written anything."""
    return ascii(name.rfc4514_string())[:MAX_NAME]
