"""Byte-level tokenizers of other programs as ours, with ids numbered anew.

Ours orders tokens by merges and puts special tokens behind them; other programs put them where they
like. A model does not mind: its rows of embedding and head move along. What has to be equal is how
text becomes tokens, which is checked part by part, and then on sample text."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat.apps.export.tokenizer_files import PAD_TEXT, read_tokenizer_json, require_tokenizers
from nanochat.apps.export.verify import TOKENIZER_SAMPLE, ExportFailed
from nanochat.common import UsageError, in_a_line, read_json
from nanochat.data.chat import CHAT_SPECIALS
from nanochat.data.tokenizer import (
    BOS_OF_PATTERN,
    GPT2_PATTERN,
    N_BYTES,
    SPECIAL_NAME,
    Tokenizer,
    gpt2_byte_characters,
    parts_of,
)

if TYPE_CHECKING:
    import tokenizers

# GPT-2's pattern as other programs write it: it finds the same pieces as ours.
GPT2_AS_PUBLISHED = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {pattern: pattern for pattern in BOS_OF_PATTERN} | {GPT2_AS_PUBLISHED: GPT2_PATTERN}


@dataclass(frozen=True)
class Renumbered:
    """A tokenizer of ours, and the id (V,) that each of its tokens has in the other program.

    notes: sentences to print."""

    tokenizer: Tokenizer
    old_ids: Tensor
    notes: tuple[str, ...] = ()

    @classmethod
    def unchanged(cls, tokenizer: Tokenizer) -> "Renumbered":
        """A tokenizer that both number alike."""
        return cls(tokenizer, torch.arange(tokenizer.vocab_size))


class _NotOurs(Exception):
    """What our tokenizers cannot express."""


def read_renumbered(folder: Path, n_ids: int) -> Renumbered:
    """The tokenizer in a folder's tokenizer.json as one of ours, for a model of n_ids ids.

    One that was exported here keeps its ids. Ids that no token has become special tokens, which
    keep the model's probabilities what they were. UsageError, naming the part, for a tokenizer
    that splits text in a way that ours does not."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UsageError(
            f"{folder} has no tokenizer.json; a run cannot use another tokenizer (tokenizer.model "
            "is SentencePiece's): name a folder with a byte-level one with --tokenizer"
        )
    try:
        return Renumbered.unchanged(read_tokenizer_json(folder))
    except UsageError as error:
        not_exported_here = error
    try:
        return _renumbered(folder, n_ids)
    except _NotOurs as problem:
        raise UsageError(
            f"{path}: {problem}; a run needs a byte-level BPE tokenizer that splits text as GPT-2's"
            " does, or one that nanochat exported"
        ) from not_exported_here


def _renumbered(folder: Path, n_ids: int) -> Renumbered:
    """read_renumbered() of a byte-level tokenizer. Raises _NotOurs."""
    require_tokenizers()
    import tokenizers

    path = folder / "tokenizer.json"
    content = read_json(path, "tokenizer")
    try:
        theirs = tokenizers.Tokenizer.from_file(str(path))
    # The package raises plain Exceptions.
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a tokenizer ({in_a_line(error)})") from None
    try:
        pattern = _pattern(content)
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        _check_parts(content)
        tokens, ids = _in_order_of_merges(content["model"], added)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a tokenizer ({error!r})") from None
    largest = max([*ids, *added.values()])
    if largest >= n_ids:
        raise UsageError(
            f"{path}: has ids up to {largest}, but vocab_size in config.json is {n_ids}"
        )
    bos = _bos(folder, added)
    unnamed = sorted(set(range(n_ids)) - {*ids, *added.values()})
    others = {i: name for name, i in added.items() if name != bos}
    others |= {i: f"unused {i}" for i in unnamed}
    special_ids = sorted(others)
    tokenizer = Tokenizer("bpe", tokens, pattern)
    names = _special_names([others[i] for i in special_ids], special_ids, tokenizer.bos_text)
    tokenizer = tokenizer.with_specials(names)
    old_ids = torch.tensor([*ids, added[bos], *special_ids])
    _compare(theirs, tokenizer, old_ids)
    notes = [
        f"texts begin and end with {tokenizer.bos_text}, which is {bos!r} in {path}; another token "
        "that ends texts is shown by its name, for --stop"
    ]
    renamed = [
        f"{name} is {others[i]!r}" for i, name in zip(special_ids, names) if i not in unnamed
    ]
    if renamed:
        notes.append("special tokens: " + ", ".join(renamed[:5]))
    return Renumbered(tokenizer, old_ids, tuple(notes))


# ---- what must be as in ours ----


def _check_parts(content: dict[str, Any]) -> None:
    """Raise _NotOurs for a part of a tokenizer.json that changes ids and that ours lacks."""
    model = content["model"]
    if model["type"] != "BPE":
        raise _NotOurs(f"model is {model['type']}, not BPE")
    if content.get("normalizer"):
        raise _NotOurs(f"normalizer is {content['normalizer'].get('type')}, and ours have none")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise _NotOurs(f"model has {name} {model[name]!r}, and ours has none")
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        raise _NotOurs("decoder is not ByteLevel: its tokens are not bytes")
    for token in content["added_tokens"]:
        if not token["special"]:
            raise _NotOurs(
                f"added_tokens has {token['content']!r}, which is found in text before merges, and "
                "ours has only special tokens, which text never contains"
            )


