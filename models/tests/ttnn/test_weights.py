"""Weights on a mesh: every chip's tensor, its format and memory; and the memory plan against ttnn's allocator."""

import contextlib
import dataclasses
import gc

import pytest
import torch
import ttnn

from models.llama.checkpoint import Checkpoint
from models.llama.config import NAMED_SIZES
from models.tests.llama_fixtures import random_tensors, tiny_config, write_tiny_checkpoint
from models.ttnn_llama.model import TtnnLlama
from models.ttnn_llama.shapes import cache_length
from models.ttnn_llama.weights import memory
from models.ttnn_llama.weights.precision import PRECISIONS, precision_named, tile_bytes, ttnn_dtype
from models.ttnn_llama.weights.tensors import CheckpointSource, EmptySource, weight_specs

CONFIG = tiny_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
    dtype="bfloat16",
)
BF16 = precision_named("bf16")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path / "tiny", CONFIG))


@pytest.fixture
def on_host(monkeypatch):
    """Sources return what they would copy to the device: a mock device gives no values back."""
    monkeypatch.setattr(ttnn, "to_device", lambda tensor, mesh_device, memory_config: tensor)


def chips_of(tensor: ttnn.Tensor) -> list[torch.Tensor]:
    return [ttnn.to_torch(part) for part in ttnn.get_device_tensors(tensor)]


def used_bytes(mesh_device) -> int:
    """DRAM in use on a chip, all banks."""
    gc.collect()
    view = ttnn.get_memory_view(mesh_device, ttnn.BufferType.DRAM)
    return view.total_bytes_allocated_per_bank * view.num_banks


# ---------------------------------------------------------------------------------------------------------- values
def test_each_chip_holds_its_part_of_every_weight(mesh_device, checkpoint, on_host):
    chips = mesh_device.get_num_devices()
    source = CheckpointSource(checkpoint, mesh_device, BF16)
    tensors = random_tensors(CONFIG, seed=0)
    for spec in weight_specs(CONFIG, chips, BF16):
        whole = spec.build(tensors)
        expected = [whole] * chips if spec.chip_dim is None else whole.chunk(chips, spec.chip_dim)
        found = chips_of(source.tensor(spec))
        assert len(found) == chips
        for chip in range(chips):
            assert torch.equal(found[chip], expected[chip]), f"{spec.name} on chip {chip}"


def test_each_chip_holds_the_queries_keys_and_values_of_its_own_heads(mesh_device, checkpoint, on_host):
    chips = mesh_device.get_num_devices()
    spec = next(s for s in weight_specs(CONFIG, chips, BF16) if s.name == "layers.1.wqkv")
    found = chips_of(CheckpointSource(checkpoint, mesh_device, BF16).tensor(spec))
    tensors = random_tensors(CONFIG, seed=0)
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"].view(-1, 32, 128) for name in "qkv")
    pairs = torch.arange(32).view(2, 16).t().flatten()  # 0, 16, 1, 17, ...
    widths = [16 // chips, 8 // chips, 8 // chips]
    for chip, columns in enumerate(found):
        heads = columns[0, 0].t().reshape(-1, 32, 128).split(widths)
        for kind, held, whole in zip("qkv", heads, (q[:, pairs], k[:, pairs], v), strict=True):
            assert torch.equal(held, whole.chunk(chips)[chip]), f"{kind} on chip {chip}"


def test_head_pieces_of_all_chips_are_the_vocabulary_in_order(mesh_device, checkpoint, on_host, monkeypatch):
    monkeypatch.setattr("models.ttnn_llama.weights.tensors.HEAD_TILES", 2)
    chips = mesh_device.get_num_devices()
    source = CheckpointSource(checkpoint, mesh_device, BF16)
    pieces = [s for s in weight_specs(CONFIG, chips, BF16) if s.name.startswith("head.")]
    assert len(pieces) == 16 // chips
    held = [chips_of(source.tensor(piece)) for piece in pieces]
    rows = [held[piece][chip][0, 0].t() for chip in range(chips) for piece in range(len(pieces))]
    assert torch.equal(torch.cat(rows), random_tensors(CONFIG, seed=0)["lm_head.weight"])


def test_a_tied_head_is_the_embedding(mesh_device, tmp_path, on_host):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path / "tied", config))
    source = CheckpointSource(checkpoint, mesh_device, BF16)
    specs = {spec.name: spec for spec in weight_specs(config, mesh_device.get_num_devices(), BF16)}
    embedding = chips_of(source.tensor(specs["embedding"]))[0]
    head = torch.cat([part[0, 0].t() for part in chips_of(source.tensor(specs["head.0"]))])
    assert torch.equal(head, embedding) and torch.equal(head, random_tensors(config, 0)["model.embed_tokens.weight"])


