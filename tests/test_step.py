"""The passes and the update of one training step: micro-batches, the loss scaler switched off, and
recorded numbers of a whole step."""

import numpy as np
import pytest
import torch

from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.step import accumulate, forward_backward, page_locked

CPU = torch.device("cpu")
OFF = LossScaler(enabled=False)
SHAPE = {
    "depth": 2,
    "width": 32,
    "head_dim": 16,
    "n_head": 2,
    "n_kv_head": 2,
    "vocab_size": 50,
    "max_seq_len": 16,
    "short_window": 8,
}
WINDOWS = {"speedrun": "SL", "llama": "L"}
ADAMW = {"lr": 0.004, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
SETTINGS = {
    "matrices": {"lr": 0.02, "beta2": 0.95, "weight_decay": 0.2},
    "embedding": ADAMW | {"lr": 0.3},
    "value_embeddings": ADAMW | {"lr": 0.3},
    "unembedding": ADAMW,
    "scalars": ADAMW | {"lr": 0.005, "eps": 1e-6},
}


def test_batches_for_a_gpu_lie_in_memory_that_it_copies_from(monkeypatch):
    """Each part adjacent, because only then it is copied as it is; for other devices nothing is."""
    pinned = []

    def pin_memory(part):
        assert part.is_contiguous()
        pinned.append(part)
        return part

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    rows = np.arange(12).reshape(3, 4)
    batch = rows[:, :-1], rows[:, 1:]
    assert page_locked(batch, CPU) is batch
    inputs, targets = page_locked(batch, torch.device("cuda", 1))
    assert len(pinned) == 2
    assert inputs.tolist() == batch[0].tolist() and targets.tolist() == batch[1].tolist()


def start(arch, **changes):
    """(model, optimizer) whose weights are sines, which no generator of random numbers decides."""
    config = GPTConfig(**SHAPE, arch=arch, window_pattern=WINDOWS[arch], **changes)
    model = build(config, CPU, seed=1).train()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            waves = (0.1 * torch.sin(1.7 * numbers + i)).float().view(parameter.shape)
            # scales of norms and lambdas lie around 1
            parameter.copy_(waves + 1 if parameter.ndim == 1 else waves)
    return model, Optimizer(model.parameter_groups(), SETTINGS, torch.float32)


def rows(n):
    """(inputs, targets) of n rows of 16 tokens."""
    ids = (7 * torch.arange(n * 17) ** 2 % 47).view(n, 17)
    return ids[:, :-1], ids[:, 1:]


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def micro_batches(n):
    """Four rows in n micro-batches."""
    inputs, targets = rows(4)
    return list(zip(inputs.chunk(n), targets.chunk(n), strict=True))


# ---- micro-batches ----


@pytest.mark.parametrize("arch", WINDOWS)
def test_any_number_of_micro_batches_gives_the_same_gradients(arch):
    """To rounding; the loss is the mean of theirs."""
    found = {}
    for n in (1, 2, 4):
        model, optimizer = start(arch)
        loss = accumulate(model, optimizer, OFF, micro_batches(n), CPU)
        found[n] = loss.item(), gradients(model)
        assert loss.ndim == 0 and not loss.requires_grad
    loss, exact = found[1]
    largest = max(gradient.abs().max() for gradient in exact.values())
    for n in (2, 4):
        assert found[n][0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in exact.items():
            error = (found[n][1][name] - gradient).abs().max()
            assert error < 1e-6 * largest, f"{n} micro-batches: {name}"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_scaler_switched_off_changes_no_bit(n):
    """The gradients are those of a plain (loss / n).backward() for each micro-batch."""
    model, optimizer = start("speedrun")
    loss = accumulate(model, optimizer, OFF, micro_batches(n), CPU)
    plain, _ = start("speedrun")
    plain_loss = torch.zeros(())
    for inputs, targets in micro_batches(n):
        part = plain(inputs, targets, reduction="mean")
        (part / n).backward()
        plain_loss += part.detach() / n
    assert torch.equal(loss, plain_loss)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_power_of_two_as_scale_rounds_nothing_in_fp32():
    model, optimizer = start("speedrun")
    scaler = LossScaler(enabled=True, state=[2.0**8, 0])
    scaled_loss = accumulate(model, optimizer, scaler, micro_batches(2), CPU)
    scaler.unscale(list(model.parameters()))
    plain, plain_optimizer = start("speedrun")
    loss = accumulate(plain, plain_optimizer, OFF, micro_batches(2), CPU)
    assert torch.equal(scaled_loss, loss)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("enabled, early", [(False, [False, True]), (True, [False, False])])
def test_gradients_travel_during_the_last_pass(enabled, early):
    """Unless they have to be unscaled first."""
    model, optimizer = start("speedrun")
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(optimizer.early))
    accumulate(model, optimizer, LossScaler(enabled=enabled), micro_batches(2), CPU)
    assert seen == early


def test_numpy_batches_and_added_gradients():
    """Batches come as arrays from the rows; a pass adds to the gradients that exist."""
    inputs, targets = rows(2)
    model, _ = start("llama")
    first = forward_backward(model, OFF, (inputs.numpy(), targets.numpy()), 1, CPU)
    once = gradients(model)
    second = forward_backward(model, OFF, (inputs, targets), 1, CPU)
    assert torch.equal(first, second)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, 2 * once[name]), name


