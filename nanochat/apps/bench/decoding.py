"""How fast a model writes: one text, several together, and the first token of a prompt."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat.common import counted
from nanochat.eval.generation import choose, draw_points
from nanochat.eval.kv_cache import KVCache
from nanochat.eval.prefixes import Prefixes, read_piece
from nanochat.eval.slots import fill, in_compute_dtype, open_decoder
from nanochat.limits import available_cpus
from nanochat.model.decoder import Decoder
from nanochat.run.timing import Entry, measured, timed

# Texts that are continued together: one is limited by memory bandwidth, several share the reading
# of weights.
TEXTS = (1, 8, 32)
TOKENS = 32
# Tokens of the prompt whose first answer is timed.
PROMPT_TOKENS = 64
# Larger than the caches of processors.
BANDWIDTH_BYTES = 1 << 28


def time_decoding(model: Decoder, ids_T: Tensor, repeats: int) -> Iterator[Entry]:
    """ids_T: a row of training, from which prompts are taken; half of the context is read before
    anything is timed. Tokens are drawn among the 50 most likely."""
    model = in_compute_dtype(model)
    device = model.embedding.weight.device
    context = model.config.max_seq_len
    bandwidth = memory_bandwidth(device)
    weights = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes
    prompt = tuple(ids_T[: context // 2].tolist())
    notes: list[str] = []
    decoder = open_decoder(model, max(TEXTS), context, available_cpus(), notes.append)
    with torch.no_grad():
        cache, _ = _read(model, prompt)
        for slot in range(max(TEXTS)):
            fill(decoder, slot, cache)
        n_tokens = min(TOKENS, context - len(prompt))
        generator = torch.Generator().manual_seed(0)

        def write(texts: int) -> None:
            ids = [prompt[-1]] * texts
            for position in range(len(prompt), len(prompt) + n_tokens):
                logits = decoder.step(ids, [position] * texts, list(range(texts)))
                points = draw_points(texts, generator)
                ids = choose(logits, points, temperature=0.8, top_k=50).tolist()

        for texts in TEXTS:
            seconds = timed(lambda texts=texts: write(texts), device, repeats)
            entry = Entry(f"decode, {counted(texts, 'text')}", seconds, texts * n_tokens)
            share = weights * n_tokens / entry.median / bandwidth
            read = f"weights are read at {share:.0%} of memory's {bandwidth / 1e9:.0f} GB/s"
            yield Entry(entry.name, seconds, entry.tokens, note="; ".join([read, *notes]))

        start = tuple(ids_T[: min(PROMPT_TOKENS, context)].tolist())
        yield measured(
            f"first token, prompt of {len(start)}",
            lambda: _read(model, start),
            device,
            repeats,
            note="reading included",
        )
    decoder.close()


def _read(model: Decoder, prompt: tuple[int, ...]) -> tuple[KVCache, Tensor]:
    """The cache of a prompt that has been read, and the logits (1, V) behind it."""
    reading = Prefixes(model).begin(prompt)
    hidden_nxC = read_piece(model, reading, len(prompt))
    return reading.cache, model.logits(hidden_nxC[-1:])


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a large tensor is read."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / min(timed(numbers.sum, device, repeats=5))
