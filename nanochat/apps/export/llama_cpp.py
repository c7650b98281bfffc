"""Whether llama.cpp computes from a gguf file what our model and tokenizer compute here."""

import contextlib
import http.client
import json
import multiprocessing
import os
import random
import secrets
import unicodedata
import urllib.parse
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.apps.export.tokenizer_files import PAD_TEXT
from nanochat.apps.export.verify import TOKENIZER_SAMPLE, ExportFailed, Ours

if TYPE_CHECKING:
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.decoder import Decoder

# New tokens per prompt, and tokens of the longest prompt, at most.
GREEDY_TOKENS = 200
PROMPT_TOKENS = 256
# How far the logit of a greedy token may lie below our largest one, relative to the largest
# magnitude. In other types than float32 llama.cpp rounds the activations as well. Measured on six
# models: 0, at most 0.017 and 0.10, the latter with random weights, which amplify rounding.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "q8_0": 0.3}
# Of random text whose token ids are compared.
RANDOM_TEXTS = 40
RANDOM_CHARACTERS = 100


@dataclass(frozen=True)
class Asked:
    """What llama.cpp is asked to do: encode texts, BOS first, and continue prompts greedily."""

    path: Path
    context_tokens: int
    texts: list[str]
    prompts: list[list[int]]
    n_new: int


@dataclass(frozen=True)
class Answered:
    """Ids of each text, and new ids of each prompt, up to BOS."""

    ids: list[list[int]]
    new_ids: list[list[int]]


def verify_with_llama_cpp(path: Path, model: "Decoder", tokenizer: "Tokenizer", dtype: str) -> str:
    """Run a gguf file in llama.cpp and compare it with our model and tokenizer.

    dtype: of the file; the model has its weights. Compared are the ids of text, random Unicode
    included, and greedy tokens: the same ones in float32, in other types those with our largest
    logits, up to their rounding. Returns a sentence to print; without the package xllamacpp it says
    that nothing was compared. Raises ExportFailed on a difference."""
    try:
        import xllamacpp
    except ImportError:
        return "not verified with llama.cpp (pip install xllamacpp, and export again)"
    name = f"llama.cpp (xllamacpp {xllamacpp.__version__})"
    ours = Ours(model, tokenizer)
    texts = sample_texts(tokenizer)
    prompts, n_new = _prompts(ours)
    asked = Asked(path, model.config.max_seq_len, texts, prompts, n_new)
    found = _answers(asked, name)
    for text, ids in zip(texts, found.ids, strict=True):
        if ids != [tokenizer.bos, *tokenizer.encode(text)]:
            raise ExportFailed(
                f"{name} reads other token ids than nanochat from the text {ascii(text)}; try "
                "another release"
            )
    with torch.no_grad():
        counts = [
            _compare_greedy(ours, prompt, new_ids, n_new, name, dtype)
            for prompt, new_ids in zip(prompts, found.new_ids, strict=True)
        ]
    n_compared = sum(len(new_ids) for new_ids in found.new_ids)
    greedy = f"same {n_compared} greedy tokens"
    if sum(counts) < n_compared:
        greedy = f"{sum(counts)} of {n_compared} greedy tokens as ours, the others nearly as likely"
    n_characters = sum(map(len, texts))
    return f"verified with {name}: {greedy}; same token ids of {n_characters:,} characters"


# ---- what is compared ----


def sample_texts(tokenizer: "Tokenizer") -> list[str]:
    """Texts that a tokenizer can encode: difficult ones, and random characters."""
    generator = random.Random(0)
    if tokenizer.kind == "char":
        # It refuses other characters, and llama.cpp leaves them out.
        characters = [token.decode("utf-8") for token in tokenizer.tokens]
        fixed = ["".join(c for c in TOKENIZER_SAMPLE if c in characters)]
    else:
        characters = [" ", "\n", "'s", *_assigned_characters()]
        # Text that spells special tokens must stay plain text.
        fixed = [TOKENIZER_SAMPLE + tokenizer.bos_text + PAD_TEXT, "<s></s>\n\n\n  \t x"]
    drawn = [generator.choices(characters, k=RANDOM_CHARACTERS) for _ in range(RANDOM_TEXTS)]
    return fixed + ["".join(each) for each in drawn]


