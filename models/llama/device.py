"""Is the device that a model shall run on really there? Quick to import: torch is only asked about CUDA."""

import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from models.errors import UserError

BOARDS = ("N150", "N300", "T3K", "P150")
DEVICE_FILES = Path("/dev/tenstorrent")  # made by the kernel driver, one file per chip


def check_device(device: str, environ: Mapping[str, str] = os.environ) -> None:
    """UserError, with what to install or set, unless models can run on ``device``."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA GPU on this machine: use --device cpu")
    elif device == "tt":
        _check_tenstorrent(environ)
    elif device != "cpu":
        raise UserError(f"unknown device {device!r}: use cpu, cuda or tt")


def _check_tenstorrent(environ: Mapping[str, str]) -> None:
    board = environ.get("MESH_DEVICE")
    if board and board not in BOARDS:
        raise UserError(f"MESH_DEVICE={board} is no known board: set one of {', '.join(BOARDS)}")
    if importlib.util.find_spec("ttnn") is None:
        here = f"CPython {platform.python_version()} on {platform.machine()} {platform.system()}"
        raise UserError(
            "--device tt: ttnn is not installed: use CPython 3.10 or 3.12 on x86-64 Linux and "
            f"`pip install ttnn==0.81.1` (this is {here}), or use --device cpu"
        )
    if not any(DEVICE_FILES.glob("*")):
        raise UserError(
            f"--device tt: no Tenstorrent board was found (nothing in {DEVICE_FILES}): on a machine with a board set "
            f"MESH_DEVICE to one of {', '.join(BOARDS)}; here use --device cpu"
        )
    raise UserError("--device tt: TT-NN models are not part of this version: use --device cpu or cuda")
