"""`nanochat tokenizer train | compare | inspect`: make a tokenizer, measure tokenizers on held-out text, look into one."""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, UsageError, human_time

NAMES = ("bpe", "char", "byte", "gpt2")  # what TOKENIZER may be besides a folder ...
NAMES_WITHOUT_DATA = ("byte", "gpt2")  # ... where there is no data to fit one to
DEFAULT_MAX_BYTES = 4_000_000
BATCH_BYTES = 1_000_000  # text encoded in one call, so that a large document set need not be held as tokens too
LONGEST_SHOWN, CHARACTERS_SHOWN = 12, 100


def build_parser():
    """The parser with its three commands. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat tokenizer",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a tokenizer, compare tokenizers on held-out text, or look into one.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    data_help = "text, as train.py's --data takes it: python, a file, a folder, a pattern, ..."
    bytes_help = "held-out text read at most, in bytes of UTF-8 (default %(default)s)"

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="fit a tokenizer to text and save it",
        description="Fit a tokenizer to the training side of DATA and save it into the folder OUT, for "
        "train.py's --tokenizer=OUT.",
    )
    train.add_argument("data", metavar="DATA", help=data_help)
    train.add_argument(
        "out",
        metavar="OUT",
        help="folder to save it in; one that holds another tokenizer is refused",
    )
    train.add_argument(
        "--kind",
        choices=("bpe", "char"),
        default="bpe",
        help="bpe: byte-pair encoding; char: one id for each character (default %(default)s)",
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        default=-1,
        metavar="N",
        help="ids of --kind=bpe, the special one included (-1: from the size of the data; default %(default)s)",
    )
    train.add_argument(
        "--max-bytes", type=int, default=DEFAULT_MAX_BYTES, metavar="N", help=bytes_help
    )

    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="bytes per token of several tokenizers",
        description="Encode the held-out side of DATA with each tokenizer: bytes per token, speed on one "
        "thread, and whether the text comes back byte for byte. GPT-2's is added when it is "
        "on this machine, and is downloaded only when named.",
    )
    compare.add_argument("data", metavar="DATA", help=data_help)
    compare.add_argument(
        "tokenizers",
        metavar="TOKENIZER",
        nargs="*",
        help="a folder with a tokenizer, a run folder, or a name: gpt2, byte, or bpe and char as train.py would fit "
        "them to DATA (default: bpe)",
    )
    compare.add_argument(
        "--max-bytes", type=int, default=DEFAULT_MAX_BYTES, metavar="N", help=bytes_help
    )
    compare.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )

    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="what a tokenizer holds, and how it splits a text",
        description="Kind, size, special token and longest tokens, and how a text is split.",
    )
    inspect.add_argument(
        "tokenizer",
        metavar="TOKENIZER",
        help="a folder with a tokenizer, a run folder, byte or gpt2",
    )
    inspect.add_argument("--text", metavar="TEXT", help="a text to split into its tokens")

    parser.epilog = "\n".join(
        [
            "commands in full (nanochat tokenizer COMMAND --help explains them):",
            *(
                "  " + " ".join(command.format_usage().split()[1:])
                for command in (train, compare, inspect)
            ),
        ]
    )
    return parser


def main(argv):
    """Run the app with its arguments (without the app's name); returns the exit code. Raises UsageError, Unavailable."""
    args = build_parser().parse_args(argv)
    return {"train": run_train, "compare": run_compare, "inspect": run_inspect}[args.command](args)


# ---------------------------------------------------------------------------------------------------------------------
# train


def run_train(args):
    """`nanochat tokenizer train`: fit, save, and measure on held-out text."""
    from nanochat.data.sources import open_corpus
    from nanochat.data.token_cache import fit_tokenizer
    from nanochat.data.tokenizer import MIN_BPE_VOCAB, TOKENIZER_FILE, read_tokenizer

    problems = max_bytes_problems(args)
    if args.kind != "bpe" and args.vocab_size != -1:
        problems.append(
            f"--vocab-size {args.vocab_size}: --kind={args.kind} has as many ids as the text has characters; leave it out"
        )
    elif args.vocab_size != -1 and args.vocab_size < MIN_BPE_VOCAB:
        problems.append(
            f"--vocab-size {args.vocab_size}: BPE starts from 256 bytes and one special token; give at least "
            f"{MIN_BPE_VOCAB}, or -1 to derive it from the size of the data"
        )
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        problems.append(f"{out}: is a file; name a folder for the tokenizer")
    elif any((out / name).exists() for name in ("encoder.json", "merges.txt")):
        problems.append(
            f"{out}: holds the files of a tokenizer of GPT-2's kind; name another folder"
        )
    elif (out / TOKENIZER_FILE).exists():
        try:
            read_tokenizer(out)
        except UsageError as error:
            problems.append(f"{error}; it is not overwritten, name another folder")
    if problems:
        raise UsageError("\n".join(problems))
    corpus = open_corpus(args.data)
    try:
        out.mkdir(
            parents=True, exist_ok=True
        )  # before the work, which would be lost if this failed after it
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be made ({error.strerror}); name a folder that can be written"
        ) from None
    began = time.perf_counter()
    fitted = fit_tokenizer(corpus, args.kind, args.vocab_size)
    seconds = time.perf_counter() - began
    save_new(fitted, out)
    row = measure(args.kind, fitted, held_out_text(corpus, args.max_bytes))
    print(
        f"vocabulary       {fitted.vocab_size:,} ids, {fitted.kind}, fingerprint {fitted.fingerprint[:16]}"
    )
    if args.vocab_size not in (-1, fitted.vocab_size):
        print(
            f"                 the text yields no more merges: {args.vocab_size:,} ids were asked for"
        )
    print(f"time             {human_time(seconds)} (training text: {corpus.train_bytes:,} bytes)")
    per_token = (
        row["error"]
        or f"{row['bytes_per_token']:.3f} on {row['bytes']:,} bytes of held-out text ({row['tokens']:,} tokens)"
    )
    print(f"bytes per token  {per_token}")
    print(f"saved in         {out}      use it: python train.py --tokenizer={out}")
    return EXIT_COMPLETED


