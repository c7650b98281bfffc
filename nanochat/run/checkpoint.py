"""Checkpoints that exist whole or not at all: their files, their damage, and which of them stay.

A checkpoint is a folder checkpoints/step_000500/ with model.safetensors, optimizer.safetensors,
state.json and, written last, manifest.json with the size and SHA-256 of every file. It is written
under a hidden name (.step_...), read back, and renamed once it is on disk; before deletion it is
renamed to a hidden name. So whatever carries a checkpoint's name is complete, at any moment.

State is stored by parameter name in full tensors, of a sharded run as the rows of each rank
(tensor_files.py): what is read back is the same for any ranks, device, batch layout or compilation.
nanochat/run/saver.py writes checkpoints while training continues."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.common import (
    UsageError,
    apply_umask,
    delete_folder,
    fsync_dir,
    human_bytes,
    read_json,
    sha256_file,
    sha256_hex,
    write_atomic,
    write_json,
)
from nanochat.optim.parts import ROW_BY_ROW
from nanochat.optim.sharding import is_sharded, is_split, own_part, own_rows
from nanochat.ranks import rank, world_size
from nanochat.run.folder import steps_of
from nanochat.run.tensor_files import StoredTensors, file_name

if TYPE_CHECKING:
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder
    from nanochat.run.metrics import Record

# Format 1 can still be read: its manifests carry no hash of their own.
FORMAT = 2
# Why a checkpoint was saved, weakest first: a rolling one is deleted when the next is safe, the
# others stay.
KINDS = ("rolling", "permanent", "before_warmdown", "final")
# Free space that a save wants beyond its tensors: for state.json, the manifest and the metrics.
SPARE_BYTES = 1 << 20
# What reading a manifest with arbitrary content can raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)

OptimizerState = Mapping[str, Mapping[str, torch.Tensor]]
# {file name: {tensor name: tensor}}
TensorFiles = Mapping[str, Mapping[str, torch.Tensor]]


class NotFinite(UsageError):
    """The state contains NaN or infinite numbers. It is not saved: training could not resume."""


@dataclass(frozen=True)
class FileEntry:
    """What a manifest records about one file of its checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the kind of a checkpoint (one of KINDS) and its files by name."""

    step: int
    kind: str
    files: dict[str, FileEntry]
    format: int = FORMAT

    def as_json(self) -> dict[str, Any]:
        """The content of manifest.json, with a hash of everything else in it."""
        content = {
            "format": self.format,
            "step": self.step,
            "kind": self.kind,
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        return {**content, "sha256": _hash_of(content)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Manifest":
        """The inverse of as_json(). Raises one of UNREADABLE for anything else."""
        files = {
            name: FileEntry(entry["bytes"], entry["sha256"])
            for name, entry in content["files"].items()
        }
        return cls(content["step"], content["kind"], files, content["format"])


def _hash_of(manifest: Mapping[str, Any]) -> str:
    """The hash that protects a manifest's content, whatever the order of its keys."""
    return sha256_hex(json.dumps(manifest, sort_keys=True))


def read_manifest(run_path: Path | str, step: int) -> Manifest:
    """The manifest of a checkpoint. Raises as parse_manifest(), or OSError."""
    folder = folder_of(run_path, step)
    return parse_manifest((folder / "manifest.json").read_bytes(), folder, step)


def parse_manifest(text: bytes, folder: Path, step: int) -> Manifest:
    """The manifest in the text of a manifest.json; folder and step are those that it must fit.

    Raises one of UNREADABLE if it is damaged, UsageError if it is intact but of a newer format."""
    content = json.loads(text.decode("utf-8"))
    # The hash comes first: a flipped bit in the format must not look like a newer version.
    if content["format"] != 1:
        claimed = content.pop("sha256")
        if claimed != _hash_of(content):
            raise ValueError("the manifest does not match its hash")
    _check_format(content, folder)
    manifest = Manifest.from_json(content)
    if manifest.kind not in KINDS or manifest.step != step:
        raise ValueError("the manifest belongs to another checkpoint")
    return manifest


