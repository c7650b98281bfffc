"""Batches and shards that are prepared ahead of training."""

import threading

import pytest
from test_rows import BYTE, documents, make_rows

from nanochat.common import UsageError
from nanochat.data.prefetch import Ahead, Prefetcher
from nanochat.data.rows import Rows
from nanochat.data.token_cache import DataFailed, TokenCache


def test_reading_ahead_makes_files_of_known_length(tmp_path):
    """A resumed run brings the lengths of its shards along; the files may be gone."""
    rows = make_rows(tmp_path, [documents(20, i) for i in range(3)], T=16)
    n = rows.tokens_per_epoch() // rows.T
    for shard in rows.shards:
        rows.cache.path(shard).unlink()
    resumed = Rows(rows.corpus, TokenCache(BYTE, 1, rows.cache.lengths), rows.T, rows.seed)
    second = rows.shard_rows(
        rows.shard_order(0)[0]
    )  # the run goes on with the first row of its second shard
    ahead = Ahead(resumed, second, lambda: n, pytest.fail)
    ahead.thread.join(10)
    assert not ahead.thread.is_alive()
    order = [rows.shards[i] for i in rows.shard_order(0)]
    assert [rows.cache.path(shard).exists() for shard in order] == [False, True, True]


def test_prefetcher_keeps_order_and_hands_over_exceptions():
    def numbers():
        yield from range(20)
        raise UsageError("the disk is gone")

    prefetcher = Prefetcher(numbers(), depth=2)
    assert [next(prefetcher) for _ in range(20)] == list(range(20))
    with pytest.raises(UsageError, match="the disk is gone"):
        next(prefetcher)
    prefetcher.close()


def test_prefetcher_closes_while_full():
    prefetcher = Prefetcher(iter(range(10**9)), depth=1)
    next(prefetcher)
    prefetcher.close()
    assert not prefetcher.thread.is_alive()


def test_waiting_for_data_can_be_interrupted():
    """A loop that is told to stop does not wait for a download."""
    come, stop = threading.Event(), threading.Event()

    def batches():
        yield 1
        come.wait(10)
        yield 2

    prefetcher = Prefetcher(batches(), interrupted=stop.is_set)
    assert next(prefetcher) == 1
    stop.set()
    with pytest.raises(DataFailed, match="asked to stop"):
        next(prefetcher)
    come.set()
    assert next(prefetcher) == 2
    prefetcher.close()
