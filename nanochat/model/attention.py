"""Causal attention with an optional sliding window: one public function, several backends with the same meaning.

Shapes: B batch, T queries, S keys (S >= T; the queries are the last T of the S positions), H query heads, K key/value
heads (H a multiple of K), D head dim."""

import functools
import importlib.util
import os

import torch
import torch.nn.functional as F

from nanochat.common import UsageError

BACKENDS = ("blocked", "sdpa", "flex", "triton", "fa3", "fa4")
# Queries that share one slice of keys in the blocked path: small blocks skip more of what is masked, large ones make larger
# products. Measured in runs/LOG.md.
QUERY_BLOCK, SHORT_QUERY_BLOCK, SHORT_WINDOW = 256, 128, 256
TRITON_HEAD_DIMS = (16, 32, 64, 128)  # of our kernel
# What backends need: a package, and where it comes from.
PACKAGES = {
    "flex": ("triton", "pip install triton"),
    "triton": ("triton", "pip install triton"),
    "fa3": (
        "flash_attn_interface",
        "it comes with FlashAttention-3, built from the folder hopper of its repository",
    ),
    "fa4": ("flash_attn.cute", "pip install flash-attn-4"),
}


def pick_backend(
    requested, device_type, dtype=None, head_dim=None, capability=None, no_compiler=None
):
    """(backend, reason) for --attention. Raises UsageError for one that cannot run there.

    'auto' means: blocked on a CPU; on a GPU of SM80 and later flex, which skips what a window hides and leaves full context to SDPA;
    sdpa on older ones, for which triton has no matrix instructions. The kernel of our own is not chosen before it is measured.
    dtype, head_dim: of the model, where known. capability: (major, minor) of a GPU that is planned for, where what is installed
    here does not matter. no_compiler: why nothing is compiled, or None."""
    known = {
        "dtype": dtype,
        "head_dim": head_dim,
        "capability": capability,
        "no_compiler": no_compiler,
    }
    if requested != "auto":
        if problem := _problem(requested, device_type, **known):
            raise UsageError(
                f"--attention={requested}: {problem}; choose auto, {' or '.join(usable_backends(device_type, **known))}"
            )
        return requested, "as requested"
    if device_type == "cuda":
        if problem := _problem("flex", device_type, **known):
            return (
                "sdpa",
                f"fused kernels for full context; windows cost as much, or more: flex, made for them, {problem}",
            )
        return (
            "flex",
            "compiled for windows, whose hidden blocks it skips; SDPA for full context (without cuDNN, which is not "
            "deterministic), and where nothing is compiled",
        )
    if device_type == "cpu":
        return "blocked", "plain products over causal blocks skip masked keys and beat SDPA on CPUs"
    return "blocked", "work and memory grow with the window; SDPA is not measured here"


def usable_backends(device_type, **known):
    """The names of those that run, forward and backward, on this machine's devices of that type. known: as for pick_backend()."""
    return tuple(name for name in BACKENDS if not _problem(name, device_type, **known))


def _problem(backend, device_type, dtype=None, head_dim=None, capability=None, no_compiler=None):
    """Why a backend cannot run on a device, as the rest of a sentence, or None. Arguments as in pick_backend()."""
    if backend in ("blocked", "sdpa"):
        return None
    if backend == "triton" and head_dim not in (None, *TRITON_HEAD_DIMS):
        return f"has no kernel for a head dim of {head_dim} (there are {', '.join(map(str, TRITON_HEAD_DIMS))})"
    package, source = PACKAGES[backend]
    missing = (
        capability is None
        and (device_type == "cuda" or backend == "triton")
        and not _installed(package)
    )
    if (
        backend == "triton"
        and device_type == "cpu"
        and os.environ.get("TRITON_INTERPRET") == "1"
        and not missing
    ):
        return None  # runs in Triton's interpreter, for tests
    if device_type != "cuda":
        return f"runs on NVIDIA GPUs, and this device is {device_type}"
    if missing:
        return f"needs the package {package}, which is not installed ({source})"
    if backend == "flex" and no_compiler:
        return f"makes all scores unless it is compiled ({no_compiler})"
    major, minor = capability or torch.cuda.get_device_capability()
    if backend == "fa3" and major != 9:
        return f"is made for Hopper (SM90), and this GPU is SM{major}{minor}"
    if backend == "fa4" and major != 10:
        return f"is deterministic and has windows in its backward pass on Blackwell only (SM100), and this GPU is SM{major}{minor}"
    if backend in ("fa3", "fa4") and dtype == torch.float32:
        return "takes bfloat16 and float16, not float32"
    if major < 8:
        return f"would multiply without matrix instructions, which triton has from SM80 on, and this GPU is SM{major}{minor}"
    return None


