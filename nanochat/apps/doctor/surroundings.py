"""What lies around the machine: disk space, the dataset hub, an account for Weights & Biases."""

import netrc
import os
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

from nanochat.common import UsageError, in_a_line

# How long to wait for the dataset hub, its name look-up included.
NETWORK_SECONDS = 6


class Place(NamedTuple):
    """A folder that exists or would be created. problem: why nothing can be written there."""

    path: str | None
    free_bytes: int | None
    problem: str | None


class Hub(NamedTuple):
    """The dataset hub. problem: why it cannot be reached, or None."""

    address: str
    problem: str | None


def disk(folder: Callable[[], object]) -> Place:
    """The Place of folder(), whose UsageError is its problem."""
    try:
        path = os.path.abspath(folder())
    except UsageError as error:
        return Place(os.environ.get("NANOCHAT_BASE_DIR"), None, str(error))
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        # Permissions do not tell about quotas and read-only mounts; a write does, and leaves
        # nothing behind.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
        return Place(path, shutil.disk_usage(existing).free, None)
    except OSError as error:
        return Place(path, None, f"{existing} cannot be written ({error.strerror})")


def ask_hub(seconds: float = NETWORK_SECONDS) -> Callable[[], Hub]:
    """Ask the dataset hub in the background. Returns a function that waits for the answer, until
    `seconds` after the question."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return lambda: Hub(address, "HF_HUB_OFFLINE is set")
    answers = [f"no answer within {seconds:g} s"]
    started = time.monotonic()

    def ask() -> None:
        answers.append(_problem_of_hub(address, seconds))

    def answer() -> Hub:
        asking.join(max(0, started + seconds - time.monotonic()))
        return Hub(address, answers[-1])

    # A thread, because the look-up of a name takes no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    return answer


def _problem_of_hub(address: str, seconds: float) -> str | None:
    """Why a request to the hub fails, or None. Proxies are taken from the environment."""
    try:
        request = urllib.request.Request(
            address, method="HEAD", headers={"User-Agent": "nanochat-doctor"}
        )
        with urllib.request.build_opener().open(request, timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        # Any answer shows that the hub is reachable, unless the proxy or the server itself failed.
        failed = error.code == 407 or error.code >= 500
        return f"error {error.code}" if failed else None
    except Exception as error:
        return in_a_line(getattr(error, "reason", None) or error)


def wandb_account() -> str | None:
    """Where a Weights & Biases key is configured, never the key itself: a variable, or a file."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = urllib.parse.urlsplit(address).hostname
    given = os.environ.get("NETRC")
    for path in [given] if given else ["~/.netrc", "~/_netrc"]:
        try:
            if host in netrc.netrc(os.path.expanduser(path)).hosts:
                return path
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            pass
    return None
