"""`nanochat tokenizer`: what it saves loads, what it measures is right, what it cannot do it
reports."""

import json
import subprocess
import sys

import pytest
from hub_server import hasten
from test_tokenizer import GPT2_FOLDER, needs_gpt2, write_gpt2_folder

from nanochat import __main__
from nanochat.apps import tokenizer
from nanochat.common import UsageError
from nanochat.data import download
from nanochat.data.tokenizer import Tokenizer, read_tokenizer, train_tokenizer

WORDS = "the cat and the dog ran after the other cat, then they slept in the sun — 12 hours\n"


@pytest.fixture(autouse=True)
def own_base(tmp_path_factory, monkeypatch):
    """No GPT-2 tokenizer that another test left is at hand here."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))


@pytest.fixture
def text(tmp_path):
    """A text file of which the last tenth is held out."""
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 200, encoding="utf-8")
    return str(path)


def compare(capsys, *argv):
    """The JSON of `compare`."""
    assert tokenizer.main(["compare", "--json", *map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out)


def test_train_saves_what_train_py_can_load(text, tmp_path, capsys):
    out = tmp_path / "deep" / "tok"
    assert tokenizer.main(["train", text, str(out), "--vocab-size", "300"]) == 0
    printed = capsys.readouterr().out
    saved = read_tokenizer(out)
    assert saved.kind == "bpe" and saved.encode(WORDS)
    assert (
        f"{saved.vocab_size:,} ids" in printed
        and "bytes per token" in printed
        and f"--tokenizer={out}" in printed
    )
    assert (
        tokenizer.main(["train", text, str(out), "--vocab-size", "300"]) == 0
    )  # the same again is no conflict
    assert tokenizer.main(["train", text, str(tmp_path / "letters"), "--kind", "char"]) == 0
    assert read_tokenizer(tmp_path / "letters").kind == "char"


def test_train_refuses_to_overwrite(text, tmp_path):
    out = tmp_path / "tok"
    tokenizer.main(["train", text, str(out), "--vocab-size", "300"])
    before = (out / "vocab.json").read_bytes()
    with pytest.raises(UsageError, match="holds another tokenizer .*name another folder"):
        tokenizer.main(["train", text, str(out), "--vocab-size", "280"])
    assert (out / "vocab.json").read_bytes() == before
    (out / "vocab.json").write_text("{")
    with pytest.raises(UsageError, match="not overwritten"):
        tokenizer.main(["train", text, str(out)])
    with pytest.raises(UsageError, match="GPT-2's kind; name another folder"):
        tokenizer.main(["train", text, str(write_gpt2_folder(tmp_path / "foreign"))])
    with pytest.raises(UsageError, match="is a file"):
        tokenizer.main(["train", text, text])


def test_train_names_all_that_is_wrong(text, tmp_path):
    with pytest.raises(UsageError, match=r"(?s)--max-bytes 0.*--vocab-size 3: .*257"):
        tokenizer.main(
            ["train", text, str(tmp_path / "x"), "--vocab-size", "3", "--max-bytes", "0"]
        )
    with pytest.raises(UsageError, match="leave it out"):
        tokenizer.main(
            ["train", text, str(tmp_path / "x"), "--vocab-size", "300", "--kind", "char"]
        )
    with pytest.raises(UsageError, match="no such file"):
        tokenizer.main(["train", str(tmp_path / "missing"), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_out_below_a_file_is_refused(text, tmp_path):
    with pytest.raises(UsageError, match="cannot be created"):
        tokenizer.main(["train", text, f"{text}/tok"])


def test_compare_measures_held_out_text(text, tmp_path, capsys):
    tokenizer.main(["train", text, str(tmp_path / "run" / "tokenizer"), "--vocab-size", "300"])
    capsys.readouterr()
    small = write_gpt2_folder(tmp_path / "small")
    result = compare(capsys, text, tmp_path / "run", "byte", "char", "bpe", small)
    rows = {row["tokenizer"]: row for row in result["tokenizers"]}
    assert list(rows) == [str(tmp_path / "run"), "byte", "char", "bpe", str(small)]
    held_out = WORDS * 20
    assert result["documents"] == 1
    assert result["bytes"] == len(held_out.encode())
    assert rows["byte"]["tokens"] == result["bytes"] and rows["byte"]["bytes_per_token"] == 1
    assert rows["char"]["tokens"] == len(held_out)
    expected = len(read_tokenizer(tmp_path / "run" / "tokenizer").encode(held_out))
    assert rows[str(tmp_path / "run")]["tokens"] == expected
    for row in rows.values():
        assert (
            row["round_trip"] is True
            and row["mb_per_second"] > 0
            and row["ratio_to_gpt2"] is None
            and row["error"] is None
        )
        assert row["bytes_per_token"] == result["bytes"] / row["tokens"]


def test_compare_reports_a_missing_character_in_its_row(text, tmp_path, capsys):
    train_tokenizer("char", ["the cat"], -1).save(tmp_path / "letters")
    assert tokenizer.main(["compare", text, str(tmp_path / "letters"), "byte"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "letters" in line)
    assert (
        "no: the character" in row
        and "is not among this tokenizer's 6 characters" in row
        and "--tokenizer" not in row
    )
    assert any(line.startswith("byte ") and line.endswith("exact") for line in lines)
    broken, byte = compare(capsys, text, tmp_path / "letters", "byte")["tokenizers"]
    assert (
        broken["tokens"] is None and broken["round_trip"] is None and "character" in broken["error"]
    )
    assert byte["error"] is None


def test_compare_sees_text_that_does_not_come_back(text):
    class Lossy(Tokenizer):
        def encode_batch(self, texts, threads=1):
            return super().encode_batch([text.replace("—", "-") for text in texts])

    lossy = Lossy("byte", [bytes([i]) for i in range(256)])
    assert tokenizer.measure("lossy", lossy, [WORDS]).round_trip is False
    assert (
        "NO: the bytes differ"
        in list(tokenizer.table([tokenizer.measure("lossy", lossy, [WORDS])]))[1]
    )


def test_max_bytes_cuts_at_a_character(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aa\n" * 100)
    (tmp_path / "b.txt").write_text("é" * 10, encoding="utf-8")
    result = compare(capsys, tmp_path, "byte", "--max-bytes", "0.5e1")
    assert result["bytes"] == 4
    with pytest.raises(UsageError, match="less than the first character"):
        tokenizer.main(["compare", str(tmp_path), "byte", "--max-bytes", "1"])


def test_many_documents_are_all_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer, "BATCH_BYTES", 10)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "word " * i}) + "\n" for i in range(1, 100))
    )
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": "word " * i}) + "\n" for i in range(1, 10))
    )
    result = compare(capsys, tmp_path, "byte")
    assert result["documents"] == 9 and result["bytes"] == result["tokenizers"][0][
        "tokens"
    ] == 5 * sum(range(1, 10))


def test_compare_says_when_gpt2_cannot_be_had(text, monkeypatch, capsys):
    """The network's fault, not the user's: exit code 1."""
    hasten(monkeypatch, [])
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    assert __main__.main(["tokenizer", "compare", text, "gpt2"]) == 1
    assert "no connection" in capsys.readouterr().err


def test_compare_names_every_wrong_tokenizer(text, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UsageError,
        match=r"(?s)--max-bytes -1.*gtp2: no such folder.*bpe, bpe-llama, char, byte"
        r".*empty holds no token",
    ):
        tokenizer.main(["compare", text, "gtp2", str(tmp_path / "empty"), "--max-bytes", "-1"])
    with pytest.raises(UsageError, match="merge 0"):
        tokenizer.main(
            [
                "compare",
                text,
                str(
                    write_gpt2_folder(
                        tmp_path / "bad",
                        merges=[("h", "e"), ("he", "l")],
                        change=lambda encoder: encoder.update({"he": 257, "hel": 256}),
                    )
                ),
            ]
        )


@needs_gpt2
def test_compare_with_gpt2(text, tmp_path, capsys, monkeypatch):
    """The ratio is to GPT-2's wherever it is in the table; it is added when it is at hand, and only
    then."""
    row, gpt2 = compare(capsys, text, "byte", GPT2_FOLDER)["tokenizers"]
    assert gpt2["ratio_to_gpt2"] == 1 and row["ratio_to_gpt2"] == 1 / gpt2["bytes_per_token"] < 0.5
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    assert [row["tokenizer"] for row in compare(capsys, text, "byte")["tokenizers"]] == ["byte"]
    read_tokenizer(GPT2_FOLDER).save(tmp_path / "base" / "tokenizers" / "gpt2")
    assert [row["tokenizer"] for row in compare(capsys, text, "byte")["tokenizers"]] == [
        "byte",
        "gpt2",
    ]
    assert [row["tokenizer"] for row in compare(capsys, text, "gpt2")["tokenizers"]] == ["gpt2"]
    assert tokenizer.main(["compare", text]) == 0
    assert "of GPT-2's" in capsys.readouterr().out


def test_a_damaged_gpt2_that_nobody_named_is_left_out(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    write_gpt2_folder(tmp_path / "base" / "tokenizers" / "gpt2")
    assert tokenizer.main(["compare", text, "byte"]) == 0
    assert "left out" in capsys.readouterr().err


def test_inspect(tmp_path, capsys):
    folder = write_gpt2_folder(tmp_path / "small")
    assert tokenizer.main(["inspect", str(folder), "--text", "hell é"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kind           bpe, split pattern: GPT-2's"
    assert "261 ids" in lines[1] and read_tokenizer(folder).fingerprint in lines[2]
    assert "<|endoftext|>, id 260" in lines[3]
    assert "5 bytes  ' hell'" in lines[4]
    assert [line.split() for line in lines[-4:]] == [
        ["258", "'hell'"],
        ["220", "'", "'"],
        ["127", "b'\\xc3'"],
        ["102", "b'\\xa9'"],
    ]
    assert tokenizer.main(["inspect", str(folder), "--text", "hell é", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["kind"], described["vocab_size"], described["bytes"]) == ("bpe", 261, 7)
    assert described["ids"][-4:] == [258, 220, 127, 102]
    assert described["tokens"][-2:] == ["b'\\xc3'", "b'\\xa9'"]
    assert described["special_ids"] == {"<|endoftext|>": 260}
    train_tokenizer("byte", [], -1).with_specials(["<|turn_end|>"]).save(tmp_path / "chat")
    assert tokenizer.main(["inspect", str(tmp_path / "chat")]) == 0
    assert "<|turn_end|>, id 257\n" in capsys.readouterr().out
    assert tokenizer.main(["inspect", "byte", "--text", ""]) == 0
    assert "0 tokens for 0 bytes" in capsys.readouterr().out
    train_tokenizer("char", ["cab"], -1).save(tmp_path / "letters")
    assert tokenizer.main(["inspect", str(tmp_path / "letters")]) == 0
    assert "characters     'abc'" in capsys.readouterr().out
    with pytest.raises(UsageError, match="fitted to data"):
        tokenizer.main(["inspect", "bpe"])
    with pytest.raises(
        UsageError, match=r"bpee: no such folder, and not a name of a tokenizer \(byte, gpt2\)"
    ):
        tokenizer.main(["inspect", "bpee"])
    with pytest.raises(UsageError, match="'ß'"):
        tokenizer.main(["inspect", str(tmp_path / "letters"), "--text", "ß"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["fit"],
        ["compare"],
        ["train", "x"],
        ["train", "x", "y", "--kind", "gpt2"],
        ["inspect", "byte", "--te", "x"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        tokenizer.main(argv)
    assert exit_.value.code == 2
    assert "usage: nanochat tokenizer" in capsys.readouterr().err


def test_help_shows_every_flag_and_imports_nothing_heavy():
    code = (
        "import sys; from nanochat.apps import tokenizer; tokenizer.build_parser().print_help(); "
        "assert not {'torch', 'numpy', 'tiktoken', 'rustbpe'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert all(
        flag in shown
        for flag in (
            "train",
            "compare",
            "inspect",
            "--kind",
            "--vocab-size",
            "--max-bytes",
            "--json",
            "--text",
        )
    )
