"""The estimate of how far a model has left its reference, against sums written out."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nanochat.data.examples import Shares
from nanochat.data.preferences import Pair, Pairs
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.preferences import (
    DRAWN_PAIRS,
    DRAWN_TOKENS,
    NO_TOKEN,
    Pass,
    as_pairs,
    divergence,
    draw_pairs,
    logprobs_of,
    token_logprobs_of,
)
from nanochat.eval.unison import EvaluationFailed
from nanochat.model.build import build
from nanochat.model.config import GPTConfig

V, END = 7, 6
# its BOS, the last id, is what ends a document
TOKENIZER = Tokenizer("char", [letter.encode() for letter in "abcdef"])
CONFIG = GPTConfig(
    depth=1,
    width=16,
    head_dim=16,
    n_head=1,
    n_kv_head=1,
    vocab_size=V,
    max_seq_len=16,
)
HOW = Pass(T=8, padding=0, device_rows=6, device=torch.device("cpu"))


def model_of(seed):
    """A model with noise on every weight: a fresh one draws all tokens alike."""
    model = build(CONFIG, "cpu", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def prompts(*lists):
    empty = np.zeros(0, np.uint32)
    made = [Pair(np.array(ids, dtype=np.uint32), empty, empty) for ids in lists]
    return Pairs(made, Shares.of([Fraction(1)], [len(made)]), np.uint32)


def distributions(model, ids):
    """The distribution of the token behind ids, fp64 (V,)."""
    with torch.no_grad():
        logits = model.logits(model.hidden(torch.tensor([ids])))
    return logits[0, -1].double().softmax(-1)


def test_the_estimate_written_out():
    """Two pairs of answers of up to three tokens, probabilities in halves and quarters."""
    reference = torch.tensor([[[0.5, 0.5, 0], [0.25, 1, 1]], [[0.5, 0, 0], [1, 0.5, 0.25]]])
    policy = torch.tensor([[[0.25, 0.5, 0], [0.5, 1, 1]], [[0.5, 0, 0], [1, 1, 0.125]]])
    # behind the end of an answer both are 0
    logs = [torch.where(p > 0, p.log(), 0.0) for p in (policy, reference)]
    halved, doubled = 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)
    pairs = [(halved + doubled) / 2, (0 + doubled + halved) / 2]
    found = divergence(*logs)
    assert found.kl == pytest.approx(sum(pairs) / 2, abs=1e-7) and found.n == 2
    assert found.stderr == pytest.approx(abs(pairs[0] - pairs[1]) / 2, abs=1e-7)
    assert divergence(logs[1], logs[1]).kl == 0
    with pytest.raises(EvaluationFailed, match="not finite"):
        divergence(logs[0] * math.nan, logs[1])


def test_drawn_answers_and_their_tokens():
    """They end with END, or with the row, and their log-probabilities are the model's."""
    model = model_of(0)
    asked = prompts([0, 1, 2], [0, 3, 4, 5, 1, 2, 3])
    drawn = draw_pairs(model, TOKENIZER, asked, HOW)
    assert drawn.shape == (DRAWN_PAIRS, 2, DRAWN_TOKENS) and drawn.dtype == torch.int32
    assert torch.equal(draw_pairs(model, TOKENIZER, asked, HOW), drawn)
    pairs = as_pairs(drawn, asked)
    tokens = token_logprobs_of(model, pairs, HOW)
    ended = 0
    for number in range(DRAWN_PAIRS):
        prompt = asked[number % 2].prompt.tolist()
        for place in range(2):
            ids = drawn[number, place][drawn[number, place] != NO_TOKEN].tolist()
            assert END not in ids[:-1] and 1 <= len(ids) <= HOW.T + 1 - len(prompt)
            assert ids[-1] == END or len(prompt) + len(ids) == HOW.T + 1
            ended += ids[-1] == END
            of_tokens = [
                distributions(model, prompt + ids[:i])[ids[i]].log().item() for i in range(len(ids))
            ]
            expected = of_tokens + [0.0] * (DRAWN_TOKENS - len(ids))
            assert tokens[number, place].tolist() == pytest.approx(expected, abs=1e-5)
    assert 0 < ended < 2 * DRAWN_PAIRS
    torch.testing.assert_close(logprobs_of(model, pairs, HOW), tokens.sum(2), rtol=0, atol=1e-5)


def test_the_mean_over_all_answers_is_the_divergence():
    """Answers of one or two tokens, each weighted by how often the reference draws it, give the sum
    over tokens of p log(p / q)."""
    reference, policy = model_of(1), model_of(2)
    prompt = [0, 1]
    p, q = distributions(reference, prompt), distributions(policy, prompt)
    exact = float((p * (p / q).log()).sum())
    expected = 0.0
    for first in range(V):
        p2 = distributions(reference, [*prompt, first])
        q2 = distributions(policy, [*prompt, first])
        inner = 0.0 if first == END else float((p2 * (p2 / q2).log()).sum())
        exact += float(p[first]) * inner
        for second in range(V):
            # an answer that has ended draws nothing more
            weight = float(p[first]) * (float(second == END) if first == END else float(p2[second]))
            stays = 0.0 if first == END else float((q2 / p2)[second].log())
            ratio = torch.tensor([[[float((q / p)[first].log()), stays]] * 2])
            expected += weight * divergence(ratio, torch.zeros(1, 2, 2)).kl
    assert exact > 0.05 and expected == pytest.approx(exact, abs=1e-6)
