"""Whether torch.compile works here: a look at the tools that it needs, and a trial of all of it.

Between a compiler that exists and one that works lie parts of it that are missing, full disks,
folders of other users, mounts that allow no code and paths with blanks. Whatever of these makes the
trial fail, training runs uncompiled, and says why in a line."""

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

from nanochat import hardware, locks, ranks
from nanochat.common import in_a_line
from nanochat.native import telling_line

# Generous, for a machine that is busy or a disk that is far away.
PROBE_SECONDS = 120
# What has to be free for the kernels of a run: several times what they have been seen to take.
ROOM_BYTES = 32 << 20
# Needs the compiler's own parts, its headers, and Python's, as generated code does.
PROBE = "#include <math.h>\n#include <Python.h>\ndouble probe(double x) { return exp(x); }\n"


def missing(device_type: str) -> str | None:
    """Why torch.compile cannot be used here, or None. Looks for the tools, compiles nothing."""
    if device_type == "mps":
        return "torch.compile is not reliable on mps"
    if device_type == "cuda":
        try:
            # inductor's CUDA back end
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed (pip install triton)"
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return f"SM{major}{minor} is too old for triton, which needs SM70 or later"
    if not os.environ.get("PATH"):
        return "PATH is not set, and compilers look there for their parts"
    language, names = _compilers(device_type)
    if not _compiler(device_type):
        return f"no {language} compiler ({names[0]}) on PATH"
    # Both kinds of code include it.
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        return "Python.h is missing (the python3-dev package)"
    return None


def problem(device_type: str) -> str | None:
    """Why torch.compile cannot be used, or None: a trial with the tools and in the folders that
    training will use. hardware.prepare() must have been called.

    Every rank must call it, and gets the same answer: where one cannot compile, none does."""
    reasons = ranks.from_all(_problem(device_type))
    for rank, reason in enumerate(reasons):
        if reason:
            return reason if all(reasons) else f"rank {rank}: {reason}"
    return None


# A second trial in this process would find everything compiled and learn nothing.
@functools.cache
def _problem(device_type: str) -> str | None:
    if reason := missing(device_type):
        return reason
    try:
        reason = _probe(device_type) or _trial(device_type)
    # Anything can be raised: by the system, by the compiler's processes, by torch around them.
    except Exception as error:
        reason = cause(error)
    return reason and _explained(reason)


def _compilers(device_type: str) -> tuple[str, list[str]]:
    """The language of generated code, and the compilers of which the first that exists is used."""
    # inductor's kernels for CPUs are C++; triton compiles its launchers, which are C
    if device_type == "cpu":
        usual = ["clang++" if platform.system() == "Darwin" else "g++"]
        return "C++", [os.environ["CXX"]] if os.environ.get("CXX") else usual
    return "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]


def _compiler(device_type: str) -> str | None:
    """The path of the compiler that is used, or None."""
    _, names = _compilers(device_type)
    return next(filter(None, map(shutil.which, names)), None)


def _probe(device_type: str) -> str | None:
    """Compile a few lines in the folder of compiled kernels, and load the result; returns what
    failed, or None.

    torch's own trial would not notice a compiler that broke after an earlier start, as it finds
    its code compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with tempfile.TemporaryDirectory(prefix="trial-", dir=cache_dir()) as folder:
        # Free space says nothing of quotas; a write does.
        Path(folder, "room").write_bytes(bytes(ROOM_BYTES))
        language, _ = _compilers(device_type)
        source = Path(folder, "probe.cpp" if language == "C++" else "probe.c")
        source.write_text(PROBE)
        library = Path(folder, "probe.so")
        include = sysconfig.get_paths()["include"]
        # Python's own functions are found when the library is loaded.
        flags = ["-shared", "-fPIC", f"-I{include}"]
        if platform.system() == "Darwin":
            flags += ["-undefined", "dynamic_lookup"]
        compiler = _compiler(device_type)
        done = subprocess.run(
            [compiler, *flags, str(source), "-o", str(library)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
        if done.returncode:
            name = os.path.basename(compiler)
            return telling_line(done.stdout) or f"{name} ended with exit code {done.returncode}"
        ctypes.CDLL(str(library))
    return None


def _trial(device_type: str) -> str | None:
    """Let torch.compile compile a small function and its gradient, and run them; returns what is
    wrong with the result, or None. Raises what torch raises.

    What takes long in it, loading the compiler and finding out what the processor can do, training
    would have to do anyway."""
    x = torch.linspace(-1, 1, 64, device=device_type, requires_grad=True)
    torch.compile(_small_function, dynamic=False)(x).backward()
    if not torch.allclose(x.grad, 2 * x.detach().clamp_min(0), atol=1e-5):
        return "compiled code computes wrong numbers"
    return None


def _small_function(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square().sum()


def is_failure(error: BaseException) -> bool:
    """Whether torch.compile's back end raised this, or a compiler that it calls."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError)


def cause(error: BaseException) -> str:
    """What made a compilation fail, in a line."""
    # dynamo wraps what a back end raises, and keeps it here
    while inner := getattr(error, "inner_exception", None):
        error = inner
    if isinstance(error, subprocess.TimeoutExpired):
        return f"the compiler took more than {error.timeout:g} s"
    # inductor's exception for a failed compiler has its output, after a long command
    text = getattr(error, "output", None) or str(error)
    return telling_line(text) or in_a_line(error)


def _explained(reason: str) -> str:
    """The reason that a trial failed, or what is known to cause such failures, if it is the case
    here: a path with blanks, a mount that allows no code, or one without locks."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for path in (cache_dir(), tempfile.gettempdir(), os.path.dirname(torch.__file__)):
        if hardware.needs_quotes(path):
            return f"torch does not quote the blanks in {path}"
    if os.statvfs(cache_dir()).f_flag & os.ST_NOEXEC:
        return f"{cache_dir()} is mounted noexec"
    # its file system may be so full that nothing can be created to be locked
    with contextlib.suppress(OSError):
        if not locks.exist_in(cache_dir()):
            return f"{cache_dir()} has no file locks"
    return reason
