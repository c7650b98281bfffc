"""train.py on a small model: the run folder, the order of a step, dry runs, what is saved when."""

import json
import math
import re

import pytest
import small
import torch

import nanochat
import train
from nanochat import native
from nanochat.data import prefetch
from nanochat.model.gpt import GPT
from nanochat.optim import schedules
from nanochat.optim.optimizer import Optimizer
from nanochat.run import checkpoint, memory, runtime

DERIVED = ["step", "tokens", "total_training_flops", "total_training_time"]
MEASURED = (
    "train/loss",
    "train/lr",
    "train/lrm",
    "train/grad_norm",
    "train/dt",
    "train/tok_per_sec",
    "train/mfu",
    "train/epoch",
)


@pytest.fixture
def finished():
    """A folder with one uninterrupted run of 12 steps, warm-down from step 6."""
    return small.finished()


# ---- the run folder ----


def test_metrics(finished):
    lines = small.lines(finished)
    assert list(small.losses(finished)) == list(range(12))
    assert [line["step"] for line in lines if "val/bpb" in line] == [5, 10, 12]
    for line in lines:
        assert list(line)[:4] == DERIVED
        assert line["tokens"] == 256 * line["step"]
    assert all(isinstance(lines[0][name], float) for name in MEASURED)
    assert lines[0]["train/loss"] == pytest.approx(math.log(257), abs=0.05)
    assert lines[0]["total_training_time"] == 0
    assert {line["step"] for line in small.lines(finished, name="samples.jsonl")} == {6, 12}


def test_summary(finished):
    bpbs = [line["val/bpb"] for line in small.lines(finished) if "val/bpb" in line]
    summary = small.summary(finished)
    assert (summary["status"], summary["step"]) == ("completed", 12)
    assert summary["tokens"] == 12 * 256
    assert summary["val_bpb"] == bpbs[-1] and summary["core_metric"] is None
    assert summary["min_val_bpb"] == min(bpbs)
    assert summary["peak_memory_bytes"] > 10**7 and summary["tok_per_sec"] > 0


def test_checkpoints(finished):
    """4, 8: --save-every; 6: before the warm-down; 12: the end."""
    run = finished / "run"
    kinds = {step: checkpoint.kind_of(run, step) for step in checkpoint.steps_of(run)}
    assert kinds == {4: "permanent", 6: "before_warmdown", 8: "permanent", 12: "final"}
    assert (run / "checkpoints" / "best").read_text() == "step_000012\n"
    assert not list((run / "checkpoints").glob(".*"))


def test_config(finished):
    config = small.config(finished)
    assert config["args"]["num_iterations"] == 12
    assert config["plan"]["total_batch_tokens"] == 256
    assert config["data"]["fingerprint"]
    assert config["tokenizer"]["vocab_size"] == 257
    assert "torch" in config["versions"]


def test_loading_the_folder_needs_nothing_else(finished, tmp_path):
    moved = small.copy_run(finished, tmp_path, tag="elsewhere")
    model, tokenizer = nanochat.load(moved)
    assert not model.training
    options = {"max_new_tokens": 5, "temperature": 0}
    text = nanochat.generate(model, tokenizer, "3 squared", **options)
    assert text == nanochat.generate(model, tokenizer, "3 squared", **options) != ""


# ---- a step ----


