"""Token ids in, training rows out: shards -> cached token ids -> rows -> batches.

Row g of a run (g counts rows from the start of training, over all epochs) is a pure function of
(seed, g) and of the shards before it:

1. the shards of epoch e follow a permutation of the full list drawn from (seed, e);
2. inside a shard the documents are permuted, each followed by BOS, and the resulting ring of tokens
   is turned by a random offset, so that cuts fall elsewhere in every epoch;
3. the ring is cut into pieces of T tokens; the pieces, each behind a BOS, are the shard's rows, in
   permuted order.

Every token is a target once an epoch, except fewer than T at the end of each ring (share_dropped
says how many). A document that a row cuts continues in another row, after a BOS. No state is kept:
resuming is asking for row g. A large corpus is downloaded and tokenized shard by shard, ahead of
the rows that are read (prefetch.Ahead)."""

import bisect
import math
import shutil
from typing import NamedTuple

import numpy as np

from nanochat.common import UsageError, counted, human_bytes, stream_seed, writable_base_dir
from nanochat.data.sources import Corpus, Shard
from nanochat.data.token_cache import CACHE_LIMIT_BYTES, TokenCache
from nanochat.data.tokenizer import id_dtype

# shards whose permutations are kept: a batch may span the end of one and the start of the next
KEPT_PLANS = 4


class Place(NamedTuple):
    """Where a row is: in an epoch, in one of the shards, there before the rows are permuted."""

    epoch: int
    shard_index: int
    row: int


class _ShardPlan(NamedTuple):
    """The rings of a shard in an epoch.

    order: of the documents. begins: ring position where each of them begins, and the ring's length.
    turn: offset of the ring. row_order: of the rows."""

    order: np.ndarray
    begins: np.ndarray
    turn: int
    row_order: np.ndarray


