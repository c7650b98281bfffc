"""A plan as people and programs read it: the block printed before step 0, and --json."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.common import counted, human_bytes, human_time
from nanochat.data.token_cache import CACHE_LIMIT_BYTES
from nanochat.hardware import Gpu
from nanochat.model import fp8
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.run import memory, scaling, sharded_scaling
from nanochat.run.flags import flag
from nanochat.run.plan import Machine, Plan
from nanochat.run.runtime import Runtime
from nanochat.run.scaling import Piece, StepTime
from nanochat.run.timing import short_time

LONG_RUN_SECONDS = 2 * 86400
# The share of the free memory from which on a sharded run on CPUs saves memory rather than time.
TIGHT = 0.5


@dataclass(frozen=True)
class PlannedRun:
    """A plan together with what it was made for.

    device_batch: rows that a device takes per pass. step_memory(rows): estimated peak bytes of a
    device. tight: it fills so much of a CPU's memory that freed memory should be given back, which
    takes time. depth, aspect_ratio, optimizer: the flags."""

    plan: Plan
    config: GPTConfig
    machine: Machine
    runtime: Runtime
    device_batch: int
    tokens_per_epoch: float
    step_memory: Callable[[int], int]
    tight: bool
    depth: int
    aspect_ratio: int
    optimizer: str
    pieces: Sequence[Piece] = ()
    # Of plans for a listed GPU, with what is assumed; and dollars per device-hour, or -1.
    step: StepTime | None = None
    assumed: Sequence[str] = ()
    gpu_price: float = -1
    # of the text that the horizon reads, where text is read; tokens are cached on every machine
    token_cache_bytes: float = 0

    @property
    def seconds(self) -> float:
        """Estimated training time."""
        if self.step is None or self.plan.budget_seconds is not None:
            return self.plan.estimated_seconds(self.machine)
        return self.plan.tokens / self.plan.total_batch_tokens * self.step.seconds

    @property
    def device_hours(self) -> float:
        """Estimated hours, summed over the devices."""
        return self.seconds * self.machine.devices / 3600

    @property
    def cost(self) -> float | None:
        """Dollars; None without a price."""
        return None if self.gpu_price == -1 else self.device_hours * self.gpu_price

    @property
    def accumulation(self) -> int:
        """Passes of every device in a step."""
        return self.plan.rows_per_step // (self.device_batch * self.machine.devices)

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated size of a checkpoint."""
        return memory.state_bytes(self.plan.parameters, self.optimizer)


def fit_plan(
    args: argparse.Namespace,
    plan: Plan,
    config: GPTConfig,
    machine: Machine,
    runtime: Runtime,
    tokens_per_epoch: float,
    free_bytes: float,
) -> PlannedRun:
    """Choose the rows that a device takes per pass. free_bytes: of one device.

    UsageError if a given number does not fit the batch or the memory, or if no row fits."""
    # Estimated here and measured before step 0: the plan has to be printed before anything is
    # built.
    pieces = scaling.pieces_of(config, plan.groups)
    step_memory = memory.StepMemory(
        config=config,
        parameters=plan.parameters,
        compute_dtype=runtime.dtype,
        backend=runtime.attention,
        optimizer=args.optimizer,
        compiled=runtime.compiled,
        activation_checkpointing=args.activation_checkpointing,
        device_type=machine.device_type,
        saves=not args.no_save,
        world_size=machine.devices,
        stacked=scaling.stacked_elements(pieces, machine.devices),
        shard=args.shard and machine.devices > 1,
    )
    device_batch = memory.pick_device_batch(
        step_memory.process_bytes,
        device_batch_size=args.device_batch_size,
        rows_per_step=plan.rows_per_step,
        max_seq_len=args.max_seq_len,
        free_bytes=free_bytes,
        world_size=machine.devices,
        device_type=machine.device_type,
    )
    return PlannedRun(
        plan=plan,
        config=config,
        machine=machine,
        runtime=runtime,
        device_batch=device_batch,
        tokens_per_epoch=tokens_per_epoch,
        step_memory=step_memory.process_bytes,
        tight=(
            step_memory.shard
            and machine.device_type == "cpu"
            and step_memory.process_bytes(device_batch) > TIGHT * free_bytes
        ),
        depth=args.depth,
        aspect_ratio=args.aspect_ratio,
        optimizer=args.optimizer,
        pieces=pieces,
    )


