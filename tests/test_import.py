"""`nanochat export --from`: models of other programs compute here what they compute there.

Each is written with random weights, and compared with transformers or with plain code below."""

import json
import math
import pickle
import random
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import nanochat
import train
from nanochat.__main__ import main as nanochat_main
from nanochat.apps import export, runs
from nanochat.apps.export.foreign_tokenizer import GPT2_AS_PUBLISHED, read_renumbered
from nanochat.apps.export.nanogpt import read_meta
from nanochat.common import UsageError, sha256_file
from nanochat.data.tokenizer import BOS_OF_PATTERN, train_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

EVALUATE_NOTHING = ["--eval-every=-1", "--sample-every=-1"]
TEXT = "The café sold 12 crêpes, 3456 in all.\r\n\n    def f(x):\n\t\treturn x  # it's don't\n"


def imported(source, out, *flags):
    """The exit code of an import."""
    return export.main(["--from", str(source), "--out", str(out), *flags])


def refused(source, out, match, *flags):
    """An import fails with that message, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UsageError, match=match):
        imported(source, out, *flags)
    assert sorted(out.parent.iterdir()) == before


def noisy(shape, seed):
    """Random numbers of a size that makes logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(shape, generator=generator)


def random_ids(vocab_size, n=2, length=20):
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(5))


def same(ours, theirs):
    """Whether logits are equal up to rounding, and large enough to tell."""
    return (ours - theirs).abs().max() <= 1e-5 and theirs.abs().max() > 0.3


# ---- Hugging Face ----


