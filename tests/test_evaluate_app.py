"""`nanochat evaluate`: numbers against direct computations, its three files, what it refuses."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import naive_core
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F

import nanochat
from nanochat import hardware
from nanochat.__main__ import main
from nanochat.apps.evaluate import build_parser, measure
from nanochat.apps.evaluate.report import difference, difference_sentence
from nanochat.apps.evaluate.subject import default_batch_tokens
from nanochat.common import read_json, write_json
from nanochat.data.text import iterate_documents
from nanochat.data.tokenizer import gpt2_byte_characters, train_tokenizer
from nanochat.eval.core import CoreResult, TaskResult
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint, loading
from nanochat.run.folder import RunFolder
from tasks.core import LABELS, interval

ROOT = Path(__file__).resolve().parent.parent
FP32 = ("--device-type=cpu", "--dtype=float32")
TEXT = (
    "One café, 12 crêpes.\n<|endoftext|>\nThe second document of three is longer: 日本語 🙂.\n"
    "<|endoftext|>\n  x  = 1\n"
)
RANKS = """
import sys
from nanochat import hardware
from nanochat.__main__ import main
hardware.peak_flops = lambda device: (1e12, "assumed")
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one tiny run, validated at steps 4, 8 and 12, and of a CORE bundle."""
    folder = tmp_path_factory.mktemp("evaluate")
    assert small.run(folder, "--eval-every=4", "--sample-every=-1") == 0
    small.core_bundle(folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, for one test."""
    return shutil.copytree(trained / "run", tmp_path / "run")


@pytest.fixture
def bundle(trained):
    return f"--core-bundle={trained / 'bundle'}"


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """Nothing is timed."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device: (1e12, "assumed"))


@pytest.fixture
def text(tmp_path):
    """The flag that names a file of three documents."""
    (tmp_path / "text.txt").write_text(TEXT)
    return f"--data={tmp_path / 'text.txt'}"


def evaluate(*argv):
    """The exit code of the command, in fp32 on the CPU."""
    return main(["evaluate", *map(str, argv), *FP32])


def report_of(folder, name="step_000012"):
    return json.loads((Path(folder) / f"{name}.json").read_text())


def measured(run, *argv, code=0):
    """The report of a run's newest checkpoint."""
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    assert evaluate(run, *argv) == code
    return report_of(run / "evaluations")


def contents(*folders):
    return {
        path: path.read_bytes()
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def refused(capsys, folder, *argv, code=2, kept=()):
    """The message of a command that is refused and writes nothing."""
    before = contents(folder, *kept)
    capsys.readouterr()
    assert evaluate(*argv) == code
    shown = capsys.readouterr()
    assert contents(folder, *kept) == before
    assert (
        shown.err.startswith("nanochat evaluate: error: ")
        and shown.err.count("error:") == 1
        and "Traceback" not in shown.err
    )
    return shown.err.removeprefix("nanochat evaluate: error: ")


def timeless(value):
    """A report without what a clock, or the number of ranks, decides."""
    if isinstance(value, dict):
        return {
            key: timeless(entry)
            for key, entry in value.items()
            if key not in ("seconds", "ranks", "device", "run")
        }
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def direct_bpb(logits_of, documents, encode, bos, T):
    """(bits per byte, tokens): each piece of a document alone after a BOS, from logits alone."""
    nats, n_tokens = 0.0, 0
    for document in documents:
        ids = list(encode(document))
        n_tokens += len(ids)
        for start in range(0, len(ids), T):
            piece = torch.tensor([bos, *ids[start : start + T]])
            with torch.no_grad():
                nats += F.cross_entropy(
                    logits_of(piece[None, :-1])[0].double(), piece[1:], reduction="sum"
                ).item()
    return nats / math.log(2) / sum(len(document.encode()) for document in documents), n_tokens


# ---- CORE of a run ----


def answers_of(report):
    """The answers to each task in a report."""
    return {label: SimpleNamespace(**task) for label, task in report["core"]["tasks"].items()}


@pytest.mark.parametrize("cut", [3, -1])
def test_core_is_told_in_four_ways(run, bundle, capsys, cut):
    """Console, Markdown, CSV and JSON say the same."""
    assert evaluate(run, "--core", bundle, f"--max-per-task={cut}") == 0
    shown, folder = capsys.readouterr().out, run / "evaluations"
    assert sorted(os.listdir(folder)) == [
        f"step_000012.{ending}" for ending in ("csv", "json", "md")
    ]
    core, page = report_of(folder)["core"], (folder / "step_000012.md").read_text()
    n = 3 if cut == 3 else 6
    assert (
        tuple(core["tasks"]) == LABELS
        and core["n"] == 22 * n
        and core["low"] < core["core_metric"] < core["high"]
    )
    assert core["core_metric"] == pytest.approx(
        sum(task["centered"] for task in core["tasks"].values()) / 22, abs=1e-12
    )
    words = (
        f"CORE {core['core_metric']:.4f}, 95% interval {core['low']:.4f} to {core['high']:.4f} "
        f"(bootstrap over the examples), n = {22 * n}"
    )
    for text in (shown, page):
        assert words in text and ("a sample of at most 3 examples a task" in text) == (cut == 3)
        assert (
            ("all examples" in text) == (cut == -1)
            and "prompts of at most 320 tokens" in text
            and "chance levels v1" in text
        )
    rows = {
        line.split()[0]: line.split() for line in shown.splitlines() if line.split()[0] in LABELS
    }
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")
        for line in page.splitlines()
        if line.startswith("|")
    }
    for label, task in core["tasks"].items():
        assert (
            task["correct"].count("1") / len(task["correct"]) == task["accuracy"]
            and task["n"] == len(task["correct"]) == n
        )
        assert task["stderr"] == pytest.approx(
            math.sqrt(task["accuracy"] * (1 - task["accuracy"]) / (n - 1))
        )
        told = [
            f"{task['accuracy']:.4f}",
            f"{task['stderr']:.4f}",
            f"{task['chance']:.3f}",
            f"{task['centered']:.4f}",
            str(n),
            "6",
            str(task["shots"]),
            str(task["empty_spans"]),
            str(task["cropped"]),
            "0",
        ]
        assert rows[label][1:-1] == told and cells[label][1:-1] == told
    assert "written: " in shown and str(folder / "step_000012") + ".md" in shown
    with open(folder / "step_000012.csv", newline="") as file:
        table = {row["metric"]: row for row in csv.DictReader(file)}
    assert len(table) == 1 + 2 * 22
    assert [float(table["core_metric"][name]) for name in ("value", "low", "high", "n")] == [
        core["core_metric"],
        core["low"],
        core["high"],
        core["n"],
    ]
    for label, task in core["tasks"].items():
        assert [float(table[f"core/{label}"][name]) for name in ("value", "stderr", "n")] == [
            task["accuracy"],
            task["stderr"],
            n,
        ]
        assert float(table[f"centered_results/{label}"]["value"]) == task["centered"]


