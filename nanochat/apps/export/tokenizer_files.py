"""tokenizer.json and its companions: our tokenizers in the form of transformers, and back."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import UsageError, install_hint, read_json, write_atomic, write_json
from nanochat.data.chat import EXPORTED_PAD, JINJA, is_chat
from nanochat.data.tokenizer import (
    BOS_OF_PATTERN,
    TEMPLATE_FILE,
    TOKENIZER_KINDS,
    TURN_END,
    Tokenizer,
    gpt2_byte_characters,
    parts_of,
)

if TYPE_CHECKING:
    import tokenizers

# Padding, and the byte whose token it is. UTF-8 never has this byte, so no text contains the token.
# With BOS as padding, the usual collators would take the ends of documents out of the labels, and a
# model that is trained further would forget to end.
PAD_TEXT = EXPORTED_PAD
PAD_BYTE = b"\xff"
# Settings of a call, which transformers stores along with a tokenizer: they change no ids.
CALL_SETTINGS = ("truncation", "padding")


def pad_id(tokenizer: Tokenizer) -> int | None:
    """The id that an exported tokenizer pads with; None if the vocabulary has none to spare.

    Characters are all in use, and another program's byte pairs may have merged the byte."""
    containing = [i for i, token in enumerate(tokenizer.tokens) if PAD_BYTE in token]
    if tokenizer.kind == "char" or len(containing) != 1:
        return None
    return containing[0]


def tokenizer_json(tokenizer: Tokenizer, pad: int | None) -> "tokenizers.Tokenizer":
    """Our tokenizer as one of the package tokenizers, with the same ids; save() writes the file.

    Encoding adds BOS in front; with add_special_tokens=False the ids are those of
    tokenizer.encode(). pad: pad_id(), or None for BOS. UsageError if the package is missing or
    tokenizer.json cannot express the tokenizer."""
    require_tokenizers()
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    if tokenizer.kind == "char":
        theirs = characters_json(tokenizer)
    else:
        theirs = _of_bytes(tokenizer, pad)
    bos = tokenizer.bos_text
    special = [bos, *tokenizer.specials]
    if pad is not None:
        special.append(PAD_TEXT)
    theirs.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in special]
    )
    # The package numbers added tokens itself, from the end of the vocabulary.
    assert theirs.token_to_id(bos) == tokenizer.bos
    assert all(theirs.token_to_id(name) == i for name, i in tokenizer.special_ids.items())
    assert pad is None or theirs.token_to_id(PAD_TEXT) == pad
    theirs.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.bos)]
    )
    return theirs


def require_tokenizers() -> None:
    """UsageError if the package tokenizers is not installed."""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise install_hint("tokenizers", "export") from None