def save_new(fitted, out):
    """Save a tokenizer unless the folder holds another one (UsageError); the same one may stand there already."""
    from nanochat.data.tokenizer import TOKENIZER_FILE, read_tokenizer

    if (out / TOKENIZER_FILE).exists():
        there = read_tokenizer(out)
        if there.fingerprint != fitted.fingerprint:
            raise UsageError(
                f"{out} holds another tokenizer ({there.kind}, {there.vocab_size:,} ids, fingerprint "
                f"{there.fingerprint[:16]}; this one would be {fitted.kind}, {fitted.vocab_size:,} ids, "
                f"{fitted.fingerprint[:16]}); it is not overwritten, since runs may depend on it: name another folder "
                "or delete that one"
            )
        return
    try:
        fitted.save(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror})") from None


# ---------------------------------------------------------------------------------------------------------------------
# compare


def run_compare(args):
    """`nanochat tokenizer compare`: one row for each tokenizer, on the same held-out text."""
    from nanochat.data.tokenizer import GPT2_FINGERPRINT

    with contextlib.redirect_stdout(
        sys.stderr if args.json else sys.stdout
    ):  # what a download says is no JSON
        corpus, texts, rows = compared(args)
    reference = next(
        (row["bytes_per_token"] for row in rows if row["fingerprint"] == GPT2_FINGERPRINT),
        None,
    )
    for row in rows:
        row["ratio_to_gpt2"] = (
            row["bytes_per_token"] / reference if reference and row["bytes_per_token"] else None
        )
    n_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if args.json:
        print(
            json.dumps(
                {"data": args.data, "documents": len(texts), "bytes": n_bytes, "tokenizers": rows},
                indent=2,
            )
        )
        return EXIT_COMPLETED
    print(
        f"{args.data}: {n_bytes:,} bytes of held-out text, {len(texts):,} document{'s' * (len(texts) != 1)} ({corpus.note})"
    )
    for line in table(rows):
        print(line)
    if reference is None:
        print(
            "GPT-2's tokenizer is not on this machine; name gpt2 to have it downloaded, or a folder with its encoder.json and merges.txt"
        )
    return EXIT_COMPLETED


