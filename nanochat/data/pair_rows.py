"""Preference pairs as rows of training: each chosen answer, then the rejected one.

Row n is a function of the pairs, the seed and n alone. T tokens of a row."""

import bisect
from collections.abc import Sequence

import numpy as np

from nanochat.common import round_up
from nanochat.data.packing import NO_TARGET
from nanochat.data.preferences import Pairs

# lengths of rows are multiples of this
ROW_STEP = 32


class PairRows:
    """Rows of pairs in a random order, epoch after epoch. Two rows are a pair."""

    def __init__(self, pairs: Pairs, most_tokens: int, seed: int, padding: int) -> None:
        """most_tokens: the context; rows are as long as the longest pair needs. padding: an id."""
        self.pairs = pairs
        self.T = min(most_tokens, round_up(int(pairs.lengths.max()) - 1, ROW_STEP))
        self.seed = seed
        self.padding = padding
        # number of the first pair of each epoch, and of the one behind them
        self.starts = [0]
        self.orders: dict[int, np.ndarray] = {}

    @property
    def pairs_per_epoch(self) -> int:
        """Pairs of the first epoch; others differ only where a weight is no whole number."""
        return len(self._order_of(0))

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch not in self.orders:
            order = self.pairs.epoch(self.seed, epoch)
            # two epochs meet in a step, and no more
            self.orders = {e: kept for e, kept in self.orders.items() if e >= epoch - 1}
            self.orders[epoch] = order
            if epoch == len(self.starts) - 1:
                self.starts.append(self.starts[-1] + len(order))
        return self.orders[epoch]

    def pair_of(self, number: int) -> int:
        """The pair that comes as the number-th."""
        while number >= self.starts[-1]:
            self._order_of(len(self.starts) - 1)
        epoch = bisect.bisect_right(self.starts, number) - 1
        return int(self._order_of(epoch)[number - self.starts[epoch]])

    def step(self, step: int, pairs_per_step: int) -> list[int]:
        """The pairs of a step, in order."""
        first = step * pairs_per_step
        return [self.pair_of(number) for number in range(first, first + pairs_per_step)]

    def rows(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """rows_of() with this length."""
        return rows_of(self.pairs, numbers, self.T, self.padding)


def rows_of(
    pairs: Pairs, numbers: Sequence[int], T: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets), int64 (2 x pairs, T); targets are NO_TARGET outside of the answers."""
    ids = np.full((2 * len(numbers), T + 1), padding, dtype=np.int64)
    mask = np.zeros(ids.shape, dtype=bool)
    for place, number in enumerate(numbers):
        pair = pairs[number]
        for row, (tokens, learned) in enumerate((pair.with_chosen(), pair.with_rejected())):
            ids[2 * place + row, : len(tokens)] = tokens
            mask[2 * place + row, : len(tokens)] = learned
    return ids[:, :-1], np.where(mask[:, 1:], ids[:, 1:], NO_TARGET)
