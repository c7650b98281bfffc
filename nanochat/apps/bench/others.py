"""The same model decoded by other programs: transformers' generate(), and llama.cpp for a llama.

Both read what `nanochat export` writes of the model, which compares greedy tokens in float32 before
anything is timed here."""

import copy
import importlib.util
import inspect
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanochat.common import counted, in_a_line
from nanochat.data.tokenizer import LLAMA_PATTERN, MIN_BPE_VOCAB, Tokenizer
from nanochat.eval.hf_model import quiet, run_code_from_throwaway_cache
from nanochat.eval.llama_server import LlamaServer, in_own_process, serving
from nanochat.run import checkpoint
from nanochat.run.folder import RunFolder
from nanochat.run.timing import Entry, timed

if TYPE_CHECKING:
    import transformers

    from nanochat.model.decoder import Decoder

# How tokens are chosen, here and there.
TEMPERATURE, TOP_K = 0.8, 50
# An export compares hundreds of tokens; beyond this, something hangs.
EXPORT_SECONDS = 1800
# --dtype of the export -> (its name in the table, bytes of a weight; of q8_0 with its scales).
GGUF_DTYPES = {"float32": ("f32", 4), "bfloat16": ("bf16", 2), "q8_0": ("q8_0", 34 / 32)}
# UTF-8 has none of these bytes, so no text contains the tokens that are made up of the others.
NOT_IN_UTF8 = 0xF8


@dataclass(frozen=True)
class Work:
    """What every program does. prompt: ids that are read before n_tokens are continued, for each of
    several numbers of texts. start: ids of the prompt whose first answer is timed.

    bandwidth: bytes per second that this machine reads from memory. ours: our median seconds by
    what was timed. report: prints a line, about what is left out."""

    prompt: tuple[int, ...]
    start: tuple[int, ...]
    n_tokens: int
    texts: tuple[int, ...]
    threads: int
    repeats: int
    bandwidth: float
    ours: dict[str, float]
    report: Callable[[str], None]

    def entry(self, program: str, what: str, seconds: list[float], weight_bytes: float) -> Entry:
        """The Entry of a program. what: a key of `ours`. weight_bytes: read for each new token."""
        entry = Entry(f"{program}, {what}", seconds, self.tokens_of(what))
        notes = []
        if what.startswith(tuple("0123456789")):
            share = weight_bytes * self.n_tokens / entry.median / self.bandwidth
            notes.append(f"weights are read at {share:.0%} of memory's speed")
        times = entry.median / self.ours[what]
        notes.append(f"nanochat is {times:.2g} times as fast")
        return Entry(entry.name, seconds, entry.tokens, note="; ".join(notes))

    def tokens_of(self, what: str) -> int | None:
        """Tokens that one repetition processes."""
        if what == "prefill":
            return len(self.prompt)
        if what == "first token":
            return None
        return int(what.split()[0]) * self.n_tokens


