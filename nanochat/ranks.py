"""The few places where ranks meet. With one process every function here is the identity."""

import contextlib
import datetime
import os
import time

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
            raise UsageError(
                f"torchrun started local rank {local_rank}, but this machine has "
                f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        if device_type == "mps":
            raise UsageError("--device-type=mps: one process only; start without torchrun")
        # long: the others wait while rank 0 reads and tokenizes; torchrun ends them all when one dies
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            timeout=datetime.timedelta(hours=6),
            device_id=device if device_type == "cuda" else None,
        )
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
    """Begin to fill `share` with this rank's part, along dimension 0, of the sum of `everything` over the ranks. Returns what to wait()
    for; until then both tensors must be kept and left alone."""
    # torch 2.13 deprecates the names that torch 2.11 has
    return (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(
        share, everything, async_op=True
    )


def all_gather(everything, share):
    """Begin to fill `everything` with the shares of all ranks, in order along dimension 0; `share` may be this rank's part of it.
    Returns as reduce_scatter()."""
    return (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(
        everything, share, async_op=True
    )


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


def from_all(value):
    """Every rank's value of a small picklable Python object, as a list by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


LOST = "lost the others"  # last word of a rank that ends because another did
PATIENCE_SECONDS = (
    3.0,
    20.0,
)  # to wait for last words: at least, at most (torchrun ends a rank by force 30 s after another died)


def last_word(text):
    """Leave word, for the other ranks, of why this one ends. Nothing happens if nobody can be reached any more."""
    if dist.is_initialized() and world_size() > 1:
        with contextlib.suppress(RuntimeError):  # the store went with the process that held it
            dist.distributed_c10d._get_default_store().set(f"last_word/{rank()}", text)


def is_lost_exchange(error):
    """True for the exceptions with which an exchange fails because another rank is not there any more."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError)
        or isinstance(error, RuntimeError)
        and "gloo" in str(error)
    )


def who_is_gone(step_seconds=0.0, clock=time.monotonic, sleep=time.sleep):
    """After a failed exchange: a sentence on the ranks that caused it and their last words; "" if no rank did.

    Ranks that only lost another one say LOST; this one does too. One that is in the middle of a step finds out at its end: twice
    the usual step_seconds are waited for words, and of who is silent then it cannot be said whether it died or is slow."""
    last_word(LOST)
    store, words = dist.distributed_c10d._get_default_store(), {}
    store_is_launchers = (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )  # as under torchrun; else it is rank 0's
    patience = min(max(PATIENCE_SECONDS[0], 2 * step_seconds), PATIENCE_SECONDS[1])
    deadline = clock() + patience
    try:
        while len(words) < world_size():
            for other in set(range(world_size())) - set(words):
                if store.check([f"last_word/{other}"]):
                    words[other] = store.get(f"last_word/{other}").decode()
            if clock() > deadline:
                break
            sleep(0.05)
    except RuntimeError:  # the store is gone, and with it who held it
        return "" if store_is_launchers or rank() == 0 else "rank 0 is gone"
    silent = f"did not answer within {patience:.3g} s"
    return " and ".join(
        f"rank {other} " + (f"failed ({words[other]})" if other in words else silent)
        for other in range(world_size())
        if words.get(other) != LOST
    )
