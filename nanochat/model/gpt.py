"""The models: pre-norm decoders sized by their depth.

Shape legend: B batch rows, T tokens of a row, C width, H query heads, K key/value heads, D head dim, V vocabulary.

GPT (--arch=speedrun) has, beyond the plain decoder, value embeddings (arXiv 2410.17897), shifted keys (arXiv 2411.19574), residual
and x0 lambdas, smear, backout, QK-norm, ReLU^2 and a logit softcap. Llama (--arch=llama) is the plain decoder that other programs know.
Weights are fp32; products run in the compute dtype. No module knows ranks."""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.common import round_up
from nanochat.model.attention import attention
from nanochat.model.loss import linear_cross_entropy, pick_loss

NORM_EPS = 1e-6
ROPE_BASE = 100_000.0
LLAMA_NORM_EPS = 1e-5
LLAMA_ROPE_BASE = 10_000.0
# Standard deviation of Llama's embedding table at initialisation, alone and when it is also the head. Nothing normalises what
# it adds to the stream: at 1, as in GPT, it drowns the blocks' share for the whole of a small run (runs/LOG.md).
LLAMA_TABLE_STD, TIED_TABLE_STD = 0.1, 0.02
ROPE_REACH = 10  # rotary tables cover this many times max_seq_len: CORE prompts and long samples run past the context
GATE_CHANNELS = 16  # leading channels of x that drive the value-embedding and smear gates (fewer if the width is smaller)
LOGIT_SOFTCAP = 15.0
ARCHITECTURES = ("speedrun", "llama")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. Saved whole by asdict() and rebuilt by GPTConfig(**dict)."""

    depth: int
    width: int
    head_dim: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    max_seq_len: int
    window_pattern: str = (
        "SSSL"  # tiled over the layers; L sees the whole context, S the short window; last layer L
    )
    short_window: int = 1024  # keys that a token of an S layer sees, itself included
    dropout: float = 0.0
    arch: str = "speedrun"
    tie_embeddings: bool = False  # llama: the head is the embedding table
    key_shift: bool = False  # half of a key is that of the position before; runs from before there was such a thing have none

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"architecture {self.arch!r}; there are {', '.join(ARCHITECTURES)}")
        if self.arch == "llama" and set(self.window_pattern) != {"L"}:
            raise ValueError(
                f"windows: pattern {self.window_pattern!r}; a llama has full context in all layers, written L"
            )
        if self.arch == "speedrun" and self.tie_embeddings:
            raise ValueError(
                "tied embeddings are for llama; a speedrun model's table and head differ in scale by design"
            )
        if self.arch == "llama" and self.key_shift:
            raise ValueError(
                "shifted keys are for speedrun models; other programs know no such llama"
            )
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"heads do not fit: {self.n_head} query, {self.n_kv_head} key/value, dim {self.head_dim}"
            )
        if (
            not self.window_pattern
            or set(self.window_pattern) - {"S", "L"}
            or self.short_window < 1
        ):
            raise ValueError(
                f"windows: pattern {self.window_pattern!r} of S and L, short window {self.short_window} of 1 or more"
            )

    def windows(self):
        """Visible keys per layer; full context is `no limit`, written as ROPE_REACH * max_seq_len."""
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.depth)]
        letters[-1] = "L"
        return [
            ROPE_REACH * self.max_seq_len if letter == "L" else self.short_window
            for letter in letters
        ]

    def has_value_embedding(self, layer):
        """Alternate layers of a speedrun model have one, the last always."""
        return self.arch == "speedrun" and layer % 2 == (self.depth - 1) % 2


def width_for(depth, aspect_ratio, head_dim):
    """Model width of a depth: depth x aspect ratio, rounded up to a multiple of the head dim."""
    return round_up(depth * aspect_ratio, head_dim)


def norm(x):
    """RMSNorm over the last dimension, without weights."""
    if torch.is_grad_enabled() or x.is_cuda:
        return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    # on a CPU torch writes the squares down; without them and in place it takes half the time
    wide = x.float()
    scale = (
        torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        .square_()
        .div_(x.size(-1))
        .add_(NORM_EPS)
        .rsqrt_()
    )
    return wide * scale if wide is x else wide.mul_(scale).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear without bias whose fp32 weight is cast to the input's dtype for the product."""

    training_product = (
        None  # of (x, weight), in place of that product while training (nanochat/model/fp8.py)
    )

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        if self.training and self.training_product is not None:
            return self.training_product(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x_BxTxHxD, cos_TxD2, sin_TxD2):
    """Rotary position embedding (arXiv 2104.09864), first and second half of the head as real and imaginary parts.

    cos and sin: of the T positions, or (B, T, D/2) where each row has its own."""
    x = x_BxTxHxD.float()
    real, imaginary = x.chunk(2, dim=-1)
    cos, sin = cos_TxD2[..., None, :], sin_TxD2[..., None, :]
    if not torch.is_grad_enabled():  # the same in place: uncompiled, it takes a fifth of the time
        rotated = x * torch.cat((cos, cos), dim=-1)
        for half, other, sign in zip(
            rotated.chunk(2, dim=-1), (imaginary, real), (-1, 1), strict=True
        ):
            half.addcmul_(other, sin, value=sign)
        return rotated.to(x_BxTxHxD.dtype)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1).to(
        x_BxTxHxD.dtype
    )


