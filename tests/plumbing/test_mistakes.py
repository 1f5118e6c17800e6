"""The typical mistakes of mistakes.py: each can be made."""
import ast

import pytest
from first_failure import SET_OF, wrong_source
from mistakes import MISTAKES


@pytest.mark.parametrize("function", SET_OF)
def test_mistakes_can_be_made(function):
    """Each replaces a part of its function that is there once, and what it leaves is Python. Every
    function of the course has some."""
    mistakes = [mistake for mistake in MISTAKES if mistake.function == function]
    assert len(mistakes) >= 3 and len({mistake.name for mistake in mistakes}) == len(mistakes)
    for mistake in mistakes:
        ast.parse(wrong_source(mistake))


def test_mistakes_are_in_functions_of_the_course():
    assert {mistake.function for mistake in MISTAKES} == set(SET_OF)
