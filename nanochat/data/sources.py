"""Where text comes from: files of this machine, the embedded Python source, or the hub; split into shards of documents.

A shard is the unit of fetching, tokenizing, caching and shuffling. Opening a corpus reads no more than it must: hashes of
local files, listings of remote ones. Text is read when a shard is tokenized."""

import array
import collections
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UsageError, sha256_file, sha256_hex
from nanochat.data import hub
from nanochat.data.download import DownloadFailed, RemoteFile
from nanochat.data.text import iterate_documents, text_format, text_suffix

FOLDER_FORMATS = (
    ".txt",
    ".jsonl",
    ".parquet",
)  # what is read of a folder; its .json may be anything (`data mix` writes one)


SHARD_BYTES = 8 << 20  # small files are grouped up to this size; one file is never split


HELD_OUT_MUCH = 0.2  # a larger share of the text than this is held out seldom on purpose


PYTHON_HELD_OUT = 50  # one file in this many is held out of the embedded corpus


EAGER_BYTES = (
    256 << 20
)  # a corpus of no more text than this is tokenized before step 0, a larger one as training needs it


PARQUET_TEXT_FACTOR = (
    2.5  # bytes of text per byte of a compressed remote file, for estimates (climbmix: about 2.5)
)


UNKNOWN_TEXT_BYTES = (
    1 << 30
)  # of a dataset that nothing is known about, for plans that may not ask the hub


@dataclass(frozen=True)
class Shard:
    """A list of documents: those of `files` in order, of which [first:last] are kept (characters, if it is one document).

    files: paths, or hub.RemoteFiles that are fetched when they are read. n_bytes: UTF-8 bytes of the documents, estimated
    from the sizes of the files. fingerprint: of the content. column: of tables, the one with the text. contents: SHA-256 of
    each file (the hub's fingerprint where it states none)."""

    name: str
    files: tuple
    fingerprint: str
    n_bytes: int
    first: int = 0
    last: int | None = None
    cut_characters: bool = False
    column: str = "text"
    contents: tuple = ()

    def documents(self, report=print):
        """Iterator over the documents (str), none of them blank. Remote files are fetched first, with report(line) on
        trouble. Raises DownloadFailed, or UsageError for files that cannot be read as text."""
        paths = (
            path.fetch(report) if isinstance(path, RemoteFile) else path for path in self.files
        )
        documents = (
            document for path in paths for document in iterate_documents(path, self.column)
        )
        if self.cut_characters:
            return iter([next(documents)[self.first : self.last]])
        return itertools.islice(documents, self.first, self.last)

    def load(self):
        """documents() as a list."""
        return list(self.documents())

    def remote_files(self):
        return [path for path in self.files if isinstance(path, RemoteFile)]


@dataclass(frozen=True)
class Corpus:
    """Training and validation shards of a run. note: one sentence, "held out: ..." or "validation: ...". revision: of a remote
    dataset. left_out: sentences on readable files that a folder holds and that are not taken."""

    name: str
    train: list
    val: list
    note: str
    revision: str = ""
    left_out: tuple = ()

    @property
    def train_bytes(self):
        return sum(shard.n_bytes for shard in self.train)

    @property
    def fingerprint(self):
        """SHA-256 over the content of both sides, in order; paths and times do not enter."""
        return sha256_hex(
            json.dumps([[s.fingerprint for s in self.train], [s.fingerprint for s in self.val]])
        )

    @property
    def eager(self):
        """True if the whole corpus is tokenized before step 0; a function of the corpus alone."""
        return self.train_bytes <= EAGER_BYTES


def find_files(pattern, flag="--data"):
    """The data files that a path, folder or glob names, sorted. UsageError if there are none."""
    if os.path.isdir(pattern):
        files = sorted(
            p
            for p in Path(pattern).rglob("*")
            if p.suffix.lower() in FOLDER_FORMATS and p.is_file()
        )
        if not files:
            raise UsageError(
                f"{flag}={pattern}: the folder holds no {', '.join(FOLDER_FORMATS)} file; name files of other formats by a "
                f"pattern, such as '{os.path.join(pattern, '*.jsonl.gz')}'"
            )
    elif os.path.isfile(pattern):
        files = [Path(pattern)]
    else:
        files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not files:
            raise UsageError(
                f"{flag}={pattern}: no such file or folder, and no file matches it as a pattern; text that was moved is named "
                f"by its new place (a resumed run takes {flag}=NEWPATH when the text is the same)"
            )
    return files


