"""`nanochat export`: transformers computes what we compute, token for token, and an import gives
the same weights."""

import contextlib
import json
import logging
import random
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

import nanochat
import train
from nanochat.apps import export, runs
from nanochat.apps.export import fields, to_huggingface
from nanochat.apps.export.model_card import public
from nanochat.apps.export.tokenizer_files import (
    PAD_TEXT,
    pad_id,
    read_tokenizer_json,
    tokenizer_json,
    write_tokenizer_files,
)
from nanochat.apps.export.verify import verify
from nanochat.common import UsageError
from nanochat.data.tokenizer import (
    BOS_TEXT,
    TRAINED_TOKENIZERS,
    read_tokenizer,
    train_tokenizer,
)
from nanochat.eval.generation import generate_ids
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder, status_of
from nanochat.run.metrics import Record

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parent.parent
TEXT = 3 * (
    "The café sold 12 crêpes, 3456 in all — 日本語 too.\r\n\n"
    "    def f(x):\n\t\treturn x  # 🙂 it's don't\n"
)
LLAMA = {
    "depth": 2,
    "width": 24,
    "head_dim": 6,
    "n_head": 4,
    "n_kv_head": 2,
    "max_seq_len": 32,
    "window_pattern": "L",
    "arch": "llama",
}
SPEEDRUN = LLAMA | {
    "arch": "speedrun",
    "depth": 4,
    "window_pattern": "SSL",
    "short_window": 3,
    "key_shift": True,
}
MODELS = {
    "llama": LLAMA,
    "llama_mha": LLAMA | {"n_kv_head": 4},
    "llama_tied": LLAMA | {"tie_embeddings": True},
    "speedrun": SPEEDRUN,
    "speedrun_one": SPEEDRUN | {"depth": 1, "n_kv_head": 4, "width": 12, "key_shift": False},
}


def small_tokenizer(kind):
    return train_tokenizer(kind, [TEXT, "plain words and more plain words"], 300)


def make_run(folder, shape, kind="bpe", step=7, tokenizer=None):
    """A run folder as training leaves it, of a model with noise on every weight."""
    tokenizer = tokenizer or small_tokenizer(kind)
    model = build(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), "cpu", seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = RunFolder(folder)
    folder.path.mkdir()
    folder.write_config(
        {
            "args": {"depth": shape["depth"], "data": "/home/somebody/text.txt"},
            "model": asdict(model.config),
            "plan": {"total_batch_tokens": 256},
            "data": {"name": "/home/somebody/text.txt"},
        }
    )
    tokenizer.save(folder.path / "tokenizer")
    checkpoint.save(folder.path, step, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    metrics = Record(folder.path / "metrics.jsonl")
    metrics.write(step=step, **{"val/bpb": 1.2345})
    metrics.close()
    return folder.path


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory):
    """transformers copies modelling files into a cache when they run: here a throw-away folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE",
            str(tmp_path_factory.mktemp("modules")),
        )
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: (run folder, exported folder)} of every model in MODELS."""
    root = tmp_path_factory.mktemp("export")
    folders = {}
    for name, shape in MODELS.items():
        folders[name] = make_run(root / name, shape), root / f"{name}_hf"
        assert export.main([str(folders[name][0]), "--format", "hf", str(folders[name][1])]) == 0
    return folders


