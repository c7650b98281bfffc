"""Attention with a sliding window through torch's FlexAttention, of which torch.compile makes a Triton kernel that skips hidden blocks.

In a module of its own, imported where it is used: the mark on _make_mask() imports the compiler, which takes longer than torch itself."""

import types

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# By name, "m" with T, S, window and device: BlockMasks, made once for all layers and graphs. Attributes, not a dict or a cached function:
# those the compiler would trace into, and make the mask anew in every step, or would read before _make_mask() has added to them.
_masks = types.SimpleNamespace()


@torch.compiler.assume_constant_result  # called while a graph is traced, and not part of it
def _make_mask(name, T, S, window, device):
    def visible(batch, head, query, key):
        distance = query + (S - T) - key
        return (distance >= 0) & (distance < window)

    if not hasattr(_masks, name):
        setattr(_masks, name, create_block_mask(visible, None, None, T, S, device=device))


def windowed_attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window):
    """nanochat.model.attention.attention() in a function that is being compiled. Elsewhere flex_attention() would make all scores."""
    T, S, device = q_BxTxHxD.size(1), k_BxSxKxD.size(1), q_BxTxHxD.device
    name = f"m_{T}_{S}_{window}_{device}"
    _make_mask(name, T, S, window, device)
    q, k, v = (x.transpose(1, 2) for x in (q_BxTxHxD, k_BxSxKxD, v_BxSxKxD))
    return flex_attention(
        q, k, v, block_mask=getattr(_masks, name), enable_gqa=q.size(1) != k.size(1)
    ).transpose(1, 2)
