"""How long a step takes on so many devices, what they exchange in it, and where more of them stop
helping: the model behind `train.py --dry-run --gpus=N --gpu=NAME`.

A step is the sum of what a device does one after the other:

passes      FLOPs of its tokens, at a share of its peak.
weights     Each pass reads all weights and adds to all gradients, however few rows it has: a batch
            that is too small for its devices shows here.
update      Muon's products for its share of the matrices, and the memory that is read and written.
gradients   What of the gradients' exchange the backward pass does not hide, and the small sums.
parameters  What of the exchange of updated parameters the updates do not hide.

What is assumed, all in this file:

- Passes and Muon's products reach ASSUMED_MFU of a listed peak, memory all of its listed bandwidth,
  links BUS_SHARE of theirs.
- Every exchange is a ring: of N ranks each sends (N-1)/N of the whole, in fp32, as gradients and
  parameters are. Between nodes of NODE devices as many rings run as a node has devices, so what a
  node sends is NODE times --gpu-network. Each hop delays an exchange by a latency.
- A stack of matrices is padded to a multiple of the ranks, since each gets whole ones: where there
  are more ranks than matrices, zeros travel.
- Gradients travel while the last pass of a step computes others, each part as soon as the backward
  pass has made all of its gradients, one part after the other; the backward pass takes
  BACKWARD_SHARE of a pass. With loss scaling nothing travels early. Gathered parameters travel
  while later parts compute their updates. Travelling slows no computation down on a GPU; on a CPU,
  where the same cores do both, nothing is hidden.
- Reading data, evaluation, saving and stragglers cost nothing.

`nanochat bench --only=plan` and runs/plan_check.sh compare the model with steps on a CPU;
nothing has compared it with GPUs yet."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nanochat.common import ceil_div, round_up
from nanochat.hardware import Gpu
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.optim.muon import muon_flops
from nanochat.optim.optimizer import Optimizer, cuts_by_depth
from nanochat.run.plan import ASSUMED_MFU

# What a step is the sum of.
PARTS = ("passes", "weights", "update", "gradients", "parameters")
# Numbers of devices in a table.
COUNTS = tuple(2**i for i in range(11))
# GPUs of a node, as in NVIDIA's HGX and DGX machines.
NODE = 8
# Share of a link's bandwidth that an exchange reaches: NVIDIA/nccl issue 1281 reports 360 (reduce-
# scatter) and 350 GB/s (all-gather) on H100, whose links have 450 GB/s in one direction.
BUS_SHARE = 0.8
# Seconds to launch an exchange, and for one hop of its ring within and between nodes.
LAUNCH = 10e-6
HOP = 1e-6
NETWORK_HOP = 5e-6
# Small sums over all ranks in a step: the loss with the gradient's norm, and ranks.agree(). Each is
# a ring that goes round twice.
SUMS = 2
# Two of three products of each matrix: for its input and for itself.
BACKWARD_SHARE = 2 / 3
# fp32, whatever the compute dtype.
ELEMENT_BYTES = 4
# Bytes of memory per parameter and pass: weights are read and cast, read again by both passes, and
# gradients are written, read and added.
WEIGHT_TRAFFIC = 20
# Bytes of memory per element that an update owns: AdamW reads and writes weights and two moments;
# Muon besides the operands of its iterations.
ADAMW_TRAFFIC = 36
MUON_TRAFFIC = 100
# Per element of a whole stack: copied together before the exchange, and apart after it.
STACK_TRAFFIC = 16
# Doubling the devices has to make training this much faster to count as scaling.
LEAST_GAIN = 1.5


@dataclass(frozen=True)
class Piece:
    """What the optimizer exchanges as one: a stack of matrices, of which each rank gets whole ones,
    or the elements of one parameter or several small ones.

    count: matrices, or elements. shape: of a matrix; None for AdamW. made_at: the share of the
    backward pass after which all of its gradients are made."""

    count: int
    shape: tuple[int, int] | None
    made_at: float

    @property
    def elements(self) -> int:
        """Elements of one of `count`."""
        return self.shape[0] * self.shape[1] if self.shape else 1

    def cut(self, ranks: int) -> list["Piece"]:
        """What travels one by one on so many ranks: a stack is cut by depth."""
        if self.shape is None:
            return [self]
        # each layer has as many of its matrices, and the last layer's gradients are made first
        return [
            replace(self, count=len(part), made_at=self.made_at * (1 - part.start / self.count))
            for part in cuts_by_depth(self.count, ranks)
        ]

    def padded(self, ranks: int) -> int:
        """Elements that travel, with the zeros that make the shares equal."""
        return round_up(self.count, ranks) * self.elements

    def update_flops(self, ranks: int) -> int:
        """FLOPs of the products for a rank's share."""
        return ceil_div(self.count, ranks) * muon_flops(*self.shape) if self.shape else 0

    def update_bytes(self, ranks: int) -> float:
        """Bytes of memory that the update of a rank's share reads and writes, with the copies."""
        own = self.padded(ranks) / ranks
        if self.shape is None:
            return ADAMW_TRAFFIC * own
        return MUON_TRAFFIC * own + STACK_TRAFFIC * self.padded(ranks)


