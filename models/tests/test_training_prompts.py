"""Prompts that a draft head is trained with: of a file, and built in."""

import random
import re
from email.message import Message
from pathlib import Path

import pytest

from models.cli.prompts import read_prompt_file
from models.errors import UserError
from models.llama.tokenizer import LlamaTokenizer
from models.tests.llama_fixtures import write_tiny_tokenizer
from models.training import material, prompts
from models.training.everyday import KIND_SHARES, compose_everyday
from models.training.everyday_words import WORDS_TEXT
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
    assert len({turns for _, turns in made}) == 1500
    kinds = {kind for kind, _ in made}
    assert kinds == {*SHARES, *KIND_SHARES, "text", "function"}
    early = [kind for kind, _ in made[:300]]
    assert all(early.count(kind) < 40 for kind in kinds) and len(set(early)) > 24
    assert questions(1500, seed=3) == made and questions(1500, seed=4) != made


def test_no_question_has_a_hole(few_files):
    draw = random.Random(0)
    texts = [compose(draw)[1] for _ in range(3000)]
    texts += [turn for _ in range(6000) for turn in compose_everyday(draw)[1]]
    for text in texts:
        assert text and text == text.strip() and not re.search(r"[{}|]|  |---", text), text


def test_every_list_of_words_has_a_slot_that_draws_from_it():
    draw = random.Random(1)
    said = " ".join(turn for _ in range(30000) for turn in compose_everyday(draw)[1])
    for name, entries in WORDS_TEXT.items():
        words = [" ".join(entry.split()) for entry in entries.split("|") if "{" not in entry]
        assert not words or any(word.lower() in said.lower() for word in words), name


def test_conversations_go_through_the_chat_template_turn_by_turn(few_files, tokenizer):
    made = training_prompts(tokenizer, None, 3000, 2000, seed=2)
    talks = [turns for kind, turns in questions(3000, seed=2) if kind == "follow-up"]
    assert len(talks) > 50 and {len(turns) for turns in talks} == {3}
    roles = ("user", "assistant", "user")
    expected = [
        tokenizer.chat([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)])
        for turns in talks
    ]
    assert [prompt.ids for prompt in made if prompt.kind == "follow-up"] == expected


def test_prompts_that_figures_are_measured_on_are_not_among_the_training_prompts(few_files):
    """Neither themselves nor near copies: no common run of six words, and few common words."""
    root = Path(__file__).resolve().parents[2]
    folders = [root / "demo" / "prompts", root / "scripts" / "suites" / "prompts"]
    if not folders[0].is_dir():
        pytest.skip("an installed package has no prompts of the demo")
    measured = [text for folder in folders for path in sorted(folder.glob("*.txt")) for text in read_prompt_file(path)]
    assert len(measured) > 25
    runs = {run for text in measured for run in _runs(text)}
    own = [(set(_words(text)) - COMMON, text) for text in measured]
    near = "Explain to me, in plain words: why does the sky look red in the late evening?"
    assert _nearest(near, own) > NEAR and any(run in runs for run in _runs(measured[0] + " " + near))
    for _, turns in questions(20000, seed=1):
        text = " ".join(turns)
        assert not any(run in runs for run in _runs(text)), text
        assert _nearest(text, own) <= NEAR, text


NEAR = 1 / 3  # common words over all words of two texts, those of COMMON not counted
COMMON = set("a an the of to in and or is are for with that this it i me my at on by as be do how what".split())


def _words(text):
    return re.findall(r"\w+", text.lower())


def _runs(text, length=6):
    words = _words(text)
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _nearest(text, measured):
    words = set(_words(text)) - COMMON
    return max(len(words & own) / len(words | own) for own, _ in measured)


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
