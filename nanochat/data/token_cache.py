"""Token ids of shards, one file a shard, and the tokenizer that makes them.

Where cached() says:
    tokenizers/<key>/                        fitted tokenizers, by text, kind and size
    tokens/<tokenizer>/<shard>.safetensors   ids and offsets of a shard, by fingerprints"""

import array
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nanochat import locks
from nanochat.common import (
    Report,
    Unavailable,
    UsageError,
    apply_umask,
    cached,
    ceil_div,
    human_bytes,
    human_time,
    sha256_hex,
)
from nanochat.data.download import DownloadFailed
from nanochat.data.sources import Corpus, Shard
from nanochat.data.text import Piece, cut_at_blanks
from nanochat.data.tokenizer import (
    BPE_PATTERNS,
    SPLIT_PATTERN,
    TOKENIZER_FILE,
    TRAINED_TOKENIZERS,
    Tokenizer,
    derived_vocab_size,
    gpt2_tokenizer,
    id_dtype,
    read_tokenizer,
    train_tokenizer,
)
from nanochat.ranks import from_rank0_or_raise, print0

CACHE_LIMIT_BYTES = 100 << 30
# text that BPE training reads at most
BPE_SAMPLE_BYTES = 200 << 20
# text that is encoded in one call
ENCODE_BYTES = 8 << 20
# a shard of more text gets a line when it is tokenized
ANNOUNCE_BYTES = 64 << 20
# ids of a token file that its checksum reads at a time
CHECK_IDS = 1 << 20
# token files kept open
OPEN_SHARDS = 8

# of a disk that refuses a file
REMEDY = "free some space, or name another folder for caches by NANOCHAT_BASE_DIR"
T = TypeVar("T")


class DataFailed(Unavailable):
    """Training data is unavailable: a download failed for good, or the disk is full."""


# --------------------------------------------------------------------------------------------------
# the tokenizer of a run


def load_tokenizer(
    name: str,
    vocab_size: int,
    corpus: Corpus,
    *,
    of_run: Path | None = None,
    of_source: Path | None = None,
    chosen: bool = True,
) -> Tokenizer:
    """The tokenizer of a run, loaded or fitted by rank 0 for all ranks.

    name, vocab_size: of --tokenizer and --vocab-size (-1: derived from the corpus). of_run: folder
    with the tokenizer of the run that is resumed, which wins over everything else. of_source:
    folder with that of --init-from, which is used unless the user chose `name` on the command line.
    Raises UsageError if the chosen tokenizer is not that of --init-from, or cannot be read."""

    def load() -> Tokenizer:
        if of_run:
            return read_tokenizer(of_run)
        if of_source and not chosen:
            return read_tokenizer(of_source)
        if name in TRAINED_TOKENIZERS:
            return fit_tokenizer(corpus, name, vocab_size)
        if name == "gpt2":
            return gpt2_tokenizer()
        return read_tokenizer(name)

    # it may be trained or downloaded, which each machine, and each rank of it, would do again
    tokenizer = from_rank0_or_raise(load)
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


