"""What a GPU makes of this program: kernels against references, speed, memory, exact resume. Called by gpu_check.sh.

usage: python runs/gpu_check.py [--out=FILE.json] [--only=NAME,...] [--minutes=M]

Each check is a process of its own with a limit of time, so that none can spoil another; what is found is written to FILE after each.
A goal that is missed is shown as missed; only what is wrong or breaks makes the exit code 1. 2: wrong usage, or no GPU.
From the environment: TOY=1 (every check on a CPU, as small as can be: for tests of this script; speeds mean nothing)."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOY = os.environ.get("TOY") == "1"
BATCH = 2**19  # tokens a step that speeds of training are given for
# rows of 2,048 tokens at once on 80 GB, by depth; half as many where memory is half as large
ROWS = {12: 32, 20: 16, 24: 8}
MODEL = ["--device-type=cpu", "--no-compile", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32", "--vocab-size=300",
         "--repeats=1"] if TOY else ["--device-type=cuda", "--max-seq-len=2048", "--vocab-size=32768", "--repeats=5"]
GOALS = {"d12 bf16 MFU": 50.0, "d24 bf16 MFU": 60.0, "d24 fp8 / bf16": 1.25, "d12 optimizer share": 5.0,
         "triton / plain PyTorch, T = 512": 3.1, "triton / best library, T = 2048": 0.7}
AT_MOST = {"d12 optimizer share"}


class Check(NamedTuple):
    """A process: seconds that it may take, its command, and read(its standard output) -> [row]."""
    name: str
    seconds: int
    command: list
    read: callable


def row(what, value, unit="", note="", wrong=False):
    """A line of the table. value: a number, or None where there is none and the note says why; wrong: it makes the exit code 1."""
    return {"what": what, "value": value, "unit": unit, "note": note, "wrong": wrong}


# ---- checks that are commands of this program ----

def bench(name, seconds, read, *flags):
    return Check(name, seconds, [sys.executable, "-m", "nanochat", "bench", "--json", *MODEL, *flags], lambda text: read(json.loads(text)))


def training(depth, kind, peak, memory_bytes, *flags):
    """Speed and memory of training a depth with BATCH tokens a step, from a step of one micro-batch and its optimizer."""
    rows = ROWS[depth] if not TOY else 2
    while not TOY and rows > 1 and memory_bytes < 75e9 * rows / ROWS[depth]:
        rows //= 2

    def read(found):
        table, label = {entry["name"]: entry for entry in found["results"]}, f"d{depth} {kind}"
        tokens = rows * found["settings"]["max_seq_len"]
        optimizer = table["optimizer"]["seconds"]
        seconds = max(1, BATCH // tokens) * (table["step"]["seconds"] - optimizer) + optimizer
        speed = max(BATCH, tokens) / seconds
        out = [row(f"{label} speed", speed, "tokens/s", f"{rows} rows at once, {found['settings']['attention']} attention, n = "
                   f"{table['step']['n']}"),
               row(f"{label} MFU", 100 * speed * found["flops_per_token"] / (peak or found["peak_flops"]), "%"),
               row(f"{label} memory", table["step"]["peak_memory_bytes"] / 2**30, "GiB", "of a step, beyond weights and their states")]
        if kind == "bf16":
            out += [row(f"d{depth} {name}" + (" share" if name == "optimizer" else ""), 100 * entry["seconds"] / seconds, "%",
                        f"of a step of {BATCH:,} tokens; {1000 * entry['seconds']:.2f} ms")
                    for name, entry in table.items() if name.startswith("optimizer")]
        return out
    depth_flags = [f"--depth={1 if TOY else depth}", f"--device-batch-size={rows}"]
    return bench(f"d{depth}-{kind}", 100, read, "--only=step,optimizer", *depth_flags, *flags)


def attention(T, short_window):
    """Every backend forward and backward over 32,768 tokens, six heads of 128 channels, with a short window and with full context."""
    def read(found):
        return [row(f"{entry['name']}, T = {T}", 1000 * entry["seconds"], "ms", f"{entry['flops_per_sec'] / 1e12:.1f} TFLOP/s of what is "
                    f"visible to the window; {(entry['peak_memory_bytes'] or 0) / 2**20:.0f} MiB") for entry in found["results"]]
    length = 32 if TOY else T
    return bench(f"attention-{T}", 100, read, "--only=attention", f"--max-seq-len={length}", f"--short-window={short_window * length // T}",
                 f"--depth={1 if TOY else 12}", f"--device-batch-size={1 if TOY else 32768 // T}", "--window-pattern=SL")


def kernel_tests():
    """The tests that need a GPU: three-way errors of all kernels, bits, strides, compiled blocks, fp8."""
    def read(text):
        words = text.strip().splitlines()[-1]
        count = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error|deselected)", words)}
        wrong = bool(count.get("failed") or count.get("error")) or not TOY and not count.get("passed")
        failed = re.findall(r"^FAILED (\S+)", text, re.MULTILINE)
        return [row("kernels: tests passed", count.get("passed", 0), "", "; ".join([words, *failed[:5]]), wrong)]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
               *(f"tests/test_{name}.py" for name in ("kernels", "flash_attention", "fp8"))]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time is the compiler's
    return Check("kernels", 180, command + (["--collect-only"] if TOY else []), read)


# ---- checks that are functions below, each in a process of its own ----

def own(name, seconds):
    return Check(name, seconds, [sys.executable, __file__, "--part", name], json.loads)


def part_machine():
    """What the GPU is, and what it reaches: matrix products and copies."""
    import torch

    from nanochat import hardware
    device = torch.device("cpu" if TOY else "cuda")
    if TOY:
        hardware.PEAK_SIZES = (64,)
    facts = hardware.describe(device)
    for name in ("triton", "torchao", "flash_attn_interface"):
        facts[name] = importlib.util.find_spec(name) is not None
    facts["gpus"] = torch.cuda.device_count()
    facts["memory_bytes"] = 0 if TOY else torch.cuda.get_device_properties(device).total_memory
    listed = None if TOY else hardware.listed_gpu(facts["gpu"])
    yield {**row("machine", None, note=json.dumps(facts)), "facts": facts, "peak": listed and listed.peak_flops}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if not (TOY and dtype == torch.float16):
            size = 64 if TOY else 8192 if dtype.itemsize == 2 else 4096
            yield row(f"products in {str(dtype).removeprefix('torch.')}", hardware.matmul_flops(device, dtype, size, 5) / 1e12, "TFLOP/s",
                      f"best of 5, n = {size}")
    x = torch.zeros(2**20 if TOY else 2**30, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    yield row("copies", 2 * x.numel() / timed(lambda: y.copy_(x), device)[0] / 1e9, "GB/s", "reading and writing")


def timed(function, device, repeats=5):
    """(median seconds of so many calls, all of them) after one that warms up."""
    from nanochat import hardware
    seconds = []
    for _ in range(repeats + 1):
        hardware.synchronize(device.type)
        started = time.perf_counter()
        function()
        hardware.synchronize(device.type)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), seconds[1:]


def part_loss():
    """Time and memory of the head's loss by backend and size of its chunks, with its gradients."""
    import torch

    from nanochat import hardware, loss
    device = torch.device("cpu" if TOY else "cuda")
    hardware.prepare(device.type)
    N, C, V = (64, 16, 300) if TOY else (32768, 768, 32768)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, C, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * C**-0.5).to(device).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator).to(device)
    for chunk in (2**12,) if TOY else (2**24, 2**26, 2**28, 2**30):
        for backend in ("plain", *(() if TOY else ("compiled", "triton"))):
            loss.CHUNK_LOGITS = {"cpu": chunk, "cuda": chunk}

            def both(backend=backend):
                hidden.grad = weight.grad = None
                loss.linear_cross_entropy(hidden, weight, targets, 15.0, backend=backend).backward()
            seconds, _ = timed(both, device)
            memory = hardware.allocated_peak(both, device)
            yield row(f"loss {backend}, chunks of 2^{chunk.bit_length() - 1}", 1000 * seconds, "ms",
                      f"{N:,} tokens x {C} -> {V:,}, forward and backward; {memory / 2**20:.0f} MiB")


