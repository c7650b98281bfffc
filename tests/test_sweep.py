"""nanochat sweep and its five scripts: what is trained and skipped, failures, results."""

import errno
import fcntl
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import small
import stand_in
from stand_in import OF_SWEEP, calls

from nanochat import common
from nanochat.apps import sweep
from nanochat.apps.sweep import command, predictions, results, train_runs
from nanochat.apps.sweep.facts import Facts, read_facts
from nanochat.apps.sweep.results import PairedDifference, Row
from nanochat.apps.sweep.settings import TOY_FLAGS, Settings
from nanochat.apps.sweep.train_runs import Stop, parse_lines
from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, UsageError, read_json
from nanochat.run import flags
from nanochat.run.checks import check_flags
from nanochat.run.statistics import Spread

ROOT = Path(__file__).resolve().parent.parent
# the stand-in trains depth 1, and then there is room for a head of 128
WIDE = "--aspect-ratio=128"
VARIABLES = "NPROC RETRY TOY CORE_BUNDLE PREDICT OUT DEPTHS BUDGETS SEEDS VARIANTS"
VARIABLES += " DEPTH STEPS STOPS DATA JOBS PYTHON"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty folder to work in, with the stand-in for train.py."""
    (tmp_path / "train.py").write_text(OF_SWEEP)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    behave(tmp_path)
    return tmp_path


@pytest.fixture
def checkout(tree, monkeypatch):
    """As `tree`, with the scripts and the package, whose sweep starts the stand-in."""
    monkeypatch.delenv("PYTHONPATH")
    no_caches = shutil.ignore_patterns("__pycache__")
    for name in ("runs", "nanochat", "tasks"):
        shutil.copytree(ROOT / name, tree / name, ignore=no_caches)
    add_commands(tree)
    return tree


def add_commands(tree):
    """The commands that the scripts use: this interpreter, without a .venv."""
    (tree / "runs" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."')
    (tree / "bin").mkdir()
    for name, start in (("python", ""), ("nanochat", " -m nanochat")):
        (tree / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable}{start} "$@"\n')
        (tree / "bin" / name).chmod(0o755)


def path_of(tree):
    return f"{tree / 'bin'}:{os.environ['PATH']}"


def behave(tree, **codes):
    """What trainings do: {folder, with _ for /: exit code}. The list of calls begins anew."""
    stand_in.behave(tree, {folder.replace("_", "/"): code for folder, code in codes.items()})


def settings_of(kind, *words, **environ):
    """The settings of a sweep that trains with the stand-in."""
    settings = Settings.read(kind, "o", [WIDE, *words], environ)
    return replace(settings, train_py=Path("train.py").absolute(), pause=0.05)


def do(kind, lines, *words, **environ):
    """A sweep in this process; returns the exit code."""
    return command.sweep(settings_of(kind, *words, **environ), lines, Stop())


def script(tree, name, *arguments, **environ):
    """One of the scripts, with the stand-in. Returns the finished process."""
    if name != "ablation":
        arguments = (*arguments, WIDE)
    return subprocess.run(
        ["bash", f"runs/{name}.sh", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PATH": path_of(tree)} | environ,
    )


def result(text):
    """The last line as a dict."""
    words = text.strip().splitlines()[-1].split()
    assert words[0] == "RESULT"
    return dict(word.split("=") for word in words[1:])


# ----- tables


def row(name, val_bpb, status="completed", core=None, seconds=10.0, step=None):
    facts = Facts(
        status=status,
        val_bpb=val_bpb,
        core_metric=core,
        seconds=seconds,
        flops=1e9,
        tokens=None,
        step=step,
    )
    return Row(name, name, [], facts)


def test_noise_is_of_completed_runs():
    rows = [row("a", 1.0), row("b", 1.2), row("c", 9.0, "failed"), row("d", 1.4, core=0.5)]
    found = results.noise(rows)
    assert found["val_bpb"] == Spread(pytest.approx(1.2), pytest.approx(0.2), 3)
    assert found["core_metric"] == Spread(0.5, None, 1)
    assert results.noise([])["val_bpb"] == Spread(None, None, 0)


def test_ablation_is_paired_by_seed():
    """A difference that is the same for every seed has no error, however far the seeds are
    apart."""
    rows = [
        row("baseline/seed42", 1.0, core=0.2),
        row("baseline/seed43", 2.0, core=0.3),
        row("baseline/seed44", 3.0),
        row("x/seed42", 1.1, core=0.25, seconds=15.0),
        row("x/seed43", 2.1, core=0.31, seconds=15.0),
        row("x/seed44", None, "failed"),
        row("y/seed42", 1.1),
        row("y/seed43", 2.3),
        row("y/seed44", 3.2),
        row("z/seed42", None, "stopped"),
    ]
    baseline, x, y, z = results.ablation(rows)
    assert baseline.difference is None and baseline.val_bpb.mean == 2.0
    assert x.difference == PairedDifference(
        pytest.approx(0.1), pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-10), 2
    )
    assert x.status == "1 of 3 failed"
    assert x.core_difference.mean == pytest.approx(0.03) and x.seconds_difference.mean == 5.0
    se = 0.1 / math.sqrt(3)
    assert y.difference == PairedDifference(
        pytest.approx(0.2), pytest.approx(se), pytest.approx(4.302653 * se), 3
    )
    assert z.difference == PairedDifference(None, None, None, 0) and z.status == "1 of 1 stopped"
    shown = results.ablation_table([baseline, x, y, z])
    assert "+0.2000 ± 0.2484" in shown and "+50.0 ± 0.0%" in shown and "1 of 3 failed" in shown
    # results.json keeps these names
    assert list(asdict(x)["difference"]) == ["mean", "se", "reach", "n"]


def test_landings_are_paired_by_where_they_began():
    """Those whose partner is missing, failed or of another length are left out."""
    rows = [
        row("a/base", 1.0),
        row("a/planned-20", 2.0, step=23),
        row("a/landed-20", 2.02, step=23),
        row("b/landed-20", 1.99, step=23),
        row("b/planned-20", 2.0, step=23),
        row("b/landed-40", 2.0, step=46),
        row("b/planned-40", 2.0, "failed", step=46),
        row("b/landed-60", 2.0, step=69),
        row("b/planned-60", 2.0, step=70),
    ]
    found = results.landings(rows)
    assert [(pair.text, pair.stop, pair.steps) for pair in found] == [
        ("a", "20", 23),
        ("b", "20", 23),
    ]
    assert [pair.excess for pair in found] == pytest.approx([0.01, -0.005])
    assert results.landings_table(found).splitlines()[1].split() == [
        *("a", "20", "23", "2.0200", "2.0000", "+1.00%")
    ]
    assert command.conclude_landing(Path(), rows).values == pytest.approx(
        {"pairs": 2, "within": 1, "worst": 0.01, "mean": 0.0025, "a_20": 0.01, "b_20": -0.005}
    )


def test_result_line():
    line = results.result_line(runs=1, failed=0, a=None, b=0.123456789, c=True)
    assert line == "RESULT runs=1 failed=0 a=null b=0.123457 c=true"


# ----- what is trained, skipped, resumed, tried again

LINES = "d1: --depth=1\nd2: --depth=2\nd3: --depth=3\n"


def test_completed_runs_are_skipped_and_failures_shown(tree, capsys):
    behave(tree, o_d1=1, o_d2=2)
    assert do("seeds", LINES) == EXIT_FAILED
    shown = capsys.readouterr().out
    # the rest was trained
    assert "d1: FAILED" in shown and "d2: FAILED" in shown and "d3: completed" in shown
    values = result(shown)
    assert float(values.pop("val_bpb_mean")) > 1
    assert values == {
        "runs": "3",
        "completed": "1",
        "failed": "2",
        "val_bpb_sd": "null",
        "val_bpb_n": "1",
    }
    runs = read_json("o/results.json", "")["runs"]
    assert [run["status"] for run in runs] == ["failed", "failed", "completed"]
    assert "TrainingFailed: made up" in runs[0]["reason"]
    assert "--depth=9: made up" in runs[1]["reason"]
    last = runs[2]
    assert last["depth"] == 3 and last["scaling_parameters"] == 9000 and last["width"] == 192
    assert last["flops"] == 6 * 9000 * 180000 and last["seconds"] == 6.0
    assert last["flags"] == ["--depth=3"]

    # what failed stays failed
    behave(tree)
    assert do("seeds", LINES) == EXIT_FAILED and calls(tree) == []
    failed = "d1: failed earlier (TrainingFailed: made up); RETRY=1 tries again"
    assert failed in capsys.readouterr().out
    assert do("seeds", LINES, RETRY="1") == EXIT_COMPLETED and calls(tree) == ["o/d1", "o/d2"]
    assert "FAILED" not in capsys.readouterr().out
    behave(tree)
    assert do("seeds", LINES) == EXIT_COMPLETED and calls(tree) == []


@pytest.mark.parametrize("words", [["--json", "seeds", "o"], ["seeds", "o", "--json"]])
def test_results_as_json(tree, monkeypatch, capsys, words):
    """Standard output is for them alone."""
    read = Settings.read

    def with_stand_in(*args):
        return replace(read(*args), train_py=Path("train.py").absolute())

    monkeypatch.setattr(Settings, "read", with_stand_in)
    monkeypatch.setattr(sys, "stdin", io.StringIO(LINES))
    # signals stay those of the tests
    monkeypatch.setattr(Stop, "listen", lambda self: None)
    assert sweep.main([*words, WIDE]) == EXIT_COMPLETED
    shown = capsys.readouterr()
    assert json.loads(shown.out) == read_json("o/results.json", "")
    assert "d1: completed" in shown.err and "RESULT runs=3" in shown.err


def test_a_failure_that_another_process_tried_again_is_not_tried_a_third_time(tree):
    behave(tree, o_d1=2)
    do("seeds", "d1: --depth=1")
    (run,) = parse_lines("d1: --depth=1", Path("o"), [])
    before = {"d1": read_facts(run.path).failed_at}
    for _ in range(2):
        assert train_runs.attend(run, settings_of("seeds"), before, Stop())
    assert calls(tree) == ["o/d1", "o/d1"]


def test_a_killed_training_is_a_failure(tree, capsys):
    (tree / "train.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert do("seeds", "d1: --depth=1") == EXIT_FAILED
    assert "ended by signal 9" in capsys.readouterr().out


def test_a_stop_ends_the_sweep_which_continues_from_there(tree, capsys):
    behave(tree, o_d2=75)
    assert do("seeds", LINES) == EXIT_STOPPED and calls(tree) == ["o/d1", "o/d2"]
    assert "RESULT" not in capsys.readouterr().out
    statuses = [run["status"] for run in read_json("o/results.json", "")["runs"]]
    assert statuses == ["completed", "stopped", "not started"]
    behave(tree)
    assert do("seeds", LINES) == EXIT_COMPLETED and calls(tree) == ["o/d2", "o/d3"]


def test_a_run_that_died_is_resumed(tree):
    do("seeds", "d1: --depth=1")
    summary = tree / "o" / "d1" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
    behave(tree)
    assert do("seeds", "d1: --depth=1") == EXIT_COMPLETED and calls(tree) == ["o/d1"]


def test_a_sweep_works_without_file_locks(tree, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(common, "_noted", set())
    assert do("seeds", LINES) == EXIT_COMPLETED
    assert calls(tree) == ["o/d1", "o/d2", "o/d3"]
    assert capfd.readouterr().err.count("no file locks") == 1


@pytest.mark.parametrize("lock", [".sweep.lock", ".lock"], ids=["of_a_sweep", "of_train.py"])
def test_a_run_that_another_process_holds_is_left_to_it(tree, monkeypatch, capsys, lock):
    """It is looked at again at the end; here the other process ends when this one waits for it."""
    do("seeds", "d2: --depth=2")
    (tree / "o" / "d2" / "summary.json").write_text(json.dumps({"status": "running"}))
    behave(tree)
    held = os.open(tree / "o" / "d2" / lock, os.O_WRONLY | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(train_runs.time, "sleep", lambda _: os.close(held))
    assert do("seeds", LINES) == EXIT_COMPLETED
    assert calls(tree) == ["o/d1", "o/d3", "o/d2"]
    assert capsys.readouterr().out.count("waiting for d2, held by another process") == 1


def waiting_child(tree, process):
    """The process that waits for a signal, once it does."""
    while not (tree / "waiting").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def test_training_keeps_its_run_when_the_sweep_is_killed(checkout):
    """The lock is train.py's too, so that a sweep that is started immediately does not begin the
    run a second time."""
    behave(checkout, o_d1="wait")
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat", "sweep", "seeds", "o"],
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    process.stdin.write("d1: --depth=2")
    process.stdin.close()
    child = waiting_child(checkout, process)
    process.kill()
    process.wait()
    (run,) = parse_lines("d1: --depth=2", Path("o"), [])
    assert train_runs.attend(run, settings_of("seeds"), {}, Stop()) is False
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training(checkout, number):
    behave(checkout, out_seeds_seed43="wait")
    process = subprocess.Popen(
        ["bash", "runs/seeds.sh"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PATH": path_of(checkout)},
    )
    waiting_child(checkout, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, err
    assert "stopped; start it again to continue" in out
    assert "RESULT" not in out and "FAILED" not in out
    assert calls(checkout) == ["out/seeds/seed42", "out/seeds/seed43"]
    summary = json.loads((checkout / "out/seeds/seed43/summary.json").read_text())
    assert summary["status"] == "stopped"


def test_a_stop_under_torchrun_is_told_by_the_summary(tree, monkeypatch):
    """torchrun ends with 1 whatever its workers end with; a summary of an earlier start says
    nothing about this one."""
    stopped = tree / "stopped.py"
    early = 'if args["depth"] == 1: leave("stopped", 1)\nleave({0:'
    stopped.write_text(OF_SWEEP.replace("leave({0:", early))
    monkeypatch.setattr(
        train_runs,
        "command",
        lambda run, train_py, processes: [sys.executable, str(stopped), *run.argv],
    )
    assert do("seeds", LINES, NPROC="2") == EXIT_STOPPED and calls(tree) == ["o/d1"]
    stopped.write_text("import sys; sys.exit(1)")
    assert do("seeds", "d1: --depth=1", NPROC="2") == EXIT_FAILED


def test_torchrun_is_used_for_more_than_one_process():
    (run,) = parse_lines("a/d1: --depth=1", Path("o"), ["--seed=3"])
    one, two = (train_runs.command(run, Path("train.py"), n) for n in (1, 2))
    own = ["--out-dir=o/a", "--model-tag=d1", "--resume"]
    assert one[1:] == ["train.py", "--seed=3", "--depth=1", *own]
    # `--` keeps torchrun from reading the options of train.py
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    assert two[1:] == [*torchrun, *one[1:]]


# ----- what is refused before anything is trained

BUDGET = "1e9/d1: --depth=1 --target-flops=1e9"


@pytest.mark.parametrize(
    "kind, lines, words, environ, reason",
    [
        ("seeds", LINES, ["--model-tag=x"], {}, "--model-tag: the sweep sets this itself"),
        (
            "seeds",
            LINES,
            ["--out-dir=x", "--resume"],
            {},
            "--out-dir, --resume: the sweep sets this itself",
        ),
        ("seeds", "seed42: --seed=42", ["--seed=1"], {}, "--seed: the sweep varies this"),
        ("ablation", "a/seed42: --seed=42", ["--seed=1"], {}, "--seed: the sweep varies this"),
        ("miniseries", LINES, ["--depth=1"], {}, "--depth: the sweep varies this"),
        (
            "scaling_laws",
            BUDGET,
            ["--num-iterations=3"],
            {},
            "the horizon of a run is its budget",
        ),
        ("scaling_laws", BUDGET, [], {"PREDICT": "1e8"}, "not larger than the budgets"),
        ("scaling_laws", BUDGET, [], {"PREDICT": "x"}, "neither a depth"),
        ("seeds", "d1: --out-dir=x", [], {}, "d1: --out-dir: the sweep sets this itself"),
        ("seeds", "no colon", [], {}, "'no colon' is not a run"),
        ("seeds", "../x: --depth=1", [], {}, "is not a run"),
        ("seeds", "d2: --depth=2 '--run=x\n", [], {}, "No closing quotation"),
        ("seeds", "", [], {}, "no runs to train"),
        ("seeds", "a: --depth=1\na: --depth=2", [], {}, "two runs of the same name: a"),
        ("seeds", LINES, [], {"NPROC": "x"}, "NPROC=x"),
        ("seeds", LINES, [], {"RETRY": "yes"}, "RETRY=yes"),
        (
            "seeds",
            "d4: --depth=4\nd2: --depth=2 --n-kv-head=3\n",
            [],
            {},
            "d2: --n-kv-head=3: does not divide",
        ),
    ],
)
def test_refused(tree, kind, lines, words, environ, reason):
    with pytest.raises(UsageError, match=reason):
        do(kind, lines, *words, **environ)
    assert calls(tree) == [] and not (tree / "o").exists()


def test_a_folder_that_cannot_be_written_is_refused(tree):
    (tree / "o").write_text("no folder")
    with pytest.raises(UsageError, match="cannot be written"):
        do("seeds", "d2: --depth=2\n")
    assert calls(tree) == []


def test_an_unknown_flag_or_kind_is_refused_before_anything_is_trained(tree):
    with pytest.raises(SystemExit, match="2"):
        do("ablation", "baseline/seed42: --seed=42\nx/seed42: --no-such-flag --seed=42")
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["else", "o"])
    assert calls(tree) == []


def test_runs_of_other_flags_are_not_mixed_in(tree):
    """Changed, added and left out flags; those that do not change what a run becomes are free."""
    assert do("seeds", LINES, "--dropout=0.1") == EXIT_COMPLETED
    behave(tree)
    for words in (
        [],
        ["--dropout=0.2"],
        ["--dropout=0.1", "--weight-decay=0"],
        ["--dropout=0.1", "--target-tokens=100"],
    ):
        with pytest.raises(UsageError, match="was started with other flags"):
            do("seeds", LINES, *words)
    free = ["--device-batch-size=1", "--eval-every=7"]
    assert do("seeds", LINES, "--dropout=0.1", *free) == EXIT_COMPLETED
    assert calls(tree) == []


def test_the_environment_becomes_settings():
    environ = {"NPROC": "8", "RETRY": "1", "CORE_BUNDLE": "b", "PREDICT": "10"}
    settings = Settings.read("seeds", "o", ["--depth=4"], environ)
    assert (settings.processes, settings.retry, settings.predict) == (8, True, "10")
    core = ["--core-bundle=b", "--core-metric-every=1000000000"]
    assert settings.common == [*core, "--depth=4"] and settings.given == ["--depth=4"]
    plain = Settings.read("seeds", "o", [], {})
    assert (plain.processes, plain.retry, plain.common, plain.predict) == (1, False, [], "")
    assert Settings.read("seeds", "o", [], {"TOY": "1"}).common == TOY_FLAGS
    assert plain.train_py == ROOT / "train.py"


# ----- predictions

GRID = "".join(
    f"{c}/d{d}: --target-flops={c} --depth={d}\n"
    for c in ("1e8", "4e8", "1.6e9", "6.4e9")
    for d in (1, 2, 3, 4, 6)
)


class MadeUpModel:
    """The sizes of the stand-in's models: N is 1000 x depth^2."""

    def __init__(self, depth):
        self.depth = depth

    def scaling_parameters(self):
        return 1000 * self.depth**2

    def flops_per_token(self):
        return 6 * self.scaling_parameters()


