"""nanochat: train, sample and compare small GPTs. Importing this loads nothing heavy."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.decoder import Decoder

__version__ = "0.1.0"


def load(
    run: Path | str, step: int | str | None = None, device_type: str = "", dtype: str = "auto"
) -> "tuple[Decoder, Tokenizer]":
    """(model, tokenizer) of a run folder, ready to generate. See run.loading.load_run()."""
    from nanochat.run.loading import load_run

    return load_run(run, step, device_type, dtype)


def generate(model: "Decoder", tokenizer: "Tokenizer", prompt: str, **options: Any) -> str:
    """The text that continues a prompt, as `nanochat serve` would write it.

    options: max_new_tokens, stop, temperature, top_k, top_p, min_p, repetition_penalty and seed, as
    in eval.writer.request_of()."""
    from nanochat.eval.writer import Writer, request_of

    with Writer(model, tokenizer) as writer:
        return writer.texts([request_of(tokenizer, prompt, **options)])[0]