def test_core_answers_are_those_of_the_naive_evaluation(run, trained, bundle):
    found = measured(run, "--core", bundle, "--core-crop")["core"]
    expected = naive_core.evaluate(
        trained / "bundle", *nanochat.load(run, dtype="float32"), crop=True
    )
    assert {label: task["answers"] for label, task in found["tasks"].items()} == {
        label: [int(answer) for answer in task["answers"]] for label, task in expected.items()
    }
    assert found["limit"] == 32 and sum(task["cropped"] for task in found["tasks"].values()) > 100


def test_earlier_results_stay(run, bundle):
    for _ in range(3):
        assert evaluate(run, "--core", "--tasks=copa", bundle) == 0
        if len(os.listdir(run / "evaluations")) == 3:
            first = contents(run / "evaluations")
    assert sorted(os.listdir(run / "evaluations")) == sorted(
        f"step_000012{number}.{ending}"
        for number in ("", "_2", "_3")
        for ending in ("csv", "json", "md")
    )
    assert first.items() <= contents(run / "evaluations").items()
    # other flags may be behind the same name, so that none is replaced; --help says so
    words = " ".join(build_parser().format_help().split())
    assert "Earlier ones stay: after step_000500 comes step_000500_2" in words


def test_some_tasks_give_no_core_metric(run, bundle, capsys):
    report = measured(run, "--core", bundle, "--tasks=copa, boolq")
    core, shown = report["core"], capsys.readouterr().out
    assert (
        list(core["tasks"]) == ["copa", "boolq"]
        and core["core_metric"] is core["low"] is core["high"] is None
        and core["n"] == 12
    )
    for text in (shown, (run / "evaluations/step_000012.md").read_text()):
        assert "no CORE metric: 20 of 22 tasks were not evaluated" in text
    assert (run / "evaluations/step_000012.csv").read_text().splitlines()[1] == "core_metric,,,,,12"


def test_baselines(run, bundle, capsys):
    v1, v2 = (
        measured(run, "--core", bundle, f"--baselines={name}")["core"] for name in ("v1", "v2")
    )
    assert (v1["baselines"], v2["baselines"]) == (
        "v1",
        "v2",
    ) and "chance levels v2" in capsys.readouterr().out
    changed = {
        label: tuple(round(version["tasks"][label]["chance"], 3) for version in (v1, v2))
        for label in LABELS
        if v1["tasks"][label]["chance"] != v2["tasks"][label]["chance"]
    }
    assert changed == {
        "commonsense_qa": (0.2, 0.403),
        "agi_eval_lsat_ar": (0.2, 0.25),
        "bigbench_language_identification": (0.091, 0.25),
    }
    assert v1["core_metric"] > v2["core_metric"] and all(
        v1["tasks"][label]["correct"] == v2["tasks"][label]["correct"] for label in LABELS
    )


