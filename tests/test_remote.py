"""train.py end to end on data sets of the hub (tests/hub_server.py): what is requested and when,
resuming with and without
a network, and every fault as the user of train.py meets it."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import small
from hub_server import HubServer, hasten

from nanochat import hardware
from nanochat.apps import data
from nanochat.common import base_dir, sha256_hex
from nanochat.data import clients, download, prefetch, sources
from nanochat.data.prefetch import Ahead
from nanochat.data.rows import Rows
from nanochat.data.sources import PARQUET_TEXT_FACTOR, Corpus, open_corpus
from nanochat.run import checkpoint
from nanochat.run.metrics import Record

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
N_SHARDS = 9  # the last is for validation
ROWS = 50  # of a shard; a step takes 8
STEPS = 20  # 160 rows: four shards
FLAGS = ["--data=climbmix", f"--num-iterations={STEPS}", "--eval-every=10", "--sample-every=-1"]
UNSAVED = ["--no-save", "--save-every=-1"]
# The limits below, for the processes that these tests start.
LIMITS = """
from nanochat.data import download, prefetch, sources
sources.EAGER_BYTES, prefetch.AHEAD_RETRY_SECONDS = 1000, 0.05
download.BACKOFF_S, download.ATTEMPTS = 0.01, 3
import huggingface_hub.file_download, huggingface_hub.utils._http, time, types
clock = types.SimpleNamespace(sleep=lambda s: None, time=time.time, monotonic=time.monotonic)
huggingface_hub.file_download.time = huggingface_hub.utils._http.time = clock
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """An empty base folder; anything is a large data set; short pauses. No download outlives its
    test."""
    limit(monkeypatch, tmp_path / "base")
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("data-"):
            thread.join(10)


def limit(patch, base):
    """LIMITS in this process, and the base folder."""
    patch.setenv("NANOCHAT_BASE_DIR", str(base))
    patch.setattr(sources, "EAGER_BYTES", 1000)
    patch.setattr(prefetch, "AHEAD_RETRY_SECONDS", 0.05)
    patch.setattr(download, "BACKOFF_S", 0.01)
    patch.setattr(download, "ATTEMPTS", 3)
    hasten(patch, [])
    patch.setattr(
        hardware, "peak_flops", lambda device: (1e12, "not measured")
    )  # a measurement is half of the time of a run here


def documents(seed, n_tokens):
    """Texts that make n_tokens in bytes, each with its BOS."""
    generator, found, left = random.Random(seed), [], n_tokens
    while left:
        words = [
            f"{i} squared is {i * i}."
            for i in generator.choices(range(100), k=generator.randint(2, 9))
        ]
        text = (f"Shard {seed}: " + " ".join(words))[: left - 1].ljust(min(left - 1, 12), "!")
        if left - len(text) - 1 == 1:
            text += "!"
        found.append(text)
        left -= len(text) + 1
    return found


def parquet(texts, column="text"):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({column: texts}), file)
    return file.getvalue()


def shards(n=N_SHARDS):
    """{name: content} of climbmix's shards, each of ROWS rows."""
    return {f"shard_{i:05}.parquet": parquet(documents(i, ROWS * 32 + i)) for i in range(n)}


def order(n_train=N_SHARDS - 1, seed=42):
    """Names of the shards in the order in which the first epoch reads them."""
    corpus = Corpus("", [None] * n_train, [], "")
    return [f"shard_{i:05}.parquet" for i in Rows(corpus, None, 32, seed).shard_order(0)]


VAL = f"shard_{N_SHARDS - 1:05}.parquet"


def bodies(hub):
    """Names of the files whose content was sent, in order."""
    return [r.path.rpartition("/")[2] for r in hub.requests if r.start is not None]


def losses(folder, tag="run"):
    """The training losses and the validation of a run."""
    return small.losses(folder, tag), [
        line["val/bpb"] for line in small.lines(folder, tag) if "val/bpb" in line
    ]


def at_step(monkeypatch, step, action):
    """Call action() while the metrics line of a step is written: its update is done."""
    write = Record.write

    def write_and_act(self, **values):
        if values.get("step") == step and "train/loss" in values:
            action()
        write(self, **values)

    monkeypatch.setattr(Record, "write", write_and_act)


