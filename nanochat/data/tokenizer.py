"""Tokenizers: byte-pair encoding (trained on the data, or GPT-2's), characters, bytes.

All are reversible, with one class and one file format. A tokenizer is a list of byte strings (the
id is the index) and special tokens, whose ids follow: BOS, then those of chats, if there are any.
BOS opens every row and marks where documents end; text that spells a special token is encoded as
plain text."""

import base64
import contextlib
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import (
    Unavailable,
    UsageError,
    cached,
    read_json,
    sha256_hex,
    valid_unicode,
    write_atomic,
)
from nanochat.data.download import DownloadFailed
from nanochat.data.hub import model_file

# what a file can hold; training has two names for the first, with different split patterns
TOKENIZER_KINDS = ("bpe", "char", "byte")
FORMAT = 1
# with special tokens after BOS, which versions that know only the first format would leave out
FORMAT_WITH_SPECIALS = 2
TOKENIZER_FILE = "vocab.json"
# the chat template, under the name that transformers knows too
TEMPLATE_FILE = "chat_template.jinja"
BOS_TEXT = "<|bos|>"
# the special token that ends an answer in a chat (chat.py), and with it a text that is generated
TURN_END = "<|turn_end|>"
# how special tokens that are added after BOS are spelled
SPECIAL_NAME = re.compile(r"<\|[a-z0-9_]+\|>")
# for plans that may not read the data
EXPECTED_BYTES_PER_TOKEN = {"bpe": 4, "bpe-llama": 4, "char": 1, "byte": 1, "gpt2": 4}
# every byte and BOS
MIN_BPE_VOCAB = 256 + 1
# Pieces that merges never cross: a word with at most one leading space or sign; one or two digits;
# signs with a leading space; a line break with the blank space around it, so that code's
# indentation is one piece; other blank space, its last character left to the word that follows.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]\s*|\s+(?!\S)|\s+"
# The pieces of Llama 3's tokenizer, which llama.cpp finds too (as "llama-bpe"): English
# contractions alone, digits in threes, signs together with the line breaks behind them, line breaks
# with the blank space before them but not the indentation behind them.
LLAMA_PATTERN = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of byte-pair encodings that are trained on the data, each with its split pattern.
BPE_PATTERNS = {"bpe": SPLIT_PATTERN, "bpe-llama": LLAMA_PATTERN}
# What train_tokenizer() makes.
TRAINED_TOKENIZERS = (*BPE_PATTERNS, "char", "byte")
# GPT-2's pattern in the form in which tiktoken publishes it: the same pieces as the first one,
# found without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-2 has one special token; documents began after it in its training too
GPT2_BOS_TEXT = "<|endoftext|>"
GPT2_REPO = "openai-community/gpt2"
GPT2_VOCAB_SIZE = 50257
GPT2_FINGERPRINT = "dcdb3967ca5dc5666beb6fba0f93bf03f8187499e879d73b3c4fba1fd5b3fb67"
# The split patterns that run, each with the name of its BOS. A file cannot bring another: a regular
# expression may take forever.
BOS_OF_PATTERN = {SPLIT_PATTERN: BOS_TEXT, LLAMA_PATTERN: BOS_TEXT, GPT2_PATTERN: GPT2_BOS_TEXT}
# A run of over a million blanks overflows the stack of the regex engine in tiktoken and rustbpe.
BLANKS_AT_ONCE = 500_000
# texts that rustbpe holds; its default of 8,192 would be gigabytes of texts of a megabyte
TEXTS_AT_ONCE = 128
# ids whose tokens are the single bytes, in every byte-pair encoding
N_BYTES = 256


def derived_vocab_size(n_bytes: int) -> int:
    """Vocabulary size for BPE on `n_bytes` of text.

    The power of two nearest 1 per 12,800 bytes, from 512 to 32,768: smaller data has too few
    examples of each token to learn an embedding for more."""
    return int(2 ** np.clip(np.round(np.log2(max(n_bytes, 1) / 12_800)), 9, 15))


def expected_vocab_size(name: str, vocab_size: int, n_bytes: int) -> int:
    """Vocabulary size before the data is read, for plans.

    name, vocab_size: of --tokenizer and --vocab-size (-1: derived from n_bytes of text). 128 stands
    for the unknown number of characters. Raises UsageError for a folder without a tokenizer."""
    if name in BPE_PATTERNS:
        return derived_vocab_size(n_bytes) if vocab_size == -1 else vocab_size
    fixed = {"byte": 257, "char": 128, "gpt2": GPT2_VOCAB_SIZE}
    return fixed[name] if name in fixed else read_tokenizer(name).vocab_size


