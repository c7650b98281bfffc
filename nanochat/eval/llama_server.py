"""llama.cpp on this machine, by the package xllamacpp: its server on a free port."""

import contextlib
import http.client
import json
import multiprocessing
import os
import secrets
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LlamaServer:
    """Where a server listens, and the key that it wants."""

    address: str
    key: str

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON that the server answers. RuntimeError for another status than 200."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with contextlib.closing(http.client.HTTPConnection(self.address)) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        if response.status != 200:
            raise RuntimeError(f"status {response.status} of {path}: {content[:200]!r}")
        return json.loads(content)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """function(*arguments) in a process of its own: on bad files llama.cpp aborts its process.

    Raises what the function raises, and RuntimeError if the process died."""
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise RuntimeError("its process died") from None


@contextlib.contextmanager
def serving(
    path: Path, context_tokens: int, *, slots: int = 1, threads: int = -1, exact: bool = False
) -> Iterator[LlamaServer]:
    """Serve a gguf file inside the `with`. For in_own_process(): output is silenced for good.

    context_tokens: of each of the texts (slots) that are continued together. threads: -1: as
    llama.cpp chooses. exact: keep keys and values in fp32 instead of fp16."""
    import xllamacpp

    # llama.cpp logs to both, whatever its verbosity.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = context_tokens * slots
    parameters.n_parallel = slots
    parameters.n_threads_http = slots + 2
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    parameters.warmup = False
    # Any free port, and for nobody else.
    parameters.port = 0
    key = secrets.token_hex()
    parameters.api_keys = [key]
    if exact:
        parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = flash
    server = xllamacpp.Server(parameters)
    yield LlamaServer(urllib.parse.urlsplit(server.listening_address).netloc, key)
    # It ends with its process; without a name here it would end sooner.
    del server
