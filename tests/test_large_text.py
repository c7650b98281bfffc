"""Memory that a large text takes: to read it, to fit a tokenizer to it and to tokenize it."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from nanochat.data.sources import local_corpus
from nanochat.data.text import iterate_documents, iterate_pieces
from nanochat.data.token_cache import TokenCache
from nanochat.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the quick brown fox jumps over the lazy dog and says nothing"
# one character of four bytes: a str of the whole text would take four times its size
WIDE = "🙂"


def write_text(path, n_bytes, end):
    """About n_bytes of text, with `end` after each sentence."""
    sentence = f"{WORDS} 12,345 times{end}"
    with path.open("w", encoding="utf-8") as f:
        f.write(f"{WIDE}{end}")
        for _ in range(n_bytes // 1_000_000):
            f.write(sentence * (1_000_000 // len(sentence)))
    return path


def peak_bytes(work):
    """The most memory that Python objects and arrays took while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_reading_takes_memory_of_a_few_blocks(tmp_path, end):
    """Without a mark the text is one document, with blanks at its ends even one line."""
    path = write_text(tmp_path / "a.txt", 40_000_000, end)

    def read():
        assert sum(len(piece.text) for piece in iterate_pieces(path)) > 30_000_000

    # a few blocks, of which the one with the wide character takes four bytes a character
    assert peak_bytes(read) < 20_000_000


def test_documents_of_a_large_file_are_not_held(tmp_path):
    path = write_text(tmp_path / "a.txt", 30_000_000, f"{WORDS * 9}\n<|endoftext|>\n")

    def read():
        assert sum(1 for _ in iterate_documents(path)) > 10_000

    assert peak_bytes(read) < 20_000_000


def test_tokenizing_takes_memory_of_the_ids(tmp_path, monkeypatch):
    """A document of any size is encoded in pieces."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    n_bytes = 40_000_000
    corpus = local_corpus(str(write_text(tmp_path / "a.txt", n_bytes, "\n")))
    cache = TokenCache(train_tokenizer("byte", [], -1), threads=1)
    # its ids, two bytes each, twice, and what is encoded at a time
    peak = peak_bytes(lambda: cache.tokens(corpus.train[0]))
    assert cache.lengths[corpus.train[0].fingerprint] > 0.85 * n_bytes
    assert peak < 4 * n_bytes + 90_000_000


UNDER_A_LIMIT = """
import resource, sys
from nanochat.data import sources, token_cache
from nanochat.data.tokenizer import train_tokenizer

def read_and_tokenize(path):
    corpus = sources.local_corpus(path)
    tokenizer = token_cache.load_tokenizer("bpe", 512, corpus)
    cache = token_cache.TokenCache(tokenizer, 2, report=lambda line: None)
    return sum(cache.length(shard) for shard in [*corpus.train, *corpus.val])

# once without a limit, so that libraries are loaded and their threads exist
read_and_tokenize(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(read_and_tokenize(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\n", " "])
def test_200_megabytes_under_a_limit_of_memory(tmp_path, end):
    """A text without a mark, or even a line end, is fitted and tokenized in three times its size.

    What rustbpe and tiktoken hold at a time does not depend on the text, of which only the token
    ids are in memory as a whole."""
    small = write_text(tmp_path / "small.txt", 2_000_000, end)
    large = write_text(tmp_path / "large.txt", 200_000_000, end)
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, str(small), str(large), str(600_000_000)],
        cwd=ROOT,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 20_000_000
