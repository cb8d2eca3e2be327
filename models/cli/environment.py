"""What a result was measured with (versions, machine), and the JSON file it goes to."""

import contextlib
import datetime
import errno
import json
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.boards import MOCK
from models.errors import UserError

if TYPE_CHECKING:
    from models.boards import Board

PROJECT = "tt-speculative-llama"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "ttnn")


def project_version() -> str:
    """The version of the installed project, "unknown" where it is not installed."""
    return _installed(PROJECT) or "unknown"


def date() -> str:
    """Now, in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Versions of the project, Python and the packages that the numbers depend on; None for one not installed."""
    packages = {package: _installed(package) for package in PACKAGES}
    return {"project": project_version(), "python": platform.python_version(), **packages}


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: str, board: "Board | None" = None, timed: bool = True) -> dict[str, Any]:
    """Processor, memory and device that the numbers come from. Where it is not ``timed``, times are no numbers."""
    import torch

    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "board": board and board.name,
        "chips": board and board.chips,
        "arch": board and board.arch,
        "ttnn": versions()["ttnn"] if board else None,
        "medium": board and board.medium,
        "mock": board is not None and board.medium == MOCK,
        "timed": timed,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def peak_memory(device: str) -> dict[str, int | None]:
    """Largest resident memory of this process so far and, on CUDA, the largest memory of tensors; bytes."""
    import resource
    import sys

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "cuda_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def check_outputs(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None] | None = None) -> None:
    """UserError unless all files of a command can be written and none overwrites another one, or what is read.

    Args:
        outputs: by the flag that names them; None or "" for those that were not asked for.
        inputs: files and directories that are read, by flag; of a directory no file that is there may be written.
    """
    written = {flag: name for flag, name in outputs.items() if name}
    for flag, name in written.items():
        check_writable(name, flag)
        for other, file in written.items():
            if other == flag:
                break
            if os.path.realpath(name) != os.devnull and _same(name, file):
                raise UserError(f"{other} and {flag} both write {name}: choose another file for one of them")
        for source, read in (inputs or {}).items():
            if read and _overwrites(name, os.path.expanduser(read)):
                raise UserError(f"{flag} {name} would overwrite what {source} reads: choose another file")


def _same(one: str, other: str) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _overwrites(name: str, read: str) -> bool:
    if not (os.path.exists(name) and os.path.exists(read)) or os.path.realpath(name) == os.devnull:
        return False
    if os.path.isdir(read):
        return os.path.realpath(name).startswith(os.path.join(os.path.realpath(read), ""))
    return os.path.samefile(name, read)


def check_writable(name: str, flag: str = "--json") -> None:
    """UserError, with the flag that named it, unless a file can be written; found out without leaving a trace."""
    path = Path(name)
    try:
        if (descriptor := _descriptor(name)) is not None:
            import fcntl

            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise PermissionError(None, "it is open for reading only")
            return
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if path.exists():
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "permission denied")
        else:
            os.stat(path.resolve().parent)
            with tempfile.NamedTemporaryFile(dir=path.resolve().parent):
                pass
            if path.is_symlink() and not path.resolve().parent.is_dir():
                raise FileNotFoundError(None, "it leads to a directory that is not there")
            with contextlib.suppress(FileNotFoundError):
                os.stat(path)  # a name that is too long, a loop of links
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(name, flag, error) from error


def write_json(name: str, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\n[\d\s.,e+-]+\]", lambda match: " ".join(match[0].split()), text)  # lists of numbers on one line
    write_text(name, text, "--json")


def write_text(name: str, text: str, flag: str) -> None:
    """Write a file whole or not at all: to a temporary one beside it, then renamed. Devices, pipes, open files of this
    process (/dev/stdout, /dev/fd/N) and files whose directory allows no renaming are written directly.

    A file that was there keeps its permissions. Text that is no UTF-8, which names of files may be, is written as
    JSON's escapes. Raises UserError that names the flag and the file.
    """
    path = Path(name)
    data = text.encode("utf-8", "backslashreplace")
    try:
        if (descriptor := _descriptor(name)) is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()  # what was printed before comes first
            with open(os.dup(descriptor), "wb") as file:
                file.write(data)
        elif path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            _replace(path.resolve(), data)
    except BrokenPipeError:  # no fault of the file: its reader has gone
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(name, flag, error) from error


def _unwritable(name: str, flag: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(f"cannot write {flag} {name}: {reason}: choose another file")


_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_RENAMING_IMPOSSIBLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


def _descriptor(name: str) -> int | None:
    """Of a name that stands for an open file of this process."""
    if name in _STREAMS:
        return _STREAMS[name]
    match = re.fullmatch(r"(?:/dev|/proc/self)/fd/(\d{1,9})", name)
    return int(match[1]) if match else None


def _replace(path: Path, data: bytes) -> None:
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, _permissions(path))
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        if error.errno not in _RENAMING_IMPOSSIBLE or not path.is_file():
            raise
        path.write_bytes(data)
    except BaseException:
        _remove(temporary)
        raise


def _remove(temporary: str | None) -> None:
    if temporary:
        Path(temporary).unlink(missing_ok=True)


def _permissions(path: Path) -> int:
    """Of a file that is there, else of a new one: a temporary file has neither."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