def eventually(condition):
    """Wait until a condition holds, at most ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Losses of a run all of whose shards were fetched and tokenized before it, and which had no
    network."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, folder / "base")
        with HubServer(int(os.environ["HF_ENDPOINT"].rpartition(":")[2])) as server:
            server.add(CLIMBMIX, shards())
            assert (
                data.main(["tokenize", "climbmix", "--all", "--tokenizer=byte", "--max-seq-len=32"])
                == 0
            )
            assert sorted(bodies(server)) == sorted(shards())
        assert small.run(folder, *FLAGS) == 0
    return losses(folder)


# --------------------------------------------------------------------------------------------------
# what is requested, and when


def test_shards_are_fetched_while_training(hub, tmp_path, reference, monkeypatch):
    """The first step needs the validation shard and the first; in the end those are here that the
    horizon needs, no others."""
    hub.add(CLIMBMIX, shards())
    at_start = []
    begin = Ahead.__init__
    monkeypatch.setattr(
        Ahead,
        "__init__",
        lambda self, *args: (at_start.extend(bodies(hub)), begin(self, *args))[1],
    )
    assert small.run(tmp_path, *FLAGS) == 0
    assert at_start == [VAL, order()[0]]
    assert sorted(bodies(hub)) == sorted([VAL, *order()[:4]])
    assert losses(tmp_path) == reference
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["data"]["revision"] == list(hub.repos[CLIMBMIX].commits)[-1]
        and VAL in config["data"]["note"]
    )


def test_nothing_is_fetched_beyond_the_horizon(hub, tmp_path):
    """18 steps end six rows before the end of the third shard."""
    hub.add(CLIMBMIX, shards())
    assert small.run(tmp_path, *FLAGS, "--num-iterations=18", *UNSAVED) == 0
    assert sorted(bodies(hub)) == sorted([VAL, *order()[:3]])


def test_fetched_ahead_by_the_app(hub, tmp_path, reference):
    """`nanochat data tokenize --tokens` has exactly what the run reads: the run asks for no file
    and makes no token file."""
    hub.add(CLIMBMIX, shards())
    flags = ["climbmix", "--tokenizer=byte", "--max-seq-len=32", f"--tokens={STEPS * 256}"]
    assert data.main(["fetch", *flags]) == 0
    assert (
        sorted(bodies(hub)) == sorted([VAL, *order()[:4]]) and not (base_dir() / "tokens").exists()
    )
    hub.requests.clear()
    assert data.main(["tokenize", *flags]) == 0
    made = {path: path.stat().st_ino for path in base_dir().glob("tokens/*/*.safetensors")}
    assert len(made) == 5
    hub.__exit__()
    assert small.run(tmp_path, *FLAGS) == 0
    assert {path: path.stat().st_ino for path in base_dir().glob("tokens/*/*.safetensors")} == made
    assert not bodies(hub) and losses(tmp_path) == reference


def test_more_than_one_epoch(hub, tmp_path):
    """Two training shards, 160 rows: each is fetched once."""
    hub.add(CLIMBMIX, shards(3))
    assert small.run(tmp_path, *FLAGS, *UNSAVED) == 0
    assert sorted(bodies(hub)) == sorted(shards(3))


# --------------------------------------------------------------------------------------------------
# resuming


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run (in run/) that was killed at step 18, and its base folder; its last checkpoint, step
    16, is inside the third shard."""
    folder = tmp_path_factory.mktemp("killed")
    with HubServer(int(os.environ["HF_ENDPOINT"].rpartition(":")[2])) as server:
        server.add(CLIMBMIX, shards())
        script = LIMITS + small.KILLER.format(root=str(small.ROOT), step=18, signal="SIGKILL")
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                *small.FLAGS,
                *FLAGS,
                f"--out-dir={folder}",
                "--model-tag=run",
            ],
            env=small.environment()
            | {"NANOCHAT_BASE_DIR": str(folder / "base"), "PYTHONPATH": str(small.ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.steps_of(folder / "run")[-1] == 16
    return folder


def test_resume_without_a_network(killed, tmp_path, reference, monkeypatch, capsys):
    """Everything is cached, the revision pinned: no request is even tried."""
    shutil.copytree(killed / "base", base_dir(), dirs_exist_ok=True)
    shutil.copytree(killed / "run", tmp_path / "run")
    monkeypatch.setattr(
        clients, "load_huggingface_hub", lambda: pytest.fail("the network was tried")
    )
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert "from step 16" in capsys.readouterr().out
    assert losses(tmp_path) == reference


def test_resume_with_everything_deleted(hub, killed, tmp_path, reference):
    """Downloads and token files are gone: those before the place of the run are not needed, their
    lengths are in the checkpoint."""
    hub.add(CLIMBMIX, shards())
    hub.add(
        CLIMBMIX,
        {
            "shard_00000.parquet": parquet(["something else " * 200]),
            "shard_00009.parquet": parquet(["more"]),
        },
    )
    shutil.copytree(killed / "run", tmp_path / "run")
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert losses(tmp_path) == reference
    assert sorted(bodies(hub)) == sorted([VAL, *order()[2:4]])


def test_a_new_commit_does_not_change_a_resumed_run(hub, tmp_path, reference, monkeypatch):
    """Stopped inside the second shard; then the data set is changed on the hub."""
    hub.add(CLIMBMIX, shards())
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert small.run(tmp_path, *FLAGS) == 75
    revision = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["revision"]
    newer = hub.add(CLIMBMIX, {name: parquet(["changed " * 300]) for name in shards()})
    hub.requests.clear()
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert losses(tmp_path) == reference
    assert not any(newer in request.path for request in hub.requests)
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["data"]["revision"] == revision
    )


# --------------------------------------------------------------------------------------------------
# faults


def test_a_fault_that_passes(hub, tmp_path, reference, capsys, monkeypatch):
    """Reading ahead fails on the fourth shard, reports it, and has it a little later; training has
    gone on."""
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    hub.fault(order()[1], "cut", 1, after=700)
    hub.fault(order()[3], "status", 2, code=503)
    fault = hub.faults[-1]
    at_step(monkeypatch, 2, lambda: eventually(lambda: fault.times == 0))
    assert small.run(tmp_path, *FLAGS) == 0
    printed = capsys.readouterr().out
    assert f"data: {order()[1]}: Error while downloading from the server" in printed
    assert (
        f"{order()[3]}: the server answers 503; trying again" in printed
        and "reading ahead failed, training continues" in printed
    )
    assert losses(tmp_path) == reference
    assert bodies(hub).count(order()[1]) == 2


def failed_as_it_should(folder, output, step=12):
    """The run stands at the last step that had data, and the user reads why, and how to go on."""
    summary = small.summary(folder)
    assert (
        summary["status"] == "failed"
        and summary["step"] == step
        and order()[2] in summary["reason"]
    )
    assert (
        order()[2] in output
        and "the server answers 500" in output
        and "Start again later" in output
        and "--resume" in output
    )
    assert checkpoint.steps_of(folder / "run")[-1] == step
    assert list(small.losses(folder)) == list(range(step))


def test_a_shard_that_never_comes(hub, tmp_path, reference, capsys):
    """The run saves at the last step that it has data for, exits with 1, and goes on when the fault
    is gone."""
    hub.add(CLIMBMIX, shards())
    hub.fault(order()[2], "status", None, code=500)
    assert small.run(tmp_path, *FLAGS) == 1
    failed_as_it_should(tmp_path, capsys.readouterr().out)
    assert (
        order()[2] in small.summary(tmp_path)["reason"]
        and "500" in small.summary(tmp_path)["reason"]
    )
    assert (
        small.run(tmp_path, *FLAGS, "--resume") == 1
    )  # still not there: nothing is lost by trying
    assert small.summary(tmp_path)["step"] == 12
    hub.faults.clear()
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert losses(tmp_path) == reference


def test_a_shard_that_never_comes_to_two_ranks(hub, tmp_path, reference):
    """Both ranks leave together, and one alone finishes what they began."""
    hub.add(CLIMBMIX, shards())
    hub.fault(order()[2], "status", None, code=500)
    (tmp_path / "ranks.py").write_text(
        LIMITS + "import sys, train\nsys.exit(train.run(sys.argv[1:]))\n"
    )
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            tmp_path / "ranks.py",
            *small.FLAGS,
            *FLAGS,
            f"--out-dir={tmp_path}",
            "--model-tag=run",
        ],
        env=small.environment() | {"PYTHONPATH": str(small.ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    failed_as_it_should(tmp_path, process.stdout)
    assert bodies(hub).count(order()[0]) == 1  # one rank fetched, the other found it
    hub.faults.clear()
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert small.losses(tmp_path) == pytest.approx(reference[0], abs=1e-5)


def test_a_shard_that_is_no_text(hub, tmp_path, capsys):
    """What is wrong with a later shard ends the run as a missing one does: saved, exit code 1."""
    hub.add(CLIMBMIX, shards() | {order()[2]: parquet(["x"], "words")})
    assert small.run(tmp_path, *FLAGS) == 1
    assert (
        small.summary(tmp_path)["step"] == 12
        and "has no column 'text'" in small.summary(tmp_path)["reason"]
    )
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 12


def test_a_signal_while_waiting_for_a_shard(hub, tmp_path, monkeypatch, reference):
    """SIGTERM while the third shard does not come: saved at once, exit code 75."""
    hub.add(CLIMBMIX, shards())
    hub.fault(order()[2], "status", None, code=503, headers={"Retry-After": "1"})
    monkeypatch.setattr(download, "ATTEMPTS", 4)
    at_step(
        monkeypatch,
        11,
        lambda: threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start(),
    )
    assert small.run(tmp_path, *FLAGS) == 75
    assert (
        small.summary(tmp_path)["status"] == "stopped"
        and checkpoint.steps_of(tmp_path / "run")[-1] == 12
    )


def test_no_network_at_the_start(tmp_path, capsys):
    assert small.run(tmp_path, *FLAGS) == 1
    shown = capsys.readouterr().err
    assert (
        f"{CLIMBMIX} was not listed: no connection" in shown
        and "--data=python" in shown
        and "Traceback" not in shown
    )
    assert not (tmp_path / "run").exists()


def test_no_network_for_shakespeare(hub, tmp_path, monkeypatch, capsys):
    """Nothing is asked before its one file is."""
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_URL", f"{hub.url}/raw/input.txt")
    hub.__exit__()
    assert small.run(tmp_path, *SHORT, "--data=shakespeare", "--tokenizer=char") == 1
    assert "Without a network there are --data=python, and --data=<path>" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["validation", "first"])
def test_a_shard_that_is_needed_before_the_start(hub, tmp_path, capsys, name):
    """Exit code 1 with the reason, and no run folder."""
    hub.add(CLIMBMIX, shards())
    name = VAL if name == "validation" else order()[0]
    hub.fault(name, "status", None, code=404)
    assert small.run(tmp_path, *FLAGS) == 1
    shown = capsys.readouterr().err
    assert name in shown and "404" in shown and not (tmp_path / "run").exists()


def test_a_disk_that_is_too_small(hub, tmp_path, capsys, monkeypatch):
    """There is room for the first shards but not for all that the horizon needs: said before the
    start, with numbers."""
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6000))
    assert small.run(tmp_path, *FLAGS) == 2
    shown = capsys.readouterr().err
    assert (
        "5,120 tokens of training need" in shown
        and "5.9 KiB free" in shown
        and "NANOCHAT_BASE_DIR" in shown
    )
    assert sorted(bodies(hub)) == sorted([VAL, order()[0]]) and not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_while_training(hub, tmp_path, capsys, monkeypatch, reference):
    hub.add(CLIMBMIX, shards())
    real, begin = shutil.disk_usage, Ahead.__init__

    def fill_up(self, *args):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
        begin(self, *args)

    monkeypatch.setattr(Ahead, "__init__", fill_up)
    assert small.run(tmp_path, *FLAGS) == 1
    printed = capsys.readouterr().out
    assert (
        "100 B are free" in printed
        and "Make room" in printed
        and small.summary(tmp_path)["step"] == 6
    )
    monkeypatch.setattr(Ahead, "__init__", begin)
    monkeypatch.setattr(shutil, "disk_usage", real)
    assert small.run(tmp_path, *FLAGS, "--resume") == 0
    assert losses(tmp_path) == reference


