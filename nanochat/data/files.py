"""Which files of this machine a path, a folder or a pattern names.

A folder and the pattern FOLDER/**/*.txt find the same .txt files: links are followed, each file
comes once, what is hidden or belongs to a system is skipped, and what is left out is named."""

import codecs
import collections
import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UsageError, counted
from nanochat.data.text import refuse_what_is_no_text, text_format, text_suffix

# What is read of a folder. Its .json files may be anything (`data mix` writes one). Where a folder
# has none of these, as one of code, all files are read that hold text and have no format of ours.
FOLDER_FORMATS = (".txt", ".jsonl", ".parquet")
# of `data mix`, which says there what came from where
MIX_SUMMARY = "sources.json"
# In lower case: what systems and tools leave in folders. Names that begin with a dot are skipped
# as well.
SYSTEM_NAMES = {
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "lost+found",
    "node_modules",
    "system volume information",
    "thumbs.db",
}
# why a path is left out: the noun that counts it in a remark
HIDDEN = "hidden or system name"
UNREADABLE = "unreadable path"
DANGLING = "dangling link"
CIRCULAR = "circular link"
SPECIAL = "special file"
FOLDER = "folder"
BINARY = "binary file"
NOT_UTF8 = "non-UTF-8 file"
# or one of blanks alone
EMPTY = "empty file"
# what to do about a reason, behind the paths in a remark
REMEDIES = {NOT_UTF8: "; iconv converts to UTF-8"}
# of a file, to tell text from other data
HEAD_BYTES = 1 << 16
# paths that a remark names
PATHS_SHOWN = 3


@dataclass(frozen=True)
class Named:
    """The files that a value of --data or --val-data names, sorted.

    root: the folder below which names of files and folders may mean a split. is_folder: the value
    is a folder, so the user chose none of the files. is_file: the value is the path of the one
    file. remarks: sentences on what is left out."""

    files: list[Path]
    root: Path
    is_folder: bool = False
    is_file: bool = False
    remarks: tuple[str, ...] = ()


def named_files(pattern: str, flag: str = "--data") -> Named:
    """The files that a path, a folder (see FOLDER_FORMATS) or a pattern names.

    A file that is named itself is taken whatever it is called. Raises UsageError if nothing is
    found, for a pipe or a device, and for data that are obviously no text."""
    if os.path.isdir(pattern):
        return _of_folder(pattern, flag)
    if os.path.isfile(pattern):
        path = Path(pattern)
        refuse_what_is_no_text(path)
        return Named([path], path.parent, is_file=True)
    if os.path.exists(pattern):
        raise UsageError(
            f"{flag}={pattern}: a pipe, a socket or a device, which can be read once at most; text "
            f"is hashed, split and tokenized in turn: write it to a file, and name that"
        )
    if os.path.islink(pattern):
        raise UsageError(
            f"{flag}={pattern}: a link to {os.readlink(pattern)}, which does not exist; repair the "
            f"link, or name the file itself"
        )
    return _of_pattern(pattern, flag)


def listed(paths: Sequence[Path], root: Path) -> str:
    """The first paths, as they are called below a folder: "a.txt, b/c.txt and 3 more"."""
    names = ", ".join(str(path.relative_to(root)) for path in paths[:PATHS_SHOWN])
    more = len(paths) - PATHS_SHOWN
    return f"{names} and {more:,} more" if more > 0 else names


def _of_folder(folder: str, flag: str) -> Named:
    root = Path(folder)
    finder = _Finder(root, f"in the folder {folder}")
    finder.walk(root)
    if root in finder.left_out[UNREADABLE]:
        raise UsageError(
            f"{flag}={folder}: the folder cannot be read; check its permissions (ls -ld)"
        )
    refuse_what_is_no_text(root)
    everything = finder.files()
    files = finder.readable([p for p in everything if p.suffix.lower() in FOLDER_FORMATS])
    if not files:
        for path in everything:
            if path.suffix.lower() == ".arrow":
                refuse_what_is_no_text(path.parent)
                refuse_what_is_no_text(path)
        # data beside a description of them, say: the description is not what was meant
        if {text_suffix(path.name).lower() for path in everything} <= {"", ".json"}:
            files = finder.texts(path for path in everything if not text_suffix(path.name))
        if files:
            taken = _taken_for_text(folder, files)
            others = _other_formats(folder, [p for p in everything if text_suffix(p.name)])
            # all of them, not those of the main format
            return Named(files, root, remarks=(taken, *others, *finder.remarks()))
    remarks = (*_other_formats(folder, everything), *finder.remarks())
    if not files:
        example = os.path.join(folder, "*.jsonl.gz")
        lines = (
            f"{flag}={folder}: the folder holds no {', '.join(FOLDER_FORMATS)} file; name files "
            f"of other formats by a pattern, such as '{example}'",
            *remarks,
        )
        raise UsageError(". ".join(lines))
    return Named(files, root, is_folder=True, remarks=remarks)


