"""The values of tensors on a mock board, and their ways between host and device; see `shadow`."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import ttnn
from ttnn.decorators import FastOperation


class ShapeMismatch(RuntimeError):
    """ttnn infers one shape for a result, its golden function gives another."""


real_call = FastOperation.__call__
_real_tensor_to = ttnn.Tensor.to
DEVICE = ttnn.StorageType.DEVICE
_INTEGERS = {
    ttnn.uint8: torch.uint8,
    ttnn.uint16: torch.uint16,
    ttnn.uint32: torch.uint32,
    ttnn.int32: torch.int32,
}

# ---- shadows --------------------------------------------------------------------------------------------------------


class Shadow:
    """Values of one tensor on a mesh, one per device; replicas may be one and the same torch tensor."""

    __slots__ = ("values", "part", "__weakref__")

    def __init__(self, values, part=False):
        self.values = values
        self.part = part  # one device's share of another tensor's values

    def write(self, values):
        """Change the values where they are, so that views see it too."""
        self.separate(values)
        for mine, new in distinct(self.values, values):
            mine.copy_(new)

    def separate(self, *others):
        """Give each device values of its own, unless all that is to be written is the same for all."""
        if self.part:
            raise NotImplementedError("writing to one device's share of a tensor has no shadow")
        if not all(is_uniform(values) for values in others) and is_uniform(self.values) and len(self.values) > 1:
            self.values = [value.clone() for value in self.values]


class ShadowTensor(ttnn.Tensor):
    """A ttnn tensor on the device that owns its shadow: both go together."""

    def __repr__(self):
        return repr(_to_host(self))

    def cpu(self, *args, **kwargs):
        return _to_host(self)

    def to_torch(self, *args, **kwargs):
        return _to_host(self).to_torch(*args, **kwargs)

    def to_list(self):
        return _to_host(self).to_list()

    def to_numpy(self, *args, **kwargs):
        return _to_host(self).to_numpy(*args, **kwargs)

    def item(self):
        return _to_host(self).item()

    def deallocate(self, force=True):
        ttnn.deallocate(self, force)

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 else shape
        return ttnn.reshape(self, shape)


# By tensor_id; ttnn gives a view that changes nothing its tensor's id.
_shadows: weakref.WeakValueDictionary[int, "Shadow"] = weakref.WeakValueDictionary()


def is_uniform(values):
    first = values[0]
    return all(value is first for value in values)


def distinct(*lists):
    """Zip of the lists without repetition of replicas."""
    seen = set()
    for row in zip(*lists, strict=True):
        if id(row[0]) not in seen:
            seen.add(id(row[0]))
            yield row


def shadow_of(tensor):
    if isinstance(tensor, ShadowTensor):
        shadow = tensor.shadow
    else:
        shadow = _shadows.get(tensor.tensor_id)
        if shadow is None:
            raise RuntimeError(
                f"no shadow for the tensor {list(tensor.shape)} {tensor.dtype}: it was made before shadow values were "
                "installed, or by a function without one"
            )
    if shadow.values is None:
        raise RuntimeError(f"the tensor {list(tensor.shape)} {tensor.dtype} has been deallocated")
    return shadow


def value(tensor):
    """The values of a tensor, one torch tensor per device (or per shard, on the host): float32, or int64.

    They are the values themselves, not a copy.

    Raises:
        RuntimeError: the tensor has no shadow, or was deallocated.
    """
    if tensor.storage_type() == DEVICE:
        return shadow_of(tensor).values
    return [_plain(shard.to_torch()) for shard in _real_get_device_tensors(tensor)]


def _plain(x):
    return x.float() if x.is_floating_point() else x.to(torch.int64)


def rounded(x, dtype):
    """x as a tensor of `dtype` holds it: float32, or int64 for integer types. May share x's memory."""
    if dtype == ttnn.bfloat16:
        return x.to(torch.bfloat16).float()
    if dtype == ttnn.float32:
        return x.float()
    if dtype in _INTEGERS:
        return x.to(torch.int64)
    return ttnn.Tensor(tensor=x.float().contiguous(), data_type=dtype, layout=ttnn.TILE_LAYOUT).to_torch().float()


def adopt(tensor, values, part=False):
    """The tensor with these values as its shadow."""
    for (new,) in distinct(values):
        if tuple(new.shape) != tuple(tensor.shape):
            raise ShapeMismatch(f"values {list(new.shape)} for a tensor {list(tensor.shape)}")
    return keep(tensor, values, part)


def keep(tensor, values, part=False):
    """As `adopt`, for values whose shape was compared."""
    shadow = Shadow(values, part)
    _shadows[tensor.tensor_id] = shadow
    return owner_of(tensor, shadow)


def owner_of(tensor, shadow):
    owner = ShadowTensor(tensor)
    owner.shadow = shadow
    return owner


# ---- between host and device ----------------------------------------------------------------------------------------


def _to_host(tensor):
    """A host tensor with the shadow's values, and with the specification that ttnn gives it."""
    shadow = shadow_of(tensor)
    host = real_call(ttnn.from_device, tensor)
    storage = _INTEGERS.get(host.dtype, torch.float32)
    spec = host.spec
    shards = {}
    for (new,) in distinct(shadow.values):
        shards[id(new)] = real_call(ttnn.from_torch, new.to(storage).contiguous(), spec=spec)
    if shadow.part:
        return shards[id(shadow.values[0])]
    new = ttnn.from_host_shards([shards[id(v)] for v in shadow.values], host.host_buffer().shape())
    new.update_tensor_topology(host.tensor_topology())
    return new


