"""`nanochat export --from`: a model of another program as a run, or as a Hugging Face folder.

A Llama becomes a run if ours computes the same: a narrower MLP is filled with zeros, another
epsilon of the norms is a scale of the residual stream, and token ids may be numbered anew. What
else differs is refused by name. nanoGPT's GPT-2 is neither of our architectures, so it becomes a
folder for transformers, which `nanochat evaluate` reads too. Only data is read, never code."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from nanochat import load
from nanochat.apps.export.fields import llama_shape, norm_eps_of, tensor_name
from nanochat.apps.export.foreign import Foreign, require_finite, require_same_names
from nanochat.apps.export.foreign_tokenizer import Renumbered, read_renumbered
from nanochat.apps.export.from_huggingface import read_folder
from nanochat.apps.export.llama2c import MAGIC, read_llama2c
from nanochat.apps.export.nanogpt import read_meta, read_nanogpt
from nanochat.apps.export.tokenizer_files import (
    characters_json,
    require_tokenizers,
    write_tokenizer_files,
)
from nanochat.apps.export.verify import ExportFailed, Ours
from nanochat.common import (
    UsageError,
    in_a_line,
    new_folder,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)
from nanochat.data.tokenizer import gpt2_tokenizer, read_tokenizer
from nanochat.eval.hf_model import quiet
from nanochat.model.build import build, meta_model
from nanochat.model.llama import LLAMA_NORM_EPS, swiglu_width
from nanochat.run import checkpoint
from nanochat.run.flags import FLAGS
from nanochat.run.folder import RunFolder, provenance, write_summary

if TYPE_CHECKING:
    import transformers

    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig

# What a .pt file begins with: it is a zip archive, or in old releases of PyTorch a pickle.
PYTORCH_STARTS = (b"PK", b"\x80")
# Files of a folder that describe its tokenizer to transformers.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def import_model(source: Path, out: Path, form: str, tokenizer: str) -> None:
    """Write the run or the Hugging Face folder `out` from a model of another program.

    source: a ckpt.pt of nanoGPT, a .bin of llama2.c, or a Hugging Face folder of a Llama. form:
    run or hf. tokenizer: of --tokenizer, "" for the one in a folder `source`. Raises UsageError
    that names what cannot be imported, ExportFailed if what was written computes something else;
    then nothing is left of it."""
    foreign = _read(source)
    if form == "hf":
        _write_hf_folder(foreign, source, out, tokenizer)
    else:
        _import_run(foreign, source, out, tokenizer)


def _read(source: Path) -> Foreign:
    """The model in a file or folder, by what it begins with."""
    if source.is_dir():
        return read_folder(source)
    try:
        with open(source, "rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise UsageError(f"{source} does not exist; check the path") from None
    except OSError as error:
        raise UsageError(f"{source} cannot be read ({error.strerror})") from None
    if start.startswith(PYTORCH_STARTS):
        return read_nanogpt(source)
    if source.suffix in (".pt", ".pth"):
        raise UsageError(f"{source} is not a checkpoint of PyTorch; it is damaged or another file")
    # The oldest version of its files begins with sizes: nothing in them tells what it is.
    if source.suffix != ".bin" and not start.startswith(MAGIC[:2]):
        raise UsageError(
            f"--from {source}: must be a Hugging Face folder of a Llama, a .bin of llama2.c, or a "
            "ckpt.pt of nanoGPT"
        )
    return read_llama2c(source)


# ---- a run ----


def _import_run(foreign: Foreign, source: Path, out: Path, named: str) -> None:
    """import_model() to a run."""
    if foreign.config["model_type"] != "llama":
        raise UsageError(
            f"{source}: a GPT-2 (learned positions, LayerNorm, GELU) is neither of nanochat's "
            "architectures, so it cannot become a run; add --format hf for a Hugging Face folder, "
            "which `nanochat evaluate` reads"
        )
    config = llama_shape(foreign.config, foreign.path)
    ours = _tokenizer_of_run(foreign, source, named, config.vocab_size)
    theirs = foreign.weights()
    notes = [*foreign.notes, *ours.notes, *_notes_on_shape(foreign.config, config)]
    weights = in_our_names(theirs, foreign.config, config, foreign.path)
    for name in {"embedding.weight", "head.weight"} & set(weights):
        weights[name] = weights[name][ours.old_ids]
    with new_folder(out) as folder:
        _write_run(folder, source, foreign, config, ours.tokenizer, weights)
        # Through the same door as every app: a run that none of them can load is not a result.
        model, tokenizer = load(folder, 0, device_type="cpu", dtype="float32")
        saved = model.state_dict()
        if not all(torch.equal(tensor, weights[name]) for name, tensor in saved.items()):
            raise ExportFailed("the weights of the new run differ from those of the folder")
        compared = _compare_logits(foreign, theirs, Ours(model, tokenizer), ours.old_ids)
    for note in notes:
        print(f"note: {note}")
    print(
        f"verified: weights read back equal; {compared}; run folder of {source} ({foreign.kind}): "
        f"{out}"
    )


def _tokenizer_of_run(foreign: Foreign, source: Path, named: str, n_ids: int) -> Renumbered:
    """The tokenizer for a model of n_ids token ids. UsageError if there is none that fits."""
    if not named and not source.is_dir():
        raise UsageError(
            f"--from {source}: a run needs a tokenizer, and a file of {foreign.kind} holds none; "
            "name one that nanochat can express with --tokenizer (a run folder, a folder with "
            "tokenizer.json, or gpt2), or add --format hf for a folder without one"
        )
    found = _tokenizer_named(named, n_ids) if named else read_renumbered(source, n_ids)
    if found.tokenizer.vocab_size != n_ids:
        raise UsageError(
            f"{foreign.path}: vocab_size is {n_ids}, but the tokenizer has "
            f"{found.tokenizer.vocab_size} tokens"
        )
    return found


def _tokenizer_named(named: str, n_ids: int) -> Renumbered:
    """The tokenizer of --tokenizer as one of ours, for a model of n_ids token ids."""
    path = Path(named)
    if named == "gpt2" and not path.exists():
        return Renumbered.unchanged(gpt2_tokenizer())
    if path.is_file():
        raise UsageError(
            f"--tokenizer {named}: a run cannot use this file; nanochat has no SentencePiece (byte "
            "fallback, merges by scores), so name a folder with a byte-level tokenizer.json, or a "
            "run folder, or add --format hf"
        )
    if (path / "tokenizer.json").exists():
        return read_renumbered(path, n_ids)
    return Renumbered.unchanged(read_tokenizer(path))


def _notes_on_shape(theirs: dict[str, Any], config: "GPTConfig") -> list[str]:
    """Sentences about what the run has in another form."""
    notes = []
    hidden, ours = theirs["intermediate_size"], swiglu_width(config.width)
    if hidden != ours:
        notes.append(
            f"intermediate_size {hidden} became {ours}, filled with zeros that compute nothing"
        )
    eps = norm_eps_of(theirs)
    if eps != LLAMA_NORM_EPS:
        notes.append(
            f"rms_norm_eps {eps:g} became {LLAMA_NORM_EPS:g}, with the residual stream scaled by "
            f"{_stream_scale(eps):.4g}, which computes the same"
        )
    return notes


def _stream_scale(eps: float) -> float:
    """By what to multiply the residual stream for norms with our epsilon to compute the same.

    x / sqrt(mean(x^2) + eps) is unchanged when x is multiplied by c and eps by c^2."""
    return math.sqrt(LLAMA_NORM_EPS / eps)


def in_our_names(
    theirs: dict[str, Tensor], fields: dict[str, Any], config: "GPTConfig", path: Path
) -> dict[str, Tensor]:
    """The weights in fp32 under the names and in the shapes of our Llama.

    theirs: by the names of transformers. fields: their config.json. config: llama_shape(fields).
    UsageError naming a tensor that is missing, damaged, has another shape, or has no place."""
    # On the meta device: a wrong file is refused before memory for a model is allocated.
    parameters = meta_model(config).state_dict()
    names = {name: tensor_name(name, config.arch) for name in parameters}
    require_same_names(theirs, names.values(), path, "nanochat's llama")
    scale = _stream_scale(norm_eps_of(fields))
    weights = {}
    for name, parameter in parameters.items():
        found = theirs[names[name]]
        shape = _their_shape(name, list(parameter.shape), fields["intermediate_size"])
        # Weights quantised to integers need scales, which only their own format knows.
        if list(found.shape) != shape or not found.is_floating_point():
            raise UsageError(
                f"{path}: {names[name]} is {found.dtype} of shape {list(found.shape)}; it must be "
                f"floating point of shape {shape}"
            )
        require_finite({names[name]: found}, path)
        weights[name] = _filled(found.float(), parameter.shape)
        if scale != 1 and name.endswith(
            ("embedding.weight", "attention.out.weight", "mlp.down.weight")
        ):
            weights[name] = weights[name] * scale
    # The head multiplies what the last norm returns; a tied one has been scaled.
    if scale != 1 and config.tie_embeddings:
        weights["final_norm.weight"] = weights["final_norm.weight"] / scale
    return weights


def _their_shape(name: str, ours: list[int], hidden: int) -> list[int]:
    """The shape of a tensor with an MLP of another width than ours."""
    if name.endswith(("mlp.gate.weight", "mlp.up.weight")):
        return [hidden, ours[1]]
    if name.endswith("mlp.down.weight"):
        return [ours[0], hidden]
    return ours


def _filled(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with zeros behind it up to a shape: MLP channels that are 0 whatever they read, and
    that no gradient reaches."""
    if tensor.shape == shape:
        return tensor
    rows, columns = (want - has for want, has in zip(shape, tensor.shape))
    return F.pad(tensor, (0, columns, 0, rows))