def _other_formats(folder: str, files: Iterable[Path]) -> list[str]:
    """A sentence, if one is due, on files that a pattern could name, but that are not read of a
    folder: of other formats, and of none."""
    suffixes = collections.Counter(
        (text_suffix(path.name) or path.suffix).lower()
        for path in files
        if path.suffix.lower() not in FOLDER_FORMATS and path.name != MIX_SUMMARY
    )
    found = sorted((suffix, n) for suffix, n in suffixes.items() if suffix)
    if not found:
        return []
    counts = ", ".join(f"{n:,} {suffix}" for suffix, n in found)
    example = os.path.join(folder, "**", f"*{found[0][0]}")
    return [
        f"left out in the folder {folder}: {counts}; name them by a pattern, such as '{example}'"
    ]


def _taken_for_text(folder: str, files: Sequence[Path]) -> str:
    """A sentence on the files of a folder that has none of FOLDER_FORMATS."""
    suffixes = collections.Counter(path.suffix.lower() or "without suffix" for path in files)
    counts = ", ".join(f"{n:,} {suffix}" for suffix, n in suffixes.most_common(PATHS_SHOWN))
    return (
        f"the folder {folder} holds no {', '.join(FOLDER_FORMATS)} file: its "
        f"{counted(len(files), 'file')} with text are read ({counts}"
        f"{', ...' if len(suffixes) > PATHS_SHOWN else ''})"
    )


def text_bytes(path: Path, column: str = "text") -> int:
    """Bytes of text in a file: its size, or for parquet what its text column unpacks to.

    UsageError if the file is gone."""
    if text_format(path.name) == (".parquet", ""):
        # of a file that cannot be read, reading the text will say what is wrong
        with contextlib.suppress(ImportError, OSError, ValueError):
            return _parquet_text_bytes(path, column)
    try:
        return path.stat().st_size
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None


def _parquet_text_bytes(path: Path, column: str) -> int:
    import pyarrow.parquet

    metadata = pyarrow.parquet.ParquetFile(path).metadata
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(j) for group in groups for j in range(metadata.num_columns))
    return sum(found.total_uncompressed_size for found in columns if found.path_in_schema == column)


# --------------------------------------------------------------------------------------------------
# patterns


def _of_pattern(pattern: str, flag: str) -> Named:
    """The files that a pattern matches, `**` being any number of folders as in glob.

    A hidden name or one of a system is found where the pattern spells it out before any `**`."""
    parts = Path(pattern).parts
    # the part without wildcards; of a pattern without any, the folder of the missing file
    n_literal = next((i for i, part in enumerate(parts) if _has_wildcard(part)), len(parts) - 1)
    root = Path(*parts[:n_literal])
    finder = _Finder(root, f"for {pattern}")
    if "**" in parts:
        n_head = parts.index("**")
        tail = parts[n_head:]
        heads = [root] if n_head == n_literal else _plain_matches(parts[:n_head], finder)
        for head in heads:
            if os.path.isdir(head):
                finder.walk(head)
        matches = [path for path in finder.files() if _matches_below(path, heads, tail)]
    else:
        for path in _plain_matches(parts, finder):
            finder.add(path)
        matches = finder.files()
    files = finder.readable(matches)
    if files:
        return Named(files, root, remarks=finder.remarks())
    remarks = finder.remarks()
    if remarks:
        raise UsageError(f"{flag}={pattern}: no file that can be read. {'. '.join(remarks)}")
    raise UsageError(
        f"{flag}={pattern}: no such file or folder, and no file matches it as a pattern; if "
        f"the text was moved, give its new path (a resumed run takes {flag}=NEWPATH when the "
        f"text is the same)"
    )


def _has_wildcard(part: str) -> bool:
    return glob.escape(part) != part


def _plain_matches(parts: Sequence[str], finder: "_Finder") -> list[Path]:
    """What a pattern without `**` matches, sorted, without what a wildcard found of a system."""
    kept = []
    for path in sorted(Path(name) for name in glob.glob(os.path.join("", *parts))):
        # without `**` the parts of the two correspond
        by_wildcard = [
            Path(*path.parts[: i + 1])
            for i, part in enumerate(parts)
            if _has_wildcard(part) and not part.startswith(".")
        ]
        system = next((above for above in by_wildcard if _is_system(above.name)), None)
        if system is None:
            kept.append(path)
        elif system not in finder.left_out[HIDDEN]:
            finder.left_out[HIDDEN].append(system)
    return kept


def _matches_below(path: Path, heads: Iterable[Path], pattern: Sequence[str]) -> bool:
    """Whether a pattern that begins with `**` matches a path below one of some folders."""
    return any(
        _matches(path.relative_to(head).parts, pattern)
        for head in heads
        if path.is_relative_to(head)
    )


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        # a last `**` matches all that is below
        rest = pattern[1:] or ["*"]
        return any(_matches(names[i:], rest) for i in range(len(names)))
    return (
        bool(names)
        and fnmatch.fnmatchcase(names[0], pattern[0])
        and _matches(names[1:], pattern[1:])
    )


