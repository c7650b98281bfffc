"""How a run starts: new, resumed, extended to a longer horizon, from another run's weights, or
refused."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat import ranks
from nanochat.common import UsageError, counted, read_json, sha256_file, valid_unicode
from nanochat.data.tokenizer import Tokenizer
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.checks import core_metric_flags
from nanochat.run.flags import FIXED, FLAGS, FREE, HORIZONS, START, flag
from nanochat.run.folder import RunFolder, provenance, saved_step, status_of, weights_alone
from nanochat.run.metrics import Record, read_lines
from nanochat.run.plan import Plan, short_window
from nanochat.run.state import Scores, TrainState
from nanochat.run.trackers import new_run_id

# Flags whose new value a resumed run writes into config.json: the same text may have moved, and
# what decides the result (a rule for an early end, the text that is scored) counts from now on.
# With no_save, folder.py knows whether there must be a checkpoint.
DECIDING = [name for name, row in FLAGS.items() if row.on_resume == FREE and row.decides]
RECORDED_ON_RESUME = ("data", "val_data", "no_save", *DECIDING)
# A URL of --notify may hold a secret.
NOT_RECORDED = ("given", "notify")
Config = dict[str, Any]  # the content of a config.json


@dataclass
class OpenedRun:
    """A run about to start. args are final: a resumed run's own flags, as far as they may not
    change now.

    step: to resume from, 0 for a new run. config: of the run that is resumed, else None. changed:
    words on what differs from the start before. extending: the horizon differs. source: of
    --init-from, for a run that begins. over: why there is nothing to resume, or ""."""

    args: argparse.Namespace
    folder: RunFolder
    step: int = 0
    config: Config | None = None
    changed: list[str] = field(default_factory=list)
    extending: bool = False
    source: "Source | None" = None
    over: str = ""
    saved_state: dict[str, Any] = field(default_factory=dict)
    extended_from: int | None = None
    # flags that `nanochat jobs set` changed at a later step than the one to resume from
    changes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    @property
    def saved_prompts(self) -> list[str]:
        """The prompts of the run's samples so far; [] for a new run, or if --sample-prompts is
        given now."""
        if self.config is None or "sample_prompts" in self.args.given:
            return []
        # Runs saved by earlier versions lack this field.
        return self.config.get("prompts", [])

    def take_over_changes(self) -> None:
        """Let the flags have the values that `nanochat jobs set` gave them before the step to
        resume from, and note those that it gave later. A flag that is given now keeps its value."""
        changes = self.config.get("changes", []) if self.config else []
        for at, values in sorted(changes, key=lambda change: change[0]):
            values = {n: value for n, value in values.items() if n not in self.args.given}
            if at < self.step:
                vars(self.args).update(values)
            elif values:
                self.changes.append((at, values))

    def changes_at(self, step: int) -> list[dict[str, Any]]:
        """The changes of flags that the run had at a step, before it was resumed from before it."""
        return [values for at, values in self.changes if at == step]

    def go_back_to(self, step: int) -> None:
        """Resume from this step, and read its state."""
        self.step = step
        self.saved_state = checkpoint.read_state(self.folder.path, step) if step else {}


def open_run(args: argparse.Namespace, device_type: str) -> OpenedRun:
    """Open the run that the flags name; every rank calls it. args: checked, from flags.parse().

    UsageError for whatever would lose a run or continue another one silently."""
    # Rank 0 decides: --init-from may be on a disk that only it sees in time.
    tag = args.model_tag or ranks.from_rank0_or_raise(lambda: default_tag(args))
    args.model_tag = tag
    folder = RunFolder(os.path.join(args.out_dir, tag))
    step, config = ranks.from_rank0_or_raise(lambda: claim_run(args, folder))
    _refuse_unseen(folder, step)
    run = OpenedRun(args, folder, step or 0, config)
    if config and "command" in config:
        raise UsageError(
            f"--resume: {folder.path} was made by nanochat {config['command']}; resume it with that"
        )
    # From here on run.args are the run's own flags, as far as they may not change.
    if config:
        run.args, run.changed, run.extending = merge_with_run(args, config)
        run.over = is_over(run.args, config, folder, step)
        if run.over and not run.extending:
            return run
        run.over = ""
        run.changed += fit_to_machine(run.args, config, ranks.world_size())
    elif args.resume:
        ranks.print0(f"{folder.path} holds no run yet: starting a new one")
    args = run.args
    if args.init_from and not run.step:
        # A run that was stopped before its first checkpoint begins again with the very same
        # weights.
        began_with = config["init_from"]["step"] if config else None
        run.source = ranks.from_rank0_or_raise(lambda: source_of_weights(args, folder, began_with))
        vars(args).update(run.source.flags)
    args.core_metric_every, args.core_metric_max_per_task = core_metric_flags(args, device_type)
    run.go_back_to(run.step)
    return run


def values_in_force(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the flags with the values that will count, for check_flags(): a resumed run's own
    flags and batch, or the shape and context of --init-from, as far as they are not given.

    Only config.json is read. A folder that cannot be used changes nothing here: open_run() reports
    it."""
    found = {}
    source = _config_in(args.init_from) if args.init_from else None
    if source and {"args", "model"} <= set(source):
        shape = [name for name, row in FLAGS.items() if row.shapes_model]
        found = {name: source["args"][name] for name in shape if name in source["args"]}
        found["max_seq_len"] = source["model"]["max_seq_len"]
    if args.resume or args.resume_from_step != -1:
        depth = args.depth if "depth" in args.given else found.get("depth", args.depth)
        resumed = _config_in(os.path.join(args.out_dir, args.model_tag or f"d{depth}"))
        # a run of imported weights has no plan, and is not resumed
        if resumed and "plan" in resumed:
            found = {
                name: value
                for name, value in resumed["args"].items()
                if name in FLAGS and FLAGS[name].on_resume != START
            }
            found["max_seq_len"] = resumed["model"]["max_seq_len"]
            found["total_batch_size"] = resumed["plan"]["total_batch_tokens"]
            # fit_to_machine() settles it
            found["device_batch_size"] = -1
    kept = {name: value for name, value in found.items() if name not in args.given}
    return argparse.Namespace(**{**vars(args), **kept})


