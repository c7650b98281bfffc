"""What every layer uses: errors, exit codes, seeds, files, formatted numbers. Imports no torch."""

import argparse
import base64
import contextlib
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXIT_COMPLETED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
# EX_TEMPFAIL of sysexits.h: stopped before the end; the same command with --resume continues.
EXIT_STOPPED = 75
# end of the names of files and folders that are not complete; they begin with a dot
PARTIAL = ".partial"
# takes a line for the user
Report = Callable[[str], None]


class UsageError(Exception):
    """A request that cannot be honoured: a bad flag, a missing or unusable input.

    Shown without a traceback; exit code 2."""


class Unavailable(Exception):
    """Something outside this program that is not available now: a download, disk space.

    Shown without a traceback; exit code 1. Trying again later may help."""


class TrainingFailed(Exception):
    """Training cannot continue; the message says why and what is left.

    Shown without a traceback; exit code 1."""


def install_hint(package: str, purpose: str) -> UsageError:
    """The UsageError to raise when an optional package is missing."""
    return UsageError(
        f"{purpose} needs the package '{package}', which is not installed: pip install {package}"
    )


def check_system() -> None:
    """UsageError on native Windows, which has neither file locks nor the signals and limits of
    Unix."""
    if importlib.util.find_spec("fcntl") is None:
        raise UsageError(
            "nanochat needs Linux or macOS: on Windows, install WSL (wsl --install) and start it "
            "in there"
        )


def find_own_tasks() -> None:
    """Make sure that `import tasks` finds the package next to this one: `python -m` looks in the
    current folder first, which may hold other modules of that name.

    Raises UsageError naming the foreign one if it comes first for another reason."""
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError):
        # the installed command has another folder there
        if sys.path[0] == os.getcwd() and not root.samefile(sys.path[0]):
            del sys.path[0]
    spec = importlib.util.find_spec("tasks")
    # a folder without __init__.py has no origin
    found = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
    if not found or Path(found).resolve() != root / "tasks" / "__init__.py":
        raise UsageError(
            f"{found or 'nothing'} is imported in place of nanochat's own package 'tasks' in "
            f"{root}; rename it, take its folder off PYTHONPATH, or install nanochat again"
        )


# ---- text ----


def valid_unicode(text: str) -> str:
    """The text with lone surrogates replaced by "?".

    JSON can spell them, and undecodable bytes of a command line become some; UTF-8 has none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text: str) -> str:
    """The text as it may be shown in a terminal.

    valid_unicode(), with control characters other than line ends and tabs replaced: folder names
    and file contents may come from someone else, and could move the cursor or clear the screen."""
    return re.sub(
        r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", valid_unicode(text)
    )


def in_a_line(error: BaseException) -> str:
    """An exception's message on one line of at most 200 characters; its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# ---- seeds and hashes ----


def stream_seed(seed: int, *names: int | str) -> int:
    """A 63-bit seed for one named random stream, so that streams of one run never share numbers.

    Example: stream_seed(42, "rows", epoch, shard)."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    # 63 bits: some generators take signed integers only.
    return int.from_bytes(digest[:8], "little") >> 1


def sha256_hex(data: str | bytes) -> str:
    """Hex SHA-256 of bytes or of the UTF-8 form of a string."""
    if isinstance(data, str):
        # surrogatepass: file names may hold lone surrogates, and must still be told apart
        data = data.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's content, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- files ----


def base_dir(make: bool = True) -> Path:
    """Folder of caches and downloads: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat.

    Created if it is missing, unless make is False. UsageError if it is not a folder or cannot be
    created. It may be read-only, or another user's: cached() says where a file is or goes."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    try:
        path = Path(path_argument(given)) if given else _home_base_dir()
        if make:
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # Path.home() raises RuntimeError where no home folder is known
        if isinstance(error, FileExistsError):
            reason = "not a folder"
        else:
            reason = getattr(error, "strerror", None) or in_a_line(error)
        if given:
            named = f"NANOCHAT_BASE_DIR={given}"
            remedy = "name a folder that can hold caches"
        else:
            named = "the folder of caches, ~/.cache/nanochat"
            remedy = "set NANOCHAT_BASE_DIR to a folder that can hold caches"
        raise UsageError(f"{named}: cannot be created or used ({reason}); {remedy}") from None
    return path


def cached(*names: str) -> Path:
    """Path of a file or folder below base_dir() that is kept for later.

    Where it is missing and cannot be created, because base_dir() is read-only or another user's,
    this is its path below ~/.cache/nanochat, and the first such path is reported in one line. If
    nothing can be created there either, it is the path below base_dir()."""
    path = base_dir().joinpath(*names)
    if os.path.exists(path) or can_create(path):
        return path
    return _private_base_dir(base_dir()).joinpath(*names)


