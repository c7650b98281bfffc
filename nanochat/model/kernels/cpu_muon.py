"""muon.cpp from Python: what Muon does on CPUs between its matrix products.

The references are the functions of the same names in nanochat/optim/muon.py; tests compare them.

Shapes: N stacked matrices of one shape, R rows, C columns."""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nanochat import native

SOURCE = Path(__file__).with_name("muon.cpp")
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _library() -> ctypes.CDLL:
    return declared(native.load(SOURCE, native.OPENMP))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library of muon.cpp, with the types of what its functions take."""
    pointer, whole, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.nanochat_look_ahead.argtypes = [pointer, pointer, pointer, whole, whole, number]
    library.nanochat_normalize.argtypes = [pointer, pointer, whole, whole, whole, number]
    library.nanochat_mean_squares.argtypes = [pointer, whole, pointer, whole, whole, whole]
    library.nanochat_descend.argtypes = [
        *(pointer, pointer, whole, pointer, whole, whole, whole, whole),
        *(number, number),
    ]
    return library


def problem(planned: bool = False) -> str | None:
    """Why muon.cpp cannot be used on this machine, or None. planned: compile nothing to find
    out."""
    return native.problem(SOURCE, native.OPENMP, planned=planned)


def _check(tensor: Tensor, shape: Sequence[int], *dtypes: torch.dtype) -> None:
    """ValueError for what muon.cpp would read as something else."""
    fits = tensor.dtype in dtypes and tensor.device.type == "cpu" and tensor.is_contiguous()
    if not fits or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}, strides "
            f"{tensor.stride()}; muon.cpp takes {tuple(shape)}, {' or '.join(map(str, dtypes))}, "
            f"dense, on a CPU"
        )


def look_ahead(grad: Tensor, momentum: Tensor, mu: float, dtype: torch.dtype) -> Tensor:
    """Update the momentum with a gradient, in place; returns Nesterov's look-ahead, rounded
    once to dtype. Both fp32, of one shape."""
    _check(grad, grad.shape, torch.float32)
    _check(momentum, grad.shape, torch.float32)
    ahead = torch.empty_like(grad, dtype=dtype)
    _check(ahead, grad.shape, *DTYPES)
    _library().nanochat_look_ahead(
        grad.data_ptr(),
        momentum.data_ptr(),
        ahead.data_ptr(),
        dtype == torch.bfloat16,
        grad.numel(),
        mu,
    )
    return ahead


def normalized(matrices_NxRxC: Tensor, slack: float) -> Tensor:
    """Each matrix divided by its Frobenius norm times slack; zero stays zero."""
    # where rows came from other ranks, matrices are slices of what came
    X = matrices_NxRxC.contiguous()
    _check(X, X.shape, *DTYPES)
    N, R, C = X.shape
    result = torch.empty_like(X)
    _library().nanochat_normalize(
        X.data_ptr(), result.data_ptr(), X.dtype == torch.bfloat16, N, R * C, slack
    )
    return result


def mean_squares(matrices_NxRxC: Tensor) -> Tensor:
    """fp32 mean squares of the rows of tall and square matrices, (N, R, 1), or of the columns of
    wide ones, (N, 1, C)."""
    X = matrices_NxRxC
    _check(X, X.shape, *DTYPES)
    N, R, C = X.shape
    means = torch.empty((N, R, 1) if R >= C else (N, 1, C))
    _library().nanochat_mean_squares(
        X.data_ptr(), X.dtype == torch.bfloat16, means.data_ptr(), N, R, C
    )
    return means


def descend(
    weights: Sequence[Tensor], update_NxRxC: Tensor, scale: Tensor, rate: float, shrinkage: float
) -> None:
    """Change N matrices, or rows of them, fp32 (R, C) each, in place: by rate times the update, and
    by shrinkage times a weight that this moves towards zero.

    scale: fp32 factors of the update, (N, R, 1) or (N, 1, C)."""
    N, R, C = update_NxRxC.shape
    tall = scale.size(2) == 1
    _check(update_NxRxC, (len(weights), R, C), *DTYPES)
    _check(scale, (N, R, 1) if tall else (N, 1, C), torch.float32)
    for weight in weights:
        _check(weight, (R, C), torch.float32)
    # the model's layers own their weights, so these lie anywhere
    addresses = (ctypes.c_void_p * N)(*[weight.data_ptr() for weight in weights])
    _library().nanochat_descend(
        addresses,
        update_NxRxC.data_ptr(),
        update_NxRxC.dtype == torch.bfloat16,
        scale.data_ptr(),
        N,
        R,
        C,
        tall,
        rate,
        shrinkage,
    )