def _config_in(path: str) -> Config | None:
    """The config.json of a run folder; None if there is no such run."""
    folder = RunFolder(path)
    try:
        return folder.read_config() if folder.holds_run() else None
    except UsageError:
        return None


def default_tag(args: argparse.Namespace) -> str:
    """The run folder's name without --model-tag: by the depth, which --init-from takes over from
    its source."""
    depth = args.depth
    if args.init_from and "depth" not in args.given:
        depth = source_of_weights(args).flags["depth"]
    return f"d{depth}"


# ----- which run, and from which step


def claim_run(args: argparse.Namespace, folder: RunFolder) -> tuple[int | None, Config | None]:
    """(the step to resume from or None, the config of the run to continue or None). Refuses what
    wanted_step() does.

    A folder that holds a run is claimed before anything in it is looked at: a process that is still
    ending there would save, and remove the very checkpoint that was chosen. A new one is created
    late, when nothing is left to refuse (take_folder)."""
    resuming = args.resume or args.resume_from_step != -1
    _refuse_unusable_path(folder)
    if folder.holds_run() and (resuming or args.overwrite):
        if resuming and (held := weights_alone(folder.read_config())):
            raise UsageError(
                f"--resume: the run folder {args.model_tag} holds {held} and no training to "
                "continue; start a run from them: "
                f"--init-from={args.out_dir}/{args.model_tag} --model-tag=NAME"
            )
        folder.claim()
    step = wanted_step(args, folder)
    # The lock is held exactly where the folder holds a run that was claimed.
    continues = resuming and folder.lock is not None
    return step, folder.read_config() if continues else None


