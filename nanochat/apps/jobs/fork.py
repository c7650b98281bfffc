"""`nanochat jobs fork`: a run that continues from a checkpoint of another one, with other flags.

The new run folder holds all that `train.py --resume` needs: the checkpoint, the tokenizer, what the
parent recorded before that step, and a config.json in which the changed flags, and what follows
from them, are in force. The parent is only read."""

import json
import math
import os
import shlex
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.apps.jobs.naming import named
from nanochat.apps.jobs.state import ALIVE, Place, look
from nanochat.common import (
    EXIT_COMPLETED,
    Unavailable,
    UsageError,
    human_bytes,
    human_time,
    new_folder,
    printable,
    python_command,
    sha256_hex,
)
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.checks import check_flags
from nanochat.run.flags import FLAGS, HORIZONS, START, flag
from nanochat.run.folder import RunFolder, weights_alone, write_summary
from nanochat.run.loading import step_of
from nanochat.run.metrics import Line, lines_of, parsed, read_lines
from nanochat.run.plan import LANDING_SHARE, Machine, Plan, fork_plan
from nanochat.run.state import Scores

Config = dict[str, Any]  # the content of a config.json
TRAIN_PY = Path(__file__).resolve().parents[3] / "train.py"
RECORDS = ("metrics.jsonl", "samples.jsonl", "core.jsonl")


@dataclass(frozen=True)
class Fork:
    """A fork, decided and not yet written. parent: run folder. config: of the new run. changed:
    {flag's name: (before, now)}. other_held_out: it is validated on another text than its parent,
    or on more or less of it. notes: lines on what a user may not expect."""

    parent: Path
    out: Path
    step: int
    config: Config
    plan: Plan
    changed: dict[str, tuple[Any, Any]]
    other_held_out: bool
    notes: list[str]

    def in_words(self) -> str:
        """Where it begins, and with what."""
        words = [f"{flag(name)}={now} (was {was})" for name, (was, now) in self.changed.items()]
        # of a time budget none is known before it has been measured
        steps = self.plan.num_iterations
        end = f"ends at step {steps}" if steps else "ends with its time budget"
        where = f"from step {self.step}"
        if self.plan.landings_at(self.step):
            where += ", where its warm-down begins,"
        return (
            f"{_shown(self.out)} continues {_shown(self.parent)} {where} and {end}; "
            f"changed: {', '.join(words) or 'nothing'}"
        )

    def command(self) -> list[str]:
        """The command that trains it, on as many ranks as its parent had."""
        ranks = self.config["runtime"]["world_size"]
        return python_command(TRAIN_PY, self._flags(), ranks)

    def shown_command(self) -> str:
        """The same, for a shell in which the environment is active."""
        ranks = self.config["runtime"]["world_size"]
        words = ["python", "train.py"]
        if ranks > 1:
            words = ["torchrun", "--standalone", f"--nproc_per_node={ranks}", "--", "train.py"]
        return shlex.join([*words, *self._flags()])

    def _flags(self) -> list[str]:
        """What train.py is given: --out-dir only where it is not the default here."""
        out_dir = self.out.parent
        is_default = out_dir.resolve() == Path(FLAGS["out_dir"].default).resolve()
        where = [] if is_default else [f"--out-dir={_shown(out_dir)}"]
        return ["--resume", f"--model-tag={self.out.name}", *where]


