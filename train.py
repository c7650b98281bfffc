"""Train a GPT. One script, one dial:

    python train.py --depth=4                                            # on a laptop
    torchrun --standalone --nproc_per_node=8 -- train.py --depth=24      # on a node

Read it from the bottom of main(): open the run and its text, derive the plan from the dial, build
the parts, train. The loop in train() is save / evaluate / CORE / sample / agree / step / log. The
flags are described in nanochat/run/flags.py. Modules that need torch are imported by the functions
that use them, so that --help and a wrong flag answer immediately."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat import output, signals
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    TrainingFailed,
    UsageError,
    human_time,
    stream_seed,
)
from nanochat.optim import schedules
from nanochat.run import flags
from nanochat.run.exits import exit_code_of

if TYPE_CHECKING:
    import torch

    from nanochat.data.prefetch import Prefetcher
    from nanochat.eval.core import Core
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder
    from nanochat.optim.loss_scaler import LossScaler
    from nanochat.optim.optimizer import Optimizer
    from nanochat.run.clock import Clock
    from nanochat.run.control import Control
    from nanochat.run.keeper import Keeper
    from nanochat.run.lifecycle import Taken
    from nanochat.run.log import RunLog, StepResult
    from nanochat.run.plan import Machine, Plan
    from nanochat.run.plan_text import PlannedRun
    from nanochat.run.profiler import Profiler
    from nanochat.run.resume import OpenedRun
    from nanochat.run.state import TrainState
    from nanochat.run.training_text import TrainingText


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The flags of nanochat/run/flags.py as a Namespace; `given` on it is the set of names that
    were on the command line. -1: off or automatic."""
    return flags.parse(argv)


# ----- the dial


def derive_plan(
    args: Namespace, config: GPTConfig, tokens_per_epoch: float, machine: Machine
) -> Plan:
    """Everything that follows from the model's size, in four steps; runs/LOG.md has the evidence.

    args: checked flags. tokens_per_epoch: training tokens of one pass. machine: for time budgets.
    UsageError for a warm-up that is longer than the run."""
    from nanochat.run.plan import Horizon, Plan, size_of

    # N, and the tokens of the reference model that all rules are scaled from.
    size = size_of(config, args.aspect_ratio)
    T = config.max_seq_len

    # 1. Horizon: D tokens, from the first horizon given, by default a fixed ratio to the N
    #    parameters of matrices and head (Chinchilla, arXiv 2203.15556: 20; ours is lower).
    horizon = Horizon.from_flags(args)
    tokens = horizon.tokens(size, machine, tokens_per_epoch, args.total_batch_size)

    # 2. Batch: grows as D^0.383 (arXiv 2505.13738), and leaves small budgets enough steps. A time
    #    budget also gets a batch large enough that Muon's update takes at most a quarter of the
    #    passes' FLOPs. After this, D is a whole number of steps.
    device_rows = max(1, args.device_batch_size) * machine.devices
    least = 1
    if horizon.name == "target_minutes" and args.optimizer == "muon":
        least = schedules.timed_batch_tokens(tokens, size.muon_flops, size.flops_per_token)
    rows = args.total_batch_size // T
    if args.total_batch_size == -1:
        rows = schedules.derive_rows(tokens, size.reference_tokens, T, device_rows, least)
    batch_tokens = rows * T
    steps = horizon.steps(tokens, batch_tokens)
    tokens = steps * batch_tokens

    # 3. Learning rates: those of the reference batch x sqrt(B / B_ref), constant below 2^16 tokens;
    #    for tables of many rows below 2^17.
    lr_factor = schedules.lr_factor(batch_tokens)
    table_factor = schedules.table_factor(batch_tokens, config.vocab_size)

    # 4. Weight decay: the share of a weight that is renewed over a run stays the same (constant
    #    T_epoch, arXiv 2405.13698).
    decay_factor = schedules.decay_factor(batch_tokens, tokens, size.reference_tokens)

    # What the flags give are the rates of the reference; the factors apply to all of them.
    base = schedules.BaseRates.from_flags(args)
    plan = Plan(
        horizon=horizon.name,
        horizon_value=horizon.value,
        parameters=size.parameters,
        scaling_parameters=size.scaling_parameters,
        flops_per_token=size.flops_per_token,
        rows_per_step=rows,
        total_batch_tokens=batch_tokens,
        num_iterations=steps,
        tokens=tokens,
        warmup_steps=0,
        warmdown_steps=0,
        groups=schedules.group_settings(base, lr_factor, decay_factor, config.width, table_factor),
        schedule=schedules.Schedule.from_flags(args),
    )
    plan.fix_steps(steps)
    if args.warmup_steps != -1 and plan.warmup_steps + plan.warmdown_steps > steps:
        raise UsageError(
            f"--warmup-steps={args.warmup_steps}: together with {plan.warmdown_steps} steps of "
            f"warm-down longer than the run's {steps} steps; give at most "
            f"{steps - plan.warmdown_steps}"
        )
    # where --num-iterations says so, check_flags() has refused it before the data was read
    if plan.budget_seconds is None and max(flags.listed_steps(args.save_at), default=0) > steps:
        raise UsageError(
            f"--save-at={args.save_at}: beyond the run's {steps} steps; give steps up to {steps}"
        )
    if plan.budget_seconds is not None:
        # the number of steps is fixed once the speed has been measured
        plan.num_iterations = plan.scheduled_steps = None
    return plan


