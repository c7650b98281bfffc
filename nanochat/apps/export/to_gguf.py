"""From a llama run to a folder for llama.cpp and Ollama: model.gguf, a Modelfile, a model card."""

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
from nanochat.apps.export.model_card import model_card
from nanochat.apps.export.verify import ExportFailed
from nanochat.common import UsageError, new_folder, write_atomic
from nanochat.data.chat import is_chat
from nanochat.data.tokenizer import TURN_END
from nanochat.run.loading import step_of

GGUF_FILE = "model.gguf"
# Without a template of its own Ollama would wrap prompts as for a chat.
MODELFILE = '''# ollama create NAME -f Modelfile
FROM ./{file}
# The model continues text; it was not taught to follow instructions.
TEMPLATE """{{{{ .Prompt }}}}"""
PARAMETER num_ctx {context_tokens}
'''
# The same format as the template in the file, in the language of Ollama's own templates.
CHAT_MODELFILE = '''# ollama create NAME -f Modelfile
FROM ./{file}
TEMPLATE """{{{{ range .Messages }}}}<|{{{{ .Role }}}}_start|>{{{{ .Content }}}}{turn_end}\
{{{{ end }}}}<|assistant_start|>"""
PARAMETER stop "{turn_end}"
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
        modelfile = CHAT_MODELFILE if is_chat(tokenizer) else MODELFILE
        modelfile = modelfile.format(
            file=GGUF_FILE, turn_end=TURN_END, context_tokens=config.max_seq_len
        )
        write_atomic(folder / "Modelfile", modelfile)
        card = model_card(run, step, model, tokenizer, dtype, target="gguf")
        write_atomic(folder / "README.md", card)
        verified = verify_with_llama_cpp(path, model, tokenizer, dtype)
    print(f"weights and tokenizer read back; {verified}; gguf of {run} at step {step}: {out}")
