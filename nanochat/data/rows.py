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
import math
import shutil

import numpy as np

from nanochat.common import UsageError, base_dir, human_bytes, stream_seed


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
