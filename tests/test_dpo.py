"""nanochat dpo on a small model: what is preferred, exact resume, passes, ranks, refusals."""

import json
import random
import shutil

import pytest
import small
import torch
from safetensors.torch import load_file

from nanochat.apps import dpo, jobs
from nanochat.common import UsageError, own_cache
from nanochat.data.packing import NO_TARGET
from nanochat.data.pair_rows import PairRows, rows_of
from nanochat.data.preferences import Pair
from nanochat.run import checkpoint
from nanochat.run.control import Control, Order

FLAGS = [
    "--num-iterations=8",
    "--total-batch-size=256",
    "--eval-every=4",
    "--sample-every=8",
    "--save-every=4",
    "--no-compile",
    "--dtype=float32",
    "--eval-tokens=500",
    "--lr-frac=0.3",
]
RUNNER = """
import sys
from nanochat.apps import dpo
sys.exit(dpo.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pretrained run and a file of pairs: digits in order are preferred."""
    folder = tmp_path_factory.mktemp("dpo")
    shutil.copytree(small.finished(), folder, dirs_exist_ok=True)
    draw = random.Random(0)
    lines = []
    for number in range(90):
        digits = [str(number % 10 + i) for i in range(3)]
        swapped = digits[::-1] if draw.random() < 0.5 else digits[1:] + digits[:1]
        pair = {"prompt": f"{number}:", "chosen": "".join(digits), "rejected": "".join(swapped)}
        lines.append(json.dumps(pair))
    lines.append(json.dumps({"prompt": "1:", "chosen": "1"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def argv(base, out, *flags, tag="tuned"):
    run = [str(base / "run"), "--data", str(base / "pairs.jsonl")]
    return [*run, *FLAGS, f"--out-dir={out}", f"--model-tag={tag}", *flags]


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A folder with an uninterrupted run, `tuned`."""
    folder = tmp_path_factory.mktemp("tuned")
    assert dpo.main(argv(base, folder)) == 0
    return folder


def test_the_run_folder_and_its_records(tuned):
    config = small.config(tuned, "tuned")
    assert config["command"] == "dpo" and config["tuning"]["flags"]["beta"] == 0.1
    (problem,) = small.lines(tuned, "tuned", "problems.jsonl")
    assert problem["line"] == 91 and "no field rejected" in problem["reason"]
    lines = small.lines(tuned, "tuned")
    evaluated = [line for line in lines if "val/reward_margin" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    # before the first update the policy is its reference
    first, last = evaluated[0], evaluated[-1]
    assert first["val/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert first["val/reward_margin"] == first["val/reward_accuracy"] == 0
    assert last["val/loss"] < first["val/loss"] - 0.02 and last["val/reward_margin"] > 0
    assert all(line["base/bpb"] > 0 for line in evaluated)
    # a column of what runs learn would mix it with bits of text
    assert not any("val/bpb" in line for line in lines)
    assert small.summary(tuned, "tuned")["val_bpb"] is None
    assert first["val/kl"] == 0 and last["val/kl"] > 0 and last["val/kl_stderr"] > 0
    steps = [line for line in lines if "train/loss" in line]
    assert steps[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[0]["train/reward_chosen"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/logp_chosen"] < 0
    assert small.summary(tuned, "tuned")["status"] == "completed"


def test_the_reference_is_computed_once(tuned, base, tmp_path, capsys):
    kept = list(own_cache("references").iterdir())
    assert kept and set(load_file(kept[0])) == {"train", "held_out", "drawn", "drawn_logprobs"}
    assert dpo.main(argv(base, tmp_path, "--beta=0.3")) == 0
    assert "computing the log-probabilities" not in capsys.readouterr().out
    assert list(own_cache("references").iterdir()) == kept
    # whatever the loss
    assert dpo.main(argv(base, tmp_path, "--loss=ipo", tag="ipo")) == 0
    assert "computing the log-probabilities" not in capsys.readouterr().out
    first = small.lines(tmp_path, "ipo")[0]
    assert first["val/loss"] == pytest.approx(25, rel=1e-5)


def test_a_resumed_and_a_killed_run_are_the_same(tuned, base, tmp_path):
    shutil.copytree(tuned / "tuned", tmp_path / "resumed")
    resume = argv(base, tmp_path, "--resume-from-step=4", "--overwrite", tag="resumed")
    assert dpo.main(resume) == 0
    script = small.KILLER.replace("import train\nsys.exit(train.run(sys.argv[1:]))", RUNNER)
    script = script.format(root=str(small.ROOT), step=6, signal="SIGKILL")
    killed = argv(base, tmp_path, tag="killed")
    process = small.start(killed, small.environment(), tmp_path / "shown", script)
    assert small.ended(process) == -9
    assert checkpoint.steps_of(tmp_path / "killed") == [4]
    assert dpo.main([*killed, "--resume"]) == 0
    expected = small.timeless(small.lines(tuned, "tuned"))
    for tag in ("resumed", "killed"):
        assert small.timeless(small.lines(tmp_path, tag)) == expected
        small.assert_same_weights(tmp_path, 8, tag, tuned, "tuned")


def test_a_resumed_run_needs_no_source(tuned, base, tmp_path):
    """The reference is kept, and the weights are those of its own checkpoint."""
    shutil.copytree(tuned / "tuned", tmp_path / "tuned")
    resume = argv(base, tmp_path, "--resume-from-step=4", "--overwrite")
    resume[0] = str(tmp_path / "gone")
    assert dpo.main(resume) == 0
    small.assert_same_weights(tmp_path, 8, "tuned", tuned, "tuned")


def losses_of(folder, tag="tuned"):
    return torch.tensor(list(small.losses(folder, tag).values()), dtype=torch.float64)


def test_pairs_per_pass_and_ranks_make_no_difference(tuned, base, tmp_path):
    expected = losses_of(tuned)
    assert dpo.main(argv(base, tmp_path, "--device-batch-size=2", "--no-save")) == 0
    torch.testing.assert_close(losses_of(tmp_path), expected, rtol=0, atol=1e-5)
    result = small.ranks_of(tmp_path, 2, argv(base, tmp_path, tag="ranks"), RUNNER)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(losses_of(tmp_path, "ranks"), expected, rtol=0, atol=1e-5)
    mine, theirs = (
        [line["train/reward_accuracy"] for line in small.lines(*run) if "train/loss" in line]
        for run in ((tmp_path, "ranks"), (tuned, "tuned"))
    )
    assert mine == theirs


def test_orders_of_nanochat_jobs(base, tmp_path, monkeypatch):
    """Save, pause and land between two steps; patience and a fork are refused."""
    verbs = ["set", "save", "pause", "continue", "land"]
    given = {"minutes": 1e-6, "values": {"patience": 3}}
    orders = [Order({"verb": verb, **given}) for verb in verbs]
    waiting = [*orders]

    def take(control):
        if control.status().get("step") != 3:
            return []
        return [waiting.pop(0) for _ in range(len(waiting))]

    monkeypatch.setattr(Control, "take", take)
    assert dpo.main(argv(base, tmp_path)) == 0
    kept, saved, paused, continued, landed = (order.outcome() for order in orders)
    assert kept["error"] == "--patience: the evaluations of this run have no val/bpb"
    # asked at the end only, when a later step is saved as well
    assert saved["step"] in (3, 4) and "is saved" in saved["done"]
    assert [paused["step"], continued["step"]] == [3, 3]
    assert landed["done"] == "landing since step 3: the run ends at step 4"
    assert small.summary(tmp_path, "tuned")["step"] == 4
    tuned = str(tmp_path / "tuned")
    with pytest.raises(UsageError, match="a fine-tuned run, which train.py cannot continue"):
        jobs.main(["fork", tuned, "--tag=other"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--beta=0"], "--beta=0.0: must be above 0"),
        (["--label-smoothing=0.5"], "--label-smoothing=0.5: must be from 0 to below 0.5"),
        (["--loss=ipo", "--label-smoothing=0.1"], "--loss=ipo has none"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_refusals(base, tmp_path, capsys, flags, words):
    assert dpo.main(argv(base, tmp_path, *flags)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_rows_of_pairs():
    """Prompt 5 6, answers 7 8 and 9: padded with 0, and only the answers are targets."""

    class Made:
        lengths = torch.tensor([4]).numpy()

        def __getitem__(self, i):
            arrays = (torch.tensor(ids).numpy().astype("uint32") for ids in ([5, 6], [7, 8], [9]))
            return Pair(*arrays)

        def epoch(self, seed, epoch):
            return torch.arange(1).numpy()

    inputs, targets = rows_of(Made(), [0], 4, padding=0)
    assert inputs.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    n = NO_TARGET
    assert targets.tolist() == [[n, 7, 8, n], [n, 9, n, n]]
    rows = PairRows(Made(), 64, seed=0, padding=0)
    assert rows.T == 32 and rows.step(3, 2) == [0, 0]
