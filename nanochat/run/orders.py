"""Carrying out what `nanochat jobs` asks of a run: between two steps, or out of an evaluation that
all ranks leave together."""

import functools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from nanochat import ranks
from nanochat.common import UsageError
from nanochat.data.prefetch import Interrupted, Prefetcher
from nanochat.data.token_cache import DataFailed
from nanochat.model.decoder import Decoder
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.sharding import own_part
from nanochat.run.checks import evaluation_problems
from nanochat.run.clock import Clock
from nanochat.run.control import Control, Order
from nanochat.run.flags import flag
from nanochat.run.keeper import Keeper
from nanochat.run.log import RunLog
from nanochat.run.parking import in_host_memory
from nanochat.run.plan import Plan, steps_to_land
from nanochat.run.resume import OpenedRun
from nanochat.run.state import TrainState
from nanochat.signals import Stopped, StopSignals

T = TypeVar("T")
# between two looks at whether a pause is over
PAUSE_SECONDS = 0.2


class Session(Protocol):
    """What orders act on: the parts of a run that trains. core: None where CORE cannot be
    measured. prompts: of its samples. ends_early: it looks at --stop-at-bpb and --patience."""

    run: OpenedRun
    args: Namespace
    plan: Plan
    device: torch.device
    core: Any
    prompts: list[str]
    ends_early: bool
    model: Decoder
    optimizer: Optimizer
    state: TrainState
    clock: Clock
    log: RunLog
    keeper: Keeper
    batches: Prefetcher
    stop: StopSignals
    control: Control


def agree(session: Session) -> tuple[Any, bool]:
    """What session.batches has for the next step, and whether a rolling checkpoint is due after it.

    Raises Stopped or DataFailed on every rank if any was asked to stop or has no data."""
    state, clock, plan = session.state, session.clock, session.plan
    batch = None
    no_data = ""
    while True:
        try:
            if batch is None:
                batch = next(session.batches)
        except Interrupted:
            # still none: whatever interrupted is looked at below, and then they are waited for
            pass
        except (DataFailed, UsageError) as error:
            # the other ranks have data: tell them, and leave together
            no_data = str(error)
        orders = session.control.take()
        agreed = ranks.agree(
            session.device,
            stop=session.stop.requested,
            no_data=no_data,
            waits=batch is None,
            save=session.keeper.rolling_due(),
            steps=clock.steps_in_budget(
                plan.budget_to_fit(state.step),
                state.step,
                state.training_seconds,
                first=plan.num_iterations is None,
            ),
            orders=[order.request for order in orders],
        )
        if agreed.no_data:
            raise DataFailed(agreed.no_data)
        if agreed.steps:
            plan.set_steps(agreed.steps, done=state.step)
            session.log.steps_fixed(clock)
        obey(session, orders, agreed.orders)
        if not agreed.waits:
            break
    for values in session.run.changes_at(state.step):
        change_flags(session, values)
    for steps in plan.landings_at(state.step):
        session.log.landed(steps)
    return batch, agreed.save


def interrupted(session: Session) -> bool:
    """Whether this rank has to leave an evaluation; asked between its passes, which is a sign of
    progress."""
    session.clock.begin(f"the evaluation of step {session.state.step}")
    # alone, orders are carried out here; several ranks leave together, and begin again
    if session.control.pending and ranks.world_size() == 1:
        attend(session)
    return session.stop.requested or session.control.pending


def undisturbed(session: Session, measure: Callable[[], T]) -> T:
    """measure(), which begins again after whatever it was left for has been done."""
    while True:
        try:
            return measure()
        except Stopped:
            attend(session)


def attend(session: Session) -> None:
    """Carry out the orders that wait, on all ranks. Raises Stopped on every rank if any was asked
    to stop."""
    obey(session, *_heard(session))


def _heard(session: Session) -> tuple[Sequence[Order], Sequence[dict[str, Any]]]:
    """The orders that wait, on rank 0, and their requests on every rank. Raises as attend()."""
    orders = session.control.take()
    requests = [order.request for order in orders]
    agreed = ranks.agree(session.device, stop=session.stop.requested, orders=requests)
    return orders, agreed.orders


