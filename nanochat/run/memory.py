"""What fits: the memory of a training step, estimated and measured, and the number of rows that a device takes at once."""

import json
import math

import torch

from nanochat import hardware, ranks
from nanochat.common import (
    TrainingFailed,
    UsageError,
    base_dir,
    human_bytes,
    sha256_hex,
    write_json,
)
from nanochat.model.attention import QUERY_BLOCK, visited_keys
from nanochat.model.loss import chunk_logits

MEASURED_AS = (
    2  # to be raised when a change of the code makes measured numbers of earlier versions wrong
)
# Share of the free memory that may be planned with: a GPU has no other users.
MEMORY_SHARE = {"cuda": 0.9, "mps": 0.6, "cpu": 0.8}
# What a block keeps for its backward pass, per token: elements in the compute dtype per channel of the stream and of the keys,
# measured at depths 4 to 8 with contexts of 256 to 1,024 (runs/LOG.md). Keyed by (architecture, compiled).
KEPT_ELEMENTS = {
    ("speedrun", True): (16.0, 3.5),
    ("speedrun", False): (20.0, 4.5),
    ("llama", True): (13.5, 3.5),
    ("llama", False): (21.0, 4.5),
}
GRADIENT_ELEMENTS = 9.0  # of a block's backward pass, per channel
UPDATE_BYTES = 9.65  # of the update's copies, per parameter of the matrices
# On a CPU: what the process holds besides tensors (torch, the compiler, the data), and how much more than the tensors' own bytes
# the C library's heap grows to, which cannot hand out again all that was freed. Measured with glibc 2.36.
PROCESS_BYTES, HEAP_FACTOR = 460e6, 1.6
SAVING_FACTOR = (
    2.5  # of the state: the copy that is written, and what writing it and reading it back takes
)


def step_memory_bytes(
    config,
    parameters,
    rows,
    element_bytes,
    backend,
    optimizer="muon",
    compiled=True,
    checkpointing=False,
    device_type="cpu",
):
    """Peak bytes of tensors in a training step: weights, gradients, optimizer state, activations, the loss, copies.

    parameters: as of GPT.count_parameters(). rows: taken at once. element_bytes: of the compute dtype. Tested against what is
    measured, to 20%, in tests/test_fit.py."""
    n, n_matrices = parameters["total"], parameters["matrices"]
    C, KD, T, V, e = (
        config.width,
        config.n_kv_head * config.head_dim,
        config.max_seq_len,
        config.vocab_size,
        element_bytes,
    )
    tokens = rows * T
    of_stream, of_keys = KEPT_ELEMENTS[config.arch, compiled]
    scores = e * config.n_head if backend == "blocked" else 0  # a weight per score that is computed
    layers = [
        tokens * (e * (of_stream * C + of_keys * KD) + scores * visited_keys(T, window))
        for window in config.windows()
    ]
    if checkpointing:
        tables = sum(config.has_value_embedding(layer) for layer in range(config.depth))
        kept = tokens * ((config.depth + 5) * e * C + 4 * tables * KD)
    else:
        kept = sum(layers) + (e * n_matrices if e < 4 else 0)  # the matrices in the compute dtype
    # uncompiled, the softmax of a block of queries makes copies in fp32
    widest = max(min(window, T) for window in config.windows())
    copies = (
        0
        if compiled or not scores
        else 16 * rows * config.n_head * min(T, QUERY_BLOCK) * min(T, widest + QUERY_BLOCK)
    )
    head = 4 * V * C + tokens * e * C  # the gradients of the head and of the hidden states
    chunk = min(tokens * V, chunk_logits(device_type))
    loss = kept + head + 2 * e * chunk + 2 * e * V * C
    backward_begins = (
        kept
        + head
        + (max(layers) if checkpointing else 0)
        + tokens * e * GRADIENT_ELEMENTS * C
        + copies
    )
    backward_ends = 4 * n + max(layers) + copies
    update = 4 * n + UPDATE_BYTES * n_matrices
    return round(
        state_bytes(parameters, optimizer) + max(loss, backward_begins, backward_ends, update)
    )


def state_bytes(parameters, optimizer):
    """Bytes of weights and optimizer state, all fp32: two moments for AdamW's parameters, one for Muon's. Also those of a checkpoint."""
    return 12 * parameters["total"] - 4 * (parameters["matrices"] if optimizer == "muon" else 0)


def candidates(rows):
    """Numbers of rows that a device may take at once to get through `rows`: powers of two that divide them, and all of them."""
    return sorted({2**i for i in range(rows.bit_length()) if rows % 2**i == 0} | {rows})


def memory_of(args, config, parameters, dtype, backend, compiled, device_type):
    """The estimate for these flags as a function of the rows that a device takes at once: peak bytes, on a CPU of the whole process,
    saving included."""

    def memory(rows):
        tensors = step_memory_bytes(
            config,
            parameters,
            rows,
            dtype.itemsize,
            backend,
            args.optimizer,
            compiled,
            args.activation_checkpointing,
            device_type,
        )
        saving = 0 if args.no_save else SAVING_FACTOR * state_bytes(parameters, args.optimizer)
        return (
            round(PROCESS_BYTES + HEAP_FACTOR * tensors + saving)
            if device_type == "cpu"
            else tensors
        )

    return memory


