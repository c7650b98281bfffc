"""Generation: cached against uncached, worked choices of tokens, streams of text."""

import pytest
import torch

import nanochat
from nanochat.common import UsageError
from nanochat.data.chat import with_chat
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval import generation
from nanochat.eval.generation import (
    NotNumbers,
    generate_ids,
    generate_text,
    room_for,
    sample_next,
    text_pieces,
)
from nanochat.eval.kv_cache import KVCache
from nanochat.model.attention import usable_backends
from nanochat.model.build import build
from nanochat.model.config import GPTConfig

VOCAB = 257  # the byte tokenizer's
BOS = 256


def tiny_model(backend="blocked", depth=4, max_seq_len=32, seed=0, **changes):
    """A model of about 250k parameters, none of which is left at its initial zero."""
    shape = {
        "width": 64,
        "head_dim": 16,
        "n_head": 4,
        "n_kv_head": 4,
        "vocab_size": VOCAB,
        "window_pattern": "L",
        "key_shift": changes.get("arch") != "llama",
    }
    config = GPTConfig(**(shape | changes), depth=depth, max_seq_len=max_seq_len)
    model = build(config, "cpu", attention_backend=backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads would only wait for each other: the tensors here are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return tiny_model(depth=2)


def random_ids(n, seed=0):
    return [
        BOS,
        *torch.randint(VOCAB - 1, (n - 1,), generator=torch.Generator().manual_seed(seed)).tolist(),
    ]


def drain(*args, **kwargs):
    return list(generate_ids(*args, **kwargs))


# ---- cached equals uncached ----

# prompt tokens, window pattern, short window, key/value heads (of 4), max_seq_len
CACHE_CASES = [
    (1, "L", 16, 4, 32),
    (1, "SSSL", 1, 1, 32),
    (7, "SSSL", 3, 4, 32),  # the prompt is longer than the short window
    (13, "SL", 13, 1, 32),  # the window's edge is the last token of the prompt
    (14, "SL", 13, 2, 32),
    (31, "SSSL", 1, 4, 32),  # decoding crosses max_seq_len
    (45, "SSSL", 8, 1, 16),  # the prompt alone is longer than max_seq_len
    (259, "SL", 100, 1, 32),  # several blocks of queries in the prefill
]


@pytest.mark.parametrize("backend", usable_backends("cpu"))
@pytest.mark.parametrize("n_prompt, pattern, short_window, n_kv_head, max_seq_len", CACHE_CASES)
def test_cached_equals_uncached(n_prompt, pattern, short_window, n_kv_head, max_seq_len, backend):
    model = tiny_model(
        backend,
        window_pattern=pattern,
        short_window=short_window,
        n_kv_head=n_kv_head,
        max_seq_len=max_seq_len,
    )
    prompt = random_ids(n_prompt)
    cached = drain(model, prompt, 12, temperature=0)
    assert cached == drain(model, prompt, 12, temperature=0, use_cache=False)

    ids = torch.tensor([prompt + [step[0] for step in cached]])
    cache = KVCache(model.config, 1, ids.size(1), "cpu", torch.float32)
    with torch.no_grad():
        whole = model(ids)
        pieces = [
            model(piece, cache=cache)
            for piece in (ids[:, :n_prompt], *ids[:, n_prompt:].split(1, dim=1))
        ]
    assert cache.length == ids.size(1)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_cache_takes_several_tokens_at_a_time():
    model = tiny_model(window_pattern="SL", short_window=4, n_kv_head=2)
    ids = torch.tensor([random_ids(20, seed=1), random_ids(20, seed=2)])
    cache = KVCache(model.config, 2, 20, "cpu", torch.float32)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in ids.split([5, 1, 8, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["smear", "shifted keys"])
@pytest.mark.parametrize("n_prompt", [1, 6])
def test_the_last_token_of_the_prompt_is_remembered(model, n_prompt, what):
    """Forgetting it changes the logits visibly, so the comparisons above would notice."""
    ids = torch.tensor([random_ids(n_prompt + 1)])
    logits = {}
    for forget in (False, True):
        cache = KVCache(model.config, 1, n_prompt + 1, "cpu", torch.float32)
        with torch.no_grad():
            model(ids[:, :n_prompt], cache=cache)
            if forget and what == "smear":
                cache.previous_embedding = None
            for layer in cache.layers if forget and what == "shifted keys" else []:
                layer.key_before = None
            logits[forget] = model(ids[:, n_prompt:], cache=cache)[0, -1]
    with torch.no_grad():
        whole = model(ids)[0, -1]
    torch.testing.assert_close(logits[False], whole, atol=1e-5, rtol=1e-5)
    assert (logits[True] - whole).abs().max() > 0.05


def test_samples_share_one_prefill_and_then_differ(model):
    settings = {
        "temperature": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.2,
        "seed": 5,
        "num_samples": 3,
    }
    cached = drain(model, random_ids(6), 10, **settings)
    assert cached == drain(model, random_ids(6), 10, use_cache=False, **settings)
    assert len(set(zip(*cached))) == 3
    greedy = drain(model, random_ids(6), 10, temperature=0)
    assert drain(model, random_ids(6), 10, temperature=0, num_samples=3) == [
        step * 3 for step in greedy
    ]


def test_cache_refuses_what_does_not_fit(model):
    cache = KVCache(model.config, 2, 4, "cpu", torch.float32)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        model(ids, cache=cache)
        with pytest.raises(ValueError, match="holds 3 of 4 positions and was given 2 more"):
            model(ids[:, :2], cache=cache)
        model(
            ids[:, :1], cache=cache
        )  # a refusal changes nothing: the last free position can still be used
    assert cache.length == 4
    one_row = torch.zeros(1, 1, 4, 16)
    layer = KVCache(model.config, 2, 4, "cpu", torch.float32).layers[0]
    keys, values = layer.append(one_row + 1, one_row + 2)  # into an empty cache: for all rows
    assert keys.shape == values.shape == (1, 1, 4, 16)
    assert (layer.keys[:, 0] == 1).all() and (layer.values[:, 0] == 2).all()
    with pytest.raises(ValueError, match="2 rows and was given 1"):
        layer.append(one_row, one_row)


# ---- choosing a token ----

LOGITS = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()  # most likely first: tokens 1, 3, 2, 0


def frequencies(logits, **settings):
    """Share of each token in 40,000 draws; the standard error of a share is at most 0.0025."""
    n = 40_000
    if "seen_BxV" in settings:
        settings["seen_BxV"] = settings["seen_BxV"].expand(n, -1)
    drawn = sample_next(logits.expand(n, -1), torch.Generator().manual_seed(0), **settings)
    assert drawn.shape == (n,) and drawn.dtype == torch.int64
    return torch.bincount(drawn, minlength=logits.size(-1)) / n


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.05, 0.5, 0.15, 0.3]),
        ({"temperature": 0.5}, [0.0068, 0.6849, 0.0616, 0.2466]),  # squares over their sum, 0.365
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 99}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_k": -1}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_k": None}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.79}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.81}, [0, 0.5263, 0.1579, 0.3158]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 1.5}, [0.05, 0.5, 0.15, 0.3]),
        (
            {"top_k": 3, "top_p": 0.84},
            [0, 0.625, 0, 0.375],
        ),  # 0.8 of the 0.95 that top-k keeps is 0.842
        (
            {"temperature": 0.5, "top_p": 0.92},
            [0, 0.7353, 0, 0.2647],
        ),  # temperature comes before top-p: 0.6849 + 0.2466
        ({"temperature": 1e-320}, [0, 1, 0, 0]),
    ],
)
def test_filters(settings, expected):
    shares = frequencies(LOGITS, **settings)
    torch.testing.assert_close(
        shares, torch.tensor(expected, dtype=torch.float32), atol=0.01, rtol=0
    )
    assert (shares[torch.tensor(expected) == 0] == 0).all()


