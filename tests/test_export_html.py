"""`nanochat export --format html`: the page says what the run is, and computes the same.

Those in a browser need `pip install playwright` and a Chromium, which Debian calls chromium."""

import random
import re
import shutil
from dataclasses import asdict

import pytest
import torch

from nanochat.apps import export
from nanochat.apps.export import to_html
from nanochat.apps.export.llama_cpp import sample_texts
from nanochat.apps.export.packed_weights import GROUP, pack, packed_bytes, unpack
from nanochat.common import UsageError
from nanochat.data.chat import TURN_END, render, with_chat
from nanochat.data.tokenizer import (
    BOS_OF_PATTERN,
    GPT2_PATTERN,
    SPLIT_PATTERN,
    Tokenizer,
    train_tokenizer,
)
from nanochat.eval.generation import (
    choose,
    draw_points,
    generate_ids,
    generate_text,
    text_pieces,
)
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder

TEXT = (
    "The café sold 12 crêpes — 日本語 too.\r\n\n    def f(x):\n\treturn x  # 🙂 it's don't\n"
    "I'll say: 'tis 1234567 o'clock!!\n\n  Then   they left, we'Ve heard.\n"
)
MARKUP = "</script><script>document.title=1</script><!-- &amp; \u2028"
SHAPE = {"width": 48, "head_dim": 12, "n_head": 4, "n_kv_head": 2, "max_seq_len": 40}
SHAPES = {
    # windows, grouped queries, value embeddings, shifted keys
    "speedrun": SHAPE | {"depth": 3, "key_shift": True, "window_pattern": "SL", "short_window": 9},
    # rows of 18 weights: neither groups nor vectors fill them
    "narrow": SHAPE
    | {"depth": 2, "width": 18, "head_dim": 6, "n_head": 3, "n_kv_head": 3, "short_window": 1},
    "llama": SHAPE | {"depth": 2, "arch": "llama", "window_pattern": "L"},
    "tied": SHAPE | {"depth": 1, "arch": "llama", "window_pattern": "L", "tie_embeddings": True},
}


def tokenizer_of(kind):
    """A small tokenizer; kind: of a tokenizer, or a split pattern."""
    if kind not in BOS_OF_PATTERN:
        return train_tokenizer(kind, [TEXT], 300)
    merged = [b"th", b"the", b" the", b"e\xcc", b"\xc3\xa9", b"'s", b"12", b"  ", b"\n\n", b"\n  "]
    return Tokenizer("bpe", [bytes([i]) for i in range(256)] + merged, kind)


