"""The client libraries of the Hugging Face hub: quiet, with a timeout, caches under base_dir().

Both are imported where they are needed first, since they take a second to load and a run whose
data is on disk needs neither."""

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from nanochat import locks
from nanochat.common import in_a_line, install_hint, own_cache

# seconds without a byte, for the requests that this program makes itself
TIMEOUT_S = 30.0

# The name and the report function of the download that a thread is busy with.
_current = threading.local()
# Shards are read in several threads, and each has to restore the settings that it found.
_settings_lock = threading.RLock()
# of lockable_folder()
_temporary: tempfile.TemporaryDirectory | None = None


def client_folder() -> str:
    """Folder for what the two libraries keep: README and configuration files of datasets."""
    return str(own_cache("hub/client", make=False))


def lockable_folder() -> str:
    """client_folder(); if that has no file locks, without which the libraries write nothing, a
    temporary folder that this process deletes when it ends."""
    global _temporary
    folder = Path(client_folder())
    folder.mkdir(parents=True, exist_ok=True)
    with locks.open_lock(folder / ".lock") as lock:
        if locks.take(lock, folder, shared=True) is not locks.Lock.NONE:
            return str(folder)
    if _temporary is None:
        _temporary = tempfile.TemporaryDirectory(prefix="nanochat-client-")
    return _temporary.name


def load_huggingface_hub() -> ModuleType:
    """The package huggingface_hub. UsageError with the way to install it if it is missing."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # read by hf_xet, which transfers large files, and by nothing else
    os.environ.setdefault("HF_XET_CACHE", f"{client_folder()}/xet")
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise install_hint("huggingface_hub", "a download from the Hugging Face hub") from None
    # its default is to wait for ever, and most of HfApi takes no timeout
    huggingface_hub.get_session().timeout = TIMEOUT_S
    logging.getLogger("huggingface_hub").handlers = [_reporting]
    return huggingface_hub


class _ReportingHandler(logging.Handler):
    """Hands the first warning of huggingface_hub during a download to whom it concerns.

    The library logs each of its retries, with signed addresses of several lines."""

    def emit(self, record: logging.LogRecord) -> None:
        report = getattr(_current, "report", None)
        if report is None:
            return
        _current.report = None
        said = re.sub(r"https?://\S*[^\s:]", "the server", record.getMessage().splitlines()[0])
        report(f"data: {_current.name}: {in_a_line(said)}; trying again")


_reporting = _ReportingHandler(logging.WARNING)


@contextlib.contextmanager
def warnings_reported(name: str, report: Callable[[str], None]) -> Iterator[None]:
    """Inside the `with`, report one line, about `name`, if huggingface_hub retries a request."""
    _current.name = name
    _current.report = report
    try:
        yield
    finally:
        _current.report = None


@contextlib.contextmanager
def quiet_datasets(purpose: str, folder: str = "") -> Iterator[ModuleType]:
    """The package datasets, inside a `with`: caches in a folder, no bars, no usage counts.

    folder: client_folder() by default.

    The variables that choose these folders are read when the packages are imported, which may be
    long past, so their settings are changed and restored. One thread at a time.
    Raises UsageError if the package is missing; purpose: what needs it."""
    try:
        import datasets
        import datasets.config
    except ImportError:
        raise install_hint("datasets", purpose) from None
    hub = load_huggingface_hub()
    # HF_UPDATE_DOWNLOAD_COUNTS: datasets reports each use of a dataset to a server of its makers
    folder = folder or client_folder()
    settings = [
        (hub.constants, "HF_HUB_CACHE", folder),
        (datasets.config, "HF_DATASETS_CACHE", folder),
        (datasets.config, "DOWNLOADED_DATASETS_PATH", f"{folder}/downloads"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]
    with _settings_lock:
        before = [(module, name, getattr(module, name)) for module, name, _ in settings]
        bars_were_on = not hub.utils.are_progress_bars_disabled()
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            hub.utils.disable_progress_bars()
            yield datasets
        finally:
            for module, name, value in before:
                setattr(module, name, value)
            if bars_were_on:
                hub.utils.enable_progress_bars()
