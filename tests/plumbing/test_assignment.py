"""Assignments: what is left to write, and that those of docs/assignments.md can be set."""
import ast
import re
from pathlib import Path

import pytest

from runs import assignment
from support.flags import InputError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "assignments.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python runs/assignment.py (.*?) --out_dir", PAGE, flags=re.M)
FUNCTIONS = sorted({name for command in COMMANDS for name in command.split()})


def source_of(function):
    module, *names = function.split(".")
    return (ROOT / f"{module}.py").read_text(encoding="utf-8"), names


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_body_goes_and_nothing_else(function):
    """Signature and docstring stay; all other lines are as they were."""
    source, names = source_of(function)
    copy = assignment.without_body(source, names)
    before, after = assignment.find(source, names), assignment.find(copy, names)
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after)
    error = after.body[-1]
    assert isinstance(error, ast.Raise) and len(after.body) <= 2
    old, new = source.splitlines(), copy.splitlines()
    assert new[:error.lineno - 1] == old[:error.lineno - 1]
    assert new[error.end_lineno:] == old[before.end_lineno:]


def test_a_copy(tmp_path):
    assignment.main(["losses.dpo", "losses.ipo", f"--out_dir={tmp_path}/new/homework"])
    copy = tmp_path / "new/homework"
    assert (copy / "losses.py").read_text(encoding="utf-8").count("yours to write") == 2
    assert (copy / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert (copy / "runs/test.sh").is_file() and (copy / "tests/test_losses.py").is_file()
    assert (copy / ".gitignore").is_file() and not (copy / ".git").exists()
    assert not (copy / "out").exists() and not (copy / ".venv").exists()
    with pytest.raises(InputError, match="--out_dir: .* is there already"):
        assignment.main(["losses.dpo", f"--out_dir={copy}"])


@pytest.mark.parametrize("function, message", [
    ("losses", "name a file of the root and a function"), ("nowhere.dpo", "name a file"),
    (f"{ROOT}/losses.dpo", "name a file"), ("runs/bench.main", "name a file"),
    ("losses.nothing", "there is no nothing"), ("reward.RewardModel", "is a class"),
    ("reward.RewardModel.nothing", "there is no RewardModel.nothing")])
def test_what_is_no_function(function, message, tmp_path):
    with pytest.raises(InputError, match=message):
        assignment.main([function, f"--out_dir={tmp_path}/homework"])
    assert list(tmp_path.iterdir()) == []


def test_the_page_names_tests_that_exist():
    """And enough functions, of several files."""
    for name in re.findall(r"tests/test_\w+\.py", PAGE):
        assert (ROOT / name).is_file()
    assert len(COMMANDS) >= 4 and len({name.split(".")[0] for name in FUNCTIONS}) >= 4
