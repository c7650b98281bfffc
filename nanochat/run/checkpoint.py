"""Checkpoints that exist whole or not at all, saving them beside training, and loading a run's model.

A checkpoint is a folder checkpoints/step_000500/ with model.safetensors, optimizer.safetensors, state.json and, written
last, manifest.json with every file's size and SHA-256. It is made under a hidden name (.step_...), read back, and renamed when
it is on disk; it is renamed to a hidden one before it is deleted. So whatever has its name is whole, at any moment.
State is by parameter name in full tensors: nothing in it depends on ranks, device, batch layout or compilation."""

import errno
import json
import math
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

from nanochat.common import (
    UsageError,
    fsync_dir,
    human_bytes,
    read_json,
    sha256_file,
    sha256_hex,
    write_atomic,
    write_json,
)
from nanochat.data import tokenizer as tokenizers

FORMAT = 2  # 1, which is read as well: its manifest has no hash of its own
# Why a checkpoint was saved, weakest first: a rolling one goes when the next is safe, the others stay.
KINDS = ("rolling", "permanent", "before_warmdown", "final")
SPARE_BYTES = (
    1 << 20
)  # of free space that a save wants beyond its tensors: for state.json, the manifest and metrics
RETRY_SECONDS = 60.0  # until a failed save is tried again
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)  # what a manifest of any content can cause
LAST_ATTEMPTS = (1.0, 5.0, 15.0)  # seconds to wait before each further attempt at a run's last save


class NotFinite(UsageError):
    """A state that holds NaN or infinite numbers, of which no checkpoint is made: training could not go on from it."""


def folder_of(run_path, step):
    return Path(run_path) / "checkpoints" / f"step_{step:06d}"


def steps_of(run_path):
    """Steps of the complete checkpoints of a run, ascending."""
    names = [
        path.parent.name for path in (Path(run_path) / "checkpoints").glob("step_*/manifest.json")
    ]
    return sorted(
        int(name.removeprefix("step_")) for name in names if re.fullmatch(r"step_\d{6,}", name)
    )


def newest_in_words(run_path):
    """Where a run can go on from, for its last line; "" if nowhere."""
    steps, best = steps_of(run_path), best_step(run_path)
    if not steps:
        return ""
    return f"checkpoint at step {steps[-1]}" + (
        f" (the best by validation: {best})" if best not in (None, steps[-1]) else ""
    )


def kind_of(run_path, step):
    """Why the checkpoint was saved (one of KINDS), or None if its manifest is damaged, of a newer format or gone."""
    try:
        return _read_manifest(run_path, step)["kind"]
    except (*UNREADABLE, UsageError):
        return None


