"""From a run to one HTML file: packed weights, tokenizer and a player that runs in any browser.

The file needs no network, and its Content-Security-Policy allows none. All data stand in elements
that no browser executes: weights in base64, the rest as JSON without characters of markup."""

import base64
import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanochat import load
from nanochat.apps.export.packed_weights import GROUP, pack, packed_bytes, unpack
from nanochat.apps.export.verify import ExportFailed
from nanochat.common import (
    Unavailable,
    UsageError,
    human_bytes,
    policy_hashes,
    valid_unicode,
    write_atomic,
)
from nanochat.data.chat import START_OF_ROLE, is_chat
from nanochat.data.tokenizer import BLANKS_AT_ONCE, TURN_END, Tokenizer
from nanochat.eval.generation import NotNumbers, generate_ids
from nanochat.run.loading import step_of

if TYPE_CHECKING:
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder

# The page, and what its worker runs.
PAGE = Path(__file__).with_name("player.html")
ENGINE = Path(__file__).with_name("player.js")
# How far any logit may be from the fp32 model's. The comparison reads a small part of the text that
# the page may write, so a variant is taken only if it keeps MARGIN of the bound free.
BOUND = 1e-2
MARGIN = 0.5
# Bits of the matrices and value embeddings, and of the embedding table and the head, whose rounding
# changes logits most; tried in this order. Norms, gates and other small tensors have 32.
VARIANTS = ((8, 8), (12, 12), (12, 16), (16, 16))
# Text that the model writes for the comparison: rows, and tokens of a row at most.
ROWS = 4
ROW_TOKENS = 256
# Larger pages were not tried; browsers cut texts at 512 MiB and tabs at a few GB.
LARGEST_PAGE = 400 * 2**20
# Bytes of weights in one element: a multiple of 3, which base64 writes without padding.
PART_BYTES = 12 * 2**20
# What patterns call letters, numbers and blanks; a browser has its own idea of them.
CLASSES = (r"\p{L}", r"\p{N}", r"\s")
# Syntax that JavaScript lacks or reads otherwise.
FOREIGN = re.compile(r"\(\?[^:=!]|([*+?]|\d\})\+|\\[^nprsS]")


@dataclass(frozen=True)
class Tensors:
    """All weights of a model, packed. entries: name, shape, bits and offset of each."""

    entries: list[dict[str, Any]]
    content: bytes

    def unpacked(self) -> dict[str, Tensor]:
        """The weights in fp32, as the page reads them."""
        found = {}
        for entry in self.entries:
            shape = tuple(entry["shape"])
            size = packed_bytes(torch.Size(shape).numel(), entry["bits"])
            content = self.content[entry["offset"] : entry["offset"] + size]
            found[entry["name"]] = unpack(content, shape, entry["bits"])
        return found


def export_html(run: Path, out: Path, step: int | str | None) -> None:
    """Write the file `out` of a run's checkpoint, and print how far its logits are from fp32's.

    step: of a checkpoint, "best", or None for the newest intact one. Raises UsageError for an
    unusable run or `out`, or a model or tokenizer that the page cannot have; ExportFailed if no
    variant keeps the bound; Unavailable if the file cannot be written. Then nothing is left."""
    _check_out(out)
    if (run / "generation_config.json").exists():
        raise UsageError(
            f"{run} is a Hugging Face folder; create a run from it with --format run, and export "
            "that run"
        )
    step = step_of(run, step)
    model, tokenizer = load(run, step, device_type="cpu", dtype="float32")
    _check_size(model)
    about = {
        "name": valid_unicode(run.absolute().name),
        "step": step,
        "parameters": model.count_parameters()["total"],
        "shape": shape_of(model),
        "tokenizer": tokenizer_table(tokenizer),
        "group": GROUP,
    }
    variant, said = smallest_variant(model, tokenizer.bos)
    about |= {"bits": variant.bits, "difference": variant.difference}
    html = page_of(about, variant.tensors)
    # What was measured is what a browser reads.
    if weights_in(html) != variant.tensors:
        raise ExportFailed("read back, the page holds other weights")
    _write(out, html)
    print(f"{said}; {human_bytes(len(html.encode()))} page of {run} at step {step}: {out}")