# --------------------------------------------------------------------------------------------------
# other data sets


TEXTS = [f"{i} squared is {i * i}, and twice {i} is {2 * i}." for i in range(300)]
SHORT = ["--num-iterations=3", "--eval-every=3", "--sample-every=-1", *UNSAVED]


def test_a_column_of_csv_files_with_a_validation_split(hub, tmp_path):
    rows = "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS))
    hub.add(
        "me/csv",
        {
            "train.csv": f"id,story\n{rows}".encode(),
            "validation.csv": f'id,story\n1,"{" ".join(TEXTS[:20])}"\n'.encode(),
        },
    )
    assert small.run(tmp_path, *SHORT, "--data=hf:me/csv:::story") == 0
    assert (
        "the split 'validation'"
        in json.loads((tmp_path / "run" / "config.json").read_text())["data"]["note"]
    )
    assert small.run(tmp_path, *SHORT, "--data=hf:me/csv:::tale", "--overwrite") == 2


def test_jsonl_with_a_config_and_a_split(hub, tmp_path):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()
    readme = (
        "---\nconfigs:\n- config_name: old\n  data_files: old/*.jsonl\n"
        "- config_name: new\n  data_files:\n"
        "  - split: extra\n    path: new/*.jsonl\n---\n"
    )
    hub.add(
        "me/json",
        {
            "README.md": readme.encode(),
            "old/a.jsonl": b'{"body": "x"}\n',
            "new/a.jsonl": lines,
            "new/b.jsonl": lines[: lines.index(b"\n", 3000)],
        },
    )
    assert small.run(tmp_path, *SHORT, "--data=hf:me/json:new:extra:body") == 0
    assert set(bodies(hub)) >= {"a.jsonl", "b.jsonl"} and not any(
        "/old/" in r.path for r in hub.requests if r.start is not None
    )
    assert (
        "the last file, b.jsonl"
        in json.loads((tmp_path / "run" / "config.json").read_text())["data"]["note"]
    )


