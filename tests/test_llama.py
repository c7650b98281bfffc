"""--arch=llama: the same numbers as transformers' Llama, then initialisation, counts, groups, cache
and training."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from nanochat.eval.generation import generate_ids
from nanochat.model.build import build, meta_model
from nanochat.model.config import GPTConfig
from nanochat.model.llama import Llama, swiglu_width
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.optimizer import Optimizer

# Grouped heads, and no size that is a multiple of another by accident.
SMALL = GPTConfig(
    depth=3,
    width=24,
    head_dim=6,
    n_head=4,
    n_kv_head=2,
    vocab_size=37,
    max_seq_len=16,
    window_pattern="L",
    arch="llama",
)
VARIANTS = [
    pytest.param(replace(SMALL, n_kv_head=4), id="mha"),
    pytest.param(SMALL, id="gqa"),
    pytest.param(replace(SMALL, tie_embeddings=True), id="tied"),
]


def perturbed(config, seed=1, std=0.2, **options):
    """A model with noise on every weight: some weights start at zero, so a fresh one would pass
    tests that it should fail."""
    model = build(config, "cpu", seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(rows, length, vocab_size=SMALL.vocab_size, seed=0):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def transformers_llama(model):
    """transformers' LlamaForCausalLM with our weights, renamed here, not by
    nanochat.apps.export."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            intermediate_size=swiglu_width(c.width),
            num_hidden_layers=c.depth,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            head_dim=c.head_dim,
            rms_norm_eps=1e-5,
            max_position_embeddings=c.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=c.tie_embeddings,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    names = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    ours = model.state_dict()
    state = {
        "model.embed_tokens.weight": ours.pop("embedding.weight"),
        "model.norm.weight": ours.pop("final_norm.weight"),
    }
    state["lm_head.weight"] = (
        state["model.embed_tokens.weight"] if c.tie_embeddings else ours.pop("head.weight")
    )
    for i in range(c.depth):
        state |= {
            f"model.layers.{i}.{theirs_}.weight": ours.pop(f"blocks.{i}.{ours_}.weight")
            for ours_, theirs_ in names.items()
        }
    assert not ours
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("config", VARIANTS)
def test_logits_equal_those_of_transformers(config, backend):
    model = perturbed(
        config, std=0.1, attention_backend=backend
    ).eval()  # more noise makes rounding itself larger than 1e-5
    ids = tokens(2, 160)  # ten times the context, as far as the rotary tables reach
    with torch.no_grad():
        logits, expected = model(ids), transformers_llama(model)(ids).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_transformers():
    model = perturbed(SMALL)
    theirs = transformers_llama(model)
    ids = tokens(2, 17)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    theirs(ids, labels=ids).loss.backward()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    for ours, expected in (
        (model.embedding, theirs.model.embed_tokens),
        (model.final_norm, theirs.model.norm),
        (model.head, theirs.lm_head),
        (model.blocks[0].attention.key, theirs.model.layers[0].self_attn.k_proj),
        (model.blocks[2].mlp.gate, theirs.model.layers[2].mlp.gate_proj),
    ):
        torch.testing.assert_close(ours.weight.grad, expected.weight.grad, atol=1e-6, rtol=1e-4)


# ---- initialisation ----


