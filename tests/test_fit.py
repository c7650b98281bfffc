"""The memory of a step, estimated and measured, and the choice of the rows that a device takes at once."""

import types

import pytest
import torch

from nanochat import hardware, ranks
from nanochat.common import TrainingFailed, UsageError
from nanochat.model import attention
from nanochat.model.build import build, meta_model
from nanochat.optim import optimizer as optim
from nanochat.run import memory as fit
from nanochat.run import plan as plans
from train import parse_args

CPU = torch.device("cpu")


def config_of(*flags):
    args = parse_args(["--head-dim=32", *flags])
    return args, plans.model_config(args, 1000)


# ----- the estimate


@pytest.mark.parametrize(
    "flags, rows, dtype",
    [
        (["--depth=4", "--max-seq-len=256"], 4, torch.bfloat16),
        (["--depth=4", "--max-seq-len=256", "--activation-checkpointing"], 8, torch.bfloat16),
        (
            ["--depth=6", "--aspect-ratio=32", "--max-seq-len=512", "--n-kv-head=2"],
            2,
            torch.bfloat16,
        ),
        (["--depth=3", "--max-seq-len=600", "--optimizer=adamw"], 2, torch.float32),
        (["--depth=4", "--max-seq-len=256", "--arch=llama", "--n-kv-head=4"], 4, torch.bfloat16),
        (
            ["--depth=2", "--aspect-ratio=256", "--max-seq-len=64"],
            1,
            torch.bfloat16,
        ),  # the update needs most
    ],
)
def test_the_estimate_is_within_a_fifth_of_what_is_measured(flags, rows, dtype):
    """Tensors of one step, uncompiled, in the blocked attention."""
    args, config = config_of(*flags)
    parameters = meta_model(config).count_parameters()
    model = build(config, CPU, dtype).train()
    model.checkpointing = args.activation_checkpointing
    plan = plans.make_plan(args, config, 1e6, 1e12, 1)
    optimizer = optim.Optimizer(model.parameter_groups(), plan.groups, torch.bfloat16)
    ids = torch.randint(
        config.vocab_size,
        (rows, config.max_seq_len + 1),
        generator=torch.Generator().manual_seed(0),
    )

    def step():
        model(ids[:, :-1], ids[:, 1:], reduction="mean").backward()
        optimizer.reduce()
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()

    step()
    kept = sum(t.nbytes for tensors in optimizer.state().values() for t in tensors.values()) + sum(
        p.nbytes for p in model.parameters()
    )
    assert kept == pytest.approx(fit.state_bytes(parameters, args.optimizer), rel=1e-2)
    measured = kept + hardware.allocated_peak(step, CPU)
    estimated = fit.step_memory_bytes(
        config,
        parameters,
        rows,
        dtype.itemsize,
        "blocked",
        args.optimizer,
        False,
        args.activation_checkpointing,
    )
    assert estimated == pytest.approx(measured, rel=0.2)


def test_windows_grouped_heads_and_checkpointing_save_memory():
    def need(*flags, rows=4):
        args, config = config_of("--depth=8", "--max-seq-len=2048", *flags)
        return fit.step_memory_bytes(
            config,
            meta_model(config).count_parameters(),
            rows,
            2,
            "blocked",
            "muon",
            True,
            args.activation_checkpointing,
        )

    full = need("--window-pattern=L")
    assert need("--window-pattern=S", "--short-window=256") < 0.9 * full
    assert need("--window-pattern=L", "--n-kv-head=1") < 0.95 * full
    assert need("--window-pattern=L", "--activation-checkpointing") < 0.4 * full
    assert need(rows=8) > 1.8 * need(rows=4) - 0.2 * full


def test_allocated_peak_counts_what_lives_at_once():
    def function():
        a = torch.empty(1_000_000)
        b = a * 2
        del a
        return (b + 1).sum()

    assert hardware.allocated_peak(function, CPU) == pytest.approx(8_000_000, abs=1000)


# ----- the choice


def test_candidates():
    assert (
        fit.candidates(8) == [1, 2, 4, 8]
        and fit.candidates(12) == [1, 2, 4, 12]
        and fit.candidates(7) == [1, 7]
    )


def choose(free, rows=16, world_size=1, given=-1):
    args = types.SimpleNamespace(device_batch_size=given, max_seq_len=64)
    plan = types.SimpleNamespace(rows_per_step=rows * world_size)
    return fit.pick_device_batch(args, plan, lambda n: 100 + 10 * n, free, world_size, "cpu")


def test_the_largest_that_is_estimated_to_fit():
    assert choose(1e9) == 16 and choose((100 + 80) / 0.8) == 8 and choose((100 + 79) / 0.8) == 4
    assert choose(1e9, given=2) == 2
    with pytest.raises(UsageError, match="one row is estimated to need"):
        choose(10)
    with pytest.raises(UsageError, match="--device-batch-size=3: does not divide the 16 rows"):
        choose(1e9, given=3)
    with pytest.raises(UsageError, match="--device-batch-size=16: estimated to need 260 B"):
        choose(100, given=16)


