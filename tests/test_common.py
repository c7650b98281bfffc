"""Files that are whole or absent, text that is safe to show, seeds, and numbers for people."""

import argparse
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from disk import read_only

from nanochat import common
from nanochat.common import (
    Unavailable,
    UsageError,
    base_dir,
    ceil_div,
    delete_folder,
    human_bytes,
    human_time,
    in_a_line,
    new_folder,
    number_or_auto,
    path_argument,
    printable,
    read_json,
    round_up,
    sha256_file,
    sha256_hex,
    step_argument,
    stream_seed,
    valid_unicode,
    whole_number,
    write_atomic,
    write_json,
)

# ---- numbers ----


@pytest.mark.parametrize(
    "value, divisor, expected",
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (-5, 4, -1), (10**30 + 1, 10**30, 2)],
)
def test_ceil_div(value, divisor, expected):
    assert ceil_div(value, divisor) == expected


@pytest.mark.parametrize("value, multiple, expected", [(0, 64, 0), (1, 64, 64), (128, 64, 128)])
def test_round_up(value, multiple, expected):
    assert round_up(value, multiple) == expected


@pytest.mark.parametrize(
    "n, expected",
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (-1536, "-1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_human_bytes(n, expected):
    assert human_bytes(n) == expected


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "0.0s"),
        (4.25, "4.2s"),
        (60, "1m00s"),
        (65.9, "1m05s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (3725, "1h02m"),
        (86399, "23h59m"),
        (90000, "1d01h"),
        (864000, "10d00h"),
    ],
)
def test_human_time(seconds, expected):
    assert human_time(seconds) == expected


def test_argument_types():
    assert number_or_auto("auto") == "auto" and number_or_auto("-1") == -1
    assert step_argument("best") == "best" and step_argument("20") == 20
    assert [whole_number(text) for text in ("1e5", "-1", "0", "2.0")] == [100000, -1, 0, 2]
    for text in ("1.5", "nan", "inf", "1e30", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
            whole_number(text)
    for parse in (number_or_auto, step_argument):
        with pytest.raises(ValueError):
            parse("last")


# ---- text ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("plain, two\nlines\tand a tab", "plain, two\nlines\tand a tab"),
        ("déjà vu 漢字 🙂", "déjà vu 漢字 🙂"),
        # clears the screen; returns to the start of the line; C1 controls act like escape sequences
        ("\x1b[2J", "\ufffd[2J"),
        ("good\rbad", "good\ufffdbad"),
        ("\x00\x7f\x9b", "\ufffd\ufffd\ufffd"),
        # an undecodable byte of a command line
        ("a\udcffb", "a?b"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_lone_surrogates_are_replaced():
    assert valid_unicode("a\ud800b") == "a?b" and valid_unicode("漢") == "漢"


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 200), "x" * 200),
        (ValueError("x" * 201), "x" * 197 + "..."),
    ],
)
def test_an_error_in_a_line(error, expected):
    assert in_a_line(error) == expected


# ---- seeds and hashes ----


def test_stream_seeds():
    """Fixed for good: a resumed run draws from them."""
    assert stream_seed(42, "rows", 0, 1) == 3918416249218350941
    names = [(), ("rows",), ("rows", 1), ("rows", "1"), ("samples",)]
    seeds = {stream_seed(seed, *name) for seed in (0, 1) for name in names}
    assert len(seeds) == 10 and all(0 <= seed < 2**63 for seed in seeds)


def test_hashes(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_hex(b"") == sha256_hex("") == empty
    assert sha256_hex("é") == sha256_hex("é".encode())
    assert sha256_hex("\ud800") != sha256_hex("\ud801")
    data = os.urandom((1 << 20) + 3)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == sha256_hex(data)


# ---- files ----


def test_base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert base_dir(make=False) == tmp_path / "a" / "b" and not (tmp_path / "a").exists()
    assert base_dir().is_dir()


def test_write_atomic(tmp_path):
    path = tmp_path / "file"
    for content, expected in (("é\n", "é\n".encode()), (b"\x00\xff", b"\x00\xff")):
        write_atomic(path, content)
        assert path.read_bytes() == expected
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_text_that_is_not_unicode_is_not_written(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "file", "\ud800")
    assert os.listdir(tmp_path) == []


def test_json(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"loss": 2.5, "failed": None})
    assert path.read_text() == '{\n  "loss": 2.5,\n  "failed": null\n}\n'
    assert read_json(path, "run") == {"loss": 2.5, "failed": None}
    with pytest.raises(ValueError):
        write_json(path, float("nan"))
    with pytest.raises(UsageError, match="run: .*missing does not exist"):
        read_json(tmp_path / "missing", "run")
    path.write_text("{")
    with pytest.raises(UsageError, match="run: .*cannot be read as JSON"):
        read_json(path, "run")


