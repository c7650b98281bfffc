"""What fits: the memory of a training step, estimated and measured, and the rows of one pass.

A pass is one forward and backward on one device; a step accumulates as many passes as its batch
needs. Fewer rows per pass need less memory and give the same batch."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat import hardware, limits, ranks
from nanochat.common import (
    TrainingFailed,
    UsageError,
    cached,
    human_bytes,
    in_a_line,
    sha256_hex,
    write_json,
)
from nanochat.model.attention import KEEP_SCORES, QUERY_BLOCK, visited_keys
from nanochat.model.config import GPTConfig
from nanochat.model.loss import EAGER_LOGITS, chunk_logits

if TYPE_CHECKING:
    from nanochat.run.plan import Plan

# Tokens of a pass from which more rows are not tried: they would make a GPU hardly faster, and a
# trial compiles everything anew.
ENOUGH_TOKENS = {"cuda": 2**17}
# Part of the key of measured numbers. Raise it when a change of the code makes old ones wrong.
MEASURED_AS = 3
# Share of the free memory that a plan may use. A GPU has no other users.
MEMORY_SHARE = {"cuda": 0.9, "mps": 0.6, "cpu": 0.8}
# What a block keeps for its backward pass, per token: elements in the compute dtype per channel of
# the stream and of the keys, measured at depths 4 to 8 with contexts of 256 to 1,024 (runs/LOG.md).
# Keyed by (architecture, compiled).
KEPT_ELEMENTS = {
    ("speedrun", True): (16.0, 3.5),
    ("speedrun", False): (20.0, 4.5),
    ("llama", True): (13.5, 3.5),
    ("llama", False): (21.0, 4.5),
}
# Copies of EAGER_LOGITS that the uncompiled loss makes besides the logits and their gradient.
EAGER_LOSS_COPIES = 4
# Elements of a block's backward pass, per channel of the stream.
GRADIENT_ELEMENTS = 9.0
# Bytes of the update's copies, per parameter of the matrices.
UPDATE_BYTES = 9.65
# On a CPU: what the process holds besides tensors (torch, the compiler, the data).
PROCESS_BYTES = 460e6
# On a CPU: how much larger than its tensors the C library's heap grows, because it cannot reuse all
# that was freed. Measured with glibc 2.36.
HEAP_FACTOR = 1.6
# Of the state: the copy that a save writes, and what writing it and reading it back takes.
SAVING_FACTOR = 2.5


@dataclass(frozen=True)
class StepMemory:
    """The estimated memory of a training step, as a function of the rows per pass.

    parameters: as from count_parameters() of the model. optimizer: "muon" or "adamw". saves:
    whether checkpoints are saved meanwhile. world_size: ranks that share the optimizer's state.
    stacked: elements of the stacks of matrices that these exchange, with their padding
    (scaling.stacked_elements()). shard: parameters and gradients are shared as well.
    tests/test_memory.py compares the estimate with measured bytes, to 20%."""

    config: GPTConfig
    parameters: Mapping[str, int]
    compute_dtype: torch.dtype
    backend: str
    optimizer: str = "muon"
    compiled: bool = True
    activation_checkpointing: bool = False
    device_type: str = "cpu"
    saves: bool = True
    world_size: int = 1
    stacked: int = 0
    shard: bool = False

    def process_bytes(self, rows: int) -> int:
        """Peak bytes with `rows` rows per pass: on a CPU of the whole process, else of tensors."""
        tensors = self.tensor_bytes(rows)
        if self.device_type != "cpu":
            return tensors
        saving = 0
        if self.saves:
            saving = SAVING_FACTOR * state_bytes(self.parameters, self.optimizer)
        return round(PROCESS_BYTES + HEAP_FACTOR * tensors + saving)

    def tensor_bytes(self, rows: int) -> int:
        """Peak bytes of tensors with `rows` rows per pass.

        Weights, gradients, optimizer state, activations, the loss and copies. The peak is at the
        loss, at either end of the backward pass or in the update, depending on the shape."""
        config = self.config
        C, V = config.width, config.vocab_size
        tokens = rows * config.max_seq_len
        element = self.compute_dtype.itemsize
        layers = self._layer_bytes(tokens)
        largest_layer = max(layers)
        kept = self._kept_bytes(tokens, layers)
        copies = self._softmax_bytes(rows)
        # The gradients of the head and of the hidden states.
        head = 4 * V * C + tokens * element * C
        chunk = min(tokens * V, chunk_logits(self.device_type))
        loss = kept + head + 2 * element * chunk + 2 * element * V * C
        # Where nothing is compiled, the steps from logits to their gradients are tensors, in fp32.
        if not self.compiled:
            loss += 4 * EAGER_LOSS_COPIES * min(chunk, EAGER_LOGITS)
        # The backward pass recomputes one block after the other, each whole.
        recomputed = 0
        if self.activation_checkpointing:
            recomputed = largest_layer
        gradients = tokens * element * GRADIENT_ELEMENTS * C
        backward_begins = kept + head + recomputed + gradients + copies
        if self.shard:
            return round(self._sharded_bytes() + max(loss, backward_begins))
        weights = 4 * self.parameters["total"]
        gradients = weights
        backward_ends = gradients + largest_layer + copies
        most = max(
            loss,
            backward_begins,
            backward_ends,
            gradients + self._reduced_bytes(),
            gradients + self._update_bytes(),
        )
        return round(weights + self._moments() + most)

    def _moments(self) -> float:
        """Bytes of the optimizer's state on this rank."""
        weights = 4 * self.parameters["total"]
        moments = state_bytes(self.parameters, self.optimizer) - weights
        # Padding has a momentum as well.
        if self.stacked:
            moments += 4 * (self.stacked - self.parameters["matrices"])
        return moments / self.world_size

    def _reduced_bytes(self) -> float:
        """Bytes of the exchange of gradients: the stacks, and this rank's share of all."""
        if self.world_size == 1:
            return 0.0
        others = self.parameters["total"] - self.parameters["matrices"]
        copies = 4 * self.stacked
        # gloo, which serves CPUs, reduces a copy of everything that it is given.
        if self.device_type == "cpu":
            copies += 4 * (self.stacked + others)
        return copies + 4 * (self.stacked + others) / self.world_size

    def _update_bytes(self) -> float:
        """Bytes of what an update copies: all stacks of matrices, and the work on one's share."""
        if self.world_size == 1:
            return UPDATE_BYTES * self.parameters["matrices"]
        # The whole stacks, first of the gradients, then of the parameters, in fp32.
        share = self.stacked / self.world_size
        own_gradients = 4 * (self.parameters["total"] - self.parameters["matrices"])
        return 4 * self.stacked + UPDATE_BYTES * share + own_gradients / self.world_size

    def _sharded_bytes(self) -> float:
        """Bytes of parameters, gradients and state that are shared by all ranks, and of the two
        largest blocks that a rank has whole: the one that it computes and the next, with their
        gradients in fp32."""
        config = self.config
        blocks = self.parameters["matrices"] / config.depth
        largest = max(blocks, config.vocab_size * config.width)
        shared = 8 * self.parameters["total"] / self.world_size
        update = UPDATE_BYTES * self.stacked / self.world_size
        return shared + self._moments() + max(update, 2 * largest * (4 + 4))

    def _layer_bytes(self, tokens: int) -> list[float]:
        """Bytes that each block keeps for its backward pass if nothing is recomputed."""
        config, element = self.config, self.compute_dtype.itemsize
        of_stream, of_keys = KEPT_ELEMENTS[config.arch, self.compiled]
        key_channels = config.n_kv_head * config.head_dim
        channels = element * (of_stream * config.width + of_keys * key_channels)
        return [
            tokens * (channels + element * config.n_head * self._kept_keys(window))
            for window in config.windows()
        ]

    def _kept_keys(self, window: int) -> float:
        """Weights that a head's attention keeps per query: of every score that it computes, or
        none where the backward pass recomputes them."""
        from nanochat.model.kernels.cpu_training import TILE_CHUNK, tiled_weights

        context = self.config.max_seq_len
        if self.backend not in KEEP_SCORES:
            return 0
        has_tiles = self.compute_dtype == torch.float32 or hardware.cpu_multiplies_bf16()
        if self.backend == "native" and has_tiles and self.config.head_dim % TILE_CHUNK == 0:
            return tiled_weights(context, window) / context
        return visited_keys(context, window)

    def _kept_bytes(self, tokens: int, layers: list[float]) -> float:
        """Bytes that the forward pass leaves for the backward pass."""
        config, element = self.config, self.compute_dtype.itemsize
        if self.activation_checkpointing:
            # The stream between blocks, and the rows that value embeddings look up, in fp32.
            tables = sum(config.has_value_embedding(layer) for layer in range(config.depth))
            key_channels = config.n_kv_head * config.head_dim
            streams = (config.depth + 5) * element * config.width
            return tokens * (streams + 4 * tables * key_channels)
        # Autograd also keeps the matrices as they were cast to a narrower compute dtype.
        cast = 0
        if element < 4:
            cast = element * self.parameters["matrices"]
        return sum(layers) + cast

    def _softmax_bytes(self, rows: int) -> int:
        """Bytes of the fp32 copies that the softmax of a block of queries makes uncompiled."""
        if self.compiled or self.backend != "blocked":
            return 0
        T = self.config.max_seq_len
        widest = max(min(window, T) for window in self.config.windows())
        keys = min(T, widest + QUERY_BLOCK)
        return 16 * rows * self.config.n_head * min(T, QUERY_BLOCK) * keys


