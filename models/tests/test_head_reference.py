"""A draft head's logits equal those of an independent implementation, speculators 0.9.0, in both layouts.

`record_heads.py` wrote what it computes into `data/heads.safetensors`: from every position of a text, 8 unrolled steps
along the text.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models.llama.head_checkpoint import HeadCheckpoint, save_head
from models.llama.head_config import SPECFORGE, SPECULATORS, HeadConfig
from models.torch_llama.draft_head import TorchHead

DATA = Path(__file__).parent / "data" / "heads.safetensors"
with safe_open(DATA, framework="pt") as file:
    CONFIGS = json.loads(file.metadata()["configs"])

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded(name):
    with safe_open(DATA, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 - it is no mapping
        return {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}


@pytest.fixture(params=[(name, layout) for name in CONFIGS for layout in (SPECULATORS, SPECFORGE)], ids="-".join)
def case(request, tmp_path):
    """(head, states [n, taps x H], tokens [n + 1], logits [steps, n, V_d]), the head from files of the layout."""
    name, layout = request.param
    tensors = recorded(name)
    values = CONFIGS[name]
    if layout == SPECFORGE:
        layer = values["transformer_layer_config"]
        taps = {"eagle_aux_hidden_state_layer_ids": values["eagle_aux_hidden_state_layer_ids"]}
        own = {key: value for key, value in values.items() if key.startswith(("norm", "fc", "draft"))}
        values = {**layer, **own, "architectures": ["LlamaForCausalLMEagle3"], "eagle_config": taps}
        tensors = {key.replace("layers.0.", "midlayer."): tensor for key, tensor in tensors.items()}
    config = HeadConfig.from_dict(values)
    assert config.layout == layout
    save_head(tmp_path, config, tensors)
    head = TorchHead(
        config, HeadCheckpoint.open(tmp_path), tensors["embed_tokens.weight"].float(), dtype="fp32", max_seq_len=64
    )
    return head, tensors["text/states"], tensors["text/tokens"].tolist(), tensors["text/logits"]


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_rows_of_a_text_in_one_pass_and_one_by_one(case):
    head, states, tokens, logits = case
    n = len(states)
    head.states(states, range(n), 0)
    close(head.forward(tokens[1:], 1), logits[0])
    head.states(states, range(n), 0)
    for position in range(1, n + 1):
        close(head.forward(tokens[position : position + 1], position)[0], logits[0, position - 1])
    head.states(states, range(n), 0)
    close(head.read(tokens[1:], 1), logits[0, -1])


@pytest.mark.parametrize("last", [1, 5, 6])
def test_seven_steps_on_the_heads_own_states(case, last):
    """From the row of position `last` on, along the text; theirs is unrolled from all positions at once."""
    head, states, tokens, logits = case
    steps = len(logits)
    head.states(states, range(last), 0)
    close(head.forward(tokens[1 : last + 1], 1), logits[0, :last])
    for step in range(1, steps):
        close(head.forward([tokens[last + step]], last + step)[0], logits[step, last - 1])


def test_a_chain_of_greedy_ids_is_mapped_to_the_targets(case):
    head, states, tokens, logits = case
    head.states(states, range(3), 0)
    first = int(logits[0, 2].argmax())
    expected = first if head.target_ids is None else int(head.target_ids[first])
    assert head.draft_greedy(tokens[1:4], 1, 2)[0] == expected


def test_the_fixture_covers_every_option():
    switches = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    for name in switches:
        assert {values[name] for values in CONFIGS.values()} == {False, True}
    sizes = {values["draft_vocab_size"] for values in CONFIGS.values()}
    assert len(sizes) == 2
