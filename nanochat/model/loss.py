"""Linear head, softcap and cross-entropy in chunks of tokens, never holding all logits at once.

Shapes: N tokens, R tokens of a chunk, C width, V vocabulary."""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import ceil_div, round_up

# Logits that exist at a time, in the compute dtype: 32 MiB in bf16 on a CPU, whose caches are
# small. On a GPU 512 MiB, by counting, not measured: at 32,768 tokens x 768 -> 32,768 and chunks of
# 2**24, accumulating the weight's gradient chunk by chunk would take as long as the products.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
# On a GPU, products of matrices whose rows do not begin at multiples of 16 bytes are several times
# slower: a vocabulary that is no multiple of eight is padded to a multiple of this with zeros.
PADDED_TO = {"cuda": 64}
# Of these, the uncompiled softmax works on so many at a time, in fp32.
EAGER_LOGITS = 2**20
# e^60 times any vocabulary is finite in fp32.
NARROW_CAP = 60.0
# Whether the product itself sums a chunk's part of the weight's gradient in fp32, on a GPU, and
# whether the Triton kernel is taken there. Set by nanochat/apps/doctor/gpu_checks.py alone, which
# measures it.
WIDE_SUM = False
TRITON_ON_GPU = False
# How the softmax between the products is computed.
BACKENDS = ("plain", "compiled", "native", "triton")
# Of these, the ones whose gradient overwrites the logits.
IN_PLACE = ("native", "triton")


def pick_loss(device_type: str, compiled: bool, planned: bool = False) -> tuple[str, str]:
    """(backend, reason) of linear_cross_entropy() for training.

    compiled: torch.compile works here and was not declined. planned: compile nothing to find out
    what can be.

    The Triton kernel is not chosen before it has run on a GPU, though by counting it should be
    faster there: per logit the compiled functions read twice and write once, into a second tensor;
    the kernel reads once and writes once, in place."""
    if not compiled:
        return "plain", "nothing is compiled"
    if device_type == "cuda" and TRITON_ON_GPU:
        return "triton", "one kernel for the softmax and its gradient"
    if device_type == "cpu":
        from nanochat.model.kernels import cpu_training

        problem = cpu_training.problem(planned)
        if not problem:
            return "native", "the softmax and its gradient in C++, between the products"
        return "compiled", f"the softmax and its gradient, between the products; {problem}"
    reason = "the softmax and its gradient, between the products"
    if device_type == "cuda":
        reason += "; the Triton kernel is not measured yet"
    return "compiled", reason


@functools.cache
def pick_scoring_loss(device_type: str) -> str:
    """The backend of linear_cross_entropy() for text that is only scored, whose shapes vary.

    On a GPU it is the Triton kernel, which takes any shape: the plain way would launch some thirty
    small kernels for every 2^20 logits, and evaluation would wait for nothing else. Without triton,
    or before SM70, and on every other device: plain."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return "plain"
    return "triton" if torch.cuda.get_device_capability() >= (7, 0) else "plain"


def chunk_logits(device_type: str) -> int:
    """Logits that linear_cross_entropy() holds at a time on devices of this type."""
    return CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cpu"])


def linear_cross_entropy(
    hidden_NxC: Tensor,
    weight_VxC: Tensor,
    targets_N: Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str = "plain",
    upstream: float = 1.0,
) -> Tensor:
    """Cross-entropy in nats of the logits softcap * tanh(hidden @ weight.T / softcap).

    As F.cross_entropy(ignore_index=-1) defines it. Returns fp32: for reduction "mean" (over the
    tokens that count) and "sum" a number, for "none" (N,), 0 where a token does not count.

    hidden is in the compute dtype, in which products run. weight is fp32 and so is its gradient.
    targets are int64, -1 for tokens that do not count. softcap None: no cap. backend: how the
    softmax between the products is computed. upstream: the expected gradient of a "mean" or "sum"
    (the loss scale): their gradients are rounded to the compute dtype at that size; it changes
    nothing else.

    "mean" and "sum" compute the gradients along with the loss, so that logits are computed once;
    "none", whose tokens may each get another gradient, recomputes them in its backward pass. Both
    need memory for chunk_logits() logits and their gradients. (Chunks, and the gradient in the
    forward pass: arXiv 2410.10989.) Raises ValueError for another reduction or backend."""
    if backend not in BACKENDS:
        raise ValueError(f"loss backend {backend!r}; choose {', '.join(BACKENDS)}")
    if backend == "native" and not _is_for_native(hidden_NxC.dtype, softcap):
        backend = "plain"
    if reduction == "none":
        return _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, backend)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}; choose mean, sum or none")
    if not torch.is_grad_enabled():
        # Without gradients there is nothing to compute along with the loss.
        nats = _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, backend).sum()
        return nats if reduction == "sum" else nats / (targets_N != -1).sum()
    return _Reduced.apply(hidden_NxC, weight_VxC, targets_N, softcap, reduction, backend, upstream)


def _is_for_native(dtype: torch.dtype, softcap: float | None) -> bool:
    from nanochat.model.kernels.cpu_training import DTYPES

    # training.cpp takes tanh from an exponential, whose error a wide cap would enlarge
    narrow = softcap is None or softcap <= NARROW_CAP
    return narrow and dtype in DTYPES


class _Reduced(torch.autograd.Function):
    """Mean or sum; computes the gradients in its forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_NxC: Tensor,
        weight_VxC: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        reduction: str,
        backend: str,
        expected: float,
    ) -> Tensor:
        if reduction == "mean":
            counted = (targets_N != -1).sum()
        else:
            counted = torch.ones((), device=targets_N.device)
        scale_N = (1 / counted.clamp_min(1)).expand(targets_N.shape).contiguous()
        nats_N, *ctx.gradients = _chunked(
            hidden_NxC, weight_VxC, targets_N, scale_N * expected, softcap, backend
        )
        ctx.expected = expected
        # A mean over nothing is NaN, and its gradients are zero.
        return torch.dot(nats_N, scale_N) / (counted > 0)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative (backward with create_graph=True)"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward ran a second time, but its gradients are not kept"
            )
        hidden_gradient, weight_gradient = ctx.gradients
        # They are scaled in place, which saves a copy of each.
        ctx.gradients = None
        upstream = upstream / ctx.expected
        hidden_gradient.mul_(upstream)
        weight_gradient.mul_(upstream)
        return hidden_gradient, weight_gradient, None, None, None, None, None