@pytest.mark.parametrize(
    "content, reason", [(None, "is missing"), ("{}\nnot JSON\n", "2 malformed lines")]
)
def test_a_task_that_cannot_be_evaluated(run, tmp_path, capsys, content, reason):
    bundle = small.core_bundle(tmp_path, n=2)
    path = bundle / "eval_data" / "commonsense_reasoning" / "piqa.jsonl"
    path.unlink()
    if content:
        path.write_text(content)
    core = measured(run, "--core", f"--core-bundle={bundle}", code=1)["core"]
    assert (
        core["core_metric"] is None
        and len(core["tasks"]) == 21
        and "1 of 22 tasks were not evaluated: piqa (" in core["reason"]
    )
    shown = capsys.readouterr().out
    assert (
        f"no CORE metric: {core['reason']}" in shown
        and reason in core["reason"]
        and "CORE: piqa cannot be evaluated" in shown
    )
    assert (
        evaluate(run, "--core", f"--core-bundle={bundle}", "--tasks=piqa") == 1
    )  # nothing is left
    assert (
        evaluate(run, "--core", f"--core-bundle={bundle}", "--tasks=copa") == 0
    )  # it was not asked for


def test_malformed_lines_are_counted(run, tmp_path):
    bundle = small.core_bundle(tmp_path)
    with open(bundle / "eval_data" / "commonsense_reasoning" / "piqa.jsonl", "a") as file:
        file.write('{"query": 3}\n')
    core = measured(run, "--core", f"--core-bundle={bundle}")["core"]
    assert (core["tasks"]["piqa"]["malformed"], core["tasks"]["piqa"]["n"]) == (1, 6) and core[
        "core_metric"
    ] is not None


# ---- bits per byte and samples of a run ----


@pytest.mark.parametrize("step", ["4", "8", "-1", "best"])
def test_bpb_is_that_of_training(run, capsys, step):
    checkpoint.mark_best(run, 8)
    number = {"-1": 12, "best": 8}.get(step) or int(step)
    assert evaluate(run, "--bpb", f"--step={step}") == 0
    report = report_of(run / "evaluations", f"step_{number:06d}")
    found, (line,) = (
        report["bpb"],
        [line for line in small.lines(run.parent) if line["step"] == number and "val/bpb" in line],
    )
    assert (
        report["step"] == number
        and abs(found["bpb"] - line["val/bpb"]) < 1e-6
        and abs(found["loss"] - line["val/loss"]) < 1e-6
    )
    assert (
        found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        and found["reason"] is None
        and found["tokens"] == found["bytes"]
    )
    shown = capsys.readouterr().out
    assert f"step {number}: cpu x 1, float32" in shown
    numbers = f"{found['bpb']:.4f}, loss {found['loss']:.4f} nats a token, perplexity "
    assert f"{numbers}{found['perplexity']:.2f} (" in shown
    assert f"({found['tokens']:,} tokens, {found['bytes']:,} bytes, " in shown
    rows = (run / "evaluations" / f"step_{number:06d}.csv").read_text().splitlines()
    assert rows[:2] == [
        "metric,value,stderr,low,high,n",
        f"bpb,{found['bpb']},,,,{found['tokens']}",
    ]


@pytest.mark.parametrize(
    "flags, n_tokens, text",
    [
        ([], None, TEXT),
        (["--eval-tokens=40", "--batch-tokens=1"], 40, TEXT),
        ([], None, "x"),
        (["--batch-tokens=100000"], None, TEXT * 3),
    ],
)
def test_bpb_of_a_file_is_of_all_of_it(run, tmp_path, flags, n_tokens, text):
    path = tmp_path / "other.txt"
    path.write_text(text)
    found = measured(run, "--bpb", f"--data={path}", *flags)["bpb"]
    documents = list(iterate_documents(path))
    if n_tokens:  # a byte is a token here
        documents = [
            documents[0],
            documents[1].encode()[: n_tokens - len(documents[0].encode())].decode(),
        ]
    model, tokenizer = nanochat.load(run, dtype="float32")
    bpb, tokens = direct_bpb(model, documents, tokenizer.encode, tokenizer.bos, 32)
    assert (
        found["bpb"] == pytest.approx(bpb, abs=1e-5)
        and found["tokens"] == found["bytes"] == tokens
        and found["data"] == str(path)
    )


