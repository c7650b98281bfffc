"""The few places where ranks meet. With one process every function here is the identity.

A process is alone until check_environment() or setup() finds variables that say otherwise, so that
commands which never exchange anything are not disturbed by variables that were left over."""

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.common import Unavailable, UsageError, human_time, in_a_line
from nanochat.signals import Stopped

T = TypeVar("T")
# What torchrun sets for each process that it starts.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Long, because the other ranks wait while rank 0 reads and tokenizes; torchrun ends them all when
# one dies.
EXCHANGE_TIMEOUT = datetime.timedelta(hours=6)
# Seconds after which a rank that waits for others says so, the factor between this and the next
# time, and the seconds after which it gives up joining them.
FIRST_WORD = 10.0
WORD_FACTOR = 3.0
JOIN_LIMIT = 600.0
# The same for exchanges, in which rank 0 may be tokenizing, and prints that.
FIRST_WORD_OF_EXCHANGES = 60.0
# Seconds of one attempt to reach another machine, and between two attempts.
ATTEMPT = 10.0
BETWEEN_ATTEMPTS = 0.2
LOST = "lost the others"  # last word of a rank that ends because another did
# Seconds to wait for last words, at least and at most (torchrun kills a rank 30 s after another
# died).
LEAST_PATIENCE = 3.0
MOST_PATIENCE = 20.0


# ---- who this process is ----


@dataclass(frozen=True)
class Launch:
    """How this process was started: its number among all and among those of its machine, and where
    they meet. serves: whether this process holds the store through which they find each other;
    under torchrun the launcher does."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = ""
    port: int = 0
    serves: bool = False

    @property
    def place(self) -> str:
        """Where the ranks meet, for messages."""
        return f"{self.host}:{self.port}"


ALONE = Launch()
_launch = ALONE


def check_environment() -> None:
    """Take this process's rank from the environment, where torchrun puts it.

    Called before anything else by programs that share their work between ranks. UsageError for
    variables that do not fit together, such as some that another program left behind."""
    global _launch
    # what the error is printed with
    _launch = ALONE
    # an empty variable is as good as none, to torch as well
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if reasons := _misfits(given):
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(
            f"the environment has {found}, but {' and '.join(reasons)}; torchrun sets these "
            f"variables for the processes that it starts, and here they seem to be left over. "
            f"{_remedy(given)}"
        )
    if int(given.get("WORLD_SIZE", 1)) > 1:
        rank = int(given["RANK"])
        _launch = Launch(
            rank=rank,
            world_size=int(given["WORLD_SIZE"]),
            local_rank=int(given.get("LOCAL_RANK", 0)),
            host=given["MASTER_ADDR"],
            port=int(given["MASTER_PORT"]),
            serves=rank == 0 and not _is_torchruns_store(),
        )


def _misfits(given: dict[str, str]) -> list[str]:
    """What is wrong with the variables that are set, as clauses."""
    numbers = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1}
    wrong = []
    for name in numbers:
        value = given.get(name, "")
        if value.isascii() and value.isdecimal():
            numbers[name] = int(value)
        # a process that is alone needs no port
        elif value and name != "MASTER_PORT":
            wrong.append(f"{name} is not a whole number from 0 up")
    if wrong:
        return wrong
    world_size = numbers["WORLD_SIZE"]
    if world_size == 0:
        return ["WORLD_SIZE must be at least 1"]
    size = f"WORLD_SIZE={world_size}" if "WORLD_SIZE" in given else "WORLD_SIZE, which is not set"
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= world_size:
            wrong.append(f"{name} has to be below {size}")
    if world_size > 1:
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        wrong += [f"{name} is not set" for name in needed if name not in given]
        port = given.get("MASTER_PORT", "1")
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
            wrong.append("MASTER_PORT is not a port from 1 to 65535")
    return wrong


def _remedy(given: Sequence[str]) -> str:
    """What to do about the variables that are set."""
    names = " ".join(name for name in VARIABLES if name in given)
    return (
        f"For one process: unset {names}. For several on this machine: torchrun --standalone "
        f"--nproc_per_node=N -- COMMAND"
    )


def _is_torchruns_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rank() -> int:
    """This process's number among all, 0 without torchrun."""
    return _launch.rank


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return _launch.world_size


def local_rank() -> int:
    """This process's number among those of this machine, 0 without torchrun."""
    return _launch.local_rank


def print0(*values: object, **options: Any) -> None:
    """print() on rank 0 only, flushed."""
    if rank() == 0:
        print(*values, **{"flush": True, **options})


# ---- joining and leaving ----


def setup(device_type: str) -> torch.device:
    """Join the process group if torchrun started this process; returns this rank's device.

    A wait for the others is reported on standard error, ends on a signal, and has a limit.
    UsageError for variables that do not fit together, for more ranks than GPUs, for several on mps;
    Unavailable if the other ranks cannot be reached."""
    check_environment()
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
        _join_hearing_signals(_launch, device)
    return device


