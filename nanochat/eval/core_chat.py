"""Multiple-choice tasks of CORE in the chat format, which a model that was tuned on conversations
knows.

The query is a message of the user, and the answer is the choice that the assistant would most
likely write, scored as in CORE: by the mean loss of the tokens from the first that differs between
the choices, here with the end of the turn, so that no choice wins by being the beginning of
another. Few-shot examples are earlier turns of the conversation."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from nanochat.data.chat import is_chat, render_batch
from nanochat.data.tokenizer import Tokenizer
from tasks.core import AT_ONCE, CHOICE_LABELS, Prompt, Task, dialogues_of, prompt_of_rows


def chat_problem(tokenizer: Any, name: str = "this model") -> str:
    """Why a model with this tokenizer cannot be asked in the chat format, "" if it can. name: of
    the model."""
    if isinstance(tokenizer, Tokenizer) and is_chat(tokenizer):
        return ""
    return f"--core-chat: {name} was not trained on conversations; give a run of `nanochat sft`"


def choice_problem(labels: Iterable[str]) -> str:
    """Why these tasks cannot be asked in the chat format, "" if they can."""
    others = [label for label in labels if label not in CHOICE_LABELS]
    if not others:
        return ""
    return (
        f"--core-chat: only multiple-choice tasks can be asked in a chat, not "
        f"{', '.join(others)}; give --tasks of {', '.join(CHOICE_LABELS)}"
    )


def chat_prompts_of(
    task: Task,
    examples: list[dict],
    tokenizer: Tokenizer,
    limit: int,
    indices: Iterable[int],
    threads: int = 1,
) -> list[Prompt]:
    """The prompts of the examples of a multiple-choice task at these places, as conversations.

    Arguments and errors as of tasks.core.prompts_of(); also UsageError for a tokenizer without the
    special tokens of chats."""
    prompts = []
    indices = list(indices)
    for first in range(0, len(indices), AT_ONCE):
        part = indices[first : first + AT_ONCE]
        dialogues = [dialogues_of(task, examples, index) for index in part]
        rendered = iter(
            render_batch(tokenizer, [one for of_one in dialogues for one in of_one], False, threads)
        )
        for index, of_one in zip(part, dialogues, strict=True):
            rows = [next(rendered)[0].astype(np.int32) for _ in of_one]
            gold = examples[index]["gold"]
            prompts.append(prompt_of_rows(task.kind, index, gold, rows, limit))
    return prompts
