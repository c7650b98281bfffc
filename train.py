"""Train a GPT. One script, one dial:

    python train.py --depth=4                                            # on a laptop
    torchrun --standalone --nproc_per_node=8 -- train.py --depth=24      # on a node

Read it from the bottom of main(): open the run and its text, derive the plan from the dial, build
the parts, train. The loop in train() is save / evaluate / CORE / sample / agree / step / log. The
flags are described in nanochat/run/flags.py. Modules that need torch are imported by the functions
that use them, so that --help and a wrong flag answer immediately."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat import limits, output, signals
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    TrainingFailed,
    Unavailable,
    UsageError,
    check_system,
    human_time,
    stream_seed,
)
from nanochat.optim import schedules
from nanochat.run import flags

if TYPE_CHECKING:
    import torch

    from nanochat.data.prefetch import Prefetcher
    from nanochat.eval.core import Core
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder
    from nanochat.optim.loss_scaler import LossScaler
    from nanochat.optim.optimizer import Optimizer
    from nanochat.ranks import Agreed
    from nanochat.run.clock import Clock
    from nanochat.run.faults import Watchdog
    from nanochat.run.keeper import Keeper
    from nanochat.run.log import RunLog, StepResult
    from nanochat.run.plan import Machine, Plan
    from nanochat.run.plan_text import PlannedRun
    from nanochat.run.profiler import Profiler
    from nanochat.run.resume import OpenedRun
    from nanochat.run.saver import Saver
    from nanochat.run.state import TrainState
    from nanochat.run.training_text import TrainingText

EXIT_CODES = {"completed": EXIT_COMPLETED, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}


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

    # 2. Batch: grows as D^0.383 (arXiv 2505.13738), and leaves small budgets enough steps. After
    #    this, D is a whole number of steps.
    device_rows = max(1, args.device_batch_size) * machine.devices
    rows = args.total_batch_size // T
    if args.total_batch_size == -1:
        rows = schedules.derive_rows(tokens, size.reference_tokens, T, device_rows)
    batch_tokens = rows * T
    steps = horizon.steps(tokens, batch_tokens)
    tokens = steps * batch_tokens

    # 3. Learning rates: those of the reference batch x sqrt(B / B_ref), constant below 2^16 tokens.
    lr_factor = schedules.lr_factor(batch_tokens)

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
        groups=schedules.group_settings(base, lr_factor, decay_factor, config.width),
        schedule=schedules.Schedule.from_flags(args),
    )
    plan.fix_steps(steps)
    if args.warmup_steps != -1 and plan.warmup_steps + plan.warmdown_steps > steps:
        raise UsageError(
            f"--warmup-steps={args.warmup_steps}: together with {plan.warmdown_steps} steps of "
            f"warm-down longer than the run's {steps} steps; give at most "
            f"{steps - plan.warmdown_steps}"
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

    @property
    def args(self) -> Namespace:
        """The flags of the run."""
        return self.run.args

    @property
    def batch_tokens(self) -> int:
        """Tokens that a device takes per pass, also in evaluations."""
        return self.device_batch * self.args.max_seq_len

    def asked_to_stop(self) -> bool:
        """Asked between the passes of an evaluation, which is a sign of progress."""
        self.clock.begin(f"the evaluation of step {self.state.step}")
        return self.stop.requested

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
    from nanochat.run.plan import due

    args, plan, state = session.args, session.plan, session.state
    model, optimizer, scaler = session.model, session.optimizer, session.scaler
    log, clock, keeper = session.log, session.clock, session.keeper
    rolling_due = False
    ended_early = ""

    while True:
        last = plan.is_last(state.step)

        # save: before everything that might fail
        kind = plan.checkpoint_due(state.step, last, args.save_every)
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
        micro_batches, agreed = agree(session)
        rolling_due = agreed.save
        if agreed.steps:
            plan.set_steps(agreed.steps, done=state.step)
            log.steps_fixed(clock)

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
    from nanochat.run.plan import early_end

    args, text, log, scores = session.args, session.text, session.log, session.log.scores
    step = session.state.step
    try:
        result = bits_per_byte(
            session.model,
            text.held_out,
            text.byte_counts,
            session.batch_tokens,
            session.device,
            session.asked_to_stop,
        )
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

    log, step = session.log, session.state.step

    def show(share: float, task: str, seconds_left: float) -> None:
        log.meanwhile(f"step {step}: CORE {share:.0%}, {task} | eta {human_time(seconds_left)}")

    result = measure(
        session.core,
        session.no_core,
        session.model,
        batch_tokens=session.batch_tokens,
        device=session.device,
        interrupted=session.asked_to_stop,
        progress=show,
    )
    log.scores.add_core(result.core_metric, result.n)
    log.line(**as_metrics(result))
    if log.writes:
        write_lines(log.core, step, result)
    log.message(f"step {step}: {in_words(result)}")
    log.summarize("running")


def sample(session: Session) -> None:
    """Text samples on rank 0, while the others wait. Raises Stopped on all ranks if rank 0 was
    asked to stop meanwhile; a resumed run then samples here again."""
    from nanochat.eval.generation import draw_samples
    from nanochat.ranks import from_rank0

    log, step = session.log, session.state.step
    session.clock.begin(f"the samples of step {step}")
    for drawn in draw_samples(
        session.model,
        session.text.tokenizer,
        session.prompts if log.writes else [],
        session.args.seed,
        step,
        session.stop,
    ):
        log.sample(drawn.prompt, drawn.text, drawn.problem)
    if from_rank0(session.stop.requested):
        raise signals.Stopped


def agree(session: Session) -> tuple[list, Agreed]:
    """The micro-batches of the next step, and what all ranks agree on before it. Raises Stopped or
    DataFailed on every rank if any was asked to stop or has no data."""
    from nanochat import ranks
    from nanochat.data.token_cache import DataFailed

    state, clock, plan = session.state, session.clock, session.plan
    micro_batches, no_data = [], ""
    try:
        micro_batches = next(session.batches)
    except (DataFailed, UsageError) as error:
        # the other ranks have data: tell them, and leave together
        no_data = str(error)
    agreed = ranks.agree(
        session.device,
        stop=session.stop.requested,
        no_data=no_data,
        save=session.keeper.rolling_due(),
        steps=clock.steps_in_budget(
            plan.budget_to_fit(state.step),
            state.step,
            state.training_seconds,
            first=plan.num_iterations is None,
        ),
    )
    if agreed.no_data:
        raise DataFailed(agreed.no_data)
    return micro_batches, agreed


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
        lost = output.lost()
        return ended_with(lost, EXIT_FAILED) if lost else EXIT_COMPLETED
    # Before the first tensor: determinism, kernel caches and the heap are set up per process.
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    run = open_run(args, device_type)
    if run.over:
        ranks.print0(run.over)
    else:
        prepared = prepare(run, device)
        code = train_to_its_end(prepared, stop)
    ranks.close()
    return EXIT_COMPLETED if run.over else code


def dry_run(args: Namespace) -> None:
    """Print the plan without reading data or building weights."""
    import json

    import torch

    from nanochat import hardware
    from nanochat.data.sources import estimated_bytes
    from nanochat.data.tokenizer import EXPECTED_BYTES_PER_TOKEN, expected_vocab_size
    from nanochat.run.memory import free_memory
    from nanochat.run.plan import Machine, model_config
    from nanochat.run.plan_text import as_json, fit_plan, format_plan, long_run_advice
    from nanochat.run.resume import source_of_weights
    from nanochat.run.runtime import pick_runtime, runtime_in_words

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
    machine = Machine(device_type, args.gpus, *peak)
    runtime = pick_runtime(args, device_type, gpu)
    n_bytes = estimated_bytes(args.data)
    tokens_per_epoch = n_bytes / EXPECTED_BYTES_PER_TOKEN.get(args.tokenizer, 4)
    if source:
        config = source.model
    else:
        vocab_size = expected_vocab_size(args.tokenizer, args.vocab_size, n_bytes)
        config = model_config(args, vocab_size)
    plan = derive_plan(args, config, tokens_per_epoch, machine)
    planned = fit_plan(args, plan, config, machine, runtime, tokens_per_epoch, free_bytes)
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
    from nanochat.data.rows import check_disk
    from nanochat.eval.core import open_for_training
    from nanochat.eval.generation import sample_prompts
    from nanochat.ranks import from_rank0_or_raise, print0, world_size
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
    if run.config:
        print0(resumed_in_words(run))
    from_rank0_or_raise(lambda: check_disk(text.rows, plan.tokens, text.tokens_per_epoch))
    free_bytes = free_memory(device, machine.devices)
    planned = from_rank0_or_raise(
        lambda: fit_plan(args, plan, config, machine, runtime, text.tokens_per_epoch, free_bytes)
    )
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


def resumed_in_words(run: OpenedRun) -> str:
    """The line on where a run resumes, and on what is different now."""
    where = f"from step {run.step}" if run.step else "from the start (it has no checkpoint yet)"
    changed = f"; changed: {', '.join(run.changed)}" if run.changed else ""
    return f"resuming {run.folder.path} {where}{changed}"


def train_to_its_end(prepared: Prepared, stop: signals.StopSignals) -> int:
    """Take the run folder, build the parts, train, and save whatever ends it. Returns the exit
    code; raises what cannot be saved or continued from."""
    from nanochat.ranks import print0
    from nanochat.run import checkpoint

    # from here on the disk changes: a signal waits until that is done
    stop.at_once = False
    log, saver, clock = take_run_folder(prepared)
    with contextlib.ExitStack() as workers:
        # closed in the opposite order: the folder is released last
        workers.callback(log.folder.release)
        workers.callback(log.close)
        if saver:
            workers.callback(saver.close)
        try:
            session = build_session(prepared, log, saver, clock, stop, workers)
            status, reason = train_and_save(session)
            code = EXIT_CODES[status]
            log.end(status, reason, code)
        except BaseException as error:
            raise unsaved_end(error, prepared, log, saver, clock, stop) from None
    completed = status == "completed"
    saved = checkpoint.newest_in_words(log.folder.path)
    failure = reason if status == "failed" else ""
    no_save = prepared.run.args.no_save
    print0(log.last_words(completed=completed, failure=failure, saved=saved, no_save=no_save))
    return code


def train_and_save(session: Session) -> tuple[str, str]:
    """train(), and the save on the way out. Returns (status, reason) of the summary; every way to
    leave whose state is saved ends here."""
    from nanochat.data.token_cache import DataFailed

    # Every way to leave with a state that can be saved; others raise past this.
    status, reason = "completed", ""
    try:
        reason = train(session)
    except signals.Stopped:
        status, reason = "stopped", "asked to stop by a signal"
    except DataFailed as error:
        status, reason = "failed", str(error)
    if status != "completed":
        session.keeper.save("rolling", session.state)
    if failure := session.keeper.finish():
        reason = f"{reason}; {failure}" if status == "failed" else failure
        status = "failed"
    return status, reason


def unsaved_end(
    error: BaseException,
    prepared: Prepared,
    log: RunLog,
    saver: Saver | None,
    clock: Clock,
    stop: signals.StopSignals,
) -> BaseException:
    """Write down that an exception ends the run; returns the exception to raise."""
    from nanochat.run import faults

    device_batch = prepared.planned.device_batch
    error = faults.cause(error, device_batch, stop, clock.usual_seconds())
    status, why = "failed", f"{type(error).__name__}: {error}"
    if isinstance(error, (KeyboardInterrupt, signals.Stopped)):
        status, why = "stopped", "asked to stop by a signal"
    # first of all: Ctrl-C may end what is waited for below
    log.summarize(status, why)
    # who interrupts twice waits for nothing
    if saver and not isinstance(error, KeyboardInterrupt):
        saver.wait()
    log.end(status, why, EXIT_CODES[status])
    return error


def take_run_folder(prepared: Prepared) -> tuple[RunLog, Saver | None, Clock]:
    """Claim the run folder, write its config.json, and open what is written into it."""
    from nanochat import hardware
    from nanochat.ranks import from_rank0, from_rank0_or_raise, rank
    from nanochat.run.clock import Clock
    from nanochat.run.log import RunLog
    from nanochat.run.resume import prepare_folder, saved_scores, saved_train_state, take_folder
    from nanochat.run.saver import Saver

    run, text, planned, device = prepared.run, prepared.text, prepared.planned, prepared.device
    args, runtime = run.args, planned.runtime
    # Nothing was refused so far, so from here the run exists.
    from_rank0_or_raise(lambda: take_folder(run.folder, run.step))
    clock = Clock(
        save_minutes=args.save_every_minutes,
        synchronize=lambda: hardware.synchronize(device.type),
    )
    log = RunLog(
        run.folder,
        writes=rank() == 0,
        plan=planned.plan,
        machine=planned.machine,
        device=device,
        state=saved_train_state(run, text.tokenizer),
        scores=from_rank0(saved_scores(run) if rank() == 0 else None),
        tokens_per_epoch=text.tokens_per_epoch,
        untrained_vocabulary=None if run.source else text.tokenizer.vocab_size,
    )
    text.rows.cache.report = log.progress.message
    if not log.writes:
        return log, None, clock

    def machine_facts() -> dict:
        return {
            "hardware": hardware.describe(device),
            "runtime": {
                "dtype": str(runtime.dtype),
                "attention": runtime.attention,
                "compiled": runtime.compiled,
                "world_size": planned.machine.devices,
                "device_batch_size": planned.device_batch,
                "peak_flops": planned.machine.peak_flops,
                "peak": planned.machine.peak,
            },
        }

    best_bpb = prepare_folder(
        run,
        plan=planned.plan,
        model_config=planned.config,
        corpus=text.corpus,
        tokens_per_epoch=text.tokens_per_epoch,
        compressed_bpb=text.compressed_bpb,
        tokenizer=text.tokenizer,
        machine=machine_facts,
        prompts=prepared.prompts,
        records=log.records,
    )
    log.config = run.config
    log.summarize("running")
    saver = Saver(run.folder.path, args.keep_last, log.progress.message, log.records, best_bpb)
    return log, saver, clock


def build_session(
    prepared: Prepared,
    log: RunLog,
    saver: Saver | None,
    clock: Clock,
    stop: signals.StopSignals,
    workers: contextlib.ExitStack,
) -> Session:
    """Build model and optimizer, load what they resume from, compile, and start what works ahead.

    workers: gets what has to be closed at the end."""
    from nanochat.data.prefetch import Ahead, Prefetcher
    from nanochat.ranks import local_rank
    from nanochat.run.keeper import Keeper
    from nanochat.run.profiler import Profiler

    run, text, planned, device = prepared.run, prepared.text, prepared.planned, prepared.device
    args, plan, state = run.args, planned.plan, log.state
    log.open_trackers(args.run, args.tensorboard)
    # Building and compiling take minutes and leave nothing to save: a signal ends them directly.
    stop.at_once = True
    stop.check()
    model, optimizer, scaler = build_parts(prepared)
    device_batch = warm_up(prepared, log, model, optimizer, scaler)
    stop.at_once = False
    workers.callback(watch(clock).close)
    profiler = Profiler(
        run.folder.path / "profile", device, args.profile and log.writes, log.message
    )
    workers.callback(profiler.close)
    batches = Prefetcher(
        batches_of_steps(prepared, state.step, device_batch), interrupted=lambda: stop.requested
    )
    workers.callback(batches.close)
    # one process of a machine reads ahead
    if not text.corpus.eager and local_rank() == 0:
        first_row = state.step * plan.rows_per_step
        workers.callback(Ahead(text.rows, first_row, plan.last_row, log.message).close)
    keeper = Keeper(
        saver,
        model=model,
        optimizer=optimizer,
        cache=text.rows.cache,
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
    )


def build_parts(prepared: Prepared) -> tuple[Decoder, Optimizer, LossScaler]:
    """Model, optimizer and loss scaler of a run, in the state that it starts or resumes from."""
    import torch

    from nanochat.model import fp8
    from nanochat.model.build import build
    from nanochat.optim.loss_scaler import LossScaler
    from nanochat.optim.optimizer import Optimizer
    from nanochat.run import checkpoint

    run, planned = prepared.run, prepared.planned
    args, runtime = run.args, planned.runtime
    seed = stream_seed(args.seed, "model")
    model = build(planned.config, prepared.device, runtime.dtype, runtime.attention, seed=seed)
    model.checkpointing = args.activation_checkpointing
    scaler = LossScaler(runtime.dtype == torch.float16, run.saved_state.get("loss_scaler"))
    # orthogonalisation would overflow in fp16
    products = torch.float32 if scaler.enabled else runtime.dtype
    optimizer = Optimizer(model.parameter_groups(), planned.plan.groups, products)
    if run.step:
        checkpoint.load_model(run.folder.path, run.step, model)
        optimizer.load(checkpoint.load_optimizer(run.folder.path, run.step))
    elif run.source:
        checkpoint.load_model(args.init_from, run.source.step, model)
    # Only training mode uses fp8 and compiled blocks.
    model.train()
    if runtime.fp8_recipe:
        fp8.convert(model, runtime.fp8_recipe)
    if runtime.compiled:
        model.compile_parts()
    return model, optimizer, scaler


def warm_up(
    prepared: Prepared, log: RunLog, model: Decoder, optimizer: Optimizer, scaler: LossScaler
) -> int:
    """One pass that changes nothing: it compiles what training runs, so that step 0 starts on a
    warm machine, and finds the rows that a device takes per pass, which are returned."""
    from nanochat import hardware
    from nanochat.optim.step import forward_backward
    from nanochat.ranks import rank, world_size
    from nanochat.run import memory

    run, planned, device = prepared.run, prepared.planned, prepared.device
    args, plan = run.args, planned.plan
    started = time.monotonic()

    def trial(n: int) -> None:
        """A pass of n rows, which adds to the gradients."""
        rows = prepared.text.rows
        batch = rows.batch(run.step, plan.rows_per_step, 0, n, rank(), world_size())
        accumulation = plan.rows_per_step // (n * world_size())
        seed = stream_seed(args.seed, "warm-up") if args.dropout else None
        forward_backward(model, scaler, batch, accumulation, device, seed)

    # Whatever changes the memory of a row is part of the key.
    facts = hardware.describe(device)
    key = [vars(planned.config), *map(str, planned.runtime), args.activation_checkpointing, facts]
    is_given = args.device_batch_size != -1
    device_batch = memory.settle(
        trial, planned.device_batch, is_given, plan, key, device, log.message
    )
    optimizer.zero_grad()
    if log.writes:
        # a resumed run takes as many rows per pass, to the same last bit
        log.config["runtime"] |= {"device_batch_size": device_batch, "world_size": world_size()}
        log.summarize("running")
    hardware.synchronize(device.type)
    done = "compiled" if planned.runtime.compiled else "warmed up"
    log.message(f"{done} in {human_time(time.monotonic() - started)}")
    return device_batch


def watch(clock: Clock) -> Watchdog:
    """Start to report stalls of the loop."""
    from nanochat.ranks import rank, world_size
    from nanochat.run.faults import Watchdog

    sender = f"rank {rank()}: " if world_size() > 1 else ""

    def report(text: str) -> None:
        print(f"{sender}{text}", file=sys.stderr, flush=True)

    return Watchdog(report, clock)


def batches_of_steps(prepared: Prepared, step: int, device_batch: int) -> Iterator[list]:
    """The micro-batches of this rank for each step, from `step` to the end of the run."""
    from nanochat.ranks import rank, world_size

    plan, rows = prepared.planned.plan, prepared.text.rows
    accumulation = plan.rows_per_step // (device_batch * world_size())
    # A time budget has no end that is known beforehand: it may be corrected.
    while plan.budget_seconds is not None or not plan.is_last(step):
        yield [
            rows.batch(step, plan.rows_per_step, micro, device_batch, rank(), world_size())
            for micro in range(accumulation)
        ]
        step += 1


def run(argv: Sequence[str] | None = None) -> int:
    """parse_args() and main(), with errors as messages and exit codes."""
    # Before torch is imported, which takes seconds in which Ctrl-C should be heard.
    stop = signals.StopSignals(speaks=os.environ.get("RANK", "0") == "0")
    try:
        check_system()
        return main(parse_args(argv), stop)
    except UsageError as error:
        return ended_with(f"error: {error}", EXIT_USAGE)
    except signals.Stopped:
        return ended_with("stopped, as requested, before a step was done", EXIT_STOPPED)
    except (TrainingFailed, Unavailable) as error:
        return ended_with(f"training failed: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        return ended_with("interrupted", EXIT_STOPPED)
    except Exception as error:
        # of many types, and as early as while torch is imported
        if limits.is_out_of_memory(error):
            reason = limits.out_of_memory_in_words(error)
            return ended_with(f"training failed in the set-up: {reason}", EXIT_FAILED)
        if not stop.requested:
            raise
        from nanochat.ranks import is_lost_exchange

        if not is_lost_exchange(error):
            raise
        text = "stopped, as requested, during the set-up: the other ranks were asked as well"
        return ended_with(text, EXIT_STOPPED)
    finally:
        stop.restore()


def ended_with(text: str, code: int) -> int:
    """Print why the program ends; returns the exit code."""
    print(f"train.py: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signals.exit_with(run)
