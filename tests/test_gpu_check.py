"""runs/gpu_check.py without a GPU: how rows are made of what checks find, what counts as wrong, what it refuses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.apps import bench

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runs"))
import gpu_check  # noqa: E402

sys.path.pop(0)


def values(rows):
    return {entry["what"]: entry["value"] for entry in rows}


class FakeBench:
    """Times as they might be on a GPU: 32 rows of 2,048 tokens in 100 ms, an update in 10 ms."""

    tokens, flops_per_token, peak, device = 32 * 2048, 6e8, 1e15, torch.device("cpu")

    def _timed(self, function):
        return {"seconds": [0.1, 0.1, 0.12], "memory": 0}

    def _loss(self):
        return torch.zeros((), requires_grad=True)

    def _step(self):
        pass

    def part_optimizer(self):
        yield {"name": "optimizer", "seconds": [0.010], "flops": 5e12}
        raise RuntimeError("no such kernel")


def test_training_speed_is_that_of_a_batch_of_many_micro_batches(monkeypatch):
    asked = []
    monkeypatch.setattr(
        bench,
        "make_bench",
        lambda args, say: (
            asked.append(args) or (FakeBench(), {"compiled": True, "attention": "flex"})
        ),
    )
    rows = list(gpu_check.check_training(12, "bf16", 989e12, 80e9))
    found, seconds = values(rows), 8 * 0.100 + 0.010  # 524,288 tokens are 8 times 32 rows of 2,048
    assert found["d12 bf16 speed"] == pytest.approx(524288 / seconds)
    assert found["d12 bf16 MFU"] == pytest.approx(100 * 524288 / seconds * 6e8 / 989e12)
    assert found["d12 optimizer share"] == pytest.approx(100 * 0.010 / seconds)
    assert (
        rows[-1]["what"] == "d12 optimizer, other kernel"
        and rows[-1]["wrong"]
        and "no such kernel" in rows[-1]["note"]
    )
    assert not any(entry["wrong"] for entry in rows[:-1])
    list(gpu_check.check_training(12, "fp8", 1e14, 24e9))
    list(gpu_check.check_training(24, "rowwise", 1e14, 15e9))
    assert [args.device_batch_size for args in asked] == [32, 8, 2] and [
        args.fp8 for args in asked
    ] == [False, True, True]
    assert (
        asked[2].fp8_recipe == "rowwise" and asked[2].depth == 24 and asked[2].max_seq_len == 2048
    )
    monkeypatch.setattr(
        bench,
        "make_bench",
        lambda args, say: (FakeBench(), {"compiled": False, "attention": "sdpa"}),
    )
    assert next(gpu_check.check_training(12, "bf16", 989e12, 80e9))["wrong"]


def test_what_follows_from_other_rows():
    found = {
        "d24 fp8 speed": 130.0,
        "d24 bf16 speed": 100.0,
        "d12 fp8 speed": 5.0,
        "attention triton, window 512, T = 512": 2.0,
        "attention, plain PyTorch, window 512, T = 512": 7.0,
        "attention triton, window 256, T = 512": 1.0,
        "attention triton, window 2048, T = 2048": 5.0,
        "attention sdpa, window 2048, T = 2048": 4.0,
        "attention sdpa_cudnn, not deterministic, window 2048, T = 2048": 3.0,
        "attention sdpa, window 1024, T = 2048": 8.0,
        "attention flex, window 1024, T = 2048": None,
        "attention triton, window 1024, T = 8192": 1.0,
        "attention sdpa, window 1024, T = 8192": 9.0,
    }  # cut off before full context
    assert values(gpu_check.conclusions(found)) == {
        "d24 fp8 / bf16 speed": 1.3,
        "plain PyTorch / triton, T = 512": 3.5,
        "full context / window, triton, T = 512": 2.0,
        "best library / triton, T = 2048": 0.6,
        "full context / window, sdpa, T = 2048": 0.5,
    }
    assert "[goal 3.1: met]" in gpu_check.shown(
        gpu_check.row("plain PyTorch / triton, T = 512", 3.5, "times")
    )
    assert "[goal 5: MISSED]" in gpu_check.shown(gpu_check.row("d12 optimizer share", 6.0, "%"))
    assert "goal" not in gpu_check.shown(
        gpu_check.row("d24 fp8 / bf16 speed", None)
    ) + gpu_check.shown(gpu_check.row("copies", 1.0))


@pytest.mark.parametrize(
    "tests, n, wrong",
    [
        ("def test_a(): pass\ndef test_b(): pass", 2, False),
        ("def test_a(): pass\ndef test_b(): 1 / 0", 1, True),
        ("x = 1", 0, True),
    ],
)
def test_kernel_tests_that_fail_or_do_not_run_are_wrong(tmp_path, tests, n, wrong):
    """Of a real pytest, with the options that pyproject.toml has and the command adds."""
    (tmp_path / "test_it.py").write_text(tests)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
        "test_it.py",
    ]
    entry = gpu_check.outcome(
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    )
    assert entry["value"] == n and entry["wrong"] == wrong
    assert ("::test_b" in entry["note"]) == (wrong and n == 1)
    assert gpu_check.outcome("")["wrong"]


def test_a_run_that_is_not_the_same_again_is_wrong():
    weights = {"a": torch.ones(2)}
    whole, of = {3: 1.0, 4: 0.5, 5: 0.25}, gpu_check.same_again
    entry = of(whole, {4: 0.5, 5: 0.25}, weights, {"a": torch.ones(2)}, 4)
    assert (entry["value"], entry["unit"], entry["wrong"]) == (2, "of 2", False)
    assert (
        of(whole, {4: 0.5}, weights, weights, 4)["wrong"]
        and of(whole, {4: 0.5, 5: 0.2500001}, weights, weights, 4)["wrong"]
    )
    assert of(whole, whole, weights, {"a": torch.tensor([1.0, 1.0000001])}, 4)["wrong"]


ROW = 'print(\'{"what": "a", "value": 1, "wrong": false}\', flush=True)'


@pytest.mark.parametrize(
    "code, says",
    [
        ("import sys; sys.exit('no such thing')", "exit code 1: no such thing"),
        ("print('{'); import os; os.abort()", "exit code -6: no message"),
        ("while True: pass", "stopped after 1 s"),
    ],
)
def test_what_breaks_costs_nothing_but_itself(code, says):
    other = (
        'print(7); print(\'{"what": "b", "value": NaN, "wrong": false, "note": "n"}\', flush=True)'
    )
    first, second, entry = gpu_check.run([sys.executable, "-c", f"{ROW}\n{other}\n{code}"], 1)
    assert second == {"what": "b", "value": None, "wrong": True, "note": "nan; n"}
    assert (
        first["what"] == "a"
        and entry["wrong"]
        and entry["note"] == says
        and "WRONG: " + says in gpu_check.shown(entry)
    )


def test_a_check_is_killed_with_all_that_it_started(tmp_path):
    """Nothing may run beside the next one. That --minutes are over is not wrong."""
    child = f"import time\nwhile True:\n    open({str(tmp_path / 'alive')!r}, 'a').write('x')\n    time.sleep(0.01)"
    (entry,) = gpu_check.run(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        ],
        1.5,
        True,
    )
    assert not entry["wrong"] and entry["note"] == "cut off after 2 s, the end of --minutes"
    size = (tmp_path / "alive").stat().st_size
    assert size
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        assert (tmp_path / "alive").stat().st_size == size


def test_a_check_that_raises_keeps_what_it_had():
    def check():
        yield gpu_check.row("a", 1.0)
        raise ValueError("second\nhalf")

    first, second = gpu_check.attempt("name", check)
    assert first["what"] == "a" and second["wrong"] and second["note"] == "ValueError: second half"


def test_only_what_the_machine_can_do_is_tried():
    facts = {"torchao": True, "triton": True, "pytest": True, "gpus": 2}
    assert [name for name in gpu_check.CHECKS if gpu_check.missing(name, facts)] == []
    facts = {"torchao": False, "triton": False, "pytest": False, "gpus": 1}
    left_out = {name for name in gpu_check.CHECKS if gpu_check.missing(name, facts)}
    assert left_out == {
        "kernels",
        "d12-fp8",
        "d20-fp8",
        "d24-fp8",
        "d24-rowwise",
        "resume-fp8",
        "d12-triton",
        "ranks",
        "tiles",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "finds no GPU; TOY=1 tries"),
        (["--only=speed"], "--only=speed: no such check; there are kernels"),
        (["--out=tests"], "tests"),
    ],
)
def test_refused_before_anything_is_done(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setattr(gpu_check, "TOY", bool(flags))
    monkeypatch.setattr(gpu_check, "run", None)
    assert gpu_check.main([f"--out={tmp_path}/found.json", *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gpu_check.sh: error: ") and says in shown and shown.count("\n") == 1


def toy(folder, *flags):
    command = ["bash", ROOT / "runs" / "gpu_check.sh", f"--out={folder}/sub/found.json", *flags]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"TOY": "1", "PYTHON": sys.executable},
    )


def test_toy(tmp_path):
    done = toy(tmp_path, "--only=loss,kernels")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sub" / "found.json").read_text())
    assert [entry.get("check") for entry in rows[-3:]] == ["loss", "loss", "kernels"] and not any(
        entry["wrong"] for entry in rows
    )
    assert done.stdout.splitlines()[-1] == f"RESULT toy=1 rows={len(rows)} wrong=0"


@pytest.mark.slow
def test_every_check_as_a_toy(tmp_path):
    done = toy(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        entry["what"]: entry for entry in json.loads((tmp_path / "sub" / "found.json").read_text())
    }
    assert {
        "d12 bf16 speed",
        "d24 bf16 MFU",
        "two ranks, largest difference of losses",
        "deterministic algorithms",
        "attention sdpa, window 16, T = 8192",
    } <= set(found)
    assert found["resumed, losses equal with =="]["value"] == 4
