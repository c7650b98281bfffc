"""Tokenizers: byte-pair encoding trained on the data or GPT-2's, characters, bytes. All reversible, one class and file format.

A tokenizer is a list of byte strings (the id is the index) and one special token, BOS, whose id comes last. BOS opens
every row and marks where documents end; text that spells it is encoded as plain text."""

import base64
import functools
import json
import re
from pathlib import Path

import numpy as np

from nanochat.common import (
    Unavailable,
    UsageError,
    base_dir,
    read_json,
    sha256_hex,
    valid_unicode,
    write_atomic,
)
from nanochat.data import hub
from nanochat.data.download import DownloadFailed

TOKENIZER_KINDS = ("bpe", "char", "byte")
FORMAT = 1
TOKENIZER_FILE = "vocab.json"
BOS_TEXT = "<|bos|>"
EXPECTED_BYTES_PER_TOKEN = {
    "bpe": 4,
    "char": 1,
    "byte": 1,
    "gpt2": 4,
}  # for plans that may not read the data
MIN_BPE_VOCAB = 256 + 1  # every byte and BOS
# Pieces that merges never cross: a word with at most one leading space or sign; one or two digits; signs with a leading
# space; a line break with the blank space around it, so that code's indentation is one piece; other blank space, its last
# character left to the word that follows.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]\s*|\s+(?!\S)|\s+"
# GPT-2's pattern in the form in which tiktoken publishes it: the same pieces as the first one, found without backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_BOS_TEXT = (
    "<|endoftext|>"  # GPT-2 has one special token; documents began after it in its training too
)
GPT2_REPO = "openai-community/gpt2"
GPT2_VOCAB_SIZE = 50257
GPT2_FINGERPRINT = "dcdb3967ca5dc5666beb6fba0f93bf03f8187499e879d73b3c4fba1fd5b3fb67"
# The split patterns that run, each with the name of its BOS. A file cannot bring another: a regex may take forever.
BOS_OF_PATTERN = {SPLIT_PATTERN: BOS_TEXT, GPT2_PATTERN: GPT2_BOS_TEXT}
BLANKS_AT_ONCE = 500_000  # a run of over a million blanks overflows the stack of the regex engine in tiktoken and rustbpe


def derived_vocab_size(n_bytes):
    """Vocabulary size for BPE on `n_bytes` of text: the power of two nearest 1 per 12,800 bytes, from 512 to 32,768.

    Smaller data has too few examples of each token to learn an embedding for more."""
    return int(2 ** np.clip(np.round(np.log2(max(n_bytes, 1) / 12_800)), 9, 15))


def expected_vocab_size(kind, vocab_size, n_bytes):
    """Vocabulary size before the data is read, for plans; 128 stands for the unknown number of characters."""
    if kind == "bpe":
        return derived_vocab_size(n_bytes) if vocab_size == -1 else vocab_size
    if kind in ("byte", "char", "gpt2"):
        return {"byte": 257, "char": 128, "gpt2": GPT2_VOCAB_SIZE}[kind]
    return read_tokenizer(kind).vocab_size


