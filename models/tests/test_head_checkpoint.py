"""Draft heads in files: both layouts, and what is wrong with one said in a line when it is opened."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.errors import UserError
from models.llama.config import named_config
from models.llama.head_checkpoint import EMBEDDING, HeadCheckpoint, save_head
from models.llama.head_config import HeadConfig, default_taps, is_head, layout_of
from models.loading import OpenedHead, OpenedModel, open_draft, open_model
from models.tests.head_fixtures import head_config, random_head_tensors
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint

TARGET = tiny_config(num_hidden_layers=6)
SPECFORGE, SPECULATORS = "specforge", "speculators"


def written(path, config=None, tensors=None):
    config = config or head_config(TARGET, 60)
    save_head(path, config, tensors or random_head_tensors(config, 0))
    return path


def refused(path, said, target=TARGET):
    with pytest.raises(UserError) as caught:
        HeadCheckpoint.open(path, target)
    message = str(caught.value)
    assert re.search(said, message), message
    assert "\n" not in message


# ----------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize("layout", [SPECFORGE, SPECULATORS])
@pytest.mark.parametrize("switches", [{}, {"fc_norm": True}, {"norm_before_fc": True, "norm_before_residual": True}])
def test_a_configuration_is_read_as_it_was_written(layout, switches):
    config = head_config(TARGET, 60, layout=layout, norm_output=True, **switches)
    values = json.loads(json.dumps(config.to_dict()))
    assert layout_of(values) == layout
    assert HeadConfig.from_dict(values) == config


def test_the_published_head_of_8b_has_the_published_size_and_its_own_rope():
    """As the reference's config.json says it: no rope, no taps, no head_dim."""
    values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 128256,
        "draft_vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "float16",
    }
    head = HeadConfig.from_dict(values, named_config("8b"))
    assert head.parameter_count == 424_689_664
    assert (head.taps, head.layer.rope_theta, head.layer.rope_scaling) == ((2, 16, 29), 10000.0, None)
    head.check_target(named_config("8b"))
    for size, taps in (("3b", (2, 14, 25)), ("1b", (2, 8, 13))):
        assert default_taps(named_config(size).num_hidden_layers) == taps
    with pytest.raises(UserError, match="give the head's target"):
        HeadConfig.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draft_vocab_size": 4000}, "draft_vocab_size 4000 is more than the target's vocabulary 128"),
        ({"draft_vocab_size": "many"}, "draft_vocab_size is 'many'"),
        ({"num_hidden_layers": 2}, "a draft head has one layer"),
        ({"fc_norm": True, "norm_before_fc": True}, "are both true"),
        ({"norm_output": 1}, "norm_output is 1: it must be true or false"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 1]}}, r"\[3, 1\]: give layers once"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}}, "must name layers of the target"),
        ({"eagle_config": 7}, "eagle_config is 7, not an object"),
        ({"architectures": ["LlamaForCausalLM"]}, "not an EAGLE-3 head"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_cannot_be_a_head_is_refused(changes, said):
    values = head_config(TARGET, 60).to_dict() | changes
    with pytest.raises(UserError, match=said):
        HeadConfig.from_dict(values, TARGET)


# ------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("layout", [SPECFORGE, SPECULATORS])
@pytest.mark.parametrize("vocabulary", [60, None])
def test_tensors_are_read_as_they_were_written(tmp_path, layout, vocabulary):
    config = head_config(TARGET, vocabulary, layout=layout)
    tensors = random_head_tensors(config, 3)
    opened = HeadCheckpoint.open(written(tmp_path / "head", config, tensors), TARGET)
    assert opened.config == config and set(opened) == set(config.tensor_shapes())
    assert all(torch.equal(opened[name], tensor) for name, tensor in tensors.items())
    if vocabulary:
        assert torch.equal(opened.target_ids, torch.arange(60) + tensors["d2t"])
    else:
        assert opened.target_ids is None


def test_a_digest_tells_two_trainings_of_one_shape_apart(tmp_path):
    config = head_config(TARGET, 60)
    paths = [written(tmp_path / str(seed), config, random_head_tensors(config, seed)) for seed in (0, 0, 1)]
    digests = [HeadCheckpoint.open(path).digest() for path in paths]
    assert digests[0] == digests[1] != digests[2]


def change(path, **changes):
    """Tensors set otherwise; None takes one away."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    return path


def test_harmless_tensors_are_left_out_and_an_embedding_of_its_own_is_used(tmp_path):
    path = written(tmp_path / "head")
    ids = HeadCheckpoint.open(path).target_ids
    t2d = torch.zeros(TARGET.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    embedding = torch.randn(TARGET.vocab_size, TARGET.hidden_size)
    copies = {"verifier_norm.weight": torch.ones(3), "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    opened = HeadCheckpoint.open(change(path, t2d=t2d, **{EMBEDDING: embedding}, **copies), TARGET)
    assert torch.equal(opened[EMBEDDING], embedding)
    assert "verifier_norm.weight" not in opened


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fc.weight": None}, "lacks the tensor fc.weight"),
        ({"norm.weight": torch.ones(3)}, r"norm.weight in .* has shape \[3\], config.json says \[64\]"),
        ({"norm.weight": torch.ones(64, dtype=torch.int8)}, "stored as I8: it must be bf16, fp16 or fp32"),
        ({"midlayer.self_attn.q_proj.bias": torch.ones(64)}, "holds the tensor midlayer.self_attn.q_proj.bias"),
        ({"d2t": torch.zeros(60)}, "d2t in .* is stored as F32: it must be integers"),
        ({"d2t": torch.full((60,), 100)}, "leads to ids 100 to 159, the target's vocabulary is 128"),
        ({"d2t": torch.tensor([1, *[0] * 59])}, "leads to one id twice"),
        ({"t2d": torch.ones(128, dtype=torch.bool)}, "t2d in .* contradicts d2t"),
        ({"model.fc.weight": torch.ones(2)}, "as NeMo does"),
    ],
)
def test_what_is_wrong_with_tensors_is_said_in_a_line(tmp_path, changes, said):
    refused(change(written(tmp_path / "head"), **changes), said)


def test_a_pickled_head_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch):
    path = written(tmp_path / "head")
    tensors = load_file(path / "model.safetensors")
    torch.save(tensors, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        HeadCheckpoint.open(path)
    assert "pickle can run code" in str(caught.value)
    command = re.search(r'python -c "(.*)"$', str(caught.value))[1]
    monkeypatch.chdir(path)
    exec(command)  # what a user would run there
    assert torch.equal(HeadCheckpoint.open(path)["fc.weight"], tensors["fc.weight"])


def test_a_head_of_another_target_is_refused_with_both_values(tmp_path):
    path = written(tmp_path / "head")
    for changes, said in (
        ({"vocab_size": 130}, "vocabulary 128, this one has 130"),
        ({"hidden_size": 32}, "hidden size 64, this one has 32"),
        ({"num_hidden_layers": 4}, "after layer 6, this one has 4"),
    ):
        refused(path, said, dataclasses.replace(TARGET, **changes))
    narrow = head_config(TARGET, 60, target_hidden_size=32)
    refused(
        written(tmp_path / "narrow", narrow),
        "lacks the tensor embed_tokens",
        dataclasses.replace(TARGET, hidden_size=32),
    )


def test_a_directory_says_whether_it_is_a_head(tmp_path):
    head, model = written(tmp_path / "head"), write_tiny_checkpoint(tmp_path / "model", TARGET)
    assert is_head(head) and not is_head(model) and not is_head(tmp_path / "nothing")
    target = open_model(str(model))
    assert isinstance(open_draft(str(head), target), OpenedHead)
    assert isinstance(open_draft(str(model), target), OpenedModel)
    refused(tmp_path / "nothing", "no such directory")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = head_config(TARGET)
    with pytest.raises(UserError, match="cannot write"):
        save_head(tmp_path / "file" / "head", config, random_head_tensors(config, 0))
