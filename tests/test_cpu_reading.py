"""Passes without gradients in C++: positions of queries and keys, the bits of attention, and when
both are used.

That attention is right is tested in test_attention.py."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.eval.kv_cache import Branches, KVCache, LayerCache
from nanochat.model.attention import attention, branched_attention
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.kernels import cpu_reading

if problem := cpu_reading.problem():
    pytest.skip(problem, allow_module_level=True)

B, T, H = 3, 37, 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


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


@DTYPES
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
        lambda: cpu_reading.attend(*[x[..., :24]] * 3, 5),
        lambda: cpu_reading.attend(*[x.half()] * 3, 5),
        lambda: cpu_reading.attend(x, *[x.bfloat16()] * 2, 5),
        lambda: cpu_reading.attend(x, x, x, 0),
        lambda: cpu_reading.attend(x, *[x[:, :4]] * 2, 5),
        lambda: cpu_reading.attend(*[x] * 3, 5, (x,) * 2, [T + 1] * B),
        lambda: cpu_reading.attend(*[x] * 3, 5, (x,) * 2, [T]),
        lambda: cpu_reading.attend(*[x] * 3, 5, (x,) * 2),
        lambda: cpu_reading.attend(*[x] * 3, 5, None, [T] * B),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=r"reading\.cpp takes"):
            wrong()
    # with gradients it would be silent about them
    with pytest.raises(ValueError, match=r"reading\.cpp takes"):
        cpu_reading.attend(x, x, x, 5)


def tiled(dtype, *shape, seed=0):
    x = drawn(*shape, seed=seed).to(dtype)
    with torch.no_grad():
        if not cpu_reading.takes(x):
            assert dtype == torch.bfloat16
            pytest.skip("no bf16 instructions")
    return x


@DTYPES
@pytest.mark.parametrize("window", [1, 20, 33, 64, 10**12])
@pytest.mark.parametrize(("heads", "D"), [((4, 2), 32), ((1, 1), 96)])
def test_bits_depend_neither_on_cuts_nor_on_other_rows(heads, D, window, dtype):
    """Nor on how many threads share the work."""
    rows, length, (n_head, n_kv_head) = 3, 130, heads
    q = tiled(dtype, rows, length, n_head, D)
    k, v = (tiled(dtype, rows, length, n_kv_head, D, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        whole = attention(q, k, v, window, "native")
        for cut in (1, 31, 32, 77, 129):
            late = attention(q[:, cut:], k, v, window, "native")
            assert torch.equal(late, whole[:, cut:])
        assert torch.equal(attention(q[1:2], k[1:2], v[1:2], window, "native"), whole[1:2])
        torch.set_num_threads(3)
        many = attention(q[:1], k[:1], v[:1], window, "native")
        torch.set_num_threads(1)
        assert torch.equal(many, whole[:1])


@DTYPES
def test_choices_that_continue_a_beginning_have_the_bits_of_whole_texts(dtype):
    lengths, n, own, D = [100, 37, 1], 2, 19, 32
    shape = len(lengths) * n, max(lengths) + own, 2, D
    q, k, v = (tiled(dtype, *shape, seed=seed) for seed in range(3))
    for window in (25, 10**6):
        wholes, continued, beginnings = [], [], []
        for row in range(len(q)):
            length = lengths[row // n]
            # both choices continue the first one's beginning
            texts = [x[row : row + 1, : length + own].clone() for x in (q, k, v)]
            for text, x in zip(texts, (q, k, v), strict=True):
                text[:, :length] = x[row // n * n, :length]
            with torch.no_grad():
                wholes.append(attention(*texts, window, "native")[:, length:])
            continued.append([text[:, length:] for text in texts])
            beginnings = [x[::n, : max(lengths)] for x in (k, v)]
        rows = [torch.cat(parts) for parts in zip(*continued, strict=True)]
        with torch.no_grad():
            found = branched_attention(*rows, *beginnings, lengths, window, "native")
        assert torch.equal(found, torch.cat(wholes))


def test_a_token_that_is_read_alone_takes_the_plain_products(monkeypatch):
    """Only in a cache that says so: others keep the bits of whole texts."""
    q, k, v = (tiled(torch.float32, 1, 40, 2, 32, seed=seed) for seed in range(3))
    attended = []
    attend = cpu_reading.attend
    monkeypatch.setattr(cpu_reading, "attend", lambda *args: attended.append(1) or attend(*args))
    found = {}
    with torch.no_grad():
        for one_by_one in (False, True):
            cache = LayerCache(1, 40, 2, 32, "cpu", torch.float32, one_by_one=one_by_one)
            cache.attend(q[:, :39], k[:, :39], v[:, :39], 20, "native")
            found[one_by_one] = cache.attend(q[:, 39:], k[:, 39:], v[:, 39:], 20, "native")
            assert len(attended) == (3 if one_by_one else 2)
        whole = attention(q, k, v, 20, "native")
    assert torch.equal(found[False], whole[:, 39:])
    torch.testing.assert_close(found[True], found[False])


@DTYPES
@pytest.mark.parametrize("arch", ["speedrun", "llama"])
def test_a_native_model_predicts_as_a_blocked_one(arch, dtype, monkeypatch):
    """In fp32 within rounding; in bf16 it is no farther from fp32 than the blocked model."""
    calls = []
    inner = cpu_reading.positioned

    def counted(*args, **named):
        calls.append(1)
        return inner(*args, **named)

    monkeypatch.setattr(cpu_reading, "positioned", counted)
    attended = []
    attend = cpu_reading.attend

    def counted_too(*args):
        attended.append(1)
        return attend(*args)

    monkeypatch.setattr(cpu_reading, "attend", counted_too)
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
    in_tiles = cpu_reading._has_tiles(dtype)
    assert in_tiles or dtype == torch.bfloat16
    assert len(attended) == (config.depth if in_tiles else 0)
    error = (found - wanted).norm()
    assert error <= 1.2 * (allowed - wanted).norm() + 1e-5 * wanted.norm()
    if in_tiles:
        cache = KVCache(config, 2, 40, "cpu", dtype, lengths=[40, 33])
        with torch.no_grad():
            native.hidden(ids[:, :40], cache, fill=True)
            branches = Branches(cache, 3, 50, native.embed(ids[:, 39]))
            native.hidden(ids[:, 40:50].repeat_interleave(3, dim=0), branches)
        # the last layer of what is only stored attends to nothing
        assert len(attended) == 3 * config.depth - 1
    calls.clear()
    # with gradients it is what training computes
    native(ids, ids, reduction="mean").backward()
    assert not calls