def _refuse_unusable_path(folder: RunFolder) -> None:
    """Raise UsageError for a run folder in which checkpoints could not be written, or would be
    missed: links that lead nowhere, as when a disk is not mounted, and impossible names."""
    try:
        str(folder.path).encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(
            f"--out-dir, --model-tag: {valid_unicode(str(folder.path))} holds bytes that are not "
            "UTF-8, a name with which checkpoints cannot be written; give another name"
        ) from None
    try:
        os.lstat(folder.path)
    # what does not exist can be created
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(
            f"--out-dir, --model-tag: a run folder of that name cannot exist ({error.strerror}); "
            "give another name"
        ) from None
    parts = [folder.path, *folder.path.parents]
    for path in (*parts, *sorted(folder.path.glob("*"))):
        if path.is_symlink() and not path.exists():
            raise UsageError(
                f"--model-tag: {path} is a link to {os.readlink(path)}, which does not exist; "
                "mount that disk, or remove the link"
            )


def take_folder(folder: RunFolder, step: int) -> None:
    """Look a last time before anything in the run folder changes, and claim it if it held no run
    until now. step: to resume from.

    UsageError if another process has begun a run there meanwhile, or if the checkpoint is gone."""
    if folder.lock is None:
        folder.claim()
        if folder.holds_run():
            raise UsageError(
                f"--model-tag: {folder.path} already holds a run that another process began while "
                "this one read its data; add --resume to continue it, or give another --model-tag"
            )
    if step and (problem := checkpoint.damage(folder.path, step, hashes=False)):
        raise UsageError(
            f"--resume: {checkpoint.folder_of(folder.path, step)} was intact when this process "
            f"began, and no longer is ({problem}); start again to resume from another checkpoint"
        )
    checkpoint.sweep(folder.path)


def wanted_step(args: argparse.Namespace, folder: RunFolder) -> int | None:
    """The step to resume from, or None to start fresh. Refuses a folder whose run would be lost or
    silently continued."""
    if not folder.holds_run():
        _refuse_remains(args, folder)
        return None
    steps = checkpoint.steps_of(folder.path)
    if args.resume_from_step != -1:
        return _given_step(args, folder, steps)
    if args.resume:
        return _newest_step(folder, steps)
    if args.overwrite:
        return None
    checkpoints = f"{len(steps)} checkpoints"
    if steps:
        checkpoints += f", the newest at step {steps[-1]}"
    raise UsageError(
        f"--model-tag={args.model_tag}: {folder.path} already holds a run ({checkpoints}); add "
        "--resume to continue it, --model-tag=NAME to start another run, or --overwrite to delete "
        "it and start again"
    )


def _refuse_remains(args: argparse.Namespace, folder: RunFolder) -> None:
    """Raise UsageError for a folder without a run's config.json that holds a run's other files, or
    that is to be resumed from a step."""
    left = folder.remains()
    if left and not args.overwrite:
        raise UsageError(
            f"--model-tag={args.model_tag}: {folder.path} holds {', '.join(left)} but no "
            "config.json of a run; restore that file, give another --model-tag, or add --overwrite "
            "to delete them"
        )
    if args.resume_from_step != -1:
        raise UsageError(
            f"--resume-from-step={args.resume_from_step}: {folder.path} holds no run; check "
            "--out-dir and --model-tag"
        )


def _given_step(args: argparse.Namespace, folder: RunFolder, steps: Sequence[int]) -> int:
    """--resume-from-step, if its checkpoint can be used."""
    step = args.resume_from_step
    named = f"--resume-from-step={step}"
    if step not in steps:
        existing = ", ".join(map(str, steps)) or "none"
        raise UsageError(f"{named}: no such checkpoint in {folder.path} (it has: {existing})")
    if problem := checkpoint.damage(folder.path, step):
        raise UsageError(f"{named}: that checkpoint is damaged ({problem}); choose another")
    if steps[-1] > step and not args.overwrite:
        raise UsageError(
            f"{named}: {folder.path} has later checkpoints (up to {steps[-1]}), which resuming "
            "from there would replace; add --overwrite if that is meant"
        )
    return step


