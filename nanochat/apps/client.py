"""`nanochat client`: text from any server that speaks OpenAI's API, such as `nanochat serve`."""

import argparse
import contextlib
import io
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nanochat import output
from nanochat.common import (
    EXIT_COMPLETED,
    Unavailable,
    UsageError,
    in_a_line,
    install_hint,
    printable,
    valid_unicode,
)

if TYPE_CHECKING:
    import httpx

# Seconds for a connection, and without a word from the server.
CONNECT_SECONDS = 10
SILENT_SECONDS = 600
# what is asked for by default: the first of them that the context has room for
MAX_TOKENS = (256, 128, 64, 32, 16)
# the API's word for a request that is longer than the model's context
CONTEXT_FULL = "context_length_exceeded"
# the line that begins a conversation anew, on a terminal
NEW = "/new"
Message = dict[str, str]  # role and content, as the API has them


class ContextFull(UsageError):
    """The model's context has no room for a request."""


class NotTheApi(Unavailable):
    """What answers is not OpenAI's API."""


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat client",
        allow_abbrev=False,
        description="Continue a prompt, or with --chat answer it, through a server that speaks "
        "OpenAI's API. Without a prompt, lines are read from standard input, one after the other; "
        "in a chat each is answered with those before in mind, and on a terminal /new begins a new "
        "conversation. The text appears as it is written.",
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="*",
        type=valid_unicode,
        metavar="PROMPT",
        help="text to continue; words are joined by blanks",
    )
    add(
        "--url",
        default="http://127.0.0.1:8000/v1",
        help="where the API begins (default %(default)s)",
    )
    add("--model", default="", metavar="NAME", help="default: the first that the server lists")
    add("--chat", action="store_true", help="a conversation instead of a continuation")
    add(
        "--system",
        default="",
        type=valid_unicode,
        metavar="TEXT",
        help="with --chat: the system message",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"(default {MAX_TOKENS[0]}, and fewer where the model's context has no room for them)",
    )
    add("--temperature", type=float, default=0.8, metavar="T", help="(default %(default)s)")
    add("--top-p", type=float, metavar="P", help="default: the server's")
    add("--seed", type=int, metavar="N", help="default: the server's")
    add(
        "--stop",
        action="append",
        default=[],
        type=valid_unicode,
        metavar="TEXT",
        help="text before which the answer ends; may be given several times",
    )
    add("--no-stream", action="store_true", help="wait for the whole text")
    add(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY", ""),
        metavar="KEY",
        help="default: OPENAI_API_KEY of the environment",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the app with its arguments. Returns the exit code.

    UsageError for wrong flags and for what the server refuses, Unavailable if it cannot be
    reached."""
    args = build_parser().parse_args(argv)
    _check_arguments(args)
    try:
        import httpx
    except ImportError:
        raise install_hint("httpx", "nanochat client") from None
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
    with httpx.Client(headers=headers, timeout=timeout) as client:
        model = args.model
        if not model:
            with _reaching(args.url):
                model = _first_model(client, args.url)
        _talk(client, args, model)
    return EXIT_COMPLETED


def _check_arguments(args: Namespace) -> None:
    """One UsageError with a line for every value that cannot be sent. What can be sent and is out
    of bounds is left to the server."""
    problems = []
    if not _is_address(args.url):
        problems.append(f"--url={args.url}: no http address; give one, such as http://HOST:8000/v1")
    if args.system and not args.chat:
        problems.append("--system: needs --chat; add that, or leave it out")
    if args.prompt and not any(args.prompt):
        problems.append("PROMPT: is empty; give a text")
    for flag, value in (("--temperature", args.temperature), ("--top-p", args.top_p)):
        # JSON has no other numbers
        if value is not None and not math.isfinite(value):
            problems.append(f"{flag} {value}: must be a finite number")
    # a header holds nothing else
    if not (args.api_key.isascii() and args.api_key.isprintable()):
        problems.append(
            "--api-key: must be visible ASCII characters; check it, and OPENAI_API_KEY of the "
            "environment"
        )
    if problems:
        raise UsageError("\n".join(problems))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # raises ValueError for a port that is none
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Around a request: UsageError or Unavailable for what httpx raises."""
    import httpx

    try:
        yield
    except httpx.InvalidURL as error:
        raise UsageError(f"--url={url}: {error}; check the address") from None
    except httpx.HTTPError as error:
        # behind the beginning of an answer, or instead of one
        if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout)):
            raise Unavailable(
                f"the connection to {url} broke off ({in_a_line(error)}); try again"
            ) from None
        raise Unavailable(
            f"{url} cannot be reached ({in_a_line(error)}); is `nanochat serve` running?"
        ) from None
    except NotTheApi as error:
        raise Unavailable(f"{error}{_hint(url)}") from None


