"""The CORE metric of a model: the tasks of a bundle, evaluated on all ranks together.

tasks/core.py reads the bundle and writes the prompts, core_answers.py lets a model answer them.
The prompts of a task are dealt to the ranks in turn."""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import limits
from nanochat.common import Unavailable, UsageError, ceil_div, human_time, in_a_line
from nanochat.eval.core_answers import answers_of, batches, tokens_of
from nanochat.eval.core_bundle import find_bundle
from nanochat.eval.core_chat import chat_problem, chat_prompts_of, choice_problem
from nanochat.eval.unison import EvaluationFailed, sum_or_leave
from nanochat.model.build import for_inference
from nanochat.model.config import ROPE_REACH, GPTConfig
from nanochat.model.decoder import Decoder
from nanochat.optim.sharding import is_sharded, passes_of_its_own
from nanochat.ranks import from_all, from_rank0_or_raise, print0, rank, world_size
from tasks.core import (
    LABELS,
    Examples,
    Prompt,
    Task,
    centered,
    fingerprint_of,
    interval,
    label_problem,
    metric,
    prompts_of,
    read_bundle,
    read_examples,
    standard_error,
)

LEFT_OUT = "left out by --tasks"
# examples of a task that are tokenized to estimate how long an evaluation takes
SAMPLED_EXAMPLES = 4

# progress(share done, label of the task, estimated seconds left)
Progress = Callable[[float, str, float], None]


@dataclass(frozen=True)
class TaskResult:
    """The result of one task. Its fields are those of a line of core.jsonl, in their order."""

    # None for a task that failed
    accuracy: float | None
    centered: float | None
    # None for a single example, too
    stderr: float | None
    # examples evaluated
    n: int
    # accuracy of guessing
    chance: float
    # few-shot examples before each
    shots: int
    # examples in the file, and lines of it that are none
    examples: int
    malformed: int
    # choices without a scored token
    empty_spans: int
    # prompts that were longer than the limit
    cropped: int
    # a 0 or 1 for each example, and the choices
    correct: str
    answers: list[int]
    # of the examples, within the bundle
    file: str
    # shared by evaluations that can be paired by example
    fingerprint: str
    # why the task failed, or None
    reason: str | None
    seconds: float


@dataclass(frozen=True)
class CoreResult:
    """The result of an evaluation, the same on all ranks."""

    # None, with a reason, unless all 22 tasks were evaluated
    core_metric: float | None
    # 95% bootstrap interval of core_metric
    low: float | None
    high: float | None
    # examples of all tasks
    n: int
    reason: str | None
    seconds: float
    # chance levels: "v1" or "v2", or "" where the bundle was never read
    baselines: str
    # by label
    tasks: dict[str, TaskResult]


