"""How a run starts: from flags and a config file, resumed, extended to a longer horizon, or with another run's weights."""

import argparse
import dataclasses
import json
import os
import sys
from typing import NamedTuple

from nanochat.common import UsageError, human_bytes, human_time, read_json
from nanochat.model.gpt import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.log import RunFolder, provenance, read_lines, status_of
from nanochat.run.plan import HORIZONS, flag, make_plan
from nanochat.run.trackers import new_run_id

# Flags of one start, not of the run: never taken from a run's config.json, and not kept when it is resumed.
OF_THIS_START = (
    "resume",
    "resume_from_step",
    "overwrite",
    "out_dir",
    "model_tag",
    "config",
    "dry_run",
    "json",
    "gpus",
    "gpu",
)
# Flags that a resumed run may change; --data and --val-data to another place of the same text, whose fingerprint is compared.
# All others stay as the run was started: they decide what the model becomes.
FREE_ON_RESUME = {
    *OF_THIS_START,
    "data",
    "val_data",
    "run",
    "tensorboard",
    "device_type",
    "dtype",
    "compile",
    "attention",
    "activation_checkpointing",
    "shard",
    "device_batch_size",
    "eval_every",
    "eval_tokens",
    "core_metric_every",
    "core_metric_max_per_task",
    "core_bundle",
    "sample_every",
    "sample_prompts",
    "save_every",
    "save_every_minutes",
    "keep_last",
    "no_save",
    "stop_at_bpb",
    "patience",
    "max_skipped",
    "debug_nans",
    "profile",
}
MODEL_FLAGS = (
    "depth",
    "aspect_ratio",
    "head_dim",
    "n_kv_head",
    "window_pattern",
    "arch",
    "tie_embeddings",
)


def config_flags(path, known):
    """The command line that a JSON file stands for: a run's config.json, or an object of flag names and values.

    known: {flag name: its argparse action}. Values equal to the default are left out. UsageError for anything else."""
    if os.path.isfile(os.path.join(path, "config.json")):  # a run folder
        path = os.path.join(path, "config.json")
    content = read_json(path, "--config")
    flags = content.get("args") if isinstance(content, dict) and "args" in content else content
    if not isinstance(flags, dict):
        raise UsageError(f"--config={path}: neither a run's config.json nor an object of flags")
    if flags is not content:
        flags = {name: value for name, value in flags.items() if name not in OF_THIS_START}
    flags = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    unknown = [name for name in flags if name not in known or name == "config"]
    if unknown:
        raise UsageError(f"--config={path}: no such flag: {', '.join(map(flag, unknown))}")
    words = []
    for name, value in flags.items():
        if value == known[name].default:
            continue
        if isinstance(known[name].default, bool):
            if not isinstance(value, bool):
                raise UsageError(f"--config={path}: {flag(name)} is {value!r}; give true or false")
            words.append(flag(name) if value else f"--no-{name.replace('_', '-')}")
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            words.append(f"{flag(name)}={value}")
        else:
            raise UsageError(
                f"--config={path}: {flag(name)} is {json.dumps(value)}; give a number or a string"
            )
    return words


def merge_with_run(args, config):
    """The flags to resume a run with: its own, except those given now that may change.

    Returns (args, lines on what changed, True if the horizon did). Raises UsageError for given flags that may not differ."""
    merged, changed, refused = argparse.Namespace(**{**vars(args), **config["args"]}), [], []
    for name in OF_THIS_START:
        setattr(merged, name, getattr(args, name))
    horizon_changed = False
    for name in sorted(args.given & set(config["args"])):
        was, now = getattr(merged, name), getattr(args, name)
        if was != now:
            horizon_changed |= name in HORIZONS
            (changed if name in FREE_ON_RESUME or name in HORIZONS else refused).append(
                f"{flag(name)}={now} (was {was})"
            )
            setattr(merged, name, now)
    if refused:
        raise UsageError(
            "this run was started with other settings, which a resumed run cannot change: "
            + ", ".join(refused)
            + "; leave them out, or start another run with --model-tag"
        )
    if horizon_changed:  # the horizon given now counts, whatever the run had
        for name in HORIZONS[:-1]:
            if name not in args.given:
                setattr(merged, name, -1)
    return merged, changed, horizon_changed


