"""Where text comes from: files of this machine, the embedded Python source, or the hub.

All of it is split into shards of documents. A shard is the unit of downloading, tokenizing, caching
and shuffling. Opening a corpus reads no more than it must: hashes of local files, listings of
remote ones. Text is read when a shard is tokenized."""

import array
import collections
import contextlib
import dataclasses
import glob
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UsageError, sha256_file, sha256_hex
from nanochat.data import hub
from nanochat.data.download import DownloadFailed, RemoteFile, Report
from nanochat.data.text import iterate_documents, text_format, text_suffix

# What is read of a folder. Its .json files may be anything (`data mix` writes one).
FOLDER_FORMATS = (".txt", ".jsonl", ".parquet")
# of `data mix`, which says there what came from where
MIX_SUMMARY = "sources.json"
# small files are grouped up to this size; one file is never split
SHARD_BYTES = 8 << 20
# a larger share of the text than this is held out seldom on purpose
HELD_OUT_MUCH = 0.2
# one file in this many is held out of the embedded corpus
PYTHON_HELD_OUT = 50
# A corpus of no more text than this is tokenized before step 0, a larger one as training needs it.
EAGER_BYTES = 256 << 20
# bytes of text per byte of a compressed remote file, for estimates (climbmix: about 2.5)
PARQUET_TEXT_FACTOR = 2.5
# of a dataset about which nothing is known, for plans that may not ask the hub
UNKNOWN_TEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    """Which documents of some files make a shard: those in [first:last], in order.

    cut_characters: the files hold one document, and first and last count its characters. n_bytes:
    of the part's text, None if it is all of the files'."""

    first: int = 0
    last: int | None = None
    cut_characters: bool = False
    n_bytes: int | None = None


WHOLE = Part()


@dataclass(frozen=True)
class Shard:
    """A list of documents: those of `files` in order, of which [first:last] are kept.

    files: paths, or RemoteFiles that are downloaded when they are read. first, last and
    cut_characters: as in Part. n_bytes: UTF-8 bytes of the documents, estimated from the sizes of
    the files. fingerprint: of the content. column: of tables, the one with the text. contents:
    SHA-256 of each file (the hub's fingerprint where it states none)."""

    name: str
    files: tuple[Path | RemoteFile, ...]
    fingerprint: str
    n_bytes: int
    first: int = 0
    last: int | None = None
    cut_characters: bool = False
    column: str = "text"
    contents: tuple[str, ...] = ()

    def documents(self, report: Report = print) -> Iterator[str]:
        """The documents, none of them blank.

        Remote files are downloaded first; report gets a line on each fault. Raises DownloadFailed,
        or UsageError for files that cannot be read as text."""
        paths = (
            file.fetch(report) if isinstance(file, RemoteFile) else file for file in self.files
        )
        documents = itertools.chain.from_iterable(
            iterate_documents(path, self.column) for path in paths
        )
        if self.cut_characters:
            return iter([next(documents)[self.first : self.last]])
        return itertools.islice(documents, self.first, self.last)

    def remote_files(self) -> list[RemoteFile]:
        """Those of the files that come from the network."""
        return [file for file in self.files if isinstance(file, RemoteFile)]


@dataclass(frozen=True)
class Corpus:
    """Training and validation shards of a run.

    note: one sentence, "held out: ..." or "validation: ...". revision: of a remote dataset.
    left_out: sentences on readable files that a folder holds and that are not taken."""

    name: str
    train: list[Shard]
    val: list[Shard]
    note: str
    revision: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training text, estimated where it is remote."""
        return sum(shard.n_bytes for shard in self.train)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of both sides, in order; paths and times do not enter."""
        train = [shard.fingerprint for shard in self.train]
        val = [shard.fingerprint for shard in self.val]
        return sha256_hex(json.dumps([train, val]))

    @property
    def eager(self) -> bool:
        """Whether all of it is tokenized before step 0; a function of the corpus alone."""
        return self.train_bytes <= EAGER_BYTES


# --------------------------------------------------------------------------------------------------
# files of this machine


