"""Shadow values: their life, on the host and on devices, and what goes wrong."""

import gc
import subprocess
import sys

import pytest
import torch
import ttnn

from models.tests.ttnn.shadow_fixtures import BF8, BF16, DRAM, KV, L1, POSITIONS, TILE, B, D, Q, S, bf16, height_sharded

# ---- host and device ------------------------------------------------------------------------------------------------


def test_values_survive_the_way_through_the_host(mesh_device, shadow, put, same, tmp_path):
    x = bf16(1, 1, 64, 96)
    host = ttnn.from_torch(x, dtype=BF16, layout=TILE)
    device = ttnn.to_device(host, mesh_device, memory_config=L1)
    same(device, x)
    same(host.to(mesh_device), x)
    back = ttnn.from_device(device)
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(back)[0]).float(), x)
    assert torch.equal(ttnn.to_torch(ttnn.get_device_tensors(device.cpu())[0]).float(), x)
    target = put(torch.zeros(1, 1, 64, 96))
    ttnn.copy_host_to_device_tensor(back, target)
    same(target, x)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", device)
    same(ttnn.load_tensor(tmp_path / "x.tensorbin", device=mesh_device), x)
    cached = {"dtype": BF8, "layout": TILE, "device": mesh_device, "memory_config": DRAM}
    for _ in range(2):  # made, then read from the file
        same(ttnn.as_tensor(x, cache_file_name=tmp_path / "y", **cached), shadow.rounded(x, BF8), 0)


def test_sharded_tensors_survive_the_way_through_the_host(put, same):
    x = bf16(1, 1, 64, 32)
    tensor = put(x, memory_config=height_sharded(2, 32, 32))
    target = put(torch.zeros_like(x), memory_config=height_sharded(2, 32, 32))
    ttnn.copy_host_to_device_tensor(ttnn.from_device(tensor), target)
    same(target, x)


def test_printing_shows_the_shadow(put):
    assert "7.0" in repr(put(torch.full((1, 1, 32, 32), 7.0)))


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_shape_that_golden_and_ttnn_see_differently_is_an_error(put, shadow):
    k = v = put(bf16(1, KV, S, D))
    with pytest.raises(shadow.ShapeMismatch, match="ttnn infers"):  # ttnn forgets rows with share_cache
        ttnn.transformer.scaled_dot_product_attention_decode(
            put(bf16(1, B, Q, D)), k, v, cur_pos_tensor=put(POSITIONS.clamp(0)), share_cache=True
        )


def test_an_operation_without_golden_function_is_an_error(put):
    with pytest.raises(NotImplementedError, match="ttnn.experimental.dropout"):
        ttnn.experimental.dropout(put(bf16(1, 1, 32, 32)), probability=0.5, scale=2.0, seed=1)


@pytest.mark.parametrize("free", [ttnn.deallocate, lambda tensor: tensor.deallocate()], ids=["function", "method"])
def test_a_deallocated_tensor_has_no_values(put, shadow, free):
    tensor = put(bf16(1, 1, 32, 32))
    free(tensor)
    with pytest.raises(RuntimeError, match="deallocated"):
        shadow.value(tensor)


def test_a_tensor_from_before_the_shadows_is_an_error(mesh_device, shadow):
    shadow.uninstall()
    try:
        tensor = ttnn.from_torch(bf16(1, 1, 32, 32), dtype=BF16, layout=TILE, device=mesh_device)
    finally:
        shadow.install()
    with pytest.raises(RuntimeError, match="no shadow"):
        ttnn.silu(tensor)


def test_a_trace_is_an_error_instead_of_a_crash(mesh_device, shadow):
    with pytest.raises(NotImplementedError, match="trace"):
        ttnn.begin_trace_capture(mesh_device, cq_id=0)


def test_without_shadows_the_mock_reads_zeros(mesh_device, shadow):
    shadow.uninstall()
    try:
        tensor = ttnn.from_torch(torch.ones(1, 1, 32, 32), dtype=BF16, layout=TILE, device=mesh_device)
        assert ttnn.to_torch(ttnn.get_device_tensors(tensor)[0]).abs().sum() == 0
    finally:
        shadow.install()


def test_shadows_of_dropped_tensors_are_dropped(put, shadow):
    kept = put(bf16(1, 1, 32, 64))
    gc.collect()
    before = len(shadow._shadows)
    for _ in range(20):
        x = ttnn.silu(ttnn.reshape(ttnn.add(kept, kept), (1, 2, 16, 64)))
    del x
    assert len(shadow._shadows) == before


def test_dropped_tensors_free_device_memory(mesh_device, put):
    def free():
        return ttnn.get_memory_view(mesh_device, ttnn.BufferType.L1).total_bytes_free_per_bank

    before = free()
    tensor = put(bf16(1, 1, 256, 256), memory_config=L1)
    assert free() < before
    del tensor
    assert free() == before


# ---- a program of its own -------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch, ttnn
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
x = ttnn.from_torch(torch.full((1, 1, 32, 32), 3.0), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
print(sys.argv[1:], ttnn.to_torch(ttnn.square(x)).sum().item())
ttnn.close_mesh_device(mesh)
"""


@pytest.mark.once
@pytest.mark.parametrize("as_module", [False, True])
def test_script_runs_on_a_mock_board_with_numbers(tmp_path, pytestconfig, as_module):
    (tmp_path / "squares.py").write_text(SCRIPT)
    program = ["-m", "squares"] if as_module else [str(tmp_path / "squares.py")]
    run = subprocess.run(
        [sys.executable, "-m", "models.board_mock", "N150", *program, "--size", "1b"],
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": f"{pytestconfig.rootpath}:{tmp_path}"},
    )
    assert run.stdout == "['--size', '1b'] 9216.0\n", run.stderr
    assert run.stderr == "mock board N150: numbers from golden functions, times mean nothing\n"
