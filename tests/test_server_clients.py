"""The server as its users meet it: OpenAI's client, httpx and curl, on a real process."""

import json
import math
import re
import subprocess

import httpx
import openai
import pytest

from models import SamplingParams
from tests.server_fixtures import metrics_of

MESSAGES = [{"role": "user", "content": "add two numbers"}]
PROMPT = "def add(self, value):"
FIXED = {"speculation": {"drafter": "model", "num_draft_tokens": 3}}  # what auto chooses depends on times


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server, path, **body):
    return httpx.post(server.url + path, json=body, timeout=60)


def events(response_text):
    lines = [line for line in response_text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


# ------------------------------------------------------------------------------------------------------- same text
def test_chat_is_what_the_library_writes(client, alone):
    answer = client.chat.completions.create(model="pair", messages=MESSAGES, temperature=0, max_tokens=40)
    expected = alone.chat(MESSAGES, max_new_tokens=40)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 40
    assert answer.usage.prompt_tokens == len(alone.encode(MESSAGES))


def test_streamed_chat_is_the_same_text_in_pieces(client, alone):
    stream = client.chat.completions.create(
        model="pair",
        messages=MESSAGES,
        temperature=0,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == alone.chat(MESSAGES, max_new_tokens=40).text
    assert len([piece for piece in pieces if piece]) > 1  # tokens that come within 20 ms share one
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion_of_text_ids_and_several_prompts(client, alone):
    ids = alone.encode(PROMPT)
    expected = alone.generate(PROMPT, max_new_tokens=16).text
    for prompt in (PROMPT, ids, [PROMPT], [ids]):
        assert client.completions.create(model="pair", prompt=prompt, temperature=0).choices[0].text == expected
    several = client.completions.create(model="pair", prompt=[PROMPT, "return"], temperature=0, n=2, max_tokens=8)
    texts = [alone.generate(prompt, max_new_tokens=8).text for prompt in (PROMPT, PROMPT, "return", "return")]
    assert [choice.text for choice in several.choices] == texts
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == len(ids) + len(alone.encode("return"))


@pytest.mark.parametrize("speculation", [{"speculation": "off"}, FIXED])
def test_sampled_text_is_the_librarys_of_the_same_seed(client, alone, speculation):
    answer = client.completions.create(
        model="pair", prompt=PROMPT, temperature=0.8, top_p=0.9, seed=5, max_tokens=24, extra_body=speculation
    )
    drafting = speculation["speculation"] != "off" and alone.drafting("model", 3)
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
    assert answer.choices[0].text == alone.generate(PROMPT, sampling, max_new_tokens=24, speculate=drafting).text


def test_choices_have_seeds_of_their_own_and_no_seed_is_another_text_each_time(client):
    request = {"model": "pair", "prompt": PROMPT, "temperature": 1.0, "max_tokens": 24, "extra_body": FIXED}
    first = client.completions.create(**request, n=3, seed=7)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.text for choice in client.completions.create(**request, n=3, seed=7).choices] == texts
    assert client.completions.create(**request, seed=9).choices[0].text == texts[2]
    assert len({client.completions.create(**request).choices[0].text for _ in range(3)}) == 3


def test_top_k_one_is_greedy(client, alone):
    answer = client.completions.create(model="pair", prompt=PROMPT, max_tokens=16, extra_body={"top_k": 1, **FIXED})
    assert answer.choices[0].text == alone.generate(PROMPT, max_new_tokens=16).text


# ------------------------------------------------------------------------------------------------------ where it ends
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client, alone, stream):
    whole = alone.generate(PROMPT, max_new_tokens=40).text
    stop = whole[17:20]
    expected = whole[: whole.index(stop)]
    answer = client.completions.create(
        model="pair", prompt=PROMPT, temperature=0, max_tokens=40, stop=["never", stop], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == "stop"


def test_a_stop_token_ends_the_text(server, alone):
    written = alone.generate(PROMPT, max_new_tokens=40)
    stop = written.token_ids[9]
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "stop_token_ids": [stop]}
    answer = post(server, "/v1/completions", **body).json()
    assert answer["usage"]["completion_tokens"] == written.token_ids.index(stop) + 1
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(server, alone):
    answer = post(server, "/v1/chat/completions", messages=MESSAGES, temperature=0).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == alone.max_seq_len
    huge = post(server, "/v1/chat/completions", messages=MESSAGES, temperature=0, max_tokens=10**15).json()
    assert huge["choices"][0]["message"] == answer["choices"][0]["message"]


