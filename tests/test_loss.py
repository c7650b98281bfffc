"""The chunked loss against torch.nn.functional.cross_entropy: in fp64, and in the same dtype."""

import functools
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.model import loss
from nanochat.model.kernels import cpu_training
from nanochat.model.loss import linear_cross_entropy, pick_loss, pick_scoring_loss

# N tokens, C width, V vocabulary, logits in a chunk, softcap
CASES = [
    (1, 8, 5, 2**24, 15.0),
    (63, 48, 257, 257, 15.0),  # one token a chunk
    (63, 48, 257, 257, None),
    (65, 32, 1000, 10_000, 15.0),  # chunks of 10 and one of 5
    (257, 64, 300, 40_000, None),
    (257, 64, 300, 40_000, 1000.0),  # a cap so wide that exponentials need their maximum taken off
    (512, 256, 4096, 2**20, 15.0),
]


def inputs(N, C, V, seed=0):
    """Hidden states of unit RMS, a head that gives logits of several nats, and targets: a third of
    them likely, some -1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = F.rms_norm(torch.randn(N, C, generator=generator), (C,))
    weight = 4 * torch.randn(V, C, generator=generator) / C**0.5
    targets = torch.randint(V, (N,), generator=generator)
    targets[::3] = (hidden[::3] @ weight.T).argmax(-1)
    if N > 4:
        targets[torch.randint(N, (N // 5,), generator=generator)] = -1
    return hidden, weight, targets


def function_of(backend):
    """linear_cross_entropy() by one of its backends."""
    if backend == "native" and (problem := cpu_training.problem()):
        pytest.skip(problem)
    return functools.partial(linear_cross_entropy, backend=backend)


def plain(hidden, weight, targets, softcap, reduction):
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


def results(function, hidden, weight, targets, softcap, reduction):
    """Loss and both gradients; with reduction "none" each token's upstream gradient differs."""
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    nats = function(hidden, weight, targets, softcap, reduction)
    upstream = (
        torch.linspace(-1, 2, len(targets), dtype=nats.dtype)
        if reduction == "none"
        else torch.tensor(0.5, dtype=nats.dtype)
    )
    nats.backward(upstream)
    return {"nats": nats.detach(), "d hidden": hidden.grad, "d weight": weight.grad}


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N, C, V, chunk, softcap", CASES)
def test_equals_cross_entropy(N, C, V, chunk, softcap, reduction, backend, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": chunk})
    monkeypatch.setattr(loss, "EAGER_LOGITS", 3 * V)  # three rows at a time
    hidden, weight, targets = inputs(N, C, V)
    exact = results(plain, hidden.double(), weight.double(), targets, softcap, reduction)
    ours = results(function_of(backend), hidden, weight, targets, softcap, reduction)
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == torch.float32
        assert (ours[name] - exact[name]).abs().max() <= 3e-6 * exact[name].abs().max().clamp_min(
            1.0
        ), name
    with torch.no_grad():
        nats = function_of(backend)(hidden, weight, targets, softcap, reduction)
    assert torch.allclose(nats, ours["nats"], rtol=1e-6)


@pytest.mark.parametrize("V, rows", [(257, 320), (300, 320), (264, 264)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_padded_vocabulary_gives_the_same(V, rows, reduction, monkeypatch):
    """As GPUs need it where V is no multiple of 8; no gradient of the padding is left over."""
    hidden, weight, targets = inputs(63, 48, V)
    whole = results(linear_cross_entropy, hidden, weight, targets, 15.0, reduction)
    monkeypatch.setattr(loss, "PADDED_TO", {"cpu": 64})
    assert loss._padded(weight).shape == (rows, 48)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": 10 * V})
    padded = results(linear_cross_entropy, hidden, weight, targets, 15.0, reduction)
    for name, expected in whole.items():
        torch.testing.assert_close(padded[name], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("N, C, V, chunk, softcap", CASES[1:])
def test_bf16_is_no_worse_than_plain_bf16(N, C, V, chunk, softcap, reduction, backend, monkeypatch):
    """Three-way rule: the error against exact arithmetic on the same bf16 inputs is compared with
    that of plain PyTorch."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": chunk})
    hidden, weight, targets = inputs(N, C, V)
    hidden, weight = hidden.bfloat16(), weight.bfloat16().float()
    exact = results(plain, hidden.double(), weight.double(), targets, softcap, reduction)
    theirs = results(plain, hidden, weight, targets, softcap, reduction)
    ours = results(function_of(backend), hidden, weight, targets, softcap, reduction)
    assert ours["d hidden"].dtype == torch.bfloat16 and ours["d weight"].dtype == torch.float32
    for name in exact:
        error, allowed = ((x[name] - exact[name]).norm() for x in (ours, theirs))
        assert error <= 1.5 * allowed + 1e-6 * exact[name].norm(), (
            f"{name}: {error:.2e} against {allowed:.2e}"
        )


def test_no_tensor_holds_all_logits(monkeypatch):
    """Forward and backward pass: no tensor is larger than a chunk's logits or the weight."""
    N, C, V, chunk = 512, 16, 2000, 20_000
    monkeypatch.setattr(loss, "CHUNK_LOGITS", {"cpu": chunk})
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)),
                ]
            )
            return out

    hidden, weight, targets = inputs(N, C, V)
    with Watch():
        results(linear_cross_entropy, hidden, weight, targets, 15.0, "mean")
    assert largest <= max(chunk, V * C) < N * V / 20
    with Watch():
        results(plain, hidden, weight, targets, 15.0, "mean")
    assert largest == N * V


