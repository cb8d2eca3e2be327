"""Prompts that a draft head is trained with: of a file, and built in."""

import random
from email.message import Message

import pytest

from models.errors import UserError
from models.llama.tokenizer import LlamaTokenizer
from models.tests.llama_fixtures import write_tiny_tokenizer
from models.training import material, prompts
from models.training.material import passages, prose
from models.training.prompts import questions, training_prompts
from models.training.templates import SHARES, compose

LONG = "A queue keeps what waits in the order in which it came, so that whoever comes first is served first. " * 2
SOURCE = f'''"""{LONG}"""


def first(queue):
    """Short."""
    if not queue:
        return None
    number = len(queue)
    print("there are", number, "who wait")
    return queue[0]
'''


@pytest.fixture
def few_files(tmp_path, monkeypatch):
    """Two source files instead of a whole installation."""
    paths = [tmp_path / "queue_one.py", tmp_path / "broken.py"]
    paths[0].write_text(SOURCE)
    paths[1].write_text("def (")
    monkeypatch.setattr(prompts, "library_files", lambda: paths)
    monkeypatch.setattr(prompts, "package_files", lambda limit, draw: [])
    return paths


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return LlamaTokenizer.load(write_tiny_tokenizer(tmp_path_factory.mktemp("chat")))


def test_questions_are_all_different_mixed_and_repeat_with_their_seed(few_files):
    made = questions(1500, seed=3)
    assert len({text for _, text in made}) == 1500
    kinds = {kind for kind, _ in made}
    assert kinds == {*SHARES, "text", "function"}
    early = [kind for kind, _ in made[:300]]
    assert all(early.count(kind) < 60 for kind in kinds) and len(set(early)) > 12
    assert questions(1500, seed=3) == made and questions(1500, seed=4) != made


def test_no_question_has_a_hole(few_files):
    draw = random.Random(0)
    for text in [compose(draw)[1] for _ in range(3000)]:
        assert text == text.strip() and "{" not in text.replace("{t}", "") and "  " not in text, text


def test_passages_are_prose_and_short_functions(few_files):
    found = list(passages(few_files, random.Random(0)))
    assert found == [("text", LONG.strip()), ("function", SOURCE.split("\n\n\n")[1].strip())]


@pytest.mark.parametrize(
    "docstring",
    ["Short.", LONG.lower(), f"Args: x: {LONG}", f">>> {LONG}", "x = [1, 2, 3]; " * 40, f"- {LONG}"],
)
def test_what_is_no_prose_is_left_out(docstring):
    assert prose(docstring) == ""


@pytest.mark.parametrize(
    ("named", "permissive"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License-Expression": "Apache-2.0 AND BSD-3-Clause"}, True),
        ({"Classifier": "License :: OSI Approved :: Apache Software License"}, True),
        ({"License": "PSF"}, True),
        ({"License-Expression": "GPL-3.0-only"}, False),
        ({"License-Expression": "MIT AND LGPL-2.1"}, False),
        ({"Classifier": "License :: Other/Proprietary License"}, False),
        ({"Classifier": "Topic :: BSD"}, False),
        ({}, False),
    ],
)
def test_packages_are_read_only_where_their_licence_lets_anybody(named, permissive):
    class Package:
        metadata = Message()

    for name, value in named.items():
        Package.metadata[name] = value
    assert material._permissive(Package) == permissive


def test_prompts_of_a_file_go_through_the_chat_template(tokenizer, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Hello\n---\nGreet Ada\n---\nHello\n---\n" + "long " * 400)
    made = training_prompts(tokenizer, file, 10, 200, seed=1)
    assert [prompt.ids for prompt in made] == [tokenizer.chat("Hello"), tokenizer.chat("Greet Ada")]
    assert len(training_prompts(tokenizer, file, 2, 2000, seed=1)) == 2
    with pytest.raises(UserError, match="0 of 4 prompts have at most 5 tokens"):
        training_prompts(tokenizer, file, 10, 5, seed=1)


def test_a_model_without_a_chat_template_gets_beginnings_of_source_files(few_files, tmp_path):
    few_files[0].write_text(SOURCE * 20)
    plain = LlamaTokenizer.load(write_tiny_tokenizer(tmp_path / "plain", chat_template=None))
    made = training_prompts(plain, None, 40, 64, seed=1)
    lines = {line for line in (SOURCE * 20).splitlines() if line}
    assert len(made) > 10 and all(24 <= len(prompt.ids) <= 64 for prompt in made)
    for prompt in made:
        beginning = plain.decode(prompt.ids).lstrip("\n").split("\n")[0]
        assert any(line.startswith(beginning.rstrip()) or line in beginning for line in lines), beginning
