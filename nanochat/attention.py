"""Causal attention with an optional sliding window: one public function, several backends with the same meaning.

Shapes: B batch, T queries, S keys (S >= T; the queries are the last T of the S positions), H query heads, K key/value
heads (H a multiple of K), D head dim."""

import functools

import torch
import torch.nn.functional as F

BACKENDS = ("blocked", "sdpa")
# Queries that share one slice of keys in the blocked path: small blocks skip more of what is masked, large ones make larger
# products. Measured in runs/LOG.md.
QUERY_BLOCK, SHORT_QUERY_BLOCK, SHORT_WINDOW = 256, 128, 256


def pick_backend(requested, device_type):
    """(backend, reason) for --attention. 'auto' means: sdpa on a GPU, blocked elsewhere."""
    if requested != "auto":
        return requested, "as requested"
    if device_type == "cuda":
        return "sdpa", "fused kernels for full context"
    if device_type == "cpu":
        return "blocked", "plain products over causal blocks skip masked keys and beat SDPA on CPUs"
    return "blocked", "work and memory grow with the window; SDPA is not measured here"


def attention(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window, backend):
    """softmax(q k^T / sqrt(D)) v, where query t sees itself and the window - 1 positions before it.

    window: number of visible keys, itself included; anything >= S is full causal context.
    Returns (B, T, H, D) in q's dtype. Softmax is in fp32 for every backend."""
    if backend not in BACKENDS or window < 1:
        raise ValueError(f"attention backend {backend!r} (there are {BACKENDS}) with a window of {window} (1 or more)")
    if backend == "sdpa":
        return _sdpa(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)
    return _blocked(q_BxTxHxD, k_BxSxKxD, v_BxSxKxD, window)


def visible(T, S, window, device, first_query=0, first_key=0, n_query=None, n_key=None):
    """Boolean (n_query, n_key) mask of a rectangle of the T x S score matrix: True where the query sees the key."""
    query = torch.arange(first_query, first_query + (n_query or T), device=device)[:, None] + (S - T)
    key = torch.arange(first_key, first_key + (n_key or S), device=device)[None, :]
    return (key <= query) & (key > query - window)


def _blocks(T, S, window):
    """(first query, last + 1, first key, last + 1) of the rectangles of scores that the blocked path computes."""
    size = QUERY_BLOCK if window > SHORT_WINDOW else SHORT_QUERY_BLOCK
    return [(t0, min(t0 + size, T), max(0, S - T + t0 - window + 1), S - T + min(t0 + size, T)) for t0 in range(0, T, size)]


def visited_keys(T, window):
    """Scores that the blocked path computes per query, on average over a row of T tokens."""
    return sum((t1 - t0) * (s1 - s0) for t0, t1, s0, s1 in _blocks(T, T, window)) / T


def _sdpa(q, k, v, window):
    T, S = q.size(1), k.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    full = window >= S and T == S
    mask = None if full else visible(T, S, window, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=full, enable_gqa=q.size(1) != k.size(1))
    return out.transpose(1, 2)


class _Softmax(torch.autograd.Function):
    """softmax(scale * scores) of the visible scores, in fp32. Keeps nothing but its result, in the dtype of the scores: left to
    autograd, the scores' own softmax in fp32 and the mask would be kept too, four times the memory in bf16."""

    @staticmethod
    def forward(ctx, scores, seen, scale):
        ctx.scale = scale
        weights = (scores.float() * scale).masked_fill(~seen, float("-inf")).softmax(-1).to(scores.dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, upstream):
        dtype, upstream = upstream.dtype, upstream.float()
        weights = ctx.saved_tensors[0].float()
        mean = (weights * upstream).sum(-1, keepdim=True)
        return (weights * (upstream - mean) * ctx.scale).to(dtype), None, None


@functools.lru_cache(maxsize=8)
def _bias(n_query, n_key, offset, window, group, dtype, device):
    """What is added to the scores of a rectangle whose first query is `offset` keys after its first key: 0 or -inf; group times,
    (group * n_query, n_key). Most rectangles of a pass are alike, and those of its layers."""
    seen = visible(n_key - offset, n_key, window, device, n_query=n_query)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf")).repeat(group, 1)