def on_gpus(planned: PlannedRun, gpu: Gpu, network_gbits: float) -> PlannedRun:
    """The same plan with the time of a step on listed GPUs. network_gbits: as --gpu-network."""
    plan = planned.plan
    work = scaling.Work(
        config=planned.config,
        flops_per_token=plan.flops_per_token,
        parameters=plan.parameters["total"],
        pieces=planned.pieces,
        tokens=plan.total_batch_tokens // planned.machine.devices,
        passes=planned.accumulation,
    )
    speeds = scaling.listed_speeds(
        gpu,
        planned.machine.devices,
        network_gbits,
        # gradients that are scaled have to be unscaled first, unless each pass gives them away
        overlaps=planned.runtime.dtype != torch.float16 or planned.runtime.shard,
    )
    assumed = scaling.assumptions(network_gbits)
    # one rank alone has all weights
    if planned.runtime.shard and planned.machine.devices > 1:
        element_bytes = planned.runtime.dtype.itemsize
        units = sharded_scaling.units_of(planned.config, element_bytes)
        step = sharded_scaling.sharded_step_time(work, units, element_bytes, speeds)
        assumed = sharded_scaling.assumptions(network_gbits, planned.runtime.dtype_name)
    else:
        step = scaling.step_time(work, speeds)
    return dataclasses.replace(planned, step=step, assumed=assumed)


def as_json(run: PlannedRun) -> dict[str, Any]:
    """The plan as numbers, for --json."""
    # What of the model gains by fp8 is decided by shapes alone, so it can be planned anywhere.
    converted = fp8.large_layers(meta_model(run.config)) if run.runtime.fp8_recipe else {}
    step = run.step and {**dataclasses.asdict(run.step), "seconds": run.step.seconds}
    return {
        "model": dataclasses.asdict(run.config),
        "plan": run.plan.as_dict(),
        "flops": run.plan.flops,
        "device_type": run.machine.device_type,
        "devices": run.machine.devices,
        "device_batch_size": run.device_batch,
        "accumulation": run.accumulation,
        "dtype": run.runtime.dtype_name,
        "fp8_layers": list(converted),
        "peak_flops": run.machine.peak_flops,
        "peak": run.machine.peak,
        "estimates": {
            "seconds": run.seconds,
            "device_hours": run.device_hours,
            "cost": run.cost,
            "assumed_mfu": run.machine.assumed_mfu,
            "memory_bytes": run.step_memory(run.device_batch),
            "checkpoint_bytes": run.checkpoint_bytes,
            "token_cache_bytes": run.token_cache_bytes,
        },
        # None without --gpu: the links of this machine are not listed.
        "step": step,
        "assumptions": list(run.assumed),
    }


def format_plan(run: PlannedRun) -> str:
    """The plan as an aligned block of lines."""
    # The order in which each follows from what is above it.
    sections = {
        "model": _model_lines(run),
        "parameters": _parameter_lines(run.plan),
        "horizon": _horizon_lines(run),
        "batch": _batch_lines(run),
        "optimizer": _optimizer_lines(run.plan),
        "estimates": _estimate_lines(run),
        "a step": _step_lines(run),
    }
    lines = ["plan:"]
    for section, entries in sections.items():
        title = section
        for name, value in entries.items():
            lines.append(f"  {title:<11} {name:<26} {value}")
            # The section is named on its first line only.
            title = ""
    return "\n".join(lines)


Lines = dict[str, Any]


def _model_lines(run: PlannedRun) -> Lines:
    config = run.config
    derivation = f"{run.depth} x {run.aspect_ratio}"
    if config.width != run.depth * run.aspect_ratio:
        derivation += f", rounded up to heads of {config.head_dim}"
    # Full context is written as a window without limit.
    windows = [str(min(window, config.max_seq_len)) for window in config.windows()]
    return {
        "arch": config.arch,
        "depth": config.depth,
        "width": f"{config.width} ({derivation})",
        "heads": f"{config.n_head} query, {config.n_kv_head} key/value",
        "context": config.max_seq_len,
        "windows": " ".join(windows),
        "vocabulary": config.vocab_size,
    }


def _parameter_lines(plan: Plan) -> Lines:
    lines: Lines = {group: f"{count:,}" for group, count in plan.parameters.items() if count}
    lines["scaling (matrices + head)"] = f"{plan.scaling_parameters:,}"
    return lines


