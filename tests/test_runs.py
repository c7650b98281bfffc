"""nanochat runs: what it shows of good, died, damaged and foreign folders. It writes nothing."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.__main__ import main as nanochat
from nanochat.apps import runs
from nanochat.common import UsageError, write_json
from nanochat.run.folder import RunFolder, write_summary
from nanochat.run.metrics import Record

ROOT = Path(__file__).resolve().parent.parent


def make(folder, name, status="completed", depth=4, steps=100, age=0, **summary):
    """A run folder with the files that a listing reads."""
    path = Path(folder) / name
    path.mkdir(parents=True)
    RunFolder(path).write_config(
        {
            "args": {"depth": depth},
            "plan": {"parameters": {"total": 1234567}, "num_iterations": steps},
        }
    )
    values = {
        "reason": "",
        "step": 100,
        "tokens": 51200,
        "total_training_time": 64.0,
        "val_bpb": 1.5,
        "min_val_bpb": 1.25,
        "core_metric": None,
    } | summary
    write_summary(path, status=status, **values)
    metrics = Record(path / "metrics.jsonl")
    metrics.write(
        step=values["step"],
        tokens=values["tokens"],
        total_training_time=values["total_training_time"],
        **{"train/loss": 1.0},
    )
    metrics.close()
    for file in path.iterdir():
        os.utime(file, (time.time() - age, time.time() - age))
    return path


def listed(capsys, *arguments):
    """{name: run} and problems of --json, in the order shown."""
    assert runs.main([*map(str, arguments), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    return {run["name"]: run for run in shown["runs"]}, shown["problems"]


def test_one_line_a_run(tmp_path, capsys):
    make(tmp_path, "d4", age=7500, core_metric=0.2134)
    make(
        tmp_path,
        "d12",
        status="stopped",
        depth=12,
        steps=None,
        tokens=3 * 10**9,
        total_training_time=3 * 3600.0,
        val_bpb=None,
    )
    assert runs.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line) for line in lines] == [
        [
            "run",
            "status",
            "depth",
            "params",
            "step",
            "tokens",
            "time",
            "tok/s",
            "val_bpb",
            "best",
            "CORE",
            "updated",
        ],
        [
            "d4",
            "completed",
            "4",
            "1.23M",
            "100/100",
            "51.2k",
            "1m04s",
            "800",
            "1.5000",
            "1.2500",
            "0.2134",
            "2h05m ago",
        ],
        [
            "d12",
            "stopped",
            "12",
            "1.23M",
            "100/?",
            "3B",
            "3h00m",
            "278k",
            "-",
            "1.2500",
            "-",
            "just now",
        ],
    ]
    assert len({len(line) for line in lines[:2]}) == 1  # aligned


def test_a_run_that_died_and_one_that_is_running(tmp_path, capsys):
    for name in ("running", "died", "no_lock"):
        path = make(tmp_path, name, status="running", step=10, tokens=5120)
        metrics = Record(path / "metrics.jsonl")
        metrics.write(step=12, tokens=6144, total_training_time=96.0)
        metrics.close()
        with open(path / "metrics.jsonl", "a") as file:
            file.write('{"step": 13, "tok')
    (tmp_path / "died" / ".lock").write_text("")
    holder = RunFolder(tmp_path / "running")
    holder.claim()
    before = {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(tmp_path.rglob("*"))
    }
    found, problems = listed(capsys, tmp_path)
    assert {name: run["status"] for name, run in found.items()} == {
        "died": "died",
        "no_lock": "died",
        "running": "running",
    }
    assert (
        found["running"]["step"] == 12 and found["running"]["tok_per_sec"] == 64
    )  # fresher than the summary
    assert problems == [] and before == {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(tmp_path.rglob("*"))
    }
    with (
        open(tmp_path / "running" / ".lock") as again,
        pytest.raises(BlockingIOError),
    ):  # the holder still has it
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.lock.close()
    assert listed(capsys, tmp_path)[0]["running"]["status"] == "died"
    claimed = RunFolder(tmp_path / "died")  # looking left no lock behind
    claimed.claim()
    claimed.lock.close()


def test_a_run_before_its_first_summary(tmp_path, capsys):
    path = make(tmp_path, "young")
    (path / "summary.json").unlink()
    (path / "metrics.jsonl").unlink()
    run = listed(capsys, tmp_path)[0]["young"]
    assert run["status"] == "died" and run["step"] is None and run["val_bpb"] is None
    assert runs.main([str(tmp_path)]) == 0
    assert "0/100" in capsys.readouterr().out


def test_orders(tmp_path, capsys):
    make(tmp_path, "d10", val_bpb=1.3, core_metric=0.1, total_training_time=5.0, age=10)
    make(tmp_path, "d2", val_bpb=None, core_metric=None, total_training_time=None, age=1000)
    make(tmp_path, "d4", val_bpb=1.1, core_metric=0.3, total_training_time=50.0, age=100)
    make(tmp_path, "e", val_bpb=1.2, core_metric=0.2, total_training_time=500.0, age=5)
    for order, expected in {
        "name": "d2 d4 d10 e",
        "val_bpb": "d4 e d10 d2",
        "time": "e d4 d10 d2",
        "core": "d4 e d10 d2",
        "updated": "e d10 d4 d2",
    }.items():
        assert " ".join(listed(capsys, tmp_path, f"--sort={order}")[0]) == expected


def test_folders_below_and_runs_themselves(tmp_path, capsys):
    make(tmp_path, "a/d1")
    make(tmp_path, "a/b/d2")
    make(tmp_path, "a/b/c/too_deep")
    make(tmp_path, ".hidden/d3")
    make(tmp_path, "a/d1/inside_a_run")
    assert list(listed(capsys, tmp_path / "a")[0]) == ["b/d2", "d1"]
    assert list(listed(capsys, tmp_path)[0]) == ["a/d1"]
    assert list(listed(capsys, tmp_path / "a" / "d1")[0]) == ["d1"]
    both, _ = listed(capsys, tmp_path / "a" / "d1", tmp_path / "a" / "b", tmp_path / "a")
    assert set(both) == {str(tmp_path / name) for name in ("a/b/d2", "a/d1", "a/b/c/too_deep")}


def test_damaged_and_foreign_folders_are_named(tmp_path, capsys):
    make(tmp_path, "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    damages = {
        "not_json": ("config.json", "{"),
        "other_program": ("config.json", '{"architectures": ["GPT2"]}'),
        "a_list": ("config.json", "[]"),
        "newer": ("config.json", '{"format": 99, "args": {}}'),
        "no_plan": ("config.json", '{"format": 1, "args": {"depth": 4}}'),
        "odd_plan": (
            "config.json",
            '{"format": 1, "args": {"depth": 4}, "plan": {"parameters": 3, "num_iterations": 1}}',
        ),
        "odd_depth": (
            "config.json",
            '{"format": 1, "args": {"depth": {}}, '
            '"plan": {"parameters": {"total": 3}, "num_iterations": 1}}',
        ),
        "odd_summary": ("summary.json", "[1]"),
        "torn_summary": ("summary.json", '{"status": "comp'),
        "text_summary": ("summary.json", '{"status": "completed", "step": "ten"}'),
        "no_status": ("summary.json", "{}"),
        "binary": ("config.json", "\x00\x01"),
    }
    for name, (file, content) in damages.items():
        (make(tmp_path, name) / file).write_text(content)
    (make(tmp_path, "lost_config") / "config.json").unlink()
    (make(tmp_path, "torn_metrics") / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x"}\n'
    )
    found, problems = listed(capsys, tmp_path)
    assert list(found) == ["good", "torn_metrics"]
    assert {Path(problem.split(":")[0]).name for problem in problems} == {*damages, "lost_config"}
    assert "it holds metrics.jsonl, summary.json, but no config.json" in next(
        line for line in problems if "lost_config" in line
    )
    assert runs.main([str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + len(problems)


def test_nothing_to_show(tmp_path, capsys, monkeypatch):
    with pytest.raises(UsageError, match="no runs in"):
        runs.main([str(tmp_path)])
    with pytest.raises(UsageError, match="no such folder"):
        runs.main([str(tmp_path / "nowhere")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="^out: no such folder"):
        runs.main([])
    write_json(tmp_path / "config.json", {"model_type": "gpt2"})
    with pytest.raises(UsageError, match="no runs"):
        runs.main([str(tmp_path)])
    assert "was not written by nanochat" in capsys.readouterr().out


def test_it_is_light():
    code = (
        "import sys; from nanochat.apps import runs; "
        "assert not {'torch', 'numpy', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_real_run(tmp_path, capsys):
    import small

    assert small.run(tmp_path, "--num-iterations=3", "--no-save", "--save-every=-1") == 0
    capsys.readouterr()
    run = listed(capsys, tmp_path)[0]["run"]
    summary = small.summary(tmp_path)
    assert run["status"] == "completed" and (run["step"], run["steps"], run["depth"]) == (3, 3, 2)
    assert run["val_bpb"] == summary["val_bpb"] and run["tok_per_sec"] == pytest.approx(
        summary["tok_per_sec"]
    )


def test_as_a_command(tmp_path, capsys, monkeypatch):
    """Once __main__ lists the app: exit codes and messages of the command."""
    from nanochat import __main__

    monkeypatch.setitem(__main__.APPS, "runs", "list runs")
    assert nanochat(["runs", str(tmp_path)]) == 2
    assert "nanochat runs: error: no runs in" in capsys.readouterr().err
    make(tmp_path, "d4")
    assert nanochat(["runs", str(tmp_path)]) == 0
