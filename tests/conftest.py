"""Set-up shared by all tests. Run pytest from the repository root; pyproject.toml puts it on the
import path."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from ports import free_port

from nanochat import common

# huggingface_hub and datasets read these variables once, when they are first imported, so they are
# set before any test module is. Nothing listens on the port unless a test uses the fixture `hub`:
# without it, a test has no network.
HUB_PORT = free_port()
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_PORT}",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=tempfile.mkdtemp(prefix="nanochat-hf-"),
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it, deterministic products on a GPU are refused
for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(variable, None)
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in `bash runs/test.sh &`; what tests start would ignore Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def settled_environment(tmp_path_factory):
    """Caches and downloads go to a throw-away folder; results do not depend on the number of cores
    or on luck."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("nanochat_base")))
        for variable in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
        ):  # set by torchrun, they mean other processes to wait for
            patch.delenv(variable, raising=False)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        yield


@pytest.fixture
def hub():
    """A local stand-in for the Hugging Face hub (tests/hub_server.py), at the address that
    HF_ENDPOINT names."""
    from hub_server import HubServer

    with HubServer(HUB_PORT) as server:
        yield server


@pytest.fixture
def shared_base(monkeypatch):
    """A base dir; with disk.read_only() it is one that this user may only read. Next to it is the
    user's home folder. Not below pytest's own folder, which is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-users-"))
    folder.chmod(0o755)
    base, home = folder / "shared", folder / "home"
    base.mkdir()
    home.mkdir()
    home.chmod(0o777)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(common, "_noted", set())
    yield base
    shutil.rmtree(folder)
