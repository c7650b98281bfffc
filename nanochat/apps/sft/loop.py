"""The loop of supervised fine-tuning: save / evaluate / sample / agree / step / log as in train.py,
with the loss of the assistant's tokens."""

import functools
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.common import TrainingFailed, stream_seed
from nanochat.data.conversations import Conversations
from nanochat.data.prefetch import Prefetcher
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.answers import answer_loss
from nanochat.eval.bpb import bits_per_byte
from nanochat.eval.chat import draw_answers, exercise_score
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.decoder import Decoder
from nanochat.optim import schedules
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.step import accumulate, summed_loss
from nanochat.ranks import rank, world_size
from nanochat.run import checkpoint, faults
from nanochat.run.clock import Clock
from nanochat.run.control import Control
from nanochat.run.flags import listed_steps
from nanochat.run.keeper import Keeper
from nanochat.run.log import RunLog, StepResult
from nanochat.run.orders import agree, attend, interrupted, undisturbed
from nanochat.run.plan import Plan, due, early_end
from nanochat.run.resume import OpenedRun
from nanochat.run.state import TrainState
from nanochat.signals import StopSignals
from tasks.exercises import Exercise


@dataclass
class Session:
    """A fine-tuning run with all its parts. conversations: to learn from and held out. base_pieces:
    held-out text of the run that is tuned, [] if it cannot be read. byte_counts: int64 (V,).
    questions: ids of conversations whose answers are sampled. exercises: to ask, by task.
    prompts: the questions as text.
    device_batch: rows that a device takes per pass. core: none; orders look for it."""

    run: OpenedRun
    plan: Plan
    device: torch.device
    device_batch: int
    tokenizer: Tokenizer
    conversations: Conversations
    base_pieces: list[np.ndarray]
    byte_counts: np.ndarray
    questions: list[list[int]]
    exercises: dict[str, list[Exercise]]
    prompts: list[str]
    model: Decoder
    optimizer: Optimizer
    scaler: LossScaler
    state: TrainState
    clock: Clock
    log: RunLog
    keeper: Keeper
    batches: Prefetcher
    stop: StopSignals
    control: Control
    core: Any = None
    ends_early: bool = True

    @property
    def args(self) -> Namespace:
        """The flags of the run."""
        return self.run.args

    @property
    def batch_tokens(self) -> int:
        """Tokens that a device takes per pass, also in evaluations."""
        return self.device_batch * self.args.max_seq_len

    def dropout_seed(self, micro: int) -> int | None:
        """Seed of a micro-batch's dropout on this rank."""
        if not self.args.dropout:
            return None
        return stream_seed(self.args.seed, "dropout", self.state.step, micro, rank())


def train(session: Session) -> str:
    """The loop. It comes round once more than there are updates, so that the last save and
    evaluation need no second copy; what the model could do before is evaluated at step 0.

    Returns the rule for an early end that its last evaluation met, or "". Stopped, DataFailed and
    TrainingFailed are raised on every rank at the same step."""
    args, plan, state = session.args, session.plan, session.state
    model, optimizer, scaler = session.model, session.optimizer, session.scaler
    log, clock, keeper = session.log, session.clock, session.keeper
    save_at = listed_steps(args.save_at)
    rolling_due = False
    ended_early = ""

    while True:
        last = plan.is_last(state.step)
        before = state.step == 0

        # save: before everything that might fail
        kind = plan.checkpoint_due(state.step, last, args.save_every, save_at)
        if kind or rolling_due:
            keeper.save(kind or "rolling", state, hold=state.skipped_in_a_row > 0 and not last)

        # evaluate: all ranks
        if due(args.eval_every, state.step, last) or (before and args.eval_every != -1):
            ended_early = evaluate(session)
            ask_exercises(session)
            if ended_early and not last:
                log.message(f"step {state.step}: ending here, {ended_early}")
                keeper.save("final", state)
                last = True

        # sample: rank 0, the others wait for it
        if due(args.sample_every, state.step, last) or (before and args.sample_every != -1):
            sample(session)

        if last:
            return ended_early

        # agree: one exchange, so that all ranks hear the same and leave at the same step
        batch, rolling_due = agree(session)

        # step: the summed loss over the targets of the whole step, however it is dealt out
        lr_multiplier = plan.lr_multiplier(state.step)
        with clock.step(state.step):
            optimizer.zero_grad()
            mean_loss = accumulate(
                model,
                optimizer,
                scaler,
                batch.micro_batches,
                session.device,
                session.dropout_seed,
                summed_loss,
                # averaged over the ranks afterwards
                divisor=max(1, batch.targets) / world_size(),
            )
            loss, grad_norm = optimizer.reduce(mean_loss, scaler)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite and batch.targets:
                optimizer.clip(grad_norm, args.grad_clip)
                optimizer.step(lr_multiplier, schedules.muon_momentum(state.step))
            else:
                optimizer.drop_gradients()

        # log: the line of the state before the update, with the loss of the update
        spike = faults.spike(loss, state.recent_losses, finite)
        result = StepResult(loss, grad_norm, finite, lr_multiplier, clock.step_seconds, spike)
        log.step(result, scaler, clock, **{"train/targets": batch.targets})
        overflowed = scaler.update(finite) if math.isfinite(loss) else False
        state.advance(clock.counted_seconds, finite, overflowed, scaler.state())
        if keeper.after_step(finite):
            log.summarize("running")
        if not finite:
            note_skipped(session, result, overflowed)


