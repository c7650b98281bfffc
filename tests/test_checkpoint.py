"""Checkpoints exist whole or not at all, old ones go in the right order, the best stays."""

import contextlib
import json
import os
import shutil
import signal
import sys

import pytest
import safetensors.torch
import torch

from nanochat.common import UsageError, sha256_file
from nanochat.model import gpt as models
from nanochat.run import checkpoint
from nanochat.run import log as runlog


def small_model():
    config = models.GPTConfig(
        depth=1,
        width=8,
        head_dim=4,
        n_head=2,
        n_kv_head=2,
        vocab_size=11,
        max_seq_len=8,
        short_window=4,
    )
    return models.build(config, torch.device("cpu"), seed=1)


def save(run, step, kind="permanent"):
    checkpoint.save(
        run,
        step,
        kind,
        small_model(),
        {"head.weight": {"exp_avg": torch.full((11, 8), float(step))}},
        {"tokenizer": "x"},
    )


def test_round_trip(tmp_path):
    save(tmp_path, 5)
    assert checkpoint.steps_of(tmp_path) == [5]
    assert checkpoint.damage(tmp_path, 5) is None
    assert checkpoint.read_state(tmp_path, 5)["tokenizer"] == "x"
    assert checkpoint.load_optimizer(tmp_path, 5)["head.weight"]["exp_avg"][0, 0] == 5
    other = small_model()
    torch.nn.init.zeros_(other.head.weight)
    checkpoint.load_model(tmp_path, 5, other)
    assert torch.equal(other.head.weight, small_model().head.weight)


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
    assert len(reports) == (0 if (name, how) == ("manifest.json", "deleted") else 1)


def test_every_bit_of_a_manifest_counts(tmp_path):
    """Whichever is flipped, the checkpoint before is used: it is not taken for a newer format, another kind or another step."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint.folder_of(tmp_path, 2) / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
            )
            assert checkpoint.damage(tmp_path, 2) == "manifest.json is unreadable", (place, bit)
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


def test_what_training_removes_meanwhile_is_not_damage(tmp_path, monkeypatch):
    """Beside a training process that saves the next checkpoint and removes the one that is being looked at."""
    save(tmp_path, 1, "rolling")
    original, reports = checkpoint.sha256_file, []

    def meanwhile(path):
        if checkpoint.steps_of(tmp_path) == [1]:
            monkeypatch.undo()
            save(tmp_path, 2, "rolling")
            checkpoint.prune(tmp_path, -1)
        return original(path)

    monkeypatch.setattr(checkpoint, "sha256_file", meanwhile)
    assert checkpoint.newest_intact(tmp_path, reports.append) == 2 and reports == []
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(
        checkpoint,
        "damage",
        lambda run, step: shutil.rmtree(checkpoint.folder_of(run, step)) or "gone",
    )
    with pytest.raises(UsageError, match="--step=2.*a training process removed it"):
        checkpoint.step_of(tmp_path, 2)


def test_a_file_that_cannot_be_looked_at_is_damage(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / "state.json"
    path.unlink()
    path.symlink_to(path)  # a loop: stat() fails, and not because it is missing
    assert checkpoint.damage(tmp_path, 1).startswith("state.json cannot be read")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"step_\xff\xfe"])
def test_a_garbled_best(tmp_path, content):
    """It names none, which is said; the next one is written over it."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "best").write_bytes(content)
    reports = []
    saver = checkpoint.Saver(tmp_path, -1, reports.append, records(tmp_path))
    assert (
        checkpoint.best_step(tmp_path) is None
        and "checkpoints/best names no checkpoint" in reports[0]
    )
    checkpoint.set_aside_after(tmp_path, 1)
    saver.mark_best(1, 2.0)
    saver.wait()
    assert checkpoint.best_step(tmp_path) == 1
    saver.close()


def test_the_folder_of_checkpoints_is_durable_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "fsync_dir", synced.append)
    save(tmp_path, 1)
    assert synced == [tmp_path, tmp_path / "checkpoints"]


