"""reading.cpp from Python: passes over whole texts on CPUs, without gradients.

attend() takes fp32 on any CPU, and bf16 on those with AMX or AVX512-BF16, if the head dim is a
multiple of 32. Scores, weights before they are rounded, and what is between the steps of
positioned() are in fp32, so that in bf16 both are closer to exact arithmetic than their references:
_blocked() and branched_attention() in nanochat/model/attention.py, and shift_keys(), rotate() and
norm() in nanochat/model/layers.py.

Shapes: B beginnings, R rows, T tokens of a row, S tokens of a beginning, H query heads, K key/value
heads, D head dim."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from nanochat import native
from nanochat.model.kernels.cpu_training import DTYPES, TILE_CHUNK

SOURCE = Path(__file__).with_name("reading.cpp")


@functools.cache
def _library() -> ctypes.CDLL:
    return declared(native.load(SOURCE, native.OPENMP))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library of reading.cpp, with the types of what its functions take."""
    pointer = ctypes.c_void_p
    library.nanochat_has_tiles.argtypes = [ctypes.c_int64]
    library.nanochat_read.argtypes = [
        *[pointer] * 7,
        *(ctypes.c_int64, pointer, ctypes.c_float),
    ]
    library.nanochat_positions.argtypes = [
        *[pointer] * 4,
        *(ctypes.c_int64, pointer, ctypes.c_float, pointer),
    ]
    return library


def problem() -> str | None:
    """Why reading.cpp cannot be used on this machine, or None."""
    return native.problem(SOURCE, native.OPENMP)


# A constant for torch.compile, as in cpu_training.py.
@torch.compiler.assume_constant_result
def _has_tiles(dtype: torch.dtype) -> bool:
    return bool(_library().nanochat_has_tiles(dtype == torch.bfloat16))


def takes(q: Tensor) -> bool:
    """Whether attend() computes the attention of these queries, (..., D)."""
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.size(-1) % TILE_CHUNK == 0
        and not torch.is_grad_enabled()
        and _has_tiles(q.dtype)
    )


# The compiler would look into the calls of the library and split what it compiles several times.
@torch.compiler.disable
def attend(
    q_RxTxHxD: Tensor,
    k_RxTxKxD: Tensor,
    v_RxTxKxD: Tensor,
    window: int,
    beginnings: tuple[Tensor, Tensor] | None = None,
    lengths: list[int] | None = None,
) -> Tensor:
    """As branched_attention() of nanochat/model/attention.py, for queries that takes() accepts:
    (R, T, H, D). The bits of a row depend neither on other rows nor on where its text is cut into
    beginning and row.

    beginnings: keys and values, (B, S, K, D) each, or None for rows that continue nothing. lengths:
    of the beginnings."""
    _check_attention((q_RxTxHxD, k_RxTxKxD, v_RxTxKxD), window, beginnings, lengths)
    R, T, H, D = q_RxTxHxD.shape
    K = k_RxTxKxD.size(2)
    q = q_RxTxHxD.contiguous()
    out = torch.empty_like(q)
    if not out.numel():
        return out
    k, v, of_row = _rows(k_RxTxKxD, v_RxTxKxD)
    # never read where nothing is continued
    beginning_k, beginning_v, of_beginning, B, S, given = k, v, 0, R, 0, None
    if beginnings is not None and beginnings[0].numel():
        beginning_k, beginning_v, of_beginning = _rows(*beginnings)
        B, S = beginning_k.shape[:2]
        given = (ctypes.c_int64 * B)(*lengths)
    numbers = B, R // B, T, S, K, H // K, D, window, of_row, of_beginning, torch.get_num_threads()
    tensors = q, k, v, beginning_k, beginning_v
    of = (ctypes.c_int64 * len(numbers))(*numbers)
    addresses = [x.data_ptr() for x in tensors]
    is_bf16 = q.dtype == torch.bfloat16
    _library().nanochat_read(*addresses, given, out.data_ptr(), is_bf16, of, D**-0.5)
    return out


