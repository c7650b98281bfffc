"""The checks of `nanochat doctor --gpu`. Each yields rows, in a process of its own:
`python -m nanochat.apps.doctor.gpu_checks NAME` prints them as lines of JSON."""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import hardware
from nanochat.apps.doctor.gpu import CHECKS, ROOT
from nanochat.apps.doctor.gpu_table import ROWS, TOY_LENGTH, GpuMachine, Row, attempt, is_toy
from nanochat.common import python_command
from nanochat.eval.bpb import bits_per_byte
from nanochat.model import loss
from nanochat.model.attention import attention
from nanochat.run import compiler, profiler
from nanochat.run.metrics import read_lines
from nanochat.run.timing import Entry, timed
from nanochat.run.workload import (
    Setup,
    Shape,
    TrainingStep,
    open_setup,
    time_attention,
    time_loss,
    ways_of_attention,
    windows_of,
)

# Tokens of the step that speeds of training are given for.
# It is accumulated from passes, so the update is paid once for many of them.
BATCH_TOKENS = 2**19
# Tokens of a pass of attention, whatever the length of a row.
ATTENTION_TOKENS = 32768
# Memory that ROWS are meant for.
ROWS_BYTES = 75e9
# Time that pytest needs to report what has passed when it is interrupted.
REPORT_SECONDS = 25
# Of losses on two ranks against one: their sums round differently.
MOST_NATS = 1e-3
# Needs no network and no optional package: text of this machine, one token a byte.
COMMON_TRAINING = (
    "--data=python",
    "--tokenizer=byte",
    "--sample-every=-1",
    "--core-metric-every=-1",
    "--seed=1",
)
# Deeper, as layers of depth 8 are too small for fp8, and therefore shorter.
IN_FP8 = ("--fp8", "--depth=16", "--num-iterations=40", "--save-every=20", "--eval-every=20")
# Ways to compute the same that are measured against the one in use: what each sets, as (module,
# name, value).
VARIANTS = {
    "as it is": [],
    "flex for full context": [("nanochat.model.attention", "FLEX_TAKES_FULL_CONTEXT", True)],
    "one product for q, k, v": [("nanochat.model.layers", "ONE_PRODUCT", True)],
    "Triton loss": [("nanochat.model.loss", "TRITON_ON_GPU", True)],
    "fp32 sums of the head's gradient": [("nanochat.model.loss", "WIDE_SUM", True)],
    "tables read by a kernel": [("nanochat.model.gpt", "TRITON_TABLES", ("cuda",))],
    "ReLU^2 inside the products": [("nanochat.model.gpt", "FUSED_MLP", ("cuda",))],
    "all of these": [
        ("nanochat.model.attention", "FLEX_TAKES_FULL_CONTEXT", True),
        ("nanochat.model.layers", "ONE_PRODUCT", True),
        ("nanochat.model.loss", "TRITON_ON_GPU", True),
        ("nanochat.model.loss", "WIDE_SUM", True),
        ("nanochat.model.gpt", "TRITON_TABLES", ("cuda",)),
        ("nanochat.model.gpt", "FUSED_MLP", ("cuda",)),
    ],
    "reductions that the compiler chooses freely": [
        ("torch._inductor.config", "deterministic", False),
        ("torch._inductor.config", "write_are_deterministic_algorithms_enabled", False),
    ],
}
# Tokens whose evaluation is timed.
EVALUATED = 2**20
# Kernels in the profile of a training step.
PROFILED_KERNELS = 40
# What a kind of training changes in the shape; "triton" is attention by our kernel, in bf16.
KINDS = {
    "bf16": {},
    "fp8": {"fp8": True},
    "rowwise": {"fp8": True, "fp8_recipe": "rowwise"},
    "triton": {},
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is. passes: timed in a row, for training. product_sizes: n of the matrix
    products. loss_chunks: logits at once. training: flags of train.py for the runs that are
    resumed."""

    device_type: str
    compile: bool
    repeats: int
    passes: int
    aspect_ratio: int
    head_dim: int
    vocab_size: int
    most_depth: int
    most_rows: int
    most_tokens_per_row: int
    product_sizes: Mapping[torch.dtype, int]
    copy_bytes: int
    loss_chunks: Sequence[int]
    loss_backends: Sequence[str]
    training: Sequence[str]
    rank_steps: int

    def setup(
        self, depth: int, rows: int, *, T: int = 2048, attention: str = "auto", **changes: object
    ) -> Setup:
        """The Setup of a depth with rows of T tokens, cut to these sizes. changes: of the Shape."""
        shape = {
            "arch": "speedrun",
            "depth": min(depth, self.most_depth),
            "aspect_ratio": self.aspect_ratio,
            "head_dim": self.head_dim,
            "n_kv_head": -1,
            "max_seq_len": min(T, self.most_tokens_per_row),
            "window_pattern": "SSSL",
            "short_window": -1,
            "vocab_size": self.vocab_size,
            "device_batch_size": min(rows, self.most_rows),
        }
        return open_setup(
            Shape(**(shape | changes)),
            device_type=self.device_type,
            compile=self.compile,
            attention=attention,
        )


FULL = Sizes(
    device_type="cuda",
    compile=True,
    repeats=5,
    passes=20,
    aspect_ratio=64,
    head_dim=128,
    vocab_size=32768,
    most_depth=24,
    most_rows=64,
    most_tokens_per_row=8192,
    product_sizes={torch.bfloat16: 8192, torch.float16: 8192, torch.float32: 4096},
    copy_bytes=2**30,
    loss_chunks=(2**24, 2**26, 2**28, 2**30),
    loss_backends=loss.BACKENDS,
    training=(
        "--device-type=cuda",
        "--depth=12",
        "--max-seq-len=2048",
        "--device-batch-size=32",
        "--total-batch-size=524288",
        "--num-iterations=20",
        "--save-every=10",
        "--eval-every=20",
        "--sample-every=20",
        "--eval-tokens=1000000",
    ),
    rank_steps=50,
)
TOY = Sizes(
    device_type="cpu",
    compile=False,
    repeats=1,
    passes=1,
    aspect_ratio=16,
    head_dim=16,
    vocab_size=300,
    most_depth=2,
    most_rows=2,
    most_tokens_per_row=TOY_LENGTH,
    product_sizes={torch.bfloat16: 64, torch.float32: 64},
    copy_bytes=2**20,
    loss_chunks=(2**12,),
    loss_backends=loss.BACKENDS[:1],
    training=(
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
    ),
    rank_steps=8,
)


def check_machine(sizes: Sizes) -> Iterator[Row]:
    """What the GPU is, and what it reaches: matrix products and copies."""
    device = torch.device(sizes.device_type)
    modules = ("triton", "torchao", "pytest", "xdist")
    on_gpu = device.type == "cuda"
    machine = GpuMachine(
        described=hardware.describe(device),
        **{name: importlib.util.find_spec(name) is not None for name in modules},
        gpus=torch.cuda.device_count(),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else 0,
    )
    facts = machine.as_json()
    listed = hardware.listed_gpu(facts["gpu"]) if on_gpu else None
    note = ", ".join(f"{name} {value}" for name, value in facts.items())
    yield Row("machine", None, note=note, facts=facts, peak=listed and listed.peak_flops)
    if sizes.compile:
        hardware.prepare(device.type)
        if problem := compiler.problem(device.type):
            yield Row("compiler", None, note=f"nothing is compiled: {problem}", wrong=True)
    for dtype, n in sizes.product_sizes.items():
        yield Row(
            f"products in {str(dtype).removeprefix('torch.')}",
            hardware.matmul_flops(device, dtype, n, 5) / 1e12,
            "TFLOP/s",
            f"best of 5, n = {n}",
        )
    # Larger than any cache of a GPU, so that its memory is what is measured.
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(timed(lambda: target.copy_(source), device, 5))
    yield Row("copies", 2 * source.nbytes / seconds / 1e9, "GB/s", "reading and writing")


def check_kernels() -> Iterator[Row]:
    """The tests that need a GPU: three-way errors of all kernels, same bits, strides, compiled
    blocks, fp8."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    names = ("kernels", "embedding", "relu_squared", "flash_attention", "fp8")
    command += [f"tests/test_{name}.py" for name in names]
    if importlib.util.find_spec("xdist"):
        # Most of the time is the compiler's, so processes share it well.
        command += ["-n", "8"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with contextlib.suppress(subprocess.TimeoutExpired):
        limit = CHECKS["kernels"] - REPORT_SECONDS
        yield row_of_pytest(process.communicate(timeout=limit)[0])
        return
    # Interrupted, pytest reports what has passed so far.
    process.send_signal(signal.SIGINT)
    yield row_of_pytest(process.communicate()[0])
    yield Row("tests of kernels", None, note="cut off: the last of them have not run")


def row_of_pytest(text: str) -> Row:
    """The row of what pytest printed."""
    lines = text.strip().splitlines() or ["no output"]
    counts = re.compile(r"\d+ (passed|failed|skipped|error|deselected)")
    # Plugins may print after the summary.
    last = next((line for line in reversed(lines) if counts.search(line)), lines[-1])
    count = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    passed = count.get("passed", 0)
    return Row(
        "tests of kernels passed",
        passed,
        note="; ".join([last, *failed[:5]]),
        # None passed: they were skipped or deselected, so nothing is known of the kernels.
        wrong=bool(failed or count.get("failed") or count.get("error") or not passed),
    )


def rows_at_once(depth: int, memory_bytes: float) -> int:
    """Rows per pass of a depth on a GPU with so much memory; 0: not known, as on a CPU."""
    rows = ROWS[depth]
    while memory_bytes and rows > 1 and memory_bytes < ROWS_BYTES * rows / ROWS[depth]:
        rows //= 2
    return rows


def check_training(
    depth: int, kind: str, peak: float, memory_bytes: float, sizes: Sizes
) -> Iterator[Row]:
    """Speed and memory of training a depth with BATCH_TOKENS a step. kind: of KINDS. peak: listed
    FLOP/s of the GPU; 0: measure it."""
    setup = sizes.setup(
        depth,
        rows_at_once(depth, memory_bytes),
        attention="triton" if kind == "triton" else "auto",
        **KINDS[kind],
    )
    label = "listed dense bf16"
    if not peak:
        peak, label = hardware.measured_peak(setup.device, setup.dtype), "measured"
    # The figures would be those of another program.
    if sizes.compile and not setup.compiled:
        yield Row(f"d{depth} {kind}", None, note="not compiled", wrong=True)
    training = TrainingStep(setup)
    name = f"d{depth} {kind}"
    yield from rows_of_training(training, name, peak, label, sizes.repeats, sizes.passes)
    if kind == "bf16":
        yield from attempt(f"{name} evaluation", partial(row_of_evaluation, training, name))
    if setup.device.type == "cuda":
        yield from attempt(f"{name} profile", partial(row_of_profile, training, name))


def row_of_evaluation(training: TrainingStep, name: str) -> Row:
    """Bits per byte of rows of made-up text, as many tokens as EVALUATED."""
    setup = training.setup
    config = setup.config
    n = 1 if is_toy() else EVALUATED // config.max_seq_len
    generator = np.random.default_rng(1)
    pieces = list(generator.integers(config.vocab_size, size=(n, config.max_seq_len + 1)))
    byte_counts = np.ones(config.vocab_size, dtype=np.int64)

    def evaluate() -> None:
        bits_per_byte(training.model, pieces, byte_counts, setup.tokens, setup.device)

    (seconds,) = timed(evaluate, setup.device, 1)
    return Row(f"{name} evaluation", seconds, "s", f"of {n * config.max_seq_len:,} tokens")


def row_of_profile(training: TrainingStep, name: str) -> Row:
    """Where the time of a pass that adds to gradients and of an update goes, by kind in the note,
    by kernel in the facts."""
    training.forward_backward()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        training.update(training.forward_backward())
        torch.cuda.synchronize()
    kernels = profiler.longest_kernels(profile.key_averages(), n=10_000)
    kinds: dict[str, float] = {}
    for kernel, _, milliseconds in kernels:
        kind = profiler.kind_of(kernel)
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    longest = sorted(kinds, key=kinds.get, reverse=True)
    note = ", ".join(f"{kind} {kinds[kind]:.1f} ms" for kind in longest)
    facts = {
        "kinds": kinds,
        "kernels": kernels[:PROFILED_KERNELS],
    }
    return Row(f"{name} profile", sum(kinds.values()), "ms", f"of kernels: {note}", facts=facts)


def check_warm_up(depth: int, memory_bytes: float, sizes: Sizes) -> Iterator[Row]:
    """Compile what the checks of a depth run, so that they find it compiled."""
    rows = rows_at_once(depth, memory_bytes)
    for variant in VARIANTS if depth == 12 else ("as it is",):

        def row(variant: str = variant) -> Row:
            with switched(VARIANTS[variant]):
                training = TrainingStep(sizes.setup(depth, rows))
            return Row(f"d{depth} compiled, {variant}", training.warm_up_seconds, "s")

        yield from attempt(f"d{depth} compiled, {variant}", row)
        forget_compiled()


@contextlib.contextmanager
def switched(settings: Sequence[tuple[str, str, object]]) -> Iterator[None]:
    """Context in which attributes of modules, as in VARIANTS, have other values."""
    modules = [importlib.import_module(module) for module, _, _ in settings]
    names = [name for _, name, _ in settings]
    before = list(map(getattr, modules, names))
    try:
        for module, (_, name, value) in zip(modules, settings, strict=True):
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in zip(modules, names, before, strict=True):
            setattr(module, name, value)


def forget_compiled() -> None:
    """Drop compiled functions, whose code depends on what a variant sets, and free memory."""
    torch.compiler.reset()
    loss._compiled.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


def check_variants(memory_bytes: float, sizes: Sizes) -> Iterator[Row]:
    """Passes of depth 12 in each of the VARIANTS."""
    times: dict[str, float] = {}
    for variant, settings in VARIANTS.items():

        def row(variant: str = variant, settings: Sequence = settings) -> Row:
            with switched(settings):
                training = TrainingStep(sizes.setup(12, rows_at_once(12, memory_bytes)))
                entry = training.time_accumulation(sizes.passes)
            times[variant] = entry.median
            least, most = 1000 * min(entry.seconds), 1000 * max(entry.seconds)
            gain = times["as it is"] / entry.median
            return Row(
                f"d12 pass, {variant}",
                1000 * entry.median,
                "ms",
                f"{least:.1f} to {most:.1f}, n = {len(entry.seconds)}; {gain:.3f} times as fast; "
                f"loss {float(training.loss()):.6f}",
            )

        yield from attempt(f"d12 pass, {variant}", row)
        forget_compiled()


def rows_of_training(
    training: TrainingStep, name: str, peak: float, label: str, repeats: int, passes: int
) -> Iterator[Row]:
    """Speed, MFU, peak memory and the optimizer's share of a step of BATCH_TOKENS.

    passes: timed in a row, since a GPU gets slower as it gets warm. name: of the rows, "d12 bf16"
    for example. peak: in FLOP/s; label: what it is."""
    setup = training.setup
    micro = training.time_accumulation(passes)
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training.step()
    # The peak is reached with gradients of an earlier micro-batch in place.
    training.forward_backward()
    memory = hardware.peak_memory_bytes(setup.device)
    # From here on, gradients are held for the timings of the update.
    update = training.time_update(repeats)
    # A step is n passes and one update; n steps in full would take minutes for the same figure.
    n = max(1, BATCH_TOKENS // setup.tokens)
    seconds = n * micro.median + update.median
    speed = n * setup.tokens / seconds
    milliseconds = [
        1000 * value for value in (micro.median, min(micro.seconds), max(micro.seconds))
    ]
    yield Row(
        f"{name} speed",
        speed,
        "tokens/s",
        f"{setup.shape.device_batch_size} rows of {setup.config.max_seq_len} per pass, "
        f"{setup.attention} attention; {n} times {milliseconds[0]:.1f} ms "
        f"({milliseconds[1]:.1f} to {milliseconds[2]:.1f}, n = {len(micro.seconds)})",
    )
    mfu = 100 * speed * setup.flops_per_token / peak
    yield Row(f"{name} MFU", mfu, "%", f"of the {label} peak, {peak / 1e12:.4g} TFLOP/s")
    yield Row(f"{name} memory", memory / 2**30, "GiB", "peak of the whole process")
    # The update does not depend on how the passes compute.
    if name.endswith(" bf16"):
        flops = update.flops / update.median / 1e12
        note = f"of the step; {1000 * update.median:.2f} ms, {flops:.0f} TFLOP/s of its products"
        share = 100 * update.median / seconds
        yield Row(f"{name.removesuffix(' bf16')} optimizer share", share, "%", note)


def check_attention(T: int, sizes: Sizes) -> Iterator[Row]:
    """Every backend over ATTENTION_TOKENS, six heads of 128 channels, forward and backward, with a
    short window and with full context."""
    # The same number of tokens at every length, so that times can be compared.
    length = min(T, sizes.most_tokens_per_row)
    setup = sizes.setup(
        12, ATTENTION_TOKENS // T, T=T, window_pattern="SL", short_window=length // 2
    )

    def row(name: str, window: int, function: Callable[..., torch.Tensor]) -> Row:
        entry = time_attention(setup, name, window, function, sizes.repeats)
        note = "the window counted for every token"
        return row_of_time(f"{entry.name}, T = {T}", entry, note)

    for window in windows_of(setup.config):
        for name, function in ways_of_attention(setup).items():
            yield from attempt(name, partial(row, name, window, function))
        if window == length and setup.device.type == "cuda":
            # What deterministic algorithms, which are always on, keep away.
            torch.use_deterministic_algorithms(False)
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                short = backend.name.split("_")[0].lower()
                name = f"attention sdpa_{short}, not deterministic"
                function = partial(_sdpa_with, backend)
                yield from attempt(name, partial(row, name, window, function))
            torch.use_deterministic_algorithms(True)


def _sdpa_with(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return attention(q, k, v, window, "sdpa")


def row_of_time(what: str, entry: Entry, note: str) -> Row:
    """An entry as a row in milliseconds."""
    speed = entry.flops / entry.median / 1e12
    memory = (entry.memory_bytes or 0) / 2**20
    note = f"{speed:.1f} TFLOP/s, {memory:.0f} MiB; {note}"
    return Row(what, 1000 * entry.median, "ms", note)


def check_loss(sizes: Sizes) -> Iterator[Row]:
    """Time and memory of the head's loss with its gradients: as plain PyTorch, and by backend and
    size of chunks."""
    setup = sizes.setup(12, 16)

    def row(name: str, backend: str | None) -> Row:
        entry = time_loss(setup, name, backend, sizes.repeats)
        return row_of_time(name, entry, "memory beyond the gradients")

    yield from attempt("loss, plain PyTorch", partial(row, "loss, plain PyTorch", None))
    for chunk in sizes.loss_chunks:
        # Of this process, which ends with the check.
        loss.CHUNK_LOGITS = {"cpu": chunk, "cuda": chunk}
        for backend in sizes.loss_backends:
            name = f"loss {backend}, chunks of 2^{chunk.bit_length() - 1}"
            yield from attempt(name, partial(row, name, backend))


def check_determinism(sizes: Sizes) -> Iterator[Row]:
    """What deterministic algorithms, which are always on, cost a training step."""
    training = TrainingStep(sizes.setup(12, 16))
    entries = {}
    for on in (True, False):
        # Whatever is compiled for the other setting is compiled anew, in the call that warms up.
        torch.use_deterministic_algorithms(on)
        entries[on] = training.time_step(sizes.repeats)
    with_them, without = (1000 * entries[on].median for on in (True, False))
    yield Row(
        "deterministic algorithms",
        100 * (with_them / without - 1),
        "%",
        f"longer step at d12, n = {len(entries[True].seconds)}: {with_them:.1f} ms against "
        f"{without:.1f} ms",
    )


def train(folder: str, sizes: Sizes, *flags: str, ranks: int = 1) -> None:
    """Run train.py in a process of its own, or in `ranks` of them under torchrun. Raises
    RuntimeError with its last lines if it fails."""
    words = [*COMMON_TRAINING, *sizes.training, f"--out-dir={folder}", *flags]
    command = python_command(ROOT / "train.py", words, ranks)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = " ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise RuntimeError(f"train.py ended with exit code {done.returncode}: {last}")


def losses(path: Path) -> dict[int, float]:
    """{step: training loss} of a run folder."""
    lines = read_lines(path / "metrics.jsonl")
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def check_resume(sizes: Sizes, *flags: str) -> Iterator[Row]:
    """A real training to bits per byte, and its second half again from the checkpoint: the same
    losses and weights with ==."""
    kind = " in fp8" if "--fp8" in flags else ""
    with tempfile.TemporaryDirectory() as folder:
        whole, again = Path(folder) / "whole", Path(folder) / "again"
        train(folder, sizes, "--model-tag=whole", *flags)
        summary = json.loads((whole / "summary.json").read_text())
        last, bpb = summary["step"], summary["val_bpb"]
        half = last // 2
        # Well above what such a run reaches; a toy's number means nothing.
        most_bpb = 5
        yield Row(
            f"real training{kind}, bits per byte",
            bpb,
            "",
            f"{summary['tokens']:,} bytes of source code, {summary['total_training_time']:.0f} s, "
            f"{summary['tok_per_sec']:,.0f} tokens/s, MFU {summary['mfu']:.1f}%",
            wrong=not bpb or (sizes is not TOY and bpb > most_bpb),
        )
        shutil.copytree(whole, again, symlinks=True)
        # Nothing of the second half stays but its lines in the logs, which resuming cuts.
        for checkpoint in (again / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > half:
                shutil.rmtree(checkpoint)
        train(folder, sizes, "--model-tag=again", "--resume", *flags)
        name = f"checkpoints/step_{last:06d}/model.safetensors"
        yield same_again(
            f"resumed, losses equal with =={kind}",
            losses(whole),
            losses(again),
            load_file(whole / name),
            load_file(again / name),
            half,
        )


def same_again(
    what: str,
    whole: Mapping[int, float],
    again: Mapping[int, float],
    weights: Mapping[str, torch.Tensor],
    weights_again: Mapping[str, torch.Tensor],
    half: int,
) -> Row:
    """The row of a run against the same one resumed at step `half`: losses by step, weights by
    name."""
    # The line of step `half` holds the loss of the first update after the checkpoint.
    steps = [step for step in whole if step >= half]
    same = sum(whole[step] == again.get(step) for step in steps)
    equal = sum(bool((weights[name] == weights_again[name]).all()) for name in weights)
    return Row(
        what,
        same,
        f"of {len(steps)}",
        f"from step {half}; weights: {equal} of {len(weights)} tensors equal",
        wrong=same < len(steps) or equal < len(weights),
    )


def check_ranks(sizes: Sizes) -> Iterator[Row]:
    """Two ranks against one: losses of fp32 steps with the same batches."""
    # fp32, because ranks sum in another order, and bf16 would hide an error of that size.
    flags = ("--no-save", "--eval-every=-1", "--save-every=-1", "--dtype=float32", "--no-compile")
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            steps = f"--num-iterations={sizes.rank_steps}"
            train(folder, sizes, f"--model-tag=on{ranks}", *flags, steps, ranks=ranks)
        one, two = losses(Path(folder) / "on1"), losses(Path(folder) / "on2")
    difference = max(abs(one[step] - two[step]) for step in one)
    yield Row(
        "two ranks, largest difference of losses",
        difference,
        "nats",
        f"{len(one)} steps in fp32",
        wrong=difference > MOST_NATS,
    )


def check_tiles() -> Iterator[Row]:
    """The tiles of the kernels of the MLP and of attention that are in use, and faster ones as they
    are found."""
    from nanochat.model.kernels import flash_attention

    # First, as there are few of them.
    yield from attempt("tiles: MLP", tiles_of_mlp)
    capability = torch.cuda.get_device_capability()
    for D, T, window in ((128, 2048, 2048), (128, 2048, 1024), (64, 2048, 2048)):
        generator = torch.Generator().manual_seed(1)
        q, k, v, upstream = (
            torch.randn(16, T, 768 // D, D, generator=generator).to("cuda", torch.bfloat16)
            for _ in range(4)
        )
        out, lse = flash_attention.forward(q, k, v, window)
        forward = partial(flash_attention.forward, q, k, v, window)
        backward = partial(flash_attention.backward, upstream, q, k, v, out, lse, window)
        for which in flash_attention.PASSES:
            # The other backward pass keeps its tile, so its time is the same in every row.
            calls = {}
            for tile in flash_attention.candidates(which, D, 2, capability):
                if which == "forward":
                    calls[tile] = partial(forward, tile)
                elif which == "backward of keys":
                    calls[tile] = partial(backward, tile_of_keys=tile)
                else:
                    calls[tile] = partial(backward, tile_of_queries=tile)
            both = "" if which == "forward" else " (both backward passes)"
            yield from faster_tiles(f"tiles: {which}, D = {D}, window {window}", calls, both)


def tiles_of_mlp() -> Iterator[Row]:
    """The same for the MLP of depth 12, below the library's product, without ReLU^2."""
    from nanochat.model.kernels import relu_squared

    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    generator = torch.Generator().manual_seed(1)
    x, up, down = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((32 * 2048, 768), (4 * 768, 768), (768, 4 * 768))
    )
    seconds = statistics.median(timed(partial(torch.mm, x, up.T), device, 9))
    yield Row("tiles: MLP, product of the library", 1000 * seconds, "ms", "without ReLU^2")
    passes = {
        "forward": partial(relu_squared.forward, x, up),
        # What is a gradient makes no difference.
        "backward": partial(relu_squared.backward, x, down, relu_squared.forward(x, up)),
    }
    for which, run in passes.items():
        tiles = relu_squared.candidates(which, capability)
        yield from faster_tiles(
            f"tiles: MLP, {which}", {tile: partial(run, tile) for tile in tiles}
        )


def faster_tiles(what: str, calls: Mapping[tuple, Callable], both: str = "") -> Iterator[Row]:
    """A row for the first tile and for each that is faster than all before it, as the time may end
    at any moment. calls: {tile: what runs the kernel with it}, the tile in use first."""
    best = used = None
    for tile, call in calls.items():
        try:
            seconds = statistics.median(timed(call, torch.device("cuda"), 9))
        except Exception:
            # It does not compile, or does not fit: not a choice.
            continue
        # The one in use comes first, and is the measure if it runs at all.
        used = used or seconds
        if best is None or seconds < best:
            best = seconds
            speedup = f"{used / seconds:.2f} times as fast as the one in use"
            yield Row(what, 1000 * seconds, "ms", f"{tuple(tile)}, {speedup}{both}")


def rows_of(name: str, peak: float, memory_bytes: float, sizes: Sizes) -> Iterator[Row]:
    """The rows of a check as they are found. peak, memory_bytes: of one GPU, for training."""
    if match := re.fullmatch(r"d(\d+)-(\w+)", name):
        return check_training(int(match[1]), match[2], peak, memory_bytes, sizes)
    if match := re.fullmatch(r"warm-(\d+)", name):
        return check_warm_up(int(match[1]), memory_bytes, sizes)
    if name == "variants":
        return check_variants(memory_bytes, sizes)
    if match := re.fullmatch(r"attention-(\d+)", name):
        return check_attention(int(match[1]), sizes)
    if name == "resume-fp8":
        return check_resume(sizes, *IN_FP8)
    without_sizes = {"kernels": check_kernels, "tiles": check_tiles}
    if name in without_sizes:
        return without_sizes[name]()
    checks = {
        "machine": check_machine,
        "loss": check_loss,
        "determinism": check_determinism,
        "resume": check_resume,
        "ranks": check_ranks,
    }
    return checks[name](sizes)


def main(argv: Sequence[str]) -> None:
    """Print the rows of one check as lines of JSON."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name", choices=("machine", *CHECKS))
    parser.add_argument("--peak", type=float, default=0, help="listed FLOP/s; 0: measure it")
    parser.add_argument("--memory", type=float, default=0, help="bytes of one GPU")
    args = parser.parse_args(argv)
    # From the environment, which the processes of the checks inherit.
    sizes = TOY if is_toy() else FULL
    # Whatever else prints goes to the other stream, which is kept for the last words of a failure.
    with contextlib.redirect_stdout(sys.stderr):
        for row in attempt(args.name, lambda: rows_of(args.name, args.peak, args.memory, sizes)):
            print(json.dumps(row.as_json()), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
