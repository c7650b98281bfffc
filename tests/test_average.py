"""`nanochat average`: the mean of checkpoints as a run that the other apps read."""

import json

import pytest
import small
import torch
from safetensors.torch import load_file

import nanochat
import train
from nanochat.__main__ import main
from nanochat.apps import average, jobs
from nanochat.apps.average.averaging import mean_weights
from nanochat.common import UsageError, sha256_file
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.groups import settings_of
from nanochat.run.records import read_run, read_summary

FP32 = ("--device-type=cpu", "--dtype=float32")


@pytest.fixture
def run(tmp_path):
    """A completed run of 12 steps, with permanent checkpoints at 4, 6, 8 and 12, validated at 5, 10
    and 12."""
    return small.copy_run(small.finished(), tmp_path, "run")


def averaged(run, *flags):
    """The folder of an average."""
    assert average.main([str(run), *flags, *FP32]) == 0
    return run.with_name("run-average")


def refused(run, match, *flags):
    """It fails with that message, and leaves nothing."""
    before = sorted(run.parent.iterdir())
    with pytest.raises(UsageError, match=match):
        average.main([str(run), *flags, *FP32])
    assert sorted(run.parent.iterdir()) == before


def weights_of(run, step):
    return load_file(checkpoint.folder_of(run, step) / "model.safetensors")


def test_the_weights_are_the_mean(run):
    made = weights_of(averaged(run, "--steps=12,4,8"), 12)
    originals = [weights_of(run, step) for step in (4, 8, 12)]
    assert made.keys() == originals[0].keys()
    for name, tensor in made.items():
        mean = sum(original[name].double() for original in originals) / 3
        assert tensor.dtype == originals[0][name].dtype
        assert torch.equal(tensor, mean.to(tensor.dtype)), name
    assert any(not torch.equal(made[name], originals[2][name]) for name in made)


def test_a_narrow_dtype_is_kept_and_does_not_blur_the_mean(run):
    config = GPTConfig(
        depth=1, width=16, head_dim=16, n_head=1, n_kv_head=1, vocab_size=257, max_seq_len=32
    )
    state = {name: checkpoint.read_state(run, 12)[name] for name in ("model", "tokenizer")}
    for step in (100, 101, 102):
        model = build(config, "cpu", seed=step).bfloat16()
        tensors = {"model.safetensors": model.state_dict(), "optimizer.safetensors": {}}
        checkpoint.write(run, step, "permanent", tensors, state)
    made = mean_weights(run, [100, 101, 102])
    for name, tensor in made.items():
        mean = sum(weights_of(run, step)[name].double() for step in (100, 101, 102)) / 3
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, mean.bfloat16()), name


def test_last_counts_permanent_checkpoints(run):
    rolling = checkpoint.folder_of(run, 6) / "manifest.json"
    manifest = json.loads(rolling.read_text())
    manifest.pop("sha256")
    content = manifest | {"kind": "rolling"}
    rolling.write_text(json.dumps(content | {"sha256": checkpoint._hash_of(content)}))
    config = json.loads((averaged(run, "--last=3") / "config.json").read_text())
    assert config["averaged_from"] == {
        "run": str(run),
        "steps": [4, 8, 12],
        "sha256": [
            sha256_file(checkpoint.folder_of(run, step) / "model.safetensors")
            for step in (4, 8, 12)
        ],
    }
    assert config["args"] == json.loads((run / "config.json").read_text())["args"]


def test_its_bits_per_byte_beside_those_of_the_run(run, capsys):
    """They are those of `nanochat evaluate`, of the text that the run was validated on."""
    checkpoint.mark_best(run, 8)
    averaged(run, "--last=2", "--json")
    shown = json.loads(capsys.readouterr().out)
    names = ["average", "step 12, the newest", "step 8, the best"]
    assert [score["name"] for score in shown["scores"]] == names and shown["note"] == ""
    for score, (folder, step) in zip(
        shown["scores"], [(run.with_name("run-average"), 12), (run, 12), (run, 8)], strict=True
    ):
        tokens = json.loads((run / "config.json").read_text())["args"]["eval_tokens"]
        command = ["evaluate", str(folder), f"--step={step}", "--bpb", f"--eval-tokens={tokens}"]
        assert main([*command, *FP32, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)[0]["bpb"]
        assert (found["bpb"], found["loss"]) == (score["bpb"], score["loss"]), score
    assert shown["scores"][1]["bpb"] == pytest.approx(small.summary(run.parent)["val_bpb"], 1e-6)


def test_the_table(run, capsys):
    checkpoint.mark_best(run, 12)
    averaged(run, "--steps=8,12", "--tag=run-average")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"average of steps 8, 12 of {run}"
    assert lines[1].split("  ")[-2:] == ["val bits per byte", "nats a token"]
    assert lines[2].startswith("average ") and lines[3].startswith("step 12, the newest and best ")
    assert lines[4:] == [f"run folder: {run.with_name('run-average')}"]


def test_without_its_text_there_is_an_average_and_a_note(run, capsys):
    config = json.loads((run / "config.json").read_text())
    config["args"]["data"] = str(run / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))
    made = averaged(run, "--last=2")
    assert "note: no bits per byte: " in capsys.readouterr().out
    assert small.summary(made.parent, "run-average")["val_bpb"] is None
    assert not (made / "metrics.jsonl").exists()


