"""Text in, training rows out: sources -> shards of documents -> cached token ids -> rows -> batches.

A shard is the unit of tokenizing, caching and shuffling. Row g of a run (g counts rows from the start of training, over
all epochs) is a pure function of (seed, g) and of the shards before it:

1. the shards of epoch e follow a permutation drawn from (seed, e);
2. inside a shard the documents are permuted, each followed by BOS, and the resulting ring of tokens is turned by a
   random offset, so that cuts fall elsewhere in every epoch;
3. the ring is cut into pieces of T tokens; the pieces, each behind a BOS, are the shard's rows, in permuted order.

Every token is a target once an epoch, except fewer than T at the end of each ring (share_dropped says how many).
A document cut by a row goes on in another row after a BOS. No state is kept: resuming is asking for row g."""

import dataclasses
import fcntl
import glob
import json
import os
import queue
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat import tokenizer as tokenizers
from nanochat.common import UsageError, base_dir, sha256_file, sha256_hex, stream_seed

SUFFIXES = (".txt", ".jsonl", ".parquet")
END_OF_DOCUMENT = "<|endoftext|>"  # alone on a line of a .txt file
SHARD_BYTES = 8 << 20  # small files are grouped up to this size; one file is never split
PYTHON_HELD_OUT = 50  # one file in this many is held out of the embedded corpus
CACHE_LIMIT_BYTES = 100 << 30
BPE_SAMPLE_BYTES = 200 << 20  # text that BPE training reads at most


@dataclass(frozen=True)
class Shard:
    """A list of documents: those of `files` in order, of which [first:last] are kept (characters, if it is one document).

    n_bytes: UTF-8 bytes of the documents. fingerprint: of the content that load() returns."""
    name: str
    files: tuple
    fingerprint: str
    n_bytes: int
    first: int = 0
    last: int | None = None
    cut_characters: bool = False

    def load(self):
        """The documents as a list of str, none of them blank."""
        documents = [document for path in self.files for document in read_documents(path)]
        if self.cut_characters:
            return [documents[0][self.first : self.last]]
        return documents[self.first : self.last]


@dataclass(frozen=True)
class Corpus:
    """Training and validation shards of a run. note: one sentence on what was held out."""
    name: str
    train: list
    val: list
    note: str

    @property
    def train_bytes(self):
        return sum(shard.n_bytes for shard in self.train)

    @property
    def fingerprint(self):
        """SHA-256 over the content of both sides, in order; paths and times do not enter."""
        return sha256_hex(json.dumps([[s.fingerprint for s in self.train], [s.fingerprint for s in self.val]]))


# ---------------------------------------------------------------------------------------------------------------------
# sources


