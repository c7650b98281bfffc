"""Files of examples to fine-tune on: their lines, weights, order, and which are held out.

An example is one JSON object a line, plain or compressed; what its fields are is the business of
conversations.py and preferences.py. A line that is no example is noted with its reason."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from nanochat.common import (
    Report,
    UsageError,
    counted,
    in_a_line,
    path_argument,
    printable,
    stream_seed,
    valid_unicode,
)
from nanochat.data.chat import START_OF_ROLE
from nanochat.data.text import text_format
from nanochat.data.textfile import lines, unpacked

Parsed = TypeVar("Parsed")
Encoded = TypeVar("Encoded")

# of the examples, where no file of held-out ones is given
HELD_OUT_SHARE = Fraction(1, 50)
HELD_OUT_AT_LEAST = 10
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
MOST_WEIGHT = 1000
# examples that are encoded together
BATCH_EXAMPLES = 1024
# lines that a message names
PROBLEMS_SHOWN = 10
# bytes of a hash that decide whether an example is held out
HASH_BYTES = 8


# --------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class Source:
    """A file of examples. weight: how often each of its examples is taken per epoch, on average.

    See Shares.epoch()."""

    path: Path
    weight: Fraction = Fraction(1)


def sources_of(values: Sequence[str], flag: str) -> list[Source]:
    """The files of a flag, each FILE or FILE=WEIGHT; a value that names an existing file is one.

    UsageError, with all problems, for weights that are none and for files that are missing or given
    twice."""
    sources = []
    problems = []
    for value in values:
        try:
            sources.append(_source_of(value))
        except ValueError as error:
            problems.append(f"{flag} {value}: {error}")
    seen: set[Path] = set()
    for source in sources:
        if not source.path.is_file():
            problems.append(f"{flag} {source.path}: no such file; check the path")
        elif source.path.resolve() in seen:
            problems.append(
                f"{flag} {source.path}: given twice; give it once, with a weight: "
                f"{source.path}={2 * source.weight}"
            )
        seen.add(source.path.resolve())
    if problems:
        raise UsageError("\n".join(problems))
    return sources


def _source_of(value: str) -> Source:
    """The source that a value names. ValueError for a weight that is none."""
    name, equals, weight = value.rpartition("=")
    if not equals or not name or os.path.lexists(path_argument(value)):
        return Source(Path(path_argument(value)))
    try:
        number = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if not 0 < number <= MOST_WEIGHT:
        raise ValueError(
            f"{weight!r} is no weight; give how often each line is taken per epoch, such as "
            f"{name}=0.5, at most {MOST_WEIGHT}"
        )
    return Source(Path(path_argument(name)), number)


# --------------------------------------------------------------------------------------------------
# lines


class BadLine(Exception):
    """Why a line is no example."""


@dataclass(frozen=True)
class Problem:
    """A line that is no example."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path} line {self.line:,}: {self.reason}"


@dataclass(frozen=True)
class Example(Generic[Parsed]):
    """What a line holds, and where it stands. key: a hash; examples that share it are held out, or
    learned from, together."""

    path: Path
    line: int
    value: Parsed
    key: int


@dataclass
class Reading:
    """What was read so far. lines: without blank ones. n_cut, n_too_long: examples that were cut to
    the context, and left out since that is impossible. digest: of all examples, in their order."""

    lines: int = 0
    problems: list[Problem] = field(default_factory=list)
    n_cut: int = 0
    n_too_long: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def note(self, path: Path, line: int, reason: str) -> None:
        """Note a line that is no example."""
        self.problems.append(Problem(path, line, reason))

    def counts(self) -> dict[str, int]:
        """How much was read, skipped, cut and left out."""
        return {
            "lines": self.lines,
            "bad_lines": len(self.problems),
            "cut": self.n_cut,
            "too_long": self.n_too_long,
        }

    def finish(self, strict: bool, report: Report) -> None:
        """Report the lines that are no examples. UsageError if there are any and strict is set."""
        if not self.problems:
            return
        n = len(self.problems)
        shown = [f"  {problem}" for problem in self.problems[:PROBLEMS_SHOWN]]
        if n > PROBLEMS_SHOWN:
            shown.append(f"  and {n - PROBLEMS_SHOWN:,} more")
        opening = f"{n:,} of {counted(self.lines, 'line')} cannot be used"
        if strict:
            raise UsageError(
                "\n".join([f"--strict: {opening}:", *shown, "repair or delete these lines"])
            )
        report("\n".join([f"{opening} and {'is' if n == 1 else 'are'} skipped:", *shown]))


