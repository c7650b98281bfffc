"""Listings and downloads of public datasets, with the real clients against tests/hub_server.py.

What works, and every fault with what the user reads, what is on disk afterwards and which bytes
were requested."""

import dataclasses
import errno
import fcntl
import gzip
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

import pytest
from hub_server import blob_sha1, hasten

from nanochat.common import UsageError, base_dir, sha256_hex
from nanochat.data import clients, download
from nanochat.data.clients import quiet_datasets
from nanochat.data.download import DownloadFailed, RemoteFile
from nanochat.data.hub import KNOWN, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, model_file, resolve
from nanochat.data.text import text_format, text_suffix

ROOT = Path(__file__).resolve().parent.parent
CLIMBMIX = "karpathy/climbmix-400b-shuffle"
N = 5000
DATA = random.Random(1).randbytes(N)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """An empty base folder, short limits, and pauses that are noted instead of made.

    Yields the list of them (seconds): ours and, from huggingface_hub, those of a transfer."""
    import huggingface_hub.constants

    pauses = []
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
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
    """fetch() raises DownloadFailed with a message that names the file and holds the parts; returns the lines it reported."""
    lines = []
    with pytest.raises(DownloadFailed) as caught:
        file.fetch(lines.append)
    for part in (file.name, *parts):
        assert part in str(caught.value)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# files: faults that pass


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
    """The content comes from the address that the hub redirects to; the token goes to the hub and to no plain URL."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    file = a_file(hub)
    file.fetch()
    sent = {(r.path.split("/")[1], r.status, r.authorization) for r in hub.requests}
    assert sent == {("datasets", 302, "Bearer hf_test"), ("cdn", 200, "")}
    a_url(hub).fetch()
    assert hub.requests[-1].path == "/raw/input.txt" and hub.requests[-1].authorization == ""


# ---------------------------------------------------------------------------------------------------------------------
# files: faults that stay

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
    program = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).fetch(lambda line: None))"
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


def test_no_locks(hub, monkeypatch):
    """On a file system without locks the file is downloaded, and a line warns of it."""

    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    file, lines = a_file(hub), []
    file.fetch(lines.append)
    assert on_disk(file)
    assert len(lines) == 1
    assert "no file locks" in lines[0]


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


# ---------------------------------------------------------------------------------------------------------------------
# listings of the datasets with short names


def climbmix(hub, shards=5):
    return hub.add(
        CLIMBMIX,
        {f"shard_{i:05d}.parquet": bytes([i]) * 100 for i in range(shards)}
        | {"README.md": b"# text"},
    )


def test_climbmix(hub):
    """All pages are read; the last shard by name is for validation."""
    hub.page_size = 2
    sha = climbmix(hub)
    listing = resolve("climbmix")
    assert [file.path for file in listing.train] == [f"shard_{i:05d}.parquet" for i in range(4)]
    assert [file.path for file in listing.val] == ["shard_00004.parquet"]
    assert (listing.repo, listing.revision, listing.split, listing.column) == (
        CLIMBMIX,
        sha,
        "train",
        "text",
    )
    assert listing.train[3] == RemoteFile(
        CLIMBMIX, sha, "shard_00003.parquet", 100, *[sha256_hex(bytes([3]) * 100)] * 2
    )
    assert listing.note == "validation: the last of 5 files, shard_00004.parquet"
    assert [r.path.rpartition("/")[2] for r in hub.requests] == [
        "climbmix-400b-shuffle",
        sha,
        sha,
        sha,
    ]
    assert listing.val[0].fetch().read_bytes() == bytes([4]) * 100
    assert pickle.loads(pickle.dumps(listing)) == listing and hash(listing.train[0])


def test_fineweb_edu_and_tinystories(hub):
    sha = hub.add(
        "HuggingFaceFW/fineweb-edu",
        {
            "sample/10BT/000_00000.parquet": b"a",
            "sample/10BT/001_00000.parquet": b"b",
            "sample/100BT/000_00000.parquet": b"c",
            "data/CC-MAIN-2013-20/0.parquet": b"d",
        },
    )
    listing = resolve("fineweb-edu")
    assert [[file.path for file in side] for side in (listing.train, listing.val)] == [
        ["sample/10BT/000_00000.parquet"],
        ["sample/10BT/001_00000.parquet"],
    ]
    assert (listing.config, listing.revision) == ("sample-10BT", sha)
    hub.add(
        "roneneldan/TinyStories",
        {
            "data/train-00000-of-00002-ab.parquet": b"a",
            "data/train-00001-of-00002-cd.parquet": b"b",
            "data/validation-00000-of-00001-ef.parquet": b"c",
            "TinyStories-train.txt": b"d",
        },
    )
    listing = resolve("tinystories")
    assert [len(listing.train), [file.name for file in listing.val]] == [
        2,
        ["validation-00000-of-00001-ef.parquet"],
    ]
    assert listing.note == "validation: the validation split (validation-00000-of-00001-ef.parquet)"


def test_shakespeare(hub, monkeypatch):
    """One plain file, whose sum is known; without a network its listing is the same."""
    hub.add_url("/raw/input.txt", DATA)
    assert (SHAKESPEARE_BYTES, len(SHAKESPEARE_SHA256)) == (
        KNOWN["shakespeare"].text_bytes,
        64,
    )
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_URL", f"{hub.url}/raw/input.txt")
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_BYTES", N)
    listing = resolve("shakespeare")
    assert len(listing.train) == 1 and listing.val == () and hub.requests == []
    fails(listing.train[0], "its content is damaged")
    monkeypatch.setattr("nanochat.data.hub.SHAKESPEARE_SHA256", sha256_hex(DATA))
    file = resolve("shakespeare").train[0]
    hub.fault("input.txt", "cut", 1, after=2000)
    assert file.fetch(lambda line: None).suffix == ".txt"
    assert on_disk(file)
    assert hub.bodies("input.txt")[2:] == [(0, 2000), (0, N)]


@pytest.mark.parametrize(
    "name, found, suffix",
    [
        ("a.jsonl.gz", (".jsonl", ".gz"), ".jsonl.gz"),
        ("DATA.JSONL.GZ", (".jsonl", ".gz"), ".JSONL.GZ"),
        ("b.Parquet", (".parquet", ""), ".Parquet"),
        ("a.gz.txt", (".txt", ""), ".txt"),
        ("notes.md.xz", ("", ".xz"), ""),
        ("a.tsv", ("", ""), ""),
        ("plain", ("", ""), ""),
        ("x.v2.csv.zst", (".csv", ".zst"), ".csv.zst"),
    ],
)
def test_formats_of_names(name, found, suffix):
    assert (text_format(name), text_suffix(name)) == (found, suffix)


def test_model_files(hub):
    """Files of models are downloaded and checked like those of datasets."""
    sha = hub.add("me/model", {"a.json": DATA}, lfs=False)
    file = model_file("me/model", "a.json")
    assert (file.n_bytes, file.sha256, file.etag) == (N, "", blob_sha1(DATA))
    assert (file.revision, file.repo_type) == (sha, "model")
    hub.fault("a.json", "corrupt")
    fails(file, "its content is damaged")
    hub.faults.clear()
    assert file.fetch().read_bytes() == DATA
    assert on_disk(file)


def test_model_files_without_network(quick):
    with pytest.raises(
        DownloadFailed,
        match="a.json of me/model was not downloaded: no connection .*4 times in a row. Check the ",
    ):
        model_file("me/model", "a.json", lambda line: None)
    assert quick == [1, 2, 4]


def test_settings_of_datasets_are_undone(monkeypatch):
    """Also when two threads use it: the second waits, or it would undo the first one's settings to its own."""
    import datasets.config
    import huggingface_hub.utils

    def settings():
        return (
            datasets.config.HF_DATASETS_CACHE,
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
            huggingface_hub.utils.are_progress_bars_disabled(),
        )

    before, entered = settings(), threading.Event()

    def second():
        with quiet_datasets("a test"):
            entered.set()

    with quiet_datasets("a test"):
        assert settings()[1:] == (False, True)
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.05)
    thread.join(10)
    assert entered.is_set() and settings() == before