def fit_tokenizer(corpus: Corpus, name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of one of TRAINED_TOKENIZERS, trained on the training shards of a corpus.

    A char tokenizer is trained on all text, so that validation has no unknown character.
    vocab_size: -1 derives it from the size of the text. The result is kept where cached() says.
    Raises UsageError for a char tokenizer of a corpus that is not eager, Unavailable if the disk
    refuses the result."""
    if name == "byte":
        return train_tokenizer("byte", [], -1)
    vocab_size, folder = _fitted(corpus, name, vocab_size)
    if (folder / TOKENIZER_FILE).exists():
        return read_tokenizer(folder)
    if name == "char" and not corpus.eager:
        raise UsageError(
            f"--tokenizer=char: needs to see all text, and {corpus.name} is too large for that "
            f"({human_bytes(corpus.train_bytes)}); use bpe or byte"
        )
    shards = shards_to_fit(corpus, name, vocab_size)
    # their words are those of the documents, of which any may be large
    pieces = cut_at_blanks(itertools.chain.from_iterable(shard.pieces() for shard in shards))
    if name in BPE_PATTERNS:
        pieces = _first_characters(pieces, BPE_SAMPLE_BYTES)
    fitted = train_tokenizer(name, (piece.text for piece in pieces), vocab_size)
    try:
        fitted.save(folder)
    except OSError as error:
        raise Unavailable(
            f"the tokenizer cannot be written to {folder} ({error.strerror or error}); {REMEDY}"
        ) from None
    return fitted


def _fitted(corpus: Corpus, name: str, vocab_size: int) -> tuple[int, Path]:
    """(vocabulary size, folder where it is kept) of a tokenizer that is fitted to a corpus."""
    if name in BPE_PATTERNS and vocab_size == -1:
        vocab_size = derived_vocab_size(corpus.train_bytes)
    # another pattern makes another tokenizer of the same text
    identity = [name, vocab_size, BPE_PATTERNS.get(name, SPLIT_PATTERN), corpus.fingerprint]
    key = sha256_hex(json.dumps(identity))[:32]
    return vocab_size, cached("tokenizers", key, TOKENIZER_FILE).parent


def shards_to_fit(corpus: Corpus, name: str, vocab_size: int) -> list[Shard]:
    """The shards that fit_tokenizer() still has to read for this tokenizer.

    None if it is kept or needs no text; for bpe evenly spread ones of about BPE_SAMPLE_BYTES, of a
    large remote corpus the first."""
    if name not in (*BPE_PATTERNS, "char"):
        return []
    _, folder = _fitted(corpus, name, vocab_size)
    if (folder / TOKENIZER_FILE).exists():
        return []
    if name == "char":
        return corpus.train + corpus.val
    return corpus.train[:: max(1, ceil_div(corpus.train_bytes, BPE_SAMPLE_BYTES))]


def _first_characters(pieces: Iterable[Piece], n_characters: int) -> Iterator[Piece]:
    """The pieces of the first documents, about n_characters of them in all."""
    for piece in pieces:
        yield piece
        n_characters -= len(piece.text)
        if piece.ends and n_characters <= 0:
            return


# --------------------------------------------------------------------------------------------------
# token files


class TokenCache:
    """Token ids of shards, tokenized when first needed, shared by all runs and ranks of a machine.

    For one thread. threads: that encode. lengths: {shard fingerprint: tokens} of every shard seen;
    a resumed run brings those of its checkpoint along, so that finding a row needs no shard but its
    own. report: gets a line on each fault, and on each large shard that is tokenized."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        threads: int,
        lengths: dict[str, int] | None = None,
        report: Report = print,
    ) -> None:
        self.tokenizer = tokenizer
        self.threads = threads
        self.report = report
        self.lengths = dict(lengths or {})
        # shard fingerprint -> what tokens() returns; the last few only
        self.opened: dict[str, tuple[Any, np.ndarray]] = {}

    def path(self, shard: Shard) -> Path:
        """The token file of a shard, which may not exist."""
        return self._path(shard.fingerprint)

    def _path(self, fingerprint: str) -> Path:
        folder = self.tokenizer.fingerprint[:32]
        return cached("tokens", folder, f"{fingerprint[:32]}.safetensors")

    def length(self, shard: Shard) -> int:
        """Tokens of a shard, the BOS after each document included. Raises as tokens()."""
        if shard.fingerprint not in self.lengths:
            self.tokens(shard)
        return self.lengths[shard.fingerprint]

    def tokens(self, shard: Shard) -> tuple[Any, np.ndarray]:
        """(ids, offsets) of a shard: ids of all documents, and the n + 1 places where they start.

        ids: read lazily, ids[a:b] is a numpy array of uint16 or uint32; a BOS follows each
        document. offsets: int64. A shard without a file is tokenized first, which downloads remote
        text. A damaged file raises UsageError: the disk may be failing, so it is not silently
        replaced. Raises DataFailed when the text is unavailable, or the disk or memory is full."""
        if shard.fingerprint not in self.opened:
            opened = self._built_and_opened(shard)
            while len(self.opened) >= OPEN_SHARDS:
                self.opened.pop(next(iter(self.opened)))
            self.opened[shard.fingerprint] = opened
            self.lengths[shard.fingerprint] = int(opened[1][-1])
        return self.opened[shard.fingerprint]

    def _built_and_opened(self, shard: Shard) -> tuple[Any, np.ndarray]:
        """tokens() of a shard that is not open. Raises as tokens()."""
        from safetensors import SafetensorError

        path = self.path(shard)
        try:
            # a complete file needs no lock: its folder may be one that cannot be written
            with contextlib.suppress(FileNotFoundError):
                return self._open(shard, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with locks.open_lock(path.with_suffix(".lock")) as lock:
                # other ranks and runs wait here and then find the file
                state = locks.take(lock, path.parent, wait=True, report=self.report)
                while True:
                    if not path.exists():
                        self._build(shard, path, state is locks.Lock.TAKEN)
                    # another process may trim the file just now: then it is built again
                    with contextlib.suppress(FileNotFoundError):
                        return self._open(shard, path)
        except DownloadFailed as error:
            raise DataFailed(str(error)) from None
        except MemoryError:
            raise DataFailed(
                f"token cache: there is not enough memory to tokenize {shard.name}, which is in "
                f"memory as token ids, twice; split it into several files"
            ) from None
        except (OSError, SafetensorError) as error:
            raise DataFailed(f"token cache: {path} cannot be written ({error}); {REMEDY}") from None

    def _build(self, shard: Shard, path: Path, locked: bool) -> None:
        """Tokenize a shard into its file.

        locked: the caller holds its lock; otherwise other processes may do the same meanwhile."""
        from safetensors.numpy import save_file

        started = time.monotonic()
        # of a process that was killed, since the lock is ours; another user's may have to stay
        abandoned = path.parent.glob(f"{path.stem}.*.partial") if locked else ()
        for left in abandoned:
            with contextlib.suppress(OSError):
                left.unlink()
        ids, offsets = self._encode(shard)
        partial = path.with_suffix(f".{secrets.token_hex(4)}.partial")
        try:
            metadata = {"sha256": _digest([ids, offsets])}
            save_file({"ids": ids, "offsets": offsets}, partial, metadata=metadata)
            with partial.open("rb") as f:
                os.fsync(f.fileno())
            # safetensors makes its files private
            apply_umask(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        if shard.n_bytes >= ANNOUNCE_BYTES:
            seconds = human_time(time.monotonic() - started)
            self.report(f"tokenized {shard.name}: {len(ids):,} tokens in {seconds}")
        in_use = {path, *(self._path(fingerprint) for fingerprint in self.opened)}
        trim_cache(path.parent.parent, keep=in_use)

    def _encode(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets) of a shard, as its file holds them."""
        dtype = id_dtype(self.tokenizer.vocab_size)
        bos = np.array([self.tokenizer.bos], dtype=dtype)
        arrays = [np.empty(0, dtype)]
        offsets = array.array("q", [0])
        n_ids = 0
        # in pieces, so that memory is that of the ids, whatever the size of a document
        found = cut_at_blanks(shard.pieces(self.report))
        for pieces in by_size(found, ENCODE_BYTES, _characters):
            encoded = self.tokenizer.encode_batch([piece.text for piece in pieces], self.threads)
            parts = []
            for piece, ids in zip(pieces, encoded, strict=True):
                parts.append(ids.astype(dtype))
                n_ids += len(ids)
                if piece.ends:
                    parts.append(bos)
                    n_ids += 1
                    offsets.append(n_ids)
            # one array for each batch: the parts of millions of documents would take more room
            arrays.append(np.concatenate(parts))
        return _joined(arrays), np.array(offsets, dtype=np.int64)

    def _open(self, shard: Shard, path: Path) -> tuple[Any, np.ndarray]:
        """tokens() of an existing file, whose checksum is compared first, and which counts as used.

        Raises FileNotFoundError, or UsageError if the file is damaged."""
        from safetensors import SafetensorError, safe_open

        # trim_cache() drops what was not used for longest; another user's file cannot be marked
        with contextlib.suppress(PermissionError):
            os.utime(path)
        try:
            opened = safe_open(path, framework="numpy")
            ids = opened.get_slice("ids")
            offsets = opened.get_tensor("offsets")
            n = ids.get_shape()[0]
            pieces = (ids[i : min(n, i + CHECK_IDS)] for i in range(0, n, CHECK_IDS))
            intact = opened.metadata()["sha256"] == _digest(itertools.chain(pieces, [offsets]))
        except FileNotFoundError:
            raise
        except (SafetensorError, KeyError, IndexError, TypeError, OSError):
            intact = False
        if not intact:
            raise UsageError(
                f"token cache: {path} is damaged (its checksum does not match); check the disk, "
                f"then delete the file: the next start builds it again from {shard.name}"
            )
        return ids, offsets

    def prepare(
        self, shards: list[Shard], progress: Callable[[list[Shard]], Iterable[Shard]]
    ) -> None:
        """Tokenize all of `shards` that have no file.

        progress: makes an iterable, such as a progress bar, of the shards that are tokenized."""
        for shard in progress([shard for shard in shards if not self.path(shard).exists()]):
            self.tokens(shard)


def _digest(arrays: Iterable[np.ndarray]) -> str:
    """Hex SHA-256 over the bytes of arrays, one after another."""
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(memoryview(np.ascontiguousarray(values)))
    return digest.hexdigest()


def _characters(piece: Piece) -> int:
    return len(piece.text)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """np.concatenate() of arrays, which are dropped from their list so that not all are held."""
    joined = np.empty(sum(map(len, arrays)), arrays[0].dtype)
    end = len(joined)
    while arrays:
        ids = arrays.pop()
        joined[end - len(ids) : end] = ids
        end -= len(ids)
    return joined


def by_size(
    items: Iterable[T], n_characters: int, size_of: Callable[[T], int] = len
) -> Iterator[list[T]]:
    """Lists of consecutive documents or pieces, each of about n_characters, so that not all are
    held. size_of: characters of one."""
    batch = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= n_characters:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def trim_cache(folder: Path, keep: set[Path], limit_bytes: int = CACHE_LIMIT_BYTES) -> None:
    """Delete the least recently used token files beyond limit_bytes; those in `keep` stay.

    Files of other users neither count nor vanish. Other processes may do the same meanwhile."""
    files = []
    # of all tokenizers, since the limit is for the whole cache
    for path in folder.glob("*/*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if found.st_uid == os.geteuid():
                files.append((found.st_mtime, found.st_size, path))
    excess = sum(size for _, size, _ in files) - limit_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        if path not in keep:
            excess -= size
            path.unlink(missing_ok=True)
