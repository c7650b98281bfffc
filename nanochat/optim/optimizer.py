"""Muon for matrices and AdamW for the rest, in one optimizer that averages gradients over the ranks
and shards its state among them.

A step has two phases:

reduce()  Gradients are averaged over the ranks, each rank keeping its share (reduce-scatter).
step()    Each rank updates its share of the parameters, then the shares are put together again
          (all-gather).

With --shard every rank keeps its rows of a parameter and nothing else, gradients are averaged by
the backward pass, and the step only exchanges what Muon needs of matrices (sharded_parts.py).

Communication overlaps with computation: gathered shares travel while later parts compute their
updates; gradients travel, where `early` is set, while the backward pass makes those of other parts.
With one rank the share is everything and communication is skipped; the code is the same."""

from collections.abc import Mapping

import torch

from nanochat.common import ceil_div
from nanochat.optim.loss_scaler import LossScaler
from nanochat.optim.parts import FlatParameters, MatrixStack, Settings, State
from nanochat.optim.sharded_parts import ShardedParameter, ShardedStack
from nanochat.optim.sharding import is_split
from nanochat.ranks import from_rank0, sum_over_ranks, world_size

Part = MatrixStack | FlatParameters | ShardedStack | ShardedParameter
# Pieces of a stack that several ranks exchange, at most.
PIECES = 3
# The group whose parameters are a few numbers each: lambdas, gates and norms. They travel together,
# since each exchange takes as long as a message does.
SMALL = "scalars"


def cuts_by_depth(n: int, ranks: int) -> list[range]:
    """How a stack of n matrices, first layer first, is cut into pieces that travel one by one.

    The backward pass makes the gradients of late layers first, and these travel while it makes the
    others. All pieces but that of the first layers have a multiple of `ranks` matrices, so that no
    more padding travels than for the whole stack."""
    if ranks == 1:
        return [range(n)]
    size = ranks * ceil_div(n, PIECES * ranks)
    return [range(max(0, end - size), end) for end in range(n, 0, -size)]


def arrived(part: Part) -> torch.Tensor | None:
    """Wait for what a part exchanges. Returns the whole tensor; None if nothing travels, as on one
    rank."""
    exchange = part.exchange
    if exchange is None:
        return None
    part.exchange = None
    for work in exchange.works:
        work.wait()
    return exchange.whole


class Optimizer:
    """All parameters of a model under one step()."""

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, torch.nn.Parameter]],
        settings: Mapping[str, Settings],
        dtype: torch.dtype,
        cpp: bool = False,
    ) -> None:
        """groups: of Decoder.parameter_groups(). settings: of each group. A group whose settings
        have "beta1" is AdamW's (lr, beta1, beta2, eps, weight_decay); one without is Muon's (lr in
        units of spectral norm per update, beta2, weight_decay). dtype: of Muon's products, bfloat16
        or float32. cpp: as in muon.py."""
        # A group without settings would silently not be trained.
        assert set(groups) == set(settings), "every parameter group needs settings, and only these"
        self.parts: list[Part] = []
        self.parameters = [p for members in groups.values() for p in members.values()]
        sharded = is_split(self.parameters[0])
        stacked = ShardedStack if sharded else MatrixStack
        for group, members in groups.items():
            if "beta1" in settings[group]:
                if sharded:
                    for name, parameter in members.items():
                        self.parts.append(ShardedParameter(name, parameter, settings[group]))
                    continue
                together = [{name: parameter} for name, parameter in members.items()]
                if group == SMALL and members:
                    together = [members]
                self.parts += [FlatParameters(each, settings[group]) for each in together]
                continue
            # One batched product for all layers keeps a GPU busy where one matrix does not.
            by_shape: dict[torch.Size, dict[str, torch.nn.Parameter]] = {}
            for name, parameter in members.items():
                by_shape.setdefault(parameter.shape, {})[name] = parameter
            for stack in by_shape.values():
                # the gradients of sharded parameters travel block by block
                cuts = cuts_by_depth(len(stack), 1 if sharded else world_size())
                for piece in cuts:
                    named = list(stack.items())[piece.start : piece.stop]
                    self.parts.append(stacked(dict(named), settings[group], dtype, cpp))
        # parts with much to exchange and little to compute first, so that the others' products
        # cover their communication
        self.parts.sort(key=_is_stack)
        # early: the next backward pass is the last before reduce(), so gradients may travel as soon
        # as they are made
        self.early = False
        self.made: dict[Part, int] = {}
        self.begun = 0
        self.order: list[Part] | None = None
        # the gradients of sharded parameters travel by themselves
        if world_size() > 1 and not sharded:
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
        # what a part takes may let it begin another exchange
        while any(part.exchange for part in self.parts):
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
        """{parameter name: {state name: full tensor}}, independent of the number of ranks; of
        sharded parameters, what this rank holds. Every rank must call it.

        On one rank these are the tensors themselves: save or copy them before the next step()."""
        return {name: tensors for part in self.parts for name, tensors in part.state().items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take the state saved by state(), on any number of ranks; for sharded parameters, this
        rank's part of it."""
        for part in self.parts:
            part.load(state)


def _is_stack(part: Part) -> bool:
    return isinstance(part, (MatrixStack, ShardedStack))
