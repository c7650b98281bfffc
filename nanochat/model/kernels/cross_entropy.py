"""Cross-entropy of softcapped logits as one Triton kernel, which overwrites the logits with their
gradient.

Shapes: R rows (tokens), V vocabulary. The plain version is _nats_and_log_total() and _gradient() in
nanochat/model/loss.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Logits of a row that a program holds at a time: 16 for each of its 256 threads.
BLOCK = 4096
WARPS = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cross_entropy_(
    logits_RxV: Tensor,
    targets_R: Tensor,
    scale_R: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy in nats, (R,) fp32, of rows of logits softcap * tanh(logits / softcap); 0 where
    the target is -1.

    logits: fp32, bf16 or fp16 with adjacent columns. targets: int64; one outside the vocabulary
    makes its row NaN. scale_R (fp32): if given, the logits are overwritten with the gradient of
    sum(scale * nats). softcap None: no cap. All arithmetic is in fp32. One program handles a row,
    in a fixed order: same input, same bits. Raises ValueError for other logits.

    A program reads its row for the sum of exponentials (in one pass: arXiv 1805.02867), then again
    for the gradient while the row, 64 KiB at 32,768 logits in bf16, is still in the cache: memory
    sees one read and one write."""
    if logits_RxV.dtype not in DTYPES or logits_RxV.stride(1) != 1:
        raise ValueError(
            f"logits are {logits_RxV.dtype} with strides {logits_RxV.stride()}; give float32, "
            f"bfloat16 or float16 and a last stride of 1"
        )
    R, V = logits_RxV.shape
    nats = torch.empty(R, dtype=torch.float32, device=logits_RxV.device)
    scale = None if scale_R is None else scale_R.contiguous()
    with torch.cuda.device_of(logits_RxV):
        _row[(R,)](
            logits_RxV,
            targets_R.contiguous(),
            scale,
            nats,
            logits_RxV.stride(0),
            V,
            softcap,
            BLOCK=min(BLOCK, triton.next_power_of_2(V)),
            num_warps=WARPS,
        )
    return nats


@triton.jit
def _row(logits, targets, scales, nats, row_stride, V, softcap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    # The target's logit is read first: after the reductions below, any thread may overwrite it.
    target = tl.load(targets + row)
    exists = (target >= 0) & (target < V)
    of_target = tl.load(logits + target, mask=exists, other=float("nan")).to(tl.float32)
    if softcap is not None:
        inverse = 1 / softcap
        of_target = softcap * _tanh(of_target * inverse)

    largest = tl.full((), float("-inf"), tl.float32)
    # Sums of exponentials, divided by that of the largest logit; one for each position in a block,
    # so that only the last step has to add across threads.
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
        if softcap is not None:
            z = softcap * _tanh(z * inverse)
        z = tl.where(columns < V, z, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(before - largest) + tl.exp(z - largest)
    total = tl.sum(total, axis=0)
    tl.store(nats + row, tl.where(target == -1, 0.0, tl.log(total) + (largest - of_target)))

    if scales is not None:
        factor = tl.where(target == -1, 0.0, tl.load(scales + row))
        share = 1 / total
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
            slope = factor
            if softcap is not None:
                tanh = _tanh(z * inverse)
                z = softcap * tanh
                slope = factor * (1 - tanh * tanh)
            # Not exp(z - log total): fp32 would round a logarithm of many nats too coarsely.
            gradient = (tl.exp(z - largest) * share - tl.where(columns == target, 1.0, 0.0)) * slope
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < V)


@triton.jit
def _tanh(x):
    # Near 0 the formula with exp() subtracts two numbers close to 1, and a wide cap would enlarge
    # the error; there a series takes its place.
    square = x * x
    series = x * (
        1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    )
    return tl.where(square < 0.09, series, 1 - 2 / (tl.exp(2 * x) + 1))
