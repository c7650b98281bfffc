"""How long a run trains: steps, tokens, FLOPs, epochs, a time budget by an injected clock, and ends
before the horizon."""

import dataclasses
import functools
import json

import pytest
import small

import train
from nanochat.eval import bpb
from nanochat.optim import schedules
from nanochat.optim.optimizer import Optimizer
from nanochat.run import checkpoint, clock
from nanochat.run.plan import Plan

QUIET = "--sample-every=-1"
NO_LIMIT = ("--num-iterations=-1", *small.BARE)


# ---- tokens, FLOPs, epochs ----


@pytest.mark.parametrize(
    "flag", ["--target-tokens=1000", "--target-flops=4e8", "--target-epochs=0.1"]
)
def test_other_horizons(tmp_path, capsys, flag):
    assert small.run(tmp_path, *NO_LIMIT, flag) == 0
    assert f"{flag.split('=')[0]}=" in capsys.readouterr().out
    config = small.config(tmp_path)
    tokens = {
        "--target-tokens=1000": 1000,
        "--target-flops=4e8": 4e8 / config["plan"]["flops_per_token"],
        "--target-epochs=0.1": 0.1 * config["data"]["tokens_per_epoch"],
    }[flag]
    assert small.summary(tmp_path)["step"] == round(tokens / 256) > 1


# ---- time budgets ----


def inject_clock(monkeypatch, seconds, at_update=lambda n: None):
    """A clock by which every step takes so many seconds. at_update(n) is called after the n-th
    update of this start of the run."""
    updates = [0]
    original = Optimizer.step

    def step(self, *args):
        original(self, *args)
        updates[0] += 1
        at_update(updates[0])

    monkeypatch.setattr(Optimizer, "step", step)
    timed = functools.partial(clock.Clock, now=lambda: seconds * updates[0])
    monkeypatch.setattr("nanochat.run.lifecycle.Clock", timed)


def test_a_time_budget_fixes_the_steps_once(tmp_path, monkeypatch, capsys):
    """30 s at 1.5 s a step are 20 steps, whatever the machine was assumed to reach."""
    inject_clock(monkeypatch, 1.5)
    assert small.run(tmp_path, *NO_LIMIT, "--target-minutes=0.5") == 0
    shown = capsys.readouterr().out
    assert shown.count("time budget: 20 steps at 1500.0 ms, 5,120 tokens; warm-down") == 1
    plan = small.config(tmp_path)["plan"]
    assert plan["horizon"] == "target_minutes"
    assert plan["num_iterations"] == small.summary(tmp_path)["step"] == 20
    # measured over 5 steps, and noticed before the next but one
    assert (plan["fixed_at"], plan["warmdown_steps"]) == (6, 10)


def test_a_measured_time_budget_is_kept(tmp_path, monkeypatch):
    """It is in config.json before the next step ends, and so is the decision where the warm-down
    begins. A resumed run repeats both, and decides again once it has measured its own speed: at
    20 s a step, the budget is over."""
    written = []

    def note_and_leave(update):
        if update == 7:
            written.append(small.config(tmp_path)["plan"]["num_iterations"])
        if update == 11:
            raise KeyboardInterrupt

    flags = ("--num-iterations=-1", "--target-minutes=0.5", "--save-every=5", "--eval-every=-1")
    with monkeypatch.context() as patch:
        inject_clock(patch, 1.5, note_and_leave)
        assert small.run(tmp_path, *flags, QUIET) == 75
    assert written == [20] and checkpoint.steps_of(tmp_path / "run") == [5, 10]
    inject_clock(monkeypatch, 20.0)
    assert small.run(tmp_path, *flags, QUIET, "--resume") == 0
    plan = small.config(tmp_path)["plan"]
    assert (plan["scheduled_steps"], plan["corrections"]) == (20, [[10, 20], [16, 17]])
    assert list(small.losses(tmp_path)) == list(range(17))


def test_extending_by_a_time_budget(tmp_path, monkeypatch):
    """The warm-up stays the one that is over, and the warm-down the same share of the steps.

    9 of 12 steps are kept; after 6 more at 1.5 s, 22.5 of 45 s are left: 15 steps."""
    flags = ("--warmup-ratio=0.25", "--warmdown-ratio=0.25", "--eval-every=-1", QUIET)
    with monkeypatch.context() as patch:
        inject_clock(patch, 1.5)
        assert small.run(tmp_path, *flags) == 0
    plan = Plan.from_config(small.config(tmp_path))
    assert (plan.warmup_steps, plan.warmdown_steps) == (3, 3)
    inject_clock(monkeypatch, 1.5)
    budget = ("--num-iterations=-1", "--target-minutes=0.75")
    assert small.run(tmp_path, *flags, "--resume", *budget) == 0
    assert small.config(tmp_path)["extended"] == [{"from_step": 9, "steps_before": 12}]
    plan = small.config(tmp_path)["plan"]
    assert small.summary(tmp_path)["step"] == plan["num_iterations"] == 30
    assert (plan["warmup_steps"], plan["warmdown_steps"]) == (3, 8)


def plan_of(schedule):
    """A plan whose number of steps is not known yet."""
    return Plan(
        horizon="target_minutes",
        parameters={},
        scaling_parameters=1,
        flops_per_token=1,
        rows_per_step=1,
        total_batch_tokens=1,
        num_iterations=None,
        tokens=1,
        warmup_steps=schedule.warmup(100),
        warmdown_steps=0,
        groups={},
        horizon_value=1.0,
        schedule=schedule,
    )


