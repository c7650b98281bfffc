"""Whether llama.cpp computes from a gguf file what our model and tokenizer compute here."""

import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanochat.apps.export.tokenizer_files import PAD_TEXT
from nanochat.apps.export.verify import (
    TOKENIZER_SAMPLE,
    ExportFailed,
    Ours,
    encodable,
    sample_chat,
)
from nanochat.data.chat import is_chat, render
from nanochat.eval.llama_server import in_own_process, serving

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
    """What llama.cpp is asked to do: encode texts, BOS first, continue prompts greedily, and write
    the messages of a chat, if there are any, by the template."""

    path: Path
    context_tokens: int
    texts: list[str]
    prompts: list[list[int]]
    n_new: int
    chat: list[dict[str, str]]


@dataclass(frozen=True)
class Answered:
    """Ids of each text, new ids of each prompt, up to one that ends a text, and ids of the chat."""

    ids: list[list[int]]
    new_ids: list[list[int]]
    chat_ids: list[int]


def verify_with_llama_cpp(path: Path, model: "Decoder", tokenizer: "Tokenizer", dtype: str) -> str:
    """Run a gguf file in llama.cpp and compare it with our model and tokenizer.

    dtype: of the file; the model has its weights. Compared are the ids of text, random Unicode
    included, and of a chat, and greedy tokens: the same ones in float32, in other types those with
    our largest logits, up to their rounding. Returns a sentence to print; without the package
    xllamacpp it says that nothing was compared. Raises ExportFailed on a difference."""
    try:
        import xllamacpp
    except ImportError:
        return "not verified with llama.cpp (pip install xllamacpp, and export again)"
    name = f"llama.cpp (xllamacpp {xllamacpp.__version__})"
    ours = Ours(model, tokenizer)
    texts = sample_texts(tokenizer)
    prompts, n_new = _prompts(ours)
    # an answer to the last message is asked for
    chat = sample_chat(tokenizer)[:-1] if is_chat(tokenizer) else []
    asked = Asked(path, model.config.max_seq_len, texts, prompts, n_new, chat)
    found = _answers(asked, name)
    for text, ids in zip(texts, found.ids, strict=True):
        if ids != [tokenizer.bos, *tokenizer.encode(text)]:
            raise ExportFailed(
                f"{name} reads other token ids than nanochat from the text {ascii(text)}; try "
                "another release"
            )
    if chat and found.chat_ids != render(tokenizer, chat, generation_prompt=True)[0].tolist():
        raise ExportFailed(f"{name} reads other token ids than nanochat from a chat")
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
    texts_in_words = f"{n_characters:,} characters"
    if chat:
        texts_in_words += " and of a chat by its template"
    return f"verified with {name}: {greedy}; same token ids of {texts_in_words}"


# ---- what is compared ----


def sample_texts(tokenizer: "Tokenizer") -> list[str]:
    """Texts that a tokenizer can encode: difficult ones, and random characters."""
    generator = random.Random(0)
    if tokenizer.kind == "char":
        # It refuses other characters, and llama.cpp leaves them out.
        characters = [token.decode("utf-8") for token in tokenizer.tokens]
        fixed = [encodable(TOKENIZER_SAMPLE, tokenizer)]
    else:
        characters = [" ", "\n", "'s", *_assigned_characters()]
        # Text that spells special tokens must stay plain text.
        spelled = "".join([tokenizer.bos_text, *tokenizer.specials, PAD_TEXT])
        fixed = [TOKENIZER_SAMPLE + spelled, "<s></s>\n\n\n  \t x"]
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
    ended = bool(new_ids) and new_ids[-1] in ours.tokenizer.end_ids
    if not new_ids or (len(new_ids) < n_new and not ended):
        raise ExportFailed(
            f"{name} ends after {len(new_ids)} of {n_new} tokens without drawing one that ends a "
            "text; try another release"
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
    """What llama.cpp answers. Raises ExportFailed if it cannot run the file."""
    try:
        return in_own_process(_ask, asked)
    # Of any class: a user would meet the same error.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    raise ExportFailed(f"{name} cannot run the exported file ({reason}); try another release")


def _ask(asked: Asked) -> Answered:
    """Serve the file on this machine, ask, and end the server."""
    with serving(asked.path, asked.context_tokens, exact=True) as server:
        ids = []
        for text in asked.texts:
            body = {"content": text, "add_special": True, "parse_special": False}
            ids.append(server.post("/tokenize", body)["tokens"])
        new_ids = []
        for prompt in asked.prompts:
            body = {
                "prompt": prompt,
                "n_predict": asked.n_new,
                "temperature": 0,
                "samplers": ["temperature"],
                "return_tokens": True,
            }
            new_ids.append(server.post("/completion", body)["tokens"])
        chat_ids = []
        if asked.chat:
            prompt = server.post("/apply-template", {"messages": asked.chat})["prompt"]
            # as its server encodes what a template wrote
            body = {"content": prompt, "add_special": True, "parse_special": True}
            chat_ids = server.post("/tokenize", body)["tokens"]
    return Answered(ids, new_ids, chat_ids)
