"""Tokenizers: reversible, special tokens never read from text, byte counts from raw bytes; GPT-2's
ids are OpenAI's."""

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hub_server import hasten
from small import SHARED

from nanochat import __main__
from nanochat.common import Unavailable, UsageError, base_dir
from nanochat.data import download
from nanochat.data.tokenizer import (
    BOS_TEXT,
    EXPECTED_BYTES_PER_TOKEN,
    GPT2_FINGERPRINT,
    GPT2_PATTERN,
    GPT2_REPO,
    GPT2_VOCAB_SIZE,
    LLAMA_PATTERN,
    SPLIT_PATTERN,
    TOKENIZER_FILE,
    TRAINED_TOKENIZERS,
    Tokenizer,
    _blanks_cut,
    derived_vocab_size,
    expected_vocab_size,
    gpt2_byte_characters,
    gpt2_tokenizer,
    read_tokenizer,
    saved_gpt2_tokenizer,
    train_tokenizer,
)

GPT2_FOLDER = SHARED / "gpt2_bpe"
needs_gpt2 = pytest.mark.skipif(
    not (GPT2_FOLDER / "encoder.json").exists(), reason=f"needs GPT-2's files in {GPT2_FOLDER}"
)
# "he" and "ll" join first, then "hell", then " hell" where a blank leads
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "hell")]
TEXT = "The café sold 12 crêpes — 日本語 too.\n\n    def f(x):\n        return x  # 🙂\n" * 3


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer("bpe", [TEXT, "plain words and more plain words"], 300)


@pytest.mark.parametrize("kind", TRAINED_TOKENIZERS)
def test_round_trip_and_save(kind, tmp_path):
    tokenizer = train_tokenizer(kind, [TEXT], 300)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.bos == tokenizer.vocab_size - 1
    tokenizer.save(tmp_path)
    loaded = read_tokenizer(tmp_path)
    assert loaded.encode(TEXT) == ids
    assert loaded.fingerprint == tokenizer.fingerprint


def test_bpe_has_the_size_asked_for_and_merges(bpe):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXT)) < 0.7 * len(TEXT.encode())
    assert bpe.encode("any bytes: \x00\u07ff\U0001f9ea") != []


def test_text_that_spells_a_special_token_is_plain_text(bpe):
    ids = bpe.encode(f"a{BOS_TEXT}b")
    assert bpe.bos not in ids
    assert bpe.decode(ids) == f"a{BOS_TEXT}b"


@pytest.mark.parametrize("kind", TRAINED_TOKENIZERS)
def test_byte_counts_sum_to_the_text(kind):
    """Also for text that BPE cuts inside a character, where counting decoded tokens goes wrong."""
    tokenizer = train_tokenizer(kind, [TEXT], 257)
    rare = "日本語🙂é" if kind != "char" else "日é🙂"
    counts = tokenizer.byte_counts()
    assert counts[tokenizer.encode(rare)].sum() == len(rare.encode())
    assert counts[tokenizer.bos] == 0
    # 257 means no merge: each token is one byte and, alone, no valid UTF-8
    if tokenizer.kind == "bpe":
        assert all(len(tokenizer.token_bytes(i)) == 1 for i in tokenizer.encode("日"))


def test_characters_are_numbered_by_code_point():
    tokenizer = train_tokenizer("char", ["ba", "d c"], -1)
    assert tokenizer.encode(" abcd") == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 6


def test_unknown_character_is_named():
    with pytest.raises(UsageError, match=r"'ß' \(U\+00DF\)"):
        train_tokenizer("char", ["abc"], -1).encode("aß")


def test_lone_surrogates_do_not_crash():
    assert train_tokenizer("byte", [], -1).encode("a\udcff") == [ord("a"), ord("?")]


def test_batches_equal_single_texts(bpe):
    texts = [TEXT, "", "x", "  \n y"]
    for ids, text in zip(bpe.encode_batch(texts, threads=2), texts, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == bpe.encode(text)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("    return x", ["   ", " return", " x"]),
        ("a\n        b", ["a", "\n        ", "b"]),
        ("f(x) == 1234", ["f", "(x", ")", " ==", " ", "12", "34"]),
        ("don't  stop", ["don", "'t", " ", " stop"]),
    ],
)
def test_split_pattern(text, pieces):
    import regex

    assert regex.findall(SPLIT_PATTERN, text) == pieces


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("f(x) == 12345", ["f", "(x", ")", " ==", " ", "123", "45"]),
        ("DON'T\n'sad", ["DON", "'T", "\n", "'s", "ad"]),
        ("if a:\r\n        b \n\n c", ["if", " a", ":\r\n", "       ", " b", " \n\n", " c"]),
    ],
)
def test_llama_pattern(text, pieces):
    import regex

    assert regex.findall(LLAMA_PATTERN, text) == pieces
    tokenizer = train_tokenizer("bpe-llama", [text] * 9, 400)
    assert tokenizer.pattern == LLAMA_PATTERN
    # with every merge learnt, each piece is one token
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)] == pieces


