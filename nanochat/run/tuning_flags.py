"""The flags of `nanochat sft` and `nanochat dpo`: those of train.py that fit, with other defaults,
and their own. Imports no torch, so that --help is instant."""

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.run import trackers
from nanochat.run.flags import FLAGS, NOT_NEGATIVE, Flag, flag
from nanochat.run.folder import run_argument

# The default of a flag whose value is that of the run to tune.
AS_RUN = "as RUN has it"


def shared(name: str, default: Any = None) -> Flag:
    """A flag of train.py, with another default if one is given."""
    row = FLAGS[name]
    return row if default is None else dataclasses.replace(row, default=default)


def groups_of_flags(own: Sequence[Flag], learning: Sequence[Flag]) -> dict[str, list[Flag]]:
    """The flags of a fine-tuning command. own: about its data. learning: what its loss has, and its
    learning rate."""
    names = {
        "logging": ("run", "out_dir", "model_tag", "tensorboard", "notify"),
        "runtime": (
            "device_type",
            "dtype",
            "compile",
            "seed",
            "attention",
            "activation_checkpointing",
        ),
        "saving": ("save_every", "save_at", "save_every_minutes", "keep_last", "no_save"),
        "resume": ("resume", "resume_from_step", "overwrite"),
        "faults": ("max_skipped",),
        "planning": ("dry_run", "json"),
    }
    # where the compiler failed or was too slow for RUN, it would fail again
    defaults = {"compile": AS_RUN}
    groups = {
        title: [shared(name, defaults.get(name)) for name in rows] for title, rows in names.items()
    }
    tag = "name of the run folder; empty: that of RUN and the name of this command"
    groups["logging"][2] = dataclasses.replace(FLAGS["model_tag"], help=tag)
    return {
        "logging": groups["logging"],
        "runtime": groups["runtime"],
        "data": list(own),
        "horizon": [shared("num_iterations"), shared("target_epochs", 3.0)],
        "optimization": [
            *learning,
            shared("device_batch_size"),
            shared("total_batch_size"),
            Flag(
                "optimizer",
                "",
                "optimizer of the matrices; empty: that of RUN",
                choices=("", "muon", "adamw"),
            ),
            shared("weight_decay", 0.0),
            shared("dropout"),
            shared("grad_clip", 1.0),
            shared("lr_schedule"),
            shared("warmup_ratio", 0.05),
            shared("warmup_steps"),
            shared("warmdown_ratio"),
            shared("final_lr_frac"),
        ],
        "evaluation": [
            shared("eval_every", 50),
            shared("eval_tokens", 2**17),
            shared("sample_every", 200),
            shared("patience"),
        ],
        **{title: groups[title] for title in ("saving", "resume", "faults", "planning")},
    }


def lr_frac(default: float) -> Flag:
    """The row of --lr-frac."""
    return Flag(
        "lr_frac",
        default,
        "peak learning rates / those that RUN would have at this batch",
        range=NOT_NEGATIVE,
    )


def parse(
    command: str, description: str, groups: Mapping[str, list[Flag]], argv: Sequence[str]
) -> Namespace:
    """The flags of a fine-tuning command as a Namespace; `given` on it is the set of names that
    were on the command line, `source` the run folder, `files` the values of --data, `val_files`
    those of --val-data. Ends the process with exit code 2 for what argparse refuses."""
    parser = argparse.ArgumentParser(
        prog=f"nanochat {command}",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "source",
        type=run_argument,
        metavar="RUN",
        help="run folder to tune, such as out/d4, or its tag: d4",
    )
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        if title == "data":
            add_files(group, command)
        for row in rows:
            row.add_to(group)
    args = parser.parse_args(argv)
    given = set(vars(args)) - {"source", "files", "val_files"}
    rows = [row for members in groups.values() for row in members]
    defaults = {row.name: row.default for row in rows}
    return Namespace(**{"val_files": [], **defaults, **vars(args), "given": given})


def add_files(group: Any, command: str) -> None:
    """Declare --data and --val-data."""
    what = "preference pairs" if command == "dpo" else "conversations"
    group.add_argument(
        "--data",
        dest="files",
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"JSON lines of {what}; FILE=2 takes each of them twice an epoch",
    )
    group.add_argument(
        "--val-data",
        dest="val_files",
        nargs="+",
        metavar="FILE",
        help="the same, to validate on (default: 2%% of --data, of few lines ten or a tenth, by a "
        "hash of the content)",
    )


def problems_of(args: Namespace, groups: Mapping[str, list[Flag]]) -> list[str]:
    """A sentence for each flag of the command line that cannot be honoured."""
    rows = {row.name: row for members in groups.values() for row in members}
    found = [
        f"{flag(name)}={getattr(args, name)}: {row.range.reason}; {row.range.remedy}"
        for name, row in rows.items()
        if row.range and not row.range.holds(getattr(args, name))
    ]
    for files, name in ((args.files, "--data"), (args.val_files, "--val-data")):
        found += [f"{name}: an empty name; give a file" for file in files if not file]
    return found + trackers.problems(args.run, args.tensorboard)
