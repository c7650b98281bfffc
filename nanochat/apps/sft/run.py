"""From the flags of `nanochat sft` to a run that trains."""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat import hardware, ranks
from nanochat.apps.sft import flags
from nanochat.apps.sft.loop import Session, train
from nanochat.common import EXIT_COMPLETED, UsageError, stream_seed
from nanochat.data.conversations import Conversations, read_conversations
from nanochat.data.examples import sources_of
from nanochat.data.packing import NO_TARGET, PackedRows
from nanochat.data.prefetch import Prefetcher
from nanochat.machines import threads_of_rank
from nanochat.model.decoder import Decoder
from nanochat.optim.step import Batch, forward_backward, summed_loss
from nanochat.run import lifecycle, tuning, tuning_flags
from nanochat.run.control import Control
from nanochat.run.keeper import Keeper
from nanochat.run.plan_text import PlannedRun
from nanochat.run.tuning import TunedRun
from nanochat.signals import StopSignals
from tasks.exercises import TASKS, Exercise, held_out

# flags that train.py does not have
OWN = ("strict", "lr_frac", "exercises", "exercises_per_task")
# held-out questions whose answers are sampled
QUESTIONS = 4


@dataclass(frozen=True)
class Step:
    """The rows of a step that this rank takes. targets: of the whole step, on all ranks."""

    micro_batches: list[Batch]
    targets: int


@dataclass
class Prepared:
    """What is decided before the run folder changes."""

    tuned: TunedRun
    conversations: Conversations
    rows: PackedRows
    planned: PlannedRun
    base_pieces: list[np.ndarray]
    questions: list[list[int]]
    device: torch.device

    def facts(self) -> dict[str, Any]:
        """Entries of config.json that only fine-tuning has."""
        chats = {"fingerprint": self.conversations.fingerprint, **self.conversations.counts}
        return {"command": "sft", "tuning": {**self.tuned.facts(), "conversations": chats}}


def tune(args: Namespace, stop: StopSignals) -> int:
    """Fine-tune. stop: of this process. Returns the exit code. Raises UsageError, TrainingFailed,
    Stopped."""
    ranks.check_environment()
    problems = tuning_flags.problems_of(args, flags())
    names = args.exercises.split(",") if args.exercises else []
    if unknown := [name for name in names if name not in TASKS]:
        there_are = ", ".join(TASKS)
        problems.append(f"--exercises={','.join(unknown)}: no such task; there are {there_are}")
    if problems:
        raise UsageError("\n".join(problems))
    device_type = hardware.pick_device_type(args.device_type)
    hardware.prepare(device_type)
    device = ranks.setup(device_type)
    tuned = tuning.open_tuned(args, "sft", OWN)
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
            problems = prepared.conversations.problems
            tuning.write_problems(run.folder, problems, taken.log.message)
        build = functools.partial(build_session, prepared, taken, stop, control)
        code = lifecycle.train_to_its_end(taken, build, train, stop, control)
    ranks.close()
    return code


def prepare(tuned: TunedRun, device: torch.device, as_numbers: bool = False) -> Prepared:
    """Read the conversations, derive the plan or read it back, and print both; every rank. Nothing
    in the run folder changes. as_numbers: print the plan alone, as JSON."""
    run = tuned.run
    args = run.args
    say = (lambda text: None) if as_numbers else ranks.print0
    conversations = open_conversations(tuned, say)
    rows = PackedRows(conversations.train, args.max_seq_len, args.seed, tuned.tokenizer.bos)
    to_learn = tuning.RowsToLearn(args.max_seq_len, rows.rows_per_epoch)
    planned = tuning.plan_run(tuned, device, to_learn, say, as_numbers)
    base_pieces = []
    if args.eval_every != -1:
        base_pieces = tuning.base_pieces(tuned, say)
    questions = []
    if args.sample_every != -1:
        questions = first_questions(conversations)
    return Prepared(tuned, conversations, rows, planned, base_pieces, questions, device)