def test_vocabulary_size_from_the_data_size():
    # 55 MiB / 12,800 = 4,521, nearest power of two 4,096; 1.1 MB -> 87 -> the floor; 100 GB -> the
    # ceiling
    sizes = {1: 512, 1_115_394: 512, 57_875_898: 4096, 100 * 10**9: 32768}
    assert {n: derived_vocab_size(n) for n in sizes} == sizes


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"kind": "unigram"},
        {"tokens": []},
        {"tokens": ["%%%"]},
        {"pattern": "x"},
        {"pattern": GPT2_PATTERN},
        {"pattern": ["x"]},
        {"special": "<|x|>"},
        {"tokens": ["YQ=="]},
        {"tokens": 3},
        {"kind": "byte"},
        {"kind": "char", "pattern": None},
    ],
)
def test_damaged_or_foreign_files_are_refused(bpe, tmp_path, change):
    bpe.save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match="tokenizer"):
        read_tokenizer(tmp_path)


SPECIALS = ("<|user_start|>", "<|turn_end|>")


def gpt2_kind():
    """A tokenizer of GPT-2's kind: every byte in GPT-2's order, and its pattern."""
    tokens = [bytes([byte]) for byte in gpt2_byte_characters().values()]
    return Tokenizer("bpe", tokens, GPT2_PATTERN)


@pytest.mark.parametrize("name", (*TRAINED_TOKENIZERS, "gpt2"))
def test_special_tokens_follow_bos_and_move_no_id(name, tmp_path):
    """They are saved, decoded by name, counted without bytes and never read from text."""
    text = TEXT + "".join(SPECIALS) + BOS_TEXT + "<|endoftext|>"
    base = gpt2_kind() if name == "gpt2" else train_tokenizer(name, [text], 300)
    tokenizer = base.with_specials(SPECIALS)
    assert tokenizer.special_ids == {name: base.bos + i for i, name in enumerate(SPECIALS, 1)}
    assert (tokenizer.bos, tokenizer.vocab_size) == (base.bos, base.vocab_size + 2)
    assert (tokenizer.end_ids, base.end_ids) == ({base.bos, base.bos + 2}, {base.bos})
    ids = tokenizer.encode(text)
    assert ids == base.encode(text) and max(ids) < base.bos
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    turn_end = tokenizer.special_ids["<|turn_end|>"]
    opened = [tokenizer.bos, turn_end, *ids]
    assert tokenizer.decode(opened) == tokenizer.bos_text + "<|turn_end|>" + text
    assert tokenizer.token_bytes(turn_end) == b""
    assert tokenizer.byte_counts().tolist() == [*base.byte_counts().tolist(), 0, 0]
    tokenizer.save(tmp_path)
    loaded = read_tokenizer(tmp_path)
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.encode(text) == ids and loaded.decode(opened) == tokenizer.decode(opened)
    assert loaded.fingerprint == tokenizer.fingerprint != base.fingerprint


def test_special_tokens_are_added_once(bpe):
    once = bpe.with_specials(SPECIALS[:1])
    twice = once.with_specials(SPECIALS)
    assert twice.specials == SPECIALS
    assert twice.with_specials(SPECIALS).fingerprint == twice.fingerprint
    assert bpe.with_specials([]).fingerprint == bpe.fingerprint
    other_order = bpe.with_specials(SPECIALS[::-1])
    assert other_order.fingerprint != twice.fingerprint


@pytest.mark.parametrize(
    "names, message",
    [
        ([BOS_TEXT], "one occurs twice"),
        (["<|a|>", "<|a|>"], "one occurs twice"),
        (["a"], "should be spelled like"),
        (["<|a b|>"], "should be spelled like"),
        (["<||>"], "should be spelled like"),
    ],
)
def test_names_that_no_special_token_has(bpe, names, message):
    with pytest.raises(ValueError, match=message):
        bpe.with_specials(names)


