"""Attention backends against an explicit fp64 softmax over every pair of positions.

The Triton kernel is tested in tests/test_flash_attention.py."""

import functools
import importlib.util
import platform
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanochat import native
from nanochat.common import UsageError
from nanochat.model.attention import (
    BACKENDS,
    attention,
    blocks_of_scores,
    branched_attention,
    check_flash_attention,
    pick_backend,
    usable_backends,
    visited_keys,
)
from nanochat.model.kernels import cpu_reading, cpu_training
from nanochat.model.layers import dropout

ON_GPUS = tuple(name for name in BACKENDS if name != "native")
FULL = 10**6  # a window larger than any S used here

# T queries, S keys, window, H query heads, K key/value heads, D head dim
CASES = [
    (1, 1, FULL, 4, 4, 32),
    (1, 65, 31, 4, 1, 64),  # one new token after a cache
    (1, 600, FULL, 4, 1, 128),
    (63, 63, 63, 4, 1, 32),  # window == T: nothing is hidden but the future
    (63, 257, 31, 4, 4, 32),
    (65, 65, 1, 4, 1, 128),  # every query sees itself only
    (65, 600, 600, 4, 1, 64),
    (257, 257, FULL, 4, 1, 64),  # one query past the block of 256
    (257, 257, 31, 2, 2, 128),
    (200, 200, 33, 6, 2, 96),
    (257, 600, 1, 4, 1, 32),
    (600, 600, 31, 4, 1, 32),
    (600, 600, 600, 2, 2, 64),
    (600, 600, 257, 8, 2, 32),
    (64, 64, FULL, 2, 1, 32),  # whole chunks of 32
    (160, 160, 33, 6, 2, 96),
    (96, 96, 40, 2, 2, 256),
    # head dims without tiles
    (257, 257, 31, 4, 2, 24),
    (600, 600, 257, 4, 1, 16),
]


def needs(backend):
    if backend == "native" and (problem := cpu_training.problem()):
        pytest.skip(problem)