# ----- a run that is about to train


@dataclass
class Prepared:
    """What is decided before the run folder changes. core: None where CORE cannot be measured, for
    the reason no_core ("" if it is not wanted). prompts: of the samples."""

    run: OpenedRun
    text: TrainingText
    planned: PlannedRun
    device: torch.device
    core: Core | None
    no_core: str
    prompts: list[str]


@dataclass
class Session:
    """A run with all its parts, ready to train. device_batch: rows that a device takes per pass."""

    run: OpenedRun
    text: TrainingText
    plan: Plan
    device: torch.device
    device_batch: int
    core: Core | None
    no_core: str
    prompts: list[str]
    model: Decoder
    optimizer: Optimizer
    scaler: LossScaler
    state: TrainState
    clock: Clock
    log: RunLog
    keeper: Keeper
    batches: Prefetcher
    profiler: Profiler
    stop: signals.StopSignals
    control: Control
    ends_early: bool = True

    @property
    def args(self) -> Namespace:
        """The flags of the run."""
        return self.run.args

    @property
    def batch_tokens(self) -> int:
        """Tokens that a device takes per pass, also in evaluations."""
        return self.device_batch * self.args.max_seq_len

    def dropout_seed(self, micro: int, step: int | None = None) -> int | None:
        """Seed of a micro-batch's dropout on this rank, so that resuming needs no generator
        state. step: the present one if None."""
        from nanochat.ranks import rank

        if not self.args.dropout:
            return None
        step = self.state.step if step is None else step
        return stream_seed(self.args.seed, "dropout", step, micro, rank())


# ----- the loop


