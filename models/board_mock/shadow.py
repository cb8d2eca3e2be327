"""Numbers on a mock board: every ttnn operation runs for real there, and its golden function runs in torch beside it.

A tensor on the mock has a *shadow*: one torch tensor per device of its mesh, in row-major order of the mesh, with the
values rounded to the tensor's type (by ttnn's own conversion for block formats). ttnn decides what is legal, which
shape, type and memory a result has; the golden function says its values; that both agree on the shape is checked.

    with shadowed():
        y = ttnn.to_torch(ttnn.silu(x))

Tensors on the host hold real data, so they need no shadow: whatever comes to the host is made anew from the shadow.

Values follow the golden functions: faults of kernels and their order of summation are not modelled. Traces cannot be
captured, since the mock has no program to record.
"""

import functools
import inspect
from contextlib import contextmanager

import torch
import ttnn
from ttnn.decorators import DEFAULT_OUTPUT_TENSOR_KWARG_NAMES, FastOperation

from models.board_mock import goldens
from models.board_mock.shadow_tensors import (
    DEVICE,
    PATCHES,
    TRANSFERS,
    ShadowTensor,
    ShapeMismatch,
    adopt,
    distinct,
    is_uniform,
    keep,
    owner_of,
    real_call,
    rounded,
    shadow_of,
    value,
)
from models.board_mock.shadow_tensors import (
    _shadows as _shadows,  # for tests
)

# ---- operations -----------------------------------------------------------------------------------------------------


def _collect(x, found):
    if isinstance(x, ttnn.Tensor):
        found.append(x)
    elif isinstance(x, (list, tuple)):
        for item in x:
            _collect(item, found)


def _pick(x, device, values):
    """The argument as the golden function on one device gets it."""
    if isinstance(x, ttnn.Tensor):
        own = values[id(x)]
        return own[device if len(own) > 1 else 0]
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return type(x)(_pick(item, device, values) for item in x)
    return x


@functools.cache
def _parameters(golden):
    return tuple(inspect.signature(golden).parameters)


def _golden_arguments(golden, kwargs):
    """The keyword arguments without those that have no influence on values."""
    return {
        name: x
        for name, x in kwargs.items()
        if x is not None and (name not in goldens.PLACEMENT or name in _parameters(golden))
    }


def _evaluate(golden, args, kwargs, tensors, values, count, **extra):
    """What the golden function gives, per device: lists of results with one entry for each output."""
    kwargs = _golden_arguments(golden, kwargs)

    def on(device):
        result = golden(
            *[_pick(x, device, values) for x in args],
            **{k: _pick(x, device, values) for k, x in kwargs.items()},
            **extra,
        )
        return result if isinstance(result, (list, tuple)) else [result]

    if all(is_uniform(values[id(tensor)]) for tensor in tensors):
        return [[result] * count for result in on(0)]
    return [list(results) for results in zip(*(on(device) for device in range(count)), strict=True)]


def _store(name, out, results, tensors, values):
    """The output with its shadow; an output that is one of the arguments has its shadow changed in place."""
    dtype, shape = out.dtype, tuple(out.shape)
    new = {}
    for (result,) in distinct(results):
        if tuple(result.shape) != shape:
            raise ShapeMismatch(f"{name}: ttnn infers {list(shape)}, the golden function gives {list(result.shape)}")
        new[id(result)] = rounded(result, dtype)
    stored = [new[id(result)] for result in results]
    for tensor in tensors:
        if tensor.tensor_id == out.tensor_id:
            shadow = shadow_of(tensor)
            if not all(new is old for new, old in zip(results, shadow.values, strict=True)):
                shadow.write(stored)
            return tensor
    if dtype == ttnn.bfloat16:  # rounded, so in memory of its own
        return keep(out, stored)
    inputs = {x.untyped_storage().data_ptr() for own in values.values() for x in own}
    fresh = {id(x): x.clone() if x.untyped_storage().data_ptr() in inputs else x for x in new.values()}
    return keep(out, [fresh[id(x)] for x in stored])


