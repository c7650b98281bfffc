"""Loading the model and tokenizer of a run folder, by the step that a user asks for."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanochat import hardware
from nanochat.common import UsageError, note_once, read_json
from nanochat.data.tokenizer import read_tokenizer
from nanochat.run import checkpoint

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.decoder import Decoder


def step_of(run: Path | str, step: int | str | None) -> int:
    """The step of the intact checkpoint that --step names.

    step: a number, "best", or None for the newest. UsageError if there is no such checkpoint."""
    run = Path(run)
    # not Path.exists(), which raises for a folder that may not be entered
    if not os.path.exists(run / "config.json"):
        raise UsageError(
            f"{run} is not a run folder (it has no config.json); give <out-dir>/<model-tag>"
        )
    if not checkpoint.steps_of(run):
        raise UsageError(
            f"{run} has no checkpoint yet; train.py saves one when it ends or is stopped, if not "
            f"earlier"
        )
    if step is not None:
        return _requested_step(run, step)
    # To stderr: stdout may be piped, and belongs to the text or the JSON of a command.
    newest = checkpoint.newest_intact(run, report=lambda text: print(text, file=sys.stderr))
    if newest is None:
        raise UsageError(f"{run} has no intact checkpoint")
    return newest


def _requested_step(run: Path, asked: int | str) -> int:
    """The step of a checkpoint requested by number or as "best". UsageError if it is unusable."""
    step = checkpoint.best_step(run) if asked == "best" else asked
    if step is None:
        raise UsageError(
            f"--step=best: {run} has no evaluated checkpoint; omit the flag to use the newest"
        )
    steps = checkpoint.steps_of(run)
    if step not in steps:
        raise UsageError(
            f"--step={asked}: {run} has no such checkpoint (it has: {', '.join(map(str, steps))})"
        )
    problem = checkpoint.damage(run, step)
    if problem is None:
        return step
    # It was listed a moment ago: gone is not the same as damaged.
    if not checkpoint.folder_of(run, step).exists():
        raise UsageError(
            f"--step={asked}: {run} no longer has this checkpoint, a training process removed it; "
            f"choose another step"
        )
    raise UsageError(
        f"--step={asked}: the checkpoint in {run} is damaged ({problem}); choose another step"
    )


def load_run(
    run: Path | str, step: int | str | None = None, device_type: str = "", dtype: str = "auto"
) -> tuple["Decoder", "Tokenizer"]:
    """(model in eval mode, tokenizer) of a run folder. As load_step(), without the step."""
    return load_step(run, step, device_type, dtype)[1:]


def load_step(
    run: Path | str, step: int | str | None = None, device_type: str = "", dtype: str = "auto"
) -> tuple[int, "Decoder", "Tokenizer"]:
    """(step, model in eval mode, tokenizer) of a run folder.

    step: of a checkpoint, "best", or None for the newest intact one. device_type: "" picks one.
    dtype: as --dtype of train.py, but auto means float32 on CPUs, which decode single tokens.
    UsageError for a folder that is not a run, a missing or damaged checkpoint, or a tokenizer that
    the model was not trained with."""
    run = Path(run)
    chosen = step_of(run, step)
    try:
        return chosen, *_load(run, chosen, device_type, dtype)
    except UsageError:
        # A step that was asked for is never replaced silently by another one.
        if step is not None or checkpoint.folder_of(run, chosen).exists():
            raise
    # A training process removed it in the meantime: there is a newer one.
    return load_step(run, None, device_type, dtype)


def _backend_on_cpu(run: Path, dtype: torch.dtype) -> str:
    """The attention of a run's own evaluations, where they ran on a CPU too: what is evaluated
    again should give the same numbers. Native where they did not, and it can be compiled."""
    from nanochat.model.kernels import cpu_reading

    config = read_json(run / "config.json", "run folder")
    on_cpu = config.get("hardware", {}).get("device_type") == "cpu"
    recorded = config.get("runtime", {}).get("attention") if on_cpu else None
    if recorded in ("blocked", "sdpa") or dtype not in cpu_reading.DTYPES:
        return "blocked"
    problem = cpu_reading.problem()
    if problem and recorded:
        note_once(f"evaluated without C++, unlike the run: the last digits may differ ({problem})")
    return "blocked" if problem else "native"


def _load(run: Path, step: int, device_type: str, dtype: str) -> tuple["Decoder", "Tokenizer"]:
    """load_step() of an existing step."""
    from nanochat.model.attention import pick_backend
    from nanochat.model.build import build

    hardware.ignore_unusable_kernel_cache()
    device = torch.device(hardware.pick_device_type(device_type))
    # One token at a time is bound by reading weights, where bf16 has no advantage on CPUs.
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    compute_dtype, _ = hardware.pick_dtype(dtype, device.type)
    # The tokenizer's file may have been replaced; other ids would decode to rubbish.
    state = checkpoint.read_state(run, step)
    tokenizer = read_tokenizer(run / "tokenizer")
    if tokenizer.fingerprint != state.get("tokenizer"):
        raise UsageError(
            f"{run}/tokenizer is not the tokenizer that step {step} was trained with; restore the "
            f"original file"
        )
    if device.type == "cpu":
        backend = _backend_on_cpu(run, compute_dtype)
    else:
        backend = pick_backend("auto", device.type)[0]
    model = build(checkpoint.model_config(run, step), device, compute_dtype, backend)
    checkpoint.load_model(run, step, model)
    # A model is built in training mode, in which dropout is active.
    return model.eval(), tokenizer
