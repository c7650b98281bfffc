"""Public text datasets: which files a dataset has (resolve), and one file on this disk, complete and verified (fetch).

Listings come from the Hugging Face hub through huggingface_hub and datasets. File contents are requested here, with the
session, address, token and offline switch of huggingface_hub, but not with its hf_hub_download: since its release 1.0 that
writes to a name that is new at every call and deletes it on failure, so an interrupted download starts over, and it does
not compare SHA-256. hf_xet (its default for large files) is not used for the same two reasons: it fills a file in no order
that can be resumed after a kill. A plain GET reaches the same bytes; the hub has such an address for every file up to 50 GB.

Everything is written under base_dir()/"hub":
    <repo>/<name>.<fingerprint>.<suffix>   complete and verified, or not there
    <repo>/... .incomplete                 the first part of a file; the next attempt, in any process, goes on from its end
    <repo>/... .lock                       held by the process that downloads
    listings/, client/                     cached listings; README and configuration files that datasets reads"""

import contextlib
import dataclasses
import email.utils
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from nanochat.common import (
    Unavailable,
    UsageError,
    base_dir,
    fsync_dir,
    human_bytes,
    human_time,
    in_a_line,
    install_hint,
    sha256_file,
    sha256_hex,
    write_json,
)

ATTEMPTS = 6  # requests in a row that bring less than PROGRESS_BYTES, before giving up
PROGRESS_BYTES = (
    1 << 20
)  # a request that brought this much before it broke does not count as a failure
BACKOFF_S, BACKOFF_MAX_S = (
    1.0,
    30.0,
)  # pause before the second attempt, doubled for each further one
WAIT_MAX_S = 300.0  # longest wait that a server may ask for (Retry-After); above it the download fails at once
TIMEOUT_S = 30.0  # without a byte
REPORT_S = 30.0  # how often a long download says how far it is
FORMATS = (".parquet", ".jsonl", ".json", ".txt", ".csv")
COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
LISTING_VERSION = 1


class DownloadFailed(Unavailable):
    """A listing or file could not be had. The message is for the user: what, why, what is on disk now, what to do."""


@dataclass(frozen=True)
class Known:
    """A dataset with a short name. text_bytes: of UTF-8 text in all, approximate unless it is one file; url: its page.

    In `folder` of the repository ("" is its root), files named like `train` are for training, those like `val` for
    validation; where val is "" the last training file by name is set aside."""

    what: str
    licence: str
    url: str
    text_bytes: int
    repo: str = ""
    config: str = ""
    folder: str = ""
    train: str = ""
    val: str = ""


# bytes: climbmix about 400e9 tokens in 6,543 shards of some 250e6 characters, fineweb-edu about 10e9 tokens at 4.7 bytes
KNOWN = {
    "climbmix": Known(
        "web text chosen and mixed for pre-training, about 400e9 tokens",
        "CC-BY-NC-4.0",
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle",
        1_640_000_000_000,
        "karpathy/climbmix-400b-shuffle",
        train="shard_*.parquet",
    ),
    "fineweb-edu": Known(
        "educational web pages, about 10e9 tokens",
        "ODC-By",
        "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
        47_000_000_000,
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        "sample/10BT",
        "*.parquet",
    ),
    "tinystories": Known(
        "short stories in a small vocabulary",
        "CDLA-Sharing-1.0",
        "https://huggingface.co/datasets/roneneldan/TinyStories",
        1_900_000_000,
        "roneneldan/TinyStories",
        "",
        "data",
        "train-*.parquet",
        "validation-*.parquet",
    ),
    "shakespeare": Known(
        "Shakespeare's plays, one text",
        "public domain",
        "https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare",
        1_115_394,
    ),
}
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---------------------------------------------------------------------------------------------------------------------
# files


