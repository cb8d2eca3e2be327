"""Install ttnn's kernel compiler, which its wheel does not contain: sfpi, in the release that the wheel names.

    python scripts/install_sfpi.py

Downloads the release's archive for this distribution (Debian, Fedora, or one like them), compares its hash with the
wheel's, and unpacks it into the installed ttnn package, where ttnn looks for a compiler first. The board and
Tenstorrent's simulator need it; mocks do not. Exit code: 0 installed or already there, 2 not possible.
"""

import argparse
import hashlib
import importlib.util
import platform
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.cli.command import Parser, run_command
from models.errors import UserError

COMPILER = "compiler/bin/riscv-tt-elf-g++"  # of an installed sfpi
FAMILIES = ("debian", "fedora")  # of distributions, that releases are made for


@dataclass(frozen=True)
class Release:
    """An archive of sfpi: where it is, and what it must hash to."""

    version: str
    url: str
    algorithm: str
    hash: str


def installed_ttnn() -> Path:
    """The directory of the package. Raises UserError where there is none."""
    spec = importlib.util.find_spec("ttnn")  # does not import it
    if spec is None or not spec.submodule_search_locations:
        raise UserError("ttnn is not installed here: install it first (pip install ttnn), it names the compiler")
    return Path(next(iter(spec.submodule_search_locations)))


def release(ttnn: Path, distribution: Mapping[str, str], machine: str) -> Release:
    """The release that ttnn's wheel names, for a distribution as /etc/os-release describes it."""
    file = ttnn / "tt_metal/sfpi-version"
    try:
        named = dict(re.findall(r"^(\w+)='([^']*)'", file.read_text(), re.MULTILINE))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}: this ttnn names no compiler") from None
    names = [distribution.get("ID", ""), *distribution.get("ID_LIKE", "").split()]
    family = next((name for name in names if name in FAMILIES), None)
    expected = named.get(f"sfpi_{machine}_{family}_txz_hash")
    if not expected:
        raise UserError(
            f"sfpi has no release for {names[0] or 'this distribution'} on {machine}, only for {', '.join(FAMILIES)} "
            f"and those like them: build it from {named.get('sfpi_repo', 'its source')}"
        )
    version = named["sfpi_version"]
    url = f"{named['sfpi_repo']}/releases/download/{version}/sfpi_{version}_{machine}_{family}.txz"
    return Release(version, url, named["sfpi_hashtype"], expected)


def install(found: Release, runtime: Path) -> None:
    """Download, compare and unpack into runtime/sfpi; what was there before goes only when all else is done."""
    with tempfile.TemporaryDirectory(dir=runtime) as name:
        part = Path(name)
        archive = part / "sfpi.txz"
        try:
            with urllib.request.urlopen(found.url) as source, archive.open("wb") as file:
                shutil.copyfileobj(source, file)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"cannot download {found.url}: {getattr(error, 'reason', error)}: download it elsewhere and unpack "
                f"its directory sfpi into {runtime}"
            ) from None
        came = hashlib.new(found.algorithm, archive.read_bytes()).hexdigest()
        if came != found.hash:
            raise UserError(f"{found.url} has the {found.algorithm} {came}, not {found.hash}: download it again")
        with tarfile.open(archive) as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)  # 3.10.11 has none
            packed.extractall(part)
        if not (part / "sfpi" / COMPILER).exists():
            raise UserError(f"{found.url} holds no sfpi/{COMPILER}: another ttnn may need another archive")
        shutil.rmtree(runtime / "sfpi", ignore_errors=True)
        (part / "sfpi").rename(runtime / "sfpi")


def command(argv: Sequence[str] | None) -> int:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    ttnn = installed_ttnn()
    try:
        distribution = platform.freedesktop_os_release()
    except OSError:
        distribution = {}
    found = release(ttnn, distribution, platform.machine())
    for place in (ttnn / "runtime/sfpi", Path("/opt/tenstorrent/sfpi")):
        if (place / COMPILER).exists():
            print(f"there is an sfpi in {place}: remove it to install {found.version} anew")
            return 0
    install(found, ttnn / "runtime")
    print(f"sfpi {found.version} is in {ttnn / 'runtime/sfpi'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: command(None)))
