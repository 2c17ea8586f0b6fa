"""A headless Chromium, driven by the DevTools protocol through pipes: no package is needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)
PATIENCE_S = 120.0
"""How long a browser may take to answer, on a machine that is busy with something else."""


def browser() -> str | None:
    """The browser of this machine, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Page:
    """A page in a browser of its own.

    Attributes:
      problems: errors and warnings that it printed, and exceptions that nobody caught.
      requests: addresses that it asked for.
    """

    def __init__(self, ask: int, answers: int) -> None:
        self._ask, self._answers = ask, answers
        self._rest, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        self.requests: list[str] = []

    def open(self, path: Path, width: int = 1400, height: int = 900, fragment: str = "") -> None:
        """Open a file and wait until it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.navigate(path.absolute().as_uri() + fragment)

    def navigate(self, address: str) -> None:
        """Go on to an address in the same window, and wait until it has loaded."""
        self.call("Page.navigate", url=address)
        self._read(lambda message: message.get("method") == "Page.loadEventFired")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the window, and the theme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def value(self, expression: str) -> Any:
        """What JavaScript evaluates to, in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse into the middle of the first element that is selected."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        answer = self._read(lambda message: message.get("id") == number)
        assert "error" not in answer, (method, answer["error"])
        return dict(answer["result"])

    def _read(self, wanted: Any) -> dict[str, Any]:
        """The first message that is wanted; what others say of the page is noted."""
        end = time.monotonic() + PATIENCE_S
        while True:
            while b"\0" in self._rest:
                text, self._rest = self._rest.split(b"\0", 1)
                message = json.loads(text)
                self._note(message.get("method", ""), message.get("params", {}))
                if wanted(message):
                    return dict(message)
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"the browser did not answer for {PATIENCE_S} s")
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise EOFError("the browser has ended")
            self._rest += chunk

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str(params["args"]))
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(params["entry"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Page]:
    """A browser with an empty profile in a folder; it is ended afterwards."""
    program = browser()
    assert program is not None
    (its_input, ask), (answers, its_output) = os.pipe(), os.pipe()
    for descriptor in (its_input, its_output):
        os.set_inheritable(descriptor, True)
    # Chromium reads what it is asked from descriptor 3 and answers on 4.
    script = 'i=$1; o=$2; shift 2; exec "$@" 3<&"$i" 4>&"$o"'
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    with subprocess.Popen(
        ["bash", "-c", script, "bash", str(its_input), str(its_output), *command],
        pass_fds=(its_input, its_output),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(its_input)
        os.close(its_output)
        try:
            yield Page(ask, answers)
        finally:
            os.close(ask)
            os.close(answers)
            try:
                process.wait(20)  # a browser that nobody can ask any more ends by itself
            except subprocess.TimeoutExpired:
                process.kill()
