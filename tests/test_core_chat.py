"""Multiple-choice tasks in the chat format: prompts and answers worked out by hand."""

import json
import statistics

import pytest
import small
import torch
import torch.nn.functional as F
from test_core import noisy_model
from test_export import LLAMA, make_run

from nanochat.apps import evaluate
from nanochat.common import UsageError
from nanochat.data.chat import with_chat
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval import core
from nanochat.eval.core_chat import chat_prompts_of
from tasks.core import CHOICE_LABELS, Task, dialogues_of, fingerprint_of, read_examples

BYTES = Tokenizer("byte", [bytes([i]) for i in range(256)])
CHAT = with_chat(BYTES)
BOS, USER, ASSISTANT, END = (
    CHAT.bos,
    *(CHAT.special_ids[f"<|{name}|>"] for name in ("user_start", "assistant_start", "turn_end")),
)
CPU = torch.device("cpu")
EXAMPLES = [
    {"query": "2 + 2?", "choices": ["4", "40"], "gold": 0},
    {"query": "sky?", "choices": ["green", "blue", "grey"], "gold": 1},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small.core_bundle(tmp_path_factory.mktemp("core"))


def task_with(shots):
    return Task("made", None, "multiple_choice", shots, "\nAnswer: ", 0.25)


def test_a_prompt_by_hand():
    """The other example, answered rightly, is an earlier turn; the task's delimiter is left out."""
    (prompt,) = chat_prompts_of(task_with(1), EXAMPLES, CHAT, 640, [1])
    before = [BOS, USER, *b"2 + 2?", END, ASSISTANT, *b"4", END]
    asked = [*before, USER, *b"sky?", END, ASSISTANT]
    assert [row.tolist() for row in prompt.rows] == [
        [*asked, *choice, END] for choice in (b"green", b"blue", b"grey")
    ]
    # all choices differ in their first letter
    assert prompt.starts == [len(asked)] * 3 and prompt.gold == prompt.index == 1
    # the token that predicts the first of them is read for each choice
    assert prompt.shared == len(asked) - 1
    roles = [message["role"] for message in dialogues_of(task_with(1), EXAMPLES, 1)[0]]
    assert roles == ["user", "assistant"] * 2


def test_a_choice_that_begins_another_is_told_from_it():
    """By the end of its turn."""
    (prompt,) = chat_prompts_of(task_with(0), EXAMPLES, CHAT, 640, [0])
    scored = [row[start:].tolist() for row, start in zip(prompt.rows, prompt.starts, strict=True)]
    assert scored == [[END], [*b"0", END]]


def test_the_answers_and_their_share_by_hand(bundle):
    """The choice with the smallest mean loss of its own tokens, and the share of right ones."""
    model = noisy_model(vocab_size=CHAT.vocab_size)
    label = "commonsense_qa"
    asked = core.Core(bundle, CHAT, 640, labels=(label,), chat=True)
    asked.describe(1.0, 1.0)
    found = core.evaluate(model, asked, 700, CPU).tasks[label]
    examples = read_examples(asked.tasks[label]).examples
    answers = []
    for index in range(len(examples)):
        prompt = chat_prompts_of(asked.tasks[label], examples, CHAT, 640, [index])[0]
        losses = []
        for choice in range(len(examples[index]["choices"])):
            row, start = prompt.rows[prompt.row_of[choice]], prompt.starts[prompt.row_of[choice]]
            ids = torch.from_numpy(row).long()
            with torch.no_grad():
                logits = model.logits(model.hidden(ids[None, :-1]))[0]
            losses.append(F.cross_entropy(logits[start - 1 :], ids[start:]).item())
        answers.append(losses.index(min(losses)))
    assert found.answers == answers and len(set(answers)) > 1
    right = [int(a == example["gold"]) for a, example in zip(answers, examples, strict=True)]
    assert found.accuracy == statistics.mean(right)
    assert found.stderr == pytest.approx(statistics.stdev(right) / len(right) ** 0.5)
    # answers in one format are never paired with those in the other
    assert found.fingerprint != fingerprint_of(asked.tasks[label], examples)


def test_what_cannot_be_asked(bundle):
    with pytest.raises(UsageError, match="not trained on conversations"):
        core.Core(bundle, BYTES, 640, labels=("copa",), chat=True)
    with pytest.raises(UsageError, match="only multiple-choice .* not winograd; give --tasks of"):
        core.Core(bundle, CHAT, 640, labels=("copa", "winograd"), chat=True)


def test_runs_and_tasks_are_refused_before_the_bundle_is_needed(tmp_path):
    """All runs, with their names; a bundle may be a download, and the first run takes hours."""
    run = make_run(tmp_path / "run", LLAMA, tokenizer=CHAT)
    base = make_run(tmp_path / "base", LLAMA, tokenizer=BYTES)
    flags = ["--core", "--core-chat", "--core-bundle=nowhere", "--tasks=winograd"]
    with pytest.raises(UsageError) as refused:
        evaluate.main([str(run), str(base), *flags])
    tasks, model = str(refused.value).splitlines()
    assert "not winograd" in tasks and f"{base} was not trained on conversations" in model


def test_the_command(bundle, tmp_path, capsys):
    """All multiple-choice tasks, with a number and its interval that are not called CORE."""
    run = make_run(tmp_path / "run", LLAMA, tokenizer=CHAT)
    flags = ["--core", "--core-chat", f"--core-bundle={bundle}"]
    assert evaluate.main([str(run), *flags]) == 0
    said = capsys.readouterr().out
    n = len(CHOICE_LABELS)
    assert "mean centered accuracy" in said and f"of {n} tasks, 95% interval" in said
    (path,) = (run / "evaluations").glob("*.json")
    written = json.loads(path.read_text())["core"]
    assert written["core_metric"] is None and written["chat"] is True
    assert list(written["tasks"]) == list(CHOICE_LABELS)
    assert all(task["n"] == 6 for task in written["tasks"].values())
