"""A headless Chromium for tests of pages, driven over the WebDriver protocol (W3C) by its own chromedriver.

It starts with an empty profile and asks for nothing but what a page makes it ask for; `Browser.requests` lists that.
"""

import base64
import json
import os
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
KEYS = {"Right": "\ue014", "Left": "\ue012", "Home": "\ue011", "End": "\ue010", "Tab": "\ue004", "Enter": "\ue007"}
KEYS |= {"Down": "\ue015", "Up": "\ue013"}
START_S = 60  # a cold start on a busy machine
ANSWER_S = 60

_CONTRASTS = """
const channel = (c) => ((c /= 255), c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const luminance = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(channel);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color;
  }
  return "rgb(255, 255, 255)";
};
const ratios = {};
for (const e of document.querySelectorAll("body *")) {
  const text = [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!text || e.closest("svg, script, button:disabled")) continue;
  const [bright, dark] = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort((x, y) => y - x);
  const name = `${e.tagName.toLowerCase()}.${e.className}`;
  ratios[name] = Math.min(ratios[name] ?? 99, (bright + 0.05) / (dark + 0.05));
}
return ratios;
"""


def start_browser() -> "Browser":
    """A new browser, to be closed. Skips the test where there is none, or fails it if REQUIRE_BROWSER is 1."""
    names = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))
    programs = [next(filter(None, map(shutil.which, each)), None) for each in names]
    if None in programs:
        missing = " and ".join(each[0] for each, found in zip(names, programs, strict=True) if found is None)
        reason = f"no {missing} found (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Browser(*programs)


class Browser:
    """One window. Methods raise RuntimeError with the driver's own words if it refuses."""

    def __init__(self, chromium: str, chromedriver: str) -> None:
        self._profile = tempfile.mkdtemp(prefix="browser-")
        self._driver = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE, text=True)
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._requests: list[str] = []
        self._session = ""
        try:
            self._base = f"http://127.0.0.1:{self._port()}/session"
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={self._profile}"]}
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            answer = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
            self._session = "/" + answer["sessionId"]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the browser and leave nothing behind."""
        try:
            if self._session:
                self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(ANSWER_S)
            self._driver.stdout.close()
            shutil.rmtree(self._profile, ignore_errors=True)

    # -------------------------------------------------------------------------------------------------- looking
    def open(self, path: Path) -> None:
        """Load a file; what was noted of the page before is forgotten."""
        self.console(), self.requests()
        self._requests.clear()
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page; ``arguments`` are its own."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def texts(self, selector: str) -> list[str]:
        """What a reader sees in each matching element, top to bottom; hidden ones have no text."""
        read = "(e) => (e.checkVisibility() ? e.innerText.trim() : '')"
        return self.run(f"return [...document.querySelectorAll(arguments[0])].map({read})", selector)

    def text(self, selector: str) -> str:
        """The same of the only one."""
        (text,) = self.texts(selector)
        return text

    def console(self) -> list[str]:
        """What the page has complained about since this was last asked."""
        return [f"{entry['level']} {entry['message']}" for entry in self._log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the page was opened, its own included."""
        for entry in self._log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"]["url"])
        return list(self._requests)

    def contrasts(self) -> dict[str, float]:
        """Contrast of text with what is behind it, by tag and class (WCAG: 4.5 and more is readable)."""
        return self.run(_CONTRASTS)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of the window only."""
        answer = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip() if whole else {})
        path.write_bytes(base64.b64decode(answer["data"]))

    def _clip(self) -> dict:
        size = self.run("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
        return {"clip": {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}}

    # ---------------------------------------------------------------------------------------------------- acting
    def press(self, *names: str) -> None:
        """Press keys (see KEYS) one after the other, in whatever has the focus."""
        keys = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})

    def click(self, selector: str) -> None:
        """A real click in the middle of the first matching element."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def resize(self, width: int, height: int = 900, *, phone: bool = False) -> None:
        """The size of the window in CSS pixels; a phone's viewport follows the page's own wish."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)

    def media(self, kind: str = "", scheme: str = "light") -> None:
        """Show the page as on another medium ("print") or in the dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=kind, features=features)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    # ---------------------------------------------------------------------------------------------------- driver
    def _port(self) -> str:
        """The port that the driver says it listens on. Its output is read to the end, so that it never blocks."""
        lines: queue.Queue[str] = queue.Queue()

        def read() -> None:
            for line in self._driver.stdout:
                lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()
        end = time.monotonic() + START_S
        said = ""
        while line := lines.get(timeout=max(end - time.monotonic(), 0.001)):
            said += line
            if match := re.search(r"started successfully on port (\d+)", line):
                return match[1]
        raise RuntimeError(f"chromedriver does not start: {said}")

    def _log(self, kind: str) -> list[dict]:
        return self._call("POST", "/se/log", {"type": kind})

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        request = urllib.request.Request(
            self._base + self._session + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
            method=method,
        )
        try:
            with self._open(request, timeout=ANSWER_S) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            told = json.load(error)["value"]
            raise RuntimeError(f"{method} {path}: {told['error']}: {told['message']}") from None