class Tokenizer:
    """kind: one of TOKENIZER_KINDS. tokens: bytes of each ordinary token; for 'bpe' in merge order (tiktoken's ranks).

    pattern: for 'bpe', one of BOS_OF_PATTERN, else None. bos_text: how BOS is shown. GPT-2's is a 'bpe' with its own pattern."""

    def __init__(self, kind, tokens, pattern=SPLIT_PATTERN):
        self.kind, self.tokens = kind, list(tokens)
        self.pattern = pattern if kind == "bpe" else None
        self.bos_text = BOS_OF_PATTERN[pattern] if kind == "bpe" else BOS_TEXT
        self.bos = len(self.tokens)
        self.vocab_size = self.bos + 1
        if kind == "char":
            points = np.array(
                [ord(token.decode("utf-8")) for token in self.tokens], dtype=np.uint32
            )
            self._order = np.argsort(points)
            self._points = points[self._order]

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            "nanochat",
            pat_str=self.pattern,
            mergeable_ranks=ranks,
            special_tokens={self.bos_text: self.bos},
        )

    @property
    def fingerprint(self):
        """SHA-256 that two tokenizers share exactly when they encode alike."""
        return sha256_hex(self._serialized())

    def encode(self, text):
        """Token ids (list of int) of a text, without BOS. UsageError if a char tokenizer lacks one of its characters."""
        return self.encode_batch([valid_unicode(text)])[0].tolist()

    def encode_batch(self, texts, threads=1):
        """Token ids of several texts, as numpy arrays of uint32."""
        if self.kind == "byte":
            return [
                np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)
                for text in texts
            ]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        parts = [_blanks_cut(text) for text in texts]
        flat = self._encoding.encode_ordinary_batch(
            [part for of_one in parts for part in of_one], num_threads=threads
        )
        ids = iter(np.array(ids, dtype=np.uint32) for ids in flat)
        return [
            next(ids) if len(of_one) == 1 else np.concatenate([next(ids) for _ in of_one])
            for of_one in parts
        ]

    def _encode_characters(self, text):
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        unknown = self._points[places] != points
        if unknown.any():
            character = chr(points[unknown.argmax()])
            raise UsageError(
                f"the character {character!r} (U+{ord(character):04X}) is not among this tokenizer's "
                f"{self.bos} characters; use --tokenizer=bpe or byte, or text with the same characters"
            )
        return self._order[places].astype(np.uint32)

    def decode(self, ids):
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD, special tokens their names."""
        return b"".join(
            self.bos_text.encode() if i == self.bos else self.tokens[i] for i in ids
        ).decode("utf-8", "replace")

    def token_bytes(self, token_id):
        """The raw bytes of one token; b"" for BOS, which counts no bytes."""
        return b"" if token_id == self.bos else self.tokens[token_id]

    def byte_counts(self):
        """UTF-8 bytes per token id, int64 (V,). From raw token bytes: a token may be part of a character."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)

    def _serialized(self):
        tokens = [base64.b64encode(token).decode("ascii") for token in self.tokens]
        return json.dumps(
            {
                "format": FORMAT,
                "kind": self.kind,
                "pattern": self.pattern,
                "special": self.bos_text,
                "tokens": tokens,
            }
        )

    def save(self, folder):
        """Write the tokenizer to folder/vocab.json (made if missing)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / TOKENIZER_FILE, self._serialized())


def _blanks_cut(text):
    """The text in one part, or in several where it has a run of blanks too long for the regex engine."""
    if len(text) <= BLANKS_AT_ONCE:
        return [text]
    cuts = [0, *(match.end() for match in re.finditer(rf"\s{{{BLANKS_AT_ONCE}}}", text)), len(text)]
    return [text[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def read_tokenizer(folder):
    """The tokenizer in a folder, or of a run folder: one that save() wrote, or GPT-2's files and others of the same format.

    Those are encoder.json (or vocab.json), an object {token: id}, and merges.txt; they must agree with each other.
    UsageError if there is none, it is damaged, or it is of another kind."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(
            f"tokenizer: {folder} {'is not a folder' if folder.exists() else 'does not exist'}"
        )
    names = (TOKENIZER_FILE, "encoder.json")
    if (folder / "tokenizer").is_dir() and not any((folder / name).exists() for name in names):
        folder = folder / "tokenizer"  # of a run
    paths = [folder / name for name in names if (folder / name).exists()]
    if not paths:
        raise UsageError(
            f"tokenizer: {folder} holds no tokenizer: neither {TOKENIZER_FILE}, nor GPT-2's encoder.json and merges.txt"
        )
    content, merges_path = read_json(paths[0], "tokenizer"), folder / "merges.txt"
    if not isinstance(content, dict) or isinstance(content.get("tokens"), list):
        return _from_our_file(paths[0], content)
    if not merges_path.exists():
        raise UsageError(
            f"tokenizer: {paths[0]} is not a tokenizer of this program, and if it is the table of GPT-2's kind "
            f"then merges.txt is missing beside it"
        )
    return _from_gpt2_files(paths[0], content, merges_path)