def test_repetition_penalty():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5])
    seen = torch.tensor([True, True, False, False])
    # the penalised logits are 1, -2, 0.5, 1.5
    shares = frequencies(logits, repetition_penalty=2.0, seen_BxV=seen)
    torch.testing.assert_close(
        shares, torch.tensor([0.3026, 0.0151, 0.1835, 0.4988]), atol=0.01, rtol=0
    )
    for penalty, token in ((1.0, 0), (2.0, 3)):
        assert (
            sample_next(
                logits[None], None, temperature=0, repetition_penalty=penalty, seen_BxV=seen[None]
            )
            == token
        )


def test_rows_are_filtered_apart():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([sample_next(logits, generator, top_p=0.7) for _ in range(100)])
    assert set(drawn[:, 0].tolist()) == {1, 3} and set(drawn[:, 1].tolist()) == {2, 0}


def test_a_large_vocabulary_stays_inside_the_filter():
    logits = torch.randn(2000, 5000, generator=torch.Generator().manual_seed(3))
    drawn = sample_next(logits, torch.Generator().manual_seed(4), top_k=7)
    rank = (logits > logits.gather(1, drawn[:, None])).sum(1)
    assert rank.max() == 6


def test_nan_logits_are_refused():
    for value in ("nan", "inf"):
        with pytest.raises(NotNumbers, match="not numbers"):
            sample_next(torch.tensor([[0.0, float(value)]]), None, temperature=0)


