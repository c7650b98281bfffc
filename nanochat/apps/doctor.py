"""`nanochat doctor`: what this machine has, what is missing, and what will be slow here and why. Changes nothing."""

import argparse
import importlib.metadata
import importlib.util
import json
import netrc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from nanochat.common import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    UsageError,
    base_dir,
    human_bytes,
    in_a_line,
)

# module: (what pip is asked for, what it is for); training needs the first group, single features need the others
NEEDED = {
    "torch": ("torch==2.13.0", "everything"),
    "numpy": ("numpy", "everything"),
    "tiktoken": ("tiktoken", "tokenizers"),
    "safetensors": ("safetensors", "checkpoints"),
    "rustbpe": ("rustbpe>=0.1.0", "training a tokenizer"),
    "tqdm": ("tqdm", "progress bars"),
}
OPTIONAL = {
    "datasets": ("datasets>=5", "--data=hf:..."),
    "wandb": ("wandb", "--run"),
    "torchao": ("torchao==0.18.0", "--fp8"),
    "pyyaml": ("pyyaml", "the CORE metric"),
    "matplotlib": ("matplotlib", "nanochat report and compare"),
    "tensorboard": ("tensorboard", "--tensorboard"),
    "transformers": ("transformers>=4.57", "nanochat export"),
    "tokenizers": ("tokenizers", "nanochat export"),
    "fastapi": ("fastapi", "nanochat serve"),
    "uvicorn": ("uvicorn", "nanochat serve"),
    "pytest": ("pytest", "the tests"),
    "pytest-xdist": ("pytest-xdist", "the tests"),
    "triton": ("triton==3.7.1", "torch.compile on NVIDIA GPUs"),
}
NETWORK_SECONDS = 6  # to wait for the dataset hub, name look-up included
COMPILE_SECONDS = 90  # to wait for one small compiled function
LITTLE_DISK, TOO_LITTLE_DISK = (
    10 * 2**30,
    200 * 2**20,
)  # bytes: worth a remark; not enough for a small run
LITTLE_MEMORY = 6 * 2**30  # bytes free on the training device
FEW_CORES = 4
DEPTHS, CONTEXT = (4, 8, 12, 16, 20, 24, 32), 2048  # of the models whose fit is told
COMPILE_TEST = """
import sys, torch
def f(x):
    return torch.relu(x) * 2 + 1
x = torch.randn(32, 32, device=sys.argv[1])
assert torch.allclose(torch.compile(f)(x), f(x), rtol=1e-3, atol=1e-3)
"""


def main(argv):
    """Print the report. Returns 0 if training can work here, 1 if something that it needs is missing."""
    parser = argparse.ArgumentParser(
        prog="nanochat doctor",
        allow_abbrev=False,
        description="Check this machine: packages, devices, speed, compiler, disk, network; then what "
        "will be slow here and why. Exit code 1 if training cannot work.",
    )
    parser.add_argument(
        "--out-dir",
        default="out",
        help="folder of run folders, for its disk space (default %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="skip the trial compilation, and measure smaller products",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, nothing rounded")
    args = parser.parse_args(argv)
    facts = examine(args.out_dir, args.quick)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return EXIT_FAILED if facts["needed"] else EXIT_COMPLETED


def examine(out_dir, quick):
    """All facts as a dict that JSON can hold, with `needed` (what keeps training from working) and `slow` (what, why, remedy)."""
    hub = ask_hub()
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages(),
        "torch_error": None,
        "device": None,
    }
    facts["missing"] = [
        name for name in facts["packages"] if facts["packages"][name] is None and applies(name)
    ]
    if facts["packages"]["torch"] is not None:
        try:
            facts |= machine(quick)
        except Exception as error:  # a broken installation can raise anything
            facts["torch_error"] = in_a_line(error)
    facts["disk"] = {
        "caches": disk(lambda: base_dir(make=False)),
        "runs": disk(lambda: Path(out_dir)),
    }
    facts["dataset_hub"] = hub()
    facts["wandb"] = wandb_account()
    facts["needed"] = needed(facts)
    facts["slow"] = slow(facts)
    return facts


def packages():
    """{package: version or None}; 'unknown' where it is there without a record of its version."""
    found = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            spec = importlib.util.find_spec(name)
            found[name] = "unknown" if spec is not None and spec.origin is not None else None
    return found


def applies(name):
    """Whether a package means anything here: triton only with an NVIDIA GPU."""
    return name != "triton" or nvidia_gpu_present()


