"""What the folder of one run of a sweep tells. Changes nothing."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.common import read_json
from nanochat.run.folder import RunFolder
from nanochat.run.records import DAMAGES, read_summary

# the sweep's note in the folder of a run that failed; deleted when the run is started again
FAILURE = "failed.json"


@dataclass(frozen=True)
class Facts:
    """What a run folder tells; None where it has no value, or none yet.

    status: completed, failed, stopped, died (killed without a trace), running (a process holds it)
    or "not started". failed_at: seconds since 1970, None unless it failed. tokens, flops and
    seconds are those trained; epochs is tokens over the tokens of one pass."""

    status: str = "not started"
    reason: str = ""
    failed_at: float | None = None
    depth: int | None = None
    seed: int | None = None
    width: int | None = None
    parameters: int | None = None
    scaling_parameters: int | None = None
    step: int | None = None
    tokens: int | None = None
    flops: float | None = None
    epochs: float | None = None
    seconds: float | None = None
    tok_per_sec: float | None = None
    val_bpb: float | None = None
    min_val_bpb: float | None = None
    core_metric: float | None = None
    core_metric_n: int | None = None
    git_commit: str | None = None

    @property
    def completed(self) -> bool:
        """Whether the run was trained to its end."""
        return self.status == "completed"


def read_facts(path: Path) -> Facts:
    """The facts of a run folder, which may be missing or damaged."""
    # a damaged folder counts as a failure: it is reported, and RETRY=1 tries it again
    try:
        facts = _of_run(path) if RunFolder(path).holds_run() else Facts()
    except DAMAGES as error:
        facts = _damaged("run folder", error)
    # an older note may be left of a run that was then resumed by hand
    if facts.status in ("completed", "running"):
        return facts
    # a process that could not even start leaves no summary, only the sweep's note
    try:
        note = json.loads((path / FAILURE).read_text(encoding="utf-8"))
        return replace(
            facts, status="failed", reason=str(note["reason"]), failed_at=float(note["at"])
        )
    except FileNotFoundError:
        return facts
    except DAMAGES as error:
        # another process may be writing it, or the disk was full
        damaged = _damaged(FAILURE, error)
        return replace(facts, status="failed", reason=damaged.reason, failed_at=0.0)


def _damaged(what: str, error: BaseException) -> Facts:
    return Facts(status="failed", reason=f"damaged {what} ({error})", failed_at=0.0)


def _of_run(path: Path) -> Facts:
    """The facts of a folder that holds a run. Raises one of DAMAGES."""
    config = RunFolder(path).read_config()
    run = read_summary(path)
    summary = {}
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json", "run folder")
    plan = config["plan"]
    tokens = run.tokens
    return Facts(
        status=run.status,
        reason=run.reason,
        # a run that failed has written nothing since
        failed_at=run.updated if run.status == "failed" else None,
        depth=run.depth,
        seed=config["seed"],
        width=config["model"]["width"],
        parameters=run.parameters,
        scaling_parameters=plan["scaling_parameters"],
        step=run.step,
        tokens=tokens,
        # not the planned ones: a run may have been stopped early
        flops=tokens and tokens * plan["flops_per_token"],
        epochs=tokens and tokens / config["data"]["tokens_per_epoch"],
        seconds=run.total_training_time,
        tok_per_sec=run.tok_per_sec,
        val_bpb=run.val_bpb,
        min_val_bpb=run.min_val_bpb,
        core_metric=run.core_metric,
        core_metric_n=summary.get("core_metric_n"),
        git_commit=config.get("git_commit"),
    )
