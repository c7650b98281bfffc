"""The speedrun model's MLP, down(relu(up(x))^2), with ReLU^2 and its derivative computed by the
products before them, in Triton.

The plain version is MLP.forward() in nanochat/model/gpt.py.

Shapes: N tokens, C width, H hidden channels.

    S = relu(x up^T)^2     out = S down^T     dS = dout down     dh = dS * 2 sqrt(S)

The sums of the first and the third product are in registers when S and dh follow from them: neither
h = x up^T nor dS is ever in memory, no pass over (N, H) numbers remains, and of such numbers only S
is kept for the backward pass. The square root gives h back, half as wrong as S is rounded: where S
is 0, h was not positive, and dh is 0. The other products are plain ones.

One program sums each number, from the first channel to the last: same inputs, same bits. Where the
GPU copies blocks by descriptors (TMA, SM90 and later), a program computes one tile after another,
and loads the first blocks of the next while it finishes the one before. On older GPUs there is a
program for each tile, which loads through pointers.

TRITON_INTERPRET=1, set before triton is imported, runs this module on CPU tensors."""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat.model.kernels import ROW_MULTIPLE
from nanochat.model.kernels.flash_attention import INTERPRETED, SHARED_BYTES, gpu_class


class Tile(NamedTuple):
    """Shape of a block of results, channels that are multiplied at a time, and how Triton runs the
    loop over them.

    descriptors: blocks are copied by descriptors, and programs are as many as multiprocessors."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    descriptors: bool


PASSES = ("forward", "backward")
# A tile for each of PASSES, by class of GPU. Chosen by what the compiler reports, not by speed:
# shared memory suffices and hardly a register is spilled (tests/test_relu_squared.py compiles them
# all).
TILES = {
    "sm90": (Tile(128, 256, 64, 8, 4, True), Tile(128, 256, 64, 8, 3, True)),
    "sm80": (Tile(128, 128, 32, 4, 4, False), Tile(128, 128, 32, 4, 4, False)),
    "sm86": (Tile(128, 128, 32, 4, 3, False), Tile(128, 128, 32, 4, 3, False)),
}
INTERPRETER_TILE = Tile(32, 64, 32, 4, 1, False)


def tile_of(which: str, capability: tuple[int, int] | None) -> Tile:
    """The tile of one of PASSES. capability: of the GPU, None in the interpreter."""
    if capability is None:
        return INTERPRETER_TILE
    return TILES[gpu_class(capability)][PASSES.index(which)]


def shared_bytes(which: str, tile: Tile) -> int:
    """Upper bound on the shared memory of a program in one of PASSES."""
    halves = 2 if which == "backward" else 1
    being_loaded = tile.stages * (tile.rows + tile.columns) * tile.depth
    # and 1 KiB of barriers
    return 2 * (being_loaded + halves * tile.rows * tile.columns // 2) + 1024


def candidates(which: str, capability: tuple[int, int]) -> list[Tile]:
    """Tiles worth measuring for one of PASSES on a GPU, the one in use first.

    forward() and backward() take them as arguments."""
    used = tile_of(which, capability)
    limit = SHARED_BYTES[gpu_class(capability)]
    found = [used]
    for columns, depth, warps, stages in itertools.product((128, 256), (32, 64), (4, 8), (3, 4)):
        tile = Tile(128, columns, depth, warps, stages, used.descriptors)
        # A thread of 4 warps would hold 256 sums, and has 255 registers.
        too_wide = columns == 256 and warps == 4
        if tile != used and not too_wide and shared_bytes(which, tile) <= limit:
            found.append(tile)
    return found


# ---- kernel ----


@triton.jit
def _at(matrix, row, column, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(pointers to a block of a matrix, whether each exists)."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = column + tl.arange(0, COLUMNS)[None, :]
    # int64: offsets of many tokens exceed 32 bits; those within a block do not.
    first = matrix + row * n_columns.to(tl.int64)
    return first + (rows * n_columns + columns), (rows < n_rows - row) & (columns < n_columns)


@triton.jit
def _load(
    matrix,
    row,
    column,
    n_rows,
    n_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A block of a matrix, (ROWS, COLUMNS), with zeros for what is outside."""
    if DESCRIPTORS:
        block = matrix.load([row, column])
    else:
        at, exists = _at(matrix, row, column, n_rows, n_columns, ROWS, COLUMNS)
        block = tl.load(at, mask=exists, other=0.0)
    return block


