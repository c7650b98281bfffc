"""The text of a run, opened: corpus, tokenizer, training rows, held-out pieces."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import limits
from nanochat.common import Report, UsageError
from nanochat.data.rows import Rows, describe_tokens, held_out_pieces
from nanochat.data.sources import (
    Corpus,
    Shard,
    compressed_bits_per_byte,
    describe_corpus,
    open_corpus,
    refuse_other_files,
)
from nanochat.data.token_cache import TokenCache, load_tokenizer
from nanochat.data.tokenizer import Tokenizer
from nanochat.machines import on_each_machine, threads_of_rank
from nanochat.ranks import from_rank0_or_raise, print0, rank
from nanochat.run.resume import OpenedRun
from nanochat.run.screen import bar


@dataclass(frozen=True)
class TrainingText:
    """tokens_per_epoch: of training; an estimate for a large corpus. held_out: validation pieces.
    byte_counts: int64 (V,), bytes of each token id. compressed_bpb: bits per byte of general
    compressors on the held-out text."""

    corpus: Corpus
    tokenizer: Tokenizer
    rows: Rows
    tokens_per_epoch: float
    held_out: list[np.ndarray]
    byte_counts: np.ndarray
    compressed_bpb: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """What config.json records of the text."""
        return {
            "name": self.corpus.name,
            "revision": self.corpus.revision,
            "fingerprint": self.corpus.fingerprint,
            "train_bytes": self.corpus.train_bytes,
            "note": self.corpus.note,
            "tokens_per_epoch": self.tokens_per_epoch,
            "compressed_bpb": self.compressed_bpb,
        }


def open_text(run: OpenedRun) -> TrainingText:
    """Open the text of a run; every rank calls it. Rank 0 opens the text and fits the tokenizer for
    all; the first rank of each machine tokenizes, and the others find the results in its cache.

    UsageError for text that is not the one that a resumed run was started with, for unusable text,
    and if nothing is left to validate on."""
    args = run.args
    corpus = _open_corpus(run)
    print0("\n".join(describe_corpus(corpus)))
    tokenizer = _open_tokenizer(run, corpus)
    # With the lengths of shards that were read before, finding a row needs no shard but its own:
    # what is no longer on disk need not be fetched again.
    lengths = run.saved_state.get("shard_tokens")
    cache = TokenCache(tokenizer, limits.available_cpus(), lengths)
    recorded = run.config["data"] if run.config else {}
    rows = Rows(corpus, cache, args.max_seq_len, args.seed, recorded.get("first_row", 0))

    def tokenize() -> None:
        wanted = [*corpus.val, *rows.first_shards()]
        cache.prepare(wanted, lambda shards: bar(shards, "tokenizing", "shard"))

    # One rank of a machine, with all cores; the others would repeat the same work or wait on its
    # locks.
    on_each_machine(tokenize)
    # In training several may find at once that a shard is missing.
    cache.threads = threads_of_rank()
    if recorded.get("fingerprint"):
        # Frozen, since for a large corpus they are estimates from what was on disk at the first
        # start.
        tokens_per_epoch = recorded["tokens_per_epoch"]
        compressed = recorded["compressed_bpb"]
    else:
        tokens_per_epoch = rows.tokens_per_epoch()
        compressed = from_rank0_or_raise(lambda: compressed_bits_per_byte(corpus.val))
    # The pieces are cut once, so that every evaluation of a run scores the same text.
    most = args.eval_tokens if args.eval_tokens != -1 else sys.maxsize
    pieces = held_out_pieces(corpus.val, cache, args.max_seq_len, most)
    # An evaluation of nothing would fail at the first one, hours later.
    if not pieces and args.eval_every != -1:
        raise UsageError(
            f"--data={args.data}: no text is left to validate on; give more text, or --val-data, "
            "or --eval-every=-1"
        )
    print0(describe_tokens(rows, tokens_per_epoch, pieces))
    words = [f"{name} {bits} bits per byte" for name, bits in compressed.items()]
    print0("held-out text compressed:", ", ".join(words))
    return TrainingText(
        corpus=corpus,
        tokenizer=tokenizer,
        rows=rows,
        tokens_per_epoch=tokens_per_epoch,
        held_out=pieces,
        byte_counts=tokenizer.byte_counts(),
        compressed_bpb=compressed,
    )


def held_out_shards(config: dict[str, Any], report: Report) -> list[Shard] | None:
    """The shards that a run was validated on; None if the text has changed since.

    config: its config.json. report: gets a line on each fault of the network. Raises UsageError for
    text that is gone, DownloadFailed when a dataset cannot be listed."""
    args, recorded = config["args"], config["data"]
    corpus = open_corpus(args["data"], args["val_data"], recorded.get("revision", ""), report)
    # bits per byte of another text would pass for those of the run
    return corpus.val if corpus.fingerprint == recorded["fingerprint"] else None


def held_out_of_run(
    config: dict[str, Any], tokenizer: Tokenizer, report: Report
) -> list[np.ndarray] | None:
    """The pieces that a run was validated on, up to its --eval-tokens; None if the text has changed
    since. Rank 0 calls it. Otherwise as held_out_shards()."""
    shards = held_out_shards(config, report)
    if shards is None:
        return None
    cache = TokenCache(tokenizer, limits.available_cpus(), report=report)
    cache.prepare(shards, lambda shards: shards)
    args = config["args"]
    most = args["eval_tokens"] if args["eval_tokens"] != -1 else sys.maxsize
    return held_out_pieces(shards, cache, args["max_seq_len"], most)


def _open_corpus(run: OpenedRun) -> Corpus:
    """The corpus of --data, which has to be that of a resumed run."""
    args = run.args
    was = run.config["data"] if run.config else {}
    # A resumed run reads the very revision that it began with, even if the dataset has moved on.
    revision = was.get("revision", "")
    corpus = from_rank0_or_raise(lambda: open_corpus(args.data, args.val_data, revision, print0))

    def compare() -> None:
        # rank 0's own are those that it has just read
        if rank():
            refuse_other_files(corpus)

    on_each_machine(compare)
    # none yet: a fork that is about to read another text than its parent for the first time
    if was.get("fingerprint") and corpus.fingerprint != was["fingerprint"]:
        raise UsageError(
            f"--data={args.data}: the text is not the one that this run was started with "
            f"(fingerprint {corpus.fingerprint[:16]} instead of {was['fingerprint'][:16]}); "
            "restore it, or start another run with --model-tag"
        )
    return corpus


def _open_tokenizer(run: OpenedRun, corpus: Corpus) -> Tokenizer:
    """The tokenizer of the flags, of the resumed run or of --init-from."""
    args = run.args
    own: Path | None = run.folder.path / "tokenizer" if run.config else None
    tokenizer = load_tokenizer(
        args.tokenizer,
        args.vocab_size,
        corpus,
        of_run=own,
        of_source=run.source.tokenizer if run.source else None,
        chosen="tokenizer" in args.given,
    )
    if run.config and tokenizer.fingerprint != run.config["tokenizer"]["fingerprint"]:
        raise UsageError(f"{own} is not the tokenizer of this run; restore the original file")
    return tokenizer
