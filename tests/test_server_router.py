"""Two servers behind vLLM's router: one address, and one of them may die."""

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.server_fixtures import ServerProcess, flags_for, metrics_of, until

ROUTER = Path(sys.executable).parent / "vllm-router"

pytestmark = pytest.mark.skipif(
    not (ROUTER.exists() or shutil.which("vllm-router")), reason="vllm-router is not installed"
)
STREAMS = 6
RUNNING = "vllm:num_requests_running"


@pytest.fixture
def replica(chat_pair):
    running = ServerProcess(*flags_for(chat_pair), "--slots", "4")
    try:
        yield running.ready()
    finally:
        running.close()


@pytest.fixture
def router(server, replica, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(ROUTER) if ROUTER.exists() else "vllm-router", "--port", str(port), "--policy", "round_robin"]
    command += ["--worker-urls", server.url, replica.url, "--cb-failure-threshold", "1"]
    with (tmp_path / "router.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def healthy():
        try:
            return httpx.get(url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(healthy, 30)
        yield url
    finally:
        process.terminate()
        process.wait(20)


async def stream(http, i):
    """Whether a long stream came to its end."""
    body = {"model": "pair", "prompt": f"{i} def", "max_tokens": 450, "stream": True, "speculation": "off"}
    try:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            return "data: [DONE]" in [line async for line in response.aiter_lines()]
    except httpx.TransportError:
        return False


def test_a_server_that_dies_takes_its_own_requests_along_and_no_others(server, replica, router, alone):
    for i in range(4):
        prompt = f"{i} return self"
        body = {"model": "pair", "prompt": prompt, "max_tokens": 6, "temperature": 0}
        body["speculation"] = {"drafter": "model"}
        answer = httpx.post(router + "/v1/completions", json=body, timeout=30).json()
        assert answer["choices"][0]["text"] == alone.generate(prompt, max_new_tokens=6).text
        assert answer["speculation"]["drafter"] == "model"

    async def load():
        async with httpx.AsyncClient(base_url=router, timeout=60) as http:
            tasks = [asyncio.create_task(stream(http, i)) for i in range(STREAMS)]
            end = time.monotonic() + 20
            while sum(metrics_of(url)[RUNNING] for url in (server.url, replica.url)) < STREAMS:
                assert time.monotonic() < end and not any(task.done() for task in tasks)
                await asyncio.sleep(0.02)
            doomed = metrics_of(replica.url)[RUNNING]
            replica.process.kill()
            new = [stream(http, f"new {i}") for i in range(3)]
            return doomed, await asyncio.gather(*tasks), await asyncio.gather(*new)

    doomed, finished, new = asyncio.run(load())
    assert 0 < doomed < STREAMS
    assert finished.count(False) == doomed
    assert all(new)
    began = time.monotonic()
    body = {"model": "pair", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    for _ in range(4):
        assert httpx.post(router + "/v1/chat/completions", json=body, timeout=30).status_code == 200
    assert time.monotonic() - began < 20
    assert json.loads(httpx.get(router + "/v1/models").text)["data"][0]["id"] == "pair"
