"""Trains the runs of a sweep one after another, then shows what came of them. Called by the sweep scripts beside it.

usage: python runs/sweep.py KIND FOLDER [flags of every train.py] < lines "name: flags of this run"

Each line is one `train.py --out-dir=FOLDER/... --model-tag=... --resume`, in the order of the lines, its console in train.log in the
run's folder. Started again it skips what is complete, resumes what was interrupted, and leaves failed runs alone unless RETRY=1.
Several processes may work on one FOLDER: a run that another one has is left to it, and looked at again at the end.
From the environment: NPROC (above 1: torchrun), RETRY=1, TOY=1 (toy size), CORE_BUNDLE (measure CORE at the end of each run), and
for scaling_laws PREDICT (a depth, such as 10, or a budget in FLOPs, such as 2e13).
Exit codes: 0, 75 stopped (start again to go on), 2 wrong usage, 1 if any run failed. FOLDER/results.json has everything as data."""

import fcntl
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import train
from nanochat.apps.sweep import results as sweep_results
from nanochat.apps.sweep import scaling_fit
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UsageError,
    human_time,
    read_json,
    write_json,
)
from nanochat.run.log import status_of
from nanochat.run.plan import check_flags

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("miniseries", "scaling_laws", "seeds", "ablation")
TOY_FLAGS = [
    "--device-type=cpu",
    "--dtype=float32",
    "--no-compile",
    "--aspect-ratio=16",
    "--head-dim=16",
    "--max-seq-len=32",
    "--tokenizer=byte",
    "--total-batch-size=256",
    "--data=python",
    "--eval-tokens=2000",
    "--sample-every=-1",
]
NOT_YOURS = {
    "out_dir",
    "model_tag",
    "resume",
    "resume_from_step",
    "overwrite",
    "dry_run",
    "json",
    "gpus",
    "gpu",
}
AT_THE_END = 10**9  # as --core-metric-every: after the last step only
PAUSE_SECONDS = 2  # between looks at runs that another process has
DEPTHS = 1000  # the deepest model that train.py takes; a larger PREDICT is a budget


@dataclass
class Run:
    """One line: name (such as d4, or 1e18/d4), the flags of this run alone, its run folder, and all flags of its train.py."""

    name: str
    flags: list
    path: Path
    argv: list


