"""Bits per byte: a worked example, batches, special tokens, and how an evaluation ends on ranks."""

import json
import math

import numpy as np
import pytest
import small
import torch

from nanochat.eval.bpb import BitsPerByte, batches_by_length, bits_per_byte, pad
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.signals import Stopped

CPU = torch.device("cpu")
BOS = 7
# UTF-8 bytes of each token id; ids 4 and 7 are special tokens
BYTES = np.array([1, 2, 3, 1, 0, 1, 1, 0])
# what each token costs, in bits
BITS = [1.0, 2.0, 3.0, 0.5, 100.0, 4.0, 0.25, 100.0]
PIECES = [np.array([BOS, 0, 1, 2]), np.array([BOS, 2]), np.array([BOS, 4, 5])]


class Table(torch.nn.Module):
    """A model whose loss depends on the target alone: BITS, in nats."""

    def __init__(self, bits=BITS):
        super().__init__()
        self.nats = math.log(2) * torch.tensor(bits)
        self.rows = []

    def forward(self, ids_BxT, targets_BxT):
        self.rows.append(len(ids_BxT))
        return torch.where(targets_BxT >= 0, self.nats[targets_BxT.clamp_min(0)], 0.0)


def evaluate(model, pieces=PIECES, batch_tokens=4, **options):
    return bits_per_byte(model, pieces, BYTES, batch_tokens, CPU, **options)


@pytest.mark.parametrize("batch_tokens", [1, 4, 100])
def test_worked_example(batch_tokens):
    """The special token 4 counts as neither bits, bytes nor token.

    piece      tokens     bits        bytes
    0 1 2      3          1 + 2 + 3   1 + 2 + 3
    2          1          3           3
    4 5        1          4           1"""
    result = evaluate(Table(), batch_tokens=batch_tokens)
    assert (result.tokens, result.bytes) == (5, 10)
    assert result.bpb == pytest.approx(13 / 10)
    assert result.loss == pytest.approx(math.log(2) * 13 / 5)


def test_uniform_model():
    """A model that gives all 8 tokens the same probability needs 3 bits for each."""
    result = evaluate(Table([3.0] * 8))
    assert result == BitsPerByte(
        bpb=pytest.approx(5 * 3 / 10), loss=pytest.approx(math.log(8)), tokens=5, bytes=10
    )


def test_special_tokens_count_nothing():
    plain = [np.array([BOS, 0, 1, 2])]
    special = [np.array([BOS, 4, 0, 4, 1, 7, 2, 7])]
    assert evaluate(Table(), special) == evaluate(Table(), plain)


def test_the_result_does_not_depend_on_batches():
    """Pieces of many lengths, alone, in a few batches and all at once."""
    config = GPTConfig(
        depth=2, width=16, head_dim=8, n_head=2, n_kv_head=2, vocab_size=8, max_seq_len=32
    )
    model = build(config, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    rng = np.random.default_rng(1)
    pieces = [np.concatenate(([BOS], rng.integers(7, size=n))) for n in (1, 2, 5, 5, 17, 32, 32)]
    alone, few, together = (evaluate(model, pieces, n) for n in (1, 64, 10**6))
    assert alone.tokens == few.tokens == together.tokens == sum(sum(p != 4) - 1 for p in pieces)
    assert [few.bpb, together.bpb] == pytest.approx([alone.bpb] * 2, rel=1e-5)
    assert [few.loss, together.loss] == pytest.approx([alone.loss] * 2, rel=1e-5)


def test_batches_hold_pieces_of_similar_length():
    """The longest first; a padded batch fits in batch_tokens, unless it is a single piece."""
    pieces = [np.zeros(n) for n in (2, 9, 3, 5, 5, 2)]
    batches = list(batches_by_length(pieces, 8))
    assert [[len(piece) for piece in batch] for batch in batches] == [[9], [5, 5], [3, 2, 2]]
    assert list(batches_by_length([], 8)) == []


def test_pad():
    ids, targets = pad([np.array([7, 0, 1, 2]), np.array([7, 2])])
    assert ids.tolist() == [[7, 0, 1], [7, 0, 0]]
    assert targets.tolist() == [[0, 1, 2], [2, -1, -1]]
    assert ids.dtype == targets.dtype == torch.int64


def test_the_mode_of_the_model_is_restored():
    model = Table().train()
    evaluate(model)
    assert model.training
    with pytest.raises(Stopped):
        evaluate(model, interrupted=lambda: True)
    assert model.training
    model.eval()
    evaluate(model)
    assert not model.training


# ---- evaluations that are not completed ----


@pytest.mark.parametrize(
    "model, pieces, reason",
    [
        (Table([math.nan] * 8), PIECES, "nan nats over 10 bytes"),
        (Table([math.inf] * 8), PIECES, "inf nats over 10 bytes"),
        (Table(), [np.array([BOS, 4, 4])], "0.0 nats over 0 bytes"),
        (Table(), [], "0.0 nats over 0 bytes"),
        (Table(), [np.array([BOS, 9])], "IndexError: "),
    ],
)
def test_no_number(model, pieces, reason):
    with pytest.raises(EvaluationFailed, match=reason):
        evaluate(model, pieces)


def test_a_stop_is_noticed_before_the_next_batch():
    model = Table()
    asked = iter([False, True])
    with pytest.raises(Stopped):
        evaluate(model, interrupted=lambda: next(asked))
    assert model.rows == [1]


# Each case on two ranks: rank 1 fails, is asked to stop, or neither; writes what each rank gets.
RANKS = """
import dataclasses, json, sys
import test_bpb
from nanochat import ranks
from nanochat.eval.unison import EvaluationFailed
from nanochat.signals import Stopped

class Failing(test_bpb.Table):
    def forward(self, ids, targets):
        raise RuntimeError("no memory for this")

ranks.setup("cpu")
second = ranks.rank() == 1
found = []
for model, stop in (
    (test_bpb.Table(), False),
    (Failing() if second else test_bpb.Table(), False),
    (test_bpb.Table(), second),
    (Failing() if not second else test_bpb.Table(), second),
):
    try:
        result = test_bpb.evaluate(model, interrupted=lambda: stop)
        found.append(dataclasses.asdict(result))
    except EvaluationFailed as error:
        found.append(str(error))
    except Stopped:
        found.append("stopped")
open(sys.argv[1] + str(ranks.rank()), "w").write(json.dumps(found))
ranks.close()
"""


def test_two_ranks(tmp_path):
    """They share the pieces, and end alike: with a result, failed, stopped; a stop comes first."""
    done = small.ranks_of(tmp_path, 2, [str(tmp_path / "rank")], RANKS)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{i}").read_text()) for i in range(2))
    alone = evaluate(Table())
    assert first[0] == second[0]
    assert BitsPerByte(**first[0]) == BitsPerByte(
        pytest.approx(alone.bpb), pytest.approx(alone.loss), alone.tokens, alone.bytes
    )
    assert (first[1], second[1]) == ("another rank failed", "RuntimeError: no memory for this")
    assert first[2:] == second[2:] == ["stopped", "stopped"]