class Core:
    """The tasks of a bundle and their prompts for one tokenizer, written when first needed."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        limit: int,
        *,
        max_per_task: int = -1,
        labels: tuple[str, ...] = LABELS,
        baselines: str = "v1",
        threads: int = 1,
        keep: bool = True,
        shares: bool = True,
        chat: bool = False,
        published_crop: bool = False,
    ) -> None:
        """limit: tokens of a prompt at most. max_per_task: examples of a task at most, -1: all.

        published_crop: how longer ones are cut, see tasks.core.cropped().
        labels: the tasks to evaluate; fewer than all give no CORE. baselines: chance levels, "v1"
        or "v2". keep: hold the prompts in memory for the next evaluation of the same run.
        shares: the model accepts a cache, so that what rows have in common is read once. chat: ask
        in the chat format, which takes multiple-choice tasks only; see core_chat.py.
        Raises UsageError for a folder that is not a bundle, for unknown labels, and for what cannot
        be asked in chats; open_core() raises it on all ranks."""
        problem = label_problem(labels)
        if chat:
            problem = problem or chat_problem(tokenizer) or choice_problem(labels)
        if problem:
            raise UsageError(problem)
        bundle = read_bundle(folder, baselines)
        # those that will be evaluated, by label; describe() takes out what turns out to be unusable
        self.tasks: dict[str, Task] = {
            label: task for label, task in bundle.tasks.items() if label in labels
        }
        # why a task cannot be evaluated, by label, for every one of the 22 that is not in tasks
        self.problems: dict[str, str] = {
            label: bundle.problems.get(label, LEFT_OUT)
            for label in LABELS
            if label not in self.tasks
        }
        # sentences on what differs from the published bundle
        self.remarks: list[str] = bundle.remarks
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.limit = limit
        self.max_per_task = max_per_task
        self.baselines = baselines
        self.threads = threads
        self.keep = keep
        self.shares = shares
        self.chat = chat
        self.published_crop = published_crop
        # tokens of a task's prompts, by label, estimated by describe()
        self.tokens_of: dict[str, float] = {}
        self._examples: dict[str, Examples] = {}
        self._prompts: dict[str, list[Prompt]] = {}

    def examples_of(self, label: str) -> Examples:
        """The examples of a task. Raises EvaluationFailed if there is none."""
        if label in self._examples:
            return self._examples[label]
        path = self.tasks[label].path
        try:
            found = read_examples(self.tasks[label], self.max_per_task)
        except OSError as error:
            raise EvaluationFailed(f"{path} cannot be read ({error.strerror})") from None
        if not found.examples:
            raise EvaluationFailed(
                f"{path} holds no example of its kind ({found.malformed} malformed lines)"
            )
        if self.keep:
            self._examples[label] = found
        return found

    def prompts_of(self, label: str, examples: list[dict]) -> list[Prompt]:
        """This rank's share of the prompts of a task's examples.

        Raises EvaluationFailed if the tokenizer cannot encode one."""
        if label in self._prompts:
            return self._prompts[label]
        prompts = self._write_prompts(label, examples, range(rank(), len(examples), world_size()))
        if self.keep:
            self._prompts[label] = prompts
        return prompts

    def _write_prompts(self, label: str, examples: list[dict], indices: range) -> list[Prompt]:
        write = chat_prompts_of if self.chat else prompts_of
        if self.published_crop:
            write = functools.partial(prompts_of, published_crop=True)
        try:
            prompts = write(
                self.tasks[label], examples, self.tokenizer, self.limit, indices, self.threads
            )
        except UsageError as error:
            raise EvaluationFailed(f"its text cannot be tokenized: {in_a_line(error)}") from None
        if not self.shares:
            return [dataclasses.replace(prompt, shared=0) for prompt in prompts]
        return prompts

    def describe(self, flops_per_token: float, flops: float) -> list[str]:
        """Read a few examples of each task; one that fails on any rank becomes a problem on all.

        flops_per_token: of training. flops: expected of all devices together, per second.
        Returns the lines to print before an evaluation: what will be measured, about how long it
        takes, and what prevents the metric. All ranks call it."""
        n_examples = 0
        for label in self.tasks:
            try:
                examples = self.examples_of(label).examples
                step = ceil_div(len(examples), SAMPLED_EXAMPLES)
                sampled = self._write_prompts(label, examples, range(0, len(examples), step))
            except EvaluationFailed as error:
                self.problems[label] = str(error)
            else:
                self.tokens_of[label] = len(examples) * sum(map(tokens_of, sampled)) / len(sampled)
                n_examples += len(examples)
        # one rank's disk may lack a file that another's has; only what all can evaluate is left
        for problems in from_all(self.problems):
            self.problems = {**problems, **self.problems}
        self.tasks = {
            label: task for label, task in self.tasks.items() if label not in self.problems
        }
        n_tokens = sum(self.tokens_of.values())
        # an evaluation is forward passes, a third of training's FLOPs
        seconds = n_tokens * flops_per_token / 3 / flops
        cut = "" if self.max_per_task == -1 else f" (at most {self.max_per_task} a task)"
        lines = [
            f"CORE: {len(self.tasks)} of {len(LABELS)} tasks, {n_examples:,} examples{cut}, "
            f"{n_tokens:,.0f} tokens: about {human_time(seconds)} an evaluation"
        ]
        lines += [
            f"CORE: {label} cannot be evaluated, so there will be no CORE metric: {why}"
            for label, why in self.problems.items()
            if why != LEFT_OUT
        ]
        return lines + [f"CORE: {remark}" for remark in self.remarks]


def open_core(folder: Path, tokenizer: Any, limit: int, **options: Any) -> Core:
    """Core(), whose UsageError on any rank is raised on all ranks.

    Where nodes share no disk, one of them may lack the bundle."""
    core = None
    problem = None
    try:
        core = Core(folder, tokenizer, limit, **options)
    except UsageError as error:
        problem = str(error)
    if problem := next(filter(None, from_all(problem)), None):
        raise UsageError(problem)
    return core


def len_limit(config: GPTConfig, crop: bool = False) -> int:
    """Tokens of a prompt at most: as many positions as the model has, or with crop its context."""
    if crop:
        return config.max_seq_len
    return ROPE_REACH * config.max_seq_len


# ---- one evaluation ----


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    core: Core,
    batch_tokens: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Progress = lambda share, label, seconds_left: None,
) -> CoreResult:
    """Answer the prompts of a Core that has been described. All ranks call it and share the work.

    model: a Decoder, or a module with its hidden() and logits(), `config` and `compute_dtype`; its
    train or eval mode is restored. batch_tokens: tokens of a pass at most, padding included (one
    prompt at least). interrupted: asked before each pass; True stops the evaluation.
    progress: called after each pass.
    A task that cannot be read or tokenized is a result without numbers, with the reason.
    Raises Stopped on every rank when any was interrupted, and EvaluationFailed on every rank when
    the model fails on any, for example because its numbers are not finite."""
    was_training = model.training
    started = time.monotonic()
    tokens_in_all = sum(core.tokens_of.values())
    tokens_done = 0.0
    results = {}

    # shares of tokens, not of tasks: some tasks are many times longer than others
    def report(label: str, share_of_task: float) -> None:
        done = tokens_done + share_of_task * core.tokens_of.get(label, 0.0)
        if share := done / max(tokens_in_all, 1.0):
            progress(share, label, (time.monotonic() - started) * (1 / share - 1))

    try:
        answering = _inference_copy(model)
        for label in core.tasks:
            results[label] = _evaluate_task(
                answering, core, label, batch_tokens, device, interrupted, report
            )
            tokens_done += core.tokens_of.get(label, 0.0)
    finally:
        # also when Stopped passes: the caller saves and may evaluate again
        model.train(was_training)
    return _summary(core, results, time.monotonic() - started)


def _inference_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode; a Decoder with weights in its compute dtype, if memory allows."""
    # a copy would be whole, and a sharded model may be too large for that
    if not isinstance(model, Decoder) or is_sharded(model):
        return model.eval()
    try:
        return for_inference(model)
    except (RuntimeError, MemoryError) as error:
        if not limits.is_out_of_memory(error):
            raise
        # slower, with the same results
        return model.eval()


