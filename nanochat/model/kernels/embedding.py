"""Tables of embeddings in Triton: rows in the compute dtype, and gradients that are sums of rows.

Shapes: N tokens, V rows of a table, C columns. The plain version is
F.embedding(ids, weight).to(dtype), which writes the rows in fp32 and reads them again, gets its
gradient in fp32, fills a table with zeros before it adds, and sorts the ids for each table."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# What a program reads at a time: rows x columns. One that sums is a single warp, whose threads have
# all rows of their columns: adding these up takes no exchange between threads.
ROWS = 8
COLUMNS = 256
READING_WARPS = 4
SUMMING_WARPS = 1
# Consecutive places that are summed by a program of their own if all of them have the same id: the
# commonest id of a text has a twentieth of all tokens, which one program would add up while all the
# others are done.
PIECE = 64


class Places(NamedTuple):
    """Where each id stands in a batch, for all tables of V rows; int64 all.

    ids: as they came, of any shape. sorted_N: in ascending order. order_N: the token of each of
    these, ascending among equal ids. starts_V1: the first place of each id in that order, and the
    end of the last."""

    ids: Tensor
    sorted_N: Tensor
    order_N: Tensor
    starts_V1: Tensor


def places_of(ids: Tensor, V: int) -> Places:
    """The Places of int64 ids."""
    sorted_N, order_N = torch.sort(ids.flatten(), stable=True)
    # Not from the distinct ids: the CPU would wait for their number.
    starts_V1 = torch.searchsorted(sorted_N, torch.arange(V + 1, device=ids.device))
    return Places(ids.contiguous(), sorted_N, order_N, starts_V1)


def look_up(weight_VxC: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """Rows of a table, (*ids.shape, C) in `dtype`: the bits of F.embedding(ids, weight).to(dtype).

    places: places_of(ids, V), sorted once for all tables. The row of an id outside the table is
    NaN, and has no gradient. Raises ValueError for a weight that is not contiguous, and for places
    in a table of another size.

    The gradient, in the weight's dtype, is summed in fp32 whatever the dtype of the upstream one,
    in an order that depends on the ids alone: same input, same bits. It is a dense tensor of its
    own, which autograd adds to .grad. Adding to .grad here would save up to 16 bytes per element
    and micro-batch, but autograd calls no hook of a parameter for which it gets no gradient, and
    the exchange between ranks begins in such a hook (nanochat/optim/optimizer.py)."""
    V = len(places.starts_V1) - 1
    if not weight_VxC.is_contiguous() or len(weight_VxC) != V:
        raise ValueError(
            f"weight of {len(weight_VxC)} rows has strides {weight_VxC.stride()}; give a "
            f"contiguous one of {V} rows"
        )
    return _LookUp.apply(weight_VxC, places, dtype)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VxC: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(*places[1:])
        ctx.shape = weight_VxC.shape
        ctx.dtype = weight_VxC.dtype
        V, C = weight_VxC.shape
        ids = places.ids
        N = ids.numel()
        rows = torch.empty(*ids.shape, C, dtype=dtype, device=ids.device)
        grid = (triton.cdiv(N, ROWS), triton.cdiv(C, COLUMNS))
        sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": READING_WARPS}
        with torch.cuda.device_of(ids):
            _rows[grid](weight_VxC, ids, rows, N, V, C, **sizes)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        sorted_N, order_N, starts_V1 = ctx.saved_tensors
        V, C = ctx.shape
        upstream = upstream.contiguous()
        n_pieces = len(order_N) // PIECE
        n_columns = triton.cdiv(C, COLUMNS)
        pieces = torch.empty(n_pieces, C, dtype=torch.float32, device=upstream.device)
        gradient = torch.empty(V, C, dtype=ctx.dtype, device=upstream.device)
        sizes = {"PIECE": PIECE, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": SUMMING_WARPS}
        with torch.cuda.device_of(upstream):
            _piece_sums[(n_pieces, n_columns)](upstream, sorted_N, order_N, pieces, C, **sizes)
            _sums[(V, n_columns)](upstream, order_N, starts_V1, pieces, gradient, C, **sizes)
        return gradient, None, None


@triton.jit
def _rows(weight, ids, out, N, V, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    read = tl.load(ids + tokens, mask=tokens < N, other=-1)
    exists = (read >= 0) & (read < V)
    values = tl.load(
        weight + read[:, None] * C + columns,
        mask=exists[:, None] & (columns < C),
        other=float("nan"),
    )
    place = out + tokens.to(tl.int64)[:, None] * C + columns
    tl.store(place, values.to(out.dtype.element_ty), mask=(tokens < N)[:, None] & (columns < C))


@triton.jit
def _piece_sums(
    upstream,
    sorted_ids,
    order,
    pieces,
    C,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of the pieces in which all ids are equal; nothing is written for the others."""
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = piece * PIECE
    if tl.load(sorted_ids + start) == tl.load(sorted_ids + start + PIECE - 1):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        total = _add_rows(total, upstream, order, start, start + PIECE, columns, C, ROWS)
        tl.store(pieces + piece * C + columns, tl.sum(total, axis=0), mask=columns < C)


@triton.jit
def _sums(
    upstream,
    order,
    starts,
    pieces,
    gradient,
    C,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of a row, zeros too: the places before its first whole piece, the sums of its
    pieces, and the places behind the last."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    first = (start + PIECE - 1) // PIECE
    last = end // PIECE
    # Without a whole piece all are before it.
    before = tl.where(first < last, first * PIECE, end)
    behind = tl.where(first < last, last * PIECE, end)

    # In each of these, one sum for each row that is read at a time.
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = _add_rows(total, upstream, order, start, before, columns, C, ROWS)
    for i in range(first, last, ROWS):
        at = (i + tl.arange(0, ROWS))[:, None]
        inside = (at < last) & (columns < C)[None, :]
        total += tl.load(pieces + at * C + columns[None, :], mask=inside, other=0.0)
    total = _add_rows(total, upstream, order, behind, end, columns, C, ROWS)
    summed = tl.sum(total, axis=0).to(gradient.dtype.element_ty)
    tl.store(gradient + row * C + columns, summed, mask=columns < C)


@triton.jit
def _add_rows(total, upstream, order, start, end, columns, C, ROWS: tl.constexpr):
    """total (ROWS, COLUMNS) plus the upstream gradients at the places from start to end."""
    for i in range(start, end, ROWS):
        at = i + tl.arange(0, ROWS)
        tokens = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (columns < C)[None, :]
        values = tl.load(upstream + tokens[:, None] * C + columns[None, :], mask=inside, other=0.0)
        total += values.to(tl.float32)
    return total
