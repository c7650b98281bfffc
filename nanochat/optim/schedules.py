"""From a horizon to batch size, learning rates and weight decay, and from a step to its learning
rate. Pure functions, no torch.

Every tuned constant stands in this file, once; runs/LOG.md has the evidence.

N: parameters of the transformer's matrices and the head. D: training tokens. B: tokens a step.
The reference (B_ref, D_ref) is depth 12 with the run's aspect ratio, sequence length and vocabulary
at the default data:parameter ratio."""

import argparse
import math
from dataclasses import dataclass

from nanochat.common import round_up

DEFAULT_PARAM_DATA_RATIO = 10.5  # D / N; Chinchilla: 20
REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
REFERENCE_WIDTH = 768
# Learning rates at the reference batch (Adam's: and width). Muon's is in units of spectral norm per
# update.
MATRIX_LR = {"muon": 0.02, "adamw": 0.003}
EMBEDDING_LR = {"speedrun": 0.3, "llama": 0.012}
UNEMBEDDING_LR = {"speedrun": 0.004, "llama": 0.004}
SCALAR_LR = 0.5
WEIGHT_DECAY = 0.2
ADAM_BETA1 = 0.8
ADAM_BETA2 = 0.95
MUON_BETA2 = 0.95
SCALAR_LR_FACTOR = 0.01  # lambdas and gates take --scalar-lr times this
# Adam's eps. Lambdas and gates start with gradients of exactly zero, rows of rare tokens with
# nearly none: a smaller eps turns rounding noise into full steps, and two equal runs drift apart
# (runs/LOG.md).
EPS = 1e-8
SCALAR_EPS = 1e-6
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = 0.5
FINAL_LR_FRAC = 0.0
MUON_MOMENTUM_START = 0.85
MUON_MOMENTUM_END = 0.95
MUON_MOMENTUM_STEPS = 300
# Time budgets: a step's update takes at most this share of the FLOPs of its passes, as long as so
# many steps are left.
MOST_UPDATE_SHARE = 1 / 4
MIN_TIMED_STEPS = 150
# Small budgets: a run needs at least this many steps, and below this batch the learning rates stop
# shrinking with it.
MIN_STEPS = 1500
LR_FLOOR_BATCH_TOKENS = 2**16
# The rates of tables and head stop at a larger one if these have many rows, which are seen rarely.
TABLE_LR_FLOOR_BATCH_TOKENS = 2**17
MANY_ROWS = 1024

Group = dict[str, float]  # settings of one parameter group, as optim.Optimizer takes them


def derive_batch_tokens(tokens: float, reference_tokens: float) -> int:
    """B for a horizon of D tokens: B_ref (D / D_ref)^0.383 as a power of two (arXiv 2505.13738), at
    most D / MIN_STEPS."""
    # Powers of two, which every power-of-two number of devices and rows divides.
    published = math.log2(REFERENCE_BATCH_TOKENS * (tokens / reference_tokens) ** 0.383)
    most = math.log2(max(1, tokens / MIN_STEPS))
    return 2 ** max(0, min(round(published), math.floor(most)))


def timed_batch_tokens(tokens: float, update_flops: int, flops_per_token: int) -> int:
    """The smallest B for a time budget of about D tokens, a power of two: the update takes at most
    MOST_UPDATE_SHARE of the FLOPs of the passes, but B is at most D / MIN_TIMED_STEPS.

    In a smaller batch updates take time that is better spent on more tokens."""
    wanted = math.log2(max(1, update_flops / MOST_UPDATE_SHARE / flops_per_token))
    most = math.log2(max(1, tokens / MIN_TIMED_STEPS))
    return 2 ** min(math.ceil(wanted), math.floor(most))


def derive_rows(
    tokens: float,
    reference_tokens: float,
    row_tokens: int,
    device_rows: int,
    least_batch_tokens: int = 1,
) -> int:
    """Rows a step for a horizon of D tokens: derive_batch_tokens() or the least batch, rounded up
    to whole passes of all devices (device_rows) and at least one."""
    batch_tokens = max(derive_batch_tokens(tokens, reference_tokens), least_batch_tokens)
    rows = batch_tokens / row_tokens
    return round_up(max(1, round(rows)), device_rows)


def lr_factor(batch_tokens: int) -> float:
    """Factor on every learning rate for a batch: sqrt(B / B_ref), constant below
    LR_FLOOR_BATCH_TOKENS."""
    return math.sqrt(max(batch_tokens, LR_FLOOR_BATCH_TOKENS) / REFERENCE_BATCH_TOKENS)


def table_factor(batch_tokens: int, vocab_size: int) -> float:
    """Factor on the learning rates of tables and head, beside lr_factor(): 1 from
    TABLE_LR_FLOOR_BATCH_TOKENS on, and for less than MANY_ROWS."""
    if vocab_size < MANY_ROWS:
        return 1.0
    return lr_factor(max(batch_tokens, TABLE_LR_FLOOR_BATCH_TOKENS)) / lr_factor(batch_tokens)


