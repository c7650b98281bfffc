"""One remote file on this disk, complete and verified (RemoteFile.fetch).

Files of the Hugging Face hub are transferred by huggingface_hub, with its retries, its address
(HF_ENDPOINT), its token (HF_TOKEN) and its offline switch (HF_HUB_OFFLINE); a file at a plain URL
by one GET of its session. Neither compares SHA-256, so that is done here. On each fault:

    connection breaks, no answer    retried by huggingface_hub, then DownloadFailed
    429, 500 and above              retried, as long as the server asks for; then DownloadFailed
    401, 403, 404                   DownloadFailed immediately
    size or SHA-256 is wrong        deleted and downloaded once more, then DownloadFailed
    disk full                       DownloadFailed; with too little room before the first request
    process killed                  the part is deleted by the next attempt, which starts over
    no file locks                   two processes may download the same file, each for itself

Everything is written under cached("hub"):
    <repo>/<name>.<fingerprint>.<suffix>   complete and verified, or absent
    <repo>/... .incomplete                 folder of a download that is under way, or was killed
    <repo>/... .lock                       held by the process that downloads"""

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from nanochat import locks
from nanochat.common import (
    Report,
    Unavailable,
    UsageError,
    apply_umask,
    base_dir,
    cached,
    fsync_dir,
    human_bytes,
    human_time,
    in_a_line,
    sha256_file,
    sha256_hex,
)
from nanochat.data import clients
from nanochat.data.text import text_suffix

# requests for one thing, the first included
ATTEMPTS = 6
# downloads of a file of the hub, within which huggingface_hub has retried already
HUB_ATTEMPTS = 2
# pause before the second attempt, doubled for each further one
BACKOFF_S = 1.0
BACKOFF_MAX_S = 30.0
# longest pause that a server may ask for (Retry-After): beyond it the request fails immediately
WAIT_MAX_S = 300.0
# how often a long download reports how far it is
REPORT_S = 30.0

T = TypeVar("T")


class DownloadFailed(Unavailable):
    """A listing or a file is unavailable. The message says what, why, and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository at a fixed commit, or, where repo and revision are "", at a URL.

    path: in the repository, or the URL. n_bytes: size as the hub lists it. sha256: of the content
    where the hub states it, else "". etag: the hub's name for the content (of small files git's
    blob SHA-1). repo_type: "dataset" or "model"."""

    repo: str
    revision: str
    path: str
    n_bytes: int
    sha256: str
    etag: str
    repo_type: str = "dataset"

    @property
    def name(self) -> str:
        """The file's own name, without folders."""
        path = self.path if self.repo else urlsplit(self.path).path
        return path.rpartition("/")[2]

    @property
    def origin(self) -> str:
        """The repository or the server that the file comes from."""
        return self.repo or urlsplit(self.path).netloc

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what identifies the content.

        The revision does not enter, so commits that change other files change nothing here."""
        # stored runs and caches refer to it: neither the list nor its order may change
        identity = [self.repo, self.path, self.n_bytes, self.sha256 or self.etag]
        return sha256_hex(json.dumps(identity))

    def local_path(self) -> Path:
        """Where the file is or will be; other versions of it have other names."""
        suffix = text_suffix(self.name) or Path(self.name).suffix
        # the suffix says how the file is read, so it stays at the end
        stem = self.name.removesuffix(suffix)[:100]
        folder = _safe_name(self.origin.replace("/", "--"))
        return cached("hub", folder, _safe_name(f"{stem}.{self.fingerprint[:12]}{suffix}"))

    def is_local(self) -> bool:
        """Whether the file is complete on disk: it gets its name after its content is verified."""
        path = self.local_path()
        # not hashed again: that would read every shard of the data at every start
        return path.is_file() and path.stat().st_size == self.n_bytes

    def fetch(self, report: Report = print) -> Path:
        """Download the file unless it is on disk, verify size and SHA-256, and return its path.

        report: gets one line on each fault, and one every REPORT_S seconds. One process downloads,
        others wait for it. Raises DownloadFailed."""
        path = self.local_path()
        if self.is_local():
            return path
        lock_path = path.with_name(path.name + ".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.open_lock(lock_path)
        except OSError as error:
            problem = Problem("disk", f"{path.parent} cannot be written ({error.strerror})")
            raise _failed(self, problem) from None
        with lock:
            locked = wait_for(lock, self.name, path.parent, report)
            if not self.is_local():
                _download(self, path, locked, report)
            # whoever waits for it finds the file complete, so a second lock does no harm; another
            # user's may have to stay
            with contextlib.suppress(OSError):
                lock_path.unlink()
        return path


def _safe_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)


def wait_for(lock: BinaryIO, name: str, folder: Path, report: Report) -> bool:
    """Take the lock (an open file in `folder`) of the download of `name`; False if there are none.

    Reports a line if another process holds it, or if the file system has no locks."""
    state = locks.take(lock, folder, report=report)
    if state is locks.Lock.HELD_ELSEWHERE:
        report(f"data: another process is downloading {name}; waiting for it")
        state = locks.take(lock, folder, wait=True, report=report)
    return state is locks.Lock.TAKEN


def _download(file: RemoteFile, path: Path, locked: bool, report: Report) -> None:
    """Bring a file to its final name. Raises DownloadFailed.

    locked: the caller holds its lock; otherwise other processes may do the same meanwhile."""
    if locked:
        for abandoned in path.parent.glob(f"{path.name}*.incomplete"):
            _delete(abandoned)
    folder = path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")
    try:
        try:
            content = _verified(file, folder, locked, report)
        except Problem as problem:
            if problem.kind != "content":
                raise
            report(f"data: {file.name}: {problem.reason}; deleted, downloading it once more")
            content = _verified(file, folder, locked, report)
        # the final name stands for verified content, so the content has to be on the disk before it
        with content.open("rb") as f:
            os.fsync(f.fileno())
        apply_umask(content)
        content.replace(path)
        fsync_dir(path.parent)
    except Problem as problem:
        raise _failed(file, problem) from None
    except OSError as error:
        raise _failed(file, problem_of(error)) from None
    finally:
        _delete(folder)


def _verified(file: RemoteFile, folder: Path, locked: bool, report: Report) -> Path:
    """Path, in a folder that is emptied first, of a downloaded and verified file."""
    _delete(folder)
    folder.mkdir()
    # huggingface_hub only warns of a disk that is too small
    free = shutil.disk_usage(folder).free
    if free < file.n_bytes:
        reason = (
            f"{human_bytes(file.n_bytes)} are missing and {human_bytes(free)} are free "
            f"in {folder.parent}"
        )
        raise Problem("disk", reason)
    if file.repo:
        patiently(lambda: _ask_hub(file), file.name, report)
    if file.repo and locked:
        content = patiently(
            lambda: _from_hub(file, folder, report),
            file.name,
            report,
            attempts=HUB_ATTEMPTS,
            retried=("busy",),
        )
    else:
        content = patiently(lambda: _from_url(file, folder, report), file.name, report)
    _verify(file, content)
    return content


def _delete(path: Path) -> None:
    """Delete what a download has left: a folder, or the file that earlier versions kept."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # another user's may have to stay
        with contextlib.suppress(OSError):
            path.unlink()


class _Progress:
    """Bytes received of a file; reports them every REPORT_S seconds."""

    def __init__(self, file: RemoteFile, report: Report) -> None:
        self.file = file
        self.report = report
        self.received = 0
        self.reported_at = time.monotonic()

    def set(self, received: int) -> None:
        self.received = max(self.received, received)
        if time.monotonic() - self.reported_at > REPORT_S:
            self.reported_at = time.monotonic()
            of_all = f"{human_bytes(self.received)} of {human_bytes(self.file.n_bytes)}"
            self.report(f"data: {self.file.name}: {of_all}")


def _hidden_bar(progress: _Progress) -> type:
    """A class of progress bars, as huggingface_hub takes it, that draws nothing.

    A transfer may have two bars, of bytes received and of bytes written."""
    from tqdm import tqdm

    class HiddenBar(tqdm):
        # or each class would start a thread that watches its bars
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.counted = self.n or 0

        def update(self, n: float = 1) -> None:
            # tqdm itself counts nothing while it is disabled
            self.counted += n
            progress.set(int(self.counted))

    return HiddenBar


def _ask_hub(file: RemoteFile) -> None:
    """Ask the hub for a file's headers. Raises Problem, or what problem_of() knows.

    huggingface_hub asks for them too, but would wait as long as the server likes."""
    hub = clients.load_huggingface_hub()
    found = hub.get_hf_file_metadata(_hub_url(hub, file), timeout=clients.TIMEOUT_S)
    if found.size not in (None, file.n_bytes):
        raise _wrong_size(file, found.size)


def _hub_url(hub: ModuleType, file: RemoteFile) -> str:
    return hub.hf_hub_url(file.repo, file.path, repo_type=file.repo_type, revision=file.revision)


def _from_hub(file: RemoteFile, folder: Path, report: Report) -> Path:
    """Path of a file of the hub, transferred by huggingface_hub into a folder. Raises as above."""
    hub = clients.load_huggingface_hub()
    with clients.warnings_reported(file.name, report):
        try:
            path = hub.hf_hub_download(
                file.repo,
                file.path,
                repo_type=file.repo_type,
                revision=file.revision,
                local_dir=folder,
                cache_dir=clients.client_folder(),
                tqdm_class=_hidden_bar(_Progress(file, report)),
            )
        except RuntimeError as error:
            # how hf_xet, its transfer of large files, reports any fault of the network
            raise Problem("busy", f"the transfer failed ({in_a_line(error)})") from None
    return Path(path)


def _from_url(file: RemoteFile, folder: Path, report: Report) -> Path:
    """Path of a file, requested once by its URL, in a folder. Raises as _from_hub().

    For files outside the hub, and for those of the hub where there are no file locks: then
    huggingface_hub, which locks whatever it writes, refuses to transfer them."""
    hub = clients.load_huggingface_hub()
    # without compression, so that Content-Length counts bytes of the file
    headers = {"Accept-Encoding": "identity"}
    url = file.path
    # the token is meant for the hub alone
    if file.repo:
        url = _hub_url(hub, file)
        headers |= hub.utils.build_hf_headers()
    path = folder / "content"
    progress = _Progress(file, report)
    with hub.get_session().stream(
        "GET", url, headers=headers, timeout=clients.TIMEOUT_S, follow_redirects=True
    ) as response:
        problem = status_problem(response)
        if problem:
            raise problem
        received = 0
        with path.open("wb") as f:
            for piece in response.iter_bytes():
                received += len(piece)
                # a server that sends without end would fill the disk
                if received > file.n_bytes:
                    raise _wrong_size(file, received)
                f.write(piece)
                progress.set(received)
    return path


def content_length(url: str, report: Report = print) -> int:
    """Bytes of the file at a URL outside the hub, as its server says. Raises DownloadFailed."""

    def ask() -> int:
        session = clients.load_huggingface_hub().get_session()
        response = session.head(
            url,
            headers={"Accept-Encoding": "identity"},
            timeout=clients.TIMEOUT_S,
            follow_redirects=True,
        )
        problem = status_problem(response)
        if problem:
            raise problem
        length = response.headers.get("Content-Length", "")
        if not length.isdigit():
            raise Problem("missing", "the server does not say how large it is")
        return int(length)

    parts = urlsplit(url)
    name = parts.path.rpartition("/")[2]
    try:
        return patiently(ask, name, report)
    except Problem as problem:
        raise DownloadFailed(
            f"{name} of {parts.netloc} was not downloaded: {problem.reason}. {remedy(problem, '')}"
        ) from None


def _verify(file: RemoteFile, path: Path) -> None:
    """Compare a file's size and content with the listed ones. Raises Problem "content"."""
    if path.stat().st_size != file.n_bytes:
        raise _wrong_size(file, path.stat().st_size)
    if file.sha256:
        found = sha256_file(path)
        stated = file.sha256
    elif re.fullmatch("[0-9a-f]{40}", file.etag):
        # files without a SHA-256 are plain git blobs, at most 19 MB
        content = path.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        # git's own hash; the argument allows it where insecure hashes are blocked
        found = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
        stated = file.etag
    else:
        return
    if found != stated:
        checksums = f"checksum {found[:12]}, the hub states {stated[:12]}"
        raise Problem("content", f"its content is damaged ({checksums})")


def _wrong_size(file: RemoteFile, n_bytes: int) -> "Problem":
    return Problem(
        "content", f"the server's file has {n_bytes:,} bytes where {file.n_bytes:,} are listed"
    )


# --------------------------------------------------------------------------------------------------
# faults


class Problem(Exception):
    """Why a request failed.

    kind: network or busy (another attempt may help), offline, denied, missing, content or disk.
    wait_s: seconds that the server asks to wait, or None."""

    def __init__(self, kind: str, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.wait_s = wait_s


def status_problem(response: Any) -> Problem | None:
    """The Problem that the status of an answer means, or None."""
    code = response.status_code
    hub_code = response.headers.get("X-Error-Code", "")
    if code < 300:
        return None
    if code == 429:
        reason = "the hub asks for fewer requests (429)"
        return Problem("busy", reason, _retry_after_s(response.headers))
    if code == 408 or code >= 500:
        return Problem("busy", f"the server answers {code}", _retry_after_s(response.headers))
    if code in (401, 403):
        codes = f"{code}, {hub_code}" if hub_code else str(code)
        return Problem("denied", f"access is refused ({codes})")
    # the hub says in a header of its own what it has not found
    if code == 404:
        missing = {
            "RepoNotFound": "there is no such dataset",
            "RevisionNotFound": "the dataset has no such revision",
            "EntryNotFound": "the dataset has no such file at this revision",
        }
        return Problem("missing", f"{missing.get(hub_code, 'not found')} (404)")
    return Problem("missing", f"the server answers {code}")


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until the time that Retry-After names (a number or a date), or None."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def problem_of(error: Exception) -> Problem:
    """The Problem behind an exception of the clients or of the disk; raises any other again."""
    if isinstance(error, UsageError):
        raise error
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # "not on disk either", which hides why the hub could not be asked
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, Problem):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return Problem("offline", "HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        return status_problem(error.response) or Problem("network", in_a_line(error))
    # HTTPError of the HTTP library that this huggingface_hub is built on
    transport_error = HfHubHTTPError.__bases__[0]
    if isinstance(error, (transport_error, ConnectionError, TimeoutError)):
        return _connection_problem(error)
    if isinstance(error, OSError):
        return _os_problem(error)
    raise error


def _connection_problem(error: Exception) -> Problem:
    kind = type(error).__name__
    # by name: the library that huggingface_hub is built on has changed, its names have not
    if "Timeout" in kind:
        return Problem("network", "the server did not answer in time")
    if "Connect" in kind:
        return Problem("network", f"no connection ({in_a_line(error)})")
    return Problem("network", "the connection broke")


def _os_problem(error: OSError) -> Problem:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Problem("disk", "the disk is full")
    if error.errno is None:
        # not of the operating system: huggingface_hub found a size or an answer that is wrong,
        # and says in brackets at which address
        return Problem("content", in_a_line(error).partition(" (")[0])
    return Problem("disk", f"the disk refuses ({error.strerror or in_a_line(error)})")


def patiently(
    request: Callable[[], T],
    what: str,
    report: Report,
    *,
    attempts: int | None = None,
    retried: tuple[str, ...] = ("network", "busy"),
) -> T:
    """request()'s result; faults that may pass are retried after a pause.

    what: names the request in the lines that are reported, one for each kind of fault. attempts:
    ATTEMPTS by default. retried: kinds of Problem for which another attempt may help.
    Raises Problem when attempts run out or another one cannot help."""
    attempts = attempts or ATTEMPTS
    failures = 0
    reported: set[str] = set()
    while True:
        try:
            return request()
        except Exception as error:
            # raises again what it does not know
            problem = problem_of(error)
        failures += 1
        if problem.kind not in retried:
            raise problem
        if failures >= attempts:
            times = f", {failures} times in a row" if failures > 1 else ""
            raise Problem(problem.kind, f"{problem.reason}{times}")
        # a server that names a time knows better
        pause_s = problem.wait_s
        if pause_s is None:
            pause_s = min(BACKOFF_MAX_S, BACKOFF_S * 2 ** (failures - 1))
        if pause_s > WAIT_MAX_S:
            wait = human_time(pause_s)
            raise Problem(problem.kind, f"{problem.reason} and to wait for {wait}")
        # one line for each kind: a server that is down would fill the log
        if problem.kind not in reported:
            reported.add(problem.kind)
            report(f"data: {what}: {problem.reason}; trying again in {human_time(pause_s)}")
        time.sleep(pause_s)


def _failed(file: RemoteFile, problem: Problem) -> DownloadFailed:
    """The DownloadFailed for a file: what happened, and what helps."""
    return DownloadFailed(
        f"{file.name} of {file.origin} ({human_bytes(file.n_bytes)}) was not downloaded: "
        f"{problem.reason}. {remedy(problem, file.repo)}"
    )


def remedy(problem: Problem, repo: str) -> str:
    """What the user can do about a problem, as a sentence. repo: "" for a plain URL."""
    # of a mirror, if HF_ENDPOINT names one
    endpoint = "huggingface.co"
    with contextlib.suppress(ImportError):
        import huggingface_hub.constants

        endpoint = huggingface_hub.constants.ENDPOINT
    damaged = "The server's copy, or a proxy on the way, is damaged: start again later"
    if repo:
        terms = f"{endpoint}/datasets/{repo}"
        sentences = {
            "network": f"Check the network and HF_ENDPOINT (now {endpoint}), then start again.",
            "busy": "Start again later; HF_TOKEN raises the hub's limits.",
            "missing": "Check the name and the revision: the dataset may have changed or moved.",
            "content": f"{damaged}, or name another server in HF_ENDPOINT.",
            "denied": f"If the dataset is private or gated, set HF_TOKEN to a token that may read "
            f"it (accept its terms at {terms} first, where it has any).",
        }
    else:
        by_hand = "download it by hand, and give its path instead"
        sentences = {
            "network": "Check the network, then start again.",
            "busy": "Start again later.",
            "missing": f"The file may have moved: {by_hand}.",
            "content": f"{damaged}.",
            "denied": f"The server wants a login: {by_hand}.",
        }
    sentences["offline"] = (
        "Unset HF_HUB_OFFLINE, or run once with it unset while there is a network."
    )
    sentences["disk"] = (
        f"Make room and see that {base_dir()} can be written, or set NANOCHAT_BASE_DIR to a folder "
        f"on a larger disk."
    )
    return sentences[problem.kind]