def _from_our_file(path, content):
    try:
        if content["format"] != FORMAT:
            raise UsageError(
                f"tokenizer: {path} has format {content['format']}; this version reads format {FORMAT}"
            )
        kind, pattern, tokens = (
            content["kind"],
            content["pattern"],
            [base64.b64decode(t, validate=True) for t in content["tokens"]],
        )
        bos_text = (
            BOS_OF_PATTERN.get(pattern) if kind == "bpe" else BOS_TEXT if pattern is None else None
        )
        usable = (
            kind in TOKENIZER_KINDS and bos_text == content["special"] and _complete(kind, tokens)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"tokenizer: {path} is not a tokenizer of this program ({error!r})"
        ) from None
    if not usable:
        raise UsageError(
            f"tokenizer: {path} has an unknown kind ({kind}), an empty or incomplete vocabulary, or another split pattern"
        )
    return Tokenizer(kind, tokens, pattern)


def _complete(kind, tokens):
    """Whether a vocabulary has no token twice and what its kind needs: every byte, or single characters (else ValueError)."""
    if kind == "char":
        return (
            0 < len(tokens) == len({token for token in tokens if len(token.decode("utf-8")) == 1})
        )
    bytes_needed = {bytes([i]) for i in range(256)}
    return (
        b"" not in tokens
        and len(set(tokens)) == len(tokens)
        and bytes_needed <= set(tokens)
        and (kind == "bpe" or len(tokens) == 256)
    )


def gpt2_byte_characters():
    """{character: byte} of GPT-2's files, where every byte is one visible character, in the order of their ids.

    Bytes that Latin-1 prints stand for themselves and come first; the others follow as the characters from U+0100 on."""
    visible = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def _from_gpt2_files(path, encoder, merges_path):
    """The tokenizer of GPT-2's two files: 256 bytes, one token for each merge in order, <|endoftext|>.

    tiktoken joins any two neighbours whose joint bytes are a token, merges.txt names one pair for each token. Both give the
    same ids if every token, built from its bytes by the earlier merges alone, arrives at the pair that merges.txt names:
    what two neighbours were built from is not touched from outside, so they are always that pair. This is checked."""

    def refuse(what):
        raise UsageError(
            f"tokenizer: {path} and {merges_path.name} are not a tokenizer of GPT-2's format: {what}"
        )

    by_id = {i: token for token, i in encoder.items() if type(i) is int}
    if not by_id or sorted(by_id) != list(range(len(encoder))):
        refuse(f"the ids should be 0 to {len(encoder) - 1}, each once")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"tokenizer: {merges_path} cannot be read as UTF-8 text ({error})"
        ) from None
    lines = [line.rstrip("\r") for line in lines]
    header = lines[0].startswith("#version")
    merges = [tuple(line.split(" ")) for line in lines[header:] if line]
    if by_id[len(by_id) - 1] != GPT2_BOS_TEXT:
        refuse(
            f"the last id, {len(by_id) - 1}, should be {GPT2_BOS_TEXT}, and is {by_id[len(by_id) - 1]!r}"
        )
    if len(by_id) != 256 + len(merges) + 1:
        refuse(
            f"{len(merges):,} merges make {256 + len(merges) + 1:,} tokens with the 256 bytes and {GPT2_BOS_TEXT}, and there are "
            f"{len(by_id):,}"
        )
    byte_of = gpt2_byte_characters()
    tokens = []
    for i in range(len(by_id) - 1):
        if not by_id[i] or not set(by_id[i]) <= set(byte_of):
            refuse(f"token {i}, {by_id[i]!r}, is not written in GPT-2's characters for bytes")
        tokens.append(bytes(byte_of[character] for character in by_id[i]))
    if len(set(tokens[:256])) != 256 or any(len(token) != 1 for token in tokens[:256]):
        refuse("ids 0 to 255 should be the single bytes")
    ranks = {token: i for i, token in enumerate(tokens)}
    for i, pair in enumerate(merges):
        if len(pair) != 2 or "".join(pair) != by_id[256 + i]:
            refuse(
                f"merge {i} is {' '.join(pair)!r}, and token {256 + i}, which it should make, is {by_id[256 + i]!r}"
            )
        if parts_of(tokens[256 + i], ranks) != [
            bytes(byte_of[character] for character in part) for part in pair
        ]:
            refuse(
                f"merge {i}, {' '.join(pair)!r}, can never happen: the merges before it arrange these bytes otherwise"
            )
    return Tokenizer("bpe", tokens, GPT2_PATTERN)