def evaluate(session: Session) -> str:
    """Loss and bits per byte of the held-out answers, and of the text that the model was trained on
    before. Returns why the run ends early because of them, or ""."""
    args, log, scores, step = session.args, session.log, session.log.scores, session.state.step
    asked = functools.partial(interrupted, session)
    answers = functools.partial(
        answer_loss,
        session.model,
        session.conversations.held_out,
        session.byte_counts,
        session.batch_tokens,
        session.device,
        asked,
    )
    base = functools.partial(
        bits_per_byte,
        session.model,
        session.base_pieces,
        session.byte_counts,
        session.batch_tokens,
        session.device,
        asked,
    )
    try:
        result = undisturbed(session, answers)
        of_base = undisturbed(session, base) if session.base_pieces else None
    except EvaluationFailed as error:
        scores.add_bpb(None)
        log.message(f"step {step}: the evaluation failed, training continues ({error})")
        log.line(**{"val/bpb": None, "val/loss": None, "reason": str(error)})
        log.summarize("running")
        return ""
    better = scores.add_bpb(result.bpb)
    reason = early_end(args.stop_at_bpb, args.patience, result.bpb, scores.stale_evaluations)
    # --patience exists to keep this model
    if better and (args.patience != -1 or reason):
        session.keeper.save("rolling", session.state)
    words = f"held-out answers: {result.loss:.4f} nats a token, {result.bpb:.4f} bits per byte"
    values = {"val/bpb": result.bpb, "val/loss": result.loss}
    if of_base is not None:
        values["base/bpb"] = of_base.bpb
        words += f"; base text: {of_base.bpb:.4f} bits per byte"
    log.line(**values)
    log.message(f"step {step}: {words}")
    session.keeper.mark_best(step, result.bpb)
    log.summarize("running")
    return reason


def ask_exercises(session: Session) -> None:
    """Share of the held-out exercises that are answered exactly, on rank 0, while the others wait.
    Raises Stopped on all ranks if one was asked to stop meanwhile."""
    log, step = session.log, session.state.step
    for task, asked in session.exercises.items():
        session.clock.begin(f"the exercises of step {step}")
        if log.writes:
            score = exercise_score(session.model, session.tokenizer, asked)
            name = f"exercises/{task}"
            log.line(**{name: score.accuracy, f"{name}_stderr": score.stderr, f"{name}_n": score.n})
            log.message(f"step {step}: {task}: {score.in_words()}")
        attend(session)


def sample(session: Session) -> None:
    """Answers to held-out questions on rank 0, while the others wait. Raises Stopped on all ranks
    if one was asked to stop meanwhile."""
    log, step = session.log, session.state.step
    session.clock.begin(f"the samples of step {step}")
    if log.writes:
        seed = stream_seed(session.args.seed, "sample", step)
        answers = draw_answers(session.model, session.tokenizer, session.questions, seed)
        for prompt, (text, problem) in zip(session.prompts, answers, strict=True):
            log.sample(prompt, text, problem)
    attend(session)


def note_skipped(session: Session, result: StepResult, overflowed: bool) -> None:
    """Report that the step before was skipped. TrainingFailed after too many of them in a row."""
    state, folder = session.state, session.run.folder.path
    session.log.skipped(result, overflowed, session.scaler)
    if faults.gives_up(state, overflowed, session.args.max_skipped, False):
        session.keeper.wait()
        good = checkpoint.newest_finite(folder)
        left = "no good checkpoint exists" if good is None else f"the last good one is step {good}"
        raise TrainingFailed(
            f"{state.skipped_in_a_row} steps in a row had a non-finite loss or gradient; {left}; "
            "lower --lr-frac"
        )
