"""The plain decoder that other programs know (--arch=llama).

Shapes: B batch rows, T tokens of a row, C width, D head dim."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import round_up
from nanochat.model.config import GPTConfig
from nanochat.model.decoder import Cache, Decoder, Fill
from nanochat.model.layers import Attention, LayerCache, Linear, Rope, dropout

LLAMA_NORM_EPS = 1e-5
LLAMA_ROPE_BASE = 10_000.0
# Standard deviation of the embedding table at initialisation, alone and when it is also the head.
# No norm follows the table before the residual stream: at 1, as in GPT, it drowns the blocks' share
# for the whole of a small run (runs/LOG.md).
LLAMA_TABLE_STD = 0.1
TIED_TABLE_STD = 0.02


class RMSNorm(nn.Module):
    """Llama's norm over the last dimension, with a weight per channel."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n), in x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=LLAMA_NORM_EPS)


def swiglu_width(width: int) -> int:
    """Hidden size of Llama's MLP for a model width.

    8/3 of the width, so that its three matrices hold as much as two of 4 x the width would, rounded
    up to a multiple of 64 for the kernels."""
    return round_up(math.ceil(8 * width / 3), 64)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = swiglu_width(config.width)
        self.gate = Linear(config.width, hidden)
        self.up = Linear(config.width, hidden)
        self.down = Linear(hidden, config.width)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return dropout(self.down(F.silu(self.gate(x)) * self.up(x)), self.dropout, self.training)


class LlamaBlock(nn.Module):
    """Attention and SwiGLU, each on a normalised copy and added back."""

    def __init__(self, config: GPTConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, layer, backend)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, rope: Rope, cache: LayerCache | None = None, fill: bool = False
    ) -> Tensor | None:
        """The residual stream (B, T, C) after this block.

        fill: only store keys and values in the cache, and return None."""
        # None: a llama has no value embeddings.
        attended = self.attention(self.attention_norm(x), None, rope, cache, fill)
        if fill:
            return None
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Llama(Decoder):
    """The decoder of arXiv 2302.13971, as transformers' LlamaForCausalLM computes it.

    With config.tie_embeddings the embedding table is the head."""

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        attention_backend: str = "blocked",
    ) -> None:
        super().__init__(config, compute_dtype)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            [LlamaBlock(config, layer, attention_backend) for layer in range(config.depth)]
        )
        self.final_norm = RMSNorm(config.width)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size)

    def init_parameters(self, normal_: Fill, uniform_: Fill) -> None:
        """As in GPT, blocks start as the identity and the first loss is ln(V).

        A tied table cannot be as small as a head. It starts at the usual 0.02; the identity would
        then give every token width x 0.02 as its own logit, so the last norm's weight takes that
        out."""
        # The order of the draws decides the numbers of a seed: never reorder them.
        std = self.config.width**-0.5
        tied = self.config.tie_embeddings
        normal_(self.embedding.weight, TIED_TABLE_STD if tied else LLAMA_TABLE_STD)
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            for projection in (attention.query, attention.key, attention.value, mlp.gate, mlp.up):
                uniform_(projection.weight, std)
            nn.init.zeros_(attention.out.weight)
            nn.init.zeros_(mlp.down.weight)
            nn.init.ones_(block.attention_norm.weight)
            nn.init.ones_(block.mlp_norm.weight)
        if tied:
            scale = min(1.0, 1 / (TIED_TABLE_STD * self.config.width))
            nn.init.constant_(self.final_norm.weight, scale)
        else:
            nn.init.ones_(self.final_norm.weight)
            normal_(self.head.weight, 0.001)

    def rotary_angles(self) -> Tensor:
        """Radians by position and pair of channels, (positions, D/2), on the CPU."""
        # In fp32 and in this order, as transformers computes them: otherwise far positions would
        # differ visibly.
        D = self.config.head_dim
        frequency = 1.0 / (LLAMA_ROPE_BASE ** (torch.arange(0, D, 2).float() / D))
        return torch.outer(torch.arange(self.rope_cos.size(0)).float(), frequency)

    def run_blocks(
        self, ids_BxT: Tensor, rope: Rope, cache: Cache | None, fill: bool
    ) -> tuple[Tensor | None, None]:
        """See Decoder. The cache need not keep an embedding."""
        x = F.embedding(ids_BxT, self.embedding.weight).to(self.compute_dtype)
        last_layer = self.config.depth - 1
        caches = self.layer_caches(cache)
        for layer, block in enumerate(self.blocks):
            # Nothing reads the output of the last block if only the cache is filled.
            x = self.run_block(block, x, rope, caches[layer], fill and layer == last_layer)
        if fill:
            return None, None
        return self.final_norm(x), None
