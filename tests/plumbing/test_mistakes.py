"""The typical mistakes of mistakes.py: each can be made, is caught, and most get a good hint."""
import ast
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_the_first_failure_names_the_idea():
    """Of three quarters of the mistakes, and every mistake makes a test fail. It prints a table:
    run it with -m slow -s."""
    script = Path(__file__).with_name("first_failure.py")
    subprocess.run([sys.executable, str(script)], check=True)


def test_mistakes_are_in_functions_of_the_course():
    assert {mistake.function for mistake in MISTAKES} == set(SET_OF)
