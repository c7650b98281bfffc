"""Public text datasets: which files a dataset has (resolve), as the Hugging Face hub lists them.

Listings come from huggingface_hub and datasets; download.py brings the files themselves.
Under cached("hub"):
    listings/   listings, each under the revision that was asked for and under its commit
    client/     README and configuration files that datasets reads"""

import contextlib
import dataclasses
import errno
import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from nanochat.common import UsageError, cached, in_a_line, sha256_hex, write_json
from nanochat.data import clients
from nanochat.data.download import (
    DownloadFailed,
    Problem,
    RemoteFile,
    Report,
    patiently,
    problem_of,
    remedy,
    status_problem,
)
from nanochat.data.text import COMPRESSIONS, FORMATS, text_suffix

# of the files in listings/: those of another version are listed again
LISTING_VERSION = 1
# files in one request for sizes and checksums
PATHS_PER_REQUEST = 500


@dataclass(frozen=True)
class Known:
    """A dataset with a short name.

    text_bytes: of UTF-8 text in all, approximate unless it is one file. url: its page.
    In `folder` of the repository ("" is its root), files named like `train` are for training, those
    like `val` for validation; where val is "" the last training file by name is set aside."""

    what: str
    licence: str
    url: str
    text_bytes: int
    repo: str = ""
    config: str = ""
    folder: str = ""
    train: str = ""
    val: str = ""


