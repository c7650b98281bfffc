"""`nanochat data mix`: a folder of documents drawn from several data sets, in given shares."""

import importlib.util
import itertools
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanochat.apps.data.inspection import origin_of
from nanochat.apps.data.words import say
from nanochat.common import (
    EXIT_COMPLETED,
    UsageError,
    ceil_div,
    counted,
    human_bytes,
    new_folder,
    stream_seed,
    write_json,
)
from nanochat.data.download import RemoteFile
from nanochat.data.files import MIX_SUMMARY
from nanochat.data.sources import Corpus, Shard, open_corpus

# rows of a row group of parquet, which a reader holds together
GROUP_DOCUMENTS = 1024
# version of sources.json, for whatever reads it later
MIX_FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """How much to draw, and how. Bytes are of UTF-8 text.

    shard_bytes: of a file, and held in memory to shuffle. repeat: draw again from a source that
    runs out, instead of more from the others."""

    train_bytes: int
    val_bytes: int
    shard_bytes: int
    seed: int
    repeat: bool


@dataclass(frozen=True)
class Drawn:
    """What a source gave to one side. passes: over its documents, begun."""

    n_bytes: int
    documents: int
    ran_out: bool
    passes: int


@dataclass
class Source:
    """One SOURCE=WEIGHT of a mix while it is drawn from.

    n_bytes, n_documents, passes: so far, of the side that is being written. budget: bytes of this
    side that it should give. train, val: of the sides that are written."""

    name: str
    weight: float
    corpus: Corpus
    n_bytes: int = 0
    n_documents: int = 0
    passes: int = 0
    budget: float = 0.0
    ran_out: bool = False
    sides: dict[str, Drawn] = field(default_factory=dict)

    @property
    def train(self) -> Drawn:
        """What it gave to train on."""
        return self.sides["train"]

    @property
    def val(self) -> Drawn:
        """What it gave to validate on."""
        return self.sides["val"]

    def begin(self, budget: float) -> None:
        """Begin a side, of which it should give `budget` bytes."""
        self.n_bytes = 0
        self.n_documents = 0
        self.passes = 0
        self.ran_out = False
        self.budget = budget

    def end(self, side: str) -> None:
        """Keep the figures of a side ("train" or "val")."""
        self.sides[side] = Drawn(self.n_bytes, self.n_documents, self.ran_out, self.passes)


def run_mix(out: str, given: list[str], recipe: Recipe) -> int:
    """Draw documents of all sources in turn, and write them into a new folder.

    given: the SOURCE=WEIGHT arguments. Raises UsageError, Unavailable."""
    folder_name = Path(out)
    sources = _opened_sources(given, folder_name)
    with new_folder(folder_name) as folder:
        # text packs to less, so this refuses only what may fail
        free = shutil.disk_usage(folder).free
        if recipe.train_bytes + recipe.val_bytes > free:
            raise UsageError(
                f"--bytes {recipe.train_bytes:,}: the disk of {out} has {human_bytes(free)} free; "
                f"ask for less, or write elsewhere"
            )
        held_out = _write_val(folder, sources, recipe)
        _write_train(folder, sources, recipe, held_out)
        write_json(folder / MIX_SUMMARY, _summary(sources, recipe))
    print("\n".join(_summary_lines(sources, recipe, out)))
    return EXIT_COMPLETED


def _write_val(folder: Path, sources: list[Source], recipe: Recipe) -> set[str]:
    """Write the file to validate on, and return its documents."""
    drawn = list(draw(sources, "val", recipe.val_bytes, recipe))
    if not drawn:
        raise UsageError("the sources hold no text out: give larger ones")
    # a name after those of the files to train on: train.py holds out the last one
    write_documents(folder / f"validation{suffix()}", drawn, recipe.seed)
    for source in sources:
        source.end("val")
    return {text for text, _ in drawn}


def _write_train(
    folder: Path, sources: list[Source], recipe: Recipe, held_out: Collection[str]
) -> None:
    """Write the files to train on, without the documents that are held out."""
    # A source may hold in its training part what another holds out. The files are as equal as they
    # can be: a last one with a line would be a shard of its own in training.
    file_bytes = recipe.train_bytes / ceil_div(recipe.train_bytes, recipe.shard_bytes)
    batch: list[tuple[str, str]] = []
    written = 0
    n_files = 0

    def write_file() -> None:
        nonlocal n_files
        write_documents(folder / f"train_{n_files:05}{suffix()}", batch, recipe.seed)
        n_files += 1
        size = f"{human_bytes(written)} of {human_bytes(recipe.train_bytes)}"
        say(f"  {counted(n_files, 'file')}, {size}")
        batch.clear()

    for text, name in draw(sources, "train", recipe.train_bytes, recipe, held_out):
        batch.append((text, name))
        written += len(text.encode("utf-8"))
        # the last bytes may be too few for a character, and do not begin a file
        nearly_all = written >= recipe.train_bytes - 4
        if written >= (n_files + 1) * file_bytes and not nearly_all:
            write_file()
    if batch:
        write_file()
    for source in sources:
        source.end("train")
    if not n_files:
        raise UsageError("the sources hold no text to train on: give larger ones")


