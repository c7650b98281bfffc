"""Faults are found by name: the module and pass of the first bad number, the batch, a loss that
jumps, a loop that hangs, a rank that is gone."""

import json
import types

import pytest
import small
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import CppCompileError

from nanochat.common import TrainingFailed
from nanochat.model import attention
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT, MLP
from nanochat.model.layers import norm
from nanochat.run import checkpoint, faults
from nanochat.run.clock import Clock
from nanochat.run.state import TrainState
from nanochat.signals import Stopped

CONFIG = {
    "depth": 3,
    "width": 32,
    "head_dim": 16,
    "n_head": 2,
    "n_kv_head": 2,
    "vocab_size": 50,
    "max_seq_len": 16,
    "short_window": 8,
}
# On rank 1 only, from the 7th backward pass on, the gradient that leaves block 1's MLP is infinite.
ONE_RANK = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch, train
from nanochat.model.gpt import MLP
import test_faults
original = MLP.forward
count = [0]
def forward(self, x):
    count[0] += self.training
    out = original(self, x)
    if os.environ["RANK"] == "1" and count[0] > 6 * 2 and count[0] % 2 == 0:
        return test_faults.Backward.apply(out, float("inf"))
    return out
MLP.forward = forward
sys.exit(train.run(sys.argv[1:]))
"""


class Backward(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def make(dtype=torch.float32, **changes):
    """A model with noise on every weight, in training mode, and a function that runs a forward and
    backward pass."""
    model = build(GPTConfig(**CONFIG | changes), "cpu", dtype, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    ids = torch.randint(50, (2, 17), generator=generator)

    def rerun():
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        loss.backward()
        return [loss.detach()]

    return model.train(), rerun


def test_a_healthy_step_shows_nothing_and_keeps_no_hooks():
    model, rerun = make()
    expected = rerun()[0]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen = []

    def rerun_and_note():
        seen.extend(rerun())
        return seen

    assert faults.locate(model, rerun_and_note) == ""
    assert seen == [expected]
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-5, atol=1e-7)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks and not module._backward_pre_hooks
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize(
    "arch, layer, child, factor, word",
    [
        ("speedrun", 1, "mlp", float("nan"), "NaN"),
        ("speedrun", 2, "attention", float("inf"), "inf"),
        ("llama", 0, "mlp", float("nan"), "NaN"),
    ],
)
def test_planted_in_the_forward_pass(monkeypatch, arch, layer, child, factor, word):
    model, rerun = make(arch=arch, window_pattern="L")
    part = getattr(model.blocks[layer], child)
    original = part.forward
    where = torch.eye(16, 32, dtype=torch.bool)
    monkeypatch.setattr(part, "forward", lambda *args: original(*args).masked_fill(where, factor))
    assert faults.locate(model, rerun) == (
        f"the first non-finite value: blocks.{layer}.{child} ({type(part).__name__}), "
        f"in the forward pass ({word})"
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_planted_in_the_backward_pass(monkeypatch, layer):
    model, rerun = make()
    part = model.blocks[layer].mlp
    original = part.forward
    monkeypatch.setattr(part, "forward", lambda x: original(Backward.apply(x, float("nan"))))
    expected = f"the first non-finite value: blocks.{layer}.mlp (MLP), in the backward pass (NaN)"
    assert faults.locate(model, rerun) == expected


def test_code_between_modules_is_named_by_its_neighbours(monkeypatch):
    model, rerun = make()
    monkeypatch.setattr(F, "relu", lambda x: x / 0)
    found = faults.locate(model, rerun)
    assert "blocks.0.mlp, before blocks.0.mlp.down, in the forward pass" in found
    monkeypatch.undo()
    monkeypatch.setattr("nanochat.model.gpt.norm", lambda x: norm(x) * float("inf"))
    found = faults.locate(model, rerun)
    assert "the model's own code, before smear_gate, in the forward pass" in found


def test_exploding_values_are_named_too(monkeypatch):
    model, rerun = make()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.mul_(3e3)
    found = faults.locate(model, rerun)
    assert found.startswith("the first exploding value: ") and "blocks.1.mlp" in found


def test_a_step_that_cannot_be_repeated():
    """Out of memory, for example, without the compiler's fusions."""
    model, _ = make()

    def rerun():
        raise RuntimeError("no memory left")

    found = faults.locate(model, rerun)
    assert found == "the step could not be repeated to locate the fault (no memory left)"


# ---- faults as they happen ----