def _blocked(q, k, v, window):
    """Each block of queries meets only the keys that some query of it can see: time and memory grow with T x window."""
    B, T, H, D = q.shape
    S, K = k.size(1), k.size(2)
    group = H // K
    # one matrix per (batch, key/value head); the query heads of a group are stacked along the rows
    q = q.view(B, T, K, group, D).permute(0, 2, 3, 1, 4)
    k, v = k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    blocks = []
    for t0, t1, s0, s1 in _blocks(T, S, window):
        rows = q[:, :, :, t0:t1].reshape(B * K, group * (t1 - t0), D)
        keys, values = (x[:, :, s0:s1].reshape(B * K, s1 - s0, D) for x in (k, v))
        if torch.is_grad_enabled():
            scores = (rows @ keys.transpose(1, 2)).view(B * K, group, t1 - t0, s1 - s0)
            seen = visible(T, S, window, q.device, t0, s0, t1 - t0, s1 - s0)
            weights = _Softmax.apply(scores, seen, D**-0.5).view(B * K, group * (t1 - t0), s1 - s0)
        else:  # a third of the passes over the scores; torch's softmax computes in fp32 whatever the dtype of its ends
            bias = _bias(t1 - t0, s1 - s0, S - T + t0 - s0, window, group, q.dtype, q.device)
            weights = torch.baddbmm(bias, rows, keys.transpose(1, 2), alpha=D**-0.5).softmax(-1)
        out = weights @ values
        blocks.append(out.view(B, K, group, t1 - t0, D))
    return torch.cat(blocks, dim=3).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def branched_attention(q_RxTxHxD, k_RxTxKxD, v_RxTxKxD, k_BxSxKxD, v_BxSxKxD, lengths, window):
    """attention() of rows that continue shared beginnings: row r sees beginning r // (R / B), then its own T keys.

    lengths: positions of each of the B beginnings, ints of at most S; what lies behind them is not looked at. The keys of a
    beginning are read once for all rows that continue it. Meant for short rows, whose scores it does not cut into blocks, and
    without gradients. Returns (R, T, H, D) in q's dtype."""
    (R, T, H, D), (B, S, K, _) = q_RxTxHxD.shape, k_BxSxKxD.shape
    n, group, device = R // B, H // K, q_RxTxHxD.device
    first = max(0, min(lengths) - window + 1)  # of the keys that any query sees
    before = S - first
    trunk_keys, trunk_values = (x[:, first:].permute(0, 2, 1, 3).reshape(B * K, before, D) for x in (k_BxSxKxD, v_BxSxKxD))
    own_keys, own_values = (x.view(B, n, T, K, D).permute(0, 3, 1, 2, 4).reshape(B * K * n, T, D) for x in (k_RxTxKxD, v_RxTxKxD))
    rows = q_RxTxHxD.view(B, n, T, K, group, D).permute(0, 3, 1, 4, 2, 5).reshape(B * K, n * group * T, D)
    nothing = rows.new_zeros(())
    of_trunk = torch.baddbmm(nothing, rows, trunk_keys.transpose(1, 2), beta=0, alpha=D**-0.5)
    own = torch.baddbmm(nothing, rows.reshape(B * K * n, group * T, D), own_keys.transpose(1, 2), beta=0, alpha=D**-0.5)
    scores = torch.cat((of_trunk, own.view(B * K, n * group * T, T)), dim=-1)
    length = torch.tensor(lengths, device=device)[:, None, None]
    query, key = torch.arange(T, device=device)[:, None], torch.arange(first, S, device=device)
    seen_of_trunk = (key < length) & (key > length + query - window)
    seen = torch.cat((seen_of_trunk, visible(T, T, window, device).expand(B, T, T)), dim=-1)
    scores.view(B, K * n * group, T, before + T).masked_fill_(~seen[:, None], float("-inf"))
    weights = scores.softmax(-1)
    out = weights[..., before:].reshape(B * K * n, group * T, T) @ own_values
    out = torch.baddbmm(out.view(B * K, n * group * T, D), weights[..., :before], trunk_values)
    return out.view(B, K, n, group, T, D).permute(0, 2, 4, 1, 3, 5).reshape(R, T, H, D)