class Rows:
    """Random access to the rows of training, as the module docstring defines them.

    Only the shards up to a row's own are looked at, and of those before it only the lengths.
    row_tokens: T, the targets of a row. first_row: the number of the row with which the order
    begins; larger than 0 in a run that was forked from another one with another text or seed."""

    def __init__(
        self, corpus: Corpus, cache: TokenCache, row_tokens: int, seed: int, first_row: int = 0
    ) -> None:
        self.corpus = corpus
        self.first_row = first_row
        self.cache = cache
        self.T = row_tokens
        self.seed = seed
        self.shards = corpus.train
        # (epoch, shard index) -> _ShardPlan; the last few only
        self.plans: dict[tuple[int, int], _ShardPlan] = {}
        # (epoch, shard index) in reading order, and the number of rows up to the end of each
        self.visits: list[tuple[int, int]] = []
        self.ends: list[int] = []
        # place in `visits` of the last row that was located
        self.reading = 0

    def shard_rows(self, shard_index: int) -> int:
        """Number of rows of a shard, the same in every epoch."""
        return self.cache.length(self.shards[shard_index]) // self.T

    def shard_order(self, epoch: int) -> list[int]:
        """Indices of the shards in the order in which an epoch reads them."""
        generator = np.random.default_rng(stream_seed(self.seed, "shards", epoch))
        return generator.permutation(len(self.shards)).tolist()

    def first_shards(self) -> list[Shard]:
        """The shards to tokenize before step 0.

        All of a small corpus; of a large one the first that is read, or none if its length is
        known: a run that is resumed later in its data may never need that one again."""
        if self.corpus.eager:
            return self.shards
        known = self.cache.lengths
        return [shard for shard in self._counted_shards() if shard.fingerprint not in known]

    def _counted_shards(self) -> list[Shard]:
        """The shards from which the tokens of an epoch are counted or estimated."""
        if self.corpus.eager:
            return self.shards
        return [self.shards[self.shard_order(0)[0]]]

    def tokens_per_epoch(self) -> int:
        """Training tokens of one pass; of a large corpus an estimate from the first shard.

        Raises UsageError, with numbers, if there is not even one row."""
        read = self._counted_shards()
        lengths = [self.cache.length(shard) for shard in read]
        rows = sum(length // self.T for length in lengths)
        if rows == 0:
            raise UsageError(
                f"--data: {sum(lengths):,} training tokens in "
                f"{counted(len(read), 'shard')} are too few "
                f"for one row of {self.T} tokens; give more text or lower --max-seq-len"
            )
        if self.corpus.eager:
            return rows * self.T
        # shards of one data set are alike: tokens go with bytes of text
        counted_bytes = max(1, sum(shard.n_bytes for shard in read))
        return round(rows * self.T * self.corpus.train_bytes / counted_bytes)

    def share_dropped(self) -> float | None:
        """Share of the tokens that no row holds: the ends of the rings.

        Of a small corpus as a whole, of a large one in the first shard; None while their lengths
        are not known."""
        read = self._counted_shards()
        if any(shard.fingerprint not in self.cache.lengths for shard in read):
            return None
        lengths = [self.cache.length(shard) for shard in read]
        return 1 - sum(length // self.T * self.T for length in lengths) / sum(lengths)

    def locate(self, row: int) -> Place:
        """The Place of global row number `row`. UsageError if no shard is as long as a row."""
        while not self.ends or row >= self.ends[-1]:
            self._count_next_shard()
        # shards without a whole row repeat an end, and are passed over
        place = bisect.bisect_right(self.ends, row)
        self.reading = place
        epoch, shard_index = self.visits[place]
        before = self.ends[place - 1] if place else self.first_row
        return Place(epoch, shard_index, row - before)

    def _count_next_shard(self) -> None:
        """Append the shard that is read after the last one to `visits` and `ends`."""
        epoch, place = divmod(len(self.visits), len(self.shards))
        shard_index = self.shard_order(epoch)[place]
        begin = self.ends[-1] if self.ends else self.first_row
        end = begin + self.shard_rows(shard_index)
        # a whole epoch without a row: without this the search in locate() would never end
        if place == len(self.shards) - 1 and end == self.first_row:
            raise UsageError(
                f"--data: none of {len(self.shards)} shards holds one row of {self.T} tokens; give "
                f"more text or lower --max-seq-len"
            )
        self.visits.append((epoch, shard_index))
        self.ends.append(end)

    def _plan(self, epoch: int, shard_index: int) -> _ShardPlan:
        """The permutations of a shard in an epoch."""
        key = (epoch, shard_index)
        if key not in self.plans:
            shard = self.shards[shard_index]
            _, offsets = self.cache.tokens(shard)
            generator = np.random.default_rng(
                stream_seed(self.seed, "rows", epoch, shard.fingerprint)
            )
            # the order of these draws decides what every seed reads, in new runs and resumed ones
            order = generator.permutation(len(offsets) - 1)
            turn = int(generator.integers(self.T))
            row_order = generator.permutation(self.shard_rows(shard_index))
            begins = np.concatenate(([0], np.cumsum(np.diff(offsets)[order])))
            # permutations of large shards take memory
            while len(self.plans) >= KEPT_PLANS:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = _ShardPlan(order, begins, turn, row_order)
        return self.plans[key]

    def row(self, number: int) -> np.ndarray:
        """Row `number`: int64 (T + 1,), BOS first. Inputs are [:-1], targets [1:]."""
        place = self.locate(number)
        ids, offsets = self.cache.tokens(self.shards[place.shard_index])
        plan = self._plan(place.epoch, place.shard_index)
        ring_tokens = int(plan.begins[-1])
        # int64, which torch's cross entropy wants for its targets
        out = np.empty(self.T + 1, dtype=np.int64)
        out[0] = self.cache.tokenizer.bos
        filled = 1
        position = (int(plan.row_order[place.row]) * self.T + plan.turn) % ring_tokens
        while filled <= self.T:
            # the document that the position is in, and how much of it the row takes
            i = int(np.searchsorted(plan.begins, position, side="right")) - 1
            take = min(int(plan.begins[i + 1]) - position, self.T + 1 - filled)
            start = int(offsets[plan.order[i]]) + position - int(plan.begins[i])
            out[filled : filled + take] = ids[start : start + take]
            filled += take
            position = (position + take) % ring_tokens
        return out

    def batch(
        self,
        step: int,
        rows_per_step: int,
        micro: int,
        device_batch_size: int,
        rank: int,
        world_size: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of a rank in micro-batch `micro` of a step.

        Both int64 (device_batch_size, T). A step takes rows_per_step consecutive rows, whatever the
        number of ranks and micro-batches."""
        # ranks take neighbouring blocks, so that any split of a step reads the same rows
        first = step * rows_per_step + (micro * world_size + rank) * device_batch_size
        rows = np.stack([self.row(first + i) for i in range(device_batch_size)])
        return rows[:, :-1], rows[:, 1:]


def held_out_pieces(
    shards: list[Shard], cache: TokenCache, row_tokens: int, max_tokens: int
) -> list[np.ndarray]:
    """Validation pieces: held-out documents in file order, each cut into pieces.

    At most max_tokens in all, so the last document may be cut. Returns int64 arrays: BOS, then 1 to
    row_tokens tokens. The BOS that closes a document is left out."""
    pieces = []
    left = max_tokens
    for shard in shards:
        ids, offsets = cache.tokens(shard)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            # without the BOS that closes it
            document = ids[begin : min(end - 1, begin + left)].astype(np.int64)
            for start in range(0, len(document), row_tokens):
                piece = document[start : start + row_tokens]
                pieces.append(np.concatenate(([cache.tokenizer.bos], piece)))
            left -= len(document)
            if left == 0:
                return pieces
    return pieces


def token_cache_bytes(tokens: float, tokens_per_epoch: float, vocab_size: int) -> float:
    """Bytes of the token files of all text that `tokens` of training read."""
    return min(tokens, tokens_per_epoch) * np.dtype(id_dtype(vocab_size)).itemsize


def check_disk(rows: Rows, tokens: float, tokens_per_epoch: float) -> str:
    """A line on what `tokens` of training still download and tokenize on this machine, "" if that
    is nothing. Raises UsageError, with numbers, if its disk is too small for that.

    Counted are the shards that are not yet downloaded, or not yet tokenized."""
    corpus = rows.corpus
    cache = rows.cache
    order = rows.shard_order(0)
    n_shards = len(order)
    if not corpus.eager:
        of_this_text = max(0, tokens - rows.first_row * rows.T)
        n_shards = min(n_shards, math.ceil(n_shards * of_this_text / tokens_per_epoch))
    needed = [rows.shards[i] for i in order[:n_shards]]
    # what a resumed run has read, it has counted: its file may be gone
    missing = [
        shard
        for shard in needed
        if not cache.path(shard).exists() and shard.fingerprint not in cache.lengths
    ]
    files = [file for shard in missing for file in shard.remote_files()]
    download = sum(file.n_bytes for file in files if not file.is_local())
    share = sum(shard.n_bytes for shard in missing) / max(1, corpus.train_bytes)
    epoch = tokens_per_epoch * share
    token_bytes = token_cache_bytes(epoch, epoch, cache.tokenizer.vocab_size)
    # older ones make room
    token_bytes = min(token_bytes, CACHE_LIMIT_BYTES)
    to_come = (
        f"{counted(len(missing), 'more shard')}, {human_bytes(download)} of downloads and "
        f"{human_bytes(token_bytes)} of token cache"
    )
    free = shutil.disk_usage(writable_base_dir()).free
    if download + token_bytes > free:
        raise UsageError(
            f"--data={corpus.name}: {tokens:,.0f} tokens of training need {to_come}, and the disk "
            f"has {human_bytes(free)} free; free some, name a folder on a larger disk by "
            f"NANOCHAT_BASE_DIR, or give a shorter horizon"
        )
    return f"disk: {to_come} on each machine; {human_bytes(free)} free" if missing else ""


def describe_tokens(rows: Rows, tokens_per_epoch: int, pieces: list[np.ndarray]) -> str:
    """A line on how the text became tokens."""
    corpus = rows.corpus
    tokenizer = rows.cache.tokenizer
    about = "" if corpus.eager else "about "
    share = rows.share_dropped()
    dropped = "" if share is None else f"{share:.3%} dropped; "
    # the BOS before each piece is no target
    held_out = sum(len(piece) - 1 for piece in pieces)
    return (
        f"tokens: {about}{tokens_per_epoch:,} an epoch, "
        f"{corpus.train_bytes / tokens_per_epoch:.2f} bytes a token, {dropped}{held_out:,} to "
        f"validate on; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}, fingerprint "
        f"{tokenizer.fingerprint[:16]})"
    )
