"""Files of conversations: what a line may be, what is reported, cut, held out, and the order of
epochs."""

import collections
import gzip
import hashlib
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from nanochat.common import UsageError
from nanochat.data import examples
from nanochat.data.chat import render, with_chat
from nanochat.data.conversations import read_conversations
from nanochat.data.examples import Shares, Source, sources_of
from nanochat.data.tokenizer import train_tokenizer

BYTE = with_chat(train_tokenizer("byte", [], -1))
ENOUGH = 1000


def turn(role, content):
    return {"role": role, "content": content}


def asked(question, answer="yes"):
    return [turn("user", question), turn("assistant", answer)]


def line_of(messages):
    return json.dumps({"messages": messages})


def write(path, lines):
    """A file of lines, each a str, bytes or messages."""
    made = [line_of(line) if isinstance(line, list) else line for line in lines]
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in made) + b"\n"
    )
    return path


def read(*paths, tokenizer=BYTE, max_tokens=ENOUGH, **options):
    """(conversations, lines reported). Paths may be Sources."""
    said = []
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    found = read_conversations(sources, tokenizer, max_tokens, report=said.append, **options)
    return found, "\n".join(said)


@pytest.fixture
def held_out(tmp_path):
    """A file of held-out conversations: all others are learned from, in their order."""
    return write(tmp_path / "held_out.jsonl", [asked("held out")])


def texts(encoded):
    return [BYTE.decode(encoded[i][0]) for i in range(len(encoded))]


# --------------------------------------------------------------------------------------------------
# lines


