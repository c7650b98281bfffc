"""nanochat compare: numbers by hand, groups of seeds, what is noise and what is not, warnings, damaged runs, pictures."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nanochat.__main__ import main as nanochat
from nanochat.apps import compare
from nanochat.common import UsageError, write_json
from nanochat.run import plots
from nanochat.run.log import RunFolder, write_summary
from tasks.core import LABELS, interval

ROOT = Path(__file__).resolve().parent.parent


def made_tasks(seed=0, n=50, skill=0.4, file=""):
    """{label: entry} of a made-up CORE result: answers that are right with probability `skill`, drawn per task by `seed`."""
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
    """A run folder with falling curves. bpb: of the last evaluation; core: {label: entry} for core.jsonl; pace: of its time.

    changes: flags, or with a dot in the name entries of config.json such as {"data.fingerprint": "x"}."""
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


def compared(capsys, *arguments, code=0):
    """What --json says without pictures."""
    assert compare.main([*map(str, arguments), "--json", "--no-plots"]) == code
    return json.loads(capsys.readouterr().out)


def shown(capsys, *arguments):
    """What is printed without pictures."""
    assert compare.main([*map(str, arguments), "--no-plots"]) == 0
    return capsys.readouterr().out


# ---- numbers ----


def test_student_quantiles():
    """Closed forms for 1, 2 and 4 degrees of freedom; the normal distribution's for very many."""
    for p in (0.6, 0.9, 0.975, 0.995):
        assert compare.student_quantile(p, 1) == pytest.approx(
            math.tan(math.pi * (p - 0.5)), rel=1e-6
        )
        assert compare.student_quantile(p, 2) == pytest.approx(
            (2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-6
        )
        x = math.cos(math.acos(2 * math.sqrt(p * (1 - p))) / 3) / (2 * math.sqrt(p * (1 - p)))
        assert compare.student_quantile(p, 4) == pytest.approx(2 * math.sqrt(x - 1), rel=1e-6)
    assert compare.student_quantile(0.975, 1e5) == pytest.approx(
        1.959964 * (1 + (1.959964**2 + 1) / 4e5), rel=1e-5
    )
    assert compare.student_quantile(0.975, 2.5) == pytest.approx(
        3.5582, abs=0.02
    )  # between 4.3027 and 3.1824


def test_welch_by_hand():
    """Variances 4e-4 and 1e-4 of three each: s^2 = 5e-4 / 3, df = 25 / (16 / 2 + 1 / 2) = 50 / 17."""
    found = compare.welch([1.50, 1.52, 1.54], [1.40, 1.41, 1.42])
    assert found["difference"] == pytest.approx(-0.11) and found["df"] == pytest.approx(50 / 17)
    reach = (found["high"] - found["low"]) / 2
    assert (found["high"] + found["low"]) / 2 == pytest.approx(-0.11)
    t, df = (
        reach / math.sqrt(5e-4 / 3),
        50 / 17,
    )  # the density of Student's t, summed: 95% of it lies within the interval
    at = np.linspace(-t, t, 200_001)
    density = (
        math.gamma((df + 1) / 2)
        / math.sqrt(df * math.pi)
        / math.gamma(df / 2)
        * (1 + at**2 / df) ** (-(df + 1) / 2)
    )
    assert float(density[:-1].sum() * (at[1] - at[0])) == pytest.approx(0.95, abs=1e-5)
    assert compare.welch([1.0, 1.0], [2.0, 2.0]) == {
        "difference": 1.0,
        "low": 1.0,
        "high": 1.0,
        "df": None,
    }


def test_the_table(tmp_path, capsys):
    make(tmp_path, "d4", core=(core := made_tasks(1)))
    make(tmp_path, "d12", depth=12, bpb=1.2345)
    lines = shown(capsys, tmp_path / "d4", tmp_path / "d12").splitlines()
    low, high = interval(core)
    metric = sum(task["centered"] for task in core.values()) / 22
    assert (
        lines[0].split()
        == "run depth params tokens FLOPs time val_bpb CORE 95% interval n status".split()
    )
    assert lines[1].split() == [
        "d4",
        "4",
        "1.6M",
        "200k",
        "1.92e+12",
        "8.0s",
        "1.5000",
        f"{metric:.4f}",
        f"{low:.4f}",
        "to",
        f"{high:.4f}",
        "1,100",
        "completed",
    ]
    assert lines[2].split() == "d12 12 14.4M 200k 1.73e+13 24.0s 1.2345 - - - completed".split()
    assert len(lines[0]) == len(lines[1]) == len(lines[2])


# ---- groups of seeds ----


def test_seeds_are_a_group(tmp_path, capsys):
    values = {1: 1.50, 2: 1.52, 5: 1.54}
    for seed, bpb in values.items():
        make(
            tmp_path,
            f"d4_s{seed}",
            seed=seed,
            bpb=bpb,
            run=f"r{seed}",
            eval_every=seed,
            core=made_tasks(seed),
        )
    make(tmp_path, "d4_other_rate", seed=3, matrix_lr=0.03)
    found = compared(capsys, *sorted(tmp_path.iterdir()))
    assert [group["name"] for group in found["groups"]] == ["d4_other_rate", "d4 (seeds 1, 2, 5)"]
    group = found["groups"][1]
    assert group["n"] == 3 and group["val_bpb"] == {
        "n": 3,
        "mean": pytest.approx(1.52),
        "sd": pytest.approx(0.02),
    }
    cores = [sum(task["centered"] for task in made_tasks(seed).values()) / 22 for seed in values]
    assert group["core_metric"] == {
        "n": 3,
        "mean": pytest.approx(np.mean(cores)),
        "sd": pytest.approx(np.std(cores, ddof=1)),
    }
    text = shown(capsys, *sorted(tmp_path.iterdir()))
    assert "= d4 (seeds 1, 2, 5)" in text and "1.5200 ± 0.0200" in text


@pytest.mark.parametrize(
    "change, together",
    [
        (
            {
                "out_dir": "elsewhere",
                "device_batch_size": 3,
                "save_every": 9,
                "hardware.device_type": "cuda",
            },
            True,
        ),
        ({"data": "moved"}, True),
        ({"depth": 4.0}, False),
        ({"eval_tokens": 5}, False),
        ({"dropout": 0.1}, False),
        ({"patience": 3}, False),
        ({"data.fingerprint": "other"}, False),
        ({"tokenizer.fingerprint": "other"}, False),
        ({"runtime.dtype": "torch.bfloat16"}, False),
        ({"plan.num_iterations": 201}, False),
    ],
)
def test_what_a_seed_may_come_with(tmp_path, capsys, change, together):
    make(tmp_path, "a", seed=1)
    make(tmp_path, "b", seed=2, **change)
    assert len(compared(capsys, tmp_path / "a", tmp_path / "b")["groups"]) == (1 if together else 2)


def test_bookkeeping_is_what_resuming_may_change():
    from nanochat.run.resume import FREE_ON_RESUME

    decide = {"eval_tokens", "stop_at_bpb", "patience"}  # what is measured, and when a run ends
    assert compare.BOOKKEEPING == FREE_ON_RESUME - decide | {"seed", "tokenizer", "init_from"}


def edit(path, **entries):
    """Change entries of a run's config.json."""
    write_json(path / "config.json", json.loads((path / "config.json").read_text()) | entries)


def test_code_and_repeated_seeds_are_told_apart(tmp_path, capsys):
    for name, seed in (("a1", 1), ("a2", 2), ("b1", 1), ("b2", 2)):
        make(tmp_path, name, seed=seed)
    for name in ("b1", "b2"):
        edit(tmp_path / name, git_commit="0ddba11")
    found = compared(capsys, *sorted(tmp_path.iterdir()))
    assert [group["name"] for group in found["groups"]] == ["a (seeds 1, 2)", "b (seeds 1, 2)"]
    assert any("code of different commits (0ddba11, c0ffee)" in line for line in found["warnings"])
    for name in ("b1", "b2"):
        edit(tmp_path / name, git_commit="c0ffee")
    found = compared(capsys, *sorted(tmp_path.iterdir()))
    assert [group["runs"] for group in found["groups"]] == [["a1", "a2"], ["b1"], ["b2"]]
    assert sum("it stands alone" in line for line in found["warnings"]) == 2


def test_a_timed_run_is_one_configuration_whatever_it_came_to(tmp_path, capsys):
    make(tmp_path, "a", seed=1, steps=100, target_minutes=5)
    make(tmp_path, "b", seed=2, steps=110, target_minutes=5)
    assert len(compared(capsys, tmp_path / "a", tmp_path / "b")["groups"]) == 1


def test_what_is_not_complete_is_left_out_of_the_mean(tmp_path, capsys):
    for seed in (1, 2, 3):
        make(
            tmp_path,
            f"s{seed}",
            seed=seed,
            bpb=1.5 + seed / 100,
            status="stopped" if seed == 3 else "completed",
        )
    make(tmp_path, "died", depth=2, status="running")
    found = compared(capsys, *sorted(tmp_path.iterdir()))
    group = next(group for group in found["groups"] if len(group["runs"]) == 3)
    assert group["val_bpb"]["mean"] == pytest.approx(1.515) and group["n"] == 2
    text = "\n".join(found["warnings"])
    assert (
        "s3 is not completed: stopped" in text
        and "died is not completed: died" in text
        and "its mean leaves out s3" in text
    )


# ---- noise ----


def test_core_is_paired_by_example(tmp_path, capsys):
    a, b = made_tasks(1, 200, 0.4), made_tasks(2, 200, 0.4)
    better = {
        label: {**task, "correct": "1" * 10 + task["correct"][10:]} for label, task in a.items()
    }
    for task in better.values():
        task["accuracy"] = task["correct"].count("1") / task["n"]
        task["centered"] = (task["accuracy"] - task["chance"]) / (1 - task["chance"])
    for i, (name, core) in enumerate(
        (
            ("a", a),
            ("b", b),
            ("better", better),
            ("unlike", made_tasks(1, 200, file="x")),
            ("none", None),
        )
    ):
        make(tmp_path, name, depth=2 + i, core=core)
    found = compared(capsys, *(tmp_path / name for name in ("a", "b", "better", "unlike", "none")))
    entries = {(entry["from"], entry["to"]): entry for entry in found["differences"]["core"]}
    assert len(entries) == 6
    low, high = interval(b, a, 1 - 0.05 / 6)  # six pairs
    assert (entries["a", "b"]["low"], entries["a", "b"]["high"]) == (low, high) and low < 0 < high
    expected = sum(better[label]["centered"] - a[label]["centered"] for label in LABELS) / 22
    assert (
        entries["a", "better"]["difference"] == pytest.approx(expected)
        and entries["a", "better"]["low"] > 0
    )
    assert (
        entries["a", "unlike"]["low"] is None
        and "other examples" in entries["a", "unlike"]["reason"]
    )
    text = shown(capsys, *(tmp_path / name for name in ("a", "b", "better", "unlike", "none")))
    assert "with intervals of 99.17%, which hold together in 95%" in text
    assert (
        f"b - a: {entries['a', 'b']['difference']:+.4f}, {low:+.4f} to {high:+.4f}: within the noise of the examples"
        in text
    )
    assert "better - a:" in text and "more than the noise of the examples" in text
    assert (
        "warning: examples of CORE differs: 4,400 in 22 tasks" in text
        and "they are as many" in text
    )


def test_one_seed_is_no_claim(tmp_path, capsys):
    make(tmp_path, "a", depth=2, bpb=1.9)
    make(tmp_path, "b", depth=4, bpb=1.1)
    text = shown(capsys, tmp_path / "a", tmp_path / "b")
    assert "b - a: -0.8000, no interval: one seed each: no noise known" in text
    assert (
        "more than" not in text
        and "within" not in text
        and "hint" not in text
        and "Welch" not in text
    )


def test_seeds_on_both_sides_and_a_hint(tmp_path, capsys):
    for seed, (muon, adamw) in {1: (1.40, 1.50), 2: (1.41, 1.52), 3: (1.42, 1.54)}.items():
        make(tmp_path, f"muon_s{seed}", seed=seed, bpb=muon)
        make(tmp_path, f"adamw_s{seed}", seed=seed, bpb=adamw, optimizer="adamw")
    make(tmp_path, "single", depth=6, bpb=1.3)
    folders = sorted(tmp_path.iterdir())
    entries = {
        (entry["from"], entry["to"]): entry
        for entry in compared(capsys, *folders)["differences"]["val_bpb"]
    }
    entry = entries["adamw (seeds 1, 2, 3)", "muon (seeds 1, 2, 3)"]
    expected = compare.welch([1.50, 1.52, 1.54], [1.40, 1.41, 1.42])
    assert all(entry[name] == pytest.approx(expected[name]) for name in expected) and entry[
        "n"
    ] == [3, 3]
    text = shown(capsys, *folders)
    assert (
        "(n = 3 and 3 seeds, 2.9 degrees of freedom): more than the noise of the seeds" in text
        and "Welch's t-test" in text
    )
    assert (
        "single - muon (seeds 1, 2, 3): -0.1100, no interval: one seed of single: its noise is not known"
        in text
    )
    reach = (
        math.sqrt(2) * 0.01 * 4.302653
    )  # of the two seeds' difference; the quantile for 2 degrees of freedom
    assert (
        f"hint: by the spread of muon (seeds 1, 2, 3), two single runs differ by up to {reach:.4f} by chance alone"
        in text
    )


def test_many_pairs_are_shown_against_the_best(tmp_path, capsys):
    for i in range(10):
        make(tmp_path, f"r{i}", depth=2 + i, steps=20, bpb=1.5 + abs(i - 7) / 10)
    lines = [
        line
        for line in shown(capsys, *sorted(tmp_path.iterdir())).splitlines()
        if "no interval" in line
    ]
    assert len(lines) == 9 and all("r7" in line for line in lines)
    assert len(compared(capsys, *sorted(tmp_path.iterdir()))["differences"]["val_bpb"]) == 45


@pytest.mark.parametrize(
    "change, says, comparable",
    [
        ({"data.fingerprint": "other"}, "text differs: text dd (a); text other (b)", True),
        (
            {"data.fingerprint": "other", "data.compressed_bpb": {"gzip -9": 2.25}},
            "held-out text (as compressed) differs: gzip -9 2.5 (a); gzip -9 2.25 (b)",
            False,
        ),
        (
            {"tokenizer.fingerprint": "other"},
            "tokenizer differs: bpe 512 tt (a); bpe 512 other (b)",
            True,
        ),
        ({"eval_tokens": 77}, "--eval-tokens differs: 1000 (a); 77 (b)", False),
        ({}, "", True),
    ],
)
def test_what_differs_is_named(tmp_path, capsys, change, says, comparable):
    make(tmp_path, "a", depth=2)
    make(tmp_path, "b", **change)
    found = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert (
        any(line.startswith(says) for line in found["warnings"])
        if says
        else found["warnings"] == []
    )
    assert (found["differences"]["val_bpb"][0]["difference"] is not None) == comparable


def test_evaluation_sets_that_differ_are_named(tmp_path, capsys):
    make(tmp_path, "a", depth=2, core=made_tasks(1, 20), core_metric_max_per_task=20)
    make(tmp_path, "b", core=made_tasks(1, 50))
    lines = (tmp_path / "b" / "core.jsonl").read_text().replace('"v1"', '"v2"')
    (tmp_path / "b" / "core.jsonl").write_text(lines)
    text = "\n".join(compared(capsys, tmp_path / "a", tmp_path / "b")["warnings"])
    assert (
        "examples of CORE differs: 440 in 22 tasks (core.jsonl, step 200) (a); 1,100 in 22" in text
        and "cannot be paired" in text
    )
    assert (
        "--max-per-task of CORE differs: 20 (a); 50 (b)" in text
        and "chance levels of CORE differs: v1 (a); v2 (b)" in text
    )


# ---- where CORE is from ----


def test_the_newest_of_core_jsonl_or_an_evaluation(tmp_path, capsys):
    path = make(tmp_path, "a", core=made_tasks(1))
    old = "".join(
        json.dumps({"step": 100, "label": label, **task}) + "\n"
        for label, task in made_tasks(2).items()
    )
    (path / "core.jsonl").write_text(old + (path / "core.jsonl").read_text())
    (path / "evaluations").mkdir()
    for name, step, seed in (
        ("step_000200", 200, 3),
        ("step_000200_2", 200, 4),
        ("step_000100", 100, 5),
    ):
        write_json(
            path / "evaluations" / f"{name}.json",
            {"step": step, "core": {"tasks": made_tasks(seed), "max_per_task": 50}},
        )

    def metric(seed):
        return pytest.approx(sum(task["centered"] for task in made_tasks(seed).values()) / 22)

    assert compared(capsys, path)["runs"][0]["core"]["core_metric"] == metric(1)
    core = compared(capsys, path, "--evaluations")["runs"][0]["core"]
    assert core["core_metric"] == metric(4) and core["source"] == "evaluations/step_000200_2.json"
    (path / "core.jsonl").unlink()
    assert compared(capsys, path)["runs"][0]["core"]["core_metric"] == metric(4)


def test_a_torn_core_result_is_no_metric(tmp_path, capsys):
    path = make(tmp_path, "a", core=made_tasks(1))
    lines = (path / "core.jsonl").read_text().splitlines()
    (path / "core.jsonl").write_text("\n".join(lines[:15]) + "\n" + lines[15][:40])
    found = compared(capsys, path)
    assert (
        found["runs"][0]["core"]["core_metric"] is None
        and len(found["runs"][0]["core"]["tasks"]) == 15
    )
    assert any(
        "7 of 22 tasks are missing in core.jsonl, step 200" in line for line in found["problems"]
    )


def test_per_task_table(tmp_path, capsys):
    tasks = made_tasks(1)
    make(tmp_path, "a", core=tasks)
    make(tmp_path, "b", depth=6, core={label: tasks[label] for label in LABELS[:3]})
    lines = shown(capsys, tmp_path / "a", tmp_path / "b", "--per-task").splitlines()
    rows = {
        line.split()[0]: line.split()[1:]
        for line in lines
        if line.split() and line.split()[0] in LABELS
    }
    assert set(rows) == set(LABELS)
    for label, row in rows.items():
        task = [f"{tasks[label]['accuracy']:.4f}", "±", f"{tasks[label]['stderr']:.4f}"]
        assert row == [
            f"{tasks[label]['chance']:.3f}",
            *task,
            *(task if label in LABELS[:3] else ["-"]),
        ]
    make(tmp_path, "c")
    assert "no run has CORE results" in shown(capsys, tmp_path / "c", "--per-task")


# ---- folders ----

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
        '{"format": 1, "args": {"depth": "x", "seed": []}, "plan": 7, "data": [], "tokenizer": "t"}',
        '{"format": 1, "args": {"depth": NaN, "seed": 1e999}, "plan": {"parameters": {"total": {}}}, "model": []}',
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
        '{"step": 1, "train/loss": "x", "val/bpb": {}, "tokens": []}\n{"step": 2, "train/loss": NaN}\n',
        '{"step": 0, "train/loss": 1e300, "total_training_flops": -1}\n{"step": -5, "train/loss": -1e300, "val/bpb": 0}\n{"st',
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
        '{"step": 1, "text": 5}\n{"step": 2, "text": null, "prompt": 3}\n{"step": 3, "text": "t", "prompt": []}\n',
    ],
}


