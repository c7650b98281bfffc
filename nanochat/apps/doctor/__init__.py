"""`nanochat doctor`: what this machine has, what is missing, and what will be slow here and why.
Changes nothing but the cache of compiled kernels. With --gpu it checks and measures the whole
program on a GPU."""

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence

from nanochat.apps.doctor.advice import needed, slow
from nanochat.apps.doctor.facts import Facts, gather
from nanochat.apps.doctor.gpu import CHECKS, check_gpu
from nanochat.apps.doctor.text import as_text
from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, UsageError, path_argument
from nanochat.run.flags import flag

# Flags of the report and of --gpu, with their defaults; those of one are refused in the other.
REPORT_FLAGS = {"out_dir": "out", "quick": False, "json": False}
GPU_FLAGS = {"out": "out/gpu_check.json", "only": "", "minutes": 9.5}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `nanochat doctor`. It stores only the flags that are given."""
    parser = argparse.ArgumentParser(
        prog="nanochat doctor",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Check this machine: packages, devices, speed, compiler, disk, network; then "
        "what will be slow here and why. Exit code 1 if training cannot work.",
    )
    parser.add_argument(
        "--out-dir",
        type=path_argument,
        metavar="FOLDER",
        help=f"folder of run folders, whose disk is checked (default: {REPORT_FLAGS['out_dir']})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="skip the trial compilation and measure smaller matrix products",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON, nothing rounded"
    )
    group = parser.add_argument_group(
        "on a GPU",
        "Kernels against references, speed, memory and exact resume, in one table. Exit code 1 if "
        "something is wrong; a goal that is missed is only shown as missed.",
    )
    group.add_argument(
        "--gpu", action="store_true", help="check and measure this program on the GPU instead"
    )
    group.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help=f"with --gpu: file for the results as JSON (default: {GPU_FLAGS['out']})",
    )
    group.add_argument(
        "--only",
        metavar="CHECK,...",
        help=f"with --gpu: checks to run, separated by commas: {', '.join(CHECKS)}; empty: all",
    )
    group.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help=f"with --gpu: time limit; checks that do not fit are cut off or left out (default: "
        f"{GPU_FLAGS['minutes']})",
    )
    return parser


def parse_args(argv: Sequence[str]) -> Namespace:
    """The flags. Raises UsageError for a flag that does not belong to what is asked for."""
    args = build_parser().parse_args(argv)
    # Only flags that were given are in there: one that equals its default is refused as well.
    given = vars(args)
    gpu = "gpu" in given
    for name in REPORT_FLAGS if gpu else GPU_FLAGS:
        if name in given:
            if gpu:
                raise UsageError(f"{flag(name)}: has no effect with --gpu; leave one of them out")
            raise UsageError(
                f"{flag(name)}: has no effect without --gpu; add --gpu, or leave it out"
            )
    return Namespace(**{"gpu": False, **REPORT_FLAGS, **GPU_FLAGS, **given})


def examine(out_dir: str, quick: bool) -> Facts:
    """All facts with the conclusions from them."""
    facts = gather(out_dir, quick)
    facts.needed = needed(facts)
    facts.slow = slow(facts)
    return facts


def main(argv: Sequence[str]) -> int:
    """Print the report. Returns 0 if training can work here, 1 if something it needs is missing;
    with --gpu 1 if something is wrong. Raises UsageError for wrong flags, or no GPU for --gpu."""
    args = parse_args(argv)
    # An empty --only means all, and a trailing comma is no check.
    if args.gpu:
        names = [name for name in args.only.split(",") if name]
        return check_gpu(args.out, names or list(CHECKS), args.minutes)
    # Problems go into the report and the exit code, so a broken machine gets a whole report.
    facts = examine(args.out_dir, args.quick)
    print(json.dumps(facts.as_json(), indent=2) if args.json else as_text(facts))
    return EXIT_FAILED if facts.needed else EXIT_COMPLETED