def _shown(path: Path) -> str:
    """A path as people would write it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def fork(args: Namespace, given: dict[str, Any]) -> int:
    """Make the new run folder and print how to train it; with --start, become that process.

    args: parent (a tag or path), tag, step, land, out_dir, start, json. given: flags of train.py by
    name.
    UsageError for whatever cannot be forked, Unavailable if the disk takes it not."""
    place = named(args.parent)
    # next to its parent, where `nanochat runs` and compare are used to look
    out_dir = Path(args.out_dir or place.path.parent)
    _refuse_what_is_no_parent(place.path)
    made = _make(place.path, out_dir, args.tag, args.step, args.land, given)
    notes = [*_note_on_training(place, made.step, args), *made.notes]
    if args.json:
        print(json.dumps(_as_json(made, notes), indent=2), flush=True)
    else:
        lines = [made.in_words(), *(f"note: {note}" for note in notes), made.shown_command()]
        print(printable("\n".join(lines)), flush=True)
    if args.start:
        command = made.command()
        # signals, the terminal and the exit code are then its own
        os.execv(command[0], command)
    return EXIT_COMPLETED


def _make(
    parent: Path,
    out_dir: Path,
    tag: str,
    asked: int | str | None,
    lands: bool,
    given: dict[str, Any],
) -> Fork:
    """Decide on a fork and write it. asked: the checkpoint: a step, "best", or None for the
    newest."""
    while True:
        step = step_of(parent, asked)
        try:
            made = decide(parent, out_dir, tag, step, lands, given)
            with new_folder(made.out) as folder:
                write(made, folder)
            return made
        except (FileNotFoundError, UsageError):
            if checkpoint.folder_of(parent, step).exists():
                raise
        # a process that trains has removed it meanwhile, since it has a newer one
        if asked is not None:
            raise UsageError(
                f"--step={asked}: {parent} no longer has this checkpoint, a training process "
                "removed it; choose another step"
            )


def _as_json(made: Fork, notes: Sequence[str]) -> dict[str, Any]:
    """What --json prints of a fork."""
    return {
        "run": str(made.out),
        "forked_from": made.config["forked_from"],
        "num_iterations": made.plan.num_iterations,
        "notes": list(notes),
        "command": made.shown_command(),
    }


def _refuse_what_is_no_parent(path: Path) -> None:
    """UsageError for a run that train.py could not continue."""
    config = RunFolder(path).read_config()
    if held := weights_alone(config):
        raise UsageError(
            f"{path}: holds {held} and no training to continue; start a run from them: "
            f"train.py --init-from={path}"
        )
    if "tuning" in config:
        raise UsageError(
            f"{path}: a fine-tuned run, which train.py cannot continue; fine-tune its source again "
            "with other flags"
        )


def _note_on_training(place: Place, step: int, args: Namespace) -> list[str]:
    """A line if the parent is still training, and thus ahead of its newest checkpoint."""
    run = look(place)
    # whoever names a step knows what it is
    if args.step is not None or run.status not in ALIVE or run.step == step:
        return []
    at = "" if run.step is None else f", now at step {run.step:,}"
    return [
        f"{place.tag} is training{at}, and its newest checkpoint is step {step:,}; to fork from "
        f"later, save first: nanochat jobs save {shlex.quote(args.parent)}"
    ]


# ----- what the new run is


def decide(
    parent: Path, out_dir: Path, tag: str, step: int, lands: bool, given: dict[str, Any]
) -> Fork:
    """The fork of a run with these flags, from the checkpoint of a step. out_dir, tag: of its
    folder. lands: its warm-down begins there. Nothing is written.

    UsageError, with all problems of the flags, if it cannot be trained."""
    config = RunFolder(parent).read_config()
    state = checkpoint.read_state(parent, step)
    was = _flags_at(config, step)
    was_landed = bool(config["plan"].get("landings"))
    now, new_horizon = _changed_flags(was, given, was_landed)
    changed = {
        name: (value, getattr(now, name))
        for name, value in vars(was).items()
        if value != getattr(now, name)
    }
    # two of them: one is changed, the other tells what the parent would have done
    plan, plan_before = Plan.from_config(config), Plan.from_config(config)
    if lands and (horizons := sorted(map(flag, set(HORIZONS).intersection(given)))):
        raise UsageError(
            f"{', '.join(horizons)}: a fork that lands ends after {LANDING_SHARE:.0%} more steps; "
            "leave out either this or --land"
        )
    _refuse(out_dir, tag, config, plan, now, changed)
    _refuse_spent_minutes(now, new_horizon, state)
    runtime = config["runtime"]
    fork_plan(
        plan,
        was,
        now,
        step=step,
        config=GPTConfig(**config["model"]),
        new_horizon=new_horizon,
        tokens_per_epoch=_tokens_per_epoch(config, now, changed),
        machine=Machine("", runtime["world_size"], runtime["peak_flops"], runtime["peak"]),
    )
    if lands:
        plan.land_fork(step)
    if plan.is_last(step):
        raise UsageError(
            f"{parent}: ends at step {step}, so nothing is left for a fork from there; give a "
            f"longer horizon, such as --num-iterations={2 * step}, or an earlier --step"
        )
    return Fork(
        parent=parent,
        out=out_dir / tag,
        step=step,
        config=_child_config(parent, config, plan, step, now, changed),
        plan=plan,
        changed=changed,
        other_held_out=_has_other_held_out(now, changed),
        notes=_notes(parent, step, plan_before, plan, now, changed),
    )


def _flags_at(config: Config, step: int) -> Namespace:
    """The flags that a run had at a step, those that belong to one start left out."""
    defaults = {name: row.default for name, row in FLAGS.items()}
    values = {**defaults, **config["args"]}
    # what `nanochat jobs set` had changed by then
    for at, changes in sorted(config.get("changes", []), key=lambda change: change[0]):
        if at < step:
            values |= changes
    of_one_start = {name for name, row in FLAGS.items() if row.on_resume == START}
    return Namespace(**{name: v for name, v in values.items() if name not in of_one_start})


def _changed_flags(
    was: Namespace, given: dict[str, Any], was_landed: bool
) -> tuple[Namespace, bool]:
    """(the flags with those given now, whether the horizon is a new one)."""
    now = Namespace(**{**vars(was), **given})
    horizons = [name for name in HORIZONS if name in given]
    # a run that was landed ended before its horizon, which counts again when it is given again
    new_horizon = any(was_landed or given[name] != getattr(was, name) for name in horizons)
    if new_horizon:
        # the horizon given now counts, whatever the run had
        for name in HORIZONS[:-1]:
            if name not in given:
                setattr(now, name, -1)
    return now, new_horizon


def _refuse(
    out_dir: Path,
    tag: str,
    config: Config,
    plan: Plan,
    now: Namespace,
    changed: dict[str, tuple[Any, Any]],
) -> None:
    """UsageError with every problem of the flags of a fork, and of its name."""
    # all of them, as train.py does: whoever mends one should not meet the next one afterwards
    problems = []
    for name, (was, value) in changed.items():
        if FLAGS[name].no_fork:
            problems.append(f"{flag(name)}={value} (was {was}): {FLAGS[name].no_fork}")
    of_one_start = {n: row.default for n, row in FLAGS.items() if row.on_resume == START}
    in_force = Namespace(**{**of_one_start, **vars(now)})
    in_force.out_dir, in_force.model_tag = str(out_dir), tag
    # as for a run that is resumed: what it began with need not exist any more
    in_force.resume = True
    in_force.given = {*changed, "out_dir", "model_tag"}
    in_force.max_seq_len = config["model"]["max_seq_len"]
    in_force.total_batch_size = plan.total_batch_tokens
    if "device_batch_size" not in changed:
        in_force.device_batch_size = -1
    problems += [problem.replace("--model-tag", "--tag") for problem in check_flags(in_force)]
    if problems:
        raise UsageError("\n".join(problems))


def _refuse_spent_minutes(now: Namespace, new_horizon: bool, state: Config) -> None:
    """UsageError for a time budget that is over when the fork begins."""
    horizon = next(name for name in HORIZONS if getattr(now, name) != -1)
    spent = state["training_seconds"]
    if new_horizon and horizon == "target_minutes" and 60 * now.target_minutes <= spent:
        raise UsageError(
            f"--target-minutes={now.target_minutes}: the fork begins after {human_time(spent)} of "
            "training, which count; give more"
        )


def _tokens_per_epoch(config: Config, now: Namespace, changed: dict[str, tuple[Any, Any]]) -> float:
    """Training tokens of one pass. UsageError for a number of passes over a text that has not been
    read yet."""
    known = config["data"]["tokens_per_epoch"]
    is_unread = "data" in changed or known is None
    if is_unread and "target_epochs" in changed and now.target_epochs != -1:
        raise UsageError(
            f"--target-epochs={now.target_epochs}: how many tokens --data={now.data} has is known "
            "only when it has been read; give --num-iterations or --target-tokens"
        )
    return known


def _has_other_held_out(now: Namespace, changed: dict[str, tuple[Any, Any]]) -> bool:
    """Whether bits per byte of the fork are of another text than those of its parent."""
    if "val_data" in changed or "eval_tokens" in changed:
        return True
    # without --val-data a part of the text is held out
    return "data" in changed and not now.val_data


def _notes(
    parent: Path,
    step: int,
    before: Plan,
    plan: Plan,
    now: Namespace,
    changed: dict[str, tuple[Any, Any]],
) -> list[str]:
    """Lines on what a user may not expect of a fork. before: the parent's plan."""
    notes = []
    # legitimate, as for training on after a warm-down, but nothing that should surprise
    had, has = before.lr_multiplier(step), plan.lr_multiplier(step)
    # a landing computes the rate that it begins with
    if not math.isclose(had, has):
        notes.append(
            f"at step {step:,} the learning rate jumps from {had:.3g} to {has:.3g} of its peak"
        )
    if "data" in changed:
        notes.append(
            "the new text is read from its beginning; if it is the old one in another place, leave "
            "--data out here and give it to train.py"
        )
    elif "seed" in changed:
        notes.append("the text is read from the beginning, in the order of the new seed")
    if _has_other_held_out(now, changed):
        notes.append(
            f"the evaluations of {parent.name} are left out: bits per byte on another held-out "
            "text, or on more or less of it, do not compare"
        )
    return notes


