"""Downloads of single files, with the real clients against tests/hub_server.py.

What works, and every fault with what the user reads, what is on disk afterwards and which bytes
were requested."""

import dataclasses
import errno
import fcntl
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import disk
import pytest
from hub_server import blob_sha1, hasten

from nanochat import common
from nanochat.common import base_dir, sha256_hex
from nanochat.data import clients, download
from nanochat.data.download import DownloadFailed, RemoteFile

ROOT = Path(__file__).resolve().parent.parent


N = 5000


DATA = random.Random(1).randbytes(N)


def hurry(monkeypatch, base):
    """An empty base folder, short limits, and pauses that are noted instead of made.

    Returns the list of them (seconds): ours and, from huggingface_hub, those of a transfer."""
    import huggingface_hub.constants

    pauses = []
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(download, "ATTEMPTS", 4)
    monkeypatch.setattr(clients, "TIMEOUT_S", 5.0)
    monkeypatch.setattr(
        download,
        "time",
        SimpleNamespace(sleep=pauses.append, time=time.time, monotonic=time.monotonic),
    )
    # so that what a broken transfer has received is on disk, as it is of a large file
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hasten(monkeypatch, pauses)
    return pauses


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The pauses of a test, which are not made."""
    return hurry(monkeypatch, tmp_path / "base")


def a_file(hub, content=DATA, repo="me/text", path="data/train-0.parquet", lfs=True):
    """A RemoteFile that the server has."""
    sha = hub.add(repo, {path: content}, lfs=lfs)
    digest = sha256_hex(content) if lfs else ""
    return RemoteFile(repo, sha, path, len(content), digest, digest or blob_sha1(content))


def on_disk(file):
    """Whether a file is complete and right. Nothing else of it may be there but a lock."""
    path = file.local_path()
    left = {p.name.removeprefix(path.name) for p in path.parent.glob(path.name + "*")}
    assert file.is_local() == ("" in left)
    if file.is_local():
        assert sha256_hex(path.read_bytes()) == sha256_hex(DATA)
        assert left == {""}
    else:
        assert left <= {".lock"}
    return file.is_local()


def fails(file, *parts):
    """fetch() raises DownloadFailed with a message that names the file and holds the parts; returns
    the lines it reported."""
    lines = []
    with pytest.raises(DownloadFailed) as caught:
        file.fetch(lines.append)
    for part in (file.name, *parts):
        assert part in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    return lines


def later(seconds):
    return formatdate(time.time() + seconds, usegmt=True)


PASSING = {
    # faults, ranges of bytes that were sent, pauses in seconds, part of the one reported line
    "nothing wrong": ([], [(0, N)], [], None),
    "one cut": (
        [("train-0", "cut", 1, {"after": 2000})],
        [(0, 2000), (2000, N)],
        [1],
        "peer closed connection without sending complete message body",
    ),
    "three cuts": (
        [("train-0", "cut", 3, {"after": 1500})],
        [(0, 1500), (1500, 3000), (3000, 4500), (4500, N)],
        [1, 1, 1],
        "trying again",
    ),
    "429 twice": (
        [("train-0", "status", 2, {"code": 429, "headers": {"Retry-After": "7"}})],
        [(0, N)],
        [7, 7],
        "fewer requests (429); trying again in 7.0s",
    ),
    "503 twice": (
        [("train-0", "status", 2, {"code": 503})],
        [(0, N)],
        [1, 2],
        "the server answers 503; trying again in 1.0s",
    ),
    "503 with Retry-After": (
        [("train-0", "status", 1, {"code": 503, "headers": {"Retry-After": "9"}})],
        [(0, N)],
        [9],
        "503; trying again in 9.0s",
    ),
    "503 of the transfer": (
        [("/cdn/", "status", 1, {"code": 503})],
        [(0, N)],
        [1],
        "the server answers 503; trying again in 1.0s",
    ),
    "truncated once": (
        [("train-0", "short", 1, {"size": 3000})],
        [(0, 3000), (0, N)],
        [],
        "should be of size 5000 but has size 3000; deleted, downloading it once more",
    ),
    "corrupt once": (
        [("train-0", "corrupt", 1, {})],
        [(0, N), (0, N)],
        [],
        "its content is damaged",
    ),
    "no byte in time": (
        [("train-0", "stall", 1, {"seconds": 1.0})],
        [(0, N), (0, N)],
        [1],
        "trying again",
    ),
}


@pytest.mark.parametrize("case", PASSING)
def test_fault_that_passes(hub, quick, monkeypatch, case):
    """The file is complete in the end, no byte is sent twice without need, one line is reported."""
    import huggingface_hub.constants

    faults, ranges, pauses, line = PASSING[case]
    if case == "no byte in time":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    file, lines = a_file(hub), []
    for path, kind, times, options in faults:
        hub.fault(path, kind, times, **options)
    assert file.fetch(lines.append) == file.local_path()
    assert on_disk(file)
    if case == "no byte in time":
        deadline = time.monotonic() + 5
        # the stalled answer is logged when it wakes
        while len(hub.bodies("train-0")) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(hub.bodies("train-0")) == sorted(ranges)
    assert quick == pauses
    assert len(lines) == (line is not None)
    assert all(line in text and file.name in text for text in lines)
    assert not any("http://" in text for text in lines)
    requests = len(hub.requests)
    assert file.fetch(lines.append) == file.local_path()
    assert len(hub.requests) == requests


URL_FAULTS = {
    # fault, ranges of bytes that were sent, pauses, part of the one reported line
    "cut": ("cut", {"after": 2000}, [(0, 2000), (0, N)], [1], "the connection broke; trying again"),
    "503": ("status", {"code": 503}, [(0, N)], [1], "the server answers 503; trying again"),
    "truncated": (
        "short",
        {"size": 3000},
        [(0, 3000), (0, N)],
        [],
        "3,000 bytes where 5,000 are listed; deleted, downloading it once more",
    ),
    "corrupt": ("corrupt", {}, [(0, N), (0, N)], [], "its content is damaged"),
}


def a_url(hub, content=DATA):
    """The RemoteFile of a file outside the hub, whose content is DATA or should be."""
    hub.add_url("/raw/input.txt", content)
    return RemoteFile("", "", f"{hub.url}/raw/input.txt", N, sha256_hex(DATA), sha256_hex(DATA))


@pytest.mark.parametrize("case", URL_FAULTS)
def test_faults_of_a_plain_url(hub, quick, case):
    """One that passes costs a line; one that stays is reported, and nothing is left on disk."""
    kind, options, ranges, pauses, line = URL_FAULTS[case]
    file, lines = a_url(hub), []
    hub.fault("input.txt", kind, 1, **options)
    file.fetch(lines.append)
    assert on_disk(file)
    assert hub.bodies("input.txt") == ranges
    assert quick == pauses
    assert len(lines) == 1
    assert line in lines[0]
    file.local_path().unlink()
    hub.fault("input.txt", kind, None, **options)
    fails(file, "127.0.0.1", "4.9 KiB")
    assert not on_disk(file)


def test_a_plain_url_that_sends_too_much(hub):
    file = a_url(hub, DATA + bytes(1000))
    fails(file, "6,000 bytes where 5,000 are listed")
    assert not on_disk(file)


def test_a_transfer_that_raises_what_nobody_knows(hub, quick, monkeypatch):
    """hf_xet reports faults of the network as RuntimeError: one more attempt, then the reason."""
    import huggingface_hub

    def fail(*args, **options):
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    file = a_file(hub)
    lines = fails(file, "the transfer failed (Data processing error: CAS service error)")
    assert len(lines) == 1
    assert quick == [1]
    assert not on_disk(file)


def test_nothing_is_drawn_and_caches_stay_in_the_base_folder(hub, capfd):
    """Faults included: huggingface_hub's own lines and bars do not reach the terminal."""
    elsewhere = sorted(Path(os.environ["HF_HOME"]).rglob("*"))
    file = a_file(hub)
    hub.fault("train-0", "cut", 1, after=2000)
    file.fetch(lambda line: None)
    assert capfd.readouterr() == ("", "")
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == elsewhere
    assert [path.name for path in file.local_path().parent.iterdir()] == [file.local_path().name]


