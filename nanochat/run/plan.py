"""The plan of a run: every derived number, printed before step 0 and frozen in config.json.

The derivation itself (horizon, batch, rates, decay) stands in train.py; this module has its
pieces. N, D and B are as in optim/schedules.py."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from nanochat.common import UsageError, ceil_div
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig, width_for
from nanochat.optim import schedules
from nanochat.optim.muon import update_flops
from nanochat.optim.schedules import Schedule
from nanochat.run.clock import Clock
from nanochat.run.flags import FLAGS, HORIZONS, flag
from nanochat.run.state import TrainState

# Share of the peak, for estimated times: of a GPU's listed or measured one, and of a CPU's measured
# one, of which depths 4 to 6 reach 50 to 74%, smaller models less (runs/RESULTS.md).
ASSUMED_MFU = 0.4
ASSUMED_MFU_OF_CPUS = 0.5
LANDING_SHARE = 0.15  # of the training time: the warm-down of `nanochat jobs land`
LEAST_CORRECTED_STEPS = 2  # that are left when the length of a time budget is corrected


def model_config(args: argparse.Namespace, vocab_size: int) -> GPTConfig:
    """The GPTConfig that the flags of the model describe."""
    # The one dial: width follows from depth, heads from width.
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
        # Other programs know no llama with windows or shifted keys.
        window_pattern="L" if args.arch == "llama" else args.window_pattern,
        short_window=short_window(args.short_window, args.max_seq_len),
        dropout=args.dropout,
        arch=args.arch,
        tie_embeddings=args.tie_embeddings,
        key_shift=args.arch == "speedrun",
    )


def short_window(given: int, max_seq_len: int) -> int:
    """Tokens that an S layer sees: as given, or half the context for -1."""
    return max(1, max_seq_len // 2) if given == -1 else given


def assumed_mfu(device_type: str) -> float:
    """Share of the peak that training is expected to reach on a device of this type."""
    return ASSUMED_MFU_OF_CPUS if device_type == "cpu" else ASSUMED_MFU


@dataclass(frozen=True)
class Machine:
    """What a plan is made for. peak_flops: of one device, in FLOP/s; peak: what that number is."""

    device_type: str
    devices: int
    peak_flops: float
    peak: str

    @property
    def assumed_mfu(self) -> float:
        """Share of the peak that training is expected to reach."""
        return assumed_mfu(self.device_type)

    @property
    def assumed_flops(self) -> float:
        """FLOP/s that all devices together are expected to reach in training."""
        return self.assumed_mfu * self.peak_flops * self.devices


@dataclass(frozen=True)
class ModelSize:
    """What the scaling rules need to know of a model. parameters: by group, and "total".

    scaling_parameters: N. muon_flops: of one update with Muon. reference_tokens: D_ref, the horizon
    of the reference model."""

    parameters: dict[str, int]
    scaling_parameters: int
    flops_per_token: int
    muon_flops: int
    reference_tokens: float


def size_of(config: GPTConfig, aspect_ratio: int) -> ModelSize:
    """The ModelSize of a config. aspect_ratio: of the run, which the reference model shares."""
    # Counted on the meta device: shapes without memory, however large the model.
    model = meta_model(config)
    depth = schedules.REFERENCE_DEPTH
    width = width_for(depth, aspect_ratio, config.head_dim)
    heads = width // config.head_dim
    # Only depth and width differ, so that vocabulary and context weigh the same in both.
    reference = dataclasses.replace(config, depth=depth, width=width, n_head=heads, n_kv_head=heads)
    reference_parameters = meta_model(reference).scaling_parameters()
    matrices = model.parameter_groups()["matrices"].values()
    return ModelSize(
        parameters=model.count_parameters(),
        scaling_parameters=model.scaling_parameters(),
        flops_per_token=model.flops_per_token(),
        muon_flops=update_flops(matrices),
        reference_tokens=schedules.DEFAULT_PARAM_DATA_RATIO * reference_parameters,
    )


@dataclass(frozen=True)
class Horizon:
    """How long to train: the first of HORIZONS that was given, and its value."""

    name: str
    value: float

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Horizon":
        """That of the flags; the data:parameter ratio is always there."""
        name = next(name for name in HORIZONS if getattr(args, name) != -1)
        return cls(name, getattr(args, name))

    def tokens(
        self, size: ModelSize, machine: Machine, tokens_per_epoch: float, total_batch_size: int
    ) -> float:
        """D: the tokens to train on; for a time budget an estimate.

        total_batch_size: tokens a step as given, or -1. Steps alone say nothing about tokens: the
        batch is then that of the default ratio."""
        # In the order of precedence, each with its own unit.
        if self.name == "num_iterations":
            if total_batch_size != -1:
                return self.value * total_batch_size
            return schedules.DEFAULT_PARAM_DATA_RATIO * size.scaling_parameters
        if self.name == "target_flops":
            return self.value / size.flops_per_token
        if self.name == "target_tokens":
            return self.value
        if self.name == "target_epochs":
            return self.value * tokens_per_epoch
        if self.name == "target_minutes":
            return self.value * 60 * machine.assumed_flops / size.flops_per_token
        return self.value * size.scaling_parameters

    def steps(self, tokens: float, batch_tokens: int) -> int:
        """Steps of a batch to get through so many tokens."""
        if self.name == "num_iterations":
            return int(self.value)
        return max(1, round(tokens / batch_tokens))


@dataclass(frozen=True)
class _Stretch:
    """A part of a run whose length has been corrected: the steps from `at` to `until`, in which the
    run is expected to end after `steps`. scheduled: the step of the schedule that stands for `at`;
    scheduled_steps: for the end."""

    at: int
    until: int
    scheduled: float
    steps: int
    scheduled_steps: int

    def scheduled_at(self, step: int) -> float:
        """The step of the schedule that stands for a step of the run."""
        left = self.scheduled_steps - self.scheduled
        return self.scheduled + (step - self.at) * left / (self.steps - self.at)

    def step_at(self, scheduled: float) -> int:
        """The first step of the run that has come as far in the schedule."""
        left = self.scheduled_steps - self.scheduled
        share = (scheduled - self.scheduled) / left
        return self.at + math.ceil(share * (self.steps - self.at))


@dataclass
class Plan:
    """Derived once when a run first starts, frozen in config.json, never derived again.

    num_iterations is None until the speed for a time budget has been measured; tokens and flops
    are estimates until then. groups: optimizer settings of each parameter group."""

    horizon: str
    parameters: dict[str, int]
    scaling_parameters: int
    flops_per_token: int
    rows_per_step: int
    total_batch_tokens: int
    num_iterations: int | None
    tokens: float
    warmup_steps: int
    warmdown_steps: int
    groups: dict[str, dict[str, float]]
    # The step at which the length of a time budget was fixed, and the warm-up until then: a run
    # that is resumed from an earlier step repeats the learning rates that it had.
    fixed_at: int = 0
    warmup_before: int = 0
    horizon_value: float = -1
    schedule: Schedule = Schedule("trapezoid", 0.0, -1, 0.5, 0.0)
    # Of a time budget: the length that was fixed first, which the schedule has, and the later
    # decisions as [step, number of steps]. A resumed run repeats them.
    scheduled_steps: int | None = None
    corrections: list[list[int]] = dataclasses.field(default_factory=list)
    # Of `nanochat jobs land`: [step at which a warm-down began, number of steps]. A resumed run
    # repeats it.
    landings: list[list[int]] = dataclasses.field(default_factory=list)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Plan":
        """The plan in a run's config.json.

        Runs saved by earlier versions lack the schedule and the horizon's value, which follow from
        their flags; flags that they did not have yet count with their defaults."""
        values = dict(config["plan"])
        defaults = {name: row.default for name, row in FLAGS.items()}
        args = argparse.Namespace(**{**defaults, **config["args"]})
        # asdict() has turned the schedule into a dict.
        schedule = values.pop("schedule", None)
        values["schedule"] = Schedule(**schedule) if schedule else Schedule.from_flags(args)
        values.setdefault("horizon_value", getattr(args, values["horizon"]))
        values.setdefault("scheduled_steps", values["num_iterations"])
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values, for config.json."""
        return dataclasses.asdict(self)

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def budget_seconds(self) -> float | None:
        """The time budget, if that is the horizon."""
        return 60 * self.horizon_value if self.horizon == "target_minutes" else None

    def budget_to_fit(self, step: int) -> float | None:
        """The time budget in seconds, if the number of steps that fit into it is to be decided
        before this step: until it is known, where the warm-down begins, and whenever half of what
        was left is over. So a machine that becomes slower or faster still ends in time."""
        steps = self.num_iterations
        if self.landings:
            return None
        if self.budget_seconds is None or steps is None:
            return self.budget_seconds
        decided_at = self.corrections[-1][0] if self.corrections else self.fixed_at
        next_at = ceil_div(decided_at + steps, 2)
        begins = self.warmdown_begins
        if begins is not None and begins > decided_at:
            next_at = min(next_at, begins)
        is_due = step >= next_at and steps - step >= LEAST_CORRECTED_STEPS
        return self.budget_seconds if is_due else None

    @property
    def warmdown_begins(self) -> int | None:
        """The step where the learning rate begins to fall; None if it does not, or if the number of
        steps is not known yet."""
        begins = self._scheduled_warmdown_begins()
        if self.landings:
            landing = self.landings[0][0]
            return landing if begins is None else min(begins, landing)
        return begins

    def _scheduled_warmdown_begins(self) -> int | None:
        """The same for the schedule, whatever was landed."""
        if self.scheduled_steps is None or not self.warmdown_steps:
            return None
        wanted = self.scheduled_steps - self.warmdown_steps
        for stretch in self._stretches():
            step = stretch.step_at(wanted)
            if step < stretch.until:
                break
        return step

    def is_last(self, step: int) -> bool:
        """True after the last update."""
        return self.num_iterations is not None and step >= self.num_iterations

    def last_row(self) -> int | None:
        """Number of rows that the run reads; None while the number of steps is not known."""
        return None if self.num_iterations is None else self.num_iterations * self.rows_per_step

    def fix_steps(self, steps: int, done: int = 0) -> None:
        """Set the number of steps, and what follows from it.

        done: steps that are over. A finished warm-up does not begin again, and the warm-down does
        not begin in the past."""
        self.num_iterations = steps
        self.scheduled_steps = steps
        self.corrections = []
        self.landings = []
        self.tokens = steps * self.total_batch_tokens
        # Steps that are over keep the learning rates that they had, also when a resume repeats
        # them.
        if done:
            self.fixed_at = done
            self.warmup_before = self.warmup_steps
        if done <= self.warmup_steps:
            self.warmup_steps = self.schedule.warmup(steps)
        self.warmdown_steps = min(self.schedule.warmdown(steps), steps - done)

    def set_steps(self, steps: int, done: int) -> None:
        """The number of steps that a time budget allows, decided after `done` steps: fixed by the
        first decision, corrected by later ones, which stretch or shorten what is left of the
        schedule."""
        if self.num_iterations is None:
            self.fix_steps(steps, done)
            return
        self.corrections.append([done, steps])
        self.num_iterations = steps
        self.tokens = steps * self.total_batch_tokens

    def land(self, steps: int, done: int) -> None:
        """Let the warm-down begin now, after `done` steps, and the run end after `steps`.

        The rate falls linearly from what it is to the schedule's last one: a short warm-down from a
        constant rate ends close to a run that was planned for that length (arXiv 2405.18392)."""
        self.landings.append([done, steps])
        self.num_iterations = steps
        self.tokens = steps * self.total_batch_tokens

    def land_fork(self, step: int) -> None:
        """land() for a fork that begins at a step. No clock has timed its steps, so the warm-down
        is LANDING_SHARE of the steps so far. UsageError if the run ends as early anyway."""
        end = step + max(1, round(LANDING_SHARE * step))
        if self.num_iterations is not None and end >= self.num_iterations:
            raise UsageError(
                f"--land: the run ends at step {self.num_iterations} anyway, which is not later "
                f"than a landing from step {step}; leave it out, or give an earlier --step"
            )
        # what the parent decided later does not happen here
        self.corrections = [decision for decision in self.corrections if decision[0] <= step]
        self.landings = [decision for decision in self.landings if decision[0] < step]
        self.land(end, done=step)

    def landings_at(self, step: int) -> list[int]:
        """The numbers of steps of the landings that began at a step."""
        return [steps for at, steps in self.landings if at == step]

    def _stretches(self) -> list["_Stretch"]:
        """The parts of a run between decisions on its length, in order."""
        decisions = [[0, self.scheduled_steps], *self.corrections]
        untils = [at for at, _ in self.corrections] + [sys.maxsize]
        parts: list[_Stretch] = []
        for (at, steps), until in zip(decisions, untils, strict=True):
            scheduled = parts[-1].scheduled_at(at) if parts else 0
            parts.append(_Stretch(at, until, scheduled, steps, self.scheduled_steps))
        return parts

    def _scheduled(self, step: int) -> float:
        """The step of the schedule, as it was first fixed, that stands for a step of the run."""
        if not self.corrections:
            return step
        return next(part for part in self._stretches() if step < part.until).scheduled_at(step)

    def lr_multiplier(self, step: int) -> float:
        """Learning rate of a step / its peak. There is no warm-down before the number of steps is
        known."""
        return self._landed(step, self.landings)

    def _landed(self, step: int, landings: list[list[int]]) -> float:
        """lr_multiplier() with these landings, of which the last that has begun counts."""
        begun = [landing for landing in landings if landing[0] <= step]
        if not begun:
            return self._scheduled_multiplier(step)
        at, steps = begun[-1]
        start = self._landed(at, begun[:-1])
        final = self.schedule.final_lr_frac
        return final + (start - final) * (steps - step) / (steps - at)

    def _scheduled_multiplier(self, step: int) -> float:
        """lr_multiplier() of the schedule, whatever was landed."""
        warmup_steps = self.warmup_steps
        warmdown_steps = self.warmdown_steps
        steps = self.scheduled_steps
        shape = self.schedule.shape
        # While a time budget is measured the end is not in sight: no warm-down, and no cosine,
        # which would have to know how far to fall.
        if steps is None or step < self.fixed_at:
            warmup_steps = self.warmup_steps if steps is None else self.warmup_before
            warmdown_steps = 0
            steps = sys.maxsize
            shape = "trapezoid"
        else:
            step = self._scheduled(step)
        final = self.schedule.final_lr_frac
        return schedules.lr_multiplier(step, steps, warmup_steps, warmdown_steps, final, shape)

    def checkpoint_due(
        self, step: int, last: bool, every: int, at: Collection[int] = frozenset()
    ) -> str:
        """The kind of checkpoint that the state after `step` updates gets whatever the clock says,
        or "". every: --save-every. at: the steps of --save-at."""
        # From the strongest reason to the weakest: a checkpoint has one kind.
        if last:
            return "final"
        # From here a longer horizon can extend the run: afterwards the learning rate has fallen.
        if step == self.warmdown_begins:
            return "before_warmdown"
        if due(every, step, last) or step in at:
            return "permanent"
        return ""

    def estimated_seconds(self, machine: Machine) -> float:
        """Training time on a machine: the time budget, or what its assumed speed gives."""
        if self.budget_seconds is not None:
            return self.budget_seconds
        return self.flops / machine.assumed_flops


