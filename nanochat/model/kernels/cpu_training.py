"""training.cpp from Python: attention and the softmax of the loss for training on CPUs.

Attention runs in C++ tiles if the head dim is a multiple of 32, in bf16 only on processors with AMX
or AVX512-BF16. Otherwise torch computes its products, and C++ the softmax between them.

The references are _blocked() in nanochat/model/attention.py, and _nats_and_log_total() and
_gradient() in nanochat/model/loss.py; tests compare them.

Shapes: R rows (tokens), V vocabulary, N rows of a batch times key/value heads, G query heads of a
key/value head, T tokens of a row, Q queries and S keys of a block, D head dim."""

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanochat import native
from nanochat.model.attention import blocks_of_scores

SOURCE = Path(__file__).with_name("training.cpp")
DTYPES = (torch.float32, torch.bfloat16)
# Queries of which tile_attention.h visits the keys together; the head dim is a multiple of it.
TILE_CHUNK = 32


@functools.cache
def _library() -> ctypes.CDLL:
    return declared(native.load(SOURCE, native.OPENMP))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library of training.cpp, with the types of what its functions take."""
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    scores = [*[whole] * 6, number]
    library.nanochat_has_tiles.argtypes = [whole]
    library.nanochat_softmax.argtypes = [pointer, *scores]
    library.nanochat_softmax_gradient.argtypes = [pointer, pointer, *scores]
    library.nanochat_attention.argtypes = [*[pointer] * 5, whole, pointer, number]
    library.nanochat_attention_gradient.argtypes = [*[pointer] * 8, whole, pointer, number]
    library.nanochat_cross_entropy.argtypes = [
        *[pointer, *[whole] * 4],
        *[pointer, pointer, number, pointer],
    ]
    return library


def problem(planned: bool = False) -> str | None:
    """Why training.cpp cannot be used on this machine, or None. planned: compile nothing to find
    out."""
    return native.problem(SOURCE, native.OPENMP, planned=planned)


def _check(*tensors: Tensor) -> None:
    """ValueError for what training.cpp would read as something else."""
    for x in tensors:
        if x.dtype not in DTYPES or x.dtype != tensors[0].dtype or x.device.type != "cpu":
            raise ValueError(
                f"{x.dtype} on {x.device}; training.cpp takes float32 or bfloat16 on a CPU, the "
                f"same everywhere"
            )


# ---- loss ----


def cross_entropy_(
    logits_RxV: Tensor, targets_R: Tensor, scale_R: Tensor | None, softcap: float | None
) -> Tensor:
    """Cross-entropy in nats, (R,) fp32, of rows of logits softcap * tanh(logits / softcap); 0 where
    the target is -1.

    As the Triton kernel of that name (cross_entropy.py), for a softcap of at most NARROW_CAP:
    scale_R, if given, has the logits overwritten with the gradient of sum(scale * nats), and a
    target outside the vocabulary makes its row NaN. A row without a target is never NaN."""
    _check(logits_RxV)
    if logits_RxV.stride(1) != 1:
        raise ValueError(f"logits with strides {logits_RxV.stride()}; give a last stride of 1")
    R, V = logits_RxV.shape
    nats_R = torch.empty(R, dtype=torch.float32)
    targets_R = targets_R.to(torch.int64).contiguous()
    scale_R = None if scale_R is None else scale_R.float().contiguous()
    _library().nanochat_cross_entropy(
        logits_RxV.data_ptr(),
        logits_RxV.dtype == torch.bfloat16,
        R,
        logits_RxV.stride(0),
        V,
        targets_R.data_ptr(),
        None if scale_R is None else scale_R.data_ptr(),
        softcap or 0,
        nats_R.data_ptr(),
    )
    return nats_R


# ---- attention ----


def attention(q_BxTxHxD: Tensor, k_BxTxKxD: Tensor, v_BxTxKxD: Tensor, window: int) -> Tensor:
    """As attention() of nanochat/model/attention.py, with as many keys as queries."""
    B, T, H, D = q_BxTxHxD.shape
    K = k_BxTxKxD.size(2)
    group = H // K
    q_NxGxTxD = q_BxTxHxD.view(B, T, K, group, D).permute(0, 2, 3, 1, 4).reshape(-1, group, T, D)
    k_NxTxD, v_NxTxD = (x.permute(0, 2, 1, 3).reshape(-1, T, D) for x in (k_BxTxKxD, v_BxTxKxD))
    inputs = [x.contiguous() for x in (q_NxGxTxD, k_NxTxD, v_NxTxD)]
    out_NxGxTxD, _ = _attention(*inputs, window, _n_weights(q_NxGxTxD, window))
    out_BxKxGxTxD = out_NxGxTxD.view(B, K, group, T, D)
    return out_BxKxGxTxD.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _takes_tiles(q: Tensor) -> bool:
    """Whether tile_attention.h computes all of attention for these queries, (..., D); otherwise
    torch's products do, block by block."""
    return q.size(-1) % TILE_CHUNK == 0 and _has_tiles(q.dtype)


