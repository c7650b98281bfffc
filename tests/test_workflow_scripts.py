"""The scripts of whole workflows, runs/shakespeare.sh and five others: their commands at toy size
are those at full size, and they do what they say at toy size."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small

ROOT = small.ROOT
# {script: what it is given besides the environment}
SCRIPTS = {
    "quickstart": [],
    "shakespeare": [],
    "tinystories": [],
    "nanolm": [],
    "tinyllm": [],
    "own_text": ["corpus.txt"],
}

# They make up a text, with the characters of the prompts of the scripts.
WORDS = [
    "ROMEO:\n",
    "Once",
    "upon",
    "a",
    "time",
    "The",
    "cat",
    "and",
    "the",
    "dog",
    "had",
    "fun",
    "so",
]


# What the scripts read from the environment, which is to be what a test gives.
VARIABLES = "DATA INIT_FROM MINUTES OUT PAIRS PLAN PROMPT PYTHON SIZE STEPS TEST TOY VAL_DATA VOCAB"


def start(name, *arguments, **variables):
    """The finished process of a script."""
    environ = {k: v for k, v in small.environment().items() if k not in VARIABLES.split()}
    return subprocess.run(
        ["bash", ROOT / "runs" / f"{name}.sh", *arguments],
        env=environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


# ----- what they would run


def plan(name, *arguments, **variables):
    """The commands of a script, as lists of words."""
    done = start(name, *arguments, PLAN="1", OUT="o u t", **variables)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line.replace("$'", "'")) for line in done.stdout.splitlines()]
    assert all(words[0] == "python" for words in commands)
    return [words[1:] for words in commands]


def numbers(word):
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e\d+)?", word)]


def without_numbers(word):
    return re.sub(r"\d+(\.\d+)?(e\d+)?", "N", word)


@pytest.mark.parametrize(
    "name, variables",
    [
        *((name, {}) for name in SCRIPTS),
        *(("shakespeare", {"SIZE": size}) for size in ("384", "768")),
        ("tinystories", {"SIZE": "30m"}),
        *(("tinyllm", {"SIZE": size}) for size in ("5m", "30m")),
        ("own_text", {"INIT_FROM": "out/other"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
def test_the_toy_runs_the_same_commands_with_smaller_numbers(name, variables):
    full = plan(name, *SCRIPTS[name], **variables)
    toy = plan(name, *SCRIPTS[name], TOY="1", **variables)
    assert len(full) == len(toy) >= 4
    smaller = 0
    for words, toy_words in zip(full, toy):
        # compilation takes longer than all of a toy
        toy_words = ["--compile" if word == "--no-compile" else word for word in toy_words]
        assert list(map(without_numbers, words)) == list(map(without_numbers, toy_words))
        for word, toy_word in zip(words, toy_words):
            assert all(a >= b for a, b in zip(numbers(word), numbers(toy_word))), word
            smaller += word != toy_word
    assert smaller >= 6


def test_a_plan_runs_and_writes_nothing(tmp_path):
    plan("shakespeare", PYTHON="false")
    assert not (ROOT / "o u t").exists()


# ----- what they refuse


@pytest.mark.parametrize(
    "name, arguments, variables, problem",
    [
        ("quickstart", ["--out-dir=x"], {}, "--out-dir=x: set OUT=FOLDER instead"),
        ("shakespeare", [], {"SIZE": "7"}, "SIZE=7: give small, 384 or 768"),
        ("shakespeare", [], {"STEPS": "30"}, "STEPS=30: give a multiple of 20"),
        ("shakespeare", ["--num-iterations=9"], {}, "--num-iterations=9: set STEPS= instead"),
        ("tinystories", [], {"SIZE": "4"}, "SIZE=4: give 4m or 30m"),
        ("tinystories", ["--model-tag=x"], {}, "--model-tag=x: set OUT=FOLDER instead"),
        ("nanolm", [], {"VOCAB": "many"}, "VOCAB=many: give a number of tokens"),
        ("nanolm", ["--data=x"], {}, "--data=x: set DATA=TEXT"),
        ("tinyllm", [], {"SIZE": "2m"}, "SIZE=2m: give 1m, 5m or 30m"),
        ("tinyllm", ["--no-save"], {}, "--no-save: leaves nothing to sample"),
        ("own_text", [], {}, "TEXT is missing: give a folder of text"),
        ("own_text", ["--depth=2"], {}, "TEXT is missing: give a folder of text"),
    ],
)
def test_what_is_refused_before_anything_else(name, arguments, variables, problem):
    done = start(name, *arguments, PYTHON="false", **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert f"{name}.sh: error: {problem}" in done.stderr


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"step": 4, "val/loss": null, "val/bpb": 1.5}', "val/loss of RUN (last) is null"),
        ('{"step": 4, "val/bpb": 1.5}', "val/loss of RUN (last) is missing"),
    ],
)
def test_a_metric_that_is_null_is_named(tmp_path, line, named):
    """common.sh's metric(), which every script reads its numbers with."""
    lines = ['{"step": 1, "train/loss": 4.5}', '{"step": 2, "val/loss": -1e-05, "val/bpb": 1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, ""]))

    def metric(which, name="val/loss"):
        script = f'set -euo pipefail; source runs/common.sh; x="$(metric {which} "$1" {name})"'
        return subprocess.run(
            ["bash", "-c", f'{script}; echo "$x"', "sft.sh", tmp_path],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )

    for which in ("first", "last", "lowest", "2"):
        assert metric(which).stdout == "-1e-05\n", which
    assert metric("last", "step").stdout == "2\n"
    if "null" in line:
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, line, ""]))
        # one evaluation that failed does not hide the others
        assert metric("lowest").stdout == "-1e-05\n"
    else:
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
    done = metric("last")
    assert done.returncode == 1 and done.stdout == ""
    expected = f"sft.sh: error: {named.replace('RUN', str(tmp_path))}, so there is no result"
    assert expected in done.stderr