def writable_base_dir() -> Path:
    """The folder below which new files are kept: base_dir(), or ~/.cache/nanochat if that cannot be
    written; base_dir() if neither can."""
    path = base_dir()
    return path if can_create(path / "new") else _private_base_dir(path)


def own_cache(name: str, make: bool = True) -> Path:
    """A folder of caches that belongs to this user, such as one for generated code, which nobody
    else may be able to replace. Created if it is missing, unless make is False.

    It is below base_dir(), ~/.cache/nanochat or the folder of temporary files. UsageError if none
    of these can be written."""
    for path in _own_caches(name):
        with contextlib.suppress(OSError):
            if make:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mine = not path.exists() or path.stat().st_uid == os.geteuid()
            if mine and can_create(path / "new"):
                return path
    raise UsageError(
        f"{base_dir() / name}: this folder is not yours or cannot be written; set "
        f"NANOCHAT_BASE_DIR to a folder that can hold caches"
    )


def _own_caches(name: str) -> Iterator[Path]:
    """Where own_cache() may be, best first."""
    yield base_dir() / name
    yield _private_base_dir(base_dir()) / name
    flat = name.replace("/", "-")
    yield Path(tempfile.gettempdir()) / f"nanochat-{os.geteuid()}-{flat}"


def _home_base_dir() -> Path:
    return Path.home() / ".cache" / "nanochat"


def _private_base_dir(unwritable: Path) -> Path:
    """The folder of caches below the user's home; `unwritable` if it cannot be written either."""
    # Path.home() raises RuntimeError where no home folder is known
    with contextlib.suppress(OSError, RuntimeError):
        path = _home_base_dir()
        path.mkdir(parents=True, exist_ok=True)
        if can_create(path / "new") and not path.samefile(unwritable):
            note_once(f"caches: parts of {unwritable} cannot be written; new files go to {path}")
            return path
    return unwritable


def can_create(path: Path) -> bool:
    """Whether this user may create `path`, judging by the nearest folder above it that exists."""
    folder = path.parent
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    # no folder: a mistake that the attempt to write will name
    if not os.path.isdir(folder):
        return True
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


_noted: set[str] = set()


def note_once(text: str, report: Report | None = None, key: str = "") -> None:
    """Report a line, unless this process reported one with the same key (by default the text).

    report: by default the line goes to standard error, on rank 0 only."""
    if (key or text) in _noted:
        return
    _noted.add(key or text)
    if report:
        report(text)
    elif os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def apply_umask(path: str | os.PathLike) -> None:
    """Give a file or folder of ours the permissions that the umask says: some libraries, and
    Python's temporary files, are readable by their owner only."""
    # the umask can only be read by setting it; for that instant a private one is safe
    umask = os.umask(0o077)
    os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


