"""Causal attention with an optional sliding window: one function, several backends, one meaning.

Shapes: B batch, T queries, S keys (S >= T; the queries are the last T of the S positions), H query
heads, K key/value heads (H a multiple of K), D head dim."""

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UsageError
from nanochat.model.kernels import TRITON_HEAD_DIMS

BACKENDS = ("blocked", "native", "sdpa", "flex", "triton", "fa3", "fa4")
# Of these, the ones that keep a weight for every score until the backward pass.
KEEP_SCORES = ("blocked", "native")
# Queries that share one slice of keys in these: small blocks skip more of what is
# masked, large ones make larger products. Windows of at most SHORT_WINDOW take the small blocks.
# Measured in runs/LOG.md.
QUERY_BLOCK = 256
SHORT_QUERY_BLOCK = 128
SHORT_WINDOW = 256
# The first key of a slice is a multiple of this: products of 255 keys, whose rows begin anywhere in
# a cache line, take longer than those of 256 (runs/LOG.md).
KEY_ALIGNMENT = 32
# Below these, flex either cannot be compiled or takes torch's kernel for decoding, whose gradients
# are not deterministic.
FLEX_HEAD_DIM = 16
FLEX_QUERIES = 128
# For full context too, flex instead of SDPA. Set by nanochat/apps/doctor/gpu_checks.py alone.
FLEX_TAKES_FULL_CONTEXT = False
# The package that a backend needs, and how to get it.
PACKAGES = {
    "flex": ("triton", "pip install triton"),
    "triton": ("triton", "pip install triton"),
    "fa3": (
        "flash_attn_interface",
        "FlashAttention-3: its wheel for Hopper, or built from the folder hopper of its repository",
    ),
    "fa4": ("flash_attn.cute", "pip install flash-attn-4"),
}


# ---- choice ----


def pick_backend(
    requested: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    capability: tuple[int, int] | None = None,
    no_compiler: str | None = None,
    planned: bool = False,
) -> tuple[str, str]:
    """(backend, reason) for --attention. Raises UsageError for one that cannot run on the device.

    "auto" is native on a CPU where its C++ can be compiled, and blocked where it cannot. On a GPU
    of SM80 and later it is flex, which skips what a window hides and leaves full context to SDPA;
    on older ones, for which triton has no matrix instructions, sdpa. Our own Triton kernel is not
    chosen before it is measured.

    dtype, head_dim: of the model, where known. capability: (major, minor) of a GPU that is planned
    for; then packages need not be installed here. no_compiler: why nothing is compiled, or None.
    planned: compile nothing to find out what can be."""
    known = {
        "dtype": dtype,
        "head_dim": head_dim,
        "capability": capability,
        "no_compiler": no_compiler,
        "planned": planned,
    }
    if requested != "auto":
        problem = backend_problem(requested, device_type, **known)
        if problem:
            usable = " or ".join(usable_backends(device_type, **known))
            raise UsageError(f"--attention={requested}: {problem}; choose auto, {usable}")
        return requested, "as requested"
    if device_type == "cuda":
        problem = backend_problem("flex", device_type, **known)
        if problem:
            return "sdpa", (
                f"fused kernels for full context; windows cost as much or more: flex, which is "
                f"made for windows, {problem}"
            )
        return "flex", (
            "compiled for windows, skipping blocks that are fully masked; SDPA for full context "
            "(without cuDNN, which is not deterministic) and where nothing is compiled"
        )
    if device_type == "cpu":
        problem = backend_problem("native", device_type, **known)
        if problem:
            return "blocked", f"plain products over causal blocks; native {problem}"
        return "native", "causal blocks in C++, which skip masked keys"
    return "blocked", "work and memory grow with the window; SDPA is not measured here"


def usable_backends(device_type: str, **known: object) -> tuple[str, ...]:
    """Backends that run, forward and backward, on this machine's devices of a type.

    known: dtype, head_dim, capability, no_compiler, planned, as in pick_backend()."""
    return tuple(name for name in BACKENDS if not backend_problem(name, device_type, **known))