def test_retry_after_as_a_date(hub, quick):
    file = a_file(hub)
    hub.fault("train-0", "status", 1, code=429, headers={"Retry-After": later(40)})
    file.fetch(lambda line: None)
    assert len(quick) == 1 and 30 < quick[0] <= 40


def test_redirect_keeps_the_token_with_the_hub(hub, monkeypatch):
    """The content comes from the address that the hub redirects to; the token goes to the hub and
    to no plain URL."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    file = a_file(hub)
    file.fetch()
    sent = {(r.path.split("/")[1], r.status, r.authorization) for r in hub.requests}
    assert sent == {("datasets", 302, "Bearer hf_test"), ("cdn", 200, "")}
    a_url(hub).fetch()
    assert hub.requests[-1].path == "/raw/input.txt" and hub.requests[-1].authorization == ""


STAYING = {
    # path and kind of the fault, parts of the message, requests that were not redirected, pauses
    "cut": (
        ("train-0", "cut", {"after": 0}),
        ["the connection broke", "(4.9 KiB) was not downloaded", "HF_ENDPOINT"],
        6,
        [1, 1, 1, 1, 1],
    ),
    "404 file": (
        ("train-0", "status", {"code": 404, "headers": {"X-Error-Code": "EntryNotFound"}}),
        ["no such file", "Check the name and the revision"],
        1,
        [],
    ),
    "404 revision": (
        ("train-0", "status", {"code": 404, "headers": {"X-Error-Code": "RevisionNotFound"}}),
        ["no such revision"],
        1,
        [],
    ),
    "404 repository": (
        ("train-0", "status", {"code": 404, "headers": {"X-Error-Code": "RepoNotFound"}}),
        ["no such dataset"],
        1,
        [],
    ),
    "401": (
        ("train-0", "status", {"code": 401}),
        ["access is refused (401)", "HF_TOKEN"],
        1,
        [],
    ),
    "403 gated": (
        ("train-0", "status", {"code": 403, "headers": {"X-Error-Code": "GatedRepo"}}),
        ["(403, GatedRepo)", "HF_TOKEN"],
        1,
        [],
    ),
    "429 for long": (
        ("train-0", "status", {"code": 429, "headers": {"Retry-After": "3600"}}),
        ["to wait for 1h00m", "HF_TOKEN"],
        1,
        [],
    ),
    "429 always": (
        ("train-0", "status", {"code": 429, "headers": {"Retry-After": "2"}}),
        ["429", "4 times in a row"],
        4,
        [2, 2, 2],
    ),
    "500 always": (
        ("train-0", "status", {"code": 500}),
        ["the server answers 500, 4 times in a row", "later"],
        4,
        [1, 2, 4],
    ),
    "500 of the transfer": (
        ("/cdn/", "status", {"code": 500}),
        ["the server answers 500, 2 times in a row", "later"],
        2,
        [1],
    ),
    "418": (("train-0", "status", {"code": 418}), ["the server answers 418"], 1, []),
    "truncated": (
        ("train-0", "short", {"size": 3000}),
        ["should be of size 5000 but has size 3000", "damaged"],
        2,
        [],
    ),
    "too long": (("train-0", "long", {}), ["6,000 bytes where 5,000 are listed"], 0, []),
    "corrupt": (
        ("train-0", "corrupt", {}),
        ["its content is damaged (checksum", sha256_hex(DATA)[:12]],
        2,
        [],
    ),
}


@pytest.mark.parametrize("case", STAYING)
def test_fault_that_stays(hub, quick, case):
    """DownloadFailed, and nothing on disk; then, with the fault gone, the file comes."""
    (path, kind, options), parts, requests, pauses = STAYING[case]
    file = a_file(hub)
    if kind == "long":
        sha = hub.add(file.repo, {file.path: DATA + bytes(1000)})
        file = dataclasses.replace(file, revision=sha)
    else:
        hub.fault(path, kind, None, **options)
    fails(file, file.repo, *parts)
    assert not on_disk(file)
    assert len([r for r in hub.requests if r.status != 302]) == requests
    assert quick == pauses
    if kind != "long":
        hub.faults.clear()
        hub.requests.clear()
        file.fetch()
        assert on_disk(file)
        assert hub.bodies("train-0") == [(0, N)]


@pytest.mark.parametrize(
    "wrong", [{"path": "data/none.parquet"}, {"revision": "0" * 40}, {"repo": "me/none"}]
)
def test_what_is_not_there(hub, wrong):
    file = dataclasses.replace(a_file(hub), **wrong)
    fails(
        file,
        {"path": "no such file", "revision": "no such revision", "repo": "access is refused (401"}[
            next(iter(wrong))
        ],
    )
    assert not on_disk(file)


def test_no_network(quick):
    """Nothing listens: bounded attempts, then a message; nothing is on disk."""
    file = RemoteFile("me/text", "0" * 40, "train-0.parquet", N, sha256_hex(DATA), sha256_hex(DATA))
    lines = fails(
        file,
        "no connection",
        "Connection refused",
        "Check the network and HF_ENDPOINT (now http://127.0.0.1",
    )
    assert len(lines) == 1 and quick == [1, 2, 4] and not on_disk(file)


def test_offline_switch(hub, quick, monkeypatch):
    """HF_HUB_OFFLINE: no request is made, what is on disk is used."""
    import huggingface_hub.constants

    here, absent = a_file(hub), a_file(hub, path="data/other.parquet", repo="me/other")
    here.fetch()
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert here.fetch() == here.local_path()
    assert fails(absent, "HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE") == []
    assert hub.requests == [] and quick == [] and not on_disk(absent)


def test_disk_full_while_writing(hub, monkeypatch):
    """Nothing is left of the file, so that the disk has its room back."""
    import huggingface_hub

    file = a_file(hub)
    download_whole = huggingface_hub.hf_hub_download

    def fill_up(*args, local_dir, **options):
        (local_dir / "part").write_bytes(DATA[:2000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fill_up)
    assert fails(file, "the disk is full", "NANOCHAT_BASE_DIR") == []
    assert not on_disk(file)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_whole)
    file.fetch()
    assert on_disk(file)


def test_disk_too_small(hub, monkeypatch):
    """Too little free space is reported before anything is requested."""
    file = a_file(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    fails(file, "4.9 KiB are missing and 100 B are free", "NANOCHAT_BASE_DIR")
    assert hub.requests == []
    assert not on_disk(file)


@pytest.mark.parametrize("is_folder", [True, False], ids=["a folder", "a file"])
def test_what_a_killed_process_left(hub, is_folder):
    """It is deleted, and the file is downloaded from its start. (Earlier versions left a file.)"""
    file, lines = a_file(hub), []
    partial = file.local_path().with_name(file.local_path().name + ".incomplete")
    part = partial
    if is_folder:
        part = partial / ".cache" / "huggingface" / "download" / "x.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:1234])
    file.fetch(lines.append)
    assert on_disk(file)
    assert hub.bodies("train-0") == [(0, N)]
    assert lines == []


def test_small_files_are_checked_against_git(hub):
    """Files outside LFS have no SHA-256; their blob name does as well."""
    file = a_file(hub, path="train.txt", lfs=False)
    hub.fault("train.txt", "corrupt")
    fails(file, "its content is damaged", blob_sha1(DATA)[:12])
    assert not on_disk(file)
    hub.faults.clear()
    file.fetch()
    assert on_disk(file)


def test_two_processes(hub):
    """Two processes that want one file at once: one downloads, both get it."""
    file = a_file(hub)
    hub.fault("train-0", "stall", 1, seconds=0.5)
    program = (
        "import pickle, sys; file = pickle.loads(bytes.fromhex(sys.argv[1])); "
        "print(file.fetch(lambda line: None))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, pickle.dumps(file).hex()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [
        str(file.local_path())
    ] * 2
    assert hub.bodies("train-0") == [(0, N)] and on_disk(file)


def test_waiting_for_another_process(hub):
    """While the lock is held nothing is requested; what its holder leaves is used."""
    file, lines, waiting = a_file(hub), [], threading.Event()
    path = file.local_path()
    path.parent.mkdir(parents=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=file.fetch, args=(lambda line: (lines.append(line), waiting.set()),)
        )
        thread.start()
        assert waiting.wait(10)
        path.write_bytes(DATA)
    thread.join(10)
    assert not thread.is_alive() and hub.requests == [] and on_disk(file)
    assert lines == [f"data: another process is downloading {file.name}; waiting for it"]


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get
)
def test_no_locks(hub, monkeypatch, number):
    """On a file system without locks the file is downloaded, and a line warns of it."""

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(common, "_noted", set())
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    file, lines = a_file(hub), []
    # of another process, which may still be at work
    part = file.local_path().with_name(f"{file.local_path().name}.0123abcd.incomplete")
    part.mkdir(parents=True)
    file.fetch(lines.append)
    part.rmdir()
    assert on_disk(file)
    (line,) = lines
    assert "no file locks" in line
    # the token goes to the hub, and not where it redirects to
    sent = {(r.path.split("/")[1], r.authorization) for r in hub.requests}
    assert sent == {("datasets", "Bearer hf_test"), ("cdn", "")}


@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_downloads_are_as_readable_as_the_umask_says(hub, umask):
    before = os.umask(umask)
    try:
        path = a_file(hub).fetch()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.unlink()


def test_a_download_of_another_user_is_used(hub, shared_base, monkeypatch):
    """What that user did not download goes to the own caches."""
    # otherwise it is looked for in HF_HOME, which is private
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    here = a_file(hub)
    here.fetch()
    other = a_file(hub, path="data/other.parquet")
    with disk.read_only(shared_base):
        assert here.fetch().is_relative_to(shared_base)
        path = other.fetch()
        assert on_disk(other)
    assert path.is_relative_to(shared_base.parent / "home")


def test_long_downloads_say_how_far_they_are(hub, monkeypatch):
    monkeypatch.setattr(download, "REPORT_S", -1)
    file, lines = a_file(hub), []
    file.fetch(lines.append)
    assert lines[-1] == f"data: {file.name}: 4.9 KiB of 4.9 KiB"


def test_folder_that_cannot_be_written(hub, tmp_path):
    file = a_file(hub)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "hub").write_text("a file where the folder should be")
    fails(file, "cannot be written", "NANOCHAT_BASE_DIR")
    assert hub.requests == []


def test_names_on_disk():
    """Versions of a file do not meet on disk, suffixes stay, no name leads out of the folder."""
    file = RemoteFile("me/text", "1" * 40, "a/../../x y.v2.jsonl.gz", 7, "", "e1")
    path = file.local_path()
    assert (
        path.parent == base_dir() / "hub" / "me--text"
        and path.name == f"x_y.v2.{file.fingerprint[:12]}.jsonl.gz"
    )
    assert dataclasses.replace(file, revision="2" * 40).local_path() == path
    for change in (
        {"etag": "e2"},
        {"sha256": "ab"},
        {"n_bytes": 8},
        {"path": "b/x y.v2.jsonl.gz"},
        {"repo": "me/other"},
    ):
        assert dataclasses.replace(file, **change).local_path() != path
    assert not path.parent.exists() and not file.is_local()
    url = RemoteFile("", "", "https://example.org/a/b.txt?x=1", 7, "", "")
    assert url.name == "b.txt" and url.local_path().parent.name == "example.org"
