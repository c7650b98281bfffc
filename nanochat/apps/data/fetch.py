"""`nanochat data fetch | tokenize`: download and tokenize before training what a run will read."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanochat.apps.data.words import say
from nanochat.common import (
    EXIT_COMPLETED,
    Unavailable,
    UsageError,
    cached,
    counted,
    human_bytes,
    human_time,
    writable_base_dir,
)
from nanochat.data import token_cache
from nanochat.data.download import DownloadFailed, RemoteFile
from nanochat.data.rows import Rows
from nanochat.data.sources import Corpus, Shard, describe_corpus, is_remote, open_corpus
from nanochat.data.token_cache import DataFailed, TokenCache, load_tokenizer, shards_to_fit
from nanochat.data.tokenizer import MIN_BPE_VOCAB, TRAINED_TOKENIZERS, Tokenizer, read_tokenizer

# `fetch` counts the tokens of so much text of a shard, and estimates the rest from it ...
COUNT_BYTES = 8 << 20
# ... as this much less than it seems: a shard too many does no harm, one too few does
COUNT_MARGIN = 0.02
# documents that are encoded together to count their tokens
COUNT_DOCUMENTS = 1024
# of a shard that is missing, so that it is not known better
BYTES_PER_TOKEN = 5


@dataclass(frozen=True)
class Wanted:
    """What a run will read: its data, tokenizer, seed and row length, and how much.

    One of tokens, shards and everything at most. Raises UsageError, with all that is wrong."""

    data: str
    val_data: str
    tokenizer: str
    vocab_size: int
    seed: int
    max_seq_len: int
    tokens: int | None = None
    shards: int | None = None
    everything: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.max_seq_len < 1:
            problems.append(f"--max-seq-len {self.max_seq_len}: must be at least 1")
        if self.vocab_size != -1 and self.vocab_size < MIN_BPE_VOCAB:
            problems.append(f"--vocab-size {self.vocab_size}: give at least {MIN_BPE_VOCAB}, or -1")
        if self.tokenizer not in (*TRAINED_TOKENIZERS, "gpt2"):
            try:
                read_tokenizer(self.tokenizer)
            except UsageError as error:
                problems.append(
                    f"--tokenizer {self.tokenizer}: not {', '.join(TRAINED_TOKENIZERS)} or gpt2, "
                    f"and as a folder: {error}"
                )
        if problems:
            raise UsageError("\n".join(problems))


@dataclass
class _Fetched:
    """The files that were asked for so far: those that are here, and why others are missing."""

    here: set[RemoteFile] = field(default_factory=set)
    missing: dict[RemoteFile, str] = field(default_factory=dict)

    def fetch(self, shard: Shard) -> bool:
        """Whether all files of a shard are here, after an attempt to download them."""
        return all(self._fetch_file(file) for file in shard.remote_files())

    def _fetch_file(self, file: RemoteFile) -> bool:
        # training and validation may be two parts of one file, which is tried and reported once
        if file in self.here or file in self.missing:
            return file in self.here
        began = time.monotonic()
        was_here = file.is_local()
        try:
            file.fetch(say)
        except DownloadFailed as error:
            # the other files are still worth having, so a missing one does not end the command
            self.missing[file] = str(error)
            say(f"{file.name}  missing: {error}")
            return False
        self.here.add(file)
        how = "was here" if was_here else f"in {human_time(time.monotonic() - began)}"
        say(f"{file.name}  {human_bytes(file.n_bytes)} {how}")
        return True


def run_fetch(wanted: Wanted) -> int:
    """`nanochat data fetch`: download shards in the order in which a run reads them.

    Raises Unavailable if anything is missing at the end."""
    remote = is_remote(wanted.data)
    corpus = _opened(wanted, amount_matters=remote)
    if not remote:
        print(f"{wanted.data} is on this disk: there is nothing to download")
        return EXIT_COMPLETED
    files = {file for shard in corpus.train + corpus.val for file in shard.remote_files()}
    # to report only what this command has downloaded
    had = {file for file in files if file.is_local()}
    order = _reading_order(corpus, wanted.seed)
    n_shards = _shards_asked_for(wanted, corpus)
    to_fit = shards_to_fit(corpus, wanted.tokenizer, wanted.vocab_size)
    _check_room([*corpus.val, *to_fit, *order[:n_shards]], wanted)
    fetched = _Fetched()
    # what a run needs before its first step comes first
    for shard in [*corpus.val, *to_fit]:
        fetched.fetch(shard)
    if n_shards is None:
        summary = _fetch_enough(wanted, corpus, order, to_fit, fetched)
    else:
        for shard in order[:n_shards]:
            fetched.fetch(shard)
        n = min(n_shards, len(order))
        summary = f"{counted(n, 'training shard')} of {len(order):,}"
    _raise_if_missing(fetched.missing.values(), f"the other {counted(len(fetched.here), 'file')}")
    new = fetched.here - had
    size = human_bytes(sum(file.n_bytes for file in new))
    print(
        f"fetched {counted(len(new), 'file')}, {size}; here are {summary}, and "
        f"{counted(len(corpus.val), 'shard')} to validate on, in {cached('hub')}"
    )
    return EXIT_COMPLETED


def _fetch_enough(
    wanted: Wanted,
    corpus: Corpus,
    order: list[Shard],
    to_fit: list[Shard],
    fetched: _Fetched,
) -> str:
    """Download shards until they hold enough tokens, and return a summary."""
    cache = None
    # without the text that a tokenizer is fitted to, tokens can only be estimated
    if not any(file in fetched.missing for shard in to_fit for file in shard.remote_files()):
        cache = TokenCache(_fitted_tokenizer(wanted, corpus), 1)
    tokens = 0
    n = 0
    while n < len(order) and tokens < wanted.tokens:
        shard = order[n]
        n += 1
        size = shard.n_bytes / BYTES_PER_TOKEN
        if fetched.fetch(shard) and cache:
            size = _counted_tokens(shard, cache)
        # as rows hold them: the end of a shard is dropped
        tokens += size // wanted.max_seq_len * wanted.max_seq_len
    shards = f"{counted(n, 'training shard')} of {len(order):,}"
    enough = f"{shards}, enough for {min(wanted.tokens, tokens):,.0f} tokens"
    if tokens >= wanted.tokens:
        return enough
    return f"{enough} an epoch: {wanted.tokens:,} are {wanted.tokens / max(1, tokens):.1f} epochs"


@dataclass
class _Tokenized:
    """The shards that were asked for so far. lengths: tokens of those that have a token file, by
    fingerprint; missing: why others have none, by name; built: files that were written now."""

    cache: TokenCache
    lengths: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    built: int = 0

    def tokenize(self, shard: Shard) -> int | None:
        """Tokens of a shard whose token file is here now, or None."""
        began = time.monotonic()
        was_here = self.cache.path(shard).exists()
        try:
            length = self.cache.length(shard)
        except DataFailed as error:
            self.missing[shard.name] = str(error)
            say(f"{shard.name}  missing: {error}")
            return None
        self.lengths[shard.fingerprint] = length
        if was_here:
            say(f"{shard.name}  {length:,} tokens were here")
        else:
            self.built += 1
            say(f"{shard.name}  {length:,} tokens in {human_time(time.monotonic() - began)}")
        return length


def run_tokenize(wanted: Wanted) -> int:
    """`nanochat data tokenize`: write token files, in the order in which a run reads the shards.

    Raises Unavailable if anything is missing at the end."""
    # only for its number of threads, the one that train.py tokenizes with
    import torch

    corpus = _opened(wanted, amount_matters=True)
    n_shards = _shards_asked_for(wanted, corpus)
    order = _reading_order(corpus, wanted.seed)
    to_fit = shards_to_fit(corpus, wanted.tokenizer, wanted.vocab_size)
    asked_for = [*corpus.val, *to_fit, *order[:n_shards]]
    _check_token_files(asked_for, wanted)
    _check_room(asked_for, wanted)
    tokenizer = _fitted_tokenizer(wanted, corpus)
    cache = TokenCache(tokenizer, torch.get_num_threads(), report=say)
    tokenized = _Tokenized(cache)
    # validation comes first, as in a run
    held_out = sum(tokenized.tokenize(shard) or 0 for shard in corpus.val)
    row_tokens = 0
    trained = 0
    n = 0
    for shard in order[:n_shards]:
        length = tokenized.tokenize(shard)
        n += 1
        trained += length or 0
        size = shard.n_bytes / BYTES_PER_TOKEN if length is None else length
        # whole rows only, as a run reads them
        row_tokens += size // wanted.max_seq_len * wanted.max_seq_len
        if n_shards is None and row_tokens >= wanted.tokens:
            break
    others = f"the other {counted(len(tokenized.lengths), 'shard')}"
    _raise_if_missing(tokenized.missing.values(), others, "tokenized")
    short = ""
    if n_shards is None and row_tokens < wanted.tokens:
        epochs = wanted.tokens / max(1, row_tokens)
        short = f" ({wanted.tokens:,} tokens are {epochs:.1f} epochs)"
    size = human_bytes(_bytes_on_disk(corpus, tokenized))
    print(
        f"built {counted(tokenized.built, 'token file')}; here are "
        f"{counted(n, 'training shard')} of {len(order):,} with {trained:,} tokens{short}, and "
        f"{held_out:,} tokens to validate on; vocabulary {tokenizer.vocab_size:,} "
        f"({tokenizer.kind}); {size} in {cached('tokens')}"
    )
    return EXIT_COMPLETED


def _bytes_on_disk(corpus: Corpus, tokenized: _Tokenized) -> int:
    """Size of the token files of the shards that were asked for."""
    shards = [s for s in corpus.train + corpus.val if s.fingerprint in tokenized.lengths]
    paths = [tokenized.cache.path(shard) for shard in shards]
    # other processes may trim the cache
    return sum(path.stat().st_size for path in paths if path.exists())


# --------------------------------------------------------------------------------------------------
# what a run reads


def _opened(wanted: Wanted, amount_matters: bool) -> Corpus:
    """The corpus, described. UsageError if it is large and nothing says how much is wanted."""
    corpus = open_corpus(wanted.data, wanted.val_data)
    amount_given = wanted.tokens or wanted.shards or wanted.everything
    if amount_matters and not corpus.eager and not amount_given:
        raise UsageError(
            f"{wanted.data} has {counted(len(corpus.train), 'shard')} with about "
            f"{human_bytes(corpus.train_bytes)} of text: give an amount, with --tokens N, "
            f"--shards N or --all"
        )
    say("\n".join(describe_corpus(corpus)))
    return corpus


def _shards_asked_for(wanted: Wanted, corpus: Corpus) -> int | None:
    """Number of training shards, or None where --tokens decides. All of a small corpus."""
    if wanted.shards:
        if wanted.shards < len(corpus.train) and corpus.eager:
            print(
                f"note: {wanted.data} is small, and train.py will want all of its "
                f"{counted(len(corpus.train), 'shard')} before it starts"
            )
        return wanted.shards
    return len(corpus.train) if wanted.everything or corpus.eager else None


def _reading_order(corpus: Corpus, seed: int) -> list[Shard]:
    """The training shards in the order in which the first epoch of a run reads them."""
    # the order needs the seed and the number of shards, and no token
    rows = Rows(corpus, cache=None, row_tokens=1, seed=seed)
    return [corpus.train[i] for i in rows.shard_order(0)]


def _fitted_tokenizer(wanted: Wanted, corpus: Corpus) -> Tokenizer:
    """The tokenizer that train.py would use; one that is fitted is kept where it finds it."""
    if shards_to_fit(corpus, wanted.tokenizer, wanted.vocab_size):
        say("fitting the tokenizer, which train.py will find")
    return load_tokenizer(wanted.tokenizer, wanted.vocab_size, corpus)


def _counted_tokens(shard: Shard, cache: TokenCache) -> int:
    """Tokens of a shard whose text is here.

    From its token file, else counted on COUNT_BYTES of its text and estimated, rather low, for the
    rest."""
    if cache.path(shard).exists():
        return cache.length(shard)
    tokens = 0
    # bytes of text whose tokens are counted, and of all
    counted_bytes = 0
    n_bytes = 0
    waiting = []
    for document in shard.documents():
        size = len(document.encode("utf-8"))
        n_bytes += size
        # the rest is read for its size only
        if counted_bytes < COUNT_BYTES:
            counted_bytes += size
            waiting.append(document)
        if waiting and (counted_bytes >= COUNT_BYTES or len(waiting) >= COUNT_DOCUMENTS):
            tokens += _encoded_length(cache.tokenizer, waiting)
            waiting = []
    tokens += _encoded_length(cache.tokenizer, waiting)
    if counted_bytes == n_bytes:
        return tokens
    return int(tokens * n_bytes / counted_bytes * (1 - COUNT_MARGIN))


def _encoded_length(tokenizer: Tokenizer, documents: list[str]) -> int:
    """Tokens of documents, with the BOS after each."""
    return sum(len(ids) + 1 for ids in tokenizer.encode_batch(documents))


def _check_token_files(shards: list[Shard], wanted: Wanted) -> None:
    """UsageError, with numbers, if the cache would not keep the token files of these shards."""
    # of bpe rather low, so that the estimate is high
    bytes_per_token = 1 if wanted.tokenizer in ("byte", "char") else 3
    # of vocabularies up to 65,536, as nearly all are
    id_bytes = 2
    size = id_bytes * sum(shard.n_bytes for shard in shards) / bytes_per_token
    limit = token_cache.CACHE_LIMIT_BYTES
    if size > limit:
        raise UsageError(
            f"{wanted.data}: the token files would take about {human_bytes(size)}, and the cache "
            f"keeps {human_bytes(limit)}: ask for less with --tokens or --shards"
        )


def _check_room(shards: list[Shard], wanted: Wanted) -> None:
    """UsageError, with numbers, if the disk has no room for the files of these shards.

    Token files do not count: their size is an estimate, which is not worth a refusal."""
    files = {file for shard in shards for file in shard.remote_files() if not file.is_local()}
    download = sum(file.n_bytes for file in files)
    folder = writable_base_dir()
    free = shutil.disk_usage(folder).free
    if download > free:
        raise UsageError(
            f"{wanted.data}: {counted(len(files), 'file')} of {human_bytes(download)} are missing, "
            f"and the disk of {folder} has {human_bytes(free)} free; ask for less with "
            f"--tokens or --shards, or set NANOCHAT_BASE_DIR"
        )


def _raise_if_missing(reasons: Iterable[str], others: str, what: str = "here") -> None:
    """Raise Unavailable, with all reasons, if there are any. others: what was not missing."""
    reasons = list(reasons)
    if reasons:
        lines = "\n".join(f"  {reason}" for reason in reasons)
        raise Unavailable(
            f"unavailable: {counted(len(reasons), 'file')}; {others} that were asked for are "
            f"{what}:\n{lines}"
        )
