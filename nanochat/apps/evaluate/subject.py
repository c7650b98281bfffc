"""What is evaluated: a checkpoint of a run, or a Hugging Face model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.apps.evaluate.config import is_foreign, read_config
from nanochat.eval import hf_model
from nanochat.eval.core_answers import BATCH_TOKENS
from nanochat.ranks import from_rank0_or_raise
from nanochat.run import loading

# a Hugging Face model, which computes the logits of all tokens of a pass, gets this share of them
LOGITS_SHARE = 8


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be evaluated."""

    # as the user named it
    run: str
    folder: Path
    # the folder's config.json
    config: dict
    # whether it is a Hugging Face model
    foreign: bool
    # of the checkpoint, None for a Hugging Face model
    step: int | None
    # for people
    title: str
    model: Any
    tokenizer: Any


def open_subject(run: str, step: int | str, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model of a folder, the same checkpoint on all ranks. step: as --step.

    Raises UsageError for a folder, checkpoint or model that cannot be loaded."""
    config = read_config(run)
    if is_foreign(config):
        model, tokenizer = hf_model.load(run, device, dtype)
        return Subject(run, Path(run), config, True, None, str(run), model, tokenizer)
    # chosen once for all ranks: a run that is still training may save another one meanwhile
    found = from_rank0_or_raise(lambda: loading.step_of(run, None if step == -1 else step))
    model, tokenizer = loading.load_run(run, found, device.type, str(dtype).removeprefix("torch."))
    title = f"{run}, step {found}"
    return Subject(run, Path(run), config, False, found, title, model.to(device), tokenizer)


def default_batch_tokens(foreign: bool, max_seq_len: int, device_type: str) -> int:
    """Tokens of one pass of a model, where --batch-tokens does not say."""
    if foreign:
        # may be less than a context: some have 100,000 tokens, each with its logits
        return BATCH_TOKENS[device_type] // LOGITS_SHARE
    return max(BATCH_TOKENS[device_type], max_seq_len)