def parts_of(token, ranks):
    """What a token's bytes become by the merges before its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts[:-1], parts[1:], strict=True)]
        lowest = min(joined)
        if lowest >= ranks[token]:
            break
        place = joined.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def gpt2_tokenizer(download=True):
    """GPT-2's tokenizer, 50,257 ids, each as OpenAI numbers it; BOS is its <|endoftext|>.

    From base_dir()/tokenizers/gpt2, else downloaded (1.5 MB) and saved there. Its fingerprint is checked, wherever it came from.
    Unavailable if it cannot be had now; with download=False, None if it is not here yet."""
    folder = base_dir() / "tokenizers" / "gpt2"
    if (folder / TOKENIZER_FILE).exists() or (
        folder / "encoder.json"
    ).exists():  # as saved, or as someone put it there by hand
        tokenizer = read_tokenizer(folder)
        if tokenizer.fingerprint != GPT2_FINGERPRINT:
            raise UsageError(
                f"tokenizer: {folder} does not hold GPT-2's tokenizer; delete the folder to have it fetched again"
            )
        return tokenizer
    if not download:
        return None
    by_hand = f"put its encoder.json (or vocab.json) and merges.txt into {folder}, or into any folder, and give that as --tokenizer"
    try:
        paths = [hub.model_file(GPT2_REPO, name).fetch() for name in ("vocab.json", "merges.txt")]
    except DownloadFailed as error:
        raise Unavailable(
            f"--tokenizer=gpt2: {error} Where there is no network, {by_hand}."
        ) from None
    try:
        content = read_json(paths[0], "tokenizer")
        tokenizer = _from_gpt2_files(
            paths[0], content if isinstance(content, dict) else {}, paths[1]
        )
        problem = f"its fingerprint is {tokenizer.fingerprint[:16]}, not {GPT2_FINGERPRINT[:16]}"
    except UsageError as error:
        tokenizer, problem = None, str(error)
    for path in paths:  # what is right is saved, what is wrong is fetched again
        path.unlink(missing_ok=True)
    if tokenizer is None or tokenizer.fingerprint != GPT2_FINGERPRINT:
        raise Unavailable(
            f"--tokenizer=gpt2: what the hub sent for {GPT2_REPO} is not GPT-2's tokenizer ({problem}); a proxy may have "
            f"changed it: try again, or {by_hand}"
        )
    tokenizer.save(folder)
    return tokenizer


def train_tokenizer(kind, texts, vocab_size):
    """A tokenizer fitted to an iterable of texts. vocab_size (BOS included) matters for 'bpe' only.

    BPE training is rustbpe's; it may find fewer merges than asked in little or repetitive text."""
    if kind == "byte":
        return Tokenizer("byte", [bytes([i]) for i in range(256)])
    if kind == "char":
        characters = sorted(set().union(*map(set, texts)))
        return Tokenizer("char", [character.encode("utf-8") for character in characters])
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        (part for text in texts for part in _blanks_cut(text)),
        vocab_size - 1,
        pattern=SPLIT_PATTERN,
    )
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    return Tokenizer("bpe", [token for _, token in ranks])