def read_text(path):
    """A file as str. UsageError if it is not UTF-8 text."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"data: {path} cannot be read ({error.strerror})") from None
    if b"\0" in content:
        raise UsageError(f"data: {path} is a binary file (it holds NUL bytes); give UTF-8 text, .jsonl or .parquet")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"data: {path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv") from None


def read_documents(path):
    """The documents of one file, blank ones left out: .jsonl and .parquet by their `text` field, else as plain text."""
    suffix = Path(path).suffix
    if suffix == ".parquet":
        documents = _read_parquet(path)
    elif suffix == ".jsonl":
        documents = [_jsonl_text(path, i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    else:
        text = read_text(path)
        documents = [text]
        if END_OF_DOCUMENT in text:
            documents = "\n".join("\0" if line.strip() == END_OF_DOCUMENT else line for line in text.split("\n")).split("\0")
            documents = [document.strip("\n") for document in documents]
    return [document for document in documents if document.strip()]


def _jsonl_text(path, line_number, line):
    try:
        value = json.loads(line)
    except ValueError:
        raise UsageError(f"data: {path} line {line_number} is not JSON; a .jsonl file has one object a line") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        keys = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise UsageError(f"data: {path} line {line_number} has no string field 'text' (it has: {keys}); rename the field")
    return value["text"].encode("utf-8", "replace").decode("utf-8")  # JSON may spell lone surrogates, UTF-8 cannot


def _read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        from nanochat.common import install_hint
        raise install_hint("pyarrow", f"--data: reading {path}") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        column = table.read(columns=["text"]).column("text").to_pylist() if "text" in names else []
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"data: {path} is not a readable parquet file ({error})") from None
    if "text" not in names:
        raise UsageError(f"data: {path} has no column 'text' (it has: {', '.join(names)}); rename the column")
    if any(document is not None and not isinstance(document, str) for document in column):
        raise UsageError(f"data: {path}: the column 'text' does not hold strings")
    return [document for document in column if document is not None]


def find_files(pattern, flag="--data"):
    """The data files that a path, folder or glob names, sorted. UsageError if there are none."""
    if os.path.isdir(pattern):
        files = sorted(p for p in Path(pattern).rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UsageError(f"{flag}={pattern}: the folder holds no {', '.join(SUFFIXES)} file")
    elif os.path.isfile(pattern):
        files = [Path(pattern)]
    else:
        files = sorted(Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
        if not files:
            raise UsageError(f"{flag}={pattern}: no such file or folder, and no file matches it as a pattern")
    return files


def _shard(files, first=0, last=None, cut_characters=False):
    """A Shard of files, with the size of its text."""
    content = [sha256_file(path) for path in files]
    shard = Shard(name=files[0].name + (f" +{len(files) - 1}" if len(files) > 1 else ""), files=tuple(files),
                  fingerprint=sha256_hex(json.dumps([content, first, last, cut_characters])),
                  n_bytes=0, first=first, last=last, cut_characters=cut_characters)
    return dataclasses.replace(shard, n_bytes=sum(len(document.encode("utf-8")) for document in shard.load()))


def _grouped(files):
    """Shards of whole files in order, small ones together up to SHARD_BYTES."""
    groups, size = [], SHARD_BYTES + 1
    for path in files:
        if size + path.stat().st_size > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return [shard for shard in map(_shard, groups) if shard.n_bytes]


def _mixed(files):
    """_grouped() in the order of the files' hashes, for training: neighbours in a folder are alike, and rows are
    shuffled inside a shard only, so that shards in folder order would each teach something else (runs/LOG.md)."""
    return _grouped(sorted(files, key=sha256_file))


def local_corpus(pattern, val_pattern=None):
    """The corpus of --data (a path, folder or glob) and, if given, of --val-data."""
    files = find_files(pattern)
    if val_pattern:
        return _checked(Corpus(pattern, _mixed(files), _grouped(find_files(val_pattern, "--val-data")), f"validation: {val_pattern}"),
                        val_pattern)
    counts = {path: len(read_documents(path)) for path in files}
    files = [path for path in files if counts[path]]
    if not files:
        raise UsageError(f"--data={pattern}: there is no text in it (empty file, or blank documents only)")
    if len(files) > 1 and max(counts.values()) > 1:
        return Corpus(pattern, _mixed(files[:-1]), _grouped(files[-1:]), f"held out: the last file, {files[-1].name}")
    if len(files) > 1:
        held_out = max(1, round(0.02 * len(files)))
        return Corpus(pattern, _mixed(files[:-held_out]), _grouped(files[-held_out:]),
                      f"held out: the last {held_out} of {len(files)} documents")
    document_count = counts[files[0]]
    cut_characters = document_count == 1
    total = len(read_documents(files[0])[0]) if cut_characters else document_count
    held_out, unit = max(1, total // 10), "characters" if cut_characters else "documents"
    train = _shard(files, 0, total - held_out, cut_characters)
    val = _shard(files, total - held_out, None, cut_characters)
    return Corpus(pattern, [train], [val], f"held out: the last tenth ({held_out:,} of {total:,} {unit})")


def _python_paths():
    """(relative name, path) of the candidate files, sorted by name within each root."""
    import importlib.util
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"]), "torch": Path(importlib.util.find_spec("torch").origin).parent}
    for label, root in roots.items():
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"} if label == "stdlib" else set()
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(set(folders) - skip)
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder) / name
                    yield f"{label}/{path.relative_to(root).as_posix()}", path


def _checked(corpus, val_data):
    """The corpus, if both its sides hold text."""
    for flag, value, shards in (("--data", corpus.name, corpus.train), ("--val-data", val_data, corpus.val)):
        if not sum(shard.n_bytes for shard in shards):
            raise UsageError(f"{flag}={value}: there is no text in it (empty file, or blank documents only)")
    return corpus


def python_files():
    """{relative name: path} of the embedded corpus: the standard library without tests, and the installed torch package.

    Files that are not UTF-8 or repeat an earlier one byte for byte are left out."""
    found, seen = {}, set()
    for name, path in _python_paths():
        content = path.read_bytes()
        digest = sha256_hex(content)
        if digest in seen or not content.strip() or b"\0" in content:
            continue
        try:
            content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        found[name] = path
    return dict(sorted(found.items()))


def python_corpus():
    """Python source that is on every machine that runs this: one document a file, 2% held out by hash of the name."""
    files = python_files()
    held_out = {name for name in files if int(sha256_hex(name)[:8], 16) % PYTHON_HELD_OUT == 0}
    train = _mixed([path for name, path in files.items() if name not in held_out])
    val = _grouped([files[name] for name in sorted(held_out)])
    return Corpus("python", train, val, f"held out: {len(held_out)} of {len(files)} files, by hash of their names")


def open_corpus(data, val_data):
    """The Corpus that --data and --val-data name. Raises UsageError for whatever is wrong with them."""
    if data == "python":
        if val_data:
            val = _grouped(find_files(val_data, "--val-data"))
            return _checked(Corpus("python", python_corpus().train, val, f"validation: {val_data}"), val_data)
        return python_corpus()
    return local_corpus(data, val_data)


def estimated_bytes(data):
    """Bytes of --data from file sizes alone, for plans; no file is read."""
    if data == "python":
        return sum(path.stat().st_size for _, path in _python_paths())
    return sum(path.stat().st_size for path in find_files(data))


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer and token cache


def fit_tokenizer(corpus, kind, vocab_size):
    """The tokenizer of a run: trained on the training shards (for char: on all text, so that validation has no unknown).

    vocab_size -1 derives it from the data size. The result is kept under the base dir by data, kind and size."""
    if kind == "bpe" and vocab_size == -1:
        vocab_size = tokenizers.derived_vocab_size(corpus.train_bytes)
    if kind == "byte":
        return tokenizers.train("byte", [], -1)
    key = sha256_hex(json.dumps([kind, vocab_size, tokenizers.SPLIT_PATTERN, corpus.fingerprint]))[:32]
    folder = base_dir() / "tokenizers" / key
    if (folder / tokenizers.FILE_NAME).exists():
        return tokenizers.load(folder)
    if kind == "char":
        texts = (document for shard in corpus.train + corpus.val for document in shard.load())
    else:
        texts = _sample_of(corpus.train, BPE_SAMPLE_BYTES)
    fitted = tokenizers.train(kind, texts, vocab_size)
    fitted.save(folder)
    return fitted


def _sample_of(shards, n_bytes):
    """Documents of evenly spread shards, about n_bytes of them."""
    total = sum(shard.n_bytes for shard in shards)
    stride = max(1, -(-total // n_bytes))
    for shard in shards[::stride]:
        yield from shard.load()


class TokenCache:
    """Token ids of shards, one file a shard, made when first needed and shared by all runs and ranks of a machine."""

    def __init__(self, tokenizer, threads):
        self.tokenizer, self.threads = tokenizer, threads
        self.folder = base_dir() / "tokens" / tokenizer.fingerprint[:32]
        self.opened = {}

    def path(self, shard):
        return self.folder / f"{shard.fingerprint[:32]}.safetensors"

    def tokens(self, shard):
        """(ids, offsets) of a shard: all documents' ids with a BOS after each, and the n + 1 places where they start.

        ids is a lazily read slice object (ids[a:b] is a numpy array), offsets an int64 array. A damaged file is a
        UsageError: the disk may be failing, so it is not silently replaced."""
        if shard.fingerprint in self.opened:
            return self.opened[shard.fingerprint]
        path = self.path(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks and runs wait here and then find the file
            if not path.exists():
                self._build(shard, path)
        self.opened[shard.fingerprint] = self._open(shard, path)
        os.utime(path)  # trim_cache() drops what was not used for longest
        return self.opened[shard.fingerprint]

    def _build(self, shard, path):
        from safetensors.numpy import save_file
        dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32
        pieces, bos = [], np.array([self.tokenizer.bos], dtype=dtype)
        for ids in self.tokenizer.encode_batch(shard.load(), self.threads):
            pieces += [ids.astype(dtype), bos]
        lengths = [len(ids) + 1 for ids in pieces[::2]]
        ids, offsets = np.concatenate(pieces), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file({"ids": ids, "offsets": offsets}, partial, metadata={"sha256": self._digest(ids, offsets)})
            with open(partial, "rb") as f:
                os.fsync(f.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _open(self, shard, path):
        from safetensors import SafetensorError, safe_open
        try:
            opened = safe_open(path, framework="numpy")
            ids, offsets = opened.get_tensor("ids"), opened.get_tensor("offsets")
            intact = opened.metadata()["sha256"] == self._digest(ids, offsets)
        except (SafetensorError, KeyError, TypeError, OSError):
            intact = False
        if not intact:
            raise UsageError(f"token cache: {path} is damaged (its checksum does not match); check the disk, then delete "
                             f"the file: it is made again from {shard.name} at the next start")
        return opened.get_slice("ids"), offsets

    @staticmethod
    def _digest(ids, offsets):
        return sha256_hex(ids.tobytes() + offsets.tobytes())

    def prepare(self, shards, progress):
        """Tokenize the shards that are not cached yet. progress: wraps the list (a progress bar, or the list itself)."""
        for shard in progress([shard for shard in shards if not self.path(shard).exists()]):
            self.tokens(shard)
        trim_cache(self.folder.parent, keep={self.path(shard) for shard in shards})


def trim_cache(folder, keep, limit_bytes=CACHE_LIMIT_BYTES):
    """Delete the least recently used token files beyond limit_bytes; those in `keep` stay."""
    files = sorted(folder.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime)
    excess = sum(path.stat().st_size for path in files) - limit_bytes
    for path in files:
        if excess <= 0:
            break
        if path not in keep:
            excess -= path.stat().st_size
            path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# rows and batches


class Rows:
    """Random access to the rows of training, as the module docstring defines them."""

    def __init__(self, shards, cache, row_tokens, seed):
        self.shards, self.cache, self.T, self.seed = shards, cache, row_tokens, seed
        self.plans = {}  # (epoch, shard) -> what _plan() returns; the last few only

    def shard_rows(self, shard_index):
        """Number of rows of a shard, the same in every epoch."""
        return int(self.cache.tokens(self.shards[shard_index])[1][-1]) // self.T

    def rows_per_epoch(self):
        """Rows of one pass over all shards. UsageError, with numbers, if there is not even one."""
        rows = sum(self.shard_rows(i) for i in range(len(self.shards)))
        if rows == 0:
            tokens = sum(int(self.cache.tokens(shard)[1][-1]) for shard in self.shards)
            raise UsageError(f"--data: {tokens:,} training tokens in {len(self.shards)} shards are too few for one row of "
                             f"{self.T} tokens; give more text or lower --max-seq-len")
        return rows

    def share_dropped(self):
        """Share of an epoch's tokens that no row holds (the ends of the rings)."""
        tokens = sum(int(self.cache.tokens(shard)[1][-1]) for shard in self.shards)
        return 1 - self.rows_per_epoch() * self.T / tokens

    def locate(self, row):
        """(epoch, shard index, row of that shard before its permutation) of global row number `row`."""
        epoch, row = divmod(row, self.rows_per_epoch())
        order = np.random.default_rng(stream_seed(self.seed, "shards", epoch)).permutation(len(self.shards))
        for shard_index in order.tolist():
            n = self.shard_rows(shard_index)
            if row < n:
                return epoch, shard_index, row
            row -= n
        raise AssertionError("unreachable: row < rows_per_epoch")

    def _plan(self, epoch, shard_index):
        """(document order, ring position where each begins, ring offset, row order) of a shard in an epoch."""
        if (epoch, shard_index) not in self.plans:
            offsets = self.cache.tokens(self.shards[shard_index])[1]
            generator = np.random.default_rng(stream_seed(self.seed, "rows", epoch, self.shards[shard_index].fingerprint))
            order = generator.permutation(len(offsets) - 1)
            begins = np.concatenate(([0], np.cumsum(np.diff(offsets)[order])))
            turn = int(generator.integers(self.T))
            while len(self.plans) >= 4:
                self.plans.pop(next(iter(self.plans)))
            self.plans[epoch, shard_index] = order, begins, turn, generator.permutation(self.shard_rows(shard_index))
        return self.plans[epoch, shard_index]

    def row(self, number):
        """Row `number`: int64 array of T + 1 ids, BOS first. Inputs are [:-1], targets [1:]."""
        epoch, shard_index, row = self.locate(number)
        ids, offsets = self.cache.tokens(self.shards[shard_index])
        order, begins, turn, row_order = self._plan(epoch, shard_index)
        out = np.empty(self.T + 1, dtype=np.int64)
        out[0], filled = self.cache.tokenizer.bos, 1
        position = (int(row_order[row]) * self.T + turn) % int(begins[-1])
        while filled <= self.T:
            place = int(np.searchsorted(begins, position, side="right")) - 1
            take = min(int(begins[place + 1]) - position, self.T + 1 - filled)
            start = int(offsets[order[place]]) + position - int(begins[place])
            out[filled : filled + take] = ids[start : start + take]
            filled += take
            position = (position + take) % int(begins[-1])
        return out

    def batch(self, step, rows_per_step, micro, device_batch_size, rank, world_size):
        """(inputs, targets) int64 (device_batch_size, T): the share of a rank in micro-batch `micro` of a step.

        A step takes rows_per_step consecutive rows, whatever the number of ranks and micro-batches."""
        first = step * rows_per_step + (micro * world_size + rank) * device_batch_size
        rows = np.stack([self.row(first + i) for i in range(device_batch_size)])
        return rows[:, :-1], rows[:, 1:]


