"""Assignments: what is left to write, that no copy has an answer in it, and the pages of the
sets."""
import ast
import os
import re
import runpy
import subprocess
import sys
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import losses
from runs import assignment, handout, variants
from runs.course import SETS
from support.flags import InputError

ROOT = Path(__file__).parents[2]
ALL_SETS = [*SETS, *assignment.PROJECTS]
FUNCTIONS = list(dict.fromkeys(name for functions in SETS.values() for name in functions))


# ------ what is left to write


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_body_goes_and_nothing_else(function):
    """Signature and docstring stay; all other lines are as they were."""
    _, source, names = assignment.read_source(function)
    copy = assignment.without_body(source, names)
    before, after = assignment.find(source, names), assignment.find(copy, names)
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after)
    error = after.body[-1]
    assert isinstance(error, ast.Raise) and len(after.body) <= 2
    old, new = source.splitlines(), copy.splitlines()
    assert new[:error.lineno - 1] == old[:error.lineno - 1]
    assert new[error.end_lineno:] == old[before.end_lineno:]


def test_a_copy_of_single_functions(tmp_path):
    """p_dpo, which repeats dpo, calls it instead; everything else is as it was."""
    assignment.main(["losses.dpo", "losses.ipo", f"--out_dir={tmp_path}/new/homework"])
    copy = tmp_path / "new/homework"
    source = (copy / "losses.py").read_text(encoding="utf-8")
    assert source.count("yours to write") == 2
    assert "return dpo(logps, ref_logps, beta) + gamma * kl" in source
    assert (copy / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    assert (copy / "runs/test.sh").is_file() and (copy / "tests/test_losses.py").is_file()
    assert (copy / ".gitignore").is_file() and not (copy / ".git").exists()
    for left_out in ("out", ".venv", "README.md", "results", "dev", "experiments",
                     "tests/plumbing", "runs/grade.py", "runs/handouts"):
        assert not (copy / left_out).exists(), left_out
    with pytest.raises(InputError, match="--out_dir: .* is there already"):
        assignment.main(["losses.dpo", f"--out_dir={copy}"])


@pytest.mark.parametrize("function", ["losses.e_dpo", "losses.best_member"])
def test_functions_that_give_each_other_away_go_together(function, tmp_path, capsys):
    assignment.main([function, f"--out_dir={tmp_path}/homework"])
    copy = (tmp_path / "homework/losses.py").read_text(encoding="utf-8")
    assert copy.count("yours to write") == 2
    said = capsys.readouterr().out
    assert "losses.e_dpo" in said and "losses.best_member" in said


@pytest.mark.parametrize("function, message", [
    ("losses", "name a set .* or a file of the root and a function"), ("nowhere.dpo", "name a set"),
    (f"{ROOT}/losses.dpo", "name a set"), ("runs/bench.main", "name a set"),
    ("losses.nothing", "there is no nothing"), ("reward.RewardModel", "is a class"),
    ("reward.RewardModel.nothing", "there is no RewardModel.nothing")])
def test_what_is_no_function(function, message, tmp_path):
    with pytest.raises(InputError, match=message):
        assignment.main([function, f"--out_dir={tmp_path}/homework"])
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_of_one_set(tmp_path):
    for words in (["losses.dpo"], ["pairs", "bias"]):
        with pytest.raises(InputError, match="--handout: there is a page for each set"):
            assignment.main([*words, "--handout", f"--out_dir={tmp_path}/homework"])
    (tmp_path / "homework-teacher.md").touch()
    with pytest.raises(InputError, match="homework-teacher.md is there already"):
        assignment.main(["pairs", "--handout", f"--out_dir={tmp_path}/homework"])
    assert not (tmp_path / "homework").exists()


# ------ no copy repeats an answer


@lru_cache(maxsize=None)
def squashed(text, is_code=False):
    """A text without spaces, quotes and the breaks of its lines; code without its comments."""
    text = ast.unparse(ast.parse(text)) if is_code else text
    return re.sub(r"""[\s"'\\]""", "", text)


def says_nothing(expression):
    """Is it one call, or one comparison, of names and constants? What a function is given, and
    which other function it asks, is no secret."""
    if isinstance(expression, ast.Compare):
        parts = [expression.left, *expression.comparators]
    elif isinstance(expression, ast.Call):
        arguments = [*expression.args, *(keyword.value for keyword in expression.keywords)]
        parts = [expression.func, *arguments]
    else:
        parts = [expression]
    simple = (ast.Name, ast.Attribute, ast.Constant, ast.List)
    return all(isinstance(node, (*simple, ast.Load)) for part in parts for node in ast.walk(part))


def answer_of(function):
    """The expressions by which a function says how it is done: what its statements compute, ask and
    run through, if that has 16 characters or more."""
    _, source, names = assignment.read_source(function)
    answer = []
    for node in ast.walk(assignment.find(source, names)):
        expression = None
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return)):
            expression = node.value
        elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            expression = node.value
        elif isinstance(node, (ast.If, ast.While)):
            expression = node.test
        elif isinstance(node, ast.For):
            expression = node.iter
        if expression is not None and not says_nothing(expression):
            answer.append(squashed(ast.unparse(expression)))
    return [text for text in answer if len(text) >= 16]


