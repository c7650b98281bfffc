"""The interactive mode of `nanochat sample`: in this process, in a pipe, and on a terminal."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nanochat.apps.sample.drawing import load_subject
from nanochat.apps.sample.session import Session
from nanochat.apps.sample.terminal import MOST_LINES, History
from nanochat.common import UsageError
from nanochat.data.chat import render, with_chat
from nanochat.data.tokenizer import train_tokenizer
from nanochat.eval.writer import Writer
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import checkpoint

ROOT = Path(__file__).resolve().parent.parent
LETTERS = " :abcdefghijklmnopqrstuvwxyz"
ARGS = Namespace(device_type="cpu", dtype="float32", chat=False, system="")
SETTINGS = {
    "max_new_tokens": 5,
    "temperature": 0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "stop": (),
}


def made_run(folder, favourites, letters=LETTERS, max_seq_len=1024, chat=False):
    """A run folder whose model at step N always finds one letter the likeliest: favourites[N]."""
    tokenizer = train_tokenizer("char", [letters], -1)
    if chat:
        tokenizer = with_chat(tokenizer)
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text("{}")
    config = GPTConfig(
        depth=1,
        width=16,
        head_dim=8,
        n_head=2,
        n_kv_head=2,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=max_seq_len,
        window_pattern="L",
        arch="llama",
        key_shift=False,
    )
    for step, letter in favourites.items():
        model = build(config, "cpu", torch.float32, seed=1)
        with torch.no_grad():
            # every text ends at the same place, which the head finds
            for block in model.blocks:
                block.attention.out.weight.zero_()
                block.mlp.down.weight.zero_()
            model.embedding.weight.fill_(1.0)
            model.head.weight.zero_()
            model.head.weight[tokenizer.encode(letter)] = 1.0
        state = {"tokenizer": tokenizer.fingerprint}
        checkpoint.save(folder, step, "permanent", model, {}, state)
    checkpoint.mark_best(folder, min(favourites))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("runs") / "d1", {100: "x", 200: "y"})


@pytest.fixture
def session(run):
    session = Session(load_subject(run, -1, ARGS), dict(SETTINGS), ARGS, on_terminal=False)
    yield session
    session.close()


def talk(session, capsys, *lines):
    """(standard output, standard error) of these lines and the end of input."""
    rest = iter(lines)
    session.run([], lambda: next(rest, None))
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_a_conversation(session, run, capsys):
    lines = ["a: ", "", "/continue", "/step 100", "/again", "b", "/step best", "/new", "/quit", "c"]
    out, problems = talk(session, capsys, *lines)
    assert out.splitlines() == [
        "a: yyyyy",
        "yyyyy",
        f"{run}, step 100",
        # the last text was the continuation
        "a: yyyyyxxxxx",
        "bxxxxx",
        f"{run}, step 100",
        "xxxxx",
    ]
    assert problems == ""


# ---- with --chat ----

TALKING = Namespace(device_type="cpu", dtype="float32", chat=True, system="be kind")


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "talks"
    return made_run(folder, {100: "x", 200: "y"}, chat=True)


@pytest.fixture
def talking(chat_run, monkeypatch):
    """(session, the ids of each request)."""
    subject = load_subject(chat_run, -1, TALKING)
    session = Session(subject, dict(SETTINGS), TALKING, on_terminal=False)
    events, asked = Writer.events, []

    def noted(writer, requests):
        asked.extend(list(request.prompt) for request in requests)
        return events(writer, requests)

    monkeypatch.setattr(Writer, "events", noted)
    yield session, asked
    session.close()


def told(session, *contents, begun=None):
    """The ids that ask for an answer to the last of these contents, the user's and the assistant's
    in turn. begun: how the answer begins."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]
    messages.insert(0, {"role": "system", "content": "be kind"})
    tokenizer = session.subject.tokenizer
    if begun is not None:
        messages.append({"role": "assistant", "content": begun})
        return render(tokenizer, messages)[0][:-1].tolist()
    return render(tokenizer, messages, generation_prompt=True)[0].tolist()


def test_a_talk_of_several_turns(talking, chat_run, capsys):
    """Each message is answered with those before in mind; only answers are printed."""
    session, asked = talking
    lines = ["hello", "/continue", "who", "/step 100", "/again", "me", "/new", "a", "/compare 200"]
    out, problems = talk(session, capsys, *lines)
    assert asked == [
        told(session, "hello"),
        told(session, "hello", begun="yyyyy"),
        told(session, "hello", "yyyyyyyyyy", "who"),
        told(session, "hello", "yyyyyyyyyy", "who"),
        told(session, "hello", "yyyyyyyyyy", "who", "xxxxx", "me"),
        told(session, "a"),
        told(session, "a"),
    ]
    assert out.splitlines()[:7] == [
        "yyyyy",
        "yyyyy",
        "yyyyy",
        f"{chat_run}, step 100",
        "xxxxx",
        "xxxxx",
        "xxxxx",
    ]
    assert "yyyyy" in out.splitlines()[-1]
    assert problems == "a new conversation begins with the next message\n"


