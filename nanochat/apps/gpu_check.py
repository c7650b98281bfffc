"""What a GPU makes of this program: kernels against references, speed, memory, exact resume. Called by gpu_check.sh.

usage: python runs/gpu_check.py [--out=FILE.json] [--only=NAME,...] [--minutes=M]

Each check is a process of its own with a limit of time, and a line of its output is a row of the table, so that what breaks or takes
too long costs nothing but itself; what is found is written to FILE after each check. A goal that is missed is shown as missed; only what
is wrong or breaks makes the exit code 1. 2: wrong usage, or no GPU.
From the environment: TOY=1 (every check but kernels, fp8 and tiles on a CPU, tiny: a test of this script, whose figures mean nothing)."""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOY = os.environ.get("TOY") == "1"
BATCH = 2**19  # tokens a step that speeds of training are given for
ROWS = {
    12: 32,
    20: 16,
    24: 16,
}  # of 2,048 tokens at once on 75 GB, by depth; half as many where memory is half as large
MODEL = (
    [
        "--device-type=cpu",
        "--no-compile",
        "--aspect-ratio=16",
        "--head-dim=16",
        "--max-seq-len=32",
        "--vocab-size=300",
        "--repeats=1",
    ]
    if TOY
    else ["--device-type=cuda", "--max-seq-len=2048", "--vocab-size=32768", "--repeats=5"]
)
GOALS = {
    "d12 bf16 MFU": 50.0,
    "d24 bf16 MFU": 60.0,
    "d24 fp8 / bf16 speed": 1.25,
    "d12 optimizer share": 5.0,
    "plain PyTorch / triton, T = 512": 3.1,
    "best library / triton, T = 2048": 0.7,
    "full context / window, triton, T = 2048": 1.0,
    "full context / window, flex, T = 2048": 1.0,
}
AT_MOST = {"d12 optimizer share"}
# seconds that each may take, the most important first. Those named "dN-..." train that depth, "attention-T" time all backends.
CHECKS = {
    "kernels": 200,
    "d12-bf16": 100,
    "resume": 200,
    "attention-512": 60,
    "attention-2048": 90,
    "d12-fp8": 90,
    "d24-bf16": 100,
    "d24-fp8": 100,
    "d20-bf16": 90,
    "d20-fp8": 90,
    "loss": 60,
    "ranks": 100,
    "d12-triton": 60,
    "determinism": 90,
    "attention-8192": 90,
    "d24-rowwise": 90,
    "resume-fp8": 120,
    "tiles": 150,
}


def row(what, value, unit="", note="", wrong=False):
    """A line of the table. value: a number, or None where there is none and the note says why; wrong: it makes the exit code 1."""
    return {"what": what, "value": value, "unit": unit, "note": note, "wrong": wrong}


def attempt(name, function):
    """[row] of function(), a row or an iterable of rows; what it raises is a wrong row."""
    try:
        found = function()
        yield from [found] if isinstance(found, dict) else found
    except Exception as error:  # of whatever kind: the rows after this one are still of use
        yield row(
            name,
            None,
            note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            wrong=True,
        )


# ---- checks: each yields rows, in a process of its own ----


