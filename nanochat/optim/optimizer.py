"""Muon for matrices and AdamW for the rest, in one optimizer that averages gradients and shards its state over ranks.

A step has two phases. reduce(): gradients are averaged over the ranks, each rank keeping its share (reduce-scatter).
step(): each rank updates its share of the parameters, then the shares are put together again (all-gather).
What a part exchanges travels meanwhile: shares while later parts compute their updates, and gradients, where `early` is set,
while the backward pass makes those of other parts.
With one rank the share is everything and the communication is skipped; the code is the same.

Shape legend: N stacked matrices of one shape, R rows (outputs), C columns (inputs)."""

import torch
from torch.optim.adamw import adamw

from nanochat.common import round_up
from nanochat.hardware import compiler_missing
from nanochat.ranks import all_gather, from_rank0, rank, reduce_scatter, sum_over_ranks, world_size

# Quintic coefficients of Polar Express (arXiv 2505.16932), five steps from a lower singular-value bound of 1e-3, with the
# paper's safety factor of 1.02 folded in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

SYMMETRIC_KERNEL = False  # until it has run on a GPU, Gram matrices are plain products
# Side from which half of a Gram matrix is computed and the other mirrored. By counting, not measured: of its 4 x 4 tiles 10 are left;
# at half the side 3 of 4 would be, and eight matrices four times as long as wide are 1.1 GFLOP there, as short as the launch.
SYMMETRIC_SIDE = 512


def orthogonalize(matrices_NxRxC, dtype):
    """Nearest semi-orthogonal matrix of each (U V^T of its SVD), approximately: singular values land near 1.

    Iterates in `dtype` (bfloat16 or float32) on the smaller Gram matrix; returns that dtype. Zero stays zero."""
    X = matrices_NxRxC.to(dtype)
    tall = X.size(-2) > X.size(-1)
    X = X / (
        torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=torch.float32) * 1.02 + 1e-6
    ).to(dtype)
    symmetric_product = _symmetric_product(X)
    for a, b, c in POLAR_EXPRESS:
        # X <- a X + (b A + c A^2) X with A = X X^T, or its mirror image for tall matrices
        if symmetric_product:
            A = symmetric_product(X.mT if tall else X)
            B = symmetric_product(A, add_NxRxR=A, beta=b, alpha=c)
        else:
            A = X.mT @ X if tall else X @ X.mT
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def _symmetric_product(X):
    """The kernel for products of X with itself where it is worth its launch and can be compiled (bf16 needs SM80), or None."""
    if (
        not SYMMETRIC_KERNEL
        or not X.is_cuda
        or X.dtype != torch.bfloat16
        or min(X.shape[-2:]) < SYMMETRIC_SIDE
    ):
        return None
    if torch.cuda.get_device_capability(X.device) < (8, 0) or compiler_missing("cuda"):
        return None
    from nanochat.model.kernels.symmetric_matmul import symmetric_product

    return symmetric_product


