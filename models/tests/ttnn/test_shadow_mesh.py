"""Shadow values on several devices: each has its part."""

import pytest
import torch
import ttnn

from models.tests.ttnn.shadow_fixtures import BF16, FP32, KV, ROW_MAJOR, TILE, UINT32, B, D, H, S, bf16


@pytest.fixture
def line(mesh_device):
    """(mesh, number of devices) of a board with several."""
    count = mesh_device.get_num_devices()
    if count == 1:
        pytest.skip("one device has no collectives")
    return mesh_device, count


def test_mesh_mappers_give_each_device_its_part(mesh_device, shadow):
    n = mesh_device.get_num_devices()
    x = bf16(1, 1, 32, 32 * n)

    def values(mapper):
        tensor = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh_device, mesh_mapper=mapper)
        read = [ttnn.to_torch(part).float() for part in ttnn.get_device_tensors(tensor)]
        assert len(read) == n and all(torch.equal(a, b) for a, b in zip(read, shadow.value(tensor), strict=True))
        return read

    shard = [ttnn.PlacementReplicate(), ttnn.PlacementShard(3)]
    for mapper in (
        ttnn.ShardTensorToMesh(mesh_device, dim=3),
        ttnn.ShardTensor2dMesh(mesh_device, dims=(None, 3), mesh_shape=tuple(mesh_device.shape)),
        ttnn.create_mesh_mapper(mesh_device, ttnn.MeshMapperConfig(shard)),
    ):
        assert torch.equal(torch.cat(values(mapper), 3), x)
    for mapper in (ttnn.ReplicateTensorToMesh(mesh_device), None):
        assert all(torch.equal(part, x) for part in values(mapper))


def test_host_shards_keep_their_part_on_the_way_to_the_mesh(mesh_device, shadow, tmp_path):
    x = bf16(1, 1, 32, 32 * mesh_device.get_num_devices())
    composer = ttnn.ConcatMeshToTensor(mesh_device, dim=3)
    host = ttnn.from_torch(x, dtype=BF16, layout=TILE, mesh_mapper=ttnn.ShardTensorToMesh(mesh_device, dim=3))
    device = ttnn.to_device(host, mesh_device)
    assert torch.equal(ttnn.to_torch(device, mesh_composer=composer).float(), x)
    assert torch.equal(ttnn.to_torch(ttnn.from_device(device), mesh_composer=composer).float(), x)
    placements = [str(tensor.tensor_topology().placements()) for tensor in (device, ttnn.from_device(device))]
    assert placements[0] == placements[1] and "Shard(3)" in placements[0]
    target = ttnn.zeros_like(device)
    ttnn.copy_host_to_device_tensor(host, target)
    assert torch.equal(ttnn.to_torch(target, mesh_composer=composer).float(), x)
    ttnn.dump_tensor(tmp_path / "x.tensorbin", device)
    loaded = ttnn.load_tensor(tmp_path / "x.tensorbin", device=mesh_device)
    assert torch.equal(ttnn.to_torch(loaded, mesh_composer=composer).float(), x)


def test_collectives_combine_the_devices(line, same):
    mesh, n = line
    x = bf16(1, 1, 32, 32 * n * n)
    tensor = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=ttnn.ShardTensorToMesh(mesh, dim=3))
    parts = x.chunk(n, 3)
    same(ttnn.all_gather(tensor, dim=3), x, 0)
    same(ttnn.all_reduce(tensor), sum(parts))
    scattered = ttnn.reduce_scatter(tensor, dim=3)
    assert list(scattered.shape) == [1, 1, 32, 32]
    whole = ttnn.to_torch(scattered, mesh_composer=ttnn.ConcatMeshToTensor(mesh, dim=3)).float()
    torch.testing.assert_close(whole, sum(parts), rtol=2**-7, atol=2**-7)
    same(ttnn.all_gather(scattered, dim=3), sum(parts))


@pytest.mark.parametrize("mesh_device", [(2, 4)], indirect=True)
@pytest.mark.parametrize("axis", [0, 1])
def test_collectives_join_the_devices_along_one_axis(mesh_device, shadow, axis):
    x = bf16(2, 4, 32, 32)  # one tile for each device
    mapper = ttnn.ShardTensor2dMesh(mesh_device, dims=(0, 1), mesh_shape=(2, 4))
    tensor = ttnn.from_torch(x, dtype=FP32, layout=TILE, device=mesh_device, mesh_mapper=mapper)
    reduced = ttnn.all_reduce(tensor, cluster_axis=axis)
    gathered = ttnn.all_gather(tensor, dim=3, cluster_axis=axis)
    for device in range(8):
        row, column = divmod(device, 4)
        group = x[:, column] if axis == 0 else x[row]
        torch.testing.assert_close(shadow.value(reduced)[device][0, 0], group.sum(0))
        assert torch.equal(shadow.value(gathered)[device][0, 0], torch.cat(list(group), -1))


def test_a_gather_of_integers_is_exact(line, same):
    mesh, n = line
    x = torch.randint(0, 2**31 - 1, (1, 1, 32, 32 * n), dtype=torch.int32)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=3)
    tensor = ttnn.from_torch(x, dtype=UINT32, layout=ROW_MAJOR, device=mesh, mesh_mapper=mapper)
    same(ttnn.all_gather(tensor, dim=3), x, 0)


def test_parallel_layer_equals_the_whole_layer(line, same):
    mesh, n = line
    x, up, down = bf16(1, 1, B, H), bf16(1, 1, H, 32 * n) / 16, bf16(1, 1, 32 * n, H) / 16

    def split(weight, dim):
        mapper = ttnn.ShardTensorToMesh(mesh, dim=dim)
        return ttnn.from_torch(weight, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=mapper)

    rows = ttnn.from_torch(x, dtype=FP32, layout=TILE, device=mesh, mesh_mapper=ttnn.ReplicateTensorToMesh(mesh))
    y = ttnn.all_reduce(ttnn.linear(ttnn.linear(rows, split(up, 3)), split(down, 2)))
    same(y, x @ up @ down, 1e-3)


def test_each_device_updates_its_own_part_of_a_cache(line, shadow):
    mesh, n = line
    cache = ttnn.zeros((1, KV, S, D), dtype=BF16, layout=TILE, device=mesh)
    x = bf16(1, KV, 32, D * n)
    mapper = ttnn.ShardTensorToMesh(mesh, dim=3)
    ttnn.fill_cache(cache, ttnn.from_torch(x, dtype=BF16, layout=TILE, device=mesh, mesh_mapper=mapper), 0)
    for value, part in zip(shadow.value(cache), x.chunk(n, 3), strict=True):
        assert torch.equal(value[:, :, :32], part) and not value[:, :, 32:].any()


def test_submeshes_compute_for_themselves(fresh_mesh_device, line, shadow, same):
    n = line[1]
    left, right = fresh_mesh_device.create_submeshes(ttnn.MeshShape(1, n // 2))
    x = bf16(1, 1, 32, 32 * (n // 2))
    a = ttnn.from_torch(x, dtype=BF16, layout=TILE, device=left, mesh_mapper=ttnn.ShardTensorToMesh(left, dim=3))
    assert len(shadow.value(a)) == n // 2
    b = ttnn.zeros_like(ttnn.to_device(ttnn.from_device(a), right))
    ttnn.copy_host_to_device_tensor(ttnn.from_device(ttnn.neg(a)), b)
    assert torch.equal(ttnn.to_torch(b, mesh_composer=ttnn.ConcatMeshToTensor(right, dim=3)).float(), -x)
    if n > 2:
        same(ttnn.all_gather(b, dim=3), -x, 0)
