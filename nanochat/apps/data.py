"""`nanochat data inspect | fetch | tokenize | mix`: what a data set holds, having it here before training, and mixing several."""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from nanochat.common import (
    EXIT_COMPLETED,
    Unavailable,
    UsageError,
    base_dir,
    human_bytes,
    human_time,
    new_folder,
    stream_seed,
    write_json,
)

SAMPLE_SHARDS, SAMPLE_DOCUMENTS = (
    8,
    2000,
)  # `inspect` measures documents from the beginnings of so many shards
PERCENTILES = (5, 25, 50, 75, 95)
EXAMPLES, EXAMPLE_LINES, EXAMPLE_WIDTH = 3, 3, 100
COUNT_BYTES = (
    8 << 20
)  # `fetch` counts the tokens of so much text of a shard, and estimates the rest from it ...
BYTES_PER_TOKEN = 5  # of a shard that is missing, so that it is not known better
COUNT_MARGIN = (
    0.02  # ... as this much less than it seems: a shard too many does no harm, one too few does
)
DEFAULT_SHARD_BYTES = 64 << 20
HELD_OUT_SHARE = 0.02  # of a mix
GROUP_DOCUMENTS = 1024  # a row group of parquet: what a reader holds at once


def build_parser():
    """The parser with its four commands. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat data",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look into a data set, have it on this disk before training, or mix several.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    data_help = "text, as train.py's --data takes it: climbmix, hf:..., python, a file, a folder, a pattern, ..."
    val_help = "path, glob or folder to validate on; empty: what train.py would hold out of DATA"

    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="what a data set is and what of it is here",
        description="Size, held-out part, fingerprint, licence, lengths of documents, and which files are "
        "on this disk. Of a large data set on the network nothing but the listing is "
        "fetched, unless --documents asks to see some.",
    )
    inspect.add_argument("data", metavar="DATA", help=data_help)
    inspect.add_argument("--val-data", default="", metavar="PATH", help=val_help)
    inspect.add_argument(
        "--documents",
        type=int,
        default=-1,
        metavar="N",
        help=f"documents to show the beginning of; fetches a file if none is here (-1: {EXAMPLES}, if text is here)",
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    fetch = commands.add_parser(
        "fetch",
        allow_abbrev=False,
        help="download what a training run will read",
        description="Download the files of DATA that train.py reads in a run of --tokens with the same --seed, "
        "--tokenizer and --max-seq-len, and those to validate on. Says what is missing, and exits "
        "with 1 if anything is. A data set that is small is fetched whole, as train.py does.",
    )
    tokenize = commands.add_parser(
        "tokenize",
        allow_abbrev=False,
        help="download and tokenize what a training run will read",
        description="Do now what train.py does while it trains: download the shards of DATA, make the "
        "tokenizer, and write the token files that every later run with it finds.",
    )
    for command in (fetch, tokenize):
        command.add_argument("data", metavar="DATA", help=data_help)
        amount = command.add_mutually_exclusive_group()
        amount.add_argument(
            "--tokens",
            type=_count,
            metavar="N",
            help="tokens that the run will train on, such as 2e9",
        )
        amount.add_argument(
            "--shards",
            type=_count,
            metavar="N",
            help="so many training shards, in the order in which a run reads them",
        )
        amount.add_argument("--all", action="store_true", help="the whole data set")
        command.add_argument("--val-data", default="", metavar="PATH", help=val_help)
        command.add_argument(
            "--tokenizer",
            default="bpe",
            metavar="NAME",
            help="the run's: bpe, char, byte, gpt2, a folder with one, or a run folder (default %(default)s)",
        )
        command.add_argument(
            "--vocab-size",
            type=int,
            default=-1,
            metavar="N",
            help="the run's (-1: from the size of the data)",
        )
        command.add_argument(
            "--seed",
            type=int,
            default=42,
            metavar="N",
            help="the run's, which orders the shards (default %(default)s)",
        )
        command.add_argument(
            "--max-seq-len",
            type=int,
            default=2048,
            metavar="N",
            help="the run's (default %(default)s)",
        )

    mix = commands.add_parser(
        "mix",
        allow_abbrev=False,
        help="write a folder of documents drawn from several data sets",
        description="Write a folder for train.py's --data=OUT: documents of the sources in shuffled order, their "
        "shares of the bytes as the weights say, none drawn twice; in the last file by name "
        "documents that the sources hold out; in sources.json what came from where. A document is "
        "cut only where a source reaches its share.",
    )
    mix.add_argument("out", metavar="OUT", help="folder to write; it must be new or empty")
    mix.add_argument(
        "sources",
        metavar="SOURCE=WEIGHT",
        nargs="+",
        help="data as train.py's --data takes it, and its weight, such as python=0.5",
    )
    mix.add_argument(
        "--bytes",
        type=_count,
        required=True,
        metavar="N",
        help="bytes of text to train on, such as 2e9",
    )
    mix.add_argument(
        "--val-bytes",
        type=_count,
        default=-1,
        metavar="N",
        help=f"bytes of text to validate on (-1: {HELD_OUT_SHARE:.0%}% of --bytes, at most a shard)",
    )
    mix.add_argument(
        "--shard-bytes",
        type=_count,
        default=DEFAULT_SHARD_BYTES,
        metavar="N",
        help="bytes of text in a file; also what is held in memory to shuffle (default %(default)s)",
    )
    mix.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="of the drawing and the order (default %(default)s)",
    )
    mix.add_argument(
        "--repeat",
        action="store_true",
        help="draw from a source again when it runs out, instead of more from the others",
    )

    parser.epilog = "\n".join(
        [
            "commands in full (nanochat data COMMAND --help explains them):",
            *(
                "  " + " ".join(command.format_usage().split()[1:])
                for command in (inspect, fetch, tokenize, mix)
            ),
        ]
    )
    return parser


def _count(text):
    """An argument that is a whole number of at least 1, also written as 2e9."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (1 <= value < 1 << 63 and value == int(value)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number of at least 1 (2e9 is one)"
        )
    return int(value)