def free_memory(device, processes):
    """Bytes that each of so many processes may count on: those on a CPU share its memory."""
    return hardware.free_memory(device) / (processes if device.type == "cpu" else 1)


def pick_device_batch(args, plan, memory, free_bytes, world_size, device_type):
    """Rows a device takes at once: as given, else the largest of candidates() that is estimated to fit.

    memory: of memory_of(). Raises UsageError if the given one does not divide the batch, or if not even one row fits."""
    rows = plan.rows_per_step // world_size
    if plan.rows_per_step % world_size:
        raise UsageError(
            f"the batch of {plan.rows_per_step} rows cannot be dealt out to {world_size} ranks evenly; start with "
            f"{' or '.join(str(n) for n in range(1, plan.rows_per_step + 1) if plan.rows_per_step % n == 0)} ranks"
        )
    given = args.device_batch_size
    if given != -1:
        if rows % given:
            raise UsageError(
                f"--device-batch-size={given}: does not divide the {rows} rows that each of {world_size} ranks takes a "
                f"step; use a divisor of {rows}"
            )
        if memory(given) > 2 * free_bytes:  # the estimate may be off, but not by that much
            raise UsageError(
                f"--device-batch-size={given}: estimated to need {human_bytes(memory(given))}, and "
                f"{human_bytes(free_bytes)} are free; leave the flag out to take what fits"
            )
        return given
    share = MEMORY_SHARE[device_type]
    fitting = [n for n in candidates(rows) if memory(n) <= share * free_bytes]
    if not fitting:
        raise UsageError(
            f"--max-seq-len={args.max_seq_len}: one row is estimated to need {human_bytes(memory(1))}, and of the "
            f"{human_bytes(free_bytes)} free {share:.0%} may be planned with; lower --max-seq-len or --depth, add "
            f"--activation-checkpointing, or give --device-batch-size=1 to try it all the same"
        )
    return fitting[-1]


def settle(trial, first, fixed, plan, key, device, report):
    """The number of rows that a device takes at once, found by trying: the largest of candidates() that fits.

    trial(n): a forward and backward pass of n rows, as in training, that adds to the gradients. It has been made, and so is
    compiled, for the number that is returned. first: the number to begin with; fixed: it is not to be changed. What a row
    needs is measured, and kept under the base dir by `key` (JSON), so that it is not measured again. Every rank must call
    it, and gets the same number. Raises TrainingFailed if not even one row fits."""
    if fixed:
        trial(first)
        return first
    rows, gradient_bytes = plan.rows_per_step // ranks.world_size(), 4 * plan.parameters["total"]
    budget_bytes = min(
        ranks.from_all(MEMORY_SHARE[device.type] * free_memory(device, ranks.world_size()))
    )
    path = (
        base_dir()
        / "fit"
        / f"{sha256_hex(json.dumps([MEASURED_AS, key], sort_keys=True))[:32]}.json"
    )
    remembered = ranks.from_rank0(_remembered(path) if ranks.rank() == 0 else None)

    def largest(bytes_per_row, at_most):
        return max(
            (
                n
                for n in candidates(rows)
                if n <= at_most and gradient_bytes + n * bytes_per_row <= budget_bytes
            ),
            default=1,
        )

    limit, tried = rows, set()
    n = first if remembered is None else largest(remembered, limit)
    while True:
        error = peak = None
        try:
            trial(n)
            if (
                remembered is None
            ):  # with the gradients there, as in all passes of a step but its first
                peak = hardware.allocated_peak(lambda: trial(n), device)
        except (RuntimeError, MemoryError) as raised:
            if not hardware.is_out_of_memory(raised):
                raise
            error = raised.with_traceback(None)  # its frames hold the tensors that did not fit
        failed, peaks = zip(*ranks.from_all((error is not None, peak)))
        if any(failed):
            if n == 1:
                raise TrainingFailed(
                    f"out of memory with one row at once; lower --max-seq-len or --depth, or add "
                    f"--activation-checkpointing ({error or 'on another rank'})"
                )
            if device.type == "cuda":
                torch.cuda.empty_cache()
            too_many, remembered, n = n, None, max(c for c in candidates(rows) if c < n)
            limit = n
            report(f"{too_many} rows at once do not fit into memory; trying {n}")
            continue
        if None in peaks:  # remembered, or not measurable
            break
        tried.add(n)
        # what does not grow with the rows is counted as if it did, so that more rows are never promised too lightly
        bytes_per_row = max(peaks) / n * (HEAP_FACTOR if device.type == "cpu" else 1)
        better = largest(bytes_per_row, min(limit, 2 * n))
        if better in tried:
            n = better
            if ranks.rank() == 0:
                _remember(path, bytes_per_row, key, report)
            break
        report(f"a row needs {human_bytes(bytes_per_row)}: {better} rows at once instead of {n}")
        n = better
    if n != first:
        report(
            f"device batch: {n} rows at once, {rows // n} accumulated, instead of the {first} that were estimated to fit"
        )
    return n


def _remembered(path):
    """Bytes per row that an earlier run measured, or None: also if the file is no good, since it can be measured again."""
    try:
        value = json.loads(path.read_text())["bytes_per_row"]
        return value if 0 < value < math.inf else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(path, bytes_per_row, key, report):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"bytes_per_row": bytes_per_row, "of": key})
    except OSError as error:
        report(f"what a row needs could not be kept for the next start ({error})")
