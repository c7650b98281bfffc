"""Checkpoints exist whole or not at all, old ones go in the right order, the best stays."""

import json
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch
from disk import MODEL, Disk, Opening, save, small_model

from nanochat.common import UsageError, sha256_file
from nanochat.run import checkpoint


def rewrite(path, **changes):
    """Change values of a JSON file; a manifest gets the hash of its new content."""
    content = {**json.loads(path.read_text()), **changes}
    if path.name == "manifest.json":
        content = checkpoint.Manifest.from_json(content).as_json()
    path.write_text(json.dumps(content))


# ----- writing and reading


def test_round_trip(tmp_path):
    save(tmp_path, 5)
    assert checkpoint.steps_of(tmp_path) == [5]
    assert checkpoint.damage(tmp_path, 5) is None
    assert checkpoint.read_state(tmp_path, 5)["tokenizer"] == "x"
    assert checkpoint.model_config(tmp_path, 5) == MODEL.config
    assert checkpoint.load_optimizer(tmp_path, 5)["head.weight"]["exp_avg"][0, 0] == 5
    other = small_model()
    torch.nn.init.zeros_(other.head.weight)
    checkpoint.load_model(tmp_path, 5, other)
    assert torch.equal(other.head.weight, MODEL.head.weight)


def test_a_manifest_names_every_file(tmp_path):
    """In this order of keys, which other programs may read."""
    save(tmp_path, 1, "rolling")
    folder = checkpoint.folder_of(tmp_path, 1)
    content = json.loads((folder / "manifest.json").read_text())
    assert list(content) == ["format", "step", "kind", "files", "sha256"]
    assert (content["format"], content["step"], content["kind"]) == (2, 1, "rolling")
    assert content["files"] == {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    assert checkpoint.read_manifest(tmp_path, 1).as_json() == content


def test_a_stronger_kind_keeps_a_checkpoint(tmp_path):
    save(tmp_path, 3, "rolling")
    save(tmp_path, 3, "final")
    save(tmp_path, 3, "rolling")
    assert checkpoint.kind_of(tmp_path, 3) == "final" and checkpoint.damage(tmp_path, 3) is None


def test_the_folder_of_checkpoints_is_durable_too(tmp_path, monkeypatch):
    """The new names in the run's folder and in checkpoints/ are flushed after they appear."""
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    save(tmp_path, 1)
    folders = [path for path in synced if os.path.isdir(path) and not path.endswith(".partial")]
    assert folders == [str(tmp_path), str(tmp_path / "checkpoints")]
    assert synced[-1] == folders[-1]


def test_what_reads_back_differently_is_not_a_checkpoint(tmp_path, monkeypatch):
    """One bit of the file that was just written is wrong, before its hash is taken."""
    save_file = safetensors.torch.save_file

    def flipped(tensors, path):
        save_file(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors.torch, "save_file", flipped)
    with pytest.raises(OSError, match="reads back differently"):
        save(tmp_path, 1)
    assert checkpoint.steps_of(tmp_path) == []


@pytest.mark.skipif(
    not hasattr(os, "fork") or not os.path.exists("/proc/self/fd"), reason="needs fork and /proc"
)
def test_a_kill_between_any_two_file_operations(tmp_path, monkeypatch):
    """SIGKILL before the n-th change to a file, for every n of a save and its pruning.

    Whatever is called a checkpoint is whole, the newest good one is the old or the new one, and the
    next save clears up."""
    save(tmp_path / "first", 1, "rolling")
    kills = 0
    while True:
        run = tmp_path / str(kills)
        shutil.copytree(tmp_path / "first", run)
        child = os.fork()
        if child == 0:
            kill = Disk(run, kills + 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
            with kill.watch(monkeypatch):
                save(run, 2, "rolling")
                checkpoint.prune(run, -1)
                checkpoint.mark_best(run, 2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        steps = checkpoint.steps_of(run)
        assert steps in ([1], [1, 2], [2])
        assert all(checkpoint.damage(run, step) is None for step in steps)
        assert checkpoint.best_step(run) in (None, 2)
        checkpoint.sweep(run)
        save(run, 2, "rolling")
        checkpoint.prune(run, -1)
        assert checkpoint.newest_intact(run, print) == 2
        assert [path.name for path in (run / "checkpoints").glob("*step*")] == ["step_000002"]
    assert kills >= 25, "three of them inside a folder that is half deleted"


# ----- damage


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["deleted", "truncated", "flipped"])
def test_damage_to_any_file_is_seen(tmp_path, name, how):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint.folder_of(tmp_path, 2) / name
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-9])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    reports = []
    assert checkpoint.newest_intact(tmp_path, reports.append) == 1
    # Without its manifest it does not exist.
    expected = 0 if (name, how) == ("manifest.json", "deleted") else 1
    assert len(reports) == expected


