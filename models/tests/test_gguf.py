"""GGUF checkpoints, written here as the converter of llama.cpp does, and read back."""

import json

import gguf
import numpy
import pytest
import torch
from tokenizers import Tokenizer

from models import LLM, UserError
from models.llama import gguf_checkpoint
from models.llama.config import RopeScaling
from models.llama.gguf_checkpoint import GgufCheckpoint, gguf_file
from models.llama.rope import inverse_frequencies
from models.llama.tokenizer import LlamaTokenizer
from models.loading import open_model
from models.tests.llama_fixtures import SPECIAL_TOKENS, random_tensors, tiny_config, write_tiny_tokenizer
from models.torch_llama.model import TorchLlama

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400, "bos_token_id": 0, "eos_token_ids": (1,)}
    return tiny_config(**{"rope_scaling": None, **sizes, **changes})


def pairs_side_by_side(weight, heads):
    """The rows of a query or key matrix as the converter leaves them."""
    rows, inner = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inner).swapaxes(1, 2).reshape(rows, inner)


def write(path, config, tensors, kind="F32", changes=None, extra=None, tokenizer_dir=None):
    """A GGUF file of a tiny Llama; changes: fields to set otherwise, None leaves one out. extra: more tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    fields = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "attention.key_length": config.head_dim,
    } | (changes or {})
    for name, value in fields.items():
        if value is not None:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("llama.rope.freq_base", config.rope_theta)
    if tokenizer_dir:
        add_tokenizer(writer, tokenizer_dir)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            values = pairs_side_by_side(values, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = pairs_side_by_side(values, config.num_key_value_heads)
        stored = kind if values.ndim == 2 else "F32"
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[stored])
        writer.add_tensor(gguf_name(name), data, raw_dtype=gguf.GGMLQuantizationType[stored])
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name):
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


def add_tokenizer(writer, folder, pre="gpt-2"):
    """Of a tiny tokenizer's files."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")


@pytest.fixture
def tokenizer_dir(tmp_path):
    return write_tiny_tokenizer(tmp_path / "tokenizer", 400)


# ------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weight_is_dequantised_and_in_hugging_faces_order(tmp_path, tokenizer_dir, kind):
    config = config_of()
    tensors = random_tensors(config, 0)
    file = write(tmp_path / "m.gguf", config, tensors, kind, tokenizer_dir=tokenizer_dir)
    opened = GgufCheckpoint.open(file)
    assert opened.names == tuple(config.tensor_shapes())
    for name, tensor in tensors.items():
        read = opened[name]
        assert read.shape == tensor.shape and read.dtype == torch.float32
        steps = {"F32": 0, "F16": 2**-10, "BF16": 2**-7, "Q8_0": 2**-6, "Q5_0": 2**-3, "Q5_1": 2**-3}.get(kind, 2**-2)
        assert (
            (read - tensor).abs().max() <= steps * tensor.abs().max() if tensor.ndim == 2 else torch.equal(read, tensor)
        )


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_from_a_file_computes_what_the_tensors_do(tmp_path, tokenizer_dir, tied):
    config = config_of(tie_word_embeddings=tied)
    tensors = random_tensors(config, 0)
    opened = open_model(str(write(tmp_path / "m.gguf", config, tensors, tokenizer_dir=tokenizer_dir)))
    assert opened.checkpoint.config.tie_word_embeddings == tied
    model = TorchLlama(opened.checkpoint.config, opened.checkpoint, dtype="fp32", max_seq_len=64)
    same = TorchLlama(config, tensors, dtype="fp32", max_seq_len=64)
    ids = list(range(5, 45))
    assert torch.allclose(model.forward(ids[:20], 0), same.forward(ids[:20], 0), atol=1e-5)


def test_weights_of_a_small_model_are_dequantised_once(tmp_path, tokenizer_dir, monkeypatch):
    config = config_of()
    file = write(tmp_path / "m.gguf", config, random_tensors(config, 0), "Q4_1", tokenizer_dir=tokenizer_dir)
    first = {name: tensor.clone() for name, tensor in GgufCheckpoint.open(file).items()}
    monkeypatch.setattr(GgufCheckpoint, "_dequantised", None)
    again = GgufCheckpoint.open(file)
    assert all(torch.equal(again[name], first[name]) for name in config.tensor_shapes())
    with pytest.raises(KeyError):
        again["lm_head.bias"]


