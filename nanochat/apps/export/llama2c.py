"""Reading llama2.c's .bin files: a Llama in fp32 (versions 0 and 1) or in int8 groups (version 2).

All numbers are little-endian. Version 0, without a name, begins with seven int32: width, MLP width,
layers, query heads, key/value heads, vocabulary (negative: the head is a matrix of its own) and
context. Versions 1 and 2 have 256 bytes: the magic number, the version, the same seven, a byte that
is 1 if the head is the embedding table, and in version 2 the int32 size of a group. The tensors
follow; layout() lists their order. One kind of tensor stands there for all layers in turn. In
version 2 all but the norms are int8, each tensor followed by an fp32 scale for each group.

Rotary positions turn neighbouring channels; in transformers they turn channel i with i + D/2. So
the rows of queries and keys are put into that order, which changes no product of the two."""

import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from nanochat.apps.export.foreign import Foreign, require_finite
from nanochat.common import UsageError

# 0x616b3432 as the file has it
MAGIC = b"24ka"
HEADER_BYTES = 256
SIZES = struct.Struct("<7i")
# the constants of its programs, which no file states
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
BOS, EOS = 1, 2
# No size is larger: a file of another kind must not be taken for an enormous model.
LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class Header:
    """The first bytes of a file. group: int8 weights of a scale, 0 in fp32. offset: of tensors."""

    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context: int
    tied: bool
    version: int
    group: int
    offset: int

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Entry:
    """Tensors that follow each other, one a layer if the name has a place for its number.

    name: in transformers; "" for tables that follow from the header. small_ints: int8 groups."""

    name: str
    shape: tuple[int, ...]
    small_ints: bool = False

    @property
    def size(self) -> int:
        """Numbers of one of the tensors."""
        return int(np.prod(self.shape, dtype=np.int64))


def read_llama2c(path: Path) -> Foreign:
    """The model in a .bin file. UsageError if it is no such file, or damaged, or cut off."""
    header = read_header(path)
    notes = ()
    if header.version == 2:
        notes = (
            f"int8 weights in groups of {header.group} became fp32 (llama2.c's runq also rounds "
            "activations)",
        )
    return Foreign(
        kind=f"llama2.c, version {header.version}",
        path=path,
        files=[path],
        config=_config(header),
        weights=lambda: _read_weights(path, header),
        notes=notes,
    )