@triton.jit
def _finish(
    total,
    Squares,
    Out,
    row,
    column,
    N,
    H,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Write what follows from a block of sums: without Squares S, with them dh."""
    if Squares is None:
        # not the maximum with 0, which hides NaN
        out = tl.where(total < 0, 0.0, total * total)
    else:
        squares = _load(Squares, row, column, N, H, ROWS, COLUMNS, DESCRIPTORS).to(tl.float32)
        out = tl.where(squares == 0, 0.0, total * (2 * tl.sqrt(squares)))
    out = out.to(tl.bfloat16)
    if DESCRIPTORS:
        Out.store([row, column], out)
    else:
        at, exists = _at(Out, row, column, N, H, ROWS, COLUMNS)
        tl.store(at, out, mask=exists)


# The name tells the profiler that it is a product.
@triton.jit
def _gemm(
    A,
    B,
    Squares,
    Out,
    N,
    H,
    C,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Without Squares: S (N, H) of A = x (N, C) and B = up (H, C). With Squares = S (N, H): dh
    (N, H) of A = dout (N, C) and B = down (C, H). All are contiguous, or their descriptors."""
    n_across = tl.cdiv(H, COLUMNS)
    n_tiles = tl.cdiv(N, ROWS) * n_across
    # Flattened: the loop over channels is one loop over those of all tiles. Tiles of the same rows
    # are neighbours: B is small enough to stay in the cache, and A is then read once.
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        row = tile // n_across * ROWS
        column = tile % n_across * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in range(tl.cdiv(C, DEPTH)):
            a = _load(A, row, i * DEPTH, N, C, ROWS, DEPTH, DESCRIPTORS)
            if Squares is None:
                b = _load(B, column, i * DEPTH, H, C, COLUMNS, DEPTH, DESCRIPTORS).T
            else:
                b = _load(B, i * DEPTH, column, C, H, DEPTH, COLUMNS, DESCRIPTORS)
            # The interpreter silently multiplies bf16 by bf16 wrongly.
            if INTERPRETED:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total)
        # In halves, which need half the shared memory and fewer registers.
        halves = tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        half: tl.constexpr = COLUMNS // 2
        _finish(left, Squares, Out, row, column, N, H, ROWS, half, DESCRIPTORS)
        _finish(right, Squares, Out, row, column + half, N, H, ROWS, half, DESCRIPTORS)


# ---- launches ----


def forward(x_NxC: Tensor, up_HxC: Tensor, tile: Tile | None = None) -> Tensor:
    """relu(x @ up.T)^2, (N, H), of bf16 inputs. tile: in place of the one in use."""
    tile = tile or tile_of("forward", _capability(x_NxC))
    return _launch(x_NxC, up_HxC, None, len(up_HxC), (tile.columns, tile.depth), tile)


def backward(
    grad_NxC: Tensor, down_CxH: Tensor, squares_NxH: Tensor, tile: Tile | None = None
) -> Tensor:
    """The gradient for x @ up.T, (N, H), of bf16 inputs.

    grad: of the MLP's output. squares: from forward(). tile: in place of the one in use."""
    tile = tile or tile_of("backward", _capability(grad_NxC))
    of_b = (tile.depth, tile.columns)
    return _launch(grad_NxC, down_CxH, squares_NxH, down_CxH.size(1), of_b, tile)


def _capability(x: Tensor) -> tuple[int, int] | None:
    return None if INTERPRETED.value else torch.cuda.get_device_capability(x.device)