def _newest_step(folder: RunFolder, steps: Sequence[int]) -> int | None:
    """The newest intact checkpoint, None if the run has none yet."""
    unfinished = sorted(path.name for path in (folder.path / "checkpoints").glob("step_*"))
    if not steps and unfinished:
        raise UsageError(
            f"--resume: {folder.path}/checkpoints holds {', '.join(unfinished)}, none with the "
            "manifest.json that makes it a checkpoint; restore one, or start again with --overwrite"
        )
    step = checkpoint.newest_intact(folder.path, report=_warn)
    if step is None and steps:
        raise UsageError(
            f"--resume: no checkpoint in {folder.path} is intact; restore one, or start again with "
            "--overwrite"
        )
    if step is None and (known := saved_step(folder.path)) is not None:
        raise UsageError(
            f"--resume: {folder.path} had a checkpoint at step {known}, and its folder checkpoints "
            "is empty or missing now; restore it (is the disk mounted?), or start again with "
            "--overwrite"
        )
    return step


def _refuse_unseen(folder: RunFolder, step: int | None) -> None:
    """UsageError on every rank if one of them does not see the checkpoint to resume from as rank 0
    does: all of them read it."""
    if step is None:
        return
    manifest = checkpoint.folder_of(folder.path, step) / "manifest.json"
    # it has the hashes of all other files
    seen = ranks.from_all(sha256_file(manifest) if manifest.exists() else "")
    blind = [rank for rank, found in enumerate(seen) if found != seen[0]]
    if blind:
        raise UsageError(
            f"--resume: {counted(len(blind), 'rank')}, the first of them rank {blind[0]}, cannot "
            f"read the checkpoint of step {step} that rank 0 has in {folder.path}; give an "
            f"--out-dir that all machines share, or copy that folder to the same place on each"
        )


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


# ----- with which flags


def merge_with_run(
    args: argparse.Namespace, config: Config
) -> tuple[argparse.Namespace, list[str], bool]:
    """The flags to resume a run with: its own, except those given now that may change.

    Returns (args, words on what changed, True if the horizon did). UsageError for given flags that
    a resumed run may not change."""
    merged = argparse.Namespace(**{**vars(args), **config["args"]})
    # What belongs to this start of the program does not come from the run.
    for name, row in FLAGS.items():
        if row.on_resume == START:
            setattr(merged, name, getattr(args, name))
    changed, refused = [], []
    if config["args"].get("no_save") and not merged.no_save:
        changed.append("checkpoints are saved (was --no-save)")
    # a run that was landed ended before its horizon, which extends it when it is given again
    was_landed = bool(config["plan"].get("landings"))
    horizon_changed = was_landed and not args.given.isdisjoint(HORIZONS)
    for name in sorted(args.given & set(config["args"])):
        was = getattr(merged, name)
        now = getattr(args, name)
        if was == now:
            continue
        setattr(merged, name, now)
        horizon_changed |= name in HORIZONS
        words = f"{flag(name)}={now} (was {was})"
        if FLAGS[name].on_resume == FIXED:
            refused.append(words)
        else:
            changed.append(words)
    if refused:
        raise UsageError(
            "this run was started with other settings, which a resumed run cannot change: "
            f"{', '.join(refused)}; leave them out, or start another run with --model-tag"
        )
    if horizon_changed:
        # the horizon given now counts, whatever the run had
        for name in HORIZONS[:-1]:
            if name not in args.given:
                setattr(merged, name, -1)
    return merged, changed, horizon_changed