def test_every_form_of_a_line(tmp_path, held_out):
    system = [turn("system", "S"), turn("user", "q")]
    answer = turn("assistant", "a")
    records = [
        {"messages": [*system, answer]},
        {"prompt": system, "answer": "a"},
        {"prompt": system, "completion": answer, "id": 7},
        {"prompt": system, "response": [answer]},
        {"prompt": "q", "answer": "a"},
        {"messages": [{**turn("user", "q"), "name": None}, answer], "source": "x"},
        {"conversations": [turn("user", "q"), answer]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    found, _ = read(
        write(tmp_path / "a.jsonl", map(json.dumps, records)), held_out=[held_out], strict=True
    )
    with_system, without = render(BYTE, [*system, answer]), render(BYTE, [system[1], answer])
    for i, (ids, mask) in enumerate([with_system] * 4 + [without] * 4):
        found_ids, found_mask = found.train[i]
        assert found_ids.dtype == np.uint32 and found_ids.tolist() == ids.tolist()
        assert found_mask.dtype == np.bool_ and found_mask.tolist() == mask.tolist()
    assert found.train.lengths.tolist() == [len(with_system[0])] * 4 + [len(without[0])] * 4
    assert found.train.n_targets == 16 == found.counts["train_targets"]


BAD = [
    (b"\xff{}", "not UTF-8 (byte 0: invalid start byte)"),
    ("{", "not JSON (Expecting property name"),
    ("[" * 100_000, "not JSON (nested too deeply)"),
    ("3", "not a JSON object but int"),
    ("{}", "neither messages nor prompt and answer (its fields: none)"),
    ('{"text": "a"}', "neither messages nor prompt and answer (its fields: text)"),
    ('{"a\\u001b[2J\\n": 1}', "neither messages nor prompt and answer (its fields: a\ufffd[2J)"),
    ('{"prompt": "a"}', "neither messages nor prompt and answer (its fields: prompt)"),
    ('{"prompt": "a", "answer": "b", "response": "c"}', "several answers: answer and response"),
    ('{"prompt": 3, "answer": "b"}', "prompt is not a string but int"),
    ('{"prompt": " ", "answer": "b"}', "prompt is empty"),
    ('{"prompt": "a", "answer": "\\n"}', "answer is empty"),
    ('{"prompt": "a", "answer": null}', "answer is not a string but NoneType"),
    (json.dumps({"prompt": "a", "answer": asked("b")}), "answer is not one message of the ass"),
    ('{"messages": "a"}', "messages is not a list but str"),
    ("[]", "not a JSON object but list"),
    (line_of([]), "no message from the user"),
    (line_of([3]), "message 1 of messages is not an object with role and content"),
    (
        line_of([turn("user", "a"), turn("human", "b")]),
        "message 2 of messages has the unknown role",
    ),
    (line_of([turn({}, "a")]), "message 1 of messages has the unknown role"),
    (line_of([turn("user", ["a"])]), "message 1 of messages: content is not a string but list"),
    (line_of(asked("a", "")), "message 2 of messages: content is empty"),
    (line_of([turn("user", "a")]), "no message of the assistant: nothing to learn"),
    (line_of(asked("a")[::-1]), "message 1 is from assistant where user is expected"),
    (line_of([turn("user", "a")] * 2), "message 2 is from user where assistant is expected"),
]


def test_bad_lines_are_named_and_skipped(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", [asked("first"), *(line for line, _ in BAD), asked("last")])
    found, said = read(path, held_out=[held_out])
    assert [problem.line for problem in found.problems] == list(range(2, len(BAD) + 2))
    for problem, (_, reason) in zip(found.problems, BAD, strict=True):
        assert problem.path == path and problem.reason.startswith(reason)
    assert [text[:26] for text in texts(found.train)] == [
        "<|bos|><|user_start|>first",
        "<|bos|><|user_start|>last<",
    ]
    assert found.counts["lines"] == len(BAD) + 3 and found.counts["bad_lines"] == len(BAD)
    assert said.startswith(f"{len(BAD)} of {len(BAD) + 3} lines cannot be used and are skipped:\n")
    assert f"  {path} line 2: not UTF-8" in said and f"and {len(BAD) - 10} more" in said


def test_bad_lines_are_refused_where_that_is_asked_for(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", [asked("a"), "{}", asked("b")])
    with pytest.raises(UsageError, match=r"--strict: 1 of 4 lines cannot.*\n.*a.jsonl line 2: nei"):
        read(path, held_out=[held_out], strict=True)
    bad_held_out = write(tmp_path / "bad.jsonl", [asked("a"), "{}"])
    with pytest.raises(UsageError, match="bad.jsonl line 2: neither"):
        read(held_out, held_out=[bad_held_out], strict=True)


def test_compressed_files_marks_and_line_ends(tmp_path, held_out):
    lines = [line_of(asked(f"{i}")) for i in range(3)]
    content = "\ufeff" + "\r\n".join([lines[0], "", " ", *lines[1:]])
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(content.encode()))
    found, _ = read(path, held_out=[held_out], strict=True)
    plain, _ = read(write(tmp_path / "b.jsonl", lines), held_out=[held_out])
    assert texts(found.train) == texts(plain.train)
    assert found.counts == plain.counts and found.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"a.jsonl holds no example \(it is empty\)"),
        ("{}\n3\n", r"a.jsonl holds no example \(line 1: neither.*line 2: not a JSON object"),
        ("[\n{}\n]", "a.jsonl is one JSON list"),
    ],
)
def test_files_without_examples_are_refused(tmp_path, held_out, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(path, held_out=[held_out])
    with pytest.raises(UsageError, match=message):
        read(held_out, held_out=[path])


def test_a_tokenizer_without_the_tokens_or_a_character(tmp_path):
    path = write(tmp_path / "a.jsonl", [asked("ab"), asked("é"), asked("ba"), asked("aa")])
    letters = train_tokenizer("char", ["abyes"], -1)
    with pytest.raises(UsageError, match="special tokens of chats"):
        read(path, tokenizer=letters)
    found, said = read(path, tokenizer=with_chat(letters))
    assert len(found.train) + len(found.held_out) == 3
    assert "a.jsonl line 2: the character 'é'" in said
    with pytest.raises(UsageError, match="line 2: the character 'é'"):
        read(path, tokenizer=with_chat(letters), strict=True)


def test_lone_surrogates_become_question_marks(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", ['{"prompt": "a\\ud800", "answer": "b"}'])
    found, _ = read(path, held_out=[held_out])
    assert texts(found.train)[0].startswith("<|bos|><|user_start|>a?<|turn_end|>")


def test_what_is_encoded_together_does_not_show(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [asked(f"{i}" * (i % 5 + 1)) for i in range(100)])
    whole, _ = read(path)
    monkeypatch.setattr(examples, "BATCH_EXAMPLES", 7)
    parts, _ = read(path, threads=2)
    assert texts(parts.train) == texts(whole.train)
    assert parts.counts == whole.counts and parts.fingerprint == whole.fingerprint


# --------------------------------------------------------------------------------------------------
# cuts


def test_long_conversations_end_with_the_last_answer_that_fits(tmp_path):
    """BOS is one token, each message its bytes and two: answers end at 1 + 3 + 5 = 9, 17 and 25."""
    messages = [*asked("1"), *asked("2"), *asked("3")]
    path = write(tmp_path / "a.jsonl", [[*messages, turn("user", "left over")]])
    whole = render(BYTE, messages)
    for max_tokens, kept, n_cut in [(26, 25, 0), (25, 25, 0), (24, 17, 1), (17, 17, 1), (9, 9, 1)]:
        found, said = read(path, max_tokens=max_tokens, held_out=[path])
        ids, mask = found.train[0]
        assert ids.tolist() == whole[0][:kept].tolist()
        assert mask.tolist() == whole[1][:kept].tolist() and mask[-1]
        assert (found.counts["cut"], found.counts["too_long"]) == (2 * n_cut, 0)
        assert ("cut after an earlier answer" in said) == bool(n_cut)
    with pytest.raises(UsageError, match="no example of .*a.jsonl can be used .2 too long"):
        read(path, max_tokens=8, held_out=[path])


def test_conversations_whose_first_answer_does_not_fit_are_left_out(tmp_path):
    short = write(tmp_path / "held_out_short.jsonl", [asked("h")])
    path = write(tmp_path / "a.jsonl", [asked("1"), asked("22"), asked("3", "no!"), asked("4")])
    found, said = read(path, max_tokens=9, held_out=[short])
    assert [text[21] for text in texts(found.train)] == ["1", "3", "4"]
    assert (found.counts["cut"], found.counts["too_long"]) == (0, 1)
    assert "longer than 9 tokens: 0 conversations cut" in said and "1 left out" in said


# --------------------------------------------------------------------------------------------------
# what is held out


def hash_of(messages):
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).digest()


def test_a_hash_of_the_content_holds_out_two_percent(tmp_path):
    conversations = [asked(f"question {i}", f"answer {i}") for i in range(2000)]
    expected = [m for m in conversations if int.from_bytes(hash_of(m)[:8], "big") * 50 < 2**64]
    assert 20 < len(expected) < 60
    found, _ = read(write(tmp_path / "a.jsonl", conversations))
    kept = [BYTE.decode(render(BYTE, messages)[0]) for messages in expected]
    assert texts(found.held_out) == kept
    assert len(found.train) == 2000 - len(expected)
    # on the same side whatever stands beside it, in whichever file
    fewer = [messages for messages in conversations if messages not in expected[10:]]
    first = write(tmp_path / "first.jsonl", fewer[:1000])
    second = write(tmp_path / "second.jsonl", fewer[1000:])
    assert texts(read(first, second)[0].held_out) == kept[:10]


def test_a_small_file_holds_out_a_tenth(tmp_path):
    conversations = [asked(f"question {i}") for i in range(30)]
    # a copy counts once, and goes where the other is
    lowest = sorted(conversations, key=hash_of)[:3]
    found, _ = read(write(tmp_path / "a.jsonl", [*conversations, lowest[2]]))
    kept = [BYTE.decode(render(BYTE, messages)[0]) for messages in [*lowest, lowest[2]]]
    assert sorted(texts(found.held_out)) == sorted(kept)


def test_at_least_one_is_held_out_with_its_copies(tmp_path):
    conversations = [asked(letter) for letter in "abcab"]
    lowest = min(conversations, key=hash_of)
    found, _ = read(write(tmp_path / "a.jsonl", conversations))
    n = conversations.count(lowest)
    assert texts(found.held_out) == [BYTE.decode(render(BYTE, lowest)[0])] * n
    assert len(found.train) == 5 - n and found.counts["in_both"] == 0
    with pytest.raises(UsageError, match="2 examples that the split cannot tell apart.*--val-data"):
        read(write(tmp_path / "b.jsonl", [asked("a")] * 2))


def test_a_file_of_held_out_conversations(tmp_path):
    path = write(tmp_path / "a.jsonl", [asked("a"), asked("b"), asked("a")])
    other = write(tmp_path / "b.jsonl", [asked("a"), asked("c")])
    found, said = read(path, held_out=[str(other)])
    assert len(found.train) == 3 and len(found.held_out) == 2
    assert found.counts["in_both"] == 2
    assert "2 conversations to learn from equal one that is held out" in said
    assert "3 conversations to learn from (" in said and " 2 held out (" in said


def test_the_fingerprint_is_of_the_content(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", [asked("a"), "{}", asked("b")])
    whole = read(path, held_out=[held_out])[0].fingerprint
    moved = write(tmp_path / "moved.jsonl", [asked("a"), asked("b")])
    assert read(moved, held_out=[held_out])[0].fingerprint == whole
    assert read(moved, held_out=[held_out], max_tokens=30)[0].fingerprint == whole
    others = [
        read(moved)[0],
        read(Source(moved, Fraction(1, 2)), held_out=[held_out])[0],
        read(moved, held_out, held_out=[held_out])[0],
        read(write(tmp_path / "b.jsonl", [asked("b"), asked("a")]), held_out=[held_out])[0],
    ]
    assert len({whole, *(other.fingerprint for other in others)}) == 5


# --------------------------------------------------------------------------------------------------
# weights and epochs


def test_weights_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c=2"):
        write(tmp_path / name, [asked("a")])
    found = sources_of(["a.jsonl", "b.jsonl=0.25", "c=2"], "--data")
    assert [(str(source.path), source.weight) for source in found] == [
        ("a.jsonl", 1),
        ("b.jsonl", Fraction(1, 4)),
        ("c=2", 1),
    ]
    assert sources_of(["c=2=1/3"], "--data") == [Source(found[2].path, Fraction(1, 3))]
    bad = ["a.jsonl=0", "b.jsonl=-1", "c=2=x", "a.jsonl=1001", "no.jsonl", "a.jsonl", "./a.jsonl=2"]
    with pytest.raises(UsageError) as caught:
        sources_of(bad, "--data")
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert [line.split(":")[0] for line in lines[:4]] == [f"--data {value}" for value in bad[:4]]
    assert "such as a.jsonl=0.5" in lines[0]
    assert lines[4] == "--data no.jsonl: no such file; check the path"
    assert "given twice" in lines[5]


@pytest.mark.parametrize("weight", ["1", "2", "0.5", "1/3", "1.1", "0.05"])
def test_examples_come_as_often_as_their_weight_says(weight):
    """After any number of epochs each example was taken weight x epochs times, give or take one."""
    weight = Fraction(weight)
    shares = Shares.of([weight, Fraction(1)], [7, 5])
    taken = collections.Counter()
    for epoch in range(25):
        order = shares.epoch(3, epoch)
        assert order.dtype == np.int64
        assert order.tolist() == shares.epoch(3, epoch).tolist()
        assert sorted(order[order >= 7]) == [7, 8, 9, 10, 11]
        expected = math.floor((epoch + 1) * weight * 7) - math.floor(epoch * weight * 7)
        assert (order < 7).sum() == expected
        taken.update(order.tolist())
        assert all(abs(taken[i] - (epoch + 1) * weight) < 1 for i in range(7))


def test_orders_differ_by_epoch_and_seed():
    shares = Shares.of([Fraction(1)], [50])
    orders = [shares.epoch(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    # files are shuffled together
    mixed = Shares.of([Fraction(1), Fraction(1)], [25, 25]).epoch(0, 0) < 25
    assert 5 < np.count_nonzero(np.diff(mixed.astype(int))) < 45


def test_epochs_of_what_was_read(tmp_path, held_out):
    first = write(tmp_path / "a.jsonl", [asked(f"a{i}") for i in range(4)])
    second = write(tmp_path / "b.jsonl", [asked(f"b{i}") for i in range(4)])
    sources = sources_of([str(first), f"{second}=0.5"], "--data")
    found, _ = read(*sources, held_out=[held_out])
    epochs = [found.train.epoch(0, epoch).tolist() for epoch in (0, 1)]
    assert all(len(epoch) == 6 for epoch in epochs)
    assert sorted(epochs[0] + epochs[1]) == sorted([*range(4)] * 2 + [*range(4, 8)])
    with pytest.raises(UsageError, match="an epoch has no example"):
        read(Source(first, Fraction(1, 10)), held_out=[held_out])
