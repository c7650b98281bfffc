"""From a config to a model: on the meta device, initialised, or as a copy for inference."""

import torch

from nanochat.model.config import GPTConfig
from nanochat.model.decoder import Decoder
from nanochat.model.gpt import GPT
from nanochat.model.llama import Llama


def meta_model(
    config: GPTConfig,
    compute_dtype: torch.dtype = torch.float32,
    attention_backend: str = "blocked",
) -> Decoder:
    """The model of a config on the meta device: shapes without memory, for counting and build()."""
    architecture = Llama if config.arch == "llama" else GPT
    with torch.device("meta"):
        return architecture(config, compute_dtype, attention_backend)


def build(
    config: GPTConfig,
    device: torch.device | str,
    compute_dtype: torch.dtype = torch.float32,
    attention_backend: str = "blocked",
    seed: int = 0,
) -> Decoder:
    """An initialised model of config.arch on `device`."""
    model = meta_model(config, compute_dtype, attention_backend)
    # Memory is allocated once, on the device, without a copy on the CPU.
    model.to_empty(device=device)
    model.init_weights(seed)
    return model


def for_inference(model: Decoder) -> Decoder:
    """The model in eval mode with its parameters in the compute dtype: bit-identical results,
    without a cast before each product.

    In fp32 that is the model itself; otherwise a copy, which takes memory and does not follow when
    training continues."""
    if model.compute_dtype == torch.float32:
        return model.eval()
    copy = meta_model(model.config, model.compute_dtype, model.blocks[0].attention.backend)
    weights = {name: tensor.to(model.compute_dtype) for name, tensor in model.state_dict().items()}
    # assign: the parameters of the copy take the tensors' dtype instead of the fp32 of meta_model()
    copy.load_state_dict(weights, assign=True)
    # Shared, in fp32: rotation is computed in fp32 whatever the compute dtype.
    copy.rope_cos, copy.rope_sin = model.rope_cos, model.rope_sin
    return copy.requires_grad_(False).eval()