def test_a_single_file_holds_out_its_last_tenth(hub, tmp_path):
    hub.add("me/one", {"data.parquet": parquet(TEXTS, "content")})
    assert small.run(tmp_path, *SHORT, "--data=hf:me/one:::content") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["note"] == "held out: the last tenth (30 of 300 documents)"
    assert config["data"]["train_bytes"] == sum(map(len, TEXTS[:270]))
    assert bodies(hub) == ["data.parquet"]


def test_endings_in_upper_case(hub):
    """The same rule as on this machine, also for the estimate of the text's size. (Which files make
    a split is what datasets
    says, and it passes over formats in upper case, not over compressions.)"""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    hub.add(
        "me/upper",
        {
            "TRAIN-0.jsonl.GZ": gzip.compress(lines),
            "TRAIN-1.jsonl.GZ": gzip.compress(lines[: lines.index(b"\n") + 1]),
        },
    )
    corpus = open_corpus("hf:me/upper")
    assert [document for shard in corpus.train for document in shard.documents()] == TEXTS
    assert [document for shard in corpus.val for document in shard.documents()] == TEXTS[:1]
    assert corpus.train[0].n_bytes == round(PARQUET_TEXT_FACTOR * corpus.train[0].files[0].n_bytes)


def test_tinystories_by_name(hub, tmp_path):
    hub.add(
        "roneneldan/TinyStories",
        {f"data/train-0000{i}-of-00002-abc.parquet": parquet(documents(i, 3000)) for i in range(2)}
        | {"data/validation-00000-of-00001-abc.parquet": parquet(TEXTS[:50])},
    )
    assert small.run(tmp_path, *SHORT, "--data=tinystories") == 0
    assert len(set(bodies(hub))) == 2 and any("validation" in name for name in bodies(hub))