def left_out_of(folder):
    """A list with a sentence on the files of readable formats in a folder that find_files() does not take, if there are any."""
    found = collections.Counter(
        text_suffix(path.name).lower()
        for path in Path(folder).rglob("*")
        if path.suffix.lower() not in FOLDER_FORMATS
        and path.name != "sources.json"
        and path.is_file()
    )
    found = sorted(
        (suffix, n) for suffix, n in found.items() if suffix
    )  # sources.json: of `data mix`
    return (
        [
            f"left out in the folder {folder}: {', '.join(f'{n:,} {suffix}' for suffix, n in found)}; name them by a pattern, such as "
            f"'{os.path.join(folder, '**', '*' + found[0][0])}'"
        ]
        if found
        else []
    )


def file_shard(files, first=0, last=None, cut_characters=False, n_bytes=None, hashes=None):
    """A Shard of local files. n_bytes: of its text, where it is less than the files'. hashes: {path: SHA-256}, if known."""
    content = [(hashes or {}).get(path) or sha256_file(path) for path in files]
    return Shard(
        name=files[0].name + (f" +{len(files) - 1}" if len(files) > 1 else ""),
        files=tuple(files),
        fingerprint=sha256_hex(json.dumps([content, first, last, cut_characters])),
        n_bytes=sum(map(_text_bytes, files)) if n_bytes is None else n_bytes,
        first=first,
        last=last,
        cut_characters=cut_characters,
        contents=tuple(content),
    )


def _text_bytes(path):
    """Bytes of text in a local file: its size, or for parquet what its text column unpacks to."""
    if text_format(path.name) == (".parquet", ""):
        try:
            import pyarrow.parquet

            groups = pyarrow.parquet.ParquetFile(path).metadata
            return sum(
                groups.row_group(i).column(j).total_uncompressed_size
                for i in range(groups.num_row_groups)
                for j in range(groups.num_columns)
                if groups.row_group(i).column(j).path_in_schema == "text"
            )
        except (ImportError, OSError, ValueError):
            pass  # reading the text will say what is wrong
    return path.stat().st_size


def _grouped(files, hashes):
    """Shards of whole files in order, small ones together up to SHARD_BYTES."""
    groups, size = [], SHARD_BYTES + 1
    for path in files:
        if size + path.stat().st_size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return [file_shard(group, hashes=hashes) for group in groups]


def _mixed(files, hashes):
    """_grouped() in the order of the files' hashes, for training: neighbours in a folder are alike, and rows are
    shuffled inside a shard only, so that shards in folder order would each teach something else (runs/LOG.md)."""
    return _grouped(sorted(files, key=hashes.get), hashes)


def hash_files(files):
    """{path: SHA-256} of local files. UsageError for one that cannot be read."""
    try:
        return {path: sha256_file(path) for path in files}
    except OSError as error:
        raise UsageError(f"data: {error.filename} cannot be read ({error.strerror})") from None


def held_out_files(pattern):
    """The shards of --val-data. UsageError if they hold no text."""
    files = find_files(pattern, "--val-data")
    if not any(_has_text(path) for path in files):
        raise UsageError(
            f"--val-data={pattern}: there is no text in it (empty file, or blank documents only)"
        )
    return _grouped(files, hash_files(files))


def _has_text(path):
    return next(iterate_documents(path), None) is not None


def local_corpus(pattern, val_pattern=""):
    """The corpus of --data (a path, folder or glob) and, if given, of --val-data."""
    files = [path for path in find_files(pattern) if _has_text(path)]
    if not files:
        raise UsageError(
            f"--data={pattern}: there is no text in it (empty file, or blank documents only)"
        )
    if val_pattern:
        return Corpus(
            pattern,
            _mixed(files, hash_files(files)),
            held_out_files(val_pattern),
            f"validation: {val_pattern}",
        )
    if len(files) == 1:
        train, val, note = _split_file(
            files[0], functools.partial(file_shard, hashes=hash_files(files))
        )
        return Corpus(pattern, train, val, note)
    hashes = hash_files(files)
    if any(len(list(itertools.islice(iterate_documents(path), 2))) > 1 for path in files):
        return Corpus(
            pattern,
            _mixed(files[:-1], hashes),
            _grouped(files[-1:], hashes),
            f"held out: the last file, {files[-1].name}",
        )
    held_out = max(1, round(0.02 * len(files)))
    return Corpus(
        pattern,
        _mixed(files[:-held_out], hashes),
        _grouped(files[-held_out:], hashes),
        f"held out: the last {held_out} of {len(files)} documents",
    )


