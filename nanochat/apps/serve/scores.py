"""How surprised a model is by each token of a text: what the page's heat map shows. The numbers are
those of the evaluation: a text is cut into pieces of the context's length, and each is scored alone
after a BOS.

Shape legend: n tokens of a piece, V vocabulary."""

import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.apps.serve.errors import Refused
from nanochat.apps.serve.fields import Field, parse_json, read_fields, short_text, text, whole
from nanochat.apps.serve.runs import ServedRun
from nanochat.apps.serve.transcript import finite, scored_prompt, shown
from nanochat.common import Report, UsageError, counted, in_a_line
from nanochat.data.download import DownloadFailed
from nanochat.data.rows import held_out_pieces
from nanochat.data.sources import Shard
from nanochat.data.token_cache import DataFailed, TokenCache
from nanochat.limits import available_cpus
from nanochat.run.folder import RunFolder
from nanochat.run.training_text import held_out_shards

# tokens that a request may have scored
MOST_TOKENS = 4096
# of the held-out text, the first so many tokens are offered
HELD_OUT_TOKENS = 1 << 20
# alternatives of each token
ALTERNATIVES = 5
# Logits that exist at a time, 32 MiB in fp64.
MOST_LOGITS = 1 << 22
HEAT = (
    Field("model", short_text, ""),
    Field("text", text),
    # the index of a passage of the held-out text, instead of a text
    Field("passage", whole(0, HELD_OUT_TOKENS)),
    # whose held-out text: the name of a run
    Field("of", short_text, ""),
)


@dataclass(frozen=True)
class Question:
    """What a request wants scored: a text, or a passage of a run's held-out text."""

    model: str
    text: str | None
    passage: int | None
    of: str


def read_question(raw: bytes) -> Question:
    """The question in the body of a request. Raises Refused."""
    question = Question(**read_fields(HEAT, parse_json(raw)))
    if not question.model:
        raise Refused("model: is missing", "model")
    if (question.text is None) == (question.passage is None):
        raise Refused("text: give either a text or the number of a passage", "text")
    if bool(question.of) != (question.passage is not None):
        raise Refused("of: names the run whose held-out text the passage is from", "of")
    return question


# ----- the text


class HeldOut:
    """The held-out text of the runs as their evaluations cut it, read when it is first asked for.
    For one thread at a time."""

    def __init__(self, report: Report) -> None:
        self._report = report
        # by the name of the run
        self._passages: dict[str, list[np.ndarray]] = {}

    def passages(self, run: ServedRun) -> list[np.ndarray]:
        """The first pieces that the evaluation of a run scores: BOS and at most a context of ids.

        Raises Refused where the text is not on this machine."""
        if run.name not in self._passages:
            try:
                self._passages[run.name] = self._read(run)
            except (UsageError, DownloadFailed, DataFailed, OSError, KeyError, TypeError) as error:
                # what it says names folders, which are nobody's business
                self._report(f"{run.name}: no held-out text: {in_a_line(error)}")
                raise Refused(
                    f"the held-out text of {run.name} is not on this machine or has changed; "
                    f"paste a text (the server's console says more)",
                    "passage",
                    "no_held_out",
                    404,
                ) from None
        return self._passages[run.name]

    def _read(self, run: ServedRun) -> list[np.ndarray]:
        config = RunFolder(run.folder).read_config()
        shards = held_out_shards(config, self._report)
        if shards is None:
            raise UsageError("the text has changed since the run was started")
        cache = TokenCache(run.tokenizer, available_cpus(), report=self._report)
        for shard in shards:
            _refuse_remote(shard, cache)
        limit = config["args"]["eval_tokens"]
        most = min(HELD_OUT_TOKENS, sys.maxsize if limit == -1 else limit)
        return held_out_pieces(shards, cache, run.config.max_seq_len, most)


def _refuse_remote(shard: Shard, cache: TokenCache) -> None:
    is_here = all(file.is_local() for file in shard.remote_files())
    if not is_here and not cache.path(shard).exists():
        raise UsageError(f"{shard.name} is not on this disk")


