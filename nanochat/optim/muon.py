"""Muon (Jordan et al., 2024) for stacks of matrices: orthogonalised momentum, with NorMuon's second
moment (arXiv 2510.05491) and cautious weight decay (arXiv 2510.12402).

Functions that take `cpp` do the same in C++ if it is true (nanochat/model/kernels/cpu_muon.py):
on a CPU a step of a small model spends much of its time here. The two round differently: in bf16
their updates differ from one another by as much as each does from fp32, 1%.

Shape legend: N stacked matrices of one shape, R rows (outputs), C columns (inputs), S the side of a
matrix along which NorMuon keeps its second moment."""

from collections.abc import Iterable, Sequence

import torch

from nanochat.model.kernels import cpu_muon

# Quintic coefficients of Polar Express (arXiv 2505.16932), five steps from a lower singular-value
# bound of 1e-3, with the paper's safety factor of 1.02 folded in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Above the largest singular value by as much as the coefficients allow for.
SLACK = 1.02


def updates_problem(device_type: str, compiled: bool, planned: bool = False) -> str | None:
    """Why Muon's updates cannot be in C++ here, or None.

    compiled: something may be compiled. planned: compile nothing to find out what can be."""
    if device_type != "cpu":
        return f"C++ is for CPUs, and this device is {device_type}"
    return cpu_muon.problem(planned) if compiled else "nothing is compiled"


def muon_flops(rows: int, columns: int) -> int:
    """FLOPs of orthogonalising one matrix: three products in each iteration."""
    small, large = sorted((rows, columns))
    # X X^T, its square, and the square times X, for X of `small` rows and `large` columns.
    return len(POLAR_EXPRESS) * 2 * small * small * (2 * large + small)


def update_flops(matrices: Iterable[torch.Tensor]) -> int:
    """FLOPs of orthogonalising all these matrices, once."""
    return sum(muon_flops(*matrix.shape) for matrix in matrices)


def orthogonalize(
    matrices_NxRxC: torch.Tensor, dtype: torch.dtype, cpp: bool = False
) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of each (U V^T of its SVD), approximately: singular values
    land near 1.

    Iterates in `dtype` (bfloat16 or float32) on the smaller Gram matrix; returns that dtype. Zero
    stays zero."""
    X = matrices_NxRxC.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if cpp:
        X = cpu_muon.normalized(X, SLACK)
    else:
        # An upper bound of the largest singular value.
        norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32)
        X = X / (norm * SLACK + 1e-6).to(dtype)
    for a, b, c in POLAR_EXPRESS:
        # X <- a X + (b A + c A^2) X with A = X X^T, or its mirror image for tall matrices
        if tall:
            A = X.mT @ X
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, X, B, beta=a)
        else:
            A = X @ X.mT
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, B, X, beta=a)
    return X


def neuron_scale(
    update_NxRxC: torch.Tensor, second_NxS: torch.Tensor, beta2: float, cpp: bool = False
) -> torch.Tensor:
    """NorMuon's factors of an orthogonalised update, fp32, with the shape of the second moment,
    which is changed in place.

    The moment is kept per row of tall matrices and per column of wide ones: in the other direction
    orthogonalisation already equalises the norms. The factors leave the Frobenius norm as it is."""
    if cpp:
        squares = cpu_muon.mean_squares(update_NxRxC)
    else:
        along = -1 if update_NxRxC.size(-2) >= update_NxRxC.size(-1) else -2
        squares = update_NxRxC.float().square().mean(dim=along, keepdim=True)
    # In fp32: bf16 could not add a twentieth of a small number to a large one.
    second_NxS.lerp_(squares, 1 - beta2)
    scale = second_NxS.clamp_min(1e-10).rsqrt()
    before = squares.sum(dim=(-2, -1), keepdim=True)
    after = (squares * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return scale * (before / after.clamp_min(1e-20)).sqrt()


def muon_update(
    grad_NxRxC: torch.Tensor,
    momentum_NxRxC: torch.Tensor,
    second_NxS: torch.Tensor,
    mu: float,
    beta2: float,
    dtype: torch.dtype,
    cpp: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update direction of one stack: (N, R, C) in dtype, and its fp32 factors, of the shape of
    second_NxS. Both states are changed in place.

    Nesterov momentum, orthogonalisation, then neuron_scale(). mu: momentum. beta2: of the second
    moment. dtype: of the products."""
    ahead = look_ahead(grad_NxRxC, momentum_NxRxC, mu, dtype, cpp)
    update = orthogonalize(ahead, dtype, cpp)
    return update, neuron_scale(update, second_NxS, beta2, cpp)


def look_ahead(
    grad: torch.Tensor, momentum: torch.Tensor, mu: float, dtype: torch.dtype, cpp: bool = False
) -> torch.Tensor:
    """Update the momentum with a gradient, in place; returns Nesterov's look-ahead in dtype."""
    if cpp:
        return cpu_muon.look_ahead(grad, momentum, mu, dtype)
    # A running mean, so that the size of the momentum does not depend on mu.
    momentum.lerp_(grad, 1 - mu)
    return torch.lerp(grad, momentum, mu).to(dtype)


def descend(
    weights: Sequence[torch.Tensor],
    update_NxRxC: torch.Tensor,
    scale: torch.Tensor,
    shape: torch.Size,
    lr: float,
    decay: float,
    cpp: bool = False,
) -> None:
    """Change N matrices, or the same rows of each, in place.

    update_NxRxC, scale: of muon_update(), or rows of both. shape: of a whole matrix, (R, C). lr: in
    units of spectral norm per update."""
    # Tall matrices take larger steps, so that each changes its outputs by as much.
    rate = lr * max(1.0, shape[-2] / shape[-1]) ** 0.5
    shrinkage = lr * decay
    if cpp:
        cpu_muon.descend(weights, update_NxRxC, scale, rate, shrinkage)
        return
    # Stacked anew each step: the model's layers own their weights, not the optimizer.
    stack = torch.stack(weights)
    step = rate * (update_NxRxC.float() * scale)
    if decay:
        # cautious decay: only where the update already moves the weight towards zero
        step.add_(stack * (step * stack > 0), alpha=shrinkage)
    stack -= step
    torch._foreach_copy_(weights, list(stack))