def noisy_model(shape, vocab_size):
    """A model with noise on every weight, so that no part of it is left out."""
    model = build(GPTConfig(vocab_size=vocab_size, **shape), "cpu", seed=1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make_run(folder, shape, kind="byte"):
    """A run folder as training leaves it."""
    tokenizer = tokenizer_of(kind)
    model = noisy_model(shape, tokenizer.vocab_size)
    folder.mkdir()
    RunFolder(folder).write_config(
        {"args": {"depth": shape["depth"]}, "model": asdict(model.config)}
    )
    tokenizer.save(folder / "tokenizer")
    checkpoint.save(folder, 7, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    return folder


def exported(run, out, *flags):
    """The page that the command writes."""
    assert export.main([str(run), str(out), "--format=html", *flags]) == 0
    return out.read_text(encoding="utf-8")


def page_of(model, tokenizer, bits=16):
    """A page without the search for bits; the model gets its weights."""
    tensors = to_html.packed_weights(model, bits, bits)
    model.load_state_dict(tensors.unpacked())
    about = {
        "name": "d2",
        "step": 7,
        "parameters": model.count_parameters()["total"],
        "shape": to_html.shape_of(model),
        "tokenizer": to_html.tokenizer_table(tokenizer),
        "group": GROUP,
        "bits": bits,
        "difference": 1e-3,
    }
    return to_html.page_of(about, tensors)


# ---- weights ----


def test_packed_weights_by_hand():
    # the largest of the group decides its scale: 127 steps
    tensor = torch.tensor([[127.0, -1.0, 0.4], [0.0, 63.6, -127.0]])
    content = pack(tensor, 8)
    assert len(content) == packed_bytes(6, 8) == 4 + 32
    assert content[:4] == bytes([0, 0, 128, 63])  # 1.0
    assert list(content[4:10]) == [127, 255, 0, 0, 64, 129]
    assert unpack(content, (2, 3), 8).tolist() == [[127, -1, 0], [0, 64, -127]]
    # two weights a byte below the high plane, the first in the lower half: 2047, -17, 5
    twelve = pack(torch.tensor([2047.0, -17.0, 5.0]), 12)
    assert list(twelve[4:7]) == [127, 254, 0] and list(twelve[36:38]) == [0xFF, 0x05]
    sixteen = pack(torch.tensor([32767.0, -300.0]), 16)
    assert list(sixteen[4:6]) == [127, 254] and list(sixteen[36:38]) == [0xFF, 212]


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 32), (65,)])
def test_rounding_is_half_a_step_of_the_group(bits, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    found = unpack(pack(tensor, bits), shape, bits)
    error = (found - tensor).abs().flatten()
    if bits == 32:
        assert error.max() == 0
    for first in range(0, tensor.numel(), GROUP):
        part = slice(first, first + GROUP)
        step = tensor.flatten()[part].abs().max() / (2 ** (bits - 1) - 1)
        # and the rounding of the scale and of the result to fp32
        assert error[part].max() <= step * 0.5001 + 1e-6
    with pytest.raises(ValueError, match="bytes"):
        unpack(pack(tensor, bits)[:-1], shape, bits)


@pytest.mark.parametrize("bits", [8, 12, 16, 32])
def test_zeros_and_tiny_numbers(bits):
    tensor = torch.zeros(40)
    tensor[35] = 1e-44
    assert unpack(pack(tensor, bits), (40,), bits).abs().max() <= 1e-44


@pytest.mark.parametrize("shape", SHAPES)
def test_small_tensors_stay_in_fp32(shape):
    model = noisy_model(SHAPES[shape], 257)
    tensors = to_html.packed_weights(model, 8, 12)
    bits = {entry["name"]: entry["bits"] for entry in tensors.entries}
    assert (bits["embedding.weight"], bits["blocks.0.mlp.up.weight"]) == (12, 8)
    assert bits.get("head.weight", 12) == 12
    matrices = {name for name in bits if bits[name] < 32}
    exact = model.state_dict().keys() - matrices
    found = tensors.unpacked()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in exact)
    assert all(tensor.dim() == 1 or tensor.numel() < 100 for tensor in map(found.get, exact))


# ---- the page ----


@pytest.mark.parametrize("shape", ["speedrun", "tied"])
def test_the_command(tmp_path, capsys, shape):
    run = make_run(tmp_path / "d2", SHAPES[shape])
    html = exported(run, tmp_path / "new" / "d2.html")
    printed = capsys.readouterr().out
    # 8 bits are not enough, and it is said
    measured = re.findall(
        r"(\d+) bits a weight.*? \(.*?\) change logits by up to (\S+?)[;,]", printed
    )
    assert len(measured) >= 2 and float(measured[0][1]) > 5e-3 >= float(measured[-1][1])
    assert f"page of {run} at step 7: {tmp_path / 'new' / 'd2.html'}" in printed
    about = to_html.about_in(html)
    assert (about["name"], about["step"], about["bits"]) == ("d2", 7, int(measured[-1][0]))
    assert about["tokenizer"]["end_ids"] == [256]
    assert about["shape"]["windows"] == GPTConfig(vocab_size=257, **SHAPES[shape]).windows()
    model = noisy_model(SHAPES[shape], 257)
    weights = to_html.weights_in(html).unpacked()
    ids = torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids)
        model.load_state_dict(weights)
        assert (model(ids) - expected).abs().max() < 1e-2


def test_nothing_of_a_run_can_become_markup(tmp_path):
    tokenizer = Tokenizer("char", [c.encode() for c in sorted(set(MARKUP))])
    model = noisy_model(SHAPES["llama"], tokenizer.vocab_size)
    html = page_of(model, tokenizer)
    tensors = to_html.weights_in(html)
    named = to_html.page_of(to_html.about_in(html) | {"name": MARKUP}, tensors)
    assert to_html.about_in(named)["name"] == MARKUP
    # as many elements as without it
    assert named.count("<") == html.count("<") and named.count("&") == html.count("&")
    assert re.findall(r"@@[A-Z]+@@", html) == []


