"""Checkpoints, and the texts that they write."""

import functools
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UsageError
from nanochat.data.chat import Message, is_chat, render
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Ended, Request, seeds_of
from nanochat.eval.generation import (
    NotNumbers,
    check_prompts,
    prompt_with_bos,
    room_for,
)
from nanochat.eval.writer import Writer, request_from
from nanochat.model.decoder import Decoder
from nanochat.run.loading import load_step

# samples that are drawn together
MOST_TOGETHER = 16


@dataclass(frozen=True)
class Subject:
    """A checkpoint of a run, loaded. chat: whether it answers messages, instead of continuing text.
    system: the message before them, "" for none."""

    run: str
    step: int
    model: Decoder
    tokenizer: Tokenizer
    chat: bool = False
    system: str = ""

    @property
    def title(self) -> str:
        """Which one it is."""
        return f"{self.run}, step {self.step}"

    def ids(self, prompt: str, begun: str = "", history: Sequence[Message] = ()) -> list[int]:
        """What is continued: a text, or with --chat the answer to a message from the user.

        begun: text that continues the prompt already. history: messages before that of the user.
        UsageError for text that the tokenizer cannot encode."""
        if not self.chat:
            return prompt_with_bos(self.tokenizer, prompt + begun)
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*system, *history, {"role": "user", "content": prompt}]
        answered = [*asked, {"role": "assistant", "content": begun}]
        # without the end of the answer
        return render(self.tokenizer, answered)[0][:-1].tolist()


def load_subject(run: str, step: int | str, args: Namespace) -> Subject:
    """The checkpoint that --step names; -1 is the newest. UsageError if it cannot be loaded, or if
    --chat is given and it cannot talk."""
    asked = None if step == -1 else step
    loaded = load_step(run, asked, args.device_type, args.dtype)
    if args.chat and not is_chat(loaded[-1]):
        raise UsageError(
            f"--chat: {run} was not trained on conversations (its tokenizer lacks the special "
            f"tokens of chats); fine-tune it with `nanochat sft {run} --data FILE`, or leave the "
            f"flag out"
        )
    return Subject(run, *loaded, args.chat, args.system)


@dataclass(frozen=True)
class Drawn:
    """A text that was drawn. prompt, sample: from 1. text: without the prompt. end: why it ended,
    stop (the document or the answer ended, or --stop) or length."""

    run: str
    step: int
    prompt: str
    sample: int
    seed: int
    text: str
    new_tokens: int
    end: str

    def shown(self, chat: bool) -> str:
        """The prompt and what continues it; of a chat, the answer alone."""
        return self.text if chat else self.prompt + self.text


def token_limits(
    subject: Subject,
    prompts: list[str],
    max_tokens: int,
    name: str = "",
    history: Sequence[Message] = (),
) -> list[int]:
    """New tokens of each prompt at most: max_tokens, or as many as the model has positions for.

    name: of the checkpoint, if there are several. history: as in Subject.ids(). Prints a note about
    each prompt where that is fewer, or where the context of training is exceeded. UsageError that
    names every prompt that cannot be continued at all."""
    encode = functools.partial(subject.ids, history=history)
    # all of them before the first is printed: one that is too long should not show up only at the
    # end
    check_prompts(subject.model, encode, prompts, 1)
    limits = []
    for p, prompt in enumerate(prompts, start=1):
        room = room_for(subject.model, len(encode(prompt)), max_tokens)
        limits.append(room.max_new_tokens)
        if room.note:
            which = f"prompt {p} of {len(prompts)}: " if len(prompts) > 1 else ""
            # not among the text, which may be piped
            print(f"note: {name}{which}{room.note}", file=sys.stderr)
    return limits


def requests_for(ids: list[int], num_samples: int, options: dict[str, Any]) -> list[Request]:
    """The requests for the samples of a prompt. options: of request_from(); the seeds are those of
    the choices of a served completion."""
    return [
        request_from(ids, **{**options, "seed": seed})
        for seed in seeds_of(options["seed"], num_samples)
    ]


def draw(
    subject: Subject,
    prompts: list[str],
    num_samples: int,
    options: dict[str, Any],
    history: Sequence[Message] = (),
) -> list[Drawn]:
    """All samples of all prompts, drawn together. history: as in Subject.ids(). UsageError for
    damaged weights and as in token_limits()."""
    name = f"{subject.title}: "
    limits = token_limits(subject, prompts, options["max_new_tokens"], name, history)
    places, requests = [], []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = subject.ids(prompt, history=history)
        asked = requests_for(ids, num_samples, {**options, "max_new_tokens": limit})
        places += [(prompt, sample) for sample in range(1, num_samples + 1)]
        requests += asked
    texts = [""] * len(requests)
    n_tokens = [0] * len(requests)
    ends = [""] * len(requests)
    slots = min(len(requests), MOST_TOGETHER)
    try:
        with Writer(subject.model, subject.tokenizer, slots=slots) as writer:
            for i, event in writer.events(requests):
                texts[i] += event.text
                if isinstance(event, Ended):
                    ends[i] = event.reason
                else:
                    n_tokens[i] += 1
    except NotNumbers as error:
        raise damaged(subject.run, error) from None
    return [
        Drawn(
            subject.run,
            subject.step,
            prompt,
            sample,
            request.sampling.seed,
            texts[i],
            n_tokens[i],
            ends[i],
        )
        for i, ((prompt, sample), request) in enumerate(zip(places, requests, strict=True))
    ]


def damaged(run: str, error: NotNumbers) -> UsageError:
    """The error to raise for weights that predict nothing."""
    return UsageError(f"{run}: {error}, with --step N or --step best")
