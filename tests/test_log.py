"""What a run writes down: the lines of metrics, config and summary, samples, its last words; and
that other ranks write and show nothing."""

import json
import math

import pytest
import torch

from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.schedules import Schedule
from nanochat.run.clock import Clock
from nanochat.run.folder import RunFolder
from nanochat.run.log import RunLog, StepResult
from nanochat.run.plan import Machine, Plan
from nanochat.run.state import Scores, TrainState

OFF = LossScaler(enabled=False)
# 0.5 s: 512 tokens a second, which take 51,200 of the 2 x 1e6 FLOP/s of both devices
MACHINE = Machine("cpu", devices=2, peak_flops=1e6, peak="assumed")
STEP = StepResult(loss=2.5, grad_norm=0.75, finite=True, lr_multiplier=0.5, seconds=0.5, spike=None)
SKIPPED = StepResult(
    loss=math.nan, grad_norm=math.nan, finite=False, lr_multiplier=0.5, seconds=0.5, spike=None
)


def make_plan(**changes):
    values = {
        "horizon": "num_iterations",
        "horizon_value": 12,
        "parameters": {"total": 1000},
        "scaling_parameters": 800,
        "flops_per_token": 100,
        "rows_per_step": 8,
        "total_batch_tokens": 256,
        "num_iterations": 12,
        "tokens": 12 * 256,
        "warmup_steps": 0,
        "warmdown_steps": 6,
        "groups": {"matrices": {"lr": 0.02}},
        "schedule": Schedule("trapezoid", 0.0, -1, 0.5, 0.0),
    }
    return Plan(**values | changes)


class Trackers:
    """Notes what it gets."""

    def __init__(self):
        self.lines = []
        self.texts = []
        self.configs = []
        self.finished = []

    def log(self, line):
        self.lines.append(line)

    def text(self, step, prompt, text):
        self.texts.append((step, prompt, text))

    def update_config(self, config):
        self.configs.append(config)

    def finish(self, summary, exit_code):
        self.finished.append((summary, exit_code))


def open_log(path, *, writes=True, state=None, scores=None, plan=None, vocabulary=None):
    """A RunLog in a folder, with trackers that take notes."""
    log = RunLog(
        RunFolder(path),
        writes=writes,
        plan=plan or make_plan(),
        machine=MACHINE,
        device=torch.device("cpu"),
        state=state or TrainState(step=3, training_seconds=1.5),
        scores=scores or Scores(),
        tokens_per_epoch=1536,
        untrained_vocabulary=vocabulary,
    )
    if writes:
        log.trackers = Trackers()
    return log


def clock_after(*durations):
    """A Clock after steps of these durations."""
    now = [0.0]
    clock = Clock(now=lambda: now[0])
    for number, seconds in enumerate(durations):
        with clock.step(number):
            now[0] += seconds
    return clock


