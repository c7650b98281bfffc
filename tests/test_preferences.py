"""Preference pairs: what a line may be, how pairs are encoded, cut and held out."""

import hashlib
import json

import numpy as np
import pytest
from small import SHARED
from test_conversations import BAD, BYTE, turn, write

from nanochat.common import UsageError
from nanochat.data.chat import render, with_chat
from nanochat.data.examples import Source, sources_of
from nanochat.data.preferences import parse, read_pairs
from nanochat.data.tokenizer import train_tokenizer

SHARED_PAIRS = SHARED / "preferences" / "dpo_en_demo.jsonl"
BOS, USER, ASSISTANT, END = 256, 258, 259, 260


def line(prompt, chosen, rejected):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def read(*paths, max_tokens=1000, **options):
    """(preferences, lines reported)."""
    said = []
    sources = [Source(path) for path in paths]
    return read_pairs(sources, BYTE, max_tokens, report=said.append, **options), "\n".join(said)


@pytest.fixture
def held_out(tmp_path):
    return write(tmp_path / "held_out.jsonl", [line("q", "a", "b")])


def test_every_form_of_a_line(tmp_path, held_out):
    system = [turn("system", "S"), turn("user", "q")]
    turns = [*system, turn("assistant", "A"), turn("user", "r")]
    lines = [
        line("q", "good", "bad"),
        line(system, turn("assistant", "good"), [turn("assistant", "bad")]),
        line(turns, "good", "bad"),
        # answers that are whole conversations
        json.dumps(
            {
                "chosen": [*turns, turn("assistant", "good")],
                "rejected": [*turns, turn("assistant", "bad")],
            }
        ),
    ]
    found, _ = read(write(tmp_path / "a.jsonl", lines), held_out=[held_out], strict=True)
    for i, prompt in enumerate([[turn("user", "q")], system, turns, turns]):
        pair = found.train[i]
        assert pair.prompt.tolist() == render(BYTE, prompt, generation_prompt=True)[0].tolist()
        assert pair.chosen.tolist() == [*b"good", END] and pair.rejected.tolist() == [*b"bad", END]
        assert pair.prompt.dtype == pair.chosen.dtype == np.uint32
        assert found.train.lengths[i] == len(pair.prompt) + 5
        # as whole conversations, with the mask on the last answer alone
        for (ids, mask), answer in ((pair.with_chosen(), "good"), (pair.with_rejected(), "bad")):
            whole, _ = render(BYTE, [*prompt, turn("assistant", answer)])
            assert ids.tolist() == whole.tolist()
            assert np.flatnonzero(mask).tolist() == list(range(len(pair.prompt), len(ids)))
    assert found.train.n_targets == 4 * 9 == found.counts["train_targets"]
    assert sorted(found.train.epoch(0, 0)) == [0, 1, 2, 3]


BAD_PAIRS = [
    (BAD[0][0], "not UTF-8"),
    ('{"prompt": "a", "chosen": "b"}', "no field rejected (its fields: prompt, chosen)"),
    ("{}", "no field prompt or chosen or rejected (its fields: none)"),
    (line("a", "b", "b"), "chosen and rejected are the same"),
    (line("a", "b", turn("assistant", "b")), "chosen and rejected are the same"),
    (line("a", "", "b"), "chosen is empty"),
    (line("a", "b", 3), "rejected is not a string but int"),
    (line("a", "b", turn("user", "c")), "rejected is not one message of the assistant"),
    (line("a", "b", [turn("assistant", "c")] * 2), "rejected is not one message of the assistant"),
    (line("", "b", "c"), "prompt is empty"),
    (line([], "b", "c"), "prompt: no message from the user"),
    (line([turn("user", "a"), turn("assistant", "b")], "b", "c"), "prompt: the last message must"),
    (line([turn("assistant", "a")], "b", "c"), "prompt: message 1 is from assistant"),
    (
        '{"chosen": [{"role": "user", "content": "a"}], "rejected": []}',
        "chosen and rejected differ before their last message, and there is no prompt",
    ),
    ('{"chosen": [], "rejected": 3}', "rejected is not a list but int"),
    (line([turn("tool", "a")], "b", "c"), "message 1 of prompt has the unknown role"),
]


def test_bad_lines_are_named_and_skipped(tmp_path, held_out):
    lines = [line("q", "c", "r"), *(bad for bad, _ in BAD_PAIRS)]
    path = write(tmp_path / "a.jsonl", lines)
    found, said = read(path, held_out=[held_out])
    assert len(found.train) == 1 and found.counts["bad_lines"] == len(BAD_PAIRS)
    for number, (problem, (_, reason)) in enumerate(
        zip(found.problems, BAD_PAIRS, strict=True), start=2
    ):
        assert problem.line == number and problem.reason.startswith(reason)
    assert f"{path} line 3: no field rejected" in said
    with pytest.raises(UsageError, match="--strict: 16 of 18 lines cannot be used"):
        read(path, held_out=[held_out], strict=True)


