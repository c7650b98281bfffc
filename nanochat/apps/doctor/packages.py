"""The packages that nanochat uses, and which of them are installed."""

import importlib.metadata
import importlib.util
import os
import shutil
from typing import NamedTuple


class Package(NamedTuple):
    """requirement: what pip is asked for. purpose: what cannot be done without it."""

    requirement: str
    purpose: str


# By the name under which pip knows it. Training needs these,
NEEDED = {
    "torch": Package("torch==2.13.0", "everything"),
    "numpy": Package("numpy", "everything"),
    "tiktoken": Package("tiktoken>=0.13", "tokenizers"),
    "safetensors": Package("safetensors", "checkpoints"),
    "rustbpe": Package("rustbpe>=0.1.0", "training a tokenizer"),
    "tqdm": Package("tqdm", "progress bars"),
}
# and single features need these.
OPTIONAL = {
    "datasets": Package("datasets>=5", "--data=hf:..."),
    "wandb": Package("wandb", "--run"),
    "torchao": Package("torchao==0.18.0", "--fp8"),
    "pyyaml": Package("pyyaml", "the CORE metric"),
    "matplotlib": Package("matplotlib", "nanochat report and compare"),
    "tensorboard": Package("tensorboard", "--tensorboard"),
    "transformers": Package("transformers>=4.57", "nanochat export"),
    "tokenizers": Package("tokenizers>=0.22", "nanochat export"),
    "gguf": Package("gguf>=0.19", "nanochat export --format gguf"),
    "starlette": Package("starlette", "nanochat serve"),
    "uvicorn": Package("uvicorn", "nanochat serve"),
    "plotext": Package("plotext>=6", "the picture of nanochat jobs watch"),
    "pytest": Package("pytest", "the tests"),
    "pytest-xdist": Package("pytest-xdist", "the tests"),
    "ruff": Package("ruff>=0.17", "the tests"),
    "httpx": Package("httpx", "the tests"),
    "openai": Package("openai", "the tests"),
    "triton": Package("triton==3.7.1", "torch.compile on NVIDIA GPUs"),
}


def installed() -> dict[str, str | None]:
    """{package: version}: "unknown" for one that can be imported but has no record of its version,
    None for one that is missing."""
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            spec = importlib.util.find_spec(name)
            # A folder of that name in the current folder has a spec too, but no origin.
            importable = spec is not None and spec.origin is not None
            versions[name] = "unknown" if importable else None
    return versions


def missing(versions: dict[str, str | None], has_nvidia_gpu: bool) -> list[str]:
    """The packages that are not installed and would be of use on this machine."""
    names = [name for name, version in versions.items() if version is None]
    # triton compiles for NVIDIA GPUs only.
    return [name for name in names if name != "triton" or has_nvidia_gpu]


def nvidia_gpu_present() -> bool:
    """Whether the system has an NVIDIA GPU, even if torch cannot use it."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None