@contextlib.contextmanager
def no_warnings():
    """Every warning of transformers inside fails the test."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [record.getMessage() for record in records]


def load_hf(folder):
    """(model, tokenizer) from a folder, as a user loads it.

    Every warning, and every weight that does not fit, fails the test."""
    options = {}
    if (folder / fields.MODELING_FILE).exists():
        options["trust_remote_code"] = True
    with no_warnings():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    assert not any(report.values()), report
    return model.eval(), tokenizer


def tokens(rows, length, vocab_size, seed=0):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- the model ----


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_our_logits(made, name):
    run, folder = made[name]
    ours, _ = nanochat.load(run)
    theirs, _ = load_hf(folder)
    ids = tokens(2, 32, ours.config.vocab_size)
    with torch.no_grad():
        logits, expected = theirs(ids).logits, ours(ids)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in theirs.parameters()) == ours.count_parameters()["total"]


@pytest.mark.parametrize("name", ["llama", "speedrun"])
def test_labels_give_our_loss_and_gradients(made, name):
    run, folder = made[name]
    ours, _ = nanochat.load(run)
    theirs, _ = load_hf(folder)
    ids = tokens(2, 20, ours.config.vocab_size)
    loss = ours(ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    their_loss = theirs(ids, labels=ids).loss
    their_loss.backward()
    assert abs(loss.item() - their_loss.item()) < 1e-5
    renamed = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        found = renamed[fields.tensor_name(parameter_name, ours.config.arch)].grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_ours_with_and_without_the_cache(made, name):
    run, folder = made[name]
    ours, our_tokenizer = nanochat.load(run)
    theirs, tokenizer = load_hf(folder)
    prompt = tokenizer("def f", return_tensors="pt")
    ids = prompt["input_ids"][0].tolist()
    expected = [
        step[0]
        for step in generate_ids(ours, ids, 40, temperature=0, stop_ids=our_tokenizer.end_ids)
    ]
    for options in ({"use_cache": True}, {"use_cache": False}):
        found = theirs.generate(**prompt, max_new_tokens=40, do_sample=False, **options)[0].tolist()
        assert found == ids + expected
    beams = [
        theirs.generate(
            **prompt, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=use_cache
        ).tolist()
        for use_cache in (True, False)
    ]
    # Beams change rows: what the cache keeps for smear must go with them.
    assert beams[0] == beams[1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_changes_nothing(made, name, use_cache):
    run, folder = made[name]
    ours, our_tokenizer = nanochat.load(run)
    model, tokenizer = load_hf(folder)
    texts = ["def f(x):", "d", "the plain words"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0 and set(batch) == {"input_ids", "attention_mask"}
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": use_cache}
    together = model.generate(**batch, **options)
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        ids = alone["input_ids"][0].tolist()
        n = len(ids)
        with torch.no_grad():
            # without a mask, so that its positions are not counted by one
            logits = model(alone["input_ids"]).logits[0]
            padded = model(**batch).logits[texts.index(text)][-n:]
        torch.testing.assert_close(padded, logits, atol=1e-5, rtol=0)
        expected = model.generate(**alone, **options)[0].tolist()
        steps = generate_ids(ours, ids, 12, temperature=0, stop_ids=our_tokenizer.end_ids)
        assert expected == ids + [step[0] for step in steps]
        assert row[batch["input_ids"].size(1) - n :].tolist()[: len(expected)] == expected


def cache_of(output):
    """The cache that a model returned; transformers 5.24 renamed past_key_values to cache."""
    return output["cache"] if "cache" in output else output["past_key_values"]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_speedrun_cache_may_be_cut_back_and_read_in_pieces(made, name):
    model, _ = load_hf(made["speedrun"][1])
    ids = tokens(2, 20, model.config.vocab_size)
    with torch.no_grad():
        whole = model(ids).logits
        cache = cache_of(model(ids[:, :13], use_cache=True))
        cache.crop(-4)
        pieces = [
            model(ids[:, a:b], **{name: cache}).logits for a, b in ((9, 10), (10, 16), (16, 20))
        ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole[:, 9:], atol=1e-5, rtol=0)


def test_speedrun_refuses_arguments_it_does_not_know(made):
    model, _ = load_hf(made["speedrun"][1])
    ids = tokens(1, 5, model.config.vocab_size)
    with pytest.raises(TypeError, match="does not know kv_cache, token_type_ids"):
        model(ids, token_type_ids=torch.zeros_like(ids), kv_cache=3)
    first, second = (cache_of(model(ids, use_cache=True)) for _ in range(2))
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=first, past_key_values=second)
    with pytest.raises(ValueError, match="cache_position"):
        model(ids, cache_position=torch.arange(1, 6))
    plain = model(ids).logits
    neutral = model(
        ids,
        kv_cache=None,
        inputs_embeds=None,
        output_attentions=False,
        output_hidden_states=False,
        is_causal=True,
        cache_position=torch.arange(5),
    )
    assert torch.equal(neutral.logits, plain)


def test_speedrun_refuses_what_it_would_get_wrong(made):
    model, _ = load_hf(made["speedrun"][1])
    ids = tokens(1, 5, model.config.vocab_size)
    with pytest.raises(ValueError, match="two dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match="its vocabulary cannot be resized"):
        model.resize_token_embeddings(1000)


# ---- the folder ----


def test_folder_of_a_llama_is_plain(made):
    _, folder = made["llama_tied"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000
    assert config["max_position_embeddings"] == 32
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert "lm_head.weight" in load_file(made["llama"][1] / "model.safetensors")
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_model_card_tells_settings_and_results(made):
    for name in ("llama_tied", "speedrun"):
        card = (made[name][1] / "README.md").read_text()
        for part in (
            "1.2345",
            "| training data | text.txt |",
            "1,792",
            "32 tokens, the length it was trained at",
        ):
            assert part in card
        assert ("trust_remote_code" in card) == (name == "speedrun")


def test_bfloat16_halves_the_file_and_verifies(made, tmp_path, capsys):
    run, folder = made["llama"]
    flags = ["--format", "hf", "--dtype=bfloat16", "--step=7"]
    assert export.main([str(run), *flags, str(tmp_path / "half")]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_there_is_never_overwritten(made, tmp_path):
    run, _ = made["llama"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an empty folder"):
        export.main([str(run), str(tmp_path / "out")])
    (tmp_path / "out" / "thesis.txt").unlink()
    # An empty folder is accepted.
    assert export.main([str(run), str(tmp_path / "out")]) == 0


def test_a_difference_is_a_failure_that_leaves_nothing(made, tmp_path, monkeypatch, capsys):
    run, _ = made["speedrun"]
    right = fields.speedrun_fields
    wrong = {"logit_softcap": 14.0}
    monkeypatch.setattr(fields, "speedrun_fields", lambda config: right(config) | wrong)
    assert export.main([str(run), str(tmp_path / "out")]) == 1
    assert "differ" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_verify_says_what_it_compared(made):
    """Without the warning of transformers about texts beyond the context, as the sample is."""
    for name in ("llama", "speedrun"):
        run, folder = made[name]
        with no_warnings():
            said = verify(folder, *nanochat.load(run))
        version = transformers.__version__
        assert said.startswith(f"verified with transformers {version}: largest logit difference")
        assert "greedy generate() as ours over" in said and "of 3 prompts in a batch" in said


DROPS_CACHE = """
def prepare(self, input_ids, **kwargs):
    return {"input_ids": input_ids[:, -1:]}

