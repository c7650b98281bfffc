"""--shard: the same numbers as whole models, checkpoints that fit both, and saves that fail."""

import json

import pytest
import small
import torch
from safetensors.torch import save_file

from nanochat import ranks
from nanochat.common import UsageError
from nanochat.ranks import Launch
from nanochat.run import checkpoint, shares
from nanochat.run.tensor_files import StoredTensors, file_name

# Rank 1 cannot write its part of the first save.
ONE_DISK_IS_FULL = """
import errno, os, sys
sys.path.insert(0, {root!r})
import train
from nanochat.run import checkpoint
write, failed = checkpoint.write_share, []
def once_full(*args, **options):
    if not failed:
        failed.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(*args, **options)
checkpoint.write_share = once_full
sys.exit(train.run(sys.argv[1:]))
"""

# After the second update one weight of rank 1 is no number.
ONE_BAD_WEIGHT = """
import sys
sys.path.insert(0, {root!r})
import train
from nanochat import ranks
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.sharding import own_part
step, updates = Optimizer.step, []
def spoil(self, *args):
    step(self, *args)
    updates.append(1)
    if len(updates) == 2 and ranks.rank() == 1:
        own_part(self.parameters[0].data)[0, 0] = float("nan")
Optimizer.step = spoil
sys.exit(train.run(sys.argv[1:]))
"""
# In its first evaluation rank 1 runs out of memory, in the middle of a pass.
ONE_PASS_FAILS = """
import sys
sys.path.insert(0, {root!r})
import train
from nanochat import ranks
from nanochat.model.gpt import MLP
forward = MLP.forward
def fails(self, x):
    if not self.training and ranks.rank() == 1:
        raise MemoryError("no room for a pass")
    return forward(self, x)
MLP.forward = fails
sys.exit(train.run(sys.argv[1:]))
"""
# Each rank has 700 MB, of which libraries take most.
LITTLE_MEMORY = """
import sys
sys.path.insert(0, {root!r})
import train
from nanochat.run import memory
memory.free_memory = lambda device, devices: 700e6
sys.exit(train.run(sys.argv[1:]))
"""


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps on one rank."""
    return small.finished()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small CORE bundle, of which 2 ranks have shares of different sizes."""
    return small.core_bundle(tmp_path_factory.mktemp("core"), n=3)


def samples(folder):
    """The text of a run's samples.jsonl, "" if it has none."""
    path = folder / "run/samples.jsonl"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize(
    "n, more",
    [
        (2, ["--core-metric-every=50", "--core-bundle={bundle}"]),
        (4, ["--device-batch-size=1", "--activation-checkpointing", "--grad-clip=0.3"]),
        (2, ["--arch=llama", "--matrix-lr=0.005", "--tie-embeddings"]),
        (2, ["--optimizer=adamw", "--dropout=0.1", "--weight-decay=0.1"]),
    ],
)
def test_sharded_ranks_equal_whole_ones(tmp_path, bundle, n, more):
    """50 fp32 steps, with evaluation, CORE and samples, in which ranks have different numbers of
    passes; 3 layers, and rows that neither 2 nor 4 ranks share evenly."""
    flags = (
        "--depth=3",
        "--aspect-ratio=10",
        "--head-dim=10",
        "--num-iterations=50",
        "--device-batch-size=2",
        "--eval-every=25",
        "--eval-tokens=2000",
        f"--sample-every={50 if n == 2 else -1}",
        "--save-every=-1",
        *(flag.format(bundle=bundle) for flag in more),
    )
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder, extra in ((whole, []), (sharded, ["--shard"])):
        folder.mkdir()
        done = small.run_ranks(folder, n, *flags, *extra)
        assert done.returncode == 0, done.stderr
    assert f"weights split over {n} ranks" in done.stderr
    assert small.losses(sharded) == pytest.approx(small.losses(whole), abs=1e-4)
    one, other = small.summary(whole), small.summary(sharded)
    assert other["val_bpb"] == pytest.approx(one["val_bpb"], abs=1e-4)
    assert other["core_metric"] == one["core_metric"]
    assert samples(sharded) == samples(whole)


def test_whole_and_sharded_ranks_continue_each_other(tmp_path, finished):
    """One whole rank, two sharded ones, four sharded ones, and one whole rank again."""
    flags = ("--save-every=3", "--eval-every=-1", "--sample-every=-1")
    assert small.run_killed(tmp_path, 4, *flags) == -9
    for n, step in ((2, 7), (4, 10)):
        script = small.KILLER.format(root=str(small.ROOT), step=step, signal="SIGTERM")
        more = ("--shard", "--resume", "--device-batch-size=2")
        done = small.run_ranks(tmp_path, n, *flags, *more, script=script)
        assert small.summary(tmp_path)["status"] == "stopped", done.stderr
        newest = checkpoint.steps_of(tmp_path / "run")[-1]
        folder = checkpoint.folder_of(tmp_path / "run", newest)
        assert len(list(folder.glob(f"optimizer-*-of-0000{n}.safetensors"))) == n
    assert small.run(tmp_path, *flags, "--resume", "--no-shard") == 0
    assert small.losses(tmp_path) == pytest.approx(small.losses(finished), abs=1e-4)