def test_repetition_penalty_counts_prompt_and_new_tokens(model, monkeypatch):
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6, 7]] = torch.tensor([3.0, 2.0, 1.0])
    monkeypatch.setattr(generation, "last_logits", lambda model, ids, cache=None: logits)
    # 5 stands in the prompt, so it starts at 0.3; then 6 falls to 0.2 and 7 to 0.1
    assert drain(model, [BOS, 5], 3, temperature=0, repetition_penalty=10) == [[6], [7], [5]]


# ---- streams of ids ----


def test_seed_decides_the_text(model):
    first, again, other = (drain(model, random_ids(4), 16, seed=seed) for seed in (7, 7, 8))
    assert first == again != other


def scripted(monkeypatch, rows, vocab_size=VOCAB):
    """Make the model predict rows[s][step] for sample s, whatever it reads."""
    steps = iter(list(zip(*rows)))
    monkeypatch.setattr(
        generation,
        "last_logits",
        lambda model, ids, cache=None: (
            10.0 * torch.nn.functional.one_hot(torch.tensor(next(steps)), vocab_size)
        ),
    )


def test_stopped_samples_yield_none(model, monkeypatch):
    scripted(monkeypatch, [[1, 9, 5, 5, 5], [2, 3, 9, 5, 5]])
    steps = generate_ids(model, [BOS], 5, temperature=0, num_samples=2, stop_ids=[9])
    assert list(steps) == [[1, 2], [9, 3], [None, 9]]


