"""Everything that is wrong with a command line of train.py, found before any work is done."""

import argparse
import glob
import math
import os

from nanochat import hardware, ranks
from nanochat.common import UsageError
from nanochat.data.hub import KNOWN
from nanochat.data.sources import is_remote
from nanochat.data.text import split_column
from nanochat.data.tokenizer import BPE_PATTERNS, MIN_BPE_VOCAB, TRAINED_TOKENIZERS
from nanochat.model import fp8
from nanochat.model.attention import BACKENDS
from nanochat.model.config import width_for
from nanochat.run import notify, trackers
from nanochat.run.flags import HORIZONS, STEPS, flag, listed_steps, range_problems

# What kernels are made for; others work and are slower.
USUAL_HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_DEPTH = 1000
MAX_WIDTH = 2**17


class _Problems(list):
    """Sentences that name flag, value, reason and remedy."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args

    def require(self, name: str, holds: object, reason: str, remedy: str) -> None:
        """Note a problem with the flag of that name unless `holds` is true."""
        value = getattr(self.args, name)
        not_finite = isinstance(value, float) and not math.isfinite(value)
        # range_problems() has said that already
        if holds or not_finite:
            return
        shown = flag(name) if value is True else f"{flag(name)}={value}"
        self.append(f"{shown}: {reason}; {remedy}")


def check_flags(args: argparse.Namespace) -> list[str]:
    """Every problem with the flags, as sentences; an empty list if there is none.

    args: from flags.parse(), with the values in force of a run that is resumed or begins with
    another one's weights (resume.values_in_force)."""
    problems = _Problems(args)
    # All of them, not the first: whoever mends one flag should not meet the next one afterwards.
    problems += range_problems(args)
    _check_paths(args, problems)
    _check_model(args, problems)
    _check_head_dim(args, problems)
    _check_tokenizer(args, problems)
    _check_batch(args, problems)
    _check_runtime(args, problems)
    _check_combinations(args, problems)
    _check_planning(args, problems)
    problems.require(
        "notify",
        notify.is_url(args.notify) or not notify.looks_like_url(args.notify),
        "neither an http or https URL with a host nor a command",
        "write https://HOST/PATH, or a shell command",
    )
    return list(problems) + trackers.problems(args.run, args.tensorboard)


def _exists(path: str) -> bool:
    """True for a file, a folder, or a pattern that matches some."""
    return os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _is_text(value: str) -> bool:
    """True for what _exists(), also with the name of a column behind it: FILE:column."""
    try:
        return _exists(split_column(value)[0])
    # of an empty column, which is reported when the text is opened
    except UsageError:
        return True


def _check_paths(args: argparse.Namespace, problems: _Problems) -> None:
    # A path would put the run where `nanochat runs` and --resume do not look for it.
    is_name = os.path.basename(args.model_tag) == args.model_tag
    problems.require(
        "model_tag",
        is_name and args.model_tag not in (".", ".."),
        "a path, not a name",
        "give a plain name, and the folder of run folders as --out-dir",
    )
    # What a resumed run began with may have been moved since, and is looked up only when it is
    # needed.
    for name in ("sample_prompts", "val_data", "init_from", "core_bundle"):
        value = getattr(args, name)
        found = _is_text if name == "val_data" else _exists
        unneeded = name == "init_from" and args.resume
        problems.require(
            name,
            not value or name not in args.given or unneeded or found(value),
            "no such file or folder",
            "check the path",
        )
    problems.require(
        "data",
        "data" not in args.given
        or args.data == "python"
        or is_remote(args.data)
        or _is_text(args.data),
        "no such file or folder, no file matches it as a pattern, and it names no dataset",
        f"give a path, python, {', '.join(KNOWN)}, or hf:<dataset>",
    )
    problems.require("out_dir", args.out_dir, "empty", "name a folder, or leave the flag out")
    # The folder may not exist yet: then its nearest existing parent has to be writable.
    parent = os.path.abspath(args.out_dir)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    problems.require(
        "out_dir",
        os.path.isdir(parent) and os.access(parent, os.W_OK),
        f"cannot be written ({parent} is not a folder that you may write to)",
        "give another folder",
    )


def _check_model(args: argparse.Namespace, problems: _Problems) -> None:
    problems.require(
        "depth",
        args.depth <= MAX_DEPTH,
        "deeper than any model this program can hold",
        f"give at most {MAX_DEPTH}",
    )
    problems.require(
        "aspect_ratio",
        args.depth * args.aspect_ratio <= MAX_WIDTH,
        "wider than any model this program can hold",
        "give less",
    )
    is_llama = args.arch == "llama"
    problems.require(
        "tie_embeddings",
        is_llama or not args.tie_embeddings,
        "needs --arch=llama",
        "add that, or leave it out",
    )
    # Their defaults are for speedrun models, so only given values contradict.
    for name in ("window_pattern", "short_window"):
        problems.require(
            name,
            not is_llama or name not in args.given or getattr(args, name) in ("L", -1),
            "--arch=llama sees the full context in every layer",
            "leave the flag out",
        )
    problems.require(
        "window_pattern",
        args.window_pattern and set(args.window_pattern) <= {"S", "L"},
        "holds letters other than S (short window) and L (full context)",
        "write for example SSSL",
    )
    problems.require(
        "short_window",
        args.short_window <= args.max_seq_len,
        f"longer than --max-seq-len={args.max_seq_len}",
        "give at most that, or -1 for half of it",
    )