def backend_problem(
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    capability: tuple[int, int] | None = None,
    no_compiler: str | None = None,
    planned: bool = False,
) -> str | None:
    """Why a backend cannot run on a device, as the predicate of a sentence whose subject it is, or
    None. Arguments as in pick_backend()."""
    if backend in ("blocked", "sdpa"):
        return None
    if backend == "native":
        return _native_problem(device_type, dtype, no_compiler, planned)
    if backend == "triton" and head_dim not in (None, *TRITON_HEAD_DIMS):
        supported = ", ".join(map(str, TRITON_HEAD_DIMS))
        return f"has no kernel for a head dim of {head_dim} (it supports {supported})"
    if backend == "flex" and head_dim is not None and head_dim < FLEX_HEAD_DIM:
        return f"needs a head dim of at least {FLEX_HEAD_DIM}, not {head_dim}"
    package, source = PACKAGES[backend]
    needed_here = capability is None and (device_type == "cuda" or backend == "triton")
    missing = needed_here and not _installed(package)
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and interpreted and not missing:
        # for tests
        return None
    if device_type != "cuda":
        return f"runs on NVIDIA GPUs, and this device is {device_type}"
    if missing:
        return f"needs the package {package}, which is not installed ({source})"
    if backend == "flex" and no_compiler:
        return f"computes all scores when it is not compiled ({no_compiler})"
    capability = capability or torch.cuda.get_device_capability()
    return _gpu_problem(backend, dtype, *capability)


def _native_problem(
    device_type: str, dtype: torch.dtype | None, no_compiler: str | None, planned: bool
) -> str | None:
    from nanochat.model.kernels import cpu_reading, cpu_training

    if device_type != "cpu":
        return f"runs on CPUs, and this device is {device_type}"
    if dtype not in (None, *cpu_training.DTYPES):
        return f"takes float32 and bfloat16, not {dtype}"
    if no_compiler:
        return f"is C++, and nothing is compiled here ({no_compiler})"
    problem = cpu_training.problem(planned)
    if not planned:
        problem = problem or cpu_reading.problem()
    if problem:
        return f"cannot be used: {problem}"
    return None


def _gpu_problem(backend: str, dtype: torch.dtype | None, major: int, minor: int) -> str | None:
    this_gpu = f"this GPU is SM{major}{minor}"
    if backend == "fa3" and major != 9:
        return f"is made for Hopper (SM90), and {this_gpu}"
    if backend == "fa4" and major != 10:
        return (
            f"is deterministic and has windows in its backward pass on Blackwell only (SM100), and "
            f"{this_gpu}"
        )
    if backend in ("fa3", "fa4") and dtype == torch.float32:
        return "takes bfloat16 and float16, not float32"
    if major < 8:
        return (
            f"would multiply without matrix instructions, which triton has from SM80 on, and "
            f"{this_gpu}"
        )
    return None


