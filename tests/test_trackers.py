"""W&B and TensorBoard get what metrics.jsonl holds, once, and never end or delay a run.

Nothing here leaves this machine."""

import gzip
import http.server
import json
import os
import pty
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.run.metrics import Record, read_lines
from nanochat.run.trackers import POSITION_FILE, Trackers, problems

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "args": {"depth": 4, "data": "python", "num_iterations": -1},
    "plan": {"num_iterations": 12, "groups": {"head": {"lr": 0.1}}},
    "seed": 42,
    "git_commit": None,
}
# In every line, so that W&B can draw it against them.
POSITION = {"tokens", "total_training_flops", "total_training_time"}
SUMMARY = {
    "status": "completed",
    "reason": "",
    "step": 12,
    "tokens": 3072,
    "val_bpb": 1.25,
    "core_metric": None,
    "mfu": 40.5,
}
wandb = pytest.importorskip("wandb")
pytest.importorskip("tensorboard")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """W&B without network, account or memory of an earlier test."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


def metrics_lines(first, last):
    """Lines as train.py writes them: an evaluation every third step, then the step.

    The loss of step 5 is not a number."""
    generator = np.random.default_rng(0)
    losses = generator.normal(size=100)
    for step in range(first, last):
        position = {
            "step": step,
            "tokens": 524288 * step,
            "total_training_flops": 1.7e17 * step,
            "total_training_time": 0.1 * step,
        }
        if step and step % 3 == 0:
            yield {
                **position,
                "val/bpb": 1 + losses[step] / 10,
                "val/loss": 2.5,
                "core_metric": 0.01 * step,
                "centered_results": {"copa": 0.25, "boolq": -0.5},
                "core/copa": 0.625,
            }
            yield {**position, "val/bpb": None, "reason": "an evaluation that failed"}
        loss = float("nan") if step == 5 else float(losses[step])
        yield {
            **position,
            "train/loss": loss,
            "train/lr": 0.02,
            "train/dt": 0.5,
            "train/tok_per_sec": 12345.678,
            "train/epoch": step / 7,
        }


def wandb_records(folder):
    """The records of all W&B files below a folder, in the order of their starts.

    The files are LevelDB logs: after 7 bytes, blocks of 32 KiB with pieces of (checksum, length,
    kind, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(
        Path(folder).glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns
    ):
        content, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", content, at)
            whole += content[at + 7 : at + 7 + length]
            at += 7 + length
            # the whole, or the last piece
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""


def wandb_history(folder, twice_from=999):
    """{(step, name): value} that W&B holds; fails if one appears twice before `twice_from`."""
    found = {}
    for record in wandb_records(folder):
        if record.HasField("history"):
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            for name in row.keys() - {"step"}:
                if not name.startswith("_"):
                    assert (
                        (row["step"], name) not in found
                        or name in POSITION
                        or row["step"] >= twice_from
                    )
                    assert (
                        found.setdefault((row["step"], name), row[name]) == row[name]
                        or name == "samples"
                    )
    return found


def tensorboard_scalars(folder):
    """{(step, name): value} that TensorBoard shows; fails if one appears twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(Path(folder) / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (event.step, name) not in found
            found[event.step, name] = event.value
    return found, events


def jsonl_numbers(path):
    """{(step, name): number} of a metrics.jsonl, dicts flattened by hand."""
    found = {}
    for line in read_lines(path):
        for name, value in line.items():
            if name == "centered_results":
                found |= {(line["step"], f"centered_results/{k}"): v for k, v in value.items()}
            elif isinstance(value, int | float) and name != "step":
                found[line["step"], name] = value
    return found


def log_run(folder, first, last, run_id="abc", exit_code=0, end=True):
    """Start, train and end a run as train.py does; returns (trackers, printed lines)."""
    printed = []
    log = Record(Path(folder) / "metrics.jsonl")
    log.keep_before(first)
    trackers = Trackers(
        folder, "a name", True, CONFIG, run_id, first, printed.append, read_lines(log.path)
    )
    for line in metrics_lines(first, last):
        log.write(**line)
        trackers.log(line)
    trackers.text(last, "def <f>", "(x):\n    return x")
    trackers.text(last, "", "second")
    if end:
        trackers.finish(SUMMARY, exit_code)
    log.close()
    return trackers, printed


def assert_all_agree(folder, twice_from=999):
    """Every number of metrics.jsonl is once in both trackers, and nothing else is.

    Returns how many were compared."""
    expected = jsonl_numbers(Path(folder) / "metrics.jsonl")
    in_wandb = {
        key: value
        for key, value in wandb_history(folder, twice_from).items()
        if key[1] != "samples"
    }
    in_board, _ = tensorboard_scalars(folder)
    assert in_wandb == expected
    assert in_board.keys() == expected.keys()
    # TensorBoard keeps fp32.
    assert in_board == {key: np.float32(value) for key, value in expected.items()}
    return len(in_wandb) + len(in_board)


def test_three_copies_of_every_number(tmp_path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    _, printed = log_run(tmp_path, 0, 40)
    assert states == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert assert_all_agree(tmp_path) > 500
    assert len(printed) == 2 and "\n" not in "".join(printed)
    assert (
        printed[0].startswith("W&B: offline")
        and f"wandb sync {tmp_path}/wandb/offline-run-" in printed[0]
    )
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in printed[1]
    assert (5, "train/loss") not in wandb_history(tmp_path) and (5, "train/dt") in wandb_history(
        tmp_path
    )


def test_config_summary_axis_and_samples_land(tmp_path):
    trackers, _ = log_run(tmp_path, 0, 4, end=False)
    trackers.update_config({**CONFIG, "plan": {"num_iterations": 99}})
    trackers.finish(SUMMARY, 75)
    # a second time: nothing
    trackers.finish(SUMMARY, 1)
    config, summary, metrics, run, exits, preempting = {}, {}, {}, None, [], False
    for record in wandb_records(tmp_path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "summary":
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            exits.append(record.exit.exit_code)
        preempting |= kind == "preempting"
    assert (
        run.run_id == "abc"
        and run.display_name == "a name"
        and run.project == "nanochat"
        and not run.HasField("git")
    )
    assert (
        config["depth"] == 4
        and config["num_iterations"] == -1
        and config["plan"]["num_iterations"] == 99
        and config["seed"] == 42
    )
    assert summary.items() >= SUMMARY.items()
    assert metrics["*"] == "step"
    assert exits == [75] and preempting

    assert [key for key in wandb_history(tmp_path) if key[1] == "samples"] == [(4, "samples")]
    page = next(tmp_path.glob("wandb/offline-run-*/files/media/html/samples_*.html")).read_text()
    assert "<b>def &lt;f&gt;</b>(x):\n    return x" in page and "second" in page
    assert not list(tmp_path.glob("wandb/**/*.patch")) and not list(tmp_path.glob("wandb/**/*.py"))
    _, events = tensorboard_scalars(tmp_path)
    shown = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in events.Tags()["tensors"]
    }
    assert (
        shown["samples/0/text_summary"] == "    def <f>(x):\n        return x"
        and "second" in shown["samples/1/text_summary"]
    )
    assert '"depth": 4' in shown["config/text_summary"]


def test_resuming_repeats_nothing_and_leaves_nothing_out(tmp_path):
    """From the last step, an earlier one, the beginning: one W&B run, each number once."""
    log_run(tmp_path, 0, 10, exit_code=75)
    for first, last in [(10, 14), (7, 18), (0, 20)]:
        log_run(tmp_path, first, last)
        assert_all_agree(tmp_path)
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert {run.run_id for run in runs} == {"abc"} and len(
        list(tmp_path.glob("wandb/offline-run-*"))
    ) == 4


def test_resuming_after_a_kill(tmp_path):
    """SIGKILL while lines are logged: what W&B lost is given again.

    What it may have kept may be there twice, with the same values."""
    script = f"""
import os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_trackers
from nanochat.run.trackers import FLUSH_SECONDS
trackers, _ = test_trackers.log_run({str(tmp_path)!r}, 0, 10, end=False)
time.sleep(2 * FLUSH_SECONDS)
trackers.log(list(test_trackers.metrics_lines(10, 11))[-1])
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], timeout=240)
    assert killed.returncode == -signal.SIGKILL
    noted = json.loads((tmp_path / "wandb" / POSITION_FILE).read_text())
    # what was given at the last look, not what was given since
    assert noted["step"] < 10
    log_run(tmp_path, 4, 12)
    assert_all_agree(tmp_path, twice_from=0)