def _config(header: Header) -> dict[str, Any]:
    """The model as a config.json of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": header.vocab_size,
        "hidden_size": header.width,
        "intermediate_size": header.hidden,
        "num_hidden_layers": header.layers,
        "num_attention_heads": header.heads,
        "num_key_value_heads": header.kv_heads,
        "head_dim": header.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": header.context,
        "rms_norm_eps": NORM_EPS,
        # Releases of transformers before 5 read only rope_theta, later ones rope_parameters.
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": header.tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


# ---- the header ----


def read_header(path: Path) -> Header:
    """The header of a .bin file, whose length it must fit. UsageError for any other file."""
    try:
        with open(path, "rb") as file:
            start = file.read(HEADER_BYTES)
        n_bytes = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    header = _parsed(start, path)
    sizes = astuple(header)[:7]
    if not all(0 < size <= LARGEST_SIZE for size in sizes):
        raise UsageError(
            f"{path} is not a file of llama2.c: it would begin with the sizes {list(sizes)}"
        )
    if header.width % header.heads or header.heads % header.kv_heads or header.head_dim % 2:
        raise UsageError(
            f"{path}: {header.heads} query heads and {header.kv_heads} key/value heads of a width "
            f"of {header.width} are the shape of no Llama; it is damaged, or not llama2.c's"
        )
    _check_groups(header, path)
    expected = header.offset + sum(n * _bytes(entry, header) for entry, n in counted(header))
    if n_bytes != expected:
        raise UsageError(
            f"{path} has {n_bytes:,} bytes, but its header (width {header.width}, "
            f"{header.layers} layers, vocabulary {header.vocab_size}) describes {expected:,}; it "
            "is cut off, damaged, or not llama2.c's"
        )
    return header


def _parsed(start: bytes, path: Path) -> Header:
    """The header in the first bytes of a file, not yet checked."""
    if not start.startswith(MAGIC):
        if len(start) < SIZES.size:
            raise UsageError(f"{path} is too short for a file of llama2.c")
        *sizes, vocab_size, context = SIZES.unpack_from(start)
        tied = vocab_size > 0
        return Header(*sizes, abs(vocab_size), context, tied, 0, 0, SIZES.size)
    if len(start) < HEADER_BYTES:
        raise UsageError(f"{path} ends within its header; it is cut off")
    (version,) = struct.unpack_from("<i", start, len(MAGIC))
    if version not in (1, 2):
        raise UsageError(f"{path} has version {version} of llama2.c's format; 0, 1 and 2 are known")
    sizes = SIZES.unpack_from(start, len(MAGIC) + 4)
    tied, group = struct.unpack_from("<Bi", start, len(MAGIC) + 4 + SIZES.size)
    return Header(*sizes, tied != 0, version, group if version == 2 else 0, HEADER_BYTES)


def _check_groups(header: Header, path: Path) -> None:
    """UsageError unless the groups of a version 2 fill every tensor of int8."""
    if header.version != 2:
        return
    whole = all(e.size % max(header.group, 1) == 0 for e in layout(header) if e.small_ints)
    if header.group < 1 or not whole:
        raise UsageError(
            f"{path}: group size {header.group} does not divide its tensors; it is damaged"
        )


# ---- the tensors ----


def layout(header: Header) -> list[Entry]:
    """The tensors of a file in their order."""
    C, hidden, V = header.width, header.hidden, header.vocab_size
    kv = header.kv_heads * header.head_dim
    ints = header.version == 2
    block = "model.layers.{}."
    table = Entry("model.embed_tokens.weight", (V, C), ints)
    norms = [
        Entry(block + "input_layernorm.weight", (C,)),
        Entry(block + "post_attention_layernorm.weight", (C,)),
        Entry("model.norm.weight", (C,)),
    ]
    attention = [
        Entry(block + "self_attn.q_proj.weight", (C, C), ints),
        Entry(block + "self_attn.k_proj.weight", (kv, C), ints),
        Entry(block + "self_attn.v_proj.weight", (kv, C), ints),
        Entry(block + "self_attn.o_proj.weight", (C, C), ints),
    ]
    mlp = [
        Entry(block + "mlp.gate_proj.weight", (hidden, C), ints),
        Entry(block + "mlp.down_proj.weight", (C, hidden), ints),
        Entry(block + "mlp.up_proj.weight", (hidden, C), ints),
    ]
    head = [] if header.tied else [Entry("lm_head.weight", (V, C), ints)]
    if header.version:
        return [*norms, table, *attention, *mlp, *head]
    # cosines and sines, which its programs no longer read
    tables = [Entry("", (header.context, header.head_dim // 2))] * 2
    return [table, norms[0], *attention, norms[1], *mlp, norms[2], *tables, *head]


def counted(header: Header) -> Iterator[tuple[Entry, int]]:
    """Each entry of the layout, and how many tensors it stands for."""
    for entry in layout(header):
        yield entry, header.layers if "{}" in entry.name else 1


def _bytes(entry: Entry, header: Header) -> int:
    """The bytes of one tensor."""
    if entry.small_ints:
        return entry.size + 4 * (entry.size // header.group)
    return 4 * entry.size


def _read_weights(path: Path, header: Header) -> dict[str, Tensor]:
    """{name in transformers: fp32 tensor} of a file whose header is known."""
    weights = {}
    with open(path, "rb") as file:
        file.seek(header.offset)
        for entry, n in counted(header):
            for layer in range(n):
                tensor = _read_tensor(file, entry, header, path)
                if entry.name:
                    weights[entry.name.format(layer)] = tensor
    for name in weights:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = in_halves(weights[name], header.head_dim)
    require_finite(weights, path)
    return weights


def _read_tensor(file: BinaryIO, entry: Entry, header: Header, path: Path) -> Tensor:
    """The next tensor of the file, in fp32."""
    content = file.read(_bytes(entry, header))
    if len(content) != _bytes(entry, header):
        raise UsageError(f"{path} became shorter while it was read; try again")
    if not entry.small_ints:
        # a copy, since numbers in bytes cannot be written to
        return torch.from_numpy(np.frombuffer(content, "<f4").copy()).view(entry.shape)
    integers = np.frombuffer(content, np.int8, entry.size).reshape(-1, header.group)
    scales = np.frombuffer(content, "<f4", offset=entry.size)
    # An early version of the exporter put all scales at the end: the integers read as scales then.
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise UsageError(
            f"{path}: the scales of {entry.name.format('N')} are not all finite and positive; it "
            "is damaged, or of an early exporter: export it again as version 1"
        )
    values = integers.astype(np.float32) * scales[:, None].astype(np.float32)
    return torch.from_numpy(values).view(entry.shape)


def in_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection to heads, (heads * D, C), whose rotary pairs are neighbours, in the
    order in which the first channels of all pairs come before the second ones."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.size(1))
    return pairs.transpose(1, 2).reshape(weight.shape)