def test_the_page_may_ask_nobody():
    html = page_of(noisy_model(SHAPES["tied"], 257), tokenizer_of("byte"))
    # the address of SVG's elements is only a name
    assert set(re.findall(r"(?:https?:)//[\w.]+[^\s'\"]*", html)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"\ssrc=|@import|\bimport\(|\bfetch\(|XMLHttpRequest|WebSocket", html) == []
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', html)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "connect-src" not in rules
    assert re.fullmatch(r"'sha256-\S+' 'wasm-unsafe-eval'", rules["script-src"])
    assert re.fullmatch(r"'sha256-\S+'", rules["style-src"])
    assert rules["worker-src"] == "blob:" and rules["img-src"] == "data:"
    # no place where text becomes markup or a program
    assert (
        re.findall(r"(?:inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\(", html) == []
    )
    assert re.findall(r"new Function|<[^>]*\s(?:on\w+|style)=", html) == []
    engine = to_html.ENGINE.read_text(encoding="utf-8")
    assert "</" not in engine and "<!--" not in engine


# ---- tokenizers ----


def test_patterns_in_javascript():
    assert to_html.javascript_pattern(SPLIT_PATTERN) == (
        r"[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,2}| ?[^\s\p{L}\p{N}]+|[\s]*[\r\n][\s]*"
        r"|[\s]+(?![^\s])|[\s]+"
    )
    assert to_html.javascript_pattern(GPT2_PATTERN) == (
        r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+$|[\s]+(?![^\s])|[\s]"
    )