def test_every_bit_of_a_manifest_counts(tmp_path):
    """Whichever is flipped, the checkpoint before is used.

    It is not taken for a newer format, another kind or another step."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = checkpoint.folder_of(tmp_path, 2)
    content = (folder / "manifest.json").read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(checkpoint.UNREADABLE):
                checkpoint.parse_manifest(bytes(flipped), folder, 2)
    # A few through the file: what is not readable is damaged and has no kind.
    for place in range(0, len(content), 50):
        flipped = bytearray(content)
        flipped[place] ^= 1
        (folder / "manifest.json").write_bytes(flipped)
        assert checkpoint.damage(tmp_path, 2) == "manifest.json is unreadable"
        assert checkpoint.kind_of(tmp_path, 2) is None
        assert checkpoint.newest_intact(tmp_path, print) == 1


def test_a_checkpoint_of_the_first_format_is_read(tmp_path):
    save(tmp_path, 1, "rolling")
    path = checkpoint.folder_of(tmp_path, 1) / "manifest.json"
    content = {**json.loads(path.read_text()), "format": 1}
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert checkpoint.damage(tmp_path, 1) is None and checkpoint.kind_of(tmp_path, 1) == "rolling"
    save(tmp_path, 1, "final")
    assert checkpoint.damage(tmp_path, 1) is None and checkpoint.kind_of(tmp_path, 1) == "final"
    os.rename(checkpoint.folder_of(tmp_path, 1), checkpoint.folder_of(tmp_path, 3))
    assert checkpoint.damage(tmp_path, 3) == "manifest.json is unreadable", "it is of step 1"


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_newer_format_is_refused(tmp_path, name):
    """It is not taken for damage, which would silently mean an older checkpoint."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    rewrite(checkpoint.folder_of(tmp_path, 2) / name, format=99)
    with pytest.raises(UsageError, match="format 99.*version of nanochat that wrote it"):
        if name == "manifest.json":
            checkpoint.newest_intact(tmp_path, print)
        checkpoint.read_state(tmp_path, 2)


def test_what_training_removes_meanwhile_is_not_damage(tmp_path):
    """While a training process saves the next checkpoint and removes the one being checked."""
    save(tmp_path, 1, "rolling")
    reports = []

    def meanwhile():
        save(tmp_path, 2, "rolling")
        checkpoint.prune(tmp_path, -1)

    Opening.before("step_000001/model.safetensors", meanwhile)
    assert checkpoint.newest_intact(tmp_path, reports.append) == 2 and reports == []
    assert checkpoint.steps_of(tmp_path) == [2]