class _PerToken(torch.autograd.Function):
    """One number per token; recomputes the logits in its backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_NxC: Tensor,
        weight_VxC: Tensor,
        targets_N: Tensor,
        softcap: float | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(hidden_NxC, weight_VxC, targets_N)
        ctx.softcap = softcap
        ctx.backend = backend
        nats_N, _, _ = _chunked(hidden_NxC, weight_VxC, targets_N, None, softcap, backend)
        return nats_N

    @staticmethod
    def backward(ctx, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        _, hidden_gradient, weight_gradient = _chunked(
            *ctx.saved_tensors, upstream_N, ctx.softcap, ctx.backend
        )
        return hidden_gradient, weight_gradient, None, None, None


def _chunked(
    hidden_NxC: Tensor,
    weight_VxC: Tensor,
    targets_N: Tensor,
    scale_N: Tensor | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(nats (N,) fp32, and the gradients of sum(scale * nats) for hidden, in its dtype, and for
    weight, fp32; None without a scale)."""
    N = len(targets_N)
    V = len(weight_VxC)
    # Chunks of nearly equal length: a short last one would cost as much as it saves memory.
    n_chunks = max(1, ceil_div(N * V, chunk_logits(hidden_NxC.device.type)))
    rows = max(1, ceil_div(N, n_chunks))
    # P: V, or as many with the rows of zeros
    matrix_PxC = _padded(weight_VxC.to(hidden_NxC.dtype))
    nats_N = torch.empty(N, dtype=torch.float32, device=hidden_NxC.device)
    hidden_gradient = None if scale_N is None else torch.empty_like(hidden_NxC)
    weight_gradient = None
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        logits_RxP = hidden_NxC[chunk] @ matrix_PxC.T
        scale_R = None if scale_N is None else scale_N[chunk]
        nats_N[chunk], gradient_RxP = _nats_and_gradient(
            logits_RxP[:, :V], targets_N[chunk], scale_R, softcap, backend
        )
        if scale_N is None:
            continue
        if len(matrix_PxC) > V:
            # The logits of the padding are zeros, as their gradient is.
            if backend not in IN_PLACE:
                logits_RxP[:, :V] = gradient_RxP
            gradient_RxP = logits_RxP
        # Straight into its place: no temporary for each chunk.
        torch.mm(gradient_RxP, matrix_PxC, out=hidden_gradient[chunk])
        if WIDE_SUM and hidden_NxC.is_cuda and hidden_NxC.dtype != torch.float32:
            weight_gradient = _add_product(weight_gradient, gradient_RxP.T, hidden_NxC[chunk])
            continue
        product_PxC = gradient_RxP.T @ hidden_NxC[chunk]
        if weight_gradient is None:
            weight_gradient = product_PxC.float()
        else:
            weight_gradient.add_(product_PxC)
    # Without tokens there was no chunk to create it.
    if scale_N is not None and N == 0:
        weight_gradient = torch.zeros_like(weight_VxC)
    return nats_N, hidden_gradient, None if scale_N is None else weight_gradient[:V]


