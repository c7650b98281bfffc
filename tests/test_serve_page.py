"""`nanochat serve`: the page, its headers, and the runs that it watches; some in a real browser."""

import json
import os
import re
import shutil
from urllib.request import Request, urlopen

import made_runs
import numpy as np
import pytest
import small
from serving import BYTES, FakeEngine, application, running, served

from nanochat.apps.serve import build_parser, check_arguments, watch
from nanochat.apps.serve.page import read_page
from nanochat.apps.serve.runs import load_runs
from nanochat.apps.serve.watch import AXES, CURVES, Sample, Watch, spread, thinned
from nanochat.common import UsageError, policy_hashes
from nanochat.data.chat import render, with_chat
from nanochat.eval.engine import Ended
from nanochat.run.loading import load_run
from nanochat.run.records import read_run

from starlette.testclient import TestClient  # isort: skip  (serving skips without it)

HTML = read_page()
MARKUP = '<img src=x onerror="document.title=1"><script>document.title=1</script>'


def client_of(folder=None, **options):
    return TestClient(
        application(watch=folder and Watch(folder), **options), base_url="http://localhost:8000"
    )


def got(folder, path):
    """The object of a path, which must be answered; json.loads() refuses what browsers would."""
    response = client_of(folder).get(path)
    assert response.status_code == 200, response.text
    return json.loads(response.text, parse_constant=pytest.fail)