def test_a_file_that_cannot_be_examined_is_damage(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / "state.json"
    path.unlink()
    # A loop: stat() fails, and not because the file is missing.
    path.symlink_to(path)
    assert checkpoint.damage(tmp_path, 1).startswith("state.json cannot be read")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_hostile_file_runs_no_code(tmp_path, monkeypatch, name):
    """Pickled code under the name of a checkpoint's file, with a manifest that fits it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    folder = checkpoint.folder_of(tmp_path, 1)
    path = folder / name
    torch.save({"head.weight": Evil()}, path)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    rewrite(folder / "manifest.json", files=files)
    assert checkpoint.damage(tmp_path, 1) is None
    with pytest.raises(UsageError, match=name):
        checkpoint.model_config(tmp_path, 1)
        checkpoint.load_model(tmp_path, 1, small_model())
        checkpoint.load_optimizer(tmp_path, 1)
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize("model", [None, {"depth": "x"}, {"no": "such field"}, [1]])
def test_a_state_that_describes_no_model_is_refused(tmp_path, model):
    save(tmp_path, 1)
    rewrite(checkpoint.folder_of(tmp_path, 1) / "state.json", model=model)
    with pytest.raises(UsageError, match="does not describe a model"):
        checkpoint.model_config(tmp_path, 1)


def test_weights_of_another_shape_are_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UsageError, match="does not fit"):
        checkpoint.load_model(tmp_path, 1, small_model(depth=2))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weights", "moments"])
def test_no_checkpoint_is_made_of_bad_numbers(tmp_path, where, number):
    model, moments = small_model(), torch.ones(11, 8)
    with torch.no_grad():
        bad = model.head.weight if where == "weights" else moments
        bad[3, 5] = number
    with pytest.raises(checkpoint.NotFinite, match="not finite, the first in head.weight"):
        checkpoint.save(tmp_path, 2, "rolling", model, {"head.weight": {"exp_avg": moments}}, {})
    assert not (tmp_path / "checkpoints").exists()


def test_the_newest_finite_one(tmp_path):
    """Earlier versions saved such numbers, or a disk made them."""
    assert checkpoint.newest_finite(tmp_path) is None
    for step in (1, 2, 3):
        save(tmp_path, step)
    weights = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    weights["head.weight"][0, 0] = float("nan")
    path = checkpoint.folder_of(tmp_path, 2) / "model.safetensors"
    safetensors.torch.save_file(weights, path)
    (checkpoint.folder_of(tmp_path, 3) / "model.safetensors").write_bytes(b"unreadable")
    assert checkpoint.newest_finite(tmp_path) == 1


# ----- which ones stay


def test_pruning(tmp_path):
    kinds = {
        1: "permanent",
        2: "rolling",
        3: "before_warmdown",
        4: "permanent",
        5: "rolling",
        6: "permanent",
        7: "rolling",
    }
    for step, kind in kinds.items():
        save(tmp_path, step, kind)
    checkpoint.mark_best(tmp_path, 2)
    checkpoint.prune(tmp_path, keep_last=-1)
    assert checkpoint.steps_of(tmp_path) == [1, 2, 3, 4, 6, 7]
    checkpoint.mark_best(tmp_path, 4)
    checkpoint.prune(tmp_path, keep_last=1)
    assert checkpoint.steps_of(tmp_path) == [3, 4, 6, 7]


def test_later_ones_are_set_aside_not_deleted(tmp_path):
    reports = []
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.mark_best(tmp_path, 3)
    assert checkpoint.set_aside_after(tmp_path, 1, reports.append) == [2, 3]
    assert checkpoint.steps_of(tmp_path) == [1] and checkpoint.best_step(tmp_path) is None
    assert (tmp_path / "checkpoints" / "set_aside_1_step_000003" / "model.safetensors").exists()
    assert len(reports) == 1 and "steps 2, 3 to checkpoints/set_aside_*" in reports[0]
    assert checkpoint.set_aside_after(tmp_path, 1, reports.append) == [] and len(reports) == 1


def test_a_damaged_one_is_set_aside_when_its_step_is_saved_again(tmp_path):
    save(tmp_path, 1)
    (checkpoint.folder_of(tmp_path, 1) / "state.json").write_text("{")
    save(tmp_path, 1)
    assert checkpoint.damage(tmp_path, 1) is None
    aside = tmp_path / "checkpoints" / "set_aside_1_step_000001"
    assert (aside / "state.json").read_text() == "{"


def test_copies_and_damaged_manifests_do_not_disturb(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(checkpoint.folder_of(tmp_path, 2), tmp_path / "checkpoints" / "step_000002.bak")
    (checkpoint.folder_of(tmp_path, 1) / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, keep_last=1)
    assert checkpoint.steps_of(tmp_path) == [1, 3]


def test_where_a_run_can_resume_in_words(tmp_path):
    assert checkpoint.newest_in_words(tmp_path) == ""
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.newest_in_words(tmp_path) == "checkpoint at step 2"
    checkpoint.mark_best(tmp_path, 2)
    assert checkpoint.newest_in_words(tmp_path) == "checkpoint at step 2"
    checkpoint.mark_best(tmp_path, 1)
    words = "checkpoint at step 2 (the best by validation: 1)"
    assert checkpoint.newest_in_words(tmp_path) == words
