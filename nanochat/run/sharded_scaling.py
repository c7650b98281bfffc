"""How long a step takes whose weights are split over the devices (--shard), and what these exchange
in it: scaling.py for FSDP2.

Each pass gathers the weights of a layer before it runs, forward and backward, in the compute dtype
(tables of value embeddings, embedding, head and vectors in fp32, the last three once), and
reduces the gradients in fp32. While a layer computes, the next one's weights travel, and in the
backward pass the gradients of the one before as well; what takes longer than the layer is waited
for. An update sends Muon's rows to where whole matrices are orthogonalised, and back, in the
dtype of the products. On a CPU nothing is hidden.

tests/test_scaling.py compares the volume with what two ranks exchange; the times have been compared
with nothing yet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanochat.common import ceil_div, round_up
from nanochat.model.build import meta_model
from nanochat.model.config import GPTConfig
from nanochat.run.scaling import (
    BACKWARD_SHARE,
    ELEMENT_BYTES,
    MUON_TRAFFIC,
    STACK_TRAFFIC,
    SUMS,
    Piece,
    Speeds,
    StepTime,
    Work,
    assumed_speeds,
)


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers as one. shapes: of its parameters. element_bytes: on the way to the
    passes. gathers: of each pass."""

    shapes: tuple[tuple[int, ...], ...]
    element_bytes: int
    gathers: int

    def elements(self, ranks: int) -> int:
        """Elements that travel: all ranks have as many rows of a parameter."""
        return sum(round_up(shape[0], ranks) * math.prod(shape[1:]) for shape in self.shapes)


def units_of(config: GPTConfig, element_bytes: int) -> list[list[Unit]]:
    """What build_sharded() makes one: first what all layers share, then each layer's block and,
    where it has one, its table. element_bytes: of the compute dtype."""
    model = meta_model(config)
    # a Llama has none
    tables = getattr(model, "value_embeddings", {})
    inner = {parameter for block in model.blocks for parameter in block.parameters()}
    inner |= {parameter for table in tables.values() for parameter in table.parameters()}
    shared = [parameter for parameter in model.parameters() if parameter not in inner]
    units = [[_unit(shared, ELEMENT_BYTES, gathers=1)]]
    for layer, block in enumerate(model.blocks):
        own = [_unit(block.parameters(), element_bytes, gathers=2)]
        if str(layer) in tables:
            own.append(_unit(tables[str(layer)].parameters(), ELEMENT_BYTES, gathers=2))
        units.append(own)
    return units


def _unit(parameters: Iterable, element_bytes: int, gathers: int) -> Unit:
    return Unit(tuple(tuple(each.shape) for each in parameters), element_bytes, gathers)


def sent_in_passes(units: Sequence[Sequence[Unit]], ranks: int, padded: bool = True) -> float:
    """Bytes that a rank sends in one pass, forward and backward. padded: with the rows that make
    all shares equal."""
    n_bytes = sum(
        unit.elements(ranks if padded else 1) * (unit.gathers * unit.element_bytes + ELEMENT_BYTES)
        for layer in units
        for unit in layer
    )
    return n_bytes * (ranks - 1) / ranks


def sent_in_update(
    pieces: Iterable[Piece], ranks: int, element_bytes: int, padded: bool = True
) -> float:
    """Bytes that a rank sends of its rows to where matrices are whole, and of whole ones back.
    NorMuon's factors, a number for each row or column, are left out."""
    elements = 0.0
    for piece in pieces:
        if not piece.shape:
            continue
        if padded:
            rows = round_up(piece.count, ranks) * ceil_div(piece.shape[0], ranks)
            elements += rows * piece.shape[1]
        else:
            elements += piece.count * piece.elements / ranks
    return 2 * element_bytes * elements * (ranks - 1) / ranks


