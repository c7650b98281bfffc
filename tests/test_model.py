"""The speedrun model: initialisation, causality, wiring, counts, and its forward pass written
again."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from nanochat import hardware
from nanochat.model.build import build
from nanochat.model.config import GPTConfig, width_for
from nanochat.model.gpt import GPT
from nanochat.model.layers import rotate

# Depth 4 with grouped heads, short windows, and no size that is a multiple of another by accident.
SMALL = GPTConfig(
    depth=4,
    width=24,
    head_dim=6,
    n_head=4,
    n_kv_head=2,
    vocab_size=37,
    max_seq_len=16,
    window_pattern="SSL",
    short_window=3,
)


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


def meta(config):
    with torch.device("meta"):
        return GPT(config)


# ---- initialisation ----


def test_init_weights_fills_everything():
    model = meta(SMALL)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    model.init_weights(seed=0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build(SMALL, "cpu", seed=5).state_dict()
    torch.manual_seed(2)
    again, other = (build(SMALL, "cpu", seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_first_loss_is_that_of_a_uniform_guess():
    config = replace(SMALL, vocab_size=1001, width=96, head_dim=24)
    ids = tokens(8, 17, config.vocab_size)
    loss = build(config, "cpu")(ids[:, :-1], ids[:, 1:]).mean()
    assert abs(loss.item() - math.log(1001)) < 0.05


def test_rotary_tables_are_exact_at_the_far_end():
    """Position 20,479 of a 2,048-token model: an fp32 angle would be off by 1e-3 there."""
    model = build(replace(SMALL, max_seq_len=2048, head_dim=64), "cpu")
    assert model.rope_cos.shape == model.rope_sin.shape == (20480, 32)
    for j in (0, 1, 7, 31):
        angle = 20479 * 100_000 ** (-j / 32)
        assert abs(model.rope_cos[20479, j].item() - math.cos(angle)) < 1e-7
        assert abs(model.rope_sin[20479, j].item() - math.sin(angle)) < 1e-7


# ---- which position sees which ----


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("pattern", ["L", "S", "SSL"])
def test_causality_by_gradient(pattern, backend):
    """Distinct ids: only position s touches row ids[s] of the embedding table."""
    model = perturbed(replace(SMALL, window_pattern=pattern), attention_backend=backend)
    T = 13
    ids = torch.randperm(SMALL.vocab_size, generator=torch.Generator().manual_seed(0))[:T][None]
    direction = torch.randn(SMALL.vocab_size, generator=torch.Generator().manual_seed(1))
    for t in range(T):
        model.zero_grad()
        (model(ids)[0, t] @ direction).backward()
        for table in (model.embedding, *model.value_embeddings.values()):
            reached = table.weight.grad[ids[0]].abs().sum(dim=-1)
            assert (reached[t + 1 :] == 0).all()
            assert (
                reached[: t + 1] > 0
            ).all()  # the last layer has full context, whatever the pattern


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
def test_short_windows_limit_the_reach_exactly(backend):
    """After i + 1 layers of window w a position depends on itself and the (i + 1)(w - 1) before it;
    smear adds one."""
    w, T = SMALL.short_window, 13
    model = perturbed(replace(SMALL, depth=3, window_pattern="S"), attention_backend=backend)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: streams.append(output))
    ids = torch.randperm(SMALL.vocab_size, generator=torch.Generator().manual_seed(0))[:T][None]
    model(ids)
    direction = torch.randn(SMALL.width, generator=torch.Generator().manual_seed(1))
    for i in (0, 1):
        for t in range(T):
            (gradient,) = torch.autograd.grad(
                streams[i][0, t] @ direction, model.embedding.weight, retain_graph=True
            )
            reached = (gradient[ids[0]].abs().sum(dim=-1) > 0).tolist()
            assert reached == [t - (i + 1) * (w - 1) - 1 <= s <= t for s in range(T)], (i, t)


def test_rows_do_not_meet_and_odd_lengths_are_prefixes():
    model = perturbed(SMALL)
    ids = tokens(3, 15)
    whole = model(ids)
    assert whole.shape == (3, 15, SMALL.vocab_size) and whole.dtype == torch.float32
    for length in (1, 7, 14):
        torch.testing.assert_close(model(ids[:, :length]), whole[:, :length], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids[1:2]), whole[1:2], atol=1e-5, rtol=0)


def test_rows_may_be_ten_times_the_context_and_no_longer():
    model = perturbed(replace(SMALL, max_seq_len=4))
    assert model(tokens(1, 40)).isfinite().all()
    with pytest.raises(ValueError, match="41 positions.*at most 40"):
        model(tokens(1, 41))


@pytest.mark.parametrize(
    "depth, pattern, expected",
    [
        (5, "SSSL", "SSSLL"),
        (4, "SSSL", "SSSL"),
        (3, "S", "SSL"),
        (1, "S", "L"),
        (6, "LS", "LSLSLL"),
        (2, "SSSL", "SL"),
    ],
)
def test_window_pattern_is_tiled_and_ends_in_full_context(depth, pattern, expected):
    config = replace(SMALL, depth=depth, window_pattern=pattern)
    assert config.windows() == [{"S": 3, "L": 160}[letter] for letter in expected]
    assert [block.attention.window for block in meta(config).blocks] == config.windows()


# ---- counts ----


def test_counts_and_flops_against_a_worked_example():
    """Depth 2: layer 0 sees 64 keys, layer 1 all 256 and has the one value embedding.

    A layer: query 128 x 128 = 16,384, key and value 64 x 128 = 8,192 each, out 16,384, up and down
    512 x 128 = 65,536 each: 180,224; two layers: 360,448.
    Embedding and head 512 x 128 = 65,536 each; value embedding 512 x 64 = 32,768.
    Scalars: 2 residual and 2 x0 lambdas, smear gate 16, smear and backout lambda, value gate
    2 x 16: 54.
    FLOPs: 6 x (360,448 + 65,536 + 16 + 32) = 2,556,192, and for attention 12 x 4 x 32 x (64 + 256)
    = 491,520."""
    config = GPTConfig(
        depth=2,
        width=128,
        head_dim=32,
        n_head=4,
        n_kv_head=2,
        vocab_size=512,
        max_seq_len=256,
        window_pattern="SL",
        short_window=64,
    )
    model = meta(config)
    assert model.count_parameters() == {
        "matrices": 360_448,
        "embedding": 65_536,
        "value_embeddings": 32_768,
        "unembedding": 65_536,
        "scalars": 54,
        "total": 524_342,
    }
    assert model.scaling_parameters() == 425_984
    assert model.flops_per_token() == 3_047_712


def test_a_window_longer_than_the_context_costs_the_context():
    config = replace(SMALL, window_pattern="S", short_window=SMALL.max_seq_len + 1)
    assert (
        meta(config).flops_per_token() == meta(replace(SMALL, window_pattern="L")).flops_per_token()
    )


def test_width_is_rounded_up_to_whole_heads():
    assert width_for(20, 64, 128) == 1280  # 20 x 64 = 1,280 = 10 heads
    assert width_for(4, 64, 128) == 256
    assert width_for(3, 64, 128) == 256  # 192 -> 2 heads
    assert width_for(1, 50, 16) == 64  # 50 -> 4 heads
    assert width_for(7, 10, 10) == 70


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, depth=1),
        replace(SMALL, n_kv_head=4, depth=3),
        replace(SMALL, width=6, n_head=1, n_kv_head=1),
    ],
)
def test_groups_hold_every_parameter_once(config):
    model = meta(config)
    groups = model.parameter_groups()
    placed = [id(parameter) for members in groups.values() for parameter in members.values()]
    assert sorted(placed) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.ndim == 2 for parameter in groups["matrices"].values())
    assert {name.rsplit(".", 2)[1] for name in groups["matrices"]} == {
        "query",
        "key",
        "value",
        "out",
        "up",
        "down",
    }
    assert list(groups["embedding"]) == ["embedding.weight"] and list(groups["unembedding"]) == [
        "head.weight"
    ]
    # counted back from the last, alternate layers have a value embedding and its gate
    layers = [str(i) for i in range(config.depth) if (config.depth - 1 - i) % 2 == 0]
    assert sorted(groups["value_embeddings"]) == [f"value_embeddings.{i}.weight" for i in layers]
    assert {name for name in groups["scalars"] if "value_gate" in name} == {
        f"blocks.{i}.attention.value_gate.weight" for i in layers
    }


def test_config_survives_a_dictionary():
    assert GPTConfig(**asdict(SMALL)) == SMALL


# ---- the whole forward pass, written again ----


def golden_keys(weight, y, before, config):
    """Keys of each head, channel by channel: those of rotary pairs j >= D / 4 come from the
    position before."""
    D = config.head_dim
    sources = [
        before if config.key_shift and channel % (D // 2) >= D / 4 else y for channel in range(D)
    ]
    return [
        torch.stack([weight[head * D + channel] @ source for channel, source in enumerate(sources)])
        for head in range(config.n_kv_head)
    ]


def golden_logits(weights, config, ids):
    """fp64 logits of one row of ids, one position, head and key at a time, from the description of
    the parts."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    D, group, channels = config.head_dim, config.n_head // config.n_kv_head, min(16, config.width)

    def rms(x):
        return x / (x.pow(2).mean() + 1e-6).sqrt()

    def sigmoid(x):
        return 1 / (1 + (-x).exp())

    def turn(x, position):
        """Rotate the pairs (x_j, x_{j + D/2}) by position / 100000^(2j/D) as complex numbers."""
        angles = torch.tensor(
            [position * 100_000.0 ** (-2 * j / D) for j in range(D // 2)], dtype=torch.float64
        )
        z = torch.complex(x[: D // 2], x[D // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag))

    embedded = [rms(w["embedding.weight"][i]) for i in ids]
    x0 = []
    for t, e in enumerate(embedded):
        gate = sigmoid(w["smear_gate.weight"][0] @ e[:channels])
        x0.append(e + w["smear_lambda"] * gate * embedded[t - 1] if t else e)
    xs = x0
    for i in range(config.depth):

        def weight(name, layer=i):
            return w[f"blocks.{layer}.{name}.weight"]

        xs = [w["residual_lambdas"][i] * x + w["x0_lambdas"][i] * e for x, e in zip(xs, x0)]
        queries, keys, values = [], [], []  # [position][head]
        for t, x in enumerate(xs):
            y = rms(x)
            queries.append([rms(turn(q, t)) for q in (weight("attention.query") @ y).split(D)])
            keys.append(
                [
                    rms(turn(k, t))
                    for k in golden_keys(
                        weight("attention.key"), y, rms(xs[t - 1]) if t else 0 * y, config
                    )
                ]
            )
            v = (weight("attention.value") @ y).split(D)
            if (config.depth - 1 - i) % 2 == 0:
                extra = w[f"value_embeddings.{i}.weight"][ids[t]].split(D)
                gates = 2 * sigmoid(weight("attention.value_gate") @ y[:channels])
                v = [a + gate * b for a, gate, b in zip(v, gates, extra)]
            values.append(v)
        letter = (
            "L" if i == config.depth - 1 else config.window_pattern[i % len(config.window_pattern)]
        )
        after = []
        for t, x in enumerate(xs):
            first = max(0, t - config.short_window + 1) if letter == "S" else 0
            heads = []
            for h in range(config.n_head):
                scores = (
                    torch.stack([queries[t][h] @ keys[s][h // group] for s in range(first, t + 1)])
                    / D**0.5
                )
                shares = scores.exp() / scores.exp().sum()
                heads.append(
                    sum(share * values[first + n][h // group] for n, share in enumerate(shares))
                )
            x = x + weight("attention.out") @ torch.cat(heads)
            after.append(x + weight("mlp.down") @ (weight("mlp.up") @ rms(x)).clamp_min(0) ** 2)
        xs = after
        if i == max(0, config.depth // 2 - 1):
            middle = xs
    final = [rms(x - w["backout_lambda"] * m) for x, m in zip(xs, middle)]
    return torch.stack([15 * torch.tanh(w["head.weight"] @ x / 15) for x in final])


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, depth=3, n_kv_head=4, window_pattern="SL"),
        replace(SMALL, depth=3, n_kv_head=1, key_shift=True),
        replace(
            SMALL, depth=2, n_kv_head=2, head_dim=6, key_shift=True
        ),  # three rotary pairs: two turn fast
        replace(
            SMALL, depth=1, width=10, n_kv_head=1, head_dim=4
        ),  # gates read all 10 channels; width != heads x head dim
    ],
)
def test_forward_equals_the_golden_one(config, backend):
    model = perturbed(config, attention_backend=backend)
    ids = tokens(2, 11)
    expected = torch.stack([golden_logits(model.state_dict(), config, row.tolist()) for row in ids])
    assert expected.std() > 0.3 and expected.abs().max() > 1  # noise reached the logits
    torch.testing.assert_close(model(ids).double(), expected, atol=1e-5, rtol=0)


def test_every_parameter_is_wired_in():
    """Each has a gradient and moves the logits; of the lambdas every element does."""
    model = perturbed(SMALL)
    generator = torch.Generator().manual_seed(2)
    ids = tokens(2, 12)
    with torch.no_grad():
        before = model(ids)
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    assert {
        "smear_lambda",
        "smear_gate.weight",
        "backout_lambda",
        "x0_lambdas",
        "residual_lambdas",
        "value_embeddings.1.weight",
        "value_embeddings.3.weight",
    } <= dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        entries = range(parameter.numel()) if parameter.numel() <= SMALL.depth else [slice(None)]
        for entry in entries:
            assert parameter.grad.view(-1)[entry].abs().max() > 1e-5, (name, entry)
            with torch.no_grad():
                kept = parameter.clone()
                # noise, not a factor: norms after the weight would hide a change of its scale
                parameter.view(-1)[entry] += 0.3 * torch.randn(
                    parameter.view(-1)[entry].shape, generator=generator
                )
                assert (model(ids) - before).abs().max() > 1e-4, (name, entry)
                parameter.copy_(kept)
    with torch.no_grad():
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("name", ["smear_lambda", "backout_lambda", "x0_lambdas"])
def test_a_lambda_of_zero_switches_its_part_off(name):
    """With the lambda at zero the part's other input gets no gradient; a non-zero lambda restores
    it."""
    model = perturbed(SMALL)
    ids = tokens(2, 9)
    lambdas = getattr(model, name)
    with torch.no_grad():
        lambdas.zero_()
        without = model(ids)
        lambdas.fill_(0.3)
        assert (model(ids) - without).abs().max() > 1e-3
        lambdas.zero_()
    model(ids[:, :-1], ids[:, 1:]).mean().backward()
    assert lambdas.grad.abs().min() > 1e-5  # so that training can switch it on
    assert (model.smear_gate.weight.grad.abs().max() == 0) == (name == "smear_lambda")


def test_softcap_bounds_the_logits():
    model = perturbed(SMALL)
    hidden = torch.randn(5, SMALL.width, generator=torch.Generator().manual_seed(0))
    huge = model.logits(1e4 * hidden)
    assert huge.abs().max() <= 15 and huge.abs().min() > 14
    raw = hidden @ model.head.weight.T
    torch.testing.assert_close(model.logits(1e-3 * hidden), 1e-3 * raw, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(model.logits(hidden), 15 * torch.tanh(raw / 15))


def test_token_nats_skip_targets_of_minus_one():
    model = perturbed(SMALL)
    ids = tokens(2, 8)
    targets = tokens(2, 8, seed=1)
    targets[0, 3] = targets[1, :5] = -1
    nats = model(ids, targets)
    expected = -model(ids).log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    assert nats.shape == (2, 8) and nats.dtype == torch.float32
    assert (nats[targets == -1] == 0).all()
    torch.testing.assert_close(nats[targets >= 0], expected[targets >= 0])
    model.zero_grad()
    nats[targets == -1].sum().backward()
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


# ---- modes and dtypes ----


def test_dropout_acts_in_training_only():
    plain = perturbed(SMALL)
    model = perturbed(replace(SMALL, dropout=0.3))
    ids = tokens(2, 9)
    torch.manual_seed(0)
    model.train()
    first, second = model(ids), model(ids)
    assert (first - second).abs().max() > 1e-3
    model.eval()
    assert torch.equal(model(ids), plain.eval()(ids))
    plain.train()
    assert torch.equal(model(ids), plain(ids))


def test_dropout_thins_both_branches_of_a_block():
    """Outputs of attention and the MLP are dropped or scaled by 1 / (1 - 0.25); nothing else
    changes."""
    model = perturbed(replace(SMALL, dropout=0.25))
    block, x = (
        model.blocks[0],
        torch.randn(4, 16, SMALL.width, generator=torch.Generator().manual_seed(0)),
    )
    rope = model.rope_cos[:16], model.rope_sin[:16]
    torch.manual_seed(0)
    for branch, arguments in ((block.attention, (x, None, rope, None)), (block.mlp, (x,))):
        whole = branch.eval()(*arguments)
        thinned = branch.train()(*arguments)
        kept = thinned != 0
        assert 0.70 < kept.float().mean() < 0.80  # 1,536 elements: 4.5 standard deviations
        torch.testing.assert_close(thinned[kept], whole[kept] / 0.75)


def test_bf16_products_keep_fp32_weights_and_gradients():
    exact = perturbed(SMALL, std=0.1)
    model = perturbed(SMALL, std=0.1, compute_dtype=torch.bfloat16)
    ids = tokens(4, 13)
    assert model.hidden(ids).dtype == torch.bfloat16 and model(ids).dtype == torch.float32
    for m in (exact, model):
        m(ids[:, :-1], ids[:, 1:]).mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), exact.parameters()):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm()
        assert 0 < error < 0.08, (name, error)  # a single rounding is up to 0.4%
    assert F.cosine_similarity(model(ids).flatten(), exact(ids).flatten(), dim=0) > 0.999


@pytest.mark.parametrize(
    "config",
    [replace(SMALL, dropout=0.2), replace(SMALL, arch="llama", window_pattern="L")],
    ids=["speedrun", "llama"],
)
def test_activation_checkpointing_changes_memory_only(config):
    """The same loss and gradients, bit for bit, dropout included; less is stored between the
    passes."""
    device, results = torch.device("cpu"), []
    ids = torch.randint(config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        model = perturbed(config).train()
        model.checkpointing = checkpointing

        losses = []

        def both(model=model, losses=losses):
            torch.manual_seed(3)
            losses.append(model(ids[:, :-1], ids[:, 1:], reduction="mean"))
            losses[0].backward()

        peak = hardware.allocated_peak(both, device)
        results.append((peak, losses[0].item(), [p.grad for p in model.parameters()]))
    (plain_peak, plain_loss, plain_grads), (peak, loss, grads) = results
    assert loss == plain_loss and all(
        torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True)
    )
    assert peak < 0.8 * plain_peak


def test_rotation_without_gradients_is_the_same():
    """In place, so rounded otherwise in the last bit at most."""
    generator = torch.Generator().manual_seed(0)
    x, angle = (
        torch.randn(2, 37, 3, 16, generator=generator),
        100 * torch.rand(37, 8, generator=generator),
    )
    kept = x.clone()
    with torch.no_grad():
        found = rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, rotate(x, angle.cos(), angle.sin()), rtol=0, atol=1e-6)
    assert torch.equal(x, kept)
