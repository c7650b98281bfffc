"""The optimizer in one process: each update rule against a plain version of it, and its state.
Ranks: test_ranks.py."""

import math

import pytest
import torch

from nanochat.common import round_up
from nanochat.model.kernels import cpu_muon
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.muon import descend, look_ahead, muon_update, neuron_scale, orthogonalize
from nanochat.optim.optimizer import Optimizer, cuts_by_depth

ADAMW = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-10, "weight_decay": 0.01}
MUON = {"lr": 0.03, "beta2": 0.9, "weight_decay": 0.0}
SHAPES = {"tall": (80, 24), "wide": (24, 80), "square": (33, 33)}


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def cpp(request):
    """Whether Muon computes in C++ between its products."""
    if request.param and (problem := cpu_muon.problem()):
        pytest.skip(problem)
    return request.param


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape, seed=0):
    return torch.nn.Parameter(randn(*shape, seed=seed))


def give_gradients(parameters, seed, scale=1.0):
    for i, p in enumerate(parameters):
        p.grad = scale * randn(*p.shape, seed=1000 * seed + i)


def reduce(optimizer):
    """Reduce the gradients that were given; returns their norm."""
    return optimizer.reduce(torch.zeros(()), LossScaler(enabled=False))[1]


def with_spectrum(shape, smallest, seed=0):
    """(three fp64 matrices of Frobenius norm 1, their U V^T): singular values fall geometrically to
    `smallest`."""
    U, _, Vt = torch.linalg.svd(randn(3, *shape, seed=seed).double(), full_matrices=False)
    steps = torch.linspace(0, 1, min(shape), dtype=torch.float64)
    values = smallest**steps
    return U * (values / values.norm()) @ Vt, U @ Vt


# ---- orthogonalisation ----


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_values_land_near_one_and_keep_their_directions(shape, dtype, slack, cpp):
    """Five steps of Polar Express put every singular value above 1.02e-3 of the Frobenius norm in
    [0.8589, 1.1411]: the extremes of its scalar polynomial, as the next test computes them. The
    scale of the gradient does not matter."""
    matrices, polar = with_spectrum(shape, smallest=0.01)
    assert torch.linalg.svdvals(matrices).min() > 1.02e-3
    for scale in (1e-3, 1.0, 1e3):
        result = orthogonalize((scale * matrices).float(), dtype, cpp)
        assert result.dtype == dtype and result.shape == matrices.shape
        result = result.double()
        values = torch.linalg.svdvals(result)
        assert 0.8589 - slack < values.min() and values.max() < 1.1411 + slack
        cosine = (result * polar).sum((-2, -1)) / (
            result.norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1))
        )
        assert cosine.min() > 0.994


def polar_express(values):
    """What orthogonalisation does to singular values, in fp64: five odd quintics after a division
    by 1.02 norms."""
    values = values / (1.02 * values.square().sum(-1, keepdim=True).sqrt() + 1e-6)
    for a, b, c in [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ]:
        values = a * values + b * values**3 + c * values**5
    return values


