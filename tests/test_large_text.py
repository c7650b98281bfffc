"""Memory that a large text takes."""

import tracemalloc

import pytest

from nanochat.data.text import iterate_documents, iterate_pieces

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
