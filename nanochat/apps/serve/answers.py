"""Answers in the shapes of OpenAI's API: completions and chats, whole and in chunks."""

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from nanochat.apps.serve.requests import Asked
from nanochat.apps.serve.runs import ServedRun
from nanochat.apps.serve.transcript import Piece, ScoredToken, finite, shown
from nanochat.data.chat import is_chat


@dataclass
class Choice:
    """One choice of an answer, or what a chunk adds to it."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.reason = piece.reason


class CompletionShape:
    """Objects of /v1/completions."""

    def __init__(self, asked: Asked) -> None:
        self.head = _head(asked, "cmpl-", "text_completion")
        self.chunk_head = self.head
        self.asked = asked

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of an answer."""
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.reason,
        }

    def openings(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunks that begin a choice: the prompt, if it is to be repeated."""
        text = opening(self.asked, index)
        return [self.chunk(index, Choice(text))] if text else []

    def chunk(self, index: int, added: Choice) -> dict[str, Any]:
        """The choice of a chunk."""
        return self.whole(index, added)

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        tokenizer = self.asked.run.tokenizer
        return {
            "tokens": [shown(tokenizer, token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float | None] | None:
        """The most likely tokens at a place, and the one that stands there."""
        if token.logprob is None:
            return None
        tokenizer = self.asked.run.tokenizer
        return {
            shown(tokenizer, i): finite(logprob)
            for i, logprob in (*token.top, (token.id, token.logprob))
        }


class ChatShape:
    """Objects of /v1/chat/completions."""

    def __init__(self, asked: Asked) -> None:
        self.head = _head(asked, "chatcmpl-", "chat.completion")
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"}
        self.asked = asked
        # a plain transcript ends without the blank that stands before the answer
        self.before = "" if is_chat(asked.run.tokenizer) else " "
        # choices of which nothing was shown yet
        self._unopened = set(range(len(asked.requests)))

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A choice of an answer."""
        content = choice.text.removeprefix(self.before)
        return {
            "index": index,
            "message": {"role": "assistant", "content": content, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.reason,
        }

    def openings(self, index: int) -> list[dict[str, Any]]:
        """Choices of the chunks that begin a choice."""
        return [self._delta(index, {"role": "assistant", "content": ""}, Choice())]

    def chunk(self, index: int, added: Choice) -> dict[str, Any]:
        """The choice of a chunk."""
        content = added.text
        if content and index in self._unopened:
            self._unopened.discard(index)
            content = content.removeprefix(self.before)
        return self._delta(index, {"content": content} if content else {}, added)

    def _delta(self, index: int, delta: dict[str, str], added: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(added.tokens) if added.tokens else None
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": added.reason,
        }

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        content = []
        for token in tokens:
            top = [self._entry(i, logprob) for i, logprob in token.top]
            content.append({**self._entry(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        tokenizer = self.asked.run.tokenizer
        return {
            "token": shown(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(tokenizer.spelling(token_id)),
        }


Shape = CompletionShape | ChatShape


def echoed(asked: Asked, index: int) -> str:
    """The text of the prompt of a choice, if it is to stand before the answer; else ""."""
    if not asked.echo:
        return ""
    return asked.run.tokenizer.decode(asked.prompt_of(index).shown)


def opening(asked: Asked, index: int) -> str:
    """The text with which a choice begins before the model has read anything. A prompt that is
    repeated with its log-probabilities comes with these."""
    if asked.requests[index].prompt_logprobs:
        return ""
    return echoed(asked, index)


def usage(asked: Asked, n_generated: int) -> dict[str, int]:
    """Tokens that the model read (BOS included, each prompt once) and generated."""
    n_read = sum(len(prompt.ids) for prompt in asked.prompts)
    return {
        "prompt_tokens": n_read,
        "completion_tokens": n_generated,
        "total_tokens": n_read + n_generated,
    }


def model_object(run: ServedRun) -> dict[str, Any]:
    """A model of /v1/models: OpenAI's fields, and what is known of the run."""
    return {
        "id": run.name,
        "object": "model",
        "created": run.created,
        "owned_by": "nanochat",
        "run": run.name,
        "step": run.step,
        "follows": run.follows,
        "positions": run.engine.positions,
        "context": run.config.max_seq_len,
        "vocab_size": run.tokenizer.vocab_size,
        "bos": run.tokenizer.bos,
        "chat": is_chat(run.tokenizer),
        "max_tokens": run.max_tokens,
    }


def _head(asked: Asked, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that an answer and all its chunks share. The fingerprint names the weights."""
    return {
        "id": prefix + secrets.token_hex(12),
        "object": kind,
        "created": int(time.time()),
        "model": asked.run.name,
        "system_fingerprint": f"step_{asked.run.step}",
    }
