"""What the JSON body of a request asks of a model: prompts as token ids, and requests for the
engine."""

import secrets
from dataclasses import dataclass
from typing import Any

from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.fields import (
    CHAT,
    COMPLETION,
    LARGEST_SEED,
    Field,
    Message,
    parse_json,
    read_fields,
)
from nanochat.apps.serve.runs import ServedRun
from nanochat.common import UsageError, counted
from nanochat.data.chat import is_chat, render
from nanochat.eval.engine import Request, Sampling, seeds_of
from nanochat.eval.generation import prompt_with_bos

# texts of one request
MOST_TEXTS = 1024
# how a conversation is written for a model that was not trained on any
SPEAKERS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}


@dataclass(frozen=True)
class Prompt:
    """ids: as the client gave them, or those of its text behind BOS. hidden: how many of them the
    client did not send: 1 for a text that does not begin with the name of BOS, else 0."""

    ids: tuple[int, ...]
    hidden: int

    @property
    def shown(self) -> tuple[int, ...]:
        """The ids that the client knows of."""
        return self.ids[self.hidden :]


@dataclass(frozen=True)
class Asked:
    """What a request asks for, checked.

    requests: for the engine, one for each choice of the answer: n for the first prompt, n for the
    second, and so on. logprobs: how many alternatives of each token are wanted, or None."""

    run: ServedRun
    prompts: tuple[Prompt, ...]
    requests: tuple[Request, ...]
    max_tokens: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool

    @property
    def n(self) -> int:
        """Choices for each prompt."""
        return len(self.requests) // len(self.prompts)

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt of a choice, by its index."""
        return self.prompts[choice // self.n]


def asked_completion(raw: bytes, runs: list[ServedRun]) -> Asked:
    """What the body of a request to /v1/completions asks for. Raises Refused."""
    values = _values_of(raw, COMPLETION, "prompt")
    run = _run_of(runs, values)
    n_tokens, echo, logprobs = values["max_tokens"], values["echo"], values["logprobs"]
    if n_tokens == 0 and not echo:
        raise Refused("max_tokens: 0 needs echo, which returns the prompt", "max_tokens")
    # here, and not after the prompts are encoded: a body may hold thousands
    _check_choices(len(values["prompt"]), values["n"], "prompt")
    prompts = tuple(_prompt(run, each) for each in values["prompt"])
    return _asked(run, prompts, values, n_tokens, logprobs, echo, values["stop"])


def asked_chat(raw: bytes, runs: list[ServedRun]) -> Asked:
    """What the body of a request to /v1/chat/completions asks for. Raises Refused."""
    values = _values_of(raw, CHAT, "messages")
    run = _run_of(runs, values)
    _check_choices(1, values["n"], "messages")
    stop = values["stop"]
    if is_chat(run.tokenizer):
        prompt = _chat_prompt(run, values["messages"])
    else:
        prompt = _prompt(run, transcript(values["messages"]), "messages")
        # a new turn of somebody else ends the answer
        stop = (*stop, f"\n{SPEAKERS['user']}", f"\n{SPEAKERS['system']}")
    logprobs = values["top_logprobs"] if values["logprobs"] else None
    if values["top_logprobs"] and logprobs is None:
        raise Refused("top_logprobs: needs logprobs to be true", "top_logprobs")
    n_tokens = values["max_completion_tokens"] or values["max_tokens"]
    if n_tokens is None:
        room = run.engine.positions - len(prompt.ids)
        n_tokens = max(1, min(run.max_tokens, room))
    return _asked(run, (prompt,), values, n_tokens, logprobs, False, stop)


def find_run(runs: list[ServedRun], name: str) -> ServedRun:
    """The run of that name. Raises Refused, and OlderStep for a checkpoint to be loaded first."""
    for run in runs:
        if run.name == name:
            return run
    for run in runs:
        if run.answers_to(name):
            return run
    raise Refused(
        f"model: {name!r} is not served here; choose one of {_names(runs)}",
        "model",
        "model_not_found",
        404,
    )


def _run_of(runs: list[ServedRun], values: dict[str, Any]) -> ServedRun:
    """The run that a body names; if it names none, the only one."""
    name = values["model"]
    if not name and len(runs) == 1:
        return runs[0]
    if not name:
        raise Refused(f"model: is missing; choose one of {_names(runs)}", "model")
    return find_run(runs, name)


def _names(runs: list[ServedRun]) -> str:
    return ", ".join(run.name for run in runs)


def transcript(messages: tuple[Message, ...]) -> str:
    """A conversation as plain text, which ends where the assistant's answer begins.

    If the last message is the assistant's, the answer continues it."""
    lines = [f"{SPEAKERS[each.role]} {each.content}".rstrip(" ") for each in messages]
    if messages[-1].role != "assistant":
        lines.append(SPEAKERS["assistant"])
    return "\n".join(lines)


def _values_of(raw: bytes, table: tuple[Field, ...], needed: str) -> dict[str, Any]:
    values = read_fields(table, parse_json(raw))
    if values[needed] is None:
        raise Refused(f"{needed}: is missing", needed, "missing")
    return values


def _check_choices(n_prompts: int, n: int, param: str) -> None:
    """Refused if a request wants too many texts."""
    if n_prompts * n > MOST_TEXTS:
        raise Refused(
            f"{'n' if n > 1 else param}: {counted(n_prompts, 'prompt')} and n={n} are "
            f"{n_prompts * n} texts, and a request may ask for {MOST_TEXTS}; send several requests",
            "n" if n > 1 else param,
        )


