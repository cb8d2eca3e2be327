"""The chips of a board opened as a mesh, and closed again whatever happens.

A board that is left open, or a fabric that is left on, makes the next program on that machine hang: everything here
is closed in reverse order after errors and Ctrl-C too.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from loguru import logger

from models.boards import BOARDS, Board, as_found, board_of_environment, board_titles
from models.errors import UserError

if TYPE_CHECKING:
    import ttnn

L1_SMALL_BYTES = 32768  # a core, where several chips work together
Closers = list[tuple[str, Callable[[], None]]]  # what it closes, how; in the order of opening
# What to do about an error of ttnn, by words in it. After any other one the board may be in no state to go on.
REMEDIES = {
    "sfpi not found": "ttnn's wheel comes without its kernel compiler: install it with "
    "`.venv/bin/python scripts/install_sfpi.py`",
    "No chips detected": "look for the board with `tt-smi -ls`, or use --device cpu",
}
RESET = "reset the board with `tt-smi -r` and run the command again"


@dataclass(frozen=True)
class Meshes:
    """Where the two models run. ``target`` is ``draft`` when they share the chips."""

    target: "ttnn.MeshDevice"
    draft: "ttnn.MeshDevice"
    board: Board


def target_chips(board: Board, *, own_chip_for_draft: bool = False) -> int:
    """How many chips the target is spread over.

    All of them, or with a chip set aside for the draft the largest power of two that is left: every Llama 3.x has a
    power of two of kv heads, which a power of two of chips divides. Raises UserError if no chip is left.
    """
    if not own_chip_for_draft:
        return board.chips
    if board.chips == 1:
        several = ", ".join(other.title for other in BOARDS.values() if other.chips > 1)
        raise UserError(
            f"a chip of its own for the draft needs 2 chips, {board.name} has 1: share it, or use one of {several}"
        )
    return 1 << ((board.chips - 1).bit_length() - 1)


def detect_board(environ: Mapping[str, str] = os.environ) -> Board:
    """The board that MESH_DEVICE names, else the one whose number and architecture of chips is found; what it
    is made of (`Board.medium`) is read from this process's environment.

    Raises UserError for an unknown name, for a board that the chips found cannot form, and for chips that form none
    of the boards.
    """
    board = board_of_environment(environ)
    ttnn = _import_ttnn()
    with errors_passed_on("the chips could not be read"):
        chips, arch = ttnn.get_num_devices(), ttnn.get_arch_name()
    if board is None:
        for board in BOARDS.values():
            if (board.chips, board.arch) == (chips, arch):
                return as_found(board)
        known = ", ".join(f"{board.title}: {board.chips} {board.arch}" for board in BOARDS.values())
        raise UserError(f"found {chips} {arch} chips, none of the boards ({known}): set MESH_DEVICE to the one to use")
    if board.arch != arch:
        raise UserError(f"MESH_DEVICE={board.name} is a {board.arch}, found {arch}: unset MESH_DEVICE to detect it")
    if board.chips > chips:
        raise UserError(
            f"MESH_DEVICE={board.name} needs {board.chips} chips, found {chips}: unset MESH_DEVICE to detect the "
            "board; if a chip is missing, look for it with `tt-smi -ls`"
        )
    return as_found(board)


@contextlib.contextmanager
def open_mesh(board: Board, *, trace_region_bytes: int, own_chip_for_draft: bool = False) -> Iterator[Meshes]:
    """Open the board for the block and close it afterwards.

    Args:
        board: which chips; `detect_board` finds it.
        trace_region_bytes: DRAM per chip that is set aside for traces.
        own_chip_for_draft: the first chip is the draft's, the last `target_chips` are the target's. Otherwise both
            models have all of them.

    Raises:
        UserError: there is no chip left for the target; or ttnn could not open the board or close it, with what it
            says. An error while closing is only logged when the block raised one.
    """
    columns = target_chips(board, own_chip_for_draft=own_chip_for_draft)
    closers: Closers = []
    try:
        with _interrupts_held():  # between opening something and noting how to close it
            meshes = _open(board, trace_region_bytes, columns, own_chip_for_draft, closers)
        yield meshes
    except BaseException:
        for error in _close(closers):
            logger.error(str(error))
        raise
    errors = _close(closers)
    for error in errors[1:]:
        logger.error(str(error))
    if errors:
        raise errors[0]


def _open(board: Board, trace_region_bytes: int, columns: int, own_chip_for_draft: bool, closers: Closers) -> Meshes:
    ttnn = _import_ttnn()
    arguments = {}
    with errors_passed_on(f"{board.name} could not be opened"):
        # On one chip there is nothing to connect, and the fabric waits for a neighbour (tt-metal issue 55519).
        if board.chips > 1:
            ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D)
            closers.append(("the fabric", lambda: ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)))
            # Collectives keep their semaphores there; in main L1 the fabric may overwrite them (tt-metal issue 56769).
            arguments["l1_small_size"] = L1_SMALL_BYTES
        if ttnn.get_num_devices() > 1:
            # Dispatch on Ethernet cores, the default of such cards, would leave one more row of workers; mock boards do
            # not have it, and this way the grid on silicon is the one that the mock has checked.
            arguments["dispatch_core_config"] = ttnn.DispatchCoreConfig(ttnn.DispatchCoreType.WORKER)
        mesh = ttnn.open_mesh_device(
            ttnn.MeshShape(*board.mesh_shape), trace_region_size=trace_region_bytes, **arguments
        )
        closers.append(("the mesh", lambda: ttnn.close_mesh_device(mesh)))
        banks = mesh.dram_grid_size().x
        if banks != board.dram_banks:
            raise UserError(
                f"{board.name} has {board.dram_banks} DRAM banks a chip, the chip found has {banks}: "
                f"it is another product (boards: {board_titles()})"
            )
        if not own_chip_for_draft:
            return Meshes(target=mesh, draft=mesh, board=board)

        def child(first: int, chips: int, name: str):
            part = mesh.create_submesh(ttnn.MeshShape(1, chips), ttnn.MeshCoordinate(0, first))
            closers.append((name, lambda: ttnn.close_mesh_device(part)))
            return part

        # From here on only the children work: a parent that has worked as well cannot be closed.
        draft = child(0, 1, "the draft's chip")
        target = child(board.chips - columns, columns, "the target's chips")
        return Meshes(target=target, draft=draft, board=board)


def _close(closers: Closers) -> list[UserError]:
    """Close everything, last opened first; what went wrong."""
    errors = []
    with _interrupts_held():
        while closers:
            name, close = closers.pop()
            try:
                with errors_passed_on(f"{name} could not be closed"):
                    close()
            except UserError as error:
                errors.append(error)
    return errors


def _import_ttnn() -> ModuleType:
    try:
        import ttnn
    except ImportError as error:
        raise UserError(f"ttnn cannot be loaded: {error}: install ttnn and the system libraries it needs") from error
    return ttnn


@contextlib.contextmanager
def errors_passed_on(what: str) -> Iterator[None]:
    """ttnn's errors as one line: ``what`` failed, ttnn's own message, and the remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # nanobind maps C++ exceptions to several classes
        message = first_line(error)
        remedy = next((remedy for words, remedy in REMEDIES.items() if words in message), RESET)
        raise UserError(f"{what}: {message}: {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error of ttnn says: without the source line before it and the backtrace after it.

    A failed assertion of ttnn reads "TT_FATAL @ file:line: condition", "info:", the message, "backtrace:".
    """
    lines = [line.strip().rstrip(".") for line in str(error).partition("backtrace:")[0].splitlines() if line.strip()]
    if "info:" in lines[:-1]:
        return lines[lines.index("info:") + 1]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block. Only the main thread gets signals, so others need nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if pressed:
            signal.raise_signal(signal.SIGINT)