@dataclass(frozen=True)
class RemoteFile:
    """One file of a dataset (or, by repo_type, a "model") at a fixed revision (a commit), or, with repo and revision "", at a URL.

    n_bytes: its size as the hub lists it. sha256: of its content where the hub states one, else "". etag: the hub's name
    for the content (of small files git's blob SHA-1)."""

    repo: str
    revision: str
    path: str
    n_bytes: int
    sha256: str
    etag: str
    repo_type: str = "dataset"

    @property
    def name(self):
        """The file's own name, without folders."""
        return (self.path if self.repo else urlsplit(self.path).path).rpartition("/")[2]

    @property
    def fingerprint(self):
        """SHA-256 of what identifies the content. The revision does not enter: other files' commits change nothing here."""
        return sha256_hex(
            json.dumps([self.repo, self.path, self.n_bytes, self.sha256 or self.etag])
        )

    def local_path(self):
        """Where the file is or will be. Names of other versions of it differ. Reads nothing."""
        folder = self.repo or urlsplit(self.path).netloc
        suffix = text_suffix(self.name) or Path(self.name).suffix
        stem = self.name.removesuffix(suffix)[:100]
        name = re.sub(r"[^\w.-]", "_", f"{stem}.{self.fingerprint[:12]}{suffix}", flags=re.ASCII)
        return (
            base_dir()
            / "hub"
            / re.sub(r"[^\w.-]", "_", folder.replace("/", "--"), flags=re.ASCII)
            / name
        )

    def is_local(self):
        """Whether the file is complete on disk (it gets its name only after its content was verified)."""
        path = self.local_path()
        return path.is_file() and path.stat().st_size == self.n_bytes

    def fetch(self, report=print):
        """Download what is missing, verify size and SHA-256, return the path. `report` takes one line on each surprise, and
        one every REPORT_S seconds.

        Only one process downloads, others wait for it. Raises DownloadFailed."""
        path = self.local_path()
        if self.is_local():
            return path
        lock_path = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(lock_path, "w")
        except OSError as error:
            raise _failed(
                self, _Problem("disk", f"{path.parent} cannot be written ({error.strerror})")
            ) from None
        with lock:
            wait_for(lock, self.name, path.parent, report)
            if not self.is_local():
                _download(self, path, report)
            lock_path.unlink(
                missing_ok=True
            )  # whoever waits for it finds the file complete, so a second lock does no harm
        return path


def text_format(name):
    """(format, compression) of a file by its name, in upper or lower case: one of FORMATS or "", and one of COMPRESSIONS."""
    name = name.lower()
    compression = next((ending for ending in COMPRESSIONS[1:] if name.endswith(ending)), "")
    return next(
        (ending for ending in FORMATS if name.endswith(ending + compression)), ""
    ), compression


def text_suffix(name):
    """The part of a file name that says how text is stored in it, such as ".jsonl.gz"; "" if it is none of ours."""
    suffix, compression = text_format(name)
    return name[-len(suffix + compression) :] if suffix else ""