def test_a_new_commit_of_other_files_changes_nothing(hub):
    """The revision is new, the files' fingerprints and places are not, and nothing is downloaded again."""
    climbmix(hub)
    before = resolve("climbmix")
    before.train[0].fetch()
    hub.add(CLIMBMIX, {"README.md": b"# more text", "shard_00001.parquet": b"other"})
    after = resolve("climbmix")
    assert after.revision != before.revision and after.train[0].is_local()
    assert [
        a.fingerprint == b.fingerprint for a, b in zip(after.train, before.train, strict=True)
    ] == [True, False, True, True]
    assert resolve("climbmix", before.revision) == before


def test_kept_listings(hub, quick, monkeypatch):
    """A commit that was listed is not asked for again; the newest is asked for, and its listing reused."""
    sha, lines = climbmix(hub), []
    first = resolve("climbmix")
    hub.requests.clear()
    assert resolve("climbmix", sha) == first and hub.requests == []
    assert resolve("climbmix") == first and len(hub.requests) == 1
    assert resolve("climbmix", "main") == first and resolve("climbmix", sha[:8]) == first
    hub.fault("", "status", code=500)
    assert resolve("climbmix", "", lines.append) == first
    assert lines == [
        f"data: {CLIMBMIX}: the server answers 500; trying again in 1.0s",
        f"data: {CLIMBMIX}: the server answers 500, 2 times in a row; using the listing of revision {sha[:12]} from this disk",
    ]
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    lines.clear()
    assert (
        resolve("climbmix", "", lines.append) == first
        and len(lines) == 1
        and "HF_HUB_OFFLINE is set" in lines[0]
    )
    for path in (base_dir() / "hub" / "listings").iterdir():
        path.write_text(path.read_text()[:-20])
    with pytest.raises(DownloadFailed, match="No earlier listing"):
        resolve("climbmix", sha)


