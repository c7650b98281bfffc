"""nanochat report: the summary, the page (self-contained, nothing unescaped), damaged runs."""

import base64
import html
import json
import re
from html.parser import HTMLParser

import pytest
from made_runs import DAMAGES, made_tasks, make

from nanochat.__main__ import main as nanochat
from nanochat.apps import report
from nanochat.apps.report import page
from nanochat.common import UsageError, write_json
from nanochat.run.folder import RunFolder, write_summary

VOID = {"meta", "source", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order; collects text, attributes and tags."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(folder, *arguments):
    """The page that the app writes for a run, as text."""
    assert report.main([str(folder), *arguments]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def test_summary_picture_and_page(tmp_path, capsys):
    path = make(tmp_path, "d4", core=(core := made_tasks(1)))
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}
    text = page_of(path)
    out = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    metric = sum(task["centered"] for task in core.values()) / 22
    assert out[:4] == [
        ["status", "completed"],
        ["steps", "200 of 200, 200,000 tokens"],
        ["training time", "8.0s, 5,000 tokens/s, 40.0% MFU, peak memory 953.7 MiB"],
        ["val_bpb", "1.5000 (best 1.5000)"],
    ]
    assert out[4][1].startswith(f"{metric:.4f}, 95% interval ") and out[5] == [
        "compressors on the same text",
        "gzip -9 2.500",
    ]
    assert out[6:] == [["plot", str(path / "loss.png")], ["page", str(path / "report.html")]]
    assert (path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    after = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {
        "loss.png",
        "report.html",
    }
    texts = Page(text).texts
    for shown in (
        "1.5000",
        f"{metric:.4f}",
        "200,000",
        "1.92e+12",
        "completed",
        "--matrix-lr",
        "0.02",
        "gzip -9",
        "c0ffee",
    ):
        assert any(shown in part for part in texts), shown
    for label, task in core.items():
        row = [
            "",
            label,
            f"{task['accuracy']:.4f}",
            f"± {task['stderr']:.4f}",
            f"{task['chance']:.3f}",
            f"{task['centered']:+.4f}",
            "50",
        ]
        assert "</td><td>".join(row[1:]) in text


def result_of(path, capsys):
    """{name: value} of what --result prints, which has to be one line."""
    before = sorted(path.rglob("*"))
    assert report.main([str(path), "--result"]) == 0
    assert sorted(path.rglob("*")) == before
    (line,) = capsys.readouterr().out.splitlines()
    first, *words = line.split()
    assert first == "RESULT"
    return dict(word.split("=") for word in words)


def test_the_result_line(tmp_path, capsys):
    path = make(tmp_path, "d4")
    assert result_of(path, capsys)["val_loss"] == "null"
    with open(path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 150, "val/loss": 3}\n{"step": 200, "val/loss": 2.25}\n')
    values = result_of(path, capsys)
    assert values == {
        "status": "completed",
        "val_bpb": "1.5",
        "val_loss": "2.25",
        "tokens": "200000",
        "total_training_flops": "1.92e+12",
        "total_training_time": "8",
        "tok_per_sec": "5000",
        "mfu": "40",
    }
    (path / "summary.json").unlink()
    (path / "metrics.jsonl").unlink()
    write_summary(path, status="failed", reason="x")
    assert result_of(path, capsys)["val_bpb"] == "null"


def test_the_summary_as_json(tmp_path, capsys):
    path = make(tmp_path, "d4")
    assert report.main([str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["status"] == "completed" and shown["val_bpb"] == 1.5 and shown["problems"] == []
    assert shown["tokens"] == 200000 and shown["step"] <= shown["steps"]
    files = [path / "loss.png", path / "report.html"]
    assert [shown["plot"], shown["page"]] == list(map(str, files))
    assert all(file.exists() for file in files)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path), "--json", "--result"])


def test_the_result_line_has_the_newest_evaluation(tmp_path, capsys):
    """Of all examples, rather than of the sample that training took."""
    path = make(tmp_path, "d4", core=made_tasks(1))
    of_training = result_of(path, capsys)
    (path / "evaluations").mkdir()
    for name, seed in (("step_000200", 2), ("step_000200_2", 3)):
        write_json(
            path / "evaluations" / f"{name}.json",
            {"step": 200, "core": {"tasks": made_tasks(seed)}},
        )
    values = result_of(path, capsys)
    metric = sum(task["centered"] for task in made_tasks(3).values()) / 22
    assert float(values["core"]) == pytest.approx(metric, abs=1e-6)
    assert float(values["core_low"]) < metric < float(values["core_high"])
    assert values["core"] != of_training["core"]


def test_the_page_is_whole_in_itself(tmp_path):
    text = page_of(make(tmp_path, "d4", steps=50))
    page = Page(text)
    links = [
        value
        for name, value in page.attributes
        if name in ("src", "srcset", "href", "action", "data")
    ]
    assert len(links) == 12 and all(
        value.startswith("data:image/png;base64,") for value in links
    )  # six curves, light and dark
    assert all(base64.b64decode(value.split(",")[1])[:4] == b"\x89PNG" for value in links)
    assert (
        not {"script", "link", "iframe", "object"} & set(page.tags)
        and "url(" not in text
        and "@import" not in text
    )
    assert "prefers-color-scheme: dark" in text and ("name", "viewport") in page.attributes
    assert all(
        f">{title}<" in text
        for title in ("Training loss", "Bits per byte", "Gradient norm", "Speed", "MFU")
    )


def test_no_text_becomes_markup(tmp_path, capsys):
    evil = '<script>alert("1")</script> & <img src=x onerror=y> \x00\x1b[31m \ud800 </pre>'
    path = make(tmp_path, "a<b>&c", steps=3, data=evil)
    write_summary(path, status="failed", reason=evil, step=3)
    lines = [{"step": 2, "prompt": evil, "text": evil}, {"step": 1, "prompt": "", "text": "early"}]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "evaluations").mkdir()
    write_json(
        path / "evaluations" / "step_1<i>.json",
        {"step": 1, "bpb": {"bpb": 1.25}, "samples": [{"prompt": evil, "text": evil}]},
    )
    text = page_of(path)
    page = Page(text)
    assert (
        not {"script", "b&c", "i"} & set(page.tags)
        and "onerror" not in dict(page.attributes)
        and page.tags.count("img") == 6
    )
    escaped = (
        "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;img src=x onerror=y&gt; "
        "\u2400\u241b[31m ? &lt;/pre&gt;"
    )
    assert text.count(escaped) == 6 and html.unescape("a&lt;b&gt;&amp;c") in "".join(page.texts)
    # a terminal does not get what could control it
    assert "? </pre>)" in capsys.readouterr().out
    assert text.index("step 2<") < text.index("step 1<") and "early" in text


