"""The content of one file of text, decompressed, in blocks and in lines.

A block at a time, so that a file may be larger than memory. What is no UTF-8 text is refused: each
message says what the file is instead and what to do. `where`, an argument of most functions, opens
these messages, such as "data: corpus.txt"."""

import codecs
import lzma
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanochat.common import UsageError, in_a_line, install_hint

BLOCK_BYTES = 1 << 20
# A line of more characters comes in several blocks.
LONG_LINE = 1 << 20
# bytes that are enough to recognise a file of another kind
HEAD_BYTES = 1024
# alone on a line of a .txt file
END_OF_DOCUMENT = "<|endoftext|>"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# command that unpacks each compression
TOOLS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
# codec of each in pyarrow, which has none for .xz
ARROW_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class FileRefused(UsageError):
    """A file that is no UTF-8 text.

    if_found: the message where a folder or a pattern names the file, which will find it again until
    it is replaced or moved."""

    # a default, since ranks exchange errors and pickle passes the message alone
    def __init__(self, message: str, if_found: str = "") -> None:
        super().__init__(message)
        self.if_found = if_found


@dataclass(frozen=True)
class _Kind:
    """A kind of file that is no text. ending: that its name should have, "" if it cannot be read.

    remedy: what to do if it cannot."""

    begins: re.Pattern[bytes]
    what: str
    ending: str = ""
    remedy: str = ""


XZ_MAGIC = b"\xfd7zXZ\0"
# None of these beginnings is that of a text in UTF-8 that someone would train on.
KINDS = (
    _Kind(re.compile(rb"\x1f\x8b"), "gzip data", ".gz"),
    _Kind(re.compile(rb"\x28\xb5\x2f\xfd"), "zstd data", ".zst"),
    _Kind(re.compile(re.escape(XZ_MAGIC)), "xz data", ".xz"),
    _Kind(re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P)"), "bzip2 data", ".bz2"),
    _Kind(re.compile(rb"PAR1\x15"), "a parquet file", ".parquet"),
    _Kind(re.compile(rb"ARROW1\0\0"), "an Arrow file", "", "write it as parquet"),
    _Kind(re.compile(rb"PK\x03\x04"), "a zip archive", "", "unpack it, with unzip"),
    _Kind(re.compile(rb"(?s:.{257})ustar"), "a tar archive", "", "unpack it, with tar"),
    _Kind(re.compile(rb"%PDF-\d"), "a PDF", "", "extract its text, for example with pdftotext"),
)
BYTE_ORDER_MARKS = (
    # the first four bytes of UTF-32 begin like UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Which of four consecutive bytes are NUL in most characters of a text without a byte order mark.
NUL_PATTERNS = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}


# --------------------------------------------------------------------------------------------------
# what is no text


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file only names the content that Git LFS keeps elsewhere. OSError if unreadable."""
    with path.open("rb") as f:
        return f.read(len(LFS_POINTER)) == LFS_POINTER


def refuse_head(path: Path, compression: str, ending: str, head: bytes, where: str) -> None:
    """UsageError if the first bytes of a file are not what its name says.

    compression, ending: of its name, such as ".gz" and ".txt"; "" if there is none. head: the bytes
    as they are on disk."""
    if head.startswith(LFS_POINTER):
        raise UsageError(
            f"{where} is a Git LFS pointer, not the text itself; fetch the content with `git lfs "
            f"pull` in its repository"
        )
    named = compression or ending
    kind = next((kind for kind in KINDS if kind.begins.match(head)), None)
    if kind and kind.ending and kind.ending == named:
        return
    if kind:
        remedy = kind.remedy or f"give it a name that ends in {kind.ending}"
        raise UsageError(f"{where} is {kind.what}, whatever its name says; {remedy}")
    if compression and head:
        raise UsageError(
            f"{where} is not {TOOLS[compression]} data; if it is plain text, take {compression} "
            f"off its name"
        )
    if compression:
        raise UsageError(f"{where} is truncated: it is empty; fetch or write it again")


def _refuse_other_encoding(path: Path, compression: str, block: bytes, where: str) -> None:
    """UsageError if the first block of a file, decompressed, is UTF-16, UTF-32 or packed again."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if block.startswith(mark)), "")
    encoding = encoding or _encoding_by_nul(block[:HEAD_BYTES])
    if encoding:
        opening = f"{where} is text in {encoding}; convert it to UTF-8: "
        command = iconv(path, compression, encoding)
        raise FileRefused(opening + command, opening + _replacing(command, path, compression))
    kind = next((kind for kind in KINDS if kind.begins.match(block)), None)
    if kind and compression:
        raise UsageError(f"{where} holds {kind.what} inside; unpack it")


