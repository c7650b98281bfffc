"""`nanochat sample`: flags, prompts, streams, several samples."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_generation import BOS, tiny_model

from nanochat import __main__
from nanochat.apps import sample
from nanochat.apps.sample import drawing
from nanochat.common import UsageError
from nanochat.data.chat import render, with_chat
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval import engine
from nanochat.eval.engine import Engine
from nanochat.eval.generation import generate_text
from nanochat.model.growing import grown

HELP = sample.build_parser().format_help()


@pytest.fixture(scope="module")
def model():
    return tiny_model(depth=2)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return train_tokenizer("byte", [], 0)


def scripted(monkeypatch, rows, noted=lambda: None):
    """Let the engine choose rows[s][step] for text s, and call noted() before each choice."""

    def choose(group, logits_BxV, tolerance):
        noted()
        return [rows[running.work.ticket][running.n_new] for running in group], 0

    monkeypatch.setattr(engine, "_choose", choose)


@pytest.fixture
def loaded(model, bytes_tokenizer, monkeypatch):
    """Every checkpoint is the tiny model; the list holds what load_step() was called with."""
    calls = []

    def load_step(run, step=None, device_type="", dtype="auto"):
        calls.append((run, step, device_type, dtype))
        return step or 700, model, bytes_tokenizer

    monkeypatch.setattr(drawing, "load_step", load_step)
    return calls


def test_sample_help_imports_no_torch():
    code = (
        "import sys, nanochat.apps.sample\n"
        "try: nanochat.apps.sample.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    flags = [
        "--step",
        "--prompt",
        "--prompt-from",
        "--prompts-file",
        "--num-samples",
        "--max-tokens",
        "--stop",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--interactive",
        "--json",
        "--repetition-penalty",
        "--seed",
        "--device-type",
        "--dtype",
    ]
    assert [flag for flag in flags if f"\n  {flag} " not in done.stdout] == []


def test_sample_prints_each_piece_as_it_is_drawn(loaded, capsys, monkeypatch):
    printed = []
    rows = [[*"hé".encode(), BOS]]
    scripted(monkeypatch, rows, lambda: printed.append(capsys.readouterr().out))
    assert sample.main(["out/d2", "--prompt", "Oh", "--temperature", "0"]) == 0
    assert printed == ["Oh", "h", "", "é"] and capsys.readouterr().out == "\n"
    assert loaded == [("out/d2", None, "", "auto")]


def test_sample_draws_nothing_for_a_reader_that_is_gone(loaded, monkeypatch):
    """As after `| head`: neither the rest of the text nor the other prompts."""
    calls = []
    scripted(monkeypatch, [[65] * 50] * 2, lambda: calls.append(1))
    monkeypatch.setattr("nanochat.output.reader_is_gone", lambda: len(calls) >= 3)
    prompts = ["--prompt", "Oh", "--prompt", "Ah"]
    assert sample.main(["out/d2", *prompts, "--max-tokens=50", "--seed=1"]) == 0
    assert len(calls) <= 4


def test_sample_same_seed_same_text(loaded, model, bytes_tokenizer, capsys):
    argv = [
        "out/d2",
        "--step=500",
        "--prompt=ab",
        "--max-tokens=9",
        "--device-type=cpu",
        "--dtype=float32",
        "--seed=5",
    ]
    texts = []
    for _ in range(2):
        sample.main(argv)
        texts.append(capsys.readouterr().out)
    continuation = "".join(
        generate_text(model, bytes_tokenizer, "ab", 9, temperature=0.8, top_k=50, seed=5)
    )
    assert texts == [f"ab{continuation}\n"] * 2
    assert loaded == [("out/d2", 500, "cpu", "float32")] * 2


def test_sample_several_prompts_and_samples(loaded, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("second é\n\nthird\n", encoding="utf-8")
    sample.main(
        [
            "out/d2",
            "--prompt",
            "first",
            "--prompts-file",
            str(prompts),
            "--num-samples",
            "2",
            "--max-tokens",
            "1",
            "--temperature",
            "0",
        ]
    )
    printed = capsys.readouterr().out
    for p, prompt in enumerate(["first", "second é", "third"], start=1):
        for s in (1, 2):
            assert f"--- prompt {p} of 3, sample {s} of 2 ---\n{prompt}" in printed
    assert printed.count("---\n") == 6


@pytest.mark.parametrize("n", [1, 2])
def test_sample_stops(loaded, capsys, monkeypatch, n):
    scripted(monkeypatch, [b"yes\nUser: no"] * n)
    flags = ["--stop=never", "--stop=\nUser:", "--temperature=0", f"--num-samples={n}"]
    assert sample.main(["out/d2", "--prompt=Bot: ", "--max-tokens=20", *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Bot: yes\n") == n and "User" not in printed


def test_sample_takes_a_file_or_standard_input_as_one_prompt(loaded, capsys, tmp_path, monkeypatch):
    (tmp_path / "poem.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\n  second\n\n")
    read, write = os.pipe()
    os.write(write, "dritte é".encode())
    os.close(write)
    before = os.dup(0)
    os.dup2(read, 0)
    try:
        flags = ["--prompt-from", str(tmp_path / "poem.txt"), "--prompt-from=-", "--max-tokens=1"]
        assert sample.main(["out/d2", "--prompt", "zero", *flags]) == 0
    finally:
        os.dup2(before, 0)
        for descriptor in (read, before):
            os.close(descriptor)
    printed = capsys.readouterr().out
    for p, prompt in enumerate(("zero", "first\n\n  second\n", "dritte é"), start=1):
        assert f"--- prompt {p} of 3, sample 1 of 1 ---\n{prompt}" in printed


@pytest.mark.parametrize(
    "content, words",
    [
        ("one\ntwo".encode("utf-16"), "is text in UTF-16; convert it to UTF-8: iconv"),
        (b"caf\xe9", "is not UTF-8 .byte 3 is 0xe9"),
        (b"one\0two", "is a binary file"),
        (None, "cannot be read .No such file"),
    ],
)
def test_sample_reads_a_prompt_as_it_reads_other_text(loaded, tmp_path, content, words):
    path = tmp_path / "poem.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--prompt-from={path}: {words}"):
        sample.main(["out/d2", "--prompt-from", str(path)])


def test_sample_tells_what_exceeds_the_context(loaded, capsys):
    prompts = ["--prompt", "a", "--prompt", "b" * 40, "--prompt", "c" * 317]
    assert sample.main(["out/d2", *prompts, "--max-tokens=5"]) == 0
    shown = capsys.readouterr()
    first, second = shown.err.splitlines()
    assert first.startswith("note: prompt 2 of 3: the prompt's 41 tokens exceed the 32 tokens")
    assert second.startswith("note: prompt 3 of 3: the text ends after 2 new tokens at the latest")
    assert "note" not in shown.out


def test_sample_takes_bytes_that_are_not_utf8(loaded, capsys):
    """They arrive in arguments as lone surrogates."""
    argv = [os.fsdecode(word) for word in (b"--prompt=caf\xe9", b"--stop=\xe9", b"--max-tokens=1")]
    assert sample.main(["out/d2", *argv]) == 0
    assert capsys.readouterr().out.startswith("caf?")


def test_sample_advises_no_flags_that_it_lacks(loaded, model, monkeypatch):
    """A tokenizer of characters refuses others: of a run, the tokenizer cannot be chosen anew."""
    characters = train_tokenizer("char", ["abc"], 0)
    monkeypatch.setattr(drawing, "load_step", lambda *_, **__: (1, model, characters))
    with pytest.raises(UsageError) as raised:
        sample.main(["out/d2", "--prompt=abc", "--prompt=abd"])
    message = str(raised.value)
    assert message.startswith("prompt 2 of 2: the character 'd'")
    assert set(re.findall(r"--[a-z-]+", message)) <= set(re.findall(r"--[a-z-]+", HELP))


def test_sample_names_every_bad_value_at_once(loaded):
    with pytest.raises(UsageError) as raised:
        sample.main(
            [
                "out/d2",
                "--temperature=-1",
                "--top-p=0",
                "--min-p=2",
                "--max-tokens=0",
                "--repetition-penalty=0",
                "--top-k=-2",
                "--num-samples=0",
                "--seed=-1",
                "--step=-2",
                "--stop=",
                "--prompts-file=/nowhere/prompts.txt",
            ]
        )
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "--max-tokens 0",
        "--temperature -1.0",
        "--top-k -2",
        "--top-p 0.0",
        "--min-p 2.0",
        "--repetition-penalty 0.0",
        "--seed -1",
        "--num-samples 0",
        "--step -2",
        "--stop ''",
        "--prompts-file=/nowhere/prompts.txt",
    ]
    assert loaded == []  # nothing was loaded for it


def test_sample_checks_every_prompt_before_the_first_is_continued(loaded, capsys):
    with pytest.raises(UsageError) as raised:
        sample.main(
            [
                "out/d2",
                "--prompt",
                "fits",
                "--prompt",
                "x" * 320,
                "--prompt",
                "y" * 400,
                "--max-tokens",
                "4",
            ]
        )
    assert [line.split(":")[0] for line in str(raised.value).splitlines()] == [
        "prompt 2 of 3",
        "prompt 3 of 3",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("n", [1, 2])
def test_sample_of_damaged_weights(loaded, capsys, monkeypatch, n):
    scripted(monkeypatch, [[None]] * 2)
    assert __main__.main(["sample", "out/d2", f"--num-samples={n}", "--max-tokens=9"]) == 2
    shown = capsys.readouterr().err
    assert (
        "out/d2: the model's logits are not numbers" in shown
        and "--step" in shown
        and len(shown.splitlines()) == 1
    )


def test_sample_refuses_an_empty_prompts_file(loaded, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="holds no prompt"):
        sample.main(["out/d2", "--prompts-file", str(tmp_path / "empty.txt")])


@pytest.mark.parametrize(
    "argv", [["out/d2", "--temp", "1"], ["out/d2", "--max-tokens", "many"], []]
)
def test_sample_usage_errors_of_the_parser(argv):
    with pytest.raises(SystemExit) as raised:
        sample.main(argv)
    assert raised.value.code == 2


# ---- several checkpoints ----

SEVERAL = ["out/d2", "out/d3", "--step=5", "--step=best", "--temperature=0", "--max-tokens=3"]


def test_several_runs_and_steps_continue_the_same_prompts(loaded, capsys, monkeypatch):
    """Every run at every step, one below the other where no terminal says how wide it is."""
    scripted(monkeypatch, [b"one", b"two"])
    assert sample.main([*SEVERAL, "--prompt=a ", "--prompt=b "]) == 0
    first, second = capsys.readouterr().out.split("=== prompt 2 of 2, sample 1 of 1 ===\n")
    titles = [f"--- out/{run}, step {step} ---" for run in ("d2", "d3") for step in (5, "best")]
    blocks = "".join(f"{title}\na one\n" for title in titles)
    assert first == f"=== prompt 1 of 2, sample 1 of 1 ===\n{blocks}"
    assert second == blocks.replace("a one", "b two")
    assert [call[:2] for call in loaded] == [
        ("out/d2", 5),
        ("out/d2", "best"),
        ("out/d3", 5),
        ("out/d3", "best"),
    ]


def test_json_says_what_was_drawn_and_how(loaded, model, bytes_tokenizer, capsys):
    """The seeds are those of a served completion's choices, the same for every checkpoint."""
    argv = ["out/d2", "--step=-1", "--step=5", "--prompt=ab", "--max-tokens=4", "--num-samples=2"]
    assert sample.main([*argv, "--json", "--seed=9"]) == 0
    texts = json.loads(capsys.readouterr().out)
    seeds = engine.seeds_of(9, 2)
    assert [(text["step"], text["sample"], text["seed"]) for text in texts] == [
        (step, number, seeds[number - 1]) for step in (700, 5) for number in (1, 2)
    ]
    for text in texts:
        options = {"temperature": 0.8, "top_k": 50, "seed": text["seed"]}
        drawn = generate_text(model, bytes_tokenizer, "ab", 4, **options)
        assert text["text"] == "".join(drawn)
        assert (text["end"], text["new_tokens"]) == ("length", 4)


