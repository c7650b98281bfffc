"""nanochat's speedrun model for transformers; load it with trust_remote_code=True.

`nanochat export` copies this file into the folder of an exported speedrun model. It works with
transformers 4.57 and newer, and was tried up to 5.24.

Shape legend: B batch rows, T new tokens, S tokens in all, C width, H query heads, K key/value
heads, D head dim, V vocabulary."""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The output's field for the cache: transformers 5.24 renamed past_key_values to cache.
FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE_FIELD = "cache" if "cache" in FIELDS else "past_key_values"
# Arguments that transformers passes to every model, with the values that do not affect this one.
NEUTRAL_ARGUMENTS = {
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_router_logits": (False,),
    "is_causal": (True,),
}


class NanochatSpeedrunConfig(PretrainedConfig):
    """The usual fields of transformers, and those of this architecture.

    layer_windows: keys that a token sees in each layer, itself included; 0 is full context.
    value_embedding_layers: the layers that have value embeddings. backout_layer: a share of its
    output is subtracted from the last layer's. gate_channels: leading channels that the gates read.
    rope_base: of the rotary positions. norm_eps: of all norms. logit_softcap: c in c tanh(z / c).
    key_shift: half of each key comes from the position before.

    ValueError for widths that the key/value heads do not divide."""

    model_type = "nanochat_speedrun"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 128,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        head_dim: int = 64,
        max_position_embeddings: int = 256,
        layer_windows: Sequence[int] = (0, 0),
        value_embedding_layers: Sequence[int] = (1,),
        backout_layer: int = 0,
        gate_channels: int = 16,
        rope_base: float = 100_000.0,
        norm_eps: float = 1e-6,
        logit_softcap: float = 15.0,
        key_shift: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        # The cache keeps embeddings cut into one part per key/value head.
        if hidden_size % num_key_value_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of "
                f"num_key_value_heads {num_key_value_heads}; correct config.json"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.layer_windows = list(layer_windows)
        self.value_embedding_layers = list(value_embedding_layers)
        self.backout_layer = backout_layer
        self.gate_channels = gate_channels
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        self.logit_softcap = logit_softcap
        self.key_shift = key_shift
        self.use_cache = use_cache
        # The embedding and the head differ in scale by design: they cannot be one table.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


def rotate(
    x_BxHxTxD: torch.Tensor, cos_BxTxD2: torch.Tensor, sin_BxTxD2: torch.Tensor
) -> torch.Tensor:
    """Rotary position embedding; the halves of a head are real and imaginary parts."""
    real, imaginary = x_BxHxTxD.float().chunk(2, dim=-1)
    cos = cos_BxTxD2[:, None]
    sin = sin_BxTxD2[:, None]
    # fp32 up to here: in bf16 each rotation would be rounded to about three digits.
    rotated = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return torch.cat(rotated, dim=-1).to(x_BxHxTxD.dtype)


class Pass(NamedTuple):
    """What every layer needs to know of one forward pass.

    A tuple, because tools that spread a model over devices move what tuples hold.

    rope: cos and sin, (B, T, D/2). start: tokens in the cache. embedding_BxTxC: what the cache
    keeps for smear. follows_Bx1xTx1: 1 where the token before belongs to the same text, 0 behind
    padding; None: everywhere."""

    rope: tuple[torch.Tensor, torch.Tensor]
    cache: DynamicCache | None
    start: int
    embedding_BxTxC: torch.Tensor
    follows_Bx1xTx1: torch.Tensor | None


