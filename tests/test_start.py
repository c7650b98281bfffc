"""How runs start: from a config file, extended to a longer horizon, with another run's weights; and how they end early."""

import json
import shutil

import pytest
import small
import torch

import train
from nanochat.eval import bpb as evaluate
from nanochat.optim import schedules
from nanochat.run import checkpoint
from nanochat.run import resume as start
from nanochat.run.plan import Plan


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished run of 12 steps, warm-down from step 6."""
    folder = tmp_path_factory.mktemp("finished")
    assert small.run(folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A folder of its own with that run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def config(folder, tag="run"):
    return json.loads((folder / tag / "config.json").read_text())


# ----- extending


def test_an_extended_run_is_the_run_of_that_length(copy, capsys):
    """From the checkpoint before the warm-down; so short a run derives the same rates and decay at either length."""
    assert small.run(copy, "--resume", "--num-iterations=20") == 0
    assert "extended from 12 to 20 steps" in capsys.readouterr().out
    assert small.run(copy, "--num-iterations=20", tag="whole") == 0
    assert small.timeless(small.lines(copy)) == small.timeless(small.lines(copy, "whole"))
    extended, whole = small.weights(copy, 20), small.weights(copy, 20, "whole")
    assert all(torch.equal(extended[name], whole[name]) for name in whole)
    assert config(copy)["extended"] == [{"from_step": 6, "steps_before": 12}]
    assert config(copy)["args"]["num_iterations"] == config(copy)["plan"]["num_iterations"] == 20
    assert small.summary(copy)["status"] == "completed" and small.summary(copy)["step"] == 20
    assert [path.name for path in (copy / "run" / "checkpoints").glob("set_aside*step_000012")] == [
        "set_aside_1_step_000012"
    ]


def test_an_extended_run_is_killed_and_resumed_and_extended_again(copy):
    assert small.run_killed(copy, 9, "--resume", "--num-iterations=20") == -9
    assert small.run(copy, "--resume", "--num-iterations=20") == 0
    assert (
        small.run(copy, "--resume", "--num-iterations=-1", "--target-tokens=7168") == 0
    )  # 28 steps of 256 tokens
    assert small.run(copy, "--num-iterations=28", tag="whole") == 0
    assert small.timeless(small.lines(copy)) == small.timeless(small.lines(copy, "whole"))
    assert [entry["steps_before"] for entry in config(copy)["extended"]] == [12, 20]


def test_a_stopped_run_is_extended_where_it_stands(copy):
    checkpoint.set_aside_after(copy / "run", 4)
    assert small.run(copy, "--resume", "--num-iterations=20") == 0
    assert config(copy)["extended"] == [{"from_step": 4, "steps_before": 12}]


def test_extending_by_a_time_budget(tmp_path):
    """The warm-up stays the one that is over, and the learning rate does not jump where the steps are counted out."""
    flags = ("--warmup-ratio=0.25", "--warmdown-ratio=0.9")
    assert small.run(tmp_path, *flags, "--warmdown-ratio=0.25") == 0
    plan = config(tmp_path)["plan"]
    plan_after = Plan(**plan)
    plan_after.fix_steps(40, train.parse_args(flags), done=10)
    assert (plan["warmup_steps"], plan_after.warmup_steps, plan_after.warmdown_steps) == (
        3,
        3,
        30,
    ), "not 10, not 36"
    assert (
        small.run(
            tmp_path,
            *flags[:1],
            "--warmdown-ratio=0.25",
            "--resume",
            "--num-iterations=-1",
            "--target-minutes=0.02",
        )
        == 0
    )
    assert small.summary(tmp_path)["step"] == config(tmp_path)["plan"]["num_iterations"] > 12
    assert config(tmp_path)["plan"]["warmup_steps"] == 3


@pytest.mark.parametrize(
    "flags", [("--lr-schedule=cosine",), ("--warmup-ratio=0.5", "--warmdown-ratio=0.5")]
)
def test_learning_rates_before_a_time_budget_was_measured_out(flags):
    """A run that is killed just after that and resumed from before repeats the ones it had."""
    args = train.parse_args(flags)
    plan = Plan(
        horizon="target_minutes",
        parameters={},
        scaling_parameters=1,
        flops_per_token=1,
        rows_per_step=1,
        total_batch_tokens=1,
        num_iterations=None,
        tokens=1,
        warmup_steps=round(100 * args.warmup_ratio),
        warmdown_steps=0,
        groups={},
    )
    before = [plan.lr_multiplier(step, args) for step in range(10)]
    plan.fix_steps(40, args, done=10)
    resumed = Plan(**json.loads(json.dumps(plan.as_dict())))
    assert [resumed.lr_multiplier(step, args) for step in range(10)] == before
    assert [resumed.lr_multiplier(step, args) for step in range(10, 40)] == [
        schedules.lr_multiplier(
            step, 40, plan.warmup_steps, plan.warmdown_steps, 0.0, args.lr_schedule
        )
        for step in range(10, 40)
    ]


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
    """8 rows a step. begun: the flag at the first start, and what it was then. What is given now is not touched."""
    config = {
        "args": {"device_batch_size": begun[0]},
        "runtime": {"world_size": 1, "device_batch_size": begun[1]},
        "plan": {"rows_per_step": 8},
    }
    args, _, _ = start.merge_with_run(train.parse_args(["--resume", *flags]), config)
    assert start.fit_to_machine(args, config, ranks) == words
    assert args.device_batch_size == device_batch
    args.dropout, args.device_batch_size, args.given = 0.1, begun[0], set(args.given)
    said = start.fit_to_machine(args, config, ranks)
    assert any("dropout is drawn by rank" in word for word in said) == bool(words), (
        "that is said when it matters"
    )


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
    before = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    assert small.run(copy, "--resume", *flags) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert {
        path: path.read_bytes()
        for path in (copy / "run").rglob("*")
        if path.is_file() and path.name != ".lock"
    } == {path: content for path, content in before.items() if path.name != ".lock"}


def test_a_run_without_a_checkpoint_before_its_warm_down_is_not_extended(copy, capsys):
    for step in (4, 6):
        shutil.rmtree(checkpoint.folder_of(copy / "run", step))
    assert small.run(copy, "--resume", "--num-iterations=20") == 2
    assert "--init-from" in capsys.readouterr().err


def test_a_cosine_run_is_not_extended(tmp_path, capsys):
    assert small.run(tmp_path, "--lr-schedule=cosine") == 0
    assert small.run(tmp_path, "--lr-schedule=cosine", "--resume", "--num-iterations=20") == 2
    assert "cosine" in capsys.readouterr().err


# ----- config files


def test_a_runs_config_repeats_it_and_the_command_line_wins(finished, tmp_path):
    path = finished / "run" / "config.json"
    assert train.run([f"--config={path}", f"--out-dir={tmp_path}", "--model-tag=again"]) == 0
    assert small.timeless(small.lines(tmp_path, "again")) == small.timeless(small.lines(finished))
    args = train.parse_args([f"--config={path}", "--seed=7", "--compile"])
    assert (args.seed, args.depth, args.dtype, args.compile, args.model_tag) == (
        7,
        2,
        "float32",
        True,
        "",
    )
    assert {"seed", "depth", "dtype"} <= args.given and "grad_clip" not in args.given


def test_a_config_of_flags(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(
        '{"depth": 3, "--head-dim": 32, "compile": false, "tensorboard": true, "model_tag": "mine", "grad_clip": 1}'
    )
    args = train.parse_args([f"--config={path}"])
    assert (
        args.depth,
        args.head_dim,
        args.compile,
        args.tensorboard,
        args.model_tag,
        args.grad_clip,
    ) == (3, 32, False, True, "mine", 1.0)


# ----- another run's weights


def test_init_from(finished, tmp_path, capsys):
    assert (
        small.run(
            tmp_path,
            f"--init-from={finished / 'run'}",
            "--eval-every=-1",
            "--matrix-lr=0.0001",
            "--max-seq-len=16",
        )
        == 0
    )
    first = small.losses(tmp_path)[0]
    assert first < small.losses(finished)[0] - 0.5, "it starts where the other run ended"
    assert config(tmp_path)["init_from"] == {"run": str(finished / "run"), "step": 12}
    assert config(tmp_path)["model"]["max_seq_len"] == 16
    assert (
        small.run_killed(tmp_path, 2, f"--init-from={finished / 'run'}", tag="broken") == -9
    )  # before any checkpoint
    assert small.run(tmp_path, "--resume", f"--init-from={finished / 'run'}", tag="broken") == 0
    assert small.run(tmp_path, f"--init-from={finished / 'run'}", tag="whole") == 0
    assert small.timeless(small.lines(tmp_path, "broken")) == small.timeless(
        small.lines(tmp_path, "whole")
    )


def test_init_from_takes_the_shape_and_tokenizer_of_the_source(finished, tmp_path):
    assert (
        train.run(
            [
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
        )
        == 0
    )
    assert (
        config(tmp_path)["args"]["depth"] == 2 and config(tmp_path)["tokenizer"]["kind"] == "byte"
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--depth=3",), ["--init-from", "--depth=2"]),
        (("--arch=llama",), ["--arch=speedrun"]),
        (("--tokenizer=char",), ["--tokenizer=char"]),
        (("--tokenizer=bpe", "--vocab-size=300"), ["--vocab-size=257"]),
    ],
)
def test_init_from_another_shape_is_refused(finished, tmp_path, capsys, flags, words):
    assert small.run(tmp_path, f"--init-from={finished / 'run'}", *flags) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_started_from_itself(copy, capsys):
    before = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    assert small.run(copy, f"--init-from={copy / 'sub' / '..' / 'run'}", "--overwrite") == 2
    (copy / "sub").mkdir()
    assert small.run(copy, f"--init-from={copy / 'sub' / '..' / 'run'}", "--overwrite") == 2
    assert "own folder" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()
    } == before


def test_a_run_begins_again_with_the_weights_it_began_with(copy, capsys):
    """Killed before its first checkpoint, it does not take what its source has learnt since; nor anything if they are gone."""
    source, flags = copy / "run", (f"--init-from={copy / 'run'}", "--eval-every=-1")
    later = shutil.move(checkpoint.folder_of(source, 12), copy / "later")
    assert small.run_killed(copy, 2, *flags, tag="broken") == -9
    assert config(copy, "broken")["init_from"]["step"] == 8
    assert small.run(copy, *flags, tag="whole") == 0
    shutil.move(later, checkpoint.folder_of(source, 12))
    assert small.run(copy, "--resume", *flags, tag="broken") == 0
    assert small.losses(copy, "broken") == small.losses(copy, "whole")

    assert small.run_killed(copy, 2, *flags, tag="orphan") == -9
    weights = checkpoint.folder_of(source, 12) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert small.run(copy, "--resume", *flags, tag="orphan") == 2
    assert "step 12" in capsys.readouterr().err


def test_init_from_decides_the_default_folder_and_the_plan(copy, capsys):
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
    assert (model["depth"], model["width"], model["vocab_size"], model["max_seq_len"]) == (
        2,
        32,
        257,
        32,
    )
    assert train.run([*flags, "--no-compile", "--no-save", "--sample-every=-1"]) == 0
    assert (copy / "d2" / "config.json").exists()
    assert "is what an untrained model should have" not in capsys.readouterr().out


# ----- runs of earlier versions


def test_a_run_of_an_earlier_version_goes_on(copy):
    """What has come into config.json since then is not asked for."""
    checkpoint.set_aside_after(copy / "run", 8)
    path, content = copy / "run" / "config.json", config(copy)
    del content["data"]["revision"], content["wandb_id"]
    for name in ("arch", "tie_embeddings"):
        del content["model"][name]
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
        del content["args"][name]
    path.write_text(json.dumps(content))
    assert small.run(copy, "--resume") == 0
    assert small.run(copy, tag="whole") == 0
    assert small.losses(copy) == small.losses(copy, "whole")


# ----- early ends


def scripted_evaluation(monkeypatch, values):
    """Validation gives these bits per byte, one after another."""
    left = iter(values)
    monkeypatch.setattr(
        evaluate,
        "bits_per_byte",
        lambda *args, **options: {"bpb": next(left), "loss": 1.0, "tokens": 1, "bytes": 1},
    )


def test_patience(tmp_path, monkeypatch, capsys):
    scripted_evaluation(monkeypatch, [2.0, 1.9, 1.95, 1.91])
    assert (
        small.run(
            tmp_path, "--patience=2", "--eval-every=2", "--save-every=-1", "--warmdown-ratio=0"
        )
        == 0
    )
    summary = small.summary(tmp_path)
    assert (
        summary["status"] == "completed"
        and summary["step"] == 8
        and "--patience" in summary["reason"]
    )
    assert summary["val_bpb"] == 1.91 and summary["min_val_bpb"] == 1.9
    assert checkpoint.best_step(tmp_path / "run") == 4
    assert checkpoint.steps_of(tmp_path / "run") == [4, 8], "the best and the last"
    capsys.readouterr()
    assert (
        small.run(
            tmp_path,
            "--resume",
            "--save-every=-1",
            "--patience=2",
            "--eval-every=2",
            "--warmdown-ratio=0",
        )
        == 0
    )
    assert "complete at step 8" in capsys.readouterr().out


def test_patience_survives_a_restart(tmp_path, monkeypatch):
    """The state in a checkpoint is from before the evaluation of its step, which is made again."""
    scripted_evaluation(monkeypatch, [2.0, 2.1])
    original = train.schedules.muon_momentum
    monkeypatch.setattr(
        train.schedules, "muon_momentum", lambda step: 1 / 0 if step == 5 else original(step)
    )
    flags = ("--patience=3", "--eval-every=2", "--save-every=4")
    with pytest.raises(ZeroDivisionError):
        small.run(tmp_path, *flags)
    monkeypatch.setattr(train.schedules, "muon_momentum", original)
    scripted_evaluation(monkeypatch, [2.1, 2.2, 2.3])  # steps 4, 6 and 8
    assert small.run(tmp_path, *flags, "--resume") == 0
    assert small.summary(tmp_path)["step"] == 8


def test_more_patience_than_before(tmp_path, monkeypatch):
    """The evaluation at which patience ended is made again, and counted once."""
    scripted_evaluation(monkeypatch, [2.0, 2.1, 2.2])
    flags = ("--eval-every=2", "--save-every=-1", "--warmdown-ratio=0")
    assert small.run(tmp_path, "--patience=2", *flags) == 0
    assert small.summary(tmp_path)["step"] == 6
    scripted_evaluation(monkeypatch, [2.2, 2.3])  # steps 6 and 8
    assert small.run(tmp_path, "--resume", "--patience=3", *flags) == 0
    assert small.summary(tmp_path)["step"] == 8
    assert config(tmp_path)["args"]["patience"] == 3


def test_stop_at_bpb(tmp_path, monkeypatch, capsys):
    scripted_evaluation(monkeypatch, [2.0, 1.5])
    assert small.run(tmp_path, "--stop-at-bpb=1.6", "--eval-every=3") == 0
    summary = small.summary(tmp_path)
    assert (
        summary["status"] == "completed"
        and summary["step"] == 6
        and "--stop-at-bpb=1.6" in summary["reason"]
    )
    assert checkpoint.kind_of(tmp_path / "run", 6) == "final"
    assert checkpoint.best_step(tmp_path / "run") == 6
    scripted_evaluation(monkeypatch, [1.5, 1.45, 1.4])
    assert (
        small.run(tmp_path, "--resume", "--stop-at-bpb=-1", "--eval-every=3") == 0
    )  # the rule lifted, it goes on
    assert small.summary(tmp_path)["step"] == 12


# ----- three records of one run


def test_wandb_and_tensorboard_hold_the_numbers_of_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    import test_track

    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--run=first", "--tensorboard")
    assert small.run_killed(tmp_path, 7, *flags, signal="SIGTERM") == 75
    assert small.run(tmp_path, *flags, "--resume") == 0
    test_track.assert_all_agree(tmp_path / "run")