def test_weights_are_dequantised_at_every_load_where_they_are_too_many_or_there_is_no_room(
    tmp_path, tokenizer_dir, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    config = config_of()
    texts = {}
    for name, patched in (("kept", {}), ("large", {"KEPT_BYTES": 10}), ("full", {"save_file": full})):
        file = write(tmp_path / f"{name}.gguf", config, random_tensors(config, 0), "Q4_1", tokenizer_dir=tokenizer_dir)
        with monkeypatch.context() as patch:
            for attribute, value in patched.items():
                patch.setattr(gguf_checkpoint, attribute, value)
            checkpoint = GgufCheckpoint.open(file)
        assert (checkpoint.path / "weights.safetensors").exists() == (name == "kept")
        texts[name] = {name: checkpoint[name] for name in checkpoint}
    for other in ("large", "full"):
        assert all(torch.equal(texts[other][name], texts["kept"][name]) for name in config.tensor_shapes())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_frequency_scaling_is_recognised_by_its_factors(tmp_path, tokenizer_dir, factor):
    scaling = RopeScaling(factor)
    config = config_of(rope_scaling=scaling, rope_theta=500000.0, head_dim=64, max_position_embeddings=131072)
    plain = inverse_frequencies(config_of(rope_theta=500000.0, head_dim=64))
    factors = (plain / inverse_frequencies(config)).numpy()
    tensors = random_tensors(config, 0)
    file = write(
        tmp_path / "m.gguf", config, tensors, extra={"rope_freqs.weight": factors}, tokenizer_dir=tokenizer_dir
    )
    assert GgufCheckpoint.open(file).config.rope_scaling == scaling
    other = write(
        tmp_path / "n.gguf", config, tensors, extra={"rope_freqs.weight": 2 * factors}, tokenizer_dir=tokenizer_dir
    )
    with pytest.raises(UserError, match="scales rotary frequencies otherwise"):
        GgufCheckpoint.open(other)


# ----------------------------------------------------------------------------------------------------- tokenizer
def test_the_tokenizer_of_a_file_writes_the_ids_of_its_original(tmp_path, tokenizer_dir):
    config = config_of()
    file = write(tmp_path / "m.gguf", config, random_tensors(config, 0), tokenizer_dir=tokenizer_dir)
    original = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    read = LlamaTokenizer.load(GgufCheckpoint.open(file).path)
    assert (read.bos_id, read.eos_ids, read.begins_with_bos) == (0, (1,), True)
    for text in ("def greet(name):\n    return 1", "Grüße 你好 🙂 it's 1234", "a<|eot_id|>b", ""):
        assert read.encode(text) == original.encode(text).ids
        assert read.decode(read.encode(text)) == original.decode(original.encode(text).ids)
    assert read.chat("hello") == read.encode("hello")


def test_a_file_and_a_directory_with_one_are_targets(tmp_path, tokenizer_dir):
    config = config_of()
    folder = tmp_path / "model"
    folder.mkdir()
    file = write(folder / "m.gguf", config, random_tensors(config, 0), tokenizer_dir=tokenizer_dir)
    assert gguf_file(str(file)) == gguf_file(str(folder)) == file
    with LLM.load(str(file), dtype="fp32", max_seq_len=64) as llm:
        expected = llm.generate("def greet", max_new_tokens=8).token_ids
    with LLM.load(str(folder), dtype="fp32", max_seq_len=64) as llm:
        assert llm.generate("def greet", max_new_tokens=8).token_ids == expected
        assert llm.target.opened.checkpoint.digest() == open_model(str(file)).checkpoint.digest()


# ------------------------------------------------------------------------------------------------------ mistakes
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, tokenizer_dir):
    config = config_of()
    tensors = random_tensors(config, 0)
    options = {"tokenizer_dir": tokenizer_dir}
    without = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}
    cases = {
        "lacks the tensor of model.layers.1.mlp.up_proj.weight": write(tmp_path / "a.gguf", config, without, **options),
        "says nothing of llama.block_count": write(
            tmp_path / "b.gguf", config, tensors, changes={"block_count": None}, **options
        ),
        "mixture of 8 experts": write(tmp_path / "c.gguf", config, tensors, changes={"expert_count": 8}, **options),
        "has shape": write(tmp_path / "d.gguf", config, tensors, changes={"feed_forward_length": 96}, **options),
        "has the tensor blk.0.attn_q.bias": write(
            tmp_path / "e.gguf", config, tensors, extra={"blk.0.attn_q.bias": numpy.zeros(64, numpy.float32)}, **options
        ),
        "has the tokenizer None": write(tmp_path / "f.gguf", config, tensors),
    }
    for name, content in {"g.gguf": b"GGUF" + bytes(40), "h.gguf": b"not one", "i.gguf": b""}.items():
        (tmp_path / name).write_bytes(content)
        cases[f"{name} is no readable GGUF file"] = tmp_path / name
    for words, file in cases.items():
        with pytest.raises(UserError) as error:
            open_model(str(file))
        assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
    writer = gguf.GGUFWriter(str(tmp_path / "z.gguf"), "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'falcon': only llama"):
        open_model(str(tmp_path / "z.gguf"))
    with pytest.raises(UserError, match="holds .* GGUF files"):
        open_model(str(tmp_path))