def lines(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


POSITION = {
    "step": 3,
    "tokens": 768,
    "total_training_flops": 76800,
    "total_training_time": 1.5,
}
OF_STEP = {
    "train/loss": 2.5,
    "train/lr": 0.01,
    "train/lrm": 0.5,
    "train/grad_norm": 0.75,
    "train/dt": 0.5,
    "train/tok_per_sec": 512.0,
    "train/mfu": 2.56,
    "train/epoch": 0.5,
}


# ---- steps and evaluations ----


def test_the_line_of_a_step(tmp_path):
    log = open_log(tmp_path)
    log.step(STEP, OFF, clock_after(0.5))
    (line,) = lines(tmp_path)
    assert list(line) == [*POSITION, *OF_STEP]
    assert line == pytest.approx(POSITION | OF_STEP)
    assert log.trackers.lines == [line]


@pytest.mark.parametrize(
    "changes, scaler, more",
    [
        ({"spike": 7.5}, OFF, {"spike": 7.5}),
        ({}, LossScaler(enabled=True, state=[1024.0, 3]), {"train/loss_scale": 1024.0}),
        (
            {"finite": False, "loss": math.nan, "grad_norm": math.nan},
            OFF,
            {"train/loss": None, "train/grad_norm": None, "skipped": "non-finite loss"},
        ),
        (
            {"finite": False, "grad_norm": math.inf},
            OFF,
            {"train/grad_norm": None, "skipped": "non-finite gradient"},
        ),
    ],
)
def test_what_a_line_has_only_in_some_steps(tmp_path, changes, scaler, more):
    result = StepResult(**{**vars(STEP), **changes})
    open_log(tmp_path).step(result, scaler, clock_after(0.5))
    assert lines(tmp_path) == [pytest.approx(POSITION | OF_STEP | more)]


def test_the_live_line_of_a_step(tmp_path, capsys):
    """8 steps of 0.5 s are left after the fourth; the loss is smoothed from the second line on."""
    log = open_log(tmp_path)
    log.step(STEP, OFF, clock_after(0.5))
    log.state.step = 11
    log.step(StepResult(3.5, 0.75, True, 0.5, 0.5), OFF, clock_after(0.5))
    first, last = capsys.readouterr().out.splitlines()
    assert first == "step 4/12 | loss 2.5000 | 512 tok/s | mfu 2.6% | eta 4.0s"
    # 0.95 x 2.5 + 0.05 x 3.5
    assert last == "step 12/12 | loss 2.5500 | 512 tok/s | mfu 2.6% | eta 0.0s"


def test_the_live_line_before_the_end_is_known(tmp_path, capsys):
    plan = make_plan(horizon="target_minutes", horizon_value=1, num_iterations=None)
    log = open_log(tmp_path, plan=plan, state=TrainState())
    log.step(STEP, OFF, clock_after(0.5))
    assert capsys.readouterr().out.endswith("step 1 | loss 2.5000 | 512 tok/s | mfu 2.6% | eta ?\n")


def test_the_shown_loss_recovers_after_a_skipped_step(tmp_path, capsys):
    log = open_log(tmp_path, state=TrainState())
    clock = clock_after(0.5)
    for result in (STEP, SKIPPED, STEP):
        log.step(result, OFF, clock)
        log.state.step += 1
    shown = [line.split(" | ")[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["loss 2.5000", "loss nan", "loss 2.5000"]


def test_remarks_on_a_loss_are_shown(tmp_path, capsys):
    log = open_log(tmp_path, vocabulary=1000, state=TrainState())
    log.step(STEP, OFF, clock_after(0.5))
    assert "warning: the loss at step 0 is 2.500" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overflowed, more",
    [(False, ""), (True, "; fp16 overflowed, the loss is scaled by 512 from here on")],
)
def test_a_skipped_step_is_reported(tmp_path, capsys, overflowed, more):
    """After it has been counted."""
    log = open_log(tmp_path)
    log.skipped(SKIPPED, overflowed, LossScaler(enabled=overflowed, state=[512.0, 0]))
    assert capsys.readouterr().out == (
        "step 2: loss nan, gradient norm nan: not finite, so the weights were left unchanged"
        f"{more}\n"
    )


def test_the_line_of_an_evaluation(tmp_path):
    log = open_log(tmp_path)
    log.line(**{"val/bpb": 1.25, "val/loss": 3.5})
    log.line(**{"val/bpb": None, "val/loss": None, "reason": "a rank failed"})
    expected = [
        POSITION | {"val/bpb": 1.25, "val/loss": 3.5},
        POSITION | {"val/bpb": None, "val/loss": None, "reason": "a rank failed"},
    ]
    assert lines(tmp_path) == log.trackers.lines == expected


def test_samples(tmp_path, capsys):
    log = open_log(tmp_path)
    log.sample("Once", " upon a time", "")
    log.sample("Twice", None, "ZeroDivisionError: division by zero")
    assert lines(tmp_path, "samples.jsonl") == [
        {"step": 3, "prompt": "Once", "text": " upon a time"},
        {
            "step": 3,
            "prompt": "Twice",
            "text": None,
            "reason": "ZeroDivisionError: division by zero",
        },
    ]
    assert log.trackers.texts == [(3, "Once", " upon a time")]
    assert capsys.readouterr().out.splitlines() == [
        "--- sample at step 3, prompt 'Once'",
        "Once upon a time",
        "step 3: sampling failed, training continues (ZeroDivisionError: division by zero)",
    ]


def test_the_steps_of_a_time_budget_are_written_down(tmp_path, capsys):
    plan = make_plan(horizon="target_minutes", horizon_value=1, num_iterations=None)
    log = open_log(tmp_path, plan=plan)
    log.config = {"args": {}}
    plan.fix_steps(40, done=3)
    log.steps_fixed(clock_after(0.5, 1.0, 1.5))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"args": {}, "plan": plan.as_dict(), "format": 1}
    assert log.trackers.configs == [{"args": {}, "plan": plan.as_dict()}]
    assert capsys.readouterr().out == (
        "time budget: 40 steps at 1000.0 ms, 10,240 tokens; warm-down over the last 20\n"
    )


def test_corrections_of_a_time_budget_are_written_down_and_shown_if_they_are_large(
    tmp_path, capsys
):
    plan = make_plan(horizon="target_minutes", horizon_value=1, num_iterations=None)
    plan.fix_steps(1000, done=3)
    log = open_log(tmp_path, plan=plan)
    log.config = {"args": {}}
    for done, steps in ((500, 991), (600, 990), (700, 995)):
        plan.set_steps(steps, done)
        log.steps_fixed(clock_after(0.0075))
    assert json.loads((tmp_path / "config.json").read_text())["plan"] == plan.as_dict()
    assert capsys.readouterr().out == (
        "time budget: 990 steps instead of 1000, since a step takes 7.5 ms now\n"
    )


# ---- the summary ----

SCORES = Scores(
    val_bpb=1.5, min_val_bpb=1.25, stale_evaluations=1, core_metric=0.125, core_metric_n=50
)


def test_the_summary(tmp_path):
    state = TrainState(step=3, training_seconds=1.5, skipped_steps=2)
    log = open_log(tmp_path, state=state, scores=SCORES)
    log.config = {"args": {"depth": 2}}
    summary = log.summarize("stopped", "asked to")
    memory = summary.pop("peak_memory_bytes")
    assert memory > 10**7
    # 768 tokens in 1.5 s
    assert summary == pytest.approx(
        {
            "status": "stopped",
            "reason": "asked to",
            **POSITION,
            "val_bpb": 1.5,
            "min_val_bpb": 1.25,
            "core_metric": 0.125,
            "core_metric_n": 50,
            "tok_per_sec": 512.0,
            "mfu": 2.56,
            "skipped_steps": 2,
            "checkpoint": None,
        }
    )
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"format": 1, **summary, "peak_memory_bytes": memory}
    assert json.loads((tmp_path / "config.json").read_text())["args"] == {"depth": 2}