def inputs(T, S, H, K, D, seed=0):
    """q, k, v and an output gradient like those of a trained model with QK-norm: unit RMS, peaked
    scores.

    Positions belong to one of eight topics, so that scores of a few keys stand out by several
    units."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    topics = randn(8, D)
    topic_of = torch.randint(8, (S,), generator=generator)
    q = F.rms_norm(topics[topic_of[S - T :]][None, :, None] + 0.7 * randn(2, T, H, D), (D,))
    k = F.rms_norm(topics[topic_of][None, :, None] + 0.7 * randn(2, S, K, D), (D,))
    return q, k, 0.5 * randn(2, S, K, D), randn(2, T, H, D)


def reference(q, k, v, window):
    """Every score, one dense mask, key/value heads repeated; all in the dtype of the inputs."""
    T, S, D, group = q.size(1), k.size(1), q.size(3), q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    distance = (torch.arange(T) + (S - T))[:, None] - torch.arange(S)[None, :]
    hidden = (distance < 0) | (distance >= window)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def output_and_gradients(function, q, k, v, grad_out, dtype):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(grad_out.to(dtype))
    # without gradients the backends may take a shorter path
    with torch.no_grad():
        alone = function(*leaves)
    dq, dk, dv = (leaf.grad for leaf in leaves)
    return {"out": out.detach(), "alone": alone, "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("backend", ["blocked", "native", "sdpa"])
@pytest.mark.parametrize("T, S, window, H, K, D", CASES)
def test_equals_brute_force_forward_and_backward(backend, T, S, window, H, K, D):
    needs(backend)
    q, k, v, grad_out = inputs(T, S, H, K, D)
    exact = output_and_gradients(lambda *x: reference(*x, window), q, k, v, grad_out, torch.float64)
    ours = output_and_gradients(
        lambda *x: attention(*x, window, backend), q, k, v, grad_out, torch.float32
    )
    for name in exact:
        assert ours[name].shape == exact[name].shape and ours[name].dtype == torch.float32
        # dq and dk are exactly 0 where one key is visible
        scale = exact[name].abs().max().clamp_min(1.0)
        assert (ours[name] - exact[name]).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("backend", ["blocked", "native", "sdpa"])
@pytest.mark.parametrize(
    "T, S, window, H, K, D",
    [
        (257, 257, 31, 4, 1, 64),
        (257, 257, FULL, 4, 4, 128),
        (65, 257, FULL, 4, 1, 32),
        (160, 160, 33, 6, 2, 96),
    ],
)
def test_bf16_is_no_worse_than_plain_bf16(backend, T, S, window, H, K, D):
    """Three-way rule: the error against exact arithmetic on the same bf16 inputs is compared with
    that of plain PyTorch."""
    needs(backend)
    q, k, v, grad_out = (x.bfloat16() for x in inputs(T, S, H, K, D))
    exact = output_and_gradients(lambda *x: reference(*x, window), q, k, v, grad_out, torch.float64)
    plain = output_and_gradients(
        lambda *x: reference(*x, window), q, k, v, grad_out, torch.bfloat16
    )
    ours = output_and_gradients(
        lambda *x: attention(*x, window, backend), q, k, v, grad_out, torch.bfloat16
    )
    for name in exact:
        assert ours[name].dtype == torch.bfloat16
        for size in (lambda x: x.square().mean().sqrt(), lambda x: x.abs().max()):
            error, allowed = size(ours[name] - exact[name]), size(plain[name] - exact[name])
            assert error <= 1.5 * allowed + 1e-5, f"{name}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("backend", ["blocked", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("T", [1, 63, 65, 257])
@pytest.mark.parametrize("H, K, D", [(2, 2, 24), (4, 1, 64), (2, 2, 128), (4, 1, 128)])
def test_error_is_no_larger_than_that_of_plain_pytorch(backend, dtype, T, H, K, D):
    """At windows 1, 31 and T: errors of outputs and all gradients against fp64 are
    compared with those of plain PyTorch in the same dtype."""
    needs(backend)
    for window in sorted({1, min(31, T), T}):
        q, k, v, grad_out = (x.to(dtype) for x in inputs(T, T, H, K, D))
        plainly = functools.partial(reference, window=window)
        in_blocks = functools.partial(attention, window=window, backend=backend)
        exact = output_and_gradients(plainly, q, k, v, grad_out, torch.float64)
        plain = output_and_gradients(plainly, q, k, v, grad_out, dtype)
        ours = output_and_gradients(in_blocks, q, k, v, grad_out, dtype)
        for name in exact:
            error, allowed = ((x[name] - exact[name]).norm() for x in (ours, plain))
            assert error <= 1.5 * allowed + 1e-7 * exact[name].norm(), (
                f"{name}, window {window}: {error:.2e} against {allowed:.2e}"
            )


@pytest.mark.parametrize("missing", [["avx512f"], ["avx512f", "avx2"]], ids=["8", "4"])
def test_narrower_registers_give_the_same(missing, monkeypatch):
    """Eight and four numbers in a register, as AVX2, SSE and NEON have."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no x86 processor")
    flags = ("-fopenmp", "-O1", *(f"-mno-{name}" for name in missing))
    for module in (cpu_training, cpu_reading):
        library = module.declared(native.load(module.SOURCE, *flags))
        assert library.nanochat_has_tiles(False) and not library.nanochat_has_tiles(True)
        monkeypatch.setattr(module, "_library", lambda library=library: library)
    for case in ((70, 70, 33, 4, 2, 64), (70, 70, 33, 4, 2, 16), (9, 70, 33, 2, 2, 32)):
        test_equals_brute_force_forward_and_backward("native", *case)


