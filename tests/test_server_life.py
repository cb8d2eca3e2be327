"""How a server begins and ends, what it lets in, and what it refuses while it is busy."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from tests.server_fixtures import ROOT, ServerProcess, flags_for, metrics_of, until

KEY = "s3cret-key"
LONG = {"prompt": "def", "max_tokens": 400, "temperature": 0, "speculation": "off"}


@pytest.fixture(scope="module")
def small(chat_pair):
    """Two slots, one place to wait, a key, and another page that is let in."""
    flags = ["--slots", "2", "--queue", "1", "--drain-seconds", "0.15", "--cors-origin", "http://localhost:3000"]
    running = ServerProcess(*flags_for(chat_pair), *flags, env={"SPECULATIVE_API_KEY": KEY})
    loading = httpx.get(running.url + "/health")
    refused = httpx.post(running.url + "/v1/completions", json=LONG, headers={"Authorization": f"Bearer {KEY}"})
    try:
        yield running.ready(), loading, refused
    finally:
        running.close()


@pytest.fixture
def http(small):
    with httpx.Client(base_url=small[0].url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


def test_while_it_loads_it_says_so(small):
    _, loading, refused = small
    assert (loading.status_code, loading.json()) == (503, {"status": "loading"})
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
    assert int(refused.headers["Retry-After"]) > 0


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, "Bearer \xff"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nowhere", "/tokenize"])
def test_a_wrong_key_is_refused(small, header, path):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = httpx.get(small[0].url + path, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_right_key_is_let_in_and_health_needs_none(small, http):
    assert http.get("/v1/models").status_code == 200
    assert http.get("/v1/models", headers={"Authorization": f"bearer  {KEY}"}).status_code == 200
    assert httpx.get(small[0].url + "/health").status_code == 200
    assert httpx.get(small[0].url + "/metrics").status_code == 200
    with (
        openai.OpenAI(base_url=small[0].url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_the_key_is_in_no_log(small):
    assert KEY not in small[0].log


def test_a_page_that_was_named_is_let_in(http):
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/completions", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    other = http.options("/v1/completions", headers={**asked, "Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_says_when_to_come_back(small, http):
    def write():
        http.post("/v1/completions", json=LONG)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: metrics_of(small[0].url)["vllm:num_requests_waiting"] == 1)
    answer = http.post("/v1/completions", json=LONG)
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    with (
        openai.OpenAI(base_url=small[0].url + "/v1", api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="pair", prompt="a")
    for thread in threads:
        thread.join()
    assert http.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200
    answer = http.post("/v1/completions", json=LONG | {"n": 4})
    assert answer.status_code == 400 and "at most 3" in answer.json()["error"]["message"]


def test_sigterm_finishes_what_is_under_way_within_a_bound_and_takes_nothing_new(small):
    """The last one on this server, which has ended after it."""
    server = small[0]
    headers = {"Authorization": f"Bearer {KEY}"}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    # As many tokens as the context holds, each with its likeliest ones: more than the bound has time for.
    short, long = LONG | options | {"max_tokens": 5}, LONG | options | {"max_tokens": 500, "logprobs": 5}

    def begun(body):
        return httpx.stream("POST", server.url + "/v1/completions", json=body, headers=headers, timeout=60)

    with begun(long) as to_be_cut, begun(short) as to_be_finished:
        lines, finished = to_be_cut.iter_lines(), to_be_finished.iter_lines()
        next(lines), next(finished)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(httpx.TransportError):
            while True:
                assert httpx.get(server.url + "/health").status_code == 503 or time.monotonic() - began < 1
        finished = [line for line in finished if line]
        cut = [line for line in lines if line]
    assert finished[-1] == "data: [DONE]"
    assert json.loads(finished[-2][6:])["usage"]["completion_tokens"] == 5
    assert json.loads(cut[-1][6:])["error"]["code"] == "draining"
    assert server.process.wait(20) == 0 and time.monotonic() - began < 10


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = ["--target", "tiny", "--port", str(taken.getsockname()[1])]
        command = [sys.executable, "-m", "models.server", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--port" in done.stderr and "in use" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.count("127.0.0.1") == 1


def test_it_listens_at_an_ipv6_address(chat_pair):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    running = ServerProcess(*flags_for(chat_pair), "--host", "::1")
    try:
        assert running.ready().url.startswith("http://[::1]:")
        with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client:
            assert client.models.list().data[0].id == "pair"
    finally:
        running.close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "/nowhere"], "/nowhere"),
        (["--target", "tiny", "--drafter", "magic"], "--drafter"),
        (["--target", "tiny", "--port", "99999"], "--port"),
        (["--target", "tiny", "--host", "203.0.113.1"], "--host"),
        (["--target", "tiny", "--host", "no.such.host.invalid"], "--host"),
        (["--target", "tiny", "--api-key", "two words"], "--api-key"),
        (["--target", "tiny", "--cors-origin", "evil"], "--cors-origin"),
    ],
)
def test_a_wrong_command_line_is_one_line(flags, words):
    done = subprocess.run(
        [sys.executable, "-m", "models.server", "--port", "0", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr
