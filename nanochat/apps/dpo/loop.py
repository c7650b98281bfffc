"""The loop of direct preference optimization: save / evaluate / sample / agree / step / log as in
train.py, with the loss of pairs of answers."""

import functools
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.common import TrainingFailed, stream_seed
from nanochat.data.preferences import Pairs, Preferences
from nanochat.data.prefetch import Prefetcher
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.bpb import bits_per_byte
from nanochat.eval.chat import draw_answers
from nanochat.eval.preferences import (
    Divergence,
    Pass,
    PreferenceScore,
    divergence,
    logprobs_of,
    score,
    token_logprobs_of,
)
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.decoder import Decoder
from nanochat.model.preference_loss import pair_loss
from nanochat.optim import schedules
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.step import accumulate
from nanochat.ranks import rank, sum_over_ranks, world_size
from nanochat.run import checkpoint, faults
from nanochat.run.clock import Clock
from nanochat.run.control import Control
from nanochat.run.flags import listed_steps
from nanochat.run.keeper import Keeper
from nanochat.run.log import RunLog, StepResult
from nanochat.run.orders import agree, attend, interrupted, undisturbed
from nanochat.run.plan import Plan, due
from nanochat.run.resume import OpenedRun
from nanochat.run.state import TrainState
from nanochat.signals import StopSignals

# what pair_loss() sums, as metrics name it
LOGGED = ("reward_accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")


@dataclass(frozen=True)
class PreferenceFlags:
    """The flags of the loss."""

    beta: float
    variant: str
    label_smoothing: float

    def as_options(self) -> dict[str, Any]:
        """Keyword arguments of preference_loss()."""
        return vars(self)


class PairLoss:
    """The loss of a micro-batch, and the sums that are logged of a step."""

    def __init__(self, flags: PreferenceFlags, device: torch.device) -> None:
        self.flags = flags
        self.sums = torch.zeros(len(LOGGED), device=device)

    def __call__(
        self, model: torch.nn.Module, batch: Sequence[torch.Tensor], upstream: float
    ) -> torch.Tensor:
        """Sum over the pairs of a micro-batch. batch: inputs, targets (2B, T), reference (2B,)."""
        inputs, targets, reference = batch
        nats = model(inputs, targets)
        loss, logged = pair_loss(nats, targets, reference, **self.flags.as_options())
        self.sums += logged
        return loss

    def means(self, pairs: int, device: torch.device) -> dict[str, float]:
        """What was logged since the last call, as means over the pairs of a step on all ranks."""
        sums = sum_over_ranks(self.sums.clone()).tolist()
        self.sums.zero_()
        return {f"train/{name}": total / pairs for name, total in zip(LOGGED, sums, strict=True)}


@dataclass
class Session:
    """A run of preference optimization with all its parts. preferences: pairs to learn from and
    held out. reference: log-probabilities of the held-out pairs, (pairs, 2). drawn: answers of the
    reference to held-out prompts; drawn_reference: its log-probabilities of their tokens.
    base_pieces: held-out text of the run that is tuned. byte_counts: int64 (V,). questions: ids of
    prompts whose answers are sampled. prompts: the same as text. T: tokens of a row. core: none;
    orders look for it. ends_early: an early end looks at val/bpb."""

    run: OpenedRun
    plan: Plan
    device: torch.device
    device_batch: int
    T: int
    tokenizer: Tokenizer
    preferences: Preferences
    reference: torch.Tensor
    drawn: Pairs
    drawn_reference: torch.Tensor
    flags: PreferenceFlags
    base_pieces: list[np.ndarray]
    byte_counts: np.ndarray
    questions: list[list[int]]
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
    ends_early: bool = False

    @property
    def args(self) -> Namespace:
        """The flags of the run."""
        return self.run.args

    @property
    def how(self) -> Pass:
        """How evaluations run pairs through the model."""
        return Pass(
            T=self.T,
            padding=self.tokenizer.bos,
            device_rows=self.device_batch,
            device=self.device,
            interrupted=functools.partial(interrupted, self),
        )

    def dropout_seed(self, micro: int) -> int | None:
        """Seed of a micro-batch's dropout on this rank."""
        if not self.args.dropout:
            return None
        return stream_seed(self.args.seed, "dropout", self.state.step, micro, rank())