def test_shakespeare_by_name(hub, tmp_path, monkeypatch):
    """One text, cut by characters, its tokenizer made of its characters; then once more without a
    network."""
    text = (
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
        * 60
    ).encode()
    hub.add_url("/raw/input.txt", text)
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_URL", f"{hub.url}/raw/input.txt")
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_BYTES", len(text))
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_SHA256", sha256_hex(text))
    monkeypatch.setattr(sources, "EAGER_BYTES", 1 << 20)
    assert small.run(tmp_path, *SHORT, "--data=shakespeare", "--tokenizer=char") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        config["tokenizer"]["kind"] == "char"
        and config["tokenizer"]["vocab_size"] == len(set(text)) + 1
    )
    assert config["data"]["train_bytes"] == len(text) - len(text) // 10 and bodies(hub) == [
        "input.txt"
    ]
    hub.__exit__()
    assert small.run(tmp_path, *SHORT, "--data=shakespeare", "--tokenizer=char", tag="again") == 0
    assert small.losses(tmp_path) == small.losses(tmp_path, "again")


def test_eager_and_lazy_are_the_same(hub, tmp_path, reference, monkeypatch):
    """A data set below EAGER_BYTES is fetched whole before the first step, with the same rows."""
    hub.add(CLIMBMIX, shards())
    monkeypatch.setattr(sources, "EAGER_BYTES", 1 << 30)
    assert small.run(tmp_path, *FLAGS, *UNSAVED) == 0
    assert sorted(bodies(hub)) == sorted(shards())
    assert small.losses(tmp_path) == reference[0]
