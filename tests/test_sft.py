"""nanochat sft on a small model: what is learned, exact resume, micro-batches, ranks, refusals."""

import itertools
import json
import shutil

import pytest
import small
import torch

from nanochat.apps import jobs, sft
from nanochat.apps.sft.run import OWN
from nanochat.common import UsageError
from nanochat.data.examples import Problem
from nanochat.run import checkpoint
from nanochat.run.control import Control, Order
from nanochat.run.folder import RunFolder
from nanochat.run.loading import load_run
from nanochat.run.tuning import open_tuned, write_problems
from tasks.exercises import TRAIN, exercises

FLAGS = [
    "--num-iterations=8",
    "--total-batch-size=256",
    "--eval-every=4",
    "--sample-every=8",
    "--save-every=4",
    "--no-compile",
    "--dtype=float32",
    "--eval-tokens=500",
    "--exercises=sum,copy",
    "--exercises-per-task=6",
]
BAD_LINES = 12
RUNNER = """
import sys
from nanochat.apps import sft
sys.exit(sft.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pretrained run and a file of conversations."""
    folder = tmp_path_factory.mktemp("sft")
    shutil.copytree(small.finished(), folder, dirs_exist_ok=True)
    made = itertools.islice(exercises("sum", TRAIN), 120)
    lines = [json.dumps({"messages": one.messages()}) for one in made]
    # a conversation of two turns, another form, and one that is too long for the context
    lines.append(json.dumps({"prompt": "2 + 2 =", "answer": "4"}))
    lines.append(json.dumps({"prompt": "x" * 100, "answer": "y"}))
    # more lines that are none than the screen shows
    lines += [json.dumps({"prompt": "no answer"})] * BAD_LINES
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def argv(base, out, *flags, tag="tuned"):
    return [
        str(base / "run"),
        "--data",
        str(base / "chats.jsonl"),
        *FLAGS,
        f"--out-dir={out}",
        f"--model-tag={tag}",
        *flags,
    ]


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A folder with an uninterrupted fine-tuning run, `tuned`."""
    folder = tmp_path_factory.mktemp("tuned")
    assert sft.main(argv(base, folder)) == 0
    return folder


@pytest.mark.parametrize("flag, expected", [([], False), (["--compile"], True)])
def test_a_run_is_compiled_if_its_source_was(base, tmp_path, flag, expected):
    words = [word for word in argv(base, tmp_path, *flag) if word != "--no-compile"]
    tuned = open_tuned(sft.parse_args(words), "sft", OWN)
    assert tuned.run.args.compile is expected


def test_a_sharded_source_is_tuned_whole(base, tmp_path):
    copied = small.copy_run(base, tmp_path)
    shutil.copy(base / "chats.jsonl", tmp_path)
    config = json.loads((copied / "config.json").read_text())
    config["args"]["shard"] = True
    (copied / "config.json").write_text(json.dumps(config))
    tuned = open_tuned(sft.parse_args(argv(tmp_path, tmp_path)), "sft", OWN)
    assert tuned.run.args.shard is False


def test_the_run_folder_is_like_any_other(tuned, base):
    config = small.config(tuned, "tuned")
    assert config["command"] == "sft" and config["init_from"]["step"] == 12
    assert config["args"]["depth"] == 2 and config["args"]["data"].endswith("text.txt")
    assert config["model"]["vocab_size"] == 257 + 4
    counts = config["tuning"]["conversations"]
    assert counts["lines"] == 122 + BAD_LINES and counts["too_long"] == 1
    assert counts["bad_lines"] == BAD_LINES
    named = small.lines(tuned, "tuned", "problems.jsonl")
    assert [problem["line"] for problem in named] == list(range(123, 123 + BAD_LINES))
    assert {problem["file"] for problem in named} == {str(base / "chats.jsonl")}
    assert all("neither messages nor prompt" in problem["reason"] for problem in named)
    summary = small.summary(tuned, "tuned")
    assert summary["status"] == "completed" and summary["step"] == 8
    model, tokenizer = load_run(tuned / "tuned")
    assert tokenizer.specials[-1] == "<|turn_end|>" and model.config.vocab_size == 261
    lines = small.lines(tuned, "tuned")
    evaluated = [line for line in lines if "val/bpb" in line]
    assert [line["step"] for line in evaluated] == [0, 4, 8]
    assert all(line["base/bpb"] > 0 for line in evaluated)
    assert evaluated[-1]["val/loss"] < evaluated[0]["val/loss"] - 0.2
    asked = [line for line in lines if "exercises/sum" in line]
    assert [line["step"] for line in asked] == [0, 4, 8]
    assert all(line["exercises/sum_n"] == 6 for line in asked)
    samples = small.lines(tuned, "tuned", "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 8}
    assert all(sample["prompt"].startswith("<|user_start|>") for sample in samples)


def test_problems_are_those_of_the_last_start(tmp_path):
    folder, said = RunFolder(tmp_path), []
    problems = [Problem(tmp_path / "a.jsonl", n, "not JSON") for n in (3, 7)]
    write_problems(folder, problems, said.append)
    assert [problem["line"] for problem in small.lines(tmp_path, "", "problems.jsonl")] == [3, 7]
    assert said == [f"2 lines of the data skipped; {tmp_path / 'problems.jsonl'} names each"]
    write_problems(folder, [], said.append)
    assert not (tmp_path / "problems.jsonl").exists() and len(said) == 1
    # a folder that cannot be written costs no run
    write_problems(RunFolder(tmp_path / "missing"), problems, said.append)
    assert "cannot be written" in said[-1]


def test_a_resumed_run_is_the_same(tuned, base, tmp_path):
    """Stopped at step 4 by its horizon of saves, continued from there."""
    shutil.copytree(tuned / "tuned", tmp_path / "tuned")
    assert sft.main(argv(base, tmp_path, "--resume-from-step=4", "--overwrite")) == 0
    mine, expected = (small.timeless(small.lines(f, "tuned")) for f in (tmp_path, tuned))
    assert mine == expected
    small.assert_same_weights(tmp_path, 8, "tuned", tuned, "tuned")


def test_a_killed_run_is_the_same(tuned, base, tmp_path):
    script = small.KILLER.replace("import train\nsys.exit(train.run(sys.argv[1:]))", RUNNER)
    script = script.format(root=str(small.ROOT), step=6, signal="SIGKILL")
    process = small.start(argv(base, tmp_path), small.environment(), tmp_path / "shown", script)
    assert small.ended(process) == -9
    assert checkpoint.steps_of(tmp_path / "tuned") == [4]
    assert sft.main(argv(base, tmp_path, "--resume")) == 0
    mine, expected = (small.timeless(small.lines(f, "tuned")) for f in (tmp_path, tuned))
    assert mine == expected
    small.assert_same_weights(tmp_path, 8, "tuned", tuned, "tuned")


def losses_of(folder, tag="tuned"):
    return torch.tensor(list(small.losses(folder, tag).values()), dtype=torch.float64)


def test_micro_batches_and_ranks_make_one_big_batch(tuned, base, tmp_path):
    """The loss is normalised by the targets of the whole step, which are dealt out unevenly."""
    expected = losses_of(tuned)
    assert sft.main(argv(base, tmp_path, "--device-batch-size=1", "--no-save")) == 0
    torch.testing.assert_close(losses_of(tmp_path), expected, rtol=0, atol=1e-5)
    result = small.ranks_of(tmp_path, 2, argv(base, tmp_path, tag="ranks"), RUNNER)
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(losses_of(tmp_path, "ranks"), expected, rtol=0, atol=1e-5)
    targets = [line["train/targets"] for line in small.lines(tuned, "tuned") if "train/dt" in line]
    assert len(set(targets)) > 1


def test_orders_of_nanochat_jobs(base, tmp_path, monkeypatch):
    """Save, pause and land between two steps; a fork is refused."""
    verbs = ["save", "pause", "continue", "land"]
    orders = [Order({"verb": verb, "minutes": 1e-6}) for verb in verbs]
    waiting = [*orders]

    def take(control):
        if control.status().get("step") != 3:
            return []
        return [waiting.pop(0) for _ in range(len(waiting))]

    monkeypatch.setattr(Control, "take", take)
    assert sft.main(argv(base, tmp_path)) == 0
    saved, paused, continued, landed = (order.outcome() for order in orders)
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
        (["--lr-frac=-1"], "--lr-frac=-1.0: must not be negative"),
        (["--eval-every=0", "--grad-clip=-1"], "--eval-every=0"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--exercises=sum,algebra"], "--exercises=algebra: no such task"),
    ],
)
def test_refusals(base, tmp_path, capsys, flags, words):
    assert sft.main(argv(base, tmp_path, *flags)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_what_a_resumed_run_may_not_change(tuned, base, tmp_path, capsys):
    shutil.copytree(tuned / "tuned", tmp_path / "tuned")
    assert sft.main(argv(base, tmp_path, "--resume")) == 0
    assert "is complete at step 8" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "tuned" / "checkpoints" / "step_000008")
    assert sft.main(argv(base, tmp_path, "--resume", "--lr-frac=0.5")) == 2
    assert "--lr-frac=0.5 (was 0.3)" in capsys.readouterr().err
    other = base / "other.jsonl"
    other.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n" * 2)
    other.write_text((base / "chats.jsonl").read_text().replace("47", "48"))
    assert sft.main(argv(base, tmp_path, "--resume", "--data", str(other))) == 2
    assert "not those that this run was started with" in capsys.readouterr().err
    # train.py does not continue it either
    assert small.run(tmp_path, "--resume", tag="tuned") == 2
    assert "made by nanochat sft" in capsys.readouterr().err


def test_a_plan_alone(base, tmp_path, capsys):
    assert sft.main(argv(base, tmp_path, "--dry-run", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["plan"]["num_iterations"] == 8 and plan["plan"]["rows_per_step"] == 8
    assert not (tmp_path / "tuned").exists()
