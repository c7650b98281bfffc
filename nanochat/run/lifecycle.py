"""From a plan to a run folder with everything in it, whatever ends the run: what all training loops
share. Every rank calls these functions alike."""

import contextlib
import functools
import gc
import sys
import time
import uuid
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from nanochat import hardware, machines, ranks
from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_STOPPED,
    human_time,
    stream_seed,
)
from nanochat.data.token_cache import DataFailed
from nanochat.data.tokenizer import Tokenizer
from nanochat.model import fp8
from nanochat.model.build import build
from nanochat.model.decoder import Decoder
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.sharding import build_sharded
from nanochat.run import checkpoint, faults, memory
from nanochat.run.clock import Clock
from nanochat.run.control import Control
from nanochat.run.log import RunLog
from nanochat.run.orders import Session
from nanochat.run.plan_text import PlannedRun
from nanochat.run.registry import Process
from nanochat.run.resume import (
    OpenedRun,
    prepare_folder,
    saved_scores,
    saved_train_state,
    take_folder,
)
from nanochat.run.saver import Saver
from nanochat.run.shares import Shares, check_shared_disk
from nanochat.signals import Stopped, StopSignals

EXIT_CODES = {"completed": EXIT_COMPLETED, "stopped": EXIT_STOPPED, "failed": EXIT_FAILED}


def open_control(run: OpenedRun, stop: StopSignals) -> Control:
    """Let `nanochat jobs` reach the run, from here on, and notice machines that are lost."""
    machines.notice_lost_machines()
    control = Control(run.folder.path, ranks.rank(), stop, ranks.print0)
    processes = ranks.from_all(Process.own(ranks.rank()))
    if ranks.rank() == 0:
        control.listen(processes)
    control.doing = "reading the data"
    return control


def resumed_in_words(run: OpenedRun) -> str:
    """The line on where a run resumes, and on what is different now."""
    where = f"from step {run.step}" if run.step else "from the start (it has no checkpoint yet)"
    changed = f"; changed: {', '.join(run.changed)}" if run.changed else ""
    return f"resuming {run.folder.path} {where}{changed}"


# ----- the run folder


