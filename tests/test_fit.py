"""The memory of a step, estimated and measured, and the choice of the rows that a device takes at once."""

import types

import pytest
import torch

from nanochat import attention, fit, hardware, optim, plan as plans
from nanochat.common import UsageError
from nanochat.model import build, meta_model
from train import parse_args

CPU = torch.device("cpu")


def config_of(*flags):
    args = parse_args(["--head-dim=32", *flags])
    return args, plans.model_config(args, 1000)


# ----- the estimate

@pytest.mark.parametrize("flags, rows, dtype", [
    (["--depth=4", "--max-seq-len=256"], 4, torch.bfloat16),
    (["--depth=4", "--max-seq-len=256", "--activation-checkpointing"], 8, torch.bfloat16),
    (["--depth=6", "--aspect-ratio=32", "--max-seq-len=512", "--n-kv-head=2"], 2, torch.bfloat16),
    (["--depth=3", "--max-seq-len=600", "--optimizer=adamw"], 2, torch.float32),
    (["--depth=4", "--max-seq-len=256", "--arch=llama", "--n-kv-head=4"], 4, torch.bfloat16),
    (["--depth=2", "--aspect-ratio=256", "--max-seq-len=64"], 1, torch.bfloat16),  # the update needs most
])
def test_the_estimate_is_within_a_fifth_of_what_is_measured(flags, rows, dtype):
    """Tensors of one step, uncompiled, in the blocked attention."""
    args, config = config_of(*flags)
    parameters = meta_model(config).count_parameters()
    model = build(config, CPU, dtype).train()
    model.checkpointing = args.activation_checkpointing
    plan = plans.make_plan(args, config, 1e6, 1e12, 1)
    optimizer = optim.Optimizer(model.parameter_groups(), plan.groups, torch.bfloat16)
    ids = torch.randint(config.vocab_size, (rows, config.max_seq_len + 1), generator=torch.Generator().manual_seed(0))

    def step():
        model(ids[:, :-1], ids[:, 1:], reduction="mean").backward()
        optimizer.reduce()
        optimizer.step(1.0, 0.9)
        optimizer.zero_grad()
    step()
    kept = sum(t.nbytes for tensors in optimizer.state().values() for t in tensors.values()) + sum(p.nbytes for p in model.parameters())
    assert kept == pytest.approx(fit.state_bytes(parameters, args.optimizer), rel=1e-2)
    measured = kept + hardware.allocated_peak(step, CPU)
    estimated = fit.step_memory_bytes(config, parameters, rows, dtype.itemsize, "blocked", args.optimizer, False,
                                      args.activation_checkpointing)
    assert estimated == pytest.approx(measured, rel=0.2)


def test_windows_grouped_heads_and_checkpointing_save_memory():
    def need(*flags, rows=4):
        args, config = config_of("--depth=8", "--max-seq-len=2048", *flags)
        return fit.step_memory_bytes(config, meta_model(config).count_parameters(), rows, 2, "blocked", "muon", True,
                                     args.activation_checkpointing)
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
    assert fit.candidates(8) == [1, 2, 4, 8] and fit.candidates(12) == [1, 2, 4, 12] and fit.candidates(7) == [1, 7]


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
    """A device on which a pass of n rows needs 10 bytes for gradients and `row` bytes a row, and more than `limit` rows fail."""

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
        return 10 + self.tried[-1] * self.row

    def settle(self, first, rows=16, key="a", fixed=False):
        self.tried.clear()
        plan = types.SimpleNamespace(rows_per_step=rows, parameters={"total": 2.5})
        return fit.settle(self.trial, first, fixed, plan, key, CPU, self.said.append)


def test_settling_goes_up_and_down_to_what_fits_and_remembers(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=10 + 85)
    assert machine.settle(2) == 8 and machine.tried == [2, 2, 8, 8]
    assert machine.settle(16) == 8 and machine.tried == [8]  # remembered, tried once because that compiles
    assert machine.settle(16, key="another model") == 8 and machine.tried == [16, 16, 8, 8]
    assert machine.said == ["a row needs 10 B: 8 rows at once instead of 2", "a row needs 10 B: 8 rows at once instead of 16"]


def test_settling_halves_when_memory_runs_out(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, free=1e6, limit=4)
    assert machine.settle(16) == 4 and machine.tried == [16, 8, 4, 4]
    assert machine.said == ["16 rows at once do not fit into memory; trying 8", "8 rows at once do not fit into memory; trying 4"]
    machine.limit = 2  # less than when it was measured
    assert machine.settle(16) == 2
    machine.limit = 0
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
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
    blocked, fused = (fit.step_memory_bytes(config, parameters, 4, 2, backend) for backend in attention.BACKENDS)
    assert fused < blocked
