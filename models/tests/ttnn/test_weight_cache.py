"""The cache of converted weights: what it gives back is bit for bit what converting gives, or it is not used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import ttnn
from loguru import logger

from models.llama.checkpoint import Checkpoint
from models.tests.llama_fixtures import tiny_config, write_tiny_checkpoint
from models.ttnn_llama.weights import weight_cache
from models.ttnn_llama.weights.precision import precision_named
from models.ttnn_llama.weights.tensors import CheckpointSource, WeightSpec, weight_specs
from models.ttnn_llama.weights.weight_cache import WeightCache, default_cache_dir

CONFIG = tiny_config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
    num_hidden_layers=1,
)
PERFORMANCE = precision_named("performance")


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path / "tiny", CONFIG))


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def on_host(monkeypatch):
    """Sources return what they would copy to the device: a mock device gives no values back."""
    monkeypatch.setattr(ttnn, "to_device", lambda tensor, mesh_device, memory_config: tensor)


@pytest.fixture
def warnings():
    """What is logged as a warning during the test."""
    messages = []
    sink = logger.add(messages.append, level="WARNING", format="{message}")
    yield messages
    logger.remove(sink)


class Loader:
    """Loads weights as a run does, each time with a source of its own, and counts what had to be converted."""

    def __init__(self, monkeypatch, checkpoint, mesh_device, cache_dir):
        self.args = checkpoint, mesh_device, PERFORMANCE, cache_dir
        self.specs = weight_specs(CONFIG, mesh_device.get_num_devices(), PERFORMANCE)
        self.converted: list[str] = []
        convert = CheckpointSource._convert

        def counted(source, spec):
            self.converted.append(spec.name)
            return convert(source, spec)

        monkeypatch.setattr(CheckpointSource, "_convert", counted)

    def spec(self, name: str) -> WeightSpec:
        return next(spec for spec in self.specs if spec.name == name)

    def load(self, *names: str) -> tuple[list[ttnn.Tensor], list[str]]:
        """(tensors, names of those that were converted) of the weights called `names`, of all without names."""
        self.converted.clear()
        source = CheckpointSource(*self.args)
        tensors = [source.tensor(spec) for spec in self.specs if not names or spec.name in names]
        return tensors, list(self.converted)

    def path(self, name: str) -> Path:
        checkpoint, mesh_device, _, cache_dir = self.args
        return WeightCache(cache_dir, checkpoint.digest(), tuple(mesh_device.shape)).path(self.spec(name))


@pytest.fixture
def loader(monkeypatch, checkpoint, mesh_device, cache_dir) -> Loader:
    return Loader(monkeypatch, checkpoint, mesh_device, cache_dir)


def assert_same_bits(a: ttnn.Tensor, b: ttnn.Tensor, folder: Path) -> None:
    """Equal as files, which hold packed values, format, layout and how they are split."""
    files = [folder / "a.tensorbin", folder / "b.tensorbin"]
    for tensor, file in zip((a, b), files, strict=True):
        ttnn.dump_tensor(file, tensor)
    assert files[0].read_bytes() == files[1].read_bytes()
    parts = [[ttnn.to_torch(part) for part in ttnn.get_device_tensors(tensor)] for tensor in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True))


def change_note(path: Path, **changes) -> None:
    note = path.with_suffix(".json")
    note.write_text(json.dumps({**json.loads(note.read_text()), **changes}))


def vouch_for(path: Path) -> None:
    """Make the note agree with whatever the file holds now, as if it had been stored like that."""
    change_note(path, bytes=path.stat().st_size, sha256=weight_cache._checksum(path))


# ------------------------------------------------------------------------------------------------------------ hits
def test_a_second_load_converts_no_matrix_and_is_equal_bit_for_bit(loader, tmp_path, warnings):
    first, converted = loader.load()
    assert set(converted) == {spec.name for spec in loader.specs}
    second, converted = loader.load()
    assert converted == ["embedding", "layers.0.attention_norm", "layers.0.mlp_norm", "norm"]  # bf16 as they are
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b, tmp_path)
    assert not warnings


def test_precisions_share_the_weights_that_they_have_in_one_format(loader):
    loader.load()
    loader.args = (*loader.args[:2], precision_named("accuracy"), loader.args[3])
    loader.specs = weight_specs(CONFIG, loader.args[1].get_num_devices(), precision_named("accuracy"))
    converted = loader.load("layers.0.wqkv", "layers.0.w1", "layers.0.w3", "layers.0.w2")[1]
    assert converted == ["layers.0.w1", "layers.0.w3"]  # bfp4 there, bfp8 here


def test_another_checkpoint_gets_its_own_weights(loader, tmp_path, mesh_device, cache_dir):
    loader.load()
    other = Checkpoint.open(write_tiny_checkpoint(tmp_path / "other", CONFIG, seed=1))
    loader.args = (other, *loader.args[1:])
    assert loader.load("layers.0.w1")[1] == ["layers.0.w1"]


@pytest.mark.parametrize("what", ["ttnn", "layout"])
def test_weights_of_another_ttnn_or_layout_are_not_used(loader, monkeypatch, what):
    loader.load("layers.0.w1")
    if what == "ttnn":
        monkeypatch.setattr(weight_cache, "version", lambda package: "0.0.1")
    else:
        monkeypatch.setattr(weight_cache, "LAYOUT_VERSION", weight_cache.LAYOUT_VERSION + 1)
    assert loader.load("layers.0.w1")[1] == ["layers.0.w1"]


def test_without_a_directory_nothing_is_written(loader, tmp_path):
    loader.args = (*loader.args[:3], None)
    loader.load()
    assert loader.load("layers.0.w1")[1] == ["layers.0.w1"]
    assert os.listdir(tmp_path) == ["tiny"]


# -------------------------------------------------------------------------------------------------- damaged entries
def truncate(path: Path, loader: Loader) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_a_byte(path: Path, loader: Loader) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def take_another_layers_entry(path: Path, loader: Loader) -> None:
    other = loader.path("layers.0.w3")
    shutil.copy(other, path)
    shutil.copy(other.with_suffix(".json"), path.with_suffix(".json"))


def take_another_checkpoints_entry(path: Path, loader: Loader) -> None:
    mine, mesh_device, _, cache_dir = loader.args
    other = Checkpoint.open(write_tiny_checkpoint(mine.path.with_name("other"), CONFIG, seed=1))
    spec = loader.spec("layers.0.w1")
    CheckpointSource(other, mesh_device, PERFORMANCE, cache_dir).tensor(spec)
    entry = WeightCache(cache_dir, other.digest(), tuple(mesh_device.shape)).path(spec)
    shutil.copy(entry, path)
    shutil.copy(entry.with_suffix(".json"), path.with_suffix(".json"))


def store_another_format(path: Path, loader: Loader) -> None:
    mesh_device = loader.args[1]
    values = loader.spec("layers.0.w1").build(loader.args[0])
    mapper = ttnn.ShardTensorToMesh(mesh_device, 3)
    tensor = ttnn.from_torch(values, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, mesh_mapper=mapper)
    ttnn.dump_tensor(path, tensor)
    vouch_for(path)


def store_another_shape(path: Path, loader: Loader) -> None:
    mesh_device = loader.args[1]
    mapper = ttnn.ReplicateTensorToMesh(mesh_device)
    tensor = ttnn.from_torch(
        torch.zeros(1, 1, 32, 32), dtype=ttnn.bfloat4_b, layout=ttnn.TILE_LAYOUT, mesh_mapper=mapper
    )
    ttnn.dump_tensor(path, tensor)
    vouch_for(path)


def write_something_else(path: Path, loader: Loader) -> None:
    path.write_bytes(b"not a tensor at all " * 1000)
    vouch_for(path)


def break_the_note(path: Path, loader: Loader) -> None:
    path.with_suffix(".json").write_text('{"key": ')


def make_the_note_a_list(path: Path, loader: Loader) -> None:
    path.with_suffix(".json").write_text("[]")


def lose_the_file(path: Path, loader: Loader) -> None:
    path.unlink()


DAMAGES = [
    truncate,
    flip_a_byte,
    take_another_layers_entry,
    take_another_checkpoints_entry,
    store_another_format,
    store_another_shape,
    write_something_else,
    break_the_note,
    make_the_note_a_list,
    lose_the_file,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_converted_again_and_replaced(loader, tmp_path, warnings, damage):
    (good, _), _ = loader.load("layers.0.w1", "layers.0.w3")
    path = loader.path("layers.0.w1")
    damage(path, loader)

    (again,), converted = loader.load("layers.0.w1")
    assert converted == ["layers.0.w1"]
    assert_same_bits(good, again, tmp_path)
    assert len(warnings) == 1 and str(path) in warnings[0] and warnings[0].count("\n") == 1

    (healed,), converted = loader.load("layers.0.w1")
    assert converted == [] and len(warnings) == 1
    assert_same_bits(good, healed, tmp_path)


def test_an_entry_that_is_a_directory_costs_the_cache_but_not_the_run(loader, tmp_path, warnings):
    (good,), _ = loader.load("layers.0.w1")
    path = loader.path("layers.0.w1")
    path.unlink()
    path.mkdir()
    (again,), converted = loader.load("layers.0.w1")
    assert converted == ["layers.0.w1"] and len(warnings) == 2  # cannot be read, cannot be replaced
    assert_same_bits(good, again, tmp_path)


def test_a_file_without_a_note_is_not_used(loader, warnings):
    loader.load("layers.0.w1")
    loader.path("layers.0.w1").with_suffix(".json").unlink()
    assert loader.load("layers.0.w1")[1] == ["layers.0.w1"]
    assert not warnings  # a process may have been stopped between the two files


# ------------------------------------------------------------------------------------------------------------- disk
def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(loader, monkeypatch, cache_dir, warnings):
    dump = ttnn.dump_tensor

    def disk_gets_full(path, tensor):
        dump(path, tensor)
        os.truncate(path, 1000)
        raise RuntimeError(
            "TT_FATAL @ layout.cpp:47: written == bytes\ninfo:\nwrote 1000/70000 bytes\nbacktrace:\n --- x"
        )

    monkeypatch.setattr(ttnn, "dump_tensor", disk_gets_full)
    tensors, _ = loader.load()
    assert len(tensors) == len(loader.specs)
    assert len(warnings) == 1 and "(wrote 1000/70000 bytes)" in warnings[0] and "TT_CACHE_PATH" in warnings[0]
    assert files(cache_dir) == []


def test_a_disk_with_little_room_is_not_filled(loader, monkeypatch, cache_dir, warnings):
    usage = shutil.disk_usage(cache_dir.parent)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    loader.load()
    assert len(warnings) == 1 and "0.00 GB free" in warnings[0]
    assert files(cache_dir) == []


def test_a_write_that_is_cut_short_silently_is_noticed(loader, monkeypatch, cache_dir, warnings):
    dump = ttnn.dump_tensor

    def cut_short(path, tensor):
        dump(path, tensor)
        os.truncate(path, 1000)

    monkeypatch.setattr(ttnn, "dump_tensor", cut_short)
    loader.load()
    assert len(warnings) == 1 and files(cache_dir) == []


def test_a_directory_that_cannot_be_made_costs_one_warning(loader, cache_dir, warnings):
    cache_dir.write_text("a file")
    assert len(loader.load()[0]) == len(loader.specs)
    assert len(warnings) == 1 and str(cache_dir) in warnings[0]


def test_nothing_temporary_stays_beside_the_entries(loader, cache_dir):
    loader.load()
    names = {path.name for path in files(cache_dir)}
    matrices = [spec for spec in loader.specs if spec.chip_dim is not None]
    assert names == {f"{s.name}.{s.format}.{end}" for s in matrices for end in ("tensorbin", "json")}


def test_the_directory_is_the_one_that_is_set_else_in_the_users_cache():
    assert default_cache_dir({"TT_CACHE_PATH": "/x/y", "XDG_CACHE_HOME": "/z"}) == Path("/x/y")
    assert default_cache_dir({"XDG_CACHE_HOME": "/z"}) == Path("/z/tt-speculative-llama/weights")
    assert default_cache_dir({"TT_CACHE_PATH": ""}) == Path.home() / ".cache/tt-speculative-llama/weights"
