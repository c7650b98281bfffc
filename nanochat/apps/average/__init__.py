"""`nanochat average RUN`: a run whose weights are the mean of several checkpoints of another run.

Steps at a high learning rate go back and forth across a valley of the loss, and their mean is
nearer to its floor: Izmailov et al. 2018 (arXiv 1803.05407). Averaging the latest checkpoints in
this way is LAWA (arXiv 2209.14981). Where the rate has decayed to 0, little is left to gain."""

import argparse
import json
import os
from argparse import Namespace
from pathlib import Path

from nanochat.common import EXIT_COMPLETED, UsageError, add_model_flags
from nanochat.run.folder import run_argument


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat average",
        allow_abbrev=False,
        description="Average the weights of several checkpoints of a run, each counting the same, "
        "into a new run folder next to it, which sample, evaluate, serve, export and train.py "
        "--init-from read as any other. Prints the bits per byte and the loss of the average, and "
        "of the run's newest and best checkpoint, on the text that the run was validated on.",
    )
    add = parser.add_argument
    add(
        "run",
        type=run_argument,
        metavar="RUN",
        help="run folder, such as out/d4, or the tag of one in out",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--last",
        type=int,
        metavar="N",
        help="average the last N permanent checkpoints (those of --save-every, and the final one)",
    )
    which.add_argument(
        "--steps",
        type=steps_argument,
        metavar="A,B,C",
        help="average the checkpoints of these steps",
    )
    add(
        "--tag",
        default="",
        metavar="NAME",
        help="name of the new run folder (default: RUN's, with -average behind it)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    add_model_flags(parser, auto="as in train.py")
    return parser


def steps_argument(text: str) -> list[int]:
    """argparse type of steps, separated by commas. ValueError for other text."""
    return [int(word) for word in text.split(",") if word.strip()]


def main(argv: list[str]) -> int:
    """Write the average, measure it, print the result. Returns 0.

    UsageError for checkpoints that cannot be averaged or a folder that exists; then nothing is
    left of it."""
    args = build_parser().parse_args(argv)
    if problems := _problems(args):
        raise UsageError("\n".join(problems))
    # here, not above: they import torch
    from nanochat import hardware, ranks
    from nanochat.apps.average.averaging import average

    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    dtype, _ = hardware.pick_dtype(args.dtype, device_type)
    run = Path(args.run)
    out = run.resolve().with_name(args.tag or f"{run.resolve().name}-average")
    made = average(run, out, args.last, args.steps, device, str(dtype).removeprefix("torch."))
    ranks.close()
    print(json.dumps(made.as_json(), indent=2) if args.json else made.in_words())
    return EXIT_COMPLETED


def _problems(args: Namespace) -> list[str]:
    """A message for every flag that is unusable, whatever the run is."""
    problems = []
    if args.last is not None and args.last < 2:
        problems.append(f"--last={args.last}: an average needs two checkpoints; give 2 or more")
    if args.steps is not None:
        named = f"--steps={','.join(map(str, args.steps))}"
        if len(set(args.steps)) < 2:
            problems.append(f"{named}: an average needs two checkpoints; name more of them")
        elif len(set(args.steps)) < len(args.steps):
            problems.append(f"{named}: a step is named twice; each checkpoint counts the same")
    if os.path.basename(args.tag) != args.tag or args.tag in (".", ".."):
        problems.append(
            f"--tag={args.tag}: a path, not a name; give a plain name, the new run folder is next "
            "to RUN"
        )
    return problems
