"""What both models share: positions, loss, compilation, parameter groups, FLOPs.

Shapes: B batch rows, T tokens of a row, C width, D head dim, V vocabulary.

Weights are fp32; products run in the compute dtype. No module knows of ranks."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.model.config import GATE_CHANNELS, ROPE_REACH, GPTConfig
from nanochat.model.layers import LayerCache, Linear, Rope, norm
from nanochat.model.loss import linear_cross_entropy, pick_loss, pick_scoring_loss

# Fills a parameter with random numbers of a given standard deviation.
Fill = Callable[[Tensor, float], None]
# Sets a parameter to a tensor of its shape.
Put = Callable[[Tensor, Tensor], None]


class Cache(Protocol):
    """What a model has read so far; nanochat/eval/kv_cache.py has two.

    layers: one per block. previous_embedding: of the last token, (B, 1, C), for smear, or None."""

    layers: Sequence[LayerCache]
    previous_embedding: Tensor | None

    def positions(self, T: int) -> slice | Tensor:
        """Positions of the next T tokens, or of each row's, (B, T)."""

    def advance(self, n_tokens: int, last_embedding_Bx1xC: Tensor | None) -> None:
        """Count n_tokens as read, once every layer has stored them."""


class Decoder(nn.Module, ABC):
    """A pre-norm decoder: embedding, blocks, head.

    Build it on the meta device, then materialise it with to_empty(device=...) and
    init_weights(seed). A model creates `embedding`, `blocks` (each with an `attention`) and `head`
    (None: the head is the embedding table) in its __init__, sets `softcap`, and defines

    init_parameters(normal_, uniform_)     fills every parameter, drawing in a fixed order
    rotary_angles()                        radians by position and channel pair
    run_blocks(ids, rope, cache, fill)     from ids to the normalised residual stream

    and it calls run_block() for every block, which handles activation checkpointing. A model that
    has more to compile than its blocks extends compile_parts()."""

    softcap: float | None = None
    embedding: nn.Embedding
    blocks: nn.ModuleList
    head: Linear | None

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        shape = (ROPE_REACH * config.max_seq_len, config.head_dim // 2)
        # Not persistent: the tables follow from the config, so checkpoints need not hold them.
        self.register_buffer("rope_cos", torch.empty(shape), persistent=False)
        self.register_buffer("rope_sin", torch.empty(shape), persistent=False)
        self.loss_backend = "plain"
        self.checkpointing = False  # --activation-checkpointing

    # ---- what a model defines ----

    @abstractmethod
    def init_parameters(self, normal_: Fill, uniform_: Fill) -> None:
        """Fill every parameter; the order of the draws is part of the result of a seed."""

    @abstractmethod
    def rotary_angles(self) -> Tensor:
        """Radians by position and pair of channels, (positions, D/2), on the CPU."""

    @abstractmethod
    def run_blocks(
        self, ids_BxT: Tensor, rope: Rope, cache: Cache | None, fill: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The normalised residual stream after the last block, (B, T, C), and the embedding of the
        last token, (B, 1, C), if the cache has to keep it.

        fill: only fill the cache; the stream is None."""

    # ---- set-up ----

    @torch.no_grad()
    def init_weights(self, seed: int, put: Put = Tensor.copy_) -> None:
        """Fill every parameter and buffer.

        The numbers are drawn on the CPU: they are the same on every rank and device. put: how they
        get into a parameter, of which this process may hold only a part."""
        # On the CPU: the generator of a device draws other numbers from the same seed.
        generator = torch.Generator().manual_seed(seed)

        def normal_(parameter: Tensor, std: float) -> None:
            put(parameter, torch.randn(parameter.shape, generator=generator) * std)

        def uniform_(parameter: Tensor, std: float) -> None:
            between_0_and_1 = torch.rand(parameter.shape, generator=generator)
            put(parameter, (between_0_and_1 * 2 - 1) * (3**0.5 * std))

        self.init_parameters(normal_, uniform_)
        angle = self.rotary_angles()
        self.rope_cos.copy_(angle.cos())
        self.rope_sin.copy_(angle.sin())

    def compile_parts(self) -> None:
        """Compile each block and the loss's softmax rather than the whole model.

        Layers of one kind then share one set of kernels. Only training mode uses them: evaluation
        and generation, whose shapes vary, run the same code uncompiled."""
        self.loss_backend, _ = pick_loss(self.head_weight().device.type, compiled=True)
        for block in self.blocks:
            # The shapes of training never change, and kernels for fixed shapes are faster.
            block.compile(dynamic=False)

    # ---- counting; works on the meta device ----

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """{group name: {parameter name: parameter}}; every parameter is in exactly one group.

        A table that is also the head is in "embedding", and "unembedding" is then empty."""
        groups = {
            "matrices": {},
            "embedding": {},
            "value_embeddings": {},
            "unembedding": {},
            "scalars": {},
        }
        for name, parameter in self.named_parameters():
            groups[self._group_of(name, parameter)][name] = parameter
        return groups

    def _group_of(self, name: str, parameter: nn.Parameter) -> str:
        if name == "embedding.weight":
            return "embedding"
        if name == "head.weight":
            return "unembedding"
        if name.startswith("value_embeddings."):
            return "value_embeddings"
        is_gate = name.endswith("value_gate.weight")
        if name.startswith("blocks.") and parameter.ndim == 2 and not is_gate:
            return "matrices"
        # Only vectors and small gates remain: a matrix here would get the wrong optimizer.
        largest_gate = GATE_CHANNELS * self.config.n_kv_head
        assert parameter.ndim == 1 or parameter.numel() <= largest_gate, name
        return "scalars"

    def count_parameters(self) -> dict[str, int]:
        """{group: number of parameters} and, under "total", all of them."""
        counts = {
            group: sum(parameter.numel() for parameter in members.values())
            for group, members in self.parameter_groups().items()
        }
        return counts | {"total": sum(counts.values())}

    def scaling_parameters(self) -> int:
        """N of the scaling rules: parameters of the blocks' matrices plus the head."""
        counts = self.count_parameters()
        # A tied table multiplies every token, as any other head.
        head = "embedding" if self.config.tie_embeddings else "unembedding"
        return counts["matrices"] + counts[head]

    def flops_per_token(self) -> int:
        """Training FLOPs (forward and backward) per token of a full row.

        6 per parameter that multiplies a token (arXiv 2204.02311, appendix B: gates included,
        tables not, unless tied to the head), plus attention: 12 x H x D x visible keys a layer, its
        window counted, not halved for causality."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        multiplied = sum(linear.weight.numel() for linear in linears)
        # The table is no Linear, so as a head it is not yet counted.
        if self.config.tie_embeddings:
            multiplied += self.embedding.weight.numel()
        keys = sum(min(window, self.config.max_seq_len) for window in self.config.windows())
        return 6 * multiplied + 12 * self.config.n_head * self.config.head_dim * keys

    # ---- forward ----

    def hidden(
        self, ids_BxT: Tensor, cache: Cache | None = None, fill: bool = False
    ) -> Tensor | None:
        """The residual stream after the last block and its norm, (B, T, C) in the compute dtype.

        fill: only fill the cache; the last block computes just its keys and values, and the result
        is None. Raises ValueError when positions exceed the rotary tables."""
        T = ids_BxT.size(1)
        positions = cache.positions(T) if cache is not None else slice(0, T)
        if isinstance(positions, slice):
            end = positions.stop
        else:
            # Rows that continue different beginnings have positions of their own.
            end = int(positions.max()) + 1
        # A slice past the end of the tables would silently be cut.
        if end > self.rope_cos.size(0):
            raise ValueError(
                f"{end} positions: this model was built for at most {self.rope_cos.size(0)}"
            )
        rope = (self.rope_cos[positions], self.rope_sin[positions])
        with self._stance():
            hidden_BxTxC, last_Bx1xC = self.run_blocks(ids_BxT, rope, cache, fill)
        if cache is not None:
            cache.advance(T, last_Bx1xC)
        return hidden_BxTxC

    def _stance(self) -> contextlib.AbstractContextManager:
        """Context in which compiled parts run compiled in training mode, uncompiled otherwise."""
        if self.training:
            return contextlib.nullcontext()
        # Every new shape would be compiled, in the middle of an evaluation.
        return torch.compiler.set_stance("force_eager")

    def run_block(self, block: nn.Module, *inputs: object) -> Tensor | None:
        """A block's output.

        Activation checkpointing recomputes its activations in the backward pass instead of storing
        them."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            # The other variant needs inputs that require gradients, and torch advises against it.
            # Without dropout no random number is drawn, so no generator's state has to be kept.
            keeps_rng = self.config.dropout > 0
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=keeps_rng)
        return block(*inputs)

    def layer_caches(self, cache: Cache | None) -> Sequence[LayerCache | None]:
        """The part of a cache that belongs to each block, or None for each."""
        if cache is None:
            return [None] * self.config.depth
        return cache.layers

    def embed(self, ids: Tensor) -> Tensor:
        """Normalised embeddings (..., C) of ids in the compute dtype, as smear reads them."""
        return norm(F.embedding(ids, self.embedding.weight).to(self.compute_dtype))

    def head_weight(self) -> Tensor:
        """The matrix (V, C) whose products with hidden states are the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden states (..., C) in the compute dtype, softcapped if the
        model has a softcap."""
        # fp32 before the softcap: in bf16 tanh would merge large logits.
        logits = F.linear(hidden, self.head_weight().to(hidden.dtype)).float()
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    def forward(
        self,
        ids_BxT: Tensor,
        targets_BxT: Tensor | None = None,
        cache: Cache | None = None,
        reduction: str = "none",
        upstream: float = 1.0,
    ) -> Tensor:
        """Logits (B, T, V), or given targets their cross-entropy in nats, both fp32.

        ids and targets are int64. reduction "none": (B, T), 0 where the target is -1; "mean" over
        the targets that count, or "sum". Training takes the mean, which needs the logits only once.
        upstream: see linear_cross_entropy()."""
        hidden = self.hidden(ids_BxT, cache)
        if targets_BxT is None:
            return self.logits(hidden)
        backend = self.loss_backend
        # Compiled functions are for one shape.
        if not self.training:
            backend = pick_scoring_loss(targets_BxT.device.type)
        nats = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head_weight(),
            targets_BxT.flatten(),
            self.softcap,
            reduction,
            backend,
            upstream,
        )
        return nats.view_as(targets_BxT) if reduction == "none" else nats
