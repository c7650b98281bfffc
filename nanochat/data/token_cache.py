"""Token ids of shards, one file a shard, and the tokenizer that made them."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np

from nanochat.common import Unavailable, UsageError, base_dir, human_bytes, human_time, sha256_hex
from nanochat.data.download import DownloadFailed
from nanochat.data.sources import Corpus, Shard
from nanochat.data.tokenizer import (
    SPLIT_PATTERN,
    TOKENIZER_FILE,
    TOKENIZER_KINDS,
    Tokenizer,
    derived_vocab_size,
    gpt2_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from nanochat.ranks import from_rank0_or_raise, print0

CACHE_LIMIT_BYTES = 100 << 30


BPE_SAMPLE_BYTES = 200 << 20  # text that BPE training reads at most


ENCODE_BYTES = 8 << 20  # text that is encoded at once


ANNOUNCE_BYTES = 64 << 20  # a shard of more text gets a line when it is tokenized


CHECK_IDS = 1 << 20  # ids of a token file that its checksum is taken of at once


OPEN_SHARDS = 8  # token files kept open


class DataFailed(Unavailable):
    """Training data that cannot be had now: a download that failed for good, a full disk."""


def fit_tokenizer(corpus, kind, vocab_size):
    """The tokenizer of a run: trained on the training shards (for char: on all text, so that validation has no unknown).

    vocab_size -1 derives it from the data size. The result is kept under the base dir by data, kind and size."""
    if kind == "byte":
        return train_tokenizer("byte", [], -1)
    vocab_size, folder = _fitted(corpus, kind, vocab_size)
    if (folder / TOKENIZER_FILE).exists():
        return read_tokenizer(folder)
    if kind == "char":
        if not corpus.eager:
            raise UsageError(
                f"--tokenizer=char: needs to see all text, and {corpus.name} is too large for that "
                f"({human_bytes(corpus.train_bytes)}); use bpe or byte"
            )
        texts = (
            document
            for shard in shards_to_fit(corpus, kind, vocab_size)
            for document in shard.documents()
        )
    else:
        texts = _sample_of(shards_to_fit(corpus, kind, vocab_size), BPE_SAMPLE_BYTES)
    fitted = train_tokenizer(kind, texts, vocab_size)
    fitted.save(folder)
    return fitted


def _fitted(corpus, kind, vocab_size):
    """(vocabulary size, folder where it is kept) of a tokenizer that is fitted to a corpus."""
    if kind == "bpe" and vocab_size == -1:
        vocab_size = derived_vocab_size(corpus.train_bytes)
    key = sha256_hex(json.dumps([kind, vocab_size, SPLIT_PATTERN, corpus.fingerprint]))[:32]
    return vocab_size, base_dir() / "tokenizers" / key


def shards_to_fit(corpus, kind, vocab_size):
    """The shards that fit_tokenizer() still has to read for this tokenizer: none if it is kept or needs no text; for bpe
    evenly spread ones of about BPE_SAMPLE_BYTES, of a large remote corpus the first."""
    if (
        kind not in ("bpe", "char")
        or (_fitted(corpus, kind, vocab_size)[1] / TOKENIZER_FILE).exists()
    ):
        return []
    if kind == "char":
        return corpus.train + corpus.val
    return corpus.train[:: max(1, -(-corpus.train_bytes // BPE_SAMPLE_BYTES))]


def load_tokenizer(
    name: str,
    vocab_size: int,
    corpus: Corpus,
    *,
    of_run: Path | None = None,
    of_source: Path | None = None,
    chosen: bool = True,
) -> Tokenizer:
    """The tokenizer of a run, loaded or fitted by rank 0 and then read by the other ranks.

    name, vocab_size: of --tokenizer and --vocab-size (-1: derived from the corpus). of_run: folder
    with the tokenizer of the run that is resumed, which wins over everything else. of_source: folder
    with that of --init-from, which is used unless the user chose `name` on the command line.
    Raises UsageError if the chosen tokenizer is not that of --init-from, or cannot be read."""

    def load() -> Tokenizer:
        if of_run:
            return read_tokenizer(of_run)
        if of_source and not chosen:
            return read_tokenizer(of_source)
        if name in TOKENIZER_KINDS:
            return fit_tokenizer(corpus, name, vocab_size)
        if name == "gpt2":
            return gpt2_tokenizer()
        return read_tokenizer(name)

    # rank 0 first, alone: it may train or download, and the others then find the result on disk
    from_rank0_or_raise(lambda: load().fingerprint)
    tokenizer = load()
    if of_source and tokenizer.fingerprint != read_tokenizer(of_source).fingerprint:
        raise UsageError(
            f"--tokenizer={name} is not the tokenizer of --init-from ({of_source}), whose weights "
            f"are meaningless with another one; leave --tokenizer out"
        )
    if vocab_size not in (-1, tokenizer.vocab_size):
        print0(
            f"the tokenizer has {tokenizer.vocab_size:,} ids instead of --vocab-size={vocab_size}"
        )
    return tokenizer


def _sample_of(shards, n_bytes):
    """Documents of the shards, about n_bytes of them."""
    for document in itertools.chain.from_iterable(shard.documents() for shard in shards):
        yield document
        n_bytes -= len(document)
        if n_bytes <= 0:
            return


class TokenCache:
    """Token ids of shards, one file a shard, made when first needed and shared by all runs and ranks of a machine.

    lengths: {shard fingerprint: tokens} of every shard seen; a resumed run brings those of its checkpoint along, so that
    finding a row needs no shard but its own."""

    def __init__(self, tokenizer, threads, lengths=None, report=print):
        self.tokenizer, self.threads, self.report = tokenizer, threads, report
        self.folder = base_dir() / "tokens" / tokenizer.fingerprint[:32]
        self.opened, self.lengths = {}, dict(lengths or {})

    def path(self, shard):
        return self.folder / f"{shard.fingerprint[:32]}.safetensors"

    def length(self, shard):
        """Tokens of a shard, the BOS after each document included."""
        if shard.fingerprint not in self.lengths:
            self.tokens(shard)
        return self.lengths[shard.fingerprint]

    def tokens(self, shard):
        """(ids, offsets) of a shard: all documents' ids with a BOS after each, and the n + 1 places where they start.

        ids is a lazily read slice object (ids[a:b] is a numpy array), offsets an int64 array. Made first if there is no
        file, which fetches remote text. A damaged file is a UsageError: the disk may be failing, so it is not silently
        replaced. Raises DataFailed when the text cannot be fetched or the disk is full."""
        from safetensors import SafetensorError

        if shard.fingerprint not in self.opened:
            path = self.path(shard)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(path.with_suffix(".lock"), "w") as lock:
                    fcntl.flock(
                        lock, fcntl.LOCK_EX
                    )  # other ranks and runs wait here and then find the file
                    opened = None
                    while opened is None:
                        if not path.exists():
                            self._build(shard, path)
                        with contextlib.suppress(
                            FileNotFoundError
                        ):  # another process trimmed it just now: it is made again
                            os.utime(path)  # trim_cache() drops what was not used for longest
                            opened = self._open(shard, path)
            except DownloadFailed as error:
                raise DataFailed(str(error)) from None
            except (OSError, SafetensorError) as error:
                raise DataFailed(
                    f"token cache: {path} cannot be written ({error}); free some space, or name another folder for "
                    f"caches by NANOCHAT_BASE_DIR"
                ) from None
            while len(self.opened) >= OPEN_SHARDS:
                self.opened.pop(next(iter(self.opened)))
            self.opened[shard.fingerprint] = opened
            self.lengths[shard.fingerprint] = int(opened[1][-1])
        return self.opened[shard.fingerprint]

    def _build(self, shard, path):
        from safetensors.numpy import save_file

        started = time.monotonic()
        for abandoned in path.parent.glob(
            f"{path.stem}.*.partial"
        ):  # of a process that was killed: the lock is ours
            abandoned.unlink()
        dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        pieces, lengths, bos = (
            [np.empty(0, dtype)],
            [0],
            np.array([self.tokenizer.bos], dtype=dtype),
        )
        for documents in by_size(shard.documents(self.report), ENCODE_BYTES):
            encoded = self.tokenizer.encode_batch(documents, self.threads)
            lengths += [len(ids) + 1 for ids in encoded]
            pieces.append(
                np.concatenate([part for ids in encoded for part in (ids.astype(dtype), bos)])
            )
        ids, offsets = np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64)
        del pieces  # as large as ids
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(
                {"ids": ids, "offsets": offsets},
                partial,
                metadata={"sha256": _digest([ids, offsets])},
            )
            with open(partial, "rb") as f:
                os.fsync(f.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if shard.n_bytes >= ANNOUNCE_BYTES:
            self.report(
                f"tokenized {shard.name}: {len(ids):,} tokens in {human_time(time.monotonic() - started)}"
            )
        trim_cache(
            self.folder.parent,
            keep={path, *(self.folder / f"{name[:32]}.safetensors" for name in self.opened)},
        )

    def _open(self, shard, path):
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(path, framework="numpy")
            ids, offsets = opened.get_slice("ids"), opened.get_tensor("offsets")
            n = ids.get_shape()[0]
            pieces = (ids[i : min(n, i + CHECK_IDS)] for i in range(0, n, CHECK_IDS))
            intact = opened.metadata()["sha256"] == _digest(itertools.chain(pieces, [offsets]))
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, IndexError, TypeError, OSError):
            intact = False
        if not intact:
            raise UsageError(
                f"token cache: {path} is damaged (its checksum does not match); check the disk, then delete "
                f"the file: it is made again from {shard.name} at the next start"
            )
        return ids, offsets

    def prepare(self, shards, progress):
        """Tokenize the shards that are not cached yet. progress: wraps the list (a progress bar, or the list itself)."""
        for shard in progress([shard for shard in shards if not self.path(shard).exists()]):
            self.tokens(shard)


def _digest(arrays):
    """Hex SHA-256 over the bytes of arrays, one after another."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(memoryview(np.ascontiguousarray(array)))
    return digest.hexdigest()


def by_size(documents, n_characters):
    """Lists of consecutive documents, each list of about n_characters, so that not all need be held at once."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= n_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def trim_cache(folder, keep, limit_bytes=CACHE_LIMIT_BYTES):
    """Delete the least recently used token files beyond limit_bytes; those in `keep` stay. Others may do the same meanwhile."""
    files = []
    for path in folder.glob("*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            files.append((found.st_mtime, found.st_size, path))
    excess = sum(size for _, size, _ in files) - limit_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        if path not in keep:
            excess -= size
            path.unlink(missing_ok=True)
