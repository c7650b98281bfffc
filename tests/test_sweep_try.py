"""nanochat sweep try: the test by simulation, and trials with a stand-in for train.py."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import stand_in
from stand_in import OF_TRIAL

from nanochat.apps import sweep
from nanochat.apps.sweep import patched_source, trial
from nanochat.apps.sweep.sequential import Design, Noise, look, noise_of_runs
from nanochat.apps.sweep.settings import Settings
from nanochat.apps.sweep.train_runs import Stop
from nanochat.apps.sweep.trial_flags import METRICS, OTHER_SEED, build_parser
from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, UsageError, read_json
from nanochat.run import flags
from nanochat.run.checks import check_flags

ROOT = Path(__file__).resolve().parent.parent
# Standard deviations as shares of the mean, measured with 10 seeds of a model of depth 2, 64 wide,
# after 200 steps of 1,024 bytes of stories: of one configuration 0.0044 to 0.0051; of differences
# paired by seed 0.0007 (full context), 0.0024 (another rate), 0.0028 (6% more steps).
SEED_SD = 0.005
PAIR_SDS = (0.0007, 0.0024, 0.0028)
# the same on Python source, with 5% more steps
SOURCE_SEED_SD, SOURCE_PAIR_SD = 0.008, 0.0017
PATCH = """\
--- a/tests/test_new.py
+++ b/tests/test_new.py
@@ -1 +1 @@
-old
+new
--- a/train.py
+++ b/train.py
@@ -17,3 +17,3 @@
 seed = args["seed"]
-PATCHED = 0
+PATCHED = 0.03
 TOKENIZER = ""
"""


# ----- the test


def simulate(rng, gain, pair_sd, design, seed_sd=SEED_SD, aa=False, noise=None):
    """One trial of made-up runs: (verdict, pairs used)."""
    baselines, gains = [], []
    while True:
        # bits per byte of about 1; in an A/A pair the second run shares nothing with the first
        baselines.append(1 + rng.gauss(0, seed_sd))
        if aa:
            changed = 1 + rng.gauss(0, seed_sd)
        else:
            changed = baselines[-1] * (1 - gain) + rng.gauss(0, pair_sd)
        gains.append((baselines[-1] - changed) / baselines[-1])
        found = noise
        if found is None and len(gains) > 1:
            found = noise_of_runs(baselines, relative=True)
        seen = look(gains, design, found)
        if seen.verdict:
            return seen.verdict, seen.n


def shares(n, *args, **kwargs):
    """(share of keep, mean pairs / most pairs) of n simulated trials."""
    rng = random.Random(1)
    design = Design(8, 0.01)
    results = [simulate(rng, *args, design, **kwargs) for _ in range(n)]
    kept = sum(verdict == "keep" for verdict, _ in results)
    return kept / n, sum(used for _, used in results) / n / design.pairs


@pytest.mark.parametrize("known", [None, Noise(math.sqrt(2) * SEED_SD, 8)])
def test_unchanged_runs_are_hardly_ever_kept(known):
    """In A/A trials, and in trials of changes without effect. Of 60 trials more than three may be
    kept by chance: with 2% each in 3% of all series."""
    assert shares(4000, 0, 0, aa=True, noise=known)[0] <= 0.03
    for pair_sd in PAIR_SDS:
        assert shares(1000, 0, pair_sd, noise=known)[0] <= 0.005


def test_the_error_is_bounded_whatever_the_noise():
    """Also where the measured noise is far too small, or the change adds noise of its own."""
    for pair_sd in (0.001, 0.01, 0.1):
        assert shares(2000, 0, pair_sd, noise=Noise(1e-9, None))[0] <= 0.05


@pytest.mark.parametrize("pair_sd", PAIR_SDS)
def test_a_gain_of_one_percent_is_found_early(pair_sd):
    found, cost = shares(2000, 0.01, pair_sd)
    assert found >= 0.95 and cost <= 0.55
    # where seeds matter more, too
    found, cost = shares(1000, 0.01, SOURCE_PAIR_SD, seed_sd=SOURCE_SEED_SD)
    assert found >= 0.95 and cost <= 0.55
    # harm is recognized as early
    kept, cost = shares(500, -0.01, pair_sd)
    assert kept == 0 and cost <= 0.45


def test_a_difference_within_the_noise_floor_is_not_kept():
    """Three gains that agree by chance would pass Student's t."""
    gains = [0.002, 0.002001, 0.001999]
    design = Design(8, 0.01)
    assert look(gains, design, Noise(1e-6, None)).verdict == "keep"
    seen = look(gains, design, Noise(0.007, 8))
    assert seen.floor == pytest.approx(1.414924 * 0.007 / math.sqrt(3), rel=1e-5)
    # the bounds exclude a gain of 1% too
    assert seen.verdict == "reject" and seen.low > 0
    assert look(gains, replace(design, min_gain=0.005), Noise(1e-6, None)).verdict == "reject"


