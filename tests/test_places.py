"""Run folders whose parts lie elsewhere: on other disks through links, moved, or gone."""

import shutil

import pytest
import small

import train
from nanochat.run import checkpoint

QUIET = ("--eval-every=-1", "--sample-every=-1")


@pytest.fixture
def copy(tmp_path):
    """A folder of its own with a finished run of 12 steps."""
    small.copy_run(small.finished(), tmp_path)
    return tmp_path


@pytest.fixture
def elsewhere(copy):
    """The same with its checkpoints on another disk, through a link; returns that place."""
    disk = copy / "disk"
    disk.mkdir()
    shutil.move(copy / "run" / "checkpoints", disk / "kept")
    (copy / "run" / "checkpoints").symlink_to(disk / "kept")
    return disk / "kept"


def steps(folder):
    return checkpoint.steps_of(folder / "run")


def test_a_linked_run_is_resumed_and_its_leftovers_are_deleted(copy, elsewhere):
    (elsewhere / ".step_000099.partial").mkdir()
    assert small.run(copy, "--resume", "--num-iterations=20", *QUIET) == 0
    assert steps(copy)[-1] == 20
    assert (elsewhere / "step_000020").is_dir()
    assert not (elsewhere / ".step_000099.partial").exists()


def test_a_linked_run_is_overwritten_where_it_lies(copy, elsewhere):
    assert small.run(copy, "--overwrite", "--num-iterations=3", "--save-every=-1", *QUIET) == 0
    assert (copy / "run" / "checkpoints").is_symlink()
    assert steps(copy) == [1, 3] and (elsewhere / "step_000003").is_dir()
    assert not (elsewhere / "step_000012").exists()


def test_a_linked_checkpoint_goes_with_what_it_links_to(copy):
    moved = copy / "moved"
    shutil.move(checkpoint.folder_of(copy / "run", 4), moved)
    checkpoint.folder_of(copy / "run", 4).symlink_to(moved)
    assert steps(copy) == [4, 6, 8, 12]
    checkpoint.prune(copy / "run", keep_last=1)
    assert steps(copy) == [6, 8, 12] and not moved.exists()


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"], ["--resume-from-step=4"]])
def test_a_link_that_leads_nowhere_is_refused(copy, elsewhere, capsys, flags):
    shutil.move(elsewhere, copy / "unmounted")
    before = small.files(copy)
    assert small.run(copy, *flags) == 2
    error = capsys.readouterr().err
    assert f"checkpoints is a link to {elsewhere}, which does not exist; mount" in error
    assert small.files(copy) == before


def test_a_run_folder_that_is_a_link_to_nowhere(tmp_path, capsys):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    assert small.run(tmp_path) == 2
    assert f"run is a link to {tmp_path / 'gone'}, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["this", "an earlier one", "this, without its summary"])
@pytest.mark.parametrize("place", ["empty", "missing"])
def test_a_run_that_had_checkpoints_does_not_begin_again(copy, elsewhere, capsys, place, version):
    """Its disk is not mounted: an empty folder is there in its place."""
    shutil.rmtree(elsewhere)
    if place == "empty":
        elsewhere.mkdir()
    else:
        (copy / "run" / "checkpoints").unlink()
    summary = copy / "run" / "summary.json"
    if version == "an earlier one":
        summary.write_text(summary.read_text().replace('"checkpoint"', '"of_no_name"'))
    elif version != "this":
        summary.unlink()
    before = small.files(copy)
    assert small.run(copy, "--resume", "--num-iterations=20") == 2
    error = capsys.readouterr().err
    assert "had a checkpoint at step 12" in error and "mounted" in error and "--overwrite" in error
    assert small.files(copy) == before


def test_the_summary_knows_of_a_checkpoint_as_soon_as_it_is_safe(tmp_path):
    """Also if the run is killed before its next evaluation."""
    assert small.run_killed(tmp_path, 9, *QUIET) == -9
    assert small.summary(tmp_path)["checkpoint"] in (6, 8)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert small.run(tmp_path, "--resume", *QUIET) == 2


