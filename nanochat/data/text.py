"""The documents of one file: text, JSON lines, JSON, tables; plain or compressed.

Every format is read in the same way whatever the compression (textfile.py). Only .json files that
are one list or one object are held in memory as a whole. A document of any size in a .txt file can
be read in pieces (iterate_pieces)."""

import csv
import glob
import itertools
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.common import UsageError, in_a_line, install_hint, valid_unicode
from nanochat.data.textfile import (
    END_OF_DOCUMENT,
    HEAD_BYTES,
    FileRefused,
    cannot_be_read,
    lines,
    not_utf8,
    refuse_head,
    text_blocks,
    unpacked,
)

FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv")
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
# Formats that are not read: files so named would pass for plain text.
OTHER_FORMATS = {
    ".ndjson": "JSON lines; give it a name that ends in .jsonl",
    ".jsonlines": "JSON lines; give it a name that ends in .jsonl",
    ".tsv": "a table with tabs; convert it to a file whose name ends in .csv or .jsonl",
}
DEFAULT_COLUMN = "text"
MARK_LINE = re.compile(rf"^[^\S\n]*{re.escape(END_OF_DOCUMENT)}[^\S\n]*$", re.MULTILINE)
# of text that is encoded in one go
PIECE_CHARACTERS = 1 << 20
# rows of a table that are read together
BATCH_ROWS = 1024
# files of a folder that the package datasets wrote with save_to_disk()
SAVED_DATASET = "state.json"
SAVED_SPLITS = "dataset_dict.json"


class Piece(NamedTuple):
    """A stretch of a document. ends: whether it is the document's last."""

    text: str
    ends: bool


# --------------------------------------------------------------------------------------------------
# names


def text_format(name: str) -> tuple[str, str]:
    """(format, compression) of a file by its name, in upper or lower case.

    One of FORMATS or "", and one of COMPRESSIONS."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS[1:] if name.endswith(ending)), "")
    formats = (ending for ending in FORMATS if name.endswith(ending + compression))
    return next(formats, ""), compression


def text_suffix(name: str) -> str:
    """The part of a file name that says how it stores text, such as ".jsonl.gz".

    "" if it is none of our formats."""
    suffix, compression = text_format(name)
    return name[-len(suffix + compression) :] if suffix else ""


def split_column(data: str) -> tuple[str, str]:
    """(path, column) of a value of --data that names local files, such as "a.parquet:content".

    A path or pattern that exists as it is written wins; else what follows the last ":" is the
    column, unless it holds a path separator. Without one the column is DEFAULT_COLUMN. UsageError
    for an empty column."""
    path, colon, column = data.rpartition(":")
    if not colon or not path or os.sep in column or os.path.lexists(data) or glob.glob(data):
        return data, DEFAULT_COLUMN
    if not column:
        raise UsageError(
            f"--data={data}: no column is named after the colon; name one, such as "
            f"--data={path}:content, or leave the colon out"
        )
    return path, column


def refuse_what_is_no_text(path: Path) -> None:
    """UsageError, with the remedy, for a file or folder that is obviously no text that can be read.

    That is a Git LFS pointer, an .arrow file or a folder that save_to_disk() wrote, a compressed or
    binary file under another name, and text in UTF-16 or UTF-32. Only the beginning is read."""
    where = f"data: {path}"
    if path.is_dir():
        _refuse_saved_dataset(path)
        return
    if path.suffix.lower() == ".arrow":
        raise UsageError(
            f"{where} is an Arrow file, which is not read; write it as parquet: "
            + _python(f"Dataset.from_file({_quoted(path)}).to_parquet({_as_parquet(path)})")
        )
    suffix, compression = text_format(path.name)
    if suffix == ".parquet":
        _check_parquet_head(path, compression)
    else:
        next(unpacked(path, compression, suffix, where), None)


def _refuse_saved_dataset(folder: Path) -> None:
    """UsageError for a folder that the package datasets wrote with save_to_disk()."""
    parquet = _as_parquet(folder)
    opening = f"data: {folder} is a folder that save_to_disk() of the package datasets wrote, "
    if (folder / SAVED_SPLITS).exists():
        raise UsageError(
            f"{opening}with several splits; write the one to train on as parquet, here 'train': "
            + _python(f'load_from_disk({_quoted(folder)})["train"].to_parquet({parquet})')
        )
    if (folder / SAVED_DATASET).exists() and any(folder.glob("*.arrow")):
        raise UsageError(
            f"{opening}which is not read; write it as parquet: "
            + _python(f"load_from_disk({_quoted(folder)}).to_parquet({parquet})")
        )


def _as_parquet(path: Path) -> str:
    """The name of a parquet file for the content of a path, as Python writes a string."""
    return _quoted(path.with_name(f"{path.name.removesuffix('.arrow')}.parquet"))


def _quoted(path: Path) -> str:
    # double quotes, since single ones are around the shell's argument
    return json.dumps(str(path), ensure_ascii=False)


def _python(code: str) -> str:
    """The shell command that runs a line with the package datasets."""
    return f"python -c {shlex.quote(f'from datasets import *; {code}')}"


# --------------------------------------------------------------------------------------------------
# documents


def iterate_documents(path: str | Path, column: str = DEFAULT_COLUMN) -> Iterator[str]:
    """The documents of one file, blank ones left out.

    column: of JSON and of tables, the field with the text. A file without a known ending is read as
    text. Raises UsageError, on the way, for whatever is wrong with the file."""
    return joined(iterate_pieces(path, column))


def joined(pieces: Iterable[Piece]) -> Iterator[str]:
    """The documents whose pieces these are."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            text = "".join(parts)
            # before the text is used: it may be half of the memory
            parts.clear()
            yield text


