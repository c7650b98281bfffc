"""A stand-in for the part of the Hugging Face hub that takes uploads, on 127.0.0.1.

It speaks what huggingface_hub asks when a model is created and committed: who-am-i, repos/create,
validate-yaml, preupload, the LFS batch, its uploads (in one part or several) and verification, and
the commit. Large files are stored under their SHA-256, which is checked, and a commit may name
stored ones alone. hf_xet has a protocol of its own, which is not spoken: HF_HUB_DISABLE_XET.

    with UploadHub(port) as hub:
        ... push with HF_ENDPOINT=hub.url and one of TOKENS ...
        assert hub.repos["ada/d4"].files == {"README.md": b"..."}"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from hub_server import blob_sha1

# (user, role of the token)
TOKENS = {"hf_write": ("ada", "write"), "hf_read": ("ada", "read")}
# namespaces that a user may create repositories in
WRITABLE = {"ada": {"ada", "engines"}}
# as in the .gitattributes of a new repository
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
# files of this size go to LFS whatever their name
LFS_BYTES = 10 << 20
LFS_JSON = "application/vnd.git-lfs+json"


@dataclass
class Repo:
    """visibility: "public" or "private". commits: the summary of each. files: of the newest."""

    visibility: str
    commits: list = field(default_factory=list)
    files: dict = field(default_factory=lambda: {".gitattributes": b"*.gguf filter=lfs\n"})


class UploadHub:
    """repos: {name: Repo}. stored: {SHA-256: bytes} of large files. requests: (method, path).

    part_bytes: of uploads in several parts; 0: in one. faults: {text in a path: (times, status)},
    answered instead."""

    def __init__(self, port=0, part_bytes=0):
        self.port = port
        self.part_bytes = part_bytes
        self.repos = {}
        self.stored = {}
        self.parts = {}
        self.faults = {}
        self.requests = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        handler = type("BoundUploads", (Uploads,), {"hub": self})
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

    def status_of_fault(self, path):
        """The status to answer instead, or None."""
        with self.lock:
            for text, (times, status) in self.faults.items():
                if text in path and times > 0:
                    self.faults[text] = (times - 1, status)
                    return status
        return None


class Refused(Exception):
    """An answer with a status other than 200. The hub says why in the body and in headers."""

    def __init__(self, status, message, code=""):
        self.status, self.message, self.code = status, message, code


REPO = r"([^/]+/[^/]+)"
# (method, pattern of the path, name of the answer); the first match wins
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("GET", rf"/api/models/{REPO}", "info"),
    ("POST", rf"/api/models/{REPO}/preupload/main", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/main", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", "verify"),
    ("PUT", r"/store/([0-9a-f]{64})", "store"),
    ("PUT", r"/store/([0-9a-f]{64})/(\d+)", "store_part"),
    ("POST", r"/complete/([0-9a-f]{64})", "complete"),
]
# Addresses of the store carry their own signature: no token is sent to them.
SIGNED = ("store", "store_part", "complete")


class Uploads(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        self.body = self.read_body()
        self.hub.requests.append((self.command, path))
        headers = {"Content-Type": "application/json"}
        try:
            if status := self.hub.status_of_fault(path):
                raise Refused(status, "scripted fault")
            answer = self.answer(path)
            headers |= answer.pop("headers", {})
            status = 200
        except Refused as refused:
            status, answer = refused.status, {"error": refused.message}
            headers["X-Error-Message"] = refused.message
            if refused.code:
                headers["X-Error-Code"] = refused.code
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def answer(self, path):
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if name in SIGNED:
                    assert not token, "a token was sent to another host"
                    # no length, no upload: as S3
                    assert self.headers.get("Content-Length")
                elif token not in TOKENS:
                    raise Refused(401, "Invalid username or password.")
                self.user, self.role = TOKENS.get(token, ("", ""))
                return getattr(self, name)(*map(unquote, match.groups()))
        raise Refused(404, "Sorry, we can't find the page you are looking for.")

    # answers

    def whoami(self):
        orgs = [{"name": name, "roleInOrg": "write"} for name in WRITABLE[self.user] - {self.user}]
        access = {"displayName": "mine", "role": self.role}
        return {
            "type": "user",
            "name": self.user,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if not head or not all(re.match(r"\w+: ", line) for line in head[1].splitlines()):
            raise Refused(400, "invalid metadata")
        return {"warnings": [], "errors": []}

    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        self.require_write(owner)
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo")
        # releases of huggingface_hub differ in how they ask for it
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo("private" if private else "public")
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": "0123"}

    def require_write(self, owner):
        if self.role != "write" or owner not in WRITABLE[self.user]:
            raise Refused(
                403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
            )

    def repo(self, name):
        if name not in self.hub.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    def info(self, name):
        repo = self.repo(name)
        return {
            "id": name,
            "private": repo.visibility == "private",
            "siblings": [{"rfilename": path} for path in repo.files],
            "tags": [],
        }

    def preupload(self, name):
        repo = self.repo(name)
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES
            answer = {"path": file["path"], "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if large else "regular"
            if file["path"] in repo.files:
                answer["oid"] = blob_sha1(repo.files[file["path"]])
            answers.append(answer)
        return {"files": answers}

    def batch(self, name):
        self.require_write(name.split("/")[0])
        asked = json.loads(self.body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        objects = []
        for each in asked["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.stored:
                answer["actions"] = self.actions(name, each["oid"], each["size"])
            objects.append(answer)
        transfer = "multipart" if self.hub.part_bytes else "basic"
        return {"transfer": transfer, "objects": objects, "headers": {"Content-Type": LFS_JSON}}

    def actions(self, name, oid, size):
        # another name of this host, as the hub's store is another site
        store = f"http://localhost:{self.hub.port}/store/{oid}"
        upload = {"href": f"{store}?signature=0"}
        if self.hub.part_bytes:
            n_parts = -(-size // self.hub.part_bytes)
            urls = {str(i): f"{store}/{i}?signature=0" for i in range(1, n_parts + 1)}
            header = {"chunk_size": str(self.hub.part_bytes), **urls}
            upload = {"href": f"{self.hub.url}/complete/{oid}", "header": header}
        return {"upload": upload, "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}}

    def store(self, oid):
        self.keep(oid, self.body)
        return {}

    def store_part(self, oid, number):
        self.hub.parts[oid, int(number)] = self.body
        return {"headers": {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}}

    def complete(self, oid):
        asked = json.loads(self.body)
        assert asked["oid"] == oid
        content = b""
        for part in asked["parts"]:
            found = self.hub.parts[oid, part["partNumber"]]
            assert part["etag"].strip('"') == hashlib.md5(found).hexdigest()
            content += found
        self.keep(oid, content)
        return {}

    def keep(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        self.hub.stored[oid] = content

    def verify(self, name):
        asked = json.loads(self.body)
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "the object is not stored")
        return {}

    def commit(self, name):
        self.require_write(name.split("/")[0])
        repo = self.repo(name)
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        assert header["key"] == "header" and header["value"]["summary"]
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"], validate=True)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(400, "your push was rejected: an LFS object is missing")
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                raise Refused(400, f"unknown operation {line['key']}")
        # all or nothing
        repo.files = files
        repo.commits.append(header["value"]["summary"])
        oid = hashlib.sha1(self.body).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
