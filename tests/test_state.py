"""The state of a run: what goes into a checkpoint and comes back, and scores read from metrics."""

import json
from dataclasses import asdict

import pytest

from nanochat.run.state import Scores, TrainState


def test_round_trip_through_a_checkpoint():
    state = TrainState(
        step=7,
        training_seconds=1.5,
        skipped_steps=2,
        skipped_in_a_row=1,
        recent_losses=[2.5, 2.25],
        loss_scaler=[1024.0, 3],
        shard_tokens={"ab": 12},
        tokenizer="f" * 64,
    )
    saved = json.loads(json.dumps({"format": 2, "model": {}, **asdict(state)}))
    assert TrainState.from_saved(saved, 7, "f" * 64) == state


def test_a_run_that_begins():
    assert TrainState.from_saved({}, 0, "abc") == TrainState(tokenizer="abc")


def test_a_checkpoint_of_an_earlier_version():
    """It has scores, and does not count skipped steps in a row."""
    saved = {"step": 4, "training_seconds": 2.0, "val_bpb": 1.5, "stale_evaluations": 1}
    assert TrainState.from_saved(saved, 4, "") == TrainState(step=4, training_seconds=2.0)


@pytest.mark.parametrize(
    "finite, overflowed, skipped, in_a_row",
    [(True, False, 3, 0), (False, False, 4, 3), (False, True, 4, 2)],
)
def test_counting_a_step(finite, overflowed, skipped, in_a_row):
    state = TrainState(step=9, training_seconds=1.0, skipped_steps=3, skipped_in_a_row=2)
    state.advance(0.5, finite, overflowed, [8.0, 1])
    assert (state.step, state.training_seconds) == (10, 1.5)
    assert (state.skipped_steps, state.skipped_in_a_row) == (skipped, in_a_row)
    assert state.loss_scaler == [8.0, 1]


def test_scores_from_metrics():
    """Improvement, none, a failed evaluation, none, improvement; CORE with and without a number."""
    lines = [
        {"step": 0, "train/loss": 5.0},
        {"step": 2, "val/bpb": 2.0},
        {"step": 2, "core_metric": 0.1, "core_metric_n": 50},
        {"step": 4, "val/bpb": 2.5},
        {"step": 6, "val/bpb": None, "reason": "a rank failed"},
        {"step": 8, "val/bpb": 2.25},
        {"step": 8, "core_metric": None, "core_metric_n": 0},
        {"step": 10, "val/bpb": 1.5},
    ]
    expected = [
        Scores(),
        Scores(2.0, 2.0, 0),
        Scores(2.0, 2.0, 0, 0.1, 50),
        Scores(2.5, 2.0, 1, 0.1, 50),
        Scores(None, 2.0, 1, 0.1, 50),
        Scores(2.25, 2.0, 2, 0.1, 50),
        Scores(2.25, 2.0, 2, None, 0),
        Scores(1.5, 1.5, 0, None, 0),
    ]
    assert [Scores.from_lines(lines[:n]) for n in range(1, len(lines) + 1)] == expected
    running = Scores()
    assert [running.add_bpb(bpb) for bpb in (2.0, 2.5, None, 2.25, 1.5)] == [
        True,
        False,
        False,
        False,
        True,
    ]
