"""What is installed: the ranges of pyproject.toml, the tested versions, line ends of scripts."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# versions that are known to fail, and how
TOO_OLD = {
    # megabytes of text without a blank make it panic or hang
    "tiktoken": "0.12.0",
    # transformers 4.57, the oldest that reads exports, refuses it
    "tokenizers": "0.21.4",
}


@pytest.fixture(scope="module")
def ranges():
    """(group, Requirement) of pyproject.toml; the group is "" or the name of an extra."""
    project = pytest.importorskip("tomllib", reason="part of Python from 3.11 on").loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return [(group, Requirement(text)) for group, texts in groups.items() for text in texts]


def constraints():
    """{package: version} of runs/constraints.txt."""
    text = (ROOT / "runs" / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^;\s]+)", text, re.MULTILINE))


def test_the_tested_versions_are_in_the_ranges(ranges):
    versions = constraints()
    for _, wanted in ranges:
        assert wanted.specifier.contains(versions[wanted.name], prereleases=True), str(wanted)


@pytest.mark.parametrize("package", TOO_OLD)
def test_versions_that_are_known_to_fail_are_excluded(ranges, package):
    found = [wanted for _, wanted in ranges if wanted.name == package]
    assert found
    assert not any(wanted.specifier.contains(TOO_OLD[package]) for wanted in found)


def test_data_files_of_the_package_are_installed():
    """What a module reads from beside itself is in the built package too."""
    project = pytest.importorskip("tomllib", reason="part of Python from 3.11 on").loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )
    (patterns,) = project["tool"]["setuptools"]["package-data"].values()
    package = ROOT / "nanochat"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    others = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert installed == others


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="no git checkout"
)
def test_line_ends_are_kept():
    """A checkout on Windows has scripts that bash can read, and pictures that are whole."""
    names = ["runs/test.sh", "runs/slurm.sh", "train.py", "runs/pictures/depths_core.png"]
    command = ["git", "check-attr", "eol", "text", "--", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    assert [found[f"{name}: eol"] for name in names[:3]] == ["lf"] * 3
    assert found[f"{names[3]}: text"] == "unset"
