"""`nanochat data inspect`: what a data set is, and how much of it is on this disk."""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.apps.data import EXAMPLES
from nanochat.common import EXIT_COMPLETED, base_dir, ceil_div, counted, human_bytes
from nanochat.data.files import MIX_SUMMARY
from nanochat.data.hub import KNOWN, resolve
from nanochat.data.sources import (
    Corpus,
    Shard,
    is_remote,
    open_corpus,
    remarks,
    with_offline_advice,
)

# documents are measured from the beginnings of so many shards
SAMPLE_SHARDS = 8
SAMPLE_DOCUMENTS = 2000
# _lengths() fills the fields p5_bytes to p95_bytes of Lengths by position, so the two change
# together
PERCENTILES = (5, 25, 50, 75, 95)
EXAMPLE_LINES = 3
EXAMPLE_WIDTH = 100
# a single remote file up to this size is downloaded to describe it
SMALL_FILE_BYTES = 8 << 20


@dataclass(frozen=True)
class Origin:
    """What is known of a data set by its name; None where it is not."""

    what: str | None = None
    licence: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Side:
    """The training or the validation shards.

    text_bytes: an estimate where files are on the network. files_here: those on this disk.
    file_bytes, file_bytes_here: sizes of files that come from the network, else None."""

    shards: int
    text_bytes: int
    text_bytes_estimated: bool
    files: int
    files_here: int
    file_bytes: int | None
    file_bytes_here: int | None


@dataclass(frozen=True)
class Lengths:
    """Sizes of sampled documents, in bytes of UTF-8."""

    sampled: int
    from_shards: int
    mean_bytes: float
    p5_bytes: int
    p25_bytes: int
    p50_bytes: int
    p75_bytes: int
    p95_bytes: int
    max_bytes: int


@dataclass(frozen=True)
class MixedSource:
    """A source of a folder that `mix` wrote. share: of the bytes to train on."""

    source: str
    share: float
    licence: str | None
    fingerprint: str


@dataclass(frozen=True)
class Facts:
    """A data set, as `inspect --json` prints it.

    documents: None where no text is on this disk, with the reason. examples: first lines of some
    documents. sources: of a folder that `mix` wrote. base_dir: of downloads, None for local
    data."""

    data: str
    what: str | None
    licence: str | None
    url: str | None
    revision: str
    held_out: str
    remarks: list[str]
    fingerprint: str
    train: Side
    val: Side
    tokenized_before_training: bool
    sources: list[MixedSource] | None
    documents: Lengths | None
    reason: str
    examples: list[list[str]]
    base_dir: str | None


def run_inspect(data: str, val_data: str, *, documents: int | None, as_json: bool) -> int:
    """Print the Facts of a data set, as lines or as JSON.

    documents: how many to show; a file is downloaded for them if none is here. None: EXAMPLES, if
    text is here."""
    # downloads report lines, which are not JSON
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        found = facts(data, val_data, documents)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print("\n".join(_lines(found)))
    return EXIT_COMPLETED


def facts(data: str, val_data: str, documents: int | None) -> Facts:
    """The Facts of a data set. Arguments as of run_inspect(); raises UsageError, DownloadFailed."""
    fetch = bool(documents)
    # to look is not to download: only --documents asks for text
    corpus = _listed_corpus(data, val_data, fetch)
    shards = _sampled_shards(corpus, fetch)
    n_examples = EXAMPLES if documents is None else documents
    sizes, examples = _sampled_documents(shards, n_examples)
    known = origin_of(data)
    reason = "its text is not on this disk; --documents N downloads a file of it to look into"
    return Facts(
        data=data,
        what=known.what,
        licence=known.licence,
        url=known.url,
        revision=corpus.revision,
        held_out=corpus.note,
        remarks=remarks(corpus),
        fingerprint=corpus.fingerprint,
        train=_side(corpus.train),
        val=_side(corpus.val),
        tokenized_before_training=corpus.eager,
        sources=_mixed_from(data),
        documents=_lengths(sizes, len(shards)) if sizes else None,
        reason="" if sizes else reason,
        examples=examples,
        base_dir=str(base_dir()) if is_remote(data) else None,
    )


def _listed_corpus(data: str, val_data: str, fetch: bool) -> Corpus:
    """open_corpus(), but without fetch no single large file is downloaded to split it.

    Then the validation side is empty."""
    if is_remote(data) and not fetch and not val_data:
        with with_offline_advice():
            listing = resolve(data)
        # splitting a single file needs its documents, and so the file
        if len(listing.train) == 1 and not listing.val:
            file = listing.train[0]
            if not file.is_local() and file.n_bytes > SMALL_FILE_BYTES:
                shard = Shard(
                    file.name, (file,), file.fingerprint, file.n_bytes, column=listing.column
                )
                # as split_file() will word it once the file is here
                note = "the last tenth of the one file will be held out"
                return Corpus(data, [shard], [], note, listing.revision)
    return open_corpus(data, val_data)


def _sampled_shards(corpus: Corpus, fetch: bool) -> list[Shard]:
    """Training shards, evenly spread, whose text is on this disk.

    If there is none, the first, if it may be downloaded."""
    # a local shard has no remote files, and so counts as here
    here = [
        shard for shard in corpus.train if all(file.is_local() for file in shard.remote_files())
    ]
    if here:
        # rounded up, so that at most SAMPLE_SHARDS are taken
        return here[:: ceil_div(len(here), SAMPLE_SHARDS)]
    return corpus.train[:1] if fetch else []


