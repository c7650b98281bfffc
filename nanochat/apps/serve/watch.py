"""The runs under a folder as the page shows them: a listing, and for each run its curves, thinned
to what a screen can show, and its samples. Reads only, and only runs that the listing names.

Files that grow are read from where the last look ended."""

import json
import math
import os
import stat
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.apps.serve.errors import Refused
from nanochat.common import in_a_line, printable
from nanochat.run.metrics import parsed
from nanochat.run.records import (
    DAMAGES,
    core_result,
    dig,
    find,
    finite_number,
    read_summary,
    reason_of,
)

# folders below the watched one that are searched, as `nanochat runs` does
LEVELS = 2
# what a curve can be drawn over, as metrics.jsonl names it
AXES = ("step", "tokens", "total_training_time", "total_training_flops")
CORE = "core_metric"
# the curves of the page, as metrics.jsonl names them
CURVES = ("train/loss", "val/bpb", CORE, "train/tok_per_sec")
# points of a curve; a chart has about so many pixels
MOST_POINTS = 500
# samples of a run, and characters of one
MOST_SAMPLES = 400
LONGEST_SAMPLE = 4000
LONGEST_REASON = 300
# files of a run's evaluations that are read, the newest ones, and bytes of one
MOST_EVALUATIONS = 100
LARGEST_EVALUATION_BYTES = 16 << 20
# runs whose curves stay in memory, a few megabytes each
MOST_KEPT = 100
# a look at a file that has grown by more than this goes in pieces
PIECE_BYTES = 8 << 20
# what reading a folder with arbitrary content can raise; deep brackets exhaust the parser
TROUBLES = (*DAMAGES, RecursionError)
NAN = float("nan")
# the last is a folder, which changes when a file is added to it
FILES = (
    "config.json",
    "summary.json",
    "metrics.jsonl",
    "samples.jsonl",
    "core.jsonl",
    "evaluations",
)


# ----- what the page gets


@dataclass(frozen=True)
class ListedRun:
    """A run of the listing; numbers are None where it has none. stamp: changes with its files.

    seconds: of training. steps: as planned. tok_per_sec: over the whole run. updated: in seconds
    since 1970."""

    name: str
    status: str
    reason: str
    depth: float | None
    parameters: float | None
    step: float | None
    steps: float | None
    tokens: float | None
    seconds: float | None
    tok_per_sec: float | None
    val_bpb: float | None
    core_metric: float | None
    updated: float
    stamp: str


@dataclass(frozen=True)
class Listing:
    """The runs under the folder. problems: a sentence for each that cannot be read."""

    folder: str
    runs: list[ListedRun]
    problems: list[str]


@dataclass(frozen=True)
class Curve:
    """Points of a curve: axes: {name: their places on it}, value: the mean of what a point stands
    for, low and high: its range, or CORE's 95% interval; None where there is none.

    n: how many values there are. last: the newest of them."""

    axes: dict[str, list[float | None]]
    value: list[float]
    low: list[float | None]
    high: list[float | None]
    n: int
    last: float | None


@dataclass(frozen=True)
class Sample:
    """A text that the run generated."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class WatchedRun:
    """A run: its curves by name, its samples in the order of their steps."""

    name: str
    curves: dict[str, Curve]
    samples: list[Sample]
    problems: list[str]


# ----- files that grow


class Tail:
    """The objects of a .jsonl file, as far as they have not been read yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._inode = 0

    def begins_anew(self) -> bool:
        """Whether the file is another one than at the last look, so that its lines count anew.

        Raises OSError for what is no ordinary file."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            found = None
        # opening a pipe would wait for whoever writes into it
        if found and not stat.S_ISREG(found.st_mode):
            raise OSError("it is no ordinary file")
        inode, size = (found.st_ino, found.st_size) if found else (0, 0)
        # a resumed run replaces the file; one that shrinks in place has been cut
        anew = inode != self._inode or size < self._offset
        if anew:
            self._inode, self._offset = inode, 0
        return anew

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the whole lines that were added; damaged ones are left out."""
        if not self._inode:
            return
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            while piece := file.read(PIECE_BYTES):
                # a torn last line is read when it is whole
                piece += b"" if piece.endswith(b"\n") else file.readline()
                end = piece.rfind(b"\n") + 1
                self._offset += end
                for line in piece[:end].decode("utf-8", errors="replace").split("\n"):
                    value = _parsed(line)
                    if value is not None:
                        yield value


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return parsed(line)
    except RecursionError:
        return None


