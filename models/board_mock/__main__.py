"""python -m models.board_mock BOARD SCRIPT [arguments], or BOARD -m MODULE [arguments]

Runs a program that uses ttnn on a mock board, unchanged, with numbers from golden functions.
"""

import os
import runpy
import sys

from models.board_mock import cluster
from models.boards import BOARDS
from models.cli.command import run_command
from models.errors import UserError


def prepare(arguments: list[str]) -> list[str]:
    """Switch the mock and its numbers on; returns the board and the program's own arguments."""
    if len(arguments) < 2 or arguments[1:] == ["-m"]:
        boards = ",".join((*BOARDS, *cluster.VARIANTS))
        raise UserError(f"usage: python -m models.board_mock {{{boards}}} (SCRIPT | -m MODULE) [arguments]")
    board, *program = arguments
    if program[0] != "-m" and not os.path.isfile(program[0]):
        raise UserError(f"no such script: {program[0]}")
    cluster.activate(board)
    from models.board_mock import shadow  # imports ttnn

    shadow.install()
    print(f"mock board {board}: numbers from golden functions, times mean nothing", file=sys.stderr)
    return program


def main():
    program: list[str] = []

    def prepared() -> int:
        program.extend(prepare(sys.argv[1:]))
        return 0

    status = run_command(prepared)
    if status:
        return status
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        sys.path.insert(0, os.path.dirname(os.path.abspath(program[0])))  # where Python itself would look first
        runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