def _reshape(operation, input_tensor, *args, **kwargs):
    out = real_call(operation, input_tensor, *args, **kwargs)
    if out.storage_type() != DEVICE:
        return out
    if out.tensor_id == input_tensor.tensor_id:
        return input_tensor
    name = operation.python_fully_qualified_name
    values = shadow_of(input_tensor).values
    is_view = out.buffer_address() == input_tensor.buffer_address()
    shape, padded, old_padded = tuple(out.shape), tuple(out.padded_shape), tuple(input_tensor.padded_shape)
    new = {}
    for (x,) in distinct(values):
        if is_view and (old_padded != tuple(x.shape) or padded != shape) or x.numel() != torch.Size(shape).numel():
            # The same tiles under another shape: rows of padding become rows of the tensor, or the reverse.
            whole = x.new_zeros(old_padded)
            whole[tuple(slice(n) for n in x.shape)] = x
            if whole.numel() != torch.Size(padded).numel():
                raise ShapeMismatch(f"{name}: {list(x.shape)} (padded {list(old_padded)}) to {list(shape)}")
            new[id(x)] = whole.reshape(padded)[tuple(slice(n) for n in shape)].contiguous()
        elif is_view:
            new[id(x)] = x.view(shape) if x.is_contiguous() else x.reshape(shape)
        else:
            new[id(x)] = rounded(x.reshape(shape), out.dtype).clone()
    return adopt(out, [new[id(x)] for x in values])


def _groups(mesh_shape, cluster_axis):
    """Indices of the devices that a collective joins."""
    index = torch.arange(torch.Size(mesh_shape).numel()).reshape(mesh_shape)
    if cluster_axis is None:
        return [index.flatten().tolist()]
    return index.movedim(cluster_axis, -1).flatten(0, -2).tolist()


def _collective(operation, golden, args, kwargs):
    out = real_call(operation, *args, **kwargs)
    name = operation.python_fully_qualified_name
    outs = list(out) if isinstance(out, (list, tuple)) else [out]
    tensor = args[0] if args else kwargs["input_tensor"]
    values = shadow_of(tensor).values
    dim = {}
    if "dim" in _parameters(golden):
        dim["dim"] = kwargs["dim"] if "dim" in kwargs else args[1]
    results = [None] * len(values)
    for group in _groups(tuple(tensor.device().shape), kwargs.get("cluster_axis")):
        for device, result in zip(group, golden([values[i] for i in group], **dim), strict=True):
            results[device] = result
    stored = _store(name, outs[-1], results, [tensor], {id(tensor): values})
    for option in ("persistent_output_tensor", "persistent_output_buffer", "output_tensor"):
        target = kwargs.get(option)
        if isinstance(target, ttnn.Tensor) and target.tensor_id != stored.tensor_id:
            shadow_of(target).write(stored.shadow.values)
    return stored if not isinstance(out, (list, tuple)) else [*outs[:-1], stored]


def _in_place(operation, golden, written, args, kwargs):
    out = real_call(operation, *args, **kwargs)
    arguments = dict(zip(_parameters(golden), args, strict=False)) | kwargs
    tensors: list[ttnn.Tensor] = []
    _collect(list(arguments.values()), tensors)
    values = {id(tensor): value(tensor) for tensor in tensors}
    uniform = all(is_uniform(own) for own in values.values())
    for target, source in written.items():
        target, source = arguments[target], arguments.get(source)
        if source is not None and source.dtype != target.dtype:
            new = {id(x): rounded(x, target.dtype) for x in values[id(source)]}
            values[id(source)] = [new[id(x)] for x in values[id(source)]]
        shadow = shadow_of(target)
        shadow.separate(*([] if uniform else values.values()))
        values[id(target)] = shadow.values
    arguments = _golden_arguments(golden, arguments)
    for device in range(1 if uniform else max(len(own) for own in values.values())):
        golden(**{name: _pick(x, device, values) for name, x in arguments.items()})
    return _returned(out, tensors)