def sharded_step_time(
    work: Work, units: Sequence[Sequence[Unit]], element_bytes: int, speeds: Speeds
) -> StepTime:
    """How long a step takes on several devices. element_bytes: of the compute dtype."""
    n = speeds.ranks
    passes, weights = work.seconds(speeds)
    waits = _waits(units, (passes + weights) / work.passes / work.config.depth, speeds)
    gathering, reducing = (work.passes * each for each in waits)
    stacks = [piece for piece in work.pieces if piece.shape]
    # a rank copies its rows and its whole matrices, and never a whole stack
    matrices = [
        stack.update_flops(n) / speeds.update_flops
        + (MUON_TRAFFIC + STACK_TRAFFIC) * stack.padded(n) / n / speeds.memory
        for stack in stacks
    ]
    others = sum(piece.update_bytes(n) for piece in work.pieces if not piece.shape)
    # to the owners, and as long back
    travels = [
        speeds.delay + sent_in_update([stack], n, element_bytes) / 2 / speeds.gather
        for stack in stacks
    ]
    exchanging = 2 * sum(travels)
    if speeds.overlaps:
        exchanging = _update_end(travels, matrices) - sum(matrices)
    sent, unpadded = (
        work.passes * sent_in_passes(units, n, padded)
        + sent_in_update(work.pieces, n, element_bytes, padded)
        for padded in (True, False)
    )
    in_a_pass = sum(_gather(layer, speeds, passes=True) + _reduce(layer, speeds) for layer in units)
    return StepTime(
        passes=passes,
        weights=weights,
        update=sum(matrices) + others / speeds.memory,
        gradients=reducing + 2 * SUMS * speeds.delay,
        parameters=gathering + exchanging,
        sent_bytes=sent,
        zeros=1 - unpadded / sent,
        travel=work.passes * in_a_pass + 2 * sum(travels),
    )


def _waits(
    units: Sequence[Sequence[Unit]], layer_seconds: float, speeds: Speeds
) -> tuple[float, float]:
    """Seconds of a pass for which the device waits for weights, and for gradients to leave.
    layer_seconds: that a layer computes, forward and backward."""
    shared, *layers = units
    gathers = [_gather(layer, speeds) for layer in layers]
    reductions = [_reduce(layer, speeds) for layer in layers]
    first = _gather(shared, speeds) + gathers[0]
    last = reductions[0] + _reduce(shared, speeds)
    if not speeds.overlaps:
        return first + gathers[0] + 2 * sum(gathers[1:]), last + sum(reductions[1:])
    forward = (1 - BACKWARD_SHARE) * layer_seconds
    backward = BACKWARD_SHARE * layer_seconds
    # the weights of the next layer travel while one computes
    gathering = first + sum(max(0.0, each - forward) for each in gathers[1:]) + gathers[-1]
    # and on the way back the gradients of the layer that was computed before
    reducing = sum(
        max(0.0, gather + reduction - backward)
        for gather, reduction in zip(gathers[:-1], reductions[1:], strict=True)
    )
    return gathering, reducing + last


def _gather(layer: Iterable[Unit], speeds: Speeds, passes: bool = False) -> float:
    """Seconds in which the weights of a layer are gathered once; passes: as often as forward and
    backward pass together do."""
    n = speeds.ranks
    return sum(
        (unit.gathers if passes else 1)
        * (speeds.delay + unit.elements(n) * unit.element_bytes * (n - 1) / n / speeds.gather)
        for unit in layer
    )


def _reduce(layer: Iterable[Unit], speeds: Speeds) -> float:
    """Seconds in which the gradients of a layer are reduced."""
    n = speeds.ranks
    return sum(
        speeds.delay + unit.elements(n) * ELEMENT_BYTES * (n - 1) / n / speeds.reduce
        for unit in layer
    )


def _update_end(travels: Sequence[float], updates: Sequence[float]) -> float:
    """When the last stack is back. All begin to travel together; each is updated when it has come
    and the one before it is done, and then travels back."""
    arrived = updated = back = 0.0
    for travel, update in zip(travels, updates, strict=True):
        # they share the link, so each waits for those before it
        arrived += travel
        updated = max(updated, arrived) + update
        back = max(back, updated, sum(travels)) + travel
    return back


def assumptions(network_gbits: float, dtype: str) -> list[str]:
    """As scaling.assumptions(). dtype: the compute dtype."""
    return [
        *assumed_speeds(network_gbits),
        f"each pass gathers the weights of a layer twice, in {dtype}, and reduces its gradients in "
        f"fp32, while another layer computes",
        "rows and stacks padded with zeros to a multiple of the GPUs",
        "reading data, evaluation and saving cost nothing",
    ]