def test_samples_of_many_steps_are_thinned(tmp_path):
    path = make(tmp_path, "d4", steps=1)
    lines = [
        json.dumps({"step": step, "prompt": "p", "text": f"text {step}"}) for step in range(500)
    ]
    (path / "samples.jsonl").write_text("\n".join(lines))
    text = page_of(path)
    steps = [int(step) for step in re.findall(r"<summary>step ([\d,]+)<", text)]
    assert (
        len(steps) == page.SAMPLE_STEPS
        and steps == sorted(steps, reverse=True)
        and {steps[0], steps[-1]} == {0, 499}
    )
    assert "40 of 500 steps" in text


def test_evaluations_are_listed(tmp_path, capsys):
    path = make(tmp_path, "d4", steps=3)
    (path / "evaluations").mkdir()
    tasks = made_tasks(3)
    core = {"tasks": tasks, "core_metric": 0.25, "low": 0.125, "high": 0.5, "n": 1100}
    write_json(
        path / "evaluations" / "step_000003.json", {"step": 3, "core": core, "bpb": {"bpb": 1.0625}}
    )
    (path / "evaluations" / "torn.json").write_text('{"core"')
    text = page_of(path)
    assert (
        "</td><td>".join(["step_000003.json", "3", "1.0625", "0.2500", "0.1250 to 0.5000", "1100"])
        in text
    )
    assert (
        "evaluations/step_000003.json)</summary>" in text
        and f"{tasks['copa']['accuracy']:.4f}" in text
    )
    assert (
        re.search(r"problem: .*torn\.json cannot be read as JSON", capsys.readouterr().out)
        and "torn.json cannot be read" in text
    )


