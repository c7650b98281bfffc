"""Layers of both architectures: norm, linear layers, rotary positions, attention.

Shapes: B batch rows, T tokens of a row, C width, H query heads, K key/value heads, D head dim."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import ceil_div
from nanochat.model.attention import attention
from nanochat.model.config import GATE_CHANNELS, GPTConfig

NORM_EPS = 1e-6

# One product for queries, keys and values in training. Set by nanochat/apps/doctor/gpu_checks.py
# alone, which measures it.
ONE_PRODUCT = False

# Dropout on a CPU draws 16 bits a number.
DRAWN = 1 << 16

# cos and sin of the rotary angles: (T, D/2) each, or (B, T, D/2) if each row has its own positions.
Rope = tuple[Tensor, Tensor]


class LayerCache(Protocol):
    """The keys and values that one attention layer has read; nanochat/eval/kv_cache.py has two.

    key_before: the last key before shifting, rotating and normalising, (B, 1, K, D), or None."""

    key_before: Tensor | None

    def append(self, k_BxTxKxD: Tensor, v_BxTxKxD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of T more positions; returns all that are stored."""

    def attend(
        self, q_BxTxHxD: Tensor, k_BxTxKxD: Tensor, v_BxTxKxD: Tensor, window: int, backend: str
    ) -> Tensor:
        """Attention of T new positions, which are stored first, to all positions: (B, T, H, D)."""

    def remember(self, raw_keys_BxTxKxD: Tensor) -> None:
        """Keep the last of the raw keys as key_before."""


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without weights."""
    if torch.is_grad_enabled() or x.is_cuda:
        return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    # On a CPU F.rms_norm stores the squares; without them and in place it takes half the time.
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = scale.square_().div_(x.size(-1)).add_(NORM_EPS).rsqrt_()
    # x itself must not change: an fp32 x is not copied by float()
    if wide is x:
        return wide * scale
    return wide.mul_(scale).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear without bias; its fp32 weight is cast to the input's dtype for the product."""

    # Computes the product of (x, weight) in training mode, if set (nanochat/model/fp8.py).
    training_product: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in) times the weight's transpose: (..., n_out) in x's dtype."""
        if self.training and self.training_product is not None:
            return self.training_product(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """x, of which in training a random share becomes 0 and the rest grows so that the mean stays.

    On a CPU the share is rounded to 1/65,536, and some numbers always stay."""
    if x.device.type != "cpu" or not training or not share:
        return F.dropout(x, share, training)
    dropped = min(round(share * DRAWN), DRAWN - 1)
    return x * _kept(x.detach(), dropped) * (DRAWN / (DRAWN - dropped))


# Compiled code calls it as it is. The numbers that torch or its compiler would draw take 10 ns
# each; four from a draw of 64 bits take a fifth of that. The factors have the dtype of x because
# the compiler's loops read booleans one at a time.
@torch.library.custom_op(
    "nanochat::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _kept(x: Tensor, dropped: int) -> Tensor:
    """Factors with the shape and dtype of x: 0 for `dropped` of DRAWN numbers, 1 for the others."""
    words = torch.empty(ceil_div(x.numel(), 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (drawn >= dropped - DRAWN // 2).to(x.dtype)


@_kept.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rotate(x_BxTxHxD: Tensor, cos_TxD2: Tensor, sin_TxD2: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), computed in fp32, returned in x's dtype.

    The first and the second half of a head are the real and the imaginary parts.
    cos and sin: of the T positions, or (B, T, D/2) where each row has its own."""
    x = x_BxTxHxD.float()
    real, imaginary = x.chunk(2, dim=-1)
    cos = cos_TxD2[..., None, :]
    sin = sin_TxD2[..., None, :]
    if torch.is_grad_enabled():
        rotated = torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)
        return rotated.to(x_BxTxHxD.dtype)
    # The same in place: uncompiled, it takes a fifth of the time.
    rotated = x * torch.cat((cos, cos), dim=-1)
    rotated_real, rotated_imaginary = rotated.chunk(2, dim=-1)
    rotated_real.addcmul_(imaginary, sin, value=-1)
    rotated_imaginary.addcmul_(real, sin, value=1)
    return rotated.to(x_BxTxHxD.dtype)