def test_the_other_apps_read_it(run, capsys):
    made = averaged(run, "--last=3")
    model, tokenizer = nanochat.load(made, device_type="cpu", dtype="float32")
    text = nanochat.generate(model, tokenizer, "12 sq", max_new_tokens=4, seed=1)
    command = ["sample", str(made), "--step=best", "--prompt=12 sq", "--max-tokens=4", *FP32]
    capsys.readouterr()
    assert main([*command, "--seed=1", "--temperature=1", "--top-k=0"]) == 0
    assert capsys.readouterr().out == f"12 sq{text}\n"
    for app in (["report"], ["runs"], ["evaluate", "--bpb", "--sample", *FP32]):
        assert main([app[0], str(made), *app[1:]]) == 0
    record, summary = read_run(made), read_summary(made)
    assert record.problems == [] and record.val_bpb == record.min_val_bpb > 0
    assert (summary.status, summary.step, summary.steps) == ("completed", 12, 12)
    assert summary.tokens == small.summary(run.parent)["tokens"]
    # no seed's result: it was not trained by these flags alone
    assert settings_of(record) == "" != settings_of(read_run(run))


def test_training_begins_from_it_and_does_not_continue_it(run):
    made = averaged(run, "--last=2")
    assert small.run(run.parent, f"--init-from={made}", *small.BARE, tag="next") == 0
    first = small.lines(run.parent, "next")[0]
    assert first["step"] == 0 and first["train/loss"] < small.lines(run.parent)[0]["train/loss"]
    argv = [f"--out-dir={run.parent}", f"--model-tag={made.name}", "--resume"]
    assert train.run([*small.FLAGS, *argv]) == 2
    with pytest.raises(UsageError, match="holds averaged weights and no training to continue"):
        jobs.main(["fork", str(made), "--tag=child"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--last=1"], "--last=1: an average needs two checkpoints; give 2 or more"),
        (
            ["--last=9"],
            r"--last=9: .* has only 4 permanent checkpoints \(steps 4, 6, 8, 12\); give",
        ),
        (["--steps=4"], "--steps=4: an average needs two checkpoints; name more"),
        (["--steps=4,4"], "--steps=4,4: an average needs two"),
        (["--steps=4,4,8"], "--steps=4,4,8: a step is named twice"),
        (["--steps=4,5"], "--steps=4,5: .* has no checkpoint of 5; choose from 4, 6, 8, 12"),
        (["--last=2", "--tag=a/b"], "--tag=a/b: a path, not a name"),
    ],
)
def test_flags_that_are_refused(run, flags, message):
    refused(run, message, *flags)


def test_folders_and_checkpoints_that_are_refused(run, capsys):
    averaged(run, "--last=2")
    refused(run, "run-average exists; name another run folder with --tag", "--last=2")
    refused(run.parent, "is not a run folder", "--last=2")
    damaged = checkpoint.folder_of(run, 8) / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    refused(run, r"step 8 in .* is damaged \(model.saf.*; leave it out", "--last=2", "--tag=b")
    config = checkpoint.model_config(run, 12)
    wider = build(GPTConfig(**(vars(config) | {"width": 64, "n_head": 4})), "cpu", seed=1)
    loop_state = {"tokenizer": checkpoint.read_state(run, 12)["tokenizer"]}
    checkpoint.save(run, 13, "permanent", wider, {}, loop_state)
    shapes = "steps 12 and 13 are models of different shapes .width 32 and 64, n_head 2 and 4"
    refused(run, shapes, "--last=2", "--tag=b")
