"""The head's loss in chunks of tokens: linear, softcap and cross-entropy, without the logits of all tokens at once.

Shapes: N tokens, R tokens of a chunk, C width, V vocabulary."""

import functools

import torch

# Logits that exist at once, in the compute dtype: 32 MiB in bf16 on a CPU, whose caches are small. On a GPU 512 MiB, not measured: by
# counting, at 32,768 tokens x 768 -> 32,768 and 2**24, adding up the weight's gradient chunk by chunk takes as long as the products.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
EAGER_LOGITS = 2**20  # of these the uncompiled softmax works on so many at once, in fp32
NARROW_CAP = 60.0  # e^60 times any vocabulary is finite in fp32
BACKENDS = ("plain", "compiled", "triton")  # of what is between the products


def pick_loss(device_type, compiled):
    """(backend, reason) of linear_cross_entropy() for training. compiled: torch.compile works here and was not declined.

    The Triton kernel is not chosen before it has run on a GPU, though by counting it should be faster there: per logit the compiled
    functions read twice and write once, into a second tensor; the kernel reads once and writes once, in place."""
    if not compiled:
        return "plain", "nothing is compiled"
    unmeasured = "; the Triton kernel is not measured yet" if device_type == "cuda" else ""
    return "compiled", f"the softmax and its gradient, between the products{unmeasured}"


def chunk_logits(device_type):
    """Logits that linear_cross_entropy() makes at once on devices of this type."""
    return CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cpu"])


def linear_cross_entropy(
    hidden_NxC, weight_VxC, targets_N, softcap=None, reduction="mean", backend="plain", upstream=1.0
):
    """Cross-entropy in nats of logits softcap * tanh(hidden @ weight.T / softcap), as F.cross_entropy(ignore_index=-1) has it.

    hidden is in the compute dtype, in which products run; weight is fp32 and so is its gradient; targets are int64, -1 for
    tokens that do not count; softcap None: no cap. Returns fp32: a number for reduction "mean" (over the tokens that count) or
    "sum", and (N,), 0 where a token does not count, for "none". backend: how what is between the products is computed. upstream: what
    the backward pass of "mean" and "sum" will begin with, as far as that is known (loss scaling): their gradients are rounded to the
    compute dtype at that size; otherwise it changes nothing.

    "mean" and "sum" compute the gradients along with the loss, so that logits are made once; "none", whose tokens may each get
    another gradient, makes them again in its backward pass. Both need memory for chunk_logits() logits and their gradients.
    Raises ValueError for another reduction or backend. (Chunks, and the gradient in the forward pass: arXiv 2410.10989.)"""
    if backend not in BACKENDS:
        raise ValueError(f"loss backend {backend!r}; there are {', '.join(BACKENDS)}")
    if reduction == "none":
        return _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, backend)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r}; there are mean, sum and none")
    if not torch.is_grad_enabled():
        nats = _PerToken.apply(hidden_NxC, weight_VxC, targets_N, softcap, backend).sum()
        return nats if reduction == "sum" else nats / (targets_N != -1).sum()
    return _Reduced.apply(hidden_NxC, weight_VxC, targets_N, softcap, reduction, backend, upstream)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, reduction, backend, expected):
        counted = (
            (targets != -1).sum() if reduction == "mean" else torch.ones((), device=targets.device)
        )
        scale = (1 / counted.clamp_min(1)).expand(targets.shape).contiguous()
        nats, *ctx.gradients = _chunked(hidden, weight, targets, scale * expected, softcap, backend)
        ctx.expected = expected
        return torch.dot(nats, scale) / (
            counted > 0
        )  # a mean over nothing is NaN, and its gradients are zero

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has no second derivative (backward with create_graph=True)"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward a second time; its gradients are given away the first time"
            )
        (hidden_gradient, weight_gradient), ctx.gradients = ctx.gradients, None
        upstream = upstream / ctx.expected
        return (
            hidden_gradient.mul_(upstream),
            weight_gradient.mul_(upstream),
            None,
            None,
            None,
            None,
            None,
        )


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, backend):
        ctx.save_for_backward(hidden, weight, targets)
        ctx.softcap, ctx.backend = softcap, backend
        return _chunked(hidden, weight, targets, None, softcap, backend)[0]

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, targets = ctx.saved_tensors
        return (
            *_chunked(hidden, weight, targets, upstream, ctx.softcap, ctx.backend)[1:],
            None,
            None,
            None,
        )