def _hint(url: str) -> str:
    """Where the API may begin, for an address that leads to something else; "" if it ends in such a
    place already."""
    if "v1" in urlsplit(url).path.split("/"):
        return ""
    return f"; try --url={url.rstrip('/')}/v1"


def _talk(client: "httpx.Client", args: Namespace, model: str) -> None:
    """Print the answers to the prompt, or to each line of standard input.

    Whoever types them hears of a refusal and goes on, and stops an answer by Ctrl-C; otherwise
    either ends the program, behind what was answered before."""
    typed = not args.prompt and _is_terminal()
    system = [{"role": "system", "content": args.system}] if args.system else []
    history: list[Message] = [*system]
    for prompt in [" ".join(args.prompt)] if args.prompt else _lines():
        if typed and args.chat and prompt.strip() == NEW:
            history = [*system]
            _report("a new conversation begins with the next message")
            continue
        asked = [*history, {"role": "user", "content": prompt}]
        try:
            answer = _answer(client, args, model, prompt, asked, typed)
        except (UsageError, Unavailable) as error:
            if isinstance(error, ContextFull):
                error = _without_room(args, has_history=len(history) > len(system), typed=typed)
            if not typed:
                raise error from None
            _report(str(error))
            continue
        if output.reader_is_gone():
            return
        # of one that was stopped at once, there is nothing to remember
        if answer is not None:
            history = [*asked, {"role": "assistant", "content": answer}]


def _answer(
    client: "httpx.Client",
    args: Namespace,
    model: str,
    prompt: str,
    asked: list[Message],
    typed: bool,
) -> str | None:
    """Print what the model says, and return it; None if it was stopped before it said anything.

    asked: the conversation up to the prompt. typed: Ctrl-C stops the answer, not the program."""
    # of a continuation, the prompt is a part
    shown = "" if args.chat else prompt
    print(shown, end="", flush=True)
    answer = ""
    try:
        pieces = _pieces(client, args, model, prompt, asked)
        # closed, so that the server stops writing when nobody reads on
        with _reaching(args.url), contextlib.closing(pieces):
            for piece in pieces:
                answer += piece
                print(printable(piece), end="", flush=True)
                # as after `| head`
                if output.reader_is_gone():
                    return answer
    except (UsageError, Unavailable):
        if shown or answer:
            print(flush=True)
        raise
    except KeyboardInterrupt:
        if not typed:
            raise
        _report("\nstopped; Ctrl-D leaves")
        return answer or None
    print(flush=True)
    return answer


def _without_room(args: Namespace, has_history: bool, typed: bool) -> UsageError:
    """What to say when the context is full. has_history: there are messages before the last."""
    n_tokens = _limits(args)[-1]
    if not args.chat:
        return UsageError(
            f"the prompt and {n_tokens} new tokens do not fit into the model's context; "
            f"shorten the prompt, or ask for fewer with --max-tokens"
        )
    if not has_history:
        return UsageError(
            f"the message and an answer of {n_tokens} tokens do not fit into the model's "
            f"context; shorten the message, or ask for fewer with --max-tokens"
        )
    remedy = "begin a new one, or ask for fewer with --max-tokens"
    if typed:
        remedy = f"{NEW} begins a new one"
    return UsageError(
        f"the conversation has filled the model's context: this message and an answer of "
        f"{n_tokens} tokens do not fit in; {remedy}"
    )


