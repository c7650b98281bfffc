"""Runs that fine-tune the model of another run, `nanochat sft` and `nanochat dpo`: how they start.

config.json of such a run has the flags, the text and the plan of any run, those of its source where
they are not its own, so that every tool reads it; what only fine-tuning has is under `tuning`."""

import dataclasses
import json
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import hardware, ranks
from nanochat.common import (
    Report,
    Unavailable,
    UsageError,
    counted,
    in_a_line,
    round_up,
    write_atomic,
)
from nanochat.data.chat import with_chat
from nanochat.data.examples import Problem
from nanochat.data.tokenizer import Tokenizer, read_tokenizer
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.decoder import Decoder
from nanochat.model.growing import grown
from nanochat.optim import schedules
from nanochat.run import checkpoint
from nanochat.run.flags import FLAGS, HORIZONS, flag
from nanochat.run.folder import RunFolder
from nanochat.run.lifecycle import resumed_in_words
from nanochat.run.memory import free_memory
from nanochat.run.plan import Horizon, Machine, Plan, size_of
from nanochat.run.plan_text import PlannedRun, as_json, fit_plan, format_plan
from nanochat.run.resume import (
    OpenedRun,
    Source,
    claim_run,
    fit_to_machine,
    is_over,
    merge_with_run,
    source_of_weights,
)
from nanochat.run.runtime import pick_runtime, runtime_in_words
from nanochat.run.training_text import held_out_of_run
from nanochat.run.tuning_flags import AS_RUN

# in the run folder
PROBLEMS_FILE = "problems.jsonl"
# At least so many steps an epoch, and rows a step at most, where the batch is derived.
STEPS_PER_EPOCH = 32
MOST_ROWS = 32


# ----- opening a run


@dataclasses.dataclass
class TunedRun:
    """A fine-tuning run about to start. run: as of train.py, with the flags of the source in its
    args. tokenizer: with the tokens of chats. base_tokenizer: the source's. base: facts on the text
    that the source was trained on, as its config.json has them. own: the values of the flags that
    train.py does not have."""

    run: OpenedRun
    tokenizer: Tokenizer
    base_tokenizer: Tokenizer
    base: dict[str, Any]
    own: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """What config.json records under `tuning`."""
        return {"flags": self.own, "base_specials": list(self.base_tokenizer.specials)}


def open_tuned(args: Namespace, command: str, own_names: Sequence[str]) -> TunedRun:
    """Open the fine-tuning run that the flags name; every rank calls it. args: from parse(),
    checked. own_names: the flags that train.py does not have.

    UsageError for whatever would lose a run or continue another one silently."""
    args.model_tag = args.model_tag or f"{Path(args.source).name}-{command}"
    folder = RunFolder(Path(args.out_dir) / args.model_tag)
    step, config = ranks.from_rank0_or_raise(lambda: claim_run(args, folder))
    if config is None:
        if args.resume:
            ranks.print0(f"{folder.path} holds no run yet: starting a new one")
        own = {name: getattr(args, name) for name in (*own_names, "files", "val_files")}
        return ranks.from_rank0_or_raise(lambda: _new(args, folder, own))
    own = _own_of(args, config, command, own_names)
    merged, changed, extends = merge_with_run(_as_train(args, config["args"]), config)
    if extends:
        raise UsageError(
            f"--resume: the horizon of {folder.path} is fixed; to tune it further, give its folder "
            "as RUN"
        )
    run = OpenedRun(merged, folder, step or 0, config, changed)
    run.over = is_over(merged, config, folder, step)
    tokenizer = read_tokenizer(folder.path / "tokenizer")
    base = Tokenizer(
        tokenizer.kind, tokenizer.tokens, tokenizer.pattern, config["tuning"]["base_specials"]
    )
    if not run.over:
        run.changed += fit_to_machine(merged, config, ranks.world_size())
        run.go_back_to(run.step)
        if not run.step:
            # stopped before its first checkpoint: it begins again with the very same weights
            began_with = config["init_from"]["step"]
            run.source = ranks.from_rank0_or_raise(
                lambda: _source(merged, args.source, folder, began_with)
            )
    return TunedRun(run, tokenizer, base, config["data"], own)