def train(session: Session) -> str:
    """The loop. It comes round once more than there are updates, so that the last save and
    evaluation need no second copy.

    Returns the rule for an early end that its last evaluation met, or "". Stopped, DataFailed and
    TrainingFailed are raised on every rank at the same step."""
    from nanochat.optim.step import accumulate
    from nanochat.run import faults
    from nanochat.run.log import StepResult
    from nanochat.run.orders import agree
    from nanochat.run.plan import due

    args, plan, state = session.args, session.plan, session.state
    model, optimizer, scaler = session.model, session.optimizer, session.scaler
    log, clock, keeper = session.log, session.clock, session.keeper
    save_at = flags.listed_steps(args.save_at)
    rolling_due = False
    ended_early = ""

    while True:
        last = plan.is_last(state.step)

        # save: before everything that might fail
        kind = plan.checkpoint_due(state.step, last, args.save_every, save_at)
        if kind or rolling_due:
            keeper.save(kind or "rolling", state, hold=state.skipped_in_a_row > 0 and not last)

        # evaluate: all ranks; an evaluation that fails is a result without a number
        if due(args.eval_every, state.step, last):
            ended_early = evaluate(session)
            if ended_early and not last:
                log.message(f"step {state.step}: ending here, {ended_early}")
                keeper.save("final", state)
                last = True

        # CORE: all ranks
        if due(args.core_metric_every, state.step, last):
            evaluate_core(session)

        # sample: rank 0, the others wait for it
        if due(args.sample_every, state.step, last):
            sample(session)

        if last:
            return ended_early

        # agree: one exchange, so that all ranks hear the same and leave at the same step
        micro_batches, rolling_due = agree(session)

        # step: forward and backward over the micro-batches, average, clip, update
        session.profiler.step(state.step)
        lr_multiplier = plan.lr_multiplier(state.step)
        with clock.step(state.step):
            optimizer.zero_grad()
            mean_loss = accumulate(
                model, optimizer, scaler, micro_batches, session.device, session.dropout_seed
            )
            loss, grad_norm = optimizer.reduce(mean_loss, scaler)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                optimizer.clip(grad_norm, args.grad_clip)
                optimizer.step(lr_multiplier, schedules.muon_momentum(state.step))
            else:
                optimizer.drop_gradients()

        # log: the line of the state before the update, with the loss of the update
        spike = faults.spike(loss, state.recent_losses, finite)
        result = StepResult(loss, grad_norm, finite, lr_multiplier, clock.step_seconds, spike)
        log.step(result, scaler, clock)

        # count: an fp16 loss scale that was too large is no fault, a bad loss has other causes
        overflowed = scaler.update(finite) if math.isfinite(loss) else False
        state.advance(clock.counted_seconds, finite, overflowed, scaler.state())
        if keeper.after_step(finite):
            log.summarize("running")
        if not finite:
            note_skipped(session, result, overflowed, micro_batches)


def evaluate(session: Session) -> str:
    """Validation bits per byte. Returns why the run ends early because of them, or ""."""
    from nanochat.eval.bpb import bits_per_byte
    from nanochat.eval.unison import EvaluationFailed
    from nanochat.run.orders import interrupted, undisturbed
    from nanochat.run.plan import early_end

    args, text, log, scores = session.args, session.text, session.log, session.log.scores
    step = session.state.step
    score = functools.partial(
        bits_per_byte,
        session.model,
        text.held_out,
        text.byte_counts,
        session.batch_tokens,
        session.device,
        functools.partial(interrupted, session),
    )
    try:
        result = undisturbed(session, score)
    except EvaluationFailed as error:
        scores.add_bpb(None)
        log.message(f"step {step}: the evaluation failed, training continues ({error})")
        log.line(**{"val/bpb": None, "val/loss": None, "reason": str(error)})
        log.summarize("running")
        return ""
    # Before the line is written: the rule for an early end counts this evaluation too.
    better = scores.add_bpb(result.bpb)
    reason = early_end(args.stop_at_bpb, args.patience, result.bpb, scores.stale_evaluations)
    # --stop-at-bpb and --patience exist to keep this model
    if better and (args.patience != -1 or reason):
        session.keeper.save("rolling", session.state)
    log.line(**{"val/bpb": result.bpb, "val/loss": result.loss})
    log.message(
        f"step {step}: val/bpb {result.bpb:.4f}, val/loss {result.loss:.4f} nats a token "
        f"({result.tokens:,} tokens, {result.bytes:,} bytes)"
    )
    session.keeper.mark_best(step, result.bpb)
    log.summarize("running")
    return reason