@pytest.mark.parametrize("specials", [["a"], "<|a|>", [3], None, ["<|a|>", "<|a|>"], ["<|bos|>"]])
def test_files_with_other_special_tokens_are_refused(bpe, tmp_path, specials):
    bpe.with_specials(SPECIALS).save(tmp_path)
    path = tmp_path / TOKENIZER_FILE
    content = json.loads(path.read_text())
    # earlier versions read the first format only, and would number fewer ids
    assert content["format"] == 2
    path.write_text(json.dumps({**content, "specials": specials}))
    with pytest.raises(UsageError, match="tokenizer"):
        read_tokenizer(tmp_path)


def test_files_of_earlier_versions_stay_valid():
    """The fingerprint is the hash of the file: these were taken before GPT-2's tokenizer came."""
    single = [bytes([i]) for i in range(256)]
    assert (
        train_tokenizer("byte", [], -1).fingerprint
        == "febcecb3e924e3bbe7820892d7e8e0a8b4303ea29f6bcf87bbfb61e52abde210"
    )
    assert (
        train_tokenizer("char", ["abc"], -1).fingerprint
        == "68e34fc591edddca97834ba307f8a4d333888364c587e445b216e84bbe6486c0"
    )
    bpe = Tokenizer("bpe", [*single, b"ab"])
    assert bpe.fingerprint == "1469baac4728877a158544402fa1c335438278cafad8064e83d06be33287646c"
    assert (bpe.pattern, bpe.bos_text) == (SPLIT_PATTERN, "<|bos|>")


def test_endless_blanks_are_encoded_and_trained_on():
    """The regex engines give up beyond a million; shorter runs are not cut, so that their ids stay
    what they were."""
    text = "x" + " " * 1_200_000 + "y"
    bpe = train_tokenizer("bpe", [text + "ab" * 9], 270)
    ids, short = bpe.encode_batch([text, "x  y"], threads=2)
    assert bpe.decode(ids.tolist()) == text
    assert bpe.decode(short.tolist()) == "x  y"
    assert _blanks_cut(" " * 500_000) == [" " * 500_000]


# --------------------------------------------------------------------------------------------------
# GPT-2's format