class Taken:
    """A run whose folder is taken: what is written into it, and how long things take. saver: None
    on ranks that save nothing."""

    def __init__(
        self,
        run: OpenedRun,
        planned: PlannedRun,
        device: torch.device,
        *,
        data: dict[str, Any],
        tokenizer: Tokenizer,
        tokens_per_epoch: float,
        prompts: list[str],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Claim the run folder, write its config.json, and open what is written into it.

        data: facts on the text. tokens_per_epoch: of training. prompts: of the samples. facts:
        further entries of config.json."""
        args, runtime = run.args, planned.runtime
        # Nothing was refused so far, so from here the run exists.
        ranks.from_rank0_or_raise(lambda: take_folder(run.folder, run.step))
        self.planned = planned
        self.no_save = args.no_save
        self.clock = Clock(
            save_minutes=args.save_every_minutes,
            synchronize=lambda: hardware.synchronize(device.type),
        )
        self.log = RunLog(
            run.folder,
            writes=ranks.rank() == 0,
            plan=planned.plan,
            machine=planned.machine,
            device=device,
            state=saved_train_state(run, tokenizer),
            scores=ranks.from_rank0(saved_scores(run) if ranks.rank() == 0 else None),
            tokens_per_epoch=tokens_per_epoch,
            untrained_vocabulary=None if run.source else tokenizer.vocab_size,
            notify=args.notify,
        )
        self.saver: Saver | None = None
        shares = None
        if splits_model(args):
            shares = Shares(ranks.from_rank0(uuid.uuid4().hex))
        if shares:
            check_shared_disk(run.folder.path)
        if not self.log.writes:
            # rank 0 speaks of what becomes of all parts
            if shares:
                self.saver = Saver(run.folder.path, -1, lambda text: None, [], shares=shares)
            return

        def machine_facts() -> dict[str, Any]:
            return {
                "hardware": hardware.describe(device),
                "runtime": {
                    **runtime.facts(),
                    "world_size": planned.machine.devices,
                    "device_batch_size": planned.device_batch,
                    "peak_flops": planned.machine.peak_flops,
                    "peak": planned.machine.peak,
                },
                **(facts or {}),
            }

        log = self.log
        best_bpb = prepare_folder(
            run,
            plan=planned.plan,
            model_config=planned.config,
            data=data,
            tokenizer=tokenizer,
            machine=machine_facts,
            prompts=prompts,
            records=log.records,
        )
        log.config = run.config
        log.summarize("running")
        self.saver = Saver(
            run.folder.path, args.keep_last, log.progress.message, log.records, best_bpb, shares
        )


# ----- the parts


def splits_model(args: Namespace) -> bool:
    """Whether the model of a run is split over the ranks: one rank has all of it, with --shard
    too."""
    return args.shard and ranks.world_size() > 1


def build_parts(
    run: OpenedRun,
    planned: PlannedRun,
    device: torch.device,
    load_source: Callable[[Decoder], None],
) -> tuple[Decoder, Optimizer, LossScaler]:
    """Model, optimizer and loss scaler of a run, in the state that it starts or resumes from.

    load_source(model): sets the weights of a run that begins with another one's."""
    args, runtime = run.args, planned.runtime
    seed = stream_seed(args.seed, "model")
    if planned.tight:
        hardware.set_up_heap(keeps_freed=False)
        ranks.print0("memory is tight: what is freed goes back to the system, which takes time")
    maker = build_sharded if splits_model(args) else build
    model = maker(planned.config, device, runtime.dtype, runtime.attention, seed=seed)
    model.checkpointing = args.activation_checkpointing
    scaler = LossScaler(runtime.dtype == torch.float16, run.saved_state.get("loss_scaler"))
    # orthogonalisation would overflow in fp16
    products = torch.float32 if scaler.enabled else runtime.dtype
    cpp = not runtime.plain_updates
    optimizer = Optimizer(model.parameter_groups(), planned.plan.groups, products, cpp)
    if run.step:
        checkpoint.load_model(run.folder.path, run.step, model)
        parameters = dict(model.named_parameters())
        optimizer.load(checkpoint.load_optimizer(run.folder.path, run.step, parameters))
    elif run.source:
        load_source(model)
    # Only training mode uses fp8 and compiled blocks.
    model.train()
    if runtime.fp8_recipe:
        fp8.convert(model, runtime.fp8_recipe)
    if runtime.compiled:
        model.compile_parts()
    return model, optimizer, scaler


def warm_up(
    args: Namespace,
    planned: PlannedRun,
    log: RunLog,
    device: torch.device,
    optimizer: Optimizer,
    trial: Callable[[int], None],
) -> int:
    """One pass that changes nothing: it compiles what training runs, so that step 0 starts on a
    warm machine, and finds the rows that a device takes per pass, which are returned.

    trial(n): a pass of n rows, which adds to the gradients."""
    plan = planned.plan
    started = time.monotonic()
    # Whatever changes the memory of a row is part of the key.
    facts = hardware.describe(device)
    key = [vars(planned.config), *map(str, planned.runtime), args.activation_checkpointing, facts]
    # FSDP2 is left in disorder by a pass that fails for lack of memory, so none is tried.
    is_fixed = args.device_batch_size != -1 or splits_model(args)
    device_batch = memory.settle(
        trial, planned.device_batch, is_fixed, plan, key, device, log.message
    )
    optimizer.zero_grad()
    if log.writes:
        # a resumed run takes as many rows per pass, to the same last bit
        log.config["runtime"] |= {
            "device_batch_size": device_batch,
            "world_size": ranks.world_size(),
        }
        log.summarize("running")
    hardware.synchronize(device.type)
    # The compiler leaves millions of objects that live as long as the process: the collector would
    # look through them again and again, in the middle of steps.
    gc.collect()
    gc.freeze()
    done = "compiled" if planned.runtime.compiled else "warmed up"
    log.message(f"{done} in {human_time(time.monotonic() - started)}")
    return device_batch


def watch(clock: Clock, log: RunLog) -> faults.Watchdog:
    """Start to report stalls of the loop."""
    sender = f"rank {ranks.rank()}: " if ranks.world_size() > 1 else ""

    def report(text: str) -> None:
        print(f"{sender}{text}", file=sys.stderr, flush=True)
        log.notify("stalled", text.splitlines()[0].removeprefix("warning: "))

    return faults.Watchdog(report, clock)


# ----- the end


def train_to_its_end(
    taken: Taken,
    build_session: Callable[[contextlib.ExitStack], Session],
    train: Callable[[Any], str],
    stop: StopSignals,
    control: Control,
) -> int:
    """Build the parts, train, and save whatever ends it. Returns the exit code; raises what cannot
    be saved or continued from.

    build_session(workers): the session; workers gets what has to be closed at the end. train(): the
    loop, which returns why it ended early, or ""."""
    log, saver, clock = taken.log, taken.saver, taken.clock
    control.announce_in_folder()
    control.doing = "building the model and compiling"
    with contextlib.ExitStack() as workers:
        workers.callback(gc.unfreeze)
        # closed in the opposite order: the folder is released last
        workers.callback(log.folder.release)
        workers.callback(log.close)
        if saver:
            workers.callback(saver.close)
        try:
            session = build_session(workers)
            # building it may have made further connections
            machines.notice_lost_machines()
            control.begin(functools.partial(log.facts, clock))
            status, reason = train_and_save(session, train)
            code = EXIT_CODES[status]
            log.end(status, reason, code)
        except BaseException as error:
            raise unsaved_end(error, taken, stop) from None
    completed = status == "completed"
    saved = checkpoint.newest_in_words(log.folder.path)
    failure = reason if status == "failed" else ""
    ranks.print0(
        log.last_words(completed=completed, failure=failure, saved=saved, no_save=taken.no_save)
    )
    return code


def train_and_save(session: Session, train: Callable[[Any], str]) -> tuple[str, str]:
    """train(), and the save on the way out. Returns (status, reason) of the summary; every way to
    leave whose state is saved ends here."""
    # Every way to leave with a state that can be saved; others raise past this.
    status, reason = "completed", ""
    try:
        reason = train(session)
    except Stopped:
        status, reason = "stopped", session.stop.reason
    except DataFailed as error:
        status, reason = "failed", str(error)
    session.control.end()
    if status != "completed":
        session.keeper.save("rolling", session.state)
    if failure := session.keeper.finish():
        reason = f"{reason}; {failure}" if status == "failed" else failure
        status = "failed"
    return status, reason


def unsaved_end(error: BaseException, taken: Taken, stop: StopSignals) -> BaseException:
    """Write down that an exception ends the run; returns the exception to raise."""
    log, saver, clock = taken.log, taken.saver, taken.clock
    error = faults.cause(error, taken.planned.device_batch, stop, clock.usual_seconds())
    status, why = "failed", f"{type(error).__name__}: {error}"
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        status, why = "stopped", stop.reason
    # first of all: Ctrl-C may end what is waited for below
    log.summarize(status, why)
    # who interrupts twice waits for nothing
    hurry = isinstance(error, KeyboardInterrupt)
    if saver and not hurry:
        saver.wait()
    log.end(status, why, EXIT_CODES[status], hurry)
    return error
