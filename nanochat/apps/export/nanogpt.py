"""Reading nanoGPT's files: ckpt.pt, a GPT-2 in PyTorch's pickles, and meta.pkl, its characters.

A pickle can run code. Both are read without: PyTorch's reader admits tensors and plain containers
only, the one for meta.pkl nothing but containers, text and numbers."""

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.apps.export.foreign import Foreign, require_finite, require_same_names
from nanochat.common import UsageError, in_a_line
from nanochat.data.tokenizer import Tokenizer

# What describes a model in a checkpoint. Forks add settings, which may change what it computes.
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
SETTINGS = {*SIZES, "bias", "dropout"}
# Put before every name by torch.compile.
COMPILED = "_orig_mod."
# Matrices of a block that transformers stores transposed, (in, out).
TRANSPOSED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORM_EPS = 1e-5
# A file with as many characters as Unicode has would be smaller.
LARGEST_META_BYTES = 64 << 20
ACTIVATION_NOTE = (
    "activation_function is gelu, as nanoGPT computes it; if a version of before mid-2023 trained "
    "the model, write gelu_new into config.json"
)


def read_nanogpt(path: Path) -> Foreign:
    """The model in a ckpt.pt. UsageError if it is damaged or not nanoGPT's."""
    content = _load(path)
    settings = content.get("model_args") if isinstance(content, dict) else None
    if not isinstance(settings, dict) or not isinstance(content.get("model"), dict):
        raise UsageError(
            f"{path} is not a checkpoint of nanoGPT: it has no model_args and model; of weights in "
            ".pt and .bin files only those of nanoGPT and llama2.c can be imported"
        )
    _check_settings(settings, path)
    theirs = {str(name).removeprefix(COMPILED): tensor for name, tensor in content["model"].items()}
    weights = _weights(theirs, settings, path)
    tied = "lm_head.weight" not in weights
    return Foreign(
        kind="nanoGPT",
        path=path,
        files=[path],
        config=_config(settings, tied),
        weights=lambda: weights,
        notes=(ACTIVATION_NOTE,),
    )


def _load(path: Path) -> Any:
    """The content of a .pt file, tensors on the CPU. UsageError if it is damaged, or holds more
    than tensors and plain containers."""
    try:
        # PyTorch does not compare the checksums that its archives have.
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError as error:
        # PyTorch's own message advises to run what the file holds.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        culprit = f" (it names {named[1]})" if named else ""
        raise UsageError(
            f"{path} is damaged, or holds Python objects beside tensors, lists and dicts, which "
            f"could run code and are never loaded{culprit}"
        ) from None
    # Of many classes: a file that was cut off, or is something else, fails anywhere.
    except Exception as error:
        raise UsageError(
            f"{path} cannot be read as a checkpoint of PyTorch ({_first_sentence(error)}); it is "
            "cut off, damaged, or something else"
        ) from None
    raise UsageError(f"{path} is damaged: its part {damaged} does not match its checksum")


def _first_sentence(error: Exception) -> str:
    """The beginning of PyTorch's message; what follows is advice that does not help here."""
    return in_a_line(error).split(". ")[0]


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """UsageError unless model_args are those of nanoGPT."""
    if "dim" in settings:
        raise UsageError(
            f"{path} is a checkpoint of llama2.c; write it as a .bin with llama2.c's export.py, "
            "and import that"
        )
    problems = [
        f"{path}: {name} is {settings.get(name)!r}; must be a positive integer"
        for name in SIZES
        if type(settings.get(name)) is not int or settings[name] < 1
    ]
    problems += [
        f"{path}: model_args has {name}={settings[name]!r}, which nanoGPT does not have; what it "
        "changes is unknown"
        for name in sorted(map(str, set(settings) - SETTINGS))
    ]
    if not problems and settings["n_embd"] % settings["n_head"]:
        problems.append(f"{path}: n_embd {settings['n_embd']} is no multiple of n_head")
    if type(settings.get("bias", True)) is not bool:
        problems.append(f"{path}: bias is {settings['bias']!r}; must be True or False")
    if problems:
        raise UsageError("\n".join(problems))


