"""`nanochat data inspect | fetch | tokenize | mix | exercises | pairs`: look into text, have it
here, mix it, or write conversations and preferences."""

import argparse
import itertools
import json
import os
from typing import Any

from nanochat.apps.data.words import say
from nanochat.common import (
    UsageError,
    counted,
    human_time,
    path_argument,
    read_json,
    whole_number,
    write_atomic,
)
from tasks.continuations import continuations
from tasks.exercises import TASKS, TRAIN, exercises

# documents whose beginning `inspect` shows unless --documents says otherwise
EXAMPLES = 3
# a mix holds a whole file's text in memory to shuffle it, so this bounds its memory as well
DEFAULT_SHARD_BYTES = 64 << 20
# of train.py
DEFAULT_SEQ_LEN = 2048
# of a mix
HELD_OUT_SHARE = 0.02
DATA_HELP = (
    "text, as train.py's --data takes it: climbmix, hf:..., python, a file, a folder, a pattern, "
    "..."
)
VAL_DATA_HELP = "path, glob or folder to validate on; empty: what train.py would hold out of DATA"


def build_parser() -> argparse.ArgumentParser:
    """The parser with its five commands. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat data",
        allow_abbrev=False,
        # the epilog has one line for each command, which the default formatter would join
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Look into a data set, download and tokenize it before training, or mix "
        "several.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = [
        _add_inspect(commands),
        _add_fetch(commands),
        _add_tokenize(commands),
        _add_mix(commands),
        _add_exercises(commands),
        _add_pairs(commands),
    ]
    # argparse's own help only names the commands, and what a reader looks for is their arguments;
    # the first word of a usage is "usage:"
    usages = [" ".join(command.format_usage().split()[1:]) for command in parsers]
    heading = "commands in full (nanochat data COMMAND --help explains them):"
    parser.epilog = "\n".join([heading, *(f"  {usage}" for usage in usages)])
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="what a data set is and how much of it is on this disk",
        description="Size, held-out part, fingerprint, licence, lengths of documents, and which "
        "files are on this disk. Of a large data set on the network only the listing is "
        "downloaded, unless --documents asks to see some.",
    )
    inspect.add_argument("data", type=path_argument, metavar="DATA", help=DATA_HELP)
    inspect.add_argument(
        "--val-data", type=path_argument, default="", metavar="PATH", help=VAL_DATA_HELP
    )
    inspect.add_argument(
        "--documents",
        type=int,
        default=-1,
        metavar="N",
        help="documents to show the beginning of; downloads a file if none is on this disk "
        f"(-1: {EXAMPLES}, if text is on this disk)",
    )
    inspect.add_argument(
        # `json` is the module in the code that takes this value
        "--json",
        dest="as_json",
        action="store_true",
        help="print one JSON object",
    )
    return inspect


def _add_fetch(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    fetch = commands.add_parser(
        "fetch",
        allow_abbrev=False,
        help="download what a training run will read",
        description="Download the files of DATA that train.py reads in a run of --tokens with the "
        "same --seed, --tokenizer and --max-seq-len, and those to validate on. Reports what is "
        "missing, and exits with 1 if anything is. A small data set is downloaded whole, as "
        "train.py does.",
    )
    _add_what_a_run_reads(fetch)
    return fetch


def _add_tokenize(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    tokenize = commands.add_parser(
        "tokenize",
        allow_abbrev=False,
        help="download and tokenize what a training run will read",
        description="Do now what train.py does while it trains: download the shards of DATA, fit "
        "the tokenizer, and write the token files that every later run with it finds.",
    )
    _add_what_a_run_reads(tokenize)
    return tokenize


def _add_what_a_run_reads(command: argparse.ArgumentParser) -> None:
    """The arguments that `fetch` and `tokenize` share."""
    command.add_argument("data", type=path_argument, metavar="DATA", help=DATA_HELP)
    # a small data set is taken whole, so that none is an answer too
    amount = command.add_mutually_exclusive_group()
    amount.add_argument(
        "--tokens",
        type=_count,
        metavar="N",
        help="tokens that the run will train on, such as 2e9",
    )
    amount.add_argument(
        "--plan",
        type=path_argument,
        default="",
        metavar="FILE",
        help="the tokens and the --max-seq-len of a run's plan, which `train.py ... --dry-run "
        "--json > FILE` writes",
    )
    amount.add_argument(
        "--shards",
        type=_count,
        metavar="N",
        help="so many training shards, in the order in which a run reads them",
    )
    # `all` would hide Python's function in what takes this value
    amount.add_argument("--all", dest="everything", action="store_true", help="the whole data set")
    command.add_argument(
        "--val-data", type=path_argument, default="", metavar="PATH", help=VAL_DATA_HELP
    )
    command.add_argument(
        "--tokenizer",
        type=path_argument,
        default="bpe",
        metavar="NAME",
        help="the run's --tokenizer: bpe, bpe-llama, char, byte, gpt2, a folder with one, or a run "
        "folder (default %(default)s)",
    )
    command.add_argument(
        "--vocab-size",
        type=int,
        default=-1,
        metavar="N",
        help="the run's --vocab-size (-1: derived from the size of the data)",
    )
    command.add_argument(
        # another seed reads the shards in another order, so other files would be downloaded
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="the run's --seed, which orders the shards (default %(default)s)",
    )
    command.add_argument(
        # a shard loses what does not fill its last row, so the length of a row decides how many
        # shards hold that many tokens
        "--max-seq-len",
        type=int,
        default=-1,
        metavar="N",
        help=f"the run's --max-seq-len (-1: that of --plan, else {DEFAULT_SEQ_LEN})",
    )


def _add_mix(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    mix = commands.add_parser(
        "mix",
        allow_abbrev=False,
        help="write a folder of documents drawn from several data sets",
        description="Write a folder for train.py's --data=OUT: documents of the sources in "
        "shuffled order, none drawn twice, with the shares of bytes that the weights give. The "
        "last file by name holds documents that the sources hold out; sources.json says what came "
        "from where. A document is cut only where a source reaches its share.",
    )
    mix.add_argument(
        "out", type=path_argument, metavar="OUT", help="folder to write; it must be new or empty"
    )
    mix.add_argument(
        "sources",
        type=path_argument,
        metavar="SOURCE=WEIGHT",
        nargs="+",
        help="data as train.py's --data takes it, and its weight, such as python=0.5",
    )
    mix.add_argument(
        "--bytes",
        # `bytes` would hide Python's type
        dest="train_bytes",
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
        help=f"bytes of text to validate on (-1: {HELD_OUT_SHARE:.0%}% of --bytes, at most one "
        "shard)",
    )
    mix.add_argument(
        "--shard-bytes",
        type=_count,
        default=DEFAULT_SHARD_BYTES,
        metavar="N",
        help="bytes of text in a file; also what is held in memory to shuffle (default "
        "%(default)s)",
    )
    mix.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="seed of the drawing and of the order (default %(default)s)",
    )
    mix.add_argument(
        "--repeat",
        action="store_true",
        help="draw from a source again when it runs out, instead of more from the others",
    )
    return mix


def _add_exercises(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "exercises",
        allow_abbrev=False,
        help="write conversations with exact answers, for nanochat sft",
        description="Write exercises as conversations, JSON lines for `nanochat sft --data`: sums, "
        "and letters to reverse, sort and copy. Questions that --exercises of sft asks are never "
        "among them.",
    )
    parser.add_argument("out", type=path_argument, metavar="OUT", help="file to write")
    parser.add_argument(
        "--tasks",
        default=",".join(TASKS),
        metavar="TASK,...",
        help="of which tasks (default %(default)s)",
    )
    parser.add_argument(
        "--n",
        type=_count,
        default=5000,
        metavar="N",
        help="exercises of each task (default %(default)s)",
    )
    return parser


def _add_pairs(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "pairs",
        allow_abbrev=False,
        help="write preferences made of a text, for nanochat dpo",
        description="Write preference pairs, JSON lines for `nanochat dpo --data`: a few words of "
        "DATA as the prompt, how they go on as the chosen answer, and the same words in disorder "
        "as the rejected one. Of a data set of several shards the first is read.",
    )
    parser.add_argument("data", type=path_argument, metavar="DATA", help=DATA_HELP)
    parser.add_argument("out", type=path_argument, metavar="OUT", help="file to write")
    parser.add_argument(
        "--n", type=_count, default=1000, metavar="N", help="pairs (default %(default)s)"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="of the text that train.py would hold out of DATA"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        metavar="N",
        help="seed of the drawing and of the order (default %(default)s)",
    )
    return parser


def _count(text: str) -> int:
    """argparse type of a whole number of at least 1, also written as 2e9."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return value