def _host_values(host, count):
    """The real data of a host tensor, one value per device; replicas are one and the same value."""
    values = [_plain(shard.to_torch()) for shard in _real_get_device_tensors(host)]
    if len(values) == 1:
        return values * count
    replicated = all(isinstance(p, ttnn.PlacementReplicate) for p in host.tensor_topology().placements())
    return values[:1] * len(values) if replicated else values


def _to_device(host, device, memory_config=None, **kwargs):
    if host.storage_type() == DEVICE:
        return host
    tensor = real_call(ttnn.to_device, host, device, memory_config, **kwargs)
    return adopt(tensor, _host_values(host, device.get_num_devices()))


def _from_torch(operation, tensor, *args, device=None, memory_config=None, cq_id=None, **kwargs):
    if device is None:
        return real_call(operation, tensor, *args, memory_config=memory_config, **kwargs)
    if tensor is None:
        return None
    host = real_call(operation, tensor, *args, **kwargs)
    if "spec" in kwargs and kwargs["spec"] is not None:
        memory_config = kwargs["spec"].memory_config
    return _to_device(host, device, memory_config)


def _as_tensor(operation, tensor, *args, device=None, memory_config=None, **kwargs):
    host = real_call(operation, tensor, *args, **kwargs)
    return host if device is None else _to_device(host, device, memory_config)


def _load_tensor(operation, file_name, *, device=None):
    host = real_call(operation, file_name)
    return host if device is None else _to_device(host, device)


def _dump_tensor(operation, file_name, tensor, **kwargs):
    real_call(operation, file_name, _to_host(tensor) if tensor.storage_type() == DEVICE else tensor, **kwargs)


def _to_torch(operation, tensor, *args, **kwargs):
    return real_call(operation, _to_host(tensor) if tensor.storage_type() == DEVICE else tensor, *args, **kwargs)


def _from_device(operation, tensor, *args, **kwargs):
    return _to_host(tensor) if tensor.storage_type() == DEVICE else tensor


def _to_device_operation(operation, tensor, device, memory_config=None, **kwargs):
    return _to_device(tensor, device, memory_config, **kwargs)


def _copy_host_to_device(operation, host_tensor, device_tensor, *args, **kwargs):
    real_call(operation, host_tensor, device_tensor, *args, **kwargs)
    shadow = shadow_of(device_tensor)
    shadow.write(_host_values(host_tensor, len(shadow.values)))


def _deallocate(operation, tensor, *args, **kwargs):
    real_call(operation, tensor, *args, **kwargs)
    shadow = _shadows.get(tensor.tensor_id)
    if shadow is not None and not tensor.is_allocated():
        shadow.values = None


def _tensor_to(tensor, *args, **kwargs):
    moved = _real_tensor_to(tensor, *args, **kwargs)
    if moved.storage_type() != DEVICE:
        return moved
    if tensor.storage_type() == DEVICE:
        return tensor
    return adopt(moved, _host_values(tensor, moved.device().get_num_devices()))


_real_get_device_tensors = ttnn.get_device_tensors
_real_combine = ttnn.combine_device_tensors
_real_distribute = ttnn.distribute_tensor
_real_aggregate = ttnn.aggregate_tensor


def _get_device_tensors(tensor):
    parts = _real_get_device_tensors(tensor)
    if tensor.storage_type() != DEVICE:
        return parts
    values = shadow_of(tensor).values
    part = len(values) > 1
    return [adopt(tensor, [own], part) for tensor, own in zip(parts, values, strict=True)]


def _combine_device_tensors(*, tensors):
    return adopt(_real_combine(tensors=tensors), [shadow_of(tensor).values[0].clone() for tensor in tensors])


def _distribute_tensor(tensor, mapper, mesh_device=None):
    host = _real_distribute(tensor, mapper)
    return host if mesh_device is None else _to_device(host, mesh_device)


def _aggregate_tensor(tensor, composer):
    return _real_aggregate(_to_host(tensor) if tensor.storage_type() == DEVICE else tensor, composer)


def _no_trace(*args, **kwargs):
    raise NotImplementedError("a mock board cannot capture or execute a trace: run the operations themselves")


def _no_copy_to_host(operation, *args, **kwargs):
    raise NotImplementedError(f"{operation.python_fully_qualified_name} has no shadow: use ttnn.from_device")


TRANSFERS: dict[str, Callable] = {
    "ttnn.as_tensor": _as_tensor,
    "ttnn.copy_device_to_host_tensor": _no_copy_to_host,
    "ttnn.copy_host_to_device_tensor": _copy_host_to_device,
    "ttnn.deallocate": _deallocate,
    "ttnn.dump_tensor": _dump_tensor,
    "ttnn.from_device": _from_device,
    "ttnn.from_torch": _from_torch,
    "ttnn.load_tensor": _load_tensor,
    "ttnn.to_device": _to_device_operation,
    "ttnn.to_torch": _to_torch,
}

# Functions that are no operations of ttnn's.
PATCHES: list[tuple[Any, str, Callable]] = [
    (ttnn.Tensor, "to", _tensor_to),
    (ttnn, "get_device_tensors", _get_device_tensors),
    (ttnn, "combine_device_tensors", _combine_device_tensors),
    (ttnn, "distribute_tensor", _distribute_tensor),
    (ttnn, "aggregate_tensor", _aggregate_tensor),
    (ttnn, "begin_trace_capture", _no_trace),
    (ttnn, "execute_trace", _no_trace),
]