def wait_for(lock, name, folder, report):
    """Take the lock (an open file in `folder`) of a download; a line is reported if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report(f"data: another process is downloading {name}; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks; a file that two processes wrote would fail its check
        report(f"data: no file locks in {folder}; only one process at a time should download there")


def _download(file, path, report):
    """Bring a file to its final name, from what an earlier attempt left. The caller holds its lock."""
    partial = path.with_name(path.name + ".incomplete")
    try:
        fetched_again = False
        while True:
            try:
                _patiently(
                    lambda: _get_rest(file, partial, report),
                    file.name,
                    report,
                    lambda: _size(partial),
                )
                _verify(file, partial)
                break
            except _Problem as problem:
                if problem.kind != "content":
                    raise
                partial.unlink(missing_ok=True)
                if fetched_again:
                    raise
                report(f"data: {file.name}: {problem.reason}; deleted, fetching it once more")
                fetched_again = True
        os.replace(partial, path)
        fsync_dir(path.parent)
    except _Problem as problem:
        raise _failed(file, problem) from None
    except OSError as error:
        raise _failed(file, _problem_of(error)) from None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _get_rest(file, partial, report):
    """Ask once for the bytes of a file that `partial` lacks and append them. Returns when all are there, else raises."""
    start = _size(partial)
    if start > file.n_bytes:
        partial.unlink()
        start = 0
    if start == file.n_bytes and start:
        return
    free = shutil.disk_usage(partial.parent).free
    if free < file.n_bytes - start:
        raise _Problem(
            "disk",
            f"{human_bytes(file.n_bytes - start)} are missing and {human_bytes(free)} are free in {partial.parent}",
        )
    hub = _huggingface_hub()
    url, headers = file.path, {}
    if file.repo:
        url = hub.hf_hub_url(file.repo, file.path, repo_type=file.repo_type, revision=file.revision)
        headers = (
            hub.utils.build_hf_headers()
        )  # with the token, if there is one; the session drops it when the CDN is another host
    headers["Accept-Encoding"] = (
        "identity"  # ranges count bytes of the file, not of a compressed answer
    )
    if start:
        headers["Range"] = f"bytes={start}-"
    with hub.get_session().stream(
        "GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
    ) as response:
        total = _total_bytes(response)
        if response.status_code in (200, 206, 416) and total is not None and total != file.n_bytes:
            raise _Problem(
                "content",
                f"the server's file has {total:,} bytes where {file.n_bytes:,} are listed",
            )
        elsewhere = response.status_code == 206 and not response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {start}-")
        if response.status_code == 416 or elsewhere:
            partial.unlink(missing_ok=True)
            raise _Problem("network", "the server refuses to go on from what is on disk")
        problem = _status_problem(response)
        if problem:
            raise problem
        if response.status_code != 206:
            start = 0  # the server does not do ranges and sends the file from its beginning
        with open(partial, "r+b" if start else "wb") as f:
            f.seek(start)
            told = time.monotonic()
            for piece in response.iter_bytes():
                start += len(piece)
                if start > file.n_bytes:
                    raise _Problem(
                        "content",
                        f"the server sends more than the {file.n_bytes:,} bytes that are listed",
                    )
                f.write(piece)
                if time.monotonic() - told > REPORT_S:
                    told = time.monotonic()
                    report(
                        f"data: {file.name}: {human_bytes(start)} of {human_bytes(file.n_bytes)}"
                    )
            f.flush()
            os.fsync(f.fileno())
    if start < file.n_bytes:
        raise _Problem("network", f"the answer ended after {start:,} of {file.n_bytes:,} bytes")


def content_length(url, report=print):
    """Bytes of the file at a URL outside the hub, as its server says. Raises DownloadFailed."""
    name = urlsplit(url).path.rpartition("/")[2]

    def ask():
        response = (
            _huggingface_hub()
            .get_session()
            .head(
                url,
                headers={"Accept-Encoding": "identity"},
                timeout=TIMEOUT_S,
                follow_redirects=True,
            )
        )
        if problem := _status_problem(response):
            raise problem
        if not response.headers.get("Content-Length", "").isdigit():
            raise _Problem("missing", "the server does not say how large it is")
        return int(response.headers["Content-Length"])

    try:
        return _patiently(ask, name, report)
    except _Problem as problem:
        raise DownloadFailed(
            f"{name} of {urlsplit(url).netloc} was not downloaded: {problem.reason}. {_remedy(problem, '')}"
        ) from None


def _total_bytes(response):
    """Size of the whole file by the headers of an answer, or None."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None  # lengths are then those of the compressed answer
    if "Content-Range" in response.headers:
        total = response.headers["Content-Range"].rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "") if response.status_code == 200 else ""
    return int(total) if total.isdigit() else None


def _verify(file, path):
    """Compare content with what the hub states. Raises _Problem of kind "content"."""
    if file.sha256:
        found, stated = sha256_file(path), file.sha256
    elif re.fullmatch("[0-9a-f]{40}", file.etag):
        content = path.read_bytes()  # files without a SHA-256 are plain git blobs, at most 19 MB
        found, stated = (
            hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
            file.etag,
        )
    else:
        return
    if found != stated:
        raise _Problem(
            "content",
            f"its content is damaged (checksum {found[:12]}, the hub states {stated[:12]})",
        )


# ---------------------------------------------------------------------------------------------------------------------
# faults