def test_trackers_switched_on_later_get_the_whole_run(tmp_path):
    log = Record(tmp_path / "metrics.jsonl")
    for line in metrics_lines(0, 9):
        log.write(**line)
    log.close()
    log_run(tmp_path, 7, 12)
    assert_all_agree(tmp_path)


def test_another_run_id_starts_again(tmp_path):
    """As after --overwrite, or where resuming changes what the steps were."""
    log_run(tmp_path, 0, 10)
    log_run(tmp_path, 5, 8, run_id="other")
    assert {record.run.run_id for record in wandb_records(tmp_path) if record.HasField("run")} == {
        "abc",
        "other",
    }
    rows = [
        json.loads(item.value_json)
        for record in wandb_records(tmp_path)
        for item in record.history.item
        if (item.key or item.nested_key[0]) == "train/lr"
    ]
    assert len(rows) == 10 + 8


@pytest.mark.parametrize(
    "variables",
    [
        {"WANDB_RUN_ID": "other"},
        {"WANDB_RUN_ID": "other", "WANDB_SWEEP_ID": "sweep"},
        # as in a sweep whose agent names no run
        {"WANDB_SWEEP_ID": "sweep"},
    ],
    ids=["run", "run of a sweep", "sweep"],
)
def test_resuming_under_a_run_that_the_environment_names(tmp_path, monkeypatch, variables):
    """W&B takes that one: it gets the earlier steps too, and a line says so, once."""
    log_run(tmp_path, 0, 10)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, lines = log_run(tmp_path, 5, 12)
    records = list(wandb_records(tmp_path))
    runs = {record.run.run_id for record in records if record.HasField("run")}
    (new,) = runs - {"abc"}
    assert "WANDB_RUN_ID" not in variables or new == "other"
    (line,) = [line for line in lines if "earlier steps" in line]
    assert "abc" in line and new in line
    rows = [
        item
        for record in records
        for item in record.history.item
        if (item.key or item.nested_key[0]) == "train/lr"
    ]
    assert len(rows) == 10 + 12
    if "WANDB_RUN_ID" in variables:
        _, lines = log_run(tmp_path, 12, 14)
        assert not any("earlier steps" in line for line in lines)