# A constant for torch.compile, which would look into it and split the block that it compiles; it
# looks through functools.cache.
@torch.compiler.assume_constant_result
def _has_tiles(dtype: torch.dtype) -> bool:
    return bool(_library().nanochat_has_tiles(dtype == torch.bfloat16))


def _n_weights(q_NxGxTxD: Tensor, window: int) -> int:
    """How many weights the attention keeps, of all rows and heads."""
    N, G, T, _ = q_NxGxTxD.shape
    if not _takes_tiles(q_NxGxTxD):
        blocks = blocks_of_scores(T, T, window)
        return N * G * sum((t1 - t0) * (s1 - s0) for t0, t1, s0, s1 in blocks)
    return N * G * tiled_weights(T, window)


def tiled_weights(T: int, window: int) -> int:
    """How many weights a head's attention keeps in tiles, as Shape::weights() counts them."""
    total = 0
    for first in range(0, T, TILE_CHUNK):
        first_key = max(0, first - window + 1)
        total += first + TILE_CHUNK - first_key + first_key % TILE_CHUNK
    return TILE_CHUNK * total


def _check_attention(q_NxGxTxD: Tensor, k_NxTxD: Tensor, v_NxTxD: Tensor, *like_q: Tensor) -> None:
    tensors = q_NxGxTxD, k_NxTxD, v_NxTxD, *like_q
    _check(*tensors)
    N, _, T, D = q_NxGxTxD.shape
    shapes = [(N, T, D)] * 2 + [q_NxGxTxD.shape] * len(like_q)
    for x, shape in zip(tensors[1:], shapes, strict=True):
        assert x.shape == shape, f"{tuple(x.shape)} instead of {tuple(shape)}"
    assert all(x.is_contiguous() for x in tensors), "training.cpp takes dense tensors"