def _encoding_by_nul(head: bytes) -> str:
    """The encoding of text of which most characters hold NUL bytes, "" if it is none."""
    whole = head[: len(head) // 4 * 4]
    if not whole.count(0):
        return ""
    pattern = tuple(whole[i::4].count(0) > len(whole) // 8 for i in range(4))
    encoding = NUL_PATTERNS.get(pattern, "")
    if not encoding:
        return ""
    # numbers of two or four bytes, such as token ids, look alike
    text = whole.decode(encoding, "replace")
    n_text = sum(character.isprintable() or character.isspace() for character in text)
    return encoding if n_text > 0.95 * len(text) else ""


def iconv(path: Path, compression: str, encoding: str) -> str:
    """The command that converts a file to UTF-8."""
    source, target = shlex.quote(str(path)), shlex.quote(str(_converted(path, compression)))
    convert = f"iconv -f {encoding} -t UTF-8"
    if compression:
        return f"{TOOLS[compression]} -dc {source} | {convert} > {target}"
    return f"{convert} {source} > {target}"


def _converted(path: Path, compression: str) -> Path:
    """Where iconv() writes the text of a file, decompressed."""
    name = path.name[: len(path.name) - len(compression)]
    stem, dot, ending = name.rpartition(".")
    return path.with_name(f"{stem}.utf8.{ending}" if dot else f"{name}.utf8")


def _replacing(command: str, path: Path, compression: str) -> str:
    """The command of iconv(), with an end that puts its result in the place of the file.

    The end runs only if iconv succeeds."""
    source, target = shlex.quote(str(path)), shlex.quote(str(_converted(path, compression)))
    if compression:
        return f"{command} && {TOOLS[compression]} -c {target} > {source} && rm {target}"
    return f"{command} && mv {target} {source}"


# --------------------------------------------------------------------------------------------------
# bytes


def unpacked(path: Path, compression: str, ending: str, where: str) -> Iterator[bytes]:
    """The content of a file, decompressed, in blocks of about BLOCK_BYTES, none of them empty.

    Raises UsageError, on the way, for a file that cannot be read, that is truncated or damaged, and
    for what is obviously no UTF-8 text."""
    try:
        with path.open("rb") as f:
            refuse_head(path, compression, ending, f.read(HEAD_BYTES), where)
            f.seek(0)
            blocks = _decompressed(f, compression, where) if compression else _plain_blocks(f)
            first = next(blocks, b"")
            _refuse_other_encoding(path, compression, first, where)
            if first:
                yield first
            yield from blocks
    except OSError as error:
        raise cannot_be_read(error, where) from None


def cannot_be_read(error: OSError, where: str) -> UsageError:
    """The error for a file that the system does not open or read."""
    return UsageError(
        f"{where} cannot be read ({error.strerror or in_a_line(error)}); check its path, its "
        f"permissions and the disk"
    )


def _plain_blocks(f: BinaryIO) -> Iterator[bytes]:
    while block := f.read(BLOCK_BYTES):
        yield block


def _decompressed(f: BinaryIO, compression: str, where: str) -> Iterator[bytes]:
    """The decompressed content of a file. UsageError if it is truncated or damaged."""
    tool = TOOLS[compression]
    blocks = _xz_blocks(f) if compression == ".xz" else _arrow_blocks(f, compression, where)
    try:
        yield from blocks
    except (OSError, EOFError, lzma.LZMAError) as error:
        # errors of the disk have a number, those of a codec have none
        if getattr(error, "errno", None):
            raise
        if "truncated" in str(error).lower():
            raise UsageError(
                f"{where} is truncated: its {tool} data end too early; fetch or write it again"
            ) from None
        raise UsageError(
            f"{where} is damaged, or followed by something that is not {tool} data "
            f"({in_a_line(error)}); test it with `{tool} -t`, and fetch or write it again"
        ) from None


def _arrow_blocks(f: BinaryIO, compression: str, where: str) -> Iterator[bytes]:
    """As pyarrow decompresses it: several streams in a row are one, whatever else is an error.

    The modules gzip and bz2 are not used: they ignore some of what may follow a stream."""
    try:
        import pyarrow
    except ImportError:
        raise install_hint("pyarrow", where) from None
    with pyarrow.CompressedInputStream(f, ARROW_CODECS[compression]) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _xz_blocks(f: BinaryIO) -> Iterator[bytes]:
    """The streams of an .xz file, with the padding of NUL bytes that may follow each."""
    packed = f.read(BLOCK_BYTES)
    while packed:
        if not packed.startswith(XZ_MAGIC[: len(packed)]):
            raise lzma.LZMAError("no stream begins there")
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not stream.eof:
            if stream.needs_input and not packed:
                packed = f.read(BLOCK_BYTES)
                if not packed:
                    raise EOFError("truncated")
            # a little data may unpack to very much
            block = stream.decompress(packed, BLOCK_BYTES)
            packed = b""
            if block:
                yield block
        packed = stream.unused_data.lstrip(b"\0")
        while not packed and (more := f.read(BLOCK_BYTES)):
            packed = more.lstrip(b"\0")


def lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    r"""The lines of the blocks of a file, without the "\n" at their ends."""
    parts: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        for line in others:
            yield b"".join(parts)
            parts = [line]
    last = b"".join(parts)
    if last:
        yield last


# --------------------------------------------------------------------------------------------------
# text


def text_blocks(path: Path, compression: str, ending: str, where: str) -> Iterator[str]:
    r"""The text of a file, in blocks that end where a line does.

    A line of more than LONG_LINE characters comes in several, none of which cuts an
    END_OF_DOCUMENT. A byte order mark is dropped. Line ends are "\n": "\r\n" and "\r\r\n", which
    converting twice makes, become one. A "\r" elsewhere is kept, since it is part of a text, such
    as the log of a program that draws a bar. Raises UsageError as unpacked(), and for NUL bytes and
    what is not UTF-8."""
    rest = ""
    for text in _decoded(path, compression, ending, where):
        rest += text
        cut = rest.rfind("\n") + 1
        if not cut and len(rest) > LONG_LINE:
            cut = _place_in_line(rest)
        if cut:
            yield _with_our_line_ends(rest[:cut])
            rest = rest[cut:]
    if rest:
        yield _with_our_line_ends(rest)


def _decoded(path: Path, compression: str, ending: str, where: str) -> Iterator[str]:
    """Blocks of text, which may end anywhere but inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read = 0
    is_first = True
    for block in unpacked(path, compression, ending, where):
        if b"\0" in block:
            message = (
                f"{where} is a binary file (byte {n_read + block.index(0):,} is NUL); give UTF-8 "
                f"text, .jsonl or .parquet"
            )
            remedy = "move it out of the folder, or name the others by a pattern"
            raise FileRefused(message, f"{message}; {remedy}")
        # of a character that the block before began
        n_pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            place = n_read - n_pending + error.start
            raise not_utf8(path, compression, place, error, where) from None
        n_read += len(block)
        yield text.removeprefix("\ufeff") if is_first else text
        is_first = is_first and not text
    n_pending = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise not_utf8(path, compression, n_read - n_pending, error, where) from None


def not_utf8(
    path: Path, compression: str, place: int, error: UnicodeDecodeError, here: str
) -> FileRefused:
    """The error for a byte that is not UTF-8, with the command that converts the file.

    here: opens the message. place: of the byte, from where `here` begins."""
    opening = (
        f"{here} is not UTF-8 (byte {place:,} is 0x{error.object[error.start]:02x}: "
        f"{error.reason}); if the file is Latin-1 or Windows-1252, convert it: "
    )
    command = iconv(path, compression, "WINDOWS-1252")
    others = " (-f names another encoding, and -f UTF-8 -c drops what is damaged)"
    return FileRefused(
        opening + command + others, opening + _replacing(command, path, compression) + others
    )


def _place_in_line(text: str) -> int:
    """Where to cut a long line: neither in an END_OF_DOCUMENT nor before its end."""
    end = len(text.rstrip("\r"))
    mark = text.rfind(END_OF_DOCUMENT[0], max(0, end - len(END_OF_DOCUMENT) + 1), end)
    return mark if mark > 0 else end


def _with_our_line_ends(text: str) -> str:
    return re.sub("\r+\n", "\n", text) if "\r\n" in text else text