def test_looks():
    design = Design(8, 0.01)
    assert (design.first_look, design.level) == (3, pytest.approx(0.05 / 6))
    assert (Design(2, 0.01).first_look, Design(2, 0.01).level) == (2, 0.05)
    noise = Noise(0.007, None)
    for n in (1, 2):
        seen = look([0.02, 0.021][:n], design, noise)
        assert (seen.verdict, seen.low) == ("", None)
    seen = look([0.02, 0.021, 0.022], design, noise)
    # Student's t with 2 degrees of freedom: 7.650 at a level of 0.05 / 6
    t = 7.6488
    assert seen.low == pytest.approx(0.021 - t * 0.001 / math.sqrt(3), rel=1e-3)
    wide = [0.03, -0.02, 0.02, -0.01, 0.01, 0.015, 0.001, 0.002]
    assert look(wide[:7], design, noise).verdict == ""
    assert look(wide, design, noise).verdict == "undecided"


def test_gains_point_towards_better():
    assert METRICS["val/bpb"].gain(2.0, 1.9) == pytest.approx(0.05)
    assert METRICS["core"].gain(0.1, 0.12) == pytest.approx(0.02)
    assert METRICS["core"].in_words(0.02) == "+0.0200"
    assert noise_of_runs([1.0, 1.2], relative=False).sd == pytest.approx(0.2)


