"""What the server costs beside the engine, and what many clients gain: one request in turn with the same one in this
process, then several at once.

    python scripts/measure_server.py --target tiny --repeats 9 --json server.json

The server is a process of its own on the same machine; while one side writes the other is idle. Times are the client's:
to the first token, and from the first token to the last. Flags of models and drafting are those of scripts/serve.sh.
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from models.cli.arguments import add_drafting_arguments, add_model_arguments, integer
from models.cli.command import Parser, run_command
from models.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def __init__(self):\n"
STARTS_S = 600


class Timed(NamedTuple):
    """Seconds to the first token, tokens a second after it, and how many there were."""

    first_s: float
    tok_s: float
    tokens: int


class Served:
    """A server process at a free port, with this command line's flags."""

    def __init__(self, flags: list[str], slots: int) -> None:
        command = [sys.executable, "-m", "models.server", "--port", "0", "--slots", str(slots), *flags]
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "http://" in line:
                self.host, self.port = line.partition("http://")[2].partition("/")[0].split(":")
                break
        else:
            raise UserError("the server did not start: scripts/serve.sh with the same flags says why")
        self._log = threading.Thread(target=self._process.stderr.read, daemon=True)  # so that it can go on writing
        self._log.start()
        end = time.monotonic() + STARTS_S
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise UserError("the server did not load: scripts/serve.sh with the same flags says why")
            time.sleep(0.1)

    def write(self, body: dict) -> Timed:
        """One streamed request, timed as its client sees it."""
        connection = http.client.HTTPConnection(self.host, int(self.port))
        connection.connect()
        data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}})
        began = time.perf_counter()
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"the server refused: {response.read().decode()}")
        first = last = began
        tokens, pending = 0, b""
        while piece := response.read1(65536):
            now = time.perf_counter()
            pending += piece
            *lines, pending = pending.split(b"\n\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk["choices"]:
                    first = now if first == began else first
                    last = now
                else:
                    tokens = chunk["usage"]["completion_tokens"]
        connection.close()
        return Timed(first - began, (tokens - 1) / (last - first), tokens)

    def write_many(self, body: dict, count: int) -> float:
        """Tokens a second of so many clients together."""
        results: list[Timed] = []
        threads = [threading.Thread(target=lambda: results.append(self.write(body))) for _ in range(count)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(each.tokens for each in results) / (time.perf_counter() - began)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.host, int(self.port))
        connection.request("GET", "/health")
        return connection.getresponse().status == 200


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=integer(1), default=9, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--tokens", type=integer(2), default=128, metavar="N", help="of a text (default: %(default)s)")
    parser.add_argument("--clients", type=integer(2), default=8, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    add_model_arguments(parser, os.environ)
    add_drafting_arguments(parser)
    return parser


def command() -> int:
    """Measure, print, and return the exit code."""
    options, own = build_parser().parse_args(), ("--repeats", "--tokens", "--clients", "--json")
    flags, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word.partition("=")[0] not in own:
            flags.append(word)
        skip = word in own
    from models.cli.environment import machine, versions, write_json
    from models.llm import LLM
    from models.loading import open_pair
    from models.server.settings import parse_settings

    settings = parse_settings([*flags, "--slots", str(options.clients)], os.environ)
    with LLM(open_pair(settings.engine)) as llm:
        flags += ["--target", settings.engine.target]  # the engine's, whatever the server's default is
        served = Served(flags, options.clients)
        try:
            results = measure(served, llm, options)
        finally:
            served.close()
    show(results, options)
    if options.json:
        about = {"machine": machine(settings.device), "versions": versions(), "command": sys.argv}
        write_json(options.json, {**about, "tokens": options.tokens, "clients": options.clients, "results": results})
    return 0


def measure(served: Served, llm, options) -> dict[str, dict[str, float]]:
    """By kind of drafting: medians of both sides, and rates of one client and of several."""
    from models.options import DRAFT_TOKENS

    results = {}
    for name in ("off", "on") if llm.options.drafts else ("off",):
        body = {"prompt": PROMPT, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
        body["speculation"] = "off" if name == "off" else {"num_draft_tokens": min(4, llm.options.longest_draft)}
        drafting = False if name == "off" else llm.drafting(None, min(DRAFT_TOKENS, llm.options.longest_draft))
        pairs = []
        for repeat in range(options.repeats + 1):  # the first is a warm-up
            turn = [lambda body=body: served.write(body), lambda who=drafting: alone(llm, who, options.tokens)]
            found = [call() for call in (turn if repeat % 2 else turn[::-1])]
            pairs.append(found if repeat % 2 else found[::-1])
        pairs = pairs[1:]
        rates = [(served.write_many(body, 1), served.write_many(body, options.clients)) for _ in range(3)]
        results[name] = {
            "server_tok_s": statistics.median(ours.tok_s for ours, _ in pairs),
            "engine_tok_s": statistics.median(engine.tok_s for _, engine in pairs),
            "tok_s_ratio": statistics.median(ours.tok_s / engine.tok_s for ours, engine in pairs),
            "server_ttft_ms": 1000 * statistics.median(ours.first_s for ours, _ in pairs),
            "engine_ttft_ms": 1000 * statistics.median(engine.first_s for _, engine in pairs),
            "one_client_tok_s": statistics.median(one for one, _ in rates),
            "many_clients_tok_s": statistics.median(many for _, many in rates),
        }
    return results


def alone(llm, drafting, tokens: int) -> Timed:
    """The same text in this process."""
    began = time.perf_counter()
    first = last = began
    count = 0
    for _ in llm.stream(PROMPT, max_new_tokens=tokens, stop_ids=(), speculate=drafting):
        last = time.perf_counter()
        first = last if not count else first
        count += 1
    return Timed(first - began, (count - 1) / (last - first), count)


def show(results: dict[str, dict[str, float]], options) -> None:
    """A line for each kind of drafting."""
    for name, each in results.items():
        print(
            f"drafting {name}: one client {each['server_tok_s']:.1f} tok/s, the engine {each['engine_tok_s']:.1f} "
            f"(ratio {each['tok_s_ratio']:.3f}); first token {each['server_ttft_ms']:.1f} ms, the engine's "
            f"{each['engine_ttft_ms']:.1f}; {options.clients} clients {each['many_clients_tok_s']:.1f} tok/s, "
            f"{each['many_clients_tok_s'] / each['one_client_tok_s']:.2f}x one's"
        )


if __name__ == "__main__":
    sys.exit(run_command(command))
