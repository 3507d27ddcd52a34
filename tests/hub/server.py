"""A Hub of its own on loopback: as much of the HTTP interface of the Hugging Face Hub as pushing and loading models use.

Repositories are held in memory, as commits of whole trees. Large files go the way of Git LFS, by themselves and before
the commit that names them; answers redirect to where they are stored.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LFS_ENDINGS = (".safetensors", ".onnx", ".bin", ".xml", ".pt")
# What the Hub lets models choose from, as far as the tests go.
LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")


@dataclass(frozen=True)
class File:
    """A file of a commit; `lfs` is the digest under which a large one is stored."""

    content: bytes
    lfs: str | None = None

    @property
    def oid(self) -> str:
        """What Git calls the file, which is also its ETag unless it is large."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A repository: commits as whole trees, and branches and tags that name them."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, File], message: str) -> str:
        """Adds a commit to a branch and returns its digest."""
        text = json.dumps([branch, message, self.refs.get(branch), sorted((name, tree[name].oid) for name in tree)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = tree
        self.messages.append(message)
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a digest names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Refusal(Exception):
    """An answer that is an error, with what the Hub puts into its headers."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Hub(ThreadingHTTPServer):
    """The server. `users` maps tokens to `(name, role, organizations)`.

    Attributes:
        log: `METHOD path status` of every answer, in order.
        break_at: A method and the start of a path: the connection is cut in the middle of such a request.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, tuple[str, str, tuple[str, ...]]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[str] = []
        self.break_at: tuple[str, str] | None = None
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, by path."""
        found = self.repos[repo]
        return {path: file.content for path, file in found.commits[found.find(revision)].items()}

    def note(self, line: str) -> None:
        """Keeps a line of the log, which `pytest tests/hub --log-cli-level=INFO` shows."""
        self.log.append(line)
        logging.getLogger(__name__).info(line)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as they please."""


def metadata_of(card: str) -> dict[str, Any]:
    """What stands at the top of a card."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


Route = tuple[str, re.Pattern, Callable[..., None]]
_ROUTES: list[Route] = []
_REPO = r"(?P<repo>[^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """Registers what answers a request; named groups of the pattern become arguments."""

    def register(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Answers one client."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        """Finds the route of a request and calls it."""
        path = urlsplit(self.path).path
        if (broken := self.server.break_at) and self.command == broken[0] and path.startswith(broken[1]):
            self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 512))
            self.server.note(f"{self.command} {path} cut")
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, function in _ROUTES:
                if (method == self.command or (method, self.command) == ("GET", "HEAD")) and (
                    match := pattern.fullmatch(path)
                ):
                    with self.server.lock:
                        function(self, **{name: unquote(value) for name, value in match.groupdict().items()})
                    return
            raise Refusal(404, f"This Hub does not know {self.command} {path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), **({"X-Error-Code": refusal.code} if refusal.code else {})}
            self.reply(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Sends an answer; a HEAD request gets the length of its content only."""
        self.server.note(f"{self.command} {urlsplit(self.path).path} {status}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value: Any) -> None:
        """Sends JSON."""
        self.reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def log_message(self, *args: Any) -> None:
        """Nothing goes to stderr."""

    # Who asks, and what they may

    def user(self) -> tuple[str, str, tuple[str, ...]] | None:
        """Who asks; None for strangers."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.server.users[token]

    def readable(self, repo: str) -> Repo:
        """The repository, if the client may read it; a private one looks like none at all."""
        user = self.user()
        found = self.server.repos.get(repo)
        if found is not None and (not found.private or (user and self.owns(user, repo))):
            return found
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        raise Refusal(404, "Repository not found", "RepoNotFound")

    def writable(self, repo: str) -> Repo:
        """The repository, if the client may write to it."""
        found, user = self.readable(repo), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not self.owns(user, repo) or user[1] == "read":
            raise Refusal(403, f"Forbidden: you must use a write token to upload to {repo}")
        return found

    def owns(self, user: tuple[str, str, tuple[str, ...]], repo: str) -> bool:
        """Whether a repository is in the user's namespace, or in that of an organization of theirs."""
        return repo.partition("/")[0] in (user[0], *user[2])

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        """A commit and its files."""
        found = self.readable(repo)
        sha = found.find(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, found.commits[sha]

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        name, role, organizations = user
        token = {"accessToken": {"displayName": "test", "role": role}}
        orgs = [{"name": organization} for organization in organizations]
        self.reply_json({"type": "user", "name": name, "orgs": orgs, "auth": {"type": "access_token", **token}})

    @route("POST", "/api/repos/create")
    def create(self):
        user, asked = self.user(), json.loads(self.body)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo = f"{asked.get('organization') or user[0]}/{asked['name']}"
        if not self.owns(user, repo) or user[1] == "read":
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {repo.split('/')[0]}")
        if repo in self.server.repos:
            answer = json.dumps({"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
            return self.reply(answer.encode(), 409)
        self.server.repos[repo] = made = Repo(bool(asked.get("private")))
        made.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.reply_json({"url": f"{self.server.url}/{repo}", "name": repo})

    @route("POST", f"/api/models/{_REPO}/(?P<kind>branch|tag)/(?P<name>[^/]+)")
    def name_revision(self, repo: str, kind: str, name: str):
        found, asked = self.writable(repo), json.loads(self.body or b"{}")
        # The path names the new branch, but what a tag is to point to.
        name, start = (asked["tag"], name) if kind == "tag" else (name, asked.get("startingPoint", "main"))
        if name in found.refs:
            raise Refusal(409, f"Reference already exists: {name}")
        found.refs[name] = found.find(start)
        self.reply_json({})

    @route("GET", f"/api/models/{_REPO}")
    def info_of_main(self, repo: str):
        self.info(repo, "main")

    @route("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)")
    def info(self, repo: str, revision: str):
        sha, tree = self.tree(repo, revision)
        files = [{"rfilename": path} for path in sorted(tree)]
        private, card = self.server.repos[repo].private, tree.get("README.md")
        data = {"cardData": metadata_of(card.content.decode())} if card else {}
        self.reply_json({"id": repo, "sha": sha, "private": private, "siblings": files, "tags": [], **data})

    @route("GET", f"/api/models/{_REPO}/refs")
    def refs(self, repo: str):
        refs = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in self.readable(repo).refs.items()
        ]
        self.reply_json({"branches": refs, "converts": [], "tags": []})

    @route("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)")
    def list_tree(self, repo: str, revision: str):
        _, tree = self.tree(repo, revision)
        rows = [
            {"type": "file", "oid": file.oid, "size": len(file.content), "path": path} for path, file in tree.items()
        ]
        self.reply_json(rows)

    # Pushing

    @route("POST", "/api/validate-yaml")
    def validate(self):
        content = json.loads(self.body)["content"]
        data = metadata_of(content)
        licence = data.get("license")
        errors = [] if licence is None or licence in LICENCES else [{"message": f'"license" cannot be {licence}'}]
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        self.reply(json.dumps({"errors": errors, "warnings": warnings}).encode(), 400 if errors else 200)

    @route("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)")
    def preupload(self, repo: str, revision: str):
        self.writable(repo)
        _, tree = self.tree(repo, revision)
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_ENDINGS) else "regular"
            known = {"oid": tree[path].lfs or tree[path].oid} if path in tree else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.reply_json({"files": files})

    @route("POST", f"/{_REPO}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str):
        self.writable(repo)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            url = f"{self.server.url}/lfs/{repo}/{asked['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append({**asked, **({} if asked["oid"] in self.server.stored else {"actions": actions})})
        self.reply_json({"transfer": "basic", "objects": objects})

    @route("PUT", f"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)")
    def store(self, repo: str, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content does not match its digest")
        self.server.stored[oid] = self.body
        self.reply(b"")

    @route("POST", f"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)/verify")
    def verify(self, repo: str, oid: str):
        if len(self.server.stored.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(422, "The object is not there")
        self.reply_json({})

    @route("POST", f"/api/models/{_REPO}/commit/(?P<branch>[^/]+)")
    def commit(self, repo: str, branch: str):
        found = self.writable(repo)
        lines = [json.loads(line) for line in self.body.splitlines()]
        tree = dict(self.tree(repo, branch)[1])
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise Refusal(400, f"LFS pointer to {value['oid']}, which was not uploaded")
                tree[value["path"]] = File(self.server.stored[value["oid"]], value["oid"])
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = found.commit(branch, tree, message)
        self.reply_json({"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    # Loading

    @route("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: str, revision: str, path: str):
        sha, tree = self.tree(repo, revision)
        if path not in tree:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        file, headers = tree[path], {"X-Repo-Commit": sha}
        if file.lfs is None:
            return self.reply(file.content, headers={**headers, "ETag": f'"{file.oid}"'})
        linked = {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.lfs}"'}
        self.reply(b"", 302, {**headers, **linked, "Location": f"{self.server.url}/stored/{file.lfs}"})

    @route("GET", "/stored/(?P<oid>[0-9a-f]+)")
    def download(self, oid: str):
        self.reply(self.server.stored[oid], headers={"ETag": f'"{oid}"'})
