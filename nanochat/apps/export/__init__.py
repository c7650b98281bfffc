"""`nanochat export`: a run as a Hugging Face folder that transformers loads, and such a folder back as a run.

A llama run becomes a plain Llama folder; a speedrun run also carries its modelling file (modeling_nanochat.py). Data files
are safetensors and JSON, in both directions. The folder is loaded again and compared before it gets its name."""

import argparse
import atexit
import inspect
import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    install_hint,
    new_folder,
    read_json,
    step_argument,
    write_atomic,
    write_json,
)

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.gpt import GPT

TOLERANCE = 1e-5  # of logits in fp32, relative to the largest one
# Sharp models amplify rounding beyond that. What rounding alone does is measured: the same model by two attention backends.
ROUNDING_FACTOR = 4
VERIFY_TOKENS = 512  # per row of the comparison, at most
GENERATED_TOKENS = 16  # per prompt of the comparison, at most
SPEEDRUN_CODE = "modeling_nanochat.py"
TOKENIZER_SAMPLE = (
    "Plain words, then don't and it's; 12 345,67 numbers.\r\n\tdef f(x):\n\n        return x  # blanks   \u00a0 end\n"
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0000\u0007 "
)
# Module of a Llama's block here -> there. Both have a weight and no bias.
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


class ExportFailed(Exception):
    """What was written does not compute what the original computes; nothing was left behind. Exit code 1."""


def build_parser():
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat export",
        allow_abbrev=False,
        description="Write a run as a Hugging Face folder (--format hf), or turn such a folder of a Llama exported here back into a run "
        "(--format run). What was written is loaded and compared before it gets its name. Comparing needs the package "
        "transformers (pip install transformers); without it this is left out, and said.",
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        help="run folder, for example out/d4; with --format run, the Hugging Face folder",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make; it must not exist, or be empty")
    parser.add_argument(
        "--format",
        default="hf",
        choices=("hf", "run"),
        help="what to make: hf, for AutoModelForCausalLM.from_pretrained(OUT) (a speedrun model with "
        "trust_remote_code=True), or run, for the other apps here (default %(default)s)",
    )
    parser.add_argument(
        "--step",
        type=step_argument,
        default=-1,
        metavar="N",
        help="checkpoint by its step, or best: the best by validation (-1: the newest; default %(default)s); for "
        "--format hf",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the saved weights: float32 is lossless, bfloat16 half the size (default %(default)s); for --format hf",
    )
    return parser


def main(argv):
    """Run the app with its arguments (without the app's name); returns the exit code. Raises UsageError."""
    args = build_parser().parse_args(argv)
    problems = []
    if args.step != "best" and args.step < -1:
        problems.append(
            f"--step {args.step}: must be the step of a checkpoint; use -1 for the newest"
        )
    if args.format == "run" and args.step != -1:
        problems.append("--step: belongs to --format hf; a Hugging Face folder has no steps")
    if args.format == "run" and args.dtype != "float32":
        problems.append(
            f"--dtype {args.dtype}: belongs to --format hf; a run's weights are float32"
        )
    if problems:
        raise UsageError("\n".join(problems))
    try:
        if args.format == "hf":
            export_hf(
                Path(args.source),
                Path(args.out),
                None if args.step == -1 else args.step,
                args.dtype,
            )
        else:
            import_hf(Path(args.source), Path(args.out))
    except ExportFailed as error:
        print(f"nanochat export: failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_COMPLETED


# ---- the tokenizer ----


def tokenizer_json(tokenizer):
    """Our tokenizer as a tokenizers.Tokenizer with the same ids; its save() writes tokenizer.json.

    Encoding adds BOS in front; add_special_tokens=False gives what tokenizer.encode() gives."""
    try:
        import tokenizers
    except ImportError:
        raise install_hint("tokenizers", "export") from None
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors

    if tokenizer.kind == "char":
        # looks up one character at a time; an unknown one is an error, since the vocabulary has no <unk> to stand for it
        vocabulary = {token.decode("utf-8"): i for i, token in enumerate(tokenizer.tokens)}
        theirs = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        theirs.decoder = decoders.Fuse()
    else:
        from nanochat.data.tokenizer import gpt2_byte_characters

        character = {byte: c for c, byte in gpt2_byte_characters().items()}
        names = ["".join(character[byte] for byte in token) for token in tokenizer.tokens]
        merges = [
            tuple("".join(character[byte] for byte in part) for part in pair)
            for pair in merges_of(tokenizer)
        ]
        theirs = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
        by_bytes = pre_tokenizers.ByteLevel(
            add_prefix_space=False, trim_offsets=False, use_regex=False
        )
        if tokenizer.kind == "bpe":
            by_bytes = pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"), by_bytes]
            )
        theirs.pre_tokenizer, theirs.decoder = by_bytes, decoders.ByteLevel()
    bos = tokenizer.bos_text
    theirs.add_special_tokens([tokenizers.AddedToken(bos, special=True, normalized=False)])
    assert theirs.token_to_id(bos) == tokenizer.bos
    theirs.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos)]
    )
    return theirs