def _installed(package):
    """Whether a package is there. One that holds another is imported for that; if it cannot be, the other is as good as missing."""
    outer, _, inner = package.partition(".")
    try:
        return importlib.util.find_spec(outer) is not None and (
            not inner or importlib.util.find_spec(package) is not None
        )
    except (ImportError, OSError):
        return False


def attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window, backend):
    """softmax(q k^T / sqrt(D)) v, where query t sees itself and the window - 1 positions before it.

    window: number of visible keys, itself included; anything >= S is full causal context. backend: as pick_backend() gives it.
    Returns (B, T, H, D) in q's dtype. Softmax is in fp32 for every backend."""
    if backend not in BACKENDS or window < 1:
        raise ValueError(
            f"attention backend {backend!r} (there are {BACKENDS}) with a window of {window} (1 or more)"
        )
    if backend == "triton":
        from nanochat.model.kernels.flash_attention import flash_attention

        return flash_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    if backend in ("fa3", "fa4"):
        return _flash_attention_package(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window, backend)
    # uncompiled, FlexAttention would make all scores, in fp32: what evaluates, samples or looks for a fault takes SDPA with a mask
    if backend == "flex" and window < k_BxSxKxD.size(1) and torch.compiler.is_compiling():
        from nanochat.model.kernels.flex_attention import windowed_attention

        return windowed_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    if backend in ("sdpa", "flex"):
        return _sdpa(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    return _blocked(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)


def visible(T, S, window, device, first_query=0, first_key=0, n_query=None, n_key=None):
    """Boolean (n_query, n_key) mask of a rectangle of the T x S score matrix: True where the query sees the key."""
    query = torch.arange(first_query, first_query + (n_query or T), device=device)[:, None] + (
        S - T
    )
    key = torch.arange(first_key, first_key + (n_key or S), device=device)[None, :]
    return (key <= query) & (key > query - window)


def _blocks(T, S, window):
    """(first query, last + 1, first key, last + 1) of the rectangles of scores that the blocked path computes."""
    size = QUERY_BLOCK if window > SHORT_WINDOW else SHORT_QUERY_BLOCK
    return [
        (t0, min(t0 + size, T), max(0, S - T + t0 - window + 1), S - T + min(t0 + size, T))
        for t0 in range(0, T, size)
    ]


def visited_keys(T, window):
    """Scores that the blocked path computes per query, on average over a row of T tokens."""
    return sum((t1 - t0) * (s1 - s0) for t0, t1, s0, s1 in _blocks(T, T, window)) / T


def _sdpa(q, k, v, window):
    T, S = q.size(1), k.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    full = window >= S and T == S
    mask = None if full else visible(T, S, window, q.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=full, enable_gqa=q.size(1) != k.size(1)
    )
    return out.transpose(1, 2)


def _flash_attention_package(q, k, v, window, backend):
    """FlashAttention-3 (arXiv 2407.08608) or 4. Their causal mask too ends at the last key where there are more keys than queries."""
    if backend == "fa3":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn.cute import flash_attn_func
    # keys before itself and after; all of them are -1 in one and None in the other
    sides = (
        (window - 1, 0) if window < k.size(1) else (-1, -1) if backend == "fa3" else (None, None)
    )
    out = flash_attn_func(
        q,
        k,
        v,
        causal=True,
        window_size=sides,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out[0] if isinstance(out, tuple) else out  # some versions also return the log-sum-exp


class _Softmax(torch.autograd.Function):
    """softmax(scale * scores) of the visible scores, in fp32. Keeps nothing but its result, in the dtype of the scores: left to
    autograd, the scores' own softmax in fp32 and the mask would be kept too, four times the memory in bf16."""

    @staticmethod
    def forward(ctx, scores, seen, scale):
        ctx.scale = scale
        weights = (
            (scores.float() * scale).masked_fill(~seen, float("-inf")).softmax(-1).to(scores.dtype)
        )
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, upstream):
        dtype, upstream = upstream.dtype, upstream.float()
        weights = ctx.saved_tensors[0].float()
        mean = (weights * upstream).sum(-1, keepdim=True)
        return (weights * (upstream - mean) * ctx.scale).to(dtype), None, None


@functools.lru_cache(maxsize=8)
def _bias(n_query, n_key, offset, window, group, dtype, device):
    """What is added to the scores of a rectangle whose first query is `offset` keys after its first key: 0 or -inf; group times,
    (group * n_query, n_key). Most rectangles of a pass are alike, and those of its layers."""
    seen = visible(n_key - offset, n_key, window, device, n_query=n_query)
    return (
        torch.zeros(seen.shape, dtype=dtype, device=device)
        .masked_fill_(~seen, float("-inf"))
        .repeat(group, 1)
    )


def _blocked(q, k, v, window):
    """Each block of queries meets only the keys that some query of it can see: time and memory grow with T x window."""
    B, T, H, D = q.shape
    S, K = k.size(1), k.size(2)
    group = H // K
    # one matrix per (batch, key/value head); the query heads of a group are stacked along the rows
    q = q.view(B, T, K, group, D).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    blocks = []
    for t0, t1, s0, s1 in _blocks(T, S, window):
        rows = q[:, :, :, t0:t1].reshape(B * K, group * (t1 - t0), D)
        keys, values = (x[:, :, s0:s1].reshape(B * K, s1 - s0, D) for x in (k, v))
        if torch.is_grad_enabled():
            scores = (rows @ keys.transpose(1, 2)).view(B * K, group, t1 - t0, s1 - s0)
            seen = visible(T, S, window, q.device, t0, s0, t1 - t0, s1 - s0)
            weights = _Softmax.apply(scores, seen, D**-0.5).view(B * K, group * (t1 - t0), s1 - s0)
        else:  # a third of the passes over the scores; torch's softmax computes in fp32 whatever the dtype of its ends
            bias = _bias(t1 - t0, s1 - s0, S - T + t0 - s0, window, group, q.dtype, q.device)
            weights = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=D**-0.5).softmax(-1)
        out = weights @ values
        blocks.append(out.view(B, K, group, t1 - t0, D))
    return torch.cat(blocks, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def branched_attention(q_RxTxHxD, k_RxTxKxD, v_RxTxKxD, k_BxSxKxD, v_BxSxKxD, lengths, window):
    """attention() of rows that continue shared beginnings: row r sees beginning r // (R / B), then its own T keys.

    lengths: positions of each of the B beginnings, ints of at most S; what lies behind them is not looked at. The keys of a
    beginning are read once for all rows that continue it. Meant for short rows, whose scores it does not cut into blocks, and
    without gradients. Returns (R, T, H, D) in q's dtype."""
    (R, T, H, D), (B, S, K, _) = q_RxTxHxD.shape, k_BxSxKxD.shape
    n, group, device = R // B, H // K, q_RxTxHxD.device
    first = max(0, min(lengths) - window + 1)  # of the keys that any query sees
    before = S - first
    trunk_keys, trunk_values = (
        x[:, first:].permute(0, 2, 1, 3).reshape(B * K, before, D) for x in (k_BxSxKxD, v_BxSxKxD)
    )
    own_keys, own_values = (
        x.view(B, n, T, K, D).permute(0, 3, 1, 2, 4).reshape(B * K * n, T, D)
        for x in (k_RxTxKxD, v_RxTxKxD)
    )
    rows = (
        q_RxTxHxD.view(B, n, T, K, group, D)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(B * K, n * group * T, D)
    )
    nothing = rows.new_zeros(())
    of_trunk = torch.baddbmm(nothing, rows, trunk_keys.transpose(1, 2), beta=0, alpha=D**-0.5)
    own = torch.baddbmm(
        nothing,
        rows.reshape(B * K * n, group * T, D),
        own_keys.transpose(1, 2),
        beta=0,
        alpha=D**-0.5,
    )
    scores = torch.cat((of_trunk, own.view(B * K, n * group * T, T)), dim=-1)
    length = torch.tensor(lengths, device=device)[:, None, None]
    query, key = torch.arange(T, device=device)[:, None], torch.arange(first, S, device=device)
    seen_of_trunk = (key < length) & (key > length + query - window)
    seen = torch.cat((seen_of_trunk, visible(T, T, window, device).expand(B, T, T)), dim=-1)
    scores.view(B, K * n * group, T, before + T).masked_fill_(~seen[:, None], float("-inf"))
    weights = scores.softmax(-1)
    out = weights[..., before:].reshape(B * K * n, group * T, T) @ own_values
    out = torch.baddbmm(out.view(B * K, n * group * T, D), weights[..., :before], trunk_values)
    return out.view(B, K, n, group, T, D).permute(0, 2, 4, 1, 3, 5).reshape(R, T, H, D)
