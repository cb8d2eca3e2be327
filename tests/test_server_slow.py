"""Clients that begin something and wait: they are waited for a bounded time, and cost the others nothing."""

import json
import socket
import time

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from tests.server_fixtures import ServerProcess, flags_for

# A server that waits a second where others wait for half a minute, or a whole one.
IMPATIENT = """
import dataclasses
import sys
from models.cli.command import run_command
from models.server import connections, running

connections.HEAD_S, connections.UNREAD_S, connections.LOOK_S = 1.0, 1.0, 0.1
parse = running.parse_settings
running.parse_settings = lambda *args, **options: dataclasses.replace(parse(*args, **options), body_timeout_s=1.0)
sys.exit(run_command(running.command))
"""
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
ENDS_S = 20.0  # a second, and what a busy machine adds


@pytest.fixture(scope="module")
def impatient(chat_pair, tmp_path_factory):
    program = tmp_path_factory.mktemp("impatient") / "serve.py"
    program.write_text(IMPATIENT)
    running = ServerProcess(*flags_for(chat_pair), program=(str(program),), env={"PYTHONPATH": "."})
    try:
        yield running.ready()
    finally:
        running.close()


@pytest.fixture
def connection(impatient):
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.socket() as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.settimeout(ENDS_S)
        connected.connect((host, int(port)))
        yield connected
    assert httpx.get(impatient.url + "/health").json() == {"status": "ok"}
    answer = httpx.post(impatient.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60)
    assert answer.status_code == 200


def rest(connection):
    """All that comes until the server hangs up."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        pass
    return found


@pytest.mark.parametrize("begun", [b"", b"P", b"POST /v1/comp", HEAD, HEAD + b"X: "])
def test_half_a_head_is_waited_for_a_bounded_time(connection, begun):
    connection.sendall(begun)
    assert rest(connection) == b""


def test_a_head_that_comes_letter_by_letter_is_not_waited_for_longer(connection):
    began = time.monotonic()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while time.monotonic() - began < ENDS_S:
            connection.sendall(b"X")
            time.sleep(0.05)


def test_half_a_body_is_answered_and_the_connection_closed(connection):
    connection.sendall(HEAD + b'Content-Length: 500\r\n\r\n{"prompt"')
    answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]


def test_half_a_second_request_is_waited_for_no_longer(connection):
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /health HTT")
    assert b"HTTP" not in rest(connection)


def test_a_body_that_nobody_asked_for_is_not_waited_for(connection):
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
    answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1


def test_an_answer_that_is_not_read_is_given_up(connection):
    """Many times what a socket's buffers hold."""
    body = json.dumps({"prompt": "add self " * 300_000, "return_token_strs": True}).encode()
    head = HEAD.replace(b"/v1/completions", b"/tokenize") + b"Content-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head + body)
    answer = connection.recv(4096)
    length = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    time.sleep(4)
    assert len(answer + rest(connection)) < length


def test_a_stream_goes_on_for_a_client_that_reads_slowly(impatient, connection):
    body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": True, "speculation": {"origins": True}}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
    found = b""
    while piece := connection.recv(1000):
        found += piece
        time.sleep(0.02)
    assert b"data: [DONE]" in found
