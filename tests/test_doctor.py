"""nanochat doctor: on this machine, on worse ones (simulated), and without the packages it could do without."""

import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanochat import hardware
from nanochat.apps import doctor

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
    return " | ".join(" ".join(entry.values()) for entry in facts["slow"])


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


def test_text_and_a_real_compilation():
    """In a process of its own, as a user starts it; imports of the module alone are light."""
    code = (
        "import sys\nfrom nanochat import doctor\nassert 'torch' not in sys.modules\n"
        "sys.exit(doctor.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\S.*?)  +(.*)$", done.stdout, re.MULTILINE))
    assert "TFLOP/s" in found["matrix products"] and "cores" in found["cpu"]
    if hardware.compiler_missing("cpu") is None:
        assert found["torch.compile"] == "works"
    assert (
        "what training needs is here" in done.stdout
        and "what will be slow here and why:" in done.stdout
    )


def test_nothing_is_slow_on_a_good_machine(capsys, monkeypatch):
    facts = good_gpu()
    assert doctor.slow(facts) == [] and doctor.needed(facts) == []
    assert doctor.as_text({**facts, "slow": [], "needed": []}).endswith(
        "what will be slow here and why: nothing"
    )


def good_gpu(**changes):
    """Facts of a machine with one modern GPU."""
    gpu = {
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 80e9,
        "free_memory_bytes": 79e9,
        "capability": "9.0",
    }
    place = {"path": "/data", "free_bytes": 10**12, "problem": None}
    return {
        "python": "3.12.1",
        "system": "Linux x86_64",
        "packages": {"torch": "2.13.0"},
        "missing": [],
        "torch_error": None,
        "device": "cuda",
        "gpus": [gpu],
        "dtype": "bfloat16",
        "dtype_reason": "SM90",
        "cpu": "a CPU",
        "cores": 32,
        "threads": 32,
        "bf16_cpu": True,
        "free_memory_bytes": 79e9,
        "cuda_build": "13.0",
        "compiler_problem": None,
        "rows_that_fit": {4: 512, 32: 4},
        "matmul_flops": {"float32": 5e13, "bfloat16": None},
        "disk": {"caches": place, "runs": place},
        "dataset_hub": {"address": "x", "problem": None},
        "wandb": "WANDB_API_KEY",
    } | changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": "float32"}, ["no bf16 matrix instructions", "they run in fp32", "Ampere"]),
        (
            {"dtype": "float16"},
            ["no bf16 matrix instructions", "fp16 in training, whose loss is scaled", "Ampere"],
        ),
        (
            {"rows_that_fit": {4: 128, 20: 0, 24: 0}, "free_memory_bytes": 15.8e9},
            ["of --depth=20", "not even one row", "14.7 GiB", "--max-seq-len"],
        ),
        (
            {"compiler_problem": "triton is not installed"},
            ["torch.compile cannot be used", "triton", "pip install triton"],
        ),
        ({"free_memory_bytes": 3e9}, ["2.8 GiB of memory are free", "--depth"]),
        (
            {
                "gpus": [
                    {
                        "name": "G",
                        "memory_bytes": 80e9,
                        "free_memory_bytes": 20e9,
                        "capability": "9.0",
                    }
                ]
            },
            ["other programs hold", "nvidia-smi"],
        ),
        (
            {"disk": {"caches": {"path": "/c", "free_bytes": 10**9, "problem": None}}},
            ["free at /c", "NANOCHAT_BASE_DIR"],
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
            {"device": "cpu", "gpus": [], "compiler_problem": "no C++ compiler (g++) on PATH"},
            ["g++", "python3-dev"],
        ),
        (
            {"device": "mps", "gpus": [], "compiler_problem": "not reliable on mps"},
            ["--no-compile"],
        ),
    ],
)
def test_what_will_be_slow(monkeypatch, changes, words):
    monkeypatch.setattr(doctor, "nvidia_gpu_present", lambda: False)
    found = remarks({"slow": doctor.slow(good_gpu(**changes))})
    assert all(word in found for word in words), found


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
    monkeypatch.setattr(hardware, "compiler_missing", lambda device_type: None)
    facts = good_gpu(**doctor.machine(quick=True))
    assert facts["dtype"] == "float16" and set(facts["matmul_flops"]) == {
        "float32",
        "bfloat16",
        "float16",
    }
    rows = facts["rows_that_fit"]
    assert rows[4] > rows[12] >= 1 and rows[24] == 0
    facts |= {"slow": doctor.slow(facts), "needed": []}
    shown = doctor.as_text(facts)
    assert (
        f"{rows[4]} at depth 4" in shown
        and "at depth 24" not in shown
        and "cuda in float16 (SM75 has no bf16" in shown
    )
    assert "Tesla T4 has no bf16 matrix instructions" in shown and "not even one row" in shown