def _shape(q_NxGxTxD: Tensor, window: int) -> tuple[bool, ctypes.Array, float]:
    N, G, T, D = q_NxGxTxD.shape
    is_bf16 = q_NxGxTxD.dtype == torch.bfloat16
    return is_bf16, (ctypes.c_int64 * 5)(N, G, T, D, window), D**-0.5


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _blocks(
    q_NxGxTxD: Tensor, window: int, weights: Tensor
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Of each block: its queries, its keys, the key of its first query, counted from its first, and
    its part of the weights, (N, G * Q, S)."""
    N, G, T, _ = q_NxGxTxD.shape
    first = 0
    for t0, t1, s0, s1 in blocks_of_scores(T, T, window):
        end = first + N * G * (t1 - t0) * (s1 - s0)
        yield slice(t0, t1), slice(s0, s1), t0 - s0, weights[first:end].view(N, -1, s1 - s0)
        first = end


def _dense(x: Tensor, rows: slice) -> Tensor:
    """These rows of (N, T, D) or (N, G, T, D), as (N, Q, D) or (N, G * Q, D). Products of what is
    not dense copy more."""
    part = x[..., rows, :]
    return part.reshape(x.size(0), -1, x.size(-1)).contiguous()


# n_weights is an argument because inductor's cache is keyed by arguments, and it depends on the
# processor.
@torch.library.custom_op("nanochat::cpu_attention", mutates_args=())
def _attention(
    q_NxGxTxD: Tensor, k_NxTxD: Tensor, v_NxTxD: Tensor, window: int, n_weights: int
) -> tuple[Tensor, Tensor]:
    """(what attention returns, in the layout of q; the weights of all visited keys).

    n_weights: how many those are."""
    _check_attention(q_NxGxTxD, k_NxTxD, v_NxTxD)
    N, G, _, D = q_NxGxTxD.shape
    assert n_weights == _n_weights(q_NxGxTxD, window), "compiled for another processor"
    out = torch.empty_like(q_NxGxTxD)
    weights = q_NxGxTxD.new_empty(n_weights)
    if _takes_tiles(q_NxGxTxD):
        tensors = _addresses(q_NxGxTxD, k_NxTxD, v_NxTxD, out, weights)
        _library().nanochat_attention(*tensors, *_shape(q_NxGxTxD, window))
        return out, weights
    for queries, keys, own, part in _blocks(q_NxGxTxD, window, weights):
        q, k, v = _dense(q_NxGxTxD, queries), _dense(k_NxTxD, keys), _dense(v_NxTxD, keys)
        torch.bmm(q, k.transpose(1, 2), out=part)
        _library().nanochat_softmax(part.data_ptr(), *_described(part, queries, own, window, D))
        out[:, :, queries] = (part @ v).view(N, G, -1, D)
    return out, weights


def _described(
    part: Tensor, queries: slice, own: int, window: int, D: int
) -> tuple[int | float, ...]:
    """What training.cpp wants to know of a block of scores."""
    S = part.size(-1)
    rows = part.numel() // S
    T = queries.stop - queries.start
    return part.dtype == torch.bfloat16, rows, T, S, own, window, D**-0.5


@torch.library.custom_op("nanochat::cpu_attention_backward", mutates_args=())
def _attention_backward(
    upstream_NxGxTxD: Tensor,
    q_NxGxTxD: Tensor,
    k_NxTxD: Tensor,
    v_NxTxD: Tensor,
    weights: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    _check_attention(q_NxGxTxD, k_NxTxD, v_NxTxD, upstream_NxGxTxD)
    _check(q_NxGxTxD, weights)
    assert weights.numel() == _n_weights(q_NxGxTxD, window), "weights of another attention"
    N, G, _, D = q_NxGxTxD.shape
    dq = torch.empty_like(q_NxGxTxD)
    if _takes_tiles(q_NxGxTxD):
        dk, dv = torch.empty_like(k_NxTxD), torch.empty_like(v_NxTxD)
        tensors = upstream_NxGxTxD, q_NxGxTxD, k_NxTxD, v_NxTxD, weights, dq, dk, dv
        _library().nanochat_attention_gradient(*_addresses(*tensors), *_shape(q_NxGxTxD, window))
        return dq, dk, dv
    dk, dv = torch.zeros_like(k_NxTxD), torch.zeros_like(v_NxTxD)
    for queries, keys, own, part in _blocks(q_NxGxTxD, window, weights):
        q, k, v = _dense(q_NxGxTxD, queries), _dense(k_NxTxD, keys), _dense(v_NxTxD, keys)
        upstream = _dense(upstream_NxGxTxD, queries)
        dv[:, keys] += part.transpose(1, 2) @ upstream
        gradient = torch.empty_like(part)
        torch.bmm(upstream, v.transpose(1, 2), out=gradient)
        _library().nanochat_softmax_gradient(
            gradient.data_ptr(), part.data_ptr(), *_described(part, queries, own, window, D)
        )
        dq[:, :, queries] = (gradient @ k).view(N, G, -1, D)
        dk[:, keys] += gradient.transpose(1, 2) @ q
    return dq, dk, dv


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, n_weights: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(n_weights)


@_attention_backward.register_fake
def _(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream: Tensor, of_weights: None) -> tuple[Tensor | None, ...]:
    return *_attention_backward(upstream.contiguous(), *ctx.saved_tensors, ctx.window), None, None


_attention.register_autograd(_backward, setup_context=_keep)
