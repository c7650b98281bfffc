"""config.json and the names of the tensors: of our models as transformers reads them, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UsageError, read_json, write_json
from nanochat.model.config import GATE_CHANNELS, GPTConfig
from nanochat.model.gpt import LOGIT_SOFTCAP, ROPE_BASE
from nanochat.model.layers import NORM_EPS
from nanochat.model.llama import LLAMA_NORM_EPS, LLAMA_ROPE_BASE, swiglu_width

# The file of a speedrun model's code, here and in the exported folder.
MODELING_FILE = "modeling_nanochat.py"
# Tensors of our Llama outside of its blocks -> those of LlamaForCausalLM.
TENSOR_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
# Modules of a block of our Llama -> those of LlamaForCausalLM. Each has a weight and no bias.
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
# Without these fields a Llama has no shape.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Of a config.json without rms_norm_eps, as transformers reads it.
DEFAULT_NORM_EPS = 1e-6
# What our Llama lacks: a config.json may only deny these fields.
UNSUPPORTED = ("attention_bias", "mlp_bias", "sliding_window", "quantization_config", "auto_map")


def tensor_name(name: str, arch: str) -> str:
    """The name in the exported folder of a parameter of our model.

    A speedrun model keeps its names, since its modelling file uses them."""
    if arch != "llama":
        return name
    if name.startswith("blocks."):
        _, layer, module = name.removesuffix(".weight").split(".", 2)
        return f"model.layers.{layer}.{BLOCK_NAMES[module]}.weight"
    return TENSOR_NAMES[name]


# ---- to Hugging Face ----


def write_configs(
    folder: Path, config: GPTConfig, bos: int, pad: int, ends: list[int], dtype: str
) -> None:
    """Write config.json and generation_config.json.

    bos, pad: ids. ends: ids that end a text, the usual one first. dtype: of the saved weights."""
    if config.arch == "llama":
        fields = llama_fields(config)
    else:
        fields = speedrun_fields(config)
    tokens = {"bos_token_id": bos, "eos_token_id": ends[0], "pad_token_id": pad}
    write_json(folder / "config.json", {**fields, "use_cache": True, **tokens, "dtype": dtype})
    if len(ends) > 1:
        # generate() stops at any of them; other programs may expect a single one above
        tokens["eos_token_id"] = ends
    write_json(folder / "generation_config.json", tokens)


def llama_fields(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of the shape of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": swiglu_width(config.width),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": LLAMA_NORM_EPS,
        # Releases of transformers before 5 read only rope_theta, later ones rope_parameters.
        "rope_theta": LLAMA_ROPE_BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": LLAMA_ROPE_BASE},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    }


def speedrun_fields(config: GPTConfig) -> dict[str, Any]:
    """What config.json says of a speedrun model, for NanochatSpeedrunConfig."""
    module = MODELING_FILE.removesuffix(".py")
    return {
        "architectures": ["NanochatSpeedrunForCausalLM"],
        "model_type": "nanochat_speedrun",
        # transformers imports the modelling file by this entry, given trust_remote_code=True.
        "auto_map": {
            "AutoConfig": f"{module}.NanochatSpeedrunConfig",
            "AutoModelForCausalLM": f"{module}.NanochatSpeedrunForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "layer_windows": _windows(config),
        "value_embedding_layers": [i for i in range(config.depth) if config.has_value_embedding(i)],
        "backout_layer": max(0, config.depth // 2 - 1),
        "gate_channels": min(GATE_CHANNELS, config.width),
        "rope_base": ROPE_BASE,
        "norm_eps": NORM_EPS,
        "logit_softcap": LOGIT_SOFTCAP,
        "key_shift": config.key_shift,
        "tie_word_embeddings": False,
    }


def _windows(config: GPTConfig) -> list[int]:
    """Visible keys of each layer; 0 is full context."""
    # Ours is bounded by the rotary tables, which the modelling file does not have.
    return [0 if window > config.max_seq_len else window for window in config.windows()]


# ---- from Hugging Face ----


def read_llama_fields(path: Path) -> dict[str, Any]:
    """The content of a Llama's config.json. UsageError for other models and for runs."""
    content = read_json(path, "Hugging Face folder")
    if not isinstance(content, dict):
        raise UsageError(f"{path}: model_type is None; only a llama model can become a run")
    if "args" in content:
        raise UsageError(
            f"{path} belongs to a run, not to a Hugging Face folder; to export the run, name it as "
            "RUN with --format hf"
        )
    if content.get("model_type") != "llama":
        raise UsageError(
            f"{path}: model_type is {content.get('model_type')!r}; only a llama model can become "
            "a run"
        )
    return content


