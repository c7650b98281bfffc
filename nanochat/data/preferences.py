"""Preference pairs: a prompt with a chosen and a rejected answer, read from JSON lines.

A line is {"prompt": text or messages, "chosen": ..., "rejected": ...}, where an answer is a text or
a message of the assistant; or it has no prompt, and its answers are whole conversations that differ
in their last message."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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
from nanochat.data.tokenizer import TURN_END, Tokenizer, id_dtype

FIELDS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """A pair as token ids, uint32 (n,) each.

    prompt begins with BOS and ends with the start of an answer; answers end with the end of a
    turn."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def with_chosen(self) -> Rendered:
        """(ids, mask) of prompt and chosen answer; the mask marks the answer."""
        return _masked(self.prompt, self.chosen)

    def with_rejected(self) -> Rendered:
        """(ids, mask) of prompt and rejected answer; the mask marks the answer."""
        return _masked(self.prompt, self.rejected)


def _masked(prompt: np.ndarray, answer: np.ndarray) -> Rendered:
    ids = np.concatenate((prompt, answer))
    return ids, np.arange(len(ids)) >= len(prompt)


class Pairs:
    """Many pairs. lengths: tokens of the prompt and the longer answer of each, int64 (N,)."""

    def __init__(self, pairs: Sequence[Pair], shares: Shares, dtype: type) -> None:
        """dtype: in which ids are held."""
        self._parts = [Ragged([pair[i] for pair in pairs], dtype) for i in range(len(FIELDS))]
        self._shares = shares
        prompt, chosen, rejected = (part.lengths for part in self._parts)
        self.lengths = prompt + np.maximum(chosen, rejected)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Pair:
        return Pair(*(part[i].astype(np.uint32) for part in self._parts))

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens of chosen and rejected answers, int64 (N, 2)."""
        return np.stack([part.lengths for part in self._parts[1:]], axis=1)

    @property
    def n_targets(self) -> int:
        """Tokens of all answers, chosen and rejected."""
        return len(self._parts[1].flat) + len(self._parts[2].flat)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The pairs of an epoch in its order, int64: see Shares.epoch()."""
        return self._shares.epoch(seed, epoch)


@dataclass(frozen=True)
class Preferences:
    """Pairs to learn from and held out. counts: of lines, pairs and tokens. problems: lines that
    were skipped. fingerprint: SHA-256 of all that was read, and of the weights."""

    train: Pairs
    held_out: Pairs
    counts: dict[str, int]
    problems: list[Problem]
    fingerprint: str


def read_pairs(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    held_out: Sequence[str | Path] = (),
    strict: bool = False,
    threads: int = 1,
    report: Report = print,
) -> Preferences:
    """The preference pairs of files, as a tokenizer for chats encodes them.

    max_tokens: of a prompt with either answer. Where they are longer, the prompt is cut to BOS and
    as many of its last tokens as leave room for the longer answer, the same for both; answers are
    never cut, since a model would learn to stop there: a pair whose answer leaves no room for the
    start of an answer is left out. held_out: files of pairs to validate on; without one, 2% of the
    prompts (of few, ten or a tenth) that a hash picks, with all their answers. Otherwise as
    read_conversations()."""
    if not is_chat(tokenizer):
        raise UsageError("preference pairs need a tokenizer with the special tokens of chats")
    reading = Reading()
    turn_end = np.array([tokenizer.special_ids[TURN_END]], dtype=np.uint32)

    def encode(pairs: list[dict[str, Any]]) -> list[Pair | None]:
        prompts = render_batch(tokenizer, [pair["prompt"] for pair in pairs], True, threads)
        texts = [pair[name] for name in FIELDS[1:] for pair in pairs]
        answers = [
            np.concatenate((ids, turn_end)) for ids in tokenizer.encode_batch(texts, threads)
        ]
        chosen, rejected = answers[: len(pairs)], answers[len(pairs) :]
        return [
            _cut(Pair(prompt, *both), max_tokens, reading)
            for (prompt, _), *both in zip(prompts, chosen, rejected, strict=True)
        ]

    split = read_split(sources, held_out, parse, _prompt, encode, reading)
    reading.finish(strict, report)
    dtype = id_dtype(tokenizer.vocab_size)
    train = Pairs(split.train, split.shares, dtype)
    validation = Pairs(split.held_out, Shares.of([Fraction(1)], [len(split.held_out)]), dtype)
    counts = {
        **reading.counts(),
        "train": len(train),
        "train_targets": train.n_targets,
        "held_out": len(validation),
        "held_out_targets": validation.n_targets,
        "in_both": split.n_shared,
    }
    fingerprint = reading.digest.hexdigest()
    for line in _in_words(counts, max_tokens, fingerprint):
        report(line)
    return Preferences(train, validation, counts, reading.problems, fingerprint)


def parse(record: dict[str, Any]) -> dict[str, Any]:
    """{"prompt": messages, "chosen": text, "rejected": text} of a line. Raises BadLine."""
    if "prompt" not in record and isinstance(record.get("chosen"), list):
        record = _prompt_taken_out(record)
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise BadLine(f"no field {' or '.join(missing)} (its fields: {names_of(record)})")
    prompt = prompt_of(record["prompt"])
    problem = problem_of(prompt, generation_prompt=True)
    if problem:
        raise BadLine(f"prompt: {problem}")
    chosen, rejected = (answer_of(record[name], name) for name in FIELDS[1:])
    if chosen == rejected:
        raise BadLine("chosen and rejected are the same: nothing to prefer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _prompt_taken_out(record: dict[str, Any]) -> dict[str, Any]:
    """A line whose answers are whole conversations, with what they share as its prompt. Raises
    BadLine."""
    whole = [messages_of(record.get(name), name) for name in FIELDS[1:]]
    if not all(whole) or whole[0][:-1] != whole[1][:-1]:
        raise BadLine(
            "chosen and rejected differ before their last message, and there is no prompt"
        )
    chosen, rejected = (messages[-1:] for messages in whole)
    return {"prompt": whole[0][:-1], "chosen": chosen, "rejected": rejected}


def _prompt(pair: dict[str, Any]) -> list[dict[str, str]]:
    """What decides whether a pair is held out: its prompt, whose other answers would tell of it."""
    return pair["prompt"]


def _cut(pair: Pair, max_tokens: int, reading: Reading) -> Pair | None:
    """A pair with its prompt cut to what fits, None if its answers leave no room. Counts both."""
    room = max_tokens - max(len(pair.chosen), len(pair.rejected))
    # BOS and the start of an answer
    if room < 2:
        reading.n_too_long += 1
        return None
    if len(pair.prompt) <= room:
        return pair
    reading.n_cut += 1
    return pair._replace(prompt=np.concatenate((pair.prompt[:1], pair.prompt[1 - room :])))


def _in_words(counts: dict[str, int], max_tokens: int, fingerprint: str) -> list[str]:
    """Lines on what was read."""
    said = []
    if counts["cut"] or counts["too_long"]:
        said.append(
            f"longer than {max_tokens:,} tokens: {counted(counts['cut'], 'pair')} with the prompt "
            f"cut from its beginning, {counts['too_long']:,} left out since an answer does not fit"
        )
    if counts["in_both"]:
        said.append(
            f"{counted(counts['in_both'], 'pair')} to learn from with a prompt that is held out"
        )
    said.append(
        f"{counted(counts['train'], 'pair')} to learn from ({counts['train_targets']:,} tokens of "
        f"answers), {counts['held_out']:,} held out; fingerprint {fingerprint[:16]}"
    )
    return said