class Attention(nn.Module):
    """Attention of one layer, with value embeddings and shifted keys where the config has them."""

    def __init__(self, config: NanochatSpeedrunConfig, layer: int) -> None:
        super().__init__()
        C = config.hidden_size
        H = config.num_attention_heads
        K = config.num_key_value_heads
        D = config.head_dim
        self.config = config
        self.layer = layer
        self.query = nn.Linear(C, H * D, bias=False)
        self.key = nn.Linear(C, K * D, bias=False)
        self.value = nn.Linear(C, K * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)
        # Layers without value embeddings have no gate, and so no weight for one in the file.
        self.value_gate = None
        if layer in config.value_embedding_layers:
            self.value_gate = nn.Linear(config.gate_channels, K, bias=False)

    def forward(
        self,
        x_BxTxC: torch.Tensor,
        value_embedding_BxTxKD: torch.Tensor | None,
        seen: torch.Tensor,
        now: Pass,
    ) -> torch.Tensor:
        """Output (B, T, C) of the T new tokens.

        seen: (T, S) or (B, 1, T, S) bool, True where a query sees a key."""
        B, T, _ = x_BxTxC.shape
        q, k, v = self._projected(x_BxTxC, value_embedding_BxTxKD)
        slow = None
        if self.config.key_shift:
            slow = self._slow_parts(k)
            k = self._shifted(k, slow, now)
        q = self._rotated(q, now)
        k = self._rotated(k, now)
        if now.cache is not None:
            k, v = self._with_cached(k, v, slow, now)
        # Only where it is needed: not all of torch's kernels support groups of queries.
        grouped = q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        return self.out(out.transpose(1, 2).reshape(B, T, -1))

    def _projected(
        self, x_BxTxC: torch.Tensor, value_embedding_BxTxKD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D)."""
        B, T, _ = x_BxTxC.shape
        K = self.config.num_key_value_heads
        D = self.config.head_dim
        q = self.query(x_BxTxC).view(B, T, -1, D)
        k = self.key(x_BxTxC).view(B, T, K, D)
        v = self.value(x_BxTxC).view(B, T, K, D)
        if self.value_gate is not None:
            read = x_BxTxC[..., : self.config.gate_channels]
            # Twice the sigmoid: a gate of zero weights passes the value embedding unchanged.
            gate_BxTxK = 2 * torch.sigmoid(self.value_gate(read))
            v = v + gate_BxTxK[..., None] * value_embedding_BxTxKD.view_as(v)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _n_fast(self) -> int:
        """Leading channel pairs of a key that are not shifted."""
        return (self.config.head_dim // 2 + 1) // 2

    def _slow_parts(self, k: torch.Tensor) -> torch.Tensor:
        """The slowly turning pairs of keys: real parts, then imaginary ones."""
        n = self._n_fast()
        half = self.config.head_dim // 2
        return torch.cat((k[..., n:half], k[..., half + n :]), dim=-1)

    def _shifted(self, k: torch.Tensor, slow: torch.Tensor, now: Pass) -> torch.Tensor:
        """Keys whose slowly turning pairs are those of the position before."""
        # With them a single layer finds what followed an earlier occurrence of a token.
        n = self._n_fast()
        D = self.config.head_dim
        # Nothing comes before the first token of a text.
        first = torch.zeros_like(slow[:, :, :1])
        if now.start:
            values = now.cache.layers[self.layer].values
            first = values[:, :, now.start - 1 : now.start, D : D + slow.size(-1)]
        before = torch.cat((first.to(slow), slow[:, :, :-1]), dim=2)
        if now.follows_Bx1xTx1 is not None:
            before = before * now.follows_Bx1xTx1.to(slow.dtype)
        real, imaginary = before.chunk(2, dim=-1)
        return torch.cat((k[..., :n], real, k[..., D // 2 : D // 2 + n], imaginary), dim=-1)

    def _rotated(self, x: torch.Tensor, now: Pass) -> torch.Tensor:
        """Queries or keys at their positions, normalised."""
        # After the rotation, which keeps the length: the order changes rounding only.
        return F.rms_norm(rotate(x, *now.rope), (x.size(-1),), eps=self.config.norm_eps)

    def _with_cached(
        self, k: torch.Tensor, v: torch.Tensor, slow: torch.Tensor | None, now: Pass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all S tokens; the new ones are added to the cache."""
        B, K, T, D = v.shape
        # What the next token needs of this one is stored behind the values, so that it moves with
        # them when rows are cut back or reordered: slow parts of keys, and in layer 0 the
        # embedding, for smear.
        if slow is not None:
            v = torch.cat((v, slow), dim=-1)
        if self.layer == 0:
            embedding = now.embedding_BxTxC.view(B, T, K, -1).transpose(1, 2)
            v = torch.cat((v, embedding), dim=-1)
        k, v = now.cache.update(k, v, self.layer)
        return k, v[..., :D]


