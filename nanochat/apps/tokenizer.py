"""`nanochat tokenizer train | compare | inspect`: fit, measure or look into a tokenizer."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import EXIT_COMPLETED, UsageError, human_time, path_argument, whole_number

# imported where they are used, so that --help is immediate
if TYPE_CHECKING:
    from nanochat.data.sources import Corpus
    from nanochat.data.tokenizer import Tokenizer

# those that are fitted to data, and have their options here
BPE_NAMES = ("bpe", "bpe-llama")
FITTED_NAMES = (*BPE_NAMES, "char")
# what TOKENIZER may be besides a folder ...
NAMES = (*FITTED_NAMES, "byte", "gpt2")
# ... where there is no data to fit one to
NAMES_WITHOUT_DATA = ("byte", "gpt2")
DEFAULT_MAX_BYTES = 4_000_000
# text encoded in one call, so that the tokens of many documents need not be held as well
BATCH_BYTES = 1_000_000
LONGEST_SHOWN = 12
CHARACTERS_SHOWN = 100


@dataclass(frozen=True)
class Measurement:
    """A tokenizer on some texts, as `compare --json` writes it. Numbers not known are None.

    bytes: of the texts in UTF-8. mb_per_second: 10^6 of them a second, on one thread, set-up
    excluded. round_trip: whether the tokens' bytes, one after another, are the texts' exactly.
    ratio_to_gpt2: of bytes per token. error: why the tokenizer cannot encode the texts."""

    tokenizer: str
    kind: str
    vocab_size: int
    fingerprint: str
    bytes: int
    tokens: int | None = None
    bytes_per_token: float | None = None
    mb_per_second: float | None = None
    round_trip: bool | None = None
    ratio_to_gpt2: float | None = None
    error: str | None = None


def build_parser() -> argparse.ArgumentParser:
    """The parser with its three commands. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat tokenizer",
        allow_abbrev=False,
        # the epilog has one line for each command, which the default formatter would join
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a tokenizer, compare tokenizers on held-out text, or look into one.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = [_add_train(commands), _add_compare(commands), _add_inspect(commands)]
    usages = [" ".join(command.format_usage().split()[1:]) for command in parsers]
    heading = "commands in full (nanochat tokenizer COMMAND --help explains them):"
    parser.epilog = "\n".join([heading, *(f"  {usage}" for usage in usages)])
    return parser


def _add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="fit a tokenizer to text and save it",
        description="Fit a tokenizer to the training side of DATA and save it into the folder OUT, "
        "for train.py's --tokenizer=OUT.",
    )
    _add_data(train)
    train.add_argument(
        "out",
        type=path_argument,
        metavar="OUT",
        help="folder to save it in; a folder that holds another tokenizer is refused",
    )
    train.add_argument(
        "--kind",
        choices=FITTED_NAMES,
        default="bpe",
        help="bpe: byte-pair encoding; bpe-llama: the same with Llama 3's way to split text, which "
        "llama.cpp knows; char: one id for each character (default %(default)s)",
    )
    train.add_argument(
        "--vocab-size",
        type=whole_number,
        default=-1,
        metavar="N",
        help="ids of --kind=bpe or bpe-llama, the special one included (-1: derived from the size "
        "of the data; default %(default)s)",
    )
    _add_max_bytes(train)
    return train


def _add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="bytes per token of several tokenizers",
        description="Encode the held-out side of DATA with each tokenizer: bytes per token, speed "
        "on one thread, and whether decoding restores the text byte for byte. GPT-2's is added if "
        "it is on this machine, and downloaded only when named.",
    )
    _add_data(compare)
    compare.add_argument(
        "tokenizers",
        type=path_argument,
        metavar="TOKENIZER",
        nargs="*",
        help="a folder with a tokenizer, a run folder, or a name: gpt2, byte, or bpe, bpe-llama "
        "and char as train.py would fit them to DATA (default: bpe)",
    )
    _add_max_bytes(compare)
    _add_json(compare, "print one JSON object instead of the table")
    return compare