# ------------------------------------------------------------------------------------------------- log-probabilities
def test_log_probabilities_are_the_targets_own(client, alone):
    import torch

    answer = client.completions.create(model="pair", prompt=PROMPT, temperature=0, max_tokens=12, logprobs=3)
    found = answer.choices[0].logprobs
    prompt, ids = alone.encode(PROMPT), alone.generate(PROMPT, max_new_tokens=12).token_ids
    with torch.inference_mode():
        model = alone.target.model
        logits = [model.prefill([*prompt, *ids[:i]]) for i in range(12)]
    expected = [logit.float().log_softmax(-1) for logit in logits]
    for i, id in enumerate(ids):
        assert math.isclose(found.token_logprobs[i], float(expected[i][id]), abs_tol=1e-4)
        top = expected[i].topk(3).values.tolist()
        assert sorted(found.top_logprobs[i].values(), reverse=True) == pytest.approx(top, abs=1e-4)
        assert found.tokens[i] in found.top_logprobs[i]  # greedy: the chosen one is the likeliest
    assert len(found.text_offset) == 12


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_log_probabilities_are_those_of_plain_decoding(client, temperature):
    request = {"model": "pair", "messages": MESSAGES, "temperature": temperature, "seed": 3, "max_tokens": 30}
    bodies = [{"speculation": "off"}, FIXED, {"speculation": {"drafter": "prompt-lookup", "num_draft_tokens": 4}}]
    contents = []
    for body in bodies:
        answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=2, extra_body=body)
        contents.append(answer.choices[0].logprobs.content)
    assert all(len(content) == 30 for content in contents)
    for content in contents[1:] if temperature == 0 else []:  # sampled, other drafts are other texts
        assert [each.bytes for each in content] == [each.bytes for each in contents[0]]
        found, expected = ([each.logprob for each in one] for one in (content, contents[0]))
        assert found == pytest.approx(expected, abs=1e-4)
    for content in contents:
        assert all(each.logprob <= 1e-6 and len(each.top_logprobs) == 2 for each in content)
        assert all(each.top_logprobs[0].logprob >= each.logprob - 1e-4 for each in content)


# ------------------------------------------------------------------------------------------------------ speculation
def test_what_was_drafted_is_told(server):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, **FIXED}
    before = metrics_of(server.url)
    answer = post(server, "/v1/completions", **body).json()
    spoken, timings = answer["speculation"], answer["timings"]
    details = answer["usage"]["completion_tokens_details"]
    assert (spoken["drafter"], spoken["num_draft_tokens"], spoken["state"]) == ("model", 3, "on")
    assert spoken["rounds"] >= spoken["rounds_that_drafted"] > 0
    assert timings["draft_n"] == sum(details.values()) and details["accepted_prediction_tokens"] > 0
    assert timings["predicted_n"] == 40 and timings["predicted_per_second"] > 0 and timings["prompt_ms"] > 0
    after = metrics_of(server.url)

    def grown(name):
        return after[name] - before[name]

    assert grown("vllm:spec_decode_num_draft_tokens_total") == timings["draft_n"]
    assert grown("vllm:spec_decode_num_accepted_tokens_total") == timings["draft_n_accepted"]
    assert grown("vllm:spec_decode_num_drafts_total") == spoken["rounds_that_drafted"]
    position = 'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="%d"}'
    by_position = [after.get(position % i, 0) - before.get(position % i, 0) for i in range(3)]
    assert sum(by_position) == timings["draft_n_accepted"] and by_position == sorted(by_position, reverse=True)
    assert grown("vllm:generation_tokens_total") == 40
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    ended = 'vllm:request_success_total{finished_reason="length"}'
    assert after[ended] - before.get(ended, 0) == 1


def test_every_tokens_origin_on_request(server):
    speculation = {"drafter": "model", "num_draft_tokens": 3, "origins": True}
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "speculation": speculation}
    whole = post(server, "/v1/completions", **body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(post(server, "/v1/completions", **body, **options).text)
    told = [each for chunk in chunks if chunk["choices"] for each in chunk["choices"][0].get("origins", [])]
    assert told == whole["choices"][0]["origins"] and len(told) == 40
    assert "".join(each["text"] for each in told) == whole["choices"][0]["text"]
    for chunk in chunks[:-1]:
        assert "".join(each["text"] for each in chunk["choices"][0]["origins"]) == chunk["choices"][0]["text"]
    origins = [each["origin"] for each in told]
    assert origins[0] == "prefill" and set(origins) <= {"prefill", "plain", "drafted", "corrected", "bonus"}
    accepted = chunks[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert origins.count("drafted") == accepted > 0
    assert chunks[-2]["timings"]["draft_n_accepted"] == chunks[-1]["timings"]["draft_n_accepted"]


@pytest.mark.parametrize(
    ("speculation", "expected"),
    [
        ("off", ("none", 0, "off")),
        ("on", ("combined", 4, "on")),
        ({"drafter": "off"}, ("none", 0, "off")),
        ({"drafter": "none"}, ("none", 0, "off")),
        ({"num_draft_tokens": 0}, ("none", 0, "off")),
        ({"drafter": "auto", "num_draft_tokens": 2}, ("combined", 2, "on")),
        ({"drafter": "prompt-lookup", "num_draft_tokens": 5}, ("prompt-lookup", 5, "on")),
        ({"drafter": "tree", "num_draft_tokens": 2}, ("tree", 2, "on")),
    ],
)
def test_a_request_chooses_its_drafting_and_the_text_stays(server, alone, speculation, expected):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20, "speculation": speculation}
    answer = post(server, "/v1/completions", **body).json()
    spoken = answer["speculation"]
    assert (spoken["drafter"], spoken["num_draft_tokens"], spoken["state"]) == expected
    assert answer["choices"][0]["text"] == alone.generate(PROMPT, max_new_tokens=20, speculate=False).text


def test_drafting_that_does_not_pay_is_told(server):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 60, "speculation": "auto"}
    spoken = post(server, "/v1/completions", **body).json()["speculation"]
    assert spoken["num_draft_tokens"] == "auto" and spoken["state"] in ("on", "switched-off")


