"""Token ids in, training rows out: shards of documents -> cached token ids -> rows -> batches.

Row g of a run (g counts rows from the start of training, over all epochs) is a pure function of (seed, g) and of the
shards before it:

1. the shards of epoch e follow a permutation of the full list drawn from (seed, e);
2. inside a shard the documents are permuted, each followed by BOS, and the resulting ring of tokens is turned by a
   random offset, so that cuts fall elsewhere in every epoch;
3. the ring is cut into pieces of T tokens; the pieces, each behind a BOS, are the shard's rows, in permuted order.

Every token is a target once an epoch, except fewer than T at the end of each ring (share_dropped says how many).
A document cut by a row goes on in another row after a BOS. No state is kept: resuming is asking for row g. A large corpus
is fetched and tokenized shard by shard, ahead of the rows that are read (Ahead)."""

import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import queue
import shutil
import threading
import time

import numpy as np

from nanochat.common import (
    Unavailable,
    UsageError,
    base_dir,
    human_bytes,
    human_time,
    sha256_hex,
    stream_seed,
)
from nanochat.data import tokenizer as tokenizers
from nanochat.data.hub import DownloadFailed
from nanochat.ranks import from_rank0_or_raise, print0

CACHE_LIMIT_BYTES = 100 << 30
BPE_SAMPLE_BYTES = 200 << 20  # text that BPE training reads at most
ENCODE_BYTES = 8 << 20  # text that is encoded at once
ANNOUNCE_BYTES = 64 << 20  # a shard of more text gets a line when it is tokenized
CHECK_IDS = 1 << 20  # ids of a token file that its checksum is taken of at once
OPEN_SHARDS = 8  # token files kept open
AHEAD_SHARDS = 4  # shards fetched and tokenized beyond the one that training reads
AHEAD_RETRY_SECONDS = 30.0


class DataFailed(Unavailable):
    """Training data that cannot be had now: a download that failed for good, a full disk."""


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and token cache


def fit_tokenizer(corpus, kind, vocab_size):
    """The tokenizer of a run: trained on the training shards (for char: on all text, so that validation has no unknown).

    vocab_size -1 derives it from the data size. The result is kept under the base dir by data, kind and size."""
    if kind == "byte":
        return tokenizers.train("byte", [], -1)
    vocab_size, folder = _fitted(corpus, kind, vocab_size)
    if (folder / tokenizers.FILE_NAME).exists():
        return tokenizers.load(folder)
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
    fitted = tokenizers.train(kind, texts, vocab_size)
    fitted.save(folder)
    return fitted


def _fitted(corpus, kind, vocab_size):
    """(vocabulary size, folder where it is kept) of a tokenizer that is fitted to a corpus."""
    if kind == "bpe" and vocab_size == -1:
        vocab_size = tokenizers.derived_vocab_size(corpus.train_bytes)
    key = sha256_hex(json.dumps([kind, vocab_size, tokenizers.SPLIT_PATTERN, corpus.fingerprint]))[
        :32
    ]
    return vocab_size, base_dir() / "tokenizers" / key


