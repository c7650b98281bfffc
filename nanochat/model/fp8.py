"""Training in fp8 through torchao: which layers gain by it, what it needs, and how a model is told.

A layer keeps its fp32 weight under its own name; while training, its three products take fp8 copies of it, of the input and of the
gradient, each scaled anew to the largest number in it (dynamic scaling, arXiv 2209.05433), so that there is no state to save. In
evaluation and generation the layer multiplies in bf16 as any other.

Recipes: tensorwise, one scale for a tensor; rowwise, one for each row, slower and less hurt by outliers."""

import dataclasses
import importlib.util
import logging

import torch

from nanochat.common import UsageError

CAPABILITY = (8, 9)  # of the first GPUs that multiply fp8
MULTIPLE = 16  # that all dimensions of an fp8 product have to be of, tokens included
# Least harmonic mean of a layer's two dimensions: a faster product saves time as n_in * n_out grows, casting its operands costs time as
# n_in + n_out does. torchao reports a product of 1024 x 2048 x 1024 to be slower in fp8; where the border lies here is not measured.
LEAST_MEAN_DIM = 1024
EMULATE = False  # for tests: multiply in fp32 what was rounded to fp8, which any device can


def large_layers(model):
    """{name: Linear} of a GPT that are trained in fp8: those of the blocks whose dimensions fit and are large enough.

    The head is none of them: its loss makes gradients of the smallest numbers, and works in chunks of its own. Works on the meta device."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("blocks.")
        and isinstance(layer, torch.nn.Linear)
        and layer.in_features % MULTIPLE == 0
        and layer.out_features % MULTIPLE == 0
        and 2 / (1 / layer.in_features + 1 / layer.out_features) >= LEAST_MEAN_DIM
    }


def in_words(model, recipe):
    """How much of a model is trained in fp8, as a clause."""
    layers = large_layers(model)
    share = 6 * sum(layer.weight.numel() for layer in layers.values()) / model.flops_per_token()
    return f"{len(layers)} layers with {share:.0%} of the FLOPs in fp8 ({recipe})"


def require(model, device_type, dtype, no_compiler, capability=None):
    """Raise UsageError, naming all that is in the way of training a GPT (on any device) in fp8.

    no_compiler: why torch.compile is not used, or None. capability: (major, minor) of the GPU, if not that of this machine's."""
    problems, found = (
        [],
        capability or (torch.cuda.get_device_capability() if device_type == "cuda" else None),
    )
    if not EMULATE and device_type != "cuda":
        problems.append(
            f"a GPU that multiplies fp8 is needed (this is {device_type}); leave the flag out, or plan for such a GPU with "
            f"train.py --dry-run --gpu=NAME"
        )
    elif not EMULATE and found < CAPABILITY:
        problems.append(
            f"SM{found[0]}{found[1]} does not multiply fp8 (SM89 and later do); leave the flag out"
        )
    elif dtype != torch.bfloat16:
        problems.append(
            f"what it leaves alone is in bfloat16, not {str(dtype).removeprefix('torch.')}; leave --dtype out"
        )
    if no_compiler and not EMULATE:
        problems.append(
            f"slower than bfloat16 where it is not compiled ({no_compiler}); compile, or leave the flag out"
        )
    if importlib.util.find_spec("torchao") is None:
        problems.append("the package 'torchao' is missing: pip install torchao==0.18.0")
    if not large_layers(model):
        problems.append(
            f"no layer is large enough to gain (multiples of {MULTIPLE}, harmonic mean of both dimensions at least "
            f"{LEAST_MEAN_DIM}); raise --depth, or leave the flag out"
        )
    if model.config.max_seq_len % MULTIPLE:
        problems.append(
            f"--max-seq-len={model.config.max_seq_len} is not a multiple of {MULTIPLE}; give one that is"
        )
    if problems:
        raise UsageError("\n".join(f"--fp8: {problem}" for problem in problems))


def convert(model, recipe):
    """Let the large layers of a GPT multiply in fp8 while it is in training mode. Its parameters and their names stay as they are."""
    logging.disable(
        logging.WARNING
    )  # torchao would tell which of its kernels, for other purposes, it could not load
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    finally:
        logging.disable(logging.NOTSET)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=EMULATE)
    # converting a layer also makes inductor avoid a Triton bug that turns stored fp8 numbers into NaN
    settings = convert_to_float8_training(
        torch.nn.Linear(16, 16, bias=False, device="meta"), config=config
    ).linear_mm_config

    def product(x, weight):
        return matmul_with_hp_or_float8_args.apply(x, weight.t(), settings, config)

    for layer in large_layers(model).values():
        layer.training_product = product
