"""Checkpoints that exist whole or not at all, saving them beside training, and loading a run's model.

A checkpoint is a folder checkpoints/step_000500/ with model.safetensors, optimizer.safetensors, state.json and, written
last, manifest.json with every file's size and SHA-256. It is made under a hidden name (.step_...), read back, and renamed when
it is on disk; it is renamed to a hidden one before it is deleted. So whatever has its name is whole, at any moment.
State is by parameter name in full tensors: nothing in it depends on ranks, device, batch layout or compilation."""

import errno
import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import tokenizer as tokenizers
from nanochat.common import UsageError, fsync_dir, human_bytes, read_json, sha256_file, write_atomic, write_json

FORMAT = 1
# Why a checkpoint was saved, weakest first: a rolling one goes when the next is safe, the others stay.
KINDS = ("rolling", "permanent", "before_warmdown", "final")
SPARE_BYTES = 1 << 20  # of free space that a save wants beyond its tensors: for state.json, the manifest and metrics
RETRY_SECONDS = 60.0  # until a failed save is tried again
LAST_ATTEMPTS = (1.0, 5.0, 15.0)  # seconds to wait before each further attempt at a run's last save


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
    """Write the checkpoint of a step, now (training uses a Saver). loop_state: JSON values that the loop needs besides tensors.

    optimizer_state: what Optimizer.state() returned. An existing checkpoint of the same step only gets the stronger kind.
    Raises OSError or SafetensorError when the disk refuses; what was there before stays."""
    tensors = {file: {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
               for file, part in _tensors(model, optimizer_state).items()}
    _write(run_path, step, kind, tensors, {"model": asdict(model.config), **loop_state})


def _tensors(model, optimizer_state):
    """{file name: {tensor name: tensor}} of a checkpoint."""
    return {"model.safetensors": model.state_dict(),
            "optimizer.safetensors": {f"{name}/{key}": tensor for name, state in optimizer_state.items() for key, tensor in state.items()}}


def _write(run_path, step, kind, tensors, state, records=()):
    """save() of CPU tensors by file. records: what is brought to the disk before the checkpoint exists, which vouches for it."""
    from safetensors.torch import save_file
    final = folder_of(run_path, step)
    if (final / "manifest.json").exists() and damage(run_path, step) is None:
        if KINDS.index(kind) > KINDS.index(kind_of(run_path, step)):
            manifest = read_json(final / "manifest.json", "checkpoint")
            write_json(final / "manifest.json", {**manifest, "kind": kind})
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    need = sum(tensor.nbytes for part in tensors.values() for tensor in part.values()) + SPARE_BYTES
    if (free := shutil.disk_usage(final.parent).free) < need:
        raise OSError(errno.ENOSPC, f"it needs {human_bytes(need)}, and {human_bytes(free)} are free")
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for file, part in tensors.items():
            save_file(part, partial / file)
        write_json(partial / "state.json", {"format": FORMAT, "step": step, **state})
        files = {}
        for path in sorted(partial.iterdir()):
            path.chmod(0o644)  # safetensors makes its files private
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        write_json(partial / "manifest.json", {"format": FORMAT, "step": step, "kind": kind, "files": files})
        for file, part in tensors.items():
            _compare(partial / file, part)
        for record in records:
            record.sync()
        if final.exists():  # damaged, or left without its manifest by something else than this program: not ours to delete
            _set_aside(final)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_dir(final.parent)


def _compare(path, tensors):
    """Read a file back. OSError unless it holds exactly these tensors."""
    from safetensors import safe_open

    def content(tensor):
        return tensor.reshape(-1).view(torch.uint8)  # bit for bit, whatever the numbers are

    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(content(file.get_tensor(name)), content(tensor)):
                raise OSError(errno.EIO, f"{path.name} reads back other than it was written; check the disk")


class Saver:
    """Saves the checkpoints of a run, on rank 0, while training goes on: save() copies the state, a thread writes the copy.

    One copy of the state is held, so that a save() that comes while the copy is being written waits for that. Older
    checkpoints are removed after the new one was read back. A failed write is reported and leaves `failure` set until a
    later one succeeds; training decides when to try again (retry_due)."""

    def __init__(self, run_path, keep_last, report, records):
        """keep_last: as --keep-last. report(text) takes a line. records: the run's (metrics, samples), runlog.Metrics, which
        are on the disk before a checkpoint appears that is later than they; the former know how good the best one is."""
        self.run_path, self.keep_last, self.report, self.records = run_path, keep_last, report, records
        self.best_bpb = records[0].value_at(best_step(run_path), "val/bpb")
        self.copy, self.last = {}, None  # {file: {tensor name: CPU tensor}}; step, kind and state of the last save
        self.failure, self.failed_at = "", 0.0
        self.jobs = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def save(self, step, kind, model, optimizer_state, loop_state):
        """Copy the state and hand it to the thread. Waits for a save that is still under way."""
        self.wait()
        tensors = _tensors(model, optimizer_state)
        if not self.copy:
            pin = next(model.parameters()).is_cuda
            self.copy = {file: {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin) for name, tensor in part.items()}
                         for file, part in tensors.items()}
        pairs = [(self.copy[file][name], tensor.detach()) for file, part in tensors.items() for name, tensor in part.items()]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)), non_blocking=True)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.last = step, kind, {"model": asdict(model.config), **loop_state}
        self.jobs.put(self._save_last)

    def mark_best(self, step, bpb):
        """Let `best` name the checkpoint of a step, once it is there, if bpb is lower than the best one's."""
        def mark():
            if step in steps_of(self.run_path) and (self.best_bpb is None or bpb < self.best_bpb):
                mark_best(self.run_path, step)
                self.best_bpb = bpb
        self.jobs.put(mark)

    def busy(self):
        """Whether a save is under way."""
        return self.jobs.unfinished_tasks > 0

    def retry_due(self):
        """Whether the last save failed, RETRY_SECONDS ago or longer."""
        return bool(self.failure) and time.monotonic() - self.failed_at > RETRY_SECONDS

    def wait(self):
        """Return when nothing is under way."""
        self.jobs.join()

    def finish(self, sleep=time.sleep):
        """wait(), and if the last save failed try it again, after LAST_ATTEMPTS. Returns why it failed in the end, or ""."""
        self.wait()
        for seconds in LAST_ATTEMPTS:
            if not self.failure:
                break
            sleep(seconds)
            self._save_last()
        return self.failure

    def close(self):
        """End the thread, once it has done what it was given; not waited for."""
        self.jobs.put(None)

    def _save_last(self):
        step, kind, state = self.last
        try:
            _write(self.run_path, step, kind, self.copy, state, self.records)
        except Exception as error:  # whatever it is, the run is worth more than this checkpoint
            good = steps_of(self.run_path)
            self.failure, self.failed_at = f"the checkpoint of step {step} cannot be saved ({error})", time.monotonic()
            self.report(f"{self.failure}; it will be tried again, the newest checkpoint is " + (f"step {good[-1]}" if good else "none yet"))
            return
        if self.failure:
            self.report(f"checkpoint saved at step {step}, after the failure before")
        self.failure = ""
        prune(self.run_path, self.keep_last)

    def _run(self):
        job = True
        while job is not None:
            job = self.jobs.get()
            try:
                if job is not None:
                    job()
            except Exception as error:  # of pruning or marking: the checkpoint itself is safe
                self.report(f"checkpoints: {type(error).__name__}: {error}; training goes on")
            finally:
                self.jobs.task_done()