class Stop:
    """Signals that ask to stop. They are handed on to the training that runs, which saves and ends.

    SIGTERM is what it gets, whatever came: Ctrl-C reaches it from the terminal too, and a second SIGINT would end it unsaved."""

    def __init__(self):
        self.asked, self.child = False, None

    def listen(self):
        """From now on the signals come here."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, self._note)

    def _note(self, *_):
        self.asked = True
        if self.child is not None:
            self.child.send_signal(signal.SIGTERM)

    def call(self, command, log, keep_open):
        """Run a command with its output in a file; returns its exit code. keep_open: file that it inherits, with its lock."""
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[keep_open.fileno()],
        )
        if self.asked:  # it came before there was a child to tell
            self.child.send_signal(signal.SIGTERM)
        try:
            return self.child.wait()
        finally:
            self.child = None


def parse_lines(text, folder, common):
    """The Runs of lines "name: flags". Raises UsageError for lines that are none, and for a name that stands twice."""
    runs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = re.fullmatch(r"((?:\w[\w.+-]*/)?\w[\w.+-]*)\s*:(.*)", line)
        if not match:
            raise UsageError(
                f"no run: {line!r}; write NAME: FLAGS, the name of letters, digits and . _ + -"
            )
        try:
            flags = shlex.split(match[2])
        except ValueError as error:
            raise UsageError(f"no run: {line!r}: {error}; close the quotation") from None
        runs.append(make_run(folder, match[1], flags, common))
    if twice := {run.name for run in runs if [other.name for other in runs].count(run.name) > 1}:
        raise UsageError(f"two runs of the same name: {', '.join(sorted(twice))}")
    if not runs:
        raise UsageError("there are no runs to do")
    return runs


def make_run(folder, name, flags, common):
    path = folder / name
    return Run(
        name,
        flags,
        path,
        [*common, *flags, f"--out-dir={path.parent}", f"--model-tag={path.name}", "--resume"],
    )


def check(kind, runs, given):
    """Refuse flags that a sweep sets itself, and folders whose runs were started with other flags. given: flags for every run."""
    yours, problems = train.parse_args(given).given, []
    if wrong := yours & NOT_YOURS:
        problems.append(
            f"{_names(wrong)}: the sweep sets that itself; the folder of its runs is OUT=..."
        )
    if kind == "scaling_laws" and (
        wrong := {name for name in yours if name.startswith("target_")} | yours & {"num_iterations"}
    ):
        problems.append(f"{_names(wrong)}: the horizon of a run is its budget; give BUDGETS=...")
    for run in runs:
        args = train.parse_args(run.argv)  # ends the process with 2 for a flag that there is not
        problems += [f"{run.name}: {problem}" for problem in check_flags(args)]
        own = train.parse_args(run.flags).given
        if own & NOT_YOURS:
            problems.append(f"{run.name}: {_names(own & NOT_YOURS)}: the sweep sets that itself")
        if (
            wrong := own & yours & ({"seed"} if kind == "ablation" else own)
        ):  # a variant may change what the others have
            problems.append(f"{run.name}: {_names(wrong)}: that is what the sweep varies")
        if (run.path / "config.json").exists() and (differing := differences(run, args)):
            problems.append(
                f"{run.path} was started with other flags ({', '.join(differing)}); give those, another OUT=..., or delete it"
            )
    if problems:
        raise UsageError("\n".join(dict.fromkeys(problems)))


def _names(flags):
    return ", ".join("--" + name.replace("_", "-") for name in sorted(flags))


def differences(run, args):
    """Flags whose value in a run's config.json is not the one asked for now, those left out that do not change what it becomes."""
    from nanochat.run.resume import FREE_ON_RESUME

    was = read_json(run.path / "config.json", "run folder")["args"]
    free = (FREE_ON_RESUME - {"data", "val_data"}) | {"config"}
    # what --init-from takes over from its source stands in config.json and was not given
    return [
        f"{_names([name])}={value}, now {getattr(args, name)}"
        for name, value in was.items()
        if name not in free
        and getattr(args, name, None) != value
        and not (args.init_from and name not in args.given)
    ]


def command(run, nproc):
    """The command line that trains a run."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        if nproc > 1
        else []
    )
    return [sys.executable, *torchrun, str(ROOT / "train.py"), *run.argv]


def attend(run, nproc, to_retry, stop, before=None):
    """Train one run to its end if it is to be trained. Returns False if another process has it.

    to_retry: {name: failed_at} of failed runs to start again. before: called with the run held, before it is trained."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.path / ".sweep.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if before:
            before()
        state = sweep_results.facts(run.path)
        if state["status"] == "running":  # started by hand, or by a sweep that was killed
            return False
        if state["status"] == "failed" and to_retry.get(run.name) != state["failed_at"]:
            print(
                f"{run.name}: failed earlier ({state['reason']}); RETRY=1 tries again", flush=True
            )
        elif state["status"] != "completed":
            _train(run, state["status"], nproc, stop, lock)
        return True