def _add_inspect(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="what a tokenizer holds, and how it splits a text",
        description="Kind, size, special token and longest tokens, and how a text is split.",
    )
    inspect.add_argument(
        "tokenizer",
        type=path_argument,
        metavar="TOKENIZER",
        help="a folder with a tokenizer, a run folder, byte or gpt2",
    )
    inspect.add_argument("--text", metavar="TEXT", help="a text to split into its tokens")
    _add_json(inspect, "print one JSON object instead of lines")
    return inspect


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        type=path_argument,
        metavar="DATA",
        help="text, as train.py's --data takes it: python, a file, a folder, a pattern, ...",
    )


def _add_json(parser: argparse.ArgumentParser, text: str) -> None:
    # `json` is the module in the code that takes this value
    parser.add_argument("--json", dest="as_json", action="store_true", help=text)


def _add_max_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bytes",
        type=whole_number,
        default=DEFAULT_MAX_BYTES,
        metavar="N",
        help="held-out text to read at most, in bytes of UTF-8 (default %(default)s)",
    )


def main(argv: list[str]) -> int:
    """Run the app with its arguments (without the app's name); returns the exit code.

    Raises UsageError and Unavailable."""
    values = vars(build_parser().parse_args(argv))
    commands = {"train": run_train, "compare": run_compare, "inspect": run_inspect}
    return commands[values.pop("command")](**values)


# --------------------------------------------------------------------------------------------------
# train


def run_train(*, data: str, out: str, kind: str, vocab_size: int, max_bytes: int) -> int:
    """`nanochat tokenizer train`: fit, save, and measure on held-out text."""
    from nanochat.data.sources import open_corpus
    from nanochat.data.token_cache import fit_tokenizer

    folder = Path(out)
    problems = [
        *_max_bytes_problems(max_bytes),
        *_vocab_size_problems(kind, vocab_size),
        *_folder_problems(folder),
    ]
    if problems:
        raise UsageError("\n".join(problems))
    corpus = open_corpus(data)
    try:
        # before the work, which would be lost if this failed after it
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be created ({error.strerror}); name a folder that can be written"
        ) from None
    began = time.perf_counter()
    # kept in the cache too, where train.py finds it for the same text
    fitted = fit_tokenizer(corpus, kind, vocab_size)
    seconds = time.perf_counter() - began
    _save_new(fitted, folder)
    measured = measure(kind, fitted, held_out_text(corpus, max_bytes))

    fingerprint = fitted.fingerprint[:16]
    print(f"vocabulary       {fitted.vocab_size:,} ids, {fitted.kind}, fingerprint {fingerprint}")
    if vocab_size not in (-1, fitted.vocab_size):
        print(f"                 {vocab_size:,} ids were requested: the text yields no more merges")
    print(f"time             {human_time(seconds)} (training text: {corpus.train_bytes:,} bytes)")
    per_token = measured.error or (
        f"{measured.bytes_per_token:.3f} on {measured.bytes:,} bytes of held-out text "
        f"({measured.tokens:,} tokens)"
    )
    print(f"bytes per token  {per_token}")
    print(f"saved in         {out}      use it: python train.py --tokenizer={out}")
    return EXIT_COMPLETED


def _vocab_size_problems(kind: str, vocab_size: int) -> Iterator[str]:
    from nanochat.data.tokenizer import MIN_BPE_VOCAB

    if vocab_size == -1:
        return
    if kind not in BPE_NAMES:
        yield (
            f"--vocab-size {vocab_size}: --kind={kind} has as many ids as the text has characters; "
            f"leave it out"
        )
    elif vocab_size < MIN_BPE_VOCAB:
        yield (
            f"--vocab-size {vocab_size}: BPE starts from 256 bytes and one special token; give at "
            f"least {MIN_BPE_VOCAB}, or -1 to derive it from the size of the data"
        )


def _folder_problems(folder: Path) -> Iterator[str]:
    """Why a tokenizer cannot be saved in a folder. Only the same one may be there already."""
    from nanochat.data.tokenizer import TOKENIZER_FILE, read_tokenizer

    if folder.exists() and not folder.is_dir():
        yield f"{folder}: is a file; name a folder for the tokenizer"
    elif any((folder / name).exists() for name in ("encoder.json", "merges.txt")):
        # saving ours next to them would leave a folder with two tokenizers, of which readers take
        # ours
        yield f"{folder}: holds the files of a tokenizer of GPT-2's kind; name another folder"
    elif (folder / TOKENIZER_FILE).exists():
        try:
            read_tokenizer(folder)
        except UsageError as error:
            # even a damaged file stays: it may be all that is left of a tokenizer that runs depend
            # on
            yield f"{error}; it is not overwritten, name another folder"