def main(argv: list[str]) -> int:
    """Run the app with its arguments (without the app's name); returns the exit code.

    Raises UsageError and Unavailable."""
    # commands are imported once they are known: --help and wrong flags need no numpy
    values = vars(build_parser().parse_args(argv))
    command = values.pop("command")
    if command == "inspect":
        return _inspect(**values)
    if command == "mix":
        return _mix(**values)
    if command == "exercises":
        return _exercises(**values)
    if command == "pairs":
        return _pairs(**values)
    from nanochat.apps.data.fetch import Wanted, run_fetch, run_tokenize

    run = run_fetch if command == "fetch" else run_tokenize
    return run(Wanted(**_with_plan(**values)))


def _with_plan(*, plan: str, max_seq_len: int, **values: Any) -> dict[str, Any]:
    """The arguments of Wanted, with what --plan stands for, which is printed.

    Raises UsageError for a file that is no plan, or a --max-seq-len that is not the plan's."""
    if not plan:
        return {**values, "max_seq_len": DEFAULT_SEQ_LEN if max_seq_len == -1 else max_seq_len}
    content = read_json(plan, "--plan")
    try:
        tokens = round(content["plan"]["tokens"])
        planned_seq_len = int(content["model"]["max_seq_len"])
        estimates, devices = content["estimates"], counted(content["devices"], "device")
        line = (
            f"plan: {tokens:,} tokens, {content['flops']:.3g} FLOPs, "
            f"{human_time(estimates['seconds'])} on {devices}, "
            f"{estimates['device_hours']:.3g} device-hours"
        )
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"--plan {plan}: not the plan of a run; write one with `python train.py ... --dry-run "
            f"--json > {plan}`"
        ) from None
    if max_seq_len not in (-1, planned_seq_len):
        raise UsageError(
            f"--max-seq-len {max_seq_len}: the plan in {plan} has {planned_seq_len}; leave the "
            f"flag out"
        )
    print(line, flush=True)
    return {**values, "tokens": tokens, "max_seq_len": planned_seq_len}