def test_attention_logits_without_their_scale(monkeypatch):
    """fp16: scaled, the products of queries and keys stay below 65,504; without the scale they do
    not."""
    one_head = {"head_dim": 32, "n_head": 1, "n_kv_head": 1}
    model, rerun = make(torch.float16, arch="llama", window_pattern="L", **one_head)
    with torch.no_grad():
        for name in ("query", "key"):
            getattr(model.blocks[1].attention, name).weight.mul_(100)
    monkeypatch.setattr(
        "nanochat.model.layers.attention",
        lambda q, k, v, window, _: attention._blocked(q * 32**-0.5, k, v, window),
    )
    assert "non-finite" not in faults.locate(model, rerun)
    monkeypatch.undo()
    assert (
        "non-finite value: blocks.1.attention, before blocks.1.attention.out, "
        "in the forward pass (NaN)"
    ) in faults.locate(model, rerun)


def test_fp16_overflow():
    model, rerun = make(torch.float16)
    with torch.no_grad():
        # ReLU squared of more than 256 is infinite
        model.blocks[2].mlp.up.weight.mul_(200)
    expected = "non-finite value: blocks.2.mlp, before blocks.2.mlp.down, in the forward pass (inf)"
    assert expected in faults.locate(model, rerun)


def test_an_infinite_row_of_the_embedding():
    model, rerun = make()
    with torch.no_grad():
        model.embedding.weight[17] = float("inf")
    expected = "the weights embedding.weight hold 32 non-finite numbers, the first at [17, 0]"
    assert faults.locate(model, rerun) == expected


# ---- in training ----


def plant(monkeypatch, from_pass):
    """Block 1's MLP gives NaN from the n-th forward pass of training on (0 is the warm-up)."""
    original = MLP.forward
    count = [0]

    def forward(self, x):
        out = original(self, x)
        if not self.training:
            return out
        count[0] += 1
        # 2 blocks a pass
        is_planted = count[0] > 2 * from_pass and count[0] % 2 == 0
        return out * float("nan") if is_planted else out

    monkeypatch.setattr(MLP, "forward", forward)


@pytest.mark.parametrize(
    "flags, step, times",
    [(("--max-skipped=3",), 8, "3 steps in a row had"), (("--debug-nans",), 6, "step 6 had")],
)
def test_a_run_ends_with_the_place_and_the_batch(tmp_path, monkeypatch, capsys, flags, step, times):
    # the 7th pass after that of the warm-up is step 6
    plant(monkeypatch, 7)
    # given, so that there is one pass of warm-up
    assert small.run(tmp_path, "--device-batch-size=8", *flags) == 1
    error = capsys.readouterr().err
    assert times in error and "blocks.1.mlp (MLP), in the forward pass (NaN)" in error
    dumped = json.loads((tmp_path / "run" / f"fault_step_{step:06d}.json").read_text())
    assert [entry["row"] for entry in dumped["rows"]] == list(range(step * 8, step * 8 + 8))
    assert all("squared" in entry["text"] or "twice" in entry["text"] for entry in dumped["rows"])
    assert small.summary(tmp_path)["status"] == "failed"
    monkeypatch.undo()
    # once the fault is mended, it continues
    assert small.run(tmp_path, "--resume") == 0


def test_an_infinite_gradient_on_one_rank(tmp_path):
    """The step is skipped on both ranks, and the message names the rank and the place."""
    script = ONE_RANK.format(root=str(small.ROOT), tests=str(small.ROOT / "tests"))
    done = small.run_ranks(tmp_path, 2, "--max-skipped=2", "--device-batch-size=4", script=script)
    assert done.returncode == 1
    assert (
        "rank 1: the first non-finite value: blocks.1.mlp, after blocks.1.mlp.down, "
        "in the backward pass"
    ) in done.stderr
    assert "rank 0: the first" not in done.stderr
    skipped = [line for line in small.lines(tmp_path) if "skipped" in line]
    assert len(skipped) == 2 and {line["skipped"] for line in skipped} == {"non-finite gradient"}


def test_spikes():
    recent = []
    assert all(faults.spike(3 + 0.01 * (i % 5), recent) is None for i in range(100))
    assert len(recent) == faults.SPIKE_WINDOW
    assert faults.spike(2.0, recent) is None, "a fall is none"
    assert faults.spike(5.0, recent) > 10
    assert faults.spike(5.0, []) is None, "nothing to compare with yet"


def test_the_loss_of_a_skipped_step_is_not_compared():
    recent = [3.0] * 40
    assert faults.spike(float("nan"), recent, finite=False) is None
    assert faults.spike(9.0, recent, finite=False) is None
    assert recent == [3.0] * 40


UNTRAINED = "untrained model should have ln(vocabulary) = 6.908"


