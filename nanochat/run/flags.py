"""The flags of train.py, each described once, as data.

A row says what a flag sets, its type, default and range, whether a resumed run may change it,
whether it shapes the model, and whether two runs that differ in it are different experiments.
The parser, the checks, resume, comparison, sweeps and bench all read this table. Imports no torch,
so that `--help` is instant."""

import argparse
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UsageError, number_or_all, number_or_auto, path_argument, read_json
from nanochat.optim import schedules
from nanochat.run.help_json import describe


@dataclass(frozen=True)
class Range:
    """The values that a flag takes: a test, the reason it refuses others, and the remedy."""

    holds: Callable[[Any], bool]
    reason: str
    remedy: str


def _off(value: Any) -> bool:
    # "auto" comes first in a test, since comparing a string with a number would raise.
    return value in (-1, "auto")


def listed_steps(text: str) -> frozenset[int]:
    """The steps of a list such as "500,1000" (--save-at). ValueError for what is no list of whole
    numbers."""
    return frozenset(map(int, text.split(","))) if text else frozenset()


def _are_steps(text: str) -> bool:
    try:
        return min(listed_steps(text), default=1) >= 1
    except ValueError:
        return False


AT_LEAST_1 = Range(lambda v: v >= 1, "must be at least 1", "give a positive number")
# 0 could be read as "never" or as "at every step", so -1 is the only spelling of off.
POSITIVE_OR_OFF = Range(
    lambda v: _off(v) or v > 0, "must be positive, or -1 for off or automatic", "give one of these"
)
# A warm-up of 0 steps is a real choice, so only -1 can mean "derived".
FROM_0_OR_OFF = Range(
    lambda v: v >= -1, "must be at least 0, or -1 for off or automatic", "give one of these"
)
# A rate of 0 freezes its parameters, which is a legitimate experiment; -1 takes the default.
RATE_OR_AUTO = Range(lambda v: v >= 0 or v == -1, "must not be negative", "give 0 or more, or -1")
ABOVE_0 = Range(lambda v: v > 0, "must be positive", "give a positive number")
DEVICES = Range(lambda v: v == "all" or v >= 1, "must be at least 1", "give a number, or all")
NOT_NEGATIVE = Range(lambda v: v >= 0, "must not be negative", "give 0 or more")
# At 1, Adam's bias correction divides by 1 - beta^t = 0, and dropout drops every update.
BELOW_1 = Range(lambda v: 0 <= v < 1, "must be at least 0 and below 1", "give such a number")
FRACTION = Range(lambda v: 0 <= v <= 1, "must be between 0 and 1", "give a fraction")
STEPS = Range(
    _are_steps,
    "not a list of steps",
    "give whole numbers from 1 on, with commas between them, such as 500,1000",
)
SEED = Range(lambda v: 0 <= v < 2**63, "must be between 0 and 2^63 - 1", "choose another seed")

# What --resume does with a flag that is given again with another value.
# Refused: it decides what the model becomes.
FIXED = "fixed"
# Taken, and printed.
FREE = "free"
# A longer one extends the run.
HORIZON = "horizon"
# Belongs to one start of the program, not to the run; never taken from a config.
START = "start"

# Switches with a --no- form: on by default, or taken over by a resumed run that may do without.
NEGATABLE = ("compile", "activation_checkpointing", "shard")

# Why `nanochat jobs fork` cannot change a flag, and what to do instead.
OTHER_SHAPE = "the weights of the checkpoint have another shape; start another run"
OTHER_TOKENS = "the checkpoint knows other tokens; start another run"
FROM_WEIGHTS = "train.py --init-from=RUN starts a run with its weights and another value"


@dataclass(frozen=True)
class Flag:
    """One flag. name: as parsed (`eval_every`); default also decides how it is parsed, unless type
    is given; a default of True or False makes it a switch. decides: whether two runs that differ
    in it are different experiments (None: yes unless a resumed run may change it). live: whether
    it may change while the run is training (`nanochat jobs set`). no_fork: why a run that is forked
    from a checkpoint cannot change it, and the remedy; "" if it can."""

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    range: Range | None = None
    on_resume: str = FIXED
    shapes_model: bool = False
    decides: bool | None = None
    live: bool = False
    no_fork: str = ""

    @property
    def bookkeeping(self) -> bool:
        """True if runs that differ only in this flag are the same experiment."""
        if self.decides is not None:
            return not self.decides
        return self.on_resume in (FREE, START)

    def add_to(self, group: Any) -> None:
        """Declare the flag to an argparse group. Only flags that are given are stored."""
        # argparse formats help texts with %, so a bare percent sign would raise at --help.
        text = f"{self.help} (default: {self.default})".replace("%", "%%")
        if self.name in NEGATABLE:
            action: Any = argparse.BooleanOptionalAction
            group.add_argument(flag(self.name), action=action, help=text)
        elif isinstance(self.default, bool):
            group.add_argument(flag(self.name), action="store_true", help=text)
        else:
            group.add_argument(
                flag(self.name),
                # The type of an int default would refuse 1e18 and 0.5: flags of floats name theirs.
                type=self.type or type(self.default),
                choices=self.choices,
                help=text,
            )


