"""runs/sft.sh and runs/dpo.sh at toy size: the real commands in their order."""

import json
import os
import subprocess
import sys

import pytest
import small


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, numbers",
    [
        ("sft", ["before_max", "after_min", "after_mean"]),
        ("dpo", ["accuracy_min", "accuracy_mean", "bpb_lost_max", "kl_max"]),
    ],
)
def test_at_toy_size(tmp_path, name, numbers):
    """A second start finds the run complete, and says the same."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i} and {i + 1} make {2 * i + 1}," for i in range(3000)))
    variables = {
        "TOY": "1",
        "SEEDS": "1",
        "DATA": str(text),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    results = []
    for _ in range(2):
        done = subprocess.run(
            ["bash", small.ROOT / "runs" / f"{name}.sh"],
            env=os.environ | small.environment() | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results.append(done.stdout.splitlines()[-1])
    assert results[0] == results[1]
    assert f"{name}42 is complete" in done.stdout
    words = dict(word.split("=") for word in results[0].removeprefix("RESULT ").split())
    assert list(words) == ["runs", *numbers] and words.pop("runs") == "1"
    assert all(-1 < float(value) < 1.01 for value in words.values())


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_number_of_seeds_that_is_none(name):
    done = subprocess.run(
        ["bash", small.ROOT / "runs" / f"{name}.sh"],
        env=os.environ | {"PYTHON": sys.executable, "SEEDS": "no"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "SEEDS=no: give how many seeds" in done.stderr


@pytest.mark.parametrize(
    "name, metrics",
    [
        ("sft", ["exercises/copy"]),
        ("dpo", ["val/reward_accuracy", "base/bpb", "val/kl"]),
    ],
)
def test_a_metric_that_is_null(tmp_path, name, metrics):
    """It is named, and no result is made of the others: here of runs that are complete."""
    run = tmp_path / f"{name}42"
    run.mkdir()
    for missing in metrics:
        lines = [
            {"step": step}
            | {metric: None if metric == missing and step else 0.5 for metric in metrics}
            for step in (0, 9)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = subprocess.run(
            ["bash", small.ROOT / "runs" / f"{name}.sh"],
            env=os.environ
            | {"PYTHON": "true", "SEEDS": "1", "TASKS": "copy", "OUT": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "RESULT" not in done.stdout
        assert f"{name}.sh: error: {missing} of {run} (last) is null" in done.stderr