class Disk:
    """Watches what this process does to files below a folder, and acts at the n-th time: an audit hook, which also sees what
    the libraries do, plus fsync and safetensors' own writing."""

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
    watched = None  # the one that acts now: audit hooks cannot be removed
    hooked = False

    def __init__(self, folder, at, act):
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0

    def touch(self, path):
        if str(path).startswith(self.folder):
            self.count += 1
            if self.count >= self.at:
                self.act()

    @classmethod
    def hook(cls, event, arguments):
        if cls.watched is not None and (
            event in cls.CHANGES
            or event == "open"
            and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            path = arguments[0]
            if (
                event in ("os.remove", "os.rmdir") and arguments[1] != -1
            ):  # shutil.rmtree names files by the folder that it has open
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
            cls.watched.touch(path)

    @contextlib.contextmanager
    def watch(self, patch):
        if not Disk.hooked:
            sys.addaudithook(Disk.hook)
            Disk.hooked = True
        fsync, save_file = os.fsync, safetensors.torch.save_file

        def watched_fsync(descriptor):
            self.touch(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def watched_save_file(tensors, path):
            save_file(tensors, path)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])  # as far as a full disk lets it
            path.write_bytes(content)

        with patch.context() as patched:
            patched.setattr(os, "fsync", watched_fsync)
            patched.setattr(safetensors.torch, "save_file", watched_save_file)
            Disk.watched = self
            try:
                yield self
            finally:
                Disk.watched = None


def full():
    raise OSError(28, "No space left on device")