def evaluate_core(session: Session) -> None:
    """The CORE metric; where it fails, a result without a number."""
    from nanochat.eval.core import as_metrics, in_words, measure, write_lines
    from nanochat.run.orders import interrupted, undisturbed

    log, step = session.log, session.state.step

    def show(share: float, task: str, seconds_left: float) -> None:
        log.meanwhile(f"step {step}: CORE {share:.0%}, {task} | eta {human_time(seconds_left)}")

    score = functools.partial(
        measure,
        session.core,
        session.no_core,
        session.model,
        batch_tokens=session.batch_tokens,
        device=session.device,
        interrupted=functools.partial(interrupted, session),
        progress=show,
    )
    result = undisturbed(session, score)
    log.scores.add_core(result.core_metric, result.n)
    log.line(**as_metrics(result))
    if log.writes:
        write_lines(log.core, step, result)
    log.message(f"step {step}: {in_words(result)}")
    log.summarize("running")


def sample(session: Session) -> None:
    """Text samples on rank 0, while the others wait. Raises Stopped on all ranks if one was asked
    to stop meanwhile; a resumed run then samples here again."""
    from nanochat.eval.generation import draw_samples
    from nanochat.optim.sharding import passes_of_its_own
    from nanochat.run.orders import attend

    log, step = session.log, session.state.step
    samples = draw_samples(
        session.model,
        session.text.tokenizer,
        session.prompts if log.writes else [],
        session.args.seed,
        step,
        session.stop,
    )
    for _ in session.prompts:
        session.clock.begin(f"the samples of step {step}")
        # none on the other ranks, and after a signal
        with passes_of_its_own(session.model):
            drawn = next(samples, None)
        if drawn is not None:
            log.sample(drawn.prompt, drawn.text, drawn.problem)
        attend(session)


def note_skipped(
    session: Session, result: StepResult, overflowed: bool, micro_batches: list
) -> None:
    """Report that the step before was skipped. TrainingFailed after too many of them in a row."""
    from nanochat.run import faults

    args = session.args
    session.log.skipped(result, overflowed, session.scaler)
    if faults.gives_up(session.state, overflowed, args.max_skipped, args.debug_nans):
        raise TrainingFailed(locate_fault(session, micro_batches))


def locate_fault(session: Session, micro_batches: list) -> str:
    """The message of a run that ends because of non-finite numbers: where the first one came from
    in the step before, and what is saved. All ranks."""
    from nanochat.optim.step import forward_backward
    from nanochat.run import faults

    state, n = session.state, len(micro_batches)
    session.optimizer.zero_grad()

    def repeat() -> list[torch.Tensor]:
        # with the dropout that the step had, which is counted already
        return [
            forward_backward(
                session.model,
                session.scaler,
                batch,
                n,
                session.device,
                session.dropout_seed(micro, state.step - 1),
            )
            for micro, batch in enumerate(micro_batches)
        ]

    located = faults.locate(session.model, repeat)
    session.keeper.wait()
    folder, rows = session.run.folder.path, session.text.rows
    return faults.conclude(located, state, folder, rows, session.plan.rows_per_step)


# ----- from flags to a run


def main(args: Namespace, stop: signals.StopSignals) -> int:
    """Train. stop: of this process. Returns the exit code: 0 completed, 75 stopped on request and
    resumable, 1 ended by a lack of data, or with a last save that failed.

    Raises UsageError, TrainingFailed, Stopped."""
    # torch's allocator warns of every block that is older than the trace
    if args.profile:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from nanochat import hardware, ranks
    from nanochat.run import lifecycle
    from nanochat.run.checks import check_flags
    from nanochat.run.resume import open_run, values_in_force

    # A plan is made by one process, whatever another program left in the environment.
    if not args.dry_run:
        ranks.check_environment()
    if problems := check_flags(values_in_force(args)):
        raise UsageError("\n".join(problems))
    if args.dry_run:
        dry_run(args)
        # the plan is all that was asked for
        if lost := output.lost():
            print(f"train.py: {lost}", file=sys.stderr)
        return EXIT_FAILED if lost else EXIT_COMPLETED
    # Before the first tensor: determinism, kernel caches and the heap are set up per process.
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    run = open_run(args, device_type)
    if run.over:
        ranks.print0(run.over)
    else:
        with contextlib.closing(lifecycle.open_control(run, stop)) as control:
            prepared = prepare(run, device)
            # from here on the disk changes: a signal waits until that is done
            stop.at_once = False
            taken = take_run_folder(prepared)
            build = functools.partial(build_session, prepared, taken, stop, control)
            code = lifecycle.train_to_its_end(taken, build, train, stop, control)
    ranks.close()
    return EXIT_COMPLETED if run.over else code