def state_bytes(parameters: Mapping[str, int], optimizer: str) -> int:
    """Bytes of weights and optimizer state, all fp32, which are also those of a checkpoint.

    AdamW keeps two moments of a parameter, Muon one. parameters: as for StepMemory."""
    three_tensors = 12 * parameters["total"]
    if optimizer == "muon":
        return three_tensors - 4 * parameters["matrices"]
    return three_tensors


def candidates(rows: int) -> list[int]:
    """Numbers of rows per pass that add up to `rows`: powers of two that divide it, and itself."""
    powers = {2**i for i in range(rows.bit_length()) if rows % 2**i == 0}
    return sorted(powers | {rows})


def free_memory(device: torch.device, processes: int) -> float:
    """Bytes that each of `processes` processes may count on: on a CPU they share its memory."""
    free = hardware.free_memory(device)
    if device.type == "cpu":
        return free / processes
    return free


def pick_device_batch(
    memory: Callable[[int], int],
    *,
    device_batch_size: int,
    rows_per_step: int,
    max_seq_len: int,
    free_bytes: float,
    world_size: int,
    device_type: str,
) -> int:
    """Rows per pass: as given, else the largest of candidates() that is estimated to fit.

    memory: StepMemory.process_bytes. device_batch_size: as --device-batch-size, -1 picks.
    rows_per_step: of all ranks together. UsageError if the rows do not divide evenly, or if not
    even one row fits."""
    if rows_per_step % world_size:
        divisors = [str(n) for n in range(1, rows_per_step + 1) if rows_per_step % n == 0]
        raise UsageError(
            f"the batch of {rows_per_step} rows does not divide evenly among {world_size} ranks; "
            f"start with {' or '.join(divisors)} ranks"
        )
    rows = rows_per_step // world_size
    if device_batch_size != -1:
        _check_given(memory, device_batch_size, rows, free_bytes, world_size, device_type)
        return device_batch_size
    share = MEMORY_SHARE[device_type]
    fitting = [n for n in candidates(rows) if memory(n) <= share * free_bytes]
    if not fitting:
        raise UsageError(
            f"--max-seq-len={max_seq_len}: one row is estimated to need {human_bytes(memory(1))}, "
            f"but a plan may use only {share:.0%} of the {human_bytes(free_bytes)} that are free"
            f"{_limit_in_words(device_type)}; lower --max-seq-len or --depth, add "
            f"--activation-checkpointing, or give --device-batch-size=1 to try anyway"
        )
    return fitting[-1]