def time_others(model: "Decoder", work: Work) -> Iterator[Entry]:
    """The entries of the other programs. model: with the weights that were trained, in fp32."""
    if model.config.vocab_size < MIN_BPE_VOCAB:
        work.report(
            f"other programs: left out, since --vocab-size={model.config.vocab_size} is too small "
            f"for a tokenizer; give at least {MIN_BPE_VOCAB}"
        )
        return
    programs = {"transformers": ["transformers"]}
    if model.config.arch == "llama" and model.embedding.weight.device.type == "cpu":
        programs["llama.cpp"] = ["gguf", "xllamacpp"]
    for program, packages in programs.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            work.report(f"{program}: left out; to see it: pip install {' '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
            run = run_folder_of(model, Path(folder) / "run")
            if program == "transformers":
                yield from _transformers(model, run, work)
            else:
                yield from _llama_cpp(model, run, work)


def run_folder_of(model: "Decoder", folder: Path) -> Path:
    """A run folder with the model and a made-up tokenizer, as `nanochat export` reads it."""
    tokenizer = made_up_tokenizer(model.config.vocab_size)
    folder.mkdir()
    RunFolder(folder).write_config({"args": {}, "model": asdict(model.config)})
    tokenizer.save(folder / "tokenizer")
    checkpoint.save(folder, 0, "final", model, {}, {"tokenizer": tokenizer.fingerprint})
    return folder


def made_up_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-pair encoding that llama.cpp can read: bytes, and as many pairs and longer tokens."""
    tokens = [bytes([byte]) for byte in range(256)]
    ends = range(NOT_IN_UTF8)
    # Each is one merge of an earlier token and a byte.
    for length in itertools.count(2):
        for combination in itertools.product(ends, repeat=2):
            if len(tokens) == vocab_size - 1:
                return Tokenizer("bpe", tokens, LLAMA_PATTERN)
            tokens.append(bytes([0] * (length - 2)) + bytes(combination))
    raise AssertionError("unreachable")


def exported(
    run: Path, target: str, dtype: str, program: str, report: Callable[[str], None]
) -> Path | None:
    """The exported folder, or None after a line that says why there is none."""
    out = run.with_name(f"{target}-{dtype}")
    words = [str(run), str(out), f"--format={target}", f"--dtype={dtype}"]
    command = [sys.executable, "-m", "nanochat", "export", *words]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=EXPORT_SECONDS)
    except subprocess.TimeoutExpired:
        report(f"{program}: left out, since its export took over {EXPORT_SECONDS} s")
        return None
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        report(f"{program}: left out: {last}")
        return None
    return out


# ---- transformers ----


def _transformers(model: "Decoder", run: Path, work: Work) -> Iterator[Entry]:
    folder = exported(run, "hf", "float32", "transformers", work.report)
    if folder is None:
        return
    run_code_from_throwaway_cache()
    import transformers

    device = model.embedding.weight.device
    dtype = model.compute_dtype
    with quiet(transformers), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            # What stands there is the modelling file of this program.
            trust_remote_code=model.config.arch != "llama",
        )
        theirs = theirs.to(device).eval()
        # As here, every text is continued to the same length.
        theirs.generation_config.eos_token_id = None
        n_bytes = _weights_read(model) * dtype.itemsize
        for texts in work.texts:
            seconds = _seconds_of_generate(theirs, work, texts, device)
            yield work.entry("transformers", counted(texts, "text"), seconds, n_bytes)
        for what, ids in (("prefill", work.prompt), ("first token", work.start)):
            rows = torch.tensor([ids], device=device)
            first = partial(_generate, theirs, rows, 1)
            yield work.entry("transformers", what, timed(first, device, work.repeats), n_bytes)


def _weights_read(model: "Decoder") -> int:
    """Weights that a new token reads: all but the embedding, of which it reads one row."""
    return sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()


def _seconds_of_generate(
    theirs: "transformers.PreTrainedModel", work: Work, texts: int, device: torch.device
) -> list[float]:
    """Seconds to continue texts whose prompts have been read."""
    # transformers 5.24 renamed past_key_values to cache, for arguments and for results.
    known = inspect.signature(theirs.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    rows = torch.tensor([work.prompt], device=device).expand(texts, -1)
    read = theirs(rows, use_cache=True)[name]
    # Its key and value are not in the cache yet: the first step computes them.
    rows = torch.cat((rows, rows[:, -1:]), dim=1)
    arguments: dict[str, Any] = {}

    def fresh() -> None:
        # generate() appends to the cache that it is given.
        arguments[name] = copy.deepcopy(read)

    def write() -> None:
        _generate(theirs, rows, work.n_tokens, **arguments)

    return timed(write, device, work.repeats, before=fresh)


def _generate(
    theirs: "transformers.PreTrainedModel", rows: torch.Tensor, n_tokens: int, **cache: Any
) -> None:
    found = theirs.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=n_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=TOP_K,
        use_cache=True,
        pad_token_id=0,
        **cache,
    )
    assert found.size(1) == rows.size(1) + n_tokens


# ---- llama.cpp ----


def _llama_cpp(model: "Decoder", run: Path, work: Work) -> Iterator[Entry]:
    for dtype, (short, weight_bytes) in GGUF_DTYPES.items():
        program = f"llama.cpp {short}"
        folder = exported(run, "gguf", dtype, program, work.report)
        if folder is None:
            # Another dtype may do: q8_0 needs rows of a multiple of 32.
            continue
        path = folder / "model.gguf"
        # report() stays here: it cannot be sent to another process.
        plain = asdict(work) | {"report": None}
        try:
            found = in_own_process(_seconds_of_llama_cpp, path, model.config.max_seq_len, plain)
        # Of any class, as llama.cpp's errors are.
        except Exception as error:
            work.report(f"{program}: left out: {in_a_line(error)}")
            continue
        n_bytes = _weights_read(model) * weight_bytes
        for what, seconds in found.items():
            yield work.entry(program, what, seconds, n_bytes)


def _seconds_of_llama_cpp(
    path: Path, context_tokens: int, values: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds by what was timed, as llama.cpp's server itself reports them: without HTTP."""
    work = Work(**values)
    found = {}
    for texts in work.texts:
        # As many slots as texts: empty ones would cost time.
        with serving(path, context_tokens, slots=texts, threads=work.threads) as server:
            # The first call reads the prompts, which then stay in their slots.
            seconds = [_continued(server, work, texts) for _ in range(work.repeats + 1)]
            found[counted(texts, "text")] = seconds[1:]
            if texts == 1:
                for what, ids in (("prefill", work.prompt), ("first token", work.start)):
                    body = {"prompt": ids, "n_predict": 1, "cache_prompt": False}
                    seconds = []
                    for _ in range(work.repeats + 1):
                        timings = server.post("/completion", body)["timings"]
                        seconds.append(timings["prompt_ms"] / 1000)
                    found[what] = seconds[1:]
    return found


def _continued(server: LlamaServer, work: Work, texts: int) -> float:
    """Seconds to continue texts together by n_tokens each."""

    def ask(slot: int) -> dict[str, Any]:
        body = {
            "prompt": work.prompt,
            "id_slot": slot,
            "cache_prompt": True,
            # The first one belongs to the prompt, and the clock starts behind it.
            "n_predict": work.n_tokens + 1,
            "ignore_eos": True,
            "samplers": ["top_k", "temperature"],
            "temperature": TEMPERATURE,
            "top_k": TOP_K,
            "seed": slot,
        }
        return server.post("/completion", body)["timings"]

    with ThreadPoolExecutor(texts) as pool:
        timings = list(pool.map(ask, range(texts)))
    assert all(each["predicted_n"] == work.n_tokens + 1 for each in timings)
    return max(each["predicted_ms"] for each in timings) / 1000
