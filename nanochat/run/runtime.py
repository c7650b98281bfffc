"""What computes how on this machine: compute dtype, attention, compiler, fp8, loss."""

import argparse
from typing import NamedTuple

import torch

from nanochat import hardware, ranks
from nanochat.hardware import Gpu
from nanochat.model import fp8
from nanochat.model.attention import check_flash_attention, pick_backend
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.model.loss import pick_loss
from nanochat.optim.muon import updates_problem
from nanochat.run import compiler
from nanochat.run.plan import model_config


class Runtime(NamedTuple):
    """no_compiler: why torch.compile is not used, or None. plain_updates: why Muon's updates are
    not in C++, None if they are. fp8_recipe: of layers that are trained in fp8, or None. shard:
    --shard. planned: for --dry-run; what can be compiled is guessed."""

    dtype: torch.dtype
    dtype_reason: str
    attention: str
    attention_reason: str
    no_compiler: str | None
    plain_updates: str | None
    fp8_recipe: str | None
    shard: bool = False
    planned: bool = False

    @property
    def compiled(self) -> bool:
        """Whether torch.compile is used."""
        return self.no_compiler is None

    @property
    def dtype_name(self) -> str:
        """The compute dtype as --dtype spells it."""
        return str(self.dtype).removeprefix("torch.")

    def facts(self) -> dict[str, object]:
        """What config.json keeps of it."""
        return {
            "dtype": str(self.dtype),
            "attention": self.attention,
            "compiled": self.compiled,
            "updates": "plain" if self.plain_updates else "native",
        }


def pick_runtime(args: argparse.Namespace, device_type: str, gpu: Gpu | None = None) -> Runtime:
    """The Runtime that the flags ask for on this machine, or on a listed GPU. Every rank must call
    it, and all get the same.

    UsageError for what cannot be had there."""
    capability = gpu.capability if gpu else None
    dtype, dtype_reason = hardware.pick_dtype(
        args.dtype, device_type, training=True, capability=capability
    )
    # A GPU that is only planned for has whatever compiler its machine has.
    no_compiler = None
    if not args.compile:
        no_compiler = "--no-compile"
    elif gpu is None and args.dry_run:
        # A plan says what is likely; it compiles nothing, and no process group exists.
        no_compiler = compiler.missing(device_type)
    elif gpu is None:
        no_compiler = compiler.problem(device_type)
    # Attention may need the compiler, so it is chosen after it.
    backend, backend_reason = pick_backend(
        args.attention, device_type, dtype, args.head_dim, capability, no_compiler, args.dry_run
    )
    if backend in ("fa3", "fa4") and gpu is None and not args.dry_run:
        check_flash_attention(backend, torch.device(device_type), dtype)
    plain_updates = _plain_updates(args, device_type, not no_compiler)
    fp8_recipe = None
    if args.fp8:
        fp8_recipe = args.fp8_recipe
        # the vocabulary plays no part: the head is never converted
        model = meta_model(model_config(args, vocab_size=1))
        fp8.require(model, device_type, dtype, no_compiler, capability)
    return Runtime(
        dtype,
        dtype_reason,
        backend,
        backend_reason,
        no_compiler,
        plain_updates,
        fp8_recipe,
        args.shard,
        args.dry_run,
    )


def _plain_updates(args: argparse.Namespace, device_type: str, compiled: bool) -> str | None:
    """Runtime.plain_updates. Where one rank cannot compile them, none does."""
    if args.optimizer != "muon":
        return f"--optimizer={args.optimizer}"
    problem = updates_problem(device_type, compiled, args.dry_run)
    problems = [problem] if args.dry_run else ranks.from_all(problem)
    return next(filter(None, problems), None)


def runtime_in_words(runtime: Runtime, config: GPTConfig, device_type: str, devices: int) -> str:
    """The line that says what computes how, and why."""
    # Every choice stands with its reason: what was asked for, or what this machine can do.
    loss, loss_reason = pick_loss(device_type, runtime.compiled, runtime.planned)
    numbers = f"{runtime.dtype_name} ({runtime.dtype_reason})"
    if runtime.dtype == torch.float16:
        numbers += " with loss scaling"
    if runtime.fp8_recipe:
        numbers += f", {fp8.in_words(meta_model(config), runtime.fp8_recipe)}"
    if runtime.shard:
        numbers += (
            f"; weights split over {devices} ranks (FSDP2)"
            if devices > 1
            else "; --shard changes nothing with one rank"
        )
    compiled = "compiled per block" if runtime.compiled else f"eager ({runtime.no_compiler})"
    updates = ""
    if device_type == "cpu" and not runtime.plain_updates:
        updates = "updates: native (what Muon does between its products, in C++); "
    elif device_type == "cpu":
        updates = f"updates: plain ({runtime.plain_updates}); "
    return (
        f"runtime: {device_type} x {devices}, {numbers}; "
        f"attention: {runtime.attention} ({runtime.attention_reason}); {compiled}; "
        f"loss: {loss} ({loss_reason}), cross-entropy in fp32; {updates}"
        "fp32 products in full precision; deterministic algorithms on"
    )
