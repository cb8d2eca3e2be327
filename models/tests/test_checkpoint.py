"""Checkpoint: what is read equals what was stored, and each way a directory can be wrong has its own message."""

import json
import math
import os
import resource
import shutil
import struct
import time
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from models.errors import UserError
from models.llama import shards
from models.llama.checkpoint import Checkpoint, CheckpointWriter, save_checkpoint
from models.llama.config import named_config
from models.llama.shards import INDEX, SINGLE
from models.tests.llama_fixtures import hf_model, random_tensors, tiny_config, write_tiny_checkpoint

NORM = "model.norm.weight"


@pytest.fixture
def single(tmp_path) -> Path:
    return write_tiny_checkpoint(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path) -> Path:
    config = tiny_config()
    save_checkpoint(tmp_path / "sharded", config, random_tensors(config, seed=0), shard_bytes=100_000)
    return tmp_path / "sharded"


def open_fails(path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def assert_equal(checkpoint: Checkpoint, tensors: dict) -> None:
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        loaded = checkpoint.tensor(name)
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name


# ------------------------------------------------------------------------------------------- reading and writing
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_what_was_saved_is_read_back(tmp_path, tied, dtype, shard_bytes):
    config = tiny_config(tie_word_embeddings=tied, dtype=dtype)
    tensors = random_tensors(config, seed=1)
    save_checkpoint(tmp_path / "x", config, tensors, shard_bytes=shard_bytes)
    checkpoint = Checkpoint.open(tmp_path / "x")
    assert checkpoint.config == config and checkpoint.path == tmp_path / "x"
    assert_equal(checkpoint, tensors)
    assert (
        len(list((tmp_path / "x").glob("*.safetensors"))) == 1
        if shard_bytes == 10**9
        else (tmp_path / "x" / INDEX).exists()
    )
    assert os.listdir(tmp_path) == ["x"]  # nothing temporary stays


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_reads_what_transformers_saves(tmp_path, tied, shard_size):
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config, seed=2)
    hf_model(config, tensors).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "100KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == config
    assert_equal(checkpoint, tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_reads_what_is_saved(tmp_path, tied, shard_bytes):
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config, seed=3)
    save_checkpoint(tmp_path / "x", config, tensors, shard_bytes=shard_bytes)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, hf_model(config, tensors)(ids).logits)


def test_no_shard_is_larger_than_asked_for(sharded):
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in sharded.glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) <= 100_000
    assert json.loads((sharded / INDEX).read_text())["metadata"]["total_size"] == sum(sizes)


def test_a_checkpoint_is_a_mapping_of_exactly_the_models_tensors(single):
    edit_tensors(single / SINGLE, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    checkpoint = Checkpoint.open(single)
    assert list(checkpoint) == list(checkpoint.names) == list(tiny_config().tensor_shapes())
    assert len(checkpoint) == 21 and NORM in checkpoint
    assert torch.equal(dict(checkpoint)[NORM], checkpoint.tensor(NORM))
    with pytest.raises(KeyError):
        checkpoint.tensor("model.layers.0.self_attn.rotary_emb.inv_freq")


def test_a_tied_output_matrix_is_the_embedding_even_if_the_file_has_another(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "x", tiny_config(tie_word_embeddings=True))
    edit_tensors(path / SINGLE, lambda t: t.update({"lm_head.weight": torch.zeros(128, 64)}))
    checkpoint = Checkpoint.open(path)
    assert "lm_head.weight" not in checkpoint.names
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("model.embed_tokens.weight"))


