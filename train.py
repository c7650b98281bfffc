"""Train a GPT. One script, one dial:

    python train.py --depth=4                                   # on a laptop
    torchrun --nproc_per_node=8 train.py --depth=24             # on a node

The flags, then the loop (save / evaluate / sample / stop? / step / log), top to bottom."""

import argparse
import math
import os
import sys
import time

from nanochat import signals
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    TrainingFailed,
    Unavailable,
    UsageError,
    human_time,
    number_or_auto,
    stream_seed,
)
from nanochat.optim import schedules


def parse_args(argv=None):
    """The flags as a Namespace; `given` on it is the set of names that were on the command line. -1: off or automatic."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a GPT sized by --depth.",
        allow_abbrev=False,
        usage="train.py --depth=N [options]; --help lists them all",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("logging")
    group.add_argument("--run", default="dummy", help="Weights & Biases run name; dummy: off")
    group.add_argument("--out-dir", default="out", help="folder of run folders")
    group.add_argument("--model-tag", default="", help="name of the run folder; empty: d{depth}")
    group.add_argument(
        "--tensorboard", action="store_true", help="log to TensorBoard, in the run folder"
    )
    group.add_argument(
        "--config", default="", help="a run's config.json or a JSON of flags; the command line wins"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--device-type",
        default="",
        choices=["", "cuda", "mps", "cpu"],
        help="empty: the first of cuda, mps, cpu",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="of products; weights stay fp32. auto: what the hardware multiplies fast. float16: with a scaled loss",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile blocks with torch.compile",
    )
    group.add_argument(
        "--seed", type=int, default=42, help="of weights, data order, dropout and samples"
    )
    group.add_argument(
        "--attention", default="auto", help="auto, blocked, sdpa, flex, triton, fa3 or fa4"
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="make a block's inner tensors again in the backward pass instead of keeping them",
    )
    group.add_argument(
        "--shard", action="store_true", help="shard the model with FSDP2 (not available yet)"
    )
    group = parser.add_argument_group("fp8")
    group.add_argument(
        "--fp8", action="store_true", help="train large layers in fp8 (SM89 and later)"
    )
    group.add_argument(
        "--fp8-recipe",
        default="tensorwise",
        choices=["tensorwise", "rowwise"],
        help="one scale a tensor, or a row",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--depth", type=int, default=20, help="layers; the one dial")
    group.add_argument(
        "--aspect-ratio",
        type=int,
        default=64,
        help="width / depth, width rounded up to whole heads",
    )
    group.add_argument("--head-dim", type=int, default=128, help="channels of an attention head")
    group.add_argument(
        "--n-kv-head", type=int, default=-1, help="key/value heads; -1: as many as query heads"
    )
    group.add_argument("--max-seq-len", type=int, default=2048, help="context, tokens")
    group.add_argument(
        "--window-pattern",
        default="SSSL",
        help="per layer, tiled: L full context, S short window; last layer always L",
    )
    group.add_argument(
        "--short-window", type=int, default=-1, help="tokens an S layer sees; -1: half the context"
    )
    group.add_argument(
        "--arch",
        default="speedrun",
        choices=["speedrun", "llama"],
        help="llama: the plain decoder that others read",
    )
    group.add_argument(
        "--tie-embeddings", action="store_true", help="share embedding and head (llama)"
    )
    group.add_argument(
        "--dropout", type=float, default=0.0, help="share of residual updates dropped; 0: off"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="climbmix",
        help="climbmix, fineweb-edu, tinystories, shakespeare or "
        "hf:<dataset>[:<config>[:<split>[:<column>]]] (fetched as needed), python (source code on this machine), or a "
        "path, glob or folder of .txt, .jsonl, .parquet",
    )
    group.add_argument(
        "--val-data",
        default="",
        help="path, glob or folder to validate on; empty: hold out a part of --data",
    )
    group.add_argument(
        "--tokenizer", default="bpe", help="bpe, char, byte, gpt2, or a folder with a saved one"
    )
    group.add_argument(
        "--vocab-size", type=int, default=-1, help="of bpe; -1: from the data size, at most 32768"
    )
    group.add_argument(
        "--init-from",
        default="",
        help="run whose weights to start from, and shape, context, tokenizer; the rest is new",
    )
    group = parser.add_argument_group("horizon (the first given wins, in this order)")
    group.add_argument("--num-iterations", type=int, default=-1, help="steps")
    group.add_argument("--target-flops", type=float, default=-1, help="training FLOPs")
    group.add_argument("--target-tokens", type=float, default=-1, help="training tokens")
    group.add_argument("--target-epochs", type=float, default=-1, help="passes over the data")
    group.add_argument(
        "--target-minutes",
        type=float,
        default=-1,
        help="training time; evaluation and compilation not counted",
    )
    group.add_argument(
        "--target-param-data-ratio",
        type=float,
        default=schedules.DEFAULT_PARAM_DATA_RATIO,
        help="tokens per parameter of matrices and head; Chinchilla: 20",
    )
    group = parser.add_argument_group("early end")
    group.add_argument(
        "--stop-at-bpb", type=float, default=-1, help="stop at these validation bits per byte"
    )
    group.add_argument(
        "--patience",
        type=int,
        default=-1,
        help="stop after so many evaluations without improvement",
    )
    group = parser.add_argument_group(
        "optimization (rates are those of the reference batch and width)"
    )
    group.add_argument(
        "--device-batch-size",
        type=int,
        default=-1,
        help="rows a device takes at once; -1: what fits",
    )
    group.add_argument(
        "--total-batch-size", type=int, default=-1, help="tokens a step; -1: from the horizon"
    )
    group.add_argument(
        "--optimizer",
        default="muon",
        choices=["muon", "adamw"],
        help="of the matrices; the rest is always AdamW",
    )
    group.add_argument(
        "--embedding-lr",
        type=float,
        default=-1,
        help=f"AdamW, tables; -1: by --arch, {schedules.EMBEDDING_LR}",
    )
    group.add_argument(
        "--unembedding-lr",
        type=float,
        default=-1,
        help=f"AdamW, head; -1: by --arch, {schedules.UNEMBEDDING_LR}",
    )
    group.add_argument(
        "--weight-decay", type=float, default=schedules.WEIGHT_DECAY, help="of the matrices"
    )
    group.add_argument(
        "--matrix-lr", type=float, default=-1, help=f"-1: by optimizer, {schedules.MATRIX_LR}"
    )
    group.add_argument(
        "--scalar-lr", type=float, default=schedules.SCALAR_LR, help="AdamW, lambdas and gates"
    )
    group.add_argument(
        "--adam-beta1", type=float, default=schedules.ADAM_BETA1, help="of every AdamW group"
    )
    group.add_argument(
        "--adam-beta2", type=float, default=schedules.ADAM_BETA2, help="of every AdamW group"
    )
    group.add_argument(
        "--lr-schedule",
        default="trapezoid",
        choices=["trapezoid", "cosine"],
        help="cosine cannot be extended",
    )
    group.add_argument(
        "--warmup-ratio", type=float, default=schedules.WARMUP_RATIO, help="share of the steps"
    )
    group.add_argument("--warmup-steps", type=int, default=-1, help="-1: by --warmup-ratio")
    group.add_argument(
        "--warmdown-ratio", type=float, default=schedules.WARMDOWN_RATIO, help="share of the steps"
    )
    group.add_argument(
        "--final-lr-frac",
        type=float,
        default=schedules.FINAL_LR_FRAC,
        help="learning rate at the end / its peak",
    )
    group.add_argument("--grad-clip", type=float, default=0.0, help="largest gradient norm; 0: off")
    group = parser.add_argument_group("resume")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest intact checkpoint; start fresh if there is none; "
        "with a longer horizon: extend the run from before its warm-down",
    )
    group.add_argument(
        "--resume-from-step", type=int, default=-1, help="go on from this checkpoint"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the run that the folder holds (with --resume-from-step: "
        "set its later checkpoints aside)",
    )
    group = parser.add_argument_group("evaluation (every: steps; -1: never, at the end neither)")
    group.add_argument(
        "--eval-every", type=int, default=250, help="validation bits per byte; also at the end"
    )
    group.add_argument(
        "--eval-tokens",
        type=int,
        default=40 * 524288,
        help="held-out tokens, capped by the validation set; -1: all",
    )
    group.add_argument(
        "--core-metric-every",
        type=number_or_auto,
        default="auto",
        help="CORE metric; also at the end; auto: 2000 on CUDA, -1 elsewhere",
    )
    group.add_argument(
        "--core-metric-max-per-task",
        type=number_or_auto,
        default="auto",
        help="examples of a CORE task; -1: all; auto: 500 on CUDA, 50 elsewhere",
    )
    group.add_argument(
        "--core-bundle",
        default="",
        help="folder of the CORE bundle; empty: the cached one, downloaded once",
    )
    group.add_argument(
        "--sample-every", type=int, default=2000, help="text samples; also at the end"
    )
    group.add_argument(
        "--sample-prompts",
        default="",
        help="file with one prompt a line; empty: beginnings of held-out documents",
    )
    group = parser.add_argument_group("saving")
    group.add_argument(
        "--save-every",
        type=int,
        default=-1,
        help="steps between permanent checkpoints; -1: only at the end and "
        "where the warm-down begins",
    )
    group.add_argument(
        "--save-every-minutes", type=float, default=10, help="a rolling checkpoint; -1: none"
    )
    group.add_argument(
        "--keep-last", type=int, default=-1, help="permanent checkpoints to keep; -1: all"
    )
    group.add_argument("--no-save", action="store_true", help="write no checkpoint at all")
    group = parser.add_argument_group("faults")
    group.add_argument(
        "--max-skipped",
        type=int,
        default=10,
        help="steps in a row that may be skipped for non-finite numbers",
    )
    group.add_argument(
        "--debug-nans",
        action="store_true",
        help="at the first such step: find the module that made it, and stop",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="trace a few steps into the run folder, and say where time goes",
    )
    group = parser.add_argument_group("planning")
    group.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    group.add_argument("--json", action="store_true", help="with --dry-run: print it as JSON")
    group.add_argument("--gpus", type=int, default=1, help="with --dry-run: devices to plan for")
    group.add_argument("--gpu", default="", help="with --dry-run: GPU to plan for, such as H100")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config:
        from nanochat.run.resume import config_flags

        argv = config_flags(args.config, {action.dest: action for action in parser._actions}) + argv
        args = parser.parse_args(argv)
    # parsed again with a marker for every default: what differs from it was given
    marker = object()
    parser.set_defaults(**dict.fromkeys(vars(args), marker))
    args.given = {
        name for name, value in vars(parser.parse_args(argv)).items() if value is not marker
    }
    return args


def main(args, stop):
    """Train. stop: the StopSignals of this process. Returns the exit code: 0 completed, 75 stopped early on request and
    resumable, 1 ended with everything saved for want of data or disk. Raises UsageError, TrainingFailed, Stopped."""
    if args.profile:  # torch's allocator warns of every block that is older than the trace
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from nanochat import hardware, ranks
    from nanochat.data.prefetch import Ahead, Prefetcher
    from nanochat.data.rows import Rows, check_disk, describe_tokens, held_out_pieces
    from nanochat.data.sources import compressed_bits_per_byte, describe_corpus, open_corpus
    from nanochat.data.token_cache import DataFailed, TokenCache, load_tokenizer
    from nanochat.eval import bpb as evaluate
    from nanochat.eval import core as core_metric
    from nanochat.eval import generation as engine
    from nanochat.model import fp8
    from nanochat.model.build import build
    from nanochat.model.config import GPTConfig
    from nanochat.optim import loss_scaler as fp16
    from nanochat.optim import optimizer as optim
    from nanochat.ranks import print0
    from nanochat.run import checkpoint, faults
    from nanochat.run.saver import Saver
    from nanochat.run import (
        log as runlog,
    )
    from nanochat.run import memory as fit
    from nanochat.run import (
        plan as plans,
    )
    from nanochat.run import (
        profiler as profiling,
    )
    from nanochat.run import (
        resume as start,
    )
    from nanochat.run import (
        trackers as track,
    )

    if problems := plans.check_flags(args):
        raise UsageError("\n".join(problems))
    if args.dry_run:
        source = start.source_of_weights(args) if args.init_from else None
        vars(args).update(source.flags if source else {})
        return plans.dry_run(args, source and source.model)

    # ----- the machine
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    rank, world_size = ranks.rank(), ranks.world_size()
    main_rank = rank == 0

    # ----- the run folder: new, resumed, or refused
    args.model_tag = args.model_tag or ranks.from_rank0_or_raise(lambda: start.default_tag(args))
    folder = runlog.RunFolder(os.path.join(args.out_dir, args.model_tag))
    start_step, config = ranks.from_rank0_or_raise(lambda: start.open_run(args, folder))
    changed, extending = [], False
    if config:
        args, changed, extending = start.merge_with_run(args, config)
        if (over := start.is_over(args, config, folder, start_step)) and not extending:
            print0(over)
            ranks.close()
            return EXIT_COMPLETED
        changed += start.fit_to_machine(args, config, world_size)
    elif args.resume:
        print0(f"{folder.path} holds no run yet: starting a new one")
    start_step = start_step or 0
    source = None
    if args.init_from and not start_step:
        source = ranks.from_rank0_or_raise(
            lambda: start.source_of_weights(args, folder, config and config["init_from"]["step"])
        )
    vars(args).update(source.flags if source else {})
    args.core_metric_every, args.core_metric_max_per_task = plans.core_metric_flags(
        args, device_type
    )
    runtime = plans.pick_runtime(args, device_type)
    dtype, backend, no_compiler = runtime.dtype, runtime.attention, runtime.no_compiler
    peak, peak_label = ranks.from_rank0_or_raise(
        lambda: hardware.peak_flops(device)
    )  # measured on CPUs

    # ----- data and tokenizer (made on rank 0; the others then find them in the cache)
    corpus = ranks.from_rank0_or_raise(
        lambda: open_corpus(
            args.data, args.val_data, config["data"].get("revision", "") if config else "", print0
        )
    )
    if config and corpus.fingerprint != config["data"]["fingerprint"]:
        raise UsageError(
            f"--data={args.data}: the text is not what this run was started with (fingerprint {corpus.fingerprint[:16]} "
            f"instead of {config['data']['fingerprint'][:16]}); restore it, or start another run with --model-tag"
        )
    print0("\n".join(describe_corpus(corpus)))
    tokenizer = load_tokenizer(
        args.tokenizer,
        args.vocab_size,
        corpus,
        of_run=config and folder.path / "tokenizer",
        of_source=source and source.tokenizer,
        chosen="tokenizer" in args.given,
    )
    if config and tokenizer.fingerprint != config["tokenizer"]["fingerprint"]:
        raise UsageError(
            f"{folder.path}/tokenizer is not the tokenizer of this run; restore the original file"
        )
    saved_state = checkpoint.read_state(folder.path, start_step) if start_step else {}
    T = args.max_seq_len
    cache = TokenCache(tokenizer, torch.get_num_threads(), saved_state.get("shard_tokens"))
    rows = Rows(corpus, cache, T, args.seed)
    ranks.from_rank0_or_raise(
        lambda: cache.prepare(
            [*corpus.val, *rows.first_shards()],
            lambda shards: runlog.bar(shards, "tokenizing", "shard"),
        )
    )
    tokens_per_epoch = config["data"]["tokens_per_epoch"] if config else rows.tokens_per_epoch()
    pieces = held_out_pieces(
        corpus.val, cache, T, args.eval_tokens if args.eval_tokens != -1 else sys.maxsize
    )
    if not pieces and args.eval_every != -1:
        raise UsageError(
            f"--data={args.data}: no text is left to validate on; give more text, or --val-data, or --eval-every=-1"
        )
    prompts = ranks.from_rank0_or_raise(lambda: engine.sample_prompts(args, tokenizer, corpus))
    print0(describe_tokens(rows, tokens_per_epoch, pieces))

    # ----- the plan: derived at the first start, read back afterwards
    model_config = (
        GPTConfig(**config["model"])
        if config
        else source.model
        if source
        else plans.model_config(args, tokenizer.vocab_size)
    )
    plan = (
        plans.Plan(**config["plan"])
        if config
        else plans.make_plan(args, model_config, tokens_per_epoch, peak, world_size)
    )
    if extending:
        was = plan.num_iterations
        start_step = start.extend(
            args, plan, model_config, tokens_per_epoch, peak, world_size, folder, start_step
        )
        saved_state = checkpoint.read_state(folder.path, start_step) if start_step else {}
        changed.append(
            f"extended from {was} to {plan.num_iterations} steps"
            if plan.num_iterations
            else f"{was} steps to as many as fit into --target-minutes={args.target_minutes}"
        )
    if config:
        print0(
            f"resuming {folder.path} "
            + (
                f"from step {start_step}"
                if start_step
                else "from the start (it has no checkpoint yet)"
            )
            + (f"; changed: {', '.join(changed)}" if changed else "")
        )
    ranks.from_rank0_or_raise(lambda: check_disk(rows, plan.tokens, tokens_per_epoch))
    memory = fit.memory_of(
        args, model_config, plan.parameters, dtype, backend, not no_compiler, device_type
    )
    device_batch = ranks.from_rank0_or_raise(
        lambda: fit.pick_device_batch(
            args, plan, memory, fit.free_memory(device, world_size), world_size, device_type
        )
    )
    accumulation = plan.rows_per_step // (device_batch * world_size)
    print0(
        plans.format_plan(
            plans.describe(
                args,
                model_config,
                plan,
                device_batch,
                peak,
                peak_label,
                world_size,
                memory,
                tokens_per_epoch,
            )
        )
    )
    if advice := plans.long_run_advice(
        args, plan, plans.estimated_seconds(plan, args, peak, world_size)
    ):
        print0(advice)
    print0(plans.runtime_in_words(runtime, model_config, device_type, world_size))

    compressed = (
        config["data"]["compressed_bpb"]
        if config
        else ranks.from_rank0_or_raise(lambda: compressed_bits_per_byte(corpus.val))
    )
    print0(
        "held-out text compressed:",
        ", ".join(f"{name} {bits} bits per byte" for name, bits in compressed.items()),
    )

    core, no_core = core_metric.open_for_training(
        args,
        tokenizer,
        model_config,
        plan.flops_per_token,
        plans.ASSUMED_MFU * peak * world_size,
        torch.get_num_threads(),
    )

    # ----- from here on the disk changes: a signal waits until that is done
    stop.at_once = False
    ranks.from_rank0_or_raise(lambda: start.take_folder(folder, start_step))
    progress = runlog.Progress(start_step, plan.num_iterations, quiet=not main_rank)
    records = metrics, samples, answers = runlog.records(folder.path, progress.message)
    if main_rank:
        if config is None:
            if args.overwrite:
                folder.clear()
            tokenizer.save(folder.path / "tokenizer")
            config = start.first_config(
                args, plan, model_config, corpus, tokens_per_epoch, compressed, tokenizer, source
            )
            config |= {
                "hardware": hardware.describe(device),
                "runtime": {
                    "dtype": str(dtype),
                    "attention": backend,
                    "compiled": not no_compiler,
                    "world_size": world_size,
                    "device_batch_size": device_batch,
                    "peak_flops": peak,
                    "peak": peak_label,
                },
            }
        # before the new plan of an extended run, which they are no part of
        aside = checkpoint.set_aside_after(folder.path, start_step, print0)
        best_bpb = metrics.value_at(
            checkpoint.best_step(folder.path), "val/bpb"
        )  # of a line that may be cut below
        start.renew_config(
            config,
            args,
            plan,
            start_step,
            was if extending else None,
            aside and args.resume_from_step != -1,
        )
        folder.write_config(config)
        for record in records:
            record.keep_before(start_step)

    # ----- the state of the loop: all that must survive a restart besides tensors
    step = start_step
    state = {
        "training_seconds": 0.0,
        "skipped_steps": 0,
        "val_bpb": None,
        "min_val_bpb": None,
        "stale_evaluations": 0,
        "core_metric": None,
        "core_metric_n": None,
        "recent_losses": [],
        "shard_tokens": {},
        "tokenizer": tokenizer.fingerprint,
    }
    state |= {name: value for name, value in saved_state.items() if name in state}

    def position(at):
        """What every line of metrics begins with."""
        tokens = at * plan.total_batch_tokens
        return {
            "step": at,
            "tokens": tokens,
            "total_training_flops": tokens * plan.flops_per_token,
            "total_training_time": state["training_seconds"],
        }

    def summarize(status, reason=""):
        seconds = state["training_seconds"]
        speed = step * plan.total_batch_tokens / seconds if seconds else None
        summary = dict(
            status=status,
            reason=reason,
            **position(step),
            val_bpb=state["val_bpb"],
            min_val_bpb=state["min_val_bpb"],
            core_metric=state["core_metric"],
            core_metric_n=state["core_metric_n"],
            tok_per_sec=speed,
            mfu=speed and 100 * speed * plan.flops_per_token / (peak * world_size),
            peak_memory_bytes=hardware.peak_memory_bytes(device),
            skipped_steps=state["skipped_steps"],
        )
        try:
            folder.write_config(
                config
            )  # again: a full disk may have refused it when the steps were fixed
            runlog.write_summary(folder.path, **summary)
        except OSError as error:
            progress.message(f"config.json and summary.json cannot be written ({error})")
        return summary

    def log(**values):
        metrics.write(**values)
        trackers.log(values)

    def save(kind, loop_state, hold=False):
        optimizer_state = optimizer.state()  # all ranks: it gathers
        if main_rank:
            saver.save(
                step,
                kind,
                model,
                optimizer_state,
                {
                    **loop_state,
                    "recent_losses": list(loop_state["recent_losses"]),
                    "shard_tokens": dict(rows.cache.lengths),
                    "loss_scaler": scaler and scaler.state(),
                },
                hold,
            )

    def asked_meanwhile():
        watchdog.move(f"the evaluation of step {step}")
        return stop.requested

    def batches_of_steps(at):
        while plan.num_iterations is None or at < plan.num_iterations:
            yield [
                rows.batch(at, plan.rows_per_step, micro, device_batch, rank, world_size)
                for micro in range(accumulation)
            ]
            at += 1

    def forward_backward(batch, at, micro):
        """Backward pass of one micro-batch; returns its mean loss in nats, detached."""
        if model_config.dropout:  # seeded by step, so that resuming needs no generator state
            torch.manual_seed(stream_seed(args.seed, "dropout", at, micro, rank))
        inputs, targets = (torch.from_numpy(ids).to(device, non_blocking=True) for ids in batch)
        if scaler:
            return scaler.backward(model, inputs, targets, accumulation)
        loss = model(inputs, targets, reduction="mean")
        (loss / accumulation).backward()
        return loss.detach()

    def trial(n):
        """A pass of n rows that changes nothing but the gradients; it compiles what training runs."""
        forward_backward(
            rows.batch(start_step, plan.rows_per_step, 0, n, rank, world_size), start_step, 0
        )

    batches = ahead = trackers = saver = watchdog = profiler = None
    failure = (
        ""  # what ends the run with exit code 1 after all that can be saved is: no data, no disk
    )
    cache.report = progress.message
    finished, stopping, rolling_due, skipped_in_a_row, last_save = (
        False,
        False,
        False,
        0,
        time.monotonic(),
    )
    measured_seconds, measured_steps, smooth_loss, byte_counts = (
        0.0,
        0,
        None,
        tokenizer.byte_counts(),
    )
    evaluated, scored, before, reason = (
        None,
        None,
        None,
        "",
    )  # last step with bpb, with CORE; the state before; why the run ends early
    if main_rank:
        summarize("running")
    try:
        if main_rank:
            saver = Saver(
                folder.path, args.keep_last, progress.message, records, best_bpb
            )
            trackers = track.Trackers(
                folder.path,
                args.run,
                args.tensorboard,
                config,
                config["wandb_id"],
                start_step,
                progress.message,
                runlog.read_lines(metrics.path) if args.tensorboard or args.run != "dummy" else (),
            )
        stop.at_once = True
        stop.check()
        # ----- model and optimizer, then one pass that changes nothing: it compiles, so that step 0 starts on a warm machine
        model = build(
            model_config, device, dtype, backend, seed=stream_seed(args.seed, "model")
        )
        model.checkpointing = args.activation_checkpointing
        scaler = fp16.LossScaler(saved_state.get("loss_scaler")) if dtype == torch.float16 else None
        optimizer = optim.Optimizer(
            model.parameter_groups(), plan.groups, torch.float32 if scaler else dtype
        )
        if start_step:
            checkpoint.load_model(folder.path, start_step, model)
            optimizer.load(checkpoint.load_optimizer(folder.path, start_step))
        elif source:
            checkpoint.load_model(args.init_from, source.step, model)
        model.train()
        if runtime.fp8_recipe:
            fp8.convert(model, runtime.fp8_recipe)
        if not no_compiler:
            model.compile_parts()
        started = time.monotonic()
        key = [
            vars(model_config),
            *map(str, runtime),
            args.activation_checkpointing,
            hardware.describe(device),
        ]
        device_batch = fit.settle(
            trial, device_batch, args.device_batch_size != -1, plan, key, device, progress.message
        )
        optimizer.zero_grad()
        accumulation = plan.rows_per_step // (device_batch * world_size)
        if main_rank:
            config["runtime"] |= {"device_batch_size": device_batch, "world_size": world_size}
            summarize(
                "running"
            )  # writes it down: a resumed run takes as many rows at once, to the same last bit
        hardware.synchronize(device_type)
        progress.message(
            f"{'warmed up' if no_compiler else 'compiled'} in {human_time(time.monotonic() - started)}"
        )
        stop.at_once = False
        watchdog = faults.Watchdog(
            lambda text: print(
                f"rank {rank}: {text}" if world_size > 1 else text, file=sys.stderr, flush=True
            )
        )
        batches = Prefetcher(batches_of_steps(start_step), interrupted=lambda: stop.requested)
        profiler = profiling.Profiler(
            folder.path / "profile", device, args.profile and main_rank, progress.message
        )
        if (
            not corpus.eager and int(os.environ.get("LOCAL_RANK", 0)) == 0
        ):  # one process a machine reads ahead
            ahead = Ahead(rows, start_step * plan.rows_per_step, plan.last_row, progress.message)

        # ----- the loop; it runs once more than there are updates, so that the last save and evaluation need no second copy
        while True:
            finished = (
                bool(reason)
                and not stopping
                or plan.num_iterations is not None
                and step >= plan.num_iterations
            )

            # save: before everything that might fail
            kind = None
            if finished:
                kind = "final"
            elif (
                plan.num_iterations is not None
                and plan.warmdown_steps
                and step == plan.num_iterations - plan.warmdown_steps
            ):
                kind = "before_warmdown"
            elif args.save_every != -1 and step > 0 and step % args.save_every == 0:
                kind = "permanent"
            elif rolling_due or stopping:
                kind = "rolling"
            if kind and not args.no_save and (step > start_step or kind == "final"):
                # what follows a step with bad numbers may be no good either: it is not written before a step was good again
                save(
                    kind,
                    before if step in (evaluated, scored) else state,
                    hold=bool(skipped_in_a_row) and not (finished or stopping),
                )
                last_save = time.monotonic()

            # evaluate: all ranks
            evaluation_due = (
                args.eval_every != -1 and step > 0 and (finished or step % args.eval_every == 0)
            )
            if evaluation_due and evaluated != step and not stopping:
                before = dict(
                    state
                )  # for the checkpoint of this step: a resumed run repeats the evaluation
                try:
                    result = evaluate.bits_per_byte(
                        model,
                        pieces,
                        byte_counts,
                        device_batch * T,
                        device,
                        interrupted=asked_meanwhile,
                    )
                except evaluate.EvaluationFailed as error:
                    progress.message(
                        f"step {step}: the evaluation failed, training goes on ({error})"
                    )
                    state["val_bpb"] = None
                    if main_rank:
                        log(
                            **position(step),
                            **{"val/bpb": None, "val/loss": None, "reason": str(error)},
                        )
                else:
                    if (
                        result is None
                    ):  # told to stop in the middle: once more round, to save and leave
                        stopping = True
                        continue
                    state["val_bpb"] = result["bpb"]
                    better = result["bpb"] < (state["min_val_bpb"] or math.inf)
                    state["min_val_bpb"] = min(result["bpb"], state["min_val_bpb"] or math.inf)
                    state["stale_evaluations"] = 0 if better else state["stale_evaluations"] + 1
                    reason = plans.early_end(args, result["bpb"], state["stale_evaluations"])
                    if (
                        better and (args.patience != -1 or reason) and not args.no_save
                    ):  # the model that the rule is there for
                        save("rolling", before)
                    if main_rank:
                        log(
                            **position(step),
                            **{"val/bpb": result["bpb"], "val/loss": result["loss"]},
                        )
                        progress.message(
                            f"step {step}: val/bpb {result['bpb']:.4f}, val/loss {result['loss']:.4f} nats a token "
                            f"({result['tokens']:,} tokens, {result['bytes']:,} bytes)"
                        )
                        saver.mark_best(step, result["bpb"])
                evaluated = step
                if main_rank:
                    summarize("running")
                if reason and not finished:  # once more round, to save and leave
                    progress.message(f"step {step}: ending here, {reason}")
                    continue

            # CORE: all ranks
            core_due = (
                args.core_metric_every != -1
                and step > 0
                and (finished or step % args.core_metric_every == 0)
            )
            if core_due and scored != step and not stopping:
                before = before if evaluated == step else dict(state)
                result = core_metric.measure(
                    core,
                    no_core,
                    model,
                    device_batch * T,
                    device,
                    asked_meanwhile,
                    lambda share, task, left: progress.meanwhile(
                        f"step {step}: CORE {share:.0%}, {task} | eta {human_time(left)}"
                    ),
                )
                if result is None:  # told to stop
                    stopping = True
                    continue
                scored, state["core_metric"], state["core_metric_n"] = (
                    step,
                    result["core_metric"],
                    result["n"],
                )
                if main_rank:
                    log(**position(step), **core_metric.as_metrics(result))
                    core_metric.write_lines(answers, step, result)
                    progress.message(f"step {step}: {core_metric.in_words(result)}")
                    summarize("running")

            # sample: rank 0; the others wait for its word whether it was told to stop meanwhile
            if (
                args.sample_every != -1
                and step > 0
                and (finished or step % args.sample_every == 0)
                and not stopping
            ):
                watchdog.move(f"the samples of step {step}")
                for prompt, text, problem in engine.draw_samples(
                    model, tokenizer, prompts if main_rank else [], args.seed, step, stop
                ):
                    samples.write(
                        step=step,
                        prompt=prompt,
                        text=text,
                        **({"reason": problem} if problem else {}),
                    )
                    if problem:
                        progress.message(
                            f"step {step}: sampling failed, training goes on ({problem})"
                        )
                    else:
                        trackers.text(step, prompt, text)
                        progress.message(
                            f"--- sample at step {step}, prompt {prompt!r}\n{prompt}{text}"
                        )

                if ranks.from_rank0(
                    stop.requested
                ):  # once more round, to save and leave; a resumed run samples here again
                    stopping = True
                    continue

            # stop?
            if finished or stopping:
                break

            # step: zero grad, batch, forward, loss, backward, clip, set lr, update, count
            profiler.step(step)
            hardware.synchronize(device_type)
            step_started = time.monotonic()
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            try:
                micro_batches = next(batches)
                for micro, batch in enumerate(micro_batches):
                    optimizer.early = (
                        micro == accumulation - 1 and not scaler
                    )  # gradients travel while others are being made
                    loss += forward_backward(batch, step, micro) / accumulation
            except (
                DataFailed,
                UsageError,
            ) as error:  # the other ranks are in this step: take part, then save and leave
                failure = str(error)
                optimizer.zero_grad(to_zeros=True)
            if scaler:
                scaler.unscale(optimizer.parameters)
            grad_norm = optimizer.reduce()
            # one more exchange: mean loss, was any rank told to stop, has one no data; from rank 0, whose clock counts: is a
            # rolling checkpoint due, is the time budget measured
            measured = (
                main_rank
                and plan.num_iterations is None
                and measured_steps >= 5
                and measured_seconds >= 6 * args.target_minutes
            )
            due = (
                main_rank
                and args.save_every_minutes != -1
                and not args.no_save
                and not saver.busy()
                and not saver.can_retry()
                and time.monotonic() - last_save > 60 * args.save_every_minutes
            )
            votes = ranks.sum_over_ranks(
                torch.stack(
                    [
                        loss / world_size,
                        *loss.new_tensor([stop.requested, due, measured, bool(failure)]),
                    ]
                )
            )
            loss, stopping, rolling_due, measured, no_data, grad_norm = torch.cat(
                (votes, grad_norm[None])
            ).tolist()
            stopping = stopping > 0
            if no_data:  # told to stop while waiting for it, or it cannot be had
                failure = "" if stopping else next(filter(None, ranks.from_all(failure)))
                stopping = True
                optimizer.drop_gradients()
                continue
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite and args.grad_clip:
                optimizer.clip(grad_norm, args.grad_clip)
            multiplier = plan.lr_multiplier(step, args)
            if finite:
                optimizer.step(multiplier, schedules.muon_momentum(step))
            else:
                optimizer.drop_gradients()
            hardware.synchronize(device_type)
            dt = time.monotonic() - step_started
            step += 1

            # log: the line of the state before the update, with the loss of the update
            z = faults.spike(loss, state["recent_losses"]) if finite else None
            speed = plan.total_batch_tokens / dt
            mfu = 100 * speed * plan.flops_per_token / (peak * world_size)
            if main_rank:
                log(
                    **position(step - 1),
                    **{
                        "train/loss": loss,
                        "train/lr": plan.groups["matrices"]["lr"] * multiplier,
                        "train/lrm": multiplier,
                        "train/grad_norm": grad_norm,
                        "train/dt": dt,
                        "train/tok_per_sec": speed,
                        "train/mfu": mfu,
                        "train/epoch": (step - 1) * plan.total_batch_tokens / tokens_per_epoch,
                    },
                    **({} if z is None else {"spike": z}),
                    **({"train/loss_scale": scaler.scale} if scaler else {}),
                    **(
                        {}
                        if finite
                        else {
                            "skipped": "non-finite loss"
                            if not math.isfinite(loss)
                            else "non-finite gradient"
                        }
                    ),
                )
            state["training_seconds"] += dt
            measured_seconds, measured_steps = measured_seconds + dt, measured_steps + 1
            for remark in faults.remarks(
                step, loss, z, state["recent_losses"], None if source else tokenizer.vocab_size
            ):
                progress.message(remark)
            # a scale that is too large for the gradients is no fault; a loss that is not finite has nothing to do with it
            lowered = scaler and math.isfinite(loss) and scaler.update(finite)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + (not lowered)
            if finite and main_rank:
                saver.release()
                saver.retry()
            if not finite:
                state["skipped_steps"] += 1
                progress.message(
                    f"step {step - 1}: loss {loss}, gradient norm {grad_norm}: not finite, so the weights were left alone"
                    + (
                        f"; fp16 overflowed, the loss is scaled by {scaler.scale:g} from here on"
                        if lowered
                        else ""
                    )
                )
                if not lowered and (args.debug_nans or skipped_in_a_row >= args.max_skipped):
                    optimizer.zero_grad()
                    located = faults.locate(
                        model,
                        lambda: [
                            forward_backward(batch, step - 1, micro)
                            for micro, batch in enumerate(micro_batches)
                        ],
                    )
                    raise TrainingFailed(
                        faults.conclude(
                            located,
                            skipped_in_a_row,
                            folder.path,
                            rows,
                            step - 1,
                            plan.rows_per_step,
                            saver,
                        )
                    )
            if measured:
                left = 60 * args.target_minutes - state["training_seconds"]
                plan.fix_steps(
                    ranks.from_rank0(
                        step + max(1, round(left * measured_steps / measured_seconds))
                    ),
                    args,
                    done=step,
                )
                if main_rank:
                    config["plan"] = plan.as_dict()
                    summarize("running")
                    trackers.update_config(config)
                    progress.message(
                        f"time budget: {plan.num_iterations} steps at {1000 * measured_seconds / measured_steps:.0f} ms, "
                        f"{plan.tokens:,} tokens; warm-down over the last {plan.warmdown_steps}"
                    )
            watchdog.step(step, dt)
            smooth_loss = (
                loss if smooth_loss is None or not finite else 0.95 * smooth_loss + 0.05 * loss
            )
            left = (
                (plan.num_iterations - step) * measured_seconds / measured_steps
                if plan.num_iterations is not None
                else None
            )
            progress.update(
                step,
                plan.num_iterations,
                f"loss {smooth_loss:.4f} | {speed:,.0f} tok/s | mfu {mfu:.1f}%",
                left,
            )

        # ----- the end
        failure = "; ".join(
            filter(None, (failure, ranks.from_rank0(saver.finish() if main_rank else "")))
        )
        completed = finished and not stopping and not failure
        code = EXIT_FAILED if failure else EXIT_COMPLETED if completed else EXIT_STOPPED
        if main_rank:
            status = "failed" if failure else "completed" if completed else "stopped"
            summary = summarize(
                status, failure or reason or ("" if completed else "asked to stop by a signal")
            )
    except BaseException as error:
        error = faults.cause(error, device_batch, stop, watchdog.usual() if watchdog else 0.0)
        stopped = isinstance(error, (KeyboardInterrupt, signals.Stopped))
        if main_rank:
            why = "asked to stop by a signal" if stopped else f"{type(error).__name__}: {error}"
            summary = summarize(
                "stopped" if stopped else "failed", why
            )  # first of all: Ctrl-C may end what is waited for below
            if saver is not None and not isinstance(
                error, KeyboardInterrupt
            ):  # who interrupts twice waits for nothing
                saver.wait()
            if trackers:
                trackers.finish(summary, EXIT_STOPPED if stopped else EXIT_FAILED)
        raise error
    finally:
        for worker in filter(None, (batches, ahead, watchdog, saver, profiler, *records)):
            worker.close()
        progress.close()

    if main_rank:
        trackers.finish(summary, code)
        print0(
            start.last_words(
                args, folder, step, state, completed, failure, hardware.peak_memory_bytes(device)
            )
        )
    ranks.close()
    return code


def run(argv=None):
    """parse_args() and main() with errors as messages and exit codes."""
    stop = signals.StopSignals(speaks=os.environ.get("RANK", "0") == "0")
    try:
        return main(parse_args(argv), stop)
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except signals.Stopped:
        print("train.py: stopped, as asked, before a step was done", file=sys.stderr)
        return EXIT_STOPPED
    except (TrainingFailed, Unavailable) as error:
        print(f"train.py: training failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return EXIT_STOPPED
    except RuntimeError as error:
        from nanochat.ranks import is_lost_exchange

        if not (stop.requested and is_lost_exchange(error)):
            raise
        print(
            "train.py: stopped, as asked, during the set-up: the other ranks were told as well",
            file=sys.stderr,
        )
        return EXIT_STOPPED
    finally:
        stop.restore()


if __name__ == "__main__":
    signals.exit_with(run)