@pytest.mark.parametrize("file", DAMAGES)
def test_damaged_runs_are_named_and_the_others_compared(tmp_path, capsys, file):
    make(tmp_path, "good", core=made_tasks(1), steps=20)
    for i, content in enumerate(DAMAGES[file]):
        path = make(tmp_path, f"bad{i}", depth=6, core=made_tasks(2, 5), steps=20) / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    folders = [tmp_path / "good", *(tmp_path / f"bad{i}" for i in range(len(DAMAGES[file])))]
    if file in ("config.json", "metrics.jsonl", "core.jsonl"):  # what pictures are made of
        assert compare.main([*map(str, folders), "--out", str(tmp_path / "pictures")]) == 0
    shown(capsys, *folders, "--per-task")
    assert "good" in [run["name"] for run in compared(capsys, *folders)["runs"]]


def test_what_is_no_run(tmp_path, capsys):
    make(tmp_path, "out/d4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "config.json", {"model_type": "gpt2"})
    bad = [tmp_path / name for name in ("empty", "file", "foreign", "nowhere", "out")]
    found = compared(capsys, tmp_path / "out" / "d4", *bad, code=1)
    assert [run["name"] for run in found["runs"]] == ["d4"] and len(found["problems"]) == 5
    assert any("the folders in it do: d4" in line for line in found["problems"])
    with pytest.raises(UsageError, match="no run to compare"):
        compare.main([*map(str, bad), "--no-plots"])
    assert nanochat(["compare", str(tmp_path / "empty"), "--no-plots"]) == 2
    assert "nanochat compare: error:" in capsys.readouterr().err


def test_an_imported_run_and_one_without_seeds(tmp_path, capsys):
    for name in ("x", "y"):
        path = make(tmp_path, name, steps=0)
        config = {
            "args": {"depth": 3, "arch": "llama"},
            "imported_from": "hf",
            "model": {},
            "tokenizer": {"fingerprint": "t"},
        }
        RunFolder(path).write_config(config)
    found = compared(capsys, tmp_path / "x", tmp_path / "y")
    assert (
        len(found["groups"]) == 2
        and found["runs"][0]["depth"] == 3
        and found["runs"][0]["parameters"] is None
    )


def test_names_tell_runs_apart(tmp_path, capsys):
    for name in ("a/d4", "b/d4", "b/d6"):
        make(tmp_path, name, depth=int(name[-1]), seed=ord(name[0]))
    found = compared(
        capsys,
        tmp_path / "a" / "d4",
        tmp_path / "b" / "d4",
        tmp_path / "b" / "d6",
        tmp_path / "a" / ".." / "a" / "d4",
    )
    assert [run["name"] for run in found["runs"]] == ["a/d4", "b/d4", "d6"]


# ---- pictures ----


def test_pictures_and_nothing_else_is_written(tmp_path, capsys, monkeypatch):
    for seed in (1, 2):
        make(tmp_path, f"runs/$a_{{{seed}", seed=seed, core=made_tasks(seed), steps=60)
    make(
        tmp_path, "runs/_$\\frac$", depth=8, steps=3
    )  # no formula, and begins with what hides it from a legend
    before = {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted((tmp_path / "runs").rglob("*"))
    }
    folders = [str(path) for path in sorted((tmp_path / "runs").iterdir())]
    monkeypatch.chdir(tmp_path)
    assert compare.main(folders) == 0
    out = capsys.readouterr().out
    assert all(f"picture: compare/{name}.png" in out for name in ("curves", "core", "core_tasks"))
    assert {path.name for path in (tmp_path / "compare").iterdir()} == {
        "curves.png",
        "core.png",
        "core_tasks.png",
    }
    assert all(
        path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
        for path in (tmp_path / "compare").iterdir()
    )
    assert before == {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted((tmp_path / "runs").rglob("*"))
    }
    assert compare.main([folders[2], "--out", "other"]) == 0
    assert {path.name for path in (tmp_path / "other").iterdir()} == {
        "curves.png"
    } and "earlier comparison" not in capsys.readouterr().out
    assert compare.main([folders[2]]) == 0
    out = capsys.readouterr().out
    assert all(
        f"warning: compare/{name} is of an earlier comparison" in out
        for name in ("core.png", "core_tasks.png")
    )
    for out in (folders[0], str(tmp_path / "compare" / "core.png")):
        with pytest.raises(UsageError, match="--out"):
            compare.main([*folders, "--out", out])


def test_more_runs_than_colours(tmp_path):
    for i in range(14):
        make(tmp_path, f"runs/r{i}", depth=2 + i // 2, matrix_lr=0.01 + i, steps=20)
    folders = [str(path) for path in sorted((tmp_path / "runs").iterdir())]
    assert compare.main([*folders, "--out", str(tmp_path / "out")]) == 0
    looks, scale = plots.colors_of([2, 2, *range(3, 15)])
    assert (
        scale == ("depth", 2, 14)
        and looks[0] == looks[1] != looks[2]
        and len({look["color"] for look in looks}) == 13
    )
    assert plots.colors_of([4] * 14)[1] == ("run, in the order of the table", 1, 14)
    looks, scale = plots.colors_of([4] * 12)
    assert scale is None and len({(look["color"], look["dash"]) for look in looks}) == 12


def test_curves():
    lines = [
        {"step": 2, "a": 5.0},
        {"step": 0, "a": 1.0},
        {"step": 1, "a": None},
        {"step": 2, "a": 7.0},
        {"step": 3, "a": True},
        {"step": 4, "a": math.inf},
        {"a": 3.0},
    ]
    x, y = plots.points(lines, "a")
    assert x.tolist() == [0, 2] and y.tolist() == [1, 7]
    assert plots.smoothed(np.full(500, 3.0)) == pytest.approx(np.full(500, 3.0))
    straight = np.arange(1000.0)
    smooth = plots.smoothed(
        straight
    )  # 41 steps wide; at the start as many as there are on both sides, at the end those before it
    assert smooth[:-20] == pytest.approx(straight[:-20]) and smooth[-1] == pytest.approx(989)
    impulse = np.zeros(1000)
    impulse[500] = 41
    assert plots.smoothed(impulse)[479:522].tolist() == [0.0] + [1.0] * 41 + [0.0]
    x, mean, sd = plots.mean_of(
        [
            (np.array([0.0, 10, 20]), np.array([0.0, 10, 20])),
            (np.array([5.0, 15]), np.array([7.0, 17])),
        ]
    )
    assert (
        x.tolist() == [5, 10, 15]
        and mean.tolist() == [6, 11, 16]
        and sd == pytest.approx(np.full(3, math.sqrt(2)))
    )
    only = plots.mean_of([(np.array([1.0]), np.array([2.0])), (np.empty(0), np.empty(0))])
    assert only[1].tolist() == [2] and only[2] is None


def test_seeds_of_unlike_speed_are_averaged_by_step(tmp_path):
    """Their loss at the end is the mean of their ends, and stands at their mean time, though only one of them was trained that long."""
    for seed, pace in ((1, 1.0), (2, 3.0)):
        make(tmp_path, f"s{seed}", seed=seed, steps=40, pace=pace, bpb=1.5 + seed / 10)
    groups, _ = compare.grouped(compare.read_runs(sorted(tmp_path.iterdir()))[0])
    assert len(groups) == 1
    groups[0]["look"] = {"color": "black", "dash": "-"}
    ends = [
        [plots.points(run["lines"], name)[1][-1] for run in groups[0]["runs"]]
        for name in ("val/bpb", "total_training_time")
    ]
    curve = compare.curve_of(groups[0], "val/bpb", "total_training_time", 60.0)
    assert curve["y"][-1] == pytest.approx(np.mean(ends[0])) and curve["sd"][-1] == pytest.approx(
        np.std(ends[0], ddof=1)
    )
    assert ends[1][0] != ends[1][1] and curve["x"][-1] == pytest.approx(np.mean(ends[1]) / 60)
    for lines in (run["lines"] for run in groups[0]["runs"]):
        for line in lines:
            line.pop("total_training_time")
    assert len(compare.curve_of(groups[0], "val/bpb", "total_training_time")["x"]) == 0


def test_groups_of_the_sweeps_have_their_names(tmp_path, capsys):
    for variant, lr in (("baseline", 0.02), ("half", 0.01)):
        for seed in (42, 43):
            make(tmp_path, f"ablation/{variant}/seed{seed}", seed=seed, matrix_lr=lr)
    make(tmp_path, "seeds/seed42", seed=42, depth=6)
    make(tmp_path, "seeds/seed43", seed=43, depth=6)
    make(tmp_path, "again", seed=42, depth=6)
    found = compared(
        capsys,
        *sorted(tmp_path.glob("ablation/*/*")),
        *sorted(tmp_path.glob("seeds/*")),
        tmp_path / "again",
    )
    named = [group["name"] for group in found["groups"]]
    assert named == [
        "baseline (seeds 42, 43)",
        "half (seeds 42, 43)",
        "seeds (seeds 42, 43)",
        "again",
    ]
    assert [
        "again: the settings and the seed of seeds/seed42" in line for line in found["warnings"]
    ].count(True) == 1


def test_equal_runs_seldom_seem_to_differ(tmp_path):
    """Twelve configurations that are the same, three seeds each: with 95% for each pair by itself every other comparison would find a
    difference."""
    generator, claims = np.random.default_rng(1), 0
    for _ in range(100):
        groups = [
            {
                "name": str(i),
                "runs": [{"config": {}}],
                "members": [{"val_bpb": bpb} for bpb in generator.normal(1.5, 0.01, 3)],
            }
            for i in range(12)
        ]
        found = compare.seed_differences(groups, "val_bpb")
        assert len(found) == 66
        claims += any(entry["low"] > 0 or entry["high"] < 0 for entry in found)
    assert claims <= 8


def test_ticks_of_logarithmic_axes():
    assert [plots.short_number(value) for value in (0.1, 50.0, 1000.0, 2e15, 1e17, 1e-5)] == [
        "0.1",
        "50",
        "1000",
        "2e15",
        "1e17",
        "1e-5",
    ]


def test_the_first_steps_do_not_set_the_range():
    x = np.arange(1000.0)
    low, high = plots.range_of([{"x": x, "y": 2 + 98 * np.exp(-x / 10), "sd": None}])
    assert 1.9 < low < 2 and high < 2.2
    low, high = plots.range_of(
        [{"x": np.array([50.0, 100]), "y": np.array([1.8, 1.6]), "sd": np.array([0.1, 0.1])}]
    )
    assert low < 1.5 and high > 1.9  # few points all count, with their bands
    assert plots.range_of([{"x": np.empty(0), "y": np.empty(0), "sd": None}]) is None


def test_labels_do_not_overlap():
    assert plots.apart([0.5, 0.1], 0.2) == [0.5, 0.1]
    places = plots.apart([0.97, 0.5, 0.51, 0.99, 0.52], 0.1)
    assert sorted(places) == pytest.approx([places[1], places[2], places[4], places[0], places[3]])
    assert min(np.diff(sorted(places))) >= 0.1 - 1e-12 and max(places) <= 1
    assert max(plots.apart([0.5] * 40, 0.1)) <= 1 and plots.apart([], 0.1) == []


def test_it_is_light():
    code = "import sys; from nanochat import compare, report; assert not {'torch', 'matplotlib', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "nanochat", "compare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(
        flag in done.stdout
        for flag in ("--per-task", "--out", "--json", "--no-plots", "--evaluations")
    )