def test_dropout_follows_the_seed_of_each_micro_batch():
    model, optimizer = start("llama", dropout=0.5)
    asked = []

    def loss_with(seeds):
        def seed(micro):
            asked.append(micro)
            return seeds[micro]

        return accumulate(model, optimizer, OFF, micro_batches(2), CPU, seed).item()

    first = loss_with([5, 6])
    torch.manual_seed(99)
    assert loss_with([5, 6]) == first
    assert loss_with([5, 7]) != first
    assert asked == [0, 1] * 3


# ---- recorded numbers ----

# arch: loss, gradient norm, and the first two elements of some weights after one update with
# clipping to 0.5, half the learning rates and momentum 0.85
RECORDED = {
    "speedrun": (
        4.383011817932129,
        1.7977006435394287,
        {
            "embedding.weight": (0.07431914657354355, -0.2050444483757019),
            "value_embeddings.1.weight": (0.054101258516311646, -0.10950246453285217),
            "blocks.0.attention.query.weight": (-0.02766166254878044, 0.09801184386014938),
            "blocks.1.attention.value_gate.weight": (-0.03126893937587738, -0.09374646097421646),
            "blocks.1.mlp.up.weight": (-0.09619424492120743, -0.015405417419970036),
            "blocks.1.mlp.down.weight": (-0.07485421746969223, 0.0748695582151413),
            "head.weight": (0.012987732887268066, 0.09411527216434479),
            "residual_lambdas": (0.9975019097328186, 1.0966665744781494),
        },
    ),
    "llama": (
        3.9715607166290283,
        2.2523603439331055,
        {
            "embedding.weight": (-0.14999932050704956, 0.24916473031044006),
            "blocks.0.attention_norm.weight": (1.0866442918777466, 1.0452346801757812),
            "blocks.0.attention.key.weight": (0.013797283172607422, -0.09925946593284607),
            "blocks.1.mlp.gate.weight": (-0.02967243455350399, -0.09093596041202545),
            "blocks.1.mlp.down.weight": (-0.07514163851737976, 0.07552642375230789),
            "head.weight": (0.08929459005594254, 0.03070506639778614),
        },
    ),
}
CHANGED = (
    "training computes other numbers than when these were recorded: model, loss or optimizer have "
    "changed. If that is intended, show by runs that it is no worse and record the new numbers; if "
    "not, it is a bug, and runs can no longer be compared with earlier ones"
)


@pytest.mark.parametrize("arch", RECORDED)
def test_a_step_gives_the_recorded_numbers(arch):
    expected_loss, expected_norm, expected_weights = RECORDED[arch]
    model, optimizer = start(arch)
    mean_loss = accumulate(model, optimizer, OFF, [rows(2)], CPU)
    loss, grad_norm = optimizer.reduce(mean_loss, OFF)
    assert loss == pytest.approx(expected_loss, rel=1e-5), f"loss: {CHANGED}"
    assert grad_norm == pytest.approx(expected_norm, rel=1e-5), f"gradient norm: {CHANGED}"
    optimizer.clip(grad_norm, 0.5)
    optimizer.step(lr_multiplier=0.5, mu=0.85)
    parameters = dict(model.named_parameters())
    for name, expected in expected_weights.items():
        first = parameters[name].detach().flatten()[:2].tolist()
        assert first == pytest.approx(expected, rel=1e-5), f"{name}: {CHANGED}"