def test_bpb_of_several_files(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
    assert measured(run, "--bpb", f"--data={tmp_path}/?.txt")["bpb"]["bytes"] == 100


def test_samples(run, capsys):
    report = measured(
        run, "--sample", "--prompt=1 squared", "--prompt=12 is", "--max-tokens=7", "--seed=3"
    )
    model, tokenizer = nanochat.load(run, dtype="float32")
    expected = [
        nanochat.generate(
            model, tokenizer, prompt, max_new_tokens=7, seed=3, temperature=0.8, top_k=50
        )
        for prompt in ("1 squared", "12 is")
    ]
    assert report["samples"] == [
        {"prompt": prompt, "text": text}
        for prompt, text in zip(("1 squared", "12 is"), expected, strict=True)
    ]
    shown, page = capsys.readouterr().out, (run / "evaluations/step_000012.md").read_text()
    assert (
        f"--- sample, prompt '12 is'\n12 is{expected[1]}\n" in shown
        and "Prompt '12 is':\n\n    12 is" in page
    )
    (sample,) = measured(run, "--sample", "--max-tokens=3", "--prompt=\udcff")[
        "samples"
    ]  # a byte that is no UTF-8, as a shell passes it
    assert sample["prompt"] == "?"
    assert measured(run, "--sample", "--max-tokens=3")["samples"][0]["prompt"] == ""


def test_json_is_all_that_is_printed(run, bundle, capsys, monkeypatch, tmp_path):
    open_corpus = measure.open_corpus

    def talkative(*args):
        args[-1]("data: trying again")
        return open_corpus(*args)

    monkeypatch.setattr(measure, "open_corpus", talkative)
    capsys.readouterr()
    assert (
        evaluate(
            run,
            run,
            "--core",
            bundle,
            "--bpb",
            "--sample",
            "--max-tokens=2",
            "--json",
            f"--out={tmp_path / 'out'}",
        )
        == 0
    )
    shown = capsys.readouterr()
    assert (
        json.loads(shown.out)
        == [report_of(tmp_path / "out", f"run_step_000012{number}") for number in ("", "_2")]
        and shown.err == ""
    )


def test_a_terminal_shows_how_far_core_is(run, bundle, capsys, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert evaluate(run, "--core", bundle) == 0
    assert (
        "CORE   0%" in terminal.getvalue()
        and "bigbench_language_identification | eta 0.0s" in terminal.getvalue()
    )
    assert "eta" not in capsys.readouterr().out
    shown = len(terminal.getvalue())
    assert evaluate(run, "--core", bundle, "--json") == 0 and len(terminal.getvalue()) == shown


# ---- several runs, several ranks ----


def test_a_run_against_itself_and_against_another(run, bundle, capsys, tmp_path):
    assert (
        small.run(tmp_path, "--seed=7", "--eval-every=-1", "--sample-every=-1", tag="another.v2")
        == 0
    )
    assert (
        evaluate(run, run, tmp_path / "another.v2", "--core", bundle, f"--out={tmp_path / 'out'}")
        == 0
    )
    shown = capsys.readouterr().out
    first, same, other = (
        report_of(tmp_path / "out", name)
        for name in ("run_step_000012", "run_step_000012_2", "another.v2_step_000012")
    )
    assert "difference" not in first
    assert same["difference"] == {
        "to": str(run),
        "core_metric": 0.0,
        "low": 0.0,
        "high": 0.0,
        "reason": None,
    }
    assert (
        f"difference in CORE to {run}: +0.0000, 95% interval +0.0000 to +0.0000, "
        f"paired by example: within the noise"
    ) in shown
    found, (low, high) = (
        other["difference"],
        interval(answers_of(other), answers_of(first)),
    )
    assert found["core_metric"] == other["core"]["core_metric"] - first["core"]["core_metric"] != 0
    assert (found["low"], found["high"]) == (low, high) and low < found["core_metric"] < high
    apart = [interval(answers_of(report)) for report in (first, other)]
    assert high - low < sum(
        b - a for a, b in apart
    )  # pairs vary less than two independent numbers may
    row = (tmp_path / "out" / "another.v2_step_000012.csv").read_text().splitlines()[-1]
    assert row == f"core_metric_difference,{found['core_metric']},,{low},{high},132"
    assert (
        evaluate(
            run,
            tmp_path / "another.v2",
            "--core",
            bundle,
            "--tasks=copa",
            f"--out={tmp_path / 'part'}",
        )
        == 0
    )
    assert (
        "difference in CORE to " + str(run) + ": none: one of the two has no CORE metric"
        in capsys.readouterr().out
    )


def core_result(metric, digit, fingerprint="f"):
    """A result whose answers to each of four examples a task are this digit."""
    task = TaskResult(
        accuracy=float(digit),
        centered=metric,
        stderr=0.0,
        n=4,
        chance=0.5,
        shots=0,
        examples=4,
        malformed=0,
        empty_spans=0,
        cropped=0,
        correct=digit * 4,
        answers=[0] * 4,
        file="",
        fingerprint=fingerprint,
        reason=None,
        seconds=0.0,
    )
    tasks = {label: replace(task, file=label) for label in LABELS}
    return CoreResult(metric, metric, metric, 88, None, 0.0, "v1", tasks)


def test_a_difference_that_is_not_noise():
    low = core_result(-1.0, "0")
    high = core_result(1.0, "1")
    found = difference(high, "r0", low)
    assert (found.to, found.core_metric, found.reason) == ("r0", 2.0, None)
    assert (found.low, found.high) == pytest.approx((2, 2))
    assert difference_sentence(found) == (
        "difference in CORE to r0: +2.0000, 95% interval +2.0000 to +2.0000, paired by example"
    )
    others = core_result(-1.0, "0", fingerprint="other")
    sentence = difference_sentence(difference(high, "r0", others))
    assert "(no interval: hellaswag_zeroshot: evaluated on other examples)" in sentence


def test_two_ranks_answer_as_one(run, bundle, text, tmp_path):
    argv = [str(run), "--core", bundle, "--bpb", text, "--sample", "--max-tokens=4", *FP32]
    assert main(["evaluate", *argv]) == 0
    done = small.ranks_of(tmp_path, 2, ["evaluate", *argv, f"--out={tmp_path / 'two'}"], RANKS)
    assert done.returncode == 0, done.stderr
    one, two = report_of(run / "evaluations"), report_of(tmp_path / "two", "run_step_000012")
    assert (one["ranks"], two["ranks"]) == (1, 2) and done.stderr.count("written: ") == 1
    for name in ("bpb", "loss", "perplexity"):
        two["bpb"][name] = pytest.approx(two["bpb"][name], rel=1e-6)
    assert timeless(one) == timeless(two)


# ---- what is refused ----


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["nothing to measure: add --core, --bpb or --sample"]),
        (
            [
                "--bpb",
                "--tasks=copa",
                "--max-per-task=3",
                "--core-bundle=x",
                "--baselines=v2",
                "--core-crop",
                "--core-chat",
                "--prompt=a",
                "--seed=1",
            ],
            [
                f"--{name}: belongs to --{part}; add that"
                for name, part in (
                    ("tasks", "core"),
                    ("max-per-task", "core"),
                    ("core-bundle", "core"),
                    ("baselines", "core"),
                    ("core-crop", "core"),
                    ("core-chat", "core"),
                    ("prompt", "sample"),
                    ("seed", "sample"),
                )
            ],
        ),
        (
            ["--sample", "--data=x", "--eval-tokens=3"],
            ["--data: belongs to --bpb", "--eval-tokens: belongs to --bpb"],
        ),
        (
            ["--core", "--tasks=copa,wrong"],
            ["--tasks=wrong: not among the CORE tasks, which are hellaswag_zeroshot, jeopardy"],
        ),
        (["--core", "--max-per-task=0"], ["--max-per-task=0: must be at least 1, or -1"]),
        (
            ["--bpb", "--eval-tokens=-2", "--batch-tokens=0", "--step=-2"],
            [
                "--eval-tokens=-2: must be",
                "--batch-tokens=0: must be",
                "--step=-2: must be the step of a checkpoint, best, or -1",
            ],
        ),
        (
            ["--sample", "--max-tokens=0", "--seed=-1"],
            ["--max-tokens=0: must be at least 1", "--seed=-1: must be"],
        ),
        (["--bpb", "--step=5"], ["--step=5: {run} has no such checkpoint (it has: 4, 6, 8, 12)"]),
        (["--bpb", "--data=/nowhere/*.txt"], ["--data=/nowhere/*.txt: no such file"]),
        (
            ["--core", "--core-bundle=/nowhere"],
            ["--core-bundle=/nowhere: no core.yaml in this folder"],
        ),
        (["--core", "--core-bundle={run}/config.json"], ["a file; unpack it"]),
        (
            ["--bpb", "--out={run}/config.json"],
            ["--out: {run}/config.json cannot be written ({run}/config.json is not a folder)"],
        ),
        (["--bpb", "--out={run}/config.json/x"], ["({run}/config.json is not a folder)"]),
    ],
)
def test_flags_that_cannot_be_used(run, capsys, flags, words):
    """All of them in one message, a line each; before anything is measured."""
    message = refused(capsys, run, run, *(flag.format(run=run) for flag in flags))
    for line, part in zip(message.splitlines(), words, strict=True):
        assert part.format(run=run) in line


