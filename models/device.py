"""Is the device that a model shall run on really there?

Quick to import: torch is only asked about CUDA, ttnn not at all.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from models.boards import SILICON, SIMULATOR, SIMULATOR_VARIABLE, board_of_environment, board_titles, medium
from models.errors import UserError

TTNN_VERSION = "0.81.1"  # as pinned in pyproject.toml: the one that these models were checked with
DEVICE_FILES = Path("/dev/tenstorrent")  # made by the kernel driver, one file per chip


def check_device(device: str, environ: Mapping[str, str] = os.environ) -> None:
    """UserError, with what to install or set, unless models can run on ``device``.

    "tt" is a board, or a simulator or mock of one (`models.simulator`, `models.board_mock`); another ttnn than the
    pinned one is warned about, once.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA GPU on this machine: use --device cpu")
    elif device == "tt":
        _check_tenstorrent(environ)
    elif device != "cpu":
        raise UserError(f"unknown device {device!r}: use cpu, cuda or tt")


def _check_tenstorrent(environ: Mapping[str, str]) -> None:
    board_of_environment(environ)
    if importlib.util.find_spec("ttnn") is None:
        here = f"CPython {platform.python_version()} on {platform.machine()} {platform.system()}"
        raise UserError(
            "--device tt: ttnn is not installed: use CPython 3.10 or 3.12 on x86-64 Linux and "
            f"`pip install ttnn=={TTNN_VERSION}` (this is {here}), or use --device cpu"
        )
    made_of = medium()  # of this process: ttnn reads its variables, too
    if made_of == SIMULATOR and not Path(os.environ[SIMULATOR_VARIABLE]).exists():
        raise UserError(
            f"{SIMULATOR_VARIABLE}={os.environ[SIMULATOR_VARIABLE]}: there is no such file: set it to a simulator's "
            "library, or unset it"
        )
    if made_of == SILICON and not any(DEVICE_FILES.glob("*")):
        raise UserError(
            f"--device tt: no Tenstorrent board was found (nothing in {DEVICE_FILES}): use --device cpu here, or "
            f"scripts/check_board.py to try a model on a board ({board_titles()}) that is not there"
        )
    _warn_of_another_ttnn()


@functools.cache
def _warn_of_another_ttnn() -> None:
    try:
        found = importlib.metadata.version("ttnn")
    except importlib.metadata.PackageNotFoundError:
        found = "of unknown version"  # a source tree on the path
    if found != TTNN_VERSION:
        from loguru import logger

        logger.warning(
            f"ttnn {found} is installed, these models were checked with ttnn {TTNN_VERSION}: operations may be "
            f"refused or differ; `pip install ttnn=={TTNN_VERSION}` puts it right"
        )
