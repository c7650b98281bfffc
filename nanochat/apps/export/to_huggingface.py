"""From a run to a Hugging Face folder: weights, config.json, tokenizer, code and model card."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanochat import load
from nanochat.apps.export.fields import MODELING_FILE, tensor_name, write_configs
from nanochat.apps.export.model_card import model_card
from nanochat.apps.export.tokenizer_files import pad_id, write_tokenizer_files
from nanochat.apps.export.verify import verify
from nanochat.common import UsageError, new_folder, write_atomic
from nanochat.run.loading import step_of


def export_run(run: Path, out: Path, step: int | str | None, dtype: str) -> None:
    """Write the Hugging Face folder `out` of a run's checkpoint, and print what was verified.

    step: of a checkpoint, "best", or None for the newest intact one. dtype: of the saved weights,
    float32 or bfloat16. Raises UsageError for an unusable run or `out`, ExportFailed if what was
    written computes something else; then nothing is left of it."""
    with new_folder(out) as folder:
        # Such a folder has a config.json too, and would be called a damaged run.
        if (run / "generation_config.json").exists():
            raise UsageError(
                f"{run} is a Hugging Face folder already; to create a run from it, use --format run"
            )
        step = step_of(run, step)
        model, tokenizer = load(run, step, device_type="cpu", dtype="float32")
        saved_dtype = getattr(torch, dtype)
        weights = {name: tensor.to(saved_dtype) for name, tensor in model.state_dict().items()}
        # The comparison is with the rounded weights: rounding to bfloat16 is the user's choice.
        model.load_state_dict(weights)
        _write_weights(weights, model.config.arch, folder)
        pad = pad_id(tokenizer)
        write_configs(
            folder,
            model.config,
            bos=tokenizer.bos,
            # The attention mask hides padding, whatever its token.
            pad=tokenizer.bos if pad is None else pad,
            # the end of a turn, if there are chats, comes before the end of a document
            ends=sorted(tokenizer.end_ids, reverse=True),
            dtype=dtype,
        )
        write_tokenizer_files(tokenizer, model.config.max_seq_len, folder)
        if model.config.arch != "llama":
            shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
        write_atomic(folder / "README.md", model_card(run, step, model, tokenizer, dtype))
        verified = verify(folder, model, tokenizer)
    print(f"{verified}; Hugging Face folder of {run} at step {step}: {out}")


def _write_weights(weights: dict[str, torch.Tensor], arch: str, folder: Path) -> None:
    """model.safetensors, with the names that transformers expects."""
    # safetensors refuses views that are not contiguous.
    renamed = {tensor_name(name, arch): tensor.contiguous() for name, tensor in weights.items()}
    # Releases of transformers before 5 refuse files that do not name their framework.
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
