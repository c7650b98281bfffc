"""Predictions of a scaling sweep: written before their runs, never changed afterwards.

FOLDER/predictions/NAME.json is a prediction, FOLDER/predictions/NAME its run. A prediction counts
for something only if it was made before the run, so it is written while the run's lock is held and
stands from the moment the run was started."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.apps.sweep.facts import Facts, read_facts
from nanochat.apps.sweep.results import Row, completed
from nanochat.apps.sweep.scaling_fit import Fit, FitDraws, Interval, best_budget, predict
from nanochat.apps.sweep.settings import Settings, is_depth
from nanochat.apps.sweep.train_runs import Run, Stop, check, make_run, train_all
from nanochat.common import UsageError, read_json, write_json
from nanochat.model.build import meta_model
from nanochat.run import flags
from nanochat.run.checks import MAX_DEPTH
from nanochat.run.plan import model_config


@dataclass(frozen=True)
class Prediction:
    """The val_bpb that is expected of a run of this depth and budget. content: all of its file."""

    depth: int
    flops: float
    val_bpb: float
    interval_95: Interval | None
    content: dict[str, Any]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Prediction":
        """From the content of its file."""
        fields = ("depth", "flops", "val_bpb", "interval_95")
        # all of it is kept, because results.json repeats the file as it was written
        return cls(**{name: content[name] for name in fields}, content=content)

    def in_words(self) -> str:
        """What is predicted, without its interval."""
        return f"depth {self.depth} at {self.flops:.3g} FLOPs"

    def value_in_words(self) -> str:
        """The expected val_bpb and its interval."""
        if self.interval_95 is None:
            return f"{self.val_bpb:.4f}"
        low, high = self.interval_95
        return f"{self.val_bpb:.4f} ({low:.4f} to {high:.4f})"


@dataclass(frozen=True)
class Outcome:
    """A prediction and its run. measured: the run's val_bpb, None before it completed."""

    prediction: Prediction
    run: Path
    facts: Facts

    @property
    def measured(self) -> float | None:
        """val_bpb of the completed run."""
        return self.facts.val_bpb if self.facts.completed else None

    @property
    def error(self) -> float | None:
        """Measured minus predicted."""
        return None if self.measured is None else self.measured - self.prediction.val_bpb

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds what was measured."""
        # without an interval nothing was claimed that could be wrong
        if self.measured is None or self.prediction.interval_95 is None:
            return None
        low, high = self.prediction.interval_95
        return low <= self.measured <= high

    def in_words(self) -> str:
        """The prediction and its outcome in a line."""
        text = f"{self.prediction.in_words()}: predicted {self.prediction.value_in_words()}"
        if self.measured is None:
            return f"{text}, {self.facts.status}"
        text += f", measured {self.measured:.4f}, error {self.error:+.4f}"
        verdicts = {None: "", True: ": inside the interval", False: ": OUTSIDE the interval"}
        return text + verdicts[self.inside]

    def as_json(self) -> dict[str, Any]:
        """The outcome in results.json."""
        return {
            **self.prediction.content,
            "run": str(self.run),
            "status": self.facts.status,
            "reason": self.facts.reason,
            "measured": self.measured,
            "error": self.error,
            "inside": self.inside,
        }


def read_outcomes(folder: Path) -> list[Outcome]:
    """Every prediction in folder/predictions, by name, with its run."""
    # predictions of earlier sweeps over this folder too: they are never forgotten
    found = []
    for path in sorted((folder / "predictions").glob("*.json")):
        prediction = Prediction.from_json(read_json(path, "prediction"))
        run = path.with_suffix("")
        found.append(Outcome(prediction, run, read_facts(run)))
    return found


def runs_of_predictions(settings: Settings) -> list[Run]:
    """The runs of the predictions that exist, by which their failures are found."""
    paths = (settings.folder / "predictions").glob("*.json")
    return [
        make_run(settings.folder, f"predictions/{path.stem}", [], settings.common) for path in paths
    ]


def plan_prediction(
    settings: Settings, fit: Fit, draws: FitDraws | None, rows: Sequence[Row]
) -> Prediction:
    """The prediction for the depth or the budget that is asked for.

    A depth is predicted at the budget whose best model it is, a budget at the depth whose N is
    nearest to the best. UsageError if the runs give no power law."""
    wanted = settings.predict
    if fit.N_opt is None:
        raise UsageError(f"PREDICT={wanted}: no prediction: {fit.why_not}")
    done = completed(rows)
    # the tokenizer's size is known only once a run has trained or loaded it
    config = read_json(Path(done[0].path) / "config.json", "run folder")
    vocabulary = config["model"]["vocab_size"]

    # sizes come from the model itself, built without memory, rather than from a formula
    def model(depth: int) -> Any:
        args = flags.parse([*settings.common, f"--depth={depth}"])
        return meta_model(model_config(args, vocabulary))

    if is_depth(wanted):
        depth = int(wanted)
        flops = best_budget(fit, model(depth).scaling_parameters())
    else:
        flops = float(wanted)
        shallowest = min(row.facts.depth for row in done)
        depth = _best_depth(float(fit.N_opt.at(flops)), shallowest, model)
    # a number that can be read, and that is the same in the file and on the command line
    flops = float(f"{flops:.6g}")
    n = model(depth).scaling_parameters()
    expected = predict(fit, draws, flops, n)
    content = {
        "request": wanted,
        "depth": depth,
        "flops": flops,
        "scaling_parameters": n,
        "tokens": flops / model(depth).flops_per_token(),
        **asdict(expected),
        "law": {
            "N_opt": fit.N_opt.as_json(),
            "D_opt": fit.D_opt.as_json(),
            "loss": asdict(fit.loss),
            "intervals": fit.intervals,
        },
        "from_runs": [row.name for row in done],
        # in UTC, so that it can be compared with the times of a run on any machine
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return Prediction.from_json(content)


def _best_depth(wished: float, shallowest: int, model: Any) -> int:
    """The depth, from `shallowest` on, whose N is nearest to the one wished for, by its ratio."""
    depth = shallowest
    # N grows with depth, so the first two on both sides of the wished one are the candidates
    while depth < MAX_DEPTH and model(depth + 1).scaling_parameters() < wished:
        depth += 1
    distances = {
        candidate: abs(math.log(model(candidate).scaling_parameters() / wished))
        for candidate in (depth, depth + 1)
    }
    return min(distances, key=distances.get)


def predict_and_train(
    settings: Settings,
    fit: Fit,
    draws: FitDraws | None,
    rows: Sequence[Row],
    to_retry: Mapping[str, float],
    stop: Stop,
) -> None:
    """Write the prediction that PREDICT asks for, then train its run.

    UsageError if nothing can be predicted, or if the run exists without its prediction."""
    wanted = settings.predict
    name = f"d{wanted}" if is_depth(wanted) else wanted
    path = settings.folder / "predictions" / f"{name}.json"
    run_path = path.with_suffix("")
    path.parent.mkdir(exist_ok=True)

    def started() -> bool:
        # the sweep opens train.log before train.py writes config.json: either shows that it was
        # started
        return any((run_path / file).exists() for file in ("config.json", "train.log"))

    if started() and not path.exists():
        raise UsageError(
            f"{run_path} holds a run, but {path} does not exist: a prediction after the run is "
            f"worthless; delete the run, or leave PREDICT out"
        )
    # depth and budget of the run follow from the prediction, and that of a started run stands
    if started():
        prediction = Prediction.from_json(read_json(path, "prediction"))
    else:
        prediction = plan_prediction(settings, fit, draws, rows)
    unknown = "" if prediction.interval_95 else " (the noise is unknown)"
    print(
        f"predicted for {prediction.in_words()}: val_bpb {prediction.value_in_words()}{unknown}; "
        f"{path}",
        flush=True,
    )
    # repr() gives back the very same float, which check() compares with that in config.json
    words = [f"--depth={prediction.depth}", f"--target-flops={prediction.flops!r}"]
    run = make_run(settings.folder, f"predictions/{name}", words, settings.common)
    # a started run has to have been started with these flags
    check("scaling_laws", [run], [])
    # a missing run may shift the laws
    if failed := [row.name for row in rows if row.facts.status == "failed"]:
        print(f"without the failed runs {', '.join(failed)}", flush=True)

    def write_prediction() -> None:
        # another process may have started the run since
        if not started():
            write_json(path, prediction.content)

    train_all([run], settings, to_retry, stop, before=write_prediction)