def fit_to_machine(args: argparse.Namespace, config: Config, world_size: int) -> list[str]:
    """Settle the device batch of a run that is resumed, in args. Returns words on what changed with
    the number of ranks.

    On as many ranks it stays as it was: what fits may differ from day to day, and with it the last
    bit. On another number, the value given at the first start may not divide the rows of a rank:
    the largest that does takes its place."""
    was = config["runtime"]
    words = []
    if world_size != was["world_size"]:
        words.append(f"{world_size} ranks (was {was['world_size']})")
    # The batch is frozen; only how it is dealt out may follow the machine.
    rows = config["plan"]["rows_per_step"] // world_size
    given = args.device_batch_size
    if not words and given == -1:
        args.device_batch_size = was["device_batch_size"]
    elif words and given != -1 and "device_batch_size" not in args.given and rows:
        fits = max(n for n in range(1, min(rows, given) + 1) if rows % n == 0)
        if fits != given:
            words.append(f"--device-batch-size={fits} (was {given})")
        args.device_batch_size = fits
    if args.dropout and (words or args.device_batch_size != was["device_batch_size"]):
        words.append(
            "dropout is drawn by rank and micro-batch, so losses will differ as those of two seeds "
            "do"
        )
    return words


def is_over(args: argparse.Namespace, config: Config, folder: RunFolder, step: int | None) -> str:
    """Why there is nothing to resume, or "": the run's last checkpoint is its final one, and no
    rule for an early end has changed now."""
    for name in ("stop_at_bpb", "patience"):
        if getattr(args, name) != config["args"].get(name, -1):
            return ""
    if step is None or checkpoint.kind_of(folder.path, step) != "final":
        return ""
    # killed after the last save: evaluation and samples are still to come
    if status_of(folder.path) != "completed":
        return ""
    reason = read_json(folder.path / "summary.json", "run folder").get("reason")
    words = f"{folder.path} is complete at step {step}"
    # a rule that was met by the very last evaluation did not end the run
    if reason and step != config["plan"]["num_iterations"]:
        return (
            f"{words} ({reason}); nothing to resume. To continue, change that rule: "
            "--stop-at-bpb=-1 --patience=-1 lift both"
        )
    return (
        f"{words}; nothing to resume. A longer horizon, for example a larger --num-iterations, "
        "extends it"
    )


def extend(run: OpenedRun, plan: Plan, fresh: Plan) -> None:
    """Give a run a longer horizon: changes `plan` in place, and the step to resume from.

    fresh: the plan of the flags given now, at the run's batch. The run resumes from the newest
    intact checkpoint at which the learning rate had not begun to fall, neither in the old schedule
    nor in the new; batch, rates and decay stay as they were derived. UsageError for a horizon that
    is not longer, or a run that has no such checkpoint."""
    folder = run.folder
    was = plan.num_iterations
    if was is None:
        raise UsageError(
            "the number of steps of this run's time budget has not been measured yet; resume it "
            "once without changing the horizon"
        )
    if run.args.lr_schedule == "cosine":
        raise UsageError(
            f"{folder.path}: a cosine schedule falls from the start and cannot be extended; start "
            f"another run with --init-from={folder.path}"
        )
    named = f"{flag(fresh.horizon)}={fresh.horizon_value}"
    _refuse_shorter(named, folder, was, fresh)
    # Weights from after that point have been trained at falling rates, which a longer run has not.
    falls_at = was if plan.warmdown_begins is None else plan.warmdown_begins
    if fresh.num_iterations is not None:
        falls_at = min(falls_at, fresh.num_iterations - fresh.warmdown_steps)
    usable = [
        step
        for step in checkpoint.steps_of(folder.path)
        if step <= min(falls_at, run.step) and checkpoint.damage(folder.path, step) is None
    ]
    if not usable and run.step:
        raise UsageError(
            f"{named}: this run has no intact checkpoint from before step {falls_at}, where its "
            "learning rate begins to fall, so it cannot be extended; start another run with "
            f"--init-from={folder.path}"
        )
    plan.horizon = fresh.horizon
    plan.horizon_value = fresh.horizon_value
    # fix_steps() would derive it from the new length.
    warmup_steps = plan.warmup_steps
    if fresh.num_iterations is None:
        plan.num_iterations = plan.scheduled_steps = None
        plan.corrections = []
        plan.landings = []
        plan.tokens = fresh.tokens
        run.changed.append(
            f"{was} steps to as many as fit into --target-minutes={fresh.horizon_value}"
        )
    else:
        plan.fix_steps(fresh.num_iterations)
        run.changed.append(f"extended from {was} to {plan.num_iterations} steps")
    # the run keeps the warm-up that it began with
    plan.warmup_steps = warmup_steps
    run.extended_from = was
    run.go_back_to(usable[-1] if usable else 0)