def _save_new(fitted: "Tokenizer", folder: Path) -> None:
    """Save a tokenizer unless the folder holds another one (UsageError)."""
    from nanochat.data.tokenizer import TOKENIZER_FILE, read_tokenizer

    if (folder / TOKENIZER_FILE).exists():
        there = read_tokenizer(folder)
        # the same text gives the same tokenizer, so repeating the command is no error
        if there.fingerprint != fitted.fingerprint:
            raise UsageError(
                f"{folder} holds another tokenizer ({there.kind}, {there.vocab_size:,} ids, "
                f"fingerprint {there.fingerprint[:16]}; this one would be {fitted.kind}, "
                f"{fitted.vocab_size:,} ids, {fitted.fingerprint[:16]}); it is not overwritten, "
                f"since runs may depend on it: name another folder or delete that one"
            )
        return
    try:
        fitted.save(folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from None


# --------------------------------------------------------------------------------------------------
# compare


def run_compare(*, data: str, tokenizers: list[str], max_bytes: int, as_json: bool) -> int:
    """`nanochat tokenizer compare`: one row for each tokenizer, on the same held-out text."""
    # downloads report lines, which are not JSON
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        corpus, texts, rows = _compared(data, tokenizers, max_bytes)
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if as_json:
        found = {
            "data": data,
            "documents": len(texts),
            "bytes": n_bytes,
            "tokenizers": [asdict(row) for row in rows],
        }
        print(json.dumps(found, indent=2))
        return EXIT_COMPLETED
    documents = "1 document" if len(texts) == 1 else f"{len(texts):,} documents"
    print(f"{data}: {n_bytes:,} bytes of held-out text, {documents} ({corpus.note})")
    for line in table(rows):
        print(line)
    if not any(_is_gpt2(row) for row in rows):
        print(
            "GPT-2's tokenizer is not on this machine; name gpt2 to download it, or a folder with "
            "its encoder.json and merges.txt"
        )
    return EXIT_COMPLETED


def _compared(
    data: str, names: list[str], max_bytes: int
) -> tuple["Corpus", list[str], list[Measurement]]:
    """(corpus, held-out texts, a Measurement of each tokenizer) for `compare`.

    Raises UsageError for whatever is wrong with the arguments."""
    problems = list(_max_bytes_problems(max_bytes))
    saved = {}
    for name in names:
        # the others are fitted once the data is open
        if name not in FITTED_NAMES:
            try:
                saved[name] = open_tokenizer(name, NAMES)
            except UsageError as error:
                problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    from nanochat.data.sources import open_corpus
    from nanochat.data.token_cache import fit_tokenizer

    corpus = open_corpus(data)
    chosen = {
        name: saved[name] if name in saved else fit_tokenizer(corpus, name, -1)
        for name in names or ["bpe"]
    }
    # GPT-2's is the yardstick that people know, but not worth a download that nobody asked for
    chosen |= _gpt2_if_here(chosen)
    texts = held_out_text(corpus, max_bytes)
    rows = [measure(name, tokenizer, texts) for name, tokenizer in chosen.items()]
    return corpus, texts, _with_ratios(rows)


def _gpt2_if_here(chosen: dict[str, "Tokenizer"]) -> dict[str, "Tokenizer"]:
    """{"gpt2": GPT-2's tokenizer} if it is on this machine and not among the chosen ones."""
    from nanochat.data.tokenizer import GPT2_FINGERPRINT, saved_gpt2_tokenizer

    if any(tokenizer.fingerprint == GPT2_FINGERPRINT for tokenizer in chosen.values()):
        return {}
    try:
        gpt2 = saved_gpt2_tokenizer()
    except UsageError as error:
        # nobody asked for it
        print(f"GPT-2's tokenizer is left out: {error}", file=sys.stderr)
        return {}
    return {"gpt2": gpt2} if gpt2 else {}


def _is_gpt2(row: Measurement) -> bool:
    from nanochat.data.tokenizer import GPT2_FINGERPRINT

    # by content, since a folder may hold GPT-2's files under any name
    return row.fingerprint == GPT2_FINGERPRINT


def _with_ratios(rows: list[Measurement]) -> list[Measurement]:
    """The rows with their ratio_to_gpt2, where one of them is of GPT-2's tokenizer."""
    # GPT-2's may have been named by a folder
    reference = next((row.bytes_per_token for row in rows if _is_gpt2(row)), None)
    if not reference:
        return rows
    return [
        replace(row, ratio_to_gpt2=row.bytes_per_token / reference) if row.bytes_per_token else row
        for row in rows
    ]


def _max_bytes_problems(max_bytes: int) -> Iterator[str]:
    if max_bytes <= 0:
        yield (
            f"--max-bytes {max_bytes}: must be positive; it is the held-out text to read, in bytes"
        )


def open_tokenizer(name: str, names: tuple[str, ...] = NAMES_WITHOUT_DATA) -> "Tokenizer":
    """The tokenizer that a TOKENIZER argument means.

    name: byte, gpt2 (downloaded if need be), a folder with one, or a run folder. names: those that
    the command takes. Raises UsageError if there is none, also for FITTED_NAMES, which mean
    nothing without data."""
    from nanochat.data.tokenizer import (
        TOKENIZER_FILE,
        gpt2_tokenizer,
        read_tokenizer,
        train_tokenizer,
    )

    if name == "byte":
        return train_tokenizer("byte", [], -1)
    if name == "gpt2":
        return gpt2_tokenizer()
    folder = Path(name)
    # a folder may have the name of a kind, and then it is meant
    if not folder.exists() and name in NAMES:
        raise UsageError(
            f"{name}: is a kind that is fitted to data; name a folder that `nanochat tokenizer "
            f"train` or a run wrote"
        )
    if not folder.exists():
        raise UsageError(
            f"{name}: no such folder, and not a name of a tokenizer ({', '.join(names)})"
        )
    # the file itself is accepted for its folder
    if folder.is_file() and folder.name in (TOKENIZER_FILE, "encoder.json"):
        folder = folder.parent
    return read_tokenizer(folder)


def held_out_text(corpus: "Corpus", max_bytes: int) -> list[str]:
    """Held-out documents in order, up to max_bytes of UTF-8; the last is cut at a character.

    Raises UsageError if not even the first character fits."""
    texts = []
    left = max_bytes
    documents = (text for shard in corpus.val for text in shard.documents())
    for text in documents:
        content = text.encode("utf-8")
        texts.append(text if len(content) <= left else content[:left].decode("utf-8", "ignore"))
        left -= len(content)
        if left <= 0:
            break
    # a cut within the first character of a document leaves nothing of it
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError(
            f"--max-bytes {max_bytes}: is less than the first character of the held-out text"
        )
    return texts


def measure(name: str, tokenizer: "Tokenizer", texts: list[str]) -> Measurement:
    """The Measurement of a tokenizer on some texts. One that cannot encode them has an error."""
    from nanochat.data.token_cache import by_size

    row = Measurement(
        tokenizer=name,
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        bytes=sum(len(text.encode("utf-8")) for text in texts),
    )
    seconds = 0.0
    tokens = 0
    same = True
    try:
        # builds tiktoken's tables, which is not measured
        tokenizer.encode_batch([texts[0][:1000]])
        for batch in by_size(texts, BATCH_BYTES):
            # only encoding is timed, not the check of the round trip below
            began = time.perf_counter()
            ids_of = tokenizer.encode_batch(batch)
            seconds += time.perf_counter() - began
            tokens += sum(len(ids) for ids in ids_of)
            for ids, text in zip(ids_of, batch, strict=True):
                # compared as bytes, since a token may end in the middle of a character
                restored = b"".join(map(tokenizer.token_bytes, ids.tolist()))
                same = same and restored == text.encode("utf-8")
    except UsageError as error:
        # what follows the semicolon advises on train.py's flags
        return replace(row, error=str(error).split(";")[0])
    return replace(
        row,
        tokens=tokens,
        bytes_per_token=row.bytes / tokens,
        mb_per_second=row.bytes / 1e6 / seconds,
        round_trip=same,
    )


COLUMNS = ("tokenizer", "kind", "ids", "tokens", "bytes/token", "of GPT-2's", "MB/s", "round trip")


def table(rows: list[Measurement]) -> Iterator[str]:
    """Lines of text: a heading and one line a row, columns aligned."""
    lines = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        # names to the left, numbers to the right, the last column as it is
        names = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[2:-1], widths[2:-1], strict=True)]
        yield "  ".join([*names, *numbers, line[-1]]).rstrip()