def fsync_dir(path: str | os.PathLike) -> None:
    """Make renames and new names inside a folder durable. A no-op on Windows, where folders cannot
    be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new,
    never a part. Text is written as UTF-8."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8")
    # In the same folder: a rename is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(PARTIAL, f".{path.name}.", path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            # Before the rename: otherwise a crash could leave the new name on an empty file.
            os.fsync(file.fileno())
        # mkstemp() makes files private
        apply_umask(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)


@contextlib.contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder next to `out` that takes its name when the `with` block succeeds, and is
    deleted when it fails.

    UsageError if `out` exists and is not an empty folder, cannot be created, or is being written by
    another process; Unavailable if it cannot be written later. Other errors of the block, such as
    those of files that it reads, pass through. What a killed process left behind is deleted."""
    # here, since it imports this module
    from nanochat import locks

    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not an empty folder; name another one, or delete it first"
        )
    folder = out.with_name(f".{out.name}{PARTIAL}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be created ({error.strerror}); name a folder that can be written"
        ) from None
    try:
        # The system drops the lock when the process dies, so a killed one does not block the next.
        if locks.take(lock, out.parent) is locks.Lock.HELD_ELSEWHERE:
            raise UsageError(f"{out} is being written by another process; name another folder")
        in_body = False
        try:
            _empty(folder)
            in_body = True
            yield folder
            in_body = False
            _make_durable(folder)
            folder.rename(out)
            fsync_dir(out.parent)
        except OSError as error:
            if in_body and not _is_of_writing(error, folder):
                raise
            raise Unavailable(
                f"{out} cannot be written ({error.strerror or error}); nothing of it is left"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _make_durable(folder: Path) -> None:
    """Flush all files of a folder to the disk, and make them as readable as the umask says."""
    for path in folder.rglob("*"):
        # safetensors makes its files private
        apply_umask(path)
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_dir(folder)


def _is_of_writing(error: OSError, folder: Path) -> bool:
    """Whether an error is about a file in the folder, or names no file and is that of a disk that
    accepts no more data."""
    names = [
        name
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    if not names:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return any(Path(os.fsdecode(name)).absolute().is_relative_to(folder) for name in names)


def delete_folder(path: str | os.PathLike, keep_link: bool = False) -> None:
    """Delete a folder with all that is in it. Of a link, what it leads to is deleted; with
    keep_link the link stays and leads to an empty folder."""
    path = Path(path)
    if not path.is_symlink():
        shutil.rmtree(path)
        return
    target = path.resolve()
    # Emptied, since a mounted disk cannot be deleted.
    _empty(target)
    if not keep_link:
        path.unlink()
        target.rmdir()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """write_atomic() of a value as indented JSON. ValueError for NaN and infinities: a number that
    could not be computed is null."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike, what: str) -> Any:
    """Parse a JSON file. UsageError, with `what` naming the file, if it is missing or not JSON."""
    try:
        # UnicodeDecodeError is a ValueError: bytes that are not UTF-8 are no JSON either.
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what}: {path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: {path} cannot be read as JSON ({error})") from None


# ---- argument types ----


def path_argument(text: str) -> str:
    """argparse type of everything that may be a path: `~` and environment variables are expanded,
    since a shell leaves them alone in `--flag=~/x` and in a configuration file.

    Text that names an existing file as it is, and unknown variables, stay unchanged."""
    return text if os.path.lexists(text) else os.path.expanduser(os.path.expandvars(text))


def number_or_auto(text: str) -> int | str:
    """argparse type: a whole number, or "auto". ValueError otherwise."""
    return text if text == "auto" else int(text)


def whole_number(text: str) -> int:
    """argparse type: a whole number, also written as 1e5."""
    try:
        # int() refuses 1e5; a float is exact up to 2^53, more than anything counted here
        value = float(text)
    except ValueError:
        # NaN fails every comparison below
        value = math.nan
    if not (abs(value) < 1 << 63 and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (1e5 is one)")
    return int(value)


def number_or_all(text: str) -> int | str:
    """argparse type: a whole number, or "all". ValueError otherwise."""
    return text if text == "all" else int(text)


def step_argument(text: str) -> int | str:
    """argparse type of --step: a whole number, or "best". ValueError otherwise."""
    return text if text == "best" else int(text)


def python_command(script: str | os.PathLike, argv: Sequence[str], processes: int) -> list[str]:
    """The command line that runs a Python script on this machine, by torchrun in several
    processes."""
    launcher = [sys.executable]
    if processes > 1:
        # without `--` torchrun's own parser would read --run as one of its options
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}", "--"]
    return [*launcher, str(script), *argv]


def add_model_flags(
    parser: argparse._ActionsContainer,
    auto: str = "float32 on CPUs, bfloat16 on GPUs that support it",
) -> None:
    """Declare --device-type and --dtype, for apps that compute with a trained model.

    parser: a parser or one of its groups. auto: what --dtype=auto means, for its help."""
    parser.add_argument(
        "--device-type",
        default="",
        choices=("", "cuda", "mps", "cpu"),
        help="empty, the default: the first available of cuda, mps, cpu",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        # float16 is left out: its range is made up for by loss scaling, which only training has
        choices=("auto", "bfloat16", "float32"),
        help=f"compute dtype; auto: {auto} (default %(default)s)",
    )


def policy_hashes(html: str, tag: str) -> list[str]:
    """The hashes of the contents of these elements of a page, as a Content-Security-Policy names
    them; elements with attributes are left out."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [hashlib.sha256(content.encode()).digest() for content in contents]
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


# ---- numbers ----


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    # // rounds down: negating twice rounds up, exactly for integers of any size
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return ceil_div(value, multiple) * multiple


def counted(n: int, noun: str) -> str:
    """A number and its noun, in the plural where it should be: "1 file", "2,000 files"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def human_bytes(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    if abs(n) < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n /= 1024
        if abs(n) < 1024:
            return f"{n:.1f} {unit}"
    return f"{n / 1024:.1f} TiB"


def human_time(seconds: float) -> str:
    """4.2 -> '4.2s'; 65 -> '1m05s'; 3725 -> '1h02m'; 90000 -> '1d01h'."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s"