def read_examples(
    source: Source,
    parse: Callable[[dict[str, Any]], Parsed],
    key: Callable[[Parsed], Any],
    reading: Reading,
) -> Iterator[Example[Parsed]]:
    """The examples of a file, while what is wrong with other lines is noted in `reading`.

    parse: of a line's object; raises BadLine. key: what of an example decides whether it is held
    out, as JSON. UsageError for a file that cannot be read, that is one JSON list, or of which no
    line is an example."""
    path = source.path
    reading.digest.update(f"\nweight {source.weight}\n".encode())
    n_before = len(reading.problems)
    n_examples = 0
    suffix, compression = text_format(path.name)
    found = lines(unpacked(path, compression, suffix, f"data: {path}"))
    for number, line in enumerate(found, 1):
        if not line.strip():
            continue
        reading.lines += 1
        try:
            value = parse(_object_of(path, number, line))
        except BadLine as bad:
            reading.note(path, number, str(bad))
            continue
        digest = _hash_of(value)
        reading.digest.update(digest)
        n_examples += 1
        part = key(value)
        of_part = digest if part is value else _hash_of(part)
        yield Example(path, number, value, int.from_bytes(of_part[:HASH_BYTES], "big"))
    if not n_examples:
        reasons = "; ".join(f"line {p.line}: {p.reason}" for p in reading.problems[n_before:][:3])
        raise UsageError(f"data: {path} holds no example ({reasons or 'it is empty'})")


def _object_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadLine, and UsageError for a file that is one list."""
    try:
        # a byte order mark may open the file
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"not UTF-8 (byte {error.start:,}: {error.reason})") from None
    if number == 1 and text.lstrip().startswith("["):
        raise UsageError(
            f"data: {path} is one JSON list, not one object a line; write it as JSON lines, for "
            f"example with jq -c '.[]'"
        )
    try:
        value = json.loads(text)
    except RecursionError:
        raise BadLine("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise BadLine(f"not JSON ({in_a_line(error)})") from None
    if not isinstance(value, dict):
        raise BadLine(f"not a JSON object but {type(value).__name__}")
    return value


def _hash_of(value: Any) -> bytes:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()


# --------------------------------------------------------------------------------------------------
# fields


def names_of(record: dict[str, Any]) -> str:
    """The names of an object's fields, for a message."""
    # they may hold anything
    return " ".join(printable(", ".join(record)).split())[:100] or "none"


def text_of(value: Any, name: str) -> str:
    """A text that is not blank. BadLine otherwise. name: of its field."""
    if not isinstance(value, str):
        raise BadLine(f"{name} is not a string but {type(value).__name__}")
    if not value.strip():
        raise BadLine(f"{name} is empty")
    # UTF-8 has no lone surrogates, which JSON can spell
    return valid_unicode(value)


def prompt_of(value: Any) -> list[dict[str, str]]:
    """The messages of a field `prompt`: a text from the user, or a list of messages. Their order is
    not checked. Raises BadLine."""
    if isinstance(value, list):
        return messages_of(value, "prompt")
    return [{"role": "user", "content": text_of(value, "prompt")}]


