"""Conversations packed into rows of training, whole: the rows of `nanochat sft`.

Row n is a function of the conversations, the seed and n alone, so that resuming needs no state and
any number of ranks reads the same rows.

Shape legend: T tokens of a row."""

import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nanochat.common import stream_seed

# targets that do not count
NO_TARGET = -1


class Encoded(Protocol):
    """Conversations as token ids. lengths: int64 (N,). Item i: (ids uint32 (n,), mask bool (n,)),
    where the mask marks what is learned."""

    lengths: np.ndarray

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """A conversation."""

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The conversations of an epoch in its order, int64."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items of these lengths into as few bins of a capacity as best-fit decreasing finds; items
    of equal length keep their order. Returns the items of each bin, in ascending order.

    No length may exceed the capacity."""
    bins: list[list[int]] = []
    # bins by the room that is left in them, and the rooms that there are, ascending
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    # sorted() is stable: equal lengths stay in order
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[item])
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        bins[number].append(item)
        left = room - lengths[item]
        if not by_room.setdefault(left, []):
            bisect.insort(rooms, left)
        by_room[left].append(number)
    return [sorted(items) for items in bins]


class PackedRows:
    """Rows of T + 1 tokens: conversations one behind the other, then padding that is no target.

    A conversation sees those before it in its row, as documents do in pretraining; each opens with
    BOS."""

    def __init__(self, encoded: Encoded, row_tokens: int, seed: int, padding: int) -> None:
        """row_tokens: T; no conversation may have more than T + 1 tokens. padding: an id."""
        self.encoded = encoded
        self.row_tokens = row_tokens
        self.seed = seed
        self.padding = padding
        # number of the first row of each epoch that was packed, and of the one behind them
        self.starts = [0]
        self.packed: dict[int, list[np.ndarray]] = {}

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; others differ only where a weight is no whole number."""
        return len(self._rows_of(0))

    def _rows_of(self, epoch: int) -> list[np.ndarray]:
        """The conversations of each row of an epoch."""
        if epoch not in self.packed:
            order = self.encoded.epoch(self.seed, epoch)
            bins = best_fit(self.encoded.lengths[order].tolist(), self.row_tokens + 1)
            shuffle = np.random.default_rng(stream_seed(self.seed, "packed rows", epoch))
            # two epochs meet in a step, and no more
            self.packed = {e: rows for e, rows in self.packed.items() if e >= epoch - 1}
            self.packed[epoch] = [order[bins[i]] for i in shuffle.permutation(len(bins))]
            if epoch == len(self.starts) - 1:
                self.starts.append(self.starts[-1] + len(bins))
        return self.packed[epoch]

    def epoch_of(self, number: int) -> int:
        """The epoch that a row belongs to."""
        while number >= self.starts[-1]:
            self._rows_of(len(self.starts) - 1)
        return bisect.bisect_right(self.starts, number) - 1

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, targets) of a row, int64 (T,): each target follows its id, NO_TARGET where nothing
        is learned."""
        epoch = self.epoch_of(number)
        members = self._rows_of(epoch)[number - self.starts[epoch]]
        ids = np.full(self.row_tokens + 1, self.padding, dtype=np.int64)
        mask = np.zeros(self.row_tokens + 1, dtype=bool)
        end = 0
        for i in members:
            conversation, learned = self.encoded[i]
            start, end = end, end + len(conversation)
            ids[start:end] = conversation
            mask[start:end] = learned
            # the first token of one is no answer to the one before
            mask[start] = False
        return ids[:-1], np.where(mask[1:], ids[1:], NO_TARGET)

    def step(self, step: int, rows_per_step: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of all rows of a step, int64 (rows, T)."""
        numbers = range(step * rows_per_step, (step + 1) * rows_per_step)
        inputs, targets = zip(*(self.row(number) for number in numbers), strict=True)
        return np.stack(inputs), np.stack(targets)