def _refuse_shorter(named: str, folder: RunFolder, steps: int, fresh: Plan) -> None:
    """Raise UsageError unless the fresh plan is longer than the run, which has so many steps."""
    if fresh.num_iterations is None:
        # From the metrics, which know of steps after the last checkpoint too.
        times = [line["total_training_time"] for line in read_lines(folder.path / "metrics.jsonl")]
        spent = max(times, default=0.0)
        if fresh.budget_seconds <= spent:
            raise UsageError(
                f"{named}: not longer than the {spent / 60:.1f} minutes that this run has trained; "
                "give more"
            )
    elif fresh.num_iterations <= steps:
        raise UsageError(
            f"{named}: {fresh.num_iterations} steps, and this run has {steps}; give a longer "
            "horizon, or start another run with --model-tag"
        )


# ----- what is written into the folder before the first step


def prepare_folder(
    run: OpenedRun,
    *,
    plan: Plan,
    model_config: GPTConfig,
    data: dict[str, Any],
    tokenizer: Tokenizer,
    machine: Callable[[], dict[str, Any]],
    prompts: list[str],
    records: Sequence[Record],
) -> float | None:
    """Write the tokenizer and config.json, set later checkpoints aside and cut the records, so that
    training can begin at run.step. Rank 0 only.

    data: facts about the text. machine(): entries of config.json on what computes how. prompts: of
    the samples. Returns the validation bits per byte of the best checkpoint, if it is known. The
    config is then run.config."""
    folder = run.folder
    if run.config is None:
        if run.args.overwrite:
            folder.clear()
        tokenizer.save(folder.path / "tokenizer")
        run.config = {
            "args": {n: value for n, value in vars(run.args).items() if n not in NOT_RECORDED},
            "plan": plan.as_dict(),
            "model": vars(model_config),
            "seed": run.args.seed,
            "data": data,
            "tokenizer": {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            },
            **provenance(),
        }
        if run.source:
            origin = {"run": run.args.init_from, "step": run.source.step}
            run.config["init_from"] = origin
        run.config |= machine()
    elif run.config["data"]["fingerprint"] is None:
        # a fork with another text than its parent, at its first start
        run.config["data"] |= data
    # before the new plan of an extended run, which they are not part of
    aside = checkpoint.set_aside_after(folder.path, run.step, ranks.print0)
    # from a line that may be cut below
    best_bpb = records[0].value_at(checkpoint.best_step(folder.path), "val/bpb")
    _renew_config(run, plan, left_its_curve=bool(aside) and run.args.resume_from_step != -1)
    # Those of a file are kept, since it may be moved before the run is resumed.
    if prompts:
        run.config["prompts"] = prompts
    folder.write_config(run.config)
    for record in records:
        record.keep_before(run.step)
    return best_bpb


def _renew_config(run: OpenedRun, plan: Plan, left_its_curve: bool) -> None:
    """Change the config where this start of the run differs from earlier ones. left_its_curve: it
    continues from before what it has drawn already."""
    config = run.config
    # All other flags stay as they were at the first start: config.json tells how the run began.
    config["args"] |= {name: getattr(run.args, name) for name in RECORDED_ON_RESUME}
    if "changes" in config:
        recorded = run.args.given.intersection(DECIDING)
        config["changes"] = [
            [at, {name: value for name, value in values.items() if name not in recorded}]
            for at, values in config["changes"]
        ]
    is_extended = run.extended_from is not None
    if is_extended:
        config["args"] |= {name: getattr(run.args, name) for name in HORIZONS}
        config["plan"] = plan.as_dict()
        extension = {"from_step": run.step, "steps_before": run.extended_from}
        config["extended"] = [*config.get("extended", []), extension]
    # there W&B gets a new curve
    if is_extended or left_its_curve or "wandb_id" not in config:
        config["wandb_id"] = new_run_id()