def fit_to_machine(args, config, world_size):
    """Settle the device batch of a run that is resumed. Returns words on what changed with the ranks and with that.

    On as many ranks it stays as it was: what fits may differ from day to day, and with it the last bit. On another number, what was
    given at the first start may not divide the rows of a rank: the largest that does takes its place."""
    was, words = config["runtime"], []
    if world_size != was["world_size"]:
        words.append(f"{world_size} ranks (was {was['world_size']})")
    rows = config["plan"]["rows_per_step"] // world_size
    if not words and args.device_batch_size == -1:
        args.device_batch_size = was["device_batch_size"]
    elif words and args.device_batch_size != -1 and "device_batch_size" not in args.given and rows:
        fits = max(n for n in range(1, min(rows, args.device_batch_size) + 1) if rows % n == 0)
        if fits != args.device_batch_size:
            words.append(f"--device-batch-size={fits} (was {args.device_batch_size})")
        args.device_batch_size = fits
    if args.dropout and (words or args.device_batch_size != was["device_batch_size"]):
        words.append(
            "dropout is drawn by rank and micro-batch, so that losses will differ as those of two seeds do"
        )
    return words


def default_tag(args):
    """The run folder's name where --model-tag names none: by the depth, which --init-from takes over from its source."""
    if args.init_from and "depth" not in args.given:
        return f"d{source_of_weights(args).flags['depth']}"
    return f"d{args.depth}"


def open_run(args, folder):
    """(the step to resume from or None, the config of the run to go on with or None). Refuses what wanted_step() does.

    A folder that holds a run is claimed before anything in it is looked at: a process that is still ending there would save,
    and remove the very checkpoint that was chosen. A new one is made late, when nothing is left to refuse (take_folder)."""
    resuming = args.resume or args.resume_from_step != -1
    if folder.holds_run() and (resuming or args.overwrite):
        if resuming and "imported_from" in folder.read_config():
            raise UsageError(
                f"--resume: the run folder {args.model_tag} holds imported weights and no training to go on with; start a run "
                f"from them: --init-from={args.out_dir}/{args.model_tag} --model-tag=NAME"
            )
        folder.claim()
    step = wanted_step(args, folder)
    return step, folder.read_config() if resuming and folder.lock is not None else None


def take_folder(folder, step):
    """Look a last time before anything in the run folder changes, and claim it if it held no run until now. step: to resume from.

    UsageError if another process has begun a run there meanwhile, or if the checkpoint is not there any more."""
    if folder.lock is None:
        folder.claim()
        if folder.holds_run():
            raise UsageError(
                f"--model-tag: {folder.path} already holds a run, which another process began while this one read its data; "
                f"add --resume to go on with it, or give another --model-tag"
            )
    if step and (problem := checkpoint.damage(folder.path, step, hashes=False)):
        raise UsageError(
            f"--resume: {checkpoint.folder_of(folder.path, step)} was intact when this process began, and is not any more "
            f"({problem}); start again to go on from another"
        )
    checkpoint.sweep(folder.path)


def wanted_step(args, folder):
    """The step to resume from, or None to start fresh. Refuses a folder whose run would be lost or silently continued."""
    if not folder.holds_run():
        if (left := folder.remains()) and not args.overwrite:
            raise UsageError(
                f"--model-tag={args.model_tag}: {folder.path} holds {', '.join(left)} but no config.json of a run; restore "
                f"that file, give another --model-tag, or --overwrite to delete them"
            )
        if args.resume_from_step != -1:
            raise UsageError(
                f"--resume-from-step={args.resume_from_step}: {folder.path} holds no run; check --out-dir and --model-tag"
            )
        return None
    steps = checkpoint.steps_of(folder.path)
    if args.resume_from_step != -1:
        if args.resume_from_step not in steps:
            raise UsageError(
                f"--resume-from-step={args.resume_from_step}: no such checkpoint in {folder.path} "
                f"(it has: {', '.join(map(str, steps)) or 'none'})"
            )
        if problem := checkpoint.damage(folder.path, args.resume_from_step):
            raise UsageError(
                f"--resume-from-step={args.resume_from_step}: that checkpoint is damaged ({problem}); choose another"
            )
        if steps[-1] > args.resume_from_step and not args.overwrite:
            raise UsageError(
                f"--resume-from-step={args.resume_from_step}: {folder.path} has later checkpoints (up to {steps[-1]}), "
                f"which going on from there would replace; add --overwrite if that is meant"
            )
        return args.resume_from_step
    if args.resume:
        if not steps and (
            left := sorted(path.name for path in (folder.path / "checkpoints").glob("step_*"))
        ):
            raise UsageError(
                f"--resume: {folder.path}/checkpoints holds {', '.join(left)}, none with the manifest.json that makes it a "
                f"checkpoint; restore one, or start again with --overwrite"
            )
        step = checkpoint.newest_intact(
            folder.path, report=lambda text: print(text, file=sys.stderr)
        )
        if step is None and steps:
            raise UsageError(
                f"--resume: no checkpoint in {folder.path} is intact; restore one, or start again with --overwrite"
            )
        return step
    if not args.overwrite:
        raise UsageError(
            f"--model-tag={args.model_tag}: {folder.path} already holds a run ({len(steps)} checkpoints"
            + (f", the newest at step {steps[-1]}" if steps else "")
            + "); add --resume to go on with it, "
            "--model-tag=NAME to start another beside it, or --overwrite to delete it and start again"
        )
    return None