def characters_json(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """A char tokenizer without BOS, as one of the package tokenizers."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    vocabulary = {token.decode("utf-8"): i for i, token in enumerate(tokenizer.tokens)}
    # The vocabulary lacks <unk>: an unknown character then is an error, as it is here.
    theirs = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    theirs.decoder = decoders.Fuse()
    return theirs


def _of_bytes(tokenizer: Tokenizer, pad: int | None) -> "tokenizers.Tokenizer":
    """A bpe or byte tokenizer without BOS. pad: the id that is named PAD_TEXT."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    # tokenizer.json is text: each byte is written as the character that GPT-2's files have for it.
    character = {byte: c for c, byte in gpt2_byte_characters().items()}

    def spelled(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    names = [spelled(token) for token in tokenizer.tokens]
    if pad is not None:
        names[pad] = PAD_TEXT
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [(spelled(left), spelled(right)) for left, right in merges_of(tokenizer)]
    theirs = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    # use_regex is GPT-2's pattern; a tokenizer of ours has its own, or none.
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    if tokenizer.kind == "bpe":
        words = pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated")
        by_bytes = pre_tokenizers.Sequence([words, by_bytes])
    theirs.pre_tokenizer = by_bytes
    theirs.decoder = decoders.ByteLevel()
    return theirs


def merges_of(tokenizer: Tokenizer) -> list[list[bytes]]:
    """The pair of byte strings that each token of several bytes was merged from, in token order.

    tiktoken joins any neighbours whose joint bytes are a token, lowest rank first; a list of merges
    names one pair a token. Built from its bytes by the earlier merges alone, a trained token
    arrives at that pair. UsageError if one does not."""
    ranks = {token: i for i, token in enumerate(tokenizer.tokens)}
    pairs = []
    for token in tokenizer.tokens:
        if len(token) == 1:
            continue
        pair = parts_of(token, ranks)
        if len(pair) != 2:
            raise UsageError(
                f"the tokenizer's token {ranks[token]} ({token!r}) is not one merge of two earlier "
                "tokens, and tokenizer.json cannot express it; export a run with another tokenizer"
            )
        pairs.append(pair)
    return pairs


def write_tokenizer_files(tokenizer: Tokenizer, max_seq_len: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Of a tokenizer for chats also TEMPLATE_FILE. max_seq_len: tokens; transformers warns about
    longer texts. UsageError as tokenizer_json()."""
    pad = pad_id(tokenizer)
    tokenizer_json(tokenizer, pad).save(str(folder / "tokenizer.json"))
    bos = tokenizer.bos_text
    chat = is_chat(tokenizer)
    special = {
        "bos_token": bos,
        # Without chats one token has both roles: it separates documents, so it also ends one.
        "eos_token": TURN_END if chat else bos,
        "pad_token": bos if pad is None else PAD_TEXT,
    }
    if tokenizer.specials:
        special["additional_special_tokens"] = list(tokenizer.specials)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        # generate() continues the end of each row, where padding must not be.
        "padding_side": "left",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        # Text that spells BOS stays plain text, as in our tokenizers. But what a chat template
        # writes is text too, of which special tokens must be read.
        "split_special_tokens": not chat,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if chat:
        # Twice: transformers has read the file since 4.53; older releases, and other programs,
        # look for it among the settings.
        config["chat_template"] = JINJA
        write_atomic(folder / TEMPLATE_FILE, JINJA)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def read_tokenizer_json(folder: Path) -> Tokenizer:
    """Our tokenizer from a tokenizer.json that tokenizer_json() built, as transformers may have
    saved it again.

    UsageError, naming the differing part, for any other tokenizer."""
    require_tokenizers()
    path = folder / "tokenizer.json"
    content, names, specials = _content_and_names(path)
    kind, pattern = _kind_and_pattern(content)
    if kind == "bpe" and pattern not in BOS_OF_PATTERN:
        raise _other_tokenizer(path, "pre_tokenizer", f"splits text by the pattern {pattern!r}")
    try:
        tokenizer = _built(kind, pattern, names).with_specials(specials)
        # Earlier versions padded with BOS.
        pad = pad_id(tokenizer) if PAD_TEXT in names else None
        expected = json.loads(tokenizer_json(tokenizer, pad).to_str())
    except (UsageError, KeyError, TypeError, ValueError) as error:
        kinds = ", ".join(TOKENIZER_KINDS)
        raise _other_tokenizer(path, "model", f"is not one of {kinds} ({error})") from None
    # The whole file is compared: ids could also differ by a normalizer, or by the order of merges.
    for field in expected:
        if field not in CALL_SETTINGS and content.get(field) != expected[field]:
            raise _other_tokenizer(path, field, "differs from what `nanochat export` writes")
    return tokenizer


def _other_tokenizer(path: Path, field: str, what: str) -> UsageError:
    """The error for a tokenizer.json that is not ours. field: its part that differs."""
    return UsageError(
        f"{path}: {field} {what}; only tokenizers exported by `nanochat export` can be read back"
    )


def _content_and_names(path: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """A tokenizer.json, the names of its tokens, and of the special ones after BOS, by their ids.

    UsageError if it is no tokenizer."""
    import tokenizers

    # Its messages for a missing file and for text that is not JSON are clearer than the package's.
    read_json(path, "tokenizer")
    try:
        # Rewritten by the installed release of the package: each release spells the file its way.
        content = json.loads(tokenizers.Tokenizer.from_file(str(path)).to_str())
        names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
        added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
        specials = [name for token_id, name in added if token_id > len(names)]
    # The package raises plain Exceptions.
    except Exception as error:
        raise UsageError(f"{path} cannot be read as a tokenizer ({error})") from None
    return content, names, specials


def _kind_and_pattern(content: dict[str, Any]) -> tuple[str, str | None]:
    """The kind of tokenizer that a tokenizer.json can be at best, and how it splits text."""
    stages = (content["pre_tokenizer"] or {}).get("pretokenizers", [])
    pattern = None
    if stages:
        pattern = stages[0].get("pattern", {}).get("Regex")
    if content["model"]["type"] == "WordLevel":
        kind = "char"
    elif pattern:
        kind = "bpe"
    else:
        kind = "byte"
    return kind, pattern


def _built(kind: str, pattern: str | None, names: list[str]) -> Tokenizer:
    """Our tokenizer from its vocabulary in the spelling of tokenizer.json, in the order of ids."""
    if kind == "char":
        return Tokenizer(kind, [name.encode("utf-8") for name in names])
    byte_of = gpt2_byte_characters()
    tokens = [PAD_BYTE if name == PAD_TEXT else bytes(byte_of[c] for c in name) for name in names]
    if kind == "byte":
        return Tokenizer(kind, tokens)
    return Tokenizer(kind, tokens, pattern)
