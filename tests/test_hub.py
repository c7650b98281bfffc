"""Listings of public datasets, with the real clients against tests/hub_server.py.

What works, and every fault with what the user reads."""

import errno
import fcntl
import gzip
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import blob_sha1
from test_download import DATA, ROOT, N, fails, hurry, on_disk

from nanochat.common import UsageError, base_dir, sha256_hex
from nanochat.data.clients import quiet_datasets
from nanochat.data.download import DownloadFailed, RemoteFile
from nanochat.data.hub import KNOWN, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, model_file, resolve

CLIMBMIX = "karpathy/climbmix-400b-shuffle"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The pauses of a test, which are not made."""
    return hurry(monkeypatch, tmp_path / "base")


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


def test_a_listing_without_file_locks(hub, monkeypatch):
    """The libraries insist on locks for what they keep: it goes to a temporary folder."""
    really_lock = fcntl.flock

    def refuse(file, operation):
        number = file if isinstance(file, int) else file.fileno()
        if Path(os.readlink(f"/proc/self/fd/{number}")).is_relative_to(base_dir()):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        really_lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    hub.add("me/locked", {"README.md": FEATURES, "train.jsonl": b'{"story": "a", "label": 1}\n'})
    listing = resolve("hf:me/locked:::story")
    assert [file.path for file in listing.train] == ["train.jsonl"]
    assert listing.train[0].fetch().read_bytes() == b'{"story": "a", "label": 1}\n'


def test_settings_of_datasets_are_undone(monkeypatch):
    """Also when two threads use it: the second waits, or it would undo the first one's settings to
    its own."""
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
    """The revision is new, the files' fingerprints and places are not, and nothing is downloaded
    again."""
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
    """A commit that was listed is not asked for again; the newest is asked for, and its listing
    reused."""
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
        f"data: {CLIMBMIX}: the server answers 500, 2 times in a row; using the listing of "
        f"revision {sha[:12]} from this disk",
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
    """Configs and splits are what datasets makes of card and file names; sizes and sums are the
    hub's."""
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
    """Faults of the hub that only datasets meets are told apart from datasets that it cannot
    read."""
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
    program = (
        "import sys, nanochat.data.hub; "
        "heavy = ('huggingface_hub', 'datasets', 'torch', 'pyarrow'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