def _check_head_dim(args: argparse.Namespace, problems: _Problems) -> None:
    problems.require(
        "head_dim",
        args.head_dim % 2 == 0,
        "must be even (rotary embeddings turn pairs)",
        "choose an even number",
    )
    # what follows divides by these
    if min(args.depth, args.aspect_ratio, args.head_dim) < 1:
        return
    # Width is rounded up to whole heads: one head larger than the width would silently be the
    # width.
    nominal = args.depth * args.aspect_ratio
    fitting = [dim for dim in USUAL_HEAD_DIMS if dim <= nominal] or [nominal]
    nearest = " or ".join(map(str, fitting[-2:]))
    depth = math.ceil(args.head_dim / args.aspect_ratio)
    problems.require(
        "head_dim",
        args.head_dim <= nominal,
        f"larger than depth x aspect ratio = {args.depth} x {args.aspect_ratio} = {nominal}",
        f"choose a head dim of {nearest}, or a depth of {depth}",
    )
    heads = width_for(args.depth, args.aspect_ratio, args.head_dim) // args.head_dim
    divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    problems.require(
        "n_kv_head",
        args.n_kv_head < 1 or heads % args.n_kv_head == 0,
        f"does not divide the {heads} query heads",
        f"choose one of {divisors}",
    )


def _check_tokenizer(args: argparse.Namespace, problems: _Problems) -> None:
    # A resumed run has a copy of its own.
    problems.require(
        "tokenizer",
        args.resume
        or args.resume_from_step != -1
        or args.tokenizer in (*TRAINED_TOKENIZERS, "gpt2")
        or os.path.isdir(args.tokenizer),
        "neither a kind of tokenizer nor a folder",
        f"choose {', '.join(TRAINED_TOKENIZERS)}, gpt2, a folder with a saved one, or a run folder",
    )
    if args.tokenizer in BPE_PATTERNS:
        problems.require(
            "vocab_size",
            args.vocab_size == -1 or args.vocab_size >= MIN_BPE_VOCAB,
            "too small: BPE starts from 256 bytes and one special token",
            f"give at least {MIN_BPE_VOCAB}",
        )
    else:
        problems.require(
            "vocab_size",
            args.vocab_size == -1,
            f"--tokenizer={args.tokenizer} has a vocabulary of its own",
            "leave it out",
        )


def _check_batch(args: argparse.Namespace, problems: _Problems) -> None:
    # With --device-batch-size=-1 the rows per pass are chosen later, and always divide.
    devices = args.gpus if args.dry_run else ranks.world_size()
    # A table says for each number of devices whether the batch can be dealt out to them.
    if devices == "all":
        devices = 1
    unit = args.max_seq_len * max(1, args.device_batch_size) * devices
    if unit <= 0 or args.total_batch_size <= 0:
        return
    rows, rest = divmod(args.total_batch_size, args.max_seq_len * devices)
    # The batch of a resumed run is frozen: only how it is dealt out can change.
    is_frozen = args.resume and "total_batch_size" not in args.given
    if is_frozen and "device_batch_size" in args.given and args.device_batch_size > 0 and not rest:
        divisors = " or ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        problems.require(
            "device_batch_size",
            rows % args.device_batch_size == 0,
            f"does not divide the {rows} rows of a rank in this run's batch",
            f"use {divisors}, or leave it out",
        )
        return
    # Both neighbours are named, so that nobody has to do the division.
    below = args.total_batch_size // unit * unit
    nearest = " or ".join(str(n) for n in (below, below + unit) if n)
    problems.require(
        "total_batch_size",
        args.total_batch_size % unit == 0,
        f"not a multiple of one micro-batch of all ranks, {unit} tokens "
        "(--max-seq-len x --device-batch-size x ranks)",
        f"use {nearest}",
    )


def _check_runtime(args: argparse.Namespace, problems: _Problems) -> None:
    problems.require(
        "shard",
        not (args.shard and args.fp8),
        "layers in fp8 cannot be split over ranks",
        "leave one of --shard and --fp8 out",
    )
    problems.require(
        "attention",
        args.attention in ("auto", *BACKENDS),
        "unknown backend",
        f"choose auto, {' or '.join(BACKENDS)}",
    )
    problems.require(
        "fp8_recipe",
        args.fp8 or "fp8_recipe" not in args.given,
        "needs --fp8",
        "add that, or leave it out",
    )
    problems.require(
        "dtype",
        not args.fp8 or args.dtype in ("auto", "bfloat16"),
        "layers that --fp8 does not convert compute in bfloat16",
        "leave it out",
    )
    problems.require(
        "fp8",
        not args.fp8 or args.compile or fp8.EMULATE,
        "slower than bfloat16 unless it is compiled",
        "leave --no-compile out",
    )