def pieces_of_passage(
    number: int, run: ServedRun, source: ServedRun, held_out: HeldOut
) -> list[np.ndarray]:
    """The pieces to be scored of a passage of a run's held-out text. Raises Refused."""
    passages = held_out.passages(source)
    if number >= len(passages):
        raise Refused(
            f"passage: {number} does not exist; the held-out text of {source.name} has "
            f"passages 0 to {len(passages) - 1}",
            "passage",
        )
    ids = passages[number][1:]
    if run.tokenizer.fingerprint == source.tokenizer.fingerprint:
        return _cut(ids, run)
    # a passage may begin or end within a character
    content = b"".join(source.tokenizer.token_bytes(each) for each in ids.tolist())
    return pieces_of_text(content.decode("utf-8", errors="ignore"), run)


def pieces_of_text(content: str, run: ServedRun) -> list[np.ndarray]:
    """The pieces to be scored of a text, as of a held-out document. Raises Refused."""
    # no token is longer: a text that cannot fit need not be encoded, which takes a while
    if len(content.encode("utf-8")) > MOST_TOKENS * run.longest_token_bytes:
        raise _too_long(counted(len(content), "character"))
    try:
        ids = np.array(run.tokenizer.encode(content), dtype=np.int64)
    except UsageError as error:
        raise Refused(f"text: {error}", "text") from None
    if not len(ids):
        raise Refused("text: is empty", "text")
    return _cut(ids, run)


def _cut(ids: np.ndarray, run: ServedRun) -> list[np.ndarray]:
    if len(ids) > MOST_TOKENS:
        raise _too_long(counted(len(ids), "token"))
    length = run.config.max_seq_len
    starts = range(0, len(ids), length)
    return [np.concatenate(([run.tokenizer.bos], ids[i : i + length])) for i in starts]


def _too_long(length: str) -> Refused:
    return Refused(
        f"text: has {length}, and at most {MOST_TOKENS} tokens are scored together; shorten it",
        "text",
    )


# ----- the scores


def scores(run: ServedRun, pieces: list[np.ndarray], stop: threading.Event) -> dict[str, Any]:
    """What the page shows of these pieces; {} if `stop` is set meanwhile.

    tokens: as /v1/completions spells them; offset: characters of `text` before each; nats: None
    where the model's are not numbers; top: [token, natural log-probability] of the most likely
    ones; starts: which tokens follow a BOS. loss in nats a token and bpb: as of an evaluation."""
    # a followed run's may be replaced meanwhile
    model, tokenizer = run.engine.model, run.tokenizer
    found = []
    for piece in pieces:
        for chunk in _scored(model, torch.from_numpy(piece)):
            found += chunk
            if stop.is_set():
                return {}
    ids = np.concatenate([piece[1:] for piece in pieces])
    tokens = scored_prompt(tokenizer, tuple(ids.tolist()), found)
    nats = [-logprob for logprob, _ in found]
    total, n_bytes = math.fsum(nats), int(tokenizer.byte_counts()[ids].sum())
    is_finite = math.isfinite(total)
    return {
        "model": run.name,
        "step": run.step,
        "text": tokenizer.decode(ids.tolist()),
        "tokens": [shown(tokenizer, token.id) for token in tokens],
        "offset": [token.offset for token in tokens],
        "nats": [each if math.isfinite(each) else None for each in nats],
        "top": [[(shown(tokenizer, i), finite(x)) for i, x in top] for _, top in found],
        "starts": np.cumsum([0, *(len(piece) - 1 for piece in pieces[:-1])]).tolist(),
        "bytes": n_bytes,
        "loss": total / len(nats) if is_finite else None,
        "bpb": total / (math.log(2) * n_bytes) if is_finite and n_bytes else None,
    }


@torch.no_grad()
def _scored(model: Any, piece: torch.Tensor) -> Iterator[list[tuple[float, list]]]:
    """Yield lists of (log-probability of a token, [(id, log-probability)] of the most likely ones),
    for the tokens of a piece after its BOS."""
    device = model.embedding.weight.device
    hidden_nxC = model.hidden(piece[None, :-1].to(device))[0]
    targets_n = piece[1:]
    n_rows = max(1, MOST_LOGITS // model.config.vocab_size)
    for start in range(0, len(targets_n), n_rows):
        logits_nxV = model.logits(hidden_nxC[start : start + n_rows]).cpu()
        logprobs_nxV = logits_nxV.double().log_softmax(-1)
        own = logprobs_nxV.gather(1, targets_n[start : start + n_rows, None])[:, 0].tolist()
        values, ids = logprobs_nxV.topk(min(ALTERNATIVES, logprobs_nxV.size(1)))
        tops = [
            list(zip(row_ids, row_values, strict=True))
            for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        yield list(zip(own, tops, strict=True))
