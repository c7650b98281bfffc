"""The CORE metric of a model: the bundle's whereabouts, and answers to the prompts of tasks/core.py.

Shape legend: B prompts, R rows of all their choices, T tokens, C width, P scored positions, V vocabulary.

What costs time is computed once: what the choices of an example have in common runs through the model one time and its keys and
values serve them all, and the head is applied to the scored positions only. The prompts of a batch are of like length; those of
several ranks are dealt out in turn."""

import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch

from nanochat import hardware
from nanochat.common import Unavailable, UsageError, base_dir, human_time, in_a_line, new_folder
from nanochat.data import hub
from nanochat.eval.bpb import EvaluationFailed
from nanochat.eval.generation import Branches, KVCache
from nanochat.model.gpt import GPT, ROPE_REACH, for_inference
from nanochat.ranks import from_all, from_rank0_or_raise, print0, rank, sum_over_ranks, world_size
from tasks import core as tasks_of_core
from tasks.core import LABELS

CHUNK_LOGITS = 2**23  # fp32 logits that exist at once
LEFT_OUT = "left out by --tasks"
BATCH_TOKENS = {
    "cuda": 65536,
    "cpu": 8192,
    "mps": 8192,
}  # of one pass in a process of its own, padding included
CALL_TOKENS = (
    256  # what one more pass of the model costs, in tokens: padding up to this much is cheaper
)

# The published files at a fixed commit: git's name of each and its size (None: asked for).
EXAMPLES_URL = (
    "https://raw.githubusercontent.com/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d"
    "/scripts/eval/local_data/"
)
CHANCES_URL = "https://raw.githubusercontent.com/mlfoundations/dclm/361714bdd60bb9b7f4b2d8354cebbf0dec0c329e/eval/eval_meta_data_v1.csv"
CHANCES = ("faa195a36e398845f6afeca9d5a58eed86db8e89", 16_612)
EXAMPLES = {
    "commonsense_reasoning/commonsense_qa.jsonl": (
        "f1cc16a88b05ab0934aab2ec2d02a6869e6e5520",
        258_861,
    ),
    "commonsense_reasoning/copa.jsonl": ("b22f96e08ae9d0e97e1ae58f67b6425c77ef200a", 14_627),
    "commonsense_reasoning/openbook_qa.jsonl": ("a8aff255a64cbc72a85252acf00df25a315686c2", 88_043),
    "commonsense_reasoning/piqa.jsonl": ("a9992adfdefde366fe7ccff871f5aa62449a09cf", 533_992),
    "language_understanding/bigbench_language_identification.jsonl": (
        "1f132fbbb12a67ce267b7b92b458175632c265f3",
        3_940_808,
    ),
    "language_understanding/hellaswag.jsonl": ("448321079fdc140bd8566b16b24eda9ceacd3501", None),
    "language_understanding/lambada_openai.jsonl": (
        "4da02dd53b9e7385871d06ab855471d77b2f7dda",
        1_895_241,
    ),
    "language_understanding/winograd_wsc.jsonl": (
        "762fe030ac6938ecba438c47a04057247c6ab891",
        60_523,
    ),
    "language_understanding/winogrande.jsonl": (
        "316e87ae4659f0c402b0f00551fdec83ab0a0986",
        312_369,
    ),
    "reading_comprehension/boolq.jsonl": ("f42083a58713d00ef4600118cfdf79618c269190", 2_210_395),
    "reading_comprehension/coqa.jsonl": ("028bd4e51326cc43f8394987ae47fbb271aeba9d", 18_588_497),
    "reading_comprehension/squad.jsonl": ("dc733b8f58ec666c53fd946198c434b819a00680", 9_810_616),
    "symbolic_problem_solving/agi_eval_lsat_ar.jsonl": (
        "d663b427ba310d3f877f09a6830198ca7c856189",
        219_517,
    ),
    "symbolic_problem_solving/bigbench_cs_algorithms.jsonl": (
        "7ecee0f270f3de8b6558da14ae02181f3d950a40",
        235_435,
    ),
    "symbolic_problem_solving/bigbench_dyck_languages.jsonl": (
        "27a4ac2b3b18716add92f4ecd62475c4f8d77768",
        198_916,
    ),
    "symbolic_problem_solving/bigbench_operators.jsonl": (
        "a982dc4f962725c9dc4abb07d3cc333c99959290",
        35_375,
    ),
    "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl": (
        "86621f10e7124ed6f3a61fb91493c1256c008f60",
        7_158,
    ),
    "world_knowledge/arc_challenge.jsonl": ("ce66b8dcfb4bac892a404a0dda8b4e8ed0f84b89", 365_606),
    "world_knowledge/arc_easy.jsonl": ("b5fd1bf87a24246a6be67230b721541688f5c349", 636_665),
    "world_knowledge/bigbench_qa_wikidata.jsonl": (
        "5e1be72797ba082fd4f6efa42f7d759d2d23339a",
        1_639_702,
    ),
    "world_knowledge/jeopardy_all.jsonl": ("2f771918dbc8b68550df204171b14d2648b5d494", 364_582),
}


