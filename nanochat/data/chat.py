"""The chat format: how the messages of a conversation become token ids, and which of them train.

A conversation is BOS and then, for each message, the start token of its role, the ids of its
content and TURN_END. An optional system message comes first, then those of the user and of the
assistant in turn. ASSISTANT_START behind the last message asks for an answer, which ends with
TURN_END. JINJA is the same format as a template for other programs."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nanochat.common import UsageError, valid_unicode
from nanochat.data.tokenizer import TURN_END, Tokenizer

START_OF_ROLE = {
    "system": "<|system_start|>",
    "user": "<|user_start|>",
    "assistant": "<|assistant_start|>",
}
CHAT_SPECIALS = (*START_OF_ROLE.values(), TURN_END)
# What an exported tokenizer pads with (nanochat/apps/export/tokenizer_files.py).
EXPORTED_PAD = "<|pad|>"

# {"role": one of START_OF_ROLE, "content": text}; other fields are not read
Message = Mapping[str, str]
# token ids, uint32 (n,), and for each whether it is trained on, bool (n,)
Rendered = tuple[np.ndarray, np.ndarray]

# Other programs encode the rendered text as a whole, where a content that spells a special token
# would become one and could speak for somebody else: the template refuses it. render() encodes the
# same content as plain text.
JINJA = (
    """\
{%- set specials = [bos_token, SPECIALS] -%}
{%- set n_system = 1 if messages and messages[0]['role'] == 'system' else 0 -%}
{%- if messages | length == n_system -%}
    {{- raise_exception('a conversation needs a message from the user') -}}
{%- endif -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {%- set content = message['content'] -%}
    {%- if content is not string -%}
        {{- raise_exception('the content of each message must be text') -}}
    {%- endif -%}
    {%- for special in specials -%}
        {%- if special in content -%}
            {{- raise_exception('the content of a message spells the special token ' + special) -}}
        {%- endif -%}
    {%- endfor -%}
    {%- set is_answer = (loop.index0 - n_system) % 2 == 1 -%}
    {%- if role == 'system' and loop.first -%}
        {{- 'SYSTEM_START' + content + 'TURN_END' -}}
    {%- elif role == 'user' and not is_answer -%}
        {{- 'USER_START' + content + 'TURN_END' -}}
    {%- elif role == 'assistant' and is_answer -%}
        {{- 'ASSISTANT_START' -}}
        {%- generation -%}
            {{- content + 'TURN_END' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('roles must be user and assistant in turn, after system or not') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages[-1]['role'] == 'assistant' -%}
        {{- raise_exception('the last message must be from the user') -}}
    {%- endif -%}
    {{- 'ASSISTANT_START' -}}
{%- endif -%}
""".replace("SPECIALS", ", ".join(f"'{name}'" for name in (*CHAT_SPECIALS, EXPORTED_PAD)))
    .replace("SYSTEM_START", START_OF_ROLE["system"])
    .replace("USER_START", START_OF_ROLE["user"])
    .replace("ASSISTANT_START", START_OF_ROLE["assistant"])
    .replace("TURN_END", TURN_END)
)


def is_chat(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has the special tokens of chats."""
    return set(CHAT_SPECIALS) <= set(tokenizer.special_ids)


def with_chat(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the special tokens of chats, as it is if it has them."""
    return tokenizer.with_specials(CHAT_SPECIALS)


def problem_of(messages: object, generation_prompt: bool = False) -> str | None:
    """What keeps something from being the messages of a conversation, None if nothing does.

    generation_prompt: whether an answer is to follow."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return "messages must be a list of objects with role and content"
    for number, message in enumerate(messages, 1):
        problem = _problem_of_message(message)
        if problem:
            return f"message {number} {problem}"
    roles = [message["role"] for message in messages]
    first = int(roles[:1] == ["system"])
    if len(roles) == first:
        return "no message from the user"
    expected = [("user", "assistant")[i % 2] for i in range(len(roles) - first)]
    wrong = [i for i in range(len(expected)) if roles[first + i] != expected[i]]
    if wrong:
        i = wrong[0]
        return (
            f"message {first + i + 1} is from {roles[first + i]} where {expected[i]} is expected: "
            f"system may come first, then user and assistant in turn"
        )
    if generation_prompt and roles[-1] == "assistant":
        return "the last message must be from the user for an answer to follow"
    return None


def _problem_of_message(message: object) -> str | None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        return "is not an object with role and content"
    role, content = message["role"], message["content"]
    if role not in list(START_OF_ROLE):
        return f"has the unknown role {str(role)[:40]!r}: give {', '.join(START_OF_ROLE)}"
    if not isinstance(content, str):
        return f"has a content that is not a string but {type(content).__name__}"
    return None


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], generation_prompt: bool = False
) -> Rendered:
    """(ids, mask) of a conversation; the mask is True for what the assistant has to write: its
    contents and the TURN_END of each.

    A content that spells a special token is plain text. generation_prompt: end with the start of an
    answer. UsageError for messages that are no conversation, a tokenizer without the special tokens
    of chats, and a character that a char tokenizer lacks."""
    return render_batch(tokenizer, [messages], generation_prompt)[0]


def render_batch(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    generation_prompt: bool = False,
    threads: int = 1,
) -> list[Rendered]:
    """render() of several conversations, encoded together on `threads` threads. Raises as it."""
    if not is_chat(tokenizer):
        raise UsageError(
            "the tokenizer lacks the special tokens of chats; it belongs to a model that was not "
            "trained on conversations: give a run of `nanochat sft`"
        )
    for messages in conversations:
        problem = problem_of(messages, generation_prompt)
        if problem:
            raise UsageError(f"conversation: {problem}")
    # UTF-8 has no lone surrogates, which JSON can spell
    contents = [
        valid_unicode(message["content"]) for messages in conversations for message in messages
    ]
    encoded = iter(tokenizer.encode_batch(contents, threads))
    return [
        _joined(
            tokenizer, [(message["role"], next(encoded)) for message in messages], generation_prompt
        )
        for messages in conversations
    ]


def _joined(
    tokenizer: Tokenizer, turns: Iterable[tuple[str, np.ndarray]], generation_prompt: bool
) -> Rendered:
    """(ids, mask) of turns, each a role and the ids of its content."""
    special = tokenizer.special_ids
    ids = [np.array([tokenizer.bos], dtype=np.uint32)]
    mask = [np.zeros(1, dtype=np.bool_)]
    for role, content in turns:
        ids += [_one(special[START_OF_ROLE[role]]), content, _one(special[TURN_END])]
        mask += [np.zeros(1, dtype=np.bool_), np.full(len(content) + 1, role == "assistant")]
    if generation_prompt:
        ids.append(_one(special[START_OF_ROLE["assistant"]]))
        mask.append(np.zeros(1, dtype=np.bool_))
    return np.concatenate(ids), np.concatenate(mask)


def _one(token_id: int) -> np.ndarray:
    return np.array([token_id], dtype=np.uint32)
