"""Conversations packed into rows."""

import itertools

import numpy as np
import pytest

from nanochat.data.packing import NO_TARGET, PackedRows, best_fit

T = 32
PADDING = 999


class Made:
    """Conversations of given lengths: number i holds i in all places but the first, which is BOS,
    0; the second half is learned. Every second epoch leaves the last one out."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)

    def __getitem__(self, i):
        ids = np.full(self.lengths[i], i + 1, dtype=np.uint32)
        ids[0] = 0
        return ids, np.arange(len(ids)) >= len(ids) // 2

    def epoch(self, seed, epoch):
        order = np.random.default_rng([seed, epoch]).permutation(len(self.lengths))
        return order if epoch % 2 == 0 else order[order != len(order) - 1]


def rows_of(lengths, seed=0):
    return PackedRows(Made(lengths), T, seed, PADDING)


def conversations_in(row):
    """The (number, length) of each conversation in a row's ids."""
    ids, targets = row
    # the last id of a full row is only a target
    whole = [*ids.tolist(), targets[-1] if targets[-1] != NO_TARGET else PADDING]
    starts = [i for i, token in enumerate(whole) if token == 0]
    ends = [*starts[1:], whole.index(PADDING) if PADDING in whole else len(whole)]
    return [(whole[start + 1] - 1, end - start) for start, end in zip(starts, ends)]


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_against_the_plain_way(seed):
    """The same bins as trying every bin for every item, the fullest that has room first."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 34, size=generator.integers(0, 200)).tolist()
    bins = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [33 - sum(lengths[i] for i in items) for items in bins]
        fitting = [room for room in rooms if room >= lengths[item]]
        if fitting:
            # of several as full, the one that was last in use
            bins[len(rooms) - 1 - rooms[::-1].index(min(fitting))].append(item)
        else:
            bins.append([item])
    found = best_fit(lengths, 33)
    loads = [sorted(sum(lengths[i] for i in items) for items in some) for some in (found, bins)]
    assert loads[0] == loads[1]
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(items == sorted(items) for items in found)


def test_a_bin_may_be_full_and_items_may_fill_it_alone():
    assert best_fit([33, 33, 1], 33) == [[0], [1], [2]]
    assert best_fit([1] * 33, 33) == [list(range(33))]
    assert best_fit([], 33) == []


def test_every_conversation_is_whole_and_stands_once_an_epoch():
    lengths = np.random.default_rng(0).integers(2, T + 2, size=60).tolist()
    rows = rows_of(lengths)
    n = rows.rows_per_epoch
    for epoch in range(3):
        numbers = range(rows.starts[epoch], rows.starts[epoch] + len(rows._rows_of(epoch)))
        assert {rows.epoch_of(number) for number in numbers} == {epoch}
        found = [c for number in numbers for c in conversations_in(rows.row(number))]
        assert sorted(found) == list(enumerate(lengths))[: 60 - epoch % 2]
    # packed well: less than one row in ten is padding
    assert sum(lengths) / (n * (T + 1)) > 0.9


def test_only_what_is_learned_is_a_target():
    """Conversations of 10, 10 and 10 tokens in a row of 33: BOS after another is no target."""
    ids, targets = rows_of([10, 10, 10]).row(0)
    assert ids.dtype == targets.dtype == np.int64 and len(ids) == len(targets) == T
    learned = targets != NO_TARGET
    assert learned.sum() == 15
    # a target is the id that follows
    assert (targets[:-1][learned[:-1]] == ids[1:][learned[:-1]]).all()
    assert 0 not in targets and PADDING not in targets
    assert (ids[30:] == PADDING).all() and not learned[29:].any()


def test_the_first_token_is_never_a_target_even_if_it_is_marked():
    class AllLearned(Made):
        def __getitem__(self, i):
            ids, mask = super().__getitem__(i)
            return ids, np.ones_like(mask)

    _, targets = PackedRows(AllLearned([10, 10]), T, 0, PADDING).row(0)
    assert (targets != NO_TARGET).sum() == 18 and 0 not in targets


def test_rows_do_not_depend_on_what_was_read_before():
    lengths = np.random.default_rng(1).integers(2, T + 2, size=40).tolist()
    in_order = rows_of(lengths)
    expected = [in_order.row(number) for number in range(100)]
    elsewhere = rows_of(lengths)
    for number in (99, 3, 57, 0, 98):
        for mine, theirs in zip(elsewhere.row(number), expected[number]):
            assert (mine == theirs).all()
    inputs, targets = elsewhere.step(7, 5)
    assert (inputs == np.stack([ids for ids, _ in expected[35:40]])).all()
    assert (targets == np.stack([targets for _, targets in expected[35:40]])).all()


def test_epochs_and_seeds_differ():
    lengths = [4] * 64
    one, other = rows_of(lengths), rows_of(lengths, seed=1)
    n = one.rows_per_epoch
    first = [one.row(number)[0].tolist() for number in range(n)]
    assert first != [one.row(number)[0].tolist() for number in range(n, 2 * n)]
    assert first != [other.row(number)[0].tolist() for number in range(n)]
