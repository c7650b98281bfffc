"""A larger vocabulary: the old tokens keep their logits bit for bit, new ones begin as average."""

from dataclasses import replace

import pytest
import test_llama
import test_model
import torch

from nanochat.eval.generation import generate_ids
from nanochat.model.growing import grown

N_NEW = 4
CONFIGS = {
    "speedrun": test_model.SMALL,
    "llama": test_llama.SMALL,
    "tied": replace(test_llama.SMALL, tie_embeddings=True),
}
TABLES = {
    "speedrun": {"embedding.weight", "head.weight", "value_embeddings.*"},
    "llama": {"embedding.weight", "head.weight"},
    "tied": {"embedding.weight"},
}


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def pair_of(name, **options):
    model = test_llama.perturbed(CONFIGS[name], **options).eval()
    return model, grown(model, model.config.vocab_size + N_NEW)


def tokens_of(model, rows=3, length=12):
    return test_llama.tokens(rows, length, model.config.vocab_size)


def test_old_tokens_keep_their_logits(name):
    model, larger = pair_of(name)
    vocab_size = model.config.vocab_size
    assert larger.config == replace(model.config, vocab_size=vocab_size + N_NEW)
    ids = tokens_of(model)
    with torch.no_grad():
        before, after = model(ids), larger(ids)
    assert torch.equal(after[..., :vocab_size], before)
    assert after.shape[-1] == vocab_size + N_NEW


def test_only_tables_grow_by_the_mean_of_their_rows(name):
    model, larger = pair_of(name)
    before, after = model.state_dict(), larger.state_dict()
    assert list(before) == list(after)
    changed = set()
    for key, weight in before.items():
        rows = len(weight)
        assert torch.equal(after[key][:rows], weight)
        if len(after[key]) > rows:
            changed.add("value_embeddings.*" if key.startswith("value_embeddings.") else key)
            mean = weight.double().mean(dim=0).float()
            assert torch.equal(after[key][rows:], mean.expand(N_NEW, -1))
    assert changed == TABLES[name]


def test_new_tokens_are_no_likelier_than_the_others(name):
    """k new tokens take at most k / (V + k) of the probability. A softcap bends that a little."""
    model, larger = pair_of(name)
    vocab_size = model.config.vocab_size
    with torch.no_grad():
        likelihood = larger(tokens_of(model)).double().softmax(dim=-1)
    taken = likelihood[..., vocab_size:].sum(dim=-1)
    slack = 1.02 if model.softcap else 1 + 1e-6
    assert taken.max() <= slack * N_NEW / (vocab_size + N_NEW)


def test_new_tokens_can_be_read_and_learned(name):
    model, larger = pair_of(name)
    vocab_size = model.config.vocab_size
    ids = torch.tensor([[vocab_size, 3, vocab_size + N_NEW - 1]])
    larger.train()
    logits = larger(ids)
    assert logits.isfinite().all()
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor([1, vocab_size + 1, 2]))
    loss.backward()
    table = larger.embedding.weight.grad
    assert table[vocab_size].abs().sum() > 0
    greedy = list(generate_ids(larger.eval(), [vocab_size, 3], 3, temperature=0))
    assert len(greedy) == 3


def test_what_is_kept(name):
    model, _ = pair_of(name, compute_dtype=torch.bfloat16, attention_backend="sdpa")
    larger = grown(model.train(), model.config.vocab_size + 1)
    assert larger.training and larger.compute_dtype == torch.bfloat16
    assert larger.blocks[0].attention.backend == "sdpa"
    assert larger.embedding.weight.dtype == torch.float32
    assert grown(model, model.config.vocab_size) is model
    assert not grown(model.eval(), model.config.vocab_size + 1).training
    with pytest.raises(ValueError, match="cannot shrink"):
        grown(model, model.config.vocab_size - 1)