def train(session: Session) -> str:
    """The loop. It comes round once more than there are updates, so that the last save and
    evaluation need no second copy; what the model preferred before is evaluated at step 0.

    Returns "": nothing ends such a run early. Stopped, DataFailed and TrainingFailed are raised on
    every rank at the same step."""
    args, plan, state = session.args, session.plan, session.state
    model, optimizer, scaler = session.model, session.optimizer, session.scaler
    log, clock, keeper = session.log, session.clock, session.keeper
    pairs = plan.rows_per_step // 2
    loss_of = PairLoss(session.flags, session.device)
    save_at = listed_steps(args.save_at)
    rolling_due = False

    while True:
        last = plan.is_last(state.step)
        before = state.step == 0

        # save: before everything that might fail
        kind = plan.checkpoint_due(state.step, last, args.save_every, save_at)
        if kind or rolling_due:
            keeper.save(kind or "rolling", state, hold=state.skipped_in_a_row > 0 and not last)

        # evaluate: all ranks
        if due(args.eval_every, state.step, last) or (before and args.eval_every != -1):
            evaluate(session)

        # sample: rank 0, the others wait for it
        if due(args.sample_every, state.step, last) or (before and args.sample_every != -1):
            sample(session)

        if last:
            return ""

        # agree: one exchange, so that all ranks hear the same and leave at the same step
        micro_batches, rolling_due = agree(session)

        # step: the summed loss over the pairs of the whole step
        lr_multiplier = plan.lr_multiplier(state.step)
        with clock.step(state.step):
            optimizer.zero_grad()
            mean_loss = accumulate(
                model,
                optimizer,
                scaler,
                micro_batches,
                session.device,
                session.dropout_seed,
                loss_of,
                # averaged over the ranks afterwards
                divisor=pairs / world_size(),
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
        log.step(result, scaler, clock, **loss_of.means(pairs, session.device))
        overflowed = scaler.update(finite) if math.isfinite(loss) else False
        state.advance(clock.counted_seconds, finite, overflowed, scaler.state())
        if keeper.after_step(finite):
            log.summarize("running")
        if not finite:
            note_skipped(session, result, overflowed)


def evaluate(session: Session) -> None:
    """Loss and rewards of the held-out pairs, the distance to the reference, and bits per byte of
    the text that the model was trained on before. The latter is not val/bpb, which in other runs is
    of what they learn."""
    log, step = session.log, session.state.step
    base = functools.partial(
        bits_per_byte,
        session.model,
        session.base_pieces,
        session.byte_counts,
        session.device_batch * session.args.max_seq_len,
        session.device,
        functools.partial(interrupted, session),
    )
    try:
        found = undisturbed(session, functools.partial(score_held_out, session))
        left = undisturbed(session, functools.partial(measure_divergence, session))
        of_base = undisturbed(session, base) if session.base_pieces else None
    except EvaluationFailed as error:
        log.message(f"step {step}: the evaluation failed, training continues ({error})")
        log.line(**{"val/loss": None, "reason": str(error)})
        log.summarize("running")
        return
    values = {
        "val/loss": found.loss,
        "val/reward_accuracy": found.accuracy,
        "val/reward_accuracy_stderr": found.stderr,
        "val/reward_margin": found.margin,
        "val/logp_chosen": found.chosen_logprob,
        "val/kl": left.kl,
        "val/kl_stderr": left.stderr,
    }
    spread = "" if found.stderr is None else f" ± {found.stderr:.1%}"
    words = (
        f"held-out pairs: loss {found.loss:.4f}, {found.accuracy:.1%}{spread} of {found.n} prefer "
        f"the chosen answer, margin {found.margin:.3f}; KL to the reference {left.kl:.3f} nats an "
        "answer"
    )
    if of_base is not None:
        values["base/bpb"] = of_base.bpb
        words += f"; base text: {of_base.bpb:.4f} bits per byte"
    log.line(**values)
    log.message(f"step {step}: {words}")
    log.summarize("running")


def score_held_out(session: Session) -> PreferenceScore:
    """The model beside its reference on the held-out pairs."""
    held_out = session.preferences.held_out
    lengths = torch.from_numpy(held_out.answer_lengths)
    logprobs = logprobs_of(session.model, held_out, session.how)
    return score(logprobs, session.reference, lengths, **session.flags.as_options())


def measure_divergence(session: Session) -> Divergence:
    """How far the model has left its reference."""
    logprobs = token_logprobs_of(session.model, session.drawn, session.how)
    return divergence(logprobs, session.drawn_reference)


def sample(session: Session) -> None:
    """Answers to held-out prompts on rank 0, while the others wait. Raises Stopped on all ranks if
    one was asked to stop meanwhile."""
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
