"""Flash attention in Triton, forward and backward, without a matrix of scores in memory.

The plain version is nanochat.model.attention.attention().

Shapes: B batch, T queries, S keys (S >= T; the queries are the last T of the S positions), H query
heads, K key/value heads, D head dim. A query at position p sees the keys p - window + 1 to p.

The softmax is computed in passing (arXiv 2205.14135, 2307.08691): for each block of queries the
largest score so far, the sum of the weights relative to it, and the weighted sum of values, which
shrink when a larger score appears. The backward pass needs only the logarithm of the sum of
exponentials (lse), from which it recomputes any weight:

    P = exp(scale q k^T - lse)     dV = P^T dO     dS = P * (dO V^T - delta)
    dQ = scale dS K                dK = scale dS^T Q

with delta = rowsum(out * dO). One kernel computes dQ, a block of queries at a time, another dK and
dV, a block of keys at a time: one program sums each number in one order, so that the same inputs
give the same bits.

Blocks of scores that are fully masked are skipped; blocks that are fully visible need no mask.
Tiles are loaded through plain pointers, which take any strides and any T, and which Triton turns
into asynchronous copies on SM80 and later; descriptors (TMA) would require strides of 16 bytes and
an allocator on each launch.

TRITON_INTERPRET=1, set before triton is imported, runs this module on CPU tensors."""

import contextlib
import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.model.kernels import TRITON_HEAD_DIMS

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# exp2 and log2 are the hardware's instructions; exp and log would multiply by these anyway.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The score of a hidden key. Finite, so that a row whose keys in a block are all hidden needs no
# special case: it takes them at weight 1, and the first key that it sees, at the latest its own,
# multiplies the result of that by exp2(HIDDEN - score) = 0.
HIDDEN = tl.constexpr(-1.0e30)