@pytest.mark.parametrize("method", ["log", "text", "update_config", "finish"])
def test_a_tracker_that_raises_is_switched_off(tmp_path, monkeypatch, method):
    def broken(self, *arguments):
        raise ConnectionError("no\nluck")

    monkeypatch.setattr(f"nanochat.run.trackers._Wandb.{method}", broken)
    trackers, printed = log_run(tmp_path, 0, 6, end=False)
    trackers.update_config(CONFIG)
    trackers.finish(SUMMARY, 0)
    failed = [line for line in printed if "switched off" in line]
    assert len(failed) == 1 and failed[0].startswith(
        "W&B: switched off after an error, training continues (no luck)"
    )
    expected = jsonl_numbers(tmp_path / "metrics.jsonl")
    assert tensorboard_scalars(tmp_path)[0].keys() == expected.keys()


def test_who_will_not_wait_for_uploads(tmp_path, monkeypatch):
    """Ctrl-C at the very end does not turn a finished run into an interrupted one."""

    def waits(self, **arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb.Run, "finish", waits)
    _, printed = log_run(tmp_path, 0, 3)
    assert printed[-1].startswith(
        "trackers: interrupted before they finished; to upload the rest: wandb sync "
    )


def test_a_tracker_that_cannot_start(tmp_path):
    (tmp_path / "tensorboard").write_text("a file in the way")
    _, printed = log_run(tmp_path, 0, 3)
    assert [
        line
        for line in printed
        if line.startswith("TensorBoard: cannot start, training continues without it")
    ]
    assert (2, "train/loss") in wandb_history(tmp_path)