def prune(run_path, keep_last):
    """Remove rolling checkpoints older than the newest checkpoint, and permanent ones beyond the newest keep_last (-1: all).

    The best one by validation stays, whatever its kind."""
    steps = steps_of(run_path)
    kinds = {step: kind_of(run_path, step) for step in steps}
    permanent = [step for step in steps if kinds[step] == "permanent"]
    doomed = [step for step in steps[:-1] if kinds[step] == "rolling"]
    if keep_last != -1:
        doomed += permanent[: max(0, len(permanent) - keep_last)]
    for step in doomed:
        if step != best_step(run_path):
            hidden = folder_of(run_path, step).with_name(f".{folder_of(run_path, step).name}.old")
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(folder_of(run_path, step), hidden)
            shutil.rmtree(hidden)


def sweep(run_path):
    """Delete what a killed process left of checkpoints that it was writing or deleting. Only for who holds the run's lock."""
    for path in (Path(run_path) / "checkpoints").glob(".step_*"):
        shutil.rmtree(path)


def _set_aside(folder):
    """Rename a checkpoint's folder, so that another can take its place; nothing is deleted."""
    times = len(list(folder.parent.glob(f"set_aside_*_{folder.name}")))
    os.rename(folder, folder.with_name(f"set_aside_{times + 1}_{folder.name}"))


