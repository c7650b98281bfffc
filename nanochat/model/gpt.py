"""The speedrun model (--arch=speedrun): a decoder sized by its depth, with the extras that pay.

Beyond the plain decoder it has value embeddings (arXiv 2410.17897), shifted keys
(arXiv 2411.19574), residual and x0 lambdas, smear, backout, QK-norm, ReLU^2 and a logit softcap.

Shapes: B batch rows, T tokens of a row, C width, K key/value heads, D head dim."""

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.config import GATE_CHANNELS, GPTConfig
from nanochat.model.decoder import Cache, Decoder, Fill
from nanochat.model.kernels import ROW_MULTIPLE
from nanochat.model.layers import Attention, LayerCache, Linear, Rope, dropout, norm

if TYPE_CHECKING:
    # imports triton
    from nanochat.model.kernels.embedding import Places

ROPE_BASE = 100_000.0
LOGIT_SOFTCAP = 15.0

# Device types on which a Triton kernel reads the tables in training. Set to ("cuda",) by
# nanochat/apps/doctor/gpu_checks.py alone, which measures it.
TRITON_TABLES: tuple[str, ...] = ()
# The same for the MLP's products, which then compute ReLU^2 and its derivative.
FUSED_MLP: tuple[str, ...] = ()


class MLP(nn.Module):
    """down(relu(up(x))^2) (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if self.training and self._takes_kernel(x):
            from nanochat.model.kernels.relu_squared import relu_squared_mlp

            out = relu_squared_mlp(x, self.up.weight, self.down.weight)
        else:
            out = self.down(F.relu(self.up(x)).square())
        return dropout(out, self.dropout, self.training)

    def _takes_kernel(self, x: Tensor) -> bool:
        in_fp8 = self.up.training_product is not None or self.down.training_product is not None
        fits = x.dtype == torch.bfloat16 and x.size(-1) % ROW_MULTIPLE == 0
        return x.device.type in FUSED_MLP and fits and not in_fp8


def _rows(
    table_VxC: Tensor, ids_BxT: Tensor, places: "Places | None", dtype: torch.dtype
) -> Tensor:
    """Rows of a table, (B, T, C): in its dtype, or in `dtype` if the kernel reads them."""
    if places is None:
        return F.embedding(ids_BxT, table_VxC)
    from nanochat.model.kernels.embedding import look_up

    return look_up(table_VxC, places, dtype)


class ValueTable(nn.Embedding):
    """A table of value embeddings. The stream passes through, unchanged: so --shard sees, in the
    backward pass, when the table's gradient is made, and need not keep it to the end."""

    def forward(
        self, ids_BxT: Tensor, x: Tensor, places: "Places | None" = None
    ) -> tuple[Tensor, Tensor]:
        """(rows of the table, (B, T, K x D), as _rows() in x's dtype; x)."""
        return _rows(self.weight, ids_BxT, places, x.dtype), x


class Block(nn.Module):
    """x <- lambda x + mu x0, then attention and MLP, each on a normalised copy and added back."""

    def __init__(self, config: GPTConfig, layer: int, backend: str) -> None:
        super().__init__()
        self.attention = Attention(config, layer, backend)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        residual_lambda: Tensor,
        x0_lambda: Tensor,
        value_embedding: Tensor | None,
        rope: Rope,
        cache: LayerCache | None = None,
        fill: bool = False,
    ) -> Tensor | None:
        """The residual stream (B, T, C) after this block.

        fill: only store keys and values in the cache, and return None."""
        # The lambdas are fp32 parameters; the stream stays in the compute dtype.
        x = residual_lambda.to(x.dtype) * x + x0_lambda.to(x.dtype) * x0
        attended = self.attention(norm(x), value_embedding, rope, cache, fill)
        if fill:
            return None
        x = x + attended
        return x + self.mlp(norm(x))