def _sealed(manifest):
    """A manifest with the hash of all that is in it."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**content, "sha256": sha256_hex(json.dumps(content, sort_keys=True))}


def _read_manifest(run_path, step):
    """The manifest of a checkpoint. One of UNREADABLE if it is damaged, UsageError if it is whole and of a newer format."""
    folder = folder_of(run_path, step)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["format"] != 1 and manifest != _sealed(manifest):
        raise ValueError("it does not match its hash")
    _check_format(manifest, folder)
    if manifest["kind"] not in KINDS or manifest["step"] != step:
        raise ValueError("it is not of this checkpoint")
    return manifest


def save(run_path, step, kind, model, optimizer_state, loop_state):
    """Write the checkpoint of a step, now (training uses a Saver). loop_state: JSON values that the loop needs besides tensors.

    optimizer_state: what Optimizer.state() returned. An existing checkpoint of the same step only gets the stronger kind.
    Raises OSError or SafetensorError when the disk refuses, NotFinite for a state that is; what was there before stays."""
    tensors = {
        file: {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
        for file, part in _tensors(model, optimizer_state).items()
    }
    _write(run_path, step, kind, tensors, {"model": asdict(model.config), **loop_state})


def _tensors(model, optimizer_state):
    """{file name: {tensor name: tensor}} of a checkpoint."""
    return {
        "model.safetensors": model.state_dict(),
        "optimizer.safetensors": {
            f"{name}/{key}": tensor
            for name, state in optimizer_state.items()
            for key, tensor in state.items()
        },
    }


def _write(run_path, step, kind, tensors, state, records=()):
    """save() of CPU tensors by file. records: what is brought to the disk before the checkpoint exists, which vouches for it."""
    from safetensors.torch import save_file

    final = folder_of(run_path, step)
    if (final / "manifest.json").exists() and damage(run_path, step) is None:
        if KINDS.index(kind) > KINDS.index(kind_of(run_path, step)):
            write_json(
                final / "manifest.json", _sealed({**_read_manifest(run_path, step), "kind": kind})
            )
        return
    for file, part in tensors.items():
        if bad := [name for name, tensor in part.items() if not _is_finite(tensor)]:
            raise NotFinite(f"{file} would hold numbers that are not finite, the first in {bad[0]}")
    if not final.parent.exists():
        final.parent.mkdir(parents=True)
        fsync_dir(run_path)
    need = sum(tensor.nbytes for part in tensors.values() for tensor in part.values()) + SPARE_BYTES
    if (free := shutil.disk_usage(final.parent).free) < need:
        raise OSError(
            errno.ENOSPC, f"it needs {human_bytes(need)}, and {human_bytes(free)} are free"
        )
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
        write_json(
            partial / "manifest.json",
            _sealed({"format": FORMAT, "step": step, "kind": kind, "files": files}),
        )
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


def _is_finite(tensor):
    """Whether all numbers of a tensor are; needs no memory, as isfinite() would."""
    return (
        not tensor.numel()
        or not tensor.is_floating_point()
        or all(map(math.isfinite, map(float, tensor.aminmax())))
    )


def _compare(path, tensors):
    """Read a file back. OSError unless it holds exactly these tensors."""
    from safetensors import safe_open

    def content(tensor):
        return tensor.reshape(-1).view(torch.uint8)  # bit for bit, whatever the numbers are

    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(content(file.get_tensor(name)), content(tensor)):
                raise OSError(
                    errno.EIO, f"{path.name} reads back other than it was written; check the disk"
                )


class Saver:
    """Saves the checkpoints of a run, on rank 0, while training goes on: save() copies the state, a thread writes the copy.

    One copy of the state is held, so that a save() that comes while the copy is being written waits for that. Older
    checkpoints are removed after the new one was read back. A failed write is reported, leaves `failure` set until one
    succeeds, and is tried again from the copy (retry), as what it was to be: the state before the warm-down comes once."""

    def __init__(self, run_path, keep_last, report, records, best_bpb=None):
        """keep_last: as --keep-last. report(text) takes a line. records: the run's (metrics, samples), runlog.Metrics, which
        are on the disk before a checkpoint appears that is later than they. best_bpb: of the best checkpoint, if it is known."""
        self.run_path, self.keep_last, self.report, self.records, self.best_bpb = (
            run_path,
            keep_last,
            report,
            records,
            best_bpb,
        )
        self.copy, self.last = (
            {},
            None,
        )  # {file: {tensor name: CPU tensor}}; step, kind and state of the last save
        self.held = False  # whether that waits for release()
        self.failure, self.failed_at, self.hopeless = (
            "",
            0.0,
            False,
        )  # hopeless: trying again gives the same
        if best_step(run_path) is None and (Path(run_path) / "checkpoints" / "best").exists():
            report(
                "checkpoints/best names no checkpoint; the next evaluation that is the best writes it again"
            )
        self.jobs = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def save(self, step, kind, model, optimizer_state, loop_state, hold=False):
        """Copy the state and hand it to the thread; hold: only at release(). Waits for a save that is still under way."""
        self.wait()
        if (
            self.held and hold and KINDS.index(kind) <= KINDS.index(self.last[1])
        ):  # of the same weights, and for a better reason
            return
        if self.can_retry() and self.last[1] != "rolling":  # the last moment: its copy goes
            self._save_last()
        tensors = _tensors(model, optimizer_state)
        if not self.copy:
            pin = next(model.parameters()).is_cuda
            self.copy = {
                file: {
                    name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pin)
                    for name, tensor in part.items()
                }
                for file, part in tensors.items()
            }
        pairs = [
            (self.copy[file][name], tensor.detach())
            for file, part in tensors.items()
            for name, tensor in part.items()
        ]
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)), non_blocking=True)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.last, self.held = (step, kind, {"model": asdict(model.config), **loop_state}), hold
        if not hold:
            self.jobs.put(self._save_last)

    def release(self):
        """The state that is held turned out to be good: write it."""
        if self.held:
            self.held = False
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

    def retry(self):
        """Try the last save again if it failed, RETRY_SECONDS ago or longer."""
        if (
            not self.busy()
            and self.can_retry()
            and time.monotonic() - self.failed_at > RETRY_SECONDS
        ):
            self.jobs.put(self._save_last)

    def can_retry(self):
        """Whether the last save failed, and trying it again may help."""
        return bool(self.failure) and not self.hopeless and not self.held

    def wait(self):
        """Return when nothing is under way."""
        self.jobs.join()

    def finish(self, sleep=time.sleep):
        """wait(), and if the last save failed try it again, after LAST_ATTEMPTS. Returns why it failed in the end, or ""."""
        self.wait()
        for seconds in LAST_ATTEMPTS:
            if not self.can_retry():
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
            good, self.hopeless = steps_of(self.run_path), isinstance(error, NotFinite)
            self.failure, self.failed_at = (
                f"the checkpoint of step {step} cannot be saved ({error})",
                time.monotonic(),
            )
            self.report(
                self.failure
                + ("; " if self.hopeless else "; it will be tried again, ")
                + f"the newest checkpoint is {f'step {good[-1]}' if good else 'none yet'}"
            )
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
        report(
            f"set aside: the checkpoints of steps {', '.join(map(str, aside))}, now checkpoints/set_aside_*; delete them at will"
        )
    if (best := best_step(run_path)) is not None and best > step:
        (Path(run_path) / "checkpoints" / "best").unlink()
    return aside


def best_step(run_path):
    """The step named in checkpoints/best, or None if there is no such file or it names none."""
    path = Path(run_path) / "checkpoints" / "best"
    named = (
        re.fullmatch(r"step_(\d{6,})\s*", path.read_text(errors="replace"))
        if path.exists()
        else None
    )
    return int(named[1]) if named else None


def mark_best(run_path, step):
    """Write checkpoints/best: the name of the checkpoint with the lowest validation bits per byte."""
    write_atomic(Path(run_path) / "checkpoints" / "best", f"step_{step:06d}\n")


def damage(run_path, step, hashes=True):
    """What is wrong with a checkpoint's files (sizes and, unless hashes is False, hashes against the manifest), or None.
    UsageError if it is of a newer format: that is no damage."""
    folder = folder_of(run_path, step)
    try:
        manifest = _read_manifest(run_path, step)
        entries = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except UNREADABLE:
        return "manifest.json is unreadable"
    for name, (n_bytes, digest) in entries.items():
        path = folder / name
        try:
            if (size := path.stat().st_size) != n_bytes:
                return f"{name} has {size} bytes instead of {n_bytes}"
            if hashes and sha256_file(path) != digest:
                return f"{name} does not match its hash"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_intact(run_path, report):
    """The newest step whose files are intact, or None if the run has no such checkpoint. report(text) names damaged ones.

    Beside a training process, which may remove one while it is looked at: there is a newer one then."""
    damaged = {}
    while left := [step for step in steps_of(run_path) if step not in damaged]:
        problem = damage(run_path, left[-1])
        if problem is None:
            return left[-1]
        if folder_of(run_path, left[-1]).exists():
            damaged[left[-1]] = problem
            report(
                f"checkpoint {folder_of(run_path, left[-1])} is damaged ({problem}); trying the one before"
            )
    return None


def newest_finite(run_path):
    """The newest step whose weights hold nothing but finite numbers, or None. Reads weights, no hashes."""
    for step in reversed(steps_of(run_path)):
        try:
            weights = _read_tensors(folder_of(run_path, step) / "model.safetensors")
        except UsageError:
            continue
        if all(map(_is_finite, weights.values())):
            return step
    return None


def _check_format(content, folder):
    """UsageError if a manifest or state is of a format that this version does not read."""
    if isinstance(content, dict) and content.get("format") not in range(1, FORMAT + 1):
        raise UsageError(
            f"checkpoint: {folder} has format {content.get('format')}; this version reads formats 1 to {FORMAT}: use the "
            f"version of nanochat that wrote it"
        )


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
    from nanochat.model.gpt import GPTConfig

    try:
        return GPTConfig(**read_state(run_path, step)["model"])
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"checkpoint: {folder_of(run_path, step)}/state.json does not describe a model ({error})"
        ) from None


def _read_tensors(path):
    """{name: tensor} of a safetensors file, on the CPU. UsageError if it is none: other formats may hold code and are not read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"checkpoint: {path} cannot be read as safetensors ({error}); choose another step"
        ) from None