# ----- trials, with the stand-in


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder to work in, with a source tree whose train.py is the stand-in: a rate of 0.03
    gains 2%."""
    source = tmp_path / "sources"
    for name in ("nanochat", "tasks"):
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text("")
    (source / "train.py").write_text(OF_TRIAL)
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC", "RETRY", "TOY", "CORE_BUNDLE", "PREDICT"):
        monkeypatch.delenv(name, raising=False)
    behave()
    return tmp_path


def behave(codes=()):
    """What trainings do: {folder: exit code}. The list of calls begins anew."""
    stand_in.behave(Path(), {f"o/{folder}": code for folder, code in dict(codes).items()})


def calls():
    return stand_in.calls(Path())


def do(*words, **environ):
    """`nanochat sweep try o WORDS` in this process; returns the exit code."""
    args, given = build_parser().parse_known_args(["o", "--depth=1", "--aspect-ratio=128", *words])
    settings = Settings.read("try", args.folder, given, environ)
    settings = replace(settings, train_py=Path("sources/train.py").absolute(), pause=0.05)
    return trial.conduct(args, settings, Stop())


FASTER = "--change=--matrix-lr=0.03"


def test_a_gain_is_kept_and_the_runs_are_paired(tree, capsys):
    assert do(FASTER, "--json") == EXIT_COMPLETED
    shown = capsys.readouterr()
    verdict = json.loads(shown.out)
    used = verdict["pairs"]["used"]
    assert verdict["verdict"] == "keep" and 3 <= used < 8
    assert verdict["cost_share"] == used / 8
    names = [
        f"o/{side}/seed{42 + n}" for n in range(used) for side in ("baseline", "matrix-lr-0.03")
    ]
    assert calls() == names
    gain = verdict["gain"]
    assert gain["low"] < 0.02 < gain["high"] and gain["mean"] > verdict["noise"]["floor"]
    assert verdict["noise"]["runs"] == used and verdict["compute"]["flops"] == 1
    assert verdict["change"] == {"flags": ["--matrix-lr=0.03"], "patch": None, "aa": False}
    first = verdict["pairs"]["results"][0]
    assert first["gain"] == (first["baseline"] - first["changed"]) / first["baseline"]
    assert verdict == read_json("o/matrix-lr-0.03/verdict.json", "") and not verdict["warnings"]
    # people read what scripts do not
    assert "RESULT verdict=" in shown.err and shown.err.count("gain +") == used

    # another trial has the same baseline; the same one again trains nothing
    behave()
    assert do("--change=--matrix-lr=0.01") == EXIT_COMPLETED
    assert not any("baseline" in call for call in calls()[: 2 * used])
    assert "reject: worse than the baseline" in capsys.readouterr().out
    behave()
    assert do(FASTER, "--json") == EXIT_COMPLETED and calls() == []
    assert json.loads(capsys.readouterr().out) == verdict


def test_aa_and_measured_noise(tree, capsys):
    assert do("--measure-noise", "--seeds=6", "--json") == EXIT_COMPLETED
    noise = json.loads(capsys.readouterr().out)
    assert calls() == [f"o/baseline/seed{seed}" for seed in range(42, 48)]
    assert 0.002 < noise["noise"]["sd"] < 0.02 and noise["noise"]["runs"] == 6
    assert do("--aa", "--seeds=44,50,43") == EXIT_COMPLETED
    assert f"o/aa/seed{44 + OTHER_SEED}" in calls()
    verdict = read_json("o/aa/verdict.json", "")
    assert verdict["verdict"] in ("reject", "undecided")
    assert verdict["noise"]["sd"] == noise["noise"]["sd"]
    assert do("--aa", "--seeds=3", "--noise=0.001") == EXIT_COMPLETED
    verdict = read_json("o/aa/verdict.json", "")
    assert verdict["noise"]["runs"] is None
    with pytest.raises(UsageError, match=r"noise.json: was measured with other flags \(.*--depth"):
        do("--aa", "--seeds=60,61", "--dropout=0.1")


def test_a_patch_is_applied_to_a_copy(tree, capsys, monkeypatch):
    monkeypatch.setattr(trial, "provenance", lambda: {"git_commit": "decade"})
    (tree / "my.diff").write_text(PATCH)
    before = (tree / "sources" / "train.py").read_text()
    assert do("--patch=my.diff") == EXIT_COMPLETED
    assert (tree / "sources" / "train.py").read_text() == before
    shown = capsys.readouterr().out
    # the stand-in's commit is not that of the tree which the copy was made of
    assert "keep: gains +" in shown and "different versions of the code: " in shown
    (folder,) = (tree / "o").glob("patch-*")
    assert "PATCHED = 0.03" in (folder / "source" / "train.py").read_text()
    behave()
    assert do("--patch=my.diff") == EXIT_COMPLETED and calls() == []
    # other sources: the copy is made anew
    (tree / "sources" / "nanochat" / "__init__.py").write_text("# changed")
    assert do("--patch=my.diff", "--seeds=2") == EXIT_COMPLETED
    assert len(list((tree / "o").glob("patch-*"))) == 2


@pytest.mark.parametrize(
    "patch, reason",
    [
        (PATCH.replace("-PATCHED = 0\n", "-PATCHED = 7\n"), "does not apply .*patch failed"),
        (PATCH.split("--- a/train.py")[0], "changes nothing of train.py, nanochat, tasks"),
        ("words", "does not apply .*No valid patches"),
        (None, "my.diff: cannot be read"),
    ],
)
def test_a_patch_that_does_not_apply_is_refused(tree, patch, reason):
    if patch is not None:
        (tree / "my.diff").write_text(patch)
    with pytest.raises(UsageError, match=reason):
        do("--patch=my.diff")
    assert calls() == [] and not list(tree.glob("o/*/source"))


def test_a_patch_applies_inside_another_repository(tree):
    """git would otherwise take the paths for those of the repository around, and skip them."""
    subprocess.run(["git", "init", "-q"], check=True)
    (tree / "my.diff").write_text(PATCH)
    patched_source.copy_with_patch(tree / "sources", tree / "my.diff", tree / "copy")
    assert "PATCHED = 0.03" in (tree / "copy" / "train.py").read_text()


@pytest.mark.parametrize(
    "words, reason",
    [
        ([], "nothing to try: give --change"),
        (["--aa", FASTER], "--aa: changes only the seed"),
        (["--change=--tokenizer=char"], "--tokenizer: both runs of a pair must be measured on the"),
        (["--change=--data=python"], "--data: both runs.*give both --val-data"),
        (["--change=--eval-tokens=5 --val-data=x"], "--val-data, --eval-tokens: both runs"),
        (["--change=--eval-every=5"], "--eval-every: both runs"),
        (["--change=--seed=5"], "--seed pairs the runs"),
        (["--change=--depth=1"], "the baseline has these values too"),
        (["--change=--out-dir=x"], "--out-dir: the sweep sets this itself"),
        (["--change=--run='x"], "No closing quotation"),
        ([FASTER, "--seed=1"], "--seed: the sweep varies this"),
        ([FASTER, "--model-tag=x"], "--model-tag: the sweep sets this itself"),
        ([FASTER, "--eval-every=-1"], "--metric=val/bpb: --eval-every=-1 never measures it"),
        ([FASTER, "--metric=core", "--core-metric-every=-1"], "--core-metric-every=-1 never"),
        ([FASTER, "--gain=0"], "--gain=0.0: give a number above 0"),
        ([FASTER, "--gain=nan"], "--gain=nan: give a number above 0"),
        ([FASTER, "--min-gain=0.01"], "--min-gain=0.01: give 0 or more, and less than"),
        ([FASTER, "--noise=0"], "--noise=0.0: give a number"),
        ([FASTER, "--measure-noise"], "--measure-noise: trains the baseline"),
    ],
)
def test_refused_before_training(tree, words, reason):
    with pytest.raises(UsageError, match=reason):
        do(*words)
    assert calls() == [] and not Path("o").exists()


@pytest.mark.parametrize(
    "word",
    ["--seeds=1", "--seeds=x", "--seeds=42,42", "--seeds=101", "--metric=loss", "--depht=1"],
)
def test_refused_by_the_parser(tree, word, capsys):
    with pytest.raises(SystemExit, match="2"):
        do(FASTER, word)
    assert word.split("=")[0].removeprefix("--")[:5] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(tree):
    (tree / "o").write_text("no folder")
    with pytest.raises(UsageError, match="--out-dir=o/baseline: cannot be written") as refused:
        do(FASTER)
    # once for each side, not for every seed
    assert str(refused.value).count("\n") == 1


def test_a_failed_run_ends_the_trial(tree, capsys):
    behave({"matrix-lr-0.03/seed43": 1})
    assert do(FASTER, "--json") == EXIT_FAILED
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] == "failed" and "matrix-lr-0.03/seed43" in verdict["reason"]
    assert verdict["pairs"]["used"] == 1 and len(calls()) == 4
    behave()
    assert do(FASTER) == EXIT_FAILED and calls() == []
    assert do(FASTER, RETRY="1") == EXIT_COMPLETED and calls()[0] == "o/matrix-lr-0.03/seed43"
    # a run that completes without the metric is of no use either
    assert do(FASTER, "--metric=core", "--core-metric-every=5") == EXIT_FAILED
    assert "completed without core_metric" in capsys.readouterr().out


def test_scores_of_another_text_do_not_compare(tree, capsys):
    Path("sources/train.py").write_text(OF_TRIAL.replace('TOKENIZER = ""', "TOKENIZER = sys.argv"))
    assert do(FASTER) == EXIT_FAILED
    assert "seed42: has another tokenizer than the baseline" in capsys.readouterr().out


def test_more_computation_and_other_commits_are_named(tree, capsys):
    assert do("--change=--num-iterations=12 --run=beef", "--seeds=2") == EXIT_COMPLETED
    shown = capsys.readouterr().out
    assert "warning: the change trains with 1.20 times the FLOPs" in shown
    assert "different versions of the code: beef, c0ffee" in shown


def test_a_stopped_trial_continues(tree, capsys):
    behave({"baseline/seed43": 75})
    assert do(FASTER, "--json") == EXIT_STOPPED
    shown = capsys.readouterr()
    assert shown.out == "" and "stopped; start it again to continue" in shown.err
    assert not Path("o/matrix-lr-0.03/verdict.json").exists()
    behave()
    assert do(FASTER) == EXIT_COMPLETED and calls()[0] == "o/baseline/seed43"


def test_ctrl_c_reaches_the_training(tree):
    """The command itself, in a process of its own, with the stand-in."""
    behave({"baseline/seed42": "wait"})
    start = """
