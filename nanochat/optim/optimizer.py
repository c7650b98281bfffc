"""Muon for matrices and AdamW for the rest, in one optimizer that averages gradients over the ranks
and shards its state among them.

A step has two phases:

reduce()  Gradients are averaged over the ranks, each rank keeping its share (reduce-scatter).
step()    Each rank updates its share of the parameters, then the shares are put together again
          (all-gather).

Communication overlaps with computation: gathered shares travel while later parts compute their
updates; gradients travel, where `early` is set, while the backward pass makes those of other parts.
With one rank the share is everything and communication is skipped; the code is the same.

Shape legend: N stacked matrices of one shape, R rows (outputs), C columns (inputs), S the side of a
matrix along which NorMuon keeps its second moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from nanochat.common import round_up
from nanochat.optim.loss_scaler import LossScaler
from nanochat.ranks import all_gather, from_rank0, rank, reduce_scatter, sum_over_ranks, world_size

# Quintic coefficients of Polar Express (arXiv 2505.16932), five steps from a lower singular-value
# bound of 1e-3, with the paper's safety factor of 1.02 folded in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

Settings = dict[str, float]  # of one parameter group: lr, weight_decay, betas, eps
State = dict[str, dict[str, torch.Tensor]]  # {parameter name: {state name: tensor}}


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


def muon_update(
    grad_NxRxC: torch.Tensor,
    momentum_NxRxC: torch.Tensor,
    second_NxS: torch.Tensor,
    mu: float,
    beta2: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The update direction of one stack, fp32 (N, R, C); both states are changed in place.

    Nesterov momentum, orthogonalisation, then NorMuon's second moment per neuron (arXiv 2510.05491)
    with the Frobenius norm restored. The moment is kept per row of tall matrices and per column of
    wide ones: in the other direction orthogonalisation already equalises the norms.

    mu: momentum. beta2: of the second moment. dtype: of the products."""
    # A running mean, so that the size of the momentum does not depend on mu.
    momentum_NxRxC.lerp_(grad_NxRxC, 1 - mu)
    update = orthogonalize(torch.lerp(grad_NxRxC, momentum_NxRxC, mu), dtype).float()
    along = -1 if update.size(-2) >= update.size(-1) else -2
    squares = update.square().mean(dim=along, keepdim=True)
    # In fp32: bf16 could not add a twentieth of a small number to a large one.
    second_NxS.lerp_(squares, 1 - beta2)
    scale = second_NxS.clamp_min(1e-10).rsqrt()
    before = squares.sum(dim=(-2, -1), keepdim=True)
    after = (squares * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return update * (scale * (before / after.clamp_min(1e-20)).sqrt())


@dataclass
class Exchange:
    """What a part has begun to exchange with the other ranks.

    work: what to wait for. whole: the tensor of all shares. kept: a tensor that must live until
    then, because the exchange reads it."""

    work: Any
    whole: torch.Tensor
    kept: torch.Tensor | None = None


class MatrixStack:
    """All matrices of one shape, updated by Muon in one batch. Whole matrices are dealt out to the
    ranks."""

    def __init__(
        self,
        members: Mapping[str, torch.nn.Parameter],
        settings: Settings,
        dtype: torch.dtype,
    ) -> None:
        """members: {parameter name: matrix (R, C)}. dtype: of Muon's products."""
        self.names = list(members)
        self.parameters = list(members.values())
        self.settings = settings
        self.dtype = dtype
        shape = self.parameters[0].shape
        device = self.parameters[0].device
        # Whole matrices, since orthogonalisation needs all of one.
        self.padded = round_up(len(self.names), world_size())
        self.share = self.padded // world_size()
        self.first = rank() * self.share
        self.grad: torch.Tensor | None = None
        self.exchange: Exchange | None = None
        self.momentum = torch.zeros(self.share, *shape, device=device)
        second = (shape[0], 1) if shape[0] >= shape[1] else (1, shape[1])
        self.second = torch.zeros(self.share, *second, device=device)

    def _own(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Stack this rank's share of a list of matrices, with zeros where the last share is
        short."""
        own = tensors[self.first : self.first + self.share]
        return torch.stack(own + [torch.zeros_like(tensors[0])] * (self.share - len(own)))

    def reduce(self) -> None:
        """Take the gradients; on several ranks, begin to average them."""
        grads = [parameter.grad for parameter in self.parameters]
        if world_size() == 1:
            self.grad = torch.stack(grads)
            return
        padding = [torch.zeros_like(grads[0])] * (self.padded - len(grads))
        everything = torch.stack(grads + padding)
        self.grad = torch.empty_like(everything[: self.share])
        self.exchange = Exchange(reduce_scatter(self.grad, everything), everything)

    def step(self, lr: float, mu: float) -> None:
        """Update this rank's matrices. lr: in units of spectral norm per update. mu: momentum."""
        decay = self.settings["weight_decay"]
        beta2 = self.settings["beta2"]
        update = muon_update(self.grad, self.momentum, self.second, mu, beta2, self.dtype)
        # Stacked anew each step: the model's layers own their weights, not the optimizer.
        own = self._own([parameter.data for parameter in self.parameters])
        # cautious decay: only where the update already moves the weight towards zero
        # (arXiv 2510.12402)
        kept = own * (update * own > 0) if decay else None
        # Tall matrices take larger steps, so that each changes its outputs by as much.
        own -= lr * max(1.0, own.size(-2) / own.size(-1)) ** 0.5 * update
        if decay:
            own -= lr * decay * kept
        self.grad = None
        if world_size() == 1:
            self.take(own)
            return
        gathered = torch.empty(self.padded, *own.shape[1:], device=own.device)
        self.exchange = Exchange(all_gather(gathered, own), gathered, kept=own)

    def take(self, stack: torch.Tensor) -> None:
        """Set the parameters to the matrices of a whole stack, (N or more, R, C)."""
        parameters = [parameter.data for parameter in self.parameters]
        torch._foreach_copy_(parameters, list(stack[: len(self.names)]))

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds."""
        return [self.momentum, self.second]

    def state(self) -> State:
        """Full tensors by parameter name; every rank must call it."""
        whole: State = {}
        for key in ("momentum", "second"):
            own = getattr(self, key)
            if world_size() > 1:
                gathered = torch.empty(self.padded, *own.shape[1:], device=own.device)
                all_gather(gathered, own).wait()
                own = gathered
            for i, name in enumerate(self.names):
                whole.setdefault(name, {})[key] = own[i]
        return whole

    def load(self, state: State) -> None:
        """Take this rank's share of what state() returned."""
        for key in ("momentum", "second"):
            own = getattr(self, key)
            for i, name in enumerate(self.names[self.first : self.first + self.share]):
                own[i].copy_(state[name][key])


class FlatParameter:
    """One parameter updated by AdamW (arXiv 1711.05101). Its flattened elements are dealt out to
    the ranks."""

    def __init__(self, name: str, parameter: torch.nn.Parameter, settings: Settings) -> None:
        assert parameter.is_contiguous(), f"{name}: the update goes through a flat view"
        self.name = name
        self.parameter = parameter
        self.parameters = [parameter]
        self.settings = settings
        self.padded = round_up(parameter.numel(), world_size())
        self.share = self.padded // world_size()
        self.grad: torch.Tensor | None = None
        self.exchange: Exchange | None = None
        self.exp_avg = torch.zeros(self.share, device=parameter.device)
        self.exp_avg_sq = torch.zeros(self.share, device=parameter.device)
        self.steps = torch.zeros((), device=parameter.device)

    def _flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """All elements in one dimension, zero-padded to a multiple of the ranks; a view when
        nothing is padded."""
        flat = tensor.reshape(-1)
        missing = self.padded - flat.numel()
        return torch.cat((flat, flat.new_zeros(missing))) if missing else flat

    def _own(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's share of a flat tensor, as a view."""
        return flat[rank() * self.share : (rank() + 1) * self.share]

    def reduce(self) -> None:
        """Take the gradient; on several ranks, begin to average it."""
        flat = self._flat(self.parameter.grad)
        if world_size() == 1:
            self.grad = flat
            return
        self.grad = torch.empty_like(self.exp_avg)
        self.exchange = Exchange(reduce_scatter(self.grad, flat), flat)

    def step(self, lr: float, mu: float) -> None:
        """Update this rank's elements. mu is Muon's and plays no part."""
        flat = self._flat(self.parameter.data)
        own = self._own(flat)
        # torch's own fused kernel: one pass over the elements, on CPUs too.
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
            beta1=self.settings["beta1"],
            beta2=self.settings["beta2"],
            eps=self.settings["eps"],
            weight_decay=self.settings["weight_decay"],
        )
        self.grad = None
        if world_size() > 1:
            self.exchange = Exchange(all_gather(flat, own), flat)

    def take(self, flat: torch.Tensor) -> None:
        """Set the parameter to a whole flat tensor."""
        # without padding the flat tensor is the parameter
        if self.padded > self.parameter.numel():
            self.parameter.data.copy_(self._whole(flat))

    def _whole(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[: self.parameter.numel()].view(self.parameter.shape)

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """The full parameter-shaped tensor from every rank's share."""
        if world_size() == 1:
            return own.view(self.parameter.shape)
        gathered = torch.empty(self.padded, device=own.device)
        all_gather(gathered, own.contiguous()).wait()
        return self._whole(gathered)

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds."""
        return [self.exp_avg, self.exp_avg_sq, self.steps]

    def state(self) -> State:
        """Full tensors by parameter name; every rank must call it."""
        moments = {
            "exp_avg": self._gather(self.exp_avg),
            "exp_avg_sq": self._gather(self.exp_avg_sq),
            "steps": self.steps,
        }
        return {self.name: moments}

    def load(self, state: State) -> None:
        """Take this rank's share of what state() returned."""
        saved = state[self.name]
        self.exp_avg.copy_(self._own(self._flat(saved["exp_avg"])))
        self.exp_avg_sq.copy_(self._own(self._flat(saved["exp_avg_sq"])))
        self.steps.copy_(saved["steps"])


Part = MatrixStack | FlatParameter


def arrived(part: Part) -> torch.Tensor | None:
    """Wait for what a part exchanges. Returns the whole tensor; None if nothing travels, as on one
    rank."""
    exchange = part.exchange
    if exchange is None:
        return None
    part.exchange = None
    exchange.work.wait()
    return exchange.whole


class Optimizer:
    """All parameters of a model under one step()."""

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, torch.nn.Parameter]],
        settings: Mapping[str, Settings],
        dtype: torch.dtype,
    ) -> None:
        """groups: of Decoder.parameter_groups(). settings: of each group. A group whose settings
        have "beta1" is AdamW's (lr, beta1, beta2, eps, weight_decay); one without is Muon's (lr in
        units of spectral norm per update, beta2, weight_decay). dtype: of Muon's products, bfloat16
        or float32."""
        # A group without settings would silently not be trained.
        assert set(groups) == set(settings), "every parameter group needs settings, and only these"
        self.parts: list[Part] = []
        for group, members in groups.items():
            if "beta1" in settings[group]:
                for name, parameter in members.items():
                    self.parts.append(FlatParameter(name, parameter, settings[group]))
                continue
            # One batched product for all layers keeps a GPU busy where one matrix does not.
            by_shape: dict[torch.Size, dict[str, torch.nn.Parameter]] = {}
            for name, parameter in members.items():
                by_shape.setdefault(parameter.shape, {})[name] = parameter
            for stack in by_shape.values():
                self.parts.append(MatrixStack(stack, settings[group], dtype))
        # parts with much to exchange and little to compute first, so that the others' products
        # cover their communication
        self.parts.sort(key=_is_stack)
        self.parameters = [p for members in groups.values() for p in members.values()]
        # early: the next backward pass is the last before reduce(), so gradients may travel as soon
        # as they are made
        self.early = False
        self.made: dict[Part, int] = {}
        self.begun = 0
        self.order: list[Part] | None = None
        if world_size() > 1:
            for part in self.parts:
                self._watch(part)

    def _watch(self, part: Part) -> None:
        """Call _made() for each gradient of a part that the backward pass has made."""

        def made(parameter: torch.nn.Parameter) -> None:
            self._made(part)

        for parameter in part.parameters:
            parameter.register_post_accumulate_grad_hook(made)

    @torch.no_grad()
    def _made(self, part: Part) -> None:
        """A gradient of a part has been made. Parts begin to exchange in one order, the same on all
        ranks: each waits for those before it."""
        if not self.early:
            return
        # moved behind the others: the last gradient of a part decides its place
        self.made[part] = self.made.pop(part, 0) + 1
        while self.order and self.begun < len(self.order):
            first = self.order[self.begun]
            if self.made.get(first, 0) < len(first.parameters):
                break
            first.reduce()
            self.begun += 1

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def reduce(self, loss: torch.Tensor, scaler: LossScaler) -> tuple[float, float]:
        """Average the gradients, and this rank's loss (0-D), over the ranks.

        scaler: unscales the gradients first. Returns the mean loss and the norm of the averaged
        gradient."""
        # Before averaging: the sum of scaled gradients could overflow.
        scaler.unscale(self.parameters)
        if self.order is None:
            # that in which rank 0's first backward pass made them; parts that it did not watch last
            made = [*self.made, *(part for part in self.parts if part not in self.made)]
            places = from_rank0([self.parts.index(part) for part in made])
            self.order = [self.parts[place] for place in places]
        for part in self.order[self.begun :]:
            part.reduce()
        for part in self.order:
            if arrived(part) is not None:
                part.grad /= world_size()
        # Ready for the next backward pass, whose gradients start to travel again.
        self.early = False
        self.made = {}
        self.begun = 0
        # Each rank has the squares of its share only; their sum is the whole.
        squares = torch.stack([torch.linalg.vector_norm(part.grad) for part in self.parts])
        sums = torch.stack((loss.float() / world_size(), squares.square().sum()))
        loss, squares = sum_over_ranks(sums)
        mean_loss, grad_norm = torch.stack((loss, squares.sqrt())).tolist()
        return mean_loss, grad_norm

    @torch.no_grad()
    def clip(self, norm: float, max_norm: float) -> None:
        """Scale the reduced gradients so that their norm is at most max_norm; 0 is no limit. norm:
        what reduce() returned."""
        if max_norm == 0:
            return
        scale = min(1.0, max_norm / (norm + 1e-6))
        for part in self.parts:
            part.grad = part.grad * scale

    @torch.no_grad()
    def step(self, lr_multiplier: float, mu: float) -> None:
        """Apply the reduced gradients. lr_multiplier scales every group's lr; mu is Muon's momentum
        at this step."""
        for part in self.parts:
            part.step(part.settings["lr"] * lr_multiplier, mu)
        for part in self.parts:
            whole = arrived(part)
            if whole is not None:
                part.take(whole)

    def drop_gradients(self) -> None:
        """Forget reduced gradients without applying them (a skipped step)."""
        for part in self.parts:
            part.grad = None

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds between two steps."""
        return [tensor for part in self.parts for tensor in part.own_tensors()]

    @torch.no_grad()
    def state(self) -> State:
        """{parameter name: {state name: full tensor}}, independent of the number of ranks. Every
        rank must call it.

        On one rank these are the tensors themselves: save or copy them before the next step()."""
        return {name: tensors for part in self.parts for name, tensors in part.state().items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take the state saved by state(), on any number of ranks."""
        for part in self.parts:
            part.load(state)


def _is_stack(part: Part) -> bool:
    return isinstance(part, MatrixStack)
