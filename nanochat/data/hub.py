"""Public text datasets: which files a dataset has, as the Hugging Face hub lists them."""

import contextlib
import dataclasses
import errno
import fnmatch
import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from nanochat.common import UsageError, base_dir, in_a_line, sha256_hex, write_json
from nanochat.data import clients
from nanochat.data.clients import datasets_at_home
from nanochat.data.download import (
    DownloadFailed,
    Problem,
    RemoteFile,
    patiently,
    problem_of,
    remedy,
    status_problem,
)
from nanochat.data.text import COMPRESSIONS, FORMATS, text_suffix

BACKOFF_S, BACKOFF_MAX_S = (
    1.0,
    30.0,
)  # pause before the second attempt, doubled for each further one


LISTING_VERSION = 1


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
        sha = patiently(
            lambda: _commit(repo, wanted),
            repo,
            report,
            attempts=2 if _cached(spec, wanted) else None,
        )
        listing = _cached(spec, sha) or (_list_known if spec in KNOWN else _list_any)(
            spec, repo, config, split, column, sha, report
        )
    except Problem as problem:
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
            f"--data={spec}: {repo}{at}: {problem.reason}. {spelling}{remedy(problem, repo)}"
        )
    return DownloadFailed(
        f"{repo}{at} was not listed: {problem.reason}. No earlier listing of it is on disk. {remedy(problem, repo)}"
    )


def _commit(repo, revision):
    """The full sha of a revision of a dataset ("" is the newest). Raises if the dataset may not be read."""
    api = clients.load_huggingface_hub().HfApi()
    info = api.dataset_info(repo, revision=revision or None, timeout=clients.TIMEOUT_S)
    if info.gated:
        api.auth_check(
            repo, repo_type="dataset"
        )  # a gated dataset can be listed by all, only its files cannot be read
    return info.sha


def _tree(repo, sha, folder, report):
    """The files in a folder of a dataset, subfolders left out, by name. The hub lists them in pages.

    HfApi.list_repo_tree does the same without a timeout, and waits without a word when the hub asks it to."""
    hub = clients.load_huggingface_hub()
    endpoint = hub.constants.ENDPOINT
    url, files = f"{endpoint}/api/datasets/{repo}/tree/{sha}/{folder}".rstrip("/"), []
    while url:
        response = patiently(lambda: _get(hub, url), repo, report)
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
    response = hub.get_session().get(
        url, headers=hub.utils.build_hf_headers(), timeout=clients.TIMEOUT_S
    )
    problem = status_problem(response)
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
    api = clients.load_huggingface_hub().HfApi()
    wanted, found = files[split] + val_paths, {}
    for first in range(0, len(wanted), 500):
        page = wanted[first : first + 500]
        for entry in patiently(
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
    """What to raise when datasets cannot make a builder: Problem if the network failed, else UsageError."""
    cause = error
    while (
        cause is not None
    ):  # datasets turns any fault of the hub into "file not found", and keeps the fault as its cause
        with contextlib.suppress(Exception):  # problem_of raises what it does not know
            problem = problem_of(cause)
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
