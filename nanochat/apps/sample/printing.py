"""Printing samples: of one checkpoint as they are drawn, of several side by side."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanochat import output
from nanochat.apps.sample.drawing import (
    MOST_TOGETHER,
    Drawn,
    Subject,
    damaged,
    requests_for,
    token_limits,
)
from nanochat.apps.sample.layout import print_side_by_side, shown
from nanochat.eval.generation import NotNumbers
from nanochat.eval.writer import Writer


def print_samples(
    subject: Subject, prompts: list[str], num_samples: int, options: dict[str, Any]
) -> None:
    """Print every sample of every prompt. UsageError as in drawing.draw()."""
    limits = token_limits(subject, prompts, options["max_new_tokens"])
    # a single sample is printed bare, so that it can be piped as text
    titled = len(prompts) * num_samples > 1
    slots = min(num_samples, MOST_TOGETHER)
    try:
        with Writer(subject.model, subject.tokenizer, slots=slots) as writer:
            for p, (prompt, limit) in enumerate(zip(prompts, limits, strict=True), start=1):
                asked = {**options, "max_new_tokens": limit}
                samples = _samples(writer, subject, prompt, num_samples, asked)
                for s, pieces in enumerate(samples, start=1):
                    if titled:
                        print(f"--- {_title(p, len(prompts), s, num_samples)} ---")
                    # an answer stands alone, so that it can be piped
                    _print_text("" if subject.chat else prompt, pieces)
                    if output.reader_is_gone():
                        return
    except NotNumbers as error:
        # ends the line of the prompt
        print(flush=True)
        raise damaged(subject.run, error) from None


def _samples(
    writer: Writer, subject: Subject, prompt: str, num_samples: int, options: dict[str, Any]
) -> list[Iterable[str]]:
    """The samples of a prompt, each in pieces to print."""
    requests = requests_for(subject.ids(prompt), num_samples, options)
    # drawn while it is printed; several samples share each step and end at different ones
    if num_samples == 1:
        return [(event.text for _, event in writer.events(requests))]
    return [[text] for text in writer.texts(requests)]


def _print_text(prompt: str, pieces: Iterable[str]) -> None:
    """Print a prompt and its continuation, each piece as soon as it is drawn."""
    # flushed, so that text appears as it is drawn in a pipe as well
    print(shown(prompt), end="", flush=True)
    for piece in pieces:
        print(shown(piece), end="", flush=True)
        # as after `| head`
        if output.reader_is_gone():
            return
    print()


def print_compared(
    drawn: Sequence[list[Drawn]], n_prompts: int, num_samples: int, chat: bool
) -> None:
    """Print the texts of several checkpoints, those of one prompt together. drawn: of each
    checkpoint, all samples of the first prompt, all of the second, and so on. chat: the answers
    alone."""
    for place, texts in enumerate(zip(*drawn, strict=True)):
        p, s = divmod(place, num_samples)
        if len(drawn[0]) > 1:
            print(f"=== {_title(p + 1, n_prompts, s + 1, num_samples)} ===")
        print_side_by_side([(f"{text.run}, step {text.step}", text.shown(chat)) for text in texts])
        if output.reader_is_gone():
            return


def _title(p: int, n_prompts: int, s: int, num_samples: int) -> str:
    return f"prompt {p} of {n_prompts}, sample {s} of {num_samples}"