def find_bundle(given, report=print, download=True):
    """The folder of the bundle: the one given, else the cached one, else it is downloaded, checked and cached, whole or not at all.
    Without download: None where it is neither given nor cached.

    Raises UsageError for a given path that is no bundle, Unavailable where the download fails."""
    if given:
        folder = Path(given)
        if folder.is_file():
            raise UsageError(f"--core-bundle={given}: a file; unpack it, and give the folder")
        for place in (folder, folder / "eval_bundle"):
            if (place / "core.yaml").is_file():
                return place
        raise UsageError(
            f"--core-bundle={given}: no core.yaml is there; give the folder that holds core.yaml, eval_meta_data.csv "
            f"and eval_data/, or leave the flag out to have it downloaded"
        )
    folder = base_dir() / "core"
    if folder.is_dir() or not download:
        return folder if folder.is_dir() else None
    try:
        with open(folder.with_suffix(".lock"), "w") as lock:
            hub.wait_for(lock, "the CORE bundle", folder.parent, report)
            if not folder.is_dir():
                _download(folder, report)
    except OSError as error:
        raise Unavailable(
            f"{folder}: the CORE bundle cannot be kept there ({in_a_line(error)})"
        ) from None
    return folder


def _download(folder, report):
    """Make the bundle's folder from the published files. Raises Unavailable, and then there is none."""
    report("CORE: downloading its bundle of 22 tasks (about 50 MB), once")
    files = {"eval_meta_data.csv": hub.RemoteFile("", "", CHANCES_URL, CHANCES[1], "", CHANCES[0])}
    for uri, (blob, n_bytes) in EXAMPLES.items():
        n_bytes = n_bytes or hub.content_length(EXAMPLES_URL + uri, report)
        files[f"eval_data/{uri}"] = hub.RemoteFile("", "", EXAMPLES_URL + uri, n_bytes, "", blob)
    paths = {name: file.fetch(report) for name, file in files.items()}
    with new_folder(folder) as partial:
        for name, path in paths.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(path.read_bytes())
        (partial / "core.yaml").write_text(tasks_of_core.published_yaml(), encoding="utf-8")
    for path in paths.values():
        path.unlink()


