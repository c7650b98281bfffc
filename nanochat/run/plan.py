"""Checks of the flags, and the plan: every derived number of a run, printed before step 0 and frozen in config.json."""

import dataclasses
import glob
import json
import math
import os
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat import hardware, ranks
from nanochat.common import EXIT_COMPLETED, UsageError, human_bytes, human_time, round_up
from nanochat.data.hub import KNOWN
from nanochat.data.sources import estimated_bytes, is_remote
from nanochat.data.tokenizer import (
    EXPECTED_BYTES_PER_TOKEN,
    MIN_BPE_VOCAB,
    TOKENIZER_KINDS,
    expected_vocab_size,
)
from nanochat.model import fp8
from nanochat.model.attention import BACKENDS, pick_backend
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig, width_for
from nanochat.model.loss import pick_loss
from nanochat.optim import schedules
from nanochat.run import memory as fit
from nanochat.run import trackers as track

HORIZONS = (
    "num_iterations",
    "target_flops",
    "target_tokens",
    "target_epochs",
    "target_minutes",
    "target_param_data_ratio",
)
ASSUMED_MFU = 0.4  # of the listed or measured peak, for estimated times
LONG_RUN_SECONDS = 2 * 86400
# What the flags of the contract name and this version does not do yet: refused by name, never ignored.
LATER = {"shard": "sharding the model (FSDP2)"}


def flag(name):
    """The command-line spelling of a parsed name: 'eval_every' -> '--eval-every'."""
    return "--" + name.replace("_", "-")


