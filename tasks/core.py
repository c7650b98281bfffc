"""The CORE benchmark of DCLM (arXiv 2406.11794): 22 tasks as prompts of token ids, and statistics.

A bundle is a folder in the published layout: core.yaml (the tasks), eval_meta_data.csv (chance
levels), eval_data/ (one JSON object a line). Nothing here knows a model; nanochat/eval/core.py lets
one answer the prompts.

A prompt is an example after its few-shot examples, each of which is followed by a blank line. Each
of its rows of ids begins with BOS:
multiple_choice    query + delimiter + choice, a row for each choice; scored from the first token
                   that differs between rows
schema             context + delimiter + continuation, a row for each context; scored where the
                   ends of the rows are the same
language_modeling  context + delimiter + continuation, one row; scored from the first token that
                   differs from the row without the continuation"""

import csv
import json
import math
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat.common import UsageError, in_a_line, install_hint, sha256_hex

KINDS = ("multiple_choice", "schema", "language_modeling")
# the published seeds: of the order of a task's examples, and of the draw of few-shot examples
SHUFFLE_SEED = 1337
FEW_SHOT_SEED = 1234
BASELINES = ("v1", "v2")
# Chance levels that DCLM corrected in September 2025, in percent: published, and corrected.
CORRECTED = {
    "commonsense_qa": (20, 40.3),
    "agi_eval_lsat_ar": (20, 25),
    "bigbench_language_identification": (9.1, 25),
}
# examples that are tokenized together: all of their texts and ids are in memory
AT_ONCE = 256
RESAMPLES = 10_000
BOOTSTRAP_SEED = 1337

# The published bundle: label, file, shots, kind, delimiter.
_MC, _SCHEMA, _LM = KINDS
_ANSWER = "\nAnswer: "
PUBLISHED = (
    ("hellaswag_zeroshot", "language_understanding/hellaswag.jsonl", 0, _MC, " "),
    ("jeopardy", "world_knowledge/jeopardy_all.jsonl", 10, _LM, _ANSWER),
    ("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata.jsonl", 10, _LM, " "),
    ("arc_easy", "world_knowledge/arc_easy.jsonl", 10, _MC, _ANSWER),
    ("arc_challenge", "world_knowledge/arc_challenge.jsonl", 10, _MC, _ANSWER),
    ("copa", "commonsense_reasoning/copa.jsonl", 0, _MC, " "),
    ("commonsense_qa", "commonsense_reasoning/commonsense_qa.jsonl", 10, _MC, " "),
    ("piqa", "commonsense_reasoning/piqa.jsonl", 10, _MC, _ANSWER),
    ("openbook_qa", "commonsense_reasoning/openbook_qa.jsonl", 0, _MC, " "),
    ("lambada_openai", "language_understanding/lambada_openai.jsonl", 0, _LM, " "),
    ("hellaswag", "language_understanding/hellaswag.jsonl", 10, _MC, " "),
    ("winograd", "language_understanding/winograd_wsc.jsonl", 0, _SCHEMA, " "),
    ("winogrande", "language_understanding/winogrande.jsonl", 0, _SCHEMA, " "),
    (
        "bigbench_dyck_languages",
        "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
        10,
        _LM,
        " ",
    ),
    ("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl", 3, _MC, " "),
    (
        "bigbench_cs_algorithms",
        "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
        10,
        _LM,
        " ",
    ),
    ("bigbench_operators", "symbolic_problem_solving/bigbench_operators.jsonl", 10, _LM, " "),
    (
        "bigbench_repeat_copy_logic",
        "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
        10,
        _LM,
        " ",
    ),
    ("squad", "reading_comprehension/squad.jsonl", 10, _LM, " "),
    ("coqa", "reading_comprehension/coqa.jsonl", 0, _LM, " "),
    ("boolq", "reading_comprehension/boolq.jsonl", 10, _MC, _ANSWER),
    (
        "bigbench_language_identification",
        "language_understanding/bigbench_language_identification.jsonl",
        10,
        _MC,
        " ",
    ),
)
LABELS = tuple(label for label, *_ in PUBLISHED)
# what can be asked in a chat
CHOICE_LABELS = tuple(label for label, _, _, kind, _ in PUBLISHED if kind == _MC)


