"""Words that the commands of `nanochat data` share."""


def counted(count: int, noun: str) -> str:
    """A number and its noun, in the plural where it should be: "1 file", "2,000 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def say(line: str) -> None:
    """Print a line now, also where the output is a pipe."""
    # a download takes minutes, and a pipe holds unflushed lines back until its buffer is full
    print(line, flush=True)