def _cells(row: Measurement) -> tuple[str, ...]:
    """A row of the table."""
    start = (row.tokenizer, row.kind, f"{row.vocab_size:,}")
    if row.bytes_per_token is None:
        return (*start, "-", "-", "-", "-", f"no: {row.error}")
    return (
        *start,
        f"{row.tokens:,}",
        f"{row.bytes_per_token:.3f}",
        "-" if row.ratio_to_gpt2 is None else f"{row.ratio_to_gpt2:.3f}",
        f"{row.mb_per_second:.1f}",
        "exact" if row.round_trip else "NO: the bytes differ",
    )


# --------------------------------------------------------------------------------------------------
# inspect


def run_inspect(*, tokenizer: str, text: str | None, as_json: bool) -> int:
    """`nanochat tokenizer inspect`: the tokenizer in words, and the tokens of a text."""
    # a download reports lines, which are not JSON
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        opened = open_tokenizer(tokenizer)
    if as_json:
        print(json.dumps(_as_json(opened, text), indent=2))
        return EXIT_COMPLETED
    for line in _description(opened, text):
        print(line)
    return EXIT_COMPLETED


def _as_json(tokenizer: "Tokenizer", text: str | None) -> dict[str, Any]:
    """What _description() says, as data. Tokens are shown as in the lines: of some the bytes are no
    text."""
    described: dict[str, Any] = {
        "kind": tokenizer.kind,
        "pattern": tokenizer.pattern,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "special_ids": {tokenizer.bos_text: tokenizer.bos, **tokenizer.special_ids},
    }
    if text is not None:
        ids = [int(i) for i in tokenizer.encode(text)]
        described["ids"] = ids
        described["tokens"] = [shown(tokenizer.token_bytes(i)) for i in ids]
        described["bytes"] = sum(len(tokenizer.token_bytes(i)) for i in ids)
    return described


