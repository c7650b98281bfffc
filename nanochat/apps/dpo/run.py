"""From the flags of `nanochat dpo` to a run that trains."""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat import hardware, ranks
from nanochat.apps.dpo import flags
from nanochat.apps.dpo.loop import PairLoss, PreferenceFlags, Session, train
from nanochat.common import (
    EXIT_COMPLETED,
    Report,
    UsageError,
    own_cache,
    sha256_file,
    sha256_hex,
    stream_seed,
)
from nanochat.data.examples import sources_of
from nanochat.data.pair_rows import PairRows
from nanochat.data.preferences import Preferences, read_pairs
from nanochat.data.prefetch import Prefetcher
from nanochat.eval.preferences import (
    DRAWN_PAIRS,
    DRAWN_TOKENS,
    Pass,
    Tensors,
    as_pairs,
    draw_pairs,
    kept_or_computed,
    logprobs_of,
    token_logprobs_of,
)
from nanochat.machines import threads_of_rank
from nanochat.model.build import build
from nanochat.model.decoder import Decoder
from nanochat.optim.step import Batch, forward_backward
from nanochat.run import checkpoint, lifecycle, tuning, tuning_flags
from nanochat.run.control import Control
from nanochat.run.keeper import Keeper
from nanochat.run.plan_text import PlannedRun
from nanochat.run.tensor_files import files_of
from nanochat.run.tuning import TunedRun
from nanochat.signals import StopSignals

# flags that train.py does not have
OWN = ("strict", "beta", "loss", "label_smoothing", "lr_frac")
# held-out prompts whose answers are sampled
QUESTIONS = 4


@dataclass
class Prepared:
    """What is decided before the run folder changes. reference: the name under which its
    log-probabilities are kept."""

    tuned: TunedRun
    reference: str
    preferences: Preferences
    rows: PairRows
    planned: PlannedRun
    base_pieces: list[np.ndarray]
    questions: list[list[int]]
    device: torch.device

    @property
    def loss_flags(self) -> PreferenceFlags:
        """The flags of the loss."""
        own = self.tuned.own
        return PreferenceFlags(own["beta"], own["loss"], own["label_smoothing"])

    def facts(self) -> dict[str, Any]:
        """Entries of config.json that only fine-tuning has."""
        pairs = {"fingerprint": self.preferences.fingerprint, **self.preferences.counts}
        facts = {**self.tuned.facts(), "pairs": pairs, "reference": self.reference}
        return {"command": "dpo", "tuning": facts}


def tune(args: Namespace, stop: StopSignals) -> int:
    """Fine-tune. stop: of this process. Returns the exit code. Raises UsageError, TrainingFailed,
    Stopped."""
    ranks.check_environment()
    problems = tuning_flags.problems_of(args, flags())
    if args.loss == "ipo" and args.label_smoothing:
        problems.append(
            f"--label-smoothing={args.label_smoothing}: --loss=ipo has none; leave it out"
        )
    if problems:
        raise UsageError("\n".join(problems))
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    tuned = tuning.open_tuned(args, "dpo", OWN)
    run = tuned.run
    if run.over:
        ranks.print0(run.over)
        ranks.close()
        return EXIT_COMPLETED
    if args.dry_run:
        prepare(tuned, device, args.json)
        return EXIT_COMPLETED
    with contextlib.closing(lifecycle.open_control(run, stop)) as control:
        prepared = prepare(tuned, device)
        # from here on the disk changes: a signal waits until that is done
        stop.at_once = False
        taken = lifecycle.Taken(
            run,
            prepared.planned,
            device,
            data=tuned.base,
            tokenizer=tuned.tokenizer,
            tokens_per_epoch=prepared.planned.tokens_per_epoch,
            prompts=[],
            facts=prepared.facts(),
        )
        if taken.log.writes:
            problems = prepared.preferences.problems
            tuning.write_problems(run.folder, problems, taken.log.message)
        session = functools.partial(build_session, prepared, taken, stop, control)
        code = lifecycle.train_to_its_end(taken, session, train, stop, control)
    ranks.close()
    return code


