"""Many requests for text at once: they join and leave a running batch, and share what their prompts
have in common.

One thread runs the engine; requests come from any. A request gets the same tokens alone and among
others: its prompt is read by itself in pieces of fixed places, and decode.cpp computes each text of
a batch as it would alone (other devices: with batch_invariant, one text at a time).

Shape legend: n tokens, V vocabulary."""

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UsageError, in_a_line, stream_seed
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.generation import (
    TextStream,
    check_prompt,
    choose,
    draw_points,
    option_problems,
    penalised,
)
from nanochat.eval.prefixes import Prefixes, Reading, read_piece
from nanochat.eval.scheduler import QueueFull, Scheduler, Work
from nanochat.eval.slots import fill, in_compute_dtype, open_decoder
from nanochat.eval.ties import TOLERANCE, near_ties
from nanochat.limits import available_cpus
from nanochat.model.decoder import Decoder

__all__ = ["Ended", "Engine", "QueueFull", "Request", "Sampling", "Scored", "Token"]

# Prompt tokens that are read between two steps.
PIECE = 64
# The most likely tokens whose probabilities may be asked for.
MOST_LOGPROBS = 20
# random numbers of a text that are drawn together: a call takes longer than its numbers
POINTS = 64

# (id, log-probability) of tokens, the most likely first
Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen; see generation.choose()."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """A sentence for each unusable setting."""
        found = option_problems(max_new_tokens=1, **dataclasses.asdict(self))
        return [f"{name} {value}: {reason}" for name, value, reason in found]


def seeds_of(seed: int, n: int) -> list[int]:
    """The seeds of n texts of one prompt; the first is that of a single text."""
    return [seed] + [stream_seed(seed, "choice", i) for i in range(1, n)]


@dataclass(frozen=True)
class Request:
    """A text to continue. prompt: ids, BOS first. stop: texts before which it ends.

    logprobs: how many of the most likely tokens come with each token, with its own and their
    log-probabilities; None for none. prompt_logprobs: the prompt's tokens as well."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class Scored:
    """The first event of a request with prompt_logprobs: the prompt has been read.

    prompt_top: (log-probability, top) of each of its tokens; of the first, (None, ())."""

    prompt_top: tuple[tuple[float | None, Top], ...]
    text: str = ""


@dataclass(frozen=True)
class Token:
    """One more token of a text. text: what has become certain with it. logprob: natural, under the
    model's own distribution, whatever the sampling; None if it was not asked for."""

    id: int
    text: str
    logprob: float | None
    top: Top


@dataclass(frozen=True)
class Ended:
    """The last event of a request. reason: stop, length, cancelled or error. text: the rest of the
    text. id: of the token that ended it, which is no part of it; None if none did."""

    reason: str
    text: str
    problem: str = ""
    id: int | None = None


Event = Scored | Token | Ended


@dataclass(frozen=True)
class Counts:
    """What an engine has done and is doing. shared_tokens: prompt tokens that had been read for an
    earlier prompt. near_ties: choices in the fast mode that the other texts of a batch might have
    changed (see ties.near_ties())."""

    running: int
    waiting: int
    requests: int
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    near_ties: int = 0


class _Running:
    """A request with what belongs to it alone."""

    def __init__(
        self, request: Request, deliver: Callable[[Event], None], work: Work, tokenizer: Tokenizer
    ) -> None:
        self.request = request
        self.deliver = deliver
        self.work = work
        self.stream = TextStream(tokenizer, request.stop)
        # texts whose settings are alike are chosen together
        self.settings = dataclasses.replace(request.sampling, seed=0)
        self.generator = torch.Generator().manual_seed(request.sampling.seed)
        self.points: list[float] = []
        self.reading: Reading | None = None
        self.prompt_top: list[tuple[float | None, Top]] = [(None, ())]
        self.seen_V: Tensor | None = None
        # the token that is read next, and how many there are
        self.next_id = 0
        self.n_new = 0

    @property
    def position(self) -> int:
        """Of the token that is read next."""
        return len(self.request.prompt) + self.n_new - 1

    def next_point(self) -> float:
        """The random number that draws the next token."""
        if not self.points:
            self.points = draw_points(POINTS, self.generator)[:, 0].tolist()
            self.points.reverse()
        return self.points.pop()


