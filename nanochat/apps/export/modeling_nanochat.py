"""nanochat's speedrun model for transformers; load it with trust_remote_code=True.

`nanochat export` copies this file into the folder of an exported speedrun model. It works with
transformers 4.57 and newer, and was tried up to 5.24.

Shape legend: B batch rows, T new tokens, S tokens in all, C width, H query heads, K key/value
heads, D head dim, V vocabulary."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# The output's field for the cache: transformers 5.24 renamed past_key_values to cache.
FIELDS = CausalLMOutputWithPast.__dataclass_fields__
CACHE_FIELD = "cache" if "cache" in FIELDS else "past_key_values"
# Arguments that transformers passes to every model, with the values that change nothing here.
NEUTRAL_ARGUMENTS = {
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_router_logits": (False,),
    "is_causal": (True,),
}


class NanochatSpeedrunConfig(PretrainedConfig):
    """The usual names of transformers, and the model's own.

    layer_windows: keys that a token sees in each layer, itself included; 0 is full context.
    value_embedding_layers: the layers that have one. backout_layer: after it the stream is taken
    that is subtracted at the end. gate_channels: leading channels that the gates read. rope_base
    and norm_eps are the usual constants; logit_softcap c gives c tanh(z / c). key_shift: half of
    a key is that of the position before."""

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
        layer_windows=(0, 0),
        value_embedding_layers=(1,),
        backout_layer: int = 0,
        gate_channels: int = 16,
        rope_base: float = 100_000.0,
        norm_eps: float = 1e-6,
        logit_softcap: float = 15.0,
        key_shift: bool = False,
        use_cache: bool = True,
        **kwargs,
    ):
        if hidden_size % num_key_value_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of "
                f"num_key_value_heads {num_key_value_heads}; correct config.json"
            )
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.layer_windows = list(layer_windows)
        self.value_embedding_layers = list(value_embedding_layers)
        self.backout_layer, self.gate_channels = backout_layer, gate_channels
        self.rope_base, self.norm_eps, self.logit_softcap = rope_base, norm_eps, logit_softcap
        self.key_shift, self.use_cache = key_shift, use_cache
        super().__init__(**{**kwargs, "tie_word_embeddings": False})


def rotate(
    x_BxHxTxD: torch.Tensor, cos_BxTxD2: torch.Tensor, sin_BxTxD2: torch.Tensor
) -> torch.Tensor:
    """Rotary position embedding; the halves of a head are real and imaginary parts."""
    real, imaginary = x_BxHxTxD.float().chunk(2, dim=-1)
    cos, sin = cos_BxTxD2[:, None], sin_BxTxD2[:, None]
    rotated = (real * cos - imaginary * sin, imaginary * cos + real * sin)
    return torch.cat(rotated, dim=-1).to(x_BxHxTxD.dtype)


class Attention(nn.Module):
    """Attention of one layer, with value embeddings and shifted keys where the config has them."""

    def __init__(self, config: NanochatSpeedrunConfig, layer: int):
        super().__init__()
        C, H = config.hidden_size, config.num_attention_heads
        K, D = config.num_key_value_heads, config.head_dim
        self.config, self.layer = config, layer
        self.query = nn.Linear(C, H * D, bias=False)
        self.key = nn.Linear(C, K * D, bias=False)
        self.value = nn.Linear(C, K * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)
        self.value_gate = None
        if layer in config.value_embedding_layers:
            self.value_gate = nn.Linear(config.gate_channels, K, bias=False)

    def forward(
        self,
        x_BxTxC,
        value_embedding_BxTxKD,
        rope,
        seen,
        cache,
        embedding_BxTxC,
        start,
        follows_Bx1xTx1,
    ) -> torch.Tensor:
        """Output (B, T, C) of the T new tokens.

        seen: (T, S) or (B, 1, T, S) bool, True where a query sees a key. embedding_BxTxC: what the
        cache keeps for smear. start: tokens in the cache. follows_Bx1xTx1: 1 where the token before
        is of the same text, 0 behind padding; None: everywhere."""
        B, T, C = x_BxTxC.shape
        D, K = self.config.head_dim, self.config.num_key_value_heads
        q = self.query(x_BxTxC).view(B, T, -1, D)
        k = self.key(x_BxTxC).view(B, T, K, D)
        v = self.value(x_BxTxC).view(B, T, K, D)
        if self.value_gate is not None:
            read = x_BxTxC[..., : self.config.gate_channels]
            gate_BxTxK = 2 * torch.sigmoid(self.value_gate(read))
            v = v + gate_BxTxK[..., None] * value_embedding_BxTxKD.view_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.config.key_shift:
            # the slowly turning pairs of a key are those of the position before
            n = (D // 2 + 1) // 2
            slow = torch.cat((k[..., n : D // 2], k[..., D // 2 + n :]), dim=-1)
            first = torch.zeros_like(slow[:, :, :1])
            if start:
                values = cache.layers[self.layer].values
                first = values[:, :, start - 1 : start, D : D + slow.size(-1)]
            before = torch.cat((first.to(slow), slow[:, :, :-1]), dim=2)
            if follows_Bx1xTx1 is not None:
                before = before * follows_Bx1xTx1.to(slow.dtype)
            real, imaginary = before.chunk(2, dim=-1)
            k = torch.cat((k[..., :n], real, k[..., D // 2 : D // 2 + n], imaginary), dim=-1)
        q, k = (F.rms_norm(rotate(x, *rope), (D,), eps=self.config.norm_eps) for x in (q, k))
        if cache is not None:
            # What the next token needs of this one rides along behind the values, so that it goes
            # with them when rows are cut back or change places: slow parts of keys, and in layer 0
            # the embedding, for smear.
            if self.config.key_shift:
                v = torch.cat((v, slow), dim=-1)
            if self.layer == 0:
                embedding = embedding_BxTxC.view(B, T, K, C // K).transpose(1, 2)
                v = torch.cat((v, embedding), dim=-1)
            k, v = cache.update(k, v, self.layer)
            v = v[..., :D]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.size(1) != K)
        return self.out(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """Two layers with a squared ReLU between them."""

    def __init__(self, config: NanochatSpeedrunConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.down = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the same shape as x, (..., C)."""
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and MLP of one layer; the model adds them to its stream."""

    def __init__(self, config: NanochatSpeedrunConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)


class NanochatSpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """The speedrun model with its head."""

    config_class = NanochatSpeedrunConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config: NanochatSpeedrunConfig):
        super().__init__(config)
        C, V, n_layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
        KD = config.num_key_value_heads * config.head_dim
        self.embedding = nn.Embedding(V, C)
        self.value_embeddings = nn.ModuleDict(
            {str(i): nn.Embedding(V, KD) for i in config.value_embedding_layers}
        )
        self.blocks = nn.ModuleList([Block(config, i) for i in range(n_layers)])
        self.head = nn.Linear(C, V, bias=False)
        self.residual_lambdas = nn.Parameter(torch.ones(n_layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(n_layers))
        self.smear_gate = nn.Linear(config.gate_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, for transformers."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Linear:
        """The head, for transformers."""
        return self.head

    def resize_token_embeddings(self, *args, **kwargs):
        """Not supported: raises ValueError."""
        raise ValueError(
            "resize_token_embeddings: this model has an embedding table on several "
            "layers; its vocabulary cannot be resized: train with another "
            "--vocab-size"
        )

    def _norm(self, x):
        return F.rms_norm(x, (x.size(-1),), eps=self.config.norm_eps)

    def _seen(self, window, start, attention_mask_BxS, T, device):
        """Which keys the T queries see: causal, within the window, and no padding.

        A token always sees itself: a softmax over nothing would be NaN."""
        S = start + T
        query = torch.arange(start, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None, :]
        seen = (key <= query) & (key > query - (window or S))
        if attention_mask_BxS is None:
            return seen
        return seen & attention_mask_BxS[:, None, None, :].bool() | (key == query)

    def _rope(self, position_BxT, device):
        """cos and sin of the angles, (B, T, D/2) fp32.

        The angles are fp64 and computed on the CPU: not every device has fp64."""
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device="cpu") / half
        frequency = self.config.rope_base**-exponent
        angle = position_BxT.to("cpu", torch.float64)[..., None] * frequency
        return angle.cos().float().to(device), angle.sin().float().to(device)

    def _refuse_unknown(self, arguments):
        """Errors for arguments that would be ignored: an ignored cache or mask gives rubbish."""
        given = {name: value for name, value in arguments.items() if value is not None}
        unknown = sorted(set(given) - {*NEUTRAL_ARGUMENTS, "inputs_embeds"})
        if unknown:
            raise TypeError(
                f"forward() does not know {', '.join(unknown)} and would ignore what "
                "it says; leave it out. If transformers passes it, use a release that "
                "this model was tried with, 4.57 to 5.24"
            )
        for name, value in given.items():
            if name not in NEUTRAL_ARGUMENTS or value not in NEUTRAL_ARGUMENTS[name]:
                raise ValueError(f"{name} is not supported by this model; leave it out")

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
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """fp32 logits (B, T, V) of input_ids (B, T), and the mean loss if labels are given.

        attention_mask: (B, S), 0 for padding, on the left or on the right. labels: (B, T), -100
        is skipped. cache: what an earlier call returned; releases of transformers before 5.24
        call it past_key_values. num_items_in_batch: the loss is divided by it instead of by the
        number of labels. ValueError for a value that this model does not support, TypeError for
        an argument that it does not know."""
        cache_position = kwargs.pop("cache_position", None)
        self._refuse_unknown(kwargs)
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of one argument; pass one")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                "this model generates with a DynamicCache, not with a "
                f"{type(cache).__name__}; leave out cache_implementation"
            )
        if attention_mask is not None:
            if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
                raise ValueError(
                    "attention_mask must have two dimensions, rows and positions, "
                    "with 0 for padding"
                )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache()
        (B, T), device = input_ids.shape, input_ids.device
        start = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.size(1) != start + T:
            raise ValueError(
                f"attention_mask has {attention_mask.size(1)} positions for {start} "
                f"cached tokens and {T} new ones; it must cover both"
            )
        if cache_position is not None and cache_position.tolist() != list(range(start, start + T)):
            raise ValueError(
                "cache_position must count the new tokens behind the "
                f"{start} cached ones; leave it out"
            )
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=device)[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]
        rope = self._rope(position_ids.expand(B, -1), device)
        windows = self.config.layer_windows
        seen = {
            window: self._seen(window, start, attention_mask, T, device) for window in set(windows)
        }

        # Smear: add the gated embedding of the token before; none at the start of a text, which in
        # a padded row is where the padding ends.
        embedded = self._norm(self.embedding(input_ids))
        if start:
            n_channels = self.config.hidden_size // self.config.num_key_value_heads
            cached = cache.layers[0].values[:, :, start - 1, -n_channels:]
            previous = cached.reshape(B, 1, -1).to(embedded)
        else:
            previous = torch.zeros_like(embedded[:, :1])
        before = torch.cat((previous, embedded[:, :-1]), dim=1)
        follows = None
        if attention_mask is not None:
            follows = F.pad(attention_mask, (1, -1))[:, None, -T:, None]
            before = before * follows[:, 0].to(before.dtype)
        gate = torch.sigmoid(self.smear_gate(embedded[..., : self.config.gate_channels]))
        x0 = embedded + self.smear_lambda.to(embedded.dtype) * gate * before

        x = x0
        for i, block in enumerate(self.blocks):
            x = self.residual_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            values = None
            if i in self.config.value_embedding_layers:
                values = self.value_embeddings[str(i)](input_ids)
            x = x + block.attention(
                self._norm(x), values, rope, seen[windows[i]], cache, embedded, start, follows
            )
            x = x + block.mlp(self._norm(x))
            if i == self.config.backout_layer:
                middle = x
        x = self._norm(x - self.backout_lambda.to(x.dtype) * middle)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        x = x[:, logits_to_keep]
        cap = self.config.logit_softcap
        logits = cap * torch.tanh(self.head(x).float() / cap)
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
