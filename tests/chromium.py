"""A real browser, by the DevTools protocol: what a page computes, complains about and asks the network for."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path


NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)  # fmt: skip
SECONDS = 60


def executable():
    """The browser, or `None`."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser():
    """A browser with a profile of its own; gives [`Page`]s."""
    import websocket

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [executable(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port, path = _address(Path(profile) / "DevToolsActivePort", process)
            socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=SECONDS)
            yield Page(socket)
            socket.close()
        finally:
            process.terminate()
            process.wait(timeout=SECONDS)


def _address(file, process):
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines
        time.sleep(0.05)
    raise RuntimeError(f"the browser did not start (exit code {process.poll()})")


class Page:
    """One page of the browser.

    Attributes:
        complaints (`list[str]`): exceptions, console messages and what the browser logs, blocked requests included.
        requests (`list[str]`): addresses of everything that was asked for.
    """

    def __init__(self, socket):
        self._socket, self._count = socket, 0
        self._session, self._seen = None, set()
        self.complaints, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a command; what happens meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while (answer := self._receive()).get("id") != self._count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, address):
        """Load a page, forget what others said, and wait until nothing more is loading."""
        self.complaints, self.requests = [], []
        self._seen.discard("Page.loadEventFired")
        self.call("Page.navigate", url=address)
        while "Page.loadEventFired" not in self._seen:
            self._receive()
        # Messages of the page that are still on their way come before this answer.
        self.run("new Promise((done) => setTimeout(done, 200))")

    def run(self, script):
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def screenshot(self, path, width=1280, scheme="light"):
        """A picture of the whole page."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        picture = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(picture["data"]))

    def _receive(self):
        message = json.loads(self._socket.recv())
        method, said = message.get("method"), message.get("params", {})
        self._seen.add(method)
        if method == "Runtime.exceptionThrown":
            self.complaints.append(said["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(value.get("value")) for value in said["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        return message
