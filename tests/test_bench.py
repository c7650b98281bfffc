"""`nanochat bench`: every part is measured, figures follow from one another, wrong requests are
refused. Speed itself is not tested."""

import dataclasses
import importlib.util
import json
import math
import shutil
import signal
import subprocess

import pytest
import small
import torch

from nanochat import hardware
from nanochat.__main__ import main
from nanochat.apps import bench
from nanochat.apps.bench import decoding, others, planning, steering, text
from nanochat.apps.bench.core_prompts import longest_and_others
from nanochat.apps.bench.parts import PARTS
from nanochat.apps.bench.planning import Found
from nanochat.apps.bench.saving import Times, cost_of, time_saving
from nanochat.apps.bench.serving import STREAMS, ask, bodies_for, entries_of, put_under_load
from nanochat.apps.bench.steering import time_steering
from nanochat.apps.export.tokenizer_files import merges_of, pad_id
from nanochat.common import UsageError
from nanochat.model.build import build
from nanochat.model.config import GPTConfig
from nanochat.run import registry
from nanochat.run.scaling import Speeds, step_time
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
    # Exports take a while: other programs have tests of their own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "time_others", lambda *_: iter(()))
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
        "first batch, 64 ranks",
        "next batch, 64 ranks",
        "decode, 1 text",
        "decode, 8 texts",
        "decode, 32 texts",
        "prefill, prompt of 32",
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