def shift_keys(k_BxTxKxD, before_Bx1xKxD):
    """Keys, not yet rotated, whose slowly turning half is that of the position before (KV shifting, arXiv 2411.19574).

    A single layer can then find what followed an earlier occurrence of a token, which otherwise takes two layers and most of a small
    run to learn (runs/LOG.md). before: the key of the position before the first, or zeros."""
    earlier = torch.cat((before_Bx1xKxD, k_BxTxKxD[:, :-1]), dim=1)
    (real, imaginary), (real_before, imaginary_before) = (
        k_BxTxKxD.chunk(2, dim=-1),
        earlier.chunk(2, dim=-1),
    )
    n = (real.size(-1) + 1) // 2  # rotary pairs that turn fast
    return torch.cat(
        (real[..., :n], real_before[..., n:], imaginary[..., :n], imaginary_before[..., n:]), dim=-1
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; in a speedrun model with QK-norm, shifted keys and on some layers value embeddings."""

    def __init__(self, config, layer, backend):
        super().__init__()
        C, H, K, D = config.width, config.n_head, config.n_kv_head, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = H, K, D
        self.window = config.windows()[layer]
        self.backend = backend
        self.qk_norm = config.arch == "speedrun"
        self.key_shift = config.key_shift
        self.dropout = config.dropout
        self.query = Linear(C, H * D)
        self.key = Linear(C, K * D)
        self.value = Linear(C, K * D)
        self.out = Linear(H * D, C)
        self.value_gate = (
            Linear(min(GATE_CHANNELS, C), K) if config.has_value_embedding(layer) else None
        )

    def forward(self, x_BxTxC, value_embedding_BxTxKD, rope, cache, fill=False):
        """fill: leave keys and values in the cache, and return nothing."""
        B, T, _ = x_BxTxC.shape
        k = self.key(x_BxTxC).view(B, T, self.n_kv_head, self.head_dim)
        v = self.value(x_BxTxC).view(B, T, self.n_kv_head, self.head_dim)
        if (
            self.value_gate is not None
        ):  # a gate of 1 per head at initialisation, between 0 and 2 afterwards
            gate_BxTxK = 2 * torch.sigmoid(
                self.value_gate(x_BxTxC[..., : self.value_gate.in_features])
            )
            v = v + gate_BxTxK[..., None] * value_embedding_BxTxKD.to(v.dtype).view_as(v)
        raw = k
        if self.key_shift:
            before = cache.key_before if cache is not None else None
            k = shift_keys(raw, torch.zeros_like(raw[:, :1]) if before is None else before)
        k = self._positioned(k, rope)
        out = None
        if fill:
            cache.append(k, v)
        else:
            q = self._positioned(self.query(x_BxTxC).view(B, T, self.n_head, self.head_dim), rope)
            attend = attention if cache is None else cache.attend
            attended = attend(q, k, v, self.window, self.backend).reshape(
                B, T, self.n_head * self.head_dim
            )
            out = F.dropout(self.out(attended), self.dropout, self.training)
        if self.key_shift and cache is not None:
            cache.remember(raw)
        return out

    def _positioned(self, heads_BxTxHxD, rope):
        rotated = rotate(heads_BxTxHxD, *rope)
        return norm(rotated) if self.qk_norm else rotated


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.down(F.relu(self.up(x)).square()), self.dropout, self.training)


class Block(nn.Module):
    """x <- lambda x + mu x0, then attention and MLP, each on a normalised copy and added back."""

    def __init__(self, config, layer, backend):
        super().__init__()
        self.attention = Attention(config, layer, backend)
        self.mlp = MLP(config)

    def forward(
        self, x, x0, residual_lambda, x0_lambda, value_embedding, rope, cache=None, fill=False
    ):
        """fill: leave keys and values in the cache, and return nothing."""
        x = residual_lambda.to(x.dtype) * x + x0_lambda.to(x.dtype) * x0
        attended = self.attention(norm(x), value_embedding, rope, cache, fill)
        if fill:
            return None
        x = x + attended
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Build on the meta device, then materialise with to_empty(device=...) and init_weights(seed)."""

    softcap = LOGIT_SOFTCAP

    def __init__(self, config, compute_dtype=torch.float32, attention_backend="blocked"):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self._add_parts(attention_backend)
        reach, half = ROPE_REACH * config.max_seq_len, config.head_dim // 2
        self.register_buffer("rope_cos", torch.empty(reach, half), persistent=False)
        self.register_buffer("rope_sin", torch.empty(reach, half), persistent=False)
        self.run_mix_embedding = type(
            self
        ).mix_embedding  # a plain function: a bound method would make the model hold itself
        self.loss_backend = "plain"
        self.checkpointing = False  # --activation-checkpointing

    def _add_parts(self, attention_backend):
        """Make the modules and parameters, uninitialised."""
        config = self.config
        C, KD = config.width, config.n_kv_head * config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): nn.Embedding(config.vocab_size, KD)
                for i in range(config.depth)
                if config.has_value_embedding(i)
            }
        )
        self.blocks = nn.ModuleList(
            [Block(config, i, attention_backend) for i in range(config.depth)]
        )
        self.head = Linear(C, config.vocab_size)
        self.residual_lambdas = nn.Parameter(torch.empty(config.depth))
        self.x0_lambdas = nn.Parameter(torch.empty(config.depth))
        self.smear_gate = Linear(min(GATE_CHANNELS, C), 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every parameter and buffer; the same values on every rank and device (drawn on the CPU)."""
        generator = torch.Generator().manual_seed(seed)

        def normal_(parameter, std):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

        def uniform_(parameter, std):
            parameter.copy_(
                (torch.rand(parameter.shape, generator=generator) * 2 - 1) * (3**0.5 * std)
            )

        self._init_parts(normal_, uniform_)
        angle = self._rotary_angles()
        self.rope_cos.copy_(angle.cos())
        self.rope_sin.copy_(angle.sin())

    def _init_parts(self, normal_, uniform_):
        """Fill the parameters. normal_ and uniform_ fill one (parameter, standard deviation) with random numbers.

        Projections back into the residual stream, gates and the smear start at zero, so that each block starts as the
        identity; the head starts small, so that the first loss is ln(V)."""
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

    def _rotary_angles(self):
        """Radians by position and pair of channels, (positions, D/2), on the CPU."""
        # fp64: at position 20,480 an fp32 product is already off by 1e-3 radians
        half = self.config.head_dim // 2
        frequency = ROPE_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
        return torch.outer(torch.arange(self.rope_cos.size(0), dtype=torch.float64), frequency)

    def compile_parts(self):
        """Compile each block, the embedding mix and the loss's softmax, not the whole: layers of one kind share one kernel set.

        Only training mode uses them. Evaluation and generation, whose shapes vary, run the same code uncompiled; but where the
        loss has a kernel, that takes any shape."""
        self.run_mix_embedding = torch.compile(type(self).mix_embedding, dynamic=False)
        self.loss_backend, _ = pick_loss(self.head_weight().device.type, compiled=True)
        for block in self.blocks:
            block.compile(dynamic=False)

    def _stance(self):
        """Context in which compiled parts run compiled in training mode and uncompiled otherwise."""
        return (
            contextlib.nullcontext() if self.training else torch.compiler.set_stance("force_eager")
        )

    def parameter_groups(self):
        """{group name: {parameter name: parameter}}; every parameter is in exactly one group (asserted).

        A table that is also the head is in "embedding", and "unembedding" is then empty."""
        groups = {
            "matrices": {},
            "embedding": {},
            "value_embeddings": {},
            "unembedding": {},
            "scalars": {},
        }
        for name, parameter in self.named_parameters():
            if (
                name.startswith("blocks.")
                and parameter.ndim == 2
                and not name.endswith("value_gate.weight")
            ):
                group = "matrices"
            elif name == "embedding.weight":
                group = "embedding"
            elif name.startswith("value_embeddings."):
                group = "value_embeddings"
            elif name == "head.weight":
                group = "unembedding"
            else:
                assert (
                    parameter.ndim == 1
                    or parameter.numel() <= GATE_CHANNELS * self.config.n_kv_head
                ), name
                group = "scalars"
            groups[group][name] = parameter
        placed = [name for group in groups.values() for name in group]
        assert sorted(placed) == sorted(name for name, _ in self.named_parameters())
        return groups

    def count_parameters(self):
        """{group: number of parameters} and, under 'total', all of them. Works on the meta device."""
        counts = {
            group: sum(p.numel() for p in members.values())
            for group, members in self.parameter_groups().items()
        }
        return counts | {"total": sum(counts.values())}

    def scaling_parameters(self):
        """N of the scaling rules: parameters of the transformer's matrices plus the head."""
        counts = self.count_parameters()
        return (
            counts["matrices"]
            + counts["embedding" if self.config.tie_embeddings else "unembedding"]
        )

    def flops_per_token(self):
        """Training FLOPs (forward and backward) per token of a full row.

        6 per parameter that multiplies a token (arXiv 2204.02311, appendix B: gates included, tables not, unless tied
        to the head), plus attention: 12 x H x D x visible keys a layer, its window counted, no halving for causality."""
        multiplied = sum(
            module.weight.numel() for module in self.modules() if isinstance(module, Linear)
        )
        if self.config.tie_embeddings:
            multiplied += self.embedding.weight.numel()
        keys = sum(min(window, self.config.max_seq_len) for window in self.config.windows())
        return 6 * multiplied + 12 * self.config.n_head * self.config.head_dim * keys

    def mix_embedding(self, raw_BxTxC, previous_Bx1xC):
        """Normalise token embeddings and add the gated previous one (smear). Returns (x0, last normalised embedding).

        previous_Bx1xC: the normalised embedding before the first token, or zeros at the start of a row."""
        x = norm(raw_BxTxC)
        before = torch.cat((previous_Bx1xC, x[:, :-1]), dim=1)
        gate_BxTx1 = torch.sigmoid(self.smear_gate(x[..., : self.smear_gate.in_features]))
        return x + self.smear_lambda.to(x.dtype) * gate_BxTx1 * before, x[:, -1:]

    def hidden(self, ids_BxT, cache=None, fill=False):
        """The residual stream after the last block and its norm, (B, T, C) in the compute dtype.

        fill: only the cache is wanted; returns None, and the last block computes its keys and values only."""
        T = ids_BxT.size(1)
        positions = cache.positions(T) if cache is not None else slice(0, T)
        end = positions.stop if isinstance(positions, slice) else int(positions.max()) + 1
        if end > self.rope_cos.size(0):
            raise ValueError(
                f"{end} positions; this model was built for at most {self.rope_cos.size(0)}"
            )
        rope = self.rope_cos[positions], self.rope_sin[positions]
        with self._stance():
            hidden_BxTxC, last_Bx1xC = self._run_blocks(ids_BxT, rope, cache, fill)
        if cache is not None:
            cache.advance(T, last_Bx1xC)
        return hidden_BxTxC

    def embed(self, ids):
        """Normalised embeddings (..., C) of ids in the compute dtype."""
        return norm(F.embedding(ids, self.embedding.weight).to(self.compute_dtype))

    def _run_block(self, block, *inputs):
        """A block's output. With activation checkpointing its inner tensors are made again in the backward pass, not kept."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _run_blocks(self, ids_BxT, rope, cache, fill):
        """From ids to the normalised residual stream (B, T, C), None with fill, and what the cache keeps of the last token for smear."""
        raw = F.embedding(ids_BxT, self.embedding.weight).to(self.compute_dtype)
        previous = cache.previous_embedding if cache is not None else None
        if previous is None:
            previous = torch.zeros_like(raw[:, :1])
        middle_block = max(0, self.config.depth // 2 - 1)
        x0, last = self.run_mix_embedding(self, raw, previous)
        x = x0
        for i, block in enumerate(self.blocks):
            table = (
                self.value_embeddings[str(i)].weight if self.config.has_value_embedding(i) else None
            )
            value_embedding = F.embedding(ids_BxT, table) if table is not None else None
            layer_cache = cache.layers[i] if cache is not None else None
            x = self._run_block(
                block,
                x,
                x0,
                self.residual_lambdas[i],
                self.x0_lambdas[i],
                value_embedding,
                rope,
                layer_cache,
                fill and block is self.blocks[-1],
            )
            if i == middle_block:
                middle = x
        if fill:
            return None, last
        return norm(x - self.backout_lambda.to(x.dtype) * middle), last

    def head_weight(self):
        """The matrix (V, C) whose products with hidden states are the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden):
        """fp32 logits, (..., V), of hidden states (..., C) in the compute dtype; softcapped in a speedrun model."""
        logits = F.linear(hidden, self.head_weight().to(hidden.dtype)).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(self, ids_BxT, targets_BxT=None, cache=None, reduction="none", upstream=1.0):
        """Logits (B, T, V); given targets, their cross-entropy in nats, fp32: (B, T), 0 where the target is -1, or its mean or sum.

        ids and targets are int64. What is trained on is the mean: it needs the logits only once. upstream: of linear_cross_entropy()."""
        hidden = self.hidden(ids_BxT, cache)
        if targets_BxT is None:
            return self.logits(hidden)
        backend = (
            "plain" if self.loss_backend == "compiled" and not self.training else self.loss_backend
        )
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