def _inspect(*, data: str, val_data: str, documents: int, as_json: bool) -> int:
    from nanochat.apps.data.inspection import run_inspect

    if documents < -1:
        raise UsageError(f"--documents {documents}: give a number of documents, 0 for none, or -1")
    # 0 documents is a choice as well: then none is shown
    chosen = None if documents == -1 else documents
    return run_inspect(data, val_data, documents=chosen, as_json=as_json)


def _exercises(*, out: str, tasks: str, n: int) -> int:
    names = tasks.split(",")
    if unknown := [name for name in names if name not in TASKS]:
        raise UsageError(f"--tasks {','.join(unknown)}: no such task; there are {', '.join(TASKS)}")
    if os.path.exists(out):
        raise UsageError(f"{out} exists already; name a new file")
    lines = [
        json.dumps({"messages": one.messages()}) + "\n"
        for name in names
        for one in itertools.islice(exercises(name, TRAIN), n)
    ]
    write_atomic(out, "".join(lines))
    say(f"{out}: {counted(len(lines), 'conversation')}")
    return 0


def _pairs(*, data: str, out: str, n: int, held_out: bool, seed: int) -> int:
    # here, not above: it imports numpy
    from nanochat.data.sources import open_corpus

    if os.path.exists(out):
        raise UsageError(f"{out} exists already; name a new file")
    corpus = open_corpus(data, report=say)
    shard = (corpus.val if held_out else corpus.train)[0]
    pairs = continuations(shard.documents(say), n, seed)
    if len(pairs) < n:
        raise UsageError(
            f"--n {n}: {shard.name} of {data} has words for {counted(len(pairs), 'pair')}; ask for "
            "fewer, or give more text"
        )
    write_atomic(out, "".join(json.dumps(pair.as_line()) + "\n" for pair in pairs))
    say(f"{out}: {counted(len(pairs), 'pair')}")
    return 0


def _mix(
    *,
    out: str,
    sources: list[str],
    train_bytes: int,
    val_bytes: int,
    shard_bytes: int,
    seed: int,
    repeat: bool,
) -> int:
    from nanochat.apps.data.mix import Recipe, run_mix

    # one shard is enough to validate on, however large the mix
    if val_bytes == -1:
        val_bytes = max(1, min(int(HELD_OUT_SHARE * train_bytes), shard_bytes))
    return run_mix(out, sources, Recipe(train_bytes, val_bytes, shard_bytes, seed, repeat))
