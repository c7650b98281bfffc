"""train.py end to end on a small model: the run folder, the order of a step, resuming, signals, faults, two ranks."""

import json
import math
import os
import shutil
import signal

import pytest
import small
import torch

import train
from nanochat.common import UsageError, base_dir
from nanochat.data import prefetch, sources
from nanochat.data.sources import local_corpus, open_corpus
from nanochat.eval.bpb import bits_per_byte
from nanochat.model.build import build
from nanochat.model.gpt import GPT
from nanochat.optim import optimizer as optim
from nanochat.run import checkpoint, loading
from nanochat.run import log as runlog
from nanochat.run import memory as fit

DERIVED = ["step", "tokens", "total_training_flops", "total_training_time"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one uninterrupted run, to compare others with."""
    folder = tmp_path_factory.mktemp("finished")
    assert small.run(folder) == 0
    return folder


def test_run_folder(finished):
    run = finished / "run"
    lines = small.lines(finished)
    assert list(small.losses(finished)) == list(range(12))
    assert [line["step"] for line in lines if "val/bpb" in line] == [5, 10, 12]
    for line in lines:
        assert list(line)[:4] == DERIVED
        assert line["tokens"] == 256 * line["step"]
    for name in (
        "train/loss",
        "train/lr",
        "train/lrm",
        "train/grad_norm",
        "train/dt",
        "train/tok_per_sec",
        "train/mfu",
        "train/epoch",
    ):
        assert isinstance(lines[0][name], float)
    assert lines[0]["train/loss"] == pytest.approx(math.log(257), abs=0.05)
    assert lines[0]["total_training_time"] == 0
    summary = small.summary(finished)
    assert (
        summary["status"] == "completed" and summary["step"] == 12 and summary["tokens"] == 12 * 256
    )
    assert summary["val_bpb"] == lines[-1]["val/bpb"] and summary["core_metric"] is None
    assert summary["min_val_bpb"] == min(line["val/bpb"] for line in lines if "val/bpb" in line)
    assert summary["peak_memory_bytes"] > 10**7 and summary["tok_per_sec"] > 0
    # 4, 8: --save-every; 6: before the warm-down; 12: the end
    assert checkpoint.steps_of(run) == [4, 6, 8, 12]
    assert [checkpoint.kind_of(run, step) for step in (4, 6, 8, 12)] == [
        "permanent",
        "before_warmdown",
        "permanent",
        "final",
    ]
    assert (run / "checkpoints" / "best").read_text() == "step_000012\n"
    assert {line["step"] for line in small.lines(finished, name="samples.jsonl")} == {6, 12}
    config = json.loads((run / "config.json").read_text())
    assert config["args"]["num_iterations"] == 12 and config["plan"]["total_batch_tokens"] == 256
    assert (
        config["data"]["fingerprint"]
        and config["tokenizer"]["vocab_size"] == 257
        and "torch" in config["versions"]
    )
    assert not list((run / "checkpoints").glob(".*"))


def test_loading_the_folder_needs_nothing_else(finished, tmp_path):
    import nanochat

    shutil.copytree(finished / "run", tmp_path / "elsewhere")
    model, tokenizer = nanochat.load(tmp_path / "elsewhere")
    assert not model.training
    text = nanochat.generate(model, tokenizer, "3 squared", max_new_tokens=5, temperature=0)
    assert (
        text
        == nanochat.generate(model, tokenizer, "3 squared", max_new_tokens=5, temperature=0)
        != ""
    )


def test_loading_beside_training(finished, tmp_path, monkeypatch):
    """The checkpoint that was chosen is removed before it is read: the one that took its place is loaded."""
    shutil.copytree(finished / "run", tmp_path / "run")
    newest = checkpoint.folder_of(tmp_path / "run", 12)
    newest.rename(tmp_path / "later")
    original = checkpoint.read_state

    def meanwhile(run, step):
        if step == 8:
            (tmp_path / "later").rename(newest)
            shutil.rmtree(checkpoint.folder_of(run, 8))
        return original(run, step)

    monkeypatch.setattr(checkpoint, "read_state", meanwhile)
    model, _ = loading.load_run(tmp_path / "run")
    assert torch.equal(model.head.weight, small.weights(finished, 12)["head.weight"])


def test_order_of_a_step(tmp_path, monkeypatch):
    """Zero grad, batch, forward, loss, backward, clip, set lr and step, count: the contract users read about."""
    from nanochat.data.prefetch import Prefetcher
    from nanochat.optim import schedules

    calls = []

    def spy(owner, name, label):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(optim.Optimizer, "zero_grad", "zero grad")
    spy(Prefetcher, "__next__", "batch")
    spy(GPT, "forward", "forward")
    spy(torch.Tensor, "backward", "backward")
    spy(optim.Optimizer, "clip", "clip")
    spy(schedules, "lr_multiplier", "set lr")
    spy(optim.Optimizer, "step", "step")
    flags = (
        "--num-iterations=1",
        "--grad-clip=1",
        "--device-batch-size=4",
        "--eval-every=-1",
        "--sample-every=-1",
        "--no-save",
        "--save-every=-1",
    )
    assert small.run(tmp_path, *flags) == 0
    micro = ["forward", "backward"]
    warm_up = ["forward", "backward", "zero grad"]
    assert calls == warm_up + ["zero grad", "batch", *micro, *micro, "clip", "set lr", "step"]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--dtype=bfloat16", "--dropout=0.2", "--device-batch-size=4"),
        ("--optimizer=adamw", "--lr-schedule=cosine", "--n-kv-head=1"),
        ("--arch=llama", "--n-kv-head=1", "--tie-embeddings", "--grad-clip=1", "--warmup-steps=3"),
        ("--arch=llama", "--optimizer=adamw"),
    ],
    ids=["fp32", "bf16 dropout accumulation", "adamw cosine gqa", "llama", "llama adamw"],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, flags):
    """SIGKILL at three steps that are no save points, in one run: everything but the clock is equal with ==."""
    assert small.run(tmp_path, *flags, tag="whole") == 0
    assert small.run_killed(tmp_path, 5, *flags, tag="broken") == -9
    assert small.run_killed(tmp_path, 7, *flags, "--resume", tag="broken") == -9
    assert small.run_killed(tmp_path, 11, *flags, "--resume", tag="broken") == -9
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as f:
        f.write('{"step": 11, "tok')  # a torn last line
    assert small.run(tmp_path, *flags, "--resume", tag="broken") == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert small.timeless(small.lines(tmp_path, "broken", name)) == small.timeless(
            small.lines(tmp_path, "whole", name)
        )
    whole, broken = small.weights(tmp_path, 12, "whole"), small.weights(tmp_path, 12, "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_killed_before_the_first_checkpoint(tmp_path, finished):
    assert small.run_killed(tmp_path, 2) == -9
    assert small.run(tmp_path, "--resume") == 0
    assert small.losses(tmp_path) == small.losses(finished)


def test_resuming_on_other_terms(tmp_path, finished):
    """Another device batch size and evaluation cadence are allowed and printed; losses stay the same to rounding."""
    assert small.run_killed(tmp_path, 7) == -9
    assert small.run(tmp_path, "--resume", "--device-batch-size=2", "--eval-every=4") == 0
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-5)


def test_resume_of_nothing_starts_fresh(tmp_path, finished, capsys):
    assert small.run(tmp_path, "--resume") == 0
    assert "holds no run yet" in capsys.readouterr().out
    assert small.losses(tmp_path) == small.losses(finished)


def test_resume_needs_no_flags_but_the_folder(tmp_path, finished):
    assert small.run_killed(tmp_path, 7) == -9
    assert train.run(["--resume", f"--out-dir={tmp_path}", "--model-tag=run"]) == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))
    assert checkpoint.steps_of(tmp_path / "run") == [4, 6, 8, 12]


def test_a_completed_run_has_nothing_to_resume(finished, capsys):
    before = (finished / "run" / "metrics.jsonl").read_bytes()
    assert small.run(finished, "--resume") == 0
    assert "is complete at step 12" in capsys.readouterr().out
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before


def test_resume_from_an_earlier_step(tmp_path, finished):
    assert small.run(tmp_path) == 0
    assert small.run(tmp_path, "--resume-from-step=4", "--overwrite") == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, finished, capsys):
    assert small.run_killed(tmp_path, 9) == -9
    path = tmp_path / "run" / "checkpoints" / "step_000008" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert small.run(tmp_path, "--resume") == 0
    captured = capsys.readouterr()
    assert "step_000008 is damaged (optimizer.safetensors does not match its hash)" in captured.err
    assert "from step 6" in captured.out
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_overwrite_starts_again(tmp_path, finished):
    assert small.run(tmp_path, "--seed=7") == 0
    assert small.run(tmp_path, "--overwrite") == 0
    assert small.losses(tmp_path) == small.losses(finished)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_stops(tmp_path, finished, name):
    assert small.run_killed(tmp_path, 6, signal=name) == 75
    assert small.summary(tmp_path)["status"] == "stopped"
    step = small.summary(tmp_path)["step"]
    assert step in (7, 8) and checkpoint.steps_of(tmp_path / "run")[-1] == step
    assert small.run(tmp_path, "--resume") == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_rolling_checkpoints_replace_one_another(tmp_path):
    assert (
        small.run(tmp_path, "--save-every=-1", "--save-every-minutes=0.0000001", "--eval-every=-1")
        == 0
    )
    assert checkpoint.steps_of(tmp_path / "run") == [6, 12]


def test_no_save(tmp_path):
    assert small.run(tmp_path, "--no-save", "--save-every=-1") == 0
    assert checkpoint.steps_of(tmp_path / "run") == []


def test_an_error_in_the_data_thread_reaches_the_user(tmp_path, finished, monkeypatch):
    from nanochat.data.rows import Rows

    original = Rows.row

    def row(self, number):
        if number == 60:
            raise ValueError("row 60 is not what it was")
        return original(self, number)

    monkeypatch.setattr(Rows, "row", row)
    with pytest.raises(ValueError, match="row 60 is not what it was"):
        small.run(tmp_path)
    summary = small.summary(tmp_path)
    assert (
        summary["status"] == "failed"
        and "row 60 is not what it was" in summary["reason"]
        and summary["step"] == 7
    )
    monkeypatch.undo()
    assert small.run(tmp_path, "--resume") == 0
    assert small.losses(tmp_path) == small.losses(finished)


def refuse_saves(monkeypatch, when):
    """A full disk for the checkpoints of the steps that satisfy `when`."""
    original = checkpoint.write

    def write(run_path, step, *more):
        if when(step):
            raise OSError(28, "No space left on device")
        original(run_path, step, *more)

    monkeypatch.setattr(checkpoint, "write", write)


def test_a_full_disk_does_not_end_a_run(tmp_path, finished, monkeypatch, capsys):
    """Saves that fail are reported and tried again at the next step; training and its records are as if nothing had been."""
    refuse_saves(monkeypatch, lambda step: step in (4, 5))
    monkeypatch.setattr("nanochat.run.saver.RETRY_SECONDS", -1.0)
    assert small.run(tmp_path, "--eval-every=5") == 0
    shown = capsys.readouterr().out
    assert (
        "the checkpoint of step 4 cannot be saved" in shown and "checkpoint saved at step" in shown
    )
    assert small.losses(tmp_path) == small.losses(finished)
    assert checkpoint.newest_intact(tmp_path / "run", print) == 12


def test_the_state_before_the_warm_down_is_saved_as_such_after_a_failure(tmp_path, monkeypatch):
    failures = []
    refuse_saves(monkeypatch, lambda step: step == 6 and not failures and not failures.append(step))
    monkeypatch.setattr("nanochat.run.saver.RETRY_SECONDS", -1.0)
    assert small.run(tmp_path, "--save-every=-1") == 0
    assert failures == [6] and checkpoint.kind_of(tmp_path / "run", 6) == "before_warmdown"


def test_the_state_before_the_warm_down_is_saved_although_the_step_before_was_skipped(
    tmp_path, monkeypatch
):
    """Once a step has shown that the weights, which that one left alone, are good."""
    poison(monkeypatch, lambda n: n == 6)
    assert small.run(tmp_path, "--save-every=-1", "--device-batch-size=8") == 0
    assert [line["step"] for line in small.lines(tmp_path) if "skipped" in line] == [5]
    assert checkpoint.kind_of(tmp_path / "run", 6) == "before_warmdown"


def test_a_disk_that_stays_full(tmp_path, monkeypatch, capsys):
    """The last good checkpoint stays and is named; once there is room the run goes on from it."""
    refuse_saves(monkeypatch, lambda step: step > 4)
    monkeypatch.setattr("nanochat.run.saver.LAST_ATTEMPTS", (0.0, 0.0))
    assert small.run(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "newest checkpoint is step 4" in shown and "cannot be saved" in shown.splitlines()[-1]
    assert (
        small.summary(tmp_path)["status"] == "failed"
        and "No space left" in small.summary(tmp_path)["reason"]
    )
    monkeypatch.undo()
    assert small.run(tmp_path, "--resume") == 0
    assert small.summary(tmp_path)["status"] == "completed"


def poison(monkeypatch, when):
    """Make the loss NaN at the forward passes of training whose number (0 is the warm-up) satisfies `when`. Only for runs that are
    given their device batch: there is one pass of warm-up then."""
    original, count = GPT.forward, [0]

    def forward(self, ids, targets=None, cache=None, **options):
        out = original(self, ids, targets, cache, **options)
        if self.training:
            count[0] += 1
            if when(count[0] - 1):
                return out * float("nan")
        return out

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_non_finite_step_is_skipped(tmp_path, monkeypatch):
    poison(monkeypatch, lambda n: n == 4)
    assert small.run(tmp_path, "--device-batch-size=8") == 0
    line = next(line for line in small.lines(tmp_path) if line["step"] == 3 and "train/dt" in line)
    assert line["train/loss"] is None and line["skipped"] == "non-finite loss"
    assert small.summary(tmp_path)["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in small.weights(tmp_path, 12).values())


def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda n: n > 6)
    assert small.run(tmp_path, "--max-skipped=3", "--device-batch-size=8") == 1
    error = capsys.readouterr().err
    assert "3 steps in a row" in error and "last good checkpoint is step 6" in error
    assert small.summary(tmp_path)["status"] == "failed"
    assert checkpoint.steps_of(tmp_path / "run") == [4, 6], (
        "nothing is kept of a state that no good step has followed"
    )


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, finished, monkeypatch, capsys):
    """The update of a step whose loss and gradient were finite spoils a weight: that is seen a step later, and nothing of it is kept."""
    original, count = optim.Optimizer.step, [0]

    def step(self, *args):
        original(self, *args)
        count[0] += 1
        if count[0] == 6:
            spoiled[0].fill_(float("nan"))

    spoiled = []

    def build_and_note(*args, **options):
        model = build(*args, **options)
        spoiled.append(model.head.weight.data)
        return model

    monkeypatch.setattr("nanochat.model.build.build", build_and_note)
    monkeypatch.setattr(optim.Optimizer, "step", step)
    assert small.run(tmp_path, "--debug-nans") == 1
    captured = capsys.readouterr()
    assert (
        "the checkpoint of step 6 cannot be saved (model.safetensors would hold numbers that are not finite"
        in captured.out
    )
    assert (
        "the weights head.weight hold" in captured.err
        and "the last good checkpoint is step 4" in captured.err
    )
    assert checkpoint.steps_of(tmp_path / "run") == [4]
    monkeypatch.undo()
    assert small.run(tmp_path, "--resume") == 0
    assert small.losses(tmp_path) == small.losses(finished)


def test_out_of_memory_names_a_remedy(tmp_path, monkeypatch, capsys):
    def forward(self, ids, targets=None, cache=None, **options):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
        )

    monkeypatch.setattr(GPT, "forward", forward)
    assert small.run(tmp_path, "--device-batch-size=4") == 1
    assert (
        "out of memory with --device-batch-size=4; --device-batch-size=2 would likely fit"
        in capsys.readouterr().err
    )
    assert small.summary(tmp_path)["status"] == "failed"


def test_an_evaluation_that_is_not_a_number_does_not_end_a_run(tmp_path, monkeypatch):
    original = GPT.forward

    def forward(self, ids, targets=None, cache=None, **options):
        out = original(self, ids, targets, cache, **options)
        return out if self.training or targets is None else out * float("nan")

    monkeypatch.setattr(GPT, "forward", forward)
    assert small.run(tmp_path) == 0
    assert [line["val/bpb"] for line in small.lines(tmp_path) if "val/bpb" in line] == [None] * 3


@pytest.mark.parametrize("flag", [None, "--resume", "--overwrite"])
def test_a_run_that_appeared_meanwhile_is_not_lost(tmp_path, finished, monkeypatch, capsys, flag):
    """Another process trains here while this one reads its data: claiming the folder looks again."""
    original = open_corpus

    def meanwhile(*args):
        shutil.copytree(finished / "run", tmp_path / "run")
        return original(*args)

    monkeypatch.setattr(sources, "open_corpus", meanwhile)
    assert small.run(tmp_path, *filter(None, [flag])) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished / "run" / "metrics.jsonl"
    ).read_bytes()


def test_a_run_is_claimed_before_its_checkpoint_is_chosen(tmp_path, finished, monkeypatch, capsys):
    """A process that is still ending would save, and remove the very checkpoint that was chosen: it has to be gone before."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run", 12))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ending = runlog.RunFolder(tmp_path / "run")
    ending.claim()
    monkeypatch.setattr(
        checkpoint, "steps_of", lambda path: pytest.fail("nothing is looked at yet")
    )
    assert small.run(tmp_path, "--resume") == 2
    assert "in use" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before
    monkeypatch.undo()
    ending.lock.close()
    original = open_corpus

    def meanwhile(*args):
        with pytest.raises(UsageError, match="in use"):
            runlog.RunFolder(tmp_path / "run").claim()
        return original(*args)

    monkeypatch.setattr(sources, "open_corpus", meanwhile)
    assert small.run(tmp_path, "--resume") == 0
    assert small.losses(tmp_path) == small.losses(finished)