@pytest.fixture
def made_up_model(monkeypatch):
    monkeypatch.setattr(predictions, "model_config", lambda args, vocab_size: args.depth)
    monkeypatch.setattr(predictions, "meta_model", MadeUpModel)


@pytest.mark.parametrize(
    "wanted, name, depth, flops",
    [("8", "d8", 8, (1000 * 64 / 0.2) ** 2), ("1e11", "1e11", 8, 1e11)],
)
def test_predictions_come_before_their_run_and_stand(
    tree, made_up_model, capsys, wanted, name, depth, flops
):
    path = tree / "o" / "predictions" / f"{name}.json"
    # the trainer of the predicted run fails if the prediction does not exist yet
    check = f"assert 'predictions' not in str(folder) or os.path.exists({str(path)!r})"
    (tree / "train.py").write_text(OF_SWEEP.replace("behaviour =", f"{check}\nbehaviour ="))
    assert do("scaling_laws", GRID, PREDICT=wanted) == EXIT_COMPLETED
    prediction = json.loads(path.read_text())
    assert prediction["depth"] == depth and prediction["flops"] == pytest.approx(flops, rel=0.01)
    away = math.log(1000 * depth**2 / (0.2 * math.sqrt(flops)))
    expected = 1 + 2 * flops**-0.1 + 0.05 * away**2
    assert prediction["val_bpb"] == pytest.approx(expected, abs=1e-3)
    assert calls(tree)[-1] == f"o/predictions/{name}" and len(calls(tree)) == 21
    shown = capsys.readouterr().out
    assert "measured" in shown and abs(float(result(shown)[f"error_{name}"])) < 1e-3
    assert result(shown)[f"inside_{name}"] in ("true", "false")

    # the run exists: the prediction stays as it is, whatever is found now
    text = path.read_text().replace('"val_bpb"', '"was": 1, "val_bpb"')
    path.write_text(text)
    behave(tree)
    assert do("scaling_laws", GRID, PREDICT=wanted) == EXIT_COMPLETED
    assert do("scaling_laws", GRID) == EXIT_COMPLETED
    assert path.read_text() == text and calls(tree) == []
    # shown without PREDICT too
    assert f"error_{name}" in result(capsys.readouterr().out)
    path.unlink()
    assert do("scaling_laws", GRID, PREDICT=wanted) == EXIT_FAILED
    assert "a prediction after the run is worthless" in capsys.readouterr().out