# ----- what they do


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A command that stands for this interpreter, and starts as fast as a fork."""
    folder = tmp_path_factory.mktemp("python")
    forking = ROOT / "tests" / "forking.py"
    with subprocess.Popen(
        [sys.executable, forking, "serve", folder / "socket"],
        stdout=subprocess.PIPE,
        text=True,
        env=small.environment(),
    ) as server:
        assert server.stdout.readline() == "ready\n"
        client = folder / "python"
        client.write_text(
            f'#!/bin/sh\nexec {sys.executable} -S -E {forking} {folder / "socket"} "$@"\n'
        )
        client.chmod(0o755)
        yield client
        server.kill()


def text_of(folder):
    """A file of short documents of random words, in a folder with a blank."""
    folder = Path(folder) / "some text"
    folder.mkdir()
    draw = random.Random(1)
    documents = (" ".join(draw.choices(WORDS, k=40)) for _ in range(500))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    return folder / "text.txt"


def words_of(line):
    """{name: value} of a RESULT line."""
    assert line.startswith("RESULT ")
    return dict(word.split("=") for word in line.removeprefix("RESULT ").split())


def numbers_of(line):
    """The same, of those that are numbers."""
    return {k: float(v) for k, v in words_of(line).items() if re.match(r"-?\d", v)}


def toy(python, tmp_path, name, *arguments, **variables):
    """Runs a script at toy size; returns all that it printed, and its RESULT line."""
    variables |= {"PYTHON": str(python), "TOY": "1", "OUT": f"{tmp_path}/o u t"}
    done = start(name, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, done.stdout.splitlines()[-1]


def test_quickstart(python, tmp_path):
    """A second start shows the same run."""
    data = str(text_of(tmp_path))
    run = tmp_path / "o u t" / "quickstart"
    shown, result = toy(python, tmp_path, "quickstart", DATA=data)
    words = words_of(result)
    assert words["status"] == "completed" and 0.3 < float(words["val_bpb"]) < 5
    assert f"loss plot:    {run}/loss.png\n" in shown and (run / "loss.png").exists()
    shown, again = toy(python, tmp_path, "quickstart", DATA=data)
    assert again == result and "is complete at step" in shown


def test_shakespeare(python, tmp_path):
    shown, result = toy(python, tmp_path, "shakespeare", DATA=str(text_of(tmp_path)))
    found = numbers_of(result)
    losses = [f"loss_{n}" for n in (5, 15, 50, 100)]
    assert list(found) == ["seconds", "best", "average", *losses]
    assert 4 > found["loss_5"] > found["loss_15"] > found["loss_50"] > found["loss_100"] > 0.3
    assert found["best"] <= found["loss_100"] < 2.5
    assert 0.3 < found["average"] < found["loss_5"]
    run = tmp_path / "o u t" / "small"
    page = (run / "report.html").read_text()
    for step in (5, 15, 50, 100):
        assert f"{run}, step {step} ---" in shown
        assert f"samples of step_{step:06}" in page
    stages = (run / "stages.html").read_text()
    for step in (5, 15, 50, 100):
        assert f"step {step}, validation loss {found[f'loss_{step}']:.4f}" in stages
    assert "Temperature 0.5" in stages and "Temperature 1.0" in stages
    assert (run / "play.html").exists()


def test_tinystories(python, tmp_path):
    """The client's text is that of the server, whose end is orderly."""
    shown, result = toy(python, tmp_path, "tinystories", DATA=str(text_of(tmp_path)))
    words = words_of(result)
    assert words["status"] == "completed" and 0.3 < float(words["val_bpb"]) < 3.5
    run = tmp_path / "o u t" / "4m"
    (report,) = (run / "evaluations").glob("*.json")
    bpb = json.loads(report.read_text())["bpb"]
    assert bpb["perplexity"] > 1 and bpb["seconds"] > 0
    assert "perplexity" in report.with_suffix(".md").read_text()
    assert json.loads((run / "huggingface" / "config.json").read_text())["model_type"] == "llama"
    before_the_result = shown.split("RESULT")[0].split("Hugging Face folder of ")[1]
    assert "\nOnce upon a time" in before_the_result
    assert "listening on http://127.0.0.1:" in (run / "serve.log").read_text()


