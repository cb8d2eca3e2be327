"""Switch ttnn to its mock cluster: a whole board in software, without a driver and without the RISC-V compiler.

ttnn's mock mode replaces the driver by a cluster descriptor, a YAML file. What is missing then is the compiler that
ttnn calls for every kernel: it looks for it below its runtime root, so the mock has a runtime root of its own, made of
links into the installed package and a shell script in the compiler's place. Validation of arguments, shapes, memory
and programs are ttnn's own; kernels do nothing. Nothing in the installed package changes.

Standard library only: importable where ttnn is not installed.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

from models.boards import BOARDS, MOCK_VARIABLE, SIMULATOR_VARIABLE, Board, board_named, is_mock
from models.errors import UserError

LOG_LEVEL_VARIABLE = "TT_LOGGER_LEVEL"
COMMANDS_VARIABLE = "TT_MOCK_KEEP_COMMANDS"  # set: what the compiler is called with is kept beside what it makes
COMMAND = "command"  # the file's name, an argument a line

# ---- cluster descriptors --------------------------------------------------------------------------------------------

# The kind of card stands in bits 36-55.
CARD_IDS = {"n150": 0x18 << 36, "n300": 0x14 << 36, "p150": 0x40 << 36, "p300": 0x44 << 36}

# Boards as they also come: name -> (board, what is harvested). A p150a or p150b has all 14 columns of cores, of which
# ttnn keeps one; others have one column off, or two as the board of the table has.
VARIANTS = {"P150-13x10": ("P150", (0,)), "P150-12x10": ("P150", (64,))}


def board_of(name: str) -> Board:
    """The board that a mock of that name is: one of `boards.BOARDS`, or of `VARIANTS` with its own wiring. Raises
    UserError for any other."""
    board, harvested = VARIANTS.get(name, (name, None))
    found = board_named(board)
    if harvested is None:
        return found
    return dataclasses.replace(found, wiring=dataclasses.replace(found.wiring, harvested=harvested))


def descriptor(board: Board) -> str:
    """YAML text that ttnn reads as the cluster descriptor of a board."""
    wiring, chips = board.wiring, range(board.chips)
    lines = ["arch:"]
    lines += [f"  {chip}: {board.arch}" for chip in chips]
    lines += ["chips:"]
    lines += [f"  {chip}: [{x}, {y}, 0, 0]" for chip, (x, y) in enumerate(wiring.places)] or ["  {}"]
    lines += ["ethernet_connections:"]
    lines += [
        f"  - [{{chip: {a}, chan: {a_channel}}}, {{chip: {b}, chan: {b_channel}}}]"
        for a, a_channel, b, b_channel in wiring.links
    ] or ["  []"]
    lines += ["chips_with_mmio:"]
    lines += [f"  - {chip}: {chip}" for card in wiring.cards for chip in card[: wiring.on_pcie]]
    lines += ["harvesting:"]
    lines += [
        f"  {chip}: {{noc_translation: true, harvest_mask: {rows}, dram_harvesting_mask: 0, "
        f"eth_harvesting_mask: {wiring.harvested_ethernet}, pcie_harvesting_mask: {pcie}}}"
        for chip, rows, pcie in zip(chips, wiring.harvested, wiring.harvested_pcie or [0] * board.chips, strict=True)
    ]
    lines += ["boards:"]
    lines += [
        f"  - [{{board_id: {CARD_IDS[wiring.card] + i}}}, {{board_type: {wiring.card}}}, {{chips: {list(card)}}}]"
        for i, card in enumerate(wiring.cards)
    ]
    lines += ["chip_unique_ids:"]
    lines += [f"  {chip}: {chip + 1}" for chip in chips]
    if wiring.on_pcie > 1:  # which half of its card a chip is: the halves of a p300 differ in what is harvested
        lines += ["asic_locations:"]
        lines += [f"  {chip}: {place}" for card in wiring.cards for place, chip in enumerate(card)]
    return "\n".join(lines) + "\n"


# ---- the stand-in for the compiler ----------------------------------------------------------------------------------

# Called with --version, to compile one source (-o X.o -MF X.d SOURCE), and to link (-o X.elf), thousands of times: it
# starts no other program, but to rename what it links. That is written under a temporary name first, as another process
# may be waiting to read the result; nobody reads an object.
COMPILER = rf"""#!/bin/sh
# Stands where ttnn looks for its RISC-V compiler. Compiles nothing: every program it links is the same empty one.
root=${{0%/runtime/*}}
[ "$1" = --version ] && exec cat "$root/version"
previous='' output='' dependencies='' source=''
for argument; do
  case $previous in
    -o) output=$argument ;;
    -MF) dependencies=$argument ;;
  esac
  case $argument in
    *.cc | *.cpp | *.c) source=$argument ;;
  esac
  previous=$argument
done
[ -z "$dependencies" ] || printf '%s: %s\n' "$output" "$source" >"$dependencies"
[ -z "${COMMANDS_VARIABLE}" ] || [ -z "$dependencies" ] || printf '%s\n' "$@" >"${{dependencies%/*}}/{COMMAND}"
case $output in
  *.elf) printf '{{program}}' >"$output.$$" && exec mv -f "$output.$$" "$output" ;;
  *) echo >"$output" ;;
esac
"""

# With the version of the wheel's own compiler, ttnn takes the firmware that comes with the wheel.
VERSION = "riscv-tt-elf-g++ (tenstorrent/sfpi:{sfpi_version}[{sfpi_build}]) 15.1.0\n"


def empty_program() -> bytes:
    """An ELF file that ttnn loads as the program of any processor: it returns at once.

    What ttnn asks of it: a 32-bit RISC-V executable whose first loaded segment is the code, with the entry at its
    start; whose second one begins with `.data` and is stored right behind the code; and one table of relocations.
    """
    code_at, data_at = 0x4A00, 0xFFB00E00
    code = struct.pack("<4I", 0x00008067, *[0x00000013] * 3)  # ret, then nops
    header_size, segment_size, section_size, segments = 52, 32, 40, 2
    # name, type, flags, address, content, link, info, entry size
    sections = [
        (b"", 0, 0, 0, b"", 0, 0, 0),
        (b".text", 1, 6, code_at, code, 0, 0, 0),
        (b".data", 1, 3, data_at, b"", 0, 0, 0),
        (b".rela.text", 4, 0x40, 0, struct.pack("<3I", code_at, 0, 0), 4, 1, 12),
        (b".symtab", 2, 0, 0, bytes(16) + struct.pack("<3I2BH", 1, code_at, len(code), 0x12, 0, 1), 5, 1, 16),
        (b".strtab", 3, 0, 0, b"\0_start\0", 0, 0, 0),
    ]
    names = b"\0".join(section[0] for section in sections) + b"\0.shstrtab\0"
    sections.append((b".shstrtab", 3, 0, 0, names, 0, 0, 0))

    position = header_size + segments * segment_size
    contents, table = b"", b""
    offsets = []
    for name, kind, flags, address, content, link, info, entry in sections:
        offsets.append(position)
        name_at = names.index(name + b"\0")
        table += struct.pack(
            "<10I", name_at, kind, flags, address, position, len(content), link, info, 4 if kind else 0, entry
        )
        content += bytes(-len(content) % 4)
        contents += content
        position += len(content)
    program_headers = struct.pack("<8I", 1, offsets[1], code_at, code_at, len(code), len(code), 5, 16)
    program_headers += struct.pack("<8I", 1, offsets[2], data_at, code_at + len(code), 0, 0, 6, 16)
    executable, riscv = 2, 243
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0") + struct.pack(
        "<2H5I", executable, riscv, 1, code_at, header_size, position, 0
    )
    header += struct.pack("<6H", header_size, segment_size, segments, section_size, len(sections), len(sections) - 1)
    return header + program_headers + contents + table


def compiler() -> str:
    """The stand-in as a shell script, with its program in octal, as the `printf` of any shell takes it."""
    return COMPILER.replace("{program}", "".join(f"\\{byte:03o}" for byte in empty_program()))


# ---- the runtime root -----------------------------------------------------------------------------------------------


def _package() -> Path:
    spec = importlib.util.find_spec("ttnn")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "ttnn is not installed here: its wheels are for CPython 3.12 and 3.10 on x86-64 Linux (pip install ttnn)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def cache_directory() -> Path:
    """A directory of this user alone, with a path that ttnn can put into a shell command."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    candidate = Path(home, "tt-speculative-llama", "ttnn_mock")
    if candidate.is_absolute() and re.fullmatch(r"[\w./+-]+", str(candidate), re.ASCII):
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=candidate):
                return candidate
        except OSError:
            pass  # a home that cannot be written to
    candidate = Path(tempfile.gettempdir(), f"tt-speculative-llama-ttnn_mock-{os.getuid()}")
    candidate.mkdir(mode=0o700, exist_ok=True)
    if candidate.stat().st_uid != os.getuid():
        raise UserError(f"{candidate} belongs to another user: set XDG_CACHE_HOME to a directory of your own")
    return candidate


def _put(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write the file unless it is there already; a reader sees all of it or nothing."""
    try:
        if path.read_bytes() == content:
            return
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.chmod(mode)
    part.replace(path)


def _link(path: Path, target: Path) -> None:
    if path.is_symlink() and path.readlink() == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.symlink_to(target)
    part.replace(path)


def _make_root(where: Path | None) -> Path:
    """The runtime root of the installed ttnn, made or completed; one per installation of ttnn."""
    package = _package()
    if where is None:
        where = cache_directory() / hashlib.sha256(str(package).encode()).hexdigest()[:12]
    root = Path(where).absolute()
    for name in ("tt_metal", "ttnn", "runtime/hw"):
        _link(root / name, package / name)
    versions = dict(re.findall(r"^(\w+)='?([^'\n]*)'?$", (package / "tt_metal/sfpi-version").read_text(), re.MULTILINE))
    _put(root / "version", VERSION.format_map({"sfpi_version": "", "sfpi_build": "", **versions}).encode())
    _put(root / "runtime/sfpi/compiler/bin/riscv-tt-elf-g++", compiler().encode(), 0o755)
    for name in (*BOARDS, *VARIANTS):
        _put(root / f"{name}.yaml", descriptor(board_of(name)).encode())
    return root


# ---- switching ------------------------------------------------------------------------------------------------------


def environment(board: str, where: str | os.PathLike | None = None) -> dict[str, str]:
    """The variables that put a process of ttnn on a mock `board`, for `subprocess`; makes what they point at.

    Args:
        board: a name of `boards.BOARDS` or of `VARIANTS`.
        where: directory for the runtime root; by default one in the user's cache directory.

    Raises:
        UserError: no such board, or ttnn is not installed.
    """
    board_of(board)
    root = _make_root(None if where is None else Path(where))
    return {
        MOCK_VARIABLE: str(root / f"{board}.yaml"),
        "TT_METAL_RUNTIME_ROOT": str(root),
        "TT_METAL_CACHE": str(root / "cache"),
        "TT_METAL_LOGS_PATH": str(root),
        LOG_LEVEL_VARIABLE: os.environ.get(LOG_LEVEL_VARIABLE, "error"),
    }


def activate(board: str, where: str | os.PathLike | None = None) -> None:
    """Put this process on a mock `board`; before the first import of ttnn. See `environment`.

    Raises:
        UserError: no such board, or ttnn is not installed.
        RuntimeError: ttnn is imported already, so it is too late.
    """
    if "ttnn" in sys.modules:
        raise RuntimeError(
            "activate() must come before the first import of ttnn, which reads its environment only then"
        )
    quieten()
    os.environ.update(environment(board, where))


def quieten() -> None:
    """Silence the Python half of ttnn, which logs through loguru, unless the user wants more of ttnn than errors."""
    if os.environ.get(LOG_LEVEL_VARIABLE, "error") == "error":  # which a process of the mock hands down
        with contextlib.suppress(ImportError):
            from loguru import logger

            logger.disable("ttnn")


def is_installed() -> bool:
    """Can ttnn be imported here? Does not import it."""
    return importlib.util.find_spec("ttnn") is not None


def has_board() -> bool:
    """Is there a board whose kernels run: a Tenstorrent card with its driver, or a simulator of one?"""
    return bool(os.environ.get(SIMULATOR_VARIABLE)) or os.path.exists("/dev/tenstorrent")


def mock_board() -> str | None:
    """Name of the mock board, of a variant that of its board; None on any other."""
    if not is_mock():
        return None
    name = Path(os.environ[MOCK_VARIABLE]).stem
    return VARIANTS[name][0] if name in VARIANTS else name