def iterate_pieces(path: str | Path, column: str = DEFAULT_COLUMN) -> Iterator[Piece]:
    """iterate_documents() in pieces: those of a .txt file are about a megabyte at most.

    Other formats have one piece a document. Raises as iterate_documents()."""
    path = Path(path)
    try:
        yield from _without_blank_documents(_pieces(path, column))
    except UsageError:
        raise
    except MemoryError:
        raise UsageError(
            f"data: {path} takes more memory to read than there is; split its largest documents, "
            f"or store it as .jsonl or .parquet"
        ) from None
    except OSError as error:
        raise cannot_be_read(error, f"data: {path}") from None
    except Exception as error:
        # Of any type, since each library has its own: training that reads ahead can save the run
        # before it ends by a UsageError, and by nothing else.
        raise UsageError(
            f"data: {path} cannot be read ({type(error).__name__}: {in_a_line(error)}); repair or "
            f"convert the file"
        ) from error


def cut_pieces(pieces: Iterable[Piece], first: int, last: int | None) -> Iterator[Piece]:
    """The characters [first:last] of the first document in `pieces`, in pieces."""
    begin = 0
    for piece in pieces:
        end = begin + len(piece.text)
        stops = piece.ends or (last is not None and end >= last)
        text = piece.text[max(0, first - begin) : None if last is None else max(0, last - begin)]
        if text or stops:
            yield Piece(text, stops)
        if stops:
            return
        begin = end


def documents_between(pieces: Iterable[Piece], first: int, last: int | None) -> Iterator[Piece]:
    """The pieces of the documents [first:last] of those in `pieces`."""
    number = 0
    for piece in pieces:
        if number >= first and (last is None or number < last):
            yield piece
        number += piece.ends
        # before the next document is read, which may be damaged
        if last is not None and number >= last:
            return