def dry_run(args: Namespace) -> None:
    """Print the plan without reading data or building weights, or a table of plans."""
    import json

    import torch

    from nanochat import hardware
    from nanochat.data.rows import token_cache_bytes
    from nanochat.data.sources import estimated_bytes
    from nanochat.data.tokenizer import EXPECTED_BYTES_PER_TOKEN, expected_vocab_size
    from nanochat.run.memory import free_memory
    from nanochat.run.plan import Machine, model_config
    from nanochat.run.plan_text import as_json, fit_plan, format_plan, long_run_advice, on_gpus
    from nanochat.run.resume import source_of_weights
    from nanochat.run.runtime import pick_runtime, runtime_in_words
    from nanochat.run.scaling_text import format_table, table_as_json, table_of

    # Its shape and context replace the flags', as in a real run.
    source = source_of_weights(args) if args.init_from else None
    if source:
        vars(args).update(source.flags)
    # From the data sheet, since that GPU need not be in this machine.
    gpu = hardware.listed_gpu(args.gpu) if args.gpu else None
    if gpu:
        device_type = "cuda"
        free_bytes = gpu.memory_bytes
        peak = gpu.peak_flops, hardware.peak_label(gpu, args.gpu)
    else:
        device_type = hardware.pick_device_type(args.device_type)
        device = torch.device(device_type)
        free_bytes = free_memory(device, args.gpus)
        peak = hardware.peak_flops(device)
    runtime = pick_runtime(args, device_type, gpu)
    n_bytes = estimated_bytes(args.data)
    tokens_per_epoch = n_bytes / EXPECTED_BYTES_PER_TOKEN.get(args.tokenizer, 4)
    if source:
        config = source.model
    else:
        vocab_size = expected_vocab_size(args.tokenizer, args.vocab_size, n_bytes)
        config = model_config(args, vocab_size)

    def plan_for(devices: int) -> PlannedRun:
        machine = Machine(device_type, devices, *peak)
        plan = derive_plan(args, config, tokens_per_epoch, machine)
        planned = fit_plan(args, plan, config, machine, runtime, tokens_per_epoch, free_bytes)
        cached = token_cache_bytes(plan.tokens, tokens_per_epoch, config.vocab_size)
        planned = dataclasses.replace(planned, gpu_price=args.gpu_price, token_cache_bytes=cached)
        return on_gpus(planned, gpu, args.gpu_network) if gpu else planned

    if args.gpus == "all":
        table = table_of(args.gpu, plan_for)
        print(json.dumps(table_as_json(table), indent=2) if args.json else format_table(table))
        return
    planned = plan_for(args.gpus)
    if args.json:
        print(json.dumps(as_json(planned), indent=2))
        return
    print(format_plan(planned))
    print(runtime_in_words(runtime, config, device_type, args.gpus))
    if advice := long_run_advice(planned):
        print(advice)