def open_conversations(tuned: TunedRun, say: Any) -> Conversations:
    """Read the conversations of the flags. UsageError for none, or for others than a run that is
    resumed was started with."""
    own, args = tuned.own, tuned.run.args
    found = read_conversations(
        sources_of(own["files"], "--data"),
        tuned.tokenizer,
        args.max_seq_len + 1,
        held_out=own["val_files"],
        strict=own["strict"],
        threads=threads_of_rank(),
        report=say,
    )
    if tuned.run.config:
        was = tuned.run.config["tuning"]["conversations"]["fingerprint"]
        if found.fingerprint != was:
            raise UsageError(
                f"--data: these conversations are not those that this run was started with "
                f"(fingerprint {found.fingerprint[:16]} instead of {was[:16]}); restore them, or "
                "start another run with --model-tag"
            )
    return found


def first_questions(conversations: Conversations) -> list[list[int]]:
    """The first held-out conversations up to where their first answers begin, each question
    once."""
    held_out = conversations.held_out
    found: dict[tuple[int, ...], None] = {}
    for i in range(len(held_out)):
        ids, mask = held_out[i]
        found[tuple(ids[: int(mask.argmax())].tolist())] = None
        if len(found) == QUESTIONS:
            break
    return [list(question) for question in found]


def exercises_of(tuned: TunedRun) -> dict[str, list[Exercise]]:
    """The exercises that are asked, by task."""
    names, n = tuned.own["exercises"], tuned.own["exercises_per_task"]
    return {name: held_out(name, n) for name in names.split(",") if name}


def build_session(
    prepared: Prepared,
    taken: lifecycle.Taken,
    stop: StopSignals,
    control: Control,
    workers: contextlib.ExitStack,
) -> Session:
    """Build model and optimizer, load what they begin with or resume from, compile, and start what
    works ahead. workers: gets what has to be closed at the end."""
    tuned, planned, device = prepared.tuned, prepared.planned, prepared.device
    run, log, clock = tuned.run, taken.log, taken.clock
    args, plan, state = run.args, planned.plan, log.state
    log.open_trackers(args.run, args.tensorboard)
    # Building and compiling take minutes and leave nothing to save: a signal ends them directly.
    stop.at_once = True
    stop.check()

    def load_source(model: Decoder) -> None:
        tuning.load_grown(model, args.init_from, run.source.step)

    model, optimizer, scaler = lifecycle.build_parts(run, planned, device, load_source)

    def trial(n: int) -> None:
        """A pass of n rows, which adds to the gradients."""
        inputs, targets = prepared.rows.step(0, n)
        seed = stream_seed(args.seed, "warm-up") if args.dropout else None
        batch = (inputs, targets)
        divisor = max(1, int((targets != NO_TARGET).sum()))
        forward_backward(model, scaler, batch, divisor, device, seed, summed_loss)

    device_batch = lifecycle.warm_up(args, planned, log, device, optimizer, trial)
    stop.at_once = False
    workers.callback(lifecycle.watch(clock, log).close)
    batches = Prefetcher(
        steps_of(prepared, state.step, device_batch),
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
        tokenizer=tuned.tokenizer,
        conversations=prepared.conversations,
        base_pieces=prepared.base_pieces,
        byte_counts=tuned.tokenizer.byte_counts(),
        questions=prepared.questions,
        exercises=exercises_of(tuned),
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


def steps_of(prepared: Prepared, step: int, device_batch: int) -> Iterator[Step]:
    """What this rank takes in each step, from `step` to the end of the run."""
    plan = prepared.planned.plan
    while not plan.is_last(step):
        inputs, targets = prepared.rows.step(step, plan.rows_per_step)
        # the rows of a rank in a pass are neighbours, as in pretraining
        stride = device_batch * ranks.world_size()
        first = device_batch * ranks.rank()
        micro_batches = [
            (inputs[begin : begin + device_batch], targets[begin : begin + device_batch])
            for begin in range(first, plan.rows_per_step, stride)
        ]
        yield Step(micro_batches, int((targets != NO_TARGET).sum()))
        step += 1