def _split_file(path, shard_of, column="text"):
    """([training shard], [validation shard], note) of a single file, whose last tenth is held out.

    shard_of(files, first, last, cut_characters, n_bytes): makes the shards."""
    # of many documents only their sizes are held: the file may be larger than memory
    sizes = array.array("Q", (_n_bytes(document) for document in iterate_documents(path, column)))
    if not sizes:
        raise UsageError(
            f"data: {path} holds no text (it is empty, or its documents are blank); name another file"
        )
    cut_characters = len(sizes) == 1
    text = next(iterate_documents(path, column)) if cut_characters else ""
    n, unit = (len(text), "characters") if cut_characters else (len(sizes), "documents")
    held_out = max(1, n // 10)
    first = n - held_out
    train_bytes = _n_bytes(text[:first]) if cut_characters else sum(sizes[:first])
    val_bytes = _n_bytes(text[first:]) if cut_characters else sum(sizes[first:])
    return (
        [shard_of([path], 0, first, cut_characters, train_bytes)],
        [shard_of([path], first, None, cut_characters, val_bytes)],
        f"held out: the last tenth ({held_out:,} of {n:,} {unit})",
    )


def _n_bytes(text):
    return len(text.encode("utf-8", "replace"))


def _python_paths():
    """(relative name, path) of the candidate files, sorted by name within each root."""
    import importlib.util

    roots = {
        "stdlib": Path(sysconfig.get_paths()["stdlib"]),
        "torch": Path(importlib.util.find_spec("torch").origin).parent,
    }
    for label, root in roots.items():
        skip = (
            {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
            if label == "stdlib"
            else set()
        )
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skip)
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield f"{label}/{path.relative_to(root).as_posix()}", path


def python_files():
    """({relative name: path}, {path: SHA-256}) of the embedded corpus: the standard library without tests, and torch.

    Files that are not UTF-8 or repeat an earlier one byte for byte are left out."""
    found, hashes, seen = {}, {}, set()
    for name, path in _python_paths():
        content = path.read_bytes()
        digest = sha256_hex(content)
        if digest in seen or not content.strip() or b"\0" in content:
            continue
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        found[name], hashes[path] = path, digest
    return dict(sorted(found.items())), hashes


def python_corpus(val_pattern=""):
    """Python source that is on every machine that runs this: one document a file, 2% held out by hash of the name."""
    files, hashes = python_files()
    held_out = {name for name in files if int(sha256_hex(name)[:8], 16) % PYTHON_HELD_OUT == 0}
    train = _mixed([path for name, path in files.items() if name not in held_out], hashes)
    if val_pattern:
        return Corpus("python", train, held_out_files(val_pattern), f"validation: {val_pattern}")
    val = _grouped([files[name] for name in sorted(held_out)], hashes)
    return Corpus(
        "python",
        train,
        val,
        f"held out: {len(held_out)} of {len(files)} files, by hash of their names",
    )


def is_remote(data):
    """True for the values of --data that name a dataset to download."""
    return data in hub.KNOWN or data.startswith("hf:")


@contextlib.contextmanager
def naming_what_needs_no_network():
    """Adds to a DownloadFailed inside the `with` what to train on without a network."""
    try:
        yield
    except DownloadFailed as error:
        raise DownloadFailed(
            f"{error} Without a network there are --data=python, and --data=<path> for text on this disk."
        ) from None


def remote_corpus(spec, val_pattern="", revision="", report=print):
    """The corpus of a dataset on the hub: one shard a file, of which nothing is fetched that is not needed to split it.

    Raises UsageError for a dataset that is not there or is not text, DownloadFailed for trouble on the way."""
    helped = (
        contextlib.nullcontext if revision else naming_what_needs_no_network
    )  # a resumed run needs the very same text
    with helped():
        listing = hub.resolve(spec, revision, report)
    shard_of = functools.partial(_remote_shard, column=listing.column)
    train, val, note = (
        [shard_of([file]) for file in listing.train],
        [shard_of([file]) for file in listing.val],
        listing.note,
    )
    if val_pattern:
        val, note = held_out_files(val_pattern), f"validation: {val_pattern}"
    elif not val and len(train) > 1:
        train, val, note = (
            train[:-1],
            train[-1:],
            f"held out: the last file, {listing.train[-1].name}",
        )
    elif not val:
        with helped():
            path = listing.train[0].fetch(report)
        train, val, note = _split_file(
            path, lambda _, *part: shard_of(listing.train, *part), listing.column
        )
    return Corpus(spec, train, val, note, listing.revision)


def _remote_shard(files, first=0, last=None, cut_characters=False, n_bytes=None, column="text"):
    suffix, compression = text_format(files[0].name)
    factor = PARQUET_TEXT_FACTOR if compression or suffix == ".parquet" else 1
    return Shard(
        name=files[0].name,
        files=tuple(files),
        column=column,
        first=first,
        last=last,
        cut_characters=cut_characters,
        fingerprint=sha256_hex(
            json.dumps([[f.fingerprint for f in files], first, last, cut_characters, column])
        ),
        n_bytes=round(files[0].n_bytes * factor) if n_bytes is None else n_bytes,
        contents=tuple(file.sha256 or file.fingerprint for file in files),
    )


def open_corpus(data, val_data="", revision="", report=print):
    """The Corpus that --data and --val-data name. revision: of a remote dataset, pinned by the run that is resumed.

    Raises UsageError for whatever is wrong with them, DownloadFailed when a dataset cannot be fetched."""
    named = data == "python" or is_remote(data)
    if not named:
        corpus = local_corpus(data, val_data)
    else:
        corpus = (
            python_corpus(val_data)
            if data == "python"
            else remote_corpus(data, val_data, revision, report)
        )
    folders = [folder for folder in ("" if named else data, val_data) if os.path.isdir(folder)]
    return dataclasses.replace(
        corpus, left_out=tuple(line for folder in folders for line in left_out_of(folder))
    )


def estimated_bytes(data):
    """Bytes of text in --data from file sizes and known datasets alone, for plans; nothing is read or asked for."""
    if data == "python":
        return sum(path.stat().st_size for _, path in _python_paths())
    if is_remote(data):
        return hub.KNOWN[data].text_bytes if data in hub.KNOWN else UNKNOWN_TEXT_BYTES
    return sum(map(_text_bytes, find_files(data)))


def compressed_bits_per_byte(shards, max_bytes=1 << 20):
    """{compressor: bits per byte} of gzip -9 and xz -9 on the first max_bytes of held-out text: what a model has to beat."""
    import gzip
    import lzma

    text = bytearray()
    for document in itertools.chain.from_iterable(shard.documents() for shard in shards):
        text += (b"\n" if text else b"") + document.encode("utf-8")
        if len(text) >= max_bytes:
            break
    text = bytes(text[:max_bytes])
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: round(8 * len(content) / len(text), 4) for name, content in packed.items()}


