"""Text for the parts of `nanochat bench` that need some, and a place for it."""

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Enough to train a tokenizer on, little enough to be tokenized in seconds.
TEXT_BYTES = 8 << 20


@contextlib.contextmanager
def temporary_base_dir() -> Iterator[Path]:
    """A temporary folder that is the base folder inside the `with`, so that no cache is warm."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    with tempfile.TemporaryDirectory(prefix="nanochat-bench-") as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            # Releases the memory maps of token files, which are about to be deleted.
            gc.collect()
            del os.environ["NANOCHAT_BASE_DIR"]
            if before is not None:
                os.environ["NANOCHAT_BASE_DIR"] = before


def python_text(folder: Path) -> Path:
    """Write a file with about TEXT_BYTES of the standard library's source to
    the folder, one document a source file."""
    # The standard library exists on every machine, with no network.
    library = Path(os.__file__).parent
    texts = []
    size = 0
    for path in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        size += len(texts[-1])
        if size >= TEXT_BYTES:
            break
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return text
