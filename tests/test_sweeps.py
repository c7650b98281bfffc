"""The sweep scripts of runs/: what they train and skip, what they say of failures, and the laws that they find."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, UsageError, read_json
from nanochat.run import plots

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runs"))
import scaling_fit  # noqa: E402
import sweep  # noqa: E402
import sweep_results  # noqa: E402

# Stands for train.py: notes its call, does what behave.json says for its folder's end (an exit code, "wait" until it is told to stop,
# or None: complete), and leaves a run folder with a made-up loss: 1 + 2 C^-0.1 at the best N = 0.2 sqrt(C), a parabola around it.
TRAINER = """
import json, math, os, signal, sys
sys.path.pop(0)
import train
from pathlib import Path
args = train.parse_args()
folder = Path(args.out_dir) / args.model_tag
with open("calls", "a") as calls:
    calls.write(str(folder) + "\\n")
behaviour = json.loads(Path("behave.json").read_text())
code = behaviour.get(str(folder), 0)
def leave(status, code, **more):
    if status:
        n = 1000 * args.depth**2
        flops = args.target_flops if args.target_flops != -1 else 6 * n * 20 * n
        tokens = round(flops / (6 * n))
        loss = 1 + 2 * flops**-0.1 + 0.05 * math.log(n / (0.2 * math.sqrt(flops))) ** 2 + 0.001 * (args.seed - 42)
        loss += 0.1 * (args.optimizer == "adamw") * (1 + 0.1 * (args.seed - 42))
        given = {k: v for k, v in vars(args).items() if k != "given"}
        (folder / "config.json").write_text(json.dumps({"format": 1, "args": given, "seed": args.seed, "model": {
            "width": 64 * args.depth, "vocab_size": 257}, "data": {"tokens_per_epoch": 1e12}, "plan": {"parameters": {"total": 2 * n},
            "scaling_parameters": n, "flops_per_token": 6 * n, "num_iterations": 10}}))
        (folder / "summary.json").write_text(json.dumps({"status": status, "reason": more.get("reason", ""), "step": 10, "tokens": tokens,
            "total_training_time": 2.0 * args.depth, "val_bpb": loss if status == "completed" else None, "min_val_bpb": None,
            "core_metric": None, "core_metric_n": None}))
    os._exit(code)
signal.signal(signal.SIGTERM, lambda *_: leave("stopped", 75))
if code == "wait":
    Path("waiting").touch()
    signal.pause()
if code == 2:
    print("train.py: error: --depth=9: made up", file=sys.stderr)
leave({0: "completed", 1: "failed", 75: "stopped"}.get(code), code, reason="TrainingFailed: made up" if code == 1 else "")
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with the scripts, and the stand-in for train.py, which sweep.py in this process and the scripts then start."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "runs" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."')
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(
        sweep, "check_flags", lambda args: []
    )  # the stand-in trains depth 1 with heads of 128
    monkeypatch.chdir(tmp_path)
    for name in (
        "NPROC",
        "RETRY",
        "TOY",
        "CORE_BUNDLE",
        "PREDICT",
        "OUT",
        "DEPTHS",
        "BUDGETS",
        "SEEDS",
        "VARIANTS",
    ):
        monkeypatch.delenv(name, raising=False)
    behave(tmp_path)
    return tmp_path


def behave(tree, **codes):
    """What trainings do: {folder, with _ for /: exit code}. The list of calls begins anew."""
    (tree / "behave.json").write_text(
        json.dumps({folder.replace("_", "/"): code for folder, code in codes.items()})
    )
    (tree / "calls").write_text("")


def calls(tree):
    return (tree / "calls").read_text().split()


def do(kind, lines, *flags, **environ):
    """A sweep in this process; returns the exit code."""
    return sweep.main([kind, "o", *flags], lines, environ, sweep.Stop())


def script(tree, name, *arguments, **environ):
    """One of the scripts, with the stand-in. Returns the finished process."""
    arguments = (
        arguments if name == "ablation" else (*arguments, "--aspect-ratio=128")
    )  # then depth 1 has room for a head of 128
    return subprocess.run(
        ["bash", f"runs/{name}.sh", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}"} | environ,
    )


def result(text):
    """The last line as a dict."""
    words = text.strip().splitlines()[-1].split()
    assert words[0] == "RESULT"
    return dict(word.split("=") for word in words[1:])


# ----- the laws

BUDGETS = [1e16, 4e16, 1.6e17, 6.4e17]


def surface(budgets, noise=0.0, seed=0, floor=0.6, span=1.5, shift=0.3, depths=4):
    """Points on parabolas around N_opt = 0.1 C^0.48, with loss floor + 500 C^-0.2 there, and D = C / 6N."""
    generator, points = np.random.default_rng(seed), []
    for flops in budgets:
        for x in np.linspace(-span, span, depths) + shift:
            n = 0.1 * flops**0.48 * math.exp(x)
            points.append(
                {
                    "budget": f"{flops:g}",
                    "flops": flops,
                    "N": n,
                    "tokens": flops / (6 * n),
                    "loss": floor
                    + 500 * flops**-0.2
                    + 0.05 * x**2
                    + noise * generator.standard_normal(),
                }
            )
    return points