NanochatSpeedrunForCausalLM.prepare_inputs_for_generation = prepare
"""
IGNORES_MASK = """
seen = NanochatSpeedrunForCausalLM._seen

def see_all(self, window, start, attention_mask, T, device):
    return seen(self, window, start, None, T, device)

NanochatSpeedrunForCausalLM._seen = see_all
"""
RAISES = """
def prepare(self, input_ids, **kwargs):
    return {"input_ids": input_ids, "kv": 1}

NanochatSpeedrunForCausalLM.prepare_inputs_for_generation = prepare
"""


@pytest.mark.parametrize(
    "name, code, message",
    [
        ("cache", DROPS_CACHE, "failed: generate.. in .* differ from nanochat's"),
        (
            "mask",
            IGNORES_MASK,
            "failed: left-padded batched generate.. in .* differ from nanochat's",
        ),
        ("raises", RAISES, "failed: generate.. in .* fails .TypeError: .*kv"),
    ],
)
def test_wrong_generation_fails_the_export(
    made, tmp_path, monkeypatch, capsys, name, code, message
):
    """Each of these models computes the right logits when it is called without padding."""
    right = shutil.copyfile
    original = Path(export.__file__).with_name(fields.MODELING_FILE)

    def copy(source, target, **options):
        right(source, target, **options)
        # transformers copies the exported file once more: only the first copy is changed.
        if source == original:
            with open(target, "a", encoding="utf-8") as file:
                file.write(code)

    monkeypatch.setattr(to_huggingface.shutil, "copyfile", copy)
    assert export.main([str(made["speedrun"][0]), str(tmp_path / name)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["alone", "batch"])
def test_wrong_generation_of_a_llama_fails_the_export(made, tmp_path, monkeypatch, capsys, mode):
    right = transformers.LlamaForCausalLM.generate

    def generate(self, input_ids, **options):
        """Tokens beside the right ones, of one prompt or of a batch."""
        found = right(self, input_ids, **options)
        if (len(input_ids) == 1) == (mode == "alone"):
            found.sequences[:, input_ids.size(1)] += 1
        return found

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", generate)
    assert export.main([str(made["llama"][0]), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert ("left-padded batched" in error) == (mode == "batch") and "prompt of" in error
    assert list(tmp_path.iterdir()) == []


def test_without_transformers_it_says_that_nothing_was_compared(
    made, tmp_path, monkeypatch, capsys
):
    run, _ = made["llama"]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert "not verified" in capsys.readouterr().out and (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--step=8"], "no such checkpoint"),
        (["--step=-3"], "-1 for the newest"),
        (["--format=run", "--step=7"], "has no steps"),
        (["--format=run", "--dtype=bfloat16"], "float32"),
    ],
)
def test_wrong_flags_are_refused(made, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        export.main([str(made["llama"][0]), str(tmp_path / "out"), *flags])
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        export.main([str(tmp_path / "nothing"), str(tmp_path / "out")])
    with pytest.raises(UsageError, match="does not exist"):
        export.main([str(tmp_path / "nothing"), str(tmp_path / "out"), "--format=run"])


@pytest.mark.parametrize(
    "flags", [["--arch=llama", "--n-kv-head=1"], ["--arch=llama", "--tie-embeddings"], []]
)
def test_what_train_leaves_is_exported_and_comes_back(tmp_path, flags, capsys):
    assert small.run(tmp_path, *flags) == 0
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"{small.summary(tmp_path)['val_bpb']:.4f}" in card
    assert '"total_batch_size": 256' in card and "out_dir" not in card
    if flags:
        assert export.main([str(tmp_path / "hf"), str(tmp_path / "back"), "--format=run"]) == 0
        before = small.weights(tmp_path, 12)
        after = small.weights(tmp_path, 0, tag="back")
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# ---- the tokenizer ----


def exported_tokenizer(ours, folder):
    """transformers' tokenizer of one of ours."""
    folder.mkdir(exist_ok=True)
    write_tokenizer_files(ours, 10**9, folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def random_texts(n, seed):
    """Unicode of every kind, the kinds that split words mixed with ones that do not."""
    rng = random.Random(seed)
    kinds = [
        lambda: rng.choice("abcXYZ éß'’"),
        lambda: rng.choice(
            " \t\n\r\x0b\x0c\x85\xa0\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000"
        ),
        lambda: "\r\n",
        lambda: rng.choice("0123456789²Ⅷ٣၃"),
        lambda: chr(rng.randrange(32)),
        lambda: chr(rng.randrange(0x300, 0x370)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FB00)) + rng.choice(["", "\u200d", "\ufe0f"]),
        lambda: rng.choice(".,;:!?()[]{}<>|_-+*/\\#@$%^&~`\"'"),
        lambda: rng.choice(["don't", "I'LL", "we've", "  ", "    ", "\n\n"]),
        lambda: rng.choice([BOS_TEXT, PAD_TEXT, "<|endoftext|>", "<|bos", "bos|>", "\xff"]),
        # all but the surrogates
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
    ]
    texts = ["".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 60))) for _ in range(n)]
    return [*texts, BOS_TEXT, PAD_TEXT, "\xff", "", " ", "\r\n"]


