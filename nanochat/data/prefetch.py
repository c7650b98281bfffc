"""Threads that work ahead of training: the next batches (Prefetcher), the next shards (Ahead)."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from nanochat.common import UsageError
from nanochat.data.download import Report
from nanochat.data.rows import Rows
from nanochat.data.token_cache import DataFailed, TokenCache
from nanochat.limits import available_cpus

# shards downloaded and tokenized beyond the one that training reads
AHEAD_SHARDS = 4
AHEAD_RETRY_SECONDS = 30.0

T = TypeVar("T")


class Interrupted(Exception):
    """The next item is not there yet, and whoever waits for it has something else to do first."""


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead.

    An exception of the iterator is raised at next() here. So is Interrupted when interrupted() is
    true while an item is waited for: a download may take long, and the run has something else to
    do."""

    def __init__(
        self,
        iterator: Iterator[T],
        depth: int = 4,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self.stopped = threading.Event()
        self.interrupted = interrupted
        self.thread = threading.Thread(
            target=self._run, args=(iterator,), name="data-prefetcher", daemon=True
        )
        self.thread.start()

    def _put(self, item: T | None, error: BaseException | None = None) -> None:
        while not self.stopped.is_set():
            try:
                self.queue.put((item, error), timeout=0.1)
                return
            # nobody may read any more: look whether the consumer has closed
            except queue.Full:
                continue

    def _run(self, iterator: Iterator[T]) -> None:
        try:
            for item in iterator:
                self._put(item)
                if self.stopped.is_set():
                    return
        except BaseException as error:
            # handed to the consumer, whatever it is
            self._put(None, error)

    def __next__(self) -> T:
        while True:
            try:
                item, error = self.queue.get(timeout=0.5)
                break
            except queue.Empty:
                if self.interrupted():
                    raise Interrupted from None
        try:
            if error is not None:
                raise error
        finally:
            # it would keep itself alive through this frame, and with it the frames of train.py
            del error
        return item

    def close(self) -> None:
        """End the thread.

        One that is tokenizing a shard is left behind: it is a daemon, and the next run builds the
        token file again."""
        self.stopped.set()
        self.thread.join(timeout=1)


class Ahead:
    """A thread that downloads and tokenizes the shards that training will read next.

    Up to AHEAD_SHARDS further on. Faults are reported and retried: they end training only when the
    shard itself is needed and still missing. rows: those that training reads, whose place is
    followed. last_row(): the end of the run, None while it is not known."""

    def __init__(
        self,
        rows: Rows,
        first_row: int,
        last_row: Callable[[], int | None],
        report: Report,
    ) -> None:
        # A cache of its own, since a TokenCache is for one thread. Half of the cores: one process
        # of a machine reads ahead, while all of them train.
        threads = max(1, available_cpus() // 2)
        cache = TokenCache(rows.cache.tokenizer, threads, rows.cache.lengths, report=self._say)
        self.rows = rows
        self.own = Rows(rows.corpus, cache, rows.T, rows.seed, rows.first_row)
        self.last_row = last_row
        self.report = report
        self.stopped = threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(first_row,), name="data-ahead", daemon=True
        )
        self.thread.start()

    def _say(self, line: str) -> None:
        self.report(line)

    def _run(self, row: int) -> None:
        reported = ""
        while not self.stopped.is_set() and not self._is_past_the_end(row):
            if self.own.reading > self.rows.reading + AHEAD_SHARDS:
                # far enough ahead: more would push out what training still needs
                self.stopped.wait(0.5)
                continue
            try:
                row = self._prepare_shard_of(row)
            except (DataFailed, UsageError) as error:
                # once, not at every attempt
                if str(error) != reported:
                    reported = str(error)
                    self._say(f"reading ahead failed, training continues: {error}")
                self.stopped.wait(AHEAD_RETRY_SECONDS)

    def _is_past_the_end(self, row: int) -> bool:
        last = self.last_row()
        return last is not None and row >= last

    def _prepare_shard_of(self, row: int) -> int:
        """Tokenize the shard that holds a row, and return the first row after it."""
        shard = self.own.shards[self.own.locate(row).shard_index]
        # locate() tokenizes it only where the shard's length is not known yet
        if not self.own.cache.path(shard).exists():
            self.own.cache.tokens(shard)
        return self.own.ends[self.own.reading]

    def close(self) -> None:
        """Ask the thread to end, without waiting: it may be in the middle of a download.

        Until it ends it reports nothing more, and keeps nothing of the run alive."""
        self.stopped.set()
        # the thread holds this object, and through these two would hold the run's log and its rows
        self.report = _ignore
        self.rows = self.own


def _ignore(line: str) -> None:
    """What a thread that is left behind reports to."""