class _Problem(Exception):
    """Why a request failed. kind: network, busy (both worth another attempt), offline, denied, missing, content, disk.

    wait_s: how long the server asks to wait, or None."""

    def __init__(self, kind, reason, wait_s=None):
        super().__init__(reason)
        self.kind, self.reason, self.wait_s = kind, reason, wait_s


def _status_problem(response):
    """The _Problem that an answer's status means, or None."""
    code = response.status_code
    said = response.headers.get("X-Error-Code", "")
    wait_s = _retry_after_s(response.headers)
    if code < 300:
        return None
    if code == 429:
        return _Problem("busy", "the hub asks for fewer requests (429)", wait_s)
    if code == 408 or code >= 500:
        return _Problem("busy", f"the server answers {code}", wait_s)
    if code in (401, 403):
        return _Problem("denied", f"access is refused ({code}{', ' + said if said else ''})")
    if code == 404:
        missing = {
            "RepoNotFound": "there is no such dataset",
            "RevisionNotFound": "the dataset has no such revision",
            "EntryNotFound": "the dataset has no such file at this revision",
        }
        return _Problem("missing", f"{missing.get(said, 'not found')} (404)")
    return _Problem("missing", f"the server answers {code}")


def _retry_after_s(headers):
    """Seconds until the time that Retry-After names (a number or a date), or None."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _problem_of(error):
    """The _Problem behind an exception of the clients or of the disk; other exceptions are raised again."""
    if isinstance(error, UsageError):
        raise error
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport_error = HfHubHTTPError.__bases__[
        0
    ]  # HTTPError of the HTTP library that this huggingface_hub is built on
    if isinstance(error, _Problem):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return _Problem("offline", "HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        return _status_problem(error.response) or _Problem("network", in_a_line(error))
    if isinstance(error, (transport_error, ConnectionError, TimeoutError)):
        if "Timeout" in type(error).__name__:
            return _Problem("network", f"no answer within {human_time(TIMEOUT_S)}")
        refused = "Connect" in type(error).__name__
        return _Problem(
            "network", f"no connection ({in_a_line(error)})" if refused else "the connection broke"
        )
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _Problem(
            "disk",
            "the disk is full"
            if full
            else f"the disk refuses ({error.strerror or in_a_line(error)})",
        )
    raise error


def _patiently(request, what, report, progress=lambda: 0, attempts=None):
    """request()'s result. Failures that may pass are tried again, after a pause; each kind of them is reported once.

    progress: bytes had so far. Raises _Problem when attempts run out or another one cannot help."""
    failures, told = 0, set()
    while True:
        had = progress()
        try:
            return request()
        except Exception as error:  # _problem_of raises again what it does not know
            problem = _problem_of(error)
        failures = 1 if progress() - had >= PROGRESS_BYTES else failures + 1
        if problem.kind not in ("network", "busy"):
            raise problem
        if failures >= (attempts or ATTEMPTS):
            raise _Problem(
                problem.kind,
                f"{problem.reason}, {failures} times in a row" if failures > 1 else problem.reason,
            )
        if (problem.wait_s or 0) > WAIT_MAX_S:
            raise _Problem(
                problem.kind, f"{problem.reason} and to wait for {human_time(problem.wait_s)}"
            )
        pause_s = (
            min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (failures - 1))
            if problem.wait_s is None
            else problem.wait_s
        )
        if problem.kind not in told:
            told.add(problem.kind)
            kept = f" ({human_bytes(progress())} are kept)" if progress() else ""
            report(f"data: {what}: {problem.reason}{kept}; trying again in {human_time(pause_s)}")
        time.sleep(pause_s)


def _failed(file, problem):
    """The DownloadFailed for a file: what happened, what is on disk, what helps."""
    kept = _size(file.local_path().with_name(file.local_path().name + ".incomplete"))
    whole = human_bytes(file.n_bytes)
    on_disk = f"{human_bytes(kept)} of {whole} are kept; the next attempt goes on from there"
    return DownloadFailed(
        f"{file.name} of {file.repo or urlsplit(file.path).netloc} was not downloaded: {problem.reason}. "
        f"{on_disk if kept else f'Nothing of its {whole} is on disk'}. {_remedy(problem, file.repo)}"
    )


def _remedy(problem, repo):
    """What the user can do about a problem, as a sentence."""
    endpoint = "huggingface.co"
    with contextlib.suppress(ImportError):
        import huggingface_hub.constants

        endpoint = huggingface_hub.constants.ENDPOINT
    token = f"set HF_TOKEN to a token that may read it (accept its terms at {endpoint}/datasets/{repo} first, where it has any)"
    network = f"Check the network and HF_ENDPOINT (now {endpoint})" if repo else "Check the network"
    damaged = "The server's copy, or a proxy on the way, is damaged: start again later"
    return {
        "network": f"{network}, then start again.",
        "busy": "Start again later" + ("; HF_TOKEN raises the hub's limits." if repo else "."),
        "offline": "Unset HF_HUB_OFFLINE, or run once with it unset while there is a network.",
        "denied": f"If the dataset is private or gated, {token}.",
        "missing": "Check the name and the revision: the dataset may have changed or moved."
        if repo
        else "The file may have moved: fetch it by hand, and give its path instead.",
        "content": damaged + (", or name another server in HF_ENDPOINT." if repo else "."),
        "disk": f"Make room and see that {base_dir()} can be written, or set NANOCHAT_BASE_DIR to a folder on a larger disk.",
    }[problem.kind]


# ---------------------------------------------------------------------------------------------------------------------
# listings


@dataclass(frozen=True)
class Listing:
    """The files of a dataset at one revision. column: the field with the text. note: what validation uses, one sentence.

    train is in the hub's order, by name. val may be empty: then the caller holds a part out."""

    spec: str
    repo: str
    config: str
    split: str
    revision: str
    column: str
    train: tuple[RemoteFile, ...]
    val: tuple[RemoteFile, ...]
    note: str


