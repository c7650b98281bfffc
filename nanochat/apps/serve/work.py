"""The requests of one HTTP request while the engine works on them: events come from its thread to
the event loop, and whoever leaves frees the slots."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from nanochat.apps.serve.errors import ENDING, TIMED_OUT, UNAVAILABLE, Refused
from nanochat.apps.serve.runs import ServedRun
from nanochat.common import UsageError
from nanochat.eval.engine import Ended, QueueFull, Request, Token

# seconds after which a client may try again when the queue is full
RETRY_SECONDS = 1


class Work:
    """The requests of one HTTP request. Created in the event loop; close() when it is over."""

    def __init__(self, run: ServedRun, requests: Sequence[Request], timeout_s: float) -> None:
        """Submit all requests, or none. Raises Refused if that is not possible now."""
        self.run = run
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Token | Ended]] = deque()
        # set while there may be something to do in the event loop
        self._awake = asyncio.Event()
        self._waking = False
        self._timer = self._loop.call_later(timeout_s, self._time_out)
        self._timed_out = False
        # index of the choice: its ticket, until it has ended
        self._tickets: dict[int, int] = {}
        # a failure of the engine's thread ends what waits for it
        run.works.add(self)
        try:
            for choice, request in enumerate(requests):
                self._submit(choice, request)
        except BaseException:
            self.close()
            raise

    def _submit(self, choice: int, request: Request) -> None:
        def deliver(event: Token | Ended) -> None:
            self._put(choice, event)

        if self.run.problem:
            raise Refused(self.run.problem, code="model_failed", status=UNAVAILABLE)
        try:
            self._tickets[choice] = self.run.engine.submit(request, deliver)
        except QueueFull:
            raise Refused(
                "too many requests are waiting for this model; try again soon",
                code="queue_full",
                status=429,
                headers=(("Retry-After", str(RETRY_SECONDS)),),
            ) from None
        except UsageError as error:
            raise Refused(str(error)) from None

    def _put(self, choice: int, event: Token | Ended) -> None:
        """Hand an event to the event loop, from any thread."""
        self._events.append((choice, event))
        # a loop that is about to wake up finds this event as well
        if self._waking:
            return
        self._waking = True
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # the event loop is closed: the server ends, and nobody waits
            return

    def _wake(self) -> None:
        # before anything is read: what is put from now on wakes the loop again
        self._waking = False
        self._awake.set()

    def _time_out(self) -> None:
        self._timed_out = True
        self._awake.set()

    def fail(self, problem: str) -> None:
        """End the wait for whatever has not ended; from any thread."""
        for choice in list(self._tickets):
            self._put(choice, Ended("error", "", problem))

    async def events(self) -> AsyncIterator[tuple[int, Token | Ended]]:
        """(index of the choice, event) as they come, until every choice has ended.

        Raises Refused if the model fails, the server ends or the time is over."""
        while self._tickets:
            choice, event = await self._next()
            if isinstance(event, Ended):
                self._tickets.pop(choice, None)
                _check_end(event)
            yield choice, event

    async def _next(self) -> tuple[int, Token | Ended]:
        while not self._events:
            if self._timed_out:
                raise Refused(
                    f"the request took longer than {self.timeout_s:g} seconds (--timeout); ask for "
                    f"fewer tokens",
                    code="timeout",
                    status=TIMED_OUT,
                )
            await self._awake.wait()
            self._awake.clear()
        return self._events.popleft()

    def close(self) -> None:
        """Cancel what has not ended: its slots are free before the engine's next step."""
        self._timer.cancel()
        self.run.works.discard(self)
        for ticket in self._tickets.values():
            self.run.engine.cancel(ticket)
        self._tickets.clear()


def _check_end(event: Ended) -> None:
    """Refused for an end that is not that of a text."""
    if event.reason == "error":
        problem = event.problem or "the model failed"
        raise Refused(problem, code="model_failed", status=UNAVAILABLE)
    if event.reason == "cancelled":
        raise ENDING
