"""A copy of this program with the user's patch applied, for `nanochat sweep try --patch`.

A patch is code, and the runs of the trial execute it: it is meant to be the user's own. It is
applied to a copy, never to the tree that the user works in."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nanochat.common import UsageError, install_hint, new_folder

# all that a run executes, next to each other in a checkout as in site-packages
SOURCES = ("train.py", "nanochat", "tasks")


def digest_of(root: Path, patch: bytes = b"") -> str:
    """Hexadecimal SHA-256 of the sources below root and of a patch."""
    digest = hashlib.sha256(patch)
    # names count too: the same lines in another file are another program
    for path in _files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for name in SOURCES:
        path = root / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (file for file in found if file.is_file() and "__pycache__" not in file.parts)


def read_patch(path: Path) -> bytes:
    """The content of a patch. UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--patch={path}: cannot be read ({error.strerror}); name a file that `git diff` wrote"
        ) from None


def copy_with_patch(root: Path, patch: Path, folder: Path) -> None:
    """Copy the sources below root into a new folder, with the patch applied to them; what it has
    for other files, such as tests, is left out.

    UsageError if it does not apply, or changes nothing of the sources."""
    with new_folder(folder) as made:
        for name in SOURCES:
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(root / name, made / name, ignore=ignored)
            else:
                shutil.copy2(root / name, made / name)
        _apply(patch, made)
        # a patch of other files alone would pass for one without effect
        if digest_of(made) == digest_of(root):
            raise UsageError(
                f"--patch={patch}: changes nothing of {', '.join(SOURCES)}; paths in it begin at "
                f"the folder of train.py, as `git diff` writes them"
            )


def _apply(patch: Path, folder: Path) -> None:
    """Apply a patch in a folder. UsageError if that fails; then nothing is changed."""
    environment = {name: value for name, value in os.environ.items() if name != "GIT_WORK_TREE"}
    # inside another repository, such as that of out/, git would leave out all files of the patch
    environment |= {"GIT_DIR": os.devnull, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    # `*` matches slashes here
    wanted = [f"--include={name}*" for name in SOURCES]
    command = ["git", "apply", "--whitespace=nowarn", *wanted, str(patch.absolute())]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, env=environment)
    # git is no dependency of anything else here
    except FileNotFoundError:
        raise install_hint("git", "--patch") from None
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UsageError(
            f"--patch={patch}: does not apply to the sources next to train.py "
            f"({words[0] if words else 'git apply failed'}); make it anew with `git diff`"
        )