def write_gpt2_folder(
    folder,
    merges=MERGES,
    names=("encoder.json", "merges.txt"),
    header="",
    newline="\n",
    change=None,
):
    """A small tokenizer in GPT-2's files. change: called with the {token: id} object before it is
    written."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [
        *gpt2_byte_characters(),
        *("".join(pair) for pair in merges),
        "<|endoftext|>",
    ]
    encoder = {token: i for i, token in enumerate(tokens)}
    if change:
        change(encoder)
    (folder / names[0]).write_text(json.dumps(encoder), encoding="utf-8")
    lines = [header] * bool(header) + [" ".join(pair) for pair in merges]
    (folder / names[1]).write_bytes("".join(line + newline for line in lines).encode("utf-8"))
    return folder


@pytest.mark.parametrize(
    "layout",
    [{}, {"names": ("vocab.json", "merges.txt"), "header": "#version: 0.2"}, {"newline": "\r\n"}],
)
def test_gpt2_format_is_read_and_kept(tmp_path, layout):
    tokenizer = read_tokenizer(write_gpt2_folder(tmp_path / "in", **layout))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.bos) == ("bpe", 261, 260)
    assert (tokenizer.pattern, tokenizer.bos_text) == (GPT2_PATTERN, "<|endoftext|>")
    assert tokenizer.encode("hell hell") == [258, 259]
    assert tokenizer.encode("!~\x00 ") == [
        0,
        93,
        188,
        220,
    ]  # the byte order of GPT-2: what prints first
    assert tokenizer.decode([258, 260]) == "hell<|endoftext|>"
    assert tokenizer.bos not in tokenizer.encode("<|endoftext|>")
    tokenizer.save(tmp_path / "out")
    again = read_tokenizer(tmp_path / "out")
    assert (again.fingerprint, again.pattern, again.bos_text) == (
        tokenizer.fingerprint,
        tokenizer.pattern,
        tokenizer.bos_text,
    )
    assert again.encode("hell hell") == [258, 259]


def swap(a, b):
    def change(encoder):
        encoder[a], encoder[b] = encoder[b], encoder[a]

    return change


@pytest.mark.parametrize(
    "layout, message",
    [
        (
            {"change": swap("he", "ll")},
            "merge 0 is 'h e', and token 256, which it should make, is 'll'",
        ),
        ({"change": swap("h", "ll")}, "ids 0 to 255 should be the single bytes"),
        ({"change": swap("hell", "<|endoftext|>")}, "the last id, 260, should be"),
        ({"change": lambda encoder: encoder.pop("ll")}, "the ids should be 0 to 259"),
        ({"change": lambda encoder: encoder.update({"he": "256"})}, "the ids should be"),
        (
            {"change": lambda encoder: encoder.update({"<|endoftext|>": 261, "x y": 260})},
            "4 merges make 261 tokens .* there are 262",
        ),
        (
            {"change": lambda encoder: (encoder.pop("ll"), encoder.update({"日": 257}))},
            "token 257, '日', is not written in",
        ),
        ({"change": lambda encoder: encoder.clear()}, "the ids should be"),
        ({"merges": [("h", "e"), ("l", "l", "l")]}, "merge 1 is 'l l l'"),
        ({"merges": [("h", "e"), ("e", "l"), ("h", "el")]}, "merge 2, 'h el', can never happen"),
        ({"merges": [("he", "l")]}, "merge 0, 'he l', can never happen"),
    ],
)
def test_files_that_disagree_are_refused(tmp_path, layout, message):
    with pytest.raises(UsageError, match=message):
        read_tokenizer(write_gpt2_folder(tmp_path, **layout))


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="neither vocab.json, nor GPT-2's encoder.json"):
        read_tokenizer(tmp_path)
    folder = write_gpt2_folder(tmp_path)
    with pytest.raises(UsageError, match="encoder.json is not a folder"):
        read_tokenizer(folder / "encoder.json")
    content = (folder / "encoder.json").read_text()
    (folder / "encoder.json").write_text(content[: len(content) // 2])
    with pytest.raises(UsageError, match="encoder.json cannot be read as JSON"):
        read_tokenizer(folder)
    (folder / "encoder.json").write_text(content)
    (folder / "merges.txt").write_bytes(b"h \xff\n")
    with pytest.raises(UsageError, match="merges.txt cannot be read as UTF-8"):
        read_tokenizer(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(UsageError, match="merges.txt is missing"):
        read_tokenizer(folder)


def test_a_run_folder_gives_its_tokenizer(tmp_path):
    letters = train_tokenizer("char", ["abc"], -1)
    letters.save(tmp_path / "run" / "tokenizer")
    assert read_tokenizer(tmp_path / "run").fingerprint == letters.fingerprint
    other = train_tokenizer("char", ["xyz"], -1)
    other.save(tmp_path / "run")
    assert read_tokenizer(tmp_path / "run").fingerprint == other.fingerprint, (
        "what a folder itself holds comes first"
    )


def test_plans_know_gpt2():
    assert expected_vocab_size("gpt2", -1, 10**9) == 50257
    assert expected_vocab_size("bpe-llama", -1, 10**9) == 32768
    assert set(EXPECTED_BYTES_PER_TOKEN) == {*TRAINED_TOKENIZERS, "gpt2"}
    assert EXPECTED_BYTES_PER_TOKEN["gpt2"] == 4


@pytest.fixture(scope="module")
def gpt2():
    return read_tokenizer(GPT2_FOLDER)


@needs_gpt2
@pytest.mark.parametrize(
    "text, ids",
    [
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        ("0", [15]),
        ("00", [405]),
        ("000", [830]),
        ("0000", [2388]),
        ("00000", [20483]),
        ("000000", [10535]),
        ("0000000", [24598]),
        ("today\n  \n", [40838, 198, 220, 220, 198]),
        ("👍", [41840, 235]),
        ("", []),
    ],
)
def test_gpt2_ids_are_openais(gpt2, text, ids):
    """As tiktoken's own tests have them."""
    assert gpt2.encode(text) == ids


@needs_gpt2
def test_gpt2_is_the_pinned_one(gpt2):
    assert gpt2.fingerprint == GPT2_FINGERPRINT
    assert (gpt2.vocab_size, gpt2.bos, gpt2.bos_text) == (
        GPT2_VOCAB_SIZE,
        50256,
        "<|endoftext|>",
    )