def _launch(
    a: Tensor, b: Tensor, squares: Tensor | None, H: int, of_b: tuple[int, int], tile: Tile
) -> Tensor:
    """What _gemm() writes. of_b: shape of a block of b."""
    N, C = a.shape
    half = (tile.rows, tile.columns // 2)
    out = torch.empty(N, H, dtype=a.dtype, device=a.device)
    n_programs = triton.cdiv(N, tile.rows) * triton.cdiv(H, tile.columns)
    if tile.descriptors:
        n_programs = min(n_programs, _multiprocessors(a))
    with torch.cuda.device_of(a):
        _gemm[(n_programs,)](
            _blocks(a, (tile.rows, tile.depth), tile),
            _blocks(b, of_b, tile),
            None if squares is None else _blocks(squares, half, tile),
            _blocks(out, half, tile),
            N,
            H,
            C,
            tile.rows,
            tile.columns,
            tile.depth,
            tile.descriptors,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def _multiprocessors(x: Tensor) -> int:
    if INTERPRETED.value:
        # so few that a test's programs compute several tiles
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _blocks(matrix: Tensor, shape: tuple[int, int], tile: Tile) -> Tensor | TensorDescriptor:
    """What _gemm() takes for a matrix that it reads or writes in blocks of a shape."""
    matrix = matrix.contiguous()
    return TensorDescriptor.from_tensor(matrix, list(shape)) if tile.descriptors else matrix


# ---- for autograd and torch.compile ----


# Custom operators: torch.compile does not trace into the launches, and learns the shapes of the
# results from the functions registered as fake.
@torch.library.custom_op("nanochat::relu_squared", mutates_args=())
def _op(x: Tensor, up: Tensor) -> Tensor:
    return forward(x, up)


@_op.register_fake
def _(x, up):
    return x.new_empty(x.size(0), up.size(0))


@torch.library.custom_op("nanochat::relu_squared_backward", mutates_args=())
def _backward_op(grad: Tensor, down: Tensor, squares: Tensor) -> Tensor:
    return backward(grad, down, squares)


@_backward_op.register_fake
def _(grad, down, squares):
    return grad.new_empty(squares.shape)


class _MLP(torch.autograd.Function):
    """Around both products: the gradient of the first needs the matrix of the second."""

    @staticmethod
    def forward(ctx, x_NxC: Tensor, up_HxC: Tensor, down_CxH: Tensor) -> Tensor:
        squares_NxH = _op(x_NxC, up_HxC)
        ctx.save_for_backward(x_NxC, up_HxC, down_CxH, squares_NxH)
        return squares_NxH @ down_CxH.T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NxC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_NxC, up_HxC, down_CxH, squares_NxH = ctx.saved_tensors
        hidden_NxH = _backward_op(grad_NxC, down_CxH, squares_NxH)
        return hidden_NxH @ up_HxC, hidden_NxH.T @ x_NxC, grad_NxC.T @ squares_NxH


def relu_squared_mlp(x: Tensor, up_HxC: Tensor, down_CxH: Tensor) -> Tensor:
    """relu(x @ up.T)^2 @ down.T, (..., C) in bf16, of x (..., C) in bf16.

    The weights are cast to bf16 for the products, and their gradients are in their own dtype. There
    is no second derivative. Raises ValueError for other inputs."""
    H, C = up_HxC.shape
    if x.dtype != torch.bfloat16 or C % ROW_MULTIPLE or H % ROW_MULTIPLE:
        raise ValueError(
            f"relu_squared_mlp takes bfloat16 and multiples of {ROW_MULTIPLE} channels, not "
            f"{x.dtype} and {C} to {H} channels"
        )
    if x.size(-1) != C or down_CxH.shape != (C, H):
        raise ValueError(
            f"relu_squared_mlp: x {tuple(x.shape)}, up {tuple(up_HxC.shape)} and down "
            f"{tuple(down_CxH.shape)} do not fit together; give (..., C), (H, C) and (C, H)"
        )
    weights = (up_HxC.to(x.dtype), down_CxH.to(x.dtype))
    return _MLP.apply(x.reshape(-1, C), *weights).view_as(x)
