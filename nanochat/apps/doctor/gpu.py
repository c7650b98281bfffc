"""`nanochat doctor --gpu`: what a GPU makes of this program: kernels against references, speed,
memory, exact resume.

Each check (nanochat.apps.doctor.gpu_checks) is a process of its own with a time limit that prints
rows of the table as it finds them, so that one that breaks or takes too long costs nothing but
itself. The results are written after each check. A goal that is missed is shown as missed; only
what is wrong or breaks makes the exit code 1. TOY=1 in the environment runs every check but those
of kernels, fp8 and tiles on a CPU, tiny: a test of the checks, whose figures mean nothing. Imports
torch only when it starts, as a missing one is reported."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from nanochat.apps.doctor.gpu_table import GOALS, GpuMachine, Row, conclusions, is_toy
from nanochat.common import EXIT_COMPLETED, EXIT_FAILED, UsageError, write_json

# The source tree, from which the checks run: nothing has to be installed.
ROOT = Path(__file__).resolve().parents[3]
# Seconds that each may take, the most important first. Those named "dN-..." train that depth,
# "warm-N" compile what those will run, "attention-T" time all backends.
CHECKS = {
    "kernels": 240,
    "warm-12": 240,
    "warm-24": 200,
    "d12-bf16": 100,
    "d24-bf16": 160,
    "attention-2048": 90,
    "variants": 200,
    "resume": 200,
    "attention-512": 60,
    "d12-fp8": 90,
    "d24-fp8": 160,
    "d20-bf16": 120,
    "d20-fp8": 120,
    "loss": 60,
    "ranks": 100,
    "d12-triton": 60,
    "determinism": 140,
    "attention-8192": 90,
    "d24-rowwise": 90,
    "resume-fp8": 120,
    "tiles": 150,
}
# Side by side, as nothing in them is timed: the compiler takes most of it.
TOGETHER = ("kernels", "warm-12", "warm-24")
# Of the first one, which describes the machine; the start of CUDA is included.
MACHINE_SECONDS = 120
# A check takes at least this long to start and compile.
LEAST_SECONDS = 20


def groups(names: Sequence[str]) -> list[list[str]]:
    """The names in their order, those of TOGETHER first and in one list, the others in lists of
    one."""
    together = [name for name in names if name in TOGETHER]
    alone = [[name] for name in names if name not in TOGETHER]
    return [together, *alone] if together else alone


def unable(name: str, machine: GpuMachine, toy: bool) -> str | None:
    """Why a check cannot be made on a machine, or None."""
    if name == "kernels":
        return _first((toy, "they need a GPU"), (not machine.pytest, "pytest is not installed"))
    if name.endswith(("fp8", "rowwise")):
        return _first((toy, "fp8 needs a GPU"), (not machine.torchao, "torchao is not installed"))
    if name.startswith("warm") and toy:
        return "nothing is compiled"
    if name in ("tiles", "d12-triton"):
        no_triton = (not machine.triton, "triton is not installed")
        return _first((toy, "the kernel needs a GPU"), no_triton)
    if name == "ranks" and not toy and machine.gpus < 2:
        return "there is only one GPU"
    return None


def _first(*reasons: tuple[bool, str]) -> str | None:
    """The first reason that applies."""
    return next((reason for applies, reason in reasons if applies), None)


def rows_of_process(command: Sequence[str], seconds: float, cut_off: bool = False) -> list[Row]:
    """The rows that a process prints as lines of JSON, within a time limit; then the process and
    everything it started are killed.

    A process that fails or takes too long adds a wrong row. cut_off: the limit is shorter than the
    check may take, because --minutes ends, so reaching it is not wrong."""
    environment = os.environ | {
        # Deterministic products need it before CUDA is initialised.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        # as training has it
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    # Files, not pipes: a process that outlives its check may hold a pipe open for ever.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            # A group of its own, so that everything the check starts can be killed with it.
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also on Ctrl-C: what is left of a check would slow the next one.
            _kill(process, running=code is None)
        out.seek(0)
        errors.seek(0)
        rows = _rows_in(out.read())
        last_words = (errors.read().strip().splitlines() or ["no message"])[-1]
    if code is None and cut_off:
        rows.append(Row("time", None, note=f"cut off after {seconds:.0f} s, the end of --minutes"))
    elif code is None:
        rows.append(Row("time", None, note=f"stopped after {seconds:.0f} s", wrong=True))
    elif code:
        note = f"exit code {code}: {last_words[:300]}"
        rows.append(Row("process", None, note=note, wrong=True))
    return rows


def _kill(process: subprocess.Popen, running: bool) -> None:
    """End a process that leads a session, and all that it started in it."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if running:
            # torchrun's workers are in sessions of their own, so torchrun has to end them.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _rows_in(output: str) -> list[Row]:
    """The rows among the lines that a check printed."""
    rows = []
    for line in output.splitlines():
        # A line may be cut off, or belong to something else that prints.
        with contextlib.suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict) and "what" in content:
                rows.append(Row.from_json(content))
    return rows


