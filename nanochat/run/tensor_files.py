"""The tensors of a checkpoint on disk: in one safetensors file, or, of a sharded run, in a file of
each rank, which holds its block of rows of every tensor."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UsageError

# model-00002-of-00004.safetensors
PART = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.safetensors")


def file_name(kind: str, part: int = 0, parts: int = 1) -> str:
    """The file of a kind, "model" or "optimizer"; of part `part` of several, counted from 0."""
    if parts == 1:
        return f"{kind}.safetensors"
    return f"{kind}-{part + 1:05d}-of-{parts:05d}.safetensors"


def files_of(folder: Path, kind: str) -> list[Path]:
    """The files of a kind in a checkpoint's folder, in the order of their rows."""
    parts = sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
    return parts or [folder / file_name(kind)]


class StoredTensors:
    """The tensors of a kind, by name, read when they are asked for. Where several files hold a
    tensor, its rows follow each other in their order; a tensor without rows is in each of them.

    UsageError for files that are no safetensors files, or not all of them."""

    def __init__(self, folder: Path, kind: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.paths = files_of(folder, kind)
        if found := PART.fullmatch(self.paths[0].name):
            n = int(found[3])
            if [path.name for path in self.paths] != [file_name(kind, i, n) for i in range(n)]:
                raise UsageError(
                    f"checkpoint: {folder} has {len(self.paths)} of the {n} files "
                    f"{file_name(kind, 0, n)} and so on; choose another step"
                )
        # Files stay open, and map their bytes: nothing is read before it is asked for.
        # {name: [(file, shape of what it holds)]}
        self.pieces: dict[str, list[tuple[Any, Sequence[int]]]] = {}
        for path in self.paths:
            # Never torch.load(): a pickle can run code.
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UsageError(
                    f"checkpoint: {path} cannot be read as safetensors ({error}); choose another "
                    f"step"
                ) from None
            for name in file.keys():  # noqa: SIM118 - it is no dict
                shape = file.get_slice(name).get_shape()
                self.pieces.setdefault(name, []).append((file, shape))

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole tensor."""
        shapes = [shape for _, shape in self.pieces[name]]
        if not shapes[0]:
            return torch.Size()
        return torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor on the CPU, or some of its rows; only these are read."""
        pieces = self.pieces[name]
        if not pieces[0][1] or (len(pieces) == 1 and rows is None):
            return pieces[0][0].get_tensor(name)
        start, stop = (rows.start, rows.stop) if rows else (0, self.shape(name)[0])
        found = []
        first = 0
        for file, shape in pieces:
            begin, end = max(start - first, 0), min(stop - first, shape[0])
            if begin < end:
                found.append(file.get_slice(name)[begin:end])
            first += shape[0]
        # A rank may have no row of a small tensor.
        if not found:
            return pieces[0][0].get_slice(name)[0:0]
        return found[0] if len(found) == 1 else torch.cat(found)
