"""Modules of LLVM as code of this machine, kept in the user's cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from loguru import logger

from models.torch_llama.compiled.builder import Module
from models.user_cache import user_cache

_lock = threading.RLock()
_kept: list[Any] = []  # what owns code in memory: it stays there until the process ends, as workers may be running it


class Machine:
    """The CPU that code is made for: this one unless another one is named."""

    def __init__(self, cpu: str | None = None, features: str | None = None) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self.triple = llvm.get_process_triple()
        self.cpu = llvm.get_host_cpu_name() if cpu is None else cpu
        self.features = llvm.get_host_cpu_features().flatten() if features is None else features
        self._target: Any = None

    @property
    def registers(self) -> int:
        """Vectors of 16 fp32 numbers that its registers hold."""
        return 32 if "+avx512f" in self.features else 8

    @property
    def target(self) -> Any:
        """What LLVM makes code for."""
        if self._target is None:
            target = llvm.Target.from_triple(self.triple)
            self._target = target.create_target_machine(
                cpu=self.cpu, features=self.features, opt=3, reloc="pic", jit=True
            )
        return self._target

    def compile(self, module: Module) -> bytes:
        """A module as an object file."""
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        passes = llvm.create_pass_builder(self.target, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(parsed, passes)
        return self.target.emit_object(parsed)

    def link(self, code: bytes, functions: Mapping[str, Any]) -> dict[str, Any]:
        """The functions of an object file.

        Args:
            code: the file.
            functions: their names, with what they return and take as ctypes.

        Returns:
            each one as Python calls it, without the interpreter's lock; their addresses under their names and "_at".
        """
        linker = llvm.create_lljit_compiler(self.target)
        self._target = None  # it is the linker's now
        library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for name in functions:
            library.export_symbol(name)
        tracker = library.link(linker, "code")
        for each in (linker, tracker):
            each.detach()
            _kept.append(each)
        called = {name: ctypes.CFUNCTYPE(*types)(tracker[name]) for name, types in functions.items()}
        return called | {name + "_at": tracker[name] for name in functions}


def load(
    name: str,
    make: Callable[[Machine], Module],
    functions: Mapping[str, Any],
    sources: tuple[bytes, ...],
    directory: Path | None = None,
) -> dict[str, Any]:
    """What `Machine.link` says of a module's functions, which are compiled unless they have been before.

    Args:
        name: of the module.
        make: it.
        functions: as `Machine.link` takes them.
        sources: contents of the files that make it. Code is found as long as they, the machine and LLVM are the same.
        directory: where code is kept; None for the user's cache directory.
    """
    with _lock:
        machine = Machine()
        key = hashlib.sha256()
        for text in (machine.triple, machine.cpu, machine.features, llvmlite.__version__):
            key.update(text.encode() + b"\0")
        for source in sources:
            key.update(source)
        file = (directory or user_cache("kernels")) / f"{name}-{key.hexdigest()[:32]}.o"
        code = _read(file)
        if code is None:
            code = machine.compile(make(machine))
            _write(file, code)
        return machine.link(code, functions)


_DIGEST = 32  # bytes in front of the code, of all that follows


def _read(file: Path) -> bytes | None:
    """A file's code, if it is whole."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    code = data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == data[:_DIGEST] else None


def _write(file: Path, code: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "wb") as out:
            out.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, file)
    except OSError as error:
        logger.warning(f"compiled code is not kept in {file.parent}: {error}")
