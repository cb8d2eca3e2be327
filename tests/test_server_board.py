"""The server on ttnn's mock of a board, from end to end."""

import json
import shutil

import openai
import pytest

pytest.importorskip("fastapi", reason="the extra server is not installed")
from models import LLM
from models.board_mock import cluster
from models.options import NAMED
from tests.server_fixtures import TEMPLATE, ServerProcess, metrics_of, until

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
TOKENS = 8

pytestmark = pytest.mark.skipif(
    not cluster.is_installed(), reason="ttnn is not installed: its wheels are for CPython 3.12 and 3.10 on x86-64 Linux"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The small target, with a chat template."""
    folder = tmp_path_factory.mktemp("board") / "target"
    shutil.copytree(NAMED["tiny"][0], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**settings, "chat_template": TEMPLATE})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return str(folder)


def test_a_streamed_chat_is_the_librarys_text(target):
    draft = str(NAMED["tiny"][1])
    with LLM.load(target, draft, dtype="bf16", max_seq_len=128) as llm:
        expected = llm.chat(MESSAGES, max_new_tokens=TOKENS)
    flags = ["--device", "tt", "--no-weight-cache", "--precision", "bf16", "--max-seq-len", "128", "--audit-every", "1"]
    program = ("-m", "models.board_mock", "N150", "-m", "models.server")
    server = ServerProcess("--target", target, "--draft", draft, *flags, program=program, env={"MESH_DEVICE": ""})
    try:
        server.ready()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id
            stream = client.chat.completions.create(
                model=model,
                messages=MESSAGES,
                temperature=0,
                max_tokens=TOKENS,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected.text and chunks[-1].usage.completion_tokens == TOKENS
        assert chunks[-1].usage.completion_tokens_details.accepted_prediction_tokens > 0
        until(lambda: metrics_of(server.url)['speculative_audited_texts_total{verdict="identical"}'] == 1, 60)
        assert server.stop() == 0, server.log
    finally:
        server.close()