def prepare(run: OpenedRun, device: torch.device) -> Prepared:
    """Open the text, derive the plan or read it back, and print both; every rank. Nothing in the
    run folder changes."""
    import torch

    from nanochat import hardware
    from nanochat.data.rows import check_disk, token_cache_bytes
    from nanochat.eval.core import open_for_training
    from nanochat.eval.generation import sample_prompts
    from nanochat.machines import on_each_machine
    from nanochat.ranks import from_rank0_or_raise, print0, world_size
    from nanochat.run import lifecycle
    from nanochat.run.memory import free_memory
    from nanochat.run.plan import Machine
    from nanochat.run.plan_text import fit_plan, format_plan, long_run_advice
    from nanochat.run.runtime import pick_runtime, runtime_in_words
    from nanochat.run.training_text import open_text

    args = run.args
    # Refused before any text is read: a compute dtype or backend that this machine lacks.
    runtime = pick_runtime(args, device.type)
    # on CPUs the peak is measured, so all ranks take rank 0's
    peak = from_rank0_or_raise(lambda: hardware.peak_flops(device))
    machine = Machine(device.type, world_size(), *peak)
    text = open_text(run)
    config, plan = open_plan(run, text, machine)
    run.take_over_changes()
    if run.config:
        print0(lifecycle.resumed_in_words(run))

    def look_at_disk() -> None:
        if to_come := check_disk(text.rows, plan.tokens, text.tokens_per_epoch):
            print0(to_come)

    on_each_machine(look_at_disk)
    free_bytes = free_memory(device, machine.devices)
    planned = from_rank0_or_raise(
        lambda: fit_plan(args, plan, config, machine, runtime, text.tokens_per_epoch, free_bytes)
    )
    cached = token_cache_bytes(plan.tokens, text.tokens_per_epoch, config.vocab_size)
    planned = dataclasses.replace(planned, token_cache_bytes=cached)
    print0(format_plan(planned))
    if advice := long_run_advice(planned):
        print0(advice)
    print0(runtime_in_words(runtime, config, device.type, machine.devices))
    prompts = []
    if args.sample_every != -1:
        prompts = run.saved_prompts or from_rank0_or_raise(
            lambda: sample_prompts(args.sample_prompts, text.tokenizer, text.corpus)
        )
    core, no_core = open_for_training(
        every=args.core_metric_every,
        max_per_task=args.core_metric_max_per_task,
        bundle=args.core_bundle,
        tokenizer=text.tokenizer,
        config=config,
        flops_per_token=plan.flops_per_token,
        flops=machine.assumed_flops,
        threads=torch.get_num_threads(),
    )
    return Prepared(run, text, planned, device, core, no_core, prompts)


def open_plan(run: OpenedRun, text: TrainingText, machine: Machine) -> tuple[GPTConfig, Plan]:
    """The model and the plan: derived when a run first starts, read back afterwards, and changed
    only where a longer horizon extends the run."""
    from nanochat.model.config import GPTConfig
    from nanochat.run.plan import Plan, model_config
    from nanochat.run.resume import extend

    args = run.args
    if run.config is None:
        config = model_config(args, text.tokenizer.vocab_size)
        if run.source:
            config = run.source.model
        return config, derive_plan(args, config, text.tokens_per_epoch, machine)
    config = GPTConfig(**run.config["model"])
    plan = Plan.from_config(run.config)
    if run.extending:
        # The batch is frozen, so only the number of steps may come out longer.
        at_this_batch = {**vars(args), "total_batch_size": plan.total_batch_tokens}
        fresh = derive_plan(Namespace(**at_this_batch), config, text.tokens_per_epoch, machine)
        extend(run, plan, fresh)
    return config, plan


def take_run_folder(prepared: Prepared) -> Taken:
    """Claim the run folder, write its config.json, and open what is written into it."""
    from nanochat.run.lifecycle import Taken

    text = prepared.text
    taken = Taken(
        prepared.run,
        prepared.planned,
        prepared.device,
        data=text.facts(),
        tokenizer=text.tokenizer,
        tokens_per_epoch=text.tokens_per_epoch,
        prompts=prepared.prompts,
    )
    text.rows.cache.report = taken.log.progress.message
    return taken


