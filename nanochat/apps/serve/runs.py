"""Which runs are served: their models, each with an engine in a thread of its own, and their newest
weights while they are training."""

import threading
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import Report, UsageError, in_a_line, note_once, printable
from nanochat.eval.engine import Engine
from nanochat.run import checkpoint
from nanochat.run.loading import load_run, step_of

if TYPE_CHECKING:
    from nanochat.apps.serve.work import Work
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig

# seconds between two looks for a newer checkpoint
FOLLOW_SECONDS = 3.0
# a training process may remove a checkpoint between the look and the reading
ATTEMPTS = 3
# seconds that an engine has to end
CLOSING_SECONDS = 5.0


def _now() -> int:
    return int(time.time())


@dataclass(eq=False)
class ServedRun:
    """A run that is served. name: of the model, as clients give it. step: of the newest weights
    that the engine was given. max_tokens, queue: as the flags of these names.

    works: what waits for the engine. problem: why the engine ended early, or ""."""

    name: str
    folder: Path
    step: int
    config: "GPTConfig"
    tokenizer: "Tokenizer"
    engine: Engine
    max_tokens: int
    queue: int
    follows: bool = False
    problem: str = ""
    works: "set[Work]" = field(default_factory=set)
    thread: threading.Thread | None = None
    # the checkpoint that follow() looked at last
    looked_at: tuple[int, int] | None = None
    # when it was loaded, in seconds since 1970
    created: int = field(default_factory=_now)
    longest_token_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.longest_token_bytes = max(len(token) for token in self.tokenizer.tokens)

    def start(self) -> None:
        """Start the engine's thread."""
        self.thread = threading.Thread(target=self._work, name=f"engine {self.name}", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            self.engine.run()
        except BaseException as error:
            self.problem = f"the engine of {self.name} ended: {in_a_line(error)}"
            for work in list(self.works):
                work.fail(self.problem)
            # a defect: its traceback goes to the console of whoever serves
            raise

    def close(self) -> None:
        """End the engine, and wait for its thread for some seconds."""
        self.engine.close()
        if self.thread:
            self.thread.join(CLOSING_SECONDS)

    def follow(self, load: Callable[..., tuple], report: Report) -> None:
        """Give the engine the weights of the newest intact checkpoint, if they are not in use yet.

        load: as load_run(). A checkpoint that cannot be used is reported once; the weights in use
        stay."""
        stamp = newest_stamp(self.folder)
        if stamp is None or stamp == self.looked_at:
            return
        self.looked_at = stamp
        step = checkpoint.newest_intact(self.folder, report)
        if step is None or (step == self.step and step != stamp[0]):
            return
        try:
            model, tokenizer = load(self.folder, step)
        # of any kind, memory included: no checkpoint is worth the server
        except Exception as error:
            report(f"{self.name}: step {step} is not served: {in_a_line(error)}")
            return
        if (model.config, tokenizer.fingerprint) != (self.config, self.tokenizer.fingerprint):
            report(
                f"{self.name}: step {step} is not served: the folder now holds a run of another "
                f"shape or tokenizer; start the server again"
            )
            return
        self.engine.replace_model(model)
        self.step = step
        report(f"{self.name}: serves step {step}")


def newest_stamp(folder: Path) -> tuple[int, int] | None:
    """What tells the newest checkpoint from others: its step and when it was written. None if there
    is none."""
    steps = checkpoint.steps_of(folder)
    if not steps:
        return None
    manifest = checkpoint.folder_of(folder, steps[-1]) / "manifest.json"
    try:
        return steps[-1], manifest.stat().st_mtime_ns
    except FileNotFoundError:
        # removed since: the next look finds a newer one
        return None


def load_runs(args: Namespace) -> list[ServedRun]:
    """The runs of the command line, loaded. UsageError for one that cannot be served."""
    folders = [Path(run) for run in args.runs]
    names = names_of(folders)
    return [_load(folder, name, args) for folder, name in zip(folders, names, strict=True)]


def names_of(folders: list[Path]) -> list[str]:
    """The names of the models: those of their folders, with as many folders above them as tell
    them apart. UsageError for a folder that is given twice."""
    paths = [folder.resolve() for folder in folders]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"{path} is given twice; give each run once")
    names = []
    for path in paths:
        n_parts = 1
        while sum(other.parts[-n_parts:] == path.parts[-n_parts:] for other in paths) > 1:
            n_parts += 1
        names.append(printable("/".join(path.parts[-n_parts:])))
    return names


def _load(folder: Path, name: str, args: Namespace) -> ServedRun:
    stamp = newest_stamp(folder)
    step, model, tokenizer = _load_step(folder, args)
    engine = Engine(model, tokenizer, slots=args.slots, queue=args.queue, report=note_once)
    return ServedRun(
        name,
        folder,
        step,
        model.config,
        tokenizer,
        engine,
        args.max_tokens,
        args.queue,
        args.follow,
        looked_at=stamp,
    )


def _load_step(folder: Path, args: Namespace) -> tuple:
    """(step, model, tokenizer) of the checkpoint that the flags name."""
    asked = None if args.step == -1 else args.step
    for attempt in range(1, ATTEMPTS + 1):
        step = step_of(folder, asked)
        try:
            return step, *load_run(folder, step, args.device_type, args.dtype)
        except UsageError:
            # the newest one may have given way to a newer one
            gone = not checkpoint.folder_of(folder, step).exists()
            if asked is not None or not gone or attempt == ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")
