"""The measurements of `nanochat evaluate`: bits per byte, CORE, samples. All ranks call them."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import hardware, ranks
from nanochat.apps.evaluate.report import BpbReport, CoreReport, Sample
from nanochat.apps.evaluate.subject import Subject, default_batch_tokens
from nanochat.common import UsageError, human_time
from nanochat.data.files import named_files
from nanochat.data.rows import held_out_pieces
from nanochat.data.sources import file_shard, hash_files, is_remote, open_corpus
from nanochat.data.text import split_column
from nanochat.data.token_cache import TokenCache
from nanochat.eval.bpb import bits_per_byte
from nanochat.eval.core import Progress, len_limit, measure, open_core
from nanochat.eval.generation import NotNumbers, generate_text
from nanochat.eval.unison import EvaluationFailed
from nanochat.limits import available_cpus
from nanochat.machines import on_each_machine, threads_of_rank
from nanochat.run.plan import assumed_mfu
from nanochat.run.training_text import held_out_shards
from tasks.core import CHOICE_LABELS, LABELS

# of a loss in nats: e^709 is the largest power that fp64 holds
MAX_EXPONENT = 700
# how prompts that are too long for a model are cut: of ours, and of those with a fixed context
OWN_CROP = "a longer one loses what follows its BOS"
PUBLISHED_CROP = "of a longer one each choice keeps its last tokens, as published for GPT-2"


@dataclass(frozen=True)
class Machine:
    """Where and how to compute."""

    device: torch.device
    # --batch-tokens
    batch_tokens: int
    # prints a line, on rank 0
    say: Callable[[str], None]
    # on a terminal, by a bar
    show_progress: bool

    def batch_tokens_for(self, subject: Subject) -> int:
        """Tokens of one pass of the model."""
        if self.batch_tokens != -1:
            return self.batch_tokens
        return default_batch_tokens(
            subject.foreign, subject.model.config.max_seq_len, self.device.type
        )


# ---- bits per byte ----


def measure_bpb(subject: Subject, machine: Machine, *, data: str, eval_tokens: int) -> BpbReport:
    """Bits per byte over text. data, eval_tokens: as the flags.

    An evaluation that fails is a report without numbers. Raises UsageError for text that is
    missing, empty, or not what the run was validated on."""
    started = time.monotonic()
    if data:
        shards = _named_shards(data, machine.say)
        name = data
    else:
        shards = _shards_of_run(subject, machine.say)
        # that of --data alone would be taken for the text that it was trained on
        name = subject.config["args"].get("val_data") or (
            f"the held-out text of {subject.config['data']['name']}"
        )
    row_tokens = subject.model.config.max_seq_len
    limit = sys.maxsize if eval_tokens == -1 else eval_tokens
    # token files are cached by the fingerprint of one of our tokenizers
    if subject.foreign:
        pieces = _foreign_pieces(shards, subject.tokenizer, row_tokens, limit)
    else:
        cache = TokenCache(subject.tokenizer, available_cpus(), report=machine.say)
        on_each_machine(lambda: cache.prepare(shards, lambda shards: shards))
        pieces = held_out_pieces(shards, cache, row_tokens, limit)
    if not pieces:
        raise UsageError(f"--data={name}: holds no text")
    try:
        found = bits_per_byte(
            subject.model,
            pieces,
            subject.tokenizer.byte_counts(),
            machine.batch_tokens_for(subject),
            machine.device,
        )
    except EvaluationFailed as error:
        return BpbReport(
            reason=str(error),
            bpb=None,
            loss=None,
            tokens=0,
            bytes=0,
            perplexity=None,
            data=str(name),
            seconds=time.monotonic() - started,
        )
    return BpbReport(
        reason=None,
        bpb=found.bpb,
        loss=found.loss,
        tokens=found.tokens,
        bytes=found.bytes,
        perplexity=math.exp(min(found.loss, MAX_EXPONENT)),
        data=str(name),
        seconds=time.monotonic() - started,
    )


def _named_shards(data: str, say: Callable[[str], None]) -> list:
    """The shards of --data: the held-out ones of a dataset, or all of a path, folder or glob."""
    if data == "python" or is_remote(data):
        return ranks.from_rank0_or_raise(lambda: open_corpus(data, report=say).val)

    def whole() -> list:
        path, column = split_column(data)
        named = named_files(path)
        for remark in named.remarks:
            say(remark)
        return [file_shard(named.files, hashes=hash_files(named.files), column=column)]

    return ranks.from_rank0_or_raise(whole)


def _shards_of_run(subject: Subject, say: Callable[[str], None]) -> list:
    """The held-out shards that a run was validated on."""
    shards = ranks.from_rank0_or_raise(lambda: held_out_shards(subject.config, say))
    if shards is None:
        raise UsageError(
            f"--bpb: the text of {subject.folder} ({subject.config['data']['name']}) has changed "
            f"since the run was started; name another with --data"
        )
    return shards


def _foreign_pieces(shards: list, tokenizer: Any, row_tokens: int, max_tokens: int) -> list:
    """As held_out_pieces(), for a tokenizer that is not ours, without a cache.

    Raises UsageError if it loses or adds bytes, which bits per byte cannot account for."""
    pieces = []
    left = max_tokens
    byte_counts = tokenizer.byte_counts()
    for shard in shards:
        for document in shard.documents():
            ids = tokenizer.encode_batch([document])[0]
            n_bytes = len(document.encode("utf-8"))
            found = byte_counts[ids].sum()
            if found != n_bytes:
                raise UsageError(
                    f"--bpb: the tokenizer of {tokenizer.folder} encodes {found:,} of a document's "
                    f"{n_bytes:,} bytes; bits per byte need a tokenizer that keeps text as it is"
                )
            # the last document is cut where the tokens end
            ids = ids[:left].astype(np.int64)
            pieces += [
                np.concatenate(([tokenizer.bos], ids[start : start + row_tokens]))
                for start in range(0, len(ids), row_tokens)
            ]
            left -= len(ids)
            if left == 0:
                return pieces
    return pieces


# ---- CORE ----


def measure_core(
    subject: Subject,
    machine: Machine,
    *,
    bundle: Path,
    labels: tuple[str, ...],
    max_per_task: int,
    baselines: str,
    crop: bool,
    chat: bool,
) -> CoreReport:
    """CORE, or some of its tasks. labels: of --tasks, empty: all, with chat those of multiple
    choice. The others are as the flags.

    An evaluation that fails is a report without the metric. Raises UsageError as open_core()."""
    labels = labels or (CHOICE_LABELS if chat else LABELS)
    config = subject.model.config
    # a Hugging Face model has positions for its context only
    limit = config.max_seq_len if subject.foreign else len_limit(config, crop)
    # at the context, as others do it, so that results can be compared
    published_crop = (subject.foreign or crop) and not chat
    core = open_core(
        bundle,
        subject.tokenizer,
        limit,
        max_per_task=max_per_task,
        labels=labels,
        baselines=baselines,
        threads=threads_of_rank(),
        # one evaluation: no reason to hold prompts
        keep=False,
        shares=not subject.foreign,
        chat=chat,
        published_crop=published_crop,
    )
    # rank 0 may have to measure it, and the estimate is printed once
    peak, _ = ranks.from_rank0_or_raise(lambda: hardware.peak_flops(machine.device))
    flops = assumed_mfu(machine.device.type) * peak * ranks.world_size()
    for line in core.describe(subject.model.flops_per_token(), flops):
        machine.say(line)
    with _progress_bar(machine.show_progress) as progress:
        result = measure(
            core,
            "",
            subject.model,
            batch_tokens=machine.batch_tokens_for(subject),
            device=machine.device,
            progress=progress,
        )
    measured = {label for label, task in result.tasks.items() if task.accuracy is not None}
    return CoreReport(
        result=result,
        limit=limit,
        crop_rule=PUBLISHED_CROP if published_crop else OWN_CROP,
        baselines=baselines,
        max_per_task=max_per_task,
        chat=chat,
        failed=not measured.issuperset(labels),
    )


@contextlib.contextmanager
def _progress_bar(wanted: bool) -> Iterator[Progress]:
    """The progress() of an evaluation: a bar with the time left, on a terminal, on rank 0."""
    if not wanted or ranks.rank() or not sys.stderr.isatty():
        yield lambda share, label, seconds_left: None
        return
    from tqdm import tqdm

    bar_format = "CORE {percentage:3.0f}%|{bar:20}| {desc}"
    with tqdm(total=100, bar_format=bar_format, leave=False) as bar:

        def show(share: float, label: str, seconds_left: float) -> None:
            bar.n = 100 * share
            bar.set_description_str(f"{label} | eta {human_time(seconds_left)}")

        yield show


# ---- samples ----


def draw(subject: Subject, prompts: list[str], *, max_tokens: int, seed: int) -> list[Sample]:
    """A sample for each prompt. Raises UsageError if the model's weights are damaged."""
    try:
        return [
            Sample(
                prompt,
                "".join(
                    generate_text(
                        subject.model,
                        subject.tokenizer,
                        prompt,
                        max_tokens,
                        seed=seed,
                        temperature=0.8,
                        top_k=50,
                    )
                ),
            )
            for prompt in prompts
        ]
    except NotNumbers as error:
        raise UsageError(f"{subject.title}: {error}") from None
