"""Near-ties: choices of a token that rounding might have made otherwise. Where the logits of a text
depend in their last bits on what else is in the batch, only these may differ.

Shape legend: B texts, V vocabulary, K most likely tokens."""

import torch
from torch import Tensor

from nanochat.eval.generation import ONE_THREAD_NUMBERS

# How far a logit may be from that of the same text alone, by compute dtype. A test holds PyTorch's
# products to the first.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
# of the most likely tokens, which are looked at before all are sorted
SORTED_FIRST = 64


def near_ties(
    logits_BxV: Tensor,
    chosen_B: Tensor,
    point_Bx1: Tensor | None,
    tolerance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """Which choices of generation.choose() are near-ties, bool (B,): logits that differ from these
    by up to `tolerance` each might lead to another token. None that might change is left out.

    logits_BxV: float on the CPU, after the penalty. chosen_B: int64, what was chosen. The rest as
    given to choose()."""
    B, V = logits_BxV.shape
    together = max(1, ONE_THREAD_NUMBERS // V)
    if together < B:
        cuts = (tolerance, temperature, top_k, top_p, min_p)
        parts = [slice(first, first + together) for first in range(0, B, together)]
        return torch.cat(
            [
                near_ties(
                    logits_BxV[part],
                    chosen_B[part],
                    None if point_Bx1 is None else point_Bx1[part],
                    *cuts,
                )
                for part in parts
            ]
        )
    logits_BxV = logits_BxV.double()
    if temperature == 0:
        best_Bx2 = logits_BxV.topk(2).values
        return best_Bx2[:, 0] - best_Bx2[:, 1] <= 2 * tolerance
    settings = (tolerance, temperature, top_k, top_p, min_p)
    # one more than are kept: it may change places with the last of these
    K = min(V, max(SORTED_FIRST, top_k + 1))
    is_near_B, is_known_B = _near_ties(logits_BxV, chosen_B, point_Bx1, K, *settings)
    rest_B = ~is_known_B
    if rest_B.any():
        is_near_B[rest_B], _ = _near_ties(
            logits_BxV[rest_B], chosen_B[rest_B], point_Bx1[rest_B], V, *settings
        )
    return is_near_B


def _near_ties(
    logits_BxV: Tensor,
    chosen_B: Tensor,
    point_Bx1: Tensor,
    K: int,
    tolerance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor]:
    """near_ties() by the K most likely tokens of each row, and whether they decide, bool (B,)."""
    B, V = logits_BxV.shape
    n_kept = min(top_k, V) if top_k > 0 else V
    values_BxK, ids_BxK = logits_BxV.topk(K)
    highest_Bx1 = values_BxK[:, :1]
    shares_BxK = ((values_BxK - highest_Bx1) / temperature).exp()
    if n_kept <= K:
        total_Bx1 = shares_BxK[:, :n_kept].sum(-1, keepdim=True)
    else:
        total_Bx1 = ((logits_BxV - highest_Bx1) / temperature).exp().sum(-1, keepdim=True)
    sums_BxK = (shares_BxK / total_Bx1).cumsum(-1)

    # Two logits may come closer by this much, in units of the temperature; a share of a whole is a
    # logistic function of such differences, whose slope is at most 1/4.
    closer = 2 * tolerance / temperature
    slack = closer / 4
    last_B = torch.full((B,), min(n_kept, K) - 1)
    is_near_B = torch.zeros(B, dtype=torch.bool)
    if top_p < 1:
        last_B = torch.minimum(last_B, (sums_BxK < top_p).sum(-1))
        is_near_B |= ((sums_BxK - top_p).abs() <= slack).any(-1)
    if min_p > 0:
        last_B = torch.minimum(last_B, (shares_BxK >= min_p).sum(-1) - 1)
        is_near_B |= ((shares_BxK / min_p).log().abs() <= closer).any(-1)
    mass_Bx1 = sums_BxK.gather(1, last_B[:, None])
    is_known_B = torch.ones(B, dtype=torch.bool)
    if n_kept > K and (top_p < 1 or min_p > 0):
        # where the cut is further on, its mass is not known
        is_known_B = last_B < K - 1
    elif n_kept > K:
        mass_Bx1 = torch.ones_like(mass_Bx1)
    # the point lies near the border of two tokens
    is_near_B |= ((sums_BxK / mass_Bx1 - point_Bx1).abs() <= slack).any(-1)

    # the chosen token and a neighbour may change places
    is_chosen_BxK = ids_BxK == chosen_B[:, None]
    is_close_BxK = (values_BxK[:, :-1] - values_BxK[:, 1:]) / temperature <= closer
    is_near_B |= (is_close_BxK & (is_chosen_BxK[:, :-1] | is_chosen_BxK[:, 1:])).any(-1)
    # one beyond these, whose neighbours are as good as equal
    is_near_B |= ~is_chosen_BxK.any(-1)
    return is_near_B, is_known_B
