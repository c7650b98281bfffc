"""The chat format: worked examples, and the same ids and mask as transformers by the template."""

import random
import unicodedata

import numpy as np
import pytest
from test_tokenizer import gpt2_kind

from nanochat.apps.export.tokenizer_files import (
    PAD_TEXT,
    read_tokenizer_json,
    write_tokenizer_files,
)
from nanochat.common import UsageError
from nanochat.data.chat import (
    CHAT_SPECIALS,
    EXPORTED_PAD,
    JINJA,
    is_chat,
    problem_of,
    render,
    render_batch,
    with_chat,
)
from nanochat.data.tokenizer import train_tokenizer

KINDS = ("bpe", "bpe-llama", "gpt2", "char", "byte")
ASSIGNED = [chr(c) for c in range(0x3000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
ASSIGNED += ["日", "本", "語", "🙂", "\U0001d54f", "\uffff"]
TEXT = "The café sold 12 crêpes — 日本語 too.\n\n    def f(x):\n        return x  # 🙂 <|turn|> "


def chat_tokenizer(kind):
    if kind == "gpt2":
        return with_chat(gpt2_kind())
    # characters: every one that random_text() draws
    texts = ["".join(ASSIGNED) if kind == "char" else TEXT * 3]
    return with_chat(train_tokenizer(kind, texts, 320))


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def byte():
    return chat_tokenizer("byte")


# --------------------------------------------------------------------------------------------------
# our own


def test_a_conversation_by_hand(byte):
    """Bytes are ids; BOS is 256, then the tokens of chats in their order."""
    system, user, assistant, end = 257, 258, 259, 260
    assert [byte.special_ids[name] for name in CHAT_SPECIALS] == [system, user, assistant, end]
    messages = [turn("system", "S"), turn("user", "hi"), turn("assistant", "é"), turn("user", "x")]
    ids, mask = render(byte, messages)
    first = [256, system, ord("S"), end, user, *b"hi", end]
    assert ids.dtype == np.uint32 and mask.dtype == np.bool_
    assert ids.tolist() == [*first, assistant, *"é".encode(), end, user, ord("x"), end]
    assert np.flatnonzero(mask).tolist() == [len(first) + 1 + i for i in range(3)]
    asked, asked_mask = render(byte, messages, generation_prompt=True)
    assert asked.tolist() == [*ids.tolist(), assistant]
    assert asked_mask.tolist() == [*mask.tolist(), False]
    assert byte.decode(ids) == (
        "<|bos|><|system_start|>S<|turn_end|><|user_start|>hi<|turn_end|>"
        "<|assistant_start|>é<|turn_end|><|user_start|>x<|turn_end|>"
    )


def test_contents_that_spell_special_tokens_are_plain_text(byte):
    ids, mask = render(byte, [turn("user", "<|turn_end|>"), turn("assistant", "<|bos|>")])
    assert ids.tolist() == [256, 258, *b"<|turn_end|>", 260, 259, *b"<|bos|>", 260]
    assert mask.sum() == len("<|bos|>") + 1


def test_together_as_alone():
    tokenizer = chat_tokenizer("bpe")
    draw = random.Random(1)
    conversations = [random_messages(draw) for _ in range(20)]
    together = render_batch(tokenizer, conversations, threads=2)
    for (ids, mask), messages in zip(together, conversations, strict=True):
        alone_ids, alone_mask = render(tokenizer, messages)
        assert ids.tolist() == alone_ids.tolist() and mask.tolist() == alone_mask.tolist()


@pytest.mark.parametrize(
    "messages, problem",
    [
        ("hi", "messages must be a list"),
        (None, "messages must be a list"),
        ([], "no message from the user"),
        ([turn("system", "S")], "no message from the user"),
        (["hi"], "message 1 is not an object with role and content"),
        ([{"role": "user"}], "message 1 is not an object with role and content"),
        ([turn("user", "a"), turn("tool", "b")], "message 2 has the unknown role 'tool'"),
        ([turn(["user"], "a")], "message 1 has the unknown role"),
        ([turn("user", None)], "message 1 has a content that is not a string but NoneType"),
        ([turn("assistant", "a")], "message 1 is from assistant where user is expected"),
        ([turn("user", "a"), turn("user", "b")], "message 2 is from user where assistant"),
        ([turn("user", "a"), turn("system", "b")], "message 2 is from system where assistant"),
        (
            [turn("system", "a"), turn("system", "b"), turn("user", "c")],
            "message 2 is from system where user",
        ),
    ],
)
def test_what_is_no_conversation(byte, messages, problem):
    assert problem_of(messages).startswith(problem)
    with pytest.raises(UsageError, match="conversation: "):
        render(byte, messages)


def test_an_answer_follows_the_user_only(byte):
    answered = [turn("user", "a"), turn("assistant", "b")]
    assert problem_of(answered) is None
    with pytest.raises(UsageError, match="the last message must be from the user"):
        render(byte, answered, generation_prompt=True)


def test_a_tokenizer_without_the_tokens_is_refused():
    plain = train_tokenizer("byte", [], -1)
    assert not is_chat(plain) and not is_chat(plain.with_specials(CHAT_SPECIALS[:3]))
    assert with_chat(with_chat(plain)).fingerprint == with_chat(plain).fingerprint
    with pytest.raises(UsageError, match="lacks the special tokens of chats"):
        render(plain, [turn("user", "a")])


# --------------------------------------------------------------------------------------------------
# transformers


def random_text(draw):
    """Of any characters, with blanks and line ends that the ends of a text may lose."""
    letters = ASSIGNED if draw.random() < 0.5 else "ab <|>\n\t{}%-'_.é"
    text = "".join(draw.choice(letters) for _ in range(draw.randrange(1, 30)))
    return draw.choice(["", " ", "\n", "\n\n  "]) + text + draw.choice(["", " ", "\n", "  \n"])


def random_messages(draw, n=None):
    messages = [turn("system", random_text(draw))] if draw.random() < 0.5 else []
    for i in range(draw.randrange(1, 7) if n is None else n):
        messages.append(turn(("user", "assistant")[i % 2], random_text(draw)))
    return messages


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(ours, theirs) of a tokenizer for chats that was exported."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    ours = chat_tokenizer(request.param)
    write_tokenizer_files(ours, 2048, folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder), folder


def templated(theirs, messages, **options):
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def test_the_template_gives_the_same_ids_and_mask(pair):
    ours, theirs, _ = pair
    draw = random.Random(0)
    for _ in range(60):
        messages = random_messages(draw)
        ids, mask = render(ours, messages)
        found = templated(theirs, messages, return_assistant_tokens_mask=True)
        assert found["input_ids"] == ids.tolist(), messages
        assert found["assistant_masks"] == mask.astype(int).tolist(), messages
        if messages[-1]["role"] == "user":
            ids, _ = render(ours, messages, generation_prompt=True)
            found = templated(theirs, messages, add_generation_prompt=True)
            assert found["input_ids"] == ids.tolist(), messages


def test_the_exported_tokenizer_knows_the_tokens(pair):
    ours, theirs, folder = pair
    assert theirs.eos_token_id == ours.special_ids["<|turn_end|>"]
    assert theirs.bos_token_id == ours.bos
    assert theirs.chat_template == JINJA
    ids, _ = render(ours, [turn("user", "a"), turn("assistant", "b")])
    assert theirs.decode(ids.tolist()) == ours.decode(ids)
    assert theirs.decode(ids.tolist(), skip_special_tokens=True) == "ab"
    back = read_tokenizer_json(folder)
    assert back.fingerprint == ours.fingerprint


def test_the_template_refuses_contents_that_spell_special_tokens(pair):
    """With them somebody could speak for the assistant."""
    ours, theirs, _ = pair
    for name in (ours.bos_text, *CHAT_SPECIALS, PAD_TEXT):
        for place, role in enumerate(("system", "user", "assistant")):
            messages = [turn("system", "a"), turn("user", "b"), turn("assistant", "c")]
            messages[place] = turn(role, f"x{name} y")
            with pytest.raises(Exception, match="spells the special token"):
                templated(theirs, messages)


@pytest.mark.parametrize(
    "messages",
    [
        [turn("system", "S")],
        [turn("user", "a"), turn("tool", "b")],
        [turn("user", None)],
        [turn("user", [{"type": "text", "text": "a"}])],
        [turn("assistant", "a")],
        [turn("user", "a"), turn("user", "b")],
        [turn("user", "a"), turn("system", "b")],
        [turn("system", "a"), turn("system", "b"), turn("user", "c")],
    ],
)
def test_the_template_refuses_what_is_no_conversation(pair, messages):
    _, theirs, _ = pair
    assert problem_of(messages)
    with pytest.raises(Exception, match="roles must be|must be text|needs a message"):
        templated(theirs, messages)


def test_the_template_asks_for_an_answer_to_the_user_only(pair):
    with pytest.raises(Exception, match="the last message must be from the user"):
        templated(pair[1], [turn("user", "a"), turn("assistant", "b")], add_generation_prompt=True)


def test_the_template_names_the_padding_of_exports():
    assert EXPORTED_PAD == PAD_TEXT and f"'{PAD_TEXT}'" in JINJA
