"""A server as a process of its own, on a tiny random pair with a chat template."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.demo_fixtures import write_pair

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
STARTS_S = 180.0
COMPILED = importlib.util.find_spec("llvmlite") is not None  # of servers, and of the library beside them


def write_chat_pair(root: Path) -> tuple[Path, Path]:
    """(target, draft): in fp32, context 512, no stop token."""
    pair = write_pair(root)
    for path in pair:
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        text = json.dumps({**settings, "chat_template": TEMPLATE})
        (path / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return pair


def flags_for(pair: tuple[Path, Path]) -> list[str]:
    """Of a server with this pair."""
    models = ["--target", str(pair[0]), "--draft", str(pair[1]), "--dtype", "fp32", "--served-model-name", "pair"]
    return [*models, "--compiled" if COMPILED else "--no-compiled"]


class ServerProcess:
    """`python -m models.server`, or another program that starts it, at a free port.

    Attributes:
        url: without a slash at the end. log: what it has written to stderr so far.
    """

    def __init__(
        self, *flags: str, env: dict[str, str] | None = None, program: tuple[str, ...] = ("-m", "models.server")
    ) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", prefix="server-", suffix=".log")  # noqa: SIM115
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, *program, "--port", "0", *flags],
            cwd=ROOT,
            env=environ,
            stderr=self._log,
            stdout=subprocess.DEVNULL,
        )
        self.began = time.monotonic()
        self.url = self._wait(lambda: (re.findall(r"http://(?:[\d.]+|\[[\da-f:]+\]):\d+", self.log) or [""])[0])

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def ready(self) -> "ServerProcess":
        """Wait until it takes requests."""
        self._wait(lambda: httpx.get(self.url + "/health").status_code == 200)
        return self

    @property
    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal: the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(timeout)

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    def _wait(self, done):
        while time.monotonic() - self.began < STARTS_S:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.log}")
            try:
                if found := done():
                    return found
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.log}")


def metrics_of(url: str) -> dict[str, float]:
    """The values of /metrics by name; labels but for the model's in braces."""
    found = {}
    for line in httpx.get(url + "/metrics").text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
            found[name] = float(value)
    return found


def until(condition, seconds: float = 10.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
