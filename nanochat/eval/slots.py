"""Continuing several texts together, each at its own position: filling slots and reading a token of
each.

Shape legend: B texts, K key/value heads, H query heads, D head dim, L keys in reach, V
vocabulary."""

import copy
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.common import Unavailable
from nanochat.eval.kv_cache import KVCache
from nanochat.model.decoder import Decoder
from nanochat.model.kernels.cpu_decode import CpuDecoder, LayerSlots


def in_compute_dtype(model: Decoder) -> Decoder:
    """A copy for inference whose weights are stored in the compute dtype: the same numbers as
    weights that are cast at every product, read in half the time. Weights of that dtype are shared
    with the model."""
    stored = {
        id(parameter): nn.Parameter(parameter.detach().to(model.compute_dtype), requires_grad=False)
        for parameter in model.parameters()
    }
    # what is there already is not copied
    return copy.deepcopy(model, stored).eval()


class TorchDecoder:
    """As CpuDecoder, in PyTorch, for devices and machines that decode.cpp is not for."""

    is_batch_invariant = False

    def __init__(self, model: Decoder, slots: int, positions: int) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        layers = range(model.config.depth)
        self.layers = [LayerSlots(model, layer, slots, positions) for layer in layers]
        self.previous_embedding = torch.zeros(slots, model.config.width, device=self.device)

    def close(self) -> None:
        """Part of the interface of decoders; there is nothing to end."""

    @torch.no_grad()
    def step(self, ids: list[int], positions: list[int], slots: list[int]) -> Tensor:
        """Read one token of each of B texts, at its position; returns fp32 logits (B, V) on the
        CPU."""
        rows_3xB = torch.tensor([ids, positions, slots], device=self.device)
        cache = _Rows(self, rows_3xB[1], rows_3xB[2], longest=max(positions) + 1)
        hidden_Bx1xC = self.model.hidden(rows_3xB[0][:, None], cache)
        return self.model.logits(hidden_Bx1xC[:, -1]).cpu()


class _Rows:
    """A model reads it as a cache, for one token of each text."""

    def __init__(
        self, decoder: TorchDecoder, positions_B: Tensor, slots_B: Tensor, longest: int
    ) -> None:
        self.decoder = decoder
        self.positions_B = positions_B
        self.slots_B = slots_B
        self.layers = [
            _RowsOfLayer(layer, positions_B, slots_B, longest) for layer in decoder.layers
        ]
        dtype = decoder.model.compute_dtype
        self.previous_embedding = decoder.previous_embedding[slots_B][:, None].to(dtype)

    def positions(self, T: int) -> Tensor:
        """Positions of the next token of each text, int64 (B, 1)."""
        return self.positions_B[:, None]

    def advance(self, n_tokens: int, last_embedding_Bx1xC: Tensor | None) -> None:
        """Keep what smear needs."""
        if last_embedding_Bx1xC is not None:
            self.decoder.previous_embedding[self.slots_B] = last_embedding_Bx1xC[:, 0].float()


class _RowsOfLayer:
    """The part of _Rows that belongs to one layer."""

    def __init__(
        self, layer: LayerSlots, positions_B: Tensor, slots_B: Tensor, longest: int
    ) -> None:
        self.layer = layer
        self.positions_B = positions_B
        self.slots_B = slots_B
        self.reach = min(longest, layer.keys.size(2))

    @property
    def key_before(self) -> Tensor:
        """The last raw keys, (B, 1, K, D)."""
        return self.layer.key_before[self.slots_B][:, None].to(self.layer.keys.dtype)

    def remember(self, raw_keys_Bx1xKxD: Tensor) -> None:
        """Keep the raw keys for the next position."""
        self.layer.key_before[self.slots_B] = raw_keys_Bx1xKxD[:, 0].float()

    def append(self, k_Bx1xKxD: Tensor, v_Bx1xKxD: Tensor) -> None:
        """Store one more position of each text."""
        layer = self.layer
        places_B = self.positions_B % layer.keys.size(2)
        layer.keys[self.slots_B, :, places_B] = k_Bx1xKxD[:, 0]
        layer.values[self.slots_B, :, places_B] = v_Bx1xKxD[:, 0]

    def attend(
        self, q_Bx1xHxD: Tensor, k_Bx1xKxD: Tensor, v_Bx1xKxD: Tensor, window: int, backend: str
    ) -> Tensor:
        """Attention of each new position, which is stored first, to its own text; a text that is
        shorter than the longest has places that hold nothing yet."""
        self.append(k_Bx1xKxD, v_Bx1xKxD)
        B, _, H, D = q_Bx1xHxD.shape
        keys_BxKxLxD = self.layer.keys[self.slots_B, :, : self.reach]
        values_BxKxLxD = self.layer.values[self.slots_B, :, : self.reach]
        K = keys_BxKxLxD.size(1)
        q_BxKxGxD = q_Bx1xHxD.view(B, K, H // K, D)
        scores_BxKxGxL = (q_BxKxGxD @ keys_BxKxLxD.mT).float() * D**-0.5
        places_L = torch.arange(self.reach, device=scores_BxKxGxL.device)
        is_empty_BxL = places_L > self.positions_B[:, None]
        scores_BxKxGxL.masked_fill_(is_empty_BxL[:, None, None], float("-inf"))
        shares_BxKxGxL = scores_BxKxGxL.softmax(-1).to(values_BxKxLxD.dtype)
        return (shares_BxKxGxL @ values_BxKxLxD).view(B, 1, H, D)


def open_decoder(
    model: Decoder, slots: int, positions: int, threads: int, report: Callable[[str], None]
) -> CpuDecoder | TorchDecoder:
    """What continues `slots` texts of a model from in_compute_dtype() together: decode.cpp on a
    CPU, or PyTorch, with a line that says why."""
    if model.embedding.weight.device.type != "cpu":
        return TorchDecoder(model, slots, positions)
    try:
        return CpuDecoder(model, slots, positions, threads)
    except Unavailable as error:
        report(f"decoding with PyTorch, several times slower: {error}")
        return TorchDecoder(model, slots, positions)


def fill(decoder: CpuDecoder | TorchDecoder, slot: int, cache: KVCache) -> None:
    """Let a slot hold what a cache of one text has read."""
    n = cache.length
    for kept, read in zip(decoder.layers, cache.layers, strict=True):
        capacity = kept.keys.size(2)
        first = max(0, n - capacity)
        places = torch.arange(first, n, device=kept.keys.device) % capacity
        kept.keys[slot][:, places] = read.keys[0, first:n].transpose(0, 1)
        kept.values[slot][:, places] = read.values[0, first:n].transpose(0, 1)
        if read.key_before is not None:
            kept.key_before[slot] = read.key_before[0, 0].float()
    if cache.previous_embedding is not None:
        decoder.previous_embedding[slot] = cache.previous_embedding[0, 0].float()