def _shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{name: shape} of nanoGPT's tensors."""
    C, V = settings["n_embd"], settings["vocab_size"]
    modules = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    with_bias = {"transformer.ln_f": (C,)}
    for layer in range(settings["n_layer"]):
        with_bias |= {f"transformer.h.{layer}.{name}": shape for name, shape in modules.items()}
    shapes = {
        "transformer.wte.weight": (V, C),
        "transformer.wpe.weight": (settings["block_size"], C),
        "lm_head.weight": (V, C),
    }
    shapes |= {f"{name}.weight": shape for name, shape in with_bias.items()}
    # Versions that lack the setting always have them.
    if settings.get("bias", True):
        shapes |= {f"{name}.bias": shape[:1] for name, shape in with_bias.items()}
    return shapes


def _weights(
    theirs: Mapping[str, Any], settings: Mapping[str, Any], path: Path
) -> dict[str, Tensor]:
    """{name in transformers: fp32 tensor}, with biases of zero where there are none."""
    # Versions for PyTorch 1 stored the causal mask.
    theirs = {name: value for name, value in theirs.items() if not name.endswith(".attn.bias")}
    shapes = _shapes(settings)
    require_same_names(theirs, shapes, path, "nanoGPT")
    for name, shape in shapes.items():
        found = theirs[name]
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != shape:
            what = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Tensor) else 0
            raise UsageError(
                f"{path}: {name} is {what or type(found).__name__}; it must be floating point of "
                f"shape {list(shape)}"
            )
    weights = {name: tensor.float() for name, tensor in theirs.items()}
    require_finite(weights, path)
    if torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        del weights["lm_head.weight"]
    for name in list(weights):
        module = name.removesuffix(".weight")
        if module.endswith(TRANSPOSED):
            weights[name] = weights[name].t()
        # transformers has no GPT-2 without biases; zeros compute the same
        if module.endswith((*TRANSPOSED, "ln_1", "ln_2", "ln_f")):
            weights.setdefault(f"{module}.bias", torch.zeros(shapes[name][0]))
    # safetensors wants tensors that share no memory
    return {name: tensor.clone().contiguous() for name, tensor in weights.items()}


def _config(settings: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The model as a config.json of transformers."""
    dropout = settings.get("dropout", 0.0)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": settings["vocab_size"],
        "n_positions": settings["block_size"],
        "n_embd": settings["n_embd"],
        "n_layer": settings["n_layer"],
        "n_head": settings["n_head"],
        "n_inner": None,
        "activation_function": "gelu",
        "layer_norm_epsilon": NORM_EPS,
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
        "attn_pdrop": dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": tied,
    }


# ---- meta.pkl ----


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text and numbers; whatever needs a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Never returns."""
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_meta(path: Path) -> Tokenizer:
    """The characters of a meta.pkl, in the order of their ids.

    The tokenizer's BOS is an id that the model does not have. UsageError if the file holds anything
    but tables of characters."""
    try:
        if path.stat().st_size > LARGEST_META_BYTES:
            raise UsageError(f"{path} is too large for a table of characters")
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    except UsageError:
        raise
    # Of many classes, for a file that is damaged or something else.
    except Exception as error:
        raise UsageError(
            f"{path} is damaged, or holds more than text, numbers and containers, which could run "
            f"code and is never loaded ({in_a_line(error)})"
        ) from None
    ids = content.get("stoi") if isinstance(content, dict) else None
    if not isinstance(ids, dict) or not ids or not _are_characters(ids):
        raise UsageError(
            f"{path}: stoi must map single characters to the ids 0, 1, 2, ...; only character "
            "models of nanoGPT have a meta.pkl that can be read"
        )
    return Tokenizer("char", [c.encode("utf-8") for c in sorted(ids, key=ids.get)])


def _are_characters(ids: Mapping[Any, Any]) -> bool:
    """Whether {character: id} numbers characters from 0 on."""
    if not all(type(c) is str and len(c) == 1 and type(i) is int for c, i in ids.items()):
        return False
    surrogates = any("\ud800" <= c <= "\udfff" for c in ids)
    return not surrogates and sorted(ids.values()) == list(range(len(ids)))
