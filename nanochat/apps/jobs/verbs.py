"""What changes a run: save, land, set, pause, continue, stop and abort. Each reports what is being
done, and returns when it is done; nothing here changes a run that it does not name."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.apps.jobs.asking import Conversation, Message, NoAnswer, shown, slices
from nanochat.apps.jobs.state import Place, Run, look
from nanochat.common import Report
from nanochat.run.control import note_abort
from nanochat.run.records import finite_number
from nanochat.run.registry import Job, Process, forget

# that a process gets to end by itself when it is aborted, and to take the request
ABORT_SECONDS = 0.5
ABORT_CONNECT_SECONDS = 0.2
# to be gone after SIGKILL, or after the connection has ended
GONE_SECONDS = 10.0
# without a word, after which the run is called silent
SILENT_SECONDS = 5.0
POLL_SECONDS = 0.02
ENDINGS = {
    "completed": "it completed",
    "stopped": "it was stopped",
    "failed": "it failed",
    "killed": "it was killed",
    "ended": "it ended before it trained",
}


class Refused(Exception):
    """What was asked for has not been done; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What was done, in words, and at which step, None if no step was done yet."""

    done: str
    step: float | None


# ----- whom to ask


def reach(place: Place) -> Job:
    """The job that takes orders for a run. Refused if there is none, with what to do instead."""
    if place.owner:
        raise Refused(f"it belongs to another user ({place.owner}), who has to do this")
    if place.job and place.job.leader.exists():
        return place.job
    run = look(place)
    if run.status == "elsewhere":
        raise Refused(f"it was started on {run.host}: use `nanochat jobs` there")
    if run.status == "running":
        raise Refused(
            "it is training, but did not announce how to reach it; Ctrl-C, or SIGTERM to its "
            "process, stops it"
        )
    raise Refused(ended_in_words(run))


def ended_in_words(run: Run) -> str:
    """How a run has ended, and what is left of it."""
    text = ENDINGS.get(run.status, f"it is {run.status}")
    if run.step is not None:
        text += f" at step {run.step}"
    if run.reason:
        text += f" ({run.reason})"
    if run.status in ("completed", "ended"):
        return text
    if run.checkpoint is None:
        return f"{text}; nothing is saved"
    return f"{text}; --resume continues from step {run.checkpoint}"


# ----- orders that leave the run running


def order(place: Place, request: Message, timeout: float | None, say: Report) -> Outcome:
    """Have an order carried out. Refused if it is not, or not within `timeout` seconds."""
    job = reach(place)
    try:
        with Conversation(job.socket, request) as conversation:
            answer = _answer(conversation, job, deadline_of(timeout), say)
    except NoAnswer as error:
        raise Refused(
            f"process {job.leader.pid} is there, but takes no orders ({shown(error)}); `nanochat "
            "jobs stop` asks it by a signal, `nanochat jobs abort` ends it"
        ) from None
    except EOFError:
        # its last words are in its summary, once it is gone
        are_gone([job.leader], GONE_SECONDS)
        raise Refused(f"not done: {ended_in_words(look(place))}") from None
    if answer is None:
        raise Refused(f"not done within {timeout:g} s; the run does it as soon as it can")
    if "error" in answer:
        raise Refused(shown(answer["error"]))
    return Outcome(shown(answer.get("done", "")), finite_number(answer.get("step")))


def _answer(
    conversation: Conversation, job: Job, deadline: float | None, say: Report
) -> Message | None:
    """The last message of a conversation; those before are reported. None after the deadline.

    EOFError if the run ends before."""
    silent_at = time.monotonic() + SILENT_SECONDS
    for seconds in slices(deadline, 1.0):
        message = conversation.read(seconds)
        if message and "doing" not in message:
            return message
        if message:
            silent_at = float("inf")
            say(f"busy with {shown(message['doing'])}")
        elif job.leader.exists() is False:
            raise EOFError
        elif time.monotonic() > silent_at:
            silent_at = float("inf")
            say(silent(job))
    return None


def silent(job: Job) -> str:
    """What to report of a process that takes requests and does not answer."""
    return (
        f"no answer from process {job.leader.pid} so far: it may be suspended; `nanochat jobs "
        "abort` would end it"
    )


# ----- the end of a run


def stop(place: Place, timeout: float | None, say: Report) -> Outcome:
    """Let a run finish its step, save and end. Refused if that failed, or takes longer than
    `timeout` seconds."""
    job = reach(place)
    deadline = deadline_of(timeout)
    is_training = True
    try:
        with Conversation(job.socket, {"verb": "stop"}) as conversation:
            message = conversation.read(SILENT_SECONDS) or {"doing": silent(job)}
            if "error" in message:
                raise Refused(shown(message["error"]))
            is_training = message.get("training") is not False
            say(shown(message.get("doing", "")))
    except NoAnswer as error:
        say(f"it takes no orders ({shown(error)}); asking process {job.leader.pid} by SIGTERM")
        send(job, signal.SIGTERM)
    except EOFError:
        # it has ended as it was asked to
        pass
    # the other ranks may need a moment longer than the first
    left = None if deadline is None else deadline - time.monotonic()
    if not are_gone(of_here(job), left):
        raise Refused(f"not ended within {timeout:g} s; it ends as soon as it has saved")
    run = look(place)
    if not is_training and run.status != "failed":
        return Outcome("stopped during the set-up, before a step was done", None)
    if run.status not in ("stopped", "completed"):
        raise Refused(ended_in_words(run))
    return Outcome(ended_in_words(run), run.step)


def abort(place: Place, timeout: float | None, say: Report) -> Outcome:
    """End a run now, without saving: by its own hand, or after ABORT_SECONDS by SIGKILL. timeout:
    seconds to wait for the system to end it then, GONE_SECONDS if None."""
    job = reach(place)
    processes = of_here(job)
    say("ending it now, without saving")
    # the connection stays open, or its end would pass for a client that gave up
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NoAnswer):
            request = {"verb": "abort"}
            stack.enter_context(Conversation(job.socket, request, ABORT_CONNECT_SECONDS))
            are_gone(processes, ABORT_SECONDS)
    if not are_gone(processes, 0):
        say("it does not end by itself: killing it")
        send(job, signal.SIGKILL)
        if not are_gone(processes, timeout or GONE_SECONDS):
            raise Refused("the system has not ended it yet: it waits for a disk or a device")
    # what it does itself, if it gets to it
    note_abort(place.path)
    forget(job)
    run = look(place)
    return Outcome(ended_in_words(run), run.step)


def of_here(job: Job) -> list[Process]:
    """The processes of a job that can be looked up from here."""
    return [process for process in job.processes if process.is_here]


def send(job: Job, number: int) -> None:
    """Send a signal to the processes of a job that are here, and still the same."""
    for process in of_here(job):
        # one may end in this moment
        with contextlib.suppress(ProcessLookupError):
            if process.exists():
                os.kill(process.pid, number)


def are_gone(processes: Sequence[Process], seconds: float | None) -> bool:
    """Wait until processes have ended, so many seconds at most; returns whether they have."""
    until = deadline_of(seconds)
    while any(process.exists() for process in processes):
        if until is not None and time.monotonic() >= until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def deadline_of(seconds: float | None) -> float | None:
    """When so many seconds are over, on time.monotonic(); None for never."""
    return None if seconds is None else time.monotonic() + seconds
