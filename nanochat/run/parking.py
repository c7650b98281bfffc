"""A paused run gives back the memory of its GPU."""

import contextlib
from collections.abc import Iterable, Iterator

import torch


@contextlib.contextmanager
def in_host_memory(tensors: Iterable[torch.Tensor], device_type: str) -> Iterator[None]:
    """While the body runs, the memory of these tensors is free for other programs, and their
    content is kept in host memory. The tensors stay the same objects, and so do views of them.

    device_type: where they are; on a CPU there is nothing to gain, and nothing happens."""
    storages = {}
    if device_type != "cpu":
        storages = {s.data_ptr(): s for s in (tensor.untyped_storage() for tensor in tensors)}
    # clone(): cpu() gives a storage back that is in host memory already
    copies = [(storage, storage.cpu().clone()) for storage in storages.values()]
    for storage, _ in copies:
        storage.resize_(0)
    if device_type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for storage, copy in copies:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
