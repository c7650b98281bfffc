"""The process: a socket, the ASGI server, its end."""

import contextlib
import errno
import functools
import ipaddress
import resource
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nanochat.apps.serve.app import build_app
from nanochat.apps.serve.guard import LOCAL_NAMES, Guard
from nanochat.apps.serve.runs import ServedRun
from nanochat.apps.serve.watch import Watch
from nanochat.common import UsageError, printable
from nanochat.run.loading import load_run

if TYPE_CHECKING:
    from uvicorn import Config

# connections at a time; uvicorn answers more with status 503
MOST_CONNECTIONS = 4000
# descriptors beyond those of connections: files, pipes, the package's own
SPARE_DESCRIPTORS = 200
# seconds for the head of a request, from the connection or from its first byte
HEAD_SECONDS = 20.0
# seconds that running requests get when the server ends
ENDING_SECONDS = 10


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens on an address. UsageError if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    # UnicodeError: a name that is too long, or holds what no name does
    except (OSError, UnicodeError) as error:
        raise _no_address(host, error) from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            # before the models are loaded: another process that wants the port hears of it now
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise _no_address(host, error) from None
            raise UsageError(
                f"--host {host} --port {port}: cannot be listened on ({error.strerror}); choose "
                f"another port, or --port 0 for any free one"
            ) from None
        yield listener


def _no_address(host: str, error: Exception) -> UsageError:
    return UsageError(
        f"--host {printable(host)}: is no address of this machine ({error}); use 127.0.0.1 for "
        f"this machine only, or 0.0.0.0 for all its addresses"
    )


def url_of(listener: socket.socket) -> str:
    """The address of a socket as clients on this machine write it."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(runs: list[ServedRun], args: Namespace, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or SIGINT; running ones then get some seconds to finish."""
    import uvicorn

    _raise_descriptor_limit()
    load = functools.partial(load_run, device_type=args.device_type, dtype=args.dtype)
    watch = None if args.watch is None else Watch(args.watch or runs[0].folder.resolve().parent)
    guard = Guard(args.host, args.api_key)
    app = build_app(runs, guard, args.timeout, load, _report, watch, args.steps_in_memory)
    server = uvicorn.Server(config_of(app))
    # uvicorn hears both signals only while it runs, and sends them to itself again at its end
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    for run in runs:
        print(printable(f"serving {run.name}, step {run.step}; {run.engine.mode}"), flush=True)
    if not args.api_key and args.host not in LOCAL_NAMES:
        _report(
            f"note: --host {args.host}: whoever reaches this address can use the models"
            f"{' and read the runs under ' + str(watch.folder) if watch else ''}; --api-key "
            f"restricts that"
        )
    print(
        f"listening on {url_of(listener)}, OpenAI's base URL is {url_of(listener)}/v1; the page "
        f"for browsers is {url_of(listener)}/",
        flush=True,
    )
    server.run(sockets=[listener])


def config_of(app: Any) -> "Config":
    """How uvicorn serves an application."""
    import uvicorn

    return uvicorn.Config(
        app,
        http=_protocol(),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        # nothing in front of this server is trusted to name clients
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=ENDING_SECONDS,
    )


def _protocol() -> type:
    """uvicorn's HTTP, with a time limit for the head of a request, which it lacks."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        timer = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answers() and self.timer:
                self.timer.cancel()
                self.timer = None
            elif not self._answers():
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer:
                self.timer.cancel()
            super().connection_lost(exc)

        def _answers(self) -> bool:
            """Whether a request has come whose response is not complete."""
            return self.cycle is not None and not self.cycle.response_complete

        def _await_head(self) -> None:
            # each byte of a slow head would otherwise begin the time again
            if self.timer is None:
                self.timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

        def _give_up(self) -> None:
            self.timer = None
            if not self._answers():
                self.transport.close()

    return Protocol


def _raise_descriptor_limit() -> None:
    """Let this process have a descriptor for each connection, as far as the system admits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _report(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
