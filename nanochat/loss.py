"""The head's loss in chunks of tokens: linear, softcap and cross-entropy, without the logits of all tokens at once.

Shapes: N tokens, R tokens of a chunk, C width, V vocabulary."""

import functools

import torch

CHUNK_LOGITS = 2**24  # logits that exist at once, in the compute dtype: 32 MiB in bf16
EAGER_LOGITS = 2**20  # of these the uncompiled softmax works on so many at once, in fp32
NARROW_CAP = 60.0  # e^60 times any vocabulary is finite in fp32


def linear_cross_entropy(hidden_NxC, weight_VxC, targets_N, softcap=None, reduction="mean", compiled=False):
    """Cross-entropy in nats of logits softcap * tanh(hidden @ weight.T / softcap), as F.cross_entropy(ignore_index=-1) has it.

    hidden is in the compute dtype, in which products run; weight is fp32 and so is its gradient; targets are int64, -1 for
    tokens that do not count; softcap None: no cap. Returns fp32: a number for reduction "mean" (over the tokens that count) or
    "sum", and (N,), 0 where a token does not count, for "none". compiled: use torch.compile between the products.

    "mean" and "sum" compute the gradients along with the loss, so that logits are made once; "none", whose tokens may each get
    another gradient, makes them again in its backward pass. Both need memory for CHUNK_LOGITS logits and their gradients.
    Raises ValueError for another reduction. (Chunks, and the gradient in the forward pass: arXiv 2410.10989.)"""
    if reduction == "none":
        return _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, compiled)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}; there are mean, sum and none")
    if not torch.is_grad_enabled():
        nats = _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, compiled).sum()
        return nats if reduction == "sum" else nats / (targets_N != -1).sum()
    return _Reduced.apply(hidden_NxC, weight_VxC, targets_N, softcap, reduction, compiled)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, reduction, compiled):
        counted = (targets != -1).sum() if reduction == "mean" else torch.ones((), device=targets.device)
        scale = (1 / counted.clamp_min(1)).expand(targets.shape).contiguous()
        nats, *ctx.gradients = _chunked(hidden, weight, targets, scale, softcap, compiled)
        return torch.dot(nats, scale) / (counted > 0)  # a mean over nothing is NaN, and its gradients are zero

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative (backward with create_graph=True)")
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: backward a second time; its gradients are given away the first time")
        (hidden_gradient, weight_gradient), ctx.gradients = ctx.gradients, None
        return hidden_gradient.mul_(upstream), weight_gradient.mul_(upstream), None, None, None, None


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, compiled):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.softcap, ctx.compiled = softcap, compiled
        return _chunked(hidden, weight, targets, None, softcap, compiled)[0]

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets = ctx.saved_tensors
        return *_chunked(hidden, weight, targets, upstream, ctx.softcap, ctx.compiled)[1:], None, None, None


def _chunked(hidden, weight, targets, scale, softcap, compiled):
    """(nats (N,), and of sum(scale * nats) the gradients for hidden, in its dtype, and weight, fp32; None without a scale)."""
    N, V = len(targets), len(weight)
    rows = max(1, -(-N // max(1, -(-N * V // CHUNK_LOGITS))))  # chunks of nearly equal length
    matrix = weight.to(hidden.dtype)
    nats = torch.empty(N, dtype=torch.float32, device=hidden.device)
    hidden_gradient = None if scale is None else torch.empty_like(hidden)
    weight_gradient = None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = hidden[part] @ matrix.T
        nats[part], log_total = _rowwise(_nats_and_log_total, compiled, softcap, logits, targets[part])
        if scale is None:
            continue
        gradient = _rowwise(_gradient, compiled, softcap, logits, targets[part], scale[part], log_total)
        torch.mm(gradient, matrix, out=hidden_gradient[part])
        product = gradient.T @ hidden[part]
        weight_gradient = product.float() if weight_gradient is None else weight_gradient.add_(product)
    if scale is not None and N == 0:
        weight_gradient = torch.zeros_like(weight)
    return nats, hidden_gradient, weight_gradient


def _rowwise(function, compiled, softcap, logits, *of_rows):
    """function(logits, *of_rows, softcap): at once if it is compiled, which makes no copies, otherwise a few rows at a time."""
    if compiled:
        return _compiled(function)(logits, *of_rows, softcap)
    rows = max(1, EAGER_LOGITS // logits.size(1))
    parts = [function(*(x[start : start + rows] for x in (logits, *of_rows)), softcap) for start in range(0, len(logits), rows)]
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else tuple(torch.cat(part) for part in zip(*parts, strict=True))


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _nats_and_log_total(logits_RxV, targets_R, softcap):
    """Cross-entropy of each row, 0 where the target is -1, and the logarithm of its sum of exponentials; both (R,) fp32."""
    capped, _ = _capped(logits_RxV.float(), softcap)
    # logits that are capped need no care lest their exponentials overflow, which saves a pass
    log_total = capped.exp().sum(dim=-1).log() if softcap is not None and softcap <= NARROW_CAP else capped.logsumexp(dim=-1)
    of_target, _ = _capped(logits_RxV.gather(1, targets_R.clamp_min(0)[:, None]).squeeze(1).float(), softcap)
    return (log_total - of_target) * (targets_R != -1), log_total


def _gradient(logits_RxV, targets_R, scale_R, log_total_R, softcap):
    """Of sum(scale * nats) for the logits, in their dtype. What it needs of them is computed again: cheaper than to write it down."""
    capped, slope = _capped(logits_RxV.float(), softcap)
    hit = torch.arange(logits_RxV.size(1), device=targets_R.device) == targets_R[:, None]
    factor = (scale_R * (targets_R != -1))[:, None]
    return (((capped - log_total_R[:, None]).exp() - hit.float()) * (slope * factor)).to(logits_RxV.dtype)


def _capped(logits, softcap):
    """(softcap * tanh(logits / softcap), its derivative)."""
    if softcap is None:
        return logits, 1.0
    if softcap <= NARROW_CAP:  # three times as fast on CPUs as torch.tanh, and 1e-7 from it, which a wide cap would enlarge
        tanh = 1 - 2 / ((logits * (2 / softcap)).exp() + 1)
    else:
        tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh.square()