def write_lines(path, lines, mode="w"):
    with open(path, mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def losses(values, first=0):
    return [{"step": first + i, "train/loss": value} for i, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path):
    """A folder with one run of two samples, and one of another folder."""
    run = made_runs.make(tmp_path / "out", "d4", steps=20, bpb=1.5)
    write_lines(
        run / "samples.jsonl",
        [{"step": step, "prompt": "One", "text": f"One {MARKUP} {step}"} for step in (0, 20)],
    )
    made_runs.make(tmp_path / "private", "d8", steps=20)
    return tmp_path / "out"


# ---- the page ----


def test_the_page_may_run_its_own_script_and_nothing_else():
    response = client_of().get("/")
    assert response.status_code == 200 and response.text == HTML
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    parts = response.headers["content-security-policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    assert policy["script-src"].startswith("'sha256-") and len(policy_hashes(HTML, "script")) == 1
    assert policy["style-src"].startswith("'sha256-") and len(policy_hashes(HTML, "style")) == 1
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy[name] == "'none'", name
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-frame-options"] == "DENY"


def test_the_page_asks_no_other_site():
    # the name of SVG's elements is written like an address
    assert set(re.findall(r"(?:https?:)?//[\w.]+[^\s'\"]*", HTML)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"\ssrc=|@import|\bimport\(", HTML) == []
    # paths that are fetched, and what is drawn with
    assert set(re.findall(r"api\([\"`](/\w+)", HTML)) == {"/v1", "/watch", "/heat"}
    assert set(re.findall(r"url\((.)", HTML)) == {"#"}
    assert re.findall(r'href="(.)', HTML) == ["d", "#", "#", "#"]


@pytest.mark.parametrize(
    "sink",
    [
        r"(inner|outer)HTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment",
        r"\beval\(|new Function|setTimeout\([\"']",
        # attributes that the policy forbids
        r"<[^>]*\s(on\w+|style)=[\"']",
        # the key is kept nowhere
        r"localStorage|document\.cookie|Storage\.setItem\([^)]*[kK]ey",
    ],
)
def test_the_page_has_no_place_where_text_becomes_markup(sink):
    assert re.search(sink, HTML) is None


@pytest.mark.parametrize("path", ["/", "/watch/runs", "/watch/run/d4"])
def test_guards_of_the_page(folder, path):
    client = client_of(folder, api_key="secret")
    key = {"Authorization": "Bearer secret"}
    assert client.get(path, headers=key).status_code == 200
    for wrong in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
        assert client.get(path, headers=key | wrong).status_code == 403
    # the page holds nothing, and asks for the key
    assert client.get(path).status_code == (200 if path == "/" else 401)
    assert client.post(path, json={}, headers=key).status_code == 405


# ---- the listing ----


def test_the_listing(folder):
    made_runs.make(folder / "sweep", "d12", steps=40, bpb=1.25, status="failed")
    os.utime(folder / "d4" / "metrics.jsonl", (2e9, 2e9))
    listing = got(folder, "/watch/runs")
    assert listing["folder"] == "out" and listing["problems"] == []
    first, second = listing["runs"]
    # what was written last comes first
    assert (first["name"], second["name"]) == ("d4", "sweep/d12")
    assert (second["status"], second["val_bpb"], second["depth"]) == ("failed", 1.25, 4)
    assert (second["step"], second["steps"]) == (40, 40)


def test_the_listing_reads_only_what_has_changed(folder, monkeypatch):
    watched = Watch(folder)
    before = watched.listing()
    monkeypatch.setattr(watch, "read_summary", lambda path: pytest.fail(f"{path} was read"))
    assert watched.listing() == before
    monkeypatch.undo()
    write_lines(folder / "d4" / "metrics.jsonl", losses([1.0], first=21), "a")
    (after,) = watched.listing().runs
    assert after.step == 21 and after.stamp != before.runs[0].stamp


def test_the_folder_may_be_a_run(folder):
    (run,) = got(folder / "d4", "/watch/runs")["runs"]
    assert run["name"] == "d4"
    assert got(folder / "d4", "/watch/run/d4")["curves"]["train/loss"]["n"] == 20


def test_without_a_folder():
    for path in ("/watch/runs", "/watch/run/d4"):
        response = client_of().get(path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "no_watch"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "d8",
        "../private/d8",
        "..%2Fprivate%2Fd8",
        "%2e%2e/private/d8",
        "d4/../../private/d8",
        ".%2Fd4",
        "d4/",
        "d4/config.json",
        "link",
        "%00",
        "{private}/d8",
    ],
)
def test_only_listed_names_are_read(folder, name):
    private = folder.parent / "private"
    (folder / "link").symlink_to(private / "d8", target_is_directory=True)
    path = f"/watch/run/{name.format(private=private)}"
    # clients resolve dots, but for those that are escaped
    response = client_of(folder).get(path)
    assert response.status_code == 404
    assert str(folder) not in response.text
    listing = got(folder, "/watch/runs")
    assert [run["name"] for run in listing["runs"]] == ["d4"]
    assert listing["problems"] == ["link: not shown (it is a link that leads elsewhere)"]


def test_files_that_lead_elsewhere_are_not_read(folder):
    (folder / "d4" / "samples.jsonl").unlink()
    secret = folder.parent / "secret.jsonl"
    write_lines(secret, [{"step": 1, "text": "secret"}])
    (folder / "d4" / "samples.jsonl").symlink_to(secret)
    run = got(folder, "/watch/run/d4")
    assert run["samples"] == []
    assert run["problems"] == ["samples.jsonl cannot be read (it leads outside the folder)"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(folder):
    (folder / "d4" / "samples.jsonl").unlink()
    os.mkfifo(folder / "d4" / "samples.jsonl")
    problems = got(folder, "/watch/run/d4")["problems"]
    assert problems == ["samples.jsonl cannot be read (it is no ordinary file)"]


@pytest.mark.parametrize(
    "file, content",
    [
        (file, content)
        for file, contents in made_runs.DAMAGES.items()
        for content in (*contents, '{"step": 1, "text": "\\ud800", "prompt": "\\ud800"}\n')
    ],
)
def test_damaged_runs(folder, file, content):
    """Whatever a file holds, both answers are valid JSON, and name no path of the machine."""
    path = folder / "d4" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    listing = got(folder, "/watch/runs")
    assert len(listing["runs"]) + len(listing["problems"]) == 1
    assert str(folder) not in json.dumps(listing)
    if listing["runs"]:
        got(folder, "/watch/run/d4")


# ---- curves ----


def test_curves_are_those_of_the_file(folder):
    run = read_run(folder / "d4")
    curves = got(folder, "/watch/run/d4")["curves"]
    assert tuple(curves) == CURVES
    for name in CURVES:
        lines = [line for line in run.lines if name in line]
        curve = curves[name]
        assert curve["value"] == [line[name] for line in lines]
        assert curve["n"] == len(lines)
        assert curve["last"] == (lines[-1][name] if lines else None)
        for axis in AXES:
            assert curve["axes"][axis] == [line[axis] for line in lines]


def test_long_curves_are_thinned():
    values = np.random.default_rng(0).normal(size=20_011)
    steps = np.arange(20_011.0)
    curve = thinned({"step": steps}, values)
    assert len(curve.value) == len(curve.low) == len(curve.axes["step"]) == watch.MOST_POINTS
    # peaks stay visible
    assert max(curve.high) == values.max() and min(curve.low) == values.min()
    parts = np.array_split(steps.astype(int), watch.MOST_POINTS)
    assert np.allclose(np.mean(curve.value), values.mean(), atol=1e-3)
    assert abs(curve.axes["step"][0] - parts[0].mean()) <= 1
    assert all(low <= value <= high for low, value, high in zip(curve.low, curve.value, curve.high))
    assert (curve.n, curve.last) == (20_011, values[-1])
    huge = thinned({"step": steps}, np.full(20_011, 1e308))
    assert np.allclose(huge.value, 1e308)


def test_a_growing_file_is_read_from_where_the_last_look_ended(folder, monkeypatch):
    metrics = folder / "d4" / "metrics.jsonl"
    write_lines(metrics, losses([4.0, 3.0]))
    watched = Watch(folder)

    def seen():
        return watched.run("d4").curves["train/loss"].value

    assert seen() == [4.0, 3.0]
    read = []
    monkeypatch.setattr(
        watch, "parsed", lambda line: read.append(line) or (json.loads(line) if line else None)
    )
    write_lines(metrics, losses([2.0], first=2), "a")
    with open(metrics, "a") as file:
        file.write('{"step": 3, "train/lo')
    assert seen() == [4.0, 3.0, 2.0]
    with open(metrics, "a") as file:
        file.write('ss": 1.0}\n')
    assert seen() == [4.0, 3.0, 2.0, 1.0]
    assert len([line for line in read if line]) == 2
    # a resumed run replaces the file
    write_lines(folder / "new", losses([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]))
    (folder / "new").replace(metrics)
    assert seen() == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    # cut in place, and gone
    write_lines(metrics, losses([5.0]))
    assert seen() == [5.0]
    metrics.unlink()
    assert seen() == []


def test_pieces_of_a_large_file(folder, monkeypatch):
    monkeypatch.setattr(watch, "PIECE_BYTES", 7)
    values = [float(i) for i in range(50)]
    write_lines(folder / "d4" / "metrics.jsonl", losses(values))
    assert Watch(folder).run("d4").curves["train/loss"].value == values


def test_core_has_its_interval(tmp_path):
    tasks = made_runs.made_tasks()
    run = made_runs.make(tmp_path, "d4", steps=10, core=tasks)
    write_lines(
        run / "metrics.jsonl", [{"step": 5, "core_metric": 0.1}, {"step": 10, "core_metric": 0.2}]
    )
    curve = Watch(tmp_path).run("d4").curves["core_metric"]
    core = read_run(run).core
    assert curve.value == [0.1, 0.2]
    assert core.low < core.high
    # only the last one has answers
    assert (curve.low, curve.high) == ([None, core.low], [None, core.high])


def evaluated(run, step, tasks, name="", **changes):
    """A file as `nanochat evaluate` writes it."""
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    report = {"step": step, "core": {"tasks": tasks, "baselines": "v1"}} | changes
    (folder / (name or f"step_{step:06d}.json")).write_text(json.dumps(report))


def test_core_of_evaluations_after_training(tmp_path):
    """They are added to those of training; of one step the one with more examples is shown."""
    trained, few, more = (made_runs.made_tasks(seed, n) for seed, n in ((0, 50), (1, 30), (2, 90)))
    run = made_runs.make(tmp_path, "d4", steps=10, core=trained)
    write_lines(
        run / "metrics.jsonl",
        [{"step": step, "tokens": step * 1000, "train/loss": 1.0} for step in range(10)]
        + [{"step": 10, "tokens": 10_000, "core_metric": 0.25}],
    )
    watched = Watch(tmp_path)
    stamp = watched.listing().runs[0].stamp
    evaluated(run, 4, few)
    evaluated(run, 10, few)
    evaluated(run, 77, few)
    assert watched.listing().runs[0].stamp != stamp
    expected = read_run(run).cores
    curve = watched.run("d4").curves["core_metric"]
    by_source = {core.source: core for core in expected}
    assert curve.axes["step"] == [4, 10, 77] and curve.axes["tokens"] == [4000, 10_000, None]
    assert curve.value[1] == 0.25 and curve.low[1] == by_source["core.jsonl, step 10"].low
    for i, source in ((0, "evaluations/step_000004.json"), (2, "evaluations/step_000077.json")):
        found = by_source[source]
        assert (curve.value[i], curve.low[i], curve.high[i]) == (
            found.core_metric,
            found.low,
            found.high,
        )
    evaluated(run, 10, more, "step_000010_2.json")
    curve = watched.run("d4").curves["core_metric"]
    assert curve.value[1] != 0.25 and curve.low[1] < curve.value[1] < curve.high[1]
    assert curve.last == curve.value[2]


def test_files_of_evaluations_that_are_none(tmp_path):
    run = made_runs.make(tmp_path, "d4", steps=10)
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"step": 1, "core": {"tasks": made_runs.made_tasks()}}))
    evaluated(run, 3, {"arc_easy": {"accuracy": 1}})
    evaluated(run, "x", made_runs.made_tasks(), "a.json")
    (run / "evaluations" / "link.json").symlink_to(secret)
    (run / "evaluations" / "torn.json").write_text('{"step": 1, "core": {"tas')
    (run / "evaluations" / "deep.json").write_text("[" * 100_000)
    if hasattr(os, "mkfifo"):
        os.mkfifo(run / "evaluations" / "pipe.json")
    assert Watch(tmp_path).run("d4").curves["core_metric"].value == []
    (run / "evaluations" / "link.json").unlink()
    # the folder itself leads elsewhere
    (run / "evaluations").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (run / "evaluations").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    problems = Watch(tmp_path).run("d4").problems
    assert problems == ["evaluations cannot be read (it leads outside the folder)"]