def resolve(spec, revision="", report=print):
    """The Listing of a --data value: a name in KNOWN or hf:<dataset>[@revision][:<config>[:<split>[:<column>]]].

    revision: a commit, branch or tag, instead of the newest; with a full commit that was listed before, nothing is
    requested. When the hub cannot be reached an earlier listing is used, and reported. Raises UsageError for what does not
    exist or cannot be read as text, DownloadFailed when the hub cannot be asked."""
    if spec == "shakespeare":
        file = RemoteFile(
            "", "", SHAKESPEARE_URL, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, SHAKESPEARE_SHA256
        )
        return Listing(
            spec,
            "",
            "",
            "train",
            "",
            "text",
            (file,),
            (),
            "validation: the last part of the one text, held out",
        )
    repo, config, split, column, pinned = _parse(spec)
    wanted = revision or pinned
    if re.fullmatch("[0-9a-f]{40}", wanted) and (listing := _cached(spec, wanted)):
        return listing
    try:
        # without a network, a run that can go on from what is here should not wait for long
        sha = _patiently(
            lambda: _commit(repo, wanted),
            repo,
            report,
            attempts=2 if _cached(spec, wanted) else None,
        )
        listing = _cached(spec, sha) or (_list_known if spec in KNOWN else _list_any)(
            spec, repo, config, split, column, sha, report
        )
    except _Problem as problem:
        if problem.kind in ("network", "busy", "offline") and (listing := _cached(spec, wanted)):
            report(
                f"data: {repo}: {problem.reason}; using the listing of revision {listing.revision[:12]} from this disk"
            )
            return listing
        raise _unlisted(spec, repo, wanted, problem) from None
    _keep(listing, wanted, report)
    return listing


def _parse(spec):
    """(repo, config, split, column, revision) of a spec; UsageError if it is not one."""
    if spec in KNOWN:
        return KNOWN[spec].repo, KNOWN[spec].config, "train", "text", ""
    fields = spec.removeprefix("hf:").split(":")
    repo, _, revision = fields[0].partition("@")
    # huggingface_hub's own rule for names is wider only in what no repository is called
    if (
        not spec.startswith("hf:")
        or len(fields) > 4
        or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo, re.ASCII)
    ):
        raise UsageError(
            f"--data={spec}: not the name of a dataset; write hf:<dataset>[@revision][:<config>[:<split>[:<column>]]], for "
            f"example hf:roneneldan/TinyStories, or one of {', '.join(KNOWN)}"
        )
    config, split, column = fields[1:] + [""] * (4 - len(fields))
    return repo, config, split or "train", column or "text", revision


