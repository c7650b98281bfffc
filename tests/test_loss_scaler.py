"""The loss scale of fp16 training: how it adapts, its state, and how good the gradients are.

On a CPU fp16 is switched on by hardware.FP16_ON_CPU: products are correct there, and a thousand
times too slow for anything else."""

import json
from functools import partial

import pytest
import torch

from nanochat import hardware
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.loss import linear_cross_entropy
from nanochat.optim import loss_scaler
from nanochat.optim.loss_scaler import INITIAL_SCALE, MIN_SCALE, LossScaler
from nanochat.optim.step import mean_loss

CPU = torch.device("cpu")
CONFIG = GPTConfig(
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


# ---- the scale ----


def test_the_scale_grows_after_many_good_steps(monkeypatch):
    monkeypatch.setattr(loss_scaler, "GROWTH_STEPS", 3)
    scaler = LossScaler(enabled=True)
    assert [scaler.update(True) for _ in range(3)] == [False] * 3
    assert scaler.state() == [2 * INITIAL_SCALE, 0]
    scaler.update(True)
    scaler.update(True)
    assert scaler.update(False) is True
    # an overflow also begins the count again
    assert scaler.state() == [INITIAL_SCALE, 0]
    assert [scaler.update(True) for _ in range(3)] == [False] * 3
    assert scaler.scale == 2 * INITIAL_SCALE


def test_the_scale_does_not_fall_below_its_minimum():
    scaler = LossScaler(enabled=True, state=[4 * MIN_SCALE, 7])
    assert [scaler.update(False) for _ in range(4)] == [True, True, False, False]
    assert scaler.scale == MIN_SCALE


def test_the_usual_constants():
    assert (INITIAL_SCALE, MIN_SCALE, loss_scaler.GROWTH_STEPS) == (65536, 1, 2000)


def test_state_round_trip():
    scaler = LossScaler(enabled=True)
    for finite in (True, False, True, True):
        scaler.update(finite)
    again = LossScaler(enabled=True, state=json.loads(json.dumps(scaler.state())))
    assert again.state() == scaler.state() == [INITIAL_SCALE / 2, 2]


def test_switched_off_it_has_no_state_and_changes_nothing():
    scaler = LossScaler(enabled=False)
    assert [scaler.update(finite) for finite in (True, False)] == [False, False]
    assert scaler.state() is None and scaler.scale == INITIAL_SCALE
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([8.0, float("inf")])
    scaler.unscale([parameter])
    assert parameter.grad.tolist() == [8.0, float("inf")]


# ---- gradients ----


def gradients(dtype, accumulation, scale=None):
    """The loss and {name: gradient} of a micro-batch, one of `accumulation`, scaled and unscaled
    where there is a scale, times accumulation."""
    model = build(CONFIG, CPU, dtype, seed=1).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ids = torch.randint(50, (3, 25), generator=generator)
    if scale is None:
        loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
        (loss / accumulation).backward()
    else:
        scaler = LossScaler(enabled=True, state=[scale, 0])
        loss_of = partial(mean_loss, model, (ids[:, :-1], ids[:, 1:]))
        loss = scaler.backward(loss_of, accumulation)
        assert not loss.requires_grad
        scaler.unscale(list(model.parameters()))
    found = {name: parameter.grad * accumulation for name, parameter in model.named_parameters()}
    return loss.item(), found


def distance(found, exact):
    """Norm of the difference / norm of the exact gradients."""
    difference = sum((found[name].double() - exact[name].double()).square().sum() for name in exact)
    return (difference / sum(grad.double().square().sum() for grad in exact.values())).sqrt().item()


@pytest.mark.parametrize("accumulation", [1, 2**12])
def test_gradients_are_as_good_as_fp16_can(monkeypatch, accumulation):
    """Nearer to fp32 than bf16 with its three bits less, however small a share of the batch a
    micro-batch is; unscaled most is lost."""
    monkeypatch.setattr(hardware, "FP16_ON_CPU", True)
    exact_loss, exact = gradients(torch.float32, accumulation)
    loss, ours = gradients(torch.float16, accumulation, INITIAL_SCALE)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert distance(ours, exact) < 0.5 * distance(gradients(torch.bfloat16, accumulation)[1], exact)
    if accumulation > 1:
        for unscaled in (
            gradients(torch.float16, accumulation)[1],
            gradients(torch.float16, accumulation, 1.0)[1],
        ):
            assert distance(unscaled, exact) > 5 * distance(ours, exact)


def test_the_loss_rounds_its_gradients_at_their_scaled_size():
    """They are computed along with the loss, before the backward pass brings the scale: those of a
    mean over many tokens are too small for fp16."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(3000, 48, generator=generator)
    weight = torch.randn(40, 48, generator=generator) * 0.001
    targets = torch.randint(-1, 40, (3000,), generator=generator)

    def gradients_of(dtype, upstream, scale=2.0**16):
        x = hidden.to(dtype, copy=True).requires_grad_()
        w = weight.clone().requires_grad_()
        loss = linear_cross_entropy(x, w, targets, 15.0, "mean", upstream=upstream)
        (loss * scale).backward()
        return x.grad.double() / scale, w.grad.double() / scale

    def errors_of(found):
        pairs = zip(found, exact, strict=True)
        return [((ours - right).norm() / right.norm()).item() for ours, right in pairs]

    exact = gradients_of(torch.float32, 1.0)
    scaled = errors_of(gradients_of(torch.float16, 2.0**16))
    late = errors_of(gradients_of(torch.float16, 1.0))
    assert max(scaled) < 2e-3 and late[0] > 0.05, (scaled, late)
    # whatever comes in the end
    assert max(errors_of(gradients_of(torch.float32, 3.0, scale=7.0))) < 1e-6


def test_what_overflows_stays_infinite():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([8.0, float("inf"), float("nan")])
    LossScaler(enabled=True, state=[4.0, 0]).unscale([parameter])
    assert parameter.grad[0] == 2 and parameter.grad[1] == float("inf")
    assert parameter.grad[2].isnan()
