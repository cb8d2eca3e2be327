"""Mutants stay what they are: faults that apply to the sources and name tests that there are."""

import pytest

from models.errors import UserError
from scripts import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_once_and_is_python(mutant):
    sound = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
    broken = mutant.applied(sound)
    assert broken != sound
    compile(broken, mutant.file, "exec")
    for test in mutant.tests:
        assert (mutants.ROOT / test.partition("::")[0]).is_file()


def test_there_are_many_and_each_has_a_name():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 25


def test_a_text_that_is_not_there_is_told():
    with pytest.raises(UserError, match="occurs 0 times"):
        mutants.MUTANTS[0].applied("nothing")