def test_laws_are_recovered_without_noise():
    found, _ = scaling_fit.fit_points(surface(BUDGETS, noise=1e-9))
    assert found["N_opt"]["exponent"] == pytest.approx(0.48, abs=1e-5) and found["N_opt"][
        "factor"
    ] == pytest.approx(0.1, rel=1e-3)
    assert found["D_opt"]["exponent"] == pytest.approx(0.52, abs=1e-5) and found["D_opt"][
        "factor"
    ] == pytest.approx(1 / 0.6, rel=1e-3)
    assert found["ratio"]["tokens_per_parameter"] == pytest.approx(
        np.mean(1) / 0.06 * np.exp(np.mean(np.log(BUDGETS)) * 0.04), rel=1e-4
    )
    law = found["loss"]
    assert (
        law["form"] == "E + A C^-gamma"
        and law["gamma"] == pytest.approx(0.2, rel=0.005)
        and law["E"] == pytest.approx(0.6, abs=1e-3)
    )
    assert law["A"] == pytest.approx(500, rel=0.05)
    assert float(scaling_fit.loss_at(found, 1e17)) == pytest.approx(
        0.6 + 500 * 1e17**-0.2, abs=1e-4
    )
    assert float(scaling_fit.optimum(found, "N_opt", 1e18)) == pytest.approx(
        0.1 * 1e18**0.48, rel=1e-3
    )
    assert scaling_fit.best_budget(found, 0.1 * 3e17**0.48) == pytest.approx(3e17, rel=1e-2)


def test_minima_of_a_surface_that_is_no_parabola():
    """E + A / N^0.34 + B / D^0.30, whose N_opt goes with C^(0.30 / 0.64)."""
    points = [
        {
            "budget": f"{c:g}",
            "flops": c,
            "N": n,
            "tokens": c / (6 * n),
            "loss": 0.6 + 30 * n**-0.34 + 60 * (c / (6 * n)) ** -0.3,
        }
        for c in BUDGETS
        for n in np.geomspace(3e6, 1.2e8, 6)
    ]
    found, _ = scaling_fit.fit_points(points)
    assert found["N_opt"]["exponent"] == pytest.approx(0.30 / 0.64, abs=0.03)
    assert found["D_opt"]["exponent"] == pytest.approx(0.34 / 0.64, abs=0.03)
    assert found["loss"]["E"] == pytest.approx(0.6, abs=0.1)


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    """Of 60 noisy sweeps about 95% have the truth inside."""
    monkeypatch.setattr(scaling_fit, "DRAWS", 500)
    inside = {"alpha": 0, "beta": 0, "ratio": 0, "prediction": 0}
    generator, flops = np.random.default_rng(7), 2.5e18
    for seed in range(60):
        found, draws = scaling_fit.fit_points(surface(BUDGETS, noise=0.003, seed=seed, depths=5))
        for name, low, high, truth in (
            ("alpha", *found["N_opt"]["exponent_95"], 0.48),
            ("beta", *found["D_opt"]["exponent_95"], 0.52),
            (
                "ratio",
                *found["ratio"]["interval_95"],
                np.exp(np.mean(np.log(BUDGETS)) * 0.04) / 0.06,
            ),
            (
                "prediction",
                *scaling_fit.predict(found, draws, flops, 0.1 * flops**0.48)["interval_95"],
                0.6 + 500 * flops**-0.2 + 0.003 * generator.standard_normal(),
            ),
        ):
            inside[name] += low <= truth <= high
    assert all(count >= 50 for count in inside.values()), inside
    width = np.subtract(*found["N_opt"]["exponent_95"][::-1])
    assert 0.005 < width < 0.2  # neither of them says nothing


def test_the_same_runs_give_the_same_intervals():
    first, second = (scaling_fit.fit_points(surface(BUDGETS, noise=0.003))[0] for _ in range(2))
    assert first == second
    json.dumps(first, allow_nan=False)


def test_a_minimum_outside_the_depths_is_left_out_and_said():
    points = (
        surface(BUDGETS, noise=1e-6)
        + surface([2.56e18], noise=1e-6, shift=-2.5)
        + surface([2.5e15], noise=1e-6, shift=2.5)
    )
    found, _ = scaling_fit.fit_points(points)
    shown = scaling_fit.in_words(found)
    assert [b["budget"] for b in found["budgets"] if b["N_opt"] is None] == ["2.5e+15", "2.56e+18"]
    assert (
        "budget 2.56e+18 is left out: the minimum is NOT inside the range of depths" in shown
        and "add deeper models" in shown
    )
    assert (
        "budget 2.5e+15 is left out: the minimum is NOT inside the range of depths" in shown
        and "add shallower models" in shown
    )
    assert found["N_opt"]["exponent"] == pytest.approx(0.48, abs=1e-3)


def test_too_few_minima_give_no_law():
    found, draws = scaling_fit.fit_points(
        surface(BUDGETS[:1]) + surface(BUDGETS[1:], span=0.5, shift=2)
    )
    assert (
        draws is None
        and found["N_opt"] is None
        and "no power laws: 1 budgets" in scaling_fit.in_words(found)
    )
    with pytest.raises(UsageError, match="1 budgets"):
        scaling_fit.predict(found, draws, 1e18, 1e6)


