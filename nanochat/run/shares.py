"""How the ranks of a sharded run write one checkpoint: each writes its own files, and rank 0 puts
them together once all are there.

Ranks save in threads, at any moment of a step, so nothing here exchanges tensors: each rank leaves
the outcome of its part in the store in which the ranks met."""

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat import ranks
from nanochat.common import UsageError
from nanochat.run import checkpoint
from nanochat.run.checkpoint import FileEntry, TensorFiles

# Seconds that a rank waits for another one's word, or for that of one that ends, and between looks.
LIMIT = 3600.0
PATIENCE = 20.0
BETWEEN_LOOKS = 0.05


class Shares:
    """The parts of the ranks in the checkpoints of a run.

    Every rank takes part in every attempt to write one, and an attempt fails on all ranks or on
    none, so their counts agree. attempt: how many there were. start: names this start of the run,
    which the store may outlive."""

    def __init__(self, start: str) -> None:
        self.start = start
        self.attempt = 0

    def write(
        self,
        run_path: Path | str,
        step: int,
        tensors: TensorFiles,
        free_bytes: Callable[[Path], int],
    ) -> None:
        """Write the files of this rank, which is not rank 0; returns once the checkpoint exists.

        Raises as checkpoint.write(), also for what another rank could not write."""

        def work() -> dict[str, FileEntry]:
            return checkpoint.write_share(run_path, step, tensors, free_bytes)

        try:
            self._attempt(work)
            # A rank that went on alone would delete its files at the next save, while rank 0 still
            # waits for others'.
            self._word_of(0)
        finally:
            # moved by now, unless this step has a checkpoint already or the attempt failed
            shutil.rmtree(checkpoint.share_folder(run_path, step, ranks.rank()), ignore_errors=True)

    def join(
        self,
        run_path: Path | str,
        step: int,
        write: Callable[[Callable[[Path], dict[str, FileEntry]]], None],
    ) -> None:
        """Write the checkpoint on rank 0, by write(others): see checkpoint.write(). Raises as
        that, also for what another rank could not write."""

        def collect(partial: Path) -> dict[str, FileEntry]:
            files = {}
            for other in range(1, ranks.world_size()):
                folder = checkpoint.share_folder(run_path, step, other)
                for name, entry in self._word_of(other)["files"].items():
                    # Moved, not copied: each attempt writes all files anew.
                    os.replace(folder / name, partial / name)
                    files[name] = FileEntry(**entry)
            return files

        def work() -> dict[str, FileEntry]:
            write(collect)
            return {}

        self._attempt(work)

    def _attempt(self, work: Callable[[], dict[str, FileEntry]]) -> None:
        """work(), and a word on what became of it."""
        self.attempt += 1
        try:
            files = work()
        except Exception as error:
            hopeless = isinstance(error, checkpoint.NotFinite)
            self._say({"problem": str(error), "hopeless": hopeless})
            raise
        self._say({"files": {name: asdict(entry) for name, entry in files.items()}})

    def _key(self, rank: int) -> str:
        return f"share/{self.start}/{self.attempt}/{rank}"

    def _say(self, word: dict[str, Any]) -> None:
        ranks.tell(self._key(ranks.rank()), json.dumps(word))

    def _word_of(self, other: int) -> dict[str, Any]:
        """What another rank says of its part in this attempt, once it does.

        Raises OSError or NotFinite if that could not be written."""
        deadline = time.monotonic() + LIMIT
        ends = False
        while (text := ranks.told(self._key(other))) is None:
            # A rank that ends waits for a save that is under way.
            if not ends and ranks.said_last_word(other):
                ends = True
                deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                why = "ended before its part was written" if ends else "has not written its part"
                raise OSError(errno.ETIMEDOUT, f"rank {other} {why}")
            time.sleep(BETWEEN_LOOKS)
        word = json.loads(text)
        if "problem" in word:
            kind = checkpoint.NotFinite if word["hopeless"] else OSError
            raise kind(f"rank {other}: {word['problem']}")
        return word


def check_shared_disk(folder: Path) -> None:
    """UsageError on all ranks unless all see the run folder of rank 0. Every rank calls it."""
    mark = folder / ranks.from_rank0(f".seen_by_all_ranks_{uuid.uuid4().hex}")
    if ranks.rank() == 0:
        mark.touch()
    # The others look for it only once rank 0 has made it.
    ranks.from_rank0(None)
    blind = [number for number, sees in enumerate(ranks.from_all(mark.exists())) if not sees]
    if ranks.rank() == 0:
        mark.unlink()
    if blind:
        raise UsageError(
            f"--shard: rank {blind[0]} does not see the run folder {folder} of rank 0, and each "
            f"rank saves its own part there; choose an --out-dir on a disk that all machines share"
        )