def find_files(pattern: str, flag: str = "--data") -> list[Path]:
    """The data files that a path, folder or glob names, sorted. UsageError if there are none."""
    if os.path.isdir(pattern):
        paths = Path(pattern).rglob("*")
        files = sorted(p for p in paths if p.suffix.lower() in FOLDER_FORMATS and p.is_file())
        if not files:
            example = os.path.join(pattern, "*.jsonl.gz")
            raise UsageError(
                f"{flag}={pattern}: the folder holds no {', '.join(FOLDER_FORMATS)} file; name "
                f"files of other formats by a pattern, such as '{example}'"
            )
        return files
    if os.path.isfile(pattern):
        return [Path(pattern)]
    files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not files:
        raise UsageError(
            f"{flag}={pattern}: no such file or folder, and no file matches it as a pattern; if "
            f"the text was moved, give its new path (a resumed run takes {flag}=NEWPATH when the "
            f"text is the same)"
        )
    return files


def _left_out_of(folder: str) -> list[str]:
    """A sentence, if one is due, on readable files in a folder that find_files() leaves out."""
    suffixes = collections.Counter(
        text_suffix(path.name).lower()
        for path in Path(folder).rglob("*")
        if path.suffix.lower() not in FOLDER_FORMATS and path.name != MIX_SUMMARY and path.is_file()
    )
    found = sorted((suffix, n) for suffix, n in suffixes.items() if suffix)
    if not found:
        return []
    counts = ", ".join(f"{n:,} {suffix}" for suffix, n in found)
    example = os.path.join(folder, "**", f"*{found[0][0]}")
    return [
        f"left out in the folder {folder}: {counts}; name them by a pattern, such as '{example}'"
    ]


def file_shard(
    files: list[Path], part: Part = WHOLE, hashes: dict[Path, str] | None = None
) -> Shard:
    """A Shard of local files. hashes: their SHA-256, where they are known already."""
    known = hashes or {}
    # by content, so that moved or touched text is the same text
    contents = [known.get(path) or sha256_file(path) for path in files]
    more = f" +{len(files) - 1}" if len(files) > 1 else ""
    n_bytes = part.n_bytes
    if n_bytes is None:
        n_bytes = sum(_text_bytes(path) for path in files)
    # stored runs compare it: neither the list nor its order may change
    identity = [contents, part.first, part.last, part.cut_characters]
    return Shard(
        name=files[0].name + more,
        files=tuple(files),
        fingerprint=sha256_hex(json.dumps(identity)),
        n_bytes=n_bytes,
        first=part.first,
        last=part.last,
        cut_characters=part.cut_characters,
        contents=tuple(contents),
    )


def _text_bytes(path: Path) -> int:
    """Bytes of text in a local file: its size, or for parquet what its text column unpacks to."""
    if text_format(path.name) == (".parquet", ""):
        # of a file that cannot be read, reading the text will say what is wrong
        with contextlib.suppress(ImportError, OSError, ValueError):
            return _parquet_text_bytes(path)
    return path.stat().st_size


def _parquet_text_bytes(path: Path) -> int:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(path).metadata
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(j) for group in groups for j in range(metadata.num_columns))
    return sum(
        column.total_uncompressed_size for column in columns if column.path_in_schema == "text"
    )


def _grouped(files: list[Path], hashes: dict[Path, str]) -> list[Shard]:
    """Shards of whole files in order, small ones together up to SHARD_BYTES."""
    groups: list[list[Path]] = []
    # of the last group; at first there is none to add to
    size = SHARD_BYTES + 1
    for path in files:
        if size + path.stat().st_size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return [file_shard(group, hashes=hashes) for group in groups]


def _mixed(files: list[Path], hashes: dict[Path, str]) -> list[Shard]:
    """_grouped() in the order of the files' hashes, for training.

    Neighbours in a folder are alike, and rows are shuffled inside a shard only: shards in the order
    of the folder would each teach something else (runs/LOG.md)."""
    return _grouped(sorted(files, key=hashes.get), hashes)


