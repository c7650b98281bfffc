"""A sweep from its lines to its results: check, train, conclude, record."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.apps.sweep import results
from nanochat.apps.sweep.predictions import (
    Outcome,
    predict_and_train,
    read_outcomes,
    runs_of_predictions,
)
from nanochat.apps.sweep.results import Row
from nanochat.apps.sweep.scaling_fit import Fit, FitDraws, Point, fit_points, in_words
from nanochat.apps.sweep.scaling_picture import draw_picture
from nanochat.apps.sweep.settings import Settings, is_depth
from nanochat.apps.sweep.train_runs import Run, Stop, check, parse_lines, train_all
from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, EXIT_STOPPED, UsageError, write_json
from nanochat.run import flags


@dataclass
class Conclusion:
    """What a sweep's kind makes of its runs.

    values: for the RESULT line. record: for results.json. failed: further runs that failed.
    well: whether nothing else went wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    well: bool = True


def sweep(settings: Settings, lines: str, stop: Stop) -> int:
    """Do a sweep. Returns the exit code; UsageError before anything is trained."""
    runs = parse_lines(lines, settings.folder, settings.common)
    check(settings.kind, runs, settings.given)
    _check_prediction(settings.predict, runs)
    _open_folder(settings.folder)
    to_retry = {}
    if settings.retry:
        to_retry = failures([*runs, *runs_of_predictions(settings)])
    names = ", ".join(run.name for run in runs)
    print(f"{settings.kind}: {len(runs)} runs in {settings.folder}: {names}", flush=True)
    train_all(runs, settings, to_retry, stop)
    # read anew: another process may have trained some of them
    rows = results.collect(runs)
    scaling = None
    if settings.kind == "scaling_laws" and not stop.asked:
        scaling = _fit_and_predict(settings, rows, to_retry, stop)
    print(results.table(rows), flush=True)
    record = {
        "sweep": settings.kind,
        "flags": settings.common,
        "processes_a_run": settings.processes,
        "runs": [row.as_json() for row in rows],
    }
    record_path = settings.folder / "results.json"
    # a stop is not a result: the runs are recorded, means and laws are not
    if stop.asked:
        write_json(record_path, record)
        print("stopped; start it again to continue", flush=True)
        return EXIT_STOPPED
    if scaling is not None:
        found = conclude_scaling(settings.folder, scaling)
    else:
        found = CONCLUSIONS[settings.kind](settings.folder, rows)
    # before anything else is printed: a broken pipe must not cost the results
    write_json(record_path, {**record, **found.record})
    if scaling is not None and scaling.no_prediction:
        print(scaling.no_prediction)
    failed = [row.name for row in rows if row.facts.status == "failed"] + found.failed
    if failed:
        print(f"FAILED: {', '.join(failed)} (RETRY=1 tries again)")
    print(f"results: {record_path}")
    # the last line of the output, for scripts and people who keep only that
    line = results.result_line(
        runs=len(rows),
        completed=len(results.completed(rows)),
        failed=len(failed),
        **found.values,
    )
    print(line, flush=True)
    return EXIT_COMPLETED if found.well and not failed else EXIT_FAILED


def _check_prediction(wanted: str, runs: Sequence[Run]) -> None:
    """UsageError for a PREDICT that is a budget and not beyond those that are run."""
    if not wanted or is_depth(wanted):
        return
    # a prediction within the range of the runs proves nothing
    largest = max(flags.parse(run.flags).target_flops for run in runs)
    if float(wanted) <= largest:
        raise UsageError(
            f"PREDICT={wanted}: not larger than the budgets that are run, up to {largest:g} FLOPs"
        )