@pytest.mark.parametrize("backend", ["plain", "native"])
def test_extreme_logits(backend):
    """Where e^x would overflow or 1 - tanh^2 vanish: as exact as plain PyTorch, and never NaN."""
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    hidden, targets = torch.tensor([[1e4], [-1e4], [30.0], [0.0]]), torch.tensor([0, 0, 2, 1])
    for softcap in (15.0, None):
        exact = results(plain, hidden.double(), weight.double(), targets, softcap, "sum")
        ours = results(function_of(backend), hidden, weight, targets, softcap, "sum")
        for name in exact:
            torch.testing.assert_close(ours[name], exact[name].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["plain", "native"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N", [0, 5])
def test_no_token_counts(N, reduction, backend):
    """As PyTorch: the mean is NaN, everything else is zero, all gradients too."""
    hidden, weight, targets = inputs(5, 4, 11)
    hidden, targets = hidden[:N], torch.full((N,), -1)
    theirs = results(plain, hidden, weight, targets, 15.0, reduction)
    ours = results(function_of(backend), hidden, weight, targets, 15.0, reduction)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["plain", "native"])
def test_non_finite_logits_are_seen(backend):
    hidden, weight, targets = inputs(6, 4, 11)
    weight[3, 2] = float("nan")
    for softcap in (15.0, None):
        assert function_of(backend)(hidden, weight.requires_grad_(), targets, softcap).isnan()


def test_native_loss_leaves_other_dtypes_to_pytorch():
    hidden, weight, targets = inputs(6, 4, 11)
    expected = linear_cross_entropy(hidden.half(), weight, targets, 15.0)
    got = linear_cross_entropy(hidden.half(), weight, targets, 15.0, backend="native")
    assert torch.equal(got, expected)


def test_compiled_equals_eager():
    hidden, weight, targets = inputs(64, 32, 500)
    for reduction in ("mean", "none"):
        eager = results(linear_cross_entropy, hidden, weight, targets, 15.0, reduction)
        compiled = results(
            lambda *x: linear_cross_entropy(*x, backend="compiled"),
            hidden,
            weight,
            targets,
            15.0,
            reduction,
        )
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "installed, capability, expected",
    [(True, (9, 0), "triton"), (True, (6, 1), "plain"), (False, (9, 0), "plain")],
)
def test_scoring_takes_a_kernel_of_any_shape_on_a_gpu(monkeypatch, installed, capability, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    # without its memory, which the patches must not enter
    assert pick_scoring_loss.__wrapped__("cuda") == expected
    assert pick_scoring_loss.__wrapped__("cpu") == "plain"


def test_backend_choice(monkeypatch):
    assert pick_loss("cpu", compiled=False)[0] == pick_loss("cuda", compiled=False)[0] == "plain"
    assert pick_loss("cuda", compiled=True)[0] == "compiled"
    if not cpu_training.problem():
        assert pick_loss("cpu", compiled=True)[0] == "native"
    monkeypatch.setattr(cpu_training, "problem", lambda planned: "no C++ compiler")
    backend, reason = pick_loss("cpu", compiled=True)
    assert backend == "compiled" and "no C++ compiler" in reason


def test_refused():
    hidden, weight, targets = inputs(6, 4, 11)
    with pytest.raises(ValueError, match="median"):
        linear_cross_entropy(hidden, weight, targets, reduction="median")
    with pytest.raises(ValueError, match="backend 'fused'"):
        linear_cross_entropy(hidden, weight, targets, backend="fused")
    nats = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        nats.backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        linear_cross_entropy(hidden, weight, targets).backward(create_graph=True)
