"""POST the JSON that stands behind the URL's line on standard input.

notify.py runs this file as a program, so that a server that hangs can be given up by killing it.
Exit code 1 and a line on standard error if the server did not take the JSON. Only the standard
library: the program finds no other package."""

import sys
import urllib.error
import urllib.request
from typing import Any


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses to be sent elsewhere: the request would arrive there without its JSON."""

    def redirect_request(self, *args: Any) -> None:
        return None


def post(url: str, content: bytes) -> str:
    """POST JSON; returns why the server did not take it, or ""."""
    headers = {"Content-Type": "application/json", "User-Agent": "nanochat"}
    request = urllib.request.Request(url, content, headers)
    try:
        # whoever started this program counts the seconds
        urllib.request.build_opener(_NoRedirects).open(request).close()
    except urllib.error.HTTPError as error:
        return f"the server answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"no connection ({error.reason})"
    # a connection that ends in the middle, an answer that is not HTTP
    except Exception as error:
        return f"no answer ({type(error).__name__})"
    return ""


if __name__ == "__main__":
    problem = post(sys.stdin.buffer.readline().decode().strip(), sys.stdin.buffer.read())
    sys.exit(problem or None)