def test_polynomial_band():
    grid = torch.cat(
        (torch.logspace(-5, 0, 20001, dtype=torch.float64)[:, None], torch.zeros(20001, 1)), dim=1
    )
    # a second value makes the norm of each pair 1
    grid[:, 1] = (1 - grid[:, 0].square()).clamp_min(0).sqrt()
    first = polar_express(grid)[:, 0]
    band = first[grid[:, 0] >= 1.02e-3]
    assert 0.8588 < band.min() < 0.8590 and 1.1410 < band.max() < 1.1412
    # a direction five orders below the norm is noise and stays small
    assert first[0] < 0.02


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalize_acts_on_singular_values_only(shape, cpp):
    """U p(S) V^T through the SVD in fp64."""
    matrices = randn(3, *shape).double()
    U, S, Vt = torch.linalg.svd(matrices, full_matrices=False)
    expected = U * polar_express(S)[:, None] @ Vt
    torch.testing.assert_close(
        orthogonalize(matrices.float(), torch.float32, cpp).double(), expected, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_matrices_stay_zero_next_to_others(dtype, cpp):
    stack = randn(3, 8, 12)
    stack[1] = 0
    result = orthogonalize(stack, dtype, cpp)
    assert result.isfinite().all() and (result[1] == 0).all() and (result[0] != 0).any()
    momentum, second = torch.zeros(3, 8, 12), torch.zeros(3, 1, 12)
    update = scaled_update(stack, momentum, second, 0.9, 0.9, dtype, cpp)
    assert update.isfinite().all() and (update[1] == 0).all() and (update[0] != 0).any()


# ---- Muon ----


def scaled_update(*args):
    """muon_update(), with its factors applied."""
    update, scale = muon_update(*args)
    return update.float() * scale


def reference_muon(gradients, mu, beta2):
    """Updates of one matrix for a list of gradients in fp64: Nesterov, SVD, NorMuon, one neuron at
    a time."""
    rows, columns = gradients[0].shape
    momentum = torch.zeros(rows, columns, dtype=torch.float64)
    neurons = rows if rows >= columns else columns
    second = [0.0] * neurons
    for gradient in gradients:
        gradient = gradient.double()
        momentum = mu * momentum + (1 - mu) * gradient
        U, S, Vt = torch.linalg.svd(mu * momentum + (1 - mu) * gradient, full_matrices=False)
        direction = U * polar_express(S) @ Vt
        lines = direction if rows >= columns else direction.T  # a neuron each
        for i, line in enumerate(lines):
            second[i] = beta2 * second[i] + (1 - beta2) * line.square().mean().item()
        scaled = torch.stack([line / s**0.5 for line, s in zip(lines, second)])
        scaled = scaled if rows >= columns else scaled.T
        yield scaled * direction.norm() / scaled.norm(), direction.norm()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_muon_update_equals_the_plain_one(shape, cpp):
    """Three stacked matrices for four steps, each with its own scale of gradients and with unequal
    neurons."""
    mu, beta2, N = 0.9, 0.8, 3
    uneven = torch.logspace(0, -1, max(shape))
    uneven = uneven[:, None] if shape[0] >= shape[1] else uneven[None, :]
    gradients = [
        torch.stack([10.0**-n * uneven * randn(*shape, seed=10 * step + n) for n in range(N)])
        for step in range(4)
    ]
    references = [list(reference_muon([g[n] for g in gradients], mu, beta2)) for n in range(N)]
    momentum = torch.zeros(N, *shape)
    second = torch.zeros(N, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(N, 1, shape[1])
    for step, gradient in enumerate(gradients):
        update = scaled_update(gradient, momentum, second, mu, beta2, torch.float32, cpp)
        for n in range(N):
            expected, norm = references[n][step]
            torch.testing.assert_close(update[n].double(), expected, atol=5e-5, rtol=0)
            # the Frobenius norm that orthogonalisation gave
            assert abs(update[n].norm() / norm - 1) < 1e-5


@pytest.mark.parametrize("shape, factor", [((32, 8), 2.0), ((8, 32), 1.0), ((12, 12), 1.0)])
def test_muon_step_moves_against_the_update_by_lr(shape, factor, cpp):
    """lr is the spectral norm of a step; tall matrices move by sqrt(rows / columns) more:
    sqrt(32 / 8) = 2."""
    weights = {"a": parameter(*shape, seed=1), "b": parameter(*shape, seed=2)}
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = Optimizer({"matrices": weights}, {"matrices": MUON}, torch.float32, cpp)
    give_gradients(weights.values(), seed=3)
    update = scaled_update(
        torch.stack([p.grad for p in weights.values()]),
        torch.zeros(2, *shape),
        torch.zeros(2, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(2, 1, shape[1]),
        0.9,
        MUON["beta2"],
        torch.float32,
    )
    reduce(optimizer)
    optimizer.step(lr_multiplier=0.5, mu=0.9)
    for i, name in enumerate(weights):
        torch.testing.assert_close(
            weights[name].detach(), before[name] - 0.5 * 0.03 * factor * update[i]
        )


def test_cautious_decay_only_where_update_and_weight_agree(cpp):
    """The gradient is orthogonal already, so the update has its signs. With lr 0.1 and decay 0.25
    the entries 2 and 0.5, whose updates are positive like they are, lose 0.1 x 0.25 x 2 = 0.05 and
    0.1 x 0.25 x 0.5 = 0.0125 more."""
    weight = torch.tensor([[2.0, -3.0], [0.5, 4.0]])
    gradient = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    after = []
    for decay in (0.0, 0.25):
        p = torch.nn.Parameter(weight.clone())
        settings = {"lr": 0.1, "beta2": 0.9, "weight_decay": decay}
        optimizer = Optimizer({"matrices": {"p": p}}, {"matrices": settings}, torch.float32, cpp)
        p.grad = gradient.clone()
        reduce(optimizer)
        optimizer.step(1.0, 0.9)
        after.append(p.detach())
    assert torch.equal((weight - after[0]).sign(), gradient)
    torch.testing.assert_close(
        after[0] - after[1], torch.tensor([[0.05, 0.0], [0.0125, 0.0]]), atol=1e-6, rtol=0
    )


# ---- Muon in C++ ----


@pytest.fixture
def library():
    if problem := cpu_muon.problem():
        pytest.skip(problem)


# some are smaller than a vector of 16, some larger than a block of 16,384
ODD_SHAPES = [(1, 1), (1, 7), (3, 5), (17, 16), (16, 33), (50, 401), (401, 50), (97, 349)]


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_native_steps_equal_fp64(library, shape, dtype, rtol):
    """Each against arithmetic in fp64, and rounded once: to a number of its dtype."""
    N, mu, tall = 3, 0.85, shape[0] >= shape[1]
    # matrices of unlike size, since every matrix has a norm of its own
    sizes = torch.tensor([1e-4, 1.0, 300.0])[:, None, None]
    grad, momentum = (sizes * randn(N, *shape, seed=seed) for seed in (1, 2))
    before = momentum.double()
    ahead = look_ahead(grad, momentum, mu, dtype, cpp=True)
    exact = mu * before + (1 - mu) * grad.double()
    # by the size of the matrix: terms may nearly cancel
    torch.testing.assert_close(momentum / sizes, (exact / sizes).float(), rtol=1e-5, atol=1e-6)
    exact = mu * exact + (1 - mu) * grad.double()
    assert ahead.dtype == dtype
    torch.testing.assert_close(ahead / sizes, (exact / sizes).float(), rtol=rtol, atol=1e-6)

    norms = ahead.double().norm(dim=(-2, -1), keepdim=True)
    normalized = cpu_muon.normalized(ahead, 1.02)
    expected = ahead.double() / (1.02 * norms + 1e-6)
    torch.testing.assert_close(normalized.double(), expected, rtol=rtol, atol=1e-9)

    means = cpu_muon.mean_squares(ahead)
    expected = ahead.double().square().mean(dim=-1 if tall else -2, keepdim=True)
    torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=0)

    weights = list(randn(N, *shape, seed=3))
    before = torch.stack(weights).double()
    scale = means + 0.5
    cpu_muon.descend(weights, ahead, scale, rate=0.3, shrinkage=0.01)
    update = ahead.double() * scale.double()
    kept = before * (update * before > 0)
    expected = before - 0.3 * update - 0.01 * kept
    torch.testing.assert_close(torch.stack(weights).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 50), (50, 200), (96, 96)], ids=str)