def test_the_summary_before_the_first_step(tmp_path):
    log = open_log(tmp_path, state=TrainState())
    summary = log.summarize("running")
    assert summary["tok_per_sec"] is None and summary["mfu"] is None
    assert (summary["step"], summary["val_bpb"]) == (0, None)


def test_the_end(tmp_path):
    """The trackers get the summary and the exit code."""
    log = open_log(tmp_path)
    log.end("failed", "no data", 1)
    ((summary, code),) = log.trackers.finished
    assert (summary["status"], summary["reason"], code) == ("failed", "no data", 1)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


def test_an_end_before_the_trackers_are_open(tmp_path):
    log = open_log(tmp_path)
    log.trackers = None
    log.end("stopped", "", 75)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"


# ---- a full disk ----


def test_a_full_disk_is_only_reported(tmp_path, monkeypatch, capsys):
    log = open_log(tmp_path)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", refuse)
        summary = log.summarize("running")
        assert summary["step"] == 3 and not (tmp_path / "summary.json").exists()
        shown = capsys.readouterr().out
        assert "config.json and summary.json cannot be written" in shown
        assert "No space left on device" in shown
        patch.setattr("builtins.open", refuse)
        log.line(**{"val/bpb": 1.25})
        assert "metrics.jsonl cannot be written" in capsys.readouterr().out
    # what was refused is written when there is room
    log.line(**{"val/bpb": 1.5})
    assert [line["val/bpb"] for line in lines(tmp_path)] == [1.25, 1.5]
    log.summarize("running")
    assert (tmp_path / "config.json").exists() and (tmp_path / "summary.json").exists()