def _horizon_lines(run: PlannedRun) -> Lines:
    plan = run.plan
    tokens = f"{plan.tokens:,.0f}"
    steps = plan.num_iterations
    if steps is None:
        steps = "fixed once the speed is measured"
        # At the assumed speed; the first steps will measure it.
        tokens += " (estimate)"
    epochs = f"{plan.tokens / run.tokens_per_epoch:.2f}"
    if plan.tokens > run.tokens_per_epoch:
        epochs += ": the data repeats"
    return {
        "decided by": f"{flag(plan.horizon)}={plan.horizon_value}",
        "steps": steps,
        "tokens": tokens,
        "epochs": epochs,
        "tokens per parameter": f"{plan.tokens / plan.scaling_parameters:.2f}",
        "FLOPs": f"{plan.flops:.3e} ({plan.flops_per_token:,} a token)",
    }


def _batch_lines(run: PlannedRun) -> Lines:
    plan = run.plan
    rows = plan.rows_per_step
    return {
        # rows of preference pairs may be shorter than the context
        "tokens a step": f"{rows} x {plan.total_batch_tokens // rows} = "
        f"{plan.total_batch_tokens:,}",
        "rows": f"{run.device_batch} a device x {counted(run.machine.devices, 'device')} x "
        f"{run.accumulation} accumulated = {rows}",
    }


def _optimizer_lines(plan: Plan) -> Lines:
    lines: Lines = {}
    for name, group in plan.groups.items():
        # A group may be empty: a tied head belongs to the embedding.
        if plan.parameters[name]:
            lines[name] = ", ".join(f"{key} {value:.4g}" for key, value in group.items())
    schedule = plan.schedule
    warmdown = str(plan.warmdown_steps)
    if plan.num_iterations is None:
        warmdown = f"{schedule.warmdown_ratio:.0%}"
    lines["schedule"] = (
        f"{schedule.shape}, warm-up {plan.warmup_steps} steps, warm-down {warmdown} to "
        f"{schedule.final_lr_frac:g}"
    )
    return lines


def _estimate_lines(run: PlannedRun) -> Lines:
    machine = run.machine
    seconds = human_time(run.seconds)
    peak = f"{machine.peak_flops / 1e12:.3g} TFLOP/s ({machine.peak})"
    lines = {
        "time": f"{seconds} at {machine.assumed_mfu:.0%} of {machine.devices} x {peak}",
        "device-hours": f"{run.device_hours:.3g}",
    }
    cached = {}
    if run.token_cache_bytes:
        cached["token cache"] = _token_cache(run.token_cache_bytes)
    if run.cost is not None:
        lines["cost"] = f"${run.cost:,.0f} at ${run.gpu_price:g} a device-hour"
    return lines | {
        "memory a device": human_bytes(run.step_memory(run.device_batch)),
        "a checkpoint": human_bytes(run.checkpoint_bytes),
        **cached,
    }


def _step_lines(run: PlannedRun) -> Lines:
    """How long a step takes on a listed GPU, and what is exchanged in it."""
    step = run.step
    if step is None:
        return {}
    parts = [f"{name} {short_time(seconds)}" for name, seconds in step.parts.items() if seconds]
    lines = {"time": f"{short_time(step.seconds)}: {', '.join(parts)}"}
    if step.sent_bytes:
        hidden = step.travel - step.gradients - step.parameters
        lines["exchange"] = (
            f"each device sends {human_bytes(round(step.sent_bytes))} in "
            f"{short_time(step.travel)}, at {step.sent_bytes / step.travel / 1e9:.3g} GB/s; "
            f"{max(0.0, hidden) / step.travel:.0%} hidden, {step.zeros:.0%} zeros"
        )
    lines["assumed"] = "; ".join(run.assumed)
    return lines


def _token_cache(n_bytes: float) -> str:
    text = f"{human_bytes(n_bytes)} on each machine"
    if n_bytes > CACHE_LIMIT_BYTES:
        kept = human_bytes(CACHE_LIMIT_BYTES)
        text += f", of which the last {kept} are kept: a second epoch tokenizes the rest again"
    return text


def long_run_advice(run: PlannedRun) -> str:
    """For a run of more than two days, a sentence on what would fit this machine; else ""."""
    seconds = run.seconds
    if seconds <= LONG_RUN_SECONDS:
        return ""
    budget = "a time budget such as --target-minutes=600"
    advice = f"this run is estimated to take {human_time(seconds)}; for this machine try "
    # with these horizons a smaller model would take as long
    if run.plan.horizon in ("target_minutes", "target_flops"):
        return advice + budget
    # time grows with the parameters, about depth^3, and at a fixed ratio so do the tokens
    power = 6 if run.plan.horizon == "target_param_data_ratio" else 3
    # Solved for the depth that would take two days.
    depth = int(run.depth * (LONG_RUN_SECONDS / seconds) ** (1 / power))
    return f"{advice}--depth={max(1, min(run.depth - 1, depth))}, or {budget}"
