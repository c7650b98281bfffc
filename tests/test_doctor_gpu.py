"""`nanochat doctor --gpu` without a GPU: how rows follow from what checks find, what counts as
wrong, what is refused."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.__main__ import main
from nanochat.apps.doctor import gpu, gpu_checks
from nanochat.apps.doctor.gpu_table import GpuMachine, Row, attempt, conclusions
from nanochat.run.timing import Entry

ROOT = Path(__file__).resolve().parent.parent


def values(rows):
    return {row.what: row.value for row in rows}


class FakeTraining:
    """Times as they might be on a GPU: 32 rows of 2,048 tokens in 100 ms, an update in 10 ms."""

    setup = SimpleNamespace(
        tokens=32 * 2048,
        flops_per_token=6e8,
        device=torch.device("cpu"),
        attention="flex",
        shape=SimpleNamespace(device_batch_size=32),
        config=SimpleNamespace(max_seq_len=2048),
    )

    def time_accumulation(self, repeats):
        return Entry("micro-batch", [0.1, 0.1, 0.12])

    def time_update(self, repeats):
        return Entry("optimizer", [0.010], flops=5e12)

    def step(self):
        pass

    def forward_backward(self):
        pass


def test_training_speed_is_that_of_a_batch_of_many_micro_batches():
    rows = list(gpu_checks.rows_of_training(FakeTraining(), "d12 bf16", 989e12, "listed", 3, 3))
    found, seconds = values(rows), 8 * 0.100 + 0.010  # 524,288 tokens are 8 times 32 rows of 2,048
    assert found["d12 bf16 speed"] == pytest.approx(524288 / seconds)
    assert found["d12 bf16 MFU"] == pytest.approx(100 * 524288 / seconds * 6e8 / 989e12)
    assert found["d12 optimizer share"] == pytest.approx(100 * 0.010 / seconds)
    assert "32 rows of 2048 per pass, flex attention; 8 times 100.0 ms" in rows[0].note
    assert not any(row.wrong for row in rows)
    others = gpu_checks.rows_of_training(FakeTraining(), "d12 fp8", 989e12, "listed", 3, 3)
    assert "optimizer" not in " ".join(values(others))


def test_rows_that_a_gpu_takes_at_once():
    sizes = [(12, 80e9), (12, 24e9), (24, 15e9)]
    assert [gpu_checks.rows_at_once(depth, memory) for depth, memory in sizes] == [32, 8, 2]


def test_what_is_trained(monkeypatch):
    """The shapes that are asked for; without a compiler the figure is wrong."""
    asked = []

    def open_setup(shape, **runtime):
        asked.append((shape, runtime))
        return SimpleNamespace(compiled=False, device=torch.device("cpu"), dtype=torch.float32)

    monkeypatch.setattr(gpu_checks, "open_setup", open_setup)
    monkeypatch.setattr(gpu_checks, "TrainingStep", lambda setup: FakeTraining())
    for depth, kind in ((24, "rowwise"), (12, "triton")):
        rows = gpu_checks.check_training(depth, kind, 1e14, 15e9, gpu_checks.FULL)
        assert next(rows).wrong and not next(rows).wrong
    (rowwise, _), (triton, runtime) = asked
    assert (rowwise.fp8, rowwise.fp8_recipe, rowwise.depth) == (True, "rowwise", 24)
    assert (rowwise.max_seq_len, rowwise.device_batch_size) == (2048, 2)
    assert (triton.fp8, runtime["attention"]) == (False, "triton")


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
    assert values(conclusions(found)) == {
        "d24 fp8 / bf16 speed": 1.3,
        "plain PyTorch / triton, T = 512": 3.5,
        "full context / window, triton, T = 512": 2.0,
        "best library / triton, T = 2048": 0.6,
        "full context / window, sdpa, T = 2048": 0.5,
    }


def test_goals_stand_in_the_table():
    fast = Row("plain PyTorch / triton, T = 512", 3.5, "times")
    assert "[goal 3.1: met]" in fast.as_text() and "goal" not in fast.as_text(toy=True)
    assert "[goal 5: MISSED]" in Row("d12 optimizer share", 6.0, "%").as_text()
    for row in (Row("d24 fp8 / bf16 speed", None), Row("copies", 1.0)):
        assert "goal" not in row.as_text()


def test_keys_of_the_json():
    """Those of a row; the first row also has what the machine is."""
    keys = ["what", "value", "unit", "note", "wrong"]
    assert list(Row("copies", 1.0).as_json()) == keys
    assert list(Row("copies", 1.0, check="loss").as_json()) == [*keys, "check"]
    machine = GpuMachine({"gpu": "H100"}, True, False, True, True, gpus=2, memory_bytes=80)
    row = Row("machine", None, facts=machine.as_json(), peak=1e15)
    assert list(row.as_json()) == [*keys, "facts", "peak"]
    assert GpuMachine.from_json(json.loads(json.dumps(row.facts))) == machine


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
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    row = gpu_checks.row_of_pytest(done.stdout)
    assert row.value == n and row.wrong == wrong
    assert ("::test_b" in row.note) == (wrong and n == 1)


def test_pytest_that_prints_nothing_is_wrong():
    assert gpu_checks.row_of_pytest("").wrong


def test_a_run_that_is_not_the_same_again_is_wrong():
    weights, whole = {"a": torch.ones(2)}, {3: 1.0, 4: 0.5, 5: 0.25}

    def row(again, weights_again):
        return gpu_checks.same_again("same", whole, again, weights, weights_again, half=4)

    same = row({4: 0.5, 5: 0.25}, {"a": torch.ones(2)})
    assert (same.value, same.unit, same.wrong) == (2, "of 2", False)
    assert row({4: 0.5}, weights).wrong and row({4: 0.5, 5: 0.2500001}, weights).wrong
    assert row(whole, {"a": torch.tensor([1.0, 1.0000001])}).wrong


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
    program = f"{ROW}\n{other}\n{code}"
    first, second, last = gpu.rows_of_process([sys.executable, "-c", program], 1)
    assert second == Row("b", None, note="nan; n", wrong=True)
    assert first == Row("a", 1) and last.wrong and last.note == says
    assert "WRONG: " + says in last.as_text()


def test_a_check_is_killed_with_all_that_it_started(tmp_path):
    """Nothing may run beside the next one. That --minutes are over is not wrong."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile 1:\n    open({str(alive)!r}, 'a').write('x')\n    time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (row,) = gpu.rows_of_process([sys.executable, "-c", parent], 1.5, cut_off=True)
    assert not row.wrong and row.note == "cut off after 2 s, the end of --minutes"
    size = alive.stat().st_size
    assert size
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        assert alive.stat().st_size == size


