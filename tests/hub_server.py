"""A stand-in for the Hugging Face hub on 127.0.0.1, with faults on demand.

It speaks enough of the protocol for huggingface_hub and datasets:

    with HubServer(port) as hub:
        # one commit; lfs=False for plain git blobs
        sha = hub.add("owner/name", {"data/train-0.parquet": content})
        # a file outside any repository
        hub.add_url("/raw/input.txt", content)
        hub.fault("train-0.parquet", "cut", times=2, after=1000)
        ... run real clients with HF_ENDPOINT=hub.url ...
        assert hub.bodies("train-0.parquet") == [(0, 1000), (1000, 2000), (2000, 5000)]

Faults match requests whose path contains the given text and are used up after `times` (None:
never). Kinds:
status   answer `code` instead, with `headers` (a dict)
cut      close the connection after `after` bytes of a body
short    serve only the first `size` bytes, as if that were the file
corrupt  serve other bytes of the right number
stall    wait `seconds` before the first byte of a body"""

import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, unquote, urlsplit


def hasten(patch, pauses):
    """Let huggingface_hub retry without pauses; their seconds are appended to a list instead.

    patch: a pytest.MonkeyPatch."""
    clock = SimpleNamespace(sleep=pauses.append, time=time.time, monotonic=time.monotonic)
    patch.setattr("huggingface_hub.file_download.time", clock)
    patch.setattr("huggingface_hub.utils._http.time", clock)