def test_budgets_with_two_runs_or_a_hill_have_no_minimum():
    hill = [point | {"loss": -point["loss"]} for point in surface([1e15])]
    found, _ = scaling_fit.fit_points(surface(BUDGETS, noise=1e-6) + surface([1e19])[:2] + hill)
    reasons = {b["budget"]: b["left_out"] for b in found["budgets"] if b["left_out"]}
    assert (
        "2 completed runs" in reasons["1e+19"]
        and "opens downwards" in reasons["1e+15"]
        and len(reasons) == 2
    )


def test_three_depths_a_budget_have_no_interval():
    found, draws = scaling_fit.fit_points(surface(BUDGETS, depths=3))
    assert (
        draws is None
        and found["noise"] is None
        and found["N_opt"]["exponent"] == pytest.approx(0.48, abs=1e-6)
    )
    assert "give four depths" in found["intervals"]
    assert scaling_fit.predict(found, None, 1e18, 0.1 * 1e18**0.48)["interval_95"] is None


@pytest.mark.parametrize(
    "points, why",
    [
        (surface(BUDGETS[:3], noise=1e-4), "3 budgets"),
        (surface(BUDGETS, noise=0.02, span=2.5, seed=3), "down to 0"),
        (surface(BUDGETS, noise=1e-4, floor=0), "down to 0"),
    ],
    ids=["three_budgets", "noise", "no_floor"],
)
def test_a_floor_that_cannot_be_determined_is_not_claimed(points, why):
    found, draws = scaling_fit.fit_points(points)
    law = found["loss"]
    assert law["E"] is None and law["form"] == "A C^-gamma" and why in law["why_line"]
    assert law["why_line"] in scaling_fit.in_words(found)
    if why == "down to 0" and found["noise"] < 0.001:
        assert (
            law["gamma"] == pytest.approx(0.2, abs=0.005)
            and law["gamma_95"][0] < 0.2 < law["gamma_95"][1]
        )


def test_predictions_reach_as_far_as_the_floor_that_is_not_known():
    """Losses that flatten out, with too much noise to tell E: the truth beyond the budgets is above the line of ln L against ln C."""
    flops, inside, claimed = 4 * BUDGETS[-1], 0, 0
    best = 0.1 * flops**0.48
    for seed in range(40):
        found, draws = scaling_fit.fit_points(surface(BUDGETS, noise=0.01, seed=seed, depths=6))
        claimed += found["loss"]["E"] is not None
        low, high = scaling_fit.predict(found, draws, flops, best)["interval_95"]
        inside += low <= 0.6 + 500 * flops**-0.2 <= high
    assert claimed <= 20 and inside >= 36


def test_a_model_beside_the_optimum_is_predicted_worse():
    found, draws = scaling_fit.fit_points(surface(BUDGETS, noise=1e-5))
    best = 0.1 * 1e18**0.48
    at_best, beside = (scaling_fit.predict(found, draws, 1e18, n) for n in (best, 2 * best))
    assert beside["val_bpb"] - at_best["val_bpb"] == pytest.approx(
        0.05 * math.log(2) ** 2, rel=0.02
    )
    assert beside["interval_95"][0] < beside["val_bpb"] < beside["interval_95"][1]


def test_flat_noisy_losses_stay_numbers():
    found, draws = scaling_fit.fit_points(
        surface(BUDGETS, noise=0.2, span=0.3, shift=0, seed=5) + surface([1e18, 2e18], noise=0.01)
    )
    json.dumps(found, allow_nan=False)
    scaling_fit.in_words(found)