def test_a_run_without_checkpoints_begins_again(tmp_path):
    flags = ("--no-save", "--save-every=-1", "--num-iterations=2", *QUIET)
    assert small.run(tmp_path, *flags) == 0
    assert small.summary(tmp_path)["checkpoint"] is None
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(summary.read_text().replace("completed", "stopped"))
    assert small.run(tmp_path, "--resume", *flags) == 0


def test_a_name_with_which_no_checkpoint_can_be_written(tmp_path, capsys):
    assert small.run(tmp_path, tag="caf\udce9") == 2
    assert "caf? holds bytes that are not UTF-8" in capsys.readouterr().err
    assert not list(tmp_path.glob("caf*"))


def test_a_name_that_is_too_long(tmp_path, capsys):
    assert small.run(tmp_path, tag="x" * 300) == 2
    assert "--model-tag: a run folder of that name cannot exist (File" in capsys.readouterr().err


# ---- what a run began with is gone ----


def test_the_prompts_of_a_run_outlive_their_file(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("12 squared\n7 squared\n")
    flags = (f"--sample-prompts={prompts}", "--num-iterations=6", "--sample-every=3")
    assert small.run(tmp_path, *flags, "--eval-every=-1") == 0
    prompts.unlink()
    again = ("--resume", "--num-iterations=9", "--sample-every=3", "--eval-every=-1")
    assert small.run(tmp_path, *again) == 0
    samples = small.lines(tmp_path, name="samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in (3, 6, 9) for prompt in ("12 squared", "7 squared")
    ]
    # given again, the file is needed
    assert small.run(tmp_path, *again, f"--sample-prompts={prompts}") == 2
    assert f"--sample-prompts={prompts}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("repeated", [True, False])
def test_a_run_outlives_the_run_that_it_began_with(tmp_path, repeated):
    source = small.copy_run(small.finished(), tmp_path, tag="source")
    flags = (f"--init-from={source}", "--num-iterations=4", *QUIET)
    assert small.run(tmp_path, *flags) == 0
    shutil.rmtree(source)
    again = flags[:1] if repeated else ()
    assert small.run(tmp_path, "--resume", *again, "--num-iterations=6", *QUIET) == 0
    assert small.summary(tmp_path)["step"] == 6


@pytest.mark.parametrize("repeated", [True, False])
def test_a_run_outlives_the_folder_of_its_tokenizer(copy, repeated):
    tokenizer = copy / "run" / "tokenizer"
    shutil.copytree(tokenizer, copy / "moved")
    given = [f"--tokenizer={copy / 'moved'}"]
    flags = (*given, "--num-iterations=2", *QUIET)
    assert small.run(copy, *flags, tag="other") == 0
    shutil.rmtree(copy / "moved")
    argv = [f"--out-dir={copy}", "--model-tag=other", "--resume", "--num-iterations=4"]
    assert train.run(argv + given * repeated) == 0
    # a run that begins needs it
    assert small.run(copy, *flags, "--resume", tag="new") == 2


# ---- checks look at the values in force ----


def test_the_batch_is_checked_with_the_context_of_the_source(tmp_path):
    """The source has a context of 32, and the default is 2,048."""
    source = small.finished() / "run"
    argv = [
        f"--init-from={source}",
        small.corpus(tmp_path),
        f"--out-dir={tmp_path}",
        "--model-tag=run",
        "--total-batch-size=256",
        "--num-iterations=2",
        "--no-compile",
        "--dtype=float32",
        *QUIET,
    ]
    assert train.run(argv) == 0
    assert train.run([*argv, "--resume", "--num-iterations=4"]) == 0
    assert small.config(tmp_path)["plan"]["rows_per_step"] == 8


def test_a_given_device_batch_is_checked_with_the_batch_of_the_run(copy, capsys):
    argv = [f"--out-dir={copy}", "--model-tag=run", "--resume", "--device-batch-size=3"]
    assert train.run([*argv, "--num-iterations=20"]) == 2
    error = capsys.readouterr().err
    assert (
        "--device-batch-size=3: does not divide the 8 rows of a rank in this run's batch; use 1 or "
        "2 or 4 or 8, or leave it out" in error
    )
