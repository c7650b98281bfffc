"""Which HTTP requests are heard at all. Any page in a browser on this machine can send requests
here: those that name another host or come from another origin are refused, before anything else."""

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from nanochat.apps.serve.errors import Refused
from nanochat.common import human_bytes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# listening on them means listening on every address of the machine
ALL_ADDRESSES = ("0.0.0.0", "::")
# of a body; the longest prompts of a full queue fit
LARGEST_BODY_BYTES = 4 << 20
BODY_SECONDS = 20.0
# need no key: whoever watches the server has none, and the page asks for it
OPEN_PATHS = ("/health", "/")


@dataclass(frozen=True)
class Guard:
    """The rules. host: as --host; api_key: as --api-key."""

    host: str
    api_key: str | None = None
    body_seconds: float = BODY_SECONDS

    def check(self, scope: MutableMapping[str, Any]) -> None:
        """Raises Refused for an HTTP request that must not be answered. scope: of ASGI."""
        headers = headers_of(scope)
        host = self._host_of(headers)
        self._check_origin(headers, host)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(headers)
        if scope["method"] == "POST":
            _check_content_type(headers)

    def _host_of(self, headers: dict[str, list[str]]) -> str:
        """The Host header, which must name this server: otherwise a page could lead a name of its
        own to this address and read the answers."""
        given = headers.get("host", [])
        if len(given) != 1:
            raise Refused("the request must have one Host header")
        name = _name_of(given[0])
        if name is None or not self._is_own(name):
            raise Refused(
                f"the Host header {given[0]!r} does not name this server; use localhost, or start "
                f"the server with --host and that name",
                code="foreign_host",
                status=403,
            )
        return given[0].lower()

    def _is_own(self, name: str) -> bool:
        if name in LOCAL_NAMES or name == self.host.lower():
            return True
        if self.host not in ALL_ADDRESSES:
            return False
        # an address cannot be led elsewhere, as a name can
        return _is_address(name) or name == socket.gethostname().lower()

    def _check_origin(self, headers: dict[str, list[str]], host: str) -> None:
        """Refused for a request that a page of another origin sends."""
        for origin in headers.get("origin", []):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                raise Refused(
                    f"the origin {origin!r} is not this server's; pages of other sites cannot use "
                    f"it",
                    code="foreign_origin",
                    status=403,
                )

    def _check_key(self, headers: dict[str, list[str]]) -> None:
        if self.api_key is None:
            return
        given = headers.get("authorization", [""])[0]
        scheme, _, key = given.partition(" ")
        # in constant time: the time would tell how much of a key is right
        right = hmac.compare_digest(key.strip().encode("utf-8"), self.api_key.encode("utf-8"))
        if scheme.lower() != "bearer" or not right:
            raise Refused(
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                status=401,
                headers=(("WWW-Authenticate", "Bearer"),),
            )


def headers_of(scope: MutableMapping[str, Any]) -> dict[str, list[str]]:
    """{lower-case name: values} of a request."""
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


def _name_of(host: str) -> str | None:
    """The name or address in a Host header, in lower case; None if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        # raises ValueError for a port that is no number
        _ = parts.port
        # what a browser would not send: a user, a path
        return parts.hostname if parts.netloc == host and "@" not in host else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_content_type(headers: dict[str, list[str]]) -> None:
    """Refused for a body that is not labelled as JSON: forms of other sites cannot label it so."""
    given = headers.get("content-type", [""])
    media_type = given[0].partition(";")[0].strip().lower()
    if len(given) != 1 or media_type != "application/json":
        raise Refused(
            "the body must be JSON, with the header 'Content-Type: application/json'",
            code="unsupported_media_type",
            status=415,
        )


async def read_body(
    scope: MutableMapping[str, Any], receive: Receive, seconds: float = BODY_SECONDS
) -> bytes | None:
    """The body of a request; None if the client went away. Refused if it is too large or slow."""
    too_large = Refused(
        f"the body has more than {human_bytes(LARGEST_BODY_BYTES)}; send several requests",
        code="body_too_large",
        status=413,
        headers=(("Connection", "close"),),
    )
    for length in headers_of(scope).get("content-length", []):
        # of any number of digits
        if length.isdigit() and (len(length) > 12 or int(length) > LARGEST_BODY_BYTES):
            raise too_large
    try:
        body = await asyncio.wait_for(_received(receive), seconds)
    except asyncio.TimeoutError:
        raise Refused(
            f"the body did not arrive within {seconds:g} seconds",
            code="slow_body",
            status=408,
            headers=(("Connection", "close"),),
        ) from None
    if body is not None and len(body) > LARGEST_BODY_BYTES:
        raise too_large
    return body


async def _received(receive: Receive) -> bytes | None:
    """The body, or the beginning of one that is too large; None if the client went away."""
    body = bytearray()
    while len(body) <= LARGEST_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(body)


async def disconnected(receive: Receive) -> None:
    """Wait until the client goes away. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(answer: Awaitable[dict[str, Any]], receive: Receive) -> dict[str, Any]:
    """An answer; an empty one as soon as the client goes away."""
    answering = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else {}
    finally:
        for task in (answering, watching):
            task.cancel()