def test_picture(tmp_path):
    found, draws = scaling_fit.fit_points(
        surface(BUDGETS, noise=0.003) + surface([2e18], span=0.5, shift=-2)
    )
    prediction = {"flops": 2e18, **scaling_fit.predict(found, draws, 2e18, 0.1 * 2e18**0.48)}
    for name, fit, predictions in (
        ("a", found, [prediction | {"measured": None}, prediction | {"measured": 0.7}]),
        ("b", scaling_fit.fit_points(surface(BUDGETS, span=0.5, shift=2))[0], []),
    ):
        scaling_fit.draw_picture(fit, predictions, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 2

    def ticks(figure):
        scaling_fit._draw_laws(figure, found, [prediction | {"measured": 0.7}])
        figure.canvas.draw()
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            shown.extend(label.get_text() for label in axis.get_ticklabels(which="both"))

    shown = []
    plots.png(ticks, 16, 6)
    assert (
        "$" not in "".join(shown) and {"1e17", "2e17"} & set(shown) and {"10M", "100M"} & set(shown)
    )


# ----- tables


def row(name, val_bpb, status="completed", core=None, seconds=10.0):
    return {
        "name": name,
        "status": status,
        "val_bpb": val_bpb,
        "core_metric": core,
        "seconds": seconds,
        "flops": 1e9,
    }


def test_noise_is_of_completed_runs():
    found = sweep_results.noise(
        [row("a", 1.0), row("b", 1.2), row("c", 9.0, "failed"), row("d", 1.4, core=0.5)]
    )
    assert found["val_bpb"] == {"mean": pytest.approx(1.2), "sd": pytest.approx(0.2), "n": 3}
    assert found["core_metric"] == {"mean": 0.5, "sd": None, "n": 1}
    assert sweep_results.noise([])["val_bpb"] == {"mean": None, "sd": None, "n": 0}


def test_ablation_is_paired_by_seed():
    """A difference that is the same for every seed has no error, however far the seeds are apart."""
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
    baseline, x, y, z = sweep_results.ablation(rows)
    assert baseline["difference"] is None and baseline["val_bpb"]["mean"] == 2.0
    assert x["difference"] == {
        "mean": pytest.approx(0.1),
        "se": pytest.approx(0, abs=1e-12),
        "reach": pytest.approx(0, abs=1e-10),
        "n": 2,
    }
    assert x["status"] == "1 of 3 failed"
    assert (
        x["core_difference"]["mean"] == pytest.approx(0.03)
        and x["seconds_difference"]["mean"] == 5.0
    )
    se = 0.1 / math.sqrt(3)
    assert y["difference"] == {
        "mean": pytest.approx(0.2),
        "se": pytest.approx(se),
        "reach": pytest.approx(4.302653 * se),
        "n": 3,
    }
    assert (
        z["difference"] == {"mean": None, "se": None, "reach": None, "n": 0}
        and z["status"] == "1 of 1 stopped"
    )
    shown = sweep_results.ablation_table([baseline, x, y, z])
    assert "+0.2000 ± 0.2484" in shown and "+50.0 ± 0.0%" in shown and "1 of 3 failed" in shown


def test_result_line():
    assert (
        sweep_results.result_line(runs=1, failed=0, a=None, b=0.123456789, c=True)
        == "RESULT runs=1 failed=0 a=null b=0.123457 c=true"
    )


# ----- what is trained, skipped, resumed, tried again

LINES = "d1: --depth=1\nd2: --depth=2\nd3: --depth=3\n"


def test_completed_runs_are_skipped_and_failures_shown(tree, capsys):
    behave(tree, o_d1=1, o_d2=2)
    assert do("seeds", LINES) == EXIT_FAILED
    shown = capsys.readouterr().out
    assert (
        "d1: FAILED" in shown and "d2: FAILED" in shown and "d3: completed" in shown
    )  # the rest went on
    assert result(shown) == {
        "runs": "3",
        "completed": "1",
        "failed": "2",
        "val_bpb_mean": result(shown)["val_bpb_mean"],
        "val_bpb_sd": "null",
        "val_bpb_n": "1",
    }
    runs = read_json("o/results.json", "")["runs"]
    assert [run["status"] for run in runs] == ["failed", "failed", "completed"]
    assert (
        "TrainingFailed: made up" in runs[0]["reason"] and "--depth=9: made up" in runs[1]["reason"]
    )
    assert (
        runs[2]["depth"] == 3
        and runs[2]["scaling_parameters"] == 9000
        and runs[2]["flops"] == 6 * 9000 * 180000
    )
    assert (
        runs[2]["seconds"] == 6.0 and runs[2]["width"] == 192 and runs[2]["flags"] == ["--depth=3"]
    )

    behave(tree)
    assert do("seeds", LINES) == EXIT_FAILED and calls(tree) == []  # what failed stays failed
    assert (
        "d1: failed earlier (TrainingFailed: made up); RETRY=1 tries again"
        in capsys.readouterr().out
    )
    assert do("seeds", LINES, RETRY="1") == EXIT_COMPLETED and calls(tree) == ["o/d1", "o/d2"]
    assert "FAILED" not in capsys.readouterr().out
    behave(tree)
    assert do("seeds", LINES) == EXIT_COMPLETED and calls(tree) == []


def test_a_failure_that_another_process_tried_again_is_not_tried_a_third_time(tree):
    behave(tree, o_d1=2)
    do("seeds", "d1: --depth=1")
    (run,) = sweep.parse_lines("d1: --depth=1", Path("o"), [])
    before = {"d1": sweep_results.facts(run.path)["failed_at"]}
    for _ in range(2):
        assert sweep.attend(run, 1, before, sweep.Stop())
    assert calls(tree) == ["o/d1", "o/d1"]


def test_a_killed_training_is_a_failure(tree, capsys):
    (tree / "train.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert do("seeds", "d1: --depth=1") == EXIT_FAILED
    assert "ended by signal 9" in capsys.readouterr().out


def test_a_stop_ends_the_sweep_and_it_goes_on_from_there(tree, capsys):
    behave(tree, o_d2=75)
    assert do("seeds", LINES) == EXIT_STOPPED and calls(tree) == ["o/d1", "o/d2"]
    assert "RESULT" not in capsys.readouterr().out
    assert [run["status"] for run in read_json("o/results.json", "")["runs"]] == [
        "completed",
        "stopped",
        "not started",
    ]
    behave(tree)
    assert do("seeds", LINES) == EXIT_COMPLETED and calls(tree) == ["o/d2", "o/d3"]


def test_a_run_that_died_is_resumed(tree):
    do("seeds", "d1: --depth=1")
    summary = tree / "o" / "d1" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "running"}))
    behave(tree)
    assert do("seeds", "d1: --depth=1") == EXIT_COMPLETED and calls(tree) == ["o/d1"]