def answer_of(value: Any, name: str) -> str:
    """The text of a field with an answer: a text, a message of the assistant, or a list with that
    alone. Raises BadLine."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return text_of(value, name)
    messages = messages_of(value, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise BadLine(f"{name} is not one message of the assistant")
    return messages[0]["content"]


def messages_of(values: Any, name: str) -> list[dict[str, str]]:
    """Messages without their other fields, each with a known role and a content that is not blank.

    A message has role and content, or, as in ShareGPT's files, from and value. Their order is not
    checked. Raises BadLine."""
    if not isinstance(values, list):
        raise BadLine(f"{name} is not a list but {type(values).__name__}")
    messages = []
    for number, value in enumerate(values, 1):
        here = f"message {number} of {name}"
        if isinstance(value, dict) and {"from", "value"} <= set(value):
            speaker = SHAREGPT_ROLES.get(str(value["from"]), value["from"])
            value = {"role": speaker, "content": value["value"]}
        if not isinstance(value, dict) or not {"role", "content"} <= set(value):
            raise BadLine(f"{here} is not an object with role and content")
        if value["role"] not in list(START_OF_ROLE):
            raise BadLine(f"{here} has the unknown role {str(value['role'])[:40]!r}")
        content = text_of(value["content"], f"{here}: content")
        messages.append({"role": value["role"], "content": content})
    return messages


# --------------------------------------------------------------------------------------------------
# arrays


class Ragged:
    """Many arrays of different lengths, one behind the other in one. [i] is a view of one."""

    def __init__(self, arrays: Sequence[np.ndarray], dtype: type) -> None:
        """dtype: of all of them."""
        self.lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        self.ends = np.cumsum(self.lengths)
        self.flat = np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.flat[self.ends[i] - self.lengths[i] : self.ends[i]]


@dataclass(frozen=True)
class Shares:
    """Which examples came from which source. weights: of each source. members: int64 indices of its
    examples."""

    weights: list[Fraction]
    members: list[np.ndarray]

    @classmethod
    def of(cls, weights: list[Fraction], counts: list[int]) -> "Shares":
        """Of sources with so many examples each, which are numbered one source after the other."""
        starts = np.cumsum([0, *counts])
        return cls(weights, [np.arange(a, b) for a, b in itertools.pairwise(starts)])

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch (from 0) in its order, int64; a function of its arguments alone.

        A source of n examples is an endless sequence of passes over all of them, each in an order
        of its own. With weight w, epoch e takes the places from floor(e w n) to floor((e + 1) w n)
        of it: after any number of epochs each example was taken w times per epoch, give or take
        one. The examples of all sources are then shuffled together."""
        taken = [np.zeros(0, dtype=np.int64)]
        for number, (weight, members) in enumerate(zip(self.weights, self.members, strict=True)):
            per_epoch = weight * len(members)
            first, last = math.floor(epoch * per_epoch), math.floor((epoch + 1) * per_epoch)
            taken += [members[i] for i in _places(seed, number, len(members), first, last)]
        shuffle = np.random.default_rng(stream_seed(seed, "examples of an epoch", epoch))
        return shuffle.permutation(np.concatenate(taken))


def _places(seed: int, source: int, n: int, first: int, last: int) -> Iterator[np.ndarray]:
    """The places [first:last] of the endless sequence of a source, pass by pass."""
    place = first
    while place < last:
        number, skipped = divmod(place, n)
        end = min(n, skipped + last - place)
        generator = np.random.default_rng(stream_seed(seed, "pass of a source", source, number))
        yield generator.permutation(n)[skipped:end]
        place += end - skipped


# --------------------------------------------------------------------------------------------------
# examples to learn from, and held out


@dataclass(frozen=True)
class Split(Generic[Encoded]):
    """Encoded examples. shares: of those to learn from. n_shared: how many of these share their key
    with one that is held out."""

    train: list[Encoded]
    shares: Shares
    held_out: list[Encoded]
    n_shared: int