def saved_scores(run: OpenedRun) -> Scores:
    """The scores that the run had at the step it resumes from."""
    lines = read_lines(run.folder.path / "metrics.jsonl")
    return Scores.from_lines(line for line in lines if line["step"] < run.step)


def saved_train_state(run: OpenedRun, tokenizer: Tokenizer) -> TrainState:
    """The state that the run had at the step it resumes from."""
    return TrainState.from_saved(run.saved_state, run.step, tokenizer.fingerprint)


# ----- another run's weights


@dataclass(frozen=True)
class Source:
    """What --init-from starts from. model: to build. step: whose weights it takes. tokenizer: the
    folder of its tokenizer. flags: the values that the flags of the shape take over from it."""

    model: GPTConfig
    step: int
    tokenizer: Path
    flags: dict[str, Any]


def source_of_weights(
    args: argparse.Namespace, own: RunFolder | None = None, step: int | None = None
) -> Source:
    """The Source that --init-from names. own: the folder of this run, which cannot be its own
    source. step: of the weights that this run began with, if it began before; None for the newest
    intact ones.

    The shape is the source's; context (if given), short window and dropout may be new. UsageError
    for flags of the shape that were given and differ, and for weights that are missing or
    damaged."""
    folder = RunFolder(args.init_from)
    named = f"--init-from={args.init_from}"
    _refuse_source(args, folder, own)
    # Read before the weights, since a newer version's folder is refused by its format.
    config = folder.read_config()
    if step is None:
        step = checkpoint.newest_intact(folder.path, report=_warn)
        if step is None:
            raise UsageError(f"{named}: that run has no intact checkpoint")
    elif problem := checkpoint.damage(folder.path, step):
        raise UsageError(
            f"{named}: this run began with the weights of step {step}, which can no longer be read "
            f"({problem}); restore them, or start again with --overwrite"
        )
    model = checkpoint.model_config(folder.path, step)
    of_source = {
        name: config["args"][name]
        for name, row in FLAGS.items()
        if row.shapes_model and name in config["args"]
    }
    fixed = {**of_source, "vocab_size": model.vocab_size}
    differing = [
        f"{flag(name)}={value}"
        for name, value in fixed.items()
        if name in args.given and getattr(args, name) not in (value, -1)
    ]
    if differing:
        raise UsageError(f"{named}: its model has {', '.join(differing)}; leave these flags out")
    # Rotary positions have no weights, so the context may differ from the source's.
    T = args.max_seq_len if "max_seq_len" in args.given else model.max_seq_len
    model = dataclasses.replace(
        model,
        max_seq_len=T,
        short_window=short_window(args.short_window, T),
        dropout=args.dropout,
    )
    flags = {**of_source, "max_seq_len": T}
    return Source(model, step, folder.path / "tokenizer", flags)


def _refuse_source(args: argparse.Namespace, folder: RunFolder, own: RunFolder | None) -> None:
    """Raise UsageError for a folder that --init-from cannot take weights from."""
    named = f"--init-from={args.init_from}"
    if (folder.path / "generation_config.json").exists():
        raise UsageError(
            f"{named}: a Hugging Face folder; convert it to a run first: nanochat export "
            f"{args.init_from} --format run NEW"
        )
    if not folder.holds_run():
        raise UsageError(f"{named}: not a run folder (it has no config.json of a run)")
    if own and own.path.resolve() == folder.path.resolve():
        raise UsageError(
            f"{named}: that is this run's own folder; give the new run another --model-tag, or "
            "--resume the old one"
        )