def _description(tokenizer: "Tokenizer", text: str | None) -> Iterator[str]:
    from nanochat.data.tokenizer import GPT2_PATTERN, LLAMA_PATTERN, SPLIT_PATTERN

    patterns = {
        None: "none",
        SPLIT_PATTERN: "nanochat's",
        LLAMA_PATTERN: "Llama 3's",
        GPT2_PATTERN: "GPT-2's",
    }
    yield f"kind           {tokenizer.kind}, split pattern: {patterns[tokenizer.pattern]}"
    yield f"vocabulary     {tokenizer.vocab_size:,} ids"
    yield f"fingerprint    {tokenizer.fingerprint}"
    yield f"special token  {tokenizer.bos_text}, id {tokenizer.bos}: begins every document"
    for name, token_id in tokenizer.special_ids.items():
        yield f"{'':<14} {name}, id {token_id}"
    if tokenizer.kind == "char":
        characters = b"".join(tokenizer.tokens).decode("utf-8")
        more = " ..." if len(characters) > CHARACTERS_SHOWN else ""
        yield f"characters     {characters[:CHARACTERS_SHOWN]!r}{more}"
    if tokenizer.kind == "bpe":
        longest = sorted(tokenizer.tokens, key=len, reverse=True)[:LONGEST_SHOWN]
        labels = ["longest tokens"] + [""] * (len(longest) - 1)
        for label, token in zip(labels, longest, strict=True):
            yield f"{label:<14} {len(token):>3} bytes  {shown(token)}"
    if text is not None:
        # bytes of tokens, not of the text: a char tokenizer may refuse, none may lose any
        ids = tokenizer.encode(text)
        n_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids)
        rate = f", {n_bytes / len(ids):.2f} bytes a token" if ids else ""
        yield f"text           {len(ids):,} tokens for {n_bytes:,} bytes{rate}"
        for i in ids:
            yield f"{i:>14} {shown(tokenizer.token_bytes(i))}"


def shown(token: bytes) -> str:
    """A token's bytes in quotes: as text where they are whole characters, else as bytes."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)
