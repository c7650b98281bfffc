"""`nanochat doctor`: on this machine, on worse ones (simulated), and without optional packages."""

import dataclasses
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat import hardware
from nanochat.__main__ import main
from nanochat.apps import doctor
from nanochat.apps.doctor import advice, machine, packages, surroundings
from nanochat.apps.doctor.facts import Facts
from nanochat.apps.doctor.machine import GpuFacts, Machine
from nanochat.apps.doctor.surroundings import Hub, Place
from nanochat.apps.doctor.text import as_text
from nanochat.run import compiler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No network, no account, folders of its own."""
    for variable in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "NETRC",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.chdir(tmp_path)
        yield


def examined(capsys, *flags):
    """(exit code, facts) of a quick start with --json."""
    code = doctor.main(["--quick", "--json", *flags])
    return code, json.loads(capsys.readouterr().out)


def remarks(facts):
    return " | ".join(" ".join(remark) for remark in advice.slow(facts))


def test_this_machine(capsys, tmp_path):
    started = time.monotonic()
    code, facts = examined(capsys)
    assert code == 0 and facts["needed"] == [] and time.monotonic() - started < 15
    assert (
        facts["matmul_flops"]["float32"] > 1e9
        and facts["free_memory_bytes"] > 0
        and facts["cores"] >= 1
    )
    assert facts["packages"]["torch"] and facts["disk"]["caches"]["free_bytes"] > 0
    assert "refused" in facts["dataset_hub"]["problem"] and facts["wandb"] is None
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_keys_of_the_json(capsys):
    """In this order; without a working torch those of the machine are left out."""
    _, facts = examined(capsys)
    assert list(facts) == [
        "python",
        "system",
        "packages",
        "torch_error",
        "device",
        "missing",
        "gpus",
        "dtype",
        "dtype_reason",
        "cpu",
        "cpu_count",
        "cores",
        "threads",
        "bf16_cpu",
        "free_memory_bytes",
        "memory_limit",
        "cuda_build",
        "rows_that_fit",
        "matmul_flops",
        "compiler_problem",
        "disk",
        "dataset_hub",
        "wandb",
        "needed",
        "slow",
    ]
    assert list(facts["disk"]["runs"]) == ["path", "free_bytes", "problem"]
    assert list(facts["dataset_hub"]) == ["address", "problem"]
    assert all(list(remark) == ["what", "why", "remedy"] for remark in facts["slow"])


def test_text_and_a_real_compilation(monkeypatch, tmp_path):
    """In a process of its own, as a user starts it; imports of the module alone are light."""
    # other tests may have let torch set it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    code = (
        "import sys\nfrom nanochat.apps import doctor\nassert 'torch' not in sys.modules\n"
        "sys.exit(doctor.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=150,
        # inductor would try every vector instruction set, each with a compilation
        env={**os.environ, "TORCHINDUCTOR_VEC_ISA_OK": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\S.*?)  +(.*)$", done.stdout, re.MULTILINE))
    assert "TFLOP/s" in found["matrix products"] and "cores" in found["cpu"]
    if compiler.missing("cpu") is None:
        assert found["torch.compile"] == "works"
        # where training looks for it
        assert any((tmp_path / "base" / "compile").rglob("*.so"))
    assert "everything that training needs is here" in done.stdout
    assert "what will be slow here and why:" in done.stdout


GPU = GpuFacts("NVIDIA H100 80GB HBM3", 80e9, 79e9, "9.0")
GOOD_MACHINE = Machine(
    device="cuda",
    gpus=[GPU],
    dtype="bfloat16",
    dtype_reason="SM90",
    cpu="a CPU",
    cpu_count=32,
    cores=32,
    threads=32,
    bf16_cpu=True,
    free_memory_bytes=79e9,
    memory_limit="",
    cuda_build="13.0",
    compiler_problem=None,
    rows_that_fit={4: 512, 32: 4},
    matmul_flops={"float32": 5e13, "bfloat16": None},
)


def good_facts(has_nvidia_gpu=False, **changes):
    """Facts of a machine with one modern GPU, but for the changes."""
    place = Place("/data", 10**12, None)
    return Facts(
        python="3.12.1",
        system="Linux x86_64",
        packages={"torch": "2.13.0"},
        missing=[],
        torch_error=None,
        machine=dataclasses.replace(GOOD_MACHINE, **changes),
        disk={"caches": place, "runs": place},
        dataset_hub=Hub("x", None),
        wandb="WANDB_API_KEY",
        has_nvidia_gpu=has_nvidia_gpu,
    )


def test_nothing_is_slow_on_a_good_machine():
    facts = good_facts(has_nvidia_gpu=True)
    assert advice.slow(facts) == [] and advice.needed(facts) == []
    assert as_text(facts).endswith("what will be slow here and why: nothing")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": "float32"}, ["no bf16 matrix instructions", "they run in fp32", "Ampere"]),
        (
            {"dtype": "float16"},
            ["no bf16 matrix instructions", "fp16 in training, with loss scaling", "Ampere"],
        ),
        (
            {"rows_that_fit": {4: 128, 20: 0, 24: 0}, "free_memory_bytes": 15.8e9},
            ["at --depth=20", "not even one row", "14.7 GiB", "--max-seq-len"],
        ),
        (
            {"compiler_problem": "triton is not installed"},
            ["torch.compile cannot be used", "triton", "pip install triton"],
        ),
        (
            {"free_memory_bytes": 3e9},
            ["2.8 GiB of memory are free", "close other programs", "--depth"],
        ),
        (
            {"free_memory_bytes": 3e9, "memory_limit": "control group limit of 4.0 GiB"},
            ["2.8 GiB of memory are free (control group limit of 4.0 GiB)", "raise that limit"],
        ),
        (
            {"gpus": [GpuFacts("G", 80e9, 20e9, "9.0")]},
            ["other programs hold", "nvidia-smi"],
        ),
        (
            {"device": "cpu", "gpus": [], "bf16_cpu": False},
            ["no bf16 instructions", "fp32", "--depth"],
        ),
        (
            {"device": "cpu", "gpus": [], "cores": 2, "threads": 1},
            ["only 2 cores", "torch uses 1 of 2", "OMP_NUM_THREADS"],
        ),
        (
            {"device": "cpu", "gpus": [], "cores": 1, "threads": 1},
            ["only 1 core can be used of the machine's 32", "CPU quota", "raise that limit"],
        ),
        (
            {"device": "cpu", "gpus": [], "compiler_problem": "no C++ compiler (g++) on PATH"},
            ["g++", "python3-dev"],
        ),
        (
            {"device": "mps", "gpus": [], "compiler_problem": "not reliable on mps"},
            ["--no-compile"],
        ),
    ],
)
def test_what_will_be_slow(changes, words):
    found = remarks(good_facts(**changes))
    assert all(word in found for word in words), found


def test_little_disk():
    facts = good_facts()
    facts.disk["caches"] = Place("/c", 10**9, None)
    found = remarks(facts)
    assert "free at /c" in found and "NANOCHAT_BASE_DIR" in found


def test_a_t4(monkeypatch):
    """A GPU of 16 GB without bf16: what it trains in, what fits, what is slow. Simulated."""
    import torch

    gpu = torch.device("cuda")
    properties = {
        "device_count": lambda: 1,
        "mem_get_info": lambda index=0: (15.6e9, 15.8e9),
        "get_device_name": lambda index=0: "Tesla T4",
        "get_device_capability": lambda index=0: (7, 5),
    }
    for name, value in properties.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(hardware, "pick_device_type", lambda requested: gpu.type)
    monkeypatch.setattr(hardware, "matmul_flops", lambda device, dtype, n, repeats: 1e12)
    monkeypatch.setattr(compiler, "missing", lambda device_type: None)
    facts = good_facts()
    facts.machine = machine.examine_machine(quick=True)
    assert facts.machine.dtype == "float16"
    assert set(facts.machine.matmul_flops) == {"float32", "bfloat16", "float16"}
    rows = facts.machine.rows_that_fit
    assert rows[4] > rows[12] >= 1 and rows[24] == 0
    facts.slow = advice.slow(facts)
    shown = as_text(facts)
    assert f"{rows[4]} at depth 4" in shown and "at depth 24" not in shown
    assert "cuda in float16 (SM75 has no bf16" in shown
    assert "Tesla T4 has no bf16 matrix instructions" in shown and "not even one row" in shown


def test_an_idle_gpu():
    changes = {"has_nvidia_gpu": True, "device": "cpu", "gpus": []}
    assert "build for CPUs" in remarks(good_facts(**changes, cuda_build=None))
    assert "driver" in remarks(good_facts(**changes))


def hide(monkeypatch, *names):
    """Make packages look as if they were not installed."""
    import importlib.metadata
    import importlib.util

    version, find_spec = importlib.metadata.version, importlib.util.find_spec

    def no_version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", no_version)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in names else find_spec(name, *rest),
    )


def test_optional_packages_are_named_with_their_pip_line(capsys, monkeypatch):
    hide(monkeypatch, *packages.OPTIONAL)
    assert doctor.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    for name in set(packages.OPTIONAL) - {"triton"}:
        line = rf"^not installed +{name} \(.*\): pip install '{name}"
        assert re.search(line, shown, re.MULTILINE)


def test_triton_is_missing_where_there_is_a_gpu():
    versions = {"torch": "2.13.0", "triton": None, "wandb": None}
    assert packages.missing(versions, has_nvidia_gpu=False) == ["wandb"]
    assert packages.missing(versions, has_nvidia_gpu=True) == ["triton", "wandb"]


def test_needed_packages(capsys, monkeypatch):
    hide(monkeypatch, "torch", "tiktoken")
    code, facts = examined(capsys)
    assert code == 1 and len(facts["needed"]) == 2 and "pip install 'torch==" in facts["needed"][0]
    assert facts["device"] is None and "cpu" not in facts
    assert doctor.main(["--quick"]) == 1
    shown = capsys.readouterr().out
    assert "training needs these, and they are missing here:\n  the package 'torch'" in shown


def test_a_broken_torch(capsys, monkeypatch):
    def broken(requested):
        raise OSError("libcudart.so.13: cannot open\nshared object file")

    monkeypatch.setattr(hardware, "pick_device_type", broken)
    code, facts = examined(capsys)
    assert code == 1
    problem = "torch does not work here (libcudart.so.13: cannot open shared object file)"
    assert problem in facts["needed"][0]


def test_folders_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    code, facts = examined(capsys, f"--out-dir={tmp_path}/file/out")
    assert code == 1 and len(facts["needed"]) == 2
    assert "NANOCHAT_BASE_DIR" in facts["needed"][0] and "--out-dir" in facts["needed"][1]


def test_a_full_disk(capsys, monkeypatch):
    import shutil

    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**6))
    code, facts = examined(capsys)
    assert code == 1 and "only 976.6 KiB free" in facts["needed"][0]


def test_a_failing_compiler(monkeypatch, tmp_path):
    """Doctor tries what training tries, in the same folder; --quick only looks for the tools."""
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "KINETO_LOG_LEVEL"):
        # set first: what was not set is not restored after the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    tried = []

    def fails(device_type):
        tried.append((device_type, os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        return "no space left"

    monkeypatch.setattr(compiler, "missing", lambda device_type: None)
    monkeypatch.setattr(compiler, "problem", fails)
    assert machine.compiler_problem("cpu", quick=True) is None and tried == []
    assert machine.compiler_problem("cpu", quick=False) == "no space left"
    assert tried == [("cpu", str(tmp_path / "base" / "compile"))]


def test_no_folder_for_kernels(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    found = machine.compiler_problem("cpu", quick=False)
    assert found.startswith("there is no folder for compiled kernels (NANOCHAT_BASE_DIR=")


@pytest.mark.parametrize(
    "problem, remedy",
    [
        ("g++: fatal error: cannot execute 'cc1plus'", "install g++ and Python's headers"),
        ("torch does not quote the blanks in /a b", "a folder without blanks"),
        ("/base/compile is mounted noexec", "TORCHINDUCTOR_CACHE_DIR"),
        ("/base/compile has no file locks", "TORCHINDUCTOR_CACHE_DIR"),
        ("x.i: No space left on device", "free some space"),
        ("[Errno 13] Permission denied: '/c'", "folders of your own"),
        ("PATH is not set", "set PATH"),
    ],
)
def test_remedies_for_the_compiler(problem, remedy):
    facts = good_facts(device="cpu", gpus=[], compiler_problem=problem)
    (found,) = [remark for remark in advice.slow(facts) if problem in remark.why]
    assert remedy in found.remedy


def test_limits_are_shown(monkeypatch):
    shown = as_text(good_facts(cores=2, threads=2, memory_limit="ulimit -v of 1.0 GiB"))
    assert "2 of 32 cores (CPU quota or affinity mask), 2 threads in torch" in shown
    assert "of memory free (ulimit -v of 1.0 GiB)" in shown


class Answers(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.asked.append(self.path)
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("code, problem", [(200, None), (403, None), (503, "error 503")])
def test_the_hub_answers(monkeypatch, code, problem):
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.code, server.asked = code, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", here)
        assert surroundings.ask_hub()() == Hub(here, problem)
        # through a proxy, which looks the name up
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
        monkeypatch.setenv("http_proxy", here)
        assert surroundings.ask_hub()().problem == problem
        assert server.asked[-1].startswith("http://hub.example")
        server.shutdown()


def test_the_hub_that_never_answers(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        problem = surroundings.ask_hub(seconds=1)().problem
        assert ("no answer" in problem or "timed out" in problem) and time.monotonic() - started < 3


def test_the_hub_switched_off_or_misspelt(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "huggingface")
    assert "unknown url type" in surroundings.ask_hub()().problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert surroundings.ask_hub()().problem == "HF_HUB_OFFLINE is set"


def test_wandb_keys_are_found_and_never_shown(capsys, monkeypatch, tmp_path):
    key = "k" * 40
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert surroundings.wandb_account() == "~/.netrc"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert surroundings.wandb_account() is None
    monkeypatch.setenv("WANDB_API_KEY", key)
    assert doctor.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    assert "key from WANDB_API_KEY" in shown and key not in shown


def test_packages_are_those_of_pyproject():
    """Names and versions, hard dependencies and extras alike."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(package for extra in project["optional-dependencies"].values() for package in extra),
    ]
    assert {package.split(";")[0] for package in declared} == {
        package.requirement for package in (packages.NEEDED | packages.OPTIONAL).values()
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only=loss"], "--only: has no effect without --gpu; add --gpu, or leave it out"),
        (["--minutes=2"], "--minutes: has no effect without --gpu"),
        (["--out=x.json"], "--out: has no effect without --gpu"),
        (["--gpu", "--quick"], "--quick: has no effect with --gpu; leave one of them out"),
        (["--gpu", "--json"], "--json: has no effect with --gpu"),
        (["--gpu", "--out-dir=x"], "--out-dir: has no effect with --gpu"),
    ],
)
def test_flags_of_the_other_use_are_refused(flags, message, capsys):
    assert main(["doctor", *flags]) == 2
    assert message in capsys.readouterr().err
