"""A headless Chromium, spoken to over two pipes by its own protocol (chromedevtools.github.io)."""

import json
import os
import shutil
import signal
import subprocess
import time
from base64 import b64decode
from contextlib import contextmanager

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # of root, as in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
PATIENCE_SEC = 60.0
ENABLED = ("Page", "Runtime", "Log", "Network")


def program():
    """Where Chromium is; None where it is not installed."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One page: what it asked for, what it said on its console, and how it looks."""

    def __init__(self, process, write, read):
        self._process, self._write, self._read = process, write, read
        self._number, self._rest, self._session = 0, b"", None
        self.events = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ENABLED:
            self(f"{domain}.enable")

    def __call__(self, method, **arguments):
        """The result of a command; AssertionError where the browser refuses it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            assert part, f"Chromium left with {self._process.wait()}"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        self.events.clear()
        self("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression):
        """What an expression of JavaScript comes to."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE_SEC
        while not self.value(expression):
            assert time.monotonic() < end, f"never: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.05)

    def screen(self, width, height=844, *, dark=False):
        """Be a screen of this size, and of a user who likes it light or dark."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self):
        """The whole page as a PNG."""
        return b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    @property
    def requests(self):
        """Addresses that were asked for since the page was opened."""
        asked = (each for each in self.events if each["method"] == "Network.requestWillBeSent")
        return [each["params"]["request"]["url"] for each in asked]

    @property
    def complaints(self):
        """Errors and warnings since the page was opened: of its script, its policy, the network."""
        said = []
        for each in self.events:
            if each["method"] == "Runtime.exceptionThrown" or (
                each["method"] == "Runtime.consoleAPICalled"
                and each["params"]["type"] in ("error", "warning")
            ):
                said.append(each["params"])
            if each["method"] == "Log.entryAdded" and each["params"]["entry"]["level"] in (
                "error",
                "warning",
            ):
                said.append(each["params"]["entry"])
        return said


@contextmanager
def chromium(folder):
    """A tab of a browser that keeps what it keeps in a folder."""
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    command = [program(), *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}', "bash", *command],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    try:
        yield Tab(process, ours_write, ours_read)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_read)
        os.close(ours_write)