def test_a_checkpoint_that_is_gone_meanwhile_costs_nothing(tmp_path, finished, monkeypatch, capsys):
    """Whoever removed it: the later lines of metrics and the later checkpoints stay as they are."""
    shutil.copytree(finished / "run", tmp_path / "run")
    original = open_corpus

    def meanwhile(*args):
        (checkpoint.folder_of(tmp_path / "run", 4) / "model.safetensors").unlink()
        return original(*args)

    monkeypatch.setattr(sources, "open_corpus", meanwhile)
    assert small.run(tmp_path, "--resume-from-step=4", "--overwrite") == 2
    assert (
        "step_000004 was intact when this process began, and is not any more (model.safetensors is missing)"
        in capsys.readouterr().err
    )
    assert checkpoint.steps_of(tmp_path / "run") == [4, 6, 8, 12]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished / "run" / "metrics.jsonl"
    ).read_bytes()


def test_checkpoints_without_manifests_are_not_trained_over(tmp_path, finished, capsys):
    """A run whose checkpoints lost their manifests does not begin again as if it had none."""
    shutil.copytree(finished / "run", tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    assert small.run(tmp_path, "--resume") == 2
    error = capsys.readouterr().err
    assert (
        "step_000004, step_000006, step_000008, step_000012" in error
        and "manifest.json" in error
        and "--overwrite" in error
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished / "run" / "metrics.jsonl"
    ).read_bytes()


def test_a_damaged_summary_does_not_stand_in_the_way(tmp_path, finished):
    """The end of the run is made again, and writes it anew."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"status": "comp')
    assert small.run(tmp_path, "--resume") == 0
    assert small.summary(tmp_path)["status"] == "completed"
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_the_best_is_known_when_the_run_goes_on_from_it(tmp_path, finished, monkeypatch):
    """Its own line of metrics is cut then: an evaluation that is worse does not take its place."""
    shutil.copytree(finished / "run", tmp_path / "run")
    checkpoint.mark_best(tmp_path / "run", 4)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "val/bpb": 0.001}\n')
    assert small.run(tmp_path, "--resume-from-step=4", "--overwrite") == 0
    assert checkpoint.best_step(tmp_path / "run") == 4


def test_failed_evaluations_and_samples_do_not_end_a_run(tmp_path, finished, monkeypatch):
    from nanochat.eval import generation as engine

    original = GPT.forward

    def forward(self, ids, targets=None, cache=None, **options):
        if not self.training:
            raise RuntimeError("no evaluation today")
        return original(self, ids, targets, cache, **options)

    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(engine, "generate_text", lambda *args, **kwargs: 1 / 0)
    assert small.run(tmp_path) == 0
    assert small.losses(tmp_path) == small.losses(finished)
    failed = [line for line in small.lines(tmp_path) if "val/bpb" in line]
    assert [line["val/bpb"] for line in failed] == [None] * 3 and "no evaluation today" in failed[
        0
    ]["reason"]
    assert small.lines(tmp_path, name="samples.jsonl")[0]["reason"].startswith("ZeroDivisionError")
    assert (
        small.summary(tmp_path)["val_bpb"] is None
        and small.summary(tmp_path)["status"] == "completed"
    )


def test_a_signal_during_evaluation(tmp_path, finished, monkeypatch):
    from nanochat.eval import bpb as evaluate

    original = evaluate.batches_by_length

    def interrupt_first(pieces, batch_tokens):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from original(pieces, batch_tokens)

    monkeypatch.setattr(evaluate, "batches_by_length", interrupt_first)
    assert small.run(tmp_path) == 75
    monkeypatch.setattr(evaluate, "batches_by_length", original)
    assert small.summary(tmp_path)["step"] == 5 and checkpoint.steps_of(tmp_path / "run")[-1] == 5
    assert small.run(tmp_path, "--resume") == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_time_budget_fixes_the_steps_once(tmp_path):
    assert small.run(tmp_path, "--num-iterations=-1", "--target-minutes=0.01") == 0
    plan = json.loads((tmp_path / "run" / "config.json").read_text())["plan"]
    assert plan["horizon"] == "target_minutes"
    assert small.summary(tmp_path)["step"] == plan["num_iterations"] > 5
    assert plan["warmdown_steps"] == round(0.5 * plan["num_iterations"])


def test_a_measured_time_budget_is_kept(tmp_path):
    flags = (
        "--num-iterations=-1",
        "--target-minutes=0.02",
        "--save-every=5",
        "--eval-every=-1",
        "--sample-every=-1",
    )
    assert small.run_killed(tmp_path, 25, *flags) == -9
    steps = json.loads((tmp_path / "run" / "config.json").read_text())["plan"]["num_iterations"]
    assert small.run(tmp_path, *flags, "--resume") == 0
    assert small.summary(tmp_path)["step"] == steps > 25


@pytest.mark.parametrize(
    "flag", ["--target-tokens=1000", "--target-flops=4e8", "--target-epochs=0.1"]
)
def test_other_horizons(tmp_path, capsys, flag):
    assert small.run(tmp_path, "--num-iterations=-1", flag, "--no-save", "--save-every=-1") == 0
    assert f"{flag.split('=')[0]}=" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    tokens = {
        "--target-tokens=1000": 1000,
        "--target-flops=4e8": 4e8 / config["plan"]["flops_per_token"],
        "--target-epochs=0.1": 0.1 * config["data"]["tokens_per_epoch"],
    }[flag]
    assert small.summary(tmp_path)["step"] == round(tokens / 256) > 1


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert small.run(tmp_path, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["num_iterations"] == 12 and shown["plan"]["total_batch_tokens"] == 256
    assert shown["device_batch_size"] * shown["accumulation"] == 8
    # 32 wide, 2 blocks: 12 x 32^2 x 2 matrices, 257 x 32 head
    assert shown["plan"]["scaling_parameters"] == 24576 + 8224
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_dry_run_for_other_hardware(capsys):
    assert train.run(["--dry-run", "--depth=24", "--gpus=8", "--gpu=H100"]) == 0
    text = capsys.readouterr().out
    assert "8 x 989 TFLOP/s (listed bf16 peak of H100)" in text
    assert train.run(["--dry-run", "--depth=26", "--gpu=A100"]) == 0
    assert "try --depth=" in capsys.readouterr().out


def test_bits_per_byte_worked_example():
    """A model that gives every token the same probability has log2(V) bits a token, whatever it reads."""
    import numpy as np

    class Uniform(torch.nn.Module):
        def forward(self, ids, targets):
            return torch.where(targets >= 0, math.log(8), 0.0)

    counts = np.array([1, 2, 3, 1, 0, 1, 1, 0])
    pieces = [
        np.array([7, 0, 1, 2]),
        np.array([7, 2]),
        np.array([7, 4, 5]),
    ]  # 1+2+3, 3, 0+1 bytes; id 4 is special
    for batch_tokens in (1, 4, 100):
        result = bits_per_byte(Uniform(), pieces, counts, batch_tokens, torch.device("cpu"))
        assert result["bytes"] == 10 and result["tokens"] == 5
        assert result["bpb"] == pytest.approx(5 * 3 / 10)
        assert result["loss"] == pytest.approx(math.log(8))


def test_bits_per_byte_does_not_depend_on_batching(finished):
    import nanochat
    from nanochat.data.rows import held_out_pieces
    from nanochat.data.token_cache import TokenCache

    model, tokenizer = nanochat.load(finished / "run")
    corpus = local_corpus(str(finished / "text.txt"))
    pieces = held_out_pieces(corpus.val, TokenCache(tokenizer, 1), 32, 10**9)
    results = [
        bits_per_byte(model, pieces, tokenizer.byte_counts(), n, torch.device("cpu"))["bpb"]
        for n in (1, 100, 10**6)
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)
    assert small.summary(finished)["val_bpb"] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(
    "optimizer, accumulation, more",
    [
        ("muon", 1, []),
        ("muon", 2, []),
        ("adamw", 2, []),
        # at its default rate this tiny llama amplifies rounding a thousandfold within 20 steps, on one rank too (runs/LOG.md)
        ("muon", 1, ["--arch=llama", "--matrix-lr=0.005"]),
        ("adamw", 1, ["--arch=llama", "--matrix-lr=0.0015"]),
    ],
)
def test_two_ranks_equal_one(tmp_path, optimizer, accumulation, more):
    """100 fp32 steps; depth 3 gives 3 square matrices of most shapes, which 2 ranks cannot share evenly."""
    flags = [
        "--depth=3",
        "--num-iterations=100",
        f"--optimizer={optimizer}",
        "--eval-every=50",
        "--sample-every=-1",
        *more,
    ]
    assert small.run(tmp_path, *flags, tag="one") == 0
    finished = small.run_ranks(
        tmp_path, 2, *flags, f"--device-batch-size={4 // accumulation}", tag="two"
    )
    assert finished.returncode == 0, finished.stderr
    assert small.losses(tmp_path, "two") == pytest.approx(small.losses(tmp_path, "one"), abs=1e-4)
    assert small.summary(tmp_path, "two")["val_bpb"] == pytest.approx(
        small.summary(tmp_path, "one")["val_bpb"], abs=1e-4
    )


def test_a_time_budget_on_two_ranks(tmp_path):
    """The ranks' clocks differ; rank 0's decides, or they would wait for one another for ever."""
    finished = small.run_ranks(
        tmp_path, 2, "--num-iterations=-1", "--target-minutes=0.01", "--no-save", "--save-every=-1"
    )
    assert finished.returncode == 0, finished.stderr
    plan = json.loads((tmp_path / "run" / "config.json").read_text())["plan"]
    assert small.summary(tmp_path)["step"] == plan["num_iterations"] > 5


def test_two_ranks_continue_what_one_began(tmp_path, finished):
    assert (
        small.run_killed(tmp_path, 7, "--device-batch-size=8") == -9
    )  # more than each of them has: nobody gives it now
    resumed = small.run_torchrun(tmp_path, 2, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-4)


@pytest.mark.slow
def test_one_two_four_ranks_and_one_again(tmp_path, finished):
    """One checkpoint after another on other world sizes: the same batches in the same order, so the same losses."""
    flags = ("--save-every=3", "--eval-every=-1", "--sample-every=-1")
    for ranks, step in ((1, 3), (2, 6), (4, 9)):
        script = tmp_path / "killer.py"
        script.write_text(small.KILLER.format(root=str(small.ROOT), step=step, signal="SIGTERM"))
        done = small.run_torchrun(tmp_path, ranks, *flags, "--resume", script=script)
        assert small.summary(tmp_path)["status"] == "stopped", done.stderr
    assert small.run(tmp_path, *flags, "--resume") == 0
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-4)


def test_compiled_resume_is_exact(tmp_path):
    """One layer: each kind of layer takes tens of seconds to compile."""
    flags = (
        "--depth=1",
        "--compile",
        "--aspect-ratio=32",
        "--num-iterations=6",
        "--sample-every=-1",
        "--dtype=bfloat16",
    )
    assert small.run(tmp_path, *flags, tag="whole") == 0
    assert small.run_killed(tmp_path, 5, *flags, tag="broken") == -9
    assert (base_dir() / "compile").is_dir()
    assert small.run(tmp_path, *flags, "--resume", tag="broken") == 0
    assert small.losses(tmp_path, "broken") == small.losses(tmp_path, "whole")
    whole, broken = small.weights(tmp_path, 6, "whole"), small.weights(tmp_path, 6, "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_overwriting_leaves_foreign_files_alone(tmp_path):
    assert small.run(tmp_path, "--num-iterations=2") == 0
    note = tmp_path / "run" / "notes.txt"
    note.write_text("mine")
    assert small.run(tmp_path, "--num-iterations=3", "--overwrite") == 0
    assert note.read_text() == "mine" and small.summary(tmp_path)["step"] == 3
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 3


def test_a_settled_device_batch_is_written_down_at_once(tmp_path, monkeypatch):
    """Before any step: a run killed early goes on with as many rows at once as it began with."""
    monkeypatch.setattr(
        fit, "settle", lambda trial, first, fixed, *rest: trial(first // 2) or first // 2
    )
    monkeypatch.setattr(prefetch, "Prefetcher", lambda *args, **kwargs: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        small.run(tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["runtime"]["device_batch_size"] == 4


# ---- the CORE metric ----

CORE_FLAGS = ["--core-metric-every=5", "--core-metric-max-per-task=5"]


def test_core_metric_while_training(tmp_path):
    """Every five steps and at the end: in the metrics, in core.jsonl a line a task, in the summary; from the bundle in reach."""
    bundle = (
        small.SHARED / "core" if (small.SHARED / "core").is_dir() else small.core_bundle(tmp_path)
    )
    assert small.run(tmp_path, *CORE_FLAGS, f"--core-bundle={bundle}") == 0
    measured = [line for line in small.lines(tmp_path) if "core_metric" in line]
    assert [line["step"] for line in measured] == [5, 10, 12]
    lines, last = small.lines(tmp_path, name="core.jsonl"), measured[-1]
    assert [line["step"] for line in lines] == [5] * 22 + [10] * 22 + [12] * 22
    centered = {line["label"]: line["centered"] for line in lines[-22:]}
    assert last["centered_results"] == centered and last["core_metric"] == pytest.approx(
        sum(centered.values()) / 22
    )
    assert all(
        {"accuracy", "stderr", "n", "correct"} <= set(line) and line["n"] == 5 for line in lines
    )
    assert last["core/copa"] == next(
        line["accuracy"] for line in lines[-22:] if line["label"] == "copa"
    )
    assert last["core_metric_low"] <= last["core_metric"] <= last["core_metric_high"]
    summary = small.summary(tmp_path)
    assert (summary["core_metric"], summary["core_metric_n"]) == (last["core_metric"], 110)
    assert [line["step"] for line in small.lines(tmp_path) if "val/bpb" in line] == [5, 10, 12]


def test_core_metric_after_a_kill(tmp_path):
    """A run that is killed and resumed writes the same lines, each once; the evaluation changes nothing of the training."""
    bundle = small.core_bundle(tmp_path)
    flags = [*CORE_FLAGS, f"--core-bundle={bundle}"]
    assert small.run(tmp_path, *flags, tag="whole") == 0
    assert small.run(tmp_path, tag="without") == 0
    assert small.losses(tmp_path, "whole") == small.losses(tmp_path, "without")
    small.run_killed(tmp_path, 9, *flags)
    assert small.run(tmp_path, "--resume") == 0
    for name in ("metrics.jsonl", "core.jsonl"):
        timeless = [
            [
                {k: v for k, v in line.items() if k != "seconds"}
                for line in small.timeless(small.lines(tmp_path, tag, name))
            ]
            for tag in ("run", "whole")
        ]
        assert timeless[0] == timeless[1]
    assert small.summary(tmp_path)["core_metric"] == small.summary(tmp_path, "whole")["core_metric"]


def test_core_metric_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    """Said before step 0; training goes on, and the number is null with its reason."""
    from nanochat.data import download
    from nanochat.eval import core

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(core, "EXAMPLES_URL", "http://127.0.0.1:1/")  # where nobody answers
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert small.run(tmp_path, "--core-metric-every=6") == 0
    shown = capsys.readouterr().out
    assert shown.index(
        "CORE: cannot be measured, training goes on without it: hellaswag.jsonl of 127.0.0.1"
    ) < shown.index("step 1/12")
    measured = [line for line in small.lines(tmp_path) if "core_metric" in line]
    assert [(line["step"], line["core_metric"]) for line in measured] == [(6, None), (12, None)]
    assert (
        "was not downloaded" in measured[0]["reason"]
        and small.summary(tmp_path)["core_metric"] is None
    )


def test_core_evaluation_that_fails(tmp_path, monkeypatch, capsys):
    from nanochat.eval import core

    def broken(*arguments):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(core, "_scores", broken)
    assert (
        small.run(tmp_path, "--core-metric-every=6", f"--core-bundle={small.core_bundle(tmp_path)}")
        == 0
    )
    measured = [line for line in small.lines(tmp_path) if "core_metric" in line]
    assert [line["core_metric"] for line in measured] == [
        None,
        None,
    ] and "no memory for this" in measured[0]["reason"]
    assert (
        "step 6: no CORE metric: hellaswag_zeroshot: RuntimeError: no memory for this"
        in capsys.readouterr().out
    )
    assert small.summary(tmp_path)["status"] == "completed"