@pytest.mark.parametrize(("format", "error"), [("bfp8", 0.01), ("bfp4", 0.15)])
def test_block_formats_keep_values_to_their_accuracy(mesh_device, checkpoint, on_host, format, error):
    precision = precision_named({"bfp8": "accuracy", "bfp4": "bfp4"}[format])
    chips = mesh_device.get_num_devices()
    spec = next(s for s in weight_specs(CONFIG, chips, precision) if s.name == "layers.0.w2")
    whole = torch.cat(chips_of(CheckpointSource(checkpoint, mesh_device, precision).tensor(spec)), dim=2).float()
    exact = spec.build(random_tensors(CONFIG, seed=0)).float()
    assert 0 < (whole - exact).norm() / exact.norm() < error


def test_progress_counts_every_weight_once(mesh_device, checkpoint):
    calls = []
    source = CheckpointSource(checkpoint, mesh_device, BF16, progress=lambda *call: calls.append(call))
    specs = weight_specs(CONFIG, mesh_device.get_num_devices(), BF16)
    for spec in specs:
        source.tensor(spec)
    assert calls == [(done, len(specs), spec.name) for done, spec in enumerate(specs, 1)]


# ------------------------------------------------------------------------------------------------ layout and memory
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
def test_empty_weights_have_the_layout_of_real_ones(mesh_device, checkpoint, precision):
    real, empty = CheckpointSource(checkpoint, mesh_device, precision), EmptySource(mesh_device)
    for spec in weight_specs(CONFIG, mesh_device.get_num_devices(), precision):
        pair = real.tensor(spec), empty.tensor(spec)
        for field in ("shape", "padded_shape", "dtype", "layout"):
            assert getattr(pair[0], field) == getattr(pair[1], field), (spec.name, field)
        assert pair[0].memory_config() == pair[1].memory_config(), spec.name
        assert pair[0].dtype == ttnn_dtype(spec.format)


def test_matrices_lie_by_width_over_all_dram_banks(mesh_device):
    specs = weight_specs(CONFIG, mesh_device.get_num_devices(), BF16)
    banks = mesh_device.dram_grid_size().x
    for spec in specs:
        config = EmptySource(mesh_device).tensor(spec).memory_config()
        assert config.buffer_type == ttnn.BufferType.DRAM
        if spec.dram_sharded:
            assert config.memory_layout == ttnn.TensorMemoryLayout.WIDTH_SHARDED
            assert config.shard_spec.grid.num_cores() == banks
        else:
            assert config.memory_layout == ttnn.TensorMemoryLayout.INTERLEAVED


@pytest.mark.parametrize("format", ["bf16", "bfp8", "bfp4"])
def test_a_tile_is_as_large_as_ttnn_makes_it(mesh_device, format):
    assert ttnn.Tile((32, 32)).get_tile_size(ttnn_dtype(format)) == tile_bytes(format)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("size", "layers"), [("llama-3.2-1b", 16), ("llama-3.2-3b", 3), ("llama-3.1-8b", 2)])
