"""The token cache, and rows as a pure function of (seed, row number)."""

import json
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nanochat.common import UsageError
from nanochat.data import sources
from nanochat.data.rows import Rows, check_disk, held_out_pieces, token_cache_bytes
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


def test_64_ranks_read_each_row_once(tmp_path, monkeypatch):
    """8 machines of 8 ranks, with caches of their own and fewer shards than ranks. Each rank has
    rows in every step, those of one rank in another order of places; each machine tokenizes the
    shards that are read, once, and no others."""
    monkeypatch.setattr(sources, "EAGER_BYTES", 0)
    built = Counter()
    encode = TokenCache._encode

    def counted_encode(cache, shard):
        built[os.environ["NANOCHAT_BASE_DIR"], shard.fingerprint] += 1
        return encode(cache, shard)

    one = make_rows(tmp_path, [documents(150, i) for i in range(5)], T=8)
    n_ranks, device_batch, micros, steps = 64, 2, 2, 3
    per_step = n_ranks * device_batch * micros
    whole = [one.batch(step, per_step, 0, per_step, 0, 1) for step in range(steps)]
    read = [one.locate(number) for number in range(steps * per_step)]
    assert len(set(read)) == len(read)
    used = {one.shards[place.shard_index].fingerprint for place in read}
    assert 1 < len(used) < len(one.shards)

    monkeypatch.setattr(TokenCache, "_encode", counted_encode)
    machines = [str(tmp_path / f"caches{i}") for i in range(8)]
    ranks = [Rows(one.corpus, TokenCache(BYTE, 1), 8, one.seed) for _ in range(n_ranks)]
    for step, (inputs, targets) in enumerate(whole):
        for micro in range(micros):
            parts = []
            for rank, rows in enumerate(ranks):
                monkeypatch.setenv("NANOCHAT_BASE_DIR", machines[rank // 8])
                parts.append(rows.batch(step, per_step, micro, device_batch, rank, n_ranks))
            here = slice(micro * per_step // micros, (micro + 1) * per_step // micros)
            assert np.array_equal(np.concatenate([part[0] for part in parts]), inputs[here])
            assert np.array_equal(np.concatenate([part[1] for part in parts]), targets[here])
    assert built == {(machine, shard): 1 for machine in machines for shard in used}


def test_ranks_of_a_machine_that_want_a_shard_at_once(tmp_path, monkeypatch):
    """One tokenizes it, the others wait for that."""
    rows = make_rows(tmp_path, [documents(50, 1)], T=8)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "caches"))
    encode, built, together = TokenCache._encode, [], threading.Barrier(8)

    def counted_encode(cache, shard):
        built.append(shard)
        return encode(cache, shard)

    def batch_of(rank):
        own = Rows(rows.corpus, TokenCache(BYTE, 1), 8, rows.seed)
        together.wait(10)
        return own.batch(0, 8, 0, 1, rank, 8)[0]

    monkeypatch.setattr(TokenCache, "_encode", counted_encode)
    with ThreadPoolExecutor(8) as ranks:
        found = np.concatenate(list(ranks.map(batch_of, range(8))))
    assert np.array_equal(found, rows.batch(0, 8, 0, 8, 0, 1)[0]) and len(built) == 1


def test_what_a_horizon_needs_on_the_disk(tmp_path, monkeypatch):
    """Tokens of two bytes, of the shards that it reads and that are not there yet."""
    monkeypatch.setattr(sources, "EAGER_BYTES", 0)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "caches"))
    rows = make_rows(tmp_path, [["a" * 2047]] * 4, T=64)
    epoch = 4 * 2048
    assert token_cache_bytes(1e9, epoch, 257) == 2 * epoch
    assert token_cache_bytes(100, epoch, 1 << 17) == 400
    words = "disk: 4 more shards, 0 B of downloads and 16.0 KiB of token cache on each machine; "
    assert check_disk(rows, 3 * epoch, epoch).startswith(words)
    assert "2 more shards, 0 B of downloads and 8.0 KiB" in check_disk(rows, epoch / 2, epoch)
    rows.cache.prepare(rows.shards, list)
    assert check_disk(rows, epoch, epoch) == ""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=16000))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    rows = Rows(rows.corpus, TokenCache(BYTE, 1), 64, rows.seed)
    with pytest.raises(UsageError, match="16.0 KiB of token cache, and the disk has 15.6 KiB free"):
        check_disk(rows, epoch, epoch)
    # more than that is never kept
    monkeypatch.setattr("nanochat.data.rows.CACHE_LIMIT_BYTES", 10000)
    assert "9.8 KiB of token cache" in check_disk(rows, epoch, epoch)


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
