"""`nanochat client`: text from any server that speaks OpenAI's API, such as `nanochat serve`."""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

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
Message = dict[str, str]  # role and content, as the API has them


def build_parser() -> argparse.ArgumentParser:
    """All options of the app. Imports nothing heavy, so that --help is immediate."""
    parser = argparse.ArgumentParser(
        prog="nanochat client",
        allow_abbrev=False,
        description="Continue a prompt, or with --chat answer it, through a server that speaks "
        "OpenAI's API. Without a prompt, lines are read from standard input, one after the other; "
        "in a chat each is answered with those before in mind. The text appears as it is written.",
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
    add("--system", default="", metavar="TEXT", help="with --chat: the system message")
    add("--max-tokens", type=int, default=256, metavar="N", help="(default %(default)s)")
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
    if args.system and not args.chat:
        raise UsageError("--system: needs --chat; add that, or leave it out")
    try:
        import httpx
    except ImportError:
        raise install_hint("httpx", "nanochat client") from None
    if not args.url.startswith(("http://", "https://")):
        raise UsageError(
            f"--url={args.url}: no http address; give one, such as http://HOST:8000/v1"
        )
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
    try:
        with httpx.Client(headers=headers, timeout=timeout) as client:
            model = args.model or _first_model(client, args.url)
            _talk(client, args, model)
    except httpx.InvalidURL as error:
        raise UsageError(f"--url={args.url}: {error}; check the address") from None
    except httpx.HTTPError as error:
        raise Unavailable(
            f"{args.url} cannot be reached ({in_a_line(error)}); is `nanochat serve` running?"
        ) from None
    return EXIT_COMPLETED


def _talk(client: "httpx.Client", args: Namespace, model: str) -> None:
    """Print the answers to the prompt, or to each line of standard input."""
    history: list[Message] = []
    if args.system:
        history.append({"role": "system", "content": args.system})
    for prompt in [" ".join(args.prompt)] if args.prompt else _lines():
        history.append({"role": "user", "content": prompt})
        # of a continuation, the prompt is a part
        if not args.chat:
            print(prompt, end="", flush=True)
        answer = ""
        for piece in _pieces(client, args, model, prompt, history):
            answer += piece
            print(printable(piece), end="", flush=True)
            # as after `| head`
            if output.reader_is_gone():
                return
        print(flush=True)
        history.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """The lines of standard input that are not blank; on a terminal, each after a sign."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield valid_unicode(line.rstrip("\n"))


def _pieces(
    client: "httpx.Client", args: Namespace, model: str, prompt: str, history: list[Message]
) -> Iterator[str]:
    """The text of an answer, as it comes."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": not args.no_stream,
    }
    body |= {"messages": history} if args.chat else {"prompt": prompt}
    optional = {"top_p": args.top_p, "seed": args.seed, "stop": args.stop or None}
    body |= {name: value for name, value in optional.items() if value is not None}
    address = f"{args.url.rstrip('/')}/{'chat/completions' if args.chat else 'completions'}"
    if args.no_stream:
        yield _text_of(_checked(client.post(address, json=body)), "message")
        return
    with client.stream("POST", address, json=body) as response:
        if response.is_error:
            response.read()
        _checked(response)
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                yield _text_of(_json_of(data), "delta")


def _text_of(answer: Any, chat_field: str) -> str:
    """The text in an answer or a piece of one. Unavailable if it is no such thing."""
    if isinstance(answer, dict) and "error" in answer:
        raise Unavailable(f"the server failed: {_message_of(answer)}")
    try:
        choices = answer["choices"]
        # the last piece may hold nothing but the usage
        if not choices:
            return ""
        found = choices[0].get("text")
        if found is None:
            found = choices[0][chat_field].get("content")
        return found or ""
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Unavailable("the server's answer is not that of OpenAI's API") from None


def _first_model(client: "httpx.Client", url: str) -> str:
    listed = _checked(client.get(f"{url.rstrip('/')}/models"))
    try:
        return listed["data"][0]["id"]
    except (KeyError, IndexError, TypeError):
        raise Unavailable(f"{url} lists no model; name one with --model") from None


def _checked(response: "httpx.Response") -> Any:
    """The JSON of an answer; None while it is being streamed. UsageError for a request that the
    server refuses, Unavailable for one that it cannot serve now."""
    if response.is_error:
        message = _message_of(_json_or_none(response.text))
        text = f"the server refuses ({response.status_code}): {message}"
        raise (Unavailable if response.status_code in (429, *range(500, 600)) else UsageError)(text)
    return _json_of(response.text) if response.is_stream_consumed else None


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
        raise Unavailable("the server's answer is not JSON") from None
