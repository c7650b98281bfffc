"""Which request is read, which is continued, and which waits. Pure: it knows no model, no text and
no clock."""

import heapq
from collections import deque
from dataclasses import dataclass, field


class QueueFull(Exception):
    """Too many requests wait already; trying again later may help."""


@dataclass
class Work:
    """A request on its way. n_prompt: tokens to read before it can be continued. n_read: of these.
    slot: once it has one."""

    ticket: int
    n_prompt: int
    n_read: int = 0
    slot: int | None = None


@dataclass
class Scheduler:
    """Requests get a slot in the order in which they came. A prompt is read in pieces, one piece
    between two steps, so that a long one does not halt those that are being continued."""

    slots: int
    queue: int
    piece: int
    waiting: deque[Work] = field(default_factory=deque)
    reading: deque[Work] = field(default_factory=deque)
    continued: dict[int, Work] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.slots))

    def add(self, work: Work) -> None:
        """Take a request. QueueFull if too many wait."""
        if len(self.waiting) >= self.queue:
            raise QueueFull(f"{len(self.waiting)} requests wait already")
        self.waiting.append(work)

    def admit(self) -> list[Work]:
        """Give free slots to those that wait longest; returns who got one."""
        admitted = []
        while self.free and self.waiting:
            work = self.waiting.popleft()
            work.slot = heapq.heappop(self.free)
            self.reading.append(work)
            admitted.append(work)
        return admitted

    def next_piece(self) -> tuple[Work, int, int] | None:
        """(request, first, last + 1) of the prompt tokens to read next, or None. The first request
        that came is read to its end before another is begun."""
        if not self.reading:
            return None
        work = self.reading[0]
        # Pieces end at multiples, wherever reading begins: what was read for another request with
        # the same beginning then has the same bits.
        end = min(work.n_prompt, (work.n_read // self.piece + 1) * self.piece)
        return work, work.n_read, end

    def read(self, work: Work, end: int) -> bool:
        """Note that a prompt has been read as far as `end`; returns whether that was all of it: it
        is continued from now on."""
        work.n_read = end
        if end < work.n_prompt:
            return False
        self.reading.remove(work)
        self.continued[work.ticket] = work
        return True

    def remove(self, ticket: int) -> Work | None:
        """Take a request out, wherever it is, and free its slot; None if it is gone already."""
        if work := self.continued.pop(ticket, None):
            heapq.heappush(self.free, work.slot)
            return work
        for line in (self.reading, self.waiting):
            for work in line:
                if work.ticket == ticket:
                    line.remove(work)
                    if work.slot is not None:
                        heapq.heappush(self.free, work.slot)
                    return work
        return None

    @property
    def idle(self) -> bool:
        """Whether no request has a slot."""
        return len(self.free) == self.slots