# ----- the curves of a run


class Metrics:
    """The lines of metrics.jsonl in a compact form: 50 bytes each."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._clear()

    def _clear(self) -> None:
        self.axes = {name: array("d") for name in AXES}
        # by curve: at which lines it has a value, and which
        self.lines = {name: array("q") for name in CURVES}
        self.values = {name: array("d") for name in CURVES}

    def read(self) -> None:
        """Take what was added to the file. Raises OSError."""
        if self._tail.begins_anew():
            self._clear()
        n_lines = len(self.axes["step"])
        for line in self._tail.new():
            is_shown = False
            for name in CURVES:
                # most lines have two of them
                if (value := finite_number(line.get(name))) is not None:
                    self.lines[name].append(n_lines)
                    self.values[name].append(value)
                    is_shown = True
            if is_shown:
                for name, places in self.axes.items():
                    place = finite_number(line.get(name))
                    places.append(NAN if place is None else place)
                n_lines += 1

    def places_of(self, step: float) -> dict[str, float | None]:
        """Where a step is on each axis; None on those that no line tells."""
        found = np.flatnonzero(np.array(self.axes["step"]) == step)
        if not len(found):
            return dict.fromkeys(AXES) | {"step": step}
        return {
            axis: _or_none(np.array(places)[found[-1:]])[0] for axis, places in self.axes.items()
        }

    def curve(self, name: str) -> Curve:
        """A curve, thinned."""
        lines, values = np.array(self.lines[name]), np.array(self.values[name])
        return thinned({axis: np.array(self.axes[axis])[lines] for axis in AXES}, values)


def _or_first(step: float | None) -> float:
    return -math.inf if step is None else step


def thinned(axes: dict[str, np.ndarray], values: np.ndarray) -> Curve:
    """The curve of (n,) arrays, with at most MOST_POINTS points: means of as many neighbours."""
    n = len(values)
    last = float(values[-1]) if n else None
    if n <= MOST_POINTS:
        shown = {name: _or_none(places) for name, places in axes.items()}
        return Curve(shown, values.tolist(), [None] * n, [None] * n, n, last)
    edges = np.linspace(0, n, MOST_POINTS + 1).astype(np.int64)
    starts, sizes = edges[:-1], np.diff(edges)

    def means(numbers: np.ndarray) -> np.ndarray:
        # divided first: the sum of large numbers would be infinite
        return np.add.reduceat(numbers / np.repeat(sizes, sizes), starts)

    return Curve(
        {name: _or_none(means(places)) for name, places in axes.items()},
        means(values).tolist(),
        np.minimum.reduceat(values, starts).tolist(),
        np.maximum.reduceat(values, starts).tolist(),
        n,
        last,
    )


def _or_none(numbers: np.ndarray) -> list[float | None]:
    """Numbers as JSON can hold them."""
    return [None if number != number else number for number in numbers.tolist()]


@dataclass(frozen=True)
class Core:
    """A CORE result: the metric, its 95% interval (None where it is not known), examples."""

    value: float | None
    low: float | None
    high: float | None
    n: int


NO_CORE = Core(None, None, None, 0)


class TrainingCore:
    """CORE's results from the answers in core.jsonl, by step."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._tasks: dict[int, dict[str, Any]] = {}
        self._found: dict[int, Core] = {}

    def read(self) -> None:
        """Take what was added to the file. Raises OSError."""
        if self._tail.begins_anew():
            self._tasks, self._found = {}, {}
        for line in self._tail.new():
            self._tasks.setdefault(line["step"], {})[str(line.get("label"))] = line
            self._found.pop(line["step"], None)

    def at(self, step: float | None) -> Core:
        """The result of a step."""
        if step not in self._tasks:
            return NO_CORE
        if step not in self._found:
            self._found[step] = _core_of(self._tasks[step])
        return self._found[step]