def test_disabled_and_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    printed = []
    trackers = Trackers(tmp_path, "a name", False, CONFIG, "abc", 0, printed.append)
    trackers.log({"step": 0, "train/loss": 1.0})
    trackers.finish(SUMMARY, 0)
    assert printed == ["W&B: disabled by its own settings (WANDB_MODE=disabled)"]
    trackers = Trackers(tmp_path, "dummy", False, CONFIG, "abc", 0, printed.append)
    assert len(printed) == 1 and not trackers.active and not (tmp_path / "wandb").exists()


def test_missing_packages_are_named_before_training(monkeypatch, tmp_path):
    assert problems("a name", True) == problems("dummy", False) == []
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, package)
        # as W&B leaves in the working directory
        (tmp_path / package).mkdir()
    found = problems("a name", True)
    assert len(found) == 2 and all(
        part in text
        for text, parts in zip(
            found,
            (["--run=a name", "pip install wandb"], ["--tensorboard", "pip install tensorboard"]),
            strict=True,
        )
        for part in parts
    )
    assert problems("dummy", False) == []


# A start without the fixture's WANDB_MODE, on a terminal that would answer questions, with
# train.py's signal handlers.
STARTER = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
from nanochat.run import trackers as module
module.INIT_SECONDS = 2
from nanochat import signals
stop = signals.StopSignals(speaks=False)
stop.at_once = False
started = time.monotonic()
def report(text):
    print("LINE", text, flush=True)