def check_flash_attention(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError if the installed FlashAttention-3 or 4 is not deterministic here, or wrong.

    Builds of some months of 2025 ignored the request for determinism, or counted wrongly with a
    window (Dao-AILab/flash-attention, issues 1766 and 1870). Takes a tenth of a second."""
    shape, window = (2, 512, 2, 128), 256
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    q, k, v = (x.requires_grad_() for x in drawn[:3])

    def gradients(name: str) -> list[Tensor]:
        out = attention(q, k, v, window, name)
        return [out, *torch.autograd.grad(out, (q, k, v), drawn[3])]

    first, again, exact = gradients(backend), gradients(backend), gradients("sdpa")
    problem = ""
    if not all(map(torch.equal, first, again)):
        problem = "does not give the same gradients twice"
    # ten times the error of bf16
    elif not all(_is_near(a, b, 0.04) for a, b in zip(first, exact, strict=True)):
        problem = "computes something else than SDPA with a window"
    if problem:
        package, _ = PACKAGES[backend]
        raise UsageError(
            f"--attention={backend}: the installed {package} {problem}; install a newer one, or "
            f"choose auto"
        )


def _is_near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    difference = (a.float() - b.float()).norm()
    return bool(difference <= tolerance * b.float().norm())


def _installed(package: str) -> bool:
    """Whether a package can be imported, without importing it.

    For "a.b", find_spec() imports a: if that fails, b is unusable too."""
    outer, _, inner = package.partition(".")
    try:
        if importlib.util.find_spec(outer) is None:
            return False
        return not inner or importlib.util.find_spec(package) is not None
    except (ImportError, OSError):
        return False


# ---- attention ----


def attention(
    q_BxTxHxD: Tensor, k_BxSxKxD: Tensor, v_BxSxKxD: Tensor, window: int, backend: str
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where query t sees itself and the window - 1 positions before it.

    window: number of visible keys, itself included; S or more is full causal context. backend: one
    that pick_backend() returned. Returns (B, T, H, D) in q's dtype; the softmax is in fp32 for
    every backend. Raises ValueError for an unknown backend or a window below 1."""
    if backend not in BACKENDS or window < 1:
        raise ValueError(
            f"attention backend {backend!r} (one of {BACKENDS}) with a window of {window} (at "
            f"least 1)"
        )
    if backend == "triton":
        from nanochat.model.kernels.flash_attention import flash_attention

        return flash_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    if backend in ("fa3", "fa4"):
        return _flash_attention_package(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window, backend)
    # Uncompiled, FlexAttention computes all scores in fp32: evaluation, sampling and the search for
    # faults, which run uncompiled, take SDPA with a mask instead.
    windowed = window < k_BxSxKxD.size(1) or FLEX_TAKES_FULL_CONTEXT
    long_enough = q_BxTxHxD.size(1) >= FLEX_QUERIES
    if backend == "flex" and windowed and long_enough and torch.compiler.is_compiling():
        from nanochat.model.kernels.flex_attention import windowed_attention

        return windowed_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    if backend == "native":
        from nanochat.model.kernels import cpu_reading, cpu_training

        before = k_BxSxKxD.size(1) - q_BxTxHxD.size(1)
        if torch.is_grad_enabled() and not before:
            return cpu_training.attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
        if cpu_reading.takes(q_BxTxHxD):
            cut = [x.tensor_split((before,), dim=1) for x in (k_BxSxKxD, v_BxSxKxD)]
            beginnings, own = zip(*cut, strict=True)
            lengths = [before] * len(q_BxTxHxD)
            return cpu_reading.attend(q_BxTxHxD, *own, window, beginnings, lengths)
    if backend in ("sdpa", "flex"):
        return _sdpa(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    return _blocked(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)


def visible(
    T: int,
    S: int,
    window: int,
    device: torch.device,
    first_query: int = 0,
    first_key: int = 0,
    n_query: int | None = None,
    n_key: int | None = None,
) -> Tensor:
    """Boolean (n_query, n_key) mask of a rectangle of the T x S scores: True where the query sees
    the key. By default the whole matrix."""
    # any window of S keys shows all, and a larger one might not fit into 32 bits
    window = min(window, S)
    # compiled for a CPU, comparisons of 64-bit numbers take several times as long
    queries = torch.arange(
        first_query, first_query + (n_query or T), device=device, dtype=torch.int32
    )
    keys = torch.arange(first_key, first_key + (n_key or S), device=device, dtype=torch.int32)
    # the queries are the last T of the S positions
    query = queries[:, None] + (S - T)
    key = keys[None, :]
    return (key <= query) & (key > query - window)


def blocks_of_scores(T: int, S: int, window: int) -> list[tuple[int, int, int, int]]:
    """Rectangles of scores that the blocked path computes: (first query, last + 1, first key,
    last + 1) of each."""
    size = QUERY_BLOCK if window > SHORT_WINDOW else SHORT_QUERY_BLOCK
    blocks = []
    for first_query in range(0, T, size):
        end_query = min(first_query + size, T)
        first_key = max(0, S - T + first_query - window + 1)
        first_key -= first_key % KEY_ALIGNMENT
        blocks.append((first_query, end_query, first_key, S - T + end_query))
    return blocks


def visited_keys(T: int, window: int) -> float:
    """Scores that the blocked path computes per query, on average over a row of T tokens."""
    blocks = blocks_of_scores(T, T, window)
    return sum((t1 - t0) * (s1 - s0) for t0, t1, s0, s1 in blocks) / T


def _sdpa(q_BxTxHxD: Tensor, k_BxSxKxD: Tensor, v_BxSxKxD: Tensor, window: int) -> Tensor:
    T = q_BxTxHxD.size(1)
    S = k_BxSxKxD.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q_BxTxHxD, k_BxSxKxD, v_BxSxKxD))
    # Without a mask SDPA takes its fused kernels. Its is_causal aligns the first query with the
    # first key, which is right only for T == S.
    full = window >= S and T == S
    # One mask for all batches and heads.
    mask = None if full else visible(T, S, window, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=full, enable_gqa=q.size(1) != k.size(1)
    )
    return out.transpose(1, 2)