LISTING_FAULTS = {
    # path, fault options, times, exception or None, part of its message or of the one line, pauses
    "429": (
        "/tree/",
        {"code": 429, "headers": {"Retry-After": "3"}},
        2,
        None,
        "fewer requests (429); trying again in 3.0s",
        [3, 3],
    ),
    "500 once": ("/api/", {"code": 500}, 1, None, "the server answers 500", [1]),
    "500 always": (
        "/api/",
        {"code": 500},
        None,
        DownloadFailed,
        "was not listed: the server answers 500, 4 times in a row",
        [1, 2, 4],
    ),
    "500 always, tree": (
        "/tree/",
        {"code": 500},
        None,
        DownloadFailed,
        "the server answers 500, 4 times in a row",
        [1, 2, 4],
    ),
    "401": ("/api/", {"code": 401}, None, UsageError, "HF_TOKEN", []),
    "403": ("/api/", {"code": 403}, None, UsageError, "HF_TOKEN", []),
    "404": (
        "/api/",
        {"code": 404},
        None,
        UsageError,
        "--data=climbmix: karpathy/climbmix-400b-shuffle: not found (404)",
        [],
    ),
}


@pytest.mark.parametrize("case", LISTING_FAULTS)
def test_listing_faults(hub, quick, case):
    path, options, times, exception, part, pauses = LISTING_FAULTS[case]
    climbmix(hub)
    hub.fault(path, "status", times, **options)
    lines = []
    if exception:
        with pytest.raises(exception) as caught:
            resolve("climbmix", "", lines.append)
        assert part in str(caught.value) and "\n" not in str(caught.value)
        assert not (base_dir() / "hub" / "listings").exists()
    else:
        assert len(resolve("climbmix", "", lines.append).train) == 4
        assert len(lines) == 1 and part in lines[0]
    assert quick == pauses


def test_listing_without_network(quick):
    with pytest.raises(
        DownloadFailed,
        match="No earlier listing of it is on disk. Check the network and HF_ENDPOINT",
    ):
        resolve("climbmix", "", lambda line: None)
    assert quick == [1, 2, 4]


def test_files_that_moved(hub):
    hub.add(CLIMBMIX, {"new/shard_00000.parquet": b"a", "shard_00001.parquet": b"b"})
    with pytest.raises(UsageError, match="0 files for training and 1 for validation.*have moved"):
        resolve("climbmix")


# ---------------------------------------------------------------------------------------------------------------------
# listings of any dataset

