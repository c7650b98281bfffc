"""Wrong flags, found before any work is done: each problem is a sentence that names the flag, its
value or the reason, and the remedy. Whole starts that are refused: test_wrong_inputs.py."""

import pytest
import small

from nanochat import ranks
from nanochat.common import UsageError
from nanochat.run import trackers
from nanochat.run.checks import check_flags, core_metric_flags
from nanochat.run.flags import parse


def problems(*flags):
    """The sentences on a small run with these flags."""
    return check_flags(parse([*small.FLAGS, f"--data={small.ROOT / 'README.md'}", *flags]))


# flags -> words that each sentence must hold, in order
WRONG = {
    # ranges
    "--depth=0": [["--depth=0", "at least 1"]],
    "--num-iterations=-5": [["--num-iterations=-5", "-1"]],
    "--num-iterations=-1 --target-param-data-ratio=-1": [
        ["--target-param-data-ratio=-1", "no horizon", "--num-iterations"]
    ],
    "--adam-beta1=1": [["--adam-beta1=1", "below 1"]],
    "--keep-last=0": [["--keep-last=0", "-1"]],
    "--patience=0": [["--patience=0", "-1"]],
    "--core-metric-every=0": [["--core-metric-every=0", "-1"]],
    "--core-metric-max-per-task=-5": [["--core-metric-max-per-task=-5", "-1"]],
    "--grad-clip=nan --matrix-lr=inf": [
        ["--matrix-lr=inf", "not a finite number"],
        ["--grad-clip=nan", "not a finite number"],
    ],
    # what is no number is one problem, whatever other checks look at it
    "--warmdown-ratio=nan": [["--warmdown-ratio=nan", "finite"]],
    "--warmup-ratio=nan": [["--warmup-ratio=nan", "finite"]],
    "--target-flops=-inf": [["--target-flops=-inf", "finite"]],
    # paths
    "--model-tag=../elsewhere": [["--model-tag=../elsewhere", "not a name", "--out-dir"]],
    "--model-tag=..": [["--model-tag=..", "not a name", "--out-dir"]],
    "--out-dir=": [["--out-dir=:", "empty", "leave the flag out"]],
    "--out-dir=/dev/null/x": [["--out-dir=/dev/null/x", "/dev/null is not a folder", "another"]],
    "--data=/no/such/thing*.txt": [["--data=/no/such/thing*.txt", "no such file", "hf:"]],
    "--data=climbmixx": [["--data=climbmixx", "no dataset", "climbmix", "hf:"]],
    "--val-data=/no/such/file": [["--val-data=/no/such/file", "no such file"]],
    "--sample-prompts=/no/such/file": [["--sample-prompts=/no/such/file", "no such file"]],
    "--init-from=/no/such/run": [["--init-from=/no/such/run", "no such file"]],
    "--core-metric-every=5 --core-bundle=/no/such/folder": [
        ["--core-bundle=/no/such/folder", "no such file"]
    ],
    # the model
    "--depth=100000 --aspect-ratio=1": [["--depth=100000", "at most 1000"]],
    "--aspect-ratio=65537": [["--aspect-ratio=65537", "wider", "give less"]],
    "--window-pattern=SXL": [["--window-pattern=SXL", "letters", "SSSL"]],
    "--window-pattern=": [["--window-pattern=:", "letters", "SSSL"]],
    "--short-window=64": [["--short-window=64", "--max-seq-len=32", "at most"]],
    "--head-dim=64": [["--head-dim=64", "2 x 16 = 32", "16 or 32", "depth of 4"]],
    "--head-dim=15": [["--head-dim=15", "even"]],
    "--n-kv-head=3": [["--n-kv-head=3", "the 2 query heads", "one of 1, 2"]],
    "--tie-embeddings": [["--tie-embeddings: needs --arch=llama", "leave it out"]],
    "--arch=llama --window-pattern=SL --short-window=8": [
        ["--window-pattern=SL", "full context", "leave the flag out"],
        ["--short-window=8", "full context", "leave the flag out"],
    ],
    # the tokenizer
    "--tokenizer=bpee": [["--tokenizer=bpee", "bpe, bpe-llama, char, byte, gpt2"]],
    "--tokenizer=bpe --vocab-size=100": [["--vocab-size=100", "256 bytes", "at least 257"]],
    "--vocab-size=512": [["--vocab-size=512", "--tokenizer=byte", "leave it out"]],
    # the batch
    "--total-batch-size=250": [["--total-batch-size=250", "32 tokens", "use 224 or 256"]],
    "--total-batch-size=256 --device-batch-size=3": [
        ["--total-batch-size=256", "96 tokens", "use 192 or 288"]
    ],
    "--total-batch-size=20": [["--total-batch-size=20", "use 32"]],
    "--dry-run --gpus=3": [["--total-batch-size=256", "96 tokens", "ranks", "use 192 or 288"]],
    # the runtime
    "--shard --fp8": [
        ["--shard: ", "cannot be split", "leave one of --shard and --fp8 out"],
        ["--dtype=float32: "],
        ["--fp8: slower"],
    ],
    "--attention=flash9": [["--attention=flash9", "unknown backend", "auto"]],
    "--fp8-recipe=rowwise": [["--fp8-recipe=rowwise: needs --fp8", "add that"]],
    "--fp8": [
        ["--dtype=float32: layers that --fp8 does not convert", "leave it out"],
        ["--fp8: slower than bfloat16", "--no-compile"],
    ],
    # combinations
    f"--init-from={small.ROOT} --resume-from-step=3": [
        ["--init-from", "contradicts --resume-from-step", "one of the two"]
    ],
    "--eval-every=-1 --stop-at-bpb=1.5 --patience=2": [
        ["--stop-at-bpb=1.5", "needs evaluations", "--eval-every"],
        ["--patience=2", "needs evaluations", "--eval-every"],
    ],
    "--warmup-ratio=0.6 --warmdown-ratio=0.6": [
        ["--warmup-ratio=0.6", "--warmdown-ratio=0.6", "lower one"]
    ],
    "--no-save": [["--save-every=4", "no effect with --no-save", "leave one"]],
    "--no-save --save-every=-1 --keep-last=2 --save-every-minutes=5": [
        ["--save-every-minutes=5", "no effect with --no-save"],
        ["--keep-last=2", "no effect with --no-save"],
    ],
    "--sample-every=-1 --sample-prompts=/dev/null": [
        ["--sample-prompts=/dev/null", "no effect with --sample-every=-1"]
    ],
    "--lr-schedule=cosine --warmdown-ratio=0.2": [
        ["--warmdown-ratio=0.2", "no effect with --lr-schedule=cosine"]
    ],
    "--warmup-steps=3 --warmup-ratio=0.1": [
        ["--warmup-ratio=0.1", "no effect with --warmup-steps"]
    ],
    "--warmup-steps=13": [["--warmup-steps=13", "the run's 12 steps", "at most 12"]],
    "--save-at=3,13": [["--save-at=3,13", "the run's 12 steps", "up to 12"]],
    "--save-at=3,0": [["--save-at=3,0", "not a list of steps", "such as 500,1000"]],
    "--save-at=3;9": [["--save-at=3;9", "not a list of steps"]],
    "--resume --overwrite": [["--overwrite: contradicts --resume", "one of the two"]],
    # planning
    "--gpus=8": [["--gpus=8: needs --dry-run", "leave it out"]],
    "--json": [["--json: needs --dry-run", "leave it out"]],
    "--gpu=H100 --dtype=auto": [["--gpu=H100: needs --dry-run", "leave it out"]],
    "--gpu-price=2": [["--gpu-price=2.0: needs --dry-run", "leave it out"]],
    "--gpu-network=100": [["--gpu-network=100.0: needs --dry-run", "leave it out"]],
    "--dry-run --gpu-network=100": [["--gpu-network=100.0: needs --gpu", "leave it out"]],
    "--dry-run --gpus=all": [["--gpus=all: needs --gpu", "give a number"]],
    "--dry-run --gpus=0": [["--gpus=0: must be at least 1", "give a number, or all"]],
    "--dry-run --gpu-price=0": [["--gpu-price=0.0: must be positive, or -1"]],
    "--dry-run --gpu=H9000 --dtype=auto": [["--gpu=H9000", "table of GPUs", "choose one of"]],
    "--dry-run --gpu=H100": [["--gpu=H100", "16 bits", "leave --dtype and --device-type out"]],
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags(flags):
    found = problems(*flags.split(" "))
    assert len(found) == len(WRONG[flags]), found
    for sentence, words in zip(found, WRONG[flags], strict=True):
        assert [word for word in words if word not in sentence] == [], sentence
        assert "\n" not in sentence


@pytest.mark.parametrize(
    "flags",
    [
        "--resume",
        "--data=python",
        "--data=climbmix",
        "--data=hf:someone/something",
        "--total-batch-size=256 --device-batch-size=4",
        "--dry-run --gpus=8",
        "--dry-run --gpu=H100 --dtype=auto",
        "--dry-run --gpu=H100 --dtype=auto --gpus=all --gpu-network=100 --gpu-price=2.5",
        "--head-dim=32",
        "--n-kv-head=1",
        "--short-window=32",
        "--arch=llama --window-pattern=L --tie-embeddings",
        "--tokenizer=bpe --vocab-size=257",
        "--lr-schedule=cosine --warmup-ratio=0.6",
        "--warmup-ratio=0.5 --warmdown-ratio=0.5",
        "--no-save --save-every=-1",
        "--save-at=3,12",
        "--save-at=",
        "--seed=0 --grad-clip=0 --dropout=0 --warmup-steps=0",
        "--core-metric-every=auto --core-metric-max-per-task=auto",
    ],
)
def test_flags_that_are_fine(flags):
    assert problems(*flags.split(" ")) == []


def test_the_defaults_are_fine():
    assert check_flags(parse([])) == []


def test_all_problems_are_found_together():
    flags = [
        "--depth=0",
        "--window-pattern=Q",
        "--adam-beta2=2.0",
        "--total-batch-size=250",
        "--val-data=/none",
        "--out-dir=/dev/null/x",
        "--tokenizer=none",
        "--gpus=3",
    ]
    found = "\n".join(problems(*flags))
    assert [flag for flag in flags if f"{flag}: " not in found] == []


def test_a_batch_is_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 3)
    (sentence,) = problems()
    assert "--total-batch-size=256: " in sentence and "use 192 or 288" in sentence


def test_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(trackers, "is_installed", lambda package: False)
    first, second = problems("--run=name", "--tensorboard")
    assert "--run=name" in first and "wandb" in first
    assert "--tensorboard" in second


@pytest.mark.parametrize(
    "given, device_type, every, most",
    [
        ([], "cuda", 2000, 500),
        ([], "cpu", -1, 50),
        ([], "mps", -1, 50),
        (["--core-metric-every=7", "--core-metric-max-per-task=3"], "cuda", 7, 3),
        (["--core-metric-every=7", "--core-metric-max-per-task=-1"], "cpu", 7, -1),
        (["--core-metric-every=7", "--core-bundle=somewhere"], "cpu", 7, 50),
        (["--core-bundle="], "cpu", -1, 50),
    ],
)
def test_how_often_core_is_measured(given, device_type, every, most):
    assert core_metric_flags(parse(given), device_type) == (every, most)


def test_a_core_bundle_that_nothing_would_read():
    with pytest.raises(UsageError, match="--core-bundle=x: CORE is not .* --core-metric-every"):
        core_metric_flags(parse(["--core-bundle=x"]), "cpu")
