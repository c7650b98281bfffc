"""The documents of one file: text, JSON lines, tables, plain or compressed."""

import glob
import json
import logging
import tempfile
from pathlib import Path

from nanochat.common import UsageError, in_a_line, install_hint, valid_unicode
from nanochat.data.clients import quiet_datasets

FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv")


COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")


END_OF_DOCUMENT = "<|endoftext|>"  # alone on a line of a .txt file


DATASETS_NAMES = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}  # of formats in the `datasets` library; any other file is "text"


def text_format(name):
    """(format, compression) of a file by its name, in upper or lower case: one of FORMATS or "", and one of COMPRESSIONS."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS[1:] if name.endswith(ending)), "")
    return next(
        (ending for ending in FORMATS if name.endswith(ending + compression)), ""
    ), compression


def text_suffix(name):
    """The part of a file name that says how text is stored in it, such as ".jsonl.gz"; "" if it is none of ours."""
    suffix, compression = text_format(name)
    return name[-len(suffix + compression) :] if suffix else ""


def read_text(path):
    """A file as str. UsageError if it is not UTF-8 text."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None
    if b"\0" in content:
        raise UsageError(
            f"data: {path} is a binary file (it holds NUL bytes); give UTF-8 text, .jsonl or .parquet"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"data: {path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv"
        ) from None


def iterate_documents(path, column="text"):
    """The documents of one file, blank ones left out: tables by their column, anything without a known ending as text."""
    path = Path(path)
    suffix, compression = text_format(path.name)
    if suffix == ".parquet":
        documents = _read_parquet(path, column)
    elif compression or suffix in (".json", ".csv"):
        documents = _read_through_datasets(path, DATASETS_NAMES.get(suffix, "text"), column)
    elif suffix == ".jsonl":
        documents = _read_jsonl(path, column)
    else:
        text = read_text(path)
        documents = [text]
        if END_OF_DOCUMENT in text:
            documents = "\n".join(
                "\0" if line.strip() == END_OF_DOCUMENT else line for line in text.split("\n")
            ).split("\0")
            documents = [document.strip("\n") for document in documents]
    return (document for document in documents if document.strip())


def read_documents(path, column="text"):
    """iterate_documents() as a list."""
    return list(iterate_documents(path, column))


def _read_jsonl(path, column):
    """The field `column` of every line, which are read one at a time."""
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError:  # UnicodeDecodeError is one
                    raise UsageError(
                        f"data: {path} line {number} is not JSON in UTF-8; a .jsonl file has one object a line"
                    ) from None
                if not isinstance(value, dict):
                    what = "a list" if isinstance(value, list) else json.dumps(value)[:40]
                    raise UsageError(
                        f"data: {path} line {number} is {what}, not an object; a .jsonl file has one object a line"
                    )
                if column not in value:
                    keys = ", ".join(value)
                    raise UsageError(
                        f"data: {path} line {number} has no string field '{column}' (it has: {keys}); rename the field"
                    )
                if not isinstance(value[column], str | None):
                    raise UsageError(
                        f"data: {path} line {number}: field '{column}' is not a string but {type(value[column]).__name__}; "
                        f"write the text as a string"
                    )
                if value[column] is not None:
                    yield valid_unicode(value[column])
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None


def _read_parquet(path, column):
    try:
        import pyarrow.parquet
    except ImportError:
        raise install_hint("pyarrow", f"--data: reading {path}") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if column not in names:
            raise UsageError(
                f"data: {path} has no column '{column}' (it has: {', '.join(names)}); rename the column, or for a "
                f"dataset of the hub name it: hf:<dataset>:<config>:<split>:<column>"
            )
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for document in batch.column(0).to_pylist():
                if document is not None and not isinstance(document, str):
                    raise UsageError(f"data: {path}: the column '{column}' does not hold strings")
                if document is not None:
                    yield document
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"data: {path} is not a readable parquet file ({error})") from None


def _read_through_datasets(path, kind, column):
    """Documents of a file in a format that the datasets library reads (compressed ones too), a part of it at a time."""
    for batch in _tables(path, kind):
        if column not in batch.column_names:
            raise UsageError(
                f"data: {path} has no column '{column}' (it has: {', '.join(batch.column_names)}); name one: "
                f"hf:<dataset>:<config>:<split>:<column>"
            )
        for document in batch.column(column).to_pylist():
            if document is not None and not isinstance(document, str):
                raise UsageError(f"data: {path}: the column '{column}' does not hold strings")
            if document is not None:
                yield valid_unicode(document)


def _tables(path, kind):
    """Arrow tables of a file, as the datasets library streams it; nothing is written or asked of the network."""
    with quiet_datasets(f"--data: reading {path}") as datasets:
        import fsspec  # with datasets, which opens files with it

        if text_format(path.name)[1] == ".zst" and "zstd" not in fsspec.available_compressions():
            raise install_hint("zstandard", f"--data: reading {path}")
        logging.getLogger("datasets.packaged_modules").setLevel(
            logging.CRITICAL
        )  # it logs what it also raises
        options = {"sample_by": "document"} if kind == "text" else {}
        try:
            with tempfile.TemporaryDirectory() as folder:  # for a lock file; no data is written
                tables = iter(
                    datasets.load_dataset(
                        kind,
                        data_files=glob.escape(str(path)),
                        split="train",
                        streaming=True,
                        cache_dir=folder,
                        **options,
                    )
                    .with_format("arrow")
                    .iter(batch_size=256)
                )
        except Exception as error:  # anything: each format and compression has its own
            raise _unreadable(path, kind, error) from None
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise _unreadable(path, kind, error) from None
        if table is None:
            return
        yield table


def _unreadable(path, kind, error):
    return UsageError(
        f"data: {path} cannot be read as {kind} ({in_a_line(error)}); repair or convert the file"
    )