import dataclasses, sys
from pathlib import Path
from nanochat.apps.sweep import main
from nanochat.apps.sweep.settings import Settings
read = Settings.read
stand_in = Path("sources/train.py").absolute()
Settings.read = lambda *args: dataclasses.replace(read(*args), train_py=stand_in)
sys.exit(main(sys.argv[1:]))
"""
    words = ["try", "o", "--depth=1", "--aspect-ratio=128", FASTER, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("waiting").exists():
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, err
    assert out == "" and read_json("o/baseline/seed42/summary.json", "")["status"] == "stopped"


def test_help_needs_no_torch():
    code = "import sys; from nanochat.apps.sweep import main; main(['try', '--help'])"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    with pytest.raises(SystemExit, match="0"):
        sweep.main(["try", "--help"])


def test_the_trials_script(tmp_path):
    """What it asks for and sums up, without any training."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
[ "$2" = nanochat ] || exec {sys.executable} "$@"
echo "$@" >> {tmp_path}/calls
case "$*" in
    *measure-noise*) echo RESULT noise=0.01 runs=8 ;;
    *--aa*) echo 'RESULT verdict="reject" gain=-0.01 pairs=4 cost=0.5' ;;
    *) echo 'RESULT verdict="keep" gain=0.012 pairs=3 cost=0.375' ;;
esac
"""
    )
    fake.chmod(0o755)
    environ = {"PYTHON": str(fake), "TRIALS": "4", "POOL": "9", "OUT": str(tmp_path / "out")}
    script = ["bash", str(ROOT / "runs" / "trials.sh"), "--data=x"]
    done = subprocess.run(script, env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "RESULT trials=4 aa_keep=0.0000 aa_cost=0.5000 planted_found=1.0000 planted_cost=0.3750 "
        "planted_gain=0.01200"
    )
    asked = (tmp_path / "calls").read_text().splitlines()
    assert len(asked) == 9 and asked[0].count(",") == 8
    assert all(f"sweep try {tmp_path}/out --num-iterations=200" in call for call in asked)
    assert asked[5].endswith("--change=--num-iterations=210")
    args, given = build_parser().parse_known_args(asked[1].split()[4:])
    assert args.aa and len(args.seeds) == 8 and set(args.seeds) <= set(range(42, 51))
    assert check_flags(flags.parse([*given, "--data=python"])) == []
    refused = subprocess.run(
        script, env=os.environ | environ | {"POOL": "7"}, capture_output=True, text=True
    )
    assert refused.returncode == 2 and "POOL=7: a trial needs 8 seeds" in refused.stderr