def _returned(out, tensors):
    """The output of an operation in place: the caller's own tensors where it is one of these."""
    if isinstance(out, (list, tuple)):
        return type(out)(_returned(item, tensors) for item in out)
    if isinstance(out, ttnn.Tensor):
        for tensor in tensors:
            if tensor.tensor_id == out.tensor_id:
                return tensor
        return owner_of(out, shadow_of(out))
    return out


def _general(operation, args, kwargs):
    out = real_call(operation, *args, **kwargs)
    outs: list[ttnn.Tensor] = []
    tensors: list[ttnn.Tensor] = []
    _collect([out], outs)
    _collect([args, list(kwargs.values())], tensors)
    on_device = [tensor for tensor in outs if tensor.storage_type() == DEVICE]
    if not on_device:
        if not outs and any(tensor.storage_type() == DEVICE for tensor in tensors):
            raise NotImplementedError(f"{operation.python_fully_qualified_name} has no golden function")
        return out  # on the host, with real data
    name = operation.python_fully_qualified_name
    if not operation.is_cpp_operation and all(isinstance(tensor, ShadowTensor) for tensor in on_device):
        return out  # made of operations that have given it a shadow
    golden = goldens.GOLDENS.get(name) or operation.golden_function
    if golden is None:
        raise NotImplementedError(f"{name} has no golden function")
    values = {id(tensor): value(tensor) for tensor in tensors}
    count = max([len(own) for own in values.values()], default=on_device[0].device().get_num_devices())
    extra: dict[str, object] = {}
    if golden in _TOLD_THE_SHAPE:
        extra["inferred_shape"] = tuple(outs[0].shape)
    if golden in _TOLD_THE_MEMORY:
        extra["memory_configs"] = [tensor.memory_config() for tensor in tensors]
    results = _evaluate(golden, args, kwargs, tensors, values, count, **extra)
    if len(results) != len(outs):
        raise ShapeMismatch(f"{name}: ttnn gives {len(outs)} tensors, the golden function {len(results)}")
    stored = [_store(name, one, result, tensors, values) for one, result in zip(outs, results, strict=True)]
    for option in DEFAULT_OUTPUT_TENSOR_KWARG_NAMES:
        target = kwargs.get(option)
        if isinstance(target, ttnn.Tensor) and target.tensor_id != stored[0].tensor_id:
            shadow_of(target).write(stored[0].shadow.values)
    return type(out)(stored) if isinstance(out, (list, tuple)) else stored[0]


_TOLD_THE_SHAPE = {golden for golden in goldens.GOLDENS.values() if "inferred_shape" in _parameters(golden)}
_TOLD_THE_MEMORY = {golden for golden in goldens.GOLDENS.values() if "memory_configs" in _parameters(golden)}

_VIEWS = {"ttnn.reshape", "ttnn.experimental.view", "ttnn.view"}


def _call(operation, *args, **kwargs):
    name = operation.python_fully_qualified_name
    if name in TRANSFERS:
        return TRANSFERS[name](operation, *args, **kwargs)
    if name in _VIEWS:
        return _reshape(operation, *args, **kwargs)
    with torch.no_grad():
        if name in goldens.IN_PLACE:
            return _in_place(operation, *goldens.IN_PLACE[name], args, kwargs)
        if name in goldens.COLLECTIVES:
            return _collective(operation, goldens.COLLECTIVES[name], args, kwargs)
        return _general(operation, args, kwargs)


# ---- switching ------------------------------------------------------------------------------------------------------

_PATCHES = [(FastOperation, "__call__", _call), *PATCHES]
_ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name, _ in _PATCHES]


def install():
    """Give every tensor made from now on a shadow, in this process, until `uninstall`."""
    for owner, name, function in _PATCHES:
        setattr(owner, name, function)


def uninstall():
    """Leave ttnn as it was; values of a mock tensor are zeros again."""
    for owner, name, function in _ORIGINALS:
        setattr(owner, name, function)


@contextmanager
def shadowed():
    """Shadow values within a `with` block; within another such block, nothing changes."""
    if FastOperation.__call__ is _call:
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()
