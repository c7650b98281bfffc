"""The product of a matrix with its own transpose, of which one half is computed and the other copied.

Shapes: N stacked matrices, R rows, C columns. The plain version is torch.baddbmm(add, X, X.mT, beta=beta, alpha=alpha)."""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = 128  # rows and columns of the result that a program computes
WARPS = 8
STAGES = 3  # steps along C whose operands are held at once, in at most 96 KiB of shared memory


def symmetric_product(X_NxRxC, add_NxRxR=None, alpha=1.0, beta=1.0):
    """alpha * X X^T + beta * add for each matrix: (N, R, R) in X's dtype (fp32, bf16 or fp16), summed in fp32.

    X may be strided in any way: give X.mT for X^T X. add (None: nothing is added) must be symmetric: what is below its diagonal does
    not count. The result is symmetric to the last bit. Every element is one program's, in a fixed order: same input, same bits.
    fp32 products are in full precision. Raises ValueError for other dtypes or shapes.

    Of T x T tiles T (T + 1) / 2 are computed; those below the diagonal are written by the programs of their mirror images."""
    (N, R, C), dtype = X_NxRxC.shape, X_NxRxC.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a symmetric product of {dtype}; give float32, bfloat16 or float16")
    if add_NxRxR is not None and (add_NxRxR.shape, add_NxRxR.dtype) != ((N, R, R), dtype):
        raise ValueError(
            f"add is {add_NxRxR.dtype} {tuple(add_NxRxR.shape)}; it must be {dtype} {(N, R, R)}"
        )
    out = torch.empty(N, R, R, dtype=dtype, device=X_NxRxC.device)
    tiles = triton.cdiv(R, TILE)
    add = out if add_NxRxR is None else add_NxRxR
    with torch.cuda.device_of(X_NxRxC):
        _tile[(tiles * tiles, N)](
            X_NxRxC,
            add,
            out,
            R,
            C,
            *X_NxRxC.stride(),
            *add.stride(),
            *out.stride()[:2],
            alpha,
            beta,
            ADD=add_NxRxR is not None,
            TILE=TILE,
            STEP=128 // dtype.itemsize,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out


@triton.jit
def _tile(
    X,
    add,
    out,
    R,
    C,
    X_n,
    X_r,
    X_c,
    add_n,
    add_r,
    add_c,
    out_n,
    out_r,
    alpha,
    beta,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tiles = tl.cdiv(R, TILE)
    first_row, first_column = tl.program_id(0) // tiles * TILE, tl.program_id(0) % tiles * TILE
    if first_row > first_column:
        return
    n = tl.program_id(1).to(tl.int64)
    rows, columns, steps = (
        first_row + tl.arange(0, TILE),
        first_column + tl.arange(0, TILE),
        tl.arange(0, STEP),
    )
    total = tl.zeros((TILE, TILE), tl.float32)
    left = X + n * X_n + rows[:, None] * X_r + steps[None, :] * X_c
    right = X + n * X_n + columns[None, :] * X_r + steps[:, None] * X_c
    for start in range(0, C, STEP):
        a = tl.load(left, mask=(rows[:, None] < R) & (start + steps[None, :] < C), other=0.0)
        b = tl.load(right, mask=(columns[None, :] < R) & (start + steps[:, None] < C), other=0.0)
        if INTERPRETED:  # Triton's interpreter multiplies bf16 by bf16 wrongly, without a word
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += STEP * X_c
        right += STEP * X_c
    total *= alpha
    inside = (rows[:, None] < R) & (columns[None, :] < R)
    if ADD:
        there = add + n * add_n + rows[:, None] * add_r + columns[None, :] * add_c
        total += beta * tl.load(there, mask=inside, other=0.0).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    mirrored = tl.trans(total)
    # in a tile on the diagonal the upper half counts, should the lower one have been summed in another order
    total = tl.where(rows[:, None] <= columns[None, :], total, mirrored)
    out += n * out_n
    tl.store(out + rows[:, None] * out_r + columns[None, :], total, mask=inside)
    if first_row < first_column:
        tl.store(
            out + columns[:, None] * out_r + rows[None, :],
            mirrored,
            mask=(columns[:, None] < R) & (rows[None, :] < R),
        )
