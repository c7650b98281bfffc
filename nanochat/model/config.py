"""The shape of a model: one frozen dataclass that is saved with every run."""

from dataclasses import dataclass

from nanochat.common import round_up

ARCHITECTURES = ("speedrun", "llama")
# Rotary tables cover this many times max_seq_len: CORE prompts and long samples exceed the context.
ROPE_REACH = 10
# Leading channels of x that drive the value-embedding and smear gates; fewer if the width is less.
GATE_CHANNELS = 16


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a model. Saved whole by asdict() and rebuilt by GPTConfig(**fields).

    window_pattern: letters tiled over the layers; L sees the whole context, S the last short_window
        tokens; the last layer is always L.
    short_window: keys that a token of an S layer sees, itself included.
    tie_embeddings: the head is the embedding table (llama only).
    key_shift: half of each key comes from the position before (speedrun only); runs saved by
        earlier versions lack this field.

    Raises ValueError for shapes that no model has."""

    depth: int
    width: int
    head_dim: int
    n_head: int
    n_kv_head: int
    vocab_size: int
    max_seq_len: int
    window_pattern: str = "SSSL"
    short_window: int = 1024
    dropout: float = 0.0
    arch: str = "speedrun"
    tie_embeddings: bool = False
    key_shift: bool = False

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self.arch!r} is unknown; choose {' or '.join(ARCHITECTURES)}"
            )
        if self.arch == "llama" and set(self.window_pattern) != {"L"}:
            raise ValueError(
                f"window pattern {self.window_pattern!r}: a llama model has full context in all "
                f"layers; give L"
            )
        if self.arch == "speedrun" and self.tie_embeddings:
            raise ValueError(
                "tied embeddings need a llama model: the embedding table and the head of a "
                "speedrun model differ in scale by design"
            )
        if self.arch == "llama" and self.key_shift:
            raise ValueError(
                "shifted keys need a speedrun model: other programs do not support them in a llama"
            )
        # Groups of query heads share a key/value head; rotary positions turn pairs of channels.
        if self.n_head % self.n_kv_head or self.head_dim % 2:
            raise ValueError(
                f"{self.n_head} query heads, {self.n_kv_head} key/value heads, head dim "
                f"{self.head_dim}: the query heads must be a multiple of the key/value heads and "
                f"the head dim even"
            )
        letters = set(self.window_pattern)
        if not letters or letters - {"S", "L"} or self.short_window < 1:
            raise ValueError(
                f"window pattern {self.window_pattern!r} with a short window of "
                f"{self.short_window}: give letters S and L, and a window of at least 1"
            )

    def windows(self) -> list[int]:
        """Visible keys per layer; full context is ROPE_REACH * max_seq_len, the longest input."""
        pattern = self.window_pattern
        letters = [pattern[layer % len(pattern)] for layer in range(self.depth)]
        # Some layer must see the whole context, whatever the pattern and the depth.
        letters[-1] = "L"
        keys = {"S": self.short_window, "L": ROPE_REACH * self.max_seq_len}
        return [keys[letter] for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Whether a layer has one: in a speedrun model alternate layers do, the last always."""
        # Counted back from the last layer, so that it has one at every depth.
        return self.arch == "speedrun" and layer % 2 == (self.depth - 1) % 2


def width_for(depth: int, aspect_ratio: int, head_dim: int) -> int:
    """Model width of a depth: depth x aspect ratio, rounded up to a multiple of the head dim."""
    return round_up(depth * aspect_ratio, head_dim)