def _flash_attention_package(q: Tensor, k: Tensor, v: Tensor, window: int, backend: str) -> Tensor:
    """FlashAttention-3 (arXiv 2407.08608) or 4.

    Like ours, their causal mask ends at the last key where there are more keys than queries."""
    # keys before the query's own position and after it
    sides = (window - 1, 0)
    if backend == "fa3":
        from flash_attn_interface import flash_attn_func

        no_limit = -1
    else:
        from flash_attn.cute import flash_attn_func

        no_limit = None
    if window >= k.size(1):
        sides = (no_limit, no_limit)
    out = flash_attn_func(
        q,
        k,
        v,
        causal=True,
        window_size=sides,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # some versions also return the log-sum-exp
    return out[0] if isinstance(out, tuple) else out


class _Softmax(torch.autograd.Function):
    """softmax(scale * scores) of the visible scores, in fp32.

    It stores only its result, in the dtype of the scores. Autograd's own formula would also store
    the fp32 softmax and the mask, four times the memory in bf16."""

    @staticmethod
    def forward(ctx, scores: Tensor, seen: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        scaled = (scores.float() * scale).masked_fill(~seen, float("-inf"))
        weights = scaled.softmax(-1).to(scores.dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        dtype = upstream.dtype
        upstream = upstream.float()
        weights = ctx.saved_tensors[0].float()
        mean = (weights * upstream).sum(-1, keepdim=True)
        return (weights * (upstream - mean) * ctx.scale).to(dtype), None, None


@functools.lru_cache(maxsize=8)
def _bias(
    n_query: int,
    n_key: int,
    offset: int,
    window: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What is added to the scores of a rectangle: 0 or -inf, (group * n_query, n_key).

    offset: keys from the rectangle's first to the first query's own. group: query heads that are
    stacked along the rows. Cached: most rectangles of a pass are alike, and those of its layers."""
    seen = visible(n_key - offset, n_key, window, device, n_query=n_query)
    bias = torch.zeros(seen.shape, dtype=dtype, device=device)
    return bias.masked_fill_(~seen, float("-inf")).repeat(group, 1)


def _blocked(q_BxTxHxD: Tensor, k_BxSxKxD: Tensor, v_BxSxKxD: Tensor, window: int) -> Tensor:
    """Each block of queries meets only the keys that some query of it can see: time and memory grow
    with T x window."""
    B, T, H, D = q_BxTxHxD.shape
    S, K = k_BxSxKxD.size(1), k_BxSxKxD.size(2)
    group = H // K
    # One matrix per (batch, key/value head); the query heads of a group are stacked along the rows.
    q_BxKxGxTxD = q_BxTxHxD.view(B, T, K, group, D).permute(0, 2, 3, 1, 4)
    k_BxKxSxD = k_BxSxKxD.permute(0, 2, 1, 3)
    v_BxKxSxD = v_BxSxKxD.permute(0, 2, 1, 3)
    blocks = []
    for t0, t1, s0, s1 in blocks_of_scores(T, S, window):
        rows = q_BxKxGxTxD[:, :, :, t0:t1].reshape(B * K, group * (t1 - t0), D)
        keys = k_BxKxSxD[:, :, s0:s1].reshape(B * K, s1 - s0, D)
        values = v_BxKxSxD[:, :, s0:s1].reshape(B * K, s1 - s0, D)
        if torch.is_grad_enabled():
            scores = (rows @ keys.transpose(1, 2)).view(B * K, group, t1 - t0, s1 - s0)
            seen = visible(T, S, window, rows.device, t0, s0, t1 - t0, s1 - s0)
            weights = _Softmax.apply(scores, seen, D**-0.5).view(B * K, group * (t1 - t0), s1 - s0)
        else:
            # A third of the passes over the scores. torch's softmax computes in fp32 whatever the
            # dtypes of its input and output.
            offset = S - T + t0 - s0
            bias = _bias(t1 - t0, s1 - s0, offset, window, group, rows.dtype, rows.device)
            weights = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=D**-0.5).softmax(-1)
        out = weights @ values
        blocks.append(out.view(B, K, group, t1 - t0, D))
    # Back to the caller's order; the query heads of a group are adjacent again.
    return torch.cat(blocks, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def branched_attention(
    q_RxTxHxD: Tensor,
    k_RxTxKxD: Tensor,
    v_RxTxKxD: Tensor,
    k_BxSxKxD: Tensor,
    v_BxSxKxD: Tensor,
    lengths: list[int],
    window: int,
    backend: str,
) -> Tensor:
    """attention() of rows that continue shared beginnings: row r sees beginning r // (R / B), then
    its own T keys.

    lengths: positions of each of the B beginnings, at most S; keys and values past them are
    ignored. The keys of a beginning are read once for all rows that continue it. For short rows,
    whose scores are not cut into blocks, and without gradients. backend: only native makes a
    difference. Returns (R, T, H, D) in q's dtype."""
    if backend == "native":
        from nanochat.model.kernels import cpu_reading

        if cpu_reading.takes(q_RxTxHxD):
            beginnings = k_BxSxKxD, v_BxSxKxD
            return cpu_reading.attend(q_RxTxHxD, k_RxTxKxD, v_RxTxKxD, window, beginnings, lengths)
    R, T, H, D = q_RxTxHxD.shape
    B, S, K, _ = k_BxSxKxD.shape
    n = R // B
    group = H // K
    # No query sees a key of a beginning before this one.
    first = max(0, min(lengths) - window + 1)
    before = S - first
    trunk_keys, trunk_values = (
        x[:, first:].permute(0, 2, 1, 3).reshape(B * K, before, D) for x in (k_BxSxKxD, v_BxSxKxD)
    )
    own_keys, own_values = (
        x.view(B, n, T, K, D).permute(0, 3, 1, 2, 4).reshape(B * K * n, T, D)
        for x in (k_RxTxKxD, v_RxTxKxD)
    )
    rows = q_RxTxHxD.view(B, n, T, K, group, D).permute(0, 3, 1, 4, 2, 5)
    rows = rows.reshape(B * K, n * group * T, D)
    own_rows = rows.reshape(B * K * n, group * T, D)
    # baddbmm with beta=0 ignores its first argument; it scales the product without another pass
    nothing = rows.new_zeros(())
    scale = D**-0.5
    of_trunk = torch.baddbmm(nothing, rows, trunk_keys.transpose(1, 2), beta=0, alpha=scale)
    own = torch.baddbmm(nothing, own_rows, own_keys.transpose(1, 2), beta=0, alpha=scale)
    scores = torch.cat((of_trunk, own.view(B * K, n * group * T, T)), dim=-1)
    seen = _visible_to_branches(T, S, first, lengths, window, q_RxTxHxD.device)
    scores.view(B, K * n * group, T, before + T).masked_fill_(~seen[:, None], float("-inf"))
    # One softmax over both parts: a row sees its beginning and itself as one sequence.
    weights = scores.softmax(-1)
    out = weights[..., before:].reshape(B * K * n, group * T, T) @ own_values
    out = torch.baddbmm(out.view(B * K, n * group * T, D), weights[..., :before], trunk_values)
    return out.view(B, K, n, group, T, D).permute(0, 2, 4, 1, 3, 5).reshape(R, T, H, D)


def _visible_to_branches(
    T: int, S: int, first: int, lengths: list[int], window: int, device: torch.device
) -> Tensor:
    """Boolean (B, T, S - first + T): which keys of a beginning, then which of its own, a row sees.

    first: key of the beginnings at which the scores start."""
    length = torch.tensor(lengths, device=device)[:, None, None]
    query = torch.arange(T, device=device)[:, None]
    key = torch.arange(first, S, device=device)
    of_trunk = (key < length) & (key > length + query - window)
    own = visible(T, T, window, device).expand(len(lengths), T, T)
    return torch.cat((of_trunk, own), dim=-1)
