"""`nanochat export --format gguf`: the file says what the run is, and llama.cpp computes the same.

The tests of llama.cpp itself need the package xllamacpp, which the others do without."""

import importlib.util
import random
import re
import sys
import types
import unicodedata
from dataclasses import asdict

import pytest
import torch

import nanochat
from nanochat.apps import export
from nanochat.apps.export import gguf_file, llama_cpp, to_gguf
from nanochat.apps.export.tokenizer_files import PAD_TEXT
from nanochat.apps.export.verify import ExportFailed, Ours
from nanochat.common import UsageError
from nanochat.data.tokenizer import (
    GPT2_PATTERN,
    LLAMA_PATTERN,
    SPLIT_PATTERN,
    Tokenizer,
    gpt2_byte_characters,
    train_tokenizer,
)
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.layers import rotate
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"
)

TEXT = "The café sold 12 crêpes — 日本語 too.\r\n\n    def f(x):\n\treturn x  # 🙂 it's don't\n"
LLAMA = {
    "depth": 2,
    "width": 64,
    "head_dim": 16,
    "n_head": 4,
    "n_kv_head": 2,
    "max_seq_len": 48,
    "window_pattern": "L",
    "arch": "llama",
}
TIED = LLAMA | {"tie_embeddings": True, "n_kv_head": 4}
# Rows of 24 weights and heads of 6.
NARROW = LLAMA | {"width": 24, "head_dim": 6}


def tokenizer_of(kind):
    """A small tokenizer; gpt2: with GPT-2's pattern and a few merges."""
    if kind != "gpt2":
        return train_tokenizer(kind, [TEXT], 300)
    merged = [b"th", b"the", b" the", b"e\xcc", b"\xc3\xa9", b"'s", b"12", b"\n\n"]
    return Tokenizer("bpe", [bytes([i]) for i in range(256)] + merged, GPT2_PATTERN)


def make_run(folder, shape, kind="byte"):
    """A run folder as training leaves it, of a model with noise on every weight."""
    tokenizer = tokenizer_of(kind)
    model = build(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), "cpu", seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder.mkdir()
    RunFolder(folder).write_config(
        {"args": {"depth": shape["depth"]}, "model": asdict(model.config)}
    )
    tokenizer.save(folder / "tokenizer")
    checkpoint.save(folder, 7, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    return folder


def exported(run, out, *flags):
    """The folder that the command writes."""
    assert export.main([str(run), str(out), "--format=gguf", *flags]) == 0
    return out


@pytest.fixture
def without_llama_cpp(monkeypatch):
    # An entry of None makes the import fail.
    monkeypatch.setitem(sys.modules, "xllamacpp", None)


# ---- the file ----


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
@pytest.mark.parametrize("shape", [LLAMA, TIED], ids=["grouped", "tied"])
def test_the_file_describes_the_run(tmp_path, capsys, without_llama_cpp, kind, shape):
    run = make_run(tmp_path / "d2", shape, kind)
    out = exported(run, tmp_path / "out")
    assert "not verified with llama.cpp (pip install xllamacpp" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "model.gguf"]
    modelfile = (out / "Modelfile").read_text()
    assert "FROM ./model.gguf" in modelfile and "PARAMETER num_ctx 48" in modelfile
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile
    card = (out / "README.md").read_text()
    assert card.startswith("---\ntags: [gguf]\n") and "-m model.gguf" in card
    reader = gguf.GGUFReader(out / "model.gguf")
    tokenizer = tokenizer_of(kind)
    expected = {
        "general.architecture": "llama",
        "general.name": "d2",
        "general.file_type": 0,
        "llama.vocab_size": tokenizer.vocab_size,
        "llama.context_length": 48,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 192,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": shape["n_kv_head"],
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.bos,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) == (not shape.get("tie_embeddings", False))
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(tokens) == len(set(tokens)) == tokenizer.vocab_size
    control = {tokens[i] for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL}
    pad = reader.get_field("tokenizer.ggml.padding_token_id")
    assert control == {tokenizer.bos_text} | (set() if pad is None else {PAD_TEXT})
    assert (pad is None) == (kind == "char")


@pytest.mark.parametrize(
    "dtype, kind, error",
    [("float32", "F32", 0), ("bfloat16", "BF16", 2e-3), ("q8_0", "Q8_0", 4e-3)],
)
def test_dtypes_round_the_matrices_alone(tmp_path, without_llama_cpp, dtype, kind, error):
    run = make_run(tmp_path / "run", LLAMA)
    path = exported(run, tmp_path / "out", f"--dtype={dtype}") / "model.gguf"
    model, _ = nanochat.load(run)
    weights = model.state_dict()
    for name, tensor in gguf_file.read_gguf(path, weights, model.config).weights.items():
        bound = error if tensor.dim() == 2 else 0
        torch.testing.assert_close(tensor, weights[name], atol=bound, rtol=0)
    kinds = {
        t.tensor_type.name for t in gguf.GGUFReader(path).tensors if t.name.endswith("q.weight")
    }
    assert kinds == {kind}


