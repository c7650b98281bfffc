"""Checkpoints exist whole or not at all, old ones go in the right order, the best stays."""

import json

import pytest
import torch

from nanochat import checkpoint, model as models
from nanochat.common import UsageError


def small_model():
    config = models.GPTConfig(depth=1, width=8, head_dim=4, n_head=2, n_kv_head=2, vocab_size=11, max_seq_len=8, short_window=4)
    return models.build(config, torch.device("cpu"), seed=1)


def save(run, step, kind="permanent"):
    checkpoint.save(run, step, kind, small_model(), {"head.weight": {"exp_avg": torch.full((11, 8), float(step))}}, {"tokenizer": "x"})


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


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
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


@pytest.mark.parametrize("file_operation", range(1, 13))
def test_a_crash_between_any_two_writes_leaves_the_last_good_one(tmp_path, monkeypatch, file_operation):
    """The n-th of the 12 times a save touches the disk before its checkpoint exists fails, and all after it; what was
    there stays, and the next save succeeds."""
    import os

    import safetensors.torch
    save(tmp_path, 1)
    count = [0]

    def failing(original):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] >= file_operation:
                raise OSError("no space left on device")
            return original(*args, **kwargs)
        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file))
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(os, "rename", failing(os.rename))
        patch.setattr(os, "replace", failing(os.replace))
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2)
    assert count[0] == file_operation
    assert checkpoint.newest_intact(tmp_path, print) == 1
    save(tmp_path, 2)
    assert checkpoint.newest_intact(tmp_path, print) == 2


def test_pruning(tmp_path):
    for step, kind in ((1, "permanent"), (2, "rolling"), (3, "before_warmdown"), (4, "permanent"), (5, "rolling"), (6, "permanent"),
                       (7, "rolling")):
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


def test_a_newer_format_is_refused(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.folder_of(tmp_path, 1) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UsageError, match="format 99"):
        checkpoint.read_state(tmp_path, 1)