def test_prompts_are_tried_before_anything_is_measured(run, capsys, monkeypatch):
    monkeypatch.setattr(measure, "measure_bpb", None)
    assert "this model has 320: shorten the prompt" in refused(
        capsys, run, run, "--bpb", "--sample", "--max-tokens=320"
    )


def test_choices_are_refused_by_the_parser(run, capsys):
    for flags in (
        ["--core", "--baselines=v3"],
        ["--bpb", "--step=newest"],
        ["--bpb", "--dtype=float16"],
        ["--bp"],
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate(run, *flags)
        assert stop.value.code == 2 and "nanochat evaluate: error: " in capsys.readouterr().err
    assert not (run / "evaluations").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such folder; name a run folder"),
        ("", "it has no config.json; name a run folder"),
        ("{", "cannot be read as JSON"),
        ("[1]", "its config.json is neither a run's nor a Hugging Face model's"),
        ('{"args": 3}', "is neither a run's"),
    ],
)
def test_folders_that_are_no_runs(run, tmp_path, capsys, content, words):
    """Found before the run that is named first is evaluated."""
    folder = tmp_path / "no_run"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / "config.json").write_text(content)
    message = refused(capsys, tmp_path, run, folder, "--bpb")
    assert message.startswith(f"{folder}: ") and words in message


def test_a_run_without_checkpoints(run, capsys):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused(capsys, run, run, "--bpb")


