"""Checkpoints that exist whole or not at all, and loading a run's model.

A checkpoint is a folder checkpoints/step_000500/ with model.safetensors, optimizer.safetensors, state.json and, written
last, manifest.json with every file's size and SHA-256. It is made under another name and renamed when it is on disk.
State is by parameter name in full tensors: nothing in it depends on ranks, device, batch layout or compilation."""

import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import tokenizer as tokenizers
from nanochat.common import UsageError, fsync_dir, read_json, sha256_file, write_atomic, write_json

FORMAT = 1
# Why a checkpoint was saved, weakest first: a rolling one goes when the next is safe, the others stay.
KINDS = ("rolling", "permanent", "before_warmdown", "final")


def folder_of(run_path, step):
    return Path(run_path) / "checkpoints" / f"step_{step:06d}"


def steps_of(run_path):
    """Steps of the complete checkpoints of a run, ascending."""
    names = [path.parent.name for path in (Path(run_path) / "checkpoints").glob("step_*/manifest.json")]
    return sorted(int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d{6,}", name))


def kind_of(run_path, step):
    """Why the checkpoint was saved (one of KINDS), or None if its manifest is damaged."""
    try:
        return json.loads((folder_of(run_path, step) / "manifest.json").read_text(encoding="utf-8"))["kind"]
    except (ValueError, KeyError, TypeError):
        return None


def save(run_path, step, kind, model, optimizer_state, loop_state):
    """Write the checkpoint of a step. loop_state: JSON values that the loop needs besides the tensors.

    optimizer_state: what Optimizer.state() returned on every rank; only one rank calls save(). An existing checkpoint
    of the same step is replaced if this one's kind is stronger. Raises OSError when the disk refuses; what was there
    before stays."""
    from safetensors.torch import save_file
    final = folder_of(run_path, step)
    if (final / "manifest.json").exists():
        if damage(run_path, step) is None and KINDS.index(kind) > KINDS.index(kind_of(run_path, step)):
            manifest = read_json(final / "manifest.json", "checkpoint")
            write_json(final / "manifest.json", {**manifest, "kind": kind})
        return
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, partial / "model.safetensors")
    moments = {f"{name}/{key}": tensor.detach().cpu().contiguous()
               for name, state in optimizer_state.items() for key, tensor in state.items()}
    save_file(moments, partial / "optimizer.safetensors")
    write_json(partial / "state.json", {"format": FORMAT, "step": step, "model": asdict(model.config), **loop_state})
    files = {}
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)  # safetensors makes its files private
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(partial / "manifest.json", {"format": FORMAT, "step": step, "kind": kind, "files": files})
    shutil.rmtree(final, ignore_errors=True)  # left over without a manifest: not a checkpoint
    os.rename(partial, final)
    fsync_dir(final.parent)


def prune(run_path, keep_last):
    """Remove rolling checkpoints older than the newest checkpoint, and permanent ones beyond the newest keep_last (-1: all).

    The best one by validation stays, whatever its kind.
    The manifest goes first, so that a half-removed folder is not taken for a checkpoint."""
    steps = steps_of(run_path)
    kinds = {step: kind_of(run_path, step) for step in steps}
    permanent = [step for step in steps if kinds[step] == "permanent"]
    doomed = [step for step in steps[:-1] if kinds[step] == "rolling"]
    if keep_last != -1:
        doomed += permanent[: max(0, len(permanent) - keep_last)]
    doomed = [step for step in doomed if step != best_step(run_path)]
    for step in doomed:
        folder = folder_of(run_path, step)
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)


def set_aside_after(run_path, step):
    """Rename checkpoints later than `step`, so that training from there can save its own; none is deleted. Returns their steps.

    checkpoints/best goes if it named one of them."""
    aside = [later for later in steps_of(run_path) if later > step]
    for later in aside:
        folder = folder_of(run_path, later)
        times = len(list(folder.parent.glob(f"set_aside_*_{folder.name}")))
        os.rename(folder, folder.with_name(f"set_aside_{times + 1}_{folder.name}"))
    if (best := best_step(run_path)) is not None and best > step:
        (Path(run_path) / "checkpoints" / "best").unlink()
    return aside


