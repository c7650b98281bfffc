"""A small checkpoint, and a disk that is watched: what changes there, and when it fails."""

import contextlib
import os
import sys

import safetensors.torch
import torch

from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint


def small_model(depth=1):
    config = GPTConfig(
        depth=depth,
        width=8,
        head_dim=4,
        n_head=2,
        n_kv_head=2,
        vocab_size=11,
        max_seq_len=8,
        short_window=4,
    )
    return build(config, torch.device("cpu"), seed=1)


# For tests that only save it.
MODEL = small_model()


def save(run, step, kind="permanent"):
    """A checkpoint of MODEL with one moment, whose numbers are the step."""
    moments = {"head.weight": {"exp_avg": torch.full((11, 8), float(step))}}
    checkpoint.save(run, step, kind, MODEL, moments, {"tokenizer": "x"})


class Disk:
    """Watches what this process does to files below a folder, and acts at the n-th change.

    An audit hook, which also sees what libraries do, plus fsync and safetensors' own writing."""

    CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
    # The one that acts now, if any: audit hooks cannot be removed.
    watched = None
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
        if cls.watched is None:
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event not in cls.CHANGES and not writes:
            return
        path = arguments[0]
        # shutil.rmtree names files relative to the folder that it has open.
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        cls.watched.touch(path)

    @contextlib.contextmanager
    def watch(self, monkeypatch):
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
            # As far as a full disk lets it.
            path.write_bytes(content[: len(content) // 2])
            path.write_bytes(content)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", watched_fsync)
            patched.setattr(safetensors.torch, "save_file", watched_save_file)
            Disk.watched = self
            try:
                yield self
            finally:
                Disk.watched = None


class Opening:
    """Calls a function once, before the first file with some name is opened by this process."""

    pending = None
    hooked = False

    @classmethod
    def hook(cls, event, arguments):
        if event == "open" and cls.pending is not None:
            name, act = cls.pending
            if str(arguments[0]).endswith(name):
                cls.pending = None
                act()

    @classmethod
    def before(cls, name, act):
        if not cls.hooked:
            sys.addaudithook(cls.hook)
            cls.hooked = True
        cls.pending = (name, act)


@contextlib.contextmanager
def read_only(folder):
    """Inside the `with`, nothing can be written in a folder and those below it."""
    # root may write everywhere, so it becomes another user
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    modes = [path.stat().st_mode for path in folders]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path, mode in zip(folders, modes):
            path.chmod(mode)
