"""The parts of an optimizer: what is updated together, and what of it each rank computes.

Every rank holds whole parameters; their updates and optimizer state are dealt out to the ranks.
nanochat/optim/sharded_parts.py has the parts for parameters that are split themselves (--shard)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from nanochat.common import round_up
from nanochat.optim.muon import descend, muon_update
from nanochat.ranks import all_gather, rank, reduce_scatter, world_size

Settings = dict[str, float]  # of one parameter group: lr, weight_decay, betas, eps
State = dict[str, dict[str, torch.Tensor]]  # {parameter name: {state name: tensor}}
# the states that have the shape of their parameter
ROW_BY_ROW = ("momentum", "exp_avg", "exp_avg_sq")


@dataclass
class Exchange:
    """What a part has begun to exchange with the other ranks.

    works: what to wait for. whole: what arrives. kept: tensors that must live until then, because
    the exchange reads them."""

    works: Sequence[Any]
    whole: torch.Tensor
    kept: Sequence[torch.Tensor] = ()


class MatrixStack:
    """All matrices of one shape, updated by Muon in one batch. Whole matrices are dealt out to the
    ranks."""

    def __init__(
        self,
        members: Mapping[str, torch.nn.Parameter],
        settings: Settings,
        dtype: torch.dtype,
        cpp: bool,
    ) -> None:
        """members: {parameter name: matrix (R, C)}. dtype: of Muon's products. cpp: as in
        muon.py."""
        self.names = list(members)
        self.parameters = list(members.values())
        self.settings = settings
        self.dtype = dtype
        self.cpp = cpp
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

    def reduce(self) -> None:
        """Take the gradients; on several ranks, begin to average them."""
        grads = [parameter.grad for parameter in self.parameters]
        if world_size() == 1:
            self.grad = torch.stack(grads)
            return
        padding = [torch.zeros_like(grads[0])] * (self.padded - len(grads))
        everything = torch.stack(grads + padding)
        self.grad = torch.empty_like(everything[: self.share])
        self.exchange = Exchange([reduce_scatter(self.grad, everything)], everything)

    def step(self, lr: float, mu: float) -> None:
        """Update this rank's matrices. lr: in units of spectral norm per update. mu: momentum."""
        beta2, decay = self.settings["beta2"], self.settings["weight_decay"]
        states = self.momentum, self.second
        update, scale = muon_update(self.grad, *states, mu, beta2, self.dtype, self.cpp)
        self.grad = None
        matrices = [parameter.data for parameter in self.parameters]
        own = matrices[self.first : self.first + self.share]
        # the last ranks may have fewer, or none
        n = len(own)
        if n:
            descend(own, update[:n], scale[:n], own[0].shape, lr, decay, self.cpp)
        if world_size() == 1:
            return
        # with zeros where the last share is short
        sent = torch.stack(own + [torch.zeros_like(matrices[0])] * (self.share - n))
        gathered = torch.empty(self.padded, *sent.shape[1:], device=sent.device)
        self.exchange = Exchange([all_gather(gathered, sent)], gathered, kept=[sent])

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


def adam_update(
    weights: torch.Tensor,
    grad: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lr: float,
    settings: Settings,
) -> None:
    """Change weights in place by AdamW's update (arXiv 1711.05101), and the moments with them.

    moments: (exp_avg, exp_avg_sq, steps), of which the last is 0-D."""
    exp_avg, exp_avg_sq, steps = moments
    # torch's own fused kernel: one pass over the elements, on CPUs too.
    adamw(
        [weights],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [steps],
        fused=True,
        amsgrad=False,
        maximize=False,
        lr=lr,
        beta1=settings["beta1"],
        beta2=settings["beta2"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


class FlatParameters:
    """Parameters updated by AdamW together: their elements, one parameter after the other, are
    dealt out to the ranks."""

    def __init__(self, members: Mapping[str, torch.nn.Parameter], settings: Settings) -> None:
        """members: {parameter name: parameter}."""
        self.names = list(members)
        self.parameters = list(members.values())
        # A single one is updated in place, through a flat view.
        assert all(parameter.is_contiguous() for parameter in self.parameters), self.names
        self.settings = settings
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.padded = round_up(sum(self.sizes), world_size())
        self.share = self.padded // world_size()
        self.grad: torch.Tensor | None = None
        self.exchange: Exchange | None = None
        device = self.parameters[0].device
        self.exp_avg = torch.zeros(self.share, device=device)
        self.exp_avg_sq = torch.zeros(self.share, device=device)
        self.steps = torch.zeros((), device=device)

    @property
    def is_view(self) -> bool:
        """Whether the parameter itself is flat, and no copy of several or with padding."""
        return len(self.parameters) == 1 and self.padded == self.sizes[0]

    def _flat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """All elements in one dimension, zero-padded to a multiple of the ranks; a view if
        is_view."""
        flat = [tensor.reshape(-1) for tensor in tensors]
        missing = self.padded - sum(self.sizes)
        if missing:
            flat.append(flat[0].new_zeros(missing))
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _own(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's share of a flat tensor, as a view."""
        return flat[rank() * self.share : (rank() + 1) * self.share]

    def reduce(self) -> None:
        """Take the gradients; on several ranks, begin to average them."""
        flat = self._flat([parameter.grad for parameter in self.parameters])
        if world_size() == 1:
            self.grad = flat
            return
        self.grad = torch.empty_like(self.exp_avg)
        self.exchange = Exchange([reduce_scatter(self.grad, flat)], flat)

    def step(self, lr: float, mu: float) -> None:
        """Update this rank's elements. mu is Muon's and plays no part."""
        flat = self._flat([parameter.data for parameter in self.parameters])
        own = self._own(flat)
        moments = (self.exp_avg, self.exp_avg_sq, self.steps)
        adam_update(own, self.grad, moments, lr, self.settings)
        self.grad = None
        if world_size() == 1:
            self.take(flat)
            return
        self.exchange = Exchange([all_gather(flat, own)], flat)

    def take(self, flat: torch.Tensor) -> None:
        """Set the parameters to a whole flat tensor."""
        if not self.is_view:
            targets = [parameter.data for parameter in self.parameters]
            torch._foreach_copy_(targets, self._whole(flat))

    def _whole(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a flat tensor, with the shapes of the parameters."""
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [
            part.view(parameter.shape)
            for part, parameter in zip(parts, self.parameters, strict=True)
        ]

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds."""
        return [self.exp_avg, self.exp_avg_sq, self.steps]

    def state(self) -> State:
        """Full tensors by parameter name; every rank must call it."""
        whole: State = {name: {"steps": self.steps} for name in self.names}
        for key in ("exp_avg", "exp_avg_sq"):
            flat = getattr(self, key)
            if world_size() > 1:
                gathered = torch.empty(self.padded, device=flat.device)
                all_gather(gathered, flat).wait()
                flat = gathered
            for name, tensor in zip(self.names, self._whole(flat), strict=True):
                whole[name][key] = tensor
        return whole

    def load(self, state: State) -> None:
        """Take this rank's share of what state() returned."""
        for key in ("exp_avg", "exp_avg_sq"):
            flat = self._flat([state[name][key] for name in self.names])
            getattr(self, key).copy_(self._own(flat))
        # parameters that are updated together have been updated as often
        self.steps.copy_(state[self.names[0]]["steps"])
