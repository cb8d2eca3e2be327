"""The package that `pip install .` installs: built as a wheel, installed elsewhere and used there."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "generated", "results")

USE = """
import models
from models import LLM
from models.cli.environment import project_version

with LLM.load("tiny") as llm:
    written = llm.generate("def add(a, b):", max_new_tokens=8)
print(models.__file__, project_version(), len(written.token_ids), sep="\\n")
"""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what an earlier build left in the repository would end up in the wheel."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "-w", folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_library_and_nothing_else(wheel):
    source = wheel.parent / "source"
    library = [path.relative_to(source) for path in (source / "models").rglob("*") if path.is_file()]
    wanted = {str(path) for path in library if path.parts[1] != "tests"}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted
    checkpoint = ("config.json", "tokenizer.json", "model.safetensors", "README.md")
    assert names >= {f"models/checkpoints/tiny-{role}/{name}" for role in ("target", "draft") for name in checkpoint}


def test_metadata_names_pinned_requirements_and_leaves_ttnn_to_an_extra(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_string(archive.read(name).decode())
    assert (metadata["Name"], metadata["Requires-Python"]) == ("tt-speculative-llama", ">=3.10")
    assert metadata.get_all("Provides-Extra") == ["tt", "server", "peers", "dev"]
    requirements = metadata.get_all("Requires-Dist")
    loose = [line for line in requirements if not re.match(r"[\w-]+==\d", line)]
    assert [re.sub(" *;.*", "", line) for line in loose] == ["tt-speculative-llama[server]"]  # a part of dev
    always = {line.split("==")[0] for line in requirements if "extra ==" not in line}
    assert always >= {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
    assert {line.split("==")[0] for line in requirements if 'extra == "tt"' in line} == {"ttnn"}
    assert not always & {"ttnn", "fastapi", "uvicorn", "pytest", "ruff", "setuptools"}


def test_installed_package_writes_text_away_from_the_repository(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    pip("install", "--no-deps", "--no-compile", "--target", installed, wheel)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=empty, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    file, version, tokens = done.stdout.splitlines()[-3:]
    assert Path(file) == installed / "models" / "__init__.py"
    assert version == re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert tokens == "8"


def test_editable_install_puts_the_repository_on_the_path(wheel, tmp_path):
    """With it demo, scripts and tests import from any directory, not the library alone."""
    source = wheel.parent / "source"
    code = "import sys; from setuptools import build_meta; build_meta.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (editable,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(editable)
    (path_file,) = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert path_file.endswith(".pth")
    assert archive.read(path_file).decode().splitlines() == [str(source)]


def test_environment_of_these_tests_imports_this_checkout_from_any_directory(tmp_path):
    """An environment made for another checkout would run that one's scripts and demos in the tests that start them."""
    code = "import demo, models, scripts, tests\nfor room in demo, models, scripts, tests: print(room.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"run `pip install -e .` here: {done.stderr}"
    found = [Path(line) for line in done.stdout.splitlines()]
    assert found == [ROOT / name for name in ("demo", "models", "scripts", "tests")], "run `pip install -e .` here"