def test_a_message_that_cannot_be_read_leaves_the_talk_as_it_was(talking, capsys):
    session, asked = talking
    out, problems = talk(session, capsys, "hello", "?!", "who")
    assert asked[-1] == told(session, "hello", "yyyyy", "who")
    assert "the character '?'" in problems


def test_help_of_a_talk(talking, capsys):
    out, _ = talk(talking[0], capsys, "/help", "/again")
    assert "a line is a message, which the model answers" in out
    assert "begin a new conversation" in out and "write a document" not in out


def test_a_run_that_cannot_talk_is_refused(run, talking, capsys):
    with pytest.raises(UsageError, match=r"--chat: .*d1 was not trained on conv.*nanochat sft"):
        load_subject(run, -1, TALKING)
    session, _ = talking
    assert "was not trained on conversations" in talk(session, capsys, f"/model {run}")[1]
    assert session.subject.chat


# ---- settings ----


def test_settings_change_what_is_written(session, capsys):
    out, problems = talk(session, capsys, "/max 2", "a", "/seed 7", "/settings")
    assert out.splitlines()[0] == "ayy" and problems == ""
    assert re.findall(r"/(\w+) +(\S+)", "\n".join(out.splitlines()[2:])) == [
        ("temp", "0"),
        ("top_k", "0"),
        ("top_p", "1.0"),
        ("min_p", "0.0"),
        ("penalty", "1.0"),
        ("max", "2"),
        ("seed", "7"),
    ]


def test_a_random_seed_is_another_one_each_time(session, capsys):
    seeds = []
    for line in ("a", "/again", "/again"):
        talk(session, capsys, line)
        seeds.append(session.seed)
    assert (
        len(set(seeds)) > 1
        and f"of the last text: {seeds[-1]}" in talk(session, capsys, "/settings")[0]
    )
    talk(session, capsys, "/temp 5", "/max 40", f"/seed {seeds[-1]}", "a")
    first = session.text
    talk(session, capsys, "/again")
    assert session.text == first != "y" * 40


@pytest.mark.parametrize(
    "line, words",
    [
        ("/nonsense", "no such command"),
        ("/temp nan", "/temp nan: must be a number from 0 up"),
        ("/top_p 0", "/top_p 0.0: must be above 0"),
        ("/min_p 2", "/min_p 2.0: must be from 0 to 1"),
        ("/penalty 0", "/penalty 0.0: must be above 0"),
        ("/max 0", "/max 0: must be at least 1"),
        ("/seed -1", "/seed -1: must be from 0"),
        ("/seed 99999999999999999999", "must be from 0 to 2^63 - 1"),
        ("/step 150", "no such checkpoint (it has: 100, 200)"),
        ("/step -5", "no such checkpoint"),
        ("/model /nowhere/d4", "/nowhere/d4 is not a run folder"),
        ("/model " + "x" * 5000, "is not a run folder"),
        ("/model a\0b", "is not a run folder"),
        ("/again", "there is no text yet"),
        ("/continue", "there is no text yet"),
        ("/compare 100", "there is no text yet"),
        ("Capital", "the character 'C'"),
        ("x" * 20_000, "need 20002 positions; this model has 10240"),
    ],
)
def test_what_is_wrong_gets_one_line_and_changes_nothing(session, run, capsys, line, words):
    out, problems = talk(session, capsys, line)
    assert words in problems and len(problems.splitlines()) == 1 and out == ""
    assert session.settings == SETTINGS and session.subject.step == 200
    assert "no text yet" in talk(session, capsys, "/continue")[1]
    assert talk(session, capsys, "a") == ("ayyyyy\n", "")


def test_steps_are_listed_and_compared(session, capsys):
    out, problems = talk(session, capsys, "/step list", "a", "/compare 100, -1")
    assert out.splitlines() == [
        "  100  the best by validation",
        "  200  in use",
        "ayyyyy",
        "--- step 100 ---",
        "axxxxx",
        "--- step 200 ---",
        "ayyyyy",
    ]
    assert problems == ""


def test_another_model_continues_the_same_prompt(session, capsys, tmp_path):
    """One with another tokenizer may not know its characters."""
    other = made_run(tmp_path / "other", {7: "b"}, letters="ab")
    out, problems = talk(session, capsys, "a", f"/model {other}", "/again", "/continue", "xyz")
    assert out.splitlines() == ["ayyyyy", f"{other}, step 7", "abbbbb", "bbbbb"]
    assert "the character 'x'" in problems and len(problems.splitlines()) == 1


def test_a_text_ends_at_the_last_position(session, capsys):
    prompt = "a" * 10_237
    out, problems = talk(session, capsys, prompt)
    assert out == prompt + "yy\n"
    assert problems.startswith("note: the text ends after 2 new tokens at the latest")