def best_step(run_path):
    """The step named in checkpoints/best, or None."""
    path = Path(run_path) / "checkpoints" / "best"
    return int(path.read_text().strip().removeprefix("step_")) if path.exists() else None


def mark_best(run_path, step):
    """Write checkpoints/best: the name of the checkpoint with the lowest validation bits per byte."""
    write_atomic(Path(run_path) / "checkpoints" / "best", f"step_{step:06d}\n")


def damage(run_path, step):
    """What is wrong with a checkpoint's files (sizes and hashes against the manifest), or None."""
    folder = folder_of(run_path, step)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is unreadable"
    for name, (n_bytes, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != n_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {n_bytes}"
        if sha256_file(path) != digest:
            return f"{name} does not match its hash"
    return None


def newest_intact(run_path, report):
    """The newest step whose files are intact, or None if the run has no such checkpoint. report(text) names damaged ones."""
    for step in reversed(steps_of(run_path)):
        problem = damage(run_path, step)
        if problem is None:
            return step
        report(f"checkpoint {folder_of(run_path, step)} is damaged ({problem}); trying the one before")
    return None


def read_state(run_path, step):
    """state.json of a checkpoint. UsageError if its format is not this version's."""
    state = read_json(folder_of(run_path, step) / "state.json", "checkpoint")
    if state.get("format") != FORMAT:
        raise UsageError(f"checkpoint: {folder_of(run_path, step)} has format {state.get('format')}; this version reads "
                         f"format {FORMAT}: use the version of nanochat that wrote it")
    return state


def load_model(run_path, step, model):
    """Copy a checkpoint's weights into a model built with the same config."""
    from safetensors.torch import load_file
    model.load_state_dict(load_file(folder_of(run_path, step) / "model.safetensors"), strict=True)


def load_optimizer(run_path, step):
    """The state to give to Optimizer.load(): {parameter name: {state name: tensor}} on the CPU."""
    from safetensors.torch import load_file
    state = {}
    for key, tensor in load_file(folder_of(run_path, step) / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("/")
        state.setdefault(name, {})[entry] = tensor
    return state


def load_run(run, step=None, device_type="", dtype="auto"):
    """(model in eval mode, tokenizer) of a run folder. step: None for the newest intact checkpoint.

    dtype: as --dtype of train.py, but auto means float32 on CPUs, where single tokens are decoded. UsageError for a
    folder that is no run, a missing or damaged checkpoint, or a tokenizer that is not the model's."""
    from nanochat import hardware, model as models
    from nanochat.attention import pick_backend
    run = Path(run)
    if not (run / "config.json").exists():
        raise UsageError(f"{run} is not a run folder (it has no config.json); give <out-dir>/<model-tag>")
    steps = steps_of(run)
    if not steps:
        raise UsageError(f"{run} has no checkpoint yet; train.py saves one at the latest when it ends or is stopped")
    if step is None:
        step = newest_intact(run, report=lambda text: print(text, file=sys.stderr))
        if step is None:
            raise UsageError(f"{run} has no intact checkpoint")
    elif step not in steps:
        raise UsageError(f"--step={step}: {run} has no such checkpoint (it has: {', '.join(map(str, steps))})")
    elif problem := damage(run, step):
        raise UsageError(f"--step={step}: the checkpoint in {run} is damaged ({problem}); choose another step")
    device = torch.device(hardware.pick_device_type(device_type))
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    compute_dtype, _ = hardware.pick_dtype(dtype, device.type)
    state, tokenizer = read_state(run, step), tokenizers.load(run / "tokenizer")
    if tokenizer.fingerprint != state["tokenizer"]:
        raise UsageError(f"{run}/tokenizer is not the tokenizer that step {step} was trained with; restore the original file")
    config = models.GPTConfig(**state["model"])
    model = models.build(config, device, compute_dtype, pick_backend("auto", device.type)[0])
    load_model(run, step, model)
    return model.eval(), tokenizer