def test_heads_are_ordered_as_llama_cpp_turns_them():
    rows = torch.arange(12.0)[:, None]
    turned = gguf_file.interleaved(rows, 2)
    assert turned[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(gguf_file.in_halves(turned, 2), rows)
    # As llama.cpp does it: channels 2i and 2i + 1 are the pair i.
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(1, 1, 1, 6, generator=generator)
    angles = torch.randn(1, 3, generator=generator)
    ours = rotate(head, angles.cos(), angles.sin()).view(6, 1)
    pairs = torch.view_as_complex(gguf_file.interleaved(head.view(6, 1), 1).view(3, 2))
    theirs = torch.view_as_real(pairs * torch.polar(torch.ones(3), angles[0])).view(6, 1)
    torch.testing.assert_close(theirs, gguf_file.interleaved(ours, 1))


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_merges_build_the_tokens_from_bytes(kind):
    """Byte-pair encoding as llama.cpp does it, on words that the pre-tokenizer leaves whole."""
    tokenizer = tokenizer_of(kind)
    vocabulary = gguf_file.vocabulary_of(tokenizer)
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(vocabulary.merges)}
    character = {byte: c for c, byte in gpt2_byte_characters().items()}
    for word in ("the", " the", "café", "日本語", "🙂", "\n\n", "crêpes", "x", "é日é"):
        if kind == "char" and not set(word.encode()) <= set(b"".join(tokenizer.tokens)):
            continue
        parts = [character[byte] for byte in word.encode()]
        while pairs := [p for p in zip(parts[:-1], parts[1:]) if p in ranks]:
            place = list(zip(parts[:-1], parts[1:])).index(min(pairs, key=ranks.get))
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        assert [vocabulary.tokens.index(part) for part in parts] == tokenizer.encode(word)


# ---- what is refused ----