def test_a_run_without_steps(tmp_path, capsys):
    path = tmp_path / "imported"
    path.mkdir()
    RunFolder(path).write_config(
        {"args": {"depth": 3, "arch": "llama"}, "imported_from": "hf/model", "model": {"width": 64}}
    )
    write_summary(
        path,
        status="completed",
        reason="imported from hf/model",
        step=0,
        tokens=0,
        total_training_flops=0,
        val_bpb=None,
        total_training_time=0.0,
        tok_per_sec=None,
        mfu=None,
        peak_memory_bytes=None,
    )
    text = page_of(path)
    out = capsys.readouterr().out
    assert (
        "plot                          none: there is no training step" in out
        and not (path / "loss.png").exists()
    )
    assert (
        "problem" not in out
        and "imported from hf/model" in text
        and "Curves" not in text
        and "64" in text
    )


# the DAMAGES (by place) that are shown as missing numbers or lines, without a problem of their own
WITHOUT_PROBLEM = {
    "summary.json": {4},
    "metrics.jsonl": {0, 2, 3},
    "core.jsonl": {0, 1, 2, 3},
    "evaluations/step_000001.json": {3, 4},
    "samples.jsonl": {0, 1},
}


@pytest.mark.parametrize("file", DAMAGES)
def test_damages_are_told_and_the_rest_is_shown(tmp_path, capsys, file, monkeypatch):
    if file != "metrics.jsonl":  # what pictures are made of
        monkeypatch.setattr(report.plots, "png", lambda *arguments, **options: b"")
    for i, content in enumerate(DAMAGES[file]):
        path = make(tmp_path, f"bad{i}", core=made_tasks(1, 5), steps=5)
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(content)
        Page(page_of(path))
        out = capsys.readouterr().out
        lost = (
            "[1]\nnull" in content or '"x", "val/bpb"' in content
        )  # a line that is none; nothing to plot
        assert ("plot                          none" in out) == (
            file == "metrics.jsonl" and (not content or lost)
        )
        assert ("problem: " in out) == (i not in WITHOUT_PROBLEM.get(file, ())), content


def test_what_is_left_when_all_but_the_lines_is_lost(tmp_path, capsys):
    path = make(tmp_path, "d4", steps=40, bpb=1.25)
    (path / "config.json").unlink()
    (path / "summary.json").write_text("{")
    text = page_of(path)
    out = capsys.readouterr().out
    assert (
        "status                        unknown" in out
        and "1.2500" in out
        and out.count("problem: ") == 2
    )
    assert "steps                         40 of ?, 40,000 tokens" in out and "Training loss" in text


def test_wrong_usage(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    write_json(tmp_path / "foreign" / "config.json", {"model_type": "gpt2"})
    for name, says in (
        ("empty", "holds no run"),
        ("foreign", "was not written by nanochat"),
        ("nowhere", "no such folder"),
    ):
        assert nanochat(["report", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err
    path = make(tmp_path, "d4", steps=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        report.main([str(path), "--out", str(tmp_path / "file" / "x")])
    assert report.main([str(path), "--out", str(tmp_path / "new")]) == 0
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        "loss.png",
        "report.html",
    } and not (path / "report.html").exists()


def test_a_real_run(tmp_path, capsys):
    import small

    assert small.run(tmp_path, "--num-iterations=6", "--no-save", "--save-every=-1") == 0
    capsys.readouterr()
    text = page_of(tmp_path / "run")
    out = capsys.readouterr().out
    summary = small.summary(tmp_path)
    assert (
        "problem" not in out
        and "status                        completed" in out
        and f"{summary['val_bpb']:.4f}" in text
    )
    assert "step 6<" in text and "--total-batch-size" in text and "16,384" not in text


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    path = make(tmp_path, "d4\x1b[2J\x9b31m", steps=20)
    for arguments in (
        ["report", str(path)],
        ["compare", str(path), "--no-plots"],
        ["runs", str(tmp_path)],
    ):
        assert nanochat(arguments) == 0
        out = capsys.readouterr().out
        assert "d4\ufffd[2J\ufffd31m" in out and "\x1b" not in out and "\x9b" not in out
    (path / "config.json").unlink()
    (path / "summary.json").unlink()
    (path / "metrics.jsonl").unlink()
    assert nanochat(["report", str(path)]) == 2 and "\x1b" not in capsys.readouterr().err