def compared(args):
    """(corpus, held-out texts, rows of measure()) for the arguments of `compare`. UsageError for whatever is wrong with them."""
    problems, saved = max_bytes_problems(args), {}
    for name in args.tokenizers:
        if name not in ("bpe", "char"):  # these are fitted once the data is open
            try:
                saved[name] = open_tokenizer(name, NAMES)
            except UsageError as error:
                problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    from nanochat.data.sources import open_corpus
    from nanochat.data.token_cache import fit_tokenizer
    from nanochat.data.tokenizer import GPT2_FINGERPRINT, gpt2_tokenizer

    corpus = open_corpus(args.data)
    names = list(dict.fromkeys(args.tokenizers or ["bpe"]))
    chosen = [
        (name, saved[name] if name in saved else fit_tokenizer(corpus, name, -1)) for name in names
    ]
    if all(tokenizer.fingerprint != GPT2_FINGERPRINT for _, tokenizer in chosen):
        try:
            gpt2 = saved_gpt2_tokenizer()
            chosen += [("gpt2", gpt2)] if gpt2 else []
        except UsageError as error:  # nobody asked for it
            print(f"GPT-2's tokenizer is left out: {error}", file=sys.stderr)
    texts = held_out_text(corpus, args.max_bytes)
    return corpus, texts, [measure(name, tokenizer, texts) for name, tokenizer in chosen]


def max_bytes_problems(args):
    """A list with the complaint about --max-bytes, if there is one."""
    return (
        []
        if args.max_bytes > 0
        else [
            f"--max-bytes {args.max_bytes}: must be positive; it is the held-out text to read, in bytes"
        ]
    )


def open_tokenizer(name, names=NAMES_WITHOUT_DATA):
    """The tokenizer that a TOKENIZER argument means: byte, gpt2 (downloaded if need be), a folder with one, or a run folder.

    UsageError if there is none, also for bpe and char, which mean nothing without data. names: those that the command takes."""
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
    if not folder.exists():
        raise UsageError(
            f"{name}: is a kind that is fitted to data; name a folder that `nanochat tokenizer train` or a run made"
            if name in NAMES
            else f"{name}: no such folder, and not a name of a tokenizer ({', '.join(names)})"
        )
    if folder.is_file() and folder.name in (TOKENIZER_FILE, "encoder.json"):
        folder = folder.parent
    return read_tokenizer(folder)


def held_out_text(corpus, max_bytes):
    """Held-out documents (list of str) in order, up to max_bytes of UTF-8; the last one is cut at a character.

    UsageError if not even the first character fits."""
    texts, left = [], max_bytes
    for shard in corpus.val:
        for text in shard.documents():
            content = text.encode("utf-8")
            texts.append(text if len(content) <= left else content[:left].decode("utf-8", "ignore"))
            left -= len(content)
            if left <= 0:
                break
        if left <= 0:
            break
    texts = [text for text in texts if text]
    if not texts:
        raise UsageError(
            f"--max-bytes {max_bytes}: is less than the first character of the held-out text"
        )
    return texts