def _summary(core: Core, results: dict[str, TaskResult], seconds: float) -> CoreResult:
    """The CoreResult of the tasks' results."""
    good = {label: result for label, result in results.items() if result.accuracy is not None}
    core_metric = low = high = reason = None
    if len(good) == len(LABELS):
        core_metric = metric(result.centered for result in good.values())
        low, high = interval(good)
    else:
        failed = {label: result.reason for label, result in results.items() if result.reason}
        problems = core.problems | failed
        reasons = [f"{label} ({why})" for label, why in problems.items() if why != LEFT_OUT]
        reason = (
            f"{len(LABELS) - len(good)} of {len(LABELS)} tasks were not evaluated: "
            f"{'; '.join(reasons) or LEFT_OUT}"
        )
    return CoreResult(
        core_metric=core_metric,
        low=low,
        high=high,
        n=sum(result.n for result in good.values()),
        reason=reason,
        seconds=seconds,
        baselines=core.baselines,
        tasks=results,
    )


class _Opened(NamedTuple):
    """What a rank has read of a task. problem: why it cannot be evaluated, on any rank, or None."""

    found: Examples
    fingerprint: str
    prompts: list[Prompt]
    problem: str | None


def _open_task(core: Core, label: str) -> _Opened:
    """Read a task's examples and write this rank's prompts. All ranks get the same `problem`."""
    found = Examples([], 0, 0)
    fingerprint = ""
    prompts = []
    problem = None
    try:
        found = core.examples_of(label)
        fingerprint = fingerprint_of(core.tasks[label], found.examples, core.chat)
        prompts = core.prompts_of(label, found.examples)
    except EvaluationFailed as error:
        problem = str(error)
    except Exception as error:
        # reported to the other ranks instead of raised: without this share the task is lost
        problem = f"{type(error).__name__}: {in_a_line(error)}"
    # ranks that read different examples would add up answers to different questions
    views = from_all((len(found.examples), fingerprint, problem))
    problem = next((view[2] for view in views if view[2]), None)
    if problem is None and len(set(views)) > 1:
        problem = "the ranks read different examples"
    return _Opened(found, fingerprint, [] if problem else prompts, problem)