def _new(args: Namespace, folder: RunFolder, own: dict[str, Any]) -> TunedRun:
    """A run that begins."""
    source_folder = RunFolder(args.source)
    if not source_folder.holds_run():
        raise UsageError(
            f"{args.source}: not a run folder (it has no config.json of a run); give "
            "<out-dir>/<model-tag>"
        )
    config = source_folder.read_config()
    flags = _as_train(args, config["args"])
    for name in HORIZONS:
        setattr(flags, name, getattr(args, name, -1))
    flags.optimizer = args.optimizer or config["args"]["optimizer"]
    if flags.optimizer != config["args"]["optimizer"]:
        # that of the source is one of another optimizer
        flags.matrix_lr = -1
    run = OpenedRun(flags, folder)
    run.source = _source(flags, args.source, folder)
    base_tokenizer = read_tokenizer(run.source.tokenizer)
    tokenizer = with_chat(base_tokenizer)
    return TunedRun(run, tokenizer, base_tokenizer, config.get("data", {}), own)


def _as_train(args: Namespace, of_source: Mapping[str, Any]) -> Namespace:
    """The flags as train.py has them: those of the source, and over them the ones that this command
    shares with it and that are not to be as in the source."""
    defaults = {name: row.default for name, row in FLAGS.items()}
    mine = {n: value for n, value in vars(args).items() if n in FLAGS and value != AS_RUN}
    flags = Namespace(**{**defaults, **of_source, **mine})
    flags.given = args.given & set(FLAGS)
    # A base model may have needed several devices; these loops train whole models.
    flags.shard = False
    return flags


def _source(flags: Namespace, path: str, folder: RunFolder, step: int | None = None) -> Source:
    """The weights to begin with, and the shape of the model, whose vocabulary may grow."""
    flags.init_from = path
    # the shape is the source's, whatever the flags say of it
    source = source_of_weights(Namespace(**{**vars(flags), "given": set()}), folder, step)
    vars(flags).update(source.flags)
    return source


def _own_of(
    args: Namespace, config: dict[str, Any], command: str, own_names: Sequence[str]
) -> dict[str, Any]:
    """The values of this command's own flags in a run that is resumed. UsageError for a run of
    another command, or for a value given now that differs."""
    tuning = config.get("tuning")
    made_by = config.get("command", "train.py")
    if tuning is None or made_by != command:
        raise UsageError(
            f"--resume: that run was not made by nanochat {command}, but by {made_by}; resume it "
            "with that, or give another --model-tag"
        )
    differing = [
        f"{flag(name)}={getattr(args, name)} (was {tuning['flags'][name]})"
        for name in own_names
        if name in args.given and getattr(args, name) != tuning["flags"][name]
    ]
    if differing:
        raise UsageError(
            "this run was started with other settings, which a resumed run cannot change: "
            f"{', '.join(differing)}; leave them out, or start another run with --model-tag"
        )
    # files may have moved: their content is checked
    return {**tuning["flags"], "files": args.files, "val_files": args.val_files}


def write_problems(folder: RunFolder, problems: Sequence[Problem], report: Report) -> None:
    """Write all lines of the data that are no examples to PROBLEMS_FILE, a JSON object each: file,
    line, reason. Rank 0 calls it once the folder is taken; the screen shows only the first few."""
    path = folder.path / PROBLEMS_FILE
    lines = [
        json.dumps({"file": str(p.path), "line": p.line, "reason": p.reason}) for p in problems
    ]
    try:
        # a run that is resumed may read other files with the same examples
        path.unlink(missing_ok=True)
        if lines:
            write_atomic(path, "\n".join(lines) + "\n")
    except OSError as error:
        report(f"{path} cannot be written ({error.strerror}), training continues")
        return
    if lines:
        report(f"{counted(len(lines), 'line')} of the data skipped; {path} names each")


# ----- the plan


@dataclasses.dataclass(frozen=True)
class RowsToLearn:
    """The rows of training. T: tokens of each. per_epoch: how many there are. at_once: how many
    belong together, 2 for pairs."""

    T: int
    per_epoch: int
    at_once: int = 1