def test_long_prompts_keep_bos_and_their_end(tmp_path, held_out):
    """The prompt is BOS, the start of the user's turn, 6 bytes, its end, the start of an answer: 10
    tokens. The longer answer has 4."""
    path = write(tmp_path / "a.jsonl", [line("123456", "abc", "x")])
    prompt = [BOS, USER, *b"123456", END, ASSISTANT]
    for max_tokens in range(14, 5, -1):
        found, said = read(path, max_tokens=max_tokens, held_out=[path])
        pair = found.train[0]
        n_cut = 14 - max_tokens
        assert pair.prompt.tolist() == [BOS, *prompt[1 + n_cut :]]
        assert pair.chosen.tolist() == [*b"abc", END] and pair.rejected.tolist() == [*b"x", END]
        assert found.train.lengths[0] == max_tokens
        assert found.counts["cut"] == (2 if n_cut else 0)
        assert ("2 pairs with the prompt cut from its beginning" in said) == bool(n_cut)
    with pytest.raises(UsageError, match="no example of .*a.jsonl can be used .2 too long"):
        read(path, max_tokens=5, held_out=[path])
    both = write(tmp_path / "b.jsonl", [line("1", "abcdef", "x"), line("2", "a", "x")])
    found, said = read(
        both, max_tokens=8, held_out=[write(tmp_path / "c.jsonl", [line("3", "a", "x")])]
    )
    assert [BYTE.decode(found.train[0].prompt)[21]] == ["2"] and found.counts["too_long"] == 1
    assert "1 left out since an answer does not fit" in said


def test_pairs_of_one_prompt_are_held_out_together(tmp_path):
    prompts = [f"prompt {i}" for i in range(300)]
    lines = [line(prompt, f"good {i}", "bad") for i in range(2) for prompt in prompts]

    def is_held_out(prompt):
        content = json.dumps([turn("user", prompt)], sort_keys=True)
        digest = hashlib.sha256(content.encode()).digest()
        return int.from_bytes(digest[:8], "big") * 50 < 2**64

    expected = [prompt for prompt in prompts if is_held_out(prompt)] * 2
    found, _ = read(write(tmp_path / "a.jsonl", lines))
    decoded = [BYTE.decode(found.held_out[i].prompt) for i in range(len(found.held_out))]
    assert expected and decoded == [
        f"<|bos|><|user_start|>{prompt}<|turn_end|><|assistant_start|>" for prompt in expected
    ]
    assert len(found.train) == 600 - len(expected) and found.counts["in_both"] == 0
    with pytest.raises(UsageError, match="that the split cannot tell apart"):
        read(write(tmp_path / "b.jsonl", [line("p", f"{i}", "bad") for i in range(5)]))


def test_pairs_whose_prompts_are_held_out_are_counted(tmp_path, held_out):
    path = write(tmp_path / "a.jsonl", [line("q", "c", "r"), line("other", "c", "r")])
    found, said = read(path, held_out=[held_out])
    assert found.counts["in_both"] == 1 and "1 pair to learn from with a prompt that is" in said
    assert found.fingerprint != read(held_out, held_out=[held_out])[0].fingerprint


def test_text_that_a_tokenizer_lacks(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [line("a", "b", "c"), line("é", "b", "c"), line("b", "b", "a")]
    )
    letters = with_chat(train_tokenizer("char", ["abc"], -1))
    found = read_pairs([Source(path)], letters, 100, report=lambda text: None)
    assert len(found.train) == len(found.held_out) == 1
    assert [problem.line for problem in found.problems] == [2]
    with pytest.raises(UsageError, match="special tokens of chats"):
        read_pairs([Source(path)], train_tokenizer("byte", [], -1), 100)


@pytest.mark.skipif(not SHARED_PAIRS.exists(), reason=f"needs {SHARED_PAIRS}")
def test_the_shared_pairs_are_read_whole():
    found = read_pairs(sources_of([str(SHARED_PAIRS)], "--pairs"), BYTE, 20_000, strict=True)
    assert found.counts["lines"] == len(found.train) + len(found.held_out) == 300
    assert found.counts["cut"] == found.counts["too_long"] == 0
    with open(SHARED_PAIRS, encoding="utf-8") as lines:
        prompts = [parse(json.loads(text))["prompt"] for text in lines]
    assert sum(prompt[0]["role"] == "system" for prompt in prompts) == 80
