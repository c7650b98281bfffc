"""model.gguf: the file of weights and tokenizer that llama.cpp reads, written and read back.

Only this module imports the package gguf."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nanochat.apps.export.fields import tensor_name
from nanochat.apps.export.tokenizer_files import PAD_BYTE, PAD_TEXT, merges_of, pad_id
from nanochat.common import UsageError, install_hint
from nanochat.data.chat import JINJA, is_chat
from nanochat.data.tokenizer import (
    GPT2_PATTERN,
    LLAMA_PATTERN,
    TURN_END,
    gpt2_byte_characters,
)
from nanochat.model.llama import LLAMA_NORM_EPS, LLAMA_ROPE_BASE, swiglu_width

if TYPE_CHECKING:
    import gguf

    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig

# Of --dtype: (type of the matrices, of the whole file), by gguf's names.
GGUF_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
# Split patterns of ours -> the pre-tokenizer of llama.cpp that cuts text at the same places.
PRE_TOKENIZERS = {GPT2_PATTERN: "gpt-2", LLAMA_PATTERN: "llama-bpe"}
# For tokenizers of characters and bytes, whose tokens no pre-tokenizer can cut.
ANY_PRE_TOKENIZER = "gpt-2"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp's byte-pair encoding.

    tokens: spelled in GPT-2's characters for bytes. merges: two spelled strings with a blank
    between them, first come first merged. bos, pad, eos: ids; pad may be None. template: of chats,
    in Jinja, or None. control: ids of tokens that no text contains."""

    pre_tokenizer: str
    tokens: list[str]
    merges: list[str]
    bos: int
    pad: int | None
    eos: int
    template: str | None
    control: list[int]


@dataclass(frozen=True)
class Saved:
    """What a file holds: weights in fp32 by our names, and the vocabulary."""

    weights: dict[str, Tensor]
    vocabulary: Vocabulary


def require_gguf() -> None:
    """UsageError if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise install_hint("gguf", "export --format gguf") from None


# ---- the tokenizer ----


def vocabulary_of(tokenizer: "Tokenizer") -> Vocabulary:
    """A tokenizer in llama.cpp's form, with the same ids for every text.

    UsageError if llama.cpp has no pre-tokenizer that splits text as this one does."""
    if tokenizer.kind == "bpe" and tokenizer.pattern not in PRE_TOKENIZERS:
        raise UsageError(
            "--format gguf: no pre-tokenizer of llama.cpp splits text as this run's tokenizer does "
            "(it cuts digits in pairs and takes line breaks together with the blanks around them), "
            "so llama.cpp would feed the model other tokens than it was trained on; use --format "
            "hf, or train the next run with --tokenizer=bpe-llama, which takes the same "
            "--vocab-size (gpt2, char and byte can be exported too)"
        )
    spelling = {byte: character for character, byte in gpt2_byte_characters().items()}

    def spelled(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    if tokenizer.kind == "char":
        pairs = _merges_of_characters(tokenizer.tokens)
    else:
        pairs = merges_of(tokenizer)
    # gguf cannot write an empty list: two bytes that UTF-8 never has, so that they never merge.
    merges = [f"{spelled(a)} {spelled(b)}" for a, b in pairs or [(PAD_BYTE, PAD_BYTE)]]
    tokens = [spelled(token) for token in tokenizer.tokens]
    tokens += [tokenizer.bos_text, *tokenizer.specials]
    pad = pad_id(tokenizer)
    if pad is not None:
        tokens[pad] = PAD_TEXT
    return Vocabulary(
        PRE_TOKENIZERS.get(tokenizer.pattern, ANY_PRE_TOKENIZER),
        tokens,
        merges,
        tokenizer.bos,
        pad,
        # Without chats one token has both roles: it separates documents, so it also ends one.
        tokenizer.special_ids.get(TURN_END, tokenizer.bos),
        JINJA if is_chat(tokenizer) else None,
        [i for i in range(len(tokens)) if i >= tokenizer.bos or i == pad],
    )


def _merges_of_characters(characters: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Merges that put characters together from their bytes, one byte after the other.

    They never join two characters: UTF-8's first bytes differ from its later ones. Parts of
    characters need no token of their own."""
    pairs = {(c[:n], c[n : n + 1]): None for c in characters for n in range(1, len(c))}
    return list(pairs)


# ---- the weights ----


