"""Which runs are served: their models, each with an engine in a thread of its own, and their newest
weights while they are training."""

import functools
import re
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
from nanochat.run.loading import load_step

if TYPE_CHECKING:
    from nanochat.apps.serve.work import Work
    from nanochat.data.tokenizer import Tokenizer
    from nanochat.model.config import GPTConfig
    from nanochat.model.decoder import Decoder

# seconds between two looks for a newer checkpoint
FOLLOW_SECONDS = 3.0
# seconds that an engine has to end
CLOSING_SECONDS = 5.0


def _now() -> int:
    return int(time.time())


class OlderStep(Exception):
    """A name such as d4@500: of a checkpoint of a served run that is not always in memory."""

    def __init__(self, run: "ServedRun", step: int) -> None:
        super().__init__(run.name_of(step))
        self.run = run
        self.step = step


@dataclass(eq=False)
class ServedRun:
    """A run that is served. name: of the model, as clients give it. step: of the newest weights
    that the engine was given. max_tokens: as the flag.

    works: what waits for the engine. problem: why the engine ended early, or "". open_engine: opens
    an engine like this one for another checkpoint."""

    name: str
    folder: Path
    step: int
    config: "GPTConfig"
    tokenizer: "Tokenizer"
    engine: Engine
    max_tokens: int
    follows: bool = False
    open_engine: "Callable[[Decoder, Tokenizer], Engine] | None" = None
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

    def name_of(self, step: int) -> str:
        """The name of the model of one of its checkpoints."""
        return f"{self.name}@{step}"

    def answers_to(self, name: str) -> bool:
        """Whether a name means the weights that are always in memory.

        Raises OlderStep if it means another checkpoint of this run."""
        if name == self.name:
            return True
        before, _, number = name.rpartition("@")
        if before != self.name or not re.fullmatch("0|[1-9][0-9]{0,11}", number):
            return False
        step = int(number)
        # a followed run may come to another step before the request does
        if step != self.step or self.follows:
            raise OlderStep(self, step)
        return True

    def older(self, step: int, model: "Decoder", tokenizer: "Tokenizer") -> "ServedRun":
        """Another checkpoint of this run, to be served under a name with its step."""
        engine = self.open_engine(model, tokenizer)
        name, config = self.name_of(step), model.config
        return ServedRun(name, self.folder, step, config, tokenizer, engine, self.max_tokens)

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
    stamp = stamp_of_step(folder, steps[-1])
    # removed since: the next look finds a newer one
    return None if stamp is None else (steps[-1], stamp)


def stamp_of_step(folder: Path, step: int) -> int | None:
    """When the checkpoint of a step was written; None if there is none."""
    try:
        return (checkpoint.folder_of(folder, step) / "manifest.json").stat().st_mtime_ns
    except OSError:
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
    asked = None if args.step == -1 else args.step
    step, model, tokenizer = load_step(folder, asked, args.device_type, args.dtype)
    open_engine = functools.partial(
        Engine,
        slots=args.slots,
        queue=args.queue,
        batch_invariant=args.batch_invariant,
        report=note_once,
    )
    return ServedRun(
        name,
        folder,
        step,
        model.config,
        tokenizer,
        open_engine(model, tokenizer),
        args.max_tokens,
        args.follow,
        open_engine,
        looked_at=stamp,
    )
