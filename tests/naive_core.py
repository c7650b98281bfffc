"""The CORE evaluation again, one example at a time, to check nanochat/eval/core.py against.

It shares no code with nanochat, so that both cannot be wrong in the same lines."""

import csv
import json
import math
import random
from pathlib import Path

import torch
import yaml


def evaluate(bundle, model, tokenizer, max_per_task=None, labels=None, crop=False):
    """{label: {"answers", "correct", "accuracy", "centered"}} of a bundle's tasks, or of `labels`.

    The lists have one entry per example, in shuffled order. An answer is the number of the chosen
    option, or for language modelling whether the continuation was predicted. crop: rows are cropped
    to the sequence length that the model was trained on, each to its last tokens; else rows longer
    than ten times that lose the same number of tokens behind BOS."""
    bundle = Path(bundle)
    chances, results = read_chances(bundle), {}
    limit = model.config.max_seq_len if crop else 10 * model.config.max_seq_len
    for task in yaml.safe_load((bundle / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]:
        label = task["label"]
        if labels is not None and label not in labels:
            continue
        examples = read_examples(bundle / "eval_data" / task["dataset_uri"], max_per_task)
        answers = [
            answer(task, examples, i, model, tokenizer, limit, crop) for i in range(len(examples))
        ]
        if task["icl_task_type"] == "language_modeling":
            correct = list(answers)
        else:
            correct = [
                given == example["gold"] for given, example in zip(answers, examples, strict=True)
            ]
        accuracy = sum(correct) / len(correct)
        centered = (accuracy - chances[label]) / (1 - chances[label])
        results[label] = {
            "answers": answers,
            "correct": correct,
            "accuracy": accuracy,
            "centered": centered,
        }
    return results


def core(results):
    """The CORE metric of what evaluate() returns."""
    return sum(result["centered"] for result in results.values()) / len(results)


def read_chances(bundle):
    """{label: accuracy of guessing}, from 0 to 1."""
    with open(bundle / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
        return {
            row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)
        }


def read_examples(path, max_per_task):
    """The examples of a file, shuffled, then cut."""
    with open(path, encoding="utf-8") as file:
        examples = [json.loads(line) for line in file if line.strip()]
    random.Random(1337).shuffle(examples)
    return examples[:max_per_task]


def options(task, example):
    """The example written out, once per option; language modelling has one option, the true one."""
    delimiter = task.get("continuation_delimiter", " ")
    if task["icl_task_type"] == "multiple_choice":
        return [example["query"] + delimiter + choice for choice in example["choices"]]
    if task["icl_task_type"] == "schema":
        return [
            option + delimiter + example["continuation"] for option in example["context_options"]
        ]
    assert task["icl_task_type"] == "language_modeling", task
    return [example["context"].strip() + delimiter + example["continuation"]]


def common(rows):
    """How many items all rows share at their beginning."""
    length = 0
    while all(len(row) > length and row[length] == rows[0][length] for row in rows):
        length += 1
    return length


def rows_and_starts(task, examples, index, tokenizer, limit, to_last):
    """The token ids of an example's prompts, and where the scored span of each begins.

    limit: the most tokens that a prompt may have. to_last: each keeps its last ones."""

    def tokens(text):
        return [tokenizer.bos] + list(tokenizer.encode(text))

    others = [j for j in range(len(examples)) if j != index]
    picked = random.Random(1234 + index).sample(others, min(task["num_fewshot"][0], len(others)))
    shots = "".join(options(task, examples[j])[examples[j].get("gold", 0)] + "\n\n" for j in picked)
    rows = [tokens(shots + option) for option in options(task, examples[index])]
    if task["icl_task_type"] == "multiple_choice":
        starts = [common(rows)] * len(rows)
    elif task["icl_task_type"] == "schema":
        suffix = common([row[::-1] for row in rows])
        starts = [
            max(1, len(row) - suffix) for row in rows
        ]  # nothing comes before BOS to predict it from
    else:
        before = (
            shots + examples[index]["context"].strip() + task.get("continuation_delimiter", " ")
        )
        starts = [common([tokens(before.strip()), rows[0]])]
    excess = max(map(len, rows)) - limit
    if to_last:
        starts = [
            max(1, start - max(0, len(row) - limit))
            for row, start in zip(rows, starts, strict=True)
        ]
        rows = [row[-limit:] for row in rows]
    elif excess > 0:
        rows = [row[:1] + row[1 + excess :] for row in rows]
        starts = [max(1, start - excess) for start in starts]
    return rows, starts


@torch.no_grad()
def answer(task, examples, index, model, tokenizer, limit, to_last):
    """The answer to one example: the number of an option, or whether it is predicted."""
    rows, starts = rows_and_starts(task, examples, index, tokenizer, limit, to_last)
    longest = max(map(len, rows))
    logits_BxTxV = model(torch.tensor([row + [0] * (longest - len(row)) for row in rows]))
    spans = [
        (logits_TxV[start - 1 : len(row) - 1], torch.tensor(row[start:], dtype=torch.int64))
        for row, start, logits_TxV in zip(rows, starts, logits_BxTxV, strict=True)
    ]
    if task["icl_task_type"] == "language_modeling":
        predictions, targets = spans[0]
        return len(targets) > 0 and predictions.argmax(dim=-1).tolist() == targets.tolist()
    losses = [mean_loss(*span) for span in spans]
    losses = [
        losses[rows.index(row)] for row in rows
    ]  # equal rows are a tie, whatever the rounding
    return losses.index(min(losses))


def mean_loss(logits_NxV, targets_N):
    """Mean cross-entropy in nats, infinite for no tokens.

    The mean is exact, so that equal losses of any number of tokens stay equal."""
    if not len(targets_N):
        return math.inf
    log_probabilities_NxV = logits_NxV.log_softmax(dim=-1)
    losses = [-log_probabilities_NxV[i, target].item() for i, target in enumerate(targets_N)]
    return math.fsum(losses) / len(losses)
