"""Tokenizers: byte-pair encoding trained on the data, characters, bytes. All reversible, all one class and one file format.

A tokenizer is a list of byte strings (the id is the index) and one special token, BOS, whose id comes last. BOS opens
every row and marks where documents end; text that spells it is encoded as plain text."""

import base64
import functools
import json
from pathlib import Path

import numpy as np

from nanochat.common import UsageError, read_json, sha256_hex, write_atomic

KINDS = ("bpe", "char", "byte")
FORMAT = 1
FILE_NAME = "vocab.json"
BOS_TEXT = "<|bos|>"
EXPECTED_BYTES_PER_TOKEN = {"bpe": 4, "char": 1, "byte": 1}  # for plans that may not read the data
MIN_BPE_VOCAB = 256 + 1  # every byte and BOS
# Pieces that merges never cross: a word with at most one leading space or sign; one or two digits; signs with a leading
# space; a line break with the blank space around it, so that code's indentation is one piece; other blank space, its last
# character left to the word that follows.
SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]\s*|\s+(?!\S)|\s+"


def derived_vocab_size(n_bytes):
    """Vocabulary size for BPE on `n_bytes` of text: the power of two nearest 1 per 12,800 bytes, from 512 to 32,768.

    Smaller data has too few examples of each token to learn an embedding for more."""
    return int(2 ** np.clip(np.round(np.log2(max(n_bytes, 1) / 12_800)), 9, 15))


def expected_vocab_size(kind, vocab_size, n_bytes):
    """Vocabulary size before the data is read, for plans; 128 stands for the unknown number of characters."""
    if kind == "bpe":
        return derived_vocab_size(n_bytes) if vocab_size == -1 else vocab_size
    if kind in KINDS:
        return {"byte": 257, "char": 128}[kind]
    return load(kind).vocab_size


class Tokenizer:
    """kind: one of KINDS. tokens: bytes of each ordinary token; for 'bpe' in merge order (tiktoken's ranks)."""

    def __init__(self, kind, tokens):
        self.kind, self.tokens = kind, list(tokens)
        self.bos = len(self.tokens)
        self.vocab_size = self.bos + 1
        if kind == "char":
            points = np.array([ord(token.decode("utf-8")) for token in self.tokens], dtype=np.uint32)
            self._order = np.argsort(points)
            self._points = points[self._order]

    @functools.cached_property
    def _encoding(self):
        import tiktoken
        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding("nanochat", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={BOS_TEXT: self.bos})

    @property
    def fingerprint(self):
        """SHA-256 that two tokenizers share exactly when they encode alike."""
        return sha256_hex(self._serialized())

    def encode(self, text):
        """Token ids (list of int) of a text, without BOS. UsageError if a char tokenizer lacks one of its characters."""
        # lone surrogates, which undecodable command-line bytes become, have no UTF-8 form
        return self.encode_batch([text.encode("utf-8", "replace").decode("utf-8")])[0].tolist()

    def encode_batch(self, texts, threads=1):
        """Token ids of several texts, as numpy arrays of uint32."""
        if self.kind == "byte":
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32) for text in texts]
        if self.kind == "char":
            return [self._encode_characters(text) for text in texts]
        return [np.array(ids, dtype=np.uint32) for ids in self._encoding.encode_ordinary_batch(texts, num_threads=threads)]

    def _encode_characters(self, text):
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        places = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        unknown = self._points[places] != points
        if unknown.any():
            character = chr(points[unknown.argmax()])
            raise UsageError(f"the character {character!r} (U+{ord(character):04X}) is not among this tokenizer's "
                             f"{self.bos} characters; use --tokenizer=bpe or byte, or text with the same characters")
        return self._order[places].astype(np.uint32)

    def decode(self, ids):
        """The text of token ids; bytes that are no valid UTF-8 become U+FFFD, special tokens their names."""
        return b"".join(BOS_TEXT.encode() if i == self.bos else self.tokens[i] for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id):
        """The raw bytes of one token; b"" for BOS, which counts no bytes."""
        return b"" if token_id == self.bos else self.tokens[token_id]

    def byte_counts(self):
        """UTF-8 bytes per token id, int64 (V,). From raw token bytes: a token may be part of a character."""
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], dtype=np.int64)

    def _serialized(self):
        tokens = [base64.b64encode(token).decode("ascii") for token in self.tokens]
        pattern = SPLIT_PATTERN if self.kind == "bpe" else None
        return json.dumps({"format": FORMAT, "kind": self.kind, "pattern": pattern, "special": BOS_TEXT, "tokens": tokens})

    def save(self, folder):
        """Write the tokenizer to folder/vocab.json (made if missing)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / FILE_NAME, self._serialized())


def load(folder):
    """The tokenizer saved in a folder. UsageError if there is none or it is not one of ours."""
    path = Path(folder) / FILE_NAME
    content = read_json(path, "tokenizer")
    try:
        if content["format"] != FORMAT:
            raise UsageError(f"tokenizer: {path} has format {content['format']}; this version reads format {FORMAT}")
        kind, tokens = content["kind"], [base64.b64decode(token, validate=True) for token in content["tokens"]]
        usable = kind in KINDS and tokens and content["pattern"] == (SPLIT_PATTERN if kind == "bpe" else None)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"tokenizer: {path} is not a tokenizer of this program ({error!r})") from None
    if not usable:
        raise UsageError(f"tokenizer: {path} has an unknown kind ({kind}), an empty vocabulary or another split pattern")
    return Tokenizer(kind, tokens)


def train(kind, texts, vocab_size):
    """A tokenizer fitted to an iterable of texts. vocab_size (BOS included) matters for 'bpe' only.

    BPE training is rustbpe's; it may find fewer merges than asked in little or repetitive text."""
    if kind == "byte":
        return Tokenizer("byte", [bytes([i]) for i in range(256)])
    if kind == "char":
        characters = sorted(set().union(*map(set, texts)))
        return Tokenizer("char", [character.encode("utf-8") for character in characters])
    import rustbpe
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=SPLIT_PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    return Tokenizer("bpe", [token for _, token in ranks])
