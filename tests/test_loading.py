"""Which checkpoint of a run folder is meant, and loading its model and tokenizer."""

import json
import shutil

import pytest
import torch
from disk import MODEL, Opening, save

from nanochat import common
from nanochat.common import UsageError
from nanochat.data.tokenizer import train_tokenizer
from nanochat.model.kernels import cpu_reading
from nanochat.run import checkpoint
from nanochat.run.loading import load_run, step_of


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 1 and 2, of which 1 is the best."""
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path, 1)
    save(tmp_path, 2)
    checkpoint.mark_best(tmp_path, 1)
    return tmp_path


def test_the_step_that_is_meant(run, capsys):
    assert (step_of(run, None), step_of(run, 1), step_of(run, "best")) == (2, 1, 1)
    (checkpoint.folder_of(run, 2) / "state.json").unlink()
    assert step_of(run, None) == 1
    shown = capsys.readouterr().err
    assert "step_000002 is damaged (state.json is missing); trying the previous one" in shown


def test_steps_that_cannot_be_taken(run):
    with pytest.raises(UsageError, match=r"--step=3: .* no such checkpoint \(it has: 1, 2\)"):
        step_of(run, 3)
    (checkpoint.folder_of(run, 2) / "state.json").unlink()
    with pytest.raises(UsageError, match=r"--step=2: .* is damaged \(state.json is missing\)"):
        step_of(run, 2)
    (run / "checkpoints" / "best").unlink()
    with pytest.raises(UsageError, match="--step=best: .* no evaluated checkpoint"):
        step_of(run, "best")
    (checkpoint.folder_of(run, 1) / "state.json").unlink()
    with pytest.raises(UsageError, match="no intact checkpoint"):
        step_of(run, None)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UsageError, match="no checkpoint yet"):
        step_of(run, None)
    (run / "config.json").unlink()
    with pytest.raises(UsageError, match="is not a run folder"):
        step_of(run, None)


def test_a_step_that_training_removes_meanwhile(run):
    folder = checkpoint.folder_of(run, 2)
    Opening.before("step_000002/model.safetensors", lambda: shutil.rmtree(folder))
    with pytest.raises(UsageError, match="--step=2.*a training process removed it"):
        step_of(run, 2)


@pytest.fixture
def loadable(run):
    """Its model knows the 11 ids of its tokenizer."""
    tokenizer = train_tokenizer("char", ["abcdefghij"], 11)
    assert tokenizer.vocab_size == MODEL.config.vocab_size
    tokenizer.save(run / "tokenizer")
    for step in (1, 2):
        shutil.rmtree(checkpoint.folder_of(run, step))
        state = {"tokenizer": tokenizer.fingerprint}
        checkpoint.save(run, step, "permanent", MODEL, {}, state)
    return run


def test_loading(loadable):
    model, tokenizer = load_run(loadable, device_type="cpu")
    assert torch.equal(model.head.weight, MODEL.head.weight) and not model.training
    assert model.compute_dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("cab")) == "cab"


@pytest.mark.parametrize(
    ("trained_with", "on", "dtype", "backend"),
    [
        ("blocked", "cpu", "float32", "blocked"),
        ("sdpa", "cpu", "float32", "blocked"),
        ("native", "cpu", "float32", "native"),
        ("native", "cpu", "bfloat16", "native"),
        ("flex", "cuda", "float32", "native"),
        ("sdpa", "cuda", "float32", "native"),
    ],
)
def test_a_cpu_evaluates_as_the_run_did(loadable, trained_with, on, dtype, backend):
    if backend == "native" and (problem := cpu_reading.problem()):
        pytest.skip(problem)
    config = {"runtime": {"attention": trained_with}, "hardware": {"device_type": on}}
    (loadable / "config.json").write_text(json.dumps(config))
    model, _ = load_run(loadable, device_type="cpu", dtype=dtype)
    assert model.blocks[0].attention.backend == backend


def test_where_no_cpp_can_be_compiled_a_cpu_does_without(loadable, monkeypatch, capsys):
    monkeypatch.setattr(cpu_reading, "problem", lambda: "no C++ compiler")
    monkeypatch.setattr(common, "_noted", set())
    config = {"runtime": {"attention": "native"}, "hardware": {"device_type": "cpu"}}
    (loadable / "config.json").write_text(json.dumps(config))
    assert load_run(loadable, device_type="cpu")[0].blocks[0].attention.backend == "blocked"
    shown = capsys.readouterr().err
    assert "without C++, unlike the run: the last digits may differ (no C++ compiler)" in shown


def test_the_newest_one_is_removed_while_it_is_loaded(loadable):
    """Then the one that is the newest by then is loaded; a step that was asked for is missed."""
    folder = checkpoint.folder_of(loadable, 2)
    # Once the checkpoint was found intact, the tokenizer is read.
    Opening.before("vocab.json", lambda: shutil.rmtree(folder))
    load_run(loadable, device_type="cpu")
    checkpoint.save(loadable, 2, "permanent", MODEL, {}, checkpoint.read_state(loadable, 1))
    Opening.before("vocab.json", lambda: shutil.rmtree(folder))
    with pytest.raises(UsageError):
        load_run(loadable, 2, device_type="cpu")


def test_another_tokenizer_is_refused(loadable):
    train_tokenizer("char", ["klmnopqrst"], 11).save(loadable / "tokenizer")
    with pytest.raises(UsageError, match="is not the tokenizer that step 2 was trained with"):
        load_run(loadable, device_type="cpu")