def _evaluate_task(
    model: torch.nn.Module,
    core: Core,
    label: str,
    batch_tokens: int,
    device: torch.device,
    interrupted: Callable[[], bool],
    report: Callable[[str, float], None],
) -> TaskResult:
    """One task's result. Raises as evaluate()."""
    started = time.monotonic()
    kind = core.tasks[label].kind
    opened = _open_task(core, label)
    n = 0 if opened.problem else len(opened.found.examples)
    # each rank fills in the answers to its prompts, and the sum has them all
    answers = torch.zeros(n, dtype=torch.float64)
    n_empty = n_cropped = n_answered = 0
    stopped = False
    failure = ""
    cause = None
    try:
        with passes_of_its_own(model):
            for batch in batches(opened.prompts, batch_tokens):
                if interrupted():
                    stopped = True
                    break
                found = answers_of(model, batch, kind, device)
                for prompt, answer in zip(batch, found, strict=True):
                    answers[prompt.index] = answer.choice
                    n_empty += answer.n_empty
                    n_cropped += prompt.cropped > 0
                n_answered += len(batch)
                report(label, n_answered / len(opened.prompts))
    except Exception as error:
        # not raised here: the other ranks would wait for this one's answers
        failure = f"{label}: {type(error).__name__}: {in_a_line(error)}"
        cause = error
    # one exchange a task: counts and answers are exact in fp64
    sums = torch.cat((torch.tensor([n_empty, n_cropped], dtype=torch.float64), answers))
    sums = sum_or_leave(
        sums,
        device,
        stopped=stopped,
        failure=failure,
        cause=cause,
        failed_elsewhere=f"{label}: another rank failed",
    )
    n_empty, n_cropped, *choices = map(int, sums.tolist())
    seconds = time.monotonic() - started
    return _task_result(core, label, opened, choices, n_empty, n_cropped, seconds)