def remarks(corpus):
    """Sentences on what nobody may expect of a corpus: files left out, much text held out, the same text on both sides."""
    found, val_bytes = list(corpus.left_out), sum(shard.n_bytes for shard in corpus.val)
    share = val_bytes / max(1, val_bytes + corpus.train_bytes)
    if corpus.note.startswith("held out") and share > HELD_OUT_MUCH:
        found.append(f"note: {share:.0%} of the text is held out; --val-data names another text")
    train, val = _whole_files(corpus.train), _whole_files(corpus.val)
    if both := [name for content, name in val.items() if content in train]:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        found.append(
            f"warning: the text of {both[0]}{more} is on both sides: validation then measures memory; give --val-data other text"
        )
    return found


def _whole_files(shards):
    """{content: name} of the files that shards hold whole."""
    return {
        content: file.name
        for shard in shards
        if shard.first == 0 and shard.last is None
        for content, file in zip(shard.contents, shard.files, strict=False)
    }  # contents may not be known


def describe_corpus(corpus):
    """Lines on what a corpus is: what is held out, its fingerprint, bytes of both sides, and what nobody may expect."""
    lines = [
        f"data: {corpus.name}"
        + (f" at {corpus.revision[:12]}" if corpus.revision else "")
        + f", {corpus.note}; fingerprint "
        f"{corpus.fingerprint[:16]}"
    ]
    for side, shards in (("to train on", corpus.train), ("held out", corpus.val)):
        remote = [file for shard in shards for file in shard.remote_files()]
        size = (
            f"{sum(shard.n_bytes for shard in shards):,} bytes"
            if not remote
            else (f"about {sum(shard.n_bytes for shard in shards) / 1e6:,.1f} MB of text")
        )
        lines.append(
            f"  {side + ':':<12} {size} in {len(shards)} shards"
            + (
                f"; {sum(file.is_local() for file in remote)} of {len(remote)} files are here"
                if remote
                else ""
            )
        )
    return lines + [f"  {line}" for line in remarks(corpus)]
