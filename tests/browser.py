"""A headless Chromium for tests of pages, driven by selenium with the installed chromedriver; nothing is downloaded.

It starts with an empty profile and asks for nothing but what a page makes it ask for; `Browser.requests` lists that.
"""

import base64
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)

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
    missing = [each[0] for each, found in zip(names, programs, strict=True) if found is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        missing.append("selenium")
    if missing:
        reason = f"no {' and '.join(missing)} found (Debian: apt-get install chromium chromium-driver; pip: selenium)"
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Browser(*programs)


class Browser:
    """One window. Methods raise selenium's WebDriverException, with the driver's own words, if it refuses."""

    def __init__(self, chromium: str, chromedriver: str) -> None:
        from selenium.webdriver import Chrome, ChromeOptions, ChromeService

        self._profile = tempfile.mkdtemp(prefix="browser-")
        options = ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={self._profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._requests: list[str] = []
        self._bodies: list[Any] = []
        try:
            # Both programs are named, so that selenium looks for none, let alone fetches one. The driver is on this
            # machine, where no proxy has to be asked.
            with mock.patch.dict(os.environ, {"no_proxy": "localhost", "SE_OFFLINE": "true"}):
                self._driver = Chrome(options=options, service=ChromeService(executable_path=chromedriver))
        except BaseException:
            shutil.rmtree(self._profile, ignore_errors=True)
            raise

    def close(self) -> None:
        """End the browser and leave nothing behind."""
        try:
            self._driver.quit()
        finally:
            shutil.rmtree(self._profile, ignore_errors=True)

    # -------------------------------------------------------------------------------------------------- looking
    def open(self, page: Path | str) -> None:
        """Load a file, or an address; what was noted of the page before is forgotten."""
        self._driver.get("about:blank")  # ends the page before, Chromium's own start page included
        self.console(), self.requests()
        self._requests.clear(), self._bodies.clear()
        self._driver.get(page if isinstance(page, str) else page.resolve().as_uri())

    def reload(self) -> None:
        """Load the page again."""
        self._driver.refresh()

    def until(self, condition: str, seconds: float = 20) -> Any:
        """Wait until an expression in the page is true, and return its value. Raises selenium's TimeoutException."""
        self._driver.set_script_timeout(seconds)
        return self._driver.execute_async_script(
            "const tell = arguments[0], look = () => { const seen = (() => (" + condition + "))();"
            "seen ? tell(seen) : setTimeout(look, 10); }; look();"
        )

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of an async function returns in the page; ``arguments`` are its own."""
        if "await " in script:
            script = f"return (async function () {{ {script} }}).apply(null, arguments)"
        return self._driver.execute_script(script, *arguments)

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
        return [f"{entry['level']} {entry['message']}" for entry in self._driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the page was opened, its own included."""
        for entry in self._driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                request = message["params"]["request"]
                self._requests.append(request["url"])
                if body := request.get("postData"):
                    self._bodies.append(json.loads(body))
        return list(self._requests)

    def bodies(self) -> list[Any]:
        """The JSON that was sent since the page was opened, in order."""
        self.requests()
        return list(self._bodies)

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
    def type(self, selector: str, text: str) -> None:
        """Real keys into the first matching element, after what is there."""
        self._driver.find_element("css selector", selector).send_keys(text)

    def press(self, *names: str) -> None:
        """Press keys, named as in selenium's Keys ("TAB"), one after the other, in whatever has the focus."""
        from selenium.webdriver import ActionChains, Keys

        ActionChains(self._driver).send_keys(*(getattr(Keys, name) for name in names)).perform()

    def keys_down(self, held: str, name: str) -> None:
        """Press a key while another one is held."""
        from selenium.webdriver import ActionChains, Keys

        key = getattr(Keys, held)
        ActionChains(self._driver).key_down(key).send_keys(getattr(Keys, name)).key_up(key).perform()

    def offline(self, wanted: bool) -> None:
        """Cut the page off from every server, or no longer."""
        limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.devtools("Network.emulateNetworkConditions", offline=wanted, **limits)

    def before_pages(self, script: str) -> Callable[[], None]:
        """Run a script in every page before its own, until what is returned is called."""
        name = self.devtools("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
        return lambda: self.devtools("Page.removeScriptToEvaluateOnNewDocument", identifier=name)

    def click(self, selector: str) -> None:
        """A real click in the middle of the first matching element."""
        self._driver.find_element("css selector", selector).click()

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
        return self._driver.execute_cdp_cmd(command, parameters)
