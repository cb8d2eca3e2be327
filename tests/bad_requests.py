"""Bodies that are no requests: (path, content) by what is wrong with them, each answered by 400.

One list for `test_server_hostile.py`, which sends them, and for `record_refusals.py`, which writes the answers down.
"""

import json

JSON = {"Content-Type": "application/json"}
DEEP = "[" * 100_000
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def body(path=TEXT, **fields):
    base = {"messages": HELLO, "max_tokens": 1} if path == CHAT else {"prompt": "a", "max_tokens": 1}
    return path, json.dumps(base | fields)


BAD_REQUESTS = {
    "nothing": (TEXT, ""),
    "no JSON": (TEXT, "hello"),
    "half of it": (TEXT, '{"prompt": "a'),
    "null": (TEXT, "null"),
    "a list": (TEXT, "[]"),
    "a number": (TEXT, "7"),
    "a text": (TEXT, '"prompt"'),
    "an empty object": (TEXT, "{}"),
    "not UTF-8": (TEXT, b'{"prompt": "\xff\xfe"}'),
    "a lone surrogate": (TEXT, '{"prompt": "\\ud800"}'),
    "a lone surrogate as a name": (TEXT, '{"prompt": "a", "\\ud800": 1}'),
    "deep lists": (TEXT, DEEP),
    "deep lists in a field": (TEXT, '{"prompt": ' + DEEP + "}"),
    "deep objects": (TEXT, '{"a":' * 100_000),
    "NaN": (TEXT, '{"prompt": "a", "temperature": NaN}'),
    "infinity": (TEXT, '{"prompt": "a", "top_p": Infinity}'),
    "a float beyond all": (TEXT, '{"prompt": "a", "temperature": 1e999}'),
    "an int beyond all": (TEXT, '{"prompt": "a", "seed": ' + "9" * 5000 + "}"),
    "a seed too large": body(seed=10**30),
    "a prompt of null": body(prompt=None),
    "a prompt of nothing": body(prompt=[]),
    "a prompt of an object": body(prompt={"a": 1}),
    "a prompt of floats": body(prompt=[1.5, 2.5]),
    "a prompt of negative ids": body(prompt=[-1]),
    "a prompt of ids beyond the vocabulary": body(prompt=[10**6]),
    "a prompt of ids and texts": body(prompt=[1, "a"]),
    "a prompt too long": body(prompt="word " * 5000),
    "too many prompts": body(prompt=["a"] * 1000),
    "too many choices": body(n=1000),
    "too many choices in all": body(prompt=["a"] * 8, n=8),
    "no choices": body(n=0),
    "true choices": body(n=True),
    "choices as a text": body(n="2"),
    "no tokens": body(max_tokens=0),
    "negative tokens": body(max_tokens=-5),
    "half a token": body(max_tokens=1.5),
    "hot": body(temperature=99),
    "cold": body(temperature=-1),
    "nearly greedy": body(temperature=1e-9),
    "temperature as a text": body(temperature="1"),
    "no mass": body(top_p=0),
    "too much mass": body(top_p=1.5),
    "negative top_k": body(top_k=-2),
    "an empty stop string": body(stop=""),
    "an empty stop string among others": body(stop=["a", ""]),
    "a stop string too long": body(stop="a" * 10_000),
    "too many stop strings": body(stop=["a"] * 100),
    "stop as a number": body(stop=5),
    "too many log-probabilities": body(logprobs=100),
    "log-probabilities as a text": body(CHAT, logprobs="yes"),
    "top log-probabilities alone": body(CHAT, top_logprobs=2),
    "a stream as a text": body(stream="yes"),
    "stream options without a stream": body(stream_options={"include_usage": True}),
    "unknown stream options": body(stream=True, stream_options={"a": 1}),
    "an unknown drafter": body(speculation={"drafter": "magic"}),
    "a drafter as a number": body(speculation={"drafter": 1}),
    "speculation unknown": body(speculation="maybe"),
    "a draft too long": body(speculation={"drafter": "model", "num_draft_tokens": 1000}),
    "a negative draft": body(speculation={"drafter": "model", "num_draft_tokens": -1}),
    "echo": body(echo=True),
    "best_of": body(best_of=3),
    "a bias": body(logit_bias={"5": 1}),
    "a penalty": body(CHAT, presence_penalty=0.5),
    "a tool": body(CHAT, tools=[{"type": "function", "function": {"name": "f"}}]),
    "a format": body(CHAT, response_format={"type": "json_object"}),
    "an unknown field": body(CHAT, magic=1),
    "no messages": body(CHAT, messages=[]),
    "messages as a text": body(CHAT, messages="hello"),
    "a message without a role": body(CHAT, messages=[{"content": "a"}]),
    "an unknown role": body(CHAT, messages=[{"role": "king", "content": "a"}]),
    "a message of null": body(CHAT, messages=[{"role": "user", "content": None}]),
    "an image": body(CHAT, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    "two limits": body(CHAT, max_tokens=2, max_completion_tokens=3),
    "a message with a name": body(CHAT, messages=[{"role": "user", "content": "a", "name": "b"}]),
    "ids beyond the vocabulary": ("/detokenize", '{"tokens": [99999999]}'),
    "ids as texts": ("/detokenize", '{"tokens": ["a"]}'),
    "nothing to tokenize": ("/tokenize", "{}"),
    "too much to tokenize": ("/tokenize", json.dumps({"prompt": "a", "messages": HELLO})),
}