def texts_of(folder):
    """{path: its text, squashed} of all files in a folder but pictures."""
    texts = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in (".png", ".svg", ".html"):
            text = path.read_text(encoding="utf-8")
            texts[str(path.relative_to(folder))] = squashed(text, path.suffix == ".py")
    return texts


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_searched_for(function):
    """Each function says how it is done in at least one line, and it is found where it stands."""
    path, source, _ = assignment.read_source(function)
    assert answer_of(function)
    assert all(text in squashed(source, is_code=True) for text in answer_of(function))


def test_the_readme_has_an_answer():
    """So a copy must not have the README, and the search notices it."""
    readme = squashed((ROOT / "README.md").read_text(encoding="utf-8"))
    assert any(text in readme for text in answer_of("losses.e_dpo"))


@pytest.mark.parametrize("name", SETS)
def test_no_copy_has_an_answer_in_it(name, tmp_path):
    """No line of a function that is left to write stands anywhere in the copy, the page with its
    hints included."""
    assignment.main([name, "--handout", f"--out_dir={tmp_path}/copy"])
    texts = texts_of(tmp_path / "copy")
    assert {"losses.py", "README.md", "tests/test_losses.py", "support/run.py"} <= set(texts)
    given_away = [f"{function}: {answer} in {path}" for function in SETS[name]
                  for answer in answer_of(function) for path, text in texts.items()
                  if answer in text]
    assert given_away == []


# ------ a copy that is finished


def finish(copy, functions):
    """Puts the solutions into a copy, as a student would."""
    for function, body in assignment.bodies_in_copy(functions).items():
        path, source, names = assignment.read_source(function)
        if body is None:
            right = assignment.find(source, names)
            text = (copy / path).read_text(encoding="utf-8")
            empty = assignment.find(text, names)
            lines = text.splitlines()
            lines[empty.lineno - 1:empty.end_lineno] = source.splitlines()[
                right.lineno - 1:right.end_lineno]
            (copy / path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_tests(copy, *arguments):
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                           *arguments], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def imports(path):
    """The files that a file may import, from the root."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [module.replace(".", "/") + ".py" for module in modules]


def test_a_finished_copy_of_all_sets(tmp_path):
    """Nothing in it imports a file that stayed behind. Where a function has another body in the
    copy, it computes the same."""
    assignment.main([*ALL_SETS, f"--out_dir={tmp_path}/copy"])
    copy = tmp_path / "copy"
    finish(copy, FUNCTIONS)
    for path in copy.rglob("*.py"):
        for module in imports(path):
            if (ROOT / module).is_file():
                assert (copy / module).is_file(), f"{path}: {module}"
    theirs = runpy.run_path(str(copy / "losses.py"))
    generator = torch.Generator().manual_seed(0)
    logps, ref_logps = torch.randn(2, 7, 2, generator=generator)
    rewards, kl = torch.randn(7, 2, 3, generator=generator), torch.randn(7, generator=generator)
    for name, columns in (("p_dpo", [kl]), ("dp_dpo", [rewards, kl])):
        arguments = (logps, ref_logps, *columns, 0.3, 0.7)
        assert torch.equal(theirs[name](*arguments), vars(losses)[name](*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_SETS)
def test_all_tests_of_a_finished_copy_pass(name, tmp_path):
    assignment.main([name, "--handout", f"--out_dir={tmp_path}/copy"])
    finish(tmp_path / "copy", assignment.functions_of([name]))
    passed = run_tests(tmp_path / "copy")
    assert passed.returncode == 0, passed.stdout


# ------ the pages


class Page(HTMLParser):
    """Which tags are open, and from where something is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name == "src"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


