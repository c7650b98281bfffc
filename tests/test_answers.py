"""Held-out answers: nats per target and bits per byte, against sums written out."""

import math

import numpy as np
import pytest
import torch

from nanochat.eval.answers import answer_loss
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.signals import Stopped

V = 40
CPU = torch.device("cpu")
# ids from 36 on are special; the others stand for 1 to 4 bytes
BYTES = np.array([1 + i % 4 if i < 36 else 0 for i in range(V)], dtype=np.int64)


class Some:
    """Conversations of random ids; the mask is one too."""

    def __init__(self, lengths, share=0.4):
        generator = np.random.default_rng(0)
        self.items = [
            (generator.integers(0, V, n).astype(np.uint32), generator.random(n) < share)
            for n in lengths
        ]
        self.lengths = np.array(lengths)

    def __getitem__(self, i):
        return self.items[i]


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(
        depth=2, width=32, head_dim=16, n_head=2, n_kv_head=2, vocab_size=V, max_seq_len=24
    )
    model = build(config, "cpu", seed=1)
    with torch.no_grad():
        # an untrained head would make all tokens alike
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


def by_hand(model, some):
    """The same in fp64, one conversation at a time, one token after the other."""
    nats, targets, nats_of_bytes, n_bytes = 0.0, 0, 0.0, 0
    for ids, mask in some.items:
        ids = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = model.eval()(ids[None, :-1])[0].double()
        for place in range(1, len(ids)):
            if mask[place]:
                loss = -torch.log_softmax(logits[place - 1], -1)[ids[place]].item()
                nats += loss
                targets += 1
                if BYTES[ids[place]]:
                    nats_of_bytes += loss
                    n_bytes += BYTES[ids[place]]
    return nats / targets, nats_of_bytes / math.log(2) / n_bytes, targets, n_bytes


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_against_sums_by_hand(model, batch_tokens):
    some = Some([2, 24, 7, 19, 3, 11])
    model.train()
    found = answer_loss(model, some, BYTES, batch_tokens, CPU)
    assert model.training
    loss, bpb, targets, n_bytes = by_hand(model, some)
    assert (found.targets, found.bytes) == (targets, n_bytes)
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.bpb == pytest.approx(bpb, abs=1e-5)


def test_nothing_to_answer_is_no_number(model):
    with pytest.raises(EvaluationFailed, match="0 targets"):
        answer_loss(model, Some([5, 6], share=0), BYTES, 100, CPU)


def test_it_can_be_left(model):
    with pytest.raises(Stopped):
        answer_loss(model, Some([5, 6]), BYTES, 100, CPU, lambda: True)