class Tokenizer:
    """A vocabulary and how text is split into it.

    kind: one of TOKENIZER_KINDS. tokens: bytes of each ordinary token; for 'bpe' in merge order
    (tiktoken's ranks). pattern: for 'bpe', one of BOS_OF_PATTERN, else None. bos_text: how BOS is
    shown. specials: names of further special tokens, such as "<|turn_end|>"; their ids follow BOS.
    special_ids: {name: id} of these. end_ids: of tokens that end a text, BOS and TURN_END. GPT-2's
    is a 'bpe' with its own pattern. ValueError for names that are not spelled like that, or that
    occur twice."""

    def __init__(
        self,
        kind: str,
        tokens: Iterable[bytes],
        pattern: str | None = SPLIT_PATTERN,
        specials: Iterable[str] = (),
    ) -> None:
        self.kind = kind
        self.tokens = list(tokens)
        self.pattern = pattern if kind == "bpe" else None
        self.bos_text = BOS_OF_PATTERN[pattern] if kind == "bpe" else BOS_TEXT
        self.bos = len(self.tokens)
        self.specials = tuple(specials)
        self.special_ids = {name: self.bos + i for i, name in enumerate(self.specials, 1)}
        self.end_ids = frozenset({self.bos, self.special_ids.get(TURN_END, self.bos)})
        self.vocab_size = self.bos + 1 + len(self.specials)
        _check_specials(self.specials, self.bos_text)
        if kind == "char":
            points = [ord(token.decode("utf-8")) for token in self.tokens]
            # sorted, for searchsorted(); _order leads back to ids
            self._order = np.argsort(np.array(points, dtype=np.uint32))
            self._points = np.array(points, dtype=np.uint32)[self._order]

    @functools.cached_property
    def _encoding(self) -> Any:
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            "nanochat",
            pat_str=self.pattern,
            mergeable_ranks=ranks,
            special_tokens={self.bos_text: self.bos, **self.special_ids},
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 that two tokenizers share exactly when they encode alike."""
        return sha256_hex(self._serialized())

    def with_specials(self, names: Iterable[str]) -> "Tokenizer":
        """This tokenizer with further special tokens; those that it has already stay where they
        are, and no id changes. ValueError as Tokenizer()."""
        added = [name for name in names if name not in self.special_ids]
        return Tokenizer(self.kind, self.tokens, self.pattern, [*self.specials, *added])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS.

        Raises UsageError if a char tokenizer lacks one of its characters."""
        return self.encode_batch([valid_unicode(text)])[0].tolist()

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of several texts, uint32. Raises as encode()."""
        if self.kind == "byte":
            encoded = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts)
            return [ids.astype(np.uint32) for ids in encoded]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        # most texts are one part, so that the parts of all are encoded together
        parts_of_texts = [_blanks_cut(text) for text in texts]
        parts = [part for parts in parts_of_texts for part in parts]
        encoded = iter(self._encoding.encode_ordinary_batch(parts, num_threads=threads))
        return [_joined([next(encoded) for _ in parts]) for parts in parts_of_texts]

    def _encode_characters(self, text: str) -> np.ndarray:
        # one code point in four bytes: a lookup for all characters together
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        unknown = self._points[places] != points
        if unknown.any():
            character = chr(points[unknown.argmax()])
            raise UsageError(
                f"the character {character!r} (U+{ord(character):04X}) is not among this "
                f"tokenizer's {self.bos} characters; leave it out, or train with a tokenizer that "
                f"encodes any text: bpe or byte"
            )
        return self._order[places].astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Bytes that are not valid UTF-8 become U+FFFD, special tokens their names."""
        content = b"".join(self.spelling(i) for i in ids)
        return content.decode("utf-8", "replace")

    def spelling(self, token_id: int) -> bytes:
        """The bytes by which decode() shows one token: its own, and of a special one its name."""
        if token_id < self.bos:
            return self.tokens[token_id]
        return (self.bos_text, *self.specials)[token_id - self.bos].encode()

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token; b"" for special tokens, which count no bytes."""
        return self.tokens[token_id] if token_id < self.bos else b""

    def byte_counts(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int64 (V,).

        From raw token bytes, since a token may be a part of a character."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)

    def _serialized(self) -> str:
        specials = {"specials": list(self.specials)} if self.specials else {}
        content = {
            "format": FORMAT_WITH_SPECIALS if specials else FORMAT,
            "kind": self.kind,
            "pattern": self.pattern,
            "special": self.bos_text,
            **specials,
            "tokens": [base64.b64encode(token).decode("ascii") for token in self.tokens],
        }
        return json.dumps(content)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer to TOKENIZER_FILE in a folder, which is created if missing.

        Of a tokenizer for chats, TEMPLATE_FILE tells other programs how to write them."""
        # here, since it imports this module
        from nanochat.data.chat import JINJA

        Path(folder).mkdir(parents=True, exist_ok=True)
        if TURN_END in self.special_ids:
            write_atomic(Path(folder) / TEMPLATE_FILE, JINJA)
        write_atomic(Path(folder) / TOKENIZER_FILE, self._serialized())


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds ids: half the disk and memory for vocabularies up to 65,536."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def _check_specials(names: tuple[str, ...], bos_text: str) -> None:
    """ValueError unless these can be the names of special tokens after BOS."""
    wrong = [name for name in names if not SPECIAL_NAME.fullmatch(name)]
    if wrong:
        raise ValueError(f"special token {wrong[0]!r}: should be spelled like <|turn_end|>")
    if len({bos_text, *names}) != 1 + len(names):
        raise ValueError(f"special tokens {', '.join((bos_text, *names))}: one occurs twice")