def label_problem(labels: Iterable[str]) -> str:
    """The message about labels given to --tasks that are not among the 22; "" if all are."""
    unknown = [label for label in labels if label not in LABELS]
    if not unknown:
        return ""
    return f"--tasks={','.join(unknown)}: not among the CORE tasks, which are {', '.join(LABELS)}"


# ---- the bundle ----


@dataclass(frozen=True)
class Task:
    """One of the 22 tasks, as a bundle describes it."""

    label: str
    # of its examples
    path: Path
    # one of KINDS
    kind: str
    # few-shot examples before each example
    shots: int
    # between the context or query and what continues it
    delimiter: str
    # accuracy of guessing, 0 to 1
    chance: float


def published_yaml() -> str:
    """The text of the published core.yaml, with the keys that are read here (JSON is YAML)."""
    entries = [
        {
            "label": label,
            "dataset_uri": uri,
            "num_fewshot": [shots],
            "icl_task_type": kind,
            "continuation_delimiter": delimiter,
        }
        for label, uri, shots, kind, delimiter in PUBLISHED
    ]
    return json.dumps({"icl_tasks": entries}, indent=1)


class Bundle(NamedTuple):
    """What a bundle's folder holds of the 22 tasks, in published order."""

    # by label
    tasks: dict[str, Task]
    # why a task cannot be used, by label
    problems: dict[str, str]
    # sentences on what differs from the published bundle
    remarks: list[str]


def read_bundle(folder: str | Path, baselines: str = "v1") -> Bundle:
    """Read which tasks a bundle holds; their examples are read by read_examples().

    baselines: "v1", the chance levels first published, or "v2", the corrected ones.
    Raises UsageError for a folder that is not a bundle."""
    folder = Path(folder)
    entries = _read_tasks(folder / "core.yaml")
    chances = _read_chances(folder / "eval_meta_data.csv")
    bundle = Bundle({}, {}, [])
    for label, _, shots, kind, delimiter in PUBLISHED:
        entry = entries.get(label)
        if entry is None:
            bundle.problems[label] = "core.yaml does not name it"
            continue
        try:
            task = _task(label, entry, folder, chances, baselines)
            exists = task.path.is_file()
        except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
            bundle.problems[label] = (
                f"its entry in core.yaml or eval_meta_data.csv is invalid "
                f"({type(error).__name__}: {in_a_line(error)})"
            )
            continue
        if (task.shots, task.kind, task.delimiter) != (shots, kind, delimiter):
            bundle.remarks.append(
                f"{label}: {task.shots} shots, {task.kind}, delimiter {task.delimiter!r}; "
                f"published are {shots}, {kind}, {delimiter!r}"
            )
        if exists:
            bundle.tasks[label] = task
        else:
            bundle.problems[label] = f"{task.path} is missing"
    if others := set(entries) - set(LABELS):
        names = ", ".join(sorted(map(repr, others)))
        bundle.remarks.append(f"not of the 22 CORE tasks, ignored: {names}")
    return bundle


def _read_tasks(path: Path) -> dict[str, dict]:
    """{label: its entry} of core.yaml."""
    try:
        import yaml
    except ImportError:
        raise install_hint("pyyaml", "reading a CORE bundle") from None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8-sig"))["icl_tasks"]
        return {entry["label"]: entry for entry in entries}
    except FileNotFoundError:
        raise UsageError(
            f"CORE bundle: {path.parent} has no core.yaml; name a folder with core.yaml, "
            f"eval_meta_data.csv and eval_data/"
        ) from None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"CORE bundle: {path} cannot be read as a list of tasks ({in_a_line(error)})"
        ) from None


