"""train.py on several ranks: the same numbers as on one, and leaving in unison."""

import functools

import pytest
import small

from nanochat.run import checkpoint

# By rank 0's clock every step takes 1.5 s, by that of rank 1 4 s.
CLOCKS = """
import functools, os, sys
sys.path.insert(0, {root!r})
import train
from nanochat.optim.optimizer import Optimizer
from nanochat.run import lifecycle
seconds = 1.5 if os.environ["RANK"] == "0" else 4.0
original, updates = Optimizer.step, [0]
def step(self, *args):
    original(self, *args)
    updates[0] += 1
Optimizer.step = step
lifecycle.Clock = functools.partial(lifecycle.Clock, now=lambda: seconds * updates[0])
sys.exit(train.run(sys.argv[1:]))
"""
# Rank 1 alone gets a signal, in its third step.
ONE_IS_STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from nanochat.optim.optimizer import Optimizer
original, updates = Optimizer.step, [0]
def step(self, *args):
    original(self, *args)
    updates[0] += 1
    if os.environ["RANK"] == "1" and updates[0] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
Optimizer.step = step
code = train.run(sys.argv[1:])
# one write: the lines of both ranks meet in one pipe
os.write(1, ("rank " + os.environ["RANK"] + " ends with " + str(code) + "\\n").encode())
sys.exit(code)
"""


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps on one rank."""
    return small.finished()


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    """on_one_rank(*flags): the folder of a run with these flags, trained once for all tests."""

    @functools.cache
    def trained(*flags):
        folder = tmp_path_factory.mktemp("one")
        assert small.run(folder, *flags) == 0
        return folder

    return trained


@pytest.mark.parametrize(
    "optimizer, accumulation, more",
    [
        ("muon", 1, []),
        ("muon", 2, []),
        ("adamw", 2, []),
        # at its default rate this tiny llama amplifies rounding a thousandfold within 20 steps, on
        # one rank too (runs/LOG.md)
        ("muon", 1, ["--arch=llama", "--matrix-lr=0.005"]),
        ("adamw", 1, ["--arch=llama", "--matrix-lr=0.0015"]),
    ],
)
def test_two_ranks_equal_one(tmp_path, on_one_rank, optimizer, accumulation, more):
    """100 fp32 steps; depth 3 gives 3 square matrices of most shapes, which 2 ranks cannot share
    evenly."""
    flags = (
        "--depth=3",
        "--num-iterations=100",
        f"--optimizer={optimizer}",
        "--eval-every=50",
        "--sample-every=-1",
        "--no-save",
        "--save-every=-1",
        *more,
    )
    one = on_one_rank(*flags)
    done = small.run_ranks(tmp_path, 2, *flags, f"--device-batch-size={4 // accumulation}")
    assert done.returncode == 0, done.stderr
    assert small.losses(tmp_path) == pytest.approx(small.losses(one), abs=1e-4)
    bpb = small.summary(one)["val_bpb"]
    assert small.summary(tmp_path)["val_bpb"] == pytest.approx(bpb, abs=1e-4)


def test_a_time_budget_on_two_ranks(tmp_path):
    """The ranks' clocks differ; rank 0's decides, or they would wait for one another for ever:
    30 s at 1.5 s a step."""
    flags = ("--num-iterations=-1", "--target-minutes=0.5", *small.BARE)
    script = CLOCKS.format(root=str(small.ROOT))
    done = small.run_ranks(tmp_path, 2, *flags, script=script)
    assert done.returncode == 0, done.stderr
    steps = small.config(tmp_path)["plan"]["num_iterations"]
    assert small.summary(tmp_path)["step"] == steps == 20


def test_all_ranks_leave_at_the_same_step(tmp_path):
    """Also those that got no signal, and after the same save."""
    script = ONE_IS_STOPPED.format(root=str(small.ROOT))
    flags = ("--eval-every=-1", "--sample-every=-1")
    done = small.run_ranks(tmp_path, 2, *flags, script=script)
    ends = sorted(line for line in done.stderr.splitlines() if "ends with" in line)
    assert ends == ["rank 0 ends with 75", "rank 1 ends with 75"], done.stderr
    assert small.summary(tmp_path)["status"] == "stopped"
    assert small.summary(tmp_path)["step"] == 3
    assert checkpoint.steps_of(tmp_path / "run") == [3]


def test_two_ranks_continue_what_one_began(tmp_path, finished):
    """The device batch given then is more than each of them has, and nobody gives it now."""
    assert small.run_killed(tmp_path, 7, "--device-batch-size=8", "--sample-every=-1") == -9
    resumed = small.run_torchrun(tmp_path, 2, "--resume", "--sample-every=-1")
    assert resumed.returncode == 0, resumed.stderr
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-4)


@pytest.mark.slow
def test_one_two_four_ranks_and_one_again(tmp_path, finished):
    """One checkpoint after another on other world sizes: the same batches in the same order, so the
    same losses."""
    flags = ("--save-every=3", "--eval-every=-1", "--sample-every=-1")
    for ranks, step in ((1, 3), (2, 6), (4, 9)):
        script = tmp_path / "killer.py"
        script.write_text(small.KILLER.format(root=str(small.ROOT), step=step, signal="SIGTERM"))
        done = small.run_torchrun(tmp_path, ranks, *flags, "--resume", script=script)
        assert small.summary(tmp_path)["status"] == "stopped", done.stderr
    assert small.run(tmp_path, *flags, "--resume") == 0
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-4)
