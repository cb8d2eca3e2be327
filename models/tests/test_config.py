"""LlamaConfig: the published numbers, both generations of config.json, and everything it must refuse."""

import copy
import dataclasses
import json
import time
import tracemalloc

import pytest
import torch
import transformers

from models.errors import UserError
from models.llama.config import NAMED_SIZES, LlamaConfig, RopeScaling, named_config
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config

# meta-llama's Llama-3.2-1B-Instruct config.json: as transformers 4 writes it.
TRANSFORMERS_4 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
CONFIGS = {
    **NAMED_SIZES,
    "unscaled": tiny_config(rope_scaling=None, dtype="float16"),
    "no-special-ids": tiny_config(bos_token_id=None, eos_token_ids=()),
    "wide-heads": tiny_config(head_dim=32, tie_word_embeddings=True),
}


def hf_config(config: LlamaConfig) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**config.to_dict())


@pytest.mark.parametrize("name, parameters", [("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248)])
def test_named_sizes_have_the_published_parameter_counts(name, parameters):
    assert named_config(name).parameter_count == parameters


def test_named_sizes_have_the_published_values():
    def row(name):
        c = NAMED_SIZES[name]
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        return (
            c.hidden_size,
            c.num_hidden_layers,
            heads,
            c.intermediate_size,
            c.rope_scaling.factor,
            c.tie_word_embeddings,
        )

    assert row("llama-3.2-1b") == (2048, 16, (32, 8, 64), 8192, 32.0, True)
    assert row("llama-3.2-3b") == (3072, 28, (24, 8, 128), 8192, 32.0, True)
    assert row("llama-3.1-8b") == (4096, 32, (32, 8, 128), 14336, 8.0, False)
    for config in NAMED_SIZES.values():
        assert config.vocab_size == 128256 and config.max_position_embeddings == 131072
        assert config.rope_theta == 500000.0 and config.rms_norm_eps == 1e-5
        assert config.rope_scaling == RopeScaling(config.rope_scaling.factor, 1.0, 4.0, 8192)
        assert config.bos_token_id == 128000 and config.eos_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(
    "name, key", [("1B", "llama-3.2-1b"), (" Llama-3.2-3B ", "llama-3.2-3b"), ("8b", "llama-3.1-8b")]
)
def test_named_config_accepts_short_names_in_any_case(name, key):
    assert named_config(name) is NAMED_SIZES[key]


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'70b'.*llama-3\.2-1b, llama-3\.2-3b, llama-3\.1-8b"):
        named_config("70b")


def test_a_transformers_4_file_reads_to_the_published_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS_4))
    assert LlamaConfig.from_json(tmp_path / "config.json") == NAMED_SIZES["llama-3.2-1b"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_saved_by_transformers_5_reads_back(tmp_path, name):
    config = CONFIGS[name]
    saved = (
        transformers.LlamaConfig.from_dict(copy.deepcopy(TRANSFORMERS_4))
        if name == "llama-3.2-1b"
        else hf_config(config)
    )
    saved.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written  # it is the new style that is tested
    assert LlamaConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("name", CONFIGS)
def test_to_dict_means_the_same_to_transformers(name):
    config = CONFIGS[name]
    hf = hf_config(config)
    for field in dataclasses.fields(config):
        if field.name not in ("rope_theta", "rope_scaling", "eos_token_ids", "dtype"):
            assert getattr(hf, field.name) == getattr(config, field.name), field.name
    scaling = {"rope_type": "default"} if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling)
    assert hf.rope_parameters == {"rope_type": "llama3", **scaling, "rope_theta": config.rope_theta}
    assert hf.dtype == getattr(torch, config.dtype)
    eos = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    assert tuple(id for id in eos if id is not None) == config.eos_token_ids


@pytest.mark.parametrize("name", CONFIGS)
def test_to_dict_reads_back_through_json_in_either_style(name):
    config = CONFIGS[name]
    written = json.loads(json.dumps(config.to_dict()))
    assert LlamaConfig.from_dict(written) == config
    old = {key: value for key, value in written.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in written.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    assert LlamaConfig.from_dict(old) == config and LlamaConfig.from_dict(new) == config


def test_absent_optional_keys_take_transformers_defaults():
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config, hf = LlamaConfig.from_dict({"model_type": "llama", **sizes}), transformers.LlamaConfig(**sizes)
    assert (config.head_dim, config.num_key_value_heads) == (hf.head_dim, hf.num_key_value_heads) == (8, 4)
    assert config.rope_theta == hf.rope_parameters["rope_theta"] and config.rms_norm_eps == hf.rms_norm_eps
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.dtype) == (None, (), "float32")


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_shapes_are_those_of_the_hugging_face_model(tied):
    config = tiny_config(tie_word_embeddings=tied, head_dim=32, num_hidden_layers=3)
    model = hf_model(config, random_tensors(config, seed=0))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        del shapes["lm_head.weight"]
    assert config.tensor_shapes() == shapes
    assert config.parameter_count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": TRANSFORMERS_4["rope_scaling"] | {"factor": 0.5}}, "rope factor 0.5 is below 1"),
        ({"rope_scaling": TRANSFORMERS_4["rope_scaling"] | {"low_freq_factor": 4}}, "low_freq_factor 4 is not below"),
        ({"rope_scaling": "llama3"}, "rope parameters are 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": [128001, 128256]}, r"128256 is not in the vocabulary 0\.\.128255"),
        ({"bos_token_id": -1}, r"-1 is not in the vocabulary"),
    ],
)
def test_what_is_no_llama_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        LlamaConfig.from_dict({**TRANSFORMERS_4, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize(
    "value, shown",
    [
        (0, "0"),
        (0.0, "0.0"),
        (-0.0, "-0.0"),
        (-10000.0, "-10000.0"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-float("inf"), "-inf"),
        (1e300, r"1e\+300"),
        (1e-300, "1e-300"),
        (10**400, r"about 10\^400"),
        (-(10**400), r"-about 10\^400"),
        (True, "True"),
        (None, "None"),
        ("1e-5", "'1e-5'"),
    ],
)
def test_numbers_that_float32_cannot_use_are_refused_in_one_line(name, value, shown):
    with pytest.raises(UserError, match=f"^{name} is {shown}: it must be") as caught:
        LlamaConfig.from_dict({**TRANSFORMERS_4, name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_numbers_inside_the_rope_parameters_are_checked_too(style):
    values = {key: value for key, value in TRANSFORMERS_4.items() if key not in ("rope_theta", "rope_scaling")}
    for changes, message in [
        ({"rope_theta": 0}, "rope_theta is 0:"),
        ({"rope_theta": 10**400}, "rope_theta is about"),
        ({"rope_theta": 1e4, "factor": 10**400}, "rope factor is about"),
        ({"rope_theta": 1e4, "factor": float("nan")}, "rope factor is nan"),
        ({"rope_theta": 1e4, "original_max_position_embeddings": 10**12}, "no Llama has more than"),
    ]:
        with pytest.raises(UserError, match=message):
            LlamaConfig.from_dict({**values, style: {**TRANSFORMERS_4["rope_scaling"], **changes}})


@pytest.mark.parametrize("written", ["1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 400, "1" + "0" * 5000])
@pytest.mark.parametrize("name", ["rope_theta", "num_hidden_layers"])
def test_absurd_numbers_as_a_file_spells_them_are_refused(tmp_path, name, written):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TRANSFORMERS_4, name: "@"}).replace('"@"', written))
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value, shown", [(10**10, "10000000000"), (10**400, r"about 10\^400")])
def test_absurd_sizes_are_refused_at_once(name, value, shown):
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(UserError, match=rf"^{name} is {shown}: no Llama has more than \d+"):
        LlamaConfig.from_dict({**TRANSFORMERS_4, name: value})
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 2**20


def test_a_billion_layers_are_refused():
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000: no Llama has more than 4096"):
        tiny_config(num_hidden_layers=10**9)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (None, "cannot read"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        LlamaConfig.from_json(path)
    assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)


def test_a_refused_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TRANSFORMERS_4, "model_type": "gemma"}))
    with pytest.raises(UserError) as caught:
        LlamaConfig.from_json(path)
    assert str(caught.value).startswith(f"{path}: model_type is 'gemma'")
