"""Whether torch.compile works here: with the tools of this machine, and with broken ones."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import hardware, locks, ranks
from nanochat.locks import Lock
from nanochat.run import compiler

GXX = shutil.which("g++")


# ---- the look at the tools


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A function that leaves only the named programs on PATH, with Python's headers in place."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.platform, "system", lambda: "Linux")
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})

    def install(*names):
        programs = tmp_path / "bin"
        shutil.rmtree(programs, ignore_errors=True)
        programs.mkdir()
        for name in names:
            (programs / name).write_text("#!/bin/sh\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))

    return install


def test_the_compiler_of_a_cpu(tools, monkeypatch, tmp_path):
    tools("g++")
    assert compiler.missing("cpu") is None
    # C alone is not enough, and inductor does not look for another C++ compiler
    tools("gcc", "clang++")
    assert compiler.missing("cpu") == "no C++ compiler (g++) on PATH"
    monkeypatch.setenv("CXX", "icpx")
    tools("g++")
    assert compiler.missing("cpu") == "no C++ compiler (icpx) on PATH"
    tools("icpx")
    assert compiler.missing("cpu") is None
    (tmp_path / "Python.h").unlink()
    assert compiler.missing("cpu") == "Python.h is missing (the python3-dev package)"
    monkeypatch.delenv("PATH")
    assert compiler.missing("cpu").startswith("PATH is not set")


def test_the_compiler_of_a_mac(tools, monkeypatch):
    monkeypatch.setattr(compiler.platform, "system", lambda: "Darwin")
    tools("g++")
    assert compiler.missing("cpu") == "no C++ compiler (clang++) on PATH"


def test_the_compiler_of_a_gpu(tools, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    tools("g++")
    assert compiler.missing("cuda") == "no C compiler (gcc) on PATH"
    for programs in (["gcc"], ["clang"]):
        tools(*programs)
        assert compiler.missing("cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert "SM61 is too old for triton" in compiler.missing("cuda")
    # None in sys.modules makes the import fail
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compiler.missing("cuda") == "triton is not installed (pip install triton)"


def test_nothing_is_compiled_on_mps():
    assert compiler.missing("mps") == "torch.compile is not reliable on mps"


# ---- the trial


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """A folder of compiled kernels of the test's own, and no trial that was made before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    compiler._problem.cache_clear()
    yield tmp_path / "kernels"
    compiler._problem.cache_clear()


def no_trial(device_type):
    raise AssertionError("the trial goes on after a failed probe")


BROKEN = {
    "no parts": (
        "echo \"g++: fatal error: cannot execute 'cc1plus': execvp: No such file\" >&2\nexit 1",
        "g++: fatal error: cannot execute 'cc1plus': execvp: No such file",
    ),
    "no headers": (
        "echo In file included from probe.cpp >&2\n"
        "echo 'probe.cpp:1:10: fatal error: math.h: No such file or directory' >&2\nexit 1",
        "probe.cpp:1:10: fatal error: math.h: No such file or directory",
    ),
    "silent": ("exit 3", "g++ ended with exit code 3"),
    # says that it works, and leaves no library
    "no library": ("exit 0", "probe.so: cannot open shared object file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_compiler(kernels, monkeypatch, tmp_path, case):
    script, reason = BROKEN[case]
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler, "_trial", no_trial)
    found = compiler.problem("cpu")
    assert reason in found and "\n" not in found
    assert list(kernels.iterdir()) == []  # nothing is left behind


@pytest.mark.skipif(GXX is None, reason="needs g++")
def test_disks_that_take_no_code(kernels, monkeypatch):
    """The known causes are named, not what they make a compiler say."""
    monkeypatch.setattr(compiler, "_trial", lambda device_type: "strange words")
    assert compiler.problem("cpu") == "strange words"
    compiler._problem.cache_clear()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert compiler.problem("cpu") == f"{kernels} is mounted noexec"
    compiler._problem.cache_clear()
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=0))
    monkeypatch.setattr(locks, "take", lambda file, folder: Lock.NONE)
    assert compiler.problem("cpu") == f"{kernels} has no file locks"
    compiler._problem.cache_clear()
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: "/t m p")
    assert compiler.problem("cpu") == "torch does not quote the blanks in /t m p"


def test_a_full_disk(kernels, monkeypatch):
    def full(device_type):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler, "_probe", full)
    monkeypatch.setattr(compiler, "missing", lambda device_type: None)
    assert "No space left on device" in compiler.problem("cpu")


def test_a_disk_with_too_little_space_for_kernels(kernels, monkeypatch):
    """The trial's own take less than those of training."""

    def refuse(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(compiler, "missing", lambda device_type: None)
    monkeypatch.setattr(compiler, "_trial", no_trial)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert "No space left on device" in compiler.problem("cpu")
    assert list(kernels.iterdir()) == []


class Wrapped(RuntimeError):
    """As dynamo wraps what a back end raised."""

    def __init__(self, inner):
        super().__init__("backend='inductor' raised:\n" + "a line of a traceback\n" * 100)
        self.inner_exception = inner


class CompilerFailed(RuntimeError):
    """As inductor reports a failed compiler."""

    def __init__(self, output):
        super().__init__("C++ compile error\nCommand:\ng++ " + "-flag " * 100)
        self.output = output


@pytest.mark.parametrize(
    "error, words",
    [
        (
            Wrapped(CompilerFailed("In function f:\nx.cpp:3: error: bad\nmore")),
            "x.cpp:3: error: bad",
        ),
        (
            Wrapped(Wrapped(PermissionError(13, "Permission denied", "/c"))),
            "Permission denied: '/c'",
        ),
        (CompilerFailed(b"ld: cannot find -lgomp\n"), "ld: cannot find -lgomp"),
        (AssertionError(), "AssertionError"),
        (ValueError("first\n\nsecond"), "first"),
        (subprocess.TimeoutExpired("g++", 120), "the compiler took more than 120 s"),
    ],
)
def test_the_cause_is_a_line(error, words):
    found = compiler.cause(error)
    assert words in found and "\n" not in found and len(found) <= 200


def test_all_ranks_decide_alike(monkeypatch):
    monkeypatch.setattr(compiler, "_problem", lambda device_type: None)
    for reasons, expected in (
        ([None, None], None),
        ([None, "no g++"], "rank 1: no g++"),
        (["no g++", "no g++"], "no g++"),
    ):
        monkeypatch.setattr(ranks, "from_all", lambda mine, reasons=reasons: reasons)
        assert compiler.problem("cpu") == expected


@pytest.mark.skipif(
    compiler.missing("cpu") is not None, reason="needs a C++ compiler and Python's headers"
)
def test_a_real_trial_changes_nothing():
    """Neither random numbers nor what is compiled already; a second call compiles nothing."""
    compiler._problem.cache_clear()
    before = torch.get_rng_state()
    assert compiler.problem("cpu") is None
    compiled = hardware.compilations()
    assert torch.equal(torch.get_rng_state(), before)
    assert compiler.problem("cpu") is None
    assert hardware.compilations() == compiled
