"""What kernels are handed: their compile-time arguments and defines, as ttnn's own program factories choose them.

On a mock board ttnn makes every program as on silicon, and asks the stand-in for the compiler to compile its kernels.
Golden functions say what an operation means; what a kernel would do beside it can be read in its source (the wheel has
it) once its arguments are known. Those are here:

    def attend(mesh, rows):                   # a function of a module: it runs in another process
        model = ...
        model.greedy([1] * rows, 300)         # what stays from call to call is made
        with recorded(mesh) as kernels:
            model.greedy([1] * rows, 300)
        return kernels

    with MockProcess("N150") as process:
        kernels = process.run(attend, 5)
    reader, = named(kernels, "reader_decode_all")
    reader.compile_args[14], reader.named_args, reader.defines

A kernel is compiled once in a process and once in a cache on disk, so that a process records in a cache of its own,
and `recorded` empties it first. Arguments that a program sets at run time, core by core, are not seen, only the names
of those that have one.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from models.board_mock import cluster
from models.boards import BOARDS
from models.errors import UserError

if TYPE_CHECKING:
    import ttnn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# In a kernel's directory, which ttnn makes before it calls the compiler. The first file there names the source: of
# kernels that move data, or of those that compute.
_SOURCE_FILES = ("kernel_includes.hpp", "chlkc_unpack.cpp")
_DEFINES_FILE = "defines_generated.h"  # of kernels that compute; others get theirs by the command
_NAMED_ARGS_FILE = "named_ct_arg_map_generated.h"
_RUNTIME_ARGS_FILE = "kernel_args_generated.h"
_BINDINGS_FILE = "kernel_bindings_generated.h"
_ARGS_DEFINE = "KERNEL_COMPILE_TIME_ARGS"
_FIRST_DEFINE, _NAME_DEFINE = "KERNEL_BUILD", "FULL_KERNEL_NAME"  # those before the first one are of the chip


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is compiled for one processor of a core. Two programs with equal kernels share them.

    `get_compile_time_arg_val(i)` in its source is ``compile_args[i]``. Of a named argument, `get_arg(args::name)`, the
    value is in ``named_args`` if it is known when compiling, else its name is in ``runtime_args``.
    """

    source: str  # path in ttnn's package
    processor: str  # "brisc" and "ncrisc" move data, "trisc0" unpacks, "trisc1" computes, "trisc2" packs
    defines: dict[str, str]  # of its program; those of the chip and of the processor are left out
    compile_args: list[int]
    named_args: dict[str, int]
    runtime_args: list[str]
    semaphores: dict[str, int]  # `sem::name` -> id

    @property
    def name(self) -> str:
        """Of the source file, without its ending."""
        return Path(self.source).stem


def named(kernels: Iterable[Kernel], *names: str) -> list[Kernel]:
    """Those of some source files; names as `Kernel.name` has them."""
    return [kernel for kernel in kernels if kernel.name in names]


# ---- recording ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recorded(mesh_device: "ttnn.MeshDevice") -> Iterator[list[Kernel]]:
    """The kernels of all programs that the block runs on a mesh: in the list after the block, also when it fails.

    Programs are made anew in the block, those from before it are forgotten. Only in a `MockProcess`.

    Raises:
        RuntimeError: this process does not keep what the compiler is called with.
    """
    if cluster.COMMANDS_VARIABLE not in os.environ:
        raise RuntimeError("kernels are recorded in a process of their own: call recorded() in MockProcess.run()")
    import ttnn

    mesh_device.clear_program_cache()
    ttnn.device.ClearKernelCache()
    cache = Path(os.environ["TT_METAL_CACHE"])
    for directory in cache.glob("*/kernels"):
        shutil.rmtree(directory)
    kernels: list[Kernel] = []
    try:
        yield kernels
    finally:
        kernels += _read(cache)