def _open_folder(folder: Path) -> None:
    """Create the folder and results.json. UsageError now rather than after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").touch()
    except OSError as error:
        raise UsageError(
            f"OUT={folder}: cannot be written ({error.strerror}); name another folder"
        ) from None


def failures(runs: Sequence[Run]) -> dict[str, float]:
    """{name: when it failed} of the runs that are to be tried again.

    Read once, at the start: what another process tries again and fails is not tried a third
    time."""
    rows = results.collect(runs)
    return {row.name: row.facts.failed_at for row in rows if row.facts.status == "failed"}


# ---- what each kind concludes ----


def conclude_miniseries(folder: Path, rows: Sequence[Row]) -> Conclusion:
    """`nanochat compare` of the completed runs, with its pictures in FOLDER/compare."""
    done = results.completed(rows)
    # results that were measured are reported even if the comparison fails
    values = {f"{row.name}_val_bpb": row.facts.val_bpb for row in done}
    for row in done:
        if row.facts.core_metric is not None:
            values[f"{row.name}_core"] = row.facts.core_metric
    if not done:
        return Conclusion(values)
    # as a process: apps do not import each other
    compare = [sys.executable, "-m", "nanochat", "compare"]
    paths = [row.path for row in done]
    command = [*compare, *paths, f"--out={folder / 'compare'}"]
    # through this process, whose output may be kept for JSON
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    print(done.stdout, end="", flush=True)
    code = done.returncode
    if code:
        print(f"nanochat compare ended with exit code {code}", file=sys.stderr)
    return Conclusion(values, well=code == 0)


def conclude_seeds(folder: Path, rows: Sequence[Row]) -> Conclusion:
    """Mean and standard deviation over the seeds."""
    values = {}
    noise = results.noise(rows)
    for name, found in noise.items():
        # without CORE in any run there is nothing to print about it, but the record names it
        if found.n:
            deviation = "one run has no spread"
            if found.sd is not None:
                deviation = f"standard deviation {found.sd:.5f}"
            print(f"{name}: mean {found.mean:.5f}, {deviation}, n = {found.n}")
            values |= {f"{name}_{key}": value for key, value in asdict(found).items()}
    return Conclusion(values, {"noise": {name: asdict(found) for name, found in noise.items()}})


def conclude_ablation(folder: Path, rows: Sequence[Row]) -> Conclusion:
    """The differences of the variants to the baseline."""
    variants = results.ablation(rows)
    print(results.ablation_table(variants))
    values = {"baseline": variants[0].val_bpb.mean}
    values |= {variant.name: variant.difference.mean for variant in variants[1:]}
    return Conclusion(values, {"variants": [asdict(variant) for variant in variants]})


def conclude_landing(folder: Path, rows: Sequence[Row]) -> Conclusion:
    """What landing costs against a plan of the same length."""
    pairs = results.landings(rows)
    # none yet, while the run that is landed is being trained
    if not pairs:
        return Conclusion({"pairs": 0})
    print(results.landings_table(pairs))
    excesses = [pair.excess for pair in pairs]
    within = sum(excess <= results.TOLERANCE for excess in excesses)
    print(f"{within} of {len(pairs)} at most {results.TOLERANCE:.1%} worse than planned")
    values = {
        "pairs": len(pairs),
        "within": within,
        "worst": max(excesses),
        "mean": statistics.fmean(excesses),
        **{f"{pair.text}_{pair.stop}": pair.excess for pair in pairs},
    }
    return Conclusion(values, {"landings": [asdict(pair) for pair in pairs]})


CONCLUSIONS: dict[str, Callable[[Path, Sequence[Row]], Conclusion]] = {
    "miniseries": conclude_miniseries,
    "seeds": conclude_seeds,
    "ablation": conclude_ablation,
    "landing": conclude_landing,
}


# ---- scaling laws ----


@dataclass(frozen=True)
class Scaling:
    """The fit of a scaling sweep. no_prediction: why PREDICT could not be honoured, or ""."""

    fit: Fit
    draws: FitDraws | None
    no_prediction: str


def points_of(rows: Sequence[Row]) -> list[Point]:
    """The completed runs, named BUDGET/dDEPTH, as points of the fit; those without a val_bpb are
    left out."""
    return [
        Point(
            # the name groups the runs, whose FLOPs differ by up to a step
            budget=row.name.split("/")[0],
            flops=row.facts.flops,
            N=row.facts.scaling_parameters,
            tokens=row.facts.tokens,
            loss=row.facts.val_bpb,
        )
        for row in results.completed(rows)
        if row.facts.val_bpb is not None
    ]


def _fit_and_predict(
    settings: Settings, rows: Sequence[Row], to_retry: dict[str, float], stop: Stop
) -> Scaling:
    """Fit the laws, and train the run that PREDICT asks for."""
    # before the prediction's own run, which must not take part in the fit
    fit, draws = fit_points(points_of(rows))
    no_prediction = ""
    if settings.predict:
        try:
            predict_and_train(settings, fit, draws, rows, to_retry, stop)
        except UsageError as error:
            # the results of what was trained are shown all the same
            no_prediction = str(error)
    return Scaling(fit, draws, no_prediction)


def conclude_scaling(folder: Path, scaling: Scaling) -> Conclusion:
    """Laws, predictions and picture."""
    fit = scaling.fit
    print(in_words(fit))
    outcomes = read_outcomes(folder)
    for outcome in outcomes:
        print(outcome.in_words())
    # without a single completed run there is nothing to draw
    if fit.budgets:
        picture = folder / "scaling_laws.png"
        draw_picture(fit, outcomes, picture)
        print(f"picture: {picture}")
    record: dict[str, Any] = {}
    if scaling.no_prediction:
        record["no_prediction"] = scaling.no_prediction
    record |= {
        "fit": fit.as_json(),
        "predictions": [outcome.as_json() for outcome in outcomes],
    }
    return Conclusion(
        values=_scaling_values(fit, outcomes),
        record=record,
        failed=[str(outcome.run) for outcome in outcomes if outcome.facts.status == "failed"],
        well=not scaling.no_prediction,
    )


def _scaling_values(fit: Fit, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of the RESULT line; None, shown as null, for what the runs do not determine."""
    values: dict[str, Any] = {
        "budgets": sum(budget.N_opt is not None for budget in fit.budgets),
        "budgets_left_out": sum(bool(budget.left_out) for budget in fit.budgets),
    }
    # every name is there in every sweep, in this order, so that scripts need not ask for it
    laws = (("alpha", fit.N_opt), ("beta", fit.D_opt))
    for name in ("alpha", "beta", "ratio"):
        values |= {name: None, f"{name}_low": None, f"{name}_high": None}
    values |= {"E": None, "gamma": None}
    for name, law in laws:
        if law is not None:
            values[name] = law.exponent
            values[f"{name}_low"], values[f"{name}_high"] = law.exponent_95 or (None, None)
    if fit.ratio is not None:
        values["ratio"] = fit.ratio.tokens_per_parameter
        values["ratio_low"], values["ratio_high"] = fit.ratio.interval_95 or (None, None)
    if fit.loss is not None:
        values |= {"E": fit.loss.E, "gamma": fit.loss.gamma}
    for outcome in outcomes:
        label = outcome.run.name
        values[f"predicted_{label}"] = outcome.prediction.val_bpb
        values[f"error_{label}"] = outcome.error
        values[f"inside_{label}"] = outcome.inside
    return values
