"""Batches and shards that are prepared ahead of training."""

import queue
import threading

import pytest
from test_rows import BYTE, documents, make_rows

from nanochat.common import UsageError
from nanochat.data.prefetch import Ahead, Interrupted, Prefetcher
from nanochat.data.rows import Rows
from nanochat.data.sources import Corpus, file_shard
from nanochat.data.token_cache import DataFailed, TokenCache
from nanochat.data.tokenizer import Tokenizer


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


@pytest.mark.parametrize(
    "spoil, error, words",
    [
        ("not UTF-8", UsageError, "b.jsonl line 2 is not UTF-8"),
        ("memory", DataFailed, "not enough memory to tokenize b.jsonl"),
    ],
)
def test_a_text_that_fails_when_it_is_read_ahead(tmp_path, monkeypatch, spoil, error, words):
    """Training can save its state: the error is one of the two that it expects, with the place."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    line = b'{"text": "some text that is read first"}\n'
    fine = line * 50
    broken = fine.replace(b"first", b"caf\xe9") if spoil == "not UTF-8" else fine
    for name, content in (("a.jsonl", fine), ("b.jsonl", line + broken)):
        (tmp_path / name).write_bytes(content)
    shards = [file_shard([tmp_path / name]) for name in ("a.jsonl", "b.jsonl")]
    cache = TokenCache(BYTE, 1)
    # the first is tokenized, the second read ahead
    monkeypatch.setattr(Rows, "shard_order", lambda self, epoch: [0, 1])
    rows = Rows(Corpus("a and b", shards, [], ""), cache, 16, seed=0)
    first = rows.shard_rows(0)
    if spoil == "memory":
        monkeypatch.setattr(Tokenizer, "encode_batch", out_of_memory)
    reports = queue.Queue()
    ahead = Ahead(rows, first, lambda: first + 1, reports.put)
    assert words in reports.get(timeout=10)
    ahead.close()
    ahead.thread.join(10)
    assert not ahead.thread.is_alive()
    batches = Prefetcher(rows.row(i) for i in range(first + 1))
    for _ in range(first):
        next(batches)
    with pytest.raises(error, match=words):
        next(batches)
    batches.close()


def out_of_memory(*_):
    raise MemoryError


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
    with pytest.raises(Interrupted):
        next(prefetcher)
    come.set()
    assert next(prefetcher) == 2
    prefetcher.close()
