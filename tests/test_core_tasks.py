"""The CORE tasks without a model: bundles, prompts token by token, few-shot draws, statistics."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small import SHARED

from nanochat.common import UsageError
from nanochat.data.tokenizer import Tokenizer
from tasks import core

MC, SCHEMA, LM = "multiple_choice", "schema", "language_modeling"
ANSWER = {"delimiter": "\nAnswer: "}
BYTES = Tokenizer("byte", [bytes([i]) for i in range(256)])  # BOS is 256
BPE = Tokenizer("bpe", [*(bytes([i]) for i in range(256)), b"at", b"cat", b" cat", b" a"])
AT, CAT, _CAT, _A, BOS, S = (
    256,
    257,
    258,
    259,
    260,
    32,
)  # of BPE; a leading underscore is the space that a token begins with
CORE_FOLDER = SHARED / "core"
needs_core = pytest.mark.skipif(
    not (CORE_FOLDER / "core.yaml").exists(), reason=f"needs the CORE bundle in {CORE_FOLDER}"
)


def choice(query, *choices, gold=0):
    return {"query": query, "choices": list(choices), "gold": gold}


def schema(continuation, *contexts, gold=0):
    return {"context_options": list(contexts), "continuation": continuation, "gold": gold}


def lm(context, continuation):
    return {"context": context, "continuation": continuation}


def task_of(kind, shots=0, delimiter=" ", path="none.jsonl"):
    return core.Task("copa", Path(path), kind, shots, delimiter, 0.5)


def prompt_of(kind, examples, index=0, shots=0, delimiter=" ", limit=1000, tokenizer=BYTES, **crop):
    (prompt,) = core.prompts_of(
        task_of(kind, shots, delimiter), examples, tokenizer, limit, [index], **crop
    )
    assert (prompt.index, prompt.gold) == (index, examples[index].get("gold", 0))
    return prompt


def shown(prompt):
    """Rows of byte ids as text: ^ is BOS, | stands where the scored span begins."""
    rows = ["".join("^" if i == 256 else chr(i) for i in row) for row in prompt.rows]
    return [row[:start] + "|" + row[start:] for row, start in zip(rows, prompt.starts, strict=True)]


# ---- prompts in bytes: one character is one token ----

ABCD = [
    choice("A", "0", "1", gold=1),
    choice("B", "0", "1"),
    choice("C", "0", "1", gold=1),
    choice("D", "0", "1"),
]
# examples, settings, rows with their scored spans, the row of each choice, shared tokens,
# cropped tokens
CHOICES = {
    "plain": (
        [choice("Sky is", "red", "blue", gold=1)],
        {},
        ["^Sky is |red", "^Sky is |blue"],
        [0, 1],
        7,
        0,
    ),
    "an answer on its own line": (
        [choice("Can it?", "no", "yes")],
        ANSWER,
        ["^Can it?\nAnswer: |no", "^Can it?\nAnswer: |yes"],
        [0, 1],
        16,
        0,
    ),
    "choices begin alike": (
        [choice("It", "may go", "may stay", gold=1)],
        {},
        ["^It may |go", "^It may |stay"],
        [0, 1],
        7,
        0,
    ),
    "choices end alike": (
        [choice("It", "may go", "can go")],
        {},
        ["^It |may go", "^It |can go"],
        [0, 1],
        3,
        0,
    ),
    "one choice begins the other: its span is empty": (
        [choice("Fix it?\n", "Glue", "Glue it")],
        ANSWER,
        ["^Fix it?\n\nAnswer: Glue|", "^Fix it?\n\nAnswer: Glue| it"],
        [0, 1],
        21,
        0,
    ),
    "an empty choice": ([choice("Go", "", "on", gold=1)], {}, ["^Go |", "^Go |on"], [0, 1], 3, 0),
    "two of three choices read alike": (
        [choice("2+2 =", "4", "5", "4", gold=2)],
        {},
        ["^2+2 = |4", "^2+2 = |5"],
        [0, 1, 0],
        6,
        0,
    ),
    "all choices read alike": ([choice("2 =", "2", "2", gold=1)], {}, ["^2 = 2|"], [0, 0], 5, 0),
    "a choice begins with a space": (
        [choice("He", " sits.", "sits.")],
        {},
        ["^He | sits.", "^He |sits."],
        [0, 1],
        3,
        0,
    ),
    "all choices begin with a space": (
        [choice("He", " sits", " runs")],
        {},
        ["^He  |sits", "^He  |runs"],
        [0, 1],
        4,
        0,
    ),
    "white space around the query stays": (
        [choice(" Language?\nAnswer: ", "Ewe", "Twi")],
        {},
        ["^ Language?\nAnswer:  |Ewe", "^ Language?\nAnswer:  |Twi"],
        [0, 1],
        20,
        0,
    ),
    "spans begin inside a character": (
        [choice("caf", "\u00e9", "\u00e8")],
        {},
        ["^caf \u00c3|\u00a9", "^caf \u00c3|\u00a8"],
        [0, 1],
        5,
        0,
    ),
    "just short enough": (
        [choice("abcdefgh", "x", "yz")],
        {"limit": 12},
        ["^abcdefgh |x", "^abcdefgh |yz"],
        [0, 1],
        9,
        0,
    ),
    "cropped, all alike, by what the longest has too much": (
        [choice("abcdefgh", "x", "yz")],
        {"limit": 8},
        ["^efgh |x", "^efgh |yz"],
        [0, 1],
        5,
        4,
    ),
    "cropped as published, each row to its last ids": (
        [choice("abcdefgh", "x", "yz")],
        {"limit": 8, "published_crop": True},
        ["cdefgh |x", "defgh |yz"],
        [0, 1],
        0,
        4,
    ),
    "not cropped as published, where it is short enough": (
        [choice("abcdefgh", "x", "yz")],
        {"limit": 12, "published_crop": True},
        ["^abcdefgh |x", "^abcdefgh |yz"],
        [0, 1],
        9,
        0,
    ),
    "cropped into the spans": (
        [choice("abc", "three", "one", "x", "y", gold=2)],
        {"limit": 4},
        ["^|ree", "^|e", "^|"],
        [0, 1, 2, 2],
        0,
        6,
    ),
    "few-shot examples as drawn: 3, 2": (
        ABCD,
        {"index": 1, "shots": 2},
        ["^D 0\n\nC 1\n\nB |0", "^D 0\n\nC 1\n\nB |1"],
        [0, 1],
        12,
        0,
    ),
    "few-shot examples keep their white space": (
        [choice("A ", "0", "1 ", gold=1), choice("B", "0", "1")],
        {"index": 1, "shots": 1},
        ["^A  1 \n\nB |0", "^A  1 \n\nB |1"],
        [0, 1],
        9,
        0,
    ),
    "few-shot examples are cropped first": (
        ABCD,
        {"index": 1, "shots": 2, "limit": 9},
        ["^C 1\n\nB |0", "^C 1\n\nB |1"],
        [0, 1],
        7,
        5,
    ),
}
SCHEMAS = {
    "plain": (
        [schema("is full.", "The cup", "The box")],
        {},
        ["^The cup| is full.", "^The box| is full."],
        [0, 1],
        4,
        0,
    ),
    "options end alike": (
        [schema("sat", "the cat", "the rat", gold=1)],
        {},
        ["^the c|at sat", "^the r|at sat"],
        [0, 1],
        4,
        0,
    ),
    "options of different lengths": (
        [schema("had won.", "because Joan", "because Susan")],
        {},
        ["^because Jo|an had won.", "^because Sus|an had won."],
        [0, 1],
        8,
        0,
    ),
    "an option ends the other": (
        [schema("ran", "He", "So He")],
        {},
        ["^|He ran", "^So |He ran"],
        [0, 1],
        0,
        0,
    ),
    "all options read alike: nothing predicts BOS": (
        [schema("end", "same", "same", gold=1)],
        {},
        ["^|same end"],
        [0, 0],
        0,
        0,
    ),
    "two of three options read alike": (
        [schema("go", "Al", "Bo", "Al", gold=2)],
        {},
        ["^Al| go", "^Bo| go"],
        [0, 1, 0],
        0,
        0,
    ),
    "an answer on its own line": (
        [schema("x", "1", "2")],
        ANSWER,
        ["^1|\nAnswer: x", "^2|\nAnswer: x"],
        [0, 1],
        0,
        0,
    ),
    "white space stays": (
        [schema(" x ", "a 1 ", "a 2 ")],
        {},
        ["^a 1|   x ", "^a 2|   x "],
        [0, 1],
        2,
        0,
    ),
    "spans begin inside a character": (
        [schema("!", "\u00e9", "\u0169")],
        {},
        ["^\u00c3|\u00a9 !", "^\u00c5|\u00a9 !"],
        [0, 1],
        0,
        0,
    ),
    "just short enough": (
        [schema("is", "an old cup", "an old can")],
        {"limit": 14},
        ["^an old cup| is", "^an old can| is"],
        [0, 1],
        8,
        0,
    ),
    "cropped, all alike, by what the longest has too much": (
        [schema("is", "an old cup", "an old crate")],
        {"limit": 13},
        ["^old cup| is", "^old crate| is"],
        [0, 1],
        5,
        3,
    ),
    "cropped into the spans": (
        [schema("is full", "a", "xyz")],
        {"limit": 6},
        ["^|ull", "^| full"],
        [0, 1],
        0,
        6,
    ),
    "few-shot examples as drawn: 3, 1, 0": (
        [
            schema("go", "Al", "Bo"),
            schema("do", "Cy", "Di", gold=1),
            schema("is", "Ed", "Flo"),
            schema("as", "Gil", "Hal", gold=1),
        ],
        {"index": 2, "shots": 3},
        ["^Hal as\n\nDi do\n\nAl go\n\nEd| is", "^Hal as\n\nDi do\n\nAl go\n\nFlo| is"],
        [0, 1],
        22,
        0,
    ),
}
# examples, settings, text without the continuation, text with it, its row with the scored span,
# shared tokens, cropped tokens
CONTINUATIONS = {
    "plain": ([lm("I like", "tea")], {}, "I like", "I like tea", "^I like| tea", 6, 0),
    "an answer on its own line": (
        [lm("Q: 1+1", "2")],
        ANSWER,
        "Q: 1+1\nAnswer:",
        "Q: 1+1\nAnswer: 2",
        "^Q: 1+1\nAnswer:| 2",
        14,
        0,
    ),
    "the context ends in a space": (
        [lm("Ann won.\nQuestion: Who?\nAnswer: ", "Ann")],
        {},
        "Ann won.\nQuestion: Who?\nAnswer:",
        "Ann won.\nQuestion: Who?\nAnswer: Ann",
        "^Ann won.\nQuestion: Who?\nAnswer:| Ann",
        31,
        0,
    ),
    "the context ends in a space before an answer on its own line": (
        [lm(" Q: 1+1 ", "2")],
        ANSWER,
        "Q: 1+1\nAnswer:",
        "Q: 1+1\nAnswer: 2",
        "^Q: 1+1\nAnswer:| 2",
        14,
        0,
    ),
    "white space around the context": (
        [lm("\n  Once ", "upon")],
        {},
        "Once",
        "Once upon",
        "^Once| upon",
        4,
        0,
    ),
    "white space around the continuation stays": (
        [lm("Go", " on ")],
        {},
        "Go",
        "Go  on ",
        "^Go|  on ",
        2,
        0,
    ),
    "a delimiter without white space": (
        [lm("1+1", "2")],
        {"delimiter": "="},
        "1+1=",
        "1+1=2",
        "^1+1=|2",
        4,
        0,
    ),
    "more than ASCII": (
        [lm("caf\u00e9", "\u00e8")],
        {},
        "caf\u00e9",
        "caf\u00e9 \u00e8",
        "^caf\u00c3\u00a9| \u00c3\u00a8",
        5,
        0,
    ),
    "just short enough": (
        [lm("abcdefgh", "xy")],
        {"limit": 12},
        "abcdefgh",
        "abcdefgh xy",
        "^abcdefgh| xy",
        8,
        0,
    ),
    "cropped": ([lm("abcdefgh", "xy")], {"limit": 8}, "abcdefgh", "abcdefgh xy", "^efgh| xy", 4, 4),
    "cropped into the span": (
        [lm("abcdefgh", "xy")],
        {"limit": 3},
        "abcdefgh",
        "abcdefgh xy",
        "^|xy",
        0,
        9,
    ),
    "few-shot examples as drawn: 2, 1": (
        [lm("A ", "1"), lm(" B", "2 "), lm("C: ", "3")],
        {"shots": 10},
        "C: 3\n\nB 2 \n\nA",
        "C: 3\n\nB 2 \n\nA 1",
        "^C: 3\n\nB 2 \n\nA| 1",
        13,
        0,
    ),
    "few-shot examples where there is no other": (
        [lm("A", "1")],
        {"shots": 10},
        "A",
        "A 1",
        "^A| 1",
        1,
        0,
    ),
}


@pytest.mark.parametrize(
    "examples, settings, rows, row_of, shared, cropped", CHOICES.values(), ids=CHOICES
)
def test_multiple_choice(examples, settings, rows, row_of, shared, cropped):
    prompt = prompt_of(MC, examples, **settings)
    assert (shown(prompt), prompt.row_of, prompt.shared, prompt.cropped) == (
        rows,
        row_of,
        shared,
        cropped,
    )


@pytest.mark.parametrize(
    "examples, settings, rows, row_of, shared, cropped", SCHEMAS.values(), ids=SCHEMAS
)
def test_schema(examples, settings, rows, row_of, shared, cropped):
    prompt = prompt_of(SCHEMA, examples, **settings)
    assert (shown(prompt), prompt.row_of, prompt.shared, prompt.cropped) == (
        rows,
        row_of,
        shared,
        cropped,
    )


@pytest.mark.parametrize(
    "examples, settings, without, text, row, shared, cropped",
    CONTINUATIONS.values(),
    ids=CONTINUATIONS,
)
def test_language_modeling(examples, settings, without, text, row, shared, cropped):
    task = task_of(LM, settings.get("shots", 0), settings.get("delimiter", " "))
    assert core.texts_of(task, examples, 0) == [without, text]
    prompt = prompt_of(LM, examples, **settings)
    assert (shown(prompt), prompt.row_of, prompt.shared, prompt.cropped) == (
        [row],
        [0],
        shared,
        cropped,
    )


# ---- prompts in merged tokens ----


@pytest.mark.parametrize(
    "kind, examples, settings, rows, starts, row_of, shared",
    [
        # a space belongs to the token after it: " cat" and " at" differ from their first token on
        (
            MC,
            [choice("a", "cat", "cats", "at")],
            {},
            [[BOS, 97, _CAT], [BOS, 97, _CAT, 115], [BOS, 97, S, AT]],
            [2, 2, 2],
            [0, 1, 2],
            1,
        ),
        (
            MC,
            [choice("a", "cat", "cats", gold=1)],
            {},
            [[BOS, 97, _CAT], [BOS, 97, _CAT, 115]],
            [3, 3],
            [0, 1],
            2,
        ),  # an empty span
        (
            MC,
            [choice("a", " cat", "cat")],
            {},
            [[BOS, 97, S, _CAT], [BOS, 97, _CAT]],
            [2, 2],
            [0, 1],
            1,
        ),
        # in bytes the contexts end alike ("at"), in tokens they do not
        (
            SCHEMA,
            [schema("sat", "a cat", "a bat")],
            {},
            [[BOS, 97, _CAT, S, 115, AT], [BOS, 97, S, 98, AT, S, 115, AT]],
            [3, 5],
            [0, 1],
            1,
        ),
        (
            SCHEMA,
            [schema("a", "at", "cat")],
            {},
            [[BOS, AT, _A], [BOS, CAT, _A]],
            [2, 2],
            [0, 1],
            0,
        ),
        (
            LM,
            [lm("the", "cat")],
            {},
            [[BOS, 116, 104, 101, _CAT]],
            [4],
            [0],
            3,
        ),  # the delimiter is in the first scored token
        (LM, [lm("the ", "dog")], {}, [[BOS, 116, 104, 101, S, 100, 111, 103]], [4], [0], 3),
        (
            LM,
            [lm("c", "at")],
            {"delimiter": ""},
            [[BOS, CAT]],
            [1],
            [0],
            0,
        ),  # nothing of the context is left as a token
        (LM, [lm("x a", "t")], {"delimiter": ""}, [[BOS, 120, S, AT]], [2], [0], 1),
        (
            LM,
            [lm("a", "cat"), lm("a", "at")],
            {"index": 1, "shots": 1},
            [[BOS, 97, _CAT, 10, 10, 97, S, AT]],
            [6],
            [0],
            5,
        ),
        (LM, [lm("a cat at a", "cat")], {"limit": 4}, [[BOS, AT, _A, _CAT]], [3], [0], 2),
    ],
)
def test_merged_tokens(kind, examples, settings, rows, starts, row_of, shared):
    prompt = prompt_of(kind, examples, tokenizer=BPE, **settings)
    assert ([row.tolist() for row in prompt.rows], prompt.starts, prompt.row_of, prompt.shared) == (
        rows,
        starts,
        row_of,
        shared,
    )
    assert all(row.dtype == np.int32 for row in prompt.rows)


def test_prompts_come_in_the_order_asked_for_however_many(monkeypatch):
    """Texts are tokenized some at a time: their ids go to the right examples."""
    monkeypatch.setattr(core, "AT_ONCE", 2)
    examples = [
        choice("A", "x"),
        choice("B", "x", "y"),
        lm("C", "1") | choice("C", "x", "y", "z"),
        choice("D", "x", "y"),
    ]
    prompts = core.prompts_of(task_of(MC), examples, BYTES, 1000, iter([3, 0, 2, 1, 3]), threads=2)
    assert [prompt.index for prompt in prompts] == [3, 0, 2, 1, 3]
    assert [shown(prompt) for prompt in prompts] == [
        ["^D |x", "^D |y"],
        ["^A x|"],
        ["^C |x", "^C |y", "^C |z"],
        ["^B |x", "^B |y"],
        ["^D |x", "^D |y"],
    ]
    assert core.prompts_of(task_of(MC), examples, BYTES, 1000, []) == []


def test_a_text_that_the_tokenizer_lacks_characters_for():
    letters = Tokenizer("char", [b" ", b"a", b"b"])
    assert prompt_of(LM, [lm("a", "b")], tokenizer=letters).rows[0].tolist() == [3, 1, 0, 2]
    with pytest.raises(UsageError, match="'c'"):
        prompt_of(LM, [lm("a", "c")], tokenizer=letters)


# ---- few-shot draws, shuffling, cutting ----


@pytest.mark.parametrize(
    "index, n, shots, drawn",
    [
        (0, 5, 2, [4, 1]),
        (3, 5, 2, [1, 4]),
        (1, 4, 2, [3, 2]),
        (2, 4, 3, [3, 1, 0]),
        (0, 10570, 10, [7221, 1915, 123, 1486, 9540, 573, 1376, 1613, 5811, 3880]),
        (99, 100, 3, [62, 45, 80]),
        (0, 3, 10, [2, 1]),
        (1, 3, 10, [2, 0]),
        (2, 3, 10, [1, 0]),
        (0, 2, 1, [1]),  # fewer others than shots, or just as many
        (0, 1, 10, []),
        (0, 1, 0, []),
        (4, 9, 0, []),
    ],
)
def test_few_shot_draws(index, n, shots, drawn):
    assert core.shots_of(task_of(MC, shots), index, n) == drawn


def file_of(folder, *lines):
    (folder / "examples.jsonl").write_bytes(
        "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
    )
    return folder / "examples.jsonl"


@pytest.mark.parametrize(
    "limit, order", [(-1, "badcfe"), (6, "badcfe"), (7, "badcfe"), (3, "bad"), (1, "b"), (0, "")]
)
def test_examples_are_shuffled_then_cut(tmp_path, limit, order):
    """Shuffled even if nothing is cut: places in the list decide on the few-shot examples."""
    task = task_of(
        LM, path=file_of(tmp_path, *(json.dumps(lm(letter, "1")) for letter in "abcdef"))
    )
    examples, total, malformed = core.read_examples(task, limit)
    assert ("".join(example["context"] for example in examples), total, malformed) == (order, 6, 0)


def test_few_shot_examples_are_of_the_cut_list(tmp_path):
    path = file_of(tmp_path, *(json.dumps(lm(letter, letter.upper())) for letter in "abcdef"))
    examples, _, _ = core.read_examples(task_of(LM, path=path), 3)
    assert shown(prompt_of(LM, examples, shots=2)) == [
        "^d D\n\na A\n\nb| B"
    ]  # draws 2, 1 of b, a, d
    assert shown(prompt_of(LM, examples, index=1, shots=2)) == ["^d D\n\nb B\n\na| A"]  # draws 2, 0


def test_repeated_examples_stay(tmp_path):
    examples, total, malformed = core.read_examples(
        task_of(LM, path=file_of(tmp_path, *[json.dumps(lm("a", "1"))] * 3))
    )
    assert (examples, total, malformed) == ([lm("a", "1")] * 3, 3, 0)


GOOD = {MC: choice("q", "x", "y", gold=1), SCHEMA: schema("c", "x", "y", gold=1), LM: lm("c", "x")}


@pytest.mark.parametrize(
    "kind, change",
    [
        (MC, {"gold": 2}),
        (MC, {"gold": -1}),
        (MC, {"gold": True}),
        (MC, {"gold": "1"}),
        (MC, {"gold": 1.0}),
        (MC, {"gold": None}),
        (MC, {"choices": []}),
        (MC, {"choices": "xy"}),
        (MC, {"choices": ["x", 1]}),
        (MC, {"choices": {"0": "x", "1": "y"}}),
        (MC, {"choices": None}),
        (MC, {"query": 1}),
        (MC, {"query": None}),
        (MC, {"query": ["q"]}),
        (SCHEMA, {"gold": 2}),
        (SCHEMA, {"gold": -1}),
        (SCHEMA, {"gold": True}),
        (SCHEMA, {"context_options": ["x", None]}),
        (SCHEMA, {"context_options": "xy"}),
        (SCHEMA, {"continuation": 1}),
        (SCHEMA, {"continuation": None}),
        (LM, {"continuation": ""}),
        (LM, {"continuation": 1}),
        (LM, {"continuation": ["x"]}),
        (LM, {"continuation": None}),
        (LM, {"context": 1}),
        (LM, {"context": None}),
        (LM, {"context": ["c"]}),
    ],
)
def test_wrong_examples_are_counted_and_left_out(tmp_path, kind, change):
    task = task_of(
        kind, path=file_of(tmp_path, json.dumps(GOOD[kind]), json.dumps(GOOD[kind] | change))
    )
    assert core.read_examples(task) == ([GOOD[kind]], 1, 1)


@pytest.mark.parametrize("kind", core.KINDS)
def test_lines_that_are_no_example_of_the_kind(tmp_path, kind):
    whole = json.dumps(GOOD[kind])
    lines = [
        whole[:-1],
        whole[:10],
        whole + whole,
        "[" + whole + "]",
        "text",
        '"text"',
        "5",
        "null",
        "[]",
        "{}",
        '["query", "choices"]',
    ]
    lines += [json.dumps({k: v for k, v in GOOD[kind].items() if k != name}) for name in GOOD[kind]]
    lines += [json.dumps(GOOD[other]) for other in core.KINDS if other != kind]
    task = task_of(
        kind, path=file_of(tmp_path, *lines, "", "  ", whole, "\t")
    )  # blank lines count as nothing
    assert core.read_examples(task) == ([GOOD[kind]], 1, len(lines))


def test_a_line_nested_too_deep_to_parse_is_malformed(tmp_path):
    task = task_of(LM, path=file_of(tmp_path, json.dumps(GOOD[LM]), "[" * 200_000))
    assert core.read_examples(task) == ([GOOD[LM]], 1, 1)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("kind", core.KINDS)
def test_half_a_character_is_malformed_or_gets_tokens(tmp_path, kind, tokenizer):
    r"""Half of a surrogate pair (\ud83d) has no UTF-8 form; one such line ends no evaluation."""
    line = json.dumps(GOOD[kind]).replace('"x"', r'"\ud83d"')
    task = task_of(kind, path=file_of(tmp_path, json.dumps(GOOD[kind]), line))
    examples, total, malformed = core.read_examples(task)
    assert total + malformed == 2
    assert len(core.prompts_of(task, examples, tokenizer, 100, range(total))) == total


def test_an_empty_file_and_a_missing_one(tmp_path):
    assert core.read_examples(task_of(MC, path=file_of(tmp_path))) == ([], 0, 0)
    with pytest.raises(FileNotFoundError):
        core.read_examples(task_of(MC, path=tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "change, same",
    [
        ({}, True),
        ({"path": Path("elsewhere.jsonl")}, True),
        ({"chance": 0.25}, True),
        ({"shots": 1}, False),
        ({"delimiter": "\n"}, False),
        ({"kind": SCHEMA}, False),
    ],
)
def test_fingerprint_of_a_task(change, same):
    task = task_of(MC)
    other = core.Task(**vars(task) | change)
    assert (core.fingerprint_of(task, ABCD) == core.fingerprint_of(other, ABCD)) is same


def test_fingerprint_of_examples():
    task = task_of(MC)
    lists = [ABCD, ABCD[:3], [ABCD[1], ABCD[0], *ABCD[2:]], [choice("A", "0", "1"), *ABCD[1:]], []]
    assert len({core.fingerprint_of(task, examples) for examples in lists}) == len(lists)
    reordered = [dict(reversed(example.items())) for example in ABCD]
    assert core.fingerprint_of(task, reordered) == core.fingerprint_of(task, ABCD)


# ---- bundles ----

# chance levels in percent, as first published and as corrected
PERCENT = {
    "hellaswag_zeroshot": (25, 25),
    "jeopardy": (0, 0),
    "bigbench_qa_wikidata": (0, 0),
    "arc_easy": (25, 25),
    "arc_challenge": (25, 25),
    "copa": (50, 50),
    "commonsense_qa": (20, 40.3),
    "piqa": (50, 50),
    "openbook_qa": (25, 25),
    "lambada_openai": (0, 0),
    "hellaswag": (25, 25),
    "winograd": (50, 50),
    "winogrande": (50, 50),
    "bigbench_dyck_languages": (0, 0),
    "agi_eval_lsat_ar": (20, 25),
    "bigbench_cs_algorithms": (0, 0),
    "bigbench_operators": (0, 0),
    "bigbench_repeat_copy_logic": (0, 0),
    "squad": (0, 0),
    "coqa": (0, 0),
    "boolq": (62, 62),
    "bigbench_language_identification": (9.1, 25),
}
PUBLISHED_PIQA = "published are 10, multiple_choice, '\\nAnswer: '"
V1 = {label: percent for label, (percent, _) in PERCENT.items()}
V2 = {label: percent for label, (_, percent) in PERCENT.items()}


def entries():
    """{label: its entry} of the published core.yaml."""
    return {entry["label"]: entry for entry in json.loads(core.published_yaml())["icl_tasks"]}


def table(percent):
    return "Eval Task,#shots,Random baseline\nmmlu,5,25\n" + "".join(
        f"{label},0,{value}\n" for label, value in percent.items()
    )


def bundle(folder, tasks=None, percent=V1):
    """The folder of a bundle of one example a file. tasks, percent: other entries and chances."""
    for entry in entries().values():
        path = folder / "eval_data" / entry["dataset_uri"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(GOOD[entry["icl_task_type"]]) + "\n")
    published = core.published_yaml() if tasks is None else json.dumps({"icl_tasks": list(tasks)})
    (folder / "core.yaml").write_text(published)
    (folder / "eval_meta_data.csv").write_text(table(percent))
    return folder


def changed(label, **values):
    """The published entries, with some values of one changed, or removed where the value is ...."""
    tasks = entries()
    tasks[label].update(values)
    tasks[label] = {name: value for name, value in tasks[label].items() if value is not ...}
    return tasks.values()


def test_a_complete_bundle(tmp_path):
    tasks, problems, remarks = core.read_bundle(str(bundle(tmp_path)))
    assert (problems, remarks) == ({}, [])
    assert list(tasks) == list(core.LABELS) == list(PERCENT)
    assert {label: task.label for label, task in tasks.items()} == {
        label: label for label in PERCENT
    }
    squad = tmp_path / "eval_data" / "reading_comprehension" / "squad.jsonl"
    assert tasks["squad"] == core.Task("squad", squad, LM, 10, " ", 0.0)
    assert vars(tasks["piqa"]) | {"path": None} == {
        "label": "piqa",
        "path": None,
        "kind": MC,
        "shots": 10,
        "delimiter": "\nAnswer: ",
        "chance": 0.5,
    }
    assert tasks["hellaswag"].path == tasks["hellaswag_zeroshot"].path
    assert all(core.read_examples(task)[1:] == (1, 0) for task in tasks.values())


def test_what_yaml_may_leave_open(tmp_path):
    """A number for the shots, no delimiter, any order, comments: as in bundles written by hand."""
    bundle(tmp_path, reversed(changed("piqa", num_fewshot=10)))
    text = (tmp_path / "core.yaml").read_text().replace(', "continuation_delimiter": " "', "")
    assert text.count("continuation_delimiter") == 5
    (tmp_path / "core.yaml").write_text("# by hand\n" + text)
    tasks, problems, remarks = core.read_bundle(tmp_path)
    assert (list(tasks), problems, remarks) == (list(core.LABELS), {}, [])


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"icl_tasks",
        b"icl_tasks:",
        b"icl_tasks: 3",
        b"tasks: []",
        b"[]",
        b"icl_tasks: [copa]",
        b"icl_tasks: {label: copa}",
        b"icl_tasks: [{dataset_uri: a.jsonl}]",
        b"icl_tasks: [{label: [copa]}]",
        b"icl_tasks: [",
        b"a: b: c",
        b"icl_tasks: \0",
        b"icl_tasks: \xff",
        b"icl_tasks: !!python/object/apply:os.getcwd []",
        b"icl_tasks: 2024-99-99",
    ],
)
def test_no_list_of_tasks(tmp_path, content):
    bundle(tmp_path)
    (tmp_path / "core.yaml").unlink()
    if content is not None:
        (tmp_path / "core.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"CORE bundle: .*core\.yaml") as error:
        core.read_bundle(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"Task,Chance\ncopa,50\n",
        b"Eval Task\ncopa\n",
        b"Eval Task,Random baseline\ncop\xe4,50\n",
    ],
)
def test_no_table_of_chances(tmp_path, content):
    bundle(tmp_path)
    (tmp_path / "eval_meta_data.csv").unlink()
    if content is not None:
        (tmp_path / "eval_meta_data.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"CORE bundle: .*eval_meta_data\.csv"):
        core.read_bundle(tmp_path)


def test_a_folder_that_is_a_file_or_missing(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "none"):
        with pytest.raises(UsageError, match=f"CORE bundle: .*{name}"):
            core.read_bundle(tmp_path / name)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"dataset_uri": "../../x.jsonl"}, "leads out of eval_data"),
        ({"dataset_uri": "/etc/passwd"}, "leads out of eval_data"),
        ({"dataset_uri": "a/../../core.yaml"}, "leads out of eval_data"),
        ({"dataset_uri": "none.jsonl"}, "none.jsonl is missing"),
        ({"dataset_uri": "reading_comprehension"}, "is missing"),
        ({"dataset_uri": ...}, "dataset_uri"),
        ({"dataset_uri": "a" * 300}, "aaa"),
        ({"dataset_uri": 5}, "its entry in core.yaml or eval_meta_data.csv is invalid"),
        ({"dataset_uri": "a\0b"}, "is missing"),
        ({"icl_task_type": "cloze"}, "'cloze'"),
        ({"icl_task_type": ...}, "icl_task_type"),
        ({"icl_task_type": ["schema"]}, "schema"),
        ({"icl_task_type": None}, "None"),
        ({"num_fewshot": [-1]}, "num_fewshot -1"),
        ({"num_fewshot": -1}, "num_fewshot -1"),
        ({"num_fewshot": []}, "its entry in core.yaml or eval_meta_data.csv is invalid"),
        ({"num_fewshot": ...}, "num_fewshot"),
        ({"num_fewshot": [None]}, "num_fewshot None"),
        ({"num_fewshot": ["3"]}, "num_fewshot '3'"),
        ({"num_fewshot": 1.5}, "num_fewshot 1.5"),
        ({"num_fewshot": True}, "num_fewshot True"),
        ({"continuation_delimiter": 5}, "continuation_delimiter 5"),
        ({"continuation_delimiter": None}, "continuation_delimiter None"),
    ],
)
def test_a_badly_described_task_is_a_problem_of_its_own(tmp_path, values, words):
    folder = bundle(tmp_path / "a" / "bundle", changed("copa", **values))
    (tmp_path / "a" / "x.jsonl").write_text(json.dumps(GOOD[MC]))  # is there, and is not to be read
    tasks, problems, remarks = core.read_bundle(folder)
    assert list(problems) == ["copa"] and words in problems["copa"] and "\n" not in problems["copa"]
    assert list(tasks) == [label for label in core.LABELS if label != "copa"]
    assert remarks == []


def test_an_entry_that_is_a_list_is_no_task(tmp_path):
    with pytest.raises(UsageError, match="core.yaml"):
        core.read_bundle(bundle(tmp_path, [*entries().values(), ["copa"]]))


def test_labels_missing_from_the_list_and_from_the_table(tmp_path):
    bundle(
        tmp_path,
        [entry for label, entry in entries().items() if label != "squad"],
        {label: percent for label, percent in V1.items() if label != "boolq"},
    )
    tasks, problems, remarks = core.read_bundle(tmp_path)
    assert list(problems) == ["squad", "boolq"] and len(tasks) == 20 and remarks == []
    assert "core.yaml does not name it" in problems["squad"]
    assert "eval_meta_data.csv" in problems["boolq"] and "boolq" in problems["boolq"]


def test_a_missing_file(tmp_path):
    bundle(tmp_path)
    path = tmp_path / "eval_data" / "language_understanding" / "hellaswag.jsonl"
    path.unlink()
    tasks, problems, _ = core.read_bundle(tmp_path)
    assert problems == {
        "hellaswag_zeroshot": f"{path} is missing",
        "hellaswag": f"{path} is missing",
    }
    assert len(tasks) == 20


@pytest.mark.parametrize("percent", ["100", "-1", "101", "nan", "inf", "", "half"])
def test_impossible_chances(tmp_path, percent):
    _, problems, _ = core.read_bundle(bundle(tmp_path, percent=V1 | {"copa": percent}))
    assert list(problems) == ["copa"] and "eval_meta_data.csv" in problems["copa"]


def test_other_tasks_are_left_out_with_a_remark(tmp_path):
    others = [{"label": "mmlu", "dataset_uri": "mmlu.jsonl"}, {"label": "aime"}]
    tasks, problems, remarks = core.read_bundle(bundle(tmp_path, [*entries().values(), *others]))
    assert (list(tasks), problems) == (list(core.LABELS), {})
    assert remarks == ["not of the 22 CORE tasks, ignored: 'aime', 'mmlu'"]


@pytest.mark.parametrize("label", [3, None])
def test_other_tasks_may_have_any_label(tmp_path, label):
    tasks, problems, remarks = core.read_bundle(
        bundle(tmp_path, [*entries().values(), {"label": label}, {"label": "mmlu"}])
    )
    assert (list(tasks), problems, len(remarks)) == (list(core.LABELS), {}, 1)


@pytest.mark.parametrize(
    "values, words",
    [
        (
            {"num_fewshot": [5]},
            "piqa: 5 shots, multiple_choice, delimiter '\\nAnswer: '; " + PUBLISHED_PIQA,
        ),
        (
            {"continuation_delimiter": " "},
            "piqa: 10 shots, multiple_choice, delimiter ' '; " + PUBLISHED_PIQA,
        ),
        (
            {"icl_task_type": "schema"},
            "piqa: 10 shots, schema, delimiter '\\nAnswer: '; " + PUBLISHED_PIQA,
        ),
    ],
)
def test_a_task_unlike_the_published_one_is_used_with_a_remark(tmp_path, values, words):
    tasks, problems, remarks = core.read_bundle(bundle(tmp_path, changed("piqa", **values)))
    assert (problems, remarks) == ({}, [words])
    published = entries()["piqa"] | values
    assert [tasks["piqa"].shots] == published["num_fewshot"]
    assert (tasks["piqa"].kind, tasks["piqa"].delimiter) == (
        published["icl_task_type"],
        published["continuation_delimiter"],
    )


@pytest.mark.parametrize(
    "baselines, given, expected",
    [
        ("v1", V1, V1),
        ("v2", V1, V2),
        ("v1", V2, V1),
        ("v2", V2, V2),  # a table with the corrected values already
        (
            "v2",
            V1 | {"commonsense_qa": 30, "copa": 20, "boolq": 9.1},
            V2 | {"commonsense_qa": 30, "copa": 20, "boolq": 9.1},
        ),  # its own stay
        (
            "v1",
            V1 | {"agi_eval_lsat_ar": 21, "piqa": 40.3},
            V1 | {"agi_eval_lsat_ar": 21, "piqa": 40.3},
        ),
    ],
)
def test_baselines(tmp_path, baselines, given, expected):
    tasks, problems, _ = core.read_bundle(bundle(tmp_path, percent=given), baselines)
    assert problems == {}
    assert {label: task.chance for label, task in tasks.items()} == {
        label: percent / 100 for label, percent in expected.items()
    }


# ---- the published bundle ----


@needs_core
@pytest.mark.parametrize(
    "baselines, name", [("v1", "eval_meta_data.csv"), ("v2", "eval_meta_data_v2.csv")]
)
def test_published_bundle(baselines, name):
    tasks, problems, remarks = core.read_bundle(CORE_FOLDER, baselines)
    assert (list(tasks), problems, remarks) == (list(core.LABELS), {}, [])
    with open(CORE_FOLDER / name, encoding="utf-8", newline="") as f:
        percent = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(f)}
    assert {label: task.chance for label, task in tasks.items()} == {
        label: percent[label] / 100 for label in core.LABELS
    }
    assert {label: percent[label] for label in core.LABELS} == (V1 if baselines == "v1" else V2)
    uris = {
        label: str(task.path.relative_to(CORE_FOLDER / "eval_data"))
        for label, task in tasks.items()
    }
    assert uris == {label: entry["dataset_uri"] for label, entry in entries().items()}


@needs_core
def test_published_examples():
    """Every line of every file is an example of its kind, and gets a prompt."""
    tasks, _, _ = core.read_bundle(CORE_FOLDER)
    found = {
        label: core.read_examples(task, 500)
        for label, task in tasks.items()
        if label != "hellaswag_zeroshot"
    }
    assert {label: total for label, (_, total, _) in found.items()} == {
        "jeopardy": 2117,
        "bigbench_qa_wikidata": 20321,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "copa": 100,
        "commonsense_qa": 1221,
        "piqa": 1838,
        "openbook_qa": 500,
        "lambada_openai": 5153,
        "hellaswag": 10042,
        "winograd": 273,
        "winogrande": 1267,
        "bigbench_dyck_languages": 1000,
        "agi_eval_lsat_ar": 230,
        "bigbench_cs_algorithms": 1320,
        "bigbench_operators": 210,
        "bigbench_repeat_copy_logic": 32,
        "squad": 10570,
        "coqa": 7983,
        "boolq": 3270,
        "bigbench_language_identification": 10000,
    }
    assert {label: malformed for label, (_, _, malformed) in found.items() if malformed} == {}
    for label, (examples, _, _) in found.items():
        for prompt in core.prompts_of(
            tasks[label], examples, BYTES, 10**6, range(0, len(examples), 100)
        ):
            assert all(
                row[0] == 256 and 1 <= start <= len(row)
                for row, start in zip(prompt.rows, prompt.starts, strict=True)
            )
            assert len(prompt.row_of) == len(
                examples[prompt.index].get(
                    "choices", examples[prompt.index].get("context_options", [0])
                )
            )
            assert prompt.cropped == 0


@needs_core
def test_published_order():
    """Literal texts: another shuffle, cut or draw measures something else under the same name."""
    tasks, _, _ = core.read_bundle(CORE_FOLDER)
    examples, _, _ = core.read_examples(tasks["copa"])
    assert [example["query"] for example in examples[:3]] == [
        "Political violence broke out in the nation, therefore",
        "The kidnappers released the hostage, because",
        "The bowling ball knocked over the bowling pins, because",
    ]
    examples, _, _ = core.read_examples(tasks["arc_easy"], 500)
    text = core.texts_of(tasks["arc_easy"], examples, 7)[3]
    assert text.startswith(
        "Question: Which calculation is used to determine acceleration?\n"
        "Answer: divide change in velocity by change in time\n\nQuestion: "
    )
    assert text.endswith(
        "\n\nQuestion: Which tool is best used to observe a soil sample?\nAnswer: hand lens\n\n"
        "Question: Which event is an example of conduction?\n"
        "Answer: Cold water is heated in a microwave oven."
    )
    assert text.count("\nAnswer: ") == 11


# ---- statistics ----


def result(correct, chance=0.25, file="a.jsonl", fingerprint="f"):
    return SimpleNamespace(correct=correct, chance=chance, fingerprint=fingerprint, file=file)


def answers(right, wrong):
    return "1" * right + "0" * wrong


def width(*results, others=None):
    low, high = core.interval(dict(enumerate(results)), others)
    return high - low


@pytest.mark.parametrize(
    "accuracy, chance, expected",
    [
        (0.25, 0.25, 0),
        (1, 0.25, 1),
        (0.625, 0.25, 0.5),
        (0, 0.5, -1),
        (0.31, 0.62, -0.31 / 0.38),
        (0.4, 0, 0.4),
        (0.403, 0.2, 0.25375),
    ],
)
def test_centered(accuracy, chance, expected):
    assert core.centered(accuracy, chance) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "correct, expected",
    [
        (
            [1, 0, 0, 1],
            0.28867513459481287,
        ),  # variance 4 * 0.25 / 3, over 4 examples, and of that the root
        ([1, 0], 0.5),
        ([1, 1, 1], 0),
        ([1], None),
        ([0], None),
        ([], None),
    ],
)
def test_standard_error(correct, expected):
    assert core.standard_error(correct) == pytest.approx(expected, abs=1e-15)


def test_metric():
    assert core.metric([0.5, -0.25, 0.5]) == 0.25


@pytest.mark.parametrize(
    "results, middle, half",
    [
        # accuracy 0.7, standard error sqrt(0.7 * 0.3 / 400) = 0.02291; both times 1 / 0.75, and
        # 1.96 standard errors
        ([result(answers(280, 120))], 0.6, 0.05988),
        ([result(answers(280, 120), chance=0)], 0.7, 0.04491),
        # centered: 0.6, 0.2, 0.25; standard errors 0.03055, 0.04899, 0.02165: the root of the sum
        # of their squares, over 3
        (
            [
                result(answers(280, 120)),
                result(answers(240, 160), 0.5, "b.jsonl"),
                result(answers(100, 300), 0, "c.jsonl"),
            ],
            0.35,
            0.04028,
        ),
        # unlike numbers of examples count alike: 0.6 with 0.03055, 0.5 with 0.05
        ([result(answers(280, 120)), result(answers(50, 50), 0, "b.jsonl")], 0.55, 0.05743),
    ],
)
def test_interval_is_near_the_normal_approximation(results, middle, half):
    low, high = core.interval(dict(enumerate(results)))
    assert low == pytest.approx(middle - half, abs=0.1 * half)
    assert high == pytest.approx(middle + half, abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_confidence():
    low, high = core.interval({"a": result(answers(280, 120))}, confidence=0.5)
    assert (high - low) / 2 == pytest.approx(0.6745 * 0.03055, rel=0.1)


def test_interval_is_the_same_each_time():
    results = {"a": result(answers(30, 20)), "b": result(answers(7, 9), 0.5, "b.jsonl")}
    np.random.seed(1)
    first = core.interval(results)
    np.random.seed(2)
    assert core.interval(results) == first
    assert first[0] < 0.28 < first[1]  # the mean of 0.35 / 0.75 and -0.0625 / 0.5 is 0.17


@pytest.mark.parametrize(
    "correct, chance, expected",
    [
        ("1" * 9, 0.25, 1),
        ("1" * 9, 0.62, 1),
        ("0" * 9, 0.5, -1),
        ("0" * 9, 0, 0),
        ("1", 0, 1),
    ],
)
def test_interval_without_variance(correct, chance, expected):
    assert core.interval({"a": result(correct, chance)}) == pytest.approx(
        (expected, expected), abs=1e-12
    )
    both = {"a": result(correct, chance), "b": result("1" * 5, 0.4, "b.jsonl")}
    assert core.interval(both) == pytest.approx(((expected + 1) / 2,) * 2, abs=1e-12)


def test_tasks_of_one_file_are_resampled_together():
    """Two identical columns vary as one, two opposite ones not at all; of two files, less."""
    column, opposite = answers(240, 160), "0" * 240 + "1" * 160
    one = width(result(column))
    assert width(result(column), result(column)) == pytest.approx(one, rel=1e-9)
    assert width(result(column), result(opposite)) == pytest.approx(0, abs=1e-12)
    assert width(result(column), result(column, file="b.jsonl")) == pytest.approx(
        one / 2**0.5, rel=0.05
    )
    assert width(result(column), result(answers(234, 156))) == pytest.approx(
        one / 2**0.5, rel=0.05
    )  # cut otherwise: other examples


def test_a_run_against_itself_and_against_its_opposite():
    results = {
        "a": result("10110", 0.5),
        "b": result("10110", 0.25),
        "c": result("0011", 0, "c.jsonl"),
    }
    assert core.interval(results, results) == (0, 0)
    right, wrong = {"a": result("111", 0.5)}, {"a": result("000", 0.5)}
    assert core.interval(right, wrong) == pytest.approx((2, 2))
    assert core.interval(wrong, right) == pytest.approx((-2, -2))


def test_difference_of_runs_that_mostly_agree():
    """Of 400 examples, 30 are right in the first only and 10 in the second only.

    The difference is 0.05, its standard error sqrt(0.0975 / 400)."""
    first, second = answers(30, 10) + answers(180, 180), "0" * 30 + "1" * 10 + answers(180, 180)
    low, high = core.interval({"a": result(first)}, {"a": result(second)})
    assert (low + high) / 2 == pytest.approx(0.06667, abs=0.004)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.015612 / 0.75, rel=0.1)
    alone = {"a": result(first), "b": result(answers(100, 300), 0, "b.jsonl")}
    both = core.interval(
        alone, alone | {"a": result(second)}
    )  # what does not differ between them adds nothing
    assert both == pytest.approx((low / 2, high / 2), abs=1e-12)


@pytest.mark.parametrize(
    "others",
    [
        {"a": result("101", fingerprint="g"), "b": result("11")},
        {"a": result("101")},
        {"b": result("11")},
        {},
    ],
)
def test_what_cannot_be_paired(others):
    results = {"a": result("110"), "b": result("10")}
    with pytest.raises(ValueError, match="evaluated on other (examples|tasks)"):
        core.interval(results, others)


def test_other_chance_levels_cannot_be_paired():
    with pytest.raises(ValueError, match="a: centered on another chance level"):
        core.interval({"a": result("110")}, {"a": result("110", chance=0.5)})
