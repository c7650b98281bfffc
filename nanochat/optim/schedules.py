"""From a horizon to batch size, learning rates and decay, and from a step to its learning rate. Pure functions, no torch.

Everything that is tuned stands in this file, once; runs/LOG.md has the evidence. N: parameters of the matrices and the
head. D: training tokens. B: tokens a step. The reference (B_ref, D_ref) is depth 12 with the run's aspect ratio,
sequence length and vocabulary at the default data:param ratio."""

import math

DEFAULT_PARAM_DATA_RATIO = 10.5  # D / N; Chinchilla: 20
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_WIDTH = 768
# Learning rates at the reference batch (Adam's: and width). Muon's is in units of spectral norm per update.
MATRIX_LR = {"muon": 0.02, "adamw": 0.003}
EMBEDDING_LR = {"speedrun": 0.3, "llama": 0.012}
UNEMBEDDING_LR = {"speedrun": 0.004, "llama": 0.004}
SCALAR_LR = 0.5
WEIGHT_DECAY = 0.2
ADAM_BETA1, ADAM_BETA2 = 0.8, 0.95
MUON_BETA2 = 0.95
SCALAR_LR_FACTOR = 0.01  # lambdas and gates take --scalar-lr times this
# Adam's eps. Lambdas and gates start with gradients of exactly zero, rows of rare tokens with nearly none: a smaller eps
# turns rounding noise into full steps, and two equal runs drift apart (runs/LOG.md).
EPS, SCALAR_EPS = 1e-8, 1e-6
WARMUP_RATIO, WARMDOWN_RATIO, FINAL_LR_FRAC = 0.0, 0.5, 0.0
MUON_MOMENTUM_START, MUON_MOMENTUM_END, MUON_MOMENTUM_STEPS = 0.85, 0.95, 300
# Small budgets: a run wants at least this many steps, and below this batch the rates stop shrinking with it.
MIN_STEPS = 1500
LR_FLOOR_BATCH_TOKENS = 2**16


def derive_batch_tokens(tokens, reference_tokens):
    """B for a horizon of D tokens: B_ref (D / D_ref)^0.383 as a power of two (arXiv 2505.13738), at most D / MIN_STEPS."""
    published = REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** 0.383
    return 2 ** max(
        0, min(round(math.log2(published)), math.floor(math.log2(max(1, tokens / MIN_STEPS))))
    )


def lr_factor(batch_tokens):
    """Factor on every learning rate for a batch: sqrt(B / B_ref), constant below LR_FLOOR_BATCH_TOKENS."""
    return math.sqrt(max(batch_tokens, LR_FLOOR_BATCH_TOKENS) / REFERENCE_BATCH_TOKENS)


def decay_factor(batch_tokens, tokens, reference_tokens):
    """Factor on weight decay that keeps lr x decay x steps, the share of a weight that is renewed over a run, constant.

    Above the floor this is sqrt(B / B_ref) D_ref / D (constant T_epoch, arXiv 2405.13698). A run of fewer than MIN_STEPS
    decays no faster than one of MIN_STEPS."""
    tokens = max(tokens, MIN_STEPS * batch_tokens)
    return (
        (batch_tokens / REFERENCE_BATCH_TOKENS)
        * (reference_tokens / tokens)
        / lr_factor(batch_tokens)
    )


def group_settings(args, batch_tokens, tokens, reference_tokens, width):
    """Optimizer settings of each parameter group ({group: dict}), as optim.Optimizer takes them.

    args: embedding_lr, unembedding_lr (-1: by arch), matrix_lr (-1: by optimizer), scalar_lr, weight_decay, adam_beta1,
    adam_beta2, optimizer, arch. The rates in args are those of the reference; the returned ones are what is applied."""
    factor = lr_factor(batch_tokens)
    adam = factor * (width / REFERENCE_WIDTH) ** -0.5
    decay = args.weight_decay * decay_factor(batch_tokens, tokens, reference_tokens)

    def adamw(lr, eps=EPS, weight_decay=0.0):
        return {
            "lr": lr,
            "beta1": args.adam_beta1,
            "beta2": args.adam_beta2,
            "eps": eps,
            "weight_decay": weight_decay,
        }

    matrix_lr = args.matrix_lr if args.matrix_lr != -1 else MATRIX_LR[args.optimizer]
    embedding_lr = args.embedding_lr if args.embedding_lr != -1 else EMBEDDING_LR[args.arch]
    unembedding_lr = args.unembedding_lr if args.unembedding_lr != -1 else UNEMBEDDING_LR[args.arch]
    if args.optimizer == "muon":
        matrices = {"lr": matrix_lr * factor, "beta2": MUON_BETA2, "weight_decay": decay}
    else:
        matrices = adamw(matrix_lr * adam, weight_decay=decay)
    return {
        "matrices": matrices,
        "embedding": adamw(embedding_lr * adam),
        "value_embeddings": adamw(embedding_lr * adam),
        "unembedding": adamw(unembedding_lr * adam),
        "scalars": adamw(args.scalar_lr * SCALAR_LR_FACTOR * adam, eps=SCALAR_EPS),
    }


def lr_multiplier(step, steps, warmup_steps, warmdown_steps, final_lr_frac, schedule):
    """Factor on the learning rates at update `step` (0 is the first) of `steps`; the first is never 0.

    trapezoid: linear warm-up, constant, linear warm-down to final_lr_frac. cosine: linear warm-up, then half a cosine."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return final_lr_frac + (1 - final_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))
    left = (steps - step) / max(1, warmdown_steps)
    return 1.0 if left >= 1 else final_lr_frac + (1 - final_lr_frac) * left


def muon_momentum(step):
    """Muon's momentum at update `step`: rises linearly over the first updates, while gradients still turn quickly."""
    share = min(1.0, step / MUON_MOMENTUM_STEPS)
    return MUON_MOMENTUM_START + share * (MUON_MOMENTUM_END - MUON_MOMENTUM_START)