def test_without_stop_ids_it_runs_to_the_end(model, monkeypatch):
    scripted(monkeypatch, [[BOS, 4, BOS]])
    assert drain(model, [BOS], 3, temperature=0) == [[BOS], [4], [BOS]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_modes_stay_the_callers(use_cache):
    model = tiny_model(depth=2, dropout=0.5)
    expected = drain(model, random_ids(5), 4, temperature=0)
    model.train()
    steps = generate_ids(model, random_ids(5), 4, temperature=0, use_cache=use_cache)
    for step in expected:
        assert next(steps) == step  # no dropout inside
        assert model.training and model.blocks[0].mlp.training
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not generation.last_logits(model, torch.tensor([[1, 2]])).requires_grad
    model(
        torch.tensor([[1, 2]]), torch.tensor([[2, 3]])
    ).sum().backward()  # the weights still train
    with torch.no_grad():
        drain(model, [BOS], 2)
        assert not torch.is_grad_enabled()


def test_mode_is_restored_after_an_error():
    model = tiny_model(depth=2).train()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        drain(model, [BOS], 2)
    assert model.training and torch.is_grad_enabled()


def test_the_whole_reach_can_be_used():
    model = tiny_model(depth=1, max_seq_len=2)  # 20 positions
    for use_cache in (True, False):
        assert len(drain(model, random_ids(18), 2, use_cache=use_cache)) == 2
    assert len(drain(model, [BOS], 19)) == 19
    with pytest.raises(
        UsageError, match="19 tokens and 2 new need 21 positions; this model has 20"
    ):
        generate_ids(model, random_ids(19), 2)  # at the call, before the first step


@pytest.mark.parametrize(
    "prompt, message", [([], "no tokens"), ([BOS, 257], "token id 257"), ([-1], "token id -1")]
)
def test_unusable_prompts(model, prompt, message):
    with pytest.raises(UsageError, match=message):
        generate_ids(model, prompt, 4)


def test_all_unusable_settings_are_named(model):
    with pytest.raises(UsageError) as raised:
        generate_ids(
            model,
            [BOS],
            0,
            temperature=float("nan"),
            top_k=-2,
            top_p=1.01,
            repetition_penalty=0,
            seed=-1,
            num_samples=0,
        )
    lines = str(raised.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "seed",
        "num_samples",
    ]


# ---- streams of text ----


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return train_tokenizer("byte", [], 0)


def test_characters_come_out_whole(bytes_tokenizer):
    assert list(text_pieces(bytes_tokenizer, "aé€🙂b".encode())) == ["a", "é", "€", "🙂", "b"]


@pytest.mark.parametrize(
    "data, text",
    [
        (b"a\xffb", "a\ufffdb"),  # never valid
        (b"a\xe2\x82b", "a\ufffdb"),  # cut short by another character
        (b"a\xf0\x9f\x99", "a\ufffd"),  # cut short by the end
        (b"\x80\x80", "\ufffd\ufffd"),  # continuation bytes with no start
        (b"", ""),
    ],
)
def test_invalid_bytes_are_replaced(bytes_tokenizer, data, text):
    pieces = list(text_pieces(bytes_tokenizer, data))
    assert "".join(pieces) == text == data.decode("utf-8", "replace") and "" not in pieces


@pytest.mark.parametrize("end", [BOS, None])
def test_text_ends_with_the_document(bytes_tokenizer, end):
    assert "".join(text_pieces(bytes_tokenizer, [104, 105, end, 33])) == "hi"


def test_text_ends_with_a_turn_of_a_chat(bytes_tokenizer):
    """Other special tokens are shown by name, as decode() shows them."""
    chat = with_chat(bytes_tokenizer)
    user, end = chat.special_ids["<|user_start|>"], chat.special_ids["<|turn_end|>"]
    assert "".join(text_pieces(chat, [104, user, 105, end, 33])) == "h<|user_start|>i"


def test_generate_text_streams(model, bytes_tokenizer, monkeypatch):
    scripted(monkeypatch, [[*"né".encode(), BOS, 33]])
    pieces = generate_text(model, bytes_tokenizer, "prompt", temperature=0)
    assert next(pieces) == "n" and next(pieces) == "é" and list(pieces) == []


def test_generate_text_reads_bos_then_the_prompt(model, bytes_tokenizer):
    ids = [step[0] for step in drain(model, [BOS, *b"ab"], 12, seed=3, stop_ids=[BOS])]
    text = "".join(generate_text(model, bytes_tokenizer, "ab", 12, seed=3))
    assert text == bytes(i for i in ids if i != BOS).decode("utf-8", "replace") != ""
    assert nanochat.generate(model, bytes_tokenizer, "ab", max_new_tokens=12, seed=3) == text


@pytest.mark.parametrize(
    "text, stop, pieces",
    [
        # several tokens; the text before may end like its beginning
        ("one END two", ["END"], "one "),
        ("one EEND", ["END"], "one E"),
        ("aabaabaac", ["aabaac"], "aab"),
        # only begun when the text ends
        ("one EN", ["END"], "one EN"),
        ("one Ex END", ["END"], "one Ex "),
        ("END", ["END"], ""),
        ("none of it", ["END", "\n\n"], "none of it"),
        # the one that is complete first, and of two the one that begins first
        ("a\nUser: b", ["User:", "\n"], "a"),
        ("xabcd", ["abcd", "bc"], "xa"),
        ("xabc", ["abc", "bc"], "x"),
        # a character of several bytes, and one that is never whole
        ("é🙂é", ["🙂"], "é"),
        ("é", [], "é"),
    ],
)
def test_text_ends_before_a_stop_text(model, bytes_tokenizer, monkeypatch, text, stop, pieces):
    """The same by bytes and by whole words."""
    ids = list(text.encode())
    assert "".join(text_pieces(bytes_tokenizer, [*ids, BOS], stop)) == pieces
    words = train_tokenizer("byte", [], 0)
    words.tokens[0] = text.encode()
    assert "".join(text_pieces(words, [0, None], stop)) == pieces
    scripted(monkeypatch, [[*ids, BOS]])
    options = {"max_new_tokens": len(ids) + 1, "temperature": 0, "stop": stop}
    assert "".join(generate_text(model, bytes_tokenizer, "", **options)) == pieces


def test_what_may_begin_a_stop_text_is_held_back(model, bytes_tokenizer, monkeypatch):
    scripted(monkeypatch, [[*b"aE", *b"b END!", BOS]])
    drawn = generate_text(model, bytes_tokenizer, "", 9, stop=["END"], temperature=0)
    assert list(drawn) == ["a", "Eb", " "]


def test_nothing_is_drawn_behind_a_stop_text(model, bytes_tokenizer, monkeypatch):
    """The script holds no further ids, and would raise."""
    scripted(monkeypatch, [b"a."])
    assert list(generate_text(model, bytes_tokenizer, "", 9, stop=".", temperature=0)) == ["a"]


def test_an_empty_stop_text_is_refused(model, bytes_tokenizer):
    for stop in ("", ["x", ""]):
        with pytest.raises(UsageError, match="must not be empty"):
            generate_text(model, bytes_tokenizer, "", stop=stop)


@pytest.mark.parametrize(
    "n_prompt, asked, limit, note",
    [
        (20, 12, 12, ""),
        (20, 13, 13, "20 tokens and up to 13 new exceed the 32 tokens of context"),
        (33, 4, 4, "the prompt's 33 tokens exceed the 32 tokens of context"),
        (33, 287, 287, "the prompt's 33 tokens exceed the 32 tokens of context"),
        (1, 32, 32, "the prompt's 1 token and up to 32 new exceed"),
        (319, 9, 1, "the text ends after 1 new token at the latest"),
        (33, 288, 287, "ends after 287 new tokens at the latest: this model has 320 positions"),
    ],
)
def test_room_beyond_the_context(model, n_prompt, asked, limit, note):
    room = room_for(model, n_prompt, asked)
    assert room.max_new_tokens == limit and note in room.note and bool(note) == bool(room.note)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 3.0},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.05},
        {"min_p": 0.001, "top_p": 0.95},
        {"top_k": generation.SORTED_FIRST},
    ],
    ids=str,
)
def test_the_likeliest_tokens_decide_as_all_sorted_ones_do(settings, monkeypatch):
    """Sorting all of them is what the rule says; flat distributions need more than a few. A row
    gets the same token alone and among others."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 500, generator=generator) * torch.linspace(0, 6, 400)[:, None]
    points = torch.rand(400, 1, generator=generator, dtype=torch.float64)
    rows = zip(logits.split(1), points.split(1), strict=True)
    quick = torch.cat([generation.choose(row, point, **settings) for row, point in rows])
    assert torch.equal(quick, generation.choose(logits, points, **settings))
    monkeypatch.setattr(generation, "SORTED_FIRST", 10**9)
    assert torch.equal(quick, generation.choose(logits, points, **settings))


def test_min_p_keeps_what_is_likely_enough():
    """Probabilities 1/2, 1/4, 3/20, 1/10: with min_p a half, the first two, at 2/3 and 1/3."""
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(4, -1)
    points = torch.tensor([[0.0], [0.66], [0.67], [0.99]], dtype=torch.float64)
    assert generation.choose(logits, points, min_p=0.49).tolist() == [0, 0, 1, 1]
    assert generation.choose(logits, points, min_p=0.0).tolist() == [0, 1, 1, 3]