def _sampled_documents(shards: list[Shard], n_examples: int) -> tuple[list[int], list[list[str]]]:
    """(sizes in bytes, first lines of the first n_examples) of the first documents of shards."""
    sizes = []
    examples = []
    for shard in shards:
        # the beginnings of several shards, since neighbours are alike
        n = max(n_examples, SAMPLE_DOCUMENTS // len(shards))
        for document in itertools.islice(shard.documents(), n):
            sizes.append(len(document.encode("utf-8")))
            if len(examples) < n_examples:
                examples.append(_beginning(document))
    return sizes, examples


def _mixed_from(folder: str) -> list[MixedSource] | None:
    """The sources of a folder that `mix` wrote; None for any other data."""
    try:
        # anything may be called so: what does not look like ours is passed over
        found = json.loads((Path(folder) / MIX_SUMMARY).read_text(encoding="utf-8"))
        return [
            MixedSource(source["source"], source["share"], source["licence"], source["fingerprint"])
            for source in found["sources"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def origin_of(data: str) -> Origin:
    """What is known of a value of --data by its name."""
    if data in KNOWN:
        return Origin(KNOWN[data].what, KNOWN[data].licence, KNOWN[data].url)
    if data == "python":
        what = "Python source on this machine: the standard library and torch"
        return Origin(what, "PSF-2.0 and BSD-3-Clause")
    if data.startswith("hf:"):
        repo = data.removeprefix("hf:").split(":")[0].split("@")[0]
        # anybody may publish under any name, so only the page can say what it is and under which
        # licence
        return Origin(url=f"https://huggingface.co/datasets/{repo}")
    return Origin()


def _side(shards: list[Shard]) -> Side:
    remote = [file for shard in shards for file in shard.remote_files()]
    text_bytes = sum(shard.n_bytes for shard in shards)
    # of local data every file is here, and text is measured rather than estimated
    if not remote:
        n_files = sum(len(shard.files) for shard in shards)
        return Side(
            shards=len(shards),
            text_bytes=text_bytes,
            text_bytes_estimated=False,
            files=n_files,
            files_here=n_files,
            file_bytes=None,
            file_bytes_here=None,
        )
    here = [file for file in remote if file.is_local()]
    return Side(
        shards=len(shards),
        text_bytes=text_bytes,
        # the hub lists the sizes of the files, most of which are compressed
        text_bytes_estimated=True,
        files=len(remote),
        files_here=len(here),
        file_bytes=sum(file.n_bytes for file in remote),
        file_bytes_here=sum(file.n_bytes for file in here),
    )


def _lengths(sizes: list[int], n_shards: int) -> Lengths:
    import numpy as np

    percentiles = [round(float(value)) for value in np.percentile(sizes, PERCENTILES)]
    mean = round(sum(sizes) / len(sizes), 1)
    return Lengths(len(sizes), n_shards, mean, *percentiles, max(sizes))


def _beginning(document: str) -> list[str]:
    """The first lines of a document that are not blank, cut to a width."""
    # blank lines would use up what little is shown
    lines = [line.rstrip() for line in document.split("\n") if line.strip()]
    return [
        line if len(line) <= EXAMPLE_WIDTH else line[: EXAMPLE_WIDTH - 4] + " ..."
        for line in lines[:EXAMPLE_LINES]
    ]


# --------------------------------------------------------------------------------------------------
# as text


def _lines(found: Facts) -> Iterator[str]:
    """Facts as lines of text: a label of 13 characters, and what it labels."""
    what = f": {found.what}" if found.what else ""
    yield f"data          {found.data}{what}"
    if found.licence or found.url:
        url = f"; {found.url}" if found.url else ""
        yield f"licence       {found.licence or 'see the page'}{url}"
    if found.revision:
        yield f"revision      {found.revision}"
    yield f"fingerprint   {found.fingerprint}"
    yield f"to train on   {_side_line(found.train)}"
    yield f"to validate   {_side_line(found.val)}"
    for line in [found.held_out, *found.remarks]:
        yield f"              {line}"
    if found.tokenized_before_training:
        yield "tokenized     whole, before training"
    else:
        yield "tokenized     shard by shard, as training needs it"
    if found.base_dir:
        yield f"downloads     {found.base_dir}"
    for source in found.sources or []:
        licence = source.licence or "licence not known"
        yield f"mixed from    {source.source}: {source.share:.1%} of the bytes, {licence}"
    yield f"documents     {_lengths_line(found.documents) if found.documents else found.reason}"
    for number, lines in enumerate(found.examples, 1):
        labels = [f"document {number}"] + [""] * (len(lines) - 1)
        for label, line in zip(labels, lines, strict=True):
            yield f"{label:<13} {line}"


def _side_line(side: Side) -> str:
    shards = counted(side.shards, "shard")
    # local text: there is nothing to download, so the sizes of files would say nothing new
    if side.file_bytes is None:
        files = counted(side.files, "file")
        return f"{_text_size(side)} of text in {shards}, {files} on this disk"
    sizes = f"{human_bytes(side.file_bytes_here)} of {human_bytes(side.file_bytes)}"
    here = f"{side.files_here:,} of {counted(side.files, 'file')} here ({sizes})"
    return f"{_text_size(side)} of text in {shards}; {here}"


def _text_size(side: Side) -> str:
    if side.text_bytes_estimated:
        return f"about {human_bytes(side.text_bytes)}"
    return f"{side.text_bytes:,} bytes"


def _lengths_line(lengths: Lengths) -> str:
    sample = f"{lengths.sampled:,} from {counted(lengths.from_shards, 'shard')}"
    percentiles = ", ".join(f"{p}% {getattr(lengths, f'p{p}_bytes'):,}" for p in PERCENTILES)
    return (
        f"bytes in a sample of {sample}: mean {lengths.mean_bytes:,.0f}, {percentiles}, longest "
        f"{lengths.max_bytes:,}"
    )
