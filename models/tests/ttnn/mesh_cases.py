"""Opens and closes the whole board in every way that `test_mesh.py` asks about; prints what happened as JSON.

A process of its own, because a process has one board and that of the tests stays open. ttnn is real; only its calls
that open and close are noted down on their way, and fail or are interrupted where a case says so.
"""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import torch
import ttnn

from models.boards import BOARDS, Board
from models.errors import UserError
from models.ttnn_llama.device.mesh import Meshes, detect_board, open_mesh

calls: list[str] = []
after: dict[str, Callable[[], None]] = {}  # what to do once the real call is over, by the name of the call


def noted(name):
    real = getattr(ttnn, name)

    def call(*args, **kwargs):
        about = args[0].name if name == "set_fabric_config" else tuple(getattr(args[0], "shape", args[0]))
        calls.append(f"{name} {about}")
        result = real(*args, **kwargs)
        if name in after:
            after.pop(name)()
        return result

    setattr(ttnn, name, call)


def closing_fails():
    raise RuntimeError("TT_FATAL @ /project/a.cpp:1: condition\ninfo:\nclosing went wrong.\nbacktrace:\n --- lib.so")


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def work(meshes: Meshes):
    """An op on every mesh, and a collective where there is one; shapes of the results per mesh."""
    shapes = []
    for mesh in [meshes.target] if meshes.draft is meshes.target else [meshes.target, meshes.draft]:
        ones = ttnn.from_torch(
            torch.ones(1, 1, 32, 64),
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh,
            mesh_mapper=ttnn.ReplicateTensorToMesh(mesh),
        )
        result = ttnn.silu(ones)
        if mesh.get_num_devices() > 1:
            result = ttnn.all_reduce(result)
        shapes.append([mesh.get_num_devices(), list(result.shape)])
    return shapes


def case(board: Board, body, *, own_chip=False, **fails):
    """What opening `board` around `body` gives: result, error, and the calls that opened and closed."""
    calls.clear()
    after.clear()
    after.update(fails)
    outcome = {"result": None, "error": None, "kind": None}
    try:
        with open_mesh(board, trace_region_bytes=0, own_chip_for_draft=own_chip) as meshes:
            outcome["result"] = body(meshes)
    except BaseException as error:
        outcome |= {"error": str(error), "kind": type(error).__name__}
    return outcome | {"calls": list(calls)}


def memory(meshes: Meshes):
    view = ttnn.get_memory_view(meshes.target, ttnn.BufferType.DRAM)
    return [view.num_banks, view.num_banks * view.total_bytes_per_bank]


def raises(kind, message=""):
    def body(_):
        raise kind(message)

    return body


def main():
    for name in ("set_fabric_config", "open_mesh_device", "close_mesh_device"):
        noted(name)
    board = detect_board({})
    found = {"board": board.name}
    for name in BOARDS:
        try:
            found[name] = detect_board({"MESH_DEVICE": name}).name
        except UserError as error:
            found[name] = str(error)
    too_large = replace(board, name="4xT3K", mesh_shape=(4, 8))
    other_banks = replace(board, name="P100", dram_banks=7)
    outcomes = {
        "found": found,
        "memory": case(board, memory),
        "whole": case(board, work),
        "too large": case(too_large, work),
        "other banks": case(other_banks, work),
        "raises": case(board, raises(ValueError, "the body's own")),
        "ctrl-c in the body": case(board, lambda _: press_ctrl_c()),
        "ctrl-c while opening": case(board, work, open_mesh_device=press_ctrl_c),
        "ctrl-c while closing": case(board, work, close_mesh_device=press_ctrl_c),
        "closing fails": case(board, work, close_mesh_device=closing_fails),
        "both fail": case(board, raises(ValueError, "the body's own"), close_mesh_device=closing_fails),
        "whole again": case(board, work),
        "own chip": case(board, work, own_chip=True),
        "own chip raises": case(board, raises(ValueError, "the body's own"), own_chip=True),
    }
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
