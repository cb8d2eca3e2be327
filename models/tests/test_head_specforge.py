"""A draft head's logits equal those of SpecForge 0.2.0, whose layout it reads.

`record_specforge_heads.py` wrote what SpecForge computes into `data/specforge_heads.safetensors`: from every position
of a text, a step on the target's states and 7 on the head's own.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models.llama.config import LlamaConfig
from models.llama.head_config import SPECFORGE, HeadConfig
from models.tests.llama_fixtures import tiny_config
from models.torch_llama.draft_head import TorchHead

DATA = Path(__file__).parent / "data" / "specforge_heads.safetensors"
with safe_open(DATA, framework="pt") as file:
    CONFIGS = json.loads(file.metadata()["configs"])

pytestmark = pytest.mark.usefixtures("one_thread")


def target_of(values) -> LlamaConfig:
    """A Llama that a recorded head could draft for: 8 layers."""
    width = values.get("target_hidden_size", values["hidden_size"])
    return tiny_config(vocab_size=values["vocab_size"], hidden_size=width, num_hidden_layers=8)


def load(name: str) -> tuple[TorchHead, dict[str, torch.Tensor]]:
    """A recorded head, and the tensors recorded with it."""
    with safe_open(DATA, framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - it is no mapping
        tensors = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in names}
    config = HeadConfig.from_dict(CONFIGS[name], target_of(CONFIGS[name]))
    assert config.layout == SPECFORGE
    return TorchHead(config, tensors, tensors["embed_tokens.weight"], dtype="fp32", max_seq_len=64), tensors


@pytest.fixture(params=list(CONFIGS))
def recorded(request):
    """(head, states [n, taps x H], tokens [n + 1], logits [steps, n, V_d])"""
    head, tensors = load(request.param)
    return head, tensors["text/states"], tensors["text/tokens"].tolist(), tensors["text/logits"]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_logits_on_the_targets_states(recorded):
    head, states, tokens, logits = recorded
    n = len(states)
    head.states(states, range(n), 0)
    close(head.forward(tokens[1:], 1), logits[0])
    head.states(states, range(n), 0)
    for position in range(1, n + 1):
        close(head.forward([tokens[position]], position)[0], logits[0, position - 1])


def test_seven_chained_steps_from_every_position(recorded):
    head, states, tokens, logits = recorded
    tokens += [0] * len(logits)  # what was fed past the end
    for last in range(1, len(states) + 1):
        head.states(states, range(last), 0)
        head.read(tokens[1 : last + 1], 1)
        for step in range(1, len(logits)):
            close(head.forward([tokens[last + step]], last + step)[0], logits[step, last - 1])


def test_drafted_ids_are_the_targets(recorded):
    head, states, tokens, logits = recorded
    head.states(states, range(len(states)), 0)
    best = logits[0].argmax(-1)
    expected = best if head.target_ids is None else head.target_ids[best]
    assert head.greedy(tokens[1:], 1) == expected.tolist()


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]["draft_vocab_size"] < 48])
def test_offsets_lead_to_the_ids_that_specforge_marks(name):
    head, tensors = load(name)
    assert tensors["d2t"].any() and torch.equal(head.target_ids, tensors["t2d"].nonzero()[:, 0])
