"""The interactive mode: prompts and commands, line by line."""

import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from nanochat import output
from nanochat.apps.sample.commands import (
    CHAT_HELP,
    HELP,
    SETTINGS,
    Action,
    Change,
    Prompt,
    parse,
)
from nanochat.apps.sample.drawing import Subject, draw, load_subject
from nanochat.apps.sample.layout import print_side_by_side, shown
from nanochat.common import Unavailable, UsageError, counted, in_a_line, printable
from nanochat.data.chat import Message
from nanochat.eval.engine import Ended
from nanochat.eval.generation import (
    NotNumbers,
    check_prompt,
    option_problems,
    room_for,
)
from nanochat.eval.writer import Writer, request_from
from nanochat.limits import is_out_of_memory, out_of_memory_in_words
from nanochat.run import checkpoint

# the largest of the seeds that are drawn, easy to type again
LARGEST_SEED = 999_999


class Session:
    """A checkpoint, the settings, and what was written last.

    settings: arguments of request_from(); a seed of None is another one for each text."""

    def __init__(
        self, subject: Subject, settings: dict[str, Any], args: Namespace, on_terminal: bool
    ) -> None:
        """args: of the command line, for loading other checkpoints. on_terminal: Ctrl-C ends what
        is being done, and not the program."""
        self.on_terminal = on_terminal
        self.subject = subject
        self.settings = settings
        self.args = args
        self.writer = Writer(subject.model, subject.tokenizer)
        self.seed = 0
        # of the last text: the prompt that was given, what continued it before, and itself
        self.prompt: str | None = None
        self.begun = ""
        self.text = ""
        # messages of a chat before that prompt
        self.history: list[Message] = []

    def run(self, prompts: list[str], read: Callable[[], str | None]) -> None:
        """Continue the prompts, and obey the lines that read() gives until it gives None, or one
        says /quit."""
        if self.on_terminal:
            what = "message" if self.subject.chat else "prompt"
            print(
                f"{self.subject.title}. A line is a {what}; /help lists commands, Ctrl-C stops a "
                f"text, Ctrl-D leaves."
            )
        for prompt in prompts:
            self.obey(Prompt(prompt))
        while not output.reader_is_gone():
            try:
                line = read()
            except KeyboardInterrupt:
                if not self.on_terminal:
                    raise
                print("\nCtrl-D or /quit leaves")
            else:
                if line is None and self.on_terminal:
                    # ends the line of the sign
                    print()
                if line is None or not self.obey_line(line):
                    return

    def obey_line(self, line: str) -> bool:
        """Do what a line asks for; False if it asks to leave."""
        try:
            asked = parse(line)
        except UsageError as error:
            _report(str(error))
            return True
        if asked == Action("quit"):
            return False
        self.obey(asked)
        return True

    def obey(self, asked: Prompt | Change | Action | None) -> None:
        """Do it. What cannot be done is reported."""
        try:
            self._do(asked)
        except KeyboardInterrupt:
            if not self.on_terminal:
                raise
            _report("\nstopped")
        except (UsageError, Unavailable, NotNumbers) as error:
            _report(str(error))
        except OSError as error:
            _report(in_a_line(error))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _report(out_of_memory_in_words(error))

    def close(self) -> None:
        """End the threads of the engine."""
        self.writer.close()

    # ---- commands ----

    def _do(self, asked: Prompt | Change | Action | None) -> None:
        if isinstance(asked, Prompt):
            self._begin(asked.text)
        elif isinstance(asked, Change):
            self._change(asked)
        elif asked is not None:
            actions = {
                "help": self._help,
                "settings": self._show,
                "new": self._new,
                "again": self._again,
                "continue": self._continue,
                "step": self._step,
                "model": self._model,
                "compare": self._compare,
            }
            actions[asked.name](*asked.words)

    def _help(self) -> None:
        chat = self.subject.chat
        what = "message, which the model answers" if chat else "prompt, which the model continues"
        print(f"a line is a {what}; // begins one that begins with /")
        for usage, meaning in HELP:
            print(f"  {usage:<20}{CHAT_HELP.get(usage, meaning) if chat else meaning}")

    def _show(self) -> None:
        config = self.subject.model.config
        print(
            f"{self.subject.title} ({config.arch}, depth {config.depth}, "
            f"{config.max_seq_len} tokens of context)"
        )
        for command, (name, _, _) in SETTINGS.items():
            value = self.settings[name]
            if value is None:
                is_first = self.prompt is None
                value = "random" if is_first else f"random (of the last text: {self.seed})"
            print(f"  /{command:<9}{value}")
        for stop in self.settings["stop"]:
            print(f"  --stop    {stop!r}")

    def _change(self, asked: Change) -> None:
        changed = {**self.settings, asked.name: asked.value}
        checked = {name: value for name, value in changed.items() if name != "stop"}
        if checked["seed"] is None:
            checked["seed"] = 0
        for _, value, reason in option_problems(**checked):
            raise UsageError(f"/{asked.command} {value}: {reason}")
        self.settings = changed

    def _step(self, step: int | str) -> None:
        if step == "list":
            run = self.subject.run
            best = checkpoint.best_step(run)
            for each in checkpoint.steps_of(run):
                best_mark = "  the best by validation" if each == best else ""
                used_mark = "  in use" if each == self.subject.step else ""
                print(f"  {each}{best_mark}{used_mark}")
        else:
            self._use(load_subject(self.subject.run, step, self.args))

    def _model(self, run: str) -> None:
        self._use(load_subject(run, -1, self.args))

    def _use(self, subject: Subject) -> None:
        writer = Writer(subject.model, subject.tokenizer)
        self.writer.close()
        self.subject = subject
        self.writer = writer
        print(subject.title)

    def _compare(self, *steps: int | str) -> None:
        """The last prompt on several steps; Ctrl-C ends it with those that are done."""
        prompt = self._last_prompt()
        self._choose_seed()
        options = {**self.settings, "seed": self.seed}
        texts = []
        try:
            for step in steps:
                subject = self.subject
                if step != subject.step:
                    subject = load_subject(subject.run, step, self.args)
                (drawn,) = draw(subject, [prompt], 1, options, self.history)
                texts.append((f"step {drawn.step}", drawn.shown(subject.chat)))
        except KeyboardInterrupt:
            if not texts or not self.on_terminal:
                raise
        print_side_by_side(texts)

    # ---- texts ----

    def _begin(self, prompt: str) -> None:
        history = self.history
        if self.subject.chat and self.prompt is not None:
            answer = {"role": "assistant", "content": self.begun + self.text}
            history = [*history, {"role": "user", "content": self.prompt}, answer]
        self._write(prompt, "", history)

    def _new(self) -> None:
        """A document from nothing; of a chat, a conversation."""
        if not self.subject.chat:
            self._begin("")
            return
        self.prompt = None
        self.history = []
        _report("a new conversation begins with the next message")

    def _again(self) -> None:
        self._write(self._last_prompt(), self.begun, self.history)

    def _continue(self) -> None:
        begun = self.begun + self.text
        self._write(self._last_prompt(), begun, self.history, from_shown=True)

    def _last_prompt(self) -> str:
        if self.prompt is None:
            raise UsageError("there is no text yet; give a prompt, or /new")
        return self.prompt

    def _choose_seed(self) -> None:
        self.seed = self.settings["seed"]
        if self.seed is None:
            self.seed = secrets.randbelow(LARGEST_SEED + 1)

    def _write(
        self, prompt: str, begun: str, history: list[Message], from_shown: bool = False
    ) -> None:
        """Continue a prompt and what has been written behind it, and show all of that; of a chat,
        the answer alone; from_shown: only what is new."""
        self._choose_seed()
        model = self.subject.model
        ids = self.subject.ids(prompt, begun, history)
        check_prompt(model, ids, 1)
        asked = self.settings["max_new_tokens"]
        room = room_for(model, len(ids), asked)
        # what the text may exceed is said when it has done so
        if len(ids) > model.config.max_seq_len or room.max_new_tokens < asked:
            _report(f"note: {room.note}")
        options = {**self.settings, "seed": self.seed, "max_new_tokens": room.max_new_tokens}
        request = request_from(ids, **options)
        self.prompt = prompt
        self.begun = begun
        self.text = ""
        self.history = history
        if not from_shown:
            print(shown(begun if self.subject.chat else prompt + begun), end="", flush=True)
        started = time.monotonic()
        n_tokens = 0
        end = "stopped"
        try:
            for _, event in self.writer.events([request]):
                self.text += event.text
                print(shown(event.text), end="", flush=True)
                if isinstance(event, Ended):
                    end = event.reason
                else:
                    n_tokens += 1
                if output.reader_is_gone():
                    return
        except KeyboardInterrupt:
            if not self.on_terminal:
                raise
        except NotNumbers as error:
            raise UsageError(f"{self.subject.title}: {error}, with /step") from None
        finally:
            print(flush=True)
        if self.on_terminal:
            self._describe(len(ids), n_tokens, time.monotonic() - started, end)

    def _describe(self, n_prompt: int, n_tokens: int, seconds: float, end: str) -> None:
        """A line about the text that was written."""
        ending = {
            "stop": "the end of the text after",
            "length": "/max reached:",
            "stopped": "stopped after",
        }[end]
        line = f"{ending} {counted(n_tokens, 'token')}, {n_tokens / max(seconds, 1e-3):.0f}/s"
        if self.settings["seed"] is None:
            line += f", seed {self.seed}"
        context = self.subject.model.config.max_seq_len
        if n_prompt <= context < n_prompt + n_tokens:
            line += f"; longer than the {context} tokens of context of training"
        if end != "stop":
            line += "; /continue goes on"
        _report(f"[{line}]")


def _report(line: str) -> None:
    # not among the text, which may be piped
    print(printable(line), file=sys.stderr, flush=True)
