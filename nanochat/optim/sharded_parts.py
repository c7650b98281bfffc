"""The parts of an optimizer whose parameters are split over the ranks (--shard).

FSDP2 has averaged their gradients over the ranks, and each rank has its rows of every parameter.
AdamW needs no more than these. Muon needs whole matrices: one exchange brings the rows of all
matrices of a stack to the ranks that orthogonalise them, and another one takes the rows back.

Shape legend: N stacked matrices of one shape, R rows, C columns, r rows of this rank, P matrices
that this rank orthogonalises."""

from collections.abc import Mapping

import torch

from nanochat.common import ceil_div, round_up
from nanochat.optim.muon import descend, look_ahead, neuron_scale, orthogonalize
from nanochat.optim.parts import Exchange, Settings, State, adam_update
from nanochat.optim.sharding import own_part, own_rows
from nanochat.ranks import all_gather, all_to_all, rank, world_size


class ShardedStack:
    """All matrices of one shape, updated by Muon. The momentum is split as the matrices are; the
    second moment is where a matrix is orthogonalised."""

    def __init__(
        self,
        members: Mapping[str, torch.nn.Parameter],
        settings: Settings,
        dtype: torch.dtype,
        cpp: bool,
    ) -> None:
        """members: {parameter name: sharded matrix (R, C)}. dtype: of Muon's products, and of what
        travels. cpp: as in muon.py."""
        self.names = list(members)
        self.parameters = list(members.values())
        self.settings = settings
        self.dtype = dtype
        self.cpp = cpp
        self.shape = self.parameters[0].shape
        R, C = self.shape
        device = self.parameters[0].device
        # all blocks of rows are equal on the way; the last ranks may have fewer, or none
        self.block = ceil_div(R, world_size())
        self.rows = own_rows(R)
        self.padded = round_up(len(self.names), world_size())
        self.share = self.padded // world_size()
        self.first = rank() * self.share
        self.grad: torch.Tensor | None = None
        self.exchange: Exchange | None = None
        self.lr = 0.0
        # (padded, R, 1) or (padded, 1, C): of the update that is on its way back
        self.scale: torch.Tensor | None = None
        n_rows = self.rows.stop - self.rows.start
        self.momentum = torch.zeros(len(self.names), n_rows, C, device=device)
        second = (R, 1) if R >= C else (1, C)
        self.second = torch.zeros(self.share, *second, device=device)

    def reduce(self) -> None:
        """Take the gradients, which are averaged already."""
        self.grad = torch.stack([own_part(parameter.grad) for parameter in self.parameters])
        # Of large models these are gigabytes.
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, lr: float, mu: float) -> None:
        """Send this rank's rows to where the matrices are orthogonalised. lr: in units of spectral
        norm per update. mu: momentum."""
        self.lr = lr
        # In the dtype of the products: rounding here or there is the same, and less travels.
        ahead_Nxrxc = look_ahead(self.grad, self.momentum, mu, self.dtype, self.cpp)
        self.grad = None
        sent = torch.zeros(
            self.padded, self.block, self.shape[1], dtype=self.dtype, device=ahead_Nxrxc.device
        )
        sent[: len(self.names), : ahead_Nxrxc.size(1)] = ahead_Nxrxc
        self._exchange(sent)

    def _exchange(self, sent: torch.Tensor, *works: object) -> None:
        received = torch.empty_like(sent)
        self.exchange = Exchange([all_to_all(received, sent), *works], received, kept=[sent])

    def take(self, received: torch.Tensor) -> None:
        """Orthogonalise the matrices whose rows arrived, and send the rows back; or, when those
        arrive, change the weights."""
        if self.scale is None:
            self._orthogonalize(received)
        else:
            self._descend(received)

    def _orthogonalize(self, blocks: torch.Tensor) -> None:
        """blocks: (ranks x P, block, C), one after the other as they came from each rank."""
        R, C = self.shape
        n_ranks = world_size()
        # The first dimension of an exchange is the rank: behind it come the matrices, then rows.
        by_matrix = blocks.view(n_ranks, self.share, self.block, C).transpose(0, 1)
        matrices_PxRxC = by_matrix.reshape(self.share, n_ranks * self.block, C)[:, :R]
        update = orthogonalize(matrices_PxRxC, self.dtype, self.cpp)
        own_scale = neuron_scale(update, self.second, self.settings["beta2"], self.cpp)
        self.scale = torch.empty(self.padded, *own_scale.shape[1:], device=own_scale.device)
        # Rows that no rank has fill the last blocks.
        padded = update.new_zeros(self.share, n_ranks * self.block, C)
        padded[:, :R] = update
        by_rank = padded.view(self.share, n_ranks, self.block, C).transpose(0, 1)
        # Beside the rows, not in them: the factors are fp32.
        scales = all_gather(self.scale, own_scale)
        self._exchange(by_rank.reshape(self.padded, self.block, C), scales)
        self.exchange.kept = [*self.exchange.kept, own_scale]

    def _descend(self, blocks: torch.Tensor) -> None:
        """blocks: (padded, block, C), this rank's rows of all orthogonalised matrices."""
        n, n_rows = self.momentum.shape[:2]
        scale = self.scale[:n]
        self.scale = None
        # One factor for each row of a tall matrix, of which these are some; of a wide one, for each
        # column.
        if self.shape[0] >= self.shape[1]:
            scale = scale[:, self.rows]
        update_Nxrxc = blocks[:n, :n_rows].contiguous()
        own = [own_part(parameter.data) for parameter in self.parameters]
        decay = self.settings["weight_decay"]
        descend(own, update_Nxrxc, scale.contiguous(), self.shape, self.lr, decay, self.cpp)

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds."""
        return [self.momentum, self.second]

    def state(self) -> State:
        """What this rank holds, by parameter name: its rows of each momentum, and the second
        moments of the matrices that it orthogonalises."""
        whole: State = {
            name: {"momentum": own} for name, own in zip(self.names, self.momentum, strict=True)
        }
        for name, second in zip(self.names[self.first :], self.second, strict=False):
            whole[name]["second"] = second
        return whole

    def load(self, state: State) -> None:
        """Take this rank's part of {parameter name: {state name: tensor}}, momentum by its rows and
        second moments whole."""
        for own, name in zip(self.momentum, self.names, strict=True):
            own.copy_(state[name]["momentum"])
        for own, name in zip(self.second, self.names[self.first :], strict=False):
            own.copy_(state[name]["second"])


class ShardedParameter:
    """One parameter updated by AdamW, of which this rank has some rows."""

    def __init__(self, name: str, parameter: torch.nn.Parameter, settings: Settings) -> None:
        self.name = name
        self.parameter = parameter
        self.parameters = [parameter]
        self.settings = settings
        self.grad: torch.Tensor | None = None
        # nothing of it travels
        self.exchange: Exchange | None = None
        own = own_part(parameter.data)
        self.exp_avg = torch.zeros_like(own)
        self.exp_avg_sq = torch.zeros_like(own)
        self.steps = torch.zeros((), device=own.device)

    def reduce(self) -> None:
        """Take the gradient, which is averaged already."""
        self.grad = own_part(self.parameter.grad)
        self.parameter.grad = None

    def step(self, lr: float, mu: float) -> None:
        """Update this rank's rows. mu is Muon's and plays no part."""
        moments = (self.exp_avg, self.exp_avg_sq, self.steps)
        adam_update(own_part(self.parameter.data), self.grad, moments, lr, self.settings)
        self.grad = None

    def own_tensors(self) -> list[torch.Tensor]:
        """The state that this rank holds."""
        return [self.exp_avg, self.exp_avg_sq, self.steps]

    def state(self) -> State:
        """What this rank holds: its rows of the moments, and the number of steps."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}
        return {self.name: moments}

    def load(self, state: State) -> None:
        """Take what state() returned, or the same rows of whole tensors."""
        for key, saved in state[self.name].items():
            getattr(self, key).copy_(saved)
