"""Muon (Jordan et al., 2024) for stacks of matrices: orthogonalised momentum, with NorMuon's second
moment (arXiv 2510.05491) and cautious weight decay (arXiv 2510.12402).

Shape legend: N stacked matrices of one shape, R rows (outputs), C columns (inputs), S the side of a
matrix along which NorMuon keeps its second moment."""

import torch

# Quintic coefficients of Polar Express (arXiv 2505.16932), five steps from a lower singular-value
# bound of 1e-3, with the paper's safety factor of 1.02 folded in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices_NxRxC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of each (U V^T of its SVD), approximately: singular values
    land near 1.

    Iterates in `dtype` (bfloat16 or float32) on the smaller Gram matrix; returns that dtype. Zero
    stays zero."""
    X = matrices_NxRxC.to(dtype)
    tall = X.size(-2) > X.size(-1)
    # An upper bound of the largest singular value, with the safety factor of the coefficients.
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    X = X / (norm * 1.02 + 1e-6).to(dtype)
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
    update_NxRxC: torch.Tensor, second_NxS: torch.Tensor, beta2: float
) -> torch.Tensor:
    """NorMuon's factors of an orthogonalised update, fp32, with the shape of the second moment,
    which is changed in place.

    The moment is kept per row of tall matrices and per column of wide ones: in the other direction
    orthogonalisation already equalises the norms. The factors leave the Frobenius norm as it is."""
    along = -1 if update_NxRxC.size(-2) >= update_NxRxC.size(-1) else -2
    squares = update_NxRxC.square().mean(dim=along, keepdim=True)
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
) -> torch.Tensor:
    """The update direction of one stack, fp32 (N, R, C); both states are changed in place.

    Nesterov momentum, orthogonalisation, then neuron_scale(). mu: momentum. beta2: of the second
    moment. dtype: of the products."""
    look_ahead = nesterov(grad_NxRxC, momentum_NxRxC, mu)
    update = orthogonalize(look_ahead, dtype).float()
    return update * neuron_scale(update, second_NxS, beta2)


def nesterov(grad: torch.Tensor, momentum: torch.Tensor, mu: float) -> torch.Tensor:
    """Take a gradient into the momentum, in place; returns the momentum one gradient ahead."""
    # A running mean, so that the size of the momentum does not depend on mu.
    momentum.lerp_(grad, 1 - mu)
    return torch.lerp(grad, momentum, mu)


def descend(
    weights: torch.Tensor, update: torch.Tensor, shape: torch.Size, lr: float, decay: float
) -> None:
    """Change weights in place by an update of muon_update(), or rows of both.

    shape: of a whole matrix, (R, C). lr: in units of spectral norm per update."""
    # cautious decay: only where the update already moves the weight towards zero
    kept = weights * (update * weights > 0) if decay else None
    # Tall matrices take larger steps, so that each changes its outputs by as much.
    weights -= lr * max(1.0, shape[-2] / shape[-1]) ** 0.5 * update
    if decay:
        weights -= lr * decay * kept