def test_nanolm(python, tmp_path):
    shown, result = toy(python, tmp_path, "nanolm", DATA=str(text_of(tmp_path)))
    found = numbers_of(result)
    assert list(found) == ["val_loss", "val_bpb", "reward_accuracy", "bpb_after_dpo"]
    assert 0.3 < found["val_bpb"] < 3.5 and 0 <= found["reward_accuracy"] <= 1
    assert abs(found["bpb_after_dpo"] - found["val_bpb"]) < 0.5
    config = json.loads((tmp_path / "o u t" / "base" / "config.json").read_text())
    assert config["model"]["n_head"] == 4 * config["model"]["n_kv_head"]
    assert "--- sample at step 50" in shown


def test_tinyllm(python, tmp_path):
    """It is interrupted after the first checkpoint and long before the end."""
    data = str(text_of(tmp_path))
    shown, result = toy(python, tmp_path, "tinyllm", DATA=data)
    found = numbers_of(result)
    assert list(found) == ["first_loss", "val_loss", "stopped_at", "steps"]
    assert 100 <= found["stopped_at"] < found["steps"] == 500
    assert 5 > found["first_loss"] > 2 * found["val_loss"] > 0.5
    run = tmp_path / "o u t" / "1m"
    assert f"stopped at step {found['stopped_at']:.0f}: as requested" in shown
    assert f"{run}, step 500 ---" in shown and (run / "loss.png").exists()
    # a second start shows the same run
    shown, again = toy(python, tmp_path, "tinyllm", DATA=data)
    assert again == result and "is complete at step 500" in shown


def test_own_text(python, tmp_path):
    """From scratch, then from the weights of that run."""
    data = str(text_of(tmp_path).parent)
    _, result = toy(python, tmp_path, "own_text", data, MINUTES="0.02")
    scratch = words_of(result)
    assert scratch["status"] == "completed" and 0.3 < float(scratch["val_bpb"]) < 5
    run = tmp_path / "o u t" / "scratch"
    assert (run / "play.html").exists()
    _, result = toy(python, tmp_path, "own_text", data, INIT_FROM=str(run), MINUTES="0.02")
    assert float(words_of(result)["val_bpb"]) < float(scratch["val_bpb"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_with_an_interpreter_for_each_command(tmp_path, name):
    """A second start ends as well; what is complete is not trained again."""
    text = text_of(tmp_path)
    arguments = [str(text)] if name == "own_text" else []
    for _ in range(2):
        shown, result = toy(sys.executable, tmp_path, name, *arguments, DATA=str(text))
        assert numbers_of(result)
    assert "is complete at step" in shown