# --------------------------------------------------------------------------------------------------
# what stands in folders


def _is_system(name: str) -> bool:
    """Whether a name is hidden, or one that systems and tools use."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


class _Finder:
    """Files, each once by its real path, and the paths that are left out, by the reason why.

    root: remarks name paths as they are called below it. where: "in the folder x"."""

    def __init__(self, root: Path, where: str) -> None:
        self.root = root
        self.where = where
        self.left_out: dict[str, list[Path]] = collections.defaultdict(list)
        # links that lead to other places; these are followed
        self.outside: list[Path] = []
        self._by_real_path: dict[str, Path] = {}
        self._walked: set[str] = set()

    def files(self) -> list[Path]:
        """The files that were found, sorted."""
        return sorted(self._by_real_path.values())

    def readable(self, files: Iterable[Path]) -> list[Path]:
        """Those of the files that may be read; the others are left out."""
        kept = []
        for path in files:
            if os.access(path, os.R_OK):
                kept.append(path)
            else:
                self.left_out[UNREADABLE].append(path)
        return kept

    def texts(self, files: Iterable[Path]) -> list[Path]:
        """Those of the files that may be read and hold text in UTF-8; the others are left out."""
        kept = []
        for path in self.readable(files):
            with open(path, "rb") as file:
                head = file.read(HEAD_BYTES)
            try:
                # of a longer file, a character may be cut at the end
                decoder = codecs.getincrementaldecoder("utf-8")()
                decoder.decode(head, final=len(head) < HEAD_BYTES)
                is_utf8 = True
            except UnicodeDecodeError:
                is_utf8 = False
            if b"\0" in head:
                self.left_out[BINARY].append(path)
            elif not is_utf8:
                self.left_out[NOT_UTF8].append(path)
            elif not head.strip():
                self.left_out[EMPTY].append(path)
            else:
                kept.append(path)
        return kept

    def remarks(self) -> tuple[str, ...]:
        """A sentence on each reason for which something is left out, and one on links."""
        lines = [
            f"left out {self.where}: {counted(len(paths), reason)} "
            f"({listed(sorted(paths), self.root)}{REMEDIES.get(reason, '')})"
            for reason, paths in sorted(self.left_out.items())
            if paths
        ]
        if self.outside:
            links = counted(len(self.outside), "link")
            lines.append(
                f"followed {self.where}: {links} to other places "
                f"({listed(self.outside, self.root)})"
            )
        return tuple(lines)

    def add(self, path: Path) -> None:
        """Note a path: a file, or something that is left out."""
        # the functions of os.path take what may not be looked at for missing
        if os.path.isfile(path):
            # the first path that leads to a file names it
            self._by_real_path.setdefault(os.path.realpath(path), path)
        elif os.path.isdir(path):
            self.left_out[FOLDER].append(path)
        else:
            self.left_out[SPECIAL if os.path.exists(path) else DANGLING].append(path)

    def walk(self, folder: Path) -> None:
        """Note what is below a folder, and what links there lead to.

        Links come last, so that none changes what the other files are called."""
        base = os.path.realpath(folder)
        links = self._walk_without_links(folder)
        while links:
            found: list[Path] = []
            for link in sorted(links):
                found += self._follow(link, base)
            links = found

    def _walk_without_links(self, top: Path) -> list[Path]:
        """Note what is below a folder but for links, which are returned."""
        links = []
        pending = [(top, os.path.realpath(top))]
        while pending:
            folder, real = pending.pop()
            if real in self._walked:
                continue
            self._walked.add(real)
            try:
                with os.scandir(folder) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError:
                self.left_out[UNREADABLE].append(folder)
                continue
            # the mark of a virtual environment of Python, which may have any name
            if folder != top and any(entry.name == "pyvenv.cfg" for entry in entries):
                self.left_out[HIDDEN].append(folder)
                continue
            for entry in entries:
                path = folder / entry.name
                if _is_system(entry.name):
                    self.left_out[HIDDEN].append(path)
                elif entry.is_symlink():
                    links.append(path)
                elif entry.is_dir():
                    pending.append((path, os.path.join(real, entry.name)))
                elif entry.is_file():
                    self._by_real_path.setdefault(os.path.join(real, entry.name), path)
                else:
                    self.left_out[SPECIAL].append(path)
        return links

    def _follow(self, link: Path, base: str) -> list[Path]:
        """Note what a link leads to; returns the links below. base: real path of the folder."""
        target = os.path.realpath(link)
        # an enclosing folder holds the link itself
        if Path(os.path.realpath(link.parent)).is_relative_to(target):
            self.left_out[CIRCULAR].append(link)
            return []
        if os.path.exists(link) and not Path(target).is_relative_to(base):
            self.outside.append(link)
        if os.path.isdir(link):
            return self._walk_without_links(link)
        self.add(link)
        return []