def _child_config(
    parent: Path,
    config: Config,
    plan: Plan,
    step: int,
    now: Namespace,
    changed: dict[str, tuple[Any, Any]],
) -> Config:
    """config.json of a fork: its parent's, as far as nothing has changed."""
    # W&B gets a curve of its own
    child = {name: value for name, value in config.items() if name != "wandb_id"}
    child["args"] = {name: vars(now).get(name, value) for name, value in config["args"].items()}
    child["args"] |= {name: value for name, (_, value) in changed.items()}
    child["plan"] = plan.as_dict()
    child["seed"] = now.seed
    child["model"] = {**config["model"], "dropout": now.dropout}
    # those before are in the flags now, those to come are repeated as by the parent
    child["changes"] = [
        [at, {name: value for name, value in values.items() if name not in changed}]
        for at, values in config.get("changes", [])
        if at >= step
    ]
    # those in config.json would be taken for the ones of the new file
    if "sample_prompts" in changed:
        child.pop("prompts", None)
    # train.py fills this in when it has read the text
    if "data" in changed or "val_data" in changed:
        child["data"] = {**dict.fromkeys(config["data"]), "name": now.data, "revision": ""}
        child["data"]["first_row"] = config["data"].get("first_row", 0)
    # finding a place deep in another order would fetch all shards before it
    if "data" in changed or "seed" in changed:
        child["data"] = {**child["data"], "first_row": step * plan.rows_per_step}
    files = checkpoint.read_manifest(parent, step).files
    child["forked_from"] = {
        "run": str(parent),
        # tells the parent from all other runs, wherever it is moved
        "checkpoint": sha256_hex(json.dumps({n: e.sha256 for n, e in sorted(files.items())})),
        "step": step,
        "changed": {name: list(values) for name, values in changed.items()},
    }
    # of a fork of a fork, all of its history
    if "forked_from" in config:
        child["forked_from"]["forked_from"] = config["forked_from"]
    return child