def check_same(ours, theirs, texts):
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text[:200]
        assert theirs(text)["input_ids"] == [ours.bos, *ids]
        assert theirs.decode(ids) == text
    rng = random.Random(3)
    # Also ids that no text gives: cut characters, BOS in the middle.
    pad = pad_id(ours)
    known = [i for i in range(ours.vocab_size) if i != pad]
    for _ in range(200):
        ids = [rng.choice(known) for _ in range(rng.randrange(1, 20))]
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos
    if ours.kind == "char":
        assert theirs.pad_token_id == ours.bos
    else:
        assert theirs.pad_token_id == pad and ours.tokens[pad] == b"\xff"
        assert theirs.decode([pad]) == PAD_TEXT
    assert len(theirs) == ours.vocab_size
    ids = [ours.bos, *ours.encode("a d"), ours.bos]
    assert theirs.decode(ids, skip_special_tokens=True) == "a d"


@pytest.mark.parametrize("kind", TRAINED_TOKENIZERS)
def test_random_unicode_gives_the_same_ids(kind, tmp_path):
    ours = small_tokenizer(kind)
    texts = random_texts(1500 if ours.kind == "bpe" else 300, seed=5)
    if kind == "char":
        known = {token.decode() for token in ours.tokens}
        texts = [TEXT, *("".join(c for c in text if c in known) for text in texts)]
    check_same(ours, exported_tokenizer(ours, tmp_path), texts)


