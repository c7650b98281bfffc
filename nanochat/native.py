"""Compiles and loads C++ of this package. Imports no torch."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from nanochat.common import Unavailable, UsageError, in_a_line, note_once, own_cache, sha256_hex

COMPILERS = ("g++", "clang++")
# No -ffast-math: it would let the compiler sum in another order.
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# Flag of load() for code with threads: torch, and what it compiles, uses the same ones.
OPENMP = "-fopenmp"
COMPILE_SECONDS = 300
# The lines in which compilers, linkers and the system name a cause.
CAUSE = re.compile(r"error|cannot|no such|no space|denied|not found|not permitted", re.IGNORECASE)


@functools.cache
def load(source: Path, *flags: str) -> ctypes.CDLL:
    """The library of a C++ file, compiled for this processor and kept in the base dir.

    flags: for the compiler, beside FLAGS. Unavailable, with the reason in a line, where that is not
    possible."""
    try:
        return ctypes.CDLL(str(_built(source, flags)))
    # UsageError: no folder for it
    except (OSError, subprocess.SubprocessError, UsageError) as error:
        raise Unavailable(
            f"{source.name} cannot be compiled and loaded ({_cause(error)})"
        ) from None


@functools.cache
def problem(source: Path, *flags: str, planned: bool = False) -> str | None:
    """Why load() has no library of a C++ file on this machine, or None.

    planned: whether there is a compiler is all that is asked; nothing is compiled."""
    if planned:
        return missing()
    try:
        load(source, *flags)
    except Unavailable as error:
        return str(error)
    return None


def missing() -> str | None:
    """Why nothing can be compiled here, or None; compiles nothing to find out."""
    try:
        _compiler()
    except FileNotFoundError as error:
        return in_a_line(error)
    return None


def _built(source: Path, flags: tuple[str, ...]) -> Path:
    """The compiled library. Raises OSError or SubprocessError."""
    compiler = _compiler()
    arm = platform.machine() in ("arm64", "aarch64")
    command = [compiler, *FLAGS, *flags, "-mcpu=native" if arm else "-march=native", "-pthread"]
    # A base dir may serve machines with other processors.
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = sha256_hex("\n".join([*texts, *command, _processor()]))
    library = own_cache("native") / f"{source.stem}-{key[:16]}.so"
    if library.exists():
        return library
    note_once(f"compiling {source.name} for this processor: once, some ten seconds")
    descriptor, partial = tempfile.mkstemp(dir=library.parent, suffix=".partial")
    os.close(descriptor)
    try:
        subprocess.run(
            [*command, str(source), "-o", partial],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMPILE_SECONDS,
        )
        os.replace(partial, library)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    return library


def _compiler() -> str:
    """The path of the C++ compiler. FileNotFoundError if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise FileNotFoundError(f"no C++ compiler ({' or '.join(names)}) on PATH")
    return found


def _processor() -> str:
    """What identifies the instructions that -march=native uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _cause(error: Exception) -> str:
    """What made it fail, in a line."""
    return telling_line(getattr(error, "stdout", None) or b"") or in_a_line(error)


def telling_line(output: str | bytes) -> str:
    """The first line of a compiler's output that names a cause, or else the first one."""
    if isinstance(output, bytes):
        output = output.decode(errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if CAUSE.search(line)]
    first = (telling or lines or [""])[0]
    return in_a_line(ValueError(first)) if first else ""