def hash_files(files: list[Path]) -> dict[Path, str]:
    """{path: SHA-256} of local files. UsageError for one that cannot be read."""
    try:
        return {path: sha256_file(path) for path in files}
    except OSError as error:
        raise UsageError(f"data: {error.filename} cannot be read ({error.strerror})") from None


def _held_out_files(pattern: str) -> list[Shard]:
    """The shards of --val-data. UsageError if they hold no text."""
    files = find_files(pattern, "--val-data")
    if not any(_has_text(path) for path in files):
        raise _no_text("--val-data", pattern)
    return _grouped(files, hash_files(files))


def _has_text(path: Path) -> bool:
    return next(iterate_documents(path), None) is not None


def _no_text(flag: str, pattern: str) -> UsageError:
    return UsageError(
        f"{flag}={pattern}: there is no text in it (empty file, or blank documents only)"
    )


def local_corpus(pattern: str, val_pattern: str = "") -> Corpus:
    """The corpus of --data (a path, folder or glob) and, if given, of --val-data.

    Raises UsageError if there is no text, or a file cannot be read."""
    files = [path for path in find_files(pattern) if _has_text(path)]
    if not files:
        raise _no_text("--data", pattern)
    hashes = hash_files(files)
    if val_pattern:
        train = _mixed(files, hashes)
        return Corpus(pattern, train, _held_out_files(val_pattern), f"validation: {val_pattern}")
    if len(files) == 1:
        train_part, val_part, note = split_file(files[0])
        train = [file_shard(files, train_part, hashes)]
        val = [file_shard(files, val_part, hashes)]
        return Corpus(pattern, train, val, note)
    # one file is a shard of documents, or each file is a document
    if any(_has_several_documents(path) for path in files):
        held_out = 1
        note = f"held out: the last file, {files[-1].name}"
    else:
        held_out = max(1, round(0.02 * len(files)))
        note = f"held out: the last {held_out} of {len(files)} documents"
    train = _mixed(files[:-held_out], hashes)
    return Corpus(pattern, train, _grouped(files[-held_out:], hashes), note)


def _has_several_documents(path: Path) -> bool:
    return len(list(itertools.islice(iterate_documents(path), 2))) > 1


