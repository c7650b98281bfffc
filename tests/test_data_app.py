"""`nanochat data`: what it says is right, what it fetches is what a run reads, what it mixes has
the shares asked for."""

import argparse
import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_remote import CLIMBMIX, VAL, bodies, documents, limit, order, parquet, shards

import train
from nanochat import __main__, common
from nanochat.apps import data
from nanochat.apps.data import fetch, inspection, mix
from nanochat.common import Unavailable, UsageError, base_dir, in_a_line, new_folder
from nanochat.data import download, sources, token_cache
from nanochat.data.sources import Corpus, open_corpus
from nanochat.data.text import iterate_documents
from tasks.exercises import held_out


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """An empty base folder; anything is a large data set; short pauses."""
    limit(monkeypatch, tmp_path / "base")


def write(folder, texts_by_file):
    """A folder of .jsonl files, made of lists of texts; returns its path as a string."""
    folder.mkdir()
    for i, texts in enumerate(texts_by_file):
        (folder / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
    return str(folder)


def inspect(capsys, *argv):
    """The JSON of `inspect`."""
    assert data.main(["inspect", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------
# the command line


def test_help_is_complete_and_light():
    code = (
        "import sys\nfrom nanochat.__main__ import main\ntry:\n    main(['data', '--help'])\n"
        "finally:\n    assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(data.__file__).parents[1],
    )
    for word in (
        "inspect",
        "fetch",
        "tokenize",
        "mix",
        "--documents",
        "--tokens",
        "--shards",
        "--all",
        "--seed",
        "--max-seq-len",
        "--plan",
        "--vocab-size",
        "--bytes",
        "--shard-bytes",
        "--repeat",
        "--json",
        "--val-data",
    ):
        assert word in shown.stdout
    assert "Assertion" not in shown.stderr


@pytest.mark.parametrize("name", __main__.APPS)
def test_help_of_every_subcommand(name, capsys):
    """A % that is not escaped in any help text fails here."""
    module = importlib.import_module(f"nanochat.apps.{name}")
    parser = module.build_parser() if hasattr(module, "build_parser") else argparse.ArgumentParser()
    # by the name that their usage has: an alias has no help of its own
    commands = {
        command.prog.split()[-1]
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for command in action.choices.values()
    }
    assert len(commands) == {"data": 6, "jobs": 12, "tokenizer": 3}.get(name, 0)
    for argv in ([], *([command] for command in commands)):
        with pytest.raises(SystemExit) as caught:
            __main__.main([name, *argv, "--help"])
        assert (
            caught.value.code == 0
            and "usage: nanochat " + " ".join([name, *argv]) in capsys.readouterr().out
        )


@pytest.mark.parametrize(
    "argv",
    [
        ["fetch", "x", "--tokens=0"],
        ["fetch", "x", "--tokens=1.5"],
        ["fetch", "x", "--tokens=1e9", "--all"],
        ["mix", "out", "x=1"],
        ["tokenize", "x", "--max-seq=3", "--all"],
        [],
    ],
)
def test_wrong_arguments(argv):
    with pytest.raises(SystemExit) as caught:
        data.main(argv)
    assert caught.value.code == 2


def test_a_plan_says_what_to_tokenize(tmp_path, monkeypatch, capsys):
    """The plan is train.py's own."""
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 300)
    flags = [f"--data={text}", "--depth=2", "--max-seq-len=64", "--num-iterations=3"]
    assert train.run([*flags, "--dry-run", "--json", "--total-batch-size=128", "--gpus=1"]) == 0
    plan = tmp_path / "plan.json"
    plan.write_text(capsys.readouterr().out)
    wanted = []
    monkeypatch.setattr(fetch, "run_tokenize", lambda values: wanted.append(values) or 0)
    assert data.main(["tokenize", str(text), "--plan", str(plan)]) == 0
    assert (wanted[0].tokens, wanted[0].max_seq_len) == (3 * 128, 64)
    shown = capsys.readouterr().out
    assert re.match(r"plan: 384 tokens, \S+ FLOPs, \S+ on 1 device, \S+ device-hours\n", shown)
    assert data.main(["tokenize", str(text), "--tokens=5"]) == 0
    assert (wanted[1].tokens, wanted[1].max_seq_len) == (5, 2048)
    with pytest.raises(UsageError, match="--max-seq-len 32: the plan in .* has 64"):
        data.main(["tokenize", str(text), "--plan", str(plan), "--max-seq-len=32"])


@pytest.mark.parametrize("content", ["{}", "[]", '{"plan": {"tokens": null}}', '"x"'])
def test_other_files_are_no_plans(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UsageError, match="--plan .*plan.json: not the plan of a run; write one"):
        data.main(["tokenize", "x", "--plan", str(tmp_path / "plan.json")])


def test_all_that_is_wrong_is_said(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="(?s)--max-seq-len 0.*--vocab-size 5.*--tokenizer tok"):
        data.main(
            ["tokenize", "python", "--all", "--max-seq-len=0", "--vocab-size=5", "--tokenizer=tok"]
        )
    with pytest.raises(UsageError, match="--documents -2"):
        data.main(["inspect", "python", "--documents=-2"])
    with pytest.raises(UsageError, match="no such file"):
        data.main(["inspect", str(tmp_path / "none")])


# --------------------------------------------------------------------------------------------------
# inspect


def test_inspect_local(tmp_path, capsys):
    folder = write(
        tmp_path / "docs", [["a" * n for n in range(1, 102)], ["é\n\nsecond line " + "x" * 200]]
    )
    found = inspect(capsys, folder, "--documents=2")
    assert (
        found["train"]["shards"] == found["val"]["shards"] == 1
        and found["train"]["files_here"] == 1
    )
    assert not found["train"]["text_bytes_estimated"] and "last file, 1.jsonl" in found["held_out"]
    lengths = found["documents"]
    assert (lengths["sampled"], lengths["mean_bytes"], lengths["max_bytes"]) == (101, 51, 101)
    assert [lengths[f"p{p}_bytes"] for p in (5, 25, 50, 75, 95)] == [6, 26, 51, 76, 96]
    assert found["examples"] == [["a"], ["aa"]]
    assert found["fingerprint"] == open_corpus(folder).fingerprint
    assert data.main(["inspect", folder, "--val-data", folder + "/1.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert "50% 4" in shown or "50% 5" in shown
    assert found["fingerprint"] not in shown and "document 3" in shown
    assert found["remarks"] == [] and "warning: the text of 1.jsonl is on both sides" in shown
    assert data.main(["fetch", folder]) == 0, "shows it as train.py does"
    assert f"fingerprint {found['fingerprint'][:16]}" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("name", ["climbmix", "shakespeare"])
def test_inspect_without_a_network(name, capsys, monkeypatch):
    monkeypatch.setattr(
        "nanochat.data.hub.SHAKESPEARE_URL", f"{os.environ['HF_ENDPOINT']}/raw/input.txt"
    )  # where nothing listens
    assert __main__.main(["data", "inspect", name]) == 1
    shown = capsys.readouterr().err
    assert "no connection" in shown
    assert (
        shown.count(
            "Without a network there are --data=python, and --data=<path> for text on this disk."
        )
        == 1
    )


def test_inspect_fetches_only_the_listing(hub, capsys):
    """Unless documents are asked for: then one file."""
    hub.add(CLIMBMIX, shards())
    found = inspect(capsys, "climbmix")
    assert (
        not bodies(hub)
        and found["documents"] is None
        and "--documents" in found["reason"]
        and found["examples"] == []
    )
    assert (
        found["licence"] == "CC-BY-NC-4.0"
        and found["url"].endswith(CLIMBMIX)
        and VAL in found["held_out"]
    )
    assert found["train"]["shards"] == 8 and found["train"]["text_bytes_estimated"]
    assert len(found["revision"]) == 40 and found["revision"] in hub.repos[CLIMBMIX].commits
    hub.requests.clear()
    found = inspect(capsys, "climbmix", "--documents=2")
    assert (
        bodies(hub) == ["shard_00000.parquet"]
        and len(found["examples"]) == 2
        and found["train"]["files_here"] == 1
    )
    assert data.main(["inspect", "climbmix"]) == 0
    assert "1 of 8 files here" in capsys.readouterr().out


def test_inspect_of_large_files(hub, capsys, monkeypatch):
    """A large single file is not fetched unasked either, though its held-out part cannot be told
    without."""
    monkeypatch.setattr(inspection, "SMALL_FILE_BYTES", 1000)
    hub.add(CLIMBMIX, shards())
    hub.add("me/one", {"data.parquet": parquet(documents(1, 9000))})
    for name in ("climbmix", "hf:me/one"):
        found = inspect(capsys, name)
        assert found["documents"] is None and "--documents" in found["reason"]
    assert "last tenth" in found["held_out"] and found["val"]["shards"] == 0
    assert data.main(["inspect", "hf:me/one"]) == 0
    assert not [name for name in bodies(hub) if name.endswith(".parquet")]
    capsys.readouterr()
    assert inspect(capsys, "hf:me/one", "--documents=1")["val"]["shards"] == 1
    assert [name for name in bodies(hub) if name.endswith(".parquet")] == ["data.parquet"]


# --------------------------------------------------------------------------------------------------
# fetch and tokenize


@pytest.mark.parametrize(
    "tokens, n", [(1, 1), (1600, 1), (1601, 2), (4800, 3), (4801, 4), (10**6, 8)]
)
def test_fetch_takes_as_many_shards_as_the_tokens_need(hub, capsys, tokens, n):
    """Shards of 50 rows of 32 and a rest."""
    hub.add(CLIMBMIX, shards())
    assert (
        data.main(
            [
                "fetch",
                "climbmix",
                f"--tokens={tokens}",
                "--tokenizer=byte",
                "--max-seq-len=32",
                "--seed=7",
            ]
        )
        == 0
    )
    assert bodies(hub) == [VAL, *order(seed=7)[:n]]
    shown = capsys.readouterr().out
    assert f"fetched {n + 1} files" in shown and ("78.1 epochs" in shown) == (tokens == 10**6)


def test_fetch_estimates_large_shards_low(hub, monkeypatch):
    """Where only a part of the text is counted, the number of shards may be one too large, never
    too small."""
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(fetch, "COUNT_BYTES", 300)
    assert (
        data.main(["fetch", "climbmix", "--tokens=4000", "--tokenizer=byte", "--max-seq-len=32"])
        == 0
    )
    assert bodies(hub) == [VAL, *order()[:3]]


def test_fetch_has_the_text_of_the_tokenizer_too(hub, tmp_path):
    """BPE is fitted to the first shard of a large data set, whatever the seed; once it is made that
    is not needed."""
    hub.add(CLIMBMIX, shards())
    sample_bytes = token_cache.BPE_SAMPLE_BYTES
    token_cache.BPE_SAMPLE_BYTES = 100
    try:
        assert data.main(["fetch", "climbmix", "--shards=1"]) == 0
        assert bodies(hub) == [VAL, "shard_00000.parquet", order()[0]]
        assert data.main(["tokenize", "climbmix", "--tokens=2000", "--max-seq-len=32"]) == 0
        (made,) = (base_dir() / "tokens").iterdir()
        n = len(list(made.glob("*.safetensors")))
        assert 2 <= n < 9
        (base_dir() / "hub").rename(tmp_path / "gone")
        hub.requests.clear()
        assert data.main(["fetch", "climbmix", "--shards=1", "--seed=9"]) == 0
        assert bodies(hub) == [VAL, order(seed=9)[0]]
    finally:
        token_cache.BPE_SAMPLE_BYTES = sample_bytes


def test_a_tokenizer_that_cannot_be_made(hub):
    """The other shards are fetched all the same."""
    hub.add(CLIMBMIX, shards())
    hub.fault("shard_00000", "status", None, code=404)
    hub.fault(VAL, "status", None, code=404)
    flags = ["climbmix", "--tokens=500", "--max-seq-len=32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "BPE_SAMPLE_BYTES", 100)
        with pytest.raises(Unavailable, match="(?s)unavailable: 2 files.*shard_00000"):
            data.main(["fetch", *flags])
        assert bodies(hub)[:1] == order()[:1]
        with pytest.raises(Unavailable, match="404"):
            data.main(["tokenize", *flags])


@pytest.mark.parametrize("command", ["fetch", "tokenize"])
def test_what_is_missing_is_listed_and_the_rest_had(hub, capsys, command):
    hub.add(CLIMBMIX, shards())
    bad = [order()[0], order()[2]]
    for name in bad:
        hub.fault(name, "status", None, code=404)
    with pytest.raises(Unavailable, match=r"(?s)unavailable: 2 files.*" + ".*404.*".join(bad)):
        data.main([command, "climbmix", "--tokens=6400", "--tokenizer=byte", "--max-seq-len=32"])
    assert set(bodies(hub)) >= {VAL, order()[1], order()[3]} and not set(bad) & set(bodies(hub))
    assert __main__.main(["data", command, "climbmix", "--shards=3", "--tokenizer=byte"]) == 1
    assert bad[0] in capsys.readouterr().err
    hub.faults.clear()
    assert data.main([command, "climbmix", "--shards=3", "--tokenizer=byte"]) == 0
    assert set(bodies(hub)) >= {VAL, *order()[:3]}


def test_a_large_data_set_wants_an_amount(hub):
    hub.add(CLIMBMIX, shards())
    with pytest.raises(UsageError, match="8 shards .*--tokens N, --shards N or --all"):
        data.main(["fetch", "climbmix"])
    assert not bodies(hub)


def test_a_small_data_set_is_taken_whole(hub, monkeypatch, capsys):
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(sources, "EAGER_BYTES", 1 << 30)
    assert data.main(["fetch", "climbmix", "--tokens=1", "--tokenizer=byte"]) == 0
    assert sorted(bodies(hub)) == sorted(shards())
    assert data.main(["tokenize", "climbmix", "--shards=2", "--tokenizer=byte"]) == 0
    assert "train.py will want all of its 8 shards" in capsys.readouterr().out


def test_no_room_on_the_disk(hub, monkeypatch):
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(UsageError, match=r"9 files of .* are missing, .* 4.9 KiB free"):
        data.main(["fetch", "climbmix", "--all", "--tokenizer=byte"])
    monkeypatch.setattr(token_cache, "CACHE_LIMIT_BYTES", 2000)
    with pytest.raises(UsageError, match="the cache keeps 2.0 KiB"):
        data.main(["tokenize", "climbmix", "--all", "--tokenizer=byte"])
    assert not bodies(hub)


def test_local_text(tmp_path, capsys):
    folder = write(tmp_path / "docs", [["some text " * 50] * 3, ["held out"] * 2])
    assert data.main(["fetch", folder]) == 0
    assert "nothing to download" in capsys.readouterr().out
    assert data.main(["tokenize", folder, "--tokenizer=byte", "--all"]) == 0
    assert (
        "1,503 tokens" in capsys.readouterr().out
        and len(list(base_dir().glob("tokens/*/*.safetensors"))) == 2
    )
    assert data.main(["tokenize", folder, "--tokenizer=byte", "--all"]) == 0
    assert "built 0 token files" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# mix


@pytest.fixture
def two_sources(tmp_path):
    """Two folders of 2,000 documents in four files each; a document says where it is from. The last
    file is held out."""
    return [
        write(
            tmp_path / name,
            [
                [f"{name} {i}.{j} " + "word é " * ((i * 7 + j) % 40 + 1) for j in range(500)]
                for i in range(4)
            ],
        )
        for name in ("aaa", "bbb")
    ]


def mixed(folder):
    """({"train" or "val": [(text, source)]}, sources.json) of a folder that mix wrote, as train.py
    sees it."""
    import pyarrow.parquet

    corpus = open_corpus(str(folder))
    found = {}
    for side, side_shards in (("train", corpus.train), ("val", corpus.val)):
        tables = [pyarrow.parquet.read_table(path) for shard in side_shards for path in shard.files]
        found[side] = [
            row
            for table in tables
            for row in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True)
        ]
        assert [text for text, _ in found[side]] == [
            text for shard in side_shards for text in shard.documents()
        ]
    return found, json.loads((folder / "sources.json").read_text())


def share(rows, name):
    """Share of the bytes of (text, source) rows that are of a source."""
    return sum(len(t.encode()) for t, source in rows if source == name) / sum(
        len(t.encode()) for t, _ in rows
    )


def test_mix(two_sources, tmp_path, capsys):
    """Shares, sizes, no document twice, the held-out file from held-out documents, shuffled, and
    train.py's rules for a folder."""
    a, b = two_sources
    out = tmp_path / "deep" / "out"
    assert (
        data.main(
            [
                "mix",
                str(out),
                f"{a}=3",
                f"{b}=1",
                "--bytes=2e5",
                "--val-bytes=2e4",
                "--shard-bytes=50000",
            ]
        )
        == 0
    )
    names = ["sources.json", *(f"train_{i:05}.parquet" for i in range(4)), "validation.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert f"--data={out}" in capsys.readouterr().out
    found, summary = mixed(out)
    assert (
        open_corpus(str(out)).note
        == "validation: 1 file named as validation text (validation.parquet)"
    )
    for side, n_bytes in (("train", 200_000), ("val", 20_000)):
        rows = found[side]
        assert n_bytes - 20 <= sum(len(text.encode()) for text, _ in rows) <= n_bytes
        assert share(rows, a) == pytest.approx(0.75, abs=0.001)
        assert max(Counter(text for text, _ in rows).values()) == 1
        whole = [row for row in rows if len(row[0]) > 6]
        assert len(whole) >= len(rows) - 2, "two may be cut"
        assert all(
            text.startswith(Path(source).name) and (" 3." in text[:6]) == (side == "val")
            for text, source in whole
        )
        switches = sum(x[1] != y[1] for x, y in zip(rows, rows[1:], strict=False))
        assert switches > len(rows) / 5, "the sources take turns"
    for path in out.glob("train_*.parquet"):
        texts = set(iterate_documents(path))
        rows = [row for row in found["train"] if row[0] in texts]
        assert share(rows, a) == pytest.approx(0.75, abs=0.02)
        assert sum(len(text.encode()) for text in texts) == pytest.approx(50_000, abs=600)
    assert summary["train_bytes"] == sum(len(text.encode()) for text, _ in found["train"])
    assert [source["share_asked_for"] for source in summary["sources"]] == [0.75, 0.25]
    assert summary["sources"][0]["fingerprint"] == open_corpus(a).fingerprint
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert data.main(["inspect", str(out)]) == 0
    assert f"mixed from    {a}: 75.0%" in capsys.readouterr().out


def test_mix_depends_on_its_seed_alone(two_sources, tmp_path):
    a, b = two_sources
    runs = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        data.main(
            [
                "mix",
                str(tmp_path / name),
                f"{a}=1",
                f"{b}=1",
                "--bytes=1e5",
                f"--seed={seed}",
                "--shard-bytes=30000",
            ]
        )
        runs.append(open_corpus(str(tmp_path / name)).fingerprint)
    assert runs[0] == runs[1] != runs[2]


def test_a_source_that_runs_out(two_sources, tmp_path, capsys):
    """The others fill its place, and the shares really reached are said; with --repeat it is drawn
    from again."""
    a, b = two_sources
    small_one = write(
        tmp_path / "small",
        [
            [f"small {i} " + "s" * 90 for i in range(100)],
            ["small held " + "s" * 90 + str(i) for i in range(20)],
        ],
    )
    assert data.main(["mix", str(tmp_path / "x"), f"{a}=1", f"{small_one}=1", "--bytes=1e5"]) == 0
    shown = capsys.readouterr().out
    found, summary = mixed(tmp_path / "x")
    assert "ran out: 50.00% was asked for" in shown and "all sources" not in shown
    assert (
        sum(source == small_one for _, source in found["train"]) == 100
        and summary["train_bytes"] == 100_000
    )
    assert (
        summary["sources"][1]["train_ran_out"]
        and summary["sources"][1]["share"] == share(found["train"], small_one) < 0.11
    )
    assert (
        data.main(
            ["mix", str(tmp_path / "y"), f"{a}=1", f"{small_one}=1", "--bytes=1e5", "--repeat"]
        )
        == 0
    )
    found, summary = mixed(tmp_path / "y")
    assert (
        summary["sources"][1]["share"] == pytest.approx(0.5, abs=0.001)
        and summary["sources"][1]["train_passes"] == 6
    )
    assert max(Counter(text for text, _ in found["val"]).values()) == 1
    capsys.readouterr()
    assert data.main(["mix", str(tmp_path / "z"), f"{small_one}=1", "--bytes=1e5"]) == 0
    assert "all sources ran out: 9,890 bytes instead of 100,000" in capsys.readouterr().out


def test_long_documents_and_hidden_twins(tmp_path):
    """One text is cut at its share; what one source holds out is not trained on from another."""
    long, twin = "".join(f"{i}, " for i in range(20_000)), "this stands in both"
    (tmp_path / "long.txt").write_text(long)
    one = write(tmp_path / "one", [[f"one {i} {'x' * 50}" for i in range(100)], [twin] * 2])
    two = write(
        tmp_path / "two",
        [
            [twin, *(f"two {i} {'x' * 50}" for i in range(100))],
            ["two held out " + str(i) for i in range(9)],
        ],
    )
    assert (
        data.main(
            [
                "mix",
                str(tmp_path / "out"),
                f"{tmp_path}/long.txt=2",
                f"{one}=1",
                f"{two}=1",
                "--bytes=8000",
                "--val-bytes=200",
            ]
        )
        == 0
    )
    found, summary = mixed(tmp_path / "out")
    assert [source["share"] for source in summary["sources"]] == [0.5, 0.25, 0.25]
    assert [text for text, _ in found["train"] if text in long] == [long[:4000]]
    assert twin in {text for text, _ in found["val"]} and twin not in {
        text for text, _ in found["train"]
    }


def test_mix_refuses(two_sources, tmp_path, monkeypatch):
    a, b = two_sources
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="(?s)x=-1: write SOURCE=WEIGHT.*y: write.*named twice"):
        data.main(["mix", str(out), "x=-1", "y", f"{a}=1", f"{a}=2", "--bytes=1000"])
    with pytest.raises(UsageError, match="both hold .*jsonl, whose documents would be drawn twice"):
        data.main(["mix", str(out), f"{a}=1", f"{a}/0.jsonl=1", "--bytes=1000"])
    with pytest.raises(UsageError, match="exists and is not empty"):
        data.main(["mix", a, f"{b}=1", "--bytes=1000"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        with pytest.raises(UsageError, match="100 B free"):
            data.main(["mix", str(out), f"{a}=1", "--bytes=1000"])
    out.mkdir()
    assert data.main(["mix", str(out), f"{a}=1", "--bytes=1000"]) == 0  # an empty folder is fine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aaa", "bbb", "out"]


def test_mix_leaves_nothing_when_it_fails(two_sources, tmp_path, monkeypatch, hub):
    """A disk that fills, a source that cannot be fetched, an earlier process that was killed."""
    a, _ = two_sources
    out = tmp_path / "out"
    hub.add(CLIMBMIX, shards())
    hub.fault(order()[0], "status", None, code=404)
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(Unavailable, match="404"):
            data.main(
                ["mix", str(out), f"{a}=1", "climbmix=1", "--bytes=1e5", "--shard-bytes=10000"]
            )
    with monkeypatch.context() as patch:
        patch.setattr(
            mix,
            "write_json",
            lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        with pytest.raises(Unavailable, match="No space left"):
            data.main(["mix", str(out), f"{a}=1", "--bytes=1e4"])
    assert not out.exists() and not list(tmp_path.glob(".*"))
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train_00000.parquet").write_text("torn")
    with (
        new_folder(tmp_path / "other"),
        pytest.raises(UsageError, match="being written by another process"),
    ):
        data.main(["mix", str(tmp_path / "other"), f"{a}=1", "--bytes=1e4"])
    (tmp_path / "other").rmdir()
    assert data.main(["mix", str(out), f"{a}=1", "--bytes=1e4"]) == 0
    assert not list(tmp_path.glob(".*")) and mixed(out)[1]["train_bytes"] == 10_000


@pytest.mark.parametrize(
    "error, passes",
    [
        # passes: with the error itself, else as Unavailable; the relative names are below the
        # temporary folder
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (OSError(errno.ENOSPC, "No space left on device", "deep/a"), False),
        (PermissionError(errno.EACCES, "Permission denied", b"a"), False),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/data/a", None, "a"), False),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/a"), True),
        (OSError(errno.EIO, "Input/output error", "/data/a"), True),
        (OSError(errno.ENOENT, "No such file"), True),
        (ConnectionError("reset"), True),
        (UsageError("no text"), True),
    ],
    ids=repr,
)
def test_new_folder_tells_its_errors_from_the_bodys(tmp_path, monkeypatch, error, passes):
    """What the body says of other files is not taken for a fault of the folder; nothing is left in
    any case."""
    with (
        pytest.raises(type(error) if passes else Unavailable) as caught,
        new_folder(tmp_path / "out") as folder,
    ):
        monkeypatch.chdir(folder)
        raise error
    assert caught.value is error if passes else "out cannot be written" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_new_folder_that_cannot_be_finished(tmp_path, monkeypatch):
    """Its own work fails after the body has ended well."""

    def full(path):
        raise OSError(errno.EIO, "Input/output error", "elsewhere")

    monkeypatch.setattr(common, "fsync_dir", full)
    with (
        pytest.raises(
            Unavailable, match="out cannot be written .Input/output error.; nothing of it"
        ),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_errors_in_a_line():
    assert [in_a_line(error) for error in (ValueError(" a\nb"), ValueError("  "), KeyError())] == [
        "a b",
        "ValueError",
        "KeyError",
    ]


def test_mix_of_a_remote_source_fetches_what_it_needs(hub, tmp_path, two_sources):
    hub.add(CLIMBMIX, shards())
    assert (
        data.main(
            [
                "mix",
                str(tmp_path / "out"),
                "climbmix=1",
                f"{two_sources[0]}=1",
                "--bytes=4000",
                "--shard-bytes=2000",
            ]
        )
        == 0
    )
    names = [name for name in bodies(hub) if name.endswith(".parquet")]
    assert VAL in names and 2 <= len(names) <= 4
    assert mixed(tmp_path / "out")[1]["sources"][0]["licence"] == "CC-BY-NC-4.0"


def test_mix_without_pyarrow(two_sources, tmp_path, monkeypatch):
    monkeypatch.setattr(mix, "suffix", lambda: ".jsonl")
    assert data.main(["mix", str(tmp_path / "out"), f"{two_sources[0]}=1", "--bytes=1e4"]) == 0
    corpus = open_corpus(str(tmp_path / "out"))
    assert (
        "validation.jsonl" in corpus.note
        and len("".join(text for shard in corpus.train for text in shard.documents()).encode())
        == 10_000
    )
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "validation.jsonl").read_text().splitlines()
    ]
    assert {line["source"] for line in lines} == {two_sources[0]}


def test_memory_is_bounded_by_a_shard(tmp_path, monkeypatch):
    """Of a source of many documents no more are held than a shard's worth, twice: the buffer, and
    the file to write."""
    held, most = 0, 0
    corpus = Corpus(
        "", [SimpleNamespace(documents=lambda report: counted(5000), fingerprint="x")], [], ""
    )

    def counted(n):
        nonlocal held, most
        for i in range(n):
            held += 1
            most = max(most, held)
            yield f"{i:0100}"

    source = mix.Source("many", 1.0, corpus)
    recipe = mix.Recipe(400_000, 1000, shard_bytes=20_000, seed=1, repeat=False)
    texts = []
    for text, _ in mix.draw([source], "train", 400_000, recipe):
        held -= 1
        texts.append(text)
    assert len(set(texts)) == len(texts) == 4000 and most <= 20_000 // 100 + 1
    assert texts != sorted(texts)


def test_pairs_are_preferences_to_learn_from(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "pairs.jsonl"
    text.write_text(" ".join(f"word{i}" for i in range(1000)))
    command = ["pairs", str(text), str(out), "--n", "5"]
    assert data.main(command) == 0 and "5 pairs" in capsys.readouterr().out
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(pair) for pair in pairs] == [{"prompt", "chosen", "rejected"}] * 5
    held_out = tmp_path / "held_out.jsonl"
    assert data.main(["pairs", str(text), str(held_out), "--n", "3", "--held-out"]) == 0
    words = [int(word[4:]) for word in re.findall(r"word\d+", held_out.read_text())]
    # of the last tenth
    assert min(words) > 850
    with pytest.raises(UsageError, match="exists already"):
        data.main(command)
    with pytest.raises(UsageError, match="has words for 4 pairs; ask for fewer"):
        data.main(["pairs", str(text), str(tmp_path / "new"), "--n", "9", "--held-out"])


def test_exercises_are_conversations_to_learn_from(tmp_path, capsys):
    out = tmp_path / "exercises.jsonl"
    command = ["exercises", str(out), "--tasks", "sum,copy", "--n", "20"]
    assert data.main(command) == 0
    assert f"{out}: 40 conversations" in capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [message["role"] for message in lines[0]["messages"]] == ["user", "assistant"]
    questions = {line["messages"][0]["content"] for line in lines}
    assert not questions & {one.question for one in held_out("sum", 5000)}
    with pytest.raises(UsageError, match="exists already"):
        data.main(command)
    with pytest.raises(UsageError, match="--tasks algebra: no such task"):
        data.main(["exercises", str(tmp_path / "new"), "--tasks", "sum,algebra"])