@pytest.mark.parametrize(
    "step, loss, z, vocab_size, words",
    [
        (0, 6.9, None, 1000, []),
        (0, 7.41, None, 1000, ["warning: the loss at step 0 is 7.410", UNTRAINED]),
        # a model whose weights were trained before
        (0, 3.0, None, None, []),
        (1, 3.0, None, 1000, []),
        (5, 4.5, 7.25, None, ["step 5: the loss jumped to 4.5000, 7.2 standard deviations above"]),
    ],
)
def test_remarks_on_a_loss(step, loss, z, vocab_size, words):
    found = list(faults.remarks(step, loss, z, vocab_size))
    assert len(found) == (1 if words else 0)
    assert [word for word in words if word not in found[0]] == []
    if z is not None:
        assert found[0].endswith("above the recent ones")


def test_a_spike_is_reported_and_logged(tmp_path, monkeypatch, capsys):
    original = GPT.forward
    count = [0]

    def forward(self, ids, targets=None, cache=None, reduction="none", **options):
        out = original(self, ids, targets, cache, reduction, **options)
        count[0] += self.training
        return out + 9 if self.training and count[0] == 38 else out

    monkeypatch.setattr(GPT, "forward", forward)
    flags = ("--num-iterations=40", "--device-batch-size=8", "--matrix-lr=1e-9")
    assert small.run(tmp_path, *flags, *small.BARE) == 0
    assert [line["step"] for line in small.lines(tmp_path) if "spike" in line] == [36]
    assert "step 36: the loss jumped to" in capsys.readouterr().out


# ---- what ends a run ----


@pytest.mark.parametrize(
    "overflowed, in_a_row, debug_nans, ends",
    [
        (False, 2, False, False),
        (False, 3, False, True),
        (False, 1, True, True),
        # an fp16 loss scale that was too large is no fault
        (True, 3, True, False),
    ],
)
def test_giving_up(overflowed, in_a_row, debug_nans, ends):
    state = TrainState(skipped_in_a_row=in_a_row)
    assert faults.gives_up(state, overflowed, 3, debug_nans) is ends


class Texts:
    """Rows whose text is their number."""

    def __init__(self):
        tokenizer = types.SimpleNamespace(decode=lambda ids: f"text of {ids}")
        self.cache = types.SimpleNamespace(tokenizer=tokenizer)

    def row(self, number):
        return torch.tensor([-1, number])


@pytest.mark.parametrize(
    "good, newest",
    [(None, "no good checkpoint exists"), (4, "the last good checkpoint is step 4")],
)
def test_the_conclusion_of_a_fault(tmp_path, monkeypatch, good, newest):
    monkeypatch.setattr(checkpoint, "newest_finite", lambda folder: good)
    state = TrainState(step=8, skipped_in_a_row=2)
    text = faults.conclude("the loss itself (NaN)", state, tmp_path, Texts(), rows_per_step=2)
    path = tmp_path / "fault_step_000007.json"
    assert text == (
        "2 steps in a row had a non-finite loss or gradient; the loss itself (NaN); "
        f"{newest}; the text of that step's batch is in {path}"
    )
    rows = [{"row": row, "text": f"text of [{row}]"} for row in (14, 15)]
    expected = {"step": 7, "located": "the loss itself (NaN)", "rows": rows}
    assert json.loads(path.read_text()) == expected


def test_the_conclusion_where_the_fault_is_gone_and_the_disk_full(tmp_path):
    state = TrainState(step=1, skipped_in_a_row=1)
    text = faults.conclude("", state, tmp_path / "missing", Texts(), rows_per_step=1)
    assert text.startswith(
        "step 0 had a non-finite loss or gradient; recomputing the step gives finite"
    )
    assert "; no good checkpoint exists; the batch cannot be written (" in text


OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


@pytest.mark.parametrize(
    "device_batch, remedy",
    [
        (8, "--device-batch-size=4 would likely fit"),
        (1, "lower --max-seq-len or --depth"),
    ],
)
def test_lack_of_memory_names_a_remedy(device_batch, remedy):
    stop = types.SimpleNamespace(requested=False, at_once=False)
    error = faults.cause(RuntimeError(OUT_OF_MEMORY), device_batch, stop, 0.0)
    assert isinstance(error, TrainingFailed)
    named = f"out of memory with --device-batch-size={device_batch}; {remedy} ("
    assert str(error).startswith(named)


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "error, why",
    [
        (BackendCompilerFailed("inductor", FULL, None), "No space"),
        (CppCompileError(["g++"], "x.cpp:3: error: bad"), "x.cpp:3: error: bad"),
    ],
)
def test_a_compiler_that_fails_after_its_trial(error, why):
    stop = types.SimpleNamespace(requested=False, at_once=True)
    found = faults.cause(error, 4, stop, 0.0)
    assert isinstance(found, TrainingFailed)
    assert why in str(found) and "--resume --no-compile" in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "requested, at_once, stopped",
    [(False, True, False), (True, False, False), (True, True, True)],
)
def test_an_error_during_the_set_up_after_a_signal_is_a_stop(requested, at_once, stopped):
    """Ctrl-C also ends the compiler's processes. Later the error itself ends the run."""
    stop = types.SimpleNamespace(requested=requested, at_once=at_once)
    error = RuntimeError("a worker died")
    found = faults.cause(error, 4, stop, 0.0)
    assert isinstance(found, Stopped) if stopped else found is error