def load_model(run_path, step, model):
    """Copy a checkpoint's weights into a model built with the same config. UsageError if they do not fit it."""
    path = folder_of(run_path, step) / "model.safetensors"
    try:
        model.load_state_dict(_read_tensors(path), strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"checkpoint: {path} does not fit the model that its state.json describes ({error})"
        ) from None


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
        raise UsageError(
            f"{run} is not a run folder (it has no config.json); give <out-dir>/<model-tag>"
        )
    steps = steps_of(run)
    if not steps:
        raise UsageError(
            f"{run} has no checkpoint yet; train.py saves one at the latest when it ends or is stopped"
        )
    if step is None:
        step = newest_intact(run, report=lambda text: print(text, file=sys.stderr))
        if step is None:
            raise UsageError(f"{run} has no intact checkpoint")
        return step
    if step == "best" and (step := best_step(run)) is None:
        raise UsageError(
            f"--step=best: {run} has no evaluated checkpoint; leave it out for the newest"
        )
    if step not in steps:
        raise UsageError(
            f"--step={asked}: {run} has no such checkpoint (it has: {', '.join(map(str, steps))})"
        )
    if (problem := damage(run, step)) and not folder_of(run, step).exists():
        raise UsageError(
            f"--step={asked}: {run} has no such checkpoint any more, a training process removed it; choose another step"
        )
    if problem:
        raise UsageError(
            f"--step={asked}: the checkpoint in {run} is damaged ({problem}); choose another step"
        )
    return step


