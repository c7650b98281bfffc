"""`nanochat bench`: every part is measured, figures follow from one another, wrong requests are
refused. Speed itself is not tested."""

import json
import shutil

import pytest
import small
import torch

from nanochat import hardware
from nanochat.__main__ import main
from nanochat.apps import bench
from nanochat.apps.bench import text
from nanochat.apps.bench.core_prompts import longest_and_others
from nanochat.apps.bench.parts import PARTS
from nanochat.apps.bench.saving import Times, cost_of, time_saving
from nanochat.run.workload import Shape, TrainingStep, open_setup
from tasks.core import Task

TINY = [
    "--depth=2",
    "--aspect-ratio=16",
    "--head-dim=16",
    "--max-seq-len=64",
    "--vocab-size=300",
    "--device-batch-size=2",
    "--no-compile",
    "--repeats=2",
]


@pytest.fixture(autouse=True, scope="module")
def small_products():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "PEAK_SIZES", (64,))
        patch.setattr(text, "TEXT_BYTES", 100_000)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """JSON of every part."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    bundle = small.core_bundle(path.parent, n=2)
    assert main(["bench", *TINY, f"--out={path}", f"--core-bundle={bundle}"]) == 0
    return path


def test_every_part_can_be_named():
    assert set(PARTS) == {*bench.PARTS, *bench.ON_REQUEST}


def test_every_part_is_there_and_its_figures_fit_together(results):
    content = json.loads(results.read_text())
    table = {entry["name"]: entry for entry in content["results"]}
    assert {
        "step",
        "forward",
        "backward",
        "optimizer",
        "attention blocked, window 32",
        "attention sdpa, window 64",
        "attention, plain PyTorch, window 32",
        "loss",
        "loss, plain PyTorch",
        "tokenize",
        "rows",
        "decode, 1 text",
        "decode, 8 texts",
        "decode, 32 texts",
        "first token, prompt of 64",
        "start-up, --help",
        "core",
        "core, naive",
        "start-up, first step, cold",
        "start-up, first step, warm",
    } <= set(table)
    for entry in table.values():
        assert 0 < entry["fastest"] <= entry["seconds"] <= entry["slowest"] and entry["n"] >= 1
        if entry["flops_per_sec"]:
            share = entry["flops_per_sec"] / content["peak_flops"]
            assert entry["share_of_peak"] == pytest.approx(share)
    step, tokens = table["step"], 2 * 64
    assert step["tokens_per_sec"] == pytest.approx(tokens / step["seconds"])
    flops = tokens * content["flops_per_token"]
    assert step["flops_per_sec"] == pytest.approx(flops / step["seconds"])
    halves = [table["forward"], table["backward"]]
    assert sum(half["flops_per_sec"] * half["seconds"] for half in halves) == pytest.approx(flops)
    assert step["peak_memory_bytes"] >= table["forward"]["peak_memory_bytes"] > 0
    assert content["settings"]["depth"] == 2 and content["hardware"]["torch"] == torch.__version__


def test_the_result_line_of_files(results, tmp_path, capsys):
    shutil.copy(results, tmp_path / "d4.json")
    capsys.readouterr()
    assert main(["bench", "--result", str(tmp_path / "d4.json"), str(results)]) == 0
    words = capsys.readouterr().out.split()
    entries = json.loads(results.read_text())["results"]
    step = next(entry for entry in entries if entry["name"] == "step")
    assert words[0] == "RESULT" and len(words) == 5
    values = dict(word.split("=") for word in words[1:])
    assert float(values["d4_tok_per_sec"]) == round(step["tokens_per_sec"])
    assert float(values["tiny_share_of_peak"]) == pytest.approx(step["share_of_peak"], abs=1e-3)


@pytest.mark.parametrize("content", ["{}", "[]", '{"results": [{"name": "loss"}]}', "{"])
def test_files_without_a_step_are_refused(tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    assert main(["bench", "--result", str(tmp_path / "other.json")]) == 2
    assert "other.json" in capsys.readouterr().err


def test_keys_of_the_json(results):
    """Files of earlier versions are compared with, and scripts read them."""
    content = json.loads(results.read_text())
    assert list(content) == ["settings", "hardware", "peak_flops", "flops_per_token", "results"]
    assert list(content["settings"]) == [
        "dtype",
        "attention",
        "compiled",
        "arch",
        "depth",
        "aspect_ratio",
        "head_dim",
        "n_kv_head",
        "max_seq_len",
        "window_pattern",
        "short_window",
        "vocab_size",
        "device_batch_size",
        "activation_checkpointing",
        "fp8",
        "fp8_recipe",
    ]
    assert list(content["results"][0]) == [
        "name",
        "n",
        "seconds",
        "fastest",
        "slowest",
        "tokens_per_sec",
        "flops_per_sec",
        "share_of_peak",
        "peak_memory_bytes",
        "note",
    ]


def test_core_without_a_bundle(tmp_path, monkeypatch, capsys):
    """Skipped, and the output says so; nothing is downloaded."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert main(["bench", *TINY, "--only=core,loss"]) == 0
    shown = capsys.readouterr().out
    assert "core: skipped, because its bundle is not cached" in shown and "naive" not in shown
    assert not (tmp_path / "hub").exists()


