"""The stages of a training on one page: kept checkpoints side by side, with the losses of each and
what it writes at several temperatures.

The prompt and the seed are the same everywhere, so that the checkpoint and the temperature alone
make a text different."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.apps.report.page import (
    PICTURES,
    as_table,
    document,
    escaped,
    figure,
    problem_list,
    sample_text,
    shown,
)
from nanochat.common import UsageError, counted, human_time, note_once
from nanochat.data.tokenizer import Tokenizer
from nanochat.eval.generation import NotNumbers, check_prompt, prompt_with_bos, room_for
from nanochat.eval.writer import Writer, request_from
from nanochat.model.decoder import Decoder
from nanochat.run import checkpoint, plots
from nanochat.run.loading import load_step, step_of
from nanochat.run.records import RunRecord, dig, finite_number
from nanochat.run.tables import aligned, fixed

# from likely characters only to the model's own distribution
TEMPERATURES = (0.5, 0.8, 1.0)
# as `nanochat sample` draws
TOP_K = 50
# windows that are too narrow for two columns have them one below the other
STYLE = """
body { max-width: 1720px; }
h3 { margin: 18px 0 8px; font-size: 1.05em; }
.stages {
  display: grid; gap: 12px; overflow-x: auto; padding-bottom: 6px;
  grid-auto-flow: column; grid-auto-columns: minmax(230px, 1fr);
}
.stages figcaption span { display: block; color: var(--soft); font-weight: 400; font-size: .85em; }
.stages pre { margin-bottom: 4px; }
.curves { margin-top: 12px; }
@media (max-width: 620px) {
  .stages { grid-auto-flow: row; grid-auto-columns: auto; }
  .right th:not(:first-child), .right td:first-child { white-space: normal; }
  th, td { padding: 5px 8px; }
}
"""


@dataclass(frozen=True)
class Drawing:
    """How the texts are drawn. prompt: "" begins a document. device_type, dtype: as the flags."""

    prompt: str
    max_tokens: int
    seed: int
    device_type: str
    dtype: str


@dataclass(frozen=True)
class Stage:
    """A checkpoint and what was measured there, None where it was not. epochs: passes over the
    text. train_loss: smoothed, nats a token, as val_loss. texts: by temperature, without the
    prompt."""

    step: int
    epochs: float | None
    seconds: float | None
    train_loss: float | None
    val_loss: float | None
    val_bpb: float | None
    texts: dict[float, str]

    @property
    def title(self) -> str:
        """What it is called at the head of its column."""
        return shown(self.epochs, ".3g", after=" epochs") or f"step {self.step:,}"


def steps_of_stages(run: RunRecord, asked: Sequence[int] | None) -> list[int]:
    """The steps of the checkpoints to show, ascending. asked: None for all that are kept.

    UsageError if there are none, or for one that does not exist."""
    # says what is wrong with a folder without checkpoints
    newest = step_of(run.path, None)
    have = checkpoint.steps_of(run.path)
    if asked is None:
        # a rolling one is no stage: the next save removes it
        kept = [step for step in have if checkpoint.kind_of(run.path, step) != "rolling"]
        return kept or [newest]
    if missing := sorted(set(asked) - set(have)):
        raise UsageError(
            f"--stages: {run.path} has no checkpoint of step {', '.join(map(str, missing))}; "
            f"choose from {', '.join(map(str, have))}"
        )
    return sorted(set(asked))


def stages_of(run: RunRecord, steps: Sequence[int], drawing: Drawing) -> list[Stage]:
    """The checkpoints of these steps, with texts drawn now. UsageError for damaged ones, and for a
    prompt that cannot be continued."""
    return [_stage(run, step, drawing) for step in steps]


def _stage(run: RunRecord, step: int, drawing: Drawing) -> Stage:
    _, model, tokenizer = load_step(run.path, step, drawing.device_type, drawing.dtype)
    tokens_of_step = finite_number(dig(run.config, "plan", "total_batch_tokens"))
    tokens_of_text = finite_number(dig(run.config, "data", "tokens_per_epoch"))
    epochs = None
    if tokens_of_step and tokens_of_text:
        epochs = step * tokens_of_step / tokens_of_text
    return Stage(
        step=step,
        epochs=epochs,
        seconds=_at(run, "total_training_time", step),
        train_loss=_train_loss(run, step),
        val_loss=_at(run, "val/loss", step),
        val_bpb=_at(run, "val/bpb", step),
        texts=_texts(f"{run.path}, step {step}", model, tokenizer, drawing),
    )


def _at(run: RunRecord, name: str, step: int) -> float | None:
    """The value of a metric that was written last at a step, or None."""
    values = [line.get(name) for line in run.lines if line.get("step") == step]
    return next((value for value in reversed(values) if finite_number(value) is not None), None)


def _train_loss(run: RunRecord, step: int) -> float | None:
    """The smoothed training loss at the last update before a checkpoint; of one alone it is noise.
    None for a checkpoint without training."""
    x, y = plots.points(run.lines, "train/loss")
    # the line of step N holds the loss of the update that follows
    done = plots.smoothed(y)[x < step]
    return float(done[-1]) if len(done) else None


def _texts(title: str, model: Decoder, tokenizer: Tokenizer, drawing: Drawing) -> dict[float, str]:
    """{temperature: what continues the prompt}, all drawn together."""
    ids = prompt_with_bos(tokenizer, drawing.prompt)
    check_prompt(model, ids, 1)
    room = room_for(model, len(ids), drawing.max_tokens)
    # the same for all checkpoints
    if room.note:
        note_once(f"note: {room.note}")
    requests = [
        request_from(
            ids,
            room.max_new_tokens,
            temperature=temperature,
            top_k=TOP_K,
            seed=drawing.seed,
        )
        for temperature in TEMPERATURES
    ]
    try:
        with Writer(model, tokenizer, slots=len(requests)) as writer:
            return dict(zip(TEMPERATURES, writer.texts(requests), strict=True))
    except NotNumbers as error:
        raise UsageError(f"--stages: {title}: {error}; leave this step out") from None


# ----- for people and programs


def rows_of(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    """(name, value of each stage) of what was measured; '-' where nothing was."""
    return [
        ("step", *(f"{stage.step:,}" for stage in stages)),
        ("epochs", *(shown(stage.epochs, ".4g") or "-" for stage in stages)),
        ("training loss, nats", *(fixed(stage.train_loss) for stage in stages)),
        ("validation loss, nats", *(fixed(stage.val_loss) for stage in stages)),
        ("validation bits per byte", *(fixed(stage.val_bpb) for stage in stages)),
        ("training time", *(_time(stage) for stage in stages)),
    ]


def _time(stage: Stage) -> str:
    return "-" if stage.seconds is None else human_time(stage.seconds)


def in_words(stages: Sequence[Stage], page: Path) -> str:
    """The measurements as a table with a column for each stage, and where the page is."""
    return f"{aligned(rows_of(stages))}\npage  {page}"


def as_json(run: RunRecord, stages: Sequence[Stage], page: Path) -> dict[str, Any]:
    """What --json prints."""
    return {"name": run.name, "page": str(page), "stages": [asdict(stage) for stage in stages]}


def as_page(run: RunRecord, stages: Sequence[Stage], drawing: Drawing) -> str:
    """The stages as one self-contained file of HTML, a column for each."""
    titles = ("", *(stage.title for stage in stages))
    # the first two are losses
    curves = [
        figure(picture, run)
        for picture in PICTURES[:2]
        if len(plots.points(run.lines, picture.metric)[0])
    ]
    prompt = repr(drawing.prompt) if drawing.prompt else "none, a new document"
    parts = [
        f"<h1>{escaped(run.name)}: {escaped(counted(len(stages), 'stage'))}</h1>",
        f"<p class=soft>{escaped(run.path)}</p>",
        problem_list(run.problems),
        "<h2>Losses</h2>",
        as_table(titles, rows_of(stages)),
        "<p class=soft>The training loss is the mean of the steps around it, with dropout if the "
        "run has any. Where it falls and the validation loss rises, the model memorises.</p>",
        f"<div class=curves>{''.join(curves)}</div>" if curves else "",
        "<h2>Samples</h2>",
        f"<p class=soft>Prompt: {escaped(prompt)}. Seed {drawing.seed}, top-k {TOP_K}, at most "
        f"{drawing.max_tokens:,} tokens, the same for all.</p>",
    ]
    for temperature in TEMPERATURES:
        columns = "".join(_column(stage, temperature, drawing.prompt) for stage in stages)
        parts += [f"<h3>Temperature {temperature}</h3>", f"<div class=stages>{columns}</div>"]
    return document(f"{run.name}: stages", parts, STYLE)


def _column(stage: Stage, temperature: float, prompt: str) -> str:
    """What a stage wrote at a temperature, under its title."""
    facts = f"step {stage.step:,}{shown(stage.val_loss, '.4f', ', validation loss ')}"
    text = sample_text({"prompt": prompt, "text": stage.texts[temperature]})
    return (
        f"<figure><figcaption>{escaped(stage.title)}<span>{escaped(facts)}</span></figcaption>"
        f"{text}</figure>"
    )
