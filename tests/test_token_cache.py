"""Token files: built once, shared, checked, trimmed."""

import fcntl
import hashlib
import os
import tracemalloc

import numpy as np
import pytest
from disk import read_only
from safetensors import safe_open

from nanochat.common import Unavailable, UsageError
from nanochat.data.sources import file_shard, local_corpus
from nanochat.data.token_cache import TokenCache, _digest, fit_tokenizer, trim_cache
from nanochat.data.tokenizer import train_tokenizer

BYTE = train_tokenizer("byte", [], -1)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


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


def test_the_cache_limit_leaves_the_files_of_others(tmp_path, monkeypatch):
    folder = tmp_path / "tokens" / "x"
    folder.mkdir(parents=True)
    for age, name in enumerate("ab"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(b"0" * 100)
        os.utime(path, (age, age))
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    trim_cache(tmp_path / "tokens", keep=set(), limit_bytes=0)
    assert len(os.listdir(folder)) == 2
    monkeypatch.undo()
    trim_cache(tmp_path / "tokens", keep=set(), limit_bytes=0)
    assert os.listdir(folder) == []


def test_a_cache_that_cannot_be_written_is_read(shared_base):
    """What it lacks is built in the user's own, and its files are as readable as the umask says."""
    shards = [
        file_shard([write(shared_base.parent / name, f"text of {name} " * 40)])
        for name in ("a.txt", "b.txt")
    ]
    before = os.umask(0o022)
    TokenCache(BYTE, threads=1).tokens(shards[0])
    with read_only(shared_base):
        cache = TokenCache(BYTE, threads=1)
        lengths = [cache.length(shard) for shard in shards]
    os.umask(before)
    paths = [cache.path(shards[0]), next((shared_base.parent / "home").rglob("*.safetensors"))]
    assert lengths == [14 * 40 + 1] * 2
    assert paths[0].is_relative_to(shared_base)
    assert [path.stat().st_mode & 0o777 for path in paths] == [0o644] * 2


def test_a_tokenizer_that_cannot_be_kept(shared_base, monkeypatch):
    """Neither in the shared folder of caches nor in a home folder."""
    monkeypatch.setenv("HOME", str(shared_base))
    text = shared_base.parent / "a.txt"
    text.write_text("some words\n<|endoftext|>\n" * 50)
    corpus = local_corpus(str(text))
    with read_only(shared_base):
        with pytest.raises(Unavailable, match="Permission denied.*NANOCHAT_BASE_DIR"):
            fit_tokenizer(corpus, "char", -1)


def test_opening_holds_no_copy_of_the_ids(tmp_path):
    """The checksum, over ids and offsets as one string of bytes, is taken of a part of them at a
    time."""
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
