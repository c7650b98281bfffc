"""Tables of a sweep's runs, their noise, and differences to a baseline.

Only completed runs count in a mean or a fit."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.apps.sweep.facts import Facts, read_facts
from nanochat.apps.sweep.train_runs import Run
from nanochat.common import human_time
from nanochat.run.statistics import Spread, spread, two_sided_quantile
from nanochat.run.tables import aligned, fixed, short

# a fixed name: the scripts under runs/ write it, and results.json is read by it
BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """A run of the sweep and its facts. flags: those of this run alone."""

    name: str
    path: str
    flags: list[str]
    facts: Facts

    def as_json(self) -> dict[str, Any]:
        """The run in results.json."""
        return {"name": self.name, "path": self.path, "flags": self.flags, **asdict(self.facts)}


def collect(runs: Iterable[Run]) -> list[Row]:
    """The rows of runs, in their order."""
    return [Row(run.name, str(run.path), run.flags, read_facts(run.path)) for run in runs]


def completed(rows: Iterable[Row]) -> list[Row]:
    """The rows of runs that completed."""
    # a run that was cut short is worse for a reason that has nothing to do with its settings
    return [row for row in rows if row.facts.completed]


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else human_time(seconds)


def table(rows: Sequence[Row]) -> str:
    """Runs as aligned columns, then what a reader has to know of them."""
    # N counts the matrices and the head alone, the size in which the scaling laws are stated
    heading = ["run", "status", "params", "N", "tokens", "D/N", "epochs", "FLOPs", "time"]
    heading += ["val_bpb", "CORE"]
    return "\n".join([aligned([heading, *map(_cells, rows)]), *_remarks(rows)])


def _cells(row: Row) -> list[str | None]:
    """A row of the table; None where there is no value."""
    facts = row.facts
    ratio = flops = None
    if facts.tokens:
        # D/N of what was trained so far
        ratio = fixed(facts.tokens / facts.scaling_parameters, 1)
    if facts.flops:
        flops = f"{facts.flops:.2e}"
    return [
        row.name,
        facts.status,
        short(facts.parameters),
        short(facts.scaling_parameters),
        short(facts.tokens),
        ratio,
        fixed(facts.epochs, 2),
        flops,
        _time(facts.seconds),
        fixed(facts.val_bpb),
        fixed(facts.core_metric),
    ]


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Why runs did not complete, which saw their data twice, and whether the code changed."""
    lines = [
        f"{row.name}: {row.facts.status}: {row.facts.reason}"
        for row in rows
        if not row.facts.completed and row.facts.reason
    ]
    # repeated text teaches less than new text, so such a run does not belong with the others
    if repeats := [row.name for row in rows if (row.facts.epochs or 0) > 1]:
        lines.append(f"more than one pass over the data: {', '.join(repeats)}")
    # a sweep that takes days may be continued after an update
    by_commit: dict[str, list[str]] = {}
    for row in rows:
        if row.facts.git_commit:
            by_commit.setdefault(str(row.facts.git_commit)[:8], []).append(row.name)
    if len(by_commit) > 1:
        commits = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in by_commit.items())
        lines.append(f"warning: trained by different versions of the code: {commits}")
    return lines


def noise(rows: Iterable[Row]) -> dict[str, Spread]:
    """The spread of val_bpb and core_metric over the completed runs."""
    done = completed(rows)
    return {
        name: spread(_values(getattr(row.facts, name) for row in done))
        for name in ("val_bpb", "core_metric")
    }