class Evaluations:
    """CORE's results from what `nanochat evaluate` wrote into a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # by file: its stamp, its step, its result
        self._files: dict[str, tuple[tuple[int, int], float | None, Core]] = {}

    def read(self) -> dict[float, Core]:
        """{step: result}; of several of a step the one with the most examples. Raises OSError."""
        found: dict[str, tuple[tuple[int, int], float | None, Core]] = {}
        results: dict[float, Core] = {}
        for path in self._newest():
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            known = self._files.get(path.name)
            # a result is never changed, but replaced
            if not known or known[0] != stamp:
                known = (stamp, *_read_evaluation(path, status.st_size))
            found[path.name] = known
            _, step, core = known
            if None not in (core.value, step) and core.n > results.get(step, NO_CORE).n:
                results[step] = core
        self._files = found
        return results

    def _newest(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        # a link may lead elsewhere, and opening a pipe would wait
        files = [path for path in self.folder.glob("*.json") if stat.S_ISREG(path.lstat().st_mode)]
        return sorted(files)[-MOST_EVALUATIONS:]


def _read_evaluation(path: Path, n_bytes: int) -> tuple[float | None, Core]:
    """(step, result) of a file of evaluations; (None, NO_CORE) if it has none."""
    if n_bytes > LARGEST_EVALUATION_BYTES:
        return None, NO_CORE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    # other people's JSON, or one that is being written
    except (OSError, ValueError, RecursionError):
        return None, NO_CORE
    tasks = dig(report, "core", "tasks")
    if not isinstance(tasks, dict):
        return None, NO_CORE
    return finite_number(report.get("step")), _core_of(tasks)


def _core_of(tasks: dict[str, Any]) -> Core:
    """CORE of the entries of all tasks."""
    try:
        result = core_result(source="", step=None, tasks=tasks, baselines=None, max_per_task=None)
    except TROUBLES:
        # answers that contradict each other
        return NO_CORE
    low, high = finite_number(result.low), finite_number(result.high)
    return Core(finite_number(result.core_metric), low, high, result.n)


# ----- a run


@dataclass
class Reader:
    """What was read of one run so far. Not for several threads."""

    name: str
    path: Path
    root: Path
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._metrics = Metrics(self.path / "metrics.jsonl")
        self._core = TrainingCore(self.path / "core.jsonl")
        self._evaluations = Evaluations(self.path / "evaluations")
        self._evaluated: dict[float, Core] = {}
        self._samples: list[Sample] = []
        self._sample_tail = Tail(self.path / "samples.jsonl")

    def read(self) -> WatchedRun:
        """The run as it is now."""
        self.problems = []
        for file, read in (
            ("metrics.jsonl", self._metrics.read),
            ("core.jsonl", self._core.read),
            ("evaluations", self._read_evaluations),
            ("samples.jsonl", self._read_samples),
        ):
            try:
                # a folder from somewhere else may hold links to files that are none of its own
                if not (self.path / file).resolve().is_relative_to(self.root):
                    raise OSError("it leads outside the folder")
                read()
            except OSError as error:
                self.problems.append(f"{file} cannot be read ({error.strerror or error})")
        curves = {name: self._metrics.curve(name) for name in CURVES}
        curves[CORE] = self._with_intervals(curves[CORE])
        return WatchedRun(self.name, curves, spread(self._samples), self.problems)

    def _with_intervals(self, curve: Curve) -> Curve:
        """CORE's curve with intervals, and with what was evaluated after training."""
        if curve.n != len(curve.value):
            return curve
        points = {}
        for i, value in enumerate(curve.value):
            step = curve.axes["step"][i]
            core = self._core.at(step)
            places = {axis: numbers[i] for axis, numbers in curve.axes.items()}
            points[step] = (places, Core(value, core.low, core.high, core.n))
        for step, core in self._evaluated.items():
            # more examples say more
            if step not in points or core.n > points[step][1].n:
                points[step] = (self._metrics.places_of(step), core)
        if not points:
            return curve
        shown = [points[step] for step in sorted(points, key=_or_first)]
        places, cores = zip(*shown, strict=True)
        return Curve(
            {axis: [each[axis] for each in places] for axis in AXES},
            [core.value for core in cores],
            [core.low for core in cores],
            [core.high for core in cores],
            len(cores),
            cores[-1].value,
        )

    def _read_evaluations(self) -> None:
        self._evaluated = self._evaluations.read()

    def _read_samples(self) -> None:
        if self._sample_tail.begins_anew():
            self._samples = []
        for line in self._sample_tail.new():
            text, prompt = line.get("text"), line.get("prompt")
            if isinstance(text, str) and finite_number(line["step"]) is not None:
                prompt = prompt if isinstance(prompt, str) else ""
                self._samples.append(Sample(line["step"], _shown(prompt), _shown(text)))


