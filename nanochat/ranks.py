"""The few places where ranks meet. With one process every function here is the identity."""

import contextlib
import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.common import Unavailable, UsageError
from nanochat.signals import Stopped

T = TypeVar("T")
# Long, because the other ranks wait while rank 0 reads and tokenizes; torchrun ends them all when
# one dies.
EXCHANGE_TIMEOUT = datetime.timedelta(hours=6)
LOST = "lost the others"  # last word of a rank that ends because another did
# Seconds to wait for last words, at least and at most (torchrun kills a rank 30 s after another
# died).
LEAST_PATIENCE = 3.0
MOST_PATIENCE = 20.0


def rank() -> int:
    """This process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number among those of this machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def print0(*values: object, **options: Any) -> None:
    """print() on rank 0 only, flushed."""
    if rank() == 0:
        print(*values, **{"flush": True, **options})


def setup(device_type: str) -> torch.device:
    """Join the process group if torchrun started this process; returns this rank's device.

    UsageError for more ranks than GPUs, or several on mps."""
    device = torch.device(device_type)
    if device_type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"torchrun started local rank {local_rank()}, but this machine has "
                f"{torch.cuda.device_count()} GPUs; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank())
        # NCCL and torch's defaults both take the current device.
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        if device_type == "mps":
            raise UsageError("--device-type=mps: one process only; start without torchrun")
        on_cuda = device_type == "cuda"
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=EXCHANGE_TIMEOUT,
            device_id=device if on_cuda else None,
        )
    return device


def close() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def reduce_scatter(share: torch.Tensor, everything: torch.Tensor) -> Any:
    """Begin to fill `share` with this rank's part, along dimension 0, of the sum of `everything`
    over the ranks. Returns what to wait() for; until then both tensors must be kept alive and
    unchanged."""
    # torch 2.13 deprecates the names that torch 2.11 has
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return function(share, everything, async_op=True)


def all_gather(everything: torch.Tensor, share: torch.Tensor) -> Any:
    """Begin to fill `everything` with the shares of all ranks, in order along dimension 0; `share`
    may be this rank's part of it. Returns as reduce_scatter()."""
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return function(everything, share, async_op=True)


def from_rank0(value: T) -> T:
    """Rank 0's value of a small picklable Python object, on every rank."""
    if world_size() == 1:
        return value
    # broadcast_object_list() fills a list in place.
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank0_or_raise(action: Callable[[], T]) -> T:
    """action()'s small picklable result, computed on rank 0 only; a UsageError or Unavailable there
    is raised on every rank."""
    result, problem = None, None
    if rank() == 0:
        try:
            result = action()
        except (UsageError, Unavailable) as error:
            problem = error
    # One exchange for both, so that no rank waits for a result that never comes.
    result, problem = from_rank0((result, problem))
    if problem is not None:
        raise problem
    return result


def from_all(value: T) -> list[T]:
    """Every rank's value of a small picklable Python object, as a list by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Agreed:
    """What all ranks have heard before a step. no_data: why a rank has no data, "" if all have.

    From rank 0, whose clock counts: save: a rolling checkpoint is due. steps: the number of steps
    of a time budget, once it is known, else None."""

    no_data: str
    save: bool
    steps: int | None


def agree(
    device: torch.device, *, stop: bool, no_data: str, save: bool, steps: int | None
) -> Agreed:
    """One small exchange, so that all ranks continue or leave at the same step.

    stop, no_data: of this rank; save, steps: read from rank 0. Raises Stopped on every rank if any
    was asked to stop."""
    if world_size() > 1:
        is_first = rank() == 0
        # A sum says all four things: any for the first two, rank 0's for the others.
        mine = [stop, bool(no_data), save and is_first, (steps or 0) if is_first else 0]
        # exact for any number of steps that a run can have
        votes = torch.tensor(mine, dtype=torch.float64, device=device)
        stop_votes, no_data_votes, save_votes, all_steps = sum_over_ranks(votes).tolist()
        stop = stop_votes > 0
        save = save_votes > 0
        steps = int(all_steps) or None
        if no_data_votes and not stop:
            no_data = next(reason for reason in from_all(no_data) if reason)
    if stop:
        raise Stopped
    return Agreed(no_data, save, steps)


def last_word(text: str) -> None:
    """Tell the other ranks why this one ends. Nothing happens if no rank can be reached any
    more."""
    if dist.is_initialized() and world_size() > 1:
        # the store is gone together with the process that held it
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().set(f"last_word/{rank()}", text)


def is_lost_exchange(error: BaseException) -> bool:
    """True for the exceptions with which an exchange fails because another rank is gone."""
    if world_size() == 1:
        return False
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return is_gloo or isinstance(error, dist.DistError)


def who_is_gone(
    step_seconds: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """After a failed exchange: a sentence on the ranks that caused it and their last words; "" if
    no rank did.

    Ranks that only lost another one say LOST; so does this one. A rank in the middle of a step
    finds out at its end, so words are awaited for twice the usual step_seconds; whether a rank that
    stays silent died or is slow cannot be said."""
    last_word(LOST)
    store = dist.distributed_c10d._get_default_store()
    words: dict[int, str] = {}
    # under torchrun the store is the launcher's, else it is rank 0's
    store_is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = min(max(LEAST_PATIENCE, 2 * step_seconds), MOST_PATIENCE)
    deadline = clock() + patience
    try:
        while len(words) < world_size():
            for other in set(range(world_size())) - set(words):
                if store.check([f"last_word/{other}"]):
                    words[other] = store.get(f"last_word/{other}").decode()
            if clock() > deadline:
                break
            sleep(0.05)
    # the store is gone, and with it the process that held it
    except RuntimeError:
        return "" if store_is_launchers or rank() == 0 else "rank 0 is gone"
    silent = f"did not answer within {patience:.3g} s"
    gone = [other for other in range(world_size()) if words.get(other) != LOST]
    fates = {other: f"failed ({words[other]})" if other in words else silent for other in gone}
    return " and ".join(f"rank {other} {fate}" for other, fate in fates.items())