def plan_run(
    tuned: TunedRun, device: torch.device, rows: RowsToLearn, say: Report, as_numbers: bool
) -> PlannedRun:
    """Derive the plan of a run that begins, or read it back, and print it; every rank. say(text):
    prints a line. as_numbers: print the plan alone, as JSON."""
    run = tuned.run
    args = run.args
    runtime = pick_runtime(args, device.type)
    peak = ranks.from_rank0_or_raise(lambda: hardware.peak_flops(device))
    machine = Machine(device.type, ranks.world_size(), *peak)
    if run.config:
        config, plan = GPTConfig(**run.config["model"]), Plan.from_config(run.config)
        say(resumed_in_words(run))
    else:
        vocab_size = tuned.tokenizer.vocab_size
        config = dataclasses.replace(run.source.model, vocab_size=vocab_size)
        lr_frac = tuned.own["lr_frac"]
        plan = derive_plan(args, config, rows=rows, lr_frac=lr_frac, devices=machine.devices)
    tokens_per_epoch = rows.per_epoch * rows.T
    free_bytes = free_memory(device, machine.devices)
    planned = ranks.from_rank0_or_raise(
        lambda: fit_plan(args, plan, config, machine, runtime, tokens_per_epoch, free_bytes)
    )
    if as_numbers:
        ranks.print0(json.dumps(as_json(planned), indent=2))
    say(format_plan(planned))
    say(runtime_in_words(runtime, config, device.type, machine.devices))
    return planned


def derive_plan(
    args: Namespace,
    config: GPTConfig,
    *,
    rows: RowsToLearn,
    lr_frac: float,
    devices: int,
) -> Plan:
    """The plan of a run that begins: batch, steps, learning rates. args: of a TunedRun.

    devices: of all ranks. Rates are those that the source's flags give for this batch, times
    lr_frac."""
    size = size_of(config, args.aspect_ratio)
    T, rows_per_epoch, rows_at_once = rows.T, rows.per_epoch, rows.at_once
    unit = rows_at_once * devices
    n_rows = args.total_batch_size // T
    if args.total_batch_size == -1:
        # small sets get enough steps, large ones no tiny batches
        n_rows = min(MOST_ROWS, max(1, rows_per_epoch // STEPS_PER_EPOCH))
        n_rows = 2 ** int(math.log2(n_rows))
    n_rows = round_up(max(1, n_rows), unit)
    horizon = Horizon("num_iterations", args.num_iterations)
    if args.num_iterations == -1:
        horizon = Horizon("target_epochs", args.target_epochs)
    steps = int(args.num_iterations)
    if steps == -1:
        steps = max(1, round(args.target_epochs * rows_per_epoch / n_rows))
    base = schedules.BaseRates.from_flags(args)
    factor = lr_frac * schedules.lr_factor(n_rows * T)
    plan = Plan(
        horizon=horizon.name,
        horizon_value=horizon.value,
        parameters=size.parameters,
        scaling_parameters=size.scaling_parameters,
        flops_per_token=size.flops_per_token,
        rows_per_step=n_rows,
        total_batch_tokens=n_rows * T,
        num_iterations=steps,
        tokens=steps * n_rows * T,
        warmup_steps=0,
        warmdown_steps=0,
        groups=schedules.group_settings(base, factor, 1.0, config.width),
        schedule=schedules.Schedule.from_flags(args),
    )
    plan.fix_steps(steps)
    return plan


# ----- the source's weights and text


def load_grown(model: Decoder, source: str, step: int) -> None:
    """Set a model's weights to those of a checkpoint whose vocabulary may be smaller: see
    model/growing.py."""
    config = checkpoint.model_config(source, step)
    device = model.embedding.weight.device
    original = build(config, device, model.compute_dtype, seed=0)
    checkpoint.load_model(source, step, original)
    model.load_state_dict(grown(original, model.config.vocab_size).state_dict())


def base_pieces(tuned: TunedRun, report: Report) -> list[np.ndarray]:
    """Held-out pieces of the text that the source was trained on, up to --eval-tokens; [] after a
    line if it cannot be read any more."""
    config = {"args": vars(tuned.run.args), "data": tuned.base}

    def read() -> list[np.ndarray]:
        pieces = None
        try:
            if tuned.base:
                pieces = held_out_of_run(config, tuned.base_tokenizer, report)
        except (UsageError, Unavailable) as error:
            report(f"the text that RUN was trained on cannot be read ({in_a_line(error)})")
            return []
        if pieces is None:
            report("the text that RUN was trained on has changed: no bits per byte of it")
            return []
        return pieces

    return ranks.from_rank0_or_raise(read)
