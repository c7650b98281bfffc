"""Reading the Hugging Face folder of a Llama, exported here or from elsewhere."""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanochat.apps.export.fields import read_llama_fields
from nanochat.apps.export.foreign import Foreign
from nanochat.common import UsageError, read_json

WEIGHTS_FILE = "model.safetensors"
# Tables that follow from config.json; old releases of transformers saved them.
ROTARY_TABLE = ".rotary_emb.inv_freq"


def read_folder(source: Path) -> Foreign:
    """The Llama in a folder, of which safetensors and JSON are read, and nothing else.

    UsageError for a folder without a config.json of a Llama."""
    path = source / "config.json"
    if not path.exists() and (source / "ckpt.pt").exists():
        raise UsageError(f"{source} has a checkpoint of nanoGPT: name the file, {source}/ckpt.pt")
    config = read_llama_fields(path)
    files = [path, *(source / name for name in weight_files(source))]
    files += [tokenizer for tokenizer in [source / "tokenizer.json"] if tokenizer.exists()]
    tied = bool(config.get("tie_word_embeddings"))
    return Foreign(
        kind="Hugging Face Llama",
        path=path,
        files=files,
        config=config,
        weights=lambda: _without_tables(read_weights(source), tied),
    )


def _without_tables(weights: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights without what follows from the others, and a tied head's second copy."""
    head, table = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if tied and head is not None and table is not None and head.equal(table):
        weights = {name: tensor for name, tensor in weights.items() if tensor is not head}
    return {name: tensor for name, tensor in weights.items() if not name.endswith(ROTARY_TABLE)}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """{name: tensor} of model.safetensors, or of the files that its index names.

    UsageError if a file is missing or damaged, or is not in the folder."""
    weights = {}
    for name in weight_files(folder):
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{folder / name} cannot be read as safetensors ({error}); other formats of "
                "weights are not supported"
            ) from None
    return weights


def weight_files(folder: Path) -> list[str]:
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