def test_an_idle_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpu_present", lambda: True)
    assert "build for CPUs" in remarks(
        {"slow": doctor.slow(good_gpu(device="cpu", gpus=[], cuda_build=None))}
    )
    assert "driver" in remarks({"slow": doctor.slow(good_gpu(device="cpu", gpus=[]))})


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
    hide(monkeypatch, *doctor.OPTIONAL)
    monkeypatch.setattr(doctor, "nvidia_gpu_present", lambda: False)
    assert doctor.main(["--quick"]) == 0
    shown = capsys.readouterr().out
    for name in set(doctor.OPTIONAL) - {"triton"}:
        assert re.search(
            rf"^not installed +{name} \(.*\): pip install '{name}", shown, re.MULTILINE
        )
    assert "triton" not in shown


def test_needed_packages(capsys, monkeypatch):
    hide(monkeypatch, "torch", "tiktoken")
    code, facts = examined(capsys)
    assert (
        code == 1
        and len(facts["needed"]) == 2
        and "pip install 'torch==" in facts["needed"][0]
        and facts["device"] is None
    )
    assert doctor.main(["--quick"]) == 1
    assert (
        "what training needs and is missing here:\n  the package 'torch' is missing"
        in capsys.readouterr().out
    )


def test_a_broken_torch(capsys, monkeypatch):
    def broken(requested):
        raise OSError("libcudart.so.13: cannot open\nshared object file")

    monkeypatch.setattr(hardware, "pick_device_type", broken)
    code, facts = examined(capsys)
    assert (
        code == 1
        and "torch does not work here (libcudart.so.13: cannot open shared object file)"
        in facts["needed"][0]
    )


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


def test_a_failing_compiler(monkeypatch):
    monkeypatch.setattr(doctor, "COMPILE_TEST", "raise RuntimeError('g++ is not what it was')")
    assert (
        doctor.trial_compilation("cpu")
        == "compiling a small function failed: RuntimeError: g++ is not what it was"
    )
    monkeypatch.setattr(doctor, "COMPILE_TEST", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "COMPILE_SECONDS", 1)
    assert "not compiled within 1 s" in doctor.trial_compilation("cpu")


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
        assert doctor.ask_hub()() == {"address": here, "problem": problem}
        monkeypatch.setenv(
            "HF_ENDPOINT", "http://hub.example"
        )  # through a proxy, which looks the name up
        monkeypatch.setenv("http_proxy", here)
        assert doctor.ask_hub()()["problem"] == problem and server.asked[-1].startswith(
            "http://hub.example"
        )
        server.shutdown()


def test_the_hub_that_never_answers(monkeypatch):
    monkeypatch.setattr(doctor, "NETWORK_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        problem = doctor.ask_hub()()["problem"]
        assert ("no answer" in problem or "timed out" in problem) and time.monotonic() - started < 3


def test_the_hub_switched_off_or_misspelt(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "huggingface")
    assert "unknown url type" in doctor.ask_hub()()["problem"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.ask_hub()()["problem"] == "HF_HUB_OFFLINE is set"


def test_wandb_keys_are_found_and_never_shown(capsys, monkeypatch, tmp_path):
    key = "k" * 40
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert doctor.wandb_account() == "~/.netrc"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert doctor.wandb_account() is None
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
        pip for pip, _ in (doctor.NEEDED | doctor.OPTIONAL).values()
    }