def test_source_files_give_the_same_ids(tmp_path):
    paths = sorted([*ROOT.glob("*.py"), *ROOT.glob("nanochat/*.py"), *ROOT.glob("tests/*.py")])
    files = [path.read_text(encoding="utf-8") for path in paths]
    ours = train_tokenizer("bpe", files, 2000)
    check_same(ours, exported_tokenizer(ours, tmp_path), files)


def test_shared_texts_give_the_same_ids(tmp_path):
    files = [small.SHARED / "tinyshakespeare.txt", small.SHARED / "general_english" / "val.jsonl"]
    if not all(path.exists() for path in files):
        pytest.skip(f"needs the texts in {small.SHARED}, which are on the developers' machine only")
    texts = [path.read_text(encoding="utf-8")[:300_000] for path in files]
    ours = train_tokenizer("bpe", texts, 4096)
    check_same(ours, exported_tokenizer(ours, tmp_path), texts)


def test_gpt2_gives_the_same_ids(tmp_path):
    folder = small.SHARED / "gpt2_bpe"
    if not folder.exists():
        pytest.skip(
            "needs GPT-2's encoder.json and merges.txt, which are on the developers' machine only"
        )
    ours = read_tokenizer(folder)
    theirs = exported_tokenizer(ours, tmp_path)
    check_same(ours, theirs, [*random_texts(1500, seed=6), TEXT, (ROOT / "train.py").read_text()])
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    assert [" ".join(pair) for pair in merges] == [
        line for line in lines if line and not line.startswith("#version")
    ]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "speedrun"])
def test_the_usual_collator_keeps_the_ends_of_documents(made, name):
    """Padding is not the end, and training further learns from both the text and the end."""
    model, tokenizer = load_hf(made[name][1])
    assert model.config.pad_token_id == model.generation_config.pad_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    documents = [
        {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}
        for text in ("def f(x):", "d")
    ]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator(documents)
    for row, document in zip(batch["labels"].tolist(), documents, strict=True):
        ids = document["input_ids"]
        assert row[len(row) - len(ids) :] == ids and row.count(-100) == len(row) - len(ids)
    assert torch.isfinite(model(**batch).loss)


