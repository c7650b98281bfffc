"""A run that is killed, stopped, resumed or extended equals the uninterrupted one; what would lose
a run or continue another one is refused."""

import json
import shutil

import pytest
import small

import train
from nanochat.common import UsageError, base_dir
from nanochat.data.sources import open_corpus
from nanochat.run import checkpoint, resume
from nanochat.run.folder import RunFolder

# Samples take half of a run's time.
QUIET = "--sample-every=-1"


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps, warm-down from step 6."""
    return small.finished()


@pytest.fixture
def copy(finished, tmp_path):
    """A folder of its own with that run."""
    small.copy_run(finished, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def killed_at_9(tmp_path_factory):
    """A folder with a run that was killed in step 9, after the checkpoints of steps 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("killed")
    assert small.run_killed(folder, 9, QUIET) == -9
    return folder


@pytest.fixture
def killed(killed_at_9, tmp_path):
    """A folder of its own with that run."""
    small.copy_run(killed_at_9, tmp_path)
    return tmp_path


def assert_same_run(folder, tag, expected_folder, expected_tag="run", steps=12):
    """Two runs have the same metrics, but for what a clock decides, and the same last weights."""
    expected = small.timeless(small.lines(expected_folder, expected_tag))
    assert small.timeless(small.lines(folder, tag)) == expected
    small.assert_same_weights(folder, steps, tag, expected_folder, expected_tag)


# ---- killed and resumed ----


def test_killed_and_resumed_equals_uninterrupted(tmp_path, finished):
    """SIGKILL at three steps that are no save points, in one run: everything but the clock is equal
    with ==."""
    assert small.run_killed(tmp_path, 5) == -9
    assert small.run_killed(tmp_path, 7, "--resume") == -9
    assert small.run_killed(tmp_path, 11, "--resume") == -9
    tear_last_line(tmp_path)
    assert small.run(tmp_path, "--resume") == 0
    assert_same_run(tmp_path, "run", finished)
    samples = [
        small.timeless(small.lines(folder, name="samples.jsonl")) for folder in (tmp_path, finished)
    ]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype=bfloat16", "--dropout=0.2", "--device-batch-size=4"),
        ("--optimizer=adamw", "--lr-schedule=cosine", "--n-kv-head=1"),
        ("--arch=llama", "--n-kv-head=1", "--tie-embeddings", "--grad-clip=1", "--warmup-steps=3"),
        ("--arch=llama", "--optimizer=adamw"),
    ],
    ids=["bf16 dropout accumulation", "adamw cosine gqa", "llama", "llama adamw"],
)
def test_other_models_and_optimizers_resume_exactly(tmp_path, flags):
    """The last start resumes from what a resumed run has saved."""
    flags = (*flags, QUIET)
    assert small.run(tmp_path, *flags, tag="whole") == 0
    assert small.run_killed(tmp_path, 5, *flags, tag="broken") == -9
    assert small.run_killed(tmp_path, 11, *flags, "--resume", tag="broken") == -9
    tear_last_line(tmp_path, tag="broken")
    assert small.run(tmp_path, *flags, "--resume", tag="broken") == 0
    assert_same_run(tmp_path, "broken", tmp_path, "whole")


def tear_last_line(folder, tag="run"):
    """What a machine that loses power leaves."""
    with open(folder / tag / "metrics.jsonl", "a") as f:
        f.write('{"step": 11, "tok')


def test_compiled_resume_is_exact(tmp_path):
    """One layer: each kind of layer takes tens of seconds to compile."""
    flags = (
        "--depth=1",
        "--compile",
        "--aspect-ratio=64",
        # for which attention runs in tiles
        "--head-dim=32",
        "--num-iterations=6",
        QUIET,
    )
    assert small.run(tmp_path, *flags, tag="whole") == 0
    assert small.run_killed(tmp_path, 5, *flags, tag="broken") == -9
    assert (base_dir() / "compile").is_dir()
    assert small.run(tmp_path, *flags, "--resume", tag="broken") == 0
    assert small.losses(tmp_path, "broken") == small.losses(tmp_path, "whole")
    small.assert_same_weights(tmp_path, 6, "broken", tmp_path, "whole")


def test_killed_before_the_first_checkpoint(tmp_path, finished):
    assert small.run_killed(tmp_path, 2, QUIET) == -9
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert small.losses(tmp_path) == small.losses(finished)