class Prefetcher:
    """Runs an iterator in a thread, a few items ahead. An exception there is raised at next() here."""

    def __init__(self, iterator, depth=4):
        self.queue, self.stopped = queue.Queue(depth), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self.thread.start()

    def _put(self, item):
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _run(self, iterator):
        try:
            for item in iterator:
                self._put((item, None))
                if self.stopped.is_set():
                    return
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put((None, error))

    def __next__(self):
        item, error = self.queue.get()
        if error is not None:
            raise error
        return item

    def close(self):
        self.stopped.set()
        self.thread.join()


def held_out_pieces(shards, cache, row_tokens, max_tokens):
    """Validation pieces: held-out documents in file order, up to max_tokens (the last is cut), each cut into pieces.

    Returns a list of int64 arrays: BOS, then 1 to row_tokens tokens. Documents' closing BOS is left out."""
    pieces, left = [], max_tokens
    for shard in shards:
        ids, offsets = cache.tokens(shard)
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            document = ids[begin : min(end - 1, begin + left)].astype(np.int64)
            for start in range(0, len(document), row_tokens):
                pieces.append(np.concatenate(([cache.tokenizer.bos], document[start : start + row_tokens])))
            left -= len(document)
            if left == 0:
                return pieces
    return pieces


def compressed_bits_per_byte(shards, max_bytes=1 << 20):
    """{compressor: bits per byte} of gzip -9 and xz -9 on the first max_bytes of held-out text: what a model has to beat."""
    import gzip
    import lzma
    text = b""
    for shard in shards:
        text += "\n".join(shard.load()).encode("utf-8")
        if len(text) >= max_bytes:
            break
    text = text[:max_bytes]
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: round(8 * len(content) / len(text), 4) for name, content in packed.items()}


def describe_corpus(corpus):
    """Lines on what a corpus is: bytes and fingerprint of both sides, and what is held out."""
    lines = [f"data: {corpus.name}, {corpus.note}"]
    for side, shards in (("to train on", corpus.train), ("held out", corpus.val)):
        fingerprint = sha256_hex(json.dumps([shard.fingerprint for shard in shards]))
        n_bytes = sum(shard.n_bytes for shard in shards)
        lines.append(f"  {side + ':':<12} {n_bytes:,} bytes in {len(shards)} shards, fingerprint {fingerprint[:16]}")
    return lines