def nvidia_gpu_present():
    """Whether the system has an NVIDIA GPU, whatever torch thinks."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def machine(quick):
    """Devices, memory, cores, measured speed and compiler. Imports torch."""
    import torch

    from nanochat import hardware

    device_type = hardware.pick_device_type("")
    device = torch.device(device_type)
    dtype, reason = hardware.pick_dtype("auto", device_type, training=True)
    facts = {
        "device": device_type,
        "gpus": [],
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "bf16_cpu": hardware.cpu_multiplies_bf16(),
        "free_memory_bytes": hardware.free_memory(device),
        "cuda_build": torch.version.cuda,
        "rows_that_fit": None,
    }
    if device_type == "cuda":
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            facts["gpus"].append(
                {
                    "name": torch.cuda.get_device_name(index),
                    "memory_bytes": total,
                    "free_memory_bytes": free,
                    "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                }
            )
        facts["rows_that_fit"] = rows_that_fit(facts["free_memory_bytes"], dtype)
    facts["matmul_flops"] = {}
    for name in ("float32", "bfloat16", *(["float16"] if device_type == "cuda" else [])):
        small = quick or name == "bfloat16" and device_type == "cpu" and not facts["bf16_cpu"]
        n = (
            512
            if small and device_type == "cpu"
            else 1024
            if small
            else 2048
            if device_type == "cpu"
            else 4096
        )
        try:
            facts["matmul_flops"][name] = hardware.matmul_flops(
                device, hardware.DTYPES[name], n, repeats=2
            )
        except Exception:  # not every device multiplies every type
            facts["matmul_flops"][name] = None
    facts["compiler_problem"] = hardware.compiler_missing(device_type)
    if facts["compiler_problem"] is None and not quick:
        facts["compiler_problem"] = trial_compilation(device_type)
    return facts


def rows_that_fit(free_bytes, dtype):
    """{depth: rows of CONTEXT tokens that a GPU with so much memory takes at once}, estimated for train.py's defaults; 0: not even one."""
    from nanochat.model.gpt import GPTConfig, meta_model, width_for
    from nanochat.run import memory as fit

    fitting = {}
    for depth in DEPTHS:
        width = width_for(depth, aspect_ratio=64, head_dim=128)
        config = GPTConfig(
            depth=depth,
            width=width,
            head_dim=128,
            n_head=width // 128,
            n_kv_head=width // 128,
            vocab_size=32768,
            max_seq_len=CONTEXT,
            short_window=CONTEXT // 2,
            key_shift=True,
        )
        parameters = meta_model(config).count_parameters()
        rows = (
            2**i
            for i in range(10)
            if fit.step_memory_bytes(
                config, parameters, 2**i, dtype.itemsize, "sdpa", device_type="cuda"
            )
            <= fit.MEMORY_SHARE["cuda"] * free_bytes
        )
        fitting[depth] = max(rows, default=0)
    return fitting


def cpu_name():
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return found.group(1).strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def usable_cores():
    """Cores that this process may use: those of the machine, of its affinity mask, or of its container's quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cores


def trial_compilation(device_type):
    """Compile one small function in another process, without caches. Returns what went wrong, or None."""
    # the check of every vector instruction set, each a compilation, is left out: half of the time
    settings = {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
    with tempfile.TemporaryDirectory() as cache:
        try:
            done = subprocess.run(
                [sys.executable, "-c", COMPILE_TEST, device_type],
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
                env={**os.environ, **settings, "TORCHINDUCTOR_CACHE_DIR": cache},
            )
        except subprocess.TimeoutExpired:
            return f"a small function was not compiled within {COMPILE_SECONDS} s"
        except OSError as error:
            return f"compiling could not be tried ({error})"
    if done.returncode == 0:
        return None
    lines = [
        line.strip() for line in done.stderr.splitlines() if "Error" in line or "error:" in line
    ]
    return "compiling a small function failed: " + (
        lines[-1][:200] if lines else f"exit code {done.returncode}"
    )


def disk(folder):
    """Free bytes where folder() is or would be made, and why nothing can be written there (None if it can)."""
    try:
        path = os.path.abspath(folder())
    except UsageError as error:
        return {
            "path": os.environ.get("NANOCHAT_BASE_DIR"),
            "free_bytes": None,
            "problem": str(error),
        }
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:  # the one sure test; it leaves nothing
            file.write(b"x")
        return {"path": path, "free_bytes": shutil.disk_usage(existing).free, "problem": None}
    except OSError as error:
        return {
            "path": path,
            "free_bytes": None,
            "problem": f"{existing} cannot be written ({error.strerror})",
        }


def ask_hub():
    """Ask the dataset hub, beside other work. Returns a function that gives {"address", "problem": None or why not}.

    That function waits until NETWORK_SECONDS after the question, name look-up included, and no longer."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return lambda: {"address": address, "problem": "HF_HUB_OFFLINE is set"}
    answers, started = [f"no answer within {NETWORK_SECONDS} s"], time.monotonic()

    def ask():
        try:
            request = urllib.request.Request(
                address, method="HEAD", headers={"User-Agent": "nanochat-doctor"}
            )
            with urllib.request.build_opener().open(
                request, timeout=NETWORK_SECONDS
            ):  # takes proxies from the environment
                answers.append(None)
        except (
            urllib.error.HTTPError
        ) as error:  # an answer all the same, unless a proxy or the server says it cannot
            answers.append(
                f"error {error.code}" if error.code == 407 or error.code >= 500 else None
            )
        except Exception as error:
            answers.append(in_a_line(getattr(error, "reason", None) or error))

    def answer():
        asking.join(max(0, started + NETWORK_SECONDS - time.monotonic()))
        return {"address": address, "problem": answers[-1]}

    asking = threading.Thread(
        target=ask, daemon=True
    )  # a thread, as looking a name up cannot be given a time limit
    asking.start()
    return answer