def _read_chances(path: Path) -> dict[str, str]:
    """{label: chance in percent, as text} of the table of chance levels."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            return {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(f)}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise UsageError(
            f"CORE bundle: {path} cannot be read as the table of chance levels ({in_a_line(error)})"
        ) from None


def _task(
    label: str, entry: dict, folder: Path, chances: Mapping[str, str], baselines: str
) -> Task:
    """The Task of an entry of core.yaml. Raises whatever a malformed entry causes."""
    uri, shots, kind = entry["dataset_uri"], entry["num_fewshot"], entry["icl_task_type"]
    delimiter = entry.get("continuation_delimiter", " ")
    if isinstance(shots, list):
        shots = shots[0]
    if kind not in KINDS or type(shots) is not int or shots < 0 or not isinstance(delimiter, str):
        raise ValueError(
            f"type {kind!r}, num_fewshot {shots!r}, continuation_delimiter {delimiter!r}"
        )
    path = folder / "eval_data" / uri
    # a bundle from elsewhere must not read files outside its folder
    if os.path.isabs(uri) or os.path.normpath(uri).startswith(".."):
        raise ValueError(f"dataset_uri {uri!r} leads out of eval_data")
    percent = float(chances[label])
    if label in CORRECTED and percent in CORRECTED[label]:
        percent = CORRECTED[label][BASELINES.index(baselines)]
    if not 0 <= percent < 100:
        raise ValueError(f"a chance level of {percent} percent")
    return Task(label, path, kind, shots, delimiter, percent / 100)


class Examples(NamedTuple):
    """Examples of a task."""

    # parsed lines, or a part of them
    examples: list[dict]
    # how many examples the file holds
    total: int
    # how many of its lines are none
    malformed: int


def read_examples(task: Task, limit: int = -1) -> Examples:
    """A task's examples, shuffled, then cut to `limit` unless it is -1.

    Malformed lines are dropped, repeated ones kept. Raises OSError if the file cannot be read."""
    examples = []
    malformed = 0
    with open(task.path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if not line.strip():
                continue
            example = _parsed(task.kind, line)
            if example is None:
                malformed += 1
            else:
                examples.append(example)
    total = len(examples)
    # also when nothing is cut: few-shot examples are drawn by position
    random.Random(SHUFFLE_SEED).shuffle(examples)
    if limit != -1:
        examples = examples[:limit]
    return Examples(examples, total, malformed)


def _parsed(kind: str, line: str) -> dict | None:
    """The example of a line, or None if it is not one of its kind."""
    try:
        example = json.loads(line)
        if "\\ud" in line.lower():
            # perhaps half of a surrogate pair, which no text can hold: raises UnicodeEncodeError
            json.dumps(example, ensure_ascii=False).encode("utf-8")
        if kind == _LM:
            usable = bool(example["continuation"])
            texts = [example["context"], example["continuation"]]
        else:
            options = example[_options_key(kind)]
            texts = [example["query" if kind == _MC else "continuation"], *options]
            usable = (
                isinstance(options, list)
                and len(options) > 1
                and type(example["gold"]) is int
                and 0 <= example["gold"] < len(options)
                and (kind == _MC or example["continuation"] != "")
            )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if usable and all(isinstance(text, str) for text in texts):
        return example
    return None


def _options_key(kind: str) -> str:
    """The key of an example under which its choices are: of texts that end, or that begin it."""
    return "choices" if kind == _MC else "context_options"


# ---- prompts ----


@dataclass(frozen=True)
class Prompt:
    """One example as token ids."""

    # its place among the task's examples
    index: int
    # the right choice
    gold: int
    # int32 (T,) each, all different
    rows: list[np.ndarray]
    # where the scored span of each row begins, 1 or later; it ends with the row
    starts: list[int]
    # the row of each choice
    row_of: list[int]
    # leading ids that all rows have in common and that lie before every scored prediction
    shared: int
    # ids that the longest row lost
    cropped: int


def shots_of(task: Task, index: int, n: int) -> list[int]:
    """Places of the few-shot examples of example `index` of n: task.shots, or all others."""
    # the same draw as from a list of all other places, which would take n^2 steps over a task
    rng = random.Random(FEW_SHOT_SEED + index)
    drawn = rng.sample(range(n - 1), min(task.shots, n - 1))
    return [i + 1 if i >= index else i for i in drawn]


def texts_of(task: Task, examples: list[dict], index: int) -> list[str]:
    """The texts of a prompt, one for each choice.

    For language modelling they are [without the continuation, with it]."""
    shots = [examples[i] for i in shots_of(task, index, len(examples))]
    before = "".join(_written(task, shot, shot.get("gold", 0)) + "\n\n" for shot in shots)
    example = examples[index]
    if task.kind == _LM:
        # stripped: trailing white space would be part of the first token of what follows
        without = (before + example["context"].strip() + task.delimiter).strip()
        return [without, before + _written(task, example, 0)]
    n_options = len(example[_options_key(task.kind)])
    return [before + _written(task, example, option) for option in range(n_options)]


def dialogues_of(task: Task, examples: list[dict], index: int) -> list[list[dict[str, str]]]:
    """A multiple-choice prompt as conversations, one for each choice: queries are the user's,
    choices the assistant's. Few-shot examples, with the right choice, are the turns before."""
    before = [
        message
        for i in shots_of(task, index, len(examples))
        for message in _turns(examples[i], examples[i]["gold"])
    ]
    example = examples[index]
    return [[*before, *_turns(example, choice)] for choice in range(len(example["choices"]))]


