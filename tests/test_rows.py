"""The token cache, and rows as a pure function of (seed, row number)."""

import fcntl
import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open

from nanochat.common import UsageError
from nanochat.data.prefetch import Ahead, Prefetcher
from nanochat.data.rows import Rows, held_out_pieces
from nanochat.data.sources import Corpus, file_shard
from nanochat.data.token_cache import TokenCache, _digest, trim_cache
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


# ----- cache


def test_cache_is_reused_and_damage_is_refused(tmp_path):
    shard = file_shard([write(tmp_path / "a.txt", "cache me " * 40)])
    cache = TokenCache(BYTE, threads=1)
    ids, offsets = cache.tokens(shard)
    assert offsets.tolist() == [0, 361]
    assert (
        ids[0:9].tobytes()
        == np.frombuffer(b"cache me ", dtype=np.uint8).astype(np.uint16).tobytes()
    )
    assert ids[360:361].tolist() == [BYTE.bos]
    path = cache.path(shard)
    made = path.stat().st_ino
    TokenCache(BYTE, threads=1).tokens(shard)
    assert path.stat().st_ino == made
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:-7] + b"?" + whole[-6:], b"", b"not a safetensors file"):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is damaged"):
            TokenCache(BYTE, threads=1).tokens(shard)
    path.unlink()
    TokenCache(BYTE, threads=1).tokens(shard)
    assert path.read_bytes() == whole


def test_cache_limit_drops_the_least_recently_used(tmp_path):
    folder = tmp_path / "tokens" / "x"
    folder.mkdir(parents=True)
    files = [folder / f"{name}.safetensors" for name in "abcd"]
    for age, path in enumerate(files):
        path.write_bytes(b"0" * 100)
        os.utime(path, (age, age))
    trim_cache(tmp_path / "tokens", keep={files[0]}, limit_bytes=250)
    assert [path.name[0] for path in files if path.exists()] == ["a", "d"]


def test_opening_holds_no_copy_of_the_ids(tmp_path):
    """The checksum, over ids and offsets as one string of bytes, is taken of a part of them at a time."""
    shard = file_shard([write(tmp_path / "a.txt", "cache me " * 300_000)])
    made = TokenCache(BYTE, threads=1)
    made.tokens(shard)
    with safe_open(made.path(shard), framework="numpy") as f:
        content = f.get_tensor("ids").tobytes() + f.get_tensor("offsets").tobytes()
        assert f.metadata()["sha256"] == hashlib.sha256(content).hexdigest()
    tracemalloc.start()
    try:
        TokenCache(BYTE, threads=1).tokens(shard)
        assert tracemalloc.get_traced_memory()[1] < 0.9 * len(content)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        _digest([np.zeros(2_000_000, np.uint16)])
        assert tracemalloc.get_traced_memory()[1] - before < 1.5 * 4_000_000
    finally:
        tracemalloc.stop()


def test_a_file_that_another_process_trims_is_made_again(tmp_path, monkeypatch):
    """Between building and opening, both under the lock that other ranks and runs wait for."""
    shard = file_shard([write(tmp_path / "a.txt", "trimmed " * 40)])
    cache, really_open, opened = TokenCache(BYTE, threads=1), TokenCache._open, []

    def trim_and_open(self, shard, path):
        with open(path.with_suffix(".lock")) as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.append(path.stat().st_ino)
        if len(opened) < 3:
            path.rename(
                path.with_suffix(f".{len(opened)}")
            )  # kept, so that its inode is not used again
        return really_open(self, shard, path)

    monkeypatch.setattr(TokenCache, "_open", trim_and_open)
    ids, offsets = cache.tokens(shard)
    assert bytes(ids[0:8].astype(np.uint8)) == b"trimmed " and offsets.tolist() == [0, 321]
    assert len(set(opened)) == 3


def test_trimming_while_others_trim(tmp_path):
    """Files that vanish between listing, looking and deleting are no error."""
    folder = tmp_path / "tokens" / "x"
    folder.mkdir(parents=True)
    (folder / "gone.safetensors").symlink_to(folder / "nowhere")
    files = [folder / f"{name}.safetensors" for name in "abc"]
    for age, path in enumerate(files):
        path.write_bytes(b"0" * 100)
        os.utime(path, (age, age))

    class Deleting:
        def __contains__(self, path):
            path.unlink()
            return False

    trim_cache(tmp_path / "tokens", keep=Deleting(), limit_bytes=150)
    assert [path.name[0] for path in files if path.exists()] == ["c"]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    characters = "".join(chr(c) for c in range(0x10000, 0x10000 + 65600))
    tokenizer = train_tokenizer("char", [characters], -1)
    ids, _ = TokenCache(tokenizer, 1).tokens(file_shard([write(tmp_path / "a.txt", characters)]))
    assert ids[65590:65600].tolist() == list(range(65590, 65600))


# ----- rows


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
    with pytest.raises(UsageError, match="4 training tokens in 1 shards .* one row of 8"):
        make_rows(tmp_path, [["abc"]], T=8).tokens_per_epoch()


# ----- reading ahead, validation pieces, prefetching


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