def check_gpu(out: str, names: Sequence[str], minutes: float, toy: bool | None = None) -> int:
    """Run the named checks, print the table, write it to `out`. Returns 0, or 1 if a row is wrong.

    toy: None reads the environment. Raises UsageError for an unknown check, without a GPU or torch,
    or if `out` cannot be written."""
    toy = is_toy() if toy is None else toy
    path = Path(out)
    _check_request(path, names, toy)
    began = time.monotonic()
    command = [sys.executable, "-m", "nanochat.apps.doctor.gpu_checks"]
    # A process too: a parent that used the GPU would hold memory during all checks.
    rows = rows_of_process([*command, "machine"], MACHINE_SECONDS)
    _print_rows(rows, toy)
    described = bool(rows) and rows[0].facts is not None
    machine = GpuMachine.from_json(rows[0].facts) if described else None

    def rows_of(name: str) -> list[Row]:
        started = time.monotonic()
        left = 60 * minutes - (started - began)
        reason = unable(name, machine, toy)
        if reason is None and left < LEAST_SECONDS:
            reason = f"no time was left; --only={name}"
        if reason:
            new = [Row(name, None, note=f"not measured: {reason}")]
        else:
            limit = min(CHECKS[name], left)
            words = [name, f"--peak={rows[0].peak or 0}", f"--memory={machine.memory_bytes}"]
            new = rows_of_process([*command, *words], limit, cut_off=left < CHECKS[name])
        print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)
        _print_rows(new, toy)
        return [replace(row, check=name) for row in new]

    for group in groups(names) if machine else ():
        with ThreadPoolExecutor(len(group)) as pool:
            rows += [row for new in pool.map(rows_of, group) for row in new]
        # After each group, so that an interruption loses none of the results.
        write_json(path, [row.as_json() for row in rows])
    last = conclusions({row.what: row.value for row in rows}, toy)
    write_json(path, [row.as_json() for row in rows + last])
    print(f"\nall together, after {time.monotonic() - began:.0f} s; {path}")
    _print_rows(rows[1:] + last, toy)
    wrong = sum(row.wrong for row in rows)
    print(result_line(rows + last, wrong, toy))
    return EXIT_FAILED if wrong else EXIT_COMPLETED


def _check_request(path: Path, names: Sequence[str], toy: bool) -> None:
    """Raises UsageError as check_gpu() does; leaves an empty list of results."""
    if unknown := set(names) - set(CHECKS):
        raise UsageError(
            f"--only={','.join(sorted(unknown))}: no such check; choose from {', '.join(CHECKS)}"
        )
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"--gpu: torch cannot be imported ({error}); install it, or give runs/gpu_check.sh "
            f"another Python with PYTHON=..."
        ) from None
    if not toy and not torch.cuda.is_available():
        raise UsageError(
            f"--gpu: torch {torch.__version__} finds no GPU; run it on a machine with one (TOY=1 "
            f"tests the checks themselves on a CPU)"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [])
    except OSError as error:
        raise UsageError(
            f"--out={path}: cannot be written ({error.strerror}); name another file"
        ) from None


def _print_rows(rows: Sequence[Row], toy: bool) -> None:
    for row in rows:
        print(row.as_text(toy), flush=True)


def result_line(rows: Sequence[Row], wrong: int, toy: bool) -> str:
    """The last line: counts, and the figures that have goals or that runs are compared by."""
    words = ["RESULT"]
    if toy:
        words.append("toy=1")
    words += [f"rows={len(rows)}", f"wrong={wrong}"]
    for row in rows:
        shown = row.what in GOALS or row.what.endswith(("speed", "bits per byte"))
        if shown and row.value is not None:
            name = re.sub(r"\W+", "_", row.what)
            words.append(f"{name}={row.value:.5g}")
    return " ".join(words)