def _pattern(content: dict[str, Any]) -> str:
    """Our pattern for how a tokenizer.json splits text. Raises _NotOurs if there is none."""
    stage = content.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", [stage])
    last = stages[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _NotOurs(
            f"pre_tokenizer is {last.get('type')} (add_prefix_space: "
            f"{last.get('add_prefix_space')}), and ours is ByteLevel without a prefix"
        )
    if len(stages) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    split = stages[0]
    regex = split.get("pattern", {}).get("Regex") if split.get("type") == "Split" else None
    isolated = split.get("behavior") == "Isolated" and not split.get("invert")
    if len(stages) != 2 or last.get("use_regex", True) or not isolated or regex not in PATTERNS:
        kinds = ", ".join(str(each.get("type")) for each in stages)
        raise _NotOurs(f"pre_tokenizer ({kinds}, pattern {regex!r}) splits text in another way")
    return PATTERNS[regex]


def _in_order_of_merges(
    model: dict[str, Any], added: dict[str, int]
) -> tuple[list[bytes], list[int]]:
    """The bytes of ordinary tokens, single bytes first, then by merges, and their ids.

    tiktoken joins any neighbours whose joint bytes are a token, a list of merges names one pair for
    each. Both give the same ids if every token arrives at its pair by the earlier merges alone.
    Raises _NotOurs if not."""
    byte_of = gpt2_byte_characters()

    def raw(spelled: str) -> bytes:
        if not set(spelled) <= set(byte_of):
            raise _NotOurs(f"model has the token {spelled!r}, which is not written in bytes")
        return bytes(byte_of[character] for character in spelled)

    ids = {raw(name): i for name, i in model["vocab"].items() if name not in added}
    singles = sorted((token for token in ids if len(token) == 1), key=ids.get)
    if len(singles) != N_BYTES:
        raise _NotOurs(f"model has {len(singles)} single bytes, and ours has all {N_BYTES}")
    # each release of the package has its own spelling
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [[raw(part) for part in pair] for pair in pairs]
    tokens = [*singles, *(b"".join(pair) for pair in merges)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) != len(tokens) or ranks.keys() != ids.keys():
        raise _NotOurs("model has tokens that no merge makes, or that two merges make")
    for pair in merges:
        if parts_of(b"".join(pair), ranks) != pair:
            raise _NotOurs(f"model has the merge {pair}, which earlier merges never lead to")
    return tokens, [ids[token] for token in tokens]


# ---- special tokens ----


def _bos(folder: Path, added: dict[str, int]) -> str:
    """The special token that begins texts, or else ends them. Raises _NotOurs if none is named."""
    names = {i: name for name, i in added.items()}
    settings = {}
    # The second one prevails, as in transformers.
    for file in ("config.json", "tokenizer_config.json"):
        content = read_json(folder / file, "tokenizer") if (folder / file).exists() else {}
        if isinstance(content, dict):
            settings |= content
    for role in ("bos_token", "eos_token"):
        found = settings.get(role)
        # a name, or an object that has one
        name = found.get("content") if isinstance(found, dict) else found
        if isinstance(name, str) and name in added:
            return name
        token_id = settings.get(f"{role}_id")
        if isinstance(token_id, int) and token_id in names:
            return names[token_id]
    if len(added) == 1:
        return next(iter(added))
    raise _NotOurs(
        "no special token is named as bos_token or eos_token in tokenizer_config.json, and every "
        "text of a run begins with one"
    )


def _special_names(names: Iterable[str], ids: Iterable[int], bos_text: str) -> list[str]:
    """Names in our spelling, such as <|unk|> for <unk>, none of which means something else here."""
    taken = {bos_text, PAD_TEXT, *CHAT_SPECIALS}
    found = []
    for name, i in zip(names, ids):
        if not SPECIAL_NAME.fullmatch(name):
            # </s> must not be mistaken for <s>
            spelled = name.lower().replace("/", "end_")
            word = re.sub(r"[^a-z0-9]+", "_", spelled).strip("_")
            name = f"<|{word or 'special'}|>"
        if name in taken:
            name = f"{name.removesuffix('|>')}_{i}|>"
        taken.add(name)
        found.append(name)
    return found


def _compare(theirs: "tokenizers.Tokenizer", ours: Tokenizer, old_ids: Tensor) -> None:
    """Compare the ids of sample text. Raises ExportFailed if they differ."""
    # A file may also say how calls cut and fill texts, which is no part of the ids.
    theirs.no_truncation()
    theirs.no_padding()
    expected = theirs.encode(TOKENIZER_SAMPLE, add_special_tokens=False).ids
    if old_ids[torch.tensor(ours.encode(TOKENIZER_SAMPLE))].tolist() != expected:
        raise ExportFailed("the tokenizer gives other ids of sample text than tokenizer.json")