class MockProcess:
    """A process of its own on a mock board, with its whole mesh open and a kernel cache that ends with it.

    It imports the script that makes it, which therefore needs `if __name__ == "__main__"`, and the modules of the
    functions that it runs.

    Args:
        board: a name of `boards.BOARDS`.

    Raises:
        UserError: no such board, or ttnn is not installed.
    """

    def __init__(self, board: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="kernels-", dir=cluster.cache_directory())
        try:
            environment = cluster.environment(board, self._directory.name) | {cluster.COMMANDS_VARIABLE: "1"}
        except UserError:
            self._directory.cleanup()
            raise
        self._executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=cluster.quieten)
        with _variables(environment):  # from its start: what it imports first may import ttnn
            self._executor.submit(os.getpid).result()

    def run(
        self,
        function: Callable[Concatenate[Any, Parameters], Result],
        *arguments: Parameters.args,
        **options: Parameters.kwargs,
    ) -> Result:
        """function(mesh, *arguments, **options) in that process. What goes there and what comes back is pickled.

        Raises:
            Exception: what the function raised.
        """
        return self._executor.submit(_run, function, arguments, options).result()

    def close(self) -> None:
        """Close the mesh, end the process and remove its directory."""
        try:
            self._executor.submit(_leave).result()
        finally:
            self._executor.shutdown()
            self._directory.cleanup()

    def __enter__(self) -> "MockProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """The environment with these values for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---- in the other process -------------------------------------------------------------------------------------------

_open: "list[ttnn.MeshDevice]" = []


def _mesh() -> "ttnn.MeshDevice":
    import ttnn

    if not _open:
        board = BOARDS[Path(os.environ[cluster.MOCK_VARIABLE]).stem]
        options = {}
        if board.chips > 1:
            ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D)
            # As the models open it; with Ethernet cores a mock reports a row of workers that it does not have.
            options["dispatch_core_config"] = ttnn.DispatchCoreConfig(ttnn.DispatchCoreType.WORKER)
        _open.append(ttnn.open_mesh_device(ttnn.MeshShape(*board.mesh_shape), **options))
    return _open[0]


def _run(function: Callable[..., Result], arguments: tuple, options: dict) -> Result:
    return function(_mesh(), *arguments, **options)


def _leave() -> None:
    while _open:
        import ttnn

        ttnn.close_mesh_device(_open.pop())


# ---- reading what ttnn wrote ----------------------------------------------------------------------------------------


def _read(cache: Path) -> list[Kernel]:
    """The kernels in a cache directory that has the compiler's commands, sorted by source and processor."""
    kernels = [_kernel(command) for command in cache.glob(f"*/kernels/*/*/*/{cluster.COMMAND}")]
    return sorted(kernels, key=lambda kernel: (kernel.source, kernel.processor, repr(kernel)))


def _kernel(command: Path) -> Kernel:
    """Of kernels/NAME/HASH/PROCESSOR/command, with the files that ttnn wrote into kernels/NAME/HASH."""
    directory = command.parent.parent
    defines = _defines(re.findall(r"^-D(.*)$", command.read_text(), re.MULTILINE))
    own = list(defines)
    defines = {name: defines[name] for name in own[own.index(_FIRST_DEFINE) + 1 :]}
    values = defines.pop(_ARGS_DEFINE, "")
    defines.pop(_NAME_DEFINE, None)
    generated = re.findall(r"^#define (\w+) *(.*?) *$", _text(directory / _DEFINES_FILE), re.MULTILINE)
    bindings = _text(directory / _BINDINGS_FILE)
    return Kernel(
        source=_source(directory),
        processor=command.parent.name,
        defines={**defines, **dict(generated)},
        compile_args=[int(value) for value in values.split(",") if value],
        named_args={
            name: int(value) for name, value in re.findall(r'\{"(\w+)",(\d+)\}', _text(directory / _NAMED_ARGS_FILE))
        },
        runtime_args=re.findall(r"::\w*RtaArg<\w+> (\w+)\{", _text(directory / _RUNTIME_ARGS_FILE)),
        semaphores={name: int(value) for name, value in re.findall(r"SemaphoreBindingToken (\w+)\{(\d+)u", bindings)},
    )


def _defines(options: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME, as a compiler takes them."""
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def _source(directory: Path) -> str:
    """The last file that the first of `_SOURCE_FILES` includes, below the runtime root."""
    text = next(text for name in _SOURCE_FILES if (text := _text(directory / name)))
    path = re.findall(r'^#include "(.+)"$', text, re.MULTILINE)[-1]
    return path.removeprefix(os.environ["TT_METAL_RUNTIME_ROOT"] + "/")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
