"""Refusals of requests, in the form that OpenAI's clients read."""

from dataclasses import dataclass
from typing import Any

from nanochat.common import printable

# statuses of 500 and above that this server answers on purpose: the model cannot answer now; the
# request took too long
UNAVAILABLE = 503
TIMED_OUT = 504
# what a message quotes of a request may be megabytes long
LONGEST_MESSAGE = 600
TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    UNAVAILABLE: "server_error",
    TIMED_OUT: "timeout_error",
}


@dataclass
class Refused(Exception):
    """A request that is not honoured. Shown to the client only.

    message: field, value, reason, remedy. param: the field of the request's body that is at
    fault. code: a word for programs. headers: further ones of the response."""

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        return error_body(self.message, self.status, self.param, self.code)


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's schema; whatever the message quotes, it is valid Unicode and short."""
    message = printable(message)
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 3] + "..."
    kind = TYPES.get(status, "invalid_request_error")
    shown_param = None if param is None else printable(param)[:100]
    return {"error": {"message": message, "type": kind, "param": shown_param, "code": code}}


# the answer to what has not ended when the server does
ENDING = Refused("the server is ending; try again later", code="ending", status=UNAVAILABLE)
