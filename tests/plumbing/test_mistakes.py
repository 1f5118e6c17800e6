"""The typical mistakes of mistakes.py: each can be made."""
import ast
import textwrap
from functools import lru_cache
from pathlib import Path

import pytest
from mistakes import MISTAKES

from runs.assignment import find
from runs.course import SETS

ROOT = Path(__file__).parents[2]
FUNCTIONS = [function for functions in SETS.values() for function in functions]


@lru_cache(maxsize=None)
def parts(function):
    """Cuts the file of a function into what is before it, the function, and what is after it."""
    module, *names = function.split(".")
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    lines, node = source.splitlines(keepends=True), find(source, names)
    first, last = node.lineno - 1, node.end_lineno
    return "".join(lines[:first]), "".join(lines[first:last]), "".join(lines[last:])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mistakes_can_be_made(function):
    """Each replaces a part of its function that is there once, and what it leaves is Python."""
    mistakes = [mistake for mistake in MISTAKES if mistake.function == function]
    assert len(mistakes) >= 3 and len({mistake.name for mistake in mistakes}) == len(mistakes)
    source = parts(function)[1]
    for mistake in mistakes:
        assert source.count(mistake.old) == 1, mistake
        ast.parse(textwrap.dedent(source.replace(mistake.old, mistake.new)))


def test_mistakes_are_in_functions_of_the_course():
    assert {mistake.function for mistake in MISTAKES} == set(FUNCTIONS)


ORDER = {   # the test files of a set, in the order in which one learns
    "pairs": ["tests/test_losses.py"],
    "distillation": ["tests/test_losses.py"],
    "bias": ["tests/test_data.py"],
    "reward": ["tests/test_losses.py", "tests/test_data.py", "tests/test_tree.py"],
    "tree": ["tests/test_tree.py", "tests/test_model.py"],
    "generation": ["tests/test_model.py", "tests/test_estimators.py"],
    "training": ["tests/test_scripts.py", "tests/plumbing/test_run_folder.py"],
}
