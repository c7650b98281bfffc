"""What every layer uses: errors, exit codes, paths, seeds, atomic files, formatted numbers. Imports no torch."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

EXIT_COMPLETED, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class UsageError(Exception):
    """A request that cannot be honoured: bad flag, missing or unusable input. Shown without a traceback, exit code 2."""


class Unavailable(Exception):
    """Something outside this program that cannot be had now: a download, disk space. Shown without a traceback, exit code 1;
    trying again later may help."""


class TrainingFailed(Exception):
    """Training cannot go on; the message says why and what is left. Shown without a traceback, exit code 1."""


def install_hint(package, purpose):
    """The UsageError to raise when an optional package is missing."""
    return UsageError(
        f"{purpose} needs the package '{package}', which is not installed: pip install {package}"
    )


def valid_unicode(text):
    """The text with lone surrogates replaced: JSON may spell them, and undecodable bytes of a command line become some; UTF-8 has none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text):
    """The text as a terminal may get it: valid_unicode(), and control characters replaced but for line ends and tabs. Names of folders
    and what is written in them may be another's, and could move the cursor or clear the screen."""
    return re.sub(
        r"[^\n\t\x20-\x7e\xa0-\U0010ffff]", "\N{REPLACEMENT CHARACTER}", valid_unicode(text)
    )


def in_a_line(error):
    """What an exception says, in one line of at most 200 characters; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def base_dir(make=True):
    """Folder of caches and downloads: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. Made here if it is missing, unless make is False.

    UsageError if it is no folder or cannot be made. One that can be read and not written passes: what it holds is of use."""
    given = os.environ.get("NANOCHAT_BASE_DIR")
    try:
        path = Path(given) if given else Path.home() / ".cache" / "nanochat"
        if make:
            path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows the home folder
        named = f"NANOCHAT_BASE_DIR={given}" if given else "the folder of caches, ~/.cache/nanochat"
        reason = (
            "not a folder"
            if isinstance(error, FileExistsError)
            else getattr(error, "strerror", None) or in_a_line(error)
        )
        raise UsageError(
            f"{named}: cannot be made or used ({reason}); "
            f"{'name' if given else 'set NANOCHAT_BASE_DIR to'} a folder that can hold caches"
        ) from None
    return path


def stream_seed(seed, *names):
    """A 63-bit seed for one named random stream, so that streams of one run never share numbers.

    `names` are ints or strings, for example stream_seed(42, "rows", epoch, shard)."""
    digest = hashlib.sha256(json.dumps([seed, *names]).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sha256_hex(data):
    """Hex SHA-256 of bytes or of the UTF-8 form of a string."""
    return hashlib.sha256(
        data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    ).hexdigest()


def sha256_file(path):
    """Hex SHA-256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fsync_dir(path):
    """Make renames and new names inside a folder durable. A no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path, content):
    """Write a file, text or bytes, so that a reader, or a crash at any moment, sees the old content or the new, never a part."""
    path = Path(path)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content.encode("utf-8") if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)


@contextlib.contextmanager
def new_folder(out):
    """A temporary folder beside `out` that gets its name when the `with` ends well, and is deleted when it does not.

    UsageError if `out` is there and not an empty folder, cannot be made, or is being made by another process; Unavailable if
    it cannot be written later. Other errors of the body, such as of files that it reads, pass. What a killed process left is
    deleted."""
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists and is not an empty folder; name another one, or delete it first"
        )
    folder = out.with_name(f".{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{out} cannot be made ({error.strerror}); name a folder that can be written"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out} is being written by another process") from None
        in_body = False
        try:
            for left in folder.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            in_body = True
            yield folder
            in_body = False
            for path in folder.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors makes its files private
                if path.is_file():
                    with open(path, "rb") as f:
                        os.fsync(f.fileno())
            fsync_dir(folder)
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


def _is_of_writing(error, folder):
    """Whether an OSError is about a file inside a folder, or names no file and is of a disk that takes no more."""
    names = [
        name
        for name in (error.filename, error.filename2)
        if isinstance(name, str | bytes | os.PathLike)
    ]
    if not names:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return any(Path(os.fsdecode(name)).absolute().is_relative_to(folder) for name in names)


def write_json(path, value):
    """write_atomic() of a value as indented JSON. NaN and infinities are refused: a failed number is null."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path, what):
    """Parse a JSON file; `what` names it in the UsageError raised when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{what}: {path} cannot be read as JSON ({error})") from None


def number_or_auto(text):
    """argparse type of a whole number for which "auto" may stand."""
    return text if text == "auto" else int(text)


def step_argument(text):
    """argparse type of --step: a whole number, or "best"."""
    return text if text == "best" else int(text)


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return ceil_div(value, multiple) * multiple


def human_bytes(n):
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024


def human_time(seconds):
    """3725 -> '1h02m'; 65 -> '1m05s'; 4.2 -> '4.2s'."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
