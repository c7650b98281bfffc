"""runs/gpu_check.py without a GPU: how rows are made of what checks print, what counts as wrong, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runs"))
import gpu_check  # noqa: E402


def bench_json(step, optimizer, tokens=2048):
    entries = [{"name": "step", "seconds": step, "n": 5, "peak_memory_bytes": 2**31}, {"name": "optimizer", "seconds": optimizer}]
    return json.dumps({"settings": {"max_seq_len": tokens, "attention": "flex"}, "flops_per_token": 6e8, "peak_flops": 1e15,
                       "results": entries})


def values(rows):
    return {entry["what"]: entry["value"] for entry in rows}


def test_training_speed_is_that_of_a_batch_of_many_micro_batches():
    check = gpu_check.training(12, "bf16", 989e12, 80e9, "--fp8")
    assert check.command[-4:] == ["--only=step,optimizer", "--depth=12", "--device-batch-size=32", "--fp8"]
    found = values(check.read(bench_json(step=0.110, optimizer=0.010)))
    seconds = 8 * 0.100 + 0.010  # 524,288 tokens are 8 times 32 rows of 2,048
    assert found["d12 bf16 speed"] == pytest.approx(524288 / seconds)
    assert found["d12 bf16 MFU"] == pytest.approx(100 * 524288 / seconds * 6e8 / 989e12)
    assert found["d12 optimizer share"] == pytest.approx(100 * 0.010 / seconds) and found["d12 bf16 memory"] == 2
    assert "--device-batch-size=8" in gpu_check.training(12, "bf16", 1e14, 24e9).command
    assert "--device-batch-size=1" in gpu_check.training(24, "bf16", 1e14, 15e9).command


def test_what_follows_from_other_rows():
    found = {"d24 fp8 speed": 130.0, "d24 bf16 speed": 100.0, "d12 fp8 speed": 5.0, "attention triton, window 512, T = 512": 2.0,
             "attention, plain PyTorch, window 512, T = 512": 7.0, "attention triton, window 256, T = 512": 1.0,
             "attention triton, window 2048, T = 2048": 5.0, "attention sdpa, window 2048, T = 2048": 4.0,
             "attention flex, window 2048, T = 2048": 4.5, "attention sdpa, window 1024, T = 2048": 1.0}
    assert values(gpu_check.conclusions(found)) == {"d24 fp8 / bf16": 1.3, "triton / plain PyTorch, T = 512": 3.5,
                                                    "triton / best library, T = 2048": 0.8}
    assert "[goal 3.1: met]" in gpu_check.shown(gpu_check.row("triton / plain PyTorch, T = 512", 3.5, "times"))
    assert "[goal 5: MISSED]" in gpu_check.shown(gpu_check.row("d12 optimizer share", 6.0, "%"))
    assert "goal" not in gpu_check.shown(gpu_check.row("d24 fp8 / bf16", None)) + gpu_check.shown(gpu_check.row("copies", 1.0))


@pytest.mark.parametrize("words, n, wrong", [
    ("12 passed, 3 deselected in 5.0s", 12, False), ("1 failed, 11 passed in 5s", 11, True), ("2 skipped in 1s", 0, True),
    ("3 passed, 1 error in 1s", 3, True)])
def test_kernel_tests_that_fail_or_do_not_run_are_wrong(words, n, wrong):
    entry, = gpu_check.kernel_tests().read(f"FAILED tests/a.py::b - x\n{words}\n")
    assert entry["value"] == n and entry["wrong"] == wrong and "tests/a.py::b" in entry["note"]


@pytest.mark.parametrize("code, says", [
    ("import sys; sys.exit('no such thing')", "exit code 1: no such thing"), ("print('[{]')", "exit code 0: [{]"),
    ("print('{}')", "exit code 0: {}"), ("while True: pass", "stopped after 1 s")])
def test_a_check_that_breaks_is_a_wrong_row(code, says):
    check = gpu_check.Check("name", 9, [sys.executable, "-c", code], lambda text: json.loads(text)["rows"])
    entry, = gpu_check.run(check, 1)
    assert entry["what"] == "name" and entry["wrong"] and entry["note"] == says and "WRONG: " + says in gpu_check.shown(entry)


def test_only_what_the_machine_can_do_is_tried():
    facts = {"memory_bytes": 80e9, "torchao": True, "triton": True, "gpus": 2}
    names = [check.name for check in gpu_check.all_checks(facts, 1e15)]
    assert names[:3] == ["kernels", "d12-bf16", "resume"] and {"d24-fp8", "ranks", "tiles", "d12-triton"} <= set(names)
    names = [check.name for check in gpu_check.all_checks({**facts, "torchao": False, "gpus": 1, "triton": False}, 1e15)]
    assert not {"d24-fp8", "d12-fp8", "d24-rowwise", "ranks", "tiles", "d12-triton"} & set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert gpu_check.main([]) == 2
    assert "finds no GPU; TOY=1 tries" in capsys.readouterr().err


def toy(folder, *flags):
    command = ["bash", ROOT / "runs" / "gpu_check.sh", f"--out={folder}/sub/found.json", *flags]
    return subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"TOY": "1", "PYTHON": sys.executable})


def test_toy(tmp_path):
    done = toy(tmp_path, "--only=loss")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sub" / "found.json").read_text())
    assert {entry.get("check") for entry in rows} == {None, "loss"} and not any(entry["wrong"] for entry in rows)
    assert done.stdout.splitlines()[-1] == f"RESULT rows={len(rows)} wrong=0"


@pytest.mark.slow
def test_every_check_as_a_toy(tmp_path):
    done = toy(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {entry["what"]: entry for entry in json.loads((tmp_path / "sub" / "found.json").read_text())}
    assert {"d12 bf16 speed", "d24 bf16 MFU", "two ranks, largest difference of losses", "deterministic algorithms"} <= set(found)
    assert found["resumed, losses equal with =="]["value"] == 8
    assert toy(tmp_path, "--only=speed").returncode == 2