def test_damaged_weights_are_told(session, capsys):
    with torch.no_grad():
        session.writer.model.head.weight.fill_(float("nan"))
    out, problems = talk(session, capsys, "a", "/step 100", "/again")
    assert "logits are not numbers" in problems and "/step" in problems
    assert len(problems.splitlines()) == 1 and out.splitlines()[-1] == "axxxxx"


# ---- the history ----


@pytest.fixture
def base(shared_base, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_the_history_is_private_and_keeps_any_line(base):
    lines = ["one", "zwei\nlines", "\ufffd é \x1b"]
    history = History()
    for line in lines:
        history.add(line)
    assert History().lines() == lines
    assert history.path.stat().st_mode & 0o777 == 0o600
    assert history.path.parent.stat().st_mode & 0o777 == 0o700
    history.path.chmod(0o644)
    with history.path.open("ab") as file:
        file.write(b'\xff\n{"a": 1}\n"torn')
    assert History().lines() == lines and history.path.stat().st_mode & 0o777 == 0o600


def test_a_long_history_is_shortened(base):
    path = History().path
    path.write_text("".join(json.dumps(str(i)) + "\n" for i in range(2 * MOST_LINES + 1)))
    assert History().lines()[0] == str(MOST_LINES + 1)
    assert len(path.read_text().splitlines()) == MOST_LINES


def test_a_history_that_cannot_be_written_is_no_problem(base, tmp_path, capsys):
    (base / "sample").mkdir(parents=True)
    (base / "sample" / "history").symlink_to(tmp_path / "elsewhere")
    history = History()
    history.add("one")
    assert history.lines() == [] and not (tmp_path / "elsewhere").exists()
    assert "no history is kept" in capsys.readouterr().err


# ---- as a program ----

COMMAND = [sys.executable, "-m", "nanochat", "sample"]
FLAGS = ["--temperature=0", "--max-tokens=3"]


def test_lines_of_a_pipe_are_prompts(run):
    text = b"\xef\xbb\xbfa\r\nb\xff\n/temp x\n\n/step 100\n//\nc"
    done = subprocess.run(
        [*COMMAND, run, "--interactive", "--prompt=first ", *FLAGS],
        input=text,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == [
        "first yyy",
        "ayyy",
        f"{run}, step 100",
        "cxxx",
    ]
    problems = done.stderr.decode().splitlines()
    assert [line for line in problems if "Traceback" in line] == []
    assert any("U+FFFD" in line for line in problems)
    assert any("/temp needs a number" in line for line in problems)
    assert any("the character '/'" in line for line in problems)


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, argv):
        self.shown = ""
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "dumb"
            os.execv(argv[0], argv)

    def wait(self, pattern, seconds=120):
        """Read until the pattern is shown; drops all before its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} is not shown: {self.shown[-1000:]!r}"
            if select.select([self.descriptor], [], [], left)[0]:
                self.shown += os.read(self.descriptor, 4096).decode("utf-8", "replace")
        self.shown = self.shown[found.end() :]
        return found

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def interrupt(self, pattern):
        """Ctrl-C, as a person presses it: again when nothing has come of it after some seconds.

        Python's readline only sees a signal that comes while it waits for a key; one that comes
        while it handles a key is seen at the next key or signal.
        """
        for _ in range(5):
            self.type("\x03")
            try:
                return self.wait(pattern, seconds=10)
            except AssertionError as problem:
                last = problem
        raise last

    def end(self):
        """The exit code, once it has ended by itself."""
        _, status = os.waitpid(self.process, 0)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


def test_a_conversation_on_a_terminal(run):
    """Ctrl-C ends a text and a half-typed line, and leaves the program; Ctrl-D ends it."""
    terminal = Terminal([*COMMAND, run, *FLAGS])
    terminal.wait(r"step 200\. A line is a prompt.*\r\n> ")
    terminal.type("hello\n")
    terminal.wait(
        r"helloyyy\r\n\[/max reached: 3 tokens, \d+/s, seed \d+; /continue goes on\]\r\n> "
    )
    terminal.type("/max 10000\n")
    terminal.wait("> ")
    # the arrow for the line before the last
    terminal.type("\x1b[A\x1b[A\n")
    terminal.wait("helloyyyyy")
    terminal.type("\x03")
    terminal.wait(r"\[stopped after [\d,]+ tokens, .*; /continue goes on\]\r\n> ")
    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.interrupt("Ctrl-D or /quit leaves\r\n> ")
    terminal.type("/max 4\n/cont\t\n")
    terminal.wait(r"y{4}\r\n\[/max reached: 4 tokens")
    terminal.type("/compare 100 200\n")
    terminal.wait(r"step 100 +\| step 200\r\n")
    terminal.wait(r"helloxxxx +\| helloyyyy\r\n> ")
    terminal.type("\x04")
    terminal.wait("\r\n")
    assert terminal.end() == 0
