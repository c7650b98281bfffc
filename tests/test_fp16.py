"""Training in fp16: the scale of the loss, its state, overflow, training against fp32; which GPUs train so, and their plans.

On a CPU it is switched on by hardware.FP16_ON_CPU: products are correct there, and a thousand times too slow for anything else."""

import json
import os
import signal

import pytest
import small
import torch

import train
from nanochat import hardware
from nanochat.common import UsageError
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.model.loss import linear_cross_entropy
from nanochat.optim import loss_scaler as fp16
from nanochat.run import checkpoint
from nanochat.run.metrics import Record

CPU = torch.device("cpu")
FLAGS = ("--dtype=float16", "--device-batch-size=8", "--sample-every=-1")


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


# ----- the scale


def test_the_scale_grows_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(fp16, "GROWTH_STEPS", 3)
    scaler = fp16.LossScaler()
    assert [scaler.update(True) for _ in range(3)] == [False] * 3 and scaler.state() == [
        2 * fp16.INITIAL_SCALE,
        0,
    ]
    scaler.update(True)
    scaler.update(True)
    assert scaler.update(False) is True and scaler.state() == [fp16.INITIAL_SCALE, 0], (
        "an overflow also begins the count again"
    )
    assert [scaler.update(True) for _ in range(3)] == [
        False
    ] * 3 and scaler.scale == 2 * fp16.INITIAL_SCALE


def test_the_scale_does_not_fall_below_its_minimum():
    scaler = fp16.LossScaler([4 * fp16.MIN_SCALE, 7])
    assert [scaler.update(False) for _ in range(4)] == [
        True,
        True,
        False,
        False,
    ] and scaler.scale == fp16.MIN_SCALE


def test_the_usual_constants():
    assert (fp16.INITIAL_SCALE, fp16.MIN_SCALE, fp16.GROWTH_STEPS) == (65536, 1, 2000)


def test_state_round_trip():
    scaler = fp16.LossScaler()
    for finite in (True, False, True, True):
        scaler.update(finite)
    again = fp16.LossScaler(json.loads(json.dumps(scaler.state())))
    assert again.state() == scaler.state() == [fp16.INITIAL_SCALE / 2, 2]


# ----- gradients


