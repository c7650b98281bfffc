"""One HTTP request's work for the engine: events come from the engine's thread to the event loop,
and whoever leaves frees the slots."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from nanochat.apps.serve.errors import ENDING, TIMED_OUT, UNAVAILABLE, Refused
from nanochat.apps.serve.runs import ServedRun
from nanochat.common import UsageError
from nanochat.eval.engine import Ended, Event, QueueFull, Request

# seconds after which a client may try again when the queue is full
RETRY_SECONDS = 1
# seconds after which a request that holds no place tries again
OWN_RETRY_SECONDS = 0.05
# Seconds for which events are gathered behind the first one. Messages cost more than the model's
# tokens; whoever reads along sees no difference. Of many requests each waits longer, so that all of
# them together get no more messages than this in a second, up to what a reader would notice.
GATHER_SECONDS = 0.04
MESSAGES_A_SECOND = 250
LONGEST_GATHER_SECONDS = 0.2
# Texts of one request that are with the engine together, per slot: the next one waits there when
# one ends, and the queue has room for other clients.
TEXTS_PER_SLOT = 2


class Work:
    """The requests of one HTTP request. Created in the event loop; close() when it is over."""

    def __init__(self, run: ServedRun, requests: Sequence[Request], timeout_s: float) -> None:
        """Submit the requests, the first of them now. Raises Refused if that is not possible."""
        self.run = run
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        # set while there may be something to do in the event loop
        self._awake = asyncio.Event()
        self._waking = False
        # whether any event wakes the loop, or only the end of a text
        self._listens = True
        self._timer = self._loop.call_later(timeout_s, self._time_out)
        self._timed_out = False
        # (index of the choice, request) of those that are not with the engine yet
        self._rest = deque(enumerate(requests))
        # index of the choice: its ticket, until it has ended
        self._tickets: dict[int, int] = {}
        # a failure of the engine's thread ends what waits for it
        run.works.add(self)
        try:
            self._feed()
            if not self._tickets:
                raise Refused(
                    "too many requests are waiting for this model; try again soon",
                    code="queue_full",
                    status=429,
                    headers=(("Retry-After", str(RETRY_SECONDS)),),
                )
        except BaseException:
            self.close()
            raise

    def _feed(self) -> None:
        """Submit as many texts as there is room for."""
        most = TEXTS_PER_SLOT * self.run.engine.slots
        try:
            while self._rest and len(self._tickets) < most:
                self._submit(*self._rest[0])
                self._rest.popleft()
        except QueueFull:
            # the end of another text makes room
            return

    def _submit(self, choice: int, request: Request) -> None:
        def deliver(event: Event) -> None:
            self._put(choice, event)

        if self.run.problem:
            raise Refused(self.run.problem, code="model_failed", status=UNAVAILABLE)
        try:
            self._tickets[choice] = self.run.engine.submit(request, deliver)
        except UsageError as error:
            raise Refused(str(error)) from None

    def _put(self, choice: int, event: Event) -> None:
        """Hand an event to the event loop, from any thread."""
        self._events.append((choice, event))
        # looked at behind the event: a loop that listens from now on finds it
        is_awaited = self._listens or isinstance(event, Ended)
        # a loop that is about to wake up finds this event as well
        if self._waking or not is_awaited:
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

    async def batches(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """(index of the choice, event), in order, until every choice has ended. The first event
        comes as soon as it is there, later ones together with those that follow it closely.

        Raises Refused if the model fails, the server ends or the time is over."""
        is_first = True
        while self._tickets or self._rest:
            if not is_first:
                await self._gather()
            is_first = False
            await self._be_admitted()
            batch = []
            for choice, event in await self._take():
                if isinstance(event, Ended):
                    self._tickets.pop(choice, None)
                    if failure := _failure_of(event):
                        yield batch
                        raise failure
                batch.append((choice, event))
            self._feed()
            yield batch

    async def _be_admitted(self) -> None:
        """Wait until a text is with the engine: others may have taken the place of the last."""
        while not self._tickets and not self._timed_out:
            await asyncio.sleep(OWN_RETRY_SECONDS)
            self._feed()

    async def _gather(self) -> None:
        """Wait for more events, at most until a text ends."""
        timer = self._loop.call_later(gather_seconds(len(self.run.works)), self._awake.set)
        await self._awake.wait()
        timer.cancel()

    async def _take(self) -> list[tuple[int, Event]]:
        """All events that have come, one at least."""
        while not self._timed_out:
            self._awake.clear()
            self._listens = True
            if self._events:
                self._listens = False
                return [self._events.popleft() for _ in range(len(self._events))]
            await self._awake.wait()
        raise Refused(
            f"the request took longer than {self.timeout_s:g} seconds (--timeout); ask for "
            f"fewer tokens",
            code="timeout",
            status=TIMED_OUT,
        )

    def close(self) -> None:
        """Cancel what has not ended: its slots are free before the engine's next step."""
        self._timer.cancel()
        self.run.works.discard(self)
        for ticket in self._tickets.values():
            self.run.engine.cancel(ticket)
        self._tickets.clear()


def gather_seconds(n_requests: int) -> float:
    """How long the events of a request are gathered while so many are answered or wait."""
    return min(max(GATHER_SECONDS, n_requests / MESSAGES_A_SECOND), LONGEST_GATHER_SECONDS)


def _failure_of(event: Ended) -> Refused | None:
    """The refusal for an end that is not that of a text."""
    if event.reason == "error":
        problem = event.problem or "the model failed"
        return Refused(problem, code="model_failed", status=UNAVAILABLE)
    if event.reason == "cancelled":
        return ENDING
    return None