class MLP(nn.Module):
    """Two layers with a squared ReLU between them."""

    def __init__(self, config: NanochatSpeedrunConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the same shape as x, (..., C)."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and MLP of one layer; the model adds them to its stream."""

    def __init__(self, config: NanochatSpeedrunConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)


class NanochatSpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """The speedrun model with its head."""

    config_class = NanochatSpeedrunConfig
    base_model_prefix = ""
    # What stays on one device when the model is spread over several.
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: NanochatSpeedrunConfig) -> None:
        super().__init__(config)
        C = config.hidden_size
        V = config.vocab_size
        n_layers = config.num_hidden_layers
        KD = config.num_key_value_heads * config.head_dim
        self.embedding = nn.Embedding(V, C)
        self.value_embeddings = nn.ModuleDict(
            {str(i): nn.Embedding(V, KD) for i in config.value_embedding_layers}
        )
        self.blocks = nn.ModuleList([Block(config, i) for i in range(n_layers)])
        self.head = nn.Linear(C, V, bias=False)
        # Scalars of each layer: how much of the stream, and of its beginning, goes into it.
        self.residual_lambdas = nn.Parameter(torch.ones(n_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(n_layers))
        self.smear_gate = nn.Linear(config.gate_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        # transformers expects it at the end of every __init__.
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, for transformers."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        """The head, for transformers."""
        return self.head

    def resize_token_embeddings(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not supported: raises ValueError."""
        # transformers would resize the embedding and the head, and leave the other tables behind.
        raise ValueError(
            "resize_token_embeddings: this model has embedding tables in several layers, so its "
            "vocabulary cannot be resized; train a model with another --vocab-size"
        )

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), eps=self.config.norm_eps)

    def _seen(
        self,
        window: int,
        start: int,
        attention_mask_BxS: torch.Tensor | None,
        T: int,
        device: torch.device,
    ) -> torch.Tensor:
        """Which keys the T queries see: causal, within the window, and no padding.

        A token always sees itself: a softmax over nothing would be NaN."""
        S = start + T
        query = torch.arange(start, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None, :]
        # `or`: window 0 is full context.
        seen = (key <= query) & (key > query - (window or S))
        # One mask for all rows, without a copy for each.
        if attention_mask_BxS is None:
            return seen
        return seen & attention_mask_BxS[:, None, None, :].bool() | (key == query)

    def _rope(
        self, position_BxT: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the angles, (B, T, D/2) fp32.

        The angles are fp64 and computed on the CPU: not every device has fp64."""
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device="cpu") / half
        frequency = self.config.rope_base**-exponent
        angle = position_BxT.to("cpu", torch.float64)[..., None] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        """Raise errors for arguments that would be ignored.

        Without a cache or a mask that a caller relies on, the results would be wrong."""
        given = {name: value for name, value in arguments.items() if value is not None}
        # inputs_embeds is known but not supported: value embeddings and smear start from ids.
        unknown = sorted(set(given) - {*NEUTRAL_ARGUMENTS, "inputs_embeds"})
        if unknown:
            raise TypeError(
                f"forward() does not know {', '.join(unknown)} and would have to ignore it; leave "
                "it out. If transformers passes it, use a release that this model was tested "
                "with, 4.57 to 5.24"
            )
        for name, value in given.items():
            if name not in NEUTRAL_ARGUMENTS or value not in NEUTRAL_ARGUMENTS[name]:
                raise ValueError(f"{name} is not supported by this model; leave it out")

    def _chosen_cache(
        self,
        cache: DynamicCache | None,
        past_key_values: DynamicCache | None,
        use_cache: bool | None,
    ) -> DynamicCache | None:
        """The cache to read and to extend. ValueError for one of another kind."""
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one argument; pass one")
        if cache is None:
            cache = past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache
        if cache is None and use_cache:
            return DynamicCache()
        # Caches of other kinds return more or fewer than S keys, or store values in another form.
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                "this model generates with a DynamicCache, not with a "
                f"{type(cache).__name__}; leave out cache_implementation"
            )
        return cache

    def _check_positions(
        self,
        attention_mask: torch.Tensor | None,
        cache_position: torch.Tensor | None,
        start: int,
        T: int,
    ) -> None:
        """ValueError for a mask or for positions that do not fit the T tokens behind `start`."""
        if attention_mask is not None:
            if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
                raise ValueError(
                    "attention_mask must have two dimensions, rows and positions, "
                    "with 0 for padding"
                )
            if attention_mask.size(1) != start + T:
                raise ValueError(
                    f"attention_mask has {attention_mask.size(1)} positions for {start} "
                    f"cached tokens and {T} new ones; it must cover both"
                )
        if cache_position is not None and cache_position.tolist() != list(range(start, start + T)):
            raise ValueError(
                f"cache_position must count the new tokens from {start}, the number of cached "
                "ones; leave it out"
            )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        cache: DynamicCache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """fp32 logits (B, T, V) of input_ids (B, T), and the mean loss if labels are given.

        attention_mask: (B, S), 0 for padding, on the left or on the right. labels: (B, T); -100
        is skipped. cache: what an earlier call returned; releases of transformers before 5.24
        call it past_key_values. num_items_in_batch: the loss is divided by it instead of by the
        number of labels. ValueError for a value that this model does not support, TypeError for
        an argument that it does not know."""
        # Older releases of transformers pass it; newer ones warn if it is a named parameter.
        cache_position = kwargs.pop("cache_position", None)
        self._refuse_unknown(kwargs)
        cache = self._chosen_cache(cache, past_key_values, use_cache)
        start = 0 if cache is None else cache.get_seq_length()
        self._check_positions(attention_mask, cache_position, start, input_ids.size(1))
        x = self._hidden(input_ids, attention_mask, position_ids, cache, start)
        # 0 keeps all: -0 is the first position.
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        # In fp32: the soft cap squeezes large logits together, where bf16 has few numbers.
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(self.head(x[:, logits_to_keep]).float() / cap)
        # transformers' own loss shifts the labels, and its trainers rely on its scaling.
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_FIELD: cache})
        return output.to_tuple() if return_dict is False else output

    def _hidden(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: DynamicCache | None,
        start: int,
    ) -> torch.Tensor:
        """The normalised residual stream after the last layer, (B, T, C)."""
        B, T = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = self._positions(attention_mask, start, T, device)
        follows = None
        if attention_mask is not None:
            # The mask shifted by one: whether the token before is one, rather than padding.
            follows = F.pad(attention_mask, (1, -1))[:, None, -T:, None]
        embedded = self._norm(self.embedding(input_ids))
        rope = self._rope(position_ids.expand(B, -1), device)
        now = Pass(rope, cache, start, embedded, follows)
        windows = self.config.layer_windows
        # Layers of one window share a mask.
        seen = {
            window: self._seen(window, start, attention_mask, T, device) for window in set(windows)
        }
        x0 = self._smeared(now)
        x = x0
        for i, block in enumerate(self.blocks):
            x = self.residual_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            values = None
            if i in self.config.value_embedding_layers:
                values = self.value_embeddings[str(i)](input_ids)
            x = x + block.attention(self._norm(x), values, seen[windows[i]], now)
            x = x + block.mlp(self._norm(x))
            # What the middle of the model wrote is partly taken back before the head.
            if i == self.config.backout_layer:
                middle = x
        return self._norm(x - self.backout_lambda.to(x.dtype) * middle)

    def _positions(
        self, attention_mask: torch.Tensor | None, start: int, T: int, device: torch.device
    ) -> torch.Tensor:
        """Positions of the T new tokens, (B, T) or (1, T): padding is not counted."""
        if attention_mask is None:
            return torch.arange(start, start + T, device=device)[None]
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]

    def _smeared(self, now: Pass) -> torch.Tensor:
        """Smear: the embeddings plus a gated share of those of the tokens before, (B, T, C)."""
        embedded = now.embedding_BxTxC
        if now.start:
            n_channels = self.config.hidden_size // self.config.num_key_value_heads
            cached = now.cache.layers[0].values[:, :, now.start - 1, -n_channels:]
            previous = cached.reshape(embedded.size(0), 1, -1).to(embedded)
        else:
            previous = torch.zeros_like(embedded[:, :1])
        before = torch.cat((previous, embedded[:, :-1]), dim=1)
        # A text starts where the padding on its left ends: nothing comes before it.
        if now.follows_Bx1xTx1 is not None:
            before = before * now.follows_Bx1xTx1[:, 0].to(before.dtype)
        gate = torch.sigmoid(self.smear_gate(embedded[..., : self.config.gate_channels]))
        return embedded + self.smear_lambda.to(embedded.dtype) * gate * before
