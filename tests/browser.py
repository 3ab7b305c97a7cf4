"""Headless Chromium, asked what is wrong with a page: what it prints, fetches, does not show, or lets run over.

It is driven through its debugging pipe (a file descriptor each way, messages of JSON that end with a zero byte), which
needs no library. Other than with ``--dump-dom``, a page can be seen at a phone's width and in either colour scheme, and
every request is known, also one that the page's own security policy stopped.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)
SECONDS = 60
# What the page itself can tell. A box over the edge is fine inside one that scrolls by itself.
QUESTIONS = """
(async () => {
  await document.fonts.ready;
  await Promise.all([...document.images].map(image => image.decode().catch(() => {})));
  const found = [], wide = document.documentElement.clientWidth, box = element => element.getBoundingClientRect();
  const name = element => element.alt || element.getAttribute("aria-label") || element.textContent.trim();
  const say = (what, element) => found.push(what + ": " + name(element).slice(0, 60));
  for (const image of document.images) {
    if (!image.naturalWidth) say("broken picture", image);
    else if (box(image).width < 1 || box(image).height < 1) say("picture without size", image);
  }
  for (const drawing of document.querySelectorAll("[role=img]")) {
    const shown = [...drawing.querySelectorAll("svg")].filter(svg => svg.getClientRects().length);
    if (shown.length !== 1) { say(shown.length + " drawings shown", drawing); continue; }
    const frame = box(shown[0]);
    if (frame.width < 1 || frame.height < 1) say("drawing without size", drawing);
    for (const text of shown[0].querySelectorAll("text")) {
      const at = box(text);
      const out = Math.max(frame.left - at.left, at.right - frame.right, frame.top - at.top, at.bottom - frame.bottom);
      // Letters of the reader's font are a little wider or higher than those that the drawing was laid out with.
      if (out > 4) say("text cut off in a drawing by " + out.toFixed(1) + " px", text);
    }
  }
  for (const element of document.body.querySelectorAll("*:not(svg *):not(.skip)")) {
    if (box(element).right > wide + 1 && !element.closest(".scroll")) {
      say("<" + element.localName + "> over the right edge", element);
      break;
    }
  }
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  const style = getComputedStyle(document.body);
  return {found, width: innerWidth, paper: style.backgroundColor, ink: style.color};
})()
"""


class View(NamedTuple):
    """A page as it was seen: what is wrong with it, its width, and the colours of paper and ink."""

    wrong: list[str]
    width: int
    paper: tuple[int, ...]
    ink: tuple[int, ...]


def program() -> str | None:
    """The path of the browser, None where there is none."""
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


class Browser:
    """A running browser with a new profile in ``folder``. Context manager."""

    def __init__(self, path: str, folder: Path) -> None:
        (theirs_in, self._out), (self._in, theirs_out) = (map(_high, os.pipe()) for _ in range(2))
        self._numbers, self._unread, self._events = itertools.count(1), b"", []
        argv = [path, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "about:blank"]
        log = str(folder / "browser.log")
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs_in, 3),
            (os.POSIX_SPAWN_DUP2, theirs_out, 4),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # A group of its own, so that its children end with it.
        self._pid = os.posix_spawn(path, argv, os.environ, file_actions=actions, setpgroup=0)
        os.close(theirs_in)
        os.close(theirs_out)
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self._ask("Browser.close")
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and os.waitpid(self._pid, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        finally:
            os.close(self._in)
            os.close(self._out)
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            try:
                os.waitpid(self._pid, 0)
            except ChildProcessError:
                return

    def look(self, page: Path, width: int, scheme: str) -> View:
        """Open ``page`` at ``width`` CSS pixels in the colour scheme light or dark; below 500 px as a phone does."""
        address = page.resolve().as_uri()
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self._ask("Page.navigate", url=address)
        self._wait(lambda event: event["method"] == "Page.loadEventFired")
        answer = self._ask("Runtime.evaluate", expression=QUESTIONS, awaitPromise=True, returnByValue=True)
        told = answer["result"]["value"]
        return View(
            wrong=[*(line for event in self._events for line in _complaints(event, address)), *told["found"]],
            width=told["width"],
            paper=_colour(told["paper"]),
            ink=_colour(told["ink"]),
        )

    def picture(self) -> bytes:
        """The part of the page that is on the screen, as PNG."""
        return base64.b64decode(self._ask("Page.captureScreenshot")["data"])

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (heard := self._hear()).get("id") != number:
            self._events.append(heard)
        assert "error" not in heard, (method, heard)
        answer: dict[str, Any] = heard["result"]
        return answer

    def _wait(self, until: Callable[[dict[str, Any]], bool]) -> None:
        if not any(map(until, self._events)):
            while not until(heard := self._hear()):
                self._events.append(heard)

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._in], [], [], SECONDS)[0], f"the browser said nothing for {SECONDS} s"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        heard: dict[str, Any] = json.loads(message)
        return heard


def _complaints(event: dict[str, Any], address: str) -> list[str]:
    """What an event of the page's life says against it."""
    method, params = event["method"], event["params"]
    if method == "Network.requestWillBeSent":
        url = params["request"]["url"]
        return [] if url == address or url.startswith("data:") else [f"fetched: {url}"]
    if method == "Runtime.consoleAPICalled":
        said = " ".join(str(argument.get("value", "")) for argument in params["args"])
        return [f"console.{params['type']}: {said}"] if params["type"] in ("error", "warning", "assert") else []
    if method == "Runtime.exceptionThrown":
        return [f"exception: {params['exceptionDetails']['text']}"]
    if method == "Log.entryAdded":
        entry = params["entry"]
        return (
            [f"{entry['source']} {entry['level']}: {entry['text']}"] if entry["level"] in ("error", "warning") else []
        )
    return []


def _colour(text: str) -> tuple[int, ...]:
    """``rgb(19, 21, 24)`` as three numbers."""
    return tuple(int(part) for part in text[text.index("(") + 1 : text.index(")")].split(",")[:3])


def _high(descriptor: int) -> int:
    """The descriptor under a number that the browser's own two, 3 and 4, cannot overwrite."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved
