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
import email.utils
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
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
    sha256_file,
    sha256_hex,
)
from nanochat.data import clients
from nanochat.data.text import text_suffix

ATTEMPTS = 6  # requests in a row that bring less than PROGRESS_BYTES, before giving up


PROGRESS_BYTES = (
    1 << 20
)  # a request that brought this much before it broke does not count as a failure


BACKOFF_S, BACKOFF_MAX_S = (
    1.0,
    30.0,
)  # pause before the second attempt, doubled for each further one


WAIT_MAX_S = 300.0  # longest wait that a server may ask for (Retry-After); above it the download fails at once


REPORT_S = 30.0  # how often a long download says how far it is


class DownloadFailed(Unavailable):
    """A listing or file could not be had. The message is for the user: what, why, what is on disk now, what to do."""


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
                self, Problem("disk", f"{path.parent} cannot be written ({error.strerror})")
            ) from None
        with lock:
            wait_for(lock, self.name, path.parent, report)
            if not self.is_local():
                _download(self, path, report)
            lock_path.unlink(
                missing_ok=True
            )  # whoever waits for it finds the file complete, so a second lock does no harm
        return path


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
                patiently(
                    lambda: _get_rest(file, partial, report),
                    file.name,
                    report,
                    lambda: _size(partial),
                )
                _verify(file, partial)
                break
            except Problem as problem:
                if problem.kind != "content":
                    raise
                partial.unlink(missing_ok=True)
                if fetched_again:
                    raise
                report(f"data: {file.name}: {problem.reason}; deleted, fetching it once more")
                fetched_again = True
        os.replace(partial, path)
        fsync_dir(path.parent)
    except Problem as problem:
        raise _failed(file, problem) from None
    except OSError as error:
        raise _failed(file, problem_of(error)) from None


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
        raise Problem(
            "disk",
            f"{human_bytes(file.n_bytes - start)} are missing and {human_bytes(free)} are free in {partial.parent}",
        )
    hub = clients.load_huggingface_hub()
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
        "GET", url, headers=headers, timeout=clients.TIMEOUT_S, follow_redirects=True
    ) as response:
        total = _total_bytes(response)
        if response.status_code in (200, 206, 416) and total is not None and total != file.n_bytes:
            raise Problem(
                "content",
                f"the server's file has {total:,} bytes where {file.n_bytes:,} are listed",
            )
        elsewhere = response.status_code == 206 and not response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {start}-")
        if response.status_code == 416 or elsewhere:
            partial.unlink(missing_ok=True)
            raise Problem("network", "the server refuses to go on from what is on disk")
        problem = status_problem(response)
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
                    raise Problem(
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
        raise Problem("network", f"the answer ended after {start:,} of {file.n_bytes:,} bytes")


def content_length(url, report=print):
    """Bytes of the file at a URL outside the hub, as its server says. Raises DownloadFailed."""
    name = urlsplit(url).path.rpartition("/")[2]

    def ask():
        response = (
            clients.load_huggingface_hub()
            .get_session()
            .head(
                url,
                headers={"Accept-Encoding": "identity"},
                timeout=clients.TIMEOUT_S,
                follow_redirects=True,
            )
        )
        if problem := status_problem(response):
            raise problem
        if not response.headers.get("Content-Length", "").isdigit():
            raise Problem("missing", "the server does not say how large it is")
        return int(response.headers["Content-Length"])

    try:
        return patiently(ask, name, report)
    except Problem as problem:
        raise DownloadFailed(
            f"{name} of {urlsplit(url).netloc} was not downloaded: {problem.reason}. {remedy(problem, '')}"
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
    """Compare content with what the hub states. Raises Problem of kind "content"."""
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
        raise Problem(
            "content",
            f"its content is damaged (checksum {found[:12]}, the hub states {stated[:12]})",
        )


class Problem(Exception):
    """Why a request failed. kind: network, busy (both worth another attempt), offline, denied, missing, content, disk.

    wait_s: how long the server asks to wait, or None."""

    def __init__(self, kind, reason, wait_s=None):
        super().__init__(reason)
        self.kind, self.reason, self.wait_s = kind, reason, wait_s


def status_problem(response):
    """The Problem that an answer's status means, or None."""
    code = response.status_code
    said = response.headers.get("X-Error-Code", "")
    wait_s = _retry_after_s(response.headers)
    if code < 300:
        return None
    if code == 429:
        return Problem("busy", "the hub asks for fewer requests (429)", wait_s)
    if code == 408 or code >= 500:
        return Problem("busy", f"the server answers {code}", wait_s)
    if code in (401, 403):
        return Problem("denied", f"access is refused ({code}{', ' + said if said else ''})")
    if code == 404:
        missing = {
            "RepoNotFound": "there is no such dataset",
            "RevisionNotFound": "the dataset has no such revision",
            "EntryNotFound": "the dataset has no such file at this revision",
        }
        return Problem("missing", f"{missing.get(said, 'not found')} (404)")
    return Problem("missing", f"the server answers {code}")


def _retry_after_s(headers):
    """Seconds until the time that Retry-After names (a number or a date), or None."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def problem_of(error):
    """The Problem behind an exception of the clients or of the disk; other exceptions are raised again."""
    if isinstance(error, UsageError):
        raise error
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport_error = HfHubHTTPError.__bases__[
        0
    ]  # HTTPError of the HTTP library that this huggingface_hub is built on
    if isinstance(error, Problem):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return Problem("offline", "HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        return status_problem(error.response) or Problem("network", in_a_line(error))
    if isinstance(error, (transport_error, ConnectionError, TimeoutError)):
        if "Timeout" in type(error).__name__:
            return Problem("network", f"no answer within {human_time(clients.TIMEOUT_S)}")
        refused = "Connect" in type(error).__name__
        return Problem(
            "network", f"no connection ({in_a_line(error)})" if refused else "the connection broke"
        )
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return Problem(
            "disk",
            "the disk is full"
            if full
            else f"the disk refuses ({error.strerror or in_a_line(error)})",
        )
    raise error


def patiently(request, what, report, progress=lambda: 0, attempts=None):
    """request()'s result. Failures that may pass are tried again, after a pause; each kind of them is reported once.

    progress: bytes had so far. Raises Problem when attempts run out or another one cannot help."""
    failures, told = 0, set()
    while True:
        had = progress()
        try:
            return request()
        except Exception as error:  # problem_of raises again what it does not know
            problem = problem_of(error)
        failures = 1 if progress() - had >= PROGRESS_BYTES else failures + 1
        if problem.kind not in ("network", "busy"):
            raise problem
        if failures >= (attempts or ATTEMPTS):
            raise Problem(
                problem.kind,
                f"{problem.reason}, {failures} times in a row" if failures > 1 else problem.reason,
            )
        if (problem.wait_s or 0) > WAIT_MAX_S:
            raise Problem(
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
        f"{on_disk if kept else f'Nothing of its {whole} is on disk'}. {remedy(problem, file.repo)}"
    )


def remedy(problem, repo):
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
