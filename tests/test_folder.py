"""config.json and summary.json of run folders that are damaged or of another version."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disk import read_only

from nanochat.apps import compare, dpo, evaluate, export, report, sample, serve, sft
from nanochat.common import UsageError
from nanochat.run.folder import RunFolder, provenance, run_argument, saved_step, status_of

ROOT = Path(__file__).resolve().parent.parent


def test_a_run_folder_of_a_newer_format_is_refused(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_config({"args": {}})
    (tmp_path / "config.json").write_text(json.dumps({**folder.read_config(), "format": 99}))
    with pytest.raises(UsageError, match="format 99.*version of nanochat that wrote it"):
        folder.read_config()


@pytest.mark.parametrize("content", [None, b"", b'{"status": "comp', b"[]", b"\xff"])
def test_the_status_in_a_damaged_summary_is_unknown(tmp_path, content):
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    assert status_of(tmp_path) is None


@pytest.mark.parametrize(
    "summary, flags, steps, known",
    [
        # what the summary says is believed
        ({"checkpoint": 4}, {}, 9, 4),
        ({"checkpoint": None, "status": "running"}, {"save_every": 2}, 9, None),
        # of earlier versions
        ({"status": "stopped", "step": 9}, {}, 8, 9),
        ({"status": "stopped", "step": 0}, {}, 0, None),
        ({"status": "stopped", "step": 9}, {"no_save": True}, 8, None),
        ({"status": "running", "step": 5}, {"save_every": 4}, 9, 8),
        ({"status": "running", "step": 5}, {"save_every": 10}, 9, None),
        # lost or damaged
        (None, {"save_every": 4}, 9, 8),
        (None, {"save_every": 4, "save_at": "7,9,11"}, 9, 9),
        (None, {"save_at": "3,10"}, 9, 3),
        (None, {"save_every_minutes": 0.1}, 9, 7),
        (None, {"save_every_minutes": 10}, 9, None),
        (None, {}, 20, 20),
        ([], {"save_every": 4}, 9, 8),
    ],
)
def test_the_checkpoint_that_a_run_had(tmp_path, summary, flags, steps, known):
    """The run has 20 steps of a second; `steps` are in its metrics."""
    args = {"no_save": False, "save_every": -1, "save_every_minutes": -1, **flags}
    config = {"args": args, "plan": {"num_iterations": 20}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "total_training_time": float(step)} for step in range(steps + 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saved_step(tmp_path) == known


def test_a_tag_names_a_run_in_the_default_folder(tmp_path, monkeypatch):
    """Of all commands that take a run folder; what has that name here comes first."""
    monkeypatch.chdir(tmp_path)
    assert run_argument("d4") == "d4"
    RunFolder(tmp_path / "out" / "d4").path.mkdir(parents=True)
    assert run_argument("d4") == "d4"
    RunFolder(tmp_path / "out" / "d4").write_config({})
    assert run_argument("d4") == "out/d4"
    assert [run_argument(text) for text in ("", ".", "./d4", "d4/")] == ["", ".", "./d4", "d4/"]
    for app in (sample, serve, evaluate):
        assert app.build_parser().parse_args(["d4"]).runs == ["out/d4"]
    assert export.build_parser().parse_args(["d4", "exported"]).source == "out/d4"
    for app in (sft, dpo):
        assert app.parse_args(["d4", "--data", "x.jsonl"]).source == "out/d4"
    for app in (report, compare):
        with pytest.raises(UsageError, match="out/d4"):
            app.main(["d4"])
    (tmp_path / "d4").touch()
    assert run_argument("d4") == "d4"


def test_what_a_killed_process_left_is_deleted(tmp_path):
    """By the next one that holds the folder; files of others stay."""
    program = (
        "import os, sys\n"
        "from nanochat import common\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "common.write_json(sys.argv[1], {})\n"
    )
    (tmp_path / "checkpoints" / ".step_000005.partial").mkdir(parents=True)
    (tmp_path / ".notes").touch()
    expected = {path.name for path in tmp_path.rglob("*")} | {".lock"}
    for name in ("summary.json", "checkpoints/best"):
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert len(list(tmp_path.rglob("*"))) == len(expected) - 1 + 2
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.release()
    assert {path.name for path in tmp_path.rglob("*")} == expected


def test_a_run_folder_of_another_user_is_refused(shared_base):
    (shared_base / ".lock").touch()
    with read_only(shared_base), pytest.raises(UsageError, match="cannot be written .Permission"):
        RunFolder(shared_base).claim()


def git(folder, *arguments):
    """Run git as somebody, whatever the configuration of this machine; returns what it prints."""
    command = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The module in a source tree of its own, without a repository."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    root = tmp_path / "outer" / "nanochat"
    (root / "nanochat" / "run").mkdir(parents=True)
    monkeypatch.setattr("nanochat.run.folder.__file__", str(root / "nanochat/run/folder.py"))
    return root


def test_the_commit_is_that_of_our_own_repository(tree, monkeypatch):
    assert provenance()["git_commit"] is None
    # the tree was unpacked inside another repository
    git(tree.parent, "init")
    git(tree.parent, "commit", "--allow-empty", "--message=outer")
    assert provenance()["git_commit"] is None
    # a repository without a commit
    git(tree, "init")
    assert provenance()["git_commit"] is None
    git(tree, "commit", "--allow-empty", "--message=inner")
    commit = git(tree, "rev-parse", "HEAD")
    assert provenance()["git_commit"] == commit
    # as in a hook of the other one
    monkeypatch.setenv("GIT_DIR", str(tree.parent / ".git"))
    assert provenance()["git_commit"] == commit


def test_a_repository_that_git_does_not_trust_has_no_commit(tree, monkeypatch):
    git(tree, "init")
    git(tree, "commit", "--allow-empty", "--message=inner")
    # git's own switch for its tests
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert provenance()["git_commit"] is None


def test_without_git_there_is_no_commit(tree, monkeypatch):
    git(tree, "init")
    git(tree, "commit", "--allow-empty", "--message=inner")
    monkeypatch.setenv("PATH", "")
    assert provenance()["git_commit"] is None