def _limit_in_words(device_type: str) -> str:
    """What keeps this process from using memory of a machine, in brackets, or ""."""
    limit = limits.free_memory().limit if device_type == "cpu" else ""
    return f" ({limit})" if limit else ""


def _check_given(
    memory: Callable[[int], int],
    given: int,
    rows: int,
    free_bytes: float,
    world_size: int,
    device_type: str,
) -> None:
    """UsageError if the given rows per pass do not divide a rank's rows or clearly do not fit."""
    if rows % given:
        raise UsageError(
            f"--device-batch-size={given}: does not divide the {rows} rows that each of "
            f"{world_size} ranks takes per step; use a divisor of {rows}"
        )
    # The estimate may be wrong, but not by a factor of two.
    if memory(given) > 2 * free_bytes:
        raise UsageError(
            f"--device-batch-size={given}: is estimated to need {human_bytes(memory(given))}, but "
            f"only {human_bytes(free_bytes)} are free{_limit_in_words(device_type)}; omit the flag "
            f"to use as many rows as fit"
        )


def settle(
    trial: Callable[[int], Any],
    first: int,
    fixed: bool,
    plan: "Plan",
    key: Any,
    device: torch.device,
    report: Callable[[str], None],
    free_bytes: Callable[[torch.device, int], float] = free_memory,
    allocated_peak: Callable[[Callable[[], Any], torch.device], int | None] = (
        hardware.allocated_peak
    ),
) -> int:
    """The number of rows per pass, found by trying: the largest of candidates() that fits.

    trial(n): a forward and backward pass of n rows, as in training, that adds to the gradients; on
    return it has been run, and so compiled, for the number that is returned. first: the number to
    begin with. fixed: `first` was requested and must not change. key: JSON that determines what a
    row needs, which is measured and saved under the base dir, so that the next start need not
    measure it. free_bytes, allocated_peak: how memory is measured.

    Every rank must call it and gets the same number. TrainingFailed if not even one row fits."""
    if fixed:
        trial(first)
        return first
    world_size = ranks.world_size()
    rows = plan.rows_per_step // world_size
    # The rank with the least memory decides.
    usable = min(ranks.from_all(MEMORY_SHARE[device.type] * free_bytes(device, world_size)))
    budget = _Budget(rows, gradient_bytes=4 * plan.parameters["total"], usable_bytes=usable)
    path = _path_of(key)
    remembered = ranks.from_rank0(_remembered(path) if ranks.rank() == 0 else None)
    n = first
    if remembered is not None:
        n = budget.largest(remembered, at_most=rows)
    limit, tried = rows, set()
    while True:
        peak, error = _try(trial, n, device, allocated_peak if remembered is None else None)
        outcomes = ranks.from_all((error is not None, peak))
        if any(failed for failed, _ in outcomes):
            n = limit = _fewer(n, rows, error, device, report)
            remembered = None
            continue
        peaks = [peak for _, peak in outcomes]
        # The number was remembered, or this device cannot measure.
        if None in peaks:
            break
        tried.add(n)
        # The part that does not grow with the rows is counted as if it did, so that the memory
        # needed by more rows is never underestimated.
        heap_factor = HEAP_FACTOR if device.type == "cpu" else 1
        bytes_per_row = max(peaks) / n * heap_factor
        # At most twice as many at a time: a jump by a wrong measurement could exhaust memory.
        at_most = min(limit, 2 * n)
        tokens = n * plan.total_batch_tokens / plan.rows_per_step
        if tokens >= ENOUGH_TOKENS.get(device.type, math.inf):
            at_most = n
        better = budget.largest(bytes_per_row, at_most)
        if better in tried:
            n = better
            if ranks.rank() == 0:
                _remember(path, bytes_per_row, key, report)
            break
        report(f"a row needs {human_bytes(bytes_per_row)}: {better} rows per pass instead of {n}")
        n = better
    if n != first:
        report(
            f"device batch: {n} rows per pass, accumulated over {rows // n}, instead of the "
            f"estimated {first}"
        )
    return n


