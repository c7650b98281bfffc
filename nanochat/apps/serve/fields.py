"""What the bodies of requests may contain: tables of fields, each with its reader and default.

A reader takes a JSON value and returns what it means; it raises ValueError with the reason."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanochat.apps.serve.errors import Refused

Reader = Callable[[Any], Any]
# Texts of the field `stop`. OpenAI admits 4, tasks of lm_eval have more.
MOST_STOPS = 16
# characters of one of them
LONGEST_STOP = 200
LONGEST_NAME = 512
# arrays and objects inside each other; the deepest that has a meaning is a list of lists
DEEPEST = 32
# the largest seed of a random generator
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Field:
    """One field of a body. default: its value where the body has none or null."""

    name: str
    read: Reader
    default: Any = None


# ----- JSON


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object that a request's body is. Refused for anything else, NaN and Infinity included."""
    try:
        text = raw.decode("utf-8")
        body = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Refused("the body is nested too deeply") from None
    # UnicodeDecodeError and JSONDecodeError are ValueErrors, as is a number of thousands of digits
    except ValueError as error:
        raise Refused(f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    for name, value in body.items():
        if _is_deep(value):
            raise Refused(f"{name}: is nested more than {DEEPEST} levels deep", name)
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _is_deep(value: Any) -> bool:
    """Whether a value holds arrays or objects below DEEPEST levels of others."""
    level = [value]
    for _ in range(DEEPEST):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return False
    return True


def _parts(value: Any) -> list[Any]:
    """The arrays and objects inside an array or object."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [part for part in value if isinstance(part, list | dict)]


# ----- readers


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number; in Python true and false are numbers as well."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low: int, high: int) -> Reader:
    """Reader of a whole number from low to high."""

    def read(value: Any) -> int:
        if not is_whole(value) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float, above: bool = False) -> Reader:
    """Reader of a number from low to high; with `above`, low itself is not admitted."""

    def read(value: Any) -> float:
        usable = is_whole(value) or (isinstance(value, float) and math.isfinite(value))
        # compared before the conversion, which large whole numbers do not survive
        if not usable or not low <= value <= high or (above and value == low):
            start = f"above {low:g} and at most" if above else f"from {low:g} to"
            raise ValueError(f"must be a number {start} {high:g}")
        return float(value)

    return read


def flag(value: Any) -> bool:
    """Reader of true or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def text(value: Any) -> str:
    """Reader of text that UTF-8 can hold: JSON can spell lone surrogates."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode; it holds a lone surrogate") from None
    return value


def short_text(value: Any) -> str:
    """Reader of a name."""
    if len(text(value)) > LONGEST_NAME:
        raise ValueError(f"must have at most {LONGEST_NAME} characters")
    return value


def stop_texts(value: Any) -> tuple[str, ...]:
    """Reader of `stop`: a text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    if len(texts) > MOST_STOPS:
        raise ValueError(f"must be at most {MOST_STOPS} texts")
    for each in texts:
        if not 1 <= len(text(each)) <= LONGEST_STOP:
            raise ValueError(f"each text must have 1 to {LONGEST_STOP} characters")
    return tuple(texts)


def include_usage(value: Any) -> bool:
    """Reader of `stream_options`."""
    if not isinstance(value, dict) or set(value) - {"include_usage", "include_obfuscation"}:
        raise ValueError('must be an object such as {"include_usage": true}')
    # padding against listeners on the line is not offered; asking for none is honoured
    if value.get("include_obfuscation"):
        raise ValueError("include_obfuscation is not available; leave it out")
    return flag(value.get("include_usage") or False)


def prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Reader of `prompt`: a text, a list of texts, token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text, a list of texts, token ids, or a list of token id lists")
    if is_whole(value[0]):
        value = [value]
    return tuple(_prompt(each) for each in value)


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(
                "is empty; to begin a new document give the id of BOS, which /v1/models shows"
            )
        return text(value)
    if not isinstance(value, list) or not all(is_whole(each) for each in value):
        raise ValueError("must hold only texts, or only token ids (whole numbers)")
    if not value:
        raise ValueError("holds an empty list of token ids; give one id at least")
    return tuple(value)


@dataclass(frozen=True)
class Message:
    """One message of a conversation. role: system, user or assistant."""

    role: str
    content: str


# OpenAI's newer name of the system's role
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def messages(value: Any) -> tuple[Message, ...]:
    """Reader of `messages`."""
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list such as [{"role": "user", "content": "Hello"}]')
    return tuple(_message(each) for each in value)


def _message(value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in tuple(ROLES):
        raise ValueError(f"each must be an object whose role is one of {', '.join(ROLES)}")
    filled = {name for name, entry in value.items() if entry not in (None, [])}
    if filled - {"role", "content", "name"}:
        raise ValueError("each may have role, content and name; tools and media are not available")
    short_text(value.get("name") or "")
    return Message(ROLES[value["role"]], _content(value.get("content")))


def _content(value: Any) -> str:
    """The text of a message: it is text, or a list of parts of type text."""
    if not isinstance(value, list):
        return text(value)
    pieces = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ValueError('each part of a content must be {"type": "text", "text": ...}')
        pieces.append(text(part.get("text")))
    return "".join(pieces)


# ----- tables

COMMON = (
    Field("model", short_text, ""),
    Field("temperature", number(0, 100), 1.0),
    Field("top_p", number(0, 1, above=True), 1.0),
    Field("top_k", whole(-1, 2**31 - 1), 0),
    Field("min_p", number(0, 1), 0.0),
    Field("repetition_penalty", number(0.01, 100), 1.0),
    Field("seed", whole(0, LARGEST_SEED)),
    Field("n", whole(1, 2**31 - 1), 1),
    Field("stop", stop_texts, ()),
    Field("stream", flag, False),
    Field("stream_options", include_usage, False),
    # names the client's own user; nothing depends on it
    Field("user", short_text, ""),
)
COMPLETION = (
    *COMMON,
    Field("prompt", prompts),
    # OpenAI's default
    Field("max_tokens", whole(0, 2**31 - 1), 16),
    Field("echo", flag, False),
    Field("logprobs", whole(0, 5)),
)
CHAT = (
    *COMMON,
    Field("messages", messages),
    Field("max_tokens", whole(1, 2**31 - 1)),
    Field("max_completion_tokens", whole(1, 2**31 - 1)),
    Field("logprobs", flag, False),
    Field("top_logprobs", whole(0, 20), 0),
)
# Fields of OpenAI's that are not offered, and the values that change nothing, which some clients
# send always.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


def read_fields(table: tuple[Field, ...], body: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of every field of a table. Refused for the first unusable or unknown one."""
    known = {field.name for field in table}
    for name in body:
        if name not in known:
            _check_neutral(name, body[name])
    return {field.name: _read(field, body.get(field.name)) for field in table}


def _read(field: Field, value: Any) -> Any:
    if value is None:
        return field.default
    try:
        return field.read(value)
    except ValueError as error:
        raise Refused(f"{field.name}: {error}", field.name, "invalid_value") from None


def _check_neutral(name: str, value: Any) -> None:
    """Refused for a field that is unknown, or whose value asks for what is not offered."""
    if name not in NEUTRAL:
        raise Refused(f"{name}: is not a field of this request; leave it out", name, "unknown")
    # true equals 1 in Python, and false 0
    admitted = any(
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in NEUTRAL[name]
    )
    if value is not None and not admitted:
        raise Refused(f"{name}: is not available on this server; leave it out", name, "unsupported")