CARD = b"""---
configs:
- config_name: plain
  data_files:
  - {split: train, path: "plain/*.jsonl.gz"}
  - {split: test, path: plain/held/out.jsonl.gz}
- config_name: other
  data_files: other/*.csv
---
"""
LINE = b'{"text": "a"}\n'
FEATURES = b"""---
dataset_info:
  features:
  - {name: story, dtype: string}
  - {name: label, dtype: int64}
---
"""
REPOS = {
    "me/configs": {
        "README.md": CARD,
        "plain/b.jsonl.gz": gzip.compress(LINE),
        "plain/a.jsonl.gz": gzip.compress(LINE * 2),
        "plain/held/out.jsonl.gz": gzip.compress(LINE * 3),
        "other/0.csv": b"text\na\n",
    },
    "me/splits": {
        "data/train-0.jsonl": LINE,
        "data/test-0.jsonl": LINE * 2,
        "data/validation-0.jsonl": LINE * 3,
    },
    "me/upper": {"TRAIN.jsonl.GZ": gzip.compress(LINE)},
    "me/one": {"input.txt": b"some text\n", "notes.md": b"no data"},
    "me/columns": {"README.md": FEATURES, "train.jsonl": b'{"story": "a", "label": 1}\n'},
    "me/arrow": {"train.arrow": b"x"},
    "me/tabs": {"train.tsv": b"text\na\n"},
    "me/script": {"script.py": b"import datasets", "train.jsonl": LINE},
    "me/empty": {"notes.xyz": b"nothing"},
    "me/broken": {"README.md": b"---\nconfigs: [: {\n---\n", "train.jsonl": LINE},
}
LISTED = {
    # spec: config, split, column, training files, validation files
    "hf:me/configs:plain": (
        "plain",
        "train",
        "text",
        ["plain/a.jsonl.gz", "plain/b.jsonl.gz"],
        ["plain/held/out.jsonl.gz"],
    ),
    "hf:me/configs:other": ("other", "train", "text", ["other/0.csv"], []),
    "hf:me/configs:plain:test": ("plain", "test", "text", ["plain/held/out.jsonl.gz"], []),
    "hf:me/splits": (
        "default",
        "train",
        "text",
        ["data/train-0.jsonl"],
        ["data/validation-0.jsonl"],
    ),
    "hf:me/splits::validation": (
        "default",
        "validation",
        "text",
        ["data/validation-0.jsonl"],
        ["data/test-0.jsonl"],
    ),
    "hf:me/upper": ("default", "train", "text", ["TRAIN.jsonl.GZ"], []),
    "hf:me/one": ("default", "train", "text", ["input.txt"], []),
    "hf:me/columns:::story": ("default", "train", "story", ["train.jsonl"], []),
}
REFUSED = {
    "hf:me/none": ["access is refused (401", "check the spelling", "HF_TOKEN"],
    "hf:me/closed": ["access is refused (401", "HF_TOKEN"],
    "hf:me/gated": [
        "access is refused (403, GatedRepo)",
        "HF_TOKEN",
        "accept its terms at http://127.0.0.1",
    ],
    "hf:me/one@nothere": ["at revision nothere: the dataset has no such revision"],
    "hf:me/configs": [
        "several configs and no default",
        "it has: plain, other",
        "hf:me/configs:<config>",
    ],
    "hf:me/configs:nope": ["no config 'nope'", "it has: plain, other"],
    "hf:me/configs:plain:nope": [
        "no split 'nope'",
        "it has: train, test",
        "hf:me/configs:plain:<split>",
    ],
    "hf:me/columns": ["no column 'text'", "it has: story, label", "<column>"],
    "hf:me/arrow": ["train.arrow is not a text format", ".parquet", ".zst"],
    "hf:me/tabs": ["train.tsv is not a text format"],
    "hf:me/script": ["a script makes me/script", "hf:me/script@refs/convert/parquet"],
    "hf:me/empty": ["finds no text in me/empty"],
    "hf:me/broken": ["finds no text in me/broken"],
    "hf:": ["not the name of a dataset", "hf:<dataset>", "climbmix"],
    "hf:a/b/c": ["not the name of a dataset"],
    "hf:../x": ["not the name of a dataset"],
    "hf:a:b:c:d:e": ["not the name of a dataset"],
    "fineweb": ["not the name of a dataset", "fineweb-edu"],
}