def test_new_folder(tmp_path):
    out = tmp_path / "outer" / "out"
    with new_folder(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not out.exists() and folder.parent == out.parent
    assert (out / "inner" / "file").read_text() == "x"
    assert os.listdir(out.parent) == ["out"]


def test_a_new_folder_may_replace_an_empty_one_and_what_a_killed_process_left(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = tmp_path / ".out.partial"
    (left / "inner").mkdir(parents=True)
    (left / "file").write_text("half")
    with new_folder(out) as folder:
        assert os.listdir(folder) == []
        (folder / "file").write_text("whole")
    assert os.listdir(out) == ["file"] and os.listdir(tmp_path) == ["out"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("mine")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("occupied", ["a file", "a full folder"])
def test_a_new_folder_replaces_nothing(tmp_path, occupied):
    out = tmp_path / "out"
    if occupied == "a file":
        out.write_text("x")
    else:
        out.mkdir()
        (out / "file").write_text("x")
    with pytest.raises(UsageError, match="exists and is not an empty folder"), new_folder(out):
        pytest.fail("not reached")
    assert out.exists()


def test_a_new_folder_has_one_writer(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(UsageError, match="being written by another process"), new_folder(out):
            pytest.fail("not reached")
    assert os.listdir(out) == ["file"]


def test_a_new_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot be created .Not a directory"),
        new_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("not reached")


@pytest.mark.parametrize(
    "make_error, unavailable",
    [
        (lambda folder: OSError(errno.ENOSPC, "No space left"), True),
        (lambda folder: OSError(errno.EIO, "I/O error", str(folder / "file")), True),
        (lambda folder: OSError(errno.EIO, "I/O error", "/elsewhere/file"), False),
        (lambda folder: OSError(errno.ECONNRESET, "Connection reset"), False),
        # the second name of a rename counts as well
        (lambda folder: OSError(errno.EXDEV, "Other disk", "/x", None, str(folder / "y")), True),
    ],
    ids=["full disk", "its own file", "another's file", "network", "a rename into it"],
)
def test_which_errors_are_those_of_writing(tmp_path, make_error, unavailable):
    with (
        pytest.raises(Unavailable if unavailable else OSError) as raised,
        new_folder(tmp_path / "out") as folder,
    ):
        error = make_error(folder)
        raise error
    assert (raised.value is error) is not unavailable
    assert os.listdir(tmp_path) == []


def test_exit_codes():
    """Documented in README and used by schedulers: they never change."""
    codes = (common.EXIT_COMPLETED, common.EXIT_FAILED, common.EXIT_USAGE, common.EXIT_STOPPED)
    assert codes == (0, 1, 2, 75)


@pytest.mark.parametrize(
    "given, expanded",
    [
        ("~/runs", "/home/me/runs"),
        ("$CORPUS/a.txt", "/data/a.txt"),
        ("${CORPUS}/*.jsonl", "/data/*.jsonl"),
        ("$UNKNOWN/a", "$UNKNOWN/a"),
        ("python", "python"),
        ("hf:owner/name:config:train:text", "hf:owner/name:config:train:text"),
        ("python=0.5", "python=0.5"),
        ("~/books=0.5", "/home/me/books=0.5"),
        ("", ""),
    ],
)
def test_paths_are_expanded(given, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS", "/data")
    monkeypatch.delenv("UNKNOWN", raising=False)
    assert path_argument(given) == expanded


def test_a_name_that_exists_is_not_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "~").mkdir()
    assert path_argument("~") == "~"
    assert path_argument("~/x") == "/home/me/x"


def test_the_base_dir_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/caches")
    assert base_dir() == tmp_path / "caches"


# ---- caches of several users ----


def test_what_a_base_dir_lacks_goes_to_the_users_own(shared_base, capfd):
    """If it cannot be written; what it holds is used."""
    (shared_base / "tokens").mkdir()
    (shared_base / "tokens" / "complete").touch()
    private = shared_base.parent / "home" / ".cache" / "nanochat"
    assert common.cached("hub", "new") == shared_base / "hub" / "new"
    assert common.writable_base_dir() == shared_base
    with read_only(shared_base):
        assert common.cached("tokens", "complete") == shared_base / "tokens" / "complete"
        assert capfd.readouterr().err == ""
        assert common.cached("tokens", "new") == private / "tokens" / "new"
        assert common.cached("hub", "new") == private / "hub" / "new"
        assert common.writable_base_dir() == private
        # it is a place that can be written
        write_atomic(private / "file", "x")
    (line,) = capfd.readouterr().err.splitlines()
    assert str(shared_base) in line and str(private) in line


def test_a_base_dir_may_be_written_in_part(shared_base, monkeypatch):
    """Another user's folder in a folder that both may write."""
    (shared_base / "tokens").mkdir()
    mine = shared_base.parent / "home"
    (mine / "tokens").symlink_to(shared_base / "tokens")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(mine))
    with read_only(shared_base):
        assert common.cached("hub", "new") == mine / "hub" / "new"
        assert common.cached("tokens", "new") == mine / ".cache" / "nanochat" / "tokens" / "new"
        assert common.writable_base_dir() == mine


def test_without_a_folder_to_write_the_base_dir_stays(shared_base, monkeypatch, capfd):
    """The write itself then fails, and its error names the folder and the remedy."""
    monkeypatch.setenv("HOME", str(shared_base))
    with read_only(shared_base):
        assert common.cached("tokens", "new") == shared_base / "tokens" / "new"
        assert common.writable_base_dir() == shared_base
    assert capfd.readouterr().err == ""


def test_generated_code_is_never_shared(shared_base, monkeypatch):
    home = shared_base.parent / "home"
    with read_only(shared_base):
        assert common.own_cache("compile") == home / ".cache" / "nanochat" / "compile"
        assert (home / ".cache" / "nanochat" / "compile").is_dir()
    assert common.own_cache("hub/client", make=False) == shared_base / "hub" / "client"
    assert not (shared_base / "hub").exists()
    # what is here belongs to somebody else, although it can be written
    uid = os.geteuid()
    (shared_base / "compile").mkdir()
    (home / ".cache" / "nanochat" / "compile").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    path = common.own_cache("compile", make=False)
    assert path == Path(tempfile.gettempdir()) / f"nanochat-{uid + 1}-compile"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", "x")
        with new_folder(tmp_path / "out") as folder:
            (folder / "inner").mkdir(mode=0o700)
            (folder / "inner" / "private").write_text("x")
            (folder / "inner" / "private").chmod(0o600)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    file_mode, folder_mode = 0o666 & ~umask, 0o777 & ~umask
    assert modes == {"file": file_mode, "private": file_mode, "inner": folder_mode} | {
        "out": folder_mode
    }


def test_a_line_is_noted_once(monkeypatch, capfd):
    monkeypatch.setattr(common, "_noted", set())
    lines = []
    for text in ("a", "a", "b"):
        common.note_once(text, lines.append)
    assert lines == ["a", "b"]
    common.note_once("c")
    monkeypatch.setenv("RANK", "1")
    common.note_once("d")
    assert capfd.readouterr().err == "c\n"


@pytest.mark.parametrize("keep_link", [True, False])
def test_a_folder_that_is_a_link_is_deleted_where_it_leads_to(tmp_path, keep_link):
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    (target / "inner").mkdir(parents=True)
    (target / "inner" / "file").write_text("x")
    link.symlink_to(target)
    delete_folder(link, keep_link=keep_link)
    assert link.is_symlink() == link.exists() == keep_link
    assert target.exists() == keep_link and not (target / "inner").exists()


# ---- a foreign module named like our package ----

ROOT = Path(__file__).resolve().parent.parent
START = f"""
import sys
sys.path.append({str(ROOT)!r})
from nanochat.common import UsageError, find_own_tasks
try:
    find_own_tasks()
    from tasks.core import LABELS
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["tasks.py", "tasks/__init__.py"])
@pytest.mark.parametrize("where", ["current folder", "PYTHONPATH"])
def test_a_foreign_tasks_module(tmp_path, monkeypatch, name, where):
    """In the current folder, where `python -m` looks first, it is passed over; elsewhere named."""
    foreign = tmp_path / "foreign" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("raise SystemExit('foreign')")
    here = tmp_path / "here"
    here.mkdir()
    if where == "current folder":
        here = tmp_path / "foreign"
    else:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "foreign"))
    (here / "start.py").write_text(START)
    done = subprocess.run(
        [sys.executable, "-m", "start"], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if where == "current folder":
        assert done.stdout == ""
    else:
        assert str(foreign) in done.stdout and "PYTHONPATH" in done.stdout