def _unlisted(spec, repo, revision, problem):
    """The exception for a dataset that cannot be listed: the user's mistake, or the network's."""
    at = f" at revision {revision}" if revision else ""
    if problem.kind in ("denied", "missing"):
        spelling = (
            "The hub answers so for names that do not exist too: check the spelling. "
            if problem.kind == "denied"
            else ""
        )
        return UsageError(
            f"--data={spec}: {repo}{at}: {problem.reason}. {spelling}{_remedy(problem, repo)}"
        )
    return DownloadFailed(
        f"{repo}{at} was not listed: {problem.reason}. No earlier listing of it is on disk. {_remedy(problem, repo)}"
    )


def _huggingface_hub():
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise install_hint("huggingface_hub", "a download from the Hugging Face hub") from None
    huggingface_hub.get_session().timeout = (
        TIMEOUT_S  # its default is to wait for ever, and most of HfApi takes no timeout
    )
    return huggingface_hub


def _commit(repo, revision):
    """The full sha of a revision of a dataset ("" is the newest). Raises if the dataset may not be read."""
    api = _huggingface_hub().HfApi()
    info = api.dataset_info(repo, revision=revision or None, timeout=TIMEOUT_S)
    if info.gated:
        api.auth_check(
            repo, repo_type="dataset"
        )  # a gated dataset can be listed by all, only its files cannot be read
    return info.sha


def _tree(repo, sha, folder, report):
    """The files in a folder of a dataset, subfolders left out, by name. The hub lists them in pages.

    HfApi.list_repo_tree does the same without a timeout, and waits without a word when the hub asks it to."""
    hub = _huggingface_hub()
    endpoint = hub.constants.ENDPOINT
    url, files = f"{endpoint}/api/datasets/{repo}/tree/{sha}/{folder}".rstrip("/"), []
    while url:
        response = _patiently(lambda: _get(hub, url), repo, report)
        for entry in response.json():
            if entry["type"] == "file":
                lfs = entry.get("lfs") or {}
                size, digest = lfs.get("size", entry["size"]), lfs.get("oid", "")
                files.append(
                    RemoteFile(repo, sha, entry["path"], size, digest, digest or entry["oid"])
                )
        url = response.links.get("next", {}).get("url", "")
        if url and not url.startswith(
            endpoint
        ):  # mirrors pass on links to the original hub, which may be out of reach
            url = f"{endpoint}{urlsplit(url).path}?{urlsplit(url).query}"
    return sorted(files, key=lambda file: file.path)


def model_file(repo, path, report=print):
    """The RemoteFile of a file in a model repository, as it stands in the newest commit. DownloadFailed if the hub cannot say."""
    hub = _huggingface_hub()
    url = hub.hf_hub_url(repo, path)
    try:
        found = _patiently(lambda: hub.get_hf_file_metadata(url, timeout=TIMEOUT_S), repo, report)
        if found.size is None:
            raise _Problem("content", "the server does not say its size")
    except _Problem as problem:
        raise DownloadFailed(
            f"{path} of {repo} was not downloaded: {problem.reason}. {_remedy(problem, repo)}"
        ) from None
    etag = found.etag or ""
    return RemoteFile(
        repo,
        found.commit_hash or "main",
        path,
        found.size,
        etag if len(etag) == 64 else "",
        etag,
        "model",
    )


def _get(hub, url):
    response = hub.get_session().get(url, headers=hub.utils.build_hf_headers(), timeout=TIMEOUT_S)
    problem = _status_problem(response)
    if problem:
        raise problem
    return response