def first_config(
    args, plan, model_config, corpus, tokens_per_epoch, compressed_bpb, tokenizer, source
):
    """config.json of a new run, as far as it does not depend on the machine. source: of --init-from, or None."""
    config = {
        "args": {k: v for k, v in vars(args).items() if k != "given"},
        "plan": plan.as_dict(),
        "model": vars(model_config),
        "seed": args.seed,
        "data": {
            "name": corpus.name,
            "revision": corpus.revision,
            "fingerprint": corpus.fingerprint,
            "train_bytes": corpus.train_bytes,
            "note": corpus.note,
            "tokens_per_epoch": tokens_per_epoch,
            "compressed_bpb": compressed_bpb,
        },
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        **provenance(),
    }
    return config | ({"init_from": {"run": args.init_from, "step": source.step}} if source else {})


def renew_config(config, args, plan, start_step, steps_before, left_its_curve):
    """Change the config of a run where this start of it differs from earlier ones. plan: the new one where the run was extended from
    steps_before steps (None where it was not). left_its_curve: it goes on from before what it has drawn already."""
    # the same text may have moved, and a rule for an early end that was changed counts from now on
    config["args"] |= {
        name: getattr(args, name) for name in ("data", "val_data", "stop_at_bpb", "patience")
    }
    if steps_before is not None:
        config["args"] |= {name: getattr(args, name) for name in HORIZONS}
        config["plan"] = plan.as_dict()
        config["extended"] = [
            *config.get("extended", []),
            {"from_step": start_step, "steps_before": steps_before},
        ]
    # there W&B gets a new curve
    if steps_before is not None or left_its_curve or "wandb_id" not in config:
        config["wandb_id"] = new_run_id()


def last_words(args, folder, step, state, completed, failure, peak_memory_bytes):
    """What a run says at its end: what came of it, and what is saved where."""
    newest = checkpoint.newest_in_words(folder.path)
    saved = newest or "nothing was saved" + (" (--no-save)" if args.no_save else " yet")
    if completed:
        bpb = f"val_bpb {state['val_bpb']:.4f}, " if state["val_bpb"] is not None else ""
        core = f"CORE {state['core_metric']:.4f}, " if state["core_metric"] is not None else ""
        return (
            f"completed {step} steps in {human_time(state['training_seconds'])} of training: {bpb}{core}"
            f"peak memory {human_bytes(peak_memory_bytes)}; {saved}; run folder: {folder.path}"
        )
    return f"stopped at step {step}: {failure.rstrip('.') or 'as asked'}; {saved}" + (
        f"; add --resume to go on: {folder.path}" if newest else ""
    )


def is_over(args, config, folder, start_step):
    """Why there is nothing to resume, or None: the run's last checkpoint is its final one, and no rule for an early end
    was changed now."""
    if any(
        getattr(args, name) != config["args"].get(name, -1) for name in ("stop_at_bpb", "patience")
    ):
        return None
    if start_step is None or checkpoint.kind_of(folder.path, start_step) != "final":
        return None
    if (
        status_of(folder.path) != "completed"
    ):  # killed after the last save: evaluation and samples are still to come
        return None
    reason = read_json(folder.path / "summary.json", "run folder").get("reason")
    remedy = (
        "; nothing to resume. To go on, change that rule: --stop-at-bpb=-1 --patience=-1 lift both"
        if reason
        else "; nothing to resume. A longer horizon, for example a larger --num-iterations, extends it"
    )
    return (
        f"{folder.path} is complete at step {start_step}"
        + (f" ({reason})" if reason else "")
        + remedy
    )