def obey(session: Session, orders: Sequence[Order], requests: Sequence[dict[str, Any]]) -> None:
    """Carry out orders between two steps; every rank calls it with the same requests, rank 0 with
    the orders that they are of, which it answers."""
    control, step = session.control, session.state.step
    was_paused = control.paused
    pauses = []
    for number, request in enumerate(requests):
        order = orders[number] if orders else Order(request)
        if order.verb == "save":
            save_now(session, order)
        elif order.verb == "land":
            land(session, order)
        elif order.verb == "set":
            set_flags(session, order)
        elif order.verb == "pause":
            control.paused = True
            pauses.append(order)
        elif order.verb == "continue":
            control.paused = False
            order.done(f"training continues at step {step}", step)
    # after all orders: one to continue may be among them
    if control.paused and not was_paused:
        pause(session, pauses)
    for order in pauses:
        order.done(f"paused at step {step}", step)


def save_now(session: Session, order: Order) -> None:
    """Save the state as it is; the order is done once that is on disk."""
    keeper, state = session.keeper, session.state
    if not keeper.enabled:
        order.refuse("this run saves nothing (--no-save)")
        return
    if state.step == keeper.first_step:
        text = f"nothing is new since step {state.step}, which this start began from"
        order.done(text, state.step)
        return
    keeper.save("rolling", state, hold=state.skipped_in_a_row > 0)
    order.finished = functools.partial(keeper.outcome, state.step)


def land(session: Session, order: Order) -> None:
    """Begin the warm-down before the next step, and end in the given minutes or in a share of the
    time spent."""
    plan, state, keeper = session.plan, session.state, session.keeper
    # by rank 0's clock
    steps = ranks.from_rank0(steps_to_land(session.clock, state, order.request.get("minutes")))
    if steps is None:
        order.refuse("no step of this start has been timed yet; try again in a moment")
        return
    end = state.step + steps
    if plan.num_iterations is not None and end >= plan.num_iterations:
        order.refuse(
            f"the run ends at step {plan.num_iterations} anyway, which is not later than the "
            f"{steps} steps of this landing; give fewer --minutes"
        )
        return
    # from here a longer horizon can extend the run
    if plan.warmdown_begins is None or state.step <= plan.warmdown_begins:
        keeper.save("before_warmdown", state, hold=state.skipped_in_a_row > 0)
    plan.land(end, done=state.step)
    session.log.record_plan()
    order.done(f"landing since step {state.step}: the run ends at step {end}", state.step)


def set_flags(session: Session, order: Order) -> None:
    """Change flags of the running job, and write that down for a run that is resumed.

    They change before the next step, also when an evaluation is left for this: what is still due at
    this step is then the same in a run that is resumed."""
    values, step = order.request["values"], session.state.step
    then = dict(vars(session.args))
    # those of other orders that wait for the next step too
    for changed in session.run.changes_at(step):
        then |= changed
    problems = evaluation_problems(Namespace(**then | values))
    early = [name for name in ("stop_at_bpb", "patience") if name in values]
    wanted = [name for name in ("core_metric_every", "sample_every") if values.get(name, -1) != -1]
    if problems:
        # train.py would refuse to resume the run
        order.refuse("; ".join(problems))
    elif early and not session.ends_early:
        order.refuse(f"{', '.join(map(flag, early))}: the evaluations of this run have no val/bpb")
    elif "core_metric_every" in wanted and session.core is None:
        order.refuse(
            "--core-metric-every: this start has opened no CORE bundle; resume it with one"
        )
    elif "sample_every" in wanted and not session.prompts:
        order.refuse("--sample-every: this start has no prompts; resume it with --sample-every")
    else:
        session.run.changes.append((step, values))
        session.log.record_change(values)
        order.done(f"in force from step {step}", step)


def change_flags(session: Session, values: dict[str, Any]) -> None:
    """Let these flags have these values from now on."""
    vars(session.args).update(values)
    session.clock.save_minutes = session.args.save_every_minutes
    session.keeper.keep_last(session.args.keep_last)
    session.log.changed(values)


def pause(session: Session, orders: Sequence[Order]) -> None:
    """Do nothing, with the memory of the GPU given back, until another order ends that. orders:
    those that asked for it."""
    control, clock, step = session.control, session.clock, session.state.step
    was_doing = clock.doing
    session.log.message(f"step {step}: paused, as nanochat jobs asked")
    tensors = [*map(own_part, session.model.parameters()), *session.model.buffers()]
    tensors += session.optimizer.own_tensors()
    try:
        while control.paused:
            with in_host_memory(tensors, session.device.type):
                for order in orders:
                    order.done(f"paused at step {step}", step)
                requests = []
                while not requests:
                    clock.begin("a pause", math.inf)
                    time.sleep(PAUSE_SECONDS)
                    orders, requests = _heard(session)
            # a save needs the tensors where they belong
            obey(session, orders, requests)
            orders = []
    finally:
        control.paused = False
        clock.begin(was_doing)
    session.log.message(f"step {step}: training continues")