@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_fills_everything_from_the_seed_alone(tied):
    config = replace(SMALL, tie_embeddings=tied)
    model = meta_model(config)
    assert isinstance(model, Llama)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights(seed=5)
    first, again, other = (
        model.state_dict(),
        build(config, "cpu", seed=5).state_dict(),
        build(config, "cpu", seed=6).state_dict(),
    )
    for name, tensor in (*first.items(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width, vocab_size", [(32, 257), (128, 1001), (768, 4001)])
def test_first_loss_is_that_of_a_uniform_guess(width, vocab_size, tied):
    config = replace(
        SMALL,
        depth=2,
        width=width,
        head_dim=16,
        n_head=width // 16,
        vocab_size=vocab_size,
        tie_embeddings=tied,
    )
    ids = tokens(4, 17, vocab_size)
    loss = build(config, "cpu")(ids[:, :-1], ids[:, 1:]).mean()
    assert abs(loss.item() - math.log(vocab_size)) < 0.05


@pytest.mark.parametrize(
    "wrong",
    [{"window_pattern": "SL"}, {"arch": "mamba"}, {"arch": "speedrun", "tie_embeddings": True}],
)
def test_configs_that_no_model_has_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(SMALL, **wrong)


def test_config_survives_a_dictionary():
    config = replace(SMALL, tie_embeddings=True)
    assert GPTConfig(**asdict(config)) == config


# ---- counts and groups ----


def test_counts_and_flops_against_a_worked_example():
    """Depth 2, width 128: hidden size 8 x 128 / 3 = 341.3, rounded up to 384.

    A layer: query and out 128 x 128 = 16,384 each, key and value 64 x 128 = 8,192 each, gate, up
    and down 384 x 128 = 49,152 each: 196,608; two layers: 393,216.
    Embedding and head 512 x 128 = 65,536 each. Norms: 5 x 128 = 640.
    FLOPs: 6 x (393,216 + 65,536) = 2,752,512, and 12 x 4 x 32 x 2 x 256 = 786,432 for attention."""
    config = GPTConfig(
        depth=2,
        width=128,
        head_dim=32,
        n_head=4,
        n_kv_head=2,
        vocab_size=512,
        max_seq_len=256,
        window_pattern="L",
        arch="llama",
    )
    counts = {
        "matrices": 393_216,
        "embedding": 65_536,
        "value_embeddings": 0,
        "unembedding": 65_536,
        "scalars": 640,
    }
    model = meta_model(config)
    assert model.count_parameters() == counts | {"total": 524_928}
    assert model.scaling_parameters() == 458_752
    assert model.flops_per_token() == 3_538_944
    tied = meta_model(replace(config, tie_embeddings=True))  # one table less, the same products
    assert tied.count_parameters() == counts | {"unembedding": 0, "total": 459_392}
    assert tied.scaling_parameters() == 458_752
    assert tied.flops_per_token() == 3_538_944
    assert "head.weight" not in tied.state_dict()


@pytest.mark.parametrize("config", VARIANTS)
def test_groups_hold_every_parameter_once(config):
    model = meta_model(config)
    groups = model.parameter_groups()
    placed = [id(parameter) for members in groups.values() for parameter in members.values()]
    assert sorted(placed) == sorted(id(parameter) for parameter in model.parameters())
    assert {name.rsplit(".", 2)[1] for name in groups["matrices"]} == {
        "query",
        "key",
        "value",
        "out",
        "gate",
        "up",
        "down",
    }
    assert list(groups["embedding"]) == ["embedding.weight"] and not groups["value_embeddings"]
    assert list(groups["unembedding"]) == ([] if config.tie_embeddings else ["head.weight"])
    assert len(groups["scalars"]) == 2 * config.depth + 1


# ---- behaviour ----


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_causality_by_gradient(backend):
    """Distinct ids: only position s touches row ids[s] of the embedding table."""
    model = perturbed(SMALL, attention_backend=backend)
    T = 13
    ids = torch.randperm(SMALL.vocab_size, generator=torch.Generator().manual_seed(0))[:T][None]
    direction = torch.randn(SMALL.vocab_size, generator=torch.Generator().manual_seed(1))
    for t in range(T):
        model.zero_grad()
        (model(ids)[0, t] @ direction).backward()
        reached = model.embedding.weight.grad[ids[0]].abs().sum(dim=-1)
        assert (reached[t + 1 :] == 0).all() and (reached[: t + 1] > 0).all()


@pytest.mark.parametrize("config", VARIANTS)
def test_every_parameter_gets_a_gradient(config):
    model = perturbed(config)
    ids = tokens(2, 12)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-5, name


@pytest.mark.parametrize("config", VARIANTS)
def test_cached_generation_equals_uncached(config):
    model = perturbed(config).eval()
    for sampling in ({"temperature": 0}, {"temperature": 1.3, "top_k": 20, "num_samples": 3}):
        cached, plain = (
            list(generate_ids(model, [36, 1, 2, 3], 30, seed=7, use_cache=use_cache, **sampling))
            for use_cache in (True, False)
        )
        assert cached == plain


def test_dropout_acts_in_training_only():
    model, plain = perturbed(replace(SMALL, dropout=0.3)), perturbed(SMALL)
    ids = tokens(2, 9)
    torch.manual_seed(0)
    model.train()
    assert (model(ids) - model(ids)).abs().max() > 1e-3
    assert torch.equal(model.eval()(ids), plain.eval()(ids))


def test_bf16_products_keep_fp32_weights_and_gradients():
    exact, model = (
        perturbed(SMALL, std=0.1),
        perturbed(SMALL, std=0.1, compute_dtype=torch.bfloat16),
    )
    ids = tokens(4, 13)
    assert model.hidden(ids).dtype == torch.bfloat16 and model(ids).dtype == torch.float32
    for m in (exact, model):
        m(ids[:, :-1], ids[:, 1:]).mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters()):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert 0 < error < 0.08, (name, error)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_learns(tied, optimizer):
    """Rows that count upwards: 60 updates take the loss from ln(V) to well under half of it."""
    model = build(replace(SMALL, tie_embeddings=tied), "cpu", seed=3)
    groups = model.parameter_groups()

    def adamw(lr):
        return {"lr": lr, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}

    settings = {name: adamw(0.01) for name in groups}
    settings["matrices"] = (
        {"lr": 0.02, "beta2": 0.95, "weight_decay": 0.1} if optimizer == "muon" else adamw(0.01)
    )
    updates = Optimizer(groups, settings, torch.float32)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        first = torch.randint(SMALL.vocab_size, (8, 1), generator=generator)
        rows = (first + torch.arange(17)) % SMALL.vocab_size
        updates.zero_grad()
        loss = model(rows[:, :-1], rows[:, 1:]).mean()
        loss.backward()
        updates.reduce(loss.detach(), LossScaler(enabled=False))
        updates.step(1.0, 0.9)
        losses.append(loss.item())
    assert abs(losses[0] - math.log(SMALL.vocab_size)) < 0.1
    assert losses[-1] < 0.5 * losses[0]
    assert set(updates.state()) == {name for name, _ in model.named_parameters()}