KNOWN = {
    "climbmix": Known(
        "web text chosen and mixed for pre-training, about 400e9 tokens",
        "CC-BY-NC-4.0",
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle",
        # 6,543 shards of some 250e6 characters
        1_640_000_000_000,
        "karpathy/climbmix-400b-shuffle",
        train="shard_*.parquet",
    ),
    "fineweb-edu": Known(
        "educational web pages, about 10e9 tokens",
        "ODC-By",
        "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu",
        # at 4.7 bytes a token
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
# at a fixed commit, so that size and checksum stay right
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
    "/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Listing:
    """The files of a dataset at one revision (a commit).

    train: in the hub's order, by name. val: may be empty, then the caller holds a part out. column:
    the field with the text. note: what validation uses, one sentence."""

    spec: str
    repo: str
    config: str
    split: str
    revision: str
    column: str
    train: tuple[RemoteFile, ...]
    val: tuple[RemoteFile, ...]
    note: str


@dataclass(frozen=True)
class _Spec:
    """A value of --data, taken apart; text is the value itself, revision may be ""."""

    text: str
    repo: str
    config: str
    split: str
    column: str
    revision: str = ""


def resolve(spec: str, revision: str = "", report: Report = print) -> Listing:
    """The Listing of a --data value.

    spec: a name in KNOWN or hf:<dataset>[@revision][:<config>[:<split>[:<column>]]]. revision: a
    commit, branch or tag, instead of the newest; with a full commit that was listed before, nothing
    is requested. When the hub cannot be reached an earlier listing is used, and reported.
    Raises UsageError for what does not exist or cannot be read as text, DownloadFailed when the hub
    cannot be asked."""
    # one file whose size and checksum are known: nothing to ask
    if spec == "shakespeare":
        return _shakespeare()
    parsed = _parse(spec)
    wanted = revision or parsed.revision
    # a commit never changes, so its listing stays right; a branch or "" may have moved
    kept = _kept(spec, wanted)
    if kept and re.fullmatch("[0-9a-f]{40}", wanted):
        return kept
    try:
        # without a network, a run that can continue from what is on disk should not wait for long
        attempts = 2 if kept else None
        repo = parsed.repo
        commit = patiently(lambda: _commit(repo, wanted), repo, report, attempts=attempts)
        # the newest commit is often one that was listed before
        listing = _kept(spec, commit)
        if listing is None:
            list_files = _list_known if spec in KNOWN else _list_any
            listing = list_files(parsed, commit, report)
    except Problem as problem:
        if kept and problem.kind in ("network", "busy", "offline"):
            report(
                f"data: {parsed.repo}: {problem.reason}; using the listing of revision "
                f"{kept.revision[:12]} from this disk"
            )
            return kept
        raise _unlisted(parsed, wanted, problem) from None
    _keep(listing, wanted, report)
    return listing


def _shakespeare() -> Listing:
    file = RemoteFile(
        "", "", SHAKESPEARE_URL, SHAKESPEARE_BYTES, SHAKESPEARE_SHA256, SHAKESPEARE_SHA256
    )
    note = "validation: the last part of the one text, held out"
    return Listing("shakespeare", "", "", "train", "", "text", (file,), (), note)


def _parse(spec: str) -> _Spec:
    """The parts of a spec. UsageError if it does not name a dataset."""
    if spec in KNOWN:
        return _Spec(spec, KNOWN[spec].repo, KNOWN[spec].config, "train", "text")
    fields = spec.removeprefix("hf:").split(":")
    repo, _, revision = fields[0].partition("@")
    # huggingface_hub's own rule for names is wider only in what no repository is called
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", repo, re.ASCII)
    if not spec.startswith("hf:") or len(fields) > 4 or not is_name:
        raise UsageError(
            f"--data={spec}: not the name of a dataset; write "
            f"hf:<dataset>[@revision][:<config>[:<split>[:<column>]]], for example "
            f"hf:roneneldan/TinyStories, or one of {', '.join(KNOWN)}"
        )
    # trailing fields may be left out, and any may be empty
    config, split, column = fields[1:] + [""] * (4 - len(fields))
    return _Spec(spec, repo, config, split or "train", column or "text", revision)


def _unlisted(spec: _Spec, revision: str, problem: Problem) -> UsageError | DownloadFailed:
    """What to raise for a dataset that cannot be listed: the user's mistake, or the network's."""
    dataset = f"{spec.repo} at revision {revision}" if revision else spec.repo
    help_ = remedy(problem, spec.repo)
    if problem.kind == "denied":
        spelling = "The hub gives the same answer for names that do not exist: check the spelling."
        help_ = f"{spelling} {help_}"
    if problem.kind in ("denied", "missing"):
        return UsageError(f"--data={spec.text}: {dataset}: {problem.reason}. {help_}")
    return DownloadFailed(
        f"{dataset} was not listed: {problem.reason}. No earlier listing of it is on disk. {help_}"
    )


def _commit(repo: str, revision: str) -> str:
    """The full sha of a revision of a dataset ("" is the newest).

    Raises what problem_of() knows if the dataset may not be read."""
    api = clients.load_huggingface_hub().HfApi()
    info = api.dataset_info(repo, revision=revision or None, timeout=clients.TIMEOUT_S)
    if info.gated:
        # anybody may list a gated dataset, only its files cannot be read
        api.auth_check(repo, repo_type="dataset")
    return info.sha


def _tree(repo: str, commit: str, folder: str, report: Report) -> list[RemoteFile]:
    """The files in a folder of a dataset, subfolders left out, by name.

    HfApi.list_repo_tree does the same, but waits without a line when the hub asks it to."""
    hub = clients.load_huggingface_hub()
    endpoint = hub.constants.ENDPOINT
    url = f"{endpoint}/api/datasets/{repo}/tree/{commit}/{folder}".rstrip("/")
    files = []
    # the hub lists them in pages
    while url:
        response = patiently(_request(hub, url), repo, report)
        for entry in response.json():
            if entry["type"] == "file":
                # large files are pointers in git: the size and the name that count are in "lfs"
                lfs = entry.get("lfs") or {}
                size = lfs.get("size", entry["size"])
                digest = lfs.get("oid", "")
                etag = digest or entry["oid"]
                files.append(RemoteFile(repo, commit, entry["path"], size, digest, etag))
        url = response.links.get("next", {}).get("url", "")
        if url and not url.startswith(endpoint):
            # mirrors pass on links to the original hub, which may be out of reach
            url = f"{endpoint}{urlsplit(url).path}?{urlsplit(url).query}"
    return sorted(files, key=lambda file: file.path)


def _request(hub: ModuleType, url: str) -> Callable[[], Any]:
    """A function that gets a URL of the hub. It raises Problem."""

    def get() -> Any:
        headers = hub.utils.build_hf_headers()
        response = hub.get_session().get(url, headers=headers, timeout=clients.TIMEOUT_S)
        problem = status_problem(response)
        if problem:
            raise problem
        return response

    return get


def model_file(repo: str, path: str, report: Report = print) -> RemoteFile:
    """The RemoteFile of a file in a model repository, as it stands in the newest commit.

    Raises DownloadFailed if the hub cannot say."""
    hub = clients.load_huggingface_hub()
    url = hub.hf_hub_url(repo, path)
    try:
        found = patiently(
            lambda: hub.get_hf_file_metadata(url, timeout=clients.TIMEOUT_S), repo, report
        )
        if found.size is None:
            raise Problem("content", "the server does not say its size")
    except Problem as problem:
        raise DownloadFailed(
            f"{path} of {repo} was not downloaded: {problem.reason}. {remedy(problem, repo)}"
        ) from None
    # of a large file the hub states the SHA-256, of a small one git's blob name
    etag = found.etag or ""
    sha256 = etag if len(etag) == 64 else ""
    return RemoteFile(repo, found.commit_hash or "main", path, found.size, sha256, etag, "model")


def _list_known(spec: _Spec, commit: str, report: Report) -> Listing:
    """Listing of a dataset in KNOWN, from its folder's listing.

    This is quicker than datasets, which reads all configurations first."""
    known = KNOWN[spec.text]
    files = _tree(spec.repo, commit, known.folder, report)
    train = tuple(file for file in files if fnmatch.fnmatchcase(file.name, known.train))
    # without a validation split the last file is set aside, the same one in every run
    if known.val:
        val = tuple(file for file in files if fnmatch.fnmatchcase(file.name, known.val))
    else:
        val = train[-1:]
        train = train[:-1]
    if not train or not val:
        raise UsageError(
            f"--data={spec.text}: {spec.repo} at revision {commit[:12]} has {len(train)} files for "
            f"training and {len(val)} for validation in /{known.folder}; its files have moved: "
            f"use --data=hf:{spec.repo}:<config>"
        )
    names = f"{len(val)} files, {val[0].name} to {val[-1].name}" if len(val) > 1 else val[0].name
    if known.val:
        note = f"validation: the validation split ({names})"
    else:
        note = f"validation: the last of {len(train) + 1:,} files, {names}"
    return Listing(
        spec.text, spec.repo, spec.config, spec.split, commit, spec.column, train, val, note
    )


def _list_any(spec: _Spec, commit: str, report: Report) -> Listing:
    """Listing of any dataset.

    Which files make which split is what datasets says; their sizes and checksums, what the hub
    says."""
    config, files, features = _splits(spec, commit, report)
    if spec.split not in files:
        raise UsageError(
            f"--data={spec.text}: {spec.repo} has no split '{spec.split}'; it has: "
            f"{', '.join(files)}. Write hf:{spec.repo}:{spec.config}:<split>"
        )
    if features and spec.column not in features:
        raise UsageError(
            f"--data={spec.text}: {spec.repo} has no column '{spec.column}'; it has: "
            f"{', '.join(features)}. Write hf:{spec.repo}:{spec.config}:{spec.split}:<column>"
        )
    train_paths = files[spec.split]
    # the names that datasets use for it, the best first
    candidates = ("validation", "valid", "test")
    val_split = next((name for name in candidates if name in files and name != spec.split), "")
    # some datasets name one file in several splits
    val_paths = [path for path in files.get(val_split, []) if path not in train_paths]
    found = _described(spec, commit, train_paths + val_paths, report)
    note = "validation: held out of the training files (there is no split for it)"
    if val_paths:
        note = f"validation: the split '{val_split}'"
    return Listing(
        spec.text,
        spec.repo,
        config,
        spec.split,
        commit,
        spec.column,
        tuple(found[path] for path in train_paths),
        tuple(found[path] for path in val_paths),
        note,
    )


def _splits(
    spec: _Spec, commit: str, report: Report
) -> tuple[str, dict[str, list[str]], list[str]]:
    """(configuration, {split: paths in the repository}, names of the columns) of a dataset.

    The names may be unknown: then the list is empty."""
    folder = clients.lockable_folder()
    with (
        clients.quiet_datasets("--data=hf:...", folder) as datasets,
        clients.warnings_reported(spec.repo, report),
    ):
        # an address, so that a local folder of the same name is not taken instead
        address = f"hf://datasets/{spec.repo}"
        try:
            builder = datasets.load_dataset_builder(
                address, spec.config or None, revision=commit, cache_dir=folder
            )
        except Exception as error:
            # any exception: the library reads files that strangers wrote
            raise _unreadable(spec, commit, error, datasets) from None
    files = {
        name: _paths(spec, commit, urls) for name, urls in (builder.config.data_files or {}).items()
    }
    return builder.config.name, files, list(builder.info.features or [])


def _paths(spec: _Spec, commit: str, urls: Iterable[Any]) -> list[str]:
    """The sorted paths in the repository of a split's files.

    Raises UsageError for files that are not in it, or not text."""
    paths = [str(url).removeprefix(f"hf://datasets/{spec.repo}@{commit}/") for url in urls]
    for path in paths:
        if "://" in path:
            raise UsageError(
                f"--data={spec.text}: {spec.repo} keeps its data elsewhere ({path}), where size "
                f"and content cannot be checked; download it and name the files with --data=<path>"
            )
        if not text_suffix(path):
            raise UsageError(
                f"--data={spec.text}: {path} is not a text format that can be read "
                f"({', '.join(FORMATS)}, plain or compressed as {', '.join(COMPRESSIONS[1:])}); "
                f"choose another config or dataset"
            )
    # sorted, since the order of the shards decides what a seed reads, on every machine
    return sorted(set(paths))


def _described(spec: _Spec, commit: str, paths: list[str], report: Report) -> dict[str, RemoteFile]:
    """{path: RemoteFile} with the sizes and checksums that the hub states."""
    api = clients.load_huggingface_hub().HfApi()
    found = {}
    # the hub limits what one request may ask for
    for first in range(0, len(paths), PATHS_PER_REQUEST):
        page = paths[first : first + PATHS_PER_REQUEST]
        entries = patiently(
            lambda page=page: api.get_paths_info(
                spec.repo, page, revision=commit, repo_type="dataset"
            ),
            spec.repo,
            report,
        )
        for entry in entries:
            size = entry.lfs.size if entry.lfs else entry.size
            digest = entry.lfs.sha256 if entry.lfs else ""
            etag = digest or entry.blob_id
            found[entry.path] = RemoteFile(spec.repo, commit, entry.path, size, digest, etag)
    missing = [path for path in paths if path not in found]
    if missing:
        raise UsageError(
            f"--data={spec.text}: {spec.repo} at revision {commit[:12]} lacks a file that it "
            f"names, {missing[0]}; try another revision: hf:{spec.repo}@<revision>"
        )
    return found


def _unreadable(
    spec: _Spec, commit: str, error: Exception, datasets: ModuleType
) -> Problem | UsageError:
    """What to raise when datasets cannot read a repository: Problem if the network failed."""
    problem = _problem_behind(error)
    if problem:
        return problem
    said = in_a_line(error)
    # a script is code of strangers, which datasets refuses to run
    if "scripts are no longer supported" in said:
        return UsageError(
            f"--data={spec.text}: a script makes {spec.repo}, and it is not run; the hub keeps a "
            f"converted copy of many such datasets: try hf:{spec.repo}@refs/convert/parquet"
        )
    if isinstance(error, ValueError):
        with contextlib.suppress(Exception):
            address = f"hf://datasets/{spec.repo}"
            names = datasets.get_dataset_config_names(address, revision=commit)
            if spec.config not in names:
                lacks = "has several configs and no default"
                if spec.config:
                    lacks = f"has no config '{spec.config}'"
                return UsageError(
                    f"--data={spec.text}: {spec.repo} {lacks}; it has: {', '.join(names)}. "
                    f"Write hf:{spec.repo}:<config>"
                )
    return UsageError(
        f"--data={spec.text}: the package datasets finds no text in {spec.repo} ({said}); see what "
        f"it holds at https://huggingface.co/datasets/{spec.repo}/tree/{commit[:12]}, and name "
        f"files on this disk with --data=<path>"
    )


def _problem_behind(error: BaseException | None) -> Problem | None:
    """The fault of the network or of the disk that an exception of datasets hides, if any.

    datasets turns any fault of the hub into "file not found", and keeps the fault as its cause."""
    while error is not None:
        # problem_of() raises again what it does not know
        with contextlib.suppress(Exception):
            problem = problem_of(error)
            if problem.kind in ("network", "busy", "offline", "denied"):
                return problem
            disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
            if problem.kind == "disk" and error.errno in disk:
                return problem
        error = error.__cause__ or error.__context__
    return None


# --------------------------------------------------------------------------------------------------
# kept listings


def _listing_path(spec: str, revision: str) -> Path:
    # hashed, since a spec holds colons and slashes
    name = sha256_hex(json.dumps([spec, revision]))[:32]
    return cached("hub", "listings", f"{name}.json")


def _keep(listing: Listing, wanted: str, report: Report) -> None:
    """Write a listing, where it is new, under its commit and under the revision asked for."""
    # under the commit for resumed runs, under the name for a start without a network
    for revision in dict.fromkeys((listing.revision, wanted)):
        path = _listing_path(listing.spec, revision)
        if _kept(listing.spec, revision) == listing:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"version": LISTING_VERSION, **dataclasses.asdict(listing)})
        except OSError as error:
            # all files may be on disk already: a read-only folder is enough then
            report(
                f"data: {listing.repo}: the listing cannot be kept in {path.parent} "
                f"({error.strerror}); resuming will need the network"
            )
            return


def _kept(spec: str, revision: str) -> Listing | None:
    """The listing that _keep() wrote, or None if there is none or it cannot be read."""
    try:
        value = json.loads(_listing_path(spec, revision).read_text(encoding="utf-8"))
        if value.pop("version") != LISTING_VERSION:
            return None
        train = tuple(RemoteFile(**file) for file in value.pop("train"))
        val = tuple(RemoteFile(**file) for file in value.pop("val"))
        return Listing(**value, train=train, val=val)
    # a damaged listing is no fault to report: the hub is asked again
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