def _prompt(run: ServedRun, given: str | tuple[int, ...], param: str = "prompt") -> Prompt:
    """The ids of a prompt that is text or ids. Raises Refused for what the model cannot read."""
    tokenizer, positions = run.tokenizer, run.engine.positions
    if isinstance(given, str):
        # no token is longer: a text that cannot fit need not be encoded, which takes a while
        if len(given.encode("utf-8")) > positions * run.longest_token_bytes:
            raise _too_long(f"{len(given)} characters", positions, param)
        try:
            # a document begins, whether or not the text says so by the name of BOS
            hidden = int(not given.startswith(tokenizer.bos_text))
            ids = tuple(prompt_with_bos(tokenizer, given.removeprefix(tokenizer.bos_text)))
        except UsageError as error:
            raise Refused(f"{param}: {error}", param) from None
    else:
        # as they are: whoever sends ids, such as lm_eval, decides on BOS and counts on their places
        ids, hidden = given, 0
        unknown = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
        if unknown is not None:
            raise Refused(
                f"{param}: holds the token id {shortened(unknown)}; this model's ids are 0 to "
                f"{tokenizer.vocab_size - 1}",
                param,
            )
    if len(ids) >= positions:
        raise _too_long(counted(len(ids), "token"), positions, param)
    return Prompt(ids, hidden)


def _chat_prompt(run: ServedRun, messages: tuple[Message, ...]) -> Prompt:
    """The ids of a conversation in the format that the model was trained on; contents are plain
    text, whatever they spell.

    If the last message is the assistant's, the answer continues it. Raises Refused."""
    continues = messages[-1].role == "assistant"
    n_bytes = sum(len(each.content.encode("utf-8")) for each in messages)
    if n_bytes > run.engine.positions * run.longest_token_bytes:
        raise _too_long(f"{n_bytes} bytes of text", run.engine.positions, "messages")
    try:
        plain = [{"role": each.role, "content": each.content} for each in messages]
        ids, _ = render(run.tokenizer, plain, generation_prompt=not continues)
    except UsageError as error:
        raise Refused(f"messages: {error}", "messages") from None
    if continues:
        # without the end of the turn
        ids = ids[:-1]
    if len(ids) >= run.engine.positions:
        raise _too_long(counted(len(ids), "token"), run.engine.positions, "messages")
    return Prompt(tuple(ids.tolist()), 0)


def shortened(value: int) -> str:
    """A whole number as text; of a very large one, that it is."""
    return str(value) if abs(value) < 10**20 else "beyond 10^20"


def _too_long(length: str, positions: int, param: str) -> Refused:
    return Refused(
        f"{param}: has {length}, and this model has {positions} positions for a prompt and its "
        f"continuation; shorten it",
        param,
        "context_length_exceeded",
    )


def _asked(
    run: ServedRun,
    prompts: tuple[Prompt, ...],
    values: dict[str, Any],
    n_tokens: int,
    logprobs: int | None,
    echo: bool,
    stop: tuple[str, ...],
) -> Asked:
    """The rest of the checks, and the requests for the engine."""
    _check_new_tokens(run, prompts, n_tokens)
    requests = []
    for prompt in prompts:
        for sampling in _samplings(values):
            scores_prompt = echo and logprobs is not None
            request = Request(
                prompt=prompt.ids,
                # without a prompt to score the engine generates one at least, which is dropped
                max_new_tokens=max(n_tokens, 0 if scores_prompt else 1),
                sampling=sampling,
                stop=stop,
                logprobs=logprobs,
                prompt_logprobs=scores_prompt,
            )
            try:
                run.engine.check(request)
            except UsageError as error:
                raise Refused(str(error)) from None
            requests.append(request)
    return Asked(
        run,
        prompts,
        tuple(requests),
        n_tokens,
        logprobs,
        echo,
        values["stream"],
        bool(values["stream_options"]),
    )


def _check_new_tokens(run: ServedRun, prompts: tuple[Prompt, ...], n_tokens: int) -> None:
    if n_tokens > run.max_tokens:
        raise Refused(
            f"max_tokens: {n_tokens} is more than the {run.max_tokens} that this server admits "
            f"(--max-tokens)",
            "max_tokens",
        )
    longest = max(len(prompt.ids) for prompt in prompts)
    positions = run.engine.positions
    if longest + n_tokens > positions:
        raise Refused(
            f"max_tokens: the prompt's {counted(longest, 'token')} and {n_tokens} new need "
            f"{longest + n_tokens} positions, and this model has {positions}; ask for fewer",
            "max_tokens",
            "context_length_exceeded",
        )


def _samplings(values: dict[str, Any]) -> list[Sampling]:
    """The settings of each of the n choices of a prompt; they differ in the seed."""
    seed = values["seed"]
    if seed is None:
        seed = secrets.randbelow(LARGEST_SEED)
    return [
        Sampling(
            temperature=values["temperature"],
            # -1 means off, as 0 does
            top_k=max(0, values["top_k"]),
            top_p=values["top_p"],
            min_p=values["min_p"],
            repetition_penalty=values["repetition_penalty"],
            seed=each,
        )
        for each in seeds_of(seed, values["n"])
    ]