def _turns(example: dict, choice: int) -> list[dict[str, str]]:
    """A multiple-choice example with one of its choices, as two messages."""
    return [
        {"role": "user", "content": example["query"]},
        {"role": "assistant", "content": example["choices"][choice]},
    ]


def _written(task: Task, example: dict, option: int) -> str:
    """An example with one of its options, or for language modelling with its continuation."""
    if task.kind == _MC:
        return example["query"] + task.delimiter + example["choices"][option]
    context = example["context"].strip() if task.kind == _LM else example["context_options"][option]
    return context + task.delimiter + example["continuation"]


def prompts_of(
    task: Task,
    examples: list[dict],
    tokenizer: Any,
    limit: int,
    indices: Iterable[int],
    threads: int = 1,
    published_crop: bool = False,
) -> list[Prompt]:
    """The prompts of the examples at these places.

    limit: tokens of a prompt at most; a longer one is cut, see cropped(). threads: of tokenizing.
    Raises UsageError if the tokenizer cannot encode a text."""
    prompts = []
    indices = list(indices)
    for first in range(0, len(indices), AT_ONCE):
        part = indices[first : first + AT_ONCE]
        texts = [texts_of(task, examples, index) for index in part]
        # in one call for all texts, which is where several threads help
        ids = iter(tokenizer.encode_batch([text for of_one in texts for text in of_one], threads))
        for index, of_one in zip(part, texts, strict=True):
            rows = [np.concatenate([[tokenizer.bos], next(ids)]).astype(np.int32) for _ in of_one]
            gold = examples[index].get("gold", 0)
            prompts.append(prompt_of_rows(task.kind, index, gold, rows, limit, published_crop))
    return prompts


def prompt_of_rows(
    kind: str,
    index: int,
    gold: int,
    rows: list[np.ndarray],
    limit: int,
    published_crop: bool = False,
) -> Prompt:
    """The Prompt of rows of ids, which stand for the texts of texts_of()."""
    if kind == _LM:
        starts = [_common_length(rows)]
        rows = rows[1:]
    elif kind == _MC:
        starts = [_common_length(rows)] * len(rows)
    else:
        alike = _common_length([row[::-1] for row in rows])
        starts = [len(row) - alike for row in rows]
    longest = max(map(len, rows))
    rows, starts = cropped(rows, starts, limit, published_crop)
    # choices with the same ids are scored once, and so tie exactly
    places = {}
    distinct = []
    row_of = []
    for i, row in enumerate(rows):
        key = row.tobytes()
        if key not in places:
            places[key] = len(distinct)
            distinct.append(i)
        row_of.append(places[key])
    rows = [rows[i] for i in distinct]
    starts = [starts[i] for i in distinct]
    # the id before a scored span predicts it, so it is not part of what is only read
    shared = max(0, min(_common_length(rows), *starts) - 1)
    return Prompt(index, gold, rows, starts, row_of, shared, max(0, longest - limit))


def cropped(
    rows: list[np.ndarray], starts: list[int], limit: int, published: bool
) -> tuple[list[np.ndarray], list[int]]:
    """Rows of at most `limit` ids and where their scored spans begin, 1 or later.

    Every row loses as many ids behind its BOS as the longest has too many, so that the choices keep
    the same context. published: each row keeps its own last ids, without BOS where it is too long,
    as the published evaluation of models with a fixed context does (GPT-2's 0.2565)."""
    too_many = [max(0, len(row) - limit) for row in rows]
    if not any(too_many):
        return rows, [max(1, start) for start in starts]
    if published:
        rows = [row[n:] for row, n in zip(rows, too_many, strict=True)]
    else:
        too_many = [max(too_many)] * len(rows)
        rows = [
            np.concatenate([row[:1], row[1 + n :]]) for row, n in zip(rows, too_many, strict=True)
        ]
    return rows, [max(1, start - n) for start, n in zip(starts, too_many, strict=True)]