def read_split(
    sources: Sequence[Source],
    held_out: Sequence[str | Path],
    parse: Callable[[dict[str, Any]], Parsed],
    key: Callable[[Parsed], Any],
    encode: Callable[[list[Parsed]], list[Encoded | None]],
    reading: Reading,
) -> Split[Encoded]:
    """Read and encode the examples of files, and hold some out.

    held_out: files of these; without one, those that held_out_by_hash() picks. parse, key: as in
    read_examples(). encode: None for an example that is too long; UsageError for text that the
    tokenizer cannot encode. UsageError as read_examples(), and if nothing is left to learn from or
    to hold out."""
    files = [*sources, *(Source(Path(path)) for path in held_out)]
    parts = [_encoded(read_examples(file, parse, key, reading), encode, reading) for file in files]
    learned, kept = parts[: len(sources)], parts[len(sources) :]
    if not any(learned) or (held_out and not any(kept)):
        unusable = files[len(sources) :] if any(learned) else sources
        where = ", ".join(str(file.path) for file in unusable)
        raise UsageError(
            f"data: no example of {where} can be used ({reading.n_too_long:,} too long, "
            f"{counted(len(reading.problems), 'bad line')}); a larger context takes longer ones"
        )
    if not held_out:
        limit = held_out_below([key for part in learned for key, _ in part])
        kept = [[item for item in part if item[0] < limit] for part in learned]
        learned = [[item for item in part if item[0] >= limit] for part in learned]
    keys = {key for part in kept for key, _ in part}
    shares = Shares.of([source.weight for source in sources], [len(part) for part in learned])
    if not len(shares.epoch(0, 0)):
        raise UsageError(
            "--data: with these weights an epoch has no example; give larger ones: FILE=WEIGHT"
        )
    return Split(
        [example for part in learned for _, example in part],
        shares,
        [example for part in kept for _, example in part],
        sum(key in keys for part in learned for key, _ in part),
    )


def _encoded(
    examples: Iterable[Example[Parsed]],
    encode: Callable[[list[Parsed]], list[Encoded | None]],
    reading: Reading,
) -> list[tuple[int, Encoded]]:
    """(key, encoded) of the examples that can be encoded and fit."""
    found = []
    iterator = iter(examples)
    # some at a time, which bounds what is held as text
    while batch := list(itertools.islice(iterator, BATCH_EXAMPLES)):
        try:
            encoded = encode([example.value for example in batch])
        except UsageError:
            encoded = [_encoded_alone(example, encode, reading) for example in batch]
        found += [
            (example.key, item)
            for example, item in zip(batch, encoded, strict=True)
            if item is not None
        ]
    return found


def _encoded_alone(
    example: Example[Parsed],
    encode: Callable[[list[Parsed]], list[Encoded | None]],
    reading: Reading,
) -> Encoded | None:
    """An example, encoded; None, with a note, if the tokenizer lacks one of its characters."""
    try:
        return encode([example.value])[0]
    except UsageError as error:
        reading.note(example.path, example.line, in_a_line(error))
        return None


def held_out_below(keys: Sequence[int]) -> int:
    """The hash below which examples are held out: the lowest HELD_OUT_SHARE of all hashes, or more
    where that gives few of `keys`: HELD_OUT_AT_LEAST of them, or the tenth of a small file.

    So an example of a large file is on the same side whatever stands beside it, and copies are
    always together. UsageError if nothing is left to learn from."""
    distinct = sorted(set(keys))
    least = max(1, min(HELD_OUT_AT_LEAST, len(distinct) // 10))
    limit = max(int(HELD_OUT_SHARE * 256**HASH_BYTES), distinct[least - 1] + 1)
    if max(keys) < limit:
        raise UsageError(
            f"data: {counted(len(keys), 'example')} that the split cannot tell apart: nothing is "
            f"left to learn from; give a file of held-out ones with --val-data"
        )
    return limit