def _train(run, was, nproc, stop, lock):
    """Start train.py and wait. A failure is noted in the run's folder; a stop is noted in `stop`."""
    failure, log_path = run.path / sweep_results.FAILURE, run.path / "train.log"
    failure.unlink(missing_ok=True)
    before, began = _written(run.path / "summary.json"), time.monotonic()
    print(
        f"{run.name}: training{'' if was == 'not started' else f', which was {was}'}; {log_path}",
        flush=True,
    )
    with open(log_path, "ab") as log:
        at = log.tell()
        code = stop.call(command(run, nproc), log, lock)
    told = status_of(run.path) if _written(run.path / "summary.json") != before else None
    # torchrun ends with 1 whatever its workers end with
    stop.asked |= code == EXIT_STOPPED or nproc > 1 and code != 0 and told == "stopped"
    state = sweep_results.facts(run.path)
    took = human_time(time.monotonic() - began)
    if code == 0 and state["status"] == "completed":
        bpb = "" if state["val_bpb"] is None else f", val_bpb {state['val_bpb']:.4f}"
        print(f"{run.name}: completed in {took}{bpb}", flush=True)
    elif not stop.asked:
        reason = state["reason"] if told == "failed" else _last_words(log_path, at)
        reason = f"ended by signal {-code}" if code < 0 else reason or f"exit code {code}"
        write_json(failure, {"reason": reason, "exit_code": code, "at": time.time()})
        print(f"{run.name}: FAILED after {took}: {reason}", flush=True)