def _compare_logits(
    foreign: Foreign, weights: dict[str, Tensor], ours: Ours, old_ids: Tensor
) -> str:
    """Compare the run's logits with those of transformers on the model that it came from.

    Returns what to print. Raises ExportFailed on a difference beyond rounding."""
    try:
        import transformers
    except ImportError:
        return "logits not compared, which needs the package transformers"
    name = f"transformers {transformers.__version__}"
    try:
        theirs = _llama_in_transformers(foreign, weights, transformers)
    # Of any class. Our own reading succeeded, so that an old release is no reason to stop.
    except Exception as error:
        return f"logits not compared, since {name} cannot build the model ({in_a_line(error)})"
    ids = ours.random_ids()
    with torch.no_grad():
        reference = ours.reference(ids)
        logits = theirs(old_ids[ids]).logits[..., old_ids]
    difference = (logits - reference.logits).abs().max().item()
    # Not "difference > bound": NaN has to fail.
    if not difference <= reference.bound:
        raise ExportFailed(
            f"the run's logits differ from those in {name} by up to {difference:.1e}, but rounding "
            f"explains only {reference.bound:.1e}"
        )
    return (
        f"largest logit difference from {name} {difference:.1e} (largest logit "
        f"{reference.logits.abs().max().item():.1f}, {ids.numel()} tokens)"
    )