def merges_of(tokenizer):
    """The pair of byte strings that each token of more than one byte was merged from, in the order of the tokens.

    tiktoken joins any neighbours whose joint bytes are a token, lowest rank first; a list of merges names one pair a
    token. Built from its bytes by the earlier merges alone, a trained token arrives at that pair. UsageError if one does not."""
    from nanochat.data.tokenizer import parts_of

    ranks = {token: i for i, token in enumerate(tokenizer.tokens)}
    pairs = []
    for token in tokenizer.tokens:
        if len(token) > 1:
            pair = parts_of(token, ranks)
            if len(pair) != 2:
                raise UsageError(
                    f"the tokenizer's token {ranks[token]} ({token!r}) is not one merge of two earlier tokens; "
                    "tokenizer.json has no form for that"
                )
            pairs.append(pair)
    return pairs


def write_tokenizer(tokenizer, max_seq_len, folder):
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer_json(tokenizer).save(str(folder / "tokenizer.json"))
    bos = tokenizer.bos_text
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": bos,
            "pad_token": bos,
            "padding_side": "left",
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    write_json(
        folder / "special_tokens_map.json", {"bos_token": bos, "eos_token": bos, "pad_token": bos}
    )


def read_tokenizer(folder):
    """Our tokenizer from a tokenizer.json that tokenizer_json() made. UsageError naming the part that is another."""
    try:
        import tokenizers
    except ImportError:
        raise install_hint("tokenizers", "export") from None
    from nanochat.data.tokenizer import (
        BOS_OF_PATTERN,
        TOKENIZER_KINDS,
        Tokenizer,
        gpt2_byte_characters,
    )

    path = folder / "tokenizer.json"
    read_json(path, "tokenizer")  # for its messages

    def refuse(field, what):
        raise UsageError(
            f"{path}: {field} {what}; only tokenizers that `nanochat export` wrote can be read back"
        )

    try:
        normal = json.loads(
            tokenizers.Tokenizer.from_file(str(path)).to_str()
        )  # in the form of the installed version
        vocabulary = sorted(normal["model"]["vocab"], key=normal["model"]["vocab"].get)
    except Exception as error:  # the package raises plain Exceptions
        raise UsageError(f"{path} cannot be read as a tokenizer ({error})") from None
    stages = (normal["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = stages[0].get("pattern", {}).get("Regex") if stages else None
    kind = "char" if normal["model"]["type"] == "WordLevel" else "bpe" if pattern else "byte"
    if kind == "bpe" and pattern not in BOS_OF_PATTERN:
        refuse("pre_tokenizer", f"splits text by another pattern, {pattern!r}")
    try:
        if kind == "char":
            tokens = [name.encode("utf-8") for name in vocabulary]
        else:
            byte_of = gpt2_byte_characters()
            tokens = [bytes(byte_of[c] for c in name) for name in vocabulary]
        tokenizer = Tokenizer(kind, tokens, pattern) if kind == "bpe" else Tokenizer(kind, tokens)
        expected = json.loads(tokenizer_json(tokenizer).to_str())
    except (UsageError, KeyError, TypeError, ValueError) as error:
        refuse("model", f"is not one of {', '.join(TOKENIZER_KINDS)} as written here ({error})")
    for field in expected:
        if field not in ("truncation", "padding") and normal.get(field) != expected[field]:
            refuse(field, "is another")
    return tokenizer


# ---- a run to Hugging Face ----


def hf_name(name):
    """The name in LlamaForCausalLM of a parameter of our Llama."""
    if name.startswith("blocks."):
        _, i, module = name.removesuffix(".weight").split(".", 2)
        return f"model.layers.{i}.{BLOCK_NAMES[module]}.weight"
    return {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }[name]


def llama_config(config, bos, dtype):
    """config.json of a Llama. Both spellings of the rotary base: releases of transformers before 5 read rope_theta only."""
    from nanochat.model.llama import LLAMA_NORM_EPS, LLAMA_ROPE_BASE, swiglu_width

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": swiglu_width(config.width),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": LLAMA_NORM_EPS,
        "rope_theta": LLAMA_ROPE_BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": LLAMA_ROPE_BASE},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "dtype": dtype,
    }


def speedrun_config(config, bos, dtype):
    """config.json of a speedrun model, for NanochatSpeedrunConfig."""
    from nanochat.model.config import GATE_CHANNELS
    from nanochat.model.gpt import LOGIT_SOFTCAP, ROPE_BASE
    from nanochat.model.layers import NORM_EPS

    module = SPEEDRUN_CODE.removesuffix(".py")
    return {
        "architectures": ["NanochatSpeedrunForCausalLM"],
        "model_type": "nanochat_speedrun",
        "auto_map": {
            "AutoConfig": f"{module}.NanochatSpeedrunConfig",
            "AutoModelForCausalLM": f"{module}.NanochatSpeedrunForCausalLM",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "layer_windows": [
            0 if window > config.max_seq_len else window for window in config.windows()
        ],
        "value_embedding_layers": [i for i in range(config.depth) if config.has_value_embedding(i)],
        "backout_layer": max(0, config.depth // 2 - 1),
        "gate_channels": min(GATE_CHANNELS, config.width),
        "rope_base": ROPE_BASE,
        "norm_eps": NORM_EPS,
        "logit_softcap": LOGIT_SOFTCAP,
        "key_shift": config.key_shift,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "dtype": dtype,
    }


def export_hf(run, out, step, dtype):
    """Write the Hugging Face folder `out` of a run's checkpoint (None: the newest intact one), weights in `dtype`.

    Raises UsageError for an unusable run or `out`, ExportFailed if what was written does not compute the same."""
    import torch
    from safetensors.torch import save_file

    from nanochat import load
    from nanochat.run import loading
    from nanochat.run.folder import RunFolder

    with new_folder(out) as folder:
        if (run / "generation_config.json").exists():
            raise UsageError(
                f"{run} is a Hugging Face folder already; --format run makes a run of it"
            )
        step = loading.step_of(run, step)
        model, tokenizer = load(run, step, device_type="cpu", dtype="float32")
        llama = model.config.arch == "llama"
        weights = {
            name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(weights)  # what bfloat16 rounds off is not the exporter's error
        save_file(
            {
                hf_name(name) if llama else name: tensor.contiguous()
                for name, tensor in weights.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        write_json(
            folder / "config.json",
            (llama_config if llama else speedrun_config)(model.config, tokenizer.bos, dtype),
        )
        write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": tokenizer.bos,
                "pad_token_id": tokenizer.bos,
            },
        )
        write_tokenizer(tokenizer, model.config.max_seq_len, folder)
        if not llama:
            shutil.copyfile(Path(__file__).with_name(SPEEDRUN_CODE), folder / SPEEDRUN_CODE)
        write_atomic(
            folder / "README.md",
            model_card(run, RunFolder(run).read_config(), step, model, tokenizer, dtype),
        )
        verified = verify(folder, model, tokenizer)
    print(f"{verified}; Hugging Face folder of {run} at step {step}: {out}")


def model_card(run, config, step, model, tokenizer, dtype):
    """README.md of the folder: what the model is, what it was trained on, how good it is, how to load it."""
    c, data, plan = model.config, config.get("data") or {}, config.get("plan") or {}
    llama = c.arch == "llama"
    batch = plan.get("total_batch_tokens")
    rows = {
        "architecture": "Llama" + (", head tied to the embedding" if c.tie_embeddings else "")
        if llama
        else f"nanochat speedrun (its code is in {SPEEDRUN_CODE})",
        "layers, width": f"{c.depth}, {c.width}",
        "heads": f"{c.n_head} query, {c.n_kv_head} key/value, dimension {c.head_dim}",
        "parameters": f"{model.count_parameters()['total']:,}",
        "context": f"{c.max_seq_len} tokens, the length it was trained at",
        "vocabulary": f"{c.vocab_size:,} ({tokenizer.kind})",
        "weights": dtype,
        "training data": _public(data.get("name")),
        "training step": f"{step:,}",
        "training tokens": f"{step * batch:,}" if batch else None,
        "training FLOPs": f"{step * batch * model.flops_per_token():.3e}" if batch else None,
        "held-out bits per byte": _shown(measured(run, step, "val/bpb", "val_bpb")),
        "CORE": _shown(measured(run, step, "core_metric", "core_metric")),
    }
    table = "\n".join(
        f"| {name} | {value if value is not None else 'not measured at this step'} |"
        for name, value in rows.items()
        if value is not None or name != "CORE"
    )
    settings = json.dumps(
        {
            name: _public(value)
            for name, value in (config.get("args") or {}).items()
            if name != "out_dir"
        },
        indent=1,
    )
    remote = "" if llama else ", trust_remote_code=True"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {Path(run).resolve().name}

A language model trained with nanochat {_version()}. It continues text; it was not taught to follow instructions.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{remote})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{remote})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=True, top_k=50)[0], skip_special_tokens=True))
```

The tokenizer puts `{tokenizer.bos_text}` in front, as the model expects where a document begins; when the model draws it, the
document has ended. Text that spells it is plain text to the tokenizer.

Settings of the run:

```json
{settings}
```
"""


def _version():
    from nanochat import __version__

    return __version__


def _public(value):
    """A setting without the folders that a path names: they may tell a name or a home. Names of hub data keep their slash."""
    return (
        os.path.basename(value.rstrip("/"))
        if isinstance(value, str) and "/" in value and not value.startswith("hf:")
        else value
    )


def _shown(value):
    return None if value is None else f"{value:.4f}"


def measured(run, step, metric, summary_name):
    """A number measured at exactly this step, from metrics.jsonl or summary.json; None if there is none."""
    from nanochat.run.metrics import Record

    if (found := Record(Path(run) / "metrics.jsonl").value_at(step, metric)) is not None:
        return found
    path = Path(run) / "summary.json"
    summary = read_json(path, "run folder") if path.exists() else {}
    return summary.get(summary_name) if summary.get("step") == step else None


# ---- does it compute the same? ----


def verify(folder: Path, model: "GPT", tokenizer: "Tokenizer") -> str:
    """Load the folder as a user would and compare it with our model and tokenizer.

    Compared are the logits of random ids in fp32, read in one pass and in two parts through the
    cache; what generate() continues greedily, one prompt alone and several padded on the left, with
    our own greedy generation; and the ids of sample text. Returns a sentence to print that names
    what was compared; without transformers it says that nothing was. Raises ExportFailed on a
    difference beyond rounding."""
    import torch

    from nanochat.eval.hf_model import quiet

    # The modelling file is copied into a cache when it runs: for this once not into the user's.
    if "transformers" not in sys.modules and "HF_MODULES_CACHE" not in os.environ:
        os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
    try:
        import transformers
    except ImportError:
        return (
            "not verified: that needs the package transformers (pip install transformers), "
            "then export again"
        )
    options = {"local_files_only": True, "trust_remote_code": model.config.arch != "llama"}
    name = f"transformers {transformers.__version__}"
    with quiet(transformers):
        try:
            theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **options
            )
            their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        except Exception as error:  # whatever it is, a user would meet it too
            raise ExportFailed(
                f"{name} does not load it ({type(error).__name__}: {error}); "
                "releases from 4.57 on do"
            ) from error
        if wrong := {key: list(names) for key, names in report.items() if names}:
            raise ExportFailed(f"{name} reports weights that do not fit: {wrong}")
        with torch.no_grad():
            logits = _compare_logits(theirs.eval(), model, tokenizer, name)
            generated = _compare_generation(theirs, their_tokenizer, model, tokenizer, name)
    _compare_tokenizers(their_tokenizer, tokenizer, name)
    return f"verified with {name}: {logits}; {generated}; same token ids of sample text"


def _random_ids(model, tokenizer):
    """Two rows of random ids, BOS first, as long as the comparison reads."""
    import torch

    n = max(2, min(model.config.max_seq_len, VERIFY_TOKENS))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, n), generator=generator)
    ids[:, 0] = tokenizer.bos
    return ids


def _reference(model, ids):
    """Our logits of ids (B, T), and the largest difference that rounding can explain."""
    found = []
    for backend in ("blocked", "sdpa"):
        for block in model.blocks:
            block.attention.backend = backend
        found.append(model(ids))
    rounding = (found[0] - found[1]).abs().max().item()
    largest = found[0].abs().max().item()
    return found[0], max(TOLERANCE * max(1.0, largest), ROUNDING_FACTOR * rounding)


def _compare_logits(theirs, model, tokenizer, name):
    """Compare logits in one pass and in two parts through the cache; what to print about it."""
    import torch

    ids = _random_ids(model, tokenizer)
    half = ids.size(1) // 2
    logits, bound = _reference(model, ids)
    # transformers 5.24 renamed past_key_values to cache, for arguments and for results
    known = inspect.signature(theirs.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"
    whole = theirs(ids).logits
    first = theirs(ids[:, :half], use_cache=True)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    second = theirs(ids[:, half:], **{argument: cache})
    parts = torch.cat((first.logits, second.logits), dim=1)
    difference = max((logits - found).abs().max().item() for found in (whole, parts))
    largest = logits.abs().max().item()
    if not difference <= bound:  # written so that NaN fails
        raise ExportFailed(
            f"the logits in {name} differ from ours by up to {difference:.1e}; "
            f"rounding explains {bound:.1e} (largest logit {largest:.1f})"
        )
    return (
        f"largest logit difference {difference:.1e} (largest logit {largest:.1f}, "
        f"{ids.numel()} tokens, with and without cache)"
    )


def _compare_generation(theirs, their_tokenizer, model, tokenizer, name):
    """Compare greedy generate(), alone and padded, with ours; what to print about it.

    The logits behind each new token are compared as well: a poor model repeats itself, and its
    tokens alone would say little."""
    from nanochat.eval.generation import generate_ids

    row = _random_ids(model, tokenizer)[0].tolist()
    longest = len(row) // 2
    n_new = min(GENERATED_TOKENS, len(row) - longest)
    prompts = [row[:length] for length in sorted({longest, max(1, longest // 3), 1}, reverse=True)]
    # a context of two tokens leaves one length: the batch then is two equal rows, without padding
    prompts = prompts if len(prompts) > 1 else prompts * 2
    ours = [
        [
            step[0]
            for step in generate_ids(model, prompt, n_new, temperature=0, stop_id=tokenizer.bos)
        ]
        for prompt in prompts
    ]
    counts = []
    for kind, n_rows in (("", 1), ("left-padded batched ", len(prompts))):
        batch = their_tokenizer.pad({"input_ids": prompts[:n_rows]}, return_tensors="pt")
        try:
            found = theirs.generate(
                **batch,
                max_new_tokens=n_new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        except Exception as error:  # whatever it is, a user would meet it too
            raise ExportFailed(
                f"{kind}generate() in {name} fails ({type(error).__name__}: "
                f"{error}); try another release of transformers"
            ) from error
        new_ids = found.sequences[:, batch["input_ids"].size(1) :].tolist()
        counts.append(
            sum(
                _compare_row(
                    ids,
                    [step[i] for step in found.logits],
                    prompts[i],
                    ours[i],
                    model,
                    tokenizer.bos,
                    f"{kind}generate() in {name}",
                )
                for i, ids in enumerate(new_ids)
            )
        )
    return (
        f"greedy generate() as ours over {counts[0]} new tokens of one prompt and, padded on "
        f"the left, over {counts[1]} of {len(prompts)} prompts in a batch"
    )


def _compare_row(new_ids, their_logits, prompt, ours, model, bos, what):
    """Compare what one prompt became with ours; returns how many new tokens were compared."""
    import torch

    new_ids = new_ids[: new_ids.index(bos) + 1] if bos in new_ids else new_ids
    logits, bound = _reference(model, torch.tensor([prompt + new_ids]))
    logits = logits[0, len(prompt) - 1 : -1]
    difference = (torch.stack(their_logits[: len(new_ids)]).float() - logits).abs().max().item()
    if not difference <= bound:  # written so that NaN fails
        raise ExportFailed(
            f"{what} reads a prompt of {len(prompt)} tokens wrongly: its logits "
            f"differ from ours by up to {difference:.1e}; rounding explains "
            f"{bound:.1e}. Try another release of transformers"
        )
    if new_ids == ours:
        return len(ours)
    pairs = enumerate(zip(new_ids, ours, strict=False))
    same = next((i for i, (found, expected) in pairs if found != expected), None)
    # two tokens whose logits differ by rounding only may swap places: what follows is another text
    if same is None or not logits[same, ours[same]] - logits[same, new_ids[same]] <= 2 * bound:
        raise ExportFailed(
            f"{what} continues a prompt of {len(prompt)} tokens with the ids "
            f"{new_ids}; ours are {ours}. Try another release of transformers"
        )
    return same + 1


def _compare_tokenizers(theirs, tokenizer, name):
    """Compare the ids of sample text, and the text of those ids. Raises ExportFailed."""
    sample = TOKENIZER_SAMPLE + tokenizer.bos_text
    if tokenizer.kind == "char":
        known = set(tokenizer.tokens)
        sample = "".join(c for c in sample if c.encode("utf-8") in known)
    expected = tokenizer.encode(sample)
    if (
        theirs(sample, add_special_tokens=False)["input_ids"] != expected
        or theirs(sample)["input_ids"] != [tokenizer.bos, *expected]
        or theirs.decode(expected) != sample
    ):
        raise ExportFailed(f"the tokenizer in {name} gives other ids or another text than ours")


# ---- Hugging Face to a run ----


def llama_from(content, path):
    """The GPTConfig of a Llama's config.json. UsageError naming every field that our Llama does not have."""
    from nanochat.model.config import GPTConfig
    from nanochat.model.llama import LLAMA_NORM_EPS, LLAMA_ROPE_BASE, swiglu_width

    if isinstance(content, dict) and "args" in content:
        raise UsageError(f"{path} is that of a run; --format hf makes a Hugging Face folder of it")
    if not isinstance(content, dict) or content.get("model_type") != "llama":
        kind = content.get("model_type") if isinstance(content, dict) else None
        raise UsageError(f"{path}: model_type is {kind!r}; only a llama can become a run")
    problems = []

    def require(field, holds, wanted):
        if not holds:
            problems.append(f"{path}: {field} is {content.get(field)!r}; {wanted}")

    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    for field in sizes:
        require(
            field,
            type(content.get(field)) is int and content[field] > 0,
            "it should be a positive whole number",
        )
    if problems:
        raise UsageError("\n".join(problems))
    width, heads = content["hidden_size"], content["num_attention_heads"]
    kv_heads, head_dim = (
        content.get("num_key_value_heads") or heads,
        content.get("head_dim") or width // heads,
    )
    require(
        "intermediate_size",
        content["intermediate_size"] == swiglu_width(width),
        f"here it is {swiglu_width(width)} for this width",
    )
    require("hidden_act", content.get("hidden_act", "silu") == "silu", "here it is 'silu'")
    require(
        "rms_norm_eps",
        content.get("rms_norm_eps") == LLAMA_NORM_EPS,
        f"here it is {LLAMA_NORM_EPS}",
    )
    for field in (
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "quantization_config",
        "auto_map",
    ):
        require(field, not content.get(field), "here there is none")
    rope = content.get("rope_parameters") or {
        "rope_theta": content.get("rope_theta")
    }  # releases before 5 write only the latter
    plain = {"rope_type": "default", "rope_theta": LLAMA_ROPE_BASE}
    require("rope_scaling", not content.get("rope_scaling"), "positions are not scaled here")
    require(
        "rope_theta",
        content.get("rope_theta", LLAMA_ROPE_BASE) == LLAMA_ROPE_BASE,
        f"the base here is {LLAMA_ROPE_BASE}",
    )
    require(
        "rope_parameters", isinstance(rope, dict) and plain | rope == plain, f"here it is {plain}"
    )
    if problems:
        raise UsageError("\n".join(problems))
    try:
        return GPTConfig(
            depth=content["num_hidden_layers"],
            width=width,
            head_dim=head_dim,
            n_head=heads,
            n_kv_head=kv_heads,
            vocab_size=content["vocab_size"],
            max_seq_len=content["max_position_embeddings"],
            window_pattern="L",
            arch="llama",
            tie_embeddings=bool(content.get("tie_word_embeddings", False)),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"{path}: {error}") from None


def read_weights(folder):
    """{name: tensor} of model.safetensors, or of the files that model.safetensors.index.json names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists() and index.exists():
        try:
            names = sorted(set(read_json(index, "weights")["weight_map"].values()))
            outside = [
                name
                for name in names
                if name != os.path.basename(name) or not name.endswith(".safetensors")
            ]
        except (KeyError, TypeError, AttributeError):
            raise UsageError(f"{index}: weight_map is not an object of names of files") from None
        if outside:
            raise UsageError(
                f"{index}: weight_map names {outside[0]!r}, which is no safetensors file in this folder"
            )
    weights = {}
    for name in names:
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{folder / name} cannot be read as safetensors ({error}); weights in other formats are not read"
            ) from None
    return weights


def import_hf(source, out):
    """Write the run folder `out` from the Hugging Face folder of a Llama exported here. Weights become fp32.

    Reads safetensors and JSON only. UsageError naming the field or tensor that our Llama does not have."""
    import torch

    from nanochat import load
    from nanochat.model.build import meta_model
    from nanochat.run import checkpoint
    from nanochat.run.folder import RunFolder, provenance, write_summary

    config = llama_from(
        read_json(source / "config.json", "Hugging Face folder"), source / "config.json"
    )
    tokenizer = read_tokenizer(source)
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"{source / 'config.json'}: vocab_size is {config.vocab_size}, and the tokenizer has {tokenizer.vocab_size}"
        )
    theirs = read_weights(source)
    model = meta_model(config)
    wanted = {name: (hf_name(name), tensor.shape) for name, tensor in model.state_dict().items()}
    foreign = set(theirs) - {name for name, _ in wanted.values()}
    for name, shape in wanted.values():
        if name not in theirs:
            raise UsageError(f"{source}: the weights have no {name}")
        if theirs[name].shape != shape or not theirs[name].is_floating_point():
            raise UsageError(
                f"{source}: {name} is {theirs[name].dtype} {list(theirs[name].shape)}, expected numbers of {list(shape)}"
            )
    if foreign:
        raise UsageError(
            f"{source}: the weights hold {sorted(foreign)[0]}, which this architecture does not have"
        )
    weights = {name: theirs[their_name].float() for name, (their_name, _) in wanted.items()}
    with new_folder(out) as folder:
        model.to_empty(device="cpu")
        model.init_weights(0)
        model.load_state_dict(weights)
        tokenizer.save(folder / "tokenizer")
        RunFolder(folder).write_config(
            {
                # the flags that would make this shape
                "args": {
                    "arch": "llama",
                    "tie_embeddings": config.tie_embeddings,
                    "depth": config.depth,
                    "aspect_ratio": config.width // config.depth,
                    "head_dim": config.head_dim,
                    "n_kv_head": config.n_kv_head,
                    "max_seq_len": config.max_seq_len,
                    "window_pattern": "L",
                },
                "imported_from": str(source),
                "model": asdict(config),
                "tokenizer": {
                    "kind": tokenizer.kind,
                    "vocab_size": tokenizer.vocab_size,
                    "fingerprint": tokenizer.fingerprint,
                },
                **provenance(),
            }
        )
        checkpoint.save(folder, 0, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
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
        loaded, _ = load(folder, 0, device_type="cpu", dtype="float32")
        if not all(
            torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items()
        ):
            raise ExportFailed("the run's weights are not those of the folder")
    print(f"verified: weights and tokenizer as in {source}; run folder: {out}")