class Core:
    """The tasks of a bundle and their prompts for one tokenizer, which are made when they are first wanted.

    tasks: {label: Task}; problems: {label: why it cannot be used}; remarks: sentences. max_per_task: examples of a task, -1: all.
    limit: tokens of a prompt. keep: hold prompts for the next evaluation of the same run, which needs memory for them all.
    labels: of the tasks wanted (a part gives no CORE). shares: the model can be given a cache, so that what rows have in common is
    read once. Raises UsageError for what is no bundle or no task; open_core() does so on every rank alike."""

    def __init__(
        self,
        folder,
        tokenizer,
        limit,
        max_per_task=-1,
        labels=LABELS,
        baselines="v1",
        threads=1,
        keep=True,
        shares=True,
    ):
        if problem := tasks_of_core.label_problem(labels):
            raise UsageError(problem)
        self.tasks, self.problems, self.remarks = tasks_of_core.read_bundle(folder, baselines)
        self.tasks = {label: task for label, task in self.tasks.items() if label in labels}
        self.problems = {
            label: self.problems.get(label, LEFT_OUT) for label in LABELS if label not in self.tasks
        }
        self.folder, self.tokenizer, self.limit, self.max_per_task = (
            Path(folder),
            tokenizer,
            limit,
            max_per_task,
        )
        self.baselines, self.threads, self.keep, self.shares = baselines, threads, keep, shares
        self.examples, self.prompts, self.tokens_of = {}, {}, {}

    def examples_of(self, label):
        """What tasks.core.read_examples() returns for a task; EvaluationFailed if there is no example."""
        if label not in self.examples:
            try:
                found = tasks_of_core.read_examples(self.tasks[label], self.max_per_task)
            except OSError as error:
                raise EvaluationFailed(
                    f"{self.tasks[label].path} cannot be read ({error.strerror})"
                ) from None
            if not found[0]:
                raise EvaluationFailed(
                    f"{self.tasks[label].path} holds no example of its kind ({found[2]} malformed lines)"
                )
            if not self.keep:
                return found
            self.examples[label] = found
        return self.examples[label]

    def prompts_of(self, label, examples):
        """This rank's share of the prompts of a task's examples. Raises EvaluationFailed if there is no way to write one in tokens."""
        if label in self.prompts:
            return self.prompts[label]
        prompts = self._prompts(label, examples, range(rank(), len(examples), world_size()))
        if self.keep:
            self.prompts[label] = prompts
        return prompts

    def _prompts(self, label, examples, indices):
        try:
            prompts = tasks_of_core.prompts_of(
                self.tasks[label], examples, self.tokenizer, self.limit, indices, self.threads
            )
        except UsageError as error:
            raise EvaluationFailed(f"its text cannot be tokenized: {in_a_line(error)}") from None
        return (
            prompts
            if self.shares
            else [dataclasses.replace(prompt, shared=0) for prompt in prompts]
        )

    def describe(self, flops_per_token, flops):
        """Look at a few examples of each task; what cannot be evaluated, on any rank, leaves the tasks and becomes a problem.

        flops_per_token: of training; flops: of all devices, a second, as they will be reached. Returns sentences for before an
        evaluation: what will be measured, how long it will take about, and what is in the way."""
        n_examples = 0
        for label in self.tasks:
            try:
                examples, _, _ = self.examples_of(label)
                some = self._prompts(
                    label, examples, range(0, len(examples), -(-len(examples) // 4))
                )
            except EvaluationFailed as error:
                self.problems[label] = str(error)
            else:
                self.tokens_of[label] = len(examples) * sum(map(tokens_of, some)) / len(some)
                n_examples += len(examples)
        for problems in from_all(self.problems):
            self.problems = {**problems, **self.problems}
        self.tasks = {
            label: task for label, task in self.tasks.items() if label not in self.problems
        }
        n_tokens = sum(self.tokens_of.values())
        lines = [
            f"CORE: {len(self.tasks)} of {len(LABELS)} tasks, {n_examples:,} examples"
            + (f" (at most {self.max_per_task} a task)" if self.max_per_task != -1 else "")
            + f", {n_tokens:,.0f} tokens: about "
            f"{human_time(n_tokens * flops_per_token / 3 / flops)} an evaluation"
        ]  # forward passes: a third of training's FLOPs
        lines += [
            f"CORE: {label} cannot be evaluated, so there will be no CORE metric: {why}"
            for label, why in self.problems.items()
            if why != LEFT_OUT
        ]
        return lines + [f"CORE: {remark}" for remark in self.remarks]


def open_core(*arguments, **options):
    """Core(), whose UsageError on any rank is raised on all: where nodes share no disk, one of them may lack the bundle."""
    core, problem = None, None
    try:
        core = Core(*arguments, **options)
    except UsageError as error:
        problem = str(error)
    if problem := next(filter(None, from_all(problem)), None):
        raise UsageError(problem)
    return core


def tokens_of(prompt):
    """Tokens of a prompt that run through the model."""
    return prompt.shared + sum(len(row) - prompt.shared for row in prompt.rows)


@torch.no_grad()
def evaluate(
    model,
    core,
    batch_tokens,
    device,
    interrupted=lambda: False,
    progress=lambda share, label, seconds_left: None,
):
    """Answer a Core's prompts. All ranks; the result is the same on each.

    model: a GPT, or a module with its hidden() and logits(), `config` and `compute_dtype`. batch_tokens: of a pass, padding included,
    at most (one prompt at least). interrupted: asked before each pass; true leaves early. progress(share done, label, seconds left):
    told after each pass; the core has been described before.
    Returns None if any rank was interrupted, else {"core_metric", "low", "high" (95% bootstrap), "n", "reason", "seconds",
    "baselines", "tasks"}: core_metric is None, with the reason, unless all 22 tasks were evaluated; tasks is {label: {"accuracy",
    "centered", "stderr", "n", "chance", "shots", "examples", "malformed", "empty_spans", "cropped", "seconds", "correct",
    "answers", "file", "fingerprint", "reason"}}, its numbers None with a reason for a task that failed.
    Raises EvaluationFailed on every rank if the model's numbers are not finite on any."""
    was_training, started = model.training, time.monotonic()
    results, problems, done, total = {}, dict(core.problems), 0.0, sum(core.tokens_of.values())
    try:
        try:
            answering = for_inference(model) if isinstance(model, GPT) else model.eval()
        except RuntimeError as error:
            if not hardware.is_out_of_memory(error):
                raise
            answering = model.eval()  # slower, with the same results
        for label in core.tasks:

            def told(share, label=label, before=done):
                if part := (before + share * core.tokens_of.get(label, 0.0)) / max(total, 1.0):
                    progress(part, label, (time.monotonic() - started) * (1 / part - 1))

            result = _evaluate_task(answering, core, label, batch_tokens, device, interrupted, told)
            done += core.tokens_of.get(label, 0.0)
            if result is None:
                return None
            if result["reason"]:
                problems[label] = result["reason"]
            results[label] = result
    finally:
        model.train(was_training)
    good = {label: result for label, result in results.items() if result["accuracy"] is not None}
    summary = {
        "core_metric": None,
        "low": None,
        "high": None,
        "n": sum(result["n"] for result in good.values()),
        "reason": None,
    }
    if len(good) == len(LABELS):
        summary["core_metric"] = tasks_of_core.metric(good.values())
        summary["low"], summary["high"] = tasks_of_core.interval(good)
    else:
        summary["reason"] = (
            f"{len(LABELS) - len(good)} of {len(LABELS)} tasks were not evaluated: "
            + "; ".join(
                [f"{label} ({why})" for label, why in problems.items() if why != LEFT_OUT]
                or [LEFT_OUT]
            )
        )
    return {
        **summary,
        "seconds": time.monotonic() - started,
        "baselines": core.baselines,
        "tasks": results,
    }


def _evaluate_task(model, core, label, batch_tokens, device, interrupted, told):
    """One task's entry of evaluate()'s result; None if a rank was interrupted."""
    started, task, problem, failure = time.monotonic(), core.tasks[label], None, None
    n = failed = interrupt = empty = cropped = total = malformed = answered = 0
    answers, fingerprint = [], ""
    try:
        examples, total, malformed = core.examples_of(label)
        n, fingerprint = len(examples), tasks_of_core.fingerprint_of(task, examples)
        answers = torch.zeros(n, dtype=torch.float64)
        prompts = core.prompts_of(label, examples)
    except Exception as error:  # told to the other ranks, for which the task is lost as well
        problem = (
            str(error)
            if isinstance(error, EvaluationFailed)
            else f"{type(error).__name__}: {in_a_line(error)}"
        )
    views = from_all((n, fingerprint, problem))
    problem = next((view[2] for view in views if view[2]), None) or (
        "the ranks read different examples" if len(set(views)) > 1 else None
    )
    try:
        for batch in batches([] if problem else prompts, batch_tokens):
            if interrupted():
                interrupt = 1
                break
            for prompt, (answer, n_empty) in zip(
                batch, answers_of(model, batch, task.kind, device), strict=True
            ):
                answers[prompt.index] = answer
                empty += n_empty
                cropped += prompt.cropped > 0
            answered += len(batch)
            told(answered / len(prompts))
    except (
        Exception
    ) as error:  # told to the other ranks, which would otherwise wait for this one's answers
        failure, failed = error, 1
    sums = torch.tensor([failed, interrupt, empty, cropped], dtype=torch.float64)
    answers = torch.zeros(0, dtype=torch.float64) if problem else answers
    exchanged = sum_over_ranks(
        torch.cat((sums, answers)).to(device if device.type == "cuda" else "cpu")
    ).tolist()
    failed, interrupt, empty, cropped, *answers = map(int, exchanged)
    if failed:
        raise EvaluationFailed(
            f"{label}: {type(failure).__name__}: {in_a_line(failure)}"
            if failure
            else f"{label}: another rank failed"
        ) from failure
    if interrupt:
        return None
    result = {
        "accuracy": None,
        "centered": None,
        "stderr": None,
        "n": n,
        "chance": task.chance,
        "shots": min(task.shots, max(0, n - 1)),
        "examples": total,
        "malformed": malformed,
        "empty_spans": empty,
        "cropped": cropped,
        "correct": "",
        "answers": answers,
        "file": str(task.path.relative_to(core.folder)),
        "fingerprint": fingerprint,
        "reason": problem,
    }
    if problem is None:
        golds = [1 if task.kind == "language_modeling" else example["gold"] for example in examples]
        correct = [int(answer == gold) for answer, gold in zip(answers, golds, strict=True)]
        result["accuracy"] = sum(correct) / n
        result["centered"] = tasks_of_core.centered(result["accuracy"], task.chance)
        result["stderr"] = tasks_of_core.standard_error(correct)
        result["correct"] = "".join(map(str, correct))
    result["seconds"] = time.monotonic() - started
    return result


def open_for_training(args, tokenizer, config, flops_per_token, flops, threads):
    """(the Core that --core-metric-every needs, "") or (None, why there can be none); prints what to expect. The same on every rank.

    Arguments as in Core.describe(). (None, "") where none is wanted. Raises UsageError for a --core-bundle that is none: everything
    else leaves training alone."""
    if args.core_metric_every == -1:
        return None, ""
    try:
        folder = from_rank0_or_raise(lambda: find_bundle(args.core_bundle, print0))
        core = open_core(
            folder, tokenizer, len_limit(config), args.core_metric_max_per_task, threads=threads
        )
    except (UsageError, Unavailable) as error:
        if args.core_bundle:
            raise
        print0(f"CORE: cannot be measured, training goes on without it: {error}")
        return None, str(error)
    print0("\n".join(core.describe(flops_per_token, flops)))
    return core, ""


def len_limit(config, crop=False):
    """Tokens of a prompt at most: as many positions as a model has, or with crop its context."""
    return config.max_seq_len if crop else ROPE_REACH * config.max_seq_len


def measure(core, problem, model, batch_tokens, device, interrupted, progress):
    """evaluate() for training, which outlives its failure: the result is then without a metric, with the reason.

    core, problem: of open_for_training()."""
    try:
        if core is None:
            raise EvaluationFailed(problem)
        return evaluate(model, core, batch_tokens, device, interrupted, progress)
    except EvaluationFailed as error:
        return {
            "core_metric": None,
            "low": None,
            "high": None,
            "n": 0,
            "reason": str(error),
            "seconds": 0.0,
            "tasks": {},
        }


def as_metrics(result):
    """A result of evaluate() under the names that metrics have."""
    return {
        "core_metric": result["core_metric"],
        "core_metric_low": result["low"],
        "core_metric_high": result["high"],
        "core_metric_n": result["n"],
        "centered_results": {label: task["centered"] for label, task in result["tasks"].items()},
        **{f"core/{label}": task["accuracy"] for label, task in result["tasks"].items()},
        **({"reason": result["reason"]} if result["reason"] else {}),
    }


def write_lines(record, step, result):
    """Append a result of evaluate() to core.jsonl (a runlog.Metrics), a line for each task."""
    for label, task in result["tasks"].items():
        record.write(
            step=step,
            label=label,
            **{name: value for name, value in task.items() if name != "answers"},
            baselines=result["baselines"],
        )


def in_words(result):
    """A result of evaluate() in one line."""
    if result["core_metric"] is None:
        return f"no CORE metric: {result['reason']}"
    return (
        f"CORE {result['core_metric']:.4f} (95%: {result['low']:.4f} to {result['high']:.4f}; n = {result['n']:,}, "
        f"{human_time(result['seconds'])})"
    )


def batches(prompts, batch_tokens):
    """Lists of prompts that run together: of like length, so that little is padded, and of at most batch_tokens tokens."""
    order = sorted(
        prompts, key=lambda prompt: (prompt.shared, max(map(len, prompt.rows))), reverse=True
    )
    batch, cost = [], 0
    for prompt in order:
        alone, together = _cost([prompt]), _cost([*batch, prompt])
        unlike = (
            batch and batch[0].shared and not prompt.shared
        )  # what has no beginning has no last token of it
        if batch and (unlike or together > batch_tokens or together > cost + alone + CALL_TOKENS):
            yield batch
            batch, together = [], alone
        batch.append(prompt)
        cost = together
    if batch:
        yield batch


def _cost(batch):
    """Tokens that run through the model for a batch, padding included."""
    tail = max(len(row) - prompt.shared for prompt in batch for row in prompt.rows)
    return len(batch) * (
        max(prompt.shared for prompt in batch) + max(len(prompt.rows) for prompt in batch) * tail
    )


def answers_of(model, batch, kind, device):
    """For each prompt of a batch (the choice with the smallest mean loss, or for language modelling 1 if every token of the
    continuation is the most likely one, else 0; number of choices whose span is empty, which are never chosen over another).

    A prompt with fewer rows than another of its batch is given empty ones."""
    cache, lengths, n_rows = (
        None,
        [prompt.shared for prompt in batch],
        max(len(prompt.rows) for prompt in batch),
    )
    if max(lengths):
        beginnings = padded([prompt.rows[0][: prompt.shared] for prompt in batch]).to(device)
        cache = KVCache(model.config, *beginnings.shape, device, model.compute_dtype, lengths)
        model.hidden(beginnings, cache, fill=True)
        last = torch.tensor([prompt.rows[0][prompt.shared - 1] for prompt in batch], device=device)
        cache = Branches(
            cache,
            n_rows,
            max(len(row) for prompt in batch for row in prompt.rows),
            model.embed(last),
        )
    rows = [
        (b * n_rows + i, row[prompt.shared :], start - prompt.shared)
        for b, prompt in enumerate(batch)
        for i, (row, start) in enumerate(zip(prompt.rows, prompt.starts, strict=True))
    ]
    tails = [np.zeros(0, dtype=np.int64)] * (len(batch) * n_rows)
    for r, tail, _ in rows:
        tails[r] = tail
    hidden_RxTxC = model.hidden(padded(tails).to(device), cache)
    row_P = torch.cat([torch.full((len(tail) - start,), r) for r, tail, start in rows])
    position_P = torch.cat([torch.arange(start - 1, len(tail) - 1) for _, tail, start in rows])
    targets_P = torch.cat([torch.from_numpy(tail[start:]).long() for _, tail, start in rows])
    nats, hits = _scores(
        model, hidden_RxTxC[row_P.to(device), position_P.to(device)], targets_P.to(device)
    )
    lengths = [len(tail) - start for _, tail, start in rows]
    nats, hits = iter(nats.split(lengths)), iter(hits.split(lengths))
    answers = []
    for prompt in batch:
        nats_of_rows, hits_of_rows = (
            [next(nats) for _ in prompt.rows],
            [next(hits) for _ in prompt.rows],
        )
        if kind == "language_modeling":
            answers.append(
                (
                    int(len(hits_of_rows[0]) > 0 and bool(hits_of_rows[0].all())),
                    int(len(hits_of_rows[0]) == 0),
                )
            )
            continue
        means = [float(of_row.mean()) if len(of_row) else math.inf for of_row in nats_of_rows]
        losses = [means[row] for row in prompt.row_of]
        answers.append((losses.index(min(losses)), sum(map(math.isinf, losses))))
    return answers


def padded(rows):
    """int64 (R, longest) of rows of ids, filled up with zeros, which nothing before them sees."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.from_numpy(row)
    return out


def _scores(model, hidden_PxC, targets_P):
    """(cross-entropy in nats (P,) fp64, whether the target is the most likely token (P,) bool), on the CPU, a few logits at a time.

    ValueError where a loss is no finite number."""
    nats, hits = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.bool)]
    rows = max(1, CHUNK_LOGITS // model.config.vocab_size)
    for hidden, targets in zip(hidden_PxC.split(rows), targets_P.split(rows), strict=True):
        logits = model.logits(hidden)
        nats.append(
            (logits.logsumexp(-1) - logits.gather(1, targets[:, None])[:, 0]).double().cpu()
        )
        hits.append((logits.argmax(-1) == targets).cpu())
    nats, hits = torch.cat(nats), torch.cat(hits)
    if not nats.isfinite().all():
        raise ValueError("the model's losses are not finite numbers; its weights are damaged")
    return nats, hits
