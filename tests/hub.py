"""A hub on the loopback interface: repositories in memory, and as much HTTP as huggingface_hub 2 speaks to push and
pull them. Not the real Hub: no permissions, no history, no Xet."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN = "hf_loopback"


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repositories` is `{id: {path: bytes}}`.

    `hub.environment(home)` makes a process use it; huggingface_hub reads these variables when it is imported.
    """

    def __init__(self):
        self.repositories = {}
        self.objects = {}
        self.requests = []

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self, home):
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            # Xet would upload elsewhere, without the negotiation below.
            "HF_HUB_DISABLE_XET": "1",
        }

    def sha(self, repository):
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted((path, sha256(data)) for path, data in files.items())).encode()).hexdigest()


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".bin"))


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

    def parts(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")

    def do_POST(self):
        data = self.body()
        match self.parts():
            case ["api", "repos", "create"]:
                asked = json.loads(data)
                name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"].rpartition("/")[2])))
                known = name in self.hub.repositories
                self.hub.repositories.setdefault(name, {})
                self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if known else 200)
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [
                    {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular",
                     "shouldIgnore": False, "oid": None}
                    for f in json.loads(data)["files"]
                ]  # fmt: skip
                self.answer({"files": files})
            case [owner, name, "info", "lfs", "objects", "batch"]:
                objects = [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{self.hub.url}/objects/{o['oid']}"}}}
                    for o in json.loads(data)["objects"]
                ]  # fmt: skip
                self.answer({"transfer": "basic", "objects": objects})
            case ["api", "models", owner, name, "commit", _]:
                files = self.hub.repositories[f"{owner}/{name}"]
                for line in map(json.loads, data.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        files[value["path"]] = self.hub.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                sha = self.hub.sha(f"{owner}/{name}")
                url = f"{self.hub.url}/{owner}/{name}/commit/{sha}"
                self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
            case _:
                self.answer({"error": "not here"}, 404)

    def do_PUT(self):
        data = self.body()
        _, oid = self.parts()
        assert sha256(data) == oid, "an LFS object is named by its hash"
        self.hub.objects[oid] = data
        self.answer()

    def do_GET(self):
        match self.parts():
            case ["api", "models", owner, name, *rest] if f"{owner}/{name}" in self.hub.repositories:
                repository = f"{owner}/{name}"
                files = self.hub.repositories[repository]
                if rest[:1] == ["tree"]:
                    self.answer([self.described(path, data) for path, data in files.items()])
                else:
                    siblings = [{"rfilename": path} for path in files]
                    self.answer({"id": repository, "sha": self.hub.sha(repository), "siblings": siblings,
                                 "tags": [], "private": False, "downloads": 0, "likes": 0})  # fmt: skip
            case [owner, name, "resolve", _, *path] if f"{owner}/{name}" in self.hub.repositories:
                self.file(f"{owner}/{name}", "/".join(path))
            case _:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def described(self, path, data):
        entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        return entry | (
            {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if is_large(path) else {}
        )

    def file(self, repository, path):
        data, commit = self.hub.repositories[repository].get(path), self.hub.sha(repository)
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
