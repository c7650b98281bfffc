"""What readers of other programs' files hand on: a model as transformers describes it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UsageError


@dataclass(frozen=True)
class Foreign:
    """A model of another program.

    kind: what it is, for messages. path: the file that has its settings. files: all that were
    read, for the record. config: content of the config.json that transformers would read. weights:
    reads {name in transformers: tensor}, which may take long. notes: sentences to print."""

    kind: str
    path: Path
    files: list[Path]
    config: dict[str, Any]
    weights: Callable[[], dict[str, Tensor]]
    notes: tuple[str, ...] = ()


def require_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """UsageError naming the first tensor that holds NaN or infinite numbers."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UsageError(
                f"{path}: {name} holds NaN or infinite numbers; use an intact or earlier checkpoint"
            )


def require_same_names(found: Iterable[str], expected: Iterable[str], path: Path, who: str) -> None:
    """UsageError naming a tensor that is missing, or that the model `who` has no place for."""
    found, expected = set(found), set(expected)
    if missing := sorted(expected - found):
        raise UsageError(f"{path}: the weights lack {missing[0]}")
    # A tensor left out would change what the model computes, without an error.
    if foreign := sorted(found - expected):
        raise UsageError(f"{path}: the weights include {foreign[0]}, which {who} does not have")