def _check_format(content: Any, folder: Path) -> None:
    """UsageError if a manifest or state has a format that this version cannot read."""
    if isinstance(content, dict) and content.get("format") not in range(1, FORMAT + 1):
        raise UsageError(
            f"checkpoint: {folder} has format {content.get('format')}; this version reads formats "
            f"1 to {FORMAT}: use the version of nanochat that wrote it"
        )


# ----- which checkpoints exist


def folder_of(run_path: Path | str, step: int) -> Path:
    """The folder of the checkpoint of a step, whether it exists or not."""
    return Path(run_path) / "checkpoints" / f"step_{step:06d}"


def newest_in_words(run_path: Path | str) -> str:
    """Which checkpoint a run can resume from, for its last line; "" if there is none."""
    steps = steps_of(run_path)
    if not steps:
        return ""
    best = best_step(run_path)
    if best in (None, steps[-1]):
        return f"checkpoint at step {steps[-1]}"
    return f"checkpoint at step {steps[-1]} (the best by validation: {best})"


def kind_of(run_path: Path | str, step: int) -> str | None:
    """Why the checkpoint was saved (one of KINDS).

    None if its manifest is damaged, missing or of a newer format."""
    try:
        return read_manifest(run_path, step).kind
    except (*UNREADABLE, UsageError):
        return None


def is_stronger(kind: str, than: str) -> bool:
    """Whether a checkpoint of one of KINDS outlives one of the other kind."""
    return KINDS.index(kind) > KINDS.index(than)


def best_step(run_path: Path | str) -> int | None:
    """The step named in checkpoints/best, or None if the file is missing or names no step."""
    path = Path(run_path) / "checkpoints" / "best"
    if not path.exists():
        return None
    named = re.fullmatch(r"step_(\d{6,})\s*", path.read_text(errors="replace"))
    return int(named[1]) if named else None


def mark_best(run_path: Path | str, step: int) -> None:
    """Write checkpoints/best: the checkpoint with the lowest validation bits per byte."""
    write_atomic(Path(run_path) / "checkpoints" / "best", f"step_{step:06d}\n")