def test_native_steps_of_rows_equal_those_of_whole_matrices(library, shape):
    """As ranks with some of the rows take them, bit for bit; and any number of threads."""
    update, scale = muon_update(
        randn(2, *shape, seed=1),
        torch.zeros(2, *shape),
        torch.zeros(2, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(2, 1, shape[1]),
        0.9,
        0.95,
        torch.bfloat16,
        True,
    )
    whole = list(randn(2, *shape, seed=2))
    parts = [matrix.clone() for matrix in whole]
    descend(whole, update, scale, torch.Size(shape), 0.02, 0.1, cpp=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows in (slice(0, 7), slice(7, shape[0])):
            of_rows = scale[:, rows] if scale.size(1) > 1 else scale
            descend(
                [matrix[rows] for matrix in parts],
                update[:, rows].contiguous(),
                of_rows.contiguous(),
                torch.Size(shape),
                0.02,
                0.1,
                cpp=True,
            )
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, whole, parts))


def test_native_steps_do_not_depend_on_threads(library):
    threads = torch.get_num_threads()
    results = []
    grad = randn(3, 200, 300)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            ahead = look_ahead(grad, torch.zeros(3, 200, 300), 0.9, torch.bfloat16, True)
            normalized = cpu_muon.normalized(ahead, 1.02)
            results.append((ahead, normalized, cpu_muon.mean_squares(normalized)))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_native_steps_refuse_what_they_would_read_as_something_else(library):
    whole = randn(2, 8, 6)
    with pytest.raises(ValueError, match="muon.cpp takes"):
        look_ahead(whole.mT, torch.zeros(2, 6, 8), 0.9, torch.float32, cpp=True)
    with pytest.raises(ValueError, match="muon.cpp takes"):
        look_ahead(whole, torch.zeros(2, 6, 8), 0.9, torch.float32, cpp=True)
    with pytest.raises(ValueError, match="torch.float16"):
        orthogonalize(whole, torch.float16, cpp=True)
    scale = neuron_scale(whole, torch.zeros(2, 8, 1), 0.9, cpp=True)
    with pytest.raises(ValueError, match="muon.cpp takes"):
        descend([whole[0]], whole, scale, whole.shape, 0.1, 0.0, cpp=True)
    with pytest.raises(ValueError, match="torch.float64"):
        descend(list(whole.double()), whole, scale, whole.shape, 0.1, 0.0, cpp=True)


