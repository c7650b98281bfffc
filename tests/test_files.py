"""Which files a path, a folder or a pattern names, and what is said of the others."""

import os
import re
import socket

import pytest

from nanochat.common import UsageError
from nanochat.data.files import listed, named_files, text_bytes

MADE = [
    # name of the layout, links {name: target}, files, found, remarks
    (
        "plain",
        {},
        ["b.txt", "a.jsonl", "sub/c.parquet"],
        ["a.jsonl", "b.txt", "sub/c.parquet"],
        [],
    ),
    (
        "a link to the folder itself",
        {"loop": "."},
        ["a.txt"],
        ["a.txt"],
        ["left out in the folder {}: 1 circular link (loop)"],
    ),
    (
        "links that lead to each other",
        {"x/to_y": "../y", "y/to_x": "../x"},
        ["x/a.txt", "y/b.txt"],
        ["x/a.txt", "y/b.txt"],
        [],
    ),
    (
        "a link to an enclosing folder",
        {"sub/up": "../.."},
        ["sub/a.txt"],
        ["sub/a.txt"],
        ["left out in the folder {}: 1 circular link (sub/up)"],
    ),
    (
        "a link names nothing that has a name of its own",
        {"a.txt": "z.txt", "aa": "zz"},
        ["z.txt", "zz/y.txt"],
        ["z.txt", "zz/y.txt"],
        [],
    ),
    (
        "links out of the folder",
        {"more": "../elsewhere", "one.txt": "../single.txt"},
        ["a.txt", "../elsewhere/deep/b.txt", "../single.txt"],
        ["a.txt", "more/deep/b.txt", "one.txt"],
        ["followed in the folder {}: 2 links to other places (more, one.txt)"],
    ),
    (
        "two links to one place",
        {"more": "../elsewhere", "again": "../elsewhere"},
        ["../elsewhere/b.txt"],
        ["again/b.txt"],
        ["followed in the folder {}: 2 links to other places (again, more)"],
    ),
    (
        "dangling links",
        {"gone.txt": "nowhere", "self.txt": "self.txt"},
        ["a.txt"],
        ["a.txt"],
        ["left out in the folder {}: 2 dangling links (gone.txt, self.txt)"],
    ),
    (
        "hidden and system names",
        {},
        [
            "a.txt",
            "._a.txt",
            ".git/x.txt",
            ".ipynb_checkpoints/a-checkpoint.txt",
            "__MACOSX/a.txt",
            "env/pyvenv.cfg",
            "env/lib/entry_points.txt",
            "node_modules/p/LICENSE.txt",
            "Thumbs.db",
            "sub/lost+found/b.txt",
            "sub/@eaDir/b.txt",
            "sub/$RECYCLE.BIN/b.txt",
            "sub/__pycache__/b.txt",
            "sub/b.txt",
        ],
        ["a.txt", "sub/b.txt"],
        [
            "left out in the folder {}: 11 hidden or system names "
            "(._a.txt, .git, .ipynb_checkpoints and 8 more)"
        ],
    ),
    (
        "a hidden folder behind a visible link",
        {"shown": ".store"},
        [".store/a.txt"],
        ["shown/a.txt"],
        ["left out in the folder {}: 1 hidden or system name (.store)"],
    ),
]


def find_files(pattern, flag="--data"):
    """The files that a value of the flag names."""
    return named_files(pattern, flag).files


def make(folder, files, links):
    """A folder with files and {name: target} links; returns it."""
    folder.mkdir(parents=True)
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    for name, target in links.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    return folder


def names(paths, folder):
    return [str(path.relative_to(folder)) for path in paths]


@pytest.mark.parametrize("links, files, found, said", [row[1:] for row in MADE], ids=lambda _: "")
def test_what_a_folder_holds(tmp_path, links, files, found, said):
    folder = make(tmp_path / ".hidden" / "data", files, links)
    named = named_files(f"{folder}/")
    assert names(named.files, folder) == found
    assert list(named.remarks) == [line.format(f"{folder}/") for line in said]
    assert named.is_folder and named.root == folder