def measure(name, tokenizer, texts):
    """A dict on one tokenizer and some texts; see its keys. A text that it cannot encode makes `error`, and no number then.

    mb_per_second: 10^6 bytes of UTF-8 a second, on one thread, set-up excluded. round_trip: the tokens' bytes, one after
    another, are the text's, exactly."""
    from nanochat.data.token_cache import by_size

    row = {
        "tokenizer": name,
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "bytes": sum(len(text.encode("utf-8")) for text in texts),
        "tokens": None,
        "bytes_per_token": None,
        "mb_per_second": None,
        "round_trip": None,
        "ratio_to_gpt2": None,
        "error": None,
    }
    try:
        tokenizer.encode_batch([texts[0][:1000]])  # builds tiktoken's tables
        seconds, tokens, same = 0.0, 0, True
        for batch in by_size(texts, BATCH_BYTES):
            began = time.perf_counter()
            ids_of = tokenizer.encode_batch(batch)
            seconds += time.perf_counter() - began
            tokens += sum(len(ids) for ids in ids_of)
            same &= all(
                b"".join(map(tokenizer.token_bytes, ids.tolist())) == text.encode("utf-8")
                for ids, text in zip(ids_of, batch, strict=True)
            )
    except UsageError as error:
        row["error"] = str(error).split(";")[0]  # what follows advises on train.py's flags
        return row
    return row | {
        "tokens": tokens,
        "bytes_per_token": row["bytes"] / tokens,
        "mb_per_second": row["bytes"] / 1e6 / seconds,
        "round_trip": same,
    }


def table(rows):
    """Lines of text: a heading and one line a row, columns aligned."""
    cells = [
        (
            "tokenizer",
            "kind",
            "ids",
            "tokens",
            "bytes/token",
            "of GPT-2's",
            "MB/s",
            "text comes back",
        )
    ]
    for row in rows:
        start = (row["tokenizer"], row["kind"], f"{row['vocab_size']:,}")
        if row["bytes_per_token"] is None:
            cells.append((*start, "-", "-", "-", "-", f"no: {row['error']}"))
            continue
        ratio = "-" if row["ratio_to_gpt2"] is None else f"{row['ratio_to_gpt2']:.3f}"
        cells.append(
            (
                *start,
                f"{row['tokens']:,}",
                f"{row['bytes_per_token']:.3f}",
                ratio,
                f"{row['mb_per_second']:.1f}",
                "exactly" if row["round_trip"] else "NO: the bytes differ",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
    for line in cells:
        padded = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=False))
        ]
        yield "  ".join([*padded, line[-1]]).rstrip()


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def run_inspect(args):
    """`nanochat tokenizer inspect`: the tokenizer in words, and the tokens of --text, one a line."""
    tokenizer = open_tokenizer(args.tokenizer)
    from nanochat.data.tokenizer import GPT2_PATTERN, SPLIT_PATTERN

    pattern = {
        None: "none",
        SPLIT_PATTERN: "nanochat's",
        GPT2_PATTERN: "GPT-2's",
    }[tokenizer.pattern]
    longest = (
        sorted(tokenizer.tokens, key=len, reverse=True)[:LONGEST_SHOWN]
        if tokenizer.kind == "bpe"
        else []
    )
    characters = b"".join(tokenizer.tokens).decode("utf-8") if tokenizer.kind == "char" else ""
    print(f"kind           {tokenizer.kind}, split pattern: {pattern}")
    print(f"vocabulary     {tokenizer.vocab_size:,} ids")
    print(f"fingerprint    {tokenizer.fingerprint}")
    print(f"special token  {tokenizer.bos_text}, id {tokenizer.bos}: begins every document")
    if characters:
        print(
            f"characters     {characters[:CHARACTERS_SHOWN]!r}{' ...' * (len(characters) > CHARACTERS_SHOWN)}"
        )
    for i, token in enumerate(longest):
        print(f"{'' if i else 'longest tokens':<14} {len(token):>3} bytes  {shown(token)}")
    if args.text is not None:
        ids = tokenizer.encode(args.text)
        n_bytes = sum(len(tokenizer.token_bytes(i)) for i in ids)
        rate = f", {n_bytes / len(ids):.2f} bytes a token" if ids else ""
        print(f"text           {len(ids):,} tokens for {n_bytes:,} bytes{rate}")
        for i in ids:
            print(f"{i:>14} {shown(tokenizer.token_bytes(i))}")
    return EXIT_COMPLETED


def shown(token):
    """A token's bytes in quotes: as text where they are whole characters, else as bytes."""
    try:
        return repr(token.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(token)