def test_order_of_a_step(tmp_path, monkeypatch):
    """Batch, set lr, zero grad, forward, loss, backward, clip, step: the contract users read about.

    The warm-up's pass comes before, and leaves no gradient."""
    calls = []

    def spy(owner, name, label):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls.append(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    spy(Optimizer, "zero_grad", "zero grad")
    spy(prefetch.Prefetcher, "__next__", "batch")
    spy(GPT, "forward", "forward")
    spy(torch.Tensor, "backward", "backward")
    spy(Optimizer, "reduce", "reduce")
    spy(Optimizer, "clip", "clip")
    spy(schedules, "lr_multiplier", "set lr")
    spy(Optimizer, "step", "step")
    flags = ("--num-iterations=1", "--grad-clip=1", "--device-batch-size=4")
    assert small.run(tmp_path, *flags, *small.BARE) == 0
    micro = ["forward", "backward"]
    warm_up = [*micro, "zero grad"]
    step = ["batch", "set lr", "zero grad", *micro, *micro, "reduce", "clip", "step"]
    assert calls == warm_up + step


def test_a_settled_device_batch_is_recorded_immediately(tmp_path, monkeypatch):
    """Before any step: a run killed early resumes with as many rows per pass as it began with."""

    def settle(trial, first, *rest):
        trial(first // 2)
        return first // 2

    monkeypatch.setattr(memory, "settle", settle)
    monkeypatch.setattr(prefetch, "Prefetcher", lambda *args, **kwargs: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception):
        small.run(tmp_path)
    assert small.config(tmp_path)["runtime"]["device_batch_size"] == 4


# ---- what is saved ----


def test_rolling_checkpoints_replace_one_another(tmp_path):
    flags = ("--save-every=-1", "--save-every-minutes=0.0000001")
    assert small.run(tmp_path, *flags, "--eval-every=-1", "--sample-every=-1") == 0
    assert checkpoint.steps_of(tmp_path / "run") == [6, 12]


def test_checkpoints_at_given_steps(tmp_path, capsys):
    """Beside those of --save-every; a resumed run may name others."""
    flags = ("--save-every=-1", "--eval-every=-1", "--sample-every=-1")
    assert small.run(tmp_path, *flags, "--save-at=2,7") == 0
    assert checkpoint.steps_of(tmp_path / "run") == [2, 6, 7, 12]
    again = ("--resume-from-step=7", "--overwrite", "--save-at=9")
    assert small.run(tmp_path, *flags, *again) == 0
    assert checkpoint.steps_of(tmp_path / "run") == [2, 6, 7, 9, 12]
    assert "--save-at=9 (was 2,7)" in capsys.readouterr().out
    too_far = ("--num-iterations=-1", "--target-tokens=1024", "--save-at=9", "--overwrite")
    assert small.run(tmp_path, *flags, *too_far) == 2
    assert "--save-at=9: beyond the run's 4 steps" in capsys.readouterr().err


def test_no_save(tmp_path, capsys):
    assert small.run(tmp_path, *small.BARE) == 0
    assert checkpoint.steps_of(tmp_path / "run") == []
    assert "nothing was saved (--no-save)" in capsys.readouterr().out


# ---- dry runs ----


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert small.run(tmp_path, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"]["num_iterations"] == 12 and shown["plan"]["total_batch_tokens"] == 256
    assert shown["device_batch_size"] * shown["accumulation"] == 8
    # 32 wide, 2 blocks: 12 x 32^2 x 2 matrices, 257 x 32 head
    assert shown["plan"]["scaling_parameters"] == 24576 + 8224
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--compile"], "updates: native (what Muon does between its products, in C++)"),
        (["--compile", "--optimizer=adamw"], "updates: plain (--optimizer=adamw)"),
        ([], "updates: plain (nothing is compiled)"),
    ],
)
def test_the_plan_says_how_updates_are_computed(tmp_path, capsys, flags, words):
    if "native" in words and (problem := native.missing()):
        pytest.skip(problem)
    assert small.run(tmp_path, "--dry-run", "--device-type=cpu", *flags) == 0
    assert words in capsys.readouterr().out


def test_updates_are_native_on_all_ranks_or_on_none(monkeypatch):
    """Rank 1 cannot load the library: then the others do without it as well."""
    args = train.parse_args(["--device-type=cpu", *small.FLAGS])
    found = [(None, None), (None, "no space")]
    for problems in found:
        monkeypatch.setattr(runtime.ranks, "from_all", lambda own, given=problems: list(given))
        assert runtime.pick_runtime(args, "cpu").plain_updates == problems[1]


def test_dry_run_for_other_hardware(capsys):
    assert train.run(["--dry-run", "--depth=24", "--gpus=8", "--gpu=H100"]) == 0
    assert "8 x 989 TFLOP/s (listed bf16 peak of H100)" in capsys.readouterr().out
    assert train.run(["--dry-run", "--depth=26", "--gpu=A100"]) == 0
    assert "try --depth=" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ratio, derivation",
    [(16, "32 (2 x 16)"), (15, "32 (2 x 15, rounded up to heads of 16)")],
)
def test_a_plan_derives_the_width(tmp_path, capsys, ratio, derivation):
    assert small.run(tmp_path, "--dry-run", f"--aspect-ratio={ratio}") == 0
    assert f"width                      {derivation}\n" in capsys.readouterr().out