@pytest.mark.parametrize("links, files, found, said", [row[1:] for row in MADE], ids=lambda _: "")
def test_a_pattern_finds_what_the_folder_holds(tmp_path, links, files, found, said):
    folder = make(tmp_path / "data", files, links)
    for ending in (".txt", ".jsonl", ".parquet"):
        wanted = [name for name in found if name.endswith(ending)]
        pattern = f"{folder}/**/*{ending}"
        if wanted:
            named = named_files(pattern)
            assert names(named.files, folder) == wanted
            assert len(named.remarks) == len(said) and not named.is_folder


def test_a_folder_without_links_is_listed_as_ever(tmp_path):
    """The order of the files enters the fingerprint of a corpus."""
    folder = make(
        tmp_path / "data",
        ["b/a.txt", "b.txt", "B.txt", "a-b/c.txt", "a/z.txt", "a.txt", "a/b/c.jsonl", "10.txt"],
        {},
    )
    assert find_files(str(folder)) == sorted(p for p in folder.rglob("*") if p.is_file())


def test_many_links_do_not_multiply(tmp_path):
    """Two links to the folder itself are 2^40 paths to a file for who follows them all."""
    folder = make(tmp_path / "data", ["a.txt"], {"x": ".", "y": "."})
    assert names(find_files(f"{folder}/**/*.txt"), folder) == ["a.txt"]


@pytest.mark.parametrize(
    "pattern, found, said",
    [
        ("*.txt", ["a.txt"], []),
        ("sub/*", ["sub/b.txt"], ["left out for {}: 1 folder (deep)"]),
        ("*/*.txt", ["sub/b.txt"], ["left out for {}: 1 hidden or system name (__MACOSX)"]),
        ("**/deep/*.txt", ["sub/deep/c.txt"], 1),
        ("s*/**/c.*", ["sub/deep/c.txt"], []),
        ("sub/**", ["sub/b.txt", "sub/deep/c.txt"], []),
        ("**/[bc].txt", ["sub/b.txt", "sub/deep/c.txt"], 1),
        # spelled out: the user means it
        (".git/*.txt", [".git/h.txt"], []),
        (".g*/**/*.txt", [".git/h.txt"], []),
        ("__MACOSX/*.txt", ["__MACOSX/m.txt"], []),
        ("*.t[x]t", ["a.txt"], []),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, found, said):
    files = ["a.txt", "sub/b.txt", "sub/deep/c.txt", ".git/h.txt", "__MACOSX/m.txt", "._a.txt"]
    folder = make(tmp_path / "data", files, {})
    named = named_files(f"{folder}/{pattern}")
    assert names(named.files, folder) == found
    if said == 1:
        assert len(named.remarks) == 1
    else:
        assert list(named.remarks) == [line.format(f"{folder}/{pattern}") for line in said]
    # the same from inside the folder, where paths have no beginning
    monkeypatch.chdir(folder)
    assert [str(path) for path in find_files(pattern)] == found


def test_one_file_by_two_names_comes_once(tmp_path):
    folder = make(tmp_path / "data", ["a.txt"], {"b.txt": "a.txt", "c.txt": "b.txt"})
    assert names(find_files(f"{folder}/?.txt"), folder) == ["a.txt"]


def test_a_file_that_is_named_is_taken(tmp_path):
    folder = make(tmp_path / "data", ["._a.txt", ".git/b.txt", "x [1].txt"], {"link.md": "._a.txt"})
    for name in ("._a.txt", ".git/b.txt", "link.md", "x [1].txt"):
        assert find_files(f"{folder}/{name}") == [folder / name]


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    folder = make(tmp_path / "data", ["a.txt", "closed/b.txt", "secret.txt"], {})
    scandir, access = os.scandir, os.access

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path))
    named = named_files(str(folder))
    assert names(named.files, folder) == ["a.txt"]
    assert named.remarks == (
        f"left out in the folder {folder}: 2 unreadable paths (closed, secret.txt)",
    )
    with pytest.raises(UsageError, match="closed: the folder cannot be read; check its permis"):
        named_files(f"{folder}/closed")
    monkeypatch.setattr(os, "access", access)
    assert len(find_files(str(folder))) == 2