def test_a_check_that_raises_keeps_what_it_had():
    def check():
        yield Row("a", 1.0)
        raise ValueError("second\nhalf")

    first, second = attempt("name", check)
    assert first.what == "a" and second.wrong and second.note == "ValueError: second half"


def unable_on(**facts):
    machine = GpuMachine({}, memory_bytes=80e9, xdist=True, **facts)
    return {name for name in gpu.CHECKS if gpu.unable(name, machine, toy=False)}


def test_what_only_compiles_runs_first_and_side_by_side():
    names = ["d12-bf16", "kernels", "loss", "warm-12"]
    assert gpu.groups(names) == [["kernels", "warm-12"], ["d12-bf16"], ["loss"]]
    assert gpu.groups(names[:1]) == [["d12-bf16"]]


def test_a_variant_is_set_for_its_measurement_alone():
    """Every variant but the first sets something that exists to another value."""
    for name, settings in gpu_checks.VARIANTS.items():
        assert (name == "as it is") == (not settings)

        def values(settings=settings):
            return [getattr(importlib.import_module(where), what) for where, what, _ in settings]

        before = values()
        with gpu_checks.switched(settings):
            assert values() == [value for _, _, value in settings]
        assert values() == before


def test_only_what_the_machine_can_do_is_tried():
    assert unable_on(torchao=True, triton=True, pytest=True, gpus=2) == set()
    assert unable_on(torchao=False, triton=False, pytest=False, gpus=1) == {
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
        ([], "finds no GPU; run it on a machine with one (TOY=1 tests"),
        (["--only=speed"], "--only=speed: no such check; choose from kernels"),
        (["--out=tests"], "--out=tests: cannot be written"),
    ],
)
def test_refused_before_anything_is_done(tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.setenv("TOY", str(len(flags)))
    monkeypatch.setattr(gpu, "rows_of_process", None)
    assert main(["doctor", "--gpu", f"--out={tmp_path}/found.json", *flags]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("nanochat doctor: error: ") and says in shown and shown.count("\n") == 1


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
    assert [row.get("check") for row in rows[-3:]] == ["kernels", "loss", "loss"] and not any(
        row["wrong"] for row in rows
    )
    assert done.stdout.splitlines()[-1] == f"RESULT toy=1 rows={len(rows)} wrong=0"


@pytest.mark.slow
def test_every_check_as_a_toy(tmp_path):
    done = toy(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "sub" / "found.json").read_text())
    found = {row["what"]: row for row in rows}
    assert {
        "d12 bf16 speed",
        "d24 bf16 MFU",
        "two ranks, largest difference of losses",
        "deterministic algorithms",
        "attention sdpa, window 16, T = 8192",
    } <= set(found)
    assert found["resumed, losses equal with =="]["value"] == 4