def check_flags(args):
    """Everything that is wrong with the flags by themselves, as a list of sentences (empty if nothing is).

    args: train.parse_args()'s result; args.given is the set of names that were on the command line."""
    problems = []

    not_finite = {
        name
        for name in args.given
        if isinstance(getattr(args, name), float) and not math.isfinite(getattr(args, name))
    }

    def require(name, holds, reason, remedy):
        value = getattr(args, name)
        if not (holds or name in not_finite):  # of these that is all there is to say
            problems.append(
                f"{flag(name)}{'' if value is True else f'={value}'}: {reason}; {remedy}"
            )

    problems += [
        f"{flag(name)}={getattr(args, name)}: not a finite number; give a number"
        for name in sorted(not_finite)
    ]
    require(
        "model_tag",
        os.path.basename(args.model_tag) == args.model_tag and args.model_tag not in (".", ".."),
        "a path, not a name",
        "give a plain name, and the folder of runs as --out-dir",
    )
    for name, feature in LATER.items():
        value = getattr(args, name)
        if name in args.given and value is not False:
            require(
                name, False, f"{feature} is not available in this version", "leave the flag out"
            )
    known = args.tokenizer in (*TOKENIZER_KINDS, "gpt2") or os.path.isdir(args.tokenizer)
    require(
        "tokenizer",
        known,
        "neither a kind of tokenizer nor a folder",
        f"choose {', '.join(TOKENIZER_KINDS)}, gpt2, a folder with a saved one, or a run folder",
    )
    for name in ("sample_prompts", "val_data", "init_from", "core_bundle"):
        value = getattr(args, name)
        require(
            name,
            not value or os.path.exists(value) or glob.glob(value, recursive=True),
            "no such file or folder",
            "check the path",
        )
    named = args.data == "python" or is_remote(args.data)
    require(
        "data",
        named or os.path.exists(args.data) or glob.glob(args.data, recursive=True),
        "no such file or folder, no file matches it as a pattern, and it names no dataset",
        f"give a path, python, {', '.join(KNOWN)}, or hf:<dataset>",
    )
    require(
        "init_from",
        not args.init_from or not args.resume_from_step != -1,
        "contradicts --resume-from-step",
        "give one of the two",
    )
    llama = args.arch == "llama"
    require(
        "tie_embeddings",
        llama or not args.tie_embeddings,
        "belongs to --arch=llama",
        "add that, or leave it out",
    )
    for name in ("window_pattern", "short_window"):
        require(
            name,
            not llama or name not in args.given or getattr(args, name) in ("L", -1),
            "--arch=llama sees the full context in every layer",
            "leave the flag out",
        )
    for name in ("stop_at_bpb", "patience"):
        require(
            name,
            args.eval_every != -1 or getattr(args, name) == -1,
            "needs evaluations, and --eval-every is -1",
            "give --eval-every",
        )
    require(
        "fp8_recipe",
        args.fp8 or "fp8_recipe" not in args.given,
        "belongs to --fp8",
        "add that, or leave it out",
    )
    require(
        "dtype",
        not args.fp8 or args.dtype in ("auto", "bfloat16"),
        "what --fp8 leaves alone is in bfloat16",
        "leave it out",
    )
    require(
        "fp8",
        not args.fp8 or args.compile or fp8.EMULATE,
        "slower than bfloat16 where it is not compiled",
        "leave --no-compile out",
    )
    require(
        "depth",
        args.depth <= 1000,
        "deeper than any model this program can hold",
        "give at most 1000",
    )
    require(
        "aspect_ratio",
        args.depth * args.aspect_ratio <= 2**17,
        "wider than any model this program can hold",
        "give less",
    )
    require("out_dir", args.out_dir, "empty", "name a folder, or leave the flag out")
    parent = os.path.abspath(args.out_dir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    require(
        "out_dir",
        os.path.isdir(parent) and os.access(parent, os.W_OK),
        f"cannot be written ({parent} is no folder, or not yours)",
        "give another folder",
    )
    unit = (
        args.max_seq_len
        * max(1, args.device_batch_size)
        * (args.gpus if args.dry_run else ranks.world_size())
    )
    if unit > 0 and args.total_batch_size > 0 and args.total_batch_size % unit:
        below = args.total_batch_size // unit * unit
        require(
            "total_batch_size",
            False,
            f"not a multiple of one micro-batch of all ranks, {unit} tokens (--max-seq-len x "
            "--device-batch-size x ranks)",
            "use " + " or ".join(str(n) for n in (below, below + unit) if n),
        )
    # -1 (and for some 0) is the off or auto value; everything else must be positive
    for name in ("depth", "aspect_ratio", "head_dim", "max_seq_len", "max_skipped"):
        require(name, getattr(args, name) >= 1, "must be at least 1", "give a positive number")
    for name in (
        "num_iterations",
        "target_flops",
        "target_tokens",
        "target_epochs",
        "target_minutes",
        "n_kv_head",
        "short_window",
        "vocab_size",
        "device_batch_size",
        "total_batch_size",
        "matrix_lr",
        "eval_every",
        "sample_every",
        "save_every",
        "save_every_minutes",
        "keep_last",
        "eval_tokens",
        "stop_at_bpb",
        "patience",
        "core_metric_every",
        "core_metric_max_per_task",
    ):
        value = getattr(args, name)
        require(
            name,
            value in (-1, "auto") or value > 0,
            "must be positive, or -1 for off or automatic",
            "give one of these",
        )
    for name in ("resume_from_step", "warmup_steps"):
        require(
            name,
            getattr(args, name) >= -1,
            "must be at least 0, or -1 for off or automatic",
            "give one of these",
        )
    for name in ("embedding_lr", "unembedding_lr"):
        require(
            name,
            getattr(args, name) >= 0 or getattr(args, name) == -1,
            "must not be negative",
            "give 0 or more, or -1",
        )
    for name in ("scalar_lr", "weight_decay", "grad_clip"):
        require(name, getattr(args, name) >= 0, "must not be negative", "give 0 or more")
    for name in ("adam_beta1", "adam_beta2", "dropout"):
        require(
            name,
            0 <= getattr(args, name) < 1,
            "must be at least 0 and below 1",
            "give such a number",
        )
    for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
        require(name, 0 <= getattr(args, name) <= 1, "must be between 0 and 1", "give a fraction")
    require(
        "target_param_data_ratio",
        args.target_param_data_ratio > 0,
        "there is no horizon left to train to",
        "give a positive ratio, or another horizon such as --num-iterations",
    )
    require("seed", 0 <= args.seed < 2**63, "must be between 0 and 2^63 - 1", "choose another seed")
    require(
        "window_pattern",
        args.window_pattern and set(args.window_pattern) <= {"S", "L"},
        "holds letters other than S (short window) and L (full context)",
        "write for example SSSL",
    )
    require(
        "attention",
        args.attention in ("auto", *BACKENDS),
        "unknown backend",
        f"choose auto, {' or '.join(BACKENDS)}",
    )
    require(
        "head_dim",
        args.head_dim % 2 == 0,
        "must be even (rotary embeddings turn pairs)",
        "choose an even number",
    )
    require(
        "short_window",
        args.short_window <= args.max_seq_len,
        f"longer than --max-seq-len={args.max_seq_len}",
        "give at most that, or -1 for half of it",
    )
    if args.depth >= 1 and args.aspect_ratio >= 1 and args.head_dim >= 1:
        nominal = args.depth * args.aspect_ratio
        fits = [d for d in (16, 32, 64, 128, 256) if d <= nominal] or [nominal]
        require(
            "head_dim",
            args.head_dim <= nominal,
            f"larger than depth x aspect ratio = {args.depth} x {args.aspect_ratio} = {nominal}",
            f"choose a head dim of {' or '.join(map(str, fits[-2:]))}, or a depth of {math.ceil(args.head_dim / args.aspect_ratio)}",
        )
        heads = width_for(args.depth, args.aspect_ratio, args.head_dim) // args.head_dim
        require(
            "n_kv_head",
            args.n_kv_head < 1 or heads % args.n_kv_head == 0,
            f"does not divide the {heads} query heads",
            f"choose one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}",
        )
    if args.tokenizer == "bpe":
        require(
            "vocab_size",
            args.vocab_size == -1 or args.vocab_size >= MIN_BPE_VOCAB,
            "too small: BPE starts from 256 bytes and one special token",
            f"give at least {MIN_BPE_VOCAB}",
        )
    else:
        require(
            "vocab_size",
            args.vocab_size == -1,
            f"--tokenizer={args.tokenizer} has a vocabulary of its own",
            "leave it out",
        )
    require(
        "warmup_ratio",
        not args.warmup_ratio + args.warmdown_ratio > 1 or args.lr_schedule == "cosine",
        f"together with --warmdown-ratio={args.warmdown_ratio} longer than the run",
        "lower one of them",
    )
    require(
        "no_save",
        not (args.no_save and args.save_every != -1),
        "contradicts --save-every",
        "give one of the two",
    )
    require(
        "overwrite",
        not (args.overwrite and args.resume),
        "contradicts --resume",
        "give one of the two",
    )
    for name in ("gpus", "gpu", "json"):
        require(
            name,
            args.dry_run or name not in args.given,
            "belongs to --dry-run",
            "add --dry-run or leave it out",
        )
    require("gpus", args.gpus >= 1, "must be at least 1", "give a positive number")
    require(
        "gpu",
        not args.gpu or hardware.listed_gpu(args.gpu),
        "not in the table of GPUs",
        f"choose one of {', '.join(hardware.GPUS)}",
    )
    require(
        "gpu",
        not args.gpu or args.dtype != "float32" and args.device_type in ("", "cuda"),
        "plans for CUDA in 16 bits, whose peak the table has",
        "leave --dtype and --device-type out",
    )
    return problems + track.problems(args.run, args.tensorboard)


def core_metric_flags(args, device_type):
    """(--core-metric-every, --core-metric-max-per-task) with what suits the device for "auto". UsageError for a bundle without use."""
    by_device = {
        "core_metric_every": (2000, -1),
        "core_metric_max_per_task": (500, 50),
    }  # on CUDA, elsewhere
    every, most = (
        values[device_type != "cuda"] if getattr(args, name) == "auto" else getattr(args, name)
        for name, values in by_device.items()
    )
    if every == -1 and "core_bundle" in args.given and args.core_bundle:
        raise UsageError(
            f"--core-bundle={args.core_bundle}: CORE is not measured in this run; add --core-metric-every, or leave it out"
        )
    return every, most


def model_config(args, vocab_size):
    """The GPTConfig that the flags describe."""
    width = width_for(args.depth, args.aspect_ratio, args.head_dim)
    heads = width // args.head_dim
    return GPTConfig(
        depth=args.depth,
        width=width,
        head_dim=args.head_dim,
        n_head=heads,
        n_kv_head=heads if args.n_kv_head == -1 else args.n_kv_head,
        vocab_size=vocab_size,
        max_seq_len=args.max_seq_len,
        window_pattern="L" if args.arch == "llama" else args.window_pattern,
        short_window=max(1, args.max_seq_len // 2)
        if args.short_window == -1
        else args.short_window,
        dropout=args.dropout,
        arch=args.arch,
        tie_embeddings=args.tie_embeddings,
        key_shift=args.arch == "speedrun",
    )


@dataclass
class Plan:
    """Derived once at the first start, frozen in config.json, never derived again.

    num_iterations is None until a time budget has been measured out; tokens and flops are then estimates."""

    horizon: str
    parameters: dict
    scaling_parameters: int
    flops_per_token: int
    rows_per_step: int
    total_batch_tokens: int
    num_iterations: int | None
    tokens: float
    warmup_steps: int
    warmdown_steps: int
    groups: dict
    # the step at which a time budget was measured out, and the warm-up until then: a run that is resumed from an earlier step
    # repeats the learning rates that it had
    fixed_at: int = 0
    warmup_before: int = 0

    @property
    def flops(self):
        return self.tokens * self.flops_per_token

    def last_row(self):
        """Number of rows that the run reads, None while its time budget is not measured."""
        return None if self.num_iterations is None else self.num_iterations * self.rows_per_step

    def fix_steps(self, steps, args, done=0):
        """Set the number of steps, once it is known, and what follows from it. done: steps that are behind; a warm-up that
        is over is not begun again, and the warm-down does not begin in the past."""
        self.num_iterations, self.tokens = steps, steps * self.total_batch_tokens
        if done:
            self.fixed_at, self.warmup_before = done, self.warmup_steps
        if done <= self.warmup_steps:
            self.warmup_steps = (
                args.warmup_steps if args.warmup_steps != -1 else round(args.warmup_ratio * steps)
            )
        self.warmdown_steps = (
            0
            if args.lr_schedule == "cosine"
            else min(round(args.warmdown_ratio * steps), steps - done)
        )

    def lr_multiplier(self, step, args):
        """Learning rate of a step / its peak. While a time budget is still being measured there is no warm-down."""
        if self.num_iterations is None or step < self.fixed_at:
            warmup_steps = self.warmup_steps if self.num_iterations is None else self.warmup_before
            return schedules.lr_multiplier(
                step, sys.maxsize, warmup_steps, 0, args.final_lr_frac, "trapezoid"
            )
        return schedules.lr_multiplier(
            step,
            self.num_iterations,
            self.warmup_steps,
            self.warmdown_steps,
            args.final_lr_frac,
            args.lr_schedule,
        )

    def as_dict(self):
        return dataclasses.asdict(self)


def make_plan(args, config, tokens_per_epoch, peak_flops, world_size):
    """Derive a Plan from checked flags. tokens_per_epoch: training tokens of one pass. peak_flops: of one device, for time
    budgets. Raises UsageError for a warm-up longer than the run."""
    model = meta_model(config)
    n_parameters, flops_per_token = model.scaling_parameters(), model.flops_per_token()
    reference = dataclasses.replace(
        config,
        depth=schedules.REFERENCE_DEPTH,
        width=width_for(schedules.REFERENCE_DEPTH, args.aspect_ratio, args.head_dim),
    )
    heads = reference.width // reference.head_dim
    reference = dataclasses.replace(reference, n_head=heads, n_kv_head=heads)
    reference_tokens = (
        schedules.DEFAULT_PARAM_DATA_RATIO * meta_model(reference).scaling_parameters()
    )

    horizon = next(name for name in HORIZONS if getattr(args, name) != -1)
    tokens = {
        # steps alone say nothing of tokens: the batch is then that of the default ratio
        "num_iterations": lambda: (
            args.num_iterations * args.total_batch_size
            if args.total_batch_size != -1
            else schedules.DEFAULT_PARAM_DATA_RATIO * n_parameters
        ),
        "target_flops": lambda: args.target_flops / flops_per_token,
        "target_tokens": lambda: args.target_tokens,
        "target_epochs": lambda: args.target_epochs * tokens_per_epoch,
        "target_minutes": lambda: (
            args.target_minutes * 60 * ASSUMED_MFU * peak_flops * world_size / flops_per_token
        ),
        "target_param_data_ratio": lambda: args.target_param_data_ratio * n_parameters,
    }[horizon]()

    T, device_rows = config.max_seq_len, max(1, args.device_batch_size) * world_size
    if args.total_batch_size == -1:
        wanted = schedules.derive_batch_tokens(tokens, reference_tokens) / T
        rows_per_step = round_up(max(1, round(wanted)), device_rows)
    else:
        rows_per_step = args.total_batch_size // T
    batch_tokens = rows_per_step * T
    steps = (
        args.num_iterations if horizon == "num_iterations" else max(1, round(tokens / batch_tokens))
    )
    tokens = steps * batch_tokens
    plan = Plan(
        horizon=horizon,
        parameters=model.count_parameters(),
        scaling_parameters=n_parameters,
        flops_per_token=flops_per_token,
        rows_per_step=rows_per_step,
        total_batch_tokens=batch_tokens,
        num_iterations=steps,
        tokens=tokens,
        warmup_steps=0,
        warmdown_steps=0,
        groups=schedules.group_settings(args, batch_tokens, tokens, reference_tokens, config.width),
    )
    plan.fix_steps(steps, args)
    if plan.warmup_steps + plan.warmdown_steps > steps and args.warmup_steps != -1:
        raise UsageError(
            f"--warmup-steps={args.warmup_steps}: with {plan.warmdown_steps} steps of warm-down more than the run's "
            f"{steps} steps; give at most {steps - plan.warmdown_steps}"
        )
    if horizon == "target_minutes":
        plan.num_iterations = None
    return plan


def estimated_seconds(plan, args, peak_flops, devices):
    """Training time of a plan on `devices` devices, at ASSUMED_MFU of their peak or as the time budget says."""
    if plan.horizon == "target_minutes":
        return 60 * args.target_minutes
    return plan.flops / (ASSUMED_MFU * peak_flops * devices)


def as_json(args, config, plan, device_batch, runtime, peak_flops, peak_label, devices, memory):
    """The plan as numbers, for --json."""
    return {
        "model": dataclasses.asdict(config),
        "plan": plan.as_dict(),
        "flops": plan.flops,
        "devices": devices,
        "device_batch_size": device_batch,
        "accumulation": plan.rows_per_step // (device_batch * devices),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "fp8_layers": list(fp8.large_layers(meta_model(config))) if runtime.fp8_recipe else [],
        "peak_flops": peak_flops,
        "peak": peak_label,
        "estimates": {
            "seconds": estimated_seconds(plan, args, peak_flops, devices),
            "assumed_mfu": ASSUMED_MFU,
            "memory_bytes": memory(device_batch),
            "checkpoint_bytes": fit.state_bytes(plan.parameters, args.optimizer),
        },
    }


def early_end(args, bpb, stale_evaluations):
    """Why a run ends before its horizon after an evaluation, by --stop-at-bpb or --patience; "" if it goes on."""
    if bpb <= args.stop_at_bpb:
        return f"val/bpb {bpb:.4f} reached --stop-at-bpb={args.stop_at_bpb}"
    return (
        f"{args.patience} evaluations without improvement (--patience)"
        if 0 < args.patience <= stale_evaluations
        else ""
    )


def describe(
    args, config, plan, device_batch, peak_flops, peak_label, devices, memory, tokens_per_epoch
):
    """The plan as {section: {name: text}}, for format_plan()."""
    seconds = estimated_seconds(plan, args, peak_flops, devices)
    accumulation = plan.rows_per_step // (device_batch * devices)
    steps = (
        "fixed once the speed is measured" if plan.num_iterations is None else plan.num_iterations
    )
    return {
        "model": {
            "arch": config.arch,
            "depth": config.depth,
            "width": f"{config.width} ({args.depth} x {args.aspect_ratio}, rounded up to heads of {config.head_dim})",
            "heads": f"{config.n_head} query, {config.n_kv_head} key/value",
            "context": config.max_seq_len,
            "windows": " ".join(str(min(w, config.max_seq_len)) for w in config.windows()),
            "vocabulary": config.vocab_size,
        },
        "parameters": {
            **{k: f"{v:,}" for k, v in plan.parameters.items() if v},
            "scaling (matrices + head)": f"{plan.scaling_parameters:,}",
        },
        "horizon": {
            "decided by": f"{flag(plan.horizon)}={getattr(args, plan.horizon)}",
            "steps": steps,
            "tokens": f"{plan.tokens:,.0f}"
            + (" (estimate)" if plan.num_iterations is None else ""),
            "epochs": f"{plan.tokens / tokens_per_epoch:.2f}"
            + (": the data repeats" if plan.tokens > tokens_per_epoch else ""),
            "tokens per parameter": f"{plan.tokens / plan.scaling_parameters:.2f}",
            "FLOPs": f"{plan.flops:.3e} ({plan.flops_per_token:,} a token)",
        },
        "batch": {
            "tokens a step": f"{plan.rows_per_step} x {config.max_seq_len} = {plan.total_batch_tokens:,}",
            "rows": f"{device_batch} a device x {devices} devices x {accumulation} accumulated = {plan.rows_per_step}",
        },
        "optimizer": {
            **{
                name: ", ".join(f"{k} {v:.4g}" for k, v in group.items())
                for name, group in plan.groups.items()
                if plan.parameters[name]
            },
            "schedule": f"{args.lr_schedule}, warm-up {plan.warmup_steps} steps, "
            + (
                f"warm-down {plan.warmdown_steps}"
                if plan.num_iterations is not None
                else f"warm-down {args.warmdown_ratio:.0%}"
            )
            + f" to {args.final_lr_frac:g}",
        },
        "estimates": {
            "time": f"{human_time(seconds)} at {ASSUMED_MFU:.0%} of {devices} x {peak_flops / 1e12:.3g} TFLOP/s ({peak_label})",
            "memory a device": human_bytes(memory(device_batch)),
            "a checkpoint": human_bytes(fit.state_bytes(plan.parameters, args.optimizer)),
        },
    }


class Runtime(NamedTuple):
    """What computes how. no_compiler: why torch.compile is not used, or None; fp8_recipe: of layers trained in fp8, or None."""

    dtype: torch.dtype
    dtype_reason: str
    attention: str
    attention_reason: str
    no_compiler: str | None
    fp8_recipe: str | None


def pick_runtime(args, device_type, gpu=None):
    """The Runtime of these flags on this machine, or on a hardware.Gpu. UsageError for what cannot be had there."""
    capability = gpu and gpu.capability
    dtype, dtype_reason = hardware.pick_dtype(
        args.dtype, device_type, training=True, capability=capability
    )
    no_compiler = (
        "--no-compile"
        if not args.compile
        else None
        if gpu
        else hardware.compiler_missing(device_type)
    )
    backend, backend_reason = pick_backend(
        args.attention, device_type, dtype, args.head_dim, capability, no_compiler
    )
    if args.fp8:
        fp8.require(
            meta_model(model_config(args, vocab_size=1)),
            device_type,
            dtype,
            no_compiler,
            capability,
        )
    return Runtime(
        dtype,
        dtype_reason,
        backend,
        backend_reason,
        no_compiler,
        args.fp8_recipe if args.fp8 else None,
    )


def runtime_in_words(runtime, config, device_type, devices):
    """The line on what computes how, and why."""
    loss, loss_reason = pick_loss(device_type, not runtime.no_compiler)
    return (
        f"runtime: {device_type} x {devices}, {str(runtime.dtype).removeprefix('torch.')} ({runtime.dtype_reason})"
        + (" with loss scaling" if runtime.dtype == torch.float16 else "")
        + (
            f", {fp8.in_words(meta_model(config), runtime.fp8_recipe)}"
            if runtime.fp8_recipe
            else ""
        )
        + f"; attention: {runtime.attention} ({runtime.attention_reason}); "
        + (f"eager ({runtime.no_compiler})" if runtime.no_compiler else "compiled per block")
        + f"; loss: {loss} ({loss_reason}), cross-entropy in fp32; fp32 products in full precision; deterministic algorithms on"
    )


def format_plan(description):
    """The lines of describe() as an aligned block."""
    lines = []
    for section, entries in description.items():
        for i, (name, value) in enumerate(entries.items()):
            lines.append(f"  {section if i == 0 else '':<11} {name:<26} {value}")
    return "\n".join(["plan:", *lines])


def long_run_advice(args, plan, seconds):
    """A sentence for runs of more than two days: what would fit this machine. None for shorter ones."""
    if seconds <= LONG_RUN_SECONDS:
        return None
    advice = f"this run is estimated to take {human_time(seconds)}; for this machine try "
    if plan.horizon in ("target_minutes", "target_flops"):  # a smaller model would take as long
        return advice + "a time budget such as --target-minutes=600"
    # time grows with the parameters, about depth^3, and at a fixed ratio so do the tokens
    power = 6 if plan.horizon == "target_param_data_ratio" else 3
    depth = max(
        1, min(args.depth - 1, int(args.depth * (LONG_RUN_SECONDS / seconds) ** (1 / power)))
    )
    return advice + f"--depth={depth}, or a time budget such as --target-minutes=600"


def dry_run(args, model=None):
    """Print the plan of flags without reading data or building weights. model: the GPTConfig to start from, if --init-from
    names one. Returns the exit code."""
    device_type = "cuda" if args.gpu else hardware.pick_device_type(args.device_type)
    if args.gpu:
        gpu = hardware.listed_gpu(args.gpu)
        peak, peak_label, free_bytes = (
            gpu.peak_flops,
            hardware.peak_label(gpu, args.gpu),
            gpu.memory_bytes,
        )
    else:
        gpu, device = None, torch.device(device_type)
        (peak, peak_label), free_bytes = (
            hardware.peak_flops(device),
            fit.free_memory(device, args.gpus),
        )
    runtime = pick_runtime(args, device_type, gpu)
    n_bytes = estimated_bytes(args.data)
    config = model or model_config(
        args, expected_vocab_size(args.tokenizer, args.vocab_size, n_bytes)
    )
    tokens_per_epoch = n_bytes / EXPECTED_BYTES_PER_TOKEN.get(args.tokenizer, 4)
    plan = make_plan(args, config, tokens_per_epoch, peak, args.gpus)
    memory = fit.memory_of(
        args,
        config,
        plan.parameters,
        runtime.dtype,
        runtime.attention,
        not runtime.no_compiler,
        device_type,
    )
    device_batch = fit.pick_device_batch(args, plan, memory, free_bytes, args.gpus, device_type)
    if args.json:
        print(
            json.dumps(
                as_json(
                    args, config, plan, device_batch, runtime, peak, peak_label, args.gpus, memory
                ),
                indent=2,
            )
        )
        return EXIT_COMPLETED
    print(
        format_plan(
            describe(
                args,
                config,
                plan,
                device_batch,
                peak,
                peak_label,
                args.gpus,
                memory,
                tokens_per_epoch,
            )
        )
    )
    print(runtime_in_words(runtime, config, device_type, args.gpus))
    if advice := long_run_advice(args, plan, estimated_seconds(plan, args, peak, args.gpus)):
        print(advice)
    return EXIT_COMPLETED
