"""Passes without gradients in C++: positions of queries and keys, and when they are used.

Their attention is tested in test_attention.py."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.kernels import cpu_reading

if problem := cpu_reading.problem():
    pytest.skip(problem, allow_module_level=True)

B, T, H = 3, 37, 2


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact_positions(x, cos, sin, eps, before, shifts):
    """The same as cpu_reading.positioned(), channel by channel in fp64."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    half = x.size(-1) // 2
    if shifts:
        first = torch.zeros_like(x[:, :1]) if before is None else before.double()
        earlier = torch.cat((first, x[:, :-1]), dim=1)
        x = x.clone()
        for pair in range((half + 1) // 2, half):
            for channel in (pair, pair + half):
                x[..., channel] = earlier[..., channel]
    out = torch.empty_like(x)
    for pair in range(half):
        real, imaginary = x[..., pair], x[..., pair + half]
        c, s = cos[..., pair, None], sin[..., pair, None]
        out[..., pair] = real * c - imaginary * s
        out[..., pair + half] = imaginary * c + real * s
    return out if eps is None else F.rms_norm(out, (x.size(-1),), eps=eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [2, 10, 24, 32, 66, 128])
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("of_each_row", [False, True])
def test_positions_equal_exact_arithmetic(dtype, D, shifts, of_each_row):
    x = (3 * drawn(B, T, H, D)).to(dtype)
    before = drawn(B, 1, H, D, seed=1).to(dtype)
    angles = drawn(*((B,) if of_each_row else ()), T, D // 2, seed=2)
    rope = (angles.cos(), angles.sin())
    # rounded once: half a unit in the last place of the largest numbers
    allowed = 0.51 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    for previous in (None, before):
        for eps in (None, 1e-6, 0.1):
            found = cpu_reading.positioned(x, rope, eps, previous, shifts=shifts)
            exact = exact_positions(x, *rope, eps, previous, shifts)
            assert found.dtype == dtype
            assert ((found - exact).abs() <= allowed * exact.abs().clamp_min(1.0)).all()


def test_an_expanded_key_before_and_strided_heads_are_read_as_they_are():
    x = drawn(B, T, 2 * H, 32)[:, :, ::2]
    before = drawn(1, 1, H, 32, seed=1).expand(B, -1, -1, -1)
    angles = drawn(T, 16, seed=2)
    found = cpu_reading.positioned(x, (angles.cos(), angles.sin()), None, before, shifts=True)
    exact = exact_positions(x, angles.cos(), angles.sin(), None, before, True)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_what_the_library_would_misread_is_refused():
    x, angles = drawn(B, T, H, 32), drawn(T, 16)
    rope = (angles.cos(), angles.sin())
    for wrong in (
        lambda: cpu_reading.positioned(x.half(), rope, None),
        lambda: cpu_reading.positioned(x, (rope[0], rope[1].double()), None),
        lambda: cpu_reading.positioned(x, (rope[0][1:], rope[1][1:]), None),
        lambda: cpu_reading.positioned(x, rope, None, x[:, :2], shifts=True),
        lambda: cpu_reading.attend(x, x, x, 5),
        lambda: cpu_reading.attend(*[x.bfloat16()] * 3, 0),
        lambda: cpu_reading.attend(x.bfloat16(), *[x[:, :4].bfloat16()] * 2, 5),
        lambda: cpu_reading.attend(*[x.bfloat16()] * 3, 5, (x.bfloat16(),) * 2, [T + 1] * B),
    ):
        with pytest.raises(ValueError, match=r"reading\.cpp takes"):
            wrong()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["speedrun", "llama"])
def test_a_native_model_predicts_as_a_blocked_one(arch, dtype, monkeypatch):
    """In fp32 within rounding; in bf16 it is no farther from fp32 than the blocked model."""
    calls = []
    inner = cpu_reading.positioned

    def counted(*args, **named):
        calls.append(1)
        return inner(*args, **named)

    monkeypatch.setattr(cpu_reading, "positioned", counted)
    config = GPTConfig(
        depth=3,
        width=64,
        head_dim=32,
        n_head=2,
        n_kv_head=1,
        vocab_size=50,
        max_seq_len=80,
        arch=arch,
        window_pattern="SL" if arch == "speedrun" else "L",
        short_window=20,
    )
    ids = torch.randint(50, (2, 75), generator=torch.Generator().manual_seed(1))
    exact, plain, native = (
        build(config, "cpu", kind, backend, seed=3).eval()
        for kind, backend in ((torch.float32, "blocked"), (dtype, "blocked"), (dtype, "native"))
    )
    # blocks that do something: output projections start at zero
    for model in (exact, plain, native):
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data.normal_(0, 0.2, generator=generator)
    with torch.no_grad():
        wanted, allowed, found = (model(ids).double() for model in (exact, plain, native))
    assert len(calls) == 2 * config.depth
    error = (found - wanted).norm()
    assert error <= 1.2 * (allowed - wanted).norm() + 1e-5 * wanted.norm()
    # with gradients it is what training computes
    native(ids, ids, reduction="mean").backward()
    assert len(calls) == 2 * config.depth