def test_examples_of_core_are_the_longest_and_others():
    examples = [{"context": "x" * (i * 7 % 101), "continuation": "y"} for i in range(101)]
    task = Task("made up", None, "language_modeling", 0, " ", 0.0)
    places = longest_and_others(task, examples)
    lengths = [len(examples[place]["context"]) for place in places]
    assert len(set(places)) == 25 and lengths[:10] == list(range(100, 90, -1))
    assert lengths[10] == 90 and min(lengths) < 10
    assert len(longest_and_others(task, examples[:12])) == 10


def test_compared_with_an_earlier_run(results, capsys):
    assert main(["bench", *TINY, "--only=loss,step", f"--compare={results}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("times as fast as before") == 3
    assert "peak of matrix products in" in shown and "other settings" not in shown
    other = ["--depth=3", "--dtype=float32"]
    assert main(["bench", *TINY, "--only=loss", f"--compare={results}", *other]) == 0
    shown = capsys.readouterr().out
    changes = [line for line in shown.splitlines() if "other settings: " in line]
    # on a CPU without bf16 instructions the first run was in fp32 as well
    settings = changes[0].split("other settings: ")[1]
    assert settings.removeprefix("dtype bfloat16 (now float32), ") == "depth 2 (now 3)"


@pytest.mark.parametrize(
    "content",
    [
        '{"results": [{"name": "loss"}], "settings": {}}',
        '{"results": [{"name": "loss", "seconds": 0}], "settings": {}}',
        '{"results": [{"name": "loss", "seconds": null}], "settings": {}}',
        '{"results": []}',
        "[]",
    ],
)
def test_results_that_are_none_are_refused(tmp_path, capsys, content):
    (tmp_path / "other.json").write_text(content)
    assert main(["bench", *TINY, f"--compare={tmp_path}/other.json"]) == 2
    assert "other.json: not a file that nanochat bench wrote" in capsys.readouterr().err


def test_json_alone_on_standard_output(capsys):
    flags = ["--json", "--arch=llama", "--window-pattern=L", "--activation-checkpointing"]
    assert main(["bench", *TINY, "--only=forward", *flags]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [entry["name"] for entry in results] == ["forward"]


def test_what_saving_costs():
    shape = Shape("speedrun", 2, 16, 16, -1, 64, "L", -1, 300, 2)
    training = TrainingStep(open_setup(shape, compile=False))
    entries = {entry.name: entry for entry in time_saving(training, n_steps=60, save_every=10)}
    assert len(entries["save, first stall"].seconds) == 1
    assert len(entries["save, stall"].seconds) == 4
    assert len(entries["save, plain copy"].seconds) == 5
    steps = [entry for name, entry in entries.items() if name.startswith("step")]
    assert sum(len(entry.seconds) for entry in steps) == 60 - 21
    assert all(seconds > 0 for entry in entries.values() for seconds in entry.seconds)
    tensors = training.model.state_dict().values()
    assert "of state" in entries["save, stall"].note and len(tensors) > 0


def test_the_cost_of_saving_by_hand():
    """Ten steps of 2 s; two stalls of 1 s after the first; two steps that took 0.5 s longer."""
    times = Times([9.0, 1.0, 1.0], [], steps_alone=[2.0] * 8, steps_during_save=[2.5, 2.5])
    assert cost_of(times, 10) == pytest.approx(3 / 20)


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--total-batch-size=8192", "--depth=4", "--max-seq-len=512"]),
        (
            ["--no-compile", "--fp8", "--dtype=float32"],
            ["--dtype=float32", "--no-compile", "--fp8"],
        ),
        (["--arch=llama", "--window-pattern=LS"], ["--arch=llama"]),
    ],
)
def test_start_up_trains_what_is_timed(flags, words):
    args = vars(bench.parse_args(flags))
    found = bench.words_for_train(args)
    assert set(words) <= set(found)
    assert not any("window" in word for word in found)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only=step,speed"], "--only=speed: no such part; choose from step, forward"),
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--depth=2", "--aspect-ratio=16", "--head-dim=15"], "describe no model"),
        (["--depth=1", "--no-compile"], "head dim of 32 or 64, or a depth of 2\n--only=start-up"),
        (["--compare=nowhere.json"], "nowhere.json"),
        (["--compare=README.md"], "README.md"),
        (["--attention=fast"], "--attention=fast"),
        (["--fp8-recipe=rowwise"], "--fp8-recipe=rowwise: has no effect without --fp8"),
        (["--fp8", "--device-type=cpu", "--no-compile"], "train.py --dry-run --gpu=NAME"),
        (["--n-kv-head=0"], "--n-kv-head=0: must be at least 1, or -1"),
        (["--json", "--compare=README.md"], "--compare=README.md: adds a column to the table"),
        (["--out=nowhere/x.json"], "--out=nowhere/x.json: is a folder, or lies in a folder"),
        (["--out=tests"], "--out=tests: is a folder"),
        (["--only=loss", "--core-bundle=tests"], "--core-bundle=tests: --only does not name core"),
        (
            ["--only=core", "--core-bundle=tests", "--no-compile"],
            "--core-bundle=tests: no core.yaml",
        ),
        (["--vocab-size=100"], "--vocab-size=100: too small for a tokenizer; give at least 257"),
        (["--saving-steps=300"], "--saving-steps=300: --only does not name saving"),
        (["--only=saving", "--saving-steps=100"], "--saving-steps=100: too few for a second save"),
    ],
)
def test_refused(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err