def _written(path):
    """What tells one version of a file that is replaced as a whole from the next; None if there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _last_words(path, start):
    """What train.py said last in its log from byte `start` on, in at most 300 characters: for people, where no summary tells more."""
    with open(path, "rb") as log:
        log.seek(start)
        lines = [
            line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()
        ]
    at = max(
        (i for i, line in enumerate(lines) if line.startswith("train.py:")), default=len(lines) - 1
    )
    return " ".join(lines[max(at, 0) :][:3])[:300]


def train_all(runs, nproc, to_retry, stop, before=None):
    """Train what is left of the runs, in order; returns when all are done by this process or another, or when told to stop."""
    waiting = False
    while runs and not stop.asked:
        held = []
        for run in runs:
            if stop.asked:
                return
            if not attend(run, nproc, to_retry, stop, before):
                held.append(run)
        if held and not waiting and not stop.asked:
            print(
                f"waiting for {', '.join(run.name for run in held)}, which another process has",
                flush=True,
            )
        waiting, runs = bool(held), held
        if held and not stop.asked:
            time.sleep(PAUSE_SECONDS)


def series(folder, rows, extra):
    """The end of miniseries: `nanochat compare` of the complete runs, its pictures in FOLDER/compare. Returns (values for RESULT,
    whether all went well)."""
    done = sweep_results.completed(rows)
    values = {f"{row['name']}_val_bpb": row["val_bpb"] for row in done}
    values |= {
        f"{row['name']}_core": row["core_metric"] for row in done if row["core_metric"] is not None
    }
    if not done:
        return values, True
    code = subprocess.run(
        [
            sys.executable,
            "-m",
            "nanochat",
            "compare",
            *(row["path"] for row in done),
            f"--out={folder / 'compare'}",
        ],
        cwd=ROOT,
    ).returncode
    if code:
        print(f"nanochat compare ended with exit code {code}", file=sys.stderr)
    return values, code == 0


def seeds(folder, rows, extra):
    """The end of seeds: mean and standard deviation. Returns as series()."""
    extra["noise"] = noise = sweep_results.noise(rows)
    for name, what in noise.items():
        if what["n"]:
            spread = (
                "one run has no spread"
                if what["sd"] is None
                else f"standard deviation {what['sd']:.5f}"
            )
            print(f"{name}: mean {what['mean']:.5f}, {spread}, n = {what['n']}")
    return {
        f"{name}_{key}": value
        for name, what in noise.items()
        if what["n"]
        for key, value in what.items()
    }, True


def ablation(folder, rows, extra):
    """The end of ablation: differences to the baseline. Returns as series()."""
    extra["variants"] = variants = sweep_results.ablation(rows)
    print(sweep_results.ablation_table(variants))
    return {
        "baseline": variants[0]["val_bpb"]["mean"],
        **{entry["name"]: entry["difference"]["mean"] for entry in variants[1:]},
    }, True


def points_of(rows):
    """The completed runs of a scaling sweep as scaling_fit takes them; those without a val_bpb are left out."""
    return [
        {
            "budget": row["name"].split("/")[0],
            "flops": row["flops"],
            "N": row["scaling_parameters"],
            "tokens": row["tokens"],
            "loss": row["val_bpb"],
        }
        for row in sweep_results.completed(rows)
        if row["val_bpb"] is not None
    ]


def predicted(folder):
    """Every prediction in folder/predictions with what was measured since: measured, error and inside are null before the run."""
    found = []
    for path in sorted((folder / "predictions").glob("*.json")):
        prediction, run = read_json(path, "prediction"), sweep_results.facts(path.with_suffix(""))
        measured = run["val_bpb"] if run["status"] == "completed" else None
        interval = prediction["interval_95"]
        found.append(
            {
                **prediction,
                "run": str(path.with_suffix("")),
                "status": run["status"],
                "reason": run["reason"],
                "measured": measured,
                "error": None if measured is None else measured - prediction["val_bpb"],
                "inside": None
                if measured is None or interval is None
                else interval[0] <= measured <= interval[1],
            }
        )
    return found


def is_depth(wanted):
    """Whether PREDICT names a depth; False for a budget. UsageError for what is neither."""
    if wanted.isdigit() and 0 < int(wanted) <= DEPTHS:
        return True
    try:
        if DEPTHS < float(wanted) < math.inf and re.fullmatch(r"[\w.+-]+", wanted):
            return False
    except ValueError:
        pass  # said below, with numbers that are no budget
    raise UsageError(
        f"PREDICT={wanted}: neither a depth, such as 10, nor a budget in FLOPs, such as 2e13"
    )


def plan_prediction(wanted, result, draws, rows, common):
    """The prediction for a depth or a budget (text), to be written before its run: its depth, flops, N, tokens and expected val_bpb.

    A depth is predicted at the budget whose best model it is; a budget at the depth whose N is nearest to the best. UsageError if the
    runs give no power law."""
    from nanochat.model.build import meta_model
    from nanochat.run.plan import model_config

    if result["N_opt"] is None:
        raise UsageError(f"PREDICT={wanted}: no prediction: {result['why_not']}")
    done = sweep_results.completed(rows)
    vocabulary = read_json(Path(done[0]["path"]) / "config.json", "run folder")["model"][
        "vocab_size"
    ]

    def model(depth):
        return meta_model(model_config(train.parse_args([*common, f"--depth={depth}"]), vocabulary))

    if is_depth(wanted):
        depth = int(wanted)
        flops = scaling_fit.best_budget(result, model(depth).scaling_parameters())
    else:
        flops, depth = float(wanted), min(row["depth"] for row in done)
        wished = scaling_fit.optimum(result, "N_opt", flops)
        while depth < DEPTHS and model(depth + 1).scaling_parameters() < wished:
            depth += 1
        depth = min(
            (depth, depth + 1), key=lambda d: abs(math.log(model(d).scaling_parameters() / wished))
        )
    flops = float(f"{flops:.6g}")
    n = model(depth).scaling_parameters()
    return {
        "request": wanted,
        "depth": depth,
        "flops": flops,
        "scaling_parameters": n,
        "tokens": flops / model(depth).flops_per_token(),
        **scaling_fit.predict(result, draws, flops, n),
        "law": {name: result[name] for name in ("N_opt", "D_opt", "loss", "intervals")},
        "from_runs": [row["name"] for row in done],
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def predict_and_train(wanted, folder, result, draws, rows, common, nproc, to_retry, stop):
    """Write folder/predictions/WANTED.json, then train that run. A prediction whose run was started is never changed."""
    path = folder / "predictions" / f"{'d' if is_depth(wanted) else ''}{wanted}.json"
    run_path = path.with_suffix("")
    path.parent.mkdir(exist_ok=True)

    def started():
        return any((run_path / name).exists() for name in ("config.json", "train.log"))

    if started() and not path.exists():
        raise UsageError(
            f"{run_path} holds a run and there is no {path}: a prediction after the run is none; delete the run, or leave "
            "PREDICT out"
        )
    # how deep and how large the run is follows from the prediction, and that of a run that was started stands
    prediction = (
        read_json(path, "prediction")
        if started()
        else plan_prediction(wanted, result, draws, rows, common)
    )
    interval = prediction["interval_95"]
    print(
        f"predicted for depth {prediction['depth']} at {prediction['flops']:.3g} FLOPs: val_bpb {prediction['val_bpb']:.4f}"
        + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else " (the noise is unknown)")
        + f"; {path}",
        flush=True,
    )
    run = make_run(
        folder,
        f"predictions/{run_path.name}",
        [f"--depth={prediction['depth']}", f"--target-flops={prediction['flops']!r}"],
        common,
    )
    check("scaling_laws", [run], [])
    if interrupted := [row["name"] for row in rows if row["status"] == "failed"]:
        print(f"without the failed runs {', '.join(interrupted)}", flush=True)
    train_all(
        [run], nproc, to_retry, stop, before=lambda: started() or write_json(path, prediction)
    )


def scaling(folder, rows, extra, result):
    """The end of scaling_laws: laws, predictions and picture. result: fit_points()'s. Returns values for RESULT."""
    print(scaling_fit.in_words(result))
    extra["fit"], extra["predictions"] = result, predicted(folder)
    for p in extra["predictions"]:
        text = f"depth {p['depth']} at {p['flops']:.3g} FLOPs: predicted {p['val_bpb']:.4f}"
        text += (
            f" ({p['interval_95'][0]:.4f} to {p['interval_95'][1]:.4f})" if p["interval_95"] else ""
        )
        text += (
            f", {p['status']}"
            if p["measured"] is None
            else f", measured {p['measured']:.4f}, error {p['error']:+.4f}"
        )
        print(
            text
            + {None: "", True: ": inside the interval", False: ": OUTSIDE the interval"}[
                p["inside"]
            ]
        )
    if result["budgets"]:
        scaling_fit.draw_picture(result, extra["predictions"], folder / "scaling_laws.png")
        print(f"picture: {folder / 'scaling_laws.png'}")
    values = {
        "budgets": sum(b["N_opt"] is not None for b in result["budgets"]),
        "budgets_left_out": sum(bool(b["left_out"]) for b in result["budgets"]),
    }
    for name, what in (("alpha", "N_opt"), ("beta", "D_opt")):
        law = result[what] or {"exponent": None}
        low, high = law.get("exponent_95") or (None, None)
        values |= {name: law["exponent"], f"{name}_low": low, f"{name}_high": high}
    ratio = result["ratio"] or {"tokens_per_parameter": None, "interval_95": None}
    low, high = ratio["interval_95"] or (None, None)
    values |= {"ratio": ratio["tokens_per_parameter"], "ratio_low": low, "ratio_high": high}
    loss = result["loss"] or {"E": None, "gamma": None}
    values |= {"E": loss["E"], "gamma": loss["gamma"]}
    for p in extra["predictions"]:
        label = Path(p["run"]).name
        values |= {
            f"predicted_{label}": p["val_bpb"],
            f"error_{label}": p["error"],
            f"inside_{label}": p["inside"],
        }
    return values


