"""How fast a model writes: one text, several together, a prompt, and the first token of one."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanochat.apps.bench.others import TEMPERATURE, TOP_K, Work, time_others
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


def time_decoding(
    trained: Decoder, ids_T: Tensor, repeats: int, report: Callable[[str], None]
) -> Iterator[Entry]:
    """Our entries, and then those of other programs with the same weights, where their packages are
    installed; report() gets a line about each that is not.

    ids_T: a row of training, from which prompts are taken; half of the context is read before
    anything is timed. Tokens are drawn among the 50 most likely."""
    model = in_compute_dtype(trained)
    device = model.embedding.weight.device
    context = model.config.max_seq_len
    bandwidth = memory_bandwidth(device)
    weights = sum(p.nbytes for p in model.parameters()) - model.embedding.weight.nbytes
    prompt = tuple(ids_T[: context // 2].tolist())
    start = tuple(ids_T[: min(PROMPT_TOKENS, context)].tolist())
    notes: list[str] = []
    ours: dict[str, float] = {}
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
                ids = choose(logits, points, temperature=TEMPERATURE, top_k=TOP_K).tolist()

        for texts in TEXTS:
            seconds = timed(lambda texts=texts: write(texts), device, repeats)
            entry = Entry(f"decode, {counted(texts, 'text')}", seconds, texts * n_tokens)
            share = weights * n_tokens / entry.median / bandwidth
            read = f"weights are read at {share:.0%} of memory's {bandwidth / 1e9:.0f} GB/s"
            ours[counted(texts, "text")] = entry.median
            yield Entry(entry.name, seconds, entry.tokens, note="; ".join([read, *notes]))

        for what, ids in (("prefill", prompt), ("first token", start)):
            entry = measured(
                f"{what}, prompt of {len(ids)}",
                lambda ids=ids: _read(model, ids),
                device,
                repeats,
                tokens=len(ids) if what == "prefill" else None,
                note="reading included" if what == "first token" else "",
            )
            ours[what] = entry.median
            yield entry
    # Its threads would disturb the other programs.
    decoder.close()
    threads = available_cpus()
    work = Work(prompt, start, n_tokens, TEXTS, threads, repeats, bandwidth, ours, report)
    yield from time_others(trained, work)


def _read(model: Decoder, prompt: tuple[int, ...]) -> tuple[KVCache, Tensor]:
    """The cache of a prompt that has been read, and the logits (1, V) behind it."""
    reading = Prefixes(model).begin(prompt)
    hidden_nxC = read_piece(model, reading, len(prompt))
    return reading.cache, model.logits(hidden_nxC[-1:])


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second at which a large tensor is read."""
    numbers = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    return BANDWIDTH_BYTES / min(timed(numbers.sum, device, repeats=5))