def fork_plan(
    plan: Plan,
    was: argparse.Namespace,
    now: argparse.Namespace,
    *,
    step: int,
    config: GPTConfig,
    new_horizon: bool,
    tokens_per_epoch: float,
    machine: Machine,
) -> None:
    """Derive again, in place, what changed flags decide of a run that continues from a step.

    The batch and everything that no changed flag names stay as they were: rates keep the factors
    that they had, also those of a horizon that is new. was, now: the flags before and after.
    new_horizon: it was given. machine: for time budgets. UsageError for a horizon that is over, and
    for a warm-up that is."""
    rates = schedules.BaseRates.from_flags
    if rates(was) != rates(now):
        _scale_groups(plan, was, now, config)
    schedule = Schedule.from_flags(now)
    # corrections and landings stay, and are repeated
    if schedule == Schedule.from_flags(was) and not new_horizon:
        return
    new_warmup = (was.warmup_ratio, was.warmup_steps) != (now.warmup_ratio, now.warmup_steps)
    plan.schedule = schedule
    steps = plan.num_iterations
    if new_horizon:
        horizon = Horizon.from_flags(now)
        # the batch stays, so what only it depends on is left out
        size = ModelSize(
            plan.parameters, plan.scaling_parameters, plan.flops_per_token, 0, math.nan
        )
        batch = plan.total_batch_tokens
        tokens = horizon.tokens(size, machine, tokens_per_epoch, batch)
        plan.horizon, plan.horizon_value = horizon.name, horizon.value
        steps = None if horizon.name == "target_minutes" else horizon.steps(tokens, batch)
        if steps is not None and steps <= step:
            raise UsageError(
                f"{flag(horizon.name)}={horizon.value}: ends at step {steps}, and the fork begins "
                f"at step {step}; give a longer horizon, or an earlier --step"
            )
        plan.num_iterations = plan.scheduled_steps = None
        plan.corrections = []
        plan.landings = []
        plan.tokens = tokens
    warmup_before = plan.warmup_steps
    if steps is not None:
        plan.fix_steps(steps, done=step)
    # as in a run that is extended: it keeps the warm-up that it began with
    plan.warmup_steps = warmup_before
    if new_warmup:
        _change_warmup(plan, now, step, warmup_before)