class _Wait:
    """What the thread that joins the group waits for, for the main thread to report.

    text: for whom and where. speaks: whether it is this rank that reports it. done: it ended, with
    `error` if it failed. over: nobody waits for it any more."""

    def __init__(self) -> None:
        self.text = ""
        self.speaks = True
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.over = threading.Event()


def _join_hearing_signals(
    launch: Launch, device: torch.device, clock: Callable[[], float] = time.monotonic
) -> None:
    """_join() in a thread, while this one reports what it waits for.

    torch waits inside C++, and Python's signal handlers run in the main thread only, between two
    steps of Python. Unavailable after JOIN_LIMIT seconds."""
    wait = _Wait()

    def work() -> None:
        try:
            _join(launch, device, wait)
        except BaseException as error:
            wait.error = error
        wait.done.set()

    # a daemon: nothing can end it inside C++, and it must not keep the process alive
    threading.Thread(target=work, name="join ranks", daemon=True).start()
    began = clock()
    next_word = FIRST_WORD
    remedy = _remedy_of_joining(launch)
    try:
        while not wait.done.wait(0.1):
            waited = clock() - began
            if waited > JOIN_LIMIT:
                raise Unavailable(
                    f"rank {launch.rank} of {launch.world_size} waited {human_time(waited)} "
                    f"{wait.text}; {remedy}"
                )
            if waited > next_word:
                next_word *= WORD_FACTOR
                if wait.speaks:
                    print(
                        f"rank {launch.rank} of {launch.world_size}: waiting {wait.text}, for "
                        f"{human_time(waited)} now; {remedy}",
                        file=sys.stderr,
                        flush=True,
                    )
    finally:
        wait.over.set()
    if wait.error is not None and is_lost_exchange(wait.error):
        raise Unavailable(
            f"rank {launch.rank} could not join the others at {launch.place} "
            f"({in_a_line(wait.error)}); {remedy}"
        ) from None
    if wait.error is not None:
        raise wait.error


def _remedy_of_joining(launch: Launch) -> str:
    """What to do if the other ranks do not come."""
    if _is_torchruns_store():
        return (
            "for one machine start torchrun with --standalone; for several, every machine has to "
            "reach the address of the first one: name it with --local-addr there"
        )
    return (
        "if this is meant to be one process, the variables are left over: unset "
        + " ".join(VARIABLES)
        + "; for several on one machine: torchrun --standalone"
    )


def _join(launch: Launch, device: torch.device, wait: _Wait) -> None:
    """Find the other ranks, wait until all are there, and form the process group. Returns early
    once the wait is over."""
    store = _open_store(launch, wait)
    if store is None or not _meet_in(store, launch, wait):
        return
    wait.text = f"for connections to the other ranks, all of which came to {launch.place}"
    on_cuda = device.type == "cuda"
    if on_cuda:
        # each thread has a current device of its own
        torch.cuda.set_device(device)
    store.set_timeout(EXCHANGE_TIMEOUT)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=EXCHANGE_TIMEOUT,
        device_id=device if on_cuda else None,
    )


def _open_store(launch: Launch, wait: _Wait) -> dist.TCPStore | None:
    """The store at MASTER_ADDR and MASTER_PORT: created by the rank that serves it, found by the
    others. None once the wait is over; UsageError for a port that is taken."""
    if launch.serves:
        try:
            # by this name in any case: what the others call this machine may not be known here
            return _store("localhost", launch)
        except dist.DistError as error:
            raise UsageError(
                f"MASTER_PORT={launch.port}: rank 0 cannot listen on it ({in_a_line(error)}); is "
                f"another training running? Choose another port, or let torchrun --standalone "
                f"choose one"
            ) from None
    answer = f"for an answer from {launch.place}"
    wait.text = answer
    while not wait.over.is_set():
        try:
            # torch would print a page of warnings about each attempt that fails
            socket.create_connection((launch.host, launch.port), timeout=ATTEMPT).close()
            # not before: while the next attempt is made, the last one's reason is what is known
            wait.text = answer
            return _store(launch.host, launch)
        except OSError as error:
            wait.text = f"for {launch.place} ({error.strerror or in_a_line(error)})"
        wait.over.wait(BETWEEN_ATTEMPTS)
    return None


def _store(host: str, launch: Launch) -> dist.TCPStore:
    """torch's store at a host, on which somebody listens unless it is this process's own."""
    return dist.TCPStore(
        host,
        launch.port,
        launch.world_size,
        is_master=launch.serves,
        timeout=datetime.timedelta(seconds=ATTEMPT),
        # torch's own wait does not say for whom
        wait_for_workers=False,
    )


