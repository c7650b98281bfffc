"""Exports of models that were fine-tuned on conversations: tokens, template and ends of answers."""

import importlib.util
import json
import sys

import pytest
import torch
from test_export import LLAMA, MODELS, code_cache, make_run, small_tokenizer, transformers

import nanochat
from nanochat.apps import export
from nanochat.apps.export import gguf_file, tokenizer_files
from nanochat.data.chat import CHAT_SPECIALS, JINJA, render, with_chat
from nanochat.data.tokenizer import read_tokenizer

__all__ = ["code_cache"]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"
)
MESSAGES = [
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": " 12 + 34?\n"},
    {"role": "assistant", "content": "46"},
]


def chat_run(folder, shape=LLAMA, kind="bpe"):
    return make_run(folder, shape, tokenizer=with_chat(small_tokenizer(kind)))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "speedrun"])
def test_a_chat_model_is_exported_with_its_format(tmp_path, capsys, name):
    run, out = chat_run(tmp_path / "run", MODELS[name]), tmp_path / "hf"
    assert (run / "tokenizer" / "chat_template.jinja").read_text() == JINJA
    assert export.main([str(run), "--format", "hf", str(out)]) == 0
    assert "same token ids of sample text and of a chat by its template" in capsys.readouterr().out
    assert (out / "chat_template.jinja").read_text() == JINJA
    ours = read_tokenizer(run)
    turn_end = ours.special_ids["<|turn_end|>"]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == JINJA and settings["eos_token"] == "<|turn_end|>"
    assert settings["additional_special_tokens"] == list(CHAT_SPECIALS)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [turn_end, ours.bos]
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == turn_end
    card = (out / "README.md").read_text()
    assert "apply_chat_template" in card and "fine-tuned on conversations" in card


def test_generate_ends_with_the_turn(tmp_path):
    """In a model that draws it first, as ours does there."""
    run, out = chat_run(tmp_path / "run"), tmp_path / "hf"
    assert export.main([str(run), "--format", "hf", str(out)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    batch = tokenizer.apply_chat_template(
        MESSAGES[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        first = theirs(**batch).logits[0, -1].argmax().item()
        swapped = [tokenizer.eos_token_id, first]
        theirs.lm_head.weight[swapped] = theirs.lm_head.weight[swapped[::-1]]
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
    asked, _ = render(read_tokenizer(run), MESSAGES[:-1], generation_prompt=True)
    assert found == [*asked.tolist(), tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["bpe-llama", "char", "byte"])
def test_a_chat_model_comes_back(tmp_path, kind):
    run, out, back = chat_run(tmp_path / "run", kind=kind), tmp_path / "hf", tmp_path / "back"
    assert export.main([str(run), "--format", "hf", str(out)]) == 0
    assert export.main([str(out), "--format", "run", str(back)]) == 0
    assert read_tokenizer(back).fingerprint == read_tokenizer(run).fingerprint
    before, after = nanochat.load(run)[0].state_dict(), nanochat.load(back)[0].state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize(
    "change",
    [
        ("content + '<|turn_end|>'", "content + ' <|turn_end|>'"),
        ("{{- content +", "{{- content | trim +"),
        ("{{- bos_token -}}", ""),
        ("'<|assistant_start|>' -}}\n{%- endif", "'<|turn_end|>' -}}\n{%- endif"),
        # the mask would hold the start of the answer
        (
            "{{- '<|assistant_start|>' -}}\n        {%- generation -%}",
            "{%- generation -%}{{- '<|assistant_start|>' -}}",
        ),
    ],
)
def test_another_template_fails_the_export(tmp_path, monkeypatch, capsys, change):
    run, out = chat_run(tmp_path / "run"), tmp_path / "hf"
    assert change[0] in JINJA
    monkeypatch.setattr(tokenizer_files, "JINJA", JINJA.replace(*change))
    assert export.main([str(run), "--format", "hf", str(out)]) == 1
    assert "the chat template in transformers" in capsys.readouterr().err
    assert not out.exists()


def test_a_template_that_fails_fails_the_export(tmp_path, monkeypatch, capsys):
    run, out = chat_run(tmp_path / "run"), tmp_path / "hf"
    monkeypatch.setattr(tokenizer_files, "JINJA", "{{ raise_exception('no') }}")
    assert export.main([str(run), "--format", "hf", str(out)]) == 1
    assert "the chat template fails in transformers" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# llama.cpp


def test_the_gguf_file_has_the_format(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    run, out = chat_run(tmp_path / "run", kind="byte"), tmp_path / "gguf"
    assert export.main([str(run), "--format", "gguf", str(out)]) == 0
    reader = gguf.GGUFReader(out / "model.gguf")
    read = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = read_tokenizer(run)
    turn_end = tokenizer.special_ids["<|turn_end|>"]
    assert read["tokenizer.chat_template"] == JINJA
    assert read["tokenizer.ggml.bos_token_id"] == tokenizer.bos
    assert read["tokenizer.ggml.eos_token_id"] == read["tokenizer.ggml.eot_token_id"] == turn_end
    tokens, types = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    assert tokens[256:] == ["<|bos|>", *CHAT_SPECIALS]
    control = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    assert control == [0xFF, *range(256, 261)]
    modelfile = (out / "Modelfile").read_text()
    assert 'PARAMETER stop "<|turn_end|>"' in modelfile
    assert (
        "{{ range .Messages }}<|{{ .Role }}_start|>{{ .Content }}<|turn_end|>{{ end }}" in modelfile
    )
    assert "llama-cli" in (out / "README.md").read_text()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["bpe-llama", "char", "byte"])
def test_llama_cpp_reads_a_chat_as_ours(tmp_path, capsys, kind):
    run = chat_run(tmp_path / "run", kind=kind)
    assert export.main([str(run), "--format", "gguf", str(tmp_path / "gguf")]) == 0
    said = capsys.readouterr().out
    assert "verified with llama.cpp" in said and "and of a chat by its template" in said


@needs_llama_cpp
def test_another_template_of_llama_cpp_fails_the_export(tmp_path, capsys, monkeypatch):
    run = chat_run(tmp_path / "run", kind="byte")
    monkeypatch.setattr(gguf_file, "JINJA", JINJA.replace("{{- content +", "{{- content | trim +"))
    assert export.main([str(run), "--format", "gguf", str(tmp_path / "gguf")]) == 1
    assert "reads other token ids than nanochat from a chat" in capsys.readouterr().err