def test_a_run_that_saved_nothing_saves_when_it_is_resumed(tmp_path, capsys):
    """--no-save belongs to one start: given again it holds again."""
    for again in ([], ["--resume"]):
        assert small.run(tmp_path, *small.BARE, "--num-iterations=2", *again) == 0
        assert checkpoint.steps_of(tmp_path / "run") == []
    assert small.run(tmp_path, "--resume", QUIET, "--save-every=1") == 0
    assert "checkpoints are saved (was --no-save)" in capsys.readouterr().out
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 12
    assert small.config(tmp_path)["args"]["no_save"] is False


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_saves_and_stops(tmp_path, finished, name):
    """It arrives while step 6 is logged, and is heard before the next."""
    assert small.run_killed(tmp_path, 6, QUIET, signal=name) == 75
    assert small.summary(tmp_path)["status"] == "stopped"
    assert small.summary(tmp_path)["step"] == checkpoint.steps_of(tmp_path / "run")[-1] == 7
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert small.timeless(small.lines(tmp_path)) == small.timeless(small.lines(finished))


def test_resume_needs_no_flags_but_the_folder(killed, finished):
    assert train.run(["--resume", f"--out-dir={killed}", "--model-tag=run"]) == 0
    assert small.timeless(small.lines(killed)) == small.timeless(small.lines(finished))
    assert checkpoint.steps_of(killed / "run") == [4, 6, 8, 12]


def test_resuming_on_other_terms(killed, finished, capsys):
    """Another device batch size and evaluation cadence are allowed and printed; losses stay the
    same to rounding."""
    assert small.run(killed, "--resume", "--device-batch-size=2", "--eval-every=4", QUIET) == 0
    assert small.losses(killed) == pytest.approx(small.losses(finished), abs=1e-5)
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("resuming"))
    # the copy has its own --data too
    assert "from step 8; changed: --data=" in line
    assert line.endswith(", --device-batch-size=2 (was -1), --eval-every=4 (was 5)")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(killed, finished, capsys):
    path = killed / "run" / "checkpoints" / "step_000008" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert small.run(killed, "--resume", QUIET) == 0
    captured = capsys.readouterr()
    assert "step_000008 is damaged (optimizer.safetensors does not match its hash)" in captured.err
    assert "from step 6" in captured.out
    assert small.timeless(small.lines(killed)) == small.timeless(small.lines(finished))


def test_resume_of_nothing_starts_fresh(tmp_path, finished, capsys):
    assert small.run(tmp_path, "--resume", QUIET) == 0
    assert "holds no run yet" in capsys.readouterr().out
    assert small.losses(tmp_path) == small.losses(finished)


def test_a_completed_run_has_nothing_to_resume(copy, capsys):
    before = small.files(copy)
    assert small.run(copy, "--resume") == 0
    assert "is complete at step 12" in capsys.readouterr().out
    assert small.files(copy) == before


def test_resume_from_an_earlier_step(copy, finished):
    assert small.run(copy, "--resume-from-step=4", "--overwrite", QUIET) == 0
    assert small.timeless(small.lines(copy)) == small.timeless(small.lines(finished))


def test_a_damaged_summary_does_not_stand_in_the_way(copy, finished):
    """The end of the run is repeated, and writes it anew."""
    (copy / "run" / "summary.json").write_text('{"status": "comp')
    assert small.run(copy, "--resume", QUIET) == 0
    assert small.summary(copy)["status"] == "completed"
    assert small.timeless(small.lines(copy)) == small.timeless(small.lines(finished))


def test_the_best_is_known_when_the_run_resumes_from_it(copy):
    """Its own line of metrics is cut then: an evaluation that is worse does not take its place."""
    checkpoint.mark_best(copy / "run", 4)
    with open(copy / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "val/bpb": 0.001}\n')
    assert small.run(copy, "--resume-from-step=4", "--overwrite", QUIET) == 0
    assert checkpoint.best_step(copy / "run") == 4


def test_a_run_of_an_earlier_version_resumes(copy, finished):
    """What has come into config.json since then is not needed."""
    checkpoint.set_aside_after(copy / "run", 8)
    config = small.config(copy)
    del config["data"]["revision"], config["wandb_id"]
    del config["model"]["arch"], config["model"]["tie_embeddings"]
    del config["plan"]["schedule"], config["plan"]["horizon_value"]
    for name in (
        "arch",
        "tie_embeddings",
        "init_from",
        "config",
        "tensorboard",
        "stop_at_bpb",
        "patience",
        "lr_schedule",
    ):
        del config["args"][name]
    (copy / "run" / "config.json").write_text(json.dumps(config))
    assert small.run(copy, "--resume", QUIET) == 0
    assert small.losses(copy) == small.losses(finished)