def schedule_of(*flags):
    """The schedule of these flags."""
    return schedules.Schedule.from_flags(train.parse_args(flags))


def test_steps_that_are_fixed_late():
    """A warm-up that is over stays as it is, and a warm-down does not begin in the past."""
    schedule = schedule_of("--warmup-ratio=0.25", "--warmdown-ratio=0.9")
    plan = dataclasses.replace(plan_of(schedule), warmup_steps=3)
    plan.fix_steps(40, done=10)
    assert (plan.warmup_steps, plan.warmdown_steps) == (3, 30), "not 10, not 36"


@pytest.mark.parametrize(
    "flags", [("--lr-schedule=cosine",), ("--warmup-ratio=0.5", "--warmdown-ratio=0.5")]
)
def test_learning_rates_before_the_steps_of_a_time_budget_were_fixed(flags):
    """A run that is killed just after that and resumed from before repeats the ones it had."""
    schedule = schedule_of(*flags)
    plan = plan_of(schedule)
    before = [plan.lr_multiplier(step) for step in range(10)]
    plan.fix_steps(40, done=10)
    saved = {"plan": plan.as_dict(), "args": {"target_minutes": 1.0}}
    resumed = Plan.from_config(json.loads(json.dumps(saved)))
    assert [resumed.lr_multiplier(step) for step in range(10)] == before
    assert [resumed.lr_multiplier(step) for step in range(10, 40)] == [
        schedules.lr_multiplier(
            step, 40, plan.warmup_steps, plan.warmdown_steps, 0.0, schedule.shape
        )
        for step in range(10, 40)
    ]


# ---- early ends ----


def script_evaluations(monkeypatch, *values):
    """Validation gives these bits per byte, one after another."""
    left = iter(values)

    def next_value(*args):
        return bpb.BitsPerByte(next(left), loss=1.0, tokens=1, bytes=1)

    monkeypatch.setattr(bpb, "bits_per_byte", next_value)


def test_patience(tmp_path, monkeypatch, capsys):
    script_evaluations(monkeypatch, 2.0, 1.9, 1.95, 1.91)
    flags = ("--patience=2", "--eval-every=2", "--save-every=-1", "--warmdown-ratio=0", QUIET)
    assert small.run(tmp_path, *flags) == 0
    summary = small.summary(tmp_path)
    assert (summary["status"], summary["step"]) == ("completed", 8)
    assert "--patience" in summary["reason"]
    assert (summary["val_bpb"], summary["min_val_bpb"]) == (1.91, 1.9)
    assert checkpoint.best_step(tmp_path / "run") == 4
    assert checkpoint.steps_of(tmp_path / "run") == [4, 8], "the best and the last"
    capsys.readouterr()
    assert small.run(tmp_path, "--resume", *flags) == 0
    assert "complete at step 8" in capsys.readouterr().out


def test_patience_survives_a_restart(tmp_path, monkeypatch):
    """The state in a checkpoint is from before the evaluation of its step, which is repeated."""
    original = schedules.muon_momentum
    flags = ("--patience=3", "--eval-every=2", "--save-every=4", QUIET)
    with monkeypatch.context() as patch:
        script_evaluations(patch, 2.0, 2.1)
        patch.setattr(
            schedules, "muon_momentum", lambda step: 1 / 0 if step == 5 else original(step)
        )
        with pytest.raises(ZeroDivisionError):
            small.run(tmp_path, *flags)
    # of steps 4, 6 and 8
    script_evaluations(monkeypatch, 2.1, 2.2, 2.3)
    assert small.run(tmp_path, *flags, "--resume") == 0
    assert small.summary(tmp_path)["step"] == 8


def test_more_patience_than_before(tmp_path, monkeypatch):
    """The evaluation at which patience ended is repeated, and counted once."""
    flags = ("--eval-every=2", "--save-every=-1", "--warmdown-ratio=0", QUIET)
    script_evaluations(monkeypatch, 2.0, 2.1, 2.2)
    assert small.run(tmp_path, "--patience=2", *flags) == 0
    assert small.summary(tmp_path)["step"] == 6
    # of steps 6 and 8
    script_evaluations(monkeypatch, 2.2, 2.3)
    assert small.run(tmp_path, "--resume", "--patience=3", *flags) == 0
    assert small.summary(tmp_path)["step"] == 8
    assert small.config(tmp_path)["args"]["patience"] == 3


def test_stop_at_bpb(tmp_path, monkeypatch):
    script_evaluations(monkeypatch, 2.0, 1.5)
    assert small.run(tmp_path, "--stop-at-bpb=1.6", "--eval-every=3", QUIET) == 0
    summary = small.summary(tmp_path)
    assert (summary["status"], summary["step"]) == ("completed", 6)
    assert "--stop-at-bpb=1.6" in summary["reason"]
    assert checkpoint.kind_of(tmp_path / "run", 6) == "final"
    assert checkpoint.best_step(tmp_path / "run") == 6
    # with the rule lifted it continues
    script_evaluations(monkeypatch, 1.5, 1.45, 1.4)
    assert small.run(tmp_path, "--resume", "--stop-at-bpb=-1", "--eval-every=3", QUIET) == 0
    assert small.summary(tmp_path)["step"] == 12
