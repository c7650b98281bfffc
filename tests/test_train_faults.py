"""What training survives and what ends it: bad numbers, a full disk, data and evaluations that
fail, too little memory."""

import pytest
import small

from nanochat.data.rows import Rows
from nanochat.eval import generation
from nanochat.model.build import build
from nanochat.model.gpt import GPT
from nanochat.optim.optimizer import Optimizer
from nanochat.run import checkpoint

QUIET = "--sample-every=-1"
# Given, so that the warm-up is a single pass.
DEVICE_BATCH = "--device-batch-size=8"


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps, warm-down from step 6."""
    return small.finished()


# ---- data ----


def test_an_error_in_the_data_thread_reaches_the_user(tmp_path, finished, monkeypatch):
    original = Rows.row

    def row(self, number):
        if number == 60:
            raise ValueError("row 60 is not what it was")
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "row", row)
        with pytest.raises(ValueError, match="row 60 is not what it was"):
            small.run(tmp_path, QUIET)
    summary = small.summary(tmp_path)
    assert (summary["status"], summary["step"]) == ("failed", 7)
    assert "row 60 is not what it was" in summary["reason"]
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert small.losses(tmp_path) == small.losses(finished)


# ---- a full disk ----


def refuse_saves(monkeypatch, when):
    """A full disk for the checkpoints of the steps that satisfy `when`."""
    original = checkpoint.write

    def write(run_path, step, *more):
        if when(step):
            raise OSError(28, "No space left on device")
        original(run_path, step, *more)

    monkeypatch.setattr(checkpoint, "write", write)


def retry_immediately(monkeypatch):
    """A failed save is retried after the next step."""
    monkeypatch.setattr("nanochat.run.saver.RETRY_SECONDS", -1.0)


def test_a_full_disk_does_not_end_a_run(tmp_path, finished, monkeypatch, capsys):
    """Saves that fail are reported and retried; training and its records are as if nothing had
    happened."""
    refuse_saves(monkeypatch, lambda step: step in (4, 5))
    retry_immediately(monkeypatch)
    assert small.run(tmp_path, QUIET) == 0
    shown = capsys.readouterr().out
    assert "the checkpoint of step 4 cannot be saved" in shown
    assert "checkpoint saved at step" in shown
    assert small.losses(tmp_path) == small.losses(finished)
    assert checkpoint.newest_intact(tmp_path / "run", print) == 12


def test_the_state_before_the_warm_down_is_saved_as_such_after_a_failure(tmp_path, monkeypatch):
    # refused once: the copy of the state is retried, as the kind that it had
    failures = []

    def first_time(step):
        if step == 6 and not failures:
            failures.append(step)
            return True
        return False

    refuse_saves(monkeypatch, first_time)
    retry_immediately(monkeypatch)
    assert small.run(tmp_path, "--save-every=-1", "--eval-every=-1", QUIET) == 0
    assert failures == [6] and checkpoint.kind_of(tmp_path / "run", 6) == "before_warmdown"


def test_a_disk_that_stays_full(tmp_path, monkeypatch, capsys):
    """The last good checkpoint stays and is named; once there is room the run resumes from it."""
    with monkeypatch.context() as patch:
        refuse_saves(patch, lambda step: step > 4)
        patch.setattr("nanochat.run.saver.LAST_ATTEMPTS", (0.0, 0.0))
        assert small.run(tmp_path, QUIET) == 1
    shown = capsys.readouterr().out
    assert "newest checkpoint is step 4" in shown
    assert "cannot be saved" in shown.splitlines()[-1]
    summary = small.summary(tmp_path)
    assert summary["status"] == "failed" and "No space left" in summary["reason"]
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert small.summary(tmp_path)["status"] == "completed"


# ---- numbers that are not finite ----


def poison(monkeypatch, when):
    """Make the loss NaN at the forward passes of training whose number (0 is the warm-up) satisfies
    `when`. Only for runs with DEVICE_BATCH."""
    original, count = GPT.forward, [0]

    def forward(self, ids, targets=None, cache=None, **options):
        out = original(self, ids, targets, cache, **options)
        if self.training:
            count[0] += 1
            if when(count[0] - 1):
                return out * float("nan")
        return out

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_non_finite_step_is_skipped(tmp_path, monkeypatch, capsys):
    """A step without an update is reported, counted, and has no loss in the metrics."""
    poison(monkeypatch, lambda n: n == 4)
    assert small.run(tmp_path, DEVICE_BATCH, QUIET) == 0
    line = next(line for line in small.lines(tmp_path) if line["step"] == 3 and "train/dt" in line)
    assert line["train/loss"] is None and line["skipped"] == "non-finite loss"
    assert small.summary(tmp_path)["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in small.weights(tmp_path, 12).values())
    shown = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan: not finite, so the weights were left" in shown


def test_the_state_before_the_warm_down_is_saved_after_a_skipped_step(tmp_path, monkeypatch):
    """Once a step has shown that the weights, which the skipped one left unchanged, are good."""
    # pass 6 is that of step 5, so the state after it has a doubtful history
    poison(monkeypatch, lambda n: n == 6)
    flags = ("--save-every=-1", "--eval-every=-1", QUIET, DEVICE_BATCH)
    assert small.run(tmp_path, *flags) == 0
    assert [line["step"] for line in small.lines(tmp_path) if "skipped" in line] == [5]
    assert checkpoint.kind_of(tmp_path / "run", 6) == "before_warmdown"


def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch, capsys):
    """Nothing is kept of a state that no good step has followed."""
    # steps 6, 7 and 8 are skipped: the save due at step 8 is held, and never written
    poison(monkeypatch, lambda n: n > 6)
    assert small.run(tmp_path, "--max-skipped=3", DEVICE_BATCH, QUIET) == 1
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "last good checkpoint is step 6" in error
    assert small.summary(tmp_path)["status"] == "failed"
    assert checkpoint.steps_of(tmp_path / "run") == [4, 6]


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, finished, monkeypatch, capsys):
    """The update of a step whose loss and gradient were finite spoils a weight: that is noticed a
    step later, and nothing of it is kept."""
    original, count = Optimizer.step, [0]
    spoiled = []

    def step(self, *args):
        original(self, *args)
        count[0] += 1
        if count[0] == 6:
            spoiled[0].fill_(float("nan"))

    def build_and_note(*args, **options):
        model = build(*args, **options)
        spoiled.append(model.head.weight.data)
        return model

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.run.lifecycle.build", build_and_note)
        patch.setattr(Optimizer, "step", step)
        assert small.run(tmp_path, "--debug-nans", QUIET) == 1
    captured = capsys.readouterr()
    assert (
        "the checkpoint of step 6 cannot be saved "
        "(model.safetensors would hold numbers that are not finite" in captured.out
    )
    assert "the weights head.weight hold" in captured.err
    assert "the last good checkpoint is step 4" in captured.err
    assert checkpoint.steps_of(tmp_path / "run") == [4]
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert small.losses(tmp_path) == small.losses(finished)


# ---- evaluations and samples ----


def test_an_evaluation_that_is_not_a_number_does_not_end_a_run(tmp_path, monkeypatch):
    original = GPT.forward

    def forward(self, ids, targets=None, cache=None, **options):
        out = original(self, ids, targets, cache, **options)
        return out if self.training or targets is None else out * float("nan")

    monkeypatch.setattr(GPT, "forward", forward)
    assert small.run(tmp_path, QUIET) == 0
    assert [line["val/bpb"] for line in small.lines(tmp_path) if "val/bpb" in line] == [None] * 3


def test_failed_evaluations_and_samples_do_not_end_a_run(tmp_path, finished, monkeypatch):
    original = GPT.forward

    def forward(self, ids, targets=None, cache=None, **options):
        if not self.training:
            raise RuntimeError("no evaluation today")
        return original(self, ids, targets, cache, **options)

    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(generation, "generate_text", lambda *args, **kwargs: 1 / 0)
    assert small.run(tmp_path) == 0
    assert small.losses(tmp_path) == small.losses(finished)
    failed = [line for line in small.lines(tmp_path) if "val/bpb" in line]
    assert [line["val/bpb"] for line in failed] == [None] * 3
    assert "no evaluation today" in failed[0]["reason"]
    assert small.lines(tmp_path, name="samples.jsonl")[0]["reason"].startswith("ZeroDivisionError")
    summary = small.summary(tmp_path)
    assert summary["val_bpb"] is None and summary["status"] == "completed"


# ---- memory ----


def test_out_of_memory_names_a_remedy(tmp_path, monkeypatch, capsys):
    def forward(self, ids, targets=None, cache=None, **options):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
        )

    monkeypatch.setattr(GPT, "forward", forward)
    assert small.run(tmp_path, "--device-batch-size=4", *small.BARE) == 1
    assert (
        "out of memory with --device-batch-size=4; --device-batch-size=2 would likely fit"
        in capsys.readouterr().err
    )
    assert small.summary(tmp_path)["status"] == "failed"
