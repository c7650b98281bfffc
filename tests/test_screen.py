"""What a run shows: a live line on a terminal, plain lines now and then in a file or pipe."""

import io
import sys

import pytest

from nanochat.run.screen import FIRST_STEPS, PLAIN_SECONDS, Progress, bar


class Terminal(io.StringIO):
    """Something that looks like a terminal."""

    def isatty(self):
        return True


def shown_on(screen, monkeypatch):
    """Let stdout be this screen for the rest of the test; returns it."""
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def shown(terminal):
    """The states of the live line one after the other, and the lines above it."""
    text = terminal.getvalue().replace("\n", "\r")
    return [part.strip() for part in text.split("\r") if part.strip()]


def progress_at(first_step=0, steps=100, quiet=False):
    """A Progress whose clock shows what progress.time[0] says."""
    time = [0.0]
    progress = Progress(first_step, steps, quiet, now=lambda: time[0])
    progress.time = time
    return progress


# ---- in a file or pipe ----


def test_plain_lines_come_at_first_then_now_and_then_and_at_the_end(capsys):
    progress = progress_at()
    for step in range(1, 101):
        progress.time[0] += 1
        progress.update(step, 100, "loss 2.5", seconds_left=100 - step)
    printed = capsys.readouterr().out.splitlines()
    steps = [int(line.split()[1].split("/")[0]) for line in printed]
    first = list(range(1, FIRST_STEPS + 1))
    assert steps == [*first, *range(FIRST_STEPS + PLAIN_SECONDS, 100, PLAIN_SECONDS), 100]
    assert printed[0] == "step 1/100 | loss 2.5 | eta 1m39s"
    assert printed[-1] == "step 100/100 | loss 2.5 | eta 0.0s"


def test_an_unknown_end(capsys):
    progress_at(steps=None).update(1, None, "loss 2.5", seconds_left=None)
    assert capsys.readouterr().out == "step 1 | loss 2.5 | eta ?\n"


def test_what_happens_meanwhile_shares_the_pauses(capsys):
    progress = progress_at()
    progress.meanwhile("CORE 10%")
    progress.time[0] = PLAIN_SECONDS - 1
    progress.meanwhile("CORE 50%")
    progress.update(50, 100, "loss 2.5", 10.0)
    progress.time[0] = PLAIN_SECONDS
    progress.meanwhile("CORE 60%")
    assert capsys.readouterr().out.splitlines() == ["CORE 10%", "CORE 60%"]


def test_messages_are_always_shown(capsys):
    progress = progress_at()
    progress.message("one")
    progress.message("two")
    progress.close()
    assert capsys.readouterr().out == "one\ntwo\n"


# ---- on a terminal ----


def test_a_live_line(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    progress = progress_at(first_step=10)
    progress.update(11, 100, "loss 2.5", seconds_left=60.0)
    progress.bar.refresh()
    assert shown(terminal)[-1].startswith("11/100  11%|")
    assert shown(terminal)[-1].endswith("| loss 2.5 | eta 1m00s")
    progress.message("step 11: val/bpb 1.2")
    assert "step 11: val/bpb 1.2" in shown(terminal)
    progress.meanwhile("step 11: CORE 50%")
    assert shown(terminal)[-1].endswith("| step 11: CORE 50%")
    progress.close()
    assert terminal.getvalue().endswith("\n")


def test_a_live_line_that_learns_its_end(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    progress = progress_at(steps=None)
    progress.update(1, None, "loss 2.5", seconds_left=None)
    progress.bar.refresh()
    assert "1/?" in shown(terminal)[-1] and shown(terminal)[-1].endswith("eta ?")
    progress.update(2, 40, "loss 2.5", seconds_left=38.0)
    progress.bar.refresh()
    assert "2/40   5%|" in shown(terminal)[-1]
    progress.close()


# ---- other ranks ----


@pytest.mark.parametrize("on_terminal", [True, False])
def test_other_ranks_show_nothing(monkeypatch, on_terminal):
    screen = shown_on(Terminal() if on_terminal else io.StringIO(), monkeypatch)
    progress = progress_at(quiet=True)
    progress.update(1, 100, "loss 2.5", 1.0)
    progress.meanwhile("CORE 10%")
    progress.message("a message")
    progress.close()
    assert screen.getvalue() == ""


# ---- bars over lists ----


def test_a_bar_in_a_pipe_is_one_line(capsys):
    items = [1, 2, 3]
    assert bar(items, "tokenizing", "shard") is items
    assert capsys.readouterr().out == "tokenizing: 3 shards\n"


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = shown_on(Terminal(), monkeypatch)
    assert list(bar([1, 2, 3], "tokenizing", "shard")) == [1, 2, 3]
    assert shown(terminal)[-1].startswith("tokenizing: 100%|") and "3/3" in shown(terminal)[-1]


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_bar_over_nothing(monkeypatch, on_terminal):
    screen = shown_on(Terminal() if on_terminal else io.StringIO(), monkeypatch)
    assert list(bar([], "tokenizing", "shard")) == [] and screen.getvalue() == ""
