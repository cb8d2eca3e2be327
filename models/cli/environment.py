"""What a result was measured with (versions, machine), and the JSON file it goes to."""

import datetime
import json
import os
import platform
import re
import stat
import tempfile
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


def check_writable(name: str, flag: str = "--json") -> None:
    """UserError, with the flag that named it, unless a file can be written; found out without leaving a trace."""
    path = Path(name)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(None, "permission denied")
        if not path.exists() or path.is_file():
            with tempfile.NamedTemporaryFile(dir=path.resolve().parent):
                pass
    except OSError as error:
        raise UserError(f"cannot write {flag} {name}: {error.strerror}: choose another file") from error


def write_json(name: str, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    text = re.sub(r"\[\n[\d\s.,e+-]+\]", lambda match: " ".join(match[0].split()), text)  # lists of numbers on one line
    write_text(name, text, "--json")


def write_text(name: str, text: str, flag: str) -> None:
    """Write a file whole or not at all: to a temporary one beside it, then renamed. Devices and pipes directly.

    A file that was there keeps its permissions. Raises UserError that names the flag and the file.
    """
    path = Path(name)
    try:
        if path.exists() and not path.is_file():  # /dev/stdout may be a link to a pipe that has no path
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)
    except BrokenPipeError:  # no fault of the file: its reader has gone
        raise
    except OSError as error:
        raise UserError(f"cannot write {flag} {name}: {error.strerror}: choose another file") from error


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, _permissions(path))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _permissions(path: Path) -> int:
    """Of a file that is there, else of a new one: a temporary file has neither."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
