"""Training in fp16: against fp32, its loss scale across resume, overflow and ranks; plans of GPUs
that train so. The scale itself: test_loss_scaler.py.

On a CPU fp16 is switched on by hardware.FP16_ON_CPU: products are correct there, and a thousand
times too slow for anything else."""

import json
import os
import signal

import pytest
import small
import torch

import train
from nanochat import hardware
from nanochat.model.gpt import GPT
from nanochat.optim import loss_scaler
from nanochat.run import checkpoint
from nanochat.run.metrics import Record

FLAGS = ("--dtype=float16", "--device-batch-size=8", "--sample-every=-1")
ON_CPU = """
from nanochat import hardware
from nanochat.optim import loss_scaler
hardware.measured_peak = lambda device, dtype: 1e12
hardware.FP16_ON_CPU = True
loss_scaler.INITIAL_SCALE = {scale}
"""


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "FP16_ON_CPU", True)


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """Not measured: that takes longer than the runs here."""
    monkeypatch.setattr(hardware, "measured_peak", lambda device, dtype: 1e12)


def scales(folder, tag="run"):
    """{step: scale of the loss}."""
    return {
        line["step"]: line["train/loss_scale"]
        for line in small.lines(folder, tag=tag)
        if "train/loss_scale" in line
    }


def norms(folder, tag="run"):
    """Gradient norms by step."""
    lines = small.lines(folder, tag)
    return [line["train/grad_norm"] for line in lines if "train/grad_norm" in line]


# ---- runs ----


@pytest.mark.parametrize(
    "arch",
    [[], ["--arch=llama", "--tie-embeddings", "--optimizer=adamw", "--grad-clip=1"]],
    ids=["speedrun", "llama"],
)
def test_training_follows_fp32(on_cpu, tmp_path, capsys, arch):
    assert small.run(tmp_path, *FLAGS, *arch) == 0
    assert "float16 (as requested) with loss scaling" in capsys.readouterr().out
    assert small.run(tmp_path, *arch, "--sample-every=-1", tag="fp32") == 0
    losses = small.losses(tmp_path)
    exact = small.losses(tmp_path, "fp32")
    assert losses == pytest.approx(exact, abs=0.02) and losses[11] < losses[0] - 0.5
    assert losses != pytest.approx(exact, abs=1e-6)
    bpb = small.summary(tmp_path, "fp32")["val_bpb"]
    assert small.summary(tmp_path)["val_bpb"] == pytest.approx(bpb, abs=0.02)
    # they are logged unscaled
    assert norms(tmp_path) == pytest.approx(norms(tmp_path, "fp32"), rel=0.1)
    plain = small.weights(tmp_path, 12, "fp32")
    assert all(
        tensor.dtype == torch.float32 and tensor.shape == plain[name].shape
        for name, tensor in small.weights(tmp_path, 12).items()
    )


def test_resuming_continues_with_the_same_scale(on_cpu, tmp_path, monkeypatch):
    """The scale doubles after step 2, 5 and 8. A signal in step 6 ends the run after it, and the
    count of good steps continues as well."""
    monkeypatch.setattr(loss_scaler, "GROWTH_STEPS", 3)
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", 2.0**10)
    assert small.run(tmp_path, *FLAGS, tag="whole") == 0
    assert [scales(tmp_path, "whole")[step] for step in range(12)] == [
        2.0 ** (10 + step // 3) for step in range(12)
    ]
    write = Record.write

    def write_and_stop(self, **values):
        write(self, **values)
        if values.get("step") == 6 and "train/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", write_and_stop)
        assert small.run(tmp_path, *FLAGS, tag="broken") == 75
    assert checkpoint.steps_of(tmp_path / "broken")[-1] == 7
    assert checkpoint.read_state(tmp_path / "broken", 7)["loss_scaler"] == [2.0**12, 1]
    assert small.run(tmp_path, *FLAGS, "--resume", tag="broken") == 0
    whole = small.timeless(small.lines(tmp_path, "whole"))
    assert small.timeless(small.lines(tmp_path, "broken")) == whole
    small.assert_same_weights(tmp_path, 12, "broken", tmp_path, "whole")