def set_aside_after(run_path, step, report=lambda text: None):
    """Rename checkpoints later than `step`, so that training from there can save its own; none is deleted. Returns their steps;
    report(text) names them.

    checkpoints/best goes if it named one of them."""
    aside = [later for later in steps_of(run_path) if later > step]
    for later in aside:
        _set_aside(folder_of(run_path, later))
    if aside:
        report(f"set aside: the checkpoints of steps {', '.join(map(str, aside))}, now checkpoints/set_aside_*; delete them at will")
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
    """What is wrong with a checkpoint's files (sizes and hashes against the manifest), or None. UsageError if it is of a
    newer format: that is no damage."""
    folder = folder_of(run_path, step)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        _check_format(manifest, folder)
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


def _check_format(content, folder):
    """UsageError if a manifest or state is of another format than this version's."""
    if isinstance(content, dict) and content.get("format") != FORMAT:
        raise UsageError(f"checkpoint: {folder} has format {content.get('format')}; this version reads format {FORMAT}: use the version "
                         f"of nanochat that wrote it")


def read_state(run_path, step):
    """state.json of a checkpoint. UsageError if its format is not this version's."""
    folder = folder_of(run_path, step)
    state = read_json(folder / "state.json", "checkpoint")
    _check_format(state, folder)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UsageError(f"checkpoint: {folder}/state.json does not describe a model")
    return state


def model_config(run_path, step):
    """The GPTConfig of a checkpoint. UsageError if state.json does not hold one."""
    from nanochat.model import GPTConfig
    try:
        return GPTConfig(**read_state(run_path, step)["model"])
    except (TypeError, ValueError) as error:
        raise UsageError(f"checkpoint: {folder_of(run_path, step)}/state.json does not describe a model ({error})") from None


def _read_tensors(path):
    """{name: tensor} of a safetensors file, on the CPU. UsageError if it is none: other formats may hold code and are not read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"checkpoint: {path} cannot be read as safetensors ({error}); choose another step") from None


def load_model(run_path, step, model):
    """Copy a checkpoint's weights into a model built with the same config. UsageError if they do not fit it."""
    path = folder_of(run_path, step) / "model.safetensors"
    try:
        model.load_state_dict(_read_tensors(path), strict=True)
    except RuntimeError as error:
        raise UsageError(f"checkpoint: {path} does not fit the model that its state.json describes ({error})") from None


def load_optimizer(run_path, step):
    """The state to give to Optimizer.load(): {parameter name: {state name: tensor}} on the CPU."""
    state = {}
    for key, tensor in _read_tensors(folder_of(run_path, step) / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("/")
        state.setdefault(name, {})[entry] = tensor
    return state


def step_of(run, step):
    """The step of the intact checkpoint that is meant: by its step, "best", or None for the newest. UsageError if there is none."""
    run, asked = Path(run), step
    if not (run / "config.json").exists():
        raise UsageError(f"{run} is not a run folder (it has no config.json); give <out-dir>/<model-tag>")
    steps = steps_of(run)
    if not steps:
        raise UsageError(f"{run} has no checkpoint yet; train.py saves one at the latest when it ends or is stopped")
    if step is None:
        step = newest_intact(run, report=lambda text: print(text, file=sys.stderr))
        if step is None:
            raise UsageError(f"{run} has no intact checkpoint")
        return step
    if step == "best" and (step := best_step(run)) is None:
        raise UsageError(f"--step=best: {run} has no evaluated checkpoint; leave it out for the newest")
    if step not in steps:
        raise UsageError(f"--step={asked}: {run} has no such checkpoint (it has: {', '.join(map(str, steps))})")
    if problem := damage(run, step):
        raise UsageError(f"--step={asked}: the checkpoint in {run} is damaged ({problem}); choose another step")
    return step


def load_run(run, step=None, device_type="", dtype="auto"):
    """(model in eval mode, tokenizer) of a run folder. step: of a checkpoint, "best", or None for the newest intact one.

    dtype: as --dtype of train.py, but auto means float32 on CPUs, where single tokens are decoded. UsageError for a
    folder that is no run, a missing or damaged checkpoint, or a tokenizer that is not the model's."""
    from nanochat import hardware, model as models
    from nanochat.attention import pick_backend
    run, step = Path(run), step_of(run, step)
    device = torch.device(hardware.pick_device_type(device_type))
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    compute_dtype, _ = hardware.pick_dtype(dtype, device.type)
    state, tokenizer = read_state(run, step), tokenizers.load(run / "tokenizer")
    if tokenizer.fingerprint != state.get("tokenizer"):
        raise UsageError(f"{run}/tokenizer is not the tokenizer that step {step} was trained with; restore the original file")
    model = models.build(model_config(run, step), device, compute_dtype, pick_backend("auto", device.type)[0])
    load_model(run, step, model)
    return model.eval(), tokenizer