@pytest.mark.parametrize("gpus, devices", [(1, "1 device"), (2, "2 devices")])
def test_a_plan_counts_devices_and_their_hours(tmp_path, capsys, gpus, devices):
    flags = [small.corpus(tmp_path), "--depth=2", "--max-seq-len=64", "--num-iterations=3"]
    flags += ["--total-batch-size=128", "--device-batch-size=1", "--dry-run", "--gpu=H100"]
    flags.append(f"--gpus={gpus}")
    assert train.run(flags) == 0
    shown = capsys.readouterr().out
    assert train.run([*flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    hours = planned["estimates"]["seconds"] * gpus / 3600
    assert planned["estimates"]["device_hours"] == pytest.approx(hours)
    assert f"1 a device x {devices} x {2 // gpus} accumulated = 2" in shown
    printed = float(re.search(r"device-hours +(\S+)", shown).group(1))
    assert printed == pytest.approx(hours, rel=0.01)


# ---- config files ----


@pytest.mark.parametrize(
    "tokens, words, n_bytes",
    [
        # 2 bytes each; of a text that is read once at most
        ("1e9", "1.9 GiB on each machine\n", 2e9),
        ("300e9", "558.8 GiB on each machine, of which the last 100.0 GiB are kept", 6e11),
    ],
)
def test_a_plan_says_what_its_tokens_take(capsys, tokens, words, n_bytes):
    flags = ["--dry-run", "--depth=12", "--gpu=H100", f"--target-tokens={tokens}"]
    assert train.run(flags) == 0
    assert re.search(f"token cache +{words}", capsys.readouterr().out)
    assert train.run([*flags, "--json"]) == 0
    estimates = json.loads(capsys.readouterr().out)["estimates"]
    assert estimates["token_cache_bytes"] == pytest.approx(n_bytes, rel=1e-3)


def test_a_runs_config_repeats_it_and_the_command_line_wins(finished, tmp_path):
    path = finished / "run" / "config.json"
    argv = [f"--config={path}", f"--out-dir={tmp_path}", "--model-tag=again", "--sample-every=-1"]
    assert train.run(argv) == 0
    assert small.timeless(small.lines(tmp_path, "again")) == small.timeless(small.lines(finished))
    args = train.parse_args([f"--config={path}", "--seed=7", "--compile"])
    assert (args.seed, args.depth, args.dtype) == (7, 2, "float32")
    assert args.compile is True and args.model_tag == ""
    assert {"seed", "depth", "dtype"} <= args.given and "grad_clip" not in args.given


def test_a_config_of_flags(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text(
        '{"depth": 3, "--head-dim": 32, "compile": false, "tensorboard": true,'
        ' "model_tag": "mine", "grad_clip": 1}'
    )
    args = train.parse_args([f"--config={path}"])
    assert (args.depth, args.head_dim, args.grad_clip) == (3, 32, 1.0)
    assert args.compile is False and args.tensorboard is True and args.model_tag == "mine"


# ---- --overwrite ----


def test_overwriting_starts_again_and_leaves_foreign_files_alone(finished, tmp_path):
    run = tmp_path / "run"
    short = ("--num-iterations=3", "--eval-every=-1", "--sample-every=-1")
    assert small.run(tmp_path, "--seed=7", *short) == 0
    assert checkpoint.steps_of(run)[-1] == 3
    (run / "notes.txt").write_text("mine")
    assert small.run(tmp_path, "--overwrite", "--sample-every=-1") == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert small.losses(tmp_path) == small.losses(finished)
    assert checkpoint.steps_of(run) == [4, 6, 8, 12] and small.summary(tmp_path)["step"] == 12
