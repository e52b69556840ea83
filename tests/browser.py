"""A headless Chromium that opens a page, says what the page asked for, and takes its picture."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page must do without the internet
    "--remote-debugging-port=0",
)


@dataclass(frozen=True, eq=False)
class Page:
    """What a page looked like and where it asked for something."""

    picture: NDArray[np.uint8]  # (y, x, 3)
    png: bytes
    requests: tuple[str, ...]  # of the page and its workers
    title: str


def look_at(url: str, folder: Path, *, size_xy: tuple[int, int] = (1000, 640), within_s: float = 60) -> Page:
    """Open a neuroglancer page and take its picture once it says that all is drawn."""
    with _chromium(folder, size_xy, within_s) as port:
        with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        return asyncio.run(_picture(target["webSocketDebuggerUrl"], url, within_s))


@contextmanager
def _chromium(folder: Path, size_xy: tuple[int, int], within_s: float) -> Iterator[int]:
    """Run the browser; give the port at which it takes orders."""
    assert CHROMIUM is not None  # the tests skip without it
    sizes = f"--window-size={size_xy[0]},{size_xy[1]}"
    command = [CHROMIUM, *FLAGS, sizes, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        given = folder / "DevToolsActivePort"
        end = monotonic() + within_s
        while not (given.exists() and given.read_text().strip()):
            assert process.poll() is None, "chromium ended at once"
            assert monotonic() < end, "chromium did not start"
            sleep(0.1)
        yield int(given.read_text().split()[0])
    finally:
        process.terminate()
        process.wait(20)


async def _picture(devtools: str, url: str, within_s: float) -> Page:
    from tornado.websocket import websocket_connect

    socket = await websocket_connect(devtools, max_message_size=1 << 27)
    numbers, requests = itertools.count(1), list[str]()

    async def order(method: str, session: str | None = None, **params: Any) -> Any:
        number = next(numbers)
        message = {"id": number, "method": method, "params": params}
        await socket.write_message(json.dumps(message | ({} if session is None else {"sessionId": session})))
        while True:
            reply = json.loads(str(await socket.read_message()))
            if reply.get("method") == "Network.requestWillBeSent":
                requests.append(reply["params"]["request"]["url"])
            if reply.get("method") == "Target.attachedToTarget":
                await attach(reply["params"]["sessionId"])
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    async def attach(session: str) -> None:
        """Hear of a worker's requests as well; answers are not waited for."""
        for method in ("Network.enable", "Runtime.runIfWaitingForDebugger"):
            await socket.write_message(
                json.dumps({"id": next(numbers), "method": method, "sessionId": session})
            )

    async def value(expression: str) -> Any:
        result = await order("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    await order("Network.enable")
    await order("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
    await order("Page.navigate", url=url)
    end, ready = monotonic() + within_s, 0
    while ready < 4:  # a layer that is about to appear is not yet waited for
        assert monotonic() < end, f"{url} was not drawn in time; asked for {requests}"
        await asyncio.sleep(0.25)
        drawn = "Boolean(window.viewer && viewer.layerManager.managedLayers.length && viewer.isReady())"
        ready = ready + 1 if await value(drawn) else 0
    png = base64.b64decode((await order("Page.captureScreenshot", format="png"))["data"])
    title = str(await value("document.title"))
    socket.close()
    with Image.open(BytesIO(png)) as image:
        return Page(np.asarray(image.convert("RGB")), png, tuple(requests), title)