def test_characters_have_no_token_to_spare(tmp_path):
    """The model card says how to train with that."""
    run = make_run(tmp_path / "run", LLAMA, kind="char")
    assert export.main([str(run), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "masked_fill(attention_mask == 0, -100)" in card
    _, tokenizer = load_hf(tmp_path / "hf")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_vocabulary_that_merged_the_byte_pads_with_bos(tmp_path):
    ours = small_tokenizer("bpe")
    ours.tokens[-1] = b"\xff" + ours.tokens[0]
    assert pad_id(ours) is None
    content = json.loads(tokenizer_json(ours, None).to_str())
    assert PAD_TEXT not in content["model"]["vocab"]


def test_folders_of_earlier_versions_come_back(tmp_path):
    """They padded with BOS."""
    ours = small_tokenizer("bpe")
    tokenizer_json(ours, None).save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer_json(tmp_path).fingerprint == ours.fingerprint


def test_unknown_characters_are_refused(tmp_path):
    theirs = exported_tokenizer(small_tokenizer("char"), tmp_path)
    with pytest.raises(Exception, match="UNK"):
        theirs("a character that is not there: Ω")


# ---- from Hugging Face back to a run ----


@pytest.mark.parametrize("name", ["llama", "llama_mha", "llama_tied"])
def test_back_to_a_run_gives_the_same_weights(made, tmp_path, name):
    run, folder = made[name]
    assert export.main([str(folder), "--format", "run", str(tmp_path / "run")]) == 0
    (before, tokenizer), (after, same) = nanochat.load(run), nanochat.load(tmp_path / "run")
    assert before.config == after.config and tokenizer.fingerprint == same.fingerprint
    weights = after.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in before.state_dict().items())
    options = {"temperature": 0, "max_new_tokens": 9}
    expected = nanochat.generate(before, tokenizer, "def", **options)
    assert nanochat.generate(after, same, "def", **options) == expected
    assert status_of(tmp_path / "run") == "completed"
    assert checkpoint.load_optimizer(tmp_path / "run", 0) == {}
    # And exported once more.
    assert export.main([str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (folder / "model.safetensors").read_bytes()


def test_an_imported_run_is_listed_and_started_from_but_not_resumed(made, tmp_path, capsys):
    assert export.main([str(made["llama"][1]), "--format", "run", str(tmp_path / "imported")]) == 0
    assert runs.main([str(tmp_path)]) == 0
    assert "imported  completed" in capsys.readouterr().out
    flags = [
        small.corpus(tmp_path),
        f"--out-dir={tmp_path}",
        "--no-compile",
        "--num-iterations=2",
        "--total-batch-size=256",
        "--max-seq-len=32",
    ]
    assert train.run([*flags, "--model-tag=imported", "--resume"]) == 2
    assert "--init-from=" in capsys.readouterr().err
    assert train.run([*flags, f"--init-from={tmp_path / 'imported'}", "--model-tag=mine"]) == 0
    assert small.summary(tmp_path, "mine")["step"] == 2


def test_the_model_card_names_no_folders(made):
    card = (made["llama"][1] / "README.md").read_text()
    assert "somebody" not in card and "text.txt" in card
    values = ["/home/me/text.txt", "text/*.jsonl", "hf:a/b", "climbmix", 3]
    assert [public(value) for value in values] == ["text.txt", "*.jsonl", "hf:a/b", "climbmix", 3]


@pytest.mark.parametrize("kind", TRAINED_TOKENIZERS)
def test_tokenizers_come_back_whole(kind, tmp_path):
    ours = small_tokenizer(kind)
    # As transformers writes it.
    exported_tokenizer(ours, tmp_path).save_pretrained(tmp_path / "resaved")
    for folder in (tmp_path, tmp_path / "resaved"):
        assert read_tokenizer_json(folder).fingerprint == ours.fingerprint


def test_what_transformers_saves_again_comes_back(made, tmp_path):
    """In several files, in bfloat16, with transformers' own config.json."""
    run, folder = made["llama"]
    model, tokenizer = load_hf(folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    assert export.main([str(tmp_path / "hf"), "--format", "run", str(tmp_path / "run")]) == 0
    before, after = nanochat.load(run)[0], nanochat.load(tmp_path / "run")[0].state_dict()
    assert all(
        torch.equal(tensor.bfloat16().float(), after[key])
        for key, tensor in before.state_dict().items()
    )


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "qwen2"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", 0.0),
        ("rope_theta", 500_000.0),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("intermediate_size", 96),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}),
        ("sliding_window", 16),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500_000.0}),
        ("quantization_config", {"bits": 4}),
        ("num_hidden_layers", "two"),
        ("vocab_size", 301),
        ("num_key_value_heads", 3),
        ("auto_map", {"AutoModel": "evil.Model"}),
    ],
)
def test_other_configs_are_refused_by_name(made, tmp_path, field, value):
    folder = shutil.copytree(made["llama"][1], tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UsageError, match="key/value" if field == "num_key_value_heads" else field):
        export.main([str(folder), "--format", "run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "lack model.norm.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}),
            "q_proj.bias",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(25)}), r"\[25\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}), "int8"),
    ],
)
def test_other_weights_are_refused_by_name(made, tmp_path, change, message):
    folder = shutil.copytree(made["llama"][1], tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UsageError, match=message):
        export.main([str(folder), "--format", "run", str(tmp_path / "run")])


def test_other_files_of_weights_are_refused(made, tmp_path):
    folder = shutil.copytree(made["llama"][1], tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        export.main([str(folder), "--format", "run", str(tmp_path / "run")])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    )
    with pytest.raises(UsageError, match="secret"):
        export.main([str(folder), "--format", "run", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "field, change",
    [
        (
            "pre_tokenizer",
            lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a+)+$"),
        ),
        ("normalizer", lambda t: t.update(normalizer={"type": "NFC"})),
        ("model", lambda t: t["model"]["merges"].reverse()),
        ("added_tokens", lambda t: t["added_tokens"][0].update(lstrip=True)),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path, field, change):
    write_tokenizer_files(small_tokenizer("bpe"), 32, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=field):
        read_tokenizer_json(tmp_path)