def test_a_killed_sharded_run_resumes_exactly(tmp_path):
    """The same losses and weights as without the kill, compared with ==."""
    flags = ("--shard", "--eval-every=6", "--sample-every=-1", "--dropout=0.1")
    script = small.KILLER.format(root=str(small.ROOT), step=9, signal="SIGKILL")
    killed = small.run_ranks(tmp_path, 2, *flags, script=script)
    assert checkpoint.steps_of(tmp_path / "run") == [4, 6, 8], killed.stderr
    for tag in ("run", "again"):
        done = small.run_ranks(tmp_path, 2, *flags, "--resume", tag=tag)
        assert done.returncode == 0, done.stderr
    assert small.losses(tmp_path) == small.losses(tmp_path, tag="again")
    first, second = (
        StoredTensors(checkpoint.folder_of(tmp_path / tag, 12), "model") for tag in ("run", "again")
    )
    assert first.pieces.keys() == second.pieces.keys()
    assert all(torch.equal(first.read(name), second.read(name)) for name in second.pieces)


def test_a_rank_that_cannot_save_its_part_tries_again(tmp_path):
    script = ONE_DISK_IS_FULL.format(root=str(small.ROOT))
    flags = ("--shard", "--save-every=4", "--eval-every=-1", "--sample-every=-1")
    done = small.run_ranks(tmp_path, 2, *flags, script=script)
    assert done.returncode == 0, done.stderr
    assert "cannot be saved (rank 1: [Errno 28] No space left" in done.stderr
    assert 12 in checkpoint.steps_of(tmp_path / "run")
    assert checkpoint.damage(tmp_path / "run", 12) is None
    left = (tmp_path / "run/checkpoints").glob(".*")
    assert [path.name for path in left] == []


def test_a_run_folder_that_one_machine_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "from_all", lambda sees: [sees, False])
    with pytest.raises(UsageError, match=r"--shard: rank 1 does not see .* --out-dir on a disk"):
        shares.check_shared_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer, reason",
    [
        ({"problem": "disk full", "hopeless": False}, "rank 1: disk full"),
        ({"problem": "NaN", "hopeless": True}, "rank 1: NaN"),
        (None, "rank 1 ended before its part was written"),
    ],
)
def test_why_a_part_is_missing(tmp_path, monkeypatch, answer, reason):
    monkeypatch.setattr(ranks, "_launch", Launch(0, 2))
    monkeypatch.setattr(ranks, "told", lambda key: answer and json.dumps(answer))
    monkeypatch.setattr(ranks, "said_last_word", lambda number: True)
    monkeypatch.setattr(shares, "PATIENCE", 0.0)
    kind = checkpoint.NotFinite if answer and answer["hopeless"] else OSError
    said = {}
    monkeypatch.setattr(ranks, "tell", said.__setitem__)
    with pytest.raises(kind, match=reason):
        shares.Shares("s").join(tmp_path, 4, lambda others: others(tmp_path))
    # for the ranks that wait for this one
    assert reason in json.loads(said["share/s/1/0"])["problem"]


def test_bad_weights_are_located(tmp_path):
    """By the row in the whole matrix, of which rank 1 has the second half."""
    script = ONE_BAD_WEIGHT.format(root=str(small.ROOT))
    done = small.run_ranks(tmp_path, 2, "--shard", "--debug-nans", *small.BARE, script=script)
    assert done.returncode == 1
    assert "hold 1 non-finite number, the first at [16, 0]" in done.stderr


def test_a_pass_that_fails_in_an_evaluation_ends_all_ranks(tmp_path):
    """The other rank is in the same pass, and would wait for ever."""
    script = ONE_PASS_FAILS.format(root=str(small.ROOT))
    done = small.run_ranks(tmp_path, 2, "--shard", "--eval-every=5", script=script)
    assert done.returncode == 1
    assert small.summary(tmp_path)["status"] == "failed"
    assert "no room for a pass" in done.stderr


def test_memory_is_given_back_where_it_is_tight(tmp_path):
    script = LITTLE_MEMORY.format(root=str(small.ROOT))
    flags = ("--shard", "--device-batch-size=2", "--num-iterations=2", *small.BARE)
    done = small.run_ranks(tmp_path, 2, *flags, script=script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("memory is tight") == 1


def test_refused_together(tmp_path, capsys):
    assert small.run(tmp_path, "--shard", "--fp8", "--compile") == 2
    assert "--shard" in capsys.readouterr().err


def test_one_rank_has_nothing_to_split(tmp_path, capsys):
    assert small.run(tmp_path, "--shard", "--num-iterations=2", *small.BARE) == 0
    assert "--shard changes nothing with one rank" in capsys.readouterr().out


# ----- the files of several ranks


@pytest.fixture
def three_files(tmp_path):
    """A folder with 5 rows of a matrix in 3 files, the last of which has none, a vector in one of
    them, and a number in all."""
    whole = {
        "matrix": torch.arange(10.0).view(5, 2),
        "only": torch.ones(4),
        "steps": torch.ones(()),
    }
    for i, rows in enumerate((slice(0, 3), slice(3, 5), slice(5, 5))):
        held = {"matrix": whole["matrix"][rows].contiguous(), "steps": whole["steps"]}
        if i == 1:
            held["only"] = whole["only"]
        save_file(held, tmp_path / file_name("optimizer", i, 3))
    return tmp_path, whole


def test_reading_rows_across_files(three_files):
    folder, whole = three_files
    stored = StoredTensors(folder, "optimizer")
    assert {name: stored.shape(name) for name in stored.pieces} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    found = {name: stored.read(name) for name in stored.pieces}
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    for start in range(6):
        for stop in range(start, 6):
            rows = slice(start, stop)
            assert torch.equal(stored.read("matrix", rows), whole["matrix"][rows])


def test_a_file_of_a_rank_is_gone(three_files):
    folder, _ = three_files
    (folder / file_name("optimizer", 1, 3)).unlink()
    with pytest.raises(UsageError, match="has 2 of the 3 files optimizer-00001-of-00003"):
        StoredTensors(folder, "optimizer")