def test_overflow_lowers_the_scale_and_is_no_fault(on_cpu, tmp_path, monkeypatch, capsys):
    """Steps whose gradients overflow are skipped until the scale is low enough, more in a row than
    --max-skipped allows of others; their checkpoints hold the weights that such a step left
    unchanged."""
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", 2.0**24)
    assert small.run(tmp_path, *FLAGS, "--max-skipped=1", "--save-every=1") == 0
    found = scales(tmp_path)
    skipped = [
        line["step"]
        for line in small.lines(tmp_path)
        if line.get("skipped") == "non-finite gradient"
    ]
    assert skipped[:3] == [0, 1, 2] and len(skipped) < 10
    assert found[0] == 2.0**24
    assert all(found[i + 1] == (found[i] / 2 if i in skipped else found[i]) for i in range(11))
    assert small.summary(tmp_path)["skipped_steps"] == len(skipped)
    shown = capsys.readouterr().out
    assert "fp16 overflowed, the loss is scaled by 8.38861e+06 from here on" in shown
    assert "cannot be saved" not in shown
    first = small.weights(tmp_path, 1)
    second = small.weights(tmp_path, 2)
    assert all(torch.equal(first[name], second[name]) for name in first), "step 1 was skipped"
    assert small.losses(tmp_path)[11] < small.losses(tmp_path)[0]


def test_overflow_at_the_lowest_scale_is_a_fault(on_cpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", 2.0**31)
    monkeypatch.setattr(loss_scaler, "MIN_SCALE", 2.0**30)
    assert small.run(tmp_path, *FLAGS, "--max-skipped=3") == 1
    assert (
        "3 steps in a row had a non-finite loss or gradient; the first non-finite value"
        in capsys.readouterr().err
    )
    assert scales(tmp_path) == {0: 2.0**31, 1: 2.0**30, 2: 2.0**30, 3: 2.0**30}


def test_a_loss_that_is_not_finite_is_a_fault_at_any_scale(on_cpu, tmp_path, monkeypatch, capsys):
    """It is not scaled yet when it goes wrong: another scale would not mend it."""
    original, count = GPT.forward, [0]

    def forward(self, ids, targets=None, cache=None, **options):
        out = original(self, ids, targets, cache, **options)
        count[0] += self.training
        return out * float("inf") if self.training and count[0] > 3 else out

    monkeypatch.setattr(GPT, "forward", forward)
    assert small.run(tmp_path, *FLAGS, "--max-skipped=2") == 1
    assert "2 steps in a row had a non-finite loss or gradient" in capsys.readouterr().err
    assert set(scales(tmp_path).values()) == {loss_scaler.INITIAL_SCALE}


def test_two_ranks_keep_one_scale(on_cpu, tmp_path, monkeypatch):
    """Each of two ranks has a whole micro-batch where one rank has two halves of a step: with half
    the scale they overflow alike."""
    monkeypatch.setattr(loss_scaler, "INITIAL_SCALE", 2.0**21)
    flags = (
        *FLAGS,
        "--device-batch-size=4",
        "--num-iterations=6",
        "--eval-every=-1",
        "--no-save",
        "--save-every=-1",
    )
    assert small.run(tmp_path, *flags, tag="one") == 0
    switched = ON_CPU.format(scale=2.0**20) + small.RUNNER
    finished = small.run_ranks(tmp_path, 2, *flags, tag="two", script=switched)
    assert finished.returncode == 0, finished.stderr
    assert small.losses(tmp_path, "two") == pytest.approx(small.losses(tmp_path, "one"), abs=0.01)
    one = scales(tmp_path, "one")
    assert {step: 2 * scale for step, scale in scales(tmp_path, "two").items()} == one
    assert one[5] < 2.0**21


# ---- plans ----


def test_gpus_that_train_in_fp16_are_found_by_their_whole_name():
    assert hardware.listed_gpu("NVIDIA T400") is None
    assert hardware.listed_gpu("Tesla V100-PCIE-16GB").peak_flops == 112e12


def test_the_plan_for_a_t4(capsys):
    assert train.run(["--dry-run", "--depth=12", "--gpu=T4"]) == 0
    shown = capsys.readouterr().out
    assert (
        "float16 (SM75 has no bf16 matrix instructions and multiplies fp16) with loss scaling"
        in shown
    )
    assert "1 x 65 TFLOP/s (listed fp16 peak of T4)" in shown
    plans = {}
    for gpu in ("T4", "A100"):
        assert train.run(["--dry-run", "--depth=12", f"--gpu={gpu}", "--json"]) == 0
        plans[gpu] = json.loads(capsys.readouterr().out)
    assert plans["T4"]["dtype"] == "float16" and plans["A100"]["dtype"] == "bfloat16"
    assert 1 <= plans["T4"]["device_batch_size"] < plans["A100"]["device_batch_size"]
    assert plans["T4"]["estimates"]["memory_bytes"] < 16e9
    assert train.run(["--dry-run", "--depth=24", "--gpu=T4"]) == 2
    assert "one row is estimated to need" in capsys.readouterr().err
    assert train.run(["--dry-run", "--depth=12", "--gpu=T4", "--dtype=float32"]) == 2


def test_refused_on_a_cpu(tmp_path, capsys):
    assert small.run(tmp_path, *FLAGS) == 2
    assert "--dtype=float16: needs a CUDA device (this is cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
