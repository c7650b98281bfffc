"""The memory of a step, estimated and measured, and the choice of the rows per pass."""

import errno
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanochat import hardware, limits, ranks
from nanochat.common import TrainingFailed, UsageError
from nanochat.model.attention import BACKENDS, KEEP_SCORES
from nanochat.model.build import build, meta_model
from nanochat.model.config import GPTConfig, width_for
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.run import memory
from nanochat.run.memory import (
    HEAP_FACTOR,
    MEMORY_SHARE,
    StepMemory,
    candidates,
    pick_device_batch,
    settle,
    state_bytes,
)

CPU = torch.device("cpu")
MUON = {"lr": 0.02, "beta2": 0.9, "weight_decay": 0.1}
ADAMW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.0}


def config_of(depth, max_seq_len, aspect_ratio=64, n_kv_head=None, **shape):
    """The GPTConfig of train.py's defaults, with heads of 32 channels and 1,000 token ids."""
    width = width_for(depth, aspect_ratio, 32)
    shape = {"key_shift": True, "short_window": max_seq_len // 2, **shape}
    return GPTConfig(
        depth=depth,
        width=width,
        head_dim=32,
        n_head=width // 32,
        n_kv_head=n_kv_head or width // 32,
        vocab_size=1000,
        max_seq_len=max_seq_len,
        **shape,
    )


def memory_of(config, compute_dtype=torch.bfloat16, backend="blocked", **settings):
    parameters = meta_model(config).count_parameters()
    return StepMemory(config, parameters, compute_dtype, backend, **settings)


def text(config, rows):
    """Random token ids, (rows, max_seq_len + 1)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (rows, config.max_seq_len + 1), generator=generator)


# ----- the estimate

LLAMA = {"arch": "llama", "window_pattern": "L", "key_shift": False}


@pytest.mark.parametrize(
    "config, rows, dtype, settings",
    [
        (config_of(4, 256), 4, torch.bfloat16, {}),
        pytest.param(
            config_of(4, 256),
            8,
            torch.bfloat16,
            {"activation_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            config_of(6, 512, aspect_ratio=32, n_kv_head=2),
            2,
            torch.bfloat16,
            {},
            marks=pytest.mark.slow,
        ),
        (config_of(3, 600), 2, torch.float32, {"optimizer": "adamw"}),
        (config_of(4, 256, n_kv_head=4, **LLAMA), 4, torch.bfloat16, {}),
        # the update needs most
        pytest.param(
            config_of(2, 64, aspect_ratio=256), 1, torch.bfloat16, {}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(config, rows, dtype, settings):
    """Tensors of one step, uncompiled, in the blocked attention."""
    memory = memory_of(config, dtype, compiled=False, **settings)
    model = build(config, CPU, dtype).train()
    model.checkpointing = memory.activation_checkpointing
    groups = model.parameter_groups()
    group_settings = dict.fromkeys(groups, ADAMW)
    if memory.optimizer == "muon":
        group_settings["matrices"] = MUON
    optimizer = Optimizer(groups, group_settings, torch.bfloat16)
    ids = text(config, rows)

    def step():
        loss = model(ids[:, :-1], ids[:, 1:], reduction="mean")
        loss.backward()
        optimizer.reduce(loss.detach(), LossScaler(enabled=False))
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()

    states = [tensor for state in optimizer.state().values() for tensor in state.values()]
    kept = sum(tensor.nbytes for tensor in [*states, *model.parameters()])
    assert kept == pytest.approx(state_bytes(memory.parameters, memory.optimizer), rel=1e-2)
    measured = kept + hardware.allocated_peak(step, CPU)
    assert memory.tensor_bytes(rows) == pytest.approx(measured, rel=0.2)


def test_windows_grouped_heads_and_checkpointing_save_memory():
    def need(rows=4, activation_checkpointing=False, **shape):
        config = config_of(8, 2048, **shape)
        memory = memory_of(config, activation_checkpointing=activation_checkpointing)
        return memory.tensor_bytes(rows)

    full = need(window_pattern="L")
    assert need(window_pattern="S", short_window=256) < 0.9 * full
    assert need(window_pattern="L", n_kv_head=1) < 0.95 * full
    assert need(window_pattern="L", activation_checkpointing=True) < 0.4 * full
    assert need(rows=8) > 1.8 * need(rows=4) - 0.2 * full


def test_backends_keep_different_amounts(monkeypatch):
    memory = memory_of(config_of(4, 1024), torch.float32)
    needed = {name: replace(memory, backend=name).tensor_bytes(4) for name in BACKENDS}
    blocked, native = (needed.pop(name) for name in KEEP_SCORES)
    assert max(needed.values()) < native < blocked
    # no tiles for this head dim
    config = replace(config_of(4, 1024), head_dim=16, n_head=16, n_kv_head=16)
    memory = memory_of(config, torch.float32)
    blocked, native = (replace(memory, backend=name).tensor_bytes(4) for name in KEEP_SCORES)
    assert native == blocked
    # nor for bf16, without its instructions
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: False)
    memory = memory_of(config_of(4, 1024), torch.bfloat16)
    blocked, native = (replace(memory, backend=name).tensor_bytes(4) for name in KEEP_SCORES)
    assert native == blocked


def test_a_process_on_a_cpu_needs_more_than_its_tensors():
    """The interpreter, the heap and, where checkpoints are saved, their copy; a GPU has tensors."""
    memory = memory_of(config_of(2, 64))
    without_saving = replace(memory, saves=False)
    assert memory.process_bytes(2) > without_saving.process_bytes(2) > memory.tensor_bytes(2)
    on_cuda = replace(memory, device_type="cuda")
    assert on_cuda.process_bytes(2) == on_cuda.tensor_bytes(2)


def test_allocated_peak_counts_what_lives_at_the_same_time():
    def function():
        a = torch.empty(1_000_000)
        b = a * 2
        del a
        return (b + 1).sum()

    assert hardware.allocated_peak(function, CPU) == pytest.approx(8_000_000, abs=1000)


# ----- the choice by the estimate


@pytest.mark.parametrize(
    "rows, expected", [(8, [1, 2, 4, 8]), (12, [1, 2, 4, 12]), (7, [1, 7]), (1, [1])]
)
def test_candidates(rows, expected):
    assert candidates(rows) == expected


def choose(free, rows=16, world_size=1, given=-1):
    return pick_device_batch(
        lambda n: 100 + 10 * n,
        device_batch_size=given,
        rows_per_step=rows,
        max_seq_len=64,
        free_bytes=free,
        world_size=world_size,
        device_type="cpu",
    )


@pytest.mark.parametrize(
    "free, options, expected",
    [
        (1e9, {}, 16),
        ((100 + 80) / 0.8, {}, 8),
        ((100 + 79) / 0.8, {}, 4),
        (1e9, {"given": 2}, 2),
        (1e9, {"world_size": 4}, 4),
    ],
)
def test_the_largest_number_that_is_estimated_to_fit(free, options, expected):
    assert choose(free, **options) == expected


@pytest.mark.parametrize(
    "free, options, message",
    [
        (
            10,
            {},
            "--max-seq-len=64: one row is estimated to need 110 B, but .* only 80% of the 10 B",
        ),
        (1e9, {"given": 3}, "--device-batch-size=3: does not divide the 16 rows"),
        (100, {"given": 16}, "--device-batch-size=16: is estimated to need 260 B, but only 100 B"),
        (1e9, {"rows": 6, "world_size": 4}, "6 rows .* among 4 ranks; start with 1 or 2 or 3 or 6"),
    ],
)
def test_numbers_that_cannot_be_taken(free, options, message):
    with pytest.raises(UsageError, match=message):
        choose(free, **options)


# ----- the choice by trying


class Machine:
    """A CPU on which a pass of n rows needs 10 bytes a row, besides 10 for gradients.

    budget: the bytes that a step may use. More than `limit` rows fail."""

    def __init__(self, budget, limit=float("inf")):
        self.tried, self.reports, self.limit = [], [], limit
        self.free = budget / MEMORY_SHARE["cpu"]

    def trial(self, n):
        self.tried.append(n)
        if n > self.limit:
            raise torch.OutOfMemoryError(f"{n} rows")

    def peak(self, function, device):
        function()
        return self.tried[-1] * 10 / HEAP_FACTOR

    def settle(self, first, rows=16, key="a", fixed=False):
        self.tried.clear()
        plan = types.SimpleNamespace(
            rows_per_step=rows, total_batch_tokens=16 * rows, parameters={"total": 2.5}
        )
        return settle(
            self.trial,
            first,
            fixed,
            plan,
            key,
            CPU,
            self.reports.append,
            free_bytes=lambda device, processes: self.free,
            allocated_peak=self.peak,
        )


@pytest.fixture(autouse=True)
def base_dir(monkeypatch, tmp_path):
    """Each test measures for itself."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def test_settling_goes_up_and_down_to_what_fits_and_remembers():
    machine = Machine(budget=10 + 85)
    # at most twice as many at a time, each measured in a second pass
    assert machine.settle(2) == 8 and machine.tried == [2, 2, 4, 4, 8, 8]
    # remembered, and tried once, because that compiles
    assert machine.settle(16) == 8 and machine.tried == [8]
    assert machine.settle(16, key="another model") == 8 and machine.tried == [16, 16, 8, 8]
    measured = "a row needs 10 B: {} rows per pass instead of {}"
    settled = "device batch: 8 rows per pass, accumulated over 2, instead of the estimated {}"
    assert machine.reports == [
        measured.format(4, 2),
        measured.format(8, 4),
        settled.format(2),
        settled.format(16),
        measured.format(8, 16),
        settled.format(16),
    ]


def test_settling_does_not_go_past_what_makes_a_pass_faster(monkeypatch):
    """Rows of 16 tokens: from 64 tokens a pass on, more rows are not tried, fewer are."""
    monkeypatch.setattr(memory, "ENOUGH_TOKENS", {"cpu": 64})
    machine = Machine(budget=10 + 165)
    assert machine.settle(2) == 4 and machine.tried == [2, 2, 4, 4]
    assert machine.settle(8, key="b") == 8 and machine.tried == [8, 8]
    assert Machine(budget=10 + 45).settle(16, key="c") == 4


def test_ranks_agree_on_the_least_memory(monkeypatch):
    """The other rank has 45 bytes: 10 for gradients and 10 a row fit with up to three rows."""
    monkeypatch.setattr(
        ranks, "from_all", lambda value: [value, 45.0] if isinstance(value, float) else [value]
    )
    assert Machine(budget=1e6).settle(16) == 2


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"bytes_per_row": "many"}', '{"bytes_per_row": -1}', '{"bytes_per_row": NaN}'],
)
def test_a_damaged_measurement_is_repeated(base_dir, content):
    machine = Machine(budget=10 + 85)
    assert machine.settle(8) == 8
    next((base_dir / "fit").iterdir()).write_text(content)
    assert machine.settle(8) == 8 and machine.tried == [8, 8]


