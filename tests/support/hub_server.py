"""A Hugging Face Hub of one's own: a real HTTP server on the loopback that the real client talks to.

It keeps repositories with commits, branches and pull requests in memory, serves files with ranges, sends large ones
through a redirect to another host as the real one does, takes commits with LFS uploads, knows tokens, private and
gated repositories, and misbehaves on request: statuses, cut and slow connections. Written from what the client sends
and expects; the client itself is never patched.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

OWNER, READER = "hf_owner", "hf_reader"  # tokens: of alice, who owns the repositories of `org`, and of bob
_USERS = {OWNER: ("alice", ("org",)), READER: ("bob", ())}
_LARGE = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pt")  # what a repository keeps in LFS


@dataclass
class Repo:
    """A repository: its commits, and what points to them."""

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users whom the gate lets through
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a pull request's ref or a hash names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What shall go wrong, with requests whose `METHOD path` matches, so many times."""

    pattern: str
    times: int
    after: int = 0  # so many go well before
    whole: bool = False  # only requests for whole files
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int = -1  # bytes of the body, then the connection breaks
    waits: bool = False  # for `release` before the answer
    stalls: bool = False  # after the first 16 KiB of the body, until all is forgotten
    trickles: bool = False  # byte by byte after the first 16 KiB of the body: it never ends
    ignore_range: bool = False


@dataclass
class Request:
    """A request as it came, and how many bytes of body it got."""

    method: str
    path: str
    range: str | None
    authorized: bool
    sent: int = 0


