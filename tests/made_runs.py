"""Run folders as training leaves them, made up: curves, CORE results, damages."""

import json
import math
import random
from dataclasses import fields
from pathlib import Path

from nanochat.run.folder import RunFolder, write_summary
from nanochat.run.records import RunRecord
from tasks.core import LABELS


def made_tasks(seed=0, n=50, skill=0.4, file=""):
    """{label: entry} of a CORE result: answers that are right with probability `skill`.

    They are drawn for each task by `seed`; `file` makes the examples different ones."""
    tasks = {}
    for i, label in enumerate(LABELS):
        rng = random.Random(f"{seed} {label}")
        correct = "".join(str(int(rng.random() < skill)) for _ in range(n))
        accuracy, chance = correct.count("1") / n, (0, 0.25, 0.5)[i % 3]
        tasks[label] = {
            "accuracy": accuracy,
            "centered": (accuracy - chance) / (1 - chance),
            "n": n,
            "chance": chance,
            "stderr": math.sqrt(accuracy * (1 - accuracy) / (n - 1)),
            "correct": correct,
            "file": f"{label}.jsonl",
            "fingerprint": f"{label}{n}{file}",
        }
    return tasks


def make(
    folder,
    name,
    depth=4,
    seed=42,
    steps=200,
    bpb=1.5,
    core=None,
    status="completed",
    pace=1.0,
    **changes,
):
    """A run folder with falling curves.

    bpb: of the last evaluation. core: {label: entry} for core.jsonl. pace: seconds a step, in
    units of the default. changes: flags, or with a dot in the name entries of config.json, such
    as {"data.fingerprint": "x"}."""
    path = Path(folder) / name
    path.mkdir(parents=True)
    config = {
        "args": {
            "depth": depth,
            "seed": seed,
            "run": "dummy",
            "model_tag": name,
            "out_dir": str(folder),
            "eval_tokens": 1000,
            "target_minutes": -1,
            "core_metric_max_per_task": 50,
            "matrix_lr": 0.02,
        },
        "plan": {"parameters": {"total": 100_000 * depth**2}, "num_iterations": steps},
        "seed": seed,
        "git_commit": "c0ffee",
        "data": {"name": "text", "fingerprint": "dd", "compressed_bpb": {"gzip -9": 2.5}},
        "tokenizer": {"kind": "bpe", "vocab_size": 512, "fingerprint": "tt"},
        "runtime": {"dtype": "torch.float32"},
        "versions": {"torch": "2"},
        "hardware": {"device_type": "cpu"},
    }
    for key, value in changes.items():
        part, _, entry = key.rpartition(".")
        config[part or "args"][entry] = value
    RunFolder(path).write_config(config)
    noise, tokens, flops = random.Random(f"{name} {seed}"), 1000, 6.0 * 100_000 * depth**2 * 1000
    lines, seconds = [], 0.0
    for step in range(steps + 1):
        at = {
            "step": step,
            "tokens": step * tokens,
            "total_training_flops": step * flops,
            "total_training_time": seconds,
        }
        falling = 5 * math.exp(-8 * step / max(1, steps))
        if step and step % max(1, steps // 8) == 0:
            last = step + steps // 8 > steps
            lines.append(
                {**at, "val/bpb": bpb + (0 if last else 0.4 * math.exp(-3 * step / steps))}
            )
        if step < steps:
            lines.append(
                {
                    **at,
                    "train/loss": 2 * bpb + falling + noise.gauss(0, 0.1),
                    "train/lr": 0.02 * (1 - step / steps),
                    "train/grad_norm": 1 + noise.random(),
                    "train/tok_per_sec": 1000 / (0.01 * depth),
                    "train/mfu": 40.0,
                }
            )
            seconds += 0.01 * depth * pace
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if core:
        (path / "core.jsonl").write_text(
            "".join(
                json.dumps({"step": steps, "label": label, "baselines": "v1", **task}) + "\n"
                for label, task in core.items()
            )
        )
    write_summary(
        path,
        status=status,
        reason="",
        step=steps,
        tokens=steps * tokens,
        total_training_flops=steps * flops,
        total_training_time=seconds,
        val_bpb=bpb,
        min_val_bpb=bpb,
        core_metric=None,
        core_metric_n=None,
        tok_per_sec=5000.0,
        mfu=40.0,
        peak_memory_bytes=10**9,
    )
    return path


def record(**values):
    """A RunRecord of these values, without any others."""
    blank = {field.name: None for field in fields(RunRecord)}
    empty = {"name": "run", "path": "run", "config": {}, "lines": [], "problems": []}
    return RunRecord(**blank | empty | values)


# contents of files that no run writes, by file
DAMAGES = {
    "config.json": [
        "",
        "{",
        "[]",
        "{}",
        '{"model_type": "gpt2"}',
        '{"format": 99, "args": {}}',
        '{"format": 1, "args": 3}',
        '{"format": 1, "args": {}}',
        '{"format": 1, "args": {"depth": "x", "seed": []}, "plan": 7, "data": [], '
        '"tokenizer": "t"}',
        '{"format": 1, "args": {"depth": NaN, "seed": 1e999}, '
        '"plan": {"parameters": {"total": {}}}, "model": []}',
        "[" * 100_000,
    ],
    "summary.json": [
        "",
        "[1]",
        "{}",
        '{"status": 5, "val_bpb": "x", "tokens": NaN, "step": []}',
        '{"status": "completed", "val_bpb": NaN}',
        "\0\1",
    ],
    "metrics.jsonl": [
        "",
        "[1]\nnull\n{}\n",
        '{"step": 1, "train/loss": "x", "val/bpb": {}, "tokens": []}\n'
        '{"step": 2, "train/loss": NaN}\n',
        '{"step": 0, "train/loss": 1e300, "total_training_flops": -1}\n'
        '{"step": -5, "train/loss": -1e300, "val/bpb": 0}\n{"st',
    ],
    "core.jsonl": [
        "{",
        '{"step": 1}\n',
        '{"step": 1, "label": {}, "accuracy": 1, "centered": 1, "chance": 1, "n": 1}\n',
        "".join(
            json.dumps(
                {
                    "step": 1,
                    "label": label,
                    "accuracy": 0.5,
                    "centered": 0.5,
                    "chance": 0,
                    "n": 2,
                    "correct": 5,
                    "fingerprint": [],
                    "stderr": "x",
                }
            )
            + "\n"
            for label in LABELS
        ),
    ],
    "evaluations/step_000001.json": [
        "",
        "[]",
        "{}",
        '{"core": {"tasks": []}, "step": "x"}',
        '{"core": {}, "bpb": {"bpb": "x"}, "samples": [3]}',
    ],
    "samples.jsonl": [
        "",
        '{"step": 1, "text": 5}\n{"step": 2, "text": null, "prompt": 3}\n'
        '{"step": 3, "text": "t", "prompt": []}\n',
    ],
}