# --------------------------------------------------------------------------------------------------
# sources


def _opened_sources(given: list[str], out: Path) -> list[Source]:
    """The Sources that the arguments name.

    Raises UsageError, with all that is wrong, before anything is written."""
    problems = []
    if out.exists() and not out.is_dir():
        problems.append(f"{out}: exists; name a new folder")
    elif out.exists() and any(out.iterdir()):
        problems.append(f"{out}: exists and is not empty; name a new folder")
    weights = {}
    for argument in given:
        # from the right, since a path may hold an equals sign
        name, equals, weight = argument.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (name and equals and 0 < value < math.inf):
            problems.append(
                f"{argument}: write SOURCE=WEIGHT with a positive number, such as python=0.5"
            )
        elif name in weights:
            problems.append(f"{argument}: {name} is named twice; add the weights up")
        weights[name] = value
    if problems:
        raise UsageError("\n".join(problems))
    sources = [Source(name, weight, open_corpus(name)) for name, weight in weights.items()]
    _refuse_shared_files(sources)
    return sources


def _refuse_shared_files(sources: list[Source]) -> None:
    """UsageError if two sources hold the same file, whose documents would be drawn twice."""
    owner: dict[Path | str, Source] = {}
    for source in sources:
        for shard in source.corpus.train + source.corpus.val:
            for file in shard.files:
                # by what it is, whatever pattern or folder names it
                key = file.fingerprint if isinstance(file, RemoteFile) else file.resolve()
                other = owner.setdefault(key, source)
                if other is not source:
                    raise UsageError(
                        f"{source.name} and {other.name} both hold {file.name}, whose documents "
                        f"would be drawn twice; name each file in one source only"
                    )


def draw(
    sources: list[Source],
    side: str,
    n_bytes: int,
    recipe: Recipe,
    left_out: Collection[str] = (),
) -> Iterator[tuple[str, str]]:
    """(document, source's name), always of the source that is furthest behind its share.

    side: "train" or "val", of each source's corpus. Ends after n_bytes, or when the sources end;
    when one does, the others fill its place by their weights. The last document of a source is cut
    where it reaches its share. left_out: documents that are not drawn."""
    total = sum(source.weight for source in sources)
    streams = {}
    for source in sources:
        source.begin(n_bytes * source.weight / total)
        # together, the buffers of all sources hold about as much as one file
        buffer_bytes = max(1, int(recipe.shard_bytes * source.weight / total))
        streams[source.name] = _shuffled(source, side, buffer_bytes, recipe, left_out)
    while active := [s for s in sources if not s.ran_out and s.n_bytes < round(s.budget)]:
        # the furthest behind first: shares are right after any number of documents
        source = min(active, key=lambda source: source.n_bytes / source.weight)
        text = next(streams[source.name], None)
        if text is None:
            source.ran_out = True
            _hand_over_budget(source, sources)
            continue
        content = text.encode("utf-8")
        room = round(source.budget) - source.n_bytes
        if len(content) > room:
            # the last character may not fit whole
            text = content[:room].decode("utf-8", "ignore")
            content = text.encode("utf-8")
        if not text.strip():
            # only blanks fit any more
            source.budget = source.n_bytes
            continue
        source.n_bytes += len(content)
        source.n_documents += 1
        yield text, source.name


def _hand_over_budget(source: Source, sources: list[Source]) -> None:
    """Give what a source that ran out still owes to the others, by their weights."""
    left = source.budget - source.n_bytes
    source.budget = source.n_bytes
    others = [other for other in sources if not other.ran_out]
    total = sum(other.weight for other in others)
    for other in others:
        other.budget += left * other.weight / total


def _shuffled(
    source: Source, side: str, buffer_bytes: int, recipe: Recipe, left_out: Collection[str]
) -> Iterator[str]:
    """The documents of a side of a source in seeded order; without end if the recipe repeats.

    Shards are permuted; documents go through a buffer of about buffer_bytes (characters stand for
    bytes), from which they are taken at random."""
    import numpy as np

    shards: list[Shard] = getattr(source.corpus, side)
    repeat = recipe.repeat and side == "train"
    while True:
        fingerprint = source.corpus.fingerprint
        # by content: text that was moved or renamed is drawn alike
        seed = stream_seed(recipe.seed, "mix", side, fingerprint, source.passes)
        generator = np.random.default_rng(seed)
        source.passes += 1
        order = generator.permutation(len(shards)).tolist()
        documents = itertools.chain.from_iterable(shards[i].documents(say) for i in order)
        buffer: list[str] = []
        size = 0
        is_empty = True
        for document in documents:
            if document in left_out:
                continue
            is_empty = False
            buffer.append(document)
            size += len(document)
            # a full buffer gives one document for each that comes in
            while size > buffer_bytes:
                taken = _take(buffer, int(generator.integers(len(buffer))))
                size -= len(taken)
                yield taken
        while buffer:
            yield _take(buffer, int(generator.integers(len(buffer))))
        if is_empty or not repeat:
            return