@dataclass(frozen=True)
class _Budget:
    """The bytes that a rank's passes may use. rows: that it takes per step."""

    rows: int
    gradient_bytes: int
    usable_bytes: float

    def largest(self, bytes_per_row: float, at_most: int) -> int:
        """The largest of candidates() up to at_most that fits; 1 if none does."""
        fitting = [
            n
            for n in candidates(self.rows)
            if n <= at_most and self.gradient_bytes + n * bytes_per_row <= self.usable_bytes
        ]
        return max(fitting, default=1)


def _try(
    trial: Callable[[int], Any],
    n: int,
    device: torch.device,
    allocated_peak: Callable[[Callable[[], Any], torch.device], int | None] | None,
) -> tuple[int | None, Exception | None]:
    """(peak bytes of a pass of n rows, None), or (None, the error) if memory runs out.

    The peak is None if allocated_peak is, or where it cannot be measured."""
    try:
        trial(n)
        if allocated_peak is None:
            return None, None
        # Measured in a second pass: the gradients exist then, as in all passes of a step but the
        # first.
        return allocated_peak(lambda: trial(n), device), None
    # What is raised depends on who ran out: torch, its libraries, the compiler or the system.
    except Exception as error:
        if not limits.is_out_of_memory(error):
            raise
        # The frames of a traceback hold the tensors that did not fit.
        return None, error.with_traceback(None)


def _fewer(
    n: int,
    rows: int,
    error: Exception | None,
    device: torch.device,
    report: Callable[[str], None],
) -> int:
    """The next smaller number of rows per pass, after n did not fit on some rank.

    TrainingFailed if n is 1."""
    if n == 1:
        why = in_a_line(error) if error else "on another rank"
        raise TrainingFailed(
            f"out of memory with one row per pass; lower --max-seq-len or --depth, or add "
            f"--activation-checkpointing ({why})"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fewer = max(candidate for candidate in candidates(rows) if candidate < n)
    report(f"{n} rows per pass do not fit into memory; trying {fewer}")
    return fewer


def _path_of(key: Any) -> Path:
    """The file that keeps what was measured for a key."""
    digest = sha256_hex(json.dumps([MEASURED_AS, key], sort_keys=True))
    return cached("fit", f"{digest[:32]}.json")


def _remembered(path: Path) -> float | None:
    """Bytes per row that an earlier run measured, or None.

    None also for a damaged file: the number is then measured again."""
    try:
        value = json.loads(path.read_text())["bytes_per_row"]
        # json reads NaN and Infinity as numbers.
        if 0 < value < math.inf:
            return value
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _remember(path: Path, bytes_per_row: float, key: Any, report: Callable[[str], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"bytes_per_row": bytes_per_row, "of": key})
    except OSError as error:
        report(f"the measured memory per row cannot be saved for the next start ({error})")
