"""Evaluations while train.py trains: bits per byte, the CORE metric, and the scores of a run."""

import dataclasses
import os
import signal

import pytest
import small
import torch

import nanochat
from nanochat.data import download
from nanochat.data.rows import held_out_pieces
from nanochat.data.sources import local_corpus
from nanochat.data.token_cache import TokenCache
from nanochat.eval import bpb, core, core_answers, core_bundle
from nanochat.eval.unison import EvaluationFailed
from nanochat.run import checkpoint
from nanochat.run.log import RunLog
from nanochat.run.state import Scores

CORE_FLAGS = ("--core-metric-every=5", "--core-metric-max-per-task=5", "--sample-every=-1")


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps."""
    return small.finished()


# ---- bits per byte ----


def test_validation_is_that_of_the_saved_model(finished):
    """Whatever the batches."""
    model, tokenizer = nanochat.load(finished / "run")
    corpus = local_corpus(str(finished / "text.txt"))
    pieces = held_out_pieces(corpus.val, TokenCache(tokenizer, 1), 32, 10**9)
    counts, cpu = tokenizer.byte_counts(), torch.device("cpu")
    results = [bpb.bits_per_byte(model, pieces, counts, n, cpu).bpb for n in (1, 100, 10**6)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)
    assert small.summary(finished)["val_bpb"] == pytest.approx(results[0], rel=1e-5)


def test_a_signal_during_evaluation(tmp_path, finished, monkeypatch):
    """It is left at once; the resumed run evaluates again, at the same step."""
    original = bpb.batches_by_length

    def interrupt_first(pieces, batch_tokens):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from original(pieces, batch_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(bpb, "batches_by_length", interrupt_first)
        assert small.run(tmp_path, "--sample-every=-1") == 75
    assert small.summary(tmp_path)["step"] == 5
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 5
    assert small.run(tmp_path, "--resume", "--sample-every=-1") == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


# ---- scores ----


def core_result(metric):
    """A result of the CORE metric without tasks; None for one that failed."""
    return core.CoreResult(
        core_metric=metric,
        low=metric,
        high=metric,
        n=0 if metric is None else 7,
        reason="no luck" if metric is None else None,
        seconds=0.0,
        baselines="v1",
        tasks={},
    )


def test_the_lines_of_a_run_give_its_scores_at_every_point(tmp_path, monkeypatch):
    """What a resumed run reads back is what the run knew when it had written as many lines."""
    bpbs = iter([2.0, None, 1.9, 1.95, None, 1.96, 1.8, 1.85])
    metrics = iter([0.1, None, 0.2])

    def scripted_bpb(*args):
        value = next(bpbs)
        if value is None:
            raise EvaluationFailed("no luck")
        return bpb.BitsPerByte(value, loss=1.0, tokens=1, bytes=1)

    original = RunLog.line
    running = [Scores()]

    def line_and_note(self, **values):
        original(self, **values)
        running.append(dataclasses.replace(self.scores))

    monkeypatch.setattr(bpb, "bits_per_byte", scripted_bpb)
    monkeypatch.setattr(core, "open_for_training", lambda **options: (None, "scripted"))
    monkeypatch.setattr(core, "measure", lambda *args, **options: core_result(next(metrics)))
    monkeypatch.setattr(RunLog, "line", line_and_note)
    flags = ("--num-iterations=16", "--eval-every=2", "--core-metric-every=7", "--sample-every=-1")
    assert small.run(tmp_path, *flags, "--no-save", "--save-every=-1") == 0
    lines = small.lines(tmp_path)
    assert len(lines) == 16 + 8 + 3
    assert [Scores.from_lines(lines[:n]) for n in range(len(lines) + 1)] == running
    assert running[-1] == Scores(
        val_bpb=1.85, min_val_bpb=1.8, stale_evaluations=1, core_metric=0.2, core_metric_n=7
    )


# ---- the CORE metric ----


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A made-up bundle, whose prompts are short."""
    return small.core_bundle(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, bundle):
    """A folder with a run that measures CORE every five steps and at the end."""
    folder = tmp_path_factory.mktemp("measured")
    assert small.run(folder, *CORE_FLAGS, f"--core-bundle={bundle}") == 0
    return folder