trackers = module.Trackers({folder!r}, "a name", False, {config!r}, "abc", 0, report)
trackers.log({{"step": 0, "train/loss": 1.0}})
took = time.monotonic() - started
os.kill(os.getpid(), signal.SIGTERM)
handled = stop.requested
stop.requested = False
os.killpg(os.getpgid(0), signal.SIGINT)
trackers.log({{"step": 1, "train/loss": 0.5}})
trackers.finish({{"step": 2}}, 75)
print("TOOK", took, handled and stop.requested, flush=True)
sys.exit(75)
"""


def start_without_account(folder, **environment):
    """(exit code, lines on the terminal, seconds) of STARTER."""
    script = STARTER.format(root=str(ROOT), folder=str(folder), config=CONFIG)
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("WANDB") and "proxy" not in k.lower()
    }
    ours, theirs = pty.openpty()
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**clean, "HOME": str(folder), "OMP_NUM_THREADS": "1", **environment},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        # the terminal's other end is closed
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    return (
        process.wait(timeout=60),
        shown.decode().replace("\r", "").strip().split("\n"),
        time.monotonic() - started,
    )


@pytest.mark.parametrize("why", ["no key", "malformed key", "closed port", "silent server"])
def test_without_account_or_server_it_is_offline_with_one_line(tmp_path, why):
    environment, listener = {}, socket.socket()
    listener.bind(("127.0.0.1", 0))
    # takes the call and never answers, as behind some firewalls
    if why == "silent server":
        listener.listen(20)
    if why == "malformed key":
        environment = {"WANDB_API_KEY": "short"}
    elif why != "no key":
        environment = {
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_BASE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}",
        }
    code, shown, seconds = start_without_account(tmp_path, **environment)
    listener.close()
    assert code == 75
    assert len(shown) == 2, shown
    assert shown[0].startswith("LINE W&B: offline (") and "to upload later: wandb sync" in shown[0]
    # both signals reached train.py's handlers
    assert shown[1].endswith("True")
    assert seconds < 20
    assert wandb_history(tmp_path) == {(0, "train/loss"): 1.0, (1, "train/loss"): 0.5}
    # the failed attempt left none
    assert len(list(tmp_path.glob("wandb/*run-*"))) == 1


class Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs. `rows` collects history, `runs` the ids it knows."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = json.loads(
            gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        )
        query, variables, reply = sent.get("query", ""), sent.get("variables") or {}, {}
        name = variables.get("name")
        project = {"id": "p", "name": "nanochat", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": name,
            "displayName": "",
            "project": project,
            "config": "{}",
            "wandbConfig": '{"t": 1}',
            "tags": [],
            "summaryMetrics": self.server.summary,
            "historyTail": "[]",
            "eventsTail": "[]",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(self.server.rows),
        }
        if "upsertBucket" in query:
            reply = {"upsertBucket": {"bucket": bucket, "inserted": name not in self.server.runs}}
            self.server.runs.append(name)
        elif "RunResumeStatus" in query:
            reply = {"model": {**project, "bucket": bucket if name in self.server.runs else None}}
        elif "viewer" in query:
            reply = {
                "viewer": {
                    "id": "v",
                    "entity": "me",
                    "username": "me",
                    "flags": "{}",
                    "teams": {"edges": []},
                }
            }
        elif "CreateRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_address[1]}/"
            self.server.files += variables["files"]
            reply = {
                "createRunFiles": {
                    "runID": "b",
                    "uploadHeaders": [],
                    "files": [
                        {"name": file, "uploadUrl": url + file} for file in variables["files"]
                    ],
                }
            }
        self.server.rows += [
            json.loads(row)
            for row in sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        ]
        self.server.summary = (
            sent.get("files", {})
            .get("wandb-summary.json", {})
            .get("content", [self.server.summary])[0]
        )
        self.server.ends += [sent["exitcode"]] if sent.get("complete") else []
        self.answer({"data": reply} if query else {"limits": {}})

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.skipif(
    not wandb.__version__.startswith("0.31."),
    reason="the server imitates what this version of wandb asks for",
)
def test_online(tmp_path, monkeypatch):
    """Against a small server on this machine: everything arrives once, also over a resume."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.runs, server.rows, server.ends, server.files, server.summary = [], [], [], [], "{}"
    # connections that wandb drops
    server.handle_error = lambda *arguments: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()
    _, printed = log_run(tmp_path, 0, 10, exit_code=75)
    assert printed[0] == f"W&B: http://127.0.0.1:{server.server_address[1]}/me/nanochat/runs/abc"
    log_run(tmp_path, 6, 14)

    def history(rows, twice_from=999):
        found = {}
        for row in rows:
            for name in row.keys() - {"step", "samples"}:
                if not name.startswith("_"):
                    assert (
                        (row["step"], name) not in found
                        or name in POSITION
                        or row["step"] >= twice_from
                    )
                    found[row["step"], name] = row[name]
        return found

    assert history(server.rows) == jsonl_numbers(tmp_path / "metrics.jsonl")
    assert set(server.runs) <= {"abc", None} and server.ends == [75, 0]
    assert not [name for name in server.files if name.endswith((".py", ".patch")) or "code" in name]

    # a kill before all was sent: the server decides what it is given again
    server.rows = [row for row in server.rows if row["step"] <= 9]
    server.summary = '{"step": 9}'
    log_run(tmp_path, 14, 15)
    assert history(server.rows, twice_from=9) == jsonl_numbers(tmp_path / "metrics.jsonl")
    server.shutdown()
    server.server_close()