def test_wandb_and_tensorboard_hold_the_numbers_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    import test_trackers

    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--run=first", "--tensorboard")
    assert small.run_killed(tmp_path, 7, *flags, signal="SIGTERM") == 75
    assert small.run(tmp_path, *flags, "--resume") == 0
    test_trackers.assert_all_agree(tmp_path / "run")


# ---- the device batch of a resumed run ----


@pytest.mark.parametrize(
    "begun, ranks, flags, device_batch, words",
    [
        ((-1, 4), 1, [], 4, []),
        ((8, 8), 1, [], 8, []),
        ((-1, 4), 2, [], -1, ["2 ranks (was 1)"]),
        ((8, 8), 2, [], 4, ["2 ranks (was 1)", "--device-batch-size=4 (was 8)"]),
        ((2, 2), 2, [], 2, ["2 ranks (was 1)"]),
        ((3, 3), 2, [], 2, ["2 ranks (was 1)", "--device-batch-size=2 (was 3)"]),
        ((8, 8), 2, ["--device-batch-size=8"], 8, ["2 ranks (was 1)"]),
    ],
)
def test_the_device_batch_on_another_number_of_ranks(begun, ranks, flags, device_batch, words):
    """8 rows a step. begun: the flag at the first start, and what it was then. What is given now
    stays as it is."""
    config = {
        "args": {"device_batch_size": begun[0]},
        "runtime": {"world_size": 1, "device_batch_size": begun[1]},
        "plan": {"rows_per_step": 8},
    }
    args, _, _ = resume.merge_with_run(train.parse_args(["--resume", *flags]), config)
    assert resume.fit_to_machine(args, config, ranks) == words
    assert args.device_batch_size == device_batch
    # a word on dropout comes where it matters
    args.dropout, args.device_batch_size, args.given = 0.1, begun[0], set(args.given)
    changed = resume.fit_to_machine(args, config, ranks)
    assert any("dropout is drawn by rank" in word for word in changed) == bool(words)


# ---- what would lose a run ----


@pytest.mark.parametrize("flag", [None, "--resume", "--overwrite"])
def test_a_run_that_appeared_meanwhile_is_not_lost(tmp_path, finished, monkeypatch, capsys, flag):
    """Another process trains here while this one reads its data: claiming it looks again."""

    def meanwhile(*args):
        small.copy_run(finished, tmp_path)
        return open_corpus(*args)

    monkeypatch.setattr("nanochat.run.training_text.open_corpus", meanwhile)
    assert small.run(tmp_path, *filter(None, [flag])) == 2
    assert "already holds a run" in capsys.readouterr().err
    mine, theirs = ((folder / "run" / "metrics.jsonl") for folder in (tmp_path, finished))
    assert mine.read_bytes() == theirs.read_bytes()


def test_a_run_is_claimed_before_its_checkpoint_is_chosen(copy, finished, monkeypatch, capsys):
    """A process that is still ending would save, and remove the very checkpoint that was chosen: it
    has to be gone before."""
    shutil.rmtree(checkpoint.folder_of(copy / "run", 12))
    before = small.files(copy)
    ending = RunFolder(copy / "run")
    ending.claim()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "steps_of", lambda path: pytest.fail("nothing is read yet"))
        assert small.run(copy, "--resume") == 2
    assert "in use" in capsys.readouterr().err
    assert small.files(copy) == before
    ending.lock.close()
    seen = []

    def meanwhile(*args):
        with pytest.raises(UsageError, match="in use"):
            RunFolder(copy / "run").claim()
        seen.append(True)
        return open_corpus(*args)

    monkeypatch.setattr("nanochat.run.training_text.open_corpus", meanwhile)
    assert small.run(copy, "--resume", QUIET) == 0
    assert seen and small.losses(copy) == small.losses(finished)


def test_a_checkpoint_that_disappears_meanwhile_costs_nothing(copy, finished, monkeypatch, capsys):
    """Whoever removed it: the later lines of metrics and the later checkpoints stay as they are."""

    def meanwhile(*args):
        (checkpoint.folder_of(copy / "run", 4) / "model.safetensors").unlink()
        return open_corpus(*args)

    monkeypatch.setattr("nanochat.run.training_text.open_corpus", meanwhile)
    assert small.run(copy, "--resume-from-step=4", "--overwrite") == 2
    assert (
        "step_000004 was intact when this process began, and no longer is "
        "(model.safetensors is missing)" in capsys.readouterr().err
    )
    assert checkpoint.steps_of(copy / "run") == [4, 6, 8, 12]
    mine, theirs = ((folder / "run" / "metrics.jsonl") for folder in (copy, finished))
    assert mine.read_bytes() == theirs.read_bytes()