def wandb_account():
    """Where a W&B key is configured, never the key: "WANDB_API_KEY", a file's name, or None."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    host = urllib.parse.urlsplit(
        os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    ).hostname
    for path in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        try:
            if host in netrc.netrc(os.path.expanduser(path)).hosts:
                return path
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            pass
    return None


def needed(facts):
    """What keeps training from working, as sentences with their remedies."""
    problems = [
        f"the package '{name}' is missing ({NEEDED[name][1]}): pip install '{NEEDED[name][0]}'"
        for name in facts["missing"]
        if name in NEEDED
    ]
    if sys.version_info < (3, 10):
        problems.append(f"Python {facts['python']} is too old: install Python 3.10 or newer")
    if facts["torch_error"]:
        problems.append(
            f"torch does not work here ({facts['torch_error']}): install it again, pip install '{NEEDED['torch'][0]}'"
        )
    for what, remedy in {
        "caches": "set NANOCHAT_BASE_DIR to another folder",
        "runs": "give another --out-dir",
    }.items():
        place = facts["disk"][what]
        if place["problem"]:
            problems.append(f"{what}: {place['problem']}; {remedy}")
        elif place["free_bytes"] < TOO_LITTLE_DISK:
            problems.append(
                f"{what}: only {human_bytes(place['free_bytes'])} free at {place['path']}; make room, or {remedy}"
            )
    return problems


def slow(facts):
    """What will be slow or cramped here: a list of {"what", "why", "remedy"}."""
    found = []

    def add(what, why, remedy):
        found.append({"what": what, "why": why, "remedy": remedy})

    device = facts["device"]
    if device is not None:
        if device != "cuda" and nvidia_gpu_present():
            why = (
                "this torch is a build for CPUs"
                if not facts["cuda_build"]
                else f"torch, built for CUDA {facts['cuda_build']}, finds no usable GPU: the driver may be too old"
            )
            add(
                "the NVIDIA GPU lies idle",
                why,
                "install a CUDA build of torch, or update the driver",
            )
        if device == "cpu":
            if not facts["bf16_cpu"]:
                add(
                    "matrix products",
                    "this CPU has no bf16 instructions (AMX or AVX512-BF16), so they run in fp32",
                    "a small --depth, or a machine that has them",
                )
            if facts["cores"] < FEW_CORES:
                add(
                    "everything on the CPU",
                    f"only {facts['cores']} cores may be used",
                    "a small --depth and a --target-minutes budget",
                )
            if facts["threads"] < facts["cores"]:
                add(
                    "everything on the CPU",
                    f"torch uses {facts['threads']} of {facts['cores']} cores",
                    "raise or unset OMP_NUM_THREADS"
                    if os.environ.get("OMP_NUM_THREADS")
                    else "set OMP_NUM_THREADS",
                )
        if device == "cuda" and facts["dtype"] != "bfloat16":
            name, how = facts["gpus"][0]["name"], "fp32"
            if facts["dtype"] == "float16":
                how = "fp16 in training, whose loss is scaled for that, and in fp32 elsewhere"
            add(
                "matrix products",
                f"{name} has no bf16 matrix instructions, so they run in {how}",
                "a small --depth, or a GPU of the Ampere generation or newer",
            )
        if facts["rows_that_fit"] and 0 in facts["rows_that_fit"].values():
            least = min(depth for depth, rows in facts["rows_that_fit"].items() if not rows)
            add(
                "larger models",
                f"of --depth={least} with the default context not even one row is estimated to fit into "
                f"{human_bytes(facts['free_memory_bytes'])}",
                "a smaller --max-seq-len, or --activation-checkpointing",
            )
        if facts["compiler_problem"]:
            tools = (
                f"install {'gcc' if device == 'cuda' else 'g++'} and Python's headers (python3-dev)"
            )
            if device == "mps":
                tools = "--no-compile silences this"
            elif "triton" in facts["compiler_problem"]:  # missing, or made for newer GPUs
                tools = (
                    "pip install triton"
                    if "not installed" in facts["compiler_problem"]
                    else "a newer GPU"
                )
            add(
                "training, about by half",
                f"torch.compile cannot be used: {facts['compiler_problem']}",
                tools,
            )
        if facts["free_memory_bytes"] < LITTLE_MEMORY:
            add(
                "larger models and batches",
                f"{human_bytes(facts['free_memory_bytes'])} of memory are free",
                "end other programs, a small --depth or --max-seq-len",
            )
        for gpu in facts["gpus"]:
            if gpu["free_memory_bytes"] < 0.8 * gpu["memory_bytes"]:
                add(
                    f"{gpu['name']}",
                    f"other programs hold {human_bytes(gpu['memory_bytes'] - gpu['free_memory_bytes'])} of its memory",
                    "end them (nvidia-smi lists them)",
                )
    for what, place in facts["disk"].items():
        if place["free_bytes"] is not None and place["free_bytes"] < LITTLE_DISK:
            add(
                what,
                f"{human_bytes(place['free_bytes'])} free at {place['path']}",
                "NANOCHAT_BASE_DIR on another disk"
                if what == "caches"
                else "--out-dir on another disk, or --keep-last",
            )
    return found


def as_text(facts):
    """The facts of examine() as aligned lines."""
    lines = [("python", f"{facts['python']}, {facts['system']}")]
    lines.append(
        (
            "packages",
            ", ".join(
                f"{name} {version}"
                for name, version in facts["packages"].items()
                if version is not None
            ),
        )
    )
    for name in facts["missing"]:
        package, purpose = (NEEDED | OPTIONAL)[name]
        lines.append(
            (
                "missing" if name in NEEDED else "not installed",
                f"{name} ({purpose}): pip install '{package}'",
            )
        )
    if facts["device"] is not None:
        for gpu in facts["gpus"]:
            lines.append(
                (
                    "gpu",
                    f"{gpu['name']} (SM {gpu['capability']}), {human_bytes(gpu['free_memory_bytes'])} free of "
                    f"{human_bytes(gpu['memory_bytes'])}",
                )
            )
        lines.append(
            ("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads in torch")
        )
        lines.append(
            (
                "trains on",
                f"{facts['device']} in {facts['dtype']} ({facts['dtype_reason']}), "
                f"{human_bytes(facts['free_memory_bytes'])} of memory free",
            )
        )
        if facts["rows_that_fit"]:
            lines.append(
                (
                    f"rows of {CONTEXT:,}",
                    "estimated to fit at once: "
                    + ", ".join(
                        f"{rows} at depth {depth}"
                        for depth, rows in facts["rows_that_fit"].items()
                        if rows
                    ),
                )
            )
        lines.append(
            (
                "matrix products",
                ", ".join(
                    f"{name} {flops / 1e12:.3g} TFLOP/s" if flops else f"{name}: not on this device"
                    for name, flops in facts["matmul_flops"].items()
                ),
            )
        )
        lines.append(("torch.compile", facts["compiler_problem"] or "works"))
    for what, place in facts["disk"].items():
        free = "" if place["free_bytes"] is None else f"{human_bytes(place['free_bytes'])} free, "
        lines.append((what, f"{place['path']}: {free}{place['problem'] or 'can be written'}"))
    problem = facts["dataset_hub"]["problem"]
    lines.append(
        (
            "dataset hub",
            f"{facts['dataset_hub']['address']}: "
            + (
                f"not reached ({problem}); --data=python and files on this machine work without it"
                if problem
                else "answers"
            ),
        )
    )
    lines.append(
        (
            "Weights & Biases",
            f"key from {facts['wandb']}"
            if facts["wandb"]
            else "no key: --run=NAME would log offline; `wandb login` changes that",
        )
    )
    text = [f"{name:<18} {value}" for name, value in lines]
    text += [
        "",
        "what training needs and is missing here:"
        if facts["needed"]
        else "what training needs is here",
    ]
    text += [f"  {problem}" for problem in facts["needed"]]
    text += ["", "what will be slow here and why:" + ("" if facts["slow"] else " nothing")]
    text += [
        f"  {entry['what']}: {entry['why']}; remedy: {entry['remedy']}" for entry in facts["slow"]
    ]
    return "\n".join(text)
