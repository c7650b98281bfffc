"""Log-probabilities of the answers in preference pairs, and how far a model has left its reference:
of the reference, once and kept on disk, and of the model that is tuned."""

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from nanochat.common import stream_seed, write_atomic
from nanochat.data.examples import Shares
from nanochat.data.packing import NO_TARGET
from nanochat.data.pair_rows import rows_of
from nanochat.data.preferences import Pair, Pairs
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.engine import Ended, Request, Sampling, Token
from nanochat.eval.unison import EvaluationFailed, sum_or_leave
from nanochat.eval.writer import Writer
from nanochat.model.decoder import Decoder
from nanochat.model.preference_loss import answer_logprobs, compared, preference_loss, rewards
from nanochat.ranks import from_all, rank, world_size
from nanochat.signals import Stopped

Tensors = dict[str, torch.Tensor]
# What the reference draws: so many pairs of answers to held-out prompts, of so many tokens at most.
DRAWN_PAIRS = 32
DRAWN_TOKENS = 64
# behind the end of a drawn answer
NO_TOKEN = -1


@dataclass(frozen=True)
class PreferenceScore:
    """Of n held-out pairs: the mean loss, the share whose chosen answer has the larger reward and
    its standard error, the mean margin between their rewards, the mean log-probability of the
    chosen answers."""

    loss: float
    accuracy: float
    stderr: float | None
    margin: float
    chosen_logprob: float
    n: int


@dataclass(frozen=True)
class Divergence:
    """kl: nats an answer, estimated from n pairs of answers; see divergence(). stderr: of that."""

    kl: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Pass:
    """How answers run through a model. T: tokens of a row. padding: an id. device_rows: rows of a
    pass. interrupted: asked before each pass."""

    T: int
    padding: int
    device_rows: int
    device: torch.device
    interrupted: Callable[[], bool] = lambda: False


