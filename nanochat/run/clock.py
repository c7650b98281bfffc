"""Everything about time in a run: the duration of steps, the rate, rolling saves, the time budget,
and stalls. Tested with an injected clock."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

LEAST_MEASURED_STEPS = 5  # before the number of steps of a time budget is decided
MEASURED_SHARE = 0.1  # of the budget that is measured before the first decision
# The rate is that of the latest steps, which took this share of the budget together; steps that
# took so many times their median are left out.
RATE_SHARE = 0.05
RATE_OUTLIER = 3
RATE_STEPS = 4096  # at most
# A step during which this process, or a rank that it waited for, was suspended: it took so many
# times its usual duration, and so many seconds more. It counts with its usual duration. If the next
# step takes as long, the machine has become slow, and that one counts in full.
SUSPENDED_FACTOR = 5
SUSPENDED_SECONDS = 2.0
RECENT_STEPS = 32  # of which the median is what a step usually takes
# A step counts as stalled after so many times its usual duration, and at least so many seconds;
# other work, whose usual duration is unknown, after STALL_PATIENCE_SECONDS.
STALL_FACTOR = 20
STALL_FLOOR_SECONDS = 60.0
STALL_PATIENCE_SECONDS = 1800.0


class Clock:
    """Measures the steps of one start of a run. now() is in seconds; synchronize() waits until the
    device has done what it was given."""

    def __init__(
        self,
        *,
        save_minutes: float = -1,
        synchronize: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """save_minutes: --save-every-minutes, -1 for no rolling saves."""
        self.now = now
        self.synchronize = synchronize
        self.save_minutes = save_minutes
        self.saved_at = now()
        # the steps of this start: how many, how long in all, the latest, the recent ones
        self.steps = 0
        self.seconds = 0.0
        self.step_seconds = 0.0
        # what the latest adds to the training time: nothing for a suspension
        self.counted_seconds = 0.0
        self.was_long = False
        self.recent: list[float] = []
        self.measured: collections.deque[float] = collections.deque(maxlen=RATE_STEPS)
        self.steps_before = 0
        self.seconds_before = 0.0
        # for stalls: what is being done, since when, and how long it may take
        self.doing = "the first step"
        self.moved_at = now()
        self.limit = STALL_PATIENCE_SECONDS

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Times the body as step `number`."""
        self.steps_before = self.steps
        self.seconds_before = self.seconds
        self.synchronize()
        started = self.now()
        yield
        self.synchronize()
        self.step_seconds = self.now() - started
        usual = self.usual_seconds()
        longest = max(SUSPENDED_FACTOR * usual, usual + SUSPENDED_SECONDS)
        is_long = bool(self.recent) and self.step_seconds > longest
        is_suspended = is_long and not self.was_long
        self.was_long = is_long
        self.counted_seconds = usual if is_suspended else self.step_seconds
        self.steps += 1
        self.seconds += self.counted_seconds
        self.recent = [*self.recent[-(RECENT_STEPS - 1) :], self.step_seconds]
        self.measured.append(self.counted_seconds)
        patience = max(STALL_FLOOR_SECONDS, STALL_FACTOR * self.usual_seconds())
        self.begin(f"step {number + 1}", patience)

    def usual_seconds(self) -> float:
        """What a step usually takes, 0 before the first."""
        return statistics.median(self.recent) if self.recent else 0.0

    def seconds_for(self, steps: int) -> float | None:
        """How long so many steps take at the rate so far; None before the first step."""
        return steps * self.seconds / self.steps if self.steps else None

    def rate(self, per_step: float) -> float | None:
        """Per second, what each step has so much of, at what a step usually takes; None before the
        first."""
        usual = self.usual_seconds()
        return per_step / usual if usual else None

    # ----- rolling saves

    def save_due(self) -> bool:
        """Whether the last save is long enough ago for a rolling one."""
        overdue = self.now() - self.saved_at > 60 * self.save_minutes
        return self.save_minutes != -1 and overdue

    def note_save(self) -> None:
        """A save begins now."""
        self.saved_at = self.now()

    # ----- the time budget

    def steps_in_budget(
        self, budget_seconds: float | None, steps_done: int, seconds_done: float, first: bool
    ) -> int | None:
        """The number of steps, those done included, that a time budget allows at the present rate.

        None without a budget and until enough has been measured. seconds_done: training time so
        far, earlier starts included. first: nothing has been decided yet, so a tenth of the budget
        is measured."""
        # looked at before the latest step, whose time is then part of the rate
        if budget_seconds is None or self.steps_before < LEAST_MEASURED_STEPS:
            return None
        if first and self.seconds_before < MEASURED_SHARE * budget_seconds:
            return None
        left = budget_seconds - seconds_done
        step_seconds = self.latest_step_seconds(RATE_SHARE * budget_seconds)
        return steps_done + max(1, round(left / step_seconds))

    def latest_step_seconds(self, seconds: float) -> float:
        """Mean duration of the latest steps that took so many seconds together, at least
        LEAST_MEASURED_STEPS, without outliers: one slow step decides nothing."""
        latest: list[float] = []
        total = 0.0
        for duration in reversed(self.measured):
            if total >= seconds and len(latest) >= LEAST_MEASURED_STEPS:
                break
            latest.append(duration)
            total += duration
        most = RATE_OUTLIER * statistics.median(latest)
        return statistics.fmean(duration for duration in latest if duration <= most)

    # ----- stalls

    def begin(self, doing: str, limit_seconds: float = STALL_PATIENCE_SECONDS) -> None:
        """Something begins, or is still making progress, that may take so many seconds."""
        self.doing = doing
        self.moved_at = self.now()
        self.limit = limit_seconds

    def stalled_seconds(self) -> float | None:
        """For how long nothing has moved, once that is too long; then again after twice that
        time."""
        silent = self.now() - self.moved_at
        if silent <= self.limit:
            return None
        self.limit *= 2
        return silent
