"""Time in a run, with an injected clock: steps, rolling saves, time budgets, stalls."""

import pytest

from nanochat.optim.schedules import Schedule
from nanochat.run.clock import Clock
from nanochat.run.plan import Plan


class Time:
    """A clock that stands still until it is told how many seconds passed."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def clock_after(durations, **options):
    """A Clock and its Time after steps of these durations."""
    now = Time()
    clock = Clock(now=now, **options)
    for number, seconds in enumerate(durations):
        with clock.step(number):
            now.seconds += seconds
    return clock, now


def test_steps_are_timed_and_counted():
    clock, now = clock_after([2.0, 4.0, 3.0])
    assert (clock.steps, clock.seconds, clock.step_seconds) == (3, 9.0, 3.0)
    assert clock.usual_seconds() == 3.0
    assert clock.seconds_for(10) == 30.0
    now.seconds += 100
    assert clock.seconds == 9.0, "time between steps does not count"


def test_nothing_is_known_before_the_first_step():
    clock = Clock(now=Time())
    assert clock.usual_seconds() == 0.0 and clock.seconds_for(10) is None


def test_the_device_is_waited_for_on_both_sides_of_a_step():
    waited = []
    clock = Clock(now=Time(), synchronize=lambda: waited.append(len(waited)))
    with clock.step(0):
        assert waited == [0]
    assert waited == [0, 1]


def test_a_step_that_fails_is_not_counted():
    clock = Clock(now=Time())
    with pytest.raises(ValueError, match="no luck"), clock.step(0):
        raise ValueError("no luck")
    assert clock.steps == 0


@pytest.mark.parametrize("minutes, due", [(-1, False), (2, False), (1.5, True)])
def test_rolling_saves(minutes, due):
    now = Time()
    clock = Clock(now=now, save_minutes=minutes)
    now.seconds = 100
    assert clock.save_due() is due
    clock.note_save()
    assert clock.save_due() is False


@pytest.mark.parametrize(
    "durations, budget, steps",
    [
        ([1.0] * 10, None, None),  # no budget
        ([1.0] * 5, 20, None),  # too few steps before the latest
        ([1.0] * 6, 20, 20),  # 5 steps and a tenth of the budget before the latest
        ([1.0] * 10, 100, None),  # 9 of 100 seconds before the latest
        ([1.0] * 11, 100, 100),
        ([1.0] * 5 + [3.0], 20, 6 + 9),  # 8 of 20 s gone, 8 s for 6 steps
        # one very slow step decides nothing: 9 of 20 s gone, 1 s a step
        ([1.0] * 5 + [4.0], 20, 6 + 11),
        ([5.0] * 6, 20, 6 + 1),  # over already: one more
    ],
)
def test_steps_in_a_time_budget(durations, budget, steps):
    clock, _ = clock_after(durations)
    assert clock.steps_in_budget(budget, len(durations), sum(durations), first=True) == steps


def test_a_later_decision_needs_only_some_steps():
    clock, _ = clock_after([1.0] * 6)
    assert clock.steps_in_budget(1000, 6, 6.0, first=True) is None
    assert clock.steps_in_budget(1000, 6, 6.0, first=False) == 1000


def test_the_rate_is_that_of_the_latest_steps():
    """A twentieth of the budget: 10 s of 200, or 5 steps if they take longer."""
    clock, _ = clock_after([1.0] * 50 + [2.0] * 10)
    assert clock.latest_step_seconds(10) == 2.0
    assert clock.latest_step_seconds(2) == 2.0
    assert clock.steps_in_budget(200, 60, 70.0, first=False) == 60 + 65


@pytest.mark.parametrize("usual, suspended", [(0.01, 90.0), (0.01, 2.1), (10.0, 51.0)])
def test_a_suspended_step_counts_as_a_usual_one(usual, suspended):
    clock, _ = clock_after([usual] * 3 + [suspended] + [usual] * 6)
    assert clock.seconds == pytest.approx(10 * usual)
    assert clock.latest_step_seconds(1e9) == pytest.approx(usual)


@pytest.mark.parametrize("usual, slow", [(0.01, 1.9), (10.0, 49.0), (1.0, 1.4)])
def test_a_slow_step_counts(usual, slow):
    clock, _ = clock_after([usual] * 3 + [slow])
    assert clock.counted_seconds == pytest.approx(slow)
    assert clock.seconds == pytest.approx(3 * usual + slow)


def test_a_machine_that_becomes_ten_times_slower_is_not_suspended():
    clock, _ = clock_after([1.0] * 3 + [10.0] * 6)
    assert clock.seconds == 3 + 1 + 5 * 10
    assert clock.latest_step_seconds(40) == 10.0


def time_of_run(seconds_of_step, budget, ratio=0.5, **schedule):
    """Seconds that a run with a time budget trains, and its plan. seconds_of_step(seconds so far):
    how long the next step takes."""
    values = {
        "shape": "trapezoid",
        "warmup_ratio": 0.0,
        "warmup_steps": -1,
        "warmdown_ratio": ratio,
        "final_lr_frac": 0.0,
    }
    plan = Plan(
        horizon="target_minutes",
        horizon_value=budget / 60,
        parameters={},
        scaling_parameters=1,
        flops_per_token=1,
        rows_per_step=1,
        total_batch_tokens=1,
        num_iterations=None,
        tokens=1,
        warmup_steps=0,
        warmdown_steps=0,
        groups={},
        schedule=Schedule(**values | schedule),
    )
    now = Time()
    clock = Clock(now=now)
    step, seconds = 0, 0.0
    while not plan.is_last(step):
        steps = clock.steps_in_budget(
            plan.budget_to_fit(step), step, seconds, first=plan.num_iterations is None
        )
        if steps:
            plan.set_steps(steps, done=step)
        with clock.step(step):
            now.seconds += seconds_of_step(seconds)
        seconds += clock.counted_seconds
        step += 1
    return seconds, plan


@pytest.mark.parametrize("factor", [0.7, 1 / 0.7, 1.3, 1 / 1.3])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("ratio", [0.5, 0.2, 0.0])
@pytest.mark.parametrize("usual", [0.05, 1.0])
def test_a_budget_is_kept_when_the_speed_changes(usual, ratio, share, factor):
    """At some share of the budget, by 30%."""
    budget = 300.0

    def seconds_of_step(seconds):
        return usual * (factor if seconds >= share * budget else 1.0)

    seconds, plan = time_of_run(seconds_of_step, budget, ratio)
    assert seconds == pytest.approx(budget, rel=0.03)
    last = plan.lr_multiplier(plan.num_iterations - 1)
    assert last < 0.05 if ratio else last == 1.0


def test_a_budget_is_kept_when_the_process_is_suspended():
    """For 90 s at the third of steps of 10 ms, and again later."""
    count = [0]

    def seconds_of_step(seconds):
        count[0] += 1
        return 90.0 if count[0] in (3, 2000) else 0.01

    seconds, plan = time_of_run(seconds_of_step, 60.0)
    assert seconds == pytest.approx(60.0, rel=0.01)
    assert plan.num_iterations == pytest.approx(6000, rel=0.01)


def test_earlier_starts_count_in_a_time_budget():
    """100 steps in 100 s before this start, which runs at half that speed."""
    clock, _ = clock_after([2.0] * 7)
    assert clock.steps_in_budget(120, 107, 114.0, first=True) == 107 + 3


def test_stalls():
    clock, now = clock_after([10.0] * 5)
    now.seconds += 199
    assert clock.stalled_seconds() is None
    now.seconds += 2
    # 20 times the usual step
    assert clock.stalled_seconds() == 201
    assert clock.stalled_seconds() is None, "again only after twice that time"
    now.seconds += 200
    assert clock.stalled_seconds() == 401
    clock.begin("the evaluation of step 5")
    now.seconds += 1000
    assert clock.stalled_seconds() is None, "nobody knows how long that takes"
    now.seconds += 801
    assert clock.stalled_seconds() == 1801 and clock.doing == "the evaluation of step 5"


def test_quick_steps_are_given_a_minute():
    clock, now = clock_after([0.01] * 5)
    now.seconds += 59
    assert clock.stalled_seconds() is None
    now.seconds += 2
    assert clock.stalled_seconds() is not None