def decay_factor(batch_tokens: int, tokens: float, reference_tokens: float) -> float:
    """Factor on weight decay that keeps lr x decay x steps, the share of a weight that is renewed
    over a run, constant.

    Above the floor this is sqrt(B / B_ref) D_ref / D (constant T_epoch, arXiv 2405.13698). A run of
    fewer than MIN_STEPS decays no faster than one of MIN_STEPS."""
    tokens = max(tokens, MIN_STEPS * batch_tokens)
    share = (batch_tokens / REFERENCE_BATCH_TOKENS) * (reference_tokens / tokens)
    return share / lr_factor(batch_tokens)


@dataclass(frozen=True)
class BaseRates:
    """Learning rates, betas and decay at the reference batch and width, before they are scaled."""

    optimizer: str  # of the matrices: muon or adamw
    matrix_lr: float
    embedding_lr: float
    unembedding_lr: float
    scalar_lr: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "BaseRates":
        """Those of the flags; -1 stands for the rate that suits --arch or --optimizer."""

        # A rate of 0 freezes tables and head, so only -1 stands for the default.
        def given_or(value: float, default: float) -> float:
            return default if value == -1 else value

        return cls(
            optimizer=args.optimizer,
            matrix_lr=given_or(args.matrix_lr, MATRIX_LR[args.optimizer]),
            embedding_lr=given_or(args.embedding_lr, EMBEDDING_LR[args.arch]),
            unembedding_lr=given_or(args.unembedding_lr, UNEMBEDDING_LR[args.arch]),
            scalar_lr=args.scalar_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
        )


def group_settings(
    base: BaseRates,
    lr_factor: float,
    decay_factor: float,
    width: int,
    table_factor: float = 1.0,
) -> dict[str, Group]:
    """Optimizer settings of each parameter group, as optim.Optimizer takes them.

    The factors are those of the batch, the horizon and the vocabulary; Adam's rates also shrink
    with the width, by (width / REFERENCE_WIDTH)^-1/2."""
    adam_factor = lr_factor * (width / REFERENCE_WIDTH) ** -0.5
    decay = base.weight_decay * decay_factor

    def adamw(lr: float, eps: float = EPS, weight_decay: float = 0.0) -> Group:
        return {
            "lr": lr * adam_factor,
            "beta1": base.adam_beta1,
            "beta2": base.adam_beta2,
            "eps": eps,
            "weight_decay": weight_decay,
        }

    # Orthogonalised updates have the same size at every width, so Muon's rate does not follow it.
    if base.optimizer == "muon":
        lr = base.matrix_lr * lr_factor
        matrices = {"lr": lr, "beta2": MUON_BETA2, "weight_decay": decay}
    else:
        matrices = adamw(base.matrix_lr, weight_decay=decay)
    return {
        "matrices": matrices,
        "embedding": adamw(base.embedding_lr * table_factor),
        "value_embeddings": adamw(base.embedding_lr * table_factor),
        "unembedding": adamw(base.unembedding_lr * table_factor),
        "scalars": adamw(base.scalar_lr * SCALAR_LR_FACTOR, eps=SCALAR_EPS),
    }


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate over a run, whatever its number of steps.

    warmup_steps: -1 takes warmup_ratio x steps. cosine has no warm-down of its own."""

    shape: str  # trapezoid or cosine
    warmup_ratio: float
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> "Schedule":
        """That of the flags."""
        return cls(
            shape=args.lr_schedule,
            warmup_ratio=args.warmup_ratio,
            warmup_steps=args.warmup_steps,
            warmdown_ratio=args.warmdown_ratio,
            final_lr_frac=args.final_lr_frac,
        )

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps."""
        return self.warmup_steps if self.warmup_steps != -1 else round(self.warmup_ratio * steps)

    def warmdown(self, steps: int) -> int:
        """Steps of warm-down in a run of so many steps."""
        return 0 if self.shape == "cosine" else round(self.warmdown_ratio * steps)


def lr_multiplier(
    step: float,
    steps: int,
    warmup_steps: int,
    warmdown_steps: int,
    final_lr_frac: float,
    shape: str,
) -> float:
    """Factor on the learning rates at update `step` (0 is the first) of `steps`; the first is
    never 0. A step between two updates is as good.

    trapezoid: linear warm-up, constant, linear warm-down to final_lr_frac. cosine: linear warm-up,
    then half a cosine."""
    # Divided by one more, so that neither the first step is wasted nor the last one repeated.
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if shape == "cosine":
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return final_lr_frac + (1 - final_lr_frac) * 0.5 * (1 + math.cos(math.pi * progress))
    if steps - step >= warmdown_steps:
        return 1.0
    left = (steps - step) / warmdown_steps
    return final_lr_frac + (1 - final_lr_frac) * left


def muon_momentum(step: int) -> float:
    """Muon's momentum at update `step`: rises linearly over the first updates, while gradients
    still turn quickly."""
    share = min(1.0, step / MUON_MOMENTUM_STEPS)
    return MUON_MOMENTUM_START + share * (MUON_MOMENTUM_END - MUON_MOMENTUM_START)
