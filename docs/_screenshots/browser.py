"""A headless browser that is driven by its devtools protocol.

The protocol is JSON over a web socket, and aiohttp, which Lightning brings along, speaks it: neither selenium nor playwright is needed,
which would want a driver or a browser of their own. The browser's own ``--screenshot`` cannot open a folded group of charts, and cannot
say whether a chart is empty.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
"""Programs that speak the protocol, in the order in which they are looked for."""

PATIENCE = 180.0
"""Seconds after which waiting is an error."""


class BrowserError(RuntimeError):
    """There is no browser, or it does not answer as expected."""


def find_browser() -> str:
    """Return the path of the first browser of ``NAMES`` that is installed.

    Raises:
        BrowserError: There is none.
    """
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise BrowserError(f"no browser found (looked for {', '.join(NAMES)}); install one of them, for example chromium")


class Page:
    """A page of the browser.

    Args:
        socket: Connection to the page.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; what the page reports in the meantime is noted.

        Args:
            method: Name, such as ``Page.navigate``.
            parameters: Of the method.

        Raises:
            BrowserError: The browser refused, or it is gone.
        """
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive(timeout=PATIENCE)
            if message.type is not aiohttp.WSMsgType.TEXT:
                raise BrowserError(f"{method}: the browser closed the connection")
            answer = json.loads(message.data)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(answer["params"]["exceptionDetails"].get("text", "an exception"))
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])

    async def run(self, script: str) -> Any:
        """Evaluate a script in the page and return its value, once a promise is kept.

        Raises:
            BrowserError: The script raised.
        """
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            detail = found["exceptionDetails"]
            raise BrowserError(detail.get("exception", {}).get("description", detail["text"]))
        return found["result"].get("value")

    async def wait_for(self, script: str, what: str) -> Any:
        """Evaluate a script until its value is true, and return it.

        Args:
            script: What is evaluated, four times a second.
            what: What is waited for, for the error.

        Raises:
            BrowserError: It did not become true within ``PATIENCE``.
        """
        end = time.monotonic() + PATIENCE
        while not (value := await self.run(script)):
            if time.monotonic() > end:
                raise BrowserError(f"{what} did not appear within {PATIENCE:.0f} s")
            await asyncio.sleep(0.25)
        return value

    async def open(self, address: str, *, width: int, height: int, dark: bool = False) -> None:
        """Open an address in a window of a size, in light or dark, and wait until it is loaded."""
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.resize(width, height)
        await self.call(
            "Page.navigate", url="about:blank"
        )  # an address that differs in what follows # is not loaded anew
        await self.call("Page.navigate", url=address)
        await self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'", address)

    async def resize(self, width: int, height: int) -> None:
        """Give the window a size in pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def picture(self, clip: dict[str, float] | None = None) -> bytes:
        """Return the window, or a part of the page, as PNG.

        Args:
            clip: Corner ``x``, ``y`` and size ``width``, ``height`` of the part in pixels of the page; None: what the window shows.
        """
        await self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        options: dict[str, Any] = {} if clip is None else {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True}
        found = await self.call("Page.captureScreenshot", format="png", **options)
        return base64.b64decode(found["data"])


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Start a browser without a window and with a profile of its own, and yield its page.

    Yields:
        The page.

    Raises:
        BrowserError: There is none, or it does not start.
    """
    program = find_browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program,
            *("--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-extensions"),
            *("--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            place = await asyncio.wait_for(_announced(process), PATIENCE)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{place}/json") as answer:
                    tabs = await answer.json()
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _announced(process: asyncio.subprocess.Process) -> str:
    """Return host and port that the browser announces on its standard error, and go on reading so that it never blocks."""
    assert process.stderr is not None
    said = b""
    async for line in process.stderr:
        said += line
        if found := re.search(rb"listening on ws://([^/]+)/", line):
            _DRAINS.add(task := asyncio.ensure_future(_drain(process.stderr)))
            task.add_done_callback(_DRAINS.discard)
            return found[1].decode()
    raise BrowserError(f"the browser ended before it could be used: {said.decode(errors='replace').strip()[-500:]}")


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(65536):
        pass


_DRAINS: set[asyncio.Future[None]] = set()
"""The event loop keeps only weak references to its tasks."""