@pytest.fixture
def repos(hub, request):
    """The server with the repositories that the test's spec names."""
    repo = request.node.callspec.params["spec"].removeprefix("hf:").split(":")[0].split("@")[0]
    if repo in REPOS:
        hub.add(repo, REPOS[repo])
    hub.add("me/closed", {"train.txt": b"a"}, closed="private")
    hub.add("me/gated", {"train.txt": b"a"}, closed="gated")
    return hub


@pytest.mark.parametrize("spec", LISTED)
def test_listing_of_any_dataset(repos, spec):
    """Configs and splits are what datasets makes of card and file names; sizes and sums are the hub's."""
    elsewhere = sorted(Path(os.environ["HF_HOME"]).rglob("*"))
    listing = resolve(spec)
    paths = [[file.path for file in side] for side in (listing.train, listing.val)]
    assert (listing.config, listing.split, listing.column, *paths) == LISTED[spec]
    assert not [
        r
        for r in repos.requests
        if r.status in (200, 206) and r.start is not None and "README" not in r.path
    ]  # no data was read
    for file in listing.train + listing.val:
        content = REPOS[listing.repo][file.path]
        assert (file.n_bytes, file.sha256, file.revision) == (
            len(content),
            sha256_hex(content),
            listing.revision,
        )
        assert file.fetch().read_bytes() == content
    assert resolve(spec) == listing
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == elsewhere


@pytest.mark.parametrize("spec", REFUSED)
def test_refused_specs(repos, quick, spec):
    with pytest.raises(UsageError) as caught:
        resolve(spec, "", lambda line: None)
    for part in (f"--data={spec}: ", *REFUSED[spec]):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value) and quick == []


def test_pinned_in_the_spec(hub):
    """@revision names a commit or branch; the argument wins over it."""
    first = hub.add("me/one", {"train.txt": b"a"})
    second = hub.add("me/one", {"train.txt": b"bb"})
    assert resolve("hf:me/one").revision == second
    assert resolve(f"hf:me/one@{first[:10]}").revision == first
    assert resolve(f"hf:me/one@{first[:10]}").train[0].n_bytes == 1
    assert resolve(f"hf:me/one@{first[:10]}", second).revision == second


def test_a_local_folder_of_that_name_is_not_taken(hub, tmp_path, monkeypatch):
    hub.add("me/one", {"train.txt": b"a"})
    (tmp_path / "me" / "one").mkdir(parents=True)
    (tmp_path / "me" / "one" / "train.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert resolve("hf:me/one").train[0].n_bytes == 1


@pytest.mark.parametrize(
    "path, code, exception, part",
    [
        ("README.md", 500, DownloadFailed, "me/configs was not listed"),
        ("/tree/", 503, DownloadFailed, "me/configs was not listed"),
        ("paths-info", 500, DownloadFailed, "the server answers 500, 4 times in a row"),
        ("README.md", 403, UsageError, "HF_TOKEN"),
    ],
)
def test_faults_while_datasets_reads(hub, monkeypatch, path, code, exception, part):
    """Faults of the hub that only datasets meets are told apart from datasets that it cannot read."""
    hub.add(
        "me/configs", REPOS["me/configs"] | {"case.txt": f"{path} {code}".encode()}
    )  # a commit that no client has seen
    hub.fault(path, "status", code=code)
    with pytest.raises(exception) as caught:
        resolve("hf:me/configs:plain", "", lambda line: None)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    hub.faults.clear()
    assert len(resolve("hf:me/configs:plain").train) == 2


def test_gated_after_it_was_listed(hub):
    hub.add("me/one", {"train.txt": b"a"})
    file = resolve("hf:me/one").train[0]
    hub.repos["me/one"].closed = "gated"
    fails(file, "access is refused (401, GatedRepo)", "HF_TOKEN")


@pytest.mark.parametrize(
    "package, spec", [("huggingface_hub", "climbmix"), ("datasets", "hf:me/one")]
)
def test_missing_packages(hub, monkeypatch, package, spec):
    hub.add("me/one", {"train.txt": b"a"})
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.errors", None)
    with pytest.raises(UsageError, match=f"needs the package '{package}'.*pip install {package}"):
        resolve(spec)


def test_import_does_nothing():
    program = "import sys, nanochat.data.hub; print([m for m in ('huggingface_hub', 'datasets', 'torch', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