def _llama_in_transformers(
    foreign: Foreign, weights: dict[str, Tensor], transformers: Any
) -> "transformers.PreTrainedModel":
    """A foreign Llama as transformers computes it, in fp32 and in eval mode."""
    if foreign.path.name == "config.json":
        # with its own reading of the files, too
        return _in_transformers(foreign.path.parent, transformers)
    config = transformers.LlamaConfig(**foreign.config)
    with quiet(transformers):
        model = transformers.LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights)
    return model.eval()


def _in_transformers(folder: Path, transformers: Any) -> "transformers.PreTrainedModel":
    """The model of a folder in fp32 and in eval mode. ValueError for weights that do not fit."""
    with quiet(transformers):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    # transformers would only warn about them, and draw missing ones at random.
    if wrong:
        raise ValueError(f"weights do not fit: {wrong}")
    return model.eval()


# ---- the run folder ----


def _write_run(
    folder: Path,
    source: Path,
    foreign: Foreign,
    config: "GPTConfig",
    tokenizer: "Tokenizer",
    weights: dict[str, Tensor],
) -> None:
    """A completed run of zero steps, whose final checkpoint has these weights."""
    # Built whole first: rotary tables are no weights, so the file does not hold them.
    model = build(config, "cpu")
    model.load_state_dict(weights)
    tokenizer.save(folder / "tokenizer")
    RunFolder(folder).write_config(_run_config(source, foreign, config, tokenizer))
    # Without an optimizer's state the run can be started from, but not resumed.
    checkpoint.save(folder, 0, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    # The keys are those that training writes: readers of runs need no special case.
    write_summary(
        folder,
        status="completed",
        reason=f"imported from {source}",
        step=0,
        tokens=0,
        total_training_flops=0,
        total_training_time=0.0,
        val_bpb=None,
        min_val_bpb=None,
        core_metric=None,
        core_metric_n=None,
        tok_per_sec=None,
        mfu=None,
        peak_memory_bytes=None,
    )


def _run_config(
    source: Path, foreign: Foreign, config: "GPTConfig", tokenizer: "Tokenizer"
) -> dict[str, Any]:
    """config.json of an imported run."""
    return {
        # The flags of train.py that would give this shape.
        "args": {
            "arch": "llama",
            "tie_embeddings": config.tie_embeddings,
            "depth": config.depth,
            "aspect_ratio": config.width // config.depth,
            "head_dim": config.head_dim,
            "n_kv_head": config.n_kv_head,
            "max_seq_len": config.max_seq_len,
            "window_pattern": "L",
            # that fine-tuning uses if it is given no other
            "optimizer": FLAGS["optimizer"].default,
        },
        "imported_from": str(source),
        "imported": lineage(foreign),
        "model": asdict(config),
        "tokenizer": {
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
        },
        **provenance(),
    }


def lineage(foreign: Foreign) -> dict[str, Any]:
    """What a model was imported from: its kind, and the SHA-256 of every file that was read."""
    return {
        "kind": foreign.kind,
        "sha256": {path.name: sha256_file(path) for path in foreign.files},
    }


# ---- a Hugging Face folder ----


def _write_hf_folder(foreign: Foreign, source: Path, out: Path, named: str) -> None:
    """import_model() to a folder for transformers."""
    if source.is_dir():
        raise UsageError(
            f"--format hf: {source} is a Hugging Face folder already; leave --format out to create "
            "a run from it"
        )
    weights = foreign.weights()
    with new_folder(out) as folder:
        # Releases of transformers before 5 refuse files that do not name their framework.
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
        note, ids = _write_tokenizer(foreign, folder, named)
        fields = {**foreign.config, **ids, "dtype": "float32"}
        write_json(folder / "config.json", fields)
        write_json(folder / "generation_config.json", ids)
        write_json(folder / "imported.json", {"from": str(source), **lineage(foreign)})
        verified = _check_hf_folder(folder, weights)
    for text in (*foreign.notes, note):
        print(f"note: {text}")
    print(f"{verified}; Hugging Face folder of {source} ({foreign.kind}): {out}")


def _write_tokenizer(
    foreign: Foreign, folder: Path, named: str
) -> tuple[str, dict[str, int | None]]:
    """Write the tokenizer's files, if there is one.

    Returns a sentence to print, and the special ids for config.json."""
    n_ids = foreign.config["vocab_size"]
    given = {name: foreign.config.get(name) for name in ("bos_token_id", "eos_token_id")}
    if not named:
        return (
            "the folder has no tokenizer, since the file has none; name one with --tokenizer, or "
            "copy its tokenizer.json there"
        ), given
    path = Path(named)
    if path.is_file():
        return _write_characters(path, folder, n_ids), given
    if (path / "tokenizer.json").exists():
        return _copy_tokenizer(path, folder, n_ids), given
    tokenizer = gpt2_tokenizer() if named == "gpt2" else read_tokenizer(path)
    if tokenizer.vocab_size > n_ids:
        raise _too_many_ids(named, tokenizer.vocab_size, n_ids)
    context = foreign.config.get("n_positions") or foreign.config["max_position_embeddings"]
    require_tokenizers()
    write_tokenizer_files(tokenizer, context, folder)
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": max(tokenizer.end_ids)}
    return f"the tokenizer is {named}'s; it must be the one that trained the model", ends


def _too_many_ids(named: str, found: int, n_ids: int) -> UsageError:
    """The error for a tokenizer that is larger than the model's vocabulary."""
    return UsageError(
        f"--tokenizer {named}: has {found:,} ids, but the model's vocabulary only {n_ids:,}; name "
        "the tokenizer that trained the model"
    )


def _write_characters(path: Path, folder: Path, n_ids: int) -> str:
    """Write tokenizer.json of a meta.pkl; what to print about it."""
    if path.suffix != ".pkl":
        raise UsageError(
            f"--tokenizer {path}: must be a folder with tokenizer.json, a run folder, gpt2, or "
            "the meta.pkl of a character model of nanoGPT; the scores in llama2.c's tokenizer.bin "
            "do not determine the merges of a tokenizer.json exactly"
        )
    characters = read_meta(path)
    if len(characters.tokens) != n_ids:
        raise UsageError(
            f"--tokenizer {path}: has {len(characters.tokens)} characters, but the model "
            f"{n_ids} ids; name the meta.pkl of the model's own data"
        )
    require_tokenizers()
    characters_json(characters).save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False},
    )
    return (
        "the tokenizer is that of the characters; they include no token that begins texts, which "
        "`nanochat evaluate` needs"
    )