def main(argv):
    """Run the app with its arguments (without the app's name); returns the exit code. Raises UsageError, Unavailable."""
    args = build_parser().parse_args(argv)
    return {"inspect": run_inspect, "fetch": run_fetch, "tokenize": run_tokenize, "mix": run_mix}[
        args.command
    ](args)


# ---------------------------------------------------------------------------------------------------------------------
# inspect


def run_inspect(args):
    """`nanochat data inspect`: print facts(), as lines or as JSON."""
    if args.documents < -1:
        raise UsageError(
            f"--documents {args.documents}: give a number of documents, 0 for none, or -1"
        )
    with contextlib.redirect_stdout(
        sys.stderr if args.json else sys.stdout
    ):  # what a download says is no JSON
        found = facts(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(fact_lines(found)))
    return EXIT_COMPLETED


def facts(args):
    """A JSON-able dict on the data set that the arguments of `inspect` name; see its keys. Numbers not known are None."""
    from nanochat.data.sources import is_remote, remarks

    corpus = listed_corpus(args.data, args.val_data, fetch=args.documents > 0)
    shards = sampled_shards(corpus, fetch=args.documents > 0)
    wanted = EXAMPLES if args.documents == -1 else args.documents
    sampled, examples = [], []
    for shard in shards:
        for document in itertools.islice(
            shard.documents(), max(wanted, SAMPLE_DOCUMENTS // len(shards))
        ):
            sampled.append(len(document.encode("utf-8")))
            if len(examples) < wanted:
                examples.append(beginning(document))
    known = known_facts(args.data)
    return {
        "data": args.data,
        **known,
        "revision": corpus.revision,
        "held_out": corpus.note,
        "remarks": remarks(corpus),
        "fingerprint": corpus.fingerprint,
        "train": side_facts(corpus.train),
        "val": side_facts(corpus.val),
        "tokenized_before_training": corpus.eager,
        "sources": mixed_from(args.data),
        "documents": length_facts(sampled, len(shards)) if sampled else None,
        "reason": ""
        if sampled
        else "its text is not on this disk; --documents N fetches a file of it to look into",
        "examples": examples,
        "base_dir": str(base_dir()) if is_remote(args.data) else None,
    }


def mixed_from(folder):
    """The sources of a folder that `mix` wrote, as its sources.json says; None for any other data."""
    try:
        found = json.loads((Path(folder) / "sources.json").read_text(encoding="utf-8"))
        return [
            {name: source[name] for name in ("source", "share", "licence", "fingerprint")}
            for source in found["sources"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def listed_corpus(data, val_data, fetch):
    """open_corpus(), but with fetch False a single large file of a remote data set is not fetched to split it: then the
    validation side is empty."""
    from nanochat.data.hub import resolve
    from nanochat.data.sources import (
        Corpus,
        Shard,
        is_remote,
        naming_what_needs_no_network,
        open_corpus,
    )

    if is_remote(data) and not fetch and not val_data:
        with naming_what_needs_no_network():
            listing = resolve(data)
        files = listing.train
        if (
            len(files) == 1
            and not listing.val
            and not files[0].is_local()
            and files[0].n_bytes > COUNT_BYTES
        ):
            shard = Shard(
                files[0].name, files, files[0].fingerprint, files[0].n_bytes, column=listing.column
            )
            return Corpus(
                data,
                [shard],
                [],
                "the last tenth of the one file will be held out",
                listing.revision,
            )
    return open_corpus(data, val_data)


def sampled_shards(corpus, fetch):
    """Training shards, evenly spread, whose text is on this disk; if there is none, the first, if it may be fetched."""
    here = [
        shard for shard in corpus.train if all(file.is_local() for file in shard.remote_files())
    ]
    return here[:: -(-len(here) // SAMPLE_SHARDS)] if here else corpus.train[:1] if fetch else []


def known_facts(data):
    """what, licence and url of a data set with a short name; of the others None."""
    from nanochat.data.hub import KNOWN

    if data in KNOWN:
        return {name: getattr(KNOWN[data], name) for name in ("what", "licence", "url")}
    if data == "python":
        return {
            "what": "Python source on this machine: the standard library and torch",
            "licence": "PSF-2.0 and BSD-3-Clause",
            "url": None,
        }
    if data.startswith("hf:"):
        repo = data.removeprefix("hf:").split(":")[0].split("@")[0]
        return {"what": None, "licence": None, "url": f"https://huggingface.co/datasets/{repo}"}
    return {"what": None, "licence": None, "url": None}


def side_facts(shards):
    """A dict on the training or the validation shards. text_bytes is estimated where files are on the network."""
    files = [file for shard in shards for file in shard.remote_files()]
    return {
        "shards": len(shards),
        "text_bytes": sum(shard.n_bytes for shard in shards),
        "text_bytes_estimated": bool(files),
        "files": len(files) or sum(len(shard.files) for shard in shards),
        "files_here": sum(file.is_local() for file in files)
        if files
        else sum(len(shard.files) for shard in shards),
        "file_bytes": sum(file.n_bytes for file in files) if files else None,
        "file_bytes_here": sum(file.n_bytes for file in files if file.is_local())
        if files
        else None,
    }


def length_facts(sizes, n_shards):
    """A dict on the sizes (bytes of UTF-8) of sampled documents."""
    import numpy as np

    return {
        "sampled": len(sizes),
        "from_shards": n_shards,
        "mean_bytes": round(sum(sizes) / len(sizes), 1),
        **{
            f"p{p}_bytes": round(float(value))
            for p, value in zip(PERCENTILES, np.percentile(sizes, PERCENTILES), strict=True)
        },
        "max_bytes": max(sizes),
    }


def beginning(document):
    """The first lines of a document, cut to a width."""
    lines = [line.rstrip() for line in document.split("\n") if line.strip()][:EXAMPLE_LINES]
    return [
        line if len(line) <= EXAMPLE_WIDTH else line[: EXAMPLE_WIDTH - 4] + " ..." for line in lines
    ]


def fact_lines(found):
    """facts() as lines of text."""
    yield f"data          {found['data']}" + (f": {found['what']}" if found["what"] else "")
    if found["licence"] or found["url"]:
        yield f"licence       {found['licence'] or 'see the page'}" + (
            f"; {found['url']}" if found["url"] else ""
        )
    if found["revision"]:
        yield f"revision      {found['revision']}"
    yield f"fingerprint   {found['fingerprint']}"
    for name, side in (("to train on", found["train"]), ("to validate", found["val"])):
        size = (
            f"about {human_bytes(side['text_bytes'])}"
            if side["text_bytes_estimated"]
            else f"{side['text_bytes']:,} bytes"
        )
        yield f"{name:<13} {size} of text in {_n(side['shards'], 'shard')}" + (
            f"; {side['files_here']:,} of {_n(side['files'], 'file')} here ({human_bytes(side['file_bytes_here'])} of "
            f"{human_bytes(side['file_bytes'])})"
            if side["file_bytes"] is not None
            else f", {_n(side['files'], 'file')} on this disk"
        )
    yield f"{'':<13} {found['held_out']}"
    for line in found["remarks"]:
        yield f"{'':<13} {line}"
    yield "tokenized     " + (
        "whole, before training"
        if found["tokenized_before_training"]
        else "shard by shard, as training needs it"
    )
    if found["base_dir"]:
        yield f"downloads     {found['base_dir']}"
    for source in found["sources"] or []:
        yield f"mixed from    {source['source']}: {source['share']:.1%} of the bytes, {source['licence'] or 'licence not known'}"
    if found["documents"]:
        lengths = found["documents"]
        yield (
            f"documents     bytes in a sample of {lengths['sampled']:,} from {_n(lengths['from_shards'], 'shard')}: mean "
            f"{lengths['mean_bytes']:,.0f}, "
            + ", ".join(f"{p}% {lengths[f'p{p}_bytes']:,}" for p in PERCENTILES)
            + f", longest {lengths['max_bytes']:,}"
        )
    else:
        yield f"documents     {found['reason']}"
    for i, lines in enumerate(found["examples"]):
        for line in lines:
            yield f"{f'document {i + 1}' if line is lines[0] else '':<13} {line}"


def _n(count, noun):
    return f"{count:,} {noun}{'s' * (count != 1)}"


# ---------------------------------------------------------------------------------------------------------------------
# fetch and tokenize


def run_fetch(args):
    """`nanochat data fetch`: download shards in the order in which a run reads them. 1 if anything is missing at the end."""
    from nanochat.data.download import DownloadFailed
    from nanochat.data.sources import is_remote
    from nanochat.data.token_cache import TokenCache

    corpus = opened(args)
    if not is_remote(args.data):
        print(f"{args.data} is on this disk: there is nothing to fetch")
        return EXIT_COMPLETED
    missing, had = (
        {},
        {
            file
            for shard in corpus.train + corpus.val
            for file in shard.remote_files()
            if file.is_local()
        },
    )
    fetched = set()

    def fetch(shard):
        """Whether all files of a shard are here, after an attempt to fetch them."""
        for file in shard.remote_files():
            if file in missing:
                return False
            if file in fetched:
                continue
            began, was_here = time.monotonic(), file.is_local()
            try:
                file.fetch(_say)
            except DownloadFailed as error:
                missing[file] = str(error)
                _say(f"{file.name}  missing: {error}")
                return False
            fetched.add(file)
            _say(
                f"{file.name}  {human_bytes(file.n_bytes)} "
                + ("was here" if was_here else f"in {human_time(time.monotonic() - began)}")
            )
        return True

    order = reading_order(corpus, args.seed)
    n_shards = shards_asked_for(args, corpus)
    first = [*corpus.val, *tokenizer_shards(args, corpus)]
    check_room([*first, *order[:n_shards]], 0, args)
    for shard in first:
        fetch(shard)
    if n_shards is not None:
        for shard in order[:n_shards]:
            fetch(shard)
        summary = f"{_n(min(n_shards, len(order)), 'training shard')} of {len(order):,}"
    else:
        can_count = not any(
            file in missing
            for shard in tokenizer_shards(args, corpus)
            for file in shard.remote_files()
        )
        cache = TokenCache(made_tokenizer(args, corpus), 1) if can_count else None
        tokens, n = 0, 0
        for n, shard in enumerate(order, 1):
            size = (
                counted_tokens(shard, cache)
                if fetch(shard) and cache
                else shard.n_bytes / BYTES_PER_TOKEN
            )
            tokens += size // args.max_seq_len * args.max_seq_len
            if tokens >= args.tokens:
                break
        summary = (
            f"{_n(n, 'training shard')} of {len(order):,}, enough for {min(args.tokens, tokens):,.0f} tokens"
            + (
                ""
                if tokens >= args.tokens
                else f" an epoch: {args.tokens:,} are {args.tokens / max(1, tokens):.1f} epochs"
            )
        )
    if missing:
        raise_missing(missing, f"the other {_n(len(fetched), 'file')} that were asked for are here")
    new = fetched - had
    print(
        f"fetched {_n(len(new), 'file')}, {human_bytes(sum(file.n_bytes for file in new))}; here are {summary}, and "
        f"{_n(len(corpus.val), 'shard')} to validate on, in {base_dir() / 'hub'}"
    )
    return EXIT_COMPLETED


def run_tokenize(args):
    """`nanochat data tokenize`: write the token files of shards, in the order in which a run reads them."""
    import torch

    from nanochat.data.token_cache import DataFailed, TokenCache

    corpus = opened(args)
    n_shards = shards_asked_for(args, corpus)
    order = reading_order(corpus, args.seed)
    check_room([*corpus.val, *tokenizer_shards(args, corpus), *order[:n_shards]], 2, args)
    tokenizer = made_tokenizer(args, corpus)
    cache = TokenCache(tokenizer, torch.get_num_threads(), report=_say)
    missing, made, counts = {}, 0, {}

    def length(shard):
        """Tokens of a shard whose token file is here now, or None."""
        nonlocal made
        began, was_here = time.monotonic(), cache.path(shard).exists()
        try:
            size = cache.length(shard)
        except DataFailed as error:
            missing[shard.name] = str(error)
            _say(f"{shard.name}  missing: {error}")
            return None
        made += not was_here
        counts[shard.fingerprint] = size
        _say(
            f"{shard.name}  {size:,} tokens "
            + ("were here" if was_here else f"in {human_time(time.monotonic() - began)}")
        )
        return size

    held_out = sum(length(shard) or 0 for shard in corpus.val)
    rows, n, trained = 0, 0, 0
    for n, shard in enumerate(order[:n_shards], 1):
        size = length(shard)
        trained += size or 0
        rows += (shard.n_bytes / BYTES_PER_TOKEN if size is None else size) // args.max_seq_len
        if n_shards is None and rows * args.max_seq_len >= args.tokens:
            break
    if missing:
        raise_missing(
            missing, f"the other {_n(len(counts), 'shard')} that were asked for are tokenized"
        )
    on_disk = sum(
        cache.path(shard).stat().st_size
        for shard in corpus.train + corpus.val
        if shard.fingerprint in counts and cache.path(shard).exists()
    )  # other processes may trim the cache
    short = (
        ""
        if n_shards is not None or rows * args.max_seq_len >= args.tokens
        else (
            f" ({args.tokens:,} tokens are {args.tokens / max(1, rows * args.max_seq_len):.1f} epochs)"
        )
    )
    print(
        f"made {_n(made, 'token file')}; here are {_n(n, 'training shard')} of {len(order):,} with {trained:,} tokens{short}, and "
        f"{held_out:,} tokens to validate on; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind}); {human_bytes(on_disk)} in "
        f"{cache.folder}"
    )
    return EXIT_COMPLETED


def opened(args):
    """The corpus of `fetch` and `tokenize`, described, after all checks of their flags. UsageError."""
    from nanochat.data.sources import describe_corpus, is_remote, open_corpus
    from nanochat.data.tokenizer import MIN_BPE_VOCAB, TOKENIZER_KINDS, read_tokenizer

    problems = []
    if args.max_seq_len < 1:
        problems.append(f"--max-seq-len {args.max_seq_len}: must be at least 1")
    if args.vocab_size != -1 and args.vocab_size < MIN_BPE_VOCAB:
        problems.append(f"--vocab-size {args.vocab_size}: give at least {MIN_BPE_VOCAB}, or -1")
    if args.tokenizer not in (*TOKENIZER_KINDS, "gpt2"):
        try:
            read_tokenizer(args.tokenizer)
        except UsageError as error:
            problems.append(
                f"--tokenizer {args.tokenizer}: not bpe, char, byte or gpt2, and as a folder: {error}"
            )
    if problems:
        raise UsageError("\n".join(problems))
    corpus = open_corpus(args.data, args.val_data)
    nothing_to_choose = corpus.eager or args.command == "fetch" and not is_remote(args.data)
    if not (args.tokens or args.shards or args.all or nothing_to_choose):
        raise UsageError(
            f"{args.data} has {_n(len(corpus.train), 'shard')} with about {human_bytes(corpus.train_bytes)} of text: say how "
            f"much of it, with --tokens N, --shards N or --all"
        )
    print("\n".join(describe_corpus(corpus)), flush=True)
    return corpus


def shards_asked_for(args, corpus):
    """Number of training shards to have, or None where --tokens decides. train.py takes all of a small corpus."""
    if args.shards:
        if args.shards < len(corpus.train) and corpus.eager:
            print(
                f"note: {args.data} is small, and train.py will want all of its {_n(len(corpus.train), 'shard')} before it starts"
            )
        return args.shards
    return len(corpus.train) if args.all or corpus.eager else None


def reading_order(corpus, seed):
    """The training shards in the order in which the first epoch of a run with this seed reads them."""
    from nanochat.data.rows import Rows

    return [corpus.train[i] for i in Rows(corpus, None, 1, seed).shard_order(0)]


def tokenizer_shards(args, corpus):
    """The shards whose text a tokenizer is fitted to, where --tokenizer asks for that and it has not been done."""
    from nanochat.data.token_cache import shards_to_fit

    return shards_to_fit(corpus, args.tokenizer, args.vocab_size)


def made_tokenizer(args, corpus):
    """The tokenizer that train.py would use with these flags; one that is fitted is kept where train.py finds it."""
    from nanochat.data.token_cache import load_tokenizer, shards_to_fit

    if shards_to_fit(corpus, args.tokenizer, args.vocab_size):
        _say("making the tokenizer, which train.py will find")
    return load_tokenizer(args.tokenizer, args.vocab_size, corpus)


def counted_tokens(shard, cache):
    """Tokens of a shard that is here: from its token file, else counted on COUNT_BYTES of its text and estimated, rather
    low, for the rest."""
    if cache.path(shard).exists():
        return cache.length(shard)
    tokens, counted, n_bytes, waiting = 0, 0, 0, []
    for document in shard.documents():
        size = len(document.encode("utf-8"))
        n_bytes += size
        if counted < COUNT_BYTES:
            counted += size
            waiting.append(document)
        if waiting and (counted >= COUNT_BYTES or len(waiting) >= GROUP_DOCUMENTS):
            tokens += sum(
                len(ids) + 1 for ids in cache.tokenizer.encode_batch(waiting)
            )  # 1: the BOS after each
            waiting = []
    tokens += sum(len(ids) + 1 for ids in cache.tokenizer.encode_batch(waiting)) if waiting else 0
    return tokens if counted == n_bytes else int(tokens * n_bytes / counted * (1 - COUNT_MARGIN))


def check_room(shards, id_bytes, args):
    """UsageError, with numbers, if the disk has no room for the files of these shards and, with id_bytes, their tokens."""
    from nanochat.data.token_cache import CACHE_LIMIT_BYTES

    files = {file for shard in shards for file in shard.remote_files() if not file.is_local()}
    download = sum(file.n_bytes for file in files)
    bytes_per_token = {"byte": 1, "char": 1}.get(
        args.tokenizer, 3
    )  # of bpe rather low, so that the estimate is high
    tokens = id_bytes * sum(shard.n_bytes for shard in shards) / bytes_per_token if id_bytes else 0
    free = shutil.disk_usage(base_dir()).free
    if tokens > CACHE_LIMIT_BYTES:
        raise UsageError(
            f"{args.data}: the token files would take about {human_bytes(tokens)}, and the cache keeps "
            f"{human_bytes(CACHE_LIMIT_BYTES)}: ask for less with --tokens or --shards"
        )
    if download > free:  # token files are an estimate: they are not worth a refusal
        raise UsageError(
            f"{args.data}: {_n(len(files), 'file')} of {human_bytes(download)} are missing, and the disk of {base_dir()} has "
            f"{human_bytes(free)} free; ask for less with --tokens or --shards, or set NANOCHAT_BASE_DIR"
        )


def raise_missing(missing, rest):
    """Raise Unavailable with all that could not be had."""
    raise Unavailable(
        f"{_n(len(missing), 'file')} could not be had; {rest}:\n"
        + "\n".join(f"  {text}" for text in missing.values())
    )


def _say(line):
    print(line, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# mix


class Source:
    """One SOURCE=WEIGHT of a mix while it is drawn from. n_bytes and n_documents: drawn so far, of the side being written."""

    def __init__(self, name, weight, corpus):
        self.name, self.weight, self.corpus = name, weight, corpus
        self.n_bytes = self.n_documents = self.passes = 0
        self.budget, self.ran_out, self.figures = 0.0, False, {}


def run_mix(args):
    """`nanochat data mix`: draw documents of all sources in turn, write them in files of --shard-bytes, rename the folder."""
    out = Path(args.out)
    sources = opened_sources(args, out)
    n_val = (
        args.val_bytes
        if args.val_bytes != -1
        else max(1, min(int(HELD_OUT_SHARE * args.bytes), args.shard_bytes))
    )
    with new_folder(out) as folder:
        free = shutil.disk_usage(folder).free
        if args.bytes + n_val > free:
            raise UsageError(
                f"--bytes {args.bytes:,}: the disk of {out} has {human_bytes(free)} free; ask for less, or write elsewhere"
            )
        held_out = list(drawn(sources, "val", n_val, args))
        if not held_out:
            raise UsageError("the sources hold no text out: give larger ones")
        write_documents(
            folder / f"validation{suffix()}", held_out, args.seed
        )  # a name after those of the files to train on
        close_side(sources, "val")
        known = {
            text for text, _ in held_out
        }  # a source may hold in its training part what another holds out
        file_bytes = args.bytes / -(
            -args.bytes // args.shard_bytes
        )  # of files as equal as they can be: a last one with one line
        batch, written, n_files = [], 0, 0  # would be a shard of its own in training
        for text, name in itertools.chain(
            drawn(sources, "train", args.bytes, args, known), [(None, None)]
        ):
            if text is not None:
                batch.append((text, name))
                written += len(text.encode("utf-8"))
            if batch and (
                text is None or written >= (n_files + 1) * file_bytes and written < args.bytes - 4
            ):
                write_documents(folder / f"train_{n_files:05}{suffix()}", batch, args.seed)
                n_files += 1
                _say(
                    f"  {_n(n_files, 'file')}, {human_bytes(written)} of {human_bytes(args.bytes)}"
                )
                batch = []
        close_side(sources, "train")
        if not n_files:
            raise UsageError("the sources hold no text to train on: give larger ones")
        summary = mix_summary(sources, args)
        write_json(folder / "sources.json", summary)
    print("\n".join(mix_lines(summary, args, out)))
    return EXIT_COMPLETED


def opened_sources(args, out):
    """The Sources that the arguments of `mix` name. UsageError with all that is wrong before anything is written."""
    problems, weights = [], {}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(
            f"{out}: is there already"
            + (" and is not empty" if out.is_dir() else "")
            + "; name a new folder"
        )
    for given in args.sources:
        name, equals, weight = given.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (name and equals and 0 < value < math.inf):
            problems.append(
                f"{given}: write SOURCE=WEIGHT with a positive number, such as python=0.5"
            )
        elif name in weights:
            problems.append(f"{given}: {name} is named twice; add the weights up")
        weights[name] = value
    if problems:
        raise UsageError("\n".join(problems))
    from nanochat.data.sources import open_corpus

    sources = [Source(name, weight, open_corpus(name)) for name, weight in weights.items()]
    owner = {}
    for source in sources:
        for shard in source.corpus.train + source.corpus.val:
            for file in shard.files:
                key = file.resolve() if isinstance(file, Path) else file.fingerprint
                if owner.setdefault(key, source) is not source:
                    raise UsageError(
                        f"{source.name} and {owner[key].name} both hold {file.name}, whose documents would be drawn twice; "
                        "name each file in one source only"
                    )
    return sources


def drawn(sources, side, n_bytes, args, known=frozenset()):
    """Iterator over (document, source's name): always of the source that is furthest behind its share of what was drawn.

    side: "train" or "val", of each source's corpus. Ends after n_bytes, or when the sources end; when one does, the others
    fill its place by their weights. The last document of a source is cut where it reaches its share. known: documents left out."""
    total = sum(source.weight for source in sources)
    streams = {}
    for source in sources:
        source.n_bytes = source.n_documents = source.passes = 0
        source.ran_out, source.budget = False, n_bytes * source.weight / total
        buffer = max(1, int(args.shard_bytes * source.weight / total))
        streams[source.name] = shuffled(
            source,
            getattr(source.corpus, side),
            buffer,
            [args.seed, side],
            args.repeat and side == "train",
            known,
        )
    while active := [
        source for source in sources if not source.ran_out and source.n_bytes < round(source.budget)
    ]:
        source = min(active, key=lambda source: source.n_bytes / source.weight)
        text = next(streams[source.name], None)
        if text is None:
            source.ran_out = True
            left, others = (
                source.budget - source.n_bytes,
                [other for other in sources if not other.ran_out],
            )
            source.budget = source.n_bytes
            for other in others:
                other.budget += left * other.weight / sum(o.weight for o in others)
            continue
        content = text.encode("utf-8")
        room = round(source.budget) - source.n_bytes
        if len(content) > room:
            text = content[:room].decode("utf-8", "ignore")
            content = text.encode("utf-8")
        if not text.strip():  # nothing but blanks fits any more
            source.budget = source.n_bytes
            continue
        source.n_bytes += len(content)
        source.n_documents += 1
        yield text, source.name


def shuffled(source, shards, buffer_bytes, seed, repeat, known):
    """Iterator over the documents of shards in seeded order: shards permuted, documents through a buffer of about
    buffer_bytes (characters stand for bytes) from which they are taken at random. With repeat without end."""
    import numpy as np

    while True:
        generator = np.random.default_rng(
            stream_seed(seed[0], "mix", seed[1], source.corpus.fingerprint, source.passes)
        )
        source.passes += 1
        buffer, size, empty = [], 0, True
        for i in generator.permutation(len(shards)).tolist():
            for document in shards[i].documents(_say):
                if document in known:
                    continue
                empty = False
                buffer.append(document)
                size += len(document)
                while size > buffer_bytes:
                    place = int(generator.integers(len(buffer)))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    size -= len(buffer[-1])
                    yield buffer.pop()
        while buffer:
            place = int(generator.integers(len(buffer)))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
        if empty or not repeat:
            return


def close_side(sources, side):
    """Note in each source what was drawn of a side."""
    for source in sources:
        source.figures |= {
            f"{side}_bytes": source.n_bytes,
            f"{side}_documents": source.n_documents,
            f"{side}_ran_out": source.ran_out,
            f"{side}_passes": source.passes,
        }


def suffix():
    """Ending of the files: .parquet, or .jsonl where pyarrow is not installed."""
    import importlib.util

    return ".parquet" if importlib.util.find_spec("pyarrow") else ".jsonl"


def write_documents(path, documents, seed):
    """Write a list of (text, source) in a seeded random order to a .parquet or .jsonl file, flushed to the disk."""
    import numpy as np

    order = (
        np.random.default_rng(stream_seed(seed, "mix", "order", path.stem))
        .permutation(len(documents))
        .tolist()
    )
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        schema = pa.schema([("text", pa.string()), ("source", pa.string())])
        # text without a dictionary: the sizes in the file's metadata are then those of the text
        with pyarrow.parquet.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["source"]
        ) as writer:
            for first in range(0, len(order), GROUP_DOCUMENTS):
                group = [documents[i] for i in order[first : first + GROUP_DOCUMENTS]]
                writer.write_table(
                    pa.table(
                        {
                            "text": [text for text, _ in group],
                            "source": [name for _, name in group],
                        },
                        schema=schema,
                    )
                )
    else:
        with open(path, "w", encoding="utf-8") as f:
            for i in order:
                f.write(
                    json.dumps(
                        {"text": documents[i][0], "source": documents[i][1]}, ensure_ascii=False
                    )
                    + "\n"
                )
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def mix_summary(sources, args):
    """The content of sources.json: the arguments, and for each source what it gave and what it is."""
    total = sum(source.weight for source in sources)
    n_train, n_val = (
        sum(source.figures[f"{side}_bytes"] for source in sources) for side in ("train", "val")
    )
    return {
        "format": 1,
        "seed": args.seed,
        "train_bytes": n_train,
        "val_bytes": n_val,
        "shard_bytes": args.shard_bytes,
        "sources": [
            {
                "source": source.name,
                "weight": source.weight,
                "share_asked_for": source.weight / total,
                "share": source.figures["train_bytes"] / n_train,
                "val_share": source.figures["val_bytes"] / n_val,
                **source.figures,
                "fingerprint": source.corpus.fingerprint,
                "revision": source.corpus.revision,
                **known_facts(source.name),
            }
            for source in sources
        ],
    }


def mix_lines(summary, args, out):
    """What `mix` prints at the end."""
    width = max(len(source["source"]) for source in summary["sources"])
    for source in summary["sources"]:
        notes = (
            [f"ran out: {source['share_asked_for']:.2%} was asked for, it has no more"]
            if source["train_ran_out"]
            else []
        )
        notes += ["its held-out part ran out"] if source["val_ran_out"] else []
        notes += [f"read {source['train_passes']} times"] if source["train_passes"] > 1 else []
        yield (
            f"{source['source']:<{width}}  {source['share']:>7.2%} of the bytes, {source['train_documents']:,} documents; held out "
            f"{source['val_share']:.2%}, {source['val_documents']:,} documents"
            + "".join(f"; {note}" for note in notes)
        )
    if summary["train_bytes"] < 0.99 * args.bytes:
        yield f"all sources ran out: {summary['train_bytes']:,} bytes instead of {args.bytes:,}; --repeat draws from them again"
    yield (
        f"wrote {out}: {summary['train_bytes']:,} bytes to train on, {summary['val_bytes']:,} held out; use it: "
        f"python train.py --data={out}"
    )
