"""--profile: a trace of a few steps, and where their time goes; compilations after the first."""

import contextlib
import io
import json

import pytest
import small
import torch

from nanochat import hardware
from nanochat.run.profiler import Profiler, describe

CPU = torch.device("cpu")
# a trace of an evaluation or of samples is a hundred times as large
STEPS_ALONE = ("--eval-every=-1", "--sample-every=-1")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """(folder, what was printed) of a run with --profile."""
    folder = tmp_path_factory.mktemp("profiled")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert small.run(folder, "--profile", *STEPS_ALONE) == 0
    return folder, shown.getvalue()


def test_a_trace_of_three_steps(profiled):
    folder, shown = profiled
    assert "where the time of the traced steps goes:" in shown and "profile of 3 steps" in shown
    table = (folder / "run" / "profile" / "table.txt").read_text()
    assert "aten::mm" in table and "matrix products" in table and "Self CPU" in table
    trace = json.loads((folder / "run" / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_profiling_does_not_change_the_numbers_of_a_run(profiled, tmp_path):
    assert small.run(tmp_path, *STEPS_ALONE) == 0
    assert small.losses(tmp_path) == small.losses(profiled[0])


def test_a_run_that_ends_while_it_is_traced(tmp_path, capsys):
    assert small.run(tmp_path, "--profile", "--num-iterations=5", *STEPS_ALONE) == 0
    assert "profile of 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "profile" / "trace.json").exists()


def profile_steps(folder, n, **options):
    """The lines that a Profiler reports of n small steps, the first of which is step 10."""
    reports = []
    profiler = Profiler(folder, CPU, report=reports.append, **options)
    for step in range(10, 10 + n):
        profiler.step(step)
        torch.ones(3) @ torch.ones(3)
    profiler.close()
    return reports


def test_a_run_too_short_to_trace(tmp_path):
    reports = profile_steps(tmp_path / "profile", 2, tracing=True)
    assert len(reports) == 1 and "ended before step 4 of this start" in reports[0]
    assert not (tmp_path / "profile").exists()


def test_a_full_disk_is_only_reported(tmp_path):
    (tmp_path / "file").write_text("")
    reports = profile_steps(tmp_path / "file", 8, tracing=True)
    assert len(reports) == 1 and reports[0].startswith("--profile: the trace cannot be written")


def test_compilations_after_the_first_step_are_reported(tmp_path):
    graphs = iter([4, 6, 6, 7])
    reports = profile_steps(tmp_path, 4, tracing=False, compilations=lambda: next(graphs))
    assert reports == ["step 12 took longer: torch.compile compiled 1 more graphs"]


def test_compilations_are_counted():
    before = hardware.compilations()
    torch.compile(lambda x: x + 1, dynamic=False, backend="eager")(torch.ones(3))
    assert hardware.compilations() == before + 1


class Entry:
    """A row of profile.key_averages()."""

    def __init__(self, key, time, memory=0):
        self.key = key
        self.self_cpu_time_total = time
        self.self_cpu_memory_usage = memory


class Averages(list):
    def table(self, sort_by, row_limit):
        return f"sorted by {sort_by}"


def test_kinds_of_work():
    entries = [
        Entry("aten::mm", 500.0),
        Entry("aten::bmm", 100.0),
        Entry("## Call CompiledFxGraph abc", 300.0, 2**20),
        Entry("aten::copy_", 50.0),
        Entry("aten::gather", 50.0),
        Entry("[memory]", 1e9),
    ]
    summary, table = describe(Averages(entries), "cpu")
    lines = summary.splitlines()
    assert [line.split()[-1] for line in lines[1:5]] == ["60.0%", "30.0%", "5.0%", "5.0%"]
    assert "matrix products" in lines[1] and "CompiledFxGraph abc: 1.0 MiB" in summary
    assert table.endswith("self_cpu_time_total")