def cut_at_blanks(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, cut again so that each can be split into words or tokens by itself.

    That is before a space that follows another character, or before a line end or an ideographic
    full stop that follows a letter or digit: no tokenizer of this program has a token that goes on
    there (a line end may belong to a sign before it). A piece has about PIECE_CHARACTERS at most;
    only text without any such place is longer."""
    parts: list[str] = []
    for text, ends in _shortened(pieces):
        cut = 0 if ends else _last_blank(text)
        if cut:
            yield Piece("".join([*parts, text[:cut]]), False)
            parts.clear()
        parts.append(text[cut:])
        if ends:
            yield Piece("".join(parts), True)
            parts.clear()


def _shortened(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, none of more than PIECE_CHARACTERS."""
    for text, ends in pieces:
        last = max(0, len(text) - 1) // PIECE_CHARACTERS
        for i in range(last + 1):
            part = text[i * PIECE_CHARACTERS : (i + 1) * PIECE_CHARACTERS]
            yield Piece(part, ends and i == last)


def _last_blank(text: str) -> int:
    """The last place where cut_at_blanks() can cut; 0 if there is none."""
    for place in range(len(text) - 1, 0, -1):
        before = text[place - 1]
        if text[place] == " " and not before.isspace():
            return place
        # Text of scripts without spaces has these two.
        if text[place] in "\n\u3002" and before.isalnum():
            return place
    return 0


def read_text(path: Path, where: str = "") -> str:
    """A file of text, decompressed, as one str. where: opens each message.

    UsageError if it cannot be read or is not UTF-8 text."""
    suffix, compression = text_format(path.name)
    return "".join(text_blocks(path, compression, suffix, where or f"data: {path}"))


def read_prompts(path: str | Path, flag: str) -> list[str]:
    r"""The prompts of a file, one a line, blank lines left out.

    Lines end at "\n" or "\r\n" alone: every other character may be part of a prompt. Raises
    UsageError, which names `flag`, for a file that cannot be read or holds no prompt."""
    found = read_text(Path(path), f"{flag}={path}:").split("\n")
    prompts = [line.rstrip("\r") for line in found if line.strip()]
    if not prompts:
        raise UsageError(f"{flag}={path}: holds no prompt; write one a line")
    return prompts


def inline_marks(path: Path, column: str, limit: int) -> int:
    """How often END_OF_DOCUMENT is plain text in the documents of a file.

    Only about the first `limit` characters are read. Raises as iterate_documents()."""
    n_marks = n_read = 0
    for piece in iterate_pieces(path, column):
        n_marks += piece.text.count(END_OF_DOCUMENT)
        n_read += len(piece.text)
        if n_read >= limit:
            break
    return n_marks


def _pieces(path: Path, column: str) -> Iterator[Piece]:
    """The documents of a file in pieces, blank ones too."""
    suffix, compression = text_format(path.name)
    if suffix in ("", ".txt"):
        _refuse_other_formats(path, compression)
        if column != DEFAULT_COLUMN:
            raise UsageError(
                f"data: {path} is plain text, which has no column '{column}'; leave the column out"
            )
        return _read_txt(path, compression, suffix)
    if suffix == ".parquet":
        documents = _read_parquet(path, compression, column)
    else:
        found = lines(unpacked(path, compression, suffix, f"data: {path}"))
        readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
        documents = readers[suffix](path, found, column)
    return (Piece(text, True) for text in documents if text is not None)


def _refuse_other_formats(path: Path, compression: str) -> None:
    """UsageError for a file whose name says that it is one of OTHER_FORMATS."""
    name = path.name.lower().removesuffix(compression)
    for ending, what in OTHER_FORMATS.items():
        if name.endswith(ending):
            raise UsageError(f"data: {path} is {what}, or in .txt to train on it as it is")


def _without_blank_documents(pieces: Iterable[Piece]) -> Iterator[Piece]:
    # of a document that is blank so far
    held: list[Piece] = []
    is_blank = True
    for piece in pieces:
        is_blank = is_blank and not piece.text.strip()
        if is_blank:
            held.append(piece)
        else:
            yield from held
            yield piece
            held.clear()
        if piece.ends:
            held.clear()
            is_blank = True


# --------------------------------------------------------------------------------------------------
# text


def _read_txt(path: Path, compression: str, suffix: str) -> Iterator[Piece]:
    """The documents of a text, which END_OF_DOCUMENT separates where it stands on its own line.

    Line ends around documents are dropped, unless the mark is nowhere in the file: then the
    document is the file, character by character."""
    where = f"data: {path}"
    # whether the mark is anywhere in the file, and whether the document has begun
    marked = begun = False
    # line ends that may be the document's last
    held = ""
    for block, has_mark, ends in _between_marks(text_blocks(path, compression, suffix, where)):
        marked = marked or has_mark
        if not begun and not marked and block.startswith("\n"):
            # a rare case, for which the file is read twice
            again = text_blocks(path, compression, suffix, where)
            marked = any(END_OF_DOCUMENT in text for text in again)
            begun = not marked
        text = block.lstrip("\n") if marked and not begun else block
        body = text.rstrip("\n")
        if body:
            yield Piece(held + body, False)
            held = ""
        begun = begun or bool(body)
        if begun:
            held += text[len(body) :]
        if ends:
            yield Piece("", True)
            held = ""
            begun = False
    yield Piece("" if marked else held, True)


def _between_marks(blocks: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether its block holds the mark, whether a line with the mark alone follows it)."""
    begins_line = True
    for block in blocks:
        has_mark = END_OF_DOCUMENT in block
        # the rest of a line that began in the block before is no line
        start = 0 if begins_line else block.find("\n") + 1 or len(block)
        first, *others = MARK_LINE.split(block[start:]) if has_mark else [block[start:]]
        texts = [block[:start] + first, *others]
        for text in texts[:-1]:
            yield text, has_mark, True
        yield texts[-1], has_mark, False
        begins_line = block.endswith("\n")


# --------------------------------------------------------------------------------------------------
# JSON


def _read_jsonl(path: Path, found: Iterable[bytes], column: str) -> Iterator[str | None]:
    """The field `column` of every line."""
    for number, line in enumerate(found, 1):
        if line.strip():
            here = f"data: {path} line {number:,}"
            yield _field(path, here, _json_of_line(path, here, line, number == 1), column)


def _json_of_line(path: Path, here: str, line: bytes, is_first: bool) -> Any:
    try:
        return _loads(line, is_first)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, here, error) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{here} is not JSON ({_json_problem(error)}); a .jsonl file has one object a "
            f"line: repair the line or take it out"
        ) from None


def _loads(content: bytes, is_first: bool) -> Any:
    # a byte order mark may open the file
    return json.loads(content.decode("utf-8-sig" if is_first else "utf-8"))


def _json_problem(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else in_a_line(error)


def _not_utf8(path: Path, here: str, error: UnicodeDecodeError) -> FileRefused:
    return not_utf8(path, text_format(path.name)[1], error.start, error, here)


def _field(path: Path, here: str, value: Any, column: str) -> str | None:
    """The text of a JSON object, None if it is null. here: file and place, for the UsageError."""
    if not isinstance(value, dict):
        what = "a list" if isinstance(value, list) else json.dumps(value)[:40]
        raise UsageError(f"{here} is {what}, not an object; write one object a document")
    if column not in value:
        texts = {name: text for name, text in value.items() if isinstance(text, str)}
        raise _no_column(path, here, column, list(value), texts)
    text = value[column]
    if not isinstance(text, str | None):
        raise UsageError(
            f"{here}: field '{column}' is not a string but {type(text).__name__}; write the text "
            f"as a string"
        )
    return None if text is None else valid_unicode(text)


def _read_json(path: Path, found: Iterable[bytes], column: str) -> Iterator[str | None]:
    """Documents of a .json file: an object a line, or one list or object, which is read whole."""
    found = iter(found)
    opening: list[bytes] = []
    for line in found:
        opening.append(line)
        if line.strip():
            break
    try:
        is_lines = isinstance(_loads(b"\n".join(opening), True), dict)
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _read_jsonl(path, itertools.chain(opening, found), column)
        return
    content = b"\n".join(itertools.chain(opening, found))
    try:
        value = _loads(content, True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"data: {path}", error) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"data: {path} is not JSON ({_json_problem(error)}); repair or convert the file"
        ) from None
    del content
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        # a list of strings has no columns: each is a document
        is_text = isinstance(item, str) and column == DEFAULT_COLUMN
        yield item if is_text else _field(path, f"data: {path} item {number:,}", item, column)


# --------------------------------------------------------------------------------------------------
# tables


def _no_column(
    path: Path, here: str, column: str, names: list[str], texts: dict[str, str]
) -> UsageError:
    """The error for a missing column. texts: {name: example} of the columns that hold strings."""
    known = textwrap.shorten(", ".join(names), 200, placeholder=" ...")
    opening = f"{here} has no column '{column}' (it has: {known})"
    if not texts:
        return UsageError(f"{opening}, and none that holds strings; write the text as strings")
    # the longest is most likely the text
    best = max(texts, key=lambda name: len(texts[name]))
    return UsageError(
        f"{opening}; name the one with the text after a colon, behind the file, folder or pattern, "
        f"such as {shlex.quote(f'{path}:{best}')}, or of a dataset of the hub "
        f"hf:<dataset>:<config>:<split>:<column>"
    )


def _read_csv(path: Path, found: Iterable[bytes], column: str) -> Iterator[str | None]:
    """The fields of a column of a .csv file, whose first line names the columns."""
    # of the whole process, but a limit on a document's size is of no use to anyone here
    csv.field_size_limit(sys.maxsize)
    # strict: a quote that is never closed would swallow the rest of the file
    rows = csv.reader(_decoded_lines(path, found), strict=True)
    header: list[str] = []
    while True:
        # counted before the row is read, which may hold lines
        here = f"data: {path} line {rows.line_num + 1:,}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UsageError(
                f"{here} is not CSV ({in_a_line(error)}); a field with commas, quotes or line ends "
                f'is in quotes, and a quote in it is written twice (""); or convert it to .jsonl'
            ) from None
        if row is None:
            break
        if not row:
            continue
        if not header:
            header = row
        elif column not in header:
            raise _no_column(
                path, f"data: {path}", column, header, dict(zip(header, row, strict=False))
            )
        elif len(row) > len(header):
            raise UsageError(
                f"{here} has {len(row)} fields for {len(header)} columns; put fields with commas "
                f"in quotes"
            )
        else:
            place = header.index(column)
            yield row[place] if place < len(row) else None
    if not header:
        raise UsageError(f"data: {path} is empty; a .csv file begins with the names of its columns")


def _decoded_lines(path: Path, found: Iterable[bytes]) -> Iterator[str]:
    """Lines as csv.reader() wants them, with their ends."""
    for number, line in enumerate(found, 1):
        here = f"data: {path} line {number:,}"
        if b"\0" in line:
            raise UsageError(f"{here} holds NUL bytes: the file is binary or damaged; repair it")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise _not_utf8(path, here, error) from None


def _check_parquet_head(path: Path, compression: str) -> None:
    """UsageError for a .parquet file that is compressed again or something else."""
    if compression:
        raise UsageError(
            f"data: {path}: parquet files are compressed inside, and one that is packed again "
            f"cannot be read; unpack it"
        )
    with path.open("rb") as f:
        refuse_head(path, "", ".parquet", f.read(HEAD_BYTES), f"data: {path}")


def _read_parquet(path: Path, compression: str, column: str) -> Iterator[str | None]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise install_hint("pyarrow", f"--data: reading {path}") from None
    _check_parquet_head(path, compression)
    n_rows = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_column(path, table.schema_arrow, column)
            # only the one column is read from disk
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=[column]):
                yield from _strings(path, column, batch.column(0), n_rows)
                n_rows += batch.num_rows
    except MemoryError:
        # pyarrow's is an ArrowException as well
        raise
    except (OSError, pyarrow.ArrowException) as error:
        after = f" after row {n_rows:,}" if n_rows else ""
        raise UsageError(
            f"data: {path} is not a readable parquet file{after} ({in_a_line(error)}); fetch or "
            f"write it again"
        ) from None


def _check_column(path: Path, schema: Any, column: str) -> None:
    """UsageError if a parquet file's schema has no such column, or one that holds no strings."""
    import pyarrow

    texts = {field.name: field.name for field in schema if _holds_strings(field.type)}
    if column not in schema.names:
        raise _no_column(path, f"data: {path}", column, schema.names, texts)
    i = schema.names.index(column)
    kind = schema.field(i).type
    if _holds_strings(kind):
        return
    is_binary = (
        pyarrow.types.is_binary(kind)
        or pyarrow.types.is_large_binary(kind)
        or pyarrow.types.is_binary_view(kind)
    )
    if is_binary:
        remedy = (
            f"cast it and write the file again, with pyarrow: table = table.set_column({i}, "
            f"'{column}', table['{column}'].cast('string'))"
        )
    elif texts:
        other = shlex.quote(f"{path}:{next(iter(texts))}")
        remedy = f"name another one, such as {other}, or write the text as strings"
    else:
        remedy = "write the text as strings"
    raise UsageError(
        f"data: {path}: the column '{column}' does not hold strings but {kind}; {remedy}"
    )


def _holds_strings(kind: Any) -> bool:
    """Whether values of a type of pyarrow are strings, or always null."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_null(kind)
    )


def _strings(path: Path, column: str, values: Any, first_row: int) -> list[str | None]:
    """An array of strings as a list. UsageError names the row that is not UTF-8."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        # of which row, it does not say
        found = []
    for i, value in enumerate(values):
        try:
            found.append(value.as_py())
        except UnicodeDecodeError as error:
            raise UsageError(
                f"data: {path} row {first_row + i:,} (the first is 0): the column '{column}' is "
                f"not UTF-8 ({in_a_line(error)}); drop the row or write its text again"
            ) from None
    return found