def llama_shape(content: dict[str, Any], path: Path) -> GPTConfig:
    """The shape of our Llama that computes what the fields describe. path: for messages.

    UsageError, naming every field that is at fault, for a model that our Llama cannot be."""
    # All problems are collected, so that one try names every reason.
    fields = _Fields(path, content, [])
    for name in SIZES:
        is_size = type(content.get(name)) is int and content[name] > 0
        fields.require(name, is_size, "must be a positive integer")
    # The other checks compute with the sizes.
    fields.raise_problems()
    _check_layers(fields)
    _check_positions(fields)
    fields.raise_problems()
    return _shape(fields)


def norm_eps_of(content: dict[str, Any]) -> float:
    """rms_norm_eps of a Llama's fields."""
    return content.get("rms_norm_eps", DEFAULT_NORM_EPS)


@dataclass(frozen=True)
class _Fields:
    """A config.json that is checked field by field, and the problems found in it so far."""

    path: Path
    content: dict[str, Any]
    problems: list[str]

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Note a problem with a field unless a condition holds. wanted: what the field must be."""
        if not holds:
            self.problems.append(f"{self.path}: {name} is {self.content.get(name)!r}; {wanted}")

    def raise_problems(self) -> None:
        """UsageError with a line per problem, if there are any."""
        if self.problems:
            raise UsageError("\n".join(self.problems))


def _check_layers(fields: _Fields) -> None:
    """Note what the MLPs, norms and projections have that ours do not."""
    content = fields.content
    # Our MLP's width follows from the model's. A narrower one is filled with zeros.
    widest = swiglu_width(content["hidden_size"])
    fields.require(
        "intermediate_size",
        content["intermediate_size"] <= widest,
        f"nanochat's llama has {widest} at this width, and cannot hold more",
    )
    fields.require(
        "hidden_act",
        content.get("hidden_act", "silu") == "silu",
        "nanochat's llama has only 'silu'",
    )
    # Ours is fixed; another positive one is a matter of scale.
    eps = norm_eps_of(content)
    fields.require(
        "rms_norm_eps",
        isinstance(eps, int | float) and 0 < eps < 1,
        "must be between 0 and 1",
    )
    for name in UNSUPPORTED:
        fields.require(name, not content.get(name), "nanochat's llama does not support it")


def _check_positions(fields: _Fields) -> None:
    """Note rotary positions other than ours."""
    content = fields.content
    plain = {"rope_type": "default", "rope_theta": LLAMA_ROPE_BASE}
    # Releases of transformers before 5 write only rope_theta.
    rope = content.get("rope_parameters") or {"rope_theta": content.get("rope_theta")}
    fields.require(
        "rope_scaling",
        not content.get("rope_scaling"),
        "nanochat's llama does not scale positions",
    )
    fields.require(
        "rope_theta",
        content.get("rope_theta", LLAMA_ROPE_BASE) == LLAMA_ROPE_BASE,
        f"nanochat's llama has {LLAMA_ROPE_BASE}",
    )
    fields.require(
        "rope_parameters",
        isinstance(rope, dict) and plain | rope == plain,
        f"nanochat's llama has {plain}",
    )


def _shape(fields: _Fields) -> GPTConfig:
    """The config of a Llama whose fields are those of ours."""
    content = fields.content
    width = content["hidden_size"]
    heads = content["num_attention_heads"]
    try:
        return GPTConfig(
            depth=content["num_hidden_layers"],
            width=width,
            head_dim=content.get("head_dim") or width // heads,
            n_head=heads,
            # A missing field is multi-head attention: every query head has its own keys.
            n_kv_head=content.get("num_key_value_heads") or heads,
            vocab_size=content["vocab_size"],
            max_seq_len=content["max_position_embeddings"],
            window_pattern="L",
            arch="llama",
            tie_embeddings=bool(content.get("tie_word_embeddings", False)),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{fields.path}: {error}") from None