class GPT(Decoder):
    """The speedrun model; see the module's docstring."""

    softcap = LOGIT_SOFTCAP

    def __init__(
        self,
        config: GPTConfig,
        compute_dtype: torch.dtype = torch.float32,
        attention_backend: str = "blocked",
    ) -> None:
        super().__init__(config, compute_dtype)
        vocab_size = config.vocab_size
        value_width = config.n_kv_head * config.head_dim
        layers = range(config.depth)
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.value_embeddings = nn.ModuleDict(
            {
                str(layer): ValueTable(vocab_size, value_width)
                for layer in layers
                if config.has_value_embedding(layer)
            }
        )
        self.blocks = nn.ModuleList([Block(config, layer, attention_backend) for layer in layers])
        self.head = Linear(config.width, vocab_size)
        self.residual_lambdas = nn.Parameter(torch.empty(config.depth))
        self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        self.smear_gate = Linear(min(GATE_CHANNELS, config.width), 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        # A plain function: a bound method would make the model hold a reference to itself.
        self.run_mix_embedding = type(self).mix_embedding

    def init_parameters(self, normal_: Fill, uniform_: Fill) -> None:
        """Projections back into the residual stream, gates and the smear start at zero, so that
        each block starts as the identity; the head starts small: the first loss is ln(V)."""
        # The order of the draws decides the numbers of a seed: never reorder them.
        std = self.config.width**-0.5
        normal_(self.embedding.weight, 1.0)
        for table in self.value_embeddings.values():
            uniform_(table.weight, std)
        for block in self.blocks:
            for projection in (block.attention.query, block.attention.key, block.attention.value):
                uniform_(projection.weight, std)
            uniform_(block.mlp.up.weight, std)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.down.weight)
            if block.attention.value_gate is not None:
                nn.init.zeros_(block.attention.value_gate.weight)
        normal_(self.head.weight, 0.001)
        nn.init.ones_(self.residual_lambdas)
        nn.init.constant_(self.x0_lambdas, 0.1)
        nn.init.zeros_(self.smear_gate.weight)
        nn.init.zeros_(self.smear_lambda)
        nn.init.zeros_(self.backout_lambda)

    def rotary_angles(self) -> Tensor:
        """Radians by position and pair of channels, (positions, D/2), on the CPU."""
        # fp64: at position 20,480 an fp32 product is already off by 1e-3 radians
        half = self.config.head_dim // 2
        frequency = ROPE_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
        return torch.outer(torch.arange(self.rope_cos.size(0), dtype=torch.float64), frequency)

    def compile_parts(self) -> None:
        """As Decoder.compile_parts(), and the embedding mix."""
        super().compile_parts()
        self.run_mix_embedding = torch.compile(type(self).mix_embedding, dynamic=False)

    def mix_embedding(self, raw_BxTxC: Tensor, previous_Bx1xC: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise token embeddings and add the gated previous one (smear).

        Returns (x0, last normalised embedding). previous_Bx1xC: the normalised embedding before the
        first token, or zeros at the start of a row."""
        x = norm(raw_BxTxC)
        before = torch.cat((previous_Bx1xC, x[:, :-1]), dim=1)
        gate_BxTx1 = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
        return x + self.smear_lambda.to(x.dtype) * gate_BxTx1 * before, x[:, -1:]

    def _places(self, ids_BxT: Tensor) -> "Places | None":
        """What the kernel of the tables needs of a batch, once for all of them; None without it."""
        differentiated = self.training and torch.is_grad_enabled()
        if ids_BxT.device.type not in TRITON_TABLES or not differentiated:
            return None
        from nanochat.model.kernels.embedding import places_of

        return places_of(ids_BxT, self.config.vocab_size)

    def run_blocks(
        self, ids_BxT: Tensor, rope: Rope, cache: Cache | None, fill: bool
    ) -> tuple[Tensor | None, Tensor]:
        """See Decoder. The cache keeps the last token's embedding for smear."""
        places = self._places(ids_BxT)
        raw = _rows(self.embedding.weight, ids_BxT, places, self.compute_dtype)
        raw = raw.to(self.compute_dtype)
        previous = cache.previous_embedding if cache is not None else None
        if previous is None:
            # The first token of a row has no predecessor.
            previous = torch.zeros_like(raw[:, :1])
        x0, last = self.run_mix_embedding(self, raw, previous)
        # backout: what the first half of the layers computed may be subtracted before the head
        middle_layer = max(0, self.config.depth // 2 - 1)
        last_layer = self.config.depth - 1
        caches = self.layer_caches(cache)
        x = x0
        for layer, block in enumerate(self.blocks):
            # None is part of a compiled graph's signature: such layers have a graph of their own.
            value_embedding = None
            if self.config.has_value_embedding(layer):
                value_embedding, x = self.value_embeddings[str(layer)](ids_BxT, x, places)
            x = self.run_block(
                block,
                x,
                x0,
                # Tensors, not indices: the layers then share one compiled graph.
                self.residual_lambdas[layer],
                self.x0_lambdas[layer],
                value_embedding,
                rope,
                caches[layer],
                # Nothing reads the output of the last block if only the cache is filled.
                fill and layer == last_layer,
            )
            if layer == middle_layer:
                middle = x
        if fill:
            return None, last
        return norm(x - self.backout_lambda.to(x.dtype) * middle), last