def blob_sha1(content):
    """Git's name for a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class HubFile:
    content: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    def described(self, path):
        """The JSON object of the tree and paths-info answers."""
        if not self.lfs:
            return {
                "type": "file",
                "path": path,
                "size": len(self.content),
                "oid": blob_sha1(self.content),
            }
        version = "https://git-lfs.github.com/spec/v1"
        size = len(self.content)
        pointer = f"version {version}\noid sha256:{self.sha256}\nsize {size}\n".encode()
        return {
            "type": "file",
            "path": path,
            "size": len(self.content),
            "oid": blob_sha1(pointer),
            "lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": len(pointer)},
        }


@dataclass
class Repo:
    """commits: {sha: {path: HubFile}}, the newest last. closed: "" or "private" or "gated"."""

    commits: dict = field(default_factory=dict)
    closed: str = ""

    def commit(self, revision):
        """(sha, files) of a branch name, a full sha or the start of one; None if there is no such
        revision."""
        if revision == "main":
            revision = list(self.commits)[-1]
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return (found[0], self.commits[found[0]]) if found else None


@dataclass
class Fault:
    path: str
    kind: str
    times: int | None
    options: dict


@dataclass(frozen=True)
class Request:
    """One answered request. start, end: the range of the file's bytes that were sent, for bodies of
    files, else None."""

    method: str
    path: str
    range: str
    status: int
    authorization: str
    start: int | None = None
    end: int | None = None


class HubServer:
    """See the module docstring. requests: list of Request in order; page_size: entries of one page
    of a tree listing."""

    def __init__(self, port=0, page_size=1000):
        self.port, self.page_size = port, page_size
        self.repos, self.urls, self.faults, self.requests = {}, {}, [], []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, repo, files, lfs=True, closed=""):
        """Commit {path: bytes} on top of what the repository holds (None deletes a path) and return
        the commit's sha.

        lfs: whether data files are in LFS; documents and scripts never are. closed: "", "private"
        or "gated"."""
        held = self.repos.setdefault(repo, Repo())
        held.closed = closed
        tree = dict(list(held.commits.values())[-1]) if held.commits else {}
        for path, content in files.items():
            if content is None:
                tree.pop(path)
            else:
                tree[path] = HubFile(
                    content, lfs and not path.endswith((".md", ".py", ".yaml", ".gitattributes"))
                )
        sha = hashlib.sha1(
            repr(
                [repo, list(held.commits), sorted((p, f.sha256) for p, f in tree.items())]
            ).encode()
        ).hexdigest()
        held.commits[sha] = tree
        return sha

    def add_url(self, path, content):
        """Serve bytes at a path outside all repositories."""
        self.urls[path] = HubFile(content, False)

    def fault(self, path, kind, times=None, **options):
        """Answer wrongly the next `times` requests whose path contains `path`; see the module
        docstring."""
        self.faults.append(Fault(path, kind, times, options))

    def take_fault(self, path, kinds):
        """The first fault of these kinds that matches a request path, counted as used; or None."""
        with self.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.path in path and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def bodies(self, path):
        """[(start, end)] of the byte ranges sent for files whose path contains `path`, in order."""
        return [(r.start, r.end) for r in self.requests if path in r.path and r.start is not None]


REPO = r"([^/]+(?:/[^/]+)?)"
# (pattern, method), first match wins; matched before unquoting, since a revision with a slash
# arrives with %2F
ROUTES = [
    (rf"/api/datasets/{REPO}/tree/([^/]+)(?:/(.*))?", "tree"),
    (rf"/api/datasets/{REPO}/paths-info/([^/]+)()", "paths_info"),
    (rf"/api/datasets/{REPO}/revision/([^/]+)()", "info"),
    (rf"/api/datasets/{REPO}/(auth-check)()", "auth_check"),
    (rf"/api/datasets/{REPO}()()", "info"),
    (rf"/datasets/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"/cdn/datasets/{REPO}/resolve/([^/]+)/(.+)", "cdn"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        split = urlsplit(self.path)
        self.request_path, self.query = unquote(split.path), parse_qs(split.query)
        length = int(self.headers.get("Content-Length") or 0)
        self.form = parse_qs(self.rfile.read(length).decode()) if length else {}
        fault = self.hub.take_fault(self.request_path, ("status",))
        if fault:
            return self.error(
                fault.options["code"], "", "scripted fault", fault.options.get("headers")
            )
        if self.request_path in self.hub.urls:
            return self.send_file(self.hub.urls[self.request_path], {})
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match:
                return getattr(self, method)(*(unquote(group or "") for group in match.groups()))
        return self.error(404, "", "Sorry, we can't find the page you are looking for.")

    # answers

    def send(self, status, body=b"", headers=None, sent=None):
        # before anything goes out, so that a client that has its answer finds the request in the
        # log
        self.log(status, sent)
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Connection", "close"
        )  # no idle connection may outlive the server: "no network" must mean it
        self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client may have left
                self.wfile.write(body)

    def log(self, status, sent):
        """Note a request. sent: (start, end) of the bytes of a file's body, or None."""
        # some versions of huggingface_hub ask for this once a process, and no test is about it
        if self.request_path == "/api/agent-harnesses":
            return
        authorization = self.headers.get("Authorization") or ""
        request = Request(
            self.command,
            self.request_path,
            self.headers.get("Range") or "",
            status,
            authorization,
            *(sent or ()),
        )
        self.hub.requests.append(request)

    def error(self, status, code, message, headers=None):
        described = {
            "Content-Type": "application/json",
            "X-Error-Message": message,
            **({"X-Error-Code": code} if code else {}),
        }
        self.send(status, json.dumps({"error": message}).encode(), {**described, **(headers or {})})

    def send_json(self, value, headers=None):
        self.send(
            200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def find(self, repo, revision):
        """(sha, files), or None after an error was sent."""
        held = self.hub.repos.get(repo)
        if held is None or held.closed == "private":
            # the hub does not tell strangers which private repositories exist
            self.error(
                404 if self.headers.get("Authorization") else 401,
                "RepoNotFound",
                "Repository not found",
            )
            return None
        found = held.commit(revision or "main")
        if found is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def info(self, repo, revision, _):
        found = self.find(repo, revision)
        if found:
            sha, files = found
            closed = self.hub.repos[repo].closed
            self.send_json(
                {
                    "id": repo,
                    "sha": sha,
                    "private": False,
                    "gated": "manual" if closed == "gated" else False,
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                }
            )

    def auth_check(self, repo, *_):
        if self.hub.repos[repo].closed == "gated":
            self.error(
                403,
                "GatedRepo",
                f"Access to dataset {repo} is restricted and you are not in the authorized list.",
            )
        else:
            self.send_json({})

    def tree(self, repo, revision, folder):
        found = self.find(repo, revision)
        if not found:
            return
        entries, prefix = {}, folder.strip("/") + "/" if folder.strip("/") else ""
        for path, file in sorted(found[1].items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {
                    "type": "directory",
                    "path": name,
                    "size": 0,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
            entries[path] = file.described(path)
        if prefix and not entries:
            return self.error(404, "EntryNotFound", f"{folder} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        listed = [
            entry for name, entry in entries.items() if recursive or "/" not in name[len(prefix) :]
        ]
        first = int(self.query.get("cursor", ["0"])[0])
        last = first + self.hub.page_size
        link = {}
        if last < len(listed):
            path = quote(self.request_path, safe="/%")
            query = f"recursive={str(recursive).lower()}&expand=false&cursor={last}"
            link = {"Link": f'<{self.hub.url}{path}?{query}>; rel="next"'}
        self.send_json(listed[first:last], link)

    def paths_info(self, repo, revision, _):
        found = self.find(repo, revision)
        if found:
            answers = []
            for path in self.form.get("paths", []):
                if path in found[1]:
                    answers.append(found[1][path].described(path))
                elif any(name.startswith(path + "/") for name in found[1]):
                    answers.append(
                        {
                            "type": "directory",
                            "path": path,
                            "size": 0,
                            "oid": hashlib.sha1(path.encode()).hexdigest(),
                        }
                    )
            self.send_json(answers)

    def resolve(self, repo, revision, path):
        found = self.find(repo, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        if self.hub.repos[repo].closed == "gated":
            return self.error(
                401, "GatedRepo", f"Access to dataset {repo} is restricted.", {"X-Repo-Commit": sha}
            )
        file = files[path]
        if not file.lfs:
            return self.send_file(
                file, {"X-Repo-Commit": sha, "ETag": f'"{blob_sha1(file.content)}"'}
            )
        # another name for this host: clients must take it for another site, as the hub's CDN is,
        # and send no token there
        store = f"http://localhost:{self.hub.port}/cdn/datasets/{repo}/resolve/{sha}"
        location = f"{store}/{quote(path)}?Signature=0123"
        self.send(
            302,
            b"",
            {
                "Location": location,
                "X-Repo-Commit": sha,
                "X-Linked-Etag": f'"{file.sha256}"',
                "X-Linked-Size": str(len(file.content)),
                "ETag": f'"{file.sha256}"',
            },
        )

    def cdn(self, repo, revision, path):
        file = self.hub.repos[repo].commits[revision][path]
        self.send_file(file, {"ETag": f'"{file.sha256}"'})

    def send_file(self, file, headers):
        """The body of a file, or of the requested range, with what faults make of it."""
        content, body = file.content, self.command != "HEAD"
        fault = body and self.hub.take_fault(
            self.request_path, ("cut", "short", "corrupt", "stall")
        )
        kind, options = (fault.kind, fault.options) if fault else ("", {})
        if kind == "stall":
            time.sleep(options["seconds"])
        elif kind == "short":
            content = content[: options["size"]]
        elif kind == "corrupt":
            content = bytes(byte ^ 1 for byte in content)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end, status = 0, len(content), 200
        headers = {**headers, "Accept-Ranges": "bytes"}
        if match:
            start, end = (
                int(match[1]),
                min(len(content), int(match[2]) + 1 if match[2] else len(content)),
            )
            if start >= len(content):
                return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(content)}"
        headers["Content-Length"] = str(end - start)
        if kind == "cut":
            end = min(end, start + options["after"])
        self.send(
            status, content[start:end] if body else b"", headers, (start, end) if body else None
        )