def _values(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# ---- ablation ----


@dataclass(frozen=True)
class PairedDifference:
    """Variant minus baseline, a mean over the n seeds that both have completed.

    se: its standard error. reach: half of a 95% interval by Student's t. Both are None below two
    seeds, mean is None without any."""

    mean: float | None
    se: float | None
    reach: float | None
    n: int


@dataclass(frozen=True)
class Variant:
    """The runs of one variant, over its seeds. The differences are None for the baseline itself.

    status: completed, or how many of its runs failed or are left."""

    name: str
    status: str
    val_bpb: Spread
    seconds: Spread
    flops: Spread
    difference: PairedDifference | None = None
    core_difference: PairedDifference | None = None
    seconds_difference: PairedDifference | None = None


def ablation(rows: Iterable[Row]) -> list[Variant]:
    """The variants of runs named VARIANT/seedSEED, in order, compared with "baseline" by seed.

    Pairs of runs with the same seed see the same data in the same order, so that their difference
    varies less than either of them."""
    # dicts keep the order of the lines
    by_variant: dict[str, dict[str, Facts]] = {}
    for row in rows:
        variant, seed = row.name.split("/")
        by_variant.setdefault(variant, {})[seed] = row.facts
    return [_variant(name, of_seed, by_variant[BASELINE]) for name, of_seed in by_variant.items()]


def _variant(name: str, of_seed: dict[str, Facts], baseline: dict[str, Facts]) -> Variant:
    done = {seed: facts for seed, facts in of_seed.items() if facts.completed}
    # a variant that breaks often is a result too, so the number of failures is shown
    left = [facts.status for facts in of_seed.values() if not facts.completed]
    counts = [f"{left.count(word)} of {len(of_seed)} {word}" for word in dict.fromkeys(left)]
    spreads = {
        what: spread(_values(getattr(facts, what) for facts in done.values()))
        for what in ("val_bpb", "seconds", "flops")
    }
    variant = Variant(name, ", ".join(counts) or "completed", **spreads)
    if name == BASELINE:
        return variant
    # a seed that only one side completed would shift the mean by the noise of that seed
    pairs = [
        (facts, baseline[seed])
        for seed, facts in done.items()
        if seed in baseline and baseline[seed].completed
    ]
    return replace(
        variant,
        difference=_paired(pairs, "val_bpb"),
        core_difference=_paired(pairs, "core_metric"),
        seconds_difference=_paired(pairs, "seconds"),
    )


def _paired(pairs: Sequence[tuple[Facts, Facts]], what: str) -> PairedDifference:
    """The mean of the first minus the second in some number."""
    both = [(getattr(a, what), getattr(b, what)) for a, b in pairs]
    found = spread([mine - base for mine, base in both if mine is not None and base is not None])
    if found.sd is None:
        return PairedDifference(found.mean, None, None, found.n)
    # the pairs are independent of each other, so their mean varies by 1/sqrt(n)
    se = found.sd / math.sqrt(found.n)
    return PairedDifference(found.mean, se, se * two_sided_quantile(found.n - 1), found.n)


def ablation_table(variants: Sequence[Variant]) -> str:
    """The variants as aligned columns, the time as a share of the baseline's."""
    heading = ("variant", "val_bpb", "to baseline", "pairs", "CORE to baseline", "FLOPs", "time")
    rows = [(*heading, "to baseline", "status")]
    for variant in variants:
        difference = variant.difference
        seconds = variant.seconds_difference
        # not used where there is no difference to show
        percent = 0.0
        if seconds is not None and seconds.mean is not None:
            # the baseline's mean over the same seeds, which the difference gives back
            percent = 100 / (variant.seconds.mean - seconds.mean)
        rows.append(
            (
                variant.name,
                fixed(variant.val_bpb.mean),
                _with_reach(difference, 4),
                str(difference.n) if difference else None,
                _with_reach(variant.core_difference, 4),
                f"{variant.flops.mean:.3g}" if variant.flops.mean else None,
                _time(variant.seconds.mean),
                _with_reach(seconds, 1, percent, "%"),
                variant.status,
            )
        )
    text = aligned(rows)
    if len(variants) > 1:
        text += (
            "\n± is half of a 95% interval over the seeds, for each variant alone; without it the "
            "noise is unknown"
        )
    return text


def _with_reach(
    difference: PairedDifference | None, digits: int, unit: float = 1.0, suffix: str = ""
) -> str | None:
    """+0.1234 ± 0.0012, times `unit`."""
    if difference is None or difference.mean is None:
        return None
    reach = ""
    if difference.reach is not None:
        reach = f" ± {difference.reach * unit:.{digits}f}"
    return f"{difference.mean * unit:+.{digits}f}{reach}{suffix}"


# ---- landing ----

# by which a landed run may be worse than one that was planned for its length
TOLERANCE = 0.005


@dataclass(frozen=True)
class Landing:
    """A run that was landed, and one that was planned for its length.

    text: which both read. stop: the step at which the landing began, as in its name. steps: at
    which both end. landed, planned: their bits per byte."""

    text: str
    stop: str
    steps: int
    landed: float
    planned: float

    @property
    def excess(self) -> float:
        """By how much the landed one is worse, as a share; below 0 it is better."""
        return self.landed / self.planned - 1


def landings(rows: Iterable[Row]) -> list[Landing]:
    """The pairs of completed runs named TEXT/landed-STEP and TEXT/planned-STEP, in order."""
    done = {row.name: row.facts for row in completed(rows) if row.facts.val_bpb is not None}
    found = []
    for name, landed in done.items():
        text, _, kind = name.partition("/")
        planned = done.get(f"{text}/{kind.replace('landed-', 'planned-')}")
        # of other lengths they would tell nothing of the landing
        if kind.startswith("landed-") and planned and planned.step == landed.step:
            stop = kind.removeprefix("landed-")
            found.append(Landing(text, stop, landed.step, landed.val_bpb, planned.val_bpb))
    return found


def landings_table(found: Sequence[Landing]) -> str:
    """The pairs as aligned columns."""
    rows = [("text", "landed at", "steps", "landed", "planned", "landed to planned")]
    for pair in found:
        steps = (pair.stop, str(pair.steps))
        excess = f"{100 * pair.excess:+.2f}%"
        rows.append((pair.text, *steps, fixed(pair.landed), fixed(pair.planned), excess))
    return aligned(rows)


def result_line(**values: Any) -> str:
    """The last line of a script: RESULT name=value ...; None as null, numbers with six digits."""
    # null rather than None: scripts read the values as JSON
    words = [
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={json.dumps(value)}"
        for name, value in values.items()
    ]
    return "RESULT " + " ".join(words)
