"""Keys and values of what a model has read: of one text that grows, or of beginnings that branch.

Shape legend: B samples, R rows of all branches, T new tokens, S tokens in the cache, C width,
K key/value heads, H query heads, D head dim."""

import torch
from torch import Tensor

from nanochat.model.attention import attention, branched_attention
from nanochat.model.config import GPTConfig


class LayerCache:
    """Keys and values of one layer, in buffers of fixed size."""

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        n_kv_head: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
        lengths: list[int] | None = None,
        one_by_one: bool = False,
    ) -> None:
        """lengths, one_by_one: see KVCache."""
        # the last position's key before it was shifted, rotated and normalised, (B, 1, K, D);
        # None before the first position and in models that shift no keys
        self.key_before: Tensor | None = None
        self.lengths = lengths
        self.one_by_one = one_by_one
        # (B, capacity, K, D), of which `length` positions are filled
        self.keys = torch.empty(
            batch_size, capacity, n_kv_head, head_dim, device=device, dtype=dtype
        )
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k_BxTxKxD: Tensor, v_BxTxKxD: Tensor) -> tuple[Tensor, Tensor]:
        """Store T more positions.

        Returns all keys and all values so far, each (B, S, K, D), as views of the buffers.
        Into an empty cache a single row may be appended: it becomes the beginning of every row, and
        only that row is returned.
        Raises ValueError if the positions do not fit or the number of rows differs."""
        batch_size, capacity = self.keys.shape[:2]
        rows, T = k_BxTxKxD.shape[:2]
        end = self.length + T
        if end > capacity:
            raise ValueError(
                f"the key/value cache is full: it holds {self.length} of {capacity} positions and "
                f"was given {T} more; create it with a larger capacity"
            )
        if rows != batch_size and not (rows == 1 and self.length == 0):
            raise ValueError(f"the key/value cache has {batch_size} rows and was given {rows}")
        if k_BxTxKxD.shape == self.keys.shape:
            # they fill the whole cache: keep them without a copy
            self.keys = k_BxTxKxD
            self.values = v_BxTxKxD
        else:
            self.keys[:, self.length : end] = k_BxTxKxD
            self.values[:, self.length : end] = v_BxTxKxD
        self.length = end
        return self.keys[:rows, :end], self.values[:rows, :end]

    def remember(self, raw_keys_BxTxKxD: Tensor) -> None:
        """Keep the last of the keys that were read: the next position's key is computed from it."""
        if self.lengths is None:
            # a copy: a view would keep all T in memory
            last_Bx1xKxD = raw_keys_BxTxKxD[:, -1:].clone()
        else:
            device = raw_keys_BxTxKxD.device
            rows_B = torch.arange(len(self.lengths), device=device)
            last_B = torch.tensor(self.lengths, device=device) - 1
            last_Bx1xKxD = raw_keys_BxTxKxD[rows_B, last_B][:, None]
        self.key_before = last_Bx1xKxD.expand(self.keys.size(0), -1, -1, -1)

    def attend(
        self,
        q_BxTxHxD: Tensor,
        k_BxTxKxD: Tensor,
        v_BxTxKxD: Tensor,
        window: int,
        backend: str,
    ) -> Tensor:
        """attention() of the T newest positions, which are stored first, to all positions."""
        keys_and_values = self.append(k_BxTxKxD, v_BxTxKxD)
        # for a single query, laying out all keys and values takes longer than plain products
        if self.one_by_one and q_BxTxHxD.size(1) == 1 and backend == "native":
            backend = "blocked"
        return attention(q_BxTxHxD, *keys_and_values, window, backend)


class KVCache:
    """What a model remembers of the tokens it has read: keys and values, and what smear needs."""

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
        lengths: list[int] | None = None,
        one_by_one: bool = False,
    ) -> None:
        """dtype: the model's compute dtype. lengths: tokens of each row, where rows are padded.
        one_by_one: single tokens use plain products, which are faster, but round differently from a
        longer pass.

        A cache with lengths is filled once, and read through Branches."""
        self.layers = [
            LayerCache(
                batch_size,
                capacity,
                config.n_kv_head,
                config.head_dim,
                device,
                dtype,
                lengths,
                one_by_one,
            )
            for _ in range(config.depth)
        ]
        self.batch_size = batch_size
        self.lengths = lengths
        # positions read so far
        self.length = 0
        # the normalised embedding of the last token, (B, 1, C); None before the first and in
        # models without smear
        self.previous_embedding: Tensor | None = None

    def positions(self, T: int) -> slice:
        """Positions of the next T tokens."""
        return slice(self.length, self.length + T)

    def advance(self, n_tokens: int, last_embedding_Bx1xC: Tensor | None) -> None:
        """Count n_tokens as read, once every layer has stored them.

        last_embedding_Bx1xC: None in models without smear."""
        self.length += n_tokens
        if last_embedding_Bx1xC is not None:
            self.previous_embedding = last_embedding_Bx1xC.expand(self.batch_size, -1, -1)


class Branches:
    """Rows that each continue a beginning: n rows the first beginning, n the second, and so on.

    A model reads it as a cache, for one pass, which stores nothing."""

    def __init__(self, cache: KVCache, n: int, longest: int, last_embedding_BxC: Tensor) -> None:
        """cache: filled, and created with the lengths of the beginnings, each at least 1.

        Whatever the cache holds behind a beginning is not read. longest: tokens of the longest row,
        beginning included; what the model is fed behind it is padding. last_embedding_BxC: of the
        last token of each beginning (Decoder.embed()), for models with smear."""
        self.longest = longest
        self.layers = [BranchesOfLayer(layer, n) for layer in cache.layers]
        lengths_B = torch.tensor(cache.lengths, device=last_embedding_BxC.device)
        self.lengths_R = lengths_B.repeat_interleave(n)
        self.previous_embedding = last_embedding_BxC.repeat_interleave(n, dim=0)[:, None]

    def positions(self, T: int) -> Tensor:
        """Positions of the next T tokens of each row, int64 (R, T)."""
        following = torch.arange(T, device=self.lengths_R.device)
        # padding behind the longest row may lie beyond the positions that the model has
        return (self.lengths_R[:, None] + following).clamp(max=self.longest - 1)

    def advance(self, n_tokens: int, last_embedding_Bx1xC: Tensor | None) -> None:
        """Part of a cache's interface; there is nothing to count."""


class BranchesOfLayer:
    """The part of Branches that belongs to one layer."""

    def __init__(self, layer: LayerCache, n: int) -> None:
        self.layer = layer
        self.key_before: Tensor | None = None
        if layer.key_before is not None:
            self.key_before = layer.key_before.repeat_interleave(n, dim=0)

    def remember(self, raw_keys_RxTxKxD: Tensor) -> None:
        """Part of a cache's interface; no position follows."""

    def attend(
        self,
        q_RxTxHxD: Tensor,
        k_RxTxKxD: Tensor,
        v_RxTxKxD: Tensor,
        window: int,
        backend: str,
    ) -> Tensor:
        """Attention of each row to its beginning and to itself."""
        layer = self.layer
        return branched_attention(
            q_RxTxHxD,
            k_RxTxKxD,
            v_RxTxKxD,
            layer.keys,
            layer.values,
            layer.lengths,
            window,
            backend,
        )
