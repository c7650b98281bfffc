"""Time in a run, with an injected clock: steps, rolling saves, time budgets, stalls."""

import pytest

from nanochat.run.clock import Clock


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
        ([1.0] * 5 + [4.0], 20, 6 + 7),  # 9 of 20 s gone, 1.5 s a step: 7.33 more
        ([5.0] * 6, 20, 6 + 1),  # over already: one more
    ],
)
def test_steps_in_a_time_budget(durations, budget, steps):
    clock, _ = clock_after(durations)
    assert clock.steps_in_budget(budget, len(durations), sum(durations)) == steps


def test_earlier_starts_count_in_a_time_budget():
    """100 steps in 100 s before this start, which runs at half that speed."""
    clock, _ = clock_after([2.0] * 7)
    assert clock.steps_in_budget(120, 107, 114.0) == 107 + 3


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
