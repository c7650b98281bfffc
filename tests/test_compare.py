"""nanochat compare: the table, groups of seeds, what exceeds the noise, warnings, pictures."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import DAMAGES, made_tasks, make, record

from nanochat.__main__ import main as nanochat
from nanochat.apps import compare
from nanochat.common import UsageError, write_json
from nanochat.run import plots
from nanochat.run.flags import FLAGS, FREE, START
from nanochat.run.folder import RunFolder
from nanochat.run.groups import Group, group_runs
from nanochat.run.statistics import welch
from tasks.core import LABELS, interval

ROOT = Path(__file__).resolve().parent.parent


def compared(capsys, *arguments, code=0):
    """What --json says without pictures."""
    assert compare.main([*map(str, arguments), "--json", "--no-plots"]) == code
    return json.loads(capsys.readouterr().out)


def shown(capsys, *arguments):
    """What is printed without pictures."""
    assert compare.main([*map(str, arguments), "--no-plots"]) == 0
    return capsys.readouterr().out


# ---- numbers ----


def answers_of(tasks):
    """The answers to each task, from its entry."""
    return {label: SimpleNamespace(**entry) for label, entry in tasks.items()}


def test_the_table(tmp_path, capsys):
    make(tmp_path, "d4", core=(core := made_tasks(1)))
    make(tmp_path, "d12", depth=12, bpb=1.2345)
    lines = shown(capsys, tmp_path / "d4", tmp_path / "d12").splitlines()
    low, high = interval(answers_of(core))
    metric = sum(task["centered"] for task in core.values()) / 22
    rows = [" ".join(line.split()) for line in lines]
    assert rows[0] == "run depth params tokens FLOPs time val_bpb CORE 95% interval n status"
    core = f"{metric:.4f} {low:.4f} to {high:.4f} 1,100"
    assert rows[1] == f"d4 4 1.6M 200k 1.92e+12 8.0s 1.5000 {core} completed"
    assert rows[2] == "d12 12 14.4M 200k 1.73e+13 24.0s 1.2345 - - - completed"
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
    free = {name for name, flag in FLAGS.items() if flag.on_resume in (FREE, START)}
    # what is measured, and when a run ends
    decide = {"eval_tokens", "stop_at_bpb", "patience"}
    bookkeeping = {name for name, flag in FLAGS.items() if flag.bookkeeping}
    assert bookkeeping == free - decide | {"seed", "tokenizer", "init_from"}


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
    assert sum("so this run stands alone" in line for line in found["warnings"]) == 2


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
        "s3 did not complete: stopped" in text
        and "died did not complete: died" in text
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
    low, high = interval(answers_of(b), answers_of(a), 1 - 0.05 / 6)  # six pairs
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
    difference = f"{entries['a', 'b']['difference']:+.4f}, {low:+.4f} to {high:+.4f}"
    assert f"b - a: {difference}: within the noise of the examples" in text
    assert "better - a:" in text and "more than the noise of the examples" in text
    assert (
        "warning: examples of CORE differs: 4,400 in 22 tasks" in text
        and "their number is the same" in text
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
    expected = welch([1.50, 1.52, 1.54], [1.40, 1.41, 1.42])
    for name in ("difference", "low", "high", "df"):
        assert entry[name] == pytest.approx(getattr(expected, name))
    assert entry["n"] == [3, 3]
    text = shown(capsys, *folders)
    assert (
        "(n = 3 and 3 seeds, 2.9 degrees of freedom): more than the noise of the seeds" in text
        and "Welch's t-test" in text
    )
    muon = "muon (seeds 1, 2, 3)"
    why = "no interval: one seed of single: its noise is not known"
    assert f"single - {muon}: -0.1100, {why}" in text
    # the spread of a difference of two seeds; the quantile for 2 degrees of freedom
    reach = math.sqrt(2) * 0.01 * 4.302653
    hint = f"two single runs differ by up to {reach:.4f} by chance alone"
    assert f"hint: by the spread of {muon}, {hint}" in text


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


@pytest.mark.parametrize("file", DAMAGES)
def test_damaged_runs_are_named_and_the_others_compared(tmp_path, capsys, file):
    make(tmp_path, "good", core=made_tasks(1), steps=20)
    for i, content in enumerate(DAMAGES[file]):
        path = make(tmp_path, f"bad{i}", depth=6, core=made_tasks(2, 5), steps=20) / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    folders = [tmp_path / "good", *(tmp_path / f"bad{i}" for i in range(len(DAMAGES[file])))]
    shown(capsys, *folders, "--per-task")
    # pictures are made of these
    drawn = file in ("config.json", "metrics.jsonl", "core.jsonl")
    pictures = ["--out", str(tmp_path / "pictures")] if drawn else ["--no-plots"]
    assert compare.main([*map(str, folders), "--json", *pictures]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "good" in [run["name"] for run in found["runs"]]
    assert bool(found["pictures"]) == drawn


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


def test_seeds_of_unlike_speed_are_averaged_by_step(tmp_path):
    """Their loss at the end is the mean of their ends, and is drawn at their mean time, though only
    one of them was trained that long."""
    for seed, pace in ((1, 1.0), (2, 3.0)):
        make(tmp_path, f"s{seed}", seed=seed, steps=40, pace=pace, bpb=1.5 + seed / 10)
    (group,), _ = group_runs(compare.read_runs(sorted(tmp_path.iterdir()))[0])
    look = plots.Look("black", "-")
    scores, times = (
        [plots.points(run.lines, name)[1][-1] for run in group.runs]
        for name in ("val/bpb", "total_training_time")
    )
    drawn = compare.DrawnGroup(group, look)
    curve = compare.curve_of(drawn, "val/bpb", "total_training_time", 60.0)
    assert curve.y[-1] == pytest.approx(np.mean(scores))
    assert curve.sd[-1] == pytest.approx(np.std(scores, ddof=1))
    assert times[0] != times[1] and curve.x[-1] == pytest.approx(np.mean(times) / 60)

    for line in (line for run in group.runs for line in run.lines):
        line.pop("total_training_time")
    assert len(compare.curve_of(drawn, "val/bpb", "total_training_time").x) == 0


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
        "again: has the settings and the seed of seeds/seed42" in line for line in found["warnings"]
    ].count(True) == 1


def test_equal_runs_seldom_seem_to_differ():
    """Eight configurations that are the same, three seeds each: with 95% for each pair alone, many
    comparisons would find a difference."""
    generator = np.random.default_rng(1)
    claims = 0
    blank = record()
    for _ in range(40):
        groups = []
        for i in range(8):
            runs = [replace(blank, val_bpb=bpb) for bpb in generator.normal(1.5, 0.01, 3)]
            groups.append(Group(str(i), runs, runs))
        found = compare.seed_differences(groups, compare.BPB)
        assert len(found) == 28
        claims += any(entry.low > 0 or entry.high < 0 for entry in found)
    assert claims <= 3


def test_it_is_light():
    code = (
        "import sys; from nanochat.apps import compare, report; "
        "assert not {'torch', 'matplotlib', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "nanochat", "compare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    flags = ("--per-task", "--out", "--json", "--no-plots", "--evaluations")
    assert all(flag in done.stdout for flag in flags)