def settings(environ):
    """NPROC, RETRY, TOY, CORE_BUNDLE and PREDICT of the environment as (nproc, retry, flags for every run, predict)."""
    if not environ.get("NPROC", "1").isdigit() or environ.get("NPROC") == "0":
        raise UsageError(f"NPROC={environ['NPROC']}: give the number of processes of a run")
    for name in ("RETRY", "TOY"):
        if environ.get(name, "") not in ("", "0", "1"):
            raise UsageError(f"{name}={environ[name]}: give 1, or leave it out")
    bundle = environ.get("CORE_BUNDLE", "")
    flags = TOY_FLAGS if environ.get("TOY") == "1" else []
    flags = [
        *flags,
        *([f"--core-bundle={bundle}", f"--core-metric-every={AT_THE_END}"] if bundle else []),
    ]
    return (
        int(environ.get("NPROC", "1")),
        environ.get("RETRY") == "1",
        flags,
        environ.get("PREDICT", ""),
    )


def main(argv, lines, environ, stop):
    """Do a sweep. Returns the exit code; raises UsageError."""
    if len(argv) < 2 or argv[0] not in KINDS:
        raise UsageError(f"usage: python runs/sweep.py {'|'.join(KINDS)} FOLDER [flags] < lines")
    kind, folder, given = argv[0], Path(argv[1]), argv[2:]
    nproc, retry, common, wanted = settings(environ)
    common = [*common, *given]
    runs = parse_lines(lines, folder, common)
    check(kind, runs, given)
    if (
        wanted
        and not is_depth(wanted)
        and float(wanted)
        <= (largest := max(train.parse_args(run.flags).target_flops for run in runs))
    ):
        raise UsageError(
            f"PREDICT={wanted}: not larger than the budgets that are run, up to {largest:g} FLOPs"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()  # now, not after hours of training
    except OSError as error:
        raise UsageError(
            f"OUT={folder}: cannot be written ({error.strerror}); name another folder"
        ) from None
    # as they are now: what another process tries again and fails is not tried a third time
    predictions = [
        make_run(folder, f"predictions/{path.stem}", [], common)
        for path in (folder / "predictions").glob("*.json")
    ]
    to_retry = (
        {
            row["name"]: row["failed_at"]
            for row in sweep_results.collect([*runs, *predictions])
            if row["status"] == "failed"
        }
        if retry
        else {}
    )
    print(
        f"{kind}: {len(runs)} runs in {folder}: {', '.join(run.name for run in runs)}", flush=True
    )
    train_all(runs, nproc, to_retry, stop)
    rows, extra = sweep_results.collect(runs), {}
    if kind == "scaling_laws" and not stop.asked:
        result, draws = scaling_fit.fit_points(points_of(rows))
        if wanted:
            try:
                predict_and_train(
                    wanted, folder, result, draws, rows, common, nproc, to_retry, stop
                )
            except UsageError as error:  # what was trained is told all the same
                extra["no_prediction"] = str(error)
    print(sweep_results.table(rows), flush=True)
    record = {"sweep": kind, "flags": common, "processes_a_run": nproc, "runs": rows}
    if stop.asked:
        write_json(folder / "results.json", record)
        print("stopped; started again it goes on from here", flush=True)
        return EXIT_STOPPED
    well = "no_prediction" not in extra
    if kind == "scaling_laws":
        values = scaling(folder, rows, extra, result)
    else:
        values, well = {"miniseries": series, "seeds": seeds, "ablation": ablation}[kind](
            folder, rows, extra
        )
    write_json(folder / "results.json", {**record, **extra})
    if "no_prediction" in extra:
        print(extra["no_prediction"])
    failed = [
        row["name"]
        for row in [
            *rows,
            *({"name": p["run"], "status": p["status"]} for p in extra.get("predictions", [])),
        ]
        if row["status"] == "failed"
    ]
    if failed:
        print(f"FAILED: {', '.join(failed)} (RETRY=1 tries again)")
    print(f"results: {folder / 'results.json'}")
    print(
        sweep_results.result_line(
            runs=len(rows),
            completed=len(sweep_results.completed(rows)),
            failed=len(failed),
            **values,
        ),
        flush=True,
    )
    return EXIT_COMPLETED if well and not failed else EXIT_FAILED


if __name__ == "__main__":
    stop = Stop()
    stop.listen()
    try:
        sys.exit(main(sys.argv[1:], sys.stdin.read(), os.environ, stop))
    except UsageError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
