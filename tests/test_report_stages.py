"""nanochat report --stages: kept checkpoints side by side on one page."""

import json

import pytest
import small
from test_report import Page

from nanochat.__main__ import main as nanochat
from nanochat.apps import report
from nanochat.apps.report import stages
from nanochat.common import UsageError, write_json
from nanochat.run import checkpoint, plots
from nanochat.run.records import read_run

PROMPT = "12 squared"


@pytest.fixture
def run(tmp_path):
    """A completed run of 12 steps, with checkpoints at 4, 6, 8 and 12, validated at 5, 10 and
    12."""
    return small.copy_run(small.finished(), tmp_path, "run")


def page_of(run, *flags):
    """The page of stages, as text."""
    command = [str(run), f"--prompt={PROMPT}", "--max-tokens=8", *flags]
    assert report.main(command) == 0
    return (run / "stages.html").read_text(encoding="utf-8")


def test_a_column_for_each_kept_checkpoint(run, capsys):
    checkpoint.mark_best(run, 12)
    text = page_of(run, "--stages")
    page = Page(text)
    assert page.tags.count("h3") == len(stages.TEMPERATURES) == 3
    assert text.count("<pre>") == 3 * 4 and text.count(f"<b>{PROMPT}</b>") == 3 * 4
    rows = {row[0]: row[1:] for row in map(str.split, capsys.readouterr().out.splitlines())}
    assert rows["step"] == ["4", "6", "8", "12"]
    # 256 tokens a step
    per_text = small.config(run.parent)["data"]["tokens_per_epoch"]
    assert rows["epochs"] == [f"{256 * step / per_text:.4g}" for step in (4, 6, 8, 12)]
    last = [line for line in small.lines(run.parent) if line["step"] == 12][-1]
    assert rows["validation"][-4:] == ["-", "-", "-", f"{last['val/bpb']:.4f}"]
    assert f"<td>{last['val/loss']:.4f}</td>" in text
    assert f"step 12, validation loss {last['val/loss']:.4f}" in "".join(page.texts)


def test_the_training_loss_is_that_of_the_updates_before(run):
    made = stages.stages_of(read_run(run), [4, 12], stages.Drawing("", 1, 1, "cpu", "float32"))
    losses = small.losses(run.parent)
    smooth = plots.smoothed([losses[step] for step in sorted(losses)])
    assert [stage.train_loss for stage in made] == [smooth[3], smooth[11]]
    # passes over the text are unknown without its length
    assert made[0].title.endswith(" epochs")
    config = small.config(run.parent)
    del config["data"]["tokens_per_epoch"]
    write_json(run / "config.json", config)
    (made,) = stages.stages_of(read_run(run), [4], stages.Drawing("", 1, 1, "cpu", "float32"))
    assert made.title == "step 4" and made.epochs is None


def test_the_texts_are_those_of_sample(run, capsys):
    """Of the same seed, at each temperature; those of two temperatures differ."""
    page_of(run, "--stages=4,12", "--seed=7", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert [stage["step"] for stage in shown["stages"]] == [4, 12]
    assert shown["page"] == str(run / "stages.html")
    for stage in shown["stages"]:
        assert list(stage["texts"]) == ["0.5", "0.8", "1.0"]
        assert len(set(stage["texts"].values())) > 1
        for temperature, text in stage["texts"].items():
            command = ["sample", str(run), f"--step={stage['step']}", f"--prompt={PROMPT}"]
            command += ["--max-tokens=8", "--seed=7", f"--temperature={temperature}", "--json"]
            assert nanochat(command) == 0
            assert json.loads(capsys.readouterr().out)[0]["text"] == text


def test_the_page_is_whole_in_itself_and_holds_no_markup_of_texts(run, monkeypatch):
    evil = "<script>alert(1)</script> & <img src=x onerror=y> \x1b \ud800 </pre>"
    texts = dict.fromkeys(stages.TEMPERATURES, evil)
    monkeypatch.setattr(stages, "_texts", lambda *of: texts)
    assert report.main([str(run), "--stages=4,8", "--prompt=<b>&"]) == 0
    text = (run / "stages.html").read_text(encoding="utf-8")
    page = Page(text)
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;img src=x onerror=y&gt; \u241b ? "
    assert text.count(escaped + "&lt;/pre&gt;") == 6 and "<b>&lt;b&gt;&amp;</b>" in text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not {"onerror", "href", "action"} & set(dict(page.attributes))
    links = [value for name, value in page.attributes if name in ("src", "srcset")]
    # two curves, light and dark
    assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_a_rolling_checkpoint_is_no_stage(run, monkeypatch):
    kind_of = checkpoint.kind_of

    def kind(path, step):
        return "rolling" if step == 8 else kind_of(path, step)

    monkeypatch.setattr(checkpoint, "kind_of", kind)
    assert stages.steps_of_stages(read_run(run), None) == [4, 6, 12]
    assert stages.steps_of_stages(read_run(run), [12, 8, 12]) == [8, 12]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stages=4,5"], "--stages: .* has no checkpoint of step 5; choose from 4, 6, 8, 12"),
        (["--stages="], "--stages: names no step; give some"),
        (["--stages", "--result"], "--result: cannot be combined with --stages"),
        (["--stages", "--max-tokens=0"], "--max-tokens=0: must be at least 1"),
        (["--stages", "--seed=-1"], "--seed=-1: must be from 0"),
        (["--prompt=x", "--max-tokens=3"], "--prompt, --max-tokens: belongs to --stages; add that"),
    ],
)
def test_what_is_refused(run, flags, message):
    before = sorted(run.iterdir())
    with pytest.raises(UsageError, match=message):
        report.main([str(run), *flags])
    assert sorted(run.iterdir()) == before