def gradients(dtype, accumulation, scale=None):
    """{name: gradient} of a micro-batch, one of `accumulation`, scaled and unscaled where there is a scale, times accumulation."""
    config = GPTConfig(
        depth=2,
        width=48,
        head_dim=16,
        n_head=3,
        n_kv_head=1,
        vocab_size=50,
        max_seq_len=24,
        short_window=9,
        key_shift=True,
    )
    model = build(config, CPU, dtype, seed=1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ids = torch.randint(50, (3, 25), generator=generator)
    if scale is None:
        loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
        (loss / accumulation).backward()
    else:
        scaler = fp16.LossScaler([scale, 0])
        loss = scaler.backward(model, ids[:, :-1], ids[:, 1:], accumulation)
        assert not loss.requires_grad
        scaler.unscale(list(model.parameters()))
    return loss.item(), {
        name: parameter.grad * accumulation for name, parameter in model.named_parameters()
    }


def distance(found, exact):
    difference = sum((found[name].double() - exact[name].double()).square().sum() for name in exact)
    return (difference / sum(grad.double().square().sum() for grad in exact.values())).sqrt().item()


@pytest.mark.parametrize("accumulation", [1, 2**12])
def test_gradients_are_as_good_as_fp16_can(on_cpu, accumulation):
    """Nearer to fp32 than bf16 with its three bits less, however small a share of the batch a micro-batch is; unscaled most is lost."""
    exact_loss, exact = gradients(torch.float32, accumulation)
    loss, ours = gradients(torch.float16, accumulation, fp16.INITIAL_SCALE)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert distance(ours, exact) < 0.5 * distance(gradients(torch.bfloat16, accumulation)[1], exact)
    if accumulation > 1:
        for unscaled in (
            gradients(torch.float16, accumulation)[1],
            gradients(torch.float16, accumulation, 1.0)[1],
        ):
            assert distance(unscaled, exact) > 5 * distance(ours, exact)


def test_the_loss_rounds_its_gradients_at_their_scaled_size():
    """They are made along with the loss, before the backward pass brings the scale: those of a mean over many tokens are too small for
    fp16."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (
        torch.randn(3000, 48, generator=generator),
        torch.randn(40, 48, generator=generator) * 0.001,
    )
    targets = torch.randint(-1, 40, (3000,), generator=generator)

    def gradients_of(dtype, upstream, scale=2.0**16):
        x, w = hidden.to(dtype, copy=True).requires_grad_(), weight.clone().requires_grad_()
        (linear_cross_entropy(x, w, targets, 15.0, "mean", upstream=upstream) * scale).backward()
        return x.grad.double() / scale, w.grad.double() / scale

    exact = gradients_of(torch.float32, 1.0)
    scaled, late = gradients_of(torch.float16, 2.0**16), gradients_of(torch.float16, 1.0)
    errors = [
        [
            ((found - right).norm() / right.norm()).item()
            for found, right in zip(pair, exact, strict=True)
        ]
        for pair in (scaled, late)
    ]
    assert max(errors[0]) < 2e-3 and errors[1][0] > 0.05, errors
    for found, right in zip(
        gradients_of(torch.float32, 3.0, scale=7.0), exact, strict=True
    ):  # whatever comes in the end
        assert (found - right).norm() < 1e-6 * right.norm()


def test_what_overflows_stays_infinite():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([8.0, float("inf"), float("nan")])
    fp16.LossScaler([4.0, 0]).unscale([parameter])
    assert (
        parameter.grad[0] == 2 and parameter.grad[1] == float("inf") and parameter.grad[2].isnan()
    )


# ----- runs


@pytest.mark.parametrize(
    "arch",
    [[], ["--arch=llama", "--tie-embeddings", "--optimizer=adamw", "--grad-clip=1"]],
    ids=["speedrun", "llama"],
)
def test_training_follows_fp32(on_cpu, tmp_path, capsys, arch):
    assert small.run(tmp_path, *FLAGS, *arch) == 0
    assert "float16 (as requested) with loss scaling" in capsys.readouterr().out
    assert small.run(tmp_path, *arch, "--sample-every=-1", tag="fp32") == 0
    losses, exact = small.losses(tmp_path), small.losses(tmp_path, "fp32")
    assert losses == pytest.approx(exact, abs=0.02) and losses[11] < losses[0] - 0.5
    assert losses != pytest.approx(exact, abs=1e-6)
    assert small.summary(tmp_path)["val_bpb"] == pytest.approx(
        small.summary(tmp_path, "fp32")["val_bpb"], abs=0.02
    )
    norms = [
        [
            line["train/grad_norm"]
            for line in small.lines(tmp_path, tag)
            if "train/grad_norm" in line
        ]
        for tag in ("run", "fp32")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.1), "they are told unscaled"
    plain = small.weights(tmp_path, 12, "fp32")
    assert all(
        tensor.dtype == torch.float32 and tensor.shape == plain[name].shape
        for name, tensor in small.weights(tmp_path, 12).items()
    )


def test_resuming_goes_on_with_the_same_scale(on_cpu, tmp_path, monkeypatch):
    """The scale doubles after step 2, 5 and 8; stopped after step 6 the count of good steps goes on as well."""
    monkeypatch.setattr(fp16, "GROWTH_STEPS", 3)
    monkeypatch.setattr(fp16, "INITIAL_SCALE", 2.0**10)
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
    step = checkpoint.steps_of(tmp_path / "broken")[-1]
    assert step in (7, 8) and checkpoint.read_state(tmp_path / "broken", step)["loss_scaler"] == [
        2.0**12,
        step - 6,
    ]
    assert small.run(tmp_path, *FLAGS, "--resume", tag="broken") == 0
    assert small.timeless(small.lines(tmp_path, "broken")) == small.timeless(
        small.lines(tmp_path, "whole")
    )
    whole, broken = small.weights(tmp_path, 12, "whole"), small.weights(tmp_path, 12, "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_overflow_lowers_the_scale_and_is_no_fault(on_cpu, tmp_path, monkeypatch, capsys):
    """Steps whose gradients overflow are left out until the scale is low enough, more in a row than --max-skipped allows of others;
    checkpoints are made as ever, of weights that such a step left alone."""
    monkeypatch.setattr(fp16, "INITIAL_SCALE", 2.0**24)
    assert small.run(tmp_path, *FLAGS, "--max-skipped=1", "--save-every=1") == 0
    found = scales(tmp_path)
    skipped = [
        line["step"]
        for line in small.lines(tmp_path)
        if line.get("skipped") == "non-finite gradient"
    ]
    assert skipped[:3] == [0, 1, 2] and len(skipped) < 10
    assert (
        all(found[step + 1] == found[step] / (2 if step in skipped else 1) for step in range(11))
        and found[0] == 2.0**24
    )
    assert small.summary(tmp_path)["skipped_steps"] == len(skipped)
    shown = capsys.readouterr().out
    assert (
        "fp16 overflowed, the loss is scaled by 8.38861e+06 from here on" in shown
        and "cannot be saved" not in shown
    )
    first, second = small.weights(tmp_path, 1), small.weights(tmp_path, 2)
    assert all(torch.equal(first[name], second[name]) for name in first), "step 1 was left out"
    assert small.losses(tmp_path)[11] < small.losses(tmp_path)[0]


def test_overflow_at_the_lowest_scale_is_a_fault(on_cpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fp16, "INITIAL_SCALE", 2.0**31)
    monkeypatch.setattr(fp16, "MIN_SCALE", 2.0**30)
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
    assert set(scales(tmp_path).values()) == {fp16.INITIAL_SCALE}


def test_two_ranks_keep_one_scale(on_cpu, tmp_path, monkeypatch):
    """Each of two ranks has a whole micro-batch where one rank has two halves of a step: with half the scale they overflow alike."""
    monkeypatch.setattr(fp16, "INITIAL_SCALE", 2.0**21)
    flags = (
        *FLAGS,
        "--device-batch-size=4",
        "--num-iterations=6",
        "--eval-every=-1",
        "--no-save",
        "--save-every=-1",
    )
    assert small.run(tmp_path, *flags, tag="one") == 0
    switched = (
        "from nanochat import fp16, hardware\nhardware.measured_peak = lambda device, dtype: 1e12\n"
        f"hardware.FP16_ON_CPU, fp16.INITIAL_SCALE = True, {2.0**20}\n{small.RUNNER}"
    )
    finished = small.run_ranks(tmp_path, 2, *flags, tag="two", script=switched)
    assert finished.returncode == 0, finished.stderr
    assert small.losses(tmp_path, "two") == pytest.approx(small.losses(tmp_path, "one"), abs=0.01)
    assert [2 * scale for scale in scales(tmp_path, "two").values()] == list(
        scales(tmp_path, "one").values()
    )
    assert scales(tmp_path, "one")[5] < 2.0**21


# ----- which machines, and their plans


@pytest.mark.parametrize(
    "capability, training, inference",
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((7, 5), torch.float16, torch.float32),
        ((7, 0), torch.float16, torch.float32),
        ((6, 1), torch.float32, torch.float32),
    ],
)
def test_auto_is_what_the_gpu_multiplies_fast(capability, training, inference):
    for expected, is_training in ((training, True), (inference, False)):
        dtype, reason = hardware.pick_dtype("auto", "cuda", is_training, capability)
        assert dtype == expected and f"SM{capability[0]}{capability[1]}" in reason
        assert ("no bf16" in reason) == (capability < (8, 0))


def test_requested_dtypes():
    assert hardware.pick_dtype("float16", "cuda", True, (9, 0)) == (torch.float16, "as requested")
    assert hardware.pick_dtype("float32", "cuda", True, (7, 5)) == (torch.float32, "as requested")
    dtype, reason = hardware.pick_dtype("bfloat16", "cuda", True, (7, 5))
    assert dtype == torch.bfloat16 and "no bf16" in reason
    for device_type in ("cpu", "mps"):
        with pytest.raises(
            UsageError,
            match=f"--dtype=float16: needs a CUDA device .this is {device_type}.*use bfloat16 or float32",
        ):
            hardware.pick_dtype("float16", device_type)


def test_the_table_of_gpus():
    assert (
        hardware.listed_gpu("Tesla T4").capability == (7, 5)
        and hardware.listed_gpu("NVIDIA T400") is None
    )
    assert hardware.listed_gpu("Tesla V100-PCIE-16GB").peak_flops == 112e12
    assert hardware.listed_gpu("NVIDIA H100 80GB HBM3") == hardware.GPUS["H100"]
    assert hardware.peak_label(hardware.GPUS["T4"], "Tesla T4") == "listed fp16 peak of Tesla T4"
    assert hardware.peak_label(hardware.GPUS["A100"], "A100") == "listed bf16 peak of A100"


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