def _shown(text: str) -> str:
    """A text of a sample as a page can show it."""
    if len(text) > LONGEST_SAMPLE:
        text = text[:LONGEST_SAMPLE] + "..."
    return printable(text)


def spread(samples: list[Sample]) -> list[Sample]:
    """At most MOST_SAMPLES samples: all those of some steps, evenly spread, the newest included."""
    steps = list(dict.fromkeys(sample.step for sample in samples))
    n_steps = max(1, MOST_SAMPLES * len(steps) // max(1, len(samples)))
    if n_steps >= len(steps):
        return samples[-MOST_SAMPLES:]
    kept = {steps[i] for i in np.linspace(len(steps) - 1, 0, n_steps).round().astype(int)}
    return [sample for sample in samples if sample.step in kept][-MOST_SAMPLES:]


# ----- all runs


class Watch:
    """The runs under a folder. Not for several threads."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        # as of the last listing: most runs stay as they are
        self._listed: dict[str, ListedRun] = {}
        self._readers: OrderedDict[str, Reader] = OrderedDict()

    def listing(self) -> Listing:
        """The runs as they are now, the one that was written last first."""
        problems: list[str] = []
        listed = {}
        for name, path in self._paths(problems).items():
            # one damaged run must not hide the others
            try:
                listed[name] = self._summary(name, path)
            except TROUBLES as error:
                problems.append(f"{name}: damaged run ({reason_of(error)})")
        self._listed = listed
        runs = sorted(listed.values(), key=_written, reverse=True)
        return Listing(
            printable(self.folder.name),
            runs,
            [self._without_folder(problem) for problem in problems],
        )

    def run(self, name: str) -> WatchedRun:
        """A run that the listing names. Raises Refused for any other name."""
        path = self._paths([]).get(name)
        if path is None:
            raise Refused(
                f"the run {name!r} is not under the folder that this server watches; /watch/runs "
                f"lists those that are",
                code="run_not_found",
                status=404,
            )
        reader = self._readers.pop(name, None)
        if reader is None or reader.path != path:
            reader = Reader(name, path, self.folder)
        self._readers[name] = reader
        if len(self._readers) > MOST_KEPT:
            self._readers.popitem(last=False)
        return reader.read()

    def _paths(self, problems: list[str]) -> dict[str, Path]:
        """{name: folder} of all runs."""
        paths: dict[str, Path] = {}
        try:
            for path in find(self.folder, LEVELS, problems):
                below = path.relative_to(self.folder).as_posix()
                name = printable(self.folder.name if below == "." else below)
                if path.resolve().is_relative_to(self.folder):
                    paths.setdefault(name, path)
                else:
                    problems.append(f"{name}: not shown (it is a link that leads elsewhere)")
        except RecursionError as error:
            problems.append(f"the search for runs ended early ({in_a_line(error)})")
        return paths

    def _summary(self, name: str, path: Path) -> ListedRun:
        stamp = stamp_of(path)
        known = self._listed.get(name)
        # a run that is killed changes no file
        if known and known.stamp == stamp and known.status != "running":
            return known
        found = read_summary(path)
        return ListedRun(
            name,
            printable(str(found.status)),
            printable(str(found.reason))[:LONGEST_REASON],
            finite_number(found.depth),
            finite_number(found.parameters),
            finite_number(found.step),
            finite_number(found.steps),
            finite_number(found.tokens),
            finite_number(found.total_training_time),
            finite_number(found.tok_per_sec),
            finite_number(found.val_bpb),
            finite_number(found.core_metric),
            found.updated,
            stamp,
        )

    def _without_folder(self, problem: str) -> str:
        """A sentence without the path of the folder, which is nobody's business."""
        shown = problem.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "folder")
        return printable(shown)[:LONGEST_REASON]


def _written(run: ListedRun) -> float:
    return run.updated


def stamp_of(path: Path) -> str:
    """A text that changes with the files of a run."""
    found = []
    for file in FILES:
        try:
            status = (path / file).stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return json.dumps(found, separators=(",", ":"))
