"""README.md of an exported folder: what the model is, how it was trained, how to load it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat import __version__
from nanochat.apps.export.fields import MODELING_FILE
from nanochat.apps.export.tokenizer_files import PAD_TEXT, pad_id
from nanochat.common import read_json
from nanochat.data.chat import is_chat
from nanochat.data.tokenizer import TURN_END
from nanochat.run.folder import RunFolder
from nanochat.run.metrics import Record

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder

# A backslash joins two lines: the text of the card does not follow the width of this file.
CARD = """---
{tag}
pipeline_tag: text-generation
---

# {name}

A language model trained with nanochat {version}. {skill}

| | |
| --- | --- |
{table}

{usage}

Settings of the run:

```json
{settings}
```
"""
BASE_SKILL = "It continues text; it was not taught to follow instructions."
CHAT_SKILL = "It was fine-tuned on conversations, and answers in the format of its chat template."
# One card for each --format: how its front matter names the format, and how the model is loaded.
TAGS = {"hf": "library_name: transformers", "gguf": "tags: [gguf]", "html": "tags: [html]"}
# What of a card of hf stands for the folder, or for the repository that it is pushed to.
FOLDER = "FOLDER"
HF_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}"{remote})
model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=True, top_k=50)[0], \
skip_special_tokens=True))
```

The tokenizer puts `{bos}` in front, as the model expects where a document begins; when the model \
draws it, the
document has ended. Text that spells it is plain text to the tokenizer.

To train further, append `tokenizer.eos_token_id` to the ids of each document, so that the model \
learns where to end.
{padding}"""
HF_CHAT_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}"{remote})
model = AutoModelForCausalLM.from_pretrained("{folder}"{remote})
messages = [{{"role": "user", "content": "Who are you?"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, \
return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=100, do_sample=True, top_k=50)
print(tokenizer.decode(answer[0, ids["input_ids"].size(1) :], skip_special_tokens=True))
```

Each answer ends with `{turn_end}`, which is `tokenizer.eos_token`; `{bos}` begins a conversation.
The template takes an optional system message and then messages of user and assistant in turn.
It refuses a message that spells a special token, since that would become one; encode such text
with `split_special_tokens=True`.

To train further, `apply_chat_template(..., return_assistant_tokens_mask=True)` marks what the \
assistant
writes.
{padding}"""
GGUF_USAGE = """With llama.cpp, and with Ollama by the `Modelfile`:

```bash
llama-completion -m model.gguf -p "Once upon a time" -n 100 -no-cnv
ollama create NAME -f Modelfile
```"""
GGUF_CHAT_USAGE = """With llama.cpp, and with Ollama by the `Modelfile`:

```bash
llama-cli -m model.gguf --jinja -p "Who are you?" -n 100
ollama create NAME -f Modelfile
```"""
HTML_USAGE = """Download the file and open it in a browser: the page holds weights and tokenizer, \
and needs no network."""

OWN_PADDING = f"""Padding has a token of its own, `{PAD_TEXT}`, which no text contains: a collator \
that takes padding out of the labels keeps the ends."""
BOS_AS_PADDING = """The vocabulary has no token to spare, so padding is the same token. Take it \
out of the
labels by the attention mask (`labels = ids.masked_fill(attention_mask == 0, -100)`): most \
collators do so
by its id, and would take out the ends as well."""


def model_card(
    run: Path,
    step: int,
    model: "Decoder",
    tokenizer: "Tokenizer",
    dtype: str,
    target: str = "hf",
) -> str:
    """The Markdown text about a run's checkpoint. dtype: of the saved weights. target: a --format.

    Paths lose their folders, which may tell a name. UsageError if the run's files are damaged."""
    config = RunFolder(run).read_config()
    # A table in this order: what it is, what it was trained on, how good it is.
    rows = {
        **_shape_rows(model, tokenizer),
        "weights": dtype,
        "training data": public((config.get("data") or {}).get("name")),
        "training step": f"{step:,}",
        **_effort_rows(model, step, config),
        "held-out bits per byte": _four_decimals(measured(run, step, "val/bpb", "val_bpb")),
    }
    core = measured(run, step, "core_metric", "core_metric")
    # CORE is optional and slow: most runs never measure it.
    if core is not None:
        rows["CORE"] = _four_decimals(core)
    return CARD.format(
        tag=TAGS[target],
        name=run.resolve().name,
        version=__version__,
        skill=CHAT_SKILL if is_chat(tokenizer) else BASE_SKILL,
        table="\n".join(_row(name, value) for name, value in rows.items()),
        usage=_usage(target, model, tokenizer),
        settings=_settings(config),
    )


def _usage(target: str, model: "Decoder", tokenizer: "Tokenizer") -> str:
    """How to load what --format wrote."""
    chat = is_chat(tokenizer)
    if target == "gguf":
        return GGUF_CHAT_USAGE if chat else GGUF_USAGE
    if target == "html":
        return HTML_USAGE
    # A Llama's code is part of transformers; a speedrun model's comes with the folder.
    return (HF_CHAT_USAGE if chat else HF_USAGE).format(
        folder=FOLDER,
        remote="" if model.config.arch == "llama" else ", trust_remote_code=True",
        padding=BOS_AS_PADDING if pad_id(tokenizer) is None else OWN_PADDING,
        bos=tokenizer.bos_text,
        turn_end=TURN_END,
    )


def _row(name: str, value: Any) -> str:
    if value is None:
        value = "not measured at this step"
    return f"| {name} | {value} |"


def _architecture(config: "GPTConfig") -> str:
    if config.arch != "llama":
        return f"nanochat speedrun (its code is in {MODELING_FILE})"
    if config.tie_embeddings:
        return "Llama, head tied to the embedding"
    return "Llama"


def _shape_rows(model: "Decoder", tokenizer: "Tokenizer") -> dict[str, str]:
    config = model.config
    return {
        "architecture": _architecture(config),
        "layers, width": f"{config.depth}, {config.width}",
        "heads": f"{config.n_head} query, {config.n_kv_head} key/value, "
        f"dimension {config.head_dim}",
        "parameters": f"{model.count_parameters()['total']:,}",
        "context": f"{config.max_seq_len} tokens, the length it was trained at",
        "vocabulary": f"{config.vocab_size:,} ({tokenizer.kind})",
    }


def _effort_rows(model: "Decoder", step: int, config: dict[str, Any]) -> dict[str, str | None]:
    """Tokens and FLOPs up to a step. None if config.json has no plan, as that of an import."""
    # The batch size is constant during a run, so the step alone tells the tokens.
    batch_tokens = (config.get("plan") or {}).get("total_batch_tokens")
    if not batch_tokens:
        return {"training tokens": None, "training FLOPs": None}
    n_tokens = step * batch_tokens
    return {
        "training tokens": f"{n_tokens:,}",
        "training FLOPs": f"{n_tokens * model.flops_per_token():.3e}",
    }


def _settings(config: dict[str, Any]) -> str:
    """The flags of the run as JSON."""
    args = config.get("args") or {}
    # out_dir says where somebody's files are, and nothing about the model.
    shown = {name: public(value) for name, value in args.items() if name != "out_dir"}
    return json.dumps(shown, indent=1)


def public(value: Any) -> Any:
    """A setting without the folders of a path, which may tell a name or a home.

    Names of hub data keep their slash."""
    is_path = isinstance(value, str) and "/" in value and not value.startswith("hf:")
    if is_path:
        return os.path.basename(value.rstrip("/"))
    return value


def _four_decimals(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.4f}"


def measured(run: Path, step: int, metric: str, summary_name: str) -> float | None:
    """A number measured at exactly this step; None if there is none.

    metric: its name in metrics.jsonl. summary_name: its name in summary.json, which is asked
    second."""
    # First the file with a line per step: it also knows results of steps before the last.
    found = Record(run / "metrics.jsonl").value_at(step, metric)
    if found is not None:
        return found
    path = run / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path, "run folder")
    # The summary is about the last step; an export of an earlier one must not claim its result.
    if summary.get("step") != step:
        return None
    return summary.get(summary_name)