def part_determinism():
    """What deterministic algorithms, which are always on, cost a training step."""
    import torch

    from nanochat import bench as benchmarks
    flags = [*MODEL, "--only=step", "--depth=1" if TOY else "--depth=12", f"--device-batch-size={2 if TOY else 16}"]
    bench, _ = benchmarks.make_bench(benchmarks.parse_args(flags), print)
    seconds = {}
    for on in (True, False):
        torch.use_deterministic_algorithms(on)  # what is compiled for the other is compiled again
        entry, = bench.part_step()
        seconds[on] = 1000 * statistics.median(entry["seconds"])
    yield row("deterministic algorithms", 100 * (seconds[True] / seconds[False] - 1), "%", f"longer step at d12, n = "
              f"{len(entry['seconds'])}: {seconds[True]:.1f} ms against {seconds[False]:.1f} ms")


TRAINING = ["--data=python", "--tokenizer=byte", "--sample-every=-1", "--core-metric-every=-1", "--seed=1"] + (
    ["--device-type=cpu", "--no-compile", "--dtype=float32", "--depth=1", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32",
     "--total-batch-size=64", "--num-iterations=8", "--save-every=4", "--eval-every=4", "--eval-tokens=1000"] if TOY else
    ["--device-type=cuda", "--depth=8", "--max-seq-len=1024", "--total-batch-size=131072", "--num-iterations=300", "--save-every=150",
     "--eval-every=150", "--eval-tokens=1000000"])