def test_the_plan_is_what_the_allocator_takes(mesh_device, size, layers, precision):
    config = dataclasses.replace(NAMED_SIZES[size], num_hidden_layers=layers)
    precision, chips = precision_named(precision), mesh_device.get_num_devices()
    context = 1000
    banks = mesh_device.dram_grid_size().x
    plan = memory.plan(config, precision, chips, context, 0, dram_banks=banks)

    before = used_bytes(mesh_device)
    source = EmptySource(mesh_device)
    kept = [source.tensor(spec) for spec in weight_specs(config, chips, precision)]
    weights = used_bytes(mesh_device) - before
    shape = (1, config.num_key_value_heads // chips, cache_length(context), config.head_dim)
    for _ in range(2 * layers):
        kept.append(
            ttnn.empty(shape, dtype=ttnn_dtype(precision.kv_cache), layout=ttnn.TILE_LAYOUT, device=mesh_device)
        )
    kv_cache = used_bytes(mesh_device) - before - weights
    for tensor in kept:
        ttnn.deallocate(tensor)
    assert (plan.weights, plan.kv_cache) == (weights, kv_cache)


def test_the_plan_of_a_deep_model_is_what_its_layers_add_up_to(mesh_device):
    precision, chips = precision_named("accuracy"), mesh_device.get_num_devices()
    used, plans = {}, {}
    for layers in (1, 2, 32):
        config = dataclasses.replace(NAMED_SIZES["llama-3.1-8b"], num_hidden_layers=layers)
        plans[layers] = memory.plan(config, precision, chips, 1000, 0, dram_banks=mesh_device.dram_grid_size().x)
        if layers < 32:
            before = used_bytes(mesh_device)
            kept = [EmptySource(mesh_device).tensor(spec) for spec in weight_specs(config, chips, precision)]
            used[layers] = used_bytes(mesh_device) - before
            for tensor in kept:
                ttnn.deallocate(tensor)
    assert plans[32].weights == used[1] + 31 * (used[2] - used[1])


@pytest.mark.parametrize("size", ["llama-3.2-1b", "llama-3.1-8b"])
def test_a_model_runs_in_the_memory_that_its_plan_reserves_and_not_in_half(mesh_device, size):
    config = dataclasses.replace(NAMED_SIZES[size], num_hidden_layers=1)
    precision, context = precision_named("performance"), 2000
    banks = mesh_device.dram_grid_size().x
    plan = memory.plan(config, precision, mesh_device.get_num_devices(), context, 0, dram_banks=banks)
    before = used_bytes(mesh_device)
    model = TtnnLlama(config, mesh_device, EmptySource(mesh_device), precision=precision, max_seq_len=context)
    for activations, enough in ((plan.activations, True), (plan.activations // 2, False)):
        left = before + plan.weights + plan.kv_cache + activations - used_bytes(mesh_device)
        ballast = occupy_all_but(mesh_device, left)
        expectation = contextlib.nullcontext() if enough else pytest.raises(RuntimeError, match="Out of Memory")
        with expectation:
            model.prefill([1] * 1500)
            model.forward([1] * 32, 1500)
        for tensor in ballast:
            ttnn.deallocate(tensor)


def occupy_all_but(mesh_device, left: int) -> list[ttnn.Tensor]:
    """Take a chip's DRAM until ``left`` bytes are free, to within a megabyte a bank."""
    taken = []
    while True:
        view = ttnn.get_memory_view(mesh_device, ttnn.BufferType.DRAM)
        spare = view.total_bytes_free_per_bank - left // view.num_banks
        pages = min(spare, view.largest_contiguous_bytes_free_per_bank) >> 20
        if pages <= 0:
            return taken
        shape = (pages * view.num_banks, 2**19)  # pages of 1 MiB
        taken.append(ttnn.empty(shape, dtype=ttnn.bfloat16, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh_device))
