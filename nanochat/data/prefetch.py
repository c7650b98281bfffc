"""Threads that work ahead of training: batches (Prefetcher), shards (Ahead)."""

import queue
import threading

from nanochat.common import UsageError
from nanochat.data.rows import Rows
from nanochat.data.token_cache import DataFailed, TokenCache

AHEAD_SHARDS = 4  # shards fetched and tokenized beyond the one that training reads


AHEAD_RETRY_SECONDS = 30.0


class Ahead:
    """A thread that fetches and tokenizes the shards that training will read next, up to AHEAD_SHARDS further on.

    Trouble is reported and tried again later: it ends training only when the shard itself is needed and still missing.
    rows: those of this process, whose place is followed. last_row(): the end of the run, None while it is not known."""

    def __init__(self, rows, first_row, last_row, report):
        cache = TokenCache(
            rows.cache.tokenizer, max(1, rows.cache.threads // 2), rows.cache.lengths, report=report
        )
        self.rows, self.own = (
            rows,
            Rows(rows.corpus, cache, rows.T, rows.seed),
        )  # its own cache: TokenCache is for one thread
        self.last_row, self.report, self.stopped = last_row, report, threading.Event()
        self.thread = threading.Thread(
            target=self._run, args=(first_row,), name="data-ahead", daemon=True
        )
        self.thread.start()

    def _run(self, row):
        told = ""
        while not self.stopped.is_set() and (self.last_row() is None or row < self.last_row()):
            if self.own.reading > self.rows.reading + AHEAD_SHARDS:
                self.stopped.wait(0.5)
                continue
            try:
                shard = self.own.shards[self.own.locate(row)[1]]
                if not self.own.cache.path(
                    shard
                ).exists():  # locate() makes it only where the shard's length is not known yet
                    self.own.cache.tokens(shard)
                row = self.own.ends[self.own.reading]
            except (DataFailed, UsageError) as error:
                if str(error) != told:  # once, not at every attempt
                    told = str(error)
                    self.report(f"reading ahead failed, training goes on: {error}")
                self.stopped.wait(AHEAD_RETRY_SECONDS)

    def close(self):
        """Ask the thread to end. It is not waited for: it may be in the middle of a download, which the next run continues."""
        self.stopped.set()


class Prefetcher:
    """Runs an iterator in a thread, a few items ahead. An exception there is raised at next() here, and DataFailed when
    interrupted() becomes true while an item is waited for: a download may take long, and the run is to leave."""

    def __init__(self, iterator, depth=4, interrupted=lambda: False):
        self.queue, self.stopped, self.interrupted = (
            queue.Queue(depth),
            threading.Event(),
            interrupted,
        )
        self.thread = threading.Thread(
            target=self._run, args=(iterator,), name="data-prefetcher", daemon=True
        )
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
        while True:
            try:
                item, error = self.queue.get(timeout=0.5)
                break
            except queue.Empty:
                if self.interrupted():
                    raise DataFailed("asked to stop while waiting for training data") from None
        try:
            if error is not None:
                raise error
        finally:
            del error  # or it would keep itself alive through this frame, and with it the frame of train.py and all that it holds
        return item

    def close(self):
        """End the thread. One that is making a token file is left behind: it is a daemon, and the file is made again."""
        self.stopped.set()
        self.thread.join(timeout=1)
