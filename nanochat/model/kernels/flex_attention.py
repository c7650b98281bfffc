"""Windowed attention through torch's FlexAttention, which torch.compile turns into a Triton kernel
that skips fully masked blocks.

A module of its own, imported where it is used: the decorator of _create_mask() imports the
compiler, which takes longer than torch itself.

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head dim."""

import types

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# BlockMasks, created once for all layers and graphs, as attributes named after T, S, window and
# device. Not a dict or a cached function: the compiler would trace into those and create the mask
# in every step, or would read them before _create_mask() has added to them.
_masks = types.SimpleNamespace()


# Called while a graph is traced; not part of the graph.
@torch.compiler.assume_constant_result
def _create_mask(name: str, T: int, S: int, window: int, device: torch.device) -> None:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + (S - T) - key
        return (distance >= 0) & (distance < window)

    if not hasattr(_masks, name):
        setattr(_masks, name, create_block_mask(visible, None, None, T, S, device=device))


# torch's own tiles for SM80 and later take 128 KiB at a head dim of 128; consumer cards and their
# siblings (SM86, SM89, SM120) have 99 KiB.
SHARED_MEMORY_BYTES = 160 << 10
SMALL_TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "bwd_num_stages": 1}


@torch.compiler.assume_constant_result
def _has_little_shared_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin < SHARED_MEMORY_BYTES


def windowed_attention(
    q_BxTxHxD: Tensor, k_BxSxKxD: Tensor, v_BxSxKxD: Tensor, window: int
) -> Tensor:
    """nanochat.model.attention.attention(), for functions that are being compiled.

    Uncompiled, flex_attention() would compute all scores."""
    T, S, device = q_BxTxHxD.size(1), k_BxSxKxD.size(1), q_BxTxHxD.device
    name = f"m_{T}_{S}_{window}_{device}"
    _create_mask(name, T, S, window, device)
    q, k, v = (x.transpose(1, 2) for x in (q_BxTxHxD, k_BxSxKxD, v_BxSxKxD))
    mask = getattr(_masks, name)
    options = dict(SMALL_TILES) if _has_little_shared_memory(device) else None
    out = flex_attention(
        q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1), kernel_options=options
    )
    return out.transpose(1, 2)