def load_run(run, step=None, device_type="", dtype="auto"):
    """(model in eval mode, tokenizer) of a run folder. step: of a checkpoint, "best", or None for the newest intact one.

    dtype: as --dtype of train.py, but auto means float32 on CPUs, where single tokens are decoded. UsageError for a
    folder that is no run, a missing or damaged checkpoint, or a tokenizer that is not the model's."""
    run, chosen = Path(run), step_of(run, step)
    try:
        return _load(run, chosen, device_type, dtype)
    except UsageError:
        if step is not None or folder_of(run, chosen).exists():
            raise
    return load_run(
        run, None, device_type, dtype
    )  # a training process removed it meanwhile: there is a newer one


def _load(run, step, device_type, dtype):
    """load_run() of a step that is there."""
    from nanochat import hardware
    from nanochat.model import gpt as models
    from nanochat.model.attention import pick_backend

    device = torch.device(hardware.pick_device_type(device_type))
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    compute_dtype, _ = hardware.pick_dtype(dtype, device.type)
    state, tokenizer = read_state(run, step), tokenizers.load(run / "tokenizer")
    if tokenizer.fingerprint != state.get("tokenizer"):
        raise UsageError(
            f"{run}/tokenizer is not the tokenizer that step {step} was trained with; restore the original file"
        )
    model = models.build(
        model_config(run, step), device, compute_dtype, pick_backend("auto", device.type)[0]
    )
    load_model(run, step, model)
    return model.eval(), tokenizer