def test_readers_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MOST_KEPT", 1)
    for name in ("d4", "d6"):
        made_runs.make(tmp_path, name, steps=5)
    watched = Watch(tmp_path)
    for name in ("d4", "d6", "d4"):
        assert watched.run(name).curves["train/loss"].n == 5
    assert list(watched._readers) == ["d4"]


# ---- samples ----


def test_samples(folder):
    samples = got(folder, "/watch/run/d4")["samples"]
    assert samples[1] == {"step": 20, "prompt": "One", "text": f"One {MARKUP} 20"}


def test_many_samples_are_spread_over_the_steps(monkeypatch):
    monkeypatch.setattr(watch, "MOST_SAMPLES", 10)
    samples = [Sample(step, prompt, "x") for step in range(100) for prompt in ("a", "b")]
    kept = spread(samples)
    assert [sample.step for sample in kept] == [0, 0, 25, 25, 50, 50, 74, 74, 99, 99]
    assert spread(samples[:10]) == samples[:10] and spread([]) == []


def test_a_long_sample_is_cut(folder):
    write_lines(folder / "d4" / "samples.jsonl", [{"step": 0, "prompt": "x", "text": "y" * 9000}])
    (sample,) = got(folder, "/watch/run/d4")["samples"]
    assert sample["text"] == "y" * watch.LONGEST_SAMPLE + "..."