class Engine:
    """Continues texts of one model. submit(), cancel(), replace_model(), counts() and close() may
    be called from any thread; run() belongs to one."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        slots: int = 8,
        positions: int | None = None,
        queue: int = 64,
        threads: int | None = None,
        batch_invariant: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        """slots: texts that are continued together. positions: tokens of a prompt and its
        continuation, at most; by default the context of training. queue: requests that may wait.
        threads: on a CPU, by default all. report(text): gets a line when something is unusual."""
        self.tokenizer = tokenizer
        self.positions = positions or model.config.max_seq_len
        self.slots = slots
        self.threads = threads or available_cpus()
        self.batch_invariant = batch_invariant
        self.report = report
        self.scheduler = Scheduler(slots, queue, PIECE)
        self.running: dict[int, _Running] = {}
        self.tickets = itertools.count()
        # held while the books are changed, not while the model computes
        self.changed = threading.Condition()
        self.closed = False
        self.newer: Decoder | None = None
        self.n_requests = self.n_prompt = self.n_shared = self.n_new = self.n_near_ties = 0
        self._load(model)

    def _load(self, model: Decoder) -> None:
        self.model = in_compute_dtype(model)
        self.decoder = open_decoder(
            self.model, self.slots, self.positions, self.threads, self.report
        )
        self.prefixes = Prefixes(self.model)

    # ---- from any thread ----

    def check(self, request: Request) -> None:
        """UsageError for a request that can never be honoured."""
        check_prompt(self.model, list(request.prompt), 0)
        problems = request.sampling.problems()
        if request.max_new_tokens < (0 if request.prompt_logprobs else 1):
            problems.append(f"max_new_tokens {request.max_new_tokens}: must be at least 1")
        needed = len(request.prompt) + request.max_new_tokens
        if needed > self.positions:
            problems.append(
                f"the prompt's {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"need {needed} positions, and there are {self.positions}; shorten the prompt or "
                f"ask for fewer new tokens"
            )
        if request.logprobs is not None and not 0 <= request.logprobs <= MOST_LOGPROBS:
            problems.append(f"logprobs {request.logprobs}: must be from 0 to {MOST_LOGPROBS}")
        if "" in request.stop:
            problems.append("stop: an empty text is everywhere")
        if problems:
            raise UsageError("; ".join(problems))

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> int:
        """Take a request; returns its ticket. deliver(event) is called in the engine's thread: with
        Scored if the prompt's log-probabilities are wanted, for each token except the one that ends
        the text (Tokenizer.end_ids), and at last with Ended; it must not block.

        UsageError for a request that can never be honoured, QueueFull if too many wait."""
        self.check(request)
        work = Work(next(self.tickets), len(request.prompt))
        with self.changed:
            self.scheduler.add(work)
            self.running[work.ticket] = _Running(request, deliver, work, self.tokenizer)
            self.n_requests += 1
            self.changed.notify()
        return work.ticket

    def cancel(self, ticket: int) -> None:
        """End a request, if it has not ended yet; its slot is free before the next step."""
        with self.changed:
            if running := self._take_out(ticket):
                running.deliver(Ended("cancelled", ""))

    def replace_model(self, model: Decoder) -> None:
        """Use newer weights of the same shape as soon as no request is running; those that wait
        until then get them."""
        with self.changed:
            self.newer = model
            self.changed.notify()

    def close(self) -> None:
        """Let run() end; requests that have not ended are cancelled."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def counts(self) -> Counts:
        """What the engine has done and is doing."""
        with self.changed:
            waiting = len(self.scheduler.waiting)
            return Counts(
                running=len(self.running) - waiting,
                waiting=waiting,
                requests=self.n_requests,
                prompt_tokens=self.n_prompt,
                shared_tokens=self.n_shared,
                new_tokens=self.n_new,
                near_ties=self.n_near_ties,
            )

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a text gets the same logits, with ==, whatever runs beside it."""
        return self.batch_invariant or self.decoder.is_batch_invariant

    @property
    def mode(self) -> str:
        """How texts that run together are computed, and what follows, in a line."""
        if self.decoder.is_batch_invariant:
            return "batch-invariant: decode.cpp computes each text as it would alone"
        if self.batch_invariant:
            return "batch-invariant: PyTorch computes one text at a time"
        return (
            "fast: PyTorch computes texts together, and a token whose choice is a near-tie may "
            f"differ from the same text alone (logits within {TOLERANCE[self.model.compute_dtype]} "
            "of each other; counted); --batch-invariant rules that out"
        )

    def _take_out(self, ticket: int) -> _Running | None:
        self.scheduler.remove(ticket)
        return self.running.pop(ticket, None)

    # ---- the engine's thread ----

    def run(self) -> None:
        """Serve requests until close()."""
        while self._wait():
            try:
                self._turn()
            # Whatever it is: these requests fail, later ones may not.
            except Exception as error:
                problem = f"{type(error).__name__}: {in_a_line(error)}"
                self.report(f"the engine failed, and with it all running requests ({problem})")
                self._end_all(Ended("error", "", problem))
        self._end_all(Ended("cancelled", ""))
        self.decoder.close()

    def _wait(self) -> bool:
        """Wait for something to do; False once the engine is closed."""
        with self.changed:
            while not self.closed:
                if self.newer is not None and self.scheduler.idle:
                    self.decoder.close()
                    self._load(self.newer)
                    self.newer = None
                # a newer model waits for those that run, and the others wait for it
                if self.newer is None:
                    self._admit()
                if not self.scheduler.idle:
                    return True
                self.changed.wait()
        return False

    def advance(self) -> None:
        """One turn in the caller's thread, for programs in which no thread is in run(). What goes
        wrong is raised, and the requests stay."""
        with self.changed:
            self._admit()
        self._turn()

    def _admit(self) -> None:
        for work in self.scheduler.admit():
            self._begin(self.running[work.ticket])

    def _end_all(self, ended: Ended) -> None:
        with self.changed:
            for ticket in list(self.running):
                self._take_out(ticket).deliver(ended)

    def _begin(self, running: _Running) -> None:
        request = running.request
        running.reading = self.prefixes.begin(request.prompt, not request.prompt_logprobs)
        running.work.n_read = running.reading.cache.length
        self.n_prompt += len(request.prompt)
        self.n_shared += running.work.n_read
        if request.sampling.repetition_penalty != 1:
            running.seen_V = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
            running.seen_V[list(request.prompt)] = True

    def _turn(self) -> None:
        """Read one piece of a prompt, and one token of each text that is continued."""
        with self.changed:
            piece = self.scheduler.next_piece()
            continued = [self.running[ticket] for ticket in self.scheduler.continued]
        if continued:
            self._continue(continued)
        if piece is not None:
            work, _, end = piece
            self._read(work, end)

    def _read(self, work: Work, end: int) -> None:
        running = self.running.get(work.ticket)
        # cancelled a moment ago
        if running is None:
            return
        request, reading = running.request, running.reading
        hidden_nxC = read_piece(self.model, reading, end)
        if end % PIECE == 0:
            reading.note_place()
        if request.prompt_logprobs:
            self._score_prompt(running, hidden_nxC, end)
        with self.changed:
            if work.ticket not in self.running or not self.scheduler.read(work, end):
                return
        self.prefixes.keep(reading)
        if request.prompt_logprobs:
            self._hand_over(running, Scored(tuple(running.prompt_top)))
        if request.max_new_tokens == 0:
            self._end(running, "length", "")
            return
        fill(self.decoder, work.slot, reading.cache)
        running.reading = None
        with torch.no_grad():
            logits_1xV = self.model.logits(hidden_nxC[-1:]).cpu()
        self._advance([running], logits_1xV)

    def _score_prompt(self, running: _Running, hidden_nxC: Tensor, end: int) -> None:
        """The log-probabilities of the prompt tokens that follow those of a piece."""
        prompt = running.request.prompt
        first = end - len(hidden_nxC)
        followers = prompt[first + 1 : end + 1]
        with torch.no_grad():
            logits_nxV = self.model.logits(hidden_nxC[: len(followers)]).cpu()
        running.prompt_top += _logprobs(logits_nxV, list(followers), running.request.logprobs or 0)

    def _continue(self, running: list[_Running]) -> None:
        one_at_a_time = self.batch_invariant and not self.decoder.is_batch_invariant
        tolerance = None if self.is_batch_invariant else TOLERANCE[self.model.compute_dtype]
        groups = [[one] for one in running] if one_at_a_time else [running]
        for group in groups:
            logits_BxV = self.decoder.step(
                [one.next_id for one in group],
                [one.position for one in group],
                [one.work.slot for one in group],
            )
            self._advance(group, logits_BxV, tolerance)

    def _advance(
        self, group: list[_Running], logits_BxV: Tensor, tolerance: float | None = None
    ) -> None:
        """Choose the next token of each text, and deliver it. tolerance: count the near-ties."""
        all_chosen, n_near_ties = _choose(group, logits_BxV, tolerance)
        self.n_near_ties += n_near_ties
        scores = _scores(group, all_chosen, logits_BxV)
        for row, (running, chosen) in enumerate(zip(group, all_chosen, strict=True)):
            if chosen is None:
                self._end(running, "error", "", "the model's logits are not numbers")
            else:
                self._deliver(running, chosen, *scores.get(row, (None, ())))

    def _deliver(self, running: _Running, token_id: int, logprob: float | None, top: Top) -> None:
        request = running.request
        running.next_id = token_id
        running.n_new += 1
        self.n_new += 1
        if running.seen_V is not None:
            running.seen_V[token_id] = True
        text = running.stream.push(token_id)
        if token_id in self.tokenizer.end_ids:
            self._end(running, "stop", text, ended_by=token_id)
            return
        self._hand_over(running, Token(token_id, text, logprob, top))
        if running.stream.ended:
            self._end(running, "stop", "")
        elif running.n_new == request.max_new_tokens:
            self._end(running, "length", running.stream.end())

    def _hand_over(self, running: _Running, event: Scored | Token) -> None:
        with self.changed:
            # nothing follows the end of a request that was cancelled meanwhile
            if running.work.ticket in self.running:
                running.deliver(event)

    def _end(
        self,
        running: _Running,
        reason: str,
        text: str,
        problem: str = "",
        ended_by: int | None = None,
    ) -> None:
        with self.changed:
            if self._take_out(running.work.ticket):
                running.deliver(Ended(reason, text, problem, ended_by))


def _choose(
    group: list[_Running], logits_BxV: Tensor, tolerance: float | None
) -> tuple[list[int | None], int]:
    """The next token of each text, None where the logits are not numbers, and how many of these
    choices are near-ties, if a tolerance is given. Texts with the same settings are chosen
    together, which takes as long as one."""
    alike: dict[Sampling, list[int]] = {}
    # NumPy takes one thread for rows: several threads of torch would spin on the model's cores
    are_numbers = (logits_BxV.numpy().max(-1) < math.inf).tolist()
    for row, running in enumerate(group):
        if are_numbers[row]:
            alike.setdefault(running.settings, []).append(row)
    chosen: list[int | None] = [None] * len(group)
    n_near_ties = 0
    for settings, rows in alike.items():
        found, n_near = _choose_alike(
            [group[row] for row in rows], _rows_of(logits_BxV, rows), settings, tolerance
        )
        n_near_ties += n_near
        for row, token_id in zip(rows, found, strict=True):
            chosen[row] = token_id
    return chosen, n_near_ties


def _rows_of(logits_BxV: Tensor, rows: list[int]) -> Tensor:
    """Some of the rows, in order."""
    if len(rows) == len(logits_BxV):
        return logits_BxV
    return torch.from_numpy(logits_BxV.numpy()[rows])


def _choose_alike(
    group: list[_Running], logits_BxV: Tensor, settings: Sampling, tolerance: float | None
) -> tuple[list[int], int]:
    points = None
    if settings.temperature != 0:
        points = torch.tensor([[one.next_point()] for one in group], dtype=torch.float64)
    if settings.repetition_penalty != 1:
        seen = torch.stack([running.seen_V for running in group])
        logits_BxV = penalised(logits_BxV, settings.repetition_penalty, seen)
    cuts = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
    chosen_B = choose(logits_BxV, points, settings.temperature, **cuts)
    n_near_ties = 0
    if tolerance is not None:
        # a penalty makes differences of logits larger
        tolerance *= max(settings.repetition_penalty, 1 / settings.repetition_penalty)
        is_near_B = near_ties(logits_BxV, chosen_B, points, tolerance, settings.temperature, **cuts)
        n_near_ties = int(is_near_B.sum())
    return chosen_B.tolist(), n_near_ties


def _scores(
    group: list[_Running], chosen: list[int | None], logits_BxV: Tensor
) -> dict[int, tuple[float, Top]]:
    """{row: (log-probability of the chosen token, the most likely ones)} of the texts that want
    them."""
    wanted = [running.request.logprobs for running in group]
    rows = [row for row, n in enumerate(wanted) if n is not None and chosen[row] is not None]
    if not rows:
        return {}
    most = max(wanted[row] for row in rows)
    found = _logprobs(_rows_of(logits_BxV, rows), [chosen[row] for row in rows], most)
    return {
        row: (logprob, top[: wanted[row]]) for row, (logprob, top) in zip(rows, found, strict=True)
    }


def _logprobs(logits_nxV: Tensor, ids: list[int], n_top: int) -> list[tuple[float, Top]]:
    """The log-probability of each token, and the n_top most likely ones in its place."""
    found: list[tuple[float, Top]] = []
    # a row at a time: of several, torch computes the softmax in threads that spin afterwards
    for row, own in enumerate(ids):
        logits_1xV = logits_nxV[row : row + 1]
        # of fp32 numbers: the log-probabilities have the same order, and twice the bytes to read
        (places,) = logits_1xV.topk(n_top).indices.tolist()
        (logprobs_V,) = logits_1xV.double().log_softmax(-1).numpy()
        logprob, *values = logprobs_V[[own, *places]].tolist()
        found.append((logprob, tuple(zip(places, values, strict=True))))
    return found