def muon_update(grad_NxRxC, momentum_NxRxC, second_NxS, mu, beta2, dtype):
    """The update direction of one stack, fp32; both states are changed in place.

    Nesterov momentum, orthogonalisation, then NorMuon's second moment per neuron (arXiv 2510.05491) with the
    Frobenius norm restored. The moment is kept per row of tall matrices and per column of wide ones: in the other
    direction orthogonalisation already equalises the norms."""
    momentum_NxRxC.lerp_(grad_NxRxC, 1 - mu)
    update = orthogonalize(torch.lerp(grad_NxRxC, momentum_NxRxC, mu), dtype).float()
    along = -1 if update.size(-2) >= update.size(-1) else -2
    squares = update.square().mean(dim=along, keepdim=True)
    second_NxS.lerp_(squares, 1 - beta2)
    scale = second_NxS.clamp_min(1e-10).rsqrt()
    before = squares.sum(dim=(-2, -1), keepdim=True)
    after = (squares * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return update * (scale * (before / after.clamp_min(1e-20)).sqrt())


class MatrixStack:
    """All matrices of one shape, updated by Muon in one batch. Whole matrices are dealt out to the ranks."""

    def __init__(self, members, settings, dtype):
        self.names, self.parameters = list(members), list(members.values())
        self.settings, self.dtype = settings, dtype
        shape, device = self.parameters[0].shape, self.parameters[0].device
        self.padded = round_up(len(self.names), world_size())
        self.share = self.padded // world_size()
        self.first = rank() * self.share
        self.grad = self.exchange = (
            None  # exchange: (what to wait for, the whole tensor, what else to keep)
        )
        self.momentum = torch.zeros(self.share, *shape, device=device)
        second = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
        self.second = torch.zeros(self.share, *second, device=device)

    def _own(self, tensors):
        """Stack this rank's share of a list of matrices, zeros where the last share is short."""
        own = tensors[self.first : self.first + self.share]
        return torch.stack(own + [torch.zeros_like(tensors[0])] * (self.share - len(own)))

    def reduce(self):
        grads = [parameter.grad for parameter in self.parameters]
        if world_size() == 1:
            self.grad = torch.stack(grads)
            return
        everything = torch.stack(grads + [torch.zeros_like(grads[0])] * (self.padded - len(grads)))
        self.grad = torch.empty_like(everything[: self.share])
        self.exchange = reduce_scatter(self.grad, everything), everything

    def step(self, lr, mu):
        decay = self.settings["weight_decay"]
        update = muon_update(
            self.grad, self.momentum, self.second, mu, self.settings["beta2"], self.dtype
        )
        own = self._own([parameter.data for parameter in self.parameters])
        # cautious decay: only where the update already moves the weight towards zero (arXiv 2510.12402)
        kept = own * (update * own > 0) if decay else None
        own -= lr * max(1.0, own.size(-2) / own.size(-1)) ** 0.5 * update
        if decay:
            own -= lr * decay * kept
        self.grad = None
        if world_size() == 1:
            self.take(own)
            return
        gathered = torch.empty(self.padded, *own.shape[1:], device=own.device)
        self.exchange = all_gather(gathered, own), gathered, own

    def take(self, stack):
        """Set the parameters to the matrices of a whole stack."""
        torch._foreach_copy_(
            [parameter.data for parameter in self.parameters], list(stack[: len(self.names)])
        )

    def state(self):
        """{parameter name: {state name: full tensor}}; every rank must call it."""
        whole = {}
        for key in ("momentum", "second"):
            own = getattr(self, key)
            if world_size() > 1:
                gathered = torch.empty(self.padded, *own.shape[1:], device=own.device)
                all_gather(gathered, own).wait()
                own = gathered
            for i, name in enumerate(self.names):
                whole.setdefault(name, {})[key] = own[i]
        return whole

    def load(self, state):
        for key in ("momentum", "second"):
            own = getattr(self, key)
            for i, name in enumerate(self.names[self.first : self.first + self.share]):
                own[i].copy_(state[name][key])


class FlatParameter:
    """One parameter updated by AdamW (arXiv 1711.05101). Its flattened elements are dealt out to the ranks."""

    def __init__(self, name, parameter, settings):
        assert parameter.is_contiguous(), f"{name}: the update goes through a flat view"
        self.name, self.parameter, self.settings = name, parameter, settings
        self.parameters = [parameter]
        self.padded = round_up(parameter.numel(), world_size())
        self.share = self.padded // world_size()
        self.grad = self.exchange = None  # as MatrixStack's
        self.exp_avg = torch.zeros(self.share, device=parameter.device)
        self.exp_avg_sq = torch.zeros(self.share, device=parameter.device)
        self.steps = torch.zeros((), device=parameter.device)

    def _flat(self, tensor):
        """All elements in one dimension, zero-padded to the ranks' common multiple; a view when nothing is padded."""
        flat = tensor.reshape(-1)
        return (
            flat
            if flat.numel() == self.padded
            else torch.cat((flat, flat.new_zeros(self.padded - flat.numel())))
        )

    def _own(self, tensor):
        return self._flat(tensor)[rank() * self.share : (rank() + 1) * self.share]

    def reduce(self):
        flat = self._flat(self.parameter.grad)
        if world_size() == 1:
            self.grad = flat
            return
        self.grad = torch.empty_like(self.exp_avg)
        self.exchange = reduce_scatter(self.grad, flat), flat

    def step(self, lr, mu):
        flat = self._flat(self.parameter.data)
        own = flat[rank() * self.share : (rank() + 1) * self.share]
        settings = self.settings
        adamw(
            [own],
            [self.grad],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=settings["beta1"],
            beta2=settings["beta2"],
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
        )
        self.grad = None
        if world_size() > 1:
            self.exchange = all_gather(flat, own), flat

    def take(self, flat):
        """Set the parameter to a whole flat tensor."""
        if self.padded > self.parameter.numel():  # else the flat tensor is the parameter
            self.parameter.data.copy_(self._whole(flat))

    def _whole(self, flat):
        return flat[: self.parameter.numel()].view(self.parameter.shape)

    def _gather(self, own):
        """The full parameter-shaped tensor from every rank's share."""
        if world_size() == 1:
            return own.view(self.parameter.shape)
        gathered = torch.empty(self.padded, device=own.device)
        all_gather(gathered, own.contiguous()).wait()
        return self._whole(gathered)

    def state(self):
        return {
            self.name: {
                "exp_avg": self._gather(self.exp_avg),
                "exp_avg_sq": self._gather(self.exp_avg_sq),
                "steps": self.steps,
            }
        }

    def load(self, state):
        self.exp_avg.copy_(self._own(state[self.name]["exp_avg"]))
        self.exp_avg_sq.copy_(self._own(state[self.name]["exp_avg_sq"]))
        self.steps.copy_(state[self.name]["steps"])


def arrived(part):
    """Wait for what a part exchanges. Returns the whole tensor; None if nothing travels, as on one rank."""
    if part.exchange is None:
        return None
    (work, whole, *_), part.exchange = part.exchange, None
    work.wait()
    return whole


class Optimizer:
    """All parameters of a model under one step().

    groups: GPT.parameter_groups(). settings: {group: dict}. A group whose settings have "beta1" is AdamW (lr, beta1,
    beta2, eps, weight_decay); one without is Muon (lr in units of spectral norm per update, beta2, weight_decay).
    dtype: that of Muon's products, bfloat16 or float32."""

    def __init__(self, groups, settings, dtype):
        assert set(groups) == set(settings), "every parameter group needs settings, and only these"
        self.parts = []
        for group, members in groups.items():
            if "beta1" in settings[group]:
                self.parts += [
                    FlatParameter(name, p, settings[group]) for name, p in members.items()
                ]
                continue
            by_shape = {}
            for name, parameter in members.items():
                by_shape.setdefault(parameter.shape, {})[name] = parameter
            self.parts += [
                MatrixStack(stack, settings[group], dtype) for stack in by_shape.values()
            ]
        # those with much to exchange and little to compute first, so that the others' products cover it
        self.parts.sort(key=lambda part: isinstance(part, MatrixStack))
        self.parameters = [p for members in groups.values() for p in members.values()]
        # early: the next backward pass is the last before reduce(), so that gradients may travel as soon as they are made
        self.early, self.made, self.begun, self.order = False, {}, 0, None
        if world_size() > 1:
            for part in self.parts:
                for parameter in part.parameters:
                    parameter.register_post_accumulate_grad_hook(
                        lambda _, part=part: self._made(part)
                    )

    @torch.no_grad()
    def _made(self, part):
        """A gradient of a part has been made. Parts begin to exchange in one order, that of all ranks: each waits for those before it."""
        if not self.early:
            return
        self.made[part] = self.made.pop(part, 0) + 1  # behind the others: the last gradient decides
        while self.order and self.begun < len(self.order):
            first = self.order[self.begun]
            if self.made.get(first, 0) < len(first.parameters):
                break
            first.reduce()
            self.begun += 1

    def zero_grad(self, to_zeros=False):
        """Drop the gradients, or (to_zeros) make them zeros, for a rank that has to reduce() without a backward pass."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter) if to_zeros else None

    @torch.no_grad()
    def reduce(self):
        """Average the gradients over the ranks. Returns the norm of the averaged gradient, a 0-D fp32 tensor."""
        if (
            self.order is None
        ):  # that in which rank 0's first backward pass made them, as far as it told
            made = [*self.made, *(part for part in self.parts if part not in self.made)]
            self.order = [
                self.parts[i] for i in from_rank0([self.parts.index(part) for part in made])
            ]
        for part in self.order[self.begun :]:
            part.reduce()
        for part in self.order:
            if arrived(part) is not None:
                part.grad /= world_size()
        self.early, self.made, self.begun = False, {}, 0
        squares = (
            torch.stack([torch.linalg.vector_norm(part.grad) for part in self.parts]).square().sum()
        )
        return sum_over_ranks(squares).sqrt()

    @torch.no_grad()
    def clip(self, norm, max_norm):
        """Scale the reduced gradients so that their norm is at most max_norm; norm (a float) is what reduce() returned."""
        scale = min(1.0, max_norm / (norm + 1e-6))
        for part in self.parts:
            part.grad = part.grad * scale

    @torch.no_grad()
    def step(self, lr_multiplier, mu):
        """Apply the reduced gradients. lr_multiplier scales every group's lr; mu is Muon's momentum at this step."""
        for part in self.parts:
            part.step(part.settings["lr"] * lr_multiplier, mu)
        for part in self.parts:
            if (whole := arrived(part)) is not None:
                part.take(whole)

    def drop_gradients(self):
        """Forget reduced gradients without applying them (a skipped step)."""
        for part in self.parts:
            part.grad = None

    @torch.no_grad()
    def state(self):
        """{parameter name: {state name: full tensor}}, independent of the number of ranks. Every rank must call it.

        On one rank these are the tensors themselves: save or copy them before the next step()."""
        return {name: tensors for part in self.parts for name, tensors in part.state().items()}

    @torch.no_grad()
    def load(self, state):
        """Take the state saved by state(), on any number of ranks."""
        for part in self.parts:
            part.load(state)
