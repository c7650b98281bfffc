"""decode.cpp from Python: one token of several texts per call, on a CPU.

The reference is Decoder.hidden() with a cache; tests compare the two. Weights, keys and values are
in the model's compute dtype, everything between them in fp32, so that in bf16 it is closer to exact
arithmetic than the reference.

Shape legend: B texts, K key/value heads, D head dim, C width, V vocabulary."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from nanochat import native
from nanochat.common import Unavailable
from nanochat.model.config import GATE_CHANNELS
from nanochat.model.decoder import Decoder
from nanochat.model.layers import NORM_EPS
from nanochat.model.llama import LLAMA_NORM_EPS

SOURCE = Path(__file__).with_name("decode.cpp")
DTYPES = (torch.float32, torch.bfloat16)


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    """As in decode.cpp."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "query key value out up gate down value_embedding"),
        *_fields(ctypes.c_void_p, "attention_norm mlp_norm value_gate keys values key_before"),
        *_fields(ctypes.c_int64, "window capacity"),
        *_fields(ctypes.c_float, "residual_lambda x0_lambda"),
    )


class _Model(ctypes.Structure):
    """As in decode.cpp."""

    _fields_ = (
        *_fields(ctypes.c_int64, "depth width n_head n_kv_head head_dim hidden vocab_size"),
        *_fields(ctypes.c_int64, "gate_channels is_speedrun key_shift middle_layer is_bf16"),
        *_fields(ctypes.c_float, "norm_eps smear_lambda backout_lambda softcap"),
        *_fields(ctypes.c_void_p, "embedding head final_norm smear_gate rope_cos rope_sin"),
        *_fields(ctypes.c_void_p, "previous_embedding layers"),
    )


class LayerSlots:
    """What one layer keeps of each text: keys and values (slots, K, capacity, D), and the last key
    before it was shifted, rotated and normalised, (slots, K, D).

    Position p is at p modulo the capacity: a layer with a window keeps no more than it sees."""

    def __init__(self, model: Decoder, layer: int, slots: int, positions: int) -> None:
        config = model.config
        device = model.embedding.weight.device
        capacity = min(config.windows()[layer], positions)
        shape = (slots, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=model.compute_dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.key_before = torch.zeros(slots, config.n_kv_head, config.head_dim, device=device)


class CpuDecoder:
    """A model and the keys and values of up to `slots` texts that it continues together."""

    # whether a text gets the same bits alone and among others
    is_batch_invariant = True

    def __init__(self, model: Decoder, slots: int, positions: int, threads: int) -> None:
        """positions: of a text, at most. threads: that share a step.

        Unavailable where decode.cpp cannot be compiled or the model's dtype is not one of
        DTYPES."""
        if model.compute_dtype not in DTYPES or model.embedding.weight.device.type != "cpu":
            raise Unavailable("decode.cpp is for CPUs, and for fp32 and bf16")
        self.model = model
        self.library = native.load(SOURCE)
        self.library.nanochat_team.restype = ctypes.c_void_p
        self.library.nanochat_disband.argtypes = [ctypes.c_void_p]
        self.library.nanochat_decode.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
            *[ctypes.c_void_p] * 4,
        ]
        # decode.cpp has addresses of tensors, which live as long as this list
        self.kept: list[Tensor] = []
        layers = range(model.config.depth)
        self.layers = [LayerSlots(model, layer, slots, positions) for layer in layers]
        # of the last token that was read, for smear
        self.previous_embedding = torch.zeros(slots, model.config.width)
        self.described = self._describe()
        self.team = self.library.nanochat_team(threads)

    def close(self) -> None:
        """End the threads."""
        if self.team is not None:
            self.library.nanochat_disband(self.team)
            self.team = None

    def step(self, ids: list[int], positions: list[int], slots: list[int]) -> Tensor:
        """Read one token of each of B texts, at its position; returns fp32 logits (B, V)."""
        B = len(ids)
        # one tensor for the three: making a tensor takes longer than filling it
        arguments_3xB = torch.tensor([ids, positions, slots], dtype=torch.int64)
        logits_BxV = torch.empty(B, self.model.config.vocab_size)
        at = arguments_3xB.data_ptr()
        self.library.nanochat_decode(
            ctypes.byref(self.described),
            self.team,
            B,
            at,
            at + 8 * B,
            at + 16 * B,
            logits_BxV.data_ptr(),
        )
        return logits_BxV

    # ---- the description of the model ----

    def _address(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        self.kept.append(tensor.detach().to(dtype).contiguous())
        return self.kept[-1].data_ptr()

    def _weight(self, tensor: Tensor | None) -> int | None:
        return self._address(tensor, self.model.compute_dtype)

    def _fp32(self, tensor: Tensor | None) -> int | None:
        return self._address(tensor, torch.float32)

    def _describe(self) -> _Model:
        model, config = self.model, self.model.config
        layers = (_Layer * config.depth)(*map(self._describe_layer, range(config.depth)))
        described = _Model(
            depth=config.depth,
            width=config.width,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
            head_dim=config.head_dim,
            hidden=model.blocks[0].mlp.up.out_features,
            vocab_size=config.vocab_size,
            gate_channels=min(GATE_CHANNELS, config.width),
            is_speedrun=config.arch == "speedrun",
            key_shift=config.key_shift,
            middle_layer=max(0, config.depth // 2 - 1),
            is_bf16=model.compute_dtype == torch.bfloat16,
            softcap=model.softcap or 0,
            norm_eps=NORM_EPS if config.arch == "speedrun" else LLAMA_NORM_EPS,
            embedding=self._weight(model.embedding.weight),
            head=self._weight(model.head_weight()),
            rope_cos=self._fp32(model.rope_cos),
            rope_sin=self._fp32(model.rope_sin),
            previous_embedding=self.previous_embedding.data_ptr(),
            layers=ctypes.addressof(layers),
        )
        if config.arch == "speedrun":
            described.smear_gate = self._fp32(model.smear_gate.weight)
            described.smear_lambda = model.smear_lambda.item()
            described.backout_lambda = model.backout_lambda.item()
        else:
            described.final_norm = self._fp32(model.final_norm.weight)
        # lives as long as what has its address
        described.kept = layers
        return described

    def _describe_layer(self, number: int) -> _Layer:
        model, config, slots = self.model, self.model.config, self.layers[number]
        block = model.blocks[number]
        attention = block.attention
        layer = _Layer(
            query=self._weight(attention.query.weight),
            key=self._weight(attention.key.weight),
            value=self._weight(attention.value.weight),
            out=self._weight(attention.out.weight),
            up=self._weight(block.mlp.up.weight),
            down=self._weight(block.mlp.down.weight),
            keys=slots.keys.data_ptr(),
            values=slots.values.data_ptr(),
            key_before=slots.key_before.data_ptr(),
            window=config.windows()[number],
            capacity=slots.keys.size(2),
        )
        if attention.value_gate is not None:
            layer.value_gate = self._fp32(attention.value_gate.weight)
            layer.value_embedding = self._weight(model.value_embeddings[str(number)].weight)
        if config.arch == "speedrun":
            layer.residual_lambda = model.residual_lambdas[number].item()
            layer.x0_lambda = model.x0_lambdas[number].item()
        else:
            layer.gate = self._weight(block.mlp.gate.weight)
            layer.attention_norm = self._fp32(block.attention_norm.weight)
            layer.mlp_norm = self._fp32(block.mlp_norm.weight)
        return layer