def _common_length(rows: list[np.ndarray]) -> int:
    """Length of the longest common beginning of some arrays."""
    shortest = min(map(len, rows))
    same = (np.stack([row[:shortest] for row in rows]) == rows[0][:shortest]).all(axis=0)
    return shortest if same.all() else int(same.argmin())


def fingerprint_of(task: Task, examples: list[dict], chat: bool = False) -> str:
    """SHA-256 that two evaluations of a task share if their prompts are the same texts. chat:
    whether they are those of dialogues_of().

    Only then their answers can be paired."""
    facts = [task.kind, task.shots, task.delimiter, examples]
    if chat:
        facts.append("chat")
    return sha256_hex(json.dumps(facts, sort_keys=True))


# ---- statistics ----


def centered(accuracy: float, chance: float) -> float:
    """Accuracy on the scale where guessing is 0 and a perfect score is 1."""
    return (accuracy - chance) / (1 - chance)


def standard_error(correct: list[int]) -> float | None:
    """The standard error of the mean of answers (0 or 1 each); None for fewer than two."""
    n = len(correct)
    if n < 2:
        return None
    return float(np.std(correct, ddof=1)) / math.sqrt(n)


def metric(centered_accuracies: Iterable[float]) -> float:
    """CORE: the mean of the tasks' centered accuracies."""
    values = list(centered_accuracies)
    return sum(values) / len(values)


class Answered(Protocol):
    """The answers to a task's examples; a result has more fields than these."""

    # a 0 or 1 for each example
    correct: str
    # accuracy of guessing
    chance: float
    # from fingerprint_of()
    fingerprint: str
    # of the examples, within the bundle
    file: str


def interval(
    results: Mapping[str, Answered],
    others: Mapping[str, Answered] | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """(low, high): the bootstrap interval, over examples, of CORE or of a difference in CORE.

    results: by label. others: of another evaluation of the same tasks and examples, to subtract;
    its examples are resampled in pairs with those of results. confidence: between the percentiles.
    Tasks that share their examples are resampled together.
    Raises ValueError if the two evaluations cannot be paired."""
    if others is not None:
        _check_pairs(results, others)
    # CORE is a sum over files, whose examples are drawn independently
    draws = np.zeros(RESAMPLES)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    for worth in _worth_of_examples(results, others):
        # resampling n examples with replacement is one multinomial draw over the distinct values
        values, counts = np.unique(worth, return_counts=True)
        n = counts.sum()
        draws += rng.multinomial(n, counts / n, size=RESAMPLES) @ values / n
    if others is None:
        # the worth of an example leaves out what does not vary, which is the chance levels
        offsets = [result.chance / (1 - result.chance) for result in results.values()]
        draws -= sum(offsets) / len(results)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, (1 + confidence) / 2])
    return float(low), float(high)


def _check_pairs(results: Mapping[str, Answered], others: Mapping[str, Answered]) -> None:
    """Raises ValueError unless the answers of two evaluations are to the same examples."""
    if set(results) != set(others):
        names = ", ".join(sorted(set(results) ^ set(others)))
        raise ValueError(f"evaluated on other tasks: {names}")
    for label, result in results.items():
        if others[label].fingerprint != result.fingerprint:
            raise ValueError(f"{label}: evaluated on other examples")
        if others[label].chance != result.chance:
            raise ValueError(f"{label}: centered on another chance level")


def _worth_of_examples(
    results: Mapping[str, Answered], others: Mapping[str, Answered] | None
) -> list[np.ndarray]:
    """What each example adds to CORE, times the number of examples: (n,) float64 of each file.

    Tasks of one file, cut alike, have the same examples in the same order, and are one entry."""
    files = {}
    for label, result in results.items():
        share = 1 / (len(results) * (1 - result.chance))
        columns = files.setdefault((result.file, len(result.correct)), [])
        columns.append(share * _as_array(result.correct))
        if others is not None:
            columns.append(-share * _as_array(others[label].correct))
    return [sum(columns) for columns in files.values()]


def _as_array(correct: str) -> np.ndarray:
    """float64 (n,) of a string of 0 and 1."""
    return np.array([int(digit) for digit in correct], dtype=np.float64)
