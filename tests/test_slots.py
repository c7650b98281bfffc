"""Texts that are continued together, each at its own position: decode.cpp and PyTorch against the
model that reads each text whole."""

import pytest
import torch

from nanochat import native
from nanochat.common import Unavailable
from nanochat.eval import slots
from nanochat.eval.kv_cache import KVCache
from nanochat.eval.slots import TorchDecoder, fill, in_compute_dtype, open_decoder
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.model.kernels.cpu_decode import CpuDecoder

CPU = torch.device("cpu")
SHAPES = {
    "speedrun": {},
    "grouped, short windows": {"n_head": 4, "n_kv_head": 2, "short_window": 5},
    # no multiple of 16, nor of the 4 outputs that a tile computes
    "odd": {
        "depth": 3,
        "width": 42,
        "head_dim": 14,
        "n_head": 3,
        "n_kv_head": 3,
        "short_window": 3,
    },
    "no shift": {"key_shift": False},
    "llama": {"arch": "llama", "window_pattern": "L", "key_shift": False},
    "tied llama": {
        "arch": "llama",
        "window_pattern": "L",
        "key_shift": False,
        "n_head": 4,
        "n_kv_head": 1,
        "tie_embeddings": True,
    },
}


def model_of(shape, dtype=torch.float32):
    """A model whose parts all matter: nothing is zero."""
    values = {
        "depth": 2,
        "width": 64,
        "head_dim": 16,
        "n_head": 4,
        "n_kv_head": 4,
        "vocab_size": 61,
        "max_seq_len": 16,
        "short_window": 8,
        "key_shift": True,
    }
    config = GPTConfig(**values | SHAPES[shape])
    model = build(config, CPU, dtype, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            # as large as it is in a trained model
            scale = 0.3 if parameter.ndim == 1 else parameter.size(-1) ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return in_compute_dtype(model)


def texts(config, lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, config.vocab_size, (n,), generator=generator) for n in lengths]


def decoders(model, positions=40):
    return [CpuDecoder(model, 5, positions, threads=2), TorchDecoder(model, 5, positions)]


@torch.no_grad()
def expected(model, text):
    return model.logits(model.hidden(text[None]))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_of_different_lengths_are_continued(shape):
    """Begun by a prompt, or by their first token; in slots in any order."""
    model = model_of(shape)
    lengths, begun, places = [20, 33, 11], [7, 25, 1], [4, 0, 2]
    read = texts(model.config, lengths)
    for decoder in decoders(model):
        for text, n, place in zip(read, begun, places, strict=True):
            cache = KVCache(model.config, 1, n, CPU, torch.float32)
            with torch.no_grad():
                model.hidden(text[None, :n], cache)
            fill(decoder, place, cache)
        at = list(begun)
        while running := [i for i in range(3) if at[i] < lengths[i]]:
            logits = decoder.step(
                [read[i][at[i]].item() for i in running],
                [at[i] for i in running],
                [places[i] for i in running],
            )
            for row, i in enumerate(running):
                torch.testing.assert_close(
                    logits[row], expected(model, read[i])[at[i]], atol=2e-5, rtol=2e-5
                )
                at[i] += 1
        decoder.close()


@pytest.mark.parametrize("shape", ["speedrun", "llama"])
def test_bf16_is_as_close_to_exact_as_the_model(shape):
    model = model_of(shape, torch.bfloat16)
    exact = model_of(shape, torch.float32)
    for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        mine.data = theirs.data.float()
    (text,) = texts(model.config, [16])
    error_of_model = (expected(model, text) - expected(exact, text)).abs().max()
    decoder = CpuDecoder(model, 1, 16, threads=1)
    logits = torch.cat([decoder.step([i], [at], [0]) for at, i in enumerate(text.tolist())])
    assert (logits - expected(exact, text)).abs().max() < error_of_model
    decoder.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_text_is_the_same_alone_and_among_others(dtype):
    """To the last bit: whatever runs beside it, in whatever slot, on however many threads."""
    model = model_of("grouped, short windows", dtype)
    read = texts(model.config, [12] * 5)

    def run(threads, rows, places):
        decoder = CpuDecoder(model, 5, 12, threads)
        steps = [
            decoder.step([read[i][at].item() for i in rows], [at] * len(rows), places)
            for at in range(12)
        ]
        decoder.close()
        return torch.stack(steps, dim=1)

    together = run(2, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    for i in range(5):
        assert torch.equal(run(1, [i], [0])[0], together[i])
    for rows in ([3, 1], [2, 0, 4], [4, 3, 2, 1]):
        some = run(3, rows, [4 - i for i in rows])
        assert all(torch.equal(some[row], together[i]) for row, i in enumerate(rows))


def test_without_a_compiler_it_is_pytorch_with_a_line(monkeypatch):
    def missing(source):
        raise Unavailable("decode.cpp cannot be compiled and loaded (no C++ compiler)")

    monkeypatch.setattr(native, "load", missing)
    said = []
    decoder = open_decoder(model_of("llama"), 1, 8, threads=1, report=said.append)
    assert isinstance(decoder, TorchDecoder)
    assert said == [
        "decoding with PyTorch, several times slower: decode.cpp cannot be compiled and loaded "
        "(no C++ compiler)"
    ]


def test_the_copy_for_inference_gives_the_same_numbers():
    config = GPTConfig(
        depth=2,
        width=32,
        head_dim=16,
        n_head=2,
        n_kv_head=2,
        vocab_size=61,
        max_seq_len=16,
        short_window=8,
    )
    model = build(config, CPU, torch.bfloat16, seed=1).eval()
    (text,) = texts(config, [16])
    copied = slots.in_compute_dtype(model)
    assert copied.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(expected(copied, text), expected(model, text))
    assert model.embedding.weight.dtype == torch.float32 and model.embedding.weight.requires_grad