def _check_out(out: Path) -> None:
    """UsageError if `out` cannot be the name of a new page."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"--format html: {out} is to be one file; give it a name that ends in .html"
        )
    if out.exists():
        raise UsageError(f"{out} exists; name another file, or delete it first")


def _check_size(model: "Decoder") -> None:
    """UsageError for a model whose page may be too large, if it takes the most bits."""
    # base64 writes three bytes as four characters
    most = max(VARIANTS[-1])
    size = sum(packed_bytes(p.numel(), most) for p in model.parameters()) * 4 // 3
    if size > LARGEST_PAGE:
        raise UsageError(
            f"--format html: the page may have {human_bytes(size)}, and browsers may not open more "
            f"than {human_bytes(LARGEST_PAGE)}; export a smaller model, or use --format hf or gguf"
        )


def _write(out: Path, html: str) -> None:
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, html)
    except OSError as error:
        raise Unavailable(f"{out} cannot be written ({error.strerror or error})") from None


# ---- the model ----


def shape_of(model: "Decoder") -> dict[str, Any]:
    """What the player needs to know about a model besides its weights."""
    config = model.config
    return {
        "arch": config.arch,
        "depth": config.depth,
        "width": config.width,
        "mlp_width": model.blocks[0].mlp.up.out_features,
        "n_head": config.n_head,
        "n_kv_head": config.n_kv_head,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_seq_len,
        "positions": model.rope_cos.size(0),
        "windows": config.windows(),
        "key_shift": config.key_shift,
        "backout_layer": max(0, config.depth // 2 - 1),
        # The angles of position 1 are the frequencies.
        "frequencies": model.rotary_angles()[1].tolist(),
        # transformers computes a Llama's angles in fp32, and so does ours.
        "rounds_angles": config.arch == "llama",
        "norm_eps": _norm_eps(config),
        "softcap": model.softcap,
    }


def _norm_eps(config: "GPTConfig") -> float:
    from nanochat.model.layers import NORM_EPS
    from nanochat.model.llama import LLAMA_NORM_EPS

    return LLAMA_NORM_EPS if config.arch == "llama" else NORM_EPS


def packed_weights(model: "Decoder", bits: int, outer_bits: int) -> Tensors:
    """The weights of a model. outer_bits: of the embedding table and the head."""
    groups = model.parameter_groups()
    own_bits = dict.fromkeys(groups["scalars"], 32)
    own_bits |= dict.fromkeys((*groups["embedding"], *groups["unembedding"]), outer_bits)
    entries = []
    parts = []
    offset = 0
    for name, tensor in model.state_dict().items():
        n_bits = own_bits.get(name, bits)
        entries.append(
            {"name": name, "shape": list(tensor.shape), "bits": n_bits, "offset": offset}
        )
        parts.append(pack(tensor, n_bits))
        offset += len(parts[-1])
    return Tensors(entries, b"".join(parts))


@dataclass(frozen=True)
class Variant:
    """The weights with some number of bits. difference: the largest of any logit from fp32's."""

    bits: int
    outer_bits: int
    tensors: Tensors
    difference: float

    def in_words(self) -> str:
        """What to print about it."""
        size = human_bytes(len(self.tensors.content))
        bits = f"{self.bits} bits a weight"
        if self.outer_bits != self.bits:
            bits += f", {self.outer_bits} in embedding and head"
        return f"{bits} ({size}) change logits by up to {self.difference:.1e}"


@torch.no_grad()
def smallest_variant(model: "Decoder", bos: int) -> tuple[Variant, str]:
    """The variant with the fewest bits that keeps the bound, and what was measured, to print.

    Raises ExportFailed if none does. The model is left with rounded weights."""
    ids = own_text(model, bos)
    expected = model(ids)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tried = []
    for bits, outer_bits in VARIANTS:
        model.load_state_dict(weights)
        tensors = packed_weights(model, bits, outer_bits)
        # The model computes with what a reader of the page unpacks.
        model.load_state_dict(tensors.unpacked())
        difference = (model(ids) - expected).abs().max().item()
        tried.append(Variant(bits, outer_bits, tensors, difference))
        said = "; ".join(variant.in_words() for variant in tried)
        # written so that NaN fails
        if difference <= BOUND * MARGIN:
            return tried[-1], f"{said}, measured on {ids.numel():,} tokens of its own text"
    raise ExportFailed(
        f"no variant keeps the logits within {BOUND:g} of fp32's with room to spare ({said}); use "
        "--format hf, which keeps fp32"
    )


def own_text(model: "Decoder", bos: int) -> Tensor:
    """Ids that a model writes, int64 (ROWS, T), BOS first: a page's logits matter on such text.

    Raises UsageError if the model's logits are not numbers."""
    length = max(2, min(model.config.max_seq_len, ROW_TOKENS))
    try:
        steps = list(generate_ids(model, [bos], length - 1, seed=0, num_samples=ROWS))
    except NotNumbers as error:
        raise UsageError(str(error)) from None
    return torch.tensor([[bos] * ROWS, *steps]).T.contiguous()


# ---- the tokenizer ----


