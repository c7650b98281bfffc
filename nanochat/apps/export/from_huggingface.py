"""From the Hugging Face folder of an exported Llama back to a run folder."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat import load
from nanochat.apps.export.fields import read_llama_config, tensor_name
from nanochat.apps.export.tokenizer_files import read_tokenizer_json
from nanochat.apps.export.verify import ExportFailed
from nanochat.common import UsageError, new_folder, read_json
from nanochat.model.build import build, meta_model
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder, provenance, write_summary

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig

WEIGHTS_FILE = "model.safetensors"


def import_folder(source: Path, out: Path) -> None:
    """Write the run folder `out` from the Hugging Face folder of a Llama that was exported here.

    Reads safetensors and JSON only, and converts the weights to fp32. Raises UsageError that names
    the field or tensor that our Llama does not have, ExportFailed if the run's weights differ."""
    config = read_llama_config(source / "config.json")
    tokenizer = read_tokenizer_json(source)
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{source / 'config.json'}: vocab_size is {config.vocab_size}, but the tokenizer has "
            f"{tokenizer.vocab_size} tokens"
        )
    weights = _in_our_names(read_weights(source), config, source)
    with new_folder(out) as folder:
        _write_run(folder, source, config, tokenizer, weights)
        # Through the same door as every app: a run that none of them can load is not a result.
        loaded, _ = load(folder, 0, device_type="cpu", dtype="float32")
        saved = loaded.state_dict()
        if not all(torch.equal(tensor, weights[name]) for name, tensor in saved.items()):
            raise ExportFailed("the weights of the new run differ from those of the folder")
    print(f"verified: weights and tokenizer as in {source}; run folder: {out}")


# ---- weights ----


def read_weights(folder: Path) -> dict[str, Tensor]:
    """{name: tensor} of model.safetensors, or of the files that its index names.

    UsageError if a file is missing or damaged, or is not in the folder."""
    weights = {}
    for name in _weight_files(folder):
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{folder / name} cannot be read as safetensors ({error}); other formats of "
                "weights are not supported"
            ) from None
    return weights


def _weight_files(folder: Path) -> list[str]:
    """Names of the files in a folder that hold its weights."""
    # transformers prefers the single file, too.
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if (folder / WEIGHTS_FILE).exists() or not index.exists():
        return [WEIGHTS_FILE]
    try:
        names = sorted(set(read_json(index, "weights")["weight_map"].values()))
        outside = [name for name in names if not _is_weight_file(name)]
    except (KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{index}: weight_map must be an object that maps tensors to names of files"
        ) from None
    if outside:
        raise UsageError(
            f"{index}: weight_map names {outside[0]!r}, which is not a safetensors file in this "
            "folder"
        )
    return names


def _is_weight_file(name: str) -> bool:
    """Whether this is the bare name of a safetensors file."""
    # The folder may come from anyone: its index must not name files elsewhere on this machine.
    return name == os.path.basename(name) and name.endswith(".safetensors")


def _in_our_names(
    theirs: dict[str, Tensor], config: "GPTConfig", source: Path
) -> dict[str, Tensor]:
    """The weights in fp32 under the names of our Llama.

    UsageError naming a tensor that is missing, has another shape, or has no place in it."""
    # On the meta device: a wrong file is refused before memory for a model is allocated.
    parameters = meta_model(config).state_dict()
    names = {name: tensor_name(name, config.arch) for name in parameters}
    for name, tensor in parameters.items():
        _check_tensor(theirs.get(names[name]), names[name], tensor.shape, source)
    # A tensor left out would change what the model computes, without an error.
    foreign = sorted(set(theirs) - set(names.values()))
    if foreign:
        raise UsageError(
            f"{source}: the weights include {foreign[0]}, which nanochat's llama does not have"
        )
    return {name: theirs[their_name].float() for name, their_name in names.items()}


def _check_tensor(found: Tensor | None, name: str, shape: torch.Size, source: Path) -> None:
    """UsageError unless the tensor exists, has this shape, and holds floating-point numbers."""
    if found is None:
        raise UsageError(f"{source}: the weights lack {name}")
    # Weights quantised to integers need scales, which only their own format knows.
    if found.shape != shape or not found.is_floating_point():
        raise UsageError(
            f"{source}: {name} is {found.dtype} of shape {list(found.shape)}; it must be floating "
            f"point of shape {list(shape)}"
        )


# ---- the run folder ----


def _write_run(
    folder: Path,
    source: Path,
    config: "GPTConfig",
    tokenizer: "Tokenizer",
    weights: dict[str, Tensor],
) -> None:
    """A completed run of zero steps, whose final checkpoint has these weights."""
    # Built whole first: rotary tables are no weights, so the file does not hold them.
    model = build(config, "cpu")
    model.load_state_dict(weights)
    tokenizer.save(folder / "tokenizer")
    RunFolder(folder).write_config(_run_config(source, config, tokenizer))
    # Without an optimizer's state the run can be started from, but not resumed.
    checkpoint.save(folder, 0, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    # The keys are those that training writes: readers of runs need no special case.
    write_summary(
        folder,
        status="completed",
        reason=f"imported from {source}",
        step=0,
        tokens=0,
        total_training_flops=0,
        total_training_time=0.0,
        val_bpb=None,
        min_val_bpb=None,
        core_metric=None,
        core_metric_n=None,
        tok_per_sec=None,
        mfu=None,
        peak_memory_bytes=None,
    )


def _run_config(source: Path, config: "GPTConfig", tokenizer: "Tokenizer") -> dict[str, Any]:
    """config.json of an imported run."""
    return {
        # The flags of train.py that would give this shape.
        "args": {
            "arch": "llama",
            "tie_embeddings": config.tie_embeddings,
            "depth": config.depth,
            "aspect_ratio": config.width // config.depth,
            "head_dim": config.head_dim,
            "n_kv_head": config.n_kv_head,
            "max_seq_len": config.max_seq_len,
            "window_pattern": "L",
        },
        "imported_from": str(source),
        "model": asdict(config),
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        **provenance(),
    }
