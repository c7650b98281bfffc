"""Training in fp8 through torchao: which layers gain by it, what it needs, how it is switched on.

A layer keeps its fp32 weight under its own name. While training, its three products take fp8 copies
of the weight, the input and the gradient, each scaled anew to its largest number (dynamic scaling,
arXiv 2209.05433), so that there is no state to save. In evaluation and generation the layer
multiplies in bf16 as any other.

Recipes: tensorwise, one scale per tensor; rowwise, one per row, slower and less hurt by
outliers."""

import dataclasses
import importlib.util
import logging

import torch
from torch import Tensor

from nanochat.common import UsageError
from nanochat.model.decoder import Decoder
from nanochat.model.layers import Linear

# Compute capability of the first GPUs that multiply fp8.
CAPABILITY = (8, 9)
# The hardware needs all dimensions of an fp8 product, tokens included, to be multiples of this.
MULTIPLE = 16
# Least harmonic mean of a layer's two dimensions: a faster product saves time as n_in * n_out
# grows, casting its operands costs time as n_in + n_out does. torchao reports that a product of
# 1024 x 2048 x 1024 is slower in fp8; where the border lies here is not measured.
LEAST_MEAN_DIM = 1024
# For tests: multiply in fp32 what was rounded to fp8, which any device can.
EMULATE = False


def large_layers(model: Decoder) -> dict[str, Linear]:
    """{name: layer} of those that are trained in fp8: linear layers of the blocks whose dimensions
    fit and are large enough. Works on the meta device.

    Not the head: its loss produces gradients of the smallest numbers, and works in chunks."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear) and _gains(layer)
    }


def _gains(layer: torch.nn.Linear) -> bool:
    n_in, n_out = layer.in_features, layer.out_features
    fits = n_in % MULTIPLE == 0 and n_out % MULTIPLE == 0
    return fits and 2 / (1 / n_in + 1 / n_out) >= LEAST_MEAN_DIM


def in_words(model: Decoder, recipe: str) -> str:
    """How much of a model is trained in fp8, as a clause."""
    layers = large_layers(model)
    share = 6 * sum(layer.weight.numel() for layer in layers.values()) / model.flops_per_token()
    return f"{len(layers)} layers with {share:.0%} of the FLOPs in fp8 ({recipe})"


def require(
    model: Decoder,
    device_type: str,
    dtype: torch.dtype,
    no_compiler: str | None,
    capability: tuple[int, int] | None = None,
) -> None:
    """Raise UsageError, naming everything that prevents training a model in fp8.

    model: on any device. no_compiler: why torch.compile is not used, or None. capability: (major,
    minor) of a GPU that is planned for; None is this machine's."""
    problems = []
    device_problem = _device_problem(device_type, dtype, capability)
    if device_problem:
        problems.append(device_problem)
    if no_compiler and not EMULATE:
        problems.append(
            f"slower than bfloat16 when it is not compiled ({no_compiler}); compile, or leave the "
            f"flag out"
        )
    if importlib.util.find_spec("torchao") is None:
        problems.append("the package 'torchao' is missing: pip install torchao==0.18.0")
    if not large_layers(model):
        problems.append(
            f"no layer is large enough to gain (multiples of {MULTIPLE}, harmonic mean of both "
            f"dimensions at least {LEAST_MEAN_DIM}); raise --depth, or leave the flag out"
        )
    if model.config.max_seq_len % MULTIPLE:
        problems.append(
            f"--max-seq-len={model.config.max_seq_len} is not a multiple of {MULTIPLE}; give one "
            f"that is"
        )
    if problems:
        raise UsageError("\n".join(f"--fp8: {problem}" for problem in problems))


def _device_problem(
    device_type: str, dtype: torch.dtype, capability: tuple[int, int] | None
) -> str | None:
    """The first thing about device or dtype that prevents fp8, or None."""
    if not EMULATE:
        if device_type != "cuda":
            return (
                f"a GPU that multiplies fp8 is needed (this is {device_type}); leave the flag out, "
                f"or plan for such a GPU with train.py --dry-run --gpu=NAME"
            )
        major, minor = capability or torch.cuda.get_device_capability()
        if (major, minor) < CAPABILITY:
            return f"SM{major}{minor} does not multiply fp8 (SM89 and later do); leave the flag out"
    if dtype != torch.bfloat16:
        return (
            f"layers that stay out of fp8 need bfloat16, not {str(dtype).removeprefix('torch.')}; "
            f"leave --dtype out"
        )
    return None


def convert(model: Decoder, recipe: str) -> None:
    """Let the large layers of a model multiply in fp8 while it is in training mode.

    Its parameters and their names stay as they are."""
    # On import torchao warns about kernels for other purposes that it could not load.
    logging.disable(logging.WARNING)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    finally:
        logging.disable(logging.NOTSET)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=EMULATE)
    # Converting a layer also makes inductor avoid a Triton bug that turns stored fp8 numbers into
    # NaN, so a throw-away layer is converted.
    layer = torch.nn.Linear(16, 16, bias=False, device="meta")
    settings = convert_to_float8_training(layer, config=config).linear_mm_config

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(x, weight.t(), settings, config)

    for large in large_layers(model).values():
        large.training_product = product