def _padded(matrix_VxC: Tensor) -> Tensor:
    """The matrix, with rows of zeros added where its number of rows makes products slow."""
    V = len(matrix_VxC)
    multiple = PADDED_TO.get(matrix_VxC.device.type, 1)
    if multiple == 1 or V % 8 == 0:
        return matrix_VxC
    return F.pad(matrix_VxC, (0, 0, 0, round_up(V, multiple) - V))


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32, which is never rounded in between. total: fp32, changed in place, or
    None for zero."""
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _nats_and_gradient(
    logits_RxV: Tensor,
    targets_R: Tensor,
    scale_R: Tensor | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """(nats (R,) fp32, and the gradient of sum(scale * nats) for the logits, in their dtype; None
    without a scale). The gradient overwrites the logits in the backends IN_PLACE."""
    if backend in IN_PLACE:
        if backend == "native":
            from nanochat.model.kernels.cpu_training import cross_entropy_
        else:
            from nanochat.model.kernels.cross_entropy import cross_entropy_
        nats_R = cross_entropy_(logits_RxV, targets_R, scale_R, softcap)
        return nats_R, None if scale_R is None else logits_RxV
    nats_R, log_total_R = _rowwise(_nats_and_log_total, backend, softcap, logits_RxV, targets_R)
    if scale_R is None:
        return nats_R, None
    of_rows = (logits_RxV, targets_R, scale_R, log_total_R)
    return nats_R, _rowwise(_gradient, backend, softcap, *of_rows)


def _rowwise(
    function: Callable, backend: str, softcap: float | None, logits_RxV: Tensor, *of_rows: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """function(logits, *of_rows, softcap).

    All rows together if it is compiled, which needs no copies; otherwise a few rows at a time."""
    if backend == "compiled":
        return _compiled(function)(logits_RxV, *of_rows, softcap)
    # Each operation creates an fp32 tensor: small ones stay in the cache.
    rows = max(1, EAGER_LOGITS // logits_RxV.size(1))
    parts = []
    for start in range(0, len(logits_RxV), rows):
        inputs = (x[start : start + rows] for x in (logits_RxV, *of_rows))
        parts.append(function(*inputs, softcap))
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _nats_and_log_total(
    logits_RxV: Tensor, targets_R: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, 0 where the target is -1, and the logarithm of its sum of
    exponentials; both (R,) fp32."""
    capped, _ = _capped(logits_RxV.float(), softcap)
    # Exponentials of capped logits cannot overflow: not subtracting the largest saves a pass.
    if softcap is not None and softcap <= NARROW_CAP:
        log_total_R = capped.exp().sum(dim=-1).log()
    else:
        log_total_R = capped.logsumexp(dim=-1)
    logit_R = logits_RxV.gather(1, targets_R.clamp_min(0)[:, None]).squeeze(1)
    of_target_R, _ = _capped(logit_R.float(), softcap)
    return (log_total_R - of_target_R) * (targets_R != -1), log_total_R


def _gradient(
    logits_RxV: Tensor,
    targets_R: Tensor,
    scale_R: Tensor,
    log_total_R: Tensor,
    softcap: float | None,
) -> Tensor:
    """Gradient of sum(scale * nats) for the logits, in their dtype.

    Recomputes the capped logits: cheaper than to store them."""
    capped, slope = _capped(logits_RxV.float(), softcap)
    vocabulary = torch.arange(logits_RxV.size(1), device=targets_R.device, dtype=torch.int32)
    hit = vocabulary == targets_R.int()[:, None]
    factor = (scale_R * (targets_R != -1))[:, None]
    gradient = ((capped - log_total_R[:, None]).exp() - hit.float()) * (slope * factor)
    return gradient.to(logits_RxV.dtype)


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """(softcap * tanh(logits / softcap), its derivative)."""
    if softcap is None:
        return logits, 1.0
    if softcap <= NARROW_CAP:
        # On CPUs three times as fast as torch.tanh, and 1e-7 from it; a wide cap would enlarge
        # that error.
        tanh = 1 - 2 / ((logits * (2 / softcap)).exp() + 1)
    else:
        tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh.square()