# ---- stalls ----


def test_watchdog():
    now = [0.0]
    reports = []
    clock = Clock(now=lambda: now[0])
    dog = faults.Watchdog(reports.append, clock)
    for step in range(5):
        with clock.step(step):
            now[0] += 10
    now[0] += 199
    dog.check()
    assert reports == []
    now[0] += 2
    dog.check()
    dog.check()
    assert len(reports) == 1, "again only after twice that time"
    assert "nothing has moved for 3m21s at step 5 (usually 10.0s)" in reports[0]
    assert "thread MainThread" in reports[0] and "test_watchdog" in reports[0]
    now[0] += 200
    dog.check()
    assert len(reports) == 2
    clock.begin("the evaluation of step 5")
    now[0] += 1000
    dog.check()
    assert len(reports) == 2
    dog.close()


def test_a_stall_before_the_first_step_has_no_usual_time():
    now = [0.0]
    reports = []
    dog = faults.Watchdog(reports.append, Clock(now=lambda: now[0]))
    now[0] += 1801
    dog.check()
    assert reports[0].startswith("warning: nothing has moved for 30m01s at the first step\n")
    dog.close()


# ---- ranks that are gone ----


# On rank 1 only, a SIGKILL, which leaves it no time to notify the others.
KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
original = torch.Tensor.backward
count = [0]
def backward(self):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self)
torch.Tensor.backward = backward
sys.exit(train.run(sys.argv[1:]))
"""


def test_a_dead_rank_is_named(tmp_path):
    """The others end immediately and report which it was; the run can be resumed."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(small.ROOT)))
    done = small.run_torchrun(tmp_path, 2, "--save-every=2", script=script)
    assert done.returncode == 1
    expected = "training failed: rank 1 did not answer within 3 s; the other ranks end too"
    assert expected in done.stderr
    summary = small.summary(tmp_path)
    assert summary["status"] == "failed" and "rank 1 did not answer" in summary["reason"]
    assert small.run(tmp_path, "--resume") == 0


# Rank 1 dies. Rank 2 is so slow in that step that rank 0 has given up on both and ended when it
# finds out. Rank 0 holds the store, so it ends after rank 2.
SLOW = """
import datetime, os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
from nanochat import ranks
ranks.LEAST_PATIENCE = 0.5
original = torch.Tensor.backward
count = [0]
rank = os.environ["RANK"]
store = torch.distributed.distributed_c10d._get_default_store
def wait_for(other):
    store().wait([f"{{other}} has ended"], datetime.timedelta(seconds=30))
def backward(self):
    count[0] += 1
    if count[0] == 5 and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if count[0] == 5 and rank == "2":
        wait_for("0")
    original(self)
torch.Tensor.backward = backward
code = train.run(sys.argv[1:])
store().set(f"{{rank}} has ended", "")
if rank == "0":
    wait_for("2")
sys.exit(code)
"""


def test_a_slow_rank_is_not_blamed_for_a_dead_one(tmp_path):
    """Who only lost another rank is not named by a third, nor quoted by it."""
    flags = ("--total-batch-size=96", "--device-batch-size=1")
    done = small.run_ranks(tmp_path, 3, *flags, script=SLOW.format(root=str(small.ROOT)))
    words = [line for line in done.stderr.splitlines() if "training failed" in line]
    assert len(words) == 2, done.stderr
    # it cannot know yet which of them is slow
    assert "rank 1 did not answer within 0.5 s and rank 2 did not answer" in words[0]
    expected = "training failed: rank 1 did not answer within 0.5 s; the other ranks end too"
    assert expected in words[1]


# On rank 1 only, a bug.
BROKEN = """
import os, sys
sys.path.insert(0, {root!r})
import torch, train
original = torch.Tensor.backward
count = [0]
def backward(self):
    count[0] += 1
    if os.environ["RANK"] == {rank!r} and count[0] == 5:
        raise RuntimeError("no luck today")
    original(self)
torch.Tensor.backward = backward
sys.exit(train.run(sys.argv[1:]))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_is_named_with_its_reason(tmp_path, rank):
    done = small.run_ranks(tmp_path, 2, script=BROKEN.format(root=str(small.ROOT), rank=rank))
    assert done.returncode == 1
    # without torchrun rank 0 holds the store of last words, and is gone in one of the cases
    named = "rank 1 failed (RuntimeError: no luck today)" if rank == "1" else "rank 0 is gone"
    assert f"training failed: {named}; the other ranks end too" in done.stderr
    assert "no luck today" in small.summary(tmp_path)["reason"]
