"""Words that the commands of `nanochat data` share."""


def say(line: str) -> None:
    """Print a line now, also where the output is a pipe."""
    # a download takes minutes, and a pipe holds unflushed lines back until its buffer is full
    print(line, flush=True)
