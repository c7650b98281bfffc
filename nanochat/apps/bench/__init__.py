"""`nanochat bench`: how long each part of training takes on this machine, and what share of the
peak of its matrix products that is."""

import argparse
import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.apps.bench.table import Result, differences, line, read_results, result_line
from nanochat.common import EXIT_COMPLETED, UsageError, human_time, path_argument, write_json
from nanochat.data.tokenizer import MIN_BPE_VOCAB
from nanochat.run.flags import FLAGS, flag
from nanochat.run.timing import Entry

if TYPE_CHECKING:
    from nanochat.run.workload import Setup, TrainingStep

PARTS = (
    "step",
    "forward",
    "backward",
    "optimizer",
    "attention",
    "loss",
    "data",
    "decode",
    "core",
    "start-up",
)
# Minutes long, or of interest only to some, so they run only when they are named.
ON_REQUEST = ("saving", "steering", "serve", "plan")
SERVING_SECONDS = 60.0
# Eleven saves, ten of them with the memory of the copy in place.
SAVING_STEPS = 600
SAVE_EVERY = 50
# The other parts use tensors of the model's shapes, so they need not wait for its compilation.
NEED_MODEL = {"step", "forward", "backward", "optimizer", "decode", "core", *ON_REQUEST} - {"plan"}
NEED_TOKENIZER = {"data", "core", "start-up"}
# Flags of train.py that bench takes too, and the defaults that suit a laptop.
TRAIN_FLAGS = (
    "device_type",
    "dtype",
    "compile",
    "attention",
    "activation_checkpointing",
    "fp8",
    "fp8_recipe",
    "depth",
    "aspect_ratio",
    "head_dim",
    "n_kv_head",
    "max_seq_len",
    "window_pattern",
    "short_window",
    "arch",
    "vocab_size",
    "device_batch_size",
)
OWN_DEFAULTS = {"depth": 4, "max_seq_len": 512, "vocab_size": 4096, "device_batch_size": 16}
# train.py can derive these two, so its help explains values that bench does not take.
OWN_HELP = {
    "vocab_size": "tokens in the vocabulary",
    "device_batch_size": "rows per forward and backward pass",
}
AT_LEAST_1 = (
    "repeats",
    "saving_steps",
    "depth",
    "aspect_ratio",
    "head_dim",
    "max_seq_len",
    "vocab_size",
    "device_batch_size",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `nanochat bench`."""
    parser = argparse.ArgumentParser(
        prog="nanochat bench",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Time the parts of training: the median of several timings, with the fastest "
        "and the slowest.",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PART,...",
        help=f"parts to time, separated by commas: {', '.join((*PARTS, *ON_REQUEST))}; "
        f"empty: all except {', '.join(ON_REQUEST)}",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="timings of each part (default: %(default)s)"
    )
    parser.add_argument(
        "--saving-steps",
        type=int,
        default=SAVING_STEPS,
        metavar="N",
        help=f"training steps of --only=saving, with a save every {SAVE_EVERY} "
        f"(default: %(default)s)",
    )
    parser.add_argument(
        "--serving-seconds",
        type=float,
        default=SERVING_SECONDS,
        metavar="SECONDS",
        help="load on the server of --only=serve (default: %(default)g)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=False,
        help="print the results as JSON instead of a table",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default="",
        metavar="FILE",
        help="also write the JSON to this file",
    )
    parser.add_argument(
        "--compare",
        type=path_argument,
        default="",
        metavar="FILE",
        help="JSON of an earlier run; each line then says how much faster this run is",
    )
    parser.add_argument(
        "--result",
        type=path_argument,
        nargs="+",
        default=[],
        metavar="FILE",
        help="time nothing; print one line, RESULT name=value ..., about the JSON of earlier runs: "
        "tokens a second and share of the peak of a whole step",
    )
    parser.add_argument(
        "--core-bundle",
        type=path_argument,
        default="",
        metavar="FOLDER",
        help="CORE bundle for the part core; empty: the cached one, if it exists",
    )
    _add_train_flags(parser)
    return parser


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Those of train.py, from its table, so that spelling, choices and help stay the same."""
    group = parser.add_argument_group("as in train.py")
    for name in TRAIN_FLAGS:
        row = FLAGS[name]
        row = dataclasses.replace(
            row,
            default=OWN_DEFAULTS.get(name, row.default),
            help=OWN_HELP.get(name, row.help),
        )
        row.add_to(group)
        parser.set_defaults(**{name: row.default})


def parse_args(argv: Sequence[str]) -> Namespace:
    """The checked flags; `only` is a list of parts. Raises UsageError for the first wrong one."""
    args = build_parser().parse_args(argv)
    args.only = args.only.split(",") if args.only else list(PARTS)
    check_parts(args.only, args.core_bundle, args.vocab_size, args.saving_steps)
    check_serving(args.only, args.serving_seconds, args.max_seq_len)
    if args.json and args.compare:
        raise UsageError(
            f"--compare={args.compare}: adds a column to the table, and --json prints none; "
            f"leave --json out, or write the JSON with --out"
        )
    if args.fp8_recipe != FLAGS["fp8_recipe"].default and not args.fp8:
        raise UsageError(
            f"--fp8-recipe={args.fp8_recipe}: has no effect without --fp8; add --fp8, or leave "
            f"the recipe out"
        )
    if args.n_kv_head < 1 and args.n_kv_head != -1:
        raise UsageError(
            f"--n-kv-head={args.n_kv_head}: must be at least 1, or -1 for as many as query heads; "
            f"give one of these"
        )
    # Refused now: after minutes of timing it would be too late.
    parent = os.path.dirname(os.path.abspath(args.out))
    if args.out and (os.path.isdir(args.out) or not os.path.isdir(parent)):
        raise UsageError(
            f"--out={args.out}: is a folder, or lies in a folder that does not exist; name a file"
        )
    for name in AT_LEAST_1:
        if getattr(args, name) < 1:
            raise UsageError(
                f"{flag(name)}={getattr(args, name)}: must be at least 1; give a positive number"
            )
    return args


def check_parts(only: list[str], core_bundle: str, vocab_size: int, saving_steps: int) -> None:
    """Raises UsageError for parts that do not exist, or that other flags do not fit."""
    parts = (*PARTS, *ON_REQUEST)
    if unknown := set(only) - set(parts):
        raise UsageError(
            f"--only={','.join(sorted(unknown))}: no such part; choose from {', '.join(parts)}"
        )
    if core_bundle and "core" not in only:
        raise UsageError(
            f"--core-bundle={core_bundle}: --only does not name core; add core to --only, or "
            f"leave the bundle out"
        )
    if vocab_size < MIN_BPE_VOCAB and NEED_TOKENIZER & set(only):
        raise UsageError(
            f"--vocab-size={vocab_size}: too small for a tokenizer; give at least "
            f"{MIN_BPE_VOCAB}, or leave data, core and start-up out with --only"
        )
    if saving_steps != SAVING_STEPS and "saving" not in only:
        raise UsageError(
            f"--saving-steps={saving_steps}: --only does not name saving; add saving to --only, "
            f"or leave the steps out"
        )
    # The first save allocates memory and is shown separately, so the cost needs a second one.
    if saving_steps <= 2 * SAVE_EVERY:
        raise UsageError(
            f"--saving-steps={saving_steps}: too few for a second save, after {2 * SAVE_EVERY} "
            f"steps; give at least {2 * SAVE_EVERY + 1}"
        )


def check_serving(only: list[str], seconds: float, context_tokens: int) -> None:
    """Raises UsageError for a load that does not fit the other flags."""
    if seconds != SERVING_SECONDS and "serve" not in only:
        raise UsageError(
            f"--serving-seconds={seconds:g}: --only does not name serve; add serve to --only, or "
            f"leave the seconds out"
        )
    if not 0 < seconds <= 86400:
        raise UsageError(
            f"--serving-seconds={seconds:g}: must be above 0 and at most 86400; 60 is the default"
        )
    if "serve" in only and context_tokens < 8:
        raise UsageError(
            f"--max-seq-len={context_tokens}: has no room for prompts of --only=serve; give at "
            f"least 8"
        )


def words_for_train(values: dict[str, Any]) -> list[str]:
    """The command-line words with which train.py trains what bench times.

    values: of TRAIN_FLAGS, by name."""
    words = [f"--total-batch-size={values['device_batch_size'] * values['max_seq_len']}"]
    for name in TRAIN_FLAGS:
        value, default = values[name], FLAGS[name].default
        # train.py refuses windows for a llama; bench, like the model, ignores them.
        ignored = values["arch"] == "llama" and name in ("window_pattern", "short_window")
        # Left out where it is the default: train.py refuses some flags whenever they are given.
        if value == default or ignored:
            continue
        if not isinstance(default, bool):
            words.append(f"{flag(name)}={value}")
        elif value:
            words.append(flag(name))
        else:
            words.append(flag(f"no_{name}"))
    return words


def check_start_up(words: Sequence[str]) -> None:
    """Raises UsageError if train.py, which the part start-up runs with these words, would refuse
    them: minutes later that part would fail, and with it all that was timed before."""
    from nanochat.run import flags
    from nanochat.run.checks import check_flags

    if problems := check_flags(flags.parse(words)):
        problems.append(
            "--only=start-up: runs train.py, which refuses this; leave start-up out, or mend the "
            "flags"
        )
        raise UsageError("\n".join(problems))


def describe(setup: "Setup", peak_flops: float, training: "TrainingStep | None") -> str:
    """What is measured, in a line or two."""
    config = setup.config
    compiled = "compiled" if setup.compiled else "eager"
    text = (
        f"{config.arch}, depth {config.depth}, width {config.width}, context "
        f"{config.max_seq_len}, vocabulary {config.vocab_size:,}, "
        f"{setup.shape.device_batch_size} rows; {setup.device.type}, {setup.dtype_name}, "
        f"attention {setup.attention}, {compiled}; matrix products {peak_flops / 1e12:.3g} TFLOP/s"
    )
    if training is None:
        return text
    return f"{text}\nfirst two steps (compilation): {human_time(training.warm_up_seconds)}"


def core_bundle_for(only: list[str], given: str, report: Callable[[str], None]) -> Path | None:
    """The folder of the CORE bundle if core is to be timed and the bundle exists, else None.

    given: --core-bundle. It is downloaded only where --only names nothing else. Raises UsageError
    and Unavailable."""
    if "core" not in only:
        return None
    from nanochat.eval.core_bundle import find_bundle

    # Whoever asks for this part alone wants the download; it is not a side effect of all parts.
    folder = find_bundle(given, report, download=only == ["core"])
    if folder is None:
        report(
            "core: skipped, because its bundle is not cached; name one with --core-bundle, or "
            "download it with --only=core"
        )
    return folder


def as_json(setup: "Setup", peak_flops: float, entries: list[Entry]) -> dict[str, Any]:
    """The content of --out: everything that was measured, and what it was measured on."""
    from nanochat import hardware

    return {
        "settings": setup.settings(),
        "hardware": hardware.describe(setup.device),
        "peak_flops": peak_flops,
        "flops_per_token": setup.flops_per_token,
        "results": [dataclasses.asdict(Result.of(entry, peak_flops)) for entry in entries],
    }


def main(argv: Sequence[str]) -> int:
    """Time the parts and print a table or JSON. Returns 0.

    Raises UsageError for flags that describe no model, or an unreadable --compare or --result."""
    args = parse_args(argv)
    if args.result:
        print(result_line(args.result))
        return EXIT_COMPLETED
    earlier = read_results(args.compare) if args.compare else None

    def report(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    # The profiler counts the memory on a CPU; its warnings about that are silenced before torch is
    # loaded, which is late: --help and refused flags should not wait for it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from nanochat import hardware
    from nanochat.apps.bench.parts import Bench, entries_of
    from nanochat.run.workload import Shape, TrainingStep, open_setup

    shape = Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})
    setup = open_setup(
        shape,
        device_type=args.device_type,
        dtype=args.dtype,
        compile=args.compile,
        attention=args.attention,
    )
    # Before anything takes long: what train.py would refuse, and a bundle that is missing.
    train_words = words_for_train({name: getattr(args, name) for name in TRAIN_FLAGS})
    if "start-up" in args.only:
        check_start_up(train_words)
    core_bundle = core_bundle_for(args.only, args.core_bundle, report)
    # Before the model is built, so that all of the machine is free.
    peak = hardware.measured_peak(setup.device, setup.dtype)
    training = TrainingStep(setup) if NEED_MODEL & set(args.only) else None
    report(describe(setup, peak, training))
    if earlier is not None and (text := differences(setup.settings(), earlier)):
        report(text)
    bench = Bench(
        setup,
        args.repeats,
        training,
        core_bundle,
        train_words=train_words,
        serving_seconds=args.serving_seconds,
        saving_steps=args.saving_steps,
        save_every=SAVE_EVERY,
        report=report,
    )
    entries = []
    for part in args.only:
        for entry in entries_of(part, bench):
            entries.append(entry)
            report(line(Result.of(entry, peak), earlier))

    # Measured again, because other programs may have slowed the first measurement down.
    peak = max(peak, hardware.measured_peak(setup.device, setup.dtype))
    content = as_json(setup, peak, entries)
    if args.out:
        write_json(Path(args.out), content)
    if args.json:
        print(json.dumps(content, indent=2))
    report(
        f"peak of matrix products in {setup.dtype_name}: {peak / 1e12:.3g} TFLOP/s, the better of "
        f"before and after; the shares in the table refer to the one before"
    )
    return EXIT_COMPLETED