def _meet_in(store: dist.TCPStore, launch: Launch, wait: _Wait) -> bool:
    """Wait until every rank is at the store; False if the wait was over before."""
    keys = [f"joined/{number}" for number in range(launch.world_size)]
    store.set(keys[launch.rank], "here")
    names_at = time.monotonic()
    while not store.check(keys):
        # asked for one by one only as often as somebody reads it
        if time.monotonic() >= names_at:
            names_at += FIRST_WORD / 4
            missing = [number for number, key in enumerate(keys) if not store.check([key])]
            wait.text = f"for {_ranks_in_words(missing)} to come to {launch.place}"
            # one voice is enough: of those that are there, the first
            wait.speaks = all(number in missing for number in range(launch.rank))
        if wait.over.wait(BETWEEN_ATTEMPTS / 2):
            return False
    return True


def _ranks_in_words(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(map(str, numbers[:8]))
    return f"{len(numbers)} ranks ({shown}{', ...' if len(numbers) > 8 else ''})"


def close() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- exchanges ----


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


def all_to_all(received: torch.Tensor, sent: torch.Tensor) -> Any:
    """Begin to send the parts of `sent`, equal along dimension 0, to the ranks in order, and to
    fill `received` with theirs. Returns as reduce_scatter()."""
    return dist.all_to_all_single(received, sent, async_op=True)


def _meet() -> None:
    """Return when all ranks are here, hearing signals meanwhile.

    Before exchanges of objects, which may wait for hours inside C++, where no signal is heard."""
    on_cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", local_rank()) if on_cuda else torch.device("cpu")
    work = dist.all_reduce(torch.zeros(1, device=device), async_op=True)
    began = time.monotonic()
    next_word = FIRST_WORD_OF_EXCHANGES
    pause = 1e-4
    while not work.is_completed():
        time.sleep(pause)
        # short waits stay short, long ones cost nothing
        pause = min(1.5 * pause, 0.1)
        waited = time.monotonic() - began
        if waited > next_word:
            next_word *= WORD_FACTOR
            # the first that can wait for rank 0
            if rank() == 1:
                text = f"rank 1: waiting for another rank, for {human_time(waited)} now"
                print(text, file=sys.stderr, flush=True)
    # raises what went wrong
    work.wait()


def from_rank0(value: T) -> T:
    """Rank 0's value of a small picklable Python object, on every rank."""
    if world_size() == 1:
        return value
    _meet()
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
    _meet()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Agreed:
    """What all ranks have heard before a step. no_data: why a rank has no data, "" if all have.

    waits: a rank still waits for its data. From rank 0, whose clock counts: save: a rolling
    checkpoint is due. steps: the number of steps of a time budget, once it is known, else None.
    orders: what was asked of the run."""

    no_data: str = ""
    waits: bool = False
    save: bool = False
    steps: int | None = None
    orders: Sequence[Any] = ()


def agree(
    device: torch.device,
    *,
    stop: bool,
    no_data: str = "",
    waits: bool = False,
    save: bool = False,
    steps: int | None = None,
    orders: Sequence[Any] = (),
) -> Agreed:
    """One small exchange, so that all ranks continue or leave at the same step.

    stop, no_data, waits: of this rank; save, steps, orders: read from rank 0. Raises Stopped on
    every rank if any was asked to stop."""
    if world_size() > 1:
        mine = [stop, bool(no_data), waits, 0, 0, 0]
        if rank() == 0:
            mine[3:] = [save, steps or 0, bool(orders)]
        # A sum says all six things: any for the first three, rank 0's for the others. Exact for any
        # number of steps that a run can have.
        votes = torch.tensor(mine, dtype=torch.float64, device=device)
        sums = sum_over_ranks(votes).tolist()
        stop, _, waits, save, _, any_orders = (votes > 0 for votes in sums)
        steps = int(sums[4]) or None
        if sums[1] and not stop:
            no_data = next(reason for reason in from_all(no_data) if reason)
        # rare, so their content costs a second exchange
        orders = from_rank0(orders) if any_orders and not stop else ()
    if stop:
        raise Stopped
    return Agreed(no_data, waits, save, steps, orders)


def last_word(text: str) -> None:
    """Tell the other ranks why this one ends. Nothing happens if no rank can be reached any
    more."""
    if dist.is_initialized() and world_size() > 1:
        # the store is gone together with the process that held it
        with contextlib.suppress(RuntimeError):
            dist.distributed_c10d._get_default_store().set(f"last_word/{rank()}", text)


def tell(key: str, text: str) -> None:
    """Leave a text for the other ranks. From any thread; no rank waits for it."""
    dist.distributed_c10d._get_default_store().set(key, text)


def told(key: str) -> str | None:
    """The text that a rank has left under a key, or None if there is none yet. From any thread."""
    store = dist.distributed_c10d._get_default_store()
    return store.get(key).decode() if store.check([key]) else None


def said_last_word(number: int) -> bool:
    """Whether a rank has said that it ends."""
    return told(f"last_word/{number}") is not None


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
        return "" if _is_torchruns_store() or rank() == 0 else "rank 0 is gone"
    silent = f"did not answer within {patience:.3g} s"
    gone = [other for other in range(world_size()) if words.get(other) != LOST]
    fates = {other: f"failed ({words[other]})" if other in words else silent for other in gone}
    return " and ".join(f"rank {other} {fate}" for other, fate in fates.items())