# ----- what the new run folder holds


def write(made: Fork, folder: Path) -> None:
    """Write the run folder of a fork into an empty folder.

    FileNotFoundError if the checkpoint is removed meanwhile, Unavailable if the disk is full or
    does not keep what is written."""
    _copy_checkpoint(made, folder)
    shutil.copytree(made.parent / "tokenizer", folder / "tokenizer")
    for name in RECORDS:
        _copy_record(made, folder, name)
    # the parent's best of another step is not here, and the fork will find its own
    if checkpoint.best_step(made.parent) == made.step and not made.other_held_out:
        checkpoint.mark_best(folder, made.step)
    _write_summary(made, folder)
    RunFolder(folder).write_config(made.config)


def _copy_checkpoint(made: Fork, folder: Path) -> None:
    """Copy the checkpoint, and compare the copy with its hashes. A copy, no link: what happens to
    one run never happens to the other."""
    source = checkpoint.folder_of(made.parent, made.step)
    target = checkpoint.folder_of(folder, made.step)
    target.mkdir(parents=True)
    files = checkpoint.read_manifest(made.parent, made.step).files
    need = sum(entry.bytes for entry in files.values()) + checkpoint.SPARE_BYTES
    free = checkpoint.free_bytes(folder)
    # a disk that is full would also end the saves of a parent that is training
    if free < need:
        raise Unavailable(
            f"the checkpoint needs {human_bytes(need)}, and only {human_bytes(free)} are free; "
            "free some, or name a folder on a larger disk by --out-dir"
        )
    for name in (*files, "manifest.json"):
        shutil.copyfile(source / name, target / name)
    if problem := checkpoint.damage(folder, made.step):
        raise Unavailable(f"the copy of {source} is damaged: {problem}; check the disk")


def _copy_record(made: Fork, folder: Path, name: str) -> None:
    """Copy the lines of a record up to the fork's step, of which those of the step itself are
    evaluations: its training is what the fork repeats."""
    if not (made.parent / name).exists():
        return

    def belongs(line: Line) -> bool:
        if made.other_held_out and "val/bpb" in line:
            return False
        return line["step"] < made.step or line["step"] == made.step and "train/loss" not in line

    # as text: numbers that are read and written again might look different
    texts = lines_of(made.parent / name)
    lines = [text + "\n" for text in texts if (line := parsed(text)) is not None and belongs(line)]
    (folder / name).write_text("".join(lines), encoding="utf-8")


def _write_summary(made: Fork, folder: Path) -> None:
    """summary.json of a run that waits to be resumed."""
    state, plan = checkpoint.read_state(folder, made.step), made.plan
    scores = Scores.from_lines(read_lines(folder / "metrics.jsonl"))
    tokens = made.step * plan.total_batch_tokens
    seconds = state["training_seconds"]
    write_summary(
        folder,
        status="stopped",
        reason=f"forked from {made.parent} at step {made.step}, and not started yet",
        step=made.step,
        tokens=tokens,
        total_training_flops=tokens * plan.flops_per_token,
        total_training_time=seconds,
        val_bpb=scores.val_bpb,
        min_val_bpb=scores.min_val_bpb,
        core_metric=scores.core_metric,
        core_metric_n=scores.core_metric_n,
        tok_per_sec=tokens / seconds if seconds else None,
        mfu=None,
        peak_memory_bytes=None,
        skipped_steps=state.get("skipped_steps", 0),
        checkpoint=made.step,
    )
