"""Runs that start with another run's weights (--init-from)."""

import json
import shutil

import pytest
import small

import train
from nanochat.run import checkpoint

# Nothing but the training that is saved.
QUIET = ("--eval-every=-1", "--sample-every=-1")


@pytest.fixture
def finished():
    """A folder with one finished run of 12 steps."""
    return small.finished()


@pytest.fixture
def copy(finished, tmp_path):
    """A folder of its own with that run."""
    small.copy_run(finished, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted run that starts with the weights of the finished one."""
    folder = tmp_path_factory.mktemp("whole")
    source = small.finished() / "run"
    assert small.run(folder, f"--init-from={source}", "--sample-every=-1") == 0
    return folder


def test_it_starts_where_the_other_run_ended(finished, tmp_path):
    source = finished / "run"
    flags = (f"--init-from={source}", "--matrix-lr=0.0001", "--max-seq-len=16")
    assert small.run(tmp_path, *flags, *QUIET, "--num-iterations=4") == 0
    # an untrained model begins at ln(257) = 5.5 nats
    assert small.losses(tmp_path)[0] < small.losses(finished)[0] - 0.5
    config = small.config(tmp_path)
    assert config["init_from"] == {"run": str(source), "step": 12}
    assert config["model"]["max_seq_len"] == 16


def test_killed_before_any_checkpoint(finished, whole, tmp_path):
    flags = (f"--init-from={finished / 'run'}", "--sample-every=-1")
    assert small.run_killed(tmp_path, 2, *flags) == -9
    assert small.run(tmp_path, "--resume", *flags) == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(whole))


def test_the_shape_and_the_tokenizer_are_those_of_the_source(finished, tmp_path):
    argv = [
        f"--init-from={finished / 'run'}",
        small.corpus(tmp_path),
        f"--out-dir={tmp_path}",
        "--model-tag=run",
        "--no-compile",
        "--max-seq-len=32",
        "--num-iterations=1",
        "--total-batch-size=256",
        "--no-save",
        "--sample-every=-1",
    ]
    assert train.run(argv) == 0
    config = small.config(tmp_path)
    assert config["args"]["depth"] == 2 and config["tokenizer"]["kind"] == "byte"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--depth=3",), ["--init-from", "--depth=2"]),
        (("--arch=llama",), ["--arch=speedrun"]),
        (("--tokenizer=char",), ["--tokenizer=char"]),
        (("--tokenizer=bpe", "--vocab-size=300"), ["--vocab-size=257"]),
    ],
)
def test_another_shape_is_refused(finished, tmp_path, capsys, flags, words):
    assert small.run(tmp_path, f"--init-from={finished / 'run'}", *flags) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_started_from_itself(copy, capsys):
    """Also where the folder is spelled in another way, whose middle need not exist."""
    before = small.files(copy)
    flags = (f"--init-from={copy / 'sub' / '..' / 'run'}", "--overwrite")
    assert small.run(copy, *flags) == 2
    # now the path exists as it is spelled
    (copy / "sub").mkdir()
    assert small.run(copy, *flags) == 2
    assert "own folder" in capsys.readouterr().err
    assert small.files(copy) == before


def test_a_run_begins_again_with_the_weights_it_began_with(copy, capsys):
    """Killed before its first checkpoint, it does not take what its source has learned since; nor
    anything if they are gone."""
    source, flags = copy / "run", (f"--init-from={copy / 'run'}", *QUIET)
    # the source has only got to step 8 when the run begins, and trains on meanwhile
    later = shutil.move(checkpoint.folder_of(source, 12), copy / "later")
    assert small.run_killed(copy, 2, *flags, tag="broken") == -9
    assert small.config(copy, "broken")["init_from"]["step"] == 8
    assert small.run(copy, *flags, tag="whole") == 0
    shutil.move(later, checkpoint.folder_of(source, 12))
    # a second run in the same state, whose source will be damaged
    shutil.copytree(copy / "broken", copy / "orphan")
    assert small.run(copy, "--resume", *flags, tag="broken") == 0
    assert small.losses(copy, "broken") == small.losses(copy, "whole")

    weights = checkpoint.folder_of(source, 8) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert small.run(copy, "--resume", *flags, tag="orphan") == 2
    assert "began with the weights of step 8" in capsys.readouterr().err


def test_the_default_folder_and_the_plan_are_those_of_the_source(copy, capsys):
    shutil.move(copy / "run", copy / "source")
    flags = [
        f"--init-from={copy / 'source'}",
        small.corpus(copy),
        f"--out-dir={copy}",
        "--num-iterations=1",
        "--total-batch-size=256",
        "--max-seq-len=32",
    ]
    assert train.run([*flags, "--dry-run", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["depth"], model["width"]) == (2, 32)
    assert (model["vocab_size"], model["max_seq_len"]) == (257, 32)
    assert train.run([*flags, "--no-compile", "--no-save", "--sample-every=-1"]) == 0
    # named after the depth of the source, not after the default of --depth
    assert (copy / "d2" / "config.json").exists()
    assert "an untrained model should have" not in capsys.readouterr().out
