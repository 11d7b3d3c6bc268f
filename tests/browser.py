"""A headless Chromium, spoken to over a pipe (the DevTools protocol), for what only a browser can say of a page."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


PATIENCE = 120.0  # seconds to wait for a word


def executable() -> str | None:
    """Where it is installed; None where it is not."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a browser, and what it has asked for."""

    def __init__(self, commands: Any, answers: Any):
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self._session: str | None = None
        self.requested: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], PATIENCE)[0], (
                f"the browser says nothing for {PATIENCE:g} seconds"
            )
            more = os.read(self._answers.fileno(), 1 << 20)
            assert more, "the browser has ended"
            self._buffer += more
        one, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(one)
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        self.event = message.get("method")
        return message

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Shows a file in a window of so many CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.event = None
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self.event != "Page.loadEventFired":
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page, which the page's own policy has no say in."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page printed on A4, as it says itself."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])


@contextlib.contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """A browser of its own, ended afterwards."""
    (theirs_in, commands), (answers, theirs_out) = os.pipe(), os.pipe()
    pipes = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec {executable()} "$@"'
    process = subprocess.Popen(
        ["bash", "-c", pipes, "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    with os.fdopen(commands, "wb") as to, os.fdopen(answers, "rb") as back:
        try:
            yield Browser(to, back)
        finally:
            process.kill()
            process.wait()