# ---- AdamW ----


def test_adamw_equals_torch_over_20_steps():
    """Two groups with their own settings, odd shapes, gradients of mixed scale, a schedule through
    lr_multiplier."""
    second_settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.0}
    shapes = {"table": (7, 5), "head": (3, 11), "lambdas": (3,), "one": (1,)}
    ours = {name: parameter(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    groups = [("table", "head"), ("lambdas", "one")]
    optimizer = Optimizer(
        {str(i): {name: ours[name] for name in names} for i, names in enumerate(groups)},
        {"0": ADAMW, "1": second_settings},
        torch.float32,
    )
    torch_groups = [
        {
            "params": [theirs[name] for name in names],
            "lr": s["lr"],
            "betas": (s["beta1"], s["beta2"]),
            "eps": s["eps"],
            "weight_decay": s["weight_decay"],
        }
        for names, s in zip(groups, (ADAMW, second_settings))
    ]
    reference = torch.optim.AdamW(torch_groups, foreach=False, fused=False)
    base = [group["lr"] for group in reference.param_groups]
    for step in range(20):
        multiplier = 1 - step / 25
        for side in (ours, theirs):
            give_gradients(side.values(), seed=step, scale=10.0 ** -(step % 4))
        reduce(optimizer)
        optimizer.step(multiplier, mu=0.9)
        for group, lr in zip(reference.param_groups, base):
            group["lr"] = lr * multiplier
        reference.step()
    for name in shapes:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)


# ---- both kinds together ----


def mixed(seed=0, settings_of_matrices=MUON):
    """(optimizer, {name: parameter}): three matrices of one shape, one of another, a table and
    lambdas."""
    matrices = {f"m{i}": parameter(6, 10, seed=seed + i) for i in range(3)} | {
        "tall": parameter(9, 4, seed=seed + 3)
    }
    rest = {"table": parameter(7, 5, seed=seed + 4), "lambdas": parameter(3, seed=seed + 5)}
    settings = {"matrices": settings_of_matrices, "rest": ADAMW}
    return Optimizer({"matrices": matrices, "rest": rest}, settings, torch.float32), matrices | rest


def run(optimizer, parameters, steps, multiplier=1.0):
    for step in steps:
        optimizer.zero_grad()
        give_gradients(parameters.values(), seed=step)
        reduce(optimizer)
        optimizer.step(multiplier, mu=0.9)


def values(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(state):
    return {
        name: {key: tensor.clone() for key, tensor in tensors.items()}
        for name, tensors in state.items()
    }


def test_reduce_returns_loss_and_norm_and_clip_scales_to_it():
    """A large eps makes AdamW depend on the scale of its gradients, as Muon's momentum does
    anyway."""
    limit = 0.5
    p, q = parameter(5, 3, seed=1), parameter(4, 6, seed=2)
    ours = {"p": p, "q": q}
    theirs = torch.nn.Parameter(p.detach().clone())
    optimizer = Optimizer(
        {"a": {"p": p}, "b": {"q": q}}, {"a": ADAMW | {"eps": 1.0}, "b": MUON}, torch.float32
    )
    give_gradients(ours.values(), seed=7)
    theirs.grad, unclipped_q = p.grad.clone(), q.grad.clone()
    expected = (p.grad.square().sum() + q.grad.square().sum()).sqrt()
    loss, norm = optimizer.reduce(torch.tensor(2.5), LossScaler(enabled=False))
    assert loss == 2.5 and isinstance(loss, float)
    torch.testing.assert_close(torch.tensor(norm), expected)
    assert norm > limit and isinstance(norm, float)
    optimizer.clip(norm, limit)
    optimizer.step(1.0, mu=0.9)
    theirs.grad *= limit / expected
    torch.optim.AdamW(
        [theirs],
        lr=ADAMW["lr"],
        betas=(ADAMW["beta1"], ADAMW["beta2"]),
        eps=1.0,
        weight_decay=ADAMW["weight_decay"],
    ).step()
    torch.testing.assert_close(p, theirs, atol=1e-6, rtol=0)
    momentum = optimizer.state()["q"]["momentum"]
    torch.testing.assert_close(momentum, (1 - 0.9) * unclipped_q * limit / expected)


def test_reduce_unscales_the_gradients():
    """By the power of two that they were multiplied by, so that nothing is rounded."""
    (plain, first), (scaled, second) = mixed(), mixed()
    run(plain, first, [1])
    give_gradients(second.values(), seed=1)
    for p in second.values():
        p.grad *= 2.0**12
    scaled.reduce(torch.zeros(()), LossScaler(enabled=True, state=[2.0**12, 0]))
    scaled.step(1.0, mu=0.9)
    assert same(values(first), values(second))


def test_clip_leaves_gradients_below_the_limit_alone():
    (plain, first), (clipped, second) = mixed(), mixed()
    run(plain, first, [1])
    give_gradients(second.values(), seed=1)
    norm = reduce(clipped)
    clipped.clip(norm, 2 * norm)
    clipped.step(1.0, mu=0.9)
    assert same(values(first), values(second))


def test_lr_multiplier_scales_every_group():
    (full, first), (half, second), (none, third) = mixed(), mixed(), mixed()
    start = values(first)
    run(full, first, [1])
    run(half, second, [1], multiplier=0.5)
    run(none, third, [1], multiplier=0.0)
    assert same(values(third), start)
    for name in start:
        moved = first[name].detach() - start[name]
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(
            second[name].detach() - start[name], 0.5 * moved, atol=1e-6, rtol=0
        )


def test_dropped_gradients_leave_no_trace():
    (skipping, first), (plain, second) = mixed(), mixed()
    for optimizer, parameters in ((skipping, first), (plain, second)):
        run(optimizer, parameters, [1, 2])
    before, state = values(first), copied(skipping.state())
    give_gradients(first.values(), seed=99)
    first["m0"].grad[0, 0] = float("nan")
    assert not math.isfinite(reduce(skipping))
    skipping.drop_gradients()
    assert all(part.grad is None for part in skipping.parts)
    skipping.zero_grad()
    assert all(p.grad is None for p in first.values())
    assert same(before, values(first))
    assert all(same(state[name], tensors) for name, tensors in skipping.state().items())
    run(skipping, first, [3])
    run(plain, second, [3])
    assert same(values(first), values(second))


def test_state_round_trip_is_exact_and_continues_exactly():
    (original, first), (resumed, second) = mixed(), mixed(seed=50)
    run(original, first, range(1, 6))
    state = copied(original.state())
    assert state.keys() == first.keys()
    for name in ("m0", "m1", "m2", "tall"):
        assert state[name]["momentum"].shape == first[name].shape
    for name in ("table", "lambdas"):
        assert state[name]["exp_avg"].shape == state[name]["exp_avg_sq"].shape == first[name].shape
        assert state[name]["steps"] == 5
    with torch.no_grad():
        for name in second:
            second[name].copy_(first[name])
    resumed.load(state)
    assert all(same(state[name], tensors) for name, tensors in resumed.state().items())
    run(original, first, range(6, 11))
    assert not same(values(first), values(second))
    run(resumed, second, range(6, 11))
    assert same(values(first), values(second))
    assert all(same(tensors, resumed.state()[name]) for name, tensors in original.state().items())


@pytest.mark.parametrize(
    "settings", [{"matrices": MUON}, {"matrices": MUON, "rest": ADAMW, "other": ADAMW}]
)
def test_settings_must_name_exactly_the_groups(settings):
    groups = {"matrices": {"m": parameter(4, 4)}, "rest": {"p": parameter(4)}}
    with pytest.raises(AssertionError, match="every parameter group needs settings"):
        Optimizer(groups, settings, torch.float32)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 12, 24, 96])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_pieces_of_a_stack_begin_with_late_layers_and_add_no_padding(n, ranks):
    pieces = cuts_by_depth(n, ranks)
    assert 1 <= len(pieces) <= (1 if ranks == 1 else 3)
    assert [i for piece in reversed(pieces) for i in piece] == list(range(n))
    padded = sum(round_up(len(piece), ranks) for piece in pieces)
    assert padded == round_up(n, ranks)
    # cut wherever there is more than a matrix for each rank
    assert len(pieces) > 1 or n <= ranks or ranks == 1


def test_matrices_may_be_trained_by_adamw():
    """--optimizer=adamw gives group 'matrices' AdamW's settings; then every parameter equals
    torch's AdamW."""
    optimizer, parameters = mixed(settings_of_matrices=ADAMW)
    theirs = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    reference = torch.optim.AdamW(
        theirs.values(),
        lr=ADAMW["lr"],
        betas=(ADAMW["beta1"], ADAMW["beta2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
    )
    for step in range(5):
        run(optimizer, parameters, [step])
        give_gradients(theirs.values(), seed=step)
        reference.step()
    for name in parameters:
        torch.testing.assert_close(parameters[name], theirs[name], atol=1e-6, rtol=1e-6)
