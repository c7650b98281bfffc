"""A Hugging Face causal language model from a local folder, with as much of our models' and tokenizers' interface as evaluation needs.

Only data is read: safetensors and JSON, and no code that the folder may bring."""

import contextlib
import json
import logging
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.common import UsageError, in_a_line, install_hint, read_json


@contextlib.contextmanager
def quiet(transformers):
    """No progress bars, no advice, no log lines of what transformers imports: none is about what is done here."""
    logging.disable(logging.WARNING)
    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def load(folder, device, dtype):
    """(HuggingFaceModel, HuggingFaceTokenizer) of a folder. UsageError where transformers cannot load it without running its code."""
    try:
        import transformers
    except ImportError:
        raise install_hint("transformers", f"{folder}, a Hugging Face folder,") from None
    if (
        str(read_json(Path(folder) / "config.json", str(folder))["model_type"])
        not in transformers.CONFIG_MAPPING
    ):
        raise UsageError(
            f"{folder}: transformers {transformers.__version__} has no such model itself, and code that the folder may bring "
            f"is never run; a run of nanochat's own is evaluated from its run folder"
        )
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )  # told below
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (
        Exception
    ) as error:  # of many classes: missing files, unknown models, models that bring code
        raise UsageError(
            f"{folder}: transformers {transformers.__version__} does not load it ({in_a_line(error)}); only weights in "
            f"safetensors and models without code of their own are read"
        ) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        names = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
        raise UsageError(
            f"{folder}: its weights are not those of its config.json: {', '.join(sorted(names)[:3])} and so on"
        )
    model = HuggingFaceModel(model.to(device), dtype).eval()
    if not _is_causal(model, device):
        raise UsageError(
            f"{folder}: this model sees what comes after a token, as an encoder such as BERT does: nothing is left to predict"
        )
    return model, HuggingFaceTokenizer(folder, tokenizer)


@torch.no_grad()
def _is_causal(model, device):
    """Whether logits before the last token are the same, but for rounding, whatever the last one is."""
    ids = torch.zeros(2, 8, dtype=torch.int64, device=device)
    ids[1, -1] = model.config.vocab_size - 1
    first, second = model.hidden(ids)[:, :-1].float()
    return bool((first - second).abs().max() <= 0.01 * first.abs().max())


class HuggingFaceModel(torch.nn.Module):
    """hidden() gives the logits, logits() only fp32: heads differ from model to model. It takes no cache (core.Core: shares=False)."""

    def __init__(self, model, compute_dtype):
        super().__init__()
        self.model, self.compute_dtype = model, compute_dtype
        config = (
            model.config.get_text_config()
        )  # of the part that reads text, where there are others
        self.config = types.SimpleNamespace(
            vocab_size=config.vocab_size,
            max_seq_len=getattr(config, "max_position_embeddings", None) or 2048,
        )

    def hidden(self, ids_BxT, cache=None):
        """Logits (B, T, V) of int64 ids, in the compute dtype."""
        return self.model(input_ids=ids_BxT, use_cache=False).logits

    def logits(self, hidden):
        """What hidden() gave, in fp32."""
        return hidden.float()

    def forward(self, ids_BxT, targets_BxT):
        """Cross-entropy in nats (B, T), 0 where the target is -1."""
        logits_NxV = self.logits(self.hidden(ids_BxT)).flatten(0, 1)
        return F.cross_entropy(
            logits_NxV, targets_BxT.flatten(), ignore_index=-1, reduction="none"
        ).view_as(targets_BxT)

    def flops_per_token(self):
        """Of training, without attention: 6 for each parameter."""
        return 6 * sum(p.numel() for p in self.parameters())


class HuggingFaceTokenizer:
    """bos: the token that texts begin with here: the model's own, or its end-of-text where it has none (GPT-2)."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.bos = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        if self.bos is None:
            raise UsageError(
                f"{folder}: its tokenizer has neither a BOS nor an end-of-text token for texts to begin with"
            )
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def encode_batch(self, texts, threads=1):
        """Token ids of several texts, as numpy arrays, without special tokens: their names in a text are plain text, as with ours."""
        if not texts:
            return []
        found = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [np.array(ids, dtype=np.uint32) for ids in found["input_ids"]]

    def byte_counts(self):
        """UTF-8 bytes per token id, int64, 0 for special tokens. UsageError unless its tokens are strings of bytes, as GPT-2's."""
        stages = (
            json.loads(self.tokenizer.backend_tokenizer.to_str())["decoder"]
            if self.tokenizer.is_fast
            else None
        )
        stages = [] if stages is None else stages.get("decoders", [stages])
        if [stage["type"] for stage in stages] != ["ByteLevel"]:
            raise UsageError(
                f"{self.folder}: bits per byte need a byte-level tokenizer, such as GPT-2's; this one works on characters"
            )
        tokens = self.tokenizer.convert_ids_to_tokens(range(self.vocab_size))
        counts = np.array(
            [len(token or "") for token in tokens], dtype=np.int64
        )  # a character stands for a byte; ids may have gaps
        for (
            text,
            i,
        ) in (
            self.tokenizer.get_added_vocab().items()
        ):  # these are written as they are, such as runs of blanks
            counts[i] = len(text.encode("utf-8"))
        counts[self.tokenizer.all_special_ids] = 0
        return counts
