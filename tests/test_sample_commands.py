"""Lines of the interactive mode of `nanochat sample`, and texts side by side."""

import pytest

from nanochat.apps.sample.commands import COMMANDS, HELP, Action, Change, Prompt, completions, parse
from nanochat.apps.sample.layout import columns_of, side_by_side, wrapped
from nanochat.common import UsageError


@pytest.mark.parametrize(
    "line, asked",
    [
        ("", None),
        ("  \t", None),
        ("Once upon ", Prompt("Once upon ")),
        (" /help", Prompt(" /help")),
        ("//usr/bin", Prompt("/usr/bin")),
        ("two\nlines", Prompt("two\nlines")),
        ("/help", Action("help")),
        ("/Q", Action("quit")),
        ("/exit ", Action("quit")),
        ("/again", Action("again")),
        ("/temp 0.5", Change("temp", "temperature", 0.5)),
        ("/temperature  1", Change("temp", "temperature", 1.0)),
        ("/top-k 5", Change("top_k", "top_k", 5)),
        ("/top_p .9", Change("top_p", "top_p", 0.9)),
        ("/min_p 0", Change("min_p", "min_p", 0.0)),
        ("/penalty 1.2", Change("penalty", "repetition_penalty", 1.2)),
        ("/max 9", Change("max", "max_new_tokens", 9)),
        ("/seed 7", Change("seed", "seed", 7)),
        ("/seed random", Change("seed", "seed", None)),
        ("/model my runs/d4", Action("model", ("my runs/d4",))),
        ("/model 'my runs/d4'", Action("model", ("my runs/d4",))),
        ("/step", Action("step", ("list",))),
        ("/step list", Action("step", ("list",))),
        ("/step best", Action("step", ("best",))),
        ("/step -1", Action("step", (-1,))),
        ("/compare 100,best  -1", Action("compare", (100, "best", -1))),
    ],
)
def test_what_lines_ask_for(line, asked):
    assert parse(line) == asked


@pytest.mark.parametrize(
    "line, words",
    [
        ("/", "no such command"),
        ("/temparature 3", "did you mean /temp?"),
        ("/xyzzy", "/xyzzy: no such command; /help lists them"),
        ("/temp", "/temp needs a number, such as /temp 0.8"),
        ("/temp hot", "and 'hot' was given"),
        ("/top_k 1.5", "needs a whole number"),
        ("/max 1e3", "needs a whole number"),
        ("/seed often", "needs a whole number"),
        ("/model", "needs a run folder"),
        ("/model ''", "needs a run folder"),
        ("/step newest", "/step newest: must be the step of a checkpoint, best, or -1"),
        ("/step 1 2", "/compare takes several"),
        ("/compare", "needs steps"),
        ("/compare 1 x", "/compare x: must be"),
        ("/quit now", "takes nothing behind it"),
        ("/top_k " + "9" * 5000, "needs a whole number"),
    ],
)
def test_wrong_lines_get_one_line(line, words):
    with pytest.raises(UsageError) as raised:
        parse(line)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_the_help_is_complete():
    assert len(COMMANDS) == len(set(COMMANDS)) == len(HELP) + 1
    for usage, _ in HELP:
        command, _, value = usage.partition(" ")
        example = {"X": "1", "N": "1", "N|random": "1", "N|best|list": "1", "STEP ...": "1"}
        assert parse(f"{command} {example.get(value, value)}") is not None


def test_tab_completes_commands_and_words():
    assert completions("/te", "/te") == ["/temp "]
    assert completions("/top", "/top") == ["/top_k ", "/top_p "]
    assert completions("/seed r", "r") == ["random"]
    assert completions("/step ", "") == ["best", "list"]
    assert completions("some text", "text") == completions("/help x", "x") == []


# ---- side by side ----

TEXTS = [("step 1", "one two three\n\nfour"), ("step 20", "five")]


def test_columns_fill_the_terminal():
    expected = [
        "step 1                       | step 20",
        "---------------------------- | ----------------------------",
        "one two three                | five",
        "                             |",
        "four                         |",
    ]
    assert side_by_side(TEXTS, 59).split("\n") == expected
    assert side_by_side(TEXTS, 58) == side_by_side(TEXTS, 0)
    assert side_by_side(TEXTS, 0) == (
        "--- step 1 ---\none two three\n\nfour\n--- step 20 ---\nfive"
    )
    # alone, a text needs no columns
    assert side_by_side(TEXTS[1:], 200) == "--- step 20 ---\nfive"


@pytest.mark.parametrize("n, rows", [(2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 3, 1])])
def test_many_columns_take_several_rows(n, rows):
    shown = side_by_side([(f"step {i}", "x") for i in range(n)], 100)
    titles = [row.split("\n")[0] for row in shown.split("\n\n")]
    assert [title.count("step") for title in titles] == rows
    assert all(columns_of(line) <= 100 for line in shown.split("\n"))


@pytest.mark.parametrize(
    "text, width, lines",
    [
        ("", 5, [""]),
        ("a\n", 5, ["a", ""]),
        ("one two three", 7, ["one two", "three"]),
        ("one two three", 8, ["one two", "three"]),
        ("onetwothree", 4, ["onet", "woth", "ree"]),
        ("a onetwothree", 6, ["a", "onetwo", "three"]),
        ("\u65e5\u672c\u8a9e", 4, ["\u65e5\u672c", "\u8a9e"]),
        ("\u65e5", 1, ["\u65e5"]),
        ("e\u0301e\u0301e\u0301", 2, ["e\u0301e\u0301", "e\u0301"]),
        ("\tx", 9, ["    x"]),
    ],
)
def test_lines_are_broken_by_columns(text, width, lines):
    assert wrapped(text, width) == lines
