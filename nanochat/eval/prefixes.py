"""What was read of recent prompts, for later ones that begin alike, such as those of one chat."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.eval.kv_cache import KVCache
from nanochat.model.decoder import Decoder

# of keys and values that are kept
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class _Place:
    """What a cache has to know besides keys and values to be continued from a place in a text."""

    key_before: list[Tensor | None]
    previous_embedding: Tensor | None


@dataclass
class Reading:
    """A prompt that is being read. places: by number of tokens read, at the end of each piece."""

    prompt: tuple[int, ...]
    cache: KVCache
    places: dict[int, _Place] = field(default_factory=dict)

    def note_place(self) -> None:
        """A piece has been read, and later prompts may begin from here."""
        self.places[self.cache.length] = _Place(
            [layer.key_before for layer in self.cache.layers], self.cache.previous_embedding
        )

    @property
    def n_bytes(self) -> int:
        """Of its keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Prefixes:
    """The readings of recent prompts, up to MAX_BYTES; the oldest are dropped."""

    def __init__(self, model: Decoder, max_bytes: int = MAX_BYTES) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.kept: OrderedDict[tuple[int, ...], Reading] = OrderedDict()

    def begin(self, prompt: tuple[int, ...], shared: bool = True) -> Reading:
        """The reading of a prompt, begun with what a kept one has in common with it, up to the end
        of a piece; its last token is always left to read. shared: False begins with nothing."""
        config, device = self.model.config, self.model.embedding.weight.device
        cache = KVCache(config, 1, len(prompt), device, self.model.compute_dtype)
        reading = Reading(prompt, cache)
        n, known = max(
            ((_common_place(kept, prompt), kept) for kept in self.kept.values()),
            key=lambda found: found[0],
            default=(0, None),
        )
        if not n or not shared:
            return reading
        self.kept.move_to_end(known.prompt)
        place = known.places[n]
        for mine, theirs, key in zip(
            cache.layers, known.cache.layers, place.key_before, strict=True
        ):
            mine.append(theirs.keys[:, :n], theirs.values[:, :n])
            mine.key_before = key
        cache.advance(n, place.previous_embedding)
        reading.places = {at: place for at, place in known.places.items() if at <= n}
        return reading

    def keep(self, reading: Reading) -> None:
        """Keep a prompt that has been read, if another could begin with a piece of it."""
        if not reading.places or reading.n_bytes > self.max_bytes:
            return
        self.kept[reading.prompt] = reading
        self.kept.move_to_end(reading.prompt)
        while sum(kept.n_bytes for kept in self.kept.values()) > self.max_bytes:
            self.kept.popitem(last=False)


def _common_place(kept: Reading, prompt: Sequence[int]) -> int:
    """Tokens that two prompts have in common, as far as the last place that can be continued from;
    0 if there is none."""
    usable = [n for n in kept.places if n < len(prompt)]
    for n in sorted(usable, reverse=True):
        if kept.prompt[:n] == tuple(prompt[:n]):
            return n
    return 0


@torch.no_grad()
def read_piece(model: Decoder, reading: Reading, end: int) -> Tensor:
    """Read a prompt as far as `end`; returns the hidden states (n, C) of the tokens read."""
    first = reading.cache.length
    ids_1xn = torch.tensor([reading.prompt[first:end]], device=model.embedding.weight.device)
    return model.hidden(ids_1xn, reading.cache)[0]