def _blanks_cut(text: str) -> list[str]:
    """The text in one part, or in several where a run of blanks is too long for the engine."""
    if len(text) <= BLANKS_AT_ONCE:
        return [text]
    runs = re.finditer(rf"\s{{{BLANKS_AT_ONCE}}}", text)
    cuts = [0, *(match.end() for match in runs), len(text)]
    return [text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _joined(parts: list[list[int]]) -> np.ndarray:
    """Ids of the parts of a text as one array, uint32."""
    arrays = [np.array(ids, dtype=np.uint32) for ids in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


# --------------------------------------------------------------------------------------------------
# files


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder, or of a run folder.

    Either one that save() wrote, or files of GPT-2's format: encoder.json (or vocab.json), an
    object {token: id}, and merges.txt, which must agree with each other.
    Raises UsageError if there is none, it is damaged, or it is of another kind."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"tokenizer: {folder} {what}")
    names = (TOKENIZER_FILE, "encoder.json")
    if (folder / "tokenizer").is_dir() and not any((folder / name).exists() for name in names):
        # of a run
        folder = folder / "tokenizer"
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise UsageError(
            f"tokenizer: {folder} holds no tokenizer: neither {TOKENIZER_FILE}, nor GPT-2's "
            f"encoder.json and merges.txt"
        )
    content = read_json(path, "tokenizer")
    if not isinstance(content, dict) or isinstance(content.get("tokens"), list):
        return _from_our_file(path, content)
    merges_path = folder / "merges.txt"
    if not merges_path.exists():
        raise UsageError(
            f"tokenizer: {path} is not a tokenizer of this program, and if it is the table of "
            f"GPT-2's kind then merges.txt is missing from its folder"
        )
    return _from_gpt2_files(path, content, merges_path)


def _from_our_file(path: Path, content: Any) -> Tokenizer:
    """The tokenizer that save() wrote. UsageError if the file holds anything else."""
    try:
        if content["format"] not in (FORMAT, FORMAT_WITH_SPECIALS):
            raise UsageError(
                f"tokenizer: {path} has format {content['format']}; this version reads formats "
                f"{FORMAT} and {FORMAT_WITH_SPECIALS}"
            )
        kind = content["kind"]
        pattern = content["pattern"]
        tokens = [base64.b64decode(token, validate=True) for token in content["tokens"]]
        if kind == "bpe":
            bos_text = BOS_OF_PATTERN.get(pattern)
        else:
            bos_text = BOS_TEXT if pattern is None else None
        usable = (
            kind in TOKENIZER_KINDS and bos_text == content["special"] and _complete(kind, tokens)
        )
        specials = content["specials"] if content["format"] == FORMAT_WITH_SPECIALS else []
        _check_specials(tuple(specials), content["special"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"tokenizer: {path} is not a tokenizer of this program ({error!r})"
        ) from None
    if not usable:
        raise UsageError(
            f"tokenizer: {path} has an unknown kind ({kind}), an empty or incomplete vocabulary, "
            f"or another split pattern"
        )
    return Tokenizer(kind, tokens, pattern, specials)


def _complete(kind: str, tokens: list[bytes]) -> bool:
    """Whether a vocabulary has no token twice and holds what its kind needs.

    That is every byte, or single characters. ValueError for a token that is not UTF-8 there."""
    if kind == "char":
        characters = {token for token in tokens if len(token.decode("utf-8")) == 1}
        return 0 < len(tokens) == len(characters)
    # two ids of one token would make encoding depend on their order
    different = set(tokens)
    every_byte = {bytes([i]) for i in range(N_BYTES)} <= different
    if b"" in different or len(different) != len(tokens) or not every_byte:
        return False
    return kind == "bpe" or len(tokens) == N_BYTES


def gpt2_byte_characters() -> dict[str, int]:
    """{character: byte} of GPT-2's files, where every byte is one visible character.

    In the order of their ids: bytes that Latin-1 prints stand for themselves and come first; the
    others follow as the characters from U+0100 on."""
    visible = [b for b in range(N_BYTES) if chr(b).isprintable() and not chr(b).isspace()]
    others = [b for b in range(N_BYTES) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


class _NotGpt2Format(Exception):
    """What is wrong with a pair of files."""


def _from_gpt2_files(path: Path, encoder: dict[str, Any], merges_path: Path) -> Tokenizer:
    """The tokenizer of GPT-2's two files: 256 bytes, one token for each merge, <|endoftext|>.

    tiktoken joins any two neighbours whose joint bytes are a token, merges.txt names one pair for
    each token. Both give the same ids if every token, built from its bytes by the earlier merges
    alone, arrives at the pair that merges.txt names: what two neighbours were built from is not
    touched from outside, so they are always that pair. This is checked; UsageError if not."""
    try:
        text = merges_path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"tokenizer: {merges_path} cannot be read as UTF-8 text ({error})"
        ) from None
    try:
        by_id = _tokens_by_id(encoder)
        merges = _merges(text, len(by_id))
        tokens = _raw_tokens(by_id)
        _check_merges(merges, by_id, tokens)
    except _NotGpt2Format as problem:
        raise UsageError(
            f"tokenizer: {path} and {merges_path.name} are not a tokenizer of GPT-2's format: "
            f"{problem}"
        ) from None
    return Tokenizer("bpe", tokens, GPT2_PATTERN)


def _tokens_by_id(encoder: dict[str, Any]) -> list[str]:
    """The tokens of encoder.json as it writes them, <|endoftext|> last. Raises _NotGpt2Format."""
    # a bool is an int in Python, and is no id
    by_id = {i: token for token, i in encoder.items() if type(i) is int}
    if not by_id or sorted(by_id) != list(range(len(encoder))):
        raise _NotGpt2Format(f"the ids should be 0 to {len(encoder) - 1}, each once")
    tokens = [by_id[i] for i in range(len(by_id))]
    if tokens[-1] != GPT2_BOS_TEXT:
        raise _NotGpt2Format(
            f"the last id, {len(tokens) - 1}, should be {GPT2_BOS_TEXT}, and is {tokens[-1]!r}"
        )
    return tokens


def _merges(text: str, n_tokens: int) -> list[tuple[str, ...]]:
    """The lines of merges.txt in order, each of which should be a pair. Raises _NotGpt2Format."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    expected = N_BYTES + len(merges) + 1
    if n_tokens != expected:
        raise _NotGpt2Format(
            f"{len(merges):,} merges make {expected:,} tokens with the 256 bytes and "
            f"{GPT2_BOS_TEXT}, and there are {n_tokens:,}"
        )
    return merges


def _raw_tokens(by_id: list[str]) -> list[bytes]:
    """The bytes of every token but <|endoftext|>. Raises _NotGpt2Format."""
    byte_of = gpt2_byte_characters()
    tokens = []
    for i, token in enumerate(by_id[:-1]):
        if not token or not set(token) <= set(byte_of):
            raise _NotGpt2Format(
                f"token {i}, {token!r}, is not written in GPT-2's characters for bytes"
            )
        tokens.append(bytes(byte_of[character] for character in token))
    if set(tokens[:N_BYTES]) != {bytes([i]) for i in range(N_BYTES)}:
        raise _NotGpt2Format("ids 0 to 255 should be the single bytes")
    return tokens


def _check_merges(merges: list[tuple[str, ...]], by_id: list[str], tokens: list[bytes]) -> None:
    """Raise _NotGpt2Format unless tiktoken builds each token from the pair of its merge."""
    byte_of = gpt2_byte_characters()
    ranks = {token: i for i, token in enumerate(tokens)}
    for i, pair in enumerate(merges):
        token_id = N_BYTES + i
        if len(pair) != 2 or "".join(pair) != by_id[token_id]:
            raise _NotGpt2Format(
                f"merge {i} is {' '.join(pair)!r}, and token {token_id}, which it should make, is "
                f"{by_id[token_id]!r}"
            )
        raw_pair = [bytes(byte_of[character] for character in part) for part in pair]
        if parts_of(tokens[token_id], ranks) != raw_pair:
            raise _NotGpt2Format(
                f"merge {i}, {' '.join(pair)!r}, can never happen: the merges before it arrange "
                f"these bytes otherwise"
            )


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the bytes of a token become by the merges before its own. ranks: {token: id}."""
    parts = [token[i : i + 1] for i in range(len(token))]
    # as byte-pair encoding does it: the pair of the lowest rank first
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts[:-1], parts[1:], strict=True)]
        lowest = min(joined)
        if lowest >= ranks[token]:
            break
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


# --------------------------------------------------------------------------------------------------
# GPT-2's, and new ones


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, 50,257 ids, each as OpenAI numbers it; BOS is its <|endoftext|>.

    From tokenizers/gpt2 in the caches, else downloaded (1.5 MB) and saved there. Its fingerprint is
    checked, wherever it came from. Raises Unavailable if it cannot be downloaded now, UsageError if
    the folder holds something else."""
    tokenizer = saved_gpt2_tokenizer()
    if tokenizer is not None:
        return tokenizer
    folder = _gpt2_folder()
    by_hand = (
        f"put its encoder.json (or vocab.json) and merges.txt into {folder}, or into any folder, "
        f"and give that as --tokenizer"
    )
    try:
        paths = [model_file(GPT2_REPO, name).fetch() for name in ("vocab.json", "merges.txt")]
    except DownloadFailed as error:
        raise Unavailable(
            f"--tokenizer=gpt2: {error} Where there is no network, {by_hand}."
        ) from None
    tokenizer, problem = _downloaded_gpt2(*paths)
    # a right one is saved, a wrong one is downloaded again; another user's file has to stay
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
    if problem:
        raise Unavailable(
            f"--tokenizer=gpt2: what the hub sent for {GPT2_REPO} is not GPT-2's tokenizer "
            f"({problem}); a proxy may have changed it: try again, or {by_hand}"
        )
    tokenizer.save(folder)
    return tokenizer


def saved_gpt2_tokenizer() -> Tokenizer | None:
    """GPT-2's tokenizer if the caches hold it, else None. UsageError if it is not GPT-2's."""
    folder = _gpt2_folder()
    # as gpt2_tokenizer() saves it, or as someone put it there by hand
    if not any((folder / name).exists() for name in (TOKENIZER_FILE, "encoder.json")):
        return None
    tokenizer = read_tokenizer(folder)
    if tokenizer.fingerprint != GPT2_FINGERPRINT:
        raise UsageError(
            f"tokenizer: {folder} does not hold GPT-2's tokenizer; delete the folder to have it "
            f"downloaded again"
        )
    return tokenizer


def _gpt2_folder() -> Path:
    return cached("tokenizers", "gpt2")


def _downloaded_gpt2(encoder_path: Path, merges_path: Path) -> tuple[Tokenizer | None, str]:
    """(tokenizer, what is wrong with it or "") of two files that should be GPT-2's."""
    try:
        content = read_json(encoder_path, "tokenizer")
        encoder = content if isinstance(content, dict) else {}
        tokenizer = _from_gpt2_files(encoder_path, encoder, merges_path)
    except UsageError as error:
        return None, str(error)
    if tokenizer.fingerprint == GPT2_FINGERPRINT:
        return tokenizer, ""
    fingerprints = f"{tokenizer.fingerprint[:16]}, not {GPT2_FINGERPRINT[:16]}"
    return tokenizer, f"its fingerprint is {fingerprints}"


def train_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of one of TRAINED_TOKENIZERS, fitted to texts.

    vocab_size: BOS included; it matters for those of BPE_PATTERNS only. BPE training is rustbpe's;
    it may find fewer merges than asked in little or repetitive text."""
    if name == "byte":
        return Tokenizer("byte", [bytes([i]) for i in range(N_BYTES)])
    if name == "char":
        characters = sorted(set().union(*map(set, texts)))
        return Tokenizer("char", [character.encode("utf-8") for character in characters])
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        (part for text in texts for part in _blanks_cut(text)),
        vocab_size - 1,
        buffer_size=TEXTS_AT_ONCE,
        pattern=BPE_PATTERNS[name],
    )
    # the order of the merges is the order of the ids
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    return Tokenizer("bpe", [token for _, token in ranks], BPE_PATTERNS[name])
