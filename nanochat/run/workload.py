"""A model with made-up tokens on this machine's device, and timings of the parts of its training
step: what `nanochat bench` and `nanochat doctor --gpu` measure.

Shapes: B rows, T tokens of a row, C width, V vocabulary, H query heads, D head dim."""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from nanochat import hardware
from nanochat.common import UsageError
from nanochat.model import fp8
from nanochat.model.attention import BACKENDS, attention, pick_backend, usable_backends, visible
from nanochat.model.build import build, meta_model
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import LOGIT_SOFTCAP
from nanochat.model.loss import linear_cross_entropy, pick_loss
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.muon import update_flops, updates_problem
from nanochat.optim.optimizer import Optimizer
from nanochat.optim.step import accumulate, forward_backward
from nanochat.run import compiler
from nanochat.run.plan import model_config
from nanochat.run.timing import Entry, measured

# Settings of the parameter groups; their values do not change the speed.
MATRICES = {"lr": 0.02, "beta2": 0.9, "weight_decay": 0.1}
ADAMW = {"lr": 1e-4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class Shape:
    """Which model is timed and on how many rows: train.py's flags of these names, all given."""

    arch: str
    depth: int
    aspect_ratio: int
    head_dim: int
    n_kv_head: int
    max_seq_len: int
    window_pattern: str
    short_window: int
    vocab_size: int
    device_batch_size: int
    activation_checkpointing: bool = False
    fp8: bool = False
    fp8_recipe: str = "tensorwise"


@dataclass(frozen=True)
class Setup:
    """A Shape on a device, with everything chosen that decides how fast it is."""

    shape: Shape
    config: GPTConfig
    device: torch.device
    dtype: torch.dtype
    attention: str
    compiled: bool

    @property
    def dtype_name(self) -> str:
        """The compute dtype as --dtype spells it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return self.shape.device_batch_size * self.config.max_seq_len

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training, per token."""
        return meta_model(self.config).flops_per_token()

    @property
    def head_flops(self) -> int:
        """FLOPs of the head's three products, per token."""
        return 6 * self.config.width * self.config.vocab_size

    def settings(self) -> dict:
        """What has to be equal for times to be comparable, for JSON."""
        chosen = {"dtype": self.dtype_name, "attention": self.attention, "compiled": self.compiled}
        return chosen | asdict(self.shape)


def config_of(shape: Shape) -> GPTConfig:
    """The model that a Shape describes. Raises ValueError if there is none."""
    return model_config(
        Namespace(**asdict(shape), tie_embeddings=False, dropout=0.0), shape.vocab_size
    )


def open_setup(
    shape: Shape,
    *,
    device_type: str = "",
    dtype: str = "auto",
    compile: bool = True,
    attention: str = "auto",
) -> Setup:
    """Prepare this process and choose what train.py would choose for these flags.

    Raises UsageError for flags that describe no model, or that this machine cannot honour."""
    if attention not in ("auto", *BACKENDS):
        raise UsageError(
            f"--attention={attention}: unknown backend; choose auto, {' or '.join(BACKENDS)}"
        )
    device_type = hardware.pick_device_type(device_type)
    hardware.prepare(device_type)
    compute_dtype, _ = hardware.pick_dtype(dtype, device_type, training=True)
    try:
        config = config_of(shape)
    except ValueError as error:
        raise UsageError(f"these flags describe no model: {error}") from error
    no_compiler = compiler.problem(device_type) if compile else "--no-compile"
    backend, _ = pick_backend(
        attention, device_type, compute_dtype, shape.head_dim, no_compiler=no_compiler
    )
    # Asked on the meta device: a refusal should not wait for weights to be drawn.
    if shape.fp8:
        fp8.require(meta_model(config), device_type, compute_dtype, no_compiler)
    return Setup(
        shape, config, torch.device(device_type), compute_dtype, backend, compiled=not no_compiler
    )


class TrainingStep:
    """A model in training mode with its optimizer and one batch of made-up tokens, warmed up."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.device = setup.device
        config = setup.config
        shape = setup.shape
        self.model = build(config, setup.device, setup.dtype, setup.attention, seed=1).train()
        self.model.checkpointing = shape.activation_checkpointing
        if shape.fp8:
            fp8.convert(self.model, shape.fp8_recipe)
        if setup.compiled:
            self.model.compile_parts()
        groups = self.model.parameter_groups()
        settings = dict.fromkeys(groups, ADAMW) | {"matrices": MATRICES}
        # Muon's products are in bf16 or fp32, as in train.py: fp16 could overflow in them.
        muon_dtype = torch.float32 if setup.dtype == torch.float16 else setup.dtype
        cpp = not updates_problem(setup.device.type, setup.compiled)
        self.optimizer = Optimizer(groups, settings, muon_dtype, cpp)
        ids = torch.randint(
            config.vocab_size,
            (shape.device_batch_size, config.max_seq_len + 1),
            generator=torch.Generator().manual_seed(1),
        ).to(setup.device)
        # Views of one tensor, as in a training row: the target of a token is the one after it.
        self.inputs = ids[:, :-1]
        self.targets = ids[:, 1:]
        self.scaler = LossScaler(enabled=setup.dtype == torch.float16)
        # Everything that is compiled is compiled here, so that no timing contains it.
        started = time.perf_counter()
        for _ in range(2):
            self.step()
        hardware.synchronize(setup.device.type)
        self.warm_up_seconds = time.perf_counter() - started

    def loss(self) -> torch.Tensor:
        """The forward pass: mean loss in nats, a 0-D tensor."""
        return self.model(self.inputs, self.targets, reduction="mean")

    def forward_backward(self) -> torch.Tensor:
        """The passes of one micro-batch; gradients are added to those that exist. Returns its mean
        loss in nats, detached."""
        batch = self.inputs, self.targets
        return forward_backward(self.model, self.scaler, batch, 1, self.device)

    def update(self, loss: torch.Tensor) -> None:
        """The optimizer's part of a step. loss: of its micro-batches."""
        self.optimizer.reduce(loss, self.scaler)
        self.optimizer.step(1.0, MUON_MOMENTUM)

    def step(self) -> None:
        """One training step of one micro-batch."""
        self.optimizer.zero_grad()
        batch = self.inputs, self.targets
        self.update(accumulate(self.model, self.optimizer, self.scaler, [batch], self.device))

    def time_step(self, repeats: int) -> Entry:
        """A whole step."""
        # Gradients are dropped outside the timing, so that the peak memory does not count old ones.
        tokens = self.setup.tokens
        return measured(
            "step",
            self.step,
            self.device,
            repeats,
            self.optimizer.zero_grad,
            tokens=tokens,
            flops=self.setup.flops_per_token * tokens,
        )

    def time_accumulation(self, repeats: int) -> Entry:
        """A micro-batch that adds to gradients, as all of a batch do but the first."""
        return measured("micro-batch", self.forward_backward, self.device, repeats)

    def time_forward(self, repeats: int) -> Entry:
        """The forward pass, in which the head's loss already computes its gradients."""
        tokens = self.setup.tokens
        head_flops = self.setup.head_flops
        # A third of the FLOPs of training, but for the head: the two products of its gradients
        # belong to the forward pass here.
        return measured(
            "forward",
            self.loss,
            self.device,
            repeats,
            tokens=tokens,
            flops=(self.setup.flops_per_token + 2 * head_flops) / 3 * tokens,
            note="with the head's gradients",
        )

    def time_backward(self, repeats: int) -> Entry:
        """The backward pass, of a forward pass that is not timed."""
        tokens = self.setup.tokens
        losses = []

        # Each graph can be used once, so each backward pass gets a forward pass of its own.
        def forward() -> None:
            losses.append(self.loss())
            self.optimizer.zero_grad()

        def backward() -> None:
            losses.pop().backward()

        return measured(
            "backward",
            backward,
            self.device,
            repeats,
            forward,
            tokens=tokens,
            flops=2 / 3 * (self.setup.flops_per_token - self.setup.head_flops) * tokens,
        )

    def time_update(self, repeats: int) -> Entry:
        """The optimizer's part of a step, always with the same gradients."""
        self.optimizer.zero_grad()
        loss = self.forward_backward()
        # The update consumes the gradients; computing them anew each time would take much longer.
        gradients = [parameter.grad for parameter in self.optimizer.parameters]

        def restore() -> None:
            for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
                parameter.grad = gradient

        def update() -> None:
            self.update(loss)

        return measured("optimizer", update, self.device, repeats, restore, flops=self.muon_flops())

    def muon_flops(self) -> int:
        """FLOPs of orthogonalisation."""
        matrices = self.model.parameter_groups()["matrices"].values()
        return update_flops(matrices)


def windows_of(config: GPTConfig) -> list[int]:
    """The different windows of the model's layers, none larger than the context."""
    return sorted({min(window, config.max_seq_len) for window in config.windows()})


def ways_of_attention(setup: Setup) -> dict[str, Callable[..., torch.Tensor]]:
    """{name: function(q, k, v, window=...)} of the backends that run here, and of plain PyTorch."""
    function = attention
    if setup.compiled:
        # In isolation, where the model compiles it together with its block.
        function = torch.compile(attention, dynamic=False)
    names = usable_backends(
        setup.device.type,
        dtype=setup.dtype,
        head_dim=setup.config.head_dim,
        no_compiler=None if setup.compiled else "--no-compile",
    )
    ways: dict[str, Callable[..., torch.Tensor]] = {}
    for name in names:
        # blocked is meant for CPUs: for a GPU each block of queries would be compiled separately.
        if name != "blocked" or setup.device.type != "cuda":
            ways[f"attention {name}"] = partial(function, backend=name)
    return ways | {"attention, plain PyTorch": plain_attention}


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """nanochat.model.attention.attention() as plain PyTorch, with all scores in memory together."""
    T, H, D = q.shape[1:]
    S = k.size(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Each key/value head serves a group of query heads.
    k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    # fp32, because a softmax over thousands of bf16 scores would lose digits.
    scores = (q @ k.mT * D**-0.5).float()
    scores = scores.masked_fill(~visible(T, S, window, q.device), float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def time_attention(
    setup: Setup, name: str, window: int, function: Callable[..., torch.Tensor], repeats: int
) -> Entry:
    """function(q, k, v, window=...) forward and backward, on tensors of the model's shape."""
    config = setup.config
    B = setup.shape.device_batch_size
    T = config.max_seq_len
    # Drawn on the CPU, so that all devices get the same numbers.
    generator = torch.Generator().manual_seed(2)
    q, k, v, upstream = (
        torch.randn(B, T, heads, config.head_dim, generator=generator)
        .to(setup.device, setup.dtype)
        .requires_grad_()
        for heads in (config.n_head, config.n_kv_head, config.n_kv_head, config.n_head)
    )

    # Otherwise the passes would add to the gradients of the ones before.
    def forget() -> None:
        q.grad = k.grad = v.grad = None

    def both() -> None:
        function(q, k, v, window=window).backward(upstream)

    return measured(
        f"{name}, window {window}",
        both,
        setup.device,
        repeats,
        forget,
        tokens=B * T,
        # No causal halving, as in the FLOPs of a model.
        flops=12 * config.n_head * config.head_dim * window * B * T,
        note="forward and backward",
    )


def chosen_loss(setup: Setup) -> str:
    """The loss backend that training takes here."""
    return pick_loss(setup.device.type, setup.compiled)[0]


def time_loss(setup: Setup, name: str, backend: str | None, repeats: int) -> Entry:
    """The head's loss with its gradients. backend: of nanochat.model.loss; None: plain PyTorch,
    with the logits of all tokens in memory together."""
    V = setup.config.vocab_size
    C = setup.config.width
    N = setup.tokens
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, C, generator=generator).to(setup.device, setup.dtype).requires_grad_()
    # Scaled so that logits are about 1, as those of a model are early in training.
    weight = (torch.randn(V, C, generator=generator) * C**-0.5).to(setup.device).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator).to(setup.device)

    def ours() -> None:
        linear_cross_entropy(hidden, weight, targets, LOGIT_SOFTCAP, backend=backend).backward()

    def plain() -> None:
        logits = F.linear(hidden, weight.to(hidden.dtype)).float()
        F.cross_entropy(LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP), targets).backward()

    def forget() -> None:
        hidden.grad = weight.grad = None

    entry = measured(
        name,
        ours if backend else plain,
        setup.device,
        repeats,
        forget,
        tokens=N,
        flops=setup.head_flops * N,
        note="forward and backward; memory beyond the gradients",
    )
    if entry.memory_bytes is None:
        return entry
    # Every way has to hold the gradients; what differs is the rest.
    return replace(entry, memory_bytes=entry.memory_bytes - hidden.nbytes - weight.nbytes)
