"""The requests that the loopback hub answers."""

import base64
import hashlib
import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub import MAIN, STRANGER, TOKEN, Repository, is_large, sha256


class Refused(Exception):
    """An answer other than 200, as the Hub gives it."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status = status
        self.headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, content=b"", status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(data)))
        headers.setdefault("Content-Type", "application/octet-stream" if content is data else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self, route, *data):
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        try:
            # A slash inside a part, as in the name of a branch, is quoted.
            route([unquote(part) for part in path.strip("/").split("/")], *data)
        except Refused as refused:
            self.answer({"error": str(refused)}, refused.status, **refused.headers)

    def do_POST(self):
        self.serve(self.post, self.body())

    def do_GET(self):
        self.serve(self.get)

    do_HEAD = do_GET

    def user(self):
        """Who asks; `None` without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN, STRANGER):
            raise Refused(401, "Invalid credentials in Authorization header")
        return token or None

    def repository(self, owner, name, write=False):
        """The repository, if whoever asks may see it, or write to it."""
        user, found = self.user(), self.hub.repositories.get(f"{owner}/{name}")
        if found is None or (found.private and user != TOKEN):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        self.writer(owner, write)
        return found

    def writer(self, owner, write=True):
        user = self.user()
        if write and user != TOKEN:
            status = 401 if user is None else 403
            raise Refused(status, f"You don't have the rights to write under the namespace {owner!r}")

    def post(self, parts, data):
        match parts:
            case ["api", "repos", "create"]:
                self.create(json.loads(data))
            case ["api", "validate-yaml"]:
                self.validate(json.loads(data)["content"])
            case ["api", "models", owner, name, "branch", branch]:
                repository = self.repository(owner, name, write=True)
                if branch in repository.branches:
                    raise Refused(409, "Reference already exists")
                repository.branches[branch] = repository.branches[MAIN]
                self.answer({})
            case ["api", "models", owner, name, "preupload", _]:
                self.repository(owner, name, write=True)
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                     "shouldIgnore": False, "oid": None}
                    for f in json.loads(data)["files"]
                ]  # fmt: skip
                self.answer({"files": files})
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self.repository(owner, name.removesuffix(".git"), write=True)
                objects = [self.upload(o["oid"], o["size"]) for o in json.loads(data)["objects"]]
                self.answer({"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", revision]:
                self.commit(f"{owner}/{name}", self.repository(owner, name, write=True), revision, data)
            case _:
                raise Refused(404, f"not here: {parts}")

    def create(self, asked):
        owner = asked.get("organization") or "me"
        self.writer(owner)
        name = f"{owner}/{asked['name'].rpartition('/')[2]}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, Repository(asked.get("visibility") == "private"))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def validate(self, content):
        metadata = yaml.safe_load(content.split("---")[1]) or {}
        base = metadata.get("base_model")
        errors = []
        if base is not None and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
            errors = [{"message": f'"base_model" with value "{base}" is not valid. Use a model id.'}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def upload(self, oid, size):
        stored = {"oid": oid, "size": size}
        if oid in self.hub.objects:
            return stored
        return {**stored, "actions": {"upload": {"href": f"{self.hub.url}/objects/{oid}"}}}

    def commit(self, name, repository, revision, data):
        if self.hub.fault("commit"):
            raise Refused(500, "The commit failed")
        if repository.sha(revision) is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        files = dict(repository.files(revision))
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        request = {}
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            revision = f"refs/pr/{1 + sum(branch.startswith('refs/pr/') for branch in repository.branches)}"
            request = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{revision.rpartition('/')[2]}"}
        sha = repository.commit(revision, files)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": "", **request})

    def do_PUT(self):
        self.serve(self.put)

    def put(self, parts):
        if self.hub.fault("upload"):
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data, (_, oid) = self.body(), parts
        assert sha256(data) == oid, "an LFS object is named by its hash"
        self.hub.objects[oid] = data
        self.answer()

    def get(self, parts):
        match parts:
            case ["api", "models", owner, name, *rest]:
                repository = self.repository(owner, name)
                revision = rest[1] if len(rest) > 1 else MAIN
                sha = self.existing(repository, revision)
                if rest[:1] == ["tree"]:
                    self.answer([self.described(path, data) for path, data in repository.files(sha).items()])
                else:
                    self.answer({"id": f"{owner}/{name}", "sha": sha, "private": repository.private, "tags": [],
                                 "siblings": [{"rfilename": path} for path in repository.files(sha)],
                                 "downloads": 0, "likes": 0})  # fmt: skip
            case [owner, name, "resolve", revision, *path]:
                repository = self.repository(owner, name)
                sha = self.existing(repository, revision)
                self.file(repository.files(sha), sha, "/".join(path))
            case _:
                raise Refused(404, f"not here: {parts}", "RepoNotFound")

    def existing(self, repository, revision):
        sha = repository.sha(revision)
        if sha is None:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return sha

    def described(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return entry | (
            {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if is_large(path) else {}
        )

    def file(self, files, commit, path):
        if path == "README.md" and self.hub.fault("readme"):
            raise Refused(500, "Not now")
        data = files.get(path)
        if data is None:
            return self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"ETag": f'"{sha256(data)}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if is_large(path):
            headers |= {"X_Linked_Etag": f'"{sha256(data)}"', "X_Linked_Size": str(len(data))}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.answer(data[first : last + 1], 206, **headers)
        return self.answer(data, **headers)
