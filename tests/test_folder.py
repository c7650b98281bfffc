"""config.json and summary.json of run folders that are damaged or of another version."""

import json
import shutil
import subprocess

import pytest

from nanochat.common import UsageError
from nanochat.run import folder as run_folder
from nanochat.run.folder import RunFolder, status_of


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
    monkeypatch.setattr(run_folder, "__file__", str(root / "nanochat" / "run" / "folder.py"))
    return root


def test_the_commit_is_that_of_our_own_repository(tree, monkeypatch):
    assert run_folder.provenance()["git_commit"] is None
    # the tree was unpacked inside another repository
    git(tree.parent, "init")
    git(tree.parent, "commit", "--allow-empty", "--message=outer")
    assert run_folder.provenance()["git_commit"] is None
    # a repository without a commit
    git(tree, "init")
    assert run_folder.provenance()["git_commit"] is None
    git(tree, "commit", "--allow-empty", "--message=inner")
    commit = git(tree, "rev-parse", "HEAD")
    assert run_folder.provenance()["git_commit"] == commit
    # as in a hook of the other one
    monkeypatch.setenv("GIT_DIR", str(tree.parent / ".git"))
    assert run_folder.provenance()["git_commit"] == commit


def test_a_repository_that_git_does_not_trust_has_no_commit(tree, monkeypatch):
    git(tree, "init")
    git(tree, "commit", "--allow-empty", "--message=inner")
    # git's own switch for its tests
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert run_folder.provenance()["git_commit"] is None


def test_without_git_there_is_no_commit(tree, monkeypatch):
    git(tree, "init")
    git(tree, "commit", "--allow-empty", "--message=inner")
    monkeypatch.setenv("PATH", "")
    assert run_folder.provenance()["git_commit"] is None