@needs_gpt2
def test_gpt2_ids_are_those_of_another_implementation(gpt2):
    """Hugging Face's, which splits by the first published pattern and joins by merges.txt: shared
    text, random Unicode."""
    other = pytest.importorskip("tokenizers").ByteLevelBPETokenizer(
        str(GPT2_FOLDER / "encoder.json"), str(GPT2_FOLDER / "merges.txt")
    )
    draw = random.Random(0)
    assigned = [
        chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
    ]
    tricky = " \n\t\r\u00a0\u2003's'll'RE_a9,"
    texts = [
        "".join(
            draw.choice(assigned if draw.random() < 0.5 else tricky)
            for _ in range(draw.randrange(60))
        )
        for _ in range(5000)
    ]
    with open(SHARED / "general_english" / "val.jsonl", encoding="utf-8") as lines:
        texts += [json.loads(line)["text"] for line in lines]
    texts += [
        (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    for text, ids in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert ids.tolist() == other.encode(text).ids, repr(text[:100])
        assert gpt2.decode(ids.tolist()) == text


@pytest.fixture
def empty_base(tmp_path, monkeypatch):
    hasten(monkeypatch, [])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(download, "BACKOFF_S", 0)
    monkeypatch.setattr(download, "ATTEMPTS", 2)


def serve_gpt2(hub, folder):
    """Let the hub have the two files of a tokenizer under GPT-2's name."""
    files = {
        "vocab.json": (folder / "encoder.json").read_bytes(),
        "merges.txt": (folder / "merges.txt").read_bytes(),
    }
    hub.add(GPT2_REPO, files, lfs=False)


@needs_gpt2
def test_gpt2_by_name_is_fetched_once(hub, empty_base, gpt2):
    """A download that breaks is retried; nothing but the tokenizer is left on disk, and nothing is
    requested again."""
    serve_gpt2(hub, GPT2_FOLDER)
    hub.fault("merges.txt", "cut", 1, after=1000)
    assert saved_gpt2_tokenizer() is None and not hub.requests
    assert gpt2_tokenizer().fingerprint == gpt2.fingerprint
    assert len(hub.bodies("vocab.json")) == 1
    assert len(hub.bodies("merges.txt")) == 2
    hub.requests.clear()
    assert saved_gpt2_tokenizer().encode("Hello world") == [15496, 995]
    assert gpt2_tokenizer().fingerprint == gpt2.fingerprint and not hub.requests
    assert [
        path.name for path in base_dir().rglob("*") if path.is_file() and path.suffix != ".lock"
    ] == ["vocab.json"]


def test_gpt2_without_network_says_what_to_do(empty_base, capsys):
    """Not the user's mistake: exit code 1, also where only the second file does not come."""
    with pytest.raises(
        Unavailable, match=r"no connection.*HF_ENDPOINT.*merges.txt into .*gpt2, or into any folder"
    ) as caught:
        gpt2_tokenizer()
    assert "\n" not in str(caught.value)
    assert __main__.main(["tokenizer", "inspect", "gpt2"]) == 1
    assert "no connection" in capsys.readouterr().err


def test_gpt2_goes_on_with_what_it_has(hub, empty_base, tmp_path):
    serve_gpt2(hub, write_gpt2_folder(tmp_path / "small"))
    hub.fault("merges.txt", "status", 1, code=404)
    with pytest.raises(
        Unavailable, match="merges.txt of openai-community/gpt2 was not downloaded: not found"
    ):
        gpt2_tokenizer()
    with pytest.raises(Unavailable, match="is not GPT-2's tokenizer"):
        gpt2_tokenizer()
    assert len(hub.bodies("vocab.json")) == len(hub.bodies("merges.txt")) == 1


@pytest.mark.parametrize("content", [None, b"<html>please log in</html>", b'["error"]'])
def test_something_else_under_gpt2s_name_is_refused(hub, empty_base, tmp_path, content):
    """What a proxy sent is deleted, so that it is fetched again."""
    serve_gpt2(hub, write_gpt2_folder(tmp_path / "small"))
    if content:
        hub.add(GPT2_REPO, {"vocab.json": content}, lfs=False)
    for attempt in (1, 2):
        with pytest.raises(
            Unavailable, match="sent for openai-community/gpt2 is not GPT-2's tokenizer"
        ):
            gpt2_tokenizer()
        assert len(hub.bodies("vocab.json")) == attempt
    folder = write_gpt2_folder(base_dir() / "tokenizers" / "gpt2")
    with pytest.raises(UsageError, match=f"{folder} does not hold GPT-2's tokenizer"):
        saved_gpt2_tokenizer()