def test_core_metric_while_training(measured):
    """In the metrics, in core.jsonl a line a task, in the summary."""
    in_metrics = [line for line in small.lines(measured) if "core_metric" in line]
    assert [line["step"] for line in in_metrics] == [5, 10, 12]
    lines, last = small.lines(measured, name="core.jsonl"), in_metrics[-1]
    assert [line["step"] for line in lines] == [5] * 22 + [10] * 22 + [12] * 22
    centered = {line["label"]: line["centered"] for line in lines[-22:]}
    assert last["centered_results"] == centered
    assert last["core_metric"] == pytest.approx(sum(centered.values()) / 22)
    for line in lines:
        assert {"accuracy", "stderr", "n", "correct"} <= set(line) and line["n"] == 5
    accuracies = {line["label"]: line["accuracy"] for line in lines[-22:]}
    assert last["core/copa"] == accuracies["copa"]
    assert last["core_metric_low"] <= last["core_metric"] <= last["core_metric_high"]
    summary = small.summary(measured)
    assert (summary["core_metric"], summary["core_metric_n"]) == (last["core_metric"], 110)
    assert [line["step"] for line in small.lines(measured) if "val/bpb" in line] == [5, 10, 12]


def test_measuring_core_changes_nothing_of_the_training(measured, finished):
    assert small.losses(measured) == small.losses(finished)


def test_core_metric_after_a_kill(tmp_path, measured, bundle):
    """A run that is killed and resumed writes the same lines, each once."""
    assert small.run_killed(tmp_path, 9, *CORE_FLAGS, f"--core-bundle={bundle}") == -9
    assert small.run(tmp_path, "--resume", "--sample-every=-1") == 0
    for name in ("metrics.jsonl", "core.jsonl"):
        mine, expected = (
            small.timeless(small.lines(folder, name=name)) for folder in (tmp_path, measured)
        )
        assert without_seconds(mine) == without_seconds(expected)
    assert small.summary(tmp_path)["core_metric"] == small.summary(measured)["core_metric"]


@pytest.mark.skipif(not (small.SHARED / "core").is_dir(), reason="needs the published bundle")
def test_core_metric_of_the_published_bundle(tmp_path):
    flags = ("--num-iterations=1", *CORE_FLAGS, "--eval-every=-1", "--no-save", "--save-every=-1")
    assert small.run(tmp_path, *flags, f"--core-bundle={small.SHARED / 'core'}") == 0
    lines = small.lines(tmp_path, name="core.jsonl")
    assert [(line["step"], line["n"]) for line in lines] == [(1, 5)] * 22
    summary = small.summary(tmp_path)
    mean = sum(line["centered"] for line in lines) / 22
    assert (summary["core_metric"], summary["core_metric_n"]) == (pytest.approx(mean), 110)


def without_seconds(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_core_metric_without_its_data(tmp_path, monkeypatch, capsys):
    """Reported before step 0; training continues, and the number is null with its reason."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    # where nobody answers
    monkeypatch.setattr(core_bundle, "EXAMPLES_URL", "http://127.0.0.1:1/")
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert small.run(tmp_path, "--core-metric-every=6", "--sample-every=-1") == 0
    shown = capsys.readouterr().out
    reported = shown.index(
        "CORE: cannot be measured, training continues without it: hellaswag.jsonl of 127.0.0.1"
    )
    assert reported < shown.index("step 1/12")
    in_metrics = [line for line in small.lines(tmp_path) if "core_metric" in line]
    assert [(line["step"], line["core_metric"]) for line in in_metrics] == [(6, None), (12, None)]
    assert "was not downloaded" in in_metrics[0]["reason"]
    assert small.summary(tmp_path)["core_metric"] is None


def test_core_evaluation_that_fails(tmp_path, monkeypatch, capsys, bundle):
    def broken(*arguments):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(core_answers, "score", broken)
    flags = ("--core-metric-every=6", f"--core-bundle={bundle}", "--sample-every=-1")
    assert small.run(tmp_path, *flags) == 0
    in_metrics = [line for line in small.lines(tmp_path) if "core_metric" in line]
    assert [line["core_metric"] for line in in_metrics] == [None, None]
    assert "no memory for this" in in_metrics[0]["reason"]
    assert (
        "step 6: no CORE metric: hellaswag_zeroshot: RuntimeError: no memory for this"
        in capsys.readouterr().out
    )
    assert small.summary(tmp_path)["status"] == "completed"