def split_file(path: Path, column: str = "text") -> tuple[Part, Part, str]:
    """(training part, validation part, note) of a single file, whose last tenth is held out.

    Raises UsageError if it holds no text."""
    # of many documents only their sizes are held: the file may be larger than memory
    sizes = array.array("Q", (_n_bytes(document) for document in iterate_documents(path, column)))
    if not sizes:
        raise UsageError(
            f"data: {path} holds no text (it is empty, or its documents are blank); name another "
            f"file"
        )
    if len(sizes) == 1:
        text = next(iterate_documents(path, column))
        n = len(text)
        first = n - max(1, n // 10)
        train = Part(0, first, True, _n_bytes(text[:first]))
        val = Part(first, None, True, _n_bytes(text[first:]))
        unit = "characters"
    else:
        n = len(sizes)
        first = n - max(1, n // 10)
        train = Part(0, first, False, sum(sizes[:first]))
        val = Part(first, None, False, sum(sizes[first:]))
        unit = "documents"
    return train, val, f"held out: the last tenth ({n - first:,} of {n:,} {unit})"


def _n_bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


# --------------------------------------------------------------------------------------------------
# the embedded corpus


def _python_paths() -> Iterator[tuple[str, Path]]:
    """(relative name, path) of the candidate files, sorted by name within each root."""
    import importlib.util

    not_library = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    torch = Path(importlib.util.find_spec("torch").origin).parent
    roots = [
        ("stdlib", Path(sysconfig.get_paths()["stdlib"]), not_library),
        ("torch", torch, set()),
    ]
    for label, root, skipped in roots:
        for folder, folders, names in os.walk(root):
            # in place: os.walk descends into what is left, in this order
            folders[:] = sorted(set(folders) - skipped)
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield f"{label}/{path.relative_to(root).as_posix()}", path


def _python_files() -> tuple[dict[str, Path], dict[Path, str]]:
    """({relative name: path}, {path: SHA-256}) of the embedded corpus.

    It is the standard library, without its tests, and torch. Files that are not UTF-8 or repeat an
    earlier one byte for byte are left out."""
    found = {}
    hashes = {}
    seen = set()
    for name, path in _python_paths():
        content = path.read_bytes()
        digest = sha256_hex(content)
        # many __init__.py are alike: a copy that is held out would be in training as well
        if digest in seen or not content.strip() or b"\0" in content:
            continue
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        found[name] = path
        hashes[path] = digest
    return dict(sorted(found.items())), hashes


def python_corpus(val_pattern: str = "") -> Corpus:
    """Python source that is on every machine that runs this: one document a file.

    2% of the files are held out, by hash of their names."""
    files, hashes = _python_files()
    # by name, so that other versions of Python and torch hold out nearly the same files
    held_out = {name for name in files if int(sha256_hex(name)[:8], 16) % PYTHON_HELD_OUT == 0}
    train = _mixed([path for name, path in files.items() if name not in held_out], hashes)
    if val_pattern:
        return Corpus("python", train, _held_out_files(val_pattern), f"validation: {val_pattern}")
    # in the order of the names, so that validation reads the same text on every machine
    val = _grouped([files[name] for name in sorted(held_out)], hashes)
    note = f"held out: {len(held_out)} of {len(files)} files, by hash of their names"
    return Corpus("python", train, val, note)


# --------------------------------------------------------------------------------------------------
# the hub


def is_remote(data: str) -> bool:
    """Whether a value of --data names a dataset to download."""
    return data in hub.KNOWN or data.startswith("hf:")


@contextlib.contextmanager
def with_offline_advice() -> Iterator[None]:
    """Adds to a DownloadFailed inside the `with` what to train on without a network."""
    try:
        yield
    except DownloadFailed as error:
        raise DownloadFailed(
            f"{error} Without a network there are --data=python, and --data=<path> for text on "
            f"this disk."
        ) from None


def remote_corpus(
    spec: str, val_pattern: str = "", revision: str = "", report: Report = print
) -> Corpus:
    """The corpus of a dataset on the hub, one shard a file.

    Nothing is downloaded that is not needed to split it. Raises UsageError for a dataset that does
    not exist or is not text, DownloadFailed for faults of the network."""
    # a resumed run needs the very same text, so other text is no advice
    advice = contextlib.nullcontext if revision else with_offline_advice
    with advice():
        listing = hub.resolve(spec, revision, report)
    column = listing.column
    train = [_remote_shard([file], column) for file in listing.train]
    val = [_remote_shard([file], column) for file in listing.val]
    note = listing.note
    if val_pattern:
        val = _held_out_files(val_pattern)
        note = f"validation: {val_pattern}"
    elif not val and len(train) > 1:
        val = [train.pop()]
        note = f"held out: the last file, {listing.train[-1].name}"
    elif not val:
        with advice():
            path = listing.train[0].fetch(report)
        train_part, val_part, note = split_file(path, column)
        train = [_remote_shard(listing.train, column, train_part)]
        val = [_remote_shard(listing.train, column, val_part)]
    return Corpus(spec, train, val, note, listing.revision)


def _remote_shard(files: Iterable[RemoteFile], column: str = "text", part: Part = WHOLE) -> Shard:
    files = tuple(files)
    n_bytes = part.n_bytes
    if n_bytes is None:
        suffix, compression = text_format(files[0].name)
        is_packed = compression or suffix == ".parquet"
        n_bytes = round(files[0].n_bytes * (PARQUET_TEXT_FACTOR if is_packed else 1))
    # what the hub states of the files: they need not be on this disk
    prints = [file.fingerprint for file in files]
    identity = [prints, part.first, part.last, part.cut_characters, column]
    return Shard(
        name=files[0].name,
        files=files,
        fingerprint=sha256_hex(json.dumps(identity)),
        n_bytes=n_bytes,
        first=part.first,
        last=part.last,
        cut_characters=part.cut_characters,
        column=column,
        contents=tuple(file.sha256 or file.fingerprint for file in files),
    )


# --------------------------------------------------------------------------------------------------
# any of them


def open_corpus(
    data: str, val_data: str = "", revision: str = "", report: Report = print
) -> Corpus:
    """The Corpus that --data and --val-data name.

    revision: of a remote dataset, pinned by the run that is resumed. report: gets a line on each
    fault of the network. Raises UsageError for whatever is wrong with the values, DownloadFailed
    when a dataset cannot be downloaded."""
    folders = [val_data]
    if data == "python":
        corpus = python_corpus(val_data)
    elif is_remote(data):
        corpus = remote_corpus(data, val_data, revision, report)
    else:
        corpus = local_corpus(data, val_data)
        folders = [data, val_data]
    left_out = [
        line for folder in folders if os.path.isdir(folder) for line in _left_out_of(folder)
    ]
    return dataclasses.replace(corpus, left_out=tuple(left_out))


def estimated_bytes(data: str) -> int:
    """Bytes of text in --data from file sizes and known datasets alone, for plans.

    Nothing is read or requested. Raises UsageError if there are no such files."""
    if data == "python":
        return sum(path.stat().st_size for _, path in _python_paths())
    if is_remote(data):
        return hub.KNOWN[data].text_bytes if data in hub.KNOWN else UNKNOWN_TEXT_BYTES
    return sum(_text_bytes(path) for path in find_files(data))


def compressed_bits_per_byte(shards: list[Shard], max_bytes: int = 1 << 20) -> dict[str, float]:
    """{compressor: bits per byte} of held-out text: what a model has to beat.

    The compressors are gzip -9 and xz -9, on the first max_bytes of the documents of `shards`."""
    import gzip
    import lzma

    text = bytearray()
    for document in itertools.chain.from_iterable(shard.documents() for shard in shards):
        if text:
            text += b"\n"
        text += document.encode("utf-8")
        if len(text) >= max_bytes:
            break
    # a character may be cut: compressors see bytes
    text = bytes(text[:max_bytes])
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: round(8 * len(content) / len(text), 4) for name, content in packed.items()}


def remarks(corpus: Corpus) -> list[str]:
    """Sentences on what may surprise: files left out, much held out, one text on both sides."""
    found = list(corpus.left_out)
    val_bytes = sum(shard.n_bytes for shard in corpus.val)
    share = val_bytes / max(1, val_bytes + corpus.train_bytes)
    if corpus.note.startswith("held out") and share > HELD_OUT_MUCH:
        found.append(f"note: {share:.0%} of the text is held out; --val-data names another text")
    train = _whole_files(corpus.train)
    both = [name for content, name in _whole_files(corpus.val).items() if content in train]
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        found.append(
            f"warning: the text of {both[0]}{more} is on both sides: validation then measures "
            f"memory; give --val-data other text"
        )
    return found


def _whole_files(shards: list[Shard]) -> dict[str, str]:
    """{content: name} of the files that shards hold whole, as far as contents are known."""
    return {
        content: file.name
        for shard in shards
        if shard.first == 0 and shard.last is None
        for content, file in zip(shard.contents, shard.files, strict=False)
    }


def describe_corpus(corpus: Corpus) -> list[str]:
    """Lines on a corpus: what is held out, its fingerprint, bytes of both sides, remarks."""
    at = f" at {corpus.revision[:12]}" if corpus.revision else ""
    head = f"data: {corpus.name}{at}, {corpus.note}; fingerprint {corpus.fingerprint[:16]}"
    sides = [
        _describe_side("to train on:", corpus.train),
        _describe_side("held out:", corpus.val),
    ]
    return [head, *sides, *(f"  {line}" for line in remarks(corpus))]


def _describe_side(label: str, shards: list[Shard]) -> str:
    remote = [file for shard in shards for file in shard.remote_files()]
    n_bytes = sum(shard.n_bytes for shard in shards)
    if not remote:
        return f"  {label:<12} {n_bytes:,} bytes in {len(shards)} shards"
    here = sum(file.is_local() for file in remote)
    return (
        f"  {label:<12} about {n_bytes / 1e6:,.1f} MB of text in {len(shards)} shards; "
        f"{here} of {len(remote)} files are here"
    )