@pytest.mark.parametrize(
    "shape, kind, flags, message",
    [
        (LLAMA | {"arch": "speedrun"}, "byte", [], "run is a speedrun model, .* --arch=llama"),
        (LLAMA, "bpe", [], "no pre-tokenizer of llama.cpp .* next run with --tokenizer=bpe-llama"),
        (NARROW, "byte", ["--dtype=q8_0"], r"--dtype q8_0: .* embedding.weight have 24; use float"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, shape, kind, flags, message):
    run = make_run(tmp_path / "run", shape, kind)
    with pytest.raises(UsageError, match=message):
        exported(run, tmp_path / "out", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_sources_and_flags_are_refused(tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a Hugging Face folder; create a run .* --format run"):
        exported(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(UsageError, match="--dtype q8_0: works only with --format gguf"):
        export.main([str(tmp_path), str(tmp_path / "out"), "--dtype=q8_0"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="pip install gguf"):
        exported(tmp_path / "hf", tmp_path / "out")


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", LLAMA)
    monkeypatch.setattr(gguf_file, "in_halves", lambda tensor, n_heads: tensor)
    assert export.main([str(run), str(tmp_path / "out"), "--format=gguf"]) == 1
    assert "read back, the file holds other weights" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch):
    def fails(self):
        # As numpy words it.
        raise OSError("1024 requested and 0 written")

    run = make_run(tmp_path / "run", LLAMA)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fails)
    with pytest.raises(nanochat.common.Unavailable, match="out cannot be written .*0 written"):
        exported(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- llama.cpp's answers ----


def correct(asked, model, tokenizer):
    """What llama.cpp should answer."""
    ids = [[tokenizer.bos, *tokenizer.encode(text)] for text in asked.texts]
    ours = Ours(model, tokenizer)
    new_ids = [ours.greedy(prompt, asked.n_new) for prompt in asked.prompts]
    return llama_cpp.Answered(ids, new_ids, [])


def other_ids(answered):
    answered.ids[3][-1] += 1


def unlikely_token(answered):
    answered.new_ids[0][5] = (answered.new_ids[0][5] + 100) % 256


def ends_early(answered):
    answered.new_ids[1][5:] = []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda answered: None, None),
        (other_ids, "reads other token ids"),
        (unlikely_token, "logit is .* below nanochat's largest"),
        (ends_early, "ends after 5 of 24 tokens without drawing one that ends a text"),
    ],
)
def test_answers_of_llama_cpp_are_compared(tmp_path, monkeypatch, change, message):
    model, tokenizer = nanochat.load(make_run(tmp_path / "run", LLAMA))

    def answers(asked, name):
        answered = correct(asked, model, tokenizer)
        change(answered)
        return answered

    monkeypatch.setitem(sys.modules, "xllamacpp", types.SimpleNamespace(__version__="0"))
    monkeypatch.setattr(llama_cpp, "_answers", answers)
    arguments = (tmp_path / "model.gguf", model, tokenizer, "float32")
    if message:
        with pytest.raises(ExportFailed, match=message):
            llama_cpp.verify_with_llama_cpp(*arguments)
    else:
        assert "same 48 greedy tokens" in llama_cpp.verify_with_llama_cpp(*arguments)


@needs_llama_cpp
@pytest.mark.parametrize(
    "shape, kind, dtype, said",
    [
        (LLAMA | {"max_seq_len": 512}, "gpt2", "float32", r"same [234]\d\d greedy tokens"),
        (TIED, "char", "float32", "greedy tokens"),
        (LLAMA, "bpe-llama", "float32", "same 48 greedy tokens"),
        (NARROW, "byte", "bfloat16", "greedy tokens"),
        (LLAMA, "byte", "q8_0", "greedy tokens"),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path, capsys, shape, kind, dtype, said):
    run = make_run(tmp_path / "run", shape, kind)
    exported(run, tmp_path / "out", f"--dtype={dtype}")
    printed = capsys.readouterr().out
    assert re.search(rf"; verified with llama.cpp \(.*\): .*{said}", printed)


def difficult_texts(n, seed):
    """Texts of every kind of character, with what the patterns treat in a special way."""
    generator = random.Random(seed)
    known = unicodedata.ucd_3_2_0
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    assigned = [chr(c) for c in points if known.category(chr(c)) not in ("Cn", "Co")]
    pools = [
        [
            "'s",
            "'S",
            "'RE",
            "'Ll",
            "'\u017f",
            "DON'T",
            "we'Ve",
            "'",
            "\u2019s",
            "a",
            "Z",
            "e\u0301",
        ],
        [
            "\r\n",
            "\n",
            "\n\n",
            "\r",
            "    ",
            "\t",
            "\u00a0",
            "!\n",
            "?!\r\n\r\n",
            " \n",
            "\u0085",
            ".",
        ],
        list("0123456789 abc,"),
        [chr(c) for c in range(0x1F300, 0x1F650)] + ["\u200d", "\ufe0f"],
        [chr(c) for c in range(0x4E00, 0x4F00)] + [chr(c) for c in range(0x3040, 0x30FF)],
        [c for c in assigned if unicodedata.category(c)[0] == "M"],
        [c for c in assigned if unicodedata.category(c)[0] == "N"],
        [c for c in assigned if c.isspace()],
        assigned,
    ]
    lengths = [generator.randint(1, 40) for _ in range(n)]
    return ["".join(generator.choice(generator.choice(pools)) for _ in range(k)) for k in lengths]


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("pattern", [LLAMA_PATTERN, GPT2_PATTERN])
def test_llama_cpp_splits_ten_thousand_random_texts_alike(tmp_path, pattern):
    import rustbpe

    # Merges that were learnt across all borders of words, so that every split changes ids.
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(difficult_texts(2000, 5), 4000, pattern=r"[\s\S]{1,20}")
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    tokenizer = Tokenizer("bpe", [token for _, token in ranks], pattern)
    model = build(GPTConfig(vocab_size=tokenizer.vocab_size, **NARROW), "cpu", seed=1)
    saved = gguf_file.Saved(model.state_dict(), gguf_file.vocabulary_of(tokenizer))
    path = tmp_path / "model.gguf"
    gguf_file.write_gguf(path, "name", saved, model.config, "float32")
    texts = difficult_texts(10_000, 1)
    found = llama_cpp._answers(llama_cpp.Asked(path, 48, texts, [], 1, []), "llama.cpp")
    for text, ids in zip(texts, found.ids, strict=True):
        assert ids == [tokenizer.bos, *tokenizer.encode(text)], ascii(text)


@needs_llama_cpp
@pytest.mark.parametrize(
    "wrong, dtype",
    [("heads", "float32"), ("heads", "q8_0"), ("pre-tokenizer", "float32"), ("file", "float32")],
)
def test_what_llama_cpp_computes_differently_is_not_kept(
    tmp_path, monkeypatch, capsys, wrong, dtype
):
    run = make_run(tmp_path / "run", LLAMA, "bpe" if wrong == "pre-tokenizer" else "byte")
    if wrong == "heads":
        monkeypatch.setattr(gguf_file, "_heads_turned", lambda name, config: 0)
        message = "below nanochat's largest"
    elif wrong == "pre-tokenizer":
        monkeypatch.setitem(gguf_file.PRE_TOKENIZERS, SPLIT_PATTERN, "gpt-2")
        message = "reads other token ids"
    else:
        monkeypatch.setattr(to_gguf, "write_gguf", lambda path, *rest: path.write_bytes(b"no"))
        monkeypatch.setattr(to_gguf, "read_gguf", lambda *_: right_file(run))
        message = "cannot run the exported file"
    flags = ["--format=gguf", f"--dtype={dtype}"]
    assert export.main([str(run), str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def right_file(run):
    """What a correct file of the run would hold."""
    model, tokenizer = nanochat.load(run)
    return gguf_file.Saved(model.state_dict(), gguf_file.vocabulary_of(tokenizer))
