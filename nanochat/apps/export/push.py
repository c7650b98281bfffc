"""What was exported and verified, as a model on the Hugging Face hub."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.apps.export.model_card import FOLDER, model_card
from nanochat.common import Unavailable, UsageError, human_bytes, in_a_line, install_hint
from nanochat.data.clients import load_huggingface_hub
from nanochat.data.download import problem_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD_FILE = "README.md"
# What the hub itself puts into a new repository.
OF_THE_HUB = {".gitattributes"}
# Packages without which an export is written but not compared, by --format. A page is always read
# again.
VERIFIED_BY = {"hf": "transformers", "gguf": "xllamacpp"}
TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Destination:
    """Where to push. repo: OWNER/NAME. exists: it is there already, and empty."""

    api: "HfApi"
    repo: str
    public: bool
    exists: bool


def open_destination(repo: str, target: str, public: bool) -> Destination:
    """Check what can be checked before an export: packages, token, name. Creates nothing.

    repo: NAME or OWNER/NAME. target: of --format. UsageError if the export could not be verified,
    there is no token that may write, or the name is taken; Unavailable if the hub does not
    answer."""
    _require_verification(target)
    hub = load_huggingface_hub()
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise UsageError(
            f"--push {repo}: not a name for a repository ({in_a_line(error)}); give NAME or "
            "OWNER/NAME"
        ) from None
    if hub.get_token() is None:
        raise UsageError(
            f"--push {repo}: the hub wants a token, and there is none; set HF_TOKEN to one that "
            f"may write ({TOKENS}), or log in with `hf auth login`"
        )
    api = hub.HfApi()
    with _explained(repo):
        who = api.whoami()
        full = repo if "/" in repo else f"{who['name']}/{repo}"
        # Tokens of one kind alone name their role; of others the hub decides later.
        if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UsageError(
                f"--push {repo}: the token of {who['name']} may only read; create one that may "
                f"write ({TOKENS})"
            )
        exists = _is_empty(api, full, public)
    return Destination(api, full, public, exists)


def _require_verification(target: str) -> None:
    """UsageError if the package is missing that compares an export of a format."""
    package = VERIFIED_BY.get(target)
    try:
        if package == "transformers":
            import transformers  # noqa: F401
        elif package == "xllamacpp":
            import xllamacpp  # noqa: F401
    except ImportError:
        raise install_hint(package, "--push, which uploads only what was verified,") from None


def _is_empty(api: "HfApi", repo: str, public: bool) -> bool:
    """Whether a repository exists and has no files; False if there is none.

    UsageError if it has files, or others may see it than --public says."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return False
    if {file.rfilename for file in info.siblings or []} - OF_THE_HUB:
        raise _taken(repo)
    if info.private and public:
        raise UsageError(
            f"--push {repo}: this empty repository is private; leave --public out, or change it on "
            "its page"
        )
    if not info.private and not public:
        raise UsageError(
            f"--push {repo}: this empty repository is public; add --public, or change it on its "
            "page"
        )
    return True


def _taken(repo: str) -> UsageError:
    return UsageError(
        f"--push {repo}: a repository of this name exists, and is not overwritten; choose another "
        "name, or delete it on its page"
    )


def push(destination: Destination, out: Path, card: str = "") -> str:
    """Create the repository and upload what was exported, in one commit: a sentence to print.

    out: a folder, or a file. card: the model card where `out` has none. Raises UsageError if the
    hub refuses, Unavailable if it does not answer; `out` stays."""
    from huggingface_hub import CommitOperationAdd

    api = destination.api
    repo = destination.repo
    contents: dict[str, Path | bytes] = {CARD_FILE: card.encode()} if card else {}
    paths = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    for path in paths:
        name = path.name if path == out else path.relative_to(out).as_posix()
        # Who reads the card on the hub has no folder, but can give this name.
        is_card = name == CARD_FILE
        text = path.read_text(encoding="utf-8") if is_card else ""
        contents[name] = text.replace(f'"{FOLDER}"', f'"{repo}"').encode() if is_card else path
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    n_bytes = sum(operation.upload_info.size for operation in operations)
    with _explained(repo, out):
        if not destination.exists:
            api.create_repo(repo, private=not destination.public)
        api.create_commit(repo, operations, commit_message="Export of a nanochat run")
    seen = "public" if destination.public else "private"
    return (
        f"pushed {len(contents)} files ({human_bytes(n_bytes)}) to a {seen} repository: "
        f"{api.endpoint}/{repo}"
    )


def card_of_page(run: Path, step: int) -> str:
    """The model card of an exported page, which is one file and has none."""
    from nanochat import load

    model, tokenizer = load(run, step, device_type="cpu", dtype="float32")
    return model_card(run, step, model, tokenizer, "small integers, in the page", target="html")


# ---- errors ----


@contextlib.contextmanager
def _explained(repo: str, out: Path | None = None) -> Iterator[None]:
    """Turn errors of the hub into UsageError or Unavailable. out: what is exported already."""
    try:
        yield
    except (UsageError, Unavailable):
        raise
    # The client raises a dozen classes, and wraps them where it uploads in threads.
    except Exception as error:
        failure = _failure(_innermost(error), repo)
        if out is not None:
            later = f"hf upload {repo} {out}"
            kept = f"{out} is complete; to push it later: {later}"
            raise type(failure)(f"{failure}. {kept}") from None
        raise failure from None


def _innermost(error: BaseException) -> BaseException:
    """What an upload failed of: the first error of the hub or the network among the causes."""
    from huggingface_hub.errors import HfHubHTTPError

    transport_error = HfHubHTTPError.__bases__[0]
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (transport_error, OSError)):
            return found
        found = found.__cause__
    return error


def _failure(error: BaseException, repo: str) -> UsageError | Unavailable:
    """What an error means to the user."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    # The header stays where the client words the error anew.
    headers = getattr(response, "headers", {})
    said = getattr(error, "server_message", None) or headers.get("X-Error-Message", "")
    said = " ".join(said.split())
    reason = f" ({said})" if said else ""
    if status == 401:
        return UsageError(
            f"--push {repo}: the hub does not accept the token{reason}; set HF_TOKEN to a valid "
            f"one ({TOKENS}), or log in with `hf auth login`"
        )
    if status == 403:
        return UsageError(
            f"--push {repo}: the token may not write there{reason}; use a name of your own, or a "
            f"token that may write ({TOKENS})"
        )
    if status == 409:
        return _taken(repo)
    try:
        problem = problem_of(error)
    # It raises what it does not know.
    except Exception:
        return Unavailable(f"--push {repo}: {type(error).__name__}: {in_a_line(error)}{reason}")
    if problem.kind == "offline":
        return UsageError(f"--push {repo}: HF_HUB_OFFLINE is set; unset it")
    return Unavailable(
        f"--push {repo}: {problem.reason}{reason}; check the network and HF_ENDPOINT, and try "
        "again later"
    )
