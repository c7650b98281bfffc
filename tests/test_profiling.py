"""--profile: files of a few steps and where their time goes; compilations after the first step are told."""

import json

import small
import torch

from nanochat import hardware
from nanochat.run import profiler as profiling


def test_a_trace_of_three_steps(tmp_path, capsys):
    assert small.run(tmp_path, "--profile") == 0
    shown = capsys.readouterr().out
    assert "where the time of the traced steps goes:" in shown and "profile of 3 steps" in shown
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert "aten::mm" in table and "matrix products" in table and "Self CPU" in table
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_the_numbers_of_a_run_do_not_change(tmp_path):
    assert small.run(tmp_path, "--profile") == 0
    assert small.run(tmp_path, tag="plain") == 0
    assert small.losses(tmp_path) == small.losses(tmp_path, tag="plain")


def test_a_run_too_short_to_show_anything(tmp_path, capsys):
    assert small.run(tmp_path, "--profile", "--num-iterations=2", "--total-batch-size=32") == 0
    assert "ended before step 4 of this start" in capsys.readouterr().out
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_that_ends_while_it_is_traced(tmp_path, capsys):
    assert small.run(tmp_path, "--profile", "--num-iterations=5") == 0
    assert (
        "profile of 2 steps" in capsys.readouterr().out
        and (tmp_path / "run" / "profile" / "trace.json").exists()
    )


def test_a_full_disk_is_only_reported(tmp_path):
    said = []
    (tmp_path / "file").write_text("")
    profiler = profiling.Profiler(tmp_path / "file", torch.device("cpu"), True, said.append)
    for step in range(8):
        profiler.step(step)
        torch.ones(3) @ torch.ones(3)
    profiler.close()
    assert len(said) == 1 and said[0].startswith("--profile: the trace cannot be written")


def test_kinds_of_work():
    class Entry:
        def __init__(self, key, time, memory=0):
            self.key, self.self_cpu_time_total, self.self_cpu_memory_usage = key, time, memory

    class Averages(list):
        def table(self, sort_by, row_limit):
            return f"sorted by {sort_by}"

    summary, table = profiling.describe(
        Averages(
            [
                Entry("aten::mm", 500.0),
                Entry("aten::bmm", 100.0),
                Entry("## Call CompiledFxGraph abc", 300.0, 2**20),
                Entry("aten::copy_", 50.0),
                Entry("aten::gather", 50.0),
                Entry("[memory]", 1e9),
            ]
        ),
        "cpu",
    )
    assert [line.split()[-1] for line in summary.splitlines()[1:5]] == [
        "60.0%",
        "30.0%",
        "5.0%",
        "5.0%",
    ]
    assert (
        "matrix products" in summary.splitlines()[1] and "CompiledFxGraph abc: 1.0 MiB" in summary
    )
    assert table.endswith("self_cpu_time_total")


def test_compilations_after_the_first_step_are_told(tmp_path, monkeypatch):
    said, graphs = [], iter([4, 6, 6, 7])
    monkeypatch.setattr(hardware, "compilations", lambda: next(graphs))
    profiler = profiling.Profiler(tmp_path, torch.device("cpu"), False, said.append)
    for step in range(10, 14):
        profiler.step(step)
    assert said == ["step 12: torch.compile made 1 more graphs, which took its time"]


def test_compilations_are_counted():
    before = hardware.compilations()
    torch.compile(lambda x: x + 1, dynamic=False, backend="eager")(torch.ones(3))
    assert hardware.compilations() == before + 1