def test_results_that_cannot_be_written(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        access = os.access

        def no_access(path, mode, **options):
            return str(run) not in str(path) and access(path, mode, **options)

        patch.setattr(os, "access", no_access)
        assert f"({run} is read-only); name another folder with --out" in refused(
            capsys, run, run, "--bpb"
        )

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanochat.apps.evaluate.report.write_atomic", full)
    assert "cannot be written (No space left on device); name another" in refused(
        capsys, run, run, "--bpb", f"--out={tmp_path / 'out'}"
    )


def test_texts_that_cannot_be_measured(run, tmp_path, capsys):
    empty, other = tmp_path / "empty.txt", tmp_path / "other.txt"
    empty.write_text(" \n\n")
    other.write_text("changed " * 100)
    assert f"--data={empty}: holds no text" in refused(capsys, run, run, "--bpb", f"--data={empty}")
    config = read_json(run / "config.json", "")
    write_json(run / "config.json", {**config, "args": {**config["args"], "data": str(other)}})
    message = refused(capsys, run, run, "--bpb")
    assert "has changed since the run was started; name another with --data" in message
    del config["data"]  # as `nanochat export --format run` leaves it
    write_json(run / "config.json", config)
    assert "was imported and has no text of its own; name one with --data" in refused(
        capsys, run, run, "--bpb", "--sample"
    )
    assert measured(run, "--bpb", f"--data={other}")["bpb"]["bytes"] == 800


def test_weights_that_are_not_numbers(run, bundle, capsys, monkeypatch):
    load_run = loading.load_run

    def damaged(*args):
        model, tokenizer = load_run(*args)
        torch.nn.init.constant_(model.embedding.weight, math.nan)
        return model, tokenizer

    monkeypatch.setattr(loading, "load_run", damaged)
    found = measured(run, "--core", bundle, "--bpb", code=1)  # one failure leaves the rest
    assert (
        found["core"]["core_metric"] is None
        and "hellaswag_zeroshot: ValueError: the model's losses" in found["core"]["reason"]
    )
    assert "step 12: the model's logits are not numbers" in refused(capsys, run, run, "--sample")
    found = measured(run, "--bpb", code=1)["bpb"]
    assert (
        found["bpb"] is found["loss"] is found["perplexity"] is None
        and "nan nats" in found["reason"]
    )
    assert "bits per byte on " + found["data"] + ": none: nan nats" in capsys.readouterr().out


def test_help_is_light():
    code = (
        "import sys\nfrom nanochat.__main__ import main\ntry:\n    main(['evaluate', '--help'])\n"
        "finally:\n    assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Assertion" not in shown.stderr
    flags = [
        option
        for action in build_parser()._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    assert len(flags) == 21 and [flag for flag in flags if flag not in shown.stdout] == []


# ---- Hugging Face folders ----


def hf_tokenizer(byte_level=True, strips=False, **special):
    """A BPE tokenizer of a few merges. special: its BOS and EOS. strips: it strips texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: i for i, character in enumerate(gpt2_byte_characters())}
    merges = [("Ġ", "a"), ("a", "t"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
    tokenizer = Tokenizer(
        models.BPE(vocab | {a + b: 256 + i for i, (a, b) in enumerate(merges)}, merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    if strips:
        tokenizer.normalizer = normalizers.Strip()
    tokenizer.add_tokens(
        ["    ", "日本"]
    )  # as GPT-NeoX has: written as they are, not in the alphabet of bytes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """{"gpt2", "llama": (folder, model, tokenizer)}; weights so large that answers differ."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    torch.manual_seed(1)
    made, root = {}, tmp_path_factory.mktemp("hf")
    for name, special in (
        ("gpt2", {"eos_token": "<|endoftext|>"}),
        ("llama", {"eos_token": "</s>", "bos_token": "<s>"}),
    ):
        tokenizer = hf_tokenizer(**special)
        config = {
            "vocab_size": len(tokenizer) + 3,
            "bos_token_id": None,
            "eos_token_id": None,
            "initializer_range": 0.3,
        }
        if name == "gpt2":
            model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_positions=48, n_embd=16, n_layer=2, n_head=2, **config)
            )
        else:
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    max_position_embeddings=64,
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    **config,
                )
            )
        folder = root / f"{name}-v1.5"
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        made[name] = folder, model.eval(), tokenizer
    return made


def test_an_encoder_is_refused(hf, tmp_path, capsys):
    """transformers loads it as a language model; it would see what it is to predict."""
    transformers = pytest.importorskip("transformers")
    tokenizer = hf["llama"][2]
    transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            initializer_range=0.3,
        )
    ).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    assert main(["evaluate", str(tmp_path / "bert"), "--bpb", "--data=README.md"]) == 2
    assert "sees the tokens after a position" in capsys.readouterr().err


def changed(folder, to, **fields):
    """A copy of a folder with other fields in its config.json; returns its path."""
    shutil.copytree(folder, to)
    write_json(to / "config.json", read_json(to / "config.json", "") | fields)
    return to