# The order is that of --help and, among the horizons, that of precedence.
GROUPS: dict[str, list[Flag]] = {
    "logging": [
        Flag("run", "dummy", "Weights & Biases run name; dummy: off", on_resume=FREE),
        # A run folder may be moved between two starts, so neither parent nor name is the run's own.
        Flag("out_dir", "out", "folder of run folders", type=path_argument, on_resume=START),
        Flag("model_tag", "", "name of the run folder; empty: d{depth}", on_resume=START),
        Flag("tensorboard", False, "log to TensorBoard, in the run folder", on_resume=FREE),
        # Its flags are recorded one by one, as if they stood on the command line.
        Flag(
            "config",
            "",
            "a run's config.json or a JSON file of flags; the command line wins",
            type=path_argument,
            on_resume=START,
        ),
        # Not recorded: a URL may hold a secret.
        Flag(
            "notify",
            "",
            "shell command that gets JSON on its standard input, or http(s) URL that it is POSTed "
            "to, when the run is completed, stopped, failed or stalled, or its loss jumps; given "
            "up after 10 s",
            on_resume=START,
        ),
    ],
    # Free, except for the seed: these change speed, memory and rounding, not batch and rates.
    "runtime": [
        Flag(
            "device_type",
            "",
            "empty: the first of cuda, mps, cpu that is present",
            choices=("", "cuda", "mps", "cpu"),
            on_resume=FREE,
        ),
        Flag(
            "dtype",
            "auto",
            # Comparison looks at the dtype that was used in the end, which "auto" does not tell.
            "compute dtype (weights stay fp32); auto: what the hardware multiplies fast; "
            "float16: with loss scaling",
            choices=("auto", "bfloat16", "float16", "float32"),
            on_resume=FREE,
        ),
        Flag("compile", True, "compile the model's blocks with torch.compile", on_resume=FREE),
        Flag(
            "seed",
            42,
            "seed of weights, data order, dropout and samples",
            # Runs that differ only in the seed are one experiment: their spread is its noise.
            range=SEED,
            decides=False,
        ),
        Flag(
            "attention",
            "auto",
            # No choices: checks.py knows the backends, and importing their list loads torch.
            "attention backend: auto, blocked, native, sdpa, flex, triton, fa3 or fa4",
            on_resume=FREE,
        ),
        Flag(
            "activation_checkpointing",
            False,
            "recompute activations in the backward pass instead of storing them",
            on_resume=FREE,
        ),
        Flag(
            "shard",
            False,
            "split weights, gradients and optimizer state over the ranks (FSDP2)",
            on_resume=FREE,
        ),
    ],
    "fp8": [
        Flag("fp8", False, "train large layers in fp8 (SM89 and later)"),
        Flag(
            "fp8_recipe",
            "tensorwise",
            "one scale for each tensor, or for each row",
            choices=("tensorwise", "rowwise"),
        ),
    ],
    "model": [
        Flag(
            "depth",
            20,
            "number of layers; the one dial",
            range=AT_LEAST_1,
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag(
            "aspect_ratio",
            # Gives the reference model, depth 12, its width of 768 (schedules.REFERENCE_WIDTH).
            64,
            "width / depth; the width is rounded up to whole heads",
            range=AT_LEAST_1,
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag(
            "head_dim",
            128,
            "channels of an attention head",
            range=AT_LEAST_1,
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag(
            "n_kv_head",
            -1,
            "key/value heads; -1: as many as query heads",
            range=POSITIVE_OR_OFF,
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        # Not part of the shape: rotary positions have no weights, so --init-from may change it.
        Flag(
            "max_seq_len",
            2048,
            "context in tokens",
            range=AT_LEAST_1,
            no_fork=f"the place in the text is counted in rows of that length; {FROM_WEIGHTS}",
        ),
        Flag(
            "window_pattern",
            "SSSL",
            "window of each layer, tiled: L full context, S short window; the last layer is "
            "always L",
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag(
            "short_window",
            -1,
            # At d4 and a context of 256, an eighth of it was better than half by 0.027 bpb; what
            # holds at 2,048 is not known (runs/LOG.md), so the default stays at half.
            "tokens that an S layer sees; -1: half the context",
            range=POSITIVE_OR_OFF,
            no_fork=f"the model of the checkpoint has another window; {FROM_WEIGHTS}",
        ),
        Flag(
            "arch",
            "speedrun",
            "llama: the plain decoder that other programs load",
            choices=("speedrun", "llama"),
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag(
            "tie_embeddings",
            False,
            "share the weights of embedding and head (llama)",
            shapes_model=True,
            no_fork=OTHER_SHAPE,
        ),
        Flag("dropout", 0.0, "share of residual updates that are dropped; 0: off", range=BELOW_1),
    ],
    "data": [
        Flag(
            "data",
            # Free because text may move to another path; its fingerprint is checked at every
            # resume.
            "climbmix",
            "climbmix, fineweb-edu, tinystories, shakespeare or "
            "hf:<dataset>[:<config>[:<split>[:<column>]]] (downloaded as needed), python (source "
            "code on this machine), or a path, glob or folder of .txt, .jsonl, .parquet; "
            "FILE:column names the field with the text",
            type=path_argument,
            on_resume=FREE,
        ),
        Flag(
            "val_data",
            "",
            "path, glob or folder to validate on; empty: hold out a part of --data",
            type=path_argument,
            on_resume=FREE,
        ),
        Flag(
            "tokenizer",
            "bpe",
            # Groups compare the fingerprint instead, since one tokenizer has several names.
            "bpe, bpe-llama (splits text as Llama 3 does; for `nanochat export --format gguf`), "
            "char, byte, gpt2, or a folder with a saved tokenizer",
            type=path_argument,
            decides=False,
            no_fork=OTHER_TOKENS,
        ),
        Flag(
            "vocab_size",
            -1,
            "vocabulary of a bpe or bpe-llama tokenizer; -1: from the data size, at most 32768",
            range=POSITIVE_OR_OFF,
            no_fork=OTHER_TOKENS,
        ),
        Flag(
            "init_from",
            "",
            # What was taken is recorded as `init_from` in config.json, and groups compare that.
            "run folder to take the initial weights, shape, context and tokenizer from; the "
            "optimizer and horizon are new",
            type=path_argument,
            decides=False,
            no_fork="a fork has the weights of its checkpoint; leave it out",
        ),
    ],
    # All but the last are off by default, so that there is always exactly one horizon in force.
    "horizon (the first one given wins, in this order)": [
        Flag("num_iterations", -1, "training steps", range=POSITIVE_OR_OFF, on_resume=HORIZON),
        Flag(
            "target_flops",
            -1,
            # A float, so that 1e18 can be written; the default stays an int, as config.json records
            # it.
            "training FLOPs",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=HORIZON,
        ),
        Flag(
            "target_tokens",
            -1,
            "training tokens",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=HORIZON,
        ),
        Flag(
            "target_epochs",
            -1,
            "passes over the data",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=HORIZON,
        ),
        Flag(
            "target_minutes",
            -1,
            # The steps that fit are fixed only after the run has measured its own speed.
            "training time in minutes; evaluation and compilation do not count",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=HORIZON,
        ),
        Flag(
            "target_param_data_ratio",
            schedules.DEFAULT_PARAM_DATA_RATIO,
            "training tokens per parameter of matrices and head; Chinchilla: 20",
            range=POSITIVE_OR_OFF,
            on_resume=HORIZON,
        ),
    ],
    # A resumed run may lift these, but they decide how long a run trains, and so its val_bpb.
    "early end": [
        Flag(
            "stop_at_bpb",
            -1,
            "stop once validation reaches this many bits per byte; -1: off",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            decides=True,
            live=True,
        ),
        Flag(
            "patience",
            -1,
            "stop after this many evaluations without improvement; -1: off",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            decides=True,
            live=True,
        ),
    ],
    "optimization (learning rates are those of the reference batch and width)": [
        Flag(
            "device_batch_size",
            -1,
            # Free: gradient accumulation makes up for it, so the tokens of a step stay the same.
            "rows that a device takes per pass; -1: the largest number that fits",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
        ),
        Flag(
            "total_batch_size",
            -1,
            "tokens per step; -1: derived from the horizon, and for --target-minutes from the cost "
            "of an update as well",
            range=POSITIVE_OR_OFF,
            no_fork=f"steps and the place in the text are counted in it; {FROM_WEIGHTS}",
        ),
        Flag(
            "optimizer",
            "muon",
            "optimizer of the matrices; all other parameters use AdamW",
            choices=("muon", "adamw"),
            no_fork=f"the checkpoint has the state of the other optimizer; {FROM_WEIGHTS}",
        ),
        Flag(
            "embedding_lr",
            -1,
            # -1 rather than a number: the default depends on --arch, which is not known here.
            f"AdamW learning rate of tables; -1: by --arch, {schedules.EMBEDDING_LR}",
            type=float,
            range=RATE_OR_AUTO,
        ),
        Flag(
            "unembedding_lr",
            -1,
            f"AdamW learning rate of the head; -1: by --arch, {schedules.UNEMBEDDING_LR}",
            type=float,
            range=RATE_OR_AUTO,
        ),
        Flag(
            "weight_decay",
            schedules.WEIGHT_DECAY,
            "weight decay of the matrices",
            range=NOT_NEGATIVE,
        ),
        Flag(
            "matrix_lr",
            -1,
            f"learning rate of the matrices; -1: by --optimizer, {schedules.MATRIX_LR}",
            type=float,
            range=POSITIVE_OR_OFF,
        ),
        Flag(
            "scalar_lr",
            schedules.SCALAR_LR,
            "AdamW learning rate of lambdas and gates",
            range=NOT_NEGATIVE,
        ),
        Flag("adam_beta1", schedules.ADAM_BETA1, "beta1 of every AdamW group", range=BELOW_1),
        Flag("adam_beta2", schedules.ADAM_BETA2, "beta2 of every AdamW group", range=BELOW_1),
        Flag(
            "lr_schedule",
            "trapezoid",
            # A cosine falls from its start, so it has no constant part from which to extend a run.
            "shape of the learning rate over the run; a cosine run cannot be extended",
            choices=("trapezoid", "cosine"),
        ),
        Flag("warmup_ratio", schedules.WARMUP_RATIO, "warm-up / steps", range=FRACTION),
        Flag("warmup_steps", -1, "warm-up in steps; -1: by --warmup-ratio", range=FROM_0_OR_OFF),
        Flag("warmdown_ratio", schedules.WARMDOWN_RATIO, "warm-down / steps", range=FRACTION),
        Flag(
            "final_lr_frac",
            schedules.FINAL_LR_FRAC,
            "learning rate at the end / its peak",
            range=FRACTION,
        ),
        Flag("grad_clip", 0.0, "largest gradient norm; 0: off", range=NOT_NEGATIVE),
    ],
    # None is taken from a config: --overwrite would act again whenever the run is resumed.
    "resume": [
        Flag(
            "resume",
            False,
            "resume from the newest intact checkpoint, or start fresh if there is none; with a "
            "longer horizon: extend the run from before its warm-down",
            on_resume=START,
        ),
        Flag(
            "resume_from_step",
            -1,
            "resume from the checkpoint of this step; -1: off",
            range=FROM_0_OR_OFF,
            on_resume=START,
        ),
        Flag(
            "overwrite",
            False,
            "delete the run that the folder holds (with --resume-from-step: set its later "
            "checkpoints aside)",
            on_resume=START,
        ),
    ],
    # Free: evaluation leaves the weights alone, so a resumed run may look more or less often.
    "evaluation (every: steps; -1: never, not even at the end)": [
        Flag(
            "eval_every",
            250,
            "steps between evaluations of validation bits per byte; also at the end",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "eval_tokens",
            40 * 524288,
            # 40 reference batches of 2^19 tokens. Scores on different amounts of text do not
            # compare, so this flag decides although it is free.
            "held-out tokens to evaluate on, capped by the validation set; -1: all",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            decides=True,
        ),
        Flag(
            "core_metric_every",
            "auto",
            # checks.core_metric_flags() settles "auto" once the device is known.
            "steps between CORE evaluations; also at the end; auto: 2000 on CUDA, -1 elsewhere",
            type=number_or_auto,
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "core_metric_max_per_task",
            "auto",
            "examples of each CORE task; -1: all; auto: 500 on CUDA, 50 elsewhere",
            type=number_or_auto,
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
        ),
        Flag(
            "core_bundle",
            "",
            "folder of the CORE bundle; empty: the cached one, downloaded once",
            type=path_argument,
            on_resume=FREE,
        ),
        Flag(
            "sample_every",
            2000,
            "steps between text samples; also at the end",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "sample_prompts",
            "",
            "file with one prompt a line; empty: beginnings of held-out documents",
            type=path_argument,
            on_resume=FREE,
        ),
    ],
    "saving": [
        Flag(
            "save_every",
            -1,
            "steps between permanent checkpoints; -1: only at the end and where the warm-down "
            "begins",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "save_at",
            # Text, as a list cannot be: config.json and the command line hold it alike.
            "",
            "steps at which to save permanent checkpoints besides, with commas between them, such "
            "as 500,1000",
            range=STEPS,
            on_resume=FREE,
        ),
        Flag(
            "save_every_minutes",
            10,
            # In minutes, because what a crash costs is time, whatever a step takes.
            "minutes between rolling checkpoints, each replacing the one before; -1: none",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "keep_last",
            -1,
            "permanent checkpoints to keep; -1: all",
            range=POSITIVE_OR_OFF,
            on_resume=FREE,
            live=True,
        ),
        # Of one start: a switch cannot be taken back, and whoever resumes a run wants to keep it.
        Flag(
            "no_save",
            False,
            "write no checkpoint at all; a resumed run saves unless it is given again",
            on_resume=START,
        ),
    ],
    "faults": [
        Flag(
            "max_skipped",
            10,
            # Consecutive ones only: a bad batch passes, a broken model does not.
            "consecutive steps that may be skipped because of non-finite numbers",
            range=AT_LEAST_1,
            on_resume=FREE,
            live=True,
        ),
        Flag(
            "debug_nans",
            False,
            "at the first such step: find the module that caused it, and stop",
            on_resume=FREE,
        ),
        Flag(
            "profile",
            False,
            "trace a few steps into the run folder, and report where the time goes",
            on_resume=FREE,
        ),
    ],
    "planning": [
        Flag("dry_run", False, "print the plan and exit", on_resume=START),
        Flag("json", False, "with --dry-run: print the plan as JSON", on_resume=START),
        Flag(
            "gpus",
            1,
            "with --dry-run: devices to plan for; all: a table of 1, 2, 4 ... 1024 (needs --gpu)",
            type=number_or_all,
            range=DEVICES,
            on_resume=START,
        ),
        Flag("gpu", "", "with --dry-run: GPU to plan for, such as H100", on_resume=START),
        Flag(
            "gpu_network",
            400.0,
            # That of NVIDIA's nodes of eight H100: one network card of 400 Gbit/s for each.
            "with --gpu: Gbit/s from each GPU to other nodes, in one direction",
            range=ABOVE_0,
            on_resume=START,
        ),
        Flag(
            "gpu_price",
            -1,
            "with --dry-run: dollars per device-hour, for the cost; -1: unknown",
            type=float,
            range=POSITIVE_OR_OFF,
            on_resume=START,
        ),
    ],
}
FLAGS = {row.name: row for rows in GROUPS.values() for row in rows}
# In the order of precedence, since a dict keeps the order of GROUPS.
HORIZONS = tuple(name for name, row in FLAGS.items() if row.on_resume == HORIZON)


def as_json() -> dict[str, Any]:
    """All flags as data: what --help shows, and what the table knows besides."""
    described = describe(build_parser())
    # the parser itself knows no defaults: it stores only what is given
    for option in described["options"]:
        # --help-json itself has no row
        if row := FLAGS.get(option["name"]):
            option |= {
                "default": row.default,
                "range": row.range and row.range.reason,
                "on_resume": row.on_resume,
                "same_experiment": row.bookkeeping,
                "shapes_model": row.shapes_model,
                "live": row.live,
                "no_fork": row.no_fork,
            }
    return described


class _HelpJson(argparse.Action):
    """Prints as_json() and ends the process, as --help does with its text."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(json.dumps(as_json(), indent=2))
        parser.exit()


def flag(name: str) -> str:
    """The command-line spelling of a parsed name: `eval_every` -> `--eval-every`."""
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    """The parser of train.py. It stores only the flags that are given."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a GPT sized by --depth.",
        # argparse's own usage would list more than 70 flags before the first explanation.
        usage="train.py --depth=N [options]; --help lists them all",
        # An abbreviation that is unique today may be ambiguous after the next flag.
        allow_abbrev=False,
        # A flag that was not given leaves no trace: this is how `given` is found.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--help-json", action=_HelpJson, nargs=0, help="show all flags as JSON, and exit"
    )
    for title, rows in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in rows:
            row.add_to(group)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """All flags as a Namespace; `given` on it is the set of names that were on the command line or,
    with another value than the default, in --config.

    Ends the process with exit code 2 for what argparse refuses. UsageError for an unusable
    --config."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # --config is read before the other flags, by a parser that leaves them and --help alone.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=path_argument, default="")
    config = finder.parse_known_args(argv)[0].config
    # a value that comes later wins, so the config's flags stand before those of the command line
    words = [*config_words(config), *argv] if config else argv
    parser = build_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error("; ".join(map(_unknown_in_words, unknown)))
    given = set(vars(args))
    for name, row in FLAGS.items():
        if name not in given:
            setattr(args, name, row.default)
    args.given = given
    return args


def _unknown_in_words(word: str) -> str:
    """What is wrong with a word of the command line that no flag takes."""
    name = word.split("=")[0]
    negated = (f"--no-{flag(name).removeprefix('--')}" for name in NEGATABLE)
    close = difflib.get_close_matches(name, [*map(flag, FLAGS), *negated], n=1)
    if close:
        return f"unrecognized argument {word}; did you mean {close[0]}?"
    return f"unrecognized argument {word}; --help lists all flags"


def config_words(path: str) -> list[str]:
    """The command line that a JSON file stands for: a run's config.json (or its folder), or an
    object of flag names and values.

    Values equal to the default are left out. UsageError for anything else."""
    if os.path.isfile(os.path.join(path, "config.json")):
        path = os.path.join(path, "config.json")
    content = read_json(path, "--config")
    is_run = isinstance(content, dict) and "args" in content
    values = content["args"] if is_run else content
    if not isinstance(values, dict):
        raise UsageError(f"--config={path}: neither a run's config.json nor an object of flags")
    # A file written by hand may spell its flags as on the command line.
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in values.items()}
    # Of a run's config, --overwrite or --resume would act again in the new run.
    of_one_start = {name for name, row in FLAGS.items() if row.on_resume == START}
    if is_run:
        values = {name: value for name, value in values.items() if name not in of_one_start}
    if unknown := [name for name in values if name not in FLAGS or name == "config"]:
        raise UsageError(f"--config={path}: no such flag: {', '.join(map(flag, unknown))}")
    # With defaults among them, `given` would name every flag, and a resume would compare them all.
    return [
        _word(path, name, value) for name, value in values.items() if value != FLAGS[name].default
    ]


def _word(path: str, name: str, value: Any) -> str:
    """The command-line word that sets a flag to a JSON value."""
    if isinstance(FLAGS[name].default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"--config={path}: {flag(name)} is {value!r}; give true or false")
        # A false switch is left out as its default, so only --compile comes here with false.
        return flag(name) if value else f"--no-{name.replace('_', '-')}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        shown = json.dumps(value)
        raise UsageError(f"--config={path}: {flag(name)} is {shown}; give a number or a string")
    return f"{flag(name)}={value}"


def live_problems(values: dict[str, Any]) -> list[str]:
    """A sentence for each of these flags, by name, that cannot be changed to that value while a run
    is training."""
    problems = []
    for name, value in values.items():
        if name not in FLAGS or not FLAGS[name].live:
            may = ", ".join(flag(name) for name, row in FLAGS.items() if row.live)
            problems.append(f"{flag(name)}: cannot change while a run is training; {may} can")
        # True is a number to Python
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{flag(name)}={value!r}: not a number; give a number")
        elif isinstance(FLAGS[name].default, int) and FLAGS[name].type is None and value % 1:
            problems.append(f"{flag(name)}={value}: not a whole number; give one")
    return problems or range_problems(argparse.Namespace(**values))


def range_problems(args: argparse.Namespace) -> list[str]:
    """A sentence for each flag of args whose value is out of its own range."""
    problems = []
    for name in filter(args.__contains__, FLAGS):
        row = FLAGS[name]
        value = getattr(args, name)
        # argparse takes "nan" and "inf" for floats, and most ranges would let infinity pass.
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{flag(name)}={value}: not a finite number; give a number")
        elif row.range and not row.range.holds(value):
            problems.append(f"{flag(name)}={value}: {row.range.reason}; {row.range.remedy}")
    return problems