def test_tensors_that_are_views_of_one_storage_can_be_saved(tmp_path):
    config = tiny_config()
    tensors = random_tensors(config, seed=0)
    fused = torch.cat([tensors[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")])
    tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"] = fused.chunk(2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_checkpoint(tmp_path / "x", config, tensors)
    assert_equal(Checkpoint.open(tmp_path / "x"), tensors)


def test_stop_ids_of_generation_config_win(single):
    assert Checkpoint.open(single).config.eos_token_ids == (1,)
    (single / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert Checkpoint.open(single).config.eos_token_ids == (5, 7)
    (single / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Checkpoint.open(single).config.eos_token_ids == (1,)
    (single / "generation_config.json").write_text('{"eos_token_id": 999}')
    assert "generation_config.json: special token id 999" in open_fails(single)
    (single / "generation_config.json").write_text("{")
    assert "generation_config.json is not valid JSON" in open_fails(single)


def test_dtype_is_that_of_the_weights_not_of_the_config(single):
    edit_json(single / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    assert Checkpoint.open(single).config.dtype == "float32"


def test_digest_knows_the_content_and_not_the_place(tmp_path, single, sharded):
    digest = Checkpoint.open(single).digest()
    assert len(digest) == 16 and digest == Checkpoint.open(single).digest()
    assert digest == Checkpoint.open(shutil.copytree(single, tmp_path / "elsewhere")).digest()
    assert digest == Checkpoint.open(write_tiny_checkpoint(tmp_path / "same-seed")).digest()
    others = [
        Checkpoint.open(write_tiny_checkpoint(tmp_path / "other-seed", seed=1)).digest(),
        Checkpoint.open(write_tiny_checkpoint(tmp_path / "other-theta", tiny_config(rope_theta=5e5))).digest(),
        Checkpoint.open(sharded).digest(),
    ]
    edit_tensors(single / SINGLE, lambda t: t[NORM].add_(1))  # one small tensor of the same shape
    others.append(Checkpoint.open(single).digest())
    assert len({digest, *others}) == 5


# ------------------------------------------------------------------------------------------- writing that fails
def test_an_existing_directory_is_not_overwritten(single):
    before = sorted(os.listdir(single))
    with pytest.raises(UserError, match="exists: remove it or choose another"):
        write_tiny_checkpoint(single)
    assert sorted(os.listdir(single)) == before
    with pytest.raises(UserError, match="exists"):
        write_tiny_checkpoint(single / SINGLE)


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(write_tiny_checkpoint(tmp_path / "empty")).names


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    config = tiny_config()
    with pytest.raises(error), CheckpointWriter(tmp_path / "x", config, shard_bytes=1000) as writer:
        for name, tensor in list(random_tensors(config, seed=0).items())[:5]:
            writer.add(name, tensor)
        raise error
    assert os.listdir(tmp_path) == []


def test_a_write_without_all_tensors_or_with_wrong_ones_fails(tmp_path):
    config = tiny_config()
    with pytest.raises(KeyError, match=NORM):
        save_checkpoint(tmp_path / "x", config, {k: v for k, v in random_tensors(config, 0).items() if k != NORM})
    with pytest.raises(ValueError, match=NORM), CheckpointWriter(tmp_path / "x", config) as writer:
        writer.add(NORM, torch.ones(3))
    with pytest.raises(ValueError, match="never added.*norm"), CheckpointWriter(tmp_path / "x", config) as writer:
        writer.add(NORM, torch.ones(64))
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_created_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        write_tiny_checkpoint(tmp_path / "file" / "x")


# ------------------------------------------------------------------------------------------- where it is
@pytest.mark.parametrize("path", ["/no/where", "./no", "../no", "~/no-such-dir", "a/b/c", "plain-name", ".", ""])
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("went to the hub"))
    message = open_fails(path)
    if path == ".":
        assert "has no config.json" in message
    else:
        assert message.startswith(f"no such directory: {path or repr(path)} ")


def test_home_is_expanded(single, monkeypatch):
    monkeypatch.setenv("HOME", str(single.parent))
    assert Checkpoint.open("~/single").path == single
    assert "cannot open ~no-such-user-here/x" in open_fails("~no-such-user-here/x")


def test_a_file_is_not_a_checkpoint(single):
    assert "is a file: give the checkpoint's directory" in open_fails(str(single / SINGLE))


def test_a_local_directory_wins_over_a_hub_id(single, monkeypatch):
    monkeypatch.chdir(single.parent.parent)
    assert Checkpoint.open(f"{single.parent.name}/single").names


def test_a_hub_id_is_downloaded_without_pickles(single, monkeypatch):
    asked = {}

    def download(hub_id, **options):
        asked.update(options, id=hub_id)
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("meta-llama/Llama-3.2-1B-Instruct").path == single
    assert asked["id"] == "meta-llama/Llama-3.2-1B-Instruct"
    keep = huggingface_hub.utils.filter_repo_objects
    repository = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", INDEX, "chat_template.jinja"]
    unwanted = ["pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "model.gguf", "code.py"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(keep(repository + unwanted, **patterns)) == repository


@pytest.mark.parametrize(
    "error, message",
    [
        (errors.GatedRepoError, "is gated: accept its licence .* `hf auth login` or set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "knows no such model .* check the spelling or set HF_TOKEN"),
        (errors.LocalEntryNotFoundError, "cannot be reached: give the directory of a downloaded checkpoint"),
        (TimeoutError, "cannot download owner/name: .*try again"),
    ],
)
def test_hub_failures_name_the_remedy(monkeypatch, error, message):
    response = types.SimpleNamespace(headers={}, request=None, status_code=404)

    def fail(*_, **__):
        raise error("two\nlines", **({"response": response} if issubclass(error, errors.HfHubHTTPError) else {}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open("owner/name")
    assert "owner/name" in str(caught.value) and "\n" not in str(caught.value)


def test_offline_is_one_line_that_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = open_fails("owner/name")
    assert "'owner/name'" in message and "switched off by HF_HUB_OFFLINE: give the directory" in message


# ------------------------------------------------------------------------------------------- what is in it
def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert "is not a checkpoint: it has no config.json: give a directory in Hugging Face layout" in open_fails(tmp_path)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_unread(single, with_config, name):
    (single / SINGLE).rename(single / name)
    if not with_config:
        (single / "config.json").unlink()
    assert f"but {name}: pickle can run code and is not read, convert it to safetensors" in open_fails(single)


def test_gguf_is_refused(single):
    (single / SINGLE).rename(single / "model-q4.gguf")
    assert "but model-q4.gguf: GGUF is not read" in open_fails(single)


def test_no_weights_at_all(single):
    (single / SINGLE).unlink()
    assert f"has neither {SINGLE} nor {INDEX}" in open_fails(single)


def test_unreadable_config(single):
    (single / "config.json").write_text('{"model_type": "llama",')
    assert "config.json is not valid JSON" in open_fails(single)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_other_architectures(single, model_type):
    edit_json(single / "config.json", model_type=model_type)
    assert f"config.json: model_type is '{model_type}'" in open_fails(single)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1000, -1])
def test_a_truncated_file_is_named(single, keep):
    file = single / SINGLE
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    message = open_fails(single)
    kept = len(content[:keep])
    if kept < 8:
        assert f"{file} is not a safetensors file" in message
    else:
        assert f"{file} is truncated: {kept} bytes" in message and "download it again" in message
    if keep < 0:
        assert f"its header promises {len(content)}" in message


def test_a_truncated_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])
    assert f"{file} is truncated" in open_fails(sharded)


def test_bytes_behind_the_end_are_refused(single):
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content + b"more")
    message = open_fails(single)
    assert f"is damaged: {len(content) + 4} bytes, its header promises {len(content)}" in message


@pytest.mark.parametrize(
    "header",
    [
        b"garbage, not JSON",
        b"[1, 2]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b"\xff" * 9,
    ],
)
def test_a_garbage_header_is_named(single, header):
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"{single / SINGLE} is not a safetensors file (its header is unreadable)" in open_fails(single)


def test_a_file_of_noise_is_named(single):
    (single / SINGLE).write_bytes(bytes(range(1, 256)) * 40)
    assert f"{single / SINGLE} is not a safetensors file" in open_fails(single)


def test_a_header_whose_ranges_do_not_fit_its_shapes_is_refused(single):
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    (single / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert f"{single / SINGLE} is damaged" in open_fails(single)


def test_a_git_lfs_pointer_is_recognised(single):
    (single / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git-lfs pointer" in open_fails(single) and "git lfs pull" in open_fails(single)


@pytest.mark.parametrize("name", [NORM, "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(single, name):
    edit_tensors(single / SINGLE, lambda tensors: tensors.pop(name))
    assert f"lacks the tensor {name}" in open_fails(single)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(single):
    edit_tensors(single / SINGLE, lambda tensors: tensors.update({NORM: torch.ones(65)}))
    message = open_fails(single)
    assert NORM in message and "[65]" in message and "[64]" in message
    edit_json(single / "config.json", vocab_size=129)
    message = open_fails(single)
    assert "model.embed_tokens.weight" in message and "[128, 64]" in message and "[129, 64]" in message


def test_integer_weights_are_refused(single):
    edit_tensors(single / SINGLE, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)}))
    message = open_fails(single)
    assert NORM in message and "is stored as I8" in message


def test_a_missing_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[-1]
    file.unlink()
    assert f"lacks the file {file.name}, which its index names" in open_fails(sharded)


def test_an_index_that_names_a_tensor_its_file_lacks(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    wrong = next(file for file in weight_map.values() if file != weight_map[NORM])
    edit_json(sharded / INDEX, weight_map={**weight_map, NORM: wrong})
    message = open_fails(sharded)
    assert f"names {NORM} in {wrong}, which does not hold it" in message


def test_an_index_that_leaves_a_tensor_out(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_json(sharded / INDEX, weight_map={name: file for name, file in weight_map.items() if name != NORM})
    assert f"lacks the tensor {NORM}" in open_fails(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {NORM: "../x.safetensors"}, {NORM: 3}])
def test_a_malformed_index_is_named(sharded, weight_map):
    edit_json(sharded / INDEX, weight_map=weight_map)
    assert str(sharded / INDEX) in open_fails(sharded)


# ------------------------------------------------------------------- what contradicts the config
BIAS, EXTRA = "model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize("name", [BIAS, EXTRA, "score.weight", "model.layers.0.self_attn.q_proj.weight_scale"])
def test_a_tensor_that_no_layer_uses_is_named_and_refused(single, name):
    edit_tensors(single / SINGLE, lambda tensors: tensors.update({name: torch.ones(64)}))
    assert f"holds the tensor {name}, which a Llama of its config.json has not" in open_fails(single)


def test_a_config_with_fewer_layers_than_the_file_is_refused(single):
    edit_json(single / "config.json", num_hidden_layers=1)
    assert "holds the tensor model.layers.1." in open_fails(single)


def test_a_tensor_in_two_shards_is_refused_with_both(sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    edit_tensors(sharded / other, lambda tensors: tensors.update({NORM: torch.ones(64)}))
    message = open_fails(sharded)
    assert NORM in message and other in message and weight_map[NORM] in message


def test_a_tensor_that_the_index_does_not_name_is_refused_where_no_layer_uses_it(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    edit_tensors(file, lambda tensors: tensors.update({BIAS: torch.ones(64)}))
    assert BIAS in open_fails(sharded)


# ------------------------------------------------------------------------------------------- large ones
def test_opening_an_8b_checkpoint_reads_its_headers_and_none_of_its_16_gb(tmp_path):
    config = named_config("8b")
    shapes = list(config.tensor_shapes().items())
    weight_map = {}
    for shard in range(4):
        file, header, end = tmp_path / f"model-{shard}.safetensors", {}, 0
        for name, shape in shapes[shard::4]:
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file.name
        content = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(content)) + content)
        os.truncate(file, 8 + len(content) + end)  # a hole: no disk space
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))

    began, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == config and len(checkpoint) == 291
    checkpoint.digest()
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # KiB


def test_a_file_that_cannot_be_read_says_why(single, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards, "safe_open", refused)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: (refused if path.name == SINGLE else opened)(path, *a, **k))
    assert open_fails(single) == f"cannot read {single / SINGLE}: Permission denied"