def _check_combinations(args: argparse.Namespace, problems: _Problems) -> None:
    problems.require(
        "init_from",
        not args.init_from or args.resume_from_step == -1,
        "contradicts --resume-from-step",
        "give one of the two",
    )
    problems.require(
        "target_param_data_ratio",
        any(getattr(args, name) != -1 for name in HORIZONS),
        "there is no horizon left to train to",
        "give a positive ratio, or another horizon such as --num-iterations",
    )
    problems += evaluation_problems(args)
    problems.require(
        "warmup_ratio",
        args.lr_schedule == "cosine" or not args.warmup_ratio + args.warmdown_ratio > 1,
        f"together with --warmdown-ratio={args.warmdown_ratio} longer than the run",
        "lower one of them",
    )
    problems.require(
        "warmup_steps",
        args.num_iterations < 1 or args.warmup_steps <= args.num_iterations,
        f"longer than the run's {args.num_iterations} steps",
        f"give at most {args.num_iterations}",
    )
    is_list = "save_at" in args.given and STEPS.holds(args.save_at)
    problems.require(
        "save_at",
        args.num_iterations < 1
        or not is_list
        or max(listed_steps(args.save_at), default=0) <= args.num_iterations,
        f"beyond the run's {args.num_iterations} steps",
        f"give steps up to {args.num_iterations}",
    )
    _check_effect(args, problems)
    problems.require(
        "overwrite",
        not (args.overwrite and args.resume),
        "contradicts --resume",
        "give one of the two",
    )


def evaluation_problems(args: argparse.Namespace) -> list[str]:
    """A sentence for each rule for an early end that looks at evaluations, and would never fire
    without them."""
    problems = _Problems(args)
    for name in ("stop_at_bpb", "patience"):
        problems.require(
            name,
            args.eval_every != -1 or getattr(args, name) == -1,
            "needs evaluations, and --eval-every is -1",
            "give --eval-every",
        )
    return problems


def _check_effect(args: argparse.Namespace, problems: _Problems) -> None:
    # A flag that another one makes void would be ignored without a word.
    void = [
        ("save_every", args.no_save, "--no-save"),
        ("save_at", args.no_save, "--no-save"),
        ("save_every_minutes", args.no_save, "--no-save"),
        ("keep_last", args.no_save, "--no-save"),
        ("sample_prompts", args.sample_every == -1, "--sample-every=-1"),
        ("warmdown_ratio", args.lr_schedule == "cosine", "--lr-schedule=cosine"),
        ("warmup_ratio", args.warmup_steps != -1, "--warmup-steps"),
    ]
    for name, is_void, by in void:
        problems.require(
            name,
            not is_void or name not in args.given or getattr(args, name) == -1,
            f"has no effect with {by}",
            "leave one of the two out",
        )


def _check_planning(args: argparse.Namespace, problems: _Problems) -> None:
    # Without --dry-run they would be ignored, and a request is never ignored.
    for name in ("gpus", "gpu", "gpu_network", "gpu_price", "json"):
        problems.require(
            name,
            args.dry_run or name not in args.given,
            "needs --dry-run",
            "add --dry-run or leave it out",
        )
    problems.require(
        "gpu",
        not args.gpu or hardware.listed_gpu(args.gpu),
        "not in the table of GPUs",
        f"choose one of {', '.join(hardware.GPUS)}",
    )
    problems.require(
        "gpu_network",
        args.gpu or not args.dry_run or "gpu_network" not in args.given,
        "needs --gpu, whose links are listed",
        "add --gpu=NAME or leave it out",
    )
    problems.require(
        "gpus",
        args.gpu or not args.dry_run or args.gpus != "all",
        "needs --gpu, whose links are listed",
        "add --gpu=NAME or give a number",
    )
    problems.require(
        "gpu",
        not args.gpu or (args.dtype != "float32" and args.device_type in ("", "cuda")),
        "plans for CUDA in 16 bits, the only peak that the table of GPUs lists",
        "leave --dtype and --device-type out",
    )


def core_metric_flags(args: argparse.Namespace, device_type: str) -> tuple[int, int]:
    """(--core-metric-every, --core-metric-max-per-task), where "auto" is what suits the device.

    UsageError for a bundle that nothing would read."""
    # On a CPU an evaluation of all examples takes longer than a small run trains.
    on_cuda = device_type == "cuda"
    every = args.core_metric_every
    if every == "auto":
        every = 2000 if on_cuda else -1
    most = args.core_metric_max_per_task
    if most == "auto":
        most = 500 if on_cuda else 50
    if every == -1 and "core_bundle" in args.given and args.core_bundle:
        raise UsageError(
            f"--core-bundle={args.core_bundle}: CORE is not measured in this run; add "
            "--core-metric-every, or leave it out"
        )
    return every, most