@pytest.mark.parametrize("lock", [".sweep.lock", ".lock"], ids=["of_a_sweep", "of_train.py"])
def test_a_run_that_another_process_has_is_left_to_it(tree, monkeypatch, capsys, lock):
    """It is looked at again at the end; here the other process ends when this one waits for it."""
    do("seeds", "d2: --depth=2")
    (tree / "o" / "d2" / "summary.json").write_text(json.dumps({"status": "running"}))
    behave(tree)
    held = open(tree / "o" / "d2" / lock, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(sweep.time, "sleep", lambda _: held.close())
    assert do("seeds", LINES) == EXIT_COMPLETED
    assert calls(tree) == ["o/d1", "o/d3", "o/d2"]
    assert capsys.readouterr().out.count("waiting for d2, which another process has") == 1


def test_training_keeps_its_run_when_the_sweep_is_killed(tree):
    """The lock is train.py's too, so that a sweep that is started at once does not begin the run a second time."""
    behave(tree, o_d1="wait")
    process = subprocess.Popen(
        [sys.executable, "runs/sweep.py", "seeds", "o"],
        cwd=tree,
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    process.stdin.write("d1: --depth=2")
    process.stdin.close()
    child = waiting_child(tree, process)
    process.kill()
    process.wait()
    (run,) = sweep.parse_lines("d1: --depth=2", Path("o"), [])
    assert sweep.attend(run, 1, {}, sweep.Stop()) is False
    os.kill(child, signal.SIGKILL)


def waiting_child(tree, process):
    """The process that waits to be told to stop, once it does."""
    while not (tree / "waiting").exists():
        assert process.poll() is None
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training(tree, number):
    behave(tree, out_seeds_seed43="wait")
    process = subprocess.Popen(
        ["bash", "runs/seeds.sh"],
        cwd=tree,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}"},
    )
    waiting_child(tree, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, err
    assert (
        "stopped; started again it goes on" in out and "RESULT" not in out and "FAILED" not in out
    )
    assert calls(tree) == ["out/seeds/seed42", "out/seeds/seed43"]
    assert json.loads((tree / "out/seeds/seed43/summary.json").read_text())["status"] == "stopped"


def test_a_stop_under_torchrun_is_told_by_the_summary(tree, monkeypatch):
    """torchrun ends with 1 whatever its workers end with; a summary of an earlier start says nothing of this one."""
    stopped = tree / "stopped.py"
    stopped.write_text(
        TRAINER.replace("leave({0:", 'if args.depth == 1: leave("stopped", 1)\nleave({0:')
    )
    monkeypatch.setattr(
        sweep,
        "command",
        lambda run, nproc: [
            sys.executable,
            str(stopped if nproc == 2 else tree / "train.py"),
            *run.argv,
        ],
    )
    assert do("seeds", LINES, NPROC="2") == EXIT_STOPPED and calls(tree) == ["o/d1"]
    stopped.write_text("import sys; sys.exit(1)")
    assert do("seeds", "d1: --depth=1", NPROC="2") == EXIT_FAILED


def test_torchrun_is_used_for_more_than_one_process():
    (run,) = sweep.parse_lines("a/d1: --depth=1", Path("o"), ["--seed=3"])
    one, two = sweep.command(run, 1), sweep.command(run, 2)
    assert one[1].endswith("train.py") and one[2:] == [
        "--seed=3",
        "--depth=1",
        "--out-dir=o/a",
        "--model-tag=d1",
        "--resume",
    ]
    assert (
        two[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        and two[5:] == one[1:]
    )


# ----- what is refused before anything is trained


@pytest.mark.parametrize(
    "kind, lines, flags, environ, said",
    [
        ("seeds", LINES, ["--model-tag=x"], {}, "--model-tag: the sweep sets that itself"),
        (
            "seeds",
            LINES,
            ["--out-dir=x", "--resume"],
            {},
            "--out-dir, --resume: the sweep sets that itself",
        ),
        ("seeds", "seed42: --seed=42", ["--seed=1"], {}, "--seed: that is what the sweep varies"),
        (
            "ablation",
            "a/seed42: --seed=42",
            ["--seed=1"],
            {},
            "--seed: that is what the sweep varies",
        ),
        ("miniseries", LINES, ["--depth=1"], {}, "--depth: that is what the sweep varies"),
        (
            "scaling_laws",
            "1e9/d1: --depth=1 --target-flops=1e9",
            ["--num-iterations=3"],
            {},
            "the horizon of a run is its budget",
        ),
        (
            "scaling_laws",
            "1e9/d1: --depth=1 --target-flops=1e9",
            [],
            {"PREDICT": "1e8"},
            "not larger than the budgets",
        ),
        (
            "scaling_laws",
            "1e9/d1: --depth=1 --target-flops=1e9",
            [],
            {"PREDICT": "x"},
            "neither a depth",
        ),
        ("seeds", "d1: --out-dir=x", [], {}, "d1: --out-dir: the sweep sets that itself"),
        ("seeds", "no colon", [], {}, "no run: 'no colon'"),
        ("seeds", "../x: --depth=1", [], {}, "no run"),
        ("seeds", "", [], {}, "no runs"),
        ("seeds", "a: --depth=1\na: --depth=2", [], {}, "two runs of the same name: a"),
        ("seeds", LINES, [], {"NPROC": "x"}, "NPROC=x"),
        ("seeds", LINES, [], {"RETRY": "yes"}, "RETRY=yes"),
        ("else", LINES, [], {}, "usage"),
    ],
)
def test_refused(tree, kind, lines, flags, environ, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        do(kind, lines, *flags, **environ)
    assert calls(tree) == [] and not (tree / "o").exists()


def test_an_unknown_flag_is_refused_before_anything_is_trained(tree):
    with pytest.raises(SystemExit, match="2"):
        do("ablation", "baseline/seed42: --seed=42\nx/seed42: --no-such-flag --seed=42")
    assert calls(tree) == []


def test_runs_of_other_flags_are_not_mixed_in(tree):
    """Changed, added and left out flags; those that do not change what a run becomes are free."""
    assert do("seeds", LINES, "--dropout=0.1") == EXIT_COMPLETED
    behave(tree)
    for flags in (
        [],
        ["--dropout=0.2"],
        ["--dropout=0.1", "--weight-decay=0"],
        ["--dropout=0.1", "--target-tokens=100"],
    ):
        with pytest.raises(UsageError, match="was started with other flags"):
            do("seeds", LINES, *flags)
    assert (
        do("seeds", LINES, "--dropout=0.1", "--device-batch-size=1", "--eval-every=7")
        == EXIT_COMPLETED
    )
    assert calls(tree) == []


# ----- the four scripts, with the stand-in


def test_scaling_laws_script(tree):
    """20 runs with a known optimum."""
    environ = {"BUDGETS": "1e8 4e8 1.6e9 6.4e9", "DEPTHS": "1 2 3 4 6", "OUT": "sc"}
    done = script(tree, "scaling_laws", **environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert calls(tree) == [
        f"sc/{c}/d{d}" for c in environ["BUDGETS"].split() for d in environ["DEPTHS"].split()
    ]
    values = result(done.stdout)
    assert float(values["alpha"]) == pytest.approx(0.5, abs=1e-3) and float(
        values["beta"]
    ) == pytest.approx(0.5, abs=1e-3)
    assert float(values["ratio"]) == pytest.approx(1 / (6 * 0.04), rel=1e-2)
    assert float(values["E"]) == pytest.approx(1, abs=0.02) and float(
        values["gamma"]
    ) == pytest.approx(0.1, rel=0.05)
    assert (
        (tree / "sc" / "scaling_laws.png").exists()
        and values["budgets"] == "4"
        and values["failed"] == "0"
    )
    found = read_json(tree / "sc" / "results.json", "")
    assert len(found["runs"]) == 20 and found["fit"]["N_opt"]["exponent"] == pytest.approx(
        0.5, abs=1e-3
    )
    assert found["predictions"] == []
    for words in (["--predict=zwei"], ["--predict", "zwei"]):
        refused = script(tree, "scaling_laws", *words, **environ)
        assert refused.returncode == 2 and "PREDICT=zwei: neither a depth" in refused.stderr


def made_up_model(monkeypatch):
    """The N of the stand-in, 1000 x depth^2, for models that are planned."""
    from nanochat.model import gpt as model
    from nanochat.run import plan

    monkeypatch.setattr(plan, "model_config", lambda args, vocab_size: args.depth)
    monkeypatch.setattr(
        model,
        "meta_model",
        lambda depth: type(
            "Model",
            (),
            {
                "scaling_parameters": lambda self: 1000 * depth**2,
                "flops_per_token": lambda self: 6000 * depth**2,
            },
        )(),
    )


GRID = "".join(
    f"{c}/d{d}: --target-flops={c} --depth={d}\n"
    for c in ("1e8", "4e8", "1.6e9", "6.4e9")
    for d in (1, 2, 3, 4, 6)
)


@pytest.mark.parametrize(
    "wanted, name, depth, flops", [("8", "d8", 8, (8000 * 8 / 0.2) ** 2), ("1e11", "1e11", 8, 1e11)]
)
def test_predictions_come_before_their_run_and_stand(
    tree, monkeypatch, capsys, wanted, name, depth, flops
):
    made_up_model(monkeypatch)
    wait_for = tree / "o" / "predictions" / f"{name}.json"
    # the trainer of the predicted run fails if the prediction is not there yet
    check = f"assert 'predictions' not in str(folder) or os.path.exists({str(wait_for)!r})"
    (tree / "train.py").write_text(TRAINER.replace("behaviour =", f"{check}\nbehaviour ="))
    assert do("scaling_laws", GRID, PREDICT=wanted) == EXIT_COMPLETED
    prediction = json.loads(wait_for.read_text())
    if wanted == "8":
        flops = (1000 * 64 / 0.2) ** 2
    assert prediction["depth"] == depth and prediction["flops"] == pytest.approx(flops, rel=0.01)
    away = math.log(1000 * depth**2 / (0.2 * math.sqrt(flops)))
    assert prediction["val_bpb"] == pytest.approx(1 + 2 * flops**-0.1 + 0.05 * away**2, abs=1e-3)
    assert calls(tree)[-1] == f"o/predictions/{name}" and len(calls(tree)) == 21
    shown = capsys.readouterr().out
    assert "measured" in shown and abs(float(result(shown)[f"error_{name}"])) < 1e-3
    assert result(shown)[f"inside_{name}"] in ("true", "false")

    # the run exists: the prediction stays as it is, whatever is found now
    text = wait_for.read_text().replace('"val_bpb"', '"was": 1, "val_bpb"')
    wait_for.write_text(text)
    behave(tree)
    assert (
        do("scaling_laws", GRID, PREDICT=wanted) == EXIT_COMPLETED
        and do("scaling_laws", GRID) == EXIT_COMPLETED
    )
    assert wait_for.read_text() == text and calls(tree) == []
    assert f"error_{name}" in result(capsys.readouterr().out)  # shown without PREDICT too
    wait_for.unlink()
    assert do("scaling_laws", GRID, PREDICT=wanted) == EXIT_FAILED
    assert "a prediction after the run is none" in capsys.readouterr().out


def test_a_prediction_that_was_not_begun_is_made_anew(tree, monkeypatch):
    made_up_model(monkeypatch)
    assert do("scaling_laws", GRID) == EXIT_COMPLETED
    (tree / "o" / "predictions").mkdir()
    (tree / "o" / "predictions" / "d8.json").write_text('{"of": "fewer runs"}')
    assert do("scaling_laws", GRID, PREDICT="8") == EXIT_COMPLETED
    assert "from_runs" in json.loads((tree / "o" / "predictions" / "d8.json").read_text())


def test_a_prediction_needs_laws(tree, monkeypatch, capsys):
    made_up_model(monkeypatch)
    lines = "".join(line + "\n" for line in GRID.splitlines() if line.startswith("1.6e9"))
    assert do("scaling_laws", lines, PREDICT="8") == EXIT_FAILED
    shown, found = capsys.readouterr().out, read_json("o/results.json", "")
    assert "PREDICT=8: no prediction: 1 budgets" in shown and result(shown)["completed"] == "5"
    assert (
        found["no_prediction"].startswith("PREDICT=8")
        and len(found["runs"]) == 5
        and found["predictions"] == []
    )


def test_what_cannot_be_trained_is_found_before_anything_is(tree, monkeypatch):
    from nanochat.run import plan

    monkeypatch.setattr(sweep, "check_flags", plan.check_flags)
    with pytest.raises(UsageError, match="d2: --n-kv-head=3: does not divide"):
        do("seeds", "d4: --depth=4\nd2: --depth=2 --n-kv-head=3\n")
    with pytest.raises(UsageError, match="No closing quotation"):
        do("seeds", "d2: --depth=2 '--run=x\n")
    (tree / "o").write_text("no folder")
    with pytest.raises(UsageError, match="cannot be written"):
        do("seeds", "d2: --depth=2\n")
    assert calls(tree) == []


def test_ablation_script(tree):
    (tree / "v.txt").write_text("# a comment\n\nadamw: --optimizer=adamw\nbroken: --head-dim=8\n")
    behave(tree, **{"out_ablation_broken_seed42": 1})
    done = script(tree, "ablation", "--depth=2", VARIANTS="v.txt", SEEDS="2")
    assert done.returncode == EXIT_FAILED
    assert calls(tree) == [
        f"out/ablation/{name}/seed{seed}"
        for name in ("baseline", "adamw", "broken")
        for seed in (42, 43)
    ]
    values = result(done.stdout)
    # 0.1 for seed 42, 0.11 for seed 43
    assert (
        float(values["adamw"]) == pytest.approx(0.105)
        and float(values["broken"]) == pytest.approx(0)
        and values["failed"] == "1"
    )
    adamw = read_json(tree / "out" / "ablation" / "results.json", "")["variants"][1]
    assert adamw["difference"]["n"] == 2 and adamw["difference"]["se"] == pytest.approx(0.005)
    assert "FAILED: broken/seed42" in done.stdout and "1 of 2 failed" in done.stdout
    done = script(tree, "ablation", VARIANTS="v.txt", OUT="other", TOY="1")
    assert (
        done.returncode == 0
        and read_json(tree / "other" / "results.json", "")["runs"][0]["depth"] == 1
    )
    (tree / "v.txt").write_text("no colon here\n")
    assert script(tree, "ablation", VARIANTS="v.txt").returncode == 2


@pytest.mark.parametrize(
    "name, arguments, variables, says",
    [
        ("seeds", [], {"SEEDS": "x"}, "SEEDS=x: give how many"),
        ("ablation", [], {"SEEDS": "0"}, "SEEDS=0: give how many"),
        ("ablation", [], {"VARIANTS": "nowhere"}, "VARIANTS=nowhere: cannot be read"),
        ("scaling_laws", ["--predict"], {}, "--predict: give a depth"),
    ],
)
def test_scripts_refuse_in_one_line(tree, name, arguments, variables, says):
    refused = script(tree, name, *arguments, **variables)
    assert (
        refused.returncode == 2
        and refused.stderr.startswith(f"{name}.sh: error: {says}")
        and refused.stderr.count("\n") == 1
    )
    assert calls(tree) == []


def test_the_committed_variants_are_flags():
    import train
    from nanochat.run.plan import check_flags

    names = [
        line.split(":", 1)
        for line in (ROOT / "runs" / "ablation.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(names) == 9
    for _, flags in names:
        args = train.parse_args(["--depth=12", *flags.split()])
        assert check_flags(args) == [] and args.given > {"depth"}


def test_seeds_script(tree):
    done = script(tree, "seeds", "--depth=3", SEEDS="4", OUT="s")
    assert done.returncode == 0, done.stderr
    assert calls(tree) == [f"s/seed{seed}" for seed in (42, 43, 44, 45)]
    assert float(result(done.stdout)["val_bpb_sd"]) == pytest.approx(
        0.001 * np.std([0, 1, 2, 3], ddof=1), rel=1e-3
    )
    assert result(done.stdout)["val_bpb_n"] == "4"


def test_miniseries_script(tree):
    """`nanochat compare` gets the complete runs only; if it fails the script does, after saying everything."""
    behave(tree, m_d3=2)
    (tree / "nanochat").mkdir()
    (tree / "nanochat" / "__init__.py").touch()
    (tree / "nanochat" / "__main__.py").write_text("import sys; print('compared', *sys.argv[1:])")
    code = script(tree, "miniseries", "2", "3", "4", "--weight-decay=0", OUT="m")
    assert code.returncode == EXIT_FAILED and calls(tree) == ["m/d2", "m/d3", "m/d4"]
    assert (
        "compared compare m/d2 m/d4 --out=m/compare" in code.stdout and "d3: FAILED" in code.stdout
    )
    assert set(result(code.stdout)) == {"runs", "completed", "failed", "d2_val_bpb", "d4_val_bpb"}
    (tree / "nanochat" / "__main__.py").write_text("import sys; sys.exit(1)")
    behave(tree)
    code = script(
        tree, "miniseries", OUT="m", DEPTHS="2 4"
    )  # no --weight-decay: other flags than the runs there have
    assert code.returncode == 2 and "was started with other flags" in code.stderr
    code = script(tree, "miniseries", "--weight-decay=0", OUT="m", DEPTHS="2 4")
    assert (
        code.returncode == EXIT_FAILED
        and calls(tree) == []
        and "nanochat compare ended with exit code 1" in code.stderr
    )
    assert result(code.stdout)["failed"] == "0"


def test_the_environment_becomes_flags():
    nproc, retry, flags, predict = sweep.settings(
        {"NPROC": "8", "RETRY": "1", "CORE_BUNDLE": "b", "PREDICT": "10"}
    )
    assert (nproc, retry, predict) == (8, True, "10") and flags == [
        "--core-bundle=b",
        "--core-metric-every=1000000000",
    ]
    assert (
        sweep.settings({}) == (1, False, [], "")
        and sweep.settings({"TOY": "1"})[2] == sweep.TOY_FLAGS
    )


# ----- real trainings


def test_seeds_really_trained(tmp_path):
    """Two toy runs, then once more: nothing is trained again."""
    shown = [real(tmp_path, "seeds", "--num-iterations=20", SEEDS="2") for _ in range(2)]
    assert (
        result(shown[0]) == result(shown[1])
        and result(shown[0])["val_bpb_n"] == "2"
        and float(result(shown[0])["val_bpb_sd"]) > 0
    )
    assert "training" in shown[0] and "training" not in shown[1]


def real(folder, name, *flags, **environ):
    """A script of this repository at toy size, its environment being the one that runs the tests. Returns what it printed."""
    tree = folder / "tree"
    if not tree.exists():
        tree.mkdir()
        for part in ("nanochat", "tasks", "train.py"):
            (tree / part).symlink_to(ROOT / part)
        shutil.copytree(ROOT / "runs", tree / "runs", ignore=shutil.ignore_patterns("__pycache__"))
        (tree / "runs" / "setup.sh").write_text('cd "$(dirname "${BASH_SOURCE[0]}")/.."')
        (tree / "bin").mkdir()
        (tree / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (tree / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", f"runs/{name}.sh", small.corpus(folder), *flags],
        cwd=tree,
        capture_output=True,
        text=True,
        env=small.environment()
        | {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}", "TOY": "1", "PYTHONPATH": str(ROOT)}
        | environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, completed", [("miniseries", "2"), ("scaling_laws", "12"), ("ablation", "10")]
)
def test_scripts_at_toy_size(tmp_path, name, completed):
    values = result(real(tmp_path, name))
    assert values["completed"] == completed and values["failed"] == "0"