# ------------------------------------------------------------------------------------------------------ the others
def test_models_are_listed(client):
    (card,) = client.models.list().data
    assert card.id == "pair" and card.max_model_len == 512 and card.chat
    assert card.speculation["default"] == "combined"
    assert {"model", "prompt-lookup", "combined", "tree"} <= set(card.speculation["drafters"])
    assert client.models.retrieve("pair") == card


def test_tokens_and_back(server, alone):
    ids = alone.encode("añb <eos>")
    answer = post(server, "/tokenize", model="pair", prompt="añb <eos>", return_token_strs=True).json()
    assert answer["tokens"] == ids and answer["count"] == len(ids) and len(answer["token_strs"]) == len(ids)
    assert post(server, "/tokenize", prompt="añb", add_special_tokens=False).json()["tokens"] == alone.encode("añb")[1:]
    assert post(server, "/tokenize", messages=MESSAGES).json()["tokens"] == alone.encode(MESSAGES)
    assert post(server, "/detokenize", tokens=ids).json() == {"prompt": "añb "}


def test_parts_and_developers_are_a_plain_conversation(server, alone):
    parts = [{"type": "text", "text": "add "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add two"}]
    assert post(server, "/tokenize", messages=messages).json()["tokens"] == alone.encode(plain)


def test_an_answer_may_be_sent_back_as_it_came(client, alone):
    """What everybody does who has more than one question."""
    request = {"model": "pair", "temperature": 0, "max_tokens": 12}
    first = client.chat.completions.create(**request, messages=MESSAGES).choices[0].message
    turns = [first, first.model_dump(), {**first.model_dump(), "tool_calls": [], "name": None}]
    said = [*MESSAGES, {"role": "assistant", "content": first.content}, *MESSAGES]
    expected = alone.chat(said, max_new_tokens=12).text
    for turn in turns:
        answer = client.chat.completions.create(**request, messages=[*MESSAGES, turn, *MESSAGES])
        assert answer.choices[0].message.content == expected
    called = {**first.model_dump(), "tool_calls": [{"id": "1", "type": "function", "function": {}}]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request, messages=[*MESSAGES, called, *MESSAGES])
    assert caught.value.param == "messages[1].tool_calls"


def test_head_is_get_without_a_body(server):
    for path in ("/", "/health", "/metrics", "/v1/models"):
        answer = httpx.head(server.url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_fields_that_change_nothing_are_taken(server):
    neutral = {"presence_penalty": 0, "logit_bias": {}, "tools": None, "response_format": {"type": "text"}, "user": "a"}
    assert post(server, "/v1/completions", prompt=PROMPT, max_tokens=1, **neutral).status_code == 200


def test_the_clients_errors(client):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="'tools' is not supported") as caught:
        client.chat.completions.create(model="pair", messages=MESSAGES, tools=[{"type": "function"}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="pair", prompt="a", temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="the context 512") as caught:
        client.completions.create(model="pair", prompt=[5] * 600)
    assert caught.value.code == "context_length_exceeded"


def test_curl(server):
    def curl(*arguments):
        done = subprocess.run(["curl", "-sS", "-i", *arguments], capture_output=True, text=True, timeout=60, check=True)
        head, _, body = done.stdout.partition("\n\n")
        return head, body

    head, body = curl(server.url + "/health")
    assert head.startswith("HTTP/1.1 200") and json.loads(body) == {"status": "ok"}
    data = json.dumps({"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "stream": True})
    address = server.url + "/v1/completions"
    head, body = curl("-N", address, "-H", "Content-Type: application/json", "-d", data)
    assert "text/event-stream" in head and re.search(r"^data: \[DONE\]$", body, re.MULTILINE)
    head, body = curl(address, "-d", data)
    assert "400" in head.splitlines()[0] and "Content-Type: application/json" in json.loads(body)["error"]["message"]


def test_other_sites_scripts_are_not_let_in(server):
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(server.url + "/v1/completions", headers=asked)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