def build_session(
    prepared: Prepared,
    taken: Taken,
    stop: signals.StopSignals,
    control: Control,
    workers: contextlib.ExitStack,
) -> Session:
    """Build model and optimizer, load what they resume from, compile, and start what works ahead.

    workers: gets what has to be closed at the end."""
    from nanochat.data.prefetch import Ahead, Prefetcher
    from nanochat.ranks import local_rank
    from nanochat.run import checkpoint, lifecycle
    from nanochat.run.keeper import Keeper
    from nanochat.run.profiler import Profiler

    run, text, planned, device = prepared.run, prepared.text, prepared.planned, prepared.device
    log, clock = taken.log, taken.clock
    args, plan, state = run.args, planned.plan, log.state
    log.open_trackers(args.run, args.tensorboard)
    # Building and compiling take minutes and leave nothing to save: a signal ends them directly.
    stop.at_once = True
    stop.check()

    def load_source(model: Decoder) -> None:
        checkpoint.load_model(args.init_from, run.source.step, model)

    model, optimizer, scaler = lifecycle.build_parts(run, planned, device, load_source)

    trial = functools.partial(pass_of, prepared, model, scaler)
    device_batch = lifecycle.warm_up(args, planned, log, device, optimizer, trial)
    stop.at_once = False
    workers.callback(lifecycle.watch(clock, log).close)
    profiler = Profiler(
        run.folder.path / "profile", device, args.profile and log.writes, log.message
    )
    workers.callback(profiler.close)
    batches = Prefetcher(
        batches_of_steps(prepared, state.step, device_batch),
        interrupted=lambda: stop.requested or control.pending,
    )
    workers.callback(batches.close)
    # one process of a machine reads ahead
    if not text.corpus.eager and local_rank() == 0:
        first_row = state.step * plan.rows_per_step
        workers.callback(Ahead(text.rows, first_row, plan.last_row, log.message).close)
    keeper = Keeper(
        taken.saver,
        model=model,
        optimizer=optimizer,
        shard_tokens=text.rows.cache.lengths,
        clock=clock,
        first_step=state.step,
        enabled=not args.no_save,
    )
    return Session(
        run=run,
        text=text,
        plan=plan,
        device=device,
        device_batch=device_batch,
        core=prepared.core,
        no_core=prepared.no_core,
        prompts=prepared.prompts,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        state=state,
        clock=clock,
        log=log,
        keeper=keeper,
        batches=batches,
        profiler=profiler,
        stop=stop,
        control=control,
    )


def pass_of(prepared: Prepared, model: Decoder, scaler: LossScaler, n: int) -> None:
    """A pass of n rows, which adds to the gradients: a trial before training."""
    from nanochat.optim.step import forward_backward
    from nanochat.ranks import rank, world_size

    run, plan, args = prepared.run, prepared.planned.plan, prepared.run.args
    rows = prepared.text.rows
    batch = rows.batch(run.step, plan.rows_per_step, 0, n, rank(), world_size())
    accumulation = plan.rows_per_step // (n * world_size())
    seed = stream_seed(args.seed, "warm-up") if args.dropout else None
    forward_backward(model, scaler, batch, accumulation, prepared.device, seed)


def batches_of_steps(prepared: Prepared, step: int, device_batch: int) -> Iterator[list]:
    """The micro-batches of this rank for each step, from `step` to the end of the run."""
    from nanochat.optim.step import own_thread_on, page_locked
    from nanochat.ranks import rank, world_size

    plan, rows, device = prepared.planned.plan, prepared.text.rows, prepared.device
    own_thread_on(device)
    accumulation = plan.rows_per_step // (device_batch * world_size())
    # A time budget has no end that is known beforehand: it may be corrected.
    while plan.budget_seconds is not None or not plan.is_last(step):
        batches = (
            rows.batch(step, plan.rows_per_step, micro, device_batch, rank(), world_size())
            for micro in range(accumulation)
        )
        yield [page_locked(batch, device) for batch in batches]
        step += 1


def run(argv: Sequence[str] | None = None) -> int:
    """parse_args() and main(), with errors as messages and exit codes."""
    return exit_code_of(lambda stop: main(parse_args(argv), stop), "train.py")


if __name__ == "__main__":
    signals.exit_with(run)