def _list_known(spec, repo, config, split, column, sha, report):
    """Listing of a dataset in KNOWN, from its folder's listing: quicker than datasets, which reads all configs first."""
    known = KNOWN[spec]
    files = _tree(repo, sha, known.folder, report)
    train = tuple(file for file in files if fnmatch.fnmatchcase(file.name, known.train))
    val = tuple(file for file in files if known.val and fnmatch.fnmatchcase(file.name, known.val))
    if not known.val:
        train, val = train[:-1], train[-1:]
    if not train or not val:
        raise UsageError(
            f"--data={spec}: {repo} at revision {sha[:12]} has {len(train)} files for training and {len(val)} for "
            f"validation in /{known.folder}; its files have moved: use --data=hf:{repo}:<config>"
        )
    names = val[0].name if len(val) == 1 else f"{len(val)} files, {val[0].name} to {val[-1].name}"
    note = (
        f"validation: the validation split ({names})"
        if known.val
        else f"validation: the last of {len(train) + 1:,} files, {names}"
    )
    return Listing(spec, repo, config, split, sha, column, train, val, note)


_at_home = (
    threading.RLock()
)  # shards are read in several threads, and each must undo its own settings


@contextlib.contextmanager
def datasets_at_home(purpose):
    """The package datasets, for the time of a `with`: its and huggingface_hub's caches under base_dir(), no bars, no counters.

    The variables that choose those folders are read when the packages are imported, which may be long past. purpose: what
    needs it, for the UsageError where it is missing. One thread at a time."""
    try:
        import datasets
        import datasets.config
    except ImportError:
        raise install_hint("datasets", purpose) from None
    hub = _huggingface_hub()
    folder = base_dir() / "hub" / "client"
    # HF_UPDATE_DOWNLOAD_COUNTS: datasets reports each use of a dataset to a server of its makers
    settings = [
        (hub.constants, "HF_HUB_CACHE", str(folder)),
        (datasets.config, "HF_DATASETS_CACHE", folder),
        (datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]
    with _at_home:
        before = [(module, name, getattr(module, name)) for module, name, _ in settings]
        bars = not hub.utils.are_progress_bars_disabled()
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            hub.utils.disable_progress_bars()
            yield datasets
        finally:
            for module, name, value in before:
                setattr(module, name, value)
            if bars:
                hub.utils.enable_progress_bars()


def _list_any(spec, repo, config, split, column, sha, report):
    """Listing of any dataset: which files make which split is what datasets says, their sizes and sums what the hub says."""
    with datasets_at_home("--data=hf:...") as datasets:
        cache = str(base_dir() / "hub" / "client")
        address = (
            f"hf://datasets/{repo}"  # so that a local folder of the same name is not taken instead
        )
        try:
            builder = datasets.load_dataset_builder(
                address, config or None, revision=sha, cache_dir=cache
            )
        except Exception as error:  # anything: it reads files that strangers wrote
            raise _unreadable(spec, repo, config, sha, error, datasets) from None
    files = {
        name: _paths(spec, repo, sha, urls)
        for name, urls in (builder.config.data_files or {}).items()
    }
    features = list(builder.info.features or [])
    if split not in files:
        raise UsageError(
            f"--data={spec}: {repo} has no split '{split}'; it has: {', '.join(files)}. "
            f"Write hf:{repo}:{config}:<split>"
        )
    if features and column not in features:
        raise UsageError(
            f"--data={spec}: {repo} has no column '{column}'; it has: {', '.join(features)}. "
            f"Write hf:{repo}:{config}:{split}:<column>"
        )
    val_split = next(
        (name for name in ("validation", "valid", "test") if name in files and name != split), ""
    )
    val_paths = [path for path in files.get(val_split, []) if path not in files[split]]
    api = _huggingface_hub().HfApi()
    wanted, found = files[split] + val_paths, {}
    for first in range(0, len(wanted), 500):
        page = wanted[first : first + 500]
        for entry in _patiently(
            lambda: api.get_paths_info(repo, page, revision=sha, repo_type="dataset"), repo, report
        ):
            digest = entry.lfs.sha256 if entry.lfs else ""
            size = entry.lfs.size if entry.lfs else entry.size
            found[entry.path] = RemoteFile(
                repo, sha, entry.path, size, digest, digest or entry.blob_id
            )
    missing = [path for path in wanted if path not in found]
    if missing:
        raise UsageError(
            f"--data={spec}: {repo} at revision {sha[:12]} lacks a file that it names, {missing[0]}; try another "
            f"revision: hf:{repo}@<revision>"
        )
    note = (
        f"validation: the split '{val_split}'"
        if val_paths
        else "validation: held out of the training files (there is no split for it)"
    )
    return Listing(
        spec,
        repo,
        builder.config.name,
        split,
        sha,
        column,
        tuple(found[path] for path in files[split]),
        tuple(found[path] for path in val_paths),
        note,
    )


def _paths(spec, repo, sha, urls):
    """The sorted paths in the repository of a split's files. UsageError for files that are not its, or not text."""
    paths = [str(url).removeprefix(f"hf://datasets/{repo}@{sha}/") for url in urls]
    for path in paths:
        if "://" in path:
            raise UsageError(
                f"--data={spec}: {repo} keeps its data elsewhere ({path}), where size and content cannot be checked; "
                f"download it and name the files with --data=<path>"
            )
        if not text_suffix(path):
            raise UsageError(
                f"--data={spec}: {path} is not a text format that can be read ({', '.join(FORMATS)}, plain or compressed as "
                f"{', '.join(COMPRESSIONS[1:])}); choose another config or dataset"
            )
    return sorted(set(paths))


def _unreadable(spec, repo, config, sha, error, datasets):
    """What to raise when datasets cannot make a builder: _Problem if the network failed, else UsageError."""
    cause = error
    while (
        cause is not None
    ):  # datasets turns any fault of the hub into "file not found", and keeps the fault as its cause
        with contextlib.suppress(Exception):  # _problem_of raises what it does not know
            problem = _problem_of(cause)
            if problem.kind in ("network", "busy", "offline", "denied"):
                return problem
            if problem.kind == "disk" and cause.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
            ):
                return problem
        cause = cause.__cause__ or cause.__context__
    said = in_a_line(error)
    if "scripts are no longer supported" in said:
        return UsageError(
            f"--data={spec}: {repo} is made by a script, which is not run; the hub keeps a converted copy of many such "
            f"datasets: try hf:{repo}@refs/convert/parquet"
        )
    if isinstance(error, ValueError):
        with contextlib.suppress(Exception):
            names = datasets.get_dataset_config_names(f"hf://datasets/{repo}", revision=sha)
            if config not in names:
                has = (
                    f"has no config '{config}'" if config else "has several configs and no default"
                )
                return UsageError(
                    f"--data={spec}: {repo} {has}; it has: {', '.join(names)}. Write hf:{repo}:<config>"
                )
    return UsageError(
        f"--data={spec}: the package datasets finds no text in {repo} ({said}); see what it holds at "
        f"https://huggingface.co/datasets/{repo}/tree/{sha[:12]}, and name files on this disk with --data=<path>"
    )


# ---------------------------------------------------------------------------------------------------------------------
# cached listings


def _listing_path(spec, revision):
    return base_dir() / "hub" / "listings" / f"{sha256_hex(json.dumps([spec, revision]))[:32]}.json"


def _keep(listing, wanted, report):
    """Write a listing under its commit, and under the revision that was asked for ("" is the newest), where it is new."""
    for revision in dict.fromkeys((listing.revision, wanted)):
        path = _listing_path(listing.spec, revision)
        if _cached(listing.spec, revision) == listing:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": LISTING_VERSION, **dataclasses.asdict(listing)})
        except (
            OSError
        ) as error:  # all files may be on disk already: a read-only folder is enough then
            report(
                f"data: {listing.repo}: the listing cannot be kept in {path.parent} ({error.strerror}); resuming needs the network"
            )
            return


def _cached(spec, revision):
    """The kept listing, or None. One that cannot be read is as good as none: it is made again."""
    try:
        value = json.loads(_listing_path(spec, revision).read_text(encoding="utf-8"))
        if value.pop("version") != LISTING_VERSION:
            return None
        sides = {
            side: tuple(RemoteFile(**file) for file in value.pop(side)) for side in ("train", "val")
        }
        return Listing(**value, **sides)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