def logprobs_of(model: torch.nn.Module, pairs: Pairs, how: Pass) -> torch.Tensor:
    """Log-probabilities of chosen and rejected answers, fp32 (pairs, 2), on every rank, which
    share the work.

    The model's train or eval mode is restored. Raises Stopped and EvaluationFailed on every rank.
    """

    def of_answers(nats: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return answer_logprobs(nats)[:, None]

    return _scored(model, pairs, how, 1, of_answers)[..., 0]


def token_logprobs_of(model: torch.nn.Module, pairs: Pairs, how: Pass) -> torch.Tensor:
    """Log-probabilities of the tokens of answers of DRAWN_TOKENS at most, fp32 (pairs, 2,
    DRAWN_TOKENS), 0 behind their ends. Otherwise as logprobs_of()."""

    def of_tokens(nats: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(nats), DRAWN_TOKENS)
        for row, (nats_T, targets_T) in enumerate(zip(nats, targets, strict=True)):
            of_answer = -nats_T[targets_T != NO_TARGET]
            found[row, : len(of_answer)] = of_answer
        return found

    return _scored(model, pairs, how, DRAWN_TOKENS, of_tokens)


def _scored(
    model: torch.nn.Module,
    pairs: Pairs,
    how: Pass,
    width: int,
    take: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What take(cross-entropy, targets), both (2 x pairs, T), returns of all pairs: its (2 x pairs,
    width) as fp32 (pairs, 2, width). Raises as logprobs_of()."""
    found = torch.zeros(len(pairs), 2, width, dtype=torch.float64)
    at_once = max(1, how.device_rows // 2)

    def score_share(mine: range) -> None:
        for first in range(0, len(mine), at_once):
            if how.interrupted():
                raise Stopped
            numbers = list(mine[first : first + at_once])
            inputs, targets = map(torch.from_numpy, rows_of(pairs, numbers, how.T, how.padding))
            with torch.no_grad():
                nats = model(inputs.to(how.device), targets.to(how.device)).cpu()
            found[numbers] = take(nats, targets).view(-1, 2, width).double()

    return _shared_out(model, len(pairs), how.device, found, score_share).float()


def _shared_out(
    model: torch.nn.Module,
    n: int,
    device: torch.device,
    found: torch.Tensor,
    fill_share: Callable[[range], None],
) -> torch.Tensor:
    """`found`, fp64, of which each rank fills in its share of n entries, complete on every rank.

    fill_share(numbers): fills in this rank's, which are 0 before, with the model in eval mode; it
    may raise Stopped. Raises as logprobs_of()."""
    was_training = model.training
    model.eval()
    stopped = False
    error = None
    try:
        fill_share(range(rank(), n, world_size()))
    except Stopped:
        stopped = True
    except Exception as caught:
        # not raised here: the other ranks would wait for this one's share
        error = caught
    finally:
        model.train(was_training)
    failure = "" if error is None else f"{type(error).__name__}: {error}"
    # each entry is one rank's, so that a sum brings them together
    together = sum_or_leave(found.flatten(), device, stopped=stopped, failure=failure, cause=error)
    return together.view(found.shape)


def score(
    logprobs_Nx2: torch.Tensor,
    reference_Nx2: torch.Tensor,
    lengths_Nx2: torch.Tensor,
    *,
    beta: float,
    variant: str,
    label_smoothing: float,
) -> PreferenceScore:
    """Compare a model with its reference. lengths: tokens of each answer. Raises EvaluationFailed
    for numbers that are not finite."""
    losses = preference_loss(
        *compared(logprobs_Nx2, lengths_Nx2, variant).T,
        *compared(reference_Nx2, lengths_Nx2, variant).T,
        beta=beta,
        variant=variant,
        label_smoothing=label_smoothing,
    )
    if not losses.isfinite().all():
        raise EvaluationFailed("log-probabilities of held-out answers are not finite")
    chosen, rejected = rewards(logprobs_Nx2, reference_Nx2, beta).T
    right = (chosen > rejected).double()
    n = len(right)
    return PreferenceScore(
        loss=losses.mean().item(),
        accuracy=right.mean().item(),
        stderr=right.std().item() / math.sqrt(n) if n > 1 else None,
        margin=(chosen - rejected).mean().item(),
        chosen_logprob=logprobs_Nx2[:, 0].mean().item(),
        n=n,
    )


def draw_pairs(model: Decoder, tokenizer: Tokenizer, pairs: Pairs, how: Pass) -> torch.Tensor:
    """DRAWN_PAIRS pairs of answers that the model draws, with its own probabilities, to the prompts
    of `pairs` in turn: ids, int32 (DRAWN_PAIRS, 2, DRAWN_TOKENS), NO_TOKEN behind their ends.

    A token that ends an answer is its last. The same on every rank. Raises as logprobs_of()."""
    found = torch.zeros(DRAWN_PAIRS, 2, DRAWN_TOKENS, dtype=torch.float64)

    def draw_share(mine: range) -> None:
        requests = []
        for number, choice in itertools.product(mine, range(2)):
            prompt = tuple(pairs[number % len(pairs)].prompt.tolist())
            # a row's last token is a target alone
            most = min(DRAWN_TOKENS, how.T + 1 - len(prompt))
            # not the run's seed: runs with other seeds share the reference
            seed = stream_seed(0, "answers of the reference", number, choice)
            requests.append(Request(prompt, most, Sampling(seed=seed)))
        if not requests:
            return
        answers: list[list[int]] = [[] for _ in requests]
        slots = min(how.device_rows, len(requests))
        with Writer(model, tokenizer, slots=slots) as writer:
            for index, event in writer.events(requests):
                if how.interrupted():
                    raise Stopped
                if isinstance(event, Token | Ended) and event.id is not None:
                    answers[index].append(event.id)
        for index, ids in enumerate(answers):
            answer = found[mine[index // 2], index % 2]
            answer.fill_(NO_TOKEN)
            answer[: len(ids)] = torch.tensor(ids, dtype=torch.float64)

    return _shared_out(model, DRAWN_PAIRS, how.device, found, draw_share).int()


def as_pairs(drawn_Nx2xT: torch.Tensor, pairs: Pairs) -> Pairs:
    """What draw_pairs() drew, with the prompts that it was drawn for."""
    made = []
    for number, both in enumerate(drawn_Nx2xT):
        answers = (ids[ids != NO_TOKEN].numpy().astype(np.uint32) for ids in both)
        made.append(Pair(pairs[number % len(pairs)].prompt, *answers))
    return Pairs(made, Shares.of([Fraction(1)], [len(made)]), np.uint32)


def divergence(logprobs_Nx2xT: torch.Tensor, reference_Nx2xT: torch.Tensor) -> Divergence:
    """KL(reference || model) of answers to held-out prompts, in nats an answer of DRAWN_TOKENS at
    most, from the log-probabilities of the tokens of answers that the reference drew.

    Each token adds r - 1 - log r, where r is model / reference, so that an answer's estimate is
    unbiased (the mean of r is 1 where the reference draws) and never negative. Answers of the data
    would estimate no divergence, since neither of the two drew them; those of the model, which
    KL(model || reference) needs, would need the reference in memory. Raises EvaluationFailed for
    numbers that are not finite."""
    log_ratio = (logprobs_Nx2xT - reference_Nx2xT).double()
    # two answers to a prompt are not independent
    of_pairs_N = (log_ratio.expm1() - log_ratio).sum(dim=2).mean(dim=1)
    if not of_pairs_N.isfinite().all():
        raise EvaluationFailed("log-probabilities of the reference's answers are not finite")
    n = len(of_pairs_N)
    stderr = of_pairs_N.std().item() / math.sqrt(n) if n > 1 else None
    return Divergence(of_pairs_N.mean().item(), stderr, n)


def kept_or_computed(path: Path, compute: Callable[[], Tensors]) -> Tensors:
    """The tensors in a file, or those that compute() gives, which are then written there.

    A file that is missing or damaged is written anew; one that cannot be written costs only time.
    Every rank calls it; rank 0 writes."""
    found = None
    with contextlib.suppress(OSError, SafetensorError):
        found = load_file(path)
    # ranks of other machines may not see it
    if all(from_all(found is not None)):
        return found
    tensors = compute()
    if rank() == 0:
        # computed again the next time
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({name: t.contiguous() for name, t in tensors.items()}))
    return tensors
