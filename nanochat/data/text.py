"""The documents of one file: text, JSON lines, tables; plain or compressed.

.txt, .jsonl and .parquet are read here, a part at a time; .csv, .json and whatever is compressed,
through the package datasets."""

import glob
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanochat.common import UsageError, in_a_line, install_hint, valid_unicode
from nanochat.data.clients import quiet_datasets

FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv")
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
# alone on a line of a .txt file
END_OF_DOCUMENT = "<|endoftext|>"
# of formats in the package datasets; any other file is "text"
DATASETS_NAMES = {".json": "json", ".jsonl": "json", ".csv": "csv"}


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


def read_text(path: Path) -> str:
    """A file as str. UsageError if it is not UTF-8 text."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None
    if b"\0" in content:
        raise UsageError(
            f"data: {path} is a binary file (it holds NUL bytes); give UTF-8 text, .jsonl or "
            f".parquet"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"data: {path} is not UTF-8 text (byte {error.start}); convert it, for example with "
            f"iconv"
        ) from None


def iterate_documents(path: str | Path, column: str = "text") -> Iterator[str]:
    """The documents of one file, blank ones left out.

    column: of JSON lines and of tables, the field with the text. A file without a known ending is
    read as text. Raises UsageError, on the way, if the file cannot be read as its format."""
    path = Path(path)
    suffix, compression = text_format(path.name)
    if suffix == ".parquet":
        documents = _read_parquet(path, column)
    elif compression or suffix in (".json", ".csv"):
        documents = _read_through_datasets(path, DATASETS_NAMES.get(suffix, "text"), column)
    elif suffix == ".jsonl":
        documents = _read_jsonl(path, column)
    else:
        documents = _split_text(read_text(path))
    return (document for document in documents if document.strip())


def _split_text(text: str) -> list[str]:
    """The documents of a text, which END_OF_DOCUMENT separates where it stands on its own line."""
    # most files are one document, which need not be split into lines
    if END_OF_DOCUMENT not in text:
        return [text]
    # read_text() refuses NUL, so that it can stand for the separator
    lines = ("\0" if line.strip() == END_OF_DOCUMENT else line for line in text.split("\n"))
    return [document.strip("\n") for document in "\n".join(lines).split("\0")]


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    """The field `column` of every line, which are read one at a time."""
    try:
        with path.open("rb") as f:
            # a line at a time: the file may be larger than memory
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                text = _field_of_line(path, number, line, column)
                if text is not None:
                    yield valid_unicode(text)
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None


def _field_of_line(path: Path, number: int, line: bytes, column: str) -> str | None:
    """The text of one line of a .jsonl file, None if it is null. UsageError names the line."""
    here = f"data: {path} line {number}"
    one_object = "a .jsonl file has one object a line"
    # a byte order mark may open the file
    encoding = "utf-8-sig" if number == 1 else "utf-8"
    try:
        value = json.loads(line.decode(encoding))
    except ValueError:
        # UnicodeDecodeError is one
        raise UsageError(f"{here} is not JSON in UTF-8; {one_object}") from None
    if not isinstance(value, dict):
        what = "a list" if isinstance(value, list) else json.dumps(value)[:40]
        raise UsageError(f"{here} is {what}, not an object; {one_object}")
    if column not in value:
        raise UsageError(
            f"{here} has no string field '{column}' (it has: {', '.join(value)}); rename the field"
        )
    text = value[column]
    if not isinstance(text, str | None):
        raise UsageError(
            f"{here}: field '{column}' is not a string but {type(text).__name__}; write the text "
            f"as a string"
        )
    return text


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise install_hint("pyarrow", f"--data: reading {path}") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise UsageError(
                f"data: {path} has no column '{column}' (it has: {', '.join(names)}); rename the "
                f"column, or for a dataset of the hub name it: "
                f"hf:<dataset>:<config>:<split>:<column>"
            )
        # only the one column is read from disk
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from _strings(path, column, batch.column(0).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"data: {path} is not a readable parquet file ({error})") from None


def _strings(path: Path, column: str, values: Iterable[Any]) -> Iterator[str]:
    """The values of a column that are not null. UsageError for one that is not a string."""
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UsageError(f"data: {path}: the column '{column}' does not hold strings")
        yield value


def _read_through_datasets(path: Path, kind: str, column: str) -> Iterator[str]:
    """Documents of a file in a format that the package datasets reads, a part of it at a time."""
    for batch in _tables(path, kind):
        if column not in batch.column_names:
            raise UsageError(
                f"data: {path} has no column '{column}' (it has: {', '.join(batch.column_names)}); "
                f"name one: hf:<dataset>:<config>:<split>:<column>"
            )
        for document in _strings(path, column, batch.column(column).to_pylist()):
            yield valid_unicode(document)


def _tables(path: Path, kind: str) -> Iterator[Any]:
    """Arrow tables of a file, as the package datasets streams it, without a network."""
    with quiet_datasets(f"--data: reading {path}") as datasets:
        # comes with datasets, which opens files with it
        import fsspec

        is_zstd = text_format(path.name)[1] == ".zst"
        if is_zstd and "zstd" not in fsspec.available_compressions():
            raise install_hint("zstandard", f"--data: reading {path}")
        # it logs what it also raises
        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
        options = {"sample_by": "document"} if kind == "text" else {}
        try:
            # a folder for a lock file: no data is written
            with tempfile.TemporaryDirectory() as folder:
                dataset = datasets.load_dataset(
                    kind,
                    data_files=glob.escape(str(path)),
                    split="train",
                    streaming=True,
                    cache_dir=folder,
                    **options,
                )
                tables = iter(dataset.with_format("arrow").iter(batch_size=256))
        except Exception as error:
            # any exception: each format and compression has its own
            raise _unreadable(path, kind, error) from None
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise _unreadable(path, kind, error) from None
        if table is None:
            return
        yield table


def _unreadable(path: Path, kind: str, error: Exception) -> UsageError:
    return UsageError(
        f"data: {path} cannot be read as {kind} ({in_a_line(error)}); repair or convert the file"
    )