def _task_result(
    core: Core,
    label: str,
    opened: _Opened,
    choices: list[int],
    n_empty: int,
    n_cropped: int,
    seconds: float,
) -> TaskResult:
    """The result of a task from its choices, of which there are none if it has a problem."""
    task = core.tasks[label]
    examples = opened.found.examples
    correct = []
    accuracy = centered_accuracy = stderr = None
    if opened.problem is None:
        # the answer to language modelling is whether the continuation was predicted
        if task.kind == "language_modeling":
            golds = [1] * len(examples)
        else:
            golds = [example["gold"] for example in examples]
        correct = [int(choice == gold) for choice, gold in zip(choices, golds, strict=True)]
        accuracy = sum(correct) / len(examples)
        centered_accuracy = centered(accuracy, task.chance)
        stderr = standard_error(correct)
    return TaskResult(
        accuracy=accuracy,
        centered=centered_accuracy,
        stderr=stderr,
        n=len(examples),
        chance=task.chance,
        shots=min(task.shots, max(0, len(examples) - 1)),
        examples=opened.found.total,
        malformed=opened.found.malformed,
        empty_spans=n_empty,
        cropped=n_cropped,
        correct="".join(map(str, correct)),
        answers=choices,
        file=str(task.path.relative_to(core.folder)),
        fingerprint=opened.fingerprint,
        reason=opened.problem,
        seconds=seconds,
    )


# ---- for training ----


def open_for_training(
    *,
    every: int,
    max_per_task: int,
    bundle: str,
    tokenizer: Any,
    config: GPTConfig,
    flops_per_token: float,
    flops: float,
    threads: int,
) -> tuple[Core | None, str]:
    """The Core that training measures, or (None, why it cannot be measured). The same on all ranks.

    every: --core-metric-every; (None, "") if it is -1. max_per_task: --core-metric-max-per-task.
    bundle: --core-bundle. config: the model's. flops_per_token, flops: as in Core.describe().
    threads: for tokenizing. Prints what to expect.
    Raises UsageError for a --core-bundle that is not one; no other problem stops training."""
    if every == -1:
        return None, ""
    try:
        folder = from_rank0_or_raise(lambda: find_bundle(bundle, print0))
        core = open_core(
            folder, tokenizer, len_limit(config), max_per_task=max_per_task, threads=threads
        )
    except (UsageError, Unavailable) as error:
        # a bundle that was asked for by name must exist; the default one is optional
        if bundle:
            raise
        print0(f"CORE: cannot be measured, training continues without it: {error}")
        return None, str(error)
    print0("\n".join(core.describe(flops_per_token, flops)))
    return core, ""


def measure(
    core: Core | None,
    problem: str,
    model: torch.nn.Module,
    *,
    batch_tokens: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Progress = lambda share, label, seconds_left: None,
) -> CoreResult:
    """evaluate(), but a failure is a result without a metric, with the reason.

    core, problem: from open_for_training(). Raises Stopped as evaluate()."""
    try:
        if core is None:
            raise EvaluationFailed(problem)
        return evaluate(model, core, batch_tokens, device, interrupted, progress)
    except EvaluationFailed as error:
        return CoreResult(
            core_metric=None,
            low=None,
            high=None,
            n=0,
            reason=str(error),
            seconds=0.0,
            baselines="" if core is None else core.baselines,
            tasks={},
        )


def as_metrics(result: CoreResult) -> dict[str, Any]:
    """A result under the names that metrics.jsonl has."""
    metrics = {
        "core_metric": result.core_metric,
        "core_metric_low": result.low,
        "core_metric_high": result.high,
        "core_metric_n": result.n,
        "centered_results": {label: task.centered for label, task in result.tasks.items()},
    }
    metrics |= {f"core/{label}": task.accuracy for label, task in result.tasks.items()}
    if result.reason:
        metrics["reason"] = result.reason
    return metrics


def write_lines(record: Any, step: int, result: CoreResult) -> None:
    """Append a result to core.jsonl, a line for each task. record: a nanochat.run.log.Metrics."""
    for label, task in result.tasks.items():
        fields = dataclasses.asdict(task)
        # one number for each example; `correct` says as much in a character
        del fields["answers"]
        record.write(step=step, label=label, **fields, baselines=result.baselines)


def in_words(result: CoreResult) -> str:
    """A result in one line."""
    if result.core_metric is None:
        return f"no CORE metric: {result.reason}"
    return (
        f"CORE {result.core_metric:.4f} (95%: {result.low:.4f} to {result.high:.4f}; "
        f"n = {result.n:,}, {human_time(result.seconds)})"
    )