def test_a_measurement_that_cannot_be_saved_is_still_used(base_dir):
    machine = Machine(budget=10 + 85)
    (base_dir / "fit").write_text("")
    assert machine.settle(8) == 8
    assert "cannot be saved for the next start" in machine.reports[-1]


def test_a_row_is_never_measured_too_small():
    """With real tensors, from one row: more rows do not need more than is predicted for them."""
    config = config_of(2, 64)
    model = build(config, CPU).train()

    def trial(n):
        ids = text(config, n)
        model(ids[:, :-1], ids[:, 1:], reduction="mean").backward()

    trial(1)
    one, eight = (hardware.allocated_peak(partial(trial, n), CPU) for n in (1, 8))
    assert 1.01 * 8 * one >= eight


def test_settling_halves_when_memory_runs_out():
    machine = Machine(budget=1e6, limit=4)
    assert machine.settle(16) == 4 and machine.tried == [16, 8, 4, 4]
    assert machine.reports[:2] == [
        "16 rows per pass do not fit into memory; trying 8",
        "8 rows per pass do not fit into memory; trying 4",
    ]
    # less than when it was measured
    machine.limit = 2
    assert machine.settle(16) == 2
    machine.limit = 0
    with pytest.raises(
        TrainingFailed, match="out of memory with one row per pass; lower --max-seq-len"
    ):
        machine.settle(16)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
    ],
)
def test_settling_takes_every_lack_of_memory_for_one(error):
    machine = Machine(budget=1e6)
    measure = machine.trial

    def trial(n):
        if n > 4:
            raise error
        measure(n)

    machine.trial = trial
    assert machine.settle(16) == 4


