"""The token cache, and rows as a pure function of (seed, row number)."""

import json

import numpy as np
import pytest

from nanochat.common import UsageError
from nanochat.data.rows import Rows, held_out_pieces
from nanochat.data.sources import Corpus, file_shard
from nanochat.data.token_cache import TokenCache
from nanochat.data.tokenizer import train_tokenizer

BYTE = train_tokenizer("byte", [], -1)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def make_rows(tmp_path, documents_by_file, T, seed=1):
    folder = tmp_path / "docs"
    folder.mkdir(exist_ok=True)
    shards = []
    for i, documents in enumerate(documents_by_file):
        path = folder / f"{i:03}.jsonl"
        write(path, "".join(json.dumps({"text": d}) + "\n" for d in documents))
        shards.append(file_shard([path]))
    return Rows(Corpus("docs", shards, [], ""), TokenCache(BYTE, threads=1), T, seed)


def documents(n, seed=0):
    """n documents of 1 to 60 random letters."""
    generator = np.random.default_rng(seed)
    return [
        "".join(generator.choice(list("abcdefghij"), generator.integers(1, 60))) for _ in range(n)
    ]


def test_an_epoch_holds_every_token_once_but_the_ring_ends(tmp_path):
    files = [documents(40, 1), documents(7, 2), documents(60, 3)]
    rows = make_rows(tmp_path, files, T=32)
    n = rows.tokens_per_epoch() // rows.T
    for epoch in range(2):
        seen = np.concatenate([rows.row(epoch * n + i)[1:] for i in range(n)])
        stored = np.concatenate([BYTE.encode_batch([d])[0] for file in files for d in file])
        kept = np.bincount(seen, minlength=257)
        whole = np.bincount(stored, minlength=257)
        whole[BYTE.bos] = sum(map(len, files))
        assert (kept <= whole).all()
        assert whole.sum() - kept.sum() < 3 * 32
    assert rows.share_dropped() == pytest.approx(1 - n * 32 / whole.sum())


def test_rows_begin_with_bos_and_hold_consecutive_text(tmp_path):
    files = [documents(30, 4)]
    rows = make_rows(tmp_path, files, T=16)
    everything = set(files[0])
    for i in range(rows.tokens_per_epoch() // rows.T):
        row = rows.row(i)
        assert row.dtype == np.int64 and row.shape == (17,) and row[0] == BYTE.bos
        parts = (
            bytes(np.where(row[1:] == BYTE.bos, ord("|"), row[1:]).astype(np.uint8))
            .decode()
            .split("|")
        )
        assert all(
            whole in everything for whole in parts[1:-1] if whole
        )  # between two BOS stands a whole document
        assert any(document.endswith(parts[0]) or parts[0] in document for document in everything)


def test_order_is_a_function_of_seed_epoch_and_row_alone(tmp_path):
    files = [documents(50, i) for i in range(4)]
    rows, again, other = (make_rows(tmp_path, files, 16, seed) for seed in (7, 7, 8))
    n = rows.tokens_per_epoch() // rows.T
    numbers = list(range(2 * n))
    forward = [rows.row(i).tolist() for i in numbers]
    backward = [again.row(i).tolist() for i in reversed(numbers)][::-1]
    assert forward == backward
    assert forward[:n] != forward[n:], "epochs differ in order and in cut points"
    assert forward[:n] != [other.row(i).tolist() for i in range(n)]
    assert sorted(forward[:n]) != sorted(forward[n:]), "cut points move from epoch to epoch"


def test_steps_take_the_same_rows_on_any_number_of_ranks(tmp_path):
    rows = make_rows(tmp_path, [documents(80, 5)], T=8)
    whole = rows.batch(3, 12, 0, 12, rank=0, world_size=1)
    for world_size, device_batch in ((2, 6), (2, 3), (4, 3), (1, 4), (3, 2)):
        micros = 12 // (world_size * device_batch)
        parts = [
            rows.batch(3, 12, micro, device_batch, rank, world_size)
            for micro in range(micros)
            for rank in range(world_size)
        ]
        for side in (0, 1):
            assert np.array_equal(np.concatenate([part[side] for part in parts]), whole[side])


def test_fewer_rows_than_a_batch_spans_epochs(tmp_path):
    rows = make_rows(tmp_path, [["abcdefgh" * 3]], T=8)
    assert rows.tokens_per_epoch() // rows.T == 3
    inputs, targets = rows.batch(0, 10, 0, 10, 0, 1)
    assert inputs.shape == targets.shape == (10, 8)


def test_too_little_text_is_an_error_with_numbers(tmp_path):
    with pytest.raises(UsageError, match="4 training tokens in 1 shard .* one row of 8"):
        make_rows(tmp_path, [["abc"]], T=8).tokens_per_epoch()


def test_held_out_pieces(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        "".join(json.dumps({"text": d}) + "\n" for d in ("abcdefghij", "klm", "nopqrst")),
    )
    cache = TokenCache(BYTE, 1)

    def pieces(limit):
        return [
            bytes(piece[1:].astype(np.uint8)).decode()
            for piece in held_out_pieces([file_shard([path])], cache, 4, limit)
        ]

    assert pieces(10**9) == ["abcd", "efgh", "ij", "klm", "nopq", "rst"]
    assert pieces(15) == ["abcd", "efgh", "ij", "klm", "no"]
    assert pieces(10) == ["abcd", "efgh", "ij"]
    assert all(
        piece[0] == BYTE.bos for piece in held_out_pieces([file_shard([path])], cache, 4, 99)
    )