@pytest.mark.parametrize("name", ALL_SETS)
def test_the_page_of_a_set(name, tmp_path):
    """What a student and what a teacher gets; the signatures are those of the code."""
    assignment.main([name, "--handout", f"--out_dir={tmp_path}/copy"])
    student = (tmp_path / "copy/README.md").read_text(encoding="utf-8")
    teacher = (tmp_path / "copy-teacher.md").read_text(encoding="utf-8")
    for heading in ("Goals", "The idea", "The equation", "Commands", "Questions"):
        assert student.count(f"\n## {heading}\n") == teacher.count(f"\n## {heading}\n") == 1
    for function, points in SETS.get(name, {}).items():
        assert f"`{function}`: {points} points, about" in student
        assert f"```python\n{handout.signature(function)}\n```" in student
        assert student.count("<summary>Hint") == 3 * len(SETS[name])
        assert handout.solution(function) in teacher
        assert handout.solution(function) not in student
    questions = re.findall(r"^\*\*(\d)\.\*\*", student, flags=re.M)
    assert questions == ["1", "2", "3"]
    assert teacher.count("Rubric:") == 3
    for secret in ("Rubric", "\n## For the teacher\n", "\n### Answers\n"):
        assert secret in teacher and secret not in student
    for path in re.findall(r"!\[.*?\]\((.*?)\)", student):
        assert (tmp_path / "copy" / path).is_file()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", teacher):
        assert (tmp_path / path).is_file()

    for path, opened in (("copy/handout.html", 0), ("copy-teacher.html", len(SETS.get(name, {})))):
        text = (tmp_path / path).read_text(encoding="utf-8")
        page = Page(text)
        assert page.open == [] and len(page.sources) == 1
        assert all(source.startswith("data:image/") for source in page.sources)
        assert text.count("<details open>") == 3 * opened
        assert ("Rubric" in text) == path.endswith("teacher.html")


def test_the_page_of_a_variant(tmp_path):
    """Docstrings, points and the teacher's solutions are the variant's, the loss of zoo.py among
    them. The page says what else is different, at its top and at the function."""
    words = ["pairs", "--student=s1234", "--handout", f"--out_dir={tmp_path}/copy"]
    variant = variants.draw("s1234", "pairs", SETS["pairs"])
    assert variant.notes[0] == "losses.ipo: the fourth power, not the square."
    assignment.main(words)
    student = (tmp_path / "copy/README.md").read_text(encoding="utf-8")
    teacher = (tmp_path / "copy-teacher.md").read_text(encoding="utf-8")
    solution = "(h - 1 / (2 * tau)) ** 4"
    assert solution in teacher and solution not in student
    zoo = handout.solution(variant.loss)
    assert zoo in teacher and zoo not in student
    for page in (student, teacher):
        assert "preference optimisation: (h - 1 / (2 tau))^4." in page
        assert "preference optimisation: (h - 1 / (2 tau))^2." not in page
        assert f"### `{variant.loss}`: 4 points\n" in page and "14 points for the functions" in page
        assert all(f"- {note}\n" in page for note in variant.notes)
        assert "**In this variant:** losses.ipo: the fourth power" in page
    assert "is a variant" not in handout.page("pairs")


def test_how_long_a_set_takes():
    """From one hour to a project; the page of the course says the same."""
    spent = {name: re.search(r"\*\*About (.*?) in all\.", handout.page(name)).group(1)
             for name in ALL_SETS}
    assert spent["pairs"] == "1 hour" and spent["leaderboard"] == "15 hours"
    page = (ROOT / "docs/assignments.md").read_text(encoding="utf-8")
    for name in SETS:
        assert f"| `{name}` | {spent[name]} |" in page
    assert [handout.duration(n) for n in (10, 74, 76)] == ["0.5 hours", "1 hour", "1.5 hours"]


@pytest.mark.parametrize("name", ALL_SETS)
def test_a_page_names_tests_that_a_copy_has(name):
    for path in re.findall(r"tests/\S+\.py", handout.page(name, teacher=True)):
        assert (ROOT / path).is_file() and Path(path).parent.name == "tests"


def test_from_markdown_to_html():
    text = handout.to_html(
        "# A & B\n\nTwo *words*, 2 * 3, `a < b`.\n\n- one\n  more\n- **two**\n\n"
        "| x | y |\n|---|---|\n| 1 | [z](z.md) |\n\n```\na *b* <c>\n\nd\n```\n\nEnd.\n", ".")
    body = text.partition("<body>\n")[2]
    assert body == (
        "<h1>A &amp; B</h1>\n<p>Two <em>words</em>, 2 * 3, <code>a &lt; b</code>.</p>\n"
        "<ul><li>one\n  more\n</li>\n<li><strong>two</strong></li>\n</ul>\n"
        "<table><tr><td>x</td><td>y</td></tr>\n"
        '<tr><td>1</td><td><a href="z.md">z</a></td></tr>\n</table>\n'
        "<pre>a *b* &lt;c&gt;\n\nd</pre>\n<p>End.</p>\n</body></html>\n")


def test_the_page_of_the_course_names_every_set():
    page = (ROOT / "docs/assignments.md").read_text(encoding="utf-8")
    for name in ALL_SETS:
        assert f"| `{name}` |" in page
    for path in re.findall(r"tests/test_\w+\.py", page):
        assert (ROOT / path).is_file()