def pieces_of(config: GPTConfig, groups: Mapping[str, dict[str, float]]) -> list[Piece]:
    """The pieces of a model, in the order of their updates. groups: settings, as Plan.groups."""
    model = meta_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    # The optimizer itself says what belongs together; on the meta device it takes no memory.
    optimizer = Optimizer(model.parameter_groups(), groups, torch.bfloat16)
    pieces = []
    for part in optimizer.parts:
        first = part.parameters[0]
        made_at = max(_made_at(names[each], config.depth) for each in part.parameters)
        if "beta1" in part.settings:
            elements = sum(each.numel() for each in part.parameters)
            pieces.append(Piece(elements, None, made_at))
        else:
            pieces.append(Piece(len(part.parameters), tuple(first.shape), made_at))
    return pieces


def _made_at(name: str, depth: int) -> float:
    """The share of the backward pass, which begins with the head and ends with the embedding, after
    which it has made the gradient of a parameter."""
    if name.startswith("head."):
        return 0.0
    # blocks.3.mlp.up.weight, value_embeddings.3.weight
    kind, _, rest = name.partition(".")
    if kind in ("blocks", "value_embeddings"):
        return (depth - int(rest.partition(".")[0])) / depth
    # of the embedding, or of all blocks
    return 1.0


def stacked_elements(pieces: Iterable[Piece], ranks: int) -> int:
    """Elements of all stacks of matrices, padded for so many ranks."""
    return _elements((piece for piece in pieces if piece.shape), ranks)


def travelling_bytes(pieces: Iterable[Piece], ranks: int) -> float:
    """Bytes that a rank sends, and receives, in one exchange of all pieces: of gradients, or of
    parameters."""
    return ELEMENT_BYTES * _elements(pieces, ranks) * (ranks - 1) / ranks


def _elements(pieces: Iterable[Piece], ranks: int) -> int:
    """Elements of all pieces, padded for so many ranks."""
    return sum(piece.padded(ranks) for piece in pieces)


@dataclass(frozen=True)
class Speeds:
    """What each of so many devices reaches while all of them work.

    pass_flops, update_flops: FLOP/s of the passes and of Muon's products. memory: bytes per second.
    activations: bytes of the stream of all blocks per second, where these are not part of
    pass_flops. reduce, gather: bytes per second that a rank sends in exchanges of gradients and of
    parameters. delay: seconds of an exchange of nothing. overlaps: whether exchanges run beside
    computations."""

    ranks: int
    pass_flops: float
    update_flops: float
    memory: float
    reduce: float
    gather: float
    delay: float
    overlaps: bool
    activations: float = math.inf


def listed_speeds(gpu: Gpu, ranks: int, network_gbits: float, overlaps: bool = True) -> Speeds:
    """The Speeds of a listed GPU. network_gbits: of each GPU to other nodes, in one direction.
    overlaps: whether gradients may travel early."""
    # listed for both directions together
    bus = gpu.link_bandwidth / 2
    nodes = ceil_div(ranks, NODE)
    if nodes > 1:
        bus = min(bus, NODE * network_gbits * 1e9 / 8)
    # Each hop of a ring but the last, of which one leaves each node.
    between = nodes if nodes > 1 else 0
    hops = between * NETWORK_HOP + max(0, ranks - 1 - between) * HOP
    flops = ASSUMED_MFU * gpu.peak_flops
    return Speeds(
        ranks=ranks,
        pass_flops=flops,
        update_flops=flops,
        memory=gpu.memory_bandwidth,
        reduce=BUS_SHARE * bus,
        gather=BUS_SHARE * bus,
        delay=LAUNCH + hops,
        overlaps=overlaps,
    )


def assumptions(network_gbits: float) -> list[str]:
    """The most important things that listed_speeds() and step_time() assume, as phrases."""
    return [
        *assumed_speeds(network_gbits),
        "exchanges in fp32",
        "stacks of matrices padded with zeros to a multiple of the GPUs",
        "gradients travel behind the backward pass of the last pass, parameters behind updates",
        "reading data, evaluation and saving cost nothing",
    ]


def assumed_speeds(network_gbits: float) -> list[str]:
    """What listed_speeds() assumes, as phrases."""
    return [
        f"passes and products at {ASSUMED_MFU:.0%} of the listed peak",
        f"exchanges in a ring, at {BUS_SHARE:.0%} of the listed links of {NODE} GPUs",
        f"{network_gbits:g} Gbit/s from each GPU to other nodes (--gpu-network)",
        f"{1e6 * HOP:g} us a hop within and {1e6 * NETWORK_HOP:g} us between nodes",
    ]