class Tile(NamedTuple):
    """Shape of a block of scores, and how Triton runs the loop over such blocks."""

    queries: int
    keys: int
    warps: int
    stages: int


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PASSES = ("forward", "backward of keys", "backward of queries")
# Most shared memory that a program may have, by class of GPU (CUDA programming guide).
SHARED_BYTES = {
    "sm90": 227 * 1024,
    "sm80": 163 * 1024,
    "sm86": 99 * 1024,
}
# A tile for each of PASSES, by class of GPU and head dim (smaller ones: as 64), for 16-bit dtypes.
# Chosen by what the compiler reports, not by speed: shared memory suffices and few registers are
# spilled (tests/test_flash_attention.py compiles them all).
TILES = {
    ("sm90", 64): (Tile(128, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
    ("sm90", 128): (Tile(128, 128, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm80", 64): (Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm80", 128): (Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
    ("sm86", 64): (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    ("sm86", 128): (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)),
}
# For tests: fp32 is multiplied without matrix instructions.
FP32_TILES = (Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
INTERPRETER_TILES = (Tile(64, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 4, 1))


def gpu_class(capability: tuple[int, int]) -> str:
    """The key in TILES for a CUDA compute capability (major, minor)."""
    if capability[0] in (9, 10):
        return "sm90"
    if capability == (8, 0):
        return "sm80"
    # SM86, SM89 and SM120 have less shared memory.
    return "sm86"


@functools.cache
def tiles(
    head_dim: int, element_bytes: int, capability: tuple[int, int] | None
) -> tuple[Tile, Tile, Tile]:
    """The tiles of the three PASSES. capability: of the GPU, None in the interpreter."""
    if capability is None:
        return INTERPRETER_TILES
    if element_bytes == 4:
        return FP32_TILES
    return TILES[gpu_class(capability), max(head_dim, 64)]


def shared_bytes(which: str, tile: Tile, head_dim: int, element_bytes: int) -> int:
    """Upper bound on the shared memory of a program in one of PASSES: the tiles that stay, and
    those that are being loaded."""
    queries = tile.queries
    keys = tile.keys
    row_bytes = head_dim * element_bytes
    if which == "forward":
        return queries * row_bytes + tile.stages * 2 * keys * row_bytes
    if which == "backward of queries":
        return 2 * queries * row_bytes + tile.stages * 2 * keys * row_bytes
    # a row of queries comes with its lse and delta
    return 2 * keys * row_bytes + tile.stages * 2 * queries * (row_bytes + 4)


def candidates(
    which: str, head_dim: int, element_bytes: int, capability: tuple[int, int]
) -> list[Tile]:
    """Tiles worth measuring for one of PASSES on a GPU, the one in use first.

    forward() and backward() take them as arguments."""
    used = tiles(head_dim, element_bytes, capability)[PASSES.index(which)]
    limit = SHARED_BYTES[gpu_class(capability)]
    found = [used]
    for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        tile = Tile(*sizes)
        if tile != used and shared_bytes(which, tile, head_dim, element_bytes) <= limit:
            found.append(tile)
    return found


# ---- kernels ----

# Lengths are not specialised: one kernel serves them all.
_jit_kernel = triton.jit(do_not_specialize=["T", "S", "window"])


@triton.jit
def _dot(a, b, total):
    """total + a @ b in fp32."""
    # The interpreter silently multiplies bf16 by bf16 wrongly.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # "ieee": Triton would round fp32 operands to TF32 otherwise.
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _load(matrix, rows, n_rows, stride, D: tl.constexpr, CHECKED: tl.constexpr):
    """(rows, D) of a matrix whose rows are `stride` apart.

    CHECKED: rows from n_rows on are zeros; without it, all rows must exist."""
    at = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if CHECKED:
        return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(at)


@triton.jit
def _store(matrix, rows, n_rows, stride, values, D: tl.constexpr):
    at = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, values.to(matrix.dtype.element_ty), mask=rows[:, None] < n_rows)


@triton.jit
def _stretches(first, first_whole, end_whole, end, SIZE: tl.constexpr):
    """Four bounds that cut first..end into blocks with hidden pairs, blocks without any (from
    first_whole to end_whole), and again blocks with hidden pairs. All but the last are multiples of
    SIZE, none is below 0."""
    # Blocks start at multiples of SIZE: round the start of the first down, the end of the whole
    # ones down and their start up, so that what is not whole gets a mask.
    first = tl.maximum(first, 0) // SIZE * SIZE
    end_whole = tl.maximum(tl.minimum(end_whole, end), 0) // SIZE * SIZE
    first_whole = tl.minimum((tl.maximum(first_whole, 0) + SIZE - 1) // SIZE * SIZE, end_whole)
    return first, first_whole, end_whole, end


@triton.jit
def _keys_seen(position, S, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Bounds of the keys that QUERIES queries from `position` on see."""
    # Whole: seen by the last query, whose window starts last, and by the first, which ends first.
    first = position - window + 1
    first_whole = position + QUERIES - window
    end_whole = position + 1
    end = tl.minimum(position + QUERIES, S)
    return _stretches(first, first_whole, end_whole, end, KEYS)


@triton.jit
def _queries_seeing(key, offset, T, window, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Bounds of the queries that see KEYS keys from `key` on.

    offset: position of the first query."""
    first = key - offset
    first_whole = first + KEYS - 1
    end_whole = first + window
    end = tl.minimum(first + KEYS - 1 + window, T)
    return _stretches(first, first_whole, end_whole, end, QUERIES)


@triton.jit
def _visible(position, key, window):
    # 0 <= position - key < window in one comparison: as unsigned numbers, negative ones are large
    return (position - key).to(tl.uint32, bitcast=True) < window.to(tl.uint32)


@triton.jit
def _block_of_queries(T, n_head, n_kv_head, QUERIES: tl.constexpr):
    """(first query, head, its key/value head, batch) of this program."""
    n_blocks = tl.cdiv(T, QUERIES)
    # The longest blocks start first, so that the last to finish is a short one.
    first = (n_blocks - 1 - tl.program_id(0) % n_blocks) * QUERIES
    head = tl.program_id(0) // n_blocks % n_head
    kv_head = head // (n_head // n_kv_head)
    # int64: offsets of a large batch exceed 32 bits
    batch = (tl.program_id(0) // n_blocks // n_head).to(tl.int64)
    return first, head, kv_head, batch


@triton.jit
def _gather_values(
    total,
    weight_sum,
    peak,
    q,
    K,
    V,
    position,
    begin,
    end,
    S,
    window,
    scale,
    k_stride,
    v_stride,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(total, weight_sum, peak) after the keys begin..end as well: the weighted sum of values, the
    sum of the weights, and the largest score, which both are relative to.

    EDGE: some keys are hidden from some queries, or do not exist."""
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _load(K, key, S, k_stride, D, EDGE)
        # Unscaled: the scale, times LOG2E for exp2, is applied along with the subtraction.
        scores = _dot(q, k.T, None)
        if EDGE:
            scores = tl.where(_visible(position[:, None], key[None, :], window), scores, HIDDEN)
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        # All weights are relative to the largest score, so none exceeds 1.
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(peak - higher)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        v = _load(V, key, S, v_stride, D, EDGE)
        # Matrix instructions need operands of one dtype; the sum stays in fp32.
        total = _dot(weights.to(v.dtype), v, total * shrink[:, None])
        peak = higher
    return total, weight_sum, peak


@_jit_kernel
def _forward(
    Q,
    K,
    V,
    Out,
    Lse,
    T,
    S,
    window,
    scale,
    n_head,
    n_kv_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """out and lse of a block of queries of one head.

    Strides: of a batch, of a row (one position), of a head."""
    first, head, kv_head, batch = _block_of_queries(T, n_head, n_kv_head, QUERIES)
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    row = first + tl.arange(0, QUERIES)
    position = row + (S - T)
    q = _load(Q + batch * q_batch + head * q_head, row, T, q_row, D, True)
    scale *= LOG2E
    total = tl.zeros((QUERIES, D), tl.float32)
    weight_sum = tl.zeros((QUERIES,), tl.float32)
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    bounds = _keys_seen(first + (S - T), S, window, QUERIES, KEYS)
    # Unrolled: masked blocks, blocks that are fully visible, masked blocks.
    for i in tl.static_range(3):
        total, weight_sum, peak = _gather_values(
            total,
            weight_sum,
            peak,
            q,
            K,
            V,
            position,
            bounds[i],
            bounds[i + 1],
            S,
            window,
            scale,
            k_row,
            v_row,
            D,
            KEYS,
            i != 1,
        )
    out = Out + (batch * T * n_head + head) * D
    _store(out, row, T, n_head * D, total / weight_sum[:, None], D)
    lse = Lse + (batch * n_head + head) * T
    # From base 2 back to the natural logarithm.
    tl.store(lse + row, (peak + tl.log2(weight_sum)) * LN2, mask=row < T)


@triton.jit
def _gather_keys(
    total,
    q,
    g,
    lse,
    delta,
    K,
    V,
    position,
    begin,
    end,
    S,
    window,
    scale,
    k_stride,
    v_stride,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """total + dS K over the keys begin..end.

    EDGE: some keys are hidden from some queries, or do not exist."""
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _load(K, key, S, k_stride, D, EDGE)
        v = _load(V, key, S, v_stride, D, EDGE)
        weights = tl.exp2(_dot(q, k.T, None) * scale - lse[:, None])
        if EDGE:
            weights = tl.where(_visible(position[:, None], key[None, :], window), weights, 0.0)
        # The gradient of softmax: each weight times the distance of its gradient from their mean.
        of_scores = weights * (_dot(g, v.T, None) - delta[:, None])
        total = _dot(of_scores.to(k.dtype), k, total)
    return total


@_jit_kernel
def _backward_of_queries(
    Q,
    K,
    V,
    Out,
    GradOut,
    Lse,
    Delta,
    GradQ,
    T,
    S,
    window,
    scale,
    n_head,
    n_kv_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dQ and delta of a block of queries of one head."""
    first, head, kv_head, batch = _block_of_queries(T, n_head, n_kv_head, QUERIES)
    K += batch * k_batch + kv_head * k_head
    V += batch * v_batch + kv_head * v_head
    row = first + tl.arange(0, QUERIES)
    position = row + (S - T)
    q = _load(Q + batch * q_batch + head * q_head, row, T, q_row, D, True)
    g = _load(GradOut + batch * g_batch + head * g_head, row, T, g_row, D, True)
    out = _load(Out + (batch * T * n_head + head) * D, row, T, n_head * D, D, True)
    # Equal to the weighted mean of the weights' gradients, without the weights.
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), 1)
    in_lse = (batch * n_head + head) * T + row
    tl.store(Delta + in_lse, delta, mask=row < T)
    # Rows that do not exist get 0: they add nothing, since their q and dO are 0.
    lse = tl.load(Lse + in_lse, mask=row < T, other=0.0) * LOG2E
    total = tl.zeros((QUERIES, D), tl.float32)
    bounds = _keys_seen(first + (S - T), S, window, QUERIES, KEYS)
    for i in tl.static_range(3):
        total = _gather_keys(
            total,
            q,
            g,
            lse,
            delta,
            K,
            V,
            position,
            bounds[i],
            bounds[i + 1],
            S,
            window,
            scale * LOG2E,
            k_row,
            v_row,
            D,
            KEYS,
            i != 1,
        )
    _store(GradQ + (batch * T * n_head + head) * D, row, T, n_head * D, total * scale, D)


@triton.jit
def _gather_queries(
    grad_k,
    grad_v,
    k,
    v,
    Q,
    GradOut,
    Lse,
    Delta,
    key,
    begin,
    end,
    T,
    offset,
    window,
    scale,
    q_stride,
    g_stride,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(grad_k + dS^T Q, grad_v + P^T dO) over the queries begin..end.

    EDGE: some queries do not see some keys, or do not exist; the latter have q, dO, lse and delta 0
    and add nothing."""
    for start in range(begin, end, QUERIES):
        row = start + tl.arange(0, QUERIES)
        q = _load(Q, row, T, q_stride, D, EDGE)
        g = _load(GradOut, row, T, g_stride, D, EDGE)
        if EDGE:
            lse = tl.load(Lse + row, mask=row < T, other=0.0) * LOG2E
            delta = tl.load(Delta + row, mask=row < T, other=0.0)
        else:
            lse = tl.load(Lse + row) * LOG2E
            delta = tl.load(Delta + row)
        # (keys, queries): no product below then needs a transposed operand
        weights = tl.exp2(_dot(k, q.T, None) * scale - lse[None, :])
        if EDGE:
            seen = _visible((row + offset)[None, :], key[:, None], window)
            weights = tl.where(seen, weights, 0.0)
        grad_v = _dot(weights.to(g.dtype), g, grad_v)
        of_scores = weights * (_dot(v, g.T, None) - delta[None, :])
        grad_k = _dot(of_scores.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@_jit_kernel
def _backward_of_keys(
    Q,
    K,
    V,
    GradOut,
    Lse,
    Delta,
    GradK,
    GradV,
    T,
    S,
    window,
    scale,
    n_head,
    n_kv_head,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dK and dV of a block of keys of one key/value head, from all query heads of its group."""
    n_blocks = tl.cdiv(S, KEYS)
    # The longest blocks come first: the earliest keys are seen by the most queries.
    first = tl.program_id(0) % n_blocks * KEYS
    kv_head = tl.program_id(0) // n_blocks % n_kv_head
    batch = (tl.program_id(0) // n_blocks // n_kv_head).to(tl.int64)
    group = n_head // n_kv_head
    offset = S - T
    key = first + tl.arange(0, KEYS)
    k = _load(K + batch * k_batch + kv_head * k_head, key, S, k_row, D, True)
    v = _load(V + batch * v_batch + kv_head * v_head, key, S, v_row, D, True)
    grad_k = tl.zeros((KEYS, D), tl.float32)
    grad_v = tl.zeros((KEYS, D), tl.float32)
    bounds = _queries_seeing(first, offset, T, window, QUERIES, KEYS)
    # The query heads of a group share these keys. Adding them up here, in a fixed order, needs no
    # atomic additions, whose order varies.
    for head in range(kv_head * group, (kv_head + 1) * group):
        q = Q + batch * q_batch + head * q_head
        g = GradOut + batch * g_batch + head * g_head
        lse = Lse + (batch * n_head + head) * T
        delta = Delta + (batch * n_head + head) * T
        for i in tl.static_range(3):
            grad_k, grad_v = _gather_queries(
                grad_k,
                grad_v,
                k,
                v,
                q,
                g,
                lse,
                delta,
                key,
                bounds[i],
                bounds[i + 1],
                T,
                offset,
                window,
                scale * LOG2E,
                q_row,
                g_row,
                D,
                QUERIES,
                i != 1,
            )
    in_grad = (batch * S * n_kv_head + kv_head) * D
    _store(GradK + in_grad, key, S, n_kv_head * D, grad_k * scale, D)
    _store(GradV + in_grad, key, S, n_kv_head * D, grad_v, D)


# ---- launches ----


def _of_device(
    q: Tensor,
) -> tuple[contextlib.AbstractContextManager, tuple[int, int] | None]:
    """(context in which kernels run on q's device, its capability or None in the interpreter)."""
    if INTERPRETED.value:
        return contextlib.nullcontext(), None
    return torch.cuda.device(q.device), torch.cuda.get_device_capability(q.device)


def _common(q: Tensor, k: Tensor, window: int) -> tuple[int, int, int, float, int, int]:
    """The arguments that all kernels share, except strides."""
    _, T, H, D = q.shape
    _, S, K, _ = k.shape
    # At most S, so that a window without limit fits in 32 bits.
    return T, S, min(window, S), D**-0.5, H, K


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """The tensors with each head's D numbers adjacent in memory, as the kernels read them; copied
    only where they are not."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D) in q's dtype, log-sum-exp of the scaled scores (B, H, T) fp32).

    tile: in place of the one in tiles()."""
    B, T, H, D = q.shape
    context, capability = _of_device(q)
    tile = tile or tiles(D, q.element_size(), capability)[0]
    q, k, v = _rows_contiguous(q, k, v)
    # Contiguous whatever the inputs' strides: the kernels rely on it.
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    with context:
        _forward[(triton.cdiv(T, tile.queries) * B * H,)](
            q,
            k,
            v,
            out,
            lse,
            *_common(q, k, window),
            *_strides(q, k, v),
            D,
            tile.queries,
            tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    tile_of_keys: Tile | None = None,
    tile_of_queries: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of the inputs.

    out, lse: from forward(). tile_of_keys, tile_of_queries: in place of those in tiles()."""
    B, T, H, D = q.shape
    _, S, K, _ = k.shape
    context, capability = _of_device(q)
    _, usual_of_keys, usual_of_queries = tiles(D, q.element_size(), capability)
    of_keys = tile_of_keys or usual_of_keys
    of_queries = tile_of_queries or usual_of_queries
    grad_out, q, k, v = _rows_contiguous(grad_out, q, k, v)
    grad_q, grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    delta = torch.empty_like(lse)
    shared = (*_common(q, k, window), *_strides(q, k, v, grad_out), D)
    # dQ first: its kernel also computes delta, which the other one reads.
    with context:
        _backward_of_queries[(triton.cdiv(T, of_queries.queries) * B * H,)](
            q,
            k,
            v,
            out,
            grad_out,
            lse,
            delta,
            grad_q,
            *shared,
            of_queries.queries,
            of_queries.keys,
            num_warps=of_queries.warps,
            num_stages=of_queries.stages,
        )
        _backward_of_keys[(triton.cdiv(S, of_keys.keys) * B * K,)](
            q,
            k,
            v,
            grad_out,
            lse,
            delta,
            grad_k,
            grad_v,
            *shared,
            of_keys.queries,
            of_keys.keys,
            num_warps=of_keys.warps,
            num_stages=of_keys.stages,
        )
    return grad_q, grad_k, grad_v


# ---- for autograd and torch.compile ----


# Custom operators: torch.compile does not trace into the launches, and learns the shapes of the
# results from the functions registered as fake.
@torch.library.custom_op("nanochat::flash_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, window)


@_op.register_fake
def _(q, k, v, window):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("nanochat::flash_attention_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad_out, q, k, v, out, lse, window)


@_backward_op.register_fake
def _(grad_out, q, k, v, out, lse, window):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx, inputs, output):
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)
    # No gradient flows back through the log-sum-exp: it need not be filled with zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, _):
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.window), None


_op.register_autograd(_gradients, setup_context=_remember)


def flash_attention(q_BxTxHxD: Tensor, k_BxSxKxD: Tensor, v_BxSxKxD: Tensor, window: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where query t sees itself and the window - 1 positions before it.

    bf16, fp16 or fp32 (slow: for tests), any strides; D one of TRITON_HEAD_DIMS. Returns
    (B, T, H, D) in q's dtype, contiguous, as its gradients are; there is no second derivative.
    Raises ValueError for other inputs."""
    B, T, H, D = q_BxTxHxD.shape
    _, S, K, _ = k_BxSxKxD.shape
    dtypes = (q_BxTxHxD.dtype, k_BxSxKxD.dtype, v_BxSxKxD.dtype)
    one_dtype = dtypes[0] == dtypes[1] == dtypes[2] and dtypes[0] in DTYPES
    if D not in TRITON_HEAD_DIMS or not one_dtype:
        raise ValueError(
            f"flash_attention takes head dims {TRITON_HEAD_DIMS} and one dtype of bf16, fp16 and "
            f"fp32 for all inputs, not {D}, {dtypes[0]}, {dtypes[1]} and {dtypes[2]}"
        )
    shapes_fit = k_BxSxKxD.shape == v_BxSxKxD.shape == (B, S, K, D)
    if not shapes_fit or H % K or S < T or window < 1:
        raise ValueError(
            f"flash_attention: q {tuple(q_BxTxHxD.shape)}, k {tuple(k_BxSxKxD.shape)}, "
            f"v {tuple(v_BxSxKxD.shape)} and a window of {window} do not fit together; give "
            f"(B, T, H, D), twice (B, S, K, D), S >= T, H a multiple of K, a window of 1 or more"
        )
    out, _ = _op(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    return out