def test_pipes_and_devices(tmp_path):
    folder = make(tmp_path / "data", ["a.txt"], {})
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s.txt"))
    read, write = os.pipe()
    for path in (folder / "pipe.txt", folder / "s.txt", "/dev/null", f"/dev/fd/{read}"):
        with pytest.raises(UsageError, match=f"--data={path}: a pipe.*write it to a file"):
            find_files(str(path))
    os.close(read)
    os.close(write)
    for value in (folder, f"{folder}/*.txt"):
        named = named_files(str(value))
        assert names(named.files, folder) == ["a.txt"]
        assert "2 special files (pipe.txt, s.txt)" in named.remarks[0]


def test_nothing_found(tmp_path):
    folder = make(tmp_path / "data", [".a.txt"], {"gone.txt": "nowhere"})
    (folder / "sub").mkdir()
    (folder / "sub" / "b.png").write_bytes(b"\x89PNG\0")
    refused = {
        f"{folder}": r"the folder holds no .txt, .jsonl.*1 hidden or system name \(.a.txt\)",
        f"{folder}/gone.txt": "a link to nowhere, which does not exist; repair the link",
        f"{folder}/s*": r"no file that can be read. left out for .*: 1 folder \(sub\)",
        f"{folder}/none.txt": "no such file or folder, and no file matches.*--val-data=NEWPATH",
        f"{folder}/**/*.txt": "no file that can be read. left out for .*: 1 dangling link",
        "": "no such file or folder",
    }
    for value, words in refused.items():
        opening = re.escape(f"--val-data={value}: ")
        with pytest.raises(UsageError, match=f"^{opening}{words}"):
            find_files(value, "--val-data")


def test_a_folder_of_code_is_read_as_text(tmp_path):
    """Where it has no format of ours; what is no text, or has a format, is left out."""
    files = [
        "a.py",
        "b/c.rs",
        "b/d.py",
        "b/e.toml",
        "Makefile",
        "package.json",
        "b/f.xml",
        ".git/g",
    ]
    folder = make(tmp_path / "code", files, {})
    (folder / "a.pyc").write_bytes(b"\xa7\r\r\n\0")
    (folder / "utf16.txt.bak").write_bytes("text".encode("utf-16"))
    (folder / "cut.md").write_bytes("é".encode() * (1 << 16))
    (folder / "__init__.py").write_bytes(b"\n")
    (folder / "latin.md").write_bytes("é".encode("latin-1"))
    (folder / "latin.py").write_bytes("é is a letter".encode("latin-1"))
    named = named_files(str(folder))
    assert names(named.files, folder) == sorted(
        ["Makefile", "a.py", "b/c.rs", "b/d.py", "b/e.toml", "b/f.xml", "cut.md"]
    )
    taken, other, binary, empty, hidden, latin = named.remarks
    assert taken.endswith("its 7 files with text are read (2 .py, 1 without suffix, 1 .rs, ...)")
    assert "1 .json; name them by a pattern" in other
    assert "2 binary files (a.pyc, utf16.txt.bak)" in binary and ".git" in hidden
    assert empty.endswith(": 1 empty file (__init__.py)")
    assert latin.endswith(": 2 non-UTF-8 files (latin.md, latin.py; iconv converts to UTF-8)")
    # one file of ours, and the folder is taken for a corpus with descriptions beside it
    (folder / "corpus.txt").write_text("text")
    assert names(find_files(str(folder)), folder) == ["corpus.txt"]


def test_paths_in_remarks(tmp_path):
    paths = [tmp_path / name for name in ("a", "b/c", "d", "e", "f")]
    assert listed(paths[:3], tmp_path) == "a, b/c, d"
    assert listed(paths, tmp_path) == "a, b/c, d and 2 more"


def test_bytes_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    assert text_bytes(tmp_path / "a.txt") == 5
    # of a table that is damaged, reading it says more
    (tmp_path / "a.parquet").write_text("PAR0")
    assert text_bytes(tmp_path / "a.parquet") == 4
    with pytest.raises(UsageError, match="gone.txt cannot be read"):
        text_bytes(tmp_path / "gone.txt")
