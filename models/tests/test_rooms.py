"""Which room may import which: read from the source, nothing is imported."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("models", "demo", "scripts")
MODEL_PACKAGES = ("models.llama", "models.torch_llama", "models.ttnn_llama")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the rooms but for tests, by its name."""
    files = (file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py")))
    return {module_name(file): ast.parse(file.read_text()) for file in files if "tests" not in file.parts}


def within(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(body: list[ast.stmt], *, everywhere: bool) -> Iterator[ast.stmt]:
    """All statements; only those that run when the module is imported unless everywhere."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            if field == "body" and is_type_checking(node) and not everywhere:
                continue
            for inner in getattr(node, field, []):
                yield from statements([inner] if isinstance(inner, ast.stmt) else inner.body, everywhere=everywhere)


def imported(name: str, *, everywhere: bool) -> set[str]:
    """What a module imports: modules of the rooms by their full names, others as they are written."""
    found: set[str] = set()
    for node in statements(modules()[name].body, everywhere=everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports by a relative path: write the full name"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & modules().keys()) or {node.module}
            if not below <= modules().keys():
                found.add(node.module)
    return found


def offences(importers: tuple[str, ...], imports: tuple[str, ...], *, apart_from: tuple[str, ...] = ()) -> list[str]:
    """Imports that a rule forbids, wherever they stand in a module."""
    return [
        f"{name} imports {each}"
        for name in modules()
        if within(name, *importers) and not within(name, *apart_from)
        for each in sorted(imported(name, everywhere=True))
        if within(each, *imports)
    ]


def executed(name: str) -> set[str]:
    """Modules of the rooms that run before the rest of a module does: those it imports, and their packages."""
    found: set[str] = set()
    for each in imported(name, everywhere=False):
        parts = each.split(".")
        found |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return {each for each in found & modules().keys() if not within(name, each)}


def reached(name: str) -> set[str]:
    """All modules of the rooms that are imported with a module."""
    found, left = {name}, [name]
    while left:
        new = executed(left.pop()) - found
        found |= new
        left += new
    return found


# ------------------------------------------------------------------------------------------------------------ the rules
def test_the_library_knows_nothing_of_the_demo_or_the_scripts():
    assert offences(("models",), ("demo", "scripts")) == []


def test_nothing_stands_on_the_demo():
    assert offences(("models", "scripts"), ("demo",)) == []


def test_the_engine_knows_no_network_and_no_library_of_one():
    assert offences(("models.speculative",), ("ttnn", "transformers", *MODEL_PACKAGES)) == []
    engine = set().union(*(reached(name) for name in modules() if within(name, "models.speculative")))
    assert [name for name in sorted(engine) if within(name, *MODEL_PACKAGES)] == []


def test_no_network_knows_a_drafter():
    assert offences(MODEL_PACKAGES, ("models.speculative.drafters",)) == []


def test_the_networks_do_not_know_each_other():
    assert offences(("models.llama",), ("models.torch_llama", "models.ttnn_llama")) == []
    assert offences(("models.torch_llama",), ("models.ttnn_llama",)) == []
    assert offences(("models.ttnn_llama",), ("models.torch_llama",)) == []


def test_no_product_code_knows_the_mock():
    assert offences(("models", "demo"), ("models.board_mock",), apart_from=("models.board_mock",)) == []


def test_acceptance_needs_torch_and_numpy_alone():
    outside = {each.partition(".")[0] for each in imported("models.speculative.acceptance", everywhere=True)}
    assert outside - sys.stdlib_module_names == {"numpy", "torch"}


def circles() -> list[list[str]]:
    """Modules that cannot be imported one without the other, as groups."""
    after = {name: reached(name) for name in modules()}
    groups = {frozenset(other for other in after[name] if name in after[other]) for name in modules()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_modules_import_each_other():
    """At module level: what is imported for annotations or within functions makes no circle."""
    assert circles() == []


# ------------------------------------------------------------------------------------------- that they would be noticed
@pytest.fixture
def rooms(monkeypatch):
    """Puts sources in the place of the rooms' modules."""

    def furnish(**sources):
        trees = {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}
        monkeypatch.setattr(sys.modules[__name__], "modules", lambda: trees)

    return furnish


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import models.b", ["models.a imports models.b"]),
        ("from models import b", ["models.a imports models.b"]),
        ("from models.b import thing", ["models.a imports models.b"]),
        ("def f():\n    from models.b import thing", ["models.a imports models.b"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import models.b", ["models.a imports models.b"]),
        ("try:\n    pass\nexcept ImportError:\n    import models.b", ["models.a imports models.b"]),
        ("import models.better", []),
    ],
)
def test_an_import_is_found_wherever_it_stands(rooms, source, expected):
    rooms(models="", models__a=source, models__b="", models__better="")
    assert offences(("models.a",), ("models.b",)) == expected


@pytest.mark.parametrize(
    ("back", "circle"),
    [
        ("import models.a", True),
        ("class C:\n    from models.a import thing", True),
        ("if True:\n    from models import a", True),
        ("def f():\n    import models.a", False),
        ("if TYPE_CHECKING:\n    import models.a", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import models.a", True),
    ],
)
def test_a_circle_is_one_only_at_module_level(rooms, back, circle):
    rooms(models="", models__a="from models.b import c", models__b="", models__b__c="import models.d", models__d=back)
    assert circles() == ([["models.a", "models.b.c", "models.d"]] if circle else [])