# ---- flags ----


def test_the_watch_flag(tmp_path):
    args = build_parser().parse_args(["RUN", f"--watch={tmp_path}"])
    check_arguments(args)
    assert args.watch == str(tmp_path)
    assert build_parser().parse_args(["RUN"]).watch == ""
    assert build_parser().parse_args(["RUN", "--no-watch"]).watch is None
    with pytest.raises(UsageError, match="--watch .*none: no such folder"):
        check_arguments(build_parser().parse_args(["RUN", f"--watch={tmp_path}/none"]))


# ---- in a browser ----
# needs `pip install playwright` and a Chromium, which Debian calls chromium


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        # containers lack what its sandbox needs
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, **context) opens a page; what it complains of fails the test at its end."""
    complaints, contexts = [], []

    def note_request(asked, url):
        if not asked.startswith((url.partition("#")[0], "data:")):
            complaints.append(f"{asked} was asked")

    def note_message(text):
        # the browser itself reports the statuses of refusals
        if "Failed to load resource" not in text:
            complaints.append(text)

    def open_page(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: note_request(request.url, url))
        page.on("console", lambda message: note_message(message.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def state_of(page, pane=0):
    return page.locator("[data-name=state]").nth(pane)


def text_of(page, pane=0):
    return page.locator(".pane .out").nth(pane)


@pytest.fixture
def expect():
    return pytest.importorskip("playwright.sync_api").expect


@pytest.mark.browser
def test_play(open_page, expect):
    engine = FakeEngine()
    with running(application(served(engine=engine), served("d6"))) as url:
        page = open_page(url)
        page.fill("#prompt", "hi 😀 ")
        page.locator("[data-name=fields] input").nth(1).fill("5")
        page.locator("[data-name=fields] input").nth(2).fill("0")
        page.keyboard.press("Control+Enter")
        expect(state_of(page)).to_contain_text("reached max tokens")
        expect(text_of(page)).to_have_text("hi 😀 abcde", use_inner_text=True)
        expect(state_of(page)).to_contain_text("5 tokens")
        # alternatives by keyboard; the chosen one is continued
        text_of(page).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tip .each")).to_have_count(2)
        expect(page.locator("#tip")).to_contain_text("b 38%")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(text_of(page)).to_have_text("hi 😀 aaabcde")
        assert bytes(engine.requests[-1].prompt[1:]).decode() == "hi 😀 aa"
        page.click("[data-name=edit] >> nth=0")
        expect(page.locator("#prompt")).to_have_value("hi 😀 aaabcde")
        # two models side by side
        page.check("#compare")
        page.keyboard.press("Control+Enter")
        expect(state_of(page, 1)).to_contain_text("reached max tokens")
        expect(page.locator("[data-name=model]").nth(1)).to_have_value("d6")
        page.reload()
        expect(page.locator("#prompt")).to_have_value("hi 😀 aaabcde")


@pytest.fixture(scope="module")
def trained_url():
    """A server of a real run with three kept steps and its held-out text."""
    run = small.finished() / "run"
    args = build_parser().parse_args([str(run), "--device-type=cpu"])
    watch = Watch(run.parent)
    app = application(*load_runs(args), load=load_run, steps_in_memory=2, watch=watch)
    with running(app) as url:
        yield url


@pytest.mark.browser
def test_two_steps_side_by_side(open_page, expect, trained_url):
    page = open_page(trained_url)
    page.fill("#prompt", "7 squared is")
    page.check("#compare")
    steps = page.locator("[data-name=step]")
    # the second column begins with an earlier step of the only run
    expect(steps.nth(1)).to_have_value("4")
    steps.nth(0).select_option("8")
    page.keyboard.press("Control+Enter")
    for pane, step in enumerate((8, 4)):
        expect(state_of(page, pane)).to_contain_text(f"step {step} · reached max tokens")
    page.reload()
    expect(steps.nth(0)).to_have_value("8")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_the_heat_map(open_page, expect, trained_url, scheme, width):
    size = {"width": width, "height": 800}
    page = open_page(trained_url + "/#heat", color_scheme=scheme, viewport=size)
    figures = page.locator("#heat-figures .figure")
    # an early and the newest step of the first passage of the held-out text
    expect(figures).to_have_count(3)
    expect(figures.nth(0)).to_contain_text("step 4")
    expect(figures.nth(2)).to_contain_text("better")
    expect(page.locator("#heat-out .t.better")).not_to_have_count(0)
    (first, second) = (scored(trained_url, step, passage=0, of="run") for step in (4, 12))
    assert page.locator("#heat-out").text_content() == first["text"]
    expect(figures.nth(1)).to_contain_text(f"{second['bpb']:.3f}")
    # by keyboard: the second token, its losses in nats, the next passage
    page.select_option("#heat-unit", "nats")
    page.locator("#heat-out").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_contain_text(f"A, step 4: {first['nats'][1]:.2f} nats")
    expect(page.locator("#tip")).to_contain_text(f"B, step 12: {second['nats'][1]:.2f} nats")
    expect(page.locator("#tip .columns > div").nth(0).locator(".each")).to_have_count(5)
    page.keyboard.press("n")
    expect(page.locator("#heat-passage")).to_have_value("2")
    third = scored(trained_url, 4, passage=1, of="run")
    expect(page.locator("#heat-out")).to_have_text(third["text"].strip())
    # a text of one's own, one checkpoint
    page.locator("#heat-form label", has_text="My own").click()
    page.fill("#heat-text", f"{MARKUP} \N{SNOWMAN}")
    page.uncheck("#heat-compare")
    page.keyboard.press("Control+Enter")
    expect(figures).to_have_count(1)
    expect(page.locator("#heat-out")).to_have_text(f"{MARKUP} \N{SNOWMAN}")
    # the bytes of a character share a place
    expect(page.locator("#heat-out .t")).to_have_count(len(MARKUP) + 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def scored(url, step, **question):
    body = json.dumps({"model": f"run@{step}"} | question).encode()
    request = Request(f"{url}/heat/scores", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


@pytest.mark.browser
def test_the_heat_map_without_held_out_text(open_page, expect):
    with running(application(served())) as url:
        page = open_page(url + "/#heat")
        page.locator("#heat-text").wait_for()
        expect(page.locator("#heat-state")).to_contain_text("--no-watch")
        page.fill("#heat-text", "abc" * 5000)
        page.click("#heat-run")
        expect(page.locator("#heat-state")).to_contain_text("shorten it")


@pytest.mark.browser
def test_stop_and_refusals(open_page, expect):
    engine = FakeEngine(held=True)
    with running(application(served(engine=engine))) as url:
        page = open_page(url)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#stop")).to_be_enabled()
        assert engine.submitted.wait(20)
        # an empty prompt begins a document
        assert engine.requests[0].prompt == (256,)
        page.keyboard.press("Escape")
        expect(state_of(page)).to_contain_text("stopped")
        assert engine.cancelled.wait(20)
        page.fill("#prompt", "long" * 100)
        page.click("#run")
        expect(state_of(page)).to_contain_text("shorten it")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1300])
def test_chat(open_page, expect, scheme, width):
    engine = FakeEngine(positions=400, tokenizer=with_chat(BYTES))
    with running(application(served(engine=engine), served("base"))) as url:
        size = {"width": width, "height": 800}
        page = open_page(url, color_scheme=scheme, viewport=size)
        bubbles = page.locator("#turns .bubble")
        page.locator("[data-name=fields] input").nth(1).fill("5")
        page.locator("[data-name=fields] input").nth(2).fill("0")
        page.fill("#system", "Be brief.")
        page.fill("#message", f"Hi {MARKUP} \N{SNOWMAN}")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-state")).to_contain_text("5 tokens")
        expect(bubbles).to_have_text([f"Hi {MARKUP} \N{SNOWMAN}", "abcde"])
        page.fill("#message", "And?")
        page.click("#composer .main")
        expect(bubbles).to_have_count(4)
        expect(page.locator("#chat-state")).to_contain_text("reached max tokens")
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Hi {MARKUP} \N{SNOWMAN}"},
            {"role": "assistant", "content": "abcde"},
            {"role": "user", "content": "And?"},
        ]
        ids, _ = render(engine.tokenizer, messages, generation_prompt=True)
        assert engine.requests[-1].prompt == tuple(ids.tolist())
        # another answer to the same
        page.locator("[data-name=fields] input").nth(2).fill("3")
        page.get_by_role("button", name="Regenerate").click()
        expect(bubbles.nth(3)).to_have_text("defgh")
        assert engine.requests[-1].prompt == tuple(ids.tolist())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # a conversation survives a reload; a message that is edited drops what follows it
        page.reload()
        expect(bubbles).to_have_count(4)
        page.get_by_role("button", name="Edit").nth(1).click()
        expect(page.locator("#message")).to_have_value("And?")
        expect(bubbles).to_have_count(2)
        # stopped before anything came: only the message stays, and can be answered
        engine.held = True
        page.keyboard.press("Enter")
        expect(page.locator("#chat-stop")).to_be_enabled()
        page.keyboard.press("Escape")
        assert engine.cancelled.wait(20)
        expect(page.locator("#chat-state")).to_have_text("stopped")
        expect(bubbles).to_have_count(3)
        engine.held = False
        page.get_by_role("button", name="Answer").click()
        expect(bubbles.nth(3)).to_have_text("defgh")
        page.click("#chat-new")
        expect(bubbles).to_have_count(0)
        # a model without a chat format writes text
        page.locator("#mode label", has_text="Text").click()
        expect(page.locator("#prompt")).to_be_visible()
        page.locator("#mode label", has_text="Chat").click()
        page.locator("[data-name=model]").nth(0).select_option("base")
        expect(page.locator("#chat")).to_be_hidden()
        expect(page.locator("#prompt")).to_be_visible()


@pytest.mark.browser
def test_an_empty_answer_and_a_full_context(open_page, expect):
    engine = FakeEngine(positions=100, tokenizer=with_chat(BYTES))
    engine.end = Ended("stop", "")
    with running(application(served(engine=engine))) as url:
        page = open_page(url)
        state = page.locator("#chat-state")
        bubbles = page.locator("#turns .bubble")
        page.fill("#message", "Hi")
        page.keyboard.press("Enter")
        expect(state).to_have_text("the answer is empty")
        # the next message stands behind it, as the model saw it
        page.fill("#message", "And?")
        page.keyboard.press("Enter")
        expect(bubbles).to_have_text(["Hi", "", "And?", ""])
        expect(state).to_have_text("the answer is empty")
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "And?"},
        ]
        ids, _ = render(engine.tokenizer, messages, generation_prompt=True)
        assert engine.requests[-1].prompt == tuple(ids.tolist())
        page.fill("#message", "long" * 20)
        page.keyboard.press("Enter")
        expect(state).to_contain_text("do not fit into the model's context. Edit a message")
        # the message waits for an answer
        expect(bubbles).to_have_count(5)


@pytest.mark.browser
def test_a_conversation_that_is_given_up(open_page, expect):
    engine = FakeEngine(held=True, tokenizer=with_chat(BYTES))
    with running(application(served(engine=engine))) as url:
        page = open_page(url)
        for button in (page.locator("#chat-new"), page.get_by_role("button", name="Edit").nth(0)):
            engine.cancelled.clear()
            page.fill("#message", "Now?")
            page.keyboard.press("Enter")
            expect(page.locator("#chat-state")).to_have_text("Waiting…")
            expect(page.locator("#chat-stop")).to_be_enabled()
            button.click()
            assert engine.cancelled.wait(20)
            # the end of an answer that nobody waits for is no news
            page.evaluate("new Promise(requestAnimationFrame)")
            expect(page.locator("#chat-state")).to_have_text("")
            expect(page.locator("#chat-stop")).to_be_disabled()
            expect(page.locator("#turns .bubble")).to_have_count(0)
        # of a reload the message is what stays
        page.fill("#message", "Now?")
        page.keyboard.press("Enter")
        expect(page.locator("#chat-state")).to_have_text("Waiting…")
        page.reload()
        expect(page.locator("#turns .bubble")).to_have_text(["Now?"])


@pytest.mark.browser
def test_a_server_that_is_gone(open_page, expect):
    with running(application(served(tokenizer=with_chat(BYTES)))) as url:
        page = open_page(url)
        expect(page.locator("#message")).to_be_visible()
    page.fill("#message", "Hi")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-state")).to_contain_text("The server does not answer.")
    expect(page.locator("#turns .bubble")).to_have_text(["Hi"])
    page.click("nav a[href='#watch']")
    expect(page.locator("#connection")).to_contain_text("Not up to date: The server does not")


@pytest.mark.browser
def test_the_page_asks_for_the_key(open_page, expect):
    with running(application(api_key="secret")) as url:
        page = open_page(url)
        for key, note in (("wrong", "set by --api-key"), ("secret", "refused that key")):
            expect(page.locator("#ask-note")).to_contain_text(note)
            page.fill("#key", key)
            page.keyboard.press("Enter")
        expect(page.locator("[data-name=model]").nth(0)).to_have_value("d4")
        page.reload()
        expect(page.locator("#ask")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#give-key")).to_be_visible()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1300])
def test_watch(open_page, expect, folder, scheme, width):
    made_runs.make(folder, MARKUP.replace("/", "_"), steps=30, bpb=1.4)
    with running(application(watch=Watch(folder))) as url:
        size = {"width": width, "height": 800}
        page = open_page(url + "/#watch", color_scheme=scheme, viewport=size)
        expect(page.locator(".runs li")).to_have_count(2)
        # two runs in three charts; CORE was not evaluated
        expect(page.locator(".chart .curve")).to_have_count(6)
        expect(page.locator(".chart .readout").nth(1)).to_contain_text("difference")
        expect(page.locator("#texts")).to_contain_text(MARKUP)
        # dots at the sides of a chart are whole: what is cut off is wider than the grid by them
        cut = page.evaluate(
            """document.querySelector("clipPath rect").getBBox().width
            - document.querySelector(".grid").getBBox().width - 2 * DOT_RADIUS"""
        )
        assert abs(cut) < 0.01
        # a step that is written while the page is open
        write_lines(folder / "d4" / "metrics.jsonl", losses([1.2345], first=20), "a")
        expect(page.locator(".chart .readout").nth(0)).to_contain_text("d4 1.2345")
        page.locator("#sample-step").press("Home")
        expect(page.locator("#texts h3").nth(0)).to_contain_text("step 0")
        assert page.title() == "nanochat"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