def test_the_result_line_of_plans(tmp_path, capsys):
    """The largest share by which a prediction was off, above or below."""
    entries = [
        {"seconds": 1.0, "predicted_seconds": 1.1, "peak_memory_bytes": 100, "predicted_bytes": 99},
        {"seconds": 2.0, "predicted_seconds": 1.7, "peak_memory_bytes": 100, "predicted_bytes": 80},
    ]
    path = tmp_path / "plan_d2.json"
    path.write_text(json.dumps({"results": [{"name": "plan"} | entry for entry in entries]}))
    assert main(["bench", "--result", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown == "RESULT plan_d2_time_off=0.150 plan_d2_memory_off=0.200\n"


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
        "predicted_seconds",
        "predicted_bytes",
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


def test_what_steering_costs():
    """Nothing is left of the runs that were announced, and signals are as before."""
    shape = Shape("speedrun", 1, 16, 16, -1, 16, "L", -1, 300, 1)
    training = TrainingStep(open_setup(shape, compile=False))
    before = signal.getsignal(signal.SIGTERM), registry.entries()
    reports = []
    entries = {entry.name: entry for entry in time_steering(training, 2, reports.append)}
    assert reports == [] and (signal.getsignal(signal.SIGTERM), registry.entries()) == before
    assert [len(entry.seconds) for entry in entries.values()] == [2, 2, 2]
    assert "of 2 pairs" in entries["step, listening"].note
    assert steering.cost_in_words([2.0, 1.0, 1.0], [2.0, 1.01, 1.02]) == (
        "costs +1.00% ± 2.48% of a step (95% interval of 3 pairs), by the median +1.00%"
    )


@pytest.fixture
def fake_server():
    """(host and port, engine) of a server whose texts depend on their seeds only."""
    serving = pytest.importorskip("serving")
    engine = serving.FakeEngine(queue_size=64)
    with serving.running(serving.application(serving.served(engine=engine))) as url:
        yield url.removeprefix("http://"), engine


def test_texts_of_a_server_under_load_are_compared_with_those_alone(fake_server):
    address, engine = fake_server
    bodies = bodies_for(64, 257)
    assert len({tuple(body["prompt"]) for body in bodies}) == len(bodies) == STREAMS
    load = put_under_load(address, {}, bodies, seconds=0.1)
    assert len(load.alone) == STREAMS <= len(load.together)
    assert all(answer.n_tokens == 32 and answer.reason == "length" for answer in load.alone)
    one, many = entries_of("serve", load)
    assert (one.name, many.name) == ("serve, 1 stream", "serve, 32 streams")
    assert one.tokens == 32 * STREAMS and many.tokens == 32 * len(load.together)
    n = len(load.together)
    assert f"{n} of {n} texts complete and equal" in many.note
    # one that ended otherwise, and one that broke off
    index, answer = load.together[0]
    load.together[0] = (index, dataclasses.replace(answer, reason=None))
    index, answer = load.together[1]
    load.together[1] = (index, dataclasses.replace(answer, text="other"))
    _, many = entries_of("serve", load)
    assert f"{n - 2} of {n} texts" in many.note


def test_a_server_that_refuses_is_an_error(fake_server):
    with pytest.raises(UsageError, match="status 400"):
        ask(fake_server[0], {}, bodies_for(64, 257)[0] | {"prompt": [999]})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["speedrun", "llama"])
def test_serving_is_timed(arch, capsys):
    """With the real server; and llama.cpp's, where it is installed and knows the model."""
    flags = ["--only=serve", "--serving-seconds=1", f"--arch={arch}", "--dtype=float32"]
    assert main(["bench", *TINY, *flags, "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["results"]}
    servers = ["serve"]
    if arch == "llama" and all(map(importlib.util.find_spec, ("gguf", "xllamacpp"))):
        servers.append("llama.cpp f32 server")
    assert list(found) == [f"{each}, {n}" for each in servers for n in ("1 stream", "32 streams")]
    words = found["serve, 32 streams"]["note"].split("; ")[1].split()
    assert words[0] == words[2] and int(words[0]) >= STREAMS


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
        (["--serving-seconds=5"], "--serving-seconds=5: --only does not name serve"),
        (["--only=serve", "--serving-seconds=nan"], "--serving-seconds=nan: must be above 0"),
        (["--only=serve", "--max-seq-len=4"], "--max-seq-len=4: has no room for prompts"),
    ],
)
def test_refused(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


# ---- plans ----


def setup_of(depth):
    shape = Shape("speedrun", depth, 16, 16, -1, 32, "SSSL", -1, 300, 2)
    return open_setup(shape, device_type="cpu", dtype="float32", compile=False)


def test_speeds_follow_from_other_depths_and_shared_cores():
    """Times that this machine never had, from speeds that the other depths then give back."""
    speeds = Speeds(1, 2e9, 3e9, 4e9, math.inf, math.inf, 0.0, overlaps=False, activations=5e9)
    works = [planning.work_of(setup_of(depth)) for depth in planning.KNOWN_DEPTHS]
    steps = [(work, step_time(work, speeds)) for work in works]
    known = [(work, step.passes + step.weights, step.update) for work, step in steps]
    alone = Found([1.0], 1, 100.0, known=tuple(known))
    one = planning.speeds_of(1, alone, alone, {1: 100.0}, cores=2)
    assert one.pass_flops == pytest.approx(2e9) and one.activations == pytest.approx(5e9)
    assert one.update_flops == pytest.approx(3e9) and one.memory == pytest.approx(4e9)
    # each of two ranks multiplies at 90%, and each of four has half a core of that
    found = Found([1.0], 1, 60.0, delay=1e-3, reduce=1e6, gather=2e6)
    two = planning.speeds_of(2, alone, found, {1: 100.0, 2: 90.0}, cores=2)
    four = planning.speeds_of(4, alone, found, {1: 100.0, 2: 90.0, 4: 60.0}, cores=2)
    assert two.pass_flops == pytest.approx(0.9 * 2e9) and two.reduce == 1e6
    assert four.pass_flops == pytest.approx(0.45 * 2e9)
    assert four.memory == pytest.approx(0.45 * 4e9) and not four.overlaps


@pytest.mark.parametrize(
    "known, rates",
    [
        ([(1, 1, 2), (2, 1, 3), (4, 1, 5)], (1, 1)),
        # without a negative part: x or y alone, as near as it comes to both times
        ([(1, 1, 1), (2, 1, 3)], (13 / 15, math.inf)),
        ([(1, 1, 3), (2, 1, 2)], (math.inf, 13 / 30)),
    ],
)
def test_no_speed_is_negative(known, rates):
    assert planning.fitted(known) == pytest.approx(rates)


@pytest.mark.slow
def test_plans_are_compared_with_ranks_of_this_machine(tmp_path):
    out = tmp_path / "plan.json"
    assert main(["bench", "--only=plan", *TINY, "--device-type=cpu", f"--out={out}"]) == 0
    results = json.loads(out.read_text())["results"]
    assert [result["name"] for result in results] == [
        "plan, 1 rank",
        "plan, 2 ranks",
        "plan, 4 ranks",
    ]
    for result in results:
        assert result["n"] == 2 and result["predicted_seconds"] > 0
        assert result["predicted_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.5)


def test_ranks_that_fail_are_named(monkeypatch):
    setup = setup_of(2)
    # no such depth: the process of the rank ends with an error
    monkeypatch.setattr(planning, "open_setup", None)
    broken = dataclasses.replace(setup, shape=dataclasses.replace(setup.shape, head_dim=15))
    with pytest.raises(UsageError, match="--only=plan: 1 ranks gave no result"):
        planning.measured_on(1, broken, 1)


# ---- other programs ----


SHAPE = {
    "window_pattern": "L",
    "depth": 1,
    "width": 16,
    "head_dim": 16,
    "n_head": 1,
    "n_kv_head": 1,
    "max_seq_len": 16,
}


def work(report=print):
    ours = {"1 text": 0.5, "8 texts": 1.0, "prefill": 0.25, "first token": 0.125}
    return others.Work(tuple(range(40)), (1, 2), 10, (1, 8), 1, 2, 1000.0, ours, report)


def test_figures_of_other_programs():
    entry = work().entry("llama.cpp f32", "8 texts", [2.0, 3.0, 4.0], weight_bytes=150)
    assert (entry.name, entry.tokens, entry.seconds) == (
        "llama.cpp f32, 8 texts",
        80,
        [2.0, 3.0, 4.0],
    )
    # 10 times 150 bytes in 3 s, of 1,000 a second
    assert entry.note == ("weights are read at 50% of memory's speed; nanochat is 3 times as fast")
    entry = work().entry("transformers", "prefill", [0.125], weight_bytes=150)
    assert (entry.tokens, entry.note) == (40, "nanochat is 0.5 times as fast")
    assert work().entry("transformers", "first token", [0.125], weight_bytes=150).tokens is None


@pytest.mark.parametrize("vocab_size", [257, 1000, 256 + 248 * 248 + 500])
def test_made_up_tokenizers_can_be_exported(vocab_size):
    tokenizer = others.made_up_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size and len(set(tokenizer.tokens)) == vocab_size - 1
    assert len(merges_of(tokenizer)) == vocab_size - 257
    assert pad_id(tokenizer) == 255


def test_programs_that_are_missing_are_named(monkeypatch):
    lines = []
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    config = GPTConfig(**SHAPE, vocab_size=300, arch="llama")
    assert list(others.time_others(build(config, "cpu"), work(lines.append))) == []
    assert lines == [
        "transformers: left out; to see it: pip install transformers",
        "llama.cpp: left out; to see it: pip install gguf xllamacpp",
    ]
    config = GPTConfig(**SHAPE, vocab_size=20, arch="llama")
    assert list(others.time_others(build(config, "cpu"), work(lines.append))) == []
    assert "--vocab-size=20 is too small" in lines[-1]


def test_an_export_that_fails_is_reported(monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: name)

    def broken(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "warning\nnanochat export: failed: why")

    monkeypatch.setattr(others.subprocess, "run", broken)
    config = GPTConfig(**SHAPE, vocab_size=300)
    assert list(others.time_others(build(config, "cpu"), work(lines.append))) == []
    assert lines == ["transformers: left out: nanochat export: failed: why"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "speedrun"])
def test_other_programs_are_timed_beside_ours(arch, tmp_path, capsys):
    for package in ("transformers", "gguf", "xllamacpp"):
        pytest.importorskip(package)
    path = tmp_path / "decode.json"
    flags = [*TINY, "--aspect-ratio=32", f"--arch={arch}", "--only=decode", f"--out={path}"]
    assert main(["bench", *flags]) == 0
    assert "left out" not in capsys.readouterr().out
    names = {entry["name"] for entry in json.loads(path.read_text())["results"]}
    programs = ["transformers"]
    if arch == "llama":
        programs += ["llama.cpp f32", "llama.cpp bf16", "llama.cpp q8_0"]
    parts = ("1 text", "8 texts", "32 texts", "prefill", "first token")
    assert {f"{program}, {part}" for program in programs for part in parts} <= names
