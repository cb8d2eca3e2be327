"""Texts and functions that every installation has, as material for questions: docstrings and source code.

The standard library, and installed packages whose own metadata names a licence that lets anybody use the text.
"""

from __future__ import annotations

import ast
import importlib.metadata
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# A package counts if its licence names one of these and none of the others.
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND)\b", re.IGNORECASE)
NOT_PERMISSIVE = re.compile(r"GPL|proprietary|NVIDIA|Mozilla|MPL|CC-BY|commercial", re.IGNORECASE)
# Tables of characters, generated text and tests say little in words.
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__pycache__", "idlelib", "data", "tests", "test"}
LARGEST_FILE = 200_000
# Examples, lists, tables and descriptions of arguments.
NO_PROSE = re.compile(
    r">>>|\b(Args|Arguments|Returns?|Parameters|Raises|Examples?|Note)s?:"
    r"|^\s*[:.@|+*=-]|\w+ *: *\w+ *$|-----|=====",
    re.MULTILINE,
)


def library_files() -> list[Path]:
    """The standard library's source files, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]


def package_files(limit: int, draw: random.Random) -> list[Path]:
    """At most `limit` source files of installed packages under a permissive licence, drawn at random."""
    files = []
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.name or ""):
        if not _permissive(package):
            continue
        for file in package.files or ():
            if file.suffix == ".py" and not SKIPPED_FOLDERS & set(file.parts):
                files.append(Path(str(package.locate_file(file))))
    files.sort()
    return draw.sample(files, min(limit, len(files)))


def _permissive(package: importlib.metadata.Distribution) -> bool:
    about = package.metadata
    named = [about.get("License-Expression") or "", *(about.get_all("Classifier") or ())]
    licences = [text for text in named if text.startswith("License ::") or text == named[0]]
    if not any(licences):
        licences = [(about.get("License") or "")[:80]]
    text = " ".join(licences)
    return bool(PERMISSIVE.search(text)) and not NOT_PERMISSIVE.search(text)


def passages(files: list[Path], draw: random.Random) -> Iterator[tuple[str, str]]:
    """("text" or "function", passage) of the files, at most a few of each file, so that all are heard."""
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source) if len(source) < LARGEST_FILE else None
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if tree is None:
            continue
        texts, functions = [], []
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = prose(ast.get_docstring(node) or "")
                if text:
                    texts.append(text)
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 18:
                code = ast.get_source_segment(source, node) or ""
                if 120 < len(code) < 480 and code.isascii():
                    functions.append(code)
        for text in draw.sample(texts, min(3, len(texts))):
            yield "text", text
        for code in draw.sample(functions, min(1, len(functions))):
            yield "function", code


def prose(docstring: str) -> str:
    """The first sentences of a docstring, 25 to 90 words; "" where it is short, or no prose."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    kept: list[str] = []
    for paragraph in paragraphs:
        if NO_PROSE.search(paragraph):
            break
        kept.append(" ".join(paragraph.split()))
        if sum(len(text.split()) for text in kept) > 60:
            break
    text = " ".join(kept)
    text = re.sub(r"`{1,2}~?\.?([^`]*)`{1,2}|:\w+:", r"\1", text)
    words = text.split()
    if len(words) > 90:
        text = " ".join(words[:90])
        text = text[: text.rfind(". ") + 1]
    letters = sum(c.isalpha() or c in " ,." for c in text)
    if len(text.split()) < 25 or letters < 0.94 * len(text) or not text[:1].isupper():
        return ""
    return text
