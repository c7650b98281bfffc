"""Cross-entropy of softcapped logits as one Triton kernel, which leaves its gradient where the logits were.

Shapes: R rows (tokens), V vocabulary. The plain version is _nats_and_log_total() and _gradient() in nanochat/model/loss.py."""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits of a row that a program holds at once: 16 for each of its 256 threads
WARPS = 8


def cross_entropy_(logits_RxV, targets_R, scale_R=None, softcap=None):
    """Cross-entropy in nats, (R,) fp32, of rows of logits softcap * tanh(logits / softcap); 0 where the target is -1.

    logits are fp32, bf16 or fp16 with adjacent columns, targets int64; all arithmetic is fp32. softcap None: no cap. Given scale_R
    (fp32), the logits are overwritten with the gradient of sum(scale * nats). A target outside the vocabulary makes its row NaN.
    Every row is one program's, in a fixed order: same input, same bits. Raises ValueError for other logits.

    A program reads its row for the sum of exponentials (in one pass: arXiv 1805.02867), then again for the gradient while
    the row, 64 KiB at 32,768 logits in bf16, is still in the cache: memory sees one read and one write."""
    if (
        logits_RxV.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or logits_RxV.stride(1) != 1
    ):
        raise ValueError(
            f"logits are {logits_RxV.dtype} with strides {logits_RxV.stride()}; give float32, bfloat16 or float16 and a last "
            f"stride of 1"
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
    # the target's logit is read first: behind the reductions below, every thread may overwrite it
    target = tl.load(targets + row)
    of_target = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(
        tl.float32
    )
    if softcap is not None:
        inverse = 1 / softcap
        of_target = softcap * _tanh(of_target * inverse)

    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros(
        (BLOCK,), tl.float32
    )  # by position in the block; of exponentials divided by that of the largest
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < V, other=0.0).to(tl.float32)
        if softcap is not None:
            z = softcap * _tanh(z * inverse)
        z = tl.where(columns < V, z, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(z, axis=0))
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
            # not exp(z - log total), which would round the logarithm of many nats
            gradient = (tl.exp(z - largest) * share - tl.where(columns == target, 1.0, 0.0)) * slope
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=columns < V)


@triton.jit
def _tanh(x):
    # near 0 the first formula would keep only what is left of x beside 1, and a wide cap would enlarge its error
    square = x * x
    series = x * (
        1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    )
    return tl.where(square < 0.09, series, 1 - 2 / (tl.exp(2 * x) + 1))