def train(folder, *flags, ranks=1):
    """train.py in a process of its own (or ranks under torchrun), with TRAINING; a failure raises RuntimeError with its last words."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
    done = subprocess.run([*start, str(ROOT / "train.py"), *TRAINING, f"--out-dir={folder}", *flags], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(f"train.py ended with {done.returncode}: " + " ".join((done.stdout + done.stderr).strip().splitlines()[-3:]))


def losses(path):
    """{step: training loss} of a run folder."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def part_resume():
    """A real training to bits per byte, and its second half again from the checkpoint: the same losses and weights with ==."""
    from safetensors.torch import load_file
    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        train(folder, "--model-tag=whole")
        summary = json.loads((whole / "summary.json").read_text())
        last = summary["step"]
        yield row("real training, bits per byte", summary["val_bpb"], "", f"{summary['tokens']:,} bytes of source code, "
                  f"{summary['total_training_time']:.0f} s, {summary['tok_per_sec']:,.0f} tokens/s, MFU {summary['mfu']:.1f}%",
                  wrong=not summary["val_bpb"] or not TOY and summary["val_bpb"] > 2)
        shutil.copytree(whole, again, symlinks=True)
        train(folder, "--model-tag=again", f"--resume-from-step={last // 2}", "--overwrite")
        of_whole, of_again = losses(whole), losses(again)
        same = sum(of_whole[step] == of_again.get(step) for step in of_whole)
        name = f"checkpoints/step_{last:06d}/model.safetensors"
        one, other = load_file(whole / name), load_file(again / name)
        equal = sum(bool((one[tensor] == other[tensor]).all()) for tensor in one)
        yield row("resumed, losses equal with ==", same, f"of {len(of_whole)}", f"from step {last // 2}; weights: {equal} of {len(one)} "
                  f"tensors equal", wrong=same < len(of_whole) or equal < len(one))


