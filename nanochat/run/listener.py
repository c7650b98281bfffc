"""The thread of rank 0 that listens for `nanochat jobs` on a Unix socket.

A request is a line of JSON, {"verb": ..., ...}; the answer is lines of JSON, {"doing": text} any
number of times and at last {"done": text, ...} or {"error": text}."""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from nanochat.common import UsageError
from nanochat.run.control import ORDERS, Control
from nanochat.run.registry import (
    LONGEST_SOCKET_PATH,
    Job,
    Process,
    announce,
    forget,
    is_own,
    socket_folder,
    sweep_sockets,
)

# Limits on clients: bytes of a request, seconds to send it or to take the answer, connections.
LONGEST_REQUEST = 1 << 16
PATIENCE_SECONDS = 5.0
MOST_CLIENTS = 16
# that the system keeps until this thread has time for them
MOST_WAITING = 1024
# between two looks at whether an order has been carried out, and how many of them for each look at
# what the run does meanwhile
POLL_SECONDS = 0.02
LOOKS_PER_STATUS = 25


class Listener:
    """The thread that listens for the orders to a run."""

    def __init__(self, control: Control, processes: Sequence[Process]) -> None:
        """Raises OSError or UsageError where no socket or no entry can be made."""
        self.control = control
        self.clients = 0
        folder = socket_folder()
        sweep_sockets(folder)
        path = folder / f"{os.getpid()}-{os.urandom(4).hex()}.sock"
        if len(os.fsencode(path)) >= LONGEST_SOCKET_PATH:
            # first of all what to do, since a long message is cut
            raise OSError(f"set TMPDIR to a shorter path: {path} is too long for a socket")
        self.socket = socket.socket(socket.AF_UNIX)
        self.path = path
        # closed to others from its first moment: the folder is
        self.socket.bind(str(path))
        os.chmod(path, 0o600)
        self.socket.listen()
        self.job = Job(str(control.path.resolve()), str(path), time.time(), tuple(processes))
        try:
            self.file = announce(self.job)
        except (OSError, UsageError):
            self.path.unlink()
            raise
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="control", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """End the thread, and remove what announces the run; its entry stays, as a record."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=1)
        forget(self.job)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        serve = asyncio.start_unix_server(
            self._serve, sock=self.socket, limit=LONGEST_REQUEST, backlog=MOST_WAITING
        )
        # a run that is over at once stops the loop before it listens
        with contextlib.suppress(RuntimeError):
            self.loop.run_until_complete(serve)
            self.loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client: a request, and its answer."""
        self.clients += 1
        try:
            await self._answer(reader, writer)
        # clients that are gone, slow, or send something else
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            self.clients -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.clients > MOST_CLIENTS:
            await _send(writer, {"error": f"more than {MOST_CLIENTS} clients; try again"})
            return
        if not is_own(writer.get_extra_info("socket")):
            return
        try:
            line = await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)
            request = json.loads(line)
            verb = request["verb"]
            actions = {"status": self._status, "stop": self._stop, "abort": self._abort}
            act = self._order if verb in ORDERS else actions[verb]
        # RecursionError: of brackets, thousands deep
        except (ValueError, KeyError, TypeError, RecursionError):
            await _send(writer, {"error": "not a request: a line of JSON with a known verb"})
            return
        await act(request, writer)

    async def _status(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await _send(writer, {"done": "", **self.control.status()})

    async def _stop(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        # during the set-up there is nothing to save
        is_training = self.control.describe is not None
        doing = "finishing the step, then saving" if is_training else "leaving the set-up"
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await _send(writer, {"doing": doing, "training": is_training})
        # no more is said here: the client waits for the processes to be gone
        self.control.stop_run()

    async def _abort(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            await _send(writer, {"doing": "ending now, without saving"})
        self.control.abort_run()

    async def _order(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        order = self.control.begin_order(request)
        doing = ""
        for look in itertools.count():
            if (outcome := order.outcome()) is not None:
                break
            # less often, since a status lists the folder of the checkpoints
            if look % LOOKS_PER_STATUS == 0:
                now = self.control.status().get("doing", "")
                if now != doing:
                    doing = now
                    await _send(writer, {"doing": doing})
            await asyncio.sleep(POLL_SECONDS)
        await _send(writer, outcome)


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """Write a line. TimeoutError if the client does not take it."""
    writer.write(json.dumps(message).encode() + b"\n")
    await asyncio.wait_for(writer.drain(), PATIENCE_SECONDS)