class FakeHub:
    """The Hub, serving from a thread; `endpoint` is what HF_ENDPOINT shall say."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stored: Files = {}  # LFS objects by sha256
        self.mutex = threading.Lock()
        self._changed = threading.Condition()
        self._released, self._over = threading.Event(), threading.Event()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, name="hub", daemon=True).start()

    def clear(self) -> None:
        """Forget all repositories, requests and faults."""
        self._released.set()
        self._over.set()
        with self.mutex:
            self.repos, self.requests, self.faults, self.stored = {}, [], [], {}
            self._released, self._over = threading.Event(), threading.Event()

    def add(
        self, repo: str, files: Path | Mapping[str, bytes], *, private: bool = False, gated: bool = False,
        revision: str = "main",
    ) -> str:  # fmt: skip
        """Commit files to a repository, which is made if need be; the commit's hash."""
        if isinstance(files, Path):
            found = {str(f.relative_to(files)): f.read_bytes() for f in sorted(files.rglob("*")) if f.is_file()}
        else:
            found = dict(files)
        made = self.repos.setdefault(repo, Repo(private=private, gated=gated))
        return self.commit(made, found, revision=revision)

    def commit(
        self, repo: Repo, files: Mapping[str, bytes], *, deleted: tuple[str, ...] = (), revision: str = "main",
        message: str = "commit",
    ) -> str:  # fmt: skip
        """A new commit on a branch: its files replaced or added, others deleted."""
        parent = repo.refs.get(revision) or repo.refs.get("main") or ""
        tree = {**repo.commits.get(parent, {}), **files}
        tree = {name: content for name, content in tree.items() if name not in deleted}
        told = [parent, message, len(repo.commits), *((n, hashlib.sha1(c).hexdigest()) for n, c in tree.items())]
        sha = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        repo.commits[sha], repo.refs[revision] = tree, sha
        repo.messages.append(message)
        for name, content in tree.items():
            if name.endswith(_LARGE):
                self.stored[hashlib.sha256(content).hexdigest()] = content
        return sha

    def files(self, repo: str, revision: str = "main") -> Files:
        """A repository's files at a revision."""
        made = self.repos[repo]
        return made.commits[made.refs.get(revision, revision)]

    def fail(self, pattern: str, *, times: int = 1, **what: Any) -> None:
        """Let the next requests whose `METHOD path` matches go wrong: see `Fault`."""
        self.faults.append(Fault(pattern, times, **what))

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose `METHOD path` matches."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def until(self, happened: Callable[[], bool]) -> None:
        """Return when something is so that requests and answers bring about; two minutes count as never."""
        with self._changed:
            assert self._changed.wait_for(happened, 120), "it does not happen"

    def release(self) -> None:
        """Let all answers go on that wait."""
        self._released.set()

    def changed(self) -> None:
        """Tell `until` to look again."""
        with self._changed:
            self._changed.notify_all()

    def bytes_sent(self) -> int:
        """Bytes of all bodies so far."""
        return sum(request.sent for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body waits for nothing, as from a real server
    server_hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        path = split.path
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.record = Request(self.command, unquote(path), self.headers.get("Range"), bool(token))
        self.fault: Fault | None = None
        hub = self.server_hub
        with hub.mutex:
            hub.requests.append(self.record)
            for fault in hub.faults:
                if fault.whole and self.record.range:
                    continue
                if fault.times and re.search(fault.pattern, f"{self.command} {unquote(path)}"):
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    self.fault = fault
                    break
            released, self.over = hub._released, hub._over
        hub.changed()
        if self.fault and self.fault.waits:
            released.wait()
        if self.fault and self.fault.status:
            return self._refuse(self.fault.status, "", "made to fail", self.fault.headers)
        if token and token not in _USERS:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        self.user, self.orgs = _USERS.get(token, ("", ()))
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return action(self, *(unquote(part) if part else part for part in found.groups()))
        return self._refuse(404, "", f"no such route: {self.command} {path}")

    # Reading

    def _info(self, repo: str, revision: str | None) -> None:
        if commit := self._commit(repo, revision):
            made = self.server_hub.repos[repo]
            siblings = []
            for name, content in made.commits[commit].items():
                entry: dict[str, Any] = {"rfilename": name}
                if "blobs" in self.query:
                    entry |= {"size": len(content), "blobId": _blob(content)}
                    if name.endswith(_LARGE):
                        digest = hashlib.sha256(content).hexdigest()
                        entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                siblings.append(entry)
            told = {"id": repo, "modelId": repo, "sha": commit, "private": made.private, "tags": [],
                    "gated": "manual" if made.gated else False, "siblings": siblings, "downloads": 0}  # fmt: skip
            self._json(told)

    def _tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if commit := self._commit(repo, revision):
            entries: list[dict[str, Any]] = []
            inside = f"{folder}/" if folder else ""
            for name, content in self.server_hub.repos[repo].commits[commit].items():
                below = name.removeprefix(inside)
                if not name.startswith(inside):
                    continue
                if self.query.get("recursive") == ["false"] and "/" in below:
                    child = {"type": "directory", "path": inside + below.partition("/")[0], "size": 0, "oid": "0" * 40}
                    entries += [child] if child not in entries else []
                    continue
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _blob(content)}
                if name.endswith(_LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                entries.append(entry)
            self._json(entries)

    def _refs(self, repo: str) -> None:
        if self._commit(repo, None):
            made = self.server_hub.repos[repo]
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in made.refs.items()
                if not name.startswith("refs/")
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        # A revision with slashes comes quoted, so that the first part of the path is all of it.
        if not (commit := self._commit(repo, revision)):
            return None
        made = self.server_hub.repos[repo]
        if made.gated and self.user not in made.granted:
            status = 403 if self.user else 401
            return self._refuse(status, "GatedRepo", f"Access to model {repo} is restricted.")
        if name not in made.commits[commit]:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        content = made.commits[commit][name]
        if not name.endswith(_LARGE):
            return self._content(content, {"X-Repo-Commit": commit, "ETag": f'"{_blob(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
            # Another host, as the real Hub has one for what is large.
            "Location": f"http://localhost:{self.server_hub.port}/cdn/{digest}?signed=1",
        }  # fmt: skip
        return self._reply(302, b"", headers)

    def _cdn(self, digest: str) -> None:
        if self.record.authorized:  # as object stores do with a second way of authorization
            return self._refuse(400, "", "Only one auth mechanism allowed")
        return self._content(self.server_hub.stored[digest], {"ETag": f'"{digest}"'})

    # Writing

    def _whoami(self) -> None:
        if not self.user:
            return self._refuse(401, "", "Invalid username or password.")
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.orgs]
        return self._json({"type": "user", "name": self.user, "orgs": orgs, "auth": {"type": "access_token"}})

    def _auth_check(self, repo: str, write: str | None) -> None:
        if self._commit(repo, None, empty=True) is None:
            return None
        if write and not self._may_write(repo):
            return self._refuse(403, "", "You don't have write access to this repository")
        return self._json({})

    def _create(self) -> None:
        told = json.loads(self.body)
        space = told.get("organization") or self.user
        repo = f"{space}/{told['name']}"
        if not self.user or not self._may_write(repo):
            return self._refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{space}"')
        url = f"{self.server_hub.endpoint}/{repo}"
        if repo in self.server_hub.repos:
            return self._reply(409, json.dumps({"url": url, "error": "You already created this model repo"}).encode())
        private = told.get("visibility") == "private" or bool(told.get("private"))
        made = self.server_hub.repos.setdefault(repo, Repo(private=private))
        self.server_hub.commit(made, {".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        return self._json({"url": url, "id": repo, "name": repo})

    def _validate(self) -> None:
        text = json.loads(self.body)["content"]
        errors = [] if text.startswith("---\n") else [{"message": "no front matter"}]
        self._reply(400 if errors else 200, json.dumps({"errors": errors, "warnings": []}).encode())

    def _preupload(self, repo: str, revision: str) -> None:
        if commit := self._commit(repo, revision):
            if not self._may_write(repo) and "create_pr" not in self.query:
                return self._refuse(403, "", "no write access")
            tree, told = self.server_hub.repos[repo].commits[commit], []
            for entry in json.loads(self.body)["files"]:
                name, mode = entry["path"], "lfs" if entry["path"].endswith(_LARGE) else "regular"
                there = tree.get(name)
                oid = None
                if there is not None:
                    oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else _blob(there)
                told.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._json({"files": told})

    def _lfs_batch(self, repo: str) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            told = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
            if entry["oid"] not in self.server_hub.stored:
                told["actions"] = {"upload": {"href": f"{self.server_hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
            objects.append(told)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._refuse(400, "", "wrong content")
        self.server_hub.stored[oid] = self.body
        return self._reply(200, b"")

    def _push(self, repo: str, revision: str) -> None:
        hub, made = self.server_hub, self.server_hub.repos[repo]
        opens = "create_pr" in self.query
        if self._commit(repo, revision) is None:
            return None
        if not opens and not self._may_write(repo):
            return self._refuse(403, "", "no write access")
        files: Files = {}
        deleted, message = [], ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        number = 1 + sum(name.startswith("refs/pr/") for name in made.refs)
        branch = f"refs/pr/{number}" if opens else revision
        sha = hub.commit(made, files, deleted=tuple(deleted), revision=branch, message=message)
        told: dict[str, Any] = {"success": True, "commitOid": sha, "commitUrl": f"{hub.endpoint}/{repo}/commit/{sha}"}
        if opens:
            told["pullRequestUrl"] = f"{hub.endpoint}/{repo}/discussions/{number}"
        return self._json(told)

    # What they share

    def _commit(self, repo: str, revision: str | None, *, empty: bool = False) -> str | None:
        """The commit asked for; None once the refusal has been sent."""
        made = self.server_hub.repos.get(repo)
        if made is None or (made.private and not self._may_write(repo)):
            # The real one does not tell a stranger whether a repository is private or missing.
            self._refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        commit = made.find(revision or "main")
        if commit is None and not empty:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit or ("empty" if empty else None)

    def _may_write(self, repo: str) -> bool:
        return bool(self.user) and repo.partition("/")[0] in (self.user, *self.orgs)

    def _content(self, content: bytes, headers: Mapping[str, str]) -> None:
        told, status = {**headers, "Accept-Ranges": "bytes"}, 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match and not (self.fault and self.fault.ignore_range):
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if first > last:
                return self._reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            told["Content-Range"], status = f"bytes {first}-{last}/{len(content)}", 206
            content = content[first : last + 1]
        return self._reply(status, content, told)

    def _json(self, told: Any) -> None:
        self._reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, "Content-Type": "application/json", **(headers or {})}
        if code:
            told["X-Error-Code"] = code
        self._reply(status, json.dumps({"error": message}).encode(), told)

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for part in self._parts(body):
            self.wfile.write(part)
            self.record.sent += len(part)
            self.server_hub.changed()

    def _parts(self, body: bytes) -> Iterator[bytes]:
        fault = self.fault
        if fault and 0 <= fault.cut_after < len(body):
            yield body[: fault.cut_after]
            self.wfile.flush()
            self.close_connection = True
            return
        yield body[: 1 << 14]
        if fault and fault.stalls:
            self.over.wait()
        while fault and fault.trickles and not self.over.is_set():
            yield b"."
            time.sleep(0.01)
        for start in range(1 << 14, len(body), 1 << 14):
            yield body[start : start + (1 << 14)]


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO, _REVISION = r"([\w.\-]+/[\w.\-]+)", r"([^/]+)"
_KIND = "(?:models|datasets)"  # a data set is a repository too, read in the same way
_ROUTES: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("GET",), f"/api/{_KIND}/{_REPO}", lambda handler, repo: handler._info(repo, None)),
    (("GET",), f"/api/{_KIND}/{_REPO}/revision/{_REVISION}", _Handler._info),
    (("GET",), f"/api/{_KIND}/{_REPO}/tree/{_REVISION}(?:/(.+))?", _Handler._tree),
    (("GET",), f"/api/models/{_REPO}/refs", _Handler._refs),
    (("GET",), f"/api/models/{_REPO}/auth-check(/write)?", _Handler._auth_check),
    (("GET",), "/api/whoami-v2", _Handler._whoami),
    (("POST",), "/api/repos/create", _Handler._create),
    (("POST",), "/api/validate-yaml", _Handler._validate),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", _Handler._push),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), "/lfs/(.+)", _Handler._lfs_put),
    (("GET", "HEAD"), "/cdn/(.+)", _Handler._cdn),
    (("GET", "HEAD"), f"(?:/datasets)?/{_REPO}/resolve/{_REVISION}/(.+)", _Handler._resolve),
)