def test_the_last_words_of_settling_are_one_line():
    machine = Machine(budget=1e6)

    def trial(n):
        raise MemoryError("a long\nmessage of the compiler\n" * 50)

    machine.trial = trial
    with pytest.raises(TrainingFailed) as raised:
        machine.settle(1)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("device_batch_size, words", [(-1, "that are free"), (4, "are free")])
def test_a_refusal_names_the_limit_on_memory(monkeypatch, device_batch_size, words):
    monkeypatch.setattr(limits, "free_memory", lambda: limits.FreeMemory(100, "ulimit -v of 1 GiB"))
    settings = {"rows_per_step": 4, "max_seq_len": 8, "free_bytes": 100, "world_size": 1}
    settings["device_batch_size"] = device_batch_size
    with pytest.raises(UsageError, match=rf"100 B {words} \(ulimit -v of 1 GiB\); "):
        pick_device_batch(lambda n: 1000 * n, device_type="cpu", **settings)
    with pytest.raises(UsageError, match=f"100 B {words}; "):
        pick_device_batch(lambda n: 1000 * n, device_type="cuda", **settings)


def test_a_given_number_is_not_changed():
    machine = Machine(budget=1e6, limit=4)
    assert machine.settle(2, fixed=True) == 2 and machine.tried == [2]
    with pytest.raises(torch.OutOfMemoryError):
        machine.settle(8, fixed=True)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    machine = Machine(budget=1e6)

    def broken(n):
        raise RuntimeError("shapes do not match")

    machine.trial = broken
    with pytest.raises(RuntimeError, match="shapes"):
        machine.settle(4)