def _chunked(hidden, weight, targets, scale, softcap, backend):
    """(nats (N,), and of sum(scale * nats) the gradients for hidden, in its dtype, and weight, fp32; None without a scale)."""
    N, V = len(targets), len(weight)
    rows = max(
        1, -(-N // max(1, -(-N * V // chunk_logits(hidden.device.type))))
    )  # chunks of nearly equal length
    matrix = weight.to(hidden.dtype)
    nats = torch.empty(N, dtype=torch.float32, device=hidden.device)
    hidden_gradient = None if scale is None else torch.empty_like(hidden)
    weight_gradient = None
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = hidden[part] @ matrix.T
        nats[part], gradient = _nats_and_gradient(
            logits, targets[part], None if scale is None else scale[part], softcap, backend
        )
        if scale is None:
            continue
        torch.mm(gradient, matrix, out=hidden_gradient[part])
        product = gradient.T @ hidden[part]
        weight_gradient = (
            product.float() if weight_gradient is None else weight_gradient.add_(product)
        )
    if scale is not None and N == 0:
        weight_gradient = torch.zeros_like(weight)
    return nats, hidden_gradient, weight_gradient


def _nats_and_gradient(logits, targets, scale, softcap, backend):
    """(nats (R,) fp32, the gradient of sum(scale * nats) for the logits in their dtype, perhaps in their place; None without a scale)."""
    if backend == "triton":
        from nanochat.model.kernels.cross_entropy import cross_entropy_

        return cross_entropy_(logits, targets, scale, softcap), None if scale is None else logits
    nats, log_total = _rowwise(_nats_and_log_total, backend, softcap, logits, targets)
    return nats, None if scale is None else _rowwise(
        _gradient, backend, softcap, logits, targets, scale, log_total
    )


def _rowwise(function, backend, softcap, logits, *of_rows):
    """function(logits, *of_rows, softcap): at once if it is compiled, which makes no copies, otherwise a few rows at a time."""
    if backend == "compiled":
        return _compiled(function)(logits, *of_rows, softcap)
    rows = max(1, EAGER_LOGITS // logits.size(1))
    parts = [
        function(*(x[start : start + rows] for x in (logits, *of_rows)), softcap)
        for start in range(0, len(logits), rows)
    ]
    return (
        torch.cat(parts)
        if isinstance(parts[0], torch.Tensor)
        else tuple(torch.cat(part) for part in zip(*parts, strict=True))
    )


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _nats_and_log_total(logits_RxV, targets_R, softcap):
    """Cross-entropy of each row, 0 where the target is -1, and the logarithm of its sum of exponentials; both (R,) fp32."""
    capped, _ = _capped(logits_RxV.float(), softcap)
    # logits that are capped need no care lest their exponentials overflow, which saves a pass
    log_total = (
        capped.exp().sum(dim=-1).log()
        if softcap is not None and softcap <= NARROW_CAP
        else capped.logsumexp(dim=-1)
    )
    of_target, _ = _capped(
        logits_RxV.gather(1, targets_R.clamp_min(0)[:, None]).squeeze(1).float(), softcap
    )
    return (log_total - of_target) * (targets_R != -1), log_total


def _gradient(logits_RxV, targets_R, scale_R, log_total_R, softcap):
    """Of sum(scale * nats) for the logits, in their dtype. What it needs of them is computed again: cheaper than to write it down."""
    capped, slope = _capped(logits_RxV.float(), softcap)
    hit = torch.arange(logits_RxV.size(1), device=targets_R.device) == targets_R[:, None]
    factor = (scale_R * (targets_R != -1))[:, None]
    return (((capped - log_total_R[:, None]).exp() - hit.float()) * (slope * factor)).to(
        logits_RxV.dtype
    )


def _capped(logits, softcap):
    """(softcap * tanh(logits / softcap), its derivative)."""
    if softcap is None:
        return logits, 1.0
    if (
        softcap <= NARROW_CAP
    ):  # three times as fast on CPUs as torch.tanh, and 1e-7 from it, which a wide cap would enlarge
        tanh = 1 - 2 / ((logits * (2 / softcap)).exp() + 1)
    else:
        tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh.square()