def _is_terminal() -> bool:
    """Whether somebody types; there is no standard input where it was closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank; on a terminal, each after a sign, where they
    can be edited and earlier ones called back."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # bytes that are not UTF-8 are no reason to end, and a mark at the start is no text
        encoding = None if _is_terminal() else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="replace")
    if _is_terminal():
        # input() edits lines once it is imported; not every Python has it
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while sys.stdin is not None:
        line = _typed() if _is_terminal() else sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield valid_unicode(line.rstrip("\r\n"))


def _typed() -> str:
    """The next line of the terminal, with its end; "" at the end of input."""
    sign = "> "
    if not sys.stdout.isatty():
        # the text may be piped on, without signs between
        print(sign, end="", file=sys.stderr, flush=True)
        sign = ""
    try:
        return input(sign) + "\n"
    # OSError: the terminal is gone
    except (EOFError, OSError):
        return ""


def _report(line: str) -> None:
    # not among the text, which may be piped
    print(printable(line), file=sys.stderr, flush=True)


def _limits(args: Namespace) -> tuple[int, ...]:
    """What is asked for, one after the other, until it fits into the model's context."""
    return MAX_TOKENS if args.max_tokens is None else (args.max_tokens,)


def _pieces(
    client: "httpx.Client", args: Namespace, model: str, prompt: str, history: list[Message]
) -> Generator[str, None, None]:
    """The text of an answer, as it comes. Raises ContextFull if even the shortest does not fit."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": args.temperature,
        "stream": not args.no_stream,
    }
    body |= {"messages": history} if args.chat else {"prompt": prompt}
    optional = {"top_p": args.top_p, "seed": args.seed, "stop": args.stop or None}
    body |= {name: value for name, value in optional.items() if value is not None}
    *longer, shortest = _limits(args)
    for n_tokens in longer:
        # refused before any text
        with contextlib.suppress(ContextFull):
            yield from _pieces_of(client, args, {**body, "max_tokens": n_tokens})
            return
    yield from _pieces_of(client, args, {**body, "max_tokens": shortest})


def _pieces_of(
    client: "httpx.Client", args: Namespace, body: dict[str, Any]
) -> Generator[str, None, None]:
    """The text of the answer to one request."""
    address = f"{args.url.rstrip('/')}/{'chat/completions' if args.chat else 'completions'}"
    if args.no_stream:
        answer = _checked(client.post(address, json=body), args.url)
        yield _choice_of(answer, "message")[0]
        return
    with client.stream("POST", address, json=body) as response:
        if response.is_error:
            response.read()
        _checked(response, args.url)
        n_events = 0
        has_ended = False
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue
            n_events += 1
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                has_ended = True
                continue
            text, ends = _choice_of(_json_of(data), "delta")
            has_ended = has_ended or ends
            yield text
    if not n_events:
        raise NotTheApi("the server's answer is not that of OpenAI's API")
    if not has_ended:
        raise Unavailable("the answer broke off before its end; try again")


def _choice_of(answer: Any, chat_field: str) -> tuple[str, bool]:
    """The text in an answer or a piece of one, and whether it is the last. Unavailable for an
    error, NotTheApi if it is no such thing."""
    if isinstance(answer, dict) and "error" in answer:
        raise Unavailable(f"the server failed: {_message_of(answer)}")
    try:
        choices = answer["choices"]
        # the last piece may hold nothing but the usage
        if not choices:
            return "", False
        found = choices[0].get("text")
        if found is None:
            found = choices[0][chat_field].get("content")
        return found or "", bool(choices[0].get("finish_reason"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NotTheApi("the server's answer is not that of OpenAI's API") from None


def _first_model(client: "httpx.Client", url: str) -> str:
    listed = _checked(client.get(f"{url.rstrip('/')}/models"), url)
    try:
        return listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        raise NotTheApi(f"{url} lists no model; name one with --model") from None


def _checked(response: "httpx.Response", url: str) -> Any:
    """The JSON of an answer; None while it is being streamed. UsageError for a request that the
    server refuses, ContextFull if it is too long, Unavailable for one that it cannot serve now."""
    if not response.is_error:
        return _json_of(response.text) if response.is_stream_consumed else None
    status = response.status_code
    answer = _json_or_none(response.text)
    error = answer.get("error") if isinstance(answer, dict) else None
    text = f"the server refuses ({status}): {_message_of(answer)}"
    if isinstance(error, dict) and error.get("code") == CONTEXT_FULL:
        raise ContextFull(text)
    if status in (429, *range(500, 600)):
        raise Unavailable(text)
    remedies = {401: "; give --api-key, or set OPENAI_API_KEY", 404: _hint(url)}
    raise UsageError(text + remedies.get(status, ""))


def _message_of(answer: Any) -> str:
    """The message of an error in OpenAI's schema."""
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return printable(str(message or "without a reason"))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise NotTheApi("the server's answer is not JSON") from None