@pytest.mark.parametrize(
    "name, context, bos", [("gpt2", 48, "<|endoftext|>"), ("llama", 64, "<s>")]
)
def test_hugging_face_models_against_plain_transformers(
    hf, trained, bundle, tmp_path, capsys, name, context, bos
):
    folder, model, tokenizer = hf[name]
    text = tmp_path / "text.txt"
    text.write_text(TEXT + "    a long line about the </s> at the <|endoftext|> " * 9)
    assert (
        evaluate(folder, "--core", bundle, "--bpb", f"--data={text}", f"--out={tmp_path / 'out'}")
        == 0
    )
    shown = capsys.readouterr()
    assert shown.err == "" and sorted(os.listdir(tmp_path / "out")) == [
        f"{name}-v1.5.{ending}" for ending in ("csv", "json", "md")
    ]
    report = report_of(tmp_path / "out", f"{name}-v1.5")
    plain = tokenizer.backend_tokenizer
    plain.encode_special_tokens = True  # in a text they are text

    def logits_of(ids):
        assert ids.shape[1] <= context
        return model(ids).logits

    logits_of.config = SimpleNamespace(max_seq_len=context)
    stand_in = SimpleNamespace(
        bos=tokenizer.convert_tokens_to_ids(bos),
        encode=lambda text: plain.encode(text, add_special_tokens=False).ids,
    )
    expected = naive_core.evaluate(trained / "bundle", logits_of, stand_in, crop=True)
    tasks = report["core"]["tasks"]
    assert {label: task["answers"] for label, task in tasks.items()} == {
        label: [int(answer) for answer in task["answers"]] for label, task in expected.items()
    }
    assert (
        len({answer for task in tasks.values() for answer in task["answers"]}) == 4
    )  # not the same answer to everything
    assert (
        report["core"]["limit"] == context
        and tasks["hellaswag"]["cropped"] == 6
        and 0 < tasks["copa"]["cropped"] < 6
    )
    bpb, n_tokens = direct_bpb(
        logits_of, list(iterate_documents(text)), stand_in.encode, stand_in.bos, context
    )
    assert (
        report["bpb"]["bpb"] == pytest.approx(bpb, abs=1e-6) and report["bpb"]["tokens"] == n_tokens
    )
    assert report["step"] is None and report["bpb"]["bytes"] == sum(
        len(document.encode()) for document in list(iterate_documents(text))
    )
    again = [
        f"--data={text}",
        "--bpb",
        "--core",
        "--tasks=copa,winograd,coqa",
        bundle,
        f"--out={tmp_path / 'again'}",
        "--batch-tokens=1",
    ]
    assert evaluate(folder, *again, "--eval-tokens=70") == 0  # each alone
    found = report_of(tmp_path / "again", f"{name}-v1.5")
    assert found["bpb"]["tokens"] == 70
    assert all(
        task["answers"] == tasks[label]["answers"] for label, task in found["core"]["tasks"].items()
    )


def test_a_run_and_its_export_are_one_model(hf, bundle, tmp_path):
    """The two ways to a model give the same answers and bits per byte."""
    from nanochat.apps import export

    tokenizer = train_tokenizer("bpe", [TEXT, "Question 1 of the cat and so on and so on"], 300)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        depth=2,
        width=16,
        head_dim=8,
        n_head=2,
        n_kv_head=1,
        max_seq_len=32,
        arch="llama",
        window_pattern="L",
    )
    model, run = build(config, "cpu", seed=1), tmp_path / "run"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    run.mkdir()
    RunFolder(run).write_config({"args": {"depth": 2}, "model": asdict(config)})
    tokenizer.save(run / "tokenizer")
    checkpoint.save(run, 7, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    assert export.main([str(run), "--format", "hf", str(tmp_path / "hf")]) == 0
    (tmp_path / "text.txt").write_text(TEXT * 3)
    assert (
        evaluate(
            run,
            tmp_path / "hf",
            "--core",
            bundle,
            "--core-crop",
            "--bpb",
            f"--data={tmp_path / 'text.txt'}",
            f"--out={tmp_path / 'out'}",
        )
        == 0
    )
    ours, theirs = report_of(tmp_path / "out", "run_step_000007"), report_of(tmp_path / "out", "hf")
    assert (
        theirs["difference"]["low"] == theirs["difference"]["high"] == 0
        and theirs["core"]["limit"] == 32
    )
    assert {label: task["answers"] for label, task in ours["core"]["tasks"].items()} == {
        label: task["answers"] for label, task in theirs["core"]["tasks"].items()
    }
    assert theirs["bpb"]["bpb"] == pytest.approx(ours["bpb"]["bpb"], abs=1e-5)
    assert [ours["bpb"][name] for name in ("tokens", "bytes")] == [
        theirs["bpb"][name] for name in ("tokens", "bytes")
    ]


@pytest.mark.parametrize("model_type, code", [("of_its_own", 2), ("llama", 0)])
def test_no_code_of_a_folder_runs(hf, text, tmp_path, capsys, monkeypatch, model_type, code):
    """An unknown type of model is refused; a known one is transformers' own."""
    folder = changed(
        hf["llama"][0],
        tmp_path / "hf",
        model_type=model_type,
        auto_map={
            "AutoConfig": "modeling_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
    )
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'evil')!r}, 'w')\n")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    if code:
        assert "code from the folder is never run" in refused(
            capsys, tmp_path, folder, "--bpb", text
        )
    else:
        assert evaluate(folder, "--bpb", text) == 0
    assert not (tmp_path / "evil").exists() and not (tmp_path / "modules").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "cannot load it (Error no file named model.safetensors",
        ),
        (
            lambda folder: torch.save(
                {}, (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
            ),
            "only weights in safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04."),
            "cannot load it",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load it"),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("model.norm.weight")),
            "do not fit its config.json: missing, or of another shape, are model.norm",
        ),
        (
            lambda folder: change_weights(
                folder, lambda weights: weights.update({"model.norm.weight": torch.ones(9)})
            ),
            "do not fit its config.json: missing, or of another shape, are model.norm.weight",
        ),
        (
            lambda folder: write_json(folder / "config.json", {"model_type": ["llama"]}),
            "has no model of type ['llama']",
        ),
        (
            lambda folder: write_json(folder / "config.json", {"model_type": "t5"}),
            "cannot load it",
        ),
    ],
)
def test_folders_that_transformers_cannot_load(hf, text, tmp_path, capsys, change, words):
    folder = shutil.copytree(hf["llama"][0], tmp_path / "hf")
    change(folder)
    message = refused(capsys, tmp_path, folder, "--bpb", text)
    assert message.startswith(f"{folder}: ") and words in message and len(message.splitlines()) == 1