def part_ranks():
    """Two ranks against one: losses of fp32 steps with the same batches."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--no-save", "--eval-every=-1", "--save-every=-1", "--dtype=float32", "--no-compile"]
        for ranks in (1, 2):
            train(folder, f"--model-tag=on{ranks}", *flags, "--num-iterations=8" if TOY else "--num-iterations=50", ranks=ranks)
        one, two = losses(Path(folder) / "on1"), losses(Path(folder) / "on2")
        difference = max(abs(one[step] - two[step]) for step in one)
        yield row("two ranks, largest difference of losses", difference, "nats", f"{len(one)} steps in fp32", wrong=difference > 1e-3)


def part_tiles():
    """The tiles of the attention kernel that are in use and the fastest of those that could be, as far as the time reaches."""
    import torch

    from nanochat.kernels import flash_attention as flash
    deadline = time.monotonic() + float(os.environ.get("SECONDS_LEFT", "120")) - 15
    capability = torch.cuda.get_device_capability()
    for D, T, window in ((128, 2048, 2048), (64, 2048, 2048), (128, 2048, 512)):
        generator = torch.Generator().manual_seed(1)
        q, k, v, g = (torch.randn(16, T, 768 // D, D, generator=generator).to("cuda", torch.bfloat16) for _ in range(4))
        out, lse = flash.forward(q, k, v, window)
        for which in flash.PASSES:
            found = []
            for tile in flash.candidates(which, D, 2, capability):
                if found and time.monotonic() > deadline:
                    break
                choice = {"tile_of_keys" if which == "backward of keys" else "tile_of_queries": tile}
                run = (lambda tile=tile: flash.forward(q, k, v, window, tile)) if which == "forward" else (
                    lambda choice=choice: flash.backward(g, q, k, v, out, lse, window, **choice))
                try:
                    found.append((timed(run, q.device, 9)[0], str(tuple(tile))))
                except Exception as error:  # one that does not compile or does not fit is no choice
                    found.append((float("inf"), f"{tuple(tile)}: {type(error).__name__}"))
            best, tile = min(found, key=lambda entry: entry[0])
            yield row(f"tiles: {which}, D = {D}, window {window}", 1000 * found[0][0], "ms", f"in use: {found[0][1]}; fastest of "
                      f"{len(found)}: {tile}, {1000 * best:.3f} ms" + ("" if which == "forward" else ", both backward passes"))


PARTS = {"machine": part_machine, "loss": part_loss, "determinism": part_determinism, "resume": part_resume, "ranks": part_ranks,
         "tiles": part_tiles}


# ---- all of them ----

def all_checks(facts, peak):
    """What is to be checked on the machine that part_machine() described, the most important first."""
    memory, no_fp8 = facts["memory_bytes"], not facts["torchao"] or TOY
    checks = [kernel_tests(), training(12, "bf16", peak, memory), own("resume", 240)]
    if not no_fp8:
        checks.append(training(12, "fp8", peak, memory, "--fp8"))
    checks += [attention(512, 256), attention(2048, 1024), own("loss", 100), training(24, "bf16", peak, memory)]
    if not no_fp8:
        checks.append(training(24, "fp8", peak, memory, "--fp8"))
    checks += [training(12, "triton", peak, memory, "--attention=triton")] if facts["triton"] and not TOY else []
    checks += [own("ranks", 120)] if facts["gpus"] > 1 or TOY else []
    checks += [training(20, "bf16", peak, memory), attention(8192, 1024), own("determinism", 100)]
    if not no_fp8:
        checks += [training(20, "fp8", peak, memory, "--fp8"), training(24, "rowwise", peak, memory, "--fp8", "--fp8-recipe=rowwise")]
    return checks + ([own("tiles", 200)] if facts["triton"] and not TOY else [])


def run(check, seconds):
    """The rows of a check that may take so long. What goes wrong is a row."""
    environment = os.environ | {"SECONDS_LEFT": str(seconds), "PYTHONPATH": os.pathsep.join(filter(None, [
        str(ROOT), os.environ.get("PYTHONPATH")])), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run(check.command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        return check.read(done.stdout)
    except subprocess.TimeoutExpired:
        return [row(check.name, None, note=f"stopped after {seconds:.0f} s", wrong=True)]
    except (ValueError, LookupError, TypeError):  # no JSON, or not what was expected
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        return [row(check.name, None, note=f"exit code {done.returncode}: {last[:300]}", wrong=True)]


def conclusions(found):
    """Rows that follow from others, by name: {what: value}."""
    def ratio(name, of, to):
        return [row(name, of / to, "times")] if of and to else []
    out = [entry for depth in ROWS for kind in ("fp8", "rowwise")
           for entry in ratio(f"d{depth} {kind} / bf16", found.get(f"d{depth} {kind} speed"), found.get(f"d{depth} bf16 speed"))]
    for T in (512, 2048, 8192):
        at = {match[1]: value for name, value in found.items()
              if (match := re.fullmatch(rf"attention (\w+)(?:, |.*)window \d+, T = {T}", name)) and f"window {32 if TOY else T}," in name}
        plain = found.get(f"attention, plain PyTorch, window {32 if TOY else T}, T = {T}")
        out += ratio(f"triton / plain PyTorch, T = {T}", plain, at.get("triton"))
        libraries = [at[name] for name in ("sdpa", "flex", "fa3") if at.get(name)]
        out += ratio(f"triton / best library, T = {T}", min(libraries, default=None), at.get("triton"))
    return out


def shown(entry):
    """A row as a line of the table."""
    goal = GOALS.get(entry["what"])
    text = f"{entry['what']:<46} " + ("" if entry["value"] is None else f"{entry['value']:>12,.4g} {entry['unit']}").ljust(24)
    if goal is not None and entry["value"] is not None:
        met = entry["value"] <= goal if entry["what"] in AT_MOST else entry["value"] >= goal
        text += f" [goal {goal:g}: {'met' if met else 'MISSED'}]"
    return f"{text} {'WRONG: ' if entry['wrong'] else ''}{entry['note']}".rstrip()


def main(argv):
    parser = argparse.ArgumentParser(prog="gpu_check.sh", allow_abbrev=False, description="Check this program on a GPU, and measure it.")
    parser.add_argument("--out", default="out/gpu_check.json", metavar="FILE", help="where the results go as JSON (default: %(default)s)")
    parser.add_argument("--only", default="", help="checks, separated by commas; empty: all. A wrong name shows them")
    parser.add_argument("--minutes", type=float, default=9.5, help="checks that would begin later are left out (default: %(default)s)")
    parser.add_argument("--part", default="", choices=["", *PARTS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        with contextlib.redirect_stdout(sys.stderr):
            rows = list(PARTS[args.part]())
        print(json.dumps(rows))
        return 0
    if not TOY:
        import torch
        if not torch.cuda.is_available():
            print(f"gpu_check.sh: error: torch {torch.__version__} finds no GPU; TOY=1 tries the script on a CPU", file=sys.stderr)
            return 2
    began, out = time.monotonic(), Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = run(own("machine", 120), 120)
    print(*map(shown, rows), sep="\n", flush=True)
    if "facts" not in rows[0]:
        return 1
    checks = all_checks(rows[0]["facts"], rows[0]["peak"])
    names = [check.name for check in checks]
    if unknown := set(filter(None, args.only.split(","))) - set(names):
        print(f"gpu_check.sh: error: --only={','.join(sorted(unknown))}: no such check on this machine; there are {', '.join(names)}",
              file=sys.stderr)
        return 2
    if not rows[0]["facts"]["torchao"]:
        rows.append(row("fp8", None, note="not measured: the package torchao is missing"))
    if rows[0]["facts"]["gpus"] < 2 and not TOY:
        rows.append(row("two ranks", None, note="not measured: there is one GPU"))
    for check in checks:
        if args.only and check.name not in args.only.split(","):
            continue
        left, started = 60 * args.minutes - (time.monotonic() - began), time.monotonic()
        if left < 30:
            new = [row(check.name, None, note="not measured: no time was left; --only=" + check.name)]
        else:
            new = run(check, min(check.seconds, left))
        rows += [{**entry, "check": check.name} for entry in new]
        print(f"-- {check.name}: {time.monotonic() - started:.0f} s", *map(shown, new), sep="\n", flush=True)
        out.write_text(json.dumps(rows, indent=1))
    rows += conclusions({entry["what"]: entry["value"] for entry in rows})
    out.write_text(json.dumps(rows, indent=1))
    wrong = [entry["what"] for entry in rows if entry["wrong"]]
    print("", f"all together, after {time.monotonic() - began:.0f} s; {out}", *map(shown, rows[1:]), sep="\n")
    figures = {re.sub(r"\W+", "_", entry["what"]): f"{entry['value']:.5g}" for entry in rows if entry["value"] is not None
               and (entry["what"] in GOALS or entry["what"].endswith(("speed", "bits per byte")))}
    print("RESULT", f"rows={len(rows)}", f"wrong={len(wrong)}", *(f"{name}={value}" for name, value in figures.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