def saved_weights(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The weights as a file of a dtype holds them, in fp32.

    dtype: of GGUF_TYPES. UsageError if the rows of a matrix do not fill its blocks."""
    import gguf

    saved = {}
    for name, tensor in weights.items():
        kind = _kind_of(tensor, dtype)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if tensor.size(-1) % block:
            raise UsageError(
                f"--dtype {dtype}: a block has {block} weights, but the rows of {name} have "
                f"{tensor.size(-1)}; use float32 or bfloat16"
            )
        packed = gguf.quants.quantize(tensor.contiguous().numpy(), kind)
        saved[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    return saved


def _kind_of(tensor: Tensor, dtype: str) -> "gguf.GGMLQuantizationType":
    """The type in which a file of a dtype has a tensor."""
    import gguf

    # llama.cpp computes norms in fp32, and their weights are few.
    if tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    return gguf.GGMLQuantizationType[GGUF_TYPES[dtype][0]]


def _heads_turned(name: str, config: "GPTConfig") -> int:
    """How many heads of a tensor rotary positions turn; 0 for most tensors."""
    if name.endswith("attention.query.weight"):
        return config.n_head
    if name.endswith("attention.key.weight"):
        return config.n_kv_head
    return 0


def interleaved(tensor: Tensor, n_heads: int) -> Tensor:
    """Rows of query or key heads in llama.cpp's order.

    Rotary positions turn pairs of channels: ours pair a head's first half with its second half,
    llama.cpp pairs neighbours."""
    halves = tensor.view(n_heads, 2, -1, tensor.size(-1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def in_halves(tensor: Tensor, n_heads: int) -> Tensor:
    """The inverse of interleaved()."""
    pairs = tensor.view(n_heads, -1, 2, tensor.size(-1))
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _gguf_names(names: Iterable[str], config: "GPTConfig") -> dict[str, str]:
    """{our name: llama.cpp's} of every tensor."""
    import gguf

    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.depth)
    return {
        name: known.get_name(tensor_name(name, config.arch), try_suffixes=(".weight",))
        for name in names
    }


# ---- the file ----


def write_gguf(path: Path, title: str, saved: Saved, config: "GPTConfig", dtype: str) -> None:
    """Write the file of a llama. title: what programs show as its name. dtype: of GGUF_TYPES."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[dtype][1]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_vocabulary(writer, saved.vocabulary)
    names = _gguf_names(saved.weights, config)
    for name, tensor in saved.weights.items():
        n_heads = _heads_turned(name, config)
        ordered = interleaved(tensor, n_heads) if n_heads else tensor
        kind = _kind_of(tensor, dtype)
        packed = gguf.quants.quantize(ordered.contiguous().numpy(), kind)
        writer.add_tensor(names[name], packed, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    # Of a full disk numpy reports neither the number of the error nor the file.
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _add_shape(writer: "gguf.GGUFWriter", config: "GPTConfig") -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(swiglu_width(config.width))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(LLAMA_ROPE_BASE)
    writer.add_layer_norm_rms_eps(LLAMA_NORM_EPS)


def _add_vocabulary(writer: "gguf.GGUFWriter", vocabulary: Vocabulary) -> None:
    import gguf

    control = set(vocabulary.control)
    types = [
        gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL
        for i in range(len(vocabulary.tokens))
    ]
    # llama.cpp's name for byte-pair encoding.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
        writer.add_eot_token_id(vocabulary.eos)
        # A text ends with its document as well; llama.cpp has one more role that ends it.
        writer.add_eom_token_id(vocabulary.bos)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if vocabulary.pad is not None:
        writer.add_pad_token_id(vocabulary.pad)


def read_gguf(path: Path, names: Iterable[str], config: "GPTConfig") -> Saved:
    """What a file of write_gguf() holds. names: of all weights. KeyError if it lacks one."""
    import gguf

    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name, theirs in _gguf_names(names, config).items():
        tensor = found[theirs]
        # Copied, since the file is mapped read-only.
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        n_heads = _heads_turned(name, config)
        weights[name] = in_halves(values, n_heads) if n_heads else values
    keys = gguf.Keys.Tokenizer
    read = [keys.PRE, keys.LIST, keys.MERGES, keys.BOS_ID, keys.PAD_ID, keys.EOS_ID]
    fields = [reader.get_field(key) for key in (*read, keys.CHAT_TEMPLATE, keys.TOKEN_TYPE)]
    *contents, types = [None if field is None else field.contents() for field in fields]
    control = [i for i, kind in enumerate(types or []) if kind == gguf.TokenType.CONTROL]
    return Saved(weights, Vocabulary(*contents, control))