def tokenizer_table(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer for the player, with the same ids for every text.

    UsageError if JavaScript has no pattern that splits text as this one does."""
    table = {
        "kind": tokenizer.kind,
        "tokens": [base64.b64encode(token).decode("ascii") for token in tokenizer.tokens],
        # BOS first; their ids follow those of the tokens
        "specials": [tokenizer.bos_text, *tokenizer.specials],
        "end_ids": sorted(tokenizer.end_ids),
        "chat": _chat_ids(tokenizer) if is_chat(tokenizer) else None,
        # Longer texts are cut before they are split, which the player does not do.
        "longest_text": BLANKS_AT_ONCE,
    }
    if tokenizer.kind != "bpe":
        return table
    classes = {name: character_class(name) for name in CLASSES}
    return table | {"pattern": javascript_pattern(tokenizer.pattern), "classes": classes}


def _chat_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that begin the messages of each role, and the one that ends them."""
    ids = {role: tokenizer.special_ids[name] for role, name in START_OF_ROLE.items()}
    return ids | {"end": tokenizer.special_ids[TURN_END]}


def javascript_pattern(pattern: str) -> str:
    r"""A split pattern in JavaScript's syntax, with its CLASSES only between brackets, where the
    player puts their characters.

    UsageError if it has syntax that is not translated."""
    # A possessive quantifier at the end of its alternative gives nothing back anyway.
    ours = re.sub(r"\+\+(?=\$?(\||$))", "+", pattern)
    if FOREIGN.search(ours):
        raise UsageError(
            "--format html: a browser cannot split text as this run's tokenizer does, so the page "
            "would feed the model other tokens than it was trained on; use --format hf"
        )
    bracketed = {r"\p{L}": r"[\p{L}]", r"\p{N}": r"[\p{N}]", r"\s": r"[\s]", r"\S": r"[^\s]"}
    # A class in brackets already is matched as a whole, and stays.
    return re.sub(
        r"\[[^\]]*\]|\\p\{[LN]\}|\\[sS]", lambda found: bracketed.get(found[0], found[0]), ours
    )


@functools.cache
def character_class(name: str) -> str:
    r"""The characters of a class such as \p{L}, as ranges between the brackets of a JavaScript
    pattern.

    tiktoken's own engine is asked: what is a letter depends on the Unicode version, which
    differs from browser to browser, and from Python's."""
    import tiktoken

    bytes_only = {bytes([i]): i for i in range(256)}
    engine = tiktoken.Encoding(
        "class", pat_str=f"{name}+", mergeable_ranks=bytes_only, special_tokens={}
    )
    # what the pattern leaves out gets no ids
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    found = engine.decode(engine.encode_ordinary(everything))
    return "".join(
        f"\\u{{{first:x}}}-\\u{{{last:x}}}" for first, last in _ranges([ord(c) for c in found])
    )


def _ranges(points: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of consecutive numbers in a sorted list."""
    first = points[0]
    for point, following in zip(points, [*points[1:], None]):
        if following != point + 1:
            yield first, point
            first = following


# ---- the page ----


def page_of(about: dict[str, Any], tensors: Tensors) -> str:
    """The page. about: everything that the player shows or computes with, but for the tensors."""
    template = PAGE.read_text(encoding="utf-8")
    described = about | {"tensors": tensors.entries, "weight_bytes": len(tensors.content)}
    content = {
        "POLICY": _policy(template),
        "ABOUT": json_for_markup(described),
        "ENGINE": ENGINE.read_text(encoding="utf-8"),
        "WEIGHTS": "\n".join(
            f'<script type="application/octet-stream" class="weights">{part}</script>'
            for part in _base64_parts(tensors.content)
        ),
    }

    def content_of(mark: re.Match) -> str:
        return content[mark[1]]

    # In one pass: what is inserted is not searched for marks.
    return re.sub(r"@@([A-Z]+)@@", content_of, template)


def json_for_markup(content: Any) -> str:
    """JSON that may stand inside an element: no character of it can begin markup."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _base64_parts(content: bytes) -> Iterator[str]:
    for first in range(0, len(content), PART_BYTES):
        yield base64.b64encode(content[first : first + PART_BYTES]).decode("ascii")


def _policy(template: str) -> str:
    """The Content-Security-Policy: the page's own script, style and worker, and no request."""
    # one element of each; those with attributes are no scripts to a browser
    (script,), (style,) = (policy_hashes(template, tag) for tag in ("script", "style"))
    return "; ".join(
        (
            "default-src 'none'",
            # and WebAssembly, of which the worker builds a loop
            f"script-src {script} 'wasm-unsafe-eval'",
            f"style-src {style}",
            "worker-src blob:",
            # the icon
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            # no text can become markup or a script, not even by mistake
            "require-trusted-types-for 'script'",
            "trusted-types engine",
        )
    )


def about_in(html: str) -> dict[str, Any]:
    """What a page says of its model."""
    (text,) = re.findall(r'<script type="application/json" id="about">(.*?)</script>', html)
    return json.loads(text)


def weights_in(html: str) -> Tensors:
    """The weights that a page holds."""
    parts = re.findall(r'<script [^>]*class="weights">(.*?)</script>', html)
    content = b"".join(base64.b64decode(part, validate=True) for part in parts)
    return Tensors(about_in(html)["tensors"], content)
