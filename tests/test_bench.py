"""`nanochat bench`: every part is measured, figures follow from one another, wrong requests are refused. Speed itself is not tested."""

import json

import pytest
import small
import torch

from nanochat import hardware
from nanochat.__main__ import main
from nanochat.apps import bench
from nanochat.model.gpt import meta_model

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


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setattr(hardware, "PEAK_SIZES", (64,))
    monkeypatch.setattr(bench, "TEXT_BYTES", 100_000)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """JSON of every part."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    bundle = small.core_bundle(path.parent, n=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "PEAK_SIZES", (64,))
        patch.setattr(bench, "TEXT_BYTES", 100_000)
        assert main(["bench", *TINY, f"--out={path}", f"--core-bundle={bundle}"]) == 0
    return path


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
        "decode, 1 samples",
        "decode, 8 samples",
        "start-up, --help",
        "core",
        "core, naive",
        "start-up, first step, cold",
        "start-up, first step, warm",
    } <= set(table)
    for entry in table.values():
        assert 0 < entry["fastest"] <= entry["seconds"] <= entry["slowest"] and entry["n"] >= 1
        if entry["flops_per_sec"]:
            assert entry["share_of_peak"] == pytest.approx(
                entry["flops_per_sec"] / content["peak_flops"]
            )
    step = table["step"]
    assert step["tokens_per_sec"] == pytest.approx(2 * 64 / step["seconds"])
    assert step["flops_per_sec"] == pytest.approx(
        2 * 64 * content["flops_per_token"] / step["seconds"]
    )
    flops = sum(
        table[name]["flops_per_sec"] * table[name]["seconds"] for name in ("forward", "backward")
    )
    assert flops == pytest.approx(2 * 64 * content["flops_per_token"])
    assert step["peak_memory_bytes"] >= table["forward"]["peak_memory_bytes"] > 0
    assert content["settings"]["depth"] == 2 and content["hardware"]["torch"] == torch.__version__


def test_core_without_a_bundle(tmp_path, monkeypatch, capsys):
    """Left out, with a word; nothing is downloaded."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert main(["bench", *TINY, "--only=core,loss"]) == 0
    shown = capsys.readouterr().out
    assert (
        "core: left out, as its bundle is not here" in shown
        and "naive" not in shown
        and not (tmp_path / "hub").exists()
    )


def test_examples_of_core_are_the_longest_and_others():
    from tasks.core import Task

    examples = [{"context": "x" * (i * 7 % 101), "continuation": "y"} for i in range(101)]
    places = bench.longest_and_others(
        Task("made up", None, "language_modeling", 0, " ", 0.0), examples
    )
    lengths = [len(examples[place]["context"]) for place in places]
    assert (
        len(set(places)) == 25
        and lengths[:10] == list(range(100, 90, -1))
        and lengths[10] == 90
        and min(lengths) < 10
    )


def test_flops_of_orthogonalisation():
    """Five iterations of three products: X X^T, its square, and the square times X."""
    args = bench.parse_args([*TINY, "--only=optimizer"])
    from nanochat.run import plan

    measured = bench.Bench(
        args, plan.model_config(args, 300), torch.device("cpu"), torch.float32, "blocked", False
    )
    C, by_hand = 32, 0
    for rows, columns in (
        2 * [(C, C)] * 4 + 2 * [(C, 4 * C)] * 2
    ):  # query, key, value, out; up and down, of two blocks
        by_hand += 5 * 2 * (rows * columns * rows + rows**3 + rows * rows * columns)
    assert measured._muon_flops() == by_hand
    assert meta_model(measured.config).flops_per_token() == measured.flops_per_token


def test_compared_with_an_earlier_run(results, capsys):
    assert main(["bench", *TINY, "--only=loss,step", f"--compare={results}"]) == 0
    shown = capsys.readouterr().out
    assert (
        shown.count("times as fast as before") == 3
        and "peak of matrix products in" in shown
        and "other settings" not in shown
    )
    assert (
        main(
            ["bench", *TINY, "--only=loss", f"--compare={results}", "--depth=3", "--dtype=float32"]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        "other settings: dtype bfloat16 (now float32), depth 2 (now 3)" in shown
        or "other settings: depth 2 (now 3)" in shown
    )


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
    assert "other.json: not the JSON that nanochat bench writes" in capsys.readouterr().err


def test_json_alone_on_standard_output(capsys):
    assert (
        main(
            [
                "bench",
                *TINY,
                "--only=forward",
                "--json",
                "--arch=llama",
                "--window-pattern=L",
                "--activation-checkpointing",
            ]
        )
        == 0
    )
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)["results"]] == [
        "forward"
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only=step,speed"], "--only=speed: no such part; choose of step, forward"),
        (["--repeats=0"], "--repeats=0: must be at least 1"),
        (["--depth=2", "--aspect-ratio=16", "--head-dim=15"], "describe no model"),
        (["--compare=nowhere.json"], "nowhere.json"),
        (["--compare=README.md"], "README.md"),
        (["--attention=fast"], "--attention=fast"),
        (["--fp8-recipe=rowwise"], "--fp8-recipe=rowwise: belongs to --fp8"),
        (["--fp8", "--device-type=cpu"], "plan for such a GPU with train.py --dry-run --gpu=NAME"),
        (["--n-kv-head=0"], "--n-kv-head=0: must be at least 1, or -1"),
        (["--json", "--compare=README.md"], "--compare=README.md: belongs to the table"),
        (["--out=nowhere/x.json"], "--out=nowhere/x.json: a folder, or in no folder"),
        (["--out=tests"], "--out=tests: a folder"),
        (["--only=loss", "--core-bundle=tests"], "--core-bundle=tests: core is not among --only"),
        (["--only=core", "--core-bundle=tests"], "--core-bundle=tests: no core.yaml"),
        (["--vocab-size=100"], "--vocab-size=100: too small for a tokenizer; give at least 257"),
    ],
)
def test_refused(flags, message, capsys):
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err
