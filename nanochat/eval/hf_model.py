"""A Hugging Face causal language model from a local folder, for evaluation.

It has as much of the interface of our models and tokenizers as evaluation needs. Only data is read,
safetensors and JSON; code that the folder may contain is never run."""

import atexit
import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UsageError, in_a_line, install_hint, read_json

# positions of a model whose config does not state them
DEFAULT_POSITIONS = 2048


@contextlib.contextmanager
def quiet(transformers: types.ModuleType) -> Iterator[None]:
    """Silence the progress bars, advice and log lines of transformers and what it imports."""
    # for the loggers of the libraries that transformers imports, too
    logging.disable(logging.WARNING)
    verbosity = transformers.logging.get_verbosity()
    had_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(verbosity)
        if had_bars:
            transformers.logging.enable_progress_bar()


def run_code_from_throwaway_cache() -> None:
    """Before transformers runs a modelling file that this program itself exported: keep the copy
    that it makes of such a file out of the user's cache."""
    # transformers reads the variable when it is imported; a user who set it wants that folder.
    if "transformers" not in sys.modules and "HF_MODULES_CACHE" not in os.environ:
        os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def load(
    folder: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple["HuggingFaceModel", "HuggingFaceTokenizer"]:
    """The model, in eval mode, and the tokenizer of a folder.

    Raises UsageError if transformers cannot load it without running its code, if its weights do not
    fit its config, or if the model is not causal."""
    try:
        import transformers
    except ImportError:
        raise install_hint("transformers", f"{folder}, a Hugging Face folder,") from None
    model_type = str(read_json(Path(folder) / "config.json", str(folder))["model_type"])
    if model_type not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"{folder}: transformers {transformers.__version__} has no model of type {model_type}, "
            f"and code from the folder is never run; to evaluate a run of nanochat, name its run "
            f"folder"
        )
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(transformers):
            # mismatched weights are reported below, by name, instead of by a traceback
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        # of many classes: missing files, unknown models, models that need their own code
        raise UsageError(
            f"{folder}: transformers {transformers.__version__} cannot load it "
            f"({in_a_line(error)}); only weights in safetensors and models without code of their "
            f"own are supported"
        ) from error
    wrong = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if wrong:
        raise UsageError(
            f"{folder}: its weights do not fit its config.json: missing, or of another shape, are "
            f"{', '.join(sorted(wrong)[:3])} and so on"
        )
    model = HuggingFaceModel(model.to(device), dtype).eval()
    if not _is_causal(model, device):
        raise UsageError(
            f"{folder}: this model sees the tokens after a position, as an encoder such as BERT "
            f"does, so it predicts nothing; name a causal language model"
        )
    return model, HuggingFaceTokenizer(folder, tokenizer)


@torch.no_grad()
def _is_causal(model: "HuggingFaceModel", device: torch.device) -> bool:
    """Whether the last token leaves the logits before it unchanged, up to rounding."""
    # two texts that differ in the last token only
    ids_BxT = torch.zeros(2, 8, dtype=torch.int64, device=device)
    ids_BxT[1, -1] = model.config.vocab_size - 1
    first, second = model.hidden(ids_BxT)[:, :-1].float()
    return bool((first - second).abs().max() <= 0.01 * first.abs().max())


class HuggingFaceModel(torch.nn.Module):
    """A transformers model behind the interface of model.decoder.Decoder.

    hidden() computes the logits and logits() only turns them to fp32, since heads differ from model
    to model. It accepts no cache: a Core for it is opened with shares=False."""

    def __init__(self, model: torch.nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        # of the part that reads text, in a model that has other parts too
        config = model.config.get_text_config()
        self.config = types.SimpleNamespace(
            vocab_size=config.vocab_size,
            max_seq_len=getattr(config, "max_position_embeddings", None) or DEFAULT_POSITIONS,
        )

    def hidden(self, ids_BxT: Tensor, cache: None = None) -> Tensor:
        """Logits (B, T, V) of int64 ids, in the compute dtype."""
        return self.model(input_ids=ids_BxT, use_cache=False).logits

    def logits(self, hidden: Tensor) -> Tensor:
        """The result of hidden(), or a part of it, in fp32."""
        return hidden.float()

    def forward(self, ids_BxT: Tensor, targets_BxT: Tensor) -> Tensor:
        """Cross-entropy in nats, fp32 (B, T), 0 where the target is -1."""
        logits_NxV = self.logits(self.hidden(ids_BxT)).flatten(0, 1)
        nats_N = F.cross_entropy(
            logits_NxV, targets_BxT.flatten(), ignore_index=-1, reduction="none"
        )
        return nats_N.view_as(targets_BxT)

    def flops_per_token(self) -> int:
        """FLOPs of training per token: 6 for each parameter, attention not counted."""
        return 6 * sum(parameter.numel() for parameter in self.parameters())


class HuggingFaceTokenizer:
    """A transformers tokenizer behind the interface of data.tokenizer.Tokenizer.

    bos: the token that texts begin with: the tokenizer's own BOS, or its end-of-text token if it
    has none (GPT-2)."""

    def __init__(self, folder: str | Path, tokenizer: Any) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.bos: int = tokenizer.bos_token_id
        if self.bos is None:
            self.bos = tokenizer.eos_token_id
        if self.bos is None:
            raise UsageError(
                f"{folder}: its tokenizer has neither a BOS nor an end-of-text token, one of which "
                f"must begin every text"
            )
        # not len(tokenizer): ids may have gaps
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of several texts, uint32 (T,), without special tokens.

        Names of special tokens in a text are plain text, as with our tokenizers."""
        if not texts:
            return []
        found = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [np.array(ids, dtype=np.uint32) for ids in found["input_ids"]]

    def byte_counts(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 (V,), 0 for special tokens.

        Raises UsageError unless the tokenizer is byte-level, as GPT-2's."""
        if self._decoders() != ["ByteLevel"]:
            raise UsageError(
                f"{self.folder}: bits per byte need a byte-level tokenizer, such as GPT-2's; the "
                f"tokens of this one are not strings of bytes"
            )
        tokens = self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))
        # a byte-level token has a character for each of its bytes
        counts = np.array([len(token or "") for token in tokens], dtype=np.int64)
        # but added tokens, such as runs of blanks, stand for themselves
        for text, i in self.tokenizer.get_added_vocab().items():
            counts[i] = len(text.encode("utf-8"))
        counts[self.tokenizer.all_special_ids] = 0
        return counts

    def _decoders(self) -> list[str]:
        """The types of the stages that turn tokens into text; none of a tokenizer in Python."""
        if not self.tokenizer.is_fast:
            return []
        decoder = json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"]
        if decoder is None:
            return []
        return [stage["type"] for stage in decoder.get("decoders", [decoder])]