@pytest.mark.parametrize("pattern", [r"(?i:'s)|\p{L}+", r"\p{L}++a", r"a*+", r"\h+", r"a{1,2}+b"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(UsageError, match="a browser cannot split text .* use --format hf"):
        to_html.javascript_pattern(pattern)


def test_classes_are_those_of_the_engine():
    blanks = [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029]
    blanks += [0x202F, 0x205F, 0x3000]
    assert points_of(to_html.character_class(r"\s")) == set(blanks)
    letters = points_of(to_html.character_class(r"\p{L}"))
    assert {ord(c) for c in "aZéßλЖ日あ\U00010400"} <= letters
    assert not letters & ({ord(c) for c in "1 _-²½Ⅷ"} | {0x301})
    assert {ord(c) for c in "1²½Ⅷ٣"} <= points_of(to_html.character_class(r"\p{N}"))


def points_of(ranges):
    """The characters of ranges as JavaScript writes them."""
    found = re.findall(r"\\u\{(\w+)\}-\\u\{(\w+)\}", ranges)
    return {point for low, high in found for point in range(int(low, 16), int(high, 16) + 1)}


# ---- what is refused ----


def test_names_and_flags_that_are_refused(tmp_path):
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for out, flags, message in (
        (tmp_path / "out", [], r"is to be one file; give it a name that ends in \.html"),
        (taken, [], "taken.html exists; name another file"),
        (tmp_path / "x.html", ["--dtype=bfloat16"], "--dtype bfloat16: works only with .* hf and"),
        (tmp_path / "x.html", ["--step=-7"], "--step -7: must be"),
    ):
        with pytest.raises(UsageError, match=message):
            export.main([str(tmp_path), str(out), "--format=html", *flags])
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match="is a Hugging Face folder; create a run from it"):
        export.main([str(tmp_path), str(tmp_path / "x.html"), "--format=html"])
    assert taken.read_text() == "mine" and not (tmp_path / "x.html").exists()


def test_models_that_are_refused(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", SHAPES["tied"])
    out = tmp_path / "x.html"
    command = [str(run), str(out), "--format=html"]
    with monkeypatch.context() as patch:
        patch.setattr(to_html, "LARGEST_PAGE", 1000)
        with pytest.raises(UsageError, match="the page may have .*, and browsers may not open"):
            export.main(command)
    with monkeypatch.context() as patch:
        patch.setattr(to_html, "BOUND", 1e-9)
        assert export.main(command) == 1
    assert "no variant keeps the logits within 1e-09 of fp32's" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(to_html, "page_of", lambda about, tensors: other_weights(about, tensors))
        assert export.main(command) == 1
    assert "read back, the page holds other weights" in capsys.readouterr().err
    assert not out.exists()


def other_weights(about, tensors):
    """A page whose last weight is wrong."""
    content = tensors.content[:-1] + bytes([tensors.content[-1] ^ 1])
    return PAGE_OF(about, to_html.Tensors(tensors.entries, content))


PAGE_OF = to_html.page_of


def test_damaged_weights_are_refused():
    model = noisy_model(SHAPES["tied"], 257)
    with torch.no_grad():
        model.embedding.weight[3] = float("nan")
    with pytest.raises(UsageError, match="not numbers"):
        to_html.own_text(model, 256)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        # containers lack what its sandbox needs
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def computed(browser, html, body, given, without_wasm=False):
    """What the engine of a page computes: the body of a function of about, parts and given."""
    # not allowed within a function with such an argument
    engine = to_html.ENGINE.read_text(encoding="utf-8").replace('"use strict";', "", 1)
    parts = re.findall(r'<script [^>]*class="weights">(.*?)</script>', html)
    page = browser.new_page()
    try:
        disabled = "delete globalThis.WebAssembly;" if without_wasm else ""
        return page.evaluate(
            f"({{about, parts, given}}) => {{ {disabled} {engine}\n{body} }}",
            {"about": to_html.about_in(html), "parts": parts, "given": given},
        )
    finally:
        page.close()


LOGITS = """
const model = new Model(about, joined(parts, about.weight_bytes).buffer);
const ids = given;
const first = ids.map((id) => Array.from(model.step(id, true)));
// again from the middle, as after an edit
model.cut(20);
for (const id of ids.slice(20, -1)) model.step(id, false);
return {first, again: Array.from(model.step(ids.at(-1), true)), fast: model.arena.dot4 !== null};
"""


@pytest.mark.browser
@pytest.mark.parametrize("bits, without_wasm", [(8, False), (12, False), (12, True), (16, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_in_the_browser(browser, shape, bits, without_wasm):
    model = noisy_model(SHAPES[shape], 257)
    ids = torch.randint(257, (1, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        fp32 = model(ids)[0]
        html = page_of(model, tokenizer_of("byte"), bits)
        expected = model(ids)[0]
    found = computed(browser, html, LOGITS, ids[0].tolist(), without_wasm)
    assert found["fast"] == (not without_wasm)
    logits = torch.tensor(found["first"])
    assert (logits - expected).abs().max() < 1e-4
    assert (torch.tensor(found["again"]) - expected[-1]).abs().max() < 1e-4
    if bits == 16:
        assert (logits - fp32).abs().max() < 1e-2


def difficult_texts(tokenizer):
    """Random Unicode, newer letters included, and runs that meet the limits of patterns."""
    texts = sample_texts(tokenizer)
    if tokenizer.kind == "char":
        return texts
    generator = random.Random(1)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts += ["".join(map(chr, generator.choices(points, k=200))) for _ in range(50)]
    common = " \n\r\t'sdmtLlVvRrEe019aZ.,!\u00a0\u0085\ufeff\u200b\u3000é日"
    texts += ["".join(generator.choices(common, k=60)) for _ in range(300)]
    return [*texts, "", " " * 5000, "\n" * 3000, "a" * 4000, "1" * 999, " \n" * 2000, "é" * 999]


IDS = """
const tokenizer = new Tokenizer(about.tokenizer);
const reader = (ids) => {
  const decoder = tokenizer.decoder();
  const texts = ids.map((id) => decoder.decode(tokenizer.bytes[id], {stream: true}));
  return texts.join("") + decoder.decode();
};
const ids = given.texts.map((text) => tokenizer.encode(text));
const lone = given.lone ? tokenizer.encode("a\\ud800b\\udc00\\ud83d\\ude42") : null;
return {ids, texts: given.ids.map(reader), lone};
"""


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["bpe", "char", "byte", *BOS_OF_PATTERN])
def test_ids_in_the_browser(browser, kind):
    # names of special tokens are plain text in a text, and shown when they are drawn
    tokenizer = tokenizer_of(kind).with_specials(["<|turn_end|>", "<|user|>"])
    texts = difficult_texts(tokenizer)
    if kind != "char":
        texts.append("a<|turn_end|>b<|bos|>")
    generator = random.Random(2)
    id_lists = [generator.choices(range(tokenizer.vocab_size), k=100) for _ in range(50)]
    html = page_of(noisy_model(SHAPES["tied"], tokenizer.vocab_size), tokenizer)
    given = {"texts": texts, "ids": id_lists, "lone": kind != "char"}
    found = computed(browser, html, IDS, given)
    assert found["ids"] == [tokenizer.encode(text) for text in texts]
    assert found["texts"] == [tokenizer.decode(ids) for ids in id_lists]
    if given["lone"]:
        assert found["lone"] == tokenizer.encode("a?b?🙂")


DRAWS = """
return given.map(({logits, settings, seed, penalty, seen}) => {
  const random = new Random(seed);
  const used = penalised(Float32Array.from(logits), penalty, seen);
  return Array.from({length: 40}, () => choose(used, random.uniform(), settings));
});
"""


@pytest.mark.browser
def test_draws_are_those_of_the_engine(browser):
    cases, expected = [], []
    settings = [(0.8, 0, 1), (1, 7, 1), (1.3, 0, 0.9), (0.7, 40, 0.5), (1, 70, 1), (0, 0, 1)]
    for seed, (size, (temperature, top_k, top_p)) in enumerate(
        (size, each) for size in (30, 900) for each in settings
    ):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(1, size, generator=generator)
        seen = torch.zeros(1, size, dtype=torch.bool)
        seen[0, : size // 3] = True
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        case = {"logits": logits[0].tolist(), "seed": 2**32 - 5 + seed, "penalty": 1.2}
        case |= {"settings": options, "seen": list(range(size // 3))}
        cases.append(case)
        generator.manual_seed(2**32 - 5 + seed)
        points = [draw_points(1, generator) for _ in range(40)]
        rows = [
            choose(logits, point, repetition_penalty=1.2, seen_BxV=seen, **options)
            for point in points
        ]
        expected.append([row.item() for row in rows])
    html = page_of(noisy_model(SHAPES["tied"], 257), tokenizer_of("byte"))
    assert computed(browser, html, DRAWS, cases) == expected


@pytest.fixture
def open_file(browser):
    """open_file(path, **context) opens a page from disk; what it complains of fails the test."""
    complaints, contexts = [], []

    def note_request(asked):
        if not asked.startswith(("file:", "data:", "blob:")):
            complaints.append(f"{asked} was asked")

    def open_file(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: note_request(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-state=ready]")
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def expect():
    expect = pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=60_000)
    return expect


def fill(page, **values):
    names = ["temperature", "top_k", "top_p", "repetition_penalty", "max_tokens", "seed"]
    for name, value in values.items():
        page.locator("#fields input").nth(names.index(name)).fill(str(value))


@pytest.mark.browser
def test_play(tmp_path, open_file, expect):
    tokenizer = tokenizer_of("bpe")
    model = noisy_model(SHAPES["speedrun"], tokenizer.vocab_size)
    path = tmp_path / "a page.html"
    path.write_text(page_of(model, tokenizer), encoding="utf-8")
    page = open_file(path)
    assert page.title() == "d2 · nanochat"
    page.fill("#prompt", "the café 🙂 ")
    fill(page, max_tokens=60, seed=3, top_p=0.9, repetition_penalty=1.1)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#ending")).to_contain_text(re.compile("reached max tokens|ends here"))
    text = "".join(
        generate_text(
            model,
            tokenizer,
            "the café 🙂 ",
            max_new_tokens=60,
            temperature=0.8,
            top_p=0.9,
            repetition_penalty=1.1,
            seed=3,
        )
    )
    assert page.evaluate("view.text()") == "the café 🙂 " + text
    assert page.evaluate("view.out.textContent") == "the café 🙂 " + text
    # alternatives by keyboard; the chosen one is continued
    page.focus("#out")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip .each")).to_have_count(5)
    shares = page.evaluate("tip.group.tokens[0].top.map((each) => Math.exp(each.logprob))")
    second = page.evaluate("tip.group.first")
    ids = page.evaluate("view.tokens.map((token) => token.id)")
    prompt = [tokenizer.bos, *tokenizer.encode("the café 🙂 ")]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids[:second]]))[0, -1]
    top = logits.softmax(-1).topk(5)
    torch.testing.assert_close(torch.tensor(shares), top.values, atol=1e-5, rtol=1e-4)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#ending")).to_contain_text(re.compile("reached max tokens|ends here"))
    branched = page.evaluate("view.tokens.map((token) => token.id)")
    assert branched[: second + 1] == [*ids[:second], top.indices[0].item()]
    page.click("#again")
    expect(page.locator("#ending")).to_contain_text(re.compile("reached max tokens|ends here"))
    assert page.evaluate("view.tokens.map((token) => token.id)") == branched
    page.click("#edit")
    expect(page.locator("#prompt")).to_have_value(page.evaluate("view.text()"))
    # Chromium asks nobody from a file, so the copy is made the other way
    page.click("#copy")
    expect(page.locator("#copy")).to_contain_text("opied")


RENDERED = "return given.map((each) => new Tokenizer(about.tokenizer).render(each));"


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_conversations_are_rendered_as_in_training(browser, kind):
    tokenizer = with_chat(tokenizer_of(kind))
    system = {"role": "system", "content": "Be <|turn_end|> brief."}
    turns = [
        {"role": "user", "content": "the café 🙂\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "<|assistant_start|> x"},
    ]
    conversations = [turns, [system, *turns], turns[:1]]
    html = page_of(noisy_model(SHAPES["tied"], tokenizer.vocab_size), tokenizer)
    found = computed(browser, html, RENDERED, conversations)
    for ids, messages in zip(found, conversations, strict=True):
        expected, _ = render(tokenizer, messages, generation_prompt=True)
        assert [tokenizer.bos, *ids] == expected.tolist()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_chat(tmp_path, open_file, expect, scheme, width):
    tokenizer = with_chat(tokenizer_of("byte"))
    model = noisy_model(SHAPES["speedrun"] | {"max_seq_len": 400}, tokenizer.vocab_size)
    path = tmp_path / "page.html"
    path.write_text(page_of(model, tokenizer), encoding="utf-8")
    page = open_file(path, color_scheme=scheme, viewport={"width": width, "height": 800})
    fill(page, max_tokens=12, temperature=0)
    page.fill("#system", "Be brief.")
    page.fill("#prompt", f"{MARKUP} hi")
    page.keyboard.press("Enter")
    ended = re.compile("reached max tokens|ends here")
    expect(page.locator("#ending")).to_contain_text(ended)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{MARKUP} hi"},
    ]
    answer = page.evaluate("view.text()")
    assert answer == greedy(model, tokenizer, messages, 12)
    page.click("#again")
    expect(page.locator("#ending")).to_contain_text(ended)
    assert page.evaluate("view.text()") == answer
    page.fill("#prompt", "And?")
    page.click("#run")
    expect(page.locator("#ending")).to_contain_text(ended)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    assert page.evaluate("view.text()") == greedy(model, tokenizer, messages, 12)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # a message that is edited drops what follows it
    expect(page.locator("#turns .bubble")).to_have_count(3)
    page.get_by_role("button", name="Edit").nth(1).click()
    expect(page.locator("#prompt")).to_have_value("And?")
    expect(page.locator("#turns .bubble")).to_have_count(2)
    # the last message has its answer
    expect(page.locator("#again")).to_be_disabled()
    page.click("#new")
    expect(page.locator("#turns .bubble")).to_have_count(0)
    page.locator("#mode label", has_text="Text").click()
    page.fill("#prompt", "Once")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#ending")).to_contain_text(ended)
    assert page.evaluate("view.text()").startswith("Once")


@pytest.mark.browser
def test_an_empty_answer_and_a_full_context(tmp_path, open_file, expect):
    tokenizer = with_chat(tokenizer_of("byte"))
    model = silent_model(SHAPES["llama"] | {"max_seq_len": 60}, tokenizer)
    path = tmp_path / "page.html"
    path.write_text(page_of(model, tokenizer), encoding="utf-8")
    page = open_file(path)
    bubbles = page.locator("#turns .bubble")
    ending = page.locator("#ending")
    # a wrong setting: the message stays where it is
    fill(page, temperature=-1)
    page.fill("#prompt", "Hi")
    page.keyboard.press("Enter")
    expect(ending).to_contain_text("Temperature must be")
    expect(page.locator("#prompt")).to_have_value("Hi")
    expect(bubbles).to_have_count(0)
    fill(page, temperature=0)
    page.click("#run")
    expect(ending).to_have_text("· the answer is empty")
    # the next message stands behind it, as the model saw it
    page.fill("#prompt", "And?")
    page.keyboard.press("Enter")
    expect(bubbles).to_have_text(["Hi", "", "And?"])
    expect(ending).to_have_text("· the answer is empty")
    assert [turn["role"] for turn in page.evaluate("chat.turns")] == ["user", "assistant", "user"]
    positions = page.evaluate("about.shape.positions")
    page.fill("#prompt", "x" * positions)
    page.keyboard.press("Enter")
    expect(ending).to_contain_text(f"this model has {positions} positions. Edit a message")
    # nothing came of that: more is added to the message
    page.fill("#prompt", "x")
    page.keyboard.press("Enter")
    expect(bubbles).to_have_count(5)
    page.click("#new")
    expect(bubbles).to_have_count(0)
    expect(ending).to_have_text("")


def silent_model(shape, tokenizer):
    """A model that ends every answer at once: all tokens are read alike, and what is read predicts
    the end."""
    model = noisy_model(shape, tokenizer.vocab_size)
    with torch.no_grad():
        model.embedding.weight[:] = model.embedding.weight[0].clone()
        model.head.weight.zero_()
        end = tokenizer.special_ids[TURN_END]
        model.head.weight[end] = model.hidden(torch.zeros(1, 1, dtype=torch.int64))[0, 0]
    return model


def greedy(model, tokenizer, messages, n):
    """The most likely answer."""
    ids, _ = render(tokenizer, messages, generation_prompt=True)
    steps = generate_ids(
        model, ids.tolist(), n, temperature=0, stop_ids=tokenizer.end_ids, use_cache=False
    )
    return "".join(text_pieces(tokenizer, (step[0] for step in steps)))


@pytest.mark.browser
def test_stop_and_refusals(tmp_path, open_file, expect):
    tokenizer = tokenizer_of("char")
    # a logit of 0 is not among the first two: the text has no end
    model = noisy_model(SHAPES["llama"] | {"max_seq_len": 4000}, tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight[tokenizer.bos] = 0
    path = tmp_path / "page.html"
    path.write_text(page_of(model, tokenizer), encoding="utf-8")
    page = open_file(path)
    fill(page, max_tokens=40_000, top_k=2)
    page.click("#run")
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#figures")).to_contain_text("tokens/s")
    page.keyboard.press("Escape")
    expect(page.locator("#ending")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()
    page.fill("#prompt", "The €")
    page.click("#run")
    expect(page.locator("#ending")).to_contain_text('The character "€" (U+20AC) is not among')
    fill(page, top_p=3)
    page.click("#run")
    expect(page.locator("#ending")).to_contain_text("Top-p must be a number from 0.001 to 1.")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_looks(tmp_path, open_file, expect, scheme, width):
    tokenizer = tokenizer_of("byte")
    path = tmp_path / "page.html"
    page_text = page_of(noisy_model(SHAPES["tied"], 257), tokenizer)
    about = to_html.about_in(page_text) | {"name": MARKUP + "x" * 300}
    path.write_text(to_html.page_of(about, to_html.weights_in(page_text)), encoding="utf-8")
    page = open_file(path, color_scheme=scheme, viewport={"width": width, "height": 800})
    page.fill("#prompt", "y" * 150)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#ending")).to_contain_text(re.compile("reached max tokens|ends here"))
    page.locator("#out .t").last.click()
    expect(page.locator("#tip")).to_be_visible()
    assert page.title() == f"{MARKUP}{'x' * 300} · nanochat"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('script').length") == 3
