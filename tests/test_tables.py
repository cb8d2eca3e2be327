"""scripts/tables.py, and that the documents say what docs/results says and name what there is."""

import json
import re
import shutil

import pytest

from models.errors import UserError
from scripts import tables

DOCUMENTS = sorted({*tables.ROOT.glob("*.md"), *tables.ROOT.glob("docs/*.md")})


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """Documents and results that may be changed."""
    for name in tables.DOCUMENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tables.ROOT / name, tmp_path / name)
    shutil.copytree(tables.RESULTS, tmp_path / "docs" / "results")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "docs" / "results")
    return tmp_path


def test_the_tables_are_what_the_results_say(capsys):
    assert tables.command(["--check"]) == 0, capsys.readouterr().err


def test_every_table_stands_in_a_document():
    shown = {name for document in tables.DOCUMENTS for _, name, _ in tables.MARKED.findall(_text(document))}
    assert shown == set(tables.TABLES)


def _text(document):
    return (tables.ROOT / document).read_text()


def test_new_results_are_found_and_written(copy, capsys):
    file = copy / "docs" / "results" / "sweep.json"
    results = json.loads(file.read_text())
    results["lengths"]["2"]["speedup"]["median"] = 1234.5
    file.write_text(json.dumps(results))
    before = (copy / "docs" / "measured.md").read_text()
    assert tables.command(["--check"]) == 1
    assert "docs/measured.md: not what docs/results says: sweep" in capsys.readouterr().err
    assert (copy / "docs" / "measured.md").read_text() == before
    assert tables.command([]) == 0
    assert "1234.50x" in (copy / "docs" / "measured.md").read_text()
    assert tables.command(["--check"]) == 0


@pytest.mark.parametrize("content", [None, "{"])
def test_results_that_cannot_be_read_are_one_line(copy, content):
    file = copy / "docs" / "results" / "peers.json"
    file.unlink()
    if content:
        file.write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*peers.json .*: write it with the command"):
        tables.command(["--check"])


def test_a_name_without_a_table_is_refused():
    with pytest.raises(UserError, match="there is no table oracle: choose from compare, "):
        tables.filled("<!-- table oracle -->\n<!-- /table -->\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document):
    text = document.read_text()
    named = set(re.findall(r"\b(?:scripts|demo|docs|models|tests)/[\w./-]*\w\.(?:py|sh|md|json|png)\b", text))
    missing = {name for name in named if "NAME" not in name and not (tables.ROOT / name).exists()}
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    missing |= {link for link in links if not (document.parent / link).exists()}
    assert not missing