def damage(run_path: Path | str, step: int, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, compared with its manifest, or None.

    hashes: False compares sizes only. UsageError for a newer format, which is not damage."""
    folder = folder_of(run_path, step)
    try:
        manifest = read_manifest(run_path, step)
    except UNREADABLE:
        return "manifest.json is unreadable"
    # Sizes first, file by file: a missing or cut file is found without reading the others.
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entry.bytes:
                return f"{name} has {size} bytes instead of {entry.bytes}"
            if hashes and sha256_file(path) != entry.sha256:
                return f"{name} does not match its hash"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def newest_intact(run_path: Path | str, report: Callable[[str], None]) -> int | None:
    """The newest step whose files are intact, or None. report(text) names damaged ones.

    Safe while the run is training, which may remove a checkpoint during the check: a newer one
    exists then."""
    damaged = set()
    while left := [step for step in steps_of(run_path) if step not in damaged]:
        newest = left[-1]
        problem = damage(run_path, newest)
        if problem is None:
            return newest
        folder = folder_of(run_path, newest)
        # Otherwise it was removed in the meantime: look again for the newest one.
        if folder.exists():
            damaged.add(newest)
            report(f"checkpoint {folder} is damaged ({problem}); trying the previous one")
    return None


def newest_finite(run_path: Path | str) -> int | None:
    """The newest step whose weights are all finite, or None. Reads weights, checks no hashes."""
    # Versions before format 2 did not check what they saved, so an intact file proves nothing.
    for step in reversed(steps_of(run_path)):
        try:
            weights = StoredTensors(folder_of(run_path, step), "model")
        except UsageError:
            continue
        if all(_is_finite(weights.read(name)) for name in weights.pieces):
            return step
    return None


# ----- reading


def read_state(run_path: Path | str, step: int) -> dict[str, Any]:
    """state.json of a checkpoint. UsageError if it has another format or describes no model."""
    folder = folder_of(run_path, step)
    state = read_json(folder / "state.json", "checkpoint")
    _check_format(state, folder)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UsageError(f"checkpoint: {folder}/state.json does not describe a model")
    return state


def model_config(run_path: Path | str, step: int) -> "GPTConfig":
    """The GPTConfig of a checkpoint. UsageError if state.json does not contain one."""
    from nanochat.model.config import GPTConfig

    try:
        return GPTConfig(**read_state(run_path, step)["model"])
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"checkpoint: {folder_of(run_path, step)}/state.json does not describe a model "
            f"({error})"
        ) from None


def load_model(run_path: Path | str, step: int, model: "Decoder") -> None:
    """Copy a checkpoint's weights into a model built with the same config; of a sharded one, this
    rank's rows.

    UsageError if they do not fit the model."""
    folder = folder_of(run_path, step)
    stored = StoredTensors(folder, "model")
    targets = model.state_dict()
    expected = {name: tuple(target.shape) for name, target in targets.items()}
    found = {name: tuple(stored.shape(name)) for name in stored.pieces}
    if found != expected:
        names = sorted(expected.keys() ^ found.keys()) or [
            name for name in expected if expected[name] != found[name]
        ]
        raise UsageError(
            f"checkpoint: {folder} does not fit the model that its state.json describes (the first "
            f"weights that differ are {names[0]}: {found.get(names[0], 'missing')} instead of "
            f"{expected.get(names[0], 'none')})"
        )
    with torch.no_grad():
        for name, target in targets.items():
            rows = own_rows(len(target)) if is_split(target) else None
            own_part(target).copy_(stored.read(name, rows))


def load_optimizer(
    run_path: Path | str, step: int, parameters: Mapping[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """The state for Optimizer.load(): {parameter name: {state name: tensor}} on the CPU.

    parameters: the model's, by name; of those that are sharded, only this rank's rows are read."""
    stored = StoredTensors(folder_of(run_path, step), "optimizer")
    split = {name: p for name, p in (parameters or {}).items() if is_split(p)}
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key in stored.pieces:
        # Parameter names contain dots, never slashes; the last slash ends the name.
        name, _, entry = key.rpartition("/")
        rows = own_rows(len(split[name])) if name in split and entry in ROW_BY_ROW else None
        state.setdefault(name, {})[entry] = stored.read(key, rows)
    return state


# ----- writing


def save(
    run_path: Path | str,
    step: int,
    kind: str,
    model: "Decoder",
    optimizer_state: OptimizerState,
    loop_state: Mapping[str, Any],
) -> None:
    """Write the checkpoint of a step now and wait for it (training uses a Saver).

    kind: one of KINDS. optimizer_state: what Optimizer.state() returned. loop_state: JSON values
    that the loop needs besides tensors. Raises as write()."""
    tensors = {
        file: {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
        for file, part in tensors_of(model, optimizer_state).items()
    }
    write(run_path, step, kind, tensors, state_of(model, loop_state))


def tensors_of(
    model: "Decoder", optimizer_state: OptimizerState
) -> dict[str, dict[str, torch.Tensor]]:
    """{file name: {tensor name: tensor}} of what this rank saves, on the device, not copied: all of
    a model, or its rows of a sharded one."""
    weights = {name: own_part(tensor.detach()) for name, tensor in model.state_dict().items()}
    moments = {
        f"{name}/{key}": tensor
        for name, state in optimizer_state.items()
        for key, tensor in state.items()
    }
    parts = (rank(), world_size()) if is_sharded(model) else (0, 1)
    return {file_name("model", *parts): weights, file_name("optimizer", *parts): moments}


def state_of(model: "Decoder", loop_state: Mapping[str, Any]) -> dict[str, Any]:
    """The content of state.json, without its format and step."""
    return {"model": asdict(model.config), **loop_state}


def free_bytes(path: Path) -> int:
    """Free bytes on the file system of a path."""
    return shutil.disk_usage(path).free


def write(
    run_path: Path | str,
    step: int,
    kind: str,
    tensors: TensorFiles,
    state: Mapping[str, Any],
    records: Iterable["Record"] = (),
    free_bytes: Callable[[Path], int] = free_bytes,
    others: Callable[[Path], dict[str, FileEntry]] = lambda partial: {},
    parts: int = 1,
) -> None:
    """Write the checkpoint of a step, whole or not at all.

    An intact checkpoint of the same step only takes the stronger of the two kinds. tensors: by
    file, contiguous, on the CPU. state: as from state_of(). records: flushed to disk before the
    checkpoint appears, which vouches for them. others(partial): brings the files that other ranks
    have written into the folder; parts: of these and this one. Raises OSError or SafetensorError
    when the disk refuses, NotFinite for a state with such numbers; earlier checkpoints are not
    touched."""
    final = folder_of(run_path, step)
    if (final / "manifest.json").exists() and damage(run_path, step) is None:
        _strengthen(run_path, step, kind)
        return
    _check_finite(tensors)
    if not final.parent.exists():
        final.parent.mkdir(parents=True)
        fsync_dir(run_path)
    _check_room(tensors, free_bytes(final.parent), parts)
    # Of a failed attempt; sweep() only runs when a process starts.
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_json(partial / "state.json", {"format": FORMAT, "step": step, **state})
        files = _write_tensors(partial, tensors) | {"state.json": _entry_of(partial / "state.json")}
        files |= others(partial)
        for record in records:
            record.sync()
        # Sorted, so that equal states give equal manifests.
        manifest = Manifest(step, kind, dict(sorted(files.items())))
        write_json(partial / "manifest.json", manifest.as_json())
        # Damaged, or left without a manifest by another program: not ours to delete.
        if final.exists():
            _set_aside(final)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Until the new name is on disk, a crash may still lose the checkpoint.
    fsync_dir(final.parent)


def _strengthen(run_path: Path | str, step: int, kind: str) -> None:
    """Give an intact checkpoint a stronger kind; a weaker one changes nothing."""
    manifest = read_manifest(run_path, step)
    if is_stronger(kind, than=manifest.kind):
        path = folder_of(run_path, step) / "manifest.json"
        write_json(path, replace(manifest, kind=kind).as_json())


def _check_finite(tensors: TensorFiles) -> None:
    """NotFinite if some number is NaN or infinite."""
    for file, part in tensors.items():
        for name, tensor in part.items():
            if not _is_finite(tensor):
                raise NotFinite(
                    f"{file} would hold numbers that are not finite, the first in {name}"
                )


def _check_room(tensors: TensorFiles, free: int, parts: int) -> None:
    """OSError if a checkpoint of so many parts of this size does not fit into the free bytes.

    Checked before anything is written: a full disk would also stop metrics.jsonl."""
    sizes = [tensor.nbytes for part in tensors.values() for tensor in part.values()]
    need = parts * sum(sizes) + SPARE_BYTES
    if free < need:
        raise OSError(
            errno.ENOSPC, f"it needs {human_bytes(need)}, but only {human_bytes(free)} are free"
        )


def write_share(
    run_path: Path | str,
    step: int,
    tensors: TensorFiles,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> dict[str, FileEntry]:
    """Write this rank's files of a sharded checkpoint, beside where it will be; another rank moves
    them there. Raises as write()."""
    _check_finite(tensors)
    folder = share_folder(run_path, step, rank())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of a save that came to nothing.
    for left in folder.parent.glob(f".step_*{folder.suffix}"):
        shutil.rmtree(left, ignore_errors=True)
    _check_room(tensors, free_bytes(folder.parent), world_size())
    folder.mkdir()
    return _write_tensors(folder, tensors)


def share_folder(run_path: Path | str, step: int, number: int) -> Path:
    """Where a rank writes its files of a sharded checkpoint. sweep() deletes what is left of it."""
    final = folder_of(run_path, step)
    return final.with_name(f".{final.name}.rank_{number:05d}")


def _write_tensors(folder: Path, tensors: TensorFiles) -> dict[str, FileEntry]:
    """Write files of tensors into a folder, flush them and read them back."""
    from safetensors.torch import save_file

    files = {}
    for file, part in tensors.items():
        path = folder / file
        save_file(part, path)
        # safetensors makes its files readable by their owner only.
        apply_umask(path)
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        files[file] = _entry_of(path)
        # The hash was taken from the file: only this proves that it holds the state.
        _compare(path, part)
    return files


def _entry_of(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256_file(path))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number of a tensor is finite."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    # Two extremes instead of isfinite(), which would need memory of the tensor's size; NaN
    # propagates into both.
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _compare(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read a file back. OSError unless it contains exactly these tensors."""
    from safetensors import safe_open

    def content(tensor: torch.Tensor) -> torch.Tensor:
        # Bytes, so that the comparison holds for every dtype and every number.
        return tensor.reshape(-1).view(torch.uint8)

    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            if not torch.equal(content(file.get_tensor(name)), content(tensor)):
                raise OSError(
                    errno.EIO, f"{path.name} reads back differently; check the disk for errors"
                )


# ----- removing and setting aside


def prune(run_path: Path | str, keep_last: int) -> None:
    """Remove rolling checkpoints older than the newest checkpoint, and permanent ones beyond the
    newest keep_last (-1: keep all).

    The best one by validation stays, whatever its kind."""
    steps, best = steps_of(run_path), best_step(run_path)
    kinds = {step: kind_of(run_path, step) for step in steps}
    permanent = [step for step in steps if kinds[step] == "permanent"]
    doomed = [step for step in steps[:-1] if kinds[step] == "rolling"]
    if keep_last != -1:
        doomed += permanent[: max(0, len(permanent) - keep_last)]
    for step in doomed:
        if step != best:
            _remove(folder_of(run_path, step))


def _remove(folder: Path) -> None:
    """Delete a checkpoint's folder. A kill halfway leaves a hidden one, never half a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    if hidden.is_dir():
        delete_folder(hidden)
    os.rename(folder, hidden)
    delete_folder(hidden)


def sweep(run_path: Path | str) -> None:
    """Delete what a killed process left of checkpoints that it was writing or deleting.

    Only the process that holds the run's lock may call this."""
    for path in (Path(run_path) / "checkpoints").glob(".step_*"):
        delete_folder(path)


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint's folder so that another can take its place; nothing is deleted."""
    # Numbered: a step may be set aside more than once.
    times = len(list(folder.parent.glob(f"set_aside_*_{folder.name}")))
    os.rename(folder, folder.with_name(f"set_aside_{times + 1}_{folder.name}"))


def set_aside_after(
    run_path: Path | str, step: int, report: Callable[[str], None] | None = None
) -> list[int]:
    """Rename checkpoints later than `step`, so that training from there can save its own.

    None is deleted; checkpoints/best goes if it names one of them. Returns their steps;
    report(text) names them."""
    aside = [later for later in steps_of(run_path) if later > step]
    for later in aside:
        _set_aside(folder_of(run_path, later))
    if aside and report is not None:
        report(
            f"renamed the checkpoints of steps {', '.join(map(str, aside))} to "
            f"checkpoints/set_aside_*; delete them if you do not need them"
        )
    best = best_step(run_path)
    if best is not None and best > step:
        (Path(run_path) / "checkpoints" / "best").unlink()
    return aside