def _scale_groups(
    plan: Plan, was: argparse.Namespace, now: argparse.Namespace, config: GPTConfig
) -> None:
    """Change the settings of the optimizer's groups as the flags of the rates have changed."""
    batch = plan.total_batch_tokens
    reference_tokens = size_of(config, now.aspect_ratio).reference_tokens
    factors = (
        schedules.lr_factor(batch),
        schedules.decay_factor(batch, plan.tokens, reference_tokens),
        config.width,
    )
    rates = schedules.BaseRates.from_flags
    before = schedules.group_settings(rates(was), *factors)
    after = schedules.group_settings(rates(now), *factors)
    for group, settings in plan.groups.items():
        for name, value in settings.items():
            old, new = before[group][name], after[group][name]
            if old != new:
                # the run's own factor differs where its length was extended or measured
                settings[name] = new * (value / old) if old else new


def _change_warmup(plan: Plan, now: argparse.Namespace, step: int, before: int) -> None:
    """Take another warm-up over. before: the steps that it had. UsageError if it is over."""
    name = "warmup_ratio" if now.warmup_steps == -1 else "warmup_steps"
    named = f"{flag(name)}={getattr(now, name)}"
    steps = plan.num_iterations or round(plan.tokens / plan.total_batch_tokens)
    warmup = plan.schedule.warmup(steps)
    if step >= max(before, warmup):
        raise UsageError(
            f"{named}: no effect, since the warm-up is over at step {step}, with which the fork "
            "begins; leave it out"
        )
    if warmup + plan.warmdown_steps > steps:
        raise UsageError(
            f"{named}: together with {plan.warmdown_steps} steps of warm-down longer than the "
            f"run's {steps} steps; give at most {steps - plan.warmdown_steps} steps"
        )
    plan.warmup_steps = warmup


def steps_to_land(clock: Clock, state: TrainState, minutes: float | None) -> int | None:
    """Steps of a warm-down that takes so many minutes, or LANDING_SHARE of the training time so far
    for None. None if no step of this start has been timed."""
    if not clock.steps:
        return None
    seconds = LANDING_SHARE * state.training_seconds if minutes is None else 60 * minutes
    return max(1, round(seconds / clock.latest_step_seconds(seconds)))


def due(every: int, step: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the end, is due after `step`
    updates. every: -1 for never."""
    # At step 0 there is nothing yet to save, to score or to sample.
    if every == -1 or step == 0:
        return False
    return last or step % every == 0


def early_end(stop_at_bpb: float, patience: int, bpb: float, stale_evaluations: int) -> str:
    """Why a run ends before its horizon after an evaluation; "" if it does not.

    stop_at_bpb, patience: the flags, -1 for off. stale_evaluations: evaluations in a row without
    improvement."""
    if bpb <= stop_at_bpb:
        return f"val/bpb {bpb:.4f} reached --stop-at-bpb={stop_at_bpb}"
    if 0 < patience <= stale_evaluations:
        return f"{patience} evaluations without improvement (--patience)"
    return ""
