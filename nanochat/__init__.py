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
    """The text that continues a prompt. options: of eval.generation.generate_text()."""
    from nanochat.eval.generation import generate_text

    return "".join(generate_text(model, tokenizer, prompt, **options))
