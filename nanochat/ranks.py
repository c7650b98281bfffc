"""The few places where ranks meet. With one process every function here is the identity."""

import datetime
import os

import torch
import torch.distributed as dist

from nanochat.common import Unavailable, UsageError


def rank():
    """This process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """Number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*values, **options):
    """print() on rank 0 only, flushed."""
    if rank() == 0:
        print(*values, **{"flush": True, **options})


def setup(device_type):
    """Join the process group if torchrun started us, and return this rank's torch.device."""
    device = torch.device(device_type)
    if device_type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"torchrun started local rank {local_rank}, but this machine has "
                             f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        if device_type == "mps":
            raise UsageError("--device-type=mps: one process only; start without torchrun")
        # long: the others wait while rank 0 reads and tokenizes; torchrun ends them all when one dies
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6),
                                device_id=device if device_type == "cuda" else None)
    return device


def close():
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor):
    """Sum a tensor over the ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_scatter(share, everything):
    """Fill `share` with this rank's part, along dimension 0, of the sum of `everything` over the ranks."""
    # torch 2.13 deprecates the names that torch 2.11 has
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(share, everything)


def all_gather(everything, share):
    """Fill `everything` with the shares of all ranks, in order along dimension 0."""
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(everything, share)


def from_rank0(value):
    """Rank 0's value of a small picklable Python object, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank0_or_raise(action):
    """action()'s small picklable result, computed on rank 0 only; a UsageError or Unavailable there is raised on every rank."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = action()
        except (UsageError, Unavailable) as error:
            problem = error
    result, problem = from_rank0((result, problem))
    if problem is not None:
        raise problem
    return result


def first_word(text):
    """The first text among all ranks' that is not empty ("" if there is none), on every rank."""
    if world_size() == 1:
        return text
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return next(filter(None, texts), "")