def change_weights(folder, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_flags_that_no_hugging_face_folder_has(hf, run, capsys):
    folder = hf["gpt2"][0]
    message = refused(capsys, run, run, folder, "--bpb", "--sample", "--step=4", kept=[folder])
    assert message.splitlines() == [
        f"--step=4: {folder} is a Hugging Face folder and has no steps; omit the flag",
        f"--sample: {folder} is a Hugging Face folder, which cannot be sampled from; "
        f"`nanochat export` turns a Llama into a run",
        f"--bpb: {folder} is a Hugging Face folder and has no text of its own; "
        f"name one with --data",
    ]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"eos_token": "</s>", "strips": True},
            "encodes 8 of a document's 10 bytes; bits per byte need a tokenizer that keeps text",
        ),
        (
            {"eos_token": "</s>", "byte_level": False},
            "need a byte-level tokenizer, such as GPT-2's; the tokens of this one are not strings",
        ),
        ({}, "its tokenizer has neither a BOS nor an end-of-text token"),
    ],
)
def test_tokenizers_without_bits_per_byte(hf, tmp_path, capsys, options, words):
    folder = shutil.copytree(hf["llama"][0], tmp_path / "hf")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    hf_tokenizer(**options).save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" At home. ")
    assert words in refused(capsys, tmp_path, folder, "--bpb", f"--data={tmp_path / 'text.txt'}")


def test_a_text_without_text(hf, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n")
    assert "holds no text" in refused(
        capsys, hf["gpt2"][0], hf["gpt2"][0], "--bpb", f"--data={tmp_path / 'text.txt'}"
    )


def test_bytes_of_tokens(hf):
    from nanochat.eval.hf_model import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer("folder", hf["llama"][2])
    counts, (ids,) = tokenizer.byte_counts(), tokenizer.encode_batch([TEXT + "    \u0120 </s>"])
    assert counts.dtype == np.int64 and counts[ids].sum() == len(
        (TEXT + "    \u0120 </s>").encode()
    )
    assert [
        counts[tokenizer.tokenizer.convert_tokens_to_ids(token)]
        for token in ("<s>", "</s>", "Ġthe", "日本", "Ċ")
    ] == [0, 0, 4, 6, 1]
    assert tokenizer.encode_batch([]) == []


def test_the_dtype_is_that_of_the_model(hf, text, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        argv = [
            str(hf["gpt2"][0]),
            "--bpb",
            text,
            f"--out={tmp_path / dtype}",
            "--device-type=cpu",
            f"--dtype={dtype}",
        ]
        assert main(["evaluate", *argv]) == 0
        report = report_of(tmp_path / dtype, "gpt2-v1.5")
        assert report["dtype"] == dtype
        found[dtype] = report["bpb"]["bpb"]
    assert found["bfloat16"] != found["float32"] and found["bfloat16"] == pytest.approx(
        found["float32"], rel=0.01
    )


def test_a_long_context_does_not_make_a_long_pass():
    """The logits of 100,000 tokens fit nowhere; a pass may hold less than a context."""
    assert default_batch_tokens(True, 131072, "cpu") == 1024
    assert default_batch_tokens(False, 131072, "cpu") == 131072