def test_a_processor_without_amx_multiplies_pairs(monkeypatch):
    """The other products of tiles.h: AVX512-BF16's."""
    if not {"amx_bf16", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("no processor with both")
    flags = ("-fopenmp", "-mno-amx-bf16", "-mno-amx-tile", "-mno-amx-int8")
    modules = cpu_training, cpu_reading
    libraries = [module.declared(native.load(module.SOURCE, *flags)) for module in modules]
    assert all(library.nanochat_has_tiles(True) for library in libraries)
    shape, window = (130, 130, 4, 2, 64), 40
    leaves = [x.bfloat16() for x in inputs(*shape)]

    def ours():
        function = functools.partial(attention, window=window, backend="native")
        return output_and_gradients(function, *leaves, torch.bfloat16)

    with_amx = ours()
    for module, library in zip(modules, libraries, strict=True):
        monkeypatch.setattr(module, "_library", functools.partial(lambda found: found, library))
    for name, other in ours().items():
        torch.testing.assert_close(other, with_amx[name], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("D", [16, 64], ids=["products", "tiles"])
def test_compiled_code_calls_the_native_parts_as_they_are(D):
    """Attention and dropout by custom operators: outputs, gradients and draws as uncompiled."""
    needs("native")
    q, k, v, grad_out = inputs(70, 70, 4, 2, D)

    def thinned(*leaves):
        torch.manual_seed(1)
        return dropout(attention(*leaves, 31, "native"), 0.25, True)

    eager = output_and_gradients(thinned, q, k, v, grad_out, torch.float32)
    compiled = output_and_gradients(
        torch.compile(thinned, dynamic=False), q, k, v, grad_out, torch.float32
    )
    assert 0.2 < (eager["out"] == 0).float().mean() < 0.3
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_code_is_not_split_by_the_native_attention(dtype):
    """A window beyond 32 bits is full context."""
    needs("native")
    q, k, v, _ = (x.to(dtype) for x in inputs(40, 40, 2, 2, 64))
    window = 2**31 + 5
    whole = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = whole(q, k, v, window, "native")
    torch.testing.assert_close(out, attention(q, k, v, window, "native"))
    torch.testing.assert_close(out, attention(q, k, v, window, "blocked"), rtol=0.02, atol=0.02)


def test_native_attention_refuses_what_it_would_read_as_something_else():
    needs("native")
    q, k, v, _ = inputs(40, 40, 2, 2, 64)
    with pytest.raises(ValueError, match="the same everywhere"):
        attention(q, k, v.bfloat16(), 8, "native")


def test_blocked_keeps_little_for_the_backward_pass():
    """Per score only the weight, in the compute dtype; of keys and values what a block sees,
    once."""
    T, H, D, kept = 1024, 2, 64, 0

    def pack(tensor):
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept += tensor.untyped_storage().nbytes()
        return tensor

    for window in (FULL, 64):
        seen, kept = set(), 0
        q, k, v, _ = (x.bfloat16().requires_grad_() for x in inputs(T, T, H, H, D))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(q, k, v, window, "blocked")
        rows = q.size(0) * T * H
        keys = sum(s1 - s0 for _, _, s0, s1 in blocks_of_scores(T, T, window)) / T
        assert kept <= 2 * rows * (visited_keys(T, window) + (1 + 2 * keys) * D) * 1.01


def test_visited_keys():
    assert visited_keys(1, 1) == 1 and visited_keys(300, FULL) == (256 * 256 + 44 * 300) / 300
    assert visited_keys(1024, 64) == (128 * 128 + 7 * 128 * (128 + 64)) / 1024
    assert visited_keys(1024, 300) == (256 * 256 + 256 * 512 + 2 * 256 * (256 + 320)) / 1024


def test_blocked_work_grows_with_the_window_not_with_the_square():
    def flops(T, window):
        q, k, v, _ = inputs(T, T, 2, 1, 32)
        with FlopCounterMode(display=False) as counter:
            attention(q, k, v, window, "blocked")
        return counter.get_total_flops()

    assert flops(2048, 32) < 2.2 * flops(1024, 32)
    # blocks of 128 queries against 159 keys, where full context averages 1,152
    assert flops(2048, 32) < 0.15 * flops(2048, FULL)
    # and full context skips the blocks in the future: 1,152 of 2,048 keys on average
    dense = 2 * (2 * 2 * 2048 * 2048 * 32) * 2  # q k^T and weights v; 2 rows x 2 heads
    assert flops(2048, FULL) < 0.6 * dense


def test_flex_skips_the_mask_and_keeps_the_meaning(monkeypatch):
    """Traced, forward and backward, but not compiled to a kernel: torch refuses that on a CPU, so
    its check is removed here. One mask serves all graphs of a window; without a window, or
    uncompiled, there is none."""
    from torch.nn.attention import flex_attention as torchs

    from nanochat.model.kernels import flex_attention

    monkeypatch.setattr(torchs, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_masks", types.SimpleNamespace())
    for T, S, window, H, K, n_masks in [
        (200, 200, 100, 4, 2, 1),
        (200, 200, 100, 1, 1, 1),
        (128, 200, 9, 2, 1, 2),
        # too few queries for a kernel whose gradients are the same every time
        (127, 200, 9, 2, 1, 2),
        (200, 200, FULL, 2, 1, 2),
    ]:
        torch.compiler.reset()  # each has a graph of its own, and there is a limit
        *leaves, grad_out = (x.requires_grad_() for x in inputs(T, S, H, K, 32))
        exact = reference(*(x.double() for x in leaves), window)
        exact_grads = torch.autograd.grad(exact, leaves, grad_out.double())
        torch.testing.assert_close(
            attention(*leaves, window, "flex"), exact.float(), atol=2e-5, rtol=2e-5
        )
        out = torch.compile(
            functools.partial(attention, window=window, backend="flex"),
            backend="aot_eager",
            fullgraph=True,
            dynamic=False,
        )(*leaves)
        torch.testing.assert_close(out, exact.float(), atol=2e-5, rtol=2e-5)
        for grad, exact_grad in zip(
            torch.autograd.grad(out, leaves, grad_out), exact_grads, strict=True
        ):
            torch.testing.assert_close(grad, exact_grad, atol=5e-5, rtol=5e-5)
        assert len(vars(flex_attention._masks)) == n_masks


def test_flex_takes_small_tiles_where_shared_memory_is_small(monkeypatch):
    from nanochat.model.kernels import flex_attention

    for n_bytes, small in ((101_376, True), (166_912, False), (232_448, False)):
        properties = types.SimpleNamespace(shared_memory_per_block_optin=n_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        assert flex_attention._has_little_shared_memory(torch.device("cuda")) == small
    assert not flex_attention._has_little_shared_memory(torch.device("cpu"))


@pytest.mark.parametrize("backend, everything", [("fa3", -1), ("fa4", None)])
@pytest.mark.parametrize("also_lse", [False, True])
@pytest.mark.parametrize(
    "T, S, window",
    [(40, 40, FULL), (40, 40, 40), (40, 40, 39), (9, 40, 1), (9, 40, 7), (9, 40, FULL)],
)
def test_fa3_and_fa4_are_asked_for_the_same_window(
    monkeypatch, T, S, window, also_lse, backend, everything
):
    """Against a stand-in with the meaning of these packages: a query sees keys from `left` before
    to `right` after it, aligned at the end."""

    def flash_attn_func(q, k, v, causal, window_size, deterministic):
        assert causal and deterministic
        left, right = (S if side == everything else side for side in window_size)
        distance = (torch.arange(T) + S - T)[:, None] - torch.arange(S)[None, :]
        seen = (distance >= 0) & (distance <= left) & (-distance <= right)
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
        ).transpose(1, 2)
        return (out, None) if also_lse else out

    package = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    for name, module in (
        ("flash_attn_interface", package),
        ("flash_attn", types.SimpleNamespace(cute=package)),
        ("flash_attn.cute", package),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v, _ = inputs(T, S, 4, 2, 32)
    torch.testing.assert_close(
        attention(q, k, v, window, backend), reference(q, k, v, window), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("fault", ["", "the same gradients twice", "something else than SDPA"])
def test_an_installed_flash_attention_is_tried_first(monkeypatch, fault):
    calls = []

    def flash_attn_func(q, k, v, causal, window_size, deterministic):
        calls.append(window_size)
        window = window_size[0] + 1
        if fault.startswith("something"):
            window = q.size(1)
        noise = 1e-3 * len(calls) if fault.startswith("the same") else 0
        return attention(q, k, v, window, "sdpa") * (1 + noise)

    package = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    if not fault:
        check_flash_attention("fa3", torch.device("cpu"), torch.float32)
    else:
        with pytest.raises(UsageError, match=f"fa3: the installed flash_attn_interface .*{fault}"):
            check_flash_attention("fa3", torch.device("cpu"), torch.float32)
    assert calls == [(255, 0)] * 2


def test_backend_choice(monkeypatch):
    assert pick_backend("auto", "mps")[0] == "blocked"
    assert pick_backend("auto", "cpu", no_compiler="--no-compile")[0] == "blocked"
    if not cpu_training.problem():
        assert pick_backend("auto", "cpu")[0] == "native"
    with monkeypatch.context() as patch:
        patch.setattr(cpu_training, "problem", lambda planned: "no C++ compiler")
        backend, reason = pick_backend("auto", "cpu")
        assert backend == "blocked" and "no C++ compiler" in reason
        with pytest.raises(UsageError, match="--attention=native: cannot be .*no C.. compiler"):
            pick_backend("native", "cpu")
    assert (
        pick_backend("auto", "cuda", capability=(9, 0))[0]
        == pick_backend("auto", "cuda", capability=(8, 0))[0]
        == "flex"
    )
    assert pick_backend("auto", "cuda", capability=(7, 5))[0] == "sdpa"
    assert pick_backend("auto", "cuda", capability=(9, 0), no_compiler="--no-compile")[0] == "sdpa"
    for backend in ON_GPUS:
        capability = (10, 0) if backend == "fa4" else (9, 0)
        assert pick_backend(backend, "cuda", torch.bfloat16, 128, capability) == (
            backend,
            "as requested",
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for installed, auto, usable in [
        ({"triton"}, "flex", ("blocked", "sdpa", "flex", "triton")),
        ((), "sdpa", ("blocked", "sdpa")),
        (
            {"triton", "flash_attn_interface", "flash_attn", "flash_attn.cute"},
            "flex",
            ON_GPUS[:-1],
        ),
        ({"triton", "flash_attn"}, "flex", ("blocked", "sdpa", "flex", "triton")),
    ]:
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, found=installed: name in found or None
        )
        assert pick_backend("auto", "cuda")[0] == auto and usable_backends("cuda") == usable


@pytest.mark.parametrize(
    "backend, device_type, known, reason",
    [
        (
            "triton",
            "cpu",
            {},
            "on NVIDIA GPUs, and this device is cpu; choose auto, blocked or (native or )?sdpa",
        ),
        ("flex", "mps", {}, "this device is mps"),
        ("fa3", "cpu", {}, "this device is cpu"),
        ("fa3", "cuda", {"capability": (8, 0)}, "Hopper"),
        (
            "fa3",
            "cuda",
            {"capability": (9, 0), "dtype": torch.float32},
            "not float32; choose auto, blocked or sdpa or flex or triton",
        ),
        ("fa4", "cuda", {"capability": (9, 0)}, "on Blackwell only"),
        ("triton", "cuda", {"capability": (7, 5)}, "SM75"),
        ("triton", "cuda", {"capability": (9, 0), "head_dim": 96}, "head dim of 96"),
        ("flex", "cuda", {"capability": (9, 0), "no_compiler": "--no-compile"}, "--no-compile"),
        ("flex", "cuda", {"capability": (9, 0), "head_dim": 8}, "a head dim of at least 16, not 8"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(monkeypatch, backend, device_type, known, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=f"^--attention={backend}: .*{reason}"):
        pick_backend(backend, device_type, **known)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for backend, package in [
        ("triton", "triton"),
        ("flex", "triton"),
        ("fa3", "flash_attn_interface"),
        ("fa4", "flash_attn.cute"),
    ]:
        with pytest.raises(
            UsageError, match=f"needs the package {package}, which is not installed"
        ):
            pick_backend(backend, "cuda")


@pytest.mark.parametrize("backend", ["blocked", "native"])
@pytest.mark.parametrize(
    ("T", "lengths", "window", "heads"),
    [
        (1, [1], FULL, (4, 4, 32)),
        (9, [40, 17, 1], FULL, (4, 1, 64)),
        (9, [40, 17, 33], 20, (4, 2, 32)),
        (9, [300, 259], 5, (2, 2, 128)),  # later queries see nothing of the beginning
        (70, [65, 30], 64, (2, 1, 32)),
        (5, [12, 12], 1, (2, 1, 32)),
        (33, [64, 31, 32], FULL, (4, 2, 96)),
    ],
)
def test_rows_that_continue_beginnings(backend, T, lengths, window, heads):
    """Each row attends as if its beginning preceded it, whatever the cache holds past the end of
    the beginning; bf16 is as exact as attention()."""
    needs(backend)
    n = 3
    q, k, v, _ = inputs(max(lengths) + T, max(lengths) + T, *heads)
    q, k, v = (
        x[:1].repeat(len(lengths) * n, 1, 1, 1)
        + 0.3 * torch.randn(len(lengths) * n, 1, 1, 1, generator=torch.Generator().manual_seed(5))
        for x in (q, k, v)
    )
    trunks = [x[::n, : max(lengths)].clone() for x in (k, v)]
    own = [x[:, max(lengths) :] for x in (q, k, v)]
    for b, length in enumerate(lengths):
        for trunk in trunks:
            trunk[b, length:] = 1000.0  # what an unmasked key would add cannot be overlooked
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            cast = [x.to(dtype) for x in (*own, *trunks)]
            found = branched_attention(*cast, lengths, window, backend)
        for r in range(len(lengths) * n):
            b = r // n
            k_of_row, v_of_row = (
                torch.cat((trunk[b, : lengths[b]], x[r]))[None]
                for trunk, x in zip(trunks, own[1:], strict=True)
            )
            exact = reference(
                *(x.double() for x in (own[0][r : r + 1], k_of_row, v_of_row)), window
            )
            if dtype == torch.float64:
                torch.testing.assert_close(found[r : r + 1], exact)
            else:
                with torch.no_grad():
                    plain = attention(
                        *(x.to(dtype) for x in (own[0][r : r + 1], k_of_row, v_of_row)),
                        window,
                        "blocked",
                    )
                error, allowed = ((x.double() - exact).norm() for x in (found[r : r + 1], plain))
                assert error <= 1.5 * allowed + 1e-7
