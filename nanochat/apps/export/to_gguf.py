"""From a llama run to a folder for llama.cpp and Ollama: model.gguf and a Modelfile."""

from pathlib import Path

import torch

from nanochat import load
from nanochat.apps.export.gguf_file import (
    Saved,
    read_gguf,
    require_gguf,
    saved_weights,
    vocabulary_of,
    write_gguf,
)
from nanochat.apps.export.llama_cpp import verify_with_llama_cpp
from nanochat.apps.export.verify import ExportFailed
from nanochat.common import UsageError, new_folder, write_atomic
from nanochat.run.loading import step_of

GGUF_FILE = "model.gguf"
# Without a template of its own Ollama would wrap prompts as for a chat.
MODELFILE = '''# ollama create NAME -f Modelfile
FROM ./{file}
# The model continues text; it was not taught to follow instructions.
TEMPLATE """{{{{ .Prompt }}}}"""
PARAMETER num_ctx {context_tokens}
'''


def export_gguf(run: Path, out: Path, step: int | str | None, dtype: str) -> None:
    """Write the folder `out` of a llama run's checkpoint, and print what was verified.

    step: of a checkpoint, "best", or None for the newest intact one. dtype: of the matrices,
    float32, bfloat16 or q8_0 (8 bits and a scale for each 32 weights). Raises UsageError for an
    unusable run or `out`, or a model or tokenizer that llama.cpp does not know; ExportFailed if
    what was written computes something else; then nothing is left of it."""
    require_gguf()
    with new_folder(out) as folder:
        # Such a folder has a config.json too, and would be called a run without checkpoints.
        if (run / "generation_config.json").exists():
            raise UsageError(
                f"{run} is a Hugging Face folder; create a run from it with --format run, and "
                "export that run"
            )
        step = step_of(run, step)
        model, tokenizer = load(run, step, device_type="cpu", dtype="float32")
        config = model.config
        if config.arch != "llama":
            raise UsageError(
                f"--format gguf: {run} is a {config.arch} model, and llama.cpp does not know that "
                "architecture; train with --arch=llama, or use --format hf"
            )
        weights = saved_weights(model.state_dict(), dtype)
        written = Saved(weights, vocabulary_of(tokenizer))
        # The comparison is with the rounded weights: rounding is the user's choice.
        model.load_state_dict(weights)
        path = folder / GGUF_FILE
        write_gguf(path, run.absolute().name, written, config, dtype)
        found = read_gguf(path, weights, config)
        same = all(torch.equal(found.weights[name], weights[name]) for name in weights)
        if not same or found.vocabulary != written.vocabulary:
            raise ExportFailed(
                "read back, the file holds other weights or another tokenizer; try another release "
                "of the package gguf"
            )
        modelfile = MODELFILE.format(file=GGUF_FILE, context_tokens=config.max_seq_len)
        write_atomic(folder / "Modelfile", modelfile)
        verified = verify_with_llama_cpp(path, model, tokenizer, dtype)
    print(f"weights and tokenizer read back; {verified}; gguf of {run} at step {step}: {out}")