@pytest.mark.skipif(
    not hasattr(os, "fork") or not os.path.exists("/proc/self/fd"), reason="needs fork and /proc"
)
def test_a_kill_between_any_two_file_operations(tmp_path, monkeypatch):
    """SIGKILL before the n-th change to a file, for every n of a save that also removes an old checkpoint: whatever is
    called a checkpoint is whole, the newest good one is the old or the new one, and the next save clears up."""
    kills = 0
    while True:
        run = tmp_path / str(kills)
        save(run, 1, "rolling")
        child = os.fork()
        if child == 0:
            with Disk(run, kills + 1, lambda: os.kill(os.getpid(), signal.SIGKILL)).watch(
                monkeypatch
            ):
                save(run, 2, "rolling")
                checkpoint.prune(run, -1)
                checkpoint.mark_best(run, 2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        steps = checkpoint.steps_of(run)
        assert steps in ([1], [1, 2], [2]) and all(
            checkpoint.damage(run, step) is None for step in steps
        )
        assert checkpoint.best_step(run) in (None, 2)
        checkpoint.sweep(run)
        save(run, 2, "rolling")
        checkpoint.prune(run, -1)
        assert checkpoint.newest_intact(run, print) == 2
        assert sorted(path.name for path in (run / "checkpoints").glob("*step*")) == ["step_000002"]
    assert kills >= 25, "three of them inside a folder that is half deleted"


def test_a_full_disk_at_every_point_of_a_save(tmp_path, monkeypatch):
    """From the n-th change to a file on nothing can be written: it is reported, the old checkpoint stays, and the same state
    is saved once there is room again."""
    n = 0
    while True:
        n += 1
        run, reports = tmp_path / str(n), []
        save(run, 1)
        saver = checkpoint.Saver(run, -1, reports.append, records(run))
        with Disk(run / "checkpoints", n, full).watch(monkeypatch) as disk:
            saver.save(2, "rolling", small_model(), {}, {"tokenizer": "x"})
            saver.wait()
        if disk.count < n:
            assert not saver.failure
            break
        if checkpoint.steps_of(run) == [
            1,
            2,
        ]:  # it was full after the rename: only making that durable failed
            assert checkpoint.damage(run, 2) is None
        else:
            assert checkpoint.newest_intact(run, print) == 1
            assert reports == [
                f"{saver.failure}; it will be tried again, the newest checkpoint is step 1"
            ]
        assert "step 2 cannot be saved" in saver.failure and "No space left" in saver.failure
        assert saver.finish(sleep=lambda seconds: None) == ""
        saver.close()
        assert checkpoint.newest_intact(run, print) == 2
    assert n > 20


def records(run):
    """metrics and samples as train.py gives them."""
    return [runlog.Metrics(run / f"{name}.jsonl") for name in ("metrics", "samples")]


def test_saving_beside_training(tmp_path):
    """What is saved is the state at save(), whatever happens to the model afterwards."""
    model, saver = small_model(), checkpoint.Saver(tmp_path, -1, print, records(tmp_path))
    moments = {"head.weight": {"exp_avg": torch.ones(11, 8)}}
    saver.save(3, "permanent", model, moments, {"tokenizer": "x"})
    with torch.no_grad():
        model.head.weight.zero_()
        moments["head.weight"]["exp_avg"].zero_()
    saver.save(4, "permanent", model, moments, {"tokenizer": "x"})
    saver.wait()
    assert not saver.busy() and saver.failure == ""
    assert checkpoint.load_optimizer(tmp_path, 3)["head.weight"]["exp_avg"].eq(1).all()
    assert checkpoint.load_optimizer(tmp_path, 4)["head.weight"]["exp_avg"].eq(0).all()
    other = small_model()
    checkpoint.load_model(tmp_path, 3, other)
    assert torch.equal(other.head.weight, small_model().head.weight)
    saver.close()
    saver.thread.join(timeout=10)
    assert not saver.thread.is_alive()


@pytest.mark.parametrize("where", ["weights", "moments"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_no_checkpoint_is_made_of_bad_numbers(tmp_path, where, number):
    """The older one stays, also a rolling one; it is said, and not tried again."""
    reports, model, moments = [], small_model(), {"head.weight": {"exp_avg": torch.ones(11, 8)}}
    saver = checkpoint.Saver(tmp_path, -1, reports.append, records(tmp_path))
    saver.save(1, "rolling", model, moments, {"tokenizer": "x"})
    saver.wait()
    with torch.no_grad():
        (model.head.weight if where == "weights" else moments["head.weight"]["exp_avg"])[3, 5] = (
            number
        )
    saver.save(2, "permanent", model, moments, {"tokenizer": "x"})
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == [1]
    assert (
        len(reports) == 1
        and "step 2 cannot be saved" in reports[0]
        and "not finite, the first in head.weight" in reports[0]
    )
    assert reports[0].endswith("; the newest checkpoint is step 1")
    assert not saver.can_retry() and "step 2" in saver.finish(
        sleep=lambda seconds: pytest.fail("nothing to wait for")
    )
    saver.close()


def test_the_newest_finite_one(tmp_path, monkeypatch):
    """Also beside checkpoints of a version that did not look."""
    assert checkpoint.newest_finite(tmp_path) is None
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_is_finite", lambda tensor: True)
    model = small_model()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    checkpoint.save(tmp_path, 2, "rolling", model, {}, {"tokenizer": "x"})
    monkeypatch.undo()
    assert checkpoint.newest_finite(tmp_path) == 1


def disk_with_room(monkeypatch):
    """The disk is full; what is returned makes room."""
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", -1.0)
    patch = pytest.MonkeyPatch()
    patch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000)
    )
    return patch.undo


def test_a_failed_save_is_tried_again_as_what_it_was(tmp_path, monkeypatch):
    """From the copy that was made of it: the state of then, whatever the model has become."""
    make_room, model = disk_with_room(monkeypatch), small_model()
    saver = checkpoint.Saver(tmp_path, -1, print, records(tmp_path))
    saver.save(1, "before_warmdown", model, {}, {"tokenizer": "x"})
    saver.wait()
    with torch.no_grad():
        model.head.weight.zero_()
    saver.retry()
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == []
    make_room()
    saver.retry()
    saver.wait()
    assert checkpoint.kind_of(tmp_path, 1) == "before_warmdown" and not saver.failure
    other = small_model()
    checkpoint.load_model(tmp_path, 1, other)
    assert torch.equal(other.head.weight, small_model().head.weight)
    saver.retry()
    assert not saver.busy(), "that is done"
    saver.close()


@pytest.mark.parametrize(
    "kind, kept", [("before_warmdown", [1, 2]), ("permanent", [1, 2]), ("rolling", [2])]
)
def test_a_failed_save_has_a_last_chance_before_the_next(tmp_path, monkeypatch, kind, kept):
    make_room = disk_with_room(monkeypatch)
    saver = checkpoint.Saver(tmp_path, -1, print, records(tmp_path))
    saver.save(1, kind, small_model(), {}, {"tokenizer": "x"})
    saver.wait()
    make_room()
    saver.save(2, "permanent", small_model(), {}, {"tokenizer": "x"})
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == kept and not saver.failure
    saver.close()


def test_a_held_state_is_written_when_it_proved_good(tmp_path):
    saver = checkpoint.Saver(tmp_path, -1, print, records(tmp_path))
    saver.save(1, "before_warmdown", small_model(), {}, {"tokenizer": "x"}, hold=True)
    saver.save(
        2, "permanent", small_model(), {}, {"tokenizer": "x"}, hold=True
    )  # that step was skipped too
    saver.retry()
    saver.wait()
    assert checkpoint.steps_of(tmp_path) == []
    saver.release()
    saver.release()
    saver.wait()
    assert (
        checkpoint.steps_of(tmp_path) == [1]
        and checkpoint.kind_of(tmp_path, 1) == "before_warmdown"
    )
    saver.save(2, "permanent", small_model(), {}, {"tokenizer": "x"}, hold=True)
    assert saver.finish() == "" and checkpoint.steps_of(tmp_path) == [1], "never proved"
    saver.close()


def test_the_best_of_those_that_exist(tmp_path):
    saver = checkpoint.Saver(tmp_path, 1, print, records(tmp_path))
    for step, bpb in ((1, 2.0), (2, 1.5), (3, 1.7)):
        saver.save(step, "permanent", small_model(), {}, {"tokenizer": "x"})
        saver.mark_best(step, bpb)
    saver.mark_best(99, 0.1)  # was not saved
    saver.wait()
    assert checkpoint.best_step(tmp_path) == 2 and checkpoint.steps_of(tmp_path) == [2, 3]
    saver.close()
    metrics = records(tmp_path)
    metrics[0].write(step=2, **{"val/bpb": 1.5})
    later = checkpoint.Saver(
        tmp_path, 1, print, metrics, metrics[0].value_at(checkpoint.best_step(tmp_path), "val/bpb")
    )
    later.save(4, "permanent", small_model(), {}, {"tokenizer": "x"})
    later.mark_best(4, 1.6)
    later.wait()
    assert later.best_bpb == 1.5 and checkpoint.best_step(tmp_path) == 2, (
        "known from metrics.jsonl after a restart"
    )
    later.close()


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    reports = []
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000)
    )
    saver = checkpoint.Saver(tmp_path, -1, reports.append, records(tmp_path))
    saver.save(2, "final", small_model(), {}, {"tokenizer": "x"})
    saver.wait()
    assert "it needs 1.0 MiB, and 4.9 KiB are free" in reports[0]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000001"]
    monkeypatch.undo()
    saver.retry()
    assert not saver.busy(), "not at once"
    assert (
        saver.finish(sleep=lambda seconds: None) == ""
        and checkpoint.kind_of(tmp_path, 2) == "final"
    )
    saver.close()