class Machine:
    """A device on which a pass of n rows needs `row` bytes a row beside 10 for gradients, and more than `limit` rows fail."""

    def __init__(self, monkeypatch, tmp_path, free, row=10.0, limit=float("inf")):
        self.tried, self.said, self.row, self.limit = [], [], row, limit
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        monkeypatch.setattr(hardware, "free_memory", lambda device: free)
        monkeypatch.setattr(hardware, "allocated_peak", self.peak)
        monkeypatch.setattr(fit, "HEAP_FACTOR", 1)
        monkeypatch.setitem(fit.MEMORY_SHARE, "cpu", 1.0)

    def trial(self, n):
        self.tried.append(n)
        if n > self.limit:
            raise torch.OutOfMemoryError(f"{n} rows")

    def peak(self, function, device):
        function()
        return self.tried[-1] * self.row

    def settle(self, first, rows=16, key="a", fixed=False):
        self.tried.clear()
        plan = types.SimpleNamespace(rows_per_step=rows, parameters={"total": 2.5})
        return fit.settle(self.trial, first, fixed, plan, key, CPU, self.said.append)


def test_settling_goes_up_and_down_to_what_fits_and_remembers(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=10 + 85)
    assert machine.settle(2) == 8 and machine.tried == [2, 2, 4, 4, 8, 8], (
        "at most twice as many at a time"
    )
    assert machine.settle(16) == 8 and machine.tried == [
        8
    ]  # remembered, tried once because that compiles
    assert machine.settle(16, key="another model") == 8 and machine.tried == [16, 16, 8, 8]
    lines = [
        "a row needs 10 B: {} rows at once instead of {}",
        "device batch: 8 rows at once, 2 accumulated, instead of the {} that were estimated to fit",
    ]
    assert machine.said == [
        lines[0].format(4, 2),
        lines[0].format(8, 4),
        lines[1].format(2),
        lines[1].format(16),
        lines[0].format(8, 16),
        lines[1].format(16),
    ]


def test_ranks_agree_on_the_least_memory(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=1e6)
    monkeypatch.setattr(
        ranks, "from_all", lambda value: [value, 45.0] if isinstance(value, float) else [value]
    )
    assert machine.settle(16) == 2, (
        "10 for gradients and 10 a row fit into 45 bytes with up to three rows"
    )


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"bytes_per_row": "many"}', '{"bytes_per_row": -1}', '{"bytes_per_row": NaN}'],
)
def test_what_cannot_be_remembered_is_measured_again(monkeypatch, tmp_path, content):
    machine = Machine(monkeypatch, tmp_path, free=10 + 85)
    assert machine.settle(8) == 8
    next((tmp_path / "fit").iterdir()).write_text(content)
    assert machine.settle(8) == 8 and machine.tried == [8, 8]


def test_nothing_can_be_written_down(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=10 + 85)
    (tmp_path / "fit").write_text("")
    assert machine.settle(8) == 8 and "could not be kept for the next start" in machine.said[-1]


def test_a_row_is_never_measured_too_small():
    """With real tensors, from one row: what is promised for more rows is not less than what they need."""
    args, config = config_of("--depth=2", "--max-seq-len=64")
    model = build(config, CPU).train()

    def trial(n):
        ids = torch.randint(config.vocab_size, (n, 65), generator=torch.Generator().manual_seed(0))
        model(ids[:, :-1], ids[:, 1:], reduction="mean").backward()

    trial(1)
    one, eight = (hardware.allocated_peak(lambda: trial(n), CPU) for n in (1, 8))
    assert 1.01 * 8 * one >= eight


def test_settling_halves_when_memory_runs_out(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=1e6, limit=4)
    assert machine.settle(16) == 4 and machine.tried == [16, 8, 4, 4]
    assert machine.said[:2] == [
        "16 rows at once do not fit into memory; trying 8",
        "8 rows at once do not fit into memory; trying 4",
    ]
    machine.limit = 2  # less than when it was measured
    assert machine.settle(16) == 2
    machine.limit = 0
    with pytest.raises(
        TrainingFailed, match="out of memory with one row at once; lower --max-seq-len"
    ):
        machine.settle(16)


def test_a_number_that_was_given_is_not_changed(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=1e6, limit=4)
    assert machine.settle(2, fixed=True) == 2 and machine.tried == [2]
    with pytest.raises(torch.OutOfMemoryError):
        machine.settle(8, fixed=True)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=1e6)

    def broken(n):
        raise RuntimeError("shapes do not match")

    machine.trial = broken
    with pytest.raises(RuntimeError, match="shapes"):
        machine.settle(4)


def test_backends_keep_other_amounts():
    args, config = config_of("--depth=4", "--max-seq-len=1024")
    parameters = meta_model(config).count_parameters()
    blocked, *fused = (
        fit.step_memory_bytes(config, parameters, 4, 2, backend) for backend in attention.BACKENDS
    )
    assert max(fused) < blocked