def prepare(tuned: TunedRun, device: torch.device, as_numbers: bool = False) -> Prepared:
    """Read the pairs, derive the plan or read it back, and print both; every rank. Nothing in the
    run folder changes. as_numbers: print the plan alone, as JSON."""
    args = tuned.run.args
    say = (lambda text: None) if as_numbers else ranks.print0
    preferences = open_pairs(tuned, say)
    rows = PairRows(preferences.train, args.max_seq_len, args.seed, tuned.tokenizer.bos)
    to_learn = tuning.RowsToLearn(rows.T, 2 * rows.pairs_per_epoch, at_once=2)
    planned = tuning.plan_run(tuned, device, to_learn, say, as_numbers)
    base_pieces = []
    if args.eval_every != -1:
        base_pieces = tuning.base_pieces(tuned, say)
    questions = []
    if args.sample_every != -1:
        held_out = preferences.held_out
        questions = [held_out[i].prompt.tolist() for i in range(min(QUESTIONS, len(held_out)))]
    reference = ranks.from_rank0_or_raise(
        lambda: name_of_reference(tuned, preferences, rows, planned)
    )
    return Prepared(tuned, reference, preferences, rows, planned, base_pieces, questions, device)


def open_pairs(tuned: TunedRun, say: Report) -> Preferences:
    """Read the pairs of the flags. UsageError for none, or for others than a run that is resumed
    was started with."""
    own, args = tuned.own, tuned.run.args
    found = read_pairs(
        sources_of(own["files"], "--data"),
        tuned.tokenizer,
        args.max_seq_len + 1,
        held_out=own["val_files"],
        strict=own["strict"],
        threads=threads_of_rank(),
        report=say,
    )
    if tuned.run.config:
        was = tuned.run.config["tuning"]["pairs"]["fingerprint"]
        if found.fingerprint != was:
            raise UsageError(
                f"--data: these pairs are not those that this run was started with (fingerprint "
                f"{found.fingerprint[:16]} instead of {was[:16]}); restore them, or start another "
                "run with --model-tag"
            )
    return found


def name_of_reference(
    tuned: TunedRun, preferences: Preferences, rows: PairRows, planned: PlannedRun
) -> str:
    """What tells the log-probabilities of a reference from all others: its weights, the pairs, and
    how they are computed."""
    run = tuned.run
    # the folder of the weights may be gone by now
    if run.config:
        return run.config["tuning"]["reference"]
    folder = checkpoint.folder_of(run.args.init_from, run.source.step)
    parts = [
        *(sha256_file(path) for path in files_of(folder, "model")),
        preferences.fingerprint,
        tuned.tokenizer.fingerprint,
        planned.runtime.dtype_name,
        rows.T,
        (DRAWN_PAIRS, DRAWN_TOKENS),
    ]
    return sha256_hex(str(parts))


def reference_of(prepared: Prepared, taken: lifecycle.Taken, stop: StopSignals) -> Tensors:
    """What is needed of RUN's own model: log-probabilities of all answers, (pairs, 2) of `train`
    and `held_out`; `drawn` answers of its own, and `drawn_logprobs` of their tokens. Kept on
    disk, so that a resumed run, or another with the same pairs, does not need the model again."""
    tuned, planned, device = prepared.tuned, prepared.planned, prepared.device
    source = tuned.run.args.init_from
    origin = taken.log.config.get("init_from") or {}
    step = ranks.from_rank0(origin.get("step"))

    def compute() -> Tensors:
        taken.log.message("computing the log-probabilities of the reference and drawing answers")
        # a second model only until they are known
        model = build(planned.config, device, planned.runtime.dtype, planned.runtime.attention)
        tuning.load_grown(model, source, step)
        how = Pass(
            T=prepared.rows.T,
            padding=tuned.tokenizer.bos,
            device_rows=max(2, planned.device_batch),
            device=device,
            interrupted=lambda: stop.requested,
        )
        held_out = prepared.preferences.held_out
        drawn = draw_pairs(model, tuned.tokenizer, held_out, how)
        return {
            "train": logprobs_of(model, prepared.preferences.train, how),
            "held_out": logprobs_of(model, held_out, how),
            "drawn": drawn,
            "drawn_logprobs": token_logprobs_of(model, as_pairs(drawn, held_out), how),
        }

    folder = ranks.from_rank0_or_raise(lambda: str(own_cache("references")))
    return kept_or_computed(Path(folder) / prepared.reference, compute)