def foreign_tokenizer(vocab_size=330):
    """A byte-level tokenizer as another program trains it: special tokens first, GPT-2's pieces."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator([TEXT * 3], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def hf_llama(folder, n_unused=3, **settings):
    """A folder with a Llama of random weights; returns the model."""
    tokenizer = foreign_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
    }
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + n_unused, bos_token_id=0, eos_token_id=2, **shape | settings
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(noisy(parameter.shape, i) + (parameter.dim() == 1))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-5, "intermediate_size": 64, "num_key_value_heads": 4},
        {"rms_norm_eps": 0.03, "head_dim": 8, "num_key_value_heads": 1},
        {"rms_norm_eps": 0.03, "tie_word_embeddings": True, "hidden_size": 40},
    ],
    ids=str,
)
def test_a_llama_of_transformers_computes_the_same(tmp_path, settings, capsys):
    theirs = hf_llama(tmp_path / "hf", **settings)
    assert imported(tmp_path / "hf", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "logit difference from transformers" in said
    assert ("filled with zeros" in said) == (settings.get("intermediate_size") != 64)
    ours, tokenizer = nanochat.load(tmp_path / "run", dtype="float32", device_type="cpu")
    # what the ids were, found by text and name alone
    old = read_renumbered(tmp_path / "hf", ours.config.vocab_size).old_ids
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, "日本語 \U0001f642 12 345"):
        expected = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert old[torch.tensor(tokenizer.encode(text))].tolist() == expected
    names = {"<s>": tokenizer.bos, "</s>": tokenizer.special_ids["<|end_s|>"]}
    for name, i in names.items():
        assert old[i] == hf_tokenizer.convert_tokens_to_ids(name)
    assert sorted(old.tolist()) == list(range(ours.config.vocab_size))
    ids = random_ids(ours.config.vocab_size)
    with torch.no_grad():
        assert same(ours(ids), theirs(old[ids]).logits[..., old])


def test_several_files_and_old_tables_are_read(tmp_path):
    theirs = hf_llama(tmp_path / "hf")
    weights = theirs.state_dict()
    (tmp_path / "hf" / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        part = {name: weights[name].bfloat16() for name in weights if where[name] == file}
        save_file(part, tmp_path / "hf" / file)
    index = {"weight_map": where}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert imported(tmp_path / "hf", tmp_path / "run") == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["imported"]
    assert recorded["sha256"]["model-1.safetensors"] == sha256_file(
        tmp_path / "hf" / "model-1.safetensors"
    )
    assert len(recorded["sha256"]) == 4
    ours = nanochat.load(tmp_path / "run", dtype="float32")[0].state_dict()
    norm = weights["model.norm.weight"].bfloat16().float()
    assert torch.equal(ours["final_norm.weight"], norm)


@pytest.mark.parametrize("flags", [["--n-kv-head=1"], ["--tie-embeddings", "--tokenizer=bpe"]])
def test_a_run_comes_back_equal(tmp_path, flags):
    assert small.run(tmp_path, "--arch=llama", "--num-iterations=1", *EVALUATE_NOTHING, *flags) == 0
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert imported(tmp_path / "hf", tmp_path / "back") == 0
    (before, tokenizer), (after, again) = (
        nanochat.load(tmp_path / name, dtype="float32") for name in ("run", "back")
    )
    # which no layer of a llama has
    unused = {"short_window": 1}
    assert replace(before.config, **unused) == replace(after.config, **unused)
    assert tokenizer.fingerprint == again.fingerprint
    weights = after.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in before.state_dict().items())


def test_every_app_takes_an_imported_run(tmp_path, capsys):
    hf_llama(tmp_path / "hf")
    run = tmp_path / "theirs"
    assert imported(tmp_path / "hf", run) == 0
    assert runs.main([str(tmp_path)]) == 0
    assert "theirs  completed" in capsys.readouterr().out
    data = small.corpus(tmp_path)
    flags = ["--bpb", data, "--eval-tokens=300", "--dtype=float32"]
    assert nanochat_main(["evaluate", str(run), str(tmp_path / "hf"), *flags]) == 0
    said = re.findall(r"bits per byte .*: ([\d.]+), loss ([\d.]+)", capsys.readouterr().out)
    # each with its own tokenizer and ids
    assert len(said) == 2 and said[0] == said[1]
    assert nanochat_main(["sample", str(run), "--prompt=def", "--max-tokens=4"]) == 0
    assert "def" in capsys.readouterr().out
    flags = [
        f"--init-from={run}",
        "--num-iterations=1",
        # two rows of its context, which need not be given
        "--total-batch-size=96",
    ]
    places = [
        data,
        f"--out-dir={tmp_path}",
        "--model-tag=mine",
        "--device-batch-size=2",
        "--no-compile",
    ]
    assert train.run([*flags, *places, *small.BARE]) == 0
    assert small.summary(tmp_path, "mine")["step"] == 1
    chats = [
        [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "b"}]
        for i in range(20)
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    flags = [f"--data={tmp_path / 'chat.jsonl'}", f"--out-dir={tmp_path}", "--model-tag=chat"]
    assert nanochat_main(["sft", str(run), *flags, "--num-iterations=1", "--dry-run"]) == 0


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"intermediate_size": 65}, "intermediate_size is 65; nanochat's llama has 64"),
        ({"rope_theta": 500_000.0}, "rope_theta is 500000.0; nanochat's llama has 10000.0"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'; must be between"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only a llama"),
        ({"vocab_size": 300}, "has ids up to .* vocab_size in config.json is 300"),
    ],
)
def test_what_our_llama_cannot_express_is_refused(tmp_path, settings, match):
    hf_llama(tmp_path / "hf")
    change_json(tmp_path / "hf" / "config.json", **settings)
    refused(tmp_path / "hf", tmp_path / "run", match)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model": {"type": "Unigram"}}, "cannot be read as a tokenizer"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is NFC"),
        ({"decoder": {"type": "Fuse"}}, "decoder is not ByteLevel"),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "add_prefix_space: True",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "splits text in another way",
        ),
    ],
)
def test_tokenizers_that_encode_otherwise_are_refused(tmp_path, change, match):
    hf_llama(tmp_path / "hf")
    change_json(tmp_path / "hf" / "tokenizer.json", **change)
    refused(tmp_path / "hf", tmp_path / "run", match)


@pytest.mark.parametrize("regex", ["", GPT2_AS_PUBLISHED, *BOS_OF_PATTERN])
def test_pieces_of_random_unicode_are_the_same(tmp_path, regex):
    hf_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    if regex:
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
        content["pre_tokenizer"]["use_regex"] = False
        stages = [split | {"invert": False}, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    content["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    found = read_renumbered(tmp_path / "hf", 314)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.no_truncation()
    rng = random.Random(7)
    points = [*range(0xD800), *range(0xE000, 0x30000)]
    for _ in range(400):
        text = "".join(rng.choice([*" \n\t'sdabX1.", chr(rng.choice(points))]) for _ in range(60))
        ids = found.old_ids[torch.tensor(found.tokenizer.encode(text))].tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids, ascii(text)


def test_merges_and_special_tokens_are_checked(tmp_path):
    hf_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    original = path.read_text()
    content = json.loads(original)
    content["model"]["merges"].reverse()
    path.write_text(json.dumps(content))
    refused(tmp_path / "hf", tmp_path / "run", "earlier merges never lead to")
    content = json.loads(original)
    content["added_tokens"][3]["special"] = False
    path.write_text(json.dumps(content))
    refused(tmp_path / "hf", tmp_path / "run", "'<unk>', which is found in text")
    path.unlink()
    refused(tmp_path / "hf", tmp_path / "run", "no tokenizer.json")


# ---- llama2.c ----

SHAPE = {"width": 24, "hidden": 44, "layers": 3, "heads": 4, "kv_heads": 2, "context": 16}


def llama2c_weights(vocab_size, tied, seed=0):
    """{name in its model.py: tensor}, of SHAPE."""
    C, hidden, kv = SHAPE["width"], SHAPE["hidden"], SHAPE["width"] // 2
    shapes = {"table": (vocab_size, C), "norm": (C,)}
    for layer in range(SHAPE["layers"]):
        for name, shape in [
            ("attention_norm", (C,)),
            ("ffn_norm", (C,)),
            ("wq", (C, C)),
            ("wk", (kv, C)),
            ("wv", (kv, C)),
            ("wo", (C, C)),
            ("w1", (hidden, C)),
            ("w2", (C, hidden)),
            ("w3", (hidden, C)),
        ]:
            shapes[f"{name}.{layer}"] = shape
    if not tied:
        shapes["head"] = (vocab_size, C)
    return {
        name: noisy(shape, seed + i) + (len(shape) == 1)
        for i, (name, shape) in enumerate(shapes.items())
    }


def write_llama2c(path, weights, version, group=8):
    """A .bin file of a version. Returns the weights that a reader finds."""
    layers = range(SHAPE["layers"])
    tied = "head" not in weights
    V = len(weights["table"])
    sizes = [SHAPE[name] for name in ("width", "hidden", "layers", "heads", "kv_heads")]

    def stacked(name):
        return [f"{name}.{layer}" for layer in layers]

    attention = stacked("wq") + stacked("wk") + stacked("wv") + stacked("wo")
    mlp = stacked("w1") + stacked("w2") + stacked("w3")
    head = [] if tied else ["head"]
    found = dict(weights)
    if version == 0:
        content = struct.pack("<7i", *sizes, V if tied else -V, SHAPE["context"])
        order = [
            "table",
            *stacked("attention_norm"),
            *attention,
            *stacked("ffn_norm"),
            *mlp,
            "norm",
        ]
        tables = np.zeros(SHAPE["context"] * SHAPE["width"] // SHAPE["heads"], "<f4").tobytes()
        content += b"".join(weights[name].numpy().tobytes() for name in order) + tables
        content += b"".join(weights[name].numpy().tobytes() for name in head)
        path.write_bytes(content)
        return found
    header = struct.pack("<Ii7iBi", 0x616B3432, version, *sizes, V, SHAPE["context"], tied, group)
    content = header.ljust(256, b"\0")
    for name in [*stacked("attention_norm"), *stacked("ffn_norm"), "norm"]:
        content += weights[name].numpy().tobytes()
    for name in ["table", *attention, *mlp, *head]:
        if version == 1:
            content += weights[name].numpy().tobytes()
            continue
        groups = weights[name].view(-1, group)
        scales = groups.abs().amax(1) / 127
        integers = (groups / scales[:, None]).round().to(torch.int8)
        content += integers.numpy().tobytes() + scales.numpy().tobytes()
        found[name] = (integers.float() * scales[:, None]).view(weights[name].shape)
    path.write_bytes(content)
    return found


def llama2c_logits(w, ids):
    """Logits (T, V) of one row of ids (T,): neighbouring channels turn together."""
    D = SHAPE["width"] // SHAPE["heads"]
    angles = torch.outer(torch.arange(len(ids)).float(), 10000 ** (-torch.arange(0, D, 2) / D))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:2], D // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(x.shape)

    x = w["table"][ids]
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for i in range(SHAPE["layers"]):
        h = norm(x, w[f"attention_norm.{i}"])
        q, k, v = ((h @ w[f"{name}.{i}"].T).view(len(ids), -1, D) for name in ("wq", "wk", "wv"))
        q, k = rotated(q), rotated(k)
        heads = []
        for head in range(SHAPE["heads"]):
            shared = head * SHAPE["kv_heads"] // SHAPE["heads"]
            scores = q[:, head] @ k[:, shared].T / math.sqrt(D) + future
            heads.append(scores.softmax(-1) @ v[:, shared])
        x = x + torch.cat(heads, -1) @ w[f"wo.{i}"].T
        h = norm(x, w[f"ffn_norm.{i}"])
        gate = h @ w[f"w1.{i}"].T
        x = x + (gate * gate.sigmoid() * (h @ w[f"w3.{i}"].T)) @ w[f"w2.{i}"].T
    return norm(x, w["norm"]) @ w.get("head", w["table"]).T


@pytest.fixture
def byte_run(tmp_path):
    """A folder with a tokenizer of 257 ids, as a run has one."""
    train_tokenizer("byte", [], 257).save(tmp_path / "bytes" / "tokenizer")
    return tmp_path / "bytes"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c_computes_the_same(tmp_path, byte_run, version, tied, capsys):
    weights = llama2c_weights(257, tied)
    found = write_llama2c(tmp_path / "m.bin", weights, version)
    assert imported(tmp_path / "m.bin", tmp_path / "run", f"--tokenizer={byte_run}") == 0
    said = capsys.readouterr().out
    assert "logit difference from transformers" in said
    assert f"llama2.c, version {version}" in said and ("int8" in said) == (version == 2)
    ours, tokenizer = nanochat.load(tmp_path / "run", dtype="float32", device_type="cpu")
    assert ours.config.tie_embeddings == tied and tokenizer.kind == "byte"
    assert imported(tmp_path / "m.bin", tmp_path / "hf", "--format=hf") == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = random_ids(257, n=1, length=16)
    with torch.no_grad():
        expected = llama2c_logits(found, ids[0])
        assert same(ours(ids)[0], expected) and same(theirs(ids).logits[0], expected)
    recorded = json.loads((tmp_path / "hf" / "imported.json").read_text())
    assert recorded["sha256"] == {"m.bin": sha256_file(tmp_path / "m.bin")}


def test_llama2c_takes_a_tokenizer_of_transformers(tmp_path):
    hf_llama(tmp_path / "other")
    V = len(foreign_tokenizer())
    found = write_llama2c(tmp_path / "m.bin", llama2c_weights(V, True), 1)
    flag = f"--tokenizer={tmp_path / 'other'}"
    assert imported(tmp_path / "m.bin", tmp_path / "hf", "--format=hf", flag) == 0
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert imported(tmp_path / "m.bin", tmp_path / "run", flag) == 0
    ours, tokenizer = nanochat.load(tmp_path / "run", dtype="float32")
    ids = their_tokenizer("def f", add_special_tokens=False)["input_ids"]
    own = tokenizer.encode("def f")
    with torch.no_grad():
        expected = llama2c_logits(found, torch.tensor(ids))
        logits = ours(torch.tensor([own]))[0]
    assert own != ids and same(logits[:, own], expected[:, ids])


def test_llama2c_without_a_tokenizer_of_ours(tmp_path, byte_run):
    write_llama2c(tmp_path / "m.bin", llama2c_weights(300, True), 0)
    refused(tmp_path / "m.bin", tmp_path / "run", "needs a tokenizer.*add --format hf")
    flag = f"--tokenizer={byte_run}"
    refused(tmp_path / "m.bin", tmp_path / "run", "vocab_size is 300.* 257 tokens", flag)
    (tmp_path / "tokenizer.bin").write_bytes(b"\1\0\0\0")
    flag = f"--tokenizer={tmp_path / 'tokenizer.bin'}"
    refused(tmp_path / "m.bin", tmp_path / "run", "no SentencePiece", flag)
    refused(tmp_path / "m.bin", tmp_path / "hf", "tokenizer.bin", flag, "--format=hf")


@pytest.mark.parametrize("version", [0, 1, 2])
def test_damaged_files_of_llama2c_are_refused(tmp_path, version):
    path = tmp_path / "m.bin"
    weights = llama2c_weights(257, False)
    write_llama2c(path, weights, version)
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:200], whole[:20], b""):
        path.write_bytes(content)
        refused(path, tmp_path / "out", "bytes|too short|within its header", "--format=hf")
    write_llama2c(path, {**weights, "norm": torch.full((24,), math.nan)}, version)
    refused(path, tmp_path / "out", "model.norm.weight holds NaN", "--format=hf")
    path.write_bytes(b"\xff" * len(whole))
    refused(path, tmp_path / "out", "not a file of llama2.c", "--format=hf")


def test_other_headers_of_llama2c_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    write_llama2c(path, llama2c_weights(257, True), 2)
    whole = bytearray(path.read_bytes())

    def changed(offset, value):
        copy = bytearray(whole)
        struct.pack_into("<i", copy, offset, value)
        path.write_bytes(copy)

    for offset, value, match in [
        (4, 3, "has version 3"),
        (8, -24, "not a file of llama2.c"),
        (20, 5, "5 query heads"),
        (37, 7, "group size 7"),
        (37, 0, "group size 0"),
        # a scale of the table, behind norms and integers
        (256 + 4 * 24 * 7 + 257 * 24, -1, "scales of model.embed_tokens.weight"),
    ]:
        changed(offset, value)
        refused(path, tmp_path / "out", match, "--format=hf")


# ---- nanoGPT ----

SETTINGS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 65}


def nanogpt_weights(settings, bias):
    """{name in its model.py: tensor}."""
    C = settings["n_embd"]
    weights = {
        "transformer.wte.weight": (settings["vocab_size"], C),
        "transformer.wpe.weight": (settings["block_size"], C),
    }
    modules = {"transformer.ln_f": (C,)}
    for i in range(settings["n_layer"]):
        block = f"transformer.h.{i}."
        modules |= {block + "ln_1": (C,), block + "ln_2": (C,)}
        modules |= {block + "attn.c_attn": (3 * C, C), block + "attn.c_proj": (C, C)}
        modules |= {block + "mlp.c_fc": (4 * C, C), block + "mlp.c_proj": (C, 4 * C)}
    for name, shape in modules.items():
        weights[f"{name}.weight"] = shape
        if bias:
            weights[f"{name}.bias"] = shape[:1]
    weights = {name: noisy(shape, i) for i, (name, shape) in enumerate(weights.items())}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def write_nanogpt(path, weights, bias=False, prefix="", **settings):
    """A ckpt.pt as its train.py saves it."""
    content = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": SETTINGS | {"bias": bias, "dropout": 0.0} | settings,
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    torch.save(content, path)


def nanogpt_logits(w, ids):
    """Logits (T, V) of one row of ids (T,)."""
    C, heads = SETTINGS["n_embd"], SETTINGS["n_head"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    future = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for i in range(SETTINGS["n_layer"]):
        block = f"transformer.h.{i}."
        q, k, v = linear(norm(x, block + "ln_1"), block + "attn.c_attn").split(C, -1)
        parts = zip(*(each.split(C // heads, -1) for each in (q, k, v)), strict=True)
        mixed = [(a @ b.T / math.sqrt(C // heads) + future).softmax(-1) @ c for a, b, c in parts]
        x = x + linear(torch.cat(mixed, -1), block + "attn.c_proj")
        h = linear(norm(x, block + "ln_2"), block + "mlp.c_fc")
        x = x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, block + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias, tied", [(True, True), (False, True), (True, False)])
def test_nanogpt_computes_the_same(tmp_path, bias, tied, capsys):
    weights = nanogpt_weights(SETTINGS, bias)
    saved = dict(weights)
    if bias:
        # of a version for PyTorch 1, and compiled
        saved |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    if not tied:
        weights["lm_head.weight"] = saved["lm_head.weight"] = noisy((65, 24), 99)
    write_nanogpt(tmp_path / "ckpt.pt", saved, bias, prefix="_orig_mod." if bias else "")
    assert imported(tmp_path / "ckpt.pt", tmp_path / "hf", "--format=hf") == 0
    said = capsys.readouterr().out
    assert "with equal weights" in said and "no tokenizer" in said and "gelu_new" in said
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    ids = random_ids(65, n=1, length=16)
    with torch.no_grad():
        assert same(theirs(ids).logits[0], nanogpt_logits(weights, ids[0]))


def test_nanogpt_cannot_be_a_run(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(SETTINGS, False))
    refused(tmp_path / "ckpt.pt", tmp_path / "run", "neither of nanochat's.*--format hf")
    refused(tmp_path, tmp_path / "run", "name the file, .*ckpt.pt")


def test_nanogpt_with_a_tokenizer_is_evaluated(tmp_path, byte_run, capsys):
    settings = SETTINGS | {"vocab_size": 320}
    write_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(settings, True), True, vocab_size=320)
    flags = ["--format=hf", f"--tokenizer={byte_run}"]
    assert imported(tmp_path / "ckpt.pt", tmp_path / "hf", *flags) == 0
    data = small.corpus(tmp_path)
    assert nanochat_main(["evaluate", str(tmp_path / "hf"), "--bpb", data]) == 0
    assert "bits per byte" in capsys.readouterr().out
    write_nanogpt(tmp_path / "small.pt", nanogpt_weights(SETTINGS, True), True)
    refused(tmp_path / "small.pt", tmp_path / "out", "has 257 ids, but the .* only 65", *flags)


def test_characters_of_nanogpt(tmp_path):
    characters = sorted({*"abcdefgh\n é日", *map(chr, range(97, 150))})
    ids = {c: i for i, c in enumerate(reversed(characters))}
    meta = {"vocab_size": len(ids), "stoi": ids, "itos": {i: c for c, i in ids.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    V = len(ids)
    weights = nanogpt_weights(SETTINGS | {"vocab_size": V}, False)
    write_nanogpt(tmp_path / "ckpt.pt", weights, vocab_size=V)
    flags = ["--format=hf", f"--tokenizer={tmp_path / 'meta.pkl'}"]
    assert imported(tmp_path / "ckpt.pt", tmp_path / "hf", *flags) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "dad é\n日 face"
    assert tokenizer(text)["input_ids"] == [ids[c] for c in text]
    assert tokenizer.decode([ids[c] for c in text]) == text
    # another model's
    write_nanogpt(tmp_path / "other.pt", nanogpt_weights(SETTINGS, False))
    refused(tmp_path / "other.pt", tmp_path / "out", "characters, but the model 65 ids", *flags)


class Evil:
    """Runs a function when a pickle of it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_pickles_run_no_code(tmp_path):
    mark = tmp_path / "it_ran"
    weights = nanogpt_weights(SETTINGS, False)
    content = {"model": weights, "model_args": SETTINGS, "x": Evil(mark)}
    torch.save(content, tmp_path / "ckpt.pt")
    match = "could run code .*it names"
    refused(tmp_path / "ckpt.pt", tmp_path / "out", match, "--format=hf")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    refused(tmp_path / "old.pt", tmp_path / "out", "could run code", "--format=hf")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Evil(mark)}))
    with pytest.raises(UsageError, match="could run code"):
        read_meta(tmp_path / "meta.pkl")
    assert not mark.exists()
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert mark.exists(), "the test would not notice"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickle.dumps([1]),
        pickle.dumps({"stoi": {"ab": 0}}),
        pickle.dumps({"stoi": {"a": 1}}),
        pickle.dumps({"stoi": {"a": 0, "b": "1"}}),
        pickle.dumps({"stoi": {"\ud800": 0}}),
        pickle.dumps({"stoi": {"a": 0}})[:-3],
    ],
)
def test_other_files_of_characters_are_refused(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(UsageError, match="meta.pkl"):
        read_meta(tmp_path / "meta.pkl")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"use_rmsnorm": True}, "use_rmsnorm=True, which nanoGPT does not have"),
        ({"n_head": 5}, "n_embd 24 is no multiple"),
        ({"n_layer": 3}, "the weights lack transformer.h.2"),
        ({"n_layer": 1}, "the weights include transformer.h.1"),
        ({"bias": True}, "the weights lack .*bias"),
        ({"block_size": 17}, r"wpe.weight is torch.float32 of shape \[16, 24\]"),
        ({"vocab_size": -1}, "vocab_size is -1; must be a positive"),
        ({"dim": 24}, "a checkpoint of llama2.c"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, change, match):
    write_nanogpt(tmp_path / "ckpt.pt", nanogpt_weights(SETTINGS, False), **change)
    refused(tmp_path / "ckpt.pt", tmp_path / "out", match, "--format=hf")


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    weights = nanogpt_weights(SETTINGS, False)
    write_nanogpt(path, weights)
    whole = path.read_bytes()
    place = whole.index(weights["transformer.wpe.weight"].numpy().tobytes())
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for content in (whole[: len(whole) // 2], whole[:100], b"PK\3\4", b"\x80", b"text", flipped):
        path.write_bytes(content)
        refused(path, tmp_path / "out", "ckpt.pt", "--format=hf")
    weights["transformer.wpe.weight"][3, 4] = math.inf
    write_nanogpt(path, weights)
    refused(path, tmp_path / "out", "wpe.weight holds NaN or infinite", "--format=hf")
    torch.save({"weights": weights}, path)
    refused(path, tmp_path / "out", "no model_args", "--format=hf")


# ---- the command ----


@pytest.mark.parametrize(
    "argv, match",
    [
        (["run", "--from=x", "--out=y"], "--from x: excludes RUN"),
        (["--from=x"], "needs --out"),
        (["--from=x", "--out=y"], "x does not exist"),
        (["--from=text.txt", "--out=y"], "must be a Hugging Face folder"),
        (["--from=x", "--out=y", "--format=gguf"], "works only on a run"),
        (["--from=x", "--out=y", "--step=3"], "--step 3"),
        (["--from=x", "--out=y", "--format=hf", "--dtype=bfloat16"], "--dtype bfloat16"),
        (["--from=x", "--out=y", "--push=z"], "--push z"),
        (["run", "new", "--out=y"], "--out y: works only with --from"),
        (["run", "new", "--tokenizer=y"], "--tokenizer y: works only with --from"),
        (["run"], "needs RUN and OUT"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, monkeypatch, argv, match, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not")
    assert nanochat_main(["export", *argv]) == 2
    assert match in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_folders_that_exist_are_kept(tmp_path, byte_run):
    write_llama2c(tmp_path / "m.bin", llama2c_weights(257, True), 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused(tmp_path / "m.bin", tmp_path / "out", "not an empty folder", f"--tokenizer={byte_run}")
    hf_llama(tmp_path / "hf")
    refused(tmp_path / "hf", tmp_path / "new", "is a Hugging Face folder already", "--format=hf")
    assert load_file(tmp_path / "hf" / "model.safetensors")