def extend(args, plan, config, tokens_per_epoch, peak_flops, world_size, folder, start_step):
    """Give a run the longer horizon of args: changes `plan` in place, returns the step of the checkpoint to go on from.

    That is the newest intact one at which the learning rate had not begun to fall, neither in the old schedule nor in the
    new; batch, rates and decay stay as they were derived. Raises UsageError for a horizon that is not longer, or a run
    that has no such checkpoint."""
    if plan.num_iterations is None:
        raise UsageError(
            "the number of steps of this run's time budget is not measured yet; resume it once without changing the horizon"
        )
    if args.lr_schedule == "cosine":
        raise UsageError(
            f"{folder.path}: a cosine schedule falls from the start and cannot be extended; start another run with "
            f"--init-from={folder.path}"
        )
    fresh = make_plan(
        argparse.Namespace(**{**vars(args), "total_batch_size": plan.total_batch_tokens}),
        config,
        tokens_per_epoch,
        peak_flops,
        world_size,
    )
    named = f"{flag(fresh.horizon)}={getattr(args, fresh.horizon)}"
    spent = max(
        (line["total_training_time"] for line in read_lines(folder.path / "metrics.jsonl")),
        default=0.0,
    )
    if fresh.num_iterations is None and 60 * args.target_minutes <= spent:
        raise UsageError(
            f"{named}: not longer than the {spent / 60:.1f} minutes that this run has trained; give more"
        )
    if fresh.num_iterations is not None and fresh.num_iterations <= plan.num_iterations:
        raise UsageError(
            f"{named}: {fresh.num_iterations} steps, and this run has {plan.num_iterations}; give a longer horizon, or "
            f"start another run with --model-tag"
        )
    falls_at = plan.num_iterations - plan.warmdown_steps
    if fresh.num_iterations is not None:
        falls_at = min(falls_at, fresh.num_iterations - fresh.warmdown_steps)
    usable = [
        step
        for step in checkpoint.steps_of(folder.path)
        if step <= min(falls_at, start_step) and checkpoint.damage(folder.path, step) is None
    ]
    if not usable and start_step:
        raise UsageError(
            f"{named}: this run has no intact checkpoint from before step {falls_at}, where its learning rate begins to "
            f"fall, so it cannot be extended; start another run with --init-from={folder.path}"
        )
    plan.horizon, warmup_steps = fresh.horizon, plan.warmup_steps
    if fresh.num_iterations is None:
        plan.num_iterations, plan.tokens = None, fresh.tokens
    else:
        plan.fix_steps(fresh.num_iterations, args)
    plan.warmup_steps = warmup_steps
    return usable[-1] if usable else 0


class Source(NamedTuple):
    """What --init-from starts from: the model to build, the step whose weights it takes, the tokenizer's folder, and the
    values that the flags of the shape take over from that run."""

    model: GPTConfig
    step: int
    tokenizer: str
    flags: dict


def source_of_weights(args, own=None, step=None):
    """The Source that --init-from names. own: the RunFolder of this run, which cannot be its own source. step: of the
    weights that this run began with, if it began before; None for the newest intact ones.

    The shape is the source's; context (if given), short window and dropout may be new. UsageError for flags of the shape that were
    given and differ, and for weights that are not there or damaged."""
    folder, named = RunFolder(args.init_from), f"--init-from={args.init_from}"
    if (folder.path / "generation_config.json").exists():
        raise UsageError(
            f"{named}: a Hugging Face folder; make it a run first: nanochat export {args.init_from} --format run NEW"
        )
    if not folder.holds_run():
        raise UsageError(f"{named}: not a run folder (it has no config.json of a run)")
    if own and own.path.resolve() == folder.path.resolve():
        raise UsageError(
            f"{named}: that is this run's own folder; give the new run another --model-tag, or --resume the old one"
        )
    config = folder.read_config()
    if step is None:
        step = checkpoint.newest_intact(
            folder.path, report=lambda text: print(text, file=sys.stderr)
        )
        if step is None:
            raise UsageError(f"{named}: that run has no intact checkpoint")
    elif problem := checkpoint.damage(folder.path, step):
        raise UsageError(
            f"{named}: this run began with the weights of step {step}, which cannot be read any more ({problem}); restore "
            f"them, or start again with --overwrite"
        )
    model = checkpoint.model_config(folder.path, step)
    of_source = {name: config["args"][name] for name in MODEL_FLAGS if name in config["args"]}
    fixed = {**of_source, "vocab_size": model.vocab_size}
    differing = [
        name
        for name in fixed
        if name in args.given and getattr(args, name) not in (fixed[name], -1)
    ]
    if differing:
        raise UsageError(
            f"{named}: its model has "
            + ", ".join(f"{flag(n)}={fixed[n]}" for n in differing)
            + "; leave these flags out"
        )
    T = args.max_seq_len if "max_seq_len" in args.given else model.max_seq_len
    short_window = max(1, T // 2) if args.short_window == -1 else args.short_window
    model = dataclasses.replace(
        model, max_seq_len=T, short_window=short_window, dropout=args.dropout
    )
    return Source(model, step, str(folder.path / "tokenizer"), {**of_source, "max_seq_len": T})
