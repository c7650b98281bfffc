"""Conversations to fine-tune on: read from JSON lines, rendered, cut to the context, split.

A line is {"messages": [{"role", "content"}, ...]} (or "conversations", also of {"from", "value"}),
or has a prompt and an answer (ANSWER_FIELDS): the prompt as text or as messages, the answer as text
or as a message of the assistant."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import Report, UsageError, counted
from nanochat.data.chat import Rendered, is_chat, problem_of, render_batch
from nanochat.data.examples import (
    BadLine,
    Problem,
    Ragged,
    Reading,
    Shares,
    Source,
    answer_of,
    messages_of,
    names_of,
    prompt_of,
    read_split,
)
from nanochat.data.tokenizer import Tokenizer, id_dtype

# names of the field with all messages, and of the one with the answer to a prompt
MESSAGES_FIELDS = ("messages", "conversations")
ANSWER_FIELDS = ("answer", "completion", "response")

Messages = list[dict[str, str]]


class Encoded:
    """Conversations as token ids. lengths: tokens of each, int64 (N,)."""

    def __init__(self, rendered: Sequence[Rendered], shares: Shares, dtype: type) -> None:
        """dtype: in which ids are held."""
        self._ids = Ragged([ids for ids, _ in rendered], dtype)
        self._masks = Ragged([mask for _, mask in rendered], np.bool_)
        self._shares = shares
        self.lengths = self._ids.lengths

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i: int) -> Rendered:
        """(ids uint32 (n,), mask bool (n,)) of a conversation; the mask marks what is learned."""
        return self._ids[i].astype(np.uint32), self._masks[i]

    @property
    def n_targets(self) -> int:
        """Tokens that are learned."""
        return int(self._masks.flat.sum())

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The conversations of an epoch in its order, int64: see Shares.epoch()."""
        return self._shares.epoch(seed, epoch)


@dataclass(frozen=True)
class Conversations:
    """Conversations to learn from and held out. counts: of lines, conversations and tokens.
    problems: lines that were skipped. fingerprint: SHA-256 of all that was read, and of the
    weights."""

    train: Encoded
    held_out: Encoded
    counts: dict[str, int]
    problems: list[Problem]
    fingerprint: str


def read_conversations(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    held_out: Sequence[str | Path] = (),
    strict: bool = False,
    threads: int = 1,
    report: Report = print,
) -> Conversations:
    """The conversations of files, as a tokenizer for chats encodes them.

    max_tokens: of a conversation, BOS included; a longer one ends with the last answer that fits,
    and is left out if not even the first does. What follows the last answer is dropped, since
    nothing of it is learned. held_out: files of conversations to validate on; without one, 2%
    (of few, ten or a tenth) that a hash of their content picks. strict: refuse lines that are no
    conversation instead of skipping them. threads: that encode. report: takes what was skipped, cut
    and read. UsageError for files that cannot be read, or that leave nothing to learn from or to
    hold out."""
    if not is_chat(tokenizer):
        raise UsageError("conversations need a tokenizer with the special tokens of chats")
    reading = Reading()

    def encode(conversations: list[Messages]) -> list[Rendered | None]:
        rendered = render_batch(tokenizer, conversations, threads=threads)
        return [_cut(ids, mask, max_tokens, reading) for ids, mask in rendered]

    split = read_split(sources, held_out, parse, _whole, encode, reading)
    reading.finish(strict, report)
    dtype = id_dtype(tokenizer.vocab_size)
    train = Encoded(split.train, split.shares, dtype)
    validation = Encoded(split.held_out, Shares.of([Fraction(1)], [len(split.held_out)]), dtype)
    counts = {
        **reading.counts(),
        "train": len(train),
        "train_tokens": int(train.lengths.sum()),
        "train_targets": train.n_targets,
        "held_out": len(validation),
        "held_out_targets": validation.n_targets,
        "in_both": split.n_shared,
    }
    fingerprint = reading.digest.hexdigest()
    for line in _in_words(counts, max_tokens, fingerprint):
        report(line)
    return Conversations(train, validation, counts, reading.problems, fingerprint)


def parse(record: dict[str, Any]) -> Messages:
    """The messages of a line. Raises BadLine."""
    named = [name for name in MESSAGES_FIELDS if name in record]
    if named:
        messages = messages_of(record[named[0]], named[0])
    else:
        messages = _prompt_and_answer(record)
    problem = problem_of(messages)
    if problem:
        raise BadLine(problem)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no message of the assistant: nothing to learn")
    return messages


def _prompt_and_answer(record: dict[str, Any]) -> Messages:
    """The messages of a line with a prompt and an answer. Raises BadLine."""
    named = [name for name in ANSWER_FIELDS if name in record]
    if "prompt" not in record or not named:
        raise BadLine(f"neither messages nor prompt and answer (its fields: {names_of(record)})")
    if len(named) > 1:
        raise BadLine(f"several answers: {' and '.join(named)}")
    answer = answer_of(record[named[0]], named[0])
    return [*prompt_of(record["prompt"]), {"role": "assistant", "content": answer}]


def _whole(messages: Messages) -> Messages:
    """What decides whether a conversation is held out: all of it."""
    return messages


def _cut(ids: np.ndarray, mask: np.ndarray, max_tokens: int, reading: Reading) -> Rendered | None:
    """A conversation up to the last answer that fits, None if none does. Counts both."""
    # an answer ends where the mask does
    ends = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
    fitting = ends[ends <= max_tokens]
    if not len(fitting):
        reading.n_too_long += 1
        return None
    reading.n_cut += len(fitting) < len(ends)
    return ids[: fitting[-1]], mask[: fitting[-1]]


def _in_words(counts: dict[str, int], max_tokens: int, fingerprint: str) -> list[str]:
    """Lines on what was read."""
    said = []
    if counts["cut"] or counts["too_long"]:
        said.append(
            f"longer than {max_tokens:,} tokens: {counted(counts['cut'], 'conversation')} cut "
            f"after an earlier answer, {counts['too_long']:,} left out since no answer fits"
        )
    if counts["in_both"]:
        n = counted(counts["in_both"], "conversation")
        said.append(f"{n} to learn from equal one that is held out")
    said.append(
        f"{counted(counts['train'], 'conversation')} to learn from "
        f"({counts['train_tokens']:,} tokens, {counts['train_targets']:,} of them of answers), "
        f"{counts['held_out']:,} held out ({counts['held_out_targets']:,} of answers); fingerprint "
        f"{fingerprint[:16]}"
    )
    return said
