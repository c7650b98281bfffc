"""The client libraries of the Hugging Face hub, quiet and with their caches under base_dir()."""

import contextlib
import os
import threading

from nanochat.common import base_dir, install_hint

TIMEOUT_S = 30.0  # without a byte


def load_huggingface_hub():
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise install_hint("huggingface_hub", "a download from the Hugging Face hub") from None
    huggingface_hub.get_session().timeout = (
        TIMEOUT_S  # its default is to wait for ever, and most of HfApi takes no timeout
    )
    return huggingface_hub


_at_home = (
    threading.RLock()
)  # shards are read in several threads, and each must undo its own settings


@contextlib.contextmanager
def datasets_at_home(purpose):
    """The package datasets, for the time of a `with`: its and huggingface_hub's caches under base_dir(), no bars, no counters.

    The variables that choose those folders are read when the packages are imported, which may be long past. purpose: what
    needs it, for the UsageError where it is missing. One thread at a time."""
    try:
        import datasets
        import datasets.config
    except ImportError:
        raise install_hint("datasets", purpose) from None
    hub = load_huggingface_hub()
    folder = base_dir() / "hub" / "client"
    # HF_UPDATE_DOWNLOAD_COUNTS: datasets reports each use of a dataset to a server of its makers
    settings = [
        (hub.constants, "HF_HUB_CACHE", str(folder)),
        (datasets.config, "HF_DATASETS_CACHE", folder),
        (datasets.config, "DOWNLOADED_DATASETS_PATH", folder / "downloads"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]
    with _at_home:
        before = [(module, name, getattr(module, name)) for module, name, _ in settings]
        bars = not hub.utils.are_progress_bars_disabled()
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            hub.utils.disable_progress_bars()
            yield datasets
        finally:
            for module, name, value in before:
                setattr(module, name, value)
            if bars:
                hub.utils.enable_progress_bars()
