"""A hub on the loopback interface: as much HTTP as huggingface_hub 2 speaks to push and pull, with branches, commits
that happen whole or not at all, permissions, and faults on demand. Not the real Hub: no Xet, no history to look at."""

import hashlib
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer

from huggingface_hub import ModelCard


TOKEN = "hf_loopback"
# Of somebody else, who may read what is public and write nowhere.
STRANGER = "hf_stranger"
MAIN = "main"


class Repository(Mapping):
    """Branches of commits, each the `{path: bytes}` of all files; as a mapping, the files of the main branch."""

    def __init__(self, private=False):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.commit(MAIN, {})

    def commit(self, branch, files):
        sha = hashlib.sha1(repr(sorted((path, sha256(data)) for path, data in files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision=MAIN):
        """The commit that a branch or a commit's own name stands for, or `None`."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision=MAIN):
        return self.commits[self.sha(revision)]

    def __getitem__(self, path):
        return self.files()[path]

    def __iter__(self):
        return iter(self.files())

    def __len__(self):
        return len(self.files())


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repositories` is `{id: Repository}`.

    `hub.environment(home)` makes a process use it; huggingface_hub reads these variables when it is imported.

    `hub.faults` says how often what is to go wrong: `"upload"` drops the connection in the middle of a large file,
    `"commit"` answers a commit with status 500, `"readme"` a read of a README.md.
    """

    def __init__(self):
        self.repositories = {}
        self.objects = {}
        self.requests = []
        self.faults = {}

    def __enter__(self):
        # Imported here, since it needs the names above.
        from hub_requests import Handler

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self, home, token=TOKEN):
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            # Xet would upload elsewhere, without the negotiation of LFS.
            "HF_HUB_DISABLE_XET": "1",
        }

    def put(self, repository, files, private=False):
        """Files `{path: bytes or str}` into a repository, which is made if it is not there."""
        found = self.repositories.setdefault(repository, Repository(private))
        given = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
        return found.commit(MAIN, {**found, **given})

    def folder(self, repository, folder):
        """The files of a folder into a repository."""
        return self.put(repository, {path.name: path.read_bytes() for path in folder.iterdir()})

    def card(self, repository, revision=MAIN):
        """The README.md."""
        return ModelCard(self.repositories[repository].files(revision)["README.md"].decode())

    def commits(self, repository):
        """How many commits were asked for."""
        return sum(f"/{repository}/commit/" in request for request in self.requests)

    def fault(self, kind):
        """Whether it is time for this fault."""
        left = self.faults.get(kind, 0)
        self.faults[kind] = max(left - 1, 0)
        return left > 0


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def is_large(path):
    return path.endswith((".safetensors", ".bin"))
