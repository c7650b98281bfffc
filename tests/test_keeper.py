"""When the state of a run is saved and by which rank; what becomes of held and failed saves."""

from dataclasses import asdict

import pytest

from nanochat.run.clock import Clock
from nanochat.run.keeper import Keeper
from nanochat.run.state import TrainState

GATHERED = {"head.weight": {"exp_avg": "all shares"}}


class Saver:
    """Notes what a keeper asks of rank 0's saver."""

    def __init__(self, busy=False, can_retry=False, failure=""):
        self.calls = []
        self.is_busy = busy
        self.may_retry = can_retry
        self.failure = failure

    def busy(self):
        return self.is_busy

    def can_retry(self):
        return self.may_retry

    def finish(self):
        return self.failure

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))

        return call

    @property
    def saved(self):
        """(step, kind, hold) of each save."""
        return [(call[1], call[2], call[6]) for call in self.calls if call[0] == "save"]


class Optimizer:
    """Counts how often its state is gathered, for which every rank is needed."""

    def __init__(self):
        self.gathered = 0

    def state(self):
        self.gathered += 1
        return GATHERED


def keeper_with(saver, *, first_step=0, enabled=True, save_minutes=1):
    """A Keeper whose clock shows what keeper.time[0] says."""
    time = [0.0]
    keeper = Keeper(
        saver,
        model="the model",
        optimizer=Optimizer(),
        shard_tokens={"shard": 12},
        clock=Clock(now=lambda: time[0], save_minutes=save_minutes),
        first_step=first_step,
        enabled=enabled,
    )
    keeper.time = time
    return keeper


def test_rank_0_saves_the_whole_state():
    keeper = keeper_with(Saver())
    state = TrainState(step=4, training_seconds=2.0)
    keeper.save("permanent", state)
    # with the tokens of the shards that have been read until now
    assert state.shard_tokens == {"shard": 12}
    saved = ("save", 4, "permanent", "the model", GATHERED, asdict(state), False)
    assert keeper.saver.calls == [saved]


def test_the_other_ranks_only_take_part_in_gathering():
    keeper = keeper_with(None)
    keeper.time[0] = 50.0
    state = TrainState(step=4)
    keeper.save("permanent", state)
    assert keeper.optimizer.gathered == 1
    assert state.shard_tokens == {} and keeper.clock.saved_at == 50.0
    keeper.mark_best(4, 1.5)
    keeper.after_step(True)
    keeper.wait()
    keeper.time[0] = 1000.0
    assert keeper.rolling_due() is False and keeper.finish() == ""


@pytest.mark.parametrize(
    "kind, saved",
    [("rolling", False), ("permanent", False), ("before_warmdown", False), ("final", True)],
)
@pytest.mark.parametrize("first_step", [0, 6])
def test_the_state_that_a_start_begins_with_is_saved_already(kind, saved, first_step):
    keeper = keeper_with(Saver(), first_step=first_step)
    keeper.save(kind, TrainState(step=first_step))
    assert keeper.saver.saved == ([(first_step, kind, False)] if saved else [])
    assert keeper.optimizer.gathered == len(keeper.saver.saved)


@pytest.mark.parametrize("kind", ["rolling", "permanent", "before_warmdown", "final"])
def test_no_save(kind):
    keeper = keeper_with(Saver(), enabled=False)
    keeper.save(kind, TrainState(step=6))
    keeper.time[0] = 1000.0
    assert keeper.saver.saved == [] and keeper.optimizer.gathered == 0
    assert keeper.rolling_due() is False


@pytest.mark.parametrize(
    "first, second, saves",
    [
        # (kind, hold) of two saves of one step
        (("permanent", False), ("rolling", False), 1),
        (("rolling", False), ("rolling", False), 1),
        # a stronger kind replaces a rolling one
        (("rolling", False), ("final", False), 2),
        (("permanent", False), ("final", False), 2),
        # what is only held is not on disk yet
        (("permanent", True), ("rolling", False), 2),
        (("rolling", True), ("rolling", True), 2),
    ],
)
def test_a_state_that_is_saved_already(first, second, saves):
    keeper = keeper_with(Saver())
    state = TrainState(step=5)
    for kind, hold in (first, second):
        keeper.save(kind, state, hold)
    expected = [(5, *first), (5, *second)][:saves]
    assert keeper.saver.saved == expected


def test_rolling_states_of_other_steps_are_saved():
    keeper = keeper_with(Saver())
    for step in (5, 6, 9):
        keeper.save("rolling", TrainState(step=step))
    assert [step for step, _, _ in keeper.saver.saved] == [5, 6, 9]


@pytest.mark.parametrize(
    "saver, minutes, seconds, due",
    [
        ({}, 1, 59, False),
        ({}, 1, 61, True),
        ({}, -1, 10**6, False),
        # a save in progress, or one that will be retried, comes first
        ({"busy": True}, 1, 61, False),
        ({"can_retry": True}, 1, 61, False),
    ],
)
def test_when_a_rolling_checkpoint_is_due(saver, minutes, seconds, due):
    keeper = keeper_with(Saver(**saver), save_minutes=minutes)
    keeper.time[0] = seconds
    assert keeper.rolling_due() is due


def test_any_save_puts_the_next_rolling_one_off():
    keeper = keeper_with(Saver())
    keeper.time[0] = 50.0
    keeper.save("permanent", TrainState(step=3))
    keeper.time[0] = 100.0
    assert keeper.rolling_due() is False
    keeper.time[0] = 111.0
    assert keeper.rolling_due() is True


@pytest.mark.parametrize("finite, calls", [(True, [("release",), ("retry",)]), (False, [])])
def test_after_a_step(finite, calls):
    """Only a good step shows that what was held is good."""
    keeper = keeper_with(Saver())
    keeper.after_step(finite)
    assert keeper.saver.calls == calls


def test_what_is_passed_on_to_the_saver():
    keeper = keeper_with(Saver(failure="the disk is full"))
    keeper.mark_best(7, 1.25)
    keeper.wait()
    assert keeper.saver.calls == [("mark_best", 7, 1.25), ("wait",)]
    assert keeper.finish() == "the disk is full"
