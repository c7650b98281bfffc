"""Weights as small integers: 8, 12 or 16 bits, with a scale for each group of 32.

The high 8 bits are one plane of int8, the remaining 4 or 8 bits a second one, so that a reader
needs only typed arrays. The planes stand behind the scales:

scales   fp32, one per group, little-endian like all that follows
high     int8, one per weight
low      4 bits (two weights a byte, the first in the lower half) or 8 bits, unsigned

A weight is (high * 2^(bits - 8) + low) * scale. Groups run over the flattened tensor; the last one
is filled with zeros. 32 bits stand for fp32, which is stored as it is."""

import numpy as np
import torch
from torch import Tensor

GROUP = 32
# Bits of a weight that pack() offers.
BITS = (8, 12, 16, 32)


def pack(tensor: Tensor, bits: int) -> bytes:
    """The bytes of a tensor on the CPU. bits: of BITS."""
    flat = tensor.detach().float().flatten().numpy()
    if bits == 32:
        return flat.astype("<f4").tobytes()
    groups = np.zeros((n_groups(flat.size), GROUP))
    groups.ravel()[: flat.size] = flat
    # symmetric, so that zero is exact
    largest = 2 ** (bits - 1) - 1
    scales = (np.abs(groups).max(axis=1) / largest).astype("<f4")
    # a group of zeros has no scale to divide by
    divisors = np.where(scales > 0, scales, 1).astype(np.float64)
    integers = np.rint(groups / divisors[:, None]).clip(-largest, largest).astype(np.int32).ravel()
    high = (integers >> (bits - 8)).astype(np.int8)
    return scales.tobytes() + high.tobytes() + _low_plane(integers, bits).tobytes()


def _low_plane(integers: np.ndarray, bits: int) -> np.ndarray:
    """The bits of each integer below its high 8, uint8."""
    low = (integers & (2 ** (bits - 8) - 1)).astype(np.uint8)
    if bits == 8:
        return low[:0]
    if bits == 12:
        return low[0::2] | (low[1::2] << 4)
    return low


def unpack(content: bytes, shape: tuple[int, ...], bits: int) -> Tensor:
    """The fp32 tensor that pack() wrote, as far as its bits tell.

    ValueError if the content has another length than such a tensor."""
    n = int(np.prod(shape))
    if len(content) != packed_bytes(n, bits):
        raise ValueError(
            f"{len(content)} bytes, but {packed_bytes(n, bits)} of {shape} at {bits} bits"
        )
    if bits == 32:
        return torch.from_numpy(np.frombuffer(content, "<f4").copy()).view(shape)
    filled = n_groups(n) * GROUP
    scales = np.frombuffer(content, "<f4", n_groups(n)).astype(np.float64)
    high = np.frombuffer(content, np.int8, filled, offset=scales.size * 4).astype(np.int32)
    low = np.frombuffer(content, np.uint8, offset=scales.size * 4 + filled).astype(np.int32)
    if bits == 8:
        integers = high
    elif bits == 12:
        integers = high * 16 + np.stack((low & 15, low >> 4), axis=1).ravel()
    else:
        integers = high * 256 + low
    values = (integers.reshape(-1, GROUP) * scales[:, None]).astype(np.float32)
    return torch.from_numpy(values.ravel()[:n].copy()).view(shape)


def packed_bytes(n: int, bits: int) -> int:
    """How many bytes n weights take."""
    if bits == 32:
        return 4 * n
    return n_groups(n) * (4 + GROUP * bits // 8)


def n_groups(n: int) -> int:
    """How many groups n weights fill, the last one perhaps in part."""
    return -(-n // GROUP)