def _assigned_characters() -> list[str]:
    """Characters of Unicode 3.2, Latin ones and blanks more than once.

    What is a letter is a question of the Unicode version: the 4,382 letters and digits that came
    with version 16 and later are letters to tiktoken and not yet to llama.cpp."""
    known = unicodedata.ucd_3_2_0
    points = [c for c in range(1, 0x110000) if not 0xD800 <= c < 0xE000]
    assigned = [chr(c) for c in points if known.category(chr(c)) not in ("Cn", "Co")]
    frequent = [c for c in assigned if ord(c) < 0x250 or c.isspace()]
    return assigned + frequent * (len(assigned) // len(frequent))


def _prompts(ours: Ours) -> tuple[list[list[int]], int]:
    """Prompts of random ids, and how many tokens to add to each within the context."""
    context = ours.model.config.max_seq_len
    n_new = max(1, min(GREEDY_TOKENS, context // 2))
    row = ours.random_ids()[0].tolist()
    longest = max(1, min(PROMPT_TOKENS, context - n_new, len(row)))
    return [row[:length] for length in sorted({longest, 1}, reverse=True)], n_new


def _compare_greedy(
    ours: Ours, prompt: list[int], new_ids: list[int], n_new: int, name: str, dtype: str
) -> int:
    """Compare a greedy continuation with our logits; how many of its ids are our own greedy ones.

    Raises ExportFailed if an id has a smaller logit than rounding explains."""
    ended = new_ids[-1:] == [ours.tokenizer.bos]
    if not new_ids or (len(new_ids) < n_new and not ended):
        raise ExportFailed(
            f"{name} ends after {len(new_ids)} of {n_new} tokens without drawing BOS; try another "
            "release"
        )
    logits = ours.model(torch.tensor([prompt + new_ids]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(new_ids)[:, None])[:, 0]
    largest, greedy = logits.max(dim=-1)
    bound = TOLERANCE[dtype] * max(1.0, logits.abs().max().item())
    behind = (largest - chosen).max().item()
    # Not "behind > bound": NaN has to fail.
    if not behind <= bound:
        raise ExportFailed(
            f"{name} continues a prompt of {len(prompt)} tokens with a token whose logit is "
            f"{behind:.1e} below nanochat's largest, but rounding explains only {bound:.1e}; try "
            "another release"
        )
    return (greedy == torch.tensor(new_ids)).sum().item()


# ---- the other process ----


def _answers(asked: Asked, name: str) -> Answered:
    """What llama.cpp answers. In a process of its own: on bad files it aborts its process."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_ask, asked).result()
    except BrokenProcessPool:
        reason = "its process died"
    # Of any class: a user would meet the same error.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    raise ExportFailed(f"{name} cannot run the exported file ({reason}); try another release")


def _ask(asked: Asked) -> Answered:
    """Serve the file on this machine, ask, and end the server."""
    import xllamacpp

    # llama.cpp logs to both, whatever its verbosity.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(asked.path)
    parameters.n_ctx = asked.context_tokens
    parameters.n_parallel = 1
    parameters.warmup = False
    # Any free port, and for nobody else.
    parameters.port = 0
    key = secrets.token_hex()
    parameters.api_keys = [key]
    # By default keys and values are rounded to fp16.
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = flash
    server = xllamacpp.Server(parameters)
    address = urllib.parse.urlsplit(server.listening_address).netloc
    connection = http.client.HTTPConnection(address)
    with contextlib.closing(connection):
        ids = []
        for text in asked.texts:
            body = {"content": text, "add_special": True, "parse_special": False}
            ids.append(_post(connection, "/tokenize", body, key)["tokens"])
        new_ids = []
        for prompt in asked.prompts:
            body = {
                "prompt": prompt,
                "n_predict": asked.n_new,
                "temperature": 0,
                "samplers": ["temperature"],
                "return_tokens": True,
            }
            new_ids.append(_post(connection, "/completion", body, key)["tokens"])
    return Answered(ids, new_ids)


def _post(
    connection: http.client.HTTPConnection, path: str, body: dict[str, Any], key: str
) -> dict[str, Any]:
    """The JSON that the server answers. RuntimeError for another status than 200."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(f"status {response.status} of {path}: {content[:200]!r}")
    return json.loads(content)