def _copy_tokenizer(path: Path, folder: Path, n_ids: int) -> str:
    """Copy the files of a Hugging Face tokenizer; what to print about it."""
    content = read_json(path / "tokenizer.json", "tokenizer")
    try:
        ids = [*content["model"]["vocab"].values()]
        ids += [token["id"] for token in content["added_tokens"]]
        largest = max(ids)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UsageError(f"--tokenizer {path}: its tokenizer.json has no vocabulary") from None
    if largest >= n_ids:
        raise _too_many_ids(str(path), largest + 1, n_ids)
    for name in TOKENIZER_FILES:
        if not (path / name).exists():
            continue
        content = read_json(path / name, "tokenizer")
        if isinstance(content, dict) and "auto_map" in content:
            raise UsageError(f"--tokenizer {path}: {name} names code (auto_map), which never runs")
        write_atomic(folder / name, json.dumps(content, ensure_ascii=False))
    return f"the tokenizer is copied from {path}; it must be the one that trained the model"


def _check_hf_folder(folder: Path, weights: dict[str, Tensor]) -> str:
    """Load the folder in transformers and compare every weight; what to print about it.

    Raises ExportFailed if it cannot be loaded, or has other weights."""
    try:
        import transformers
    except ImportError:
        return "not verified, which needs the package transformers"
    name = f"transformers {transformers.__version__}"
    try:
        model = _in_transformers(folder, transformers)
    # Of any class: a user would meet the same error.
    except Exception as error:
        raise ExportFailed(f"{name} cannot load the folder ({in_a_line(error)})") from error
    loaded = model.state_dict()
    if not all(torch.equal(loaded[key], tensor) for key, tensor in weights.items()):
        raise ExportFailed(f"the weights in {name} differ from those that were written")
    with torch.no_grad():
        finite = torch.isfinite(model(torch.zeros(1, 2, dtype=torch.int64)).logits).all()
    if not finite:
        raise ExportFailed(f"the logits in {name} are not finite")
    return f"verified: {name} loads it, with equal weights"