def test_a_single_text_may_be_json(loaded, capsys, monkeypatch):
    scripted(monkeypatch, [[*b"hi", BOS]])
    assert sample.main(["out/d2", "--json"]) == 0
    (text,) = json.loads(capsys.readouterr().out)
    assert text == {
        "run": "out/d2",
        "step": 700,
        "prompt": "",
        "sample": 1,
        "seed": 42,
        "text": "hi",
        "new_tokens": 2,
        "end": "stop",
    }


def test_the_interactive_mode_is_for_one_checkpoint(loaded):
    flags = ["--interactive", "--json", "--num-samples=2", "--prompt-from=-"]
    with pytest.raises(UsageError) as raised:
        sample.main([*SEVERAL, *flags])
    for name in ("--json", "--num-samples 2", "--prompt-from -", "several runs", "several steps"):
        assert f"--interactive: cannot be combined with {name};" in str(raised.value)
    assert loaded == []


# ---- with --chat ----


@pytest.fixture
def talks(model, bytes_tokenizer, monkeypatch):
    """Every checkpoint is the tiny model with the special tokens of chats; gives its tokenizer."""
    tokenizer = with_chat(bytes_tokenizer)
    larger = grown(model, tokenizer.vocab_size)

    def load_step(run, step=None, device_type="", dtype="auto"):
        return step or 700, larger, tokenizer

    monkeypatch.setattr(drawing, "load_step", load_step)
    return tokenizer


