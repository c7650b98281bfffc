"""What /metrics shows, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields

from nanochat.apps.serve.runs import ServedRun

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# counts of the engine that go up and down; all others only grow
GAUGES = ("running", "waiting")


class Metrics:
    """Counts of HTTP requests. Used in the event loop only."""

    def __init__(self) -> None:
        # (path, status): requests
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._first_tokens = 0
        self._first_token_seconds = 0.0
        self.in_progress = 0

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request; path: one of the known ones."""
        self._requests[path, status] += 1
        self._seconds += seconds

    def first_token(self, seconds: float) -> None:
        """Count the time from a request to its first token."""
        self._first_tokens += 1
        self._first_token_seconds += seconds

    def text(self, runs: Iterable[ServedRun]) -> str:
        """All metrics."""
        lines = [*self._of_http(), *_of_runs(list(runs))]
        return "\n".join(lines) + "\n"

    def _of_http(self) -> Iterator[str]:
        name = "nanochat_http_requests_total"
        yield f"# TYPE {name} counter"
        for (path, status), count in sorted(self._requests.items()):
            yield f'{name}{{path="{path}",status="{status}"}} {count}'
        yield "# TYPE nanochat_http_requests_in_progress gauge"
        yield f"nanochat_http_requests_in_progress {self.in_progress}"
        count = sum(self._requests.values())
        yield from _summary("nanochat_http_request_seconds", count, self._seconds)
        yield from _summary(
            "nanochat_first_token_seconds", self._first_tokens, self._first_token_seconds
        )


def _summary(name: str, count: int, seconds: float) -> Iterator[str]:
    yield f"# TYPE {name} summary"
    yield f"{name}_sum {seconds:.6f}"
    yield f"{name}_count {count}"


def _of_runs(runs: list[ServedRun]) -> Iterator[str]:
    yield "# TYPE nanochat_model_step gauge"
    for run in runs:
        yield f"nanochat_model_step{_label(run)} {run.step}"
    yield "# TYPE nanochat_engine_batch_invariant gauge"
    for run in runs:
        yield f"nanochat_engine_batch_invariant{_label(run)} {int(run.engine.is_batch_invariant)}"
    counts = [(run, run.engine.counts()) for run in runs]
    # every engine counts the same things
    for field in fields(counts[0][1]):
        is_gauge = field.name in GAUGES
        name = f"nanochat_engine_{field.name}" + ("" if is_gauge else "_total")
        yield f"# TYPE {name} {'gauge' if is_gauge else 'counter'}"
        for run, each in counts:
            yield f"{name}{_label(run)} {getattr(each, field.name)}"


def _label(run: ServedRun) -> str:
    escaped = run.name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{model="{escaped}"}}'