def test_checkpoints_without_manifests_are_not_trained_over(copy, finished, capsys):
    """A run whose checkpoints lost their manifests does not begin again as if it had none."""
    for path in (copy / "run" / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    assert small.run(copy, "--resume") == 2
    error = capsys.readouterr().err
    assert "step_000004, step_000006, step_000008, step_000012" in error
    assert "manifest.json" in error and "--overwrite" in error
    mine, theirs = ((folder / "run" / "metrics.jsonl") for folder in (copy, finished))
    assert mine.read_bytes() == theirs.read_bytes()


# ---- extended to a longer horizon ----


@pytest.fixture(scope="module")
def of_20_steps(tmp_path_factory):
    """A folder with an uninterrupted run of 20 steps: so short a run derives the same rates and
    decay at 12 and at 20."""
    folder = tmp_path_factory.mktemp("whole")
    assert small.run(folder, "--num-iterations=20", QUIET) == 0
    return folder


def test_an_extended_run_is_the_run_of_that_length(copy, of_20_steps, capsys):
    """From the checkpoint before the warm-down."""
    assert small.run(copy, "--resume", "--num-iterations=20", QUIET) == 0
    assert "extended from 12 to 20 steps" in capsys.readouterr().out
    assert_same_run(copy, "run", of_20_steps, steps=20)
    config = small.config(copy)
    assert config["extended"] == [{"from_step": 6, "steps_before": 12}]
    assert config["args"]["num_iterations"] == config["plan"]["num_iterations"] == 20
    assert small.summary(copy)["status"] == "completed" and small.summary(copy)["step"] == 20
    aside = (copy / "run" / "checkpoints").glob("set_aside*step_000012")
    assert [path.name for path in aside] == ["set_aside_1_step_000012"]


def test_an_extended_run_is_killed_and_resumed_and_extended_again(copy):
    flags = ("--resume", QUIET)
    assert small.run_killed(copy, 9, *flags, "--num-iterations=20") == -9
    assert small.run(copy, *flags, "--num-iterations=20") == 0
    # 28 steps of 256 tokens
    assert small.run(copy, *flags, "--num-iterations=-1", "--target-tokens=7168") == 0
    assert small.run(copy, "--num-iterations=28", QUIET, tag="whole") == 0
    assert_same_run(copy, "run", copy, "whole", steps=28)
    assert [entry["steps_before"] for entry in small.config(copy)["extended"]] == [12, 20]


def test_a_stopped_run_is_extended_where_it_stands(copy):
    checkpoint.set_aside_after(copy / "run", 4)
    assert small.run(copy, "--resume", "--num-iterations=20", QUIET) == 0
    assert small.config(copy)["extended"] == [{"from_step": 4, "steps_before": 12}]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--num-iterations=8",), ["--num-iterations=8", "has 12", "longer"]),
        (("--num-iterations=-1", "--target-tokens=3000"), ["--target-tokens=3000", "has 12"]),
        (("--num-iterations=-1", "--target-minutes=0.00001"), ["--target-minutes", "give more"]),
        (("--num-iterations=40", "--total-batch-size=512"), ["--total-batch-size=512 (was 256)"]),
    ],
)
def test_what_does_not_extend_a_run(copy, capsys, flags, words):
    before = small.files(copy)
    assert small.run(copy, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert small.files(copy) == before


def test_a_run_without_a_checkpoint_before_its_warm_down_is_not_extended(copy, capsys):
    for step in (4, 6):
        shutil.rmtree(checkpoint.folder_of(copy / "run", step))
    assert small.run(copy, "--resume", "--num-iterations=20") == 2
    assert "--init-from" in capsys.readouterr().err


def test_a_cosine_run_is_not_extended(tmp_path, capsys):
    flags = ("--lr-schedule=cosine", "--num-iterations=2", "--eval-every=-1", QUIET)
    assert small.run(tmp_path, *flags) == 0
    assert small.run(tmp_path, *flags, "--resume", "--num-iterations=20") == 2
    assert "cosine" in capsys.readouterr().err