@dataclass(frozen=True)
class Work:
    """What a device does in a step. tokens: of all of its passes. parameters: of the whole
    model."""

    config: GPTConfig
    flops_per_token: int
    parameters: int
    pieces: Sequence[Piece]
    tokens: int
    passes: int

    @property
    def flops(self) -> int:
        """FLOPs of the passes."""
        return self.flops_per_token * self.tokens

    @property
    def activation_bytes(self) -> int:
        """Bytes of the stream between blocks, for all blocks and passes."""
        return ELEMENT_BYTES * self.tokens * self.config.depth * self.config.width

    def seconds(self, speeds: Speeds) -> tuple[float, float]:
        """(what the passes compute, what they read and write of weights and gradients), without
        exchanges."""
        computing = self.flops / speeds.pass_flops + self.activation_bytes / speeds.activations
        return computing, self.passes * WEIGHT_TRAFFIC * self.parameters / speeds.memory


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what a device does, and what it exchanges.

    sent_bytes: that a rank sends in a step, and receives as well. zeros: the share of them that
    only pads stacks. travel: seconds for which something travels, hidden or not."""

    passes: float
    weights: float
    update: float
    gradients: float
    parameters: float
    sent_bytes: float = 0.0
    zeros: float = 0.0
    travel: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """The part that takes most."""
        parts = self.parts
        return max(parts, key=parts.__getitem__)


def step_time(work: Work, speeds: Speeds) -> StepTime:
    """How long a step takes at these speeds."""
    n = speeds.ranks
    pieces = [part for piece in work.pieces for part in piece.cut(n)]
    passes, weights = work.seconds(speeds)
    updates = [
        piece.update_flops(n) / speeds.update_flops + piece.update_bytes(n) / speeds.memory
        for piece in pieces
    ]
    update = sum(updates)
    if n == 1:
        return StepTime(passes, weights, update, gradients=0.0, parameters=0.0)
    # Only the last pass of a step has whole gradients.
    backward = BACKWARD_SHARE * (passes + weights) / work.passes
    # those of the head begin to travel first
    order = sorted(pieces, key=lambda piece: piece.made_at)
    reduced = [_travel(piece, speeds, speeds.reduce) for piece in order]
    gathered = [_travel(piece, speeds, speeds.gather) for piece in pieces]
    gradients = sum(reduced)
    parameters = sum(gathered)
    if speeds.overlaps:
        gradients = _end([piece.made_at * backward for piece in order], reduced) - backward
        parameters = _end(list(itertools.accumulate(updates)), gathered) - update
    return StepTime(
        passes=passes,
        weights=weights,
        update=update,
        gradients=gradients + 2 * SUMS * speeds.delay,
        parameters=parameters,
        sent_bytes=2 * travelling_bytes(pieces, n),
        zeros=1 - _elements(pieces, 1) / _elements(pieces, n),
        travel=sum(reduced) + sum(gathered),
    )


def _travel(piece: Piece, speeds: Speeds, bandwidth: float) -> float:
    """Seconds of one exchange of a piece."""
    return speeds.delay + travelling_bytes([piece], speeds.ranks) / bandwidth


def _end(ready: Sequence[float], seconds: Sequence[float]) -> float:
    """When the last of several exchanges is over. Each begins when it is ready and the one before
    is over."""
    end = 0.0
    for begin, duration in zip(ready, seconds, strict=True):
        end = max(end, begin) + duration
    return end


@dataclass(frozen=True)
class Scaled:
    """A step on so many devices, of so many tokens in all."""

    devices: int
    batch_tokens: int
    step: StepTime

    @property
    def rate(self) -> float:
        """Tokens per second of all devices."""
        return self.batch_tokens / self.step.seconds


def limit_of(rows: Sequence[Scaled]) -> tuple[int, str]:
    """(the number of devices up to which more of them help, what stops them from there on, as a
    name of PARTS, "batch" or ""). rows: twice as many devices in each as in the one before.

    "batch": there the batch grows beyond what the horizon asks for, since each device takes at
    least one row. "": nothing does, up to the last row."""
    for fewer, more in itertools.pairwise(rows):
        # Faster in tokens, but they are worth less each.
        if more.batch_tokens > fewer.batch_tokens:
            return fewer.devices, "batch"
        if more.rate < LEAST_GAIN * fewer.rate:
            # In half the time each part would be halved: which is furthest from that?
            excess = {
                name: seconds - fewer.step.parts[name] / 2
                for name, seconds in more.step.parts.items()
            }
            return fewer.devices, max(excess, key=excess.__getitem__)
    return rows[-1].devices, ""