def shards_to_fit(corpus, kind, vocab_size):
    """The shards that fit_tokenizer() still has to read for this tokenizer: none if it is kept or needs no text; for bpe
    evenly spread ones of about BPE_SAMPLE_BYTES, of a large remote corpus the first."""
    if (
        kind not in ("bpe", "char")
        or (_fitted(corpus, kind, vocab_size)[1] / tokenizers.FILE_NAME).exists()
    ):
        return []
    if kind == "char":
        return corpus.train + corpus.val
    return corpus.train[:: max(1, -(-corpus.train_bytes // BPE_SAMPLE_BYTES))]


def load_tokenizer(args, corpus, of_run, of_source):
    """The tokenizer of a run: the resumed run's (folder of_run), that of --init-from (of_source), or what --tokenizer says.

    Made on rank 0, read by the others. UsageError if --tokenizer contradicts --init-from."""

    def load():
        if of_run or of_source and "tokenizer" not in args.given:
            return tokenizers.load(of_run or of_source)
        if args.tokenizer in tokenizers.KINDS:
            return fit_tokenizer(corpus, args.tokenizer, args.vocab_size)
        return tokenizers.gpt2() if args.tokenizer == "gpt2" else tokenizers.load(args.tokenizer)

    from_rank0_or_raise(lambda: load().fingerprint)
    tokenizer = load()
    if of_source and tokenizer.fingerprint != tokenizers.load(of_source).fingerprint:
        raise UsageError(
            f"--tokenizer={args.tokenizer}: not the tokenizer of --init-from={args.init_from}, whose weights mean nothing "
            f"to another; leave the flag out"
        )
    if args.vocab_size not in (-1, tokenizer.vocab_size):
        print0(
            f"the text yields a vocabulary of {tokenizer.vocab_size:,} instead of --vocab-size={args.vocab_size}"
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


# ---------------------------------------------------------------------------------------------------------------------
# rows and batches


class Rows:
    """Random access to the rows of training, as the module docstring defines them.

    Only the shards up to a row's own are looked at, and of those before it only the lengths."""

    def __init__(self, corpus, cache, row_tokens, seed):
        self.corpus, self.cache, self.T, self.seed = corpus, cache, row_tokens, seed
        self.shards = corpus.train
        self.plans = {}  # (epoch, shard) -> what _plan() returns; the last few only
        self.visits, self.ends = (
            [],
            [],
        )  # (epoch, shard index) in reading order, and the number of rows up to its end
        self.reading = 0  # place in `visits` of the last row read

    def shard_rows(self, shard_index):
        """Number of rows of a shard, the same in every epoch."""
        return self.cache.length(self.shards[shard_index]) // self.T

    def shard_order(self, epoch):
        """Indices of the shards in the order in which an epoch reads them."""
        return (
            np.random.default_rng(stream_seed(self.seed, "shards", epoch))
            .permutation(len(self.shards))
            .tolist()
        )

    def first_shards(self):
        """The shards to tokenize before step 0: all of a small corpus, of a large one the first that is read (none if its
        length is known already: a run that is resumed later in its data may never need it again)."""
        return (
            self.shards
            if self.corpus.eager
            else [
                shard
                for shard in self._counted_shards()
                if shard.fingerprint not in self.cache.lengths
            ]
        )

    def _counted_shards(self):
        """The shards from which the tokens of an epoch are counted or estimated."""
        return self.shards if self.corpus.eager else [self.shards[self.shard_order(0)[0]]]

    def tokens_per_epoch(self):
        """Training tokens of one pass; of a large corpus an estimate from the first shard. UsageError, with numbers, if
        there is not even one row."""
        known = self._counted_shards()
        tokens = sum(self.cache.length(shard) for shard in known)
        rows = sum(self.cache.length(shard) // self.T for shard in known)
        if rows == 0:
            raise UsageError(
                f"--data: {tokens:,} training tokens in {len(known)} shards are too few for one row of "
                f"{self.T} tokens; give more text or lower --max-seq-len"
            )
        return (
            rows * self.T
            if self.corpus.eager
            else round(
                rows
                * self.T
                * self.corpus.train_bytes
                / max(1, sum(shard.n_bytes for shard in known))
            )
        )

    def share_dropped(self):
        """Share of the tokens that no row holds (the ends of the rings), in the whole of a small corpus, in the first shard
        of a large one; None while their lengths are not known."""
        if any(shard.fingerprint not in self.cache.lengths for shard in self._counted_shards()):
            return None
        lengths = [self.cache.length(shard) for shard in self._counted_shards()]
        return 1 - sum(length // self.T * self.T for length in lengths) / sum(lengths)

    def locate(self, row):
        """(epoch, shard index, row of that shard before its permutation) of global row number `row`."""
        while not self.ends or row >= self.ends[-1]:
            epoch, place = divmod(len(self.visits), len(self.shards))
            shard_index = self.shard_order(epoch)[place]
            end = (self.ends[-1] if self.ends else 0) + self.shard_rows(shard_index)
            if place == len(self.shards) - 1 and end == 0:
                raise UsageError(
                    f"--data: none of {len(self.shards)} shards holds one row of {self.T} tokens; give more text or "
                    f"lower --max-seq-len"
                )
            self.visits.append((epoch, shard_index))
            self.ends.append(end)
        place = bisect.bisect_right(self.ends, row)
        self.reading = place
        return *self.visits[place], row - (self.ends[place - 1] if place else 0)

    def _plan(self, epoch, shard_index):
        """(document order, ring position where each begins, ring offset, row order) of a shard in an epoch."""
        if (epoch, shard_index) not in self.plans:
            offsets = self.cache.tokens(self.shards[shard_index])[1]
            generator = np.random.default_rng(
                stream_seed(self.seed, "rows", epoch, self.shards[shard_index].fingerprint)
            )
            order = generator.permutation(len(offsets) - 1)
            begins = np.concatenate(([0], np.cumsum(np.diff(offsets)[order])))
            turn = int(generator.integers(self.T))
            while len(self.plans) >= 4:
                self.plans.pop(next(iter(self.plans)))
            self.plans[epoch, shard_index] = (
                order,
                begins,
                turn,
                generator.permutation(self.shard_rows(shard_index)),
            )
        return self.plans[epoch, shard_index]

    def row(self, number):
        """Row `number`: int64 array of T + 1 ids, BOS first. Inputs are [:-1], targets [1:]."""
        epoch, shard_index, row = self.locate(number)
        ids, offsets = self.cache.tokens(self.shards[shard_index])
        order, begins, turn, row_order = self._plan(epoch, shard_index)
        out = np.empty(self.T + 1, dtype=np.int64)
        out[0], filled = self.cache.tokenizer.bos, 1
        position = (int(row_order[row]) * self.T + turn) % int(begins[-1])
        while filled <= self.T:
            place = int(np.searchsorted(begins, position, side="right")) - 1
            take = min(int(begins[place + 1]) - position, self.T + 1 - filled)
            start = int(offsets[order[place]]) + position - int(begins[place])
            out[filled : filled + take] = ids[start : start + take]
            filled += take
            position = (position + take) % int(begins[-1])
        return out

    def batch(self, step, rows_per_step, micro, device_batch_size, rank, world_size):
        """(inputs, targets) int64 (device_batch_size, T): the share of a rank in micro-batch `micro` of a step.

        A step takes rows_per_step consecutive rows, whatever the number of ranks and micro-batches."""
        first = step * rows_per_step + (micro * world_size + rank) * device_batch_size
        rows = np.stack([self.row(first + i) for i in range(device_batch_size)])
        return rows[:, :-1], rows[:, 1:]


class Ahead:
    """A thread that fetches and tokenizes the shards that training will read next, up to AHEAD_SHARDS further on.

    Trouble is reported and tried again later: it ends training only when the shard itself is needed and still missing.
    rows: those of this process, whose place is followed. last_row(): the end of the run, None while it is not known."""

    def __init__(self, rows, first_row, last_row, report):
        cache = TokenCache(
            rows.cache.tokenizer, max(1, rows.cache.threads // 2), rows.cache.lengths, report=report
        )
        self.rows, self.own = (
            rows,
            Rows(rows.corpus, cache, rows.T, rows.seed),
        )  # its own cache: TokenCache is for one thread
        self.last_row, self.report, self.stopped = last_row, report, threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(first_row,), name="data-ahead", daemon=True
        )
        self.thread.start()

    def _run(self, row):
        told = ""
        while not self.stopped.is_set() and (self.last_row() is None or row < self.last_row()):
            if self.own.reading > self.rows.reading + AHEAD_SHARDS:
                self.stopped.wait(0.5)
                continue
            try:
                shard = self.own.shards[self.own.locate(row)[1]]
                if not self.own.cache.path(
                    shard
                ).exists():  # locate() makes it only where the shard's length is not known yet
                    self.own.cache.tokens(shard)
                row = self.own.ends[self.own.reading]
            except (DataFailed, UsageError) as error:
                if str(error) != told:  # once, not at every attempt
                    told = str(error)
                    self.report(f"reading ahead failed, training goes on: {error}")
                self.stopped.wait(AHEAD_RETRY_SECONDS)

    def close(self):
        """Ask the thread to end. It is not waited for: it may be in the middle of a download, which the next run continues."""
        self.stopped.set()


def check_disk(rows, tokens, tokens_per_epoch):
    """Raise UsageError, with numbers, if the disk has no room for what `tokens` of training still have to fetch and cache."""
    corpus, order = rows.corpus, rows.shard_order(0)
    n_shards = (
        len(order)
        if corpus.eager
        else min(len(order), math.ceil(len(order) * tokens / tokens_per_epoch))
    )
    missing = [
        rows.shards[i]
        for i in order[:n_shards]
        if not rows.cache.path(rows.shards[i]).exists()
        and rows.shards[i].fingerprint not in rows.cache.lengths
    ]  # what a resumed run has read may be gone
    download = sum(
        file.n_bytes for shard in missing for file in shard.remote_files() if not file.is_local()
    )
    id_bytes = 2 if rows.cache.tokenizer.vocab_size <= 1 << 16 else 4
    token_bytes = (
        id_bytes
        * tokens_per_epoch
        / max(1, corpus.train_bytes)
        * sum(shard.n_bytes for shard in missing)
    )
    free = shutil.disk_usage(base_dir()).free
    if download + token_bytes > free:
        raise UsageError(
            f"--data={corpus.name}: {tokens:,.0f} tokens of training need {len(missing)} more shards, {human_bytes(download)} "
            f"to fetch and {human_bytes(token_bytes)} of token cache, and the disk has {human_bytes(free)} free; free some, "
            f"name a folder on a larger disk by NANOCHAT_BASE_DIR, or give a shorter horizon"
        )


def describe_tokens(rows, tokens_per_epoch, pieces):
    """A line on how the text became tokens."""
    corpus, tokenizer = rows.corpus, rows.cache.tokenizer
    share_dropped = rows.share_dropped()
    dropped = f"{share_dropped:.3%} dropped; " if share_dropped is not None else ""
    return (
        f"tokens: {'' if corpus.eager else 'about '}{tokens_per_epoch:,} an epoch, {corpus.train_bytes / tokens_per_epoch:.2f} bytes a "
        f"token, {dropped}{sum(map(len, pieces)) - len(pieces):,} to validate on; vocabulary {tokenizer.vocab_size:,} "
        f"({tokenizer.kind}, fingerprint {tokenizer.fingerprint[:16]})"
    )


class Prefetcher:
    """Runs an iterator in a thread, a few items ahead. An exception there is raised at next() here, and DataFailed when
    interrupted() becomes true while an item is waited for: a download may take long, and the run is to leave."""

    def __init__(self, iterator, depth=4, interrupted=lambda: False):
        self.queue, self.stopped, self.interrupted = (
            queue.Queue(depth),
            threading.Event(),
            interrupted,
        )
        self.thread = threading.Thread(
            target=self._run, args=(iterator,), name="data-prefetcher", daemon=True
        )
        self.thread.start()

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _run(self, iterator):
        try:
            for item in iterator:
                self._put((item, None))
                if self.stopped.is_set():
                    return
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put((None, error))

    def __next__(self):
        while True:
            try:
                item, error = self.queue.get(timeout=0.5)
                break
            except queue.Empty:
                if self.interrupted():
                    raise DataFailed("asked to stop while waiting for training data") from None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or it would keep itself alive through this frame, and with it the frame of train.py and all that it holds
        return item

    def close(self):
        """End the thread. One that is making a token file is left behind: it is a daemon, and the file is made again."""
        self.stopped.set()
        self.thread.join(timeout=1)


def held_out_pieces(shards, cache, row_tokens, max_tokens):
    """Validation pieces: held-out documents in file order, up to max_tokens (the last is cut), each cut into pieces.

    Returns a list of int64 arrays: BOS, then 1 to row_tokens tokens. Documents' closing BOS is left out."""
    pieces, left = [], max_tokens
    for shard in shards:
        ids, offsets = cache.tokens(shard)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            document = ids[begin : min(end - 1, begin + left)].astype(np.int64)
            for start in range(0, len(document), row_tokens):
                pieces.append(
                    np.concatenate(([cache.tokenizer.bos], document[start : start + row_tokens]))
                )
            left -= len(document)
            if left == 0:
                return pieces
    return pieces