class RMSNorm(nn.Module):
    """Llama's norm over the last dimension, with a weight per channel."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=LLAMA_NORM_EPS)


def swiglu_width(width):
    """Hidden size of Llama's MLP: 8/3 of the width, so that its three matrices hold what two of 4 x the width would,
    rounded up to a multiple of 64 for the kernels."""
    return round_up(math.ceil(8 * width / 3), 64)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        hidden = swiglu_width(config.width)
        self.gate = Linear(config.width, hidden)
        self.up = Linear(config.width, hidden)
        self.down = Linear(hidden, config.width)
        self.dropout = config.dropout

    def forward(self, x):
        return F.dropout(self.down(F.silu(self.gate(x)) * self.up(x)), self.dropout, self.training)


class LlamaBlock(nn.Module):
    """Attention and SwiGLU, each on a normalised copy and added back."""

    def __init__(self, config, layer, backend):
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config, layer, backend)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, cache=None, fill=False):
        """fill: leave keys and values in the cache, and return nothing."""
        attended = self.attention(self.attention_norm(x), None, rope, cache, fill)
        if fill:
            return None
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Llama(GPT):
    """The decoder of arXiv 2302.13971, as transformers' LlamaForCausalLM computes it; with config.tie_embeddings the
    embedding table is the head."""

    softcap = None

    def _add_parts(self, attention_backend):
        config = self.config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            [LlamaBlock(config, i, attention_backend) for i in range(config.depth)]
        )
        self.final_norm = RMSNorm(config.width)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size)

    def _init_parts(self, normal_, uniform_):
        """As in GPT: blocks start as the identity, the first loss is ln(V).

        A tied table cannot be as small as a head. It starts at the usual 0.02; the identity would then give every token
        width x 0.02 as its own logit, so the last norm's weight takes that out."""
        std, tied = self.config.width**-0.5, self.config.tie_embeddings
        normal_(self.embedding.weight, TIED_TABLE_STD if tied else LLAMA_TABLE_STD)
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            for projection in (attention.query, attention.key, attention.value, mlp.gate, mlp.up):
                uniform_(projection.weight, std)
            nn.init.zeros_(attention.out.weight)
            nn.init.zeros_(mlp.down.weight)
            nn.init.ones_(block.attention_norm.weight)
            nn.init.ones_(block.mlp_norm.weight)
        nn.init.constant_(
            self.final_norm.weight,
            min(1.0, 1 / (TIED_TABLE_STD * self.config.width)) if tied else 1.0,
        )
        if not tied:
            normal_(self.head.weight, 0.001)

    def _rotary_angles(self):
        # in fp32 and in this order, as transformers computes them: far positions would differ visibly otherwise
        D = self.config.head_dim
        frequency = 1.0 / (LLAMA_ROPE_BASE ** (torch.arange(0, D, 2).float() / D))
        return torch.outer(torch.arange(self.rope_cos.size(0)).float(), frequency)

    def _run_blocks(self, ids_BxT, rope, cache, fill):
        x = F.embedding(ids_BxT, self.embedding.weight).to(self.compute_dtype)
        for i, block in enumerate(self.blocks):
            x = self._run_block(
                block,
                x,
                rope,
                cache.layers[i] if cache is not None else None,
                fill and block is self.blocks[-1],
            )
        return None if fill else self.final_norm(x), None


def meta_model(config, compute_dtype=torch.float32, attention_backend="blocked"):
    """The model of a config (GPT or Llama) on the meta device: shapes without memory, for counting and for build()."""
    with torch.device("meta"):
        return (Llama if config.arch == "llama" else GPT)(config, compute_dtype, attention_backend)


def build(config, device, compute_dtype=torch.float32, attention_backend="blocked", seed=0):
    """An initialised model of config.arch on `device`."""
    model = meta_model(config, compute_dtype, attention_backend)
    model.to_empty(device=device)
    model.init_weights(seed)
    return model


def for_inference(model):
    """The model in eval mode with parameters in the compute dtype: the same results to the last bit, without a cast before each product.

    Where that is fp32, the model itself; else a copy, which takes memory and does not follow when the model is trained on."""
    if model.compute_dtype == torch.float32:
        return model.eval()
    copy = meta_model(model.config, model.compute_dtype, model.blocks[0].attention.backend)
    copy.load_state_dict(
        {name: tensor.to(model.compute_dtype) for name, tensor in model.state_dict().items()},
        assign=True,
    )
    copy.rope_cos, copy.rope_sin = model.rope_cos, model.rope_sin
    return copy.requires_grad_(False).eval()
