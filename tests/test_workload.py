"""The parts of a training step as bench and doctor time them: FLOPs by hand, shapes as given."""

import pytest
import torch

from nanochat.common import UsageError
from nanochat.model.build import meta_model
from nanochat.run.timing import measured, short_time, timed
from nanochat.run.workload import (
    Shape,
    TrainingStep,
    open_setup,
    plain_attention,
    ways_of_attention,
    windows_of,
)

SHAPE = Shape(
    arch="speedrun",
    depth=2,
    aspect_ratio=16,
    head_dim=16,
    n_kv_head=1,
    max_seq_len=64,
    window_pattern="SL",
    short_window=24,
    vocab_size=300,
    device_batch_size=2,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def training():
    return TrainingStep(open_setup(SHAPE, compile=False))


def test_flops_of_orthogonalisation(training):
    """Five iterations of three products: X X^T, its square, and the square times X."""
    # query and out; key and value of one head; up and down; of two blocks
    C, K = 32, 16
    matrices = 2 * ([(C, C)] * 2 + [(K, C)] * 2 + [(C, 4 * C)] * 2)
    by_hand = 0
    for rows, columns in matrices:
        by_hand += 5 * 2 * (rows * columns * rows + rows**3 + rows * rows * columns)
    assert training.muon_flops() == by_hand


def test_flops_of_passes_add_up(training):
    step, forward, backward = (
        timing(1) for timing in (training.time_step, training.time_forward, training.time_backward)
    )
    assert step.flops == 2 * 64 * meta_model(training.setup.config).flops_per_token()
    assert forward.flops + backward.flops == pytest.approx(step.flops)


def test_a_step_changes_the_weights_and_the_update_is_timed_with_the_same_gradients(training):
    before = [parameter.clone() for parameter in training.optimizer.parameters]
    training.step()
    assert all(
        not torch.equal(a, b) for a, b in zip(before, training.optimizer.parameters, strict=True)
    )
    entry = training.time_update(2)
    assert len(entry.seconds) == 2 and entry.flops == training.muon_flops()


def test_ways_of_attention_agree(training):
    setup = training.setup
    assert windows_of(setup.config) == [24, 64]
    q = torch.randn(2, 64, 2, 16, dtype=torch.float32)
    k, v = torch.randn(2, 2, 64, 1, 16, dtype=torch.float32)
    ways = ways_of_attention(setup)
    assert {"attention blocked", "attention sdpa", "attention, plain PyTorch"} <= set(ways)
    for window in windows_of(setup.config):
        wanted = plain_attention(q, k, v, window)
        for function in ways.values():
            assert torch.allclose(function(q, k, v, window=window), wanted, atol=1e-5)


def test_setups_that_do_not_exist_are_refused():
    with pytest.raises(UsageError, match="--attention=fast: unknown backend"):
        open_setup(SHAPE, attention="fast")
    with pytest.raises(UsageError, match="describe no model"):
        open_setup(Shape(**(vars(SHAPE) | {"head_dim": 15})))


def test_the_first_call_is_not_timed():
    calls = []
    seconds = timed(lambda: calls.append("call"), CPU, 3, before=lambda: calls.append("before"))
    assert len(seconds) == 3 and calls == ["before", "call"] * 4


def test_an_entry_has_the_peak_of_memory():
    entry = measured("x", lambda: torch.ones(1000, 1000).sum(), CPU, 1, tokens=7)
    assert entry.tokens == 7 and 4e6 <= entry.memory_bytes < 5e6 and entry.median > 0


def test_short_times():
    assert (short_time(0.01234), short_time(4.2)) == ("12.3 ms", "4.2 s")