def test_chat_prints_answers_that_end_with_the_turn(talks, capsys, monkeypatch):
    end = talks.special_ids["<|turn_end|>"]
    scripted(monkeypatch, [[*b"yes", end, 33], [*b"no", end]])
    argv = ["r", "--chat", "--prompt", "one", "--prompt", "two", "--system", "S"]
    assert sample.main(argv) == 0
    assert capsys.readouterr().out == (
        "--- prompt 1 of 2, sample 1 of 1 ---\nyes\n--- prompt 2 of 2, sample 1 of 1 ---\nno\n"
    )


def test_chat_asks_in_the_format_of_chats(talks, capsys, monkeypatch):
    asked = []
    check = Engine.check

    def noted(self, request):
        asked.append(list(request.prompt))
        check(self, request)

    monkeypatch.setattr(Engine, "check", noted)
    argv = ["r", "--chat", "--prompt", "<|turn_end|>", "--max-tokens", "2", "--json"]
    assert sample.main([*argv, "--system", "S", "--num-samples", "2"]) == 0
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "<|turn_end|>"},
    ]
    expected = render(talks, messages, generation_prompt=True)[0].tolist()
    assert asked and all(ids == expected for ids in asked)
    drawn = json.loads(capsys.readouterr().out)
    assert [text["prompt"] for text in drawn] == ["<|turn_end|>"] * 2


def test_chat_needs_a_message_and_a_model_that_talks(loaded, talks, monkeypatch):
    with pytest.raises(UsageError, match="--chat: has no message to answer; give --prompt"):
        sample.main(["r", "--chat"])
    with pytest.raises(UsageError, match="--system: needs --chat"):
        sample.main(["r", "--system", "S", "--prompt", "a"])


def test_chat_with_a_model_that_was_taught_none_is_refused(loaded):
    with pytest.raises(UsageError, match="--chat: r was not trained on conversations"):
        sample.main(["r", "--chat", "--prompt", "a"])