def build_session(
    prepared: Prepared,
    taken: lifecycle.Taken,
    stop: StopSignals,
    control: Control,
    workers: contextlib.ExitStack,
) -> Session:
    """Compute the reference, build model and optimizer, load what they begin with or resume from,
    compile, and start what works ahead. workers: gets what has to be closed at the end."""
    tuned, planned, device = prepared.tuned, prepared.planned, prepared.device
    run, log, clock = tuned.run, taken.log, taken.clock
    args, plan, state = run.args, planned.plan, log.state
    log.open_trackers(args.run, args.tensorboard)
    # Building and compiling take minutes and leave nothing to save: a signal ends them directly.
    stop.at_once = True
    stop.check()
    reference = reference_of(prepared, taken, stop)

    def load_source(model: Decoder) -> None:
        tuning.load_grown(model, args.init_from, run.source.step)

    model, optimizer, scaler = lifecycle.build_parts(run, planned, device, load_source)

    def trial(n: int) -> None:
        """A pass of n rows, which adds to the gradients."""
        numbers = prepared.rows.step(0, max(1, n // 2))
        seed = stream_seed(args.seed, "warm-up") if args.dropout else None
        batch = batch_of(prepared, reference["train"], numbers)
        loss_of = PairLoss(prepared.loss_flags, device)
        forward_backward(model, scaler, batch, len(numbers), device, seed, loss_of)

    device_batch = lifecycle.warm_up(args, planned, log, device, optimizer, trial)
    stop.at_once = False
    workers.callback(lifecycle.watch(clock, log).close)
    batches = Prefetcher(
        steps_of(prepared, reference["train"], state.step, device_batch),
        interrupted=lambda: stop.requested or control.pending,
    )
    workers.callback(batches.close)
    keeper = Keeper(
        taken.saver,
        model=model,
        optimizer=optimizer,
        shard_tokens={},
        clock=clock,
        first_step=state.step,
        enabled=not args.no_save,
    )
    return Session(
        run=run,
        plan=plan,
        device=device,
        device_batch=device_batch,
        T=prepared.rows.T,
        tokenizer=tuned.tokenizer,
        preferences=prepared.preferences,
        reference=reference["held_out"],
        drawn=as_pairs(reference["drawn"], prepared.preferences.held_out),
        drawn_reference=reference["drawn_logprobs"],
        flags=prepared.loss_flags,
        base_pieces=prepared.base_pieces,
        byte_counts=tuned.tokenizer.byte_counts(),
        questions=prepared.questions,
        prompts=[tuned.tokenizer.decode(ids[1:]) for ids in prepared.questions],
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        state=state,
        clock=clock,
        log=log,
        keeper=keeper,
        batches=batches,
        stop=stop,
        control=control,
    )


def batch_of(prepared: Prepared, reference_Nx2: torch.Tensor, numbers: list[int]) -> Batch:
    """(inputs, targets, log-probabilities of the reference) of some pairs, rows in pairs."""
    inputs, targets = prepared.rows.rows(numbers)
    return inputs, targets, reference_Nx2[numbers].flatten()


def steps_of(
    prepared: Prepared, reference_Nx2: torch.Tensor, step: int, device_batch: int
) -> Iterator[list[Batch]]:
    """What this rank takes in each step, from `step` to the end of the run."""
    plan = prepared.planned.plan
    pairs_per_step = plan.rows_per_step // 2
    at_once = max(1, device_batch // 2)
    while not plan.is_last(step):
        numbers = prepared.rows.step(step, pairs_per_step)
        # the pairs of a rank in a pass are neighbours, as rows in pretraining
        stride = at_once * ranks.world_size()
        first = at_once * ranks.rank()
        yield [
            batch_of(prepared, reference_Nx2, numbers[begin : begin + at_once])
            for begin in range(first, pairs_per_step, stride)
        ]
        step += 1