def test_a_prediction_whose_run_was_not_started_is_replaced(tree, made_up_model):
    assert do("scaling_laws", GRID) == EXIT_COMPLETED
    path = tree / "o" / "predictions" / "d8.json"
    path.parent.mkdir()
    path.write_text('{"of": "fewer runs"}')
    assert do("scaling_laws", GRID, PREDICT="8") == EXIT_COMPLETED
    assert "from_runs" in json.loads(path.read_text())


def test_a_prediction_needs_laws(tree, made_up_model, capsys):
    lines = "".join(line + "\n" for line in GRID.splitlines() if line.startswith("1.6e9"))
    assert do("scaling_laws", lines, PREDICT="8") == EXIT_FAILED
    shown = capsys.readouterr().out
    assert "PREDICT=8: no prediction: 1 budgets" in shown and result(shown)["completed"] == "5"
    found = read_json("o/results.json", "")
    assert found["no_prediction"].startswith("PREDICT=8") and len(found["runs"]) == 5
    assert found["predictions"] == []


# ----- the scripts, with the stand-in


def test_scaling_laws_script(checkout):
    """20 runs with a known optimum."""
    environ = {"BUDGETS": "1e8 4e8 1.6e9 6.4e9", "DEPTHS": "1 2 3 4 6", "OUT": "sc"}
    done = script(checkout, "scaling_laws", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls(checkout) == [
        f"sc/{c}/d{d}" for c in environ["BUDGETS"].split() for d in environ["DEPTHS"].split()
    ]
    values = result(done.stdout)
    assert float(values["alpha"]) == pytest.approx(0.5, abs=1e-3)
    assert float(values["beta"]) == pytest.approx(0.5, abs=1e-3)
    assert float(values["ratio"]) == pytest.approx(1 / (6 * 0.04), rel=1e-2)
    assert float(values["E"]) == pytest.approx(1, abs=0.02)
    assert float(values["gamma"]) == pytest.approx(0.1, rel=0.05)
    assert values["budgets"] == "4" and values["failed"] == "0"
    assert (checkout / "sc" / "scaling_laws.png").exists()
    found = read_json(checkout / "sc" / "results.json", "")
    assert len(found["runs"]) == 20 and found["predictions"] == []
    assert found["fit"]["N_opt"]["exponent"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("words", [["--predict=zwei"], ["--predict", "zwei"]])
def test_the_script_passes_a_prediction_on(checkout, words):
    refused = script(checkout, "scaling_laws", *words)
    assert refused.returncode == 2 and "PREDICT=zwei: neither a depth" in refused.stderr
    assert calls(checkout) == []


def test_ablation_script(checkout):
    (checkout / "v.txt").write_text(
        "# a comment\n\nadamw: --optimizer=adamw\nbroken: --head-dim=8\n"
    )
    behave(checkout, out_ablation_broken_seed42=1)
    done = script(checkout, "ablation", "--depth=2", VARIANTS="v.txt", SEEDS="2")
    assert done.returncode == EXIT_FAILED
    assert calls(checkout) == [
        f"out/ablation/{name}/seed{seed}"
        for name in ("baseline", "adamw", "broken")
        for seed in (42, 43)
    ]
    values = result(done.stdout)
    # 0.1 for seed 42, 0.11 for seed 43
    assert float(values["adamw"]) == pytest.approx(0.105)
    assert float(values["broken"]) == pytest.approx(0) and values["failed"] == "1"
    adamw = read_json(checkout / "out" / "ablation" / "results.json", "")["variants"][1]
    assert adamw["difference"]["n"] == 2
    assert adamw["difference"]["se"] == pytest.approx(0.005)
    assert "FAILED: broken/seed42" in done.stdout and "1 of 2 failed" in done.stdout
    done = script(checkout, "ablation", VARIANTS="v.txt", OUT="other", TOY="1")
    assert done.returncode == 0
    assert read_json(checkout / "other" / "results.json", "")["runs"][0]["depth"] == 1
    (checkout / "v.txt").write_text("no colon here\n")
    assert script(checkout, "ablation", VARIANTS="v.txt").returncode == 2


@pytest.mark.parametrize(
    "name, arguments, variables, reason",
    [
        ("seeds", [], {"SEEDS": "x"}, "SEEDS=x: give how many"),
        ("ablation", [], {"SEEDS": "0"}, "SEEDS=0: give how many"),
        ("ablation", [], {"VARIANTS": "nowhere"}, "VARIANTS=nowhere: cannot be read"),
        ("scaling_laws", ["--predict"], {}, "--predict: give a depth"),
        ("landing", [], {"STEPS": "100"}, "STEPS=100: give a multiple of 400"),
        ("landing", [], {"STOPS": "20 90"}, "STOPS: at 90% the run ends before"),
        ("landing", [], {"STOPS": "20 33"}, "STOPS: 33: give multiples of 5"),
        ("landing", [], {"JOBS": "two"}, "STEPS, STOPS, JOBS: two is no number"),
    ],
)
def test_scripts_refuse_in_one_line(checkout, name, arguments, variables, reason):
    refused = script(checkout, name, *arguments, **variables)
    assert refused.returncode == 2 and calls(checkout) == []
    assert refused.stderr.startswith(f"{name}.sh: error: {reason}")
    assert refused.stderr.count("\n") == 1


def test_the_committed_variants_are_flags():
    lines = (ROOT / "runs" / "ablation.txt").read_text().splitlines()
    variants = [line.split(":", 1) for line in lines if not line.startswith("#")]
    assert len(variants) == 9
    for _, words in variants:
        args = flags.parse(["--depth=12", *words.split()])
        assert check_flags(args) == [] and args.given > {"depth"}


def test_seeds_script(checkout):
    done = script(checkout, "seeds", "--depth=3", SEEDS="4", OUT="s")
    assert done.returncode == 0, done.stderr
    assert calls(checkout) == [f"s/seed{seed}" for seed in (42, 43, 44, 45)]
    deviation = 0.001 * np.std([0, 1, 2, 3], ddof=1)
    assert float(result(done.stdout)["val_bpb_sd"]) == pytest.approx(deviation, rel=1e-3)
    assert result(done.stdout)["val_bpb_n"] == "4"


def test_miniseries_script(checkout):
    """`nanochat compare` gets the completed runs only; if it fails so does the script, after
    printing everything."""
    compare = checkout / "nanochat" / "apps" / "compare.py"
    compare.write_text("def main(argv):\n    print('compared', *argv)\n    return 0\n")
    behave(checkout, m_d3=2)
    done = script(checkout, "miniseries", "2", "3", "4", "--weight-decay=0", OUT="m")
    assert done.returncode == EXIT_FAILED and calls(checkout) == ["m/d2", "m/d3", "m/d4"]
    assert "compared m/d2 m/d4 --out=m/compare" in done.stdout and "d3: FAILED" in done.stdout
    assert set(result(done.stdout)) == {"runs", "completed", "failed", "d2_val_bpb", "d4_val_bpb"}

    compare.write_text("def main(argv):\n    return 1\n")
    behave(checkout)
    # without --weight-decay: other flags than the runs there have
    done = script(checkout, "miniseries", OUT="m", DEPTHS="2 4")
    assert done.returncode == 2 and "was started with other flags" in done.stderr
    done = script(checkout, "miniseries", "--weight-decay=0", OUT="m", DEPTHS="2 4")
    assert done.returncode == EXIT_FAILED and calls(checkout) == []
    assert "nanochat compare ended with exit code 1" in done.stderr
    assert result(done.stdout)["failed"] == "0"


# Stands for `nanochat jobs fork`: copies the parent, and notes what it was asked for.
FORK = """
import json, shutil
from pathlib import Path

def main(argv):
    parent, flags = Path(argv[1]), dict(word[2:].split("=") for word in argv[2:-1])
    assert (argv[0], argv[-1]) == ("fork", "--land")
    child = Path(flags["out-dir"]) / flags["tag"]
    shutil.copytree(parent, child)
    config = json.loads((child / "config.json").read_text()) | {"forked_from": flags["step"]}
    (child / "config.json").write_text(json.dumps(config))
    summary = json.loads((child / "summary.json").read_text()) | {"status": "stopped"}
    (child / "summary.json").write_text(json.dumps(summary))
    print("forked at", flags["step"])
    return 0
"""


def test_landing_script(checkout):
    """Two texts: the runs that are landed and planned first, then the forks, each once."""
    (checkout / "nanochat" / "apps" / "jobs" / "__init__.py").write_text(FORK)
    (checkout / "some-text.txt").write_text("text\n" * 1000)
    environ = {"STEPS": "200", "STOPS": "80", "DATA": "python some-text.txt", "OUT": "l"}
    environ |= {"DEPTH": "1", "JOBS": "2"}
    done = script(checkout, "landing", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    planned, landed = {"base", "planned-160"}, {"landed-160"}
    texts = ("python", "some-text")
    assert set(calls(checkout)[:4]) == {f"l/{text}/{run}" for text in texts for run in planned}
    assert set(calls(checkout)[4:]) == {f"l/{text}/{run}" for text in texts for run in landed}
    assert len(calls(checkout)) == 6 and done.stdout.count("forked at") == 2
    of_run = {
        row["name"]: row["flags"] for row in read_json(checkout / "l" / "results.json", "")["runs"]
    }
    assert of_run["python/base"][1:] == ["--num-iterations=200", "--save-every=10"]
    assert of_run["python/planned-160"][1:] == ["--num-iterations=184"]
    assert of_run["some-text/landed-160"] == ["--data=some-text.txt"]
    values = result(done.stdout)
    assert (values["pairs"], values["within"], values["failed"]) == ("2", "2", "0")
    behave(checkout)
    again = script(checkout, "landing", **environ)
    assert result(again.stdout) == values and calls(checkout) == []


# ----- real trainings


def real(folder, name, *words, **environ):
    """A script of this repository at toy size. Returns what it printed."""
    tree = folder / "tree"
    if not tree.exists():
        tree.mkdir()
        for part in ("nanochat", "tasks", "train.py"):
            (tree / part).symlink_to(ROOT / part)
        shutil.copytree(ROOT / "runs", tree / "runs")
        add_commands(tree)
    variables = {"PATH": path_of(tree), "TOY": "1", "PYTHONPATH": str(ROOT)}
    # it varies the text, and then takes it from the environment
    if name == "landing":
        variables["DATA"] = small.corpus(folder).removeprefix("--data=")
    else:
        words = (small.corpus(folder), *words)
    done = subprocess.run(
        ["bash", f"runs/{name}.sh", *words],
        cwd=tree,
        capture_output=True,
        text=True,
        env=small.environment() | variables | environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_seeds_really_trained(tmp_path):
    """Two toy runs, then once more: nothing is trained again."""
    first, second = (real(tmp_path, "seeds", "--num-iterations=20", SEEDS="2") for _ in range(2))
    assert result(first) == result(second)
    assert result(first)["val_bpb_n"] == "2" and float(result(first)["val_bpb_sd"]) > 0
    assert "training" in first and "training" not in second


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, completed",
    [("miniseries", "2"), ("scaling_laws", "12"), ("ablation", "10"), ("landing", "5")],
)
def test_scripts_at_toy_size(tmp_path, name, completed):
    values = result(real(tmp_path, name))
    assert values["completed"] == completed and values["failed"] == "0"