def _take(buffer: list[str], place: int) -> str:
    """Remove an element of a list in constant time: the last one takes its place."""
    taken = buffer[place]
    buffer[place] = buffer[-1]
    buffer.pop()
    return taken


# --------------------------------------------------------------------------------------------------
# files


def suffix() -> str:
    """Ending of the files: .parquet, or .jsonl where pyarrow is not installed."""
    return ".parquet" if importlib.util.find_spec("pyarrow") else ".jsonl"


def write_documents(path: Path, documents: list[tuple[str, str]], seed: int) -> None:
    """Write (text, source) pairs in a seeded random order to a .parquet or .jsonl file.

    The file is flushed to the disk."""
    import numpy as np

    # documents were drawn in turn: in the file, sources are mixed at random
    generator = np.random.default_rng(stream_seed(seed, "mix", "order", path.stem))
    ordered = [documents[i] for i in generator.permutation(len(documents)).tolist()]
    if path.suffix == ".parquet":
        _write_parquet(path, ordered)
    else:
        lines = ({"text": text, "source": name} for text, name in ordered)
        # with ensure_ascii, text in other scripts would take up to three times its size
        with path.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # the folder takes its name next: after a crash it must not hold files that never reached the
    # disk
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _write_parquet(path: Path, documents: list[tuple[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    schema = pa.schema([("text", pa.string()), ("source", pa.string())])
    # text without a dictionary: the sizes in the file's metadata are then those of the text
    with pyarrow.parquet.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=["source"]
    ) as writer:
        for first in range(0, len(documents), GROUP_DOCUMENTS):
            texts, names = zip(*documents[first : first + GROUP_DOCUMENTS], strict=True)
            columns = {"text": list(texts), "source": list(names)}
            writer.write_table(pa.table(columns, schema=schema))


# --------------------------------------------------------------------------------------------------
# what came from where


def _side_bytes(sources: list[Source], side: str) -> int:
    return sum(source.sides[side].n_bytes for source in sources)


def _summary(sources: list[Source], recipe: Recipe) -> dict:
    """The content of sources.json: the arguments, and for each source what it gave and what it
    is."""
    total = sum(source.weight for source in sources)
    train_bytes = _side_bytes(sources, "train")
    val_bytes = _side_bytes(sources, "val")
    return {
        "format": MIX_FORMAT,
        "seed": recipe.seed,
        "train_bytes": train_bytes,
        "val_bytes": val_bytes,
        "shard_bytes": recipe.shard_bytes,
        "sources": [
            {
                "source": source.name,
                "weight": source.weight,
                "share_asked_for": source.weight / total,
                "share": source.train.n_bytes / train_bytes,
                "val_share": source.val.n_bytes / val_bytes,
                **_side_summary("val", source.val),
                **_side_summary("train", source.train),
                "fingerprint": source.corpus.fingerprint,
                "revision": source.corpus.revision,
                **asdict(origin_of(source.name)),
            }
            for source in sources
        ],
    }


def _side_summary(side: str, drawn: Drawn) -> dict:
    return {
        f"{side}_bytes": drawn.n_bytes,
        f"{side}_documents": drawn.documents,
        f"{side}_ran_out": drawn.ran_out,
        f"{side}_passes": drawn.passes,
    }


def _summary_lines(sources: list[Source], recipe: Recipe, out: str) -> Iterator[str]:
    """What `mix` prints at the end."""
    width = max(len(source.name) for source in sources)
    total = sum(source.weight for source in sources)
    train_bytes = _side_bytes(sources, "train")
    val_bytes = _side_bytes(sources, "val")
    for source in sources:
        notes = []
        if source.train.ran_out:
            notes.append(f"ran out: {source.weight / total:.2%} was asked for, it has no more")
        if source.val.ran_out:
            notes.append("its held-out part ran out")
        if source.train.passes > 1:
            notes.append(f"read {source.train.passes} times")
        yield (
            f"{source.name:<{width}}  {source.train.n_bytes / train_bytes:>7.2%} of the bytes, "
            f"{source.train.documents:,} documents; held out "
            f"{source.val.n_bytes / val_bytes:.2%}, {source.val.documents:,} documents"
            + "".join(f"; {note}" for note in notes)
        )
    # a few bytes may be missing, where the last character of a source does not fit whole
    if train_bytes < 0.99 * recipe.train_bytes:
        yield (
            f"all sources ran out: {train_bytes:,} bytes instead of {recipe.train_bytes:,}; "
            f"--repeat draws from them again"
        )
    yield (
        f"wrote {out}: {train_bytes:,} bytes to train on, {val_bytes:,} held out; use it: "
        f"python train.py --data={out}"
    )
