"""Where text comes from: files of this machine, the embedded Python source, or the hub.

All of it is split into shards of documents. A shard is the unit of downloading, tokenizing, caching
and shuffling. Opening a corpus reads no more than it must: hashes of local files, listings of
remote ones. Text is read when a shard is tokenized."""

import array
import contextlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.common import UsageError, counted, sha256_file, sha256_hex
from nanochat.data import hub
from nanochat.data.download import DownloadFailed, RemoteFile, Report
from nanochat.data.files import EMPTY, Named, listed, named_files, text_bytes
from nanochat.data.splits import (
    LEAST_TRAINED,
    Group,
    files_to_train,
    files_to_validate,
    least_held_out_bytes,
    least_validation_bytes,
    more_last_files,
)
from nanochat.data.text import (
    Piece,
    cut_pieces,
    documents_between,
    inline_marks,
    iterate_pieces,
    joined,
    split_column,
    text_format,
)
from nanochat.data.textfile import END_OF_DOCUMENT, FileRefused, is_lfs_pointer

# small files are grouped up to this size; one file is never split
SHARD_BYTES = 8 << 20
# a larger share of the text than this is held out seldom on purpose
HELD_OUT_MUCH = 0.2
# the smallest dictionary of xz
MIN_DICTIONARY = 4096
# files that remarks() searches for END_OF_DOCUMENT, and characters of each
MARKS_FILES = 8
MARKS_CHARACTERS = 8 << 20
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
    SHA-256 of each file (the hub's fingerprint where it states none). sizes: bytes of each local
    file when it was hashed. is_found: a folder or a pattern names the files."""

    name: str
    files: tuple[Path | RemoteFile, ...]
    fingerprint: str
    n_bytes: int
    first: int = 0
    last: int | None = None
    cut_characters: bool = False
    column: str = "text"
    contents: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    is_found: bool = False

    def documents(self, report: Report = print) -> Iterator[str]:
        """The documents, none of them blank. Raises as pieces()."""
        return joined(self.pieces(report))

    def pieces(self, report: Report = print) -> Iterator[Piece]:
        """The documents in pieces, so that one of any size takes little memory.

        Remote files are downloaded first; report gets a line on each fault. Raises DownloadFailed,
        or UsageError for files that cannot be read as text, or that changed since they were
        hashed."""
        for path, n_bytes in zip(self.files, self.sizes, strict=False):
            _refuse_changed(path, n_bytes)
        paths = (
            file.fetch(report) if isinstance(file, RemoteFile) else file for file in self.files
        )
        pieces = itertools.chain.from_iterable(self._pieces_of_file(path) for path in paths)
        select = cut_pieces if self.cut_characters else documents_between
        return select(pieces, self.first, self.last)

    def _pieces_of_file(self, path: Path) -> Iterator[Piece]:
        with _advice_where(self.is_found):
            yield from iterate_pieces(path, self.column)

    def remote_files(self) -> list[RemoteFile]:
        """Those of the files that come from the network."""
        return [file for file in self.files if isinstance(file, RemoteFile)]


@dataclass(frozen=True)
class Corpus:
    """Training and validation shards of a run.

    note: one sentence, "held out: ..." or "validation: ...". revision: of a remote dataset.
    left_out: sentences on what a folder or pattern holds and what is not taken."""

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


def file_shard(
    files: list[Path],
    part: Part = WHOLE,
    hashes: dict[Path, str] | None = None,
    column: str = "text",
) -> Shard:
    """A Shard of local files. hashes: their SHA-256, where they are known already."""
    known = hashes or {}
    # by content, so that moved or touched text is the same text
    contents = [known.get(path) or sha256_file(path) for path in files]
    more = f" +{len(files) - 1}" if len(files) > 1 else ""
    n_bytes = part.n_bytes
    if n_bytes is None:
        n_bytes = sum(text_bytes(path, column) for path in files)
    # stored runs compare it: neither the list nor its order may change
    identity = [contents, part.first, part.last, part.cut_characters]
    if column != "text":
        identity.append(column)
    if any(map(_is_read_anew, files)):
        identity.append("reader 2")
    return Shard(
        name=files[0].name + more,
        files=tuple(files),
        fingerprint=sha256_hex(json.dumps(identity)),
        n_bytes=n_bytes,
        first=part.first,
        last=part.last,
        cut_characters=part.cut_characters,
        column=column,
        contents=tuple(contents),
        sizes=tuple(path.stat().st_size for path in files),
    )


def _is_read_anew(path: Path) -> bool:
    """Whether earlier versions read other documents from this file, so that what they stored of it
    is not to be used: compressed files, and text with the line ends of Windows."""
    if text_format(path.name)[1]:
        return True
    with open(path, "rb") as file:
        return path.suffix.lower() == ".txt" and b"\r\n" in file.read(1 << 16)


def _grouped(files: list[Path], hashes: dict[Path, str], column: str = "text") -> list[Shard]:
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
    return [file_shard(group, hashes=hashes, column=column) for group in groups]


def _mixed(files: list[Path], hashes: dict[Path, str], column: str = "text") -> list[Shard]:
    """_grouped() in the order of the files' hashes, for training.

    Neighbours in a folder are alike, and rows are shuffled inside a shard only: shards in the order
    of the folder would each teach something else (runs/LOG.md)."""
    return _grouped(sorted(files, key=hashes.get), hashes, column)


def hash_files(files: list[Path]) -> dict[Path, str]:
    """{path: SHA-256} of local files.

    UsageError for one that cannot be read, or that changes meanwhile."""
    hashes = {}
    try:
        for path in files:
            n_bytes = path.stat().st_size
            hashes[path] = sha256_file(path)
            _refuse_changed(path, n_bytes)
    except OSError as error:
        raise UsageError(f"data: {error.filename} cannot be read ({error.strerror})") from None
    return hashes


def _refuse_changed(path: Path, n_bytes: int) -> None:
    """UsageError if a file does not have the size that it had; one that is gone is none."""
    with contextlib.suppress(OSError):
        found = path.stat().st_size
        if found != n_bytes:
            raise UsageError(
                f"data: {path} changed while it was in use, from {n_bytes:,} to {found:,} bytes; "
                f"wait until it is written, or restore it"
            )


def refuse_other_files(corpus: Corpus) -> None:
    """UsageError if the local files of a corpus that another machine has opened are missing here,
    or hold other text."""
    shards = corpus.train + corpus.val
    files = {
        path: content
        for shard in shards
        for path, content in zip(shard.files, shard.contents, strict=True)
        # what comes from the network is compared when it is downloaded
        if isinstance(path, Path)
    }
    for path, content in hash_files(list(files)).items():
        if content != files[path]:
            raise UsageError(
                f"--data={corpus.name}: {path} holds other text here than where rank 0 runs; "
                f"every machine reads the same files under the same names: copy them here, or "
                f"name a folder that all machines share"
            )


@contextlib.contextmanager
def _advice_where(is_found: bool) -> Iterator[None]:
    """Turns a FileRefused inside the `with` into the UsageError whose advice helps.

    is_found: a folder or a pattern names the file."""
    try:
        yield
    except FileRefused as error:
        raise UsageError(error.if_found if is_found else str(error)) from None


def _marked(shards: list[Shard], named: Named) -> list[Shard]:
    """The shards of some files, with how these were named."""
    return [replace(shard, is_found=not named.is_file) for shard in shards]


def _opened(value: str, flag: str) -> tuple[Named, str]:
    """The files that a value of --data or --val-data names, and the column with their text.

    Raises UsageError as named_files(), and if some of the files are no text but pointers to it."""
    path, column = split_column(value)
    named = named_files(path, flag)
    pointers = [path for path in named.files if _is_pointer(path)]
    if pointers and len(named.files) > 1:
        raise UsageError(
            f"{flag}={value}: {len(pointers):,} of {counted(len(named.files), 'file')} are Git LFS "
            f"pointers, not the text itself ({listed(pointers, named.root)}); fetch the content "
            f"with `git lfs pull` in their repository"
        )
    return named, column


def _is_pointer(path: Path) -> bool:
    # of a file that cannot be read, reading the text will say what is wrong
    with contextlib.suppress(OSError):
        return is_lfs_pointer(path)
    return False


def _text_bytes_in(files: Iterable[Path], column: str, most: float) -> int:
    """Bytes of the documents of some files. Reading ends where there are `most`."""
    n_bytes = 0
    for piece in itertools.chain.from_iterable(iterate_pieces(path, column) for path in files):
        n_bytes += _n_bytes(piece.text)
        if n_bytes >= most:
            break
    return n_bytes


def _no_text(flag: str, pattern: str) -> UsageError:
    return UsageError(
        f"{flag}={pattern}: there is no text in it (empty file, or blank documents only); name "
        f"files that hold text"
    )


def local_corpus(pattern: str, val_pattern: str = "") -> Corpus:
    """The corpus of --data (a path, folder or glob) and, if given, of --val-data.

    Raises UsageError if there is no text, or a file cannot be read."""
    named, column = _opened(pattern, "--data")
    with _advice_where(not named.is_file):
        return _corpus_of(pattern, named, column, val_pattern)


def _corpus_of(pattern: str, named: Named, column: str, val_pattern: str) -> Corpus:
    """local_corpus() of files that are found, and the column with their text."""
    splits = files_to_train(named, column, f"--data={pattern}")
    files = [path for path in splits.train if _text_bytes_in([path], column, 1)]
    if not files:
        raise _no_text("--data", pattern)
    hashes = hash_files(files)
    n_bytes = sum(text_bytes(path, column) for path in files)
    remarks = [*named.remarks, *splits.remarks]
    empty = [path for path in splits.train if path not in hashes]
    if empty:
        n_empty = counted(len(empty), EMPTY)
        remarks.append(f"left out: {n_empty} ({listed(empty, named.root)})")
    if val_pattern:
        train = _mixed(files, hashes, column)
        val, more = _validation_of_user(val_pattern, n_bytes)
        note = f"validation: {val_pattern}"
        remarks += [*(f"left out: {group.described}" for group in splits.groups), *more]
        return Corpus(pattern, _marked(train, named), val, note, left_out=tuple(remarks))
    group, more = _validation_by_name(splits.groups, column, n_bytes)
    remarks += more
    if group:
        train = _mixed(files, hashes, column)
        val = _grouped(group.files, hash_files(group.files), column)
        note = f"validation: {group.described}"
    else:
        train, val, note = _held_out(files, hashes, column)
    train, val = _marked(train, named), _marked(val, named)
    return Corpus(pattern, train, val, note, left_out=tuple(remarks))


def _validation_of_user(pattern: str, train_bytes: int) -> tuple[list[Shard], tuple[str, ...]]:
    """(shards, sentences on what is left out) of --val-data.

    UsageError if that is too little text for train_bytes of training text."""
    named, column = _opened(pattern, "--val-data")
    files, remarks = files_to_validate(named, column)
    least = least_validation_bytes(train_bytes)
    with _advice_where(not named.is_file):
        n_bytes = _text_bytes_in(files, column, least)
    if not n_bytes:
        raise _no_text("--val-data", pattern)
    if n_bytes < least:
        raise UsageError(
            f"--val-data={pattern}: holds {counted(n_bytes, 'byte')} of text, too little to "
            f"validate on after {train_bytes:,} bytes of training text; give at least "
            f"{least:,} bytes, or leave the flag out to hold out a part of --data"
        )
    shards = _marked(_grouped(files, hash_files(files), column), named)
    return shards, (*named.remarks, *remarks)


def _validation_by_name(
    groups: Iterable[Group], column: str, train_bytes: int
) -> tuple[Group | None, list[str]]:
    """(the first group with enough text to validate on, sentences on the others)."""
    chosen = None
    remarks = []
    least = least_validation_bytes(train_bytes)
    for group in groups:
        n_bytes = 0 if chosen else _text_bytes_in(group.files, column, least)
        if chosen:
            remarks.append(f"left out: {group.described}")
        elif n_bytes < least:
            remarks.append(
                f"left out: {group.described}, since {counted(n_bytes, 'byte')} of text are too "
                f"little to validate on"
            )
        else:
            chosen = group
    return chosen, remarks


def _held_out(
    files: list[Path], hashes: dict[Path, str], column: str
) -> tuple[list[Shard], list[Shard], str]:
    """(training shards, validation shards, note) where nothing but the files is given.

    The last files are held out; of a single file, or where the last ones hold too little or too
    much, a part of the largest file. Stored runs have the splits that this makes."""
    if len(files) == 1:
        return _split_off(files[0], [], hashes, column)
    # one file is a shard of documents, or each file is a document
    is_sharded = any(_has_several_documents(path, column) for path in files)
    if is_sharded:
        n_last = 1
        note = f"held out: the last file, {files[-1].name}"
    else:
        n_last = max(1, round(0.02 * len(files)))
        note = f"held out: the last {n_last} of {len(files)} documents"
    sizes = [text_bytes(path, column) for path in files]
    least = least_held_out_bytes(sum(sizes))
    n_bytes = _text_bytes_in(files[-n_last:], column, least)
    last = "the last file" if n_last == 1 else f"the last {n_last} files"
    share = sum(sizes[-n_last:]) / max(1, sum(sizes))
    if n_bytes < least:
        why = f"{counted(n_bytes, 'byte')} of text in {last} are too little to validate on"
        n_last = more_last_files(sizes, least)
        note = f"held out: the last {n_last} of {len(files)} files; {why}"
    elif sum(sizes[:-n_last]) < LEAST_TRAINED * sum(sizes):
        why = f"nearly all text is in {last}"
        n_last = 0
    elif share > HELD_OUT_MUCH and not is_sharded:
        why = f"{share:.0%} of the text is in {last}"
        n_last = more_last_files(sizes, least)
        note = f"held out: the last {n_last} of {len(files)} files; {why}"
    if not n_last:
        largest = max(files, key=dict(zip(files, sizes, strict=True)).get)
        others = [path for path in files if path != largest]
        train, val, note = _split_off(largest, others, hashes, column)
        return train, val, f"{note} of {largest.name}; {why}"
    train = _mixed(files[:-n_last], hashes, column)
    return train, _grouped(files[-n_last:], hashes, column), note


def _split_off(
    path: Path, others: list[Path], hashes: dict[Path, str], column: str
) -> tuple[list[Shard], list[Shard], str]:
    """(training shards, validation shards, note): the last tenth of one file is held out."""
    train_part, val_part, note = split_file(path, column)
    train = [*_mixed(others, hashes, column), file_shard([path], train_part, hashes, column)]
    return train, [file_shard([path], val_part, hashes, column)], note


def _has_several_documents(path: Path, column: str) -> bool:
    ends = (piece for piece in iterate_pieces(path, column) if piece.ends)
    return len(list(itertools.islice(ends, 2))) > 1


def split_file(path: Path, column: str = "text") -> tuple[Part, Part, str]:
    """(training part, validation part, note) of a single file, whose last tenth is held out.

    Raises UsageError if it holds no text."""
    # of documents only their sizes are held: the file may be larger than memory
    sizes = array.array("Q")
    n_bytes = 0
    n_characters = 0
    for piece in iterate_pieces(path, column):
        n_bytes += _n_bytes(piece.text)
        n_characters += len(piece.text)
        if piece.ends:
            sizes.append(n_bytes)
            n_bytes = 0
    if not sizes:
        raise UsageError(
            f"data: {path} holds no text (it is empty, or its documents are blank); name another "
            f"file"
        )
    if len(sizes) == 1:
        n = n_characters
        first = n - max(1, n // 10)
        pieces = cut_pieces(iterate_pieces(path, column), first, None)
        n_val_bytes = sum(_n_bytes(piece.text) for piece in pieces)
        train = Part(0, first, True, sizes[0] - n_val_bytes)
        val = Part(first, None, True, n_val_bytes)
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
        val, remarks = _validation_of_user(val_pattern, sum(shard.n_bytes for shard in train))
        return Corpus("python", train, val, f"validation: {val_pattern}", left_out=remarks)
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
    remarks: tuple[str, ...] = ()
    if val_pattern:
        val, remarks = _validation_of_user(val_pattern, sum(shard.n_bytes for shard in train))
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
    return Corpus(spec, train, val, note, listing.revision, remarks)


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
    if data == "python":
        return python_corpus(val_data)
    if is_remote(data):
        return remote_corpus(data, val_data, revision, report)
    return local_corpus(data, val_data)


def estimated_bytes(data: str) -> int:
    """Bytes of text in --data from file sizes and known datasets alone, for plans.

    Nothing is read or requested. Raises UsageError if there are no such files."""
    if data == "python":
        return sum(path.stat().st_size for _, path in _python_paths())
    if is_remote(data):
        return hub.KNOWN[data].text_bytes if data in hub.KNOWN else UNKNOWN_TEXT_BYTES
    named, column = _opened(data, "--data")
    splits = files_to_train(named, column, f"--data={data}")
    return sum(text_bytes(path, column) for path in splits.train)


def compressed_bits_per_byte(shards: list[Shard], max_bytes: int = 1 << 20) -> dict[str, float]:
    """{compressor: bits per byte} of held-out text: what a model has to beat.

    The compressors are gzip -9 and xz -9, on the first max_bytes of the documents of `shards`."""
    import gzip
    import lzma

    text = bytearray()
    for document in itertools.chain.from_iterable(shard.documents() for shard in shards):
        if text:
            text += b"\n"
        # a document may be as large as the file
        text += document[:max_bytes].encode("utf-8")
        if len(text) >= max_bytes:
            break
    # a character may be cut: compressors see bytes
    text = bytes(text[:max_bytes])
    # xz -9 looks back 64 MiB and takes ten times that; a text is no longer than itself
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(len(text), MIN_DICTIONARY)}]
    packed = {
        "gzip -9": gzip.compress(text, 9),
        "xz -9": lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters),
    }
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
    marks = _inline_marks(corpus)
    if marks:
        found.append(
            f"note: {END_OF_DOCUMENT} stands inside documents, {counted(marks, 'time')} in the "
            f"beginnings of up to {MARKS_FILES} files; it is text there: it ends a document only "
            f"in a text file, alone on its line"
        )
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        found.append(
            f"warning: the text of {both[0]}{more} is on both sides: validation then measures "
            f"memory; give --val-data other text"
        )
    return found


def _inline_marks(corpus: Corpus) -> int:
    """How often END_OF_DOCUMENT is plain text in the beginnings of some training files."""
    files = (
        (file, shard) for shard in corpus.train for file in shard.files if isinstance(file, Path)
    )
    n_marks = 0
    for path, shard in itertools.islice(files, MARKS_FILES):
        with _advice_where(shard.is_found):
            n_marks += inline_marks(path, shard.column, MARKS_CHARACTERS)
    return n_marks


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
        return f"  {label:<12} {n_bytes:,} bytes in {counted(len(shards), 'shard')}"
    here = sum(file.is_local() for file in remote)
    return (
        f"  {label:<12} about {n_bytes / 1e6:,.1f} MB of text in "
        f"{counted(len(shards), 'shard')}; {here:,} of {counted(len(remote), 'file')} here"
    )
