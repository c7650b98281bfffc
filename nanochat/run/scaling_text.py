"""The table of `train.py --dry-run --gpus=all`: one plan for each of 1, 2, 4 ... 1024 GPUs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat.common import UsageError, human_bytes, human_time
from nanochat.run.plan_text import PlannedRun, as_json
from nanochat.run.scaling import COUNTS, LEAST_GAIN, Scaled, limit_of
from nanochat.run.timing import short_time

# Name and width of the columns; the last one is as wide as its text.
COLUMNS = {
    "GPUs": 4,
    "rows": 8,
    "tokens a step": 13,
    "step": 8,
    "time": 7,
    "GPU-hours": 9,
    "cost": 9,
    "memory": 9,
    "sent a step": 11,
    "zeros": 5,
    "travels": 8,
    "speed": 6,
    "most": 0,
}
# What stops the scaling, by the name that limit_of() gives it.
REASONS = {
    "batch": "the batch is too small: each GPU takes at least one row, so more of them need a "
    "larger batch than the horizon asks for",
    "passes": "the passes of a GPU get no shorter",
    "weights": "the batch is too small: each pass reads all weights, however few rows it has",
    "update": "Muon's update of whole matrices is divided no further",
    "gradients": "the exchange of gradients, which the backward pass does not hide",
    "parameters": "the exchange of parameters, which no computation hides",
    "fit": "more GPUs cannot run it",
    "": "nothing in this table",
}


@dataclass(frozen=True)
class Table:
    """Plans by number of devices, each a plan or why there is none."""

    gpu: str
    plans: dict[int, PlannedRun | UsageError]

    @property
    def runs(self) -> dict[int, PlannedRun]:
        """The plans that exist."""
        return {n: plan for n, plan in self.plans.items() if isinstance(plan, PlannedRun)}

    @property
    def limit(self) -> tuple[int, str]:
        """(the number of devices up to which more of them help, a key of REASONS)."""
        rows = [Scaled(n, run.plan.total_batch_tokens, run.step) for n, run in self.runs.items()]
        devices, reason = limit_of(rows)
        if not reason and devices != COUNTS[-1]:
            reason = "fit"
        return devices, reason


def table_of(gpu: str, plan_for: Callable[[int], PlannedRun]) -> Table:
    """The Table of a GPU. plan_for(n): the plan for n of them. UsageError if there is no plan for
    any number."""
    plans: dict[int, PlannedRun | UsageError] = {}
    # Few may lack the memory, and many the rows: the others are planned all the same.
    for n in COUNTS:
        try:
            plans[n] = plan_for(n)
        except UsageError as error:
            plans[n] = error
    table = Table(gpu, plans)
    if not table.runs:
        raise plans[COUNTS[0]]
    return table


def table_as_json(table: Table) -> dict[str, Any]:
    """The table as numbers, for --json."""
    devices, reason = table.limit
    rows = []
    for n, plan in table.plans.items():
        if isinstance(plan, UsageError):
            rows.append({"devices": n, "problem": str(plan)})
        else:
            rows.append(as_json(plan))
    return {
        "gpu": table.gpu,
        "scales_to": devices,
        "stopped_by": reason,
        "rows": rows,
    }


def format_table(table: Table) -> str:
    """The table as lines, with what it assumes and where it ends."""
    runs = table.runs
    first = next(iter(runs.values()))
    lines = [
        f"plans for {table.gpu}, depth {first.depth}: "
        f"{first.plan.parameters['total']:,} parameters, {first.plan.tokens:,.0f} tokens",
        _line(dict(zip(COLUMNS, COLUMNS, strict=True))),
    ]
    notes = []
    for n, plan in table.plans.items():
        if isinstance(plan, UsageError):
            notes.append(f"{n} GPUs: {plan}")
        else:
            lines.append(_line(_cells(plan, first)))
    devices, reason = table.limit
    # of the most devices: one exchanges nothing
    most = runs[max(runs)]
    lines.append(f"scales to {devices} GPUs; stopped by: {REASONS[reason]}")
    lines += [
        f"  (to scale is to be {LEAST_GAIN:g} times as fast with twice as many)",
        f"assumed, not measured: {'; '.join(most.assumed)}",
    ]
    return "\n".join(lines + notes)


def _cells(run: PlannedRun, first: PlannedRun) -> dict[str, str]:
    """What the columns hold for a plan. first: the one whose speed per device is 100%."""
    step = run.step
    n = run.machine.devices
    mine, base = (
        Scaled(each.machine.devices, each.plan.total_batch_tokens, each.step)
        for each in (run, first)
    )
    share = mine.rate * base.devices / (base.rate * n)
    cost = "" if run.cost is None else f"${run.cost:,.0f}"
    parts = sorted(step.parts.items(), key=lambda part: -part[1])
    most = ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in parts[:2])
    return {
        "GPUs": str(n),
        "rows": f"{run.device_batch} x {run.accumulation}",
        "tokens a step": f"{run.plan.total_batch_tokens:,}",
        "step": short_time(step.seconds),
        "time": human_time(run.seconds),
        "GPU-hours": f"{run.device_hours:.3g}",
        "cost": cost,
        "memory": human_bytes(run.step_memory(run.device_batch)),
        "sent a step": human_bytes(round(step.sent_bytes)),
        "zeros": f"{step.zeros:.0%}",
        "travels": short_time(step.travel),
        "speed": f"{share:.0%}",
        "most": most,
    }


def _line(cells: dict[str, str]) -> str:
    *narrow, last = (f"{cells[name]:>{width}}" for name, width in COLUMNS.items())
    return "  ".join(["", *narrow, last])