def test_what_reads_back_otherwise_is_not_a_checkpoint(tmp_path, monkeypatch):
    """One bit of the file that was just written is wrong, before its hash is taken."""
    save_file = safetensors.torch.save_file

    def flipped(tensors, path):
        save_file(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(safetensors.torch, "save_file", flipped)
    with pytest.raises(OSError, match="reads back other than it was written"):
        save(tmp_path, 1)
    assert checkpoint.steps_of(tmp_path) == []


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil_was_here",)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_hostile_file_runs_no_code(tmp_path, monkeypatch, name):
    """Pickled code under the name of a checkpoint's file, with a manifest that fits it."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / name
    torch.save({"head.weight": Evil()}, path)
    manifest = checkpoint.folder_of(tmp_path, 1) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest.write_text(json.dumps(checkpoint._sealed(content)))
    assert checkpoint.damage(tmp_path, 1) is None
    with pytest.raises(UsageError, match=name):
        checkpoint.model_config(tmp_path, 1)
        checkpoint.load_model(tmp_path, 1, small_model())
        checkpoint.load_optimizer(tmp_path, 1)
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize("model", [None, {"depth": "x"}, {"no": "such field"}, [1]])
def test_a_state_that_describes_no_model_is_refused(tmp_path, model):
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": model}))
    with pytest.raises(UsageError, match="does not describe a model"):
        checkpoint.model_config(tmp_path, 1)


def test_weights_of_another_shape_are_refused(tmp_path):
    save(tmp_path, 1)
    other = models.build(
        models.GPTConfig(
            depth=2,
            width=8,
            head_dim=4,
            n_head=2,
            n_kv_head=2,
            vocab_size=11,
            max_seq_len=8,
            short_window=4,
        ),
        torch.device("cpu"),
    )
    with pytest.raises(UsageError, match="does not fit"):
        checkpoint.load_model(tmp_path, 1, other)


def test_pruning(tmp_path):
    for step, kind in (
        (1, "permanent"),
        (2, "rolling"),
        (3, "before_warmdown"),
        (4, "permanent"),
        (5, "rolling"),
        (6, "permanent"),
        (7, "rolling"),
    ):
        save(tmp_path, step, kind)
    checkpoint.mark_best(tmp_path, 2)
    checkpoint.prune(tmp_path, keep_last=-1)
    assert checkpoint.steps_of(tmp_path) == [1, 2, 3, 4, 6, 7]
    checkpoint.mark_best(tmp_path, 4)
    checkpoint.prune(tmp_path, keep_last=1)
    assert checkpoint.steps_of(tmp_path) == [3, 4, 6, 7]


def test_a_stronger_reason_keeps_a_checkpoint(tmp_path):
    save(tmp_path, 3, "rolling")
    save(tmp_path, 3, "final")
    save(tmp_path, 3, "rolling")
    assert checkpoint.kind_of(tmp_path, 3) == "final" and checkpoint.damage(tmp_path, 3) is None


def test_later_ones_are_set_aside_not_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoint.mark_best(tmp_path, 3)
    checkpoint.set_aside_after(tmp_path, 1)
    assert checkpoint.steps_of(tmp_path) == [1] and checkpoint.best_step(tmp_path) is None
    assert (tmp_path / "checkpoints" / "set_aside_1_step_000003" / "model.safetensors").exists()


def test_copies_and_damaged_manifests_do_not_disturb(tmp_path):
    import shutil

    for step in (1, 2, 3):
        save(tmp_path, step)
    shutil.copytree(checkpoint.folder_of(tmp_path, 2), tmp_path / "checkpoints" / "step_000002.bak")
    (checkpoint.folder_of(tmp_path, 1) / "manifest.json").write_text("{")
    checkpoint.prune(tmp_path, keep_last=1)
    assert checkpoint.steps_of(tmp_path) == [1, 3]


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_newer_format_is_refused(tmp_path, name):
    """It is not taken for damage, which would silently mean an older checkpoint."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint.folder_of(tmp_path, 2) / name
    content = {**json.loads(path.read_text()), "format": 99}
    path.write_text(json.dumps(checkpoint._sealed(content) if name == "manifest.json" else content))
    with pytest.raises(UsageError, match="format 99.*version of nanochat that wrote it"):
        if name == "manifest.json":
            checkpoint.newest_intact(tmp_path, print)
        checkpoint.read_state(tmp_path, 2)


def test_a_run_folder_of_a_newer_format_is_refused(tmp_path):
    folder = runlog.RunFolder(tmp_path)
    folder.write_config({"args": {}})
    (tmp_path / "config.json").write_text(json.dumps({**folder.read_config(), "format": 99}))
    with pytest.raises(UsageError, match="format 99.*version of nanochat that wrote it"):
        folder.read_config()


# ----- lines of metrics on a disk that refuses them


def test_metrics_wait_for_room(tmp_path, monkeypatch):
    """A torn line is taken back; what could not be written comes with the next line; both are said once."""
    reports = []
    metrics = runlog.Metrics(tmp_path / "metrics.jsonl", reports.append)
    metrics.write(step=0, x=1.0)
    whole = metrics.file

    class Full:
        def __getattr__(self, name):
            return getattr(whole, name)

        def write(self, content):
            return whole.write(content[:5])

    metrics.file = Full()
    metrics.write(step=1, x=2.0)
    metrics.write(step=2, x=3.0)
    assert [line["step"] for line in runlog.read_lines(tmp_path / "metrics.jsonl")] == [0]
    metrics.file = whole
    metrics.write(step=3, x=4.0)
    metrics.close()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [0, 1, 2, 3]
    assert (
        len(reports) == 2
        and "cannot be written" in reports[0]
        and "all lines are written" in reports[1]
    )


def test_lines_that_were_kept_are_written_at_the_next_save_and_at_the_end(tmp_path):
    """sync() brings them to the disk before a checkpoint vouches for them; close() is the last chance."""
    for end in ("sync", "close"):
        path = tmp_path / end / "metrics.jsonl"
        metrics = runlog.Metrics(path, lambda text: None)
        metrics.write(step=0)  # there is no such folder yet
        if end == "sync":
            with pytest.raises(OSError):
                metrics.sync()
        path.parent.mkdir()
        getattr(metrics, end)()
        assert [line["step"] for line in runlog.read_lines(path)] == [0]
        metrics.close()


def test_a_bad_byte_spoils_its_own_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n{"st\xffep": 1}\n{"step": 2}\n')
    assert [line["step"] for line in runlog.read_lines(path)] == [0, 2]
    runlog.Metrics(path).keep_before(2)
    assert path.read_text() == '{"step": 0}\n'


@pytest.mark.parametrize("content", [None, b"", b'{"status": "comp', b"[]", b"\xff"])
def test_the_status_of_a_damaged_summary_is_not_known(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    assert runlog.status_of(tmp_path) is None
