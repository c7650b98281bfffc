"""--shard: weights, gradients and optimizer state split over the ranks by PyTorch's FSDP2
(arXiv 2304.11277).

Each rank keeps a block of rows of every parameter. A block of the model gathers its weights before
it runs, forward and backward, and gives its gradient away as soon as it is made, and so does each
table of value embeddings; embedding, head and vectors are gathered from the beginning of the
forward pass to the end of the backward pass."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat.common import ceil_div
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.model.decoder import Decoder
from nanochat.ranks import rank, sum_over_ranks, world_size


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a model was made by build_sharded()."""
    return hasattr(model, "reshard")


def own_rows(n: int) -> slice:
    """The rows that this rank holds of a parameter of n rows; none if n is small."""
    each = ceil_div(n, world_size())
    return slice(min(rank() * each, n), min((rank() + 1) * each, n))


def is_split(tensor: Tensor) -> bool:
    """Whether a parameter, or its gradient, is split over the ranks: a DTensor, whose module takes
    long to import."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter, or of its gradient; without autograd."""
    return tensor.to_local() if is_split(tensor) else tensor


def put_own_rows(parameter: Tensor, whole: Tensor) -> None:
    """Set this rank's rows of a split parameter to those of a whole tensor."""
    own_part(parameter).copy_(whole[own_rows(len(whole))])


def build_sharded(
    config: GPTConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
    attention_backend: str,
    seed: int,
) -> Decoder:
    """build(), of which each rank only ever holds its rows. Every rank calls it."""
    # Only here, since they take a second to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = meta_model(config, compute_dtype, attention_backend)
    mesh = init_device_mesh(device.type, (world_size(),))
    # Tables are as large as blocks, and needed by one block each.
    tables = getattr(model, "value_embeddings", {})
    # Every layer of a block casts its weights to the compute dtype: they travel in that, and their
    # gradients in fp32, in which they are added up.
    in_products = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=in_products)
    for unit in (*tables.values(), model):
        fully_shard(unit, mesh=mesh)
    model.to_empty(device=device)
    model.init_weights(seed, put_own_rows)
    # Of ValueTable, through which the stream passes; nothing changes the stream in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPValueTable\) returned a view")
    # All evaluations go through it.
    model.hidden = _Together(model)
    return model


class PassFailed(BaseException):
    """A pass of an evaluation failed on this rank, in the middle of exchanges with the others: no
    evaluation can go on from there, so this is no Exception, which they survive. cause: why."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Together:
    """Decoder.hidden() of a sharded model.

    A pass gathers the weights from all ranks, so in an evaluation, where each rank has passes of
    its own, a rank without one runs one of a single token beside those that have one."""

    def __init__(self, model: Decoder) -> None:
        self.hidden = model.hidden
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.model.training:
            return self.hidden(*args, **kwargs)
        self.vote(True)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """A pass in eval mode, beside one of every other rank. Raises PassFailed."""
        try:
            return self.hidden(*args, **kwargs)
        except Exception as error:
            raise PassFailed(error) from error

    def vote(self, has_pass: bool) -> bool:
        """Whether any rank has a pass to run."""
        device = self.model.rope_cos.device
        votes = torch.tensor(float(has_pass), device=device)
        return sum_over_ranks(votes).item() > 0

    def keep_company(self) -> None:
        """Run passes of one token until no rank has one of its own."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.rope_cos.device)
        # As many passes as the ranks that have some, since each gathers in all of them.
        while self.vote(False):
            self.run(token)


@contextlib.contextmanager
def passes_of_its_own(model: torch.nn.Module) -> Iterator[None]:
    """Within it, in eval mode, each rank may run as many passes of a sharded model as it likes, by
    hidden() or forward() but not by calling the model; every rank enters, and meets no other in
    between. Nothing happens for other models. Raises PassFailed."""
    if not is_sharded(model):
        yield
        return
    # What all passes need, once: no pass then gathers anything beyond hidden().
    model.unshard()
    try:
        yield
    except PassFailed:
        # the others are in the middle of a pass, and wait for nothing else
        raise
    except BaseException:
        _end_passes(model)
        raise
    _end_passes(model)


def _end_passes(model: torch.nn.Module) -> None:
    """Keep the other ranks company, and give the weights back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model.hidden.keep_company()
    model.train(was_training)
    model.reshard()