def shift_keys(k_BxTxKxD: Tensor, before_Bx1xKxD: Tensor) -> Tensor:
    """Keys, not yet rotated, whose slowly turning half comes from the position before.

    KV shifting (arXiv 2411.19574): a single layer can then find what followed an earlier occurrence
    of a token, which otherwise takes two layers and most of a small run to learn (runs/LOG.md).
    before: the key of the position before the first, or zeros."""
    earlier = torch.cat((before_Bx1xKxD, k_BxTxKxD[:, :-1]), dim=1)
    real, imaginary = k_BxTxKxD.chunk(2, dim=-1)
    real_before, imaginary_before = earlier.chunk(2, dim=-1)
    # Rotary frequencies fall along the half: the first n pairs of channels turn fast.
    n = (real.size(-1) + 1) // 2
    return torch.cat(
        (real[..., :n], real_before[..., n:], imaginary[..., :n], imaginary_before[..., n:]), dim=-1
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    A speedrun model adds QK-norm, shifted keys and, on some layers, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int, backend: str) -> None:
        super().__init__()
        width = config.width
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.window = config.windows()[layer]
        self.backend = backend
        self.qk_norm = config.arch == "speedrun"
        self.key_shift = config.key_shift
        self.dropout = config.dropout
        self.query = Linear(width, self.n_head * self.head_dim)
        self.key = Linear(width, self.n_kv_head * self.head_dim)
        self.value = Linear(width, self.n_kv_head * self.head_dim)
        self.out = Linear(self.n_head * self.head_dim, width)
        self.value_gate = None
        if config.has_value_embedding(layer):
            self.value_gate = Linear(min(GATE_CHANNELS, width), self.n_kv_head)

    def forward(
        self,
        x_BxTxC: Tensor,
        value_embedding_BxTxKD: Tensor | None,
        rope: Rope,
        cache: LayerCache | None,
        fill: bool = False,
    ) -> Tensor | None:
        """What attention adds to the residual stream, (B, T, C).

        fill: only store keys and values in the cache, and return None."""
        B, T, _ = x_BxTxC.shape
        query = None
        if ONE_PRODUCT and self.training and self.query.training_product is None:
            query, key, value = self._one_product(x_BxTxC)
        else:
            key, value = self.key(x_BxTxC), self.value(x_BxTxC)
        raw_BxTxKxD = key.view(B, T, self.n_kv_head, self.head_dim)
        v_BxTxKxD = value.view(B, T, self.n_kv_head, self.head_dim)
        if self.value_gate is not None:
            v_BxTxKxD = self._add_value_embedding(v_BxTxKxD, x_BxTxC, value_embedding_BxTxKD)
        before = cache.key_before if cache is not None and self.key_shift else None
        # Caches store rotated keys, so that no step rotates them again.
        k_BxTxKxD = self._positioned(raw_BxTxKxD, rope, before, shifts=self.key_shift)
        out = None
        if fill:
            cache.append(k_BxTxKxD, v_BxTxKxD)
        else:
            query = self.query(x_BxTxC) if query is None else query
            q_BxTxHxD = query.view(B, T, self.n_head, self.head_dim)
            q_BxTxHxD = self._positioned(q_BxTxHxD, rope)
            attend = attention if cache is None else cache.attend
            attended = attend(q_BxTxHxD, k_BxTxKxD, v_BxTxKxD, self.window, self.backend)
            attended = attended.reshape(B, T, self.n_head * self.head_dim)
            out = dropout(self.out(attended), self.dropout, self.training)
        if self.key_shift and cache is not None:
            # Shifting the next position's key needs this one as it is before rotation.
            cache.remember(raw_BxTxKxD)
        return out

    def _one_product(self, x_BxTxC: Tensor) -> tuple[Tensor, ...]:
        parts = (self.query, self.key, self.value)
        matrix = torch.cat([part.weight for part in parts]).to(x_BxTxC.dtype)
        return F.linear(x_BxTxC, matrix).split([part.out_features for part in parts], dim=-1)

    def _add_value_embedding(
        self, v_BxTxKxD: Tensor, x_BxTxC: Tensor, value_embedding_BxTxKD: Tensor
    ) -> Tensor:
        # a gate of 1 per head at initialisation, between 0 and 2 afterwards
        gate_BxTxK = 2 * torch.sigmoid(self.value_gate(x_BxTxC[..., : self.value_gate.in_features]))
        embedding = value_embedding_BxTxKD.to(v_BxTxKxD.dtype).view_as(v_BxTxKxD)
        return v_BxTxKxD + gate_BxTxK[..., None] * embedding

    def _positioned(
        self,
        heads_BxTxHxD: Tensor,
        rope: Rope,
        before_Bx1xHxD: Tensor | None = None,
        *,
        shifts: bool = False,
    ) -> Tensor:
        """Queries or keys, shifted, rotated and normalised. before: the key before the first."""
        if self.backend == "native" and not torch.is_grad_enabled():
            from nanochat.model.kernels import cpu_reading

            eps = NORM_EPS if self.qk_norm else None
            return cpu_reading.positioned(heads_BxTxHxD, rope, eps, before_Bx1xHxD, shifts=shifts)
        if shifts:
            if before_Bx1xHxD is None:
                # The first token of a row has no predecessor.
                before_Bx1xHxD = torch.zeros_like(heads_BxTxHxD[:, :1])
            heads_BxTxHxD = shift_keys(heads_BxTxHxD, before_Bx1xHxD)
        rotated = rotate(heads_BxTxHxD, *rope)
        return norm(rotated) if self.qk_norm else rotated