def _rows(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values (rows, tokens, K, D), and how many numbers a row is from the next one; copies
    only of what is not dense within rows, such as it lies in a cache."""
    dense = [x[:1].is_contiguous() for x in (k, v)]
    if not all(dense) or k.stride(0) != v.stride(0):
        k, v = k.contiguous(), v.contiguous()
    return k, v, k.stride(0)


def _check_attention(
    tensors: tuple[Tensor, Tensor, Tensor],
    window: int,
    beginnings: tuple[Tensor, Tensor] | None,
    lengths: list[int] | None,
) -> None:
    """ValueError for what reading.cpp would read as something else."""
    q, k, v = tensors
    R, T, H, D = q.shape
    K = k.size(2)
    fits = takes(q) and k.shape == v.shape == (R, T, K, D) and H % K == 0 and window > 0
    for x in (*tensors, *(beginnings or ())):
        fits = fits and x.dtype == q.dtype and x.device.type == "cpu"
    if beginnings is not None:
        B, S = beginnings[0].shape[:2]
        fits = fits and all(x.shape == (B, S, K, D) for x in beginnings) and R % max(B, 1) == 0
        fits = fits and lengths is not None and len(lengths) == B
        fits = fits and all(0 <= length <= S for length in lengths)
    else:
        fits = fits and lengths is None
    if not fits:
        shapes = [tuple(x.shape) for x in (*tensors, *(beginnings or ()))]
        raise ValueError(
            f"attention of {shapes}, {q.dtype} on {q.device}, with lengths {lengths} and a window "
            f"of {window}; reading.cpp takes float32, or bfloat16 on a CPU with AVX512-BF16 or "
            f"AMX, without gradients and with a head dim that is a multiple of {TILE_CHUNK}"
        )


@torch.compiler.disable
def positioned(
    x_BxTxHxD: Tensor,
    rope: tuple[Tensor, Tensor],
    eps: float | None,
    before_Bx1xHxD: Tensor | None = None,
    *,
    shifts: bool = False,
) -> Tensor:
    """Queries or keys, (B, T, H, D) in their dtype: shifted if `shifts`, rotated, and normalised
    with eps if that is not None.

    before: the key before the first, or None for zeros. rope: as of rotate(), fp32."""
    B, T, H, D = x_BxTxHxD.shape
    half = D // 2
    x = x_BxTxHxD.contiguous()
    cos, sin = (table.contiguous() for table in rope)
    previous = None
    if shifts and before_Bx1xHxD is not None:
        previous = before_Bx1xHxD.to(x.dtype).contiguous()
    tables = cos.size(0) if cos.dim() == 3 else 1
    if (
        x.dtype not in DTYPES
        or x.device.type != "cpu"
        or D % 2
        or {cos.dtype, sin.dtype} != {torch.float32}
        or cos.shape != sin.shape
        or tables not in (1, B)
        or cos.shape[-2:] != (T, half)
        or (previous is not None and previous.shape != (B, 1, H, D))
    ):
        raise ValueError(
            f"heads {tuple(x.shape)} in {x.dtype} on {x.device}, with angles {tuple(cos.shape)} in "
            f"{cos.dtype}, and before them {None if previous is None else tuple(previous.shape)}; "
            f"reading.cpp takes float32 or bfloat16 on a CPU, and fp32 angles {(T, half)} or "
            f"{(B, T, half)}"
        )
    out = torch.empty_like(x)
    of = (ctypes.c_int64 * 6)(B, T, H, D, (half + 1) // 2 if shifts else half, tables)
    _library().nanochat_positions(
        x.data_ptr(),
        None if previous is None else previous.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        x.dtype == torch.bfloat16,
        of,
        -1.0 if eps is None else eps,
        out.data_ptr(),
    )
    return out