def check_machine():
    """What the GPU is, and what it reaches: matrix products and copies."""
    import torch

    from nanochat import hardware
    from nanochat.apps.bench import timed

    device = torch.device("cpu" if TOY else "cuda")
    facts = hardware.describe(device)
    facts |= {
        name: importlib.util.find_spec(name) is not None
        for name in ("triton", "torchao", "pytest", "xdist")
    }
    facts["gpus"] = torch.cuda.device_count()
    facts["memory_bytes"] = 0 if TOY else torch.cuda.get_device_properties(device).total_memory
    listed = None if TOY else hardware.listed_gpu(facts["gpu"])
    yield {
        **row("machine", None, note=", ".join(f"{name} {value}" for name, value in facts.items())),
        "facts": facts,
        "peak": listed and listed.peak_flops,
    }
    if problem := hardware.compiler_missing(device.type):
        yield row("compiler", None, note=f"nothing is compiled: {problem}", wrong=True)
    for dtype in (
        (torch.bfloat16, torch.float32) if TOY else (torch.bfloat16, torch.float16, torch.float32)
    ):
        size = 64 if TOY else 8192 if dtype.itemsize == 2 else 4096
        yield row(
            f"products in {str(dtype).removeprefix('torch.')}",
            hardware.matmul_flops(device, dtype, size, 5) / 1e12,
            "TFLOP/s",
            f"best of 5, n = {size}",
        )
    x = torch.zeros(2**20 if TOY else 2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield row(
        "copies",
        2 * x.numel() / statistics.median(timed(lambda: y.copy_(x), device, 5)) / 1e9,
        "GB/s",
        "reading and writing",
    )


def check_kernels():
    """The tests that need a GPU: three-way errors of all kernels, same bits, strides, compiled blocks, fp8."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *(f"tests/test_{name}.py" for name in ("kernels", "flash_attention", "fp8")),
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time is the compiler's
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        yield outcome(process.communicate(timeout=CHECKS["kernels"] - 25)[0])
        return
    process.send_signal(signal.SIGINT)  # it tells what has passed so far
    yield outcome(process.communicate()[0])
    yield row("tests of kernels", None, note="cut off: the last of them have not run")


def outcome(text):
    """The row of what pytest printed."""
    lines = text.strip().splitlines() or ["no output"]
    last = next(
        (
            line
            for line in reversed(lines)
            if re.search(r"\d+ (passed|failed|skipped|error|deselected)", line)
        ),
        lines[-1],
    )
    count = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return row(
        "tests of kernels passed",
        count.get("passed", 0),
        "",
        "; ".join([last, *failed[:5]]),
        wrong=bool(failed or count.get("failed") or count.get("error")) or not count.get("passed"),
    )


def check_training(depth, kind, peak, memory_bytes):
    """Speed and memory of training a depth with BATCH tokens a step. kind: bf16, fp8, rowwise, or triton (attention in bf16)."""
    import torch

    from nanochat import hardware
    from nanochat.apps import bench as benchmarks

    rows = ROWS[depth] if not TOY else 2
    while not TOY and rows > 1 and memory_bytes < 75e9 * rows / ROWS[depth]:
        rows //= 2
    flags = {
        "bf16": [],
        "fp8": ["--fp8"],
        "rowwise": ["--fp8", "--fp8-recipe=rowwise"],
        "triton": ["--attention=triton"],
    }[kind]
    args = benchmarks.parse_args(
        [
            *MODEL,
            "--only=step,optimizer",
            f"--depth={1 if TOY else depth}",
            f"--device-batch-size={rows}",
            *flags,
        ]
    )
    bench, settings = benchmarks.make_bench(args, print)
    if not settings["compiled"] and not TOY:
        yield row(f"d{depth} {kind}", None, note="not compiled", wrong=True)
    # as all micro-batches but the first: their gradients are added to what is there
    micro = bench._timed(lambda: bench._loss().backward())
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    bench._step()
    bench._loss().backward()  # with gradients there
    memory = hardware.peak_memory_bytes(bench.device)
    of_optimizer = bench.part_optimizer()  # from here on it holds gradients of its own
    update = next(of_optimizer)
    micro_seconds, update_seconds = (
        statistics.median(micro["seconds"]),
        statistics.median(update["seconds"]),
    )
    n = max(1, BATCH // bench.tokens)
    seconds = n * micro_seconds + update_seconds
    speed = n * bench.tokens / seconds
    yield row(
        f"d{depth} {kind} speed",
        speed,
        "tokens/s",
        f"{rows} rows of {args.max_seq_len} at once, {settings['attention']} attention; "
        f"{n} times {1000 * micro_seconds:.1f} ms ({1000 * min(micro['seconds']):.1f} to {1000 * max(micro['seconds']):.1f}, n = "
        f"{len(micro['seconds'])})",
    )
    yield row(
        f"d{depth} {kind} MFU",
        100 * speed * bench.flops_per_token / (peak or bench.peak),
        "%",
        f"of the {'listed dense bf16' if peak else 'measured'} peak, {(peak or bench.peak) / 1e12:.4g} TFLOP/s",
    )
    yield row(f"d{depth} {kind} memory", memory / 2**30, "GiB", "at most, all together")

    def share(entry):
        took = statistics.median(entry["seconds"])
        return row(
            f"d{depth} {entry['name']} share",
            100 * took / (seconds - update_seconds + took),
            "%",
            f"of the step; "
            f"{1000 * took:.2f} ms, {entry['flops'] / took / 1e12:.0f} TFLOP/s of its products",
        )

    if kind == "bf16":
        yield share(update)
        yield from attempt(f"d{depth} optimizer, other kernel", lambda: map(share, of_optimizer))


def check_attention(T):
    """Every backend over 32,768 tokens, six heads of 128 channels, forward and backward, with a short window and with full context."""
    import torch

    from nanochat.apps import bench as benchmarks
    from nanochat.model import attention

    length, short = (32, 16) if TOY else (T, T // 2)
    args = benchmarks.parse_args(
        [
            *MODEL,
            "--only=attention",
            f"--max-seq-len={length}",
            f"--short-window={short}",
            "--window-pattern=SL",
            f"--depth={2 if TOY else 12}",
            f"--device-batch-size={1 if TOY else 32768 // T}",
        ]
    )
    bench, _ = benchmarks.make_bench(args, print)

    def sdpa_by(which, q, k, v, window):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend[which]):
            return attention.attention(q, k, v, window, "sdpa")

    def entry(name, window, function):
        found = bench.attention_entry(name, window, function)
        return milliseconds(
            f"{found['name']}, T = {T}", found, "the window counted for every token"
        )

    for window in bench.windows():
        for name, function in bench.attention_ways().items():
            yield from attempt(name, functools.partial(entry, name, window, function))
        if (
            window == length and not TOY
        ):  # what deterministic algorithms, which are on above, keep away
            torch.use_deterministic_algorithms(False)
            for which in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
                name = f"attention sdpa_{which.split('_')[0].lower()}, not deterministic"
                yield from attempt(
                    name, functools.partial(entry, name, window, functools.partial(sdpa_by, which))
                )
            torch.use_deterministic_algorithms(True)


def milliseconds(what, entry, note):
    """The row of an entry of the bench."""
    seconds = statistics.median(entry["seconds"])
    speed, memory = entry["flops"] / seconds / 1e12, (entry["memory"] or 0) / 2**20
    return row(what, 1000 * seconds, "ms", f"{speed:.1f} TFLOP/s, {memory:.0f} MiB; {note}")


def check_loss():
    """Time and memory of the head's loss with its gradients, by backend and size of chunks, and as plain PyTorch."""
    from nanochat.apps import bench as benchmarks
    from nanochat.model import loss

    args = benchmarks.parse_args(
        [
            *MODEL,
            "--only=loss",
            *(
                ["--depth=1", "--device-batch-size=2"]
                if TOY
                else ["--depth=12", "--device-batch-size=16"]
            ),
        ]
    )
    bench, _ = benchmarks.make_bench(args, print)

    def entry(name, backend):
        return milliseconds(name, bench.loss_entry(name, backend), "memory beyond the gradients")

    yield from attempt("loss, plain PyTorch", lambda: entry("loss, plain PyTorch", None))
    for chunk in (2**12,) if TOY else (2**24, 2**26, 2**28, 2**30):
        loss.CHUNK_LOGITS = {"cpu": chunk, "cuda": chunk}
        for backend in loss.BACKENDS[:1] if TOY else loss.BACKENDS:
            name = f"loss {backend}, chunks of 2^{chunk.bit_length() - 1}"
            yield from attempt(name, functools.partial(entry, name, backend))


def check_determinism():
    """What deterministic algorithms, which are always on, cost a training step."""
    import torch

    from nanochat.apps import bench as benchmarks

    args = benchmarks.parse_args(
        [
            *MODEL,
            "--only=step",
            "--depth=1" if TOY else "--depth=12",
            f"--device-batch-size={2 if TOY else 16}",
        ]
    )
    bench, _ = benchmarks.make_bench(args, print)
    seconds = {}
    for on in (True, False):
        torch.use_deterministic_algorithms(on)  # what is compiled for the other is compiled again
        (entry,) = bench.part_step()
        seconds[on] = 1000 * statistics.median(entry["seconds"])
    yield row(
        "deterministic algorithms",
        100 * (seconds[True] / seconds[False] - 1),
        "%",
        f"longer step at d12, n = "
        f"{len(entry['seconds'])}: {seconds[True]:.1f} ms against {seconds[False]:.1f} ms",
    )


TRAINING = [
    "--data=python",
    "--tokenizer=byte",
    "--sample-every=-1",
    "--core-metric-every=-1",
    "--seed=1",
] + (
    [
        "--device-type=cpu",
        "--no-compile",
        "--dtype=float32",
        "--depth=1",
        "--aspect-ratio=16",
        "--head-dim=16",
        "--max-seq-len=32",
        "--total-batch-size=64",
        "--num-iterations=8",
        "--save-every=4",
        "--eval-every=4",
        "--eval-tokens=1000",
    ]
    if TOY
    else [
        "--device-type=cuda",
        "--depth=8",
        "--max-seq-len=1024",
        "--total-batch-size=131072",
        "--num-iterations=300",
        "--save-every=150",
        "--eval-every=150",
        "--eval-tokens=1000000",
    ]
)


IN_FP8 = ["--fp8", "--depth=16", "--num-iterations=40", "--save-every=20", "--eval-every=20"]


def train(folder, *flags, ranks=1):
    """train.py in a process of its own (or ranks under torchrun), with TRAINING; a failure raises RuntimeError with its last words."""
    start = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else [sys.executable]
    )
    done = subprocess.run(
        [*start, str(ROOT / "train.py"), *TRAINING, f"--out-dir={folder}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"train.py ended with {done.returncode}: "
            + " ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        )


def losses(path):
    """{step: training loss} of a run folder."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def check_resume(*flags):
    """A real training to bits per byte, and its second half again from the checkpoint: the same losses and weights with ==."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        train(folder, "--model-tag=whole", *flags)
        summary = json.loads((whole / "summary.json").read_text())
        last, half = summary["step"], summary["step"] // 2
        in_fp8 = " in fp8" if "--fp8" in flags else ""
        yield row(
            f"real training{in_fp8}, bits per byte",
            summary["val_bpb"],
            "",
            f"{summary['tokens']:,} bytes of source code, "
            f"{summary['total_training_time']:.0f} s, {summary['tok_per_sec']:,.0f} tokens/s, MFU {summary['mfu']:.1f}%",
            wrong=not summary["val_bpb"] or not TOY and summary["val_bpb"] > (4 if flags else 2),
        )
        shutil.copytree(whole, again, symlinks=True)
        for checkpoint in (again / "checkpoints").glob(
            "step_*"
        ):  # nothing of the second half is left but its lines, which resuming cuts
            if int(checkpoint.name.removeprefix("step_")) > half:
                shutil.rmtree(checkpoint)
        train(folder, "--model-tag=again", "--resume", *flags)
        name = f"checkpoints/step_{last:06d}/model.safetensors"
        found = same_again(
            losses(whole), losses(again), load_file(whole / name), load_file(again / name), half
        )
        yield {**found, "what": found["what"] + in_fp8}


def same_again(whole, again, weights, weights_again, half):
    """The row of a run against the same resumed at step `half`: losses by step, tensors by name."""
    steps = [step for step in whole if step >= half]
    same = sum(whole[step] == again.get(step) for step in steps)
    equal = sum(bool((weights[name] == weights_again[name]).all()) for name in weights)
    return row(
        "resumed, losses equal with ==",
        same,
        f"of {len(steps)}",
        f"from step {half}; weights: {equal} of {len(weights)} tensors equal",
        wrong=same < len(steps) or equal < len(weights),
    )


def check_ranks():
    """Two ranks against one: losses of fp32 steps with the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--no-save",
            "--eval-every=-1",
            "--save-every=-1",
            "--dtype=float32",
            "--no-compile",
        ]
        flags.append(f"--num-iterations={8 if TOY else 50}")
        for ranks in (1, 2):
            train(folder, f"--model-tag=on{ranks}", *flags, ranks=ranks)
        one, two = losses(Path(folder) / "on1"), losses(Path(folder) / "on2")
        difference = max(abs(one[step] - two[step]) for step in one)
        yield row(
            "two ranks, largest difference of losses",
            difference,
            "nats",
            f"{len(one)} steps in fp32",
            wrong=difference > 1e-3,
        )


def check_tiles():
    """The tiles of the attention kernel that are in use and the fastest of those that could be, as far as the time reaches."""
    import torch

    from nanochat.apps.bench import timed
    from nanochat.model.kernels import flash_attention as flash

    capability = torch.cuda.get_device_capability()
    for D, T, window in ((128, 2048, 2048), (128, 2048, 1024), (64, 2048, 2048)):
        generator = torch.Generator().manual_seed(1)
        q, k, v, g = (
            torch.randn(16, T, 768 // D, D, generator=generator).to("cuda", torch.bfloat16)
            for _ in range(4)
        )
        out, lse = flash.forward(q, k, v, window)
        for which in flash.PASSES:
            best = used = None
            for tile in flash.candidates(which, D, 2, capability):
                if which == "forward":
                    run = functools.partial(flash.forward, q, k, v, window, tile)
                else:
                    choice = {
                        "tile_of_keys" if which == "backward of keys" else "tile_of_queries": tile
                    }
                    run = functools.partial(flash.backward, g, q, k, v, out, lse, window, **choice)
                try:
                    seconds = statistics.median(timed(run, q.device, 9))
                except Exception:  # does not compile, or does not fit: no choice
                    continue
                used = used or seconds
                if (
                    best is None or seconds < best
                ):  # a row for each that is better, since the time may end
                    best = seconds
                    yield row(
                        f"tiles: {which}, D = {D}, window {window}",
                        1000 * seconds,
                        "ms",
                        f"{tuple(tile)}, "
                        f"{used / seconds:.2f} times as fast as the one in use"
                        + (" (both backward passes)" * (which != "forward")),
                    )


def rows_of(name, peak, memory_bytes):
    """The rows of a check, as they are found."""
    if match := re.fullmatch(r"d(\d+)-(\w+)", name):
        return check_training(int(match[1]), match[2], peak, memory_bytes)
    if match := re.fullmatch(r"attention-(\d+)", name):
        return check_attention(int(match[1]))
    return {
        "machine": check_machine,
        "kernels": check_kernels,
        "loss": check_loss,
        "determinism": check_determinism,
        "resume": check_resume,
        "resume-fp8": functools.partial(check_resume, *IN_FP8),
        "ranks": check_ranks,
        "tiles": check_tiles,
    }[name]()


# ---- all of them ----


def missing(name, facts):
    """Why a check cannot be made on the machine that check_machine() described, or None."""
    if name == "kernels" and (TOY or not facts["pytest"]):
        return "they need a GPU" if TOY else "the package pytest is missing"
    if name.endswith(("fp8", "rowwise")) and (TOY or not facts["torchao"]):
        return "fp8 needs a GPU" if TOY else "the package torchao is missing"
    if name in ("tiles", "d12-triton") and (TOY or not facts["triton"]):
        return "the kernel needs a GPU" if TOY else "the package triton is missing"
    return "there is one GPU" if name == "ranks" and facts["gpus"] < 2 and not TOY else None


def run(command, seconds, cut_off=False):
    """The rows that a process prints as lines of JSON, in at most so many seconds; then it and all that it started are killed.

    What breaks is a wrong row, and so is what takes too long, but for cut_off: it had less time than it may take."""
    environment = os.environ | {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also on Ctrl-C: what is left of a check would slow the next
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if code is None:
                    os.killpg(
                        process.pid, signal.SIGTERM
                    )  # torchrun's workers are in groups of their own: it has to end them
                    process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        errors.seek(0)
        rows, last = [], (errors.read().strip().splitlines() or ["no message"])[-1]
        for line in out.read().splitlines():
            with contextlib.suppress(ValueError):  # a line that is cut off
                rows += (
                    [found]
                    if isinstance(found := json.loads(line), dict) and "what" in found
                    else []
                )
    for entry in rows:
        if entry["value"] is not None and not math.isfinite(entry["value"]):
            entry |= {"value": None, "wrong": True, "note": f"{entry['value']}; {entry['note']}"}
    if code is None:
        rows.append(
            row(
                "time",
                None,
                note=f"cut off after {seconds:.0f} s, the end of --minutes"
                if cut_off
                else f"stopped after {seconds:.0f} s",
                wrong=not cut_off,
            )
        )
    elif code:
        rows.append(row("process", None, note=f"exit code {code}: {last[:300]}", wrong=True))
    return rows


def conclusions(found):
    """Rows that follow from others. found: {what: value}."""

    def ratio(name, of, to):
        return [row(name, of / to, "times")] if of and to else []

    out = [
        entry
        for depth in ROWS
        for kind in ("fp8", "rowwise", "triton")
        for entry in ratio(
            f"d{depth} {kind} / bf16 speed",
            found.get(f"d{depth} {kind} speed"),
            found.get(f"d{depth} bf16 speed"),
        )
    ]
    times = {}  # {T: {window: {way: milliseconds}}}
    for name, value in found.items():
        if value and (match := re.fullmatch(r"attention,? (.+), window (\d+), T = (\d+)", name)):
            times.setdefault(int(match[3]), {}).setdefault(int(match[2]), {})[match[1]] = value
    for T, by_window in sorted(times.items()):
        full, short = by_window.get(32 if TOY else T, {}), by_window[min(by_window)]
        out += ratio(
            f"plain PyTorch / triton, T = {T}", full.get("plain PyTorch"), full.get("triton")
        )
        libraries = [
            value
            for way, value in full.items()
            if way not in ("triton", "plain PyTorch", "blocked")
        ]
        out += ratio(
            f"best library / triton, T = {T}", min(libraries, default=None), full.get("triton")
        )
        if len(by_window) > 1:
            out += [
                entry
                for way in full
                for entry in ratio(
                    f"full context / window, {way}, T = {T}", full[way], short.get(way)
                )
            ]
    return out


def shown(entry):
    """A row as a line of the table."""
    goal = None if TOY else GOALS.get(entry["what"])
    text = f"{entry['what']:<52} " + (
        "" if entry["value"] is None else f"{entry['value']:>10,.4g} {entry['unit']}"
    ).ljust(20)
    if goal is not None and entry["value"] is not None:
        met = entry["value"] <= goal if entry["what"] in AT_MOST else entry["value"] >= goal
        text += f" [goal {goal:g}: {'met' if met else 'MISSED'}]"
    return f"{text} {'WRONG: ' if entry['wrong'] else ''}{entry['note']}".rstrip()


def main(argv):
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        allow_abbrev=False,
        description="Check this program on a GPU, and measure it.",
    )
    parser.add_argument(
        "--out",
        default="out/gpu_check.json",
        metavar="FILE",
        help="where the results go as JSON (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        default="",
        help=f"some of the checks, separated by commas: {', '.join(CHECKS)}; empty: all",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9.5,
        help="what would take longer is cut off or left out (default: %(default)s)",
    )
    parser.add_argument("--check", default="", help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--peak", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--memory", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.check:
        own, sys.stdout = sys.stdout, sys.stderr
        for entry in attempt(args.check, lambda: rows_of(args.check, args.peak, args.memory)):
            print(json.dumps(entry), file=own, flush=True)
        return 0
    wanted, out = list(filter(None, args.only.split(","))) or list(CHECKS), Path(args.out)
    try:
        import torch

        from nanochat.common import write_json

        if unknown := set(wanted) - set(CHECKS):
            raise ValueError(
                f"--only={','.join(sorted(unknown))}: no such check; there are {', '.join(CHECKS)}"
            )
        if not TOY and not torch.cuda.is_available():
            raise ValueError(
                f"torch {torch.__version__} finds no GPU; TOY=1 tries the script on a CPU"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, [])
    except (ImportError, ValueError, OSError) as error:
        print(
            f"gpu_check.sh: error: {error}"
            + (
                ""
                if isinstance(error, ValueError)
                else "; give another --out, or another PYTHON=..."
            ),
            file=sys.stderr,
        )
        return 2
    began, this = time.monotonic(), [sys.executable, __file__]
    rows = run([*this, "--check=machine"], 120)
    print(*map(shown, rows), sep="\n", flush=True)
    facts, peak = rows[0].get("facts"), rows[0].get("peak") or 0
    for name in wanted if facts else ():
        left, started = 60 * args.minutes - (time.monotonic() - began), time.monotonic()
        if reason := missing(name, facts) or (left < 20 and f"no time was left; --only={name}"):
            new = [row(name, None, note=f"not measured: {reason}")]
        else:
            new = run(
                [*this, f"--check={name}", f"--peak={peak}", f"--memory={facts['memory_bytes']}"],
                min(CHECKS[name], left),
                cut_off=left < CHECKS[name],
            )
        rows += [{**entry, "check": name} for entry in new]
        print(
            f"-- {name}: {time.monotonic() - started:.0f} s", *map(shown, new), sep="\n", flush=True
        )
        write_json(out, rows)
    last = conclusions({entry["what"]: entry["value"] for entry in rows})
    write_json(out, rows + last)
    wrong = [entry["what"] for entry in rows if entry["wrong"]]
    print(
        "",
        f"all together, after {time.monotonic() - began:.0f} s; {out}",
        *map(shown, rows[1:] + last),
        sep="\n",
    )
    figures = {
        re.sub(r"\W+", "_", entry["what"]): f"{entry['value']:.5g}"
        for entry in rows + last
        if entry["value"] is not None
        and (entry["what"] in GOALS or entry["what"].endswith(("speed", "bits per byte")))
    }
    print(
        "RESULT",
        *["toy=1"] * TOY,
        f"rows={len(rows + last)}",
        f"wrong={len(wrong)}",
        *(f"{name}={value}" for name, value in figures.items()),
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