# ---- other ranks ----


def test_other_ranks_write_and_show_nothing(tmp_path, capsys):
    log = open_log(tmp_path / "run", writes=False, vocabulary=1000, state=TrainState())
    log.config = {"wandb_id": "x"}
    log.open_trackers("name", True)
    assert log.trackers is None
    log.step(STEP, OFF, clock_after(0.5))
    log.skipped(SKIPPED, False, OFF)
    log.line(**{"val/bpb": 1.25})
    log.steps_fixed(clock_after(0.5))
    log.message("a message")
    log.meanwhile("CORE 50%")
    assert log.summarize("running") == {}
    log.end("completed", "", 0)
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


# ---- the last words ----


@pytest.mark.parametrize(
    "completed, failure, saved, no_save, words",
    [
        (False, "", "newest checkpoint is step 3", False, "as requested; newest checkpoint is"),
        (False, "no data.", "newest checkpoint is step 3", False, "no data; newest checkpoint is"),
        (False, "", "", False, "as requested; nothing was saved yet"),
        (False, "", "", True, "as requested; nothing was saved (--no-save)"),
    ],
)
def test_the_last_words_of_a_run_that_is_not_completed(
    tmp_path, completed, failure, saved, no_save, words
):
    log = open_log(tmp_path)
    found = log.last_words(completed=completed, failure=failure, saved=saved, no_save=no_save)
    assert found.startswith(f"stopped at step 3: {words}")
    remedy = f"; add --resume to continue: {tmp_path}"
    assert found.endswith(remedy) if saved else remedy not in found


@pytest.mark.parametrize(
    "scores, words",
    [
        (Scores(), "training: peak memory "),
        (Scores(val_bpb=1.5), "training: val_bpb 1.5000, peak memory "),
        (SCORES, "training: val_bpb 1.5000, CORE 0.1250, peak memory "),
    ],
)
def test_the_last_words_of_a_run_that_is_completed(tmp_path, scores, words):
    log = open_log(tmp_path, scores=scores)
    found = log.last_words(completed=True, failure="", saved="newest: step 12", no_save=False)
    assert found.startswith(f"completed 3 steps in 1.5s of {words}")
    assert found.endswith(f"; newest: step 12; run folder: {tmp_path}")


def test_the_final_status_is_written_on_a_full_disk(tmp_path, monkeypatch, capsys):
    """Into the space that the summary has, though no new file can be written."""
    log = open_log(tmp_path)
    log.summarize("running", "a long reason " * 9)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    log.summarize("running")
    log.end("stopped", "asked to", 75)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
    assert capsys.readouterr().out == ""
    # a config that is new has no space yet, and a summary never stands next to an older one
    log.config = {"plan": {}}
    log.summarize("completed")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
    assert "cannot be written" in capsys.readouterr().out


def test_a_refused_summary_is_written_as_soon_as_there_is_room(tmp_path, monkeypatch, capsys):
    log = open_log(tmp_path)
    log.config = {"plan": {}}
    now = [0.0]
    clock = Clock(now=lambda: now[0])

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", refuse)
        for _ in range(3):
            log.step(STEP, OFF, clock)
            log.summarize("running")
            now[0] += 11
    log.step(STEP, OFF, clock)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "running"
    # each once
    shown = capsys.readouterr().out
    assert shown.count("config.json and summary.json cannot be written") == 1
    assert shown.count("config.json and summary.json are written now") == 1
    # and not at every step
    (tmp_path / "summary.json").unlink()
    log.step(STEP, OFF, clock)
    assert not (tmp_path / "summary.json").exists()
